"""Draw Spiral RoPE: frequency directions, phases on the patch grid, and attention by position.

Everything is computed by the module that the model uses, none of it by a second formula.
"""

import argparse
import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from rope import RopeConfig, SpiralRoPE
from runtime import files, monitor, options
from runtime.options import UserError, check_rope

FORMATS = (".png", ".pdf", ".svg")
LARGEST_GRID = 512  # patches a side; phases of that many still fit in memory
HALVES = (("row half of the channels (base axis y)", "C0", "o"), ("column half (base axis x)", "C1", "D"))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="picture to write: .png, .pdf or .svg")
    add("--only", choices=list(PARTS), default=None, help="draw one part (None: all)")
    add("--head-dim", type=options.count, default=64, help="channels of an attention head: 64, DiT-XL 72")
    add("--grid", type=grid_size, default=(16, 16), help="patches, as in 16 or 16x24 (rows x columns)")
    options.add_dry_run(parser)
    options.add_rope_options(parser)
    args = parser.parse_args(argv)
    args.use_rope = True  # there is nothing else to draw
    return args


def grid_size(text: str) -> tuple[int, int]:
    """An argparse type: rows and columns of patches, from "16" or "16x24"."""
    try:
        grid = options.image_size(text)
    except argparse.ArgumentTypeError:
        grid = (math.inf, math.inf)
    if max(grid) > LARGEST_GRID:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a grid; expected patches, as in 16 or 16x24, at most {LARGEST_GRID}"
        )
    return grid


def check(args: argparse.Namespace, config: RopeConfig) -> None:
    """Raise UserError for settings that cannot be drawn."""
    if args.head_dim % 4:
        raise UserError(f"--head-dim {args.head_dim} does not fit RoPE in two dimensions; choose a multiple of 4")
    check_rope(config, args.head_dim, f"--head-dim {args.head_dim}")
    files.check_output(args.out, FORMATS)


# The mathematics of what is drawn


def frequency_vectors(head_dim: int, config: RopeConfig) -> torch.Tensor:
    """Frequency times direction of every channel pair: (D/2, 2) as (x, y) in radians per patch.

    It is the gradient of the phase, which without clamping is the same at every patch.
    """
    phases = SpiralRoPE(head_dim, 2, replace(config, border="exact")).phases(2, 2)  # (4, D/2), row-major
    return torch.stack([phases[1] - phases[0], phases[2] - phases[0]], dim=1)


