"""export.py: what the file holds, that it gives the same images, and files that are not what they should be."""

import json
import resource
import signal
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import export
import sample_ddp
from models import DiT_models
from rope import RopeConfig
from runtime import checkpoint, pretrained
from runtime.options import UserError

pytestmark = pytest.mark.usefixtures("tiny_commands")


@pytest.fixture
def source(run):
    return run / "checkpoints" / "0000007.pt"


@pytest.fixture
def exported(source, tmp_path):
    return export_to(tmp_path / "0000007.safetensors", source)


def export_to(path, source, *more):
    export.main(["--ckpt", str(source), "--out", str(path), *more])
    return path


def metadata(path) -> dict:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rejection(path, weights="ema") -> str:
    with pytest.raises(UserError) as error:
        pretrained.load_trained(path, weights)
    return str(error.value).replace(repr(str(path)), "FILE")


def samples(folder) -> tuple[bytes, bytes, dict]:
    (npz,) = folder.glob("*.npz")
    settings = json.loads(npz.with_suffix(".json").read_text())
    with np.load(npz) as archive:
        return archive["arr_0"].tobytes(), archive["arr_1"].tobytes(), settings | {"checkpoint": None}


# What is written


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_the_file_holds_one_set_of_weights(weights, source, tmp_path, capsys):
    path = export_to(tmp_path / "a.safetensors", source, "--weights", weights)
    tensors, state = load_file(path), torch.load(source, weights_only=True)
    assert tensors.keys() == state[weights].keys()
    assert all(torch.equal(tensors[name], state[weights][name]) for name in tensors)
    about = json.loads(metadata(path)["spiral_rope_dit"])
    trained = pretrained.load_trained(source, weights)
    assert (about["weights"], about["step"], about["weights_sha256"]) == (weights, 7, trained.sha256)
    assert about["source"] == {"file": "0000007.pt", "weights_sha256": trained.sha256}
    assert about["config"]["model"] == trained.config.to_dict() and about["config"]["vae"] == trained.vae
    assert about["config"]["image_size"] == [32, 32] and about["config"]["data"]["classes"] == ["ant", "bee", "käfer"]
    share = path.stat().st_size / source.stat().st_size
    assert 0.24 < share < 0.26  # of weights, average and two moments of Adam
    assert capsys.readouterr().out == (
        f"exported: {path}, {weights} weights, {path.stat().st_size / 1e6:,.1f} MB ({share:.0%} of 0000007.pt), sha256 "
        f"of the weights {trained.sha256}\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # a file to share: readable as others are


def test_an_exported_file_is_loaded_as_what_it_was(source, exported):
    ours, theirs = pretrained.load_trained(exported), pretrained.load_trained(source)
    for name in ("config", "image_size", "vae", "classes", "step", "sha256", "latent_size"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    assert rejection(exported, "model") == "checkpoint FILE has no 'model' weights; pass --weights ema"


def test_exported_and_training_checkpoints_give_the_same_images(exported, sample_arguments, tmp_path):
    sample_ddp.main(sample_arguments(tmp_path / "training"))
    sample_ddp.main(sample_arguments(tmp_path / "exported", ckpt=exported))
    assert samples(tmp_path / "training") == samples(tmp_path / "exported")


def test_a_folder_of_samples_goes_on_with_the_exported_file(exported, sample_arguments, tmp_path, capsys):
    sample_ddp.main(sample_arguments(tmp_path / "samples", num_fid_samples=2))
    sample_ddp.main(sample_arguments(tmp_path / "samples", num_fid_samples=2, ckpt=exported))
    assert "nothing to do: all 2 samples are there" in capsys.readouterr().out


def test_exporting_again_changes_nothing(exported, tmp_path):
    again = export_to(tmp_path / "again.safetensors", exported)
    assert {**load_file(again)}.keys() == load_file(exported).keys()
    first, second = (json.loads(metadata(path)["spiral_rope_dit"]) for path in (exported, again))
    assert second == first | {"source": {**first["source"], "file": "0000007.safetensors"}}


def test_half_keeps_the_frequencies(source, exported, tmp_path):
    path = export_to(tmp_path / "half.safetensors", source, "--half")
    whole, half = load_file(exported), load_file(path)
    assert {name for name, value in half.items() if value.dtype == torch.float32} == {"rope_embedder.freqs"}
    assert all(torch.equal(half[name], whole[name].to(half[name].dtype)) for name in whole)
    assert path.stat().st_size < 0.14 * source.stat().st_size
    trained = pretrained.load_trained(path)
    assert trained.sha256 == json.loads(metadata(path)["spiral_rope_dit"])["weights_sha256"]
    assert {value.dtype for value in trained.model.state_dict().values()} == {torch.float32}
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([10, 900]), torch.tensor([0, 2])
    expected = pretrained.load_trained(source).model(x, t, y)
    torch.testing.assert_close(trained.model(x, t, y), expected, atol=0.01, rtol=0.01)


def test_files_from_elsewhere_need_no_flags_once_exported(tmp_path):
    rope = RopeConfig(rotate=2, theta=100.0)
    model = DiT_models["DiT-XS/2"](input_size=4, num_classes=3, rope=rope)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    flags = "--use-rope --rope-rotate 2 --rope-theta 100 --image-size 32".split()
    path = export_to(tmp_path / "a.safetensors", tmp_path / "a.pt", *flags)
    trained = pretrained.load_trained(path)
    assert (trained.config.rope, trained.image_size, trained.step) == (rope, (32, 32), None)


def test_a_bare_safetensors_file_loads_as_a_bare_state_dict(tmp_path):
    model = DiT_models["DiT-XS/2"](input_size=4, num_classes=3)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    trained = pretrained.load_trained(tmp_path / "a.safetensors")
    assert (trained.config.num_classes, trained.image_size, trained.step) == (3, (32, 32), None)


# What is refused


def test_what_export_refuses(source, exported, refused, tmp_path):
    def message(out, *more, ckpt=source):
        return refused(export.main, ["--ckpt", ckpt, "--out", out, *more])

    before = exported.read_bytes()
    exists = f"--out {str(exported)!r} exists; choose another name, or pass --overwrite to replace a file"
    assert message(exported) == exists
    (tmp_path / "folder.safetensors").mkdir()
    assert message(tmp_path / "folder.safetensors", "--overwrite").startswith("--out ")
    assert message("a.pt") == "--out 'a.pt' is not the name of a safetensors file; end it in .safetensors"
    out = tmp_path / "none" / "a.safetensors"
    assert message(out) == f"--out {str(out)!r} is in a folder that does not exist; make the folder first"
    out = tmp_path / "b.safetensors"
    assert message(out, "--weights", "model", ckpt=exported) == (
        f"checkpoint {str(exported)!r} has no 'model' weights; pass --weights ema"
    )
    assert message(out, "--rope-rotate", "2").startswith("--rope-rotate given without --use-rope;")
    assert message(out, "--use-rope", "--rope-rotate", "4").startswith("--rope-rotate 4 disagrees with checkpoint ")
    assert message(out, "--rope-extend", "interpolate") == (
        "--rope-extend is of no use here: the file has the trained size; give it to the sampling command"
    )
    model = DiT_models["DiT-XS/2"](input_size=4, num_classes=3)
    model.final_layer.linear.bias.data[0] = 1e6
    torch.save(model.state_dict(), tmp_path / "large.pt")
    assert message(out, "--half", ckpt=tmp_path / "large.pt") == (
        "--half: final_layer.linear.bias has values beyond float16; leave --half out"
    )
    assert not out.exists() and exported.read_bytes() == before
    export_to(exported, source, "--overwrite")


def test_a_full_disk_leaves_what_was_there(source, exported, refused, monkeypatch, tmp_path):
    before = exported.read_bytes()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10}))
    message = refused(export.main, ["--ckpt", source, "--out", exported, "--overwrite"])
    assert message.endswith(" and 10 are free on its disk; free some space, or choose another --out")
    assert exported.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [exported.name]


