"""The run's folder: locked against a second run, gone on with, saved, finished.

<results-dir>/ has checkpoints/, log.txt, metrics.jsonl, config.json, loss.png, samples/, report.html, and, once the run
has all its steps, finished.json.
"""

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from logging import Logger
from pathlib import Path

import torch

from runtime import checkpoint, distributed, files, monitor, options, pictures, report, trackers
from runtime.config import RunConfig, flatten
from runtime.options import UserError
from runtime.training import NonFiniteWatch, Trainer
from runtime.vae import VAE

NOT_STORED = ("dry_run", "planned")  # arguments that a run never has


def check_same(stored: dict | None, config: RunConfig, path: Path) -> None:
    """Raise UserError, naming what differs, unless model, data and recipe are the checkpoint's.

    The model is compared first, then the data: what follows from another model is not listed beside it.
    """
    if not isinstance(stored, dict):
        raise UserError(f"checkpoint {str(path)!r} has no config, so it cannot be resumed; use another --results-dir")
    before = RunConfig.from_dict(stored)
    old, new = flatten(before.to_dict()), flatten(config.to_dict())
    # Where weights came from, and what the fingerprints cover.
    ignored = ("vae.source", "data.classes", "validation.left_out")
    for what, sections in (
        ("another model", ("model", "image_size", "objective", "vae")),
        ("other data", ("data", "validation")),
        ("other settings", ("recipe",)),
    ):
        compared = {key: new.get(key) for key in {**old, **new} if key.split(".")[0] in sections}
        listed = options.differences(old, compared, ignored)
        if listed:
            raise UserError(
                f"checkpoint {str(path)!r} was trained with {what}: {listed}; repeat the run's own command, or use "
                "another --results-dir"
            )


def going_on_from(path: Path) -> AbstractContextManager:
    """Context in which what a checkpoint holds, whatever that is, is gone on with."""
    return files.reading(f"checkpoint {str(path)!r}", "it cannot be resumed: use another")


def step_of(state: dict, config: RunConfig, path: Path) -> int:
    """Step of a checkpoint. Raises UserError unless it is of a run with these settings."""
    with going_on_from(path):
        check_same(state.get("config"), config, path)
        return int(state["step"])


def is_finished(folder: Path, config: RunConfig, total_steps: int) -> bool:
    """Whether the run in this folder has all its steps; nothing is verified or locked.

    Raises UserError where the folder belongs to a run with other settings.
    """
    paths = checkpoint.training_checkpoints(folder / "checkpoints")
    if not (paths and (folder / "finished.json").exists()):
        return False
    try:
        state = checkpoint.load(paths[-1])
    except UserError:  # resuming will report it
        return False
    return step_of(state, config, paths[-1]) >= total_steps


def steps_done(folder: Path, config: RunConfig, report: Callable[[str], None]) -> int:
    """Step from which a run would go on in this folder, 0 for a fresh start; nothing is locked.

    Raises UserError as the resume of RunFolder does. A run that uses the folder is reported, and checkpoints that do
    not verify are.
    """
    with files.cannot_write(f"--results-dir {str(folder)!r}"):
        holder = files.holder_of(folder)
    try:
        refuse_second(folder, holder)
    except UserError as error:
        report(f"warning: {error}")
    path = checkpoint.latest(folder / "checkpoints", report)
    if path is None:
        return 0
    state = checkpoint.load(path)
    step = step_of(state, config, path)
    with torch.device("meta"):
        model = config.model.build()
    with going_on_from(path):
        checkpoint.check_training_state(state, model, path)
    return step


def recorded_warmup(folder: Path) -> int | None:
    """What --warmup-steps auto was when the run in this folder began; None where it was none, or is not known."""
    for path in reversed(checkpoint.training_checkpoints(folder / "checkpoints")):
        with suppress(UserError), going_on_from(path):  # resuming will report it
            state = checkpoint.load(path)
            steps = state["config"]["recipe"]["warmup_steps"]
            return steps if state["args"]["warmup_steps"] == "auto" and type(steps) is int else None
    return None


def refuse_second(folder: Path, holder: str | None) -> None:
    """Raise UserError where another process has the lock of a run's folder."""
    if holder is not None:
        raise UserError(f"--results-dir {str(folder)!r} is in use by {holder}; wait for it, end it, or choose another")


