"""export.py: what the file holds, that it gives the same images, and files that are not what they should be."""

import argparse
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import DAMAGED, build, disk_full_at, rejection, write

import export
import sample_ddp
from rope import RopeConfig
from runtime import checkpoint
from runtime.pretrained import load_trained

pytestmark = pytest.mark.usefixtures("tiny_commands")
BIAS = "final_layer.linear.bias"


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


def about(path) -> dict:
    return json.loads(metadata(path)["spiral_rope_dit"])


# What is written


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_the_file_holds_one_set_of_weights(weights, source, tmp_path, capsys):
    path = export_to(tmp_path / "a.safetensors", source, "--weights", weights)
    tensors, state = load_file(path), torch.load(source, weights_only=True)
    assert tensors.keys() == state[weights].keys()
    assert all(torch.equal(tensors[name], state[weights][name]) for name in tensors)
    sha256 = load_trained(source, weights).sha256
    origin = {"file": "0000007.pt", "weights_sha256": sha256}
    expected = {"weights": weights, "step": 7, "weights_sha256": sha256, "source": origin, "config": state["config"]}
    assert about(path) == expected
    share = path.stat().st_size / source.stat().st_size
    assert 0.24 < share < 0.26  # of weights, average and two moments of Adam
    assert capsys.readouterr().out == (
        f"exported: {path}, {weights} weights, {path.stat().st_size / 1e6:,.1f} MB ({share:.0%} of 0000007.pt), sha256 "
        f"of the weights {sha256}\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # a file to share: readable as others are


def test_an_exported_file_is_loaded_as_what_it_was(source, exported, tmp_path):
    ours, theirs = load_trained(exported), load_trained(source)
    for name in ("config", "image_size", "latent_size", "step", "sha256"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    assert rejection(exported, "model") == "checkpoint FILE has no 'model' weights; pass --weights ema"
    again = export_to(tmp_path / "again.safetensors", exported)
    assert about(again) == about(exported) | {"source": {**about(exported)["source"], "file": exported.name}}


def test_a_folder_of_samples_goes_on_with_the_exported_file(exported, sample_arguments, tmp_path, capsys):
    """The images are the same, too."""
    sample_ddp.main(sample_arguments(tmp_path / "samples", num_fid_samples=2))
    sample_ddp.main(sample_arguments(tmp_path / "samples", num_fid_samples=2, ckpt=exported))
    assert "nothing to do: all 2 samples are there" in capsys.readouterr().out
    sample_ddp.main(sample_arguments(tmp_path / "exported", num_fid_samples=2, ckpt=exported))
    folders = (tmp_path / "samples", tmp_path / "exported")
    first, second = ([path.read_bytes() for path in sorted(folder.rglob("0*.png"))] for folder in folders)
    assert first == second and len(first) == 2


def test_half_keeps_the_frequencies(source, exported, tmp_path):
    path = export_to(tmp_path / "half.safetensors", source, "--half")
    whole, half = load_file(exported), load_file(path)
    assert {name for name, value in half.items() if value.dtype == torch.float32} == {"rope_embedder.freqs"}
    assert all(torch.equal(half[name], whole[name].to(half[name].dtype)) for name in whole)
    assert path.stat().st_size < 0.14 * source.stat().st_size
    trained = load_trained(path)
    assert trained.sha256 == about(path)["weights_sha256"]
    assert {value.dtype for value in trained.model.state_dict().values()} == {torch.float32}
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([10, 900]), torch.tensor([0, 2])
    torch.testing.assert_close(trained.model(x, t, y), load_trained(source).model(x, t, y), atol=0.01, rtol=0.01)


def test_files_from_elsewhere_need_no_flags_once_exported(tmp_path):
    rope = RopeConfig(rotate=2, theta=100.0)
    write(tmp_path / "a.pt", build(num_classes=3, rope=rope).state_dict())
    flags = "--use-rope --rope-rotate 2 --rope-theta 100 --image-size 32".split()
    trained = load_trained(export_to(tmp_path / "a.safetensors", tmp_path / "a.pt", *flags))
    assert (trained.config.model.rope, trained.image_size, trained.step) == (rope, (32, 32), None)


def test_a_bare_safetensors_file_loads_as_a_bare_state_dict(tmp_path):
    save_file(build(num_classes=3).state_dict(), tmp_path / "a.safetensors")
    trained = load_trained(tmp_path / "a.safetensors")
    assert (trained.config.model.num_classes, trained.image_size, trained.step) == (3, (32, 32), None)


# What is refused


def test_what_export_refuses(source, exported, refused, tmp_path):
    write(tmp_path / "large.pt", build(num_classes=3).state_dict() | {BIAS: torch.full((32,), 1e6)})
    (tmp_path / "folder.safetensors").mkdir()
    before, out = exported.read_bytes(), tmp_path / "b.safetensors"
    for ckpt, target, more, message in (
        (
            source,
            exported,
            [],
            f"--out {str(exported)!r} exists; choose another name, or pass --overwrite to replace it",
        ),
        (source, "a.pt", [], "--out 'a.pt' has the wrong ending; end it in .safetensors"),
        (source, tmp_path / "folder.safetensors", ["--overwrite"], "--out '"),
        (exported, out, ["--weights=model"], f"checkpoint {str(exported)!r} has no 'model' weights;"),
        (source, out, ["--rope-extend=interpolate"], "--rope-extend is of no use here: the file has the trained size;"),
        (tmp_path / "large.pt", out, ["--half"], f"--half: {BIAS} has values beyond float16; leave --half out"),
    ):
        assert refused(export.main, ["--ckpt", ckpt, "--out", target, *more]).startswith(message)
    assert not out.exists() and exported.read_bytes() == before
    export_to(exported, source, "--overwrite")


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_full_disk_leaves_what_was_there(more, source, exported, refused, monkeypatch, tmp_path, capsys):
    before, arguments = exported.read_bytes(), ["--ckpt", str(source), "--out", str(exported), "--overwrite", *more]
    start = f"--out {str(exported)!r} cannot be written ("
    if not more:
        with disk_full_at(100_000):
            assert refused(export.main, arguments) == f"{start}File too large); free some space, or choose another"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: argparse.Namespace(free=10))
        assert refused(export.main, arguments).startswith(f"{start}it needs 727 kB and 10 B are free on the disk); ")
    if more:
        export.main(arguments)
        assert capsys.readouterr().out.startswith("dry run: would export the ema weights of ")
    assert exported.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [exported.name]


# Files that are not what they should be


def test_damaged_files_are_refused(exported):
    whole = exported.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    cut = [b"", whole[:7], whole[: header // 2], whole[:-1000]]
    long = [whole + bytes(1000), struct.pack("<Q", 2**62) + whole[8:]]
    other = [b"PK" + whole[2:], whole[:8] + b"[" * header + whole[8 + header :], b"not a checkpoint"]
    for contents in (*cut, *long, *other):
        exported.write_bytes(contents)
        message = rejection(exported)
        assert message.startswith("checkpoint FILE cannot be read (") and message.endswith(DAMAGED)
    flipped = bytearray(whole)
    flipped[-3] ^= 1  # in a mantissa, so that the number stays finite
    exported.write_bytes(flipped)
    assert rejection(exported) == "checkpoint FILE is damaged: its weights are not the exported ones; copy it again"


def test_weights_of_another_kind_are_refused(exported):
    tensors = load_file(exported)
    bias, described = tensors[BIAS], metadata(exported)
    for value in (bias.long(), torch.full_like(bias, torch.nan), bias.to(torch.float8_e5m2)):
        save_file({**tensors, BIAS: value}, exported, described)
        message = rejection(exported)
        assert message.startswith("checkpoint FILE") and BIAS in message and "numbers" in message


OTHERS = "checkpoint FILE has metadata that export.py does not write; export it again"
NO_WEIGHTS = ['{"weights": "opt", "config": {}}', '{"weights": "ema", "config": null}', '{"weights": []}']


def test_metadata_of_another_kind_is_refused(exported, monkeypatch):
    tensors, text = load_file(exported), metadata(exported)["spiral_rope_dit"]
    cases = dict.fromkeys(["[]", "3", "{}", *NO_WEIGHTS], OTHERS)
    cases |= dict.fromkeys(["{", "[" * 100_000, "1" * 5000], "checkpoint FILE cannot be read (")
    for config in ({}, {"model": 1}, {"model": {"model": "DiT-Q/2"}}):
        cases[json.dumps(json.loads(text) | {"config": config})] = "checkpoint FILE "
    for written, message in cases.items():
        save_file(tensors, exported, {"spiral_rope_dit": written})
        assert rejection(exported).startswith(message)
    monkeypatch.setattr(checkpoint, "METADATA_LIMIT", 100)
    save_file(tensors, exported, {"spiral_rope_dit": text})
    assert rejection(exported) == "checkpoint FILE is refused: its metadata has more than 100 characters"
