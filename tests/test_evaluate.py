"""Evaluation: agreement with torch-fidelity and closed forms, references, streaming, cache, processes, mistakes."""

import hashlib
import io
import json
import os
import pwd
import re
import resource
import shutil
import sys
import time
import tracemalloc
import urllib.error
import zipfile
from pathlib import Path

import kill
import numpy as np
import pytest
import torch
import torch_fidelity.feature_extractor_inceptionv3 as torch_fidelity_inception
from conftest import command_line, contents, metrics_and_features
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
from runtime import checkpoint, data, distributed, files, inception
from runtime.image_sets import FolderImages, NpzImages, checksum
from runtime.options import UserError

pytestmark = [
    pytest.mark.usefixtures("tiny_commands"),
    pytest.mark.filterwarnings("ignore:.* upwards; published", "ignore:.*not the weights of published numbers"),
]
SIZE = (24, 20)
PIXELS = "expected an .npz with images arr_0 uint8 (N, H, W, 3)"
NAMES = ("samples.npz", "reference.npz")
KID = {"kid_subsets": 5, "kid_subset_size": 8}
MEASURED = {"metrics": "is,precision,recall,kid", "num_workers": 0} | KID  # what takes no covariance, which is slow
TABLE = ("FID", "sFID", "Inception Score", "precision", "recall")  # and KID, with more digits
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def make_images(count: int, seed: int) -> np.ndarray:
    """Blurred noise of different contrasts and colours, (count, *SIZE, 3) uint8."""
    random = np.random.default_rng(seed)
    coarse = random.normal(128, 20 + 60 * random.random((count, 1, 1, 3)), (count, 6, 5, 3)).clip(0, 255)
    height, width = SIZE
    images = [Image.fromarray(image.astype(np.uint8)).resize((width, height), Image.BICUBIC) for image in coarse]
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """torch-fidelity's Inception-v3 with random weights that keep the scale of activations."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_fidelity_inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch_fidelity_inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = torch_fidelity_inception.FeatureExtractorInceptionV3("random", ["2048"])
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(std=(2 / fan_in) ** 0.5, generator=generator)
    # Random features of different images are alike; classes are told apart by what remains of them.
    (common,) = network(torch.from_numpy(make_images(1, 0)).permute(0, 3, 1, 2))  # (1, 2048)
    weight = network.fc.weight.normal_(std=5, generator=generator)
    weight -= weight @ common.T @ common / common.square().sum()
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """Twelve samples and eight reference images, each as an .npz and as a folder of PNGs: sets / "samples.npz", ..."""
    folder = tmp_path_factory.mktemp("sets")
    for name, count, seed in (("samples", 12, 1), ("reference", 8, 4)):
        images = make_images(count, seed)
        np.savez(folder / f"{name}.npz", arr_0=images)
        (folder / name).mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image).save(folder / name / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="session")
def command(sets, inception_file):
    """All metrics of the samples against the reference by the command and the real network, and the features."""
    settings = {"sampler": "ddim", "cfg_scale": 1.5, "step": 7, "weights": "ema"}
    (sets / "samples.json").write_text(json.dumps(settings))
    options = {"samples": sets / NAMES[0], "reference": sets / NAMES[1], "inception_weights": inception_file}
    return metrics_and_features(options | KID | {"cache_dir": sets / "cache"})


class FakeInception:
    """Stands in for the network where only what surrounds it is tested: coarse pixels, repeated to the widths."""

    weights, device = inception.PUBLISHED, torch.device("cpu")
    calls = 0

    def __init__(self, *_):
        pass

    def features(self, images):
        FakeInception.calls += 1
        coarse = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)  # (N, 48)
        return {name: coarse.repeat(1, width // 48 + 1)[:, :width] for name, width in inception.WIDTHS.items()}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(evaluate, "Inception", FakeInception)
    monkeypatch.setattr(FakeInception, "calls", 0)
    return FakeInception


@pytest.fixture
def arguments(tmp_path):
    """Command line for a few images: arguments(metrics="is", reference=None)."""

    def build(**changes) -> list[str]:
        options = {"samples": tmp_path / "samples.npz", "reference": tmp_path / "reference.npz"}
        for path, count, seed in zip(options.values(), (12, 14), (3, 4), strict=True):
            if not path.exists():
                np.savez(path, arr_0=make_images(count, seed))
        return command_line(options | {"cache_dir": tmp_path / "cache"} | MEASURED | changes)

    return build


@pytest.fixture
def evaluated(fake, arguments):
    """What the command measures with the fake network: evaluated(metrics="is"), whatever was measured before."""

    def run(**changes) -> dict:
        command = arguments(**changes)
        results = Path(command[1]).with_suffix(".metrics.json")
        results.unlink(missing_ok=True)
        evaluate.main(command)
        return json.loads(results.read_text())

    return run


# The numbers


def test_metrics_equal_those_of_torch_fidelitys_command(command, sets, inception_file, monkeypatch, capsys):
    from torch_fidelity import fidelity as torch_fidelity_command

    options = {"input1": sets / "samples", "input2": sets / "reference", "isc": True, "fid": True, "kid": True}
    options |= {"prc": True, "feature_extractor": "inception-v3-compat", "cpu": True, "json": True, "silent": True}
    options |= {"feature_extractor_weights_path": inception_file, "save_cpu_ram": True, "no_cache": True}
    monkeypatch.setattr(sys, "argv", ["fidelity", *command_line(options | KID)])
    capsys.readouterr()
    torch_fidelity_command.main()
    theirs = json.loads(capsys.readouterr().out)
    names = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}
    names |= {"inception_score": "inception_score_mean", "kid_std": "kernel_inception_distance_std"}
    names |= {name: name for name in ("inception_score_std", "precision", "recall")}
    ours = {name: command[0][name] for name in names}
    assert ours == pytest.approx({name: theirs[key] for name, key in names.items()}, rel=1e-6)
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1 and ours["precision"] != ours["recall"]
    assert ours["fid"] > 0 and ours["inception_score"] > 1.01


def frechet_by_gram(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two sets of features, whose trace of the root is the nuclear norm of first @ second.T."""
    means = [values.mean(0) for values in (first, second)]
    one, two = ((v - m) / np.sqrt(len(v) - 1) for v, m in zip((first, second), means, strict=True))
    difference = means[0] - means[1]
    return difference @ difference + (one**2).sum() + (two**2).sum() - 2 * np.linalg.norm(one @ two.T, "nuc")


