"""Measure speed and memory: position encodings, precisions, cached latents, tokens, samplers, packing.

Training steps are those of runtime/training.py. The variants of a part alternate in one process, one measurement of
each a round, so that a slower minute of the machine meets all of them alike.
"""

import argparse
import io
import math
import os
import re
import runpy
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion.objectives import OBJECTIVES
from models import ModelConfig
from rope import RopeConfig
from runtime import data, distributed, files, monitor, options, sampling
from runtime.config import DEFAULT_OBJECTIVE, Recipe, VAEConfig
from runtime.estimate import host_peak, timed
from runtime.latents import LatentCache, LatentData
from runtime.options import UserError
from runtime.sampling import SamplingConfig
from runtime.training import Trainer
from runtime.vae import VAE, latents_from

# "none" is the RoPE model with queries and keys left unrotated.
ENCODINGS = {"none": RopeConfig(), "sincos": None, "axial": RopeConfig(), "spiral": RopeConfig(rotate=4)}
SD_VAE = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2)  # the shape of Stable Diffusion's
SMALL_VAE = dict(block_out_channels=[4, 4, 8, 8], layers_per_block=1, norm_num_groups=2)
SIZES = dict(
    model="DiT-S/2",
    latents_model="DiT-B/4",
    image_size=256,
    batch_size=8,
    tokens=[64, 256, 1024, 4096],
    sampling_steps=[250, 50, 20],  # of the objective's samplers
    npz_images=[1, 1000, 5000],
    vae=SD_VAE,
    num_workers=2,
    rounds=5,
    compile=True,
)
QUICK = dict(
    model="DiT-XS/2",
    latents_model="DiT-XS/4",
    image_size=64,
    batch_size=2,
    tokens=[16, 64],
    sampling_steps=[6, 4, 2],
    npz_images=[1, 20, 60],
    vae=SMALL_VAE,
    num_workers=0,
    rounds=2,
    compile=False,  # which takes longest
)

Variant = tuple[str | int, ...]  # its cells in the first columns of a table
Times = dict[Variant, dict[str, float]]  # median and quartiles, in milliseconds
Part = tuple[str, list[dict]]  # title and rows of a table


def build_parser() -> options.Parser:
    parser = options.Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    add("--out", type=Path, default=Path("benchmark.json"), help="results; parts that it already holds are kept")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one, else the CPU")
    add("--precisions", nargs="+", choices=["fp32", "bf16"], default=None, help="None: fp32, and bf16 where native")
    add("--compile", action=argparse.BooleanOptionalAction, help="measure compiled steps too")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 for float32 products on CUDA")
    add("--model", type=options.model_name, help="model of every part but latents and npz")
    add("--latents-model", type=options.model_name, help="model of the part latents")
    add("--image-size", type=options.count, help="height and width in pixels; latents have an eighth")
    add("--batch-size", type=options.count, help="images a training step; a quarter in the parts tokens and sampling")
    add("--rounds", type=options.number(int, 2), help="measurements of each variant")
    add("--quick", action="store_true", help="sizes for a smoke run; their numbers mean nothing")
    options.add_num_workers(parser, "data-loading processes of the part latents")
    options.add_dry_run(parser)
    parser.set_defaults(**SIZES)
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    for name in (args.model, args.latents_model):
        patch = ModelConfig(name).patch_size
        options.check_image_size((args.image_size, args.image_size), VAEConfig.downsampling, patch)
    return args


def prepare(args: argparse.Namespace) -> None:
    """Replace device and precisions by those to measure on. Raises UserError for what this machine cannot do."""
    files.check_output(args.out, ())
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no GPU; leave --device out")
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    args.device = torch.device("cpu") if on_cpu else distributed.setup(args.tf32)
    compiler = os.environ.get("CXX", "g++")
    if "precision" in args.parts and args.compile and on_cpu and not shutil.which(compiler):
        raise UserError(f"compiling on the CPU needs the C++ compiler {compiler!r}; install it, or pass --no-compile")
    native = distributed.resolve_precision("auto", args.device)
    args.precisions = args.precisions or list(dict.fromkeys(["fp32", native]))


