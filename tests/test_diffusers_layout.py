"""DiT in diffusers' layout: tensors unchanged but for their names, outputs compared with diffusers' own model."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from test_checkpoint import rejection

from runtime.pretrained import load_trained, weights_sha256

pytestmark = pytest.mark.usefixtures("tiny_commands")
SETTINGS = dict(num_attention_heads=2, attention_head_dim=32, num_layers=2, in_channels=4, out_channels=8)
SETTINGS |= dict(sample_size=8, patch_size=2, num_embeds_ada_norm=5, norm_type="ada_norm_zero")
EMB, KINDS = "norm1.emb.", ("weight", "bias")


@pytest.fixture
def theirs():
    """Diffusers' model of the size of our DiT-XS, with one embedder for all blocks, as its conversion of DiT has it."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**SETTINGS).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


@pytest.fixture
def folder(theirs, tmp_path):
    """A pipeline's folder, of which the transformer alone is there."""
    theirs.save_pretrained(tmp_path / "DiT-XS" / "transformer")
    return tmp_path / "DiT-XS"


def test_every_tensor_is_that_of_the_file(folder):
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = load_trained(folder)
    ours, config = trained.model.state_dict(), trained.config
    assert (config.model.model, config.model.input_size, config.model.num_classes) == ("DiT-XS/2", (8, 8), 5)
    assert (trained.image_size, config.model.rope, trained.label) == ((64, 64), None, "DiT-XS")
    left = dict(stored)
    for outside, name in {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }.items():
        for kind in ("weight", "bias"):
            assert torch.equal(ours.pop(f"{name}.{kind}"), left.pop(f"{outside}.{kind}"))
    embedders = {"timestep_embedder.linear_1": "mlp.0", "timestep_embedder.linear_2": "mlp.2"}
    names = {f"{EMB}{key}.{kind}": f"t_embedder.{name}.{kind}" for key, name in embedders.items() for kind in KINDS}
    names[f"{EMB}class_embedder.embedding_table.weight"] = "y_embedder.embedding_table.weight"
    for theirs, name in names.items():
        assert torch.equal(ours[name], left.pop(f"transformer_blocks.0.{theirs}"))
        assert torch.equal(ours.pop(name), left.pop(f"transformer_blocks.1.{theirs}"))
    inside = {"norm1.linear": "adaLN_modulation.1", "attn1.to_out.0": "attn.proj"}
    inside |= {"ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2"}
    for block in ("0", "1"):
        for kind in KINDS:
            for theirs, name in inside.items():
                value = left.pop(f"transformer_blocks.{block}.{theirs}.{kind}")
                assert torch.equal(ours.pop(f"blocks.{block}.{name}.{kind}"), value)
            qkv = [left.pop(f"transformer_blocks.{block}.attn1.to_{part}.{kind}") for part in "qkv"]
            assert torch.equal(ours.pop(f"blocks.{block}.attn.qkv.{kind}"), torch.cat(qkv))
    assert left == {} and ours.keys() == {"pos_embed"}


def test_outputs_are_those_of_diffusers_but_for_the_frequencies_of_timesteps(theirs, folder):
    ours = load_trained(folder).model
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 4, 5])  # 5 is the null class
    out = ours(x, t, y)
    assert out.std() > 0.1 and (theirs(x, t, y).sample - out).abs().max() > 1e-3
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    torch.testing.assert_close(out, theirs(x, t, y).sample, atol=1e-5, rtol=0)


def test_older_files_and_the_inner_folder_load_too(theirs, folder):
    """Before diffusers 0.30 the class was another, and weights a pickle."""
    inner, expected = folder / "transformer", load_trained(folder).sha256
    torch.save(theirs.state_dict(), inner / "diffusion_pytorch_model.bin")
    (inner / "diffusion_pytorch_model.safetensors").unlink()
    config = json.loads((inner / "config.json").read_text()) | {"_class_name": "Transformer2DModel"}
    (inner / "config.json").write_text(json.dumps(config))
    for path in (folder, inner):
        found = load_trained(path)
        assert (found.sha256, found.label) == (expected, "DiT-XS") and weights_sha256(found) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "UNet2DConditionModel"},
            "it is of a UNet2DConditionModel; expected DiTTransformer2DModel or ",
        ),
        ({"_class_name": "PixArtTransformer2DModel"}, "it is of a PixArtTransformer2DModel; expected "),
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'; DiT has 'ada_norm_zero'"),
        ({"attention_bias": None}, "attention_bias is None; DiT has True"),
        ({"num_layers": 10**9}, "depth is 1000000000; expected a whole number from 1 to 512"),
        ({"num_attention_heads": "two"}, "num_attention_heads is 'two'; expected a whole number"),
        ({"num_attention_heads": 4, "attention_head_dim": 16}, "hidden_size 64, depth 2, patch_size 2, num_heads 4"),
        ({"num_embeds_ada_norm": -1}, "num_classes is -1; expected a whole number from 1 to 10000000"),
    ],
    ids=str,
)
def test_another_kind_of_model_is_refused(change, message, folder):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    start = f"checkpoint {str(folder / 'transformer')!r} is no DiT by its config.json ({message}"
    assert rejection(folder).startswith(start)


def test_other_weights_are_refused(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = {name: value.clone() for name, value in load_file(path).items()}  # the file is about to change
    query = "transformer_blocks.1.attn1.to_q.weight"
    bias = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    no_dit = f"checkpoint {str(path)!r} is no DiT in diffusers' layout ("
    for change, message in (
        ({bias: whole[bias] + 1}, f"{no_dit}ValueError: {bias} differs from that of another block, where DiT has one"),
        ({query: None}, f"{no_dit}KeyError: 'q')"),
        ({query: torch.zeros(3)}, no_dit),
        ({"pos_embed.pos_embed": torch.zeros(1, 16, 64)}, f"{no_dit}ValueError: pos_embed.pos_embed is not the sin"),
        ({"proj_out_1.bias": None}, f"checkpoint {str(path.parent)!r} lacks 1 weights, such as final_layer.adaLN_mod"),
        ({"more.weight": whole[query]}, f"checkpoint {str(path.parent)!r} has 1 unknown weights, such as more.weight"),
        ({"transformer_blocks.1.attn2.to_q.weight": whole[query]}, f"checkpoint {str(path.parent)!r} has 1 unknown"),
    ):
        changed = {name: value.clone() for name, value in (whole | change).items() if value is not None}
        save_file(changed, path)
        assert rejection(folder).startswith(message)
    path.unlink()
    assert rejection(folder).startswith(
        f"checkpoint {str(path.parent)!r} has no diffusion_pytorch_model.safetensors or"
    )
