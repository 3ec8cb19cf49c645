"""Statistics of paired runs: tests with Holm's correction, intervals, detectable differences, steps to a loss."""

from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

from experiments.plan import BASELINES, pairs

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Comparison:
    """A variant against another at the same seeds, at each of some points, such as training steps."""

    data_set: str
    variant: str
    other: str
    baseline: str  # what the other stands for: a key of plan.BASELINES
    values: np.ndarray  # (seeds, points), losses of the variant
    others: np.ndarray  # the same of the other
    p: np.ndarray  # (points,) of two-sided paired t-tests
    p_holm: np.ndarray | None = None  # (points,) corrected for all comparisons of the family

    @property
    def differences(self) -> np.ndarray:
        """(seeds, points)"""
        return self.values - self.others

    @property
    def relative(self) -> np.ndarray:
        """(points,) mean difference over the other's mean"""
        return self.differences.mean(0) / self.others.mean(0)


def compare(losses: dict[str, dict[str, np.ndarray]], by_baseline: bool) -> list[Comparison]:
    """Every pair of the plan at each point of losses (seeds, points), which are given by data set and variant.

    Holm's correction goes over everything, or over everything with the same baseline.
    """
    found = []
    for data_set, by_variant in losses.items():
        for names in pairs(by_variant):
            values, others = by_variant[names[0]], by_variant[names[1]]
            found.append(Comparison(data_set, *names, values, others, stats.ttest_rel(values, others).pvalue))
    if not by_baseline:
        return corrected(found)
    families = [[item for item in found if item.baseline == baseline] for baseline in BASELINES]
    return [item for family in families if family for item in corrected(family)]


def corrected(family: list[Comparison]) -> list[Comparison]:
    """The same with Holm's correction over all their points."""
    p_holm = holm(np.concatenate([item.p for item in family]))
    parts = np.split(p_holm, np.cumsum([len(item.p) for item in family])[:-1])
    return [replace(item, p_holm=part) for item, part in zip(family, parts, strict=True)]


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of p-values (n,): Scandinavian Journal of Statistics 6 (1979), 65-70."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    found = np.empty(len(order))
    found[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return found


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
