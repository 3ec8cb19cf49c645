"""Data: preparation, file formats, batches, flips, the latent cache's reader, the demo digits."""

import itertools
import os
import pickle
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime import data, distributed
from runtime.data import EpochBatches, ImageData, ImageList, Unreadable, prepare, read_image, read_prepared
from runtime.options import UserError


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a gradient: every pixel matters."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 155, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None]
    return Image.fromarray((ramp + random.integers(0, 50, (height, width, 3))).astype(np.uint8))


# Preparation


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The preparation in the words of its description, for a square."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(length // 2 for length in image.size), resample=Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(length * scale) for length in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


SIZES = [(32, 32), (33, 47), (100, 64), (64, 100), (31, 90), (500, 130), (7, 9), (128, 128), (127, 256), (1, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_preparation_is_that_of_the_original(size):
    image = picture(*size)
    assert np.array_equal(prepare(image, (32, 32)), center_crop(image, 32))


def test_preparation_of_other_shapes():
    """Blocks are averaged, an image of the right size is kept, and the middle is cropped."""
    image = picture(128, 128)
    blocks = np.asarray(image).reshape(32, 4, 32, 4, 3).astype(float).mean((1, 3))
    assert np.abs(prepare(image, (32, 32)) - blocks).max() <= 2  # both axes of both halvings round half up
    image = picture(48, 32)
    assert np.array_equal(prepare(image, (32, 48)), np.asarray(image))
    image = picture(64, 64)  # halved once, resized not at all
    halved = np.asarray(image.resize((32, 32), Image.BOX))
    assert np.array_equal(prepare(image, (16, 32)), halved[8:24])
    assert prepare(picture(40, 100), (48, 32)).shape == prepare(picture(100, 40), (48, 32)).shape == (48, 32, 3)


# Formats


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


@pytest.fixture
def read(tmp_path):
    """Saves an image and reads it: read("a.png", image) -> (H, W, 3)."""
    return lambda name, image, **options: np.asarray(read_image(saved(tmp_path / name, image, **options)))


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=2)


def test_formats_are_read_as_they_look(read):
    image = picture(20, 12)
    pixels, dark = np.asarray(image), np.asarray(image.convert("L"))
    for name in ("a.png", "a.bmp", "a.tiff"):
        assert np.array_equal(read(name, image), pixels)
    assert np.array_equal(read("a.webp", image, lossless=True), pixels)
    assert np.array_equal(read("a.jpeg", image, format="PNG"), pixels)  # contents count and not the extension
    assert np.array_equal(read("grey.png", image.convert("L")), grey(dark))
    assert np.abs(read("cmyk.jpg", image.convert("CMYK"), quality=95).astype(int) - pixels).mean() < 12
    assert np.array_equal(read("binary.png", Image.fromarray(dark > 100)), grey(255 * (dark > 100)))


def test_sixteen_bits_are_scaled_to_eight(read):
    """0 to 65535 becomes 0 to 255; plain conversion would make everything above 255 white."""
    values = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    for name in ("a.png", "a.tiff"):
        assert np.array_equal(read(name, Image.fromarray(values)), grey(values >> 8))


def test_transparency_is_dropped(read):
    image = picture(20, 12)
    clear, palette, dark = image.copy(), image.quantize(16), image.convert("LA")
    clear.putalpha(Image.fromarray(np.tile(np.array([0, 128], np.uint8), (12, 10))))
    assert np.array_equal(read("a.png", clear), np.asarray(image))
    for name in ("p.png", "p.gif"):
        assert np.array_equal(read(name, palette, transparency=3), np.asarray(palette.convert("RGB")))
    assert np.array_equal(read("la.png", dark), grey(np.asarray(dark)[..., 0]))


def test_animations_show_their_first_frame(read):
    frames = [picture(20, 12, seed) for seed in range(3)]
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True}), ("a.tiff", {})):
        found = read(name, frames[0], save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(found, np.asarray(frames[0])), name


def test_rotated_photographs_are_upright(read):
    """EXIF orientation 6: the camera was turned, so that what is stored has to be turned back clockwise."""
    upright, exif = picture(20, 12), Image.Exif()
    exif[0x0112] = 6
    found = read("a.png", upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert np.array_equal(found, np.asarray(upright))


def test_tiny_and_thin_images(tmp_path):
    assert np.array_equal(prepare(picture(1, 1), (8, 8)), np.broadcast_to(np.asarray(picture(1, 1)), (8, 8, 3)))
    assert read_prepared(saved(tmp_path / "a.png", picture(1, 10_000)), (32, 32)).shape == (32, 32, 3)
    found = read_prepared(saved(tmp_path / "b.png", picture(10_000, 1)), (256, 256))
    assert isinstance(found, Unreadable)
    assert found.reason == "10000 x 1 pixels are too elongated to be resized to 256 x 256"


def bomb(path: Path) -> Path:
    """A small PNG that claims 30,000 x 30,000 pixels."""
    saved(path, picture(8, 8))
    contents = bytearray(path.read_bytes())
    contents[16:24] = struct.pack(">II", 30_000, 30_000)
    contents[29:33] = struct.pack(">I", zlib.crc32(contents[12:29]))
    path.write_bytes(contents)
    return path


def test_what_cannot_be_read_is_named(tmp_path):
    whole = saved(tmp_path / "whole.jpg", picture(64, 64), quality=95).read_bytes()
    floats = saved(tmp_path / "f.tiff", Image.fromarray(np.zeros((4, 4), np.float32)))
    cases = {"zero.jpg": b"", "text.png": b"no image", "half.jpg": whole[: len(whole) // 2], "cut.jpg": whole[:30]}
    for name, contents in cases.items():
        (tmp_path / name).write_bytes(contents)
    for path in [*(tmp_path / name for name in cases), floats, bomb(tmp_path / "bomb.png"), tmp_path / "none.png"]:
        found = read_prepared(path, (32, 32))
        assert isinstance(found, Unreadable), path
        assert str(found).startswith(f"image {str(path)!r} cannot be read (") and "\n" not in str(found)
    assert "floating-point pixels have no defined range" in str(read_prepared(floats, (32, 32)))
    assert "decompression bomb" in str(read_prepared(tmp_path / "bomb.png", (32, 32)))


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "bmp", "tiff", "ppm"])
def test_damaged_images_never_raise(kind, tmp_path):
    path, random = tmp_path / f"a.{kind}", np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(24, 24).save(path, **({"exif": exif} if kind in ("png", "jpg", "webp", "tiff") else {}))
    whole = path.read_bytes()
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(random.integers(1, 5)):
            head = random.random() < 0.6
            damaged[random.integers(min(len(damaged), 150) if head else len(damaged))] = random.integers(256)
        path.write_bytes(damaged[: random.integers(len(damaged))] if random.random() < 0.2 else damaged)
        found = read_prepared(path, (16, 16))
        assert isinstance(found, Unreadable) or found.shape == (16, 16, 3)


# The list of images


def test_classes_and_files_are_in_the_order_of_their_names(tmp_path):
    files = ("b/2.png", "b/10.jpeg", "a b/deep/er/x.JPG", "a b/y.webp", "$HOME/'q'.png", "ü\n/z.png", "b/notes.txt")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loose.png").touch()
    (tmp_path / ".hidden").mkdir()
    images = ImageList(tmp_path)
    assert images.classes == ["$HOME", "a b", "b", "ü\n"]
    found = [str(images.path(index).relative_to(tmp_path)) for index in range(len(images))]
    assert found == ["$HOME/'q'.png", "a b/y.webp", "a b/deep/er/x.JPG", "b/10.jpeg", "b/2.png", "ü\n/z.png"]
    assert images.labels.tolist() == [0, 1, 1, 2, 2, 3]


def test_linked_folders_are_followed(tmp_path, image_folder):
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "ant").symlink_to(image_folder / "ant")
    assert len(ImageList(tmp_path / "classes")) == 8


def test_a_link_back_is_named_and_every_file_counts_once(tmp_path):
    """To the folder itself, to one above it, to the data set, through another class's link."""
    for name in ("ant/deep/1.png", "ant/2.png", "bee/3.png", "elsewhere/cat/4.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    (tmp_path / "data" / "elsewhere").rename(tmp_path / "elsewhere")
    root = tmp_path / "data"
    loops = {
        root / "ant" / "self": root / "ant",
        root / "ant" / "deep" / "up": root / "ant",
        root / "ant" / "deep" / "far": tmp_path,
        root / "bee" / "all": root,
        tmp_path / "elsewhere" / "cat" / "back": tmp_path / "elsewhere",
    }
    (root / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    for link, target in loops.items():
        link.symlink_to(target)
    for path in (root / "loop", root / "bee" / "loop.png"):  # to nothing but itself: the latter cannot be read
        path.symlink_to(path)
    (root / "bee" / "also").symlink_to(root / "ant" / "deep")  # no loop until its own link is met
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        images = ImageList(root)
    assert images.paths.tolist() == [b"ant/2.png", b"ant/deep/1.png", b"bee/3.png", b"bee/loop.png"] + [
        b"bee/also/1.png",
        b"cat/4.png",
    ]
    said = "".join(str(warning.message) for warning in told)
    for link, target in loops.items():
        name = str(link).replace(str(tmp_path / "elsewhere" / "cat"), str(root / "cat"))
        assert f"link {name!r} leads back to {str(target)!r}; it was left out" in said
    assert len(told) == len(loops) + 2  # of bee/also, up and far


def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path, image_folder, monkeypatch):
    (tmp_path / "ant" / "deep").mkdir(parents=True)
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"folder '.*/ant/deep' cannot be read \(Permission denied\); remove it"):
        ImageList(tmp_path)


def test_stamps_are_sizes_and_times(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "1.png").write_bytes(b"four")
    os.utime(tmp_path / "ant" / "1.png", ns=(0, 1234567890123))
    (tmp_path / "ant" / "2.png").symlink_to("none")
    assert ImageList(tmp_path).stamps.tolist() == [[4, 1234567890123], [-1, -1]]


def test_another_image_stands_in_for_an_unreadable_one(image_folder, tmp_path):
    images = ImageList(shutil.copytree(image_folder, tmp_path / "images"))
    images.path(9).write_bytes(b"damaged")
    dataset = ImageData(images, (32, 32), True, 5, skip=True)
    pixels, label, skipped = dataset[2, 9]
    assert skipped == str(images.path(9)) and torch.equal(pixels, dataset[2, 9][0])
    twins = [index for index in range(24) if index != 9 for flipped in (False, True)
             if torch.equal(pixels, dataset[0, index][0].flip(2) if flipped else dataset[0, index][0])]  # fmt: skip
    assert len(twins) == 1 and label == images.labels[twins[0]]
    inputs, labels, paths = data.collate([dataset[0, 8], dataset[0, 9]])
    assert inputs.shape == (2, 3, 32, 32) and len(labels) == 2 and paths == [skipped]
    assert str(ImageData(images, (32, 32), True, 5, skip=False)[0, 9]).endswith("pass --skip-unreadable")
    for index in range(24):
        images.path(index).write_bytes(b"damaged")
    assert isinstance(dataset[0, 3], Unreadable)


def test_the_fingerprint_is_of_the_list_and_not_of_its_place(tmp_path):
    def fingerprint(name, files):
        for file in files.split():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).touch()
        return ImageList(tmp_path / name).fingerprint

    first = fingerprint("a", "x/1.png x/2.png y/3.png")
    assert fingerprint("b", "x/1.png x/2.png y/3.png") == first
    others = ("x/1.png y/2.png y/3.png", "x/1.png x/2.png y/3.png y/4.png", "x/1.png x/2.png z/3.png")
    assert first not in [fingerprint(f"c{number}", files) for number, files in enumerate(others)]