def test_sfid_is_of_seven_channels_of_mixed_6d_in_the_order_of_tensorflow(command, inception_file):
    network, blocks = inception.Inception(inception_file, torch.device("cpu")), []
    network.network.Mixed_6d.register_forward_hook(lambda module, inputs, output: blocks.append(output))
    images = torch.from_numpy(make_images(3, 0)).permute(0, 3, 1, 2).contiguous()
    spatial = network.features(images)["spatial"]
    (block,) = blocks  # (N, 768, 17, 17), of which the first 192 channels are the 1 x 1 branch's, after its ReLU
    assert block.shape == (3, 768, 17, 17) and block.min() >= 0 and spatial.shape == (3, 2023) and spatial.std() > 0
    for h, w, c in [(0, 0, 0), (0, 0, 6), (0, 1, 0), (1, 0, 0), (16, 16, 6), (5, 11, 3)]:
        assert torch.equal(spatial[:, (h * 17 + w) * 7 + c], block[:, c, h, w])
    metrics, features = command
    expected = frechet_by_gram(*(features[name]["spatial"].double().numpy() for name in ("samples", "reference")))
    assert metrics["sfid"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("first, second", [(40, 40), (40, 7), (7, 40), (12, 12), (1, 30)])
def test_frechet_distance_is_the_closed_form(first, second):
    """Covariances with common axes: |mu1 - mu2|^2 + sum of (s1 - s2)^2; first and second are their ranks of 40."""
    random = np.random.default_rng(first)
    axes, _ = np.linalg.qr(random.standard_normal((40, 40)))
    one, two = random.uniform(0.1, 2, (2, 40))  # standard deviations along the axes
    one[first:], two[: 40 - second] = 0, 0
    mu = random.standard_normal((2, 40))
    gaussians = [{"mu": m, "sigma": (axes * s**2) @ axes.T} for m, s in zip(mu, (one, two), strict=True)]
    expected = ((mu[0] - mu[1]) ** 2).sum() + ((one - two) ** 2).sum()
    assert evaluate.frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-6)
    assert evaluate.frechet_distance(*gaussians[::-1]) == pytest.approx(expected, rel=1e-6)
    assert evaluate.frechet_distance(gaussians[0], gaussians[0]) == pytest.approx(0, abs=1e-5)


