"""Export one set of weights of a checkpoint, averaged unless told otherwise: a folder for the hub, or one file."""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor

from runtime import checkpoint, files, hub, model_card, model_folder, options
from runtime.options import UserError
from runtime.pretrained import Trained, load_trained, size_of

FILE = ".safetensors"
OTHER_FILES = (".pt", ".pth", ".bin", ".ckpt")  # which nobody means as a folder


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    options.add_checkpoint_options(parser)
    add = parser.add_argument
    help = "folder to write, with model.safetensors, config.json and README.md; or a file: .safetensors"
    add("--out", type=Path, required=True, help=help)
    add("--push", default=None, metavar="YOU/REPO", help="also upload the folder to the Hugging Face hub")
    add("--half", action="store_true", help="float16: half the size, and images that are only nearly the same")
    add("--overwrite", action="store_true", help="replace what --out has of it")
    options.add_dry_run(parser)
    args = parser.parse_args(argv)
    if args.rope_extend is not None:
        raise UserError(
            "--rope-extend is of no use here: the file has the trained size; give it to the sampling command"
        )
    check_out(args.out, args.overwrite)
    if args.push is not None and args.out.suffix == FILE:
        raise UserError(f"--push uploads a folder, and --out {str(args.out)!r} is a file; name a folder")
    return args


def check_out(out: Path, overwrite: bool) -> None:
    """Raise UserError where what would be written cannot be, or would replace something that is not to be replaced."""
    name = f"--out {str(out)!r}"
    if out.suffix in (FILE, *OTHER_FILES):
        files.check_output(out, (FILE,))
        written = [out]
    else:
        files.check_folder(out, "--out")
        if not out.parent.is_dir():
            raise UserError(f"{name} is in a folder that does not exist; make the folder first")
        if (out / "checkpoints").exists() or os.path.basename(os.path.realpath(out)) == "checkpoints":
            raise UserError(f"{name} is the folder of a run or of its checkpoints; choose another")
        names = (model_folder.CONFIG, model_folder.WEIGHTS, model_card.README, model_card.PICTURE)
        written = [out / name for name in names]
    for path in written:
        if path.exists() and not overwrite:
            raise UserError(f"--out {str(path)!r} exists; choose another name, or pass --overwrite to replace it")


def halve(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float16, but for the frequencies of RoPE. Raises UserError where one is too large."""
    halved = {name: value if name == "rope_embedder.freqs" else value.half() for name, value in tensors.items()}
    too_large = [name for name, value in halved.items() if not bool(torch.isfinite(value).all())]
    if too_large:
        raise UserError(f"--half: {too_large[0]} has values beyond float16; leave --half out")
    return halved


def describe(trained: Trained, tensors: dict[str, Tensor], weights: str) -> dict:
    """What the file says about itself, of which load_trained needs weights, config and step; with a checksum of it."""
    about = {
        "weights": weights,
        "step": trained.step,
        "weights_sha256": checkpoint.tensor_hash(tensors),
        "source": {"file": trained.path.name, "weights_sha256": trained.sha256},
        "config": trained.config.to_dict(),
    }
    return files.sealed(about)


def write(args: argparse.Namespace, trained: Trained, tensors: dict[str, Tensor], about: dict) -> list[Path]:
    """Write the file, or those of the folder, each whole or not at all; which these are. Raises OSError, UserError."""
    if args.out.suffix == FILE:
        checkpoint.save_safetensors(args.out, tensors, about)
        return [args.out]
    address = f"hf://{args.push}" if args.push else str(args.out)
    card = model_card.make(trained, args.weights, args.half, address)
    model_folder.write(args.out, tensors, about, card)
    return [args.out / name for name in (model_folder.WEIGHTS, model_folder.CONFIG, *card)]


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.push is not None:
        hub.check_push(args.push)
    trained = load_trained(args.ckpt, args.weights, options.given_model(args))
    tensors = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    tensors = halve(tensors) if args.half else tensors
    about, size = describe(trained, tensors, args.weights), checkpoint.tensor_bytes(tensors)
    with files.cannot_write(f"--out {str(args.out)!r}", "free some space, or choose another"):
        files.check_space(args.out.parent, size)
        written = [] if args.dry_run else write(args, trained, tensors, about)
    if args.dry_run:
        size, pushed = files.format_bytes(size), f" and upload it to {args.push}" if args.push else ""
        return print(
            f"dry run: would export the {args.weights} weights of {trained.path}, {size}, to {args.out}{pushed}"
        )
    size = sum(map(size_of, written))
    print(
        f"exported: {args.out}, {args.weights} weights, {size / 1e6:,.1f} MB ({size / size_of(trained.path):.0%} of "
        f"{trained.path.name}), sha256 of the weights {about['weights_sha256']}"
    )
    if args.push:
        print(f"uploaded: {hub.push(args.out, [path.name for path in written], args.push)}")


if __name__ == "__main__":
    main()
