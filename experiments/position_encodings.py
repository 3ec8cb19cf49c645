"""Compare position encodings by held-out denoising loss: train, measure, print tables, draw figures.

Every variant is trained with the same seeds on two small data sets. The same command goes on after an interruption, and
what is recorded is not measured again. Run from the repository root: python -m experiments.position_encodings
"""

import argparse
from pathlib import Path

from experiments import data, figures, runs, tables
from experiments.measurements import Trained, reconstruction_psnr
from experiments.plan import FULL, QUICK, VARIANTS, Run, Study
from experiments.runs import Results
from runtime import monitor, options
from runtime.monitor import REPOSITORY

PUBLISHED = REPOSITORY / "experiments" / "position_encodings.json"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    help = "digits alone, four variants, two seeds, 150 steps: ten minutes; results in --work-dir"
    parser.add_argument("--quick", action="store_true", help=help)
    args = runs.parse_args(parser, PUBLISHED, argv)
    args.data_dir = args.work_dir / "data"  # the same for both studies
    args.work_dir /= "quick" if args.quick else "full"
    if args.quick and args.out == PUBLISHED:
        args.out = args.work_dir / PUBLISHED.name
    return args


def training_options(run: Run, study: Study, root: Path) -> dict:
    """What differs from the demo's recipe; root is the data set's folder."""
    settings = dict(
        latents_dir=latents_of(root),
        val_data_path=root / "val",
        val_every=study.val_every,
        image_size=study.image_size,
        global_batch_size=study.batch,
        global_seed=run.seed,
        max_steps=study.steps,
        lr=run.lr,
        warmup_steps=study.warmup_steps,
        ema_decay=study.ema_decay,
        log_every=study.val_every,
        ckpt_every=3 * study.val_every,
        keep_checkpoints=1,
    )
    return settings | VARIANTS[run.variant].options


def measure(run: Run, study: Study, root: Path, folder: Path) -> dict[str, dict]:
    """What is kept of a finished run, by section of the results."""
    trained, found = Trained(folder, root, study), {"runs": validation_curve(folder)}
    if run.lr == study.lr:
        found["translation"] = trained.translation()
        if run.variant in study.beyond_grid_variants:
            found["beyond_grid"] = trained.beyond_grid()
        if run.variant in study.attention_variants and run.seed == 0:
            found["attention"] = trained.attention(study.attention_images[run.data_set])
    return found


def latents_of(root: Path) -> Path:
    return root.with_name(f"{root.name}_latents")


def validation_curve(folder: Path) -> dict[str, list]:
    """Steps with a validation and every val_ value at them; losses by tenth of the schedule at the last one alone."""
    records = [record for record in monitor.read_metrics(folder / "metrics.jsonl") if "val_loss" in record]
    names = ["step", *(name for name in records[0] if name.startswith("val_"))]
    curves = {name: [record[name] for record in records] for name in names}
    return {name: curve[-1] if name.endswith("_tenths") else curve for name, curve in curves.items()}


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    study = QUICK if args.quick else FULL
    by_key, roots = {run.key: run for run in study.runs}, {name: args.data_dir / name for name in study.variants}

    def prepare(results: Results) -> None:
        for name, root in roots.items():
            results.add("data", name, data.write_data_set(name, root, study))
            runs.make_latents(root / "train", latents_of(root), study.image_size)
            results.add("reconstruction", name, {"psnr": reconstruction_psnr(root, study.image_size)})

    sections = runs.complete(
        args,
        study.settings(),
        {key: training_options(run, study, roots[run.data_set]) for key, run in by_key.items()},
        prepare,
        lambda key, folder: measure(by_key[key], study, roots[by_key[key].data_set], folder),
    )
    if sections is not None:
        for name, root in roots.items():  # the figure of the attention shows images of them
            data.write_data_set(name, root, study)
        figures.draw_all(study, sections, args.data_dir, runs.figures_folder(args.out, PUBLISHED))
        print(tables.all_tables(study, sections))


if __name__ == "__main__":
    main()
