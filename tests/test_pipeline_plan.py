"""The plan of run_all.sh, made in the process: names of folders, arguments of the stages, mistakes before them."""

import dataclasses
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import sample_ddp
import train
from rope import RopeConfig
from runtime import options, pipeline
from runtime.options import UserError

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = "RoPE_rotate0_theta10000_freqslang_maxfreqlang1.5_minfreqlang0.0_trunc0.0_samethetaFalse_seed0"


class Plan:
    """What run_all.sh is told: values by name, and the arguments of each stage."""

    def __init__(self, fields: list[tuple[str, str]]):
        self.shell = {name: value for name, value in fields if name not in pipeline.COMMANDS}
        self.arguments = {stage: [value for name, value in fields if name == stage] for stage in pipeline.COMMANDS}

    def parse(self, stage: str, *needed: str):
        return pipeline.importlib.import_module(pipeline.COMMANDS[stage]).parse_args([*self.arguments[stage], *needed])


def make_plan(command: str = "", start: Path = ROOT, **environment: str) -> Plan:
    """make_plan("True 2 EPOCHS=3"): the positions and variables of a command line; more variables by their names."""
    words = shlex.split(command)
    environment |= dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
    positions = [word for word in words if not re.match("[A-Z_]+=", word)]
    return Plan(pipeline.make_plan(str(start), positions, {"HOME": "/root"} | environment))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(pipeline, "has_nvidia_driver", lambda: False)


@pytest.fixture
def plan(monkeypatch):
    """make_plan without dry runs."""
    monkeypatch.setattr(pipeline.Stage, "dry_run", lambda *_: None)
    return make_plan


def refusal(command: str = "", **environment: str) -> str:
    before = sorted(os.listdir(ROOT))
    with pytest.raises(UserError) as error:
        make_plan(command, **environment)
    assert sorted(os.listdir(ROOT)) == before
    return str(error.value)


FOLDERS = {
    "": f"DiT-XS-2/{DEFAULT}",
    " ".join(["-"] * 11): f"DiT-XS-2/{DEFAULT}",
    "YES 0 10000 lang 10 0.0 1.5 0.0 False 0 DiT-XS/2": f"DiT-XS-2/{DEFAULT}",
    "1 0 1e4 - 10.0 0 1.50 0 no - -": f"DiT-XS-2/{DEFAULT}",
    "False": "DiT-XS-2/NoRoPE_seed0",
    "False ROPE_BORDER=exact": "DiT-XS-2/NoRoPE_seed0",
    "- - ROPE_BORDER=exact": f"DiT-XS-2/{DEFAULT.replace('_seed0', '_borderexact_seed0')}",
    "no 0 1e4 lang - - - - - 5 DiT-L/8": "DiT-L-8/NoRoPE_seed5",
    "- 3 - - - - - - - - DiT-XL/2": f"DiT-XL-2/{DEFAULT.replace('rotate0', 'rotate3')}",
    "- - - - - - - - - 123": f"DiT-XS-2/{DEFAULT.replace('seed0', 'seed123')}",
    "- 8 500 - - .5 1 0.25 True": "DiT-XS-2/RoPE_rotate8_theta500_freqslang_maxfreqlang1.0_minfreqlang0.25_trunc0.5"
    "_samethetaTrue_seed0",
    "- 2 1e-3 pixel 3.75 1 1e20": "DiT-XS-2/RoPE_rotate2_theta0.001_freqspixel_maxfreq3.75_trunc1.0_samethetaFalse"
    "_seed0",
    "- - 123456.789012345 - - - 1e-7": "DiT-XS-2/RoPE_rotate0_theta123456.789012_freqslang_maxfreqlang1e-07"
    "_minfreqlang0.0_trunc0.0_samethetaFalse_seed0",
}


@pytest.mark.parametrize("positions", FOLDERS)
def test_folder_names_tell_the_settings_as_those_of_old_runs_do(plan, positions):
    found = plan(positions)
    assert found.shell["RUN_DIR"] == f"results/demo/{FOLDERS[positions]}"
    sample = found.parse("sample")
    run = found.parse("train").results_dir
    assert str(run) == sample.ckpt == found.shell["RUN_DIR"] and sample.sample_dir == run / "samples"


