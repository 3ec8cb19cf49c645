"""Mistakes of the user: one line with the value, what was expected and the remedy; exit status 2; nothing written."""

import argparse
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import cache_latents
import evaluate
import evaluate_loss
import sample
import sample_ddp
import train
from demo import measure
from runtime import distributed, files, options
from runtime.vae import VAE

pytestmark = pytest.mark.usefixtures("tiny_commands")
# The rules

below_one = options.number(float, 0, 1, open_high=True)
MODELS = "{XL|L|B|S|XS}/{2|4|8}"
RULES = [  # type, message, what is refused, what is not
    (options.positive, "is not a number > 0", ("nan", "inf", "0", "-1e-4", "fast", ""), ("1e-4", "3")),
    (options.non_negative, "is not a number >= 0", ("-1", "-inf"), ("0", "0.5")),
    (options.fraction, "is not a number with 0 <= value <= 1", ("-0.1", "1.5"), ("0", "1")),
    (below_one, "is not a number with 0 <= value < 1", ("1", "-0.1"), ("0", "0.9999")),
    (options.count, "is not a whole number >= 1", ("0", "-3", "1.5", "8x", "nan"), ("1", "50000")),
    (options.non_negative_int, "is not a whole number >= 0", ("-1", "two\nlines"), ("0",)),
    (options.seed, "is not a whole number with 0 <= value <= 9.22337e+18", ("-1", str(2**64)), ("0", str(2**63 - 1))),
    (options.image_size, "is not an image size; expected pixels, as in 256 or 256x384", ("0", "32x", "x32"), ("256",)),
    (options.model_name, f"is not a model; expected DiT-{MODELS}, as in DiT-B/4", ("dit-b/4",), ("DiT-B/4",)),
]


@pytest.mark.parametrize(("kind", "message", "bad", "good"), RULES, ids=[rule[1] for rule in RULES])
def test_rules(kind, message, bad, good):
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert str(error.value) == f"{text!r} {message}"
    for text in good:
        kind(text)


# Which option has which rule: the smallest value that is refused, or the only kind of value that there is.
TRAIN = (
    "lr=0 weight-decay=-1 grad-clip=0 ema-decay=1 lr-schedule=cosine warmup-steps=-1 max-steps=0 epochs=0 log-every=0 "
    "ckpt-every=0 sample-every=-1 keep-checkpoints=0 max-bad-steps=0 num-workers=-1 global-seed=-1 grad-accum-steps=0 "
    "global-batch-size=0 image-size=0 model=DiT num-classes=0 precision=fp16 objective=v dry-run=0 planned=0 "
    "val-fraction=1 val-every=0 rope-rotate=-1 rope-theta=0 rope-max-freq=0 rope-max-freq-lang=0 rope-min-freq-lang=-1 "
    "rope-truncate-percentage=1.5 rope-freqs-for=text rope-border=wrap"
)
SAMPLE = (
    "num-fid-samples=0 per-proc-batch-size=0 num-sampling-steps=0 num-sampling-steps=1001 cfg-scale=0.5 cfg-channels=4 "
    "global-seed=-1 sampler=euler weights=best precision=fp16 vae-precision=fp16 rope-extend=far model=DiT planned=0"
)
CACHE = "batch-size=0 num-workers=-1 image-size=0 planned=0 changed=all"


