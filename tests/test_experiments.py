"""The studies: data sets, runner, statistics, tables and what docs/evidence.md says of them."""

import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import evaluate_loss
import train
from experiments import (
    comparisons,
    data,
    figures,
    measurements,
    plan,
    position_encodings,
    reference_curves,
    runs,
    tables,
)
from experiments.runs import REPOSITORY, Results
from models import DiT, ModelConfig
from rope import RopeConfig, rotate
from runtime import checkpoint
from runtime.options import UserError, rope_from_args

FAKE_TRAIN = """
import json, pathlib, signal, sys, time
given = json.loads(sys.argv[1])
folder, waits_for = pathlib.Path(given["results_dir"]), given.get("waits_for")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
(folder / "started").touch()
end = time.monotonic() + given.get("seconds", 0)
while time.monotonic() < end or waits_for and not pathlib.Path(waits_for, "started").exists():
    time.sleep(0.01)
print("last line")
if not waits_for:
    losses = {"val_loss": 0.5, "val_loss_ema": 0.75, "val_loss_tenths": [0.5] * 10, "val_loss_ema_tenths": [0.75] * 10}
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0} | losses]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in records))
    (folder / "finished.json").write_text("{}")
"""


@pytest.fixture
def fake_train(monkeypatch):
    """In place of train.py a process that sleeps for "seconds"; one that "waits_for" a folder fails once that began."""
    words = [sys.executable, "-c", FAKE_TRAIN]
    monkeypatch.setattr(runs, "command", lambda *_, **given: [*words, json.dumps(given, default=str)])


# Runs and results


@pytest.mark.usefixtures("fake_train")
def test_each_run_is_recorded_once(tmp_path):
    recorded = []
    runs.run_all({tmp_path / name: {"seconds": 0.3} for name in "abcd"}, 2, recorded.append)
    assert sorted(recorded) == [tmp_path / name for name in "abcd"]


@pytest.mark.usefixtures("fake_train")
def test_a_failed_run_stops_the_others_and_names_its_output(tmp_path):
    slow, failing = tmp_path / "slow", tmp_path / "failing"
    with pytest.raises(UserError) as error:
        runs.run_all({slow: {"seconds": 600}, failing: {"waits_for": slow}}, 2, pytest.fail)
    assert str(error.value) == (
        f"run {str(failing)!r} ended with status 0: last line; its output is in {str(failing / 'output.txt')!r}, "
        "repeat the command to go on"
    )
    assert not (slow / "finished.json").exists()  # it was asked to stop, and is waited for


