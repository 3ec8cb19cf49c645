"""The tables of the study of position encodings, in markdown."""

import numpy as np

from experiments.comparisons import SIGNIFICANT, Comparison, bootstrap_interval, compare, detectable, steps_to_reach
from experiments.plan import BASELINES, TOKEN, VARIANTS, Losses, Run, Study

TENTHS = [f"{100 * k}–{100 * k + 99}" for k in range(10)]  # timesteps

Row = dict[str, str]  # cells by column


def table(rows: list[Row]) -> str:
    """Rows in markdown, with a dash where one lacks a column."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads), *([row.get(head, "–") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def all_tables(study: Study, sections: dict[str, dict]) -> str:
    """Every table under its title."""
    runs = sections["runs"]
    raw, averaged, tenths = (study.collect(runs, f"val_loss{kind}") for kind in ("", "_ema", "_ema_tenths"))
    steps = next(iter(runs.values()))["step"]
    moved, rolled = (study.collect(sections["translation"], name) for name in ("moved", "rolled"))
    tables = {
        "Held-out loss": table(final_losses(np.array(steps), {"EMA": averaged, "raw": raw})),
        "Paired differences of the final loss": table(final_differences(averaged)),
        "Differences by training step": differences(averaged, [f"step {step:,}" for step in steps]),
        "Loss by timestep": table(
            [
                first_cells(*names) | {point: f"{loss:.4f}" for point, loss in zip(TENTHS, means.mean(0), strict=True)}
                for names, means in tenths.items()
            ]
        ),
        "Differences by timestep": differences(tenths, TENTHS),
        "Beyond the training grid": beyond_grid(study, sections["beyond_grid"]),
        "Translation": table(
            [
                first_cells(*names)
                | {
                    "tokens moved on an empty canvas": percentage(100 * moved[names]),
                    "content rolled on the grid": percentage(100 * rolled[names]),
                }
                for names in moved
            ]
        ),
    }
    if study.sweep_lrs:
        tables["Learning rate"] = table(sweep(study, runs))
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in tables.items())


def final_losses(steps: np.ndarray, curves: dict[str, Losses]) -> list[Row]:
    """By kind of weights: the loss at the last step, and when sin-cos's is reached."""
    return [
        first_cells(*names)
        | {f"loss, {kind} weights": plus_minus(losses[names][:, -1], ".4f") for kind, losses in curves.items()}
        | {
            f"steps to sin-cos's final loss, {kind}": steps_to_sincos(steps, losses[names], losses[names[0], "sincos"])
            for kind, losses in curves.items()
        }
        for names in curves["EMA"]
    ]


def steps_to_sincos(steps: np.ndarray, curves: np.ndarray, sincos: np.ndarray) -> str:
    """Mean ± standard deviation of the steps at which each seed reaches sin-cos's final loss."""
    reached = np.array([steps_to_reach(steps, curve, other[-1]) for curve, other in zip(curves, sincos, strict=True)])
    if not np.isfinite(reached).all():
        return f"not reached by {int((~np.isfinite(reached)).sum())} of {len(reached)} seeds"
    bound = "≤ " if (reached == steps[0]).any() else ""  # that seed was there before it was first measured
    return bound + plus_minus(reached, ".0f")


def final_differences(averaged: Losses) -> list[Row]:
    compared = compare({names: losses[:, -1:] for names, losses in averaged.items()}, by_baseline=False)
    rows = []
    for item in sorted(compared, key=lambda item: item.data_set):
        found, mean = item.differences[:, 0], item.others.mean()
        low, high = bootstrap_interval(found)
        levels = (SIGNIFICANT, SIGNIFICANT / len(compared))
        alone, first = (f"{100 * detectable(found, level) / mean:.1f} %" for level in levels)
        values = {
            "difference": f"{found.mean():+.5f}",
            "95 % bootstrap interval": f"[{low:+.5f}, {high:+.5f}]",
            "relative": f"{100 * item.relative[0]:+.2f} %",
            "p": p_value(item.p[0]),
            f"p, Holm over {len(compared)}": p_value(item.p_holm[0]),
            "would be found": f"{alone} ({first})",
        }
        rows.append({"data": item.data_set, "pair": pair_name(item)} | values)
    return rows


