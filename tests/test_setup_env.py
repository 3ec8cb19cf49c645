"""setup_env.sh with two tiny packages in a folder in place of an index, and the requirement files."""

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


def publish(folder: Path, name: str, files: dict[str, str]) -> None:
    """A wheel of version 1.0."""
    info = f"{name}-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the packages, and an empty environment to be copied, since making one takes seconds."""
    folder = tmp_path_factory.mktemp("prepared")
    subprocess.run([BASE, "-m", "venv", folder / "venv"], check=True)
    publish(folder, "alpha", {"alpha.py": ""})
    publish(folder, "beta", {"beta.py": ""})
    modules = Path(packaging.__file__).parent.glob("*.py")
    publish(folder, "packaging", {f"packaging/{path.name}": path.read_text() for path in modules})
    return folder


class Installation:
    """A copy of setup_env.sh where `python3 -m venv` copies the empty environment."""

    def __init__(self, folder: Path, prepared: Path):
        self.root = folder / "a repo's $copy"
        self.root.mkdir()
        shutil.copy(ROOT / "setup_env.sh", self.root)
        self.require("alpha>=1.0  # which\n\npackaging", "beta>=1.0")
        self.bin = folder / "bin"
        self.bin.mkdir()
        copy = f'[ "$1 $2" = "-m venv" ] && exec cp -R "{prepared}/venv" "$3"'
        self.program("python3", f'{copy}\nexec "{BASE}" "$@"')
        self.before = self.files()
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_USER": "1",  # of no use in an environment, yet in many people's configuration
            "PIP_FIND_LINKS": str(prepared),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def require(self, requirements: str, development: str) -> None:
        (self.root / "requirements.txt").write_text(requirements + "\n")
        (self.root / "requirements-dev.txt").write_text(development + "\n")

    def files(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())

    def start(self, *files: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(self.root / "setup_env.sh"), *files],
            env=self.environment | environment,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *files: str, status: int = 0, **environment: str) -> str:
        process = self.start(*files, **environment)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == status, output
        return output

    def has(self, name: str) -> bool:
        return bool(list((self.root / ".venv").glob(f"lib/python*/site-packages/{name}.py")))


@pytest.fixture
def installation(tmp_path, prepared):
    return Installation(tmp_path, prepared)


def test_environment_is_made_once_extended_and_remade(installation):
    output = installation.run()
    assert re.search(r"^setup_env.sh: making .venv with python3, once: about .* GB to download", output, re.MULTILINE)
    assert installation.has("alpha") and not installation.has("beta")
    assert installation.files() == sorted([*installation.before, ".venv"])
    assert not (installation.root / ".venv" / ".tmp").exists()
    assert installation.run() == f"{installation.root}/.venv/bin/python has everything\n"

    keep = installation.root / ".venv" / "keep"
    keep.touch()
    installation.run("requirements.txt", "requirements-dev.txt")
    assert installation.has("beta") and keep.exists()

    # What can't be added leaves the environment as it was.
    installation.require("alpha>=1.0", "nowhere>=1.0")
    output = installation.run("requirements.txt", "requirements-dev.txt", status=1)
    assert output.endswith("setup_env.sh: error: that failed, see above; the same command tries again\n")
    installation.run()
    assert keep.exists()

    installation.require("beta>=1.0\npackaging", "")
    (installation.root / ".venv" / ".complete").unlink()  # as an interruption by SIGKILL leaves it
    assert "making .venv" in installation.run()
    assert installation.has("beta") and not installation.has("alpha") and not keep.exists()


def test_failed_installation_leaves_nothing(installation):
    installation.require("nowhere>=1.0", "")
    assert "see above; the same command tries again\n" in installation.run(status=1)
    assert installation.files() == installation.before


def test_uv_is_used_where_it_is_installed(installation):
    """With a stand-in that has the two commands of uv."""
    pip = f'shift 3; python=$1/bin/python; shift; exec "{BASE}" -m pip --python "$python" install "$@"'
    make = f'for last; do :; done; exec "{installation.bin}/python3" -m venv "$last"'
    installation.program("uv", f'echo "uv $1 $2" >&2\nif [ "$1" = venv ]; then {make}; fi\n{pip}')
    output = installation.run(PIP_USER="0")
    assert "making .venv with uv" in output and "uv venv" in output and "uv pip" in output
    assert installation.has("alpha")
    assert installation.run() == f"{installation.root}/.venv/bin/python has everything\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_installation_leaves_nothing_and_starts_again(installation, number):
    process = installation.start()
    while not (installation.root / ".venv" / ".tmp").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and output.endswith("setup_env.sh: interrupted\n")
    assert installation.files() == installation.before
    installation.run()
    assert installation.has("alpha")


def test_two_starts_at_once_make_it_once(installation):
    both = [installation.start(), installation.start()]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("making .venv with" in output for output in outputs) == 1
    assert installation.files() == sorted([*installation.before, ".venv"])


def test_lock_of_a_dead_process_does_not_block(installation):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = subprocess.check_output(["bash", "-c", "echo $HOSTNAME"], text=True, env=installation.environment).strip()
    (installation.root / ".venv-lock").symlink_to(f"{host}:{dead.pid}")
    both = [installation.start(), installation.start()]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sum("making .venv with" in output for output in outputs) == 1


def test_old_python_is_not_enough(installation):
    installation.program("python3", "exit 1")
    for tool in ["bash", "dirname", "mkdir", "rm", "ln", "readlink", "sleep"]:
        (installation.bin / tool).symlink_to(shutil.which(tool))
    output = installation.run(status=2, PATH=str(installation.bin))
    assert "setup_env.sh: error: needs uv, or Python >= 3.11 with its venv" in output
    assert installation.files() == installation.before


@pytest.mark.parametrize(
    "requirement, missing",
    [
        ("PyTest>=1.10  # as numbers", None),
        ("pytest>=999", "pytest>=999 is needed, it has "),
        ("no-such-package>=1", "No package metadata was found for no-such-package"),
    ],
)
def test_active_python_is_taken_as_it_is_if_it_has_everything(installation, requirement, missing):
    installation.program("python", f'exec "{sys.executable}" "$@"')
    installation.require(requirement, "")
    output = installation.run(status=1 if missing else 0)
    if missing is None:
        assert output == "python has everything\n"
    else:
        assert re.match(rf"setup_env.sh: the active Python is not used: .*{re.escape(missing)}", output)
    assert installation.files() == installation.before


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirement_files_have_lower_bounds(name):
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    assert all([bound.operator for bound in Requirement(line).specifier] == [">="] for line in lines if line)


def test_conda_installs_the_same():
    assert "- -r requirements.txt" in (ROOT / "environment.yml").read_text()