def test_statistics_have_the_precision_of_float64():
    features = torch.full((3, 2), 16777216.0)  # 2^24, from which float32 counts on by twos
    features[:, 1] = torch.tensor([1.0, 2.0, 4.0])
    found = evaluate.statistics(features + torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0]]))
    assert found["mu"].dtype == found["sigma"].dtype == np.float64
    assert found["mu"] == pytest.approx([16777216 + 4 / 3, 7 / 3], rel=1e-15)
    assert found["sigma"][1, 1] == pytest.approx(7 / 3)


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    random = torch.Generator().manual_seed(0)
    cluster = torch.rand(40, 3, generator=random)
    reference = torch.cat([cluster, cluster + 100])  # two modes, of which the samples have one
    assert evaluate.precision_recall(cluster + 0.01, reference) == {"precision": 1, "recall": 0.5}
    assert evaluate.precision_recall(reference, cluster + 0.01) == {"precision": 0.5, "recall": 1}


def test_three_neighbours_bound_a_ball_not_counting_its_centre():
    line = torch.tensor([[0.0], [1.0], [2.0], [4.0], [1000.0]])  # the ball around 0 reaches to 4, that around 4 to 0
    for position, inside in ((-3.9, 1), (-4.1, 0)):
        samples = torch.full((4, 1), position)
        assert evaluate.precision_recall(samples, line)["precision"] == inside


def test_all_settings_are_recorded(command, inception_file, sets):
    found, _ = command
    assert found["sampling"] == {"sampler": "ddim", "cfg_scale": 1.5, "step": 7, "weights": "ema"}
    assert (found["samples"], found["image_size"]) == (12, [24, 20])
    reference = {"path": str(sets / "reference.npz"), "kind": "npz", "stored_statistics": [], "images": 8}
    assert found["reference"] == reference
    weights = hashlib.sha256(inception_file.read_bytes()).hexdigest()[:8]
    expected = dict(network="torch-fidelity inception-v3-compat", weights_sha256=weights, weights_are_published=False)
    expected |= {f"{name}_checksum": checksum(sets / f"{name}.npz") for name in ("samples", "reference")}
    expected |= dict(batch_size=64, is_splits=10, precision_recall_neighbours=3, seed=2020)
    assert found["settings"] == expected | KID | {"kid_kernel": "(x.y / 2048 + 1)^3"}
    assert {"torch", "numpy", "torch-fidelity"} <= found["versions"].keys() and found["device"].startswith("cpu")


def test_the_table(evaluated, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "frechet_distance", lambda *_: 12.34567)
    found = evaluated(metrics=None)
    *rows, last = capsys.readouterr().out.splitlines()
    assert last == f"metrics: {tmp_path / 'samples.metrics.json'}"
    numbers = [12.34567, 12.34567, *(found[name] for name in ("inception_score", "precision", "recall"))]
    starts = [f"{name:18}{number:9.4f}" for name, number in zip(TABLE, numbers, strict=False)]
    starts.append(f"KID               {found['kid']:9.6f} ± {found['kid_std']:.6f}")
    assert [row.startswith(start) for row, start in zip(rows, starts, strict=True)] == [True] * 6


