"""The commands one after the other, at a tiny scale, with one process and with two: train, sample, measure."""

import json
from pathlib import Path

import pytest
from conftest import TINY_RUN, command_line
from kill import read_metrics

import cache_latents
import sample_ddp
import train
from demo import digits, measure

pytestmark = pytest.mark.usefixtures("tiny_commands")
DEMO_VAE = Path(__file__).resolve().parent.parent / "assets" / "demo_vae"


def test_two_processes_train_as_one(two, train_arguments, tmp_path):
    assert two.output.count("finished at step 7") == 2  # that run, and one that was started again
    assert "on 2 x cpu in fp32" in two.output
    train.main(train_arguments(tmp_path / "alone", lr=0.01, use_rope=True, rope_rotate=2))
    together, alone = (read_metrics(folder) for folder in (two.folder / "trained", tmp_path / "alone"))
    assert [record["step"] for record in together] == [record["step"] for record in alone] == [3, 6, 7]
    # The noise differs, the data and the start do not: both learn alike.
    assert together[0]["loss"] == pytest.approx(alone[0]["loss"], rel=0.2)
    assert together[-1]["loss"] < 0.9 * together[0]["loss"]


def test_the_demo_in_short(tmp_path, capsys):
    """Digits, cached latents, training, sampling, measures, with the autoencoder that comes with the repository."""
    images, latents, results = tmp_path / "digits", tmp_path / "latents", tmp_path / "run"
    digits.main([str(images)])
    for path in images.glob("*/*.png"):  # some of each digit are enough here
        if int(path.stem) % 16:
            path.unlink()
    options = {"data_path": images, "latents_dir": latents, "vae": DEMO_VAE, "image_size": 64, "num_workers": 0}
    cache_latents.main(command_line(options | {"no_flip": True}))
    options = TINY_RUN | {"latents_dir": latents, "results_dir": results, "image_size": 64, "no_flip": True}
    train.main(command_line(options | {"max_steps": 12, "lr": 0.002, "use_rope": True, "rope_rotate": 4}))
    records = read_metrics(results)
    assert records[-1]["loss"] < records[0]["loss"]
    options = {"ckpt": results, "sample_dir": tmp_path / "samples", "num_fid_samples": 20, "num_sampling_steps": 4}
    sample_ddp.main(command_line(options | {"class_balanced": True}))
    (npz,) = (tmp_path / "samples").glob("*.npz")
    capsys.readouterr()
    measure.main(["--samples", str(npz)])
    metrics = json.loads(npz.with_suffix(".digits.metrics.json").read_text())
    assert metrics["samples"] == 20 and 0 <= metrics["label_accuracy"] <= 1
    assert metrics["sampling"]["class_balanced"] is True
    assert capsys.readouterr().out.startswith(f"label accuracy: {metrics['label_accuracy']:.1%} of 20 samples")
