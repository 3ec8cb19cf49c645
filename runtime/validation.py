"""The images that a run holds out, and their denoising loss, with the same timesteps and noise for every model.

Held out is a folder of their own, or a part of every class that a hash of the paths chooses. Image i gets one timestep
in each tenth of the schedule. Timesteps, noise and the draw from the posterior come from streams seeded by (0, i): two
models differ by their weights alone, whatever the number of processes or the batch.
"""

import argparse
import hashlib
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from logging import Logger
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.objectives import OBJECTIVES
from models import DiT
from runtime import checkpoint, data, distributed, monitor, options
from runtime.config import DEFAULT_OBJECTIVE, HeldOutConfig, VAEConfig
from runtime.data import ImageList
from runtime.latents import LatentCache, LatentData
from runtime.options import UserError
from runtime.vae import VAE, load_same, sample_latents

AFFORDABLE = 0.05  # of a training's computation, which validation at the default interval stays below
SEED = 0  # not the run's: runs with other seeds are compared on the same noise
TENTHS = 10
BEGINNING = 4096  # bytes that tell nearly all files apart


def add_options(parser: options.Parser) -> None:
    group = parser.add_argument_group("validation: the loss of images that are not trained on")
    add = group.add_mutually_exclusive_group().add_argument
    add("--val-data-path", type=Path, default=None, help="class folders to validate on")
    part = options.number(float, 0, 1, open_low=True, open_high=True)
    help = "part of every class to hold out, in place of --val-data-path"
    add("--val-fraction", type=part, default=None, help=help)
    group.add_argument(
        "--val-every",
        type=options.count,
        default=None,
        help="steps between validations, beside the one after the last step (None: at every checkpoint, or at every "
        "so many that all cost less than 5 %% of the training); N images cost as much as training on about 7 N",
    )


def check_options(args: argparse.Namespace) -> None:
    if args.val_every is not None and args.val_data_path is None and args.val_fraction is None:
        raise UserError("--val-every given without held-out images; add --val-data-path or --val-fraction")


# What is held out


@dataclass(frozen=True)
class HeldOut:
    """Images that the run never trains on."""

    images: ImageList | LatentCache
    vae: VAE | None  # what encodes an ImageList; None for a cache
    config: HeldOutConfig  # what the checkpoint stores and a resumed run has to repeat


def hold_out(
    source: ImageList | LatentCache, vae: VAE | None, args: argparse.Namespace, device: torch.device
) -> tuple[ImageList | LatentCache, HeldOut | None]:
    """The images to train on, and those held out, None without validation; vae is None for a cache.

    Raises UserError for a held-out set that is empty, has other classes, or overlaps the training data.
    """
    left_out = []
    if args.val_fraction is not None:
        chosen = split(source.paths, source.labels, source.classes, args.val_fraction)
        training, images = source.subset(~chosen), source.subset(chosen)
        left_out = source.paths_left_out if isinstance(source, LatentCache) else []
    elif args.val_data_path is not None:
        training, images = source, ImageList(args.val_data_path, "--val-data-path")
        check_classes(images, source.classes)
        distributed.on_main(check_overlap, images, source, args.results_dir)
        vae = vae or load_same(args.vae, source.vae, device, f"--latents-dir {str(args.latents_dir)!r}")
    else:
        return source, None
    hashes = [hash_path(path) for path in left_out]
    config = HeldOutConfig(args.val_fraction, data.hash_paths(images.paths), len(images), hashes)
    return training, HeldOut(images, vae, config)


def split(paths: np.ndarray, labels: np.ndarray, classes: list[str], fraction: float) -> np.ndarray:
    """Mask (N,) of the held-out images: in each class, the fraction of paths (N,) bytes with the smallest hashes.

    At least one image of a class is held out and at least one is not. Whether an image is held out depends on the
    relative paths of its class alone. Raises UserError for a class with less than two images.
    """
    hashes = np.array([int(hash_path(path), 16) for path in paths], dtype=np.uint64)
    chosen = np.zeros(len(paths), dtype=bool)
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise UserError(
                f"--val-fraction {fraction:g} leaves class {name!r} empty in one part (images in all: {len(members)}); "
                "add images to it, remove it, or use --val-data-path"
            )
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return chosen


def hash_path(path: bytes) -> str:
    """16 hexadecimal digits, by whose order a split chooses."""
    return hashlib.sha256(path).hexdigest()[:16]


def check_classes(images: ImageList, classes: list[str]) -> None:
    """Raise UserError, naming a class, unless the validation set has those of the training data."""
    different = sorted(set(classes) ^ set(images.classes))
    if different:
        raise UserError(
            f"--val-data-path {str(images.root)!r} has other class folders than the training data: "
            f"{different[0]!r} is in one of the two alone ({len(different)} such in all); give both the same"
        )


