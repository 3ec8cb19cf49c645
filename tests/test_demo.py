"""The demo's commands: writing the digits, measuring samples of them, training their autoencoder."""

import json
import os
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from demo import digits, measure, train_vae
from runtime.data import ImageList, read_image


def test_digits_are_written_once(tmp_path, capsys):
    digits.main([str(tmp_path / "digits"), "--size", "16"])
    said = f"demo data: 1797 handwritten digits in {tmp_path / 'digits'}\n"
    assert capsys.readouterr().out == said
    images = ImageList(tmp_path / "digits")
    assert len(images) == 1797 and images.classes == list("0123456789")
    real, labels = digits.enlarged_digits(16)
    order = sorted(range(1797), key=lambda index: (labels[index], index))
    assert images.labels.tolist() == labels[order].tolist()
    assert np.array_equal(read_image(images.path(0)), np.asarray(real[order[0]]))
    before = os.stat(tmp_path / "digits").st_mtime_ns
    digits.main([str(tmp_path / "digits"), "--size", "16"])
    assert capsys.readouterr().out == f"nothing to do: {said}"
    assert os.stat(tmp_path / "digits").st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_folder_of_something_else_is_refused(tmp_path, refused, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "file"):
        assert refused(digits.main, [folder]).startswith(f"{str(folder)!r} is there and holds something else; expected")
    assert refused(digits.main, [tmp_path / "file" / "a"]) == (
        f"{str(tmp_path / 'file' / 'a')!r} cannot be written (File exists); choose another folder"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").stat().st_size == 0
    digits.main([str(tmp_path / "digits"), "--size", "8"])
    assert "holds images of 8 x 8 pixels; expected the digits as 16 x 16" in refused(
        digits.main, [tmp_path / "digits", "--size", 16]
    )


def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"), digits.whole_folder(tmp_path / "a") as partial:
        (partial / "0").mkdir()
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
    with digits.whole_folder(tmp_path / "a") as partial:  # another process is faster
        (tmp_path / "a" / "theirs").mkdir(parents=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "theirs"]


# Measures of samples


@pytest.fixture
def measured(tmp_path, capsys):
    """Measures samples with their labels: the file of metrics, and what was printed."""

    def call(pixels: np.ndarray, labels: np.ndarray) -> tuple[dict, str]:
        path = tmp_path / "samples.npz"
        np.savez(path, arr_0=pixels, arr_1=labels)
        (tmp_path / "samples.digits.metrics.json").unlink(missing_ok=True)
        measure.main(["--samples", str(path)])
        return json.loads((tmp_path / "samples.digits.metrics.json").read_text()), capsys.readouterr().out

    return call


def test_real_digits_are_recognised_and_near_and_noise_is_far(measured, tmp_path):
    images, labels = digits.enlarged_digits(32)
    real = np.stack([np.asarray(image) for image in images])
    (tmp_path / "samples.json").write_text('{"seed": 7}')
    found, said = measured(real, labels)
    assert found["pixel_frechet_distance_8x8_digits"] == pytest.approx(0, abs=1e-6)  # constant rim: no full rank
    assert found["samples"] == 1797 and found["sampling"] == {"seed": 7} and found["label_accuracy"] > 0.97
    assert said.startswith(f"label accuracy: {found['label_accuracy']:.1%} of 1797 samples recognised as their label\n")
    half, _ = measured(real[::2], labels[::2])
    noise, said = measured(np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8), labels[:200])
    distance = "pixel_frechet_distance_8x8_digits"
    assert 0 < half[distance] < 0.1 < 2 < noise[distance]
    assert f"pixel Fréchet distance on 8 x 8 digits: {noise[distance]:.4f}\n" in said
    wrong, _ = measured(real[::30], (labels[::30] + 1) % 10)
    assert wrong["label_accuracy"] < 0.03


def test_a_single_digit_has_no_distance(measured):
    found, said = measured(np.zeros((1, 16, 16, 3), np.uint8), np.zeros(1, np.int64))
    assert found["pixel_frechet_distance_8x8_digits"] is None and found["sampling"] is None
    assert "pixel Fréchet distance on 8 x 8 digits: not defined for a single sample\n" in said


def test_samples_are_measured_once(measured, tmp_path, capsys, monkeypatch):
    _, said = measured(np.zeros((2, 16, 16, 3), np.uint8), np.zeros(2, np.int64))
    monkeypatch.setattr(measure, "NpzImages", lambda *_, **__: pytest.fail("read again"))
    measure.main(["--samples", str(tmp_path / "samples.npz")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == said.splitlines()[:2] and lines[2].startswith("nothing to do: ")
    monkeypatch.undo()
    os.utime(tmp_path / "samples.npz", (2**31, 2**31))  # made again
    before = (tmp_path / "samples.digits.metrics.json").stat().st_mtime_ns
    measure.main(["--samples", str(tmp_path / "samples.npz")])
    assert (tmp_path / "samples.digits.metrics.json").stat().st_mtime_ns > before


def test_a_dry_run_checks_the_samples_and_writes_nothing(tmp_path, refused, capsys):
    path = tmp_path / "samples.npz"
    np.savez(path, arr_0=np.zeros((2, 16, 16, 3), np.uint8))
    for arguments in (["--samples", path], ["--samples", path, "--dry-run"]):
        assert refused(measure.main, arguments).startswith(f"--samples {str(path)!r} cannot be read")
    np.savez(path, arr_0=np.zeros((2, 16, 16, 3), np.uint8), arr_1=np.zeros(2, np.int64))
    measure.main(["--samples", str(path), "--dry-run"])
    assert "2 samples" in capsys.readouterr().out and [item.name for item in tmp_path.iterdir()] == [path.name]


# The autoencoder


def test_training_the_autoencoder_is_estimated_and_its_options_checked(tmp_path, refused, capsys, monkeypatch):
    images = {size: torch.zeros(8, 1, size, size, dtype=torch.uint8) for size in (64, 128)}
    monkeypatch.setattr(train_vae, "load_images", images.get)
    monkeypatch.setattr(train_vae, "BATCH", 4)
    train_vae.main(["--out", str(tmp_path / "vae"), "--dry-run"])
    assert re.search(r"would train for 1500 steps, about 00:[0-5]\d", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for option, value in (("--out", tmp_path / "file" / "a"), ("--steps", 100)):
        line = refused(train_vae.main, [option, value])
        assert option in line and str(value) in line


def test_the_autoencoder_is_the_shipped_kind_and_its_latents_are_standardized():
    vae = train_vae.build_vae()
    shipped = AutoencoderKL.from_pretrained(train_vae.monitor.REPOSITORY / "assets" / "demo_vae").state_dict()
    assert {name: value.shape for name, value in vae.state_dict().items()} == {n: v.shape for n, v in shipped.items()}
    grey = torch.randint(256, (64, 1, 64, 64), generator=torch.manual_seed(0)).byte()
    images = train_vae.to_rgb(grey)
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        train_vae.standardize(vae, grey)
        after = vae.decode(vae.encode(images).latent_dist.mean).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    latents = train_vae.sample_latents(vae, grey)
    assert latents.mean((0, 2, 3)).abs().max() < 0.05 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.05
