"""Training runs of a study: each is train.py in a process of its own, several at a time, one thread each."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runtime import checkpoint, monitor
from runtime.distributed import StopOnSignal
from runtime.monitor import REPOSITORY
from runtime.options import UserError

ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # the same results with and without CUDA
ONE_THREAD = ON_CPU | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
CPU_SECONDS = "cpu_seconds.json"  # in a run's folder, summed over interruptions


@dataclass
class Job:
    """One run: its name in the results, its folder, and the command that makes or goes on with it."""

    key: str
    folder: Path
    command: list[str]
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        return self.folder / "output.txt"

    @property
    def finished(self) -> bool:
        """Whether train.py came to its last step, as opposed to having stopped on request."""
        return (self.folder / "finished.json").exists()

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=REPOSITORY,
                env=os.environ | ONE_THREAD,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is this process's to pass on, once
            )

    def poll(self) -> int | None:
        """The exit status, None while it runs; adds the processor time of an ended process to its folder."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return None
        path = self.folder / CPU_SECONDS
        before = monitor.read_json(path)["cpu_seconds"] if path.exists() else 0.0
        monitor.write_json(path, {"cpu_seconds": before + usage.ru_utime + usage.ru_stime})
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.process.returncode


def python(script: str, **options) -> list[str]:
    """A command of the repository: python("train.py", lr=0.1, use_rope=True, no_flip=True)."""
    command = [sys.executable, script]
    for name, value in options.items():
        command.append(f"--{name.replace('_', '-')}")
        command += [] if value is True else [str(value)]
    return command


def make_latents(images: Path, latents: Path, vae: Path, image_size: int) -> None:
    """Encode a folder of images, unmirrored, unless that is done. Raises UserError when it does not succeed."""
    command = python(
        "cache_latents.py",
        data_path=images,
        latents_dir=latents,
        vae=vae,
        image_size=image_size,
        no_flip=True,
        num_workers=0,
    )
    if subprocess.run(command, cwd=REPOSITORY, env=os.environ | ON_CPU).returncode:
        raise UserError(f"the latents in {str(latents)!r} are not finished; see above, then repeat the command")


def run_all(jobs: list[Job], parallel: int, record: Callable[[Job], None], logger) -> bool:
    """Run jobs, parallel at a time, and record each that finishes. Returns False when a signal asked to stop.

    Raises UserError when a run fails; the others are stopped so that they can go on later.
    """
    waiting, running, began, done = list(jobs), [], time.monotonic(), 0
    with StopOnSignal() as stop, monitor.progress_bar(len(jobs), unit="run") as bar:
        try:
            while (waiting or running) and not stop.received:
                while waiting and len(running) < parallel:
                    running.append(waiting.pop(0))
                    running[-1].start()
                for job in [job for job in running if job.poll() is not None]:
                    running.remove(job)
                    check_finished(job)
                    record(job)
                    done += 1
                    bar.update()
                    eta = (time.monotonic() - began) / done * (len(jobs) - done)
                    logger.info(f"run {done} of {len(jobs)} finished: {job.key}, ETA {monitor.format_seconds(eta)}")
                time.sleep(0.1)
        finally:
            end(running)
    return stop.received is None


def check_finished(job: Job) -> None:
    """Raise UserError unless the ended run came to its last step."""
    if not job.finished:
        lines = job.log.read_text(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it printed nothing"
        raise UserError(
            f"run {job.key} ended with status {job.process.returncode}: {last}; its output is in {str(job.log)!r}, "
            "repeat the command to go on"
        )


def end(running: list[Job]) -> None:
    """Ask runs to stop, which leaves a checkpoint each, and wait for them."""
    for job in running:
        if job.process.returncode is None:  # else it is gone, and its number may be another's
            os.kill(job.process.pid, signal.SIGTERM)  # Popen's own way would collect it, and its times with it
    while any(job.process.returncode is None and job.poll() is None for job in running):
        time.sleep(0.1)


def validation_curve(folder: Path) -> dict[str, list]:
    """Columns of a run's metrics.jsonl at the steps with a validation: step and every val_ key."""
    records = [record for record in monitor.read_metrics(folder / "metrics.jsonl") if "val_loss" in record]
    names = ["step", *(name for name in records[0] if name.startswith("val_"))]
    return {name: [record[name] for record in records] for name in names}


def keep_weights(folder: Path, path: Path) -> None:
    """Write what later measurements need of a finished run's checkpoint, without its optimizer, to path."""
    newest = checkpoint.training_checkpoints(folder / "checkpoints")[-1]
    state = checkpoint.load(newest)
    checkpoint.save(path, {name: state[name] for name in ("model", "ema", "step", "config")})


def remove_run(folder: Path) -> None:
    """Delete the folder of a run whose results are recorded."""
    shutil.rmtree(folder, ignore_errors=True)


def environment() -> dict:
    """Versions, with those of the packages that data and statistics come from, and processor."""
    described = monitor.describe_environment(torch.device("cpu"))
    del described["git_commit"]  # each run has its own
    installed = {name: monitor.version_of(name) for name in ("scikit-learn", "scikit-image", "scipy")}
    return {
        **described,
        "versions": described["versions"] | installed,
        "processor": processor_name(),
        "cores": os.cpu_count(),
    }


def processor_name() -> str:
    """As Linux names it, else the machine's architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
