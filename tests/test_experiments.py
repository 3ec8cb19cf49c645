"""The studies: data sets, runner, statistics, tables and what docs/evidence.md says of them."""

import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import evaluate_loss
import train
from experiments import comparisons, figures, position_encodings, reference_curves, runs, study
from experiments.runs import REPOSITORY, Results
from models import DiT
from rope import RopeConfig
from runtime.config import RunConfig
from runtime.options import UserError, rope_from_args

FAKE_TRAIN = """
import json, pathlib, sys, time
given = json.loads(sys.argv[1])
time.sleep(given.get("seconds", 0))
print("last line")
if "seconds" not in given:
    folder = pathlib.Path(given["results_dir"])
    losses = {"val_loss": 0.5, "val_loss_ema": 0.75, "val_loss_tenths": [0.5] * 10, "val_loss_ema_tenths": [0.75] * 10}
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0} | losses]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\\n" for record in records))
    (folder / "finished.json").write_text("{}")
"""
GRIDS = {"as trained": 0.5, "canvas 192, extrapolate": 0.25}


@pytest.fixture
def fake_train(monkeypatch):
    """In place of train.py a process that finishes at once, or after some "seconds" ends without having finished."""
    words = [sys.executable, "-c", FAKE_TRAIN]
    monkeypatch.setattr(runs, "command", lambda *_, **given: [*words, json.dumps(given, default=str)])


# Runs and results


@pytest.mark.usefixtures("fake_train")
def test_a_failed_run_stops_the_others_and_names_its_output(tmp_path):
    slow, failing, start = tmp_path / "slow", tmp_path / "failing", time.monotonic()
    with pytest.raises(UserError) as error:
        runs.run_all({slow: {"seconds": 600}, failing: {"seconds": 0}}, 2, pytest.fail)
    assert str(error.value) == (
        f"run {str(failing)!r} ended with status 0: last line; its output is in {str(failing / 'output.txt')!r}, "
        "repeat the command to go on"
    )
    assert time.monotonic() < start + 300


@pytest.mark.usefixtures("fake_train")
def test_a_signal_stops_the_runs_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    start, slow, waiting = runs.start, tmp_path / "slow", tmp_path / "waiting"
    monkeypatch.setattr(runs, "start", lambda *run: (start(*run), os.kill(os.getpid(), signal.SIGINT))[0])
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
    results = Results(tmp_path / "results.json", {})
    for cores, number in ((1, "1"), (2, "2"), (1, "1")):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert results.origin()["environment"] == number
    assert [entry["cores"] for entry in results.sections["environment"].values()] == [1, 2]


@pytest.mark.parametrize(
    "program, total, more",
    [(position_encodings, 71, []), (position_encodings, 8, ["--quick"]), (reference_curves, 5, [])],
)
def test_places_are_checked_and_a_dry_run_writes_nothing(program, total, more, tmp_path, refused, capsys):
    (tmp_path / "file").touch()
    for option, value in (("--out", tmp_path), ("--work-dir", tmp_path / "file" / "below")):
        assert refused(program.main, [option, value]).startswith(f"{option} {str(value)!r} cannot be written (")
    arguments = ["--work-dir", str(tmp_path / "work"), "--out", str(tmp_path / "again.json"), "--dry-run", *more]
    program.main(arguments)
    assert f"{total} of {total} runs to train" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert program.parse_args(arguments).figures == tmp_path  # the published figures are left alone


# Data sets


