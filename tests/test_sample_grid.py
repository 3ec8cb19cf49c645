"""Grids of chosen classes: class names, what an image depends on, frames of the denoising, other sizes, mistakes."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import command_line
from PIL import Image
from test_checkpoint import build, disk_full_at, write

import sample
import sample_ddp
from diffusion.objectives import OBJECTIVES
from models import DiT
from runtime import classes, distributed, pictures, pretrained, sampling
from runtime.options import UserError
from runtime.sampling import SamplingConfig
from runtime.vae import VAE

pytestmark = pytest.mark.usefixtures("tiny_commands")
FOLDERS = ["ant", "bee", "käfer"]
IMAGENET = list(classes.imagenet())


@pytest.fixture
def arguments(run, tmp_path):
    """Command line of a small grid from the run's last checkpoint: arguments(classes="bee", per_class=2)."""

    def build(**changes) -> list[str]:
        options = dict(ckpt=run / "checkpoints" / "0000007.pt", out=tmp_path / "grid.png", num_sampling_steps=3)
        return command_line(options | {"precision": "fp32"} | changes)

    return build


@pytest.fixture
def draw(arguments, monkeypatch):
    """Runs sample.py and returns what draw_grid and draw_strips were given, by their names."""
    drawn = {}

    def record(name, original, *args, **named):
        drawn[name] = args
        return original(*args, **named)

    for name in ("draw_grid", "draw_strips"):
        monkeypatch.setattr(pictures, name, partial(record, name, getattr(pictures, name)))

    def call(**changes) -> dict:
        drawn.clear()
        sample.main(arguments(**changes))
        return dict(drawn)

    return call


@pytest.fixture
def sin_cos_file(tmp_path):
    """A file as DiT publishes them, of a model without RoPE and with ImageNet's number of classes."""
    return write(tmp_path / "DiT-XS-2-32x32.pt", build().state_dict())


def assert_same(images, reference) -> None:
    assert np.abs(np.stack(images).astype(int) - np.stack(reference).astype(int)).max() <= 1


def test_compiled_blocks_draw_the_same_images(draw, arguments, compilations, refused, monkeypatch):
    """Compiled once, also for the smaller last batch; refused where there is no compiler."""
    expected, compiled = (draw(classes="bee", per_class=3, batch_size=2, compile=flag) for flag in (None, True))
    assert_same(compiled["draw_grid"][0], expected["draw_grid"][0])
    assert compilations.frame_count == 1
    monkeypatch.setenv("CXX", "none")
    assert "needs the C++ compiler 'none'" in refused(sample.main, arguments(compile=True))


# Names of classes


def test_names_of_imagenet():
    table = list(classes.imagenet().values())
    found = {label: table[label][0] for label in (0, 207, 360, 388, 999)}
    names = ["tench", "golden retriever", "otter", "giant panda", "toilet tissue"]
    assert list(found.values()) == names and len(table) == 1000
    assert table[0] == ("tench", "Tinca tinca") and list(classes.imagenet())[207] == "n02099601"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("207", 207),
        ("golden retriever", 207),
        ("Golden_Retriever ", 207),
        ("n02099601", 207),
        ("tinca tinca", 0),
        ("goldfish", 1),
        ("partridge", 86),  # the name of 86, a synonym of 82
        ("giant pan", 388),
        ("husky", 248),  # a synonym of 248, and part of the name of 250
        ("siberian hus", 250),
    ],
)
def test_a_class_is_found_by_number_name_synonym_or_part_of_a_name(text, label):
    assert classes.find_labels(f"{text},3", IMAGENET, 1000) == [label, 3]


def test_the_order_of_folders_decides_not_that_of_imagenet():
    folders = ["n02444819", "n02099601", "dogs_and_cats"]
    assert classes.find_labels("golden retriever,otter,dogs and cats,OTTER", folders, 3) == [1, 0, 2, 0]
    described = ["0 otter", "1 golden retriever", "2 dogs_and_cats", "3"]
    assert [classes.describe(label, folders) for label in range(4)] == described
    assert [pictures.class_name(label, folders) for label in (1, 3)] == ["golden retriever", "3"]
    assert classes.describe(7, [str(digit) for digit in range(10)]) == "7"


def test_classes_that_are_drawn_when_none_are_asked_for():
    chosen = classes.default_labels(IMAGENET, 1000)
    assert [classes.describe(label, IMAGENET) for label in chosen[:2]] == ["207 golden retriever", "360 otter"]
    assert len(set(chosen)) == 8
    assert classes.default_labels(FOLDERS, 3) == [0, 1, 2] and classes.default_labels(None, 40) == list(range(8))


