"""TensorBoard and Weights & Biases, beside metrics.jsonl and with its keys. Both packages are optional."""

import argparse
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import files, monitor
from runtime.config import RunConfig, flatten
from runtime.options import Parser, UserError


def add_options(parser: Parser) -> None:
    group = parser.add_argument_group("monitors, beside metrics.jsonl")
    group.add_argument("--tensorboard", action="store_true", help="write <results-dir>/tensorboard")
    group.add_argument("--use-wandb", action="store_true", help="log to Weights & Biases (WANDB_MODE=offline: locally)")
    group.add_argument("--wandb-project", default=None, help="its project (None: WANDB_PROJECT, else spiral-rope-dit)")
    group.add_argument("--wandb-entity", default=None, help="user or team of the project (None: your default)")


def check(args: argparse.Namespace) -> None:
    """Raise UserError when the options do not fit together, or what they need is not installed."""
    for name in ("wandb_project", "wandb_entity"):
        value = getattr(args, name)
        if value is not None and not args.use_wandb:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {value} given without --use-wandb; add --use-wandb, or leave {flag} out")
    try:
        if args.tensorboard:
            flag, package = "--tensorboard", "tensorboard"
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        if args.use_wandb:
            flag, package = "--use-wandb", "wandb"
            from wandb import init  # noqa: F401  a folder ./wandb alone imports, and lacks it
    except ImportError as error:
        raise UserError(f"{flag} needs the package {package} ({error}); run: pip install {package}") from error
    if args.use_wandb and args.dry_run is not None:  # a run logs in when it starts
        check_login()


def check_login() -> None:
    """Raise UserError where W&B would not start."""
    import wandb

    with starting_wandb():
        if wandb.setup().settings.mode not in ("offline", "disabled") and not wandb.login(prompt=False):
            raise wandb.Error("no API key")


@contextmanager
def starting_wandb() -> Iterator[None]:
    """Context in which whatever W&B, the network or the libraries between raise becomes a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"--use-wandb: W&B does not start ({error}); log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error


def open_trackers(
    args: argparse.Namespace, config: RunConfig, folder: Path, step: int
) -> list["TensorBoard | WeightsAndBiases"]:
    """The trackers that the command asks for; what they have of steps after this one is dropped. Raises UserError.

    Whatever else they raise later is for their caller to survive.
    """
    found = []
    if args.tensorboard:
        found.append(TensorBoard(folder, config, step))
    if args.use_wandb:
        project = args.wandb_project or os.environ.get("WANDB_PROJECT") or "spiral-rope-dit"
        found.append(WeightsAndBiases(folder, config, project, args.wandb_entity))
    return found


def scalars(record: dict) -> dict[str, float]:
    """A record of metrics.jsonl as numbers: entry k of a list becomes key/k, what is None is left out."""
    entries = {key: dict(enumerate(value)) if isinstance(value, list) else value for key, value in record.items()}
    return {key: value for key, value in flatten(entries, "/").items() if value is not None}


class TensorBoard:
    """Event files in <results-dir>/tensorboard."""

    name = "TensorBoard"

    def __init__(self, folder: Path, config: RunConfig, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        self.writer.add_text("run", monitor.run_name(config), step)

    def write(self, record: dict) -> None:
        for key, value in scalars(record).items():
            if key != "step":
                self.writer.add_scalar(key, value, record["step"])
        self.writer.flush()

    def write_image(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run, gone on with after an interruption: its id is in <results-dir>/wandb.json.

    W&B cannot take back what it has. When the run resumes before the last step that W&B knows, the steps up to it are
    not sent again. Raises UserError when W&B does not start.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, config: RunConfig, project: str, entity: str | None):
        import wandb

        stored = folder / "wandb.json"
        if not stored.exists():
            files.write_json(stored, {"id": uuid.uuid4().hex[:12], "project": project})
        with files.reading(repr(str(stored)), "remove it"):
            known = files.read_json(stored)
            run_id, project = str(known["id"]), str(known.get("project", project))
        with starting_wandb():
            self.run = wandb.init(
                project=project,
                entity=entity,
                dir=folder,
                id=run_id,
                resume="allow",
                name=monitor.run_name(config),
                group=monitor.group_name(config),
                config=config.to_dict(),
                settings=wandb.Settings(console="off"),  # the terminal is in log.txt
            )
        self.first = self.run.step  # 0 for a new run, else the first step that W&B does not have

    def write(self, record: dict) -> None:
        if record["step"] >= self.first:
            self.run.log(scalars(record), step=record["step"])

    def write_image(self, name: str, path: Path, step: int) -> None:
        import wandb

        if step >= self.first:
            self.run.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()