@pytest.mark.parametrize("case", ["none", "file", "flat", "empty class"])
def test_folders_that_hold_no_data_set(case, tmp_path):
    root = tmp_path / case
    if case == "file":
        root.touch()
    elif case != "none":
        root.mkdir()
        (root / "a.png").touch()
    if case == "empty class":
        (root / "cat").mkdir()
    with pytest.raises(UserError) as error:
        ImageList(root)
    expected = {
        "flat": f"--data-path {str(root)!r} has no class folders; expected one sub-folder for each class",
        "empty class": f"class folder {str(root / 'cat')!r} has no images; expected files ending in .jpg, .jpeg, .png, "
        ".ppm, .bmp, .pgm, .tif, .tiff, .webp; add some or remove the folder",
    }
    other = f"--data-path {str(root)!r} is not a folder; expected one with a sub-folder for each class"
    assert str(error.value) == expected.get(case, other)


# Batches


def batches(count: int, length=23, batch=6, **options) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(EpochBatches(length, batch, **({"seed": 1} | options)), count))


def test_every_image_comes_once_an_epoch():
    for epoch in range(3):
        seen = [item for batch in batches(12, length=24)[4 * epoch : 4 * epoch + 4] for item in batch]
        assert sorted(seen) == [(epoch, index) for index in range(24)]


