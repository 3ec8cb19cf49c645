"""The same numbers as other people's code gives, on random weights: docs/verification.md is the table that this prints.

python -m pip install --no-deps -r requirements-parity.txt
python -m pytest -m parity
"""

import copy
import importlib
import importlib.util
import json
import sys
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import test_evaluate
import torch
from conftest import command_line, metrics_and_features
from PIL import Image
from test_diffusers_layout import random_transformer

import evaluate
from diffusion import create_diffusion
from diffusion.objectives import OBJECTIVES
from models import DiT
from rope import RopeConfig, SpiralRoPE, rotate
from runtime import distributed, sampling, training
from runtime.config import ModelConfig, Recipe
from runtime.pretrained import load_trained
from runtime.vae import VAE

pytestmark = pytest.mark.parity
PAGE = (Path(__file__).parent.parent / "docs" / "verification.md").read_text(encoding="utf-8")
INSTALL = "python -m pip install --no-deps -r requirements-parity.txt"
LATENT = 16  # latents a side: 64 patches of 2 x 2
SPIRAL = ModelConfig(model="DiT-XS/2", input_size=(LATENT, LATENT), num_classes=10, rope=RopeConfig(rotate=4))
IMAGES = 48  # of either set that is measured
inception_file = test_evaluate.inception_file  # a fixture


def other(module: str, package: str | None = None):
    """A module of other people's code. Where it is missing the test fails: nothing here is skipped."""
    try:
        if package:
            _without_its_others(package)
        return importlib.import_module(module)
    except ImportError as error:
        pytest.fail(f"{module} cannot be imported ({error}); {INSTALL}")


def _without_its_others(package: str) -> None:
    """Make modules of a package importable without its __init__.py, which imports all of them and what those need."""
    if package not in sys.modules:
        found = importlib.util.find_spec(package)
        if found is None:
            raise ModuleNotFoundError(f"No module named {package!r}")
        module = types.ModuleType(package)
        module.__path__ = list(found.submodule_search_locations)
        sys.modules[package] = module


class Table:
    """Rows of the table of docs/verification.md, which pytest prints at its end."""

    def __init__(self):
        self.rows = ["| check | counterpart | worst difference | asserted |", "|---|---|---|---|"]

    def pytest_terminal_summary(self, terminalreporter):
        for row in ["", *self.rows]:
            terminalreporter.write_line(row)


@pytest.fixture(scope="session")
def equal(request):
    """equal(check, distribution, ours, theirs, within): asserts, and adds a row to the table, as the page has it.

    The difference is the largest one, of all numbers, as a share of the largest magnitude among theirs.
    """
    table = Table()
    request.config.pluginmanager.register(table)

    def compare(check: str, distribution: str, ours, theirs, within: float) -> None:
        ours, theirs = (torch.as_tensor(np.asarray(values), dtype=torch.float64) for values in (ours, theirs))
        assert ours.shape == theirs.shape and bool(theirs.isfinite().all())
        largest = float(theirs.abs().max())
        assert largest > 0 and f"| {check} | {distribution} " in PAGE
        worst = float((ours - theirs).abs().max()) / largest
        shown = f"{worst:.1e}" if worst else "none"
        table.rows.append(f"| {check} | {distribution} {version(distribution)} | {shown} | {within:.0e} |")
        assert worst <= within, f"{check}: {worst:.2e} of the largest magnitude {largest:.3g}"

    return compare


# The model


@pytest.fixture
def sincos(tmp_path):
    """A DiT with sin-cos positions and random weights, and diffusers' transformer, from whose folder it is loaded."""
    settings = dict(num_layers=6, attention_head_dim=64, sample_size=LATENT, num_embeds_ada_norm=1000)
    theirs = random_transformer(**settings)
    theirs.save_pretrained(tmp_path)
    return load_trained(tmp_path).model, theirs


def with_numbers(theirs, shift: int = 0, norm_eps: float = 1e-6):
    """diffusers' transformer with the two numbers in which it differs from DiT, by default set to DiT's.

    Frequencies of the timestep's features go by i / 128 (shift 0; its own, 1, is i / 127), and the second norm of a
    block has epsilon 1e-6 (its own is 1e-5).
    """
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = shift, norm_eps
    return theirs


