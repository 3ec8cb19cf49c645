"""The latent cache: equal to encoding online, resumable, recognised, refused by name."""

import contextlib
import json
import os
import random
import shutil
import weakref
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from conftest import stops

import cache_latents
import train
from diffusion.gaussian_diffusion import GaussianDiffusion
from runtime import data, files, latents
from runtime.data import ImageData, ImageList
from runtime.latents import LatentCache, LatentData
from runtime.options import UserError
from runtime.vae import VAE

pytestmark = pytest.mark.usefixtures("tiny_commands")
ROUNDING = dict(atol=2e-3, rtol=2e-3)  # of float16, and of convolutions over other batches


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != files.LOCK}


def moments(folder: Path) -> np.ndarray:
    return np.load(folder / "moments.npy").astype(np.float32)


def test_what_is_written(cache, vae_folder):
    assert contents(cache).keys() == {"moments.npy", "meta.json", *latents.RECORDED}
    stored, meta = np.load(cache / "moments.npy"), json.loads((cache / "meta.json").read_text())
    assert (stored.dtype, stored.shape) == (np.float16, (24, 2, 8, 4, 4))
    assert meta["vae"]["sha256"] == VAE(str(vae_folder)).config.sha256
    assert meta["image_size"] == [32, 32] and meta["classes"] == ["ant", "bee", "käfer"]


def test_every_image_and_its_mirror_are_what_encoding_gives(cache, image_folder, vae_folder):
    vae, images, seed = VAE(str(vae_folder)), ImageList(image_folder), 3
    online, cached = ImageData(images, (32, 32), True, seed), LatentData(LatentCache(cache), True, seed)
    flips = set()
    for epoch in range(3):
        for index in range(24):
            (pixels, label), (found, cached_label) = online[epoch, index], cached[epoch, index]
            assert label == cached_label
            torch.testing.assert_close(found.float(), vae.encode(pixels[None])[0], atol=1e-3, rtol=2e-3)
            flips.add((index, data.is_flipped(seed, epoch, index)))
    assert len(flips) > 36  # most images were met both ways


def test_training_on_the_cache_draws_the_latents_of_training_online(cache, train_arguments, tmp_path, monkeypatch):
    drawn, losses = [], GaussianDiffusion.training_losses

    def seen(self, model, x, t, model_kwargs):
        drawn.append((x.clone(), t.clone(), model_kwargs["y"].clone()))
        return losses(self, model, x, t, model_kwargs)

    monkeypatch.setattr(GaussianDiffusion, "training_losses", seen)
    train.main(train_arguments(tmp_path / "online"))
    train.main(train_arguments(tmp_path / "cached", data_path=None, vae=None, latents_dir=cache))
    assert len(drawn) == 2 * 7
    for (x, t, y), (cached_x, cached_t, cached_y) in zip(drawn[:7], drawn[7:], strict=True):
        assert torch.equal(t, cached_t) and torch.equal(y, cached_y)
        torch.testing.assert_close(x, cached_x, **ROUNDING)


def test_a_run_may_change_between_online_and_cached(cache, train_arguments, tmp_path, capsys):
    train.main(train_arguments(tmp_path / "run", max_steps=3))
    train.main(train_arguments(tmp_path / "run", data_path=None, vae=None, latents_dir=cache))
    assert "at step 3" in capsys.readouterr().out


@pytest.fixture
def begun(cache_arguments, signal_after, tmp_path, monkeypatch, capsys):
    """A cache that was stopped after ten images."""
    monkeypatch.setattr(latents, "CHUNK", 5)
    signal_after(cache_latents, "encode_rows", 2)
    stops(cache_latents.main, cache_arguments(tmp_path / "latents"))
    assert capsys.readouterr().out.endswith("stopped on request; repeat the same command to go on\n")
    return tmp_path / "latents"


