"""Figures of the studies: curves with their intervals."""

from itertools import product
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.comparisons import CONFIDENCE, band
from experiments.study import VARIANTS, Losses, Study, Variant
from runtime.monitor import save_figure, use_log_scale

Curve = tuple[Variant, np.ndarray, np.ndarray, np.ndarray]  # how it looks, points, means, half-widths
# Label of the y axis, what the curves are relative to in percent, curves; relative to nothing they are losses.
Panel = tuple[str, Variant | None, list[Curve]]


def draw(path: Path, title: str, label: str, columns: dict[str, list[Panel]], size=(6.2, 3.9)) -> None:
    """A column of panels under each heading; label is that of the x axes, size that of a panel in inches."""
    shape = len(next(iter(columns.values()))), len(columns)
    figure = Figure(figsize=(size[0] * shape[1], size[1] * shape[0]), layout="constrained")
    for (heading, panels), column in zip(columns.items(), figure.subplots(*shape, squeeze=False).T, strict=True):
        for panel, axes in zip(panels, column, strict=True):
            draw_panel(axes, *panel)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3, which="both")
        column[0].set_title(heading)
        column[0].legend(fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)


def draw_panel(axes, label: str, baseline: Variant | None, curves: list[Curve]) -> None:
    """Bands on a logarithmic axis, or error bars, side by side at every point, about a baseline at zero."""
    axes.set_ylabel(label)
    if baseline is not None:
        axes.axhline(0, color=baseline.colour, linewidth=1, label=baseline.label)
    for place, (look, x, mean, half) in enumerate(curves):
        style = {"color": look.colour, "linestyle": look.dashes, "marker": ".", "label": look.label}
        if baseline is None:
            axes.plot(x, mean, **style)
            low = np.maximum(mean - half, mean / 10)  # above 0, whatever the interval
            axes.fill_between(x, low, mean + half, color=look.colour, alpha=0.15, linewidth=0)
        else:
            shift = (place - (len(curves) - 1) / 2) * 0.1 * (x[1] - x[0])
            axes.errorbar(x + shift, mean, yerr=half, linewidth=1, capsize=2, **style)
    if baseline is None:
        lowest = 0.6 * min(mean.min() for _, _, mean, _ in curves)
        axes.set_ylim(bottom=max(lowest, axes.get_ylim()[0]))
        use_log_scale(axes)


def panels_of(losses: Losses, x: np.ndarray, *baselines: str | None) -> dict[str, list[Panel]]:
    """For each data set a panel of the losses (None), or of the losses relative to a baseline's at the same seed."""
    found = {data_set: [] for data_set, _ in losses}
    for data_set, baseline in product(found, baselines):
        values = {variant: values for (part, variant), values in losses.items() if part == data_set}
        label = "held-out loss (MSE of the noise)"
        if baseline is not None:
            others = [name for name in values if name not in (baseline, "sincos")]
            values = {name: 100 * (values[name] / values[baseline] - 1) for name in others}
            label = f"loss relative to {VARIANTS[baseline].label} (%)"
        curves = [(VARIANTS[name], x, *band(by_seed, CONFIDENCE)) for name, by_seed in values.items()]
        found[data_set].append((label, VARIANTS.get(baseline), curves))
    return found


def draw_all(study: Study, runs: dict[str, dict], folder: Path) -> None:
    steps, middles = np.array(next(iter(runs.values()))["step"]), 100 * np.arange(10) + 50
    losses, tenths = (study.collect(runs, f"val_loss_ema{kind}") for kind in ("", "_tenths"))
    title = f"Held-out denoising loss of the EMA weights: mean over {study.seeds} seeds, 95 % confidence interval"
    panels = panels_of(losses, steps, None, "axial")
    draw(folder / "evidence_curves.png", f"{title} at each point", "training step", panels)
    title = "Final held-out loss of the EMA weights by timestep, 95 % confidence interval at each point"
    panels = panels_of(tenths, middles, "sincos", "axial")
    draw(folder / "evidence_tenths.png", title, "timestep (middle of its tenth of the schedule)", panels)
