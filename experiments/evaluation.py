"""What a trained run does beyond its grid, when its content moves, and where its queries look."""

import dataclasses
import math
import os
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion import create_diffusion
from experiments.data import CANVASES, SIZE
from models import DiT, sincos_table
from rope import rotate
from runtime import checkpoint, data, validation
from runtime.distributed import ignore_stop_signals
from runtime.vae import VAE

CPU = torch.device("cpu")
EXTENSIONS = ("extrapolate", "interpolate")
BEYOND_GRID_IMAGES = 30  # a larger grid costs up to four times as much
TIMESTEPS = (100, 300, 500, 700, 900)  # of the translation test
TRANSLATED_IMAGES = 40
MARGIN = 2  # tokens at each edge that the translation test on a whole grid leaves out
CANVAS = 10  # tokens a side of the canvas on which 8 x 8 tokens are moved
ATTENTION_TIMESTEP = 200
QUERIES = ((2, 2), (3, 5), (6, 3))  # (row, column) of the tokens whose attention is drawn
ATTENTION_IMAGES = {"digits": "7/0467.png", "photographs": "camera/01.png"}  # held out
SETTINGS = {  # stored with results, which were measured with these
    "beyond_grid_images": BEYOND_GRID_IMAGES,
    "translated_images": TRANSLATED_IMAGES,
    "translation_timesteps": TIMESTEPS,
    "margin": MARGIN,
    "canvas": CANVAS,
    "attention_timestep": ATTENTION_TIMESTEP,
    "queries": QUERIES,
    "attention_images": ATTENTION_IMAGES,
}


def start_worker() -> None:
    """One thread for each process; stopping is the main process's to decide."""
    torch.set_num_threads(1)
    ignore_stop_signals(0)


def measure(weights: Path, data_root: Path, vae: Path, beyond_grid: bool, attention: str | None) -> dict:
    """All measurements of one run's averaged weights, by section of the results; attention: an image in val or None."""
    began = time.process_time()
    found = {"translation": translation(weights, data_root, vae)}
    if beyond_grid:
        found["beyond_grid"] = beyond_grid_losses(weights, data_root, vae)
    if attention is not None:
        found["attention"] = attention_maps(weights, data_root, vae, attention)
    found["measurements"] = {"cpu_seconds": time.process_time() - began}
    return found


@cache
def held_out(folder: Path, size: int, vae: Path) -> validation.EncodedImages:
    """Encoded images of a folder at size x size pixels; kept, because every run is measured on the same."""
    return validation.encode(data.ImageList(folder), (size, size), VAE(str(vae), CPU), num_workers=0)


def spread(images: validation.EncodedImages, count: int) -> validation.EncodedImages:
    """count of the images, evenly spread over the list, numbered anew."""
    rows = torch.linspace(0, len(images.labels) - 1, count).round().long()
    return dataclasses.replace(
        images, indices=list(range(count)), total=count, moments=images.moments[rows], labels=images.labels[rows]
    )


def posterior_means(images: validation.EncodedImages) -> Tensor:
    """Scaled latents (n, C, h, w) without the posterior's noise."""
    mean = images.moments.float().chunk(2, dim=1)[0]
    return (mean - images.shift_factor) * images.scaling_factor


def reconstruction_psnr(data_root: Path, vae: Path) -> float:
    """Peak signal-to-noise ratio (dB) of the held-out images after the autoencoder, of the error over all of them."""
    images, autoencoder = data.ImageList(data_root / "val"), VAE(str(vae), CPU)
    latents = posterior_means(held_out(data_root / "val", SIZE, vae))
    error = 0.0
    for index in range(len(images)):
        original = np.asarray(Image.open(images.path(index)).convert("RGB"), dtype=float)
        decoded = autoencoder.decode(latents[index : index + 1])[0].numpy()
        error += np.square(decoded - original).mean() / len(images)
    return 10 * math.log10(255**2 / error)


def beyond_grid_losses(weights: Path, data_root: Path, vae: Path) -> dict[str, float]:
    """Held-out loss by "enlarged192/extrapolate" and the like; "trained" is that at the trained size.

    enlarged: the held-out images resized; canvas: larger held-out images at the same scale.
    """
    trained = checkpoint.load_trained(weights)
    losses = {"trained": loss(trained.model, held_out(data_root / "val", SIZE, vae))}
    for size in CANVASES:
        for kind, folder in (("enlarged", "val"), ("canvas", f"canvas{size}")):
            images = held_out(data_root / folder, size, vae)
            for extension in EXTENSIONS:
                extended = checkpoint.load_trained(
                    weights, given={"image_size": (size, size), "rope_extend": extension}
                )
                losses[f"{kind}{size}/{extension}"] = loss(extended.model, images)
    return losses


def loss(model: DiT, images: validation.EncodedImages) -> float:
    """Mean over some of the images, the same for every model."""
    return float(validation.image_losses([model], spread(images, BEYOND_GRID_IMAGES), CPU, "fp32").mean())


