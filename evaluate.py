"""Evaluate samples against a reference: FID, sFID, Inception Score, precision, recall and KID.

Features, statistics and metrics are torch-fidelity's. Under torchrun all processes extract features.
"""

import argparse
import math
import os
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from runtime import distributed, files, inception, monitor, options
from runtime.image_sets import NpzImages, Reference, checksum
from runtime.inception import WIDTHS, Inception
from runtime.options import UserError, format_size

IS_SPLITS = 10
NEIGHBOURS = 3  # k of precision and recall, as in ADM
SEED = 2020  # torch-fidelity's: shuffles before the Inception Score is split, draws the subsets of KID
BIASED_BELOW = 10_000  # samples


@dataclass(frozen=True)
class Metric:
    """How a metric is measured and told."""

    feature: str  # of runtime.inception
    images: int  # that it needs at least; of samples, and of the reference where it is compared with images
    key: str  # in the results
    row: str  # of the table, to be filled with the results


METRICS = {
    "fid": Metric("pool", 2, "fid", "FID               {fid:9.4f}"),
    "sfid": Metric("spatial", 2, "sfid", "sFID              {sfid:9.4f}"),
    "is": Metric(
        "logits", IS_SPLITS, "inception_score", "Inception Score   {inception_score:9.4f} ± {inception_score_std:.4f}"
    ),
    "precision": Metric(
        "pool", NEIGHBOURS + 1, "precision",
        "precision         {precision:9.4f}   of the samples, inside the reference's manifold",
    ),
    "recall": Metric(
        "pool", NEIGHBOURS + 1, "recall",
        "recall            {recall:9.4f}   of the reference, inside the samples' manifold",
    ),
    "kid": Metric("pool", 2, "kid", "KID               {kid:9.6f} ± {kid_std:.6f}"),
}  # fmt: skip
STORED = ("fid", "sfid")  # metrics that need no more of a reference than its mean and covariance


def metric_names(text: str) -> list[str]:
    """An argparse type: metrics from "fid,is"."""
    names = text.split(",")
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a metric; expected some of {','.join(METRICS)}")
    return list(dict.fromkeys(names))


def default_cache() -> Path | None:
    """Where programs keep what they can make again, by the XDG convention; None for a user without a home."""
    home = os.path.expanduser("~/.cache")
    folder = os.environ.get("XDG_CACHE_HOME") or (home if os.path.isabs(home) else None)
    return folder and Path(folder) / "spiral-rope-dit"


def build_parser() -> options.Parser:
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--samples", type=Path, required=True, help=".npz of sample_ddp.py, or any with images arr_0 (N, H, W, 3)")
    add("--samples-expected", type=options.count, default=None, help="images that --samples must have (None: any)")
    add("--reference", type=Path, default=None, help="reference file of ADM, .npz of images, or folder of images")
    add("--metrics", type=metric_names, default=",".join(METRICS), help="what to measure, with commas between")
    add("--inception-weights", type=Path, default=None, help="file of the weights (None: downloaded once)")
    add("--kid-subsets", type=options.count, default=100, help="pairs of subsets that KID is averaged over")
    add("--kid-subset-size", type=options.number(int, 2), default=1000, help="images in each of them")
    add("--batch-size", type=options.count, default=64, help="images at a time for each process")
    options.add_num_workers(parser, "processes reading a folder, for each process")
    add("--cache-dir", type=Path, default=default_cache(), help="where features of references are kept")
    options.add_dry_run(parser, planned=True)
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    return build_parser().parse_args(argv)


# Checks before anything is measured


def check(args: argparse.Namespace) -> tuple[NpzImages | None, Reference | None]:
    """Samples, None while they are only planned, and reference. Raises UserError for what cannot be measured."""
    samples = None if args.planned else NpzImages(args.samples, "--samples")
    if samples and args.samples_expected not in (None, len(samples)):
        raise UserError(
            f"--samples {str(args.samples)!r} has {len(samples)} images; expected {args.samples_expected} by "
            "--samples-expected: make them again, or leave it out"
        )
    reference = None
    if args.reference is not None:
        reference = Reference(args.reference, samples.size if samples else None, args.num_workers)
    check_enough(args, len(samples) if samples else args.samples_expected, reference)
    files.check_folder(args.samples.parent, "folder of --samples")
    if comparing_images(args.metrics, reference):
        if args.cache_dir is None:
            raise UserError("this user has no home folder; pass --cache-dir, or set XDG_CACHE_HOME")
        files.check_folder(args.cache_dir, "--cache-dir")
    return samples, reference


def comparing_images(metrics: list[str], reference: Reference | None) -> list[str]:
    """Those that need features of the reference's images: not where the file holds their statistics."""
    stored = [name for name in STORED if reference and METRICS[name].feature in reference.statistics]
    return [name for name in metrics if name != "is" and name not in stored]


def check_enough(args: argparse.Namespace, samples: int | None, reference: Reference | None) -> None:
    """Raise UserError, naming the --metrics that can be measured, unless all of them can.

    samples is how many there are, None where that is not known yet.
    """
    reasons = {name: lacking(name, args, samples, reference) for name in args.metrics}
    possible = ",".join(name for name, reason in reasons.items() if reason is None)
    for reason in reasons.values():
        if reason is not None:
            raise UserError(f"{reason}, or pass --metrics {possible}" if possible else reason)


