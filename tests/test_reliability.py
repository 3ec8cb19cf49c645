"""What docs/reliability.md promises across modules: kills, restarts, full disks, awkward names, hostile files."""

import copy
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import fuzz_checkpoint
import numpy as np
import pytest
import torch
from conftest import TINY_RUN, TORCHRUN, command_line

import cache_latents
import models
import sample_ddp
import train
import visualize_rope
from demo import digits, measure
from runtime import checkpoint, distributed, monitor, options, pictures

pytestmark = pytest.mark.usefixtures("tiny_commands")
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
FULL = OSError(28, "No space left on device")
AWKWARD = 'it\'s "a" $HOME `x`\n${y} 日本 é\\'


def arrays(folder: Path):
    (npz,) = folder.glob("*.npz")
    with np.load(npz) as archive:
        return archive["arr_0"], archive["arr_1"]


# Kills and restarts


def test_sampling_killed_again_and_again(run, tmp_path):
    """kill_sampling.py in its short form: one process, two, and one run killed three times give the same images."""
    command = [sys.executable, TESTS / "kill_sampling.py", "--kills", "3", "--folder", tmp_path]
    options = {"num_fid_samples": 24, "num_sampling_steps": 4, "precision": "fp32"}
    process = subprocess.run(
        [*command, "--ckpt", run / "checkpoints" / "0000007.pt", "--", *command_line(options)],
        capture_output=True,
        text=True,
        timeout=600,
        env=ENVIRONMENT,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.endswith("killed 3 of 3 times: {'random': 1, 'half an image': 1, 'half the .npz': 1}\n")
    for name in ("two", "killed"):
        assert f"\n{name}: 24 labels and 96 draws of noise equal; " in process.stdout


def test_a_run_outlives_its_reader_and_a_closed_terminal_stops_one_with_a_checkpoint(
    image_folder, vae_folder, tmp_path
):
    """Two processes at a time: one whose output is a pipe that is closed, one in a terminal that is closed."""

    def command(name: str, **changes) -> list[str]:
        options = TINY_RUN | {"data_path": image_folder, "vae": vae_folder, "results_dir": tmp_path / name} | changes
        return [sys.executable, str(ROOT / "train.py"), *map(str, command_line(options))]

    reader = subprocess.Popen(
        command("piped", max_steps=12), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, command("terminal", max_steps=100_000, ckpt_every=100_000), ENVIRONMENT)
    assert "model: DiT-XS/2" in reader.stdout.readline()
    reader.stdout.close()
    seen = b""
    while b"step 0000003" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    (path,) = (tmp_path / "terminal" / "checkpoints").iterdir()
    log = (tmp_path / "terminal" / "log.txt").read_text()
    assert log.endswith(f"stopped on request at step {int(path.stem):,}; repeat the same command to go on\n")
    assert (reader.wait(timeout=600), reader.stderr.read()) == (0, "")
    assert "finished at step 12" in (tmp_path / "piped" / "log.txt").read_text()


@pytest.mark.parametrize("under_nohup", [False, True])
def test_a_closed_terminal_is_a_request_to_stop_but_under_nohup(under_nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if under_nohup else signal.SIG_DFL)
    try:
        with distributed.StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == (None if under_nohup else "SIGHUP")
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if under_nohup else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


DIES_ONCE = """\
import os, signal, sys
sys.path.insert(0, {tests!r})
import models, train
from conftest import TINY_XS
from runtime import monitor
models.SIZES["XS"].update(TINY_XS)
monitor.plot_loss = lambda _: None
step = train.Trainer.train_step
def train_step(self, batches):
    step(self, batches)
    if self.step == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
train.Trainer.train_step = train_step
train.main()
"""


def test_torchrun_recovers_from_a_killed_process(image_folder, vae_folder, tmp_path):
    """Rank 0, which holds the lock and has a data worker that outlives it, is killed: both start again and go on."""
    (tmp_path / "dies_once.py").write_text(DIES_ONCE.format(tests=str(TESTS)))
    options = TINY_RUN | {"data_path": image_folder, "vae": vae_folder, "results_dir": tmp_path / "run"}
    options |= {"ckpt_every": 2, "num_workers": 1, "log_every": 1}
    process = subprocess.run(
        [*TORCHRUN, "--max-restarts=1", tmp_path / "dies_once.py", *command_line(options)],
        capture_output=True,
        text=True,
        timeout=600,
        env=ENVIRONMENT,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("0000002.pt at step 2") == 1 and process.stdout.count("finished at step 7") == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 8))


