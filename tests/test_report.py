"""Samples during training, loss.png and report.html: what they show, that they change nothing, what they refuse."""

import dataclasses
import io
import json
import os
import re
import shutil
from base64 import b64decode
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import stops
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import train
from runtime import checkpoint, files, monitor, pictures, report
from runtime.config import RunConfig

TENTHS = [0.1 + 0.05 * k for k in range(10)]
VALIDATION = {
    "val_loss": 0.5, "val_loss_se": 0.03, "val_loss_tenths": TENTHS,
    "val_loss_ema": 0.4321, "val_loss_ema_se": 0.0625, "val_loss_ema_tenths": [x / 2 for x in TENTHS],
}  # fmt: skip


def pictures_of(results: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((results / "samples").glob("*"))}


# Samples during training


@pytest.mark.usefixtures("tiny_commands")
def test_samples_change_nothing_and_are_the_same_after_an_interruption(whole, train_arguments, signal_after, tmp_path):
    """whole is without samples."""
    train.main(train_arguments(tmp_path / "with", sample_every=2))
    assert not (whole / "samples").exists()
    stopped = train_arguments(tmp_path / "stopped", sample_every=2)
    signal_after(train.Trainer, "train_step", 5)
    stops(train.main, stopped)
    assert list(pictures_of(tmp_path / "stopped")) == ["0000002.png", "0000004.png", "contact_sheet.png"]
    train.main(stopped)
    names = ["0000002.png", "0000004.png", "0000006.png", "0000007.png", "contact_sheet.png"]
    assert list(pictures_of(tmp_path / "with")) == names
    assert pictures_of(tmp_path / "stopped") == pictures_of(tmp_path / "with")
    folders = [results / "checkpoints" for results in (whole, tmp_path / "with", tmp_path / "stopped")]
    expected, *others = (checkpoint.load(folder / "0000007.pt") for folder in folders)
    for found in others:
        for key in ("model", "ema"):
            assert all(torch.equal(found[key][part], expected[key][part]) for part in expected[key])
        assert found["log"] == expected["log"]


@pytest.mark.usefixtures("tiny_commands")
def test_samples_come_with_checkpoints_and_a_lost_grid_is_made_again(train_arguments, tmp_path):
    results = tmp_path / "run"
    train.main(train_arguments(results, max_steps=5, sample_every=None))
    made = pictures_of(results)
    assert list(made) == ["0000004.png", "0000005.png", "contact_sheet.png"]
    (results / "samples" / "0000005.png").unlink()  # as if killed after the checkpoint and before its samples
    train.main(train_arguments(results, sample_every=None, ckpt_every=5))
    assert list(pictures_of(results)) == ["0000004.png", "0000005.png", "0000007.png", "contact_sheet.png"]
    assert pictures_of(results)["0000005.png"] == made["0000005.png"]


@pytest.mark.usefixtures("tiny_commands")
def test_a_full_disk_for_samples_and_report_is_survived(train_arguments, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "save_png", full)
    monkeypatch.setattr(report, "write", full)
    train.main(train_arguments(tmp_path / "run", sample_every=None))
    output, reason = capsys.readouterr().out, "[Errno 28] No space left on device"
    for step in (4, 7):
        assert f"warning: no samples of step {step}: {reason}; training goes on (--sample-every 0: none)" in output
    assert f"warning: {tmp_path / 'run' / 'report.html'} is left as it was: {reason}" in output
    assert "finished at step 7" in output


@pytest.mark.usefixtures("tiny_commands")
def test_samples_of_cached_latents_need_the_vae(cache, vae_folder, make_vae, train_arguments, refused, tmp_path):
    other, moved, results = make_vae(seed=1), shutil.copytree(vae_folder, tmp_path / "moved"), tmp_path / "run"
    gone = shutil.copytree(cache, tmp_path / "latents of a VAE that is gone")
    change_json(gone / "meta.json", lambda meta: meta["vae"].update(source="/no/where"))
    change_json(gone / "meta.json", lambda meta: meta.update(files.sealed(meta)))

    def arguments(latents_dir: Path, **changes) -> list[str]:
        return train_arguments(results, **{"data_path": None, "vae": None, "latents_dir": latents_dir} | changes)

    message = refused(train.main, arguments(gone, sample_every=4))
    assert message.startswith("--vae '/no/where' is not a folder; ") and "--sample-every 0" in message
    message = refused(train.main, arguments(cache, vae=other, sample_every=4))
    assert message.startswith(f"--vae {str(other)!r} has other weights") and repr(str(cache)) in message
    assert "leave --vae out" in message
    train.main(arguments(gone, max_steps=1))  # of no samples
    train.main(arguments(gone, vae=moved, max_steps=2, sample_every=2))
    assert (results / "samples" / "0000002.png").exists()


