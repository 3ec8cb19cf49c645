"""Training: resume to the bit, stopping, non-finite steps, full disks, locks, two processes, dry runs."""

import copy
import itertools
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import two_processes
from conftest import command_line, contents, stops
from kill import Holder, assert_same_bits, assert_same_run, newest, read_metrics
from test_checkpoint import disk_full_at

import evaluate_loss
import train
from models import attend_written_out
from runtime import checkpoint, data, distributed, estimate, files, memory, monitor, vae
from runtime.config import ModelConfig, Recipe
from runtime.run import RunFolder
from runtime.training import Trainer, initial_model, learning_rate

pytestmark = pytest.mark.usefixtures("tiny_commands")
OF_RUN = dict(lr=0.01, ema_decay=0.5, use_rope=True, rope_rotate=2)  # the fixture's options
FULL = OSError(28, "No space left on device")
CPU = torch.device("cpu")


@pytest.fixture
def stop_after_step(signal_after):
    """Makes the run signal itself at the end of its count-th step from here."""
    return lambda count, number=signal.SIGTERM: signal_after(Trainer, "train_step", count, number)


@pytest.fixture
def stopped(train_arguments, stop_after_step, tmp_path, capsys):
    """Starts a run in tmp_path/run and stops it after so many steps; its folder."""

    def stop(steps: int, **changes) -> Path:
        stop_after_step(steps)
        stops(train.main, train_arguments(tmp_path / "run", **changes))
        assert f"stopped on request at step {steps}; repeat the same command to go on\n" in capsys.readouterr().out
        return tmp_path / "run"

    return stop


LINEAR = dict(lr_schedule="linear", warmup_steps=3, weight_decay=0.1, grad_clip=0.5)
VARIANTS = {
    "older version, validated": dict(flip=True, use_rope=True, rope_rotate=2, val_fraction=0.3),
    "constant, workers": dict(no_flip=True, num_workers=2, epochs=3, max_steps=None),
    "linear, accumulated": LINEAR | dict(grad_accum_steps=2, use_rope=True, rope_rotate=2, log_every=2),
}


def forget_settings(path: Path) -> None:
    """Make a checkpoint one of a time when some settings were not there yet: it goes on as if they had been."""
    state = copy.deepcopy(checkpoint.load(path))
    for section, name in (("rope", "border"), ("recipe", "grad_clip"), ("validation", "left_out"), ("vae", "source")):
        del (state["config"]["model"] if section == "rope" else state["config"])[section][name]
    checkpoint.save(path, state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    variant, train_arguments, stopped, stop_after_step, tmp_path
):
    changes = VARIANTS[variant]
    train.main(train_arguments(tmp_path / "whole", **changes))
    arguments = train_arguments(stopped(2, **changes), **changes)
    if "older version" in variant:
        forget_settings(checkpoint.step_path(tmp_path / "run" / "checkpoints", 2))
    for steps, number in ((3, signal.SIGUSR1), (1, signal.SIGINT)):  # at steps 5 and 6
        stop_after_step(steps, number)
        stops(train.main, arguments, number)
    assert newest(tmp_path / "run")["step"] == 6
    train.main(arguments)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_goes_on_when_its_length_grows(whole, train_arguments, tmp_path, capsys):
    """What a process that was killed meanwhile has left is cleaned up."""
    results = tmp_path / "grown"
    train.main(train_arguments(results, max_steps=3))
    assert (results / "finished.json").exists()
    for name in ("0000007.pt.partial", "0000003.pt.partial"):
        (results / "checkpoints" / name).write_bytes(b"half a checkpo")
    with open(results / "metrics.jsonl", "a") as file:  # a line past the checkpoint, and one that was cut off
        file.write('{"step": 6, "loss": 0.1, "grad_norm": 1, "lr": 1}\n{"step": 7, "lo')
    train.main(train_arguments(results, max_steps=7))
    assert "resumed from" in capsys.readouterr().out
    assert_same_run(results, whole)


def test_a_finished_run_on_cached_latents_loads_neither_model_nor_autoencoder(
    cache, train_arguments, tmp_path, monkeypatch, capsys
):
    arguments = train_arguments(tmp_path / "run", data_path=None, vae=None, latents_dir=cache, max_steps=2)
    train.main(arguments)
    for owner, name in ((vae, "VAE"), (train, "VAE"), (train, "initial_model")):
        monkeypatch.setattr(owner, name, None)
    before = contents(tmp_path)
    train.main(arguments)
    assert "nothing to do: " in capsys.readouterr().out and contents(tmp_path) == before


def test_a_finished_run_leaves_what_it_promises(run):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0000004.pt", "0000007.pt"]
    assert [record["step"] for record in read_metrics(run)] == [3, 6, 7]
    assert json.loads((run / "finished.json").read_text()) == {"step": 7}
    config, log = json.loads((run / "config.json").read_text()), (run / "log.txt").read_text()
    assert config["model"]["rope"]["rotate"] == 2 and config["recipe"]["lr"] == 0.01
    assert config["data"]["images"] == 24 and config["data"]["classes"] == ["ant", "bee", "käfer"]
    assert {"python", "torch", "diffusers"} <= config["versions"].keys() and config["device"].startswith("cpu")
    for line in (
        r"181,728 parameters",
        r"run: 7 steps of batch 8 on 1 x cpu",
        r"disk for 2 checkpoints: 5\.8\d MB",
        r"step 0000006: loss [\d.]+, gradient norm [\d.]+, [\d.]+ images/s, learning rate 0.01, ETA 00:00:\d\d",
    ):
        assert re.search(line, log)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


# The step


