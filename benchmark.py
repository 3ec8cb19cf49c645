"""Measure speed and memory: position encodings, precisions, cached latents, tokens, samplers, packing.

The variants of a part alternate in one process, one measurement of each a round, so that a slower minute of the
machine meets all of them alike. Times are medians with their quartiles.
"""

import argparse
import copy
import json
import math
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion import create_diffusion
from models import DiT, ModelConfig
from rope import RopeConfig
from runtime import data, distributed, monitor, options, sampling
from runtime.options import UserError
from runtime.sampling import SamplingConfig, autocast
from runtime.vae import VAE, sample_latents

# "none" is the RoPE model with queries and keys left unrotated.
ENCODINGS = {"none": RopeConfig(), "sincos": None, "axial": RopeConfig(), "spiral": RopeConfig(rotate=4)}
IMAGENET, EPOCHS = 1_281_167, 80  # the default job of run_all.sh
SD_VAE = dict(  # the shape of Stable Diffusion's autoencoder
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    latent_channels=4,
)
QUICK = dict(
    model="DiT-XS/2",
    latents_model="DiT-XS/4",
    image_size=64,
    batch_size=2,
    tokens=[16, 64],
    tokens_batch_size=2,
    sampling_steps=[6, 4, 2],
    sampling_batch_size=2,
    npz_images=[20, 60],
    repeats=2,
    long_repeats=1,
    warmup=1,
    compile=False,  # which takes longest
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = options.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help="what to measure")
    add("--out", type=Path, default=Path("benchmark.json"), help="results; parts that it already holds are kept")
    add("--markdown", type=Path, default=None, help="file whose marked blocks get the tables (None: no such file)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one, else the CPU")
    add("--precisions", nargs="+", choices=["fp32", "bf16"], default=None, help="None: fp32, and bf16 where native")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="measure compiled steps too")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 for float32 products on CUDA")
    add("--quick", action="store_true", help="sizes for a smoke run; their numbers mean nothing")
    sizes = parser.add_argument_group("sizes")
    add = sizes.add_argument
    add("--model", type=options.model_name, default="DiT-S/2", help="model of every part but latents")
    add("--latents-model", type=options.model_name, default="DiT-B/4", help="model of the part latents")
    add("--image-size", type=options.count, default=256, help="height and width in pixels; latents have an eighth")
    add("--batch-size", type=options.count, default=8, help="images a training step")
    add("--tokens", type=options.count, nargs="+", default=[64, 256, 1024, 4096], help="square numbers of patches")
    add("--tokens-batch-size", type=options.count, default=2, help="images a training step in the part tokens")
    add("--sampling-steps", type=options.count, nargs=3, default=[250, 50, 20], help="of ddpm, ddim and dpm++")
    add("--sampling-batch-size", type=options.count, default=2, help="images sampled at a time")
    add("--npz-images", type=options.count, nargs=2, default=[1000, 5000], help="images packed into an .npz")
    add("--vae", default=None, help="autoencoder to measure (None: Stable Diffusion's shape with random weights)")
    add("--num-workers", type=options.non_negative_int, default=2, help="data-loading processes")
    rounds = parser.add_argument_group("measurements")
    add = rounds.add_argument
    add("--repeats", type=options.count, default=9, help="rounds of the parts peak, position, precision and memory")
    add("--long-repeats", type=options.count, default=3, help="rounds of the parts latents, tokens and sampling")
    add("--warmup", type=options.count, default=2, help="rounds before the first that counts (long ones: 1)")
    add("--calls", type=options.count, default=None, help="calls a measurement (None: 1 on the CPU, 10 on CUDA)")
    argv = sys.argv[1:] if argv is None else argv
    if "--quick" in argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise UserError for what could not be measured or written."""
    for name in ("model", "latents_model"):
        options.check_image_size((args.image_size, args.image_size), 8, int(getattr(args, name).split("/")[1]))
    for tokens in args.tokens:
        if math.isqrt(tokens) ** 2 != tokens:
            raise UserError(f"--tokens {tokens} is not a square number; expected such as 64, 256, 1024")
    for path in filter(None, (args.out, args.markdown)):
        if not path.absolute().parent.is_dir():
            raise UserError(f"folder {str(path.absolute().parent)!r} does not exist; make it, or choose another")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no GPU; leave --device out")
    if args.markdown is not None and args.markdown.exists():
        text = args.markdown.read_text(encoding="utf-8")
        for name in ("targets", *args.parts):
            if not block(name).search(text):
                raise UserError(f"--markdown {str(args.markdown)!r} has no block <!-- {name} --> ... <!-- /{name} -->")


# Timing


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(variants: dict[str, Callable], rounds: int, warmup: int, calls: int, device, title: str) -> dict:
    """Seconds a call, {variant: one entry a round}; every round measures each variant once, in rotating order."""
    names, seconds = list(variants), {name: [] for name in variants}
    with monitor.progress_bar((warmup + rounds) * len(names), unit="call", description=title) as bar:
        for k in range(warmup + rounds):
            first = k % len(names)
            for name in names[first:] + names[:first]:
                synchronize(device)
                began = time.perf_counter()
                for _ in range(calls):
                    variants[name]()
                synchronize(device)
                if k >= warmup:
                    seconds[name].append((time.perf_counter() - began) / calls)
                bar.update()
    return seconds


def spread(values: list[float], scale: float = 1) -> dict:
    """Median and quartiles, times scale."""
    low, median, high = np.quantile(np.array(values) * scale, [0.25, 0.5, 0.75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def milliseconds(seconds: list[float]) -> dict:
    return spread(seconds, 1000)


def rate(count: int, seconds: list[float]) -> float:
    """Images per second, at the median."""
    return count / float(np.median(seconds))


def ratio(seconds: list[float], reference: list[float]) -> float:
    """Median over median."""
    return float(np.median(seconds) / np.median(reference))


def table(title: str, rows: list[dict]) -> dict:
    return {"title": title, "rows": rows}


def target(text: str, measured: str, met: bool) -> dict:
    return {"target": text, "measured": measured, "met": "yes" if met else "no"}


# What is measured


class Unrotated(nn.Module):
    """In place of a model's rotary embedding: attention gets queries and keys as they are."""

    def forward(self, h: int, w: int) -> tuple[None, None]:
        return None, None


