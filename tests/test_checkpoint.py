"""Checkpoints: plain contents, files from elsewhere, hostile files, damaged files, failed writes."""

import argparse
import os
import pickle
import resource
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import models
import sample_ddp
from models import DiT_models
from rope import RopeConfig
from runtime import checkpoint, pretrained
from runtime.options import UserError

pytestmark = pytest.mark.usefixtures("tiny_commands")
VAE = {"source": "ema", "downsampling": 8}
SPIRAL = RopeConfig(rotate=2, theta=100.0, max_freq_lang=1.25)
SPIRAL_ARGS = dict(use_rope=True, rope_rotate=2, rope_theta=100.0, rope_freqs_for="lang", rope_max_freq=10.0)
SPIRAL_ARGS |= dict(
    rope_max_freq_lang=1.25, rope_min_freq_lang=0.0, rope_truncate_percentage=0.0, rope_same_theta=False
)


def build(model="DiT-XS/2", rope=None, **options):
    """A model of 32 x 32 images with weights that are not zero."""
    torch.manual_seed(0)
    model = DiT_models[model](input_size=4, rope=rope, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def write(path: Path, contents, **options) -> Path:
    torch.save(contents, path, **options)
    return path


def assert_gives_the_same_images(trained, model) -> None:
    torch.manual_seed(1)
    x, t, y = torch.randn(2, 4, 4, 4), torch.tensor([10, 900]), torch.tensor([0, 2])
    with torch.no_grad():
        expected = model(x, t, y)
        assert expected.std() > 0.01
        torch.testing.assert_close(trained.model(x, t, y), expected)


def rejection(path, weights="ema", given=None) -> str:
    """The message with which a file is refused, without the name of the file."""
    with pytest.raises(UserError) as error:
        pretrained.load_trained(path, weights, given)
    return str(error.value).replace(repr(str(path)), "FILE")


# Our own


def leaves(value):
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield from leaves(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
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


def test_a_checkpoint_rebuilds_its_model(run):
    path = run / "checkpoints" / "0000007.pt"
    state = torch.load(path, weights_only=True)
    averaged, raw = pretrained.load_trained(path), pretrained.load_trained(path, "model")
    for trained, key in ((averaged, "ema"), (raw, "model")):
        assert all(torch.equal(value, state[key][name]) for name, value in trained.model.state_dict().items())
        assert trained.config.rope == RopeConfig(rotate=2) and trained.config.num_classes == 3
        assert (trained.image_size, trained.step, trained.classes) == ((32, 32), 7, ["ant", "bee", "käfer"])
        assert trained.vae["downsampling"] == 8 and trained.vae["scaling_factor"] == 0.5
        assert not trained.model.training
    assert averaged.sha256 != raw.sha256


def test_flags_have_to_agree_with_the_checkpoint(run):
    path = run / "checkpoints" / "0000007.pt"
    agreeing = dict(model="DiT-XS/2", image_size=(32, 32), num_classes=3, use_rope=True, rope={"rotate": 2})
    pretrained.load_trained(path, given=agreeing)

    def disagreement(**given):
        return rejection(path, given=given)

    suffix = "; leave the flag out"
    trained_with = "disagrees with checkpoint FILE, which was trained with"
    assert disagreement(model="DiT-B/4") == f"--model DiT-B/4 {trained_with} DiT-XS/2{suffix}"
    assert disagreement(num_classes=10) == f"--num-classes 10 {trained_with} 3{suffix}"
    remedy = (
        "pass --rope-extend extrapolate (positions go on) or interpolate (they are squeezed), or leave the option out"
    )
    assert disagreement(image_size=(32, 64)) == f"--image-size 32x64 {trained_with} 32; {remedy}"
    assert disagreement(use_rope=True, rope={"rotate": 4}) == f"--rope-rotate 4 {trained_with} 2{suffix}"
    given = dict(use_rope=True, rope={"max_freq_lang": 2.0})
    assert disagreement(**given) == f"--rope-max-freq-lang 2.0 {trained_with} 1.5{suffix}"


def test_positions_of_another_image_size_go_on_or_are_squeezed(run):
    """At twice the size the first frequency, 1.5 radians per patch, keeps its step or halves it (trained: 2 x 2)."""
    path = run / "checkpoints" / "0000007.pt"
    for mode, step in (("extrapolate", 1.5), ("interpolate", 0.75)):
        trained = pretrained.load_trained(path, given=dict(image_size=(64, 96), rope_extend=mode))
        assert (trained.image_size, trained.latent_size, trained.rope_extend) == ((64, 96), (8, 12), mode)
        phases = trained.model.rope_embedder.phases(4, 6).view(4, 6, -1)
        assert torch.allclose(phases[1:, :, 0] - phases[:-1, :, 0], torch.tensor(step))
        column_step = 1.5 if mode == "extrapolate" else 1.5 * 2 / 6
        first_of_columns = phases.shape[-1] // 2
        steps = phases[:, 1:, first_of_columns] - phases[:, :-1, first_of_columns]
        assert torch.allclose(steps, torch.tensor(column_step))
    same = pretrained.load_trained(path, given=dict(image_size=(32, 32), rope_extend="extrapolate"))
    assert (same.latent_size, same.rope_extend) == ((4, 4), None)


def test_sin_cos_positions_reach_no_other_size(tmp_path):
    path = write(tmp_path / "a.pt", {"ema": build(num_classes=5).state_dict()})
    assert rejection(path, given=dict(image_size=(64, 64), rope_extend="extrapolate")) == (
        "--image-size 64 disagrees with checkpoint FILE, which was trained with 32 and has a fixed table of sin-cos "
        "positions for that size alone; leave the option out, or use a RoPE checkpoint"
    )


# From elsewhere


def test_a_bare_state_dict_loads(tmp_path):
    """As the original DiT publishes them: sin-cos positions, 1000 classes, nothing but weights."""
    model = build(num_classes=1000)
    trained = pretrained.load_trained(write(tmp_path / "DiT.pt", model.state_dict()))
    assert trained.config == models.ModelConfig("DiT-XS/2", (4, 4), num_classes=1000)
    assert (trained.image_size, trained.vae["source"], trained.step) == ((32, 32), "ema", None)
    assert_gives_the_same_images(trained, model)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_file_with_a_namespace_loads(tmp_path, zipped):
    """As the original DiT's train.py and this method's release write them, the oldest format of torch included."""
    model, other = build(rope=SPIRAL, num_classes=7), build(rope=SPIRAL, num_classes=7).requires_grad_(False)
    other.final_layer.linear.bias += 1
    args = argparse.Namespace(model="DiT-XS/2", image_size=32, num_classes=7, vae="mse", **SPIRAL_ARGS)
    contents = {"model": other.state_dict(), "ema": model.state_dict(), "opt": {}, "args": args, "train_steps": 12}
    path = write(tmp_path / "0400000.pt", contents, _use_new_zipfile_serialization=zipped)
    trained = pretrained.load_trained(path)
    assert trained.config.rope == SPIRAL and trained.config.rope.border == "clamp"
    assert (trained.config.num_classes, trained.image_size, trained.vae["source"]) == (7, (32, 32), "mse")
    assert trained.step == 12
    assert_gives_the_same_images(trained, model)
    assert_gives_the_same_images(pretrained.load_trained(path, "model"), other)


def test_names_from_distributed_training_load(tmp_path):
    model = build(num_classes=5)
    contents = {"ema": {f"module.{name}": value for name, value in model.state_dict().items()}}
    assert_gives_the_same_images(pretrained.load_trained(write(tmp_path / "a.pt", contents)), model)


def test_half_precision_weights_load(tmp_path):
    model = build(num_classes=5)
    halves = {name: value.half() for name, value in model.state_dict().items()}
    trained = pretrained.load_trained(write(tmp_path / "a.pt", halves))
    assert {value.dtype for value in trained.model.state_dict().values()} == {torch.float32}
    assert_gives_the_same_images(trained, model.half().float())


def test_a_model_without_learned_variance_loads(tmp_path):
    model = build(learn_sigma=False, num_classes=5)
    trained = pretrained.load_trained(write(tmp_path / "a.pt", model.state_dict()))
    assert trained.config.learn_sigma is False
    assert_gives_the_same_images(trained, model)


def test_a_rope_file_that_does_not_say_which_takes_flags(tmp_path):
    model = build(rope=SPIRAL)
    path = write(tmp_path / "a.pt", {"ema": model.state_dict()})
    needs_flags = (
        "checkpoint FILE uses RoPE and does not say which; pass --use-rope --rope-rotate R and the other --rope "
        "options it was trained with"
    )
    assert rejection(path) == needs_flags
    partly = {"ema": model.state_dict(), "args": argparse.Namespace(use_rope=True, rope_theta=100.0)}
    assert rejection(write(tmp_path / "b.pt", partly)) == needs_flags
    given = dict(use_rope=True, rope=dict(rotate=2, theta=100.0, max_freq_lang=1.25), image_size=(32, 32))
    trained = pretrained.load_trained(path, given=given)
    assert trained.config.rope == SPIRAL
    assert_gives_the_same_images(trained, model)


def test_the_frequencies_of_the_file_win(tmp_path):
    """Flags that say another theta change nothing: tables derive from the buffer that the file holds."""
    model = build(rope=SPIRAL)
    given = dict(use_rope=True, rope=dict(rotate=2), image_size=(32, 32))
    trained = pretrained.load_trained(write(tmp_path / "a.pt", model.state_dict()), given=given)
    assert_gives_the_same_images(trained, model)


def test_flags_have_to_agree_with_files_from_elsewhere(tmp_path):
    path = write(tmp_path / "a.pt", {"ema": build(num_classes=5).state_dict()})
    suffix = "disagrees with checkpoint FILE, which was trained with"
    assert rejection(path, given=dict(model="DiT-XS/4")) == f"--model DiT-XS/4 {suffix} DiT-XS/2; leave the flag out"
    assert rejection(path, given=dict(num_classes=1000)).startswith(f"--num-classes 1000 {suffix} 5;")
    assert rejection(path, given=dict(use_rope=True)).startswith(f"--use-rope True {suffix} False;")
    assert rejection(path, given=dict(image_size=(64, 64))).startswith(f"--image-size 64 {suffix} 32 and")
    args = argparse.Namespace(image_size=32, **SPIRAL_ARGS)
    path = write(tmp_path / "b.pt", {"ema": build(rope=SPIRAL).state_dict(), "args": args})
    assert rejection(path, given=dict(use_rope=True, rope={"rotate": 4})).startswith(f"--rope-rotate 4 {suffix} 2;")
    assert rejection(path, given=dict(image_size=(64, 64))).startswith(f"--image-size 64 {suffix} 32;")


# Not what they should be


def changed(state: dict, **changes) -> dict:
    return {name: changes.get(name.replace(".", "_"), value) for name, value in state.items()}


def test_wrong_contents_are_named(tmp_path):
    state = build(num_classes=5).state_dict()

    def message(contents, weights="ema"):
        return rejection(write(tmp_path / "a.pt", contents), weights)

    bias = "final_layer.linear.bias"
    bad = state[bias].clone()
    bad[3] = float("nan")
    not_finite = f"checkpoint FILE has values in {bias} that are not finite numbers; use an earlier one"
    assert message({**state, bias: bad}) == not_finite
    assert message({**state, bias: bad.fill_(float("inf"))}) == not_finite
    whole_numbers = f"checkpoint FILE: {bias} is of type int64; expected floating-point numbers"
    assert message({**state, bias: torch.zeros(32, dtype=torch.long)}) == whole_numbers
    less = {name: value for name, value in state.items() if name != bias}
    assert message(less) == f"checkpoint FILE lacks 1 weights, such as {bias}"
    assert message({**state, "extra": torch.zeros(1)}) == "checkpoint FILE has 1 unknown weights, such as extra"
    assert message({**state, bias: torch.zeros(3)}) == f"checkpoint FILE: {bias} has shape (3,), expected (32,)"
    no_weights = (
        "checkpoint FILE holds no DiT weights (no x_embedder.proj.weight); expected a state dict, or a dict with 'ema' "
        "or 'model'"
    )
    assert message({"conv.weight": torch.zeros(3)}) == no_weights
    assert message({}) == no_weights
    assert message({"ema": {}}) == no_weights
    assert message([1, 2]) == "checkpoint FILE holds a list; expected a dict of weights"
    assert message(torch.zeros(3)) == "checkpoint FILE holds a Tensor; expected a dict of weights"
    assert message({"model": state}) == "checkpoint FILE has no 'ema' weights; pass --weights model"
    assert message({"ema": state}, "model") == "checkpoint FILE has no 'model' weights; pass --weights ema"
    wide = {**state, "x_embedder.proj.weight": torch.zeros(96, 4, 2, 2)}
    assert message(wide) == (
        "checkpoint FILE has hidden size 96, depth 2 and patch 2, which is none of DiT-{XL|L|B|S|XS}/{2|4|8}"
    )
    part = {"x_embedder.proj.weight": torch.zeros(64, 4, 2, 2)}
    assert message(part).startswith("checkpoint FILE is not a whole DiT (")
    assert message({"ema": state, "args": "a text"}).startswith("checkpoint FILE has a config that cannot be read (")
    elsewhere = f"checkpoint FILE: ema.{bias} is {{}}; expected numbers stored in full"
    sparse, on_meta = torch.zeros(32).to_sparse(), torch.zeros(32, device="meta")
    assert message({"ema": {**state, bias: sparse}}) == elsewhere.format("sparse_coo on cpu")
    assert message({"ema": {**state, bias: on_meta}}) == elsewhere.format("strided on meta")


@pytest.mark.parametrize(
    "config",
    [
        {"model": 1},
        {"model": {"model": "DiT-XS/2"}},
        {"model": {"model": "DiT-Q/2", "num_classes": 3}, "vae": VAE, "data": {}},
        {"model": {"unknown": 1}, "vae": VAE, "data": {}},
        {"model": {"model": "DiT-XS/2", "rope": {"rotate": "two"}}, "vae": VAE, "data": {}},
        {"model": {"model": "DiT-XS/2", "rope": {"theta": None}}, "vae": VAE, "data": {}},
        {"model": {"model": "DiT-XS/2", "num_classes": -7}, "vae": VAE, "data": {}},
        {"model": {"model": "DiT-XS/2", "num_classes": 10**15}, "vae": VAE, "data": {}},
        {"model": {"model": "DiT-XS/2", "in_channels": "4"}, "vae": VAE, "data": {}},
        {"model": {"model": "DiT-XS/2", "input_size": [4]}, "vae": VAE, "data": {}},
        {
            "model": {"model": "DiT-XS/2", "input_size": [4, 4]},
            "vae": {"source": "ema"},
            "data": {},
        },
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_refused(config, tmp_path):
    state = build(rope=SPIRAL if "rope" in str(config) else None, num_classes=1000).state_dict()
    message = rejection(write(tmp_path / "a.pt", {"ema": state, "config": config}))
    assert message.startswith(("checkpoint FILE", "--rope-rotate two does not fit"))


class Marker:
    """Unpickles by creating a file."""

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
    assert not (tmp_path / "ran").exists() and not (tmp_path / "samples").exists()


def test_other_pickles_are_refused(tmp_path):
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"ema": 1}))
    assert rejection(tmp_path / "plain.pt").startswith("checkpoint FILE ")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(Marker(tmp_path / "ran"), protocol=2))
    assert rejection(tmp_path / "code.pt").startswith("checkpoint FILE is refused: it asks for posix.mkdir; only")
    path = write(tmp_path / "module.pt", build())
    assert rejection(path) == "checkpoint FILE is refused: it asks for models.DiT; only tensors and plain values load"
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints(run, tmp_path):
    assert rejection(tmp_path / "none.pt") == (
        "checkpoint FILE does not exist; expected a file such as checkpoints/0050000.pt"
    )
    assert rejection(tmp_path).startswith("checkpoint FILE does not exist")
    whole = (run / "checkpoints" / "0000007.pt").read_bytes()
    for name, contents in {"empty": b"", "text": b"not a checkpoint", "half": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(contents)
        message = rejection(tmp_path / name)
        assert message.startswith("checkpoint FILE ") and "\n" not in message
    assert rejection(tmp_path / "half").endswith("; it is truncated or not a checkpoint: copy it again")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    assert rejection(tmp_path / "loop.pt").startswith("checkpoint FILE does not exist")
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
    assert rejection(write(tmp_path / "c.pt", {"x_embedder.proj.weight": tensor})) == (
        "checkpoint FILE: x_embedder.proj.weight claims 17592186044416 bytes, more than the file holds of it"
    )


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_give_clean_errors(seed, tmp_path):
    """Bytes flipped, cut, inserted or zeroed, mostly where the structure of the file is: an error, or it loads."""
    model = build(rope=SPIRAL, num_classes=3)
    args = argparse.Namespace(model="DiT-XS/2", image_size=32, **SPIRAL_ARGS)
    path = write(tmp_path / "whole.pt", {"ema": model.state_dict(), "args": args})
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        structure = [info.header_offset for info in archive.infolist()] + [archive.start_dir, len(whole) - 1]
        pickled = next(info.header_offset for info in archive.infolist() if info.filename.endswith("data.pkl"))
    random, outcomes = np.random.default_rng(seed), {"refused": 0, "loaded": 0}
    for _ in range(100):
        mutated = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            near = pickled + random.integers(9000) if random.random() < 0.6 else random.choice(structure)
            at = int(np.clip(near + random.integers(-60, 200), 0, len(whole) - 1))
            kind = random.integers(10)
            if kind < 6:
                mutated[at : at + 1] = bytes([random.integers(256)])
            elif kind < 8:
                mutated[at : at + 8] = bytes(8)
            elif kind == 8:
                del mutated[at : at + int(random.integers(1, 100))]
            else:
                del mutated[int(random.integers(len(whole))) :]
        path.write_bytes(mutated)
        try:
            pretrained.load_trained(path)
            outcomes["loaded"] += 1
        except UserError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 50


# Writing


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands in for a disk that fills up half-way."""
    path = tmp_path / "0000001.pt"
    checkpoint.save(path, {"value": torch.zeros(100_000)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(checkpoint.SaveError, match=r"checkpoint '.*0000001\.pt' could not be written: "):
            checkpoint.save(path, {"value": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert [file.name for file in tmp_path.iterdir()] == ["0000001.pt"]
    assert path.read_bytes() == before


def test_old_checkpoints_are_pruned_by_number(tmp_path):
    steps = [900_000, 9_000_000, 10_000_000, 100_000_000]
    for step in steps:
        checkpoint.step_path(tmp_path, step).touch()
    for name in ("best.pt", "0000001.pt.partial", "notes.txt"):
        (tmp_path / name).touch()
    checkpoint.prune(checkpoint.step_path(tmp_path, steps[-1]), None)
    assert [int(path.stem) for path in checkpoint.training_checkpoints(tmp_path)] == steps
    checkpoint.prune(checkpoint.step_path(tmp_path, steps[-1]), 2)
    assert [int(path.stem) for path in checkpoint.training_checkpoints(tmp_path)] == steps[2:]
    assert (tmp_path / "best.pt").exists()


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    assert checkpoint.latest(tmp_path, print) is None


def test_a_checkpoint_that_does_not_exist_is_refused(refused, tmp_path):
    path = tmp_path / "missing"
    assert refused(sample_ddp.main, ["--ckpt", path]) == (
        f"checkpoint {str(path)!r} does not exist; expected a file such as checkpoints/0050000.pt"
    )