def test_logged_values_are_means_since_the_last_line(train_arguments, tmp_path, monkeypatch):
    losses, rates, step = [], [], Trainer.train_step

    def watched(self, batches):
        step(self, batches)
        losses.append(float(self.loss))
        rates.extend(group["lr"] for group in self.optimizer.param_groups)

    monkeypatch.setattr(Trainer, "train_step", watched)
    train.main(train_arguments(tmp_path / "run", lr_schedule="linear", warmup_steps=2, epochs=2))  # 6 steps
    assert rates == pytest.approx([0.0005, 0.001, 0.00075, 0.0005, 0.00025, 0])  # what the optimizer steps with
    first, second = read_metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-6)
    assert second["loss"] == pytest.approx(sum(losses[3:]) / 3, rel=1e-6)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert (first["lr"], second["lr"]) == (pytest.approx(0.00075), 0)  # step 3 of 6, 2 of them warm-up


def test_the_run_ends_with_what_comes_first(train_arguments):
    for changes, steps in (
        ({}, 1400 * 3),
        ({"epochs": 2}, 6),
        ({"max_steps": 10_000}, 10_000),
        ({"epochs": 2, "max_steps": 4}, 4),
        ({"epochs": 2, "max_steps": 40}, 6),
    ):
        args = train.parse_args(train_arguments(Path("unused"), **{"max_steps": None} | changes))
        assert train.total_steps(args, steps_per_epoch=3) == steps


def test_learning_rate(train_arguments):
    def recipe(total=12, **changes):
        return train.recipe_of(train.parse_args(train_arguments(Path("unused"), lr=2.0, **changes)), total)

    linear = recipe(lr_schedule="linear", warmup_steps=4)
    rates = [learning_rate(step, 12, linear) for step in range(1, 13)]
    assert rates[:4] == [0.5, 1, 1.5, 2]
    assert rates[4:] == pytest.approx([1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0])
    assert {learning_rate(step, 12, recipe()) for step in range(1, 13)} == {2.0}
    steps = {total: recipe(total, lr_schedule="linear", warmup_steps="auto").warmup_steps for total in (7, 250, 5000)}
    assert steps == {7: 0, 250: 25, 5000: 100}


def test_the_published_recipe_is_the_default():
    args = train.parse_args(["--data-path", "images"])
    expected = dict(model="DiT-XL/2", image_size=(256, 256), global_batch_size=256, global_seed=0, num_workers=4)
    expected |= dict(log_every=100, ckpt_every=50_000, lr=1e-4, lr_schedule="constant", warmup_steps=0, flip=True)
    expected |= dict(weight_decay=0, ema_decay=0.9999, grad_clip=None, keep_checkpoints=None, tf32=True, use_rope=None)
    assert {name: getattr(args, name) for name in expected} == expected
    assert train.DEFAULT_EPOCHS == 1400


@pytest.fixture
def make_job(train_arguments, tmp_path):
    """The plan of a run with these changes."""

    def make(**changes):
        return train.plan(train.parse_args(train_arguments(tmp_path / "run", **changes)), torch.device("cpu"))

    return make


def test_a_run_compiles_once_and_on_request_alone(make_job, train_arguments, compilations, tmp_path):
    """Learning rates change; samples of the average and validation run as they are."""
    assert not make_job().trainer().model.compiled
    changes = dict(lr_schedule="linear", warmup_steps=2, sample_every=4, val_fraction=0.3, val_every=3)
    train.main(train_arguments(tmp_path / "run", compile=True, **changes))
    assert compilations.frame_count == 1
    assert len(list((tmp_path / "run").glob("samples/0*.png"))) == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_is_written_out_in_bfloat16_training_alone(make_job, precision):
    """Of the weights that are trained; their average samples by the kernels."""
    trainer = make_job(precision=precision).trainer()
    for model, written_out in ((trainer.model, precision == "bf16"), (trainer.ema, False)):
        assert all((block.attn.attend is attend_written_out) == written_out for block in model.blocks)


def test_the_average_follows_the_weights(make_job):
    trainer = make_job(ema_decay=0.75).trainer()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    trainer.train_step([(pixels, torch.zeros(8, dtype=torch.long))])
    after = trainer.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, value in trainer.ema.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])


def test_micro_batches_add_up_to_the_whole_batch(make_job):
    found = []
    for micro_batches in (1, 2, 4):
        job = make_job(grad_accum_steps=micro_batches)
        trainer, batches = job.trainer(), data.EpochBatches(24, 8, 0, 0, micro_batches)
        with data.open_loader(job.dataset, batches, 0, job.device) as loader, two_processes.constant_noise():
            trainer.train_step([next(loader) for _ in range(micro_batches)])
        found.append((trainer.loss, trainer.model.final_layer.linear.weight.grad))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], atol=1e-7, rtol=1e-5)


def test_bf16_multiplies_in_bfloat16_and_keeps_everything_else_in_float32(train_arguments, tmp_path, monkeypatch):
    kept, predicted, update, predict = [], [], Trainer.update, Trainer.predict

    def watched(self):
        kept.extend([self.loss.dtype, *(parameter.grad.dtype for parameter in self.parameters)])
        update(self)

    def seen(self, *args, **labels):
        predicted.append(predict(self, *args, **labels))
        return predicted[-1]

    monkeypatch.setattr(Trainer, "update", watched)
    monkeypatch.setattr(Trainer, "predict", seen)
    train.main(train_arguments(tmp_path / "run", precision="bf16", max_steps=2, use_rope=True, rope_rotate=2))
    assert [out.dtype for out in predicted] == [torch.bfloat16] * 2
    state = newest(tmp_path / "run")
    moments = [value for slots in state["opt"]["state"].values() for value in slots.values()]
    kept += [tensor.dtype for tensor in (*state["model"].values(), *state["ema"].values(), *moments)]
    assert len(kept) > 100 and set(kept) == {torch.float32}


