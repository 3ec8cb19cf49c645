"""Compare position encodings by held-out denoising loss: train, measure, print tables, draw figures.

Every variant is trained with the same seeds on two small data sets. The same command goes on after an interruption, and
what is recorded is not measured again. Run from the repository root: python -m experiments.position_encodings
"""

import argparse
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch

from experiments import comparisons, figures, runs
from experiments.runs import Results
from experiments.study import FULL, QUICK, VARIANTS, Run, Study, write_data_set
from runtime import data, monitor, options, pretrained, validation
from runtime.monitor import REPOSITORY
from runtime.vae import VAE, sample_latents

PUBLISHED = REPOSITORY / "experiments" / "position_encodings.json"
VAE_FOLDER = REPOSITORY / "assets" / "demo_vae"
CPU = torch.device("cpu")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    help = "digits alone, four variants, two seeds, 150 steps: ten minutes; results in --work-dir"
    parser.add_argument("--quick", action="store_true", help=help)
    args = runs.parse_args(parser, PUBLISHED, argv)
    args.data_dir = args.work_dir / "data"  # the same for both studies
    args.work_dir /= "quick" if args.quick else "full"
    if args.quick and args.out == PUBLISHED:
        args.out, args.figures = args.work_dir / PUBLISHED.name, args.work_dir
    return args


def training_options(run: Run, study: Study, root: Path) -> dict:
    """What differs from the demo's recipe; root is the data set's folder."""
    same = ("image_size", "global_batch_size", "max_steps", "warmup_steps", "ema_decay", "val_every")
    places = dict(latents_dir=latents_of(root), val_data_path=root / "val")
    intervals = dict(log_every=study.val_every, ckpt_every=3 * study.val_every, keep_checkpoints=1)
    of_run = dict(global_seed=run.seed, lr=run.lr) | VARIANTS[run.variant].options
    return {name: getattr(study, name) for name in same} | places | intervals | of_run


def latents_of(root: Path) -> Path:
    return root.with_name(f"{root.name}_latents")


def validation_curve(folder: Path) -> dict[str, list]:
    """Steps with a validation and every val_ value at them; losses by tenth of the schedule at the last one alone."""
    records = [record for record in monitor.read_metrics(folder / "metrics.jsonl") if "val_loss" in record]
    names = ["step", *(name for name in records[0] if name.startswith("val_"))]
    curves = {name: [record[name] for record in records] for name in names}
    return {name: curve[-1] if name.endswith("_tenths") else curve for name, curve in curves.items()}


@cache
def held_out(folder: Path, size: int, vae: Path, count: int | None = None) -> validation.EncodedImages:
    """Images of a folder encoded at size x size pixels, all or count evenly spread; kept for the runs to come."""
    images = data.ImageList(folder)
    if count is not None:
        rows = np.linspace(0, len(images) - 1, count).round().astype(int)
        images = images.subset(np.isin(np.arange(len(images)), rows))
    return validation.encode(images, (size, size), VAE(str(vae), CPU), num_workers=0)


def reconstruction_psnr(folder: Path, size: int, vae: Path = VAE_FOLDER) -> float:
    """Peak signal-to-noise ratio (dB) of images after the autoencoder, of the error over all of them."""
    encoded, images = held_out(folder, size, vae), data.ImageList(folder)
    scale, shift = encoded.vae.scaling_factor, encoded.vae.shift_factor
    means = sample_latents(encoded.moments, scale, shift, noise=torch.zeros(()))
    originals = np.stack([data.read_image(images.path(index)) for index in range(len(images))])
    errors = VAE(str(vae), CPU).decode(means).numpy().astype(float) - originals
    return 10 * math.log10(255**2 / np.square(errors).mean())


def beyond_grid(ckpt: Path, root: Path, study: Study, vae: Path = VAE_FOLDER) -> dict[str, float]:
    """Held-out loss of the averaged weights on every grid of the study."""
    losses = {}
    for name, (part, size, extension) in study.grids.items():
        given = dict(image_size=(size, size), rope_extend=extension) if extension else {}
        model = pretrained.load_trained(ckpt, given=given).model
        images = held_out(root / part, size, vae, study.beyond_grid_images)
        losses[name] = float(validation.image_losses([model], images, CPU, "fp32").mean())
    return losses


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    study = QUICK if args.quick else FULL
    by_key, roots = {run.key: run for run in study.runs}, {name: args.data_dir / name for name in study.variants}

    def prepare(results: Results) -> None:
        for name, root in roots.items():
            results.add("data", name, write_data_set(name, root, study))
            runs.make_latents(root / "train", latents_of(root), study.image_size)
            results.add("reconstruction", name, {"psnr": reconstruction_psnr(root / "val", study.image_size)})

    def measure(key: str, folder: Path) -> dict:
        run, found = by_key[key], validation_curve(folder)
        if run.lr == study.lr and run.variant in study.beyond_grid_variants:
            found |= beyond_grid(folder, roots[run.data_set], study)
        return found

    given = {key: training_options(run, study, roots[run.data_set]) for key, run in by_key.items()}
    found = runs.complete(args, study.settings(), given, prepare, measure)
    if found is not None:
        figures.draw_all(study, found, args.figures)
        print(comparisons.all_tables(study, found))


if __name__ == "__main__":
    main()
