"""The validation loss of any checkpoint: the noise MSE on a folder of images, with fixed timesteps and noise.

For the same held-out images it is the number that training writes to metrics.jsonl. Runs alone or under torchrun.
"""

import argparse
from pathlib import Path

import numpy as np
from torch import Tensor

from runtime import data, distributed, files, holdout, monitor, options, validation
from runtime.options import UserError
from runtime.pretrained import Trained, load_trained, settings
from runtime.vae import VAE, load_vae


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data-path", type=Path, required=True, help="folder with a sub-folder of images for each class")
    add(
        "--split",
        choices=["all", "val"],
        default="all",
        help="val: the part of --data-path that the checkpoint's run held out with --val-fraction",
    )
    options.add_vae(parser, none="the one of the training")
    add("--batch-size", type=options.count, default=8, help="images at a time for each process, ten timesteps each")
    options.add_num_workers(parser, "image-reading processes for each process")
    options.add_precision(parser)
    add("--out", type=Path, default=None, help="JSON file for the loss and what decides it (None: print only)")
    options.add_checkpoint_options(parser)
    args = parser.parse_args(argv)
    if args.out is not None and args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is a folder; expected the name of a file, such as loss.json")
    if args.out is not None and not args.out.parent.is_dir():
        raise UserError(f"--out {str(args.out)!r} cannot be written: {str(args.out.parent)!r} is not a folder")
    return args


def select_images(args: argparse.Namespace, trained: Trained) -> data.ImageList:
    """The images to evaluate, labelled as the model knows their classes. Raises UserError."""
    images = data.ImageList(args.data_path)
    if args.split == "val":
        images = held_out_part(images, trained)
    if trained.classes is None:
        if len(images.classes) != trained.config.model.num_classes:
            raise UserError(
                f"--data-path {str(args.data_path)!r} has {len(images.classes)} class folders and checkpoint "
                f"{args.ckpt!r}, which does not name its classes, has {trained.config.model.num_classes}; give one "
                "folder for each class, sorted as in training"
            )
        return images
    unknown = sorted(set(images.classes) - set(trained.classes))
    if unknown:
        raise UserError(
            f"--data-path {str(args.data_path)!r} has class folders that checkpoint {args.ckpt!r} was not trained "
            f"on: {holdout.list_names(unknown)}; remove or rename them"
        )
    images.labels = np.array([trained.classes.index(name) for name in images.classes])[images.labels]
    return images


def held_out_part(images: data.ImageList, trained: Trained) -> data.ImageList:
    """What the checkpoint's run held out of these images. Raises UserError when it cannot be told."""
    stored = trained.config.validation
    if stored is None or stored.fraction is None:
        raise UserError(
            f"--split val: checkpoint {str(trained.path)!r} was trained without --val-fraction, so nothing of "
            "--data-path was held out; give held-out images as --data-path and leave --split out"
        )
    left_out = set(stored.left_out)
    readable = images.subset(np.array([holdout.hash_path(path) not in left_out for path in images.paths]))
    part = readable.subset(holdout.split(readable.paths, readable.labels, readable.classes, stored.fraction))
    if part.fingerprint == stored.fingerprint:
        return part
    lost = f"so its {stored.images} held-out images cannot be told"
    if images.fingerprint == trained.config.data.fingerprint:
        raise UserError(
            f"--split val: the training of checkpoint {str(trained.path)!r} used a latent cache without the unreadable "
            f"images of --data-path {str(images.root)!r}, and does not list them, {lost}; remove the files that "
            "skipped.txt of that cache lists from the folder, or from a copy of it"
        )
    raise UserError(
        f"--split val: --data-path {str(images.root)!r} holds other files than the training of checkpoint "
        f"{str(trained.path)!r}, {lost}; give the training's folder"
    )


def is_trained_on(images: data.ImageList, trained: Trained) -> bool | None:
    """Whether these are the images that the checkpoint was trained on, by relative paths; None where nobody knows."""
    was_trained_on = images.fingerprint == trained.config.data.fingerprint
    was_held_out = trained.config.validation is not None and images.fingerprint == trained.config.validation.fingerprint
    return None if was_trained_on == was_held_out else was_trained_on


def warn_of_training_images(images: data.ImageList, trained: Trained, logger) -> None:
    """Say so where this is the loss of images that the checkpoint has seen."""
    held_out = trained.config.validation
    if held_out is None:
        remedy = "give images that it was not trained on"
    elif held_out.fraction is None:
        remedy = "give the images of its --val-data-path"
    else:
        remedy = f"pass --split val for the {held_out.images:,} that its run held out of them"
    if is_trained_on(images, trained):
        logger.warning(
            f"warning: --data-path {str(images.root)!r} holds the images that checkpoint {str(trained.path)!r} was "
            f"trained on (by their relative paths), so this is no validation loss; {remedy}"
        )


def describe(trained: Trained, images: data.ImageList, vae: VAE, precision: str, args) -> dict:
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


def check_finite(losses: Tensor, args: argparse.Namespace, precision: str) -> None:
    """Raise UserError unless the losses of all images (images, 10) are finite."""
    wrong = int((~losses.isfinite()).any(1).sum())
    if wrong:
        remedy = "--precision fp32, or " if precision != "fp32" else ""
        raise UserError(
            f"the loss of {wrong:,} of {len(losses):,} images is not finite: the {args.weights} weights of checkpoint "
            f"{args.ckpt!r} overflow in {precision}; use {remedy}an earlier checkpoint"
        )


def format_table(scores: dict) -> str:
    lines = ["timesteps  loss"]
    for k, loss in enumerate(scores["loss_tenths"]):
        lines.append(f"{100 * k:3d} - {100 * k + 99:3d}  {loss:.4f}")
    return "\n".join(lines)


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    trained = load_trained(args.ckpt, args.weights, options.given_model(args))
    images = select_images(args, trained)
    device = distributed.setup(args.tf32)
    vae, logger = load_vae(args.vae, trained, device), monitor.make_logger()
    precision = distributed.resolve_precision(args.precision, device)
    warn_of_training_images(images, trained, logger)
    encoded = validation.encode(images, trained.image_size, vae, args.num_workers)
    losses = validation.image_losses(
        [trained.model.to(device)], encoded, device, precision, args.batch_size, trained.config.objective
    )
    check_finite(losses[0], args, precision)
    scores = validation.summarize(losses[0])
    logger.info(f"noise MSE of {len(images):,} images, {args.weights} weights: {validation.describe(scores)}")
    logger.info(format_table(scores))
    if args.out is not None:
        found = scores | describe(trained, images, vae, precision, args)
        with files.cannot_write(f"--out {str(args.out)!r}"):
            distributed.on_main(lambda: files.write_json(args.out, found))


if __name__ == "__main__":
    main()
