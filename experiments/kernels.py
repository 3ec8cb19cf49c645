"""The attention pattern that one head can form with a rotary encoding, at its best: exact, without training.

With RoPE the score of a query for a key is a sum over channel pairs of |c| cos(phase difference + angle of c), with a
complex coefficient c that query and key choose freely. The attention patterns of all coefficients are an exponential
family, so the member closest to a wanted pattern (least Kullback-Leibler divergence) is the solution of a convex
problem. The sum of |c| is bounded by |q| |k| / sqrt(D), the largest score a head can give, and every c within that
bound is within the reach of some q and k of these norms: the bound is a head's budget.
"""

import argparse
import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator, PercentFormatter

from experiments.comparisons import table
from rope import RopeConfig, SpiralRoPE, valid_rotations
from runtime import files, monitor, options

ASPECT = 5.7  # long axis / short axis of the wanted pattern
FREE = 1e3  # a budget that no head has, as good as no bound for most settings
TOLERANCE = 1e-6  # nats that a divergence may be above the least; the pattern is then within 0.001 of the best one
CENTRED = 1e-2  # Newton decrement, squared, below which one more step is all that a weight of the barrier gets
SIGMAS, BUDGETS = (0.7, 1.5), (8, 32, FREE)  # of the tables
ANGLES = (0, 22.5, 45, 67.5)  # degrees; Spiral RoPE sees the same image turned by 90 degrees
SAME, SMALL = {"same_theta": True}, {"theta": 100.0}
IMAGES, WIDTH = Path(__file__).resolve().parent.parent / "docs" / "images", 11  # inches, twice README's width in pixels
AXIAL, PAPER = RopeConfig(), RopeConfig(rotate=4, border="exact")  # and what Spiral RoPE is in the paper


class Fit(NamedTuple):
    """The best pattern of a head."""

    pattern: np.ndarray  # (Q, N) attention of each query over the patches
    divergence: float  # KL(wanted || pattern) in nats, mean over queries
    error: float  # total variation between wanted and pattern, mean over queries: 0 the same, 1 disjoint
    coefficients: np.ndarray  # (D/2, 2), multiplying cosines and sines
    gap: float  # divergence is above the least possible by at most this


def features(encoding: SpiralRoPE, grid: tuple[int, int], queries: np.ndarray) -> np.ndarray:
    """Cosines and sines of the phase differences of each query patch to all patches: (Q, N, D/2, 2) float64."""
    phases = encoding.phases(*grid).double().detach().numpy()  # (N, D/2)
    difference = phases - phases[queries, None]
    return np.stack([np.cos(difference), np.sin(difference)], axis=-1)


def oriented(grid: tuple[int, int], queries: np.ndarray, degrees: float, sigma: float) -> np.ndarray:
    """Gaussian about each query, sigma patches wide and ASPECT times as long: (Q, N), each of sum 1 within the grid.

    The long axis is degrees away from the x axis; y counts downwards.
    """
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    x, y = x - x[queries, None], y - y[queries, None]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    along, across = x * cos + y * sin, y * cos - x * sin
    density = np.exp(-((along / ASPECT) ** 2 + across**2) / (2 * sigma**2))
    return density / density.sum(axis=1, keepdims=True)


