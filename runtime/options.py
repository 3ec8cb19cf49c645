"""Command-line options that commands share, and the errors that a user can cause."""

import argparse
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from models import SIZES, DiT_models
from rope import RopeConfig, valid_rotations
from runtime import output


class UserError(Exception):
    """A mistake in what the user gave: one line that names the value, what was expected and the remedy."""


def command(main: Callable) -> Callable:
    """Turn a UserError raised in main(argv) into its one line on stderr and exit status 2; output never ends it.

    Under torchrun rank 0 speaks; the others give it a moment, because torchrun ends all of them as soon as the first
    one has exited. Where nobody ends them, the mistake is theirs alone, and they speak one after another.
    """
    program = Path(inspect.getfile(main)).name

    @functools.wraps(main)
    @output.lasting()
    def wrapped(argv: list[str] | None = None):
        format_warning = warnings.formatwarning
        warnings.formatwarning = lambda message, *_: f"{program}: warning: {one_line(str(message))}\n"
        try:
            return main(argv)
        except UserError as error:
            local_rank = os.environ.get("LOCAL_RANK", "")
            turn = min(int(local_rank), 100) if local_rank.isdigit() else 0
            time.sleep(2 * max(turn, os.environ.get("RANK", "0") != "0"))
            print(f"{program}: error: {one_line(str(error))}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:  # before a run answers signals itself
            print(f"{program}: interrupted", file=sys.stderr, flush=True)
            sys.exit(130)
        finally:
            warnings.formatwarning = format_warning

    return wrapped


def one_line(text: str) -> str:
    """Text with line breaks and other control characters made visible, so that it prints as one line."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: repr(match.group())[1:-1], text)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its name where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def root_cause(error: BaseException) -> str:
    """What the network or the disk said first, in one line."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return first_line(error)


def is_utf8(text: str) -> bool:
    """Whether text can be written as UTF-8: names of files and arguments can hold other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def differences(stored: dict, current: dict, ignored: tuple[str, ...] = (), show: Callable = repr) -> str:
    """The settings of current that stored has otherwise, as "lr 0.1 (now 0.2), ..."; empty where they agree."""
    differing = [key for key in current if key not in ignored and stored.get(key) != current[key]]
    return ", ".join(f"{key} {show(stored.get(key))} (now {show(current[key])})" for key in differing)


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviated options, suggests corrections, and raises UserError.

    Its description is the first line of a command's docstring, which is None under PYTHONOPTIMIZE=2.
    @FILE stands for the arguments in an argument file: one option a line, with # before comments. Later arguments win,
    and "none" takes back a value where the default is None.
    """

    def __init__(self, description: str | None = None, **kwargs):
        super().__init__(
            description=description and description.splitlines()[0],
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            fromfile_prefix_chars="@",
            **kwargs,
        )
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf|nan)")  # -1e-4 is a value too, not an option

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for text in args:
            if not is_utf8(text):
                raise UserError(
                    f"argument {os.fsencode(text)!r} is not UTF-8; rename what it names, or pass a link to it"
                )
            if text.startswith("@"):
                check_argument_file(Path(text[1:]))
        found, rest = super().parse_known_args(args, namespace)
        if getattr(found, "planned", None) is not None and (found.dry_run is None or found.dry_run is False):
            raise UserError(f"--planned {found.planned} given without --dry-run; add --dry-run, or leave it out")
        return found, rest

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(
                f"line {line!r} of an argument file cannot be read ({error}); quote it as in a shell"
            ) from None

    def _get_value(self, action: argparse.Action, text: str):
        if text == "none" and action.default is None and not action.required:
            return None
        return super()._get_value(action, text)

    def _check_value(self, action: argparse.Action, value) -> None:
        if action.choices is not None and value not in action.choices:  # Python's own words differ from 3.12.8 on
            listed = ", ".join(map(repr, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r} (choose from {listed})")

    def error(self, message: str):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            option = unknown.split()[0].split("=")[0]
            close = difflib.get_close_matches(option, self._option_string_actions, n=1)
            message = f"{message}; {f'did you mean {close[0]}?' if close else 'see --help'}"
        raise UserError(message)


def check_argument_file(path: Path) -> None:
    """Raise UserError when it cannot be read as text."""
    try:
        path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"argument file {str(path)!r} cannot be read ({reason}); give one such as recipes/demo/train.args"
        ) from error


