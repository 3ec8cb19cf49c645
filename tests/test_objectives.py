"""Objectives: DiT's own in its parts, and what docs/extending.md prints, trained, validated and sampled."""

import json

import numpy as np
import pytest
import torch

import sample_ddp
import train
from diffusion import create_diffusion
from diffusion.objectives import OBJECTIVES
from runtime import pretrained, sampling
from runtime.config import ModelConfig, RunConfig
from runtime.sampling import SamplingConfig


@pytest.fixture
def page(run_page):
    """The names that the Python blocks of a section of docs/extending.md define: page("A new objective")."""
    before = dict(OBJECTIVES)
    yield lambda title: run_page("extending.md", title)
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


def test_noise_prediction_is_the_diffusion_process():
    """The loss bit for bit with the same draws, and its part that validation reports: the noise MSE."""
    objective, diffusion = OBJECTIVES["eps"], create_diffusion(None)
    x, y = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(4)

    def predict(x, t, y):
        scale = torch.stack([t / 1000 + y, 0.3 * y], 1).repeat_interleave(2, 1)[..., None, None]
        return torch.cat([x, x.tanh()], 1) * scale

    torch.manual_seed(0)
    found = objective.loss(predict, x, y)
    torch.manual_seed(0)
    t, noise = torch.randint(1000, (4,)), torch.randn_like(x)
    expected = diffusion.training_losses(predict, x, t, {"y": y}, noise)
    assert torch.equal(found, expected["loss"]) and (expected["vb"] > 0).all()
    output = predict(objective.noised(x, t, noise), t, y)
    assert torch.equal(objective.validation_loss(output.double(), x, t, noise), expected["mse"])


def test_a_new_objective_is_one_object(page, train_arguments, sample_arguments, refused, tiny_commands, tmp_path):
    velocity = page("A new objective")["OBJECTIVES"]["velocity"]
    options = dict(objective="velocity", max_steps=2, ckpt_every=2, sample_every=2, val_fraction=0.25)
    train.main(train_arguments(tmp_path / "run", **options))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and 0 < last["val_loss"] < 10 and (tmp_path / "run" / "samples" / "0000002.png").exists()
    found = pretrained.load_trained(tmp_path / "run")
    assert (found.config.objective, found.config.model.learn_sigma) == ("velocity", False)

    settings = dict(ckpt=tmp_path / "run", num_fid_samples=2)
    message = refused(sample_ddp.main, sample_arguments(tmp_path / "samples", **settings))
    assert message == "--sampler ddpm does not fit a model trained with --objective velocity; expected one of euler"
    sample_ddp.main(sample_arguments(tmp_path / "samples", sampler="euler", **settings))
    (npz,) = (tmp_path / "samples").glob("*.npz")
    with np.load(npz) as archive:
        assert archive["arr_0"].std() > 0
    # Its flow takes noise to data: where the data is one point, every step points at it.
    start, goal = torch.randn(3, 1, 2, 2), torch.full((3, 1, 2, 2), 0.7)
    *_, (_, x) = velocity.sample(
        lambda x, t, y: (x - goal) / (t / 1000).view(-1, 1, 1, 1), start, None, "euler", 5, None, False
    )
    torch.testing.assert_close(x, goal, atol=1e-5, rtol=0)


def test_samplers_that_do_not_fit_are_refused_by_name(page, run, sample_arguments, refused, tiny_commands, tmp_path):
    for sampler in OBJECTIVES["eps"].samplers:
        sampling.check_sampler(SamplingConfig(sampler=sampler), RunConfig(ModelConfig(), (256, 256)))
    page("A new objective")
    assert refused(sample_ddp.main, sample_arguments(tmp_path / "samples", sampler="euler")) == (
        "--sampler euler does not fit a model trained with --objective eps; expected one of ddpm, ddim, dpm++"
    )
    assert not (tmp_path / "samples").exists()