def alternate(args: argparse.Namespace, variants: dict[Variant, Callable]) -> Times:
    """Time of a call of each variant; every round measures each of them once, in rotating order."""
    names, milliseconds = list(variants), {name: [] for name in variants}
    calls = 10 if args.device.type == "cuda" else 1  # between two synchronisations
    with monitor.progress_bar((1 + args.rounds) * len(names), unit="measurement") as bar:
        for k in range(1 + args.rounds):
            first = k % len(names)
            for name in names[first:] + names[:first]:
                spent = timed(partial(repeat, variants[name], calls), args.device)
                if k > 0:  # the first one warms up
                    milliseconds[name].append(1000 * spent / calls)
                bar.update()
    return {name: spread(values) for name, values in milliseconds.items()}


def repeat(function: Callable, calls: int) -> None:
    for _ in range(calls):
        function()


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def rate(amount: float, times: dict[str, float]) -> float:
    """Amount per second, at the median."""
    return 1000 * amount / times["median"]


def table(columns: tuple[str, ...], times: Times, images: int, reference: dict[str, str | int]) -> list[dict]:
    """A row a variant: its cells, its time, images a second, and its time over that of the reference.

    reference gives the cells in which the row that a row is compared with differs from it.
    """
    rows, ratio = [], f"time / {' '.join(map(str, reference.values()))}"
    for name, found in times.items():
        cells = dict(zip(columns, name, strict=True))
        compared = times[tuple((cells | reference).values())]
        rows.append(cells | {"ms": found, "images/s": rate(images, found), ratio: found["median"] / compared["median"]})
    return rows


def memory_of(device: torch.device, function: Callable, *args) -> float:
    """Megabytes that a call in a process of its own takes at most: on CUDA of the GPU, else resident ones it adds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_of, device, function, *args).result() / 1e6


def _peak_of(device: torch.device, function: Callable, *args) -> int:
    before = psutil.Process().memory_info().rss
    function(*args)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return host_peak() - before


class Unrotated(nn.Module):
    """In place of a model's rotary embedding: attention gets queries and keys as they are."""

    def forward(self, h: int, w: int) -> tuple[None, None]:
        return None, None


