"""Spiral RoPE: golden tables, the closed form of the design, and what rotary embeddings must satisfy."""

import copy
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch

from rope import RopeConfig, SpiralRoPE, frequencies, rotate, valid_rotations

VALID = {64: [0, 1, 2, 4, 8, 16], 72: [0, 1, 2, 3, 6, 9, 18]}
VALID_SAME_THETA = {64: [0, 1, 2, 4, 8], 72: [0, 1, 3, 9]}
EVEN = {64: [0, 1, 2, 4, 8], 72: [0, 1, 3, 9]}

uneven_allowed = pytest.mark.filterwarnings("ignore:rotate .* unevenly")


def closed_form(head_dim, pt_grid, config, h, w):
    """Phases written down pair by pair in float64 Python numbers, sharing no code with the module."""
    quarter, rotations = head_dim // 4, config.rotate
    n = head_dim // (4 * rotations) if config.same_theta and rotations else quarter
    if config.freqs_for == "pixel":
        freqs = [math.pi * (1 + t * (config.max_freq / 2 - 1) / (n - 1)) for t in range(n)]
    elif config.min_freq_lang > 0 and rotations:
        s, m = config.max_freq_lang, config.min_freq_lang
        freqs = [math.exp(math.log(s) + (math.log(m) - math.log(s)) * t / (n - 1)) for t in range(n)]
    else:
        freqs = [config.max_freq_lang / config.theta ** (t / n) for t in range(n)]
    for t in range(n - int(n * config.truncate_percentage), n):
        freqs[t] = 0.0

    table = []
    for i in range(h):
        for j in range(w):
            row = []
            for p in range(head_dim // 2):
                t = p % quarter
                if config.same_theta and rotations:
                    t = 2 * (t // (2 * rotations)) + t % 2
                angle = math.radians(((p // 2) % rotations) * 90 / rotations) if rotations else 0.0
                x, y = j - (w - 1) / 2, i - (h - 1) / 2
                if p < quarter:
                    length, trained, position = h, pt_grid[0], x * math.sin(angle) + y * math.cos(angle)
                else:
                    length, trained, position = w, pt_grid[1], x * math.cos(angle) - y * math.sin(angle)
                edge = (length - 1) / 2
                if config.border == "clamp":
                    position = min(max(position, -edge), edge)
                row.append((position + edge) * trained / length * freqs[t])
            table.append(row)
    return torch.tensor(table, dtype=torch.float64)


def scores(rope, h, w):
    """Inner products of one query at every patch with one key at every patch: (h*w, h*w) float32."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, rope.head_dim, generator=generator)
    cos, sin = rope(h, w)
    q, k = (rotate(vector.expand(1, h * w, 1, -1), cos, sin)[0, :, 0] for vector in (q, k))
    return q @ k.T


def spread_over_positions(score, h, w):
    """Largest standard deviation of the score among pairs of patches with equal p - p'."""
    i, j = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    i, j = i.flatten(), j.flatten()
    offset = ((i[:, None] - i + h) * 2 * w + (j[:, None] - j + w)).flatten()
    score = score.double().flatten()
    count = torch.bincount(offset).clamp(min=1)
    mean = torch.bincount(offset, score) / count
    return (torch.bincount(offset, (score - mean[offset]) ** 2) / count).sqrt().max().item()


@uneven_allowed
def test_tables_are_the_golden_ones(golden):
    tables = golden("rope_tables.npz")
    for i, case in enumerate(json.loads(tables["cases"].item())):
        head_dim, grid, pt_grid = (case.pop(key) for key in ("head_dim", "grid", "pt_grid"))
        rope = SpiralRoPE(head_dim, pt_grid, RopeConfig(**case, border="clamp"))
        tolerance = 5e-5 if case["freqs_for"] == "pixel" else 1e-5
        cos, sin = rope(grid, grid)
        for name, value in {"freqs": rope.freqs, "cos": cos, "sin": sin}.items():
            expected = torch.from_numpy(tables[f"{name}_{i}"])
            assert (value - expected).abs().max() < tolerance, f"{name} of {case}"


@uneven_allowed
@pytest.mark.parametrize("border", ["clamp", "exact"])
@pytest.mark.parametrize(
    "head_dim, settings",
    [
        (64, dict(rotate=0)),
        (64, dict(rotate=0, same_theta=True, min_freq_lang=0.01)),
        (64, dict(rotate=4)),
        (64, dict(rotate=16, theta=100.0)),
        (64, dict(rotate=2, same_theta=True, max_freq_lang=1.0)),
        (64, dict(rotate=4, min_freq_lang=0.02, truncate_percentage=0.3)),
        (64, dict(rotate=2, freqs_for="pixel", max_freq=6.0)),
        (72, dict(rotate=3)),
        (72, dict(rotate=3, same_theta=True)),
        (72, dict(rotate=2, truncate_percentage=0.25)),
        (72, dict(rotate=18)),
    ],
)
def test_phases_follow_the_closed_form_on_any_grid(head_dim, settings, border):
    config = RopeConfig(**settings, border=border)
    for (h, w), pt_grid in {(4, 9): (6, 6), (7, 3): (7, 3), (5, 5): (16, 8), (1, 6): (1, 6)}.items():
        phases = SpiralRoPE(head_dim, pt_grid, config).phases(h, w)
        assert phases.dtype == torch.float32
        expected = closed_form(head_dim, pt_grid, config, h, w)
        tolerance = 5e-5 if config.freqs_for == "pixel" else 1e-5
        torch.testing.assert_close(phases.double().cos(), expected.cos(), atol=tolerance, rtol=0)
        torch.testing.assert_close(phases.double().sin(), expected.sin(), atol=tolerance, rtol=0)


@uneven_allowed
@pytest.mark.parametrize("head_dim, rotations", [(dim, r) for dim, valid in VALID.items() for r in valid])
def test_exact_scores_depend_on_relative_position_alone(head_dim, rotations):
    rope = SpiralRoPE(head_dim, 16, RopeConfig(rotate=rotations, border="exact"))
    assert spread_over_positions(scores(rope, 16, 16), 16, 16) < 1e-5
    assert spread_over_positions(scores(rope, 8, 20), 8, 20) < 1e-5


@pytest.mark.parametrize("head_dim", [64, 72])
def test_clamping_changes_nothing_along_the_axes_and_one_rotation_is_axial(head_dim):
    axial = SpiralRoPE(head_dim, 16, RopeConfig(rotate=0, border="exact"))
    for settings in (dict(rotate=0), dict(rotate=1), dict(rotate=1, border="exact")):
        assert torch.equal(SpiralRoPE(head_dim, 16, RopeConfig(**settings)).phases(16, 16), axial.phases(16, 16))


@pytest.mark.parametrize(
    "head_dim, rotations, overall", [(64, 2, 0.06), (64, 4, 0.08), (64, 8, None), (72, 3, 0.07), (72, 9, None)]
)
def test_tenth_of_each_oblique_direction_is_clamped(head_dim, rotations, overall):
    """Scores then depend on absolute position too."""
    clamp, exact = (SpiralRoPE(head_dim, 16, RopeConfig(rotate=rotations, border=b)) for b in ("clamp", "exact"))
    assert spread_over_positions(scores(clamp, 16, 16), 16, 16) > 0.1
    if overall is None:
        return
    moved = (clamp.phases(16, 16) - exact.phases(16, 16)).abs() / clamp.freqs.repeat(2) > 1e-3  # (256, D/2)
    share = moved.double().mean(0)
    oblique = (torch.arange(head_dim // 2) // 2) % rotations > 0
    assert not share[~oblique].any()
    assert 0.10 < share[oblique].min() and share[oblique].max() < 0.12
    assert share.mean().item() == pytest.approx(overall, abs=0.006)


@pytest.mark.parametrize("head_dim, rotations", [(dim, r) for dim, even in EVEN.items() for r in even if r])
def test_directions_are_evenly_spread_and_perpendicular_ones_share_frequencies(head_dim, rotations):
    rope = SpiralRoPE(head_dim, 16, RopeConfig(rotate=rotations, border="exact", theta=10.0))
    phases = rope.phases(16, 16).double().view(16, 16, -1)
    per_column, per_row = phases[8, 9] - phases[8, 8], phases[9, 8] - phases[8, 8]  # the gradient of each phase
    frequency, angle = torch.hypot(per_column, per_row), torch.atan2(per_row, per_column)
    count = 2 * rotations
    step = (angle / math.pi * count).round()
    torch.testing.assert_close(angle / math.pi * count, step, atol=1e-4, rtol=0)
    assert torch.bincount(step.long() % count, minlength=count).tolist() == [head_dim // 2 // count] * count

    row_half, column_half = frequency.chunk(2)
    torch.testing.assert_close(row_half, column_half, atol=1e-5, rtol=0)
    assert (((step[: head_dim // 4] - step[head_dim // 4 :]) % count) == rotations).all()  # 90 degrees apart


def test_same_theta_gives_every_direction_the_same_frequencies():
    rope = SpiralRoPE(64, 16, RopeConfig(rotate=4, same_theta=True, border="exact", theta=10.0))
    phases = rope.phases(16, 16).double().view(16, 16, -1)
    frequency = torch.hypot(phases[8, 9] - phases[8, 8], phases[9, 8] - phases[8, 8])
    direction = (torch.arange(32) // 2) % 4 + 4 * (torch.arange(32) < 16)
    for k in range(8):
        torch.testing.assert_close(frequency[direction == k].float(), rope.freqs, atol=1e-5, rtol=0)


def test_finer_grid_covers_the_trained_range_of_positions():
    rope = SpiralRoPE(64, 16, RopeConfig(rotate=0))
    coarse, fine = rope.phases(16, 16).view(16, 16, -1), rope.phases(32, 32).view(32, 32, -1)
    torch.testing.assert_close(fine[::2, ::2], coarse, atol=1e-5, rtol=0)


def test_rotation_follows_its_formula_and_preserves_norms():
    generator = torch.Generator().manual_seed(0)
    cos, sin = SpiralRoPE(64, (4, 6), RopeConfig(rotate=4))(4, 6)
    x = torch.randn(2, 24, 3, 64, generator=generator)
    rotated = rotate(x, cos, sin)
    a, b, c, s = x[..., ::2].double(), x[..., 1::2].double(), cos[:, None].double(), sin[:, None].double()
    torch.testing.assert_close(rotated[..., ::2].double(), a * c - b * s, atol=1e-6, rtol=0)
    torch.testing.assert_close(rotated[..., 1::2].double(), b * c + a * s, atol=1e-6, rtol=0)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), atol=0, rtol=1e-6)


def test_compiled_rotation_and_its_gradient_equal_the_eager_ones():
    """Compilers are given another form of the same arithmetic."""
    generator = torch.Generator().manual_seed(0)
    cos, sin = SpiralRoPE(64, 4, RopeConfig(rotate=4))(4, 4)
    wide = torch.randn(2, 16, 9, 64, generator=generator)
    g = torch.randn(2, 16, 6, 64, generator=generator)
    results = []
    for function in (rotate, torch.compile(rotate, backend="aot_eager", fullgraph=True)):
        x = wide.clone().requires_grad_()
        rotated = function(x[:, :, :6], cos, sin)  # a strided view, as in attention
        rotated.backward(g)
        results.append((rotated.detach(), x.grad))
    (eager, eager_grad), (compiled, compiled_grad) = results
    torch.testing.assert_close(compiled, eager, atol=1e-6, rtol=0)
    torch.testing.assert_close(compiled_grad, eager_grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(eager_grad[:, :, :6], rotate(g, cos, -sin), atol=1e-6, rtol=0)  # the opposite rotation
    assert not eager_grad[:, :, 6:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rotated_in_float32(dtype):
    cos, sin = SpiralRoPE(64, 16, RopeConfig(rotate=4))(16, 16)
    x = torch.randn(1, 256, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    rotated = rotate(x, cos, sin)
    assert rotated.dtype == dtype
    assert torch.equal(rotated, rotate(x.float(), cos, sin).to(dtype))


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.bfloat16),
        lambda m: copy.deepcopy(m).bfloat16(),
        lambda m: copy.deepcopy(m.half()).float(),
        lambda m: torch.nn.Sequential(m).to(torch.float16)[0],
    ],
)
def test_phases_survive_a_cast_of_the_model(convert):
    rope = SpiralRoPE(64, 16, RopeConfig(rotate=4))
    expected = rope.phases(16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.stack(rope(16, 16)), torch.stack([expected.cos(), expected.sin()]))
    converted = convert(rope)
    assert converted.freqs.dtype == torch.float32
    assert torch.equal(converted.phases(16, 16), expected)
    assert list(converted.state_dict()) == ["freqs"]


def test_loaded_frequencies_win_over_settings_and_complete_a_model_built_without_memory():
    source = SpiralRoPE(72, 16, RopeConfig(rotate=3, theta=100.0, max_freq_lang=0.7))
    other = SpiralRoPE(72, 16, RopeConfig(rotate=3))
    assert not torch.allclose(other.phases(16, 16), source.phases(16, 16))
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.phases(16, 16), source.phases(16, 16))
    with torch.device("meta"):
        rope = SpiralRoPE(72, 16, RopeConfig(rotate=3))
    rope = rope.bfloat16().to_empty(device="cpu")
    rope.load_state_dict(source.state_dict())
    assert torch.equal(rope.phases(16, 16), source.phases(16, 16))


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("same_theta", [False, True])
def test_rotations_that_do_not_fit_are_refused_and_uneven_ones_warned_of(head_dim, same_theta):
    valid = (VALID_SAME_THETA if same_theta else VALID)[head_dim]
    assert valid_rotations(head_dim, same_theta) == valid
    for rotations in range(41):
        config = RopeConfig(rotate=rotations, same_theta=same_theta)
        if rotations not in valid:
            kind = " with same_theta" if same_theta else ""
            expected = (
                f"^rotate {rotations} does not fit head dimension {head_dim}{kind}; "
                f"valid values are {', '.join(map(str, valid))}$"
            )
            with pytest.raises(ValueError, match=expected):
                SpiralRoPE(head_dim, 16, config)
        elif rotations not in EVEN[head_dim]:
            expected = f"rotate {rotations} .* unevenly .* {head_dim} are {', '.join(map(str, EVEN[head_dim]))}$"
            with pytest.warns(UserWarning, match=expected):
                SpiralRoPE(head_dim, 16, config)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                SpiralRoPE(head_dim, 16, config)


@pytest.mark.parametrize(
    "head_dim, settings, message",
    [
        (64, dict(rotate=-1), "rotate -1 does not fit head dimension 64; valid values are 0, 1, 2, 4, 8, 16"),
        (66, dict(rotate=0), "head dimension 66 .* multiple of 4"),
        (64, dict(freqs_for="pixels"), "freqs_for 'pixels' is unknown; expected 'lang' or 'pixel'"),
        (64, dict(border="wrap"), "border 'wrap' is unknown; expected 'clamp' or 'exact'"),
    ],
)
def test_impossible_settings_are_refused_by_name(head_dim, settings, message):
    with pytest.raises(ValueError, match=message):
        SpiralRoPE(head_dim, 16, RopeConfig(**settings))


@pytest.mark.parametrize(
    "head_dim, percentage, zeros",
    [(64, 0.0, 0), (64, 0.06, 0), (64, 0.25, 4), (72, 0.25, 4), (72, 0.99, 17), (64, 1.0, 16)],
)
@pytest.mark.parametrize("freqs_for", ["lang", "pixel"])
def test_truncation_zeroes_the_end_of_the_list(freqs_for, head_dim, percentage, zeros):
    config = RopeConfig(freqs_for=freqs_for)
    whole = frequencies(head_dim, config)
    truncated = frequencies(head_dim, replace(config, truncate_percentage=percentage))
    kept = len(whole) - zeros
    assert torch.equal(truncated[:kept], whole[:kept]) and whole.all()
    assert not truncated[kept:].any()  # pairs of frequency 0 are left alone


def test_lowest_frequency_is_the_one_asked_for():
    spiral = RopeConfig(rotate=4, min_freq_lang=0.01)
    freqs = frequencies(64, spiral).double()
    assert freqs[0].item() == pytest.approx(1.5) and freqs[-1].item() == pytest.approx(0.01)
    torch.testing.assert_close(freqs[1:] / freqs[:-1], (freqs[1] / freqs[0]).expand(15), atol=0, rtol=1e-5)
    assert frequencies(4, replace(spiral, rotate=1)).tolist() == [1.5]  # a list of one has no other end
    given_by_theta = frequencies(64, RopeConfig())
    assert torch.equal(frequencies(64, replace(spiral, rotate=0)), given_by_theta)
    assert torch.equal(frequencies(64, replace(spiral, min_freq_lang=1e-7)), given_by_theta)
