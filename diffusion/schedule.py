"""Noise schedules and the choice of timesteps that a sampler visits."""

import math
import re
from itertools import accumulate

import numpy as np


def linear_betas(steps: int) -> np.ndarray:
    """Variances (T,) float64 from 1e-4 to 0.02 for T = 1000, scaled by 1000/T otherwise (arXiv 2006.11239).

    Raises ValueError for so few steps that variances would reach 1.
    """
    if steps <= 20:
        raise ValueError(f"a linear noise schedule needs more than 20 steps, got {steps}")
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def squared_cosine_betas(steps: int) -> np.ndarray:
    """Variances (T,) float64 for which alphas_cumprod is a squared cosine, at most 0.999 (arXiv 2102.09672, Eq. 17)."""

    def alpha_bar(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)])


def respaced_timesteps(steps: int, respacing: str | int | list[int] | None) -> list[int]:
    """Original timesteps, ascending, that a shortened process keeps.

    respacing: "" or None keeps all; "ddimN" takes the first integer stride that gives exactly N of them, from 0
    (arXiv 2010.02502); otherwise counts, one for each of as many equal sections, of which the leading ones get the
    remainder, evenly spaced within a section from its first to its last step (arXiv 2102.09672, section 4).
    Raises ValueError for counts that do not fit.
    """
    if respacing is None or respacing == "":
        return list(range(steps))
    text = respacing if isinstance(respacing, str) else ",".join(map(str, np.atleast_1d(respacing)))
    if not re.fullmatch(r"ddim\d+|\d+(,\d+)*", text):
        raise ValueError(f"timestep respacing {text!r} is not a count, counts such as '10,20,30', or 'ddimN'")
    if text.startswith("ddim"):
        return _strided_timesteps(steps, int(text.removeprefix("ddim")))
    return _sectioned_timesteps(steps, [int(count) for count in text.split(",")])


def _sectioned_timesteps(steps: int, counts: list[int]) -> list[int]:
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"cannot choose {count} timesteps from a section of {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # A running sum as in the published code: a product rounds some halfway positions to the other neighbour.
        kept += [start + round(position) for position in accumulate([0.0] + [stride] * (count - 1))]
        start += size
    return kept


def _strided_timesteps(steps: int, count: int) -> list[int]:
    for stride in range(1, steps + 1):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise ValueError(f"no integer stride gives {count} of {steps} timesteps")
