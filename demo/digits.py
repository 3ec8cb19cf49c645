"""Write scikit-learn's handwritten digits as a class-folder data set: what the demo trains on.

Run from the repository root: python -m demo.digits FOLDER
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import files, options
from runtime.options import UserError

IMAGES = 1797


def enlarged_digits(size: int) -> tuple[list[Image.Image], np.ndarray]:
    """scikit-learn's 1,797 handwritten digits (8 x 8, values 0 to 16) as size x size RGB images, and their labels.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test part).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = [Image.fromarray(values) for values in (digits.images * (255 / 16)).round().astype(np.uint8)]
    images = [image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB") for image in grey]
    return images, digits.target.astype(np.int64)


@contextmanager
def whole_folder(root: Path) -> Iterator[Path]:
    """A folder to fill, which becomes root when the context ends without an error and is removed otherwise.

    Where another process was faster, its folder stays. Raises OSError.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp lets nobody else read
        try:
            partial.rename(root)
        except OSError:
            if not root.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_digits(root: Path, size: int = 64) -> bool:
    """Write the digits as PNGs root/<digit>/<index>.png, all or none. Returns False where they are there already.

    Raises UserError for a folder that holds something else, and OSError.
    """
    if root.exists():
        check_digits(root, size)
        return False
    with whole_folder(root) as partial:
        images, labels = enlarged_digits(size)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = partial / str(label)
            folder.mkdir(exist_ok=True)
            image.save(folder / f"{index:04d}.png")
    return True


def check_digits(root: Path, size: int) -> None:
    """Raise UserError unless root has a class folder for each digit, and images of this size in the first of them."""
    expected = f"expected the digits as {size} x {size} pixels; remove it, or choose another folder"
    if not root.is_dir() or not all((root / str(digit)).is_dir() for digit in range(10)):
        raise UserError(f"{str(root)!r} is there and holds something else; {expected}")
    first = next((root / "0").glob("*.png"), None)
    if first is not None and (found := Image.open(first).size) != (size, size):
        raise UserError(f"{str(root)!r} holds images of {found[0]} x {found[1]} pixels; {expected}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write it")
    parser.add_argument("--size", type=options.count, default=64, help="height and width in pixels")
    return parser.parse_args(argv)


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with files.cannot_write(repr(str(args.folder)), "choose another folder"):
        written = write_digits(args.folder, args.size)
    print(f"{'' if written else 'nothing to do: '}demo data: {IMAGES} handwritten digits in {args.folder}")


if __name__ == "__main__":
    main()
