"""TensorBoard and W&B: the keys and values of metrics.jsonl, one run over interruptions, failures that do no harm."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from conftest import stops

import train
from rope import RopeConfig
from runtime import monitor, trackers
from runtime.config import ModelConfig, Recipe, RunConfig, flatten

pytestmark = pytest.mark.usefixtures("tiny_commands")

ROPE = dict(use_rope=True, rope_rotate=2)


def records_of(results: Path) -> list[dict]:
    return monitor.read_metrics(results / "metrics.jsonl")


def events(results: Path):
    """Scalars {key: [(step, value), ...]} and image steps that TensorBoard shows for a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = EventAccumulator(str(results / "tensorboard"), size_guidance={"images": 0})
    seen.Reload()
    scalars = {key: [(event.step, event.value) for event in seen.Scalars(key)] for key in seen.Tags()["scalars"]}
    return scalars, {key: [event.step for event in seen.Images(key)] for key in seen.Tags()["images"]}


def test_tensorboard_shows_what_metrics_jsonl_holds(train_arguments, signal_after, tmp_path):
    results = tmp_path / "run"
    validation = dict(val_fraction=0.25, val_every=3)
    arguments = train_arguments(results, tensorboard=True, sample_every=3, log_every=1, **validation, **ROPE)
    signal_after(train.Trainer, "train_step", 6)
    stops(train.main, arguments)
    (results / "checkpoints" / "0000006.pt").unlink()  # as if killed: from step 4 on it has to go back
    train.main(arguments)
    scalars, images = events(results)
    flat = [trackers.scalars(record) for record in records_of(results)]
    assert [record["step"] for record in flat] == [1, 2, 3, 4, 5, 6, 7]
    keys = {key for record in flat for key in record} - {"step"}
    assert scalars.keys() == keys and {"loss", "lr", "images_per_second", "val_loss_ema", "val_loss_tenths/9"} <= keys
    for key in keys:
        expected = [(record["step"], record[key]) for record in flat if key in record]
        assert [step for step, _ in scalars[key]] == [step for step, _ in expected]
        assert [value for _, value in scalars[key]] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert images == {"samples": [3, 6, 7]}


def test_nested_values_and_lists_become_paths():
    nested = {"lr": 0.1, "model": {"rope": {"rotate": 4}, "size": [1, 2]}, "empty": {}}
    assert flatten(nested) == {"lr": 0.1, "model.rope.rotate": 4, "model.size": [1, 2], "empty": {}}
    record = {"step": 7, "loss": None, "val_loss": 0.5, "val_loss_tenths": [0.25, 0.75]}
    numbers = {"step": 7, "val_loss": 0.5, "val_loss_tenths/0": 0.25, "val_loss_tenths/1": 0.75}
    assert trackers.scalars(record) == numbers


def test_wandb_offline(train_arguments, tmp_path, monkeypatch):
    """W&B itself, without a network, in one run over an interruption."""
    import wandb
    from wandb.sdk.wandb_run import Run

    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB__SERVICE_WAIT": "300"}.items():
        monkeypatch.setenv(name, value)
    results, sent, log = tmp_path / "run", [], Run.log
    monkeypatch.setattr(Run, "log", lambda run, *args, **named: (sent.append((run, *args)), log(run, *args, **named)))
    for changes in ({"max_steps": 3, "wandb_project": "digits"}, {}):
        train.main(train_arguments(results, use_wandb=True, **ROPE, **changes))
        monkeypatch.setenv("WANDB_PROJECT", "another")  # the run stays where it began
    wandb.teardown()  # finish() returns before W&B's own process has written its file to the end
    stored = json.loads((results / "wandb.json").read_text())["id"]
    assert [file.stem for file in (results / "wandb").glob("offline-run-*/*.wandb")] == [f"run-{stored}"] * 2
    assert [numbers for _, numbers in sent] == [trackers.scalars(record) for record in records_of(results)]
    assert [numbers["step"] for _, numbers in sent] == [3, 6, 7]
    for run, _ in sent:
        assert (run.project, run.group, run.id) == ("digits", "DiT-XS/2 spiral-R2-clamp", stored)
        assert run.name == "DiT-XS/2 spiral-R2-clamp seed 0" and run.config["model"]["rope"]["rotate"] == 2


