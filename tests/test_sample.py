"""Sampling: what is written, what an image depends on, guidance, samplers, interruption."""

import json
import math
import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line, contents, stops, tiny
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from test_checkpoint import build, write

import sample_ddp
from diffusion import create_diffusion
from diffusion.objectives import OBJECTIVES
from models import DiT
from rope import RopeConfig
from runtime import distributed, pretrained, sampling
from runtime.sampling import SamplingConfig
from runtime.vae import VAE

pytestmark = pytest.mark.usefixtures("tiny_commands")
SAMPLERS = OBJECTIVES["eps"].samplers


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run):
    """The folder of 13 samples, made in batches of 5."""
    folder = tmp_path_factory.mktemp("samples")
    options = dict(ckpt=run / "checkpoints" / "0000007.pt", sample_dir=folder, num_fid_samples=13)
    options |= dict(num_sampling_steps=4, per_proc_batch_size=5, precision="fp32")
    with pytest.MonkeyPatch.context() as patch, tiny(patch):
        sample_ddp.main(command_line(options))
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished folder."""
    return shutil.copytree(finished, tmp_path / "samples")


@pytest.fixture
def sample(sample_arguments, capsys):
    """Runs sample_ddp.py: sample(folder, cfg_scale=1) -> what it printed."""

    def call(folder, **changes) -> str:
        sample_ddp.main(sample_arguments(folder, **changes))
        return capsys.readouterr().out

    return call


def stem(folder):
    """The path that the .npz, the .json, the grid and the folder of a run of samples share."""
    (npz,) = folder.glob("*.npz")
    return npz.with_suffix("")


def arrays(folder):
    with np.load(f"{stem(folder)}.npz") as archive:
        return archive["arr_0"], archive["arr_1"]


def times(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in contents(folder)}


def assert_same(folder, reference) -> None:
    """Equal labels; at least 99.9 % of the images' values identical, none off by more than 1."""
    (images, labels), (expected, expected_labels) = arrays(folder), arrays(reference)
    difference = np.abs(images.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.999
    assert labels.tolist() == expected_labels.tolist()


def test_what_is_written(finished, vae_folder):
    path = stem(finished)
    assert path.name == f"DiT-XS-2-0000007-size-32-vae-{vae_folder.name}-cfg-1.5-seed-0"
    assert [png.name for png in contents(path)] == [f"{index:06d}.png" for index in range(13)]
    images, labels = arrays(finished)
    assert (images.dtype, images.shape) == (np.uint8, (13, 32, 32, 3))
    assert (labels.dtype, labels.shape) == (np.int64, (13,))
    for index in range(13):
        with Image.open(path / f"{index:06d}.png") as png:
            assert png.mode == "RGB" and np.array_equal(np.asarray(png), images[index])
    assert len({image.tobytes() for image in images}) == 13
    assert labels.tolist() == [sampling.label_of(index, 3, SamplingConfig(seed=0)) for index in range(13)]
    with Image.open(f"{path}.png") as grid:
        assert grid.width >= 10 * 64
    settings = json.loads(Path(f"{path}.json").read_text())
    assert (settings["steps"], settings["cfg_scale"], settings["sampler"]) == (4, 1.5, "ddpm")
    assert not list(finished.rglob("*.partial"))


def test_batches_do_not_change_images(finished, sample, tmp_path):
    sample(tmp_path, per_proc_batch_size=3)
    assert_same(tmp_path, finished)


def test_compiled_blocks_make_the_same_images_and_are_compiled_once(finished, sample, tmp_path, compilations):
    """With a smaller last batch, and where guidance goes on and off."""
    sample(tmp_path / "same", compile=True)
    assert_same(tmp_path / "same", finished)
    sample(tmp_path / "interval", compile=True, guidance_interval=(0.25, 0.75), num_fid_samples=8)
    assert compilations.frame_count == 1


def test_an_interrupted_run_makes_the_missing_images_only(
    finished, sample, sample_arguments, signal_after, tmp_path, monkeypatch, capsys
):
    signal_after(sampling, "sample_latents", 1)
    stops(sample_ddp.main, sample_arguments(tmp_path))
    assert capsys.readouterr().out.endswith("stopped on request; repeat the same command to go on\n")
    assert not list(tmp_path.glob("*.npz"))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert [path.name for path in contents(folder)] == [f"{index:06d}.png" for index in range(5)]
    (folder / "000002.png").write_bytes((folder / "000002.png").read_bytes()[:-7])  # as a killed run may leave it
    (folder / "000004.png").unlink()
    (folder / "000009.png.partial").write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("00000[013].png")}
    made, original = [], sampling.sample_latents
    monkeypatch.setattr(sampling, "sample_latents", lambda *args: (made.append(args[2]), original(*args))[1])
    sample(tmp_path, per_proc_batch_size=4)
    assert sum(made, []) == [2, 4, *range(5, 13)]
    assert kept.items() <= times(folder).items() and len(times(folder)) == 13
    assert_same(tmp_path, finished)


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Neither models nor autoencoders can be loaded."""
    monkeypatch.setattr(pretrained, "load_trained", None)
    monkeypatch.setattr(sample_ddp, "load_vae", None)


def test_the_name_is_told_from_the_settings_alone(run, sample, tmp_path, nothing_loaded):
    for ckpt in (run, run / "checkpoints" / "0000007.pt"):
        printed = sample(tmp_path / "a", ckpt=ckpt, cfg_scale=1, global_seed=100, print_name=True, vae="mse")
        assert printed == f"{tmp_path / 'a' / 'DiT-XS-2-0000007-size-32-vae-mse-cfg-1.0-seed-100.npz'}\n"
    assert not (tmp_path / "a").exists()


def test_a_finished_run_does_nothing_wherever_its_weights_lie(copy, run, sample, tmp_path, nothing_loaded):
    trained, before = pretrained.describe(run), times(copy)
    vae = Path(trained.config.vae.source)
    moved = {"ckpt": shutil.copy(trained.path, tmp_path), "vae": shutil.copytree(vae, tmp_path / "moved" / vae.name)}
    for changes in ({}, {"dry_run": True}, moved):
        assert "nothing to do: all 13 samples are there" in sample(copy, **changes)
    assert times(copy) == before


def test_a_dry_run_tells_what_is_missing_and_writes_nothing(copy, run, sample, sample_arguments, refused, tmp_path):
    (stem(copy) / "000003.png").unlink()
    before = times(tmp_path)
    for folder, missing in ((copy, 1), (tmp_path / "new", 13)):
        expected = f"dry run: would make {missing} of 13 samples, 4 steps of ddpm each"
        assert expected in sample(folder, ckpt=run, dry_run=True)
    assert "begun with other" in refused(sample_ddp.main, sample_arguments(copy, sampler="ddim", dry_run=True))
    planned = dict(ckpt=tmp_path / "run", dry_run=True, planned=2)
    assert f"{tmp_path / 'run'} was not looked at" in sample(tmp_path / "new", **planned)
    message = refused(sample_ddp.main, sample_arguments(f"{stem(copy)}.npz", **planned))
    assert message.endswith("is a file); choose another") and times(tmp_path) == before


def test_a_damaged_npz_is_made_again_and_more_samples_may_come_later(copy, finished, sample):
    npz = Path(f"{stem(copy)}.npz")
    for total in (13, 15):
        npz.write_bytes(npz.read_bytes()[:1000])
        sample(copy, num_fid_samples=total)
        images, labels = arrays(copy)
        assert len(images) == len(labels) == len(contents(stem(copy))) == total
        assert np.array_equal(images[:13], arrays(finished)[0])


def broken_image(path: Path, how: str) -> None:
    whole = bytearray(path.read_bytes())
    match how:
        case "flipped":
            whole[len(whole) // 2] ^= 1
        case "no image":
            whole[50:-20] = b""
        case "another size":
            with Image.open(path) as image:
                image.resize((16, 16)).save(path)
            return
        case "grey":
            with Image.open(path) as image:
                image.convert("L").save(path)
            return
    path.write_bytes(whole)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("how", ["flipped", "no image", "another size", "grey"])
def test_an_image_that_is_not_what_was_written_is_made_again(how, packed, copy, finished, sample):
    """It has the end of a PNG, so its beginning and its checksums have to tell."""
    path = stem(copy)
    broken_image(path / "000004.png", how)
    if not packed:
        Path(f"{path}.npz").unlink()
    before = times(copy)
    assert "nothing to do" not in sample(copy)
    assert_same(copy, finished)
    changed = {path.name for path, time in times(copy).items() if path.suffix == ".png" and before.get(path) != time}
    assert changed == {"000004.png", f"{path.name}.png"}


def test_a_damaged_npz_or_grid_is_packed_again(copy, finished, sample):
    npz, grid = (Path(f"{stem(copy)}{suffix}") for suffix in (".npz", ".png"))
    for path in (npz, grid):
        contents = bytearray(path.read_bytes())
        contents[len(contents) // 2] ^= 1
        path.write_bytes(contents)
        assert "nothing to do" not in sample(copy)
        assert_same(copy, finished)
    assert "nothing to do" in sample(copy)


def test_images_without_their_settings_are_not_adopted(copy, sample_arguments, refused):
    settings = Path(f"{stem(copy)}.json")
    settings.unlink()
    assert refused(sample_ddp.main, sample_arguments(copy)) == (
        f"{str(stem(copy))!r} holds images whose settings are missing ({str(settings)!r}); remove it, or use another "
        "--sample-dir"
    )
    settings.write_text("{")
    assert refused(sample_ddp.main, sample_arguments(copy)).startswith(f"{str(settings)!r} cannot be read (")


def test_samples_that_are_no_numbers_are_an_error(sample_arguments, refused, tmp_path, monkeypatch):
    forward, decode = DiT.forward_with_cfg, VAE.decode

    def poisoned(self, x, t, *rest):
        output = forward(self, x, t, *rest)
        output[1] += float(x.shape[0] == 5 and int(t[0]) < 500) * torch.nan
        return output

    with monkeypatch.context() as patch:
        patch.setattr(DiT, "forward_with_cfg", poisoned)
        message = refused(sample_ddp.main, sample_arguments(tmp_path / "a"), has_begun=True)
    assert message == (
        "sample 1 came out as values that are not finite, 1 of 5 of its batch; lower --cfg-scale, or use a checkpoint "
        "of earlier steps"
    )
    monkeypatch.setattr(VAE, "decode", lambda self, latents, names=None: decode(self, latents * torch.inf, names))
    message = refused(sample_ddp.main, sample_arguments(tmp_path / "b"), has_begun=True)
    assert " decodes sample 0 to values that are not finite; pass --vae-precision fp32, or use another" in message
    assert not list(tmp_path.rglob("*.png"))


def test_a_folder_begun_with_other_settings_is_refused_by_name(copy, sample_arguments, refused):
    before = times(copy)
    for listed, changes in {
        "steps 4 (now 5)": dict(num_sampling_steps=5),
        "sampler 'ddpm' (now 'ddim')": dict(sampler="ddim"),
        "class_balanced False (now True)": dict(class_balanced=True),
        "cfg_channels 3 (now 'all'), guidance_interval [0.0, 1.0] (now [0.0, 0.5])": dict(
            cfg_channels="all", guidance_interval=(0, 0.5)
        ),
        "weights_sha256 ": dict(weights="model"),
    }.items():
        message = refused(sample_ddp.main, sample_arguments(copy, **changes))
        assert message.startswith(f"{str(stem(copy))!r} was begun with other settings: {listed}")
        assert message.endswith("; repeat them, or use another --sample-dir")
    assert times(copy) == before


def test_every_setting_that_should_changes_the_images(finished, sample, tmp_path):
    found = {"reference": arrays(finished)[0][:2]}
    for name, changes in {
        "seed": dict(global_seed=1),
        "cfg": dict(cfg_scale=8),
        "channels": dict(cfg_scale=8, cfg_channels="all"),
        "interval": dict(cfg_scale=8, guidance_interval=(0.2, 0.6)),
        "steps": dict(num_sampling_steps=5),
        "ddim": dict(sampler="ddim"),
        "dpm++": dict(sampler="dpm++"),
        "raw": dict(weights="model"),
    }.items():
        sample(tmp_path / name, num_fid_samples=2, **changes)
        found[name] = arrays(tmp_path / name)[0]
        assert (found[name] != found["reference"]).mean() > 0.01, name
    assert len({images.tobytes() for images in found.values()}) == 9


def test_another_vae_has_to_fit(make_vae, sample_arguments, refused, tmp_path):
    other = make_vae(stages=3)
    assert refused(sample_ddp.main, sample_arguments(tmp_path / "samples", vae=other)) == (
        f"--vae {str(other)!r} has 4 latent channels and down-sampling 4; the checkpoint was trained with 4 and 8"
    )
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(("size", "classes", "name"), [((4, 4), 40, "32"), ((2, 4), 6, "16x32")])
def test_models_of_any_size_and_number_of_classes(size, classes, name, run, vae_folder, sample, tmp_path):
    """Labels without a folder are drawn too; in turn where that is asked for."""
    options, config = dict(input_size=size, num_classes=classes, rope=RopeConfig()), pretrained.describe(run).config
    config = replace(config, model=replace(config.model, **options))
    path = write(tmp_path / "a.pt", {"ema": build(**options).state_dict(), "config": config.to_dict()})
    sample(tmp_path / "samples", ckpt=path, class_balanced=classes == 6 or None)
    images, labels = arrays(tmp_path / "samples")
    assert images.shape == (13, 8 * size[0], 8 * size[1], 3) and images.std() > 1
    assert labels.max() > 2 and (classes == 40 or labels.tolist() == [k % 6 for k in range(13)])
    assert stem(tmp_path / "samples").name == f"DiT-XS-2-a-size-{name}-vae-{vae_folder.name}-cfg-1.5-seed-0"


def test_packing_holds_a_few_images_however_many_there_are(tmp_path):
    """Of 1,200 images, 15 MB, at most 256 are in memory together; numpy reads the file."""
    folder = sample_ddp.SampleFolder(tmp_path, "run")
    folder.images.mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), dtype=np.uint8)
    for index in range(7):
        Image.fromarray(pictures[index]).save(folder.path(index))
    for index in range(7, 1200):
        os.link(folder.path(index % 7), folder.path(index))
    tracemalloc.start()
    sample_ddp.write_npz(folder, [index % 3 for index in range(1200)], (64, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * 256 * 64 * 64 * 3  # read 256 at a time
    with np.load(folder.npz) as archive:
        assert np.array_equal(archive["arr_0"], pictures[np.arange(1200) % 7])
        assert archive["arr_1"].tolist() == [index % 3 for index in range(1200)]


# Labels and noise


def test_labels_are_uniform_or_balanced():
    labels = [sampling.label_of(index, 5, SamplingConfig(seed=3)) for index in range(2000)]
    counts = np.bincount(labels, minlength=5)
    assert counts.sum() == 2000 and np.abs(counts - 400).max() < 80  # 4.5 standard deviations
    balanced = [sampling.label_of(index, 5, SamplingConfig(class_balanced=True)) for index in range(12)]
    assert np.bincount(balanced).tolist() == [3, 3, 2, 2, 2]


def test_noise_belongs_to_the_index():
    like = torch.empty(4, 2, 3)
    noise, alone = sampling.IndexedNoise(7, [3, 11, 4, 5]), sampling.IndexedNoise(7, [11])
    first, second = noise(like), noise(like)
    assert torch.equal(first[1], alone(like[:1])[0]) and torch.equal(second[1], alone(like[:1])[0])
    many = torch.stack([sampling.IndexedNoise(0, [index])(torch.empty(1, 4, 4))[0] for index in range(500)])
    assert abs(float(many.mean())) < 0.05 and abs(float(many.std()) - 1) < 0.05
    assert len({row.numpy().tobytes() for row in many}) == 500
    assert not torch.equal(sampling.IndexedNoise(8, [11])(like[:1]), sampling.IndexedNoise(7, [11])(like[:1]))


# Guidance


@pytest.fixture
def rows(monkeypatch):
    """Rows of every call of the model: (timestep, conditional rows, null rows)."""
    seen, forward = [], DiT.forward

    def counted(self, x, t, y):
        assert len(set(t.tolist())) == 1 and len(x) == len(y)
        null = int((y == self.num_classes).sum())
        seen.append((int(t[0]), len(y) - null, null))
        return forward(self, x, t, y)

    monkeypatch.setattr(DiT, "forward", counted)
    return seen


def latents(run, config: SamplingConfig, indices=(0, 1, 2)):
    trained = pretrained.load_trained(run / "checkpoints" / "0000007.pt")
    labels = [sampling.label_of(index, 3, config) for index in indices]
    return sampling.sample_latents(trained.model, config, list(indices), labels, (4, 4, 4), torch.device("cpu"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_doubles_the_rows_within_its_interval(sampler, run, rows):
    latents(run, SamplingConfig(sampler=sampler, steps=5, cfg_scale=1))
    assert [row[1:] for row in rows] == [(3, 0)] * 5
    assert rows[0][0] == 999 and [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)
    rows.clear()
    latents(run, SamplingConfig(sampler=sampler, steps=8, cfg_scale=2))
    assert [row[1:] for row in rows] == [(3, 3)] * 8
    rows.clear()
    latents(run, SamplingConfig(sampler=sampler, steps=8, cfg_scale=2, guidance_interval=(0.25, 0.75)))
    expected = [(3, 3) if 250 <= t <= 750 else (3, 0) for t, _, _ in rows]
    assert [row[1:] for row in rows] == expected and 0 < expected.count((3, 3)) < 8
    for steps in (1, 2, 3):
        assert torch.isfinite(latents(run, SamplingConfig(sampler=sampler, steps=steps))).all()


def test_guidance_acts_at_the_ends_of_its_interval():
    class Model:
        forward_with_cfg = staticmethod(lambda *_: "guided")

        def __call__(self, *_):
            return "alone"

    for interval, inside, outside in (((0.25, 0.75), (250, 750), (249, 751)), ((0, 0.5), (0, 500), (501, 999))):
        predict = sampling.guided(Model(), SamplingConfig(cfg_scale=2, guidance_interval=interval))
        for steps, expected in ((inside, "guided"), (outside, "alone")):
            assert [predict(None, torch.tensor([t]), None) for t in steps] == [expected] * 2


# Samplers, on data whose noise is known: normal with standard deviation s, eps = sqrt(1 - a) x / (a s^2 + 1 - a)


class NormalData:
    """The exact noise predictor of normally distributed data; looks like a DiT without learned variance."""

    in_channels = out_channels = 1

    def __init__(self, deviation: float):
        self.deviation = deviation
        self.alphas_cumprod = torch.tensor(create_diffusion(None).alphas_cumprod)

    def __call__(self, x, t, y):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (torch.sqrt(1 - a) * x / (a * self.deviation**2 + 1 - a)).float()


def sample_normal(model: NormalData, config: SamplingConfig, count: int, size: int) -> torch.Tensor:
    return sampling.sample_latents(model, config, list(range(count)), [0] * count, (1, size, size), torch.device("cpu"))


@pytest.mark.parametrize("deviation", [0.5, 2.0])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 500), ("dpm++", 40)])
def test_deterministic_samplers_solve_the_equation(sampler, steps, deviation):
    """The solution scales the start to the data's deviation: x_0 = x_T s / sqrt(a_T s^2 + 1 - a_T)."""
    model = NormalData(deviation)
    found = sample_normal(model, SamplingConfig(sampler=sampler, steps=steps, cfg_scale=1, seed=5), 2, 8)
    start = sampling.IndexedNoise(5, [0, 1])(torch.empty(2, 1, 8, 8))
    a = float(model.alphas_cumprod[-1])
    torch.testing.assert_close(found, start * deviation / math.sqrt(a * deviation**2 + 1 - a), atol=0, rtol=0.02)