@pytest.mark.parametrize("shape", [(512, 512), (300, 451)])
def test_trained_and_held_out_parts_of_a_photograph_share_no_pixel(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before, cut = study.split_photograph(pixels, study.FULL), shape[1] - round(256 * shape[0] / 512)
    assert before[1].size == (256, 512) and before[0].height == 512
    for column in (0, *range(cut - 5, cut + 5), shape[1] - 1):
        changed = pixels.copy()
        changed[:, column] = 255 - changed[:, column]
        parts = study.split_photograph(changed, study.FULL)
        assert [part != old for part, old in zip(parts, before, strict=True)] == [column < cut, column >= cut]


def test_tiles_and_crops_come_from_their_own_parts(monkeypatch):
    pixels = np.zeros((512, 700), dtype=np.uint8)
    pixels[:, -256:] = 200
    monkeypatch.setattr(study, "load_photographs", lambda: {"wall": pixels})
    items = list(study.photographs(study.FULL))
    assert all((np.asarray(image) == (0 if part == "train" else 200)).all() for part, _, _, image in items)
    tiles = ((512 - 128) // 24 + 1) * ((444 - 128) // 24 + 1)
    held_out = {("val", "wall", 128, 128): 5, ("canvas192", "wall", 192, 192): 5, ("canvas256", "wall", 256, 256): 5}
    counted = Counter((part, label, *image.size) for part, label, _, image in items)
    assert counted == {("train", "wall", 128, 128): tiles, **held_out}


def test_photographs_need_scikit_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match="need scikit-image, which is not installed; pip install -r requirements-dev"):
        study.load_photographs()


def test_as_many_of_each_digit_are_held_out_and_lie_whole_on_their_canvases():
    found = {}
    for part, label, file, image in study.digits(study.FULL):
        found.setdefault(part, {})[label, file] = np.asarray(image, dtype=int)
    assert found["train"].keys().isdisjoint(found["val"]) and len(found["train"]) + len(found["val"]) == 1797
    assert [sum(label == str(digit) for label, _ in found["val"]) for digit in range(10)] == [6] * 10
    for key, image in found["val"].items():
        canvas = found["canvas192"][key]
        assert canvas.shape == (192, 192, 3) and canvas.sum() == image.sum()


def test_a_data_set_is_written_once_for_its_settings(tmp_path, monkeypatch):
    items = iter([("train", "a", "0.png", Image.new("RGB", (8, 8)))])  # a second time there would be none
    monkeypatch.setitem(study.DATA_SETS, "digits", lambda study: items)
    for _ in range(2):
        assert study.write_data_set("digits", tmp_path / "set", study.FULL) == {"train": 1}
    with pytest.raises(UserError, match="was made with other settings than those of experiments/study.py; remove it"):
        study.write_data_set("digits", tmp_path / "set", dataclasses.replace(study.FULL, stride=32))


# The study


def parsed(options: dict, folder) -> object:
    """What train.py makes of the options of a run."""
    return train.parse_args(runs.command("train.py", "train.args", results_dir=folder, **options)[2:])


@pytest.mark.parametrize("variant", study.VARIANTS)
def test_a_run_of_the_study_is_the_command_that_its_variant_and_settings_say(variant, tmp_path):
    run, root = study.Run("digits", variant, 0.03, 4), tmp_path / "digits"
    args = parsed(position_encodings.training_options(run, study.FULL, root), tmp_path / run.key)
    assert args.results_dir == tmp_path / "digits" / variant / "lr0.03" / "seed4"
    assert (args.lr, args.global_seed, args.max_steps, args.global_batch_size) == (0.03, 4, 400, 16)
    assert (args.lr_schedule, args.grad_clip, args.ema_decay, args.flip) == ("linear", 1, 0.98, False)
    assert (args.val_data_path, args.val_every, args.warmup_steps) == (root / "val", study.FULL.val_every, 40)
    assert (args.latents_dir, args.image_size) == (tmp_path / "digits_latents", (128, 128))
    rotate = {"axial": 0, "spiral4": 4}.get(variant.split("_")[0], 2)
    border = "exact" if variant.endswith("exact") else "clamp"
    expected = RopeConfig(rotate=rotate, border=border, same_theta=variant == "same_theta2")
    assert rope_from_args(args) == (None if variant == "sincos" else expected)


def test_seeds_pair_the_variants(tmp_path, train_arguments, tiny_commands):
    """At one seed all variants have the same weights, noisy latents, timesteps, and labels after dropout."""
    seen = defaultdict(list)

    def record(module, arguments):
        if isinstance(module, DiT | torch.nn.Embedding):
            tensors = module.state_dict() | dict(enumerate(arguments))
            seen[variant].append({name: value.clone() for name, value in tensors.items()})

    with torch.nn.modules.module.register_module_forward_pre_hook(record):
        for variant in ("sincos", "axial", "spiral4_exact", "same_theta2"):
            changes = study.VARIANTS[variant].options | {"lr": 1e-60}  # 0 in float32: the weights stay
            train.main(train_arguments(tmp_path / variant, max_steps=2, **changes))
    for calls in seen.values():
        assert len(calls) == 2 * 2  # of the model and its table of labels, in two steps
        for found, expected in zip(calls, seen["sincos"], strict=True):
            assert expected.keys() - found.keys() <= {"pos_embed"}
            assert all(torch.equal(found[name], expected[name]) for name in expected.keys() & found.keys())


def test_a_study_goes_on_with_the_runs_that_are_missing(tmp_path, monkeypatch, fake_train, capsys):
    small = dataclasses.replace(study.QUICK, lr=0.001, variants={"digits": ("sincos", "axial")}, seeds=2)
    started, start = [], runs.start
    monkeypatch.setattr(runs, "start", lambda folder, given: started.append(folder) or start(folder, given))
    monkeypatch.setattr(runs, "make_latents", lambda *_: None)
    monkeypatch.setattr(figures, "draw_all", lambda *_: None)
    monkeypatch.setattr(comparisons, "all_tables", lambda *_: "tables")
    for name, found in (("QUICK", small), ("reconstruction_psnr", lambda *_: 20.0), ("beyond_grid", lambda *_: GRIDS)):
        monkeypatch.setattr(position_encodings, name, found)
    monkeypatch.setattr(position_encodings, "write_data_set", lambda *_: {"train": 1})
    keys = [f"digits/{variant}/lr0.001/seed{seed}" for seed in (0, 1) for variant in ("sincos", "axial")]
    path, arguments = tmp_path / "quick" / "position_encodings.json", ["--quick", "--work-dir", str(tmp_path)]
    position_encodings.main([*arguments, "--jobs", "2"])
    assert started == [tmp_path / "quick" / "runs" / key for key in keys]
    results = json.loads(path.read_text())
    assert results["runs"].keys() == set(keys) and results["reconstruction"] == {"digits": {"psnr": 20.0}}
    assert [GRIDS.items() < results["runs"][key].items() for key in keys] == [False, True, False, True]
    entry = results["runs"].pop(keys[-1])
    assert {"git_commit", "environment"} < entry.keys()
    assert entry["step"] == [2] and entry["val_loss"] == [0.5] and entry["val_loss_ema_tenths"] == [0.75] * 10
    assert not (tmp_path / "quick" / "runs" / keys[-1]).exists()
    path.write_text(json.dumps(results))
    for expected in (started[-1:], []):
        started.clear()
        position_encodings.main(arguments)
        assert started == expected and capsys.readouterr().out.endswith("tables\n")


# Statistics


def test_a_comparison_is_the_paired_t_test_with_its_interval():
    losses = np.array([[1.0, 2.1, 3.2, 3.9, 5.3], [1.2, 2.0, 3.6, 4.4, 5.3]])[..., None]
    averaged = {("digits", "axial"): losses[0], ("digits", "sincos"): losses[1]}
    (found,), differences = comparisons.compare(averaged, by_baseline=False), (losses[0] - losses[1])[:, 0]
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(5))
    assert found.differences[:, 0] == pytest.approx(differences) and found.relative[0] == pytest.approx(-0.2 / 3.3)
    assert found.p[0] == pytest.approx(2 * stats.t.cdf(-abs(t), 4)) and found.p_holm[0] == found.p[0]
    low, high = stats.t.interval(0.95, 4, differences.mean(), stats.sem(differences))
    (row,) = comparisons.final_differences(averaged)
    mean, half = comparisons.band(differences, 0.95)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert comparisons.band(differences, 0.95, one_more=True)[1] == pytest.approx(half * np.sqrt(6))
    assert row["95 % interval"] == f"[{low:+.5f}, {high:+.5f}]" and low < 0 < high and found.p[0] > 0.05