def number(kind: type, low: float, high: float = math.inf, *, open_low=False, open_high=False) -> Callable:
    """An argparse type: a finite int or float between low and high, either of which may be excluded."""
    name = "a whole number" if kind is int else "a number"
    if low == -math.inf:
        bounds = "that is finite"
    elif math.isinf(high):
        bounds = f"> {low:g}" if open_low else f">= {low:g}"
    else:
        bounds = f"with {low:g} {'<' if open_low else '<='} value {'<' if open_high else '<='} {high:g}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if isinstance(value, int) and math.isinf(high) and abs(value) >= 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of less than 64 bits")
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        if not (above and below and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {bounds}")
        return value

    return parse


count = number(int, 1)  # sizes, steps, batches
seed = number(int, 0, 2**63 - 1)
non_negative_int = number(int, 0)
positive = number(float, 0, open_low=True)
non_negative = number(float, 0)
fraction = number(float, 0, 1)


def model_name(text: str) -> str:
    """An argparse type: the name of a model, such as DiT-B/4."""
    if text not in DiT_models:
        sizes = "|".join(SIZES)
        raise argparse.ArgumentTypeError(f"{text!r} is not a model; expected DiT-{{{sizes}}}/{{2|4|8}}, as in DiT-B/4")
    return text


def image_size(text: str) -> tuple[int, int]:
    """An argparse type: height and width in pixels, from "256" or "256x384"."""
    match = re.fullmatch(r"([1-9]\d{0,5})(?:x([1-9]\d{0,5}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an image size; expected pixels, as in 256 or 256x384")
    height = int(match[1])
    return height, int(match[2] or height)


ROPE_OPTIONS = {  # what RopeConfig does not say about a field; one that is missing gets its option from its default
    "rotate": dict(type=non_negative_int, help="R: K = 2R directions; 0 = axial"),
    "theta": dict(type=positive, help="base of the lang frequencies"),
    "freqs_for": dict(choices=["lang", "pixel"], help="geometric (lang) or evenly spaced (pixel) frequencies"),
    "max_freq": dict(type=positive, help="pixel: highest frequency, times pi/2 radians per patch"),
    "truncate_percentage": dict(type=fraction, help="fraction of the frequencies set to 0, lowest lang ones first"),
    "max_freq_lang": dict(type=positive, help="lang: highest frequency, radians per patch"),
    "min_freq_lang": dict(type=non_negative, help="lang, R > 0: lowest frequency, radians per patch; 0 = from theta"),
    "same_theta": dict(action="store_true", help="every direction gets the same frequencies"),
    "border": dict(choices=["clamp", "exact"], help="clamp projections to the axis length, or keep Eq. 10 exact"),
}


def add_rope_options(parser: Parser) -> None:
    """Add --use-rope and one option for each field of RopeConfig; None means that the option was not given."""
    group = parser.add_argument_group("rotary position embedding")
    group.add_argument("--use-rope", action="store_true", default=None, help="rotate queries and keys (else sin-cos)")
    for field in dataclasses.fields(RopeConfig):
        options = dict(ROPE_OPTIONS.get(field.name) or _option_of(field.default))
        options["help"] += f" (default: {field.default})"
        group.add_argument(
            f"--rope-{field.name.replace('_', '-')}", dest=f"rope_{field.name}", default=argparse.SUPPRESS, **options
        )


def _option_of(default: bool | int | float | str) -> dict:
    """The option of a setting of which only the default is known."""
    if isinstance(default, bool):
        kind = dict(action=argparse.BooleanOptionalAction)
    else:
        kind = dict(type=str if isinstance(default, str) else number(type(default), -math.inf))
    return kind | dict(help="see RopeConfig in rope.py")


def add_vae(parser: Parser, default: str | None = None, none: str | None = None) -> None:
    """Add --vae; none says what leaving it out means where there is no default."""
    help = "ema, mse, hub id or folder of an AutoencoderKL" + (f" (None: {none})" if none else "")
    parser.add_argument("--vae", default=default, help=help)


def add_precision(parser: Parser) -> None:
    """Add --precision and --tf32."""
    help = "bf16: autocast; auto: bf16 where the hardware is faster in it"
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help=help)
    help = "TF32 for float32 products on CUDA"
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True, help=help)


def add_compile(parser: Parser) -> None:
    """Add --compile."""
    parser.add_argument("--compile", action="store_true", help="compile the model's blocks")


def add_num_workers(parser: Parser, what: str) -> None:
    """Add --num-workers, which is a number of what."""
    parser.add_argument("--num-workers", type=non_negative_int, default=4, help=what)