def test_ancestral_sampling_has_the_deviation_of_the_data():
    found = sample_normal(NormalData(0.5), SamplingConfig(steps=250, cfg_scale=1), 64, 16)
    assert float(found.std()) == pytest.approx(0.5, rel=0.03)
    assert float(found.mean()) == pytest.approx(0, abs=0.02)


def test_dpm_solver_is_the_loop_of_diffusers(run):
    """Guided noise of the model, its learned variance cut off, through the scheduler as diffusers' own pipelines do."""
    config = SamplingConfig(sampler="dpm++", steps=5, cfg_scale=2)
    model = pretrained.load_trained(run / "checkpoints" / "0000007.pt").model
    labels = torch.tensor([sampling.label_of(index, 3, config) for index in (0, 1, 2)])
    scheduler = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    scheduler.set_timesteps(5)
    x = sampling.IndexedNoise(0, [0, 1, 2])(torch.empty(3, 4, 4, 4))
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional = model(x, t.repeat(3), labels)[:, :4]
            null = model(x, t.repeat(3), torch.full((3,), 3))[:, :4]
            eps = torch.cat([null[:, :3] + 2 * (conditional - null)[:, :3], conditional[:, 3:]], 1)
            x = scheduler.step(eps, t, x, return_dict=False)[0]
    torch.testing.assert_close(latents(run, config), x, atol=1e-4, rtol=1e-4)


