"""Figures of the study of position encodings."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from experiments.comparisons import CONFIDENCE, band
from experiments.plan import TOKEN, VARIANTS, Losses, Run, Study
from runtime.monitor import save_figure, use_log_scale


def draw_all(study: Study, sections: dict[str, dict], data_dir: Path, folder: Path) -> None:
    runs = sections["runs"]
    draw_panels(
        study.collect(runs, "val_loss_ema"),
        np.array(next(iter(runs.values()))["step"]),
        "training step",
        (None, "axial"),
        f"Held-out denoising loss of the EMA weights: mean over {study.seeds} seeds, 95 % confidence interval "
        "at each point",
        folder / "evidence_curves.png",
    )
    draw_panels(
        study.collect(runs, "val_loss_ema_tenths"),
        100 * np.arange(10) + 50,
        "timestep (middle of its tenth of the schedule)",
        ("sincos", "axial"),
        "Final held-out loss of the EMA weights by timestep, 95 % confidence interval at each point",
        folder / "evidence_tenths.png",
    )
    draw_attention(study, sections["attention"], data_dir, folder / "evidence_attention.png")


def draw_panels(
    losses: Losses, x: np.ndarray, label: str, rows: tuple[str | None, ...], title: str, path: Path
) -> None:
    """A column of panels for each data set, a row for the losses (None) or for what they are relative to."""
    data_sets = list(dict.fromkeys(data_set for data_set, _ in losses))
    figure = Figure(figsize=(6.2 * len(data_sets), 3.9 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(data_sets), squeeze=False)
    for column, data_set in zip(panels.T, data_sets, strict=True):
        by_variant = {variant: values for (part, variant), values in losses.items() if part == data_set}
        for axes, baseline in zip(column, rows, strict=True):
            if baseline is None:
                draw_losses(axes, x, by_variant)
            else:
                draw_relative(axes, x, by_variant, baseline)
            axes.set_xlabel(label)
            axes.grid(alpha=0.3, which="both")
        column[0].set_title(data_set)
        column[0].legend(fontsize="small")
    figure.suptitle(title)
    save_figure(figure, path)


def draw_losses(axes, x: np.ndarray, by_variant: dict[str, np.ndarray]) -> None:
    """Losses (seeds, points) of every variant."""
    for name, losses in by_variant.items():
        variant = VARIANTS[name]
        draw_band(axes, x, *band(losses, CONFIDENCE), variant.label, variant.colour, variant.dashes, opacity=0.12)
    axes.set_ylabel("held-out loss (MSE of the noise)")
    use_log_scale(axes)


def draw_band(axes, x, mean, half, label: str, colour: str, dashes: str = "-", opacity: float = 0.2) -> None:
    """A mean with its interval, of which at least a tenth of the mean is left: axes are logarithmic."""
    axes.plot(x, mean, dashes, color=colour, marker=".", label=label)
    low = np.maximum(mean - half, mean / 10)
    axes.fill_between(x, low, mean + half, color=colour, alpha=opacity, linewidth=0)


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


def draw_attention(study: Study, entries: dict[str, dict], data_dir: Path, path: Path) -> None:
    """A row for each query token: for each data set the image with the token, and the attention map of each variant."""
    columns = len(study.variants) * (1 + len(study.attention_variants))
    figure = Figure(figsize=(2.6 * columns, 2.7 * len(study.queries)), layout="constrained")
    panels = figure.subplots(len(study.queries), columns, squeeze=False)
    for place, (i, j) in enumerate(study.queries):
        cells = iter(panels[place])
        for data_set in study.variants:
            keys = {variant: Run(data_set, variant, study.lr, 0).key for variant in study.attention_variants}
            maps = {variant: 100 * np.array(entries[key]["maps"][place]) for variant, key in keys.items()}
            side, most = study.image_size // TOKEN, max(values.max() for values in maps.values())
            axes = next(cells)
            axes.imshow(Image.open(data_dir / data_set / "val" / study.attention_images[data_set]))
            frame(axes, i, j, TOKEN, f"{data_set}: row {i}, column {j}")
            for variant, values in maps.items():
                axes = next(cells)
                picture = axes.imshow(values.reshape(side, side), cmap="viridis", vmin=0, vmax=most)
                frame(axes, i, j, 1, VARIANTS[variant].label, offset=0.5)
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