def test_an_interrupted_cache_goes_on(cache, begun, cache_arguments, train_arguments, refused, tmp_path, monkeypatch):
    arguments = train_arguments(tmp_path / "run", data_path=None, vae=None, latents_dir=begun)
    assert refused(train.main, arguments).endswith(
        "is not a finished latent cache (meta.json is missing); run cache_latents.py with this folder first"
    )
    encoded, encode = [], cache_latents.encode_rows

    def watched(writer, rows, *rest):
        encoded.append(range(rows[0], rows[-1] + 1))
        assert rows == list(encoded[-1])
        return encode(writer, rows, *rest)

    monkeypatch.setattr(cache_latents, "encode_rows", watched)
    cache_latents.main(cache_arguments(begun))
    assert encoded == [range(10, 15), range(15, 20), range(20, 24)]
    cache_latents.main(cache_arguments(tmp_path / "whole"))
    assert contents(begun) == contents(tmp_path / "whole")
    np.testing.assert_allclose(moments(begun), moments(cache), **ROUNDING)


def test_two_processes_fill_the_cache_of_one(two, cache):
    one, other = LatentCache(cache), LatentCache(two.folder / "cached")
    assert one.fingerprint == other.fingerprint and one.labels.tolist() == other.labels.tolist()
    np.testing.assert_allclose(moments(cache), moments(two.folder / "cached"), **ROUNDING)


def test_a_finished_cache_is_recognised_without_loading_the_autoencoder(
    cache, cache_arguments, tmp_path, monkeypatch, capsys
):
    copy = shutil.copytree(cache, tmp_path / "latents")
    before = contents(copy)
    for owner, name in ((data, "read_image"), (cache_latents, "VAE")):
        monkeypatch.setattr(owner, name, None)
    for extra in ([], ["--dry-run"]):
        cache_latents.main(cache_arguments(copy) + extra)
        assert f"nothing to do: {copy} is a finished cache of this data set\n" in capsys.readouterr().out
    assert contents(copy) == before


@pytest.mark.parametrize("finished", [True, False])
def test_an_autoencoder_that_was_moved_is_the_same(
    finished, request, cache, cache_arguments, vae_folder, tmp_path, capsys
):
    folder = shutil.copytree(cache, tmp_path / "latents") if finished else request.getfixturevalue("begun")
    cache_latents.main(cache_arguments(folder, vae=shutil.copytree(vae_folder, tmp_path / "moved")))
    assert ("nothing to do" in capsys.readouterr().out) == finished
    np.testing.assert_allclose(moments(folder), moments(cache), **ROUNDING)


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name(
    finished, request, cache, cache_arguments, make_vae, vae_folder, image_folder, refused, tmp_path
):
    folder = shutil.copytree(cache, tmp_path / "latents") if finished else request.getfixturevalue("begun")

    def message(extra=(), **changes):
        text = refused(cache_latents.main, [*cache_arguments(folder, **changes), *extra])
        start = f"--latents-dir {str(folder)!r} was made with other settings: "
        end = "; remove it or use another folder"
        assert text.startswith(start) and text.endswith(end)
        return text[len(start) : -len(end)]

    assert message(image_size=16) == "image_size [32, 32] (now [16, 16]), shape [24, 2, 8, 4, 4] (now [24, 2, 8, 2, 2])"
    assert (
        message(no_flip=True) == message(["--dry-run"], no_flip=True) == "shape [24, 2, 8, 4, 4] (now [24, 1, 8, 4, 4])"
    )
    named = []
    for source in (vae_folder, make_vae(seed=1)):
        sha256 = VAE(str(source)).config.sha256
        named.append(f"{str(source)!r} (sha256 {sha256[:8]}, scaling factor 0.5, shift 0.0)")
    assert message(vae=source) == f"vae {named[0]} (now {named[1]})"
    more = shutil.copytree(image_folder, tmp_path / "more")
    shutil.copy(more / "ant" / "00.png", more / "ant" / "99.png")
    assert "fingerprint " in message(data_path=more)


