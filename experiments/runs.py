"""Training runs of a study: train.py with the demo's recipe, each in a process of its own, several at a time.

What they gave is kept in one JSON file, which is replaced whole after every finished part.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from runtime import files, monitor
from runtime.distributed import StopOnSignal, exit_stopped
from runtime.monitor import REPOSITORY
from runtime.options import Parser, UserError, add_dry_run, count, differences

RECIPES = REPOSITORY / "recipes" / "demo"
# One thread of the CPU each: the same results with and without CUDA.
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def recipe_options(*names: str) -> dict[str, str]:
    """Options of train.py as the demo's recipe has them."""
    words = shlex.split((RECIPES / "train.args").read_text(encoding="utf-8"), comments=True)
    given = dict(zip(words, words[1:], strict=False))
    return {name: given[f"--{name.replace('_', '-')}"] for name in names}


def command(script: str, recipe: str, **options) -> list[str]:
    """A command of the repository with a recipe of the demo, and the options that differ; True for a flag."""
    words = [sys.executable, script, f"@{RECIPES / recipe}"]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def make_latents(images: Path, latents: Path, image_size: int) -> None:
    """Encode a folder of images, unless that is done. Raises UserError when it does not succeed."""
    words = command("cache_latents.py", "cache.args", data_path=images, latents_dir=latents, image_size=image_size)
    if subprocess.run(words, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.DEVNULL).returncode:
        raise UserError(f"the latents in {str(latents)!r} are not finished; see above, then repeat the command")


def start(folder: Path, options: dict) -> subprocess.Popen:
    """Begin, or go on with, a run of train.py in a folder."""
    words = command("train.py", "train.args", results_dir=folder, precision="fp32", sample_every=0, **options)
    return launch(folder, words, ENVIRONMENT)


def launch(folder: Path, words: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """Start a process for a folder, which gets what it prints as output.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output:
        streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        # In a session of its own: Ctrl-C is this process's to pass on, once.
        return subprocess.Popen(words, cwd=REPOSITORY, env=environment, start_new_session=True, **streams)


def failure(folder: Path, status: int) -> str:
    output = folder / "output.txt"
    last = (output.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
    where = f"its output is in {str(output)!r}, repeat the command to go on"
    return f"run {str(folder)!r} ended with status {status}: {last}; {where}"


def run_all(
    options: dict[Path, dict], parallel: int, record: Callable[[Path], None], begin: Callable | None = None
) -> None:
    """Train in folders with options of train.py, parallel runs at a time, and record each that finishes.

    begin(folder, options) starts runs of another program; one has finished when its folder has finished.json.
    Raises UserError when a run fails, and ends this process when a signal asks to stop; the others are then stopped so
    that they can go on later.
    """
    waiting, running = list(options), {}
    with StopOnSignal() as stop, monitor.progress_bar(len(options), unit="run") as bar:
        try:
            while (waiting or running) and not stop.received:
                while waiting and len(running) < parallel:
                    folder = waiting.pop(0)
                    running[folder] = (begin or start)(folder, options[folder])
                time.sleep(0.1)
                for folder in [folder for folder, process in running.items() if process.poll() is not None]:
                    status = running.pop(folder).returncode
                    if not (folder / "finished.json").exists():  # it failed, or was asked to stop
                        raise UserError(failure(folder, status))
                    record(folder)
                    bar.update()
        finally:
            for process in running.values():
                process.terminate()  # train.py leaves a checkpoint
            for process in running.values():
                process.wait()
    if stop.received:
        print("stopped on request; repeat the same command to go on", file=sys.stderr)
        exit_stopped(stop.received)


class Results:
    """Measurements by section ("runs", "environment") and key, under the settings that they belong to.

    Raises UserError when the file holds results of other settings.
    """

    def __init__(self, path: Path, settings: dict):
        self.path, self.sections = path, defaultdict(dict, settings=json.loads(json.dumps(settings)))
        if path.exists():
            stored = files.read_json(path)
            if not all(isinstance(part, dict) for part in stored.values()):
                raise UserError(f"{str(path)!r} holds no results of a study; use another --out")
            if listed := differences(stored.get("settings", {}), self.sections["settings"]):
                remedy = "remove it or use another --out"
                raise UserError(f"{str(path)!r} holds results of other settings: {listed}; {remedy}")
            self.sections |= stored

    def add(self, name: str, key: str, value: dict) -> None:
        """Set one entry and write the file, with a line for every entry, so that a run is one line of a diff."""
        # Seven significant digits are what float32 losses have.
        rounded = json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.7g}"))
        self.sections[name][key] = rounded
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
        described["versions"] |= {name: monitor.version_of(name) for name in ("scikit-learn", "scipy")}
        known = self.sections["environment"]
        number = next((number for number, other in known.items() if other == described), str(len(known) + 1))
        if number not in known:
            self.add("environment", number, described)
        return {"git_commit": commit, "environment": number}


def parse_args(parser: Parser, published: Path, argv: list[str] | None) -> argparse.Namespace:
    """Adds the options that the studies share; published holds the results of the repository. Raises UserError."""
    add = parser.add_argument
    add("--work-dir", type=Path, default=Path("results") / published.stem, help="data, latents, runs and weights")
    add("--out", type=Path, default=None, help=f"JSON of the results, with figures beside it (None: {published.name})")
    add("--jobs", type=count, default=os.cpu_count(), help="runs at a time, one thread each")
    add_dry_run(parser)
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir.resolve()
    files.check_folder(args.work_dir, "--work-dir")
    if args.out is not None:
        files.check_output(args.out, ())
    args.figures = args.out.parent if args.out else REPOSITORY / "docs" / "images"
    args.out = args.out or published
    return args


def complete(
    args: argparse.Namespace,
    results: Results,
    options: dict[str, dict],
    prepare: Callable,
    measure: Callable,
    begin: Callable | None = None,
) -> dict[str, dict] | None:
    """What is kept of every run, by key, once those that are missing are trained and measured.

    options are those of train.py by key, or of what begin starts. prepare() makes what the runs read; measure(folder)
    gives what is to keep of a finished one. None for a dry run. Raises UserError.
    """
    missing = {args.work_dir / "runs" / key: key for key in options if key not in results.sections["runs"]}
    where = f"{args.jobs} at a time; {args.out} has the others"
    print(f"{len(missing)} of {len(options)} runs to train, {where}", file=sys.stderr)
    if args.dry_run:
        return None
    if missing:
        prepare()
        origin = results.origin()

        def record(folder: Path) -> None:
            results.add("runs", missing[folder], origin | measure(folder))
            shutil.rmtree(folder)

        run_all({folder: options[key] for folder, key in missing.items()}, args.jobs, record, begin)
    return results.sections["runs"]
