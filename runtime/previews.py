"""Samples of a run while it trains: grids from the same noise and labels at chosen steps, and a sheet over time."""

import re
from pathlib import Path

import torch
from PIL import Image

from models import DiT
from runtime import pictures, sampling
from runtime.sampling import SamplingConfig
from runtime.vae import VAE

SAMPLING = SamplingConfig(sampler="dpm++", steps=20, cfg_scale=2.0, cfg_channels="all")  # cheap: to look at only
COUNT, COLUMNS = 16, 8
SHEET_ROWS = 16  # steps at most on the contact sheet
DECODED_AT_ONCE = 4  # images, so that decoding does not need more memory than training


def folder_of(results: Path) -> Path:
    return results / "samples"


def step_path(results: Path, step: int) -> Path:
    return folder_of(results) / f"{step:07d}.png"


def sheet_path(results: Path) -> Path:
    return folder_of(results) / "contact_sheet.png"


def grids(results: Path) -> list[Path]:
    """The grids of a run, oldest first."""
    found = [path for path in folder_of(results).glob("*.png") if re.fullmatch(r"\d{7,}", path.stem)]
    return sorted(found, key=lambda path: int(path.stem))


def make(results: Path, model: DiT, config: dict, vae: VAE, step: int, device: torch.device, precision: str) -> Path:
    """Draw the samples of a step, and the contact sheet anew; the path of the grid. Raises OSError.

    Image k has the noise of index k and always the same label, spread over the classes. The generators of training
    are not touched.
    """
    classes = config["data"]["classes"]
    labels = [k * len(classes) // COUNT if len(classes) >= COUNT else k % len(classes) for k in range(COUNT)]
    shape = (config["model"]["in_channels"], *config["model"]["input_size"])
    latents = sampling.sample_latents(model, SAMPLING, list(range(COUNT)), labels, shape, device, precision)
    images = [pixels for part in latents.split(DECODED_AT_ONCE) for pixels in vae.decode(part).numpy()]
    captions = [pictures.class_name(label, classes) for label in labels]
    title = (
        f"step {step:,}: EMA weights, {SAMPLING.steps} steps of {SAMPLING.sampler}, cfg scale {SAMPLING.cfg_scale:g}"
    )
    folder_of(results).mkdir(exist_ok=True)
    path = step_path(results, step)
    pictures.save_png(pictures.draw_grid(images, captions, COLUMNS, title), path)
    layout = pictures.GridLayout(*images[0].shape[:2], COLUMNS, titled=True)
    pictures.save_png(contact_sheet(grids(results), layout, captions), sheet_path(results))
    return path


def contact_sheet(paths: list[Path], layout: pictures.GridLayout, captions: list[str]) -> Image.Image:
    """The first row of every grid (or of SHEET_ROWS evenly chosen ones), one below the other."""
    if len(paths) > SHEET_ROWS:
        paths = [paths[round(k * (len(paths) - 1) / (SHEET_ROWS - 1))] for k in range(SHEET_ROWS)]
    rows = {}
    for path in paths:
        with Image.open(path) as grid:
            rows[f"step {int(path.stem):,}"] = [grid.crop(layout.box(k)) for k in range(COLUMNS)]
    return pictures.draw_contact_sheet(rows, captions[:COLUMNS])
