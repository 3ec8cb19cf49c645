"""A model from any checkpoint: ours, others', with flags that agree or not, and with contents that make no sense."""

import argparse
import copy
from dataclasses import replace

import pytest
import torch
from test_checkpoint import build, rejection, write

import export
import sample
from diffusion.objectives import OBJECTIVES
from rope import RopeConfig
from runtime.config import ModelConfig, Recipe, RunConfig, VAEConfig
from runtime.pretrained import TABLE, describe, load_trained, weights_sha256

pytestmark = pytest.mark.usefixtures("tiny_commands")
VAE = {"source": "ema", "downsampling": 8}
SPIRAL = RopeConfig(rotate=2, theta=100.0, max_freq_lang=1.25)
SPIRAL_ARGS = {f"rope_{name}": getattr(SPIRAL, name) for name in RopeConfig.__dataclass_fields__ if name != "border"}
BIAS = "final_layer.linear.bias"
DISAGREES = "disagrees with checkpoint FILE, which was trained with"


@pytest.fixture
def path(run):
    return run / "checkpoints" / "0000007.pt"


@pytest.fixture
def save(tmp_path):
    """Writes a file: save(contents) -> its path."""
    return lambda contents, **options: write(tmp_path / "a.pt", contents, **options)


def assert_gives_the_same_images(trained, model) -> None:
    torch.manual_seed(1)
    size = [patches * model.patch_size for patches in model.grid]
    x, t, y = torch.randn(2, 4, *size), torch.tensor([10, 900]), torch.tensor([0, 2])
    with torch.no_grad():
        expected = model(x, t, y)
        assert expected.std() > 0.01
        torch.testing.assert_close(trained.model(x, t, y), expected)


# Our own


def test_a_checkpoint_rebuilds_its_model(path, vae_folder):
    state = torch.load(path, weights_only=True)
    averaged, raw = load_trained(path), load_trained(path, "model")
    for trained, key in ((averaged, "ema"), (raw, "model")):
        assert all(torch.equal(value, state[key][name]) for name, value in trained.model.state_dict().items())
        assert trained.config.model.rope == RopeConfig(rotate=2) and trained.config.model.num_classes == 3
        assert (trained.image_size, trained.step, trained.classes) == ((32, 32), 7, ["ant", "bee", "käfer"])
        vae = trained.config.vae
        assert (vae.source, vae.downsampling, vae.scaling_factor) == (str(vae_folder), 8, 0.5)
        assert trained.config.to_dict() == state["config"] and trained.config.recipe.lr == 0.01
        assert not trained.model.training and weights_sha256(trained, key) == trained.sha256
    assert averaged.sha256 != raw.sha256


def test_what_describes_a_model_is_read_without_its_weights(path, tmp_path):
    whole, value = path.read_bytes(), torch.load(path, weights_only=True)["ema"][BIAS].numpy().tobytes()
    (tmp_path / "0000007.pt").write_bytes(whole.replace(value, b"\xff" * len(value)))  # NaN, and another checksum
    found = describe(tmp_path / "0000007.pt")
    assert found.config == load_trained(path).config and (found.step, found.latent_shape) == (7, (4, 4, 4))
    message = rejection(tmp_path / "0000007.pt")
    assert message.startswith("checkpoint FILE is damaged: checksum of ")
    assert message.endswith(" differs; copy it again")


def test_the_folder_of_a_run_is_its_newest_checkpoint(path):
    found = load_trained(path.parent.parent)
    assert found.path == path and found.sha256 == load_trained(path).sha256


def test_settings_that_came_later_have_their_defaults(path, save):
    """A checkpoint of an earlier version, to which RopeConfig.border, parts of the VAE and of the recipe are new."""
    state = copy.deepcopy(torch.load(path, weights_only=True))
    del state["config"]["model"]["rope"]["border"], state["config"]["recipe"]["weight_decay"]
    state["config"]["vae"], state["config"]["data"] = {"source": "mse"}, {"classes": None}
    state["config"] |= {"validation": {"fraction": 0.1, "fingerprint": "a", "images": 2}, "torch": "2.4", "args": {}}
    config = load_trained(save(state)).config
    assert config.model == load_trained(path).config.model and config.vae == VAEConfig("mse")
    assert config.recipe == replace(load_trained(path).config.recipe, weight_decay=Recipe.weight_decay)
    assert config.validation.left_out == [] and config.objective == "eps" and config.data.images is None
    assert RunConfig.from_dict(config.to_dict()) == config
    del state["config"]["recipe"]  # as the first version of export.py wrote it
    config = load_trained(save({"ema": state["ema"], "config": state["config"] | {"validation": None}})).config
    assert config.recipe is None and config.validation is None


