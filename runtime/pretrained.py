"""A trained model from any checkpoint: of train.py, of export.py, or of DiT, diffusers, the method's first release."""

import argparse
import math
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from diffusion.objectives import OBJECTIVES
from models import DiT
from rope import RopeConfig
from runtime import checkpoint, files, hub, model_folder
from runtime.config import ModelConfig, RunConfig, from_elsewhere, name_of
from runtime.options import UserError, check_image_size, check_rope, check_stored_rope, format_size

TABLE = "y_embedder.embedding_table.weight"


@dataclass(kw_only=True)
class Description:
    """What a checkpoint and the command line say about its model."""

    path: Path  # a file, or a folder of the hub
    label: str  # the checkpoint in a word, for the names of what is made with it
    config: RunConfig  # of the training
    step: int | None  # None when unknown
    image_size: tuple[int, int]  # to run at, as is latent_size; config has the trained one
    latent_size: tuple[int, int]
    rope_extend: str | None = None  # how positions reach beyond the trained size; None = at the trained size

    @property
    def classes(self) -> list[str] | None:
        """Names of the class folders, None when unknown."""
        return self.config.data.classes

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.config.model.in_channels, *self.latent_size)


@dataclass(kw_only=True)
class Trained(Description):
    """A model with its weights."""

    model: DiT
    sha256: str  # of the weights


def settings(found: Description, sha256: str | None, name: str, weights: str) -> dict:
    """What decides a result, as plain types, for a checkpoint asked for by name and "ema" or "model" of it."""
    return {
        "checkpoint": name,
        "weights_sha256": sha256,
        "step": found.step,
        "weights": weights,
        "model": found.config.model.to_dict(),
        "image_size": list(found.image_size),
        "rope_extend": found.rope_extend,
    }


def weights_sha256(found: Description, weights: str = "ema") -> str:
    """Hash of the checkpoint's weights, for which nothing else of the file is read."""
    return checkpoint.tensor_hash(_weights(_load(found.path), weights, found.path, found.config.model))


def describe(name: str | Path, weights: str = "ema", given: dict | None = None) -> Description:
    """As load_trained, without reading the weights: seconds less for a large file, and nothing is verified."""
    return _read(name, weights, given, verify=False)[0]


