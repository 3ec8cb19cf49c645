"""DiT: golden numbers, initialisation, conditioning, guidance, precision, compilation."""

import copy
import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import models
from models import DiT, DiT_models, sincos_table
from rope import RopeConfig
from runtime.config import ModelConfig

TINY = dict(input_size=8, hidden_size=128, depth=2, num_heads=2, num_classes=10)
ENCODINGS = [None, RopeConfig(rotate=0), RopeConfig(rotate=4)]
encodings = pytest.mark.parametrize("rope", ENCODINGS, ids=["sincos", "axial", "spiral"])


def inputs(batch=2, size=(8, 8), channels=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, *size, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    return x, t, torch.randint(0, 10, (batch,), generator=generator)


def test_names_shapes_and_sizes_are_the_published_ones(golden):
    published = golden("state_dict.json")
    for name, rope in (("DiT-S/2 rope rotate=4", RopeConfig(rotate=4)), ("DiT-S/2 no rope", None)):
        with torch.device("meta"):
            state = DiT_models["DiT-S/2"](rope=rope).state_dict()
        shapes = {key: list(value.shape) for key, value in state.items()}
        assert shapes == published["trainable_and_buffers"][name]
    with torch.device("meta"):
        default, xl = DiT(), DiT_models["DiT-XL/2"]()
    assert str(default) == str(xl) and default.blocks[0].attn.num_heads == xl.blocks[0].attn.num_heads == 16
    assert {name: value.shape for name, value in default.state_dict().items()} == {
        name: value.shape for name, value in xl.state_dict().items()
    }
    assert (default.y_embedder.dropout_prob, default.grid, default.num_classes) == (0.1, (16, 16), 1000)
    assert ModelConfig() == ModelConfig("DiT-XL/2", (32, 32), 4, 1000, 0.1, learn_sigma=True, rope=None)
    assert len(published["parameters_with_rope"]) == 12
    for name, expected in published["parameters_with_rope"].items():
        with torch.device("meta"):
            model = DiT_models[name](rope=RopeConfig())
        assert sum(p.numel() for p in model.parameters()) == expected, name


def test_outputs_are_the_golden_ones(golden, fill_weights):
    numbers = golden("dit_forward.npz")
    for i, case in enumerate(json.loads(numbers["cases"].item())):
        case.pop("batch")
        rope = case.pop("rope")
        model = fill_weights(DiT(**case, rope=RopeConfig(**rope) if rope else None)).eval()
        x, t, y = (torch.from_numpy(numbers[f"{name}_{i}"]) for name in "xty")
        with torch.no_grad():
            out, guided = model(x, t, y), model.forward_with_cfg(x, t, y, 1.5)
        expected, expected_guided = (torch.from_numpy(numbers[f"{name}_{i}"]) for name in ("out", "cfg"))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(guided, expected_guided[: len(x)], atol=1e-5, rtol=0)


@encodings
def test_freshly_initialised_model_outputs_exactly_zero(rope):
    model = DiT(**TINY, rope=rope)
    assert not model(*inputs()).any()


def test_initialisation_statistics():
    torch.manual_seed(0)
    model = DiT(**{**TINY, "num_classes": 100}, rope=RopeConfig())
    normal = {"y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"}
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is None:
            continue
        weight = module.weight.detach().flatten(1)
        assert getattr(module, "bias", None) is None or not module.bias.any(), name
        if name in normal:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert (weight.abs() > 0.05).any(), name  # normal, which a uniform one with this std would not reach
        elif "adaLN_modulation" in name or name == "final_layer.linear":
            assert not weight.any(), name
        else:  # Xavier: uniform within sqrt(6 / (inputs + outputs))
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.95 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_position_table_follows_its_formula():
    h, w, dim = 3, 5, 16
    table = sincos_table(dim, h, w)
    for i in range(h):
        for j in range(w):
            expected = []
            for position in (j, i):
                for wave in (math.sin, math.cos):
                    expected += [wave(position / 10000 ** (k / (dim / 4))) for k in range(dim // 4)]
            torch.testing.assert_close(table[i * w + j], torch.tensor(expected), atol=1e-6, rtol=0)


def test_timestep_features_follow_their_formula():
    embedder = DiT(**TINY).t_embedder
    embedder.mlp = torch.nn.Sequential(torch.nn.Linear(256, 256))
    torch.nn.init.eye_(embedder.mlp[0].weight)
    torch.nn.init.zeros_(embedder.mlp[0].bias)
    for t in (torch.tensor([0, 1, 999]), torch.tensor([0.0, 0.5, 250.25])):
        phases = t.double()[:, None] * 10000 ** (-torch.arange(128).double() / 128)
        expected = torch.cat([phases.cos(), phases.sin()], dim=1).float()
        torch.testing.assert_close(embedder(t), expected, atol=1e-4, rtol=0)


def test_patches_return_to_their_places():
    model = DiT(**TINY, learn_sigma=False)
    p, channels, h, w = 2, 4, 3, 5
    tokens = torch.arange(h * w * p * p * channels, dtype=torch.float32).view(1, h * w, -1)
    image = model.unpatchify(tokens, h, w)
    assert image.shape == (1, channels, h * p, w * p)
    for c in range(channels):
        for i in range(h * p):
            for j in range(w * p):
                assert image[0, c, i, j] == tokens[0, (i // p) * w + j // p, ((i % p) * p + j % p) * channels + c]


def test_labels_are_dropped_at_the_right_rate_in_training_alone():
    torch.manual_seed(0)
    embedder = DiT(**TINY, class_dropout_prob=0.1).y_embedder
    embedder.embedding_table.weight.data = torch.arange(11.0)[:, None]  # the embedding is the label
    labels = torch.arange(10).repeat(5000)
    embedded = embedder.train()(labels).flatten()
    dropped = embedded == 10
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=4 * math.sqrt(0.1 * 0.9 / 50000))
    assert torch.equal(embedded[~dropped], labels[~dropped].float())
    assert torch.equal(embedder.eval()(labels).flatten(), labels.float())
    compiled = torch.compile(embedder.train(), backend="aot_eager", fullgraph=True)
    assert (compiled(labels) == 10).float().mean().item() == pytest.approx(0.1, abs=0.01)
    embedder.dropout_prob = 0.0
    assert torch.equal(embedder.train()(labels).flatten(), labels.float())


@encodings
@pytest.mark.parametrize(
    "cfg_channels, guided_channels, options",
    [
        (3, 3, {}),
        ("all", 4, {}),
        (1, 1, {}),
        (3, 2, {"in_channels": 2}),  # the variance is never guided
        ("all", 4, {"learn_sigma": False}),
    ],
)
def test_guidance_is_its_closed_form_over_two_passes(rope, cfg_channels, guided_channels, options, fill_weights):
    model = fill_weights(DiT(**TINY, **options, rope=rope)).eval()
    x, t, y = inputs(channels=model.in_channels)
    with torch.no_grad():
        conditional, unconditional = model(x, t, y), model(x, t, torch.full_like(y, 10))
        guided = model.forward_with_cfg(x, t, y, 2.5, cfg_channels)
        unguided = model.forward_with_cfg(x, t, y, 1.0, cfg_channels)
    assert conditional.shape[1] == model.in_channels * (1 if options == {"learn_sigma": False} else 2)
    expected = conditional.clone()
    expected[:, :guided_channels] += 1.5 * (conditional - unconditional)[:, :guided_channels]
    assert (conditional - unconditional).abs().max() > 0.05
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(unguided, conditional, atol=1e-5, rtol=0)


@pytest.fixture
def attended(monkeypatch):
    """Queries, keys and values of every attention that ran."""
    seen = []
    attention = F.scaled_dot_product_attention

    def spy(q, k, v):
        seen.append((q, k, v))
        return attention(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


def test_queries_and_keys_are_rotated_and_values_are_not(attended, fill_weights):
    """Of one block at equal tokens, everything that differs between patches is the rotation."""
    model = fill_weights(DiT(**{**TINY, "depth": 1}, rope=RopeConfig(rotate=4)))
    cos, sin = model.rope_embedder(4, 4)
    model.blocks[0](torch.randn(1, 1, 128).expand(1, 16, -1), torch.randn(1, 128), cos, sin)
    for heads, is_rotated in zip(attended[0], (True, True, False), strict=True):  # (1, 2, 16, 64)
        expected = heads[:, :, :1].expand_as(heads)
        if is_rotated:  # from patch 0 back to phase 0, then to the phase of each patch
            pairs = torch.view_as_complex(expected.unflatten(-1, (-1, 2)).contiguous())
            turn = torch.complex(cos, sin) * torch.complex(cos[:1], -sin[:1])
            expected = torch.view_as_real(pairs * turn).flatten(-2)
        torch.testing.assert_close(heads, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_bfloat16_attention_rotates_by_float32_phases(mode, attended, fill_weights, monkeypatch):
    model = fill_weights(DiT(**TINY, rope=RopeConfig(rotate=4))).eval()
    x, t, y = inputs()
    exact = model.rope_embedder(4, 4)
    tables = []
    rotate = models.rotate
    monkeypatch.setattr(models, "rotate", lambda x, *table: tables.append(table) or rotate(x, *table))
    with torch.no_grad():
        expected = model(x, t, y)
        if mode == "cast":
            out = model.bfloat16()(x.bfloat16(), t, y)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x, t, y)
    assert all(part.dtype == torch.bfloat16 for part in (*attended[-1], *attended[-2], out))
    for table in tables:
        assert torch.equal(torch.stack(table), torch.stack(exact))
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("rope", "wrap"), [(None, None), *((RopeConfig(rotate=4), wrap) for wrap in (None, "checkpointing", "ddp"))]
)
def test_compiled_blocks_equal_eager_ones_and_are_compiled_once(rope, wrap, fill_weights, compilations, one_process):
    """Once for training and once for inference: for all blocks, batches, with and without guidance."""
    model = fill_weights(DiT(**TINY, class_dropout_prob=0.0, rope=rope)).train()
    model.grad_checkpointing = wrap == "checkpointing"
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    function = DistributedDataParallel(compiled) if wrap == "ddp" else compiled
    for batch in (4, 3):
        x, t, y = inputs(batch)
        for step in (model, function):
            step.zero_grad()
            step(x, t, y).square().mean().backward()
        for eager, found in zip(model.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(found.grad, eager.grad, atol=1e-5, rtol=1e-5)
    assert compilations.frame_count == 1
    with torch.no_grad():
        for network in (model.eval(), compiled.eval()):
            network.guided = [network.forward_with_cfg(*inputs(batch), 1.5) for batch in (4, 2)] + [network(*inputs(3))]
    for eager, found in zip(model.guided, compiled.guided, strict=True):
        torch.testing.assert_close(found, eager, atol=1e-5, rtol=1e-5)
    function.train()(*inputs(2)).sum().backward()
    assert compilations.frame_count == 2


@pytest.mark.parametrize(
    ("capability", "set_before", "expected"),
    [("AVX512", None, True), ("AVX512", False, False), ("AVX2", None, None), ("DEFAULT", None, None)],
)
def test_trials_of_vector_code_are_spared_where_pytorch_runs_on_it(capability, set_before, expected, monkeypatch):
    """And where the user has not said whether to use it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with torch._inductor.config.patch({"cpp.vec_isa_ok": set_before}):
        DiT(**TINY).compile_blocks()
        assert torch._inductor.config.cpp.vec_isa_ok is expected


def test_machine_code_of_blocks_equals_eager_ones_within_the_stated_tolerance(fill_weights):
    """docs/benchmark.md: float32 results differ by 1e-5 of the largest value at most."""
    model = fill_weights(DiT(**TINY, class_dropout_prob=0.0, rope=RopeConfig(rotate=4))).train()
    results, compiled = [], copy.deepcopy(model)
    compiled.compile_blocks()
    for network in (model, compiled):
        out = network(*inputs(4))
        out.square().mean().backward()
        results.append([out.detach(), *(parameter.grad for parameter in network.parameters())])
    for eager, found in zip(*results, strict=True):
        assert (found - eager).abs().max() <= 1e-5 * eager.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_written_out_is_the_same(dtype):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 3, 16, 32, generator=generator, requires_grad=True) for _ in range(3)]
    results = []
    for attend in (models.Attention.attend, models.attend_written_out):
        out = attend(*(part.to(dtype) for part in parts))
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out.float().square().sum(), parts)])
    atol = 1e-5 if dtype == torch.float32 else 0.1  # gradients are of the order of 5
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(("size", "expected"), [(32, True), (34, False)])
def test_attention_is_written_out_for_256_tokens_at_most(size, expected, attended):
    model = DiT(**{**TINY, "input_size": size}, rope=RopeConfig())
    model.write_out_attention()
    model(*inputs(size=(size, size)))
    assert (len(attended) == 0) == expected


@pytest.mark.parametrize("rope", [None, RopeConfig(rotate=4)], ids=["sincos", "spiral"])
def test_gradient_checkpointing_changes_no_gradient(rope, fill_weights, attended):
    model = fill_weights(DiT(**TINY, rope=rope)).train()
    x, t, y = inputs(batch=8)
    gradients, attentions = [], []
    for model.grad_checkpointing in (False, True):
        attended.clear()
        torch.manual_seed(0)  # label dropout
        model.zero_grad()
        model(x, t, y).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        attentions.append(len(attended))
    assert attentions == [2, 4]  # each block's attention ran again in the backward pass
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients, strict=True))


@encodings
def test_model_built_without_memory_computes_the_same_once_weights_are_loaded(rope, fill_weights):
    source = fill_weights(DiT(**TINY, rope=rope)).eval()
    with torch.device("meta"):
        model = DiT(**TINY, rope=rope).eval()
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model(*inputs()), source(*inputs()))


def test_non_square_latents_are_patches_in_row_major_order(attended, fill_weights, monkeypatch):
    model = fill_weights(DiT(**{**TINY, "input_size": (4, 12)}, rope=RopeConfig(rotate=4))).eval()
    assert model.rope_embedder.pt_grid == (2, 6)
    calls, phases = [], model.rope_embedder.phases
    monkeypatch.setattr(model.rope_embedder, "phases", lambda h, w: calls.append((h, w)) or phases(h, w))
    x = torch.zeros(1, 4, 4, 12)
    x[..., :2, 6:8] = 1.0  # patch (0, 3)
    model(x, torch.tensor([5]), torch.tensor([1]))
    assert calls == [(2, 6)] and len(attended) == 2  # once for all blocks
    _, _, values = attended[0]
    differs = (values - values[:, :, :1]).abs().amax((0, 1, 3)) > 1e-3
    assert differs.nonzero().flatten().tolist() == [3]


def test_latents_that_do_not_fit_are_refused():
    with pytest.raises(AssertionError, match=r"latents \(2, 4, 9, 8\) do not divide into 2 x 2 patches"):
        DiT(**TINY, rope=RopeConfig())(*inputs(size=(9, 8)))
    with pytest.raises(AssertionError, match=r"\(2, 8\) patches, position table for \(4, 4\)"):
        DiT(**TINY)(*inputs(size=(4, 16)))


@pytest.mark.parametrize("rope", [None, RopeConfig(rotate=2, same_theta=True, border="exact")])
def test_model_config_survives_being_stored(rope):
    config = ModelConfig("DiT-XS/4", input_size=(8, 16), num_classes=7, class_dropout_prob=0.2, rope=rope)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ModelConfig.from_arguments(json.loads(json.dumps(config.arguments()))) == config
    with torch.device("meta"):
        assert DiT(**{**config.arguments(), "rope": rope}).state_dict().keys() == config.build().state_dict().keys()
    with torch.device("meta"):
        model = config.build()
    assert (model.grid, model.num_classes, model.y_embedder.dropout_prob) == ((2, 4), 7, 0.2)
    assert config.head_dim * model.blocks[0].attn.num_heads == 128
    assert model.rope_embedder is None if rope is None else model.rope_embedder.config == rope
