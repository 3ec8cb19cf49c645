"""Mutants of the mathematics, the data, the checkpoints and the step that the tests catch, by Cosmic Ray.

    pip install cosmic-ray==8.7.0
    python tests/mutation.py

A mutant is the repository with one operator, number, comparison, condition, decorator, loop or handler changed. Each is
tried in a copy of the working tree, in a process forked after the imports that take seconds, by the tests of its file
until the first that fails, those that start processes last. The sample is fixed by the seed and the text of the files;
a file has a share of it by its number of places to change, at least ten, and of every place at most one mutant. Left
alone are annotations of types, and replacements that fail on their own (bitwise operators in place of arithmetic, text
that does not compile).
"""

import argparse
import ast
import functools
import importlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import cosmic_ray.commands
import pytest
from cosmic_ray.mutating import mutate_code, use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = ("diffusers", "matplotlib.pyplot", "scipy.stats", "timm", "torch._dynamo", "torchvision")
# Operators whose mutants fail on their own or change nothing: bits of a float, identity of small numbers.
LEFT_OUT = re.compile(r"BinaryOperator_\w+_(RShift|LShift|BitOr|BitAnd|BitXor)$|Operator_(Eq|NotEq|[LG]tE?)_Is(Not)?$")
# Tests that start processes: minutes where the others take seconds, so they are run on what the others let pass.
STARTS_PROCESSES = "again_and_again or two_processes or all_processes or one_process or peak_memory"
MEMORY = 8 * 2**30  # bytes that a mutant may ask for
STEP = ("Trainer", "NonFiniteWatch", "learning_rate", "total_steps")  # what train.py held before runtime/training.py

# The tests of each file, those that are likely to fail first. Names that do not exist are passed over.
DIFFUSION = "diffusion fake_cuda sample sample_grid train validation"
CHECKPOINT = "checkpoint pretrained export wrong_input sample hub validation train reliability"
STEP_TESTS = "training train validation benchmark fake_cuda"
TESTS = {
    "rope.py": "rope models use_in_your_model fake_cuda wrong_input visualize_rope checkpoint",
    "models.py": "models rope fake_cuda checkpoint sample wrong_input train",
    "hub_model.py": "models export pretrained diffusers_layout hub",
    "diffusion/__init__.py": DIFFUSION,
    "diffusion/gaussian_diffusion.py": DIFFUSION,
    "diffusion/losses.py": DIFFUSION,
    "diffusion/objectives.py": DIFFUSION,
    "diffusion/schedule.py": DIFFUSION,
    "runtime/sampling.py": "sampling sample sample_grid wrong_input validation benchmark train",
    "runtime/data.py": "data cache_latents wrong_input validation train",
    "runtime/latents.py": "cache_latents wrong_input validation train",
    "runtime/checkpoint.py": CHECKPOINT,
    "runtime/files.py": CHECKPOINT,
    "runtime/pretrained.py": CHECKPOINT,
    "runtime/training.py": STEP_TESTS,
    "train.py": STEP_TESTS,
}


