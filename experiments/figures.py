"""Figures of the study of position encodings."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments.comparisons import CONFIDENCE, band
from experiments.plan import VARIANTS
from experiments.tables import Losses, Measured
from runtime.monitor import save_figure, use_log_scale


def draw_all(measured: Measured, data_folders: dict[str, Path], folder: Path) -> None:
    draw_panels(
        measured.get("runs", "val_loss_ema"),
        measured.steps,
        "training step",
        (None, "axial"),
        f"Held-out denoising loss of the EMA weights: mean over {measured.study.seeds} seeds, 95 % confidence interval "
        "at each point",
        folder / "evidence_curves.png",
    )
    draw_panels(
        measured.get("runs", "val_loss_ema_tenths"),
        100 * np.arange(10) + 50,
        "timestep (middle of its tenth of the schedule)",
        ("sincos", "axial"),
        "Final held-out loss of the EMA weights by timestep, 95 % confidence interval at each point",
        folder / "evidence_tenths.png",
    )
    draw_attention(measured, data_folders, folder / "evidence_attention.png")


def draw_panels(
    losses: Losses, x: np.ndarray, label: str, rows: tuple[str | None, ...], title: str, path: Path
) -> None:
    """A column of panels for each data set, a row for the losses (None) or for what they are relative to."""
    figure = Figure(figsize=(6.2 * len(losses), 3.9 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(losses), squeeze=False)
    for column, (data_set, by_variant) in enumerate(losses.items()):
        for row, baseline in enumerate(rows):
            axes = panels[row, column]
            if baseline is None:
                draw_lines(axes, x, by_variant)
            else:
                draw_relative(axes, x, by_variant, baseline)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3, which="both")
        panels[0, column].set_title(data_set)
        panels[0, column].legend(fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)


def draw_lines(axes, x: np.ndarray, by_variant: dict[str, np.ndarray]) -> None:
    """Mean over seeds of losses (seeds, points), with its confidence band."""
    for name, losses in by_variant.items():
        variant, (mean, half) = VARIANTS[name], band(losses, CONFIDENCE)
        axes.plot(x, mean, variant.dashes, color=variant.colour, marker=".", label=variant.label)
        axes.fill_between(x, mean - half, mean + half, color=variant.colour, alpha=0.12, linewidth=0)
    axes.set_ylabel("held-out loss (MSE of the noise)")
    use_log_scale(axes)


def draw_relative(axes, x: np.ndarray, by_variant: dict[str, np.ndarray], baseline: str) -> None:
    """Losses (seeds, points) relative to a baseline's at the same seed, in percent, side by side at every point."""
    axes.axhline(0, color=VARIANTS[baseline].colour, linewidth=1, label=VARIANTS[baseline].label)
    others = [name for name in by_variant if name not in (baseline, "sincos")]
    for place, name in enumerate(others):
        variant, (mean, half) = VARIANTS[name], band(100 * (by_variant[name] / by_variant[baseline] - 1), CONFIDENCE)
        shifted = x + (place - (len(others) - 1) / 2) * 0.1 * (x[1] - x[0])
        style = {"color": variant.colour, "linestyle": variant.dashes, "linewidth": 1, "marker": ".", "capsize": 2}
        axes.errorbar(shifted, mean, yerr=half, label=variant.label, **style)
    axes.set_ylabel(f"loss relative to {VARIANTS[baseline].label} (%)")


def draw_attention(measured: Measured, data_folders: dict[str, Path], path: Path) -> None:
    """A row for each query token: for each data set the image with the token, and the attention map of each variant."""
    study, entries = measured.study, measured.sections["attention"]
    found = {data_set: {} for data_set in data_folders}
    for run in study.compared_runs:
        if run.key in entries:
            found[run.data_set][VARIANTS[run.variant].label] = entries[run.key]
    columns = sum(1 + len(by_variant) for by_variant in found.values())
    figure = Figure(figsize=(2.6 * columns, 2.7 * len(study.queries)), layout="constrained")
    panels = figure.subplots(len(study.queries), columns, squeeze=False)
    for row, (i, j) in enumerate(study.queries):
        cells = iter(panels[row])
        for data_set, by_variant in found.items():
            maps = {label: 100 * np.array(entry["maps"][row]) for label, entry in by_variant.items()}
            side, most = int(len(next(iter(maps.values()))) ** 0.5), max(values.max() for values in maps.values())
            image = Image.open(data_folders[data_set] / next(iter(by_variant.values()))["image"])
            axes = next(cells)
            axes.imshow(image)
            frame(axes, i, j, image.width / side, f"{data_set}: row {i}, column {j}")
            for label, values in maps.items():
                axes = next(cells)
                picture = axes.imshow(values.reshape(side, side), cmap="viridis", vmin=0, vmax=most)
                frame(axes, i, j, 1, label, offset=0.5)
            figure.colorbar(picture, ax=axes, label="attention (%)", shrink=0.8)  # one scale for all variants
    figure.suptitle(
        f"Attention of query tokens (framed) at timestep {study.attention_timestep} after training, mean over heads "
        "and blocks, seed 0"
    )
    save_figure(figure, path)


def frame(axes, row: int, column: int, unit: float, title: str, offset: float = 0) -> None:
    """A title and a frame round the token at (row, column); unit is its side in the picture's pixels."""
    x, y = column * unit - offset, row * unit - offset
    axes.plot([x, x + unit, x + unit, x, x], [y, y, y + unit, y + unit, y], color="C1", linewidth=2)
    axes.set_title(title, fontsize="medium")
    axes.set(xticks=[], yticks=[])
