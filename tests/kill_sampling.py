"""Sample with one process, with two, and killed with SIGKILL again and again: the same images each time.

    python tests/kill_sampling.py --kills 12 --folder /tmp/samples

One process draws 32 images at a time (FOLDER/one), two processes 8 (FOLDER/two); a third run (FOLDER/killed) draws 7
with one or two processes and is killed in turn at a random moment, half-way through writing an image, and half-way
through packing the .npz. Labels and every draw of noise have to be equal, at least 99.9 % of the pixel values too, and
none may differ by more than 1; no kill may leave an .npz. Without --ckpt, a small model is trained beforehand on the
demo's digits. Other arguments of sample_ddp.py can follow "--". Each process is a fork of one that has everything
imported and has computed nothing.
"""

import argparse
import hashlib
import itertools
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from conftest import TINY_XS
from kill_training import ROOT, die, ended_by

import models
import sample_ddp
import train
from demo.digits import write_digits
from runtime import monitor, pictures, sampling

MOMENTS = ("random", "half an image", "half the .npz")
SMALL_RUN = (
    "--model=DiT-XS/2 --image-size=32 --use-rope --rope-rotate=2 --global-batch-size=16 --max-steps=150 --lr=0.003 "
    "--ema-decay=0.9 --num-workers=0 --precision=fp32"
)
SMALL_SAMPLES = "--num-fid-samples=200 --num-sampling-steps=10 --cfg-scale=2 --precision=fp32"


def record_noise(path: Path) -> None:
    """Add a line to a file for every draw of an image's noise: index, number of the draw, hash of the values."""
    create, draw = sampling.IndexedNoise.__init__, sampling.IndexedNoise.__call__

    def created(self, seed, indices):
        create(self, seed, indices)
        self.indices, self.draws = indices, 0

    def drawn(self, like):
        rows = draw(self, like)
        lines = [
            f"{index} {self.draws} {hashlib.sha1(row.numpy().tobytes()).hexdigest()}\n"
            for index, row in zip(self.indices, rows, strict=True)
        ]
        self.draws += 1
        with open(path, "a") as file:
            file.write("".join(lines))
        return rows

    sampling.IndexedNoise.__init__, sampling.IndexedNoise.__call__ = created, drawn


def linger() -> None:
    """Wait a little at every draw, so that a fast machine is not done before it is killed."""
    draw = sampling.IndexedNoise.__call__

    def waiting(self, like):
        time.sleep(0.1)
        return draw(self, like)

    sampling.IndexedNoise.__call__ = waiting