@pytest.mark.usefixtures("fake_train")
def test_a_signal_stops_the_runs_and_says_how_to_go_on(tmp_path, capsys):
    slow, waiting = tmp_path / "slow", tmp_path / "waiting"

    def interrupt():
        while not (slow / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        runs.run_all({slow: {"seconds": 600}, waiting: {}}, 1, pytest.fail)
    assert stopped.value.code == 130 and "repeat the same command" in capsys.readouterr().err
    assert not waiting.exists()


def test_results_are_one_line_a_run_and_belong_to_their_settings(tmp_path):
    path, settings = tmp_path / "results.json", {"steps": 3, "variants": {"digits": ("axial",)}}
    results = Results(path, settings)
    results.add("runs", "a", {"loss": 1 / 3, "curve": [0.1234567891, 2]})
    results.add("runs", "b", {"loss": 2.0})
    assert '    "a": {"loss": 0.3333333, "curve": [0.1234568, 2]},\n' in path.read_text()
    again = {"a": {"loss": 0.3333333, "curve": [0.1234568, 2]}, "b": {"loss": 2.0}}
    assert Results(path, settings).sections["runs"] == again
    with pytest.raises(UserError, match=r"holds results of other settings: steps 3 \(now 4\); remove it or use anothe"):
        Results(path, settings | {"steps": 4})
    for text in ("[]", "3", '{"settings": []}', '{"settings": null}'):
        path.write_text(text)
        with pytest.raises(UserError, match="holds no results of a study; use another --out$|holds a JSON"):
            Results(path, {"steps": 3})


def test_environments_are_numbered_and_each_kept_once(tmp_path, monkeypatch):
    results, found = Results(tmp_path / "results.json", {}), []
    for cores in (1, 2, 1):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        found.append(results.origin()["environment"])
    assert found == ["1", "2", "1"] and [entry["cores"] for entry in results.sections["environment"].values()] == [1, 2]


@pytest.mark.parametrize("program, total", [(position_encodings, 71), (reference_curves, 5)])
def test_places_are_checked_and_a_dry_run_writes_nothing(program, total, tmp_path, refused, capsys):
    (tmp_path / "file").touch()
    for option, value in (("--out", tmp_path), ("--work-dir", tmp_path / "file" / "below")):
        assert refused(program.main, [option, value]).startswith(f"{option} {str(value)!r} cannot be written (")
    again = tmp_path / "again.json"
    program.main(["--work-dir", str(tmp_path / "work"), "--out", str(again), "--dry-run"])
    assert f"{total} of {total} runs to train" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert runs.figures_folder(again, program.PUBLISHED) == tmp_path  # the published figures are left alone


# Data sets


@pytest.mark.parametrize("shape", [(512, 512), (300, 451)])
def test_trained_and_held_out_parts_of_a_photograph_share_no_pixel(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before = data.split_photograph(pixels, plan.FULL)
    assert before[1].size == (256, 512) and before[0].height == 512
    cut = shape[1] - round(256 * shape[0] / 512)
    for column in (0, *range(cut - 5, cut + 5), shape[1] - 1):
        changed = pixels.copy()
        changed[:, column] = 255 - changed[:, column]
        parts = data.split_photograph(changed, plan.FULL)
        assert [part != old for part, old in zip(parts, before, strict=True)] == [column < cut, column >= cut]


def test_tiles_and_crops_come_from_their_own_parts(monkeypatch):
    pixels = np.zeros((512, 700), dtype=np.uint8)
    pixels[:, -256:] = 200
    monkeypatch.setattr(data, "load_photographs", lambda: {"wall": pixels})
    values = {}
    for part, label, _, image in data.photographs(plan.FULL):
        assert label == "wall" and (np.asarray(image) == (0 if part == "train" else 200)).all()
        values.setdefault((part, *image.size), []).append(image)
    tiles = ((512 - 128) // 24 + 1) * ((444 - 128) // 24 + 1)
    held_out = {("val", 128, 128): 5, ("canvas192", 192, 192): 5, ("canvas256", 256, 256): 5}
    assert {key: len(found) for key, found in values.items()} == {("train", 128, 128): tiles, **held_out}


def test_photographs_need_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match="need scikit-image, which is not installed; pip install -r requirements-dev"):
        data.load_photographs()


def test_as_many_of_each_digit_are_held_out_and_lie_whole_on_their_canvases():
    found = {}
    for part, label, file, image in data.digits(plan.FULL):
        found.setdefault(part, {})[label, file] = np.asarray(image, dtype=int)
    assert found["train"].keys().isdisjoint(found["val"]) and len(found["train"]) + len(found["val"]) == 1797
    assert [sum(label == str(digit) for label, _ in found["val"]) for digit in range(10)] == [6] * 10
    for key, image in found["val"].items():
        canvas = found["canvas192"][key]
        assert canvas.shape == (192, 192, 3) and canvas.sum() == image.sum()


def test_a_data_set_is_written_once_for_its_settings(tmp_path, monkeypatch):
    items = iter([("train", "a", "0.png", Image.new("RGB", (8, 8)))])  # a second time there would be none
    monkeypatch.setitem(data.DATA_SETS, "digits", lambda study: items)
    for _ in range(2):
        assert data.write_data_set("digits", tmp_path / "set", plan.FULL) == {"train": 1}
    with pytest.raises(UserError, match="was made with other settings than those of experiments/plan.py; remove it"):
        data.write_data_set("digits", tmp_path / "set", dataclasses.replace(plan.FULL, stride=32))


# The study


def parsed(options: dict, folder) -> object:
    """What train.py makes of the options of a run."""
    return train.parse_args(runs.command("train.py", "train.args", results_dir=folder, **options)[2:])


@pytest.mark.parametrize("variant", plan.VARIANTS)
def test_a_run_of_the_study_is_the_command_that_its_variant_and_settings_say(variant, tmp_path):
    run, root = plan.Run("digits", variant, 0.03, 4), tmp_path / "digits"
    args = parsed(position_encodings.training_options(run, plan.FULL, root), tmp_path / run.key)
    assert args.results_dir == tmp_path / "digits" / variant / "lr0.03" / "seed4"
    assert (args.lr, args.global_seed, args.max_steps, args.global_batch_size) == (0.03, 4, 400, 16)
    assert (args.lr_schedule, args.grad_clip, args.ema_decay, args.flip) == ("linear", 1, 0.98, False)
    assert (args.val_data_path, args.val_every, args.warmup_steps) == (root / "val", plan.FULL.val_every, 40)
    assert (args.latents_dir, args.image_size) == (tmp_path / "digits_latents", (128, 128))
    rotate = {"axial": 0, "spiral4": 4}.get(variant.split("_")[0], 2)
    border = "exact" if variant.endswith("exact") else "clamp"
    expected = RopeConfig(rotate=rotate, border=border, same_theta=variant == "same_theta2")
    assert rope_from_args(args) == (None if variant == "sincos" else expected)


def test_the_study_has_every_run_once():
    keys = [run.key for run in plan.FULL.runs]
    assert len(keys) == len(set(keys)) == 7 * 5 + 4 * 5 + 2 * 2 * 2 * 2 and len(plan.QUICK.runs) == 8


def test_seeds_pair_the_variants(tmp_path, train_arguments, tiny_commands, monkeypatch):
    """At one seed all variants have the same weights, noisy latents, timesteps, and labels after dropout."""
    forward, embed, seen = DiT.forward, torch.nn.Embedding.forward, []
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, y: seen.append(y.clone()) or embed(self, y))

    def record(self, x, t, y):
        if not seen:
            seen.append({name: value.clone() for name, value in self.state_dict().items()})
        seen.extend([x.clone(), t.clone()])
        return forward(self, x, t, y)

    monkeypatch.setattr(DiT, "forward", record)

    def trained(name: str, **changes) -> tuple[dict, list]:
        seen.clear()
        train.main(train_arguments(tmp_path / name, max_steps=2, **changes))
        return seen[0], seen[1:]

    weights, steps = trained("sincos")
    assert len(steps) == 2 * 3
    for variant in ("axial", "spiral4_exact", "same_theta2"):
        other_weights, other_steps = trained(variant, **plan.VARIANTS[variant].options)
        assert weights.keys() - other_weights.keys() <= {"pos_embed"}
        assert all(torch.equal(weights[name], other_weights[name]) for name in weights.keys() & other_weights.keys())
        assert all(torch.equal(a, b) for a, b in zip(steps, other_steps, strict=True))
    _, changed = trained("another seed", global_seed=1)
    assert not any(torch.equal(a, b) for a, b in zip(steps[::3], changed[::3], strict=True))


def test_a_study_goes_on_with_the_runs_that_are_missing(tmp_path, monkeypatch, fake_train):
    study = dataclasses.replace(plan.QUICK, lr=0.001, variants={"digits": ("sincos", "axial")}, seeds=2)
    started, start = [], runs.start
    monkeypatch.setattr(runs, "start", lambda folder, given: started.append(folder) or start(folder, given))
    monkeypatch.setattr(position_encodings, "QUICK", study)
    monkeypatch.setattr(data, "write_data_set", lambda *_: {"train": 1})
    monkeypatch.setattr(runs, "make_latents", lambda *_: None)
    monkeypatch.setattr(position_encodings, "reconstruction_psnr", lambda *_: 20.0)
    monkeypatch.setattr(position_encodings.Trained, "translation", lambda _: {"moved": 0.5, "rolled": 0.25})
    for name in ("beyond_grid", "attention"):
        monkeypatch.setattr(position_encodings.Trained, name, lambda *_: {})
    monkeypatch.setattr(figures, "draw_all", lambda *_: None)
    monkeypatch.setattr(tables, "all_tables", lambda *_: "tables")
    keys = [f"digits/{variant}/lr0.001/seed{seed}" for seed in (0, 1) for variant in ("sincos", "axial")]
    path, arguments = tmp_path / "quick" / "position_encodings.json", ["--quick", "--work-dir", str(tmp_path)]
    position_encodings.main([*arguments, "--jobs", "1"])
    assert started == [tmp_path / "quick" / "runs" / key for key in keys]
    results = json.loads(path.read_text())
    entry = results["runs"].pop(keys[-1])
    assert {"git_commit", "environment"} < entry.keys() and results["translation"].keys() == set(keys)
    assert results["beyond_grid"].keys() == set(keys[1::2]) and list(results["attention"]) == [keys[1]]
    assert entry["step"] == [2] and entry["val_loss"] == [0.5] and entry["val_loss_ema_tenths"] == [0.75] * 10
    assert not (tmp_path / "quick" / "runs" / keys[-1]).exists()
    path.write_text(json.dumps(results))
    for expected in (started[-1:], []):
        started.clear()
        position_encodings.main(arguments)
        assert started == expected


# Statistics


def test_comparison_is_the_paired_t_test_with_a_bootstrap_interval_of_the_mean_difference():
    values, others = np.array([1.0, 2.1, 3.2, 3.9, 5.3]), np.array([1.2, 2.0, 3.6, 4.4, 5.3])
    losses = {("digits", "axial"): values[:, None], ("digits", "sincos"): others[:, None]}
    (found,) = comparisons.compare(losses, by_baseline=False)
    differences = values - others
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(5))
    assert found.differences[:, 0] == pytest.approx(differences) and found.relative[0] == pytest.approx(-0.2 / 3.3)
    assert found.p[0] == pytest.approx(2 * stats.t.cdf(-abs(t), 4)) and found.p_holm[0] == found.p[0]
    resampled = differences[np.random.default_rng(1).integers(0, 5, (20000, 5))].mean(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    assert comparisons.bootstrap_interval(differences) == pytest.approx((low, high), abs=0.02)


def test_holm_multiplies_the_smallest_p_by_the_number_of_comparisons_and_keeps_the_order():
    found = comparisons.holm(np.array([[0.04, 0.01], [0.03, 0.5]]))
    assert found == pytest.approx(np.array([[0.09, 0.04], [0.09, 0.5]]))
    assert comparisons.holm(np.array([0.9, 0.8])) == pytest.approx([1, 1])


@pytest.mark.parametrize("by_baseline, family_size", [(False, 2 * 6 * 3), (True, 2 * 2 * 3)])
def test_every_pair_is_compared_and_corrected_within_its_family(by_baseline, family_size):
    random = np.random.default_rng(0)
    losses = {(name, variant): random.random((5, 3)) for name in ("a", "b") for variant in plan.MAIN_VARIANTS}
    compared = comparisons.compare(losses, by_baseline)
    assert [(item.variant, item.other) for item in compared if item.data_set == "b"] == [
        ("spiral4_clamp", "axial"),
        ("spiral4_exact", "axial"),
        ("axial", "sincos"),
        ("spiral4_clamp", "sincos"),
        ("spiral4_exact", "sincos"),
        ("spiral4_clamp", "spiral4_exact"),
    ]
    family = [item for item in compared if item.baseline == "axial" or not by_baseline]
    p_values, p_holm = (np.concatenate(values) for values in zip(*((x.p, x.p_holm) for x in family), strict=True))
    assert len(p_values) == family_size and list(p_holm) == list(comparisons.holm(p_values))
    everything = comparisons.compare({("a", variant): random.random((5, 3)) for variant in plan.VARIANTS}, True)
    assert [item.variant for item in everything if item.baseline == "exact"] == ["spiral2_clamp", "spiral4_clamp"]
    few = comparisons.compare({("a", variant): random.random((5, 3)) for variant in ("sincos", "spiral4_clamp")}, True)
    assert [(item.variant, item.baseline) for item in few] == [("spiral4_clamp", "sincos")]


@pytest.mark.parametrize("n, level", [(5, 0.05), (5, 0.005), (3, 0.05), (2, 0.006)])
def test_the_difference_that_would_be_found_is_found_in_four_of_five_simulated_studies(n, level):
    samples = np.random.default_rng(0).normal(0, 2, (20000, n))
    differences = stats.zscore(samples[0], ddof=1) * 2  # with the deviation of the simulated ones
    samples += comparisons.detectable(differences, level)
    assert (stats.ttest_1samp(samples, 0, axis=1).pvalue < level).mean() == pytest.approx(0.8, abs=0.01)


def test_bands_are_students_intervals_for_the_mean_and_for_one_more_run():
    values = np.random.default_rng(0).normal(3, 0.1, (5, 4))
    mean, half = comparisons.band(values, 0.95)
    low, high = stats.t.interval(0.95, 4, values.mean(0), stats.sem(values))
    assert mean - half == pytest.approx(low) and mean + half == pytest.approx(high)
    wider = comparisons.band(values, 0.95, one_more=True)[1]
    assert wider / half == pytest.approx(np.sqrt(6))  # sqrt(1 + 1/5) against sqrt(1/5)


@pytest.mark.parametrize("target, step", [(0.75, 150), (0.5, 200), (1.5, 100), (0.4, float("inf"))])
def test_steps_to_a_loss_are_interpolated(target, step):
    assert comparisons.steps_to_reach(np.array([100, 200, 300]), np.array([1.0, 0.5, 0.6]), target) == step


# Tables and figures


@pytest.fixture(scope="module")
def recorded():
    """The sections of the published results, which are of these settings, and the bands of the reference."""
    sections = Results(position_encodings.PUBLISHED, plan.FULL.settings()).sections
    runs_of_demo = Results(reference_curves.PUBLISHED, reference_curves.settings()).sections["runs"]
    return sections, reference_curves.bands(runs_of_demo)


def test_the_published_tables_are_those_of_the_recorded_results(recorded):
    page = (REPOSITORY / "docs" / "evidence.md").read_text(encoding="utf-8")
    study = tables.all_tables(plan.FULL, recorded[0])
    printed = [line for line in study.splitlines() if line and not line.startswith("#")]
    printed += reference_curves.bands_table(recorded[1]).splitlines()
    text = " ".join(page.split())  # sentences are broken at other places there
    assert len(printed) > 150 and [line for line in printed if line not in text] == []
    rows = [line for line in page.splitlines() if line.startswith("|") and "DiT-" not in line and "GFLOP" not in line]
    assert [line for line in rows if line not in printed] == []


def test_figures_are_drawn_from_the_recorded_results(recorded, tmp_path):
    for data_set, image in plan.FULL.attention_images.items():
        path = tmp_path / data_set / "val" / image
        path.parent.mkdir(parents=True)
        Image.new("RGB", (128, 128)).save(path)
    (tmp_path / "images").mkdir()
    figures.draw_all(plan.FULL, recorded[0], tmp_path, tmp_path / "images")
    reference_curves.draw(recorded[1], tmp_path / "images" / "evidence_reference.png")
    page = (REPOSITORY / "docs" / "evidence.md").read_text(encoding="utf-8")
    drawn = {path.name: Image.open(path).size for path in (tmp_path / "images").iterdir()}
    assert drawn == {name: Image.open(REPOSITORY / "docs/images" / name).size for name in drawn} and len(drawn) == 4
    assert sorted(drawn) == sorted(re.findall(r"\(images/(.*?)\)", page))


# Measurements of trained runs


def small_dit(fill_weights, rope: RopeConfig | None) -> DiT:
    shape = dict(input_size=16, in_channels=4, hidden_size=128, depth=2, num_heads=2, num_classes=3)
    return fill_weights(DiT(rope=rope, **shape)).eval()


@pytest.fixture
def inputs():
    """Noisy latents, timesteps and labels of two images."""
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([9, 500]), torch.tensor([0, 2])


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
def test_moved_tokens_are_felt_by_clamped_and_sincos_positions_alone(fill_weights, rope, feels_translation, inputs):
    model = small_dit(fill_weights, rope)
    before = model(*inputs)
    here, there = (measurements.predict_at(model, *inputs, corner, canvas=10) for corner in ((1, 1), (2, 1)))
    change = measurements.relative_change(there, here)
    assert change > 1e-4 if feels_translation else change < 1e-5
    if rope is not None and rope.border == "exact":  # relative positions are those of the trained grid
        torch.testing.assert_close(here, before[:, :4], atol=1e-4, rtol=1e-4)
    assert torch.equal(model(*inputs), before)  # positions are as they were


@pytest.mark.parametrize("rope", [RopeConfig(rotate=2), None])
@torch.no_grad()
def test_recorded_attention_is_the_models(fill_weights, rope, inputs):
    model, expected = small_dit(fill_weights, rope), []

    def record(attention, arguments):
        tokens, cos, sin = arguments
        q, k, _ = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)  # (B, N, H, D/H)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        expected.append(scores.softmax(-1).mean((0, 1)))

    for block in model.blocks:
        block.attn.register_forward_pre_hook(record)
    with measurements.RecordedAttention() as recorded:
        model(*inputs)
    torch.testing.assert_close(torch.stack(recorded.weights), torch.stack(expected))


