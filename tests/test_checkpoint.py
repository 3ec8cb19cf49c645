"""Checkpoints as files: plain contents, hostile and damaged files, failed writes."""

import argparse
import io
import os
import pickle
import resource
import signal
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

import sample_ddp
from models import DiT_models
from runtime import checkpoint, memory, pretrained
from runtime.options import UserError

pytestmark = pytest.mark.usefixtures("tiny_commands")
DAMAGED = "; it is truncated or not a checkpoint: copy it again"


def build(name: str = "DiT-XS/2", **options):
    """A model of 32 x 32 images with weights that are not zero."""
    torch.manual_seed(0)
    model = DiT_models[name](**({"input_size": 4} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def write(path: Path, contents, **options) -> Path:
    torch.save(contents, path, **options)
    return path


def rejection(path, weights="ema", given=None) -> str:
    """The message with which a file is refused, without the name of the file."""
    with pytest.raises(UserError) as error:
        pretrained.load_trained(path, weights, given)
    return str(error.value).replace(repr(str(path)), "FILE")


@contextmanager
def disk_full_at(size: int):
    """A limit on the size of files stands in for a disk that fills up half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


# What is written


def leaves(value):
    """All keys and values in nested containers."""
    if isinstance(value, dict | list | tuple):
        entries = [entry for item in value.items() for entry in item] if isinstance(value, dict) else value
        for entry in entries:
            yield from leaves(entry)
    else:
        yield value


def test_a_checkpoint_holds_plain_types_only(run):
    state = torch.load(run / "checkpoints" / "0000007.pt", weights_only=True)
    assert list(state) == ["model", "ema", "opt", "step", "config", "args", "log"]
    kinds = {type(leaf) for leaf in leaves({**state, "model": dict(state["model"]), "ema": dict(state["ema"])})}
    assert kinds <= {torch.Tensor, str, int, float, bool, type(None)}
    assert state["step"] == 7 and state["config"]["model"]["rope"]["rotate"] == 2
    assert state["args"]["image_size"] == [32, 32]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "0000001.pt"
    checkpoint.save(path, {"value": torch.zeros(100_000)})
    before = path.read_bytes()
    start = r"checkpoint '.*0000001\.pt' could not be written: "
    with disk_full_at(100_000), pytest.raises(checkpoint.SaveError, match=start):
        checkpoint.save(path, {"value": torch.ones(100_000)})
    monkeypatch.setattr("shutil.disk_usage", lambda _: argparse.Namespace(free=10))
    with pytest.raises(checkpoint.SaveError, match=f"{start}.*it needs 4.* and 10 B are free"):
        checkpoint.save(path, {"nested": [{"value": torch.ones(100), "step": torch.ones(1)}]})
    assert [file.name for file in tmp_path.iterdir()] == ["0000001.pt"]
    assert path.read_bytes() == before


def test_a_file_written_beside_training_has_the_bytes_of_a_state_that_has_changed_since(tmp_path, monkeypatch):
    """Of any shape and type, in all that a state dict may hold; and the room of the copy is used again."""
    layer, go_on, replace = torch.nn.Linear(300, 7), threading.Event(), os.replace
    state = {"model": layer.state_dict(), "moments": [{"step": torch.tensor(3.0)}, (torch.ones(2, 3).bfloat16(), "x")]}
    state |= {"none": torch.zeros(0), "flags": torch.tensor([True, False, True]), "number": 5}
    monkeypatch.setattr(checkpoint, "PIECE", 8000)  # less than the weights, more than the others
    monkeypatch.setattr(os, "replace", lambda *names: (go_on.wait(60), replace(*names)))
    writer = checkpoint.BackgroundWriter(pytest.fail)
    for number in range(2):
        expected, path = io.BytesIO(), tmp_path / f"{number}.pt"
        torch.save(state, expected)
        go_on.clear()
        writer.begin(path, state)
        with torch.no_grad():
            layer.weight += 1
        assert writer.finished(wait=False) is None and not path.exists()
        go_on.set()
        assert writer.finished(wait=True) == path and writer.finished(wait=True) is None
        assert path.read_bytes() == expected.getvalue()
    writer.close()


@pytest.mark.parametrize(
    "version, listed, limit, usage, cache",
    [
        (1, "5:cpu:/elsewhere\n4:memory:/job/step", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
        (2, "0::/job/step", "max", "current", "inactive_file"),
    ],
)
def test_memory_that_control_groups_leave(version, listed, limit, usage, cache, tmp_path, monkeypatch):
    """The least of what the job, its step and the machine leave counts; cached files are as good as free."""
    root = tmp_path / "memory" if version == 1 else tmp_path
    for folder, most in ((root / "job", 1000_000), (root / "job" / "step", 2**63 - 4096 if version == 1 else "max")):
        folder.mkdir(parents=True)
        for name, value in ((limit, most), (usage, 900_000), ("stat", f"cache 7\n{cache} 300000\nother 5")):
            (folder / f"memory.{name}").write_text(f"{value}\n")
    (tmp_path / "cgroup").write_text(f"{listed}\n")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "peak", lambda: psutil.Process().memory_info().rss)
    assert memory.available() == pytest.approx(400_000, abs=100_000)
    (root / "job" / f"memory.{limit}").unlink()  # of a group outside a container
    assert memory.available() > 10_000_000


def test_memory_of_the_next_peak_is_left_free(monkeypatch):
    taken = psutil.Process().memory_info().rss
    monkeypatch.setattr(memory, "peak", lambda: taken + 5_000_000_000)
    free = psutil.virtual_memory().available
    assert memory.available() == pytest.approx(free - 5_000_000_000, abs=500_000_000)


def test_old_checkpoints_are_pruned_by_number(tmp_path):
    steps = [900_000, 9_000_000, 10_000_000, 100_000_000]
    paths = [checkpoint.step_path(tmp_path, step) for step in steps]
    others = {tmp_path / name for name in ("best.pt", "0000001.pt.partial", "notes.txt", "1.pt")}
    for path in (*paths, *others):
        path.touch()
    checkpoint.prune(paths[-1], None)
    assert checkpoint.training_checkpoints(tmp_path) == paths
    checkpoint.prune(paths[2], 2)  # the last was damaged when the run resumed: left alone
    assert set(tmp_path.iterdir()) == {*paths[1:], *others}


def test_the_newest_readable_checkpoint_is_the_latest(tmp_path):
    reports = []
    assert checkpoint.latest(tmp_path, reports.append) is None  # a fresh start
    whole, damaged = (write(checkpoint.step_path(tmp_path, step), {"value": torch.ones(9)}) for step in (4, 7))
    flipped = bytearray(damaged.read_bytes())
    flipped[flipped.index(torch.ones(9).numpy().tobytes()) + 2] ^= 1
    damaged.write_bytes(flipped)
    assert checkpoint.latest(tmp_path, reports.append) == whole
    (report,) = reports
    assert report.startswith(f"warning: skipped a checkpoint: checkpoint {str(damaged)!r} is damaged: checksum of ")
    whole.unlink()
    with pytest.raises(UserError, match="no checkpoint in '.*' can be read; restore one, or remove them to start"):
        checkpoint.latest(tmp_path, reports.append)


# What is refused


class Marker:
    """Unpickles by creating a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["alone", "beside weights", "in args"])
def test_a_pickle_with_code_is_refused_and_does_not_run(zipped, where, refused, tmp_path):
    marker = Marker(tmp_path / "ran")
    state = build().state_dict()
    contents = {
        "alone": marker,
        "beside weights": {"ema": state, "note": marker},
        "in args": {"ema": state, "args": argparse.Namespace(vae=marker)},
    }
    path = write(tmp_path / "hostile.pt", contents[where], _use_new_zipfile_serialization=zipped)
    message = refused(sample_ddp.main, ["--ckpt", path, "--sample-dir", tmp_path / "samples"])
    reason = "it asks for posix.mkdir; only tensors and plain values load"
    assert message == f"checkpoint {str(path)!r} is refused: {reason}"
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.pt"]


def test_other_pickles_are_refused(tmp_path):
    (tmp_path / "values.pt").write_bytes(pickle.dumps({"ema": 1}))
    assert rejection(tmp_path / "values.pt").startswith("checkpoint FILE ")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Marker(tmp_path / "ran"), protocol=2))
    assert rejection(tmp_path / "code.pt").startswith("checkpoint FILE is refused: it asks for posix.mkdir; only")
    path = write(tmp_path / "module.pt", build())
    assert rejection(path) == "checkpoint FILE is refused: it asks for models.DiT; only tensors and plain values load"
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints(run, refused, tmp_path):
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    for path in (tmp_path / "none.pt", tmp_path / "loop.pt"):
        assert (
            rejection(path)
            == "checkpoint FILE does not exist; expected a file such as checkpoints/0050000.pt, or a folder"
        )
    message = refused(sample_ddp.main, ["--ckpt", tmp_path / "none", "--sample-dir", tmp_path / "samples"])
    assert message.startswith(f"checkpoint {str(tmp_path / 'none')!r} does not exist;")
    whole = (run / "checkpoints" / "0000007.pt").read_bytes()
    for contents in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        (tmp_path / "file").write_bytes(contents)
        message = rejection(tmp_path / "file")
        assert message.startswith("checkpoint FILE ") and "\n" not in message
    assert message.endswith(DAMAGED)
    (tmp_path / "link.pt").symlink_to(run / "checkpoints" / "0000007.pt")
    assert pretrained.load_trained(tmp_path / "link.pt").step == 7


def test_a_small_file_cannot_claim_much_memory(tmp_path):
    """Compressed entries are refused; a tensor that claims more than its file holds is an error of the file."""
    path = write(tmp_path / "a.pt", {"ema": build().state_dict()})
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    assert rejection(tmp_path / "b.pt").startswith("checkpoint FILE is refused: entry ")
    tensor = torch.zeros(4).expand(2**40, 4)  # strides of 0: 16 TB for who would copy it
    claims = "claims 17592186044416 bytes, more than the file holds of it"
    path = write(tmp_path / "c.pt", {"x_embedder.proj.weight": tensor})
    assert rejection(path) == f"checkpoint FILE: x_embedder.proj.weight {claims}"
    with pytest.raises(UserError, match=f": opt.state.1.exp_avg {claims}"):
        checkpoint.load(write(tmp_path / "d.pt", {"opt": {"state": {1: {"exp_avg": tensor}}}}))
