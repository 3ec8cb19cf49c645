"""What docs/reliability.md promises across modules: kills, restarts, full disks, awkward names, hostile files."""

import copy
import datetime
import itertools
import json
import multiprocessing
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fuzz
import kill
import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, TINY_RUN, command_line, stops
from kill import assert_same_run, read_metrics, read_samples
from torch.utils.data import dataloader

import cache_latents
import models
import sample_ddp
import train
import visualize_rope
from demo import digits, measure
from runtime import checkpoint, data, distributed, files, latents, monitor, options, pictures
from runtime.options import UserError

pytestmark = pytest.mark.usefixtures("tiny_commands")
ROOT = Path(__file__).resolve().parent.parent
FULL = OSError(28, "No space left on device")
AWKWARD = 'it\'s "a" $HOME `x`\n${y} 日本 é\\'


def full(*_):
    raise FULL


# Kills and restarts


def test_training_killed_again_and_again(image_folder, vae_folder, tmp_path):
    """kill.py in its short form: once at each of its moments."""
    random.seed(0)
    changes = {"data_path": image_folder, "vae": vae_folder, "log_every": 1, "ckpt_every": 2, "max_steps": 30}
    assert kill.kill_training(tmp_path, 4, command_line(TINY_RUN | changes)) == dict.fromkeys(kill.TRAINING_MOMENTS, 1)
    assert_same_run(tmp_path / "killed", tmp_path / "reference")


def test_caching_killed_again_and_again(image_folder, vae_folder, tmp_path):
    """kill.py in its short form, on two chunks."""
    random.seed(0)
    data = {"data_path": image_folder, "vae": vae_folder, "image_size": 32, "num_workers": 0, "batch_size": 4}
    expected = {"random": 1, "between images": 1, "no checksum": 1, "not finished": 1}
    assert kill.kill_caching(tmp_path, 4, command_line(data)) == expected


def test_sampling_killed_again_and_again(run, tmp_path, capsys):
    """kill.py in its short form: one process, two, and one run killed three times give the same images.

    Their number leaves a batch that is not full, and one process fewer than the other.
    """
    random.seed(0)
    arguments = "--num-fid-samples=23 --num-sampling-steps=4 --precision=fp32".split()
    assert kill.kill_sampling(tmp_path, 3, run, arguments) == dict.fromkeys(kill.SAMPLING_MOMENTS, 1)
    output = capsys.readouterr().out
    for name in ("two", "killed"):
        assert f"{name}: 92 draws of noise equal, 23 images, " in output


def test_a_closed_terminal_stops_a_run_with_a_checkpoint(train_arguments, tmp_path):
    controller, terminal = pty.openpty()
    arguments = train_arguments(tmp_path / "run", max_steps=100_000, ckpt_every=100_000)
    process = kill.start(kill.train_in_terminal, os.ttyname(terminal), arguments)
    seen = b""
    while b"step 0000003" not in seen:
        seen += os.read(controller, 4096)
    os.close(terminal)
    os.close(controller)
    assert kill.ended_by(process) == 128 + signal.SIGHUP
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"stopped on request at step {int(path.stem):,}; " in (tmp_path / "run" / "log.txt").read_text()


def image_of_step(images: Path, step: int) -> Path:
    """An image that a run without flips of batch 8 first reads for this step."""
    _, index = next(itertools.islice(data.EpochBatches(24, 8, 0), step - 1, None))[0]
    return data.ImageList(images).path(index)