LATENTS = {
    "": "results/demo/latents/digits-64-vae-demo_vae-noflip",
    "FLIP=yes IMAGE_SIZE=64x32 VAE=me/my-vae": "results/demo/latents/digits-64x32-vae-my-vae",
    "DATA_PATH=docs/images/": "results/latents/docs-images-256-vae-ema",
    "DATA_PATH=/tmp VAE='/my vae/'": "results/latents/tmp-256-vae-my vae",
    "LATENTS_DIR=/cache": "/cache",
}


@pytest.mark.parametrize("command", LATENTS)
def test_latents_are_named_after_what_decides_them(plan, command):
    found = plan(command)
    assert found.parse("cache").latents_dir == found.parse("train").latents_dir == Path(LATENTS[command])


def test_every_position_reaches_train(plan):
    args = plan("yes 4 100 pixel 20 0.25 2 0.125 TRUE 7 DiT-S/4").parse("train")
    rope = RopeConfig(4, 100.0, "pixel", 20.0, 0.25, 2.0, 0.125, True)
    assert (options.rope_from_args(args), args.global_seed, args.model) == (rope, 7, "DiT-S/4")
    assert plan().parse("train").use_rope and not plan("False").parse("train").use_rope


def test_recipes_are_those_of_the_data(plan):
    demo, published = plan("FID_REFERENCE=r"), plan("FID_REFERENCE=r DATA_PATH=docs/images")
    args = demo.parse("train")
    assert (args.max_steps, args.epochs, args.lr, args.warmup_steps) == (2000, None, 0.01, "auto")
    assert demo.shell["DIGITS"] == "results/demo/digits" == str(demo.parse("cache").data_path)
    args = demo.parse("sample")
    assert (args.num_fid_samples, args.class_balanced) == (200, True) and Path(args.vae, "config.json").exists()
    args = published.parse("train")
    assert (args.model, args.epochs, args.max_steps, args.lr, args.flip) == ("DiT-B/4", 80, None, 1e-4, True)
    args = published.parse("sample")
    assert (args.num_fid_samples, args.cfg_scale, args.vae, args.global_seed) == (50_000, 1.0, "mse", 100)
    assert published.parse("cache").flip and not demo.parse("cache").flip
    metrics = demo.parse("evaluate", "--samples=s").metrics
    assert published.parse("evaluate", "--samples=s").metrics == [*metrics, "kid"]
    assert published.shell["DIGITS"] == "" and published.shell["RUN_DIR"] == f"results/DiT-B-4/{DEFAULT}"
    mixed = plan("DATA_PATH=docs/images RECIPE=demo")
    assert mixed.parse("train").lr == 0.01 and mixed.parse("cache").data_path == Path("docs/images")


def test_variables_are_options_positions_win_and_extra_arguments_win_over_both(plan):
    found = plan(
        """- - - - - - - - - 8 EPOCHS=5 LR=0.5 GRAD_CLIP=none COMPILE=1 FLIP=no KEEP_CHECKPOINTS= VAL_FRACTION=0.1
        PRECISION=bf16 NUM_WORKERS=3 IMAGE_SIZE=128 GLOBAL_SEED=9 SAMPLE_SEED=1 SAMPLING_STEPS=20 CLASS_BALANCED=no
        MODEL=DiT-S/2 SAMPLE_ARGS='--weights model'
        TRAIN_ARGS='--lr 0.25 --wandb-project "a b" --use-wandb --val-every=3'
        ETA='no option has this name' WANDB_PROJECT='of another program'"""
    )
    args, cache, sample = found.parse("train"), found.parse("cache"), found.parse("sample")
    assert (args.epochs, args.max_steps, args.lr, args.grad_clip, args.global_seed) == (5, None, 0.25, None, 8)
    assert (args.compile, args.flip, args.val_fraction, args.val_every) == (True, False, 0.1, 3)
    assert (args.model, args.wandb_project, args.image_size) == ("DiT-S/2", "a b", (128, 128))
    assert (cache.flip, cache.num_workers, cache.image_size) == (False, 3, (128, 128))
    assert (sample.precision, sample.global_seed, sample.num_sampling_steps) == ("bf16", 1, 20)
    assert (sample.class_balanced, sample.weights, sample.image_size) == (False, "model", None)
    assert plan("- - - - - - - - - - DiT-B/2 MODEL=DiT-S/2").parse("train").model == "DiT-B/2"
    assert plan("False USE_ROPE=True ROPE_ROTATE=2").parse("train").use_rope is None
    assert plan("USE_ROPE=False").parse("train").use_rope is None
    assert plan("GRAD_CLIP=").parse("train").grad_clip is None and plan().parse("train").grad_clip == 1