def test_metrics_are_told_even_where_they_cannot_be_written(fake, arguments, refused, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(evaluate, "say", told.append)
    (tmp_path / "samples.metrics.json").mkdir()
    found = refused(evaluate.main, arguments(metrics="is"))
    assert found.endswith("samples.metrics.json' cannot be written (Is a directory); free space, or move --samples")
    assert told[0].startswith("Inception Score ")


def test_a_user_without_a_home(fake, arguments, refused, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # which knows nobody
    given = arguments()
    del given[(position := given.index("--cache-dir")) : position + 2]
    message = "this user has no home folder; pass --cache-dir, or set XDG_CACHE_HOME"
    assert refused(evaluate.main, [*given, "--dry-run"]) == message
    evaluate.main([*given, "--metrics", "is", "--dry-run"])  # keeps no features


@pytest.mark.parametrize("count, bias", [(9999, ["9,999 samples bias FID and sFID upwards"]), (10_000, [])])
def test_numbers_that_compare_with_nothing_published_are_told(monkeypatch, fake, count, bias):
    monkeypatch.setattr(fake, "weights", "ffffffff")
    args = evaluate.parse_args(["--samples=a.npz", "--metrics=fid,sfid"])
    with pytest.warns(UserWarning) as seen:
        evaluate.warn(args, range(count), fake())
    expected = [*bias, "--inception-weights has sha256 ffffffff..., not 6726825d...: these are not the weights of"]
    assert all(str(warning.message).startswith(text) for warning, text in zip(seen, expected, strict=True))


# References


def write_adm_reference(path: Path, **changes) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    arrays = {"arr_0": make_images(14, 4)}
    for mu, sigma, width in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
        arrays |= {mu: random.standard_normal(width).astype(np.float32), sigma: np.eye(width) * 0.5}
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(path, **arrays)
    return arrays


def test_adm_references_give_statistics_for_fid_and_sfid_and_images_for_others(evaluated, fake, tmp_path, monkeypatch):
    stored, compared = write_adm_reference(tmp_path / "adm.npz"), []
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "frechet_distance", lambda samples, reference: compared.append(reference) or 1.0)
        found = evaluated(metrics="fid,sfid", reference=tmp_path / "adm.npz")
    for against, mu, sigma in zip(compared, ("mu", "mu_s"), ("sigma", "sigma_s"), strict=True):
        assert against["mu"].dtype == against["sigma"].dtype == np.float64
        assert np.array_equal(against["mu"], stored[mu]) and np.array_equal(against["sigma"], stored[sigma])
    assert fake.calls == 1 and not (tmp_path / "cache").exists()  # the images of the reference were not looked at
    assert found["reference"]["stored_statistics"] == ["mu", "mu_s"]
    of_images, of_adm = evaluated(), evaluated(reference=tmp_path / "adm.npz")
    assert all(of_adm[name] == of_images[name] for name in ("precision", "recall", "kid", "inception_score"))


def test_folder_references_are_prepared_as_for_training(evaluated, sets, image_folder):
    of_folder, of_npz = (evaluated(reference=sets / name) for name in ("reference", "reference.npz"))
    assert all(of_folder[name] == of_npz[name] for name in ("precision", "recall", "kid"))
    assert of_folder["reference"]["kind"] == "folder" and of_folder["reference"]["images"] == 8
    # With class folders, and resized: every image is the one that training sees.
    hidden = image_folder / ".thumbnails"
    hidden.mkdir()
    Image.new("RGB", (9, 9)).save(hidden / "a.png")
    images = FolderImages(image_folder, (16, 12))
    shutil.rmtree(hidden)
    listed = data.ImageList(image_folder)
    rows, pixels = (torch.cat(parts) for parts in zip(*images.share(5), strict=True))
    assert rows.tolist() == list(range(24)) and pixels.shape == (24, 3, 16, 12)
    for index in range(24):
        expected = data.prepare(data.read_image(listed.path(index)), (16, 12))
        assert np.array_equal(pixels[index].permute(1, 2, 0), expected)


def test_a_checksum_follows_the_contents(sets, tmp_path):
    folder, npz = shutil.copytree(sets / "reference", tmp_path / "a"), tmp_path / "reference.npz"
    shutil.copy(sets / "reference.npz", npz)
    other = shutil.copytree(folder, tmp_path / "b")  # alike in names, sizes and times, as other images can be
    before = checksum(folder), checksum(npz)
    assert len({*before, checksum(other)}) == 3
    assert before == (checksum(folder), checksum(shutil.move(npz, tmp_path / "moved.npz")))
    os.utime(folder / "00.png", (0, 0))
    np.savez(npz, arr_0=make_images(8, 5))
    assert not {checksum(folder), checksum(npz)} & {*before}


def test_cached_features_follow_contents_weights_and_size(evaluated, fake, sets, tmp_path, monkeypatch):
    first, calls = evaluated(), fake.calls
    assert [path.name for path in (tmp_path / "cache").rglob("*.safetensors")] == ["pool.safetensors"]
    (tmp_path / "reference.npz").rename(tmp_path / "moved.npz")
    again = evaluated(reference=tmp_path / "moved.npz")
    assert fake.calls == 2 * calls - 1  # those of the samples alone
    assert all(again[name] == first[name] for name in ("precision", "recall", "kid"))

    def cached(**changes) -> int:
        evaluated(metrics="kid", **changes)
        return len(list((tmp_path / "cache").iterdir()))

    assert [cached(reference=sets / "reference") for _ in range(2)] == [2, 2]
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((12, 32, 32, 3), np.uint8))
    assert cached(samples=tmp_path / "large.npz", reference=sets / "reference") == 3  # resized otherwise
    monkeypatch.setattr(fake, "weights", "eeeeeeee")
    assert cached(reference=sets / "reference") == 4


