"""Statistics of paired runs: tests with Holm's correction, intervals, detectable differences, steps to a loss."""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
from scipy import optimize, stats

from experiments.plan import BASELINES, Losses

CONFIDENCE = 0.95
SIGNIFICANT = 0.05
POWER = 0.8


@dataclass
class Comparison:
    """A variant against another at the same seeds, at each of some points, such as training steps."""

    data_set: str
    variant: str
    other: str
    baseline: str  # what the other stands for: a key of BASELINES
    values: np.ndarray  # (seeds, points), losses of the variant
    others: np.ndarray  # the same of the other

    def __post_init__(self):
        self.differences = self.values - self.others  # (seeds, points)
        self.relative = self.differences.mean(0) / self.others.mean(0)  # (points,)
        self.p = stats.ttest_rel(self.values, self.others).pvalue  # (points,) of two-sided paired t-tests
        self.p_holm = None  # (points,) corrected for all comparisons of the family


def compare(losses: Losses, by_baseline: bool) -> list[Comparison]:
    """Variants against axial RoPE, then against sin-cos, then clamped borders against exact ones, at each point.

    Holm's correction goes over everything, or over everything with the same baseline.
    """
    found = []
    for baseline in BASELINES:
        for data_set, variant in losses:
            other = variant.replace("clamp", "exact") if baseline == "exact" else baseline
            if variant not in ("sincos", other) and (data_set, other) in losses:
                values = losses[data_set, variant], losses[data_set, other]
                found.append(Comparison(data_set, variant, other, baseline, *values))
    for _, family in groupby(found, lambda item: item.baseline if by_baseline else None):
        family = list(family)
        for item, corrected in zip(family, holm(np.stack([item.p for item in family])), strict=True):
            item.p_holm = corrected
    return found


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of all of an array: Scandinavian Journal of Statistics 6 (1979), 65-70."""
    flat = p_values.ravel()
    order, found = np.argsort(flat), np.empty(flat.size)
    found[order] = np.minimum(1, np.maximum.accumulate(flat[order] * np.arange(flat.size, 0, -1)))
    return found.reshape(p_values.shape)


def bootstrap_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of differences (seeds,)."""
    random = np.random.default_rng(0)
    found = stats.bootstrap((differences,), np.mean, confidence_level=CONFIDENCE, method="percentile", rng=random)
    return tuple(found.confidence_interval)


def detectable(differences: np.ndarray, level: float) -> float:
    """The true mean that a two-sided t-test of differences (seeds,) finds at this level with a probability of POWER."""
    n = len(differences)
    critical = stats.t.ppf(1 - level / 2, n - 1)

    def missing(effect: float) -> float:  # in standard deviations; a t below -critical is too rare here to count
        return POWER - stats.nct.sf(critical, n - 1, effect * n**0.5)

    return optimize.brentq(missing, 0, 2 * (critical + 1) / n**0.5) * differences.std(ddof=1)


def band(values: np.ndarray, confidence: float, one_more: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis and half-width of Student's interval: for the mean, or for one more run."""
    n = len(values)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * stats.sem(values)
    return values.mean(0), half * (n + 1) ** 0.5 if one_more else half


def steps_to_reach(steps: np.ndarray, curve: np.ndarray, target: float) -> float:
    """First step at which a loss curve is at target or below, linear between its points; infinite when it never is.

    The first point's step where the curve begins below: an upper bound.
    """
    below = np.flatnonzero(curve <= target)
    if not len(below):
        return np.inf
    last = slice(max(below[0] - 1, 0), below[0] + 1)  # falls through the target
    return float(np.interp(-target, -curve[last], steps[last]))
