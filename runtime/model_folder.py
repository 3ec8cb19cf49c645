"""A model as a folder, on disk or on the Hugging Face hub: config.json beside the weights.

config.json has the arguments of DiT, from which DiT.from_pretrained builds it, as save_pretrained writes them. What
export.py writes has more: the other settings of the run under "training", "weights" ("ema" or "model"), step, source,
and checksums of weights and config. Folders in diffusers' layout load too.
"""

import json
from pathlib import Path

from torch import Tensor

from runtime import checkpoint, diffusers_layout, files
from runtime.config import ModelConfig, from_elsewhere
from runtime.options import UserError, first_line

CONFIG = "config.json"
BELOW = "transformer"  # folder of config and weights in a pipeline of diffusers
WEIGHTS = "model.safetensors"
FILES = (CONFIG, WEIGHTS, *diffusers_layout.WEIGHTS)  # those of them that are there are the model
NEEDED = ("patch_size", "hidden_size", "depth", "num_heads", "num_classes")  # which tell a DiT from other models


def find(folder: Path) -> Path | None:
    """The folder itself, or the one below it, where config.json or weights are; None where there is neither."""
    holders = (folder, folder / BELOW)
    return next((holder for holder in holders if any((holder / name).exists() for name in FILES)), None)


def weights_names(config: dict) -> tuple[str, ...]:
    """What the file of weights beside a config.json can be called."""
    return diffusers_layout.WEIGHTS if "_class_name" in config else (WEIGHTS,)


def read_config(folder: Path) -> tuple[dict, ModelConfig]:
    """What config.json says, and the model that it describes. Raises UserError where that is no DiT."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"checkpoint {str(folder)!r} has no {CONFIG}; copy the whole folder")
    config = files.read_json(path)
    try:
        arguments = diffusers_layout.arguments(config) if "_class_name" in config else config
        missing = [name for name in NEEDED if name not in arguments]
        if missing:
            raise ValueError(f"it has no {missing[0]}")
        checkpoint.check_seal(config, folder)
        return config, ModelConfig.from_arguments(arguments)
    except UserError:
        raise
    except Exception as error:  # whatever a config can be made to say
        reason = f"{type(error).__name__}: " * (not isinstance(error, ValueError)) + first_line(error)
        raise UserError(
            f"checkpoint {str(folder)!r} is no DiT by its {CONFIG} ({reason}); expected a folder of export.py, of "
            "DiT.save_pretrained, or DiT in diffusers' layout"
        ) from error


def load(folder: Path, verify: bool = False) -> dict:
    """What checkpoint.load gives for a file: weights, alone or as "ema" or "model", "config" and what else is known.

    Raises UserError where something is missing, damaged, or of another kind of model.
    """
    config, model = read_config(folder)
    names = weights_names(config)
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise UserError(f"checkpoint {str(folder)!r} has no {' or '.join(names)}; copy the whole folder")
    state = checkpoint.load(path, verify)
    tensors = next((state[key] for key in ("ema", "model") if isinstance(state.get(key), dict)), state)
    if "_class_name" in config:
        try:
            tensors = diffusers_layout.renamed(tensors, model)
        except Exception as error:  # whatever a file can be made to hold
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"checkpoint {str(path)!r} is no DiT in diffusers' layout ({reason})") from error
    if "weights" not in config:
        run = from_elsewhere(model, (model.input_size[0] * 8, model.input_size[1] * 8))
        return {**tensors, "config": run.to_dict()}
    training = config.get("training") if isinstance(config.get("training"), dict) else {}
    return checkpoint.described(tensors, {**config, "config": {**training, "model": model.to_dict()}}, folder)


def stored(about: dict) -> dict:
    """config.json of weights about which export.py says this."""
    training = dict(about["config"])
    model = ModelConfig.from_dict(training.pop("model"))
    others = {key: value for key, value in about.items() if key not in ("config", "sha256")}
    return files.sealed({**model.arguments(), "training": training, **others})


def write(folder: Path, tensors: dict[str, Tensor], about: dict, others: dict[str, bytes]) -> None:
    """Write weights, config.json and other files, each whole or not at all; config.json last, which makes it a model.

    Raises OSError, and then leaves no folder that it made.
    """
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        (folder / CONFIG).unlink(missing_ok=True)
        checkpoint.save_safetensors(folder / WEIGHTS, tensors, about)
        for name, content in others.items():
            with files.whole_file(folder / name) as file:
                file.write(content)
        files.write_text(folder / CONFIG, json.dumps(stored(about), indent=2) + "\n")
    except BaseException:
        if is_new:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        raise
