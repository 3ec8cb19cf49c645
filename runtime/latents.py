"""The latent cache: posterior moments of every image of a data set, written once and read at random."""

import copy
import os
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from runtime import files, options
from runtime.config import VAEConfig
from runtime.data import ImageList, is_flipped
from runtime.options import UserError

CHUNK = 256  # images between two marks of progress


class LatentData(Dataset):
    """Posterior moments from a latent cache: item (epoch, index) is (moments (2C, h, w) float16, label)."""

    def __init__(self, cache: "LatentCache", flip: bool, seed: int):
        self.cache, self.flip, self.seed = cache, flip, seed

    def __getitem__(self, item: tuple[int, int]):
        epoch, index = item
        flipped = self.flip and is_flipped(self.seed, epoch, index)
        moments = self.cache.moments[self.cache.rows[index], int(flipped)]
        return torch.from_numpy(moments.copy()), int(self.cache.labels[index])

    def __len__(self) -> int:
        return len(self.cache)


class LatentCache:
    """A finished latent cache: moments.npy (N, flips, 2C, h, w) float16 memory-mapped, labels, paths, meta.json.

    Raises UserError for a folder that is not a finished cache.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        try:
            self.meta = files.read_json(self.root / "meta.json") if (self.root / "meta.json").exists() else None
            if self.meta is None:
                raise FileNotFoundError(None, None, "meta.json")
            self.classes: list[str] = self.meta["classes"]
            self.fingerprint: str = self.meta["fingerprint"]
            self.vae = VAEConfig(**self.meta["vae"])
            self.image_size = tuple(self.meta["image_size"])
            labels = np.load(self.root / "labels.npy")
            shapes = [*self.moments.shape], [*labels.shape]
            if shapes != (self.meta["shape"], self.meta["shape"][:1]):
                raise ValueError(f"it holds {shapes[0]} moments and {shapes[1]} labels for {self.meta['shape']}")
        except FileNotFoundError as error:
            raise UserError(
                f"--latents-dir {str(root)!r} is not a finished latent cache ({Path(error.filename).name} is missing); "
                "run cache_latents.py with this folder first"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--latents-dir {str(root)!r} is damaged ({error}); remove it and make it again") from error
        self.rows, self.rows_left_out = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)  # -1: unreadable
        self.labels = labels[self.rows]

    @cached_property
    def moments(self) -> np.ndarray:
        return np.load(self.root / "moments.npy", mmap_mode="r")

    @property
    def paths(self) -> np.ndarray:
        """Relative paths (N,) bytes of the images in the cache. Raises UserError where an old cache has none."""
        return self._paths_of(self.rows)

    @property
    def paths_left_out(self) -> np.ndarray:
        """Relative paths of the images that could not be read. Raises UserError where an old cache has none."""
        return self._paths_of(self.rows_left_out)

    def _paths_of(self, rows: np.ndarray) -> np.ndarray:
        try:
            return np.load(self.root / "paths.npy")[rows]
        except FileNotFoundError as error:
            raise UserError(
                f"--latents-dir {str(self.root)!r} does not tell the images' paths (paths.npy is missing), by which "
                "--val-fraction splits; run cache_latents.py with this folder again, which adds them"
            ) from error
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise UserError(
                f"--latents-dir {str(self.root)!r} is damaged (paths.npy: {error}); remove paths.npy and run "
                "cache_latents.py with this folder again"
            ) from error

    def images(self) -> ImageList:
        """The images that it was made of. Raises UserError where they are gone or others."""
        images = ImageList(self.meta["data_path"], "their folder")
        if images.fingerprint != self.fingerprint:
            raise UserError(f"their folder {str(images.root)!r} holds other files by now")
        return images

    def subset(self, chosen: np.ndarray) -> "LatentCache":
        """The images whose entry of chosen (N,) is true, with all classes; fingerprint stays the whole cache's."""
        part = copy.copy(self)
        part.rows, part.labels = self.rows[chosen], self.labels[chosen]
        return part

    def __getstate__(self):
        """A worker that is spawned maps the file itself in place of being sent its contents."""
        return {key: value for key, value in self.__dict__.items() if key != "moments"}

    def __len__(self) -> int:
        return len(self.labels)


