"""setup_env.sh, mostly with a stand-in for Python that makes environments and installs in no time; the requirements."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import packaging
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
BASE = getattr(sys, "_base_executable", sys.executable)
READY = "{}/.venv/bin/python has everything\n"

# `-m venv` makes an environment whose Python is the stand-in too, and `-m pip install -r` notes what is in it.
STAND_IN = """\
import os, pathlib, shutil, sys, time

program, *arguments = sys.argv[1:]
packages = pathlib.Path(program).parent.parent / "packages"
if arguments[:2] == ["-m", "venv"]:
    (folder := pathlib.Path(arguments[2]) / "bin").mkdir(parents=True)
    for name in ("python", "pip"):
        shutil.copy(program, folder / name)
elif "install" in arguments:
    files = [path for flag, path in zip(arguments, arguments[1:]) if flag == "-r"]
    for line in " ".join(pathlib.Path(path).read_text() for path in files).split():
        name = line.split(">=")[0]
        if name == "slow":
            time.sleep(600)
        if name == "nowhere":
            sys.exit("no such package")
        (packages / f"{name}-1.0.dist-info").mkdir(parents=True, exist_ok=True)
        (packages / f"{name}-1.0.dist-info" / "METADATA").write_text(f"Name: {name}\\nVersion: 1.0\\n")
else:
    os.environ["PYTHONPATH"] = str(packages)
    os.execv(sys.executable, [sys.executable, *arguments])