def test_holm_multiplies_the_smallest_p_by_the_number_of_comparisons_and_keeps_the_order():
    found = comparisons.holm(np.array([[0.04, 0.01], [0.03, 0.5]]))
    assert found == pytest.approx(np.array([[0.09, 0.04], [0.09, 0.5]]))
    assert comparisons.holm(np.array([0.9, 0.8])) == pytest.approx([1, 1])


@pytest.mark.parametrize("by_baseline, family_size", [(False, 2 * 6 * 3), (True, 2 * 2 * 3)])
def test_every_pair_is_compared_and_corrected_within_its_family(by_baseline, family_size):
    random = np.random.default_rng(0)
    losses = {(name, variant): random.random((5, 3)) for name in ("a", "b") for variant in study.MAIN_VARIANTS}
    compared = comparisons.compare(losses, by_baseline)
    pairs = [f"{item.variant} {item.other}" for item in compared if item.data_set == "b"]
    assert pairs[:3] == ["spiral4_clamp axial", "spiral4_exact axial", "axial sincos"]
    assert pairs[3:] == ["spiral4_clamp sincos", "spiral4_exact sincos", "spiral4_clamp spiral4_exact"]
    family = [item for item in compared if item.baseline == "axial" or not by_baseline]
    p_values, p_holm = (np.concatenate(values) for values in zip(*((x.p, x.p_holm) for x in family), strict=True))
    assert len(p_values) == family_size and list(p_holm) == list(comparisons.holm(p_values))
    everything = comparisons.compare({("a", variant): random.random((5, 3)) for variant in study.VARIANTS}, True)
    assert [item.variant for item in everything if item.baseline == "exact"] == ["spiral2_clamp", "spiral4_clamp"]


