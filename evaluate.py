"""Evaluate samples: how many of the demo's digits are recognised as their label."""

import argparse
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import data, monitor, options
from runtime.options import UserError


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--samples", type=Path, required=True, help=".npz of sample_ddp.py")
    add("--digits", action="store_true", required=True, help="label accuracy of the demo's digits")
    return parser.parse_args(argv)


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, 3) uint8 and labels (N,) int64 of a sample file. Raises UserError."""
    expected = "expected an .npz of sample_ddp.py, with images arr_0 uint8 (N, H, W, 3) and labels arr_1 (N,)"
    try:
        archive = np.load(path)
        if isinstance(archive, np.ndarray):
            raise ValueError("it is a single array")
        with archive:
            images, labels = archive["arr_0"], archive["arr_1"]
    except FileNotFoundError as error:
        raise UserError(f"--samples {str(path)!r} does not exist; {expected}") from error
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"--samples {str(path)!r} cannot be read ({error}); {expected}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3:] != (3,) or labels.shape != images.shape[:1]:
        found = f"arr_0 {images.dtype} {images.shape}, arr_1 {labels.shape}"
        raise UserError(f"--samples {str(path)!r} holds {found}; {expected}")
    if len(images) == 0:
        raise UserError(f"--samples {str(path)!r} holds no images; {expected}")
    return images, labels


def reduce_to_8x8(images: list[Image.Image]) -> np.ndarray:
    """Grey values (N, 64) of images, averaged over the cells of an 8 x 8 grid."""
    return np.stack([np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).ravel() for image in images])


def label_accuracy(images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that a 3-nearest-neighbour classifier, trained on all real digits, recognises as their label."""
    from sklearn.neighbors import KNeighborsClassifier

    real, real_labels = data.enlarged_digits(images.shape[1])
    classifier = KNeighborsClassifier(n_neighbors=3).fit(reduce_to_8x8(real).astype(float), real_labels)
    predicted = classifier.predict(reduce_to_8x8([Image.fromarray(image) for image in images]).astype(float))
    return float((predicted == labels).mean())


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    images, labels = read_samples(args.samples)
    accuracy = label_accuracy(images, labels)
    path = args.samples.with_suffix(".metrics.json")
    settings = args.samples.with_suffix(".json")
    sampling = monitor.read_json(settings) if settings.exists() else None
    try:
        monitor.write_json(path, {"label_accuracy": accuracy, "samples": len(labels), "sampling": sampling})
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written ({error.strerror}); free space, or move --samples") from error
    print(f"label accuracy: {accuracy:.1%} of {len(labels)} samples recognised as their label\nmetrics: {path}")


if __name__ == "__main__":
    main()
