"""What a trained run does beyond its grid, when its content moves, and where its queries look."""

import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from diffusion import create_diffusion
from experiments.plan import Study
from experiments.runs import VAE as VAE_FOLDER
from models import DiT, sincos_table
from rope import SpiralRoPE
from runtime import data, pretrained, validation
from runtime.vae import VAE, sample_latents

CPU = torch.device("cpu")
DIFFUSION = create_diffusion(None)


@cache
def held_out(folder: Path, size: int, vae: Path, count: int | None = None) -> validation.EncodedImages:
    """Images of a folder encoded at size x size pixels, all or count evenly spread; kept for the runs to come."""
    images = data.ImageList(folder)
    if count is not None:
        rows = np.linspace(0, len(images) - 1, count).round().astype(int)
        images = images.subset(np.isin(np.arange(len(images)), rows))
    return validation.encode(images, (size, size), VAE(str(vae), CPU), num_workers=0)


def posterior_means(images: validation.EncodedImages) -> Tensor:
    """Scaled latents (n, C, h, w) without the posterior's noise."""
    return sample_latents(images.moments, images.vae.scaling_factor, images.vae.shift_factor, noise=torch.zeros(()))


def reconstruction_psnr(root: Path, size: int, vae: Path = VAE_FOLDER) -> float:
    """Peak signal-to-noise ratio (dB) of the held-out images after the autoencoder, of the error over all of them."""
    images, latents = data.ImageList(root / "val"), posterior_means(held_out(root / "val", size, vae))
    originals = np.stack([data.read_image(images.path(index)) for index in range(len(images))])
    errors = VAE(str(vae), CPU).decode(latents).numpy().astype(float) - originals
    return 10 * math.log10(255**2 / np.square(errors).mean())


@dataclass(frozen=True)
class Trained:
    """A run's averaged weights, and the held-out images of its data set."""

    ckpt: Path  # what --ckpt takes
    root: Path  # of the data set
    study: Study
    vae: Path = VAE_FOLDER

    def model(self, **given) -> DiT:
        return pretrained.load_trained(self.ckpt, given=given).model

    def images(self, part: str, size: int, count: int | None = None) -> validation.EncodedImages:
        return held_out(self.root / part, size, self.vae, count)

    def beyond_grid(self) -> dict[str, float]:
        """Held-out loss by "enlarged192/extrapolate" and the like; "trained" is that at the trained size.

        enlarged: the held-out images resized; canvas: larger held-out images at the same scale.
        """

        def loss(model: DiT, part: str, size: int) -> float:
            images = self.images(part, size, self.study.beyond_grid_images)
            return float(validation.image_losses([model], images, CPU, "fp32").mean())

        losses = {"trained": loss(self.model(), "val", self.study.image_size)}
        for size in self.study.canvases:
            for extension in ("extrapolate", "interpolate"):
                model = self.model(image_size=(size, size), rope_extend=extension)
                losses[f"enlarged{size}/{extension}"] = loss(model, "val", size)
                losses[f"canvas{size}/{extension}"] = loss(model, f"canvas{size}", size)
        return losses

    @torch.no_grad()
    def translation(self) -> dict[str, float]:
        """Relative change (RMS of the change over RMS) of the noise prediction when content moves by one token.

        moved: the same tokens at two places of a canvas that holds nothing else. rolled: the content of the grid moves
        round its edges, and the prediction is moved back and compared away from them, where neighbours that came round
        the edge still act through attention. Each is a mean over a move down and a move to the right.
        """
        model, study = self.model(), self.study
        images = self.images("val", study.image_size, study.translated_images)
        x_start, y = posterior_means(images), images.labels
        patch, inner = model.patch_size, slice(study.margin * model.patch_size, -study.margin * model.patch_size)
        generator, changes = torch.Generator().manual_seed(0), {"moved": [], "rolled": []}
        for timestep in study.translation_timesteps:
            t = torch.full((len(x_start),), timestep)
            x = DIFFUSION.q_sample(x_start, t, torch.randn(x_start.shape, generator=generator))
            whole, placed = model(x, t, y)[:, : x.shape[1]], predict_at(model, x, t, y, (1, 1), study.canvas)
            for axis, corner in ((2, (2, 1)), (3, (1, 2))):
                rolled = model(x.roll(patch, axis), t, y)[:, : x.shape[1]].roll(-patch, axis)
                changes["rolled"].append(relative_change(rolled[:, :, inner, inner], whole[:, :, inner, inner]))
                changes["moved"].append(relative_change(predict_at(model, x, t, y, corner, study.canvas), placed))
        return {name: sum(values) / len(values) for name, values in changes.items()}

    @torch.no_grad()
    def attention(self, name: str) -> dict:
        """Attention of the study's queries to every token, over heads and blocks, on the held-out image val/name."""
        model, images = self.model(), self.images("val", self.study.image_size)
        row = data.ImageList(self.root / "val").paths.tolist().index(os.fsencode(name))
        x_start, t = posterior_means(images)[row : row + 1], torch.tensor([self.study.attention_timestep])
        noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0))
        with RecordedAttention() as recorded:
            model(DIFFUSION.q_sample(x_start, t, noise), t, images.labels[row : row + 1])
        averaged = torch.stack(recorded.weights).mean(0).unflatten(0, model.grid)
        return {"image": f"val/{name}", "maps": [averaged[query].tolist() for query in self.study.queries]}


def predict_at(model: DiT, x: Tensor, t: Tensor, y: Tensor, corner: tuple[int, int], canvas: int) -> Tensor:
    """Noise prediction (N, C, H, W) for tokens that lie at a corner (top, left) of a canvas of so many tokens a side.

    The rest of the canvas is empty: only the positions of the tokens depend on the corner.
    """
    rows, columns = (slice(first, first + length) for first, length in zip(corner, model.grid, strict=True))

    def cut_out(table: Tensor) -> Tensor:  # (canvas*canvas, n) -> (h*w, n)
        return table.unflatten(0, (canvas, canvas))[rows, columns].flatten(0, 1)

    rope = model.rope_embedder
    if rope is None:
        table = sincos_table(model.pos_embed.shape[-1], canvas, canvas)
        return functional_call(model, {"pos_embed": cut_out(table)[None]}, (x, t, y))[:, : x.shape[1]]
    larger = SpiralRoPE(rope.head_dim, canvas, rope.config)  # neighbours are as far apart as in training
    larger.freqs = rope.freqs
    tables = tuple(map(cut_out, larger(canvas, canvas)))
    with rope.register_forward_hook(lambda *_: tables):
        return model(x, t, y)[:, : x.shape[1]]


def relative_change(changed: Tensor, original: Tensor) -> float:
    return float((changed - original).square().mean().sqrt() / original.square().mean().sqrt())


class RecordedAttention(TorchFunctionMode):
    """Context that keeps each block's attention weights (tokens, tokens), queries first, mean over images and heads."""

    def __init__(self):
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, _ = args  # (B, H, N, D/H)
            self.weights.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1)))
        return function(*args, **(kwargs or {}))