@pytest.fixture
def spiral(fill_weights):
    """A DiT with Spiral RoPE and random weights."""
    return fill_weights(SPIRAL.build()).eval()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_forward_of_dit(sincos, equal):
    x, t, y = random(4, 4, LATENT, LATENT), torch.tensor([0, 37, 500, 999]), torch.tensor([3, 207, 999, 1000])
    model, theirs = sincos
    ours = model(x, t, y)
    for kind, shift, norm_eps, within in (
        ("with DiT's timestep features and epsilon", 0, 1e-6, 1e-5),
        ("with DiT's timestep features", 0, 1e-5, 1e-4),
        ("as it is", 1, 1e-5, 0.5),
    ):
        expected = with_numbers(theirs, shift, norm_eps)(x, timestep=t, class_labels=y).sample
        equal(f"Forward: `DiTTransformer2DModel` {kind}", "diffusers", ours, expected, within)
    assert (ours - expected).abs().max() > 1e-2 * expected.abs().max()  # as it is, it is another model


def test_axial_rope(equal):
    from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed

    rope, (h, w), x = SpiralRoPE(64, 16, RopeConfig(rotate=0)), (16, 16), random(2, 256, 3, 64)
    y, x_position = (position.flatten() for position in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    halves = [get_1d_rotary_pos_embed(32, position * 1.5, use_real=True) for position in (y, x_position)]
    theirs = tuple(torch.cat(parts, dim=1) for parts in zip(*halves, strict=True))  # cosines and sines (N, D)
    cos, sin = rope(h, w)
    equal("Axial RoPE, tables: `get_1d_rotary_pos_embed`", "diffusers", cos, theirs[0][:, ::2], 1e-5)
    expected = apply_rotary_emb(x.transpose(1, 2), theirs).transpose(1, 2)
    equal("Axial RoPE, rotation: `apply_rotary_emb`", "diffusers", rotate(x, cos, sin), expected, 1e-5)


# Sampling


def stepwise(model: DiT, scheduler, x, y, outputs: int, generator, **options) -> torch.Tensor:
    """What a scheduler of diffusers makes of the noise x, given so many channels of the model's output."""
    for t in scheduler.timesteps:
        out = model(x, t.expand(len(x)), y)[:, :outputs]
        x = scheduler.step(out, t, x, generator=generator, **options).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize("respacing", ["250", "ddim50", "10,15,20"])
def test_ancestral_sampling_with_learned_variance(spiral, equal, respacing):
    from diffusers import DDPMScheduler

    diffusion, x, y = create_diffusion(respacing), random(2, 4, LATENT, LATENT), torch.tensor([1, 7])
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    ours = diffusion.p_sample_loop(
        spiral, x.shape, x, clip_denoised=False, model_kwargs={"y": y},
        noise_sampler=lambda like: torch.randn(like.shape, generator=draws[0]),
    )  # fmt: skip
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(timesteps=diffusion.timestep_map[::-1])
    theirs = stepwise(spiral, scheduler, x, y, 8, draws[1])
    equal(f"DDPM with learned variance, respacing {respacing}: `DDPMScheduler`", "diffusers", ours, theirs, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim(spiral, equal, eta):
    from diffusers import DDIMScheduler

    diffusion, x, y = create_diffusion("ddim50"), random(2, 4, LATENT, LATENT), torch.tensor([1, 7])
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    ours = diffusion.ddim_sample_loop(
        spiral, x.shape, x, clip_denoised=False, model_kwargs={"y": y}, eta=eta,
        noise_sampler=lambda like: torch.randn(like.shape, generator=draws[0]),
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_end=0.02, beta_start=0.0001, clip_sample=False)
    scheduler.set_timesteps(50)
    theirs = stepwise(spiral, scheduler, x, y, 4, draws[1], eta=eta)
    equal(f"DDIM, η = {eta:g}, respacing ddim50: `DDIMScheduler`", "diffusers", ours, theirs, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_dpm_solver(spiral, equal, steps):
    k_sampling, k_external = (other(f"k_diffusion.{name}", "k_diffusion") for name in ("sampling", "external"))
    x, y, process = random(2, 4, LATENT, LATENT), torch.tensor([1, 7]), OBJECTIVES["eps"]
    states = list(process.sample(spiral, x, y, "dpm++", steps, None, learn_sigma=True))
    timesteps, ours = torch.tensor([float(t) for t, _ in states[:-1]]), states[-1][1]
    wrapped = k_external.OpenAIDenoiser(spiral, process.diffusion, quantize=True)
    sigmas = k_sampling.append_zero(wrapped.t_to_sigma(timesteps))
    start = x * (1 + sigmas[0] ** 2).sqrt()  # it scales latents by 1 / sqrt(alphas_cumprod)
    theirs = k_sampling.sample_dpmpp_2m(wrapped, start, sigmas, extra_args={"y": y}, disable=True)
    equal(f"DPM-Solver++ (2M), {steps} steps: `sample_dpmpp_2m`", "k-diffusion", ours, theirs, 1e-4)


@torch.no_grad()
def test_images_of_a_pipeline(sincos, equal, vae_folder):
    """From noise to pixels, with guidance on every channel."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    model, transformer = sincos
    scheduler = DDIMScheduler(beta_end=0.02, beta_start=0.0001, clip_sample=False)
    pipeline = DiTPipeline(with_numbers(transformer), AutoencoderKL.from_pretrained(vae_folder), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline([5, 980], 3.0, generator=generator, num_inference_steps=25, output_type="np").images
    config = sampling.SamplingConfig(sampler="ddim", cfg_scale=3.0, cfg_channels="all")
    predict, y = sampling.guided(model, config), torch.tensor([5, 980])
    latents = create_diffusion("ddim25").ddim_sample_loop(
        predict, (2, 4, LATENT, LATENT), random(2, 4, LATENT, LATENT, seed=3), False, {"y": y}
    )
    vae = AutoencoderKL.from_pretrained(vae_folder)
    ours = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    equal("Images with guidance, 25 steps: `DiTPipeline`", "diffusers", ours, theirs, 1e-4)
    pixels = VAE(str(vae_folder), torch.device("cpu")).decode(latents).numpy()
    equal("The same as whole grey levels", "diffusers", pixels, np.round(theirs * 255), 1 / 254)


# Training


LUCIDRAINS = "denoising-diffusion-pytorch"


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Labelled(torch.nn.Module):
    """A model as denoising-diffusion-pytorch calls it, which knows no labels."""

    channels, out_dim, self_condition = 4, 8, False

    def __init__(self, model: DiT):
        super().__init__()
        self.model, self.y = model, None

    def forward(self, x, t):
        return self.model(x, t, self.y)


def learned_diffusion(model: DiT):
    """denoising-diffusion-pytorch's process with DiT's settings: the variational term counts in full."""
    module = other("denoising_diffusion_pytorch.learned_gaussian_diffusion", "denoising_diffusion_pytorch")
    process = module.LearnedGaussianDiffusion(
        Labelled(model), vb_loss_weight=1.0, image_size=LATENT, objective="pred_noise", beta_schedule="linear"
    )
    # The posterior's variance is 0 at t = 0. It takes log 1e-20 there; ADM and DiT take that of t = 1.
    process.posterior_log_variance_clipped[0] = process.posterior_log_variance_clipped[1]
    return process


def test_training_loss_and_its_gradient(spiral, equal):
    process, t = learned_diffusion(copy.deepcopy(spiral)), torch.tensor([0, 1, 2, 30, 500, 999])
    process.model.y = y = torch.tensor([0, 1, 2, 3, 4, 9])
    x, noise = (random(6, 4, LATENT, LATENT, seed=seed) for seed in range(2))
    theirs = process.p_losses(x, t, noise, loss_reduction="none")
    ours = OBJECTIVES["eps"].diffusion.training_losses(spiral, x, t, {"y": y}, noise)["loss"]
    shares = (ours / theirs).detach()
    equal("Training loss at t = 0, 1, 2, 30, 500, 999: `p_losses`", LUCIDRAINS, shares, torch.ones(6), 1e-5)
    ours.mean().backward()
    theirs.mean().backward()
    gradients = [flat(parameter.grad for parameter in model.parameters()) for model in (spiral, process.model.model)]
    equal("Gradient of their mean", LUCIDRAINS, *gradients, 1e-5)


def test_training_steps(fill_weights, equal):
    """Weights and their average after 20 steps: loss by denoising-diffusion-pytorch, average by diffusers."""
    from diffusers.training_utils import EMAModel

    recipe = Recipe(global_batch_size=4, lr=1e-3, weight_decay=0.01, grad_clip=1.0, ema_decay=0.9)
    model = fill_weights(SPIRAL.build())
    theirs = copy.deepcopy(model).train()
    trainer = training.Trainer(model, recipe, 20, lambda inputs: inputs, torch.device("cpu"))
    process = learned_diffusion(theirs)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, foreach=False)
    average = EMAModel(theirs.parameters(), decay=0.9, min_decay=0.9, update_after_step=-1)
    for step in range(20):
        x, y = random(4, 4, LATENT, LATENT, seed=step), torch.tensor([0, 3, 6, 9])
        trainer.train_step([(x, y)])
        distributed.seed_step(recipe.global_seed, step, 0)
        t, noise = torch.randint(1000, (4,)), torch.randn(4, 4, LATENT, LATENT)
        process.model.y = y
        optimizer.zero_grad()
        process.p_losses(x, t, noise).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), recipe.grad_clip)
        optimizer.step()
        average.step(theirs.parameters())
    ours = [flat(kept.parameters()) for kept in (trainer.model, trainer.ema)]
    equal("Weights after 20 steps of training", LUCIDRAINS, ours[0], flat(theirs.parameters()), 1e-4)
    equal("Their average (EMA) then: `EMAModel`", "diffusers", ours[1], flat(average.shadow_params), 1e-4)


# Metrics


SHOWN = {"fid": "FID", "kid": "KID", "inception_score": "Inception Score"}


@pytest.fixture(scope="session")
def measured(tmp_path_factory, inception_file):
    """Two sets of 48 images of 299 x 299, at which nobody resizes, what evaluate.py measures of them, and features."""
    folder, sets = tmp_path_factory.mktemp("parity"), {}
    for name, seed in (("samples", 1), ("reference", 4)):
        images = [Image.fromarray(image) for image in test_evaluate.make_images(IMAGES, seed)]
        images = [image.resize((299, 299), Image.BICUBIC) for image in images]
        (folder / name).mkdir()
        for index, image in enumerate(images):
            image.save(folder / name / f"{index:02d}.png")
        sets[name] = np.stack([np.asarray(image) for image in images])
        np.savez(folder / f"{name}.npz", arr_0=sets[name])
    options = {"samples": folder / "samples.npz", "reference": folder / "reference.npz"}
    options |= {"inception_weights": inception_file, "kid_subsets": 1, "kid_subset_size": IMAGES, "cache_dir": folder}
    return folder, *metrics_and_features(options)


def test_torch_fidelitys_command(measured, equal, inception_file, monkeypatch, capsys):
    from torch_fidelity import fidelity

    folder, ours, _ = measured
    options = {"input1": folder / "samples", "input2": folder / "reference", "isc": True, "fid": True, "kid": True}
    options |= {"prc": True, "feature_extractor": "inception-v3-compat", "cpu": True, "json": True, "silent": True}
    options |= {"feature_extractor_weights_path": inception_file, "no_cache": True, "save_cpu_ram": True}
    options |= {"kid_subsets": 1, "kid_subset_size": IMAGES}
    monkeypatch.setattr(sys, "argv", ["fidelity", *command_line(options)])
    capsys.readouterr()
    fidelity.main()
    theirs = json.loads(capsys.readouterr().out)
    names = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean"}
    names |= {"inception_score": "inception_score_mean", "precision": "precision", "recall": "recall"}
    for name, key in names.items():
        equal(f"{SHOWN.get(name, name)}: its command `fidelity`", "torch_fidelity", ours[name], theirs[key], 1e-6)


@pytest.fixture
def random_inception(monkeypatch, inception_file):
    """Gives the network of pytorch-fid, or clean-fid's copy of it, the random weights."""

    def give(module):
        monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: torch.load(inception_file))

    return give


def test_pytorch_fid(measured, equal, random_inception):
    score, network = other("pytorch_fid.fid_score"), other("pytorch_fid.inception")
    random_inception(network)
    folder, ours, features = measured
    files = [sorted((folder / name).glob("*.png")) for name in ("samples", "reference")]

    def activations(model) -> list[np.ndarray]:
        return [score.get_activations(paths, model, batch_size=16, num_workers=0) for paths in files]

    def distance(found: list[np.ndarray]) -> float:
        moments = [moment for values in found for moment in (values.mean(0), np.cov(values, rowvar=False))]
        return score.calculate_frechet_distance(*moments)

    # It maps grey levels to 2 x / 255 - 1; TensorFlow's network, and so torch-fidelity and ADM, to (x - 128) / 128.
    same = network.InceptionV3([3], normalize_input=False)
    same.register_forward_pre_hook(lambda _, inputs: (inputs[0] * (255 / 128) - 1,))
    found = activations(same)
    equal("Features of Inception-v3", "pytorch-fid", features["samples"]["pool"], found[0], 1e-5)
    equal("FID: `calculate_frechet_distance`", "pytorch-fid", ours["fid"], distance(found), 1e-4)
    as_it_is = distance(activations(network.InceptionV3([3])))
    equal("FID with its own range of pixels", "pytorch-fid", ours["fid"], as_it_is, 0.1)


def test_distances_of_features_of_full_rank(equal):
    """Of more features than numbers in each, so that no method is at the limits of its arithmetic."""
    score, fid = other("pytorch_fid.fid_score"), other("cleanfid.fid")
    scale = torch.linspace(0.1, 2, 2048)
    samples, reference = (random(3000, 2048, seed=seed) * scale.roll(100 * seed) + 0.05 * seed for seed in range(2))
    first, second = map(evaluate.statistics, (samples, reference))
    theirs = score.calculate_frechet_distance(first["mu"], first["sigma"], second["mu"], second["sigma"])
    ours = evaluate.frechet_distance(first, second)
    equal("Fréchet distance of 3,000 × 2,048 features", "pytorch-fid", ours, theirs, 1e-8)
    arguments = types.SimpleNamespace(metrics=["kid"], kid_subsets=1, kid_subset_size=3000)
    features = [{"pool": values} for values in (samples, reference)]
    ours = evaluate.compute(arguments, *features, {}, torch.device("cpu"))["kid"]
    theirs = fid.kernel_distance(samples.double().numpy(), reference.double().numpy(), 1, 3000)
    equal("KID of them, one subset of all: `kernel_distance`", "clean-fid", ours, theirs, 1e-4)


def test_clean_fid(measured, equal, random_inception):
    fid = other("cleanfid.fid")
    random_inception(other("cleanfid.inception_pytorch"))
    folder, ours, _ = measured
    options = dict(mode="legacy_pytorch", num_workers=0, batch_size=16, device=torch.device("cpu"), verbose=False)
    folders = [str(folder / name) for name in ("samples", "reference")]
    same = {"custom_image_tranform": lambda x: x * (255 / 256)}  # 2 x / 255 - 1 is then (x - 128) / 128
    found = fid.compute_fid(*folders, **options, **same, use_dataparallel=False)
    equal("FID: `compute_fid`", "clean-fid", ours["fid"], found, 1e-4)


def test_precision_and_recall(measured, equal):
    prdc = other("prdc")
    _, ours, features = measured
    pools = [features[name]["pool"].numpy() for name in ("reference", "samples")]
    theirs = prdc.compute_prdc(*pools, nearest_k=evaluate.NEIGHBOURS)
    for name in ("precision", "recall"):
        equal(f"{name}: `compute_prdc`", "prdc", ours[name], theirs[name], 1e-6)
        assert 0 < ours[name] < 1


def test_inception_score(measured, equal, monkeypatch):
    metric = other("torchmetrics.image.inception").InceptionScore(feature=torch.nn.Identity(), splits=1)
    _, ours, features = measured
    logits = features["samples"]["logits"]
    metric.update(logits)
    monkeypatch.setattr(evaluate, "IS_SPLITS", 1)  # torchmetrics shuffles by another generator
    arguments = types.SimpleNamespace(metrics=["is"])
    found = evaluate.compute(arguments, {"logits": logits}, {}, {}, torch.device("cpu"))
    equal("Inception Score, one part", "torchmetrics", found["inception_score"], metric.compute()[0], 1e-5)
    assert ours["inception_score"] > 1.01
