"""Statistics of paired runs: intervals, tests, and steps to a loss."""

from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

from experiments.plan import pairs

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Comparison:
    """A variant against another over paired seeds: mean of (variant - other) and what is known about it."""

    data_set: str
    variant: str
    other: str
    baseline: str  # what the other stands for: a key of plan.BASELINES
    difference: float
    low: float  # of the 95 % bootstrap interval
    high: float
    relative: float  # difference over the other's mean
    deviation: float  # standard deviation of the paired differences over the other's mean
    seeds: int
    p: float  # paired t-test, two-sided
    p_holm: float = np.nan  # corrected for all comparisons of its family

    @property
    def pair(self) -> tuple[str, str]:
        return self.variant, self.other

    def detectable(self, level: float) -> float:
        """The true difference, over the other's mean, that a t-test at this level finds with a probability of POWER."""
        return self.deviation * standardized_difference(self.seeds, level)


def compare(values: np.ndarray, others: np.ndarray, data_set: str, names: tuple[str, str, str]) -> Comparison:
    """Compare losses (seeds,) with others (seeds,) at the same seeds, at least two of them."""
    differences, mean = values - others, float(others.mean())
    interval = stats.bootstrap(
        (differences,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Comparison(
        data_set,
        *names,
        difference=float(differences.mean()),
        low=float(interval.low),
        high=float(interval.high),
        relative=float(differences.mean()) / mean,
        deviation=float(differences.std(ddof=1)) / mean,
        seeds=len(differences),
        p=float(stats.ttest_rel(values, others).pvalue),
    )


def standardized_difference(n: int, level: float) -> float:
    """True mean of n paired differences, in their standard deviations, that a two-sided t-test finds with POWER."""
    critical = stats.t.ppf(1 - level / 2, n - 1)
    quantiles = (np.arange(20_000) + 0.5) / 20_000  # of the estimated standard deviation, over the true one
    threshold = critical * np.sqrt(stats.chi2.ppf(quantiles, n - 1) / (n - 1))

    def missed(effect: float) -> float:
        found = stats.norm.sf(threshold - effect * n**0.5) + stats.norm.cdf(-threshold - effect * n**0.5)
        return POWER - found.mean()

    return float(optimize.brentq(missed, 0, 10 * critical))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of p-values (n,): Scandinavian Journal of Statistics 6 (1979), 65-70."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return corrected


def compare_all(losses: dict[str, dict[str, np.ndarray]]) -> list[Comparison]:
    """Every pair of the plan, with Holm's correction over all; losses holds (seeds,) by data set and variant."""
    found = [
        compare(by_variant[names[0]], by_variant[names[1]], data_set, names)
        for data_set, by_variant in losses.items()
        for names in pairs(by_variant)
    ]
    return corrected(found)


def compare_points(losses: dict[str, dict[str, np.ndarray]]) -> list[list[Comparison]]:
    """Every pair at each point of losses (seeds, points), by data set and variant: a list of points for each pair.

    Holm's correction goes over all points and data sets of a baseline.
    """
    found: dict[str, list[Comparison]] = {}
    for data_set, by_variant in losses.items():
        for names in pairs(by_variant):
            columns = zip(by_variant[names[0]].T, by_variant[names[1]].T, strict=True)
            found.setdefault(names[2], []).extend(compare(*column, data_set, names) for column in columns)
    by_pair: dict[tuple, list[Comparison]] = {}
    for item in (item for family in found.values() for item in corrected(family)):
        by_pair.setdefault((item.data_set, item.pair), []).append(item)
    return list(by_pair.values())


def corrected(family: list[Comparison]) -> list[Comparison]:
    """The same with Holm's correction over them."""
    p_values = holm(np.array([item.p for item in family]))
    return [replace(item, p_holm=float(p)) for item, p in zip(family, p_values, strict=True)]


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