def places(path: Path) -> list[list[MutationSpec]]:
    """The mutants of a file, one list for each place, in the order of the text."""
    tree = ast.parse(path.read_text())
    hints = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.arg | ast.AnnAssign)]
    hints += [node.returns for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    kept = [node for node in tree.body if path.name != "train.py" or getattr(node, "name", None) in STEP]

    def within(start: tuple[int, int], nodes: list) -> bool:
        spans = (((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes if n is not None)
        return any(first <= start < last for first, last in spans)

    found = {}
    with use_db(":memory:", WorkDB.Mode.create) as database:
        cosmic_ray.commands.init([path], database, {})
        for mutant in (mutant for item in database.work_items for mutant in item.mutations):
            left_out = LEFT_OUT.search(mutant.operator_name) or within(mutant.start_pos, hints)
            if within(mutant.start_pos, kept) and not left_out:
                found.setdefault(mutant.start_pos, []).append(mutant)
    return [
        sorted(found[start], key=lambda mutant: (mutant.operator_name, mutant.occurrence)) for start in sorted(found)
    ]


def compiles(mutant: MutationSpec) -> bool:
    operator = get_operator(mutant.operator_name)()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what the mutant compares or calls
        try:
            compile(mutate_code(mutant.module_path.read_text(), operator, mutant.occurrence), "mutant", "exec")
        except SyntaxError:
            return False
    return True


def choose(paths: list[Path], number: int, seed: int) -> list[MutationSpec]:
    """About number mutants of the files, in the order of the text."""
    everywhere = {path: places(path) for path in paths}
    total, chosen = sum(map(len, everywhere.values())), []
    for path, found in everywhere.items():
        rng = random.Random(f"{seed} {path.as_posix()}")
        size = min(len(found), max(10, round(number * len(found) / total)))
        for k in sorted(rng.sample(range(len(found)), size)):
            rng.shuffle(found[k])
            chosen += [mutant for mutant in found[k] if compiles(mutant)][:1]
    return chosen


def pytest_in_child(tests: tuple[str, ...], which: str, output: Path) -> None:
    os.setsid()  # so that a mutant that hangs ends with all of its processes
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    options = ["-xq", "--tb=short", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    options += ["-k", which, f"--basetemp={output.parent / 'pytest'}"]
    os._exit(pytest.main([*options, *tests]))


def run_tests(tests: tuple[str, ...], which: str, output: Path, limit: float | None = None) -> int | None:
    """Status of pytest on the tests whose names fit which (0 without any), None when it was ended after limit s."""
    child = multiprocessing.get_context("fork").Process(target=pytest_in_child, args=(tests, which, output))
    child.start()
    child.join(limit)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
        return None
    return 0 if child.exitcode == pytest.ExitCode.NO_TESTS_COLLECTED else child.exitcode


@functools.cache
def clean_seconds(tests: tuple[str, ...], output: Path) -> float:
    """How long the tests take on the unchanged code, where they have to pass."""
    began = time.monotonic()
    for which in (f"not ({STARTS_PROCESSES})", STARTS_PROCESSES):
        assert run_tests(tests, which, output) == 0, output.read_text()
    return time.monotonic() - began


def tests_of(path: Path) -> tuple[str, ...]:
    files = (f"tests/test_{name}.py" for name in TESTS[path.as_posix()].split())
    return tuple(file for file in files if Path(file).exists())


def caught(mutant: MutationSpec, output: Path) -> bool:
    """Try one mutant and print what it changes and what became of it."""
    path, tests = mutant.module_path, tests_of(mutant.module_path)
    limit, began = 10 * clean_seconds(tests, output) + 60, time.monotonic()
    with use_mutation(path, get_operator(mutant.operator_name)(), mutant.occurrence) as (before, after):
        status = run_tests(tests, f"not ({STARTS_PROCESSES})", output, limit)
        if status == 0:
            status = run_tests(tests, STARTS_PROCESSES, output, limit)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output.read_text(errors="replace"), re.MULTILINE)
    what = {0: "SURVIVED", None: "killed by time"}.get(status, f"killed by {failed[1] if failed else 'no import'}")
    seconds = f"{time.monotonic() - began:.0f} s"
    print(f"{path}:{mutant.start_pos[0]} {mutant.operator_name.removeprefix('core/')}: {what} ({seconds})")
    lines = zip(before.splitlines(), after.splitlines(), strict=False)
    old, new = next((old.strip(), new.strip()) for old, new in lines if old != new)
    print(f"    {old}\n    {new}", flush=True)
    return status != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=150, help="size of the sample, before the minimum of ten a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("files", nargs="*", help="those of the sample to try (none: all)")
    args = parser.parse_args()
    for name in IMPORTS:
        importlib.import_module(name)
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    with tempfile.TemporaryDirectory() as folder:
        copy, output = Path(folder) / "repository", Path(folder) / "output"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "results", "data"))
        os.chdir(copy)
        sys.path[0] = str(copy)
        chosen = choose([Path(name) for name in TESTS if Path(name).exists()], args.number, args.seed)
        outcomes = Counter()
        for mutant in chosen:
            name = mutant.module_path.as_posix()
            if name in args.files or not args.files:
                outcomes[name, caught(mutant, output)] += 1
    for name in {name: None for name, _ in outcomes}:
        print(f"{name:32} {outcomes[name, True]:4} killed {outcomes[name, False]:4} survived")
    killed = sum(count for (_, dead), count in outcomes.items() if dead)
    print(f"{killed} of {outcomes.total()} mutants killed: {killed / outcomes.total():.1%}")


if __name__ == "__main__":
    main()
