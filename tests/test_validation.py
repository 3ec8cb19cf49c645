"""The held-out denoising loss: its arithmetic, what is held out, and that every way of measuring it agrees."""

import copy
import itertools
import json
import math
import os
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line, stops

import cache_latents
import evaluate_loss
import export
import train
from diffusion import create_diffusion
from runtime import checkpoint, data, monitor, pretrained, validation
from runtime.config import HeldOutConfig, ModelConfig, VAEConfig
from runtime.distributed import hash_seed
from runtime.options import UserError
from runtime.run import check_same
from runtime.vae import VAE

pytestmark = pytest.mark.usefixtures("tiny_commands")

CPU = torch.device("cpu")
RECIPE = {"lr": 0.01, "ema_decay": 0.5, "use_rope": True, "rope_rotate": 2}
QUARTER = {"val_fraction": 0.25, "val_every": 2}
CACHED = {"data_path": None, "vae": None}  # with latents_dir
LAST = "checkpoints/0000007.pt"


def metrics(results) -> list[dict]:
    return [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]


def curves(results) -> list[dict]:
    """Its records without what the clock decides."""
    speed = ("images_per_second", "eta_seconds")
    return [{key: value for key, value in record.items() if key not in speed} for record in metrics(results)]


def names(line: str, *parts) -> bool:
    return all(str(part) in line for part in parts)


@pytest.fixture(scope="session")
def validated(make_run):
    """Folder of a finished run of 7 steps that holds out two images of each class and validates every second step."""
    return make_run(**RECIPE, **QUARTER)


@pytest.fixture
def evaluation(tmp_path, image_folder):
    """Command line of evaluate_loss.py for a run's last checkpoint: evaluation(results, split="val")."""

    def build(results, **changes) -> list[str]:
        options = {"ckpt": results and results / LAST, "data_path": image_folder, "precision": "fp32", "num_workers": 0}
        return command_line(options | {"out": tmp_path / "loss.json"} | changes)

    return build


@pytest.fixture
def loss_of(tmp_path, evaluation):
    """What evaluate_loss.py writes: loss_of(results, split="val")."""

    def call(results, **changes) -> dict:
        evaluate_loss.main(evaluation(results, **changes))
        return json.loads((tmp_path / "loss.json").read_text())

    return call


@pytest.fixture
def two_folders(image_folder, tmp_path):
    """A copy of the images split by hand into two folders: (training, validation)."""
    training, held_out = shutil.copytree(image_folder, tmp_path / "training"), tmp_path / "validation"
    for folder in sorted(training.iterdir()):
        (held_out / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:3]:
            path.rename(held_out / folder.name / path.name)
    return training, held_out


# The loss


@pytest.fixture
def encoded():
    """Five images with moments of their own."""
    moments = torch.rand(5, 8, 4, 4, generator=torch.Generator().manual_seed(1)).half()
    config = VAEConfig(scaling_factor=0.5, shift_factor=0.1)
    return validation.EncodedImages(list(range(5)), 5, moments, torch.tensor([0, 2, 1, 1, 0]), config)


