"""The plan of run_all.sh: the arguments of every stage, checked before the first one starts.

Run by run_all.sh from the repository's folder: python -m runtime.pipeline START_DIR [POSITION ...]. It writes pairs of
fields to stdout, each ended by a NUL byte, which no value can hold: a script and one of its arguments, or a variable of
the shell and its value. What is for people goes to stderr.
"""

import argparse
import contextlib
import difflib
import importlib
import io
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from rope import RopeConfig
from runtime import options
from runtime.options import UserError

POSITIONS = {  # of run_all.sh, with the option of train.py that each is
    "USE_ROPE": "--use-rope",
    "ROTATE": "--rope-rotate",
    "THETA": "--rope-theta",
    "FREQS_FOR": "--rope-freqs-for",
    "MAX_FREQ": "--rope-max-freq",
    "TRUNCATE_PERCENTAGE": "--rope-truncate-percentage",
    "MAX_FREQ_LANG": "--rope-max-freq-lang",
    "MIN_FREQ_LANG": "--rope-min-freq-lang",
    "SAME_THETA": "--rope-same-theta",
    "SEED": "--global-seed",
    "MODEL": "--model",
}
COMMANDS = {"cache": "cache_latents", "train": "train", "sample": "sample_ddp", "evaluate": "evaluate"}
SETTINGS = (  # environment variables that are no option, or that several stages share
    *("DATA_PATH", "RECIPE", "RESULTS_BASE", "LATENTS_DIR", "CACHE_LATENTS", "FID_REFERENCE", "NPROC_PER_NODE"),
    *("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", *(f"{stage.upper()}_ARGS" for stage in COMMANDS)),
)
OTHER_NAMES = {  # those that are not named like their option, most because train.py has one of that name
    "DEFAULT_MODEL": ("train", "--model"),
    "SAMPLE_SEED": ("sample", "--global-seed"),
    "SAMPLE_VAE": ("sample", "--vae"),
    "SAMPLING_STEPS": ("sample", "--num-sampling-steps"),
    "FID_METRICS": ("evaluate", "--metrics"),
    "INCEPTION_WEIGHTS": ("evaluate", "--inception-weights"),
}
SAMPLE_TOO = ("--precision", "--tf32", "--compile")  # what else train.py and sample_ddp.py share, the checkpoint tells
# Options without a variable, the last two since wandb reads theirs itself.
BY_HAND = ("--help", "--dry-run", "--planned", "--print-name")  # for which a command is started by itself
NO_VARIABLE = (*BY_HAND, "--ckpt", "--wandb-project", "--wandb-entity")
OF_OTHERS = ("COMPILER", "COMPILERS", "MODELS", "NODES", "RECIPES", "SAMPLE", "SAMPLES")  # close to ours
MANY = 99_999  # machines, or processes on one
SIMILAR = 0.88  # from 0 to 1, to a known name: taken for a slip of the pen


