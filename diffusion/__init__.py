"""The diffusion process: noise schedule, training loss and samplers."""

from .gaussian_diffusion import GaussianDiffusion
from .schedule import linear_betas, respaced_timesteps, squared_cosine_betas

__all__ = ["GaussianDiffusion", "create_diffusion"]


def create_diffusion(
    timestep_respacing: str | int | list[int] | None,
    noise_schedule: str = "linear",
    learn_sigma: bool = True,
    diffusion_steps: int = 1000,
    sigma_small: bool = False,
) -> GaussianDiffusion:
    """Build the process over all of diffusion_steps (timestep_respacing "" or None) or over fewer of them.

    timestep_respacing is a count ("250"), counts for equal sections ("10,20,30"), or "ddimN" for a fixed stride.
    sigma_small: with learn_sigma=False, use the posterior variance instead of beta as the fixed one.
    Raises ValueError for an unknown schedule or a respacing that does not fit.
    """
    schedules = {"linear": linear_betas, "squaredcos_cap_v2": squared_cosine_betas}
    if noise_schedule not in schedules:
        raise ValueError(f"noise schedule {noise_schedule!r} is unknown; expected one of {', '.join(schedules)}")
    return GaussianDiffusion(
        betas=schedules[noise_schedule](diffusion_steps),
        timesteps=respaced_timesteps(diffusion_steps, timestep_respacing),
        learn_sigma=learn_sigma,
        sigma_small=sigma_small,
    )
