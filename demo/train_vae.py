"""Train the demo's AutoencoderKL on scikit-learn's handwritten digits and save it in diffusers' format.

Run from the repository root: python -m demo.train_vae
"""

import argparse
import copy
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from demo.digits import enlarged_digits
from runtime import files, options
from runtime.monitor import REPOSITORY, format_seconds
from runtime.options import UserError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; the defaults are what made the shipped file."""
    parser = options.Parser(description=__doc__.splitlines()[0])
    add, count = parser.add_argument, options.count
    add("--out", type=Path, default=REPOSITORY / "assets" / "demo_vae", help="folder to save the model in")
    add("--channels", type=count, nargs=4, default=[4, 8, 16, 32], help="per resolution, finest first")
    add("--steps", type=count, default=1500, help="training steps")
    add("--batch-size", type=options.number(int, 4), default=16, help="64 x 64 images per step; a quarter at 128 x 128")
    add("--large-every", type=count, default=5, help="every so many steps the images are 128 x 128")
    add("--lr", type=options.positive, default=3e-3, help="peak learning rate, decayed to 0 by a half cosine")
    add("--warmup-steps", type=options.non_negative_int, default=100, help="steps of linear warm-up")
    add("--kl-weight", type=options.non_negative, default=3e-5, help="weight of the KL per latent value")
    add("--jitter", type=options.fraction, default=0.2, help="largest random loss of contrast, as a fraction")
    add("--ema-decay", type=options.number(float, 0, 1, open_high=True), default=0.99, help="of the averaged weights")
    add("--log-every", type=count, default=50, help="steps")
    add("--seed", type=options.seed, default=0, help="of weights, batches and noise")
    add("--threads", type=count, default=1, help="CPU threads; another number, other last bits")
    options.add_dry_run(parser)
    args = parser.parse_args(argv)
    if args.warmup_steps >= args.steps:
        raise UserError(f"--warmup-steps {args.warmup_steps} is not less than --steps {args.steps}; lower it")
    return args


def load_images(size: int) -> torch.Tensor:
    """The demo's digits, in scikit-learn's order: (1797, 1, size, size) uint8, one grey channel."""
    images, _ = enlarged_digits(size)
    return torch.from_numpy(np.stack([np.asarray(image.convert("L")) for image in images]))[:, None]


def to_rgb(grey: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) uint8 -> (N, 3, H, W) float32 in [-1, 1]."""
    return (grey.float() / 127.5 - 1).expand(-1, 3, -1, -1)


def jitter_contrast(images: torch.Tensor, jitter: float) -> torch.Tensor:
    """Shrink each image's range of values by up to `jitter` and shift it anywhere that stays within [-1, 1]."""
    loss = jitter * torch.rand(len(images), 1, 1, 1)
    shift = loss * (2 * torch.rand(len(images), 1, 1, 1) - 1)
    return images * (1 - loss) + shift


def build_vae(channels: list[int]) -> AutoencoderKL:
    """An AutoencoderKL that is thin where images are large: 8x down, 4 latent channels, no attention."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
    )


def losses(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error per pixel value, and KL to the unit Gaussian per latent value, in nats.

    One number per cell describes a digit: with a large weight of the KL, three of the four channels would become
    pure noise.
    """
    posterior = vae.encode(images).latent_dist
    reconstruction = vae.decode(posterior.sample()).sample
    mse = (reconstruction - images).square().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return mse, kl


