"""What a run shows: log, metrics.jsonl, config.json, progress bar and loss plot, written by rank 0."""

import errno
import io
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from runtime import files
from runtime.distributed import is_main

REPOSITORY = Path(__file__).resolve().parent.parent
VALIDATED = {"val_loss": ("raw", "C2"), "val_loss_ema": ("EMA", "C3")}  # key of a record: weights, colour


class TqdmHandler(logging.StreamHandler):
    """Prints log lines above a progress bar in place of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        show(self.format(record))


def show(line: str) -> None:
    """Print a line above a progress bar. Where nobody can read it any more, output is dropped and the run goes on."""
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except OSError as error:  # the reader of a pipe or the terminal has gone, the disk is full
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr) if error.errno == errno.EIO else (sys.stdout,):  # EIO: the terminal
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class LogFile(logging.FileHandler):
    """log.txt: a line that the disk does not take is a warning in the terminal, which shows it anyway."""

    def handleError(self, record: logging.LogRecord) -> None:
        show(f"warning: {self.baseFilename} lacks a line: {sys.exc_info()[1]}")


def make_logger(folder: Path | None = None) -> logging.Logger:
    """A logger to the terminal and, with a folder, to its log.txt; silent on ranks other than 0."""
    logger = logging.getLogger("spiral_rope_dit")
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    if not is_main():
        logger.addHandler(logging.NullHandler())
        return logger
    handlers: list[logging.Handler] = [TqdmHandler()]
    if folder is not None:
        handlers.append(LogFile(folder / "log.txt", encoding="utf-8", delay=True))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


def progress_bar(total: int, initial: int = 0, unit: str = "step", description: str | None = None) -> tqdm:
    """A progress bar with rate and ETA, on a terminal and on rank 0 only."""
    hidden = not (is_main() and sys.stderr.isatty())
    return tqdm(total=total, initial=initial, unit=unit, desc=description, disable=hidden, dynamic_ncols=True)


class Metrics:
    """metrics.jsonl: one line a record, each step once. On resume, lines past the checkpoint are dropped.

    Trackers (see runtime/trackers.py) get the same records, and pictures as well.
    """

    def __init__(self, folder: Path, step: int, trackers: Sequence = ()):
        self.path, self.trackers = folder / "metrics.jsonl", trackers
        if is_main():
            kept = [record for record in read_metrics(self.path) if record["step"] <= step]
            files.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, record: dict) -> None:
        """Append a record, whole or not at all. Raises OSError."""
        for tracker in self.trackers:
            tracker.write(record)
        if is_main():
            size = self.path.stat().st_size
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError:
                os.truncate(self.path, size)
                raise

    def try_write(self, record: dict, logger: logging.Logger) -> None:
        """As write; a failed write is a warning."""
        try:
            self.write(record)
        except OSError as error:
            logger.info(f"warning: step {record['step']} is missing in {self.path}: {error}")

    def write_image(self, name: str, path: Path, step: int) -> None:
        """Hand a picture in a file to the trackers."""
        for tracker in self.trackers:
            tracker.write_image(name, path, step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        """Wait until the trackers have everything."""
        for tracker in self.trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict]:
    """Records of a metrics.jsonl; a last line that a killed process left incomplete is not one."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def describe_environment(device: torch.device) -> dict:
    """Versions, device and git commit, for config.json."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: version_of(name) for name in ("torchvision", "timm", "diffusers", "numpy", "pillow")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"versions": versions, "device": f"{device.type}: {name}", "git_commit": git_commit()}


def version_of(package: str) -> str | None:
    """The installed version, None without one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the working tree, with "+changes" when files differ from it; None outside git."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def plot_loss(folder: Path) -> None:
    """Draw loss.png from metrics.jsonl: losses and gradient norm by step, the newest validation by timestep."""
    found = read_metrics(folder / "metrics.jsonl")
    if not (is_main() and any(record.get("loss") is not None for record in found)):
        return
    from matplotlib.figure import Figure

    tenths = newest_tenths(found)
    figure = Figure(figsize=(8, 6.8 if tenths else 4.5), layout="constrained")
    panels = figure.subplots(2 if tenths else 1, height_ratios=[2, 1] if tenths else None, squeeze=False)[:, 0]
    draw_losses(panels[0], found)
    if tenths:
        draw_tenths(panels[1], *tenths)
    save_figure(figure, folder / "loss.png")


def draw_nowhere() -> None:
    """Draw a plot of made-up losses and keep nothing of it, to see what that takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    draw_losses(figure.subplots(), [{"step": step, "loss": 1.0, "grad_norm": 1.0} for step in (1, 2)])
    figure.savefig(io.BytesIO(), dpi=150, format="png")


def draw_losses(left, found: list[dict]) -> None:
    """Training loss, gradient norm and validation losses by step."""
    records = [record for record in found if record.get("loss") is not None]
    steps = [record["step"] for record in records]
    right = left.twinx()
    lines = left.plot(
        steps, [record["loss"] for record in records], color="C0", label="training: noise MSE + variational term"
    )
    for key, (weights, color) in VALIDATED.items():
        values = [record for record in found if record.get(key) is not None]
        points = [(record["step"], record[key], record.get(f"{key}_se") or 0) for record in values]
        if points:
            at, loss, error = map(np.array, zip(*points, strict=True))
            label = f"validation: noise MSE ± standard error, {weights} weights"
            lines += left.plot(at, loss, color=color, marker=".", label=label)
            left.fill_between(at, loss - error, loss + error, color=color, alpha=0.25, linewidth=0)
    lines += right.plot(
        steps, [record["grad_norm"] for record in records], color="C1", alpha=0.5, label="gradient norm"
    )
    left.set(title="Loss", xlabel="training step", ylabel="noise MSE; variational term in bits/dim")
    use_log_scale(left)
    right.set_ylabel("gradient norm (L2, before clipping)")
    left.grid(alpha=0.3)
    left.legend(lines, [line.get_label() for line in lines])


def newest_tenths(found: list[dict]) -> tuple[int, dict[str, list[float | None]]] | None:
    """Step of the newest validation, and its losses by tenth of the schedule for each key; None without one."""
    for record in reversed(found):
        tenths = {key: record[f"{key}_tenths"] for key in VALIDATED if f"{key}_tenths" in record}
        if any(loss is not None for losses in tenths.values() for loss in losses):
            return record["step"], tenths
    return None


def draw_tenths(axes, step: int, tenths: dict[str, list[float | None]]) -> None:
    """Validation losses by the middle of their tenth of the schedule."""
    for key, losses in tenths.items():
        weights, color = VALIDATED[key]
        values = [math.nan if loss is None else loss for loss in losses]  # a gap
        middles = [100 * k + 50 for k in range(len(values))]
        axes.plot(middles, values, color=color, marker=".", label=f"{weights} weights")
    axes.set(title=f"Validation loss by tenth of the schedule, step {step:,}", xlabel="timestep", ylabel="noise MSE")
    axes.set_xticks(range(0, 1001, 100))
    use_log_scale(axes)
    axes.grid(alpha=0.3)
    axes.legend()


def use_log_scale(axes) -> None:
    """A logarithmic y axis of the curves drawn so far, with plain numbers at its ticks, also within one decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=100) if high > 2 * low else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def save_figure(figure, path: Path) -> None:
    """Save a figure at 150 dpi, whole or not at all."""
    with files.whole_file(path, durable=False) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:])


def format_seconds(seconds: float) -> str:
    """2d 03:04:05, without the days when there are none."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock
