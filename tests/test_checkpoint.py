"""Checkpoints as files: plain contents, hostile and damaged files, failed writes."""

import argparse
import io
import os
import pickle
import resource
import signal
import threading
import time
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
            == "checkpoint FILE does not exist; expected a file such as checkpoints/0050000.pt, a folder, or hf://user/repo"
        )
    message = refused(sample_ddp.main, ["--ckpt", tmp_path / "none", "--sample-dir", tmp_path / "samples"])
    assert message.startswith(f"checkpoint {str(tmp_path / 'none')!r} does not exist;")
    whole = (run / "checkpoints" / "0000007.pt").read_bytes()
    for contents in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        (tmp_path / "file").write_bytes(contents)
        message = rejection(tmp_path / "file")
        assert message.startswith("checkpoint FILE") and "\n" not in message
    assert message.endswith(DAMAGED)
    (tmp_path / "link.pt").symlink_to(run / "checkpoints" / "0000007.pt")
    assert pretrained.load_trained(tmp_path / "link.pt").step == 7


def test_a_small_file_cannot_claim_much_memory(tmp_path):
    """Compressed entries are refused; a tensor that claims more than its file holds is an error of the file."""
    path = write(tmp_path / "a.pt", {"ema": build().state_dict()})
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    assert rejection(tmp_path / "b.pt").startswith("checkpoint FILE cannot be read (entry ")
    tensor = torch.zeros(4).expand(2**40, 4)  # strides of 0: 16 TB for who would copy it
    claims = "claims 17592186044416 bytes, more than the file holds of it"
    path = write(tmp_path / "c.pt", {"x_embedder.proj.weight": tensor})
    assert rejection(path) == f"checkpoint FILE: x_embedder.proj.weight {claims}"
    with pytest.raises(UserError, match=f": opt.state.1.exp_avg {claims}"):
        checkpoint.load(write(tmp_path / "d.pt", {"opt": {"state": {1: {"exp_avg": tensor}}}}))


def pickled(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


def glob(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


TEN_GIGABYTES = number(10**10)
STORAGE = b"(X\7\0\0\0storage" + glob("torch.FloatStorage") + b"X\1\0\0\0" + b"0X\3\0\0\0cpu%btQ"
TENSOR = glob("torch._utils._rebuild_tensor_v2") + b"(" + STORAGE % b"K\1" + b"K\0%b%b\x89"
TENSOR += glob("collections.OrderedDict") + b")R%btR"
DOUBLED = b"]q\0" + b"".join(b"](h%ch%ceq%c" % (k, k, k + 1) for k in range(60))  # two of the one before
CROOKED = {  # a pickle, what the answer says
    "a list of itself": (pickled(b"]q\0h\0a"), "nested in themselves"),
    "a dict of itself": (pickled(b"}q\0(X\1\0\0\0ah\0u"), "nested in themselves"),
    "lists that multiply": (pickled(DOUBLED), "too many times"),
    "a text that multiplies": (pickled(b"X\0\0\1\0" + b"a" * 2**16 + b"q\0](" + b"h\0" * 2000 + b"e"), "too many t"),
    "nested deeply": (pickled(b"]" * 100_000 + b"a" * 99_999), "nested in themselves, too deeply"),
    "too many opcodes": (pickled(b"]" + b"Na" * 10**6), "opcode 1000001 of its pickle"),
    "a key that is a list": (pickled(b"}(]K\1u"), "TypeError: unhashable type"),
    "a key that is a tuple": (pickled(b"}()K\1u"), "a key of type tuple"),
    "a key that is no text": (pickled(b"}(K\7K\1u"), "holds no DiT weights"),
    "bytes allocated": (pickled(glob("builtins.bytearray"), TEN_GIGABYTES, b"\x85R"), "it asks for builtins.bytearray"),
    "a tensor allocated": (pickled(glob("torch.Tensor"), TEN_GIGABYTES, b"\x85R"), "it asks for torch.Tensor"),
    "a storage allocated": (pickled(glob("torch.FloatStorage"), TEN_GIGABYTES, b"\x85R"), "TypeError: '_Item' object"),
    "a storage that is not there": (pickled(STORAGE % TEN_GIGABYTES), "claims 40000000000 bytes, more than the file"),
    "a table of memory": (pickled(b"}r\xff\xff\xff\x7f"), "stored in place 2147483647"),
    "a huge number": (pickled(b"\x8b\xff\xff\xff\x7f" + b"1" * 100), "it is truncated or not a checkpoint"),
    "a nested tensor": (
        pickled(glob("torch._utils._rebuild_nested_tensor"), b")R"),
        "asks for torch._utils._rebuild_",
    ),
    "a negative bit": (pickled(TENSOR % (b"K\1\x85", b"K\1\x85", b"}(X\3\0\0\0neg\x88u")), "in another way than"),
    "a tensor of 10 GB": (
        pickled(TENSOR % (TEN_GIGABYTES + b"\x85", b"K\0\x85", b"N")),
        "claims 40000000000 bytes, more",
    ),
    "negative lengths": (pickled(TENSOR % (b"J\xff\xff\xff\xff\x85", b"K\1\x85", b"N")), "in another way than"),
    "a class as a value": (pickled(b"}(X\1\0\0\0a", glob("collections.OrderedDict"), b"u"), "a is a type; expected"),
    "a changed class": (pickled(glob("argparse.Namespace"), b"N}(X\1\0\0\0aK\1u\x86b"), "is a type; expected"),
    "not ended": (pickled(b"}")[:-1], "it is truncated or not a checkpoint"),
}


@pytest.mark.parametrize("case", CROOKED)
def test_what_torch_save_does_not_write_is_refused_at_once(case, tmp_path):
    """Whatever the pickle of a small file asks for, in an archive or before its time: no memory, no endless walk."""
    contents, expected = CROOKED[case]
    header = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {})]
    (tmp_path / "stream.pt").write_bytes(b"".join([*header, contents, pickle.dumps([], protocol=2)]) + bytes(12))
    entries = {"data.pkl": contents, "byteorder": b"little", "data/0": bytes(4), "version": b"3\n"}
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        for name, entry in entries.items():
            archive.writestr(f"archive/{name}", entry)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("archive.pt", "stream.pt"):
        started = time.perf_counter()
        message = rejection(tmp_path / name)
        assert message.startswith("checkpoint FILE") and expected in message and len(message) < 600, message
        assert time.perf_counter() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
    assert not hasattr(argparse.Namespace, "a")


def test_archives_that_torch_save_does_not_write_are_refused(tmp_path):
    path = write(tmp_path / "a.pt", {"ema": build().state_dict()})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:  # which of the two is read depends on the reader
        for name, contents in entries.items():
            archive.writestr(name, contents)
        archive.writestr("a/DATA.pkl", pickled(b"}"))
    assert rejection(tmp_path / "twice.pt").startswith("checkpoint FILE cannot be read (two of its entries share ")
    with zipfile.ZipFile(tmp_path / "many.pt", "w") as archive:
        archive.writestr("a", b"")
        archive.infolist()[0].extra = b"\0\0\xfb\xff" + bytes(2**16 - 5)
        archive.filelist *= 300
        archive._didModify = True
    assert "its list of members has 19" in rejection(tmp_path / "many.pt")
