"""Labelled grids of images, as PNG files."""

import os
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


def draw_grid(images: list[np.ndarray], captions: list[str], columns: int, title: str | None = None) -> Image.Image:
    """Images (H, W, 3) uint8 in rows of columns, each under its caption. Small images are enlarged to 64 pixels."""
    zoom = max(1, -(-64 // max(images[0].shape[:2])))
    height, width = images[0].shape[0] * zoom, images[0].shape[1] * zoom
    size = max(11, min(width // 10, 20))
    font = ImageFont.load_default(size)
    gap, line = 4, size + 6
    top = 2 * line if title else gap
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, top + rows * (height + line + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((gap, line // 3), _fitted(title, draw, font, canvas.width - 2 * gap), fill="black", font=font)
    for k, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + k % columns * (width + gap), top + k // columns * (height + line + gap)
        draw.text((x, y), _fitted(caption, draw, font, width), fill="black", font=font)
        canvas.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, y + line))
    return canvas


def _fitted(text: str, draw: ImageDraw.ImageDraw, font, width: int) -> str:
    text = "".join(character if character.isprintable() else " " for character in text)
    while len(text) > 1 and draw.textlength(text, font=font) > width:
        text = text[:-2] + "…"
    return text