def test_the_contact_sheet_holds_the_first_row_of_every_grid(run, tmp_path):
    columns, random = pictures.COLUMNS, np.random.default_rng(0)
    config = RunConfig.from_dict(json.loads((run / "config.json").read_text()))
    config, paths, rows = dataclasses.replace(config, image_size=(32, 48)), [], []
    for step in range(40):
        images = list(random.integers(0, 256, (pictures.COUNT, 32, 48, 3), dtype=np.uint8))
        paths.append(tmp_path / f"{step:07d}.png")
        pictures.save_png(pictures.draw_grid(images, ["a class"] * len(images), columns, "title"), paths[-1])
        rows.append(images[:columns])
    sheet = np.asarray(pictures.draw_contact_sheet(paths, config))
    pitch, pitch_x = 2 * 32 + 4, 2 * 48 + 4  # images, enlarged twice, and the gap
    assert (sheet.shape[0] - 16 * pitch) in range(10, 40)  # 16 of the 40 rows, and a line of captions
    for up, row in ((16, 0), (1, 39)):
        for column in range(columns):
            y, x = sheet.shape[0] - up * pitch, sheet.shape[1] - (columns - column) * pitch_x
            assert np.array_equal(sheet[y : y + 64 : 2, x : x + 96 : 2], rows[row][column])


# The curves


def record(step: int, **values) -> dict:
    return {"step": step, "loss": 2 / step, "grad_norm": 1 / step, "lr": 1e-4, "images_per_second": 100.0} | values


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws loss.png of some records and returns its panels by title: drawn(records)."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **named: (figures.append(self), save(self, *a, **named)))

    def draw(records: list[dict]) -> dict:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        monitor.plot_loss(tmp_path)
        return {panel.get_title(): panel for panel in figures[-1].axes}

    return draw


def curves_of(panel) -> dict:
    return {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in panel.lines}


def test_loss_png_has_every_curve_once_and_one_colour_for_each(drawn, tmp_path):
    records = [record(1), {"step": 2, **VALIDATION}, record(3), record(4, **VALIDATION | {"val_loss": 0.25})]
    panels = drawn(records)
    names = ["Loss", "Gradient norm", "Validation loss by tenth of the schedule, step 4", "Learning rate", "Speed"]
    assert list(panels) == names
    validation = "validation: noise MSE ± standard error, {} weights"
    assert curves_of(panels["Loss"]) == {
        "training: noise MSE + variational term": ([1, 3, 4], [2, 2 / 3, 0.5]),
        validation.format("raw"): ([2, 4], [0.5, 0.25]),
        validation.format("EMA"): ([2, 4], [0.4321, 0.4321]),
    }
    for band, error in zip(panels["Loss"].collections, (0.03, 0.0625), strict=True):
        at_four = band.get_paths()[0].vertices
        at_four = at_four[at_four[:, 0] == 4, 1]
        assert np.ptp(at_four) == pytest.approx(2 * error)
    middles = [100 * k + 50 for k in range(10)]
    tenths = {"raw weights": (middles, TENTHS), "EMA weights": (middles, VALIDATION["val_loss_ema_tenths"])}
    assert curves_of(panels[names[2]]) == tenths
    for key, title in (("grad_norm", "Gradient norm"), ("lr", "Learning rate"), ("images_per_second", "Speed")):
        (line,) = panels[title].lines
        assert line.get_ydata().tolist() == [record[key] for record in records if key in record]
    assert [panels[name].get_yscale() for name in names] == ["log", "log", "log", "linear", "linear"]
    colours = {name: [to_hex(line.get_color()) for line in panel.lines] for name, panel in panels.items()}
    assert colours["Loss"][1:] == colours[names[2]]  # raw, EMA
    others = [colours[name] for name in ("Loss", "Gradient norm", "Learning rate", "Speed")]
    assert len({colour for found in others for colour in found}) == 6
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.getpixel((2, 2))[3] == 0  # no ground of its own


