"""Train the demo with five seeds, for the losses to expect of it, or compare a run with them: --check RESULTS_DIR.

The bands go to tests/reference_curves.json, and the table to stdout. The same command goes on after an interruption.
Run from the repository root: python -m experiments.reference_curves
"""

import argparse
import shlex
import shutil
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from demo.digits import write_digits
from experiments import runs
from experiments.comparisons import band
from experiments.runs import Job, Results, say
from experiments.tables import table
from runtime import monitor, options
from runtime.monitor import REPOSITORY
from runtime.options import UserError

SEEDS = 5
INTERVALS = {"val_fraction": 0.1, "val_every": 300, "log_every": 100}  # steps; the demo itself holds nothing out
ALLOWED = 0.1  # of the points of a run may lie outside
CONFIDENCE = 0.99  # of the band in which one more run falls, at each step
REFERENCE = REPOSITORY / "tests" / "reference_curves.json"
RECIPE = REPOSITORY / "recipes" / "demo" / "train.args"
DECISIVE = ("model", "max_steps", "image_size", "global_batch_size")  # with those of the optimizer
DECISIVE += ("lr", "lr_schedule", "warmup_steps", "grad_clip", "ema_decay")
CURVES = {
    "loss": "training loss (MSE of the noise + variational term)",
    "val_loss": "held-out loss, raw weights (MSE of the noise)",
    "val_loss_ema": "held-out loss, EMA weights (MSE of the noise)",
}

Curves = dict[str, dict[str, list]]  # {"loss": {"step": [...], "value": [...]}, ...}, of a band "mean" and "half"


def settings() -> dict:
    """What decides the curves, as the demo's recipe has it."""
    words = shlex.split(RECIPE.read_text(encoding="utf-8"), comments=True)
    given = dict(zip(words, words[1:], strict=False))
    return {name: given.get(f"--{name.replace('_', '-')}") for name in DECISIVE} | INTERVALS


def training_job(seed: int, folder: Path, latents: Path) -> Job:
    """The training of bash run_all.sh True 2, but for the held-out images."""
    changed = dict(latents_dir=latents, results_dir=folder, global_seed=seed, precision="fp32", sample_every=0)
    rope = dict(use_rope=True, rope_rotate=2)
    return Job(f"seed{seed}", folder, runs.python("train.py", f"@{RECIPE}", **changed, **INTERVALS, **rope))


def prepare_latents(work: Path) -> Path:
    """The latent cache of the demo's digits, made where it is missing."""
    write_digits(work / "digits")
    runs.make_latents(work / "digits", work / "latents", image_size=64)
    return work / "latents"


def curves_of(folder: Path) -> Curves:
    """Every curve of a run."""
    records, found = monitor.read_metrics(folder / "metrics.jsonl"), {}
    for name in CURVES:
        having = [record for record in records if name in record]
        found[name] = {"step": [record["step"] for record in having], "value": [record[name] for record in having]}
    return found


def bands(by_seed: dict[str, Curves]) -> Curves:
    """Mean over seeds, and half-width of the interval for one more run, by step, of every curve."""
    found = {}
    for name in CURVES:
        values = np.array([curves[name]["value"] for curves in by_seed.values()])
        mean, half = band(values, CONFIDENCE, one_more=True)
        steps = next(iter(by_seed.values()))[name]["step"]
        found[name] = {"step": steps, "mean": mean.tolist(), "half": half.tolist()}
    return found


def check(folder: Path, reference: Curves) -> None:
    """Say where a run of train.py leaves the bands. Raises UserError where it does not fall in.

    It falls in where nine of ten points do, and the last step, if it has that: a short rise of the loss may leave a
    band that holds for single points.
    """
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"--check {str(folder)!r} holds no metrics.jsonl; give the --results-dir of a run of train.py")
    compared, left, last = 0, [], reference["loss"]["step"][-1]
    for name, curve in curves_of(folder).items():
        values, expected = dict(zip(curve["step"], curve["value"], strict=True)), reference[name]
        for step, mean, half in zip(expected["step"], expected["mean"], expected["half"], strict=True):
            if step not in values:
                continue
            compared += 1
            if not abs(values[step] - mean) <= half:  # true of NaN
                left.append(step)
                print(f"{CURVES[name]}, step {step:,}: {values[step]:.4g}, expected {mean:.4g} ± {half:.2g}")
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


def draw(reference: Curves, path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, expected) in zip(("C0", "C2", "C1"), reference.items(), strict=True):
        steps, mean, half = (np.array(expected[key]) for key in ("step", "mean", "half"))
        axes.plot(steps, mean, color=colour, marker=".", label=CURVES[name])
        axes.fill_between(steps, np.maximum(mean - half, mean / 10), mean + half, color=colour, alpha=0.2, linewidth=0)
    title = f"The demo's losses: mean of {SEEDS} seeds, band in which one more run falls ({100 * CONFIDENCE:g} %)"
    axes.set(title=title, xlabel="training step", ylabel="loss")
    axes.set_ylim(bottom=0.6 * min(min(expected["mean"]) for expected in reference.values()))
    monitor.use_log_scale(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    monitor.save_figure(figure, path)


def bands_table(reference: Curves) -> str:
    """Mean ± half-width by step, with a dash where a curve has no such step."""
    by_step: dict[int, dict[str, str]] = {}
    for name, expected in reference.items():
        for step, mean, half in zip(expected["step"], expected["mean"], expected["half"], strict=True):
            by_step.setdefault(step, {})[name] = f"{mean:.4f} ± {half:.4f}"
    rows = [[f"{step:,}", *(cells.get(name, "–") for name in CURVES)] for step, cells in sorted(by_step.items())]
    return table(["step", "training loss", "held-out loss, raw weights", "held-out loss, EMA weights"], rows)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    runs.add_options(parser, "results/reference_curves", "None: tests/reference_curves.json")
    parser.add_argument("--check", type=Path, metavar="RESULTS_DIR", help="train nothing; compare this run")
    args = parser.parse_args(argv)
    args.work_dir, args.out = args.work_dir.resolve(), args.out or REFERENCE
    args.figures = REPOSITORY / "docs" / "images" if args.out == REFERENCE else args.out.parent
    return args


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.check is not None:
        return check(args.check, Results(args.out, settings()).section("bands"))
    runs.check_places(args)
    results = Results(args.out, settings())
    missing = [seed for seed in range(SEEDS) if f"seed{seed}" not in results.section("runs")]
    say(f"{len(missing)} of {SEEDS} runs to train, {args.jobs} at a time; {args.out} has the others")
    if args.dry_run:
        return
    if missing:
        latents, origin = prepare_latents(args.work_dir), results.origin()
        jobs = [training_job(seed, args.work_dir / "runs" / f"seed{seed}", latents) for seed in missing]

        def record(job: Job) -> None:
            results.add("runs", job.key, origin | curves_of(job.folder))
            shutil.rmtree(job.folder)

        runs.run_all(jobs, args.jobs, record)
    for name, expected in bands(results.section("runs")).items():
        results.add("bands", name, expected)
    args.figures.mkdir(parents=True, exist_ok=True)
    draw(results.section("bands"), args.figures / "evidence_reference.png")
    print(bands_table(results.section("bands")))


if __name__ == "__main__":
    main()
