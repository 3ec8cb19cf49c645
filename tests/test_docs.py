"""Every command that README and docs print is one that the commands take: tried as a dry run, or at least parsed."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from runtime import pipeline
from runtime.options import UserError

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
# Commands whose dry run needs no file that the page's reader has and a test has not.
DRY = {"train", "cache_latents", "sample_ddp"}
OTHER_PROGRAMS = {"conda", "git", "pip", "sbatch", "tensorboard", "export", "source", "cd", "evaluator.py"}


def commands(page: str) -> list[str]:
    """The commands of the fenced bash blocks of a page, continued lines joined, comments dropped."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [shlex.join(found) for found in words if found]


def settings_and_command(line: str) -> tuple[dict[str, str], list[str]]:
    """Leading NAME=value words, and the rest."""
    words, settings = shlex.split(line), {}
    while words and (match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0], re.DOTALL)):
        settings[match[1]] = match[2]
        words.pop(0)
    return settings, words


def python_command(words: list[str]) -> tuple[str, list[str]] | None:
    """Module and arguments of a command of this repository, whatever starts it."""
    for index, word in enumerate(words):
        if word == "-m" and words[index + 1].split(".")[0] in ("demo", "experiments", "runtime"):
            return words[index + 1], words[index + 2 :]
        if re.fullmatch(r"[a-z_]+\.py", word) and (ROOT / word).exists():
            return word.removesuffix(".py"), words[index + 1 :]
    return None


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_documentation_are_accepted(page, image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")  # nobody has logged in here
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for line in commands(page):
        line = line.replace("/path/to/val", shlex.quote(str(image_folder)))  # which no earlier command makes
        settings, words = settings_and_command(line)
        if words[0] in OTHER_PROGRAMS or (words[:2] == ["python", "-m"] and words[2] in ("pip", "pytest")):
            continue
        if words[0] == "bash" or words[1].startswith("tests/"):
            assert (ROOT / words[1]).exists(), line
            if words[1] == "run_all.sh" and words[2:] != ["-h"]:
                monkeypatch.setattr(pipeline.Stage, "dry_run", lambda *_: None)
                settings |= {"DATA_PATH": str(image_folder)} if "DATA_PATH" in settings else {}
                pipeline.make_plan(str(tmp_path), words[2:], settings)
            continue
        found = python_command(words)
        assert found is not None, f"{page}: {line!r} is no command of this repository"
        check(*found, line)


def check(name: str, arguments: list[str], line: str) -> None:
    module = importlib.import_module(name)
    try:
        if name in DRY:
            module.main([*arguments, "--dry-run", "--planned", "8"])
        elif hasattr(module, "parse_args"):
            module.parse_args(arguments)
        else:
            module.build_parser().parse_args(arguments)
    except (UserError, SystemExit) as error:
        pytest.fail(f"{line!r} is refused: {error}")