def test_project_is_the_options_else_the_shells(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "WeightsAndBiases", lambda folder, config, project, entity: project)
    args = argparse.Namespace(tensorboard=False, use_wandb=True, wandb_project=None, wandb_entity=None)
    monkeypatch.setenv("WANDB_PROJECT", "of the shell")
    assert trackers.open_trackers(args, None, tmp_path, 0) == ["of the shell"]
    args.wandb_project = "of the option"
    assert trackers.open_trackers(args, None, tmp_path, 0) == ["of the option"]


def test_names_tell_the_positions():
    for positions, rope in {
        "sin-cos": None,
        "axial": RopeConfig(),
        "spiral-R4-clamp": RopeConfig(rotate=4),
        "spiral-R4-exact-theta-100.0-same_theta-True": RopeConfig(4, theta=100.0, same_theta=True, border="exact"),
    }.items():
        config = RunConfig(ModelConfig("DiT-B/4", rope=rope), image_size=(256, 256), recipe=Recipe(global_seed=3))
        assert monitor.run_name(config) == f"DiT-B/4 {positions} seed 3"


def test_a_tracker_that_fails_is_dropped_with_one_warning(train_arguments, tmp_path, monkeypatch, capsys):
    calls = []

    def fail(self, record):
        calls.append(record["step"])
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(trackers.TensorBoard, "write", fail)
    train.main(train_arguments(tmp_path / "run", tensorboard=True, sample_every=None))
    output = capsys.readouterr().out
    assert output.count("warning: TensorBoard failed (the network is gone); training goes on without it") == 1
    assert calls == [3] and "finished at step 7" in output
    assert [record["step"] for record in records_of(tmp_path / "run")] == [3, 6, 7]


def test_wandb_that_does_not_start_is_refused(train_arguments, refused, tmp_path, monkeypatch):
    import wandb

    def fail(**_):
        raise wandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", fail)
    message = refused(train.main, train_arguments(tmp_path / "run", use_wandb=True), has_begun=True)
    assert message.startswith("--use-wandb: W&B does not start (no API key); ") and "WANDB_MODE=offline" in message
    assert not list(tmp_path.rglob("*.pt"))
    monkeypatch.setattr(wandb, "login", lambda prompt: prompt)
    message = refused(train.main, [*train_arguments(tmp_path / "run", use_wandb=True), "--dry-run"])
    assert message.startswith("--use-wandb: W&B does not start (no API key); log in with `wandb login`")
    wandb.teardown()  # of the settings that it has read, which the next test may have others of


def test_options_that_cannot_be_followed_are_refused(train_arguments, refused, tmp_path, monkeypatch):
    for module in ("tensorboard", "wandb"):  # as if they were not installed
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    args = train.parse_args(train_arguments(tmp_path / "run"))  # which asks for none
    assert trackers.open_trackers(args, None, tmp_path, 0) == []
    for given, parts in {
        ("tensorboard", True): ("--tensorboard needs the package tensorboard (", "; run: pip install tensorboard"),
        ("use_wandb", True): ("--use-wandb needs the package wandb (", "; run: pip install wandb"),
        ("wandb_project", "x"): ("--wandb-project x given without --use-wandb; ", "or leave --wandb-project out"),
        ("wandb_entity", "x"): ("--wandb-entity x given without --use-wandb; ", "or leave --wandb-entity out"),
    }.items():
        message = refused(train.main, train_arguments(tmp_path / "run", **dict([given])))
        assert message.startswith(parts[0]) and message.endswith(parts[1])
