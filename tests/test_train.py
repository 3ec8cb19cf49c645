"""Training: resume to the bit, stopping, kills, two processes, non-finite steps, full disks, locks."""

import copy
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from conftest import TINY_RUN, TORCHRUN, command_line

import cache_latents
import evaluate_loss
import train
from diffusion.gaussian_diffusion import GaussianDiffusion
from runtime import checkpoint, data, distributed, latents, monitor

pytestmark = pytest.mark.usefixtures("tiny_commands")
TESTS = Path(__file__).resolve().parent


def newest(results: Path) -> dict:
    return checkpoint.load(checkpoint.training_checkpoints(results / "checkpoints")[-1])


def assert_equal_bits(first, second) -> None:
    """Nested dicts and lists with the same keys, values and bits of tensors."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal_bits(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal_bits(one, other)
    else:
        assert first == second


def assert_same_run(results: Path, reference: Path) -> None:
    """Two runs ended with the same bits, and their metrics show every step once with the same values."""
    one, other = newest(results), newest(reference)
    for key in ("model", "ema", "opt", "step", "config", "log"):
        assert_equal_bits(one[key], other[key])
    assert metrics(results) == metrics(reference)


def metrics(results: Path) -> list[dict]:
    """Records without what depends on the clock."""
    records = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    assert len({record["step"] for record in records}) == len(records)
    timed = ("images_per_second", "eta_seconds")
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


@pytest.fixture
def stop_after_step(signal_after):
    """Makes the run signal itself at the end of its count-th step from here."""
    return lambda count, number=signal.SIGTERM: signal_after(train.Trainer, "train_step", count, number)


VARIANTS = {
    "flips": dict(flip=True),
    "constant, workers": dict(no_flip=True, num_workers=2, epochs=3, max_steps=None),
    "linear, accumulated": dict(
        lr_schedule="linear",
        warmup_steps=3,
        grad_accum_steps=2,
        grad_clip=0.5,
        weight_decay=0.1,
        use_rope=True,
        rope_rotate=2,
        log_every=2,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    variant, train_arguments, stop_after_step, tmp_path, capsys
):
    changes = VARIANTS[variant]
    train.main(train_arguments(tmp_path / "whole", **changes))
    arguments = train_arguments(tmp_path / "stopped", **changes)
    for steps, number in ((2, signal.SIGTERM), (3, signal.SIGUSR1), (1, signal.SIGINT)):  # at steps 2, 5 and 6
        stop_after_step(steps, number)
        train.main(arguments)
        assert "stopped on request at step" in capsys.readouterr().out
    train.main(arguments)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_run_goes_on_when_its_length_grows(train_arguments, tmp_path, capsys):
    train.main(train_arguments(tmp_path / "whole"))
    train.main(train_arguments(tmp_path / "grown", max_steps=3))
    assert (tmp_path / "grown" / "finished.json").exists()
    capsys.readouterr()
    train.main(train_arguments(tmp_path / "grown", max_steps=7))
    assert "resumed from" in capsys.readouterr().out
    assert_same_run(tmp_path / "grown", tmp_path / "whole")


def test_what_a_killed_process_leaves_is_cleaned_up(train_arguments, stop_after_step, tmp_path):
    train.main(train_arguments(tmp_path / "whole"))
    results = tmp_path / "killed"
    stop_after_step(4)
    train.main(train_arguments(results))
    leftovers = [results / "checkpoints" / "0000008.pt.partial", results / "checkpoints" / "0000004.pt.partial"]
    for path in leftovers:
        path.write_bytes(b"half a checkpo")
    with open(results / "metrics.jsonl", "a") as file:  # a line past the checkpoint, and one that was cut off
        file.write('{"step": 6, "loss": 0.1, "grad_norm": 1, "lr": 1}\n{"step": 7, "lo')
    train.main(train_arguments(results))
    assert_same_run(results, tmp_path / "whole")
    assert not any(path.exists() for path in leftovers)


def test_a_finished_run_is_left_alone(run, train_arguments, tmp_path, capsys):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*.pt")}
    records = (run / "metrics.jsonl").read_bytes()
    train.main(train_arguments(run, lr=0.01, ema_decay=0.5, use_rope=True, rope_rotate=2))
    assert "nothing to do: the run has 7 of 7 steps" in capsys.readouterr().out
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*.pt")} == before
    assert (run / "metrics.jsonl").read_bytes() == records


def test_a_finished_run_leaves_what_it_promises(run):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0000004.pt", "0000007.pt"]
    assert [record["step"] for record in metrics(run)] == [3, 6, 7]
    assert json.loads((run / "finished.json").read_text()) == {"step": 7}
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["rope"]["rotate"] == 2 and config["recipe"]["lr"] == 0.01
    assert config["data"]["images"] == 24 and config["data"]["classes"] == ["ant", "bee", "käfer"]
    assert {"python", "torch", "diffusers"} <= config["versions"].keys() and config["device"].startswith("cpu")
    log = (run / "log.txt").read_text()
    assert "181,728 parameters" in log and "run: 7 steps of batch 8 on 1 x cpu" in log
    assert re.search(r"disk for 2 checkpoints: 5\.8\d MB", log)
    line = r"step 0000006: loss [\d.]+, gradient norm [\d.]+, [\d.]+ images/s, learning rate 0.01, ETA 00:00:\d\d"
    assert re.search(line, log)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_logged_values_are_means_since_the_last_line(train_arguments, tmp_path, monkeypatch):
    losses, step = [], train.Trainer.train_step
    monkeypatch.setattr(
        train.Trainer, "train_step", lambda self, batches: (step(self, batches), losses.append(float(self.loss)))
    )
    train.main(train_arguments(tmp_path / "run", lr_schedule="linear", warmup_steps=2, epochs=2))  # 6 steps
    first, second = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-6)
    assert second["loss"] == pytest.approx(sum(losses[3:]) / 3, rel=1e-6)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert (first["lr"], second["lr"]) == (pytest.approx(0.00075), 0)  # step 3 of 6, 2 of them warm-up


def test_the_run_ends_with_what_comes_first(train_arguments):
    def steps(**changes):
        args = train.parse_args(train_arguments(Path("unused"), **{"max_steps": None} | changes))
        return train.total_steps(args, steps_per_epoch=3)

    assert steps() == 1400 * 3
    assert steps(epochs=2) == 6
    assert steps(max_steps=10_000) == 10_000
    assert steps(epochs=2, max_steps=4) == 4
    assert steps(epochs=2, max_steps=40) == 6


def test_learning_rate(train_arguments):
    args = train.parse_args(train_arguments(Path("unused"), lr=2.0, lr_schedule="linear", warmup_steps=4))
    rates = [train.learning_rate(step, 12, args) for step in range(1, 13)]
    assert rates[:4] == [0.5, 1, 1.5, 2]
    assert rates[4:] == pytest.approx([1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0])
    args = train.parse_args(train_arguments(Path("unused"), lr=2.0))
    assert {train.learning_rate(step, 12, args) for step in range(1, 13)} == {2.0}


def test_the_published_recipe_is_the_default():
    args = train.parse_args(["--data-path", "images"])
    expected = dict(model="DiT-XL/2", image_size=(256, 256), global_batch_size=256, global_seed=0, num_workers=4)
    expected |= dict(log_every=100, ckpt_every=50_000, lr=1e-4, lr_schedule="constant", warmup_steps=0, flip=True)
    expected |= dict(weight_decay=0, ema_decay=0.9999, grad_clip=None, keep_checkpoints=None, tf32=True, use_rope=None)
    assert {name: getattr(args, name) for name in expected} == expected
    assert train.DEFAULT_EPOCHS == 1400


def test_the_average_follows_the_weights(train_arguments, tmp_path):
    args = train.parse_args(train_arguments(tmp_path / "run", ema_decay=0.75, max_steps=1))
    trainer = train.Trainer(train.plan(args, torch.device("cpu")))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    trainer.train_step([(pixels, torch.zeros(8, dtype=torch.long))])
    after = trainer.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, value in trainer.ema.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])


def test_micro_batches_add_up_to_the_whole_batch(train_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.3))
    monkeypatch.setattr(torch, "randint", lambda high, shape, device: torch.full(shape, high // 2))
    monkeypatch.setattr(torch, "rand", lambda shape, device: torch.full(shape, 0.5))
    found = []
    for micro_batches in (1, 2, 4):
        args = train.parse_args(train_arguments(tmp_path / "run", grad_accum_steps=micro_batches))
        trainer = train.Trainer(train.plan(args, torch.device("cpu")))
        batches = data.EpochBatches(24, 8, 0, 0, micro_batches)
        with data.open_loader(trainer.job.dataset, batches, 0, torch.device("cpu")) as loader:
            trainer.train_step([next(loader) for _ in range(micro_batches)])
        found.append((trainer.loss, trainer.model.final_layer.linear.weight.grad))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], atol=1e-7, rtol=1e-5)


def test_bf16_multiplies_in_bfloat16_and_keeps_everything_else_in_float32(train_arguments, tmp_path, monkeypatch):
    asked, kept, update = [], [], train.Trainer.update

    def watched(self):
        kept.extend([self.loss.dtype, *(parameter.grad.dtype for parameter in self.parameters)])
        update(self)

    monkeypatch.setattr(train.Trainer, "update", watched)
    monkeypatch.setattr(train, "autocast", lambda *args: (asked.append(args[1]), distributed.autocast(*args))[1])
    predicted, losses = [], GaussianDiffusion.training_losses

    def seen(self, model, *args, **kwargs):
        def predict(*inputs, **labels):
            predicted.append(model(*inputs, **labels))
            return predicted[-1]

        return losses(self, predict, *args, **kwargs)

    monkeypatch.setattr(GaussianDiffusion, "training_losses", seen)
    train.main(train_arguments(tmp_path / "run", precision="bf16", max_steps=2, use_rope=True, rope_rotate=2))
    assert asked == ["bf16"] * 2 and [out.dtype for out in predicted] == [torch.bfloat16] * 2
    state = newest(tmp_path / "run")
    moments = [value for slots in state["opt"]["state"].values() for value in slots.values()]
    kept += [tensor.dtype for tensor in (*state["model"].values(), *state["ema"].values(), *moments)]
    assert len(kept) > 100 and set(kept) == {torch.float32}


def test_every_step_and_micro_batch_has_noise_of_its_own(train_arguments, tmp_path, monkeypatch):
    drawn, randint = [], torch.randint

    def watched(*args, **kwargs):
        drawn.append(randint(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "randint", watched)
    for seed in (0, 1):
        train.main(train_arguments(tmp_path / f"run {seed}", max_steps=3, grad_accum_steps=2, global_seed=seed))
    assert len(drawn) == 12 and len({tuple(t.tolist()) for t in drawn}) == 12


# Killed, and out of disk


def test_killed_again_and_again(image_folder, vae_folder, tmp_path):
    """kill_training.py in its short form: a random moment, half a checkpoint written, one written and not renamed."""
    options = TINY_RUN | {"data_path": image_folder, "vae": vae_folder, "log_every": 1, "ckpt_every": 5}
    options |= {"max_steps": 60}
    command = [sys.executable, TESTS / "kill_training.py", "--kills", "3", "--folder", tmp_path, "--"]
    process = subprocess.run(
        [*command, *command_line(options)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "killed 3 of 3 times" in process.stdout
    assert_same_run(tmp_path / "killed", tmp_path / "reference")
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def full_disk_at(monkeypatch):
    """Makes the disk fill up while the checkpoint of a step is written."""
    fsync = os.fsync

    def fail(step: int) -> None:
        def full(descriptor):
            if f"{step:07d}.pt" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", full)

    return fail


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files come from /proc")
def test_a_full_disk_in_mid_run_is_survived(train_arguments, full_disk_at, tmp_path, capsys):
    full_disk_at(4)
    train.main(train_arguments(tmp_path / "run", ckpt_every=2))
    path = tmp_path / "run" / "checkpoints" / "0000004.pt"
    assert (
        f"warning: checkpoint {str(path)!r} could not be written: [Errno 28] No space left on device; training goes "
        "on, earlier checkpoints are whole" in capsys.readouterr().out
    )
    assert sorted(file.name for file in path.parent.iterdir()) == ["0000002.pt", "0000006.pt", "0000007.pt"]
    for file in path.parent.iterdir():
        checkpoint.load(file, verify=True)


def test_a_disk_too_full_for_metrics_and_plots_is_survived(train_arguments, tmp_path, monkeypatch, capsys):
    """A limit on the size of files stands in for the disk: the second record of metrics.jsonl does not fit."""
    write, calls = monitor.Metrics.write, []

    def limited(self, record):
        calls.append(record)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.path.stat().st_size + 10, limits[1]))
        try:
            write(self, record)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def full(_):
        raise OSError(28, "No space left on device")

    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(monitor.Metrics, "write", limited)
    monkeypatch.setattr(monitor, "plot_loss", full)
    train.main(train_arguments(tmp_path / "run"))
    signal.signal(signal.SIGXFSZ, previous)
    output, path = capsys.readouterr().out, tmp_path / "run" / "metrics.jsonl"
    assert f"warning: step 6 is missing in {path}: [Errno 27] File too large" in output
    assert "loss.png and old checkpoints are left as they were: [Errno 28] No space left on device" in output
    assert [record["step"] for record in metrics(tmp_path / "run")] == [3, 7]
    assert newest(tmp_path / "run")["step"] == 7


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files come from /proc")
def test_a_full_disk_at_the_end_leaves_what_was_there(train_arguments, full_disk_at, refused, tmp_path, monkeypatch):
    full_disk_at(7)
    path = tmp_path / "run" / "checkpoints" / "0000007.pt"
    assert refused(train.main, train_arguments(tmp_path / "run")) == (
        f"checkpoint {str(path)!r} could not be written: [Errno 28] No space left on device; earlier checkpoints are "
        "whole: free space and repeat the command"
    )
    assert [file.name for file in path.parent.iterdir()] == ["0000004.pt"]
    assert not (tmp_path / "run" / "finished.json").exists()
    full_disk_at(99)
    train.main(train_arguments(tmp_path / "run"))
    train.main(train_arguments(tmp_path / "whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files come from /proc")
def test_a_stop_right_after_a_failed_write_tries_again(train_arguments, full_disk_at, refused, tmp_path, monkeypatch):
    full_disk_at(4)
    save = train.save

    def stop(*args, **kwargs):
        monkeypatch.setattr(train, "save", save)
        written = save(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return written

    monkeypatch.setattr(train, "save", stop)
    assert "0000004.pt' could not be written" in refused(train.main, train_arguments(tmp_path / "run"))


def test_space_is_looked_at_before_writing(train_arguments, refused, tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    path = tmp_path / "run" / "checkpoints" / "0000007.pt"
    message = refused(train.main, train_arguments(tmp_path / "run"))
    assert re.fullmatch(
        re.escape(f"checkpoint {str(path)!r} needs ") + r"29\d{5} bytes and 1000 are free on its disk; earlier "
        "checkpoints are whole: free space and repeat the command",
        message,
    )
    assert list(path.parent.iterdir()) == []


def test_only_so_many_checkpoints_are_kept(train_arguments, tmp_path):
    train.main(train_arguments(tmp_path / "run", ckpt_every=2, keep_checkpoints=2))
    assert sorted(file.name for file in (tmp_path / "run" / "checkpoints").iterdir()) == ["0000006.pt", "0000007.pt"]


def test_keeping_few_checkpoints_keeps_the_newest_valid_one(train_arguments, stop_after_step, tmp_path, capsys):
    """A damaged checkpoint of a later step counts for nothing: it must not push out what the run goes on to write."""
    stop_after_step(6)
    arguments = train_arguments(tmp_path / "run", ckpt_every=4, keep_checkpoints=2)
    train.main(arguments)  # checkpoints of steps 4 and 6
    folder = tmp_path / "run" / "checkpoints"
    (folder / "0000006.pt").write_bytes((folder / "0000006.pt").read_bytes()[:1000])
    stop_after_step(1)
    train.main(train_arguments(tmp_path / "run", ckpt_every=4, keep_checkpoints=1))
    assert sorted(path.name for path in folder.iterdir()) == ["0000005.pt", "0000006.pt"]
    capsys.readouterr()
    train.main(arguments)
    output = capsys.readouterr().out
    assert "warning: skipped a checkpoint: checkpoint" in output and "0000005.pt at step 5" in output
    train.main(train_arguments(tmp_path / "whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_resume_skips_a_damaged_checkpoint_and_says_so(train_arguments, stop_after_step, tmp_path, capsys):
    train.main(train_arguments(tmp_path / "whole"))
    stop_after_step(6)
    train.main(train_arguments(tmp_path / "run"))  # checkpoints of steps 4 and 6
    path = tmp_path / "run" / "checkpoints" / "0000006.pt"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    capsys.readouterr()
    train.main(train_arguments(tmp_path / "run"))
    output = capsys.readouterr().out
    assert f"warning: skipped a checkpoint: checkpoint {str(path)!r} is damaged: checksum of" in output
    assert "at step 4" in output
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(
    train_arguments, stop_after_step, refused, tmp_path
):
    stop_after_step(2)
    train.main(train_arguments(tmp_path / "run"))
    path = tmp_path / "run" / "checkpoints" / "0000002.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert refused(train.main, train_arguments(tmp_path / "run")) == (
        f"no checkpoint in {str(path.parent)!r} can be read; restore one, or remove them to start afresh"
    )
    assert path.stat().st_size == 1000


# One run in a folder, one recipe in a run


def test_a_second_run_in_the_same_folder_is_refused(run, train_arguments, refused):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys\n"
            "file = open(sys.argv[1], 'w')\n"
            "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "print('locked', flush=True)\n"
            "sys.stdin.read()\n",
            run / ".lock",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "locked\n"
    records = (run / "metrics.jsonl").read_bytes()
    arguments = train_arguments(run, lr=0.01, ema_decay=0.5, use_rope=True, rope_rotate=2)
    assert refused(train.main, arguments) == (
        f"--results-dir {str(run)!r} is in use by another run; wait for it or choose another"
    )
    assert (run / "metrics.jsonl").read_bytes() == records
    holder.communicate("", timeout=30)
    train.main(arguments)


def test_another_recipe_is_refused_by_name(run, train_arguments, refused):
    path = run / "checkpoints" / "0000007.pt"
    same = dict(lr=0.01, ema_decay=0.5, use_rope=True, rope_rotate=2, max_steps=9)
    before = (run / "metrics.jsonl").read_bytes(), (run / "config.json").read_bytes()

    def message(**changes):
        text = refused(train.main, train_arguments(run, **same | changes))
        start = f"checkpoint {str(path)!r} was trained with other settings: "
        end = "; repeat the run's own command, or use another --results-dir"
        assert text.startswith(start) and text.endswith(end)
        return text[len(start) : -len(end)]

    assert message(lr=0.02) == "recipe.lr 0.01 (now 0.02)"
    assert message(no_flip=True, global_seed=1) == "recipe.global_seed 0 (now 1), recipe.flip True (now False)"
    assert message(grad_clip=1) == "recipe.grad_clip None (now 1.0)"
    assert message(rope_rotate=4) == "model.rope.rotate 2 (now 4)"
    assert message(rope_border="exact") == "model.rope.border 'clamp' (now 'exact')"
    assert message(num_classes=5) == "model.num_classes 3 (now 5)"
    assert message(global_batch_size=4) == "recipe.global_batch_size 8 (now 4)"
    assert message(model="DiT-XS/4").startswith("model.model 'DiT-XS/2' (now 'DiT-XS/4')")
    assert message(use_rope=None, rope_rotate=None).startswith("model.rope.rotate 2 (now None)")
    assert ((run / "metrics.jsonl").read_bytes(), (run / "config.json").read_bytes()) == before
    assert not (run / "checkpoints" / "0000009.pt").exists()


def test_other_data_and_another_vae_are_refused_and_a_moved_folder_is_not(
    run, image_folder, vae_folder, make_vae, train_arguments, refused, tmp_path, capsys
):
    same = dict(lr=0.01, ema_decay=0.5, use_rope=True, rope_rotate=2)
    moved = tmp_path / "moved"
    shutil.copytree(image_folder, moved)
    copied_vae = shutil.copytree(vae_folder, tmp_path / "vae")
    train.main(train_arguments(run, data_path=moved, vae=copied_vae, **same))
    assert "nothing to do" in capsys.readouterr().out
    (moved / "bee" / "01.png").rename(moved / "bee" / "99.png")
    assert "other settings: data.fingerprint" in refused(train.main, train_arguments(run, data_path=moved, **same))
    other_vae = make_vae(seed=1)
    message = refused(train.main, train_arguments(run, vae=other_vae, **same))
    assert "other settings: vae.sha256" in message and "data." not in message


# Steps that are not finite


def poison(monkeypatch, steps) -> list:
    """Make the loss not a number in some steps (counted from 0); returns a list that gets the trainer."""
    loss, trainers = train.Trainer.micro_batch_loss, []

    def micro_batch_loss(self, inputs, labels):
        trainers.append(self)
        return loss(self, inputs, labels) + (math.inf if self.step in steps else 0)  # its gradient is finite

    monkeypatch.setattr(train.Trainer, "micro_batch_loss", micro_batch_loss)
    return trainers


def test_a_non_finite_step_changes_neither_weights_nor_optimizer(train_arguments, tmp_path, monkeypatch):
    states = []
    update = train.Trainer.update

    def watched(self):
        parts = (self.model, self.optimizer, self.ema)
        before = copy.deepcopy([part.state_dict() for part in parts])
        update(self)
        states.append((before, copy.deepcopy([part.state_dict() for part in parts])))

    monkeypatch.setattr(train.Trainer, "update", watched)
    poison(monkeypatch, {0, 3})
    train.main(train_arguments(tmp_path / "run", grad_clip=1, max_steps=6))
    for step, (before, after) in enumerate(states):
        equal = all(torch.equal(before[0][name], after[0][name]) for name in before[0])
        assert equal == (step in (0, 3))
        if step == 3:  # in step 0 the optimizer's state appears, as zeros
            assert_equal_bits(before[1]["state"], after[1]["state"])
        assert all(torch.isfinite(value).all() for value in after[2].values())
    assert [record["skipped"] for record in metrics(tmp_path / "run")] == [1, 1]
    assert all(math.isfinite(record["loss"]) for record in metrics(tmp_path / "run"))
    assert "skipped 1 non-finite steps" in (tmp_path / "run" / "log.txt").read_text()


def test_too_many_non_finite_steps_in_a_row_end_the_run(train_arguments, refused, tmp_path, monkeypatch):
    trainers = poison(monkeypatch, set(range(4, 99)))
    arguments = train_arguments(tmp_path / "run", max_steps=50, max_bad_steps=3, log_every=2)
    path = tmp_path / "run" / "checkpoints" / "0000004.pt"
    assert refused(train.main, arguments) == (
        "loss or gradient not finite in 3 steps in a row, the last at step 7 (loss inf); no such step changed the "
        f"weights, and the newest checkpoint is {path}: repeat the command with --precision fp32 to go on from it, or "
        "start again with a lower --lr or --grad-clip 1 in another --results-dir"
    )
    stored = checkpoint.load(path, verify=True)
    assert_equal_bits(dict(stored["model"]), dict(trainers[-1].model.state_dict()))
    assert metrics(tmp_path / "run")[-1] == {
        "step": 6, "epoch": 2, "loss": None, "grad_norm": None, "lr": 0.001, "skipped": 2
    }  # fmt: skip


def test_a_streak_of_non_finite_steps_lasts_over_a_resume(
    train_arguments, stop_after_step, refused, tmp_path, monkeypatch
):
    poison(monkeypatch, set(range(2, 99)))
    stop_after_step(4)
    train.main(train_arguments(tmp_path / "run", max_bad_steps=4))  # two bad steps of four
    message = refused(train.main, train_arguments(tmp_path / "run", max_bad_steps=4))
    assert message.startswith("loss or gradient not finite in 4 steps in a row, the last at step 6 (loss inf)")


def test_a_run_that_bad_steps_ended_gets_all_its_tries_again(train_arguments, refused, tmp_path, monkeypatch):
    """A checkpoint may fall on the very step that ended the run: repeating the command must not end at once."""
    poison(monkeypatch, {2, 3, 4})
    arguments = train_arguments(tmp_path / "run", max_bad_steps=2)  # ended after step 4, which has a checkpoint
    assert "not finite in 2 steps in a row, the last at step 4" in refused(train.main, arguments)
    assert newest(tmp_path / "run")["log"]["streak"] == 2
    train.main(arguments)
    assert newest(tmp_path / "run")["step"] == 7


def test_good_steps_between_bad_ones_keep_the_run_alive(train_arguments, tmp_path, monkeypatch):
    poison(monkeypatch, {1, 2, 4, 5})
    train.main(train_arguments(tmp_path / "run", max_bad_steps=3))
    assert newest(tmp_path / "run")["step"] == 7


def test_an_image_that_turns_out_unreadable_loses_nothing(train_arguments, image_folder, refused, tmp_path):
    copy_of_data = shutil.copytree(image_folder, tmp_path / "data")
    epoch = list(itertools.islice(data.EpochBatches(24, 8, 0), 3))
    images = data.ImageList(copy_of_data)
    victim = images.path(epoch[2][0][1])  # first met in the third step
    original = victim.read_bytes()
    victim.write_bytes(original[: len(original) // 2])
    message = refused(train.main, train_arguments(tmp_path / "run", data_path=copy_of_data))
    assert message.startswith(f"image {str(victim)!r} cannot be read (")
    assert message.endswith(
        "); repair it or remove it from the data set; everything up to step 2 is saved: repeat the command to go on"
    )
    victim.write_bytes(original)
    train.main(train_arguments(tmp_path / "run", data_path=copy_of_data))
    train.main(train_arguments(tmp_path / "whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# Two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory, image_folder, vae_folder):
    """What two gloo processes did in each scenario of two_processes.py: two("gradients") -> one dict a rank."""
    folder = tmp_path_factory.mktemp("two")
    process = subprocess.run(
        [*TORCHRUN, TESTS / "two_processes.py", folder, image_folder, vae_folder],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
    )
    assert process.returncode == 0, process.stdout + process.stderr

    def read(scenario: str) -> list[dict]:
        return [torch.load(folder / f"{scenario}-{rank}.pt") for rank in range(2)]

    read.folder, read.output = folder, process.stdout
    return read


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


def test_all_processes_stop_at_the_same_step(two, train_arguments, tmp_path, capsys):
    """Rank 1 alone got the signal; and the run then goes on with one process, in the same order of the data."""
    assert [seen["saved"] for seen in two("stopped")] == [[3], [3]]
    assert two.output.count("stopped on request at step 3; repeat the same command to go on") == 1
    results = shutil.copytree(two.folder / "stopped", tmp_path / "run")
    arguments = train_arguments(results, max_steps=6, log_every=2, lr=None, ckpt_every=None)
    seen, step = [], train.Trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train.Trainer, "train_step", lambda self, batches: (seen.append(batches[0][1]), step(self, batches))
        )
        train.main(arguments)
    assert "at step 3" in capsys.readouterr().out
    order = itertools.islice(data.EpochBatches(24, 8, 0, start_step=3), 3)
    labels = [[index // 8 for _, index in batch] for batch in order]  # eight images a class, sorted
    assert [batch.tolist() for batch in seen] == labels
    assert [record["step"] for record in metrics(results)] == [2, 4, 6]
    assert all(math.isfinite(record["loss"]) for record in metrics(results))


def test_a_non_finite_loss_on_one_process_skips_the_step_on_all(two):
    first, second = two("non_finite")
    assert_equal_bits(dict(first["weights"]), dict(second["weights"]))
    assert_equal_bits(dict(first["ema"]), dict(second["ema"]))
    stored = [
        checkpoint.load(two.folder / "non_finite" / "checkpoints" / f"{step:07d}.pt")["model"] for step in (1, 2, 3)
    ]
    assert_equal_bits(stored[0], stored[1])
    assert not torch.equal(stored[1]["final_layer.linear.weight"], stored[2]["final_layer.linear.weight"])
    assert [record["skipped"] for record in metrics(two.folder / "non_finite")] == [1, 0]


def test_an_unreadable_image_ends_all_processes_with_its_name(two):
    first, second = two("unreadable")
    assert first["error"] == second["error"]
    assert first["error"].startswith(f"image {first['image']!r} cannot be read (")


def test_two_processes_fill_the_cache_of_one(two, image_folder, vae_folder, tmp_path):
    arguments = {"data_path": image_folder, "latents_dir": tmp_path / "one", "vae": vae_folder, "image_size": 32}
    cache_latents.main(command_line(arguments | {"num_workers": 0}))
    one, other = latents.LatentCache(tmp_path / "one"), latents.LatentCache(two.folder / "cached")
    assert one.fingerprint == other.fingerprint and one.labels.tolist() == other.labels.tolist()
    torch.testing.assert_close(torch.tensor(one.moments), torch.tensor(other.moments), atol=2e-3, rtol=2e-3)


def test_two_processes_validate_as_one(two, image_folder, tmp_path):
    """One process measures the loss of the checkpoint that two have written beside theirs."""
    record, out = metrics(two.folder / "validated")[-1], tmp_path / "loss.json"
    for weights, key in (("model", "val_loss"), ("ema", "val_loss_ema")):
        options = {
            "ckpt": two.folder / "validated" / "checkpoints" / "0000002.pt",
            "weights": weights,
            "data_path": image_folder,
            "split": "val",
            "precision": "fp32",
            "num_workers": 0,
            "batch_size": 4,
            "out": out,
        }
        evaluate_loss.main(command_line(options))
        found = json.loads(out.read_text())
        assert found["images"] == 9
        assert found["loss"] == pytest.approx(record[key], rel=1e-6)
        assert found["loss_se"] == pytest.approx(record[f"{key}_se"], rel=1e-5)
        assert found["loss_tenths"] == pytest.approx(record[f"{key}_tenths"], rel=1e-6)