class Stage:
    """A command, and the arguments it gets, each with the variable or position that set it. Later ones win."""

    def __init__(self, name: str, start: str, recipe: str):
        self.start = start  # the folder from which the user's relative paths are taken
        self.command = importlib.import_module(COMMANDS[name])
        self.actions = {
            flag: action for action in self.command.build_parser()._actions for flag in action.option_strings
        }
        self.given = [(f"@recipes/{recipe}/{name}.args", "RECIPE")]

    @property
    def arguments(self) -> list[str]:
        return [argument for argument, _ in self.given]

    def give(self, flag: str, text: str, origin: str) -> None:
        """An option; True or False for a switch. Raises UserError."""
        if self.actions[flag].nargs != 0:
            self.given.append((f"{flag}={self.resolve(flag, text)}", origin))
        elif boolean(text, origin):
            self.given.append((flag, origin))
        elif (opposite := f"--no-{flag.removeprefix('--')}") in self.actions:
            self.given.append((opposite, origin))
        else:  # a recipe does not give a switch without an opposite
            self.given = [(argument, earlier) for argument, earlier in self.given if argument != flag]

    def give_words(self, text: str, origin: str) -> None:
        """Arguments as a shell would divide them. Raises UserError."""
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UserError(f"{origin}: {text!r} cannot be divided into arguments ({error})") from error
        flag = ""
        for word in words:
            if word.split("=")[0] in BY_HAND:
                raise UserError(f"{origin}: {word} is for the command by itself; leave it out")
            if word.startswith("@"):
                word = f"@{locate(word[1:], self.start)}"
            elif "=" in word:
                flag, _, value = word.partition("=")
                word = f"{flag}={self.resolve(flag, value)}"
            else:
                flag, word = word, self.resolve(flag, word)
            self.given.append((word, origin))

    def give_first(self, flag: str, path: str, origin: str) -> None:
        """An option that all others win over."""
        self.given.insert(0, (f"{flag}={path}", origin))

    def resolve(self, flag: str, text: str) -> str:
        """An option's value, located where it is a path; that of --vae is one where there is such a file."""
        is_path = flag in self.actions and self.actions[flag].type is Path and text != "none"
        if is_path or (flag == "--vae" and os.path.exists(os.path.join(self.start, text))):
            return locate(text, self.start)
        return text

    def parse(self, *needed: str) -> argparse.Namespace:
        return self.ask(self.command.parse_args, [*needed, *self.arguments])

    def dry_run(self, needed: list[str], processes: int) -> None:
        """All checks that the command makes before it begins. Raises UserError."""
        self.ask(self.command.main.__wrapped__, [*needed, *self.arguments, "--dry-run", "--planned", str(processes)])

    def ask(self, call: Callable, arguments: list[str]):
        """call(arguments). A UserError then names what set the option, or argument file, that it speaks of first."""
        try:
            return call(arguments)
        except UserError as error:
            mentioned = []
            for index, (argument, origin) in enumerate(self.given):
                flag = argument.split("=")[0].removeprefix("@")
                match = re.search(rf"{re.escape(flag)}(?![\w-])", str(error))
                if match and argument.startswith(("-", "@")):
                    mentioned.append((match.start(), -index, flag, origin))
            if not mentioned:
                raise
            _, _, flag, origin = min(mentioned)  # as set the last time
            remedy = "; - keeps the default" if origin.startswith("argument ") else ""
            message = str(error).removeprefix(f"argument {flag}: ")
            raise UserError(f"{origin}: {message}{remedy}") from error


def locate(path: str, start: str) -> str:
    """A path of the user, who is in the folder start, as seen from the repository's, where the commands run."""
    return os.path.join(start, path).removeprefix(f"{os.getcwd()}/")


