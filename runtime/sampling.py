"""Latents for image i: label, noise, guidance and sampler, each depending on the index and not on the process."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion import create_diffusion
from models import DiT
from runtime.distributed import hash_seed

SAMPLERS = ("ddpm", "ddim", "dpm++")


@dataclass(frozen=True)
class SamplingConfig:
    """What decides the images, beside the weights and the VAE."""

    sampler: str = "ddpm"  # one of SAMPLERS
    steps: int = 250
    cfg_scale: float = 1.5  # 1 = no guidance
    cfg_channels: int | str = 3  # latent channels that guidance acts on, or "all"
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # fractions t/T of the schedule; 0 = clean, 1 = noise
    seed: int = 0
    class_balanced: bool = False  # labels 0, 1, 2, ... in turn instead of uniformly random


def label_of(index: int, num_classes: int, config: SamplingConfig) -> int:
    """The label of image index."""
    if config.class_balanced:
        return index % num_classes
    generator = torch.Generator().manual_seed(hash_seed(config.seed, "label", index))
    return int(torch.randint(num_classes, (1,), generator=generator))


class IndexedNoise:
    """Standard normal noise in which row k comes from the stream of image indices[k], drawn on the CPU."""

    def __init__(self, seed: int, indices: list[int]):
        self.generators = [torch.Generator().manual_seed(hash_seed(seed, "noise", index)) for index in indices]

    def __call__(self, like: Tensor) -> Tensor:
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(rows).to(like.device)


def guided(model: DiT, config: SamplingConfig, train_steps: int = 1000) -> Callable:
    """The model as samplers call it, (x, t, y) -> (n, 2C, H, W): both halves only where guidance acts."""
    if config.cfg_scale == 1:
        return model

    def everywhere(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model.forward_with_cfg(x, t, y, config.cfg_scale, config.cfg_channels)

    def within_interval(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        low, high = config.guidance_interval
        return everywhere(x, t, y) if low <= float(t[0]) / train_steps <= high else model(x, t, y)

    return everywhere if config.guidance_interval == (0.0, 1.0) else within_interval


@torch.no_grad()
def sample_latents(
    model: DiT,
    config: SamplingConfig,
    indices: list[int],
    labels: list[int],
    latent_shape: tuple[int, int, int],
    device: torch.device,
    precision: str = "fp32",
) -> Tensor:
    """Latents (n, C, h, w) float32 of the images with these indices and labels, on device."""
    for state in sample_progressive(model, config, indices, labels, latent_shape, device, precision):
        latents = state["sample"]
    return latents


@torch.no_grad()
def sample_progressive(
    model: DiT,
    config: SamplingConfig,
    indices: list[int],
    labels: list[int],
    latent_shape: tuple[int, int, int],
    device: torch.device,
    precision: str = "fp32",
) -> Iterator[dict[str, Tensor]]:
    """As sample_latents, yielding "sample" and "pred_xstart" after every step."""
    noise = IndexedNoise(config.seed, indices)
    start = noise(torch.empty(len(indices), *latent_shape, device=device))
    y = torch.tensor(labels, device=device)
    predict = guided(model, config)

    def predict_autocast(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with autocast(device, precision):
            return predict(x, t, y)

    arguments = dict(model_kwargs={"y": y}, clip_denoised=False, device=device, noise=start)
    if config.sampler == "dpm++":
        yield from _dpm_solver(predict_autocast, start, y, config.steps)
    elif config.sampler == "ddim":
        diffusion = create_diffusion(str(config.steps), learn_sigma=_learns_sigma(model))
        yield from diffusion.ddim_sample_loop_progressive(predict_autocast, start.shape, **arguments)
    else:
        diffusion = create_diffusion(str(config.steps), learn_sigma=_learns_sigma(model))
        yield from diffusion.p_sample_loop_progressive(predict_autocast, start.shape, noise_sampler=noise, **arguments)


def _learns_sigma(model: DiT) -> bool:
    return model.out_channels == 2 * model.in_channels


def _dpm_solver(predict: Callable, x: Tensor, y: Tensor, steps: int) -> Iterator[dict[str, Tensor]]:
    """DPM-Solver++ (arXiv 2211.01095) by diffusers; the learned variance is ignored."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        algorithm_type="dpmsolver++",
    )
    scheduler.set_timesteps(steps, device=x.device)
    for t in scheduler.timesteps:
        eps = predict(x, t.expand(x.shape[0]), y)[:, : x.shape[1]].float()
        x = scheduler.step(eps, t, x).prev_sample
        yield {"sample": x, "pred_xstart": scheduler.model_outputs[-1]}


def autocast(device: torch.device, precision: str):
    """Context in which matrix products run in bfloat16 (bf16) or as they are (fp32)."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def resolve_precision(precision: str, device: torch.device) -> str:
    """What "auto" means on this device: bf16 where the hardware multiplies it natively, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = False
    return "bf16" if fast else "fp32"