@pytest.fixture
def waiting_images(image_folder, tmp_path):
    """A copy of the images of which one, needed for step 3, is a named pipe that nobody writes into."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    pipe = image_of_step(images, 3)
    pipe.unlink()
    os.mkfifo(pipe)
    return images


@pytest.fixture
def signal_later(monkeypatch):
    """Signals this process from a thread, some time after the count-th return of a function: signal_later(owner, name,
    count) -> list that gets the time of the signal."""

    def patch(owner, name: str, count: int, number: int = signal.SIGTERM) -> list[float]:
        original, calls, sent = getattr(owner, name), [], []

        def send():
            sent.append(time.monotonic())
            os.kill(os.getpid(), number)

        def wrapper(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                threading.Timer(0.7, send).start()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)
        return sent

    return patch


@pytest.mark.parametrize("workers, number", [(0, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_run_that_waits_for_data_stops_with_a_checkpoint(
    workers, number, waiting_images, train_arguments, signal_later, tmp_path
):
    sent = signal_later(train.Trainer, "train_step", 2, number)
    stops(train.main, train_arguments(tmp_path / "run", data_path=waiting_images, num_workers=workers), number)
    assert time.monotonic() - sent[0] < 5
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000002.pt"]
    assert not multiprocessing.active_children()


def test_a_cache_that_waits_for_an_image_stops(waiting_images, cache_arguments, signal_later, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "CHUNK", 5)
    sent = signal_later(cache_latents, "encode_batch", 1)
    stops(cache_latents.main, cache_arguments(tmp_path / "latents", data_path=waiting_images, batch_size=1))
    assert time.monotonic() - sent[0] < 5


def test_processes_that_wait_for_another_that_waits_for_data_stop_with_it(two):
    """Rank 1 alone got the signal, while rank 0 waited for an image."""
    assert [seen["saved"] for seen in two("waiting")] == [[2], [2]]
    assert max(seen["seconds"] for seen in two("waiting")) < 10
    assert [seen["status"] for seen in two("waiting")] == [0, 0]  # for torchrun, which would start them again


@pytest.mark.parametrize(
    "end, reason",
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was ended by SIGKILL, as the system does when memory runs out"),
        (lambda: os._exit(3), "ended with status 3"),
        (None, "could not make a batch (unable to allocate shared memory)"),
    ],
)
def test_a_data_worker_that_dies_ends_the_run_with_a_checkpoint(
    end, reason, image_folder, train_arguments, refused, tmp_path, monkeypatch
):
    read, path = data.read_prepared, image_of_step(image_folder, 3)

    def read_prepared(image, size):
        if image == path and end is None:
            monkeypatch.setattr(torch.Tensor, "share_memory_", no_memory)  # of this worker
        elif image == path:
            time.sleep(1)  # batches of a worker that died are lost, also those that it had made
            end()
        return read(image, size)

    def no_memory(self):
        raise RuntimeError("unable to allocate shared memory\nand more")

    monkeypatch.setattr(data, "read_prepared", read_prepared)
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    message = refused(train.main, train_arguments(tmp_path / "run", num_workers=1), has_begun=True)
    remedy = "use fewer --num-workers, or a smaller batch"
    assert message == (
        f"a data worker {reason}; {remedy}; everything up to step 2 is saved: repeat the command to go on"
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000002.pt"]


def ignoring(seconds: float) -> None:
    """Be in a system call that no signal ends."""
    distributed.SAME_REQUEST = 0.5
    with distributed.StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the same request, on another way
        assert stop.received == signal.SIGTERM
        time.sleep(seconds)


def test_a_second_signal_ends_a_process_at_once():
    process = kill.start(ignoring, 60)
    time.sleep(2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=5)
    assert process.exitcode == 128 + signal.SIGINT


# Processes that are missing


def test_machines_meet_before_torchrun():
    port = kill.free_port()
    machines = [kill.start(distributed.main, ["2", number, "127.0.0.1", port]) for number in ("1", "0")]
    assert [kill.ended_by(process) for process in machines] == [0, 0]


@pytest.mark.parametrize(
    "rank, whom",
    [("0", "2 of 3 processes: number 1, 2"), ("1", "number 0, at 127.0.0.1:PORT ([Errno 111] Connection refused)")],
)
def test_a_group_that_is_not_complete_says_for_whom_it_waits(rank, whom, monkeypatch):
    port = kill.free_port()
    group = {"RANK": rank, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, text in group.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(distributed, "PATIENCE", 0.1)
    with pytest.warns(UserWarning, match=re.escape(f"waiting for {whom.replace('PORT', port)}")):
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            distributed.setup()
    monkeypatch.setattr(distributed, "TIMEOUT", datetime.timedelta(seconds=0.3))
    with pytest.raises(UserError, match=re.escape(f"in vain for {whom.replace('PORT', port)}; start all of them")):
        distributed.setup()


# Two commands in one folder


def test_a_second_cache_waits_for_the_first_and_finds_its_work(cache, cache_arguments, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "latents"
    folder.mkdir()
    holder = kill.Holder(folder)

    def finish(_):
        shutil.copytree(cache, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(files.LOCK))
        assert len(latents.LatentCache(folder)) == 24  # a reader needs no lock
        holder.release()

    monkeypatch.setattr(distributed.time, "sleep", finish)
    cache_latents.main(cache_arguments(folder))
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(f"waiting for {holder.name}, which writes into {folder}")
    assert second.endswith(f"nothing to do: {folder} is a finished cache of this data set")


def test_a_second_sampler_waits_for_the_first_and_finds_its_work(sample_arguments, tmp_path, monkeypatch, capsys):
    sample_ddp.main(sample_arguments(tmp_path / "whole"))
    (images,) = (path.name for path in (tmp_path / "whole").iterdir() if path.is_dir())
    folder = tmp_path / "samples"
    (folder / images).mkdir(parents=True)
    holder = kill.Holder(folder / images)

    def finish(_):
        shutil.copytree(tmp_path / "whole", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(files.LOCK))
        holder.release()

    monkeypatch.setattr(distributed.time, "sleep", finish)
    capsys.readouterr()
    sample_ddp.main(sample_arguments(folder))
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith(f"waiting for {holder.name}, which writes into {folder / images}")
    assert second.endswith("nothing to do: all 13 samples are there")


def test_a_lock_that_the_file_system_does_not_have(tmp_path, cache_arguments, refused, monkeypatch):
    def lockf(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    message = refused(cache_latents.main, cache_arguments(tmp_path / "latents"), has_begun=True)
    assert "cannot be written (No locks available)" in message


@pytest.mark.parametrize("under_nohup", [False, True])
def test_a_closed_terminal_is_a_request_to_stop_but_under_nohup(under_nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if under_nohup else signal.SIG_DFL)
    try:
        with distributed.StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == (None if under_nohup else signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if under_nohup else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_torchrun_recovers_from_a_killed_process(two):
    """Rank 0, which holds the lock and has a data worker that outlives it, is killed: both start again and go on."""
    log = (two.folder / "restarted" / "log.txt").read_text()
    assert log.count("0000002.pt at step 2") == 1 and log.count("finished at step 7") == 1
    assert [record["step"] for record in read_metrics(two.folder / "restarted")] == list(range(1, 8))


# Hostile files


def test_damaged_files_never_crash_a_reader(image_folder, vae_folder, tmp_path, monkeypatch):
    """fuzz.py in its short form."""
    for name, value in fuzz.SMALLEST_XS.items():
        monkeypatch.setitem(models.SIZES["XS"], name, value)
    subjects = fuzz.prepare(tmp_path, image_folder, vae_folder)
    outcomes, _ = fuzz.fuzz(subjects.pop("checkpoint"), mutations=120)
    refusals = {key[:2]: times for key, times in outcomes.items() if key[2] == "refused"}
    assert sum(outcomes.values()) == 2 * 120 and len(refusals) == 6 and min(refusals.values()) > 5
    assert outcomes["sampling", "values", "taken"] > 0  # what it does not read may be anything
    for name, subject in subjects.items():
        outcomes, _ = fuzz.fuzz(subject, mutations=10 if name == "statistics" else 40)
        assert sum(times for key, times in outcomes.items() if key[2] != "taken") > 5, name


JSON = {  # contents, the reason
    "not text": (b'{"a": "\xff"}', "'utf-8' codec can't decode"),
    "cut": (b'{"steps": 2', "Expecting ',' delimiter"),
    "nested in 100,000 lists": (
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "RecursionError: maximum recursion",
    ),
    "nested in 100 lists": (
        b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
        "its values are nested in themselves, too deeply",
    ),
    "an endless number": (b'{"a": ' + b"1" * 10_000 + b"}", "Exceeds the limit"),
    "many values": (b'{"a": [' + b"0," * 2**18 + b"0]}", "too many times"),
    "twenty megabytes": (b'{"a": "' + b"a" * 20_000_000 + b'"}', "its JSON has more than 16777216 characters"),
}


@pytest.mark.parametrize("case", JSON)
def test_json_of_any_content_is_one_line(case, tmp_path):
    contents, reason = JSON[case]
    path = tmp_path / "settings.json"
    path.write_bytes(contents)
    with pytest.raises(options.UserError) as error:
        files.read_json(path)
    assert str(error.value).startswith(f"{str(path)!r} cannot be read (") and reason in str(error.value)
    assert str(error.value).endswith("); remove it together with what it describes") and len(str(error.value)) < 600


def test_a_damaged_line_of_the_metrics_costs_that_line_and_is_told(tmp_path):
    lines = [json.dumps({"step": step, "loss": 0.5, "tenths": [None, 1]}).encode() for step in range(1, 11)]
    damage = {
        2: lines[1][:9],
        4: b"\xff",
        5: b"[5]",
        6: b'{"loss": 1}',
        7: b"[" * 100_000,
        8: b'{"step": 8, "loss": "x"}',
    }
    for number, contents in damage.items():
        lines[number - 1] = contents
    path, told = tmp_path / "metrics.jsonl", []
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 11, "lo')  # a killed process leaves that
    assert [record["step"] for record in monitor.read_metrics(path, told.append)] == [1, 3, 9, 10]
    assert told == [f"line {number} of {str(path)!r} is damaged and left out" for number in damage]
    logger = monitor.make_logger(tmp_path)
    metrics = monitor.Metrics(tmp_path, 9, logger)
    metrics.write({"step": 10, "loss": 0.25})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3, 9, 10]
    assert (tmp_path / "log.txt").read_text().count("warning: line ") == len(damage)


BIAS = "x_embedder.proj.bias"
NOT_FINITE = "that are not finite numbers; use an earlier one"
TRAINING_STATES = {  # where, what is put there, the message
    "NaN weights": ("model", BIAS, torch.full((64,), torch.nan), f"FILE has values in model {BIAS} {NOT_FINITE}"),
    "infinite average": ("ema", BIAS, torch.full((64,), torch.inf), f"FILE has values in ema {BIAS} {NOT_FINITE}"),
    "whole numbers": ("model", BIAS, torch.zeros(64).long(), f"FILE: model {BIAS} is of type int64; expected floating"),
    "another shape": ("ema", BIAS, torch.zeros(65), f"FILE: {BIAS} has shape (65,), expected (64,)"),
    "no weights": ("model", {}, "FILE lacks 32 weights, such as blocks.0.adaLN_modulation.1.bias"),
    "other moments": ("opt.state", 1, {"exp_avg": torch.zeros(3)}, f"optimizer exp_avg of {BIAS} has shape"),
    "no moments": ("opt", "state", {}, "FILE has optimizer states of 0 of 31 weights"),
    "NaN moments": ("opt.state", 1, {"exp_avg": torch.full((64,), torch.nan)}, f"exp_avg of {BIAS} {NOT_FINITE}"),
    "negative step": ("step", -1, "FILE has a step that is no whole number >= 0; use another"),
    "another log": ("log", "sums", [[1.0, 2.0]], "FILE cannot be read (RuntimeError: shape '[4]' is invalid for"),
    "no log": ("log", {}, "FILE cannot be read (KeyError: 'sums'); it cannot be resumed: use another"),
    "no run of ours": ("config", None, "FILE has no config, so it cannot be resumed; use another --results-dir"),
}


@pytest.mark.parametrize("case", TRAINING_STATES)
def test_training_refuses_what_it_cannot_go_on_from(case, run, train_arguments, refused, tmp_path):
    *keys, value, expected = TRAINING_STATES[case]
    state = parent = copy.deepcopy(checkpoint.load(run / "checkpoints" / "0000004.pt"))
    keys = [*keys[0].split("."), *keys[1:]]
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = parent[keys[-1]] | value if isinstance(value, dict) and value else value
    path = tmp_path / "run" / "checkpoints" / "0000003.pt"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    arguments = train_arguments(tmp_path / "run", lr=0.01, ema_decay=0.5, use_rope=True, rope_rotate=2)
    assert expected in refused(train.main, arguments).replace(f"checkpoint {str(path)!r}", "FILE")


# Full disks


def cannot_be_written(option: str, folder: Path) -> str:
    reason = "[Errno 28] No space left on device"
    return f"{option} {str(folder)!r} cannot be written ({reason}); free space there and repeat the command to go on"


def test_a_disk_that_fills_up_while_sampling(sample_arguments, refused, tmp_path, monkeypatch):
    folder, save_png, saved = tmp_path / "samples", pictures.save_png, []

    def filling(image, path):
        saved.append(path)
        if len(saved) > 6:
            path.with_name(path.name + ".partial").write_bytes(b"half")
            raise FULL
        save_png(image, path)

    for images, owner, name, function in (
        (6, pictures, "save_png", filling),
        (13, np.lib.format, "write_array", full),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, function)
            message = refused(sample_ddp.main, sample_arguments(folder), has_begun=True)
        assert message == cannot_be_written("--sample-dir", folder)
        assert len(list(folder.glob("*/*.png"))) == images and not list(folder.glob("*.npz"))
    assert not list(folder.rglob("*.partial"))
    sample_ddp.main(sample_arguments(folder))
    images, labels = read_samples(folder)
    assert len(images) == len(labels) == 13
    sample_ddp.main(sample_arguments(folder, num_fid_samples=4))  # fewer later: what is there stays
    fewer, fewer_labels = read_samples(folder)
    assert np.array_equal(fewer, images[:4]) and fewer_labels.tolist() == labels[:4].tolist()
    assert len(list(folder.glob("*/*.png"))) == 13


def test_space_for_samples_is_looked_at_before_sampling(sample_arguments, refused, tmp_path, monkeypatch):
    usage, folder = files.shutil.disk_usage(tmp_path), tmp_path / "samples"
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    message = refused(sample_ddp.main, sample_arguments(folder))
    assert message.startswith(f"--sample-dir {str(folder)!r} cannot be written (it needs 58.4 kB and 50 kB are free ")
    sample_ddp.main(sample_arguments(folder, num_fid_samples=11))
    assert len(read_samples(folder)[0]) == 11


@pytest.mark.parametrize("partly", [True, False])
def test_a_disk_that_fills_up_while_caching(partly, cache_arguments, refused, tmp_path, monkeypatch):
    """A write that takes a part of the bytes is not the end of it: the next one says that the disk is full."""
    folder, pwrite, written = tmp_path / "latents", os.pwrite, []

    def filling(descriptor, contents, offset):
        written.append(offset)
        if len(written) == 15 and partly:
            return pwrite(descriptor, contents[:10], offset)
        return full() if len(written) >= 15 else pwrite(descriptor, contents, offset)

    monkeypatch.setattr(latents, "CHUNK", 5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", filling)
        message = refused(cache_latents.main, cache_arguments(folder), has_begun=True)
    assert message == cannot_be_written("--latents-dir", folder) and not (folder / "meta.json").exists()
    for root in (folder, tmp_path / "whole"):
        cache_latents.main(cache_arguments(root))
    for name in ("moments.npy", "labels.npy"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_disk_too_full_to_begin(train_arguments, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "write_text", full)
    assert refused(train.main, train_arguments(tmp_path / "run"), has_begun=True) == (
        cannot_be_written("--results-dir", tmp_path / "run")
    )


def test_a_log_that_cannot_be_written_is_a_warning(tmp_path, capsys, monkeypatch):
    logger = monitor.make_logger(tmp_path)
    logger.info("a line")
    monkeypatch.setattr(logger.handlers[1].stream, "write", full, raising=False)
    logger.info("another")
    output = capsys.readouterr()
    assert "another\n" in output.out and output.err == ""
    assert f"warning: {tmp_path / 'log.txt'} lacks a line: [Errno 28] No space left on device\n" in output.out


def test_folders_where_files_belong(train_arguments, sample_arguments, refused, tmp_path, capsys):
    (tmp_path / "run" / "log.txt").mkdir(parents=True)
    train.main(train_arguments(tmp_path / "run", max_steps=1))
    warning = f"warning: {tmp_path / 'run' / 'log.txt'} lacks a line: [Errno 21] Is a directory"
    assert warning in capsys.readouterr().out and (tmp_path / "run" / "checkpoints" / "0000001.pt").exists()
    arguments = sample_arguments(tmp_path / "samples")
    sample_ddp.main([*arguments, "--print-name"])
    npz = Path(capsys.readouterr().out.strip())
    npz.mkdir(parents=True)
    message = refused(sample_ddp.main, arguments, has_begun=True)
    assert message.startswith(f"--sample-dir {str(npz.parent)!r} cannot be written ([Errno 21] Is a directory: ")


# Names


def test_awkward_names_work_in_every_command(image_folder, vae_folder, cache_arguments, tmp_path):
    """Quotes, dollars, line breaks, backslashes and other alphabets, in every path and every class."""
    root = tmp_path / AWKWARD
    images, cache, results, samples = (root / f"{name} {AWKWARD}" for name in ("images", "latents", "run", "samples"))
    images.mkdir(parents=True)
    (root / "vae").symlink_to(vae_folder)
    for number, name in enumerate(("ant", "bee", "käfer")):
        (images / f"{AWKWARD}{number}").symlink_to(image_folder / name)
    cache_latents.main(cache_arguments(cache, data_path=images, vae=root / "vae"))
    options = TINY_RUN | {"latents_dir": cache, "results_dir": results, "max_steps": 2}
    train.main(command_line(options | {"use_rope": True}))
    config = json.loads((results / "config.json").read_text(encoding="utf-8"))
    assert config["data"]["classes"] == [f"{AWKWARD}{number}" for number in range(3)]
    options = {"ckpt": results, "sample_dir": samples, "num_fid_samples": 3, "num_sampling_steps": 2}
    sample_ddp.main(command_line(options | {"precision": "fp32"}))
    (npz,) = samples.glob("*.npz")
    measure.main(["--samples", str(npz)])
    assert json.loads(npz.with_suffix(".digits.metrics.json").read_text())["samples"] == 3
    visualize_rope.main(["--rope-rotate", "2", "--grid", "4", "--only", "directions", "--out", str(root / "r.png")])
    digits.main([str(root / "digits"), "--size", "8"])
    assert (root / "r.png").exists() and (root / "digits" / "9").is_dir()


def test_names_that_are_not_utf8(image_folder, train_arguments, sample_arguments, refused, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).symlink_to(image_folder / "ant")
    folder = os.fsencode(tmp_path / "images" / name)
    assert refused(train.main, train_arguments(tmp_path / "run", data_path=tmp_path / "images")) == (
        f"class folder {folder!r} has a name that is not UTF-8; rename it, since the name goes into checkpoints and "
        "config.json"
    )
    link = tmp_path / name
    link.symlink_to(image_folder)
    not_utf8 = f"argument {os.fsencode(link)!r} is not UTF-8; rename what it names, or pass a link to it"
    assert refused(train.main, train_arguments(tmp_path / "run", data_path=link)) == not_utf8
    assert refused(measure.main, ["--samples", link]) == not_utf8
    assert refused(options.command(visualize_rope.main), ["--out", link]) == not_utf8


def test_files_whose_names_are_not_utf8_are_read_and_listed(image_folder, cache_arguments, tmp_path):
    images, name = tmp_path / "images", os.fsdecode(b"caf\xe9.png")
    (images / "ant").mkdir(parents=True)
    (images / "ant" / "a.png").symlink_to(image_folder / "ant" / "00.png")
    (images / "ant" / name).write_bytes(b"damaged")
    cache_latents.main(cache_arguments(tmp_path / "latents", data_path=images, skip_unreadable=True))
    assert (tmp_path / "latents" / "skipped.txt").read_bytes() == os.fsencode(images / "ant" / name) + b"\n"


# Wrong input, in a real process


IN_TURN = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        print("exit status", stop.code, file=sys.stderr, flush=True)
"""


