"""Statistics of paired runs, and the tables of the study of position encodings, in markdown."""

from dataclasses import dataclass
from itertools import groupby, product

import numpy as np
from scipy import optimize, stats

from experiments.study import BASELINES, VARIANTS, Losses, Run, Study

CONFIDENCE = 0.95
SIGNIFICANT = 0.05
POWER = 0.8
TENTHS = [f"{100 * k}–{100 * k + 99}" for k in range(10)]  # timesteps

Row = dict[str, str]  # cells of a table by column


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
        self.pair = f"{VARIANTS[self.variant].label} − {VARIANTS[self.other].label}"

    def mark(self, point: int) -> str:
        """‡ at a p below 0.05 that holds after Holm's correction within its baseline, † at one that does not."""
        return " ‡" if self.p_holm[point] < SIGNIFICANT else " †" if self.p[point] < SIGNIFICANT else ""


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


def all_tables(study: Study, runs: dict[str, dict]) -> str:
    """Every table under its title."""
    raw, averaged, tenths = (study.collect(runs, f"val_loss{kind}") for kind in ("", "_ema", "_ema_tenths"))
    steps = next(iter(runs.values()))["step"]
    by_grid = [study.collect(runs, name) for name in study.grids]
    grids = {names: np.stack([losses[names] for losses in by_grid], axis=1) for names in by_grid[0]}
    tables = {
        "Held-out loss": table(final_losses(np.array(steps), {"EMA": averaged, "raw": raw})),
        "Paired differences of the final loss": table(final_differences(averaged)),
        "Differences by training step": differences(averaged, [f"step {step:,}" for step in steps]),
        "Loss by timestep": mean_losses(tenths, TENTHS),
        "Differences by timestep": differences(tenths, TENTHS),
        "Loss beyond the training grid": mean_losses(grids, list(study.grids)),
        "Differences beyond the training grid": differences(grids, list(study.grids)),
    }
    if study.sweep_lrs:
        tables["Learning rate"] = sweep(study, runs)
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in tables.items())


def table(rows: list[Row]) -> str:
    """Rows in markdown, with a dash where one lacks a column."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads), *([row.get(head, "–") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def first_cells(data_set: str, variant: str) -> Row:
    return {"data": data_set, "position encoding": VARIANTS[variant].label}


def final_losses(steps: np.ndarray, curves: dict[str, Losses]) -> list[Row]:
    """By kind of weights: the loss at the last step, and when sin-cos's is reached."""
    rows = [first_cells(*names) for names in curves["EMA"]]
    for kind, losses in curves.items():
        for row, ((data_set, _), by_seed) in zip(rows, losses.items(), strict=True):
            row[f"loss, {kind} weights"] = plus_minus(by_seed[:, -1], ".4f")
            row[f"steps to sin-cos's final loss, {kind}"] = steps_to_sincos(steps, by_seed, losses[data_set, "sincos"])
    return rows


def steps_to_sincos(steps: np.ndarray, curves: np.ndarray, sincos: np.ndarray) -> str:
    """Mean ± standard deviation of the steps at which each seed reaches sin-cos's final loss."""
    reached = np.array([steps_to_reach(steps, curve, other[-1]) for curve, other in zip(curves, sincos, strict=True)])
    if not np.isfinite(reached).all():
        return f"not reached by {int((~np.isfinite(reached)).sum())} of {len(reached)} seeds"
    bound = "≤ " if (reached == steps[0]).any() else ""  # that seed was there before it was first measured
    return bound + plus_minus(reached, ".0f")


def final_differences(averaged: Losses) -> list[Row]:
    compared = compare({names: losses[:, -1:] for names, losses in averaged.items()}, by_baseline=False)
    rows = []
    for item in sorted(compared, key=lambda item: item.data_set):
        found = item.differences[:, 0]
        mean, half = band(found, CONFIDENCE)
        levels = (SIGNIFICANT, SIGNIFICANT / len(compared))
        alone, first = (f"{100 * detectable(found, level) / item.others.mean():.1f} %" for level in levels)
        values = {
            "difference": f"{mean:+.5f}",
            "95 % interval": f"[{mean - half:+.5f}, {mean + half:+.5f}]",
            "relative": f"{100 * item.relative[0]:+.2f} %",
            "p": p_value(item.p[0]),
            f"p, Holm over {len(compared)}": p_value(item.p_holm[0]),
            "would be found": f"{alone} ({first})",
        }
        rows.append({"data": item.data_set, "pair": item.pair} | values)
    return rows


def mean_losses(losses: Losses, points: list[str]) -> str:
    """Mean over the seeds at each point."""
    return table(
        [
            first_cells(*names) | {point: f"{mean:.4f}" for point, mean in zip(points, by_seed.mean(0), strict=True)}
            for names, by_seed in losses.items()
        ]
    )


def differences(losses: Losses, points: list[str]) -> str:
    """Relative difference of every pair at each point, marked by p."""
    compared = compare(losses, by_baseline=True)
    rows = [
        {"data": item.data_set, "pair": item.pair}
        | {point: f"{100 * item.relative[k]:+.1f} %{item.mark(k)}" for k, point in enumerate(points)}
        for item in compared
    ]
    return f"{table(rows)}\n\n{tally(compared)}"


def tally(compared: list[Comparison]) -> str:
    """How many differences have marks, by baseline."""
    parts = []
    for baseline, family in groupby(compared, lambda item: item.baseline):
        alone, held = np.array([(item.p, item.p_holm) for item in family]).swapaxes(0, 1) < SIGNIFICANT
        parts.append(f"against {BASELINES[baseline]} {alone.sum()} of {alone.size}, {held.sum()} after correction")
    return f"At p below {SIGNIFICANT:g}: {'; '.join(parts)}."


def sweep(study: Study, runs: dict[str, dict]) -> str:
    """Mean final losses of the averaged weights at each learning rate."""

    def final(*names) -> list[list[float]]:
        rates, seeds = study.sweep_lrs, range(study.sweep_seeds)
        return [[runs[Run(*names, lr, seed).key]["val_loss_ema"][-1] for lr in rates] for seed in seeds]

    losses = {names: np.array(final(*names)) for names in product(study.variants, study.sweep_variants)}
    return mean_losses(losses, [f"learning rate {lr:g}" for lr in study.sweep_lrs])


def plus_minus(values: np.ndarray, form: str) -> str:
    """Mean ± standard deviation."""
    return f"{values.mean():{form}} ± {values.std(ddof=1):{form}}"


def p_value(p: float) -> str:
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"
