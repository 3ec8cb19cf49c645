"""The latent cache: equal to encoding online, resumable, recognised, refused by name."""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line

import cache_latents
import train
from runtime import data, files, latents
from runtime.data import ImageData, ImageList
from runtime.latents import LatentCache, LatentData
from runtime.options import UserError
from runtime.vae import VAE

pytestmark = pytest.mark.usefixtures("tiny_commands")


@pytest.fixture
def cache_arguments(image_folder, vae_folder):
    """Command line that caches the images: cache_arguments(latents_dir, no_flip=True)."""

    def build(folder, **changes) -> list[str]:
        options = {"data_path": image_folder, "latents_dir": folder, "vae": vae_folder, "image_size": 32}
        return command_line(options | {"num_workers": 0, "batch_size": 5} | changes)

    return build


@pytest.fixture(scope="module")
def cache(tmp_path_factory, image_folder, vae_folder):
    folder = tmp_path_factory.mktemp("cache") / "latents"
    options = {"data_path": image_folder, "latents_dir": folder, "vae": vae_folder, "image_size": 32}
    cache_latents.main(command_line(options | {"num_workers": 0, "batch_size": 5}))
    return folder


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written(cache, vae_folder):
    assert sorted(contents(cache)) == ["labels.npy", "meta.json", "moments.npy", "paths.npy"]
    moments, meta = np.load(cache / "moments.npy"), json.loads((cache / "meta.json").read_text())
    assert (moments.dtype, moments.shape) == (np.float16, (24, 2, 8, 4, 4))
    assert meta["vae"]["sha256"] == VAE(str(vae_folder)).describe()["sha256"]
    assert meta["image_size"] == [32, 32] and meta["classes"] == ["ant", "bee", "käfer"]


def test_every_image_and_its_mirror_are_what_encoding_gives(cache, image_folder, vae_folder):
    vae, images, seed = VAE(str(vae_folder)), ImageList(image_folder), 3
    online, cached = ImageData(images, (32, 32), True, seed), LatentData(LatentCache(cache), True, seed)
    flips = set()
    for epoch in range(3):
        for index in range(24):
            (pixels, label), (moments, cached_label) = online[epoch, index], cached[epoch, index]
            assert label == cached_label
            expected = vae.encode(pixels[None])[0]
            torch.testing.assert_close(moments.float(), expected, atol=1e-3, rtol=2e-3)
            flips.add((index, data.is_flipped(seed, epoch, index)))
    assert len(flips) > 36  # most images were met both ways


def test_training_on_the_cache_draws_the_latents_of_training_online(cache, train_arguments, tmp_path, monkeypatch):
    drawn = {}

    def record(name):
        losses = train.Trainer.micro_batch_loss

        def watched(self, inputs, labels):
            training_losses = self.diffusion.training_losses

            def seen(model, x, t, model_kwargs):
                drawn.setdefault(name, []).append((x.clone(), t.clone(), model_kwargs["y"].clone()))
                return training_losses(model, x, t, model_kwargs)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.diffusion, "training_losses", seen)
                return losses(self, inputs, labels)

        monkeypatch.setattr(train.Trainer, "micro_batch_loss", watched)
        return losses

    original = record("online")
    train.main(train_arguments(tmp_path / "online"))
    monkeypatch.setattr(train.Trainer, "micro_batch_loss", original)
    record("cached")
    train.main(train_arguments(tmp_path / "cached", data_path=None, vae=None, latents_dir=cache))
    assert len(drawn["online"]) == len(drawn["cached"]) == 7
    for (x, t, y), (cached_x, cached_t, cached_y) in zip(drawn["online"], drawn["cached"], strict=True):
        assert torch.equal(t, cached_t) and torch.equal(y, cached_y)
        torch.testing.assert_close(x, cached_x, atol=2e-3, rtol=2e-3)


def test_a_run_may_change_between_online_and_cached(cache, train_arguments, tmp_path, capsys):
    train.main(train_arguments(tmp_path / "run", max_steps=3))
    train.main(train_arguments(tmp_path / "run", data_path=None, vae=None, latents_dir=cache))
    assert "at step 3" in capsys.readouterr().out


def test_an_interrupted_cache_goes_on(cache, cache_arguments, signal_after, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_latents, "CHUNK", 5)
    cache_latents.main(cache_arguments(tmp_path / "whole"))
    signal_after(cache_latents, "encode_chunk", 2)
    cache_latents.main(cache_arguments(tmp_path / "latents"))
    assert capsys.readouterr().out.endswith("stopped on request; repeat the same command to go on\n")
    with pytest.raises(
        UserError, match="is not a finished latent cache \\(meta.json is missing\\); run cache_latents.py"
    ):
        LatentCache(tmp_path / "latents")
    encoded, encode = [], cache_latents.encode_chunk
    monkeypatch.setattr(
        cache_latents,
        "encode_chunk",
        lambda writer, rows, *rest: (encoded.append(rows), encode(writer, rows, *rest))[1],
    )
    cache_latents.main(cache_arguments(tmp_path / "latents"))
    assert encoded == [range(10, 15), range(15, 20), range(20, 24)]
    assert contents(tmp_path / "latents") == contents(tmp_path / "whole")
    moments = np.load(tmp_path / "whole" / "moments.npy").astype(np.float32)
    np.testing.assert_allclose(moments, np.load(cache / "moments.npy").astype(np.float32), atol=2e-3, rtol=2e-3)