def check_overlap(images: ImageList, source: ImageList | LatentCache, results_dir: Path) -> None:
    """Raise UserError when a file of the validation set, or a copy of it, is among the training images.

    A run that is gone on with was checked when it began.
    """
    if checkpoint.training_checkpoints(results_dir / "checkpoints"):
        return
    try:
        pairs = same_files(images, source.images() if isinstance(source, LatentCache) else source)
    except UserError as error:
        warnings.warn(f"the validation set was not compared with the images of the cache: {error}", stacklevel=2)
        return
    if pairs:
        raise UserError(
            f"--val-data-path {str(images.root)!r} overlaps the training data: {str(pairs[0][0])!r} is the same image "
            f"as {str(pairs[0][1])!r}, {len(pairs)} in all; remove them from one of the two"
        )


def same_files(images: ImageList, others: ImageList) -> list[tuple[Path, Path]]:
    """Pairs of files with the same content, one of each list; only what size and beginning leave open is read whole."""
    left, right = ([part.path(index) for index in range(len(part))] for part in (images, others))
    with ThreadPoolExecutor(16) as pool:
        for length in (BEGINNING, -1):
            key = partial(_content, length=length)
            left, right = (dict(zip(paths, pool.map(key, paths), strict=True)) for paths in (left, right))
            common = set(left.values()) & set(right.values())
            left, right = ({path: key for path, key in part.items() if key in common} for part in (left, right))
    first = {key: path for path, key in reversed(right.items())}
    return [(path, first[key]) for path, key in left.items()]


def _content(path: Path, length: int) -> tuple[int, bytes] | Path:
    """Size of a file and hash of its first bytes, -1 for all; one that cannot be read is equal to no other."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size, hashlib.sha256(file.read(length)).digest()
    except OSError:  # whoever reads its image will say so
        return path


# Its loss


@dataclass(frozen=True)
class EncodedImages:
    """This process's share of the held-out images as posterior moments on the CPU."""

    indices: list[int]  # in the list of all held-out images
    total: int  # images of all processes
    moments: Tensor  # (n, 2C, h, w) float16, as a latent cache stores them
    labels: Tensor  # (n,) int64
    vae: VAEConfig


def encode(
    images: ImageList | LatentCache,
    size: tuple[int, int],
    vae: VAE | None,
    num_workers: int,
    batch: int = 32,
    skip: bool | None = None,
) -> EncodedImages:
    """Every image once, unmirrored, shared out over the processes; vae is None for a cache, which has the moments.

    With skip, others stand in for images that cannot be read, of which a warning tells. Raises UserError for one
    without.
    """
    indices = list(range(len(images)))[distributed.rank() :: distributed.world_size()]
    batches = [[(0, index) for index in indices[first : first + batch]] for first in range(0, len(indices), batch)]
    prepared = LatentData(images, flip=False, seed=0) if vae is None else data.ImageData(images, size, False, 0, skip)
    moments, labels, unreadable = [torch.empty(0, dtype=torch.float16)], [torch.empty(0, dtype=torch.int64)], []
    bar = monitor.progress_bar(len(indices), unit="image", description="encoding held-out images")
    workers = min(num_workers, len(batches))
    with bar, data.open_loader(prepared, batches, workers, torch.device("cpu")) as loader:
        for found in loader:
            if isinstance(found, data.NoBatch):
                unreadable.append(str(found))
                break
            moments.append(found[0] if vae is None else vae.encode(found[0]).half().cpu())
            labels.append(found[1])
            for path in (path for paths in found[2:] for path in paths):
                warnings.warn(f"held-out image {path!r} cannot be read; another stands in for it", stacklevel=2)
            bar.update(len(found[0]))
    errors = [text for texts in distributed.gather(unreadable) for text in texts]
    if errors:
        raise UserError(errors[0])
    config = images.vae if vae is None else vae.config
    return EncodedImages(indices, len(images), torch.cat(moments), torch.cat(labels), config)


