"""Mistakes of the user: one line with the value, what was expected and the remedy; exit status 2; nothing written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line

import cache_latents
import evaluate
import evaluate_loss
import sample
import sample_ddp
import train
from demo import measure
from runtime import checkpoint, distributed, options
from runtime.vae import VAE

pytestmark = pytest.mark.usefixtures("tiny_commands")
ROOT = Path(__file__).resolve().parent.parent
NOT_A_VAE = (
    "is not a folder; expected ema, mse, a hub id, or a folder with config.json and diffusion_pytorch_model.safetensors"
)
SEED = "is not a whole number with 0 <= value <= 9.22337e+18"
WHOLE = "is not a whole number >= 1"
WITHOUT_ROPE = "given without --use-rope; add --use-rope, or leave it out"

TRAIN = [
    (dict(lr="nan"), "argument --lr: 'nan' is not a number > 0"),
    (dict(lr="inf"), "argument --lr: 'inf' is not a number > 0"),
    (dict(lr=0), "argument --lr: '0' is not a number > 0"),
    (dict(lr="-1e-4"), "argument --lr: '-1e-4' is not a number > 0"),
    (dict(lr="fast"), "argument --lr: 'fast' is not a number > 0"),
    (dict(lr=""), "argument --lr: '' is not a number > 0"),
    (dict(ema_decay=1), "argument --ema-decay: '1' is not a number with 0 <= value < 1"),
    (dict(ema_decay=-0.1), "argument --ema-decay: '-0.1' is not a number with 0 <= value < 1"),
    (dict(weight_decay=-1), "argument --weight-decay: '-1' is not a number >= 0"),
    (dict(grad_clip=0), "argument --grad-clip: '0' is not a number > 0"),
    (dict(lr_schedule="cosine"), "argument --lr-schedule: invalid choice: 'cosine' (choose from 'constant', 'linear')"),
    (dict(warmup_steps=-1), "argument --warmup-steps: '-1' is not a whole number >= 0"),
    (
        dict(warmup_steps=7, lr_schedule="linear"),
        "--warmup-steps 7 leaves nothing of the run's 7 steps; use fewer",
    ),
    (dict(max_steps=0), f"argument --max-steps: '0' {WHOLE}"),
    (dict(max_steps=1.5), f"argument --max-steps: '1.5' {WHOLE}"),
    (dict(epochs=-3), f"argument --epochs: '-3' {WHOLE}"),
    (dict(log_every=0), f"argument --log-every: '0' {WHOLE}"),
    (dict(ckpt_every=0), f"argument --ckpt-every: '0' {WHOLE}"),
    (dict(keep_checkpoints=0), f"argument --keep-checkpoints: '0' {WHOLE}"),
    (dict(max_bad_steps=0), f"argument --max-bad-steps: '0' {WHOLE}"),
    (dict(num_workers=-1), "argument --num-workers: '-1' is not a whole number >= 0"),
    (dict(global_seed=-1), f"argument --global-seed: '-1' {SEED}"),
    (dict(global_seed=2**64), f"argument --global-seed: '18446744073709551616' {SEED}"),
    (dict(global_batch_size="8x"), f"argument --global-batch-size: '8x' {WHOLE}"),
    (dict(global_batch_size=25), "--global-batch-size 25 is more than the 24 images; use a smaller batch"),
    (dict(grad_accum_steps=0), f"argument --grad-accum-steps: '0' {WHOLE}"),
    (
        dict(grad_accum_steps=3),
        "--global-batch-size 8 is not divisible by 1 processes x 3 micro-batches; use a multiple of 3",
    ),
    (dict(image_size=0), "argument --image-size: '0' is not an image size; expected pixels, as in 256 or 256x384"),
    (
        dict(image_size="32x"),
        "argument --image-size: '32x' is not an image size; expected pixels, as in 256 or 256x384",
    ),
    (
        dict(image_size=40),
        "--image-size 40 is not divisible by 16 (VAE down-sampling 8 x patch 2); choose a multiple of 16",
    ),
    (
        dict(image_size="32x24"),
        "--image-size 32x24 is not divisible by 16 (VAE down-sampling 8 x patch 2); choose a multiple of 16",
    ),
    (
        dict(model="dit-b/4"),
        "argument --model: 'dit-b/4' is not a model; expected DiT-{XL|L|B|S|XS}/{2|4|8}, as in DiT-B/4",
    ),
    (dict(num_classes=2), "--num-classes 2 is less than the 3 class folders; leave it out"),
    (dict(num_classes=0), f"argument --num-classes: '0' {WHOLE}"),
    (dict(precision="fp16"), "argument --precision: invalid choice: 'fp16' (choose from 'auto', 'fp32', 'bf16')"),
    (dict(rope_rotate=2), f"--rope-rotate {WITHOUT_ROPE}"),
    (dict(rope_border="exact", rope_theta=5), f"--rope-theta, --rope-border {WITHOUT_ROPE}"),
    (
        dict(use_rope=True, rope_rotate=3),
        "--rope-rotate 3 does not fit DiT-XS/2; expected one of 0, 1, 2, 4, 8",
    ),
    (
        dict(use_rope=True, rope_rotate=8, rope_same_theta=True),
        "--rope-rotate 8 does not fit DiT-XS/2 with --rope-same-theta; expected one of 0, 1, 2, 4",
    ),
    (
        dict(use_rope=True, rope_rotate=4, model="DiT-XL/2"),
        "--rope-rotate 4 does not fit DiT-XL/2; expected one of 0, 1, 2, 3, 6, 9, 18",
    ),
    (dict(use_rope=True, rope_rotate=-1), "argument --rope-rotate: '-1' is not a whole number >= 0"),
    (dict(use_rope=True, rope_theta=0), "argument --rope-theta: '0' is not a number > 0"),
    (dict(use_rope=True, rope_max_freq=0), "argument --rope-max-freq: '0' is not a number > 0"),
    (dict(use_rope=True, rope_max_freq_lang="nan"), "argument --rope-max-freq-lang: 'nan' is not a number > 0"),
    (dict(use_rope=True, rope_min_freq_lang=-1), "argument --rope-min-freq-lang: '-1' is not a number >= 0"),
    (
        dict(use_rope=True, rope_truncate_percentage=1.5),
        "argument --rope-truncate-percentage: '1.5' is not a number with 0 <= value <= 1",
    ),
    (
        dict(use_rope=True, rope_freqs_for="text"),
        "argument --rope-freqs-for: invalid choice: 'text' (choose from 'lang', 'pixel')",
    ),
    (
        dict(use_rope=True, rope_border="wrap"),
        "argument --rope-border: invalid choice: 'wrap' (choose from 'clamp', 'exact')",
    ),
    (dict(data_path=None), "exactly one of --data-path and --latents-dir is needed, neither was given; see --help"),
    (dict(latents_dir="x"), "exactly one of --data-path and --latents-dir is needed, both were given; see --help"),
    (dict(batch_size=3), "unrecognized arguments: --batch-size 3; did you mean --global-batch-size?"),
    (dict(zebra=3), "unrecognized arguments: --zebra 3; see --help"),
    (dict(vae="nonsense"), f"--vae 'nonsense' {NOT_A_VAE}"),
    (dict(vae="/no/where"), f"--vae '/no/where' {NOT_A_VAE}"),
]


@pytest.mark.parametrize(("changes", "message"), TRAIN, ids=str)
def test_training(changes, message, train_arguments, refused, tmp_path):
    assert refused(train.main, train_arguments(tmp_path / "run", **changes)) == message
    assert list(tmp_path.iterdir()) == []


def test_training_data(train_arguments, image_folder, refused, tmp_path):
    results = tmp_path / "run"

    def message(path):
        return refused(train.main, train_arguments(results, data_path=path)).replace(repr(str(path)), "PATH")

    assert message(tmp_path / "none") == (
        "--data-path PATH is not a folder; expected one with a sub-folder for each class"
    )
    (tmp_path / "flat").mkdir()
    no_classes = "--data-path PATH has no class folders; expected one sub-folder for each class"
    assert message(tmp_path / "flat") == no_classes
    shutil.copy(image_folder / "ant" / "00.png", tmp_path / "flat")
    assert message(tmp_path / "flat") == no_classes
    (tmp_path / "flat" / "cat").mkdir()
    assert message(tmp_path / "flat").startswith(f"class folder {str(tmp_path / 'flat' / 'cat')!r} has no images; ")
    assert not results.exists()


def test_a_batch_that_does_not_split_over_processes(train_arguments, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    assert refused(train.main, train_arguments(tmp_path / "run", grad_accum_steps=2)) == (
        "--global-batch-size 8 is not divisible by 3 processes x 2 micro-batches; use a multiple of 6"
    )
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_written(train_arguments, sample_arguments, refused, tmp_path):
    (tmp_path / "file").touch()
    assert refused(train.main, train_arguments(tmp_path / "file")) == (
        f"--results-dir {str(tmp_path / 'file')!r} cannot be written (Not a directory); choose another"
    )
    assert refused(sample_ddp.main, sample_arguments(tmp_path / "file")) == (
        f"--sample-dir {str(tmp_path / 'file')!r} cannot be written (Not a directory)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").stat().st_size == 0


ENVIRONMENTS = [
    (
        dict(WORLD_SIZE="two"),
        "environment variable WORLD_SIZE='two' is not a whole number; unset it or start with torchrun",
    ),
    (
        dict(LOCAL_RANK="-1"),
        "environment variable LOCAL_RANK='-1' is not a whole number; unset it or start with torchrun",
    ),
    (
        dict(WORLD_SIZE="2"),
        "cannot join the 2 processes of WORLD_SIZE (Error initializing torch.distributed using env:// rendezvous: "
        "environment variable RANK expected, but not set); start with torchrun, or unset WORLD_SIZE",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ENVIRONMENTS, ids=str)
def test_environments(changes, message, train_arguments, refused, tmp_path, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert refused(train.main, train_arguments(tmp_path / "run")) == message
    assert not (tmp_path / "run").exists()


def test_only_the_first_of_many_processes_speaks(tmp_path, monkeypatch, capsys):
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(options.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as stopped:
        sample_ddp.main(["--ckpt", str(tmp_path / "none.pt")])
    assert stopped.value.code == 2 and waited == [2]
    assert capsys.readouterr() == ("", "")


def test_more_processes_than_gpus(refused, train_arguments, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert refused(train.main, train_arguments(tmp_path / "run")) == (
        "process 2 of this node has no GPU: 2 present; start torchrun with --nproc_per_node 2"
    )


SAMPLE = [
    (dict(ckpt=None), "the following arguments are required: --ckpt"),
    (dict(num_fid_samples=0), f"argument --num-fid-samples: '0' {WHOLE}"),
    (dict(per_proc_batch_size=0), f"argument --per-proc-batch-size: '0' {WHOLE}"),
    (dict(num_sampling_steps=0), "argument --num-sampling-steps: '0' is not a whole number with 1 <= value <= 1000"),
    (
        dict(num_sampling_steps=1001),
        "argument --num-sampling-steps: '1001' is not a whole number with 1 <= value <= 1000",
    ),
    (dict(cfg_scale=0.5), "argument --cfg-scale: '0.5' is not a number >= 1"),
    (dict(cfg_scale="nan"), "argument --cfg-scale: 'nan' is not a number >= 1"),
    (dict(cfg_channels=4), "argument --cfg-channels: invalid choice: '4' (choose from '3', 'all')"),
    (dict(guidance_interval=(0.5, 0.2)), "--guidance-interval 0.5 0.2 is empty; expected LO < HI"),
    (dict(guidance_interval=(0, 2)), "argument --guidance-interval: '2' is not a number with 0 <= value <= 1"),
    (dict(guidance_interval=(0.5,)), "argument --guidance-interval: expected 2 arguments"),
    (dict(global_seed=-1), f"argument --global-seed: '-1' {SEED}"),
    (dict(sampler="euler"), "argument --sampler: invalid choice: 'euler' (choose from 'ddpm', 'ddim', 'dpm++')"),
    (dict(weights="best"), "argument --weights: invalid choice: 'best' (choose from 'ema', 'model')"),
    (dict(num_samples=3), "unrecognized arguments: --num-samples 3; did you mean --num-fid-samples?"),
    (dict(rope_rotate=2), f"--rope-rotate {WITHOUT_ROPE}"),
    (dict(vae="nonsense"), f"--vae 'nonsense' {NOT_A_VAE}"),
    (
        dict(model="DiT-B/4"),
        "--model DiT-B/4 disagrees with checkpoint CKPT, which was trained with DiT-XS/2; leave the flag out",
    ),
    (
        dict(image_size=64),
        "--image-size 64 disagrees with checkpoint CKPT, which was trained with 32; pass --rope-extend extrapolate "
        "(positions go on) or interpolate (they are squeezed), or leave the option out",
    ),
    (
        dict(num_classes=10),
        "--num-classes 10 disagrees with checkpoint CKPT, which was trained with 3; leave the flag out",
    ),
    (
        dict(use_rope=True, rope_rotate=4),
        "--rope-rotate 4 disagrees with checkpoint CKPT, which was trained with 2; leave the flag out",
    ),
]


@pytest.mark.parametrize(("changes", "message"), SAMPLE, ids=str)
def test_sampling(changes, message, sample_arguments, run, refused, tmp_path):
    found = refused(sample_ddp.main, sample_arguments(tmp_path / "samples", **changes))
    assert found.replace(repr(str(run / "checkpoints" / "0000007.pt")), "CKPT") == message
    assert list(tmp_path.iterdir()) == []


# Autoencoders


def edited(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def weights(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


CANNOT = "--vae folder VAE cannot be loaded as an AutoencoderKL: "
MODEL = "diffusion_pytorch_model.safetensors"
BROKEN_VAES = {
    "no config": (lambda vae: (vae / "config.json").unlink(), "--vae folder VAE has no config.json; expected one that"),
    "config cut": (lambda vae: (vae / "config.json").write_text("{"), CANNOT),
    "config of another kind": (lambda vae: (vae / "config.json").write_text("[]"), CANNOT),
    "no weights": (lambda vae: (vae / MODEL).unlink(), CANNOT),
    "weights cut": (lambda vae: (vae / MODEL).write_bytes((vae / MODEL).read_bytes()[:9000]), CANNOT),
    "weights empty": (lambda vae: (vae / MODEL).write_bytes(b""), CANNOT),
    "other stages": (lambda vae: edited(vae, block_out_channels=[4, 4, 8]), CANNOT),
    "other channels": (lambda vae: edited(vae, latent_channels=3), CANNOT),
    "scale 0": (
        lambda vae: edited(vae, scaling_factor=0),
        "--vae VAE has scaling_factor 0 in its config.json; expected a number > 0",
    ),
    "no scale": (
        lambda vae: edited(vae, scaling_factor=None),
        "--vae VAE has scaling_factor None in its config.json; expected a number > 0",
    ),
    "a weight is missing": (
        lambda vae: weights(vae, lambda tensors: tensors.pop("quant_conv.bias")),
        "--vae VAE lacks weights, such as quant_conv.bias; copy it again",
    ),
    "a weight is not a number": (
        lambda vae: weights(vae, lambda tensors: tensors["quant_conv.bias"].fill_(float("nan"))),
        "--vae VAE has values in quant_conv.bias that are not finite numbers; copy it again",
    ),
}


@pytest.mark.parametrize("case", BROKEN_VAES)
def test_broken_autoencoders(case, vae_folder, train_arguments, refused, tmp_path):
    folder = shutil.copytree(vae_folder, tmp_path / "vae")
    breaks, expected = BROKEN_VAES[case]
    breaks(folder)
    message = refused(train.main, train_arguments(tmp_path / "run", vae=folder))
    assert message.replace(repr(str(folder)), "VAE").startswith(expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ema", "mse", "someone/something"])
def test_unreachable_hub(name, train_arguments, sample_arguments, refused, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    asked = []

    def unreachable(hub_id, **_):
        asked.append(hub_id)
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more lines of advice")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", unreachable)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    hub_id = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}.get(name, name)
    expected = (
        f"--vae {name!r}: {hub_id} cannot be fetched from the Hugging Face hub: We couldn't connect to "
        "'https://huggingface.co'; check the name and the network, or pass a local folder that holds the autoencoder"
    )
    assert refused(train.main, train_arguments(tmp_path / "run", vae=name)) == expected
    assert refused(sample_ddp.main, sample_arguments(tmp_path / "run", vae=name)) == expected
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(train.main, train_arguments(tmp_path / "run", vae=name))
    assert "hub (HF_HUB_OFFLINE is set): We couldn't" in message
    assert asked == [hub_id] * 3 and list(tmp_path.iterdir()) == []


def test_geometry_is_read_from_the_autoencoder(make_vae):
    vae = VAE(str(make_vae(stages=3, scaling_factor=0.25)))
    assert (vae.downsampling, vae.latent_channels, vae.scaling_factor, vae.shift_factor) == (4, 4, 0.25, 0)


# The other commands


def test_measuring(refused, tmp_path):
    path = tmp_path / "samples.npz"
    expected = "expected an .npz of sample_ddp.py, with images arr_0 uint8 (N, H, W, 3) and labels arr_1 (N,)"

    def message():
        found = refused(measure.main, ["--samples", path]).replace(repr(str(path)), "FILE")
        assert found.startswith("--samples FILE ") and found.endswith(f"; {expected}")
        return found.removeprefix("--samples FILE ").removesuffix(f"; {expected}")

    assert message() == "does not exist"
    np.savez(path, arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.zeros(2, np.int64))
    whole = path.read_bytes()
    for contents in (b"", b"not an archive", whole[:200], whole[:-50], whole[:200] + b"x" * 20 + whole[220:]):
        path.write_bytes(contents)
        assert message().startswith("cannot be read (")
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    assert message().startswith("cannot be read (")
    np.savez(path, arr_0=np.zeros((2, 8, 8), np.uint8), arr_1=np.zeros(2, np.int64))
    assert message() == "holds arr_0 uint8 (2, 8, 8), arr_1 (2,)"
    np.savez(path, arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.zeros(3, np.int64))
    assert message() == "holds arr_0 uint8 (2, 8, 8, 3), arr_1 (3,)"
    np.savez(path, arr_0=np.array([{"an": "object"}]), arr_1=np.zeros(1, np.int64))
    assert message() == "holds arr_0 object (1,), arr_1 (1,)"
    np.savez(path, arr_0=np.zeros((1, 8, 8, 3), np.uint8), arr_1=np.array([{"an": "object"}]))
    assert message().startswith("cannot be read (")
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


def test_caching(image_folder, vae_folder, refused, tmp_path):
    def message(**changes):
        options = {"data_path": image_folder, "vae": vae_folder, "latents_dir": tmp_path / "latents", "image_size": 32}
        return refused(cache_latents.main, command_line(options | changes))

    assert message(latents_dir=None) == "the following arguments are required: --latents-dir"
    assert message(vae="nonsense") == f"--vae 'nonsense' {NOT_A_VAE}"
    assert message(image_size="x32").startswith("argument --image-size: 'x32' is not an image size; expected pixels")
    assert message(flips=True) == "unrecognized arguments: --flips; did you mean --flip?"
    assert list(tmp_path.iterdir()) == []


def test_control_characters_are_made_visible(refused, tmp_path):
    path = tmp_path / "two\nlines\x1b[31m"
    message = refused(sample_ddp.main, ["--ckpt", "a", "--rope-rotate", "two\nlines"])
    assert message == "argument --rope-rotate: 'two\\nlines' is not a whole number >= 0"
    assert str(path) not in refused(sample_ddp.main, ["--ckpt", path])
    assert options.one_line("a\nb\x1b[31m\x00\x7f") == "a\\nb\\x1b[31m\\x00\\x7f"


def test_no_command_takes_abbreviations(refused, train_arguments, tmp_path):
    assert refused(train.main, train_arguments(tmp_path / "run", max_step=3)) == (
        "unrecognized arguments: --max-step 3; did you mean --max-steps?"
    )


def test_help_is_not_a_mistake(capsys):
    for main in (train.main, sample.main, sample_ddp.main, cache_latents.main, evaluate.main, evaluate_loss.main):
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith("usage: ")


def test_resuming_what_is_no_run_of_ours(train_arguments, refused, tmp_path):
    path = tmp_path / "run" / "checkpoints" / "0000001.pt"
    path.parent.mkdir(parents=True)
    checkpoint.save(path, {"ema": {"weight": torch.zeros(1)}})
    assert refused(train.main, train_arguments(tmp_path / "run")) == (
        f"checkpoint {str(path)!r} has no config, so it cannot be resumed; use another --results-dir"
    )
    assert sorted(file.name for file in path.parent.iterdir()) == ["0000001.pt"]