@pytest.mark.parametrize("how", ["other values", "other shape", "no checksum"])
def test_cached_features_that_are_not_as_written_are_made_again(how, evaluated, tmp_path):
    first = evaluated()
    (path,) = (tmp_path / "cache").rglob("pool.safetensors")
    whole, values = path.read_bytes(), load_file(path)["pool"]
    metadata = {"sha256": checkpoint.tensor_hash({"pool": values})}
    changed = values + 1 if how == "other values" else values[1:] if how == "other shape" else values
    if how == "other shape":
        metadata = {"sha256": checkpoint.tensor_hash({"pool": changed})}
    save_file({"pool": changed.contiguous()}, path, None if how == "no checksum" else metadata)
    with pytest.warns(UserWarning, match="it has not the features that its checksum is of.*; it is made again"):
        assert evaluated() == first
    assert path.read_bytes() == whole


def test_cached_features_that_cannot_be_read_or_written(evaluated, tmp_path, monkeypatch):
    first, cache = evaluated(), tmp_path / "cache"
    (path,) = cache.rglob("pool.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.warns(UserWarning, match="cannot be read .*; it is made again"):
        assert evaluated() == first
    assert path.read_bytes() == whole
    shutil.rmtree(cache)
    cache.touch()
    monkeypatch.setattr(files, "check_folder", lambda *_: None)  # the disk became full since
    with pytest.warns(UserWarning, match=re.escape(f"are not kept: --cache-dir {str(cache)!r} cannot be written (")):
        assert evaluated() == first
    cache.unlink()
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="written .*; the next command makes it again"):
        patch.setattr(inception, "save", full)
        assert evaluated() == first


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_second_command_waits_for_the_first_and_reads_its_features(evaluated, fake, tmp_path, monkeypatch, capsys):
    first, calls = evaluated(), fake.calls
    (path,) = (tmp_path / "cache").rglob("pool.safetensors")
    whole = path.read_bytes()
    holder = kill.Holder(path.parent)
    assert evaluated() == first and fake.calls == 2 * calls - 1  # a reader is not kept waiting
    path.unlink()

    def finish(_):
        path.write_bytes(whole)
        holder.release()
        patch.undo()  # others sleep, too

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(distributed.time, "sleep", finish)
        assert evaluated() == first and fake.calls == 3 * calls - 2  # those of the samples alone
    assert capsys.readouterr().out.startswith(f"waiting for {holder.name}, which writes into {path.parent}\n")
    assert path.read_bytes() == whole


# Finished, and not yet begun


def test_what_is_measured_is_not_measured_again(arguments, evaluated, fake, tmp_path, capsys):
    evaluated()
    table = capsys.readouterr().out.splitlines()[:-1]
    results, calls = tmp_path / "samples.metrics.json", fake.calls
    written = results.read_bytes()
    shutil.copy(tmp_path / "reference.npz", tmp_path / "moved.npz")
    for changes in ({}, {"dry_run": True}, {"reference": tmp_path / "moved.npz"}, {"metrics": "is", "reference": None}):
        evaluate.main(arguments(**changes))
        lines = table[:1] if "metrics" in changes else table
        assert capsys.readouterr().out.splitlines() == [*lines, f"nothing to do: {results} holds these metrics already"]
    assert fake.calls == calls and results.read_bytes() == written


def test_what_has_changed_is_measured_again(arguments, fake, inception_file, tmp_path):
    def is_measured(**changes) -> bool:
        calls = fake.calls
        evaluate.main(arguments(**changes))
        return fake.calls > calls

    assert is_measured(metrics="kid") and not is_measured(metrics="kid") and is_measured()
    assert is_measured(batch_size=3) and is_measured(kid_subsets=6) and is_measured(inception_weights=inception_file)
    for name, count in (("samples", 12), ("reference", 14)):  # other images, but as many, and older than the metrics
        np.savez(tmp_path / f"{name}.npz", arr_0=make_images(count, 5))
        os.utime(tmp_path / f"{name}.npz", (0, 0))
        assert is_measured() and not is_measured()
    (tmp_path / "samples.metrics.json").write_text("{")
    assert is_measured()