def test_real_commands(image_folder, vae_folder, train_arguments, tmp_path):
    """A mistake is exit status 2 and one line, with nothing that libraries add; a run outlives its output's reader.

    All in one real process, since imports take most of the time of each.
    """
    folder, shared = tmp_path / "out", {"data_path": image_folder, "vae": vae_folder, "image_size": 36}
    mistakes = [  # script, arguments, the line
        ("train.py", command_line(TINY_RUN | shared | {"results_dir": folder}), "--image-size 36 is not divisible by "
         "16 (VAE down-sampling 8 x patch 2); choose a multiple of 16"),
        ("cache_latents.py", command_line(shared | {"latents_dir": folder}), "--image-size 36 is not divisible by 8 "
         "(VAE down-sampling 8 x patch 1); choose a multiple of 8"),
        ("sample_ddp.py", ["--ckpt=a/none.pt", f"--sample-dir={folder}"], "checkpoint 'a/none.pt' does not exist; "
         "expected a file such as checkpoints/0050000.pt, a folder, or hf://user/repo"),
        ("evaluate.py", ["--metrics=is", "--samples=none.npz"], "--samples 'none.npz' does not exist; expected an .npz "
         "with images arr_0 uint8 (N, H, W, 3)"),
        ("visualize_rope.py", ["--rope-theta=-1"], "argument --rope-theta: '-1' is not a number > 0"),
    ]  # fmt: skip
    commands = [[str(ROOT / script), *arguments] for script, arguments, _ in mistakes]
    commands.append([str(ROOT / "train.py"), *train_arguments(tmp_path / "run", max_steps=12, ckpt_every=12)])
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", IN_TURN, json.dumps(commands)]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, **pipes)
    first = process.stdout.readline()
    process.stdout.close()
    expected = "".join(f"{script}: error: {line}\nexit status 2\n" for script, _, line in mistakes)
    assert (process.wait(timeout=600), process.stderr.read()) == (0, expected) and "model: DiT-XS/2" in first
    assert "finished at step 12" in (tmp_path / "run" / "log.txt").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
