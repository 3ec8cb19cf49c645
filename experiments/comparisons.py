"""Statistics of paired runs: intervals, tests, and steps to a loss."""

from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """A variant against a baseline over paired seeds: mean of (variant - baseline) and what is known about it."""

    data_set: str
    variant: str
    baseline: str
    difference: float
    low: float  # of the 95 % bootstrap interval
    high: float
    relative: float  # difference over the baseline's mean
    p: float  # paired t-test, two-sided
    p_holm: float = np.nan  # corrected for all comparisons of the study


def compare(values: np.ndarray, baseline: np.ndarray, data_set: str, names: tuple[str, str]) -> Comparison:
    """Compare final losses (seeds,) with those of a baseline (seeds,) at the same seeds, at least two of them."""
    differences = values - baseline
    interval = stats.bootstrap(
        (differences,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    mean = float(differences.mean())
    return Comparison(
        data_set=data_set,
        variant=names[0],
        baseline=names[1],
        difference=mean,
        low=float(interval.low),
        high=float(interval.high),
        relative=mean / float(baseline.mean()),
        p=float(stats.ttest_rel(values, baseline).pvalue),
    )


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of p-values (n,): Scandinavian Journal of Statistics 6 (1979), 65-70."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return corrected


def compare_all(finals: dict[str, dict[str, np.ndarray]], baselines: tuple[str, ...]) -> list[Comparison]:
    """Every variant against every baseline, a pair of baselines once, with Holm's correction over all of them.

    finals holds losses (seeds,) by data set and variant. A later baseline is compared with the earlier ones.
    """
    found = []
    for data_set, by_variant in finals.items():
        for position, baseline in enumerate(baselines):
            skipped = baselines[position:]  # itself, and those that it is compared with from the other side
            for variant in (name for name in by_variant if name not in skipped):
                names = (variant, baseline)
                found.append(compare(by_variant[variant], by_variant[baseline], data_set, names))
    corrected = holm(np.array([comparison.p for comparison in found]))
    return [replace(item, p_holm=float(p)) for item, p in zip(found, corrected, strict=True)]


def confidence_band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half-width of its 95 % confidence interval over the first axis, by Student's t."""
    n = len(values)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return values.mean(axis=0), half


def prediction_band(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis, and half-width of the interval in which one more run falls, by Student's t."""
    n = len(values)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(axis=0, ddof=1) * np.sqrt(1 + 1 / n)
    return values.mean(axis=0), half


def steps_to_reach(steps: np.ndarray, curve: np.ndarray, target: float) -> float:
    """First step at which a loss curve is at target or below, linear between its points; infinite when it never is.

    The first point's step where the curve begins below: an upper bound.
    """
    below = np.flatnonzero(curve <= target)
    if not len(below):
        return float("inf")
    first = below[0]
    if first == 0:
        return float(steps[0])
    share = (curve[first - 1] - target) / (curve[first - 1] - curve[first])
    return float(steps[first - 1] + share * (steps[first] - steps[first - 1]))


def gpu_hours(gflop_per_image: float, steps: int, batch: int, peak_tflops: float, share: float) -> float:
    """Hours of one GPU for a training run: GFLOP of a training step by image, and the share of peak that is reached."""
    return gflop_per_image * 1e9 * steps * batch / (peak_tflops * 1e12 * share) / 3600
