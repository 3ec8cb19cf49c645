"""The studies: data sets, runner, statistics and report."""

import dataclasses
import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats

import evaluate_loss
import models
import train
from experiments import comparisons, data, evaluation, plan, position_encodings, reference_curves, report, runs
from experiments.results import Results
from models import DiT, ModelConfig
from rope import RopeConfig
from runtime import checkpoint, validation
from runtime.options import UserError, rope_from_args

SMALL = plan.Study(
    variants={"digits": ("sincos", "axial", "spiral4_clamp", "spiral4_exact"), "photographs": ("sincos", "axial")},
    seeds=3,
    steps=300,
    batch=32,
    lr=0.001,
    warmup_steps=50,
    sweep_lrs=(0.001, 0.003),
    sweep_seeds=1,
)
FAKE_RUN = """
import pathlib, signal, sys, time
folder, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
waits = folder.parent / sys.argv[3] if len(sys.argv) > 3 else None
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with open(folder / "started", "a") as file:
    file.write("x")
end = time.monotonic() + seconds
while time.monotonic() < end or waits and not (waits / "started").exists():
    time.sleep(0.01)
print("last line")
if len(sys.argv) == 3:
    (folder / "finished.json").write_text("{}")
"""


@pytest.fixture
def fake_job(tmp_path):
    """Maker of a run that sleeps: fake_job("a", 0.1).

    With fails_after="b" it ends without being finished, once run b, which may be itself, has started.
    """

    def make(key: str, seconds: float, fails_after: str | None = None) -> runs.Job:
        folder = tmp_path / key
        extra = [fails_after] if fails_after else []
        return runs.Job(key, folder, [sys.executable, "-c", FAKE_RUN, str(folder), str(seconds), *extra])

    return make


@pytest.fixture
def logger():
    return logging.getLogger("test_experiments")


def test_jobs_run_in_parallel_and_each_is_recorded_once(fake_job, logger):
    jobs, recorded = [fake_job(str(index), 0.3) for index in range(4)], []
    assert runs.run_all(jobs, 4, lambda job: recorded.append(job.key), logger)
    assert sorted(recorded) == ["0", "1", "2", "3"]
    seconds = json.loads((jobs[0].folder / runs.CPU_SECONDS).read_text())["cpu_seconds"]
    assert 0 < seconds < 30


def test_processor_time_adds_up_over_interruptions(fake_job, logger):
    job = fake_job("a", 0)
    job.folder.mkdir()
    (job.folder / runs.CPU_SECONDS).write_text('{"cpu_seconds": 1000.0}')
    assert runs.run_all([job], 1, lambda job: None, logger)
    assert 1000 < json.loads((job.folder / runs.CPU_SECONDS).read_text())["cpu_seconds"] < 1030


def test_a_failed_run_stops_the_others_and_names_its_output(fake_job, logger):
    slow, failing = fake_job("slow", 600), fake_job("failing", 0, fails_after="slow")
    with pytest.raises(UserError) as error:
        runs.run_all([slow, failing], 2, lambda job: pytest.fail("nothing finished"), logger)
    assert str(error.value) == (
        f"run failing ended with status 0: last line; its output is in {str(failing.log)!r}, "
        "repeat the command to go on"
    )
    assert slow.process.returncode == 0 and not slow.finished  # it was asked to stop, and has gone


def test_runs_that_fail_together_are_one_message(fake_job, logger):
    jobs = [fake_job(key, 0, fails_after=key) for key in ("a", "b")]
    for job in jobs:
        job.start()
    for job in jobs:
        os.waitid(os.P_PID, job.process.pid, os.WEXITED | os.WNOWAIT)  # both have ended when the first is looked at
        job.start = lambda: None
    with pytest.raises(UserError, match="run a ended with status 0: last line"):
        runs.run_all(jobs, 2, lambda job: pytest.fail("nothing finished"), logger)
    assert all(job.process.returncode == 0 for job in jobs)


