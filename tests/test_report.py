"""Samples during training and report.html: what they show, that they change nothing, and what they refuse."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, command_line
from PIL import Image

import train
from runtime import checkpoint, files, monitor, pictures, previews, report

WRITE = report.write  # tiny_commands makes runs without plots
VOID = {"meta", "img"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory, image_folder, vae_folder):
    import cache_latents

    folder = tmp_path_factory.mktemp("cache") / "latents"
    options = {"data_path": image_folder, "latents_dir": folder, "vae": vae_folder, "image_size": 32, "num_workers": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.distributed._device", lambda *_: torch.device("cpu"))
        cache_latents.main(command_line(options | {"flip": True}))
    return folder


@pytest.fixture
def cached_arguments(cache, train_arguments):
    return lambda results, **changes: train_arguments(
        results, **{"data_path": None, "vae": None, "latents_dir": cache} | changes
    )


def pictures_of(results: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((results / "samples").glob("*"))}


def weights(results: Path) -> dict:
    return checkpoint.load(results / "checkpoints" / "0000007.pt")


# Samples during training


@pytest.mark.usefixtures("tiny_commands")
def test_samples_change_nothing_and_are_the_same_after_an_interruption(train_arguments, signal_after, tmp_path):
    train.main(train_arguments(tmp_path / "without"))
    train.main(train_arguments(tmp_path / "whole", sample_every=2))
    assert not (tmp_path / "without" / "samples").exists()
    stopped = train_arguments(tmp_path / "stopped", sample_every=2)
    signal_after(train.Trainer, "train_step", 5)
    train.main(stopped)
    assert list(pictures_of(tmp_path / "stopped")) == ["0000002.png", "0000004.png", "contact_sheet.png"]
    train.main(stopped)
    names = ["0000002.png", "0000004.png", "0000006.png", "0000007.png", "contact_sheet.png"]
    assert list(pictures_of(tmp_path / "whole")) == names
    assert pictures_of(tmp_path / "stopped") == pictures_of(tmp_path / "whole")
    expected = weights(tmp_path / "without")
    for name in ("whole", "stopped"):
        found = weights(tmp_path / name)
        for key in ("model", "ema"):
            assert all(torch.equal(found[key][part], expected[key][part]) for part in expected[key])
        assert found["log"] == expected["log"]


@pytest.mark.usefixtures("tiny_commands")
def test_samples_come_with_checkpoints_and_a_lost_grid_is_made_again(cached_arguments, tmp_path):
    results = tmp_path / "run"
    train.main(cached_arguments(results, max_steps=5, sample_every=None))
    made = pictures_of(results)
    assert list(made) == ["0000004.png", "0000005.png", "contact_sheet.png"]
    (results / "samples" / "0000005.png").unlink()  # as if killed after the checkpoint and before its samples
    train.main(cached_arguments(results, sample_every=None, ckpt_every=5))
    assert list(pictures_of(results)) == ["0000004.png", "0000005.png", "0000007.png", "contact_sheet.png"]
    assert pictures_of(results)["0000005.png"] == made["0000005.png"]


@pytest.mark.usefixtures("tiny_commands")
def test_a_full_disk_for_samples_and_report_is_survived(train_arguments, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "save_png", full)
    monkeypatch.setattr(report, "write", full)
    train.main(train_arguments(tmp_path / "run", sample_every=None))
    output = capsys.readouterr().out
    for step in (4, 7):
        assert (
            f"warning: no samples of step {step}: [Errno 28] No space left on device; training goes on "
            "(--sample-every 0: none)" in output
        )
    path = tmp_path / "run" / "report.html"
    assert f"warning: {path} is left as it was: [Errno 28] No space left on device" in output
    assert "finished at step 7" in output


@pytest.mark.usefixtures("tiny_commands")
def test_samples_of_cached_latents_need_the_vae(cache, vae_folder, make_vae, cached_arguments, refused, tmp_path):
    other, gone = make_vae(seed=1), shutil.copytree(cache, tmp_path / "cache")
    meta = json.loads((gone / "meta.json").read_text())
    (gone / "meta.json").write_text(json.dumps(meta | {"vae": meta["vae"] | {"source": "/no/where"}}))
    results = tmp_path / "run"
    assert refused(train.main, cached_arguments(results, latents_dir=gone, sample_every=4)) == (
        "--vae '/no/where' is not a folder; expected ema, mse, a hub id, or a folder with config.json and "
        "diffusion_pytorch_model.safetensors; samples during training need the VAE of the latent cache: pass --vae "
        "FOLDER where it lies elsewhere, or --sample-every 0"
    )
    assert refused(train.main, cached_arguments(results, vae=other, sample_every=4)) == (
        f"--vae {str(other)!r} has other weights than the VAE that made --latents-dir {str(cache)!r}; pass --vae "
        "FOLDER with the same, or --sample-every 0"
    )
    assert not results.exists()
    train.main(cached_arguments(results, latents_dir=gone, max_steps=1))  # of no samples
    moved = shutil.copytree(vae_folder, tmp_path / "moved")
    train.main(cached_arguments(results, latents_dir=gone, vae=moved, max_steps=2, sample_every=2))
    assert (results / "samples" / "0000002.png").exists()


def test_the_contact_sheet_holds_the_first_row_of_every_grid(tmp_path):
    layout, random = pictures.GridLayout(32, 48, previews.COLUMNS, titled=True), np.random.default_rng(0)
    paths, rows = [], []
    for step in range(40):
        images = list(random.integers(0, 256, (previews.COUNT, 32, 48, 3), dtype=np.uint8))
        paths.append(tmp_path / f"{step:07d}.png")
        pictures.save_png(
            pictures.draw_grid(images, ["a class"] * previews.COUNT, previews.COLUMNS, "title"), paths[-1]
        )
        rows.append(images[: previews.COLUMNS])
    with Image.open(paths[3]) as grid:
        for k in range(previews.COLUMNS):
            assert np.array_equal(np.asarray(grid.crop(layout.box(k)))[::2, ::2], rows[3][k])
    sheet = np.asarray(previews.contact_sheet(paths, layout, [str(k) for k in range(previews.COUNT)]))
    pitch, pitch_x = 2 * 32 + 4, 2 * 48 + 4  # images, enlarged twice, and the gap
    assert (sheet.shape[0] - 16 * pitch) in range(10, 40)  # 16 of the 40 rows, and a line of captions
    last = sheet[-pitch:-4, -pitch_x:-4]
    assert np.array_equal(last[::2, ::2], rows[39][-1])


# The report


class Balanced(HTMLParser):
    """Collects what a page says and loads, and fails where tags are not closed in turn."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.resources, self.text, self.tags = [], [], [], set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.resources += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def finished(run, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(run, tmp_path / "run")


