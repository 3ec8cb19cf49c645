"""Images to be measured, read a batch at a time: samples in an .npz, and the references that they are compared with."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from runtime import data
from runtime.distributed import rank, world_size
from runtime.inception import WIDTHS
from runtime.options import UserError, format_size

HASHED_AT_ONCE = 1 << 24  # bytes
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # names in the reference files of ADM
EXPECTED = (
    "expected a reference file of ADM, an .npz of images arr_0 uint8 (N, H, W, 3), or a folder of images with or "
    "without class folders"
)


def checksum(path: Path) -> str:
    """What changes with the contents of an .npz or a folder of images, although it reads none of them."""
    try:
        if path.is_dir():  # names, sizes and times
            found = [(name, os.stat(path / os.fsdecode(name))) for name in data.images_below(path, ".")]
            held = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
        else:  # the archive's own list, which has a checksum of each array
            with zipfile.ZipFile(path) as archive:
                held = [(member.filename, member.file_size, member.CRC) for member in archive.infolist()]
    except OSError as error:
        raise UserError(str(data.Unreadable(error.filename or str(path), error.strerror))) from error
    return hashlib.sha256(repr(held).encode()).hexdigest()


class NpzImages:
    """The images arr_0 (N, H, W, 3) uint8 of an .npz, the convention of sample_ddp.py and of ADM.

    option is the command-line option that named the file; labelled asks for labels arr_1 (N,) as well. The array is
    streamed from the archive, compressed or not, and never in memory as a whole. Raises UserError.
    """

    def __init__(self, path: Path, option: str, labelled: bool = False):
        self.path, self.option = path, option
        self.expected = "expected an .npz with images arr_0 uint8 (N, H, W, 3)"
        if labelled:
            self.expected = f"{self.expected.replace('npz', 'npz of sample_ddp.py,')} and labels arr_1 (N,)"
        if not path.exists():
            raise UserError(f"{option} {str(path)!r} does not exist; {self.expected}")
        with self._readable(), zipfile.ZipFile(path) as archive:
            with archive.open("arr_0.npy") as file:
                shape, fortran_order, dtype = _read_header(file)
                held = archive.getinfo("arr_0.npy").file_size - file.tell()
            self.labels = None
            if labelled:
                with archive.open("arr_1.npy") as file:
                    self.labels = np.lib.format.read_array(file, allow_pickle=False)
        found = f"arr_0 {dtype} {shape}" + (f", arr_1 {self.labels.shape}" if labelled else "")
        well_formed = dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and not fortran_order
        if not well_formed or (labelled and self.labels.shape != shape[:1]):
            found += " in column-major order" if fortran_order else ""
            raise UserError(f"{option} {str(path)!r} holds {found}; {self.expected}")
        if 0 in shape:
            raise UserError(f"{option} {str(path)!r} holds no images; {self.expected}")
        if held != np.prod(shape, dtype=object):
            raise UserError(f"{option} {str(path)!r} holds {held} bytes for {found}; {self.expected}")
        self.length, self.size = shape[0], shape[1:3]

    def __len__(self) -> int:
        return self.length

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.option} {str(self.path)!r} cannot be read ({error}); {self.expected}") from error

    def _chunks(self, rows: int) -> Iterator[bytes]:
        """The pixels of so many images at a time; at its end the archive's checksum has been compared."""
        with self._readable(), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            _read_header(file)
            while chunk := file.read(rows * self.size[0] * self.size[1] * 3):
                yield chunk

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """All images in order, (n, H, W, 3) uint8 at a time."""
        for chunk in self._chunks(batch_size):
            yield np.frombuffer(bytearray(chunk), np.uint8).reshape(-1, *self.size, 3)

    def share(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches: rows (n,), images (n, 3, H, W) uint8. Every process reads the whole file."""
        for index, pixels in enumerate(self.batches(batch_size)):
            if index % world_size() == rank():
                first = index * batch_size
                yield (
                    torch.arange(first, first + len(pixels)),
                    torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
                )

    @cached_property
    def sha256(self) -> str:
        """Hash of the pixels and their shape, whatever else is in the file."""
        digest = hashlib.sha256(repr((self.length, *self.size)).encode())
        for chunk in self._chunks(max(1, HASHED_AT_ONCE // (self.size[0] * self.size[1] * 3))):
            digest.update(chunk)
        return digest.hexdigest()


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, column-major order and dtype of the .npy that follows."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


class FolderImages(Dataset):
    """All images in a folder and below it, prepared as for training at size (height, width). Raises UserError.

    Without a size they can be counted, but not read.
    """

    def __init__(self, root: Path, size: tuple[int, int] | None, num_workers: int = 0):
        self.root, self.size, self.num_workers = root, size, num_workers
        found = map(os.path.normpath, data.images_below(root, "."))
        self.paths = np.array([path for path in found if b"/." not in b"/" + path])  # hidden folders are no classes
        if not len(self.paths):
            raise UserError(
                f"--reference {str(root)!r} has no images; expected files ending in {', '.join(IMG_EXTENSIONS)}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> Path:
        return self.root / os.fsdecode(self.paths[row])

    def __getitem__(self, row: int):
        pixels = data.read_prepared(self.path(row), self.size)
        return pixels if isinstance(pixels, data.Unreadable) else (data.to_tensor(pixels), row)

    def share(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches: rows (n,), images (n, 3, H, W) uint8."""
        mine = range(rank(), len(self), world_size())
        batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
        with data.open_loader(self, batches, self.num_workers, torch.device("cpu")) as loader:
            for batch in loader:
                if isinstance(batch, data.Unreadable):
                    raise UserError(str(batch))
                images, rows = batch
                yield rows, images

    @cached_property
    def sha256(self) -> str:
        """Hash of the files' contents in the order of their names, and of what becomes of them."""
        digest = hashlib.sha256(f"{data.PREPARATION} {self.size}".encode())
        with ThreadPoolExecutor(16) as pool:
            for first in range(0, len(self), 1024):
                for file_digest in pool.map(self._hash_file, range(first, min(first + 1024, len(self)))):
                    digest.update(file_digest)
        return digest.hexdigest()

    def _hash_file(self, row: int) -> bytes:
        try:
            with open(self.path(row), "rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise UserError(str(data.Unreadable(str(self.path(row)), str(error)))) from error


class Reference:
    """The reference at path, for samples of size (height, width), None where it is not known yet.

    statistics has, for each feature whose mean and covariance are stored, {"mu": (D,), "sigma": (D, D)} in float64.
    images is a set of runtime.image_sets, or None for a file of statistics alone. Raises UserError.
    """

    def __init__(self, path: Path, size: tuple[int, int] | None, num_workers: int = 0):
        self.path, self.statistics, self.images = path, {}, None
        if path.is_dir():
            self.images = FolderImages(path, size, num_workers)
            return
        if not path.exists():
            raise UserError(f"--reference {str(path)!r} does not exist; {EXPECTED}")
        try:
            archive = np.load(path)
            if isinstance(archive, np.ndarray):
                raise ValueError("it is a single array")
            with archive:
                names = archive.files
                stored = {key: archive[key] for pair in STATISTICS.values() for key in pair if key in names}
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"--reference {str(path)!r} cannot be read ({error}); {EXPECTED}") from error
        for feature, (mu, sigma) in STATISTICS.items():
            if mu in stored and sigma in stored:
                self.statistics[feature] = self._checked(stored, mu, sigma, WIDTHS[feature])
        if "arr_0" in names:
            self.images = NpzImages(path, "--reference")
            if size not in (None, self.images.size):
                raise UserError(
                    f"--reference {str(path)!r} has images of {format_size(self.images.size)} pixels and --samples of "
                    f"{format_size(size)}; use a reference of the same size, or a folder, whose images are resized"
                )
        elif not self.statistics:
            raise UserError(f"--reference {str(path)!r} has neither images nor statistics; {EXPECTED}")

    def _checked(self, stored: dict, mu: str, sigma: str, width: int) -> dict[str, np.ndarray]:
        for name, shape in ((mu, (width,)), (sigma, (width, width))):
            values = stored[name]
            if values.shape != shape or values.dtype.kind != "f":
                raise UserError(
                    f"--reference {str(self.path)!r} holds {name} {values.dtype} {values.shape}; expected floats "
                    f"{shape}, as in the reference files of ADM"
                )
            if not np.isfinite(values).all():
                raise UserError(f"--reference {str(self.path)!r} has values in {name} that are not finite numbers")
        return {"mu": stored[mu].astype(np.float64), "sigma": stored[sigma].astype(np.float64)}

    def describe(self) -> dict:
        """What decides the numbers, as plain types; on rank 0, since the hash reads all images."""
        images = self.images
        return {
            "path": str(self.path),
            "kind": "folder" if isinstance(images, FolderImages) else "npz",
            "stored_statistics": [STATISTICS[feature][0] for feature in self.statistics],
            "images": len(images) if images is not None else 0,
            "images_sha256": images.sha256 if images is not None else None,
            "checksum": checksum(self.path),
        }