@pytest.mark.parametrize(
    ("main", "option"),
    [(main, option) for main, listed in ((train.main, TRAIN), (sample_ddp.main, SAMPLE), (cache_latents.main, CACHE))
     for option in listed.split()],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_every_option_has_its_rule(main, option, refused):
    name, value = option.split("=")
    message = refused(main, [f"--{option}"])
    assert message.startswith(f"argument --{name}: ") and repr(value) in message


MISTAKES = {
    "--warmup-steps=7 --lr-schedule=linear": "--warmup-steps 7 leaves nothing of the run's 7 steps; use fewer",
    "--global-batch-size=25": "--global-batch-size 25 is more than the 24 images; use a smaller batch",
    "--grad-accum-steps=3": "--global-batch-size 8 is not divisible by 1 processes x 3 micro-batches; use a multiple",
    "--image-size=32x24": "--image-size 32x24 is not divisible by 16 (VAE down-sampling 8 x patch 2); choose",
    "--num-classes=2": "--num-classes 2 is less than the 3 class folders; leave it out",
    "--rope-border=exact --rope-theta=5": "--rope-theta, --rope-border given without --use-rope; add --use-rope,",
    "--use-rope --rope-rotate=3": "--rope-rotate 3 does not fit DiT-XS/2; expected one of 0, 1, 2, 4, 8",
    "--use-rope --rope-rotate=8 --rope-same-theta": "--rope-rotate 8 does not fit DiT-XS/2 with --rope-same-theta; "
    "expected one of 0, 1, 2, 4",
    "--use-rope --rope-rotate=4 --model=DiT-XL/2": "--rope-rotate 4 does not fit DiT-XL/2; expected one of 0, 1, 2, 3, "
    "6, 9, 18",
    "--latents-dir=x": "argument --latents-dir: not allowed with argument --data-path",
    "--batch-size=3": "unrecognized arguments: --batch-size=3; did you mean --global-batch-size?",
    "--max-step=3": "unrecognized arguments: --max-step=3; did you mean --max-steps?",  # no abbreviations
    "--zebra=3": "unrecognized arguments: --zebra=3; see --help",
    "--vae=nonsense": "--vae 'nonsense' is not a folder; expected ema, mse, a hub id, or a folder with config.json",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_training(arguments, train_arguments, refused, tmp_path):
    message = refused(train.main, [*train_arguments(tmp_path / "run"), *arguments.split()])
    assert message.startswith(MISTAKES[arguments])


def test_sampling(sample_arguments, run, refused, tmp_path):
    ckpt = repr(str(run / "checkpoints" / "0000007.pt"))
    for arguments, expected in (
        ("--guidance-interval 0.5 0.2", "--guidance-interval 0.5 0.2 is empty; expected LO < HI"),
        ("--guidance-interval 0 2", "argument --guidance-interval: '2' is not a number with 0 <= value <= 1"),
        (
            "--image-size=64",
            f"--image-size 64 disagrees with checkpoint {ckpt}, which was trained with 32; pass --rope-",
        ),
    ):
        found = refused(sample_ddp.main, [*sample_arguments(tmp_path / "samples"), *arguments.split()])
        assert found.startswith(expected)


# Places


def test_folders_that_cannot_be_written(train_arguments, sample_arguments, cache_arguments, refused, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "deep" / "er"
    reason = f"{str(tmp_path / 'file')!r} is a file"
    for main, build, option in (
        (train.main, train_arguments, "--results-dir"),
        (sample_ddp.main, sample_arguments, "--sample-dir"),
        (cache_latents.main, cache_arguments, "--latents-dir"),
    ):
        for extra in ([], ["--dry-run"]):
            message = refused(main, [*build(folder), *extra])
            assert message == f"{option} {str(folder)!r} cannot be written ({reason}); choose another"


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(options.UserError, match=rf"^--out '.*/a/b' cannot be written \(no permission in '{tmp_path}'"):
        files.check_folder(tmp_path / "a" / "b", "--out")


def test_a_folder_below_one_that_may_not_be_looked_into(tmp_path, monkeypatch):
    """Path.exists raises there."""
    monkeypatch.setattr(Path, "exists", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    files.check_folder(tmp_path / "a" / "b", "--results-dir")


ENVIRONMENTS = {
    "WORLD_SIZE=two": "environment variable WORLD_SIZE='two' is not a whole number; unset it or start with torchrun",
    "LOCAL_RANK=-1": "environment variable LOCAL_RANK='-1' is not a whole number; unset it or start with torchrun",
    "WORLD_SIZE=2": "cannot join the 2 processes of WORLD_SIZE (RANK is not set); start with torchrun, or unset "
    "WORLD_SIZE",
    "WORLD_SIZE=3": "--global-batch-size 8 is not divisible by 3 processes x 1 micro-batches; use a multiple of 3",
}


@pytest.mark.parametrize("variable", ENVIRONMENTS)
def test_environments(variable, train_arguments, refused, tmp_path, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(*variable.split("="))
    assert refused(train.main, train_arguments(tmp_path / "run")) == ENVIRONMENTS[variable]


@pytest.mark.parametrize("group, seconds", [({}, 0), ({"RANK": "3"}, 2), ({"RANK": "9", "LOCAL_RANK": "2"}, 4)])
def test_processes_after_the_first_speak_where_torchrun_has_not_ended_them(
    group, seconds, refused, tmp_path, monkeypatch
):
    waited = []
    for name, text in group.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(options.time, "sleep", waited.append)
    assert "does not exist" in refused(sample_ddp.main, ["--ckpt", tmp_path / "none.pt"])
    assert waited == [seconds]


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(options.UserError) as error:
        distributed._device(2, 3)
    assert str(error.value) == "process 2 of this node has no GPU: 2 present; start torchrun with --nproc_per_node 2"


# Autoencoders


def edited(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def without(folder: Path, name: str, value: float | None = None) -> None:
    """Take a weight away, or fill it with a value."""
    tensors = load_file(folder / MODEL)
    changed = {} if value is None else {name: tensors[name].fill_(value)}
    save_file({key: tensors[key] for key in tensors if key != name} | changed, folder / MODEL)


CANNOT = "--vae folder VAE cannot be loaded as an AutoencoderKL: "
MODEL, BIAS = "diffusion_pytorch_model.safetensors", "quant_conv.bias"
SCALE = "--vae VAE has scaling_factor {} in its config.json; expected a number > 0"
BROKEN_VAES = {
    "no config": (lambda vae: (vae / "config.json").unlink(), "--vae folder VAE has no config.json; expected one that"),
    "config cut": (lambda vae: (vae / "config.json").write_text("{"), CANNOT),
    "config of another kind": (lambda vae: (vae / "config.json").write_text("[]"), CANNOT),
    "no weights": (lambda vae: (vae / MODEL).unlink(), CANNOT),
    "weights cut": (lambda vae: (vae / MODEL).write_bytes((vae / MODEL).read_bytes()[:9000]), CANNOT),
    "weights empty": (lambda vae: (vae / MODEL).write_bytes(b""), CANNOT),
    "other stages": (lambda vae: edited(vae, block_out_channels=[4, 4, 8]), CANNOT),
    "other channels": (lambda vae: edited(vae, latent_channels=3), CANNOT),
    "scale 0": (lambda vae: edited(vae, scaling_factor=0), SCALE.format(0)),
    "no scale": (lambda vae: edited(vae, scaling_factor=None), SCALE.format(None)),
    "a weight is missing": (lambda vae: without(vae, BIAS), f"--vae VAE lacks weights, such as {BIAS}; copy it again"),
    "not a number": (lambda vae: without(vae, BIAS, np.nan), f"--vae VAE has values in {BIAS} that are not finite num"),
}


@pytest.mark.parametrize("case", BROKEN_VAES)
def test_broken_autoencoders(case, vae_folder, tmp_path):
    folder = shutil.copytree(vae_folder, tmp_path / "vae")
    breaks, expected = BROKEN_VAES[case]
    breaks(folder)
    with pytest.raises(options.UserError) as error:
        VAE(str(folder))
    assert str(error.value).replace(repr(str(folder)), "VAE").startswith(expected)


@pytest.mark.parametrize("name", ["ema", "mse", "someone/something"])
def test_unreachable_hub(name, train_arguments, refused, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    asked = []

    def unreachable(hub_id, **_):
        asked.append(hub_id)
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more lines of advice")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", unreachable)
    hub_id = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}.get(name, name)
    for offline, hub in (("0", "hub"), ("1", "hub (HF_HUB_OFFLINE is set)")):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        message = refused(train.main, train_arguments(tmp_path / "run", vae=name))
        start = f"--vae {name!r}: {hub_id} cannot be fetched from the Hugging Face {hub}: We couldn't connect to "
        assert message.startswith(f"{start}'https://huggingface.co'; check the name and the network, or pass a local ")
    assert asked == [hub_id] * 2


def test_geometry_is_read_from_the_autoencoder(make_vae):
    found = VAE(str(make_vae(stages=3, scaling_factor=0.25))).config
    assert (found.downsampling, found.latent_channels, found.scaling_factor, found.shift_factor) == (4, 4, 0.25, 0)


# Every command


def test_samples_that_cannot_be_measured(refused, tmp_path):
    path, images, labels = tmp_path / "samples.npz", np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int64)
    objects, whole = np.array([{"an": "object"}] * 2), io.BytesIO()
    np.savez(whole, arr_0=images, arr_1=labels)
    whole = whole.getvalue()
    damaged = (b"", b"not an archive", whole[:200], whole[:-50], whole[:200] + b"x" * 20 + whole[220:])
    for written, message in (
        (None, "does not exist"),
        *((contents, "cannot be read (") for contents in damaged),
        ((images[..., 0], labels), "holds arr_0 uint8 (2, 8, 8), arr_1 (2,)"),
        ((images, np.zeros(3)), "holds arr_0 uint8 (2, 8, 8, 3), arr_1 (3,)"),
        ((objects, labels), "holds arr_0 object (2,), arr_1 (2,)"),
        ((images, objects), "cannot be read ("),
    ):
        if isinstance(written, bytes):
            path.write_bytes(written)
        elif written is not None:
            np.savez(path, arr_0=written[0], arr_1=written[1])
        found = refused(measure.main, ["--samples", path])
        assert found.startswith(f"--samples {str(path)!r} {message}")
        assert found.endswith("; expected an .npz of sample_ddp.py, with images arr_0 uint8 (N, H, W, 3) and labels "
                              "arr_1 (N,)")  # fmt: skip


def test_control_characters_are_made_visible(refused, tmp_path):
    path = tmp_path / "two\nlines\x1b[31m"
    assert str(path) not in refused(sample_ddp.main, ["--ckpt", path])
    assert options.one_line("a\nb\x1b[31m\x00\x7f") == "a\\nb\\x1b[31m\\x00\\x7f"


def test_help_is_not_a_mistake(capsys):
    for main in (train.main, sample.main, sample_ddp.main, cache_latents.main, evaluate.main, evaluate_loss.main):
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith("usage: ")
