"""Kill training, caching or sampling with SIGKILL again and again, and check what is left each time.

    python tests/kill.py training --kills 40 --folder /tmp/kills
    python tests/kill.py caching --kills 30 --folder /tmp/latents
    python tests/kill.py sampling --kills 30 --folder /tmp/samples --ckpt results/checkpoints/0400000.pt

training: kills come in turn at a random moment, half-way through writing a checkpoint, between writing and renaming it,
and two steps further, with half of it written. After each one every checkpoint has to verify, and the next start has to
go on from the newest. The last start runs to the end; a run that is never killed is put beside it in FOLDER/reference,
the killed one in FOLDER/killed. Both have to end with the same bits and the same metrics. A data worker outlives its
process.

caching: kills come at a random moment, between two images, between writing an image and its checksum, and at last
before everything is marked as finished. No kill may leave a cache that passes for finished; the last one has to hold
the bytes of one that was never killed.

sampling: the same images are made by one process, by two, and by one or two that are killed: at a random moment,
half-way through writing an image, and half-way through packing the .npz. Labels and every draw of noise have to be
equal, at least 99.9 % of the pixel values too, and none may differ by more than 1; no kill may leave an .npz. Without
--ckpt, a small model is trained beforehand.

All work on the demo's digits; other arguments of the command can follow "--". Each process is a fork of
one that has everything imported and has computed nothing.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from conftest import TINY_XS

import cache_latents
import models
import sample_ddp
import train
from demo.digits import write_digits
from runtime import checkpoint, files, latents, monitor, pictures, report, sampling

ROOT = Path(__file__).resolve().parent.parent
SMALL_RUN = (
    "--model=DiT-XS/2 --image-size=32 --use-rope --rope-rotate=2 --global-batch-size=8 --max-steps=240 --ckpt-every=6 "
    "--log-every=3 --keep-checkpoints=3 --lr=0.001 --ema-decay=0.9 --num-workers=1 --precision=fp32"
)
SMALL_SAMPLES = "--num-sampling-steps=10 --cfg-scale=2 --precision=fp32"
SMALL_CACHE = "--image-size=32 --no-flip --batch-size=8 --num-workers=1"
CACHING_MOMENTS = ("random", "between images", "no checksum", "not finished")
TRAINING_MOMENTS = ("random", "half-written", "not renamed", "steps further")
SAMPLING_MOMENTS = ("random", "half an image", "half the .npz")


# Processes

FORKS = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Begin to import what the processes need, in the one that forks; which takes longer than most tests."""
    FORKS.set_forkserver_preload(["kill", "two_processes", "diffusers.models.autoencoders.autoencoder_kl"])
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    forkserver.ensure_running()


def start(function: Callable, *arguments):
    """Start a process that calls a function of a module, with small checkpoints and on one thread."""
    start_server()
    process = FORKS.Process(target=call, args=(function, arguments, dict(os.environ)))
    process.start()
    return process


def call(function: Callable, arguments: tuple, environment: dict) -> None:
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as without a fork server
    monitor.plot_loss = report.write = lambda _: None
    monitor.tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process would leave
    models.SIZES["XS"].update(TINY_XS)
    torch.set_num_threads(1)
    function(*arguments)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ended_by(process) -> int:
    """Exit status of a process, negative for a signal."""
    process.join(timeout=600)
    return process.exitcode


class Holder:
    """A process that has the lock of a folder until release."""

    def __init__(self, folder: Path):
        self.connection, other = FORKS.Pipe()
        self.process = start(hold, folder, other)
        assert self.connection.recv_bytes() == b"locked"
        self.name = f"process {self.process.pid} on {socket.gethostname()}"

    def release(self) -> None:
        self.connection.send_bytes(b"release")
        assert ended_by(self.process) == 0


def hold(folder: Path, connection: Connection) -> None:
    lock = files.FolderLock(folder)
    assert lock.take() is None
    connection.send_bytes(b"locked")
    connection.recv_bytes()


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_in_terminal(path: str, arguments: list[str]) -> None:
    """Train with a terminal of one's own as input and output."""
    os.setsid()
    terminal = os.open(path, os.O_RDWR)
    for stream in range(3):
        os.dup2(terminal, stream)
    train.main(arguments)


# Training


