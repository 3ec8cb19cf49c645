"""What a run will take: time, memory and disk, from its settings and from a few steps on made-up data."""

import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import psutil
import torch
from torch import Tensor

from runtime import checkpoint, distributed, files, memory, monitor, pictures, validation
from runtime.config import ModelConfig
from runtime.latents import LatentData
from runtime.training import Trainer
from runtime.vae import VAE

WARM_UP = 2  # steps before those that count
BYTES_PER_VALUE = 4  # everything in a checkpoint is float32


def checkpoint_bytes(config: ModelConfig) -> int:
    """Of one checkpoint: weights, their average, and two moments of the optimizer."""
    with torch.device("meta"):
        state = config.build().state_dict()
    return 4 * BYTES_PER_VALUE * sum(tensor.numel() for tensor in state.values())


def describe(job) -> list[str]:
    """What a run is, a line each; job is what train.plan returns."""
    args, config = job.args, job.config
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in config.model.build().parameters())
    position = f"RoPE {config.to_dict()['model']['rope']}" if config.model.rope else "sin-cos positions"
    source = "cached latents" if job.vae is None else "encoded online"
    precision = distributed.resolve_precision(args.precision, job.device)
    size, saves = checkpoint_bytes(config.model), math.ceil(job.total_steps / args.ckpt_every)
    kept = min(saves, args.keep_checkpoints or saves)
    disk = f"disk for {kept} checkpoints: {files.format_bytes(size * kept)} ({files.format_bytes(size)} each)"
    lines = [
        f"model: {args.model}, {parameters:,} parameters, {position}",
        f"data: {config.data.images:,} images in {len(config.data.classes)} classes, {source}, "
        f"{job.steps_per_epoch:,} steps an epoch",
        f"run: {job.total_steps:,} steps of batch {args.global_batch_size} on {job.processes} x "
        f"{job.device.type} in {precision}; {disk}",
    ]
    if config.validation is not None:
        lines.append(validation.describe_schedule(config.validation.images, args, job.total_steps))
    return lines


def dry_run(job, decoder: VAE | None, done: int) -> None:
    """Say what would be done from step done on, and with --dry-run STEPS what it would take."""
    logger = monitor.make_logger()
    if done >= job.total_steps:
        return logger.info(f"dry run: nothing to do: the run has {done:,} of {job.total_steps:,} steps")
    begin = f"go on from step {done:,}" if done else "start"
    lines = [*describe(job), f"dry run: would {begin} in {job.args.results_dir}; nothing was written"]
    for line in lines + (measure(job, decoder, done) if job.args.dry_run else []):
        logger.info(line)


def measure(job, decoder: VAE | None, done: int) -> list[str]:
    """Take the steps of --dry-run, and say what the rest of the run will take from step done on, a line each.

    job is what train.plan returns. Called on every process; nothing is written.
    """
    args, started = job.args, time.time() - psutil.Process().create_time()
    trainer = job.trainer()
    image_size = None if job.vae is None else job.config.image_size
    count = args.global_batch_size // job.processes // args.grad_accum_steps
    batches = [made_up_batch(count, job.config.model, image_size) for _ in range(args.grad_accum_steps)]
    first, *_ = [timed(lambda: trainer.train_step(batches), job.device) for _ in range(WARM_UP)]
    host_copy, state = checkpoint.HostCopy(monitor.make_logger().info), trainer.state()
    if distributed.is_main():
        host_copy.of(state)  # before the steps that count: a run has both at the same time
    counted = sorted(timed(lambda: trainer.train_step(batches), job.device) for _ in range(args.dry_run))
    step, left = statistics.median(counted), job.total_steps - done
    parts = {f"{left:,} steps of {step:.3g} s": left * step}
    parts |= interruptions(job, trainer, decoder, partial(save_nowhere, host_copy, state), step, done)
    parts[f"start-up {started + first:.0f} s"] = started + first
    total = sum(parts.values())
    batch = args.global_batch_size
    measured = f"median of {args.dry_run} steps on made-up data, {counted[0]:.3g} to {counted[-1]:.3g} s"
    return [
        f"speed: {step:.3g} s a step, {batch / step:.4g} images/s with batch {batch} ({measured})",
        f"time: {total / 3600:.3g} hours ({monitor.format_seconds(total)}) = {' + '.join(parts)}; without reading the "
        "data, and without the disk that checkpoints are written to",
        f"memory: {memory_taken(job.device, args.num_workers)}",
        f"disk: {cache_disk(job)}",
    ]


def made_up_batch(count: int, model: ModelConfig, image_size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Cached moments (n, 2C, h, w) float16, or with a size images (n, 3, H, W) uint8; and labels (n,)."""
    if image_size is None:
        inputs = torch.rand(count, 2 * model.in_channels, *model.input_size).half()
    else:
        inputs = torch.randint(256, (count, 3, *image_size), dtype=torch.uint8)
    return inputs, torch.randint(model.num_classes, (count,))


def timed(function: Callable, device: torch.device) -> float:
    """Seconds that a call takes, until the device has done it."""
    began = time.perf_counter()
    function()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - began


def interruptions(
    job, trainer: Trainer, decoder: VAE | None, save_once: Callable, step: float, done: int
) -> dict[str, float]:
    """Seconds of what training stops for, in the rest of the run: checkpoints, samples, validations."""
    args, parts = job.args, {}
    remaining = range(done + 1, job.total_steps + 1)
    saves = sum(map(job.checkpoint_due, remaining))
    save = timed(save_once, job.device) if distributed.is_main() else 0.0
    parts[f"{saves:,} checkpoints of {save:.2g} s"] = saves * save
    grids = sum(map(job.samples_due, remaining))
    if grids:
        drawn = 0.0
        if distributed.is_main():
            arguments = (trainer.ema, job.config, decoder, "made up", job.device, trainer.precision)
            drawn = timed(lambda: pictures.draw_samples(*arguments), job.device)
        parts[f"{grids:,} sample grids of {drawn:.2g} s"] = grids * drawn
    if job.held_out is not None:
        images = job.held_out.config.images
        every = validation.interval(images, args, job.total_steps)
        times = sum(number % every == 0 or number == job.total_steps for number in remaining)
        one = validation.cost_in_steps(images, args.global_batch_size) * step
        parts[f"{times:,} validations of about {one:.2g} s"] = times * one
    return parts


def save_nowhere(host_copy: checkpoint.HostCopy, state: dict) -> None:
    """What training stops for at a checkpoint: its copy, or all its bytes where there is no room for that; a plot."""
    if host_copy.of(state) is None:
        with open(os.devnull, "wb") as file:
            torch.save(state, file)
    monitor.draw_nowhere()


def memory_taken(device: torch.device, workers: int) -> str:
    """Peak use of this process so far, on the host and on its device."""
    host = f"{files.format_bytes(memory.peak())} of the host at the peak of this process"
    if workers:
        host += f", and what {workers} data-loading processes take beside it"
    if device.type != "cuda":
        return host
    taken, total = torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    return f"{files.format_bytes(taken)} of {files.format_bytes(total)} of the GPU, and {host}"


def cache_disk(job) -> str:
    """What a latent cache takes."""
    if isinstance(job.dataset, LatentData):
        cache = job.dataset.cache
        return f"the latent cache in {cache.root} takes {files.format_bytes(cache.moments.nbytes)}"
    model, images = job.config.model, job.config.data.images + (job.held_out.config.images if job.held_out else 0)
    size = images * (2 if job.args.flip else 1) * 2 * 2 * model.in_channels * math.prod(model.input_size)
    return f"a latent cache, which saves the encoding in every epoch, would take {files.format_bytes(size)}"
