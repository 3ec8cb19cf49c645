"""What the studies share: statistics of paired runs, tables in markdown, and curves with their intervals."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from runtime.monitor import save_figure, use_log_scale

CONFIDENCE = 0.95
SIGNIFICANT = 0.05


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of all of an array: Scandinavian Journal of Statistics 6 (1979), 65-70."""
    flat = p_values.ravel()
    order, found = np.argsort(flat), np.empty(flat.size)
    found[order] = np.minimum(1, np.maximum.accumulate(flat[order] * np.arange(flat.size, 0, -1)))
    return found.reshape(p_values.shape)


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


def table(rows: list[dict[str, str]]) -> str:
    """Rows, cells by column, in markdown, with a dash where one lacks a column."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads), *([row.get(head, "–") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plus_minus(values: np.ndarray, form: str) -> str:
    """Mean ± standard deviation, or a single value."""
    return f"{values.mean():{form}} ± {values.std(ddof=1):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def p_value(p: float) -> str:
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"


def mark(p: float, corrected: float) -> str:
    """‡ at a p below 0.05 that holds after Holm's correction, † at one that does not."""
    return " ‡" if corrected < SIGNIFICANT else " †" if p < SIGNIFICANT else ""


class Curve(NamedTuple):
    """Means at some points and the half-widths of their intervals."""

    look: dict  # label, color, linestyle
    x: np.ndarray
    mean: np.ndarray
    half: np.ndarray


def draw(path: Path, title: str, x_label: str, y_label: str, curves: list[Curve], losses: bool = True) -> None:
    """Curves in their bands; losses on a logarithmic axis, other values about zero."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for look, x, mean, half in curves:
        axes.plot(x, mean, marker=".", **look)
        low = np.maximum(mean - half, mean / 10) if losses else mean - half  # above 0, whatever the interval
        axes.fill_between(x, low, mean + half, color=look["color"], alpha=0.15, linewidth=0)
    if losses:
        axes.set_ylim(bottom=max(0.6 * min(curve.mean.min() for curve in curves), axes.get_ylim()[0]))
        use_log_scale(axes)
    else:
        axes.axhline(0, color="black", linewidth=1)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    save_figure(figure, path)