def train_until(arguments: list[str], moment: str | None, countdown: int = 1, steps: Connection | None = None) -> None:
    """Train, and be killed with the countdown-th checkpoint; a byte goes to steps after every step."""
    if steps is not None:
        report_calls(train.Trainer, "train_step", steps, 0.03)
    if moment == "half-written":
        kill_half_written(countdown)
    elif moment == "not renamed":
        kill_before_rename(countdown)
    elif moment == "steps further":
        kill_half_written(countdown, steps_further=2)
    train.main(arguments)


def report_calls(owner: type, name: str, calls: Connection, delay: float) -> None:
    """Tell of every call of a method, and wait a little, so that a fast machine is not done too early."""
    method = getattr(owner, name)

    def reported(*arguments):
        method(*arguments)
        calls.send_bytes(b".")
        time.sleep(delay)

    setattr(owner, name, reported)


def kill_half_written(countdown: int, steps_further: int = 0) -> None:
    """Be killed when half of the countdown-th checkpoint is on disk, and training is so many steps further."""
    save, train_step, numbers, reached = torch.save, train.Trainer.train_step, itertools.count(1), [0]

    def stepping(self, batches):
        train_step(self, batches)
        reached[0] = self.step

    def half(state, file):
        save(state, file)
        if next(numbers) == countdown:
            file.truncate(file.tell() // 2)
            while reached[0] < state["step"] + steps_further:
                time.sleep(0.001)
            die()

    torch.save, train.Trainer.train_step = half, stepping


def kill_before_rename(countdown: int) -> None:
    """Be killed when the countdown-th checkpoint is written and not renamed."""
    replace, left = os.replace, [countdown]

    def dying(source, target):
        left[0] -= str(target).endswith(".pt")
        return replace(source, target) if left[0] else die()

    os.replace = dying


def kill_at_random(function: Callable, arguments: list[str], steps: int):
    """Start train_until or cache_until, let it go a random number of steps below steps, and kill it a little later."""
    reading, writing = FORKS.Pipe(duplex=False)
    process = start(function, arguments, None, 1, writing)
    writing.close()  # so that reading ends with the process
    for _ in range(random.randrange(steps)):
        reading.recv_bytes()
    time.sleep(random.uniform(0, 0.2))
    process.kill()
    return process


def small_run(folder: Path) -> list[str]:
    """Arguments of a run on the demo's digits, which are written into folder."""
    write_digits(folder / "digits", 32)
    return [*SMALL_RUN.split(), f"--data-path={folder / 'digits'}", f"--vae={ROOT / 'assets' / 'demo_vae'}"]


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


def assert_same_bits(one, other) -> None:
    """Nested dicts and lists have the same keys, values and bits of tensors."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for values in zip(one, other, strict=True):
            assert_same_bits(*values)
    else:
        assert one == other


def read_metrics(results: Path) -> list[dict]:
    """Records of a run, each step once, without what depends on the clock."""
    records = [json.loads(line) for line in (results / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({record["step"] for record in records}) == len(records)
    timed = ("images_per_second", "eta_seconds")
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


def newest(results: Path) -> dict:
    return checkpoint.load(checkpoint.training_checkpoints(results / "checkpoints")[-1])


def assert_same_run(results: Path, reference: Path) -> None:
    """Two runs ended with the same bits and the same metrics, and nothing half-written is left."""
    one, other = newest(results), newest(reference)
    for key in ("model", "ema", "opt", "step", "config", "log"):
        assert_same_bits(one[key], other[key])
    assert read_metrics(results) == read_metrics(reference)
    assert not list(results.rglob("*.partial"))


def kill_training(folder: Path, kills: int, arguments: list[str] | None = None) -> Counter:
    """Kills that a run survived, by their moment. Raises AssertionError when something is left that should not be."""
    reference, killed = folder / "reference", folder / "killed"
    arguments = arguments or small_run(folder)
    assert ended_by(start(train_until, [*arguments, f"--results-dir={reference}"], None)) == 0
    arguments, steps = [*arguments, f"--results-dir={killed}"], 2 * newest_step(reference) // kills
    survived, resumed = Counter(), []
    for number in range(kills):
        before, moment = newest_step(killed), TRAINING_MOMENTS[number % 4]
        if moment == "random":
            process = kill_at_random(train_until, arguments, steps)
        else:
            process = start(train_until, arguments, moment, random.randint(1, 2))
        assert ended_by(process) == -signal.SIGKILL, "the run ended before it was killed; give it more steps"
        survived[moment] += 1
        assert newest_step(killed) >= before
        if newest_step(killed) > before:  # it got as far as resuming, and went on from the newest
            assert resumed_at(killed) == before
            resumed.append(before)
    before = newest_step(killed)
    assert ended_by(start(train_until, arguments, None)) == 0
    assert resumed_at(killed) == before
    assert_same_run(killed, reference)
    print(f"went on from steps {', '.join(map(str, resumed))}; {len(read_metrics(killed))} metrics lines equal")
    return survived


# Caching


def cache_until(arguments: list[str], moment: str | None, countdown: int = 1, rows: Connection | None = None) -> None:
    """Cache in chunks of 16, and be killed at a moment's countdown-th time; a byte goes to rows after every image."""
    latents.CHUNK = 16
    if rows is not None:
        report_calls(latents.CacheWriter, "write", rows, 0.02)
    elif moment is not None:
        name = {"between images": "write", "no checksum": "_write_checksums", "not finished": "finish"}[moment]
        die_in(latents.CacheWriter, name, countdown)
    cache_latents.main(arguments)


def die_in(owner: type, name: str, countdown: int) -> None:
    """Be killed when a method is called for the countdown-th time."""
    method, numbers = getattr(owner, name), itertools.count(1)
    setattr(owner, name, lambda *arguments: die() if next(numbers) == countdown else method(*arguments))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != files.LOCK}


