"""Which images a run holds out: a folder of their own, or a part of every class that a hash of the paths chooses."""

import argparse
import hashlib
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from runtime import checkpoint, distributed, options
from runtime.config import HeldOutConfig, VAEConfig
from runtime.data import ImageList, hash_paths
from runtime.latents import LatentCache
from runtime.options import UserError
from runtime.vae import VAE, load_same

BEGINNING = 4096  # bytes that tell nearly all files apart
SHOWN = 5  # class names in a message


def add_options(parser: options.Parser) -> None:
    group = parser.add_argument_group("validation: the noise MSE of images that are not trained on")
    group.add_argument("--val-data-path", type=Path, default=None, help="class folders to validate on")
    group.add_argument(
        "--val-fraction",
        type=options.number(float, 0, 1, open_low=True, open_high=True),
        default=None,
        help="part of every class to hold out, in place of --val-data-path",
    )
    group.add_argument(
        "--val-every",
        type=options.count,
        default=None,
        help="steps between validations, beside the one after the last step (None: at every checkpoint, or at every "
        "so many that all cost less than 5 %% of the training); N images cost as much as training on about 7 N",
    )


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError for validation options that do not go together."""
    if args.val_data_path is not None and args.val_fraction is not None:
        raise UserError("--val-data-path and --val-fraction were both given; choose one")
    if args.val_every is not None and args.val_data_path is None and args.val_fraction is None:
        raise UserError("--val-every given without held-out images; add --val-data-path or --val-fraction")


@dataclass(frozen=True)
class HeldOut:
    """Images that the run never trains on."""

    source: ImageList | LatentCache
    vae: VAE | None  # what encodes an ImageList
    fraction: float | None = None  # part of each class of the training data; None = a folder of their own
    left_out: tuple[str, ...] = ()  # hash_path of the unreadable images that the split was made without

    @property
    def config(self) -> HeldOutConfig:
        """What the checkpoint stores and a resumed run has to repeat."""
        paths = self.source.paths
        return HeldOutConfig(self.fraction, hash_paths(paths), len(paths), list(self.left_out))


def hold_out(
    source: ImageList | LatentCache,
    vae: VAE | None,
    vae_config: VAEConfig,
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[ImageList | LatentCache, HeldOut | None]:
    """The images to train on, and those held out, None without validation.

    vae is None for a cache, whose autoencoder vae_config describes.

    Raises UserError for a held-out set that is empty, has other classes, or overlaps the training data.
    """
    if args.val_fraction is not None:
        chosen = split(source.paths, source.labels, source.classes, args.val_fraction)
        left_out = tuple(map(hash_path, source.paths_left_out)) if isinstance(source, LatentCache) else ()
        return source.subset(~chosen), HeldOut(source.subset(chosen), vae, args.val_fraction, left_out)
    if args.val_data_path is None:
        return source, None
    images = ImageList(args.val_data_path, "--val-data-path")
    check_classes(images, source.classes)
    distributed.on_main(check_overlap, images, source, args.results_dir)
    return source, HeldOut(
        images, vae or load_same(args.vae, vae_config, device, f"--latents-dir {str(args.latents_dir)!r}")
    )


def check_same(stored: HeldOutConfig | None, current: HeldOutConfig | None, path: Path) -> None:
    """Raise UserError where a command holds out other images than the checkpoint that it would resume.

    Both are for the same training data; None is no validation.
    """
    if _decisive(stored) == _decisive(current):
        return
    if stored is None:
        remedy = f"leave {_option(current)} out"
    elif _option(stored) != _option(current):
        remedy = f"pass {_option(stored)}" + (" with the folder it had" if stored.fraction is None else "")
    elif stored.fraction is None:
        remedy = "pass the folder with the same files"
    else:
        remedy = "give the images that it had, without the unreadable ones that its latent cache left out"
    raise UserError(
        f"checkpoint {str(path)!r} was trained with {_name(stored)}, the command has {_name(current)}; what is held "
        f"out stays the same for the whole run: {remedy}, or use another --results-dir"
    )


def _decisive(held_out: HeldOutConfig | None) -> tuple | None:
    """Without the files left out, which an old checkpoint does not list and the fingerprint covers."""
    return held_out and (held_out.fraction, held_out.fingerprint, held_out.images)


def _option(held_out: HeldOutConfig | None) -> str | None:
    if held_out is None:
        return None
    return "--val-data-path" if held_out.fraction is None else f"--val-fraction {held_out.fraction}"


def _name(held_out: HeldOutConfig | None) -> str:
    if held_out is None:
        return "no validation"
    return f"{_option(held_out)} ({held_out.images:,} images, of fingerprint {held_out.fingerprint[:8]})"


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
                f"--val-fraction {fraction:g} leaves class {name!r} empty in one part (it has {len(members)} image"
                f"{'' if len(members) == 1 else 's'}); add images to it, remove it, or use --val-data-path"
            )
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen[members[np.argsort(hashes[members], kind="stable")[:count]]] = True
    return chosen


def hash_path(path: bytes) -> str:
    """16 hexadecimal digits, by whose order a split chooses."""
    return hashlib.sha256(path).hexdigest()[:16]


def check_classes(images: ImageList, classes: list[str]) -> None:
    """Raise UserError, naming classes, unless the validation set has those of the training data."""
    parts = [
        (sorted(set(classes) - set(images.classes)), "missing in the validation set"),
        (sorted(set(images.classes) - set(classes)), "missing in the training data"),
    ]
    listed = "; ".join(f"{list_names(names)} {where}" for names, where in parts if names)
    if listed:
        raise UserError(
            f"--val-data-path {str(images.root)!r} has other class folders than the training data: {listed}; give both "
            "the same"
        )


def list_names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more


def check_overlap(images: ImageList, source: ImageList | LatentCache, results_dir: Path) -> None:
    """Raise UserError when a file of the validation set, or a copy of it, is among the training images.

    A run that is gone on with was checked when it began.
    """
    if checkpoint.training_checkpoints(results_dir / "checkpoints"):
        return
    if isinstance(source, LatentCache):
        try:
            source = source.images()
        except UserError as error:
            message = f"the validation set was not compared with the images of the cache: {error}"
            warnings.warn(message, stacklevel=2)
            return
    pairs = same_files(images, source)
    if pairs:
        raise UserError(
            f"--val-data-path {str(images.root)!r} overlaps the training data: {str(pairs[0][0])!r} is the same image "
            f"as {str(pairs[0][1])!r}, {len(pairs)} in all; remove them from one of the two"
        )


def same_files(images: ImageList, others: ImageList) -> list[tuple[Path, Path]]:
    """Pairs of files with the same content, one of each list; only what size and beginning leave open is read whole."""
    left, right = ([part.path(index) for index in range(len(part))] for part in (images, others))
    with ThreadPoolExecutor(16) as pool:
        for key in (_size, _hash_beginning, _hash):
            left_keys, right_keys = list(pool.map(key, left)), list(pool.map(key, right))
            left, right = _with_key_in(left, left_keys, right_keys), _with_key_in(right, right_keys, left_keys)
        first = dict(zip(map(_hash, reversed(right)), reversed(right), strict=True))
        return [(path, first[_hash(path)]) for path in left]


def _with_key_in(paths: list[Path], keys: list, others: list) -> list[Path]:
    common = set(others)
    return [path for path, key in zip(paths, keys, strict=True) if key in common]


def _unless_unreadable(key: Callable[[Path], object]) -> Callable[[Path], object]:
    """A file that cannot be read is equal to no other; whoever reads its image will say so."""

    def checked(path: Path):
        try:
            return key(path)
        except OSError:
            return path

    return checked


@_unless_unreadable
def _size(path: Path) -> int:
    return path.stat().st_size


@_unless_unreadable
def _hash_beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(BEGINNING)).digest()


@_unless_unreadable
def _hash(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
