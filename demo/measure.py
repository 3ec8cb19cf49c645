"""Measure samples of the demo: how many are recognised as their label, and how far they are from the real digits.

Run from the repository root: python -m demo.measure --samples SAMPLES.npz
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from demo.digits import IMAGES, enlarged_digits
from runtime import files, monitor, options
from runtime.image_sets import NpzImages

NEIGHBOURS = 3  # of the classifier


def reduce_to_8x8(images: list[Image.Image]) -> np.ndarray:
    """Grey values (N, 64) of images, averaged over the cells of an 8 x 8 grid."""
    return np.stack([np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).ravel() for image in images])


def label_accuracy(samples: np.ndarray, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> float:
    """Share of samples (N, 64) that a nearest-neighbour classifier of the real digits recognises as their label."""
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(NEIGHBOURS).fit(real.astype(float), real_labels)
    return float((classifier.predict(samples.astype(float)) == labels).mean())


def pixel_distance(samples: np.ndarray, real: np.ndarray) -> float | None:
    """Fréchet distance of grey values (N, 64), scaled to 0 to 1; None for a single sample, which has no covariance."""
    if len(samples) == 1:
        return None
    made, wanted = (fid_features_to_statistics(torch.from_numpy(values / 255).double()) for values in (samples, real))
    return fid_statistics_to_metric(made, wanted, verbose=False)[KEY_METRIC_FID]


def measure(samples: NpzImages) -> dict:
    """Label accuracy and pixel Fréchet distance of samples against all real digits."""
    batches = samples.batches(256)
    pixels = np.concatenate([reduce_to_8x8([Image.fromarray(image) for image in batch]) for batch in batches])
    real_images, real_labels = enlarged_digits(samples.size[0])
    real = reduce_to_8x8(real_images)
    return {
        "samples": len(samples),
        "label_accuracy": label_accuracy(pixels, samples.labels, real, real_labels),
        "pixel_frechet_distance_8x8_digits": pixel_distance(pixels, real),
    }


def lines(metrics: dict) -> str:
    """The two measures for a reader."""
    distance = metrics["pixel_frechet_distance_8x8_digits"]
    value = "not defined for a single sample" if distance is None else f"{distance:.4f}"
    return (
        f"label accuracy: {metrics['label_accuracy']:.1%} of {metrics['samples']} samples recognised as their label\n"
        f"pixel Fréchet distance on 8 x 8 digits: {value}"
    )


def metrics_path(samples: Path) -> Path:
    return samples.with_suffix(".digits.metrics.json")


def stored(samples: Path) -> dict | None:
    """The metrics of an earlier start, None where there are none or they are older than the samples."""
    path = metrics_path(samples)
    there = samples.exists() and path.exists() and path.stat().st_mtime_ns >= samples.stat().st_mtime_ns
    if not there:
        return None
    with files.reading(repr(str(path)), "remove it"):
        metrics = files.read_json(path)
        lines(metrics)
    return metrics


def describe(samples: NpzImages) -> dict:
    """What sample_ddp.py wrote beside its samples, None for samples from elsewhere, and the environment."""
    settings = samples.path.with_suffix(".json")
    environment = monitor.describe_environment(torch.device("cpu"))
    environment["versions"] |= {name: version(name) for name in ("torch-fidelity", "scikit-learn")}
    return {"sampling": files.read_json(settings) if settings.exists() else None, **environment}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    help = ".npz of sample_ddp.py: images arr_0 (N, H, W, 3), labels arr_1 (N,)"
    parser.add_argument("--samples", type=Path, required=True, help=help)
    options.add_dry_run(parser, planned=True)
    return parser.parse_args(argv)


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    path = metrics_path(args.samples)
    if metrics := stored(args.samples):
        print(f"{lines(metrics)}\nnothing to do: {path} is of these samples")
        return
    files.check_folder(path.parent, "--samples")
    if args.planned and not args.samples.exists():
        print(f"dry run: would write {path}; {args.samples} is not there yet, and nothing about it was checked")
        return
    samples = NpzImages(args.samples, "--samples", labelled=True)
    if args.dry_run:
        print(f"dry run: would measure {len(samples)} samples against {IMAGES} digits, in seconds, and write {path}")
        return
    metrics = measure(samples)
    with files.cannot_write(repr(str(path)), "free space, or move --samples"):
        files.write_json(path, metrics | describe(samples))
    print(f"{lines(metrics)}\nmetrics: {path}")


if __name__ == "__main__":
    main()