def test_a_signal_stops_the_runs_and_reports_that_not_all_are_done(fake_job, logger):
    job, waiting = fake_job("slow", 600), fake_job("waiting", 600)

    def interrupt():
        while not (job.folder / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert not runs.run_all([job, waiting], 1, lambda job: pytest.fail("nothing finished"), logger)
    assert job.process.returncode is not None and waiting.process is None


def test_results_are_one_line_a_run_and_belong_to_their_settings(tmp_path):
    path = tmp_path / "results.json"
    results = Results(path, {"steps": 3, "variants": {"digits": ("axial",)}})
    results.add("runs", "a", {"loss": 1 / 3, "curve": [0.1234567891, 2]})
    results.add("runs", "b", {"loss": 2.0})
    assert '    "a": {"loss": 0.3333333, "curve": [0.1234568, 2]},\n' in path.read_text()
    again = Results(path, {"steps": 3, "variants": {"digits": ("axial",)}})
    assert again.section("runs") == {"a": {"loss": 0.3333333, "curve": [0.1234568, 2]}, "b": {"loss": 2.0}}
    with pytest.raises(UserError) as error:
        Results(path, {"steps": 4, "variants": {"digits": ("axial",)}})
    assert str(error.value) == (
        f"{str(path)!r} holds results of other settings: steps 3 (now 4); remove it or use another --out"
    )
    for text in ("[]", "3", '{"settings": []}', '{"settings": null}'):
        path.write_text(text)
        with pytest.raises(UserError, match="holds no results of a study; use another --out$"):
            Results(path, {"steps": 3})


def test_environments_are_numbered_and_each_kept_once(tmp_path):
    results = Results(tmp_path / "results.json", {})
    assert [results.environment({"torch": version}) for version in ("1", "2", "1")] == ["1", "2", "1"]
    assert results.section("environment") == {"1": {"torch": "1"}, "2": {"torch": "2"}}


@pytest.mark.parametrize("program", [position_encodings, reference_curves])
def test_places_that_cannot_be_written_are_refused_at_once(program, tmp_path, refused):
    file = tmp_path / "file"
    file.touch()
    for option in ("--out", "--report"):
        expected = f"{option} {str(tmp_path)!r} is a folder; expected the name of a file"
        assert refused(program.main, ["--work-dir", tmp_path / "work", option, tmp_path]) == expected
    line = refused(program.main, ["--work-dir", file / "below"])
    assert line.startswith("--work-dir: ") and line.endswith("cannot be made (Not a directory); choose another")
    args = program.parse_args(["--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "again.json")])
    assert args.report == tmp_path / "again.md"  # another run of the study leaves the published page alone


# Data sets


@pytest.mark.parametrize("shape", [(512, 512), (300, 451)])
def test_trained_and_held_out_parts_of_a_photograph_share_no_pixel(shape):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, shape, dtype=np.uint8)
    trained, held_out = data.split_photograph(pixels)
    assert held_out.size == (256, 512) and trained.height == 512
    cut, influences = shape[1] - round(256 * shape[0] / 512), []
    columns = [0, *range(cut - 5, cut + 5), shape[1] - 1]
    for column in columns:
        changed = pixels.copy()
        changed[:, column] = 255 - changed[:, column]
        parts = data.split_photograph(changed)
        influences.append([part != before for part, before in zip(parts, (trained, held_out), strict=True)])
    assert influences == [[column < cut, column >= cut] for column in columns]


def test_tiles_and_crops_come_from_their_own_parts(monkeypatch):
    pixels = np.zeros((512, 700), dtype=np.uint8)
    pixels[:, -256:] = 200
    monkeypatch.setattr(data, "load_photographs", lambda: {"wall": pixels})
    values = {}
    for part, label, file, image in data.photographs():
        assert label == "wall" and file.endswith(".png")
        values.setdefault((part, image.size), []).append(np.unique(image))
    held_out = data.HELD_OUT_PER_CLASS["photographs"]
    tiles = ((512 - 128) // 24 + 1) * ((444 - 128) // 24 + 1)
    assert {key: len(found) for key, found in values.items()} == {
        ("train", (128, 128)): tiles,
        **{(part, (size, size)): held_out for part, size in (("val", 128), ("canvas192", 192), ("canvas256", 256))},
    }
    assert all((found == [0 if part == "train" else 200]).all() for (part, _), many in values.items() for found in many)


def test_photographs_need_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError) as error:
        data.load_photographs()
    assert str(error.value) == (
        "the photographs need scikit-image, which is not installed; pip install -r requirements-dev.txt"
    )


def test_as_many_of_each_digit_are_held_out_and_lie_whole_on_their_canvases():
    found = {}
    for part, label, file, image in data.digits():
        found.setdefault(part, {})[label, file] = image
    assert found["train"].keys().isdisjoint(found["val"]) and len(found["train"]) + len(found["val"]) == 1797
    counts = [sum(label == str(digit) for label, _ in found["val"]) for digit in range(10)]
    assert counts == [data.HELD_OUT_PER_CLASS["digits"]] * 10
    for key, image in found["val"].items():
        canvas = np.asarray(found["canvas192"][key], dtype=int)
        assert canvas.shape == (192, 192, 3) and canvas.sum() == np.asarray(image, dtype=int).sum()


def test_a_data_set_is_written_once_and_whole(tmp_path, monkeypatch):
    def whole():
        for index in range(3):
            yield "train", "a", f"{index}.png", Image.new("RGB", (8, 8))

    def broken():
        yield from whole()
        raise OSError("disk full")

    monkeypatch.setitem(data.DATA_SETS, "digits", broken)
    with pytest.raises(OSError):
        data.write_data_set("digits", tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(data.DATA_SETS, "digits", whole)
    assert data.write_data_set("digits", tmp_path / "set") == {"train": 3}
    monkeypatch.setitem(data.DATA_SETS, "digits", broken)
    assert data.write_data_set("digits", tmp_path / "set") == {"train": 3}
    monkeypatch.setitem(data.SETTINGS, "stride", 32)
    with pytest.raises(UserError, match="was made with other settings than those of experiments/data.py; remove it"):
        data.write_data_set("digits", tmp_path / "set")


# Runs


@pytest.mark.parametrize("variant", plan.VARIANTS)
def test_a_run_of_the_study_is_the_command_that_its_variant_and_settings_say(variant, tmp_path):
    study_args = position_encodings.parse_args(["--work-dir", str(tmp_path)])
    run = plan.Run("digits", variant, 0.03, 4)
    job = position_encodings.training_job(run, plan.FULL, study_args)
    args = train.parse_args([str(argument) for argument in job.command[2:]])
    assert job.command[1] == "train.py" and job.folder == args.results_dir == tmp_path / "full" / "runs" / run.key
    assert (args.lr, args.global_seed, args.max_steps, args.global_batch_size) == (0.03, 4, 400, 16)
    assert (args.lr_schedule, args.grad_clip, args.ema_decay, args.flip) == ("linear", 1, 0.98, False)
    assert args.val_data_path == tmp_path / "data" / "digits" / "val" and args.val_every == plan.FULL.val_every
    assert args.latents_dir == tmp_path / "data" / "digits_latents" and args.sample_every == 0
    rope = rope_from_args(args)
    if variant == "sincos":
        assert rope is None
    else:
        rotate = {"axial": 0, "spiral4": 4}.get(variant.split("_")[0], 2)
        border = "exact" if variant.endswith("exact") else "clamp"
        assert rope == RopeConfig(rotate=rotate, border=border, same_theta=variant == "same_theta2")


def test_the_study_has_every_run_once():
    full = plan.planned(plan.FULL)
    assert len(full) == len({run.key for run in full}) == 7 * 5 + 4 * 5 + 2 * 2 * 2 * 2
    assert {run.variant for run in full} == set(plan.VARIANTS) == set(plan.LABELS)
    assert len(plan.planned(plan.QUICK)) == 8


def seen_in_training(arguments: list[str], steps: int) -> tuple[dict, list]:
    """Initial weights, and what the model is given in each step: noisy latents, timesteps, labels after dropout."""
    trainer = train.Trainer(train.plan(train.parse_args(arguments), torch.device("cpu")))
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    seen, predict = [], trainer.predict
    trainer.predict = lambda x, t, y: seen.extend([x.clone(), t, y]) or predict(x, t, y)
    trainer.model.y_embedder.embedding_table.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    batches = train.data.EpochBatches(len(trainer.job.dataset), 8, trainer.args.global_seed)
    for batch, _ in zip(batches, range(steps), strict=False):
        trainer.train_step([train.data.collate([trainer.job.dataset[item] for item in batch])])
    return weights, seen


def test_seeds_pair_the_variants(tmp_path, train_arguments, tiny_commands):
    found = {}
    for variant in ("sincos", "axial", "spiral4_exact", "same_theta2"):
        found[variant] = seen_in_training(train_arguments(tmp_path, **plan.VARIANTS[variant]), steps=2)
    weights, seen = found["sincos"]
    assert len(seen) == 2 * 4
    for other_weights, other_seen in found.values():
        assert weights.keys() - other_weights.keys() <= {"pos_embed"}
        shared = weights.keys() & other_weights.keys()
        assert all(torch.equal(weights[name], other_weights[name]) for name in shared)
        assert all(torch.equal(a, b) for a, b in zip(seen, other_seen, strict=True))
    _, changed = seen_in_training(train_arguments(tmp_path, global_seed=1), steps=2)
    assert not any(torch.equal(a, b) for a, b in zip(seen[::4], changed[::4], strict=True))


FAKE_TRAINING = """
from runtime import pretrained
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
(folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in [
    {"step": 1, "loss": 2.0},
    {"step": 2, "loss": 1.0, "val_loss": 0.5, "val_loss_ema": 0.75,
     "val_loss_tenths": [0.5] * 10, "val_loss_ema_tenths": [0.75] * 10},
]))
(folder / "finished.json").write_text("{}")
"""


def test_a_study_goes_on_with_the_runs_that_are_missing(tmp_path, monkeypatch):
    started = []

    def fake_job(run, study, args):
        started.append(run.key)
        folder = args.work_dir / "runs" / run.key
        return runs.Job(run.key, folder, [sys.executable, "-c", FAKE_TRAINING, str(folder)])

    study = dataclasses.replace(plan.QUICK, lr=0.001, variants={"digits": ("sincos", "axial")}, seeds=2)
    monkeypatch.setattr(position_encodings, "QUICK", study)
    monkeypatch.setattr(position_encodings, "prepare_data", lambda *_: None)
    monkeypatch.setattr(position_encodings, "training_job", fake_job)
    monkeypatch.setattr(runs, "keep_weights", lambda folder, path: None)
    arguments = ["--quick", "--work-dir", str(tmp_path), "--stage", "runs", "--jobs", "2"]
    position_encodings.main(arguments)
    assert len(started) == 4 and started[0] == "digits/sincos/lr0.001/seed0"
    path = tmp_path / "quick" / "position_encodings.json"
    results = json.loads(path.read_text())
    entry = results["runs"].pop("digits/axial/lr0.001/seed1")
    assert entry.pop("cpu_seconds") > 0 and "git_commit" in entry
    assert entry["step"] == [2] and entry["val_loss"] == [0.5] and entry["val_loss_ema_tenths"] == [0.75] * 10
    assert not (tmp_path / "quick" / "runs" / "digits/axial/lr0.001/seed1").exists()
    path.write_text(json.dumps(results))
    started.clear()
    position_encodings.main(arguments)
    assert started == ["digits/axial/lr0.001/seed1"]
    started.clear()
    position_encodings.main(arguments)
    assert started == []


def test_recorded_runs_without_weights_are_named(tmp_path, monkeypatch, refused):
    study = dataclasses.replace(plan.QUICK, lr=0.001, variants={"digits": ("axial",)}, seeds=2)
    monkeypatch.setattr(position_encodings, "QUICK", study)
    line = refused(position_encodings.main, ["--quick", "--work-dir", tmp_path, "--stage", "measurements"])
    folder = tmp_path / "quick"
    assert line == (
        f"the weights of run digits/axial/lr0.001/seed0 are not in {str(folder / 'weights')!r}, 2 in all; remove "
        f"their lines from {str(folder / 'position_encodings.json')!r} to train them again"
    )
    line = refused(position_encodings.main, ["--quick", "--work-dir", tmp_path, "--stage", "report"])
    assert line == (
        f"{str(folder / 'position_encodings.json')!r} lacks 2 measured runs, such as digits/axial/lr0.001/seed0; "
        "repeat the command without --stage to make them"
    )


# Statistics


def test_comparison_is_the_paired_t_test_with_a_bootstrap_interval_of_the_mean_difference():
    values, baseline = np.array([1.0, 2.1, 3.2, 3.9, 5.3]), np.array([1.2, 2.0, 3.6, 4.4, 5.3])
    found = comparisons.compare(values, baseline, "digits", ("a", "b", "b"))
    differences = values - baseline
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(5))
    assert found.difference == pytest.approx(-0.2) and found.relative == pytest.approx(-0.2 / 3.3)
    assert found.p == pytest.approx(2 * stats.t.cdf(-abs(t), 4))
    resampled = differences[np.random.default_rng(1).integers(0, 5, (20000, 5))].mean(1)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])), abs=0.02)


