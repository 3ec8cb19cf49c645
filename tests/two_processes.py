"""What two processes of one run do together, for the tests.

Every rank writes what it saw to FOLDER/<scenario>-<rank>.pt. The processes are started once for all scenarios; the
last one kills rank 0, and torchrun starts both again.
"""

import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed.run
from conftest import TINY_RUN, command_line
from test_evaluate import MEASURED, FakeInception

import cache_latents
import evaluate
import sample_ddp
import train
from runtime import data, distributed, latents
from runtime.options import UserError
from runtime.run import RunFolder
from runtime.training import Trainer

BATCH = TINY_RUN["global_batch_size"]


def arguments(results: Path, data_path: Path, vae: str, **changes) -> list[str]:
    options = {"data_path": data_path, "vae": vae, "results_dir": results, "max_steps": 6, "log_every": 2}
    return command_line(TINY_RUN | options | changes)


def status_of(arguments: list[str]) -> int | str | None:
    """Exit status of a run."""
    try:
        train.main(arguments)
    except SystemExit as stop:
        return stop.code


def constant_noise():
    """Context in which every image has the same noise and timestep, and keeps its label, whatever batch it is in."""
    return patch.multiple(
        torch,
        randn_like=lambda x: torch.full_like(x, 0.3),
        randint=lambda high, shape, device: torch.full(shape, high // 2),
        rand=lambda shape, device: torch.full(shape, 0.5),
    )


def gradients(results: Path, images: Path, vae: str) -> dict:
    """Gradients of the first step, of a model whose every gradient is other than 0, given equal noise."""
    job = train.plan(
        train.parse_args(arguments(results, images, vae, use_rope=True, rope_rotate=2, grad_accum_steps=2)),
        distributed.setup(),
    )
    trainer = job.trainer()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    batches = data.EpochBatches(len(job.dataset), BATCH, 0, 0, micro_batches=2)
    with data.open_loader(job.dataset, batches, 0, job.device) as loader:
        micro_batches = [next(loader) for _ in range(2)]
    with constant_noise():
        trainer.train_step(micro_batches)
    found = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    return {"gradients": found, "loss": distributed.all_reduce(trainer.loss.clone()) / distributed.world_size()}


def stopped(results: Path, images: Path, vae: str) -> dict:
    """A run in which only rank 1 gets a signal, during its third step."""
    step, save, seen = Trainer.train_step, RunFolder.save, []

    def train_step(self, batches):
        step(self, batches)
        if distributed.rank() == 1 and self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def saved(self, trainer, **how):
        seen.append(trainer.step)
        save(self, trainer, **how)

    with patch.object(Trainer, "train_step", train_step), patch.object(RunFolder, "save", saved):
        return {"status": status_of(arguments(results, images, vae)), "saved": seen}


def waiting(results: Path, images: Path, vae: str) -> dict:
    """A run in which only rank 1 gets a signal, while rank 0 waits for an image of the third step."""
    read, save, seen, sent = data.read_prepared, RunFolder.save, [], []

    def read_prepared(path, size):
        seen.append(path)
        if distributed.rank() == 0 and len(seen) == BATCH + 1:
            pipe = results.parent / "pipe"
            os.mkfifo(pipe)
            open(pipe).close()
        return read(path, size)

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    def train_step(self, batches):
        step(self, batches)
        if self.step == 2:
            threading.Timer(1, send if distributed.rank() == 1 else lambda: sent.append(time.monotonic())).start()

    saves, step = [], Trainer.train_step

    def saved(self, trainer, **how):
        saves.append(trainer.step)
        save(self, trainer, **how)

    reading = patch.object(data, "read_prepared", read_prepared)
    with reading, patch.object(Trainer, "train_step", train_step), patch.object(RunFolder, "save", saved):
        status = status_of(arguments(results, images, vae))
    return {"status": status, "saved": saves, "seconds": time.monotonic() - sent[0]}


def non_finite(results: Path, images: Path, vae: str) -> dict:
    """A run in which only rank 1's loss is not a number, in its second step."""
    loss, trainers = Trainer.micro_batch_loss, []

    def micro_batch_loss(self, inputs, labels):
        trainers.append(self)
        bad = distributed.rank() == 1 and self.step == 1
        return loss(self, inputs, labels) + (math.nan if bad else 0)

    with patch.object(Trainer, "micro_batch_loss", micro_batch_loss):
        train.main(arguments(results, images, vae, max_steps=4, ckpt_every=1))
    return {"weights": dict(trainers[0].model.state_dict()), "ema": dict(trainers[0].ema.state_dict())}


def unreadable(results: Path, images: Path, vae: str) -> dict:
    """A run over a data set with a damaged image, which one of the processes meets."""
    damaged = results.parent / "damaged data"
    if distributed.is_main():
        shutil.copytree(images, damaged)
        (damaged / "bee" / "07.png").write_bytes(b"damaged")
    distributed.gather(None)  # wait for it
    try:
        train.main.__wrapped__(arguments(results, damaged, vae))
    except UserError as error:
        return {"error": str(error), "image": str(damaged / "bee" / "07.png")}


def refused(results: Path, images: Path, vae: str) -> dict:
    """A command that fits one process and not two. Rank 1 lets rank 0 speak, and torchrun would end it meanwhile."""
    with patch.object(time, "sleep", lambda seconds: sys.exit(2) if seconds else None):
        return {"status": status_of(arguments(results, images, vae, global_batch_size=7))}


def estimated(results: Path, images: Path, vae: str) -> dict:
    """A dry run that takes a step, draws samples on rank 0, and counts a validation."""
    train.main(arguments(results, images, vae, val_fraction=0.4, sample_every=3, dry_run=1))
    return {"wrote": results.exists()}


def cached(results: Path, images: Path, vae: str) -> None:
    """A latent cache that both processes fill."""
    latents.CHUNK = 5
    options = {"data_path": images, "latents_dir": results, "vae": vae, "image_size": 32, "num_workers": 0}
    cache_latents.main(command_line(options))


def validated(results: Path, images: Path, vae: str) -> None:
    """A run that holds out nine images, five of which are validated by rank 0."""
    train.main(arguments(results, images, vae, val_fraction=0.4, max_steps=2, lr=0.01, ema_decay=0.5))


def trained(results: Path, images: Path, vae: str) -> None:
    """A whole run, whose first checkpoint, of step 4, is written when both processes are two steps further."""
    step, save, further = Trainer.train_step, torch.save, threading.Event()

    def train_step(self, batches):
        step(self, batches)
        if self.step == 6:
            further.set()

    def saving(state, file):
        assert further.wait(timeout=60)
        save(state, file)

    with patch.object(Trainer, "train_step", train_step), patch.object(torch, "save", saving):
        train.main(arguments(results, images, vae, max_steps=7, log_every=3, lr=0.01, use_rope=True, rope_rotate=2))


def sampled(results: Path, images: Path, vae: str) -> None:
    """Samples of that run."""
    options = {"ckpt": results.parent / "trained", "sample_dir": results, "num_fid_samples": 13, "cfg_scale": 2}
    options |= {"num_sampling_steps": 6, "per_proc_batch_size": 3, "precision": "fp32"}
    sample_ddp.main(command_line(options))


def measured(results: Path, images: Path, vae: str) -> None:
    """Metrics of those samples against the images, by what stands in for Inception-v3."""
    evaluate.Inception = FakeInception
    (samples,) = (results.parent / "sampled").glob("*.npz")
    options = {"samples": samples, "reference": images, "cache_dir": results, "batch_size": 3}
    evaluate.main(command_line(options | MEASURED))


def restarted(results: Path, images: Path, vae: str) -> None:
    """A run whose rank 0, with the lock and a data worker that outlives it, is killed at its third step."""
    step = Trainer.train_step

    def train_step(self, batches):
        step(self, batches)
        if self.step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and distributed.is_main():
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.train_step = train_step
    train.main(arguments(results, images, vae, max_steps=7, ckpt_every=2, num_workers=1, log_every=1))


SCENARIOS = [gradients, stopped, waiting, non_finite, unreadable, refused, estimated]
SCENARIOS += [cached, validated, trained, sampled, measured]


def torchrun(folder: Path, images: Path, vae: Path) -> None:
    """Run this file as torchrun does, with processes that are forks: nothing has to be imported again."""
    for stream, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    options = "--standalone --local-addr=127.0.0.1 --nproc-per-node=2 --max-restarts=1 --start-method=fork --run-path"
    torch.distributed.run.main([*options.split(), __file__, *map(str, (folder, images, vae))])


def main() -> None:
    folder, images, vae = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    for scenario in [*(SCENARIOS if first_start else ()), restarted]:
        seen = scenario(folder / scenario.__name__, images, vae)
        torch.save(seen, folder / f"{scenario.__name__}-{distributed.rank()}.pt")


if __name__ == "__main__":
    main()
