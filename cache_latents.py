"""Encode a data set once: the posterior's mean and standard deviation of every image, for both flips.

Training on the cache (train.py --latents-dir) draws from the same distribution as encoding every image in every epoch.
An interrupted command goes on where it was.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from runtime import data, distributed, files, monitor, options
from runtime.config import VAEConfig
from runtime.latents import CacheWriter, LatentCache
from runtime.options import UserError, check_image_size
from runtime.vae import VAE, check_source, is_surely


def build_parser() -> options.Parser:
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="folder with a sub-folder of images for each class")
    add("--latents-dir", type=Path, required=True, help="where the cache goes")
    options.add_vae(parser, default="ema")
    add("--image-size", type=options.image_size, default=(256, 256), help="pixels, as in 256 or 256x384")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="encode mirrored images too")
    add("--batch-size", type=options.count, default=32, help="images encoded at a time by each process")
    options.add_num_workers(parser, "image-reading processes for each process")
    add("--skip-unreadable", action="store_true", help="leave unreadable images out and list them in skipped.txt")
    options.add_dry_run(parser, planned=True)
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


class Rows(Dataset):
    """Images of a list by row: (row, image (3, H, W) uint8, or an Unreadable)."""

    def __init__(self, images: data.ImageList, size: tuple[int, int]):
        self.images, self.size = images, size

    def __getitem__(self, row: int):
        pixels = data.read_prepared(self.images.path(row), self.size)
        return row, pixels if isinstance(pixels, data.Unreadable) else data.to_tensor(pixels)


def encode_missing(writer: CacheWriter, images: data.ImageList, vae: VAE, args, logger) -> tuple[int, list[str]]:
    """Encode this process's share of the chunks. Returns the signal that stopped it, or 0, and the unreadable images.

    Raises OSError when they cannot be written, and UserError.
    """
    remaining = distributed.on_main(writer.remaining)
    mine = remaining[distributed.rank() :: distributed.world_size()]
    writer.open()
    unreadable, total = [], len(images)
    begun = total - sum(len(writer.rows(chunk)) for chunk in remaining)
    with distributed.StopOnSignal() as stop, monitor.progress_bar(total, begun, "image", "encoding") as bar:
        for chunk in mine:
            if stop.received:
                break
            bad = encode_chunk(writer, writer.rows(chunk), images, vae, args, stop)
            if bad is None:
                break
            for image in bad:
                logger.warning(f"warning: {image}")
            unreadable += [str(image) for image in bad]
            if not bad or args.skip_unreadable:
                writer.mark(chunk)
            bar.update(min(len(writer.rows(chunk)) * distributed.world_size(), total - bar.n))
    return int(stop.received or 0), unreadable


def encode_chunk(
    writer: CacheWriter, rows: range, images: data.ImageList, vae: VAE, args, stop: distributed.StopOnSignal
) -> list[data.Unreadable] | None:
    """Encode and write some rows. Returns the images that could not be read; None where a signal came first."""
    batches = [rows[first : first + args.batch_size] for first in range(0, len(rows), args.batch_size)]
    workers = min(args.num_workers, len(batches))
    bad, encoded = [], 0
    rows_of = Rows(images, args.image_size)
    with data.open_loader(rows_of, batches, workers, torch.device("cpu"), list, stop) as loader:
        for batch in loader:
            if isinstance(batch, data.NoBatch):
                raise UserError(f"{batch}; repeat the command to go on")
            encoded += len(batch)
            readable = []
            for row, image in batch:
                if isinstance(image, data.Unreadable):
                    bad.append(image)
                    writer.write(row, -1, None)
                else:
                    readable.append((row, image))
            if readable:
                encode_batch(writer, readable, images.labels, vae, args.flip)
    return bad if encoded == len(rows) else None


def encode_batch(writer: CacheWriter, batch: list[tuple], labels: np.ndarray, vae: VAE, flip: bool) -> None:
    """Encode and write images given as (row, image (3, H, W) uint8)."""
    pixels = torch.stack([image for _, image in batch])
    views = [pixels, pixels.flip(3)] if flip else [pixels]
    moments = torch.stack([vae.encode(view) for view in views], dim=1)  # (n, flips, 2C, h, w)
    for (row, _), values in zip(batch, moments.half().cpu().numpy(), strict=True):
        writer.write(row, int(labels[row]), values)


def describe(args, images: data.ImageList, vae: VAEConfig) -> dict:
    """What the cache is, for begun.json and meta.json. Raises UserError."""
    height, width = check_image_size(args.image_size, vae.downsampling, 1)
    return {
        "vae": asdict(vae),
        "image_size": list(args.image_size),
        "preparation": data.PREPARATION,
        "fingerprint": images.fingerprint,
        "shape": [len(images), 2 if args.flip else 1, 2 * vae.latent_channels, height, width],
        "classes": images.classes,
        "data_path": str(args.data_path.resolve()),  # read again from whatever folder training starts in
    }


def is_finished(args, images: data.ImageList) -> bool:
    """Whether the folder holds the finished cache of this command; the autoencoder need not be loaded to tell."""
    if not all((args.latents_dir / name).exists() for name in ("meta.json", "paths.npy")):
        return False
    vae = LatentCache(args.latents_dir).vae
    return is_surely(args.vae, vae) and CacheWriter(args.latents_dir, describe(args, images, vae)).check()


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device, logger = distributed.setup(), monitor.make_logger()
    if args.planned and not args.data_path.exists():
        check_source(args.vae)
        files.check_folder(args.latents_dir, "--latents-dir")
        return logger.info(f"dry run: {args.data_path} is not there yet; nothing about its images was checked")
    done = f"nothing to do: {args.latents_dir} is a finished cache of this data set"
    images = data.ImageList(args.data_path)
    if distributed.on_main(is_finished, args, images):
        return logger.info(done)
    vae = VAE(args.vae, device)
    writer = CacheWriter(args.latents_dir, describe(args, images, vae.config))
    finished = distributed.on_main(writer.check)
    size = f"{len(images):,} images, {writer.shape[1]} flips each, into {args.latents_dir}: "
    size += files.format_bytes(writer.bytes)
    if args.dry_run:
        return logger.info(f"dry run: {done if finished else f'would encode {size}'}")
    if finished:
        distributed.on_main(writer.write_paths, images)
        return logger.info(done)
    with distributed.hold(args.latents_dir, f"--latents-dir {str(args.latents_dir)!r}", logger.info):
        if distributed.on_main(writer.check):  # by another command, meanwhile
            return logger.info(done)
        logger.info(f"encoding {size}")
        distributed.on_main(writer.create)
        fill(writer, images, vae, args, logger)


def fill(writer: CacheWriter, images: data.ImageList, vae: VAE, args, logger) -> None:
    """Encode what is missing, and finish the cache unless a signal came. Raises UserError."""
    with distributed.agreed_failure(f"--latents-dir {str(args.latents_dir)!r}"):
        outcome = encode_missing(writer, images, vae, args, logger)
    outcomes = distributed.gather(outcome)
    if any(number for number, _ in outcomes):
        logger.info("stopped on request; repeat the same command to go on")
        distributed.exit_stopped(max(number for number, _ in outcomes))
    bad = [text for _, texts in outcomes for text in texts]
    if bad and not args.skip_unreadable:
        raise UserError(f"{bad[0]}; {len(bad)} in all; pass --skip-unreadable to leave such images out")
    with distributed.agreed_failure(f"--latents-dir {str(args.latents_dir)!r}"):
        if distributed.is_main():
            writer.finish(images)
    logger.info(f"finished: {args.latents_dir}")


if __name__ == "__main__":
    main()
