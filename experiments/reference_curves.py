"""Train the demo with five seeds and publish the losses to expect: tests/reference_curves.json and docs/evidence.md.

Run from the repository root: python -m experiments.reference_curves. The same command goes on after an interruption.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from demo.digits import write_digits
from experiments import report, runs
from experiments.comparisons import prediction_band
from experiments.results import Results, resolve_places
from experiments.runs import Job, python
from runtime import monitor, options
from runtime.monitor import REPOSITORY
from runtime.options import UserError

SEEDS = 5
VAL_FRACTION = 0.1
VAL_EVERY = 300  # steps
ALLOWED = 0.1  # of the points of a run may lie outside
CONFIDENCE = 0.99  # of the band in which one more run falls, at each step
REFERENCE = REPOSITORY / "tests" / "reference_curves.json"
VAE = REPOSITORY / "assets" / "demo_vae"
ROPE = {"use_rope": True, "rope_rotate": 2}  # bash run_all.sh True 2
CURVES = {
    "loss": "training loss (MSE of the noise + variational term)",
    "val_loss": "held-out loss, raw weights (MSE of the noise)",
    "val_loss_ema": "held-out loss, EMA weights (MSE of the noise)",
}


def demo_recipe() -> dict[str, str]:
    """Options of train.py with the values of the demo's settings in run_all.sh. Raises UserError for one not found."""
    script = (REPOSITORY / "run_all.sh").read_text(encoding="utf-8")
    block = re.search(r"^else # the demo.*?^fi$", script, re.MULTILINE | re.DOTALL)
    found = dict(re.findall(r"^ +(\w+)=\$\{\w+:?-(.*?)\}", block[0] if block else "", re.MULTILINE))
    names = {
        "model": "DEFAULT_MODEL",
        "max_steps": "MAX_STEPS",
        "image_size": "IMAGE_SIZE",
        "global_batch_size": "GLOBAL_BATCH_SIZE",
        "lr": "LR",
        "lr_schedule": "LR_SCHEDULE",
        "warmup_steps": "WARMUP_STEPS",
        "grad_clip": "GRAD_CLIP",
        "ema_decay": "EMA_DECAY",
        "log_every": "LOG_EVERY",
    }
    missing = [name for name in names.values() if name not in found]
    if missing:
        raise UserError(f"run_all.sh has no demo value of {missing[0]}; its settings have changed: follow them here")
    recipe = {option: found[name] for option, name in names.items()}
    if not recipe["warmup_steps"]:  # the rule of run_all.sh
        recipe["warmup_steps"] = str(min(100, int(recipe["max_steps"]) // 10))
    return recipe


def training_job(seed: int, folder: Path, latents: Path, recipe: dict[str, str]) -> Job:
    command = python(
        "train.py",
        latents_dir=latents,
        results_dir=folder,
        global_seed=seed,
        no_flip=True,
        val_fraction=VAL_FRACTION,
        val_every=VAL_EVERY,
        num_workers=0,
        precision="fp32",
        ckpt_every=recipe["max_steps"],
        keep_checkpoints=1,
        **recipe,
        **ROPE,
    )
    return Job(f"seed{seed}", folder, command)


def prepare_latents(work: Path, image_size: str) -> Path:
    """The latent cache of the demo's digits, made where it is missing."""
    write_digits(work / "digits", int(image_size))
    runs.make_latents(work / "digits", work / "latents", VAE, int(image_size))
    return work / "latents"


def curves_of(folder: Path) -> dict[str, dict[str, list]]:
    """Every curve of a finished run: {"loss": {"step": [...], "value": [...]}, ...}."""
    records = monitor.read_metrics(folder / "metrics.jsonl")
    return {
        name: {
            "step": [record["step"] for record in records if name in record],
            "value": [record[name] for record in records if name in record],
        }
        for name in CURVES
    }


def bands(by_seed: dict[str, dict]) -> dict[str, dict[str, list]]:
    """Mean over seeds, and half-width of the interval for one more run, by step, of every curve."""
    found = {}
    for name in CURVES:
        mean, half = prediction_band(np.array([curves[name]["value"] for curves in by_seed.values()]), CONFIDENCE)
        steps = next(iter(by_seed.values()))[name]["step"]
        found[name] = {"step": steps, "mean": mean.tolist(), "half": half.tolist()}
    return found


def points(curves: dict[str, dict], reference: dict[str, dict]) -> list[tuple[str, int, float, float, float]]:
    """Curve, step, value, and the band's mean and half-width, at every step that both have."""
    found = []
    for name, band in reference.items():
        values = dict(zip(curves[name]["step"], curves[name]["value"], strict=True))
        rows = zip(band["step"], band["mean"], band["half"], strict=True)
        found += [(name, step, values[step], mean, half) for step, mean, half in rows if step in values]
    return found


def outside(curves: dict[str, dict], reference: dict[str, dict]) -> list[tuple[str, int, float, float, float]]:
    """The points at which a run's curves leave the bands."""
    return [point for point in points(curves, reference) if not abs(point[2] - point[3]) <= point[4]]  # true of NaN


def falls_in(curves: dict[str, dict], reference: dict[str, dict]) -> bool:
    """Whether a run is in the bands at nine of ten points at least, and wherever it has the last step.

    A short rise of the loss may leave a band that holds for single points.
    """
    left, last = outside(curves, reference), reference["loss"]["step"][-1]
    return len(left) <= len(points(curves, reference)) * ALLOWED and last not in [step for _, step, *_ in left]


def check(folder: Path, results: Results, logger) -> None:
    """Say where a run of train.py leaves the bands. Raises UserError where it does not fall in."""
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"--check {str(folder)!r} holds no metrics.jsonl; give the --results-dir of a run of train.py")
    curves, reference = curves_of(folder), results.section("bands")
    compared = points(curves, reference)
    if not compared:
        raise UserError(
            f"--check {str(folder)!r} has no loss at a step of the reference, which has every "
            f"{results.values['settings']['log_every']} steps; give a run of the demo's settings"
        )
    left = outside(curves, reference)
    for name, step, value, mean, half in left:
        logger.info(f"{CURVES[name]}, step {step:,}: {value:.4g}, expected {mean:.4g} ± {half:.2g}")
    logger.info(f"{len(compared) - len(left)} of {len(compared)} points are in the reference band")
    if not falls_in(curves, reference):
        raise UserError(
            f"--check {str(folder)!r} does not fall in the reference band; expected are nine of ten points and the "
            "last step, of the demo's settings"
        )


def draw(reference: dict[str, dict], path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, band) in zip(("C0", "C2", "C1"), reference.items(), strict=True):
        steps, mean, half = (np.array(band[key]) for key in ("step", "mean", "half"))
        axes.plot(steps, mean, color=colour, marker=".", label=CURVES[name])
        axes.fill_between(steps, np.maximum(mean - half, mean / 10), mean + half, color=colour, alpha=0.2, linewidth=0)
    axes.set(
        title=f"The demo's losses: mean of {SEEDS} seeds, band in which one more run falls ({100 * CONFIDENCE:g} %)",
        xlabel="training step",
        ylabel="loss",
    )
    axes.set_ylim(bottom=0.6 * min(min(band["mean"]) for band in reference.values()))
    monitor.use_log_scale(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    monitor.save_figure(figure, path)


def at_step(band: dict[str, list], step: int) -> str:
    """Mean ± half-width, or a dash where the curve has no such step."""
    if step not in band["step"]:
        return "–"
    place = band["step"].index(step)
    return f"{band['mean'][place]:.4f} ± {band['half'][place]:.4f}"


def write_page(page: Path, results: Results) -> None:
    reference, recipe = results.section("bands"), results.values["settings"]
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw(reference, images / "evidence_reference.png")
    rows = []
    for step in sorted(set.union(*(set(band["step"]) for band in reference.values()))):
        rows.append([f"{step:,}", *(at_step(band, step) for band in reference.values())])
    heads = ["step", "training loss", "held-out loss, raw weights", "held-out loss, EMA weights"]
    text = (
        "## Reference curves of the demo\n\n![Training and held-out loss of the demo by step]"
        "(images/evidence_reference.png)\n\n"
        f"The demo's training (`bash run_all.sh True 2`: {recipe['model']}, {recipe['max_steps']} steps of batch "
        f"{recipe['global_batch_size']}, learning rate {recipe['lr']}, {recipe['lr_schedule']}) with "
        f"{100 * VAL_FRACTION:g} % of the images held out, seeds 0 to {SEEDS - 1}: mean ± half-width of the interval "
        f"in which one more run falls with a probability of {100 * CONFIDENCE:g} % (Student's t, at each step by "
        f"itself, so that one of many points may well lie outside). The demo itself trains on all images and does not "
        f"validate. The training loss is the mean of the {recipe['log_every']} steps before. Made by `python -m "
        f"experiments.reference_curves` ({report.machines(results)}). A run "
        f"falls in the band when nine of ten of its points and the last step do: `python -m "
        f"experiments.reference_curves --check RESULTS_DIR` says where a run of train.py stands, `bash run_tests.sh -m "
        f"slow` trains one with another seed and expects it to.\n\n{report.table(heads, rows)}"
    )
    report.write_block(page, "experiments/reference_curves.py", text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work-dir", type=Path, default=Path("results/reference_curves"), help="data, latents and runs")
    add("--out", type=Path, default=None, help="JSON of the curves and their bands (None: tests/reference_curves.json)")
    add("--report", type=Path, default=None, help="page to write (None: docs/evidence.md, --out with .md)")
    add("--jobs", type=options.count, default=None, help="runs at a time, one thread each (None: one per core)")
    add("--check", type=Path, metavar="RESULTS_DIR", help="train nothing; say where this run leaves the bands")
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir.resolve()
    resolve_places(args, REFERENCE, REPOSITORY / "docs" / "evidence.md")
    args.jobs = args.jobs or os.cpu_count()
    return args


@options.command
def main(argv: list[str] | None = None) -> None:
    args, recipe, logger = parse_args(argv), demo_recipe(), monitor.make_logger()
    settings = {**recipe, "val_fraction": VAL_FRACTION, "val_every": VAL_EVERY}
    results = Results(args.out, settings)
    if args.check is not None:
        return check(args.check, results, logger)
    missing = [seed for seed in range(SEEDS) if f"seed{seed}" not in results.section("runs")]
    if missing:
        origin = {"git_commit": monitor.git_commit(), "environment": results.environment(runs.environment())}
        latents = prepare_latents(args.work_dir, recipe["image_size"])
        jobs = [training_job(seed, args.work_dir / "runs" / f"seed{seed}", latents, recipe) for seed in missing]

        def record(job: Job) -> None:
            results.add("runs", job.key, {**origin, **curves_of(job.folder)})
            runs.remove_run(job.folder)

        if not runs.run_all(jobs, args.jobs, record, logger):
            logger.info("stopped on request; repeat the same command to go on")
            sys.exit(130)
    else:
        logger.info(f"all {SEEDS} runs are recorded in {str(args.out)!r}, nothing is trained; --out elsewhere repeats")
    for name, band in bands(results.section("runs")).items():
        results.add("bands", name, band)
    write_page(args.report, results)
    logger.info(f"reference: {args.out}, report: {args.report}")


if __name__ == "__main__":
    main()
