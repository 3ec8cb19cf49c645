"""Train the demo's AutoencoderKL on scikit-learn's handwritten digits and save it in diffusers' format.

Run from the repository root: python -m demo.train_vae
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from demo.digits import enlarged_digits
from runtime import files, monitor, options

CHANNELS = (4, 8, 16, 32)  # per resolution, finest first
BATCH = 16  # 64 x 64 images a step; a quarter of it at 128 x 128
LARGE_EVERY = 5  # steps: every so many the images are 128 x 128
LR = 3e-3  # peak, after a linear warm-up, decayed to 0 by a half cosine
WARM_UP = 100  # steps
KL_WEIGHT = 3e-5  # of the KL per latent value
JITTER = 0.2  # largest random loss of contrast, as a fraction
EMA_DECAY = 0.99  # of the averaged weights, which are saved
LOG_EVERY = 50  # steps


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=monitor.REPOSITORY / "assets/demo_vae", help="folder of the model")
    parser.add_argument("--steps", type=options.number(int, WARM_UP + 1), default=1500, help="training steps")
    options.add_dry_run(parser)
    return parser.parse_args(argv)


def load_images(size: int) -> Tensor:
    """The demo's digits as (1797, 1, size, size) uint8, one grey channel."""
    images, _ = enlarged_digits(size)
    return torch.from_numpy(np.stack([np.asarray(image.convert("L")) for image in images]))[:, None]


def to_rgb(grey: Tensor) -> Tensor:
    """(N, 1, H, W) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return (grey.float() / 127.5 - 1).expand(-1, 3, -1, -1)


def jitter_contrast(images: Tensor) -> Tensor:
    """Shrink each image's range of values by up to JITTER and shift it anywhere that stays within [-1, 1]."""
    loss = JITTER * torch.rand(len(images), 1, 1, 1)
    shift = loss * (2 * torch.rand(len(images), 1, 1, 1) - 1)
    return images * (1 - loss) + shift


def build_vae() -> AutoencoderKL:
    """An AutoencoderKL that is thin where images are large: 8x down, 4 latent channels, no attention."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def losses(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error per pixel value, and KL to the unit Gaussian per latent value, in nats.

    One number per cell describes a digit: with a large weight of the KL, three of the four channels would become
    pure noise.
    """
    posterior = vae.encode(images).latent_dist
    reconstruction = vae.decode(posterior.sample()).sample
    mse = (reconstruction - images).square().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return mse, kl


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine to 0 at the last step."""
    decay = 0.5 + 0.5 * math.cos(math.pi * max(step - WARM_UP, 0) / (steps - WARM_UP))
    return min((step + 1) / WARM_UP, decay)


def train(vae: AutoencoderKL, small: Tensor, large: Tensor, steps: range, total: int) -> list[str]:
    """Train vae in place, leave it with the averaged weights, and return the lines of losses.csv."""
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total))
    log = []
    with monitor.progress_bar(len(steps)) as progress:
        for step in steps:
            grey, count = (large, BATCH // 4) if step % LARGE_EVERY == 0 else (small, BATCH)
            mse, kl = losses(vae, jitter_contrast(to_rgb(grey[torch.randint(len(grey), (count,))])))
            optimizer.zero_grad()
            (mse + KL_WEIGHT * kl).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(vae)
            progress.update()
            if step % LOG_EVERY == 0 or step == total:
                log.append(f"{step},{grey.shape[-1]},{mse.item():.6f},{kl.item():.4f}")
    vae.load_state_dict(average.module.state_dict())
    return log


@torch.no_grad()
def in_batches(function: Callable, inputs: Tensor) -> Tensor:
    return torch.cat([function(batch) for batch in inputs.split(64)])


def sample_latents(vae: AutoencoderKL, grey: Tensor) -> Tensor:
    """One posterior sample per image, unscaled: (N, 1, H, W) uint8 -> (N, 4, H/8, W/8)."""
    return in_batches(lambda batch: vae.encode(to_rgb(batch)).latent_dist.sample(), grey)


@torch.no_grad()
def standardize(vae: AutoencoderKL, grey: Tensor) -> None:
    """Give each latent channel mean 0 and standard deviation 1 over the data, most informative channel first.

    The change is folded into the two 1x1 convolutions around the latents, so reconstructions stay as they were.
    The order matters to guidance on the first three latent channels: the fourth is then the least missed.
    """
    latents = sample_latents(vae, grey)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    information = in_batches(lambda batch: vae.encode(to_rgb(batch)).latent_dist.mean, grey).std((0, 2, 3)) / std
    order = information.argsort(descending=True)

    into, out_of = vae.quant_conv, vae.post_quant_conv
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight.copy_((out_of.weight * std[:, None, None])[:, order])
    rows = torch.cat([order, order + len(order)])  # means, then log-variances
    into.weight.copy_((into.weight / torch.cat([std, torch.ones_like(std)])[:, None, None, None])[rows])
    into.bias.copy_(torch.cat([(into.bias[: len(std)] - mean) / std, into.bias[len(std) :] - 2 * std.log()])[rows])


def report(vae: AutoencoderKL, grey: Tensor) -> None:
    """Print how images of one size come back from scaled posterior samples, bare and with noise added to them."""
    scale, size = vae.config.scaling_factor, grey.shape[-1]
    images, latents = to_rgb(grey), sample_latents(vae, grey) * scale
    for noise in (0.0, 0.05, 0.1):
        decoded = in_batches(lambda z: vae.decode(z / scale).sample, latents + noise * torch.randn_like(latents))
        psnr = 10 * math.log10(4 / (images - decoded.clamp(-1, 1)).square().mean().item())
        print(f"{size:4d} px, latent noise {noise:4.2f}: PSNR {psnr:.2f} dB")


def estimated_seconds(vae: AutoencoderKL, small: Tensor, large: Tensor, steps: int) -> float:
    """Time of the whole training, from steps of either size on a copy, after as many to warm up."""
    for _ in range(2):
        start = time.perf_counter()
        train(copy.deepcopy(vae), small, large, range(1, LARGE_EVERY + 1), steps)
    return (time.perf_counter() - start) * steps / LARGE_EVERY


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    files.check_folder(args.out, "--out")
    torch.set_num_threads(1)  # another number, other last bits
    torch.manual_seed(0)
    small, large, vae = load_images(64), load_images(128), build_vae()
    if args.dry_run:
        length = monitor.format_seconds(estimated_seconds(vae, small, large, args.steps))
        print(f"dry run: would train for {args.steps} steps, about {length}, and save the model in {args.out}")
        return
    log = train(vae, small, large, range(1, args.steps + 1), args.steps)
    vae.eval()
    standardize(vae, small)
    vae.register_to_config(scaling_factor=1 / sample_latents(vae, small).std().item())
    vae.save_pretrained(args.out)
    files.write_text(args.out / "losses.csv", "\n".join(["step,size,mse,kl", *log, ""]))
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters, scaling_factor {vae.config.scaling_factor:.4f}")
    for grey in (small, large):
        report(vae, grey)


if __name__ == "__main__":
    main()
