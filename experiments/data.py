"""Data sets of the studies: class folders of PNGs, each with a part for training and a held-out part.

root/train and root/val hold 128 x 128 images; root/canvas192 and root/canvas256 hold held-out images at the same scale
on a larger canvas.
"""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from demo.digits import enlarged_digits
from runtime.options import UserError

SIZE = 128  # pixels of a training image: 8 x 8 tokens for patch 2 after a down-sampling of 8
CANVASES = (192, 256)  # pixels: 12 x 12 and 16 x 16 tokens
HELD_OUT_PER_CLASS = {"digits": 6, "photographs": 5}
HEIGHT = 512  # pixels to which each photograph is scaled
HELD_OUT_WIDTH = 256  # right-most columns of a scaled photograph that are never trained on
STRIDE = 24  # pixels between training tiles, which overlap
SETTINGS = {  # stored with results, which are of these data alone
    "image_size": SIZE,
    "canvases": CANVASES,
    "held_out_per_class": HELD_OUT_PER_CLASS,
    "photograph_height": HEIGHT,
    "held_out_width": HELD_OUT_WIDTH,
    "stride": STRIDE,
}

Item = tuple[str, str, str, Image.Image]  # part ("train"), class, file name, image


def write_data_set(name: str, root: Path) -> dict[str, int]:
    """Make root unless it is there; returns the number of images of each part. root appears once it is whole.

    Raises UserError for a root that was made with other settings.
    """
    settings = json.dumps(SETTINGS)
    if root.is_dir():
        check_made_with(settings, root)
    else:
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
        try:
            for part, label, file, image in DATA_SETS[name]():
                folder = partial / part / label
                folder.mkdir(parents=True, exist_ok=True)
                image.save(folder / file)
            (partial / "settings.json").write_text(settings)
            partial.chmod(0o755)
            partial.rename(root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return dict(sorted(Counter(path.relative_to(root).parts[0] for path in root.rglob("*.png")).items()))


def check_made_with(settings: str, root: Path) -> None:
    path = root / "settings.json"
    if not path.exists() or path.read_text() != settings:
        raise UserError(f"{str(root)!r} was made with other settings than those of experiments/data.py; remove it")


def digits() -> Iterator[Item]:
    """scikit-learn's digits, 6 of each class held out; canvases hold these at random places on black."""
    images, labels = enlarged_digits(SIZE)
    random = np.random.default_rng(0)
    held_out = {
        index
        for label in range(10)
        for index in random.choice(np.flatnonzero(labels == label), HELD_OUT_PER_CLASS["digits"], replace=False)
    }
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = f"{index:04d}.png"
        if index not in held_out:
            yield "train", str(label), file, image
            continue
        yield "val", str(label), file, image
        for size in CANVASES:
            canvas = Image.new("RGB", (size, size))
            canvas.paste(image, tuple(random.integers(0, size - SIZE, 2, endpoint=True).tolist()))
            yield f"canvas{size}", str(label), file, canvas


def photographs() -> Iterator[Item]:
    """Tiles of twelve photographs, each a class: overlapping ones for training, crops at random places held out."""
    random = np.random.default_rng(0)
    for label, pixels in load_photographs().items():
        trained, held_out = split_photograph(pixels)
        for top, left in tile_corners(trained):
            tile = trained.crop((left, top, left + SIZE, top + SIZE))
            yield "train", label, f"{top:03d}_{left:03d}.png", tile
        for part, size in (("val", SIZE), *((f"canvas{size}", size) for size in CANVASES)):
            for index in range(HELD_OUT_PER_CLASS["photographs"]):
                left, top = (int(random.integers(0, length - size, endpoint=True)) for length in held_out.size)
                yield part, label, f"{index:02d}.png", held_out.crop((left, top, left + size, top + size))


def tile_corners(image: Image.Image) -> list[tuple[int, int]]:
    """Top and left of every training tile of an image."""
    tops, lefts = (range(0, length - SIZE + 1, STRIDE) for length in (image.height, image.width))
    return [(top, left) for top in tops for left in lefts]


def split_photograph(pixels: np.ndarray) -> tuple[Image.Image, Image.Image]:
    """Grey values (H, W) as the part to train on and the held-out right part, both scaled to a height of 512 pixels.

    The cut comes before the scaling, whose filter would mix pixels of the two parts. The images are RGB, all three
    channels equal: the demo's autoencoder knows brightness alone.
    """
    height, width = pixels.shape
    cut = width - round(HELD_OUT_WIDTH * height / HEIGHT)
    trained_width = round(cut * HEIGHT / height)
    parts = ((pixels[:, :cut], trained_width), (pixels[:, cut:], HELD_OUT_WIDTH))
    trained, held_out = (
        Image.fromarray(np.ascontiguousarray(part)).resize((columns, HEIGHT), Image.Resampling.BICUBIC).convert("RGB")
        for part, columns in parts
    )
    return trained, held_out


def load_photographs() -> dict[str, np.ndarray]:
    """Photographs that scikit-learn and scikit-image ship, by name, as grey values (H, W) uint8, none taller than wide.

    Raises UserError without scikit-image.
    """
    from sklearn.datasets import load_sample_image

    try:
        from skimage import data
    except ImportError as error:
        raise UserError(
            "the photographs need scikit-image, which is not installed; pip install -r requirements-dev.txt"
        ) from error
    images = {name: getattr(data, name)() for name in ("astronaut", "brick", "camera", "cat", "coffee", "coins")}
    images |= {name: getattr(data, name)() for name in ("grass", "gravel", "rocket")}
    images["motorcycle"] = data.stereo_motorcycle()[0]
    images |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    return {name: np.asarray(Image.fromarray(pixels).convert("L")) for name, pixels in sorted(images.items())}


DATA_SETS: dict[str, Callable[[], Iterator[Item]]] = {"digits": digits, "photographs": photographs}
