"""What docs/use_in_your_model.md prints: rope.py in other models."""

import ast
import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import TESTS
from diffusers.models.attention_processor import AttnProcessor2_0
from test_rope import spread_over_positions
from timm.layers import apply_rot_embed_cat

from rope import rotate

PAGE = "use_in_your_model.md"


@pytest.fixture
def attended(monkeypatch):
    """Queries and keys of every attention until now, each (B, heads, N, D)."""
    seen, original = [], F.scaled_dot_product_attention

    def record(q, k, v, *args, **kwargs):
        seen.append((q.detach(), k.detach()))
        return original(q, k, v, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return seen


def tiled(patch_size: int, channels: int, h: int, w: int) -> torch.Tensor:
    """An image of h x w patches that are all alike, so that position is all that tells their queries apart."""
    patch = torch.randn(1, channels, patch_size, patch_size, generator=torch.Generator().manual_seed(0))
    return patch.repeat(1, 1, h, w)


def check_positions(q, k, prefix: int, h: int, w: int) -> None:
    """Products of patches depend on their offset and on nothing else; prefix tokens see all patches alike."""
    assert q.shape[2] == prefix + h * w
    q, k = q[0].double(), k[0].double()
    product = q @ k.transpose(1, 2)  # (heads, N, N)
    for head in product:
        patches = head[prefix:, prefix:]
        assert spread_over_positions(patches, h, w) < 1e-5 * patches.std()
    if prefix:
        q, k = q[:, prefix:], k[:, prefix:]
        assert (q - q[:, :1]).abs().max() > 0.1 * q.abs().max() and (k - k[:, :1]).abs().max() > 0.1 * k.abs().max()


def test_rope_needs_torch_alone():
    tree = ast.parse((TESTS.parent / "rope.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name for node in imports for name in [getattr(node, "module", None) or node.names[0].name]}
    assert {module.split(".")[0] for module in modules} - sys.stdlib_module_names == {"torch"}


def test_first_example_runs(run_page):
    names = run_page(PAGE, "Spiral RoPE in your own model")
    assert names["q"].shape == (2, 196, 6, 64) and names["cos"].shape == (196, 32)


def test_timm_vision_transformer(run_page, attended):
    names = run_page(PAGE, "A Vision Transformer of timm")
    model = names["model"].eval()
    for h, w in ((14, 14), (9, 20)):
        attended.clear()
        model(tiled(16, 3, h, w))
        assert len(attended) == len(model.blocks)
        check_positions(*attended[0], 1, h, w)
    assert [name for name in model.state_dict() if "rope" in name] == ["rope.freqs"]
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = model(image)
    assert not torch.allclose(model(image.flip(3)), expected, atol=1e-4)
    assert torch.equal(copy.deepcopy(model)(image), expected)  # as an average of the weights is made


def test_timm_models_with_rope(run_page, attended):
    names = run_page(PAGE, "timm's models with RoPE")
    model = names["model"].eval()
    for h, w in ((16, 16), (9, 20)):
        attended.clear()
        model(tiled(16, 3, h, w))
        check_positions(*attended[0], model.num_prefix_tokens, h, w)
    values = torch.randn(2, 8, 9 * 20, 64, generator=torch.Generator().manual_seed(0))
    for x in (values, values.bfloat16()):
        timms = apply_rot_embed_cat(x, model.rope.get_embed((9, 20))).type_as(x)
        assert torch.equal(timms, rotate(x.transpose(1, 2), *model.rope(9, 20)).transpose(1, 2))


def test_diffusers_processor(run_page, attended):
    model = run_page(PAGE, "A model of diffusers")["model"].eval()
    latents, t, y = tiled(2, 4, 16, 16), torch.tensor([500]), torch.tensor([3])
    with torch.no_grad():
        out = model(latents, timestep=t, class_labels=y).sample
        check_positions(*attended[0], 0, 16, 16)
        assert out.shape == (1, 4, 32, 32)
        # The processor is diffusers' own attention where nothing is rotated.
        attention = model.transformer_blocks[0].attn1
        x = torch.randn(2, 256, 384, generator=torch.Generator().manual_seed(0))
        attention.processor.tables = torch.ones(256, 32), torch.zeros(256, 32)
        unrotated = attention(x)
        attention.set_processor(AttnProcessor2_0())
        torch.testing.assert_close(unrotated, attention(x), atol=1e-6, rtol=0)
