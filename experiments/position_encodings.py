"""Compare position encodings by held-out denoising loss on digits: train, print tables, draw figures.

Every variant is trained with the same seeds. The same command goes on after an interruption, and what is recorded is
not measured again. Run from the repository root: python -m experiments.position_encodings
"""

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from scipy import stats

from demo.digits import enlarged_digits, whole_folder
from experiments import runs
from experiments.comparisons import (
    CONFIDENCE,
    Curve,
    band,
    draw,
    holm,
    mark,
    p_value,
    plus_minus,
    steps_to_reach,
    table,
)
from runtime import monitor, options
from runtime.monitor import REPOSITORY

PUBLISHED = REPOSITORY / "experiments" / "position_encodings.json"
TENTHS = [f"{100 * k}–{100 * k + 99}" for k in range(10)]  # timesteps

Run = tuple[str, float, int]  # variant, learning rate, seed
Losses = dict[str, np.ndarray]  # by variant: (seeds, points), such as training steps


def spiral(rotate: int, border: str, **more) -> dict:
    return dict(use_rope=True, rope_rotate=rotate, rope_border=border, **more)


VARIANTS = {  # options of train.py
    "sincos": {},
    "axial": dict(use_rope=True, rope_rotate=0),
    "spiral2_clamp": spiral(2, "clamp"),
    "spiral2_exact": spiral(2, "exact"),
    "spiral4_clamp": spiral(4, "clamp"),
    "spiral4_exact": spiral(4, "exact"),
    "same_theta2": spiral(2, "clamp", rope_same_theta=True),
}
LOOKS = {
    "sincos": dict(label="sin-cos", color="black"),
    "axial": dict(label="axial RoPE", color="C0"),
    "spiral2_clamp": dict(label="Spiral R = 2, clamp", color="C2", linestyle="--"),
    "spiral2_exact": dict(label="Spiral R = 2, exact", color="C2"),
    "spiral4_clamp": dict(label="Spiral R = 4, clamp", color="C3", linestyle="--"),
    "spiral4_exact": dict(label="Spiral R = 4, exact", color="C3"),
    "same_theta2": dict(label="Spiral R = 2, clamp, same_theta", color="C1", linestyle="--"),
}


@dataclass(frozen=True)
class Study:
    """All that decides the results, beside the demo's recipe; stored with them."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: int = 5  # 0 to seeds - 1
    max_steps: int = 400
    global_batch_size: int = 16
    lr: float = 1e-2
    warmup_steps: int = 40
    ema_decay: float = 0.98  # 0.98 ** steps of the initial weights are left in the average
    val_every: int = 80  # steps
    sweep_lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    sweep_variants: tuple[str, ...] = ("sincos", "axial")
    sweep_seeds: int = 2
    image_size: int = 128  # pixels: 8 x 8 tokens for patch 2 after a down-sampling of 8
    held_out_per_class: int = 6

    @property
    def runs(self) -> list[Run]:
        """Every run, once: the sweep over learning rates, then all variants at the study's, seed by seed."""
        swept = product(self.sweep_variants, self.sweep_lrs, range(self.sweep_seeds))
        compared = ((variant, self.lr, seed) for seed in range(self.seeds) for variant in self.variants)
        return list(dict.fromkeys([*swept, *compared]))

    def settings(self) -> dict:
        return runs.recipe_options("model", "lr_schedule", "grad_clip") | asdict(self) | {"options": VARIANTS}


FOUR = ("sincos", "axial", "spiral4_clamp", "spiral4_exact")
FULL, QUICK = Study(), Study(FOUR, seeds=2, max_steps=150, warmup_steps=15, val_every=50, sweep_lrs=())


def key(variant: str, lr: float, seed: int) -> str:
    return f"{variant}/lr{lr:g}/seed{seed}"


def write_images(root: Path, study: Study) -> None:
    """Write scikit-learn's digits to root/train and root/val, as many of each class held out, unless root is there."""
    if root.is_dir():
        return
    images, labels = enlarged_digits(study.image_size)
    random, count = np.random.default_rng(0), study.held_out_per_class
    held_out = [random.choice(np.flatnonzero(labels == digit), count, replace=False) for digit in range(10)]
    with whole_folder(root) as partial:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            folder = partial / ("val" if index in np.concatenate(held_out) else "train") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{index:04d}.png")