def test_the_loss_is_that_of_a_double_loop_for_every_batch(fill_weights, encoded):
    config = ModelConfig(model="DiT-XS/2", num_classes=3, input_size=(4, 4), in_channels=4, rope=None)
    model, diffusion = fill_weights(config.build()).eval(), create_diffusion(None)
    expected = torch.zeros(5, 10, dtype=torch.float64)
    for i in range(5):
        streams = {
            name: torch.Generator().manual_seed(hash_seed(0, "validation", i, name))
            for name in ("timesteps", "noise", "posterior")
        }
        mean, std = encoded.moments[i].float().chunk(2)
        x = (mean + std * torch.randn(4, 4, 4, generator=streams["posterior"]) - 0.1) * 0.5
        offsets = torch.randint(100, (10,), generator=streams["timesteps"])
        noise = torch.randn(10, 4, 4, 4, generator=streams["noise"])
        for k in range(10):
            t, y = 100 * k + offsets[k : k + 1], encoded.labels[i : i + 1]
            with torch.no_grad():
                terms = diffusion.training_losses(model, x[None], t, {"y": y}, noise[k : k + 1])
            expected[i, k] = terms["mse"]
    for batch in (1, 2, 9):
        model.train()  # whose label dropout is not in the loss
        losses = validation.image_losses([model], encoded, CPU, "fp32", batch)[0]
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)
    scores = validation.summarize(losses)
    assert scores["loss"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert scores["loss_se"] == pytest.approx(float(np.std(expected.mean(1).numpy(), ddof=1)) / 5**0.5, rel=1e-5)
    assert scores["loss_tenths"] == pytest.approx(expected.mean(0).tolist(), rel=1e-5)


def test_timesteps_cover_every_tenth_and_images_have_noise_of_their_own():
    drawn = [validation.draw(index, (4, 2, 2), 1000) for index in range(50)]
    times = torch.stack([t for t, _, _ in drawn])
    assert torch.equal(times // 100, torch.arange(10).expand(50, 10))
    assert len(set((times % 100).flatten().tolist())) > 90  # and all of it
    assert len({float(noise[k, 0, 0, 0]) for _, noise, _ in drawn for k in range(10)}) == 500
    assert torch.equal(validation.draw(7, (4, 2, 2), 1000)[1], drawn[7][1])


NOT_FINITE = torch.ones(24, 10, dtype=torch.float64)
NOT_FINITE[1, 3], NOT_FINITE[4, 9] = torch.nan, torch.inf


@pytest.mark.parametrize(
    "losses, loss, tenths, text",
    [
        (torch.full((1, 10), 0.25, dtype=torch.float64), 0.25, [0.25] * 10, "0.2500"),
        (NOT_FINITE, None, [None if k in (3, 9) else 1.0 for k in range(10)], "not finite"),
    ],
)
def test_a_single_image_has_no_standard_error_and_what_is_not_finite_is_null(losses, loss, tenths, text):
    assert validation.summarize(losses) == {"loss": loss, "loss_se": None, "loss_tenths": tenths}
    assert validation.format_loss(loss, None) == text


# What is held out


def chosen(counts: dict[str, int], fraction: float) -> set[bytes]:
    names = [(name, f"{name}/{index:03d}.png".encode()) for name, count in counts.items() for index in range(count)]
    labels, paths = np.array([list(counts).index(name) for name, _ in names]), np.array([path for _, path in names])
    return set(paths[validation.split(paths, labels, list(counts), fraction)].tolist())


@pytest.mark.parametrize(
    "fraction, counts", [(0.25, (2, 25, 1)), (0.1, (1, 10, 1)), (0.001, (1, 1, 1)), (0.999, (7, 99, 1))]
)
def test_every_class_is_split_by_the_fraction(fraction, counts):
    found = chosen({"a": 8, "b": 100, "c": 2}, fraction)
    assert tuple(sum(path.startswith(name) for path in found) for name in (b"a", b"b", b"c")) == counts


def test_the_split_stays_when_files_are_added_elsewhere():
    before, after = chosen({"a": 30, "b": 30}, 0.2), chosen({"a": 30, "b": 31, "c": 5}, 0.2)
    assert {path for path in before if path.startswith(b"a")} == {path for path in after if path.startswith(b"a")}
    assert chosen({"a": 30, "b": 30}, 0.1) < before < chosen({"a": 30, "b": 30}, 0.5)


def test_what_is_held_out_is_not_trained_on(train_arguments, tmp_path, monkeypatch):
    arguments = train_arguments(tmp_path / "run", val_fraction=0.25, epochs=3, max_steps=None)
    job = train.plan(train.parse_args(arguments), CPU)
    held_out = {job.held_out.images.path(index) for index in range(len(job.held_out.images))}
    assert (len(held_out), len(job.dataset), job.steps_per_epoch) == (6, 18, 2)
    seen, read = [], data.read_prepared
    monkeypatch.setattr(data, "read_prepared", lambda path, size: (seen.append(path), read(path, size))[1])
    train.main(arguments)
    assert set(seen[:6]) == held_out  # encoded once, before the first step
    assert len(seen) == 6 + 3 * 16 and not held_out & set(seen[6:])


def test_cache_and_images_give_the_same_split_and_loss(validated, cache, train_arguments, tmp_path):
    train.main(train_arguments(tmp_path / "run", **CACHED, latents_dir=cache, **RECIPE, **QUARTER))
    online, cached = (checkpoint.load(run / LAST)["config"] for run in (validated, tmp_path / "run"))
    assert [cached[part] for part in ("validation", "data")] == [online[part] for part in ("validation", "data")]
    for record, expected in zip(metrics(tmp_path / "run"), metrics(validated), strict=True):
        if "val_loss" in expected:
            assert record["val_loss"] == pytest.approx(expected["val_loss"], rel=2e-3)
            assert record["val_loss_ema_tenths"] == pytest.approx(expected["val_loss_ema_tenths"], rel=1e-2)


def test_a_cache_takes_a_folder_of_their_own(
    two_folders, make_vae, cache_arguments, train_arguments, refused, tmp_path, capsys
):
    (training, held_out), vae, other, cache = two_folders, make_vae(), make_vae(seed=1), tmp_path / "latents"
    cache_latents.main(cache_arguments(cache, data_path=training, vae=vae))
    moved = shutil.move(vae, tmp_path / "moved VAE")

    def arguments(name: str, vae=moved) -> list[str]:
        changes = {"data_path": None, "latents_dir": cache, "val_data_path": held_out, "max_steps": 1}
        return train_arguments(tmp_path / name, vae=vae, **changes)

    assert names(refused(train.main, arguments("run", vae=other)), other, cache, vae)
    train.main(arguments("run"))
    assert "val_loss_ema" in metrics(tmp_path / "run")[-1]
    assert capsys.readouterr().err == ""
    next((training / "bee").iterdir()).unlink()
    for name, reason in (("second", "holds other files by now"), ("third", "is not a folder")):
        with pytest.warns(UserWarning, match=f"was not compared with the images of the cache: .* {reason}"):
            train.main(arguments(name))
        shutil.rmtree(training, ignore_errors=True)


@pytest.mark.parametrize("kind", ["copy", "same folder"])
def test_a_validation_set_that_overlaps_is_refused(kind, train_arguments, two_folders, refused, tmp_path):
    training, held_out = two_folders
    original, other, count = training / "bee" / "10.png", held_out / "ant" / "other.png", 1
    if kind == "copy":
        shutil.copy(original, other)
    else:
        held_out, original, other, count = training, training / "ant/09.png", training / "ant/09.png", 15
    assert refused(train.main, train_arguments(tmp_path / "run", data_path=training, val_data_path=held_out)) == (
        f"--val-data-path {str(held_out)!r} overlaps the training data: {str(other)!r} is the same image as "
        f"{str(original)!r}, {count} in all; remove them from one of the two"
    )


def test_files_of_equal_size_and_beginning_do_not_overlap(tmp_path):
    for name, content in (("one/a/1.png", b"x" * 5000 + b"1"), ("two/a/1.png", b"x" * 5000 + b"2")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "one/a/2.png").symlink_to(tmp_path / "nowhere")  # whoever reads it will name it
    one, two = data.ImageList(tmp_path / "one"), data.ImageList(tmp_path / "two")
    assert validation.same_files(one, two) == []
    path, gone = (tmp_path / "one/a" / name for name in ("1.png", "2.png"))
    assert validation.same_files(one, one) == [(path, path), (gone, gone)]


# In training


def test_when_a_run_validates_and_what_it_says(validated):
    records = metrics(validated)
    assert [record["step"] for record in records] == [2, 3, 4, 6, 7]
    assert [record["step"] for record in records if "val_loss" in record] == [2, 4, 6, 7]
    assert [record["step"] for record in records if "loss" in record] == [3, 6, 7]
    keys = {f"{name}{suffix}" for name in ("val_loss", "val_loss_ema") for suffix in ("", "_se", "_tenths")}
    assert records[0].keys() == keys | {"step", "epoch"}
    log = (validated / "log.txt").read_text()
    for key, weights in (("val_loss", "raw"), ("val_loss_ema", "EMA")):
        loss, tenths = (f"{records[0][key]:.4f} ± {records[0][key + '_se']:.4f}", records[0][f"{key}_tenths"])
        start = f"step 0000002: validation loss of 6 images, {weights} weights: {loss}; by tenth of the schedule: "
        assert start + ", ".join(f"{loss:.4f}" for loss in tenths) + "\n" in log
    assert records[-1]["val_loss"] < records[0]["val_loss"]
    share = 4 * 20 * 6 / (3 * 8 * 7)  # four validations of twenty evaluations an image, seven steps of three
    when = "every 2 steps and after the last, 4 times in all"
    cost = f"about {100 * share:.1f} % of the training's computation"
    assert f"validation: 6 held-out images, {when}: {cost}\n" in log


def test_the_default_interval_keeps_all_validations_below_five_percent():
    def interval(images: int, batch: int, ckpt_every: int, steps: int) -> int:
        args = Namespace(val_every=None, ckpt_every=ckpt_every, global_batch_size=batch)
        return validation.interval(images, args, steps)

    epochs = 1400 * 5004
    assert interval(50_000, 256, 50_000, epochs) == 50_000  # 2.6 %
    assert interval(128_117, 256, 50_000, epochs) == 100_000  # 6.7 % at every checkpoint
    for images, steps in itertools.product((1, 60, 143, 144, 480, 481, 10_000), (1_000, 1_001, 20_000)):
        every, share = interval(images, 32, 200, steps), 20 * images / (3 * 32 * steps)
        assert every % 200 == 0
        assert share * math.ceil(steps / every) < 0.05 or (share >= 0.05 and every >= steps)
        assert every == 200 or share * math.ceil(steps / (every - 200)) >= 0.05


@pytest.mark.parametrize(
    "steps, val_every, when",
    [
        (2000, None, "once, after the last step: about 9.4 %"),
        (2000, 2000, "once, after the last step: about 9.4 %"),
        (2001, 500, "every 500 steps and after the last, 5 times in all: about 46.7 %"),
        (100_001, None, "every 50,000 steps and after the last, 3 times in all: about 0.6 %"),
    ],
)
def test_the_share_counts_every_validation_of_the_run(steps, val_every, when):
    args = Namespace(val_every=val_every, ckpt_every=50_000, global_batch_size=32)
    expected = f"validation: 898 held-out images, {when} of the training's computation"
    assert validation.describe_schedule(898, args, steps) == expected


def test_a_folder_of_their_own_leaves_no_trace_in_training_and_has_the_loss_of_the_metrics(
    two_folders, train_arguments, loss_of, tmp_path, monkeypatch
):
    """Validation draws from streams of its own, and takes none of the training's time."""
    training, held_out = two_folders
    changes = {"data_path": training, "log_every": 1, "lr": 0.01, "ema_decay": 0.5}
    train.main(train_arguments(tmp_path / "without", **changes))
    clock, measure, results = [0.0], validation.Validator.measure, tmp_path / "with"

    def slow(self, *arguments):
        clock[0] += 1000
        return measure(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(monitor.time, "perf_counter", lambda: clock[0])
        patch.setattr(validation.Validator, "measure", slow)
        train.main(train_arguments(results, val_data_path=held_out, val_every=3, **changes))
    left, right = (checkpoint.load(run / LAST)["model"] for run in (tmp_path / "without", results))
    assert all(torch.equal(left[name], right[name]) for name in left)
    record = metrics(results)[-1]
    assert clock == [3000] and record["images_per_second"] > 1e6
    assert loss_of(results, data_path=held_out)["loss"] == pytest.approx(record["val_loss_ema"], rel=1e-6)
    shutil.rmtree(held_out / "ant")  # other classes keep their labels
    part, trained = loss_of(results, data_path=held_out), pretrained.load_trained(results / LAST)
    images = data.ImageList(held_out)
    images.labels = images.labels + 1
    encoded = validation.encode(images, (32, 32), VAE(trained.config.vae.source), 0)
    losses = validation.image_losses([trained.model], encoded, CPU, "fp32")
    assert part["images"] == 6 and part["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)


def test_a_resumed_run_has_the_same_curves(validated, train_arguments, signal_after, tmp_path):
    arguments = train_arguments(tmp_path / "run", **RECIPE, **QUARTER)
    signal_after(train.Trainer, "train_step", 2)
    stops(train.main, arguments)
    assert [record["step"] for record in metrics(tmp_path / "run")] == [2]
    train.main(arguments)
    assert curves(tmp_path / "run") == curves(validated)


# evaluate_loss.py


def test_any_checkpoint_has_the_loss_of_its_metrics(validated, loss_of, capsys):
    record = metrics(validated)[-1]
    for weights, key in (("ema", "val_loss_ema"), ("model", "val_loss")):
        found = loss_of(validated, split="val", weights=weights, batch_size=4)
        assert (found["images"], found["step"], found["weights"]) == (6, 7, weights)
        assert found["loss"] == pytest.approx(record[key], rel=1e-6)
        assert found["loss_se"] == pytest.approx(record[f"{key}_se"], rel=1e-5)
        assert found["loss_tenths"] == pytest.approx(record[f"{key}_tenths"], rel=1e-6)
    output = capsys.readouterr().out
    assert f"loss of 6 images, model weights: {record['val_loss']:.4f} ± {record['val_loss_se']:.4f}; " in output
    assert f", {record['val_loss_tenths'][9]:.4f}\n" in output
    larger = dict(split="val", image_size=48)
    extended = [loss_of(validated, rope_extend=extend, **larger) for extend in ("extrapolate", "interpolate")]
    assert [found["image_size"] for found in extended] == [[48, 48], [48, 48]]
    assert len({found["loss"] for found in extended} | {record["val_loss_ema"]}) == 3


def test_a_loss_that_is_not_finite_and_a_dry_run_write_nothing(validated, evaluation, refused, monkeypatch, capsys):
    monkeypatch.setattr(validation, "image_losses", lambda *_: NOT_FINITE[None])
    message = refused(evaluate_loss.main, evaluation(validated))
    assert names(
        message, "of 24 images, ema weights is not finite", validated / LAST, "use --precision fp32, or an ear"
    )
    arguments = evaluation(validated, split="val", dry_run=True)
    evaluate_loss.main(arguments)
    assert "would measure the loss of 6 images, ema weights: 60 evaluations" in capsys.readouterr().out
    assert not Path(arguments[arguments.index("--out") + 1]).exists()


def test_a_split_without_unreadable_images_is_found_again(
    image_folder, cache, cache_arguments, train_arguments, loss_of, evaluation, refused, tmp_path
):
    """One of two unreadable images would be held out."""
    folder, latents = shutil.copytree(image_folder, tmp_path / "images"), tmp_path / "latents"
    images = data.ImageList(folder)
    mask = validation.split(images.paths, images.labels, images.classes, 0.25)
    for index in (np.flatnonzero(mask)[0], np.flatnonzero(~mask)[-1]):
        images.path(index).write_bytes(b"damaged")
    cache_latents.main(cache_arguments(latents, data_path=folder, skip_unreadable=True))
    results, exported = tmp_path / "run", tmp_path / "run.safetensors"
    changes = CACHED | {"val_fraction": 0.25, "lr": 0.01, "ema_decay": 0.5}
    train.main(train_arguments(results, latents_dir=latents, **changes))
    found = loss_of(results, data_path=folder, split="val")
    assert found["images"] == 6 and found["loss"] == pytest.approx(metrics(results)[-1]["val_loss_ema"], rel=2e-3)
    export.main(["--ckpt", str(results / LAST), "--out", str(exported)])
    assert loss_of(results, ckpt=exported, data_path=folder, split="val")["loss"] == found["loss"]

    # A repaired image may be held out where the run held out another in its place, which must not be trained on.
    again = train_arguments(results, latents_dir=cache, **changes | {"max_steps": 8})
    assert names(refused(train.main, again), results / LAST, "other data: ", "validation.fingerprint", "--results-dir")

    state = copy.deepcopy(checkpoint.load(results / LAST))
    del state["config"]["validation"]["left_out"]  # as runs of earlier versions have it
    checkpoint.save(results / LAST, state)
    message = refused(evaluate_loss.main, evaluation(results, data_path=folder, split="val"))
    assert names(message, "--split val", results / LAST, folder, "skipped.txt")
    train.main(train_arguments(results, latents_dir=latents, **changes | {"max_steps": 8}))
    assert metrics(results)[-1]["step"] == 8
    for path in (latents / "skipped.txt").read_text().splitlines():
        os.unlink(path)
    assert loss_of(results, data_path=folder, split="val")["loss"] == found["loss"]


def test_the_loss_of_trained_images_is_marked(validated, run, image_folder, loss_of, capsys, tmp_path):
    part, exported = shutil.copytree(image_folder, tmp_path / "part"), tmp_path / "run.safetensors"
    (part / "bee" / "10.png").unlink()
    export.main(["--ckpt", str(validated / LAST), "--out", str(exported)])
    for ckpt, changes, trained_on in (
        (run / LAST, {}, True),
        (exported, {}, True),
        (exported, {"split": "val"}, False),
        (validated / LAST, {"data_path": part}, None),
    ):
        capsys.readouterr()
        assert loss_of(None, ckpt=ckpt, **changes)["trained_on"] is trained_on
        warnings = [line for line in capsys.readouterr().out.splitlines() if "so this is no validation loss" in line]
        assert len(warnings) == (trained_on is True) and all(str(ckpt) in line for line in warnings)


# Wrong input


def test_wrong_validation_options_are_refused(train_arguments, two_folders, refused, tmp_path):
    training, held_out = two_folders
    (tmp_path / "empty").mkdir()

    def check(*parts, **changes) -> None:
        arguments = train_arguments(tmp_path / "run", **{"data_path": training} | changes)
        assert names(refused(train.main, arguments), *parts)

    check("--val-fraction", "--val-data-path", val_fraction=0.5, val_data_path=held_out)
    check("--val-every given", "add --val-data-path or --val-fraction", val_every=2)
    for value in ("0", "1"):
        check(f"--val-fraction: {value!r} is not a number with 0 < value < 1", val_fraction=value)
    check(f"--val-data-path {str(tmp_path / 'empty')!r}", "sub-folder", val_data_path=tmp_path / "empty")
    unreadable = held_out / "ant" / "00.png"
    unreadable.write_bytes(b"damaged")
    arguments = train_arguments(tmp_path / "run", data_path=training, val_data_path=held_out)
    assert names(refused(train.main, arguments, has_begun=True), f"image {str(unreadable)!r} cannot be read (")
    shutil.rmtree(tmp_path / "run")
    shutil.move(held_out / "bee", held_out / "wasp")
    check(held_out, "'bee' is in one of the two alone (2 such", val_data_path=held_out)
    for path in sorted((training / "ant").iterdir())[1:]:
        path.unlink()
    check("--val-fraction 0.5", "'ant'", "(images in all: 1)", "add images", val_fraction=0.5)


FOLDER = HeldOutConfig(None, "a" * 64, 9, [])
QUARTER_OF_24 = HeldOutConfig(0.25, "b" * 64, 6, [])


@pytest.mark.parametrize(
    "stored, current, difference",
    [
        (None, QUARTER_OF_24, "validation.fraction None (now 0.25)"),
        (QUARTER_OF_24, None, "validation.fraction 0.25 (now None)"),
        (FOLDER, QUARTER_OF_24, "validation.fraction None (now 0.25)"),
        (FOLDER, replace(FOLDER, fingerprint="c"), "validation.fingerprint 'aaaa"),
        (QUARTER_OF_24, replace(QUARTER_OF_24, fraction=0.26), "validation.fraction 0.25 (now 0.26)"),
    ],
)
def test_what_is_held_out_stays_the_same(validated, stored, current, difference):
    config = pretrained.load_trained(validated / LAST).config
    before = replace(config, validation=stored).to_dict()
    check_same(before, replace(config, validation=stored and replace(stored, left_out=["unknown before"])), "x.pt")
    with pytest.raises(UserError) as error:
        check_same(before, replace(config, validation=current), "x.pt")
    assert names(str(error.value), "'x.pt' was trained with other data: ", difference, "use another --results-dir")


def test_a_cache_without_paths_is_refused_and_completed(cache, cache_arguments, train_arguments, refused, tmp_path):
    latents = shutil.copytree(cache, tmp_path / "latents")
    paths, before = latents / "paths.npy", (latents / "paths.npy").read_bytes()
    arguments = train_arguments(tmp_path / "run", latents_dir=latents, val_fraction=0.25, max_steps=1, **CACHED)
    paths.write_bytes(b"damaged")
    assert names(refused(train.main, arguments), latents, "cannot be read (paths.npy: ", "which repairs it")
    paths.unlink()
    assert names(refused(train.main, arguments), latents, "paths.npy is missing", "run cache_latents.py")
    cache_latents.main(cache_arguments(latents))
    assert paths.read_bytes() == before
    train.main(arguments)


def test_images_that_do_not_fit_the_checkpoint_are_refused(validated, run, image_folder, evaluation, refused, tmp_path):
    other, one = shutil.copytree(image_folder, tmp_path / "other"), tmp_path / "one"
    shutil.copytree(image_folder / "ant", one / "ant")
    torch.save(checkpoint.load(run / LAST)["ema"], tmp_path / "foreign.pt")
    foreign = {"image_size": 32, "use_rope": True, "rope_rotate": 2}

    def check(ckpt, *parts, **changes) -> None:
        assert names(refused(evaluate_loss.main, evaluation(None, ckpt=ckpt, **changes)), ckpt, *parts)

    check(run / LAST, "--split val", "without --val-fraction", "leave --split out", split="val")
    check(tmp_path / "foreign.pt", one, "has 1 class folders", "has 3; give one folder", data_path=one, **foreign)
    for path in sorted((other / "bee").iterdir())[:5]:
        path.rename(path.with_stem(f"new {path.stem}"))
    check(validated / LAST, "--split val", other, "holds other files", data_path=other, split="val")
    shutil.move(other / "bee", other / "wasp")
    check(validated / LAST, other, "'wasp'", "remove or rename", data_path=other)


@pytest.mark.parametrize("stored", ["split", {"fraction": 0.1}, {"fraction": 7, "fingerprint": "", "images": 1}])
def test_a_split_that_no_run_writes_is_refused(stored):
    with pytest.raises((KeyError, TypeError, ValueError)):
        HeldOutConfig.from_dict(stored)