def test_a_finished_cache_is_recognised(cache, cache_arguments, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(cache, tmp_path / "latents")
    before = contents(copy)
    cache_latents.main(cache_arguments(copy))
    assert "is a finished cache of this data set" in capsys.readouterr().out
    monkeypatch.setattr(cache_latents, "quick_identity", lambda _: [1, 2])  # as after moving the images or the VAE
    cache_latents.main(cache_arguments(copy))
    assert "is a finished cache of this data set" in capsys.readouterr().out
    assert contents(copy) == before


def test_a_finished_cache_is_recognised_without_listing_images_or_loading_the_autoencoder(
    cache, cache_arguments, tmp_path, monkeypatch, capsys
):
    copy = tmp_path / "latents"
    cache_latents.main(cache_arguments(copy))
    for owner, name in ((data, "ImageList"), (data, "read_image"), (cache_latents, "VAE")):
        monkeypatch.setattr(owner, name, None)
    capsys.readouterr()
    cache_latents.main(cache_arguments(copy))
    assert capsys.readouterr().out.endswith(f"nothing to do: {copy} is a finished cache of this data set\n")


def test_the_disk_need_is_printed_before_anything_is_encoded(cache_arguments, tmp_path, monkeypatch, capsys):
    printed = []

    def stop(*_):
        printed.append(capsys.readouterr().out)
        return True, []

    monkeypatch.setattr(cache_latents, "encode_missing", stop)
    cache_latents.main(cache_arguments(tmp_path / "latents"))
    assert printed[0].endswith(f"encoding 24 images, 2 flips each, into {tmp_path / 'latents'}: 12.3 kB\n")
    imagenet = latents.CacheWriter(tmp_path, (1_281_167, 2, 8, 32, 32))
    assert files.format_bytes(imagenet.shape[0] * imagenet.row_bytes) == "42 GB"


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


@pytest.fixture
def begun(cache, cache_arguments, signal_after, tmp_path, monkeypatch, capsys):
    """Maker of a cache of its own, finished or stopped after the first five images."""

    def make(finished: bool) -> Path:
        folder = tmp_path / "latents"
        if finished:
            return shutil.copytree(cache, folder)
        monkeypatch.setattr(cache_latents, "CHUNK", 5)
        signal_after(cache_latents, "encode_chunk", 1)
        cache_latents.main(cache_arguments(folder))
        capsys.readouterr()
        return folder

    return make


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name(
    finished, begun, cache_arguments, make_vae, vae_folder, image_folder, refused, tmp_path
):
    folder = begun(finished)
    before = contents(folder)
    start = f"--latents-dir {str(folder)!r} was made with other settings: "
    end = "; remove it or use another folder"

    def message(**changes):
        text = refused(cache_latents.main, cache_arguments(folder, **changes))
        assert text.startswith(start) and text.endswith(end)
        return text[len(start) : -len(end)]

    assert message(image_size=16) == "image_size [32, 32] (now [16, 16]), shape [24, 2, 8, 4, 4] (now [24, 2, 8, 2, 2])"
    assert message(no_flip=True) == "shape [24, 2, 8, 4, 4] (now [24, 1, 8, 4, 4])"
    named = []
    for source in (vae_folder, make_vae(seed=1)):
        found = VAE(str(source)).describe()
        named.append(f"{str(source)!r} (sha256 {found['sha256'][:8]}, scaling factor 0.5, shift 0.0)")
    assert message(vae=source) == f"vae {named[0]} (now {named[1]})"
    more = shutil.copytree(image_folder, tmp_path / "more")
    shutil.copy(more / "ant" / "00.png", more / "ant" / "99.png")
    assert "fingerprint " in message(data_path=more)
    assert contents(folder) == before


@pytest.mark.parametrize("finished", [True, False])
def test_an_autoencoder_that_was_moved_is_the_same(
    finished, begun, cache, cache_arguments, vae_folder, tmp_path, capsys
):
    folder, moved = begun(finished), shutil.copytree(vae_folder, tmp_path / "moved")
    cache_latents.main(cache_arguments(folder, vae=moved))
    assert ("nothing to do" in capsys.readouterr().out) == finished
    found, expected = (np.load(path / "moments.npy").astype(np.float32) for path in (folder, cache))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)  # float16, in other batches


@pytest.fixture
def damaged_folder(image_folder, tmp_path):
    """The images, two of them cut short."""
    copy = shutil.copytree(image_folder, tmp_path / "damaged")
    for name in ("ant/03.png", "käfer/05.png"):
        (copy / name).write_bytes((copy / name).read_bytes()[:60])
    return copy