def training_options(run: Run, study: Study, images: Path, latents: Path) -> dict:
    """What differs from the demo's recipe."""
    variant, lr, seed = run
    same = ("image_size", "global_batch_size", "max_steps", "warmup_steps", "ema_decay", "val_every")
    intervals = dict(log_every=study.val_every, ckpt_every=3 * study.val_every, keep_checkpoints=1)
    of_run = dict(global_seed=seed, lr=lr, latents_dir=latents, val_data_path=images / "val")
    return {name: getattr(study, name) for name in same} | intervals | of_run | VARIANTS[variant]


def validation_curve(folder: Path) -> dict[str, list]:
    """Steps with a validation and every val_ value at them; losses by tenth of the schedule at the last one alone."""
    records = [record for record in monitor.read_metrics(folder / "metrics.jsonl") if "val_loss" in record]
    names = ["step", *(name for name in records[0] if name.startswith("val_"))]
    curves = {name: [record[name] for record in records] for name in names}
    return {name: curve[-1] if name.endswith("_tenths") else curve for name, curve in curves.items()}


def collect(kept: dict[str, dict], name: str, variants: Iterable[str], lr: float, seeds: int) -> Losses:
    """A value that is kept of runs."""
    return {variant: np.array([kept[key(variant, lr, seed)][name] for seed in range(seeds)]) for variant in variants}


def all_tables(study: Study, kept: dict[str, dict]) -> str:
    """Every table under its title."""
    compared = study.variants, study.lr, study.seeds
    raw, averaged, tenths = (collect(kept, f"val_loss{kind}", *compared) for kind in ("", "_ema", "_ema_tenths"))
    steps = np.array(next(iter(kept.values()))["step"])
    tables = {
        "Held-out loss": final_losses(steps, averaged, raw),
        "Paired differences of the final loss": final_differences(averaged),
        "Differences by training step": differences(averaged, [f"step {step:,}" for step in steps]),
        "Loss by timestep": mean_losses(tenths, TENTHS),
        "Differences by timestep": differences(tenths, TENTHS),
    }
    if study.sweep_lrs:
        tables["Learning rate"] = sweep(study, kept)
    return "\n\n".join(f"### {title}\n\n{table(rows)}" for title, rows in tables.items())


def final_losses(steps: np.ndarray, averaged: Losses, raw: Losses) -> list[dict]:
    """The loss at the last step, and when that of sin-cos at the same seed is reached."""
    return [
        {
            "position encoding": LOOKS[variant]["label"],
            "loss, EMA weights": plus_minus(curves[:, -1], ".4f"),
            "steps to sin-cos's final loss, EMA": steps_to_sincos(steps, curves, averaged["sincos"]),
            "loss, raw weights": plus_minus(raw[variant][:, -1], ".4f"),
        }
        for variant, curves in averaged.items()
    ]


def steps_to_sincos(steps: np.ndarray, curves: np.ndarray, sincos: np.ndarray) -> str:
    reached = np.array([steps_to_reach(steps, *pair) for pair in zip(curves, sincos[:, -1], strict=True)])
    if np.inf in reached:
        return "not by all seeds"
    bound = "≤ " if steps[0] in reached else ""  # that seed was there before it was first measured
    return bound + plus_minus(reached, ".0f")


def families(variants: Iterable[str]) -> list[list[tuple[str, str]]]:
    """Variants with what they are compared with: axial RoPE, then sin-cos, then the exact border."""
    rotary = [name for name in variants if name != "sincos"]
    return [
        [(name, "axial") for name in rotary if name != "axial"],
        [(name, "sincos") for name in rotary],
        [(name, name.replace("clamp", "exact")) for name in rotary if name.endswith("clamp")],
    ]