def whole_number(text: str, low: int, high: int, origin: str) -> int:
    """Raises UserError, naming the variable, where it is none, or not between low and high."""
    try:
        return options.number(int, low, high)(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{origin}: {error}") from error


def boolean(text: str, origin: str) -> bool:
    """True or False in the usual spellings. Raises UserError, naming the variable or position."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise UserError(f"{origin}: {text!r} is not True or False")
    return values[text.lower()]


def variables(stages: dict[str, Stage]) -> dict[str, list[tuple[str, str]]]:
    """By the name of a variable, the stages and the option that it sets: EPOCHS is --epochs of train.py."""
    found = {name: [place] for name, place in OTHER_NAMES.items()}
    train, sample = stages["train"].actions, stages["sample"].actions
    for flag in {**train, **sample}:
        name = flag.removeprefix("--").replace("-", "_").upper()
        if flag.startswith("--") and not flag.startswith("--no-") and flag not in NO_VARIABLE and name not in SETTINGS:
            told = ["sample"] if flag in train and flag not in SAMPLE_TOO else []
            found[name] = [(stage, flag) for stage in COMMANDS if flag in stages[stage].actions and stage not in told]
    return found


def check_names(environment: Mapping[str, str], known: list[str]) -> None:
    """Raise UserError for a variable whose name is nearly that of one that would be read."""
    for name in environment:
        if name in known or name in OF_OTHERS or not re.fullmatch("[A-Z][A-Z0-9_]{4,}", name):
            continue
        if close := difflib.get_close_matches(name, known, n=1, cutoff=SIMILAR):
            raise UserError(
                f"the environment has {name}, which is not read; did you mean {close[0]}? "
                f"If it is for another program: env -u {name} bash run_all.sh ..."
            )


def give_variables(stages: dict[str, Stage], environment: Mapping[str, str]) -> None:
    """What environment variables say. Raises UserError."""
    known = variables(stages)
    check_names(environment, [*known, *SETTINGS])
    given = {name: environment[name] for name in known if name in environment}
    for name, text in given.items():
        for stage, flag in known[name]:
            stages[stage].give(flag, text, name)
    if "VAE" in given and "SAMPLE_VAE" not in given:  # of the two published ones, mse decodes better
        stages["sample"].give("--vae", "mse" if given["VAE"] == "ema" else given["VAE"], "VAE")
    if len(given.keys() & {"EPOCHS", "MAX_STEPS"}) == 1:  # it takes the place of the recipe's
        name, flag = ("EPOCHS", "--max-steps") if "EPOCHS" in given else ("MAX_STEPS", "--epochs")
        stages["train"].give(flag, "none", name)


def give_positions(train: Stage, positions: list[str], use_rope: str) -> None:
    """What the positions of run_all.sh say; use_rope where the first says nothing. Raises UserError."""
    for text in positions:
        if re.match(r"-[^0-9.]", text):
            raise UserError(f"unknown option {text!r}, expected positions; bash run_all.sh -h lists them")
    if len(positions) > len(POSITIONS):
        raise UserError(f"{len(positions)} arguments, expected at most {len(POSITIONS)}; bash run_all.sh -h lists them")
    given = {name: text for name, text in zip(POSITIONS, positions, strict=False) if text not in ("", "-")}
    given = {"USE_ROPE": use_rope} | given
    origins = {name: f"argument {number}, {name}" for number, name in enumerate(POSITIONS, 1)}
    for name, text in given.items():
        train.give(POSITIONS[name], text, origins[name])
    if boolean(given["USE_ROPE"], origins["USE_ROPE"]):
        return
    # Without RoPE its positions may only say what is the default, and its variables have no effect.
    rope, default = options.rope_from_args(train.parse("--use-rope", "--latents-dir=unnamed")), RopeConfig()
    for name, text in given.items():
        field = train.actions[POSITIONS[name]].dest.removeprefix("rope_")
        if getattr(rope, field, None) != getattr(default, field, None):
            raise UserError(
                f"{origins[name]}: {text!r} is for RoPE, but USE_ROPE is False; give - for {name}, or True for USE_ROPE"
            )
    train.given = [(argument, origin) for argument, origin in train.given if not argument.startswith("--rope-")]


def decimal(value: float, whole: str = "") -> str:
    """One spelling for equal numbers, so that 1e4 and 10000 share a folder; a whole number ends in `whole`."""
    text = f"{value:.12g}"
    return text if "." in text or "e" in text else text + whole


def run_name(model: str, rope: RopeConfig | None, seed: int) -> str:
    """The folder of a run below that of all results."""
    name = model.replace("/", "-")
    if rope is None:
        return f"{name}/NoRoPE_seed{seed}"
    frequencies = f"freqspixel_maxfreq{decimal(rope.max_freq)}"
    if rope.freqs_for == "lang":
        highest, lowest = (decimal(value, ".0") for value in (rope.max_freq_lang, rope.min_freq_lang))
        frequencies = f"freqslang_maxfreqlang{highest}_minfreqlang{lowest}"
    truncated = decimal(rope.truncate_percentage, ".0")
    border = "_borderexact" if rope.border == "exact" else ""
    return (
        f"{name}/RoPE_rotate{rope.rotate}_theta{decimal(rope.theta)}_{frequencies}_trunc{truncated}"
        f"_sametheta{rope.same_theta}{border}_seed{seed}"
    )


def latents_name(data: str | None, args: argparse.Namespace) -> str:
    """All that decides the latents, so that another setting makes another cache; without data, the demo's digits."""
    name = "digits"
    if data is not None:
        folder = Path(os.path.abspath(data))
        name = f"{folder.parent.name}-{folder.name}".removeprefix("-")
    vae = args.vae.removesuffix("/").split("/")[-1]
    return f"{name}-{options.format_size(args.image_size)}-vae-{vae}{'' if args.flip else '-noflip'}"


def check_latents(cache: argparse.Namespace, train: argparse.Namespace) -> None:
    """Raise UserError where training would refuse the latents that the stage before it makes, after hours of work."""
    if cache.image_size != train.image_size:
        made, asked = (options.format_size(args.image_size) for args in (cache, train))
        raise UserError(f"stage 0 makes latents of --image-size {made}, stage 1 takes {asked}; set IMAGE_SIZE for both")
    if train.flip and not cache.flip:
        raise UserError("stage 0 makes no flipped latents, which --flip of stage 1 takes; set FLIP for both")


def give_folders(stages: dict[str, Stage], environment: Mapping[str, str], start: str) -> dict[str, str]:
    """What follows from where things lie; the folders that run_all.sh needs. Takes out stages that have nothing to do.

    Raises UserError.
    """
    names = ("DATA_PATH", "RESULTS_BASE", "LATENTS_DIR", "FID_REFERENCE")
    paths = {name: locate(environment[name], start) for name in names if name in environment}
    images = paths.get("DATA_PATH")
    if images is not None and not os.path.exists(images):
        raise UserError(f"DATA_PATH: {images!r} does not exist; expected a folder with a sub-folder for each class")
    base = paths.get("RESULTS_BASE", "results/demo" if images is None else "results")
    digits = f"{base}/digits" if images is None else ""
    cache, train, sample, evaluate = stages.values()
    data = ("--data-path", images or digits, "DATA_PATH")
    cache.give_first(*data)
    latents = f"{base}/latents/{latents_name(images, cache.parse('--latents-dir=unnamed'))}"
    latents = ("--latents-dir", latents, "RESULTS_BASE")
    if "LATENTS_DIR" in paths:
        latents = ("--latents-dir", paths["LATENTS_DIR"], "LATENTS_DIR")
    cache.give_first(*latents)
    is_cached = boolean(environment.get("CACHE_LATENTS", "True"), "CACHE_LATENTS")
    train.give_first(*(latents if is_cached else data))
    args = train.parse()
    if is_cached:
        check_latents(cache.parse(), args)
    else:
        del stages["cache"]
    run = run_name(args.model, options.rope_from_args(args), args.global_seed)
    train.give_first("--results-dir", f"{base}/{run}", "RESULTS_BASE")
    results = str(train.parse().results_dir)
    sample.give_first("--ckpt", results, "RESULTS_BASE")
    sample.give_first("--sample-dir", f"{results}/samples", "RESULTS_BASE")
    if "FID_REFERENCE" in paths:
        evaluate.give_first("--reference", paths["FID_REFERENCE"], "FID_REFERENCE")
        evaluate.give_first("--samples-expected", str(sample.parse().num_fid_samples), "NUM_FID_SAMPLES")
    else:
        del stages["evaluate"]
    return {"RUN_DIR": results, "DIGITS": digits}


def machines(environment: Mapping[str, str]) -> dict[str, str]:
    """How many there are, and which this is. Raises UserError."""
    texts = {"NNODES": "1", "NODE_RANK": "0", "MASTER_PORT": "29500", "MASTER_ADDR": ""}
    texts = {name: environment.get(name, default) for name, default in texts.items()}
    limits = {"NNODES": (1, MANY), "NODE_RANK": (0, MANY), "MASTER_PORT": (1, 65_535)}
    values = {name: whole_number(texts[name], *limits[name], name) for name in limits}
    if values["NODE_RANK"] >= values["NNODES"]:
        raise UserError(f"NODE_RANK: {values['NODE_RANK']} is not less than NNODES, which is {values['NNODES']}")
    if values["NNODES"] > 1 and not texts["MASTER_ADDR"]:
        raise UserError(f"MASTER_ADDR is not set and NNODES is {values['NNODES']}; set it to the address of machine 0")
    return texts | {name: str(value) for name, value in values.items()}


def has_nvidia_driver() -> bool:
    return os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi") is not None


def count_processes(environment: Mapping[str, str]) -> int:
    """On this machine: one for each GPU that PyTorch sees. Raises UserError where it should see one and does not."""
    if environment.get("NPROC_PER_NODE"):
        return whole_number(environment["NPROC_PER_NODE"], 1, MANY, "NPROC_PER_NODE")
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 0 and has_nvidia_driver() and "CUDA_VISIBLE_DEVICES" not in environment:
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise UserError(
            f"this machine has an NVIDIA driver, but PyTorch {torch.__version__}, {build}, sees no GPU; install a "
            "build that fits the driver (nvidia-smi tells its version), or set NPROC_PER_NODE=1 to train on the CPU"
        )
    return max(1, gpus)


def describe(stages: dict[str, Stage], folders: dict[str, str]) -> str:
    """What a user should know before hours of work."""
    lines = []
    if folders["DIGITS"]:
        lines.append(
            "DATA_PATH is not set: this is the built-in demo on 1,797 handwritten digits; "
            "DATA_PATH=/path/to/ImageNet/train runs the published recipe instead."
        )
    rope = options.rope_from_args(stages["train"].parse())
    if rope is not None and rope.freqs_for == "pixel":
        lines.append("FREQS_FOR pixel: THETA, MAX_FREQ_LANG and MIN_FREQ_LANG have no effect.")
    elif rope is not None and rope.max_freq != RopeConfig().max_freq:
        lines.append("FREQS_FOR lang: MAX_FREQ has no effect.")
    return "\n".join([*lines, f"Folder of the run: {folders['RUN_DIR']}"])


def make_plan(start: str, positions: list[str], environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """The fields that run_all.sh reads. Raises UserError."""
    processes = count_processes(environment)
    # An empty variable says nothing, but for that of GRAD_CLIP: no limit.
    environment = {name: value or "none" for name, value in environment.items() if value or name == "GRAD_CLIP"}
    recipe = environment.get("RECIPE", "imagenet" if "DATA_PATH" in environment else "demo")
    if recipe != "demo" and "DATA_PATH" not in environment:
        raise UserError(f"RECIPE: {recipe!r} needs data; set DATA_PATH to a folder with a sub-folder for each class")
    stages = {name: Stage(name, start, recipe) for name in COMMANDS}
    shell = machines(environment)
    give_variables(stages, environment)
    give_positions(stages["train"], positions, environment.get("USE_ROPE", "True"))
    for name, stage in stages.items():
        stage.give_words(environment.get(f"{name.upper()}_ARGS", ""), f"{name.upper()}_ARGS")
    shell |= give_folders(stages, environment, start) | {"NPROC_PER_NODE": str(processes)}
    with contextlib.redirect_stdout(io.StringIO()):  # each stage says it again when it starts
        samples = stages["sample"].parse().sample_dir / "planned.npz"
        for name, stage in stages.items():
            stage.dry_run([f"--samples={samples}"] if name == "evaluate" else [], processes * int(shell["NNODES"]))
    print(describe(stages, shell), file=sys.stderr)
    return [*shell.items(), *((name, argument) for name, stage in stages.items() for argument in stage.arguments)]


@options.command
def main(argv: list[str] | None = None) -> None:
    start, *positions = sys.argv[1:] if argv is None else argv
    try:
        fields = make_plan(start, positions, os.environ)
    except UserError as error:
        print(f"run_all.sh: error: {options.one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    for name, value in fields:
        sys.stdout.buffer.write(os.fsencode(f"{name}\0{value}\0"))


if __name__ == "__main__":
    main()
