"""Latents for image i: label, noise, guidance and sampler, each depending on the index and not on the process.

The options of commands that sample are declared here too, beside the settings that they become.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.objectives import OBJECTIVES
from models import DiT
from runtime import options
from runtime.config import DEFAULT_OBJECTIVE, RunConfig
from runtime.distributed import autocast, hash_seed
from runtime.options import UserError

Index = int | tuple[int | str, ...]


@dataclass(frozen=True)
class SamplingConfig:
    """What decides the images, beside the weights and the VAE."""

    sampler: str = "ddpm"  # one of the objective's
    steps: int = 250
    cfg_scale: float = 1.5  # 1 = no guidance
    cfg_channels: int | str = 3  # latent channels that guidance acts on, or "all"
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # fractions t/T of the schedule; 0 = clean, 1 = noise
    seed: int = 0
    class_balanced: bool = False  # labels 0, 1, 2, ... in turn instead of uniformly random


def add_sampling_options(parser: options.Parser, sampler: str, steps: int, cfg_scale: float, note: str = "") -> None:
    """Add the options that SamplingConfig, the autoencoder and the arithmetic are read from, with these defaults."""
    add = parser.add_argument
    options.add_vae(parser, none="the one of the training")
    samplers = list(dict.fromkeys(name for objective in OBJECTIVES.values() for name in objective.samplers))
    add("--sampler", choices=samplers, default=sampler, help="ancestral (ddpm), DDIM, or DPM-Solver++")
    add(
        "--num-sampling-steps",
        type=options.number(int, 1, 1000),
        default=steps,
        help=f"model evaluations an image{note}",
    )
    add("--cfg-scale", type=options.number(float, 1), default=cfg_scale, help="classifier-free guidance; 1 = none")
    add("--cfg-channels", choices=["3", "all"], default="3", help="latent channels that guidance acts on")
    add(
        "--guidance-interval",
        type=options.fraction,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LO", "HI"),
        help="fractions of the schedule (0 clean, 1 noise) between which guidance acts",
    )
    options.add_precision(parser)
    options.add_compile(parser)
    add("--vae-precision", choices=["fp32", "bf16"], default="fp32", help="of the decoding: float32, or bf16 autocast")


def config_from_args(args: argparse.Namespace, seed: int, class_balanced: bool = False) -> SamplingConfig:
    """The settings that the command line describes. Raises UserError for an empty --guidance-interval."""
    low, high = args.guidance_interval
    if not low < high:
        raise UserError(f"--guidance-interval {low:g} {high:g} is empty; expected LO < HI")
    return SamplingConfig(
        sampler=args.sampler,
        steps=args.num_sampling_steps,
        cfg_scale=args.cfg_scale,
        cfg_channels="all" if args.cfg_channels == "all" else 3,
        guidance_interval=(low, high),
        seed=seed,
        class_balanced=class_balanced,
    )


def label_of(index: int, num_classes: int, config: SamplingConfig) -> int:
    """The label of image index."""
    if config.class_balanced:
        return index % num_classes
    generator = torch.Generator().manual_seed(hash_seed(config.seed, "label", index))
    return int(torch.randint(num_classes, (1,), generator=generator))


class IndexedNoise:
    """Standard normal noise in which row k comes from the stream of image indices[k], drawn on the CPU.

    An index is the number of an image, or whatever tuple of numbers and words tells it from others.
    """

    def __init__(self, seed: int, indices: list[Index]):
        keys = [index if isinstance(index, tuple) else (index,) for index in indices]
        self.generators = [torch.Generator().manual_seed(hash_seed(seed, "noise", *key)) for key in keys]

    def __call__(self, like: Tensor) -> Tensor:
        rows = [torch.randn(like.shape[1:], generator=generator) for generator in self.generators]
        return torch.stack(rows).to(like.device)


def check_sampler(config: SamplingConfig, trained: RunConfig) -> None:
    """Raise UserError unless a model that was trained so can be sampled so."""
    objective, possible = trained.objective, OBJECTIVES[trained.objective].samplers
    if config.sampler not in possible:
        raise UserError(
            f"--sampler {config.sampler} does not fit a model trained with --objective {objective}; expected one of "
            f"{', '.join(possible)}"
        )
    if config.cfg_scale != 1 and not trained.model.class_dropout_prob:
        raise UserError(
            f"--cfg-scale {config.cfg_scale:g} is guidance by the null class, which the checkpoint has not learnt (it "
            "was trained with class_dropout_prob 0); pass --cfg-scale 1"
        )


def guided(model: DiT, config: SamplingConfig, num_timesteps: int = 1000) -> Callable:
    """The model as samplers call it, (x, t, y) -> (n, 2C, H, W): both halves only where guidance acts."""
    if config.cfg_scale == 1:
        return model

    def everywhere(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model.forward_with_cfg(x, t, y, config.cfg_scale, config.cfg_channels)

    def within_interval(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        low, high = config.guidance_interval
        return everywhere(x, t, y) if low <= float(t[0]) / num_timesteps <= high else model(x, t, y)

    return everywhere if config.guidance_interval == (0.0, 1.0) else within_interval


@torch.no_grad()
def sample_latents(
    model: DiT,
    config: SamplingConfig,
    indices: list[Index],
    labels: list[int],
    latent_shape: tuple[int, int, int],
    device: torch.device,
    precision: str = "fp32",
    objective: str = DEFAULT_OBJECTIVE,
) -> Tensor:
    """Latents (n, C, h, w) float32 of the images with these indices and labels, on device."""
    for _, x in sample_progressive(model, config, indices, labels, latent_shape, device, precision, objective):
        latents = x
    return latents


@torch.no_grad()
def sample_progressive(
    model: DiT,
    config: SamplingConfig,
    indices: list[Index],
    labels: list[int],
    latent_shape: tuple[int, int, int],
    device: torch.device,
    precision: str = "fp32",
    objective: str = DEFAULT_OBJECTIVE,
) -> Iterator[tuple[float | None, Tensor]]:
    """As sample_latents, yielding (t, latents): the noise, and what each step makes of it.

    t is the timestep of the training's noise schedule at which the model sees these latents, 999 at first; None for
    the result. Raises UserError where that is not finite.
    """
    noise = IndexedNoise(config.seed, indices)
    start = noise(torch.empty(len(indices), *latent_shape, device=device))
    y = torch.tensor(labels, device=device)
    process = OBJECTIVES[objective]
    predict = guided(model, config, process.num_timesteps)

    def predict_autocast(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with autocast(device, precision):
            return predict(x, t, y)

    learn_sigma = model.out_channels == 2 * model.in_channels
    for t, x in process.sample(predict_autocast, start, y, config.sampler, config.steps, noise, learn_sigma):
        if t is None:
            check_finite(x, indices, precision)
        yield t, x


def check_finite(latents: Tensor, indices: list[Index], precision: str) -> None:
    """Raise UserError, naming the first, where samples are no numbers: they would be drawn black."""
    wrong = [index for index, values in zip(indices, latents, strict=True) if not bool(torch.isfinite(values).all())]
    if wrong:
        remedy = "pass --precision fp32, or a lower --cfg-scale" if precision == "bf16" else "lower --cfg-scale"
        raise UserError(
            f"sample {wrong[0]} came out as values that are not finite, {len(wrong)} of {len(indices)} of its batch; "
            f"{remedy}, or use a checkpoint of earlier steps"
        )