def test_every_step_and_micro_batch_has_noise_of_its_own(train_arguments, tmp_path, monkeypatch):
    drawn, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **kw: drawn.append(randint(*args, **kw)) or drawn[-1])
    for seed in (0, 1):
        train.main(train_arguments(tmp_path / f"run {seed}", max_steps=3, grad_accum_steps=2, global_seed=seed))
    assert len(drawn) == 12 and len({tuple(t.tolist()) for t in drawn}) == 12


# Out of disk


@pytest.fixture
def full_disk_at(monkeypatch):
    """Makes the disk fill up while the checkpoint of a step is written."""
    fsync = os.fsync

    def fail(step: int) -> None:
        def full(descriptor):
            if f"{step:07d}.pt" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise FULL
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of open files come from /proc")
    return fail


def cannot_be_opened(monkeypatch, folder: Path) -> None:
    """Make a folder one of a disk that has been mounted read-only, for root too."""

    def opened(path, *mode):
        if Path(path).parent == folder:
            raise OSError(30, "Read-only file system")
        return open(path, *mode)

    monkeypatch.setattr(files, "open", opened, raising=False)


MISHAPS = {"full": FULL, "vanished": "[Errno 2] No such file or directory: ", "read-only": "[Errno 30] Read-only file"}


@pytest.fixture
def mishap(monkeypatch, full_disk_at):
    """Makes something happen, as step 3 ends, to the folder of a run's checkpoints; "full" concerns one of them."""

    def happen(what: str, results: Path, step: int) -> None:
        train_step, folder = Trainer.train_step, results / "checkpoints"

        def then(self, batches):
            train_step(self, batches)
            if self.step == 3 and what == "vanished":
                shutil.rmtree(folder)
            if self.step == 3 and what == "read-only":
                cannot_be_opened(monkeypatch, folder)

        monkeypatch.setattr(Trainer, "train_step", then)
        if what == "full":
            full_disk_at(step)

    return happen


@pytest.mark.parametrize("what", MISHAPS)
def test_a_checkpoint_that_cannot_be_written_in_mid_run_is_a_warning(what, train_arguments, mishap, tmp_path, capsys):
    results = tmp_path / "run"
    mishap(what, results, step=4)
    arguments, path = train_arguments(results, ckpt_every=2), results / "checkpoints" / "0000004.pt"
    if what == "full":  # for a while
        train.main(arguments)
        output = capsys.readouterr().out
        assert sorted(file.name for file in path.parent.iterdir()) == ["0000002.pt", "0000006.pt", "0000007.pt"]
        for file in path.parent.iterdir():
            checkpoint.load(file, verify=True)
    else:
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments)
        output, errors = capsys.readouterr()
        whole = f"{path.parent} has no earlier one" if what == "vanished" else f"{path.with_stem('0000002')} is whole"
        end = f"; {whole}: free space or make the folder writable, and repeat the command\n"
        assert stopped.value.code == 2 and errors.count("\n") == 1 and errors.endswith(end)
        assert f"{str(path.with_stem('0000007'))!r} could not be written: {MISHAPS[what]}" in errors
        assert [record["step"] for record in read_metrics(results)] == [3, 6, 7]
    warning = f"warning: checkpoint {str(path)!r} could not be written: {MISHAPS[what]}"
    # At the step after the write has failed: on a slow machine not before the next checkpoint, which waits for it.
    assert warning in output and output.index(warning) < output.index("step 0000007: ")
    goes_on = "has no earlier one" if what == "vanished" else "0000002.pt is whole"
    assert f"; training goes on, {path.parent}" in output and goes_on in output


def test_a_full_disk_at_the_end_leaves_what_was_there(whole, train_arguments, full_disk_at, refused, tmp_path):
    full_disk_at(7)
    path, arguments = tmp_path / "run" / "checkpoints" / "0000007.pt", train_arguments(tmp_path / "run")
    message = refused(train.main, arguments, has_begun=True)
    assert message == (
        f"checkpoint {str(path)!r} could not be written: {FULL}; {path.with_stem('0000004')} is whole: free space or "
        "make the folder writable, and repeat the command"
    )
    assert [file.name for file in path.parent.iterdir()] == ["0000004.pt"]
    assert not (tmp_path / "run" / "finished.json").exists()
    full_disk_at(99)
    train.main(arguments)
    assert_same_run(tmp_path / "run", whole)


def test_a_stop_right_after_a_failed_write_tries_again(train_arguments, full_disk_at, signal_after, refused, tmp_path):
    full_disk_at(4)
    signal_after(RunFolder, "save", 1)
    message = refused(train.main, train_arguments(tmp_path / "run"), has_begun=True)
    assert "0000004.pt' could not be written" in message


def test_a_disk_too_full_for_metrics_and_plots_is_survived(train_arguments, tmp_path, monkeypatch, capsys):
    append, calls = monitor.Metrics._append, []

    def limited(self, line):
        calls.append(line)
        with disk_full_at(self.path.stat().st_size + 10) if len(calls) == 2 else nullcontext():
            append(self, line)

    def full(_):
        raise FULL

    monkeypatch.setattr(monitor.Metrics, "_append", limited)
    monkeypatch.setattr(monitor, "plot_loss", full)
    train.main(train_arguments(tmp_path / "run"))
    output, path = capsys.readouterr().out, tmp_path / "run" / "metrics.jsonl"
    assert f"warning: step 6 is missing in {path}: [Errno 27] File too large" in output
    assert "loss.png is left as it was: [Errno 28] No space left on device" in output
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [3, 7]
    assert newest(tmp_path / "run")["step"] == 7