def test_holm_multiplies_the_smallest_p_by_the_number_of_comparisons_and_keeps_the_order():
    corrected = comparisons.holm(np.array([0.04, 0.01, 0.03, 0.5]))
    assert corrected == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert comparisons.holm(np.array([0.9, 0.8])) == pytest.approx([1, 1])


def random_losses(*shape: int) -> dict:
    random = np.random.default_rng(0)
    variants = ("sincos", "axial", "spiral4_clamp", "spiral4_exact")
    return {data_set: {name: random.random(shape) for name in variants} for data_set in ("digits", "photographs")}


PAIRS = [
    ("spiral4_clamp", "axial"),
    ("spiral4_exact", "axial"),
    ("axial", "sincos"),
    ("spiral4_clamp", "sincos"),
    ("spiral4_exact", "sincos"),
    ("spiral4_clamp", "spiral4_exact"),
]


def test_every_variant_is_compared_with_both_baselines_and_the_borders_with_each_other():
    compared = comparisons.compare_all(random_losses(5))
    assert [item.pair for item in compared] == 2 * PAIRS
    assert [item.p_holm for item in compared] == list(comparisons.holm(np.array([item.p for item in compared])))
    assert len([pair for pair in plan.pairs(plan.VARIANTS) if pair[2] == "exact"]) == 2
    assert plan.pairs(("sincos", "spiral4_clamp")) == [("spiral4_clamp", "sincos", "sincos")]


