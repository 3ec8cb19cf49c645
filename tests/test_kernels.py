"""The best attention pattern of one head: against closed forms, another solver, real attention, and the page."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TESTS
from PIL import Image
from scipy.optimize import minimize

from experiments import kernels
from experiments.kernels import AXIAL, BUDGETS, FREE, PAPER, SAME, SMALL, TOLERANCE, best, features, fits, oriented
from rope import RopeConfig, SpiralRoPE, rotate

MIDDLE = kernels.query_places(15, 1)


def wanted(degrees: float, sigma: float = 0.7) -> np.ndarray:
    return oriented((15, 15), MIDDLE, degrees, sigma)


@pytest.mark.parametrize("sigma, errors", [(0.7, [0, 0.47, 0.60, 0.47, 0]), (1.5, [0, 0.32, 0.45, 0.32, 0])])
def test_axial_holds_no_oblique_line_and_spiral_every_one(sigma, errors):
    angles = (0, 22.5, 45, 67.5, 90)
    assert [fit.error for fit in fits(AXIAL, angles, sigma)] == pytest.approx(errors, abs=0.005)
    for config in (PAPER, replace(PAPER, **SAME)):
        assert max(fit.error for fit in fits(config, angles, sigma)) < 0.005


def test_wanted_pattern_has_the_axes_and_the_direction_asked_for():
    grid, centre = (61, 61), kernels.query_places(61, 1)
    y, x = np.divmod(np.arange(61 * 61), 61) - np.array([[30], [30]])
    for degrees in (0, 30, 90, 135):
        (density,) = oriented(grid, centre, degrees, 1.5)
        variances, axes = np.linalg.eigh(np.cov([x, y], aweights=density, ddof=0))
        assert np.sqrt(variances) == pytest.approx([1.5, 1.5 * kernels.ASPECT], rel=0.01)
        angle = math.degrees(math.atan2(axes[1, 1], axes[0, 1]))
        assert (angle - degrees + 90) % 180 == pytest.approx(90, abs=0.1)


@pytest.mark.parametrize("degrees", [22.5, 45, 70])
@pytest.mark.parametrize("sigma", [0.7, 1.5])
def test_best_of_axial_is_the_product_of_the_marginals(degrees, sigma):
    """Its patterns are products; of these the nearest has the wanted marginals, mutual information away."""
    (fit,) = fits(AXIAL, [degrees], sigma)
    density = wanted(degrees, sigma).reshape(15, 15)
    product = np.outer(density.sum(1), density.sum(0))
    assert np.abs(fit.pattern.reshape(15, 15) - product).sum() / 2 < 1e-3
    information = np.sum(density * np.log(density / product))
    assert fit.divergence == pytest.approx(information, abs=1e-5)


def smooth(coefficients: np.ndarray, waves: np.ndarray, target: np.ndarray):
    """Divergence and gradient for scipy: one query, coefficients as a flat list."""
    flat = waves[0].reshape(waves.shape[1], -1)
    score = flat @ coefficients
    pattern = np.exp(score - score.max())
    pattern /= pattern.sum()
    entropy = -np.sum(target[0] * np.log(target[0]))
    value = np.log(np.exp(score - score.max()).sum()) + score.max() - target[0] @ score - entropy
    return value, (pattern - target[0]) @ flat


@pytest.mark.parametrize("degrees", [0, 30, 45])
@pytest.mark.parametrize("budget", [1.0, 4.0, FREE])
def test_solution_is_that_of_scipy(degrees, budget):
    """SLSQP with the bound as a constraint; L-BFGS where it does not bind."""
    waves = features(SpiralRoPE(16, 15, RopeConfig(rotate=2, theta=10.0, border="exact")), (15, 15), MIDDLE)
    target = wanted(degrees, 1.5)
    fit = best(waves, target, budget)
    method = {"method": "SLSQP", "options": {"maxiter": 2000, "ftol": 1e-12}}
    lengths = lambda c: np.sqrt((c.reshape(-1, 2) ** 2).sum(1) + 1e-12)  # noqa: E731 - differentiable at 0
    method["constraints"] = {"type": "ineq", "fun": lambda c: budget - lengths(c).sum()}
    if budget == FREE:
        method = {"method": "L-BFGS-B", "options": {"maxiter": 100_000, "maxfun": 100_000, "ftol": 1e-15, "gtol": 1e-9}}
    other = minimize(smooth, np.zeros(16), (waves, target), jac=True, **method)
    assert fit.divergence == pytest.approx(other.fun, abs=2e-5) and fit.gap < TOLERANCE
    assert np.abs(fit.pattern - np.exp(-smooth_pattern(other.x, waves))).sum() / 2 < 5e-3
    if budget < FREE:
        assert np.hypot(*fit.coefficients.T).sum() == pytest.approx(budget, rel=1e-3)  # all of it is spent


def smooth_pattern(coefficients: np.ndarray, waves: np.ndarray) -> np.ndarray:
    """Minus the logarithm of the pattern."""
    score = waves[0].reshape(waves.shape[1], -1) @ coefficients
    return np.log(np.exp(score - score.max()).sum()) + score.max() - score


def test_nothing_within_the_budget_is_better_by_more_than_the_gap():
    waves, target, random = features(SpiralRoPE(64, 15, PAPER), (15, 15), MIDDLE), wanted(30), np.random.default_rng(0)
    fit = best(waves, target, 8)
    for _ in range(200):
        c = random.normal(size=(32, 2)) * random.exponential(size=(32, 1)) ** 3
        c = fit.coefficients + random.uniform(0, 0.3) * (c * 8 / np.hypot(*c.T).sum() - fit.coefficients)
        assert np.hypot(*c.T).sum() <= 8 + 1e-9
        assert smooth(c.ravel(), waves, target)[0] >= fit.divergence - fit.gap


def test_more_budget_is_never_worse():
    for config in (AXIAL, PAPER):
        divergences = [fits(config, [22.5], 0.7, budget)[0].divergence for budget in (1, 4, 16, 64, FREE)]
        assert all(low < high + TOLERANCE for high, low in zip(divergences, divergences[1:], strict=False))
    assert divergences[-1] < 1e-3 < divergences[0]


@pytest.mark.parametrize("border", ["exact", "clamp"])
def test_a_query_and_a_key_of_that_budget_attend_like_this(border):
    """The pattern is that of softmax(q k / sqrt(D)) with the model's own rotation and |q| |k| / sqrt(D) = budget."""
    rope, queries = SpiralRoPE(64, 8, replace(PAPER, border=border)), kernels.query_places(8, 2)
    fit = best(features(rope, (8, 8), queries), oriented((8, 8), queries, 30, 1.0), 8.0)
    length = np.hypot(*fit.coefficients.T)
    assert length.sum() <= 8
    share = np.sqrt(length * math.sqrt(64))  # of q and of k in each pair
    turned = np.arctan2(fit.coefficients[:, 1], fit.coefficients[:, 0])
    q = np.stack([share, 0 * share], 1).ravel()
    k = np.stack([share * np.cos(turned), -share * np.sin(turned)], 1).ravel()
    assert np.linalg.norm(q) * np.linalg.norm(k) / 8 == pytest.approx(length.sum())
    q, k = (rotate(torch.tensor(v).expand(1, 64, 1, 64), *rope(8, 8))[0, :, 0].double() for v in (q, k))
    attention = (q @ k.T / 8).softmax(1)[queries]
    torch.testing.assert_close(attention, torch.from_numpy(fit.pattern), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [AXIAL, PAPER, replace(PAPER, rotate=2), replace(PAPER, **SAME)])