def kill_caching(folder: Path, kills: int, arguments: list[str] | None = None) -> Counter:
    """Kills that caching survived, by their moment. Raises AssertionError when another cache came out of it."""
    reference, killed, survived = folder / "reference", folder / "killed", Counter()
    if not arguments:
        write_digits(folder / "digits", 32)
        data = [f"--data-path={folder / 'digits'}", f"--vae={ROOT / 'assets' / 'demo_vae'}"]
        arguments = [*SMALL_CACHE.split(), *data]
    assert ended_by(start(cache_until, [*arguments, f"--latents-dir={reference}"], None)) == 0
    images = len(latents.LatentCache(reference))
    arguments = [*arguments, f"--latents-dir={killed}"]
    for number in range(kills):
        moment = CACHING_MOMENTS[3] if number >= kills * 3 // 4 else CACHING_MOMENTS[number % 3]
        if moment == "random":
            process = kill_at_random(cache_until, arguments, max(1, images // kills))
        else:
            countdown = random.randint(1, max(1, images // (4 * kills)))  # so that images are left for the others
            process = start(cache_until, arguments, moment, 1 if moment == "not finished" else countdown)
        assert ended_by(process) == -signal.SIGKILL, f"caching ended before kill {number} ({moment})"
        survived[moment] += 1
        assert not (killed / "meta.json").exists()
    assert ended_by(start(cache_until, arguments, None)) == 0
    assert files_of(killed) == files_of(reference)
    print(f"{images} images, every byte equal")
    return survived


# Sampling


def sample_until(arguments: list[str], noise: Path, group: dict[str, str], moment: str | None, countdown: int) -> None:
    """Sample as one process of a group, and be killed with the countdown-th image or half-way through the .npz."""
    os.environ |= group
    record_noise(noise, delay=0.1 if moment == "random" else 0)  # a fast machine would be done before it is killed
    if moment == "half an image":
        kill_half_an_image(countdown)
    elif moment == "half the .npz":
        kill_half_the_npz()
    sample_ddp.main(arguments)


def record_noise(path: Path, delay: float) -> None:
    """Add a line to a file for every draw of an image's noise: index, number of the draw, hash of the values."""
    create, draw = sampling.IndexedNoise.__init__, sampling.IndexedNoise.__call__

    def created(self, seed, indices):
        create(self, seed, indices)
        self.indices, self.draws = indices, 0

    def drawn(self, like):
        time.sleep(delay)
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


def start_samplers(arguments: list[str], noise: Path, count: int = 1, moment: str | None = None) -> list:
    """Start the processes of one run of sample_ddp.py. The fault is in the first one."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    groups = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    moments = [moment, *[None] * (count - 1)]
    return [
        start(sample_until, arguments, noise, group, faulty, random.randint(1, 3))
        for group, faulty in zip(groups, moments, strict=True)
    ]


def drawn(noise: Path) -> int:
    """Draws of noise so far, counted once each."""
    return len(set(noise.read_text().splitlines())) if noise.exists() else 0


def kill_sampler(arguments: list[str], noise: Path, count: int, moment: str, draws: int) -> bool:
    """Start a run and kill its first process; the others are ended as torchrun would. Whether it came to that.

    A random moment comes after some of the first half of the draws of noise that are left of all the draws.
    """
    enough = drawn(noise) + random.randrange(max(1, (draws - drawn(noise)) // 2))
    first, *others = start_samplers(arguments, noise, count, moment)
    if moment == "random":
        while drawn(noise) < enough:
            time.sleep(0.001)
        first.kill()
    killed = ended_by(first) == -signal.SIGKILL
    for process in others:
        process.kill()
        ended_by(process)
    return killed


def read_samples(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the only .npz in a folder."""
    (npz,) = folder.glob("*.npz")
    with np.load(npz) as archive:
        return archive["arr_0"], archive["arr_1"]


def assert_same_images(folder: Path, reference: Path) -> str:
    """Two runs have the same labels, and images that differ at most by rounding; how nearly they are equal."""
    (images, labels), (expected, expected_labels) = read_samples(folder), read_samples(reference)
    difference = np.abs(images.astype(int) - expected.astype(int))
    identical = float((difference == 0).mean())
    assert labels.tolist() == expected_labels.tolist() and identical >= 0.999 and difference.max() <= 1
    assert len(np.unique(expected)) > 20, "images of one colour would prove nothing"
    return f"{len(labels)} images, {identical:.5%} of pixel values identical, largest difference {difference.max()}"


def kill_sampling(folder: Path, kills: int, ckpt: Path | None = None, arguments: list[str] | None = None) -> Counter:
    """Kills that sampling survived, by their moment. Raises AssertionError when other images came out of it."""
    if ckpt is None:
        ckpt = folder / "run"
        assert ended_by(start(train_until, [*small_run(folder), f"--results-dir={ckpt}"], None)) == 0
    # So many that some are left for the kills before the .npz is packed.
    shared = [f"--ckpt={ckpt}", *(arguments or [*SMALL_SAMPLES.split(), f"--num-fid-samples={max(200, 27 * kills)}"])]
    killed, noise, survived = folder / "killed", folder / "killed.noise", Counter()
    for name, batch, count in (("one", 32, 1), ("two", 8, 2)):
        arguments = [*shared, f"--sample-dir={folder / name}", f"--per-proc-batch-size={batch}"]
        processes = start_samplers(arguments, folder / f"{name}.noise", count)
        assert [ended_by(process) for process in processes] == [0] * count
    arguments = [*shared, f"--sample-dir={killed}", "--per-proc-batch-size=7"]
    for number in range(kills):
        # Packing comes when all images are there, so those kills are the last ones.
        moment = SAMPLING_MOMENTS[2] if number >= kills * 2 // 3 else SAMPLING_MOMENTS[number % 2]
        survived[moment] += kill_sampler(arguments, noise, 1 + number // 2 % 2, moment, drawn(folder / "one.noise"))
        assert not list(killed.glob("*.npz")), f"kill {number} ({moment}): {dict(survived)}, {drawn(noise)} draws"
    assert [ended_by(process) for process in start_samplers(arguments, noise)] == [0]
    assert not list(killed.rglob("*.partial"))
    for name in ("two", "killed"):
        draws = [set((folder / f"{run}.noise").read_text().splitlines()) for run in (name, "one")]
        assert draws[0] == draws[1]
        print(f"{name}: {len(draws[0])} draws of noise equal, {assert_same_images(folder / name, folder / 'one')}")
    return survived


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["training", "caching", "sampling"])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ckpt", type=Path, default=None, help="of the samples")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, given = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]  # after --: of the command
    random.seed(args.seed)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.what == "training":
        survived = kill_training(args.folder, args.kills, given)
    elif args.what == "caching":
        survived = kill_caching(args.folder, args.kills, given)
    else:
        survived = kill_sampling(args.folder, args.kills, args.ckpt, given)
    print(f"killed {sum(survived.values())} of {args.kills} times: {dict(survived)}")


if __name__ == "__main__":
    main()
