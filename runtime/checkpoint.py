"""Checkpoints: written whole or not at all, loaded without running code, turned back into a model."""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from models import SIZES, DiT, ModelConfig
from rope import RopeConfig
from runtime import hub
from runtime.classes import imagenet
from runtime.options import UserError, check_image_size, check_rope, format_size

TEMPORARY = ".partial"  # suffix of a file being written
METADATA = "spiral_rope_dit"  # key of a safetensors file under which export.py describes the weights, as JSON
METADATA_LIMIT = 2**24  # characters
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class SaveError(Exception):
    """A checkpoint could not be written; what was there before is untouched."""


def save(path: Path, state: dict) -> None:
    """Write state to path so that a reader sees a whole file or none. Raises SaveError, leaving no partial file."""
    with whole_file(path, tensor_bytes(state)) as file:
        torch.save(state, file)


@contextmanager
def whole_file(path: Path, needed: int) -> Iterator[BinaryIO]:
    """A file for needed bytes under a temporary name, which becomes path when the block ends. Raises SaveError."""
    partial = path.with_name(path.name + TEMPORARY)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise SaveError(f"checkpoint {str(path)!r} needs {needed} bytes and {free} are free on its disk")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        partial.unlink(missing_ok=True)
        raise SaveError(f"checkpoint {str(path)!r} could not be written: {error}") from error


def tensor_bytes(state) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(state, Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(tensor_bytes(value) for value in values)


def remove_partial(folder: Path) -> None:
    """Delete what a killed process left half-written."""
    for partial in folder.glob(f"*{TEMPORARY}"):
        partial.unlink()


def step_path(folder: Path, step: int) -> Path:
    return folder / f"{step:07d}.pt"


def training_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("*.pt") if re.fullmatch(r"\d{7,}", path.stem)]
    return sorted(found, key=lambda path: int(path.stem))