def test_a_write_that_fails_leaves_no_part(source, refused, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = refused(export.main, ["--ckpt", source, "--out", tmp_path / "a.safetensors"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert "could not be written: " in message and message.endswith("; free some space, or choose another --out")
    assert list(tmp_path.iterdir()) == []


# Files that are not what they should be


def rewrite(path, **changes) -> None:
    """Write the file again with other metadata."""
    about = json.loads(metadata(path)["spiral_rope_dit"])
    save_file(load_file(path), path, {"spiral_rope_dit": json.dumps(about | changes)})


def test_damaged_files_are_refused(exported):
    whole = exported.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    unreadable = "; it is truncated or not a checkpoint: copy it again"
    for contents in (
        b"",
        whole[:7],
        whole[: header // 2],
        whole[:-1000],
        whole + bytes(1000),
        b"PK" + whole[2:],
        struct.pack("<Q", 2**62) + whole[8:],
        whole[:8] + b"[" * header + whole[8 + header :],
        b"not a checkpoint",
    ):
        exported.write_bytes(contents)
        message = rejection(exported)
        assert message.startswith("checkpoint FILE cannot be read (") and message.endswith(unreadable)
    flipped = bytearray(whole)
    flipped[-3] ^= 1  # in a mantissa, so that the number stays finite
    exported.write_bytes(flipped)
    assert rejection(exported) == ("checkpoint FILE is damaged: its weights are not the exported ones; copy it again")


def test_weights_of_another_kind_are_refused(exported, tmp_path):
    tensors = load_file(exported)
    bias = "final_layer.linear.bias"
    for value in (tensors[bias].long(), torch.full_like(tensors[bias], torch.nan), tensors[bias].to(torch.float8_e5m2)):
        save_file({**tensors, bias: value}, exported, metadata(exported))
        message = rejection(exported)
        assert message.startswith("checkpoint FILE") and bias in message and "numbers" in message
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert rejection(tmp_path / "other.safetensors").startswith("checkpoint FILE holds no DiT weights")


def test_metadata_of_another_kind_is_refused(exported, monkeypatch):
    other = "checkpoint FILE has metadata that export.py does not write; export it again"
    tensors, about = load_file(exported), metadata(exported)["spiral_rope_dit"]
    for text in (
        "[]",
        "3",
        "{}",
        '{"weights": "opt", "config": {}}',
        '{"weights": "ema", "config": null}',
        '{"weights": []}',
    ):
        save_file(tensors, exported, {"spiral_rope_dit": text})
        assert rejection(exported) == other
    for text in ("{", "[" * 100_000, "1" * 5000):
        save_file(tensors, exported, {"spiral_rope_dit": text})
        assert rejection(exported).startswith("checkpoint FILE cannot be read (")
    save_file(tensors, exported, {"spiral_rope_dit": about})
    for config in ({}, {"model": 1}, {"model": {"model": "DiT-Q/2"}}):
        rewrite(exported, config=config)
        assert rejection(exported).startswith("checkpoint FILE ")
    monkeypatch.setattr(checkpoint, "METADATA_LIMIT", 100)
    save_file(tensors, exported, {"spiral_rope_dit": about})
    assert rejection(exported) == "checkpoint FILE is refused: its metadata has more than 100 characters"