# Beside training


@pytest.fixture
def slow_write(monkeypatch):
    """Lets the checkpoint of a step be written when a later step ends, and not before; returns steps of begin."""
    save, train_step, steps, began = torch.save, Trainer.train_step, [0], []
    changed = threading.Condition()

    def stepping(self, batches):
        train_step(self, batches)
        with changed:
            steps.append(self.step)
            changed.notify_all()

    def slow(until: dict[int, int]) -> list[int]:
        def saving(state, file):
            began.append(steps[-1])
            with changed:
                assert changed.wait_for(lambda: steps[-1] >= until.get(state["step"], 0), timeout=60)
            save(state, file)

        monkeypatch.setattr(torch, "save", saving)
        return began

    monkeypatch.setattr(Trainer, "train_step", stepping)
    return slow


def test_training_goes_on_while_a_checkpoint_is_written(whole, train_arguments, slow_write, tmp_path):
    """It holds the bits of its step; and the log tells of it at the step after it is there."""
    began = slow_write({4: 6})
    train.main(train_arguments(tmp_path / "run"))
    assert len(began) == 2
    assert_same_run(tmp_path / "run", whole)
    one, other = (checkpoint.load(root / "checkpoints" / "0000004.pt") for root in (tmp_path / "run", whole))
    for key in ("model", "ema", "opt", "step", "config", "log"):
        assert_same_bits(one[key], other[key])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.index("step 0000006: ") < log.index("saved ")


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(
    whole, train_arguments, slow_write, stop_after_step, monkeypatch, tmp_path
):
    """The signal comes two steps after the write began, which takes a while yet; then comes that of the stop."""
    slow_write({4: 6})
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (time.sleep(0.3 * (names[1].suffix == ".pt")), replace(*names)))
    stop_after_step(6)
    arguments = train_arguments(tmp_path / "run")
    stops(train.main, arguments)
    log = (tmp_path / "run" / "log.txt").read_text()
    places = [log.index(text) for text in ("0000004.pt\n", "0000006.pt\n", "stopped on request at step 6")]
    assert places == sorted(places)
    train.main(arguments)
    assert_same_run(tmp_path / "run", whole)


def test_where_no_copy_fits_training_waits_and_says_so_once(
    whole, train_arguments, slow_write, monkeypatch, tmp_path, capsys
):
    began = slow_write({})
    monkeypatch.setattr(memory, "available", lambda: 2_900_000)
    train.main(train_arguments(tmp_path / "run", ckpt_every=2))
    line = "training waits while checkpoints are written: a copy takes 2.91 MB of memory, 2.9 MB are free\n"
    assert capsys.readouterr().out.count(line) == 1 and began == [2, 4, 6, 7]
    assert_same_run(tmp_path / "run", whole)


def test_whatever_the_writing_thread_meets_is_not_lost(train_arguments, monkeypatch, tmp_path):
    def broken(*_):
        raise ValueError("not what a disk says")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not what a disk says"):
        patch.setattr(torch, "save", broken)
        train.main(train_arguments(tmp_path / "run", max_steps=50))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    train.main(train_arguments(tmp_path / "run", max_steps=5))  # nothing was left locked
    assert newest(tmp_path / "run")["step"] == 5


# Which checkpoint


def test_checkpoints_of_an_interruption_go_when_the_next_regular_one_is_there(
    whole, train_arguments, stopped, stop_after_step, tmp_path
):
    """Those between which the run was stopped are all there until then; the last of a shorter run stays."""
    names = lambda: sorted(file.stem[-1] for file in (tmp_path / "run" / "checkpoints").iterdir())  # noqa: E731
    arguments = train_arguments(stopped(2))
    assert names() == ["2"]
    for more, left in ((1, ["2", "3"]), (2, ["4", "5"])):
        stop_after_step(more)
        stops(train.main, arguments)
        assert names() == left
    train.main(arguments)
    assert names() == ["4", "7"]
    assert_same_run(tmp_path / "run", whole)
    train.main([*arguments, "--max-steps=9"])
    assert names() == ["4", "7", "8", "9"]


def test_another_precision_on_resume_is_a_warning(train_arguments, stopped, capsys):
    """Also where both were chosen automatically, for other hardware."""
    results = stopped(2, precision="auto" if distributed.resolve_precision("auto", CPU) == "bf16" else "bf16")
    train.main(train_arguments(results, max_steps=3))
    warning = "warning: this run was trained in bf16 so far, and goes on in fp32; --precision bf16 goes on as before"
    assert capsys.readouterr().out.count(warning) == 1
    train.main(train_arguments(results, max_steps=4))
    assert "trained in" not in capsys.readouterr().out


