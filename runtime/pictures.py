"""Labelled grids of images as PNG files, and the samples of a run while it trains."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion.objectives import OBJECTIVES
from models import DiT
from runtime import files, sampling
from runtime.classes import names_of
from runtime.config import RunConfig
from runtime.sampling import SamplingConfig
from runtime.vae import VAE

GAP = 4  # pixels between images
LEADING = 6  # pixels of a line beside its font size
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


def class_name(label: int, classes: list[str] | None) -> str:
    """The name of a class, or its number where names are not known."""
    return (*names_of(label, classes), str(label))[0]


def _drawn_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which an image is drawn: less than 64 pixels are enlarged by a whole number."""
    zoom = max(1, -(-64 // max(height, width)))
    return height * zoom, width * zoom


def _font_size(width: int) -> int:
    """Pixels of the texts beside images of this width."""
    return max(11, min(width // 10, 20))


class _Sheet:
    """A white canvas for images of one size, with texts beside them."""

    def __init__(self, image: np.ndarray):
        self.height, self.width = _drawn_size(*image.shape[:2])
        size = _font_size(self.width)
        self.font, self.line = ImageFont.load_default(size), size + LEADING

    def length(self, text: str) -> int:
        """Pixels that a text is wide."""
        return math.ceil(self.font.getlength(_printable(text)))

    def begin(self, width: int, height: int, title: str) -> None:
        """Make the canvas, wide enough for its title."""
        self.canvas = Image.new("RGB", (max(width, self.length(title) + 2 * GAP), height), "white")
        self.draw = ImageDraw.Draw(self.canvas)
        self.write(GAP, self.line // 3, title, self.canvas.width)

    def write(self, x: int, y: int, text: str, width: int) -> None:
        """A text with its upper left corner at x, y, cut to a width."""
        text = _printable(text)
        while len(text) > 1 and self.length(text) > width:
            text = text[:-2] + "…"
        self.draw.text((x, y), text, fill="black", font=self.font)

    def paste(self, x: int, y: int, pixels: np.ndarray) -> None:
        size = (self.width, self.height)
        self.canvas.paste(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), (x, y))


@dataclass(frozen=True)
class GridLayout:
    """Where a grid has its images, in pixels."""

    height: int  # of an image
    width: int
    columns: int
    titled: bool

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width of an image as it is drawn."""
        return _drawn_size(self.height, self.width)

    @property
    def line(self) -> int:
        return _font_size(self.cell[1]) + LEADING

    def corner(self, k: int) -> tuple[int, int]:
        """Left and top of the caption of image k; the image is a line below."""
        (height, width), top = self.cell, 2 * self.line if self.titled else GAP
        return GAP + k % self.columns * (width + GAP), top + k // self.columns * (height + self.line + GAP)

    def box(self, k: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of image k."""
        (height, width), (x, y) = self.cell, self.corner(k)
        return x, y + self.line, x + width, y + self.line + height

    def size(self, count: int) -> tuple[int, int]:
        """Width and height of a grid of count images."""
        rows = -(-count // self.columns)
        return self.corner(self.columns - 1)[0] + self.cell[1] + GAP, self.corner(rows * self.columns)[1]


def draw_grid(images: list[np.ndarray], captions: list[str], columns: int, title: str | None = None) -> Image.Image:
    """Images (H, W, 3) uint8 in rows of columns, each under its caption. Small images are enlarged to 64 pixels."""
    layout = GridLayout(*images[0].shape[:2], columns, bool(title))
    sheet = _Sheet(images[0])
    sheet.begin(*layout.size(len(images)), title or "")
    for k, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = layout.corner(k)
        sheet.write(x, y, caption, sheet.width)
        sheet.paste(x, y + sheet.line, pixels)
    return sheet.canvas


def draw_strips(frames: list[list[np.ndarray]], names: list[str], captions: list[str], title: str = "") -> Image.Image:
    """Rows of frames (H, W, 3) uint8, the name of each row to its left and a caption above each column."""
    sheet = _Sheet(frames[0][0])
    left, top = min(2 * sheet.width, max(map(sheet.length, names))) + 3 * GAP, (3 if title else 1) * sheet.line
    width, height = sheet.width + GAP, sheet.height + GAP
    sheet.begin(left + len(captions) * width, top + len(frames) * height, title)
    for column, caption in enumerate(captions):
        sheet.write(left + column * width, top - sheet.line, caption, sheet.width)
    for row, (name, images) in enumerate(zip(names, frames, strict=True)):
        y = top + row * height
        sheet.write(GAP, y + (sheet.height - sheet.line) // 2, name, left - 2 * GAP)
        for column, pixels in enumerate(images):
            sheet.paste(left + column * width, y, pixels)
    return sheet.canvas


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


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
    grid, layout, captions = draw_samples(model, config, vae, f"step {step:,}", device, precision)
    samples_folder(results).mkdir(exist_ok=True)
    save_png(grid, grid_path(results, step))
    save_png(draw_contact_sheet(grids_by_step(results), layout, captions), sheet_path(results))
    return grid_path(results, step)


def draw_samples(
    model: DiT, config: RunConfig, vae: VAE, title: str, device: torch.device, precision: str
) -> tuple[Image.Image, GridLayout, list[str]]:
    """The grid, its layout, and the name of each image's class.

    Image k has the noise of index k and always the same label, spread over the classes. The generators of training
    are not touched.
    """
    classes, settings = config.data.classes, replace(SAMPLING, sampler=OBJECTIVES[config.objective].quick_sampler)
    labels = [k * len(classes) // COUNT if len(classes) >= COUNT else k % len(classes) for k in range(COUNT)]
    shape = (config.model.in_channels, *config.model.input_size)
    indices = list(range(COUNT))
    latents = sampling.sample_latents(model, settings, indices, labels, shape, device, precision, config.objective)
    images = [pixels for part in latents.split(DECODED_AT_ONCE) for pixels in vae.decode(part).numpy()]
    captions = [class_name(label, classes) for label in labels]
    title += f": EMA weights, {settings.steps} steps of {settings.sampler}, cfg scale {settings.cfg_scale:g}"
    layout = GridLayout(*images[0].shape[:2], COLUMNS, titled=True)
    return draw_grid(images, captions, COLUMNS, title), layout, captions


def draw_contact_sheet(grids: list[Path], layout: GridLayout, captions: list[str]) -> Image.Image:
    """The first row of every grid (or of SHEET_ROWS evenly chosen ones), one below the other."""
    if len(grids) > SHEET_ROWS:
        grids = [grids[round(k * (len(grids) - 1) / (SHEET_ROWS - 1))] for k in range(SHEET_ROWS)]
    rows = []
    for path in grids:
        with Image.open(path) as grid:
            rows.append([np.asarray(_reduced(grid.crop(layout.box(k)))) for k in range(COLUMNS)])
    return draw_strips(rows, [f"step {int(path.stem):,}" for path in grids], captions[:COLUMNS])


def _reduced(image: Image.Image) -> Image.Image:
    scale = min(1, SHEET_IMAGE / max(image.size))
    return image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BOX)