def test_a_run_leaves_a_report_that_needs_nothing_else(run):
    page = (run / "report.html").read_text()
    seen = Balanced(page)
    text = " ".join(seen.text)
    for part in ("DiT-XS/2 spiral-R2-clamp seed 0", "Spiral RoPE, K = 4 directions, border clamp, 32 pixels, batch 8"):
        assert part in text
    for part in ("step, finished", "images/s, mean", "ant, bee, käfer", "diffusers", "grad_norm", "rope.rotate"):
        assert part in text
    assert len(seen.resources) == 4 and all(link.startswith("data:image/png;base64,") for link in seen.resources)
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)
    assert len(page) < 3e6


def test_a_report_shows_samples_validation_and_metrics(finished, tmp_path, capsys):
    (finished / "finished.json").unlink()
    with open(finished / "metrics.jsonl", "a") as file:
        scores = {
            "val_loss": 0.51,
            "val_loss_ema": 0.4321,
            "val_loss_ema_se": 0.0625,
            "val_loss_ema_tenths": [0.4] * 10,
        }
        file.write(json.dumps({"step": 7, "epoch": 2, **scores}) + "\n")
    images = [np.full((32, 32, 3), 100, np.uint8)] * previews.COUNT
    previews.folder_of(finished).mkdir()
    for step in (4, 7):
        grid = pictures.draw_grid(images, ["a"] * previews.COUNT, previews.COLUMNS, "title")
        pictures.save_png(grid, previews.step_path(finished, step))
    pictures.save_png(grid, previews.sheet_path(finished))
    metrics = tmp_path / "x.metrics.json"
    metrics.write_text('{"label_accuracy": 0.97, "sampling": {"seed": 100}}')
    report.main([str(finished), "--metrics", str(metrics)])
    assert capsys.readouterr().out == f"report: {finished / 'report.html'}\n"
    seen = Balanced((finished / "report.html").read_text())
    text = " ".join(seen.text)
    for part in (
        "step, not finished",
        "0.4321 ± 0.0625",
        "validation loss, EMA",
        "newest samples",
        "step 7",
        "label_accuracy",
    ):
        assert part in text
    assert "the same noise and classes over the run" in text and "0.97" in text
    assert "Validation loss by timestep" in (finished / "report.html").read_text()
    assert sum(link.startswith("data:image/jpeg;base64,") for link in seen.resources) == 2


