"""The benchmark: what is measured, what is counted, and what is written."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark

pytestmark = pytest.mark.usefixtures("tiny_commands")
STEP = benchmark.Step("DiT-XS/2", 8, 2, torch.device("cpu"), "fp32")


class Operations(TorchDispatchMode):
    """Counts tensor operations by name, and remembers how large their largest result was."""

    def __init__(self):
        super().__init__()
        self.counts, self.largest = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.counts[str(function)] += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_without_position_encoding_nothing_else_changes():
    """Leaving the rotation out takes the operations of the rotation away, and no others."""
    counts = {}
    for encoding in ("axial", "none"):
        trainer = benchmark.replace(STEP, encoding=encoding).trainer()
        with Operations() as seen:
            benchmark.infer(trainer, *STEP.batch())
        counts[encoding] = seen.counts
    assert not counts["none"] - counts["axial"]
    assert counts["none"]["aten.addmm.default"] == counts["axial"]["aten.addmm.default"] > 0
    assert {"aten.cos.default", "aten.mul.Tensor"} <= set(counts["axial"] - counts["none"])


@pytest.mark.parametrize("encoding", list(benchmark.ENCODINGS))
def test_no_attention_matrix_is_ever_made(encoding):
    """At 1,024 tokens every tensor of a step stays below one N x N matrix per head and image, and grows as N."""
    largest = []
    for latent_size in (32, 64):
        step = benchmark.replace(STEP, latent_size=latent_size, encoding=encoding).call()
        with Operations() as seen:
            step()
        largest.append(seen.largest)
    heads, tokens = 2, 1024
    assert largest[1] < STEP.batch_size * heads * tokens**2 / 4
    assert largest[1] <= 4 * largest[0]


@pytest.mark.parametrize(("model", "published"), [("DiT-XS/2", None), ("DiT-S/2", 36), ("DiT-B/4", 33)])
def test_operations_of_a_step_are_those_of_its_matrix_products(model, published):
    """A closed form, and the GFLOP of DiT's paper for a 256² image, times 6 for multiply-adds and backward pass."""
    step = benchmark.replace(STEP, model=model, latent_size=32)
    built = step.config.build()
    n, d, p = math.prod(built.grid), built.x_embedder.proj.out_channels, built.patch_size
    block = 24 * n * d**2 + 4 * n**2 * d + 12 * d**2  # qkv, projection and MLP; attention; modulation
    ends = 2 * n * d * p**2 * (4 + 8) + 4 * d**2 + 2 * (256 * d + d**2)
    assert step.flops() == 3 * (len(built.blocks) * block + ends)
    assert published is None or step.flops() / 1e9 == pytest.approx(published, abs=0.7)


def test_variants_alternate_and_warm_up():
    called = []
    variants = {(name,): lambda name=name: called.append(name) for name in "abc"}
    times = benchmark.alternate(benchmark.argparse.Namespace(rounds=2, device=STEP.device), variants)
    assert "".join(called) == "abc" + "bca" + "cab" and list(times) == list(variants)
    assert all(0 < found["low"] <= found["median"] <= found["high"] for found in times.values())


def test_numbers_of_a_table():
    assert benchmark.spread([9, 1, 2, 3, 4]) == {"median": 3, "low": 2, "high": 4}
    times = {("fp32", "a"): {"median": 200.0}, ("fp32", "b"): {"median": 50.0}}
    rows = benchmark.table(("precision", "x"), times, 8, {"x": "a"})
    assert rows[1] == {"precision": "fp32", "x": "b", "ms": {"median": 50.0}, "images/s": 160, "time / a": 0.25}
    assert [benchmark.show(value) for value in (12345.6, 0.12345, 4096, None)] == ["12,346", "0.123", "4,096", ""]
    assert benchmark.show({"median": 2.0, "low": 1.0, "high": 3.0}) == "2 (1 to 3)"


def test_memory_is_what_a_call_adds_at_most():
    assert benchmark.memory_of(STEP.device, np.ones, 25_000_000) == pytest.approx(200, abs=20)


def test_what_is_written(tmp_path, capsys):
    """Tables of positive numbers; a later command adds its parts to the results of an earlier one."""
    out = tmp_path / "out.json"
    arguments = ["--quick", "--device", "cpu", "--precisions", "fp32", "--out", str(out), "--parts"]
    benchmark.main([*arguments, "peak", "position", "precision", "latents"])
    first = json.loads(out.read_text())
    benchmark.main([*arguments, "sampling"])
    parts = json.loads(out.read_text())
    assert list(parts) == ["peak", "position", "precision", "latents", "sampling"]
    assert parts == first | {"sampling": parts["sampling"]}
    printed = capsys.readouterr().out
    for part in parts.values():
        assert benchmark.describe(part) in printed
        for row in part["rows"]:
            numbers = [value for value in row.values() if isinstance(value, float)] + list(row["ms"].values())
            assert all(0 < number < 1e6 for number in numbers), row
    assert [row["encoding"] for row in parts["position"]["rows"][::2]] == list(benchmark.ENCODINGS)
    assert [row["latents"] for row in parts["latents"]["rows"]] == ["online", "cached", "encoding alone"]


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    out = tmp_path / "out.json"
    benchmark.main(["--quick", "--device", "cpu", "--out", str(out), "--parts", "npz", "--dry-run"])
    assert "npz: Peak memory of sample_ddp.py" in capsys.readouterr().out and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "argument --rounds: '1' is not a whole number >= 2"),
        (
            ["--out", "/nowhere/out.json"],
            "--out '/nowhere/out.json' is in a folder that does not exist",
        ),
        (["--image-size", "100"], "--image-size 100 is not divisible by 16"),
        (["--parts", "memory", "speed"], "argument --parts: invalid choice: 'speed'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, refused):
    assert refused(benchmark.main, arguments).startswith(message)
