"""What two processes of one run do together, for the tests: torchrun two_processes.py FOLDER DATA VAE.

Every rank writes what it saw to FOLDER/<scenario>-<rank>.pt. The processes are started once for all scenarios.
"""

import math
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from conftest import TINY_XS

import cache_latents
import models
import train
from runtime import distributed, monitor, report
from runtime.options import UserError

BATCH = 8


def arguments(results: Path, data: Path, vae: str, *more: str) -> list[str]:
    return [
        f"--results-dir={results}",
        f"--data-path={data}",
        f"--vae={vae}",
        *"--model=DiT-XS/2 --image-size=32 --max-steps=6 --num-workers=0 --log-every=2 --precision=fp32".split(),
        "--sample-every=0",
        f"--global-batch-size={BATCH}",
        *more,
    ]


class SharedNoise:
    """Stands in for torch.randn_like, rand and randint: this process's rows of what one process would draw."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        return values.chunk(distributed.world_size())[distributed.rank()]

    def shape(self, shape) -> tuple:
        return (shape[0] * distributed.world_size(), *shape[1:])

    def randn_like(self, like):
        return self.rows(torch.randn(self.shape(like.shape), generator=self.generator))

    def rand(self, shape, device=None):
        return self.rows(torch.empty(self.shape(shape)).uniform_(generator=self.generator))

    def randint(self, high, shape, device=None):
        values = torch.empty(self.shape(shape), dtype=torch.long)
        return self.rows(values.random_(0, high, generator=self.generator))


def gradients(results: Path, data: Path, vae: str) -> dict:
    """Gradients of the first step, of a model whose every gradient is other than 0, given equal noise."""
    args = train.parse_args(arguments(results, data, vae, "--use-rope", "--rope-rotate=2", "--grad-accum-steps=2"))
    trainer = train.Trainer(train.plan(args, distributed.setup()))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    noise, originals = SharedNoise(), {name: getattr(torch, name) for name in ("randn_like", "rand", "randint")}
    job = trainer.job
    batches = train.data.EpochBatches(len(job.dataset), BATCH, 0, 0, args.grad_accum_steps)
    with train.data.open_loader(job.dataset, batches, 0, job.device) as loader:
        micro_batches = [next(loader) for _ in range(args.grad_accum_steps)]
    if distributed.world_size() == 1:  # the rows of the two processes' first micro-batches, then of their second
        micro_batches = regroup(micro_batches)
    for name in originals:
        setattr(torch, name, getattr(noise, name))
    try:
        trainer.train_step(micro_batches)
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)
    found = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    return {"gradients": found, "loss": distributed.all_reduce(trainer.loss.clone()) / distributed.world_size()}


def regroup(micro_batches: list) -> list:
    inputs, labels = (torch.cat(parts) for parts in zip(*micro_batches, strict=True))
    order = (
        torch.arange(BATCH).view(2, 2, BATCH // 4).transpose(0, 1)
    )  # (process, micro-batch, row) to micro-batch first
    return [(inputs[rows.flatten()], labels[rows.flatten()]) for rows in order]


def stopped(results: Path, data: Path, vae: str) -> dict:
    """A run in which only rank 1 gets a signal, during its third step."""
    step = train.Trainer.train_step

    def train_step(self, batches):
        step(self, batches)
        if distributed.rank() == 1 and self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    train.Trainer.train_step, seen = train_step, []
    save = train.save
    train.save = lambda trainer, *args, **kwargs: (seen.append(trainer.step), save(trainer, *args, **kwargs))
    try:
        train.main(arguments(results, data, vae))
    finally:
        train.Trainer.train_step, train.save = step, save
    return {"saved": seen}


def non_finite(results: Path, data: Path, vae: str) -> dict:
    """A run in which only rank 1's loss is not a number, in its second step."""
    loss = train.Trainer.micro_batch_loss

    def micro_batch_loss(self, inputs, labels):
        bad = distributed.rank() == 1 and self.step == 1
        return loss(self, inputs, labels) + (math.nan if bad else 0)

    train.Trainer.micro_batch_loss, trainers = micro_batch_loss, []
    run = train.train
    train.train = lambda job, trainer, *rest: (trainers.append(trainer), run(job, trainer, *rest))
    try:
        train.main(arguments(results, data, vae, "--max-steps=4", "--ckpt-every=1"))
    finally:
        train.Trainer.micro_batch_loss, train.train = loss, run
    return {"weights": trainers[0].model.state_dict(), "ema": trainers[0].ema.state_dict()}


def unreadable(results: Path, data: Path, vae: str) -> dict:
    """A run over a data set with a damaged image, which one of the processes meets."""
    copy = results.parent / "damaged data"
    if distributed.is_main():
        shutil.copytree(data, copy)
        (copy / "bee" / "07.png").write_bytes(b"damaged")
    distributed.barrier()
    try:
        train.main.__wrapped__(arguments(results, copy, vae))
    except UserError as error:
        return {"error": str(error), "image": str(copy / "bee" / "07.png")}


def cached(results: Path, data: Path, vae: str) -> dict:
    """A latent cache that both processes fill."""
    cache_latents.CHUNK = 5
    cache_latents.main([f"--data-path={data}", f"--latents-dir={results}", f"--vae={vae}", "--image-size=32"])
    return {}


def validated(results: Path, data: Path, vae: str) -> dict:
    """A run that holds out nine images, five of which are validated by rank 0."""
    train.main(arguments(results, data, vae, "--val-fraction=0.4", "--max-steps=2", "--lr=0.01", "--ema-decay=0.5"))
    return {}


def main() -> None:
    monitor.plot_loss = report.write = lambda _: None
    models.SIZES["XS"].update(TINY_XS)
    folder, data, vae = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    for scenario in (gradients, stopped, non_finite, unreadable, cached, validated):
        seen = scenario(folder / scenario.__name__, data, vae)
        torch.save(seen, folder / f"{scenario.__name__}-{distributed.rank()}.pt")


if __name__ == "__main__":
    main()
