"""The latent cache: posterior moments of every image of a data set, written once, read at random, proven by checksums.

A checksum for each image and flip is written beside its moments: rows whose checksum fits are done, whatever happened
to the process that wrote them or to the disk. meta.json, written last, holds the settings and the checksums of all
other files.
"""

import copy
import json
import math
import os
import zlib
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from runtime import files, options
from runtime.config import VAEConfig
from runtime.data import ImageList, Unreadable, is_flipped
from runtime.options import UserError

CHUNK = 256  # images that a process takes at a time
MOMENTS, CHECKSUMS = "moments.npy", "checksums.npy"
RECORDED = ("labels.npy", "paths.npy", "stamps.npy", CHECKSUMS)  # files whose checksums meta.json holds
REPAIR = "run cache_latents.py with this folder again, which repairs it"


def checksum(contents: bytes | memoryview, seed: int = 0) -> int:
    """A CRC that is never 0, which stands for nothing written."""
    return zlib.crc32(contents, seed) or 1


def seed_of(settings: dict) -> int:
    """What begins the checksum of every row, so that rows of other settings do not prove themselves."""
    deciding = ("image_size", "preparation", "fingerprint", "shape", "classes")
    vae = asdict(VAEConfig(**settings["vae"])) | {"source": ""}
    return checksum(json.dumps([vae, *(settings[key] for key in deciding)], sort_keys=True).encode())