def lr_factor(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a half cosine to 0 at the last step."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    return 0.5 + 0.5 * math.cos(math.pi * (step - args.warmup_steps) / (args.steps - args.warmup_steps))


def train(vae: AutoencoderKL, small: torch.Tensor, large: torch.Tensor, args: argparse.Namespace) -> list[dict]:
    """Train `vae` in place, leave it with the averaged weights, and return the logged losses."""
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(args.ema_decay))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, args))
    log = []
    progress = tqdm(range(1, args.steps + 1), unit="step", disable=None)
    for step in progress:
        grey, count = (large, args.batch_size // 4) if step % args.large_every == 0 else (small, args.batch_size)
        images = jitter_contrast(to_rgb(grey[torch.randint(len(grey), (count,))]), args.jitter)
        mse, kl = losses(vae, images)
        optimizer.zero_grad()
        (mse + args.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(vae)
        if step % args.log_every == 0 or step == args.steps:
            log.append({"step": step, "size": grey.shape[-1], "mse": f"{mse.item():.6f}", "kl": f"{kl.item():.4f}"})
            progress.set_postfix(mse=log[-1]["mse"], kl=log[-1]["kl"])
    vae.load_state_dict(average.module.state_dict())
    return log


@torch.no_grad()
def in_batches(function: Callable, inputs: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Apply `function` to `inputs` batch by batch and concatenate the results."""
    return torch.cat([function(batch) for batch in inputs.split(batch_size)])


def sample_latents(vae: AutoencoderKL, grey: torch.Tensor) -> torch.Tensor:
    """One posterior sample per image, unscaled: (N, 1, H, W) uint8 -> (N, 4, H/8, W/8)."""
    return in_batches(lambda batch: vae.encode(to_rgb(batch)).latent_dist.sample(), grey)


@torch.no_grad()
def standardize(vae: AutoencoderKL, grey: torch.Tensor) -> None:
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


def psnr(images: torch.Tensor, others: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all images with values in [-1, 1]."""
    return 10 * math.log10(4 / (images - others).square().mean().item())


def agreement(images: torch.Tensor, others: torch.Tensor) -> float:
    """Fraction of images that a 3-nearest-neighbour classifier labels the same in both versions.

    It sees grey values box-reduced to 8 x 8 and never the image in question: each half of the data is
    classified by its neighbours in the other half.
    """
    labels = load_digits().target
    features, changed = (
        torch.nn.functional.adaptive_avg_pool2d(version.mean(1), 8).flatten(1).numpy() for version in (images, others)
    )
    same = []
    for half in (0, 1):
        knn = KNeighborsClassifier(3).fit(features[1 - half :: 2], labels[1 - half :: 2])
        same.append(knn.predict(features[half::2]) == knn.predict(changed[half::2]))
    return float(np.concatenate(same).mean())


def report_quality(vae: AutoencoderKL, grey: torch.Tensor) -> None:
    """Print how well images of one size come back from posterior samples, bare and with noise added to them."""
    scale = vae.config.scaling_factor
    images, latents = to_rgb(grey), sample_latents(vae, grey) * scale
    for noise in (0.0, 0.05, 0.1):
        decoded = in_batches(
            lambda z, noise=noise: vae.decode((z + noise * torch.randn_like(z)) / scale).sample, latents
        )
        print(
            f"{grey.shape[-1]:4d} px, latent noise {noise:4.2f}: PSNR {psnr(images, decoded.clamp(-1, 1)):.2f} dB, "
            f"3-NN agreement {100 * agreement(images, decoded.clamp(-1, 1)):.2f} %, "
            f"decoder output {decoded.min():.3f} to {decoded.max():.3f}"
        )


def report_latents(vae: AutoencoderKL, grey: torch.Tensor) -> None:
    """Print the statistics of each latent channel after scaling, over one posterior sample per image."""
    scale = vae.config.scaling_factor
    latents = (sample_latents(vae, grey) * scale).transpose(0, 1).flatten(1)  # (4, N * h * w)
    posterior_std = in_batches(lambda batch: vae.encode(to_rgb(batch)).latent_dist.std, grey).mean((0, 2, 3)) * scale
    centred = latents - latents.mean(1, keepdim=True)
    skewness = centred.pow(3).mean(1) / latents.std(1).pow(3)
    kurtosis = centred.pow(4).mean(1) / latents.std(1).pow(4)
    for name, values in {
        "mean": latents.mean(1),
        "std": latents.std(1),
        "skewness": skewness,
        "kurtosis": kurtosis,
        "smallest": latents.amin(1),
        "largest": latents.amax(1),
        "posterior std": posterior_std,
    }.items():
        print(f"{grey.shape[-1]:4d} px, latent {name:13s}: " + "  ".join(f"{value:6.3f}" for value in values))


@torch.no_grad()
def milliseconds(function: Callable, inputs: torch.Tensor, repeats: int = 10) -> float:
    """Median time of one call, in ms, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function(inputs)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[1:]))


def report_speed(vae: AutoencoderKL, grey: torch.Tensor) -> None:
    """Print the time to encode and to decode a batch of 64 images."""
    images = to_rgb(grey[:64]).contiguous()
    latents = sample_latents(vae, grey[:64])
    print(
        f"{grey.shape[-1]:4d} px, batch of 64 on {torch.get_num_threads()} threads: "
        f"encode {milliseconds(vae.encode, images):.0f} ms, decode {milliseconds(vae.decode, latents):.0f} ms"
    )


def estimated_seconds(vae: AutoencoderKL, small: torch.Tensor, large: torch.Tensor, args: argparse.Namespace) -> float:
    """Time of the whole training, from two rounds of steps of either size on a copy; the first round warms up."""
    tried = argparse.Namespace(**vars(args) | {"steps": args.large_every, "warmup_steps": args.large_every + 1})
    for _ in range(2):
        start = time.perf_counter()
        train(copy.deepcopy(vae), small, large, tried)
    return (time.perf_counter() - start) * args.steps / args.large_every


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    files.check_folder(args.out, "--out")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    small, large = load_images(64), load_images(128)

    vae = build_vae(args.channels)
    print(f"{sum(p.numel() for p in vae.parameters()):,} parameters")
    if args.dry_run:
        seconds = estimated_seconds(vae, small, large, args)
        length = format_seconds(seconds)
        print(f"dry run: would train for {args.steps} steps, about {length}, and save the model in {args.out}")
        return
    start = time.perf_counter()
    log = train(vae, small, large, args)
    print(f"trained in {time.perf_counter() - start:.0f} s")

    vae.eval()
    standardize(vae, small)
    vae.register_to_config(scaling_factor=1 / sample_latents(vae, small).std().item())
    vae.save_pretrained(args.out)
    with open(args.out / "losses.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, log[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)

    print(f"scaling_factor {vae.config.scaling_factor:.4f}")
    for grey in (small, large):
        report_quality(vae, grey)
        report_latents(vae, grey)
        report_speed(vae, grey)


if __name__ == "__main__":
    main()
