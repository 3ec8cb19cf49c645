"""Options that commands share: one for each field of RopeConfig, what belongs together, and argument files."""

import importlib
from dataclasses import dataclass
from pathlib import Path

import pytest

import export
import sample_ddp
import train
from rope import RopeConfig
from runtime import options
from runtime.options import UserError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Wider(RopeConfig):
    """Fields of which options.py says nothing."""

    turn: float = 0.0
    rings: int = 2
    mirrored: bool = True
    origin: str = "centre"


@pytest.fixture
def parser(monkeypatch):
    monkeypatch.setattr(options, "RopeConfig", Wider)
    parser = options.Parser()
    options.add_rope_options(parser)
    return parser


def test_a_new_field_gets_its_option_from_its_default(parser):
    given = "--use-rope --rope-rotate 2 --rope-turn -1e-3 --rope-rings 3 --no-rope-mirrored --rope-origin corner"
    found = options.rope_from_args(parser.parse_args(given.split()))
    assert found == Wider(rotate=2, turn=-1e-3, rings=3, mirrored=False, origin="corner")
    assert options.rope_from_args(parser.parse_args(["--use-rope"])) == Wider()
    assert "see RopeConfig in rope.py (default: 0.0)" in " ".join(parser.format_help().split())
    for flag, value, kind in (("turn", "nan", "a number"), ("rings", "2.5", "a whole number")):
        with pytest.raises(UserError, match=f"argument --rope-{flag}: '{value}' is not {kind} that is finite"):
            parser.parse_args([f"--rope-{flag}", value])


def test_a_number_of_too_many_digits_is_refused(refused):
    for flag, digits in (("--max-steps", "1" * 400), ("--global-seed", "1" * 400), ("--max-steps", "9" * 5000)):
        message = refused(train.main, ["--data-path", "a", flag, digits])
        assert message.startswith(f"argument {flag}: {digits!r} is not a whole number ")
    assert options.count(str(2**63 - 1)) == 2**63 - 1


SCRIPTS = [path.relative_to(ROOT) for folder in ("", "demo", "experiments") for path in (ROOT / folder).glob("*.py")]
COMMANDS = [script for script in SCRIPTS if "@options.command" in (ROOT / script).read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", [".".join(script.with_suffix("").parts) for script in COMMANDS] + ["runtime.report"])
def test_commands_do_without_docstrings(name, monkeypatch, capsys):
    """Which PYTHONOPTIMIZE=2 takes away."""
    command = importlib.import_module(name)
    first = " ".join(command.__doc__.splitlines()[0].split())
    for is_described in (True, False):
        with pytest.raises(SystemExit) as stopped:
            command.main(["--help"])
        assert stopped.value.code == 0 and (first in " ".join(capsys.readouterr().out.split())) == is_described
        monkeypatch.setattr(command, "__doc__", None)


def test_every_entry_of_the_table_is_a_field():
    assert options.ROPE_OPTIONS.keys() <= RopeConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("arguments", [["--dry-run", "--planned", "2"], ["--planned", "2", "--dry-run"]])
def test_planned_belongs_to_a_dry_run(arguments, refused):
    assert train.build_parser().parse_args(["--data-path", "a", *arguments]).planned == 2
    assert sample_ddp.build_parser().parse_args(arguments).planned == 2
    assert refused(sample_ddp.main, ["--planned", "2"]) == (
        "--planned 2 given without --dry-run; add --dry-run, or leave it out"
    )
    assert refused(export.main, ["--ckpt", "a", "--out", "b", "--planned", "2"]).startswith("unrecognized arguments: ")


@pytest.fixture
def small_parser():
    parser = options.Parser()
    parser.add_argument("--lr", type=options.positive, default=0.1)
    parser.add_argument("--epochs", type=options.count, default=None)
    parser.add_argument("--name", default="")
    return parser


def test_argument_files_are_read_in_their_place(small_parser, tmp_path):
    (tmp_path / "inner.args").write_text("--epochs 3\n")
    (tmp_path / "some.args").write_text(f"# why\n\n--lr 0.2  # this\n--name 'a b#c'\n\"@{tmp_path}/inner.args\"\n")
    file = f"@{tmp_path}/some.args"
    args = small_parser.parse_args([file])
    assert (args.lr, args.name, args.epochs) == (0.2, "a b#c", 3)
    assert small_parser.parse_args([file, "--lr", "0.3"]).lr == 0.3
    assert small_parser.parse_args(["--lr", "0.3", file]).lr == 0.2
    assert small_parser.parse_args([file, "--epochs", "none"]).epochs is None
    assert small_parser.parse_args(["--name=@home"]).name == "@home"


@pytest.mark.parametrize(
    "contents, message",
    [
        (None, "argument file '.*some.args' cannot be read (No such file or directory); give one such as recipes/demo"),
        (b"--name \xff", "argument file '.*some.args' cannot be read (it is not UTF-8); give one"),
        (b"--name 'a", 'line "--name \'a" of an argument file cannot be read (No closing quotation); quote it'),
        (b"--lr 0", "argument --lr: '0' is not a number > 0"),
        (b"--lr none", "argument --lr: 'none' is not a number > 0"),
    ],
)
def test_unusable_argument_files_are_refused(small_parser, tmp_path, contents, message):
    if contents is not None:
        (tmp_path / "some.args").write_bytes(contents)
    with pytest.raises(UserError) as error:
        small_parser.parse_args([f"@{tmp_path}/some.args"])
    assert str(error.value).startswith(message.replace(".*", f"{tmp_path}/"))