"""


class Scripts:
    """A copy of scripts, of which start and run call the first, and a stand-in as the only Python on the PATH."""

    def __init__(self, folder: Path, stand_in: str, *scripts: str):
        self.root = folder / "it's a $HOME copy"
        self.root.mkdir()
        for name in scripts:
            shutil.copy(ROOT / name, self.root)
        self.script = scripts[0]
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "stand_in.py").write_text(stand_in)
        for name in ("python", "python3"):
            self.program(name, f'exec "{sys.executable}" -IS "{folder}/stand_in.py" "$0" "$@"')
        self.environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(folder)}
        self.environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}  # whatever happens, no download
        self.before = self.files()

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())

    def start(self, *arguments: str, cwd: Path = Path("/"), **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(self.root / self.script), *arguments],
            cwd=cwd,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, status: int = 0, **settings) -> tuple[str, str]:
        """Output and errors, after its status was checked."""
        process = self.start(*arguments, **settings)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == status, output + errors
        return output, errors


class Installation(Scripts):
    def __init__(self, folder: Path):
        super().__init__(folder, STAND_IN, "setup_env.sh", "requirements.txt", "requirements-dev.txt")
        self.require("alpha>=1.0", "beta>=1.0")

    def require(self, requirements: str, development: str = "") -> None:
        (self.root / "requirements.txt").write_text(requirements + "\n")
        (self.root / "requirements-dev.txt").write_text(development + "\n")

    def run(self, *files: str, **settings) -> str:
        output, errors = super().run(*files, **settings)
        return errors + output

    def packages(self) -> list[str]:
        return sorted(path.name.split("-")[0] for path in (self.root / ".venv" / "packages").iterdir())


@pytest.fixture
def installation(tmp_path):
    return Installation(tmp_path)


def test_environment_is_made_once_extended_and_remade(installation):
    installation.program("sleep", "")  # nobody else is waited for
    output = installation.run()
    assert re.search(r"^setup_env.sh: making .venv with python, once: up to .* GB to download", output, re.MULTILINE)
    assert installation.packages() == ["alpha"]
    assert installation.files() == sorted([*installation.before, ".venv"])
    assert not (installation.root / ".venv" / ".tmp").exists()
    assert installation.run() == READY.format(installation.root)

    installation.run("requirements.txt", "requirements-dev.txt")
    assert installation.packages() == ["alpha", "beta"]

    # What can't be added leaves the environment as it was.
    installation.require("alpha>=1.0", "nowhere>=1.0")
    output = installation.run("requirements.txt", "requirements-dev.txt", status=1)
    assert output.endswith("setup_env.sh: error: that failed, see above; the same command tries again\n")
    assert installation.packages() == ["alpha", "beta"] and installation.run() == READY.format(installation.root)

    # An environment as SIGKILL leaves it is made anew, also when it is the active one.
    (installation.root / ".venv" / ".complete").unlink()
    assert "making .venv" in installation.run(PATH=f"{installation.root}/.venv/bin:{installation.environment['PATH']}")
    assert installation.packages() == ["alpha"]


def make_wheel(folder: Path, name: str, version: str, needed: str = "") -> Path:
    """One that holds nothing but its name, and packaging its modules."""
    information = f"{name}-{version}.dist-info"
    files = {f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}"}
    files[f"{information}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{information}/RECORD"] = ""
    if name == "packaging":
        files |= {f"packaging/{path.name}": path.read_text() for path in Path(packaging.__file__).parent.glob("*.py")}
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return Path(wheel.filename)


def test_venv_and_pip_fill_it(installation, tmp_path):
    """With the real ones, from a folder in place of an index."""
    make_wheel(tmp_path, "packaging", "1.0")
    installation.program("python", f'exec "{BASE}" -I "$@"')
    installation.require("packaging>=1.0,<2  # which\n")
    installation.environment["PIP_USER"] = "1"  # of no use in an environment, yet in many people's configuration
    assert installation.run(PIP_FIND_LINKS=str(tmp_path)).endswith(READY.format(installation.root))
    assert list((installation.root / ".venv").glob("lib/python*/site-packages/packaging"))


def test_a_pytorch_that_fits_is_kept(installation, tmp_path):
    """That of the active Python is used from .venv, and what depends on PyTorch is chosen for it."""
    lender = tmp_path / "lender" / "site-packages"
    for name, version in (("packaging", "1.0"), ("torch", "2.6.0a0+vendor")):
        zipfile.ZipFile(make_wheel(tmp_path, name, version)).extractall(lender)
    make_wheel(tmp_path, "torch", "2.14.1")
    make_wheel(tmp_path, "torchvision", "0.29.1", "Requires-Dist: torch==2.14.1\n")
    make_wheel(tmp_path, "torchvision", "0.21.0", "Requires-Dist: torch==2.6.0a0\n")
    make_wheel(tmp_path, "timm", "1.0.31", "Requires-Dist: torch\n")
    installation.program("python", f'PYTHONPATH="{lender}" exec "{BASE}" "$@"')
    installation.program("python3", "exit 1")
    installation.program("uv", "exit 1")  # looks at the packages of its own environment alone
    installation.require("torch>=2.6\ntorchvision>=0.21\npackaging>=1.0\ntimm>=1.0.15")
    output = installation.run(PIP_FIND_LINKS=str(tmp_path))
    assert "the active Python is not used: it lacks torchvision>=0.21, timm>=1.0.15\n" in output
    assert "making .venv with python, once, upon its PyTorch: " in output
    assert output.endswith(READY.format(installation.root))
    found = {path.name for path in (installation.root / ".venv").glob("lib/python*/site-packages/*.dist-info")}
    assert {"torchvision-0.21.0.dist-info", "timm-1.0.31.dist-info"} <= found
    assert not any(name.startswith("torch-") for name in found)


def test_uv_is_used_where_it_is_installed(installation):
    """With a stand-in that has the two commands of uv: venv OPTION... FOLDER, pip install --python FOLDER OPTION..."""
    make = f'for last; do :; done; "{installation.bin}/python" -m venv "$last" && rm "$last/bin/pip" && exit'
    install = 'python=$4/bin/python; shift 4; exec "$python" -m pip install "$@"'
    installation.program("uv", f'echo "uv $1 $2" >&2\nif [ "$1" = venv ]; then {make}; fi\n{install}')
    output = installation.run()
    assert "making .venv with uv" in output and "uv venv" in output and "uv pip install" in output
    assert installation.packages() == ["alpha"]
    assert installation.run() == READY.format(installation.root)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_installation_leaves_nothing(installation, number):
    installation.require("slow")
    process = installation.start()
    while not (installation.root / ".venv" / ".tmp").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)  # to its end, which is that of pip too
    assert process.returncode == 128 + number and errors.endswith("setup_env.sh: interrupted\n")
    assert installation.files() == installation.before


@pytest.mark.parametrize("is_locked", [False, True])
def test_two_starts_at_once_make_it_once_also_beside_the_lock_of_a_dead_process(installation, is_locked):
    if is_locked:
        dead = subprocess.Popen(["true"])
        dead.wait()
        host = subprocess.check_output(["bash", "-c", "echo $HOSTNAME"], text=True, env=installation.environment)
        (installation.root / ".venv-lock").symlink_to(f"{host.strip()}:{dead.pid}")
    both = [installation.start(), installation.start()]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sum("making .venv with" in text for text in errors) == 1
    assert installation.files() == sorted([*installation.before, ".venv"])


def test_old_python_is_not_enough(installation):
    for name in ("python", "python3"):
        installation.program(name, "exit 1")
    for tool in ["bash", "dirname", "grep", "mkdir", "rm", "ln", "readlink", "sleep"]:
        (installation.bin / tool).symlink_to(shutil.which(tool))
    output = installation.run(status=2, PATH=str(installation.bin))
    assert "setup_env.sh: error: needs uv, or Python >= 3.11 with its venv" in output
    assert installation.files() == installation.before


def test_active_python_is_taken_as_it_is_if_it_has_everything(installation):
    installation.require("PyTest>=1.10  # as numbers\n\npackaging")
    assert installation.run() == "python has everything\n"
    assert installation.files() == installation.before
    installation.program("python", "exit 1")
    assert installation.run() == "python3 has everything\n"


@pytest.mark.parametrize(
    "requirement, missing",
    [
        ("pytest>=999", "pytest>=999, nowhere"),
        ("pytest  # any\nnowhere>=1", "nowhere>=1, nowhere"),
    ],
)
def test_what_the_active_python_lacks_is_said_and_a_failed_installation_leaves_nothing(
    installation, requirement, missing
):
    installation.require(f"{requirement}\nnowhere")
    output = installation.run(status=1)
    assert output.startswith(f"setup_env.sh: the active Python is not used: it lacks {missing}\n")
    assert output.endswith("setup_env.sh: error: that failed, see above; the same command tries again\n")
    assert installation.files() == installation.before


def requirements(name: str) -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def test_the_oldest_versions_are_the_lower_bounds():
    """oldest.txt names them all; besides, what these versions need older than its newest."""
    oldest = {found.name: str(found.specifier) for found in requirements("oldest.txt")}
    needed = requirements("requirements.txt") + requirements("requirements-dev.txt")
    assert all(specifier.startswith("==") for specifier in oldest.values())
    assert {found.name: str(found.specifier).replace(">=", "==") for found in needed}.items() <= oldest.items()


def test_conda_installs_the_same():
    assert "- -r requirements.txt" in (ROOT / "environment.yml").read_text()
