"""Samples of a run while it trains: grids from the same noise and labels at chosen steps, and a sheet over time."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from diffusion.objectives import OBJECTIVES
from models import DiT
from runtime import pictures, sampling
from runtime.config import RunConfig
from runtime.sampling import SamplingConfig
from runtime.vae import VAE

# Cheap, since they are only looked at; the sampler is the quick one of the objective.
SAMPLING = SamplingConfig(steps=20, cfg_scale=2.0, cfg_channels="all")
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


def make(
    results: Path, model: DiT, config: RunConfig, vae: VAE, step: int, device: torch.device, precision: str
) -> Path:
    """Draw the samples of a step, and the contact sheet anew; the path of the grid. Raises OSError.

    Image k has the noise of index k and always the same label, spread over the classes. The generators of training
    are not touched.
    """
    grid, layout, captions = draw(model, config, vae, f"step {step:,}", device, precision)
    folder_of(results).mkdir(exist_ok=True)
    path = step_path(results, step)
    pictures.save_png(grid, path)
    pictures.save_png(contact_sheet(grids(results), layout, captions), sheet_path(results))
    return path


def draw(
    model: DiT, config: RunConfig, vae: VAE, title: str, device: torch.device, precision: str
) -> tuple[Image.Image, pictures.GridLayout, list[str]]:
    """The grid, its layout, and the name of each image's class."""
    classes, settings = config.data.classes, replace(SAMPLING, sampler=OBJECTIVES[config.objective].quick_sampler)
    labels = [k * len(classes) // COUNT if len(classes) >= COUNT else k % len(classes) for k in range(COUNT)]
    shape = (config.model.in_channels, *config.model.input_size)
    indices = list(range(COUNT))
    latents = sampling.sample_latents(model, settings, indices, labels, shape, device, precision, config.objective)
    images = [pixels for part in latents.split(DECODED_AT_ONCE) for pixels in vae.decode(part).numpy()]
    captions = [pictures.class_name(label, classes) for label in labels]
    title += f": EMA weights, {settings.steps} steps of {settings.sampler}, cfg scale {settings.cfg_scale:g}"
    layout = pictures.GridLayout(*images[0].shape[:2], COLUMNS, titled=True)
    return pictures.draw_grid(images, captions, COLUMNS, title), layout, captions


def contact_sheet(paths: list[Path], layout: pictures.GridLayout, captions: list[str]) -> Image.Image:
    """The first row of every grid (or of SHEET_ROWS evenly chosen ones), one below the other."""
    if len(paths) > SHEET_ROWS:
        paths = [paths[round(k * (len(paths) - 1) / (SHEET_ROWS - 1))] for k in range(SHEET_ROWS)]
    rows = {}
    for path in paths:
        with Image.open(path) as grid:
            rows[f"step {int(path.stem):,}"] = [grid.crop(layout.box(k)) for k in range(COLUMNS)]
    return pictures.draw_contact_sheet(rows, captions[:COLUMNS])