def test_dry_run(fake, arguments, inception_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    command = arguments(metrics="fid,precision", dry_run=True)
    before = contents(tmp_path)
    evaluate.main(command)
    assert capsys.readouterr().out.splitlines() == [
        "dry run: would measure fid,precision, with 1 processes",
        f"samples: {tmp_path / 'samples.npz'}, 12 images of 24x20 pixels",
        f"reference: {tmp_path / 'reference.npz'}, 14 images",
        f"weights of Inception-v3: would be downloaded once (96 MB) to {tmp_path / 'hub' / 'checkpoints' / WEIGHTS}",
        "memory: about 2.45 MB in the first process",
        f"would keep features of the reference in {tmp_path / 'cache'}",
        f"would write {tmp_path / 'samples.metrics.json'}",
    ]
    evaluate.main([*command, f"--inception-weights={inception_file}"])
    assert f"Inception-v3: {inception_file}, which are not those of published numbers\n" in capsys.readouterr().out
    settings = {"samples": tmp_path / "later" / "samples.npz", "metrics": None, "kid_subset_size": 14}
    settings |= {"dry_run": True, "planned": 2, "inception_weights": inception_file}
    for expected, number in ((None, "of any number"), (14, "14 images")):
        evaluate.main(arguments(samples_expected=expected, **settings))
        output = capsys.readouterr().out
        assert output.startswith("dry run: would measure fid,sfid,is,precision,recall,kid, with 2 processes\n")
        assert f"{settings['samples']}, {number}; not checked, since an earlier command makes it\n" in output
    with pytest.raises(SystemExit):
        evaluate.main(arguments(samples_expected=9, **settings))
    message = (
        "is needs 10 images, more than the 9 of --samples; give more, or pass --metrics fid,sfid,precision,recall\n"
    )
    assert capsys.readouterr().err.endswith(message)
    assert fake.calls == 0 and contents(tmp_path) == before


# Streaming and processes


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_are_streamed(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (512, 64, 64, 3), dtype=np.uint8)  # 6.3 MB
    save(tmp_path / "many.npz", arr_0=images)
    tracemalloc.start()
    read = NpzImages(tmp_path / "many.npz", "--samples")
    for index, batch in enumerate(read.batches(10)):
        assert np.array_equal(batch, images[index * 10 : index * 10 + 10])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert index == 51 and peak < 2e6


def test_two_processes_measure_as_one(two, evaluated, image_folder, tmp_path):
    (samples,) = (two.folder / "sampled").glob("*.npz")
    assert two.output.count("Inception Score ") == two.output.count("metrics: ") == 1
    together = json.loads(samples.with_suffix(".metrics.json").read_text())
    alone = evaluated(samples=shutil.copy(samples, tmp_path), reference=image_folder)
    numbers = ("inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std")
    assert [together[name] for name in numbers] == [alone[name] for name in numbers]


def test_all_processes_end_when_one_meets_an_unreadable_image(fake, arguments, refused, monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, "image 'b.png' cannot be read (damaged)"])
    assert refused(evaluate.main, arguments(), has_begun=True) == "image 'b.png' cannot be read (damaged)"


# Weights


