"""Encode a data set once: the posterior's mean and standard deviation of every image, for both flips.

Training on the cache (train.py --latents-dir) draws from the same distribution as encoding every image in every epoch.
An interrupted command goes on where it was.
"""

import argparse
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from runtime import data, distributed, monitor, options
from runtime.options import UserError, check_image_size
from runtime.vae import VAE

CHUNK = 256  # images between two marks of progress


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="folder with a sub-folder of images for each class")
    add("--latents-dir", type=Path, required=True, help="where the cache goes")
    add("--vae", default="ema", help="ema, mse, hub id or folder of an AutoencoderKL")
    add("--image-size", type=options.image_size, default=(256, 256), help="pixels, as in 256 or 256x384")
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="encode mirrored images too")
    add("--batch-size", type=options.count, default=32, help="images encoded at a time by each process")
    add("--num-workers", type=options.non_negative_int, default=4, help="image-reading processes for each process")
    add("--skip-unreadable", action="store_true", help="leave unreadable images out and list them in skipped.txt")
    return parser.parse_args(argv)


class Rows(Dataset):
    """Images of a list by row: (row, image (3, H, W) uint8, or an Unreadable)."""

    def __init__(self, images: data.ImageList, size: tuple[int, int]):
        self.images, self.size = images, size

    def __getitem__(self, row: int):
        pixels = data.read_prepared(self.images.path(row), self.size)
        return row, pixels if isinstance(pixels, data.Unreadable) else data.to_tensor(pixels)


class CacheWriter:
    """A cache being filled by any number of processes: every chunk of rows is written, synced, then marked as done.

    Written through file offsets and not through a memory map, whose whole pages processes on other nodes would
    overwrite for each other.
    """

    def __init__(self, root: Path, shape: tuple[int, ...]):
        self.root, self.shape = root, shape
        self.row_bytes = 2 * int(np.prod(shape[1:]))
        self.chunks = -(-shape[0] // CHUNK)

    def create(self, settings: dict) -> None:
        """Allocate the files, unless an earlier command with the same settings did. Raises UserError."""
        begun = self.root / "begun.json"
        if begun.exists():
            return check_same(monitor.read_json(begun), settings, self.root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            free, needed = shutil.disk_usage(self.root).free, self.shape[0] * self.row_bytes
            if free < needed:
                raise UserError(
                    f"--latents-dir {str(self.root)!r} needs {monitor.format_bytes(needed)} and its disk has "
                    f"{monitor.format_bytes(free)} free"
                )
            np.lib.format.open_memmap(self.root / "moments.npy", "w+", np.float16, self.shape)
            np.lib.format.open_memmap(self.root / "labels.npy", "w+", np.int64, self.shape[:1])
            (self.root / "done").write_bytes(bytes(self.chunks))
            monitor.write_json(begun, settings)
        except OSError as error:
            raise UserError(f"--latents-dir {str(self.root)!r} cannot be written ({error.strerror})") from error

    def remaining(self) -> list[int]:
        """Chunks that are not marked as done."""
        return [chunk for chunk, done in enumerate((self.root / "done").read_bytes()) if not done]

    def rows(self, chunk: int) -> range:
        return range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.shape[0]))

    def open(self) -> None:
        self.moments = open(self.root / "moments.npy", "r+b")
        self.labels = open(self.root / "labels.npy", "r+b")
        self.done = open(self.root / "done", "r+b")
        self.moments_offset, self.labels_offset = (
            np.load(self.root / name, mmap_mode="r").offset for name in ("moments.npy", "labels.npy")
        )

    def write(self, row: int, label: int, moments: np.ndarray | None) -> None:
        """One image: moments (flips, 2C, h, w) float16, or None for one left out, whose label is -1."""
        if moments is not None:
            write_at(self.moments.fileno(), moments.tobytes(), self.moments_offset + row * self.row_bytes)
        write_at(self.labels.fileno(), np.int64(label).tobytes(), self.labels_offset + row * 8)

    def mark(self, chunk: int) -> None:
        os.fsync(self.moments.fileno())
        os.fsync(self.labels.fileno())
        os.pwrite(self.done.fileno(), b"\1", chunk)


