"""What a run shows: log, metrics.jsonl, config.json, progress bar and loss plot, written by rank 0."""

import dataclasses
import io
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm.auto import tqdm

from runtime import files
from runtime.config import RunConfig
from runtime.distributed import is_main

REPOSITORY = Path(__file__).resolve().parent.parent
VALIDATED = {"val_loss": ("raw", "#d97706"), "val_loss_ema": ("EMA", "#c2408f")}  # key of a record: weights, colour
CURVES = {  # key of a record: panel of loss.png, unit, colour
    "grad_norm": ("Gradient norm", "L2, before clipping", "#2a9d6f"),
    "lr": ("Learning rate", "learning rate", "#8c6bb1"),
    "images_per_second": ("Speed", "images/s", "#9a7b4f"),
}
DPI = 150  # of every figure
TRAINING = "#3b82c4"  # colour of the training loss
GREY = "#7a7a7a"  # can be read on white and on black
ANY_GROUND = {  # matplotlib's settings for a picture without a ground of its own
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "axes.grid": True,
    "legend.framealpha": 0,
    "savefig.transparent": True,
}


class TqdmHandler(logging.StreamHandler):
    """Prints log lines above a progress bar in place of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        show(self.format(record))


def show(line: str) -> None:
    """Print a line above a progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class LogFile(logging.FileHandler):
    """log.txt: a line that the disk does not take is a warning in the terminal, which shows it anyway."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # it cannot be opened
            self.handleError(record)

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
    handlers: list[logging.Handler] = [TqdmHandler() if is_main() else logging.NullHandler()]
    if folder is not None and is_main():
        handlers.append(LogFile(folder / "log.txt", encoding="utf-8", delay=True))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


class Pace:
    """Images per second and remaining time."""

    def __init__(self):
        self.start, self.steps = time.perf_counter(), 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time does not count."""
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began

    def measure(self, batch: int, remaining: int) -> dict:
        seconds = max(time.perf_counter() - self.start, 1e-9) / max(self.steps, 1)
        self.start, self.steps = time.perf_counter(), 0
        return {"images_per_second": batch / seconds, "eta_seconds": remaining * seconds}


def progress_bar(total: int, initial: int = 0, unit: str = "step", description: str | None = None) -> tqdm:
    """A progress bar with rate and ETA, on a terminal and on rank 0 only."""
    hidden = not (is_main() and sys.stderr.isatty())
    return tqdm(total=total, initial=initial, unit=unit, desc=description, disable=hidden, dynamic_ncols=True)


class Metrics:
    """metrics.jsonl: one line a record, each step once. On resume, lines past the checkpoint are dropped.

    Trackers (see runtime/trackers.py) get the same records, and pictures as well. What fails is a warning, for a
    tracker its last.
    """

    def __init__(self, folder: Path, step: int, logger: logging.Logger, trackers: Sequence = ()):
        self.path, self.logger, self.trackers = folder / "metrics.jsonl", logger, list(trackers)
        if is_main():
            found = read_metrics(self.path, lambda text: logger.info(f"warning: {text}"))
            kept = [record for record in found if record["step"] <= step]
            files.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, record: dict) -> None:
        self._track("write", record)
        try:
            if is_main():
                self._append(json.dumps(record) + "\n")
        except OSError as error:
            self.logger.info(f"warning: step {record['step']} is missing in {self.path}: {error}")

    def _append(self, line: str) -> None:
        """Write a line, whole or not at all. Raises OSError."""
        size = self.path.stat().st_size
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError:
            os.truncate(self.path, size)
            raise

    def write_image(self, name: str, path: Path, step: int) -> None:
        """Hand a picture in a file to the trackers."""
        self._track("write_image", name, path, step)

    def _track(self, method: str, *values) -> None:
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*values)
            except Exception as error:  # whatever a network, a disk or the library makes it raise
                self.logger.info(f"warning: {tracker.name} failed ({error}); training goes on without it")
                self.trackers.remove(tracker)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        """Wait until the trackers have everything."""
        self._track("close")


def read_metrics(path: Path, report: Callable[[str], None] = warnings.warn) -> list[dict]:
    """Records of a metrics.jsonl. A line that is none is reported and left out.

    So is, without a word, a last line that a killed process left incomplete.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    incomplete, records = lines.pop(), []
    for number, line in enumerate(lines, 1):
        record = parse_record(line)
        if record is None:
            report(f"line {number} of {str(path)!r} is damaged and left out")
        else:
            records.append(record)
    last = parse_record(incomplete)
    return records if last is None else [*records, last]


def parse_record(line: bytes) -> dict | None:
    """A line of metrics.jsonl: a step, and numbers, None or lists of them by name; None for anything else."""
    try:
        record = json.loads(line) if len(line) < files.LARGEST_JSON else None
        values = [value for _, value in files.leaves(record)]
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return None
    return record if all(value is None or isinstance(value, int | float) for value in values) else None


def describe_environment(device: torch.device) -> dict:
    """Versions, device and git commit, for config.json."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: version_of(name) for name in ("torchvision", "timm", "diffusers", "numpy", "pillow")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"versions": versions, "device": f"{device.type}: {name}", "git_commit": git_commit()}