def add_dry_run(parser: Parser, planned: bool = False, steps: bool = False) -> None:
    """Add --dry-run, with steps a number of them to take, and with planned --planned."""
    help, kind = "make all checks, print what would be done, write nothing", dict(action="store_true")
    if steps:
        kind = dict(nargs="?", type=count, const=0, default=None, metavar="STEPS")
        help += "; with STEPS (10 are enough) also take so many steps on made-up data and print time, memory and disk "
        help += "of the whole run"
    parser.add_argument("--dry-run", help=help, **kind)
    if planned:
        help = "with --dry-run: of so many processes, and what an earlier command makes may be missing yet"
        parser.add_argument("--planned", type=count, default=None, metavar="PROCESSES", help=help)


def add_checkpoint_options(parser: Parser, none: str | None = None) -> None:
    """Add --ckpt, --weights and what describes the model; none says what leaving --ckpt out means, if one may."""
    parser.add_argument(  # text and not a Path, which would make hf:/user of hf://user; load_trained resolves it
        "--ckpt",
        required=none is None,
        default=None,
        help="a file or folder of train.py, export.py, DiT or diffusers, hf://user/repo or hf://user/repo/file, or the "
        "name of a published one, as in dit_b2" + (f" (None: {none})" if none else ""),
    )
    parser.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged or raw weights")
    group = parser.add_argument_group("model: needed only where the checkpoint does not tell, or at another image size")
    group.add_argument("--model", type=model_name, default=None, help="size and patch, as in DiT-B/4")
    group.add_argument("--image-size", type=image_size, default=None, help="pixels, as in 256 or 256x384")
    group.add_argument("--num-classes", type=count, default=None, help="classes of the label table")
    add_rope_options(parser)
    help = "at another --image-size than the trained one: let positions go on, or squeeze them (None: not allowed)"
    parser.add_argument("--rope-extend", choices=["extrapolate", "interpolate"], default=None, help=help)


def given_model(args: argparse.Namespace) -> dict:
    """What the command line says about the model, for checkpoint.load_trained to check or to use. Raises UserError."""
    if args.rope_extend and args.image_size is None:
        raise UserError(f"--rope-extend {args.rope_extend} given without --image-size; add the size, or leave it out")
    rope = given_rope_options(args)
    names = ("model", "image_size", "rope_extend", "num_classes", "use_rope")
    return {name: getattr(args, name) for name in names} | ({"rope": rope} if rope else {})


def given_rope_options(args: argparse.Namespace) -> dict:
    """The RopeConfig fields that the command line gives. Raises UserError when --use-rope is missing beside them."""
    names = [field.name for field in dataclasses.fields(RopeConfig) if hasattr(args, f"rope_{field.name}")]
    if names and not args.use_rope:
        flags = ", ".join(f"--rope-{name.replace('_', '-')}" for name in names)
        raise UserError(f"{flags} given without --use-rope; add --use-rope, or leave it out")
    return {name: getattr(args, f"rope_{name}") for name in names}


def rope_from_args(args: argparse.Namespace) -> RopeConfig | None:
    """The rotary embedding that the command line describes; None without --use-rope."""
    given = given_rope_options(args)
    return RopeConfig(**given) if args.use_rope else None


def check_rope(rope: RopeConfig | None, head_dim: int, model: str) -> None:
    """Raise UserError when rotate does not fit the model's head dimension."""
    if rope is not None and rope.rotate not in (valid := valid_rotations(head_dim, rope.same_theta)):
        extra = " with --rope-same-theta" if rope.same_theta else ""
        values = ", ".join(map(str, valid))
        raise UserError(f"--rope-rotate {rope.rotate} does not fit {model}{extra}; expected one of {values}")


def check_stored_rope(rope: RopeConfig) -> None:
    """Raise ValueError where a setting is not one that the command line would take."""
    for field in dataclasses.fields(rope):
        value, option = getattr(rope, field.name), ROPE_OPTIONS.get(field.name) or _option_of(field.default)
        kinds = (int, float) if isinstance(field.default, float) else (type(field.default),)
        try:
            if type(value) not in kinds or value not in option.get("choices", [value]):
                raise ValueError(f"expected {option.get('choices') or 'a value such as ' + repr(field.default)}")
            if callable(option.get("type")) and not isinstance(value, str):
                option["type"](str(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"rope.{field.name} is {value!r}: {error}") from error


def check_image_size(size: tuple[int, int], downsampling: int, patch_size: int) -> tuple[int, int]:
    """Latent height and width for an image size. Raises UserError when the patches do not divide it."""
    unit = downsampling * patch_size
    if size[0] % unit or size[1] % unit:
        raise UserError(
            f"--image-size {format_size(size)} is not divisible by {unit} (VAE down-sampling {downsampling} x patch "
            f"{patch_size}); choose a multiple of {unit}"
        )
    return size[0] // downsampling, size[1] // downsampling


def format_size(size: tuple[int, int]) -> str:
    """256 or 256x384, as image_size reads it."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