def test_the_loss_chart_says_what_each_curve_holds(monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "chart", lambda *args: drawn.append(args) or "")
    report.curves([{"step": 2, "loss": 0.5, "val_loss": 0.4, "val_loss_ema": 0.3}])
    title, unit, _, lines = drawn[0]
    assert (title, unit) == ("Loss", "noise MSE; training adds the\nvariational term in bits/dim")
    assert list(lines) == ["training", "validation, raw", "validation, EMA"]


def test_hostile_names_stay_text(finished, run, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    config["data"]["classes"][1] = "<script>alert(1)</script>"
    config["args"]["data_path"] = '"><img src=http://x onerror=alert(1)>'
    config["versions"]["</table>"] = "<b>"
    files.write_json(finished / "config.json", config)
    WRITE(finished)
    seen = Balanced((finished / "report.html").read_text())
    assert seen.tags == Balanced(WRITE(shutil.copytree(run, tmp_path / "plain")).read_text()).tags
    assert all(link.startswith("data:image/") for link in seen.resources)
    assert "<script>alert(1)</script>" in " ".join(seen.text)


def test_many_classes_and_many_records_stay_small(finished):
    config = json.loads((finished / "config.json").read_text())
    config["data"]["classes"] = [f"n{k:08d}" for k in range(1000)]
    files.write_json(finished / "config.json", config)
    record = monitor.read_metrics(finished / "metrics.jsonl")[0]
    lines = [json.dumps(record | {"step": 100 * k}) + "\n" for k in range(1, 20_001)]
    (finished / "metrics.jsonl").write_text("".join(lines))
    page = WRITE(finished).read_text()
    assert "n00000019 and 980 more" in page and "n00000020" not in page
    assert "2,000,000" in page and len(page) < 1e6


def test_what_is_no_run_is_refused(finished, refused, tmp_path):
    assert refused(report.main, [tmp_path / "none"]) == (
        f"{str(tmp_path / 'none')!r} holds no run (config.json is missing); expected a --results-dir of train.py"
    )
    (tmp_path / "list.json").write_text("[]")
    assert refused(report.main, [finished, "--metrics", tmp_path / "list.json"]) == (
        f"{str(tmp_path / 'list.json')!r} holds a JSON list, expected an object"
    )
    assert refused(report.main, [finished, "--out", tmp_path / "no" / "where.html"]).startswith(
        "the report cannot be written: [Errno 2] No such file or directory"
    )
    (finished / "config.json").write_text("{}")
    assert refused(report.main, [finished]).startswith(f"config.json in {str(finished)!r} is not one of train.py (")
    assert TINY_RUN["sample_every"] == 0
