"""Evaluate samples: FID, sFID, Inception Score, precision, recall and KID; for the demo, how well digits are met.

Features, statistics and metrics are torch-fidelity's. Under torchrun all processes extract features.
"""

import argparse
import math
import os
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.digits import enlarged_digits
from runtime import distributed, fidelity, files, inception, monitor, options
from runtime.image_sets import NpzImages
from runtime.inception import Inception
from runtime.options import UserError
from runtime.reference import Reference

FEATURES = {  # of each metric
    "fid": "pool",
    "sfid": "spatial",
    "is": "logits",
    "precision": "pool",
    "recall": "pool",
    "kid": "pool",
}
STORED = ("fid", "sfid")  # metrics that need no more of a reference than its mean and covariance
BIASED_BELOW = 10_000  # samples


def metric_names(text: str) -> list[str]:
    """An argparse type: metrics from "fid,is"."""
    names = text.split(",")
    unknown = [name for name in names if name not in FEATURES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a metric; expected some of {','.join(FEATURES)}")
    return list(dict.fromkeys(names))


def default_cache() -> Path:
    """Where programs keep what they can make again, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spiral-rope-dit"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--samples", type=Path, required=True, help=".npz of sample_ddp.py, or any with images arr_0 (N, H, W, 3)")
    add("--reference", type=Path, default=None, help="reference file of ADM, .npz of images, or folder of images")
    add("--metrics", type=metric_names, default=None, help=f"with commas between (None: {','.join(FEATURES)})")
    add("--digits", action="store_true", help="label accuracy and pixel Fréchet distance of the demo's digits")
    add("--inception-weights", type=Path, default=None, help="file of the weights (None: downloaded once)")
    add("--kid-subsets", type=options.count, default=100, help="pairs of subsets that KID is averaged over")
    add("--kid-subset-size", type=options.number(int, 2), default=1000, help="images in each of them")
    add("--batch-size", type=options.count, default=64, help="images at a time for each process")
    add("--num-workers", type=options.non_negative_int, default=4, help="processes reading a folder, for each process")
    add("--cache-dir", type=Path, default=default_cache(), help="where features of references are kept")
    args = parser.parse_args(argv)
    if args.reference is not None and args.metrics is None:
        args.metrics = list(FEATURES)
    if not (args.metrics or args.digits):
        raise UserError("nothing to measure; pass --reference REF for FID and the others, or --digits for the demo")
    compared = [name for name in args.metrics or [] if name != "is"]
    if compared and args.reference is None:
        raise UserError(f"--metrics {','.join(compared)} compare with a reference; pass --reference REF")
    return args


# The demo's digits


def reduce_to_8x8(images: list[Image.Image]) -> np.ndarray:
    """Grey values (N, 64) of images, averaged over the cells of an 8 x 8 grid."""
    return np.stack([np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)).ravel() for image in images])


def label_accuracy(samples: np.ndarray, labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> float:
    """Share of samples (N, 64) that a 3-nearest-neighbour classifier of the real digits recognises as their label."""
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(n_neighbors=3).fit(real.astype(float), real_labels)
    return float((classifier.predict(samples.astype(float)) == labels).mean())


def measure_digits(samples: NpzImages) -> dict:
    """Label accuracy, and the Fréchet distance between all real digits and the samples as 64 grey values from 0 to 1.

    The distance is None for a single sample, which has no covariance.
    """
    pixels = [reduce_to_8x8([Image.fromarray(image) for image in batch]) for batch in samples.batches(256)]
    real_images, real_labels = enlarged_digits(samples.size[0])
    reduced, real = np.concatenate(pixels), reduce_to_8x8(real_images)
    distance = None
    if len(samples) > 1:
        made, wanted = (fidelity.statistics(torch.from_numpy(values / 255)) for values in (reduced, real))
        distance = fidelity.frechet_distance(made, wanted)
    accuracy = label_accuracy(reduced, samples.labels, real, real_labels)
    return {"label_accuracy": accuracy, "pixel_frechet_distance_8x8_digits": distance}


# Metrics of Inception features


def needs_images(metric: str, reference: Reference | None) -> bool:
    """Whether the metric needs features of the reference's images: not where the file holds their statistics."""
    return metric != "is" and not (metric in STORED and FEATURES[metric] in reference.statistics)


def check_enough(args: argparse.Namespace, samples: NpzImages, reference: Reference | None) -> None:
    """Raise UserError unless every metric has the images it needs."""
    compared = [name for name in args.metrics if needs_images(name, reference)]
    if compared and reference.images is None:
        possible = ",".join(name for name in args.metrics if name not in compared)
        raise UserError(
            f"--reference {str(args.reference)!r} has no images arr_0, which {','.join(compared)} need; "
            f"{f'pass --metrics {possible}, or' if possible else 'pass'} another reference"
        )
    least = {"fid": 2, "sfid": 2, "is": fidelity.IS_SPLITS, "kid": args.kid_subset_size}
    for name in args.metrics:
        sets = {"--samples": samples} | ({"--reference": reference.images} if name in compared else {})
        for option, images in sets.items():
            needed = least.get(name, fidelity.NEIGHBOURS + 1)
            if len(images) < needed:
                remedy = "lower --kid-subset-size" if name == "kid" else f"leave {name} out of --metrics"
                raise UserError(f"{name} needs {needed} images and {option} has {len(images)}; give more, or {remedy}")


def compute(
    args: argparse.Namespace,
    samples: dict[str, Tensor],
    reference: dict[str, Tensor],
    stored: dict[str, dict],
    device: torch.device,
) -> dict[str, float]:
    """The metrics asked for, in the order of the table, from features of samples and reference. Raises UserError."""
    found = {}
    for name in ("fid", "sfid"):
        if name in args.metrics:
            feature = FEATURES[name]
            against = stored[feature] if feature in stored else fidelity.statistics(reference[feature])
            found[name] = fidelity.frechet_distance(fidelity.statistics(samples[feature]), against)
    if "is" in args.metrics:
        found |= fidelity.inception_score(samples["logits"])
    asked = [name for name in ("precision", "recall") if name in args.metrics]
    if asked:
        both = fidelity.precision_recall(samples["pool"].to(device), reference["pool"].to(device))
        found |= {name: both[name] for name in asked}
    if "kid" in args.metrics:
        found |= fidelity.kernel_distance(samples["pool"], reference["pool"], args.kid_subsets, args.kid_subset_size)
    wrong = ", ".join(name for name, value in found.items() if not math.isfinite(value))
    if wrong:
        raise UserError(
            f"{wrong} came out as no finite number; the Inception-v3 weights do not fit the images or the reference"
        )
    return found


def measure(args: argparse.Namespace, samples: NpzImages, device: torch.device) -> tuple[dict, dict]:
    """Metrics of Inception features, and the settings that decide them. Raises UserError."""
    reference = None
    if args.reference is not None:
        reference = Reference(args.reference, samples.size, args.num_workers)
    check_enough(args, samples, reference)
    network = Inception(args.inception_weights, device)
    if distributed.is_main():
        warn(args, samples, network)
    needed = dict.fromkeys(FEATURES[name] for name in args.metrics if needs_images(name, reference))
    compared, stored = {}, reference.statistics if reference else {}
    if needed:
        compared = inception.extract_cached(reference.images, list(needed), network, args.batch_size, args.cache_dir)
    names = list(dict.fromkeys(FEATURES[name] for name in args.metrics))
    features = inception.extract(samples, names, network, args.batch_size, "samples")
    metrics = distributed.on_main(compute, args, features, compared, stored, device)
    return metrics, distributed.on_main(describe, args, samples, reference, network)


def warn(args: argparse.Namespace, samples: NpzImages, network: Inception) -> None:
    distances = [name.replace("fid", "FID") for name in STORED if name in args.metrics]
    if distances and len(samples) < BIASED_BELOW:
        warnings.warn(
            f"{' and '.join(distances)} of {len(samples):,} samples {'are' if distances[1:] else 'is'} biased upwards; "
            "published numbers are of 50,000",
            stacklevel=2,
        )
    if not network.is_published:
        warnings.warn(
            f"--inception-weights has sha256 {network.sha256[:8]}..., not {inception.PUBLISHED}...: these are not the "
            "weights of published numbers, which cannot be compared with what follows",
            stacklevel=2,
        )


def describe(args: argparse.Namespace, samples: NpzImages, reference: Reference | None, network: Inception) -> dict:
    """Every setting that decides the metrics, but for how the samples were made."""
    return {
        "samples_sha256": samples.sha256,
        "image_size": list(samples.size),
        "reference": reference.describe() if reference else None,
        "features": {
            "network": "torch-fidelity inception-v3-compat",
            "weights_sha256": network.sha256,
            "weights_are_published": network.is_published,
            "batch_size": args.batch_size,
        },
        "settings": {
            "is_splits": fidelity.IS_SPLITS,
            "kid_subsets": args.kid_subsets,
            "kid_subset_size": args.kid_subset_size,
            "kid_kernel": "(x.y / 2048 + 1)^3",
            "precision_recall_neighbours": fidelity.NEIGHBOURS,
            "seed": fidelity.SEED,
        },
    }


# Results


def line(name: str, values: dict) -> str | None:
    """The line of the table for a metric, None for a value that belongs to another's line."""
    value, spread = values[name], values.get(f"{name}_std")
    match name:
        case "label_accuracy":
            return f"label accuracy: {value:.1%} of {values['samples']} samples recognised as their label"
        case "pixel_frechet_distance_8x8_digits":
            shown = "not defined for a single sample" if value is None else f"{value:.4f}"
            return f"pixel Fréchet distance on 8 x 8 digits: {shown}"
        case "fid" | "sfid":
            return f"{name.replace('fid', 'FID'):<17} {value:>9.4f}"
        case "inception_score":
            return f"{'Inception Score':<17} {value:>9.4f} ± {spread:.4f}"
        case "precision":
            return f"{name:<17} {value:>9.4f}   of the samples, inside the reference's manifold"
        case "recall":
            return f"{name:<17} {value:>9.4f}   of the reference, inside the samples' manifold"
        case "kid":
            return f"{'KID':<17} {value:>9.6f} ± {spread:.6f}"
    return None


def write_results(args: argparse.Namespace, metrics: dict, settings: dict, device: torch.device) -> Path:
    environment = monitor.describe_environment(device)
    environment["versions"]["torch-fidelity"] = version("torch-fidelity")
    path = args.samples.with_suffix(".metrics.json")
    try:
        files.write_json(path, metrics | settings | environment)
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be written ({error.strerror}); free space, or move --samples") from error
    return path


def sampling_settings(samples: Path) -> dict | None:
    """What sample_ddp.py wrote beside its samples; None for samples from elsewhere. Raises UserError."""
    path = samples.with_suffix(".json")
    if not os.access(samples.parent, os.W_OK):
        raise UserError(f"{str(samples.parent)!r}, the folder of --samples, cannot be written; copy the file elsewhere")
    return files.read_json(path) if path.exists() else None


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    samples = NpzImages(args.samples, "--samples", labelled=args.digits)
    settings = {"sampling": sampling_settings(args.samples)}
    device = distributed.setup(tf32=False)
    metrics = {"samples": len(samples)}
    if args.digits:
        metrics |= distributed.on_main(measure_digits, samples)
    if args.metrics:
        found, decided = measure(args, samples, device)
        metrics, settings = metrics | found, settings | decided
    if distributed.is_main():
        print("\n".join(text for name in metrics if (text := line(name, metrics))))
        print(f"metrics: {write_results(args, metrics, settings, device)}")


if __name__ == "__main__":
    main()
