"""Encode a data set once: the posterior's mean and standard deviation of every image, for both flips.

Training on the cache (train.py --latents-dir) draws from the same distribution as encoding every image in every epoch.
An interrupted command goes on where it was.
"""

import argparse
from dataclasses import asdict, replace
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
    add("--verify", action="store_true", help="read all of a finished cache, and encode again what is damaged")
    help = "images whose size or time is another than when they were encoded: encode them again, or keep their latents "
    help += "(None: an error)"
    add("--changed", choices=["encode", "keep"], default=None, help=help)
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
        if isinstance(pixels, data.Unreadable):
            return row, replace(pixels, remedy="repair it")
        return row, data.to_tensor(pixels)


def encode_missing(writer: CacheWriter, images: data.ImageList, vae: VAE, args, logger) -> tuple[int, list[str]]:
    """Encode this process's share of the rows that do not prove themselves.

    Returns the signal that stopped it, or 0, and the unreadable images. Raises OSError when they cannot be written, and
    UserError.
    """
    unreadable, total, chunks = [], len(images), writer.chunks()
    with distributed.StopOnSignal() as stop, monitor.progress_bar(total, 0, "image", "encoding") as bar:
        for chunk in chunks[distributed.rank() :: distributed.world_size()]:
            if stop.received:
                break
            rows = writer.unproven(chunk)
            bad = encode_rows(writer, rows, images, vae, args, stop) if rows else []
            if bad is None:
                break
            for image in bad:
                logger.warning(f"warning: {image}")
            unreadable += [str(image) for image in bad]
            bar.update(min(len(chunk) * distributed.world_size(), total - bar.n))
    writer.sync()
    return int(stop.received or 0), unreadable


def encode_rows(
    writer: CacheWriter, rows: list[int], images: data.ImageList, vae: VAE, args, stop: distributed.StopOnSignal
) -> list[data.Unreadable] | None:
    """Encode and write some rows of a chunk. Returns the images where that fails; None where a signal came first."""
    batches = writer.batches(rows, args.batch_size)
    workers = min(args.num_workers, len(batches))
    bad, encoded = [], 0
    rows_of = Rows(images, args.image_size)
    with data.open_loader(rows_of, batches, workers, torch.device("cpu"), list, stop) as loader:
        for batch in loader:
            if isinstance(batch, data.NoBatch):
                raise UserError(f"{batch}; repeat the command to go on")
            encoded += len(batch)
            readable = [item for item in batch if not isinstance(item[1], data.Unreadable)]
            found = dict(batch) | (encode_batch(readable, images, vae, args.flip) if readable else {})
            for row in sorted(found.keys() & set(rows)):
                if not isinstance(found[row], data.Unreadable):
                    writer.write(row, found[row])
                    continue
                bad.append(found[row])
                if args.skip_unreadable:
                    writer.write(row, None)
    return bad if encoded == sum(map(len, batches)) else None


def encode_batch(
    batch: list[tuple], images: data.ImageList, vae: VAE, flip: bool
) -> dict[int, np.ndarray | data.Unreadable]:
    """Moments (flips, 2C, h, w) float16 by row, of images given as (row, image (3, H, W) uint8)."""
    pixels = torch.stack([image for _, image in batch])
    views = [pixels, pixels.flip(3)] if flip else [pixels]
    moments, encoded = torch.stack([vae.encode(view) for view in views], dim=1), {}  # (n, flips, 2C, h, w)
    for (row, _), exact, values in zip(batch, moments, moments.half().cpu().numpy(), strict=True):
        encoded[row] = values
        if not np.isfinite(values).all():
            reason = f"the autoencoder makes {float(exact.abs().max()):g} of it, and float16 ends at 65504"
            remedy = "use another --vae, train with --data-path in place of a cache"
            encoded[row] = data.Unreadable(str(images.path(row)), reason, remedy=remedy)
    return encoded


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
    try:
        vae = LatentCache(args.latents_dir).vae
    except UserError:  # there is none, or it will be repaired
        return False
    if args.verify or not is_surely(args.vae, vae):
        return False
    return CacheWriter(args.latents_dir, describe(args, images, vae), images).check(args.changed)


def is_damaged(cache: LatentCache) -> bool:
    """Whether any row of a finished cache does not prove itself. Every process reads its share."""
    mine = np.array_split(cache.rows, distributed.world_size())[distributed.rank()]
    flips, found = range(cache.moments.shape[1]), False
    with monitor.progress_bar(len(mine), 0, "image", "verifying") as bar:
        for row in mine:
            found = found or any(not cache.proves(row, flip, cache.moments[row, flip]) for flip in flips)
            bar.update()
    return int(distributed.all_reduce(torch.tensor(int(found)), "max")) == 1


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
    writer = CacheWriter(args.latents_dir, describe(args, images, vae.config), images)
    finished = distributed.on_main(writer.check, args.changed)
    size = f"{len(images):,} images, {writer.shape[1]} flips each, into {args.latents_dir}: "
    size += files.format_bytes(writer.bytes)
    if args.dry_run:
        return logger.info(f"dry run: {done if finished else f'would encode {size}'}")
    if finished and not (args.verify and is_damaged(LatentCache(args.latents_dir))):
        return logger.info(done)
    with distributed.hold(args.latents_dir, f"--latents-dir {str(args.latents_dir)!r}", logger.info):
        if not finished and distributed.on_main(writer.check, args.changed):  # by another command, meanwhile
            return logger.info(done)
        logger.info(f"encoding {size}")
        if distributed.on_main(writer.create, args.changed):
            logger.info("what an early version encoded is kept; it is read for the checksums that it has not")
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
        raise UserError(f"{bad[0]}, or pass --skip-unreadable to leave such images out; {len(bad)} in all")
    with distributed.agreed_failure(f"--latents-dir {str(args.latents_dir)!r}"):
        if distributed.is_main():
            writer.finish()
    logger.info(f"finished: {args.latents_dir}")


if __name__ == "__main__":
    main()