def draw(index: int, latent_shape: tuple[int, int, int], num_timesteps: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is random about image index: timesteps (10,), their noise (10, C, h, w), posterior noise (C, h, w)."""
    times, noise, posterior = (
        torch.Generator().manual_seed(distributed.hash_seed(SEED, "validation", index, name))
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
    """Loss (models, images, 10) float64 of every held-out image in each tenth of the schedule, on all processes.

    batch counts the images at a time, each of them at its ten timesteps. Leaves the models in evaluation mode.
    """
    process, losses = OBJECTIVES[objective], torch.zeros(len(models), held_out.total, TENTHS, dtype=torch.float64)
    for first in range(0, len(held_out.indices), batch):
        rows = slice(first, first + batch)
        indices, moments = held_out.indices[rows], held_out.moments[rows]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        drawn = zip(*(draw(index, shape, process.num_timesteps) for index in indices), strict=True)
        t, noise, posterior = (torch.stack(values).to(device) for values in drawn)
        x = sample_latents(moments.to(device), held_out.vae.scaling_factor, held_out.vae.shift_factor, posterior)
        x, y = (values.repeat_interleave(TENTHS, dim=0) for values in (x, held_out.labels[rows].to(device)))
        t, noise = t.flatten(), noise.flatten(0, 1)  # (n, 10, ...) -> (10n, ...)
        x_t = process.noised(x, t, noise)
        for k, model in enumerate(models):
            model.eval()  # no label dropout
            # As it is, since --compile would compile for inference too.
            with distributed.autocast(device, precision), torch.compiler.set_stance("force_eager"):
                output = model(x_t, t, y)
            losses[k, indices] = process.validation_loss(output, x, t, noise).view(-1, TENTHS).cpu().double()
    return distributed.all_reduce(losses)  # every image is one process's alone: the sum is exact


def summarize(losses: Tensor, name: str = "loss") -> dict:
    """Mean of image losses (images, 10), its standard error over images (None for a single one), mean of each tenth.

    What is not finite becomes None, since JSON knows no such numbers.
    """
    error = losses.mean(1).std() / len(losses) ** 0.5 if len(losses) > 1 else math.nan
    values = [losses.mean(), error, *losses.mean(0)]
    mean, error, *tenths = (float(value) if math.isfinite(value) else None for value in values)
    return {name: mean, f"{name}_se": error, f"{name}_tenths": tenths}


def format_loss(loss: float | None, error: float | None = None) -> str:
    """0.0489 ± 0.0007, with a standard error."""
    if loss is None:
        return "not finite"
    return f"{loss:.4f}" if error is None else f"{loss:.4f} ± {error:.4f}"


def describe_loss(scores: dict, name: str = "loss") -> str:
    """What summarize gives, in words."""
    tenths = ", ".join(map(format_loss, scores[f"{name}_tenths"]))
    return f"{format_loss(scores[name], scores[f'{name}_se'])}; by tenth of the schedule: {tenths}"


# In training


def cost_in_steps(images: int, global_batch: int) -> float:
    """Training steps that cost as much as a validation.

    A step takes three evaluations of the model an image, a validation twenty: ten for raw and averaged weights each.
    """
    return 2 * TENTHS * images / (3 * global_batch)


def interval(images: int, args: argparse.Namespace, total_steps: int) -> int:
    """Steps between validations: --val-every, or so many checkpoints that all of a run stay below AFFORDABLE.

    Where the one after the last step alone does not, it is the only one.
    """
    if args.val_every is not None:
        return args.val_every
    times = math.ceil(AFFORDABLE * total_steps / cost_in_steps(images, args.global_batch_size)) - 1  # strictly below
    return args.ckpt_every * math.ceil(total_steps / (args.ckpt_every * max(times, 1)))


def describe_schedule(images: int, args: argparse.Namespace, total_steps: int) -> str:
    """When a run of so many steps validates, and what that costs."""
    every = interval(images, args, total_steps)
    times = math.ceil(total_steps / every)  # with the one after the last step
    when = "once, after the last step"
    if times > 1:
        when = f"every {every:,} steps and after the last, {times:,} times in all"
    share = 100 * times * cost_in_steps(images, args.global_batch_size) / total_steps
    return f"validation: {images:,} held-out images, {when}: about {share:.1f} % of the training's computation"


class Validator:
    """Validates a run's raw and averaged weights every so many steps and after the last one."""

    def __init__(self, held_out: HeldOut, args, total_steps: int, device: torch.device, precision: str):
        self.device, self.precision, self.objective = device, precision, args.objective
        skip = args.skip_unreadable
        self.images = encode(held_out.images, args.image_size, held_out.vae, args.num_workers, skip=skip)
        micro_batch = args.global_batch_size // distributed.world_size() // args.grad_accum_steps
        self.batch = max(1, micro_batch // TENTHS)  # takes no more memory than training
        self.every = interval(self.images.total, args, total_steps)

    def is_due(self, step: int, last: bool) -> bool:
        return last or step % self.every == 0

    def measure(self, model: DiT, ema: DiT, step: int, logger: Logger) -> dict:
        """The keys of a metrics.jsonl record, which the log gets too."""
        losses = image_losses([model, ema], self.images, self.device, self.precision, self.batch, self.objective)
        model.train()
        scores = {}
        for (key, (weights, _)), found in zip(monitor.VALIDATED.items(), losses, strict=True):
            scores |= summarize(found, key)
            what = f"validation loss of {len(found):,} images, {weights} weights"
            logger.info(f"step {step:07d}: {what}: {describe_loss(scores, key)}")
        return scores