NO_CLASS = "is not a class of the checkpoint"
MANY = r"fits \d+ classes: (\d+ [^,;]+, ){7}\d+ [^,;]+ and \d+ more; pass the number of one"


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("3", FOLDERS, f"3 {NO_CLASS}; expected a number from 0 to 2"),
        ("-1", FOLDERS, f"-1 {NO_CLASS}; expected a number from 0 to 2"),
        ("wasp", FOLDERS, f"'wasp' {NO_CLASS}; expected a name such as 'ant', or a number from 0 to 2"),
        ("ant,kafer", FOLDERS, f"'kafer' {NO_CLASS}; did you mean 2 käfer?"),
        ("e", FOLDERS, "'e' fits 2 classes: 1 bee, 2 käfer; pass the number of one"),
        ("", FOLDERS, "has an empty entry; expected names, or numbers from 0 to 2, with commas between"),
        ("ant, ,bee", FOLDERS, "has an empty entry; expected names, or numbers from 0 to 2, with commas between"),
        ("ant", None, "'ant': the checkpoint does not name its classes; pass numbers from 0 to 5"),
        ("crane", IMAGENET, "'crane' fits 2 classes: 134 crane, 517 crane; pass the number of one"),
        ("gold fish", IMAGENET, f"'gold fish' {NO_CLASS}; did you mean 1 goldfish( or .*)?"),
        ("golden retreiver", IMAGENET, f"'golden retreiver' {NO_CLASS}; did you mean 207 golden retriever( or .*)?"),
        ("1000", IMAGENET, f"1000 {NO_CLASS}; expected a number from 0 to 999"),
        ("an", IMAGENET, f"'an' {MANY}"),
    ],
)
def test_what_means_no_class_or_more_than_one_is_refused(text, names, message):
    with pytest.raises(UserError) as error:
        classes.find_labels(text, names, 6 if names is None else len(names))
    assert re.fullmatch(f"--classes {message}\\??", str(error.value))


# The grid


