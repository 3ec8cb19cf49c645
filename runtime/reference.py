"""What samples are compared with: statistics and images of an ADM reference file, an .npz of images, or a folder."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from runtime.image_sets import FolderImages, NpzImages
from runtime.inception import WIDTHS
from runtime.options import UserError, format_size

STATISTICS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # names in the reference files of ADM
EXPECTED = (
    "expected a reference file of ADM, an .npz of images arr_0 uint8 (N, H, W, 3), or a folder of images with or "
    "without class folders"
)


class Reference:
    """The reference at path, for samples of size (height, width).

    statistics has, for each feature whose mean and covariance are stored, {"mu": (D,), "sigma": (D, D)} in float64.
    images is a set of runtime.image_sets, or None for a file of statistics alone. Raises UserError.
    """

    def __init__(self, path: Path, size: tuple[int, int], num_workers: int = 0):
        self.path, self.statistics, self.images = path, {}, None
        if path.is_dir():
            self.images = FolderImages(path, size, num_workers)
            return
        if not path.exists():
            raise UserError(f"--reference {str(path)!r} does not exist; {EXPECTED}")
        try:
            with np.load(path) as archive:
                if isinstance(archive, np.ndarray):
                    raise ValueError("it is a single array")
                names = archive.files
                stored = {key: archive[key] for pair in STATISTICS.values() for key in pair if key in names}
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"--reference {str(path)!r} cannot be read ({error}); {EXPECTED}") from error
        for feature, (mu, sigma) in STATISTICS.items():
            if mu in stored and sigma in stored:
                self.statistics[feature] = self._checked(stored, mu, sigma, WIDTHS[feature])
        if "arr_0" in names:
            self.images = NpzImages(path, "--reference")
            self._check_size(size)
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

    def _check_size(self, size: tuple[int, int]) -> None:
        if self.images.size != size:
            raise UserError(
                f"--reference {str(self.path)!r} has images of {format_size(self.images.size)} pixels and --samples of "
                f"{format_size(size)}; use a reference of the same size, or a folder, whose images are resized"
            )

    def describe(self) -> dict:
        """What decides the numbers, as plain types; on rank 0, since the hash reads all images."""
        images = self.images
        return {
            "path": str(self.path),
            "kind": "folder" if isinstance(images, FolderImages) else "npz",
            "stored_statistics": [STATISTICS[feature][0] for feature in self.statistics],
            "images": len(images) if images is not None else 0,
            "images_sha256": images.sha256 if images is not None else None,
        }