def test_points_are_compared_each_by_itself_and_corrected_over_all_of_their_baseline():
    losses = random_losses(5, 3)
    compared = comparisons.compare_points(losses)
    assert [items[0].pair for items in compared if items[0].data_set == "photographs"] == PAIRS
    family = [item for items in compared for item in items if item.baseline == "axial"]
    assert len(family) == 2 * 2 * 3
    assert [item.p_holm for item in family] == list(comparisons.holm(np.array([item.p for item in family])))
    second = next(items for items in compared if (items[0].data_set, items[0].pair) == ("photographs", PAIRS[0]))[1]
    values, others = (losses["photographs"][name][:, 1] for name in PAIRS[0])
    assert second.p == pytest.approx(stats.ttest_1samp(values - others, 0).pvalue)
    assert second.relative == pytest.approx(values.mean() / others.mean() - 1)


def test_the_difference_that_would_be_found_is_found_in_four_of_five_simulated_studies():
    for n, level in ((5, 0.05), (5, 0.005), (3, 0.05)):
        effect = comparisons.standardized_difference(n, level)
        samples = np.random.default_rng(0).normal(effect, 1, (20000, n))
        found = (stats.ttest_1samp(samples, 0, axis=1).pvalue < level).mean()
        assert found == pytest.approx(0.8, abs=0.01)
    assert comparisons.standardized_difference(2, 0.05 / 9) > 50  # two seeds find next to nothing


def test_bands_are_students_intervals_for_the_mean_and_for_one_more_run():
    values = np.random.default_rng(0).normal(3, 0.1, (5, 4))
    mean, half = comparisons.confidence_band(values)
    low, high = stats.t.interval(0.95, 4, values.mean(0), stats.sem(values))
    assert mean - half == pytest.approx(low) and mean + half == pytest.approx(high)
    wider = comparisons.prediction_band(values, 0.95)[1]
    assert wider / half == pytest.approx(np.sqrt(6))  # sqrt(1 + 1/5) against sqrt(1/5)


