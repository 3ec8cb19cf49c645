"""The tables of the study of position encodings, in markdown."""

import numpy as np

from experiments.comparisons import Comparison, bootstrap_interval, compare, detectable, steps_to_reach
from experiments.plan import BASELINES, VARIANTS, Run, Study

SIGNIFICANT = 0.05
TENTHS = [f"{100 * k}–{100 * k + 99}" for k in range(10)]  # timesteps
TOKEN = 16  # pixels of a token's side: a down-sampling of 8, patches of 2

Losses = dict[str, dict[str, np.ndarray]]  # by data set and variant: (seeds, ...)


class Measured:
    """The results of a study as arrays over its seeds."""

    def __init__(self, study: Study, sections: dict[str, dict]):
        self.study, self.sections = study, sections
        self.steps = np.array(sections["runs"][study.compared_runs[0].key]["step"])

    def get(self, section: str, name: str, variants: tuple[str, ...] = tuple(VARIANTS)) -> Losses:
        study, entries = self.study, self.sections[section]
        return {
            data_set: {
                variant: np.array(
                    [entries[Run(data_set, variant, study.lr, seed).key][name] for seed in range(study.seeds)]
                )
                for variant in trained
                if variant in variants
            }
            for data_set, trained in study.variants.items()
        }


def all_tables(measured: Measured) -> str:
    """Every table under its title."""
    averaged, tenths = measured.get("runs", "val_loss_ema"), measured.get("runs", "val_loss_ema_tenths")
    tables = {
        "Held-out loss": final_losses(measured),
        "Paired differences of the final loss": final_differences(averaged),
        "Differences by training step": differences(averaged, [f"step {step:,}" for step in measured.steps]),
        "Loss by timestep": losses_by_tenth(tenths),
        "Differences by timestep": differences(tenths, TENTHS),
        "Beyond the training grid": beyond_grid(measured),
        "Translation": translation(measured),
    }
    if measured.study.sweep_lrs:
        tables["Learning rate"] = sweep(measured)
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in tables.items())


def final_losses(measured: Measured) -> str:
    raw, averaged = measured.get("runs", "val_loss"), measured.get("runs", "val_loss_ema")
    rows = []
    for data_set, variant in each(averaged):
        cells = [plus_minus(losses[data_set][variant][:, -1]) for losses in (averaged, raw)]
        cells += [steps_to_sincos(measured.steps, losses[data_set], variant) for losses in (averaged, raw)]
        rows.append([data_set, VARIANTS[variant].label, *cells])
    heads = ["data", "position encoding", "loss, EMA weights", "loss, raw weights"]
    return table(heads + [f"steps to sin-cos's final loss, {weights}" for weights in ("EMA", "raw")], rows)


def steps_to_sincos(steps: np.ndarray, curves: dict[str, np.ndarray], variant: str) -> str:
    """Mean ± standard deviation of the steps at which each seed reaches sin-cos's final loss."""
    curve_pairs = zip(curves[variant], curves["sincos"], strict=True)
    reached = np.array([steps_to_reach(steps, curve, sincos[-1]) for curve, sincos in curve_pairs])
    if not np.isfinite(reached).all():
        return f"not reached by {int((~np.isfinite(reached)).sum())} of {len(reached)} seeds"
    bound = "≤ " if (reached == steps[0]).any() else ""  # that seed was there before it was first measured
    return f"{bound}{reached.mean():.0f} ± {reached.std(ddof=1):.0f}"


def final_differences(averaged: Losses) -> str:
    compared = compare(
        {data_set: {name: losses[:, -1:] for name, losses in part.items()} for data_set, part in averaged.items()},
        by_baseline=False,
    )
    rows = []
    for item in compared:
        found, mean = item.differences[:, 0], item.others.mean()
        low, high = bootstrap_interval(found)
        levels = (SIGNIFICANT, SIGNIFICANT / len(compared))
        alone, first = (f"{100 * detectable(found, level) / mean:.1f} %" for level in levels)
        rows.append(
            [
                item.data_set,
                pair_name(item),
                f"{found.mean():+.5f}",
                f"[{low:+.5f}, {high:+.5f}]",
                f"{100 * item.relative[0]:+.2f} %",
                p_value(item.p[0]),
                p_value(item.p_holm[0]),
                f"{alone} ({first})",
            ]
        )
    heads = ["data", "pair", "difference", "95 % bootstrap interval", "relative", "p", f"p, Holm over {len(compared)}"]
    return table([*heads, "would be found"], rows)


def differences(losses: Losses, points: list[str]) -> str:
    """Relative difference of every pair at each point, marked by p."""
    compared = compare(losses, by_baseline=True)
    rows = []
    for item in compared:
        cells = [f"{100 * item.relative[k]:+.1f} %{mark(item, k)}" for k in range(len(points))]
        rows.append([item.data_set, pair_name(item), *cells])
    return f"{table(['data', 'pair', *points], rows)}\n\n{tally(compared)}"