class CacheWriter:
    """A cache being filled by any number of processes: every chunk of rows is written, synced, then marked as done.

    settings say what the cache is; shape is that of moments.npy. Written through file offsets and not through a memory
    map, whose whole pages processes on other nodes would overwrite for each other.
    """

    def __init__(self, root: Path, settings: dict):
        self.root, self.settings, self.shape = root, settings, tuple(settings["shape"])
        self.row_bytes = 2 * int(np.prod(self.shape[1:]))
        self.chunks = -(-self.shape[0] // CHUNK)
        self.begun, self.finished = root / "begun.json", root / "meta.json"

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def check(self) -> bool:
        """Whether the cache is finished. Raises UserError where the folder holds one of other settings."""
        for record in (self.finished, self.begun):
            if record.exists():
                check_same(files.read_json(record), self.settings, self.root)
                return record == self.finished
        files.check_folder(self.root, "--latents-dir", self.bytes)
        return False

    def create(self) -> None:
        """Allocate the files, unless an earlier command did. Raises UserError."""
        if self.begun.exists():
            return
        with files.cannot_write(f"--latents-dir {str(self.root)!r}"):
            self.root.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(self.root / "moments.npy", "w+", np.float16, self.shape)
            np.lib.format.open_memmap(self.root / "labels.npy", "w+", np.int64, self.shape[:1])
            (self.root / "done").write_bytes(bytes(self.chunks))
            files.write_json(self.begun, self.settings)

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

    def write_paths(self, images: ImageList) -> None:
        """The relative path of every row, by which training can hold images out; caches of early versions lack them."""
        if not (self.root / "paths.npy").exists():
            with files.whole_file(self.root / "paths.npy") as file:
                np.save(file, images.paths)

    def finish(self, images: ImageList) -> None:
        """List what was left out, and write meta.json, which makes the cache a finished one."""
        skipped = np.flatnonzero(np.load(self.root / "labels.npy") < 0)
        if len(skipped):
            files.write_text(self.root / "skipped.txt", "".join(f"{images.path(row)}\n" for row in skipped))
        self.write_paths(images)
        files.write_json(self.finished, self.settings)
        (self.root / "done").unlink()
        self.begun.unlink()


def write_at(descriptor: int, contents: bytes, offset: int) -> None:
    """Write all of contents: a disk that is nearly full takes a part and says so only the next time."""
    written = 0
    while written < len(contents):
        written += os.pwrite(descriptor, contents[written:], offset + written)


def check_same(stored: dict, settings: dict, root: Path) -> None:
    """Raise UserError, naming what differs, unless a cache was begun with the same settings.

    The autoencoder's weights and geometry decide, not where it was loaded from.
    """
    ignored = ["data_path"]
    try:
        same_vae = VAEConfig(**stored.get("vae", {})).is_same(VAEConfig(**settings["vae"]))
    except TypeError:  # not a record of cache_latents.py: listed as different
        same_vae = False
    if same_vae:
        ignored.append("vae")
    listed = options.differences(stored, settings, tuple(ignored), show=short)
    if listed:
        raise UserError(
            f"--latents-dir {str(root)!r} was made with other settings: {listed}; remove it or use another folder"
        )


def short(value) -> str:
    """A setting in about 60 characters; an autoencoder by its source, the beginning of its hash, and its scaling."""
    if isinstance(value, dict) and "sha256" in value:
        scaling = f"scaling factor {value.get('scaling_factor')}, shift {value.get('shift_factor')}"
        return f"{value.get('source')!r} (sha256 {str(value['sha256'])[:8]}, {scaling})"
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