def load_trained(name: str | Path, weights: str = "ema", given: dict | None = None) -> Trained:
    """Rebuild the model from a checkpoint of this repository, or from a DiT-style file; name is what hub.find takes.

    weights is "ema" or "model". given holds what the command line says: "model", "image_size", "num_classes",
    "use_rope", "rope" (a dict of RopeConfig fields); None or missing keys are left to the checkpoint, and what
    is given has to agree with it, but for the image size of a RoPE model when "rope_extend" says how its positions
    reach beyond (see extended). A file without a config is completed from its "args", from the shapes of its
    weights, and from given; its border is clamp. Raises UserError.
    """
    description, tensors, stored_hash = _read(name, weights, given, verify=True)
    path, config = description.path, description.config.model
    for key, value in tensors.items():
        checkpoint.check_tensor(key, value, path)
    sha256 = checkpoint.tensor_hash(tensors)
    if stored_hash not in (None, sha256):
        raise UserError(f"checkpoint {str(path)!r} is damaged: its weights are not the exported ones; copy it again")
    with torch.device("meta"):  # initial weights of a large model take seconds, and none of them would be kept
        model = config.build()
    # Copied, since the file that they are mapped from may change; in float32, whatever the file has them in.
    model.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in tensors.items()}, assign=True)
    trained = Trained(**vars(description), model=model.eval().requires_grad_(False), sha256=sha256)
    if trained.rope_extend == "extrapolate":  # positions refer to the grid of the new size
        model.rope_embedder.pt_grid = tuple(length // config.patch_size for length in trained.latent_size)
    return trained


def _read(name, weights: str, given: dict | None, verify: bool) -> tuple[Description, dict[str, Tensor], str | None]:
    """Description, chosen weights and their exported hash; shapes are checked. verify reads every byte."""
    source, given = hub.find(name), {key: value for key, value in (given or {}).items() if value is not None}
    path = source.path
    state = _load(path, verify)
    with files.reading(f"checkpoint {str(path)!r}", "its settings are none that train.py or export.py writes"):
        tensors, step = _weights(state, weights, path), _step(state, path)
        stored = state.get("config") if isinstance(state.get("config"), dict) else None
        config = RunConfig.from_dict(stored) if stored else _from_foreign(state, tensors, given, source)
        _check_agreement(config.model, given, path)
        if config.model.rope is not None:
            check_stored_rope(config.model.rope)
        check_rope(config.model.rope, config.model.head_dim, config.model.model)
        _check_objective(config.objective, path)
        with torch.device("meta"):  # nothing is allocated before the shapes are those of the file
            expected = config.model.build().state_dict()
        tensors = _weights(state, weights, path, config.model)
    checkpoint.check_weights(expected, tensors, path)
    description = Description(
        path=path,
        label=source.label if path.is_file() or step is None else f"{step:07d}",
        config=config,
        step=step,
        image_size=config.image_size,
        latent_size=config.model.input_size,
    )
    if source.name is not None and verify:
        _announce(description, source.name)
    if "image_size" in given:
        description = extended(description, given["image_size"], given.get("rope_extend"))
    return description, tensors, state.get("weights_sha256")


def _load(path: Path, verify: bool = False) -> dict:
    """What a file or a folder of the hub holds."""
    return model_folder.load(path, verify) if path.is_dir() else checkpoint.load(path, verify)


def _step(state: dict, path: Path) -> int | None:
    """The step of the training, None when unknown. Raises UserError for one that no training has."""
    step = state.get("step", state.get("train_steps"))
    if isinstance(step, int) and not 0 <= step < 2**63:
        raise UserError(f"checkpoint {str(path)!r} has a step that is not from 0 to 2**63; copy it again")
    return step if isinstance(step, int) else None


def size_of(path: Path) -> int:
    """Bytes of a checkpoint: of the file, or of those in a folder that are the model."""
    parts = [path / name for name in model_folder.FILES] if path.is_dir() else [path]
    return sum(part.stat().st_size for part in parts if part.exists())


def _announce(found: Description, name: str) -> None:
    """Say on stderr, once, what a name stood for: the file, its size and the settings of the model."""
    if os.environ.get("RANK", "0") == "0":
        config, stored = found.config.model, files.format_bytes(size_of(found.path))
        size, rope = format_size(found.image_size), asdict(config.rope) if config.rope else "none"
        step = "" if found.step is None else f" at step {found.step:,}"
        print(
            f"checkpoint {name}: {config.model}{step}, image size {size}, {config.num_classes} classes, RoPE {rope}; "
            f"{stored} in {found.path}",
            file=sys.stderr,
        )


def extended(found: Description, image_size: tuple[int, int], rope_extend: str | None) -> Description:
    """The description of a RoPE model that is to run at another image size than it was trained at.

    "extrapolate" lets positions go on with the trained distance of neighbours (pt_grid of the new size);
    "interpolate" squeezes them into the trained range (pt_grid as trained). Raises UserError without either, and for
    sin-cos models, whose position table is fixed.
    """
    if image_size == found.image_size:
        return found
    asked, stored = f"--image-size {format_size(image_size)}", format_size(found.image_size)
    if found.config.model.rope is None:
        raise UserError(
            f"{asked} disagrees with checkpoint {str(found.path)!r}, which was trained with {stored} and has a fixed "
            "table of sin-cos positions for that size alone; leave the option out, or use a RoPE checkpoint"
        )
    if rope_extend is None:
        raise UserError(
            f"{asked} disagrees with checkpoint {str(found.path)!r}, which was trained with {stored}; pass "
            "--rope-extend extrapolate (positions go on) or interpolate (they are squeezed), or leave the option out"
        )
    latent_size = check_image_size(image_size, found.config.vae.downsampling, found.config.model.patch_size)
    return replace(found, image_size=image_size, latent_size=latent_size, rope_extend=rope_extend)


def _weights(state: dict, which: str, path: Path, config: ModelConfig | None = None) -> dict[str, Tensor]:
    """The chosen weights of a training checkpoint, or the file itself when it is a bare state dict.

    Once the model is known, a label table without the null class, which is that of a model from elsewhere, gets its
    row, of zeros: nothing ever looks it up.
    """
    chosen = state
    if isinstance(state.get("ema"), dict) or isinstance(state.get("model"), dict):
        chosen = state.get(which)
        if not isinstance(chosen, dict):
            other = "model" if which == "ema" else "ema"
            raise UserError(f"checkpoint {str(path)!r} has no {which!r} weights; pass --weights {other}")
    tensors = {name.removeprefix("module."): value for name, value in chosen.items() if isinstance(value, Tensor)}
    if "x_embedder.proj.weight" not in tensors:
        raise UserError(
            f"checkpoint {str(path)!r} holds no DiT weights (no x_embedder.proj.weight); expected a state dict, or a "
            "dict with 'ema' or 'model'"
        )
    table = tensors.get(TABLE)
    trained_without = config is not None and not config.class_dropout_prob
    if trained_without and table is not None and table.shape[:1] == (config.num_classes,):
        tensors[TABLE] = torch.cat([table, torch.zeros_like(table[:1])])
    return tensors


def _from_foreign(state: dict, tensors: dict[str, Tensor], given: dict, source: hub.Source) -> RunConfig:
    """What a file without a config tells by its args and its shapes; the rest is that of its name, or of given."""
    args, path = state.get("args"), source.path
    args = dict(vars(args) if isinstance(args, argparse.Namespace) else args or {})
    args = {**source.args, **args}
    shapes = _from_shapes(tensors, path)
    rope = _foreign_rope(args, given, path) if shapes.pop("has_rope") else None
    grid = shapes.pop("grid")
    if grid is not None:
        image_size = (grid * 8, grid * 8)
    else:
        asked = None if "rope_extend" in given else given.get("image_size")  # to extend is not to tell the trained size
        size = args.get("image_size", asked or 256)
        image_size = (int(size), int(size)) if not isinstance(size, tuple) else size
    patch = int(shapes["model"].split("/")[1])
    classes = _foreign_classes(shapes.pop("rows"), args.get("num_classes", given.get("num_classes")), path)
    model = ModelConfig(input_size=check_image_size(image_size, 8, patch), rope=rope, **shapes, **classes)
    return from_elsewhere(model, image_size, str(args.get("vae", "ema")))


def _foreign_classes(rows: int, asked: int | None, path: Path) -> dict:
    """Classes of a label table, the last row of which is the null class, unless as many classes were trained.

    DiT's code makes no row for the null class where class_dropout_prob is 0. Raises UserError where a file seems to
    be one of these and neither it nor the command line tells how many classes were trained.
    """
    if asked is None and rows == 1000:
        raise UserError(
            f"checkpoint {str(path)!r} has a label table of 1000 rows and does not say whether one is the null class; "
            "pass --num-classes 1000 for a model trained without label dropout, or 999"
        )
    return {"num_classes": rows, "class_dropout_prob": 0.0} if asked == rows else {"num_classes": rows - 1}


def _foreign_rope(args: dict, given: dict, path: Path) -> RopeConfig:
    names = [field.name for field in fields(RopeConfig)]
    stored = {name: args[f"rope_{name}"] for name in names if name != "border" and f"rope_{name}" in args}
    if "rotate" not in stored and not given.get("use_rope"):
        raise UserError(
            f"checkpoint {str(path)!r} uses RoPE and does not say which; pass --use-rope --rope-rotate R and the other "
            "--rope options it was trained with"
        )
    return RopeConfig(**{**given.get("rope", {}), **stored, "border": "clamp"})


def _from_shapes(tensors: dict[str, Tensor], path: Path) -> dict:
    """Model name, channels, classes and grid, from the shapes of the weights."""
    try:
        hidden, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        rows = tensors["final_layer.linear.weight"].shape[0]
        table = tensors[TABLE].shape[0]
        tokens = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else None
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"checkpoint {str(path)!r} is not a whole DiT ({error}); expected all of its weights"
        ) from error
    try:
        model = name_of(hidden, depth, patch)
    except ValueError as error:
        raise UserError(f"checkpoint {str(path)!r}: {error}") from error
    return {
        "model": model,
        "in_channels": channels,
        "rows": table,
        "learn_sigma": rows == 2 * channels * patch**2,
        "has_rope": "rope_embedder.freqs" in tensors,
        "grid": None if tokens is None else math.isqrt(tokens) * patch,
    }


def _check_objective(objective: str, path: Path) -> None:
    """Raise UserError unless this version knows how such a model is sampled."""
    if objective not in OBJECTIVES:
        raise UserError(
            f"checkpoint {str(path)!r} was trained with --objective {objective}, which diffusion/objectives.py does "
            f"not have; expected one of {', '.join(OBJECTIVES)}"
        )


def _check_agreement(config: ModelConfig, given: dict, path: Path) -> None:
    """Raise UserError when a flag says otherwise than the checkpoint."""
    stored = {
        "--model": config.model,
        "--num-classes": config.num_classes,
        "--use-rope": config.rope is not None,
    }
    flags = {"--model": given.get("model"), "--num-classes": given.get("num_classes")}
    flags["--use-rope"] = given.get("use_rope")
    for name, value in given.get("rope", {}).items():
        flags[f"--rope-{name.replace('_', '-')}"] = value
        stored[f"--rope-{name.replace('_', '-')}"] = getattr(config.rope, name, None)
    for flag, value in flags.items():
        if value is not None and value != stored[flag]:
            raise UserError(
                f"{flag} {value} disagrees with checkpoint {str(path)!r}, which was trained with {stored[flag]}; "
                "leave the flag out"
            )