@pytest.mark.parametrize("n, level", [(5, 0.05), (5, 0.005), (3, 0.05), (2, 0.006)])
def test_the_difference_that_would_be_found_is_found_in_four_of_five_simulated_studies(n, level):
    samples = np.random.default_rng(0).normal(0, 2, (20000, n))
    differences = stats.zscore(samples[0], ddof=1) * 2  # with the deviation of the simulated ones
    samples += comparisons.detectable(differences, level)
    assert (stats.ttest_1samp(samples, 0, axis=1).pvalue < level).mean() == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("target, step", [(0.75, 150), (0.5, 200), (1.5, 100), (0.4, float("inf"))])
def test_steps_to_a_loss_are_interpolated(target, step):
    assert comparisons.steps_to_reach(np.array([100, 200, 300]), np.array([1.0, 0.5, 0.6]), target) == step


# Tables and figures


@pytest.fixture(scope="module")
def recorded():
    """The published runs, which are of these settings, and the bands of the reference."""
    of_study = Results(position_encodings.PUBLISHED, study.FULL.settings()).sections["runs"]
    of_demo = Results(reference_curves.PUBLISHED, reference_curves.settings()).sections["runs"]
    return of_study, reference_curves.bands(of_demo)


def studies_page() -> str:
    """docs/evidence.md without the section that tests/test_kernels.py compares."""
    page = (REPOSITORY / "docs" / "evidence.md").read_text(encoding="utf-8")
    return re.sub(r"^## What one head can express\n.*?(?=^## )", "", page, flags=re.MULTILINE | re.DOTALL)


def test_the_published_tables_are_those_of_the_recorded_results(recorded):
    page = studies_page()
    tables = comparisons.all_tables(study.FULL, recorded[0])
    printed = [line for line in tables.splitlines() if line and not line.startswith("#")]
    printed += reference_curves.bands_table(recorded[1]).splitlines()
    text = " ".join(page.split())  # sentences are broken at other places there
    assert len(printed) > 130 and [line for line in printed if line not in text] == []
    rows = [line for line in page.splitlines() if line.startswith("|") and "DiT-" not in line and "GFLOP" not in line]
    assert [line for line in rows if line not in printed] == []


def test_figures_are_drawn_from_the_recorded_results(recorded, tmp_path):
    figures.draw_all(study.FULL, recorded[0], tmp_path)
    reference_curves.draw_bands(recorded[1], tmp_path / "evidence_reference.png")
    page = studies_page()
    drawn = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
    assert drawn == {name: Image.open(REPOSITORY / "docs/images" / name).size for name in drawn} and len(drawn) == 3
    assert sorted(drawn) == sorted(re.findall(r"\(images/(.*?)\)", page))


# Measurements of trained runs