def best(features: np.ndarray, wanted: np.ndarray, budget: float = FREE) -> Fit:
    """The pattern closest to the wanted (Q, N) with a sum of |c| of at most budget.

    A barrier method (Boyd and Vandenberghe, Convex Optimization, section 11.3) on coefficients c and their bounds
    s >= |c|: Newton's method on weight * divergence - sum log(s^2 - |c|^2) - log(budget - sum s), for growing weights.
    """
    queries, patches, pairs, _ = features.shape
    flat = features.reshape(queries, patches, 2 * pairs)
    target = np.einsum("qn,qnd->d", wanted, flat) / queries
    entropy = -np.sum(wanted * np.log(np.maximum(wanted, 1e-300))) / queries

    def divergence(c: np.ndarray) -> tuple[float, np.ndarray]:
        score = flat @ c.ravel()  # (Q, N)
        largest = score.max(axis=1, keepdims=True)
        weight = np.exp(score - largest)
        total = weight.sum(axis=1, keepdims=True)
        return float(np.mean(np.log(total) + largest) - target @ c.ravel() - entropy), weight / total

    def barrier(c: np.ndarray, s: np.ndarray) -> float:
        length = np.hypot(*c.T)
        inside = (s > length).all() and s.sum() < budget
        return -np.log((s - length) * (s + length)).sum() - math.log(budget - s.sum()) if inside else math.inf

    c, s, weight = np.zeros((pairs, 2)), np.full(pairs, budget / (2 * pairs)), 1.0
    while True:
        value, pattern = divergence(c)
        mean = (pattern[:, None] @ flat)[:, 0]  # (Q, 2P)
        gradient = mean.mean(0) - target  # (2P,)
        # The divergence is convex: over all c of the budget it falls by at most what its tangent does.
        gap = float(gradient @ c.ravel() + budget * np.hypot(*gradient.reshape(-1, 2).T).max())
        if gap < TOLERANCE:
            error = np.abs(pattern - wanted).sum(1).mean() / 2
            return Fit(pattern, value, float(error), c, gap)
        centred = ((flat - mean[:, None]) * np.sqrt(pattern)[..., None]).reshape(-1, 2 * pairs)
        step, decrement = newton_step(c, s, weight * gradient, weight / queries * (centred.T @ centred), budget)
        now, size = weight * value + barrier(c, s), 1.0
        while True:
            new_c, new_s = c + size * step[: 2 * pairs].reshape(-1, 2), s + size * step[2 * pairs :]
            bounds = barrier(new_c, new_s)
            # Where Newton's method converges quadratically full steps need no test, which rounding would fail.
            if decrement < CENTRED or weight * divergence(new_c)[0] + bounds <= now - size * decrement / 4:
                break
            size /= 2
            assert size > 1e-8, f"no progress at a gap of {gap:.1e} nats"
        c, s, weight = new_c, new_s, weight * (10 if decrement < CENTRED else 1)


def newton_step(c: np.ndarray, s: np.ndarray, gradient: np.ndarray, curvature: np.ndarray, budget: float):
    """Newton's step for (c, s), 3P numbers, with the barrier added to gradient and curvature, and its decrement."""
    pairs, room, length = len(s), budget - s.sum(), np.hypot(*c.T)
    slack = (s - length) * (s + length)
    slope, hessian = np.zeros(3 * pairs), np.zeros((3 * pairs, 3 * pairs))
    place = np.stack([*np.arange(2 * pairs).reshape(-1, 2).T, np.arange(2 * pairs, 3 * pairs)], axis=1)  # (P, 3)
    cone = np.column_stack([2 * c, -2 * s]) / slack[:, None]  # gradient of -log(s^2 - |c|^2)
    slope[place] = cone
    hessian[place[:, :, None], place[:, None]] = (
        cone[:, :, None] * cone[:, None] + np.diag([2, 2, -2]) / slack[:, None, None]
    )
    slope[2 * pairs :] += 1 / room
    hessian[2 * pairs :, 2 * pairs :] += 1 / room**2
    slope[: 2 * pairs] += gradient
    hessian[: 2 * pairs, : 2 * pairs] += curvature
    scale = np.sqrt(np.diag(hessian))  # they differ by many orders
    step = -np.linalg.solve(hessian / scale / scale[:, None], slope / scale) / scale
    return step, float(-slope @ step)


# What is compared


