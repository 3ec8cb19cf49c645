"""Measure speed: position encodings, precisions, cached latents, tokens, samplers, checkpoints.

A part yields its variants: calls to measure, of which a training step is that of runtime/training.py. They alternate in
one process, one measurement of each a round, so that a slower minute of the machine meets all of them alike.
"""

import re
import statistics
import tempfile
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import DiT
from rope import RopeConfig
from runtime import data, distributed, files, monitor, options
from runtime.checkpoint import BackgroundWriter, HostCopy, save
from runtime.config import ModelConfig, Recipe, VAEConfig
from runtime.estimate import made_up_batch, timed
from runtime.options import UserError
from runtime.sampling import SamplingConfig, sample_latents
from runtime.training import Trainer
from runtime.vae import VAE, latents_from

# "none" is the RoPE model with queries and keys left unrotated.
ENCODINGS = {"none": RopeConfig(), "sincos": None, "axial": RopeConfig(), "spiral": RopeConfig(rotate=4)}
SIZES = dict(  # in full, and with --quick
    model=("DiT-S/2", "DiT-XS/2"),
    image_size=(256, 64),  # height and width in pixels
    batch_size=(8, 2),
    rounds=(5, 2),
    compile=(True, False),  # takes longest
    tokens=([64, 256, 1024, 4096], [16, 64]),
    samplers=({"ddpm": 250, "ddim": 50, "dpm++": 20}, {"ddpm": 6, "ddim": 4, "dpm++": 2}),  # with their steps
    vae=(  # Stable Diffusion's shape, and a small one
        dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2),
        dict(block_out_channels=[4, 4, 8, 8], layers_per_block=1, norm_num_groups=2),
    ),
)