def test_steps_to_a_loss_are_interpolated():
    steps, curve = np.array([100, 200, 300]), np.array([1.0, 0.5, 0.6])
    assert comparisons.steps_to_reach(steps, curve, 0.75) == 150
    assert comparisons.steps_to_reach(steps, curve, 0.5) == 200
    assert comparisons.steps_to_reach(steps, curve, 1.5) == 100
    assert comparisons.steps_to_reach(steps, curve, 0.4) == float("inf")


def test_gpu_hours_are_operations_over_speed():
    # 3600 images of 1000 GFLOP are 3.6e15 operations: an hour at 1 TFLOP/s
    assert comparisons.gpu_hours(1000, steps=360, batch=10, peak_tflops=2, share=0.5) == pytest.approx(1)


# Measurements of trained runs


def small_dit(fill_weights, rope: RopeConfig | None) -> DiT:
    shape = dict(input_size=16, in_channels=4, hidden_size=128, depth=2, num_heads=2, num_classes=3)
    return fill_weights(DiT(rope=rope, **shape)).eval()


@pytest.mark.parametrize(
    "rope, feels_translation",
    [
        (RopeConfig(), False),
        (RopeConfig(rotate=4, border="exact"), False),
        (RopeConfig(rotate=4, border="clamp"), True),
        (None, True),
    ],
)
@torch.no_grad()
def test_moved_tokens_are_felt_by_clamped_and_sincos_positions_alone(fill_weights, rope, feels_translation):
    model = small_dit(fill_weights, rope)
    names = list(model.state_dict())
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([9, 500])
    y = torch.tensor([0, 2])
    here, there = (evaluation.predict_at(model, x, t, y, corner) for corner in ((1, 1), (2, 1)))
    change = evaluation.relative_change(there, here)
    assert change > 1e-4 if feels_translation else change < 1e-5
    if rope is not None and rope.border == "exact":  # relative positions are those of the trained grid
        torch.testing.assert_close(here, model(x, t, y)[:, :4], atol=1e-4, rtol=1e-4)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("rope", [RopeConfig(rotate=2), None])
@torch.no_grad()
def test_recorded_attention_is_the_models(fill_weights, monkeypatch, rope):
    model, used, attend = small_dit(fill_weights, rope), [], F.scaled_dot_product_attention

    def record(q, k, v):
        used.append((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1)))
        return attend(q, k, v)

    monkeypatch.setattr(models.F, "scaled_dot_product_attention", record)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = evaluation.record_attention(model, x, torch.tensor([9, 500]), torch.tensor([0, 2]))
    torch.testing.assert_close(found, torch.stack(used).mean(0))
    torch.testing.assert_close(found.sum(1), torch.ones(64))


@pytest.fixture
def trained_run(tmp_path, make_vae, fill_weights):
    """Weights of a small axial model as the study keeps them, held-out images of its kind, and an autoencoder."""
    random, root = np.random.default_rng(0), tmp_path / "data"
    for part, size in (("val", 128), ("canvas192", 192), ("canvas256", 256)):
        for label in ("5", "7"):
            (root / part / label).mkdir(parents=True)
            noise = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            noise.resize((size, size), Image.Resampling.BICUBIC).save(root / part / label / "a.png")
    config = ModelConfig(model="DiT-XS/2", num_classes=2, input_size=(16, 16), in_channels=4, rope=RopeConfig())
    vae, weights = make_vae(), fill_weights(config.build()).state_dict()
    about = {
        "model": config.to_dict(),
        "image_size": [128, 128],
        "vae": {"source": str(vae), **evaluation.VAE(str(vae)).describe()},
    }
    about |= {"data": {"classes": ["5", "7"]}}
    path = tmp_path / "run.pt"
    checkpoint.save(path, {"model": weights, "ema": weights, "step": 1, "config": about})
    evaluation.held_out.cache_clear()
    return path, root, vae


@pytest.mark.usefixtures("tiny_commands")
def test_losses_beyond_the_grid_are_those_of_evaluate_loss(trained_run, tmp_path, monkeypatch):
    path, root, vae = trained_run
    monkeypatch.setattr(evaluation, "BEYOND_GRID_IMAGES", 2)  # both, in place of a choice of them
    found = evaluation.beyond_grid_losses(path, root, vae)
    assert len(found) == 1 + 2 * 2 * 2 and len(set(found.values())) == len(found)
    folders = {
        "enlarged192/extrapolate": "val",
        "canvas192/interpolate": "canvas192",
        "canvas256/extrapolate": "canvas256",
    }
    for name, folder in {"trained": "val", **folders}.items():
        command = ["--ckpt", path, "--data-path", root / folder, "--out", tmp_path / "loss.json"]
        if name != "trained":
            command += ["--image-size", name[-15:-12], "--rope-extend", name.partition("/")[2]]
        evaluate_loss.main([str(argument) for argument in [*command, "--num-workers", 0, "--precision", "fp32"]])
        assert json.loads((tmp_path / "loss.json").read_text())["loss"] == pytest.approx(found[name], rel=1e-5)