class RunFolder:
    """The folder of a run with these settings, in use from now on until close.

    args are the command's, which checkpoints and config.json record. Raises UserError when it cannot be written, or
    another process uses it.
    """

    def __init__(self, path: Path, config: RunConfig, args: argparse.Namespace):
        self.path, self.config = path, config
        self.args = {name: _as_stored(value) for name, value in vars(args).items() if name not in NOT_STORED}
        self.keep_checkpoints, self.max_bad_steps = args.keep_checkpoints, args.max_bad_steps
        self.ckpt_every = args.ckpt_every
        self.checkpoints, self.finished = path / "checkpoints", path / "finished.json"
        self._lock = files.FolderLock(path)
        distributed.on_main(self._take)
        self.logger: Logger = monitor.make_logger(path)
        self.saved = 0  # step of the newest checkpoint that is known to be whole; 0: none is
        self._superseded: list[Path] = []  # checkpoints to delete once the next one is there
        self._writer = checkpoint.BackgroundWriter(self.logger.info)  # in use on rank 0

    def _take(self) -> None:
        with files.cannot_write(f"--results-dir {str(self.path)!r}"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            refuse_second(self.path, self._lock.take())
            files.remove_partial(self.checkpoints)

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and give the folder back."""
        try:
            self.collect(wait=True)
        finally:
            self._writer.close()
            self._lock.close()

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies, the one being written included; see checkpoint.latest."""
        self.collect(wait=True)
        return checkpoint.latest(self.checkpoints, self.logger.info)

    def resume(self, trainer: Trainer) -> dict | None:
        """Load the newest checkpoint of the run, and return its args; None where there is none.

        Raises UserError when it is of another model, data set or recipe.
        """
        path = distributed.on_main(self.newest)
        if path is None:
            return None
        state = checkpoint.load(path)
        with going_on_from(path):
            check_same(state.get("config"), self.config, path)
            checkpoint.check_training_state(state, trainer.model, path)
            trainer.load(state)
            args = dict(state["args"])
        self.saved = trainer.step
        self._superseded = distributed.on_main(checkpoint.interruptions, self.checkpoints, self.ckpt_every)
        if trainer.watch.seen >= self.max_bad_steps:  # a run that a streak has ended gets all its tries again
            trainer.watch = NonFiniteWatch(trainer.device)
        self.logger.info(f"resumed from {path} at step {trainer.step:,}")
        return args

    def begin(self, device: torch.device) -> None:
        """Take back the mark that the run is finished, and write config.json."""
        with distributed.agreed_failure(f"--results-dir {str(self.path)!r}"):
            if distributed.is_main():
                self.finished.unlink(missing_ok=True)
                settings = {"args": self.args, **self.config.to_dict()}
                files.write_json(self.path / "config.json", settings | monitor.describe_environment(device))

    def open_metrics(self, args: argparse.Namespace, step: int) -> monitor.Metrics:
        """metrics.jsonl and the trackers, at a step. Raises UserError on all ranks."""
        with distributed.agreed_failure(f"--results-dir {str(self.path)!r}"):
            found = distributed.only_on_main(trackers.open_trackers, args, self.config, self.path, step)
            return monitor.Metrics(self.path, step, self.logger, found or ())

    def save(self, trainer: Trainer, required: bool, interrupted: bool = False) -> None:
        """Begin to write a checkpoint, unless that of this step is there; collect tells what became of it.

        One that the run ends with is required: it is waited for, and a failure is a UserError on all ranks. One that an
        interruption ends it with is deleted when the run has gone on to its next.
        """
        found = trainer.state()
        log = found.pop("log")
        args = self.args | {"precision": trainer.precision}  # what "auto" was
        state = {**found, "config": self.config.to_dict(), "args": args, "log": log}
        if interrupted:
            state[checkpoint.INTERRUPTED] = True

        def begin() -> None:
            self.collect(wait=True)
            if self.saved == trainer.step:
                return
            if interrupted:
                self._superseded = []  # until a regular one is there
            self._writer.begin(checkpoint.step_path(self.checkpoints, trainer.step), state)
            try:
                monitor.plot_loss(self.path)
            except OSError as error:
                self.logger.info(f"warning: {self.path / 'loss.png'} is left as it was: {error}")
            if required:
                self.collect(wait=True, required=True)

        distributed.on_main(begin)

    def collect(self, wait: bool = False, required: bool = False) -> None:
        """Log and tidy up after a checkpoint that was written meanwhile; with wait, after the one being written.

        A failure is a warning, or with required a UserError. Only rank 0 has any, and no other rank needs to know.
        """
        try:
            path = self._writer.finished(wait)
        except checkpoint.SaveError as error:
            newest = checkpoint.step_path(self.checkpoints, self.saved)
            whole = f"{newest} is whole" if os.path.exists(newest) else f"{self.checkpoints} has no earlier one"
            if required:
                raise UserError(
                    f"{error}; {whole}: free space or make the folder writable, and repeat the command"
                ) from error
            return self.logger.info(f"warning: {error}; training goes on, {whole}")
        if path is None:
            return
        self.saved = int(path.stem)
        self.logger.info(f"saved {path}")
        try:
            while self._superseded:
                self._superseded[-1].unlink(missing_ok=True)
                self._superseded.pop()
            checkpoint.prune(path, self.keep_checkpoints)
        except OSError as error:
            self.logger.info(f"warning: old checkpoints are left as they were: {error}")

    def draw_samples(self, trainer: Trainer, decoder: VAE | None, metrics: monitor.Metrics) -> None:
        """The grid of this step, made by rank 0 while the others wait. A failure is a warning; trackers get it too."""

        def draw() -> None:
            try:
                path = pictures.save_samples(
                    self.path, trainer.ema, self.config, decoder, trainer.step, trainer.device, trainer.precision
                )
            except (OSError, torch.OutOfMemoryError, UserError) as error:
                reason = options.first_line(error)
                return self.logger.info(
                    f"warning: no samples of step {trainer.step:,}: {reason}; training goes on (--sample-every 0: none)"
                )
            metrics.write_image("samples", path, trainer.step)

        distributed.on_main(draw)

    def has_samples(self, step: int) -> bool:
        """Whether the grid of a step is there, on all ranks."""
        return distributed.on_main(pictures.grid_path(self.path, step).exists)

    def write_report(self) -> None:
        """report.html anew. A failed write is a warning."""
        if distributed.is_main():
            try:
                report.write(self.path)
            except (OSError, UserError) as error:
                self.logger.info(f"warning: {self.path / 'report.html'} is left as it was: {error}")

    def finish(self, step: int) -> None:
        """Mark the run as finished and say where its results are."""
        with distributed.agreed_failure(f"--results-dir {str(self.path)!r}"):
            if distributed.is_main():
                files.write_json(self.finished, {"step": step})
        newest = checkpoint.step_path(self.checkpoints, step)
        self.logger.info(f"finished at step {step:,}: {newest}, loss curve {self.path / 'loss.png'}")


def _as_stored(value):
    """A value of plain types: paths as text."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
