"""What the study of position encodings trains and measures: variants, settings, and the list of runs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Variant:
    label: str
    rope: dict  # options of train.py beside --use-rope; empty: without it
    colour: str  # by position encoding
    dashes: str = "-"  # by border

    @property
    def options(self) -> dict:
        return {"use_rope": True, **self.rope} if self.rope else {}


VARIANTS = {
    "sincos": Variant("sin-cos", {}, "black"),
    "axial": Variant("axial RoPE", {"rope_rotate": 0}, "C0"),
    "spiral2_clamp": Variant("Spiral R = 2, clamp", {"rope_rotate": 2, "rope_border": "clamp"}, "C2", "--"),
    "spiral2_exact": Variant("Spiral R = 2, exact", {"rope_rotate": 2, "rope_border": "exact"}, "C2"),
    "spiral4_clamp": Variant("Spiral R = 4, clamp", {"rope_rotate": 4, "rope_border": "clamp"}, "C3", "--"),
    "spiral4_exact": Variant("Spiral R = 4, exact", {"rope_rotate": 4, "rope_border": "exact"}, "C3"),
    "same_theta2": Variant(
        "Spiral R = 2, clamp, same_theta",
        {"rope_rotate": 2, "rope_border": "clamp", "rope_same_theta": True},
        "C1",
        "--",
    ),
}
BASELINES = {"axial": "axial RoPE", "sincos": "sin-cos", "exact": "the exact border"}  # what variants are compared with
MAIN_VARIANTS = ("sincos", "axial", "spiral4_clamp", "spiral4_exact")


@dataclass(frozen=True)
class Study:
    """All that decides the results; stored with them."""

    variants: dict[str, tuple[str, ...]]  # by data set
    model: str = "DiT-XS/2"
    seeds: int = 5  # 0 to seeds - 1
    steps: int = 400
    batch: int = 16
    lr: float = 1e-2
    lr_schedule: str = "linear"
    warmup_steps: int = 40
    grad_clip: float = 1.0
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
    def sweep_runs(self) -> list["Run"]:
        """The sweep over learning rates; its runs at the study's own rate belong to the comparison too."""
        return [
            Run(data_set, variant, lr, seed)
            for data_set in self.variants
            for lr in self.sweep_lrs
            for variant in self.sweep_variants
            for seed in range(self.sweep_seeds)
        ]

    @property
    def compared_runs(self) -> list["Run"]:
        """The comparison of variants; all of a seed before the next seed."""
        return [
            Run(data_set, variant, self.lr, seed)
            for data_set, variants in self.variants.items()
            for seed in range(self.seeds)
            for variant in variants
        ]

    @property
    def runs(self) -> list["Run"]:
        """Every run, once."""
        return list(dict.fromkeys(self.sweep_runs + self.compared_runs))

    def settings(self) -> dict:
        return asdict(self) | {"options": {name: variant.options for name, variant in VARIANTS.items()}}


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


FULL = Study(variants={"digits": tuple(VARIANTS), "photographs": MAIN_VARIANTS})
QUICK = Study(variants={"digits": MAIN_VARIANTS}, seeds=2, steps=150, warmup_steps=15, val_every=50, sweep_lrs=())


def pairs(variants: Iterable[str]) -> list[tuple[str, str, str]]:
    """What is compared: a variant, the one it is compared with, and the baseline that this stands for."""
    rope = [name for name in variants if name != "sincos"]
    found = [(name, "axial", "axial") for name in rope if name != "axial"]
    found += [(name, "sincos", "sincos") for name in rope]
    found += [(name, name.replace("clamp", "exact"), "exact") for name in rope if "clamp" in name]
    return [pair for pair in found if pair[1] in variants]
