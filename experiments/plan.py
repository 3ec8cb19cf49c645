"""What the study of position encodings trains: variants, settings, and the list of runs."""

from collections.abc import Iterable
from dataclasses import dataclass

MODEL = "DiT-XS/2"
VARIANTS = {  # options of train.py
    "sincos": {},
    "axial": {"use_rope": True, "rope_rotate": 0},
    "spiral2_clamp": {"use_rope": True, "rope_rotate": 2, "rope_border": "clamp"},
    "spiral2_exact": {"use_rope": True, "rope_rotate": 2, "rope_border": "exact"},
    "spiral4_clamp": {"use_rope": True, "rope_rotate": 4, "rope_border": "clamp"},
    "spiral4_exact": {"use_rope": True, "rope_rotate": 4, "rope_border": "exact"},
    "same_theta2": {"use_rope": True, "rope_rotate": 2, "rope_border": "clamp", "rope_same_theta": True},
}
LABELS = {
    "sincos": "sin-cos",
    "axial": "axial RoPE",
    "spiral2_clamp": "Spiral R = 2, clamp",
    "spiral2_exact": "Spiral R = 2, exact",
    "spiral4_clamp": "Spiral R = 4, clamp",
    "spiral4_exact": "Spiral R = 4, exact",
    "same_theta2": "Spiral R = 2, clamp, same_theta",
}
BASELINES = {"axial": "axial RoPE", "sincos": "sin-cos", "exact": "the exact border"}  # what variants are compared with
MAIN_VARIANTS = ("sincos", "axial", "spiral4_clamp", "spiral4_exact")


@dataclass(frozen=True)
class Study:
    """What is trained, and how; stored with the results."""

    variants: dict[str, tuple[str, ...]]  # by data set
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
    beyond_grid_variants: tuple[str, ...] = ("axial", "spiral4_clamp", "spiral4_exact")
    attention_variants: tuple[str, ...] = ("axial", "spiral4_exact")


FULL = Study(variants={"digits": tuple(VARIANTS), "photographs": MAIN_VARIANTS})
QUICK = Study(variants={"digits": MAIN_VARIANTS}, seeds=2, steps=150, warmup_steps=15, val_every=50, sweep_lrs=())


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


def pairs(variants: Iterable[str]) -> list[tuple[str, str, str]]:
    """What is compared: a variant, the one it is compared with, and the baseline that this stands for."""
    rope = [name for name in variants if name != "sincos"]
    found = [(name, "axial", "axial") for name in rope if name != "axial"]
    found += [(name, "sincos", "sincos") for name in rope]
    found += [(name, name.replace("clamp", "exact"), "exact") for name in rope if "clamp" in name]
    return [pair for pair in found if pair[1] in variants]


def sweep_runs(study: Study) -> list[Run]:
    """The sweep over learning rates; its runs at the study's own rate belong to the comparison too."""
    return [
        Run(data_set, variant, lr, seed)
        for data_set in study.variants
        for lr in study.sweep_lrs
        for variant in study.sweep_variants
        for seed in range(study.sweep_seeds)
    ]


def compared_runs(study: Study) -> list[Run]:
    """The comparison of variants; all of a seed before the next seed."""
    return [
        Run(data_set, variant, study.lr, seed)
        for data_set, variants in study.variants.items()
        for seed in range(study.seeds)
        for variant in variants
    ]


def planned(study: Study) -> list[Run]:
    """Every run of the study, once."""
    return list(dict.fromkeys(sweep_runs(study) + compared_runs(study)))