@pytest.mark.parametrize("recipe", ["", "DATA_PATH=docs/images"])
def test_epochs_and_steps_take_each_others_place(plan, recipe):
    lengths = ["EPOCHS=99", "MAX_STEPS=9", "EPOCHS=99 MAX_STEPS=9"]
    found = [plan(f"{recipe} {given}").parse("train") for given in lengths]
    assert [(args.epochs, args.max_steps) for args in found] == [(99, None), (None, 9), (99, 9)]


VAES = {  # by the command, what encodes and what decodes
    "": ("assets/demo_vae", "assets/demo_vae"),
    "VAE=ema": ("ema", "mse"),
    "VAE=mse": ("mse", "mse"),
    "VAE=me/vae": ("me/vae", "me/vae"),
    "SAMPLE_VAE=ema": ("assets/demo_vae", "ema"),
    "VAE=ema SAMPLE_VAE=me/vae": ("ema", "me/vae"),
}


@pytest.mark.parametrize("command", VAES)
def test_samples_are_decoded_by_the_fitting_autoencoder(plan, command):
    found = plan(command)
    assert found.parse("cache").vae == found.parse("train").vae
    assert (found.parse("train").vae, found.parse("sample").vae) == VAES[command]


def test_stages_without_anything_to_do_are_left_out(plan):
    found = plan("CACHE_LATENTS=0")
    assert found.arguments["cache"] == found.arguments["evaluate"] == []
    args = found.parse("train")
    assert (args.data_path, args.latents_dir) == (Path("results/demo/digits"), None)
    found = plan("FID_REFERENCE=/ref.npz FID_METRICS=fid,is INCEPTION_WEIGHTS=/w.pth NUM_WORKERS=2")
    args = found.parse("evaluate", "--samples=s.npz")
    assert (args.reference, args.metrics, args.inception_weights) == (Path("/ref.npz"), ["fid", "is"], Path("/w.pth"))
    assert (args.samples_expected, args.num_workers) == (200, 2)


def test_relative_paths_are_those_of_the_folder_one_is_in(plan, tmp_path):
    tmp_path /= 'käse "$HOME"\n\'s'
    tmp_path.mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "-images").mkdir()
    (tmp_path / "some.args").write_text("--lr 0.5")
    found = plan(
        """DATA_PATH=-images VAE=vae RESULTS_BASE=out FID_REFERENCE=r LATENTS_DIR=l INCEPTION_WEIGHTS=w
        TRAIN_ARGS='--val-data-path val @some.args' EVALUATE_ARGS=--cache-dir=c""",
        start=tmp_path,
    )
    args, evaluate = found.parse("train"), found.parse("evaluate", "--samples=s")
    assert found.parse("cache").data_path == tmp_path / "-images" and args.vae == f"{tmp_path}/vae"
    assert (args.latents_dir, args.val_data_path, args.lr) == (tmp_path / "l", tmp_path / "val", 0.5)
    assert args.results_dir == tmp_path / "out" / "DiT-B-4" / DEFAULT
    assert (evaluate.reference, evaluate.cache_dir) == (tmp_path / "r", tmp_path / "c")
    assert evaluate.inception_weights == tmp_path / "w"
    assert plan("RESULTS_BASE=out", start=ROOT / "docs").shell["RUN_DIR"].startswith("docs/out/")