def build_parser(quick: bool = False) -> options.Parser:
    parser = options.Parser(description=__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    add("--out", type=Path, default=Path("benchmark.json"), help="results; parts that it already holds are kept")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one, else the CPU")
    help = "None: fp32, and bf16 where native; parts other than peak and precision take the last"
    add("--precisions", nargs="+", choices=["fp32", "bf16"], default=None, help=help)
    add("--compile", action=BooleanOptionalAction, help="measure compiled steps too")
    add("--tf32", action=BooleanOptionalAction, default=True, help="TF32 for float32 products on CUDA")
    add("--model", type=options.model_name, help="size and patch, as in DiT-B/4")
    add("--batch-size", type=options.count, help="images at a time; a quarter in the parts tokens and sampling")
    add("--rounds", type=options.number(int, 2), help="measurements of each variant")
    add("--quick", action="store_true", help="sizes for a smoke run; their numbers mean nothing")
    options.add_dry_run(parser)
    parser.set_defaults(**{name: sizes[quick] for name, sizes in SIZES.items()})
    return parser


def parse_args(argv: list[str] | None) -> Namespace:
    args = build_parser().parse_args(argv)
    return build_parser(quick=True).parse_args(argv) if args.quick else args


def prepare(args: Namespace) -> None:
    """Choose the device, the precisions, and one precision for most parts. Raises UserError for what cannot be done."""
    files.check_output(args.out, ())
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no GPU; leave --device out")
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    args.device = torch.device("cpu") if on_cpu else distributed.setup(args.tf32)
    if "precision" in args.parts and args.compile:
        distributed.check_compiler(args.device, "pass --no-compile")
    native = distributed.resolve_precision("auto", args.device)
    args.precisions = args.precisions or list(dict.fromkeys(["fp32", native]))
    args.precision = args.precisions[-1]


@dataclass(frozen=True)
class Variant:
    """A call to measure, and the row of the table that it fills."""

    cells: dict[str, str | int]  # what tells the row from others
    call: Callable
    images: int = 0  # of a call; 0 = it is not about images
    flops: int = 0  # operations of a call; 0 = they are not counted


def config_of(args: Namespace, encoding: str = "spiral") -> ModelConfig:
    length = args.image_size // VAEConfig.downsampling
    return ModelConfig(args.model, (length, length), rope=ENCODINGS[encoding])


class Unrotated(nn.Module):
    """In place of a model's rotary embedding: attention gets queries and keys as they are."""

    def forward(self, h: int, w: int) -> tuple[None, None]:
        return None, None


def trainer_of(args: Namespace, encoding: str = "spiral", vae: VAE | None = None) -> Trainer:
    """Of a new model. It takes cached moments, or with a VAE images."""
    model = config_of(args, encoding).build()
    if encoding == "none":
        model.rope_embedder = Unrotated()
    encoder = latents_from(vae.config if vae else VAEConfig(), vae)
    return Trainer(model, Recipe(), 1, encoder, args.device, args.precision)


def training_step(args: Namespace, images: int, **changes) -> Callable:
    """A step on so many cached images, made up; changes are settings other than the command's."""
    args = Namespace(**(vars(args) | changes))
    return partial(trainer_of(args).train_step, [made_up_batch(images, config_of(args))])


def flops_of(config: ModelConfig) -> int:
    """Operations of a training step for one image: matrix products, forward x 3, a multiply-add counted as two."""
    shape = (1, config.in_channels, *config.input_size)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        config.build()(torch.zeros(shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    return 3 * counter.get_total_flops()


def random_vae(args: Namespace, folder: Path) -> VAE:
    """An autoencoder with random weights, which cost the same."""
    from diffusers import AutoencoderKL

    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    AutoencoderKL(latent_channels=4, **blocks, **args.vae).save_pretrained(folder)
    return VAE(str(folder), args.device)


def peak(args: Namespace, folder: Path) -> Iterator[Variant]:
    """Products of two square matrices, by their length."""
    for precision in args.precisions:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for n in (4096, 8192) if args.device.type == "cuda" else (1024, 2048):  # small ones do not fill a GPU
            a, b, out = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(3))
            cells = {"precision": precision, "operation": f"product, {n:,}"}
            yield Variant(cells, partial(torch.mm, a, b, out=out), flops=2 * n**3)


def position(args: Namespace, folder: Path) -> Iterator[Variant]:
    """Training step and inference (forward) of one model with each position encoding."""
    for encoding in ENCODINGS:
        trainer, batch = trainer_of(args, encoding), made_up_batch(args.batch_size, config_of(args, encoding))
        passes = {"step": partial(trainer.train_step, [batch]), "forward": partial(infer, trainer, *batch)}
        for name, call in passes.items():
            yield Variant({"encoding": encoding, "pass": name}, call, args.batch_size)


@torch.no_grad()
def infer(trainer: Trainer, moments: Tensor, labels: Tensor) -> None:
    """One evaluation of the averaged weights, at the means."""
    x, y = moments.chunk(2, dim=1)[0].to(trainer.device).float(), labels.to(trainer.device)
    with distributed.autocast(trainer.device, trainer.precision):
        trainer.ema(x, torch.full_like(y, 500), y)


def precision(args: Namespace, folder: Path) -> Iterator[Variant]:
    """Training step by precision: as it is, compiled by blocks (--compile) and as a whole; the peak, of products."""
    from torch._inductor.utils import fresh_inductor_cache

    torch.compiler.reset()
    ways = {"eager": lambda model: None, "blocks compiled": DiT.compile_blocks, "compiled whole": DiT.compile}
    flops = args.batch_size * flops_of(config_of(args))
    for name in args.precisions:
        for way, compile_model in ways.items() if args.compile else [*ways.items()][:1]:
            trainer = trainer_of(Namespace(**(vars(args) | {"precision": name})))
            compile_model(trainer.model)
            step = partial(trainer.train_step, [made_up_batch(args.batch_size, config_of(args))])
            with fresh_inductor_cache():
                seconds = timed(step, args.device)
            cells = {"precision": name, "operation": f"step, {way}", "first call, s": seconds}
            yield Variant(cells, step, args.batch_size, flops)
    yield from peak(args, folder)


def latents(args: Namespace, folder: Path) -> Iterator[Variant]:
    """Training steps that encode their images, against steps on cached latents; encoding and reading alone."""
    count, size, vae = args.batch_size, (args.image_size, args.image_size), random_vae(args, folder)
    images, labels = made_up_batch(count, config_of(args), size)
    yield Variant({"latents": "online"}, partial(trainer_of(args, vae=vae).train_step, [(images, labels)]), count)
    yield Variant({"latents": "cached"}, training_step(args, count), count)
    yield Variant({"latents": "encoding alone"}, partial(vae.encode, images), count)
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    smooth.resize((500, 375)).save(folder / "image.jpg")  # near ImageNet's average size
    yield Variant({"latents": "reading alone"}, partial(data.read_prepared, folder / "image.jpg", size), 1)


def tokens(args: Namespace, folder: Path) -> Iterator[Variant]:
    """Training step by the number of tokens."""
    count, patch = max(args.batch_size // 4, 1), ModelConfig(args.model).patch_size * VAEConfig.downsampling
    for number in args.tokens:
        step = training_step(args, count, image_size=isqrt(number) * patch)
        yield Variant({"tokens": number}, step, count)


def sampling(args: Namespace, folder: Path) -> Iterator[Variant]:
    """Every sampler, without decoding; and decoding alone, which is in float32."""
    config, count, vae = config_of(args), max(args.batch_size // 4, 1), random_vae(args, folder)
    model, shape = config.build().to(args.device).eval(), (config.in_channels, *config.input_size)
    variants = [("on", SamplingConfig(sampler, steps)) for sampler, steps in args.samplers.items()]
    last = variants[-1][1]
    variants.append(("0.25 to 0.75", replace(last, guidance_interval=(0.25, 0.75))))
    variants.append(("off", replace(last, cfg_scale=1.0)))
    for guidance, chosen in variants:
        cells = {"sampler": chosen.sampler, "steps": chosen.steps, "guidance": guidance}
        call = partial(sample_latents, model, chosen, range(count), [0] * count, shape, args.device, args.precision)
        yield Variant(cells, call, count)
    decode = partial(vae.decode, torch.randn(count, *shape, device=args.device))
    yield Variant({"sampler": "decoding alone"}, decode, count)


def checkpoint(args: Namespace, folder: Path) -> Iterator[Variant]:
    """Steps and a checkpoint, written before them or beside them; and what training stops for: the write, or a copy."""
    trainer, batches = trainer_of(args), [made_up_batch(args.batch_size, config_of(args))]
    trainer.train_step(batches)  # which makes the optimizer's moments
    writer, host_copy, state = BackgroundWriter(print), HostCopy(print), trainer.state()
    write = partial(save, folder / "0000001.pt", state)
    write()
    step = timed(lambda: trainer.train_step(batches), args.device)
    steps = ceil(2 * timed(write, args.device) / step)  # so that they outlast the writing

    def train() -> None:
        for _ in range(steps):
            trainer.train_step(batches)

    def write_beside() -> None:
        writer.begin(folder / "0000001.pt", state)
        train()
        writer.finished(wait=True)

    calls = {"write": write, "copy": partial(host_copy.of, state), f"steps: {steps}": train}
    calls |= {"steps, after the write": lambda: (write(), train()), "steps, beside the write": write_beside}
    for name, call in calls.items():
        yield Variant({"operation": name}, call)


PARTS = {part.__name__: part for part in (peak, position, precision, latents, tokens, checkpoint, sampling)}


def alternate(calls: list[Callable], rounds: int, device: torch.device) -> list[dict[str, float]]:
    """Median and quartiles in milliseconds of each call; a round measures each of them once, in rotating order."""
    milliseconds = [[] for _ in calls]
    repetitions = 10 if device.type == "cuda" else 1  # between two synchronisations
    with monitor.progress_bar((1 + rounds) * len(calls), unit="measurement") as bar:
        for k in range(1 + rounds):
            for index in np.roll(range(len(calls)), -k):
                seconds = timed(lambda call=calls[index]: [call() for _ in range(repetitions)], device)
                if k > 0:  # the first round warms up
                    milliseconds[index].append(1000 * seconds / repetitions)
                bar.update()
    quartiles = [statistics.quantiles(values, n=4, method="inclusive") for values in milliseconds]
    return [{"median": median, "low": low, "high": high} for low, median, high in quartiles]


def tabulate(variants: list[Variant], times: list[dict[str, float]]) -> list[dict]:
    """A row a variant: its cells, its time, and what follows for its images and operations.

    Time an image is compared with that of the first row of the same pass, operations a second with those of the
    fastest row of the same precision.
    """
    rows = [variant.cells | {"ms": found} for variant, found in zip(variants, times, strict=True)]
    first = {}
    for row, variant in zip(rows, variants, strict=True):
        a_second = 1000 / row["ms"]["median"]
        if variant.images:
            row |= {"images": variant.images, "images/s": variant.images * a_second}
            row["relative time"] = first.setdefault(row.get("pass"), row["images/s"]) / row["images/s"]
        if variant.flops:
            row["GFLOP/s"] = variant.flops / 1e9 * a_second
    counted = [row for row in rows if "GFLOP/s" in row]
    for row in counted:
        fastest = max(other["GFLOP/s"] for other in counted if other["precision"] == row["precision"])
        row["share of peak"] = row["GFLOP/s"] / fastest
    return rows


def machine(device: torch.device) -> str:
    """Device, threads, versions and commit, in words."""
    environment = monitor.describe_environment(device)
    name, info = environment["device"], Path("/proc/cpuinfo")
    if device.type == "cpu":
        found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        name = f"cpu: {found[1]}" if found else name
        name += f" ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    versions = environment["versions"]
    listed = ", ".join(f"{package} {versions[package]}" for package in ("python", "torch", "diffusers"))
    return f"{name}; {listed}; commit {(environment['git_commit'] or 'unknown')[:10]}"


def measure(name: str, args: Namespace) -> dict:
    """A part as it is stored."""
    settings = f"{args.model}, {args.image_size}² pixels, {args.precision}, where the table does not say otherwise"
    described = machine(args.device)  # now, because the commit may change while this runs
    torch.manual_seed(0)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        variants = list(PARTS[name](args, Path(folder)))
        rows = tabulate(variants, alternate([variant.call for variant in variants], args.rounds, args.device))
    seconds = time.perf_counter() - began
    return {"rows": rows, "settings": settings, "machine": described, "rounds": args.rounds, "seconds": seconds}


def show(value) -> str:
    """A cell of a table: three digits, and the quartiles of what was measured more than once."""
    if isinstance(value, dict):
        return f"{show(value['median'])} ({show(value['low'])} to {show(value['high'])})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else value


def describe(part: dict) -> str:
    """A part in Markdown."""
    columns = list(dict.fromkeys(column for row in part["rows"] for column in row))
    lines = [columns, ["---"] * len(columns), *([show(row.get(column)) for column in columns] for row in part["rows"])]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    how = f"medians (quartiles) of {part['rounds']} alternating rounds, {part['seconds']:.0f} s"
    return f"{table}\n\n{part['settings']}; {part['machine']}; {how}"


@options.command
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    prepare(args)
    parts = files.read_json(args.out) if args.out.exists() else {}
    print(f"{machine(args.device)}; {', '.join(args.precisions)}")
    for name in args.parts:
        print(f"\n{name}: {PARTS[name].__doc__ or ''}", flush=True)
        if not args.dry_run:
            parts[name] = measure(name, args)
            print(f"\n{describe(parts[name])}", flush=True)
            with files.cannot_write(f"--out {str(args.out)!r}"):
                files.write_json(args.out, parts)
    dry = f"dry run: would measure this into {args.out}; nothing was written"
    print(f"\n{dry if args.dry_run else f'results: {args.out}'}")


if __name__ == "__main__":
    main()
