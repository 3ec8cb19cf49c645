"""Kill a training run with SIGKILL again and again, and check what is left each time.

    python tests/kill_training.py --kills 25 --folder /tmp/kills

Kills come in turn at a random moment, half-way through writing a checkpoint, and between writing and renaming it.
After each one every checkpoint has to verify, and the next start has to go on from the newest. The last start runs to
the end; a run that is never killed is put beside it in FOLDER/reference, the killed one in FOLDER/killed. Both have to
end with the same bits and the same metrics. The run is a small one on the demo's digits, with a data worker that
outlives its process; other arguments of train.py can follow "--". Each start is a fork of one process that has
everything imported and has computed nothing.
"""

import argparse
import io
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from conftest import TINY_XS

import models
import train
from demo.digits import write_digits
from runtime import checkpoint, monitor, report

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = ("random", "half-written", "not renamed")
SMALL_RUN = (
    "--model=DiT-XS/2 --image-size=32 --use-rope --rope-rotate=2 --global-batch-size=8 --max-steps=240 --ckpt-every=6 "
    "--log-every=3 --keep-checkpoints=3 --lr=0.001 --num-workers=1 --precision=fp32"
)


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_half_written(countdown: int) -> None:
    """Be killed when half of the countdown-th checkpoint is on disk."""
    save, left = torch.save, [countdown]

    def half(state, file):
        left[0] -= 1
        if left[0]:
            return save(state, file)
        buffer = io.BytesIO()
        save(state, buffer)
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        file.flush()
        die()

    checkpoint.torch.save = half


def kill_before_rename(countdown: int) -> None:
    """Be killed when the countdown-th checkpoint is written and not renamed."""
    replace, left = os.replace, [countdown]

    def dying(source, target):
        left[0] -= str(target).endswith(".pt")
        return replace(source, target) if left[0] else die()

    checkpoint.os.replace = dying


def report_steps(pipe: int) -> None:
    """Write a byte to a pipe after every step, and wait a little, so that a fast machine is not done too early."""
    step = train.Trainer.train_step

    def train_step(self, batches):
        step(self, batches)
        os.write(pipe, b".")
        time.sleep(0.03)

    train.Trainer.train_step = train_step


def start(arguments: list[str], moment: str | None = None, pipe: int | None = None) -> int:
    """Fork a process that trains; its id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if pipe is not None:
                report_steps(pipe)
            if moment == "half-written":
                kill_half_written(random.randint(1, 2))
            elif moment == "not renamed":
                kill_before_rename(random.randint(1, 2))
            train.main(arguments)
            status = 0
        finally:
            os._exit(status)
    return pid


def ended_by(pid: int) -> int:
    """Exit status of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_random(arguments: list[str], steps: int) -> int:
    """Start a run, let it go as far as a random number of steps below steps, and kill it a little later; its id."""
    reading, writing = os.pipe()
    pid = start(arguments, pipe=writing)
    os.close(writing)
    for _ in range(random.randrange(steps)):
        os.read(reading, 1)
    time.sleep(random.uniform(0, 0.2))
    os.kill(pid, signal.SIGKILL)
    os.close(reading)
    return pid


def newest_step(results: Path) -> int:
    """Step of the newest checkpoint, all of which have to verify; 0 without any."""
    paths = checkpoint.training_checkpoints(results / "checkpoints")
    for path in paths:
        checkpoint.load(path, verify=True)
    return int(paths[-1].stem) if paths else 0


def resumed_at(results: Path) -> int:
    """Step at which the last start went on; 0 for a fresh one."""
    log = results / "log.txt"
    last = (log.read_text(encoding="utf-8") if log.exists() else "").rpartition("resumed from ")[2]
    return int(last.splitlines()[0].rpartition(" ")[2].replace(",", "")) if " at step " in last else 0


def identical(one, other) -> bool:
    """Whether nested dicts and lists hold the same bits."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(one[key], other[key]) for key in one)
    return one == other


def metrics(results: Path) -> list[tuple]:
    """Step, loss, gradient norm and learning rate of every line."""
    lines = (results / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [tuple(json.loads(line)[key] for key in ("step", "loss", "grad_norm", "lr")) for line in lines]


def compare(killed: Path, reference: Path) -> None:
    """Raise AssertionError unless both runs ended alike; print with what."""
    paths = [checkpoint.training_checkpoints(folder / "checkpoints")[-1] for folder in (killed, reference)]
    one, other = (checkpoint.load(path) for path in paths)
    for key in ("model", "ema", "opt", "step", "log"):
        assert identical(one[key], other[key]), key
    assert metrics(killed) == metrics(reference)
    assert not list(killed.rglob("*.partial"))
    print(f"step {one['step']}: weights, EMA and optimizer state identical; {len(metrics(killed))} metrics lines equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    random.seed(args.seed)
    reference, killed, digits = (args.folder / name for name in ("reference", "killed", "digits"))
    if not args.arguments:
        write_digits(digits, 32)
        args.arguments = [*SMALL_RUN.split(), f"--data-path={digits}", f"--vae={ROOT / 'assets' / 'demo_vae'}"]
    assert ended_by(start([*args.arguments, f"--results-dir={reference}"])) == 0
    arguments, steps = [*args.arguments, f"--results-dir={killed}"], 2 * newest_step(reference) // args.kills
    survived, resumed = Counter(), []
    for number in range(args.kills):
        before, moment = newest_step(killed), MOMENTS[number % len(MOMENTS)]
        pid = kill_at_random(arguments, steps) if moment == "random" else start(arguments, moment)
        assert ended_by(pid) == -signal.SIGKILL, "the run ended before it was killed; give it more steps"
        survived[moment] += 1
        assert newest_step(killed) >= before
        if newest_step(killed) > before:  # it got as far as resuming, and went on from the newest
            assert resumed_at(killed) == before
            resumed.append(before)
    before = newest_step(killed)
    assert ended_by(start(arguments)) == 0
    assert resumed_at(killed) == before
    compare(killed, reference)
    print(f"went on from steps {', '.join(map(str, resumed))}")
    print(f"killed {sum(survived.values())} of {args.kills} times: {dict(survived)}")


if __name__ == "__main__":
    monitor.plot_loss = report.write = lambda _: None
    models.SIZES["XS"].update(TINY_XS)  # small checkpoints make more kills a minute
    torch.set_num_threads(1)
    main()