def kill_half_an_image(countdown: int) -> None:
    """Be killed when half of the countdown-th image is on disk: under its name, as after a power failure."""
    save, numbers = pictures.save_png, itertools.count(1)

    def half(image, path):
        number = next(numbers)  # of this call: several threads write at a time
        save(image, path)
        if number == countdown:
            os.truncate(path, path.stat().st_size // 2)
            die()

    pictures.save_png = half


def kill_half_the_npz() -> None:
    """Be killed in the middle of packing."""
    read = sample_ddp.SampleFolder.read

    def dying(self, index):
        return read(self, index) if index < 3 or not list(self.root.glob("*.npz.partial")) else die()

    sample_ddp.SampleFolder.read = dying


def start(arguments: list[str], noise: Path, processes: int = 1, moment: str | None = None) -> list[int]:
    """Fork the processes of one run of sample_ddp.py; their ids. The fault is in the first one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(arguments, noise, rank, processes, port, moment if rank == 0 else None) for rank in range(processes)]


def fork(arguments: list[str], noise: Path, rank: int, processes: int, port: int, moment: str | None) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
            record_noise(noise)
            if moment == "random":
                linger()
            elif moment == "half an image":
                kill_half_an_image(random.randint(1, 3))
            elif moment == "half the .npz":
                kill_half_the_npz()
            sample_ddp.main(arguments)
            status = 0
        finally:
            os._exit(status)
    return pid


def drawn(noise: Path) -> int:
    """Draws of noise so far, counted once each."""
    return len(set(noise.read_text().splitlines())) if noise.exists() else 0


def kill_one(arguments: list[str], noise: Path, processes: int, moment: str, draws: int) -> bool:
    """Start a run and kill its first process; the others are ended as torchrun would. Whether it came to that.

    A random moment comes after some of the first half of the draws of noise that are left of all the draws.
    """
    enough = drawn(noise) + random.randrange(max(1, (draws - drawn(noise)) // 2))
    first, *others = start(arguments, noise, processes, moment)
    if moment == "random":
        while drawn(noise) < enough:
            time.sleep(0.001)
        os.kill(first, signal.SIGKILL)
    killed = ended_by(first) == -signal.SIGKILL
    for pid in others:
        os.kill(pid, signal.SIGKILL)
        ended_by(pid)
    return killed


def train_small_model(folder: Path) -> Path:
    """A checkpoint of a short training on the demo's digits."""
    write_digits(folder / "digits", 32)
    arguments = [f"--data-path={folder / 'digits'}", f"--vae={ROOT / 'assets' / 'demo_vae'}"]
    pid = os.fork()
    if pid == 0:
        train.main([*SMALL_RUN.split(), *arguments, f"--results-dir={folder / 'run'}"])
        os._exit(0)
    assert ended_by(pid) == 0
    return folder / "run" / "checkpoints" / "0000150.pt"


def arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    (npz,) = folder.glob("*.npz")
    with np.load(npz) as archive:
        return archive["arr_0"], archive["arr_1"]


def compare(folder: Path, name: str) -> None:
    """Raise AssertionError unless a run has the images of FOLDER/one; print how nearly."""
    (images, labels), (reference, expected) = arrays(folder / name), arrays(folder / "one")
    draws = [set((folder / f"{run}.noise").read_text().splitlines()) for run in (name, "one")]
    difference = np.abs(images.astype(int) - reference.astype(int))
    assert labels.tolist() == expected.tolist() and draws[0] == draws[1]
    assert len(np.unique(reference)) > 20, "images of one colour would prove nothing"
    identical = float((difference == 0).mean())
    print(
        f"{name}: {len(labels)} labels and {len(draws[0])} draws of noise equal; {identical:.5%} of {images.size} "
        f"pixel values identical, largest difference {difference.max()}"
    )
    assert identical >= 0.999 and difference.max() <= 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ckpt", type=Path, default=None)
    parser.add_argument("arguments", nargs="*", help="of sample_ddp.py, after --")
    args = parser.parse_args()
    random.seed(args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    shared = [f"--ckpt={args.ckpt or train_small_model(args.folder)}", *(args.arguments or SMALL_SAMPLES.split())]
    for name, batch, processes in (("one", 32, 1), ("two", 8, 2)):
        arguments = [*shared, f"--sample-dir={args.folder / name}", f"--per-proc-batch-size={batch}"]
        assert [ended_by(pid) for pid in start(arguments, args.folder / f"{name}.noise", processes)] == [0] * processes
    killed, noise, survived = args.folder / "killed", args.folder / "killed.noise", Counter()
    arguments = [*shared, f"--sample-dir={killed}", "--per-proc-batch-size=7"]
    for number in range(args.kills):
        # Packing comes when all images are there, so those kills are the last ones.
        moment = MOMENTS[2] if number >= args.kills * 2 // 3 else MOMENTS[number % 2]
        survived[moment] += kill_one(arguments, noise, 1 + number // 2 % 2, moment, drawn(args.folder / "one.noise"))
        assert not list(killed.glob("*.npz")), f"kill {number} ({moment}): {dict(survived)}, {drawn(noise)} draws"
    assert [ended_by(pid) for pid in start(arguments, noise)] == [0]
    assert not list(killed.rglob("*.partial"))
    for name in ("two", "killed"):
        compare(args.folder, name)
    print(f"killed {sum(survived.values())} of {args.kills} times: {dict(survived)}")


if __name__ == "__main__":
    monitor.plot_loss = lambda _: None
    models.SIZES["XS"].update(TINY_XS)
    torch.set_num_threads(1)
    main()
