"""What visualize_rope.py draws, as numbers, and what a user of the command sees."""

import itertools
import math

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import visualize_rope
from rope import RopeConfig, SpiralRoPE, rotate
from visualize_rope import directions, frequency_vectors, main

GRID = (16, 16)


@pytest.mark.parametrize("head_dim, rotations", [(64, 0), (64, 1), (64, 2), (64, 4), (64, 8), (72, 3), (72, 9)])
def test_drawn_vectors_are_frequencies_times_directions(head_dim, rotations):
    """Eq. 8 to 13 where R divides D/8, and the axes for R = 0, although the border is clamped."""
    half, directions_of_half = head_dim // 4, max(rotations, 1)
    expected = torch.empty(2 * half, 2)
    for pair in range(2 * half):
        alpha = pair // 2 % directions_of_half * math.pi / 2 / directions_of_half
        direction = (math.sin(alpha), math.cos(alpha)) if pair < half else (math.cos(alpha), -math.sin(alpha))
        expected[pair] = 1.5 * 10000 ** (-(pair % half) / half) * torch.tensor(direction)
    config = RopeConfig(rotate=rotations, border="clamp")
    torch.testing.assert_close(frequency_vectors(head_dim, config), expected, rtol=1e-5, atol=1e-6)
    assert [len(pairs) for pairs in directions(head_dim, config)] == [directions_of_half] * 2


@pytest.mark.filterwarnings("ignore:rotate .* unevenly")
@pytest.mark.parametrize("head_dim, rotations", [(64, 0), (64, 4), (64, 16), (72, 2), (72, 18)])
def test_every_pair_is_drawn_once_in_its_direction(head_dim, rotations):
    config = RopeConfig(rotate=rotations)
    halves, (x, y) = directions(head_dim, config), frequency_vectors(head_dim, config).double().T
    angles = torch.rad2deg(torch.atan2(y, x))
    assert sorted(p for half in halves for pairs in half for p in pairs) == list(range(head_dim // 2))
    assert len(halves[0]) == len(halves[1])
    for pairs in itertools.chain(*halves):
        apart = (angles[pairs] - angles[pairs[0]] + 90).remainder(180) - 90  # opposite vectors are one wave
        torch.testing.assert_close(apart, torch.zeros(len(pairs), dtype=torch.float64), rtol=0, atol=1e-3)


def test_phase_maps_are_the_phases_of_the_module():
    rope = SpiralRoPE(64, (16, 24), RopeConfig(rotate=4))
    drawn = visualize_rope.phase_map(rope, 3, (16, 24))
    assert drawn.shape == (16, 24) and float(drawn.min()) >= 0 and float(drawn.max()) < 2 * math.pi
    torch.testing.assert_close(drawn[5, 20].cos(), rope.phases(16, 24)[5 * 24 + 20, 3].cos())


def test_marked_patches_are_those_that_clamping_changes():
    rope = SpiralRoPE(64, GRID, RopeConfig(rotate=4))
    share = [float(visualize_rope.clamped(rope, p, GRID).float().mean()) for p in range(32)]
    oblique = [value for p, value in enumerate(share) if p // 2 % 4]
    assert 0.10 < min(oblique) and max(oblique) < 0.12
    assert sum(share) / len(share) == pytest.approx(0.08, abs=0.005)
    assert all(value == 0 for p, value in enumerate(share) if p // 2 % 4 == 0)
    assert not visualize_rope.clamped(SpiralRoPE(64, GRID, RopeConfig(rotate=4, border="exact")), 3, GRID).any()


@pytest.mark.parametrize("config", [RopeConfig(), RopeConfig(rotate=4), RopeConfig(rotate=4, border="exact")])
def test_similarity_is_the_inner_product_of_rotated_constant_vectors(config):
    rope = SpiralRoPE(64, GRID, config)
    constant = rotate(torch.ones(1, 256, 1, 64), *rope(*GRID))[0, :, 0]  # (256, 64), squared norm 64
    expected = (constant @ constant[3 * 16 + 5] / 64).reshape(GRID).double()
    torch.testing.assert_close(visualize_rope.similarity(rope, GRID, (3, 5)), expected, rtol=0, atol=1e-5)


def test_axial_is_drawn_alone_when_it_is_what_was_asked_for():
    both = ["axial RoPE", "Spiral RoPE, rotate 4"]
    assert list(visualize_rope.variants(RopeConfig())) == both[:1]
    assert list(visualize_rope.variants(RopeConfig(rotate=4, same_theta=True))) == both


@pytest.mark.parametrize("lengths", [[1.5, 1e-4], [1.5, 1.5], [0.0, 0.0], [2e-30, 0.0]])
def test_every_frequency_is_inside_the_plane_and_a_power_of_ten_is_marked(lengths):
    low, high = visualize_rope.radial_limits(torch.tensor(lengths, dtype=torch.float64).numpy())
    assert all(low < math.log10(length) < high for length in lengths if length > 0)
    axes = Figure().add_subplot(projection="polar")
    visualize_rope.style_plane(axes, (low, high))
    labels = zip(axes.get_yticks(), axes.yaxis.get_ticklabels(), strict=True)
    marked = {power: label.get_text() for power, label in labels if low + 0.4 < power <= high}
    assert marked and all(label == f"$10^{{{round(power)}}}$" and power % 1 == 0 for power, label in marked.items())


def test_picture_has_all_parts(tmp_path, capsys):
    path = tmp_path / "picture with spaces.png"
    arguments = ["--rope-rotate", "2", "--grid", "4x6", "--out", str(path)]
    main([*arguments, "--dry-run"])
    planned = f"dry run: would draw directions, phases, similarity into {path}; nothing was written\n"
    assert capsys.readouterr().out == planned and list(tmp_path.iterdir()) == []
    main(arguments)
    assert capsys.readouterr().out == f"picture: {path}\n"
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == 1800
        heights = 7.1 + (2 * 2.4 * 4 / 6 + 2) + (10 / 5 * 4 / 6 + 1.8)  # inches
        assert picture.height == pytest.approx(150 * heights, abs=8)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.filterwarnings("error::UserWarning")
def test_uneven_directions_are_warned_about_once(tmp_path, capsys):
    main(["--rope-rotate", "2", "--head-dim", "72", "--only", "directions", "--out", str(tmp_path / "a.svg")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("warning: rotate 2 spreads the 36 channel pairs unevenly")


MISTAKES = {
    "--rope-rotate 5": "--rope-rotate 5 does not fit --head-dim 64; expected one of 0, 1, 2, 4, 8, 16",
    "--head-dim 66": "--head-dim 66 does not fit RoPE in two dimensions; choose a multiple of 4",
    "--grid 0": "argument --grid: '0' is not a grid; expected patches, as in 16 or 16x24, at most 512",
    "--grid 999": "argument --grid: '999' is not a grid; ",
    "--out a.jpg": "--out 'a.jpg' has the wrong ending; ",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_end_with_one_line_and_write_nothing(tmp_path, monkeypatch, refused, arguments):
    monkeypatch.chdir(tmp_path)
    for dry_run in ([], ["--dry-run"]):
        found = refused(main, ["--out", "a.png", *arguments.split(), *dry_run])
        assert found.startswith(MISTAKES[arguments])
