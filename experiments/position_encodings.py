"""Compare position encodings by held-out denoising loss, and write what was found to docs/evidence.md.

Trains every variant with the same seeds on two small data sets. The same command goes on after an interruption, and
only writes the report once everything is measured. Run from the repository root:
python -m experiments.position_encodings
"""

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from experiments import data, runs
from experiments.plan import FULL, MODEL, QUICK, VARIANTS, Run, Study, planned
from experiments.results import Results
from experiments.runs import Job, python
from runtime import monitor, options
from runtime.monitor import REPOSITORY
from runtime.options import UserError

VAE = REPOSITORY / "assets" / "demo_vae"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work-dir", type=Path, default=Path("results/position_encodings"), help="data, latents, runs and weights")
    add("--out", type=Path, default=None, help="JSON of the results (None: beside this file; quick: in --work-dir)")
    add("--report", type=Path, default=None, help="page to write (None: docs/evidence.md; quick: in --work-dir)")
    add("--jobs", type=options.count, default=None, help="runs at a time, one thread each (None: one per core)")
    add("--stage", choices=["runs", "report"], default=None, help="do one part (None: all)")
    add("--quick", action="store_true", help="fewer variants, seeds and steps: about ten minutes on two cores")
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir.resolve() / ("quick" if args.quick else "full")
    places = args.work_dir if args.quick else None
    args.out = args.out or (places or REPOSITORY / "experiments") / "position_encodings.json"
    args.report = args.report or (places or REPOSITORY / "docs") / "evidence.md"
    args.jobs = args.jobs or os.cpu_count()
    return args


def data_folder(args, data_set: str) -> Path:
    return args.work_dir.parent / "data" / data_set


def prepare_data(args, study: Study, results: Results, logger) -> None:
    """Write the data sets and encode their training parts, where that is not done."""
    for data_set in study.variants:
        root = data_folder(args, data_set)
        counts = data.write_data_set(data_set, root)
        results.add("data", data_set, counts)
        logger.info(f"{data_set}: {', '.join(f'{number:,} {part}' for part, number in counts.items())}")
        latents = root.with_name(f"{data_set}_latents")
        if not (latents / "meta.json").exists():
            command = python(
                "cache_latents.py",
                data_path=root / "train",
                latents_dir=latents,
                vae=VAE,
                image_size=data.SIZE,
                no_flip=True,
                num_workers=0,
            )
            if subprocess.run(command, cwd=REPOSITORY, env=os.environ | runs.ONE_THREAD).returncode:
                raise UserError(f"the latents of {data_set} were not made; see above, then repeat the command")


def training_job(run: Run, study: Study, args) -> Job:
    root = data_folder(args, run.data_set)
    folder = args.work_dir / "runs" / run.key
    command = python(
        "train.py",
        latents_dir=root.with_name(f"{run.data_set}_latents"),
        no_flip=True,
        val_data_path=root / "val",
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
        ema_decay=study.ema_decay,
        precision="fp32",
        num_workers=0,
        log_every=study.val_every,
        ckpt_every=2 * study.val_every,
        keep_checkpoints=1,
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
        return True
    prepare_data(args, study, results, logger)
    results.add("environment", "runs", runs.environment())
    commit = monitor.git_commit()

    def record(job: Job) -> None:
        run = by_key[job.key]
        if run.lr == study.lr:
            path = weights_path(run, args)
            path.parent.mkdir(parents=True, exist_ok=True)
            runs.keep_weights(job.folder, path)
        curve = runs.validation_curve(job.folder)
        last = {name: curve.pop(name)[-1] for name in ("val_loss_tenths", "val_loss_ema_tenths")}
        seconds = monitor.read_json(job.folder / runs.CPU_SECONDS)["cpu_seconds"]
        results.add("runs", run.key, {"cpu_seconds": seconds, "git_commit": commit, **curve, **last})
        runs.remove_run(job.folder)

    logger.info(f"{len(missing)} of {len(by_key)} runs to train, {args.jobs} at a time")
    return runs.run_all([training_job(run, study, args) for run in missing], args.jobs, record, logger)


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    study = QUICK if args.quick else FULL
    logger = monitor.make_logger()
    results = Results(args.out, {"model": MODEL, **dataclasses.asdict(study)})
    if args.stage in (None, "runs") and not train_all(args, study, results, logger):
        logger.info("stopped on request; repeat the same command to go on")
        sys.exit(130)


if __name__ == "__main__":
    main()