def test_another_objective_is_stored_and_refused_where_it_is_unknown(path, save, monkeypatch):
    state = torch.load(path, weights_only=True)
    config = replace(RunConfig.from_dict(state["config"]), objective="velocity")
    file = save({"ema": state["ema"], "config": config.to_dict()})
    assert rejection(file) == (
        "checkpoint FILE was trained with --objective velocity, which diffusion/objectives.py does not have; expected "
        "one of eps"
    )
    monkeypatch.setitem(OBJECTIVES, "velocity", None)
    assert load_trained(file).config == config


def test_flags_have_to_agree_with_the_checkpoint(path, save):
    agreeing = dict(model="DiT-XS/2", image_size=(32, 32), num_classes=3, use_rope=True, rope={"rotate": 2})
    load_trained(path, given=agreeing)
    args = argparse.Namespace(image_size=32, **SPIRAL_ARGS)
    spiral = save({"ema": build(rope=SPIRAL, num_classes=3).state_dict(), "args": args})
    suffix = "; leave the flag out"
    extend = "; pass --rope-extend extrapolate (positions go on) or interpolate (they are squeezed), or leave the "
    for file in (path, spiral):
        for message, given in {
            f"--model DiT-B/4 {DISAGREES} DiT-XS/2{suffix}": dict(model="DiT-B/4"),
            f"--num-classes 10 {DISAGREES} 3{suffix}": dict(num_classes=10),
            f"--rope-rotate 4 {DISAGREES} 2{suffix}": dict(use_rope=True, rope={"rotate": 4}),
            f"--rope-same-theta True {DISAGREES} False{suffix}": dict(use_rope=True, rope={"same_theta": True}),
            f"--image-size 32x64 {DISAGREES} 32{extend}option out": dict(image_size=(32, 64)),
        }.items():
            assert rejection(file, given=given) == message
    sincos = save(build(num_classes=5).state_dict())
    assert rejection(sincos, given=dict(use_rope=True)) == f"--use-rope True {DISAGREES} False{suffix}"
    for mode in (None, "extrapolate"):
        assert rejection(sincos, given=dict(image_size=(64, 64), rope_extend=mode)) == (
            f"--image-size 64 {DISAGREES} 32 and has a fixed table of sin-cos positions for that size alone; leave the "
            "option out, or use a RoPE checkpoint"
        )