@pytest.mark.usefixtures("tiny_commands")
def test_rolled_content_comes_back_to_its_place(trained_run, monkeypatch):
    class Pointwise(DiT):
        """Predicts from each pixel alone, as no position encoding could disturb."""

        def forward(self, x, t, y):
            return torch.cat([x.sin(), x], dim=1)

    load = pretrained.load_trained

    def pointwise(path):
        trained = load(path)
        trained.model.__class__ = Pointwise
        return trained

    real = evaluation.translation(*trained_run)
    assert real["rolled"] > 1e-4 > 1e-5 > real["moved"]  # axial: what came round the edge is felt, the place is not
    monkeypatch.setattr(checkpoint, "load_trained", pointwise)
    assert evaluation.translation(*trained_run) == {"moved": 0, "rolled": 0}


@pytest.mark.usefixtures("tiny_commands")
def test_attention_is_measured_on_the_named_image(trained_run):
    found = evaluation.attention_maps(*trained_run, "7/a.png")
    assert found["image"] == "val/7/a.png" and np.shape(found["maps"]) == (len(evaluation.QUERIES), 64)
    assert np.sum(found["maps"], axis=1) == pytest.approx([1, 1, 1])
    assert found["maps"] != evaluation.attention_maps(*trained_run, "5/a.png")["maps"]


def test_reconstruction_psnr_is_that_of_the_pixels(trained_run, monkeypatch):
    _, root, vae = trained_run
    monkeypatch.setattr(evaluation.VAE, "decode", lambda self, latents: torch.full((1, 128, 128, 3), 100))
    pixels = [np.asarray(Image.open(path), dtype=float) for path in (root / "val").rglob("*.png")]
    mean_square = np.mean([np.mean((image - 100) ** 2) for image in pixels])
    assert evaluation.reconstruction_psnr(root, vae) == pytest.approx(20 * np.log10(255) - 10 * np.log10(mean_square))


def test_a_choice_of_held_out_images_keeps_their_labels():
    moments = torch.arange(7.0)[:, None, None, None].expand(7, 8, 2, 2)
    images = validation.EncodedImages(list(range(7)), 7, moments, torch.arange(7), 0.5, 0.0)
    chosen = evaluation.spread(images, 4)
    assert chosen.labels.tolist() == chosen.moments[:, 0, 0, 0].tolist() == [0, 2, 4, 6]
    assert (chosen.indices, chosen.total) == ([0, 1, 2, 3], 4)


@pytest.mark.slow
def test_the_study_runs_from_nothing_to_its_page_and_repeats_nothing(tmp_path, monkeypatch):
    """Real training processes and workers, on a data set of forty images."""

    def few():
        items = list(data.digits())
        for part in ("train", "val", "canvas192", "canvas256"):
            yield from [item for item in items if item[0] == part and item[1] in "37"][:20]

    study = plan.Study(
        variants={"digits": ("sincos", "axial", "spiral4_exact")},
        seeds=2,
        steps=2,
        batch=4,
        warmup_steps=1,
        val_every=1,
        sweep_lrs=(),
    )
    monkeypatch.setitem(data.DATA_SETS, "digits", few)
    monkeypatch.setattr(position_encodings, "QUICK", study)
    arguments = ["--quick", "--work-dir", str(tmp_path)]
    position_encodings.main(arguments)
    text = (tmp_path / "quick" / "evidence.md").read_text()
    assert "6 runs took" in text and "photograph" not in text
    images = sorted(path.name for path in (tmp_path / "quick" / "images").iterdir())
    assert images == ["evidence_attention.png", "evidence_curves.png", "evidence_tenths.png"]
    monkeypatch.setattr(position_encodings, "training_job", lambda *_: pytest.fail("everything was trained"))
    monkeypatch.setattr(position_encodings, "submit", lambda *_: pytest.fail("everything was measured"))
    position_encodings.main(arguments)
    assert (tmp_path / "quick" / "evidence.md").read_text() == text


# Report


LOSSES = {"axial": 0.0625, "spiral4_clamp": 0.125, "spiral4_exact": 0.03125}  # beyond the grid, made up


