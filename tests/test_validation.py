"""The held-out denoising loss: its arithmetic, what is held out, and that every way of measuring it agrees."""

import copy
import itertools
import json
import math
import os
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, command_line, tiny

import cache_latents
import evaluate_loss
import export
import train
from diffusion import create_diffusion
from models import ModelConfig
from runtime import checkpoint, data, holdout, monitor, pretrained, validation
from runtime.distributed import hash_seed
from runtime.options import UserError
from runtime.vae import VAE

pytestmark = pytest.mark.usefixtures("tiny_commands")

SPEED = ("images_per_second", "eta_seconds")


def metrics(results) -> list[dict]:
    return [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def validated(tmp_path_factory, image_folder, vae_folder):
    """Folder of a finished run of 7 steps that holds out two images of each class and validates every second step."""
    results = tmp_path_factory.mktemp("validated") / "run"
    options = TINY_RUN | {"data_path": image_folder, "vae": vae_folder, "results_dir": results, "lr": 0.01}
    options |= {"ema_decay": 0.5, "use_rope": True, "rope_rotate": 2, "val_fraction": 0.25, "val_every": 2}
    with pytest.MonkeyPatch.context() as patch, tiny(patch):
        patch.setattr(monitor, "plot_loss", lambda _: None)
        train.main(command_line(options))
    return results


@pytest.fixture
def loss_of(tmp_path, image_folder):
    """Runs evaluate_loss.py on a run's last checkpoint and returns what it wrote: loss_of(results, split="val")."""

    def call(results, **changes) -> dict:
        options = {"ckpt": results / "checkpoints" / "0000007.pt", "data_path": image_folder, "precision": "fp32"}
        options |= {"num_workers": 0, "out": tmp_path / "loss.json"}
        evaluate_loss.main(command_line(options | changes))
        return json.loads((tmp_path / "loss.json").read_text())

    return call


@pytest.fixture
def held_out_validation(image_folder, tmp_path):
    """A copy of the images split by hand into two folders: (training, validation)."""
    training = shutil.copytree(image_folder, tmp_path / "training")
    for name in sorted(os.listdir(training)):
        (tmp_path / "validation" / name).mkdir(parents=True)
        for path in sorted((training / name).iterdir())[:3]:
            path.rename(tmp_path / "validation" / name / path.name)
    return training, tmp_path / "validation"


# The loss


@pytest.fixture
def tiny_model(fill_weights):
    config = ModelConfig(model="DiT-XS/2", num_classes=3, input_size=(4, 4), in_channels=4, rope=None)
    return fill_weights(config.build())


@pytest.fixture
def encoded():
    """Five images with moments of their own."""
    generator = torch.Generator().manual_seed(1)
    moments = torch.rand(5, 8, 4, 4, generator=generator).half()
    return validation.EncodedImages(list(range(5)), 5, moments, torch.tensor([0, 2, 1, 1, 0]), 0.5, 0.1)


def test_the_loss_is_that_of_a_double_loop(tiny_model, encoded):
    diffusion, expected = create_diffusion(None), torch.zeros(5, 10, dtype=torch.float64)
    tiny_model.eval()
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
                terms = diffusion.training_losses(tiny_model, x[None], t, {"y": y}, noise[k : k + 1])
            expected[i, k] = terms["mse"]
    tiny_model.train()
    losses = validation.image_losses([tiny_model], encoded, torch.device("cpu"), "fp32", batch=2)[0]
    assert tiny_model.training  # and without label dropout meanwhile
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-7)
    scores = validation.summarize(losses)
    assert scores["loss"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert scores["loss_se"] == pytest.approx(float(np.std(expected.mean(1).numpy(), ddof=1)) / 5**0.5, rel=1e-5)
    assert scores["loss_tenths"] == pytest.approx(expected.mean(0).tolist(), rel=1e-5)


def test_the_batch_does_not_matter(tiny_model, encoded):
    losses = [validation.image_losses([tiny_model], encoded, torch.device("cpu"), "fp32", batch) for batch in (1, 3, 9)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-5, atol=1e-7)


def test_timesteps_cover_every_tenth_and_images_have_noise_of_their_own():
    drawn = [validation.draw(index, (4, 2, 2)) for index in range(50)]
    times = torch.stack([t for t, _, _ in drawn])
    assert torch.equal(times // 100, torch.arange(10).expand(50, 10))
    assert len(set((times % 100).flatten().tolist())) > 90  # and all of it
    assert len({float(noise[k, 0, 0, 0]) for _, noise, _ in drawn for k in range(10)}) == 500
    assert torch.equal(validation.draw(7, (4, 2, 2))[1], drawn[7][1])


def test_training_is_the_same_with_and_without_validation(held_out_validation, train_arguments, tmp_path):
    """Validation draws from streams of its own, so that it leaves no trace in the weights."""
    training, held_out = held_out_validation
    changes = {"data_path": training, "max_steps": 3, "log_every": 1}
    train.main(train_arguments(tmp_path / "without", **changes))
    train.main(train_arguments(tmp_path / "with", val_data_path=held_out, val_every=1, **changes))
    left, right = (checkpoint.load(tmp_path / name / "checkpoints/0000003.pt") for name in ("without", "with"))
    assert all(torch.equal(left["ema"][name], right["ema"][name]) for name in left["ema"])


def test_a_single_image_has_no_standard_error():
    scores = validation.summarize(torch.full((1, 10), 0.25, dtype=torch.float64))
    assert scores == {"loss": 0.25, "loss_se": None, "loss_tenths": [0.25] * 10}
    assert validation.describe(scores) == "0.2500"


# What is held out


def names(classes: dict[str, int], extra: tuple[str, ...] = ()) -> tuple[np.ndarray, np.ndarray, list[str]]:
    paths = [f"{name}/{index:03d}.png" for name, count in classes.items() for index in range(count)] + list(extra)
    labels = [list(classes).index(path.split("/")[0]) for path in paths]
    return np.array([path.encode() for path in paths]), np.array(labels), list(classes)


def chosen(*arguments, **keywords) -> set[bytes]:
    paths, labels, classes = names(*arguments)
    return set(paths[holdout.split(paths, labels, classes, **keywords)].tolist())


@pytest.mark.parametrize(
    "fraction, counts", [(0.25, (2, 25, 1)), (0.1, (1, 10, 1)), (0.001, (1, 1, 1)), (0.999, (7, 99, 1))]
)
def test_every_class_is_split_by_the_fraction(fraction, counts):
    found = chosen({"a": 8, "b": 100, "c": 2}, fraction=fraction)
    assert tuple(sum(path.startswith(name) for path in found) for name in (b"a", b"b", b"c")) == counts


def test_the_split_stays_when_files_are_added_elsewhere():
    before = chosen({"a": 30, "b": 30}, fraction=0.2)
    after = chosen({"a": 30, "b": 31, "c": 5}, fraction=0.2)
    assert {path for path in before if path.startswith(b"a")} == {path for path in after if path.startswith(b"a")}
    assert chosen({"a": 30, "b": 30}, fraction=0.1) < before < chosen({"a": 30, "b": 30}, fraction=0.5)


def test_what_is_held_out_is_not_trained_on(train_arguments, tmp_path, monkeypatch):
    arguments = train_arguments(tmp_path / "run", val_fraction=0.25, epochs=3, max_steps=None)
    job = train.plan(train.parse_args(arguments), torch.device("cpu"))
    held_out = {job.held_out.source.path(index) for index in range(len(job.held_out.source))}
    assert (len(held_out), len(job.dataset), job.steps_per_epoch) == (6, 18, 2)
    seen, read = [], data.read_prepared
    monkeypatch.setattr(data, "read_prepared", lambda path, size: (seen.append(path), read(path, size))[1])
    train.main(arguments)
    assert set(seen[:6]) == held_out  # encoded once, before the first step
    assert len(seen) == 6 + 3 * 16 and not held_out & set(seen[6:])


def test_cache_and_images_give_the_same_split_and_loss(validated, image_folder, vae_folder, train_arguments, tmp_path):
    cache = tmp_path / "latents"
    options = {"data_path": image_folder, "latents_dir": cache, "vae": vae_folder, "image_size": 32, "num_workers": 0}
    cache_latents.main(command_line(options))
    changes = {"data_path": None, "vae": None, "latents_dir": cache, "val_fraction": 0.25, "val_every": 2, "lr": 0.01}
    changes |= {"ema_decay": 0.5, "use_rope": True, "rope_rotate": 2}
    train.main(train_arguments(tmp_path / "run", **changes))
    online, cached = (checkpoint.load(run / "checkpoints/0000007.pt") for run in (validated, tmp_path / "run"))
    for part in ("validation", "data"):
        assert cached["config"][part] == online["config"][part]
    for record, expected in zip(metrics(tmp_path / "run"), metrics(validated), strict=True):
        if "val_loss" in expected:
            assert record["val_loss"] == pytest.approx(expected["val_loss"], rel=2e-3)
            assert record["val_loss_ema_tenths"] == pytest.approx(expected["val_loss_ema_tenths"], rel=1e-2)


def test_a_cache_takes_a_separate_validation_set(held_out_validation, make_vae, train_arguments, tmp_path, capsys):
    (training, held_out), vae, cache = held_out_validation, make_vae(), tmp_path / "latents"
    cache_latents.main(command_line({"data_path": training, "latents_dir": cache, "vae": vae, "image_size": 32}))
    changes = {"data_path": None, "latents_dir": cache, "val_data_path": held_out, "max_steps": 1}
    moved = shutil.move(vae, tmp_path / "moved VAE")
    train.main(train_arguments(tmp_path / "run", vae=moved, **changes))
    assert "val_loss_ema" in metrics(tmp_path / "run")[-1]
    assert capsys.readouterr().err == ""
    meta = json.loads((cache / "meta.json").read_text())
    assert meta["data_path"] == str(training.resolve())
    gone = shutil.move(training, tmp_path / "gone")
    reasons = {"is not a folder; expected one with a sub-folder for each class": None, "holds other files by now": gone}
    for number, (reason, images) in enumerate(reasons.items()):
        if images is not None:
            shutil.copytree(images, training)
            next((training / "bee").iterdir()).unlink()
        with pytest.warns(UserWarning) as warned:
            train.main(train_arguments(tmp_path / f"other{number}", vae=moved, **changes))
        assert str(warned[0].message) == (
            f"the validation set was not compared with the images of the cache: their folder {str(training)!r} {reason}"
        )


# In training


def test_when_a_run_validates(validated):
    records = metrics(validated)
    assert [record["step"] for record in records] == [2, 3, 4, 6, 7]
    assert [record["step"] for record in records if "val_loss" in record] == [2, 4, 6, 7]
    assert [record["step"] for record in records if "loss" in record] == [3, 6, 7]
    keys = {f"{name}{suffix}" for name in ("val_loss", "val_loss_ema") for suffix in ("", "_se", "_tenths")}
    assert records[0].keys() == keys | {"step", "epoch"}
    log = (validated / "log.txt").read_text()
    raw, ema = (f"{records[0][name]:.4f} ± {records[0][name + '_se']:.4f}" for name in ("val_loss", "val_loss_ema"))
    assert f"step 0000002: validation loss {raw}, EMA {ema} (noise MSE of 6 images)\n" in log
    for key, weights in (("val_loss", "raw"), ("val_loss_ema", "EMA")):
        tenths = ", ".join(f"{loss:.4f}" for loss in records[0][f"{key}_tenths"])
        assert f"step 0000002: validation loss by tenth of the schedule, {weights} weights: {tenths}\n" in log
    assert records[-1]["val_loss"] < records[0]["val_loss"]
    share = 4 * 20 * 6 / (3 * 8 * 7)  # four validations of twenty evaluations an image, seven steps of three
    assert "validation: 6 held-out images, every 2 steps and after the last, 4 times in all: " in log
    assert f": about {100 * share:.1f} % of the training's computation\n" in log


@pytest.mark.parametrize("affordable, steps", [(10, [4, 8, 10]), (2, [8, 10]), (1, [10])])
def test_by_default_a_run_validates_at_as_many_checkpoints_as_cost_little(
    affordable, steps, held_out_validation, train_arguments, tmp_path, monkeypatch
):
    training, held_out = held_out_validation
    monkeypatch.setattr(validation, "AFFORDABLE", affordable)  # 9 images cost as much as 7.5 steps
    train.main(train_arguments(tmp_path / "run", data_path=training, val_data_path=held_out, max_steps=10))
    assert [record["step"] for record in metrics(tmp_path / "run") if "val_loss" in record] == steps


def test_the_default_interval_keeps_all_validations_below_five_percent():
    epochs = 1400 * 5004
    assert validation.default_interval(50_000, 256, 50_000, epochs) == 50_000  # 2.6 %
    assert validation.default_interval(128_117, 256, 50_000, epochs) == 100_000  # 6.7 % at every checkpoint
    for images, steps in itertools.product((1, 60, 143, 144, 480, 481, 10_000), (1_000, 1_001, 20_000)):
        every = validation.default_interval(images, 32, 200, steps)
        share = 20 * images / (3 * 32 * steps)
        assert every % 200 == 0
        assert share * math.ceil(steps / every) < 0.05 or (share >= 0.05 and every >= steps)
        assert every == 200 or share * math.ceil(steps / (every - 200)) >= 0.05


def test_the_share_counts_every_validation_of_the_run(monkeypatch):
    def announced(images, steps, fraction=0.5, val_every=None) -> str:
        monkeypatch.setattr(validation, "encode", lambda *_: SimpleNamespace(total=images))
        args = Namespace(val_every=val_every, ckpt_every=50_000, global_batch_size=32, grad_accum_steps=1)
        args.image_size, args.num_workers, lines = (32, 32), 0, []
        held_out = holdout.HeldOut(source=None, vae=object(), fraction=fraction)
        validator = validation.Validator(held_out, args, steps, torch.device("cpu"), "fp32")
        validator.announce(SimpleNamespace(info=lines.append))
        return lines[0]

    start, end = "validation: 898 held-out images", "of the training's computation"
    reason = "; even a single validation of so many images costs that: use"
    once = f"{start}, once, after the last step: about 9.4 % {end}"
    assert announced(898, 2000) == f"{once}{reason} a smaller --val-fraction"
    assert announced(898, 2000, fraction=None) == f"{once}{reason} fewer images in --val-data-path"
    assert announced(898, 2000, val_every=2000) == once
    every = f"{start}, every 500 steps and after the last, 5 times in all"
    assert announced(898, 2001, val_every=500) == f"{every}: about 46.7 % {end}"
    every = f"{start}, every 50,000 steps and after the last, 3 times in all"
    assert announced(898, 100_001) == f"{every}: about 0.6 % {end}"


def test_a_resumed_run_has_the_same_curves(validated, train_arguments, signal_after, tmp_path):
    changes = {"lr": 0.01, "ema_decay": 0.5, "use_rope": True, "rope_rotate": 2, "val_fraction": 0.25, "val_every": 2}
    arguments = train_arguments(tmp_path / "run", **changes)
    signal_after(train.Trainer, "train_step", 2)
    train.main(arguments)
    assert [record["step"] for record in metrics(tmp_path / "run")] == [2]
    train.main(arguments)
    strip = [
        [{key: value for key, value in record.items() if key not in SPEED} for record in metrics(results)]
        for results in (tmp_path / "run", validated)
    ]
    assert strip[0] == strip[1]


def test_validation_does_not_count_as_training_time(train_arguments, tmp_path, monkeypatch):
    clock, measure = [0.0], validation.Validator.measure

    def slow(self, *models):
        clock[0] += 1000
        return measure(self, *models)

    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(validation.Validator, "measure", slow)
    train.main(train_arguments(tmp_path / "run", val_fraction=0.25, val_every=1, max_steps=3))
    assert clock == [3000]
    assert metrics(tmp_path / "run")[-1]["images_per_second"] > 1e6


def test_losses_that_are_not_finite_are_null(train_arguments, tmp_path, monkeypatch):
    losses = validation.image_losses

    def overflown(models, *rest):
        found = losses(models, *rest)
        found[0, 1, 3], found[1, :, 9] = torch.nan, torch.inf
        return found

    monkeypatch.setattr(validation, "image_losses", overflown)
    changes = {"val_fraction": 0.25, "val_every": 2, "max_steps": 3, "log_every": 1}
    train.main(train_arguments(tmp_path / "run", **changes))

    def no_json(text):
        raise ValueError(text)

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    record = [json.loads(line, parse_constant=no_json) for line in lines][-1]
    for key, tenth in (("val_loss", 3), ("val_loss_ema", 9)):
        assert record[key] is None and record[f"{key}_se"] is None
        assert [loss is None for loss in record[f"{key}_tenths"]] == [k == tenth for k in range(10)]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "step 0000003: validation loss not finite, EMA not finite (noise MSE of 6 images)\n" in log


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
    assert f"noise MSE of 6 images, model weights: {record['val_loss']:.4f} ± {record['val_loss_se']:.4f}\n" in output
    assert f"\n900 - 999  {record['val_loss_tenths'][9]:.4f}\n" in output


def test_a_separate_validation_set_has_the_loss_of_the_metrics(held_out_validation, train_arguments, loss_of, tmp_path):
    training, held_out = held_out_validation
    train.main(train_arguments(tmp_path / "run", data_path=training, val_data_path=held_out, lr=0.01, ema_decay=0.5))
    found = loss_of(tmp_path / "run", data_path=held_out)
    assert found["loss"] == pytest.approx(metrics(tmp_path / "run")[-1]["val_loss_ema"], rel=1e-6)
    shutil.rmtree(held_out / "ant")  # other classes keep their labels
    part = loss_of(tmp_path / "run", data_path=held_out)
    vae = VAE(checkpoint.load(tmp_path / "run/checkpoints/0000007.pt")["config"]["vae"]["source"])
    images = data.ImageList(held_out)
    images.labels = images.labels + 1
    model = pretrained.load_trained(tmp_path / "run/checkpoints/0000007.pt").model
    losses = validation.image_losses([model], validation.encode(images, (32, 32), vae, 0), torch.device("cpu"), "fp32")
    assert part["images"] == 6 and part["loss"] == pytest.approx(float(losses.mean()), rel=1e-6)


@pytest.fixture
def cache_without_two(image_folder, vae_folder, tmp_path):
    """(folder with two unreadable images, of which one would be held out, latent cache without them)."""
    folder, cache = shutil.copytree(image_folder, tmp_path / "images"), tmp_path / "latents"
    images = data.ImageList(folder)
    mask = holdout.split(images.paths, images.labels, images.classes, 0.25)
    for index in (np.flatnonzero(mask)[0], np.flatnonzero(~mask)[-1]):
        images.path(index).write_bytes(b"damaged")
    options = {"data_path": folder, "latents_dir": cache, "vae": vae_folder, "image_size": 32, "num_workers": 0}
    cache_latents.main(command_line(options | {"skip_unreadable": True}))
    return folder, cache


def test_a_split_without_unreadable_images_is_found_again(
    cache_without_two, train_arguments, loss_of, refused, tmp_path
):
    (folder, cache), results = cache_without_two, tmp_path / "run"
    changes = {"data_path": None, "vae": None, "latents_dir": cache, "val_fraction": 0.25, "lr": 0.01, "ema_decay": 0.5}
    train.main(train_arguments(results, **changes))
    ckpt, expected = results / "checkpoints" / "0000007.pt", metrics(results)[-1]["val_loss_ema"]
    found = loss_of(results, data_path=folder, split="val")
    assert found["images"] == 6 and found["loss"] == pytest.approx(expected, rel=2e-3)
    exported = tmp_path / "run.safetensors"
    export.main(["--ckpt", str(ckpt), "--out", str(exported)])
    assert loss_of(results, ckpt=exported, data_path=folder, split="val")["loss"] == found["loss"]

    state = copy.deepcopy(checkpoint.load(ckpt))
    del state["config"]["validation"]["left_out"]  # as runs of earlier versions have it
    checkpoint.save(ckpt, state)
    evaluation = command_line({"ckpt": ckpt, "data_path": folder, "split": "val"})
    assert refused(evaluate_loss.main, evaluation) == (
        f"--split val: the training of checkpoint {str(ckpt)!r} used a latent cache without the unreadable images of "
        f"--data-path {str(folder)!r}, and does not list them, so its 6 held-out images cannot be told; remove the "
        "files that skipped.txt of that cache lists from the folder, or from a copy of it"
    )
    train.main(train_arguments(results, **changes | {"max_steps": 8}))
    assert metrics(results)[-1]["step"] == 8
    for path in (cache / "skipped.txt").read_text().splitlines():
        os.unlink(path)
    assert loss_of(results, data_path=folder, split="val")["loss"] == found["loss"]


def test_another_split_of_a_cache_made_again_is_refused_on_resume(
    cache_without_two, image_folder, vae_folder, train_arguments, refused, tmp_path
):
    """A repaired image may be held out where the run held out another in its place, which must not be trained on."""
    (_, cache), results, again = cache_without_two, tmp_path / "run", tmp_path / "again"
    changes = {"data_path": None, "vae": None, "val_fraction": 0.25}
    train.main(train_arguments(results, latents_dir=cache, max_steps=1, **changes))
    options = {"data_path": image_folder, "latents_dir": again, "vae": vae_folder, "image_size": 32, "num_workers": 0}
    cache_latents.main(command_line(options))
    text = refused(train.main, train_arguments(results, latents_dir=again, max_steps=2, **changes))
    assert text.endswith(
        "what is held out stays the same for the whole run: give the images that it had, without the unreadable ones "
        "that its latent cache left out, or use another --results-dir"
    )


def test_the_loss_of_trained_images_is_marked(
    validated, run, image_folder, held_out_validation, train_arguments, loss_of, capsys, tmp_path
):
    training, held_out = held_out_validation
    separate, exported = tmp_path / "separate", tmp_path / "run.safetensors"
    train.main(train_arguments(separate, data_path=training, val_data_path=held_out))
    export.main(["--ckpt", str(validated / "checkpoints" / "0000007.pt"), "--out", str(exported)])
    part = shutil.copytree(training, tmp_path / "part")
    (part / "bee" / "10.png").unlink()

    def marked(results, **changes) -> tuple[bool | None, str]:
        """What the JSON says, and the warnings."""
        capsys.readouterr()
        found = loss_of(results, **changes)["trained_on"]
        lines = capsys.readouterr().out.splitlines()
        return found, "".join(line.split("] ")[1] for line in lines if "warning" in line)

    def warning(remedy, ckpt, images=image_folder) -> str:
        return (
            f"warning: --data-path {str(images)!r} holds the images that checkpoint {str(ckpt)!r} was trained on (by "
            f"their relative paths), so this is no validation loss; {remedy}"
        )

    last, remedy = Path("checkpoints/0000007.pt"), "pass --split val for the 6 that its run held out of them"
    assert marked(validated) == (True, warning(remedy, validated / last))
    assert marked(validated, ckpt=exported) == (True, warning(remedy, exported))
    assert marked(validated, split="val") == (False, "")
    assert marked(validated, data_path=part) == (None, "")
    assert marked(run) == (True, warning("give images that it was not trained on", run / last))
    remedy = "give the images of its --val-data-path"
    assert marked(separate, data_path=training) == (True, warning(remedy, separate / last, training))
    assert marked(separate, data_path=held_out) == (False, "")


def test_a_rope_checkpoint_has_a_loss_at_another_size(validated, loss_of):
    extended = {
        extend: loss_of(validated, split="val", image_size=48, rope_extend=extend)
        for extend in ("extrapolate", "interpolate")
    }
    assert extended["extrapolate"]["image_size"] == [48, 48]
    assert len({found["loss"] for found in extended.values()} | {loss_of(validated, split="val")["loss"]}) == 3


# Wrong input


def test_a_loss_that_is_not_finite_is_refused(validated, image_folder, refused, tmp_path, monkeypatch):
    losses = validation.image_losses

    def overflown(*args):
        found = losses(*args)
        found[0, 1, 3], found[0, 4, 9] = torch.nan, torch.inf
        return found

    monkeypatch.setattr(validation, "image_losses", overflown)
    ckpt = validated / "checkpoints" / "0000007.pt"
    options = {"ckpt": ckpt, "data_path": image_folder, "num_workers": 0, "out": tmp_path / "loss.json"}
    for precision, remedy in (("fp32", ""), ("bf16", "--precision fp32, or ")):
        assert refused(evaluate_loss.main, command_line(options | {"precision": precision})) == (
            f"the loss of 2 of 24 images is not finite: the ema weights of checkpoint {str(ckpt)!r} overflow in "
            f"{precision}; use {remedy}an earlier checkpoint"
        )
    assert not (tmp_path / "loss.json").exists()


def test_wrong_validation_options_are_refused(train_arguments, held_out_validation, refused, tmp_path):
    training, held_out = held_out_validation

    def message(**changes):
        text = refused(train.main, train_arguments(tmp_path / "run", **{"data_path": training} | changes))
        assert not (tmp_path / "run").exists()
        return text

    assert message(val_fraction=0.5, val_data_path=held_out) == (
        "--val-data-path and --val-fraction were both given; choose one"
    )
    assert message(val_every=2) == ("--val-every given without held-out images; add --val-data-path or --val-fraction")
    for value in ("0", "1", "nan"):
        assert message(val_fraction=value) == (f"argument --val-fraction: {value!r} is not a number with 0 < value < 1")
    assert message(val_data_path=tmp_path / "none") == (
        f"--val-data-path {str(tmp_path / 'none')!r} is not a folder; expected one with a sub-folder for each class"
    )
    (tmp_path / "empty").mkdir()
    assert message(val_data_path=tmp_path / "empty") == (
        f"--val-data-path {str(tmp_path / 'empty')!r} has no class folders; expected one sub-folder for each class"
    )
    shutil.move(held_out / "bee", held_out / "wasp")
    assert message(val_data_path=held_out) == (
        f"--val-data-path {str(held_out)!r} has other class folders than the training data: 'bee' missing in the "
        "validation set; 'wasp' missing in the training data; give both the same"
    )
    for path in sorted((training / "ant").iterdir())[1:]:
        path.unlink()
    assert message(val_fraction=0.5) == (
        "--val-fraction 0.5 leaves class 'ant' empty in one part (it has 1 image); add images to it, remove it, or use "
        "--val-data-path"
    )


@pytest.mark.parametrize("kind", ["copy", "link", "same folder"])
def test_a_validation_set_that_overlaps_is_refused(kind, train_arguments, held_out_validation, refused, tmp_path):
    training, held_out = held_out_validation
    original, other = training / "bee" / "10.png", held_out / "ant" / "other.png"
    if kind == "same folder":
        held_out, original, other, count = training, training / "ant/09.png", training / "ant/09.png", 15
    else:
        shutil.copy(original, other) if kind == "copy" else other.symlink_to(original)
        count = 1
    assert refused(train.main, train_arguments(tmp_path / "run", data_path=training, val_data_path=held_out)) == (
        f"--val-data-path {str(held_out)!r} overlaps the training data: {str(other)!r} is the same image as "
        f"{str(original)!r}, {count} in all; remove them from one of the two"
    )
    assert not (tmp_path / "run").exists()


def test_files_of_equal_size_or_beginning_do_not_overlap(tmp_path):
    for name, content in (("one/a/1.png", b"x" * 5000 + b"1"), ("two/a/1.png", b"x" * 5000 + b"2")):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
    one, two = data.ImageList(tmp_path / "one"), data.ImageList(tmp_path / "two")
    assert holdout.same_files(one, two) == []
    assert holdout.same_files(one, one) == [(tmp_path / "one/a/1.png", tmp_path / "one/a/1.png")]
    (tmp_path / "one/a/2.png").symlink_to(tmp_path / "nowhere")  # whoever reads it will name it
    assert len(holdout.same_files(data.ImageList(tmp_path / "one"), one)) == 1


def test_another_split_is_refused_on_resume(
    validated, run, held_out_validation, image_folder, vae_folder, train_arguments, refused, tmp_path
):
    """What is held out stays the same for the whole run: the message says what it was, what it is now, and a remedy."""
    training, other = held_out_validation
    recipe = {"lr": 0.01, "ema_decay": 0.5, "use_rope": True, "rope_rotate": 2}
    separate = tmp_path / "separate"
    train.main(train_arguments(separate, data_path=training, val_data_path=other, **recipe))

    def message(folder, **changes) -> tuple[str, str]:
        ckpt = checkpoint.training_checkpoints(folder / "checkpoints")[-1]
        text = refused(train.main, train_arguments(folder, **recipe | changes))
        start, reason = (
            f"checkpoint {str(ckpt)!r} was trained with ",
            "what is held out stays the same for the whole run: ",
        )
        end = ", or use another --results-dir"
        assert text.startswith(start) and text.endswith(end)
        said, remedy = text[len(start) : -len(end)].split(f"; {reason}")
        return said, remedy

    def named(option, source) -> str:
        stored = source if isinstance(source, str) else data.ImageList(source).fingerprint
        return f"{option}, of fingerprint {stored[:8]})"

    fingerprints = {}
    for fraction in (0.25, 0.4):
        args = train.parse_args(train_arguments(tmp_path / "none", val_fraction=fraction))
        fingerprints[fraction] = train.plan(args, torch.device("cpu")).config["validation"]["fingerprint"]
    quarter = named("--val-fraction 0.25 (6 images", fingerprints[0.25])
    assert message(validated, val_fraction=0.4) == (
        f"{quarter}, the command has {named('--val-fraction 0.4 (9 images', fingerprints[0.4])}",
        "pass --val-fraction 0.25",
    )
    assert message(validated) == (f"{quarter}, the command has no validation", "pass --val-fraction 0.25")
    assert message(run, val_fraction=0.25) == (
        f"no validation, the command has {quarter}",
        "leave --val-fraction 0.25 out",
    )
    nine = named("--val-data-path (9 images", other)
    changes = {"data_path": training}
    assert message(separate, **changes) == (
        f"{nine}, the command has no validation",
        "pass --val-data-path with the folder it had",
    )
    (other / "ant" / "00.png").rename(other / "ant" / "new.png")
    assert message(separate, val_data_path=other, **changes) == (
        f"{nine}, the command has {named('--val-data-path (9 images', other)}",
        "pass the folder with the same files",
    )


def test_an_unreadable_held_out_image_is_named(train_arguments, held_out_validation, refused, tmp_path):
    training, held_out = held_out_validation
    (held_out / "bee" / "01.png").write_bytes(b"damaged")
    text = refused(train.main, train_arguments(tmp_path / "run", data_path=training, val_data_path=held_out))
    assert text.startswith(f"image {str(held_out / 'bee' / '01.png')!r} cannot be read (")


def test_a_cache_without_paths_is_refused_and_completed(image_folder, vae_folder, train_arguments, refused, tmp_path):
    cache = tmp_path / "latents"
    making = command_line({"data_path": image_folder, "latents_dir": cache, "vae": vae_folder, "image_size": 32})
    cache_latents.main(making)
    before = (cache / "paths.npy").read_bytes()
    arguments = train_arguments(
        tmp_path / "run", data_path=None, vae=None, latents_dir=cache, val_fraction=0.25, max_steps=1
    )
    (cache / "paths.npy").write_bytes(b"damaged")
    text = refused(train.main, arguments)
    assert text.startswith(f"--latents-dir {str(cache)!r} is damaged (paths.npy: ")
    (cache / "paths.npy").unlink()
    assert refused(train.main, arguments) == (
        f"--latents-dir {str(cache)!r} does not tell the images' paths (paths.npy is missing), by which --val-fraction "
        "splits; run cache_latents.py with this folder again, which adds them"
    )
    cache_latents.main(making)
    assert (cache / "paths.npy").read_bytes() == before
    train.main(arguments)


def test_a_cache_with_another_vae_is_refused(held_out_validation, make_vae, train_arguments, refused, tmp_path):
    (training, held_out), cache = held_out_validation, tmp_path / "latents"
    vae, other = make_vae(), make_vae(seed=1)
    cache_latents.main(command_line({"data_path": training, "latents_dir": cache, "vae": vae, "image_size": 32}))
    arguments = train_arguments(
        tmp_path / "run", data_path=None, vae=other, latents_dir=cache, val_data_path=held_out, max_steps=1
    )
    assert refused(train.main, arguments) == (
        f"--vae {str(other)!r} is another autoencoder than the one that made --latents-dir {str(cache)!r}; pass that "
        f"one, it was {str(vae)!r}"
    )


def test_a_split_that_cannot_be_told_is_refused(validated, run, image_folder, make_vae, refused, tmp_path):
    def message(ckpt, **changes):
        options = {"ckpt": ckpt, "data_path": image_folder, "out": tmp_path / "loss.json"}
        text = refused(evaluate_loss.main, command_line(options | changes))
        assert not (tmp_path / "loss.json").exists()
        return text

    plain, split = run / "checkpoints" / "0000007.pt", validated / "checkpoints" / "0000007.pt"
    assert message(plain, split="val") == (
        f"--split val: checkpoint {str(plain)!r} was trained without --val-fraction, so nothing of --data-path was "
        "held out; give held-out images as --data-path and leave --split out"
    )
    other = shutil.copytree(image_folder, tmp_path / "other")
    for path in sorted((other / "bee").iterdir())[:5]:
        path.rename(path.with_stem(f"new {path.stem}"))
    assert message(split, data_path=other, split="val") == (
        f"--split val: --data-path {str(other)!r} holds other files than the training of checkpoint {str(split)!r}, so "
        "its 6 held-out images cannot be told; give the training's folder"
    )
    shutil.move(other / "bee", other / "wasp")
    assert message(split, data_path=other) == (
        f"--data-path {str(other)!r} has class folders that checkpoint {str(split)!r} was not trained on: 'wasp'; "
        "remove or rename them"
    )
    folder = make_vae(stages=3)
    assert message(split, vae=folder) == (
        f"--vae {str(folder)!r} has 4 latent channels and down-sampling 4; the checkpoint was trained with 4 and 8"
    )
    (tmp_path / "folder").mkdir()
    assert message(split, out=tmp_path / "folder") == (
        f"--out {str(tmp_path / 'folder')!r} is a folder; expected the name of a file, such as loss.json"
    )
    assert message(split, out=tmp_path / "none" / "loss.json") == (
        f"--out {str(tmp_path / 'none' / 'loss.json')!r} cannot be written: {str(tmp_path / 'none')!r} is not a folder"
    )
    assert message(split, image_size=48).endswith("or leave the option out")


def test_an_exported_checkpoint_knows_its_split(validated, loss_of, tmp_path):
    ckpt, exported = validated / "checkpoints" / "0000007.pt", tmp_path / "run.safetensors"
    export.main(["--ckpt", str(ckpt), "--out", str(exported)])
    assert pretrained.load_trained(exported).validation == pretrained.load_trained(ckpt).validation
    assert loss_of(validated, ckpt=exported, split="val")["loss"] == loss_of(validated, split="val")["loss"]


@pytest.mark.parametrize("stored", ["split", {"fraction": 0.1}, {"fraction": 7, "fingerprint": "", "images": 1}])
def test_a_split_that_no_run_writes_is_refused(validated, tmp_path, stored):
    state = checkpoint.load(validated / "checkpoints" / "0000007.pt")
    state["config"]["validation"] = stored
    checkpoint.save(tmp_path / "hostile.pt", state)
    with pytest.raises(UserError, match=r"has a config that cannot be read \(\w+Error"):
        pretrained.load_trained(tmp_path / "hostile.pt")


def test_a_file_without_class_names_needs_all_classes(run, image_folder, refused, tmp_path):
    weights = checkpoint.load(run / "checkpoints" / "0000007.pt")["ema"]
    torch.save(weights, tmp_path / "foreign.pt")
    shutil.copytree(image_folder / "ant", tmp_path / "data" / "ant")
    options = {"ckpt": tmp_path / "foreign.pt", "data_path": tmp_path / "data", "image_size": 32, "use_rope": True}
    assert refused(evaluate_loss.main, command_line(options | {"rope_rotate": 2})) == (
        f"--data-path {str(tmp_path / 'data')!r} has 1 class folders and checkpoint {str(tmp_path / 'foreign.pt')!r}, "
        "which does not name its classes, has 3; give one folder for each class, sorted as in training"
    )
