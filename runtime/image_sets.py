"""Images to be measured, read a batch at a time: samples in an .npz, and the references that they are compared with."""

import hashlib
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from runtime import data, files
from runtime.distributed import rank, world_size
from runtime.inception import WIDTHS
from runtime.options import UserError, format_size

LARGEST_ARRAY = 2**28  # bytes, beside the images
STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # names in the reference files of ADM
IMAGES = "images arr_0 uint8 (N, H, W, 3)"
EXPECTED = f"expected a reference file of ADM, an .npz of {IMAGES}, or a folder of images with or without class folders"


def checksum(path: Path) -> str:
    """What changes with the contents of an .npz or a folder of images, although it reads none of them."""
    try:
        if path.is_dir():  # names, sizes and times; where it is, since those of two folders can be alike
            found = [(name, os.stat(path / os.fsdecode(name))) for name in data.images_below(path, ".")]
            held = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
            held += [str(path.resolve()), data.PREPARATION]
        else:  # the archive's own list, which has a checksum of each array
            with open_archive(path, "file", EXPECTED) as archive:
                held = [(member.filename, member.file_size, member.CRC) for member in archive.infolist()]
    except OSError as error:
        raise UserError(str(data.Unreadable(error.filename or str(path), error.strerror))) from error
    return hashlib.sha256(repr(held).encode()).hexdigest()


@contextmanager
def open_archive(path: Path, option: str, expected: str) -> Iterator[zipfile.ZipFile]:
    """The .npz that option named. Raises UserError where it is missing, or cannot be read within the context."""
    if not path.exists():
        raise UserError(f"{option} {str(path)!r} does not exist; {expected}")
    with files.reading(f"{option} {str(path)!r}", expected), files.open_zip(path, compressed=True) as archive:
        yield archive


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """A small array, such as labels. Raises ValueError for one that is not all there, or large."""
    held = archive.getinfo(f"{name}.npy").file_size
    with archive.open(f"{name}.npy") as file:
        shape, _, dtype = files.npy_header(file)
        claimed = file.tell() + math.prod(shape) * dtype.itemsize
        if claimed != held or held > LARGEST_ARRAY:
            raise ValueError(f"{name} {dtype} {shape} has {held} bytes; expected {min(claimed, LARGEST_ARRAY)}")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)


class NpzImages:
    """The images arr_0 (N, H, W, 3) uint8 of an .npz, the convention of sample_ddp.py and of ADM.

    option is the command-line option that named the file; labelled asks for labels arr_1 (N,) as well. The array is
    streamed from the archive, compressed or not, and never in memory as a whole. Raises UserError.
    """

    def __init__(self, path: Path, option: str, labelled: bool = False):
        self.path, self.labels = path, None
        expected = f"expected an .npz with {IMAGES}"
        if labelled:
            expected = f"expected an .npz of sample_ddp.py, with {IMAGES} and labels arr_1 (N,)"
        self.open = partial(open_archive, path, option, expected)
        with self.open() as archive:
            with archive.open("arr_0.npy") as file:
                shape, fortran_order, dtype = files.npy_header(file)
                held = archive.getinfo("arr_0.npy").file_size - file.tell()
            if labelled:
                self.labels = read_array(archive, "arr_1")
        found = f"arr_0 {dtype} {shape}{' in column-major order' if fortran_order else ''}"
        found += f", arr_1 {self.labels.shape}" if labelled else ""
        well_formed = dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and not fortran_order
        wrong = None
        if not well_formed or (labelled and self.labels.shape != shape[:1]):
            wrong = found
        elif 0 in shape:
            wrong = "no images"
        elif held != math.prod(shape):
            wrong = f"{held} bytes for {found}"
        if wrong:
            raise UserError(f"{option} {str(path)!r} holds {wrong}; {expected}")
        self.length, self.size = shape[0], shape[1:3]

    def __len__(self) -> int:
        return self.length

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """All images in order, (n, H, W, 3) uint8 at a time; after the last the archive's checksum was compared."""
        with self.open() as archive, archive.open("arr_0.npy") as file:
            files.npy_header(file)
            while chunk := file.read(batch_size * self.size[0] * self.size[1] * 3):
                yield np.frombuffer(bytearray(chunk), np.uint8).reshape(-1, *self.size, 3)

    def share(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches: rows (n,), images (n, 3, H, W) uint8. Every process reads the whole file."""
        for index, pixels in enumerate(self.batches(batch_size)):
            if index % world_size() == rank():
                rows = torch.arange(index * batch_size, index * batch_size + len(pixels))
                yield rows, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


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

    def __getitem__(self, row: int):
        pixels = data.read_prepared(self.root / os.fsdecode(self.paths[row]), self.size)
        return pixels if isinstance(pixels, data.Unreadable) else (data.to_tensor(pixels), row)

    def share(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches: rows (n,), images (n, 3, H, W) uint8."""
        mine = range(rank(), len(self), world_size())
        batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
        with data.open_loader(self, batches, self.num_workers, torch.device("cpu")) as loader:
            for batch in loader:
                if isinstance(batch, data.NoBatch):
                    raise UserError(str(batch))
                images, rows = batch
                yield rows, images


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
        with open_archive(path, "--reference", EXPECTED) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            for feature, (mu, sigma) in STATISTICS.items():
                if mu in names and sigma in names:
                    width = WIDTHS[feature]
                    self.statistics[feature] = {
                        "mu": self._read(archive, mu, (width,)),
                        "sigma": self._read(archive, sigma, (width, width)),
                    }
        if "arr_0" in names:
            self.images = NpzImages(path, "--reference")
            if size not in (None, self.images.size):
                raise UserError(
                    f"--reference {str(path)!r} has images of {format_size(self.images.size)} pixels and --samples of "
                    f"{format_size(size)}; use a reference of the same size, or a folder, whose images are resized"
                )
        elif not self.statistics:
            raise UserError(f"--reference {str(path)!r} has neither images nor statistics; {EXPECTED}")

    def _read(self, archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = read_array(archive, name)
        if values.shape != shape or values.dtype.kind != "f":
            raise UserError(
                f"--reference {str(self.path)!r} holds {name} {values.dtype} {values.shape}; expected floats "
                f"{shape}, as in the reference files of ADM"
            )
        if not np.isfinite(values).all():
            raise UserError(f"--reference {str(self.path)!r} has values in {name} that are not finite numbers")
        return values.astype(np.float64)

    def describe(self) -> dict:
        """What it is, as plain types."""
        return {
            "path": str(self.path),
            "kind": "folder" if isinstance(self.images, FolderImages) else "npz",
            "stored_statistics": [STATISTICS[feature][0] for feature in self.statistics],
            "images": 0 if self.images is None else len(self.images),
        }