@pytest.fixture
def made_up(tmp_path):
    """Results of a small study in which axial RoPE is better than sin-cos by 0.01 and the rest is noise."""
    results, random = Results(tmp_path / "results.json", {"made": "up"}), np.random.default_rng(0)
    versions = {"versions": {"python": "3.11", "torch": "2.15"}, "processor": "a processor", "cores": 2}
    assert results.environment(versions) == results.environment(versions) == "1"
    for data_set in SMALL.variants:
        results.add("data", data_set, {"train": 1677, "val": 120})
        results.add("reconstruction", data_set, {"psnr": 25.25})
    for run in plan.planned(SMALL):
        level = (0.05 if run.variant == "sincos" else 0.04) + random.normal(0, 1e-4)
        curve = [level + 0.02, level + 0.005, level]
        values = {"step": [100, 200, 300], "val_loss": curve, "val_loss_ema": curve, "cpu_seconds": 60.0}
        values |= {"val_loss_tenths": [level] * 10, "val_loss_ema_tenths": [level] * 10, "git_commit": "0123456789ab"}
        values["environment"] = "1"
        results.add("runs", run.key, values)
    for run in plan.compared_runs(SMALL):
        results.add("translation", run.key, {"moved": 3e-8 if run.variant == "axial" else 0.25, "rolled": 0.5})
        results.add("measurements", run.key, {"cpu_seconds": 30.0})
        if run.variant in SMALL.beyond_grid_variants:
            names = [f"{kind}{size}/{extension}" for kind in ("enlarged", "canvas") for size in (192, 256)
                     for extension in evaluation.EXTENSIONS]  # fmt: skip
            results.add(
                "beyond_grid", run.key, dict.fromkeys(["trained", *names], LOSSES[run.variant] * (1 + run.seed / 100))
            )
        if run.seed == 0 and run.variant in SMALL.attention_variants:
            results.add("attention", run.key, {"image": "val/a.png", "maps": random.random((3, 64)).tolist()})
    return results


@pytest.fixture
def page(made_up, tmp_path):
    """The page of the made-up results."""
    folders = {data_set: tmp_path / data_set for data_set in SMALL.variants}
    for folder in folders.values():
        (folder / "val").mkdir(parents=True)
        Image.new("RGB", (128, 128)).save(folder / "val" / "a.png")
        for label, count in {"brick": 3, "cat": 5}.items():
            (folder / "train" / label).mkdir(parents=True)
            for index in range(count):
                (folder / "train" / label / f"{index}.png").touch()
    path = tmp_path / "docs" / "evidence.md"
    report.write_page(path, "the study", report.Measured(SMALL, made_up), folders)
    return path


def test_the_page_says_what_was_measured(page, made_up):
    text = page.read_text()
    images = sorted(path.name for path in (page.parent / "images").iterdir())
    assert images == ["evidence_attention.png", "evidence_curves.png", "evidence_tenths.png"]
    assert all(f"(images/{name})" in text for name in images)
    assert "8 × 8 tokens; 300 steps of batch 32, AdamW at 0.001 without weight decay (linear after 50 steps" in text
    assert "22 runs took 0.4 hours and their measurements 0.1 hours of one core" in text and "0123456789)" in text
    assert "A photograph has 3 to 5 training tiles." in text and "digits 25.2 dB; photographs 25.2 dB" in text
    assert re.search(r"- digits, against sin-cos: axial RoPE \(-(19\.9|20\.0)\d %\).* better\.", text)
    assert re.search(r"- digits, against axial RoPE: .* not distinguishable from it\.", text)
    assert "| digits | axial RoPE | 3e-06 % | 50.00 ± 0.00 % |" in text
    assert "| digits | sin-cos | 25.00 ± 0.00 % | 50.00 ± 0.00 % |" in text
    losses = "0.0631 ± 0.0006 | +100.00 ± 0.00 % ‡ | -50.00 ± 0.00 % ‡ | +300.00 ± 0.00 % ‡ |"
    assert f"| digits | enlarged | 12 × 12 | extrapolate | {losses}" in text
    assert f"| digits | as trained | 8 × 8 | – | {losses}" in text
    assert "against axial RoPE 18 of 18, 18 after correction; against the exact border 9 of 9, 9 after" in text
    assert re.search(r"\| digits \| axial RoPE − sin-cos( \| -\d+\.\d % ‡){3} \|", text)  # at each of three steps
    assert re.search(r"\| photographs \| axial RoPE − sin-cos( \| -\d+\.\d % ‡){10} \|", text)  # in each tenth
    assert "| photographs | canvas | 16 × 16 | interpolate | 0.0631 ± 0.0006 | – | – | – |" in text
    assert "| DiT-B/4 | 33 | 2.4 | 28 |" in text
    # at 0.001 and 0.003 the made-up losses of one seed are those of two runs that differ by noise
    finals = {run.key: made_up.section("runs")[run.key]["val_loss_ema"][-1] for run in plan.sweep_runs(SMALL)}
    for data_set, variant in itertools.product(("digits", "photographs"), ("sincos", "axial")):
        low, high = (finals[f"{data_set}/{variant}/lr{lr}/seed0"] for lr in ("0.001", "0.003"))
        lower = f"0.003, an end of the sweep, {100 * (1 - high / low):.1f} % below its loss at 0.001"
        best = "0.001, an end of the sweep" if low < high else lower
        assert re.search(rf"on {data_set} {re.escape(plan.LABELS[variant])} is best at {re.escape(best)}[;.]", text)
        assert f"| {low:.4f} |" in text and f"| {high:.4f} |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({(line.count("|"), line) for line in rows}) > 30
    reached = next(line for line in rows if line.startswith("| digits | axial RoPE | 0.04"))
    assert 163 < float(reached.split("|")[5].split("±")[0]) < 170  # 0.06 at step 100, 0.045 at 200


