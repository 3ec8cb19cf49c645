"""The denoising loss of held-out images, with the same timesteps and noise for every model.

Image i gets one timestep in each tenth of the schedule. Timesteps, noise and the draw from the posterior come from
streams seeded by (0, i): two models differ by their weights alone, whatever the number of processes or the batch.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.objectives import OBJECTIVES
from models import DiT
from runtime import data, distributed, monitor
from runtime.config import DEFAULT_OBJECTIVE, VAEConfig
from runtime.distributed import autocast, hash_seed
from runtime.holdout import HeldOut
from runtime.latents import LatentCache
from runtime.options import UserError
from runtime.vae import VAE, sample_latents

AFFORDABLE = 0.05  # of a training's computation, which validation at the default interval stays below
SEED = 0  # not the run's: runs with other seeds are compared on the same noise
TENTHS = 10


@dataclass(frozen=True)
class EncodedImages:
    """This process's share of the held-out images as posterior moments on the CPU."""

    indices: list[int]  # in the list of all held-out images
    total: int  # images of all processes
    moments: Tensor  # (n, 2C, h, w) float16, as a latent cache stores them
    labels: Tensor  # (n,) int64
    vae: VAEConfig


def encode(images: data.ImageList, size: tuple[int, int], vae: VAE, num_workers: int, batch: int = 32) -> EncodedImages:
    """Encode every image once, shared out over the processes. Raises UserError for one that cannot be read."""
    total = len(images)
    indices = list(range(total))[distributed.rank() :: distributed.world_size()]
    batches = [[(0, index) for index in indices[first : first + batch]] for first in range(0, len(indices), batch)]
    prepared, moments, unreadable = data.ImageData(images, size, flip=False, seed=0), [], []
    bar = monitor.progress_bar(len(indices), unit="image", description="encoding held-out images")
    workers = min(num_workers, len(batches))
    with bar, data.open_loader(prepared, batches, workers, torch.device("cpu")) as loader:
        for found in loader:
            if isinstance(found, data.Unreadable):
                unreadable.append(str(found))
                break
            moments.append(vae.encode(found[0]).half().cpu())
            bar.update(len(found[0]))
    errors = [text for texts in distributed.gather(unreadable) for text in texts]
    if errors:
        raise UserError(errors[0])
    labels = torch.from_numpy(images.labels[indices])
    stacked = torch.cat(moments) if moments else torch.empty(0)
    return EncodedImages(indices, total, stacked, labels, vae.config)


def from_cache(cache: LatentCache) -> EncodedImages:
    """This process's share of a latent cache, unmirrored."""
    indices = list(range(len(cache)))[distributed.rank() :: distributed.world_size()]
    moments = torch.from_numpy(cache.moments[cache.rows[indices], 0])
    return EncodedImages(indices, len(cache), moments, torch.from_numpy(cache.labels[indices]), cache.vae)


