"""The autoencoder between pixels and latents: a diffusers AutoencoderKL by name or path."""

import hashlib
import math
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from runtime.checkpoint import Trained
from runtime.options import UserError, first_line, root_cause
from runtime.sampling import autocast

SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


class VAE:
    """A frozen AutoencoderKL in float32; what it needs to know is read from the model's own config.

    source is "ema" or "mse" (Stable Diffusion's fine-tuned autoencoders), a local folder, or a hub id.
    decode_precision "bf16" decodes under autocast. Raises UserError when it cannot be loaded.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu", decode_precision: str = "fp32"):
        self.source = source
        self.decode_precision = decode_precision
        self.model = _checked(_load(source), source).to(device).eval().requires_grad_(False)
        config = self.model.config
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels = config.latent_channels
        self.scaling_factor = config.scaling_factor
        self.shift_factor = getattr(config, "shift_factor", None) or 0.0

    def describe(self) -> dict:
        """Identity and geometry as plain types: equal for the same weights, wherever they were loaded from."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return {
            "sha256": digest.hexdigest(),
            "downsampling": self.downsampling,
            "latent_channels": self.latent_channels,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
        }

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 to posterior moments (N, 2C, h, w) float32: mean, then standard deviation."""
        pixels = images.to(self.model.device).float() / 127.5 - 1  # to [-1, 1]
        posterior = self.model.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) to images (N, H, W, 3) uint8 on the CPU."""
        with autocast(self.model.device, self.decode_precision):
            pixels = self.model.decode(latents.float() / self.scaling_factor + self.shift_factor).sample
        pixels = (127.5 * pixels.float() + 128).clamp(0, 255)  # rounds half up once the fraction is cut off
        return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8)


def load_vae(source: str | None, trained: Trained, device: torch.device, decode_precision: str = "fp32") -> VAE:
    """The autoencoder of a model's latents; None is the one of the training.

    Raises UserError when its latents are not of the model's shape.
    """
    vae = VAE(source or trained.vae["source"], device, decode_precision)
    expected = (trained.config.in_channels, trained.vae.get("downsampling", vae.downsampling))
    if (vae.latent_channels, vae.downsampling) != expected:
        raise UserError(
            f"--vae {vae.source!r} has {vae.latent_channels} latent channels and down-sampling {vae.downsampling}; the "
            f"checkpoint was trained with {expected[0]} and {expected[1]}"
        )
    return vae


def sample_latents(
    moments: Tensor, scaling_factor: float, shift_factor: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Draw scaled latents (N, C, h, w) float32 from posterior moments (N, 2C, h, w), with given or fresh noise."""
    # Contiguous, because noise is drawn in the order of memory, and an encoder's output can be laid out otherwise.
    mean, std = moments.float().contiguous().chunk(2, dim=1)
    noise = torch.randn_like(mean) if noise is None else noise
    return (mean + std * noise - shift_factor) * scaling_factor


def _load(source: str):
    from diffusers import AutoencoderKL
    from huggingface_hub.utils import logging as hub_logging

    hub_id = SHORT_NAMES.get(source, source)
    local = Path(source).is_dir()
    if not local and (source.startswith((".", "/", "~")) or hub_id.count("/") != 1):
        raise UserError(
            f"--vae {source!r} is not a folder; expected ema, mse, a hub id, or a folder with config.json and "
            "diffusion_pytorch_model.safetensors"
        )
    if local and not (Path(source) / "config.json").is_file():
        raise UserError(f"--vae folder {source!r} has no config.json; expected one that save_pretrained wrote")
    hub_logging.set_verbosity_error()  # its retries take lines; what went wrong is said below, once
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from one library to the other
            model = AutoencoderKL.from_pretrained(hub_id, local_files_only=local, torch_dtype=torch.float32)
    except Exception as error:  # whatever a damaged file or a network makes the libraries raise
        if local:
            raise UserError(
                f"--vae folder {source!r} cannot be loaded as an AutoencoderKL: {first_line(error)}"
            ) from error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true") else ""
        raise UserError(
            f"--vae {source!r}: {hub_id} cannot be fetched from the Hugging Face hub{offline}: {root_cause(error)}; "
            "check the name and the network, or pass a local folder that holds the autoencoder"
        ) from error
    return model


def _checked(model, source: str):
    """The autoencoder, if its weights and its scaling factor are numbers. Raises UserError."""
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise UserError(f"--vae {source!r} lacks weights, such as {name}; copy it again")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"--vae {source!r} has values in {name} that are not finite numbers; copy it again")
    scale = model.config.scaling_factor
    if not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise UserError(f"--vae {source!r} has scaling_factor {scale!r} in its config.json; expected a number > 0")
    return model
