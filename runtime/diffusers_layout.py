"""DiT as diffusers stores it, such as facebook/DiT-XL-2-256: its config.json and its names of weights, made ours.

Values are left as they are. Diffusers' own DiTTransformer2DModel would not compute the same from them: its timestep
features have frequencies 10000^(-i/127) where DiT was trained with 10000^(-i/128) (downscale_freq_shift=1, written
into its CombinedTimestepLabelEmbeddings).
"""

import re

import torch
from torch import Tensor

from models import sincos_table
from runtime.config import ModelConfig

KINDS = ("DiTTransformer2DModel", "Transformer2DModel")  # the second one in files of diffusers before 0.30
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# What DiT has, of settings that other models of the same class have otherwise.
FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
OUTSIDE = {  # of blocks
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
IN_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
IN_EVERY_BLOCK = {  # diffusers keeps a copy of both embedders in each
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}


def arguments(config: dict) -> dict:
    """The arguments of DiT that a config.json stands for. Raises KeyError or ValueError for other models."""
    if config["_class_name"] not in KINDS:
        raise ValueError(f"it is of a {config['_class_name']}; expected {' or '.join(KINDS)}")
    for name, value in FIXED.items():
        if config.get(name) != value:
            raise ValueError(f"{name} is {config.get(name)!r}; DiT has {value!r}")
    for name in ("num_attention_heads", "attention_head_dim", "in_channels"):
        if type(config.get(name)) is not int:
            raise ValueError(f"{name} is {config.get(name)!r}; expected a whole number")
    heads, channels = config["num_attention_heads"], config["in_channels"]
    return {
        "input_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "in_channels": channels,
        "hidden_size": heads * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": heads,
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": config.get("out_channels") == 2 * channels,
    }


def renamed(tensors: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The weights by our names, beside the table of positions, which diffusers computes and mostly does not store.

    What has another name than diffusers gives it is kept under it. Raises KeyError where a query, key or value is
    alone, ValueError where the copies of an embedder differ from block to block.
    """
    found = {"pos_embed": sincos_table(model.hidden_size, *model.grid)[None]}
    projections: dict[tuple[str, str], dict[str, Tensor]] = {}  # block and "weight" or "bias" to q, k and v
    for name, value in tensors.items():
        stem, kind = name.rsplit(".", 1) if "." in name else (name, "")
        block, inner = re.fullmatch(r"(?:transformer_blocks\.(\d+)\.)?(.*)", stem).groups()
        if block is None:
            found[f"{OUTSIDE.get(stem, stem)}.{kind}" if kind else name] = value
        elif inner in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            projections.setdefault((block, kind), {})[inner[-1]] = value
        elif inner in IN_EVERY_BLOCK:
            ours = f"{IN_EVERY_BLOCK[inner]}.{kind}"
            if ours in found and not torch.equal(found[ours], value):
                raise ValueError(f"{name} differs from that of another block, where DiT has one for all")
            found[ours] = value
        else:
            found[f"blocks.{block}.{IN_BLOCK.get(inner, inner)}.{kind}"] = value
    for (block, kind), parts in projections.items():
        found[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([parts[part] for part in "qkv"])
    stored = found.pop("pos_embed.pos_embed", found["pos_embed"])
    if stored.shape != found["pos_embed"].shape or not torch.allclose(stored.float(), found["pos_embed"], atol=1e-3):
        raise ValueError("pos_embed.pos_embed is not the sin-cos table of DiT")
    return found