def test_a_damaged_checkpoint_is_skipped_and_counts_for_nothing(
    whole, train_arguments, stopped, stop_after_step, capsys
):
    """One of a later step must not push out what the run goes on to write, either."""
    results = stopped(6, keep_checkpoints=2)  # checkpoints of steps 4 and 6
    path = results / "checkpoints" / "0000006.pt"
    path.write_bytes(path.read_bytes()[:1000])
    stop_after_step(1)
    arguments = train_arguments(results, keep_checkpoints=1)
    for went_on, run in (
        ("would go on from step 4", lambda: train.main([*arguments, "--dry-run"])),
        ("0000004.pt at step 4", lambda: stops(train.main, arguments)),
    ):
        run()
        output = capsys.readouterr().out
        assert f"warning: skipped a checkpoint: checkpoint {str(path)!r} cannot be read (" in output
        assert went_on in output
    assert sorted(file.name for file in path.parent.iterdir()) == ["0000005.pt", "0000006.pt"]
    train.main(train_arguments(results, keep_checkpoints=2))
    assert "0000005.pt at step 5" in capsys.readouterr().out
    assert_same_run(results, whole)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(train_arguments, stopped, refused):
    path = stopped(2) / "checkpoints" / "0000002.pt"
    path.write_bytes(path.read_bytes()[:1000])
    for extra in (["--dry-run"], []):
        assert refused(train.main, [*train_arguments(path.parent.parent), *extra], has_begun=not extra) == (
            f"no checkpoint in {str(path.parent)!r} can be read; restore one, or remove them to start afresh"
        )
    assert path.stat().st_size == 1000


# One run in a folder, one recipe in a run


def test_a_second_run_in_the_same_folder_is_refused(run, train_arguments, refused, tmp_path, capsys, monkeypatch):
    results = shutil.copytree(run, tmp_path / "run")
    holder = Holder(results)
    arguments = train_arguments(results, **OF_RUN, max_steps=8)
    message = refused(train.main, arguments)
    assert (
        message == f"--results-dir {str(results)!r} is in use by {holder.name}; wait for it, end it, or choose another"
    )
    before = contents(results)
    with monkeypatch.context() as patch:
        patch.setattr(files.fcntl, "lockf", None)  # a look takes no lock, not for an instant
        train.main([*arguments, "--dry-run"])
    output = capsys.readouterr().out
    assert f"warning: {message}\n" in output and "would go on from step 7" in output and contents(results) == before
    holder.release()
    train.main([*arguments, "--dry-run"])
    assert "in use" not in capsys.readouterr().out
    train.main(arguments)
    assert newest(results)["step"] == 8


def test_a_longer_run_keeps_its_automatic_warm_up(train_arguments, refused, stop_after_step, tmp_path):
    arguments = train_arguments(tmp_path / "run", max_steps=40, warmup_steps="auto", ckpt_every=50)
    stop_after_step(2)
    stops(train.main, arguments)
    train.main([*arguments, "--max-steps=3"])  # of which a tenth is none
    stop_after_step(1)
    stops(train.main, [*arguments, "--max-steps=60"])
    state = newest(tmp_path / "run")
    assert (state["step"], state["config"]["recipe"]["warmup_steps"], state["args"]["warmup_steps"]) == (4, 4, "auto")
    assert read_metrics(tmp_path / "run")[0]["lr"] == pytest.approx(0.001 * 3 / 4)
    assert "recipe.warmup_steps 4 (now 6)" in refused(train.main, [*arguments, "--warmup-steps=6"], has_begun=True)


def test_another_model_data_set_or_recipe_is_refused_by_name(run, train_arguments, image_folder, refused, tmp_path):
    """The model is compared first, then the data: what follows from another one is not listed beside it."""
    results, others = shutil.copytree(run, tmp_path / "run"), shutil.copytree(image_folder, tmp_path / "others")
    (others / "bee" / "01.png").rename(others / "bee" / "99.png")
    start = f"checkpoint {str(results / 'checkpoints' / '0000007.pt')!r} was trained with "
    end = "; repeat the run's own command, or use another --results-dir"
    for changes, expected in (
        (dict(lr=0.02), "other settings: recipe.lr 0.01 (now 0.02)"),
        (dict(lr=0.02, max_steps=7), "other settings: recipe.lr 0.01 (now 0.02)"),
        (dict(no_flip=True), "other settings: recipe.flip True (now False)"),
        (dict(lr=1, grad_clip=1), "other settings: recipe.lr 0.01 (now 1.0), recipe.grad_clip None (now 1.0)"),
        (dict(global_seed=1), "other settings: recipe.global_seed 0 (now 1)"),
        (dict(global_batch_size=4), "other settings: recipe.global_batch_size 8 (now 4)"),
        (dict(lr=0.02, rope_rotate=4), "another model: model.rope.rotate 2 (now 4)"),
        (dict(rope_border="exact", data_path=others), "another model: model.rope.border 'clamp' (now 'exact')"),
        (dict(num_classes=5, val_fraction=0.3), "another model: model.num_classes 3 (now 5)"),
        (dict(model="DiT-XS/4"), "another model: model.model 'DiT-XS/2' (now 'DiT-XS/4')"),
        (dict(use_rope=None, rope_rotate=None), "another model: model.rope.rotate 2 (now None), "),
        (dict(lr=0.02, data_path=others), "other data: data.fingerprint "),
    ):
        message = refused(train.main, train_arguments(results, **OF_RUN | {"max_steps": 9} | changes))
        assert message.startswith(start + expected) and message.endswith(end)
        assert expected.endswith(" ") or message == start + expected + end


def test_another_vae_is_refused_and_a_moved_folder_is_not(
    run, image_folder, vae_folder, make_vae, train_arguments, refused, tmp_path, capsys
):
    moved, copied_vae = shutil.copytree(image_folder, tmp_path / "moved"), shutil.copytree(vae_folder, tmp_path / "vae")
    before = contents(run)
    train.main(train_arguments(run, data_path=moved, vae=copied_vae, **OF_RUN))
    assert capsys.readouterr().out.endswith(f"nothing to do: {run} has all of its 7 steps\n")
    message = refused(train.main, train_arguments(run, vae=make_vae(seed=1), **OF_RUN))
    assert "was trained with another model: vae.sha256" in message and "data." not in message
    assert contents(run) == before


