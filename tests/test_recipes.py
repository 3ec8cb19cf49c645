"""Argument files, and the recipes that are given in them."""

import os
from pathlib import Path

import pytest

import cache_latents
import evaluate
import sample_ddp
from runtime import options
from runtime.options import Parser, UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def parser():
    parser = Parser()
    parser.add_argument("--lr", type=options.positive, default=0.1)
    parser.add_argument("--epochs", type=options.count, default=None)
    parser.add_argument("--name", default="")
    return parser


def test_argument_files_are_read_in_their_place(parser, tmp_path):
    (tmp_path / "inner.args").write_text("--epochs 3\n")
    (tmp_path / "some.args").write_text(f"# why\n\n--lr 0.2  # this\n--name 'a b#c'\n\"@{tmp_path}/inner.args\"\n")
    file = f"@{tmp_path}/some.args"
    args = parser.parse_args([file])
    assert (args.lr, args.name, args.epochs) == (0.2, "a b#c", 3)
    assert parser.parse_args([file, "--lr", "0.3"]).lr == 0.3
    assert parser.parse_args(["--lr", "0.3", file]).lr == 0.2
    assert parser.parse_args([file, "--epochs", "none"]).epochs is None
    assert parser.parse_args(["--name=@home"]).name == "@home"


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
def test_unusable_argument_files_are_refused(parser, tmp_path, contents, message):
    if contents is not None:
        (tmp_path / "some.args").write_bytes(contents)
    with pytest.raises(UserError) as error:
        parser.parse_args([f"@{tmp_path}/some.args"])
    assert str(error.value).startswith(message.replace(".*", f"{tmp_path}/"))


# What the two recipes are, and what a command needs besides.
RECIPES = {
    "cache": (cache_latents.parse_args, ["--data-path=d", "--latents-dir=l"]),
    "sample": (sample_ddp.parse_args, ["--ckpt=c"]),
    "evaluate": (evaluate.parse_args, ["--samples=s", "--reference=r"]),
}


@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize("recipe", ["imagenet", "demo"])
def test_recipes_are_read_by_their_commands(stage, recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse, needed = RECIPES[stage]
    args = parse([f"@recipes/{recipe}/{stage}.args", *needed])
    assert recipe == "imagenet" or stage == "evaluate" or os.path.isdir(args.vae)


def test_the_demo_samples_each_digit_equally_often_unless_told(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["@recipes/demo/sample.args", "--ckpt=c"]
    assert sample_ddp.parse_args(arguments).class_balanced
    assert not sample_ddp.parse_args([*arguments, "--no-class-balanced"]).class_balanced