def latest(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies, None where there is none at all.

    Those that do not verify are reported and left alone. Raises UserError when they are all there is, since a fresh
    start would overwrite what may be days of work.
    """
    paths = training_checkpoints(folder)
    for path in reversed(paths):
        try:
            load(path, verify=True)
            return path
        except UserError as error:
            report(f"warning: skipped a checkpoint: {error}")
    if paths:
        raise UserError(f"no checkpoint in {str(folder)!r} can be read; restore one, or remove them to start afresh")
    return None


def prune(newest: Path, keep: int | None) -> None:
    """Delete all but keep checkpoints of a run, ending with newest, which was just written; None keeps all.

    Those of later steps were damaged when the run resumed. They count for nothing and are left for their owner.
    """
    if keep is not None:
        paths = training_checkpoints(newest.parent)
        for path in paths[: paths.index(newest) + 1][:-keep]:
            path.unlink()


def load(path: str | Path, verify: bool = False) -> dict:
    """Read a checkpoint into a dict of plain types and CPU tensors, mapped from the file rather than copied.

    Unpickling is restricted to tensors, plain types and argparse.Namespace: a file that asks for anything else is
    refused. verify also checks every byte against the checksums in the file, where it has them. A name that ends in
    .safetensors is read as such a file. Raises UserError.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} does not exist; expected a file such as checkpoints/0050000.pt")
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_archive(path, verify)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a pickle protocol: what matters is whether the file loads
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|class|function) `?([\w.]+)", str(error))
        what = f"it asks for {found[1]}" if found and "." in found[1] else "it is damaged, or not made by torch.save"
        raise UserError(f"checkpoint {str(path)!r} is refused: {what}; only tensors and plain values load") from error
    except UserError:
        raise
    except Exception as error:  # whatever a hostile file makes the reader raise, it is the file's fault
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"checkpoint {str(path)!r} cannot be read ({reason}); it is truncated or not a checkpoint: copy it again"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {str(path)!r} holds a {type(state).__name__}; expected a dict of weights")
    for name, tensor in _tensors(state):
        _check_stored(name, tensor, path)
    return state


def _tensors(state, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors anywhere in nested containers, each with its keys joined by dots."""
    if isinstance(state, Tensor):
        yield name, state
    if isinstance(state, argparse.Namespace):
        state = vars(state)
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, value in items:
        yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _check_stored(name: str, value: Tensor, path: Path) -> None:
    """Raise UserError unless every number that a tensor claims is in the file."""
    if value.layout != torch.strided or value.device.type != "cpu":
        kind = f"{value.layout} on {value.device.type}".removeprefix("torch.")
        raise UserError(f"checkpoint {str(path)!r}: {name} is {kind}; expected numbers stored in full")
    if value.untyped_storage().nbytes() < value.nbytes:
        raise UserError(f"checkpoint {str(path)!r}: {name} claims {value.nbytes} bytes, more than the file holds of it")


def _check_archive(path: Path, verify: bool) -> None:
    """Refuse archives that torch.save does not write: compressed entries can claim any size."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise UserError(f"checkpoint {str(path)!r} is refused: entry {entry.filename!r} is compressed")
            if entry.file_size > path.stat().st_size:
                raise UserError(
                    f"checkpoint {str(path)!r} is refused: entry {entry.filename!r} is larger than the file"
                )
        damaged = archive.testzip() if verify else None
        if damaged is not None:
            raise UserError(f"checkpoint {str(path)!r} is damaged: checksum of {damaged!r} differs; copy it again")


def _load_safetensors(path: Path) -> dict:
    """The weights of a safetensors file: alone, or as "ema" or "model" with what export.py says about them."""
    with safe_open(path, framework="pt") as file:
        tensors, text = file.get_tensors(), (file.metadata() or {}).get(METADATA)
    if text is None:
        return tensors
    if len(text) > METADATA_LIMIT:
        raise UserError(f"checkpoint {str(path)!r} is refused: its metadata has more than {METADATA_LIMIT} characters")
    about = json.loads(text)
    known = isinstance(about, dict) and about.get("weights") in ("ema", "model")
    if not (known and isinstance(about.get("config"), dict)):
        raise UserError(f"checkpoint {str(path)!r} has metadata that export.py does not write; export it again")
    return {about["weights"]: tensors, **{key: about.get(key) for key in ("config", "step", "weights_sha256")}}


@dataclass
class Trained:
    """A trained model as a checkpoint describes it."""

    path: Path
    model: DiT
    config: ModelConfig
    image_size: tuple[int, int]
    vae: dict  # "source", and the geometry where the checkpoint knows it
    classes: list[str] | None  # names of the class folders, None when unknown
    step: int | None  # None when unknown
    sha256: str  # of the weights
    latent_size: tuple[int, int]  # latent height and width of image_size
    data_fingerprint: str | None  # of the training data's relative paths, held-out ones included; None when unknown
    validation: dict | None  # what the run held out, as holdout.HeldOut.describe says it; None = nothing
    rope_extend: str | None = None  # how positions reach beyond the trained size; None = at the trained size

    def describe(self, name: str, weights: str) -> dict:
        """What decides a result, as plain types, for a checkpoint asked for by name and "ema" or "model" of it."""
        return {
            "checkpoint": name,
            "weights_sha256": self.sha256,
            "step": self.step,
            "weights": weights,
            "model": self.config.to_dict(),
            "image_size": list(self.image_size),
            "rope_extend": self.rope_extend,
        }


def load_trained(path: str | Path, weights: str = "ema", given: dict | None = None) -> Trained:
    """Rebuild the model from a checkpoint of this repository, or from a DiT-style file; path is what hub.find takes.

    weights is "ema" or "model". given holds what the command line says: "model", "image_size", "num_classes",
    "use_rope", "rope" (a dict of RopeConfig fields); None or missing keys are left to the checkpoint, and what
    is given has to agree with it, but for the image size of a RoPE model when "rope_extend" says how its positions
    reach beyond (see extend). A file without a config is completed from its "args", from the shapes of its
    weights, and from given; its border is clamp. Raises UserError.
    """
    source, given = hub.find(path), {key: value for key, value in (given or {}).items() if value is not None}
    path = source.path
    state = load(path, verify=True)
    tensors = _weights(state, weights, path)
    stored = state.get("config") if isinstance(state.get("config"), dict) else None
    try:
        known = _from_config(stored) if stored else _from_foreign(state, tensors, given, source)
        config: ModelConfig = known["config"]
        validation = _validation(stored.get("validation")) if stored else None
        _check_agreement(config, given, path)
        check_rope(config.rope, config.head_dim, config.model)
        with torch.device("meta"):  # nothing is allocated before the shapes are those of the file
            expected = config.build().state_dict()
    except UserError:
        raise
    except Exception as error:  # whatever a config can be made to say
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"checkpoint {str(path)!r} has a config that cannot be read ({reason})") from error
    _check_weights(expected, tensors, path)
    model = config.build()
    model.load_state_dict(tensors)
    step = state.get("step", state.get("train_steps"))
    trained = Trained(
        path=path,
        model=model.eval().requires_grad_(False),
        config=config,
        image_size=known["image_size"],
        vae=known["vae"],
        classes=known["classes"],
        step=step if isinstance(step, int) else None,
        sha256=weights_hash(tensors),
        latent_size=config.input_size,
        data_fingerprint=known.get("data_fingerprint"),
        validation=validation,
    )
    if state.get("weights_sha256") not in (None, trained.sha256):
        raise UserError(f"checkpoint {str(path)!r} is damaged: its weights are not the exported ones; copy it again")
    if source.name is not None:
        _announce(trained, source.name)
    return extend(trained, given["image_size"], given.get("rope_extend")) if "image_size" in given else trained


def _validation(stored: dict | None) -> dict | None:
    """What a config says of held-out images. Raises KeyError, TypeError or ValueError for what train.py never wrote."""
    if stored is None:
        return None
    fraction, images = stored["fraction"], int(stored["images"])
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"validation.fraction is {fraction!r}")
    left_out = [str(digest) for digest in stored.get("left_out", [])]  # runs of earlier versions did not list them
    return {"fraction": fraction, "fingerprint": str(stored["fingerprint"]), "images": images, "left_out": left_out}


def _announce(trained: Trained, name: str) -> None:
    """Say on stderr, once, what a name stood for: the file, its size and the settings of the model."""
    if os.environ.get("RANK", "0") == "0":
        config, megabytes = trained.config, trained.path.stat().st_size / 1e6
        size, rope = format_size(trained.image_size), asdict(config.rope) if config.rope else "none"
        step = "" if trained.step is None else f" at step {trained.step:,}"
        print(
            f"checkpoint {name}: {config.model}{step}, image size {size}, {config.num_classes} classes, RoPE {rope}; "
            f"{megabytes:,.1f} MB in {trained.path}",
            file=sys.stderr,
        )


def extend(trained: Trained, image_size: tuple[int, int], rope_extend: str | None) -> Trained:
    """Set a RoPE model to another image size than it was trained at.

    "extrapolate" lets positions go on with the trained distance of neighbours (pt_grid of the new size);
    "interpolate" squeezes them into the trained range (pt_grid as trained). Raises UserError without either, and for
    sin-cos models, whose position table is fixed.
    """
    if image_size == trained.image_size:
        return trained
    asked, stored = (f"--image-size {format_size(image_size)}", format_size(trained.image_size))
    if trained.config.rope is None:
        raise UserError(
            f"{asked} disagrees with checkpoint {str(trained.path)!r}, which was trained with {stored} and has a fixed "
            "table of sin-cos positions for that size alone; leave the option out, or use a RoPE checkpoint"
        )
    if rope_extend is None:
        raise UserError(
            f"{asked} disagrees with checkpoint {str(trained.path)!r}, which was trained with {stored}; pass "
            "--rope-extend extrapolate (positions go on) or interpolate (they are squeezed), or leave the option out"
        )
    patch = trained.config.patch_size
    downsampling = trained.image_size[0] // trained.config.input_size[0]
    height, width = check_image_size(image_size, downsampling, patch)
    if rope_extend == "extrapolate":
        trained.model.rope_embedder.pt_grid = (height // patch, width // patch)
    return replace(trained, image_size=image_size, latent_size=(height, width), rope_extend=rope_extend)


def weights_hash(tensors: dict[str, Tensor]) -> str:
    """Hash of names and values of weights, whatever file they came in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _weights(state: dict, which: str, path: Path) -> dict[str, Tensor]:
    """The chosen weights of a training checkpoint, or the file itself when it is a bare state dict."""
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
    for name, value in tensors.items():
        _check_tensor(name, value, path)
    return tensors


def _check_tensor(name: str, value: Tensor, path: Path) -> None:
    """Raise UserError unless a tensor holds floating-point numbers, all of them finite."""
    if value.dtype not in FLOATS:
        kind = str(value.dtype).removeprefix("torch.")
        raise UserError(f"checkpoint {str(path)!r}: {name} is of type {kind}; expected floating-point numbers")
    if not bool(torch.isfinite(value).all()):
        raise UserError(
            f"checkpoint {str(path)!r} has values in {name} that are not finite numbers; use an earlier one"
        )


def check_training_state(state: dict, model: DiT, path: Path) -> None:
    """Raise UserError unless weights, averages and optimizer moments are finite and of the model's shapes.

    A file in the run's folder need not be ours, and torch checks no shapes when it loads an optimizer.
    """
    if not (isinstance(state["step"], int) and state["step"] >= 0):
        raise UserError(f"checkpoint {str(path)!r} has a step that is no whole number >= 0; use another")
    for which in ("model", "ema"):
        for name, value in state[which].items():
            _check_tensor(f"{which} {name}", value, path)
        _check_weights(model.state_dict(), state[which], path)
    moments, parameters = state["opt"]["state"], list(model.named_parameters())
    if sorted(moments) != list(range(len(parameters))):
        raise UserError(f"checkpoint {str(path)!r} has optimizer states of {len(moments)} of {len(parameters)} weights")
    for index, (name, parameter) in enumerate(parameters):
        for key, shape in {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}.items():
            value = moments[index][key]
            _check_tensor(f"optimizer {key} of {name}", value, path)
            if value.shape != shape:
                raise UserError(
                    f"checkpoint {str(path)!r}: optimizer {key} of {name} has shape {tuple(value.shape)}, expected "
                    f"{tuple(shape)}"
                )


def _from_config(stored: dict) -> dict:
    config, vae = ModelConfig.from_dict(stored["model"]), dict(stored["vae"])
    fingerprint = stored["data"].get("fingerprint")
    return {
        "config": config,
        "image_size": tuple(length * int(vae["downsampling"]) for length in config.input_size),
        "vae": {**vae, "source": str(vae["source"])},
        "classes": stored["data"].get("classes"),
        "data_fingerprint": None if fingerprint is None else str(fingerprint),
    }


def _from_foreign(state: dict, tensors: dict[str, Tensor], given: dict, source: hub.Source) -> dict:
    """What a file without a config tells by its args and its shapes; the rest is that of its name, or of given."""
    args, path = state.get("args"), source.path
    args = dict(args if isinstance(args, dict) else vars(args)) if args is not None else {}
    args = {**source.args, **args}
    shapes = _from_shapes(tensors, path)
    rope = None
    if shapes.pop("has_rope"):
        rope = _foreign_rope(args, given, path)
    grid = shapes.pop("grid")
    if grid is not None:
        image_size = (grid * 8, grid * 8)
    else:
        asked = None if "rope_extend" in given else given.get("image_size")  # to extend is not to tell the trained size
        size = args.get("image_size", asked or 256)
        image_size = (int(size), int(size)) if not isinstance(size, tuple) else size
    patch = int(shapes["model"].split("/")[1])
    config = ModelConfig(input_size=check_image_size(image_size, 8, patch), rope=rope, **shapes)
    return {
        "config": config,
        "image_size": image_size,
        "vae": {"source": str(args.get("vae", "ema")), "downsampling": 8},
        "classes": list(imagenet()) if config.num_classes == 1000 else None,  # what files from elsewhere train on
    }


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
        classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
        tokens = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else None
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"checkpoint {str(path)!r} is not a whole DiT ({error}); expected all of its weights"
        ) from error
    sizes = [name for name, size in SIZES.items() if (size["hidden_size"], size["depth"]) == (hidden, depth)]
    if not sizes or patch not in (2, 4, 8):
        raise UserError(
            f"checkpoint {str(path)!r} has hidden size {hidden}, depth {depth} and patch {patch}, which is none of "
            f"DiT-{{{'|'.join(SIZES)}}}/{{2|4|8}}"
        )
    return {
        "model": f"DiT-{sizes[0]}/{patch}",
        "in_channels": channels,
        "num_classes": classes,
        "learn_sigma": rows == 2 * channels * patch**2,
        "has_rope": "rope_embedder.freqs" in tensors,
        "grid": None if tokens is None else math.isqrt(tokens) * patch,
    }


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


def _check_weights(expected: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    """Raise UserError unless names and shapes are the expected ones."""
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    wrong = [n for n in expected if n in tensors and tensors[n].shape != expected[n].shape]
    if missing:
        raise UserError(f"checkpoint {str(path)!r} lacks {len(missing)} weights, such as {min(missing)}")
    if unexpected:
        raise UserError(f"checkpoint {str(path)!r} has {len(unexpected)} unknown weights, such as {min(unexpected)}")
    if wrong:
        shapes = f"{tuple(tensors[wrong[0]].shape)}, expected {tuple(expected[wrong[0]].shape)}"
        raise UserError(f"checkpoint {str(path)!r}: {wrong[0]} has shape {shapes}")