def test_loss_png_without_validation_or_with_numbers_that_are_not_finite(drawn, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1, loss=None)))
    monitor.plot_loss(tmp_path)
    assert not (tmp_path / "loss.png").exists()
    assert list(drawn([record(1), record(2)])) == ["Loss", "Gradient norm", "Learning rate", "Speed"]
    null = dict.fromkeys(("val_loss_ema", "val_loss_ema_se"))
    broken = record(4, **VALIDATION | null | {"val_loss_tenths": [None, *TENTHS[1:]], "grad_norm": None})
    panels = drawn([record(2, **VALIDATION), broken])
    assert [line.get_xdata().tolist() for line in panels["Loss"].lines] == [[2, 4], [2, 4], [2]]
    tenths = panels["Validation loss by tenth of the schedule, step 4"]
    assert [np.isnan(line.get_ydata()).sum() for line in tenths.lines] == [1, 0]
    assert drawn([record(4, grad_norm=None)])["Gradient norm"].lines[0].get_ydata().tolist() == []


@pytest.mark.parametrize("low, high", [(0.0041, 0.62), (0.031, 0.19), (0.0421, 0.0433)])
def test_logarithmic_ticks_are_written_out(low, high):
    axes = Figure().add_subplot()
    axes.plot([0, 1], [low, high])
    monitor.use_log_scale(axes)
    (bottom, top), labels = axes.get_ylim(), axes.yaxis.get_ticklabels()
    visible = [text for at, text in zip(axes.get_yticks(), labels, strict=True) if bottom <= at <= top]
    numbers = [float(text.get_text()) for text in visible]
    assert 3 <= len(numbers) <= 10 and numbers == sorted(set(numbers))
    assert not any(text.get_text() for text in axes.yaxis.get_ticklabels(minor=True))


# The report


class Page:
    """What a page says and loads; its tags have to be closed in turn."""

    def __init__(self, path: Path):
        self.source = path.read_text()
        elements = list(ElementTree.fromstring(self.source).iter())
        self.text = " ".join(" ".join(elements[0].itertext()).split())
        self.tags = {element.tag for element in elements}
        loading = ("src", "href", "srcset", "data", "action")
        self.resources = [element.get(name) for element in elements for name in loading if name in element.keys()]


@pytest.fixture
def finished(run, tmp_path):
    """A copy of a finished run, as if its page was written a minute ago."""
    folder = shutil.copytree(run, tmp_path / "run")
    pictures.samples_folder(folder).mkdir()
    for path in [*folder.glob("*"), *folder.glob("*/*")]:
        os.utime(path, (1e9, 1e9))
    return folder


def change_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def changed_page(folder: Path, change) -> Page:
    """The page of a run after a change of its config.json."""
    change_json(folder / "config.json", change)
    return Page(report.write(folder))


def draw_grid(path: Path, grey: int) -> None:
    images = [np.full((32, 32, 3), grey, np.uint8)] * pictures.COUNT
    pictures.save_png(pictures.draw_grid(images, ["a"] * pictures.COUNT, pictures.COLUMNS, "title"), path)


def test_a_run_leaves_a_report_that_needs_nothing_else(run):
    seen = Page(run / "report.html")
    for part in (
        "DiT-XS/2 spiral-R2-clamp seed 0", "Spiral RoPE, K = 4 directions, border clamp, 32 pixels, batch 8",
        "step, finished", "images/s, mean", "data.classes ant, bee, käfer", "versions.diffusers", "rope.rotate 2",
    ):  # fmt: skip
        assert part in seen.text
    (curves,) = seen.resources
    assert b64decode(curves.removeprefix("data:image/png;base64,")) == (run / "loss.png").read_bytes()
    assert not re.search(r"https?:|url\(|@import|<script|<link", seen.source)
    assert len(seen.source) < 3e6


def test_a_report_shows_what_lies_beside_it(finished, capsys):
    """The newest of the measured samples and their metrics first, then curves, then the samples of training."""
    (finished / "finished.json").unlink()
    with open(finished / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 7, "epoch": 2, **VALIDATION, "val_loss": None, "val_loss_se": None}) + "\n")
    folder = pictures.samples_folder(finished)
    grids = ["0000004.png", "0000007.png", "contact_sheet.png", "a-1.5.png", "b.png", "c.png"]
    for age, name in enumerate(grids):
        draw_grid(folder / name, grey=10 * age)
        os.utime(folder / name, (1e9 + age, 1e9 + age))
    for name in "bc":
        (folder / f"{name}.npz").touch()
    (folder / "a-1.5.metrics.json").write_text('{"fid": 1234.5, "kid": 0.25, "kid_std": 0.125, "device": "cpu"}')
    (folder / "b.metrics.json").write_text('{"samples": 200, "inception_score": 1.5}')
    (folder / "b.digits.metrics.json").write_text('{"label_accuracy": 0.97, "sampling": {"seed": 101}}')
    os.utime(folder / "a-1.5.metrics.json", (1e9, 1e9))
    report.main([str(finished)])
    assert capsys.readouterr().out == f"report: {finished / 'report.html'}\n"
    seen = Page(finished / "report.html")
    for part in (
        "step, not finished", "0.4321 ± 0.0625 validation loss, EMA", "not finite validation loss, raw",
        "Samples b 0.97 label accuracy 200 samples 1.5 inception score", "sampling.seed 101",
        "a-1.5 1,234 FID 0.25 ± 0.125 KID",
        "newest samples, from EMA weights: step 7", "the same noise and classes over the run",
    ):  # fmt: skip
        assert part in seen.text, part
    order = [seen.text.index(title) for title in ("Samples b ", "a-1.5", "Curves", "Samples during", "Settings")]
    assert order == sorted(order)
    pixels = []
    for link in seen.resources:
        kind, content = link.removeprefix("data:image/").split(";base64,")
        with Image.open(io.BytesIO(b64decode(content))) as image:
            pixels.append(image.getpixel((40, 60))[0] if kind == "jpeg" else kind)
    assert [round(value, -1) if value != "png" else value for value in pixels] == [40, "png", 10, 20]