def lacking(name: str, args: argparse.Namespace, samples: int | None, reference: Reference | None) -> str | None:
    """What the metric lacks to be measured, with a remedy; None where it lacks nothing."""
    if name != "is" and reference is None:
        return f"{name} compares with a reference; pass --reference REF"
    counts = {"--samples": samples}
    if comparing_images([name], reference):
        if reference.images is None:
            return f"--reference {str(args.reference)!r} has no images arr_0, which {name} needs; use another"
        counts["--reference"] = len(reference.images)
    needed = args.kid_subset_size if name == "kid" else METRICS[name].images
    for option, count in counts.items():
        if count is not None and count < needed:
            remedy = "give more, lower --kid-subset-size" if name == "kid" else "give more"
            return f"{name} needs {needed} images, more than the {count} of {option}; {remedy}"
    return None


def deciding(args: argparse.Namespace, weights: str) -> dict:
    """All that decides the metrics, known without a look at the images; weights as runtime.inception tells them."""
    reference = {} if args.reference is None else {"reference_checksum": checksum(args.reference)}
    return reference | {
        "samples_checksum": checksum(args.samples),
        "network": "torch-fidelity inception-v3-compat",
        "weights_sha256": weights,
        "weights_are_published": weights == inception.PUBLISHED,
        "batch_size": args.batch_size,
        "is_splits": IS_SPLITS,
        "kid_subsets": args.kid_subsets,
        "kid_subset_size": args.kid_subset_size,
        "kid_kernel": "(x.y / 2048 + 1)^3",
        "precision_recall_neighbours": NEIGHBOURS,
        "seed": SEED,
    }


def stored_results(args: argparse.Namespace) -> dict | None:
    """The results of an earlier command that has measured all of what this one would; None without any."""
    path = results_path(args)
    if not path.exists():
        return None
    weights = inception.read_weights(args.inception_weights)[0] if args.inception_weights else inception.PUBLISHED
    now = deciding(args, weights)
    try:
        with files.reading(repr(str(path)), "it is measured again"):
            stored = files.read_json(path)
            table(args.metrics, stored)  # of numbers
            return stored if now.items() <= stored["settings"].items() else None
    except UserError:  # damaged, or of other metrics
        return None


# Metrics of features


def statistics(features: Tensor) -> dict[str, np.ndarray]:
    """Mean mu (D,) and covariance sigma (D, D) of features (N, D), in float64."""
    return fid_features_to_statistics(features.double())


