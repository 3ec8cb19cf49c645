"""The benchmark: what it times is what training does, and what it reports is what it timed."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import train
from models import DiT_models, ModelConfig
from rope import RopeConfig
from runtime import sampling

pytestmark = pytest.mark.usefixtures("tiny_commands")
CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """Counts tensor operations by name, and remembers the largest tensor that one of them made."""

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


def operations(function, *arguments) -> Operations:
    """Of the second call, when the optimizer has its state."""
    function(*arguments)
    with Operations() as seen:
        function(*arguments)
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_what_a_training_step_does(precision):
    model = ModelConfig("DiT-XS/2", (8, 8), rope=RopeConfig(rotate=4))
    config = {"model": model.to_dict(), "vae": {"scaling_factor": 0.18215, "shift_factor": 0.0}}
    args = train.parse_args(["--latents-dir", "unused", "--precision", precision])
    absent = dict.fromkeys(("dataset", "vae", "held_out", "decoder"))
    trainer = train.Trainer(train.Job(args, CPU, **absent, config=config, total_steps=10, steps_per_epoch=5))
    step = benchmark.TrainingStep(benchmark.build_model("DiT-XS/2", 8), CPU, precision)
    step.model.load_state_dict(trainer.model.state_dict())
    batch = benchmark.random_batch(2, 8, CPU)
    assert operations(step, *batch).counts == operations(trainer.train_step, [batch]).counts
    for name, weight in trainer.model.state_dict().items():
        torch.testing.assert_close(step.model.state_dict()[name], weight, atol=1e-6, rtol=0)


def test_without_position_encoding_nothing_else_changes():
    """Leaving the rotation out takes the operations of the rotation away, and no others."""
    batch = (torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([0, 1]))
    rotated, plain = (
        operations(benchmark.build_model("DiT-XS/2", 8, name).eval(), *batch).counts for name in ("axial", "none")
    )
    assert not plain - rotated
    assert plain["aten.addmm.default"] == rotated["aten.addmm.default"] > 0
    assert {"aten.cos.default", "aten.mul.Tensor"} <= set(rotated - plain)


@pytest.mark.parametrize("name", ["DiT-XS/2", "DiT-S/4"])
def test_operations_of_a_step_are_those_of_its_matrix_products(name):
    model = benchmark.build_model(name, 16).eval()
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randn(1, 4, 16, 16), torch.tensor([3]), torch.tensor([0]))
    assert benchmark.step_flops(model) == pytest.approx(3 * counter.get_total_flops(), rel=1e-6)


def test_published_operation_counts():
    """36 GFLOP for a training step of DiT-S/2 with a 256² image, 33 for B/4."""
    for name, expected in (("DiT-S/2", 36), ("DiT-B/4", 33)):
        with torch.device("meta"):
            model = DiT_models[name](input_size=32)
        assert benchmark.step_flops(model) / 1e9 == pytest.approx(expected, abs=0.7)


@pytest.mark.parametrize("encoding", list(benchmark.ENCODINGS))
def test_no_attention_matrix_is_ever_made(encoding):
    """At 1,024 tokens every tensor of a step stays below one N x N matrix per head and image, and grows as N."""
    largest = []
    for latent in (32, 64):
        step = benchmark.TrainingStep(benchmark.build_model("DiT-XS/2", latent, encoding), CPU)
        largest.append(operations(step, *benchmark.random_batch(2, latent, CPU)).largest)
    heads, tokens = 2, 1024
    assert largest[1] < 2 * heads * tokens**2 / 4
    assert largest[1] <= 4 * largest[0]


def test_variants_alternate_and_warm_up():
    called = []
    variants = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = benchmark.alternate(variants, rounds=2, warmup=1, calls=2, device=CPU, title="")
    assert "".join(called) == "aabbcc" + "bbccaa" + "ccaabb"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_numbers_of_a_measurement():
    assert benchmark.spread([1, 2, 3, 4, 9], 10) == {"median": 30, "low": 20, "high": 40}
    assert benchmark.rate(8, [2.0, 4.0, 100.0]) == 2
    assert benchmark.ratio([3, 3, 9], [2, 1, 2]) == 1.5
    peaks = {"fp32 1024³": [2.0], "fp32 2048³": [4.0], "bf16 2048³": [1.0], "fp32": [0.1]}
    assert benchmark.peak_flops(peaks, "fp32") == 2 * 2048**3 / 4
    assert benchmark.show(12345.6) == "12,346" and benchmark.show(0.12345) == "0.123" and benchmark.show(None) == ""
    assert benchmark.show({"median": 2.0, "low": 1.0, "high": 3.0}) == "2 (1 to 3)"


def test_targets_follow_the_numbers():
    def row(variant, milliseconds, share):
        return {"variant": variant, "step, ms": {"median": milliseconds}, "share of peak": share}

    rows = [row("fp32", 100, 0.7), row("fp32 compiled", 90, 0.76), row("bf16", 60, 0.6), row("bf16 compiled", 60, 0.61)]
    assert benchmark.precision_targets(rows) == [
        {
            "target": "fp32 step: at least 75% of the peak of matrix products",
            "measured": "fp32 70%, fp32 compiled 76%",
            "met": "yes",
        },
        {
            "target": "bf16 step: at least 62% of the peak of matrix products",
            "measured": "bf16 60%, bf16 compiled 61%",
            "met": "no",
        },
        {
            "target": "bf16 step: at least 1.7 x as fast as fp32",
            "measured": "plain 1.67 x, compiled 1.50 x",
            "met": "no",
        },
    ]
    assert benchmark.precision_targets(rows[:1])[0]["met"] == "no" and len(benchmark.precision_targets(rows[:1])) == 1
    packed = [{"images": n, "added by the command, MB": m} for n, m in ((1, 200), (1000, 210), (5000, 211))]
    assert (
        benchmark.npz_target(packed)["measured"]
        == "211 MB at 5,000, 210 MB at 1,000; 222 MB at 50,000 by extrapolation"
    )
    assert benchmark.npz_target(packed)["met"] == "yes"
    packed[2]["added by the command, MB"] = 260
    assert benchmark.npz_target(packed)["met"] == "no"  # 822 MB at 50,000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel keeps no peak that can be reset")
def test_peak_memory_is_what_was_needed_since_the_reset(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text("import sys; data = b'1' * int(sys.argv[1]); print('quiet'); del data")
    for size in (200_000_000, 50_000_000):
        added, _ = benchmark.in_child(benchmark.peak_of_command, str(script), [str(size)])
        assert added == pytest.approx(size, abs=20_000_000)
    assert capfd.readouterr().out == ""


def small(tmp_path, *arguments: str) -> list[str]:
    sizes = ["--quick", "--image-size", "32", "--device", "cpu", "--precisions", "fp32", "--repeats", "1"]
    return [*sizes, "--out", str(tmp_path / "out.json"), *arguments]


def test_what_is_written(tmp_path, capsys, vae_folder):
    """Blocks of the parts measured are replaced, the rest of the page and of the results stays."""
    page = tmp_path / "page.md"
    names = ("targets", "position", "latents", "sampling")
    page.write_text("Before\n" + "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in names) + "After\n")
    options = ["--vae", str(vae_folder), "--num-workers", "0", "--sampling-steps", "3", "2", "2"]
    arguments = small(tmp_path, *options, "--markdown", str(page), "--parts")
    benchmark.main([*arguments, "position", "latents"])
    text = page.read_text()
    assert text.startswith("Before\n") and text.endswith("old\n<!-- /sampling -->\nAfter\n") and text.count("old") == 1
    benchmark.main([*arguments, "sampling"])
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results) == {"position", "latents", "sampling"}
    position, latents, samplers = (results[name]["tables"][0]["rows"] for name in names[1:])
    assert [row["encoding"] for row in position] == list(benchmark.ENCODINGS)
    assert [row["latents"] for row in latents] == ["online", "cached"]
    assert latents[1]["speed-up"] == pytest.approx(latents[0]["step, ms"]["median"] / latents[1]["step, ms"]["median"])
    assert [(row["sampler"], row["guidance"]) for row in samplers] == [
        *((name, "on") for name in sampling.SAMPLERS), ("dpm++", "0.25 to 0.75"), ("dpm++", "off")
    ]  # fmt: skip
    assert [row["model rows an image"] for row in samplers] == [6, 4, 4, 3, 2]
    text = page.read_text()
    for row in (*results["position"]["targets"], *results["latents"]["targets"]):
        assert f"| {row['target']} | {row['measured']} | {row['met']} |" in text
    assert text.split("<!-- position -->")[1].split("<!-- /position -->")[0].strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "10"], "--tokens 10 is not a square number; expected such as 64, 256, 1024"),
        (["--repeats", "0"], "argument --repeats: '0' is not a whole number >= 1"),
        (["--out", "/nowhere/out.json"], "folder '/nowhere' does not exist; make it, or choose another"),
        (
            ["--image-size", "100"],
            "--image-size 100 is not divisible by 16 (VAE down-sampling 8 x patch 2); choose a multiple of 16",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, refused):
    assert refused(benchmark.main, arguments) == message


def test_a_page_without_blocks_is_refused_before_measuring(refused, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- targets -->\n<!-- /targets -->\n")
    assert refused(benchmark.main, small(tmp_path, "--markdown", str(page), "--parts", "peak")) == (
        f"--markdown {str(page)!r} has no block <!-- peak --> ... <!-- /peak -->"
    )
    assert not (tmp_path / "out.json").exists()