@pytest.mark.usefixtures("tiny_commands")
def test_losses_beyond_the_grid_are_those_of_evaluate_loss(run, image_folder, vae_folder, tmp_path, fill_weights):
    saved, path = torch.load(run / "checkpoints" / "0000007.pt", weights_only=True), tmp_path / "run.pt"
    model = RunConfig.from_dict(saved["config"]).model.build()
    saved["ema"] = fill_weights(model).state_dict()  # of seven steps positions would matter too little
    torch.save(saved, path)
    (tmp_path / "val").symlink_to(image_folder)
    for label in ("ant", "bee", "käfer"):
        (tmp_path / "canvas48" / label).mkdir(parents=True)
        Image.linear_gradient("L").convert("RGB").save(tmp_path / "canvas48" / label / "a.png")
    small = dataclasses.replace(study.FULL, image_size=32, canvases=(48,), beyond_grid_images=24)
    found = position_encodings.beyond_grid(path, tmp_path, small, vae_folder)
    values = np.sort(list(found.values()))
    assert len(values) == 1 + 2 * 2 and (np.diff(values) > 1e-5 * values[1:]).all()
    for name in found:
        command = ["--ckpt", path, "--data-path", tmp_path / ("canvas48" if name.startswith("canvas") else "val")]
        if name != "as trained":
            command += ["--image-size", 48, "--rope-extend", name.split()[-1]]
        command += ["--out", tmp_path / "loss.json", "--num-workers", 0, "--precision", "fp32"]
        evaluate_loss.main([str(argument) for argument in command])
        assert json.loads((tmp_path / "loss.json").read_text())["loss"] == pytest.approx(found[name], rel=1e-6)


def test_reconstruction_psnr_is_that_of_the_pixels(image_folder, vae_folder, monkeypatch):
    monkeypatch.setattr(position_encodings.VAE, "decode", lambda self, latents: torch.full((24, 32, 32, 3), 100))
    pixels = [np.asarray(Image.open(path), dtype=float) for path in image_folder.rglob("*.png")]
    expected = 20 * np.log10(255) - 10 * np.log10(np.square(np.stack(pixels) - 100).mean())
    assert position_encodings.reconstruction_psnr(image_folder, 32, vae_folder) == pytest.approx(expected)
    images = position_encodings.held_out(image_folder, 16, vae_folder, 4)  # of 24 in three classes
    assert images.labels.tolist() == [0, 1, 1, 2] and (list(images.indices), images.total) == ([0, 1, 2, 3], 4)


@pytest.mark.slow
def test_the_study_runs_from_nothing_to_its_tables(tmp_path, monkeypatch, capsys):
    """Real training processes, on a data set of forty images."""

    def few(settings):
        items = list(study.digits(settings))
        for part in ("train", "val", "canvas192", "canvas256"):
            yield from [item for item in items if item[0] == part and item[1] in "37"][:20]

    changes = dict(max_steps=2, global_batch_size=4, warmup_steps=1, val_every=1)
    variants = {"digits": ("sincos", "axial", "spiral4_exact")}
    monkeypatch.setitem(study.DATA_SETS, "digits", few)
    monkeypatch.setattr(position_encodings, "QUICK", dataclasses.replace(study.QUICK, variants=variants, **changes))
    position_encodings.main(["--quick", "--work-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("| digits | Spiral R = 4, exact") > 5 and "photograph" not in printed
    images = sorted(path.name for path in (tmp_path / "quick").glob("*.png"))
    assert images == ["evidence_curves.png", "evidence_tenths.png"]


# Reference curves


def test_the_demo_recipe_is_read_by_train(tmp_path):
    args = parsed(reference_curves.training_options(3, tmp_path), tmp_path / "run")
    assert (args.model, args.max_steps, args.global_seed, args.flip) == ("DiT-XS/2", 2000, 3, False)
    assert (args.grad_clip, args.use_rope, args.val_every, args.val_fraction) == (1, True, 300, 0.1)


@pytest.fixture
def checked(recorded, tmp_path, capsys):
    """Compares a run whose curves are the reference's means times factors, by step of the loss, with the reference."""

    def call(factors: dict[int, float] | None = None, steps: int = 20, shift: int = 0) -> str:
        lines = []
        for name, (at, means, _) in recorded[1].items():
            for step, mean in zip(at[:steps], means, strict=False):
                factor = (factors or {}).get(step, 1) if name == "loss" else 1
                lines.append(json.dumps({"step": step + shift, name: mean * factor if factor else None}))
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        try:
            reference_curves.main(["--check", str(tmp_path)])
        except SystemExit as stopped:
            assert stopped.code == 2
        return "".join(capsys.readouterr())

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