@pytest.fixture
def trained_run(tmp_path, make_vae, fill_weights, tiny_commands):
    """A small axial model of random weights, with held-out images of a study's kind."""
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
        "vae": dataclasses.asdict(measurements.VAE(str(vae)).config),
        "data": {"classes": ["5", "7"]},
    }
    path = tmp_path / "run.pt"
    checkpoint.save(path, {"model": weights, "ema": weights, "step": 1, "config": about})
    study = dataclasses.replace(plan.FULL, beyond_grid_images=2, translated_images=2)
    return measurements.Trained(path, root, study, vae)


def test_losses_beyond_the_grid_are_those_of_evaluate_loss(trained_run, tmp_path):
    found = trained_run.beyond_grid()
    assert len(found) == 1 + 2 * 2 * 2 and len(set(found.values())) == len(found)
    folders = {"enlarged192/extrapolate": "val", "canvas192/interpolate": "canvas192", "trained": "val"}
    for name, folder in folders.items():
        command = [
            "--ckpt",
            trained_run.ckpt,
            "--data-path",
            trained_run.root / folder,
            "--out",
            tmp_path / "loss.json",
        ]
        if name != "trained":
            command += ["--image-size", name[-15:-12], "--rope-extend", name.partition("/")[2]]
        evaluate_loss.main([str(argument) for argument in [*command, "--num-workers", 0, "--precision", "fp32"]])
        assert json.loads((tmp_path / "loss.json").read_text())["loss"] == pytest.approx(found[name], rel=1e-5)


