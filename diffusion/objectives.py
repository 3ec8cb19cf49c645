"""Training objectives: what the model predicts, its loss, its samplers and its validation loss, one object each.

train.py --objective NAME trains with one of OBJECTIVES, the checkpoint stores the name, and sampling and validation
follow it. docs/extending.md adds another.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import create_diffusion

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # the model: x (N, C, H, W), t (N,), y (N,) -> its output
State = tuple[float | None, Tensor]  # the timestep at which the model sees these latents next, None for the result


class NoisePrediction:
    """DiT's objective: the noise by its squared error, and the variance of a step by the variational bound.

    Source: Improved DDPM (arXiv 2102.09672), equations 14 to 16.
    """

    num_timesteps = 1000  # timesteps run from 0, clean, to this, noise
    learn_sigma = True  # the output has twice the channels of the latents
    samplers = ("ddpm", "ddim", "dpm++")  # ancestral, DDIM, DPM-Solver++
    quick_sampler = "dpm++"  # for samples to look at while training

    def __init__(self):
        self.diffusion = create_diffusion(None, diffusion_steps=self.num_timesteps)

    def loss(self, predict: Predict, x: Tensor, y: Tensor) -> Tensor:
        """Training loss (N,) of latents x (N, C, H, W) at random timesteps."""
        t = torch.randint(self.num_timesteps, (len(x),), device=x.device)
        return self.diffusion.training_losses(predict, x, t, {"y": y})["loss"]

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the model sees of latents x (N, C, H, W) at whole timesteps t (N,)."""
        return self.diffusion.q_sample(x, t, noise)

    def validation_loss(self, output: Tensor, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Loss (N,) of the model's output (N, 2C, H, W) on what noised gave: the noise MSE."""
        eps = output[:, : x.shape[1]]
        return (noise - eps.float()).square().flatten(1).mean(1)

    def sample(
        self,
        predict: Predict,
        start: Tensor,
        y: Tensor,
        sampler: str,
        steps: int,
        noise: Callable[[Tensor], Tensor],
        learn_sigma: bool,
    ) -> Iterator[State]:
        """(t, latents): the noise start (N, C, H, W), and what each step of a sampler makes of it.

        noise(like) draws what a step adds. learn_sigma=False is for models whose output has no variance.
        """
        if sampler == "dpm++":
            scheduler = _dpm_scheduler(self.num_timesteps, steps, start.device)
            timesteps, states = scheduler.timesteps.tolist(), _dpm_solver(scheduler, predict, start, y)
        else:
            diffusion = create_diffusion(str(steps), learn_sigma=learn_sigma, diffusion_steps=self.num_timesteps)
            timesteps = reversed(diffusion.timestep_map)
            arguments = dict(model_kwargs={"y": y}, clip_denoised=False, device=start.device, noise=start)
            if sampler == "ddim":
                found = diffusion.ddim_sample_loop_progressive(predict, start.shape, **arguments)
            else:
                found = diffusion.p_sample_loop_progressive(predict, start.shape, noise_sampler=noise, **arguments)
            states = (step["sample"] for step in found)
        yield from zip([*timesteps, None], itertools.chain([start], states), strict=True)


def _dpm_scheduler(num_timesteps: int, steps: int, device: torch.device):
    """DPM-Solver++ (arXiv 2211.01095) by diffusers, with the noise schedule of the training."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=num_timesteps,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        algorithm_type="dpmsolver++",
    )
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def _dpm_solver(scheduler, predict: Predict, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """Latents after every step of a scheduler of diffusers; the learned variance is ignored."""
    for t in scheduler.timesteps:
        eps = predict(x, t.expand(x.shape[0]), y)[:, : x.shape[1]].float()
        x = scheduler.step(eps, t, x).prev_sample
        yield x


OBJECTIVES = {"eps": NoisePrediction()}
