"""The study of textures: the optimum in closed form, the images, the encodings, what is kept of a run, the page."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import TESTS
from test_rope import scores, spread_over_positions

from experiments import textures
from experiments.encodings import ENCODINGS, GoldenRoPE, LearnedRoPE, SimplexRoPE
from experiments.textures import ANGLES, AXES, OBLIQUE, TENTHS, Run, Study, Textures, covariance, excess
from rope import RopeConfig, SpiralRoPE, rotate

CPU = torch.device("cpu")
TINY = Study(grid=4, larger_grids=(5,), depth=1, hidden=((2, 32),), sigmas=(0.7,), steps=4, batch=4, measured_every=2)
TINY = dataclasses.replace(TINY, warmup_steps=1)
TOTAL = len(Study().runs)


@pytest.fixture
def small():
    return Textures(4, (0.7, 1.5), 0.05, CPU)


def noised(found: Textures, label: int, step: int, count: int) -> tuple[torch.Tensor, ...]:
    """Noise, noised images and the best prediction, each (count, 16)."""
    labels, t = torch.full((count,), label), torch.full((count,), step)
    white, noise = torch.randn(2, count, 16, generator=torch.Generator().manual_seed(0))
    a = found.alphas[step]
    x_t = a.sqrt() * found.images(labels, white).flatten(1) + (1 - a).sqrt() * noise
    return noise, x_t, found.best_noise(x_t.view(-1, 1, 4, 4), t, labels).flatten(1)


@pytest.mark.parametrize("label, step", [(1, 50), (12, 350), (15, 750)])
def test_the_optimum_is_what_linear_regression_finds(small, label, step):
    """For Gaussian images the best of all predictions is linear, so that least squares finds it, and its loss."""
    noise, x_t, best = noised(small, label, step, 100_000)
    weights = torch.linalg.lstsq(x_t.double(), noise.double()).solution
    assert float((x_t @ weights.float() - best).square().mean()) < 1e-3
    loss = (noise - x_t @ weights.float()).square().mean()
    assert float(loss) == pytest.approx(float(small.least_loss(torch.tensor([step]))[label]), rel=0.01)


@pytest.mark.parametrize("degrees, sigma", [(0, 0.7), (22.5, 1.0), (135, 0.7)])
def test_images_are_filtered_white_noise_cut_out_of_a_larger_field(degrees, sigma):
    """Against the filter itself, on fields of noise, and with every place of a field as one more image."""
    generator, (cos, sin) = np.random.default_rng(0), (math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    y, x = np.mgrid[-64:64, -64:64]
    kernel = np.exp(-(((x * cos + y * sin) / 5.7) ** 2 + (y * cos - x * sin) ** 2) / (2 * sigma**2))
    spectrum = np.fft.fft2(np.fft.ifftshift(kernel / np.sqrt(np.square(kernel).sum())))
    fields = np.fft.ifft2(np.fft.fft2(generator.normal(size=(100, 128, 128))) * spectrum).real
    measured = np.array([[(fields * np.roll(fields, (-dy, -dx), (1, 2))).mean() for dx in range(4)] for dy in range(4)])
    expected = covariance(4, degrees, sigma, 0.0)[0].reshape(4, 4)
    assert measured == pytest.approx(expected, abs=0.03)
    assert covariance(4, degrees, sigma, 0.25) == pytest.approx(
        0.75 * covariance(4, degrees, sigma, 0) + np.eye(16) / 4
    )


def test_images_have_the_covariance_of_their_class(small):
    labels, white = torch.full((100_000,), 11), torch.randn(100_000, 16, generator=torch.Generator().manual_seed(0))
    images = small.images(labels, white).flatten(1).numpy()
    assert images.T @ images / len(images) == pytest.approx(covariance(4, ANGLES[3], 1.5, 0.05), abs=0.02)


def test_a_texture_is_correlated_along_its_angle():
    offsets = {0: (0, 2), 45: (2, 2), 90: (2, 0), 135: (2, -2)}  # row and column; y counts downwards
    for degrees, (dy, dx) in offsets.items():
        correlation = covariance(9, degrees, 0.7, 0)[40].reshape(9, 9)
        assert correlation[4 + dy, 4 + dx] > 0.7 and abs(correlation[4 + dx, 4 - dy]) < 0.2


def test_excess_is_the_loss_above_the_least_one(small):
    class Constant(torch.nn.Module):
        """Predicts no noise: its loss is 1."""

        def forward(self, x, t, y):
            return torch.zeros_like(x)

    class Best(torch.nn.Module):
        def forward(self, x, t, y):
            return small.best_noise(x, t, y)

    assert float(excess(Best(), small, 2).max()) == 0
    found = excess(Constant(), small, 400)
    torch.testing.assert_close(found + small.least_loss(TENTHS), torch.ones(16, 10), atol=0.06, rtol=0)


# Encodings


@pytest.mark.parametrize("name", [name for name in ENCODINGS if "clamp" not in name and name != "sincos"])
def test_attention_depends_on_relative_position(name):
    rope = ENCODINGS[name].build(64, 16)
    for h, w in ((16, 16), (8, 20)):
        with torch.no_grad():
            assert spread_over_positions(scores(rope, h, w), h, w) < 1e-5


def test_example_of_the_page_runs(run_page):
    run_page("extending.md", "A new position encoding")


def test_directions_of_the_added_encodings():
    exact = RopeConfig(border="exact")
    frequency, golden = GoldenRoPE(64, 8, exact).table()
    apart = torch.rad2deg(torch.acos((golden[1:] * golden[:-1]).sum(1)))
    torch.testing.assert_close(apart, torch.full((31,), 180 / 1.6180340), atol=1e-3, rtol=0)
    torch.testing.assert_close(frequency, 1.5 * 10000 ** (-torch.arange(32) / 32))
    frequency, simplex = SimplexRoPE(48, 8, exact).table()  # 24 pairs: eight frequencies, three directions each
    corners = simplex.view(8, 3, 2)
    assert float(corners.sum(1).abs().max()) < 1e-6  # the corners of a regular triangle about the origin
    assert (frequency.view(8, 3) == frequency[::3, None]).all()
    torch.testing.assert_close(frequency[::3], 1.5 * 10000 ** (-torch.arange(8) / 8))


@pytest.mark.parametrize("rotate", [0, 4])
def test_learned_vectors_begin_as_the_settings_and_are_trained(rotate):
    config = RopeConfig(rotate=rotate, border="exact", truncate_percentage=0.25)  # a frequency of 0 gives no NaN
    learned, fixed = LearnedRoPE(64, 16, config), SpiralRoPE(64, 16, config)
    torch.testing.assert_close(learned.phases(16, 16), fixed.phases(16, 16), atol=1e-5, rtol=0)
    learned.phases(16, 16).cos().sum().backward()
    assert learned.vectors.grad.isfinite().all() and learned.vectors.grad[0].any()
    assert [*learned.state_dict()] == ["vectors", "freqs"]


# Runs


def test_runs_of_a_seed_have_the_same_weights_whatever_the_encoding():
    models = [textures.build(Run(name, 2, 1e-3, 0), TINY).state_dict() for name in ("sincos", "golden", "spiral2")]
    shared = set.intersection(*map(set, models))
    assert len(shared) > 20 and all(torch.equal(models[0][name], other[name]) for name in shared for other in models)


def test_a_run_keeps_what_the_page_needs_and_repeats_to_the_bit():
    run = Run("spiral2", 2, 1e-3, 0)
    found = textures.trained(run, TINY, CPU)
    assert found == textures.trained(run, TINY, CPU) and json.loads(json.dumps(found)) == found
    assert [step for step, *_ in found["curve"]] == [2, 4]
    assert len(found["classes"]) == 8 and np.mean(found["classes"]) == pytest.approx(np.mean(found["tenths"]))
    assert list(found["grids"]) == ["5 × 5, extrapolate", "5 × 5, interpolate"]
    assert np.sum(found["attention"], axis=1) == pytest.approx(np.ones(2))
    assert {"grids", "attention"}.isdisjoint(textures.trained(Run("sincos", 2, 1e-3, 0), TINY, CPU))
    assert "attention" not in textures.trained(run._replace(seed=1), TINY, CPU)


def test_attention_is_that_of_the_models_forward():
    """Of a model whose queries and keys are the same at every pixel, so that position alone decides."""
    model, found = textures.build(Run("axial", 2, 1e-3, 0), TINY), TINY.textures(4, CPU)
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight)
    q, k = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    model.blocks[0].attn.qkv.bias.data = torch.cat([q, k, torch.zeros(32)])
    attended = textures.attention(model, found, label=2, images=3)
    cos, sin = model.rope_embedder(4, 4)
    q, k = (rotate(v.view(1, 1, 2, 16).expand(1, 16, 2, 16), cos, sin)[0] for v in (q, k))
    expected = torch.einsum("hd,nhd->hn", q[10], k).div(4).softmax(-1)  # pixel (2, 2) of 4 x 4; head dimension 16
    torch.testing.assert_close(attended, expected)
    assert "attend" not in vars(model.blocks[0].attn)


@pytest.mark.parametrize("total, more", [(TOTAL, []), (6, ["--quick"]), (TOTAL, ["--device", "cuda"])])
def test_a_dry_run_counts_and_writes_nothing(total, more, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(textures.distributed, "resolve_precision", lambda *_: "fp32")
    textures.main(["--work-dir", str(tmp_path), "--out", str(tmp_path / "again.json"), "--dry-run", *more])
    assert f"{total} of {total} runs to train" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    args = textures.parse_args(more)
    assert (args.out == textures.PUBLISHED) == (not more)  # what is published is left alone


def test_wrong_input_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(textures.main, ["--device", "cuda"]) == (
        "--device cuda: PyTorch sees no GPU here; leave it out for the CPU"
    )
    assert refused(textures.main, ["--run", "axial", "--work-dir", tmp_path]) == (
        "--run 'axial' is not a run of this study; expected one such as sincos/heads2/lr0.002/seed0"
    )


# Tables


def record(axes: float, oblique: float, grids: float = 1.0) -> dict:
    classes = [axes if k % 8 in AXES else oblique for k in range(24)]
    curve = [[200, 4 * axes, 4 * oblique], [400, axes, oblique]]
    return {"classes": classes, "curve": curve, "grids": {"12": grids}}


@pytest.fixture
def groups():
    seeds = np.array([-1, 0, 1]) / 1000
    return {
        ("axial", 2): [record(0.010 + s, 0.020 + s) for s in seeds],
        ("spiral4", 2): [record(0.011 + s, 0.013 + s * 1.01, grids=2.0) for s in seeds],
        ("golden", 2): [record(0.012, 0.014)],  # a single seed has no interval
    }


def cells(text: str) -> list[dict[str, str]]:
    head, _, *rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_tables_say_what_the_runs_gave(groups):
    axial, spiral, golden = cells(textures.excess_table(groups))
    assert (axial["0°"], axial["22.5°"]) == ("0.0100", "0.0200")
    assert (axial["axes"], axial["oblique"]) == ("0.0100 ± 0.0010", "0.0200 ± 0.0010")
    assert (axial["mean"], axial["oblique − axes"]) == ("0.0175 ± 0.0010", "0.0100 ± 0.0000")
    assert (spiral["mean"], spiral["oblique − axes"]) == ("0.0125 ± 0.0010", "0.0020 ± 0.0000")
    assert golden["mean"] == "0.0135"
    difference, single = cells(textures.differences_table(groups))
    assert difference["axes"].startswith("+0.0010 [+0.0010, +0.0010] ‡")
    assert difference["oblique"].startswith("-0.0070 [-0.0070, -0.0070] ‡") and difference["of the mean"] == "-29 %"
    assert single["oblique"] == "-0.0050"
    steps = cells(textures.steps_table(groups))
    assert steps[0]["to 0.04"] == "314 ± 9" and steps[0]["to 0.012"] == "not by 3 of 3"
    white = dataclasses.replace(TINY, noise=1.0)  # whose eigenvalues are 1: the least loss is alpha-bar, mean 0.2750
    assert textures.least_losses(white).endswith(" 0.2750 on average.")
    assert [row["12"] for row in cells(textures.grids_table(groups))] == ["1.0000", "2.0000", "1.0000"]


def test_agreement_is_a_rank_correlation(groups):
    errors = {str(budget): [0.0 if k % 8 in AXES else 0.5 for k in range(24)] for budget in textures.BUDGETS}
    better = {budget: [error / 2 for error in values] for budget, values in errors.items()}
    text = textures.agreement(groups, {"axial": errors, "spiral4": better, "golden": better})
    assert text.count("+1.00 over the eight angles, mean of 9 encodings and widths") == 2
    assert (
        text.count("over 3 encodings +0.87 (oblique) and +0.87 (oblique − axes)") == 2
    )  # of three, two are told apart by the excess alone
    assert "-1.00 over the eight" in textures.agreement(
        groups, {"axial": {k: [1 - e for e in v] for k, v in errors.items()}}
    )


def test_axial_could_not_express_what_is_oblique():
    study = dataclasses.replace(Study(), sigmas=(0.7,))
    axial, best = (np.array(textures.fit_errors(ENCODINGS[name], study)["32"]) for name in ("axial", "best"))
    assert axial[AXES].max() < 0.01 < 0.3 < axial[OBLIQUE].min() and best.max() < 0.05


def test_tables_of_the_page_are_those_of_the_results():
    stored = json.loads(textures.PUBLISHED.read_text())
    page = (TESTS.parent / "docs" / "evidence.md").read_text(encoding="utf-8")
    for part in textures.all_tables(Study(), stored["runs"], stored["fits"]).split("\n\n"):
        assert part.startswith("#") or re.sub(r"\s+", " ", part) in re.sub(r"\s+", " ", page)


@pytest.mark.slow
def test_quick_study_runs_from_nothing_to_its_tables(tmp_path, capsys):
    textures.main(["--quick", "--work-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = {row["encoding"]: row for row in cells(printed.partition("### Differences")[0])}
    apart = {name: float(row["oblique − axes"].partition(" ")[0]) for name, row in rows.items()}
    assert apart["axial RoPE"] > 1.5 * apart["Spiral R = 4"]
    assert sorted(path.name for path in (tmp_path / "quick").iterdir()) == [
        "evidence_attention.png",
        "evidence_textures.png",
        "runs",
        "textures.json",
    ]
