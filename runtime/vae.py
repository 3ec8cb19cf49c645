"""The autoencoder between pixels and latents: a diffusers AutoencoderKL by name or path."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from runtime import files
from runtime.checkpoint import tensor_hash
from runtime.config import VAEConfig
from runtime.distributed import autocast
from runtime.options import UserError, check_image_size, first_line, root_cause
from runtime.pretrained import Description

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
        self.config = VAEConfig(
            source=source,
            sha256=tensor_hash(self.model.state_dict()),
            downsampling=2 ** (len(config.block_out_channels) - 1),
            latent_channels=config.latent_channels,
            scaling_factor=config.scaling_factor,
            shift_factor=getattr(config, "shift_factor", None) or 0.0,
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) uint8 to posterior moments (N, 2C, h, w) float32: mean, then standard deviation."""
        pixels = images.to(self.model.device).float() / 127.5 - 1  # to [-1, 1]
        posterior = self.model.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor, names: Sequence | None = None) -> Tensor:
        """Scaled latents (N, C, h, w) to images (N, H, W, 3) uint8 on the CPU.

        Raises UserError, with its name (None: its row), for one that comes out as values that are not finite.
        """
        with autocast(self.model.device, self.decode_precision):
            pixels = self.model.decode(latents.float() / self.config.scaling_factor + self.config.shift_factor).sample
        finite = torch.isfinite(pixels).flatten(1).all(dim=1).tolist()
        if not all(finite):
            row = finite.index(False)
            raise UserError(
                f"--vae {self.source!r} decodes sample {row if names is None else names[row]} to values that are not "
                "finite; pass --vae-precision fp32, or use another"
            )
        pixels = (127.5 * pixels.float() + 128).clamp(0, 255)  # rounds half up once the fraction is cut off
        return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8)


def load_vae(source: str | None, trained: Description, device: torch.device, decode_precision: str = "fp32") -> VAE:
    """The autoencoder of a model's latents; None is the one of the training.

    Raises UserError when its latents are not of the model's shape.
    """
    vae = VAE(source or trained.config.vae.source, device, decode_precision)
    expected = (trained.config.model.in_channels, trained.config.vae.downsampling)
    if (vae.config.latent_channels, vae.config.downsampling) != expected:
        raise UserError(
            f"--vae {vae.source!r} has {vae.config.latent_channels} latent channels and down-sampling "
            f"{vae.config.downsampling}; the checkpoint was trained with {expected[0]} and {expected[1]}"
        )
    return vae


def load_same(source: str | None, config: VAEConfig, device: torch.device, what: str) -> VAE:
    """The autoencoder that config describes, from where it was found or from source. Raises UserError for another.

    what names the thing that was made with it.
    """
    vae = VAE(source or config.source, device)
    if not vae.config.is_same(config):
        raise UserError(
            f"--vae {vae.source!r} has other weights than the VAE that made {what}; leave --vae out, or pass a folder "
            f"with the same weights: it was {config.source!r}"
        )
    return vae


def check_source(source: str) -> None:
    """Raise UserError for what is neither a folder with an autoencoder nor the form of a hub id."""
    local = Path(source).is_dir()
    if not local and (source.startswith((".", "/", "~")) or SHORT_NAMES.get(source, source).count("/") != 1):
        raise UserError(
            f"--vae {source!r} is not a folder; expected ema, mse, a hub id, or a folder with config.json and "
            "diffusion_pytorch_model.safetensors"
        )
    if local and not (Path(source) / "config.json").is_file():
        raise UserError(f"--vae folder {source!r} has no config.json; expected one that save_pretrained wrote")


def check_unloaded(source: str, image_size: tuple[int, int] | None, patch_size: int) -> None:
    """Raise UserError for no autoencoder, or a size that does not fit, as far as that shows without loading it."""
    check_source(source)
    downsampling = VAEConfig.downsampling if source in SHORT_NAMES else None
    if Path(source).is_dir():
        channels = files.read_json(Path(source) / "config.json").get("block_out_channels")
        downsampling = 2 ** (len(channels) - 1) if isinstance(channels, list) else None
    if image_size is not None and downsampling is not None:
        check_image_size(image_size, downsampling, patch_size)


def is_surely(source: str, config: VAEConfig) -> bool:
    """Whether source has the weights that config describes; False also where only loading them would tell."""
    folder = Path(source)
    if not folder.is_dir():
        return source == config.source
    try:
        return tensor_hash(load_file(folder / "diffusion_pytorch_model.safetensors")) == config.sha256
    except (OSError, SafetensorError):  # loading it will say what is wrong
        return False


def latents_from(config: VAEConfig, vae: VAE | None) -> Callable[[Tensor], Tensor]:
    """What turns a batch into scaled latents: cached moments (n, 2C, h, w), or with vae images (n, 3, H, W) uint8."""

    def draw(inputs: Tensor) -> Tensor:
        moments = inputs if vae is None else vae.encode(inputs)
        return sample_latents(moments, config.scaling_factor, config.shift_factor)

    return draw


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

    check_source(source)
    hub_id, local = SHORT_NAMES.get(source, source), Path(source).is_dir()
    hub_logging.set_verbosity_error()  # its retries take lines; what went wrong is said below, once
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # from one library to the other
            how = dict(local_files_only=local, torch_dtype=torch.float32, low_cpu_mem_usage=False)
            model, found = AutoencoderKL.from_pretrained(hub_id, **how, output_loading_info=True)
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
    if found["missing_keys"]:
        raise UserError(f"--vae {source!r} lacks weights, such as {found['missing_keys'][0]}; copy it again")
    return model


def _checked(model, source: str):
    """The autoencoder, if its weights and its scaling factor are numbers. Raises UserError."""
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"--vae {source!r} has values in {name} that are not finite numbers; copy it again")
    scale = model.config.scaling_factor
    if not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise UserError(f"--vae {source!r} has scaling_factor {scale!r} in its config.json; expected a number > 0")
    return model