def test_rolled_content_comes_back_to_its_place(trained_run, monkeypatch):
    real = trained_run.translation()
    assert real["rolled"] > 1e-4 > 1e-5 > real["moved"]  # axial: what came round the edge is felt, the place is not
    monkeypatch.setattr(DiT, "forward", lambda self, x, t, y: torch.cat([x.sin(), x], dim=1))  # each pixel by itself
    assert trained_run.translation() == {"moved": 0, "rolled": 0}


def test_attention_maps_are_of_the_named_image(trained_run):
    found = trained_run.attention("7/a.png")
    assert found["image"] == "val/7/a.png" and np.shape(found["maps"]) == (3, 64)
    assert np.sum(found["maps"], axis=1) == pytest.approx([1, 1, 1])
    assert found["maps"] != trained_run.attention("5/a.png")["maps"]


def test_reconstruction_psnr_is_that_of_the_pixels(trained_run, monkeypatch):
    monkeypatch.setattr(measurements.VAE, "decode", lambda self, latents: torch.full((1, 128, 128, 3), 100))
    pixels = [np.asarray(Image.open(path), dtype=float) for path in (trained_run.root / "val").rglob("*.png")]
    expected = 20 * np.log10(255) - 10 * np.log10(np.square(np.stack(pixels) - 100).mean())
    assert measurements.reconstruction_psnr(trained_run.root, 128, trained_run.vae) == pytest.approx(expected)


