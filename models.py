"""DiT, the class-conditional diffusion transformer with adaLN-Zero, and its sizes.

Source: Scalable Diffusion Models with Transformers, arXiv 2212.09748. The position encoding is either the fixed
sin-cos table of that paper, added to the tokens, or Spiral RoPE, rotating queries and keys of every block.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hub_model import HubModel, check_settings
from rope import RopeConfig, SpiralRoPE, rotate

LONGEST_WRITTEN_OUT = 256  # tokens, up to which training may keep the attention matrix of every head


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale tokens (B, N, D) by vectors (B, D) that the condition gives."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Timesteps (N,) to vectors (N, D): 256 sinusoidal features, cosines first, then a two-layer MLP."""

    def __init__(self, hidden_size: int, frequency_size: int = 256):
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequency_size // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        phases = t[:, None].float() * freqs  # (N, 128)
        features = torch.cat([phases.cos(), phases.sin()], dim=-1)  # (N, 256)
        return self.mlp(features.to(self.mlp[0].weight.dtype))  # (N, D)


class LabelEmbedder(nn.Module):
    """Labels (N,) to vectors (N, D); in training a share dropout_prob of them becomes the null class."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)  # the last row is the null class
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, D) tokens; with cos and sin, queries and keys are rotated."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3 * self.num_heads, -1))  # (B, N, D) -> (B, N, 3H, D/H)
        if cos is None:
            q, k, v = qkv.chunk(3, dim=2)
        else:
            qk, v = qkv.split([2 * self.num_heads, self.num_heads], dim=2)
            q, k = rotate(qk, cos, sin).chunk(2, dim=2)
        x = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, H, N, D/H) -> (B, N, D)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over (B, H, N, D/H), for which no N x N matrix is kept."""
        return F.scaled_dot_product_attention(q, k, v)


def attend_written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same attention in matrix products, keeping an N x N matrix per head for the backward pass."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1) @ v


def mlp(dim: int, hidden: int) -> Mlp:
    """The feed-forward layer, with the tanh form of GELU that DiT uses."""
    return Mlp(dim, hidden, act_layer=lambda: nn.GELU(approximate="tanh"), drop=0)