def draw(index: int, latent_shape: tuple[int, int, int], num_timesteps: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is random about image index: timesteps (10,), their noise (10, C, h, w), posterior noise (C, h, w)."""
    times, noise, posterior = (
        torch.Generator().manual_seed(hash_seed(SEED, "validation", index, name))
        for name in ("timesteps", "noise", "posterior")
    )
    width = num_timesteps // TENTHS
    t = torch.arange(TENTHS) * width + torch.randint(width, (TENTHS,), generator=times)
    noise = torch.randn(TENTHS, *latent_shape, generator=noise)
    return t, noise, torch.randn(latent_shape, generator=posterior)


@torch.no_grad()
def image_losses(
    models: list[DiT],
    held_out: EncodedImages,
    device: torch.device,
    precision: str,
    batch: int = 8,
    objective: str = DEFAULT_OBJECTIVE,
) -> Tensor:
    """Noise MSE (models, images, 10) float64 of every held-out image in each tenth of the schedule, on all processes.

    batch counts the images at a time, each of them at its ten timesteps.
    """
    losses = torch.zeros(len(models), held_out.total, TENTHS, dtype=torch.float64)
    with evaluating(models):
        for first in range(0, len(held_out.indices), batch):
            rows = slice(first, first + batch)
            for k, values in enumerate(batch_losses(models, held_out, rows, device, precision, objective)):
                losses[k, held_out.indices[rows]] = values.cpu().double()
    return distributed.all_reduce(losses)  # every image is one process's alone: the sum is exact


def batch_losses(
    models: list[DiT], held_out: EncodedImages, rows: slice, device, precision: str, objective: str
) -> list[Tensor]:
    """Noise MSE (n, 10) of some images, for each model."""
    moments, process = held_out.moments[rows], OBJECTIVES[objective]
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    drawn = zip(*(draw(index, shape, process.num_timesteps) for index in held_out.indices[rows]), strict=True)
    t, noise, posterior = (torch.stack(values).to(device) for values in drawn)
    x = sample_latents(moments.to(device), held_out.vae.scaling_factor, held_out.vae.shift_factor, posterior)
    x, y = (values.repeat_interleave(TENTHS, dim=0) for values in (x, held_out.labels[rows].to(device)))
    t, noise = t.flatten(), noise.flatten(0, 1)  # (n, 10, ...) -> (10n, ...)
    x_t = process.noised(x, t, noise)
    found = []
    for model in models:
        with autocast(device, precision):
            output = model.forward(x_t, t, y)  # past --compile, which would compile for these shapes too
        found.append(process.validation_loss(output, x, t, noise).view(-1, TENTHS))
    return found


@contextmanager
def evaluating(models: list[DiT]):
    """No label dropout within; afterwards every model is in the mode that it was in."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def summarize(losses: Tensor, name: str = "loss") -> dict:
    """Mean of image losses (images, 10), its standard error over images (None for a single one), mean of each tenth.

    What is not finite becomes None, since JSON knows no such numbers.
    """
    error = losses.mean(1).std() / len(losses) ** 0.5 if len(losses) > 1 else math.nan
    return {
        name: finite(losses.mean()),
        f"{name}_se": finite(error),
        f"{name}_tenths": [finite(loss) for loss in losses.mean(0)],
    }


def finite(value) -> float | None:
    """The number, None for infinity and NaN."""
    return float(value) if math.isfinite(value) else None


def describe(scores: dict, name: str = "loss") -> str:
    """0.0489 ± 0.0007: mean and standard error."""
    error = scores[f"{name}_se"]
    return shown(scores[name]) + ("" if error is None else f" ± {error:.4f}")


def shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def open_validator(
    held_out: HeldOut | None, args, total_steps: int, device: torch.device, precision: str, logger
) -> "Validator | None":
    """The validator of a run of so many steps, with its images encoded; None without held-out images."""
    if held_out is None:
        return None
    validator = Validator(held_out, args, total_steps, device, precision)
    validator.announce(logger)
    return validator


def cost_in_steps(images: int, global_batch: int) -> float:
    """Training steps that cost as much as a validation.

    A step takes three evaluations of the model an image, a validation twenty: ten for raw and averaged weights each.
    """
    return 2 * TENTHS * images / (3 * global_batch)


def default_interval(images: int, global_batch: int, ckpt_every: int, total_steps: int) -> int:
    """Steps between validations: every checkpoint, or every so many that all of the run stay below AFFORDABLE.

    Where the one after the last step alone does not, it is the only one.
    """
    affordable = math.ceil(AFFORDABLE * total_steps / cost_in_steps(images, global_batch)) - 1  # strictly below
    return ckpt_every * math.ceil(total_steps / (ckpt_every * max(affordable, 1)))


class Validator:
    """Validates a run's raw and averaged weights every so many steps and after the last one."""

    def __init__(self, held_out: HeldOut, args, total_steps: int, device: torch.device, precision: str):
        self.device, self.precision, self.objective = device, precision, args.objective
        source, vae = held_out.source, held_out.vae
        self.images = from_cache(source) if vae is None else encode(source, args.image_size, vae, args.num_workers)
        micro_batch = args.global_batch_size // distributed.world_size() // args.grad_accum_steps
        self.batch = max(1, micro_batch // TENTHS)  # takes no more memory than training
        images, batch = self.images.total, args.global_batch_size
        self.every = args.val_every or default_interval(images, batch, args.ckpt_every, total_steps)
        self.times = math.ceil(total_steps / self.every)  # of the whole run, with the one after the last step
        share = cost_in_steps(images, batch) / total_steps  # of one
        self.share = self.times * share
        self.remedy = None  # where not even the default interval is affordable
        if args.val_every is None and share >= AFFORDABLE:
            self.remedy = "a smaller --val-fraction" if held_out.fraction else "fewer images in --val-data-path"

    def announce(self, logger) -> None:
        when = "once, after the last step"
        if self.times > 1:
            when = f"every {self.every:,} steps and after the last, {self.times:,} times in all"
        remedy = f"; even a single validation of so many images costs that: use {self.remedy}" if self.remedy else ""
        logger.info(
            f"validation: {self.images.total:,} held-out images, {when}: about {100 * self.share:.1f} % of the "
            f"training's computation{remedy}"
        )

    def is_due(self, step: int, last: bool) -> bool:
        return last or step % self.every == 0

    def measure(self, model: DiT, ema: DiT) -> dict:
        """The keys of a metrics.jsonl record."""
        losses = image_losses([model, ema], self.images, self.device, self.precision, self.batch, self.objective)
        return summarize(losses[0], "val_loss") | summarize(losses[1], "val_loss_ema")

    def log(self, step: int, scores: dict, logger) -> None:
        logger.info(
            f"step {step:07d}: validation loss {describe(scores, 'val_loss')}, EMA {describe(scores, 'val_loss_ema')} "
            f"(noise MSE of {self.images.total:,} images)"
        )
        for key, (weights, _) in monitor.VALIDATED.items():
            tenths = ", ".join(shown(loss) for loss in scores[f"{key}_tenths"])
            logger.info(f"step {step:07d}: validation loss by tenth of the schedule, {weights} weights: {tenths}")
