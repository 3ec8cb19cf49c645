"""The studies: data, runner, statistics, tables and what docs/evidence.md says of them."""

import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import train
from experiments import comparisons, position_encodings, reference_curves, runs
from experiments.position_encodings import FULL, QUICK, VARIANTS
from experiments.runs import REPOSITORY, Results
from models import DiT
from rope import RopeConfig
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
    [(position_encodings, 43, []), (position_encodings, 8, ["--quick"]), (reference_curves, 5, [])],
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


# The study


def test_six_of_each_digit_are_held_out_always_the_same_and_written_once(tmp_path, monkeypatch):
    """These are the held-out images of the recorded runs, so that runs to come are compared with them."""
    root, small = tmp_path / "digits", dataclasses.replace(FULL, image_size=8)
    position_encodings.write_images(root, small)
    paths = {
        part: {path.relative_to(root / part) for path in root.glob(f"{part}/*/*.png")} for part in ("train", "val")
    }
    assert paths["train"].isdisjoint(paths["val"]) and len(paths["train"] | paths["val"]) == 1797
    held_out = [sorted(path.stem for path in paths["val"] if path.parent.name == str(digit)) for digit in range(10)]
    assert [len(indices) for indices in held_out] == [6] * 10
    assert held_out[0] == ["0055", "0458", "0536", "0877", "1105", "1470"]
    assert held_out[9] == ["0423", "0555", "0715", "1406", "1434", "1452"]
    monkeypatch.setattr(position_encodings, "enlarged_digits", pytest.fail)
    position_encodings.write_images(root, small)


