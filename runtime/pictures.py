"""Labelled grids of images, as PNG files."""

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime.classes import names_of

GAP = 4  # pixels between images


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        image.save(partial, format="PNG")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def class_name(label: int, classes: list[str] | None) -> str:
    """The name of a class, or its number where names are not known."""
    return (*names_of(label, classes), str(label))[0]


class _Sheet:
    """A white canvas for images of one size, with texts beside them; small images are enlarged to 64 pixels."""

    def __init__(self, image: np.ndarray):
        zoom = max(1, -(-64 // max(image.shape[:2])))
        self.height, self.width = image.shape[0] * zoom, image.shape[1] * zoom
        size = max(11, min(self.width // 10, 20))
        self.font, self.line = ImageFont.load_default(size), size + 6

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


def draw_grid(images: list[np.ndarray], captions: list[str], columns: int, title: str | None = None) -> Image.Image:
    """Images (H, W, 3) uint8 in rows of columns, each under its caption. Small images are enlarged to 64 pixels."""
    sheet = _Sheet(images[0])
    width, height = sheet.width + GAP, sheet.line + sheet.height + GAP
    top = 2 * sheet.line if title else GAP
    rows = -(-len(images) // columns)
    sheet.begin(GAP + columns * width, top + rows * height, title or "")
    for k, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = GAP + k % columns * width, top + k // columns * height
        sheet.write(x, y, caption, sheet.width)
        sheet.paste(x, y + sheet.line, pixels)
    return sheet.canvas


def draw_strips(frames: list[list[np.ndarray]], names: list[str], captions: list[str], title: str) -> Image.Image:
    """Rows of frames (H, W, 3) uint8, the name of each row to its left and a caption above each column."""
    sheet = _Sheet(frames[0][0])
    left, top = min(2 * sheet.width, max(map(sheet.length, names))) + 3 * GAP, 3 * sheet.line
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
