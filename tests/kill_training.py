"""Kill a training run with SIGKILL again and again, and check what is left each time.

    python tests/kill_training.py --kills 25 --folder /tmp/kills -- --data-path ... (arguments of train.py)

Kills come in turn at a random moment, half-way through writing a checkpoint, and between writing and renaming it.
After each one every checkpoint has to verify. The last start runs to the end; a run that is never killed is put
beside it in FOLDER/reference, the killed one in FOLDER/killed. Each start is a fork of one process that has everything
imported and has computed nothing.
"""

import argparse
import io
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from conftest import TINY_XS

import models
import train
from runtime import checkpoint, monitor, report

MOMENTS = ("random", "half-written", "not renamed")


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


def start(arguments: list[str], moment: str | None = None) -> int:
    """Fork a process that trains; its id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    random.seed(args.seed)
    reference, killed = args.folder / "reference", args.folder / "killed"
    began = time.perf_counter()
    assert ended_by(start([*args.arguments, f"--results-dir={reference}"])) == 0
    duration = time.perf_counter() - began
    survived = 0
    for number in range(args.kills):
        moment = MOMENTS[number % len(MOMENTS)]
        pid = start([*args.arguments, f"--results-dir={killed}"], moment)
        if moment == "random":
            time.sleep(random.uniform(0.2, 0.6) * duration)
            os.kill(pid, signal.SIGKILL)
        survived += ended_by(pid) == -signal.SIGKILL
        for path in checkpoint.training_checkpoints(killed / "checkpoints"):
            checkpoint.load(path, verify=True)
    assert ended_by(start([*args.arguments, f"--results-dir={killed}"])) == 0
    print(f"killed {survived} of {args.kills} times")


if __name__ == "__main__":
    monitor.plot_loss = report.write = lambda _: None
    models.SIZES["XS"].update(TINY_XS)  # small checkpoints make more kills a minute
    torch.set_num_threads(1)
    main()