@pytest.mark.parametrize("extra", ["--dry-run", "--max-steps=7", "--max-steps=8"])
def test_a_config_that_is_not_ours_is_one_line(extra, run, train_arguments, refused, tmp_path):
    results = shutil.copytree(run, tmp_path / "run")
    path = results / "checkpoints" / "0000007.pt"
    state = checkpoint.load(path)
    checkpoint.save(path, state | {"config": state["config"] | {"vae": {"colour": "red"}}})
    assert refused(train.main, [*train_arguments(results, **OF_RUN), extra]).startswith(
        f"checkpoint {str(path)!r} cannot be read (TypeError: VAEConfig.__init__() got an unexpected keyword argument "
    )


# Steps that are not finite


def poison(monkeypatch, steps) -> list:
    """Make the loss not a number in some steps (counted from 0); returns a list that gets the trainer."""
    loss, trainers = Trainer.micro_batch_loss, []

    def micro_batch_loss(self, inputs, labels):
        trainers.append(self)
        return loss(self, inputs, labels) + (math.inf if self.step in steps else 0)  # its gradient is finite

    monkeypatch.setattr(Trainer, "micro_batch_loss", micro_batch_loss)
    return trainers


def test_a_non_finite_step_changes_neither_weights_nor_optimizer(train_arguments, tmp_path, monkeypatch):
    states, update = [], Trainer.update

    def watched(self):
        parts = (self.model, self.optimizer, self.ema)
        before = copy.deepcopy([part.state_dict() for part in parts])
        update(self)
        states.append((before, copy.deepcopy([part.state_dict() for part in parts])))

    monkeypatch.setattr(Trainer, "update", watched)
    poison(monkeypatch, {0, 3})
    train.main(train_arguments(tmp_path / "run", grad_clip=1, max_steps=6))
    for step, (before, after) in enumerate(states):
        equal = all(torch.equal(before[0][name], after[0][name]) for name in before[0])
        assert equal == (step in (0, 3))
        if step == 3:  # in step 0 the optimizer's state appears, as zeros
            assert_same_bits(before[1]["state"], after[1]["state"])
        assert all(torch.isfinite(value).all() for value in after[2].values())
    assert [record["skipped"] for record in read_metrics(tmp_path / "run")] == [1, 1]
    assert all(math.isfinite(record["loss"]) for record in read_metrics(tmp_path / "run"))
    assert "skipped 1 non-finite steps" in (tmp_path / "run" / "log.txt").read_text()


def test_too_many_non_finite_steps_in_a_row_end_the_run(train_arguments, refused, tmp_path, monkeypatch):
    trainers = poison(monkeypatch, set(range(4, 99)))
    arguments = train_arguments(tmp_path / "run", max_steps=50, max_bad_steps=3, log_every=2)
    path = tmp_path / "run" / "checkpoints" / "0000004.pt"
    message = refused(train.main, arguments, has_begun=True)
    assert message.startswith("loss or gradient not finite in 3 steps in a row, the last at step 7 (loss inf); ")
    assert f"the newest checkpoint is {path}: " in message and "--precision fp32" in message and "--lr" in message
    stored = checkpoint.load(path, verify=True)
    assert_same_bits(dict(stored["model"]), dict(trainers[-1].model.state_dict()))
    last = {"step": 6, "epoch": 2, "loss": None, "grad_norm": None, "lr": 0.001, "skipped": 2}
    assert read_metrics(tmp_path / "run")[-1] == last


def test_a_streak_of_non_finite_steps_lasts_over_a_resume(train_arguments, stopped, refused, monkeypatch):
    poison(monkeypatch, set(range(2, 99)))
    results = stopped(4, max_bad_steps=4)  # two bad steps of four
    message = refused(train.main, train_arguments(results, max_bad_steps=4), has_begun=True)
    assert message.startswith("loss or gradient not finite in 4 steps in a row, the last at step 6 (loss inf)")


def test_a_run_that_bad_steps_ended_gets_all_its_tries_again(train_arguments, refused, tmp_path, monkeypatch):
    """A checkpoint may fall on the very step that ended the run. Good steps between bad ones end the streak."""
    poison(monkeypatch, {0, 2, 3, 4, 6})
    arguments = train_arguments(tmp_path / "run", max_bad_steps=2)  # ended after step 4, which has a checkpoint
    assert "not finite in 2 steps in a row, the last at step 4" in refused(train.main, arguments, has_begun=True)
    assert newest(tmp_path / "run")["log"]["streak"] == 2
    train.main(arguments)
    assert newest(tmp_path / "run")["step"] == 7


