"""Training runs of a study: each is train.py in a process of its own, several at a time, one thread each.

What they gave is kept in one JSON file, which is replaced whole after every finished part.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime import files, monitor, options
from runtime.distributed import StopOnSignal
from runtime.monitor import REPOSITORY
from runtime.options import UserError, differences

VAE = REPOSITORY / "assets" / "demo_vae"
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}  # the same results with and without CUDA
ONE_THREAD = ON_CPU | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Job:
    """One run: its name in the results, its folder, and the command that makes or goes on with it."""

    key: str
    folder: Path
    command: list[str]

    @property
    def log(self) -> Path:
        return self.folder / "output.txt"

    def start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a") as output:
            streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            # In a session of its own: Ctrl-C is this process's to pass on, once.
            environment = os.environ | ONE_THREAD
            return subprocess.Popen(self.command, cwd=REPOSITORY, env=environment, start_new_session=True, **streams)

    def check_finished(self, status: int) -> None:
        """Raise UserError unless train.py came to its last step, as opposed to having stopped on request."""
        if not (self.folder / "finished.json").exists():
            last = (self.log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
            raise UserError(
                f"run {self.key} ended with status {status}: {last}; its output is in {str(self.log)!r}, repeat the "
                "command to go on"
            )


def run_all(jobs: list[Job], parallel: int, record: Callable[[Job], None]) -> None:
    """Run jobs, parallel at a time, and record each that finishes.

    Raises UserError when a run fails, and ends this process when a signal asks to stop; the others are then stopped so
    that they can go on later.
    """
    waiting, running, done, began = list(jobs), {}, 0, time.monotonic()
    with StopOnSignal() as stop:
        try:
            while (waiting or running) and not stop.received:
                while waiting and len(running) < parallel:
                    job = waiting.pop(0)
                    running[job.key] = job, job.start()
                time.sleep(0.1)
                for job, process in list(running.values()):
                    if process.poll() is not None:
                        del running[job.key]
                        job.check_finished(process.returncode)
                        record(job)
                        done += 1
                        eta = monitor.format_seconds((time.monotonic() - began) / done * (len(jobs) - done))
                        say(f"run {done} of {len(jobs)} finished: {job.key}, ETA {eta}")
        finally:
            for _, process in running.values():
                process.terminate()  # train.py leaves a checkpoint
            for _, process in running.values():
                process.wait()
    if stop.received:
        say("stopped on request; repeat the same command to go on")
        sys.exit(130)


def say(line: str) -> None:
    """Progress, beside the tables on stdout."""
    print(line, file=sys.stderr, flush=True)


def python(script: str, *arguments, **options) -> list[str]:
    """A command of the repository: python("train.py", lr=0.1, use_rope=True, no_flip=True)."""
    command = [sys.executable, script, *map(str, arguments)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return command


def make_latents(images: Path, latents: Path, image_size: int | str) -> None:
    """Encode a folder of images, unmirrored, unless that is done. Raises UserError when it does not succeed."""
    settings = dict(vae=VAE, image_size=image_size, no_flip=True, num_workers=0)
    command = python("cache_latents.py", data_path=images, latents_dir=latents, **settings)
    if subprocess.run(command, cwd=REPOSITORY, env=os.environ | ON_CPU, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"the latents in {str(latents)!r} are not finished; see above, then repeat the command")


class Results:
    """Measurements by section ("runs", "beyond_grid", ...) and key, under the settings that they belong to.

    Raises UserError when the file holds results of other settings.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.sections = path, {"settings": json.loads(json.dumps(settings))}
        if path.exists():
            stored = files.read_json(path)
            if not all(isinstance(part, dict) for part in stored.values()):
                raise UserError(f"{str(path)!r} holds no results of a study; use another --out")
            if listed := differences(stored.get("settings", {}), self.sections["settings"]):
                raise UserError(
                    f"{str(path)!r} holds results of other settings: {listed}; remove it or use another --out"
                )
            self.sections = stored

    def section(self, name: str) -> dict:
        return self.sections.get(name, {})

    def add(self, name: str, key: str, value: dict) -> None:
        """Set one entry and write the file, with a line for every entry, so that a run is one line of a diff."""
        # Seven significant digits are what float32 losses have.
        rounded = json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.7g}"))
        self.sections[name] = {**self.section(name), key: rounded}
        sections = []
        for title, entries in self.sections.items():
            lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
            sections.append(f"  {json.dumps(title)}: {{\n{lines}\n  }}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(self.path, "{\n" + ",\n".join(sections) + "\n}\n")

    def origin(self) -> dict:
        """Commit of new runs, and the number of their environment, which is added where it is new."""
        described = monitor.describe_environment(torch.device("cpu")) | {"cores": os.cpu_count()}
        commit = described.pop("git_commit")
        described["versions"] |= {name: monitor.version_of(name) for name in ("scikit-learn", "scikit-image", "scipy")}
        known = self.section("environment")
        number = next((number for number, other in known.items() if other == described), str(len(known) + 1))
        if number not in known:
            self.add("environment", number, described)
        return {"git_commit": commit, "environment": number}


def add_options(parser: options.Parser, work: str, out: str) -> None:
    """The options that the studies share."""
    add = parser.add_argument
    add("--work-dir", type=Path, default=Path(work), help="data, latents, runs and weights")
    add("--out", type=Path, default=None, help=f"JSON of the results, with the figures beside another one ({out})")
    add("--jobs", type=options.count, default=os.cpu_count(), help="runs at a time, one thread each")
    options.add_dry_run(parser)


def check_places(args: argparse.Namespace) -> None:
    """Raise UserError for a place that cannot be written."""
    if args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is a folder; expected the name of a file")
    for option, folder in (("--work-dir", args.work_dir), ("--out", args.out.parent), ("--figures", args.figures)):
        files.check_folder(folder, option)