def test_what_is_newer_than_all_that_it_shows_is_left_alone(finished, tmp_path, capsys):
    def made(*arguments) -> bool:
        page, before = finished / "report.html", (finished / "report.html").stat().st_mtime_ns
        report.main([str(argument) for argument in (finished, *arguments)])
        output, changed = capsys.readouterr().out, page.stat().st_mtime_ns != before
        assert output == (
            f"report: {page}\n" if changed else f"nothing to do: {page} is newer than all that it shows\n"
        )
        return changed

    assert made() and not made()
    samples = pictures.samples_folder(finished)
    for name in ("loss.png", "metrics.jsonl", "config.json"):
        os.utime(finished / name)
        assert made() and not made()
    metrics = tmp_path / "x.metrics.json"
    metrics.write_text('{"fid": 3}')
    os.utime(metrics, (1e9, 1e9))
    assert made("--metrics", metrics) and "3 FID" in Page(finished / "report.html").text
    shutil.move(metrics, samples)
    assert made() and not made()
    (samples / "x.metrics.json").unlink()
    assert made() and "FID" not in Page(finished / "report.html").text


def test_a_run_of_a_version_with_fewer_settings_has_a_report(finished):
    def forget(config):
        del config["model"]["rope"]["min_freq_lang"], config["model"]["class_dropout_prob"]

    text = changed_page(finished, forget).text
    assert "DiT-XS/2 spiral-R2-clamp seed 0" in text and "rope.min_freq_lang 0 " in text


def test_hostile_names_stay_text(run, finished):
    def change(config):
        config["data"]["classes"][1] = "<script>alert(1)</script>"
        config["args"]["data_path"] = '"><img src=http://x onerror=alert(1)>'
        config["versions"]["</table>"] = "<b>"

    seen = changed_page(finished, change)
    assert seen.tags == Page(run / "report.html").tags
    assert all(link.startswith("data:image/") for link in seen.resources)
    assert "<script>alert(1)</script>" in seen.text


def test_many_classes_and_many_records_stay_small(finished):
    lines = [json.dumps(record(100 * k)) + "\n" for k in range(1, 20_001)]
    (finished / "metrics.jsonl").write_text("".join(lines))
    monitor.plot_loss(finished)

    def rename(config: dict) -> None:
        config["data"]["classes"] = [f"n{k:08d}" for k in range(1000)]
        config["model"]["num_classes"] = 1000

    seen = changed_page(finished, rename)
    assert "n00000019 and 980 more" in seen.text and "n00000020" not in seen.text
    assert "2,000,000" in seen.text and len(seen.source) < 1e6


def test_what_is_no_run_is_refused(finished, refused, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    none, array, nowhere = (str(tmp_path / name) for name in ("none", "list.json", "no/where"))
    (finished / "report.html").unlink()
    (finished / "report.html").mkdir()
    (finished / "loss.png").touch()
    for arguments, message in {
        (none,): f"{none!r} holds no run (config.json is missing); expected a --results-dir of train.py",
        (finished, "--metrics", array): f"{array!r} holds a JSON list; expected an object",
        (finished, "--metrics", nowhere): f"{nowhere!r} cannot be read (",
        (finished,): f"report.html in {str(finished)!r} cannot be written (Is a directory); free space, or ",
    }.items():
        assert refused(report.main, arguments).startswith(message)
    (finished / "config.json").write_text("{}")
    assert refused(report.main, [finished]).startswith(f"config.json in {str(finished)!r} cannot be read (")