def test_a_choice_of_held_out_images_is_evenly_spread_and_keeps_their_labels(tmp_path, vae_folder):
    for label in range(7):
        (tmp_path / str(label)).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / str(label) / "a.png")
    images = measurements.held_out(tmp_path, 16, vae_folder, 4)
    assert images.labels.tolist() == [0, 2, 4, 6] and (list(images.indices), images.total) == ([0, 1, 2, 3], 4)


@pytest.mark.slow
def test_the_study_runs_from_nothing_to_its_tables_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    """Real training processes, on a data set of forty images."""

    def few(study):
        items = list(data.digits(study))
        for part in ("train", "val", "canvas192", "canvas256"):
            yield from [item for item in items if item[0] == part and item[1] in "37"][:20]

    settings = dict(seeds=2, steps=2, batch=4, warmup_steps=1, val_every=1, sweep_lrs=())
    study = plan.Study(variants={"digits": ("sincos", "axial", "spiral4_exact")}, **settings)
    monkeypatch.setitem(data.DATA_SETS, "digits", few)
    monkeypatch.setattr(position_encodings, "QUICK", study)
    arguments = ["--quick", "--work-dir", str(tmp_path)]
    position_encodings.main(arguments)
    printed = capsys.readouterr().out
    assert printed.count("| digits | Spiral R = 4, exact") > 5 and "photograph" not in printed
    images = sorted(path.name for path in (tmp_path / "quick").glob("*.png"))
    assert images == ["evidence_attention.png", "evidence_curves.png", "evidence_tenths.png"]
    monkeypatch.setattr(runs, "start", lambda *_: pytest.fail("trained again"))
    position_encodings.main(arguments)
    assert capsys.readouterr().out == printed