def test_the_disk_need_is_printed_before_anything_is_encoded(cache_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_latents, "encode_rows", None)
    expected = f"encode 24 images, 2 flips each, into {tmp_path / 'latents'}: 12.3 kB\n"
    cache_latents.main([*cache_arguments(tmp_path / "latents"), "--dry-run"])
    assert capsys.readouterr().out.endswith(f"dry run: would {expected}") and list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError):
        stops(cache_latents.main, cache_arguments(tmp_path / "latents"))
    assert capsys.readouterr().out.endswith(expected.replace("encode", "encoding"))
    imagenet = latents.CacheWriter(tmp_path, {"shape": [1_281_167, 2, 8, 32, 32]}, None)
    assert files.format_bytes(imagenet.bytes) == "42 GB"


def test_no_more_than_a_batch_of_images_is_in_memory(cache_arguments, tmp_path, monkeypatch):
    to_tensor, alive, most = data.to_tensor, [], []

    def counted(pixels):
        tensor = to_tensor(pixels)
        alive.append(weakref.ref(tensor))
        most.append(sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(data, "to_tensor", counted)
    cache_latents.main(cache_arguments(tmp_path / "latents", batch_size=3))
    assert len(most) == 24 and max(most) <= 2 * 3  # a batch being read while the one before is still named


def test_unreadable_images_are_named_or_left_out(
    cache, cache_arguments, train_arguments, refused, image_folder, tmp_path, capsys
):
    damaged, names = shutil.copytree(image_folder, tmp_path / "damaged"), ("ant/03.png", "käfer/05.png")
    for name in names:
        (damaged / name).write_bytes((damaged / name).read_bytes()[:60])
    arguments = cache_arguments(tmp_path / "latents", data_path=damaged)
    message = refused(cache_latents.main, arguments, has_begun=True)
    assert message.startswith(f"image {str(damaged / names[0])!r} cannot be read (")
    assert message.endswith("; repair it, or pass --skip-unreadable to leave such images out; 2 in all")
    assert not (tmp_path / "latents" / "meta.json").exists()
    folder = tmp_path / "without"
    cache_latents.main(cache_arguments(folder, data_path=damaged, skip_unreadable=True))
    assert (folder / "skipped.txt").read_text().splitlines() == [str(damaged / name) for name in names]
    found, whole = LatentData(LatentCache(folder), False, 0), moments(cache)
    rows = [row for row in range(24) if row not in (1, 17)]  # ant: 00, 03, ...; bee from 8, käfer from 16
    assert len(found) == 22
    for index, row in enumerate(rows):
        values, label = found[0, index]
        assert label == row // 8
        np.testing.assert_allclose(values.float(), whole[row, 0], **ROUNDING)
    train.main(train_arguments(tmp_path / "run", data_path=None, vae=None, latents_dir=folder, max_steps=4))
    assert "22 images in 3 classes, cached latents, 2 steps an epoch" in capsys.readouterr().out
    for name in names:  # repaired, the first command goes on and ends well
        shutil.copy(image_folder / name, damaged / name)
    cache_latents.main(arguments)
    assert len(LatentCache(tmp_path / "latents")) == 24


@pytest.fixture
def unfit(train_arguments, refused, tmp_path):
    """Why a cache does not fit a command: unfit(folder, image_size=64)."""

    def message(folder: Path, **changes) -> str:
        options = dict(data_path=None, vae=None, latents_dir=folder)
        text = refused(train.main, train_arguments(tmp_path / "run", **options | changes))
        return text.replace(f"--latents-dir {str(folder)!r}", "DIR")

    return message


def test_a_cache_that_does_not_fit_the_command(cache, unfit, cache_arguments, train_arguments, make_vae, tmp_path):
    assert unfit(cache, image_size=64) == "DIR was made at image size 32, the command says 64; pass --image-size 32"
    assert " has other weights than the VAE that made DIR; leave --vae out" in unfit(cache, vae=make_vae(seed=1))
    one_way = tmp_path / "one way"
    cache_latents.main(cache_arguments(one_way, no_flip=True))
    assert unfit(one_way) == "DIR has no flipped latents; pass --no-flip, or make the cache with --flip"
    train.main(train_arguments(tmp_path / "ok", data_path=None, vae=None, latents_dir=one_way, no_flip=True))


@pytest.mark.parametrize(
    ("name", "damage"),
    [("moments.npy", None), ("labels.npy", None), ("meta.json", None), ("meta.json", b"{}"), ("meta.json", b"[]")],
)
def test_a_damaged_cache(name, damage, cache, unfit, tmp_path):
    """Cut, or of other contents."""
    broken = shutil.copytree(cache, tmp_path / "broken")
    (broken / name).write_bytes((broken / name).read_bytes()[:-20] if damage is None else damage)
    message = unfit(broken)
    if name == "meta.json" and damage != b"{}":  # not even JSON, or no object
        assert message.startswith(repr(str(broken / name)))
    else:
        end = "; run cache_latents.py with this folder again, which repairs it"
        assert message.startswith("DIR cannot be read (") and message.endswith(end)


@pytest.mark.parametrize("name", [*latents.RECORDED, "moments.npy", "meta.json"])
def test_after_any_damage_a_cache_is_repaired_or_refused(name, cache, cache_arguments, tmp_path, capsys):
    """And never trained on as if it were whole."""
    whole, rng = contents(cache), random.Random(len(name))
    expected = [LatentData(LatentCache(cache), True, 0)[0, index] for index in range(24)]
    broken = shutil.copytree(cache, tmp_path / "broken")
    for _ in range(5):
        (broken / name).write_bytes(fuzz.damage_bytes(whole[name], rng))
        with contextlib.suppress(UserError):
            found = LatentData(LatentCache(broken), True, 0)
            items = [found[0, index] for index in range(24)]
            for item, (values, label) in zip(items, expected, strict=True):
                assert isinstance(item, data.Unreadable) or (torch.equal(item[0], values) and item[1] == label)
        try:
            cache_latents.main([*cache_arguments(broken), "--verify"])
        except SystemExit:
            assert name == "meta.json" and "; remove it and run cache_latents.py" in capsys.readouterr().err
            (broken / name).unlink()
            cache_latents.main(cache_arguments(broken))
        assert contents(broken) == whole


def test_training_names_a_row_that_is_damaged_and_keeps_what_it_has(
    cache, cache_arguments, train_arguments, refused, tmp_path, monkeypatch
):
    broken = shutil.copytree(cache, tmp_path / "latents")
    stored = np.lib.format.open_memmap(broken / "moments.npy", "r+")
    stored[7] = 0
    arguments = train_arguments(tmp_path / "run", data_path=None, vae=None, latents_dir=broken)
    message = refused(train.main, arguments, has_begun=True)
    reason = "row 7 of moments.npy is not what was written"
    assert message.startswith(
        f"latent cache {str(broken)!r} cannot be read ({reason}); repair it with cache_latents.py"
    )
    assert "is saved: repeat the command" in message
    cache_latents.main(cache_arguments(broken))  # in seconds: the moments are read when asked for
    assert not stored[7].any()
    encoded, encode = [], cache_latents.encode_rows
    monkeypatch.setattr(cache_latents, "encode_rows", lambda *args: (encoded.append(args[1]), encode(*args))[1])
    cache_latents.main([*cache_arguments(broken), "--verify"])
    assert encoded == [[7]]
    train.main(arguments)


@pytest.fixture
def early(cache, tmp_path):
    """A cache as early versions made it: without checksums, paths, sizes and times."""
    folder = shutil.copytree(cache, tmp_path / "early")
    for name in ("checksums.npy", "paths.npy", "stamps.npy"):
        (folder / name).unlink()
    settings = json.loads((folder / "meta.json").read_text())
    files.write_json(folder / "meta.json", {key: settings[key] for key in settings.keys() - {"record", "sha256"}})
    return folder


def test_a_cache_of_an_early_version_is_used_and_completed(
    early, cache, cache_arguments, train_arguments, tmp_path, monkeypatch, capsys
):
    """Also where nothing can be added, in a folder that is read alone."""
    train.main(train_arguments(tmp_path / "run", data_path=None, vae=None, latents_dir=early, max_steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(cache_latents, "encode_rows", None)
        before = contents(early)
        with patch.context() as read_only:
            read_only.setattr(os, "access", lambda *_: False)
            cache_latents.main([*cache_arguments(early), "--verify"])
        assert "nothing to do" in capsys.readouterr().out and contents(early) == before
        cache_latents.main(cache_arguments(early))
    assert contents(early) == contents(cache)


def test_every_process_reads_its_share_of_what_an_early_version_wrote(early, cache, image_folder, monkeypatch):
    """Others do not wait while the first one reads tens of gigabytes."""
    writer = latents.CacheWriter(early, LatentCache(early).meta, ImageList(image_folder))
    with monkeypatch.context() as patch:
        patch.setattr(latents.CacheWriter, "moments", None)
        assert writer.create()
    assert writer.unproven(range(5)) == []
    found, whole = (np.load(folder / "checksums.npy") for folder in (early, cache))
    assert np.array_equal(found[:5], whole[:5]) and (found[5:] != whole[5:]).all()


@pytest.mark.parametrize("marks", [b"\1\1\0\1\0", b"", b"\1", b"\1\1\1\1\1"], ids=str)
@pytest.mark.parametrize("begun_again", [False, True])
def test_what_an_early_version_was_interrupted_in_goes_on(
    marks, begun_again, early, cache, cache_arguments, monkeypatch
):
    """By its marks of five images each, where they are as many as they should be; what they wrongly mark is noticed."""
    monkeypatch.setattr(latents, "CHUNK", 5)
    (early / "meta.json").rename(early / "begun.json")
    (early / "done").write_bytes(marks)
    kept = [row for row in range(24) if len(marks) == 5 and marks[row // 5] and row not in (7, *range(15, 24))]
    for name in ("moments.npy", "labels.npy"):
        stored = np.lib.format.open_memmap(early / name, "r+")
        stored[[row for row in range(24) if row not in kept]] = 0
    if begun_again:  # and killed before what was marked had its checksums
        np.save(early / "checksums.npy", np.zeros((24, 2), np.uint32))
    encoded, encode = [], cache_latents.encode_rows
    monkeypatch.setattr(cache_latents, "encode_rows", lambda *args: (encoded.extend(args[1]), encode(*args))[1])
    cache_latents.main(cache_arguments(early))
    assert sorted(encoded + kept) == list(range(24))
    assert not (early / "done").exists() and LatentCache(early).labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    np.testing.assert_allclose(moments(early), moments(cache), **ROUNDING)


def test_rows_that_an_early_version_left_empty_are_encoded(
    early, cache, cache_arguments, train_arguments, refused, tmp_path
):
    np.lib.format.open_memmap(early / "moments.npy", "r+")[20:] = 0
    arguments = train_arguments(tmp_path / "run", data_path=None, vae=None, latents_dir=early)
    assert "of moments.npy is not what was written" in refused(train.main, arguments, has_begun=True)
    cache_latents.main(cache_arguments(early))
    np.testing.assert_allclose(moments(early), moments(cache), **ROUNDING)


def test_images_that_were_replaced_are_noticed(image_folder, cache, cache_arguments, refused, tmp_path, monkeypatch):
    """A file of the same name, of other pixels or only written anew, and one added to a nested folder."""
    images, folder = shutil.copytree(image_folder, tmp_path / "images"), tmp_path / "latents"
    cache_latents.main(cache_arguments(folder, data_path=images))
    victim, encoded = images / "bee" / "04.png", []
    kept = victim.stat()
    shutil.copy(images / "ant" / "00.png", victim)
    encode = cache_latents.encode_rows
    monkeypatch.setattr(cache_latents, "encode_rows", lambda *args: (encoded.append(args[1]), encode(*args))[1])
    message = refused(cache_latents.main, cache_arguments(folder, data_path=images))
    assert message == (
        f"--latents-dir {str(folder)!r} was made of other images: {str(victim)!r} has another "
        f"{'size' if victim.stat().st_size != kept.st_size else 'time'} by now, 1 in all; pass --changed encode to "
        "encode these again, or --changed keep where only their times are others, as in a copy of the data set"
    )
    cache_latents.main(cache_arguments(folder, data_path=images, changed="encode"))
    assert encoded == [[9]]  # bee: 8 to 15, of 01, 04, ...
    np.testing.assert_allclose(moments(folder)[9], moments(folder)[0], **ROUNDING)
    os.utime(victim, ns=(1, 1))
    assert "has another time by now, 1 in all" in refused(cache_latents.main, cache_arguments(folder, data_path=images))
    cache_latents.main(cache_arguments(folder, data_path=images, changed="keep"))
    cache_latents.main(cache_arguments(folder, data_path=images))
    assert encoded == [[9]]
    (folder / "meta.json").unlink()  # what proves itself is kept, if the images are still those
    os.utime(victim, ns=(2, 2))
    assert "has another time by now, 1 in all" in refused(cache_latents.main, cache_arguments(folder, data_path=images))
    cache_latents.main(cache_arguments(folder, data_path=images, changed="keep"))
    assert encoded == [[9]]
    before = contents(folder)
    cache_latents.main([*cache_arguments(folder, data_path=images), "--verify"])
    assert contents(folder) == before and encoded == [[9]]
    (images / "bee" / "more").mkdir()
    shutil.copy(victim, images / "bee" / "more")
    assert "made with other settings: fingerprint" in refused(
        cache_latents.main, cache_arguments(folder, data_path=images)
    )


def test_moments_beyond_float16_are_noticed_when_they_are_cached(
    cache_arguments, refused, image_folder, tmp_path, monkeypatch
):
    encode = VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, images: encode(self, images) * 1e6)
    message = refused(cache_latents.main, cache_arguments(tmp_path / "latents"), has_begun=True)
    assert message.startswith(f"image {str(image_folder / 'ant' / '00.png')!r} cannot be read (the autoencoder makes ")
    assert " of it, and float16 ends at 65504); use another --vae, train with --data-path in place of " in message
    assert not (tmp_path / "latents" / "meta.json").exists()


def test_what_cannot_be_cached_is_refused_before_writing(cache_arguments, refused, tmp_path, monkeypatch):
    folder = tmp_path / "latents"
    (tmp_path / "file").touch()
    for extra in ([], ["--dry-run"]):

        def message(root=folder, extra=tuple(extra), **changes):
            return refused(cache_latents.main, [*cache_arguments(root, **changes), *extra])

        assert message(image_size=36).startswith(
            "--image-size 36 is not divisible by 8 (VAE down-sampling 8 x patch 1)"
        )
        assert message(data_path=tmp_path / "none").startswith(
            f"--data-path {str(tmp_path / 'none')!r} is not a folder"
        )
        assert "--latents-dir" in message(tmp_path / "file" / "latents")
        with monkeypatch.context() as patch:
            usage = shutil.disk_usage(tmp_path)
            patch.setattr(files.shutil, "disk_usage", lambda _, usage=usage: usage._replace(free=1000))
            assert message() == (
                f"--latents-dir {str(folder)!r} cannot be written (it needs 12.3 kB and 1 kB are free on the disk); "
                "free space, or choose another"
            )