@dataclass(frozen=True)
class Step:
    """A training step of a new model on random latents."""

    model: str
    latent_size: int  # height and width
    batch_size: int
    device: torch.device
    precision: str
    encoding: str = "spiral"
    compiled: bool = False
    grad_checkpointing: bool = False

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(self.model, (self.latent_size, self.latent_size), rope=ENCODINGS[self.encoding])

    def trainer(self, vae: VAE | None = None) -> Trainer:
        """It takes cached moments, or with a VAE images."""
        model, latents = self.config.build(), latents_from(vae.config if vae else VAEConfig(), vae)
        model.grad_checkpointing = self.grad_checkpointing
        if self.encoding == "none":
            model.rope_embedder = Unrotated()
        return Trainer(model, Recipe(), 1, latents, self.device, self.precision, compile_model=self.compiled)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Cached moments (n, 8, h, w) float16 and labels (n,)."""
        moments = torch.rand(self.batch_size, 8, self.latent_size, self.latent_size, device=self.device)
        return moments.half(), torch.randint(1000, (self.batch_size,), device=self.device)

    def call(self) -> Callable:
        return partial(self.trainer().train_step, [self.batch()])

    def flops(self) -> int:
        """Operations for one image: matrix products, forward x 3, a multiply-add counted as two."""
        shape = (1, self.config.in_channels, *self.config.input_size)
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.config.build()(torch.zeros(shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
        return 3 * counter.get_total_flops()


def default_step(args: argparse.Namespace, precision: str | None = None) -> Step:
    latent_size = args.image_size // VAEConfig.downsampling
    return Step(args.model, latent_size, args.batch_size, args.device, precision or args.precisions[-1])


def products(args: argparse.Namespace, precision: str) -> dict[Variant, Callable]:
    """Products of two square matrices; larger ones on a GPU, which small ones do not fill."""
    dtype, variants = torch.bfloat16 if precision == "bf16" else torch.float32, {}
    for n in (4096, 8192) if args.device.type == "cuda" else (1024, 2048):
        a, b, out = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(3))
        variants[precision, n] = partial(torch.mm, a, b, out=out)
    return variants


def save_vae(folder: Path, shape: dict) -> Path:
    """An autoencoder with random weights, which cost the same."""
    from diffusers import AutoencoderKL

    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    AutoencoderKL(latent_channels=4, **blocks, **shape).save_pretrained(folder)
    return folder


def save_images(folder: Path, count: int, size: tuple[int, int], suffix: str) -> list[Path]:
    """Smooth random images (width, height) of one class."""
    random, paths = np.random.default_rng(0), [folder / "class" / f"{index:04d}.{suffix}" for index in range(count)]
    paths[0].parent.mkdir(parents=True)
    for path in paths:
        coarse = Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(path)
    return paths


def run(command: str, *arguments: str | Path) -> str:
    """What a command of this repository prints, run in this process."""
    main = runpy.run_path(str(monitor.REPOSITORY / command))["main"]
    with redirect_stdout(io.StringIO()) as printed:
        main([str(argument) for argument in arguments])
    return printed.getvalue().strip()


def measure_peak(args: argparse.Namespace) -> Part:
    """Products of two square matrices, by their length: the peak that the precisions are compared with."""
    variants = {}
    for precision in args.precisions:
        variants |= products(args, precision)
    rows = [
        {"precision": precision, "length": n, "ms": times, "GFLOP/s": rate(2 * n**3 / 1e9, times)}
        for (precision, n), times in alternate(args, variants).items()
    ]
    return "Matrix products", rows


def measure_position(args: argparse.Namespace) -> Part:
    """Training step and inference (forward) of one model with each position encoding."""
    times = {}
    for precision in args.precisions:
        variants = {}
        for encoding in ENCODINGS:
            step = replace(default_step(args, precision), encoding=encoding)
            trainer, batch = step.trainer(), step.batch()
            variants[precision, encoding, "step"] = partial(trainer.train_step, [batch])
            variants[precision, encoding, "forward"] = partial(infer, trainer, *batch)
        times |= alternate(args, variants)
    rows = table(("precision", "encoding", "pass"), times, args.batch_size, {"encoding": "none"})
    return f"{args.model}, {args.image_size}² pixels, batch {args.batch_size}", rows


@torch.no_grad()
def infer(trainer: Trainer, moments: Tensor, labels: Tensor) -> None:
    """One evaluation of the averaged weights, at the means."""
    with distributed.autocast(trainer.device, trainer.precision):
        trainer.ema(moments.float().chunk(2, dim=1)[0], torch.full_like(labels, 500), labels)


def measure_precision(args: argparse.Namespace) -> Part:
    """Training step by precision, eager and compiled, as a share of the peak measured in the same rounds."""
    steps, peaks = {}, {}
    for precision in args.precisions:
        peaks |= products(args, precision)
        steps[precision, "eager"] = default_step(args, precision)
        if args.compile:
            steps[precision, "compiled"] = replace(default_step(args, precision), compiled=True)
    flops = default_step(args).flops()
    times = alternate(args, peaks | {name: step.call() for name, step in steps.items()})
    reference = {"precision": args.precisions[0], "mode": "eager"}
    rows = table(("precision", "mode"), {name: times[name] for name in steps}, args.batch_size, reference)
    for row in rows:
        peak = max(rate(2 * n**3 / 1e9, times[precision, n]) for precision, n in peaks if precision == row["precision"])
        speed = flops / 1e9 * row["images/s"]
        row |= {"GFLOP/s": speed, "peak, GFLOP/s": peak, "share of peak": speed / peak}
    return f"{args.model}, Spiral RoPE, batch {args.batch_size}, {flops / 1e9:.1f} GFLOP an image", rows


def measure_latents(args: argparse.Namespace) -> Part:
    """Training steps that read and encode images, against steps on cached latents, loading included."""
    batch, size = args.batch_size, (args.image_size, args.image_size)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        save_images(root / "images", 8 * batch, (500, 375), "jpg")  # near ImageNet's average size
        arguments = ["--data-path", root / "images", "--image-size", args.image_size, "--num-workers", 0]
        run("cache_latents.py", *arguments, "--latents-dir", root / "latents", "--vae", save_vae(root / "s", SMALL_VAE))
        vae = VAE(str(save_vae(root / "vae", args.vae)), args.device)
        online = data.ImageData(data.ImageList(root / "images"), size, True, 0)
        cached = LatentData(LatentCache(root / "latents"), True, 0)
        pixels = torch.randint(256, (batch, 3, *size), dtype=torch.uint8, device=args.device)
        variants = {}
        for precision in args.precisions:
            for name, dataset, encoder in (("online", online, vae), ("cached", cached, None)):
                batches = data.EpochBatches(len(dataset), batch, 0)
                loader = stack.enter_context(data.open_loader(dataset, batches, args.num_workers, args.device))
                trainer = replace(default_step(args, precision), model=args.latents_model).trainer(encoder)
                variants[precision, name] = partial(load_and_train, trainer, loader)
            variants[precision, "encoding alone"] = partial(vae.encode, pixels)
        times = alternate(args, variants)
    rows = table(("precision", "latents"), times, batch, {"latents": "online"})
    return f"{args.latents_model}, {args.image_size}² pixels, batch {batch}", rows


def load_and_train(trainer: Trainer, loader) -> None:
    trainer.train_step([next(loader)])


def measure_memory(args: argparse.Namespace) -> Part:
    """Time and peak memory of a training step that keeps its activations, and with gradient checkpointing."""
    step = default_step(args)
    steps = {("kept",): step, ("checkpointed",): replace(step, grad_checkpointing=True)}
    rows = time_and_memory(args, "activations", steps)
    return f"{args.model}, Spiral RoPE, batch {step.batch_size}, {step.precision}", rows


def measure_tokens(args: argparse.Namespace) -> Part:
    """Time and peak memory of a training step by the number of tokens."""
    step, patch, steps = default_step(args), ModelConfig(args.model).patch_size, {}
    batch = max(step.batch_size // 4, 1)
    for tokens in args.tokens:
        steps[(tokens,)] = replace(step, latent_size=math.isqrt(tokens) * patch, batch_size=batch)
    rows = time_and_memory(args, "tokens", steps)
    return f"{args.model}, Spiral RoPE, batch {batch}, {step.precision}", rows


def time_and_memory(args: argparse.Namespace, column: str, steps: dict[Variant, Step]) -> list[dict]:
    """A row a step: its time, and the memory of a process that takes two, of which the first makes the optimizer's."""
    times = alternate(args, {name: step.call() for name, step in steps.items()})
    first, step = next(iter(steps.items()))
    rows = table((column,), times, step.batch_size, {column: first[0]})
    for row, step in zip(rows, steps.values(), strict=True):
        row["peak memory, MB"] = memory_of(args.device, take_two, step)
    return rows