def write_at(descriptor: int, contents: bytes, offset: int) -> None:
    """Write all of contents: a disk that is nearly full takes a part and says so only the next time."""
    written = 0
    while written < len(contents):
        written += os.pwrite(descriptor, contents[written:], offset + written)


def check_same(stored: dict, settings: dict, root: Path) -> None:
    """Raise UserError, naming what differs, unless a cache was begun with the same settings.

    The autoencoder's weights and geometry decide, not where it was loaded from.
    """
    ignored = ["quick", "data_path"]
    if without_source(stored.get("vae")) == without_source(settings["vae"]):
        ignored.append("vae")
    listed = options.differences(stored, settings, tuple(ignored), show=short)
    if listed:
        raise UserError(
            f"--latents-dir {str(root)!r} was made with other settings: {listed}; remove it or use another folder"
        )


def without_source(vae) -> dict | None:
    return {key: value for key, value in vae.items() if key != "source"} if isinstance(vae, dict) else None


def short(value) -> str:
    """A setting in about 60 characters; an autoencoder by its source, the beginning of its hash, and its scaling."""
    if isinstance(value, dict) and "sha256" in value:
        scaling = f"scaling factor {value.get('scaling_factor')}, shift {value.get('shift_factor')}"
        return f"{value.get('source')!r} (sha256 {str(value['sha256'])[:8]}, {scaling})"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def quick_identity(args: argparse.Namespace) -> list:
    """What shows without reading images or weights that nothing changed: arguments, names and times of folders."""
    classes = sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(args.data_path) if entry.is_dir())
    vae = Path(args.vae)
    weights = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in vae.iterdir()) if vae.is_dir() else []
    identity = [str(args.data_path.resolve()), args.vae, args.image_size, args.flip, classes, weights]
    return [distributed.hash_seed(repr(identity)), distributed.hash_seed(repr(identity[::-1]))]


def is_finished(args: argparse.Namespace) -> bool:
    """Whether the folder holds the finished cache of this very command."""
    meta = args.latents_dir / "meta.json"
    if not (meta.exists() and (args.latents_dir / "paths.npy").exists() and args.data_path.is_dir()):
        return False
    return monitor.read_json(meta).get("quick") == quick_identity(args)


