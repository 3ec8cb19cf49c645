"""Gaussian diffusion with noise prediction and learned variance: training loss, DDPM and DDIM sampling.

Sources: DDPM, arXiv 2006.11239; learned variance and respacing, arXiv 2102.09672; DDIM, arXiv 2010.02502.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .losses import discretized_gaussian_nll, normal_kl


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch dimension: (N, ...) -> (N,)."""
    return x.flatten(1).mean(1)


class GaussianDiffusion:
    """The process over the kept timesteps of a noise schedule.

    betas is the original schedule (T,) float64, timesteps the kept ones. A model is called as
    model(x, t, **model_kwargs) with original timesteps t (N,) and returns (N, 2C, H, W), noise then variance, or
    (N, C, H, W) when learn_sigma is off. Arithmetic is float32 whatever the model returns.
    """

    def __init__(self, betas: np.ndarray, timesteps: list[int], learn_sigma: bool = True, sigma_small: bool = False):
        self.learn_sigma = learn_sigma
        self.timestep_map = list(timesteps)
        self.num_timesteps = len(self.timestep_map)
        kept = np.cumprod(1 - betas)[self.timestep_map]
        previous = np.append(1.0, kept[:-1])
        self.betas = betas if self.num_timesteps == len(betas) else 1 - kept / previous
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])

        # q(x_{t-1} | x_t, x_0): arXiv 2006.11239, Eq. 6 and 7. Its variance is 0 at t = 0, which has no logarithm.
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        second = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(second, self.posterior_variance[1:]))
        fixed_large = np.append(second, self.betas[1:])

        self._tables = {
            "timestep_map": np.array(self.timestep_map),
            "log_betas": np.log(self.betas),
            "posterior_log_variance_clipped": self.posterior_log_variance_clipped,
            "fixed_log_variance": self.posterior_log_variance_clipped if sigma_small else np.log(fixed_large),
            "alphas_cumprod": self.alphas_cumprod,
            "alphas_cumprod_prev": self.alphas_cumprod_prev,
            "sqrt_alphas_cumprod": np.sqrt(self.alphas_cumprod),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - self.alphas_cumprod),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / self.alphas_cumprod),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / self.alphas_cumprod - 1),
            "posterior_mean_coef1": self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod),
            "posterior_mean_coef2": (1 - self.alphas_cumprod_prev)
            * np.sqrt(1 - self.betas)
            / (1 - self.alphas_cumprod),
        }
        self._tables_on: dict[torch.device, dict[str, Tensor]] = {}

    def _at(self, name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
        """Entries t (N,) of a table, shaped to broadcast over like. Tables are copied to a device once."""
        if t.device not in self._tables_on:
            self._tables_on[t.device] = {
                key: torch.tensor(table, dtype=torch.long if key == "timestep_map" else torch.float32, device=t.device)
                for key, table in self._tables.items()
            }
        values = self._tables_on[t.device][name][t]
        return values if like is None else values.view(-1, *[1] * (like.dim() - 1))

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Diffuse x_start (N, C, H, W) to step t (N,): arXiv 2006.11239, Eq. 4."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        return signal + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def q_posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0): arXiv 2006.11239, Eq. 7."""
        signal = self._at("posterior_mean_coef1", t, x_t) * x_start
        return signal + self._at("posterior_mean_coef2", t, x_t) * x_t

    def p_mean_variance(
        self,
        model: Callable,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
    ) -> dict[str, Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t), and the prediction of x_0: each (N, C, H, W)."""
        output = self._predict(model, x, t, model_kwargs)
        return self._p_mean_variance(output, x, t, clip_denoised)

    def _predict(self, model: Callable, x: Tensor, t: Tensor, model_kwargs: dict | None) -> Tensor:
        """What the model says about x at step t, which it knows by its original number: float32."""
        output = model(x, self._at("timestep_map", t), **(model_kwargs or {}))
        expected = (x.shape[0], x.shape[1] * 2 if self.learn_sigma else x.shape[1], *x.shape[2:])
        assert output.shape == expected, f"model output {tuple(output.shape)}, expected {expected}"
        return output.float()

    def _p_mean_variance(self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool) -> dict[str, Tensor]:
        if self.learn_sigma:
            eps, v = output.chunk(2, dim=1)
            fraction = (v + 1) / 2  # arXiv 2102.09672, Eq. 15
            log_beta = self._at("log_betas", t, x)
            log_variance = fraction * log_beta + (1 - fraction) * self._at("posterior_log_variance_clipped", t, x)
        else:
            eps = output
            log_variance = self._at("fixed_log_variance", t, x).expand_as(x)
        recip, recipm1 = (self._at(f"sqrt_{name}_alphas_cumprod", t, x) for name in ("recip", "recipm1"))
        pred_xstart = recip * x - recipm1 * eps
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean = self.q_posterior_mean(pred_xstart, x, t)
        return {"mean": mean, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def training_losses(
        self,
        model: Callable,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of each sample: "mse" of the noise, "vb" in bits per dimension, their sum "loss"; each (N,).

        The variational term trains the variance alone: the noise prediction is detached in it
        (arXiv 2102.09672, section 3.1). Without learned variance it is 0.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = self._predict(model, x_t, t, model_kwargs)
        eps = output[:, : x_start.shape[1]]
        mse = mean_flat((noise - eps) ** 2)
        if not self.learn_sigma:
            return {"loss": mse, "mse": mse, "vb": torch.zeros_like(mse)}
        detached = torch.cat([eps.detach(), output[:, x_start.shape[1] :]], dim=1)
        vb = self._variational_bound(detached, x_start, x_t, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        p = self._p_mean_variance(output, x_t, t, clip_denoised=False)
        true_mean = self.q_posterior_mean(x_start, x_t, t)
        true_log_variance = self._at("posterior_log_variance_clipped", t, x_t)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, p["mean"], p["log_variance"]))
        nll = mean_flat(discretized_gaussian_nll(x_start, p["mean"], p["log_variance"]))
        return torch.where(t == 0, nll, kl) / math.log(2)

    @torch.no_grad()
    def p_sample(
        self,
        model: Callable,
        x: Tensor,
        t: Tensor,
        noise: Tensor | None,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
    ) -> dict[str, Tensor]:
        """One ancestral step, adding noise unless it is None: "sample" and "pred_xstart", each (N, C, H, W)."""
        p = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
        sample = p["mean"] if noise is None else p["mean"] + torch.exp(0.5 * p["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": p["pred_xstart"]}

    @torch.no_grad()
    def ddim_sample(
        self,
        model: Callable,
        x: Tensor,
        t: Tensor,
        noise: Tensor | None,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One DDIM step (arXiv 2010.02502, Eq. 12 and 16), adding noise scaled by eta unless it is None."""
        pred_xstart = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)["pred_xstart"]
        recip, recipm1 = (self._at(f"sqrt_{name}_alphas_cumprod", t, x) for name in ("recip", "recipm1"))
        eps = (recip * x - pred_xstart) / recipm1  # differs from the model's where pred_xstart was clipped
        acp, acp_prev = self._at("alphas_cumprod", t, x), self._at("alphas_cumprod_prev", t, x)
        sigma = eta * torch.sqrt((1 - acp_prev) / (1 - acp)) * torch.sqrt(1 - acp / acp_prev)
        sample = pred_xstart * torch.sqrt(acp_prev) + torch.sqrt(1 - acp_prev - sigma**2) * eps
        if noise is not None:
            sample = sample + sigma * noise
        return {"sample": sample, "pred_xstart": pred_xstart}

    def p_sample_loop(
        self,
        model: Callable,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        noise_sampler: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Tensor:
        """Ancestral DDPM sampling from noise (by default random) to x_0 (N, C, H, W): arXiv 2006.11239, Algorithm 2.

        noise_sampler(x) supplies the noise that each step but the last adds.
        """
        for state in self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, model_kwargs, device, progress, noise_sampler
        ):
            sample = state["sample"]
        return sample

    def p_sample_loop_progressive(
        self,
        model: Callable,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        noise_sampler: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Iterator[dict[str, Tensor]]:
        """As p_sample_loop, yielding "sample" and "pred_xstart" after every step."""
        x = self._initial(model, shape, noise, device)
        for i, t in self._descending(shape[0], x.device, progress):
            step_noise = noise_sampler(x) if i > 0 else None
            state = self.p_sample(model, x, t, step_noise, clip_denoised, model_kwargs)
            x = state["sample"]
            yield state

    def ddim_sample_loop(
        self,
        model: Callable,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        noise_sampler: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Tensor:
        """DDIM sampling from noise (by default random) to x_0 (N, C, H, W); deterministic when eta is 0."""
        for state in self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, model_kwargs, device, progress, eta, noise_sampler
        ):
            sample = state["sample"]
        return sample

    def ddim_sample_loop_progressive(
        self,
        model: Callable,
        shape: tuple[int, ...],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        model_kwargs: dict | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        noise_sampler: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> Iterator[dict[str, Tensor]]:
        """As ddim_sample_loop, yielding "sample" and "pred_xstart" after every step."""
        x = self._initial(model, shape, noise, device)
        for i, t in self._descending(shape[0], x.device, progress):
            step_noise = noise_sampler(x) if eta > 0 and i > 0 else None
            state = self.ddim_sample(model, x, t, step_noise, clip_denoised, model_kwargs, eta)
            x = state["sample"]
            yield state

    def _initial(self, model, shape, noise, device) -> Tensor:
        if device is None:
            module = getattr(model, "__self__", model)  # a bound method such as model.forward_with_cfg
            device = noise.device if noise is not None else next(module.parameters()).device
        assert noise is None or noise.shape == tuple(shape), f"noise {tuple(noise.shape)}, expected {tuple(shape)}"
        return torch.randn(*shape, device=device) if noise is None else noise.to(device)

    def _descending(self, batch: int, device: torch.device, progress: bool) -> Iterator[tuple[int, Tensor]]:
        """Step indices from the noisiest down, each with its batch of timesteps (N,)."""
        for i in tqdm(reversed(range(self.num_timesteps)), total=self.num_timesteps, disable=not progress):
            yield i, torch.full((batch,), i, device=device, dtype=torch.long)
