"""Export one set of weights of a checkpoint, averaged unless told otherwise, as a safetensors file to share."""

import argparse
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from runtime import checkpoint, files, options
from runtime.options import UserError
from runtime.pretrained import Trained, load_trained


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    options.add_checkpoint_options(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="file to write: .safetensors")
    add("--half", action="store_true", help="float16: half the size, and images that are only nearly the same")
    add("--overwrite", action="store_true", help="replace --out where it exists")
    options.add_dry_run(parser)
    args = parser.parse_args(argv)
    if args.rope_extend is not None:
        raise UserError(
            "--rope-extend is of no use here: the file has the trained size; give it to the sampling command"
        )
    files.check_output(args.out, (".safetensors",))
    if args.out.exists() and not args.overwrite:
        raise UserError(f"--out {str(args.out)!r} exists; choose another name, or pass --overwrite to replace it")
    return args


def halve(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float16, but for the frequencies of RoPE. Raises UserError where one is too large."""
    halved = {name: value if name == "rope_embedder.freqs" else value.half() for name, value in tensors.items()}
    too_large = [name for name, value in halved.items() if not bool(torch.isfinite(value).all())]
    if too_large:
        raise UserError(f"--half: {too_large[0]} has values beyond float16; leave --half out")
    return halved


def describe(trained: Trained, tensors: dict[str, Tensor], weights: str) -> dict:
    """What the file says about itself, of which load_trained needs weights, config and step."""
    return {
        "weights": weights,
        "step": trained.step,
        "weights_sha256": checkpoint.tensor_hash(tensors),
        "source": {"file": trained.path.name, "weights_sha256": trained.sha256},
        "config": trained.config.to_dict(),
    }


def write(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write the file whole or not at all. Raises OSError."""
    metadata = {"format": "pt", checkpoint.METADATA: json.dumps(about)}
    with files.whole_file(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))  # its own save_file would keep others from reading


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    trained = load_trained(args.ckpt, args.weights, options.given_model(args))
    tensors = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
    tensors = halve(tensors) if args.half else tensors
    about, size = describe(trained, tensors, args.weights), checkpoint.tensor_bytes(tensors)
    with files.cannot_write(f"--out {str(args.out)!r}", "free some space, or choose another"):
        files.check_space(args.out.parent, size)
        if not args.dry_run:
            write(args.out, tensors, about)
    if args.dry_run:
        size = files.format_bytes(size)
        return print(f"dry run: would export the {args.weights} weights of {trained.path}, {size}, to {args.out}")
    size, source_size = (path.stat().st_size for path in (args.out, trained.path))
    print(
        f"exported: {args.out}, {args.weights} weights, {size / 1e6:,.1f} MB ({size / source_size:.0%} of "
        f"{trained.path.name}), sha256 of the weights {about['weights_sha256']}"
    )


if __name__ == "__main__":
    main()
