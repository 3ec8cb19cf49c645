"""What the study of position encodings compares: variants, settings, the list of runs, and the data sets.

A data set is class folders of PNGs: root/train and root/val hold images of the study's size, root/canvas192 and
root/canvas256 held-out images at the same scale on a larger canvas.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from demo.digits import enlarged_digits, whole_folder
from experiments.runs import recipe_options
from runtime.options import UserError

Losses = dict[tuple[str, str], np.ndarray]  # by data set and variant: (seeds, ...)
Item = tuple[str, str, str, Image.Image]  # part ("train"), class, file name, image


@dataclass(frozen=True)
class Variant:
    label: str
    colour: str
    options: dict = field(default_factory=dict)  # of train.py
    dashes: str = "-"


def spiral(rotate: int, border: str, **more) -> dict:
    return dict(use_rope=True, rope_rotate=rotate, rope_border=border, **more)


VARIANTS = {
    "sincos": Variant("sin-cos", "black"),
    "axial": Variant("axial RoPE", "C0", dict(use_rope=True, rope_rotate=0)),
    "spiral2_clamp": Variant("Spiral R = 2, clamp", "C2", spiral(2, "clamp"), "--"),
    "spiral2_exact": Variant("Spiral R = 2, exact", "C2", spiral(2, "exact")),
    "spiral4_clamp": Variant("Spiral R = 4, clamp", "C3", spiral(4, "clamp"), "--"),
    "spiral4_exact": Variant("Spiral R = 4, exact", "C3", spiral(4, "exact")),
    "same_theta2": Variant("Spiral R = 2, clamp, same_theta", "C1", spiral(2, "clamp", rope_same_theta=True), "--"),
}
BASELINES = {"axial": "axial RoPE", "sincos": "sin-cos", "exact": "the exact border"}  # what variants are compared with
MAIN_VARIANTS = ("sincos", "axial", "spiral4_clamp", "spiral4_exact")


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    data_set: str
    variant: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.data_set}/{self.variant}/lr{self.lr:g}/seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """All that decides the results, beside the demo's recipe; stored with them."""

    variants: dict[str, tuple[str, ...]]  # by data set
    seeds: int = 5  # 0 to seeds - 1
    max_steps: int = 400
    global_batch_size: int = 16
    lr: float = 1e-2
    warmup_steps: int = 40
    ema_decay: float = 0.98  # 0.98 ** steps of the initial weights are left in the average
    val_every: int = 80  # steps
    sweep_lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    sweep_variants: tuple[str, ...] = ("sincos", "axial")  # on every data set
    sweep_seeds: int = 2
    # data
    image_size: int = 128  # pixels of a training image: 8 x 8 tokens for patch 2 after a down-sampling of 8
    canvases: tuple[int, ...] = (192, 256)  # pixels: 12 x 12 and 16 x 16 tokens
    held_out_per_class: dict[str, int] = field(default_factory=lambda: {"digits": 6, "photographs": 5})
    photograph_height: int = 512  # pixels to which each photograph is scaled
    held_out_width: int = 256  # right-most columns of a scaled photograph that are never trained on
    stride: int = 24  # pixels between training tiles, which overlap
    # measurements of trained runs
    beyond_grid_variants: tuple[str, ...] = ("axial", "spiral4_clamp", "spiral4_exact")
    beyond_grid_images: int = 30  # a larger grid costs up to four times as much

    @property
    def grids(self) -> dict[str, tuple[str, int, str | None]]:
        """Where trained runs are measured: part of the data set, pixels, how positions reach beyond the trained grid.

        enlarged: the held-out images resized; canvas: larger held-out images at the same scale.
        """
        found = {"as trained": ("val", self.image_size, None)}
        for kind, size, extension in product(("enlarged", "canvas"), self.canvases, ("extrapolate", "interpolate")):
            part = "val" if kind == "enlarged" else f"canvas{size}"
            found[f"{kind} {size}, {extension}"] = part, size, extension
        return found

    @property
    def compared(self) -> list[Run]:
        """All variants at the study's learning rate, seed by seed."""
        return [
            Run(data_set, variant, self.lr, seed)
            for data_set, variants in self.variants.items()
            for seed in range(self.seeds)
            for variant in variants
        ]

    @property
    def runs(self) -> list[Run]:
        """Every run, once: the sweep over learning rates, then those that are compared."""
        swept = product(self.variants, self.sweep_variants, self.sweep_lrs, range(self.sweep_seeds))
        return list(dict.fromkeys([*(Run(*names) for names in swept), *self.compared]))

    def settings(self) -> dict:
        options = {name: variant.options for name, variant in VARIANTS.items()}
        return recipe_options("model", "lr_schedule", "grad_clip") | asdict(self) | {"options": options}

    def collect(self, runs: dict[str, dict], name: str) -> Losses:
        """A value that is kept of runs, as arrays over the seeds, of the variants that have it."""
        found = defaultdict(list)
        for run in self.compared:
            if name in runs[run.key]:
                found[run.data_set, run.variant].append(runs[run.key][name])
        return {names: np.array(values) for names, values in found.items()}


FULL = Study(variants={"digits": tuple(VARIANTS), "photographs": MAIN_VARIANTS})
QUICK = Study(variants={"digits": MAIN_VARIANTS}, seeds=2, max_steps=150, warmup_steps=15, val_every=50, sweep_lrs=())


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
        raise UserError(f"{str(root)!r} was made with other settings than those of experiments/study.py; remove it")
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
        for top, left in product(*(range(0, length - side + 1, study.stride) for length in trained.size[::-1])):
            yield "train", label, f"{top:03d}_{left:03d}.png", trained.crop((left, top, left + side, top + side))
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

    def scaled(part: np.ndarray, columns: int) -> Image.Image:
        image, size = Image.fromarray(np.ascontiguousarray(part)), (columns, study.photograph_height)
        return image.resize(size, Image.Resampling.BICUBIC).convert("RGB")

    return scaled(pixels[:, :cut], trained_width), scaled(pixels[:, cut:], study.held_out_width)


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