def test_a_quarter_turn_and_where_directions_are_alike_a_mirror_change_nothing(config):
    divergence = {angle: fits(config, [angle], 0.7, 16)[0].divergence for angle in (20, 110, -20)}
    assert divergence[110] == pytest.approx(divergence[20], abs=2e-5)
    mirrored = config.rotate <= 2 or config.same_theta  # else mirror images have other frequencies
    assert (abs(divergence[-20] - divergence[20]) < 2e-5) == mirrored


def test_symmetric_patterns_need_no_sines_and_others_do():
    waves = features(SpiralRoPE(64, 15, PAPER), (15, 15), MIDDLE)
    assert np.abs(best(waves, wanted(30), 16).coefficients[:, 1]).max() < 1e-3
    one_side = wanted(30).reshape(15, 15) * (np.arange(15) >= 7)
    assert np.abs(best(waves, (one_side / one_side.sum()).reshape(1, -1), 16).coefficients[:, 1]).max() > 0.1


def test_clamp_costs_what_no_budget_repairs_except_along_the_axes():
    found = {
        border: fits(replace(PAPER, border=border), [0, 45], 1.5, grid=8, per_side=4) for border in ("exact", "clamp")
    }
    assert max(fit.error for fit in found["exact"]) < 0.005 and found["clamp"][1].error > 0.03
    axial = [fits(replace(AXIAL, border=border), [0], 1.5, 16, grid=8, per_side=2)[0] for border in ("exact", "clamp")]
    assert np.array_equal(axial[0].pattern, axial[1].pattern)


