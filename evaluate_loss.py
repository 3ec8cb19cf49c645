"""The validation loss of any checkpoint on a folder of images, with fixed timesteps and noise.

For the same held-out images it is the number that training writes to metrics.jsonl. Runs alone or under torchrun.
"""

import argparse
from pathlib import Path

import numpy as np

from runtime import distributed, files, monitor, options, validation
from runtime.data import ImageList
from runtime.options import UserError
from runtime.pretrained import Trained, load_trained, settings
from runtime.vae import VAE, load_vae


def build_parser() -> options.Parser:
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="folder with a sub-folder of images for each class")
    help = "val: the part of --data-path that the checkpoint's run held out with --val-fraction"
    add("--split", choices=["all", "val"], default="all", help=help)
    options.add_vae(parser, none="the one of the training")
    add("--batch-size", type=options.count, default=8, help="images at a time for each process, ten timesteps each")
    options.add_num_workers(parser, "image-reading processes for each process")
    options.add_precision(parser)
    add("--out", type=Path, default=None, help="JSON file for the loss and what decides it (None: print only)")
    options.add_checkpoint_options(parser)
    options.add_dry_run(parser)
    return parser


def select_images(args: argparse.Namespace, trained: Trained) -> ImageList:
    """The images to evaluate, labelled as the model knows their classes. Raises UserError."""
    images, name = ImageList(args.data_path), f"--data-path {str(args.data_path)!r}"
    if args.split == "val":
        images = held_out_part(images, trained)
    count, known = trained.config.model.num_classes, trained.classes
    if known is None and len(images.classes) != count:
        raise UserError(
            f"{name} has {len(images.classes)} class folders and checkpoint {args.ckpt!r}, which does not name its "
            f"classes, has {count}; give one folder for each class, sorted as in training"
        )
    known = known or images.classes
    unknown = sorted(set(images.classes) - set(known))
    if unknown:
        raise UserError(
            f"{name} has class folder {unknown[0]!r}, which checkpoint {args.ckpt!r} was not trained on "
            f"({len(unknown)} such in all); remove or rename them"
        )
    images.labels = np.array([known.index(name) for name in images.classes])[images.labels]
    return images


def held_out_part(images: ImageList, trained: Trained) -> ImageList:
    """What the checkpoint's run held out of these images. Raises UserError when it cannot be told."""
    stored, name = trained.config.validation, f"checkpoint {str(trained.path)!r}"
    if stored is None or stored.fraction is None:
        raise UserError(
            f"--split val: {name} was trained without --val-fraction, so nothing of --data-path was held out; give "
            "held-out images as --data-path and leave --split out"
        )
    left_out = set(stored.left_out)
    readable = images.subset(np.array([validation.hash_path(path) not in left_out for path in images.paths]))
    part = readable.subset(validation.split(readable.paths, readable.labels, readable.classes, stored.fraction))
    if part.fingerprint != stored.fingerprint:
        raise UserError(
            f"--split val: --data-path {str(images.root)!r} holds other files than the training of {name}, so its "
            f"{stored.images:,} held-out images cannot be told; give the training's folder (of an early run, without "
            "the files in skipped.txt of its latent cache)"
        )
    return part


def is_trained_on(images: ImageList, trained: Trained) -> bool | None:
    """Whether these are the images that the checkpoint was trained on, by relative paths; None where nobody knows."""
    was_trained_on = images.fingerprint == trained.config.data.fingerprint
    was_held_out = trained.config.validation is not None and images.fingerprint == trained.config.validation.fingerprint
    return None if was_trained_on == was_held_out else was_trained_on


def describe(trained: Trained, images: ImageList, vae: VAE, precision: str, args) -> dict:
    """What decides the loss."""
    return {
        **settings(trained, trained.sha256, args.ckpt, args.weights),
        "vae": vae.source,
        "vae_sha256": vae.config.sha256,
        "data_path": str(args.data_path),
        "split": args.split,
        "fingerprint": images.fingerprint,
        "images": len(images),
        "trained_on": is_trained_on(images, trained),
        "precision": precision,
    }


def write(path: Path, values: dict) -> None:
    with files.cannot_write(f"--out {str(path)!r}"):
        files.write_json(path, values)


@options.command
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.out is not None:
        files.check_output(args.out, ())
    trained = load_trained(args.ckpt, args.weights, options.given_model(args))
    images = select_images(args, trained)
    device, logger = distributed.setup(args.tf32), monitor.make_logger()
    vae, precision = load_vae(args.vae, trained, device), distributed.resolve_precision(args.precision, device)
    about, what = describe(trained, images, vae, precision, args), f"{len(images):,} images, {args.weights} weights"
    if about["trained_on"]:
        logger.warning(
            f"warning: --data-path {str(images.root)!r} holds the images that checkpoint {str(trained.path)!r} was "
            "trained on (by their relative paths), so this is no validation loss; give images that it was not trained "
            "on, or pass --split val where its run had a --val-fraction"
        )
    if args.dry_run:
        cost = f"{10 * len(images):,} evaluations of the model in {precision}, and one of the encoder for each image"
        return logger.info(f"dry run: would measure the loss of {what}: {cost}; nothing was written")
    encoded = validation.encode(images, trained.image_size, vae, args.num_workers)
    model, objective = trained.model.to(device), trained.config.objective
    losses = validation.image_losses([model], encoded, device, precision, args.batch_size, objective)
    scores = validation.summarize(losses[0])
    if scores["loss"] is None:
        raise UserError(
            f"the loss of {what} is not finite: checkpoint {args.ckpt!r} overflows in {precision}; use --precision "
            "fp32, or an earlier checkpoint"
        )
    logger.info(f"loss of {what}: {validation.describe_loss(scores)}")
    if args.out is not None:
        distributed.on_main(write, args.out, scores | about)


if __name__ == "__main__":
    main()