def test_processes_are_counted(plan, monkeypatch):
    assert plan().shell["NPROC_PER_NODE"] == "1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert plan().shell["NPROC_PER_NODE"] == "4" and plan("NPROC_PER_NODE=2").shell["NPROC_PER_NODE"] == "2"
    found = plan("NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1").shell
    expected = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert expected.items() <= found.items()


def test_driver_without_a_gpu_is_told(plan, monkeypatch):
    monkeypatch.setattr(pipeline, "has_nvidia_driver", lambda: True)
    message = refusal()
    assert re.match(
        r"this machine has an NVIDIA driver, but PyTorch \d.*, built .* CUDA.*, sees no GPU; install", message
    )
    for wanted in ("NPROC_PER_NODE=1", "CUDA_VISIBLE_DEVICES=-1", "CUDA_VISIBLE_DEVICES="):
        assert plan(wanted).shell["NPROC_PER_NODE"] == "1"


NUMBER, WHOLE = "is not a number", "is not a whole number"
WRONG = {
    "maybe": "argument 1, USE_ROPE: 'maybe' is not True or False",
    "- 2.5": f"argument 2, ROTATE: '2.5' {WHOLE} >= 0; - keeps the default",
    "- 5": "argument 2, ROTATE: --rope-rotate 5 does not fit DiT-XS/2; expected one of 0, 1, 2, 4, 8, 16; - keeps",
    "- 4 - - - - - - - - DiT-XL/2": "argument 2, ROTATE: --rope-rotate 4 does not fit DiT-XL/2; expected one of 0, 1,",
    "- - 10,000": f"argument 3, THETA: '10,000' {NUMBER} > 0",
    "- - - Lang": "argument 4, FREQS_FOR: invalid choice: 'Lang' (choose from 'lang', 'pixel')",
    "- - - - -3": f"argument 5, MAX_FREQ: '-3' {NUMBER} > 0",
    "- - - - - 1.01": f"argument 6, TRUNCATE_PERCENTAGE: '1.01' {NUMBER} with 0 <= value <= 1",
    "- - - - - - 0.0": f"argument 7, MAX_FREQ_LANG: '0.0' {NUMBER} > 0",
    "- - - - - - - -0.1": f"argument 8, MIN_FREQ_LANG: '-0.1' {NUMBER} >= 0",
    "- - - - - - - - 2": "argument 9, SAME_THETA: '2' is not True or False",
    "- - - - - - - - - 1.0": f"argument 10, SEED: '1.0' {WHOLE} with 0 <= value",
    "- - - - - - - - - - DiT-M/2": "argument 11, MODEL: 'DiT-M/2' is not a model; expected DiT-{",
    "- - - - - - - - - - - 1": "12 arguments, expected at most 11; bash run_all.sh -h lists them",
    "True 2 -x": "unknown option '-x', expected positions; bash run_all.sh -h lists them",
    "False 2": "argument 2, ROTATE: '2' is for RoPE, but USE_ROPE is False; give - for ROTATE, or True for USE_ROPE",
    "False x": f"argument 2, ROTATE: 'x' {WHOLE}",
    "False - - - - - - - True": "argument 9, SAME_THETA: 'True' is for RoPE, but USE_ROPE is False; give - for",
    "EPOCHS=0": f"EPOCHS: '0' {WHOLE} >= 1",
    "MAX_STEPS=60 WARMUP_STEPS=60": "WARMUP_STEPS: --warmup-steps 60 leaves nothing of the run's 60 steps",
    "GLOBAL_BATCH_SIZE=6 NPROC_PER_NODE=2 NNODES=2 MASTER_ADDR=a": "GLOBAL_BATCH_SIZE: --global-batch-size 6 is not "
    "divisible by 4 processes",
    "IMAGE_SIZE=100": "IMAGE_SIZE: --image-size 100 is not divisible by 16",
    "TRAIN_ARGS='--image-size 32'": "stage 0 makes latents of --image-size 64, stage 1 takes 32; set IMAGE_SIZE",
    "TRAIN_ARGS=--flip": "stage 0 makes no flipped latents, which --flip of stage 1 takes; set FLIP for both",
    "TRAIN_ARGS=--dry-run": "TRAIN_ARGS: --dry-run is for the command by itself; leave it out",
    "SAMPLE_ARGS=--print-name": "SAMPLE_ARGS: --print-name is for the command by itself; leave it out",
    "TRAIN_ARGS='--val-data-path no/such'": "TRAIN_ARGS: --val-data-path 'no/such' is not a folder",
    "SAMPLE_ARGS='--image-size 100'": "SAMPLE_ARGS: --image-size 100 is not divisible by 16",
    "SAMPLING_STEPS=1001": f"SAMPLING_STEPS: '1001' {WHOLE}",
    "FLIP=sometimes": "FLIP: 'sometimes' is not True or False",
    "CACHE_LATENTS=on": "CACHE_LATENTS: 'on' is not True or False",
    "NPROC_PER_NODE=gpu": f"NPROC_PER_NODE: 'gpu' {WHOLE}",
    f"NNODES={'9' * 30}": f"NNODES: '{'9' * 30}' {WHOLE}",
    "NODE_RANK=1": "NODE_RANK: 1 is not less than NNODES, which is 1",
    "NNODES=2": "MASTER_ADDR is not set and NNODES is 2",
    "MASTER_PORT=70000": f"MASTER_PORT: '70000' {WHOLE}",
    "FID_REFERENCE=no/such.npz": "FID_REFERENCE: --reference 'no/such.npz'",
    "FID_REFERENCE=assets FID_METRICS=fid,": "FID_METRICS: '' is not a metric",
    "DATA_PATH=no/such": "DATA_PATH: 'no/such' does not exist; expected a folder with a sub-folder",
    "DATA_PATH=run_all.sh": "DATA_PATH: --data-path 'run_all.sh'",
    "VAE=/no/such/vae": "VAE: --vae '/no/such/vae' is not a folder; expected ema, mse, a hub id",
    "SAMPLE_VAE=a/b/c": "SAMPLE_VAE: --vae 'a/b/c' is not a folder",
    "RESULTS_BASE=run_all.sh/x": "RESULTS_BASE: --latents-dir 'run_all.sh/x/latents/",
    "RECIPE=mine DATA_PATH=docs": "RECIPE: argument file 'recipes/mine/cache.args' cannot be read (No such",
    "RECIPE=imagenet": "RECIPE: 'imagenet' needs data; set DATA_PATH",
    """TRAIN_ARGS="--lr 'x" """: 'TRAIN_ARGS: "--lr \'x" cannot be divided into arguments (No closing quotation)',
    "TRAIN_ARGS='--lr x'": f"TRAIN_ARGS: 'x' {NUMBER} > 0",
    "TRAIN_ARGS=@no/such.args": "TRAIN_ARGS: argument file 'no/such.args' cannot be read (No such file",
    "SAMPLE_ARGS=--nonsense": "SAMPLE_ARGS: unrecognized arguments: --nonsense",
}