def frechet_distance(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians as statistics gives them."""
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def precision_recall(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """precision: share of the samples inside the reference's manifold; recall: of the reference inside the samples'.

    The manifold of a set is the union of the balls around its members that reach to their NEIGHBOURS-th neighbour.
    """
    # save_cpu_ram: a block of distances at a time; the whole matrix of 50,000 samples would take 10 GB.
    found = prc_features_to_metric(samples, reference, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}


def compute(
    args: argparse.Namespace,
    samples: dict[str, Tensor],
    reference: dict[str, Tensor],
    stored: dict[str, dict],
    device: torch.device,
) -> dict[str, float]:
    """The metrics asked for from features of samples and reference, and its stored statistics. Raises UserError."""
    found = {}
    for name in STORED:
        if name in args.metrics:
            feature = METRICS[name].feature
            against = stored[feature] if feature in stored else statistics(reference[feature])
            found[name] = frechet_distance(statistics(samples[feature]), against)
    if "is" in args.metrics:  # exp of the mean KL divergence between p(class | image) and p(class)
        score = isc_features_to_metric(samples["logits"], splits=IS_SPLITS, shuffle=True, rng_seed=SEED)
        found["inception_score"] = score[KEY_METRIC_ISC_MEAN]
        found["inception_score_std"] = score[KEY_METRIC_ISC_STD]
    asked = [name for name in ("precision", "recall") if name in args.metrics]
    if asked:
        both = precision_recall(samples["pool"].to(device), reference["pool"].to(device))
        found |= {name: both[name] for name in asked}
    if "kid" in args.metrics:  # the squared MMD of subsets with the kernel (x.y / 2048 + 1)^3
        subsets = {"kid_subsets": args.kid_subsets, "kid_subset_size": args.kid_subset_size, "rng_seed": SEED}
        distance = kid_features_to_metric(samples["pool"], reference["pool"], **subsets, verbose=False)
        found |= {"kid": distance[KEY_METRIC_KID_MEAN], "kid_std": distance[KEY_METRIC_KID_STD]}
    wrong = ", ".join(name for name, value in found.items() if not math.isfinite(value))
    if wrong:
        raise UserError(
            f"{wrong} came out as no finite number; the Inception-v3 weights do not fit the images or the reference"
        )
    return found


def features_of(metrics: list[str]) -> list[str]:
    """Names of the features that metrics are computed from."""
    return list(dict.fromkeys(METRICS[name].feature for name in metrics))


def measure(
    args: argparse.Namespace, samples: NpzImages, reference: Reference | None, network: Inception
) -> dict[str, float]:
    """Number of samples and metrics, on all processes. Raises UserError."""
    compared, names = {}, features_of(comparing_images(args.metrics, reference))
    if names:
        contents = distributed.on_main(checksum, args.reference)  # where an error reaches all processes
        compared = inception.extract_cached(
            reference.images, contents, names, network, args.batch_size, args.cache_dir, say
        )
    features = inception.extract(samples, features_of(args.metrics), network, args.batch_size, "samples")
    stored = reference.statistics if reference else {}
    return {"samples": len(samples)} | distributed.on_main(compute, args, features, compared, stored, network.device)


# What is told


def warn(args: argparse.Namespace, samples: NpzImages, network: Inception) -> None:
    distances = [name.replace("fid", "FID") for name in STORED if name in args.metrics]
    if distances and len(samples) < BIASED_BELOW:
        warnings.warn(
            f"{len(samples):,} samples bias {' and '.join(distances)} upwards; published numbers are of 50,000",
            stacklevel=2,
        )
    if network.weights != inception.PUBLISHED:
        warnings.warn(
            f"--inception-weights has sha256 {network.weights}..., not {inception.PUBLISHED}...: these are not the "
            "weights of published numbers, which cannot be compared with what follows",
            stacklevel=2,
        )


def plan(args: argparse.Namespace, samples: NpzImages | None, reference: Reference | None) -> str:
    """What would be measured, and what that takes. Raises UserError for weights that are none."""
    count = len(samples) if samples else args.samples_expected
    number = f"{count:,} images" if count else "of any number"
    size = f" of {format_size(samples.size)} pixels" if samples else "; not checked, since an earlier command makes it"
    lines = [
        f"dry run: would measure {','.join(args.metrics)}, with {args.planned or distributed.world_size()} processes",
        f"samples: {args.samples}, {number}{size}",
    ]
    if reference is not None:
        held = "statistics alone" if reference.images is None else f"{len(reference.images):,} images"
        lines.append(f"reference: {args.reference}, {held}")
    lines.append(f"weights of Inception-v3: {inception.find_weights(args.inception_weights)}")
    if count:
        lines.append(f"memory: about {files.format_bytes(memory(args, count, reference))} in the first process")
    if comparing_images(args.metrics, reference):
        lines.append(f"would keep features of the reference in {args.cache_dir}")
    return "\n".join([*lines, f"would write {results_path(args)}"])


def memory(args: argparse.Namespace, samples: int, reference: Reference | None) -> int:
    """Bytes that the features take, and beside them at most what one metric takes."""
    compared = comparing_images(args.metrics, reference)
    held = [(samples, name) for name in features_of(args.metrics)]
    held += [(len(reference.images), name) for name in features_of(compared)]
    # Two copies in float64 while a covariance is taken; torch-fidelity sorts the distances of 10,000 rows at a time.
    columns = 10_000 if {"precision", "recall"} & set(args.metrics) else WIDTHS["pool"]
    return 4 * sum(count * WIDTHS[name] for count, name in held) + 16 * columns * max(count for count, _ in held)


def table(metrics: list[str], results: dict) -> str:
    return "\n".join(METRICS[name].row.format(**results) for name in METRICS if name in metrics)


def describe(
    args: argparse.Namespace, samples: NpzImages, reference: Reference | None, network: Inception
) -> dict[str, object]:
    """What was measured, all that decides the metrics but for how the samples were made, and the environment."""
    environment = monitor.describe_environment(network.device)
    environment["versions"]["torch-fidelity"] = version("torch-fidelity")
    return {
        "image_size": list(samples.size),
        "reference": reference.describe() if reference else None,
        "settings": deciding(args, network.weights),
        **environment,
    }


def results_path(args: argparse.Namespace) -> Path:
    return args.samples.with_suffix(".metrics.json")


def say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)


def write_results(args: argparse.Namespace, results: dict) -> None:
    path = results_path(args)
    with files.cannot_write(repr(str(path)), "free space, or move --samples"):
        files.write_json(path, results)
    print(f"metrics: {path}")


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    samples, reference = check(args)
    path = args.samples.with_suffix(".json")  # of sample_ddp.py; samples from elsewhere have none
    sampling = files.read_json(path) if path.exists() else None
    device = distributed.setup(tf32=False)
    stored = distributed.on_main(stored_results, args) if samples else None
    if stored is not None:
        return say(f"{table(args.metrics, stored)}\nnothing to do: {results_path(args)} holds these metrics already")
    if args.dry_run:
        return say(distributed.on_main(plan, args, samples, reference))
    network = Inception(args.inception_weights, device)
    if distributed.is_main():
        warn(args, samples, network)
    metrics = measure(args, samples, reference, network)
    say(table(args.metrics, metrics))  # first: what is measured is not lost where the file cannot be written
    if distributed.is_main():
        write_results(args, metrics | {"sampling": sampling} | describe(args, samples, reference, network))


if __name__ == "__main__":
    main()