def encode_missing(writer: CacheWriter, images: data.ImageList, vae: VAE, args, logger) -> tuple[bool, list[str]]:
    """Encode this process's share of the chunks. Returns whether it was stopped, and the unreadable images.

    Raises OSError when they cannot be written.
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
            bad = encode_chunk(writer, writer.rows(chunk), images, vae, args)
            for image in bad:
                logger.warning(f"warning: {image}")
            unreadable += [str(image) for image in bad]
            if not bad or args.skip_unreadable:
                writer.mark(chunk)
            bar.update(min(len(writer.rows(chunk)) * distributed.world_size(), total - bar.n))
    return stop.received is not None, unreadable


def encode_chunk(writer: CacheWriter, rows: range, images: data.ImageList, vae: VAE, args) -> list[data.Unreadable]:
    """Encode and write some rows. Returns the images that could not be read."""
    batches = [rows[first : first + args.batch_size] for first in range(0, len(rows), args.batch_size)]
    workers = min(args.num_workers, len(batches))
    bad = []
    with data.open_loader(Rows(images, args.image_size), batches, workers, torch.device("cpu"), list) as loader:
        for batch in loader:
            readable = [(row, image) for row, image in batch if not isinstance(image, data.Unreadable)]
            for row, image in batch:
                if isinstance(image, data.Unreadable):
                    bad.append(image)
                    writer.write(row, -1, None)
            if readable:
                encode_batch(writer, readable, images.labels, vae, args.flip)
    return bad


def encode_batch(writer: CacheWriter, batch: list[tuple], labels: np.ndarray, vae: VAE, flip: bool) -> None:
    """Encode and write images given as (row, image (3, H, W) uint8)."""
    pixels = torch.stack([image for _, image in batch])
    views = [pixels, pixels.flip(3)] if flip else [pixels]
    moments = torch.stack([vae.encode(view) for view in views], dim=1)  # (n, flips, 2C, h, w)
    for (row, _), values in zip(batch, moments.half().cpu().numpy(), strict=True):
        writer.write(row, int(labels[row]), values)


def describe(args, images: data.ImageList, vae: VAE, shape: tuple[int, ...]) -> dict:
    """What the cache is, for begun.json and meta.json."""
    return {
        "vae": {"source": vae.source, **vae.describe()},
        "image_size": list(args.image_size),
        "preparation": data.PREPARATION,
        "fingerprint": images.fingerprint,
        "shape": list(shape),
        "classes": images.classes,
        "data_path": str(args.data_path.resolve()),  # read again from whatever folder training starts in
        "quick": quick_identity(args),
    }


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = distributed.setup()
    logger = monitor.make_logger()
    if distributed.on_main(is_finished, args):
        return logger.info(f"nothing to do: {args.latents_dir} is a finished cache of this data set")
    images, vae = data.ImageList(args.data_path), VAE(args.vae, device)
    height, width = check_image_size(args.image_size, vae.downsampling, 1)
    shape = (len(images), 2 if args.flip else 1, 2 * vae.latent_channels, height, width)
    settings = describe(args, images, vae, shape)
    finished = args.latents_dir / "meta.json"
    if distributed.on_main(finished.exists):
        distributed.on_main(lambda: check_same(monitor.read_json(finished), settings, args.latents_dir))
        distributed.on_main(write_paths, args.latents_dir, images)
        return logger.info(f"nothing to do: {args.latents_dir} is a finished cache of this data set")
    writer = CacheWriter(args.latents_dir, shape)
    size = monitor.format_bytes(shape[0] * writer.row_bytes)
    logger.info(f"encoding {len(images):,} images, {shape[1]} flips each, into {args.latents_dir}: {size}")
    distributed.on_main(writer.create, settings)
    with distributed.agreed_failure(f"--latents-dir {str(args.latents_dir)!r}"):
        outcome = encode_missing(writer, images, vae, args, logger)
    outcomes = distributed.gather(outcome)
    if any(stopped for stopped, _ in outcomes):
        return logger.info("stopped on request; repeat the same command to go on")
    bad = [text for _, texts in outcomes for text in texts]
    if bad and not args.skip_unreadable:
        raise UserError(f"{bad[0]}; {len(bad)} in all; pass --skip-unreadable to leave such images out")
    with distributed.agreed_failure(f"--latents-dir {str(args.latents_dir)!r}"):
        if distributed.is_main():
            finish(args.latents_dir, images, settings)
    logger.info(f"finished: {args.latents_dir}")


def write_paths(root: Path, images: data.ImageList) -> None:
    """The relative path of every row, by which training can hold images out, whole or not at all."""
    if not (root / "paths.npy").exists():
        with open(root / "paths.npy.partial", "wb") as file:
            np.save(file, images.paths)
        os.replace(root / "paths.npy.partial", root / "paths.npy")


def finish(root: Path, images: data.ImageList, settings: dict) -> None:
    """List what was left out, and write meta.json, which makes the cache a finished one."""
    skipped = np.flatnonzero(np.load(root / "labels.npy") < 0)
    if len(skipped):
        monitor.write_text(root / "skipped.txt", "".join(f"{images.path(row)}\n" for row in skipped))
    write_paths(root, images)
    monitor.write_json(root / "meta.json", settings)
    (root / "done").unlink()
    (root / "begun.json").unlink()


if __name__ == "__main__":
    main()
