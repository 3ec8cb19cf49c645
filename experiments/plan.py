"""What the study of position encodings trains and measures: variants, settings, and the list of runs."""

from dataclasses import asdict, dataclass, field
from itertools import product

import numpy as np

from experiments.runs import recipe_options

Losses = dict[tuple[str, str], np.ndarray]  # by data set and variant: (seeds, ...)


@dataclass(frozen=True)
class Variant:
    label: str
    colour: str  # by position encoding
    dashes: str = "-"  # by border
    options: dict = field(default_factory=dict)  # of train.py


def spiral(rotate: int, border: str, colour: str, **more) -> Variant:
    label = ", ".join([f"Spiral R = {rotate}", border, *more])
    options = dict(use_rope=True, rope_rotate=rotate, rope_border=border)
    options |= {f"rope_{name}": value for name, value in more.items()}
    return Variant(label, colour, "--" if border == "clamp" else "-", options)


VARIANTS = {
    "sincos": Variant("sin-cos", "black"),
    "axial": Variant("axial RoPE", "C0", options=dict(use_rope=True, rope_rotate=0)),
    "spiral2_clamp": spiral(2, "clamp", "C2"),
    "spiral2_exact": spiral(2, "exact", "C2"),
    "spiral4_clamp": spiral(4, "clamp", "C3"),
    "spiral4_exact": spiral(4, "exact", "C3"),
    "same_theta2": spiral(2, "clamp", "C1", same_theta=True),
}
BASELINES = {"axial": "axial RoPE", "sincos": "sin-cos", "exact": "the exact border"}  # what variants are compared with
MAIN_VARIANTS = ("sincos", "axial", "spiral4_clamp", "spiral4_exact")
TOKEN = 16  # pixels of a token's side: a down-sampling of 8, patches of 2


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
    steps: int = 400
    batch: int = 16
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
    translated_images: int = 40
    translation_timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    margin: int = 2  # tokens at each edge that the translation test on a whole grid leaves out
    canvas: int = 10  # tokens a side of the canvas on which 8 x 8 tokens are moved
    attention_variants: tuple[str, ...] = ("axial", "spiral4_exact")
    attention_timestep: int = 200
    queries: tuple[tuple[int, int], ...] = ((2, 2), (3, 5), (6, 3))  # (row, column) of tokens whose attention is drawn
    attention_images: dict[str, str] = field(  # held out
        default_factory=lambda: {"digits": "7/0467.png", "photographs": "camera/01.png"}
    )

    @property
    def runs(self) -> list[Run]:
        """Every run, once: the sweep over learning rates, then all variants at the study's own, seed by seed."""
        swept = product(self.variants, self.sweep_variants, self.sweep_lrs, range(self.sweep_seeds))
        compared = [
            Run(data_set, variant, self.lr, seed)
            for data_set, variants in self.variants.items()
            for seed in range(self.seeds)
            for variant in variants
        ]
        return list(dict.fromkeys([*(Run(*names) for names in swept), *compared]))

    def settings(self) -> dict:
        options = {name: variant.options for name, variant in VARIANTS.items()}
        return recipe_options("model", "lr_schedule", "grad_clip") | asdict(self) | {"options": options}

    def collect(self, entries: dict[str, dict], name: str) -> Losses:
        """A value of the entries by run, as arrays over the seeds, of the variants that are among them."""
        return {
            (data_set, variant): np.array(
                [entries[Run(data_set, variant, self.lr, seed).key][name] for seed in range(self.seeds)]
            )
            for data_set, variants in self.variants.items()
            for variant in variants
            if Run(data_set, variant, self.lr, 0).key in entries
        }


FULL = Study(variants={"digits": tuple(VARIANTS), "photographs": MAIN_VARIANTS})
QUICK = Study(variants={"digits": MAIN_VARIANTS}, seeds=2, steps=150, warmup_steps=15, val_every=50, sweep_lrs=())