def directions(head_dim: int, config: RopeConfig) -> list[list[list[int]]]:
    """Channel pairs of each half (row, column) by sub-direction r, highest frequency first.

    Where R does not divide D/8, a half may lack some of the sub-directions: those are left out.
    """
    count = max(config.rotate, 1)
    length = frequency_vectors(head_dim, config).norm(dim=1)  # (D/2,)
    halves = []
    for half in (range(head_dim // 4), range(head_dim // 4, head_dim // 2)):
        members = [[p for p in half if p // 2 % count == r] for r in range(count)]
        halves.append([sorted(pairs, key=lambda p: -float(length[p])) for pairs in members if pairs])
    return halves


def phase_map(rope: SpiralRoPE, pair: int, grid: tuple[int, int]) -> torch.Tensor:
    """Phase of one channel pair over the grid: (h, w), radians in [0, 2 pi)."""
    return rope.phases(*grid)[:, pair].remainder(2 * math.pi).reshape(grid)


def clamped(rope: SpiralRoPE, pair: int, grid: tuple[int, int]) -> torch.Tensor:
    """Patches (h, w) at which the border limits the projection of a channel pair."""
    exact = SpiralRoPE(rope.head_dim, rope.pt_grid, replace(rope.config, border="exact"))
    return (rope.phases(*grid)[:, pair] != exact.phases(*grid)[:, pair]).reshape(grid)


def similarity(rope: SpiralRoPE, grid: tuple[int, int], query: tuple[int, int]) -> torch.Tensor:
    """Cosine similarity of a constant query, rotated at one patch, and the same key rotated at every patch: (h, w).

    With all channel pairs equal, the inner product is the mean of the cosines of phase differences.
    """
    phases = rope.phases(*grid).double()  # (h*w, D/2)
    here = phases[query[0] * grid[1] + query[1]]
    return (phases - here).cos().mean(dim=1).reshape(grid)


# Drawing


def variants(config: RopeConfig) -> dict[str, RopeConfig]:
    """Axial RoPE and, unless it is the same, the Spiral RoPE of these settings."""
    axial = {"axial RoPE": replace(config, rotate=0, same_theta=False)}
    return axial if config.rotate == 0 else axial | {f"Spiral RoPE, rotate {config.rotate}": config}


def draw_directions(figure: Figure | SubFigure, head_dim: int, config: RopeConfig, _grid: tuple[int, int]) -> None:
    """Frequency vectors of all channel pairs in the frequency plane, with logarithmic radius."""
    figure.suptitle(f"Frequency vectors of the {head_dim // 2} channel pairs of a head", fontweight="bold")
    drawn = variants(config)
    vectors = [frequency_vectors(head_dim, variant).double().numpy() for variant in drawn.values()]
    limits = radial_limits(np.concatenate([np.hypot(*v.T) for v in vectors]))
    for k, ((name, variant), v) in enumerate(zip(drawn.items(), vectors, strict=True)):
        axes = figure.add_subplot(1, len(drawn), k + 1, projection="polar")
        halves, zero = directions(head_dim, variant), int((np.hypot(*v.T) == 0).sum())
        hidden = f"\n(not drawn: {zero} pairs of frequency 0)" if zero else ""
        axes.set_title(f"{name}: K = {sum(map(len, halves))} directions{hidden}")
        style_plane(axes, limits)
        draw_vectors(axes, v, halves, limits)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    axis = "from the centre: frequency in radians per patch, logarithmic; angle: direction in the image, y downwards"
    figure.legend(handles, labels, loc="outside lower center", ncols=3, title=axis, frameon=False)


def radial_limits(lengths: np.ndarray) -> tuple[float, float]:
    """Powers of ten at the centre and at the rim: around all frequencies but 0, with a whole one between them."""
    lengths = lengths[lengths > 0] if (lengths > 0).any() else np.ones(1)
    low, high = np.log10(lengths.min()), np.log10(lengths.max())
    return min(low - 0.5, math.floor(high) - 0.6), high + 0.15


def style_plane(axes, limits: tuple[float, float]) -> None:
    """Make polar axes a plane of frequencies: angles of an image whose rows run downwards, powers of ten as radius."""
    axes.set_theta_direction(-1)
    axes.set_thetagrids([0, 45, 90, 315], ["x: 0°", "45°", "y: 90°", "−45°"])
    axes.tick_params(axis="x", pad=6)
    axes.grid(False, axis="x")
    axes.grid(alpha=0.4, axis="y")
    axes.set_rlim(*limits)
    axes.set_rlabel_position(192)  # between the lines
    axes.tick_params(axis="y", labelcolor="dimgrey")
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(lambda power, _: f"$10^{{{power:.0f}}}$" if power > limits[0] + 0.4 else "")


def draw_vectors(axes, vectors: np.ndarray, halves: list[list[list[int]]], limits: tuple[float, float]) -> None:
    """One polar panel: a line for each direction, a dot for each channel pair, and a faint one opposite."""
    angle, length = np.arctan2(*vectors.T[::-1]), np.hypot(*vectors.T)
    for half, (label, colour, marker) in zip(halves, HALVES, strict=True):
        for pairs in half:
            if length[pairs[0]] == 0:
                continue
            line = np.full(2, angle[pairs[0]])
            axes.plot(line, limits, line + math.pi, limits, color=colour, alpha=0.3, lw=1, zorder=1)
        drawn = [p for pairs in half for p in pairs if length[p] > 0]
        power = np.log10(length[drawn])
        axes.plot(angle[drawn], power, marker, color=colour, ms=7, mec="white", mew=0.6, label=label)
        axes.plot(angle[drawn] + math.pi, power, marker, color=colour, alpha=0.3, ms=6, mew=0)
    axes.plot([], [], "o", color="grey", alpha=0.5, ms=6, mew=0, label="opposite vector: the same wave")


def draw_phases(figure: Figure | SubFigure, head_dim: int, config: RopeConfig, grid: tuple[int, int]) -> None:
    """Phase of the fastest channel pair of every direction; perpendicular directions stand below each other."""
    rope, vectors = SpiralRoPE(head_dim, grid, config), frequency_vectors(head_dim, config)
    halves = directions(head_dim, config)
    dots = " (dots: patches whose projection is clamped)" if config.border == "clamp" and config.rotate > 1 else ""
    title = f"Phase of the fastest channel pair of each direction; border: {config.border}{dots}"
    figure.suptitle(title, fontweight="bold")
    rows, columns = phase_panels(halves)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panels, half, name in zip(axes.reshape(2, -1), halves, ("row half", "column half"), strict=True):
        for panel, pairs in zip(panels, half, strict=True):
            x, y = vectors[pairs[0]].tolist()
            phase = phase_map(rope, pairs[0], grid).numpy()
            image = panel.imshow(phase, cmap="twilight", vmin=0, vmax=2 * math.pi, interpolation="nearest")
            i, j = clamped(rope, pairs[0], grid).nonzero().T.numpy()
            panel.plot(j, i, ".", color="white", mec="black", mew=0.4, ms=max(2, 80 / max(grid)))
            angle = f"{math.degrees(math.atan2(y, x)):.4g}°".replace("-", "−")
            title = f"{angle}\n{math.hypot(x, y):.3g} rad/patch" if math.hypot(x, y) > 0 else "frequency 0"
            panel.set_title(title, fontsize="medium")
        panels[0].set_ylabel(f"{name}\ny (patches)")
    style_grid(axes)
    bar = figure.colorbar(image, ax=axes, ticks=[0, math.pi, 2 * math.pi], pad=0.01, label="phase modulo 2π (radians)")
    bar.ax.set_yticklabels(["0", "π", "2π"])


def phase_panels(halves: list[list[list[int]]]) -> tuple[int, int]:
    """Rows and columns of the phase maps: a row for each half, or one of two maps where each has one direction."""
    return (2, len(halves[0])) if len(halves[0]) > 1 else (1, 2)


def style_grid(axes: np.ndarray) -> None:
    """Whole numbers of patches at the ticks of panels (rows, columns)."""
    for panel in axes.flat:
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    for panel in axes[-1]:
        panel.set_xlabel("x (patches)")


def draw_similarity(figure: Figure | SubFigure, head_dim: int, config: RopeConfig, grid: tuple[int, int]) -> None:
    """Similarity of one patch to all by position alone, and what clamping changes in it."""
    query = (grid[0] // 4, grid[1] // 4)  # where clamping matters and does not hide the rest
    compared = {"axial RoPE": variants(config)["axial RoPE"]}
    if config.rotate > 0:
        compared |= {f"Spiral RoPE, {border}": replace(config, border=border) for border in ("clamp", "exact")}
    maps = {title: similarity(SpiralRoPE(head_dim, grid, c), grid, query).numpy() for title, c in compared.items()}
    title = f"Similarity of a constant query at row {query[0]}, column {query[1]} to the same key at every patch"
    figure.suptitle(title, fontweight="bold")
    axes = figure.subplots(1, len(maps) + (len(maps) > 1), squeeze=False, sharex=True, sharey=True)
    lowest = min(float(values.min()) for values in maps.values())
    for panel, (title, values) in zip(axes[0], maps.items(), strict=False):
        image = panel.imshow(values, cmap="viridis", vmin=lowest, vmax=1)
        panel.set_title(title)
    add_scale(figure, image, axes[0, len(maps) - 1], "cosine\nsimilarity")
    if len(maps) > 1:
        panel, change = axes[0, -1], maps["Spiral RoPE, clamp"] - maps["Spiral RoPE, exact"]
        widest = float(np.abs(change).max()) or 1.0  # of a scale centred at 0, also where there is nothing to show
        image = panel.imshow(change, cmap="RdBu_r", norm=CenteredNorm(halfrange=widest))
        panel.set_title("clamp minus exact")
        add_scale(figure, image, panel, "difference of\nsimilarities")
    for panel in axes[0]:
        panel.plot(query[1], query[0], "*", color="white", mec="black", ms=14, ls="none", label="query")
    style_grid(axes)
    axes[0, 0].set_ylabel("y (patches)")
    axes[0, 0].legend(loc="lower right")


def add_scale(figure: Figure | SubFigure, image, panel, label: str) -> None:
    """A colour scale as high as the panel at its right, with the label on top, away from the next panel."""
    scale = figure.colorbar(image, cax=panel.inset_axes([1.04, 0, 0.06, 1]))
    scale.ax.set_title(label, fontsize="small")


PARTS = {"directions": draw_directions, "phases": draw_phases, "similarity": draw_similarity}


def draw(head_dim: int, config: RopeConfig, grid: tuple[int, int], parts: list[str]) -> Figure:
    """The picture of these settings, its parts one below the other."""
    rows, columns = phase_panels(directions(head_dim, config))
    width = 9.5 if parts == ["directions"] else max(12.0, 1.3 * columns)  # inches, as all that follow
    tall = min(grid[0] / grid[1], 2)
    height_of = {
        "directions": min(width, 12) / 2 + 1.1,
        "phases": rows * min((width - 1.5) / columns, 2.4) * tall + 2,
        "similarity": (width - 2) / 5 * tall + 1.8,
    }
    heights = [height_of[part] for part in parts]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    below = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, place in zip(parts, below, strict=True):
        PARTS[part](place, head_dim, config, grid)
    return figure


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = options.rope_from_args(args)
    check(args, config)
    parts = [args.only] if args.only else list(PARTS)
    if args.dry_run:
        return print(f"dry run: would draw {', '.join(parts)} into {args.out}; nothing was written")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = draw(args.head_dim, config, args.grid, parts)
    for message in sorted({str(warning.message) for warning in caught}):  # the same one for each table built
        print(f"warning: {message}")
    with files.cannot_write(f"--out {str(args.out)!r}"):
        monitor.save_figure(figure, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
