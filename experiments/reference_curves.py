"""Train the demo with five seeds, for the losses to expect of it, or compare a run with them: --check RESULTS_DIR.

The losses go to tests/reference_curves.json, and the table of the bands to stdout. The same command goes on after an
interruption. Run from the repository root: python -m experiments.reference_curves
"""

import argparse
import math
from pathlib import Path

import numpy as np

from demo.digits import write_digits
from experiments import runs
from experiments.comparisons import Curve, band, draw, table
from experiments.runs import Results
from runtime import monitor, options
from runtime.monitor import REPOSITORY
from runtime.options import UserError

SEEDS = 5
INTERVALS = {"val_fraction": 0.1, "val_every": 300, "log_every": 100}  # steps; the demo itself holds nothing out
ALLOWED = 0.1  # of the points of a run may lie outside
CONFIDENCE = 0.99  # of the band in which one more run falls, at each step
PUBLISHED = REPOSITORY / "tests" / "reference_curves.json"
CURVES = {
    "loss": "training loss (MSE of the noise + variational term)",
    "val_loss": "held-out loss, raw weights (MSE of the noise)",
    "val_loss_ema": "held-out loss, EMA weights (MSE of the noise)",
}

Bands = dict[str, tuple[list[int], np.ndarray, np.ndarray]]  # of each curve: steps, means, half-widths


def settings() -> dict:
    """What decides the curves."""
    names = "model max_steps image_size global_batch_size lr lr_schedule warmup_steps grad_clip ema_decay"
    return runs.recipe_options(*names.split()) | INTERVALS


def training_options(seed: int, work: Path) -> dict:
    """The training of bash run_all.sh True 2, but for the held-out images."""
    return dict(latents_dir=work / "latents", global_seed=seed, use_rope=True, rope_rotate=2) | INTERVALS


def prepare(work: Path) -> None:
    """Make the latent cache of the demo's digits."""
    write_digits(work / "digits")
    runs.make_latents(work / "digits", work / "latents", image_size=64)


def curves_of(folder: Path) -> dict[str, dict[str, list]]:
    """Steps and values of every curve of a run."""
    records, found = monitor.read_metrics(folder / "metrics.jsonl"), {}
    for name in CURVES:
        having = [record for record in records if name in record]
        found[name] = {"step": [record["step"] for record in having], "value": [record[name] for record in having]}
    return found


def bands(by_seed: dict[str, dict]) -> Bands:
    """Of every curve the mean over seeds, and the half-width of the interval for one more run."""
    found = {}
    for name in CURVES:
        curves = [run[name] for run in by_seed.values()]
        found[name] = curves[0]["step"], *band(np.array([c["value"] for c in curves]), CONFIDENCE, one_more=True)
    return found


def check(folder: Path, reference: Bands) -> None:
    """Say where a run of train.py leaves the bands. Raises UserError where it does not fall in.

    It falls in where nine of ten points do, and the last step, if it has that: a short rise of the loss may leave a
    band that holds for single points.
    """
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"--check {str(folder)!r} holds no metrics.jsonl; give the --results-dir of a run of train.py")
    compared, left, last = 0, [], reference["loss"][0][-1]
    for name, curve in curves_of(folder).items():
        values = dict(zip(curve["step"], curve["value"], strict=True))
        for step, mean, half in zip(*reference[name], strict=True):
            if step not in values:
                continue
            compared += 1
            value = math.nan if values[step] is None else values[step]
            if not abs(value - mean) <= half:  # true of NaN
                left.append(step)
                print(f"{CURVES[name]}, step {step:,}: {value:.4g}, expected {mean:.4g} ± {half:.2g}")
    if not compared:
        raise UserError(
            f"--check {str(folder)!r} has no loss at a step of the reference, which has every "
            f"{INTERVALS['log_every']} steps; give a run of the demo's settings"
        )
    print(f"{compared - len(left)} of {compared} points are in the reference band")
    if len(left) > ALLOWED * compared or last in left:
        raise UserError(
            f"--check {str(folder)!r} does not fall in the reference band; expected are nine of ten points and the "
            "last step, of the demo's settings"
        )


def draw_bands(reference: Bands, path: Path) -> None:
    looks = [dict(label=label, color=color) for label, color in zip(CURVES.values(), ("C0", "C2", "C1"), strict=True)]
    curves = [Curve(look, *found) for look, found in zip(looks, reference.values(), strict=True)]
    title = f"The demo's losses: mean of {SEEDS} seeds, band in which one more run falls ({100 * CONFIDENCE:g} %)"
    draw(path, title, "training step", "loss", curves)


def bands_table(reference: Bands) -> str:
    """Mean ± half-width by step."""
    rows = {step: {"step": f"{step:,}"} for step in reference["loss"][0]}
    for name, expected in reference.items():
        for step, mean, half in zip(*expected, strict=True):
            rows[step][CURVES[name].partition(" (")[0]] = f"{mean:.4f} ± {half:.4f}"
    return table([*rows.values()])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    parser.add_argument("--check", type=Path, metavar="RESULTS_DIR", help="train nothing; compare this run")
    return runs.parse_args(parser, PUBLISHED, argv)


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    results = Results(args.out, settings())
    if args.check is not None:
        return check(args.check, bands(results.sections["runs"]))
    given = {f"seed{seed}": training_options(seed, args.work_dir) for seed in range(SEEDS)}
    found = runs.complete(args, results, given, lambda: prepare(args.work_dir), curves_of)
    if found is not None:
        reference = bands(found)
        draw_bands(reference, args.figures / "evidence_reference.png")
        print(bands_table(reference))


if __name__ == "__main__":
    main()