def test_the_generator_leaves_what_people_wrote_alone(tmp_path):
    before, after = "# Mine\n\nText above.\n\n", "\n\nText below.\n"
    path = tmp_path / "page.md"
    path.write_text(f"{before}<!-- results: generated by a -->\nold\n<!-- end of results -->{after}")
    report.write_block(path, "a", "new")
    assert path.read_text() == f"{before}<!-- results: generated by a -->\nnew\n<!-- end of results -->{after}"
    report.write_block(path, "b", "other")
    assert path.read_text() == (
        f"{before}<!-- results: generated by a -->\nnew\n<!-- end of results -->{after}"
        "\n<!-- results: generated by b -->\nother\n<!-- end of results -->\n"
    )
    path.write_text(path.read_text().replace("\nnew\n<!-- end of results -->", "\nnew\n"))
    with pytest.raises(UserError, match="put it back, or remove both"):  # and not the part of b with it
        report.write_block(path, "a", "newer")
    path.write_text("<!-- results: generated by a -->\nold\n")
    with pytest.raises(UserError, match="without '<!-- end of results -->' after it; put it back, or remove both"):
        report.write_block(path, "a", "new")


# Reference curves


def test_the_demo_recipe_is_the_one_of_run_all():
    recipe = reference_curves.demo_recipe()
    job = reference_curves.training_job(3, "run", "latents", recipe)
    args = train.parse_args([str(argument) for argument in job.command[2:]])
    assert (args.model, args.global_seed, args.flip, args.use_rope) == ("DiT-XS/2", 3, False, True)
    assert args.grad_clip == 1
    assert f"MAX_STEPS:-{args.max_steps}}}" in (position_encodings.REPOSITORY / "run_all.sh").read_text()


def curves_with(values: list[float]) -> dict:
    return {
        name: {"step": list(range(100, 100 * len(values) + 1, 100)), "value": values}
        for name in reference_curves.CURVES
    }


def test_a_run_outside_the_band_is_named():
    bands = reference_curves.bands({f"seed{seed}": curves_with([0.1 + 0.001 * seed]) for seed in range(5)})
    half = stats.t.ppf(0.995, 4) * np.std([0, 1, 2, 3, 4], ddof=1) * 0.001 * np.sqrt(1.2)
    assert bands["loss"]["mean"] == pytest.approx([0.102]) and bands["loss"]["half"] == pytest.approx([half])
    assert reference_curves.outside(curves_with([0.102 + 0.99 * half]), bands) == []
    assert reference_curves.outside(curves_with([0.2]), bands)[0] == (
        "loss",
        100,
        0.2,
        pytest.approx(0.102),
        pytest.approx(half),
    )
    assert len(reference_curves.outside(curves_with([float("nan")]), bands)) == 3


def test_a_run_may_leave_the_band_at_a_tenth_of_its_points_but_not_at_the_last_step():
    bands = reference_curves.bands({f"seed{seed}": curves_with([0.1 + 0.001 * seed] * 10) for seed in range(5)})
    good, bad = 0.102, 0.2
    assert reference_curves.falls_in(curves_with([bad] + 9 * [good]), bands)
    assert not reference_curves.falls_in(curves_with([bad] * 2 + 8 * [good]), bands)
    assert not reference_curves.falls_in(curves_with(9 * [good] + [bad]), bands)
    assert reference_curves.falls_in(curves_with(5 * [good]), bands)  # stopped half-way


def test_a_run_is_checked_against_the_reference(tmp_path, refused, caplog, capsys):
    reference = json.loads(reference_curves.REFERENCE.read_text())["bands"]["loss"]
    arguments = ["--work-dir", tmp_path, "--check", tmp_path / "run"]
    name = repr(str(tmp_path / "run"))
    assert refused(reference_curves.main, arguments) == (
        f"--check {name} holds no metrics.jsonl; give the --results-dir of a run of train.py"
    )
    (tmp_path / "run").mkdir()

    def write(steps, factor):
        rows = zip(steps, reference["mean"], strict=True)
        lines = [json.dumps({"step": step, "loss": factor * mean}) for step, mean in rows]
        (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    write(reference["step"], 1.0)
    reference_curves.main([str(argument) for argument in arguments])
    assert "20 of 20 points are in the reference band" in capsys.readouterr().out
    write(reference["step"], 2.0)
    assert refused(reference_curves.main, arguments).startswith(f"--check {name} does not fall in the reference band;")
    write([step + 1 for step in reference["step"]], 1.0)
    assert refused(reference_curves.main, arguments) == (
        f"--check {name} has no loss at a step of the reference, which has every 100 steps; give a run of the demo's "
        "settings"
    )


@pytest.mark.slow
def test_a_fresh_demo_run_falls_in_the_reference_band(tmp_path, logger):
    reference = json.loads(reference_curves.REFERENCE.read_text())["bands"]
    recipe = reference_curves.demo_recipe()
    latents = reference_curves.prepare_latents(tmp_path, recipe["image_size"])
    fresh = reference_curves.SEEDS  # a seed that the bands were not made of
    job = reference_curves.training_job(fresh, tmp_path / "run", latents, recipe)
    assert runs.run_all([job], 1, lambda job: None, logger)
    curves = reference_curves.curves_of(job.folder)
    assert len(reference_curves.points(curves, reference)) == sum(len(band["step"]) for band in reference.values())
    assert reference_curves.falls_in(curves, reference), reference_curves.outside(curves, reference)
