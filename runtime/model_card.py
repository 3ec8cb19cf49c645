"""README.md of a model on the Hugging Face hub, made from the run's folder: use, what was measured, data, settings."""

import json
import shlex
from pathlib import Path

from runtime import files, monitor, options, pictures, report
from runtime.config import DEFAULT_OBJECTIVE, RunConfig, flatten
from runtime.pretrained import Trained

README = "README.md"
PICTURE = "samples.jpg"
TAGS = ("dit", "diffusion", "image-generation", "class-conditional", "model_hub_mixin", "pytorch_model_hub_mixin")
DDPM = """from diffusion import create_diffusion
"""
PYTHON = """import torch

{imports}from models import DiT
from runtime.vae import VAE

model = DiT.from_pretrained({name})  # in evaluation mode
"""
SAMPLING = """labels = torch.tensor({labels})
noise = torch.randn(len(labels), {shape}, generator=torch.Generator().manual_seed(0))
options = {{"y": labels, "cfg_scale": 4.0}}
latents = create_diffusion("50").p_sample_loop(
    model.forward_with_cfg, noise.shape, noise, clip_denoised=False, model_kwargs=options
)
images = VAE({vae}).decode(latents)  # ({count}, {height}, {width}, 3) uint8
"""


def make(trained: Trained, weights: str, half: bool, address: str) -> dict[str, bytes]:
    """README.md, and the picture that it shows where the run has one of these weights.

    weights is "ema" or "model", address what --ckpt is to be given: a folder, or hf://you/repo. Raises UserError where
    what a run wrote is damaged, OSError where it cannot be read.
    """
    run = run_folder(trained)
    picture, caption = (None, "") if run is None else newest_picture(run, trained, weights)
    parts = [
        header(trained, weights, half),
        f"![{caption}]({PICTURE})\n\n*{caption[0].upper()}{caption[1:]}.*\n" if picture else "",
        use(trained.config, address),
        "" if run is None else measured(run, trained, weights, half),
        data(trained.config),
        settings(trained.config, run),
    ]
    tags = "".join(f"- {tag}\n" for tag in sorted((*TAGS, *(["rope"] if trained.config.model.rope else []))))
    text = f"---\ntags:\n{tags}pipeline_tag: unconditional-image-generation\n---\n\n" + "\n".join(filter(None, parts))
    found = {README: text.encode(errors="backslashreplace")}
    return found | ({PICTURE: report.jpeg(picture)} if picture else {})


def run_folder(trained: Trained) -> Path | None:
    """The run that a checkpoint lies in, None where it lies elsewhere."""
    folder = trained.path.parent.parent
    return folder if trained.path.parent.name == "checkpoints" and (folder / "config.json").is_file() else None


def header(trained: Trained, weights: str, half: bool) -> str:
    """What it is."""
    config, parameters = trained.config, sum(weight.numel() for weight in trained.model.parameters())
    size = " × ".join(map(str, config.image_size))
    steps = "" if trained.step is None else f" after {trained.step:,} steps of training"
    kind = {"ema": "averaged ", "model": "raw "}[weights] if config.recipe else ""  # of files from elsewhere unknown
    kind += "weights, in float16," if half else "weights"
    return (
        f"# {title(config)}\n\n"
        "A class-conditional latent diffusion transformer ([DiT](https://arxiv.org/abs/2212.09748)"
        + (", with [Spiral RoPE](https://arxiv.org/abs/2602.03227)" if config.model.rope else "")
        + f"): {parameters:,} parameters, images of {size} pixels, {config.model.num_classes:,} classes. These are the "
        f"{kind}{steps}.\n"
    )


def title(config: RunConfig) -> str:
    return f"{config.model.model}, {report.positions(config)}"


def vae_for_others(config: RunConfig) -> str | None:
    """The autoencoder as others can name it; None where it was a folder of this computer."""
    return None if Path(config.vae.source).is_absolute() else config.vae.source