@pytest.mark.parametrize("columns", [2, 4])
def test_positions_of_another_image_size_go_on_or_are_squeezed(columns, path, save):
    """Beyond 2 x columns patches the first frequency, 1.5 radians per patch, keeps its step or is squeezed."""
    state, size = torch.load(path, weights_only=True), (32, 16 * columns)
    config = RunConfig.from_dict(state["config"])
    config = replace(config, image_size=size, model=replace(config.model, input_size=(4, 2 * columns)))
    file = save({"ema": state["ema"], "config": config.to_dict()})
    for mode, steps in (("extrapolate", (1.5, 1.5)), ("interpolate", (1.5 * 2 / 4, 1.5 * columns / 6))):
        trained = load_trained(file, given=dict(image_size=(64, 96), rope_extend=mode))
        assert (trained.image_size, trained.latent_size, trained.rope_extend) == ((64, 96), (8, 12), mode)
        phases = trained.model.rope_embedder.phases(4, 6).view(4, 6, -1)
        for axis, step in enumerate(steps):
            differences = phases.diff(dim=axis)[..., axis * phases.shape[-1] // 2]  # of rows, then of columns
            assert torch.allclose(differences, torch.tensor(step))
    same = load_trained(file, given=dict(image_size=size, rope_extend="extrapolate"))
    assert (same.latent_size, same.rope_extend) == ((4, 2 * columns), None)


# From elsewhere


@pytest.mark.parametrize(
    ("name", "size", "options", "contents"),
    [
        ("DiT-XS/2", 4, dict(num_classes=1000), lambda state: state),  # as the original DiT publishes them
        ("DiT-XS/2", 4, dict(num_classes=5), lambda state: {"ema": {f"module.{name}": state[name] for name in state}}),
        ("DiT-XS/2", 4, dict(num_classes=5, learn_sigma=False), lambda state: state),
        ("DiT-XS/4", 8, dict(num_classes=5), lambda state: state),
        ("DiT-XS/8", 16, dict(num_classes=5), lambda state: state),
    ],
    ids=["bare", "of distributed training", "without variance", "patch 4", "patch 8"],
)
def test_weights_alone_load(name, size, options, contents, save):
    model = build(name, input_size=size, **options)
    trained = load_trained(save(contents(model.state_dict())))
    assert trained.config.model == ModelConfig(name, (size, size), **options)
    assert (trained.image_size, trained.config.vae, trained.step) == ((size * 8,) * 2, VAEConfig("ema"), None)
    assert (trained.classes is None) == (options["num_classes"] != 1000)
    assert_gives_the_same_images(trained, model)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_file_with_a_namespace_loads(save, zipped):
    """As the original DiT's train.py and this method's release write them, the oldest format of torch included."""
    model, other = build(rope=SPIRAL, num_classes=7), build(rope=SPIRAL, num_classes=7).requires_grad_(False)
    other.final_layer.linear.bias += 1
    args = argparse.Namespace(model="DiT-XS/2", image_size=32, num_classes=7, vae="mse", use_rope=True, **SPIRAL_ARGS)
    contents = {"model": other.state_dict(), "ema": model.state_dict(), "opt": {}, "args": args, "train_steps": 12}
    path = save(contents, _use_new_zipfile_serialization=zipped)
    trained = load_trained(path)
    assert trained.config.model == ModelConfig("DiT-XS/2", (4, 4), num_classes=7, rope=SPIRAL)
    assert (trained.image_size, trained.config.vae.source, trained.step) == ((32, 32), "mse", 12)
    assert trained.config.model.rope.border == "clamp"
    assert_gives_the_same_images(trained, model)
    assert_gives_the_same_images(load_trained(path, "model"), other)


def test_half_precision_weights_load(save):
    model = build(num_classes=5)
    trained = load_trained(save({name: value.half() for name, value in model.state_dict().items()}))
    assert {value.dtype for value in trained.model.state_dict().values()} == {torch.float32}
    assert_gives_the_same_images(trained, model.half().float())


def test_a_rope_file_that_does_not_say_which_takes_flags(save):
    model = build(rope=SPIRAL)
    given = dict(use_rope=True, rope=dict(rotate=2, theta=100.0, max_freq_lang=1.25), image_size=(32, 32))
    for args in (None, argparse.Namespace(use_rope=True, rope_theta=100.0)):
        path = save({"ema": model.state_dict(), "args": args})
        assert rejection(path) == (
            "checkpoint FILE uses RoPE and does not say which; pass --use-rope --rope-rotate R and the other --rope "
            "options it was trained with"
        )
        assert load_trained(path, given=given).config.model.rope == SPIRAL
    # Flags that say another theta change nothing: tables derive from the buffer that the file holds.
    trained = load_trained(save(model.state_dict()), given=given | {"rope": dict(rotate=2)})
    assert_gives_the_same_images(trained, model)


def without_null_class(model) -> dict:
    """A state dict as DiT's code makes it with class_dropout_prob=0."""
    state = model.state_dict()
    return state | {TABLE: state[TABLE][:-1].clone()}


def test_a_label_table_without_a_null_class_has_all_its_classes(save, refused, vae_folder, tmp_path):
    """As its args or the flag tell; it is sampled without guidance, and refuses guidance."""
    model = build(num_classes=5, class_dropout_prob=0.0)
    state = without_null_class(model)
    path = save({"ema": state, "args": argparse.Namespace(num_classes=5)})
    for file, given in ((path, None), (write(tmp_path / "b.pt", state), {"num_classes": 5})):
        trained = load_trained(file, given=given)
        assert (trained.config.model.num_classes, trained.config.model.class_dropout_prob) == (5, 0.0)
        assert_gives_the_same_images(trained, model)
        assert torch.equal(trained.model.y_embedder.embedding_table.weight[:5], state[TABLE])
        assert weights_sha256(trained) == trained.sha256
    assert load_trained(write(tmp_path / "c.pt", state)).config.model.num_classes == 4
    export.main(["--ckpt", str(path), "--out", str(tmp_path / "folder")])
    assert load_trained(tmp_path / "folder").config.model.num_classes == 5
    arguments = ["--ckpt", path, "--vae", vae_folder, "--classes", "4", "--dry-run", "--out", tmp_path / "a.png"]
    message = refused(sample.main, arguments)
    assert message.startswith("--cfg-scale 4 is guidance by the null class, which the checkpoint has not learnt (")
    sample.main([str(argument) for argument in [*arguments, "--cfg-scale", "1"]])


def test_a_thousand_rows_are_not_taken_for_999_classes(save):
    path = save(without_null_class(build(num_classes=1000)))
    assert rejection(path) == (
        "checkpoint FILE has a label table of 1000 rows and does not say whether one is the null class; pass "
        "--num-classes 1000 for a model trained without label dropout, or 999"
    )
    for classes in (999, 1000):
        trained = load_trained(path, given={"num_classes": classes})
        assert trained.config.model.num_classes == classes and (trained.classes is None) == (classes == 999)


def test_a_folder_is_told_apart_from_a_missing_file(tmp_path):
    nothing = "checkpoint FILE is a folder without checkpoints/0050000.pt or the like, or config.json and "
    nothing += "model.safetensors; give a file, the folder of a run, or one that export.py wrote"
    (tmp_path / "pipeline" / "unet").mkdir(parents=True)
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "pipeline", tmp_path / "run"):
        assert rejection(folder) == nothing
    (tmp_path / "run" / "checkpoints" / "0000007.pt").touch()
    several = f"checkpoint FILE has those of a run; give one of them, or the run's folder, {str(tmp_path / 'run')!r}"
    assert rejection(tmp_path / "run" / "checkpoints") == several
    settings = "checkpoint FILE is a model's settings without its weights; give the folder, "
    assert rejection(tmp_path / "run" / "config.json") == f"{settings}{str(tmp_path / 'run')!r}"
    assert rejection("hf://user/repo/transformer/config.json") == f"{settings}'hf://user/repo'"
    assert rejection(tmp_path / "none").startswith("checkpoint FILE does not exist; expected a file such as ")


