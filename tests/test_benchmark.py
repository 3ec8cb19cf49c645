"""The benchmark: what is measured, what is counted, and what is written."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark

pytestmark = pytest.mark.usefixtures("tiny_commands")
ARGS = SimpleNamespace(model="DiT-XS/2", image_size=64, device=torch.device("cpu"), precision="fp32")


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
    counts, batch = {}, benchmark.made_up_batch(2, benchmark.config_of(ARGS))
    for encoding in ("axial", "none"):
        trainer = benchmark.trainer_of(ARGS, encoding)
        with Operations() as seen:
            benchmark.infer(trainer, *batch)
        counts[encoding] = seen.counts
    assert not counts["none"] - counts["axial"]
    assert counts["none"]["aten.addmm.default"] == counts["axial"]["aten.addmm.default"] > 0
    assert {"aten.cos.default", "aten.mul.Tensor"} <= set(counts["axial"] - counts["none"])


@pytest.mark.parametrize(
    ("encoding", "precision"), [*((name, "fp32") for name in benchmark.ENCODINGS), ("spiral", "bf16")]
)
def test_no_attention_matrix_is_ever_made(encoding, precision):
    """At 1,024 tokens every tensor of a step stays below one N x N matrix per head and image, and grows as N."""
    largest, images = [], 2
    for size in (256, 512):
        args = SimpleNamespace(**(vars(ARGS) | {"image_size": size, "precision": precision}))
        trainer = benchmark.trainer_of(args, encoding)
        batch = benchmark.made_up_batch(images, benchmark.config_of(args, encoding))
        with Operations() as seen:
            trainer.train_step([batch])
        largest.append(seen.largest)
    heads, tokens = 2, 1024
    assert largest[1] < images * heads * tokens**2 / 4
    assert largest[1] <= 4 * largest[0]


@pytest.mark.parametrize(("model", "published"), [("DiT-XS/2", None), ("DiT-S/2", 36), ("DiT-B/4", 33)])
def test_operations_of_a_step_are_those_of_its_matrix_products(model, published):
    """A closed form, and the GFLOP of DiT's paper for a 256² image, times 6 for multiply-adds and backward pass."""
    config = benchmark.ModelConfig(model, rope=benchmark.ENCODINGS["spiral"])
    with torch.device("meta"):
        built = config.build()
    flops = benchmark.flops_of(config)
    n, d, p = math.prod(built.grid), built.x_embedder.proj.out_channels, built.patch_size
    block = 24 * n * d**2 + 4 * n**2 * d + 12 * d**2  # qkv, projection and MLP; attention; modulation
    ends = 2 * n * d * p**2 * (4 + 8) + 4 * d**2 + 2 * (256 * d + d**2)
    assert flops == 3 * (len(built.blocks) * block + ends)
    assert published is None or flops / 1e9 == pytest.approx(published, abs=0.7)


def test_variants_alternate_and_warm_up(monkeypatch):
    called, seconds = [], iter([9, 9, 9, 4, 1, 2, 3, 5, 7])
    monkeypatch.setattr(benchmark, "timed", lambda call, device: (call(), next(seconds))[1])
    calls = [lambda name=name: called.append(name) for name in "abc"]
    times = benchmark.alternate(calls, 2, ARGS.device)
    assert "".join(called) == "abc" + "bca" + "cab"
    assert times[0] == {"median": 3500, "low": 2750, "high": 4250}
    assert [found["median"] for found in times] == [3500, 5500, 2000]


def test_numbers_of_a_table():
    variants = [
        benchmark.Variant({"precision": "fp32", "pass": "step"}, None, images=8, flops=10**9),
        benchmark.Variant({"pass": "step"}, None, images=4),
        benchmark.Variant({"pass": "forward"}, None, images=8),
        benchmark.Variant({"precision": "fp32"}, None, flops=4 * 10**9),
        benchmark.Variant({"precision": "bf16"}, None, flops=10**9),
    ]
    rows = benchmark.tabulate(variants, [{"median": ms} for ms in (200.0, 50.0, 100.0, 400.0, 10.0)])
    assert [row.get("images/s") for row in rows] == [40, 80, 80, None, None]
    assert [row.get("relative time") for row in rows] == [1, 0.5, 1, None, None]
    assert [row.get("GFLOP/s") for row in rows] == [5, None, None, 10, 100]
    assert [row.get("share of peak") for row in rows] == [0.5, None, None, 1, 1]
    assert [benchmark.show(value) for value in (12345.6, 0.12345, 4096, None)] == ["12,346", "0.123", "4,096", ""]
    assert benchmark.show({"median": 2.0, "low": 1.0, "high": 3.0}) == "2 (1 to 3)"


def test_what_is_written(tmp_path, capsys):
    """Tables of positive numbers; a later command adds its parts to the results of an earlier one."""
    out = tmp_path / "out.json"
    arguments = ["--quick", "--device", "cpu", "--precisions", "fp32", "--out", str(out), "--parts"]
    benchmark.main([*arguments, "peak", "sampling", "--dry-run"])
    assert benchmark.PARTS["sampling"].__doc__ in capsys.readouterr().out and not out.exists()
    benchmark.main([*arguments, *list(benchmark.PARTS)[:-1]])
    first = json.loads(out.read_text())
    benchmark.main([*arguments, "sampling"])
    parts = json.loads(out.read_text())
    assert list(parts) == list(benchmark.PARTS) and parts == first | {"sampling": parts["sampling"]}
    printed = capsys.readouterr().out
    for part in parts.values():
        assert benchmark.describe(part) in printed
        for row in part["rows"]:
            numbers = [value for value in row.values() if isinstance(value, float)] + list(row["ms"].values())
            assert all(0 < number < 1e6 for number in numbers), row
    assert [row["encoding"] for row in parts["position"]["rows"][::2]] == list(benchmark.ENCODINGS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rounds 1", "argument --rounds: '1' is not a whole number >= 2"),
        ("--out /nowhere/out.json", "--out '/nowhere/out.json' is in a folder that does not exist"),
        ("--device cuda", "--device cuda: this PyTorch sees no GPU"),
        ("--parts precision", "compiling on the CPU needs the C++ compiler 'none'"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "none")
    assert refused(benchmark.main, arguments.split()).startswith(message)
