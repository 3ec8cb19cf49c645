"""Options that commands share: one for each field of RopeConfig, and what belongs together."""

from dataclasses import dataclass

import pytest

import export
import sample_ddp
import train
from rope import RopeConfig
from runtime import options
from runtime.options import UserError


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
