"""Data of a run: image folder and its preparation, latent cache, resumable batches."""

import copy
import functools
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from runtime.distributed import StopOnSignal, begin_worker, hash_seed, rank, world_size
from runtime.options import UserError, first_line, is_utf8

STAND_INS = 100  # images tried in place of one that cannot be read
PREPARATION = "box-halving, bicubic, centre crop; EXIF orientation applied"  # named in every latent cache


@dataclass(frozen=True)
class Unreadable:
    """Stands in a batch for an image that could not be read: workers cannot raise one-line errors themselves."""

    path: str
    reason: str
    kind: str = "image"
    remedy: str = "repair it or remove it from the data set"

    def __str__(self) -> str:
        return f"{self.kind} {self.path!r} cannot be read ({self.reason}); {self.remedy}"


@dataclass(frozen=True)
class WorkerFailed:
    """Comes in place of a batch whose worker died, or found no memory for it."""

    reason: str

    def __str__(self) -> str:
        return f"a data worker {self.reason}; use fewer --num-workers, or a smaller batch"


NoBatch = Unreadable | WorkerFailed  # what a reader of batches has to expect in place of one


class ImageList:
    """The images of a class-folder data set, in the order of class and file names.

    Raises UserError, naming the option that gave it, for a folder that is missing, has no class folders, or has a class
    without images.
    """

    def __init__(self, root: str | Path, option: str = "--data-path"):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{option} {str(root)!r} is not a folder; expected one with a sub-folder for each class")
        self.classes = sorted(entry.name for entry in os.scandir(self.root) if _is_class(entry))
        if not self.classes:
            raise UserError(f"{option} {str(root)!r} has no class folders; expected one sub-folder for each class")
        paths, labels = [], []
        for label, name in enumerate(self.classes):
            if not is_utf8(name):
                raise UserError(
                    f"class folder {os.fsencode(self.root / name)!r} has a name that is not UTF-8; rename it, since "
                    "the name goes into checkpoints and config.json"
                )
            found = images_below(self.root, name)
            if not found:
                raise UserError(
                    f"class folder {str(self.root / name)!r} has no images; expected files ending in "
                    f"{', '.join(IMG_EXTENSIONS)}; add some or remove the folder"
                )
            paths += found
            labels += [label] * len(found)
        self.paths = np.array(paths)  # bytes: a million str objects would be copied into every worker
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.paths[index])

    def subset(self, chosen: np.ndarray) -> "ImageList":
        """The images whose entry of chosen (N,) is true, with all classes."""
        part = copy.copy(self)
        for cached in ("fingerprint", "stamps"):
            part.__dict__.pop(cached, None)
        part.paths, part.labels = self.paths[chosen], self.labels[chosen]
        return part

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the relative paths, which hold the classes; the folder may move, its list may not change."""
        return hash_paths(self.paths)

    @cached_property
    def stamps(self) -> np.ndarray:
        """Size in bytes and time of change in nanoseconds of every file (N, 2), which tell whether one was replaced.

        Seconds for a million files. Of a file that cannot be looked at, -1.
        """
        parts = [self.paths[first : first + 1000].tolist() for first in range(0, len(self), 1000)]
        with ThreadPoolExecutor(8) as pool:  # where the file system is far away, they wait together
            return np.concatenate(list(pool.map(partial(_stamps, os.fsencode(self.root)), parts)))


def _stamps(root: bytes, paths: list[bytes]) -> np.ndarray:
    found = np.full((len(paths), 2), -1, dtype=np.int64)
    for row, path in enumerate(paths):
        with suppress(OSError):
            status = os.stat(os.path.join(root, path))
            found[row] = status.st_size, status.st_mtime_ns
    return found


def hash_paths(paths: np.ndarray) -> str:
    """Hash of a list of relative paths (N,) bytes."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path + b"\0")
    return digest.hexdigest()


