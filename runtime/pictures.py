"""Labelled grids of images, as PNG files."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    image.save(partial, format="PNG")
    os.replace(partial, path)


def class_name(label: int, classes: list[str] | None) -> str:
    """The name of a class, or its number where names are not known."""
    return classes[label] if classes and label < len(classes) else str(label)


@dataclass(frozen=True)
class GridLayout:
    """Where a grid has its images, in pixels; images of less than 64 pixels are enlarged by a whole number."""

    height: int  # of an image
    width: int
    columns: int
    titled: bool

    GAP = 4

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height of an image as it is drawn."""
        zoom = max(1, -(-64 // max(self.height, self.width)))
        return self.width * zoom, self.height * zoom

    @property
    def font_size(self) -> int:
        return max(11, min(self.cell[0] // 10, 20))

    @property
    def line(self) -> int:
        return self.font_size + 6

    def corner(self, k: int) -> tuple[int, int]:
        """Left and top of the caption of image k; the image is a line below."""
        top = 2 * self.line if self.titled else self.GAP
        pitch = self.cell[1] + self.line + self.GAP
        return self.GAP + k % self.columns * (self.cell[0] + self.GAP), top + k // self.columns * pitch

    def box(self, k: int) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of image k."""
        x, y = self.corner(k)
        return x, y + self.line, x + self.cell[0], y + self.line + self.cell[1]

    def size(self, count: int) -> tuple[int, int]:
        """Width and height of a grid of count images."""
        rows = -(-count // self.columns)
        return self.corner(self.columns - 1)[0] + self.cell[0] + self.GAP, self.corner(rows * self.columns)[1]


def draw_grid(images: list[np.ndarray], captions: list[str], columns: int, title: str | None = None) -> Image.Image:
    """Images (H, W, 3) uint8 in rows of columns, each under its caption. Small images are enlarged to 64 pixels."""
    layout = GridLayout(*images[0].shape[:2], columns, bool(title))
    font = ImageFont.load_default(layout.font_size)
    canvas = Image.new("RGB", layout.size(len(images)), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        place = (layout.GAP, layout.line // 3)
        draw.text(place, _fitted(title, draw, font, canvas.width - 2 * layout.GAP), fill="black", font=font)
    for k, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        draw.text(layout.corner(k), _fitted(caption, draw, font, layout.cell[0]), fill="black", font=font)
        image = Image.fromarray(pixels).resize(layout.cell, Image.Resampling.NEAREST)
        canvas.paste(image, layout.box(k)[:2])
    return canvas


def draw_contact_sheet(rows: dict[str, list[Image.Image]], captions: list[str], longest: int = 128) -> Image.Image:
    """A row of images for each name, which stands on its left, under one caption a column.

    Images are made smaller where a side has more than longest pixels.
    """
    first = next(iter(rows.values()))[0]
    scale = min(1, longest / max(first.size))
    width, height = (max(1, round(length * scale)) for length in first.size)
    size = max(11, min(width // 8, 16))
    font, gap, line = ImageFont.load_default(size), 4, size + 8
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = 2 * gap + max(round(draw.textlength(name, font=font)) for name in rows)
    canvas = Image.new("RGB", (margin + len(captions) * (width + gap), line + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, caption in enumerate(captions):
        place = (margin + column * (width + gap), gap)
        draw.text(place, _fitted(caption, draw, font, width), fill="black", font=font)
    for row, (name, images) in enumerate(rows.items()):
        y = line + row * (height + gap)
        draw.text((gap, y + height // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            canvas.paste(image.resize((width, height), Image.Resampling.BOX), (margin + column * (width + gap), y))
    return canvas


def _fitted(text: str, draw: ImageDraw.ImageDraw, font, width: int) -> str:
    text = "".join(character if character.isprintable() else " " for character in text)
    while len(text) > 1 and draw.textlength(text, font=font) > width:
        text = text[:-2] + "…"
    return text