def test_a_grid_of_chosen_classes(draw, run, vae_folder, tmp_path, capsys):
    images, captions, columns, title = draw(classes="käfer,0", per_class=2, seed=5, cfg_scale=2)["draw_grid"]
    assert captions == ["2 käfer", "2 käfer", "0 ant", "0 ant"] and columns == 4
    assert title == "DiT-XS/2, 0000007, cfg 2, ddpm 3 steps, seed 5"
    assert capsys.readouterr().out.endswith(f"grid: {tmp_path / 'grid.png'}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width >= 4 * 64
    trained = pretrained.load_trained(run / "checkpoints" / "0000007.pt")
    config = SamplingConfig("ddpm", steps=3, cfg_scale=2, seed=5)
    indices = [("class", 2, 0), ("class", 2, 1), ("class", 0, 0), ("class", 0, 1)]
    latents = sampling.sample_latents(trained.model, config, indices, [2, 2, 0, 0], (4, 4, 4), torch.device("cpu"))
    assert_same(images, list(VAE(str(vae_folder)).decode(latents).numpy()))


def test_an_image_does_not_depend_on_the_others(draw):
    alone = draw(classes="bee")["draw_grid"][0]
    among = draw(classes="ant,bee,bee,käfer", per_class=2, batch_size=3)["draw_grid"][0]
    assert_same([among[2]], alone)
    assert len({image.tobytes() for image in among}) == 8
    assert_same(among[2:6], draw(classes="1", per_class=4)["draw_grid"][0])
    assert (draw(classes="bee", seed=1)["draw_grid"][0][0] != alone[0]).mean() > 0.01


def test_classes_by_name_where_the_checkpoint_names_them(draw, sin_cos_file, vae_folder, tmp_path):
    """Those of a small checkpoint are all drawn by default; a published file has ImageNet's."""
    assert draw()["draw_grid"][1:3] == (["0 ant", "1 bee", "2 käfer"], 3)
    options = dict(ckpt=sin_cos_file, vae=vae_folder, num_sampling_steps=1)
    assert draw(classes="giant panda,207", **options)["draw_grid"][1] == ["388 giant panda", "207 golden retriever"]
    assert len(draw(**options)["draw_grid"][0]) == 8
    options["ckpt"] = write(tmp_path / "nameless.pt", build(num_classes=6).state_dict())
    assert draw(classes="5,2", **options)["draw_grid"][1] == ["5", "2"]


@pytest.mark.parametrize(
    ("total", "per_class", "columns"),
    [(1, 1, 1), (3, 1, 3), (8, 1, 4), (25, 1, 5), (16, 2, 4), (24, 3, 6), (96, 6, 6), (60, 20, 10)],
)
def test_columns_keep_the_images_of_a_class_together(total, per_class, columns):
    assert sample.columns_of([0] * total, per_class) == columns


# Frames of the denoising


def test_ten_frames_from_noise_to_the_result(draw, vae_folder, tmp_path, capsys):
    drawn = draw(classes="ant,bee", num_sampling_steps=20, sampler="ddim", progress_strip=True)
    frames, names, captions, title = drawn["draw_strips"]
    assert names == ["0 ant", "1 bee"] and [len(row) for row in frames] == [10, 10]
    assert (captions[0], captions[1], captions[-1]) == ("t = 999", "t = 894", "result")
    noise = sampling.IndexedNoise(0, [("class", 0, 0), ("class", 1, 0)])(torch.empty(2, 4, 4, 4))
    assert_same([row[0] for row in frames], list(VAE(str(vae_folder)).decode(noise).numpy()))
    assert_same([row[-1] for row in frames], drawn["draw_grid"][0])
    path = tmp_path / "grid.progress.png"
    assert capsys.readouterr().out.endswith(f"progress: {path}\n")
    with Image.open(path) as strip:
        assert strip.width > 10 * 64 and strip.height > 2 * 64


@pytest.mark.parametrize(("steps", "states"), [(1, [0, 1]), (4, [0, 1, 2, 3, 4]), (18, list(range(0, 19, 2)))])
def test_frames_are_evenly_spread(steps, states):
    assert sample.states_to_keep(steps, strip=True) == states
    assert sample.states_to_keep(steps, strip=False) == [steps]
    assert len(sample.states_to_keep(1000, strip=True)) == 10


@pytest.mark.parametrize("sampler", OBJECTIVES["eps"].samplers)
def test_each_state_tells_the_timestep_at_which_the_model_sees_it(sampler, run, monkeypatch):
    trained, seen = pretrained.load_trained(run / "checkpoints" / "0000007.pt"), []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, x, t, y: (seen.append((int(t[0]), x)), forward(self, x, t, y))[1])
    config = SamplingConfig(sampler, steps=5, cfg_scale=1)
    states = list(sampling.sample_progressive(trained.model, config, [3], [1], (4, 4, 4), torch.device("cpu")))
    assert [t for t, _ in states] == [t for t, _ in seen] + [None] and states[0][0] == 999
    for (_, latents), (_, x) in zip(states, seen, strict=False):
        assert torch.equal(latents, x)
    result = sampling.sample_latents(trained.model, config, [3], [1], (4, 4, 4), torch.device("cpu"))
    assert torch.equal(result, states[-1][1])


def test_strips_are_rows_under_one_header():
    frames = [[np.full((64, 64, 3), 40 * row + column, np.uint8) for column in range(3)] for row in range(2)]
    strip = np.asarray(pictures.draw_strips(frames, ["first", "second\nline"], ["a", "b", "c"], "title"))
    places = [(y, x) for y in (-136, -68) for x in (-204, -136, -68)]  # from the lower right corner
    tiles = [strip[strip.shape[0] + y :, strip.shape[1] + x :][:64, :64] for y, x in places]
    assert [int(tile[0, 0, 0]) for tile in tiles] == [0, 1, 2, 40, 41, 42]
    assert all((tile == tile[0, 0]).all() for tile in tiles)


def test_a_short_title_is_not_cut():
    image = [np.zeros((64, 64, 3), np.uint8)]
    assert pictures.draw_grid(image, ["a"], 1, "DiT-XS/2, 0000007, cfg 2").width > 72
    assert pictures.draw_grid(image, ["a" * 50], 1).width == 72


# Sizes beyond the training's


def test_both_commands_sample_at_other_sizes(draw, sample_arguments, tmp_path):
    images, modes = {}, ("extrapolate", "interpolate")
    for mode in modes:
        size = dict(image_size="48x64", rope_extend=mode)
        (images[mode],), _, _, title = draw(classes="ant", **size)["draw_grid"]
        assert images[mode].shape == (48, 64, 3) and title.endswith(f", 48x64 by {mode}")
        sample_ddp.main(sample_arguments(tmp_path / "samples", num_fid_samples=1, **size))
    assert (images["extrapolate"] != images["interpolate"]).mean() > 0.01
    found = sorted((tmp_path / "samples").glob("*.npz"))
    assert [path.name.split("-vae-")[0] for path in found] == [f"DiT-XS-2-0000007-size-48x64-{mode}" for mode in modes]
    with np.load(found[1]) as archive:
        assert archive["arr_0"].shape == (1, 48, 64, 3) and archive["arr_0"].std() > 0
    settings = json.loads(found[1].with_suffix(".json").read_text())
    assert (settings["image_size"], settings["rope_extend"]) == ([48, 64], "interpolate")