def _is_class(entry: os.DirEntry) -> bool:
    return _is_folder(entry) and not entry.name.startswith(".")  # .ipynb_checkpoints and the like are not classes


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether it is one, or a link to one; is_dir would raise for a link to itself."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def images_below(root: Path, name: str) -> list[bytes]:
    """Paths, relative to root, of the images in its folder name: of each folder files first, then folders, by name.

    Links are followed, but not back to a folder that they are in, of which a warning tells. Raises UserError for a
    folder that cannot be looked into.
    """
    found, waiting = [], [(name, (os.path.realpath(root / name),))]
    while waiting:
        folder, places = waiting.pop()  # places: where the folder and those above it really are
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"folder {str(root / folder)!r} cannot be read ({error.strerror}); remove it") from error
        subfolders = []
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if not _is_folder(entry):
                found += [os.fsencode(path)] if has_file_allowed_extension(entry.name, IMG_EXTENSIONS) else []
            elif not entry.is_symlink():
                subfolders.append((path, (*places, os.path.join(places[-1], entry.name))))
            elif any(is_within(place, target := os.path.realpath(root / path)) for place in places):
                warnings.warn(f"link {str(root / path)!r} leads back to {target!r}; it was left out", stacklevel=2)
            else:
                subfolders.append((path, (*places, target)))
        waiting += reversed(subfolders)
    return found


def is_within(folder: str, other: str) -> bool:
    """Whether a real path is another one, or below it."""
    return folder == other or folder.startswith(other.rstrip(os.sep) + os.sep)


def read_image(path: Path) -> Image.Image:
    """Open an image as 8-bit RGB, upright: the first frame, alpha dropped, 16 bits scaled to 8.

    Raises OSError, ValueError or whatever else a decoder does for a file that cannot be decoded whole.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about palettes and large images: neither concerns the pixels read here
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no defined range")
            if image.mode.startswith("I"):
                return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
            return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")


def prepare(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """DiT's preparation: halve by box filter while at least twice too large, resize bicubically, crop the centre.

    Returns (height, width, 3) uint8. For a square size this is the preparation of ADM's reference batches.
    Raises ValueError for an image that is too elongated.
    """
    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if resized[0] * resized[1] > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too elongated to be resized to {width} x {height}")
    image = image.resize(resized, Image.Resampling.BICUBIC)
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return np.asarray(image)[top : top + height, left : left + width]


class ImageData(Dataset):
    """Images of a list, prepared: item (epoch, index) is (image (3, H, W) uint8, label).

    With flip, half the images of an epoch are mirrored, as (seed, epoch, index) decides. With skip, which is None where
    nobody can ask for it, another image stands in for one that cannot be read, always the same, and the item has the
    path of the latter as its third part.
    """

    def __init__(self, images: ImageList, size: tuple[int, int], flip: bool, seed: int, skip: bool | None = None):
        self.images, self.size, self.flip, self.seed, self.skip = images, size, flip, seed, skip

    def __getitem__(self, item: tuple[int, int]):
        epoch, index = item
        pixels, skipped = self._read(index), ()
        if self.skip and isinstance(pixels, Unreadable):
            skipped = (pixels.path,)
            for attempt in range(STAND_INS):
                index = hash_seed(self.seed, "stand-in", item[1], attempt) % len(self.images)
                if not isinstance(pixels := self._read(index), Unreadable):
                    break
        if isinstance(pixels, Unreadable):
            return pixels
        if self.flip and is_flipped(self.seed, epoch, index):
            pixels = pixels[:, ::-1]
        return to_tensor(pixels), int(self.images.labels[index]), *skipped

    def _read(self, index: int) -> np.ndarray | Unreadable:
        pixels = read_prepared(self.images.path(index), self.size)
        if isinstance(pixels, Unreadable) and self.skip is not None:
            return replace(pixels, remedy="repair it, or pass --skip-unreadable")
        return pixels

    def __len__(self) -> int:
        return len(self.images)


def read_prepared(path: Path, size: tuple[int, int]) -> np.ndarray | Unreadable:
    """The prepared image (H, W, 3) uint8, or why there is none."""
    try:
        return prepare(read_image(path), size)
    except Exception as error:  # whatever a damaged file makes a decoder raise
        return Unreadable(str(path), str(error) or type(error).__name__)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 to a tensor (3, H, W) uint8 of its own memory."""
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def is_flipped(seed: int, epoch: int, index: int) -> bool:
    """Whether the image is mirrored in this epoch: a fair coin for each (seed, epoch, index)."""
    return hash_seed(seed, "flip", epoch, index) % 2 == 1