def compare(losses: Losses, pairs: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences (seeds, pairs, points); relative to the second of a pair, and p of two-sided paired t-tests."""
    first, second = (np.stack([losses[name] for name in names], axis=1) for names in zip(*pairs, strict=True))
    return first - second, (first - second).mean(0) / second.mean(0), stats.ttest_rel(first, second).pvalue


def pair_label(pair: tuple[str, str]) -> str:
    return " − ".join(LOOKS[name]["label"] for name in pair)


def final_differences(averaged: Losses) -> list[dict]:
    """With Holm's correction over all of them."""
    pairs = sum(families(averaged), [])
    found, relative, p = compare({name: losses[:, -1] for name, losses in averaged.items()}, pairs)
    rows = []
    for pair, mean, half, part, *p_values in zip(pairs, *band(found, CONFIDENCE), relative, p, holm(p), strict=True):
        interval = {"difference": f"{mean:+.5f}", "95 % interval": f"[{mean - half:+.5f}, {mean + half:+.5f}]"}
        tests = dict(zip(("p", f"p, Holm over {len(pairs)}"), map(p_value, p_values), strict=True))
        rows.append({"pair": pair_label(pair)} | interval | {"relative": f"{100 * part:+.2f} %"} | tests)
    return rows


def differences(losses: Losses, points: list[str]) -> list[dict]:
    """Relative difference of every pair at each point, marked by p; Holm's correction over a family."""
    rows = []
    for pairs in families(losses):
        _, relative, p = compare(losses, pairs)
        for pair, *by_point in zip(pairs, relative, p, holm(p), strict=True):
            cells = zip(points, *by_point, strict=True)
            values = {point: f"{100 * part:+.1f} %{mark(*p_values)}" for point, part, *p_values in cells}
            rows.append({"pair": pair_label(pair)} | values)
    return rows


def mean_losses(losses: Losses, points: list[str]) -> list[dict]:
    """Mean over the seeds at each point."""
    return [
        {"position encoding": LOOKS[variant]["label"]}
        | {point: f"{mean:.4f}" for point, mean in zip(points, by_seed.mean(0), strict=True)}
        for variant, by_seed in losses.items()
    ]


def sweep(study: Study, kept: dict[str, dict]) -> list[dict]:
    """Mean final losses of the averaged weights at each learning rate."""
    variants, rates = study.sweep_variants, study.sweep_lrs
    by_rate = [collect(kept, "val_loss_ema", variants, lr, study.sweep_seeds) for lr in rates]
    losses = {variant: np.stack([found[variant][:, -1] for found in by_rate], axis=1) for variant in variants}
    return mean_losses(losses, [f"learning rate {lr:g}" for lr in rates])


def draw_all(study: Study, kept: dict[str, dict], folder: Path) -> None:
    steps, middles = np.array(next(iter(kept.values()))["step"]), 100 * np.arange(10) + 50
    compared = study.variants, study.lr, study.seeds
    losses, tenths = (collect(kept, f"val_loss_ema{kind}", *compared) for kind in ("", "_tenths"))
    curves = [Curve(LOOKS[name], steps, *band(values, CONFIDENCE)) for name, values in losses.items()]
    title = f"Held-out denoising loss, EMA weights: mean over {study.seeds} seeds, 95 % interval at each point"
    draw(folder / "evidence_curves.png", title, "training step", "MSE of the noise", curves)
    sincos = tenths.pop("sincos")
    relative = {name: band(100 * (values / sincos - 1), CONFIDENCE) for name, values in tenths.items()}
    curves = [Curve(LOOKS[name], middles, *found) for name, found in relative.items()]
    title = "Final held-out loss by timestep, EMA weights: relative to sin-cos at the same seed, 95 % interval"
    labels = "timestep (middle of its tenth)", "difference (%)"
    draw(folder / "evidence_tenths.png", title, *labels, curves, losses=False)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    help = "four variants, two seeds, 150 steps: ten minutes; results in --work-dir"
    parser.add_argument("--quick", action="store_true", help=help)
    args = runs.parse_args(parser, PUBLISHED, argv)
    args.work_dir /= "quick" if args.quick else "full"
    if args.quick and args.out == PUBLISHED:
        args.out, args.figures = args.work_dir / PUBLISHED.name, args.work_dir
    return args


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    study = QUICK if args.quick else FULL
    images, latents = args.work_dir / "digits", args.work_dir / "digits_latents"

    def prepare() -> None:
        write_images(images, study)
        runs.make_latents(images / "train", latents, study.image_size)

    given = {key(*run): training_options(run, study, images, latents) for run in study.runs}
    found = runs.complete(args, runs.Results(args.out, study.settings()), given, prepare, validation_curve)
    if found is not None:
        draw_all(study, found, args.figures)
        print(all_tables(study, found))


if __name__ == "__main__":
    main()
