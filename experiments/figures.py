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


def draw_curves(steps: np.ndarray, curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Held-out loss (seeds, steps) by step, for each data set and variant, and below it relative to axial RoPE."""
    figure, (above, below) = grid_of_panels(len(curves))
    for axes, relative, (data_set, by_variant) in zip(above, below, curves.items(), strict=True):
        draw_lines(axes, steps, by_variant)
        axes.set(title=data_set, xlabel="training step", ylabel="held-out loss (MSE of the noise)", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        draw_relative(relative, steps, by_variant, "axial", left_out=("sincos",))
        relative.set(xlabel="training step")
    seeds = len(next(iter(next(iter(curves.values())).values())))
    figure.suptitle(f"Held-out denoising loss of the EMA weights: mean over {seeds} seeds, 95 % confidence bands")
    save_figure(figure, path)


def draw_tenths(tenths: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Final held-out loss (seeds, 10) of each tenth of the schedule, relative to sin-cos, and below to axial RoPE."""
    figure, (above, below) = grid_of_panels(len(tenths))
    middles = 100 * np.arange(10) + 50
    for axes, relative, (data_set, by_variant) in zip(above, below, tenths.items(), strict=True):
        draw_relative(axes, middles, by_variant, "sincos")
        axes.set(title=data_set, xlabel="timestep (middle of its tenth of the schedule)")
        draw_relative(relative, middles, by_variant, "axial", left_out=("sincos",))
        relative.set(xlabel="timestep (middle of its tenth of the schedule)")
    figure.suptitle("Final held-out loss of the EMA weights by timestep, with 95 % confidence bands")
    save_figure(figure, path)


def grid_of_panels(columns: int) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (2, columns)."""
    figure = Figure(figsize=(6.2 * columns, 7.8), layout="constrained")
    return figure, figure.subplots(2, columns, squeeze=False)


def draw_relative(
    axes, x: np.ndarray, by_variant: dict[str, np.ndarray], baseline: str, left_out: tuple[str, ...] = ()
) -> None:
    """Losses (seeds, points) relative to a baseline's at the same seed, in percent."""
    axes.axhline(0, color=STYLES[baseline][0], linewidth=1, label=LABELS[baseline])
    others = {name: values for name, values in by_variant.items() if name not in (baseline, *left_out)}
    draw_lines(axes, x, {name: 100 * (values / by_variant[baseline] - 1) for name, values in others.items()})
    axes.set_ylabel(f"loss relative to {LABELS[baseline]} (%)")


def draw_lines(axes, x: np.ndarray, by_variant: dict[str, np.ndarray]) -> None:
    """Mean over seeds of values (seeds, points), with its confidence band."""
    for variant, values in by_variant.items():
        colour, dashes = STYLES[variant]
        mean, half = confidence_band(values)
        axes.plot(x, mean, dashes, color=colour, marker=".", label=LABELS[variant])
        axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.12, linewidth=0)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")


def draw_attention(found: dict[str, dict[str, dict]], data_folders: dict[str, Path], path: Path) -> None:
    """A row for each data set and variant: the image with its query tokens, then the attention map of each query."""
    rows = [(data_set, variant) for data_set, by_variant in found.items() for variant in by_variant]
    figure = Figure(figsize=(2.9 * (1 + len(QUERIES)), 2.9 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 1 + len(QUERIES), squeeze=False)
    for cells, (data_set, variant) in zip(grid, rows, strict=True):
        entry = found[data_set][variant]
        maps = np.array(entry["maps"])
        most = np.max([other["maps"] for other in found[data_set].values()], axis=(0, 2))  # one scale for each query
        side = int(maps.shape[1] ** 0.5)
        image = Image.open(data_folders[data_set] / entry["image"])
        unit = image.width / side  # pixels of a token
        cells[0].imshow(image)
        cells[0].set_ylabel(f"{data_set}\n{LABELS[variant]}")
        for (i, j), colour in zip(QUERIES, QUERY_COLOURS, strict=True):
            mark_token(cells[0], i, j, unit, colour)
        for axes, values, top, (i, j), colour in zip(cells[1:], maps, most, QUERIES, QUERY_COLOURS, strict=True):
            picture = axes.imshow(100 * values.reshape(side, side), cmap="viridis", vmin=0, vmax=100 * top)
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
