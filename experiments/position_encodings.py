"""Compare position encodings by held-out denoising loss: train, measure, print tables, draw figures.

Every variant is trained with the same seeds on two small data sets. The same command goes on after an interruption, and
what is recorded is not measured again. Run from the repository root: python -m experiments.position_encodings
"""

import argparse
import shutil
from pathlib import Path

import torch

from experiments import data, figures, measurements, runs, tables
from experiments.plan import FULL, QUICK, VARIANTS, Run, Study
from experiments.runs import VAE, Job, Results
from runtime import monitor, options
from runtime.monitor import REPOSITORY
from runtime.options import UserError

OUT = REPOSITORY / "experiments" / "position_encodings.json"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    runs.add_options(parser, "results/position_encodings", "None: beside this file; with --quick in --work-dir")
    add = parser.add_argument
    add("--stage", choices=["runs", "report"], default=None, help="do one part (None: all)")
    add("--quick", action="store_true", help="digits alone, four variants, two seeds, 150 steps: ten minutes")
    args = parser.parse_args(argv)
    args.data_dir = args.work_dir.resolve() / "data"  # the same for both studies
    args.work_dir = args.work_dir.resolve() / ("quick" if args.quick else "full")
    args.out = args.out or (args.work_dir / OUT.name if args.quick else OUT)
    args.figures = REPOSITORY / "docs" / "images" if args.out == OUT else args.out.parent
    return args


def training_job(run: Run, study: Study, args: argparse.Namespace) -> Job:
    folder = args.work_dir / "runs" / run.key
    command = runs.python(
        "train.py",
        latents_dir=args.data_dir / f"{run.data_set}_latents",
        no_flip=True,
        val_data_path=args.data_dir / run.data_set / "val",
        val_every=study.val_every,
        results_dir=folder,
        model=study.model,
        image_size=study.image_size,
        global_batch_size=study.batch,
        global_seed=run.seed,
        max_steps=study.steps,
        lr=run.lr,
        lr_schedule=study.lr_schedule,
        warmup_steps=study.warmup_steps,
        grad_clip=study.grad_clip,
        ema_decay=study.ema_decay,
        precision="fp32",
        num_workers=0,
        log_every=study.val_every,
        ckpt_every=3 * study.val_every,
        keep_checkpoints=1,
        sample_every=0,
        **VARIANTS[run.variant].options,
    )
    return Job(run.key, folder, command)


def train_all(missing: list[Run], args: argparse.Namespace, study: Study, results: Results) -> None:
    """Train and measure runs, and record each. Raises UserError."""
    for data_set in study.variants:
        root = args.data_dir / data_set
        results.add("data", data_set, data.write_data_set(data_set, root, study))
        runs.make_latents(root / "train", args.data_dir / f"{data_set}_latents", study.image_size)
        psnr = measurements.reconstruction_psnr(root, VAE, study.image_size)
        results.add("reconstruction", data_set, {"psnr": psnr})
    by_key, origin = {run.key: run for run in missing}, results.origin()
    torch.set_num_threads(1)  # measurements are one of the processes that share the machine

    def record(job: Job) -> None:
        run = by_key[job.key]
        if run.lr == study.lr:
            measured = measurements.measure(job.folder, args.data_dir / run.data_set, VAE, study, run)
            for section, values in measured.items():
                results.add(section, run.key, values)
        results.add("runs", run.key, origin | validation_curve(job.folder))  # last: it marks the run as done
        shutil.rmtree(job.folder)

    runs.run_all([training_job(run, study, args) for run in missing], args.jobs, record)


def validation_curve(folder: Path) -> dict[str, list]:
    """Steps with a validation and every val_ value at them; losses by tenth of the schedule at the last one alone."""
    records = [record for record in monitor.read_metrics(folder / "metrics.jsonl") if "val_loss" in record]
    names = ["step", *(name for name in records[0] if name.startswith("val_"))]
    curves = {name: [record[name] for record in records] for name in names}
    return {name: curve[-1] if name.endswith("_tenths") else curve for name, curve in curves.items()}


def report(args: argparse.Namespace, study: Study, results: Results) -> None:
    """Print the tables and draw the figures from what is recorded."""
    folders = {data_set: args.data_dir / data_set for data_set in study.variants}
    for data_set, folder in folders.items():  # the figure of the attention shows images of them
        data.write_data_set(data_set, folder, study)
    args.figures.mkdir(parents=True, exist_ok=True)
    measured = tables.Measured(study, results.sections)
    figures.draw_all(measured, folders, args.figures)
    print(tables.all_tables(measured))


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    study = QUICK if args.quick else FULL
    runs.check_places(args)
    results = Results(args.out, study.settings())
    missing = [run for run in study.runs if run.key not in results.section("runs")]
    if missing and args.stage == "report":
        raise UserError(f"{str(args.out)!r} lacks run {missing[0].key}; repeat the command without --stage to make it")
    runs.say(f"{len(missing)} of {len(study.runs)} runs to train, {args.jobs} at a time; {args.out} has the others")
    if args.dry_run:
        return
    if missing:
        train_all(missing, args, study, results)
    if args.stage != "runs":
        report(args, study, results)


if __name__ == "__main__":
    main()