def is_sane(moments: np.ndarray) -> bool:
    """Whether moments (..., 2C, h, w) are finite and their deviations above 0, as nothing else than encoding gives."""
    return bool(np.isfinite(moments).all() and (moments[..., moments.shape[-3] // 2 :, :, :] > 0).all())


class LatentData(Dataset):
    """Posterior moments from a latent cache: item (epoch, index) is (moments (2C, h, w) float16, label).

    An Unreadable stands for moments that are not what was written.
    """

    def __init__(self, cache: "LatentCache", flip: bool, seed: int):
        self.cache, self.flip, self.seed = cache, flip, seed

    def __getitem__(self, item: tuple[int, int]):
        epoch, index = item
        flipped, row = int(self.flip and is_flipped(self.seed, epoch, index)), self.cache.rows[index]
        moments = self.cache.moments[row, flipped].copy()
        if not self.cache.proves(row, flipped, moments):
            reason = f"row {row} of {MOMENTS} is not what was written"
            return Unreadable(str(self.cache.root), reason, "latent cache", "repair it with cache_latents.py --verify")
        return torch.from_numpy(moments), int(self.cache.labels[index])

    def __len__(self) -> int:
        return len(self.cache)


class LatentCache:
    """A finished latent cache: moments.npy (N, flips, 2C, h, w) float16 memory-mapped, and what RECORDED lists.

    Caches of early versions have no checksums, and the first ones no paths. Raises UserError for a folder that is not
    a finished cache, and for a damaged one; of the moments nothing is read before they are asked for.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        for name in ("meta.json", MOMENTS, "labels.npy"):
            if not (self.root / name).exists():
                raise UserError(
                    f"--latents-dir {str(root)!r} is not a finished latent cache ({name} is missing); "
                    "run cache_latents.py with this folder first"
                )
        with files.reading(f"--latents-dir {str(root)!r}", REPAIR):
            self.meta = read_settings(self.root / "meta.json")
            self.record: dict[str, int] = self.meta.get("record", {})
            self.classes: list[str] = [str(name) for name in self.meta["classes"]]
            self.fingerprint = str(self.meta["fingerprint"])
            self.vae = VAEConfig(**self.meta["vae"])
            self.image_size = tuple(self.meta["image_size"])
            self.seed = seed_of(self.meta)
            labels = self._recorded("labels.npy", self.meta["shape"][:1], "int64")
            if labels.min(initial=0) < -1 or labels.max(initial=0) >= len(self.classes):
                raise ValueError(f"labels.npy has others than those of {len(self.classes)} classes")
            self.moments, self.checksums = self._maps()
        self.rows, self.rows_left_out = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)  # -1: unreadable
        self.labels = np.array(labels[self.rows])

    def _recorded(self, name: str, shape: list[int], kind: str) -> np.ndarray:
        return read_recorded(self.root / name, tuple(shape), kind, self.record)

    def _maps(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Moments, and their checksums where there are any, mapped from their files."""
        shape = self.meta["shape"]
        checksums = self._recorded(CHECKSUMS, shape[:2], "uint32") if self.record else None
        return files.read_npy(self.root / MOMENTS, tuple(shape), "float16"), checksums

    def proves(self, row: int, flip: int, moments: np.ndarray) -> bool:
        """Whether moments (2C, h, w) are what was written; without checksums, whether they can be."""
        if self.checksums is None:
            return is_sane(moments)
        return checksum(moments.data, self.seed) == self.checksums[row, flip]

    @property
    def paths(self) -> np.ndarray:
        """Relative paths (N,) bytes of the images in the cache. Raises UserError where an old cache has none."""
        return self._paths_of(self.rows)

    @property
    def paths_left_out(self) -> np.ndarray:
        """Relative paths of the images that could not be read. Raises UserError where an old cache has none."""
        return self._paths_of(self.rows_left_out)

    def _paths_of(self, rows: np.ndarray) -> np.ndarray:
        if not (self.root / "paths.npy").exists():
            raise UserError(
                f"--latents-dir {str(self.root)!r} does not tell the images' paths (paths.npy is missing), by which "
                "--val-fraction splits; run cache_latents.py with this folder again, which adds them"
            )
        with files.reading(f"--latents-dir {str(self.root)!r}", REPAIR):
            return np.array(self._recorded("paths.npy", self.meta["shape"][:1], "S")[rows])

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
        """A worker that is spawned maps the files itself in place of being sent their contents."""
        return {key: value for key, value in self.__dict__.items() if key not in ("moments", "checksums")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.moments, self.checksums = self._maps()

    def __len__(self) -> int:
        return len(self.labels)


class CacheWriter:
    """A cache being filled by any number of processes, or repaired: rows prove themselves or are encoded.

    settings say what the cache is; shape is that of moments.npy. Written through file offsets and not through a memory
    map, whose whole pages processes on other nodes would overwrite for each other.
    """

    def __init__(self, root: Path, settings: dict, images: ImageList):
        self.root, self.settings, self.images = root, settings, images
        self.shape = tuple(settings["shape"])
        self.row_bytes = 2 * math.prod(self.shape[1:])
        self.begun, self.finished = root / "begun.json", root / "meta.json"
        self.done = root / "done"  # in which early versions marked chunks

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @cached_property
    def seed(self) -> int:
        return seed_of(self.settings)

    @property
    def left_out(self) -> int:
        """Stands for the checksums of an image that cannot be read."""
        return checksum(b"left out", self.seed)

    @property
    def early(self) -> int:
        """Stands for the checksums of an image that an early version encoded, until it is its turn."""
        return checksum(b"early", self.seed)

    def check(self, changed: str | None = None) -> bool:
        """Whether the cache is finished, and all of it but the moments is whole.

        changed is what to do about images whose size or time is another by now. Raises UserError where the folder
        holds a cache of other settings, or one of other images while changed is None.
        """
        stored = [path for path in (self.finished, self.begun) if path.exists()]
        if stored:
            check_same(read_settings(stored[0]), self.settings, self.root)
        else:
            files.check_folder(self.root, "--latents-dir", self.bytes)
        if changed is None:
            self._check_stamps()
        return self.finished in stored and changed is None and self._is_whole()

    def _is_whole(self) -> bool:
        """Whether a finished cache has its record, and every file but the moments is as that says."""
        try:
            cache = LatentCache(self.root)
            if not cache.record and not os.access(self.root, os.W_OK):
                return True  # of an early version, and nothing can be added
            return set(cache.record) == set(RECORDED) and len(cache.paths) == len(cache) and self._stamps() is not None
        except UserError:  # repaired
            return False

    def _stamps(self) -> np.ndarray | None:
        """Sizes and times of the images as the cache was made; None where it does not tell."""
        record = read_settings(self.finished).get("record", {}) if self.finished.exists() else {}
        try:
            return read_recorded(self.root / "stamps.npy", (self.shape[0], 2), "int64", record)
        except (OSError, ValueError):
            return None

    def _changed(self) -> np.ndarray:
        """Rows that are encoded and whose image has another size or time by now."""
        stored = self._stamps()
        if stored is None:
            return np.array([], dtype=np.int64)
        try:
            encoded = files.read_npy(self.root / CHECKSUMS, self.shape[:2], "uint32").all(axis=1)
        except (OSError, ValueError):  # all rows are encoded again
            encoded = np.zeros(self.shape[0], bool)
        return np.flatnonzero(encoded & (stored != self.images.stamps).any(axis=1))

    def _check_stamps(self) -> None:
        """Raise UserError, naming one, where images have another size or time than when they were encoded."""
        stored, differing = self._stamps(), self._changed()
        if len(differing):
            first = differing[0]
            what = "size" if stored[first, 0] != self.images.stamps[first, 0] else "time"
            raise UserError(
                f"--latents-dir {str(self.root)!r} was made of other images: {str(self.images.path(first))!r} has "
                f"another {what} by now, {len(differing)} in all; pass --changed encode to encode these again, or "
                "--changed keep where only their times are others, as in a copy of the data set"
            )

    def create(self, changed: str | None = None) -> bool:
        """Make the files ready to be written: what is there is kept, and made where it is missing or too short.

        Returns whether an early version wrote any of it, which gets its checksums from unproven. changed is as in
        check. Raises UserError.
        """
        with files.cannot_write(f"--latents-dir {str(self.root)!r}"):
            self.root.mkdir(parents=True, exist_ok=True)
            marked = self._marked_by_early_version()
            if not (self.finished.exists() or self.begun.exists()):
                files.write_json(self.begun, self.settings)
            allocate(self.root / MOMENTS, self.shape, "float16")
            allocate(self.root / CHECKSUMS, self.shape[:2], "uint32")
            if marked is not None:
                self._adopt(marked)
            self.done.unlink(missing_ok=True)
            for row in self._changed() if changed == "encode" else ():
                self._write_checksums(row, [0] * self.shape[1])
            if self.finished.exists():
                os.replace(self.finished, self.begun)
            self._write_array("stamps.npy", self.images.stamps)
            self._write_array("paths.npy", self.images.paths)
        return marked is not None

    def _marked_by_early_version(self) -> np.ndarray | None:
        """Mask (N,) of the rows that an early version, which wrote no checksums, marked as done; None without any."""
        if self.finished.exists():
            early = "record" not in read_settings(self.finished)
            return np.ones(self.shape[0], bool) if early else None
        if not self.done.exists():
            return None
        marks = np.frombuffer(self.done.read_bytes(), np.uint8) == 1
        return np.resize(np.repeat(marks, CHUNK), self.shape[0]) if len(marks) == len(self.chunks()) else None

    def _adopt(self, marked: np.ndarray) -> None:
        """Note in place of checksums what an early version encoded, for unproven to look at, and what it left out."""
        try:
            labels = files.read_npy(self.root / "labels.npy", self.shape[:1], "int64")
        except (OSError, ValueError):
            labels = self.images.labels
        checksums = np.array(self.checksums)
        empty = marked & (checksums == 0).any(axis=1)
        checksums[empty] = np.where(labels[empty, None] < 0, self.left_out, self.early)
        write_at(self.files[CHECKSUMS].fileno(), checksums.tobytes(), self.offsets[CHECKSUMS])
        self.sync()

    def _write_array(self, name: str, array: np.ndarray) -> None:
        with files.whole_file(self.root / name) as file:
            np.save(file, array)

    @cached_property
    def files(self) -> dict[str, BinaryIO]:
        """The files of a cache that was created, open to be written."""
        return {name: open(self.root / name, "r+b") for name in (MOMENTS, CHECKSUMS)}

    @cached_property
    def offsets(self) -> dict[str, int]:
        return {name: offset_of(file) for name, file in self.files.items()}

    @cached_property
    def moments(self) -> np.ndarray:
        return files.read_npy(self.root / MOMENTS, self.shape, "float16")

    @cached_property
    def checksums(self) -> np.ndarray:
        return files.read_npy(self.root / CHECKSUMS, self.shape[:2], "uint32")

    def chunks(self) -> list[range]:
        return [range(row, min(row + CHUNK, self.shape[0])) for row in range(0, self.shape[0], CHUNK)]

    def batches(self, rows: list[int], size: int) -> list[range]:
        """The batches of a chunk that hold some of its rows; whole, since what is encoded together is rounded together.

        What is encoded again has the bits of what was encoded at first.
        """
        chunk = self.chunks()[rows[0] // CHUNK]
        batches = [chunk[first : first + size] for first in range(0, len(chunk), size)]
        return [batch for batch in batches if not set(batch).isdisjoint(rows)]

    def unproven(self, rows: range) -> list[int]:
        """Those of the rows that have to be encoded; what can be an early version's moments gets its checksums."""
        written = np.array(self.checksums[rows.start : rows.stop])
        return [row for row, stored in zip(rows, written, strict=True) if not self._proves(row, stored.tolist())]

    def _proves(self, row: int, stored: list[int]) -> bool:
        if 0 in stored or stored == [self.left_out] * len(stored):
            return 0 not in stored
        moments, found = self.moments[row], self._checksums_of(self.moments[row])
        if stored == [self.early] * len(stored):
            stored = found if is_sane(moments) else [0] * len(stored)
            self._write_checksums(row, stored)
        return stored == found

    def _checksums_of(self, moments: np.ndarray) -> list[int]:
        return [checksum(np.ascontiguousarray(flip).data, self.seed) for flip in moments]

    def write(self, row: int, moments: np.ndarray | None) -> None:
        """One image: moments (flips, 2C, h, w) float16, or None for one left out."""
        checksums = [self.left_out] * self.shape[1]
        if moments is not None:
            begin = self.offsets[MOMENTS] + row * self.row_bytes
            write_at(self.files[MOMENTS].fileno(), moments.tobytes(), begin)
            checksums = self._checksums_of(moments)
        self._write_checksums(row, checksums)

    def _write_checksums(self, row: int, checksums: list[int]) -> None:
        contents = np.array(checksums, dtype=np.uint32).tobytes()
        write_at(self.files[CHECKSUMS].fileno(), contents, self.offsets[CHECKSUMS] + row * len(contents))

    def sync(self) -> None:
        """Wait until what this process wrote is on the disk."""
        for file in self.files.values():
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the labels, the list of what was left out, and meta.json, which makes the cache a finished one.

        Raises UserError unless every row is there.
        """
        checksums = files.read_npy(self.root / CHECKSUMS, self.shape[:2], "uint32")  # anew: other nodes wrote too
        if not checksums.all():
            raise UserError(f"--latents-dir {str(self.root)!r} lacks rows that a process wrote; repeat the command")
        left_out = checksums[:, 0] == self.left_out
        self._write_array("labels.npy", np.where(left_out, -1, self.images.labels))
        skipped = self.root / "skipped.txt"
        if left_out.any():
            files.write_text(skipped, "".join(f"{self.images.path(row)}\n" for row in np.flatnonzero(left_out)))
        else:
            skipped.unlink(missing_ok=True)
        record = {name: checksum(np.load(self.root / name, mmap_mode="r").data) for name in RECORDED}
        files.write_json(self.finished, files.sealed(self.settings | {"record": record}))
        self.begun.unlink(missing_ok=True)


def read_settings(path: Path) -> dict:
    """meta.json or begun.json. Raises UserError where it is damaged."""
    remedy = "remove it and run cache_latents.py with this folder again: what proves itself is kept"
    settings = files.read_json(path, remedy)
    if {"record", "sha256"} & settings.keys() and not files.is_sealed(settings):
        raise UserError(f"{str(path)!r} is damaged (its checksum differs); {remedy}")
    return settings


def read_recorded(path: Path, shape: tuple[int, ...], kind: str, record: dict[str, int]) -> np.ndarray:
    """The array in a file whose checksum is in the record; early versions recorded none. Raises OSError, ValueError."""
    array = files.read_npy(path, shape, kind)
    if path.name in record and checksum(array.data) != record[path.name]:
        raise ValueError(f"the checksum of {path.name} differs")
    return array


def allocate(path: Path, shape: tuple[int, ...], dtype: str) -> None:
    """Make an .npy of zeros without taking the space, or give a damaged one its header and its length."""
    with suppress(OSError, ValueError):
        files.read_npy(path, shape, dtype)
        return
    with open(path, "r+b" if path.exists() else "w+b") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + math.prod(shape) * np.dtype(dtype).itemsize)


def offset_of(file: BinaryIO) -> int:
    """Where the data of an open .npy begin."""
    file.seek(0)
    files.npy_header(file)
    return file.tell()


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