# Reference curves


def test_the_demo_recipe_is_read_by_train(tmp_path):
    args = parsed(reference_curves.training_options(3, tmp_path), tmp_path / "run")
    assert (args.model, args.max_steps, args.global_seed, args.flip) == ("DiT-XS/2", 2000, 3, False)
    assert (args.grad_clip, args.use_rope, args.val_every, args.val_fraction) == (1, True, 300, 0.1)


@pytest.fixture
def checked(recorded, tmp_path, capsys):
    """Compares a run whose curves are the reference's means times factors, by step of the loss, with the reference."""

    def call(factors: dict[int, float] | None = None, steps: int = 20, shift: int = 0) -> str:
        records = {}
        for name, (at, means, _) in recorded[1].items():
            for step, mean in zip(at[:steps], means, strict=False):
                factor = (factors or {}).get(step, 1) if name == "loss" else 1
                records.setdefault(step + shift, {"step": step + shift})[name] = mean * factor if factor else None
        lines = [json.dumps(record) for _, record in sorted(records.items())]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        try:
            reference_curves.main(["--check", str(tmp_path)])
        except SystemExit as stopped:
            assert stopped.code == 2
        found = capsys.readouterr()
        return found.out + found.err

    return call


def test_a_run_may_leave_the_band_at_a_tenth_of_its_points_but_not_at_the_last_step(checked):
    assert "34 of 34 points are in the reference band" in checked()
    failed = "does not fall in the reference band; expected are nine of ten points and the last step"
    few = {step: 9.0 for step in (100, 200, 300)}
    assert "31 of 34 points" in checked(few) and failed not in checked(few)
    assert "training loss (MSE of the noise + variational term), step 200: 1." in checked(few)
    assert failed in checked(few | {400: 9.0})
    for last in (9.0, float("nan"), None):  # None: as a loss is recorded that is not finite
        assert failed in checked({2000: last})
    assert failed not in checked({100: 9.0}, steps=12)  # stopped half-way
    assert "has no loss at a step of the reference, which has every 100 steps" in checked(shift=1)


def test_a_folder_without_a_run_is_refused(tmp_path, refused):
    assert refused(reference_curves.main, ["--check", tmp_path]) == (
        f"--check {str(tmp_path)!r} holds no metrics.jsonl; give the --results-dir of a run of train.py"
    )


@pytest.mark.slow
def test_a_fresh_demo_run_falls_in_the_reference_band(tmp_path, capsys):
    reference_curves.prepare(tmp_path)
    options = reference_curves.training_options(reference_curves.SEEDS, tmp_path)  # a seed that it has not
    runs.run_all({tmp_path / "run": options}, 1, lambda folder: None)
    reference_curves.main(["--check", str(tmp_path / "run")])
    assert "of 34 points" in capsys.readouterr().out
