"""Figures of the studies."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments.comparisons import confidence_band
from experiments.evaluation import ATTENTION_TIMESTEP, QUERIES
from experiments.plan import LABELS
from runtime.monitor import save_figure, use_log_scale

STYLES = {  # colour by position encoding, dashes by border
    "sincos": ("black", "-"),
    "axial": ("C0", "-"),
    "spiral2_clamp": ("C2", "--"),
    "spiral2_exact": ("C2", "-"),
    "spiral4_clamp": ("C3", "--"),
    "spiral4_exact": ("C3", "-"),
    "same_theta2": ("C1", "--"),
}


def draw_curves(steps: np.ndarray, curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Held-out loss (seeds, steps) by step, for each data set and variant, and below it relative to axial RoPE."""
    figure, (above, below) = grid_of_panels(len(curves))
    for axes, relative, (data_set, by_variant) in zip(above, below, curves.items(), strict=True):
        draw_lines(axes, steps, by_variant)
        axes.set(title=data_set, xlabel="training step", ylabel="held-out loss (MSE of the noise)")
        use_log_scale(axes)
        draw_relative(relative, steps, by_variant, "axial", left_out=("sincos",))
        relative.set(xlabel="training step")
    seeds = len(next(iter(next(iter(curves.values())).values())))
    figure.suptitle(
        f"Held-out denoising loss of the EMA weights: mean over {seeds} seeds, 95 % confidence interval at each point"
    )
    save_figure(figure, path)


def draw_tenths(tenths: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Final held-out loss (seeds, 10) of each tenth of the schedule, relative to sin-cos, and below to axial RoPE."""
    figure, (above, below) = grid_of_panels(len(tenths))
    middles = 100 * np.arange(10) + 50
    for axes, relative, (data_set, by_variant) in zip(above, below, tenths.items(), strict=True):
        draw_relative(axes, middles, by_variant, "sincos")
        axes.legend(fontsize="small")
        axes.set(title=data_set, xlabel="timestep (middle of its tenth of the schedule)")
        draw_relative(relative, middles, by_variant, "axial", left_out=("sincos",))
        relative.set(xlabel="timestep (middle of its tenth of the schedule)")
    figure.suptitle("Final held-out loss of the EMA weights by timestep, 95 % confidence interval at each point")
    save_figure(figure, path)


def grid_of_panels(columns: int) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (2, columns)."""
    figure = Figure(figsize=(6.2 * columns, 7.8), layout="constrained")
    return figure, figure.subplots(2, columns, squeeze=False)


def draw_relative(
    axes, x: np.ndarray, by_variant: dict[str, np.ndarray], baseline: str, left_out: tuple[str, ...] = ()
) -> None:
    """Losses (seeds, points) relative to a baseline's at the same seed, in percent, side by side at every point."""
    axes.axhline(0, color=STYLES[baseline][0], linewidth=1, label=LABELS[baseline])
    others = {name: values for name, values in by_variant.items() if name not in (baseline, *left_out)}
    apart = 0.1 * (x[1] - x[0])
    for place, (variant, values) in enumerate(others.items()):
        colour, dashes = STYLES[variant]
        mean, half = confidence_band(100 * (values / by_variant[baseline] - 1))
        shifted = x + (place - (len(others) - 1) / 2) * apart
        style = {"color": colour, "linestyle": dashes, "linewidth": 1, "marker": ".", "capsize": 2}
        axes.errorbar(shifted, mean, yerr=half, label=LABELS[variant], **style)
    axes.set_ylabel(f"loss relative to {LABELS[baseline]} (%)")
    axes.grid(alpha=0.3)


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
    """A row for each query token: for each data set the image with the token, and the attention map of each variant."""
    columns = sum(1 + len(by_variant) for by_variant in found.values())
    figure = Figure(figsize=(2.6 * columns, 2.7 * len(QUERIES)), layout="constrained")
    grid = figure.subplots(len(QUERIES), columns, squeeze=False)
    for row, ((i, j), cells) in enumerate(zip(QUERIES, grid, strict=True)):
        cells = iter(cells)
        for data_set, by_variant in found.items():
            maps = {variant: 100 * np.array(entry["maps"][row]) for variant, entry in by_variant.items()}
            side, most = int(len(next(iter(maps.values()))) ** 0.5), max(values.max() for values in maps.values())
            image = Image.open(data_folders[data_set] / next(iter(by_variant.values()))["image"])
            axes = next(cells)
            axes.imshow(image)
            mark_token(axes, i, j, image.width / side)
            axes.set_title(f"{data_set}: row {i}, column {j}", fontsize="medium")
            axes.set(xticks=[], yticks=[])
            for variant, values in maps.items():
                axes = next(cells)
                picture = axes.imshow(values.reshape(side, side), cmap="viridis", vmin=0, vmax=most)
                mark_token(axes, i, j, 1, offset=0.5)
                axes.set_title(LABELS[variant], fontsize="medium")
                axes.set(xticks=[], yticks=[])
            figure.colorbar(picture, ax=axes, label="attention (%)", shrink=0.8)  # one scale for all variants
    figure.suptitle(
        f"Attention of query tokens (framed) at timestep {ATTENTION_TIMESTEP} after training, mean over heads and "
        "blocks, seed 0"
    )
    save_figure(figure, path)


def mark_token(axes, row: int, column: int, unit: float, offset: float = 0) -> None:
    """A frame round the token at (row, column); unit is its side in the picture's pixels."""
    x, y = column * unit - offset, row * unit - offset
    axes.plot([x, x + unit, x + unit, x, x], [y, y, y + unit, y + unit, y], color="C1", linewidth=2)