def test_the_incomplete_batch_is_dropped_and_is_another_every_epoch():
    found = batches(6)
    dropped = []
    for epoch in range(2):
        seen = [item for batch in found[3 * epoch : 3 * epoch + 3] for item in batch]
        assert len(set(seen)) == 18 and {number for number, _ in seen} == {epoch}
        dropped.append(set(range(23)) - {index for _, index in seen})
    assert dropped[0] != dropped[1]


def test_order_depends_on_seed_and_epoch():
    assert batches(8) == batches(8)
    assert batches(8) != batches(8, seed=2)
    first, second = batches(8, length=24)[:4], batches(8, length=24)[4:]
    assert [[index for _, index in batch] for batch in first] != [[index for _, index in batch] for batch in second]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 7, 11])
def test_batches_go_on_at_any_step(step):
    assert batches(12 - step, start_step=step) == batches(12)[step:]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_global_batches_are_the_same_for_any_number_of_processes(processes, micro_batches, monkeypatch):
    whole = batches(5, length=47, batch=12)
    shares = []
    monkeypatch.setattr(data, "world_size", lambda: processes)
    for rank in range(processes):
        monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
        shares.append(batches(5 * micro_batches, length=47, batch=12, micro_batches=micro_batches))
    for step, batch in enumerate(whole):
        parts = [share[step * micro_batches : (step + 1) * micro_batches] for share in shares]
        assert [item for share in parts for part in share for item in part] == batch
        assert {len(part) for share in parts for part in share} == {12 // processes // micro_batches}


# Flips


def test_flips_are_fair_and_reproducible():
    flips = np.array([[data.is_flipped(seed, epoch, index) for index in range(1000)] for seed, epoch in
                      ((0, 0), (0, 1), (1, 0))])  # fmt: skip
    assert np.abs(flips.mean(1) - 0.5).max() < 0.06
    for one, other in itertools.combinations(flips, 2):
        assert abs((one == other).mean() - 0.5) < 0.06
    assert [data.is_flipped(0, 0, index) for index in range(1000)] == flips[0].tolist()


def test_flipped_images_are_mirrored(image_folder):
    images = ImageList(image_folder)
    plain, flipping = ImageData(images, (32, 32), False, 5), ImageData(images, (32, 32), True, 5)
    outcomes = set()
    for epoch, index in itertools.product(range(2), range(24)):
        (expected, label), (found, found_label) = plain[epoch, index], flipping[epoch, index]
        mirrored = data.is_flipped(5, epoch, index)
        assert torch.equal(found, expected.flip(2) if mirrored else expected)
        assert found_label == label == index // 8
        outcomes.add(mirrored)
    assert outcomes == {True, False}
    pixels = np.asarray(Image.open(images.path(3)))
    assert torch.equal(plain[0, 3][0], torch.from_numpy(pixels.copy()).permute(2, 0, 1))


# The loader


def test_workers_change_nothing(image_folder):
    dataset = ImageData(ImageList(image_folder), (32, 32), True, 0)
    found = []
    for workers in (0, 2):
        with data.open_loader(dataset, EpochBatches(24, 8, 0), workers, torch.device("cpu")) as loader:
            found.append([next(loader) for _ in range(4)])
    for (one, labels), (other, other_labels) in zip(*found, strict=True):
        assert torch.equal(one, other) and torch.equal(labels, other_labels)


def test_an_unreadable_image_stands_for_its_batch():
    bad = Unreadable("a.png", "why")
    good = (torch.zeros(3, 2, 2, dtype=torch.uint8), 1)
    assert data.collate([good, bad, good]) is bad
    inputs, labels = data.collate([good, good])
    assert inputs.shape == (2, 3, 2, 2) and labels.tolist() == [1, 1]
    assert pickle.loads(pickle.dumps(bad)) == bad


# Seeds


def test_seeds_are_hashed():
    streams = [(seed, name, index) for seed in range(20) for name in ("label", "noise") for index in range(200)]
    seeds = {distributed.hash_seed(*stream) for stream in streams}
    assert len(seeds) == len(streams) and min(seeds) >= 0 and max(seeds) < 2**63
    assert distributed.hash_seed(1, "noise", 2) == distributed.hash_seed(1, "noise", 2)
    assert distributed.hash_seed(2**63 - 1, "noise", 0) != distributed.hash_seed(0, "noise", 0)