def test_precision_follows_the_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for asked, device, capability, expected in (
        ("fp32", cuda, (9, 0), "fp32"),
        ("bf16", cpu, None, "bf16"),
        ("auto", cuda, (7, 5), "fp32"),
        ("auto", cuda, (8, 0), "bf16"),
        ("auto", torch.device("mps"), None, "fp32"),
        ("auto", cpu, (False, False, False), "fp32"),  # AVX512-BF16, AMX, Intel
        ("auto", cpu, (True, False, False), "bf16"),
        ("auto", cpu, (True, False, True), "fp32"),
        ("auto", cpu, (False, True, True), "bf16"),
        ("auto", cpu, (True, True, True), "bf16"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        for number, name in enumerate(("_is_avx512_bf16_supported", "_is_amx_tile_supported")):
            monkeypatch.setattr(torch.cpu, name, lambda found=capability, number=number: found[number])
        monkeypatch.setattr(distributed, "is_intel", lambda found=capability: found[2])
        assert distributed.resolve_precision(asked, device) == expected


def test_the_autoencoder_decodes_in_bfloat16_on_request(vae_folder):
    """Rounded to 8 bits of mantissa, pixels move a little, and the autoencoder's own weights stay as they are."""
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    exact, rounded = (VAE(str(vae_folder), "cpu", precision) for precision in ("fp32", "bf16"))
    difference = (exact.decode(latents).int() - rounded.decode(latents).int()).abs()
    assert 0 < difference.max() <= 32
    assert {weight.dtype for weight in rounded.model.state_dict().values()} == {torch.float32}
