"""Position encodings that the studies compare, some of them beyond the options of train.py.

A rotary encoding of the plane is a table of D/2 frequency vectors, so that another one is a subclass with another
table.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rope import RopeConfig, SpiralRoPE


class GoldenRoPE(SpiralRoPE):
    """Every channel pair has its own direction and frequency; frequencies fall as axial RoPE's do.

    Directions are the golden section of half a turn apart, since opposite ones are the same encoding. Source: J. Xiong,
    On N-dimensional Rotary Positional Embeddings (2025), jerryxio.ng/posts/nd-rope, there with other directions in
    each head.
    """

    def table(self) -> tuple[Tensor, Tensor]:
        pair = torch.arange(self.head_dim // 2, device=self.freqs.device)
        return geometric(self.config, pair / len(pair)), unit(pair * (math.pi * (math.sqrt(5) - 1) / 2))


class SimplexRoPE(SpiralRoPE):
    """Three directions, 120 degrees apart, at each frequency; the last has fewer where D/2 is no multiple of 3.

    Source: nD-RoPE, arXiv 2606.12146, whose wave vectors of one scale are the corners of a regular simplex.
    """

    def table(self) -> tuple[Tensor, Tensor]:
        pair = torch.arange(self.head_dim // 2, device=self.freqs.device)
        return geometric(self.config, pair // 3 / math.ceil(len(pair) / 3)), unit(pair % 3 * (2 * math.pi / 3))


class LearnedRoPE(SpiralRoPE):
    """Frequency vectors are weights of the model, the same in all heads and blocks; they begin as the settings say.

    Source: RoPE-Mixed, arXiv 2403.13298, which has its own for every head and block.
    """

    def __init__(self, head_dim: int, pt_grid: int | tuple[int, int], config: RopeConfig):
        super().__init__(head_dim, pt_grid, config)
        frequency, direction = super().table()
        self.vectors = nn.Parameter(frequency[:, None] * direction)  # (D/2, 2), radians per patch

    def table(self) -> tuple[Tensor, Tensor]:
        return self.vectors.norm(dim=1), normalize(self.vectors, dim=1)


def geometric(config: RopeConfig, place: Tensor) -> Tensor:
    """The frequencies of "lang" at places (n,) from 0, the highest, towards 1, in radians per patch."""
    return config.max_freq_lang * config.theta**-place


def unit(angle: Tensor) -> Tensor:
    """Unit vectors (n, 2) at angles (n,) from the x axis."""
    return torch.stack([angle.cos(), angle.sin()], dim=1)


@dataclass(frozen=True)
class Encoding:
    """How a study names, draws and builds an encoding; without rope it is the sin-cos table."""

    label: str
    colour: str
    rope: RopeConfig | None = None
    kind: type[SpiralRoPE] = SpiralRoPE
    dashes: str = "-"

    def build(self, head_dim: int, grid: int) -> SpiralRoPE | None:
        return None if self.rope is None else self.kind(head_dim, grid, self.rope)


EXACT = RopeConfig(border="exact")


def spiral(rotate: int, border: str = "exact", **more) -> RopeConfig:
    return RopeConfig(rotate=rotate, border=border, **more)


ENCODINGS = {
    "sincos": Encoding("sin-cos", "black"),
    "axial": Encoding("axial RoPE", "C0", EXACT),
    "spiral2": Encoding("Spiral R = 2", "C2", spiral(2)),
    "spiral2_clamp": Encoding("Spiral R = 2, clamp", "C2", spiral(2, "clamp"), dashes="--"),
    "spiral4": Encoding("Spiral R = 4", "C3", spiral(4)),
    "spiral4_clamp": Encoding("Spiral R = 4, clamp", "C3", spiral(4, "clamp"), dashes="--"),
    "spiral8": Encoding("Spiral R = 8", "C4", spiral(8)),
    "spiral8_clamp": Encoding("Spiral R = 8, clamp", "C4", spiral(8, "clamp"), dashes="--"),
    "same_theta": Encoding("Spiral R = 4, same_theta", "C1", spiral(4, same_theta=True)),
    "best": Encoding("Spiral R = 4, theta 100, same_theta", "C6", spiral(4, same_theta=True, theta=100.0)),
    "axial100": Encoding("axial RoPE, theta 100", "C9", RopeConfig(border="exact", theta=100.0)),
    "golden": Encoding("golden angle", "C8", EXACT, GoldenRoPE),
    "simplex": Encoding("three directions a frequency", "C5", EXACT, SimplexRoPE),
    "learned_axial": Encoding("learned, from axial", "C0", EXACT, LearnedRoPE, ":"),
    "learned_spiral": Encoding("learned, from Spiral R = 4", "C3", spiral(4), LearnedRoPE, ":"),
}