# Hostile checkpoints


def test_damaged_checkpoints_never_crash_a_reader(image_folder, vae_folder, tmp_path, monkeypatch):
    """fuzz_checkpoint.py in its short form."""
    for name, value in fuzz_checkpoint.SMALLEST_XS.items():
        monkeypatch.setitem(models.SIZES["XS"], name, value)
    path, trainer = fuzz_checkpoint.prepare(tmp_path, image_folder, vae_folder)
    outcomes = fuzz_checkpoint.fuzz(path, trainer, mutations=120)
    refusals = {key[:2]: times for key, times in outcomes.items() if key[2] == "refused"}
    assert sum(outcomes.values()) == 2 * 120 and len(refusals) == 6 and min(refusals.values()) > 5
    assert outcomes["sampling", "values", "loaded"] > 0  # what it does not read may be anything


def replaced(state: dict, keys: tuple, value) -> dict:
    """A copy of the checkpoint with one value in its tree replaced."""
    state = parent = copy.deepcopy(state)
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = value
    return state


BIAS = "x_embedder.proj.bias"
TRAINING_STATES = {
    "NaN weights": (("model", BIAS), torch.full((64,), torch.nan), f"FILE has values in model {BIAS} that are not "
                    "finite numbers; use an earlier one"),
    "infinite average": (("ema", BIAS), torch.full((64,), torch.inf), f"FILE has values in ema {BIAS} that are not "
                         "finite numbers; use an earlier one"),
    "whole numbers": (("model", BIAS), torch.zeros(64, dtype=torch.long), f"FILE: model {BIAS} is of type int64; "
                      "expected floating-point numbers"),
    "another shape": (("ema", BIAS), torch.zeros(65), f"FILE: {BIAS} has shape (65,), expected (64,)"),
    "no weights": (("model",), {}, "FILE lacks 32 weights, such as blocks.0.adaLN_modulation.1.bias"),
    "moments of another shape": (("opt", "state", 1, "exp_avg"), torch.zeros(3), f"FILE: optimizer exp_avg of {BIAS} "
                                 "has shape (3,), expected (64,)"),
    "moments of nothing": (("opt", "state"), {}, "FILE has optimizer states of 0 of 31 weights"),
    "NaN moments": (("opt", "state", 1, "exp_avg_sq"), torch.full((64,), torch.nan), "FILE has values in optimizer "
                    f"exp_avg_sq of {BIAS} that are not finite numbers; use an earlier one"),
    "negative step": (("step",), -1, "FILE has a step that is no whole number >= 0; use another"),
    "another log": (("log", "sums"), [[1.0, 2.0]], "FILE cannot be resumed (RuntimeError: shape '[4]' is invalid for "
                    "input of size 2); use another"),
    "no log": (("log",), {}, "FILE cannot be resumed (KeyError: 'sums'); use another"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAINING_STATES)
def test_training_refuses_what_it_cannot_go_on_from(case, run, train_arguments, refused, tmp_path):
    keys, value, expected = TRAINING_STATES[case]
    path = tmp_path / "run" / "checkpoints" / "0000003.pt"
    path.parent.mkdir(parents=True)
    torch.save(replaced(checkpoint.load(run / "checkpoints" / "0000004.pt"), keys, value), path)
    before = path.read_bytes()
    arguments = train_arguments(tmp_path / "run", lr=0.01, ema_decay=0.5, use_rope=True, rope_rotate=2)
    assert refused(train.main, arguments).replace(f"checkpoint {str(path)!r}", "FILE") == expected
    assert path.read_bytes() == before and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_small_file_that_claims_10_gb_is_skipped(run, train_arguments, refused, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    state, keys = checkpoint.load(run / "checkpoints" / "0000004.pt"), ("opt", "state", 1, "exp_avg")
    torch.save(replaced(state, keys, torch.zeros(1).expand(2_500_000_000)), folder / "0000003.pt")
    arguments = train_arguments(tmp_path / "run", lr=0.01, ema_decay=0.5, use_rope=True, rope_rotate=2)
    assert refused(train.main, arguments) == (
        f"no checkpoint in {str(folder)!r} can be read; restore one, or remove them to start afresh"
    )
    assert (
        f"warning: skipped a checkpoint: checkpoint {str(folder / '0000003.pt')!r}: opt.state.1.exp_avg claims "
        "10000000000 bytes, more than the file holds of it" in (tmp_path / "run" / "log.txt").read_text()
    )


def test_damage_in_the_weights_is_noticed_before_sampling(run, sample_arguments, refused, tmp_path):
    """One bit of one weight: it would load, and give other images."""
    path = tmp_path / "0000007.pt"
    damaged = bytearray((run / "checkpoints" / "0000007.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    message = refused(sample_ddp.main, sample_arguments(tmp_path / "samples", ckpt=path))
    assert message.startswith(f"checkpoint {str(path)!r} is damaged: checksum of ")
    assert message.endswith(" differs; copy it again") and not (tmp_path / "samples").exists()


# Full disks


def test_a_disk_that_fills_up_while_sampling(sample_arguments, refused, tmp_path, monkeypatch):
    save_png, saved = pictures.save_png, []

    def filling(image, path):
        saved.append(path)
        if len(saved) > 6:
            path.with_name(path.name + ".partial").write_bytes(b"half")
            raise FULL
        save_png(image, path)

    folder = tmp_path / "samples"
    message = (
        f"--sample-dir {str(folder)!r} cannot be written ([Errno 28] No space left on device); free space there and "
        "repeat the command to go on"
    )
    monkeypatch.setattr(pictures, "save_png", filling)
    assert refused(sample_ddp.main, sample_arguments(folder)) == message
    assert len(list(folder.glob("*/*.png"))) == 6 and not list(folder.glob("*.npz"))
    monkeypatch.setattr(pictures, "save_png", save_png)
    write_array = np.lib.format.write_array

    def full(*_):
        raise FULL

    monkeypatch.setattr(np.lib.format, "write_array", full)
    assert refused(sample_ddp.main, sample_arguments(folder)) == message
    assert len(list(folder.glob("*/*.png"))) == 13 and not list(folder.glob("*.npz"))
    assert not list(folder.rglob("*.partial"))
    monkeypatch.setattr(np.lib.format, "write_array", write_array)
    sample_ddp.main(sample_arguments(folder))
    assert len(arrays(folder)[0]) == 13


def test_space_for_samples_is_looked_at_before_sampling(sample_arguments, refused, tmp_path, monkeypatch):
    usage = sample_ddp.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sample_ddp.shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    folder = tmp_path / "samples"
    assert refused(sample_ddp.main, sample_arguments(folder)) == (
        f"--sample-dir {str(folder)!r} needs at least 58.4 kB for 13 images and the .npz of 13, and its disk has 50 kB "
        "free; choose another"
    )
    assert not list(folder.rglob("*.png"))
    sample_ddp.main(sample_arguments(folder, num_fid_samples=11))
    assert len(arrays(folder)[0]) == 11


@pytest.mark.parametrize("partly", [True, False])
def test_a_disk_that_fills_up_while_caching(partly, image_folder, vae_folder, refused, tmp_path, monkeypatch):
    """A write that takes a part of the bytes is not the end of it: the next one says that the disk is full."""
    folder, pwrite, written = tmp_path / "latents", os.pwrite, []
    arguments = {"data_path": image_folder, "vae": vae_folder, "latents_dir": folder, "image_size": 32}
    arguments = command_line(arguments | {"num_workers": 0, "batch_size": 4})

    def filling(descriptor, contents, offset):
        written.append(offset)
        if len(written) == 15 and partly:
            return pwrite(descriptor, contents[:10], offset)
        if len(written) >= 15:
            raise FULL
        return pwrite(descriptor, contents, offset)

    monkeypatch.setattr(cache_latents, "CHUNK", 5)
    monkeypatch.setattr(os, "pwrite", filling)
    assert refused(cache_latents.main, arguments) == (
        f"--latents-dir {str(folder)!r} cannot be written ([Errno 28] No space left on device); free space there and "
        "repeat the command to go on"
    )
    assert not (folder / "meta.json").exists()
    monkeypatch.setattr(os, "pwrite", pwrite)
    cache_latents.main(arguments)
    monkeypatch.setattr(cache_latents, "CHUNK", 5)
    cache_latents.main([*arguments, f"--latents-dir={tmp_path / 'whole'}"])
    assert (folder / "moments.npy").read_bytes() == (tmp_path / "whole" / "moments.npy").read_bytes()
    assert (folder / "labels.npy").read_bytes() == (tmp_path / "whole" / "labels.npy").read_bytes()


def test_a_disk_too_full_to_begin(train_arguments, refused, tmp_path, monkeypatch):
    def full(*_):
        raise FULL

    monkeypatch.setattr(monitor, "write_text", full)
    assert refused(train.main, train_arguments(tmp_path / "run")) == (
        f"--results-dir {str(tmp_path / 'run')!r} cannot be written ([Errno 28] No space left on device); free space "
        "there and repeat the command to go on"
    )


def test_a_log_that_cannot_be_written_is_a_warning(tmp_path, capsys, monkeypatch):
    logger = monitor.make_logger(tmp_path)
    logger.info("a line")
    monkeypatch.setattr(logger.handlers[1].stream, "write", lambda _: (_ for _ in ()).throw(FULL), raising=False)
    logger.info("another")
    output = capsys.readouterr()
    assert "another\n" in output.out and output.err == ""
    assert f"warning: {tmp_path / 'log.txt'} lacks a line: [Errno 28] No space left on device\n" in output.out


# Sampling


def test_fewer_samples_later(run, sample_arguments, tmp_path):
    """The images that are there already stay; the .npz has exactly as many as were asked for."""
    sample_ddp.main(sample_arguments(tmp_path))
    images, labels = arrays(tmp_path)
    sample_ddp.main(sample_arguments(tmp_path, num_fid_samples=4))
    fewer, fewer_labels = arrays(tmp_path)
    assert np.array_equal(fewer, images[:4]) and fewer_labels.tolist() == labels[:4].tolist()
    assert len(list(tmp_path.glob("*/*.png"))) == 13


# Names


def test_awkward_names_work_in_every_command(image_folder, vae_folder, tmp_path, capsys):
    """Quotes, dollars, line breaks, backslashes and other alphabets, in every path and every class."""
    root = tmp_path / AWKWARD
    (root / "vae").parent.mkdir()
    (root / "vae").symlink_to(vae_folder)
    images, latents, results, samples = (root / f"{name} {AWKWARD}" for name in ("images", "latents", "run", "samples"))
    images.mkdir()
    for number, name in enumerate(("ant", "bee", "käfer")):
        (images / f"{AWKWARD}{number}").symlink_to(image_folder / name)
    options = {"data_path": images, "latents_dir": latents, "vae": root / "vae", "image_size": 32, "num_workers": 0}
    cache_latents.main(command_line(options))
    options = TINY_RUN | {"latents_dir": latents, "results_dir": results, "max_steps": 2}
    train.main(command_line(options | {"use_rope": True}))
    config = json.loads((results / "config.json").read_text(encoding="utf-8"))
    assert config["data"]["classes"] == [f"{AWKWARD}{number}" for number in range(3)]
    options = {"ckpt": results / "checkpoints" / "0000002.pt", "sample_dir": samples, "num_fid_samples": 3}
    sample_ddp.main(command_line(options | {"num_sampling_steps": 2, "precision": "fp32"}))
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
    assert refused(sample_ddp.main, sample_arguments(link)) == not_utf8
    assert refused(measure.main, ["--samples", link]) == not_utf8
    assert refused(options.command(visualize_rope.main), ["--out", link]) == not_utf8
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["images", name])


def test_files_whose_names_are_not_utf8_are_read_and_listed(image_folder, vae_folder, tmp_path):
    images, name = tmp_path / "images", os.fsdecode(b"caf\xe9.png")
    (images / "ant").mkdir(parents=True)
    (images / "ant" / "a.png").symlink_to(image_folder / "ant" / "00.png")
    (images / "ant" / name).write_bytes(b"damaged")
    options = {"data_path": images, "latents_dir": tmp_path / "latents", "vae": vae_folder, "image_size": 32}
    cache_latents.main(command_line(options | {"num_workers": 0, "skip_unreadable": True}))
    assert (tmp_path / "latents" / "skipped.txt").read_bytes() == os.fsencode(images / "ant" / name) + b"\n"


# Wrong input, in real processes


class Marker:
    """Unpickles by creating a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_real_processes_end_with_one_line(image_folder, vae_folder, run, tmp_path):
    """Exit status 2 and one line, with nothing that libraries add; all at once, since imports take most of the time."""
    (tmp_path / "input").mkdir()
    hostile, folder = tmp_path / "input" / "a.pt", tmp_path / "out"
    torch.save({"ema": Marker(tmp_path / "ran")}, hostile)
    shared = {"data_path": image_folder, "vae": vae_folder, "image_size": 32}
    training = command_line(TINY_RUN | shared | {"results_dir": folder})
    ckpt = ["--ckpt", run / "checkpoints" / "0000007.pt"]
    cases = [  # script, arguments, the line
        ("train.py", [*training, "--image-size=20"], "--image-size 20 is not divisible by 16 (VAE down-sampling 8 x "
         "patch 2); choose a multiple of 16"),
        ("train.py", [*training, "--lr=0"], "argument --lr: '0' is not a number > 0"),
        ("cache_latents.py", command_line(shared | {"latents_dir": folder, "image_size": 36}), "--image-size 36 is "
         "not divisible by 8 (VAE down-sampling 8 x patch 1); choose a multiple of 8"),
        ("sample_ddp.py", ["--ckpt", hostile, "--sample-dir", folder], f"checkpoint {str(hostile)!r} is refused: it "
         "asks for posix.mkdir; only tensors and plain values load"),
        ("sample_ddp.py", [*ckpt, "--guidance-interval", "0", "9"], "argument --guidance-interval: '9' is not a number "
         "with 0 <= value <= 1"),
        ("evaluate.py", ["--metrics=is", "--samples=none.npz"], "--samples 'none.npz' does not exist; expected an .npz "
         "with images arr_0 uint8 (N, H, W, 3)"),
        ("visualize_rope.py", ["--rope-theta", "-1"], "argument --rope-theta: '-1' is not a number > 0"),
    ]  # fmt: skip
    commands = [[sys.executable, ROOT / script, *arguments] for script, arguments, _ in cases]
    captured = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, **captured) for command in commands]
    results = [(*process.communicate(timeout=600), process.returncode) for process in processes]
    for (script, _, line), result in zip(cases, results, strict=True):
        assert result == ("", f"{script}: error: {line}\n", 2)
    line = "--global-batch-size 7 is not divisible by 2 processes x 1 micro-batches; use a multiple of 2"
    command = [*TORCHRUN, ROOT / "train.py", *training, "--global-batch-size=7"]
    both = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, timeout=600, **captured)
    assert both.stderr.count(f"train.py: error: {line}\n") == 1  # beside torchrun's own summary
    assert [path.name for path in tmp_path.iterdir()] == ["input"]