def parsed(options: dict, folder) -> object:
    """What train.py makes of the options of a run."""
    return train.parse_args(runs.command("train.py", "train.args", results_dir=folder, **options)[2:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_the_study_is_the_command_that_its_variant_and_settings_say(variant, tmp_path):
    places = tmp_path / "digits", tmp_path / "latents"
    args = parsed(position_encodings.training_options((variant, 0.03, 4), FULL, *places), tmp_path)
    assert (args.lr, args.global_seed, args.max_steps, args.global_batch_size) == (0.03, 4, 400, 16)
    assert (args.lr_schedule, args.grad_clip, args.ema_decay, args.flip) == ("linear", 1, 0.98, False)
    assert (args.val_data_path, args.val_every, args.warmup_steps) == (tmp_path / "digits" / "val", 80, 40)
    assert (args.latents_dir, args.image_size) == (tmp_path / "latents", (128, 128))
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
            changes = VARIANTS[variant] | {"lr": 1e-60}  # 0 in float32: the weights stay
            train.main(train_arguments(tmp_path / variant, max_steps=2, **changes))
    for calls in seen.values():
        assert len(calls) == 2 * 2  # of the model and its table of labels, in two steps
        for found, expected in zip(calls, seen["sincos"], strict=True):
            assert expected.keys() - found.keys() <= {"pos_embed"}
            assert all(torch.equal(found[name], expected[name]) for name in expected.keys() & found.keys())


def test_a_study_goes_on_with_the_runs_that_are_missing(tmp_path, monkeypatch, fake_train, capsys):
    small = dataclasses.replace(QUICK, lr=0.001, variants=("sincos", "axial"), sweep_lrs=(0.003,), sweep_seeds=1)
    started, start = [], runs.start
    monkeypatch.setattr(runs, "start", lambda folder, given: started.append(folder) or start(folder, given))
    monkeypatch.setattr(runs, "make_latents", lambda *_: None)
    for name, found in (("draw_all", lambda *_: None), ("all_tables", lambda *_: "tables"), ("QUICK", small)):
        monkeypatch.setattr(position_encodings, name, found)
    monkeypatch.setattr(position_encodings, "write_images", lambda *_: None)
    rest = ("lr0.003/seed0", "lr0.001/seed0", "lr0.001/seed1")
    keys = [f"{variant}/{part}" for part in rest for variant in ("sincos", "axial")]
    path, arguments = tmp_path / "quick" / "position_encodings.json", ["--quick", "--work-dir", str(tmp_path)]
    position_encodings.main([*arguments, "--jobs", "2"])
    assert started == [tmp_path / "quick" / "runs" / key for key in keys]
    results = json.loads(path.read_text())
    assert results["runs"].keys() == set(keys)
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
    axial, sincos = np.array([[1.0, 2.1, 3.2, 3.9, 5.3], [1.2, 2.0, 3.6, 4.4, 5.3]])
    differences, (mean, half) = axial - sincos, comparisons.band(axial - sincos, 0.95)
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(5))
    low, high = stats.t.interval(0.95, 4, differences.mean(), stats.sem(differences))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert comparisons.band(differences, 0.95, one_more=True)[1] == pytest.approx(half * np.sqrt(6))
    losses = {"sincos": sincos, "axial": axial}
    found, relative, p = position_encodings.compare(losses, [("axial", "sincos")])
    assert found[:, 0] == pytest.approx(differences) and relative[0] == pytest.approx(-0.2 / 3.3)
    assert p[0] == pytest.approx(2 * stats.t.cdf(-abs(t), 4))
    (row,) = position_encodings.final_differences({name: values[:, None] for name, values in losses.items()})
    assert row["95 % interval"] == f"[{low:+.5f}, {high:+.5f}]" and low < 0 < high and float(row["p"]) > 0.05


def test_holm_multiplies_the_smallest_p_by_the_number_of_comparisons_and_keeps_the_order():
    found = comparisons.holm(np.array([[0.04, 0.01], [0.03, 0.5]]))
    assert found == pytest.approx(np.array([[0.09, 0.04], [0.09, 0.5]]))
    assert comparisons.holm(np.array([0.9, 0.8])) == pytest.approx([1, 1])


def test_every_pair_is_compared_and_corrected_within_its_family():
    random = np.random.default_rng(0)
    losses = {variant: random.normal(1, 0.1, (5, 3)) for variant in QUICK.variants}
    losses |= {"sincos": losses["sincos"] + 0.3}
    axial, sincos, exact = position_encodings.families(losses)
    assert axial == [("spiral4_clamp", "axial"), ("spiral4_exact", "axial")]
    assert sincos == [(name, "sincos") for name in ("axial", "spiral4_clamp", "spiral4_exact")]
    assert exact == [("spiral4_clamp", "spiral4_exact")]
    assert [pair[0] for pair in position_encodings.families(VARIANTS)[2]] == ["spiral2_clamp", "spiral4_clamp"]
    rows, expected = position_encodings.differences(losses, ["a", "b", "c"]), []
    for pairs in (axial, sincos, exact):
        p = np.array([stats.ttest_rel(losses[first], losses[second]).pvalue for first, second in pairs])
        marks = np.where(comparisons.holm(p) < 0.05, "‡", np.where(p < 0.05, "†", "%"))
        expected += marks.tolist()
    assert [[row[point][-1] for point in "abc"] for row in rows] == expected
    assert {mark for row in expected for mark in row} == {"‡", "†", "%"}
    averaged = {name: values[:, -1:] for name, values in losses.items()}
    p = [float(row["p"]) for row in position_encodings.final_differences(averaged)]
    corrected = [float(row["p, Holm over 6"]) for row in position_encodings.final_differences(averaged)]
    assert corrected == pytest.approx(list(comparisons.holm(np.array(p))), rel=0.1)


@pytest.mark.parametrize("target, step", [(0.75, 150), (0.5, 200), (1.5, 100), (0.4, float("inf"))])
def test_steps_to_a_loss_are_interpolated(target, step):
    assert comparisons.steps_to_reach(np.array([100, 200, 300]), np.array([1.0, 0.5, 0.6]), target) == step


def test_steps_to_sincos_are_a_bound_where_a_seed_begins_below_and_no_number_where_one_stays_above():
    curves = {"sincos": [[1.0, 0.5]] * 2, "axial": [[0.75, 0.25]] * 2}
    curves |= {"spiral2_exact": [[0.75, 0.25], [0.4, 0.2]], "spiral4_exact": [[0.75, 0.25], [0.9, 0.6]]}
    losses = {name: np.array(values) for name, values in curves.items()}
    rows = position_encodings.final_losses(np.array([100, 200]), losses, losses)
    found = [row["steps to sin-cos's final loss, EMA"] for row in rows]
    assert found == ["200 ± 0", "150 ± 0", "≤ 125 ± 35", "not by all seeds"]


# Tables and figures


@pytest.fixture(scope="module")
def recorded():
    """The published runs, which are of these settings, and the bands of the reference."""
    of_study = Results(position_encodings.PUBLISHED, FULL.settings()).sections["runs"]
    of_demo = Results(reference_curves.PUBLISHED, reference_curves.settings()).sections["runs"]
    return of_study, reference_curves.bands(of_demo)


def sections() -> str:
    """What docs/evidence.md says of the two studies."""
    page = (REPOSITORY / "docs" / "evidence.md").read_text(encoding="utf-8")
    titles = "Position encodings compared|Reference curves of the demo"
    return "\n".join(re.findall(rf"^## (?:{titles})\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL))


def test_the_published_tables_are_those_of_the_recorded_results(recorded):
    page = sections()
    tables = position_encodings.all_tables(FULL, recorded[0])
    printed = [line for line in tables.splitlines() if line and not line.startswith("#")]
    printed += reference_curves.bands_table(recorded[1]).splitlines()
    text = " ".join(page.split())  # sentences are broken at other places there
    assert len(printed) > 80 and [line for line in printed if line not in text] == []
    rows = [line for line in page.splitlines() if line.startswith("|") and "DiT-" not in line and "GFLOP" not in line]
    assert [line for line in rows if line not in printed] == []


def test_figures_are_drawn_from_the_recorded_results(recorded, tmp_path):
    position_encodings.draw_all(FULL, recorded[0], tmp_path)
    reference_curves.draw_bands(recorded[1], tmp_path / "evidence_reference.png")
    page = sections()
    drawn = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
    assert drawn == {name: Image.open(REPOSITORY / "docs/images" / name).size for name in drawn} and len(drawn) == 3
    assert sorted(drawn) == sorted(re.findall(r"\(images/(.*?)\)", page))


@pytest.mark.slow
def test_the_study_runs_from_nothing_to_its_tables(tmp_path, monkeypatch, capsys):
    """Real training processes, on some of the digits."""
    images, labels = position_encodings.enlarged_digits(128)
    monkeypatch.setattr(position_encodings, "enlarged_digits", lambda size: (images[:200], labels[:200]))
    changes = dict(max_steps=2, global_batch_size=4, warmup_steps=1, val_every=1, held_out_per_class=1)
    monkeypatch.setattr(position_encodings, "QUICK", dataclasses.replace(QUICK, **changes))
    position_encodings.main(["--quick", "--work-dir", str(tmp_path)])
    assert (
        capsys.readouterr().out.count("\n| Spiral R = 4, exact") == 2 + 3 * 2
    )  # two means, two pairs in each of three tables
    drawn = sorted(path.name for path in (tmp_path / "quick").glob("*.png"))
    assert drawn == ["evidence_curves.png", "evidence_tenths.png"]


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