def test_the_trained_size_needs_no_mode(draw):
    sizes = ({}, {"image_size": 32}, {"image_size": 32, "rope_extend": "interpolate"})
    grids = [draw(classes="ant", **size)["draw_grid"] for size in sizes]
    assert all(np.array_equal(grid[0][0], grids[0][0][0]) and grid[1:] == grids[0][1:] for grid in grids)


@pytest.mark.parametrize("command", [sample, sample_ddp])
def test_other_sizes_that_are_refused(command, arguments, sample_arguments, sin_cos_file, refused, tmp_path):
    build = arguments if command is sample else lambda **changes: sample_arguments(tmp_path / "samples", **changes)
    for message, changes in {
        "--image-size 64 disagrees with checkpoint ": dict(image_size=64),
        f"--image-size 64 disagrees with checkpoint {str(sin_cos_file)!r}": dict(ckpt=sin_cos_file, image_size=64),
        "--rope-extend interpolate given without --image-size; add": dict(rope_extend="interpolate"),
        "--image-size 40x64 is not divisible by 16 (VAE": dict(image_size="40x64", rope_extend="interpolate"),
    }.items():
        assert refused(command.main, build(**changes)).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == [sin_cos_file.name]


# Mistakes


MISTAKES = [
    (dict(classes="3"), "--classes 3 is not a class of the checkpoint; expected a number from 0 to 2"),
    (dict(per_class=0), "argument --per-class: '0' is not a whole number >= 1"),
    (dict(batch_size=0), "argument --batch-size: '0' is not a whole number >= 1"),
    (dict(per_class=34), "3 classes with --per-class 34 are 102 images, more than the 100 of a grid; ask for fewer"),
    (dict(per_class=7, progress_strip=True), "--progress-strip shows 20 images at most, not 21; ask for fewer"),
    (dict(seed=-1), "argument --seed: '-1' is not a whole number with 0 <= value <= 9.22337e+18"),
    (dict(cfg_scale=0.5), "argument --cfg-scale: '0.5' is not a number >= 1"),
    (dict(guidance_interval=(0.5, 0.2)), "--guidance-interval 0.5 0.2 is empty; expected LO < HI"),
    (dict(model="DiT-B/4"), "--model DiT-B/4 disagrees with checkpoint "),
    (dict(rope_rotate=2), "--rope-rotate given without --use-rope; add --use-rope, or leave it out"),
    (dict(out="grid.jpg"), "--out 'grid.jpg' has the wrong ending; end it in .png"),
    (dict(out="no/grid.png"), "--out 'no/grid.png' is in a folder that does not exist; make the folder first"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=str)
def test_mistakes(changes, message, arguments, refused, tmp_path):
    for more in ({}, {"dry_run": True}):
        assert refused(sample.main, arguments(**changes, **more)).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing(arguments, tmp_path, capsys):
    sample.main(arguments(dry_run=True))
    expected = "would draw 3 images to {}: DiT-XS/2, 0000007, cfg 4, ddpm 3 steps, seed 0"
    assert expected.format(tmp_path / "grid.png") in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_pictures_that_cannot_be_written(arguments, refused, tmp_path, monkeypatch):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    expected = "--out {!r} cannot be written ({}); choose another"
    assert refused(sample.main, arguments(out=folder)) == expected.format(str(folder), "Is a directory")
    with disk_full_at(1000):
        message = refused(sample.main, arguments(classes="0"))
    assert message == expected.format(str(tmp_path / "grid.png"), "File too large")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert refused(sample.main, arguments()) == expected.format(str(tmp_path / "grid.png"), "Permission denied")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_a_single_process(arguments, refused, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    message = "sample.py is one process, not 2; use python sample.py, or sample_ddp.py"
    assert refused(sample.main, arguments()) == message


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "model evaluations an image; the published FIDs are of 250 (default: 50)" in text
    assert "(default: ddpm)" in text and "(default: 4.0)" in text and "(default: sample.png)" in text