@pytest.mark.parametrize("command", WRONG)
def test_mistakes_are_told_with_the_position_or_the_variable(command):
    assert refusal(command).startswith(WRONG[command])


@pytest.mark.parametrize("value", ["2\n3", "2;touch x", "$(touch x)", "`touch x`", "%s%n", "é", "@x", "--dry-run=1"])
def test_hostile_positions_are_only_text(value):
    for position in (1, 9):
        message = refusal(shlex.join(["-"] * position + [value]))
        assert message.startswith(("argument ", "unknown option ")) and repr(value) in message


def test_samples_too_few_for_a_metric_are_told_before_training(image_folder):
    given = {"FID_REFERENCE": str(image_folder), "FID_METRICS": "kid", "NUM_FID_SAMPLES": "999"}
    assert refusal(**given).startswith("kid needs 1000 images, more than the 999 of --samples")


def test_dry_runs_check_the_data(image_folder, vae_folder):
    given = {"DATA_PATH": str(image_folder), "VAE": str(vae_folder), "NUM_CLASSES": "1", "CACHE_LATENTS": "no"}
    assert refusal(**given).startswith("NUM_CLASSES: --num-classes 1 is less than the 3 class folders")


MISTYPED = {"EPOCS": "EPOCHS", "MAX_STEP": "MAX_STEPS", "DATAPATH": "DATA_PATH", "NPROC_PER_NODES": "NPROC_PER_NODE"}
MISTYPED |= {"GLOBAL_BATCHSIZE": "GLOBAL_BATCH_SIZE", "LATENT_DIR": "LATENTS_DIR", "TRAIN_ARG": "TRAIN_ARGS"}
MISTYPED |= {"FID_REFRENCE": "FID_REFERENCE", "NODERANK": "NODE_RANK", "NUM_WORKER": "NUM_WORKERS"}


