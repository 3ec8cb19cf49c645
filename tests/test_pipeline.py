"""The commands one after the other, at a tiny scale, with one process and with two: train, sample, evaluate."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, TORCHRUN, command_line
from PIL import Image

import cache_latents
import sample_ddp
import train
from demo import digits, measure
from runtime import distributed

ROOT = Path(__file__).resolve().parent.parent
DEMO_VAE = ROOT / "assets" / "demo_vae"


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(distributed, "_device", lambda *_: torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchrun(script: str, options: dict) -> str:
    """Output of a command on two gloo processes."""
    process = subprocess.run(
        [*TORCHRUN, ROOT / script, *command_line(options)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def arrays(folder: Path):
    (npz,) = folder.glob("*.npz")
    with np.load(npz) as archive:
        return archive["arr_0"], archive["arr_1"]


def test_two_processes_train_and_sample_as_one(image_folder, vae_folder, tmp_path, signal_after):
    results = tmp_path / "run"
    options = TINY_RUN | {"data_path": image_folder, "vae": vae_folder, "use_rope": True, "rope_rotate": 2, "lr": 0.01}
    output = torchrun("train.py", options | {"results_dir": results})
    assert output.count("finished at step 7") == 1 and "on 2 x cpu in fp32" in output
    train.main(command_line(options | {"results_dir": tmp_path / "alone"}))
    together, alone = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (results, tmp_path / "alone")
    )
    assert [record["step"] for record in together] == [record["step"] for record in alone] == [3, 6, 7]
    # The noise differs, the data and the start do not: both learn alike.
    assert together[0]["loss"] == pytest.approx(alone[0]["loss"], rel=0.2)
    assert together[-1]["loss"] < 0.9 * together[0]["loss"]

    options = {"ckpt": results / "checkpoints" / "0000007.pt", "num_fid_samples": 13, "num_sampling_steps": 6}
    options |= {"precision": "fp32", "cfg_scale": 2}
    output = torchrun("sample_ddp.py", options | {"sample_dir": tmp_path / "two", "per_proc_batch_size": 3})
    assert output.count("samples: ") == 1
    sample_ddp.main(command_line(options | {"sample_dir": tmp_path / "one", "per_proc_batch_size": 5}))
    for _ in range(2):
        signal_after(sample_ddp.sampling, "sample_latents", 1)
        sample_ddp.main(command_line(options | {"sample_dir": tmp_path / "three", "per_proc_batch_size": 4}))
    assert not list((tmp_path / "three").glob("*.npz"))
    sample_ddp.main(command_line(options | {"sample_dir": tmp_path / "three", "per_proc_batch_size": 4}))
    images, labels = arrays(tmp_path / "one")
    for folder in ("two", "three"):
        others, other_labels = arrays(tmp_path / folder)
        difference = np.abs(images.astype(int) - others.astype(int))
        assert difference.max() <= 1 and (difference == 0).mean() >= 0.999
        assert labels.tolist() == other_labels.tolist()
        pngs = sorted(next(path for path in (tmp_path / folder).iterdir() if path.is_dir()).iterdir())
        assert [path.name for path in pngs] == [f"{index:06d}.png" for index in range(13)]
        assert all(
            np.array_equal(np.asarray(Image.open(path)), image) for path, image in zip(pngs, others, strict=True)
        )


def test_the_demo_in_short(tmp_path, capsys):
    """Digits, cached latents, training, sampling, evaluation, with the autoencoder that comes with the repository."""
    images, latents, results = tmp_path / "digits", tmp_path / "latents", tmp_path / "run"
    digits.main([str(images)])
    for path in images.glob("*/*.png"):  # some of each digit are enough here
        if int(path.stem) % 16:
            path.unlink()
    cache_latents.main(
        command_line({"data_path": images, "latents_dir": latents, "vae": DEMO_VAE, "image_size": 64, "no_flip": True})
        + ["--num-workers=0"]
    )
    options = TINY_RUN | {"latents_dir": latents, "results_dir": results, "image_size": 64, "no_flip": True}
    train.main(command_line(options | {"max_steps": 12, "lr": 0.002, "use_rope": True, "rope_rotate": 4}))
    records = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[0]["loss"]
    options = {"ckpt": results / "checkpoints" / "0000012.pt", "sample_dir": tmp_path / "samples", "vae": DEMO_VAE}
    sample_ddp.main(command_line(options | {"num_fid_samples": 20, "num_sampling_steps": 4, "class_balanced": True}))
    (npz,) = (tmp_path / "samples").glob("*.npz")
    capsys.readouterr()
    measure.main(["--samples", str(npz)])
    metrics = json.loads(npz.with_suffix(".digits.metrics.json").read_text())
    assert metrics["samples"] == 20 and 0 <= metrics["label_accuracy"] <= 1
    assert metrics["sampling"]["class_balanced"] is True
    assert capsys.readouterr().out.startswith(f"label accuracy: {metrics['label_accuracy']:.1%} of 20 samples")
