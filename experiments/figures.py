"""Figures of the studies."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments.comparisons import confidence_band
from experiments.evaluation import QUERIES
from experiments.plan import LABELS
from runtime.monitor import save_figure

STYLES = {  # colour by position encoding, dashes by border
    "sincos": ("black", "-"),
    "axial": ("C0", "-"),
    "spiral2_clamp": ("C2", "--"),
    "spiral2_exact": ("C2", "-"),
    "spiral4_clamp": ("C3", "--"),
    "spiral4_exact": ("C3", "-"),
    "same_theta2": ("C1", "--"),
}
QUERY_COLOURS = ("C1", "C2", "C4")


def draw_curves(steps: np.ndarray, curves: dict[str, dict[str, np.ndarray]], seeds: int, path: Path) -> None:
    """Held-out loss (seeds, steps) by step, for each data set and variant, with 95 % confidence bands."""
    figure = Figure(figsize=(6.2 * len(curves), 4.6), layout="constrained")
    for axes, (data_set, by_variant) in zip(panels(figure, len(curves)), curves.items(), strict=True):
        for variant, values in by_variant.items():
            colour, dashes = STYLES[variant]
            mean, half = confidence_band(values)
            axes.plot(steps, mean, dashes, color=colour, marker=".", label=LABELS[variant])
            axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        axes.set(title=data_set, xlabel="training step", ylabel="held-out loss of the EMA weights (MSE of the noise)")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.suptitle(f"Held-out denoising loss, mean and 95 % confidence band over {seeds} seeds")
    save_figure(figure, path)


def draw_tenths(tenths: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Final held-out loss (seeds, 10) of each tenth of the schedule, relative to sin-cos at the same seed."""
    figure = Figure(figsize=(6.2 * len(tenths), 4.6), layout="constrained")
    positions = np.arange(10)
    for axes, (data_set, by_variant) in zip(panels(figure, len(tenths)), tenths.items(), strict=True):
        axes.axhline(0, color=STYLES["sincos"][0], linewidth=1, label=LABELS["sincos"])
        for variant in (name for name in by_variant if name != "sincos"):
            colour, dashes = STYLES[variant]
            mean, half = confidence_band(100 * (by_variant[variant] / by_variant["sincos"] - 1))
            axes.plot(positions, mean, dashes, color=colour, marker=".", label=LABELS[variant])
            axes.fill_between(positions, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        axes.set_xticks(positions, [f"{100 * k}–" for k in positions])
        axes.set(
            title=data_set, xlabel="timesteps (of 1,000; 100 in each tenth)", ylabel="loss relative to sin-cos (%)"
        )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("Final held-out loss by tenth of the noise schedule, with 95 % confidence bands")
    save_figure(figure, path)


def draw_attention(found: dict[str, dict[str, dict]], data_folders: dict[str, Path], path: Path) -> None:
    """A row for each data set and variant: the image with its query tokens, then the attention map of each query."""
    rows = [(data_set, variant) for data_set, by_variant in found.items() for variant in by_variant]
    figure = Figure(figsize=(2.9 * (1 + len(QUERIES)), 2.9 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 1 + len(QUERIES), squeeze=False)
    for cells, (data_set, variant) in zip(grid, rows, strict=True):
        entry = found[data_set][variant]
        maps = np.array(entry["maps"])
        side = int(maps.shape[1] ** 0.5)
        image = Image.open(data_folders[data_set] / entry["image"])
        unit = image.width / side  # pixels of a token
        cells[0].imshow(image)
        cells[0].set_ylabel(f"{data_set}\n{LABELS[variant]}")
        for (i, j), colour in zip(QUERIES, QUERY_COLOURS, strict=True):
            mark_token(cells[0], i, j, unit, colour)
        for axes, values, (i, j), colour in zip(cells[1:], maps, QUERIES, QUERY_COLOURS, strict=True):
            picture = axes.imshow(100 * values.reshape(side, side), cmap="viridis", vmin=0)
            mark_token(axes, i, j, 1, colour, offset=0.5)
            axes.set_title(f"query (row {i}, column {j})", fontsize="medium")
            figure.colorbar(picture, ax=axes, label="attention (%)", shrink=0.8)
        for axes in cells:
            axes.set(xticks=[], yticks=[])
    figure.suptitle("Attention of three query tokens after training, mean over heads and blocks, seed 0")
    save_figure(figure, path)


def mark_token(axes, row: int, column: int, unit: float, colour: str, offset: float = 0) -> None:
    """A frame round the token at (row, column); unit is its side in the picture's pixels."""
    x, y = column * unit - offset, row * unit - offset
    axes.plot([x, x + unit, x + unit, x, x], [y, y, y + unit, y + unit, y], color=colour, linewidth=2)


def panels(figure: Figure, count: int) -> list:
    return list(figure.subplots(1, count, squeeze=False)[0])