def query_places(grid: int, per_side: int) -> np.ndarray:
    """The patch in the middle, or per_side x per_side patches from corner to corner of a grid."""
    rows = np.linspace(0, grid - 1, per_side).round().astype(int) if per_side > 1 else np.array([grid // 2])
    return (rows[:, None] * grid + rows).ravel()


def fits(
    config: RopeConfig,
    angles: Iterable[float],
    sigma: float,
    budget: float = FREE,
    head_dim: int = 64,
    grid: int = 15,
    per_side: int = 1,
) -> list[Fit]:
    """The best pattern at each angle, of a model built for this grid.

    The one query in the middle of 15 x 15 patches sees all offsets up to 7, which is all there is to know with the
    exact border. With clamp, offsets are not all: one set of coefficients serves per_side x per_side query places.
    """
    queries = query_places(grid, per_side)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of directions unevenly spread: that is a thing to measure
        waves = features(SpiralRoPE(head_dim, grid, config), (grid, grid), queries)
    return [best(waves, oriented((grid, grid), queries, angle, sigma), budget) for angle in angles]


def label(config: RopeConfig) -> str:
    """The settings that are not the default, as in "Spiral R = 4, theta 100"; the border where it is clamp."""
    if config.rotate == 0:
        return "axial"
    given = {key: value for key, value in vars(config).items() if value != getattr(PAPER, key) and key != "rotate"}
    words = [f"{key} {value:g}" if isinstance(value, float) else key for key, value in given.items()]
    words = [getattr(config, word) if word in ("border", "freqs_for") else word for word in words]
    return ", ".join([f"Spiral R = {config.rotate}", *words])


def angles_table(configs: Iterable[RopeConfig]) -> str:
    """Error by width, angle and budget."""
    rows = []
    for config, budget in product(configs, BUDGETS):
        row = {"encoding": label(config), "budget": f"{budget:,.0f}"}
        for sigma in SIGMAS:
            for angle, fit in zip((*ANGLES, 90), fits(config, (*ANGLES, 90), sigma, budget), strict=True):
                row[f"σ {sigma}, {angle:g}°"] = f"{fit.error:.2f}"
        rows.append(row)
    return table(rows)


def settings_table(configs: Iterable[RopeConfig], **place: int) -> str:
    """Error by settings, width and budget: the mean over the angles, and the largest in brackets."""
    rows = []
    for config in configs:
        row = {"encoding": label(config)}
        for sigma, budget in product(SIGMAS, BUDGETS):
            found = [fit.error for fit in fits(config, ANGLES, sigma, budget, **place)]
            row[f"σ {sigma}, budget {budget:,.0f}"] = f"{np.mean(found):.2f} ({max(found):.2f})"
        rows.append(row)
    return table(rows)


def all_tables() -> str:
    """The tables of docs/evidence.md, in their order."""
    tables = [angles_table([AXIAL, PAPER, replace(PAPER, **SAME)])]
    directions = [replace(PAPER, rotate=rotate, same_theta=same) for same in (False, True) for rotate in (2, 4, 8)]
    bases = [replace(PAPER, theta=theta, same_theta=same) for same in (False, True) for theta in (1e3, 1e2, 1e1)]
    highest = [replace(PAPER, max_freq_lang=value) for value in (0.75, 3.0)]
    tables += [settings_table([AXIAL, *directions, *bases, *highest, replace(PAPER, freqs_for="pixel")])]
    extra_large = [replace(PAPER, rotate=3, **change) for change in ({}, SAME, SMALL, SAME | SMALL)]
    tables += [settings_table([AXIAL, *extra_large, replace(PAPER, rotate=9)], head_dim=72)]
    borders = [replace(PAPER, border=border, **more) for more in ({}, SAME | SMALL) for border in ("exact", "clamp")]
    tables += [settings_table([AXIAL, *borders], grid=grid, per_side=4) for grid in (16, 32)]
    return "\n\n".join(tables)


# Pictures


def draw_patterns(config: RopeConfig, head_dim: int, sigma: float, budget: float) -> Figure:
    """Wanted pattern, best of axial RoPE, best of these settings, for a query in the middle, at several angles."""
    angles = (*ANGLES, 90)
    rows = {"wanted": None, "best that\naxial RoPE\ncan do": fits(AXIAL, angles, sigma, budget, head_dim)}
    rows |= {"best that\nSpiral RoPE\ncan do": fits(config, angles, sigma, budget, head_dim)}
    figure = Figure(figsize=(WIDTH, 7), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # inches: on a dark page the margin shows
    figure.suptitle("Can one attention head look along a line through its patch?", fontsize=20)
    for line, (name, found) in zip(figure.subplots(len(rows), len(angles)), rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=18, labelpad=14)
        for k, (panel, angle) in enumerate(zip(line, angles, strict=True)):
            wanted = oriented((15, 15), query_places(15, 1), angle, sigma)
            pattern = wanted if found is None else found[k].pattern
            panel.imshow(pattern.reshape(15, 15), cmap="magma", vmin=0, vmax=0.75 * wanted.max())
            panel.set(xticks=[], yticks=[])
            note = f"{angle:g}°" if found is None else f"{100 * found[k].error:.0f} % misplaced"
            panel.set_title(note, fontsize=16, pad=5, color="black" if found is None or found[k].error < 0.1 else "C3")
    return figure


def compared(config: RopeConfig, head_dim: int) -> list[RopeConfig]:
    """Axial RoPE, these settings, and the same with SAME, with SMALL, and with both."""
    changed = [replace(config, **change) for change in ({}, SAME, SMALL, SAME | SMALL)]
    fitting = [c for c in changed if c.rotate in valid_rotations(head_dim, c.same_theta)]
    return list(dict.fromkeys([AXIAL, *fitting]))


def draw_errors(config: RopeConfig, head_dim: int, sigma: float, budget: float) -> Figure:
    """Error around the clock, by width of the pattern, and by budget: a line for each encoding."""
    figure = Figure(figsize=(WIDTH, 5.5), layout="constrained")
    clock = figure.add_subplot(1, 3, 1, projection="polar", theta_direction=-1)
    clock.set_rlabel_position(-22.5)
    clock.set_title(f"misplaced by angle\n(σ = {sigma:g}, budget {budget:g})")
    wide, rich = figure.add_subplot(1, 3, 2), figure.add_subplot(1, 3, 3)
    wide.set(xlabel="short axis σ, patches", title=f"by width of the line\n(mean over angles, budget {budget:g})")
    rich.set(xlabel="budget |q| |k| / √D", title=f"by budget\n(mean over angles, σ = {sigma:g})", xscale="log")
    angles, sigmas, budgets = np.arange(0, 180, 11.25), (0.5, 0.7, 1, 1.5, 2, 3), (4, 8, 16, 32, 64, 128, 256, 512)
    for variant in compared(config, head_dim):
        around = [fit.error for fit in fits(variant, angles, sigma, budget, head_dim)]
        angle = np.radians(np.append(np.concatenate([angles, angles + 180]), 360))
        clock.plot(angle, [*around, *around, around[0]], label=label(variant))

        def mean(sigma: float, budget: float, variant=variant) -> float:
            return np.mean([fit.error for fit in fits(variant, ANGLES, sigma, budget, head_dim)])

        wide.plot(sigmas, [mean(value, budget) for value in sigmas], marker=".")
        rich.plot(budgets, [mean(sigma, value) for value in budgets], marker=".")
    rich.set_xticks(budgets[::2], budgets[::2])
    rich.minorticks_off()
    for panel in (clock, wide, rich):
        panel.yaxis.set_major_locator(MultipleLocator(0.2 if panel is clock else 0.1))
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.set_ylim(0)
        panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


# The command

BUDGET = options.number(float, 0, FREE, open_low=True)  # with more, double precision does not prove the optimum


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--figures", type=Path, default=IMAGES, help="folder for kernels.png and kernels_errors.png")
    add("--tables", action="store_true", help="print the tables of docs/evidence.md; draw nothing")
    add("--head-dim", type=options.count, default=64, help="channels of an attention head: 64, DiT-XL 72")
    add("--sigma", type=options.positive, default=SIGMAS[0], help="short axis of the wanted pattern, patches")
    add("--budget", type=BUDGET, default=32, help="largest score of a head, |q| |k| / sqrt(D), where errors are drawn")
    options.add_dry_run(parser)
    options.add_rope_options(parser)
    args = parser.parse_args(argv)
    args.use_rope = True  # there is nothing else to measure
    return args


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config = RopeConfig(**{"rotate": PAPER.rotate, "border": PAPER.border} | options.given_rope_options(args))
    options.check_rope(config, args.head_dim, f"--head-dim {args.head_dim}")
    pictures = {args.figures / "kernels.png": (draw_patterns, FREE)}
    pictures |= {args.figures / "kernels_errors.png": (draw_errors, args.budget)}
    for path in pictures:
        files.check_output(path, (), "--figures")
    if args.dry_run:
        return print(f"dry run: would {'print tables' if args.tables else f'draw {label(config)} into {args.figures}'}")
    if args.tables:
        return print(all_tables())
    for path, (draw, budget) in pictures.items():
        with files.cannot_write(f"--figures {str(args.figures)!r}"):
            monitor.save_figure(draw(config, args.head_dim, args.sigma, budget), path)
        print(f"picture: {path}")


if __name__ == "__main__":
    main()