def use(config: RunConfig, address: str) -> str:
    """Commands and Python. What the classes are called is known to the commands."""
    vae, name, address = vae_for_others(config), json.dumps(address.removeprefix("hf://")), shlex.quote(address)
    note = "" if vae else " `FOLDER` is the autoencoder that it was trained with."
    given, guided = "" if vae else " --vae FOLDER", config.model.class_dropout_prob > 0
    given += "" if guided else " --cfg-scale 1"
    text = (
        f"## Use\n\nIn a clone of the code that wrote it, a few images and 50,000 for FID:{note}\n\n"
        f"```bash\npython sample.py --ckpt {address}{given}\n"
        f"torchrun --nproc_per_node 8 sample_ddp.py --ckpt {address}{given}\n```\n\nIn Python:\n\n```python\n"
    )
    samples = config.objective == DEFAULT_OBJECTIVE and guided
    text += PYTHON.format(imports=DDPM if samples else "", name=name)
    if samples:
        labels = list(range(min(4, config.model.num_classes)))
        channels, (height, width) = config.model.in_channels, config.model.input_size
        shape, (rows, columns) = f"{channels}, {height}, {width}", config.image_size
        text += SAMPLING.format(
            labels=labels, shape=shape, vae=json.dumps(vae or "FOLDER"), count=len(labels), height=rows, width=columns
        )
    return text + "```\n"


def of_these_weights(settings: dict | None, trained: Trained) -> bool:
    """Whether samples that were made with such settings are of these weights."""
    return isinstance(settings, dict) and settings.get("weights_sha256") == trained.sha256


def newest_picture(run: Path, trained: Trained, weights: str) -> tuple[Path | None, str]:
    """A grid of samples of these weights and its caption: the newest of sample_ddp.py, or the training's own."""
    inside = pictures.samples_folder(run)
    grids = [path.with_suffix(".png") for path in inside.glob("*.json") if path.with_suffix(".png").is_file()]
    grids = [grid for grid in grids if of_these_weights(files.read_json(grid.with_suffix(".json")), trained)]
    if grids:
        grid = max(grids, key=lambda path: path.stat().st_mtime_ns)
        made = sampled_with(files.read_json(grid.with_suffix(".json")))
        return grid, f"the first samples, not chosen: {made}"
    grid = pictures.grid_path(run, trained.step or 0)
    if weights == "ema" and trained.step is not None and grid.is_file():
        return grid, f"samples drawn during training, at step {trained.step:,}"
    return None, ""


def sampled_with(settings: dict) -> str:
    """The settings of sample_ddp.py in a line."""
    names = {"sampler": "{}", "steps": "{} steps", "cfg_scale": "guidance {}", "seed": "seed {}"}
    return ", ".join(text.format(settings[name]) for name, text in names.items() if name in settings)


def measured(run: Path, trained: Trained, weights: str, half: bool) -> str:
    """What metrics.jsonl says up to this step, and what was measured of samples of these weights."""
    recipe = trained.config.recipe
    records = [r for r in monitor.read_metrics(run / "metrics.jsonl") if r["step"] <= (trained.step or 0)]
    rows = report.summary(recipe.global_batch_size, records, finished=True) if records and recipe else {}
    rows.pop("step, finished", None)
    for path in sorted(pictures.samples_folder(run).glob("*.metrics.json")):
        found = files.read_json(path)
        if of_these_weights(found.get("sampling"), trained):
            made = sampled_with(found["sampling"])
            rows |= {f"{label} ({made})": text for label, text in report.metrics(found).items()}
    if not rows:
        return ""
    device = files.read_json(run / "config.json").get("device")
    about = f"On {device}." if isinstance(device, str) else ""
    about += " Of the float32 weights that these are rounded from." if half else ""
    return f"## Measured\n\n{about.strip()}\n\n{table(rows)}"


def data(config: RunConfig) -> str:
    """The images that it was trained on, as far as the checkpoint knows."""
    rows = {"images": config.data.images, "held out": config.validation and config.validation.images}
    rows |= {"classes": config.data.classes, "fingerprint of the file names": config.data.fingerprint}
    rows["autoencoder"] = vae_for_others(config) or "a folder of the author's computer"
    rows["its weights, SHA-256"] = config.vae.sha256
    return f"## Data\n\n{table({key: value for key, value in rows.items() if value is not None})}"


def settings(config: RunConfig, run: Path | None) -> str:
    """What decides the run, and by which code and versions it was trained."""
    values = {key: value for key, value in config.to_dict().items() if key not in ("data", "vae", "validation")}
    if run is not None:
        stored = files.read_json(run / "config.json")
        values |= {key: stored[key] for key in ("versions", "device", "git_commit") if stored.get(key) is not None}
    return f"## Settings\n\n{table(flatten(values))}"


def table(rows: dict) -> str:
    """A table of two columns in Markdown."""
    lines = [f"| {plain(str(key))} | {plain(report.text_of(value))} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def plain(text: str) -> str:
    """Text without what Markdown would take for a cell's end, a tag or a line break."""
    for character in "\\|<`*_":
        text = text.replace(character, f"\\{character}")
    return options.one_line(text)
