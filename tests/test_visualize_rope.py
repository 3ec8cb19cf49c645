"""What visualize_rope.py draws, as numbers, and what a user of the command sees."""

import itertools
import math

import pytest
import torch
from PIL import Image

import visualize_rope
from rope import RopeConfig, SpiralRoPE, rotate
from visualize_rope import (
    clamped,
    directions,
    frequency_vectors,
    main,
    parse_args,
    phase_map,
    radial_limits,
    similarity,
    variants,
)

GRID = (16, 16)


def angles(head_dim, config):
    """Directions of the drawn vectors in degrees, modulo 180: opposite vectors are one wave."""
    vectors = frequency_vectors(head_dim, config).double()
    return torch.rad2deg(torch.atan2(vectors[:, 1], vectors[:, 0])).remainder(180)


@pytest.mark.parametrize("head_dim, rotations", [(64, 1), (64, 2), (64, 4), (64, 8), (72, 3), (72, 9)])
def test_drawn_vectors_are_k_even_directions_that_share_frequencies_with_their_perpendiculars(head_dim, rotations):
    config = RopeConfig(rotate=rotations)
    vectors, found = frequency_vectors(head_dim, config), angles(head_dim, config)
    assert sorted({round(float(a), 2) % 180 for a in found}) == pytest.approx(
        [180 * k / (2 * rotations) for k in range(2 * rotations)], abs=0.01
    )
    row_half, column_half = vectors.chunk(2)
    torch.testing.assert_close(row_half.norm(dim=1), column_half.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close((row_half * column_half).sum(dim=1), torch.zeros(head_dim // 4), rtol=0, atol=1e-6)
    assert [len(half) for half in directions(head_dim, config)] == [rotations, rotations]


def test_lengths_of_drawn_vectors_are_the_frequencies():
    lengths = frequency_vectors(64, RopeConfig(rotate=4)).norm(dim=1)
    expected = torch.tensor([1.5 * 10000 ** (-t / 16) for t in range(16)]).repeat(2)
    torch.testing.assert_close(lengths, expected, rtol=1e-5, atol=0)


def test_axial_vectors_lie_on_the_axes_whatever_the_border():
    x, y = frequency_vectors(64, RopeConfig(rotate=0, border="clamp")).T
    assert not x[:16].any() and not y[16:].any()
    assert (y[:16] > 0).all() and (x[16:] > 0).all()


@pytest.mark.filterwarnings("ignore:rotate .* unevenly")
@pytest.mark.parametrize("head_dim, rotations", [(64, 0), (64, 4), (64, 16), (72, 2), (72, 18)])
def test_every_pair_is_drawn_once_in_its_direction(head_dim, rotations):
    config = RopeConfig(rotate=rotations)
    halves, found = directions(head_dim, config), angles(head_dim, config)
    assert sorted(p for half in halves for pairs in half for p in pairs) == list(range(head_dim // 2))
    assert len(halves[0]) == len(halves[1])
    for pairs in itertools.chain(*halves):
        apart = (found[pairs] - found[pairs[0]] + 90).remainder(180) - 90
        torch.testing.assert_close(apart, torch.zeros(len(pairs), dtype=torch.float64), rtol=0, atol=1e-3)


def test_phase_maps_are_the_phases_of_the_module():
    rope = SpiralRoPE(64, (16, 24), RopeConfig(rotate=4))
    drawn = phase_map(rope, 3, (16, 24))
    assert drawn.shape == (16, 24) and float(drawn.min()) >= 0 and float(drawn.max()) < 2 * math.pi
    torch.testing.assert_close(drawn[5, 20].cos(), rope.phases(16, 24)[5 * 24 + 20, 3].cos())


def test_marked_patches_are_those_that_clamping_changes():
    config = RopeConfig(rotate=4)
    share = [float(clamped(64, config, p, GRID).float().mean()) for p in range(32)]
    oblique = [value for p, value in enumerate(share) if p // 2 % 4]
    assert 0.10 < min(oblique) and max(oblique) < 0.12
    assert sum(share) / len(share) == pytest.approx(0.08, abs=0.005)
    assert all(value == 0 for p, value in enumerate(share) if p // 2 % 4 == 0)


@pytest.mark.parametrize("config", [RopeConfig(), RopeConfig(rotate=4), RopeConfig(rotate=4, border="exact")])
def test_similarity_is_the_inner_product_of_rotated_constant_vectors(config):
    rope = SpiralRoPE(64, GRID, config)
    constant = rotate(torch.ones(1, 256, 1, 64), *rope(*GRID))[0, :, 0]  # (256, 64), squared norm 64
    expected = (constant @ constant[3 * 16 + 5] / 64).reshape(GRID).double()
    torch.testing.assert_close(similarity(rope, GRID, (3, 5)), expected, rtol=0, atol=1e-5)


def test_axial_is_drawn_alone_when_it_is_what_was_asked_for():
    assert list(variants(RopeConfig())) == ["axial RoPE"]
    assert list(variants(RopeConfig(rotate=4, same_theta=True))) == ["axial RoPE", "Spiral RoPE, rotate 4"]


@pytest.mark.parametrize("lengths", [[1.5, 1e-4], [1.5, 1.5], [0.0, 0.0], [2e-30, 0.0]])
def test_every_frequency_is_inside_the_plane_and_a_power_of_ten_is_marked(lengths):
    low, high = radial_limits(torch.tensor(lengths, dtype=torch.float64).numpy())
    assert all(low < math.log10(length) < high for length in lengths if length > 0)
    assert low + 0.4 < math.floor(high) <= high


def test_settings_are_read_without_use_rope():
    args = parse_args(["--rope-rotate", "4", "--grid", "16x24", "--out", "a.png"])
    assert args.use_rope and args.rope_rotate == 4 and args.grid == (16, 24)


def test_picture_has_all_parts(tmp_path, capsys):
    path = tmp_path / "picture with spaces.png"
    arguments = ["--rope-rotate", "2", "--grid", "4x6", "--out", str(path)]
    main([*arguments, "--dry-run"])
    output, inches = capsys.readouterr().out.split(f"{path}, 12.0 x ")
    assert output == "dry run: would draw directions, phases, similarity into " and list(tmp_path.iterdir()) == []
    main(arguments)
    assert capsys.readouterr().out == f"picture: {path}\n"
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == 1800
        assert picture.height == pytest.approx(150 * float(inches.split(" inches")[0]), abs=8)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.filterwarnings("error::UserWarning")
def test_uneven_directions_are_warned_about_once(tmp_path, capsys):
    main(["--rope-rotate", "2", "--head-dim", "72", "--only", "directions", "--out", str(tmp_path / "a.svg")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("warning: rotate 2 spreads the 36 channel pairs unevenly")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--rope-rotate 5", "--rope-rotate 5 does not fit --head-dim 64; expected one of 0, 1, 2, 4, 8, 16"),
        ("--head-dim 66", "--head-dim 66 does not fit RoPE in two dimensions; choose a multiple of 4"),
        ("--grid 0", "argument --grid: '0' is not a grid; expected patches, as in 16 or 16x24, at most 512"),
        ("--grid 999", "argument --grid: '999' is not a grid; expected patches, as in 16 or 16x24, at most 512"),
        ("--query 3 16", "--query 3 16 is outside the grid; expected a row below 16 and a column below 16"),
        ("--out a.jpg", "--out 'a.jpg' "),
        ("--out no/a.png", "--out 'no/a.png' is in a folder that does not exist; make the folder first"),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(tmp_path, monkeypatch, refused, arguments, message):
    monkeypatch.chdir(tmp_path)
    for dry_run in ([], ["--dry-run"]):
        assert refused(main, ["--out", "a.png", *arguments.split(), *dry_run]).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, refused):
    def full(figure, file, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(visualize_rope.Figure, "savefig", full)
    path = tmp_path / "a.png"
    message = f"--out {str(path)!r} cannot be written (No space left on device); choose another"
    assert refused(main, ["--only", "directions", "--out", path]) == message
    assert list(tmp_path.iterdir()) == []
