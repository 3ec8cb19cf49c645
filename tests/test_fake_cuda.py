"""Device mistakes that only a GPU would show, caught on fake CUDA tensors, which carry a device but no data.

Forward passes only: a backward pass needs a real device.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import models
from diffusion import create_diffusion
from diffusion.gaussian_diffusion import GaussianDiffusion
from models import DiT, LabelEmbedder, TimestepEmbedder
from rope import RopeConfig, SpiralRoPE


def failure() -> str | None:
    """Why fake CUDA tensors cannot be made here: before 2.14, PyTorch asked the driver for them."""
    try:
        with FakeTensorMode():
            torch.ones(1).cuda()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]


pytestmark = pytest.mark.skipif(
    torch.__version__ < (2, 14) and failure() is not None,
    reason=f"torch {torch.__version__} makes no fake CUDA tensors without a driver",
)
TINY = dict(input_size=8, hidden_size=128, depth=2, num_heads=2, num_classes=10)


@pytest.fixture(autouse=True)
def fake_tensors():
    with FakeTensorMode():
        yield


def build(rope):
    with torch.device("cuda"):  # of the model alone: what runs later must choose its device itself
        return DiT(**TINY, rope=rope)


def training_loss(model):
    x, t, y = (torch.ones(2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 9]))
    losses = create_diffusion("").training_losses(model.train(), x.cuda(), t.cuda(), {"y": y.cuda()})
    return losses["loss"] + losses["mse"] + losses["vb"]


def guidance(model):
    x, t, y = (torch.ones(2, 4, 8, 12), torch.tensor([0, 999]), torch.tensor([0, 9]))
    if model.rope_embedder is None:
        x = x[..., :8]
    return model.eval().forward_with_cfg(x.cuda(), t.cuda(), y.cuda(), 1.5)


def ancestral_sampling(model):
    kwargs = dict(y=torch.tensor([0, 9]).cuda(), cfg_scale=1.5)
    return create_diffusion("3").p_sample_loop(model.eval().forward_with_cfg, (2, 4, 8, 8), model_kwargs=kwargs)


def ddim_sampling(model):
    kwargs, noise = dict(y=torch.tensor([0, 9]).cuda()), torch.ones(2, 4, 8, 8).cuda()
    return create_diffusion("ddim5").ddim_sample_loop(model.eval(), noise.shape, noise, model_kwargs=kwargs, eta=0.5)


PATHS = [training_loss, guidance, ancestral_sampling, ddim_sampling]


@pytest.mark.parametrize("rope", [None, RopeConfig(rotate=0), RopeConfig(rotate=4, border="exact")], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_everything_stays_on_the_gpu(path, rope):
    assert path(build(rope)).device.type == "cuda"


PIECES = [
    (SpiralRoPE, "forward"),
    (TimestepEmbedder, "forward"),
    (LabelEmbedder, "forward"),
    (models, "rotate"),
    (GaussianDiffusion, "_at"),  # tables of the process, which guidance does not read
]


@pytest.mark.parametrize(
    "path, piece", [(path, piece) for path in PATHS for piece in PIECES[: 4 if path is guidance else 5]]
)
def test_tensor_made_on_the_cpu_is_noticed(path, piece, monkeypatch):
    """What the test above stands on: one CPU tensor in the path, as from a factory call without device, is an error."""
    owner, name = piece
    model = build(RopeConfig(rotate=4))
    original = getattr(owner, name)

    def on_cpu(*args, **kwargs):
        result = original(*args, **kwargs)
        return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()

    path(model)
    monkeypatch.setattr(owner, name, on_cpu)
    with pytest.raises(RuntimeError, match="two different devices|on cpu|same device"):
        path(model)
