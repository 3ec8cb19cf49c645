"""Labelled grids of images as PNG files, and the samples of a run while it trains."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion.objectives import OBJECTIVES
from models import DiT
from runtime import files, sampling
from runtime.classes import class_name
from runtime.config import RunConfig
from runtime.sampling import SamplingConfig
from runtime.vae import VAE

GAP = 4  # pixels between images
LEADING = 6  # pixels of a line beside its font size
TITLE_LINES = 2  # room for a title
# Cheap, since they are only looked at; the sampler is the quick one of the objective.
SAMPLING = SamplingConfig(steps=20, cfg_scale=2.0, cfg_channels="all")
COUNT, COLUMNS = 16, 8  # of the samples made during training
DECODED_AT_ONCE = 4  # images, so that decoding does not need more memory than training
SHEET_ROWS = 16  # steps at most on the contact sheet
SHEET_IMAGE = 128  # pixels at most to a side of an image on it


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all. Raises OSError."""
    with files.whole_file(path, durable=False) as file:
        image.save(file, format="PNG")


def _drawn_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which an image is drawn: less than 64 pixels are enlarged by a whole number."""
    zoom = max(1, -(-64 // max(height, width)))
    return height * zoom, width * zoom


class _Lettering:
    """Texts beside images that are drawn this wide."""

    def __init__(self, width: int):
        size = max(11, min(width // 10, 20))  # pixels
        self.font, self.line = ImageFont.load_default(size), size + LEADING

    def length(self, text: str) -> int:
        """Pixels that a text is wide."""
        return math.ceil(self.font.getlength(_printable(text)))

    def write(self, canvas: Image.Image, x: int, y: int, text: str, width: int) -> None:
        """A text with its upper left corner at x, y, cut to a width."""
        text = _printable(text)
        while len(text) > 1 and self.length(text) > width:
            text = text[:-2] + "…"
        ImageDraw.Draw(canvas).text((x, y), text, fill="black", font=self.font)


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def draw_grid(images: list[np.ndarray], captions: list[str], columns: int, title: str = "") -> Image.Image:
    """Images (H, W, 3) uint8 in rows of columns, each under its caption. Small images are enlarged to 64 pixels."""
    rows = [slice(first, first + columns) for first in range(0, len(images), columns)]
    return _draw_rows([images[row] for row in rows], [captions[row] for row in rows], [], title)


def draw_strips(frames: list[list[np.ndarray]], names: list[str], captions: list[str], title: str = "") -> Image.Image:
    """Rows of frames (H, W, 3) uint8, the name of each row to its left and a caption above each column."""
    return _draw_rows(frames, [captions] + [[]] * (len(frames) - 1), names, title)


def _draw_rows(rows: list[list[np.ndarray]], captions: list[list[str]], names: list[str], title: str) -> Image.Image:
    """Images under a title, a row under its captions, where it has them, and beside its name, where rows have one."""
    height, width = _drawn_size(*rows[0][0].shape[:2])
    text, pitch = _Lettering(width), width + GAP
    left = min(2 * width, max(map(text.length, names))) + 3 * GAP if names else GAP
    y = TITLE_LINES * text.line if title else GAP
    right = max(left + pitch * max(map(len, rows)), text.length(title) + 2 * GAP)
    bottom = y + len(rows) * (height + GAP) + sum(map(bool, captions)) * text.line
    canvas = Image.new("RGB", (right, bottom), "white")
    text.write(canvas, GAP, text.line // 3, title, right)
    for row, (images, above) in enumerate(zip(rows, captions, strict=True)):
        for column, caption in enumerate(above):
            text.write(canvas, left + column * pitch, y, caption, width)
        y += text.line if above else 0
        if names:
            text.write(canvas, GAP, y + (height - text.line) // 2, names[row], left - 2 * GAP)
        for column, pixels in enumerate(images):
            image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(image, (left + column * pitch, y))
        y += height + GAP
    return canvas


def first_row(height: int, width: int, columns: int) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of the images in the first row of a grid with a title; height and width of one."""
    height, width = _drawn_size(height, width)
    top = (TITLE_LINES + 1) * _Lettering(width).line
    return [(x, top, x + width, top + height) for x in range(GAP, columns * (width + GAP), width + GAP)]


# Samples of a run while it trains


def samples_folder(results: Path) -> Path:
    return results / "samples"


def grid_path(results: Path, step: int) -> Path:
    return samples_folder(results) / f"{step:07d}.png"


def sheet_path(results: Path) -> Path:
    return samples_folder(results) / "contact_sheet.png"


def grids_by_step(results: Path) -> list[Path]:
    """The grids that training has made, oldest first."""
    found = [path for path in samples_folder(results).glob("*.png") if re.fullmatch(r"\d{7,}", path.stem)]
    return sorted(found, key=lambda path: int(path.stem))


def save_samples(
    results: Path, model: DiT, config: RunConfig, vae: VAE, step: int, device: torch.device, precision: str
) -> Path:
    """Draw the samples of a step, and the contact sheet anew; the path of the grid. Raises OSError."""
    grid = draw_samples(model, config, vae, f"step {step:,}", device, precision)
    samples_folder(results).mkdir(exist_ok=True)
    save_png(grid, grid_path(results, step))
    save_png(draw_contact_sheet(grids_by_step(results), config), sheet_path(results))
    return grid_path(results, step)


def labels_and_names(classes: list[str]) -> tuple[list[int], list[str]]:
    """Label and class of each sample, always the same and spread over the classes."""
    labels = [k * len(classes) // COUNT if len(classes) >= COUNT else k % len(classes) for k in range(COUNT)]
    return labels, [class_name(label, classes) for label in labels]


def draw_samples(
    model: DiT, config: RunConfig, vae: VAE, title: str, device: torch.device, precision: str
) -> Image.Image:
    """The grid. Image k has the noise of index k; the generators of training are not touched."""
    settings = replace(SAMPLING, sampler=OBJECTIVES[config.objective].quick_sampler)
    labels, captions = labels_and_names(config.data.classes)
    shape = (config.model.in_channels, *config.model.input_size)
    indices = list(range(COUNT))
    latents = sampling.sample_latents(model, settings, indices, labels, shape, device, precision, config.objective)
    images = [pixels for part in latents.split(DECODED_AT_ONCE) for pixels in vae.decode(part).numpy()]
    title += f": EMA weights, {settings.steps} steps of {settings.sampler}, cfg scale {settings.cfg_scale:g}"
    return draw_grid(images, captions, COLUMNS, title)


def draw_contact_sheet(grids: list[Path], config: RunConfig) -> Image.Image:
    """The first row of every grid (or of SHEET_ROWS evenly chosen ones), one below the other."""
    if len(grids) > SHEET_ROWS:
        grids = [grids[round(k * (len(grids) - 1) / (SHEET_ROWS - 1))] for k in range(SHEET_ROWS)]
    rows = []
    for path in grids:
        with Image.open(path) as grid:
            images = [grid.crop(box) for box in first_row(*config.image_size, COLUMNS)]
        for image in images:
            image.thumbnail((SHEET_IMAGE, SHEET_IMAGE), Image.Resampling.BOX)
        rows.append([np.asarray(image) for image in images])
    captions = labels_and_names(config.data.classes)[1][:COLUMNS]
    return draw_strips(rows, [f"step {int(path.stem):,}" for path in grids], captions)