class Placed(nn.Module):
    """Phases of h x w tokens at (top, left) of a larger canvas, in place of a model's rope_embedder."""

    def __init__(self, rope: nn.Module, canvas: tuple[int, int], top: int, left: int):
        super().__init__()
        self.rope, self.canvas, self.top, self.left = rope, canvas, top, left

    def forward(self, h: int, w: int) -> tuple[Tensor, Tensor]:
        trained, self.rope.pt_grid = self.rope.pt_grid, self.canvas  # neighbours as far apart as in training
        tables = self.rope(*self.canvas)
        self.rope.pt_grid = trained
        return tuple(place(table, self.canvas, h, w, self.top, self.left) for table in tables)


def place(table: Tensor, canvas: tuple[int, int], h: int, w: int, top: int, left: int) -> Tensor:
    """Rows of a table (H*W, n) for the h x w tokens at (top, left): (h*w, n)."""
    return table.unflatten(0, canvas)[top : top + h, left : left + w].flatten(0, 1)


def predict_at(model: DiT, x: Tensor, t: Tensor, y: Tensor, corner: tuple[int, int]) -> Tensor:
    """Noise prediction (N, C, H, W) for tokens that lie at a corner (top, left) of a canvas of 10 x 10 tokens.

    The rest of the canvas is empty: only the positions of the tokens depend on the corner.
    """
    canvas = (CANVAS, CANVAS)
    name = "pos_embed" if model.rope_embedder is None else "rope_embedder"
    original = getattr(model, name)
    if model.rope_embedder is None:
        table = sincos_table(original.shape[-1], *canvas)
        replacement = place(table, canvas, *model.grid, *corner)[None]
    else:
        replacement = Placed(original, canvas, *corner)
    try:
        setattr(model, name, replacement)
        return model(x, t, y)[:, : x.shape[1]]
    finally:
        setattr(model, name, original)


@torch.no_grad()
def translation(weights: Path, data_root: Path, vae: Path) -> dict[str, float]:
    """Relative change (RMS of the change over RMS) of the noise prediction when content moves by one token.

    moved: the same 8 x 8 tokens at two places of a canvas that holds nothing else. rolled: the content of the grid
    moves round its edges, and the prediction is moved back and compared away from them, where neighbours that came
    round the edge still act through attention. Each is a mean over a move down and a move to the right.
    """
    model = checkpoint.load_trained(weights).model
    images = spread(held_out(data_root / "val", SIZE, vae), TRANSLATED_IMAGES)
    x_start, y = posterior_means(images), images.labels
    patch, inner = model.patch_size, slice(MARGIN * model.patch_size, -MARGIN * model.patch_size)
    generator, diffusion = torch.Generator().manual_seed(0), create_diffusion(None)
    changes = {"moved": [], "rolled": []}
    for timestep in TIMESTEPS:
        t = torch.full((len(x_start),), timestep)
        x = diffusion.q_sample(x_start, t, torch.randn(x_start.shape, generator=generator))
        whole, placed = model(x, t, y)[:, : x.shape[1]], predict_at(model, x, t, y, (1, 1))
        for axis, corner in ((2, (2, 1)), (3, (1, 2))):
            rolled = model(x.roll(patch, axis), t, y)[:, : x.shape[1]].roll(-patch, axis)
            changes["rolled"].append(relative_change(rolled[:, :, inner, inner], whole[:, :, inner, inner]))
            changes["moved"].append(relative_change(predict_at(model, x, t, y, corner), placed))
    return {name: sum(values) / len(values) for name, values in changes.items()}


def relative_change(changed: Tensor, original: Tensor) -> float:
    return float((changed - original).square().mean().sqrt() / original.square().mean().sqrt())


@torch.no_grad()
def attention_maps(weights: Path, data_root: Path, vae: Path, name: str) -> dict:
    """Attention of QUERIES to every token, averaged over heads and blocks, on the held-out image val/name."""
    trained = checkpoint.load_trained(weights)
    images = held_out(data_root / "val", SIZE, vae)
    row = data.ImageList(data_root / "val").paths.tolist().index(os.fsencode(name))
    x_start = posterior_means(images)[row : row + 1]
    t = torch.tensor([ATTENTION_TIMESTEP])
    noise = torch.randn(x_start.shape, generator=torch.Generator().manual_seed(0))
    x = create_diffusion(None).q_sample(x_start, t, noise)
    averaged = record_attention(trained.model, x, t, images.labels[row : row + 1])  # (tokens, tokens)
    width = trained.model.grid[1]
    maps = [averaged[i * width + j].tolist() for i, j in QUERIES]
    return {"image": f"val/{name}", "maps": maps}


def record_attention(model: DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Attention weights (tokens, tokens), queries first, averaged over images, heads and blocks."""
    found = []

    def record(attention: nn.Module, inputs: tuple) -> None:
        tokens, cos, sin = inputs
        q, k, _ = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)  # (B, N, H, D/H)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        found.append(scores.softmax(-1).mean((0, 1)))

    hooks = [block.attn.register_forward_pre_hook(record) for block in model.blocks]
    model(x, t, y)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).mean(0)