def mark(item: Comparison, point: int) -> str:
    """Two daggers at a corrected p below 0.05, one at a p below 0.05 that is not."""
    return " ‡" if item.p_holm[point] < SIGNIFICANT else " †" if item.p[point] < SIGNIFICANT else ""


def tally(compared: list[Comparison]) -> str:
    """What the marks say, and how many differences have them, by baseline."""
    parts = []
    for baseline in dict.fromkeys(item.baseline for item in compared):
        family = [item for item in compared if item.baseline == baseline]
        single, held = ((np.concatenate(p) < SIGNIFICANT) for p in zip(*((x.p, x.p_holm) for x in family), strict=True))
        parts.append(f"against {BASELINES[baseline]} {single.sum()} of {single.size}, {held.sum()} after correction")
    return (
        f"†: p below {SIGNIFICANT:g} (paired t-test); ‡: also after Holm's correction over everything in this table "
        f"with the same baseline. At p below {SIGNIFICANT:g}: {'; '.join(parts)}."
    )


def losses_by_tenth(tenths: Losses) -> str:
    rows = []
    for data_set, variant in each(tenths):
        rows.append([data_set, VARIANTS[variant].label, *(f"{loss:.4f}" for loss in tenths[data_set][variant].mean(0))])
    return table(["data", "position encoding", *TENTHS], rows)


def beyond_grid(measured: Measured) -> str:
    study = measured.study
    places = [("trained", "as trained", study.image_size, "–")] + [
        (f"{kind}{size}/{extension}", kind, size, extension)
        for kind in ("enlarged", "canvas")
        for size in study.canvases
        for extension in ("extrapolate", "interpolate")
    ]
    by_place = [measured.get("beyond_grid", name, study.beyond_grid_variants) for name, *_ in places]
    losses = {
        data_set: {variant: np.stack([part[data_set][variant] for part in by_place], 1) for variant in by_variant}
        for data_set, by_variant in by_place[0].items()
    }
    compared = compare(losses, by_baseline=True)
    heads = list(dict.fromkeys(map(pair_name, compared)))
    rows = []
    for data_set, by_variant in losses.items():
        items = {pair_name(item): item for item in compared if item.data_set == data_set}
        for k, (_, kind, size, extension) in enumerate(places):
            cells = [change(items[head], k) if head in items else "–" for head in heads]
            tokens = f"{size // TOKEN} × {size // TOKEN}"
            rows.append([data_set, kind, tokens, extension, plus_minus(by_variant["axial"][:, k]), *cells])
    return f"{table(['data', 'images', 'tokens', 'positions', 'axial RoPE: loss', *heads], rows)}\n\n{tally(compared)}"


def change(item: Comparison, point: int) -> str:
    """Paired differences in percent at a point, as mean ± standard deviation."""
    relative = 100 * (item.values / item.others - 1)[:, point]
    return f"{relative.mean():+.2f} ± {relative.std(ddof=1):.2f} %{mark(item, point)}"


def translation(measured: Measured) -> str:
    moved, rolled = (measured.get("translation", name) for name in ("moved", "rolled"))
    rows = []
    for data_set, variant in each(moved):
        cells = [percentage(100 * part[data_set][variant]) for part in (moved, rolled)]
        rows.append([data_set, VARIANTS[variant].label, *cells])
    heads = ["data", "position encoding", "tokens moved on an empty canvas", "content rolled on the grid"]
    return table(heads, rows)


def sweep(measured: Measured) -> str:
    """Final losses of every seed at each learning rate."""
    study, runs, weights = measured.study, measured.sections["runs"], {"EMA": "val_loss_ema", "raw": "val_loss"}
    rows = []
    for data_set in study.variants:
        for lr in study.sweep_lrs:
            cells = [
                ", ".join(
                    f"{runs[Run(data_set, variant, lr, seed).key][name][-1]:.4f}" for seed in range(study.sweep_seeds)
                )
                for variant in study.sweep_variants
                for name in weights.values()
            ]
            rows.append([data_set, f"{lr:g}", *cells])
    kinds = [f"{VARIANTS[variant].label}, {kind}" for variant in study.sweep_variants for kind in weights]
    return table(["data", "learning rate", *kinds], rows)


def each(losses: Losses) -> list[tuple[str, str]]:
    return [(data_set, variant) for data_set, by_variant in losses.items() for variant in by_variant]


def pair_name(item: Comparison) -> str:
    return f"{VARIANTS[item.variant].label} − {VARIANTS[item.other].label}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plus_minus(values: np.ndarray) -> str:
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"


def percentage(values: np.ndarray) -> str:
    """Mean ± standard deviation; the mean alone where it would be written 0.00."""
    if values.mean() < 0.005:
        return f"{values.mean():.0e} %" if values.any() else "0 %"
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f} %"


def p_value(p: float) -> str:
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"
