"""Sample a few images of chosen classes from a checkpoint and show them as one labelled grid.

An image depends on the checkpoint, the settings, its class and its number within the class: asking for other classes
as well, or for more of each, does not change it.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime import classes, distributed, files, hub, monitor, options, pictures, sampling
from runtime.options import UserError
from runtime.pretrained import Trained, load_trained
from runtime.sampling import SamplingConfig
from runtime.vae import VAE, load_vae

LARGEST_GRID = 100  # images; beyond, they are better kept one by one
LARGEST_STRIP = 20  # rows of ten frames
FRAMES = 10


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    options.add_checkpoint_options(parser, none="DiT-XL/2 as published, of --image-size")
    add = parser.add_argument
    add(
        "--classes",
        default=None,
        help="names or numbers, as in 'golden retriever,360' (None: eight of ImageNet's, or the first eight of others)",
    )
    add("--per-class", type=options.count, default=1, help="images of each class")
    add("--seed", type=options.seed, default=0, help="with its class and number, decides the noise of an image")
    add("--out", type=Path, default=Path("sample.png"), help="picture to write: .png")
    add(
        "--progress-strip",
        action="store_true",
        help="also draw each image on its way from noise, in ten frames: FILE.progress.png",
    )
    add("--batch-size", type=options.count, default=16, help="images at a time")
    note = "; the published FIDs are of 250"
    sampling.add_sampling_options(parser, sampler="ddpm", steps=50, cfg_scale=4.0, note=note)
    options.add_dry_run(parser)
    args = parser.parse_args(argv)
    files.check_output(args.out, (".png",))
    args.ckpt = args.ckpt or hub.dit_of(options.given_model(args))
    return args


def chosen_labels(args: argparse.Namespace, trained: Trained) -> list[int]:
    """Labels of the images, those of a class one after the other. Raises UserError."""
    num_classes = trained.config.model.num_classes
    if args.classes is None:
        chosen = classes.default_labels(trained.classes, num_classes)
    else:
        chosen = classes.find_labels(args.classes, trained.classes, num_classes)
    total = len(chosen) * args.per_class
    if total > LARGEST_GRID:
        raise UserError(
            f"{len(chosen)} classes with --per-class {args.per_class} are {total} images, more than the {LARGEST_GRID} "
            "of a grid; ask for fewer, or use sample_ddp.py"
        )
    if args.progress_strip and total > LARGEST_STRIP:
        raise UserError(f"--progress-strip shows {LARGEST_STRIP} images at most, not {total}; ask for fewer")
    return [label for label in chosen for _ in range(args.per_class)]


def noise_indices(labels: list[int]) -> list[tuple]:
    """What tells the noise of each image from others: its label and its number among those of that label."""
    return [("class", label, labels[:k].count(label)) for k, label in enumerate(labels)]


def states_to_keep(steps: int, strip: bool) -> list[int]:
    """Which of the steps + 1 states of the sampler to keep: the result, or frames evenly spread from the noise on."""
    return sorted({round(state) for state in np.linspace(0, steps, FRAMES)}) if strip else [steps]


def sample_states(
    trained: Trained, config: SamplingConfig, labels: list[int], kept: list[int], args, device: torch.device
) -> tuple[list[int | None], Tensor]:
    """Timesteps of the kept states, and latents (n, len(kept), C, h, w) on device."""
    precision, objective = distributed.resolve_precision(args.precision, device), trained.config.objective
    model, indices, batches = trained.model.to(device), noise_indices(labels), []
    starts = range(0, len(labels), args.batch_size)
    with monitor.progress_bar(len(starts) * config.steps, description="sampling") as bar:
        for first in starts:
            part = slice(first, first + args.batch_size)
            states = sampling.sample_progressive(
                model, config, indices[part], labels[part], trained.latent_shape, device, precision, objective
            )
            found = []
            for number, state in enumerate(states):
                if number in kept:
                    found.append(state)
                bar.update(1 if number else 0)  # the first state is the noise
            timesteps, latents = zip(*found, strict=True)
            batches.append(torch.stack(latents, dim=1))
    return list(timesteps), torch.cat(batches)


def decode(vae: VAE, latents: Tensor, batch_size: int) -> list[list[np.ndarray]]:
    """Latents (n, frames, C, h, w) as n lists of frames (H, W, 3) uint8."""
    images = torch.cat([vae.decode(part) for part in latents.flatten(0, 1).split(batch_size)])
    return [list(frames.numpy()) for frames in images.unflatten(0, latents.shape[:2])]


def columns_of(labels: list[int], per_class: int) -> int:
    """Columns of a nearly square grid, in whose rows the images of a class stay together up to ten."""
    side = max(4, math.ceil(math.sqrt(len(labels))))
    together = max(1, min(round(side / per_class), 10 // per_class))  # classes in a row
    return min(len(labels), 10, per_class * together)


def describe(trained: Trained, config: SamplingConfig) -> str:
    """The settings in a line, to stand above the pictures."""
    parts = [trained.config.model.model, trained.label, f"cfg {config.cfg_scale:g}"]
    parts += [f"{config.sampler} {config.steps} steps", f"seed {config.seed}"]
    if trained.rope_extend:
        parts.append(f"{options.format_size(trained.image_size)} by {trained.rope_extend}")
    return ", ".join(parts)


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = sampling.config_from_args(args, args.seed)
    trained = load_trained(args.ckpt, args.weights, options.given_model(args))
    sampling.check_sampler(config, trained.config)
    labels = chosen_labels(args, trained)
    device = distributed.setup(args.tf32)
    if distributed.world_size() > 1:
        raise UserError(
            f"sample.py is one process, not {distributed.world_size()}; use python sample.py, or sample_ddp.py"
        )
    if args.compile:
        distributed.check_compiler(device)
        trained.model.compile_blocks()
    vae = load_vae(args.vae, trained, device, args.vae_precision)
    if args.dry_run:
        return print(f"dry run: would draw {len(labels)} images to {args.out}: {describe(trained, config)}")
    kept = states_to_keep(config.steps, args.progress_strip)
    timesteps, latents = sample_states(trained, config, labels, kept, args, device)
    frames = decode(vae, latents, args.batch_size)
    names, title = [classes.describe(label, trained.classes) for label in labels], describe(trained, config)
    grid = pictures.draw_grid([row[-1] for row in frames], names, columns_of(labels, args.per_class), title)
    made = [("grid", args.out, grid)]
    if args.progress_strip:
        captions = ["result" if t is None else f"t = {t:g}" for t in timesteps]
        strips = pictures.draw_strips(frames, names, captions, f"{title}: latents at timestep t, decoded")
        made.append(("progress", args.out.with_suffix(".progress.png"), strips))
    logger = monitor.make_logger()
    for name, path, picture in made:
        with files.cannot_write(f"--out {str(path)!r}"):
            pictures.save_png(picture, path)
        logger.info(f"{name}: {path}")


if __name__ == "__main__":
    main()