# Not what they should be


def test_wrong_contents_are_named(save):
    state = build(num_classes=5).state_dict()
    bad = {value: state[BIAS].index_fill(0, torch.tensor(3), float(value)) for value in ("nan", "inf")}
    flawed = f"checkpoint FILE has values in {BIAS} that are not finite numbers; use an earlier one"
    asks = "checkpoint FILE is refused: it asks for torch._utils._rebuild_{};"
    other = "checkpoint FILE has no {!r} weights; pass --weights {}"
    for contents, weights, message in (
        ({**state, BIAS: bad["nan"]}, "ema", flawed),
        ({**state, BIAS: bad["inf"]}, "ema", flawed),
        ({**state, BIAS: state[BIAS].long()}, "ema", f"checkpoint FILE: {BIAS} is of type int64; expected floating-"),
        ({**state, BIAS: torch.zeros(3)}, "ema", f"checkpoint FILE: {BIAS} has shape (3,), expected (32,)"),
        ({**state, BIAS: torch.zeros(33)}, "ema", f"checkpoint FILE: {BIAS} has shape (33,), expected (32,)"),
        (  # of two, one is named with the shape expected of it
            {**state, BIAS: torch.zeros(3), "x_embedder.proj.bias": torch.zeros(4)},
            "ema",
            "checkpoint FILE: x_embedder.proj.bias has shape (4,), expected (64,)",
        ),
        ({n: v for n, v in state.items() if n != BIAS}, "ema", f"checkpoint FILE lacks 1 weights, such as {BIAS}"),
        ({**state, "extra": state[BIAS]}, "ema", "checkpoint FILE has 1 unknown weights, such as extra"),
        ({"conv.weight": state[BIAS]}, "ema", "checkpoint FILE holds no DiT weights (no x_embedder.proj.weight); exp"),
        ({}, "ema", "checkpoint FILE holds no DiT weights"),
        ({"ema": {}}, "ema", "checkpoint FILE holds no DiT weights"),
        ([1, 2], "ema", "checkpoint FILE holds a list; expected a dict of weights"),
        ({"model": state}, "ema", other.format("ema", "model")),
        ({"ema": state}, "model", other.format("model", "ema")),
        (
            {**state, "x_embedder.proj.weight": torch.zeros(96, 4, 2, 2)},
            "ema",
            "checkpoint FILE: hidden_size 96, depth 2, patch_size 2 are those of none of DiT-{XL|L|B|S|XS}/{2|4|8}",
        ),
        ({"x_embedder.proj.weight": torch.zeros(64, 4, 2, 2)}, "ema", "checkpoint FILE is not a whole DiT ("),
        ({"ema": state, "args": "a text"}, "ema", "checkpoint FILE cannot be read (dictionary update "),
        ({"ema": {**state, BIAS: torch.zeros(32).to_sparse()}}, "ema", asks.format("sparse_tensor")),
        ({"ema": {**state, BIAS: torch.zeros(32, device="meta")}}, "ema", asks.format("meta_tensor_no_storage")),
    ):
        assert rejection(save(contents), weights).startswith(message)


@pytest.mark.parametrize(
    "config",
    [
        {"model": 1},
        {"model": {"model": "DiT-XS/2"}},
        {"model": {"model": "DiT-Q/2", "num_classes": 3}, "vae": VAE, "data": {}},
        {
            "model": {"model": "DiT-XS/2", "input_size": [4, 4]},
            "vae": {"source": "ema", "downsampling": []},
            "data": {},
        },
        *(
            {"model": {"model": "DiT-XS/2"} | wrong, "vae": VAE, "data": {}}
            for wrong in (
                {"unknown": 1},
                {"rope": {"rotate": "two"}},
                {"rope": {"theta": None}},
                {"num_classes": -7},
                {"num_classes": 10**15},
                {"in_channels": "4"},
                {"input_size": [4]},
            )
        ),
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_refused(config, save):
    state = build(rope=SPIRAL if "rope" in str(config) else None, num_classes=1000).state_dict()
    assert rejection(save({"ema": state, "config": config})).startswith("checkpoint FILE")