def test_weights_are_downloaded_once_and_checked(arguments, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    asked, url = [], f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"

    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    def fetch(*given, hash_prefix):
        asked.append((*given, hash_prefix))
        Path(given[1]).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    message = refused(evaluate.main, arguments())
    assert message.startswith("the Inception-v3 weights cannot be downloaded (<urlopen error no network>); fetch ")
    assert url in message and message.endswith("pass the file as --inception-weights FILE")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    path = tmp_path / "checkpoints" / WEIGHTS
    assert inception.download() == inception.download() == path
    assert [(given, str(place), prefix) for given, place, prefix in asked] == [(url, str(path), "6726825d")]


class Code:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


OTHER = "holds other weights than torch-fidelity's Inception-v3 ("
NO_WEIGHTS = {  # name of a file, what becomes of the weights in it, and how the line about it goes on
    "none.pth": (None, f"is not a file; expected {WEIGHTS}"),
    "less.pth": (lambda state: state.pop("fc.bias"), f'{OTHER}Missing key(s) in state_dict: "fc.bias".); '),
    "list.pth": (lambda state: state.update({"fc.bias": [0.0] * 1008}), f"{OTHER}While copying the parameter"),
    "more.safetensors": (lambda state: state.update(x=torch.ones(1)), f"{OTHER}Unexpected key(s) in"),
    "code.pth": (lambda state: state.update(x=Code()), "is refused: it asks for posix.mkdir;"),
    WEIGHTS: (lambda state: state.clear(), "is damaged: its sha256 begins with "),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_weights_that_are_none(inception_file, arguments, refused, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    change, message = NO_WEIGHTS[name]
    if change is not None:
        state = torch.load(inception_file)
        change(state)
        (save_file if name.endswith(".safetensors") else torch.save)(state, name)
    start = f"--inception-weights: checkpoint {name!r}" if name == "code.pth" else f"--inception-weights {name!r}"
    found = refused(evaluate.main, arguments(inception_weights=name, dry_run=True))
    assert found.startswith(f"{start} {message}")


@pytest.mark.parametrize("what", ["metrics", "features"])
def test_numbers_that_are_not_finite(fake, arguments, refused, monkeypatch, what):
    if what == "features":
        monkeypatch.setattr(fake, "features", lambda _, images: {"logits": torch.full((len(images), 1008), np.nan)})
        message = "the Inception-v3 weights give features that are not finite numbers; use others"
    else:
        score = dict.fromkeys((evaluate.KEY_METRIC_ISC_MEAN, evaluate.KEY_METRIC_ISC_STD), float("inf"))
        monkeypatch.setattr(evaluate, "isc_features_to_metric", lambda *_, **__: score)
        message = "inception_score, inception_score_std came out as no finite number; the Inception-v3 weights do not"
    assert refused(evaluate.main, arguments(metrics="is", reference=None)).startswith(message)


# Mistakes

METRICS = "fid,sfid,is,precision,recall,kid"
FEW = "needs {} images, more than the {} of {}; give more"
MISTAKES = [  # changes to the command line, and how the line about them begins; a dry run refuses them as well
    (dict(metrics="fid,FID"), f"argument --metrics: 'FID' is not a metric; expected some of {METRICS}"),
    (dict(metrics=""), "argument --metrics: '' is not a metric; expected some of"),
    (dict(kid_subset_size=1), "argument --kid-subset-size: '1' is not a whole number >= 2"),
    (dict(reference=None, metrics="is,fid,kid"), "fid compares with a reference; pass --reference REF, or pass --metr"),
    (dict(samples="1.npz", metrics="is,fid"), f"is {FEW.format(10, 1, '--samples')}"),
    (dict(reference="3.npz", metrics="recall,fid"), f"recall {FEW.format(4, 3, '--reference')}, or pass --metrics fid"),
    (dict(reference="1.npz", metrics="fid"), f"fid {FEW.format(2, 1, '--reference')}"),
    (dict(metrics="kid", kid_subset_size=99), f"kid {FEW.format(99, 12, '--samples')}, lower --kid-subset-size"),
    (dict(samples_expected=13), "--samples 'samples.npz' has 12 images; expected 13 by"),
    (dict(samples="no/such.npz"), f"--samples 'no/such.npz' does not exist; {PIXELS}"),
    (dict(reference="no/such"), "--reference 'no/such' does not exist; expected a reference file of ADM, an .npz of"),
    (dict(reference="array.npy"), "--reference 'array.npy' cannot be read (File is not a zip file);"),
    (dict(reference="empty"), "--reference 'empty' has no images; expected files ending in .jpg, "),
    (dict(cache_dir="array.npy/cache"), "--cache-dir 'array.npy/cache' cannot be written ("),
    (dict(samples="3.npz", metrics="fid"), "'3.json' cannot be read ("),
]


@pytest.mark.parametrize("dry_run", [None, True])
@pytest.mark.parametrize("changes, message", MISTAKES)
def test_mistakes(fake, arguments, refused, tmp_path, monkeypatch, changes, message, dry_run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "3.json").write_text("{")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for count in (1, 3):
        np.savez(tmp_path / f"{count}.npz", arr_0=make_images(count, 0))
    command = arguments(**{"samples": "samples.npz"} | changes, dry_run=dry_run)
    assert refused(evaluate.main, command).startswith(message)
    assert fake.calls == 0


NO_IMAGES = [  # what arr_0 is, and how the line about it goes on
    (np.zeros((2, 8, 8, 3)), "holds arr_0 float64 (2, 8, 8, 3)"),
    (np.zeros((2, 8, 8, 1), np.uint8), "holds arr_0 uint8 (2, 8, 8, 1)"),
    (np.zeros((2, 8, 8), np.uint8), "holds arr_0 uint8 (2, 8, 8)"),
    (np.array([{"an": "object"}]), "holds arr_0 object (1,)"),
    (np.zeros((0, 8, 8, 3), np.uint8), "holds no images"),
    (np.zeros((2, 8, 8, 3), np.uint8, order="F"), "holds arr_0 uint8 (2, 8, 8, 3) in column-major order"),
]
DAMAGE = [  # what becomes of a whole archive
    (lambda whole: b"", "cannot be read ("),
    (lambda whole: whole[:-30], "cannot be read ("),
    (lambda whole: whole[:40] + b"x" * 20 + whole[60:], "cannot be read ("),
    (lambda whole: whole[:900] + b"x" + whole[901:], "cannot be read (Bad CRC-32 for file 'arr_0.npy')"),
    (lambda whole: whole.replace(b"(90, 24,", b"(91, 24,"), "holds 129600 bytes for arr_0 uint8 (91, 24, 20, 3)"),
]


def archived(path: Path, **members: bytes) -> Path:
    """An archive of deflated .npy files of any content."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, contents in members.items():
            archive.writestr(f"{name}.npy", contents)
    return path


def npy(shape: tuple, dtype: str, contents: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + contents


ONE = npy((1, 8, 8, 3), "|u1", bytes(192))
HOSTILE = {  # members of a small archive, what the answer says
    "a long header": (dict(arr_0=b"\x93NUMPY\2\0" + (10**7).to_bytes(4, "little") + b" " * 10**7), "EOF: "),
    "images unpacked": (dict(arr_0=npy((10**5, 16, 16, 3), "|u1", bytes(768 * 10**5))), "entry 'arr_0.npy' is larger"),
    "labels that are not there": (
        dict(arr_0=ONE, arr_1=npy((10**12,), "<i8")),
        "arr_1 int64 (1000000000000,) has 128 b",
    ),
    "labels unpacked": (dict(arr_0=ONE, arr_1=npy((10**7,), "<i8", bytes(8 * 10**7))), "entry 'arr_1.npy' is larger"),
    "lengths that multiply to the size": (
        dict(arr_0=npy((-1, -8, 8, 3), "|u1", bytes(192))),
        "claims the shape (-1, -8",
    ),
    "nested deeply": (dict(arr_0=b"\x93NUMPY\1\0\x88\x13" + b"(" * 5000), "ValueError"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_small_archive_cannot_claim_much_memory(case, tmp_path):
    members, expected = HOSTILE[case]
    path = archived(tmp_path / "hostile.npz", **{"arr_1": npy((1,), "<i8", bytes(8))} | members)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(UserError) as error:
        NpzImages(path, "--samples", labelled=True)
    assert str(error.value).startswith(f"--samples {str(path)!r} cannot be read (") and "\n" not in str(error.value)
    assert expected in str(error.value) or expected == "ValueError"
    assert time.perf_counter() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize("images, message", NO_IMAGES + DAMAGE)
def test_archives_that_hold_no_images(tmp_path, images, message):
    path = tmp_path / "wrong.npz"
    is_damage = callable(images)
    np.savez(path, arr_0=np.zeros((90, *SIZE, 3), np.uint8) if is_damage else images)
    if is_damage:
        path.write_bytes(images(path.read_bytes()))
    with pytest.raises(UserError) as error:
        list(NpzImages(path, "--samples").batches(5))
    assert str(error.value).startswith(f"--samples {str(path)!r} {message}")
    assert str(error.value).endswith(f"; {PIXELS}")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sigma=np.zeros((2048, 2047))), "holds sigma float64 (2048, 2047); expected floats (2048, 2048), as in "),
        (dict(mu_s=np.zeros(2022, np.float32)), "holds mu_s float32 (2022,); expected floats (2023,), as in the"),
        (dict(mu=np.full(2048, np.nan)), "has values in mu that are not finite numbers"),
        (dict(arr_0=np.zeros((5, 24, 24, 3), np.uint8)), "has images of 24 pixels and --samples of 24x20; use a"),
        (dict(arr_0=None), "has no images arr_0, which precision needs; use another, or pass --metrics fid,sfid,is"),
        (dict(arr_0=None, mu_s=None, mu=None), "has neither images nor statistics; expected a reference file of ADM"),
    ],
)
def test_references_that_do_not_fit(fake, arguments, refused, tmp_path, changes, message):
    write_adm_reference(tmp_path / "adm.npz", **changes)
    found = refused(evaluate.main, arguments(reference=tmp_path / "adm.npz", metrics=None))
    assert found.startswith(f"--reference {str(tmp_path / 'adm.npz')!r} {message}")
    assert fake.calls == 0


def test_images_of_a_folder_that_cannot_be_read(fake, arguments, refused, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"damaged")
    found = refused(evaluate.main, arguments(reference=tmp_path, metrics="kid", kid_subset_size=2), has_begun=True)
    assert found.startswith("image ") and found.endswith("; repair it or remove it from the data set")
