"""Spiral RoPE: rotary position embedding along K uniformly spread directions of the image plane.

Source: Spiral RoPE, arXiv 2602.03227, Eq. 8-13. Axial 2D RoPE is the special case of two directions.
This file needs torch alone and can be copied into another model: docs/use_in_your_model.md.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeConfig:
    """Settings of the rotary position embedding, stored in every checkpoint."""

    rotate: int = 0  # R: K = 2R directions, 90/R degrees apart; 0 = the two axes
    theta: float = 10000.0  # base of the geometric "lang" frequencies
    freqs_for: str = "lang"  # "lang": geometric frequencies; "pixel": evenly spaced ones
    max_freq: float = 10.0  # "pixel": the highest frequency is pi * max_freq / 2, radians per patch
    truncate_percentage: float = 0.0  # fraction of the frequencies, from the end of the list, set to 0
    max_freq_lang: float = 1.5  # "lang": highest frequency, radians per patch
    min_freq_lang: float = 0.0  # "lang" with rotate > 0: lowest frequency, radians per patch; 0 = given by theta
    same_theta: bool = False  # every direction gets the same frequencies, D/(4R) of them
    border: str = "clamp"  # "clamp": projections end at the axis length (published weights); "exact": Eq. 10


def valid_rotations(head_dim: int, same_theta: bool = False) -> list[int]:
    """Rotate values that a head dimension admits: 0 and every R with 4R (8R with same_theta) dividing it."""
    step = 8 if same_theta else 4
    return [0] + [r for r in range(1, head_dim // step + 1) if head_dim % (step * r) == 0]


def check_rotation(head_dim: int, config: RopeConfig) -> None:
    """Raise ValueError when config.rotate does not fit head_dim; warn when its directions are spread unevenly."""
    if head_dim % 4:
        raise ValueError(f"head dimension {head_dim} does not fit RoPE in two dimensions; expected a multiple of 4")
    valid = valid_rotations(head_dim, config.same_theta)
    if config.rotate not in valid:
        kind = " with same_theta" if config.same_theta else ""
        raise ValueError(
            f"rotate {config.rotate} does not fit head dimension {head_dim}{kind}; "
            f"valid values are {', '.join(map(str, valid))}"
        )
    even = [r for r in valid if r <= 1 or head_dim % (8 * r) == 0]
    if config.rotate not in even:
        warnings.warn(
            f"rotate {config.rotate} spreads the {head_dim // 2} channel pairs unevenly over its directions; "
            f"even values for head dimension {head_dim} are {', '.join(map(str, even))}",
            stacklevel=3,
        )


def frequencies(head_dim: int, config: RopeConfig) -> Tensor:
    """Frequencies shared by the row half and the column half of the channels, in radians per patch.

    Returns (n,) float32 with n = D/4, or D/(4R) with same_theta. Source: RoPE (arXiv 2104.09864) section 3.2.2
    for the geometric list, scaled so that it begins at max_freq_lang.
    """
    rotate, n = config.rotate, head_dim // 4
    if config.same_theta and rotate > 0:
        n = head_dim // (4 * rotate)
    t = torch.arange(n, dtype=torch.float64)
    if config.freqs_for == "pixel":
        freqs = torch.linspace(1.0, config.max_freq / 2, n, dtype=torch.float64) * math.pi
    elif config.min_freq_lang >= 1e-6 and rotate > 0:
        freqs = config.max_freq_lang * (config.min_freq_lang / config.max_freq_lang) ** (t / max(n - 1, 1))
    else:
        freqs = config.max_freq_lang * config.theta ** (-t / n)
    truncated = math.floor(n * config.truncate_percentage)
    freqs[n - truncated :] = 0
    return freqs.float()


class SpiralRoPE(nn.Module):
    """Phases by which channel pairs are rotated at each patch of a grid, for D-dimensional heads.

    The encoding is a table of D/2 frequency vectors in the plane, one a channel pair, and a rule for the border of the
    grid; a subclass with another table is another encoding. pt_grid is the grid length, or (rows, columns), that
    positions refer to: the one the model was built for.
    Raises ValueError for a rotate that does not fit head_dim, or an unknown freqs_for or border.
    """

    def __init__(self, head_dim: int, pt_grid: int | tuple[int, int], config: RopeConfig):
        super().__init__()
        if config.freqs_for not in ("lang", "pixel"):
            raise ValueError(f"freqs_for {config.freqs_for!r} is unknown; expected 'lang' or 'pixel'")
        if config.border not in ("clamp", "exact"):
            raise ValueError(f"border {config.border!r} is unknown; expected 'clamp' or 'exact'")
        check_rotation(head_dim, config)
        self.config = config
        self.head_dim = head_dim
        self.pt_grid = (pt_grid, pt_grid) if isinstance(pt_grid, int) else tuple(pt_grid)
        self.register_buffer("freqs", frequencies(head_dim, config))

    def _apply(self, fn, recurse=True):
        """Move with the model but stay float32: in half precision, phases are wrong by more than a patch."""
        freqs = self.freqs
        super()._apply(fn, recurse)
        if self.freqs.dtype != torch.float32:
            self.freqs = freqs.to(self.freqs.device, torch.float32)
        return self

    def table(self) -> tuple[Tensor, Tensor]:
        """Frequency (D/2,), radians per patch, and direction (D/2, 2), a unit vector (x, y), of every channel pair.

        Source: Eq. 8; the directions of either half of the pairs are 90/R degrees apart, and adjacent pairs share one.
        """
        rotations = max(self.config.rotate, 1)  # R; the axes alone are R = 1
        pair = torch.arange(self.head_dim // 2, device=self.freqs.device)  # (D/2,)
        row_half = pair < self.head_dim // 4  # pairs of base axis y; the others have x
        t = pair % (self.head_dim // 4)
        index = 2 * (t // (2 * rotations)) + t % 2 if self.config.same_theta else t
        alpha = (pair // 2) % rotations * (math.pi / 2 / rotations)
        x, y = torch.where(row_half, alpha.sin(), alpha.cos()), torch.where(row_half, alpha.cos(), -alpha.sin())
        return self.freqs[index], torch.stack([x, y], dim=1)

    def phases(self, h: int, w: int) -> Tensor:
        """Phase of every channel pair at every patch of an h x w grid: (h*w, D/2) float32, in radians."""
        frequency, direction = self.table()  # (D/2,), (D/2, 2)
        y = torch.arange(h, device=frequency.device, dtype=torch.float32) - (h - 1) / 2
        x = torch.arange(w, device=frequency.device, dtype=torch.float32) - (w - 1) / 2
        y, x = torch.meshgrid(y, x, indexing="ij")
        y, x = y.reshape(-1, 1), x.reshape(-1, 1)  # (h*w, 1), row-major
        # Eq. 10: the projection u.(x, y). Products and a sum, because a matrix product may run in TF32.
        position = x * direction[:, 0] + y * direction[:, 1]  # (h*w, D/2)

        # The border: projections of the first half of the pairs are measured by the rows of the grid, of the second by
        # its columns.
        row_half = torch.arange(self.head_dim // 2, device=frequency.device) < self.head_dim // 4
        length, trained = torch.where(row_half, h, w), torch.where(row_half, *self.pt_grid)  # (D/2,) patches
        edge = (length - 1) / 2
        if self.config.border == "clamp":
            position = position.clamp(-edge, edge)
        position = (position + edge) * (trained / length)
        return position * frequency  # (h*w, D/2)

    def forward(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the phases, each (h*w, D/2) float32."""
        phases = self.phases(h, w)
        return phases.cos(), phases.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent channel pairs (a, b) to (a cos - b sin, b cos + a sin), in float32.

    x is (B, N, heads, head_dim); cos and sin are (N, head_dim/2). The result has the shape and dtype of x.
    """
    cos, sin = cos[:, None], sin[:, None]  # (N, D/2) -> (N, 1, D/2)
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, N, heads, D) -> (B, N, heads, D/2, 2)
    if torch.compiler.is_compiling():  # a compiler fuses the formula; it has no code for complex numbers
        a, b = pairs.unbind(-1)
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:  # (a + ib)(cos + i sin): one pass over memory instead of seven, forward and backward
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return rotated.flatten(-2).type_as(x)
