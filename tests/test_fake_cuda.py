"""Device mistakes that only a GPU would show, caught on fake CUDA tensors, which carry a device but no data.

A backward pass needs a real device; where a whole command runs, zeros stand in for the gradients.
"""

import json

import pytest
import torch
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import benchmark
import models
from diffusion import create_diffusion
from diffusion.gaussian_diffusion import GaussianDiffusion
from models import DiT, LabelEmbedder, TimestepEmbedder
from rope import RopeConfig, SpiralRoPE
from runtime import checkpoint, vae


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


aten = torch.ops.aten


class FakeTensors(FakeTensorMode):
    """Whoever reads a value, to check it or to print it, gets a one. Notes where matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def dispatch(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        if func.overloadpacket in (aten.mm, aten.addmm, aten.convolution):
            self.devices.add(args[0].device.type)
        return super().dispatch(func, types, args, kwargs)

    def __deepcopy__(self, memo):  # of a model, for its average
        return self


@pytest.fixture(autouse=True)
def fake_tensors():
    with FakeTensors() as mode:
        yield mode


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


@pytest.fixture
def fake_gpu(fake_tensors, monkeypatch):
    """A GPU as far as a command sees it: asked about itself, moved to, waited for, written from."""
    answers = dict(is_available=True, device_count=1, get_device_capability=(9, 0), get_device_name="none")
    answers |= dict(is_bf16_supported=True, set_device=None, synchronize=None)
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    event = type("Event", (), dict(record=lambda self: None, query=lambda self: True))
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0)  # no real numbers behind fake ones
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: [row.tolist() for row in x] if x.ndim else x.item())
    monkeypatch.setattr(checkpoint, "_room_for", lambda tensors: [torch.empty_like(x, device="cpu") for x in tensors])
    for module in (benchmark, checkpoint):
        monkeypatch.setattr(module, "save", lambda path, state: path.touch())


def to(module, device):
    """As nn.Module.to, which cannot give fake parameters other data."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(weight.detach().to(device), weight.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device))
    return module


def backward(loss):
    """Leaves a gradient with every parameter that the loss depends on, as a backward pass does."""
    nodes, seen = [loss.grad_fn], {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                node.variable.grad = torch.zeros_like(node.variable)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_every_part_of_the_benchmark_runs_on_the_gpu(fake_tensors, fake_gpu, monkeypatch, tmp_path, capsys):
    """All but compilation and DPM-Solver++, whose scheduler computes its timesteps with NumPy."""
    from diffusers import AutoencoderKL

    monkeypatch.setitem(models.SIZES["XS"], "depth", 1)
    monkeypatch.setitem(benchmark.SIZES, "samplers", [None, {"ddpm": 2, "ddim": 2}])
    monkeypatch.setattr(vae, "tensor_hash", lambda _: "")

    def save(model, _):  # what is saved is what is loaded
        monkeypatch.setattr(vae, "_load", lambda _: model)

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", save)

    def once(calls, rounds, device):
        return [dict.fromkeys(("median", "low", "high"), 1000 * benchmark.timed(call, device)) for call in calls]

    monkeypatch.setattr(benchmark, "alternate", once)
    benchmark.main(["--quick", "--device", "cuda", "--out", str(tmp_path / "out.json")])
    parts, printed = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
    assert list(parts) == list(benchmark.PARTS)
    assert fake_tensors.devices == {"cuda", "meta"}  # meta: operations are counted there
    for part in parts.values():
        assert part["machine"].startswith("cuda: none; ") and benchmark.describe(part) in printed
    assert {row["precision"] for row in parts["precision"]["rows"]} == {"fp32", "bf16"}
    assert [row["operation"] for row in parts["peak"]["rows"][:2]] == ["product, 4,096", "product, 8,192"]