def layer_norm(dim: int) -> nn.LayerNorm:
    """LayerNorm without parameters: adaLN supplies shift and scale."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero conditioning (arXiv 2212.09748, Figure 3)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = layer_norm(hidden_size)
        self.mlp = mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), cos, sin)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Tokens (B, N, D) to the pixels of each patch (B, N, patch*patch*channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module, HubModel):
    """Diffusion transformer over latents (N, C, H, W); its output is (N, 2C, H, W), or C with learn_sigma=False.

    input_size is the latent height and width, one number or (height, width), that positions refer to; latents
    of other sizes run too with RoPE. rope=None adds the fixed sin-cos table instead. Raises ValueError for settings out
    of range. HubModel gives it from_pretrained, save_pretrained and push_to_hub.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        rope: RopeConfig | None = None,
    ):
        check_settings(locals())
        super().__init__()
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.num_classes = num_classes
        self.grad_checkpointing = self.compiled = False
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.grid = (height // patch_size, width // patch_size)  # patches that positions refer to

        self.x_embedder = PatchEmbed(None, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.rope_embedder = None
        if rope is None:
            self.register_buffer("pos_embed", sincos_table(hidden_size, *self.grid)[None])  # (1, N, D)
        else:
            self.rope_embedder = SpiralRoPE(hidden_size // num_heads, self.grid, rope)
        self.blocks = nn.ModuleList([DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """adaLN-Zero (arXiv 2212.09748, section 3.2): every block starts as the identity and the output is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a patch embedding is a linear layer
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for layer in [*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]]:
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def compile_blocks(self) -> None:
        """Have the first call compile what all blocks share: once for training, once for inference.

        Each serves every number of rows from two on; a single row, which compilers treat apart, is compiled for itself.
        """
        self.compiled = True
        torch._dynamo.config.optimize_ddp = False  # would cut blocks where buckets of gradients end
        cpp = torch._inductor.config.cpp
        if cpp.vec_isa_ok is None and torch.backends.cpu.get_cpu_capability() == "AVX512":
            # Spares trials, seconds each, whether PyTorch was built with vector functions: it runs on them itself.
            cpp.vec_isa_ok = True
        for block in self.blocks:
            block.compile(fullgraph=True)

    def write_out_attention(self) -> None:
        """Attend in matrix products where sequences are short: faster than a CPU's attention kernels in bfloat16."""
        if math.prod(self.grid) <= LONGEST_WRITTEN_OUT:
            for block in self.blocks:
                block.attn.attend = attend_written_out

    def unpatchify(self, x: Tensor, h: int, w: int) -> Tensor:
        """Tokens (N, h*w, p*p*C) to images (N, C, h*p, w*p)."""
        p = self.patch_size
        x = x.unflatten(1, (h, w)).unflatten(3, (p, p, -1))  # (N, h, w, p, p, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise and variance: latents (N, C, H, W), timesteps (N,), labels (N,) -> (N, 2C, H, W)."""
        p = self.patch_size
        h, w = x.shape[2] // p, x.shape[3] // p
        assert x.shape[2:] == (h * p, w * p), f"latents {tuple(x.shape)} do not divide into {p} x {p} patches"
        x = self.x_embedder(x).contiguous()  # (N, C, H, W) -> (N, h*w, D), a layout that all blocks keep
        if self.rope_embedder is None:
            assert (h, w) == self.grid, f"{(h, w)} patches, position table for {self.grid}"
            x = x + self.pos_embed
            cos = sin = None
        else:
            cos, sin = self.rope_embedder(h, w)  # (h*w, D/H/2), once for all blocks
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        if self.compiled:  # for whatever number of rows comes later
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(c, 0)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, c, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, c, cos, sin)  # (N, h*w, D)
        x = self.final_layer(x, c)  # (N, h*w, p*p*2C)
        return self.unpatchify(x, h, w)  # (N, 2C, H, W)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: int | str = 3
    ) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598): n inputs and n labels -> guided (n, 2C, H, W).

        The noise prediction of the first cfg_channels latent channels ("all": of every one) is moved away from the
        null class's; everything else is the conditional prediction. Three is what the published FIDs used.
        """
        null = torch.full_like(y, self.num_classes)
        out = self.forward(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        conditional, unconditional = out.chunk(2)
        n = self.in_channels if cfg_channels == "all" else min(cfg_channels, self.in_channels)
        guided = unconditional[:, :n] + cfg_scale * (conditional[:, :n] - unconditional[:, :n])
        return torch.cat([guided, conditional[:, n:]], dim=1)


def sincos_table(dim: int, h: int, w: int) -> Tensor:
    """Fixed sin-cos position table (h*w, dim): column in the first half of the channels, row in the second."""

    def encode(position: Tensor) -> Tensor:
        freqs = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        phases = position.reshape(-1, 1) * freqs
        return torch.cat([phases.sin(), phases.cos()], dim=1)  # (h*w, dim/2)

    rows, columns = torch.meshgrid(
        torch.arange(h, dtype=torch.float64), torch.arange(w, dtype=torch.float64), indexing="ij"
    )
    return torch.cat([encode(columns), encode(rows)], dim=1).float()


# Table 1 of arXiv 2212.09748; XS is ours, for the demo and the tests.
SIZES = {
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "XS": dict(depth=6, hidden_size=128, num_heads=2),
}


def _constructor(size: dict, patch_size: int):
    def build(**kwargs) -> DiT:
        return DiT(patch_size=patch_size, **size, **kwargs)

    return build


DiT_models = {f"DiT-{name}/{patch}": _constructor(size, patch) for name, size in SIZES.items() for patch in (2, 4, 8)}
