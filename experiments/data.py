"""Data sets of the studies: class folders of PNGs, each with a part for training and a held-out part.

root/train and root/val hold images of the study's size; root/canvas192 and root/canvas256 hold held-out images at the
same scale on a larger canvas.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from demo.digits import enlarged_digits, whole_folder
from experiments.plan import Study
from runtime.options import UserError

Item = tuple[str, str, str, Image.Image]  # part ("train"), class, file name, image


def write_data_set(name: str, root: Path, study: Study) -> dict[str, int]:
    """Make root unless it is there; returns the number of images of each part. root appears once it is whole.

    Raises UserError for a root that was made with other settings.
    """
    decisive = ("image_size", "canvases", "held_out_per_class", "photograph_height", "held_out_width", "stride")
    settings = json.dumps({option: getattr(study, option) for option in decisive})
    if not root.is_dir():
        with whole_folder(root) as partial:
            for part, label, file, image in DATA_SETS[name](study):
                (partial / part / label).mkdir(parents=True, exist_ok=True)
                image.save(partial / part / label / file)
            (partial / "settings.json").write_text(settings)
    if (root / "settings.json").read_text() != settings:
        raise UserError(f"{str(root)!r} was made with other settings than those of experiments/plan.py; remove it")
    return dict(sorted(Counter(path.relative_to(root).parts[0] for path in root.rglob("*.png")).items()))


def digits(study: Study) -> Iterator[Item]:
    """scikit-learn's digits, as many of each class held out; canvases hold these at random places on black."""
    images, labels = enlarged_digits(study.image_size)
    random, count = np.random.default_rng(0), study.held_out_per_class["digits"]
    held_out = np.concatenate(
        [random.choice(np.flatnonzero(labels == label), count, replace=False) for label in range(10)]
    )
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = f"{index:04d}.png"
        if index not in held_out:
            yield "train", str(label), file, image
            continue
        yield "val", str(label), file, image
        for size in study.canvases:
            canvas = Image.new("RGB", (size, size))
            canvas.paste(image, tuple(random.integers(0, size - study.image_size, 2, endpoint=True).tolist()))
            yield f"canvas{size}", str(label), file, canvas


def photographs(study: Study) -> Iterator[Item]:
    """Tiles of twelve photographs, each a class: overlapping ones for training, crops at random places held out."""
    random, side, count = np.random.default_rng(0), study.image_size, study.held_out_per_class["photographs"]
    for label, pixels in load_photographs().items():
        trained, held_out = split_photograph(pixels, study)
        for top in range(0, trained.height - side + 1, study.stride):
            for left in range(0, trained.width - side + 1, study.stride):
                tile = trained.crop((left, top, left + side, top + side))
                yield "train", label, f"{top:03d}_{left:03d}.png", tile
        for part, size in (("val", side), *((f"canvas{size}", size) for size in study.canvases)):
            for index in range(count):
                left, top = (int(random.integers(0, length - size, endpoint=True)) for length in held_out.size)
                yield part, label, f"{index:02d}.png", held_out.crop((left, top, left + size, top + size))


def split_photograph(pixels: np.ndarray, study: Study) -> tuple[Image.Image, Image.Image]:
    """Grey values (H, W) as the part to train on and the held-out right part, both scaled to the study's height.

    The cut comes before the scaling, whose filter would mix pixels of the two parts. The images are RGB, all three
    channels equal: the demo's autoencoder knows brightness alone.
    """
    height, width = pixels.shape
    cut = width - round(study.held_out_width * height / study.photograph_height)
    trained_width = round(cut * study.photograph_height / height)
    parts = ((pixels[:, :cut], trained_width), (pixels[:, cut:], study.held_out_width))
    trained, held_out = (
        Image.fromarray(np.ascontiguousarray(part))
        .resize((columns, study.photograph_height), Image.Resampling.BICUBIC)
        .convert("RGB")
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
    names = ("astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel", "rocket")
    images = {name: getattr(data, name)() for name in names} | {"motorcycle": data.stereo_motorcycle()[0]}
    images |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    return {name: np.asarray(Image.fromarray(pixels).convert("L")) for name, pixels in sorted(images.items())}


DATA_SETS = {"digits": digits, "photographs": photographs}