def build_model(name: str, latent_size: int, encoding: str = "spiral") -> DiT:
    model = ModelConfig(model=name, input_size=(latent_size, latent_size), rope=ENCODINGS[encoding]).build()
    if encoding == "none":
        model.rope_embedder = Unrotated()
    return model


def step_flops(model: DiT) -> float:
    """Operations of a training step for one image: matrix products, forward x 3, a multiply-add counted as two."""
    n, d, p = math.prod(model.grid), model.x_embedder.proj.out_channels, model.patch_size
    block = 24 * n * d**2 + 4 * n**2 * d + 12 * d**2  # qkv, projection and MLP; attention; modulation
    ends = 2 * n * d * p**2 * (model.in_channels + model.out_channels) + 4 * d**2 + 2 * (256 * d + d**2)
    return 3 * (len(model.blocks) * block + ends)


class TrainingStep:
    """One update as train.py makes it from one micro-batch: latents, loss, backward pass, gradient norm, watch for
    non-finite steps, AdamW, average of the weights. tests/test_benchmark.py compares its operations with train.py's.
    """

    def __init__(self, model: DiT, device: torch.device, precision: str = "fp32", vae: VAE | None = None):
        self.model = model.to(device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.device, self.precision, self.vae = device, precision, vae
        self.scaling_factor, self.shift_factor = (vae.scaling_factor, vae.shift_factor) if vae else (0.18215, 0.0)
        self.parameters, self.ema_parameters = list(self.model.parameters()), list(self.ema.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0, fused=True)
        self.diffusion = create_diffusion(None)
        self.step, self.sums = 0, torch.zeros(4, device=device)
        self.streak = torch.tensor(0, device=device)

    def predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.model(x, t, y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Inference with the averaged weights."""
        with torch.no_grad(), autocast(self.device, self.precision):
            return self.ema(x, t, y)

    def __call__(self, inputs: Tensor, labels: Tensor) -> None:
        """From cached moments (n, 2C, h, w), or with a VAE from images (n, 3, H, W) uint8."""
        self.optimizer.zero_grad(set_to_none=True)
        distributed.seed_step(0, self.step)
        inputs, y = (tensor.to(self.device, non_blocking=True) for tensor in (inputs, labels))
        moments = inputs if self.vae is None else self.vae.encode(inputs)
        x = sample_latents(moments, self.scaling_factor, self.shift_factor)
        t = torch.randint(self.diffusion.num_timesteps, (len(x),), device=self.device)
        loss = self.diffusion.training_losses(self.predict, x, t, {"y": y})["loss"].mean() / 1
        (loss * (1 + 0 * loss.detach())).backward()
        self.update(torch.stack([loss.detach()]).sum())
        self.step += 1

    @torch.no_grad()
    def update(self, loss: Tensor) -> None:
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.parameters])
        finite = torch.isfinite(norm)
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        torch._foreach_lerp_(self.ema_parameters, self.parameters, 1 - 0.9999)
        one, zero = torch.ones_like(norm), torch.zeros_like(norm)
        values = torch.stack([loss, norm, one, zero])
        self.sums += torch.where(finite, values, torch.stack([zero, zero, zero, one]))
        self.streak = torch.where(finite, 0, self.streak + 1)
        if self.device.type == "cuda":
            self.streak.to("cpu", non_blocking=True)
        else:
            int(self.streak)


def random_batch(batch: int, latent_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cached moments (n, 8, h, w) float16 and labels (n,)."""
    moments = torch.rand(batch, 8, latent_size, latent_size).half()
    return moments.to(device), torch.randint(1000, (batch,)).to(device)


def products(precision: str, device: torch.device) -> dict[str, Callable]:
    """Square matrix products, by name; larger ones on a GPU, which small ones do not fill."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    variants = {}
    for n in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
        variants[f"{precision} {n}³"] = partial(torch.mm, a, b, out=out)
    return variants


def product_flops(name: str) -> float:
    """Operations of a product, from its name."""
    return 2 * int(name.split()[1].removesuffix("³")) ** 3


def peak_flops(seconds: dict, precision: str) -> float:
    """Operations a second of the fastest product in this precision."""
    measured = [name for name in seconds if name.startswith(precision) and name.endswith("³")]
    return max(product_flops(name) / float(np.median(seconds[name])) for name in measured)


# Parts


def measure_peak(args, device) -> tuple[list, list]:
    """Matrix products of two square matrices: the peak that other parts are compared with."""
    variants = {}
    for precision in args.precisions:
        variants |= products(precision, device)
    seconds = alternate(variants, args.repeats, args.warmup, args.calls, device, "peak")
    rows = [
        {"product": name, "ms": milliseconds(times), "GFLOP/s": product_flops(name) / float(np.median(times)) / 1e9}
        for name, times in seconds.items()
    ]
    return [table("Matrix products", rows)], []


def measure_position(args, device) -> tuple[list, list]:
    """Training step and inference of one model with each position encoding."""
    rows, targets = [], []
    latent = args.image_size // 8
    batch = random_batch(args.batch_size, latent, device)
    x, t = torch.randn(args.batch_size, 4, latent, latent, device=device), torch.full((args.batch_size,), 500)
    for precision in args.precisions:
        variants = {}
        for name in ENCODINGS:
            step = TrainingStep(build_model(args.model, latent, name), device, precision)
            variants[f"{name} step"] = partial(step, *batch)
            variants[f"{name} forward"] = partial(step.forward, x, t.to(device), batch[1])
        seconds = alternate(variants, args.repeats, args.warmup, args.calls, device, f"position {precision}")
        for name in ENCODINGS:
            row = {"precision": precision, "encoding": name}
            for kind in ("step", "forward"):
                times = seconds[f"{name} {kind}"]
                row |= {f"{kind}, ms": milliseconds(times), f"{kind}, images/s": rate(args.batch_size, times)}
                row[f"{kind} / none"] = ratio(times, seconds[f"none {kind}"])
            rows.append(row)
        for kind in ("step", "forward"):
            found = row[f"{kind} / none"]
            text = f"{kind} with Spiral RoPE, {precision}: at most 1.03 x without position encoding in attention"
            targets.append(target(text, f"{found:.3f} x", found <= 1.03))
    title = f"{args.model}, {tokens_of(args.model, args.image_size)} tokens, batch {args.batch_size}"
    return [table(title, rows)], targets


def tokens_of(model: str, image_size: int) -> int:
    return (image_size // 8 // int(model.split("/")[1])) ** 2


def measure_precision(args, device) -> tuple[list, list]:
    """Training step by precision, plain and compiled, as a share of the peak measured in the same rounds."""
    latent = args.image_size // 8
    batch, variants = random_batch(args.batch_size, latent, device), {}
    for precision in args.precisions:
        variants |= products(precision, device)
        for compiled in [False, True] if args.compile else [False]:
            step = TrainingStep(build_model(args.model, latent), device, precision)
            if compiled:
                step.model.compile()
            variants[f"{precision}{' compiled' if compiled else ''}"] = partial(step, *batch)
    flops = step_flops(step.model) * args.batch_size
    seconds = alternate(variants, args.repeats, args.warmup, args.calls, device, "precision")
    steps = {name: times for name, times in seconds.items() if not name.endswith("³")}
    rows = []
    for name, times in steps.items():
        speed = flops / float(np.median(times))
        rows.append(
            {"variant": name, "step, ms": milliseconds(times), "images/s": rate(args.batch_size, times)}
            | {"speed-up": ratio(seconds[args.precisions[0]], times), "GFLOP/s": speed / 1e9}
            | {"share of peak": speed / peak_flops(seconds, name.split()[0])}
        )
    peaks = [
        {"precision": precision, "peak, GFLOP/s": peak_flops(seconds, precision) / 1e9} for precision in args.precisions
    ]
    title = f"{args.model}, Spiral RoPE, batch {args.batch_size}, {flops / args.batch_size / 1e9:.1f} GFLOP an image"
    return [table(title, rows), table("Peak in the same rounds", peaks)], precision_targets(rows)


def precision_targets(rows: list[dict]) -> list[dict]:
    """What the step has to reach, by the better of plain and compiled."""
    targets, found = [], {row["variant"]: row for row in rows}
    for precision, least in (("fp32", 0.75), ("bf16", 0.62)):
        shares = {name: row["share of peak"] for name, row in found.items() if name.startswith(precision)}
        if shares:
            text = f"{precision} step: at least {least:.0%} of the peak of matrix products"
            listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            targets.append(target(text, listed, max(shares.values()) >= least))
    gains = {}
    for mode in ("", " compiled"):
        if f"fp32{mode}" in found and f"bf16{mode}" in found:
            slow, fast = (found[f"{precision}{mode}"]["step, ms"]["median"] for precision in ("fp32", "bf16"))
            gains["compiled" if mode else "plain"] = slow / fast
    if gains:
        listed = ", ".join(f"{mode} {gain:.2f} x" for mode, gain in gains.items())
        targets.append(target("bf16 step: at least 1.7 x as fast as fp32", listed, max(gains.values()) >= 1.7))
    return targets


def make_vae(folder: Path, **shape) -> str:
    """Save an AutoencoderKL with random weights and return its path."""
    from diffusers import AutoencoderKL

    AutoencoderKL(**shape).save_pretrained(folder)
    return str(folder)


def write_images(folder: Path, count: int, size: tuple[int, int], suffix: str) -> list[Path]:
    """Smooth random images (width, height) of two classes."""
    random, paths = np.random.default_rng(0), []
    for index in range(count):
        path = folder / str(index % 2) / f"{index:04d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


def write_cache(folder: Path, count: int, latent_size: int, channels: int) -> None:
    """A latent cache of random moments, as cache_latents.py lays it out."""
    shape = (count, 2, 2 * channels, latent_size, latent_size)
    folder.mkdir()
    np.save(folder / "moments.npy", np.random.default_rng(0).random(shape, dtype=np.float32).astype(np.float16))
    np.save(folder / "labels.npy", np.arange(count) % 2)
    monitor.write_json(folder / "meta.json", {"classes": ["0", "1"], "fingerprint": "", "shape": list(shape)})


def measure_latents(args, device) -> tuple[list, list]:
    """End-to-end training steps that read and encode images, against steps on cached latents."""
    rows, jobs, targets, batch = [], [], [], args.batch_size
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        vae = VAE(args.vae or make_vae(root / "vae", **SD_VAE), device)
        count, latent = 8 * batch, args.image_size // vae.downsampling
        write_images(root / "images", count, (500, 375), "jpg")  # near ImageNet's average size
        write_cache(root / "latents", count, latent, vae.latent_channels)
        size = (args.image_size, args.image_size)
        online = data.ImageData(data.ImageList(root / "images"), size, True, 0)
        cached = data.LatentData(data.LatentCache(root / "latents"), True, 0)
        pixels = torch.randint(256, (batch, 3, *size), dtype=torch.uint8, device=device)
        variants = {"encoding": partial(vae.encode, pixels)}
        for precision in args.precisions:
            for name, dataset, encoder in (("online", online, vae), ("cached", cached, None)):
                batches = data.EpochBatches(count, batch, 0)
                loader = stack.enter_context(data.open_loader(dataset, batches, args.num_workers, device))
                step = TrainingStep(build_model(args.latents_model, latent), device, precision, encoder)
                variants[f"{name} {precision}"] = partial(next_step, step, loader)
        seconds = alternate(variants, args.long_repeats, 1, args.calls, device, "latents")
    caching = 2 * IMAGENET / rate(batch, seconds["encoding"]) / 3600
    for precision, least in (("fp32", 7), ("bf16", 6)):
        if precision not in args.precisions:
            continue
        times = {name: seconds[f"{name} {precision}"] for name in ("online", "cached")}
        gain = ratio(times["online"], times["cached"])
        for name in times:
            row = {"precision": precision, "latents": name, "step, ms": milliseconds(times[name])}
            rows.append(row | {"images/s": rate(batch, times[name]), "speed-up": ratio(times["online"], times[name])})
        hours = {name: EPOCHS * IMAGENET / rate(batch, times[name]) / 3600 for name in times}
        whole = hours["cached"] + caching
        jobs.append(
            {"precision": precision, "online, h": hours["online"], "caching, h": caching}
            | {"training on the cache, h": hours["cached"], "speed-up with caching": hours["online"] / whole}
        )
        text = f"{args.latents_model} step on cached latents, {precision}: at least {least} x as fast as online"
        targets.append(target(text, f"{gain:.2f} x", gain >= least))
    title = f"{args.latents_model}, {args.image_size}² images, batch {batch}, loading included"
    job = f"{EPOCHS} epochs of ImageNet on this machine alone, computed from the medians above and the time to encode"
    return [table(title, rows), table(job, jobs)], targets


def next_step(step: TrainingStep, loader: Iterator) -> None:
    step(*next(loader))


# Memory, in a fresh process each time


def in_child(function: Callable, *args):
    """Call function in a new process, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def resident_bytes(peak: bool) -> int:
    """Resident memory of this process, now or at most since reset_peak; where /proc is missing, the peak for both."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's memory at the time of the fork
        return 1024 * int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status.read_text())[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak_of_steps(
    model: str, latent_size: int, batch: int, device: str, precision: str, checkpointing: bool, threads: int
) -> int:
    """Bytes that two training steps need: on CUDA as its allocator counts, else resident memory beyond the imports."""
    device = torch.device(device)
    torch.set_num_threads(threads)
    reset_peak()
    before = resident_bytes(peak=False)
    step = TrainingStep(build_model(model, latent_size), device, precision)
    step.model.grad_checkpointing = checkpointing
    for _ in range(2):
        step(*random_batch(batch, latent_size, device))
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes(peak=True) - before


def step_memory(args, device, latent_size: int, batch: int, checkpointing: bool = False) -> int:
    """peak_of_steps of the benchmark's model, in a child."""
    settings = (args.model, latent_size, batch, str(device), args.precisions[-1], checkpointing)
    return in_child(peak_of_steps, *settings, torch.get_num_threads())


def measure_memory(args, device) -> tuple[list, list]:
    """Peak memory and time of a training step with and without gradient checkpointing."""
    latent, rows, variants = args.image_size // 8, [], {}
    batch = random_batch(args.batch_size, latent, device)
    peaks = {}
    for checkpointing in (False, True):
        name = "checkpointing" if checkpointing else "plain"
        peaks[name] = step_memory(args, device, latent, args.batch_size, checkpointing)
        step = TrainingStep(build_model(args.model, latent), device, args.precisions[-1])
        step.model.grad_checkpointing = checkpointing
        variants[name] = partial(step, *batch)
    seconds = alternate(variants, args.repeats, args.warmup, args.calls, device, "memory")
    for name, times in seconds.items():
        row = {"variant": name, "peak memory, MB": peaks[name] / 1e6, "memory / plain": peaks[name] / peaks["plain"]}
        rows.append(row | {"step, ms": milliseconds(times), "time / plain": ratio(times, seconds["plain"])})
    return [table(f"{args.model}, batch {args.batch_size}, {args.precisions[-1]}", rows)], []


def measure_tokens(args, device) -> tuple[list, list]:
    """How step time and memory grow with the number of tokens."""
    patch, batch = int(args.model.split("/")[1]), args.tokens_batch_size
    latents = {tokens: math.isqrt(tokens) * patch for tokens in sorted(args.tokens)}
    peaks = {tokens: step_memory(args, device, latent, batch) for tokens, latent in latents.items()}
    variants = {}
    for tokens, latent in latents.items():
        step = TrainingStep(build_model(args.model, latent), device, args.precisions[-1])
        variants[tokens] = partial(step, *random_batch(batch, latent, device))
    heads = step.model.blocks[0].attn.num_heads
    seconds = alternate(variants, args.long_repeats, 1, args.calls, device, "tokens")
    rows, previous = [], None
    for tokens, times in seconds.items():
        row = {"tokens": tokens, "step, ms": milliseconds(times), "peak memory, MB": peaks[tokens] / 1e6}
        row["ms a 1,000 tokens"] = float(np.median(times)) * 1e6 / (tokens * batch)
        added = (peaks[tokens] - peaks[previous]) / (tokens - previous) / batch / 1e3 if previous else None
        row["memory a token added, kB"] = added
        row["N x N matrices of one block, MB"] = 4 * heads * batch * tokens**2 / 1e6
        rows.append(row)
        previous = tokens
    targets = []
    if len(rows) > 2:
        before, last = (row["memory a token added, kB"] for row in rows[-2:])
        text = f"memory at {previous} tokens grows linearly: a token costs at most 1.1 x what it cost before"
        targets.append(target(text, f"{last:.0f} kB after {before:.0f} kB", last <= 1.1 * before))
    return [table(f"{args.model}, Spiral RoPE, batch {batch}, {args.precisions[-1]}", rows)], targets


def measure_sampling(args, device) -> tuple[list, list]:
    """Images a second of every sampler, without decoding, and of decoding alone."""
    latent, count, precision = args.image_size // 8, args.sampling_batch_size, args.precisions[-1]
    model = build_model(args.model, latent).to(device).eval()
    rows_seen = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: rows_seen.append(len(inputs[0])))
    cases = [(name, steps, "on") for name, steps in zip(sampling.SAMPLERS, args.sampling_steps, strict=True)]
    cases += [(*cases[-1][:2], guidance) for guidance in ("0.25 to 0.75", "off")]
    variants, model_rows = {}, {}
    for case in cases:
        sampler, steps, guidance = case
        interval = (0.25, 0.75) if guidance.startswith("0") else (0.0, 1.0)
        scale = 1.0 if guidance == "off" else 1.5
        config = SamplingConfig(sampler=sampler, steps=steps, cfg_scale=scale, guidance_interval=interval)
        images, shape = list(range(count)), (4, latent, latent)
        variants[case] = partial(sampling.sample_latents, model, config, images, images, shape, device, precision)
    with tempfile.TemporaryDirectory() as folder:
        vae = VAE(args.vae or make_vae(Path(folder) / "vae", **SD_VAE), device)
    latents = torch.randn(count, vae.latent_channels, latent, latent, device=device)
    for case, sample in variants.items():  # which warms up as well
        rows_seen.clear()
        sample()
        model_rows[case] = sum(rows_seen) / count
    variants["decode"] = partial(vae.decode, latents)
    seconds = alternate(variants, args.long_repeats, 0, 1, device, "sampling")
    rows = []
    for case in cases:
        row = dict(zip(("sampler", "steps", "guidance"), case, strict=True))
        row |= {"model rows an image": model_rows[case], "batch, s": spread(seconds[case])}
        rows.append(row | {"images/s": rate(count, seconds[case])})
    decoding = {"batch, s": spread(seconds["decode"]), "images/s": rate(count, seconds["decode"])}
    title = f"{args.model}, {args.image_size}², {count} images at a time, {precision}, without decoding"
    return [table(title, rows), table("Decoding of the same images, fp32", [decoding])], []


def peak_of_command(script: str, argv: list[str]) -> tuple[int, int]:
    """Resident memory that a command adds at most to this process, and this process's at its start, in bytes."""
    reset_peak()
    before = resident_bytes(peak=False)
    sys.argv = [script, *argv]
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
        runpy.run_path(script, run_name="__main__")
    return resident_bytes(peak=True) - before, before


def measure_npz(args, device) -> tuple[list, list]:
    """Peak memory of sample_ddp.py where all images are there and it packs them into the .npz."""
    script, rows = str(monitor.REPOSITORY / "sample_ddp.py"), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = write_images(root / "images", 16, (args.image_size, args.image_size), "png")
        model = root / f"DiT-XS-2-{args.image_size}x{args.image_size}.pt"
        torch.save(build_model("DiT-XS/2", args.image_size // 8, "sincos").state_dict(), model)
        small = SD_VAE | {"block_out_channels": [4, 4, 8, 8], "layers_per_block": 1, "norm_num_groups": 2}
        argv = ["--ckpt", str(model), "--vae", make_vae(root / "vae", **small), "--sample-dir", str(root / "samples")]
        name = subprocess.run(
            [sys.executable, script, *argv, "--print-name"], check=True, capture_output=True, text=True
        ).stdout
        packed, made = Path(name.strip()), 0
        samples = packed.with_suffix("")
        samples.mkdir(parents=True)
        for count in (1, *args.npz_images):
            for index in range(made, count):
                os.link(images[index % len(images)], samples / f"{index:06d}.png")
            made = max(made, count)
            added, before = in_child(peak_of_command, script, [*argv, "--num-fid-samples", str(count)])
            size = packed.stat().st_size
            rows.append(
                {"images": count, ".npz, MB": size / 1e6, "added by the command, MB": added / 1e6}
                | {"process, MB": (added + before) / 1e6}
            )
    title = f"sample_ddp.py packing {args.image_size}² PNGs; its model and autoencoder are small"
    return [table(title, rows)], [npz_target(rows)]


def npz_target(rows: list[dict]) -> dict:
    """Whether 50,000 images would stay under 400 MB, growing as from the second row to the third."""
    (few, low), (many, high) = ((row["images"], row["added by the command, MB"]) for row in rows[1:])
    expected = high + (50_000 - many) * max(high - low, 0) / (many - few)
    measured = f"{high:.0f} MB at {many:,}, {low:.0f} MB at {few:,}; {expected:.0f} MB at 50,000 by extrapolation"
    return target(".npz: under 400 MB at 50,000 images, no growth with their number", measured, expected < 400)


def measure_profile(args, device) -> tuple[list, list]:
    """Where the time of a training step goes, by operator."""
    from torch.profiler import ProfilerActivity, profile

    tables, latent = [], args.image_size // 8
    on_gpu = device.type == "cuda"
    for precision in args.precisions:
        step = partial(
            TrainingStep(build_model(args.model, latent), device, precision),
            *random_batch(args.batch_size, latent, device),
        )
        for _ in range(args.warmup):
            step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities) as profiler:
            step()
            synchronize(device)
        attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        times = {event.key: (getattr(event, attribute), event.count) for event in profiler.key_averages()}
        total = sum(microseconds for microseconds, _ in times.values())
        ranked = sorted(times.items(), key=lambda item: -item[1][0])[:15]
        rows = [
            {"operator": f"`{name}`", "calls": count, "self time, ms": spent / 1e3, "share": spent / total}
            for name, (spent, count) in ranked
        ]
        tables.append(table(f"{args.model}, Spiral RoPE, batch {args.batch_size}, {precision}, one step", rows))
    return tables, []


PARTS = {
    "peak": measure_peak,
    "position": measure_position,
    "precision": measure_precision,
    "latents": measure_latents,
    "memory": measure_memory,
    "tokens": measure_tokens,
    "sampling": measure_sampling,
    "npz": measure_npz,
    "profile": measure_profile,
}


# Results


def machine(device: torch.device) -> str:
    """Device, threads and versions, in words."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        name = found[1] if found else platform.processor() or platform.machine()
        name += f" ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    environment = monitor.describe_environment(device)
    versions = ", ".join(f"{package} {environment['versions'][package]}" for package in ("torch", "diffusers"))
    commit = (environment["git_commit"] or "unknown")[:10]
    return f"{device.type}: {name}; Python {platform.python_version()}, {versions}; commit {commit}"


def show(value) -> str:
    """A cell of a table: three digits, and the quartiles of what was measured more than once."""
    if isinstance(value, dict):
        return f"{show(value['median'])} ({show(value['low'])} to {show(value['high'])})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def markdown_table(rows: list[dict]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([show(row[column]) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def describe_part(part: dict) -> str:
    """A part as Markdown: tables, then the machine and the rounds."""
    text = "\n\n".join(f"{entry['title']}:\n\n{markdown_table(entry['rows'])}" for entry in part["tables"])
    return f"{text}\n\n{part['machine']}; {part['rounds']}; took {part['seconds']:.0f} s."


def block(name: str) -> re.Pattern:
    return re.compile(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", re.DOTALL)


def write_markdown(path: Path, parts: dict) -> None:
    """Put the tables between the markers of an existing file, or make one of nothing but blocks."""
    blocks = {name: describe_part(part) for name, part in parts.items()}
    targets = [row for part in parts.values() for row in part["targets"]]
    blocks["targets"] = markdown_table(targets) if targets else "No part with a target was measured."
    if path.exists():
        text = path.read_text(encoding="utf-8")
    else:
        text = "\n".join(f"## {name}\n\n<!-- {name} -->\n<!-- /{name} -->\n" for name in ("targets", *PARTS))
    for name, content in blocks.items():
        text = block(name).sub(lambda _: f"<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->", text)  # noqa: B023
    monitor.write_text(path, text)


def describe_rounds(name: str, args: argparse.Namespace) -> str:
    """How often a part measured."""
    if name in ("npz", "profile"):
        return "measured once"
    rounds = args.long_repeats if name in ("latents", "tokens", "sampling") else args.repeats
    return f"medians (quartiles) of {rounds} alternating rounds"


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict:
    """One part, as it is stored."""
    described = machine(device)  # now, because the commit may change while this runs
    torch.manual_seed(0)
    began = time.perf_counter()
    tables, targets = PARTS[name](args, device)
    seconds = time.perf_counter() - began
    rounds = describe_rounds(name, args)
    return {"tables": tables, "targets": targets, "machine": described, "rounds": rounds, "seconds": seconds}


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device("cpu") if args.device == "cpu" else distributed.setup(args.tf32)
    if device.type == "mps":
        device = torch.device("cpu")
    if args.precisions is None:
        native = sampling.resolve_precision("auto", device)
        args.precisions = ["fp32"] if native == "fp32" else ["fp32", "bf16"]
    args.calls = args.calls or (10 if device.type == "cuda" else 1)
    compiler = os.environ.get("CXX", "g++")
    if "precision" in args.parts and args.compile and device.type == "cpu" and not shutil.which(compiler):
        raise UserError(f"compiling on the CPU needs the C++ compiler {compiler!r}; install it, or pass --no-compile")
    parts = monitor.read_json(args.out) if args.out.exists() else {}
    print(f"{machine(device)}; {', '.join(args.precisions)}")
    for name in args.parts:
        parts[name] = measure(name, args, device)
        print(f"\n{name}: {PARTS[name].__doc__}\n\n{describe_part(parts[name])}", flush=True)
        monitor.write_text(args.out, json.dumps(parts, indent=2, ensure_ascii=False) + "\n")
        if args.markdown is not None:
            write_markdown(args.markdown, parts)
    targets = [row for part in parts.values() for row in part["targets"]]
    if targets:
        print(f"\ntargets\n\n{markdown_table(targets)}")
    print(f"\nresults: {args.out}")


if __name__ == "__main__":
    main()