def take_two(step: Step) -> None:
    repeat(step.call(), 2)


def measure_sampling(args: argparse.Namespace) -> Part:
    """Images a second of every sampler, without decoding, and of decoding alone."""
    config, precision = default_step(args).config, args.precisions[-1]
    indices = range(max(args.batch_size // 4, 1))
    labels = [index % config.num_classes for index in indices]
    model, shape = config.build().to(args.device).eval(), (config.in_channels, *config.input_size)
    with tempfile.TemporaryDirectory() as folder:
        vae = VAE(str(save_vae(Path(folder), args.vae)), args.device)
    settings = zip(OBJECTIVES[DEFAULT_OBJECTIVE].samplers, args.sampling_steps, strict=True)
    configs = {(sampler, steps, "on"): SamplingConfig(sampler, steps) for sampler, steps in settings}
    *_, (sampler, steps, _) = configs
    configs[sampler, steps, "0.25 to 0.75"] = SamplingConfig(sampler, steps, guidance_interval=(0.25, 0.75))
    configs[sampler, steps, "off"] = SamplingConfig(sampler, steps, cfg_scale=1.0)
    variants = {
        name: partial(sampling.sample_latents, model, config, indices, labels, shape, args.device, precision)
        for name, config in configs.items()
    }
    latents = torch.randn(len(indices), *shape, device=args.device)
    variants["decoding", None, None] = partial(vae.decode, latents)
    times = alternate(args, variants)
    reference = dict(zip(("sampler", "steps", "guidance"), next(iter(configs)), strict=True))
    rows = table(tuple(reference), times, len(indices), reference)
    return f"{args.model}, {args.image_size}² pixels, {len(indices)} at a time, {precision}; decoding in fp32", rows


def measure_npz(args: argparse.Namespace) -> Part:
    """Peak memory of sample_ddp.py where all images are there and it packs them into the .npz."""
    rows, made = [], 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = save_images(root / "images", 16, (args.image_size, args.image_size), "png")
        model = root / f"DiT-XS-2-{args.image_size}x{args.image_size}.pt"
        step = replace(default_step(args), model="DiT-XS/2", encoding="sincos")
        torch.save(step.config.build().state_dict(), model)
        arguments = ["--ckpt", model, "--vae", save_vae(root / "vae", SMALL_VAE), "--sample-dir", root / "samples"]
        packed = Path(run("sample_ddp.py", *arguments, "--print-name"))
        packed.with_suffix("").mkdir(parents=True)
        for count in args.npz_images:
            for index in range(made, count):
                os.link(images[index % len(images)], packed.with_suffix("") / f"{index:06d}.png")
            added = memory_of(torch.device("cpu"), run, "sample_ddp.py", *arguments, "--num-fid-samples", count)
            rows.append({"images": count, ".npz, MB": packed.stat().st_size / 1e6, "added memory, MB": added})
            made = count
    return f"sample_ddp.py packing {args.image_size}² PNGs; its model and autoencoder are small", rows


PARTS = {
    "peak": measure_peak,
    "position": measure_position,
    "precision": measure_precision,
    "latents": measure_latents,
    "memory": measure_memory,
    "tokens": measure_tokens,
    "sampling": measure_sampling,
    "npz": measure_npz,
}


def machine(device: torch.device) -> str:
    """Device, threads and versions, in words."""
    environment = monitor.describe_environment(device)
    name, info = environment["device"], Path("/proc/cpuinfo")
    if device.type == "cpu":
        found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        name = f"cpu: {found[1]}" if found else name
        name += f" ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    versions = environment["versions"]
    listed = ", ".join(f"{package} {versions[package]}" for package in ("python", "torch", "diffusers"))
    return f"{name}; {listed}; commit {(environment['git_commit'] or 'unknown')[:10]}"


def show(value) -> str:
    """A cell of a table: three digits, and the quartiles of what was measured more than once."""
    if isinstance(value, dict):
        return f"{show(value['median'])} ({show(value['low'])} to {show(value['high'])})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else value


def describe(part: dict) -> str:
    """A part in Markdown."""
    columns = list(part["rows"][0])
    lines = [columns, ["---"] * len(columns), *([show(row[column]) for column in columns] for row in part["rows"])]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    rounds = f"medians (quartiles) of {part['rounds']} alternating rounds" if "ms" in columns else "measured once"
    return f"{part['title']}:\n\n{text}\n\n{part['machine']}; {rounds}; took {part['seconds']:.0f} s."


def measure(name: str, args: argparse.Namespace) -> dict:
    """A part as it is stored."""
    described = machine(args.device)  # now, because the commit may change while this runs
    torch.manual_seed(0)
    began = time.perf_counter()
    title, rows = PARTS[name](args)
    seconds = time.perf_counter() - began
    return {"title": title, "rows": rows, "machine": described, "rounds": args.rounds, "seconds": seconds}


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    prepare(args)
    parts = files.read_json(args.out) if args.out.exists() else {}
    print(f"{machine(args.device)}; {', '.join(args.precisions)}")
    if args.dry_run:
        for name in args.parts:
            print(f"{name}: {PARTS[name].__doc__}")
        kept = ", ".join(name for name in parts if name not in args.parts) or "nothing"
        return print(f"dry run: would measure this into {args.out}, which keeps {kept}; nothing was written")
    for name in args.parts:
        print(f"\n{name}: {PARTS[name].__doc__}", flush=True)
        parts[name] = measure(name, args)
        print(f"\n{describe(parts[name])}", flush=True)
        with files.cannot_write(f"--out {str(args.out)!r}"):
            files.write_json(args.out, parts)
    print(f"\nresults: {args.out}")


if __name__ == "__main__":
    main()