@pytest.mark.parametrize("name", MISTYPED)
def test_mistyped_variables_are_noticed(name):
    assert refusal(**{name: "3"}).startswith(
        f"the environment has {name}, which is not read; did you mean {MISTYPED[name]}? If it is for another program"
    )


def test_variables_of_other_programs_are_left_alone(plan):
    names = set((ROOT / "tests" / "environment_names.txt").read_text().split()) - {"MASTER_ADDR", "MASTER_PORT"}
    assert len(names) > 500
    found = plan(**dict.fromkeys(names, "nonsense"))
    assert found.shell == plan().shell and found.arguments == plan().arguments


def test_every_option_has_a_variable_or_a_reason():
    stages = {name: pipeline.Stage(name, str(ROOT), "demo") for name in pipeline.COMMANDS}
    named = {flag for places in pipeline.variables(stages).values() for _, flag in places}
    flags = {
        flag for parser in (train.build_parser(), sample_ddp.build_parser()) for flag in parser._option_string_actions
    }
    others = {flag for flag in flags - named if not flag.startswith("--no-")}
    by_setting = {"--data-path", "--latents-dir"}
    assert others == {"-h", *by_setting, *pipeline.NO_VARIABLE}


def test_what_has_no_effect_is_said(plan, capsys):
    plan("- - - pixel")
    assert "FREQS_FOR pixel: THETA, MAX_FREQ_LANG and MIN_FREQ_LANG have no effect.\n" in capsys.readouterr().err
    plan("- - - - 20")
    text = capsys.readouterr().err
    assert "FREQS_FOR lang: MAX_FREQ has no effect.\n" in text and text.startswith("DATA_PATH is not set: this is")


def test_a_mistake_is_one_line_of_run_all_and_nothing_is_planned(capfdbinary):
    with pytest.raises(SystemExit) as stopped:
        pipeline.main([str(ROOT), "True", "a\nb"])
    output, errors = capfdbinary.readouterr()
    assert (stopped.value.code, output, errors.count(b"\n")) == (2, b"", 1)
    assert errors.startswith(b"run_all.sh: error: argument 2, ROTATE: 'a\\nb' is not a whole number")


def test_help_names_every_setting_and_tells_the_defaults():
    text = subprocess.check_output(["bash", ROOT / "run_all.sh", "-h"], text=True)
    for name in [*pipeline.SETTINGS, *pipeline.OTHER_NAMES]:
        assert name in text or name == "DEFAULT_MODEL"
    told = dict(re.findall(r"^ +\d+  (\w+) +(\S+) ", text, re.MULTILINE))
    defaults = [True, *dataclasses.astuple(RopeConfig())[:-1], 0]
    model = train.parse_args(["@recipes/imagenet/train.args", "--latents-dir=l"]).model
    assert list(told) == list(pipeline.POSITIONS) and told.pop("MODEL") == model
    assert [str(value).removesuffix(".0") for value in defaults] == [text.removesuffix(".0") for text in told.values()]