class EpochBatches(Sampler):
    """This process's part of every global batch, as lists of (epoch, index), from start_step on for ever.

    The order of an epoch is a permutation seeded by (seed, epoch); the last, incomplete batch is dropped. Global
    batches are the same for any number of processes and micro-batches.
    """

    def __init__(self, length: int, global_batch: int, seed: int, start_step: int = 0, micro_batches: int = 1):
        self.length, self.global_batch, self.seed = length, global_batch, seed
        self.start_step, self.micro_batches = start_step, micro_batches
        self.steps_per_epoch = length // global_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        local = self.global_batch // world_size()
        epoch, step = divmod(self.start_step, self.steps_per_epoch)
        while True:
            generator = np.random.default_rng(hash_seed(self.seed, "order", epoch))
            order = generator.permutation(self.length)
            for first in range(step * self.global_batch, self.steps_per_epoch * self.global_batch, self.global_batch):
                mine = order[first + rank() * local : first + (rank() + 1) * local]
                for part in np.split(mine, self.micro_batches):
                    yield [(epoch, int(index)) for index in part]
            epoch, step = epoch + 1, 0


def collate(items: list) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, list[str]] | Unreadable:
    """Stack a batch, or hand on the first image that could not be read.

    Its third part are the paths of images that others stand in for, where there are any.
    """
    for item in items:
        if isinstance(item, Unreadable):
            return item
    skipped = [item[2] for item in items if len(item) > 2]
    batch = torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])
    return (*batch, skipped) if skipped else batch


def collate_shared(collate_fn: Callable, items: list):
    """What collate_fn makes; in a worker with tensors in shared memory already, WorkerFailed where none is left.

    Else it is a thread of the worker that puts them there, whose error nobody would hear of.
    """
    try:
        batch = collate_fn(items)
        if get_worker_info() is not None:
            share(batch)
    except (RuntimeError, OSError, MemoryError) as error:
        return WorkerFailed(f"could not make a batch ({first_line(error)})")
    return batch


def share(batch) -> None:
    if isinstance(batch, Tensor):
        batch.share_memory_()
    elif isinstance(batch, tuple | list):
        for part in batch:
            share(part)


class Batches:
    """Iterator over what a DataLoader gives, or NoBatch; it ends early where stop was asked to."""

    def __init__(self, loader: DataLoader, stop: StopOnSignal | None):
        self.stop = stop
        # torch raises in the middle of anything when a worker dies; asked for a batch, it notices as well.
        handler = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL
        try:
            if loader.num_workers:
                multiprocessing.Event()  # which torch needs as well, and without it leaves a traceback
            self.iterator = iter(loader)
        except OSError as error:
            raise UserError(f"data workers cannot be started ({error}); pass --num-workers 0") from error
        finally:
            signal.signal(signal.SIGCHLD, handler)
        self.workers = getattr(self.iterator, "_workers", [])

    def __iter__(self) -> "Batches":
        return self

    def __next__(self):
        try:
            return next(self.iterator) if self.stop is None else self.stop.next_of(self.iterator)
        except (RuntimeError, OSError, EOFError, MemoryError) as error:
            ends = multiprocessing.connection.wait([worker.sentinel for worker in self.workers], timeout=1)
            dead = [worker.exitcode for worker in self.workers if worker.sentinel in ends]
            last = (str(error).splitlines() or [type(error).__name__])[-1]  # what a worker says ends its traceback
            return WorkerFailed(describe_end(dead[0]) if dead else f"could not make a batch ({last})")

    def close(self) -> None:
        """End the workers, which ignore SIGTERM, also those that wait for a disk."""
        if self.workers:
            timer = threading.Timer(1, lambda: [worker.kill() for worker in self.workers])
            timer.start()
            self.iterator._shutdown_workers()
            timer.cancel()


def describe_end(exit_code: int) -> str:
    """What the status of a process that died says."""
    if exit_code >= 0:
        return f"ended with status {exit_code}"
    causes = {
        signal.SIGKILL: ", as the system does when memory runs out",
        signal.SIGBUS: ": /dev/shm is full, or a file became shorter",
    }
    number = signal.Signals(-exit_code)
    return f"was ended by {number.name}{causes.get(number, '')}"


@contextmanager
def open_loader(
    data: Dataset,
    batches: Iterable,
    num_workers: int,
    device: torch.device,
    collate_fn: Callable = collate,
    stop: StopOnSignal | None = None,
) -> Iterator[Batches]:
    """Batches (lists of what data is indexed by), with workers that stay ahead of the device."""
    loader = DataLoader(
        data,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=functools.partial(collate_shared, collate_fn),
        pin_memory=device.type == "cuda",
        worker_init_fn=begin_worker,
        prefetch_factor=4 if num_workers else None,
    )
    iterator = Batches(loader, stop)
    try:
        yield iterator
    finally:
        iterator.close()