def differences(losses: Losses, points: list[str]) -> str:
    """Relative difference of every pair at each point, marked by p."""
    compared = compare(losses, by_baseline=True)
    rows = [
        {"data": item.data_set, "pair": pair_name(item)}
        | {point: f"{100 * item.relative[k]:+.1f} %{mark(item, k)}" for k, point in enumerate(points)}
        for item in compared
    ]
    return f"{table(rows)}\n\n{tally(compared)}"


def mark(item: Comparison, point: int) -> str:
    """Two daggers at a corrected p below 0.05, one at a p below 0.05 that is not."""
    return " ‡" if item.p_holm[point] < SIGNIFICANT else " †" if item.p[point] < SIGNIFICANT else ""


def tally(compared: list[Comparison]) -> str:
    """What the marks say, and how many differences have them, by baseline."""
    parts = []
    for baseline in dict.fromkeys(item.baseline for item in compared):
        family = [item for item in compared if item.baseline == baseline]
        single, held = (np.stack(p) < SIGNIFICANT for p in zip(*((x.p, x.p_holm) for x in family), strict=True))
        parts.append(f"against {BASELINES[baseline]} {single.sum()} of {single.size}, {held.sum()} after correction")
    return (
        f"†: p below {SIGNIFICANT:g} (paired t-test); ‡: also after Holm's correction over everything in this table "
        f"with the same baseline. At p below {SIGNIFICANT:g}: {'; '.join(parts)}."
    )


def beyond_grid(study: Study, entries: dict[str, dict]) -> str:
    places = [("trained", "as trained", study.image_size, "–")] + [
        (f"{kind}{size}/{extension}", kind, size, extension)
        for kind in ("enlarged", "canvas")
        for size in study.canvases
        for extension in ("extrapolate", "interpolate")
    ]
    by_place = [study.collect(entries, name) for name, *_ in places]
    losses = {names: np.stack([place[names] for place in by_place], axis=1) for names in by_place[0]}
    compared = compare(losses, by_baseline=True)
    rows = []
    for data_set in study.variants:
        for k, (_, kind, size, extension) in enumerate(places):
            tokens = f"{size // TOKEN} × {size // TOKEN}"
            row = {"data": data_set, "images": kind, "tokens": tokens, "positions": extension}
            row["axial RoPE: loss"] = plus_minus(losses[data_set, "axial"][:, k], ".4f")
            rows.append(row | {pair_name(item): change(item, k) for item in compared if item.data_set == data_set})
    return f"{table(rows)}\n\n{tally(compared)}"


def change(item: Comparison, point: int) -> str:
    """Paired differences in percent at a point, as mean ± standard deviation."""
    relative = 100 * (item.values / item.others - 1)[:, point]
    return f"{relative.mean():+.2f} ± {relative.std(ddof=1):.2f} %{mark(item, point)}"


def sweep(study: Study, runs: dict[str, dict]) -> list[Row]:
    """Final losses of every seed at each learning rate."""

    def losses(name: str, *run) -> str:
        seeds = range(study.sweep_seeds)
        return ", ".join(f"{runs[Run(*run, seed).key][name][-1]:.4f}" for seed in seeds)

    return [
        {"data": data_set, "learning rate": f"{lr:g}"}
        | {
            f"{VARIANTS[variant].label}, {kind}": losses(name, data_set, variant, lr)
            for variant in study.sweep_variants
            for kind, name in {"EMA": "val_loss_ema", "raw": "val_loss"}.items()
        }
        for data_set in study.variants
        for lr in study.sweep_lrs
    ]


def first_cells(data_set: str, variant: str) -> Row:
    return {"data": data_set, "position encoding": VARIANTS[variant].label}


def pair_name(item: Comparison) -> str:
    return f"{VARIANTS[item.variant].label} − {VARIANTS[item.other].label}"


def plus_minus(values: np.ndarray, form: str) -> str:
    """Mean ± standard deviation."""
    return f"{values.mean():{form}} ± {values.std(ddof=1):{form}}"


def percentage(values: np.ndarray) -> str:
    """Mean ± standard deviation; the mean alone where it would be written 0.00."""
    if values.mean() < 0.005:
        return f"{values.mean():.0e} %" if values.any() else "0 %"
    return f"{plus_minus(values, '.2f')} %"


def p_value(p: float) -> str:
    return f"{p:.1e}" if p < 0.001 else f"{p:.3f}"