def test_unreadable_images_are_named(cache_arguments, damaged_folder, refused, image_folder, tmp_path):
    arguments = cache_arguments(tmp_path / "latents", data_path=damaged_folder)
    message = refused(cache_latents.main, arguments)
    assert message.startswith(f"image {str(damaged_folder / 'ant' / '03.png')!r} cannot be read (")
    assert message.endswith(
        "; repair it or remove it from the data set; 2 in all; pass --skip-unreadable to leave such images out"
    )
    assert not (tmp_path / "latents" / "meta.json").exists()
    for name in ("ant/03.png", "käfer/05.png"):  # repaired, the same command goes on and ends well
        shutil.copy(image_folder / name, damaged_folder / name)
    cache_latents.main(arguments)
    assert len(LatentCache(tmp_path / "latents")) == 24


def test_unreadable_images_are_left_out_on_request(
    cache, cache_arguments, damaged_folder, train_arguments, tmp_path, capsys
):
    folder = tmp_path / "latents"
    cache_latents.main(cache_arguments(folder, data_path=damaged_folder, skip_unreadable=True))
    left_out = [str(damaged_folder / "ant" / "03.png"), str(damaged_folder / "käfer" / "05.png")]
    assert (folder / "skipped.txt").read_text().splitlines() == left_out
    latents, whole = LatentData(LatentCache(folder), False, 0), LatentCache(cache)
    rows = [row for row in range(24) if row not in (1, 17)]  # ant: 00, 03, ...; bee from 8, käfer from 16
    assert len(latents) == 22
    for index, row in enumerate(rows):
        moments, label = latents[0, index]
        assert label == row // 8
        np.testing.assert_allclose(moments.float(), whole.moments[row, 0].astype(np.float32), atol=2e-3, rtol=2e-3)
    train.main(train_arguments(tmp_path / "run", data_path=None, vae=None, latents_dir=folder, max_steps=4))
    assert "22 images in 3 classes, cached latents, 2 steps an epoch" in capsys.readouterr().out


def test_a_cache_that_does_not_fit_the_command(cache, cache_arguments, train_arguments, refused, tmp_path):
    def message(folder=cache, **changes):
        options = dict(data_path=None, vae=None, latents_dir=folder)
        text = refused(train.main, train_arguments(tmp_path / "run", **options | changes))
        assert not (tmp_path / "run").exists()
        return text.replace(f"--latents-dir {str(folder)!r}", "DIR")

    assert message(image_size=64) == "DIR was made at image size 32, the command says 64; pass --image-size 32"
    assert message(vae="mse").endswith(", the command says mse; leave --vae out")
    cache_latents.main(cache_arguments(tmp_path / "plain", no_flip=True))
    assert message(tmp_path / "plain") == "DIR has no flipped latents; pass --no-flip, or make the cache with --flip"
    train.main(train_arguments(tmp_path / "ok", data_path=None, vae=None, latents_dir=tmp_path / "plain", no_flip=True))
    assert message(tmp_path / "none") == (
        "DIR is not a finished latent cache (meta.json is missing); run cache_latents.py with this folder first"
    )
    broken = shutil.copytree(cache, tmp_path / "broken")
    for name in ("moments.npy", "labels.npy", "meta.json"):
        whole = (broken / name).read_bytes()
        (broken / name).write_bytes(whole[:50])
        assert message(broken).startswith("DIR is damaged (") and message(broken).endswith(
            "); remove it and make it again"
        )
        (broken / name).write_bytes(whole[:-20])
        assert message(broken).startswith("DIR is damaged (")
        (broken / name).write_bytes(whole)
    (broken / "meta.json").write_text("{}")
    assert message(broken).startswith("DIR is damaged (")
    (broken / "meta.json").write_text("[]")
    assert message(broken).startswith("DIR is damaged (")
    np.save(broken / "labels.npy", np.zeros(3, np.int64))
    shutil.copy(cache / "meta.json", broken / "meta.json")
    assert message(broken).startswith("DIR is damaged (")


def test_what_cannot_be_cached_is_refused_before_writing(cache_arguments, refused, tmp_path, monkeypatch):
    folder = tmp_path / "latents"
    assert refused(cache_latents.main, cache_arguments(folder, image_size=36)) == (
        "--image-size 36 is not divisible by 8 (VAE down-sampling 8 x patch 1); choose a multiple of 8"
    )
    assert refused(cache_latents.main, cache_arguments(folder, data_path=tmp_path / "none")) == (
        f"--data-path {str(tmp_path / 'none')!r} is not a folder; expected one with a sub-folder for each class"
    )
    assert refused(cache_latents.main, cache_arguments(folder, batch_size=0)) == (
        "argument --batch-size: '0' is not a whole number >= 1"
    )
    assert not folder.exists()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache_latents.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert refused(cache_latents.main, cache_arguments(folder)) == (
        f"--latents-dir {str(folder)!r} needs 12.3 kB and its disk has 1 kB free"
    )
    assert list(folder.iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.undo()
    assert refused(cache_latents.main, cache_arguments(tmp_path / "file" / "latents")) == (
        f"--latents-dir {str(tmp_path / 'file' / 'latents')!r} cannot be written (Not a directory)"
    )