def section() -> str:
    page = (TESTS.parent / "docs" / "evidence.md").read_text(encoding="utf-8")
    return re.search(r"^## What one head can express\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL)[1]


def rows(markdown: str) -> dict[tuple[str, ...], list[list[float]]]:
    """Numbers of each row by its leading words; of a settings table (one leading word), one list a table."""
    found = {}
    for line in re.findall(r"^\| (.*?) \|$", markdown, re.MULTILINE):
        cells = line.split(" | ")
        words = [cell for cell in cells if not re.match(r"[\d.]+( \(|$)", cell) or "," in cell]
        found.setdefault(tuple(words), []).append([float(n) for cell in cells for n in re.findall(r"\d\.\d\d", cell)])
    return found


def test_tables_of_the_page_are_what_is_computed():
    """Of the tables that take long, some rows."""
    published = rows(section())
    assert len(published) > 20
    some = [AXIAL, replace(PAPER, rotate=2), replace(PAPER, **SMALL), replace(PAPER, **SAME, **SMALL)]
    computed = [kernels.angles_table([AXIAL, PAPER]), kernels.settings_table(some)]
    for words, found in rows("\n".join(computed)).items():
        for values in found:
            assert any(values == pytest.approx(row, abs=0.011) for row in published[words] if len(row) == len(values))


def test_picture_of_the_page_is_drawn_and_the_command_checks_first(tmp_path, capsys, refused, monkeypatch):
    arguments = ["--figures", str(tmp_path), "--head-dim", "16", "--rope-rotate", "2"]
    kernels.main([*arguments, "--dry-run"])
    assert capsys.readouterr().out == f"dry run: would draw Spiral R = 2 into {tmp_path}\n"
    assert list(tmp_path.iterdir()) == []
    line = refused(kernels.main, ["--figures", tmp_path, "--rope-rotate", "5"])
    assert line == "--rope-rotate 5 does not fit --head-dim 64; expected one of 0, 1, 2, 4, 8, 16"
    line = refused(kernels.main, ["--figures", tmp_path / "missing"])
    assert line.startswith("--figures ") and "folder that does not exist" in line

    fit = fits(PAPER, [0], 0.7)[0]
    monkeypatch.setattr(kernels, "fits", lambda config, angles, *args, **kwargs: [fit for _ in angles])
    kernels.main(arguments)
    drawn = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
    assert drawn == {name: Image.open(TESTS.parent / "docs/images" / name).size for name in drawn} and len(drawn) == 2


def test_labels_name_what_is_not_the_default():
    assert kernels.label(replace(AXIAL, theta=100.0)) == "axial"
    assert kernels.label(replace(PAPER, **SMALL, **SAME)) == "Spiral R = 4, theta 100, same_theta"
    assert kernels.label(replace(PAPER, border="clamp", freqs_for="pixel")) == "Spiral R = 4, pixel, clamp"
    assert kernels.compared(AXIAL, 64) == [AXIAL] + [c for c in kernels.compared(AXIAL, 64) if c != AXIAL]
    assert BUDGETS[-1] == FREE
