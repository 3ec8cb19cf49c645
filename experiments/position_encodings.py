"""Compare position encodings by held-out denoising loss, and write what was found to docs/evidence.md.

Trains every variant with the same seeds on two small data sets. The same command goes on after an interruption, and
only writes the report once everything is measured. Run from the repository root:
python -m experiments.position_encodings
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

from experiments import data, evaluation, report, runs
from experiments.plan import FULL, MODEL, QUICK, VARIANTS, Run, Study, compared_runs, planned
from experiments.results import Results, resolve_places
from experiments.runs import Job, python
from runtime import monitor, options
from runtime.distributed import StopOnSignal
from runtime.monitor import REPOSITORY
from runtime.options import UserError

VAE = REPOSITORY / "assets" / "demo_vae"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work-dir", type=Path, default=Path("results/position_encodings"), help="data, latents, runs and weights")
    add("--out", type=Path, default=None, help="JSON of the results (None: beside this file; quick: in --work-dir)")
    add("--report", type=Path, default=None, help="page (None: docs/evidence.md, --out with .md; quick: in --work-dir)")
    add("--jobs", type=options.count, default=None, help="runs at a time, one thread each (None: one per core)")
    add("--stage", choices=["runs", "measurements", "report"], default=None, help="do one part (None: all)")
    add("--quick", action="store_true", help="digits alone, four variants, two seeds, 150 steps: ten minutes")
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir.resolve() / ("quick" if args.quick else "full")
    folders = (args.work_dir, args.work_dir) if args.quick else (REPOSITORY / "experiments", REPOSITORY / "docs")
    resolve_places(args, folders[0] / "position_encodings.json", folders[1] / "evidence.md")
    args.jobs = args.jobs or os.cpu_count()
    return args


def data_folder(args, data_set: str) -> Path:
    return args.work_dir.parent / "data" / data_set


def latents_folder(args, data_set: str) -> Path:
    return args.work_dir.parent / "data" / f"{data_set}_latents"


def prepare_data(args, study: Study, results: Results, logger) -> None:
    """Write the data sets and encode their training parts, where that is not done."""
    for data_set in study.variants:
        root = data_folder(args, data_set)
        counts = data.write_data_set(data_set, root)
        results.add("data", data_set, counts)
        logger.info(f"{data_set}: {', '.join(f'{number:,} {part}' for part, number in counts.items())}")
        runs.make_latents(root / "train", latents_folder(args, data_set), VAE, data.SIZE)


def training_job(run: Run, study: Study, args) -> Job:
    folder = args.work_dir / "runs" / run.key
    command = python(
        "train.py",
        latents_dir=latents_folder(args, run.data_set),
        no_flip=True,
        val_data_path=data_folder(args, run.data_set) / "val",
        val_every=study.val_every,
        results_dir=folder,
        model=MODEL,
        image_size=data.SIZE,
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
        **VARIANTS[run.variant],
    )
    return Job(run.key, folder, command)


def weights_path(run: Run, args) -> Path:
    return args.work_dir / "weights" / f"{run.key}.pt"


def train_all(args, study: Study, results: Results, logger) -> bool:
    """Train what is not recorded yet. Returns False when stopped on request."""
    by_key = {run.key: run for run in planned(study)}
    missing = [run for run in by_key.values() if run.key not in results.section("runs")]
    if not missing:
        logger.info(
            f"all {len(by_key)} runs are recorded in {str(args.out)!r}, nothing is trained; --out elsewhere repeats"
        )
        return True
    prepare_data(args, study, results, logger)
    origin = {"git_commit": monitor.git_commit(), "environment": results.environment(runs.environment())}

    def record(job: Job) -> None:
        run = by_key[job.key]
        if run.lr == study.lr:
            path = weights_path(run, args)
            path.parent.mkdir(parents=True, exist_ok=True)
            runs.keep_weights(job.folder, path)
        curve = runs.validation_curve(job.folder)
        last = {name: curve.pop(name)[-1] for name in ("val_loss_tenths", "val_loss_ema_tenths")}
        seconds = monitor.read_json(job.folder / runs.CPU_SECONDS)["cpu_seconds"]
        results.add("runs", run.key, {"cpu_seconds": seconds, **origin, **curve, **last})
        runs.remove_run(job.folder)

    logger.info(f"{len(missing)} of {len(by_key)} runs to train, {args.jobs} at a time")
    return runs.run_all([training_job(run, study, args) for run in missing], args.jobs, record, logger)


def measure_all(args, study: Study, results: Results, logger) -> bool:
    """Measure every trained run beyond its loss. Returns False when stopped on request."""
    missing = [run for run in compared_runs(study) if run.key not in results.section("translation")]
    lost = [run.key for run in missing if not weights_path(run, args).exists()]
    if lost:
        raise UserError(
            f"the weights of run {lost[0]} are not in {str(args.work_dir / 'weights')!r}, {len(lost)} in all; remove "
            f"their lines from {str(args.out)!r} to train them again"
        )
    for data_set in study.variants:
        if data_set not in results.section("reconstruction"):
            psnr = evaluation.reconstruction_psnr(data_folder(args, data_set), VAE)
            results.add("reconstruction", data_set, {"psnr": psnr})
    if not missing:
        return True
    logger.info(f"{len(missing)} trained runs to measure at other sizes and under translation")
    workers = multiprocessing.get_context("spawn")
    with (
        StopOnSignal() as stop,
        monitor.progress_bar(len(missing), unit="run") as bar,
        ProcessPoolExecutor(args.jobs, workers, evaluation.start_worker) as pool,
    ):
        futures = {submit(pool, run, study, args): run for run in missing}
        for future in as_completed(futures):
            for section, values in sorted(future.result().items()):  # "translation", which marks it as done, last
                results.add(section, futures[future].key, values)
            bar.update()
            if stop.received:
                pool.shutdown(cancel_futures=True)
                return False
    return True


def submit(pool: ProcessPoolExecutor, run: Run, study: Study, args) -> Future:
    draws_attention = run.seed == 0 and run.variant in study.attention_variants
    return pool.submit(
        evaluation.measure,
        weights_path(run, args),
        data_folder(args, run.data_set),
        VAE,
        beyond_grid=run.variant in study.beyond_grid_variants,
        attention=evaluation.ATTENTION_IMAGES[run.data_set] if draws_attention else None,
    )


def write_report(args, study: Study, results: Results, logger) -> None:
    """Write the page and its figures from what is recorded."""
    measured = report.Measured(study, results)
    folders = {data_set: data_folder(args, data_set) for data_set in study.variants}
    for data_set, folder in folders.items():  # the attention figure shows images of them
        data.write_data_set(data_set, folder)
    report.write_page(args.report, "experiments/position_encodings.py", measured, folders)
    logger.info(f"report: {args.report}")


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    study = QUICK if args.quick else FULL
    logger = monitor.make_logger()
    settings = {
        "model": MODEL,
        **dataclasses.asdict(study),
        "options": VARIANTS,
        **data.SETTINGS,
        **evaluation.SETTINGS,
    }
    results = Results(args.out, settings)
    for name, stage in (("runs", train_all), ("measurements", measure_all)):
        if args.stage in (None, name) and not stage(args, study, results, logger):
            logger.info("stopped on request; repeat the same command to go on")
            sys.exit(130)
    if args.stage in (None, "report"):
        write_report(args, study, results, logger)


if __name__ == "__main__":
    main()