def test_an_image_that_turns_out_unreadable_loses_nothing(whole, train_arguments, image_folder, refused, tmp_path):
    images = data.ImageList(shutil.copytree(image_folder, tmp_path / "data"))
    epoch = list(itertools.islice(data.EpochBatches(24, 8, 0), 3))
    victim = images.path(epoch[2][0][1])  # first met in the third step
    original = victim.read_bytes()
    victim.write_bytes(original[: len(original) // 2])
    arguments = train_arguments(tmp_path / "run", data_path=images.root)
    message = refused(train.main, arguments, has_begun=True)
    assert message.startswith(f"image {str(victim)!r} cannot be read (")
    assert message.endswith("; everything up to step 2 is saved: repeat the command to go on")
    victim.write_bytes(original)
    train.main(arguments)
    assert_same_run(tmp_path / "run", whole)


def test_a_run_goes_on_without_an_unreadable_image(train_arguments, image_folder, refused, tmp_path, capsys):
    """The remedy that the message names works, and the images that others stand in for are in log and checkpoint."""
    images = data.ImageList(shutil.copytree(image_folder, tmp_path / "data"))
    victim = images.path(next(iter(data.EpochBatches(24, 8, 0, start_step=2)))[0][1])
    victim.write_bytes(b"damaged")
    arguments = train_arguments(tmp_path / "run", data_path=images.root)
    assert "; repair it, or pass --skip-unreadable; everything" in refused(train.main, arguments, has_begun=True)
    train.main([*arguments, "--skip-unreadable"])
    printed = capsys.readouterr().out
    assert "at step 2\n" in printed and "finished at step 7" in printed
    assert printed.count(f"warning: image {str(victim)!r} cannot be read; another one stands in for it\n") == 1
    train.main(train_arguments(tmp_path / "whole", data_path=images.root, skip_unreadable=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    for results in ("run", "whole"):
        assert newest(tmp_path / results)["log"]["skipped"] == [str(victim)]
    train.main(train_arguments(tmp_path / "whole", data_path=images.root, skip_unreadable=True, max_steps=8))
    assert "stands in" not in capsys.readouterr().out.split("finished at step 7")[-1]  # told before


# Dry runs


def test_a_dry_run_checks_everything_and_writes_nothing(train_arguments, stopped, refused, tmp_path, capsys):
    arguments = [*train_arguments(tmp_path / "new" / "run"), "--dry-run"]
    train.main(arguments)
    output = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "181,728 parameters, sin-cos positions" in output and "run: 7 steps of batch 8 on 1 x cpu" in output
    assert output.endswith(f"dry run: would start in {tmp_path / 'new' / 'run'}; nothing was written\n")
    assert "--global-batch-size 25 is more than" in refused(train.main, [*arguments, "--global-batch-size=25"])
    results = stopped(5)
    before = contents(tmp_path)
    arguments = [*train_arguments(results), "--dry-run"]
    train.main(arguments)
    assert f"would go on from step 5 in {results}; nothing was written" in capsys.readouterr().out
    train.main([*arguments, "--max-steps=3"])
    assert "nothing to do: the run has 5 of 3 steps" in capsys.readouterr().out
    assert contents(tmp_path) == before
    assert "recipe.lr 0.001 (now 0.5)" in refused(train.main, [*arguments, "--lr=0.5"])


def test_a_dry_run_refuses_what_the_run_would(train_arguments, stopped, refused, tmp_path, monkeypatch):
    """With the same words, for what else a user would learn from its start or from its first checkpoint."""
    results = stopped(5)
    arguments, path = train_arguments(results), checkpoint.step_path(results / "checkpoints", 5)
    state = checkpoint.load(path)
    moments = {key: values for key, values in state["opt"]["state"].items() if key > 0}

    def refusals(*more, has_begun: bool = False) -> str:
        messages = {refused(train.main, [*arguments, *more, "--dry-run"])}
        messages.add(refused(train.main, [*arguments, *more], has_begun))
        (message,) = messages
        return message

    with monkeypatch.context() as patch:
        patch.setenv("CXX", "none")
        assert refusals("--compile") == (
            "compiling on the CPU needs the C++ compiler 'none'; install it, or leave --compile out"
        )
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
        assert "cannot be written (it needs 2.91 MB and 1 kB are free" in refusals()
    checkpoint.save(path, dict(state) | {"opt": dict(state["opt"]) | {"state": moments}})
    assert "has optimizer states of" in refusals(has_begun=True)


def test_a_dry_run_of_what_an_earlier_command_makes(train_arguments, refused, tmp_path, capsys):
    latents, changes, planned = tmp_path / "latents", dict(data_path=None, use_rope=True), ["--dry-run", "--planned=2"]
    arguments = train_arguments(tmp_path / "run", latents_dir=latents, **changes)
    train.main([*arguments, *planned])
    assert f"{latents} is not there yet" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    values = {"image-size": 40, "global-batch-size": 9, "rope-rotate": 3, "results-dir": tmp_path / "file", "lr": 0}
    for option, value in values.items():
        message = refused(train.main, [*arguments, f"--{option}", value, *planned])
        assert f"--{option}" in message and str(value) in message
    assert "is not a finished latent cache" in refused(train.main, [*arguments, "--dry-run"])
    train.main([*train_arguments(tmp_path / "run"), *planned])
    assert "run: 7 steps of batch 8 on 2 x cpu" in capsys.readouterr().out


def test_a_measured_dry_run_adds_up(train_arguments, stopped, tmp_path, monkeypatch, capsys):
    """Its time is what the printed parts sum up to, and they count what the rest of the run really does."""
    options = dict(sample_every=3, val_fraction=0.3, val_every=3)
    results, steps, step = stopped(2, **options), [], Trainer.train_step
    process = SimpleNamespace(create_time=lambda: time.time() - 2)
    monkeypatch.setattr(estimate, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(Trainer, "train_step", lambda self, batches: (steps.append(batches), step(self, batches)))
    copies, copy_of = [], checkpoint.HostCopy.of
    copying = lambda self, state: copies.append(len(steps)) or copy_of(self, state)  # noqa: E731
    monkeypatch.setattr(checkpoint.HostCopy, "of", copying)
    before = contents(tmp_path)
    train.main([*train_arguments(results, **options), "--dry-run=3"])
    assert contents(tmp_path) == before
    assert len(steps) == estimate.WARM_UP + 3 and steps[0][0][0].shape == (8, 3, 32, 32)
    assert copies == [estimate.WARM_UP, len(steps)]  # kept beside the steps that count, as in a run
    output = capsys.readouterr().out
    hours, listed = re.search(r"time: ([\d.e-]+) hours \([\d:]+\) = (.*) start-up", output).groups()
    parts = re.findall(r"([\d,]+) ([a-z ]+) of (?:about )?([\d.e-]+) s", listed)
    start_up = float(re.search(r"start-up (\d+) s", output)[1])
    assert {name: int(count) for count, name, _ in parts} == {
        "steps": 5, "checkpoints": 2, "sample grids": 3, "validations": 3
    }  # fmt: skip
    total = start_up + sum(int(count) * float(seconds) for count, _, seconds in parts)
    assert total == pytest.approx(3600 * float(hours), abs=0.6 + 0.05 * total)  # start-up is rounded to seconds
    speed = re.search(r"speed: ([\d.e-]+) s a step, ([\d.]+) images/s with batch 8 \(median of 3 steps", output)
    assert float(speed[1]) * float(speed[2]) == pytest.approx(8, rel=0.01)
    assert re.search(r"memory: [\d.]+ [MG]B of the host", output)
    assert "would take 12.3 kB" in output  # 24 images, 2 flips, 8 x 4 x 4 numbers of 2 bytes


# Two processes


def test_two_processes_have_the_gradients_of_one(two, image_folder, vae_folder, tmp_path):
    alone = two_processes.gradients(tmp_path / "unused", image_folder, str(vae_folder))
    assert not (tmp_path / "unused").exists()
    for shared in two("gradients"):
        torch.testing.assert_close(shared["loss"], alone["loss"], atol=0, rtol=1e-6)
        assert shared["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            largest = gradient.abs().max()
            assert largest > 0
            torch.testing.assert_close(shared["gradients"][name], gradient, atol=float(1e-5 * largest), rtol=0)


def test_all_processes_stop_at_the_same_step(two, train_arguments, tmp_path, monkeypatch, capsys):
    """Rank 1 alone got the signal; and the run then goes on with one process, in the same order of the data."""
    assert [seen["saved"] for seen in two("stopped")] == [[3], [3]]
    assert two.output.count("stopped on request at step 3; repeat the same command to go on") == 1
    results = shutil.copytree(two.folder / "stopped", tmp_path / "run")
    seen, step = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, batches: (seen.append(batches[0][1]), step(self, batches)))
    train.main(train_arguments(results, max_steps=6, log_every=2))
    assert "at step 3" in capsys.readouterr().out
    order = itertools.islice(data.EpochBatches(24, 8, 0, start_step=3), 3)
    labels = [[index // 8 for _, index in batch] for batch in order]  # eight images a class, sorted
    assert [batch.tolist() for batch in seen] == labels
    assert [record["step"] for record in read_metrics(results)] == [2, 4, 6]
    assert all(math.isfinite(record["loss"]) for record in read_metrics(results))


def test_a_non_finite_loss_on_one_process_skips_the_step_on_all(two):
    first, second = two("non_finite")
    assert_same_bits(first, second)
    folder = two.folder / "non_finite"
    stored = [dict(checkpoint.load(checkpoint.step_path(folder / "checkpoints", step))["model"]) for step in (1, 2, 3)]
    assert_same_bits(stored[0], stored[1])
    assert not torch.equal(stored[1]["final_layer.linear.weight"], stored[2]["final_layer.linear.weight"])
    assert [record["skipped"] for record in read_metrics(folder)] == [1, 0]


def test_a_mistake_ends_all_processes_with_one_line(two):
    first, second = two("unreadable")
    assert first["error"] == second["error"]
    assert first["error"].startswith(f"image {first['image']!r} cannot be read (")
    assert [seen["status"] for seen in two("refused")] == [2, 2]
    line = "--global-batch-size 7 is not divisible by 2 processes x 1 micro-batches; use a multiple of 2"
    assert two.errors.count(f"train.py: error: {line}\n") == 1


def test_a_dry_run_of_two_processes(two):
    assert [seen["wrote"] for seen in two("estimated")] == [False, False]
    assert two.output.count("run: 6 steps of batch 8 on 2 x cpu") >= 1 and two.output.count("speed: ") == 1


def test_two_processes_validate_as_one(two, image_folder, tmp_path):
    """One process measures the loss of the checkpoint that two have written beside theirs."""
    record, out = read_metrics(two.folder / "validated")[-1], tmp_path / "loss.json"
    options = dict(ckpt=two.folder / "validated", data_path=image_folder, split="val", precision="fp32", num_workers=0)
    for weights, key in (("model", "val_loss"), ("ema", "val_loss_ema")):
        evaluate_loss.main(command_line(options | dict(weights=weights, batch_size=4, out=out)))
        found = json.loads(out.read_text())
        assert found["images"] == 9
        assert found["loss"] == pytest.approx(record[key], rel=1e-6)
        assert found["loss_se"] == pytest.approx(record[f"{key}_se"], rel=1e-5)
        assert found["loss_tenths"] == pytest.approx(record[f"{key}_tenths"], rel=1e-6)


def test_log_sums_of_two_processes_are_the_mean_of_one():
    model = initial_model(ModelConfig("DiT-XS/8", (8, 8)), 0)
    trainer = Trainer(model, Recipe(), 10, None, torch.device("cpu"))
    state = trainer.state()
    one, other = [3.0, 1.0, 2.0, 0.0], [5.0, 1.0, 2.0, 0.0]  # loss, gradient norm, steps, skipped
    for sums, expected in ([one], one), ([one, other], [4.0, 1.0, 2.0, 0.0]):
        state["log"]["sums"] = sums
        trainer.load(state)
        assert trainer.sums.tolist() == expected
