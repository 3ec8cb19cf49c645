"""export.py: what file and folder hold, that they give the same images, and files that are not what they should be."""

import argparse
import json
import re
import shutil
import struct
from dataclasses import asdict

import pytest
import torch
from huggingface_hub import hub_mixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import DAMAGED, build, disk_full_at, rejection, write

import export
import sample_ddp
from models import DiT
from rope import RopeConfig
from runtime import files, model_card
from runtime.pretrained import describe, load_trained

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
    assert about(path) == files.sealed(expected)
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
    source = {**about(exported)["source"], "file": exported.name}
    assert about(again) == files.sealed({**about(exported), "source": source})


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


# A folder for the hub


@pytest.fixture
def folder(source, tmp_path):
    return export_to(tmp_path / "spiral v1.5", source)


def edit(path, change) -> None:
    """Change what a JSON file holds."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def same(model, other) -> bool:
    state, expected = model.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_folder_is_the_checkpoint_for_commands_and_for_python(source, folder, tmp_path):
    """The model in evaluation mode, the same weights to the bit, and the same names of what is made with them."""
    whole = load_trained(source)
    assert {"model.safetensors", "config.json", "README.md"} <= {path.name for path in folder.iterdir()}
    found, model = load_trained(folder), DiT.from_pretrained(folder)
    for name in ("config", "image_size", "latent_size", "step", "sha256", "label"):
        assert getattr(found, name) == getattr(whole, name)
    assert same(found.model, whole.model) and same(model, whole.model) and not model.training
    assert describe(folder).config == whole.config
    assert rejection(folder, "model") == "checkpoint FILE has no 'model' weights; pass --weights ema"
    assert load_trained(folder / "model.safetensors").sha256 == whole.sha256  # the file tells all by itself, too
    again = load_trained(export_to(tmp_path / "again", folder))
    assert again.sha256 == whole.sha256 and again.config == whole.config


@pytest.mark.parametrize("rope", [None, RopeConfig(rotate=2, theta=100.0, border="exact")])
def test_what_python_saves_is_a_checkpoint(rope, tmp_path):
    """save_pretrained knows the model alone: the rest is as for files from elsewhere."""
    model = build(num_classes=3, rope=rope, input_size=(4, 8))
    model.save_pretrained(tmp_path / "saved")
    assert same(DiT.from_pretrained(tmp_path / "saved"), model)
    trained = load_trained(tmp_path / "saved")
    assert (trained.image_size, trained.step, trained.label) == ((32, 64), None, "saved")
    assert same(trained.model, model) and trained.config.model.rope == rope
    assert export_to(tmp_path / "exported", tmp_path / "saved").is_dir()
    assert load_trained(tmp_path / "exported").config == trained.config
    save_file({name: value for name, value in model.state_dict().items() if name != BIAS}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").replace(tmp_path / "saved" / "model.safetensors")
    with pytest.raises(RuntimeError, match=BIAS):
        DiT.from_pretrained(tmp_path / "saved")
    assert rejection(tmp_path / "saved") == f"checkpoint FILE lacks 1 weights, such as {BIAS}"


def test_versions_of_the_hub_that_know_no_dataclass_save_rope_too(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_mixin, "is_dataclass", lambda _: False)
    rope = RopeConfig(rotate=2, theta=100.0)
    model = build(num_classes=3, rope=rope)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope"] == asdict(rope)
    assert load_trained(tmp_path).config.model.rope == rope
    assert torch.equal(DiT.from_pretrained(tmp_path).rope_embedder.freqs, model.rope_embedder.freqs)


def test_half_is_of_the_folder_too(source, tmp_path):
    folder = export_to(tmp_path / "half", source, "--half")
    model, expected = DiT.from_pretrained(folder), load_trained(source).model
    assert model.final_layer.linear.bias.dtype == torch.float32
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=1e-2, rtol=1e-2)
    assert "in float16" in (folder / "README.md").read_text()


def test_a_damaged_folder_is_refused(folder, source, tmp_path):
    config, weights = folder / "config.json", folder / "model.safetensors"
    whole, other = (config.read_bytes(), weights.read_bytes()), export_to(tmp_path / "b", source, "--weights", "model")
    damaged = "checkpoint FILE is damaged: its settings are not the exported ones; export it again"
    edit(config, lambda values: values | {"num_heads": 4})
    assert rejection(folder) == damaged
    edit(config, lambda values: values | {"num_heads": 2, "step": 8})
    assert rejection(folder) == damaged
    config.write_bytes(whole[0])
    weights.write_bytes((other / "model.safetensors").read_bytes())
    assert rejection(folder) == "checkpoint FILE is damaged: its weights are not the exported ones; copy it again"
    weights.write_bytes(whole[1][:-1000])
    assert " cannot be read (" in rejection(folder)
    weights.unlink()
    assert rejection(folder) == "checkpoint FILE has no model.safetensors; copy the whole folder"
    weights.write_bytes(whole[1])
    for text in (whole[0][:-20], b"", b"[1]", b"[" * 100_000, b'{"depth": ' + b"9" * 5000 + b"}"):
        config.write_bytes(text)
        message = rejection(folder)
        assert message.startswith(repr(str(config))) and "\n" not in message
    config.unlink()
    assert rejection(folder) == "checkpoint FILE has no config.json; copy the whole folder"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("depth", 10**9),
        ("depth", True),
        ("num_classes", -1),
        ("num_classes", 10**400),
        ("input_size", [4, 4, 4]),
        ("input_size", 4.5),
        ("num_heads", 3),
        ("hidden_size", 96),
        ("class_dropout_prob", float("nan")),
        ("learn_sigma", "yes"),
        ("rope.rotate", -1),
        ("rope.rotate", 5),
        ("rope.theta", float("nan")),
        ("rope.border", "round"),
        ("rope.same_theta", 1),
        ("rope.unknown", 1),
        ("training.vae.scaling_factor", float("inf")),
        ("training.vae.downsampling", 0),
        ("training.data.classes", ["a", "b", "c", "d"]),
        ("training.objective", "velocity"),
        ("step", -1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value, folder, monkeypatch):
    """Without a checksum, as who edits the file by hand would leave it out; nothing is built with such settings."""
    *path, last = name.split(".")

    def change(values: dict) -> dict:
        inner = values
        for key in path:
            inner = inner[key]
        inner[last] = value
        return {key: entry for key, entry in values.items() if key != "sha256"}

    edit(folder / "config.json", change)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "reset_parameters", lambda self: pytest.fail("a model was built"))
        message = rejection(folder)
    assert last in message and message.count("\n") == 0
    if not name.startswith(("training", "step")) and name not in ("rope.theta", "rope.same_theta", "hidden_size"):
        with pytest.raises((ValueError, TypeError), match=last):
            DiT.from_pretrained(folder)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_the_card_says_what_is_known_of_these_weights(weights, source, sample_arguments, tmp_path, capsys):
    """Samples and metrics of other weights are no part of it; its Python runs as it stands."""
    run = tmp_path / "run"
    shutil.copytree(source.parent.parent, run)
    capsys.readouterr()
    for other in ("ema", "model"):
        sample_ddp.main(sample_arguments(run / "samples" / other, num_fid_samples=2, weights=other))
        for path in (run / "samples" / other).iterdir():
            if path.is_file():
                path.rename(run / "samples" / f"{other}{path.suffix}")
        settings = json.loads((run / "samples" / f"{other}.json").read_text())
        metrics = {"fid": 12.5 if other == "ema" else 99.5, "sampling": settings}
        (run / "samples" / f"{other}.metrics.json").write_text(json.dumps(metrics))
    folder = export_to(tmp_path / "a card", run, "--weights", weights)
    text = (folder / "README.md").read_text()
    assert text.startswith("---\ntags:\n- class-conditional\n") and "# DiT-XS/2, Spiral RoPE, K = 4 directions" in text
    assert ("| FID (ddpm, 4 steps, guidance 1.5, seed 0) | 12.5 |" in text) == (weights == "ema")
    assert ("99.5" in text) == (weights == "model")
    assert (folder / model_card.PICTURE).is_file() and f"({model_card.PICTURE})" in text
    for row in ("| images | 24 |", "| classes | ant, bee, käfer |", "| recipe.lr | 0.01 |", "| training loss |"):
        assert row in text
    assert f"--ckpt '{folder}'" in text and f'DiT.from_pretrained("{folder}")' in text
    vae = json.loads((run / "config.json").read_text())["vae"]["source"]
    assert vae not in text and "--vae FOLDER" in text  # a folder of this computer tells others nothing
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace('"FOLDER"', repr(vae)).replace('"50"', '"4"')
    exec(code, scope := {})
    assert scope["images"].shape == (3, 32, 32, 3) and scope["images"].float().std() > 0


def test_the_card_of_a_file_from_elsewhere_tells_no_more_than_is_known(tmp_path):
    path = write(tmp_path / "a.pt", build(num_classes=3).state_dict())
    text = (export_to(tmp_path / "folder", path) / "README.md").read_text()
    assert "sin-cos positions" in text and "These are the weights." in text
    assert not any(word in text for word in ("## Measured", "![", "None", "recipe", "fingerprint"))


# What is refused


def test_a_folder_that_is_not_to_be_written(source, folder, refused, tmp_path):
    (tmp_path / "file").touch()
    arguments = ["--ckpt", source, "--out"]
    exists = f"--out {str(folder / 'config.json')!r} exists; choose another name, or pass --overwrite to replace it"
    assert refused(export.main, [*arguments, folder]) == exists
    assert refused(export.main, [*arguments, tmp_path / "file"]).endswith("is a file); choose another")
    assert refused(export.main, [*arguments, tmp_path / "no" / "folder"]).endswith("make the folder first")
    run = source.parent.parent
    for part in (run, run / "checkpoints"):
        assert refused(export.main, [*arguments, part, "--overwrite"]) == (
            f"--out {str(part)!r} is the folder of a run or of its checkpoints; choose another"
        )


def test_foreign_files_of_a_folder_are_left_alone_and_do_not_count(source, tmp_path, capsys):
    def sizes(folder, source, *more) -> list[str]:
        export_to(folder, source, "--weights=model", *more)
        return re.search(r"weights, (\S+) MB \((\d+)% of ", capsys.readouterr().out).groups()

    expected = sizes(tmp_path / "folder", source)
    notes = tmp_path / "folder" / "notes.txt"
    notes.write_text("mine" * 10**6)
    assert sizes(tmp_path / "folder", source, "--overwrite") == expected
    assert load_trained(tmp_path / "folder", "model").step == 7 and notes.read_text() == "mine" * 10**6
    size, share = sizes(tmp_path / "again", tmp_path / "folder")
    assert float(size) <= float(expected[0]) and 99 <= int(share) < 110  # it has a model card more


def test_a_full_disk_leaves_no_half_folder(source, folder, refused, tmp_path):
    """A new one is gone; of one that was there, what could not be replaced is not taken for a model."""
    with disk_full_at(100_000):
        message = refused(export.main, ["--ckpt", source, "--out", tmp_path / "new"], has_begun=True)
        reason = "cannot be written (File too large); free some space, or choose another"
        assert message == f"--out {str(tmp_path / 'new')!r} {reason}"
        refused(export.main, ["--ckpt", source, "--out", folder, "--overwrite"], has_begun=True)
    assert not (tmp_path / "new").exists()
    assert rejection(folder) == "checkpoint FILE has no config.json; copy the whole folder"


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
    monkeypatch.setattr(files, "LARGEST_JSON", 100)
    save_file(tensors, exported, {"spiral_rope_dit": text})
    assert rejection(exported).startswith("checkpoint FILE cannot be read (its JSON has more than 100 characters); ")