def group_name(config: RunConfig) -> str:
    """Model and positions, such as DiT-B/4 spiral-R4-clamp; RoPE settings that are not the default are appended."""
    model, rope = config.model.model, config.model.rope
    if rope is None:
        return f"{model} sin-cos"
    name = f"{model} spiral-R{rope.rotate}-{rope.border}" if rope.rotate else f"{model} axial"
    for field in dataclasses.fields(rope):
        value = getattr(rope, field.name)
        if field.name not in ("rotate", "border") and value != field.default:
            name += f"-{field.name}-{value}"
    return name


def run_name(config: RunConfig) -> str:
    """The group and the seed."""
    return f"{group_name(config)} seed {config.recipe.global_seed}"


def version_of(package: str) -> str | None:
    """The installed version, None without one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Commit of the working tree, with "+changes" when files differ from it; None outside git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def plot_loss(folder: Path) -> None:
    """Draw loss.png from metrics.jsonl, whole or not at all; nothing where there is no loss yet. Raises OSError."""
    records = read_metrics(folder / "metrics.jsonl")
    if any(record.get("loss") is not None for record in records):
        with files.whole_file(folder / "loss.png", durable=False) as file:
            draw_curves(records, file)


def draw_nowhere() -> None:
    """Draw curves of made-up records and keep nothing of it, to see what that takes."""
    draw_curves([{"step": step, **dict.fromkeys(("loss", *CURVES), 1.0)} for step in (1, 2)], io.BytesIO())


def draw_curves(records: list[dict], file: BinaryIO) -> None:
    """A PNG of every curve by training step and of the newest validation by timestep.

    It is the only picture of curves: report.html shows it, on light and on dark ground.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    validated = [record for record in records if any(f"{key}_tenths" in record for key in VALIDATED)]
    below = [["grad_norm", "tenths"], ["lr", "images_per_second"]] if validated else [list(CURVES)]
    heights = [3.8] + [2.6] * len(below)  # inches
    with rc_context(ANY_GROUND):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained")
        panels = figure.subplot_mosaic([["loss"] * len(below[0]), *below], height_ratios=heights)
        draw_losses(panels["loss"], records)
        for key, (title, unit, color) in CURVES.items():
            draw_curve(panels[key], *points(records, key), color=color)
            panels[key].set(title=title, ylabel=unit)
            if key != "grad_norm":
                panels[key].set_ylim(bottom=0)
        use_log_scale(panels["grad_norm"])
        if validated:
            draw_tenths(panels["tenths"], validated[-1])
        figure.savefig(file, dpi=DPI, format="png")


def points(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which records have a value under a key, and the values."""
    found = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    steps, values = np.array(found).reshape(-1, 2).T
    return steps, values


def draw_curve(axes, steps: np.ndarray, values: np.ndarray, color: str, label: str | None = None) -> None:
    """A curve by training step, its points marked where there are few."""
    from matplotlib.ticker import EngFormatter

    axes.plot(steps, values, color=color, label=label, linewidth=1.2, marker="." if len(steps) < 20 else None)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_losses(axes, records: list[dict]) -> None:
    """Training loss and validation losses by step."""
    draw_curve(axes, *points(records, "loss"), TRAINING, "training: noise MSE + variational term")
    for key, (weights, color) in VALIDATED.items():
        steps, losses = points(records, key)
        if len(steps):
            errors = np.array([record.get(f"{key}_se") or 0 for record in records if record.get(key) is not None])
            draw_curve(axes, steps, losses, color, f"validation: noise MSE ± standard error, {weights} weights")
            axes.fill_between(steps, losses - errors, losses + errors, color=color, alpha=0.25, linewidth=0)
    axes.set(title="Loss", ylabel="noise MSE; variational term in bits/dim")
    use_log_scale(axes)
    axes.legend()


def draw_tenths(axes, record: dict) -> None:
    """Losses of a validation by the middle of their tenth of the schedule."""
    for key, (weights, color) in VALIDATED.items():
        losses = np.array(record.get(f"{key}_tenths", []), dtype=float)  # None is a gap
        middles = 100 * np.arange(len(losses)) + 50
        axes.plot(middles, losses, color=color, linewidth=1.2, marker=".", label=f"{weights} weights")
    title = f"Validation loss by tenth of the schedule, step {record['step']:,}"
    axes.set(title=title, xlabel="timestep", ylabel="noise MSE", xticks=range(0, 1001, 200))
    use_log_scale(axes)
    axes.legend()


def use_log_scale(axes) -> None:
    """A logarithmic y axis of the curves drawn so far, with numbers written out at its ticks, also in one decade."""
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
        figure.savefig(file, dpi=DPI, format=path.suffix[1:])


def format_seconds(seconds: float) -> str:
    """2d 03:04:05, without the days when there are none."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock
