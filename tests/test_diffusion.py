"""The diffusion process: golden numbers, and closed forms that hold whatever the implementation."""

import json
import math

import numpy as np
import pytest
import torch

from diffusion import GaussianDiffusion, create_diffusion
from diffusion.losses import approximate_normal_cdf, discretized_gaussian_nll, normal_kl
from diffusion.schedule import respaced_timesteps
from models import DiT
from rope import RopeConfig

RESPACINGS = ["", "250", "50", "10,20,30", "ddim25"]
respacings = pytest.mark.parametrize("respacing", RESPACINGS)


def close(actual, expected, scale=1e-5):
    torch.testing.assert_close(actual, expected, atol=scale * max(1.0, expected.abs().max().item()), rtol=0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def constant(output):
    """A model that says the same whatever it is asked."""
    return lambda x, t: output


def test_respaced_schedules_are_the_golden_ones(golden):
    numbers = golden("diffusion.npz")
    for i, respacing in enumerate(json.loads(numbers["spec"].item())["respacings"]):
        diffusion = create_diffusion(respacing)
        assert diffusion.timestep_map == numbers[f"map_{i}"].tolist()
        assert diffusion.num_timesteps == len(diffusion.timestep_map)
        np.testing.assert_allclose(diffusion.betas, numbers[f"betas_{i}"], rtol=1e-10)
        np.testing.assert_allclose(diffusion.alphas_cumprod, numbers[f"acp_{i}"], rtol=1e-10)
        np.testing.assert_allclose(diffusion.posterior_log_variance_clipped, numbers[f"plv_{i}"], rtol=1e-10)


def test_losses_and_predictions_are_the_golden_ones(golden):
    file = golden("diffusion.npz")
    x0, eps, output, t, x_t = (torch.from_numpy(file[name]) for name in ("x0", "eps", "model_out", "t", "x_t"))
    diffusion = create_diffusion("")
    close(diffusion.q_sample(x0, t, eps), x_t)
    losses = diffusion.training_losses(constant(output), x0, t, noise=eps)
    prediction = diffusion.p_mean_variance(constant(output), x_t, t, clip_denoised=False)
    actual = {**losses, "p_mean": prediction["mean"], "p_logvar": prediction["log_variance"]}
    actual["pred_x0"] = prediction["pred_xstart"]
    for name, value in actual.items():
        close(value, torch.from_numpy(file[name]))


def test_ddim_loops_are_the_golden_ones(golden):
    file = golden("diffusion.npz")
    start = torch.from_numpy(file["eps"])
    for i, respacing in enumerate(json.loads(file["spec"].item())["loops"]):
        seen = []

        def model(x, t, seen=seen):
            assert (t == t[0]).all()
            seen.append(t[0].item())
            return torch.cat([0.3 * x + 0.1 * torch.sin(t / 100).view(-1, 1, 1, 1), 0.2 * torch.tanh(x)], dim=1)

        diffusion = create_diffusion(respacing)
        sample = diffusion.ddim_sample_loop(model, start.shape, noise=start, clip_denoised=False)
        close(sample, torch.from_numpy(file[f"ddim_{i}"]))
        assert seen == file[f"ddim_seen_{i}"].tolist()


@respacings
def test_posterior_is_the_product_of_its_gaussians(respacing):
    """q(x_{t-1} | x_t, x_0) from precisions of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), with the betas of the loop."""
    diffusion = create_diffusion(respacing)
    x_start, x_t = 0.7, -1.3
    for t in range(1, diffusion.num_timesteps):
        beta, acp_prev = diffusion.betas[t], diffusion.alphas_cumprod[t - 1]
        precision = (1 - beta) / beta + 1 / (1 - acp_prev)
        mean = (math.sqrt(1 - beta) * x_t / beta + math.sqrt(acp_prev) * x_start / (1 - acp_prev)) / precision
        assert diffusion.posterior_variance[t] == pytest.approx(1 / precision, rel=1e-9)
        actual = diffusion.q_posterior_mean(torch.full((1, 1), x_start), torch.full((1, 1), x_t), torch.tensor([t]))
        assert actual.item() == pytest.approx(mean, abs=1e-6)


@respacings
def test_respaced_process_has_the_marginals_of_the_original(respacing):
    original, diffusion = create_diffusion(""), create_diffusion(respacing)
    np.testing.assert_allclose(diffusion.alphas_cumprod, original.alphas_cumprod[diffusion.timestep_map], rtol=1e-10)
    signal, variance = 1.0, 0.0  # of x_t, step by step with the respaced betas
    for t, beta in enumerate(diffusion.betas):
        signal, variance = signal * math.sqrt(1 - beta), variance * (1 - beta) + beta
        steps = torch.tensor([t])
        assert diffusion.q_sample(torch.ones(1, 1), steps, torch.zeros(1, 1)).item() == pytest.approx(signal, rel=1e-5)
        std = diffusion.q_sample(torch.zeros(1, 1), steps, torch.ones(1, 1)).item()
        assert std == pytest.approx(math.sqrt(variance), rel=1e-5)


class GaussianModel:
    """Exact noise predictor, and exact variance of the reverse step, for data N(mean, std^2) in every pixel."""

    def __init__(self, diffusion: GaussianDiffusion, mean: float, std: float):
        self.diffusion, self.mean, self.std = diffusion, mean, std

    def __call__(self, x, t):
        d, step = self.diffusion, self.diffusion.timestep_map.index(t[0].item())
        acp, acp_prev, beta = d.alphas_cumprod[step], d.alphas_cumprod_prev[step], d.betas[step]
        total = acp * self.std**2 + 1 - acp  # variance of x_t
        eps = math.sqrt(1 - acp) * (x - math.sqrt(acp) * self.mean) / total
        # Var(x_{t-1} | x_t) = posterior variance + coef^2 Var(x_0 | x_t), written as the fraction v that gives it
        coef = beta * math.sqrt(acp_prev) / (1 - acp)
        variance = d.posterior_variance[step] + coef**2 * self.std**2 * (1 - acp) / total
        low, high = d.posterior_log_variance_clipped[step], math.log(beta)
        v = 2 * (math.log(variance) - low) / (high - low) - 1 if step else 0.0
        return torch.cat([eps, torch.full_like(x, v)], dim=1)


@pytest.mark.parametrize("respacing", ["50", "10,20,30"])
def test_ancestral_sampling_reproduces_a_gaussian(respacing):
    diffusion = create_diffusion(respacing)
    mean, std, n = 0.4, 0.6, 40_000
    torch.manual_seed(0)
    sample = diffusion.p_sample_loop(
        GaussianModel(diffusion, mean, std), (1, 1, 200, 200), clip_denoised=False, device="cpu"
    )
    assert sample.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(n))
    # The last step adds no noise, so what it would have added (0.01 std) is missing.
    assert sample.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(2 * n) + 1e-3)


def test_deterministic_sampling_carries_a_gaussian_onto_the_data():
    """The flow of a Gaussian is affine: x_0 = mean + std x_T up to discretisation."""
    diffusion = create_diffusion("")
    start = torch.linspace(-2, 2, 16).view(1, 1, 4, 4)
    sample = diffusion.ddim_sample_loop(GaussianModel(diffusion, 0.4, 0.6), start.shape, start, clip_denoised=False)
    close(sample, 0.4 + 0.6 * start, 0.02)


@respacings
def test_ddim_with_eta_one_is_the_ancestral_step_at_posterior_variance(respacing):
    diffusion = create_diffusion(respacing)
    x, noise, output = randn(1, 2, 4, 4), randn(1, 2, 4, 4, seed=1), randn(1, 4, 4, 4, seed=2)
    for t in range(1, diffusion.num_timesteps, 7):
        steps = torch.tensor([t])
        mean = diffusion.p_mean_variance(constant(output), x, steps, clip_denoised=False)["mean"]
        expected = mean + math.sqrt(diffusion.posterior_variance[t]) * noise
        actual = diffusion.ddim_sample(constant(output), x, steps, noise, clip_denoised=False, eta=1.0)["sample"]
        close(actual, expected, 1e-4)  # float32 differences of alphas_cumprod near 1


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_step_follows_its_formula(eta):
    diffusion = create_diffusion("50")
    x, noise, output = randn(1, 2, 4, 4), randn(1, 2, 4, 4, seed=1), randn(1, 4, 4, 4, seed=2)
    eps, t = output[:, :2], 20
    acp, acp_prev = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod[t - 1]
    sigma = eta * math.sqrt((1 - acp_prev) / (1 - acp)) * math.sqrt(1 - acp / acp_prev)
    x_start = (x - math.sqrt(1 - acp) * eps) / math.sqrt(acp)
    expected = math.sqrt(acp_prev) * x_start + math.sqrt(1 - acp_prev - sigma**2) * eps + sigma * noise
    actual = diffusion.ddim_sample(constant(output), x, torch.tensor([t]), noise, clip_denoised=False, eta=eta)
    close(actual["sample"], expected)
    close(actual["pred_xstart"], x_start)


def test_clipping_bounds_the_prediction_and_its_mean():
    diffusion = create_diffusion("")
    x, t, output = randn(1, 2, 4, 4), torch.tensor([600]), randn(1, 4, 4, 4, seed=2)
    free = diffusion.p_mean_variance(constant(output), x, t, clip_denoised=False)
    clipped = diffusion.p_mean_variance(constant(output), x, t)
    assert free["pred_xstart"].abs().max() > 1
    assert torch.equal(clipped["pred_xstart"], free["pred_xstart"].clamp(-1, 1))
    close(clipped["mean"], diffusion.q_posterior_mean(clipped["pred_xstart"], x, t))


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_last_step_adds_no_noise(loop):
    diffusion = create_diffusion("10")
    drawn, kwargs = [], {"eta": 1.0} if loop.startswith("ddim") else {}
    states, start = [], randn(2, 1, 4, 4)

    def model(x, t):
        states.append((x, t))
        return torch.cat([0.1 * x, torch.zeros_like(x)], dim=1)

    def noise_sampler(x):
        drawn.append(x)
        return torch.ones_like(x)

    sample = getattr(diffusion, loop)(
        model, start.shape, start, clip_denoised=False, noise_sampler=noise_sampler, **kwargs
    )
    assert len(states) == 10 and len(drawn) == 9
    x, t = states[-1]
    assert (t == 0).all()
    close(sample, diffusion.p_mean_variance(model, x, torch.zeros_like(t), clip_denoised=False)["mean"])


def test_deterministic_sampling_draws_no_noise_and_yields_every_state():
    def noise_sampler(x):
        raise AssertionError("DDIM with eta 0 asked for noise")

    diffusion, model, start = create_diffusion("5"), constant(randn(1, 2, 4, 4)), randn(1, 1, 4, 4, seed=1)
    sample = diffusion.ddim_sample_loop(model, start.shape, start, noise_sampler=noise_sampler)
    states = list(diffusion.ddim_sample_loop_progressive(model, start.shape, start))
    assert len(states) == 5 and torch.equal(states[-1]["sample"], sample)
    assert torch.equal(sample, states[-1]["pred_xstart"])  # alphas_cumprod is 1 before the first step


def test_variance_is_interpolated_between_its_bounds_in_the_log():
    diffusion = create_diffusion("")
    t, eps = torch.tensor([300]), randn(1, 1, 4, 4)
    low, high = math.log(diffusion.posterior_variance[300]), math.log(diffusion.betas[300])
    for v, expected in {-1.0: low, 0.0: (low + high) / 2, 1.0: high, 3.0: 2 * high - low}.items():
        output = torch.cat([eps, torch.full_like(eps, v)], dim=1)
        log_variance = diffusion.p_mean_variance(constant(output), eps, t)["log_variance"]
        torch.testing.assert_close(log_variance, torch.full_like(eps, expected), atol=1e-5, rtol=0)


@respacings
def test_variational_term_is_zero_for_the_posterior_and_positive_otherwise(respacing):
    diffusion = create_diffusion(respacing)
    t = torch.arange(1, diffusion.num_timesteps, 3)
    x_start, noise = randn(len(t), 1, 4, 4), randn(len(t), 1, 4, 4, seed=1)
    posterior = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    exact = diffusion.training_losses(constant(posterior), x_start, t, noise=noise)
    torch.testing.assert_close(exact["vb"], torch.zeros(len(t)), atol=1e-4, rtol=0)
    assert torch.equal(exact["mse"], torch.zeros(len(t)))
    wrong = diffusion.training_losses(constant(torch.zeros_like(posterior)), x_start, t, noise=noise)
    assert (wrong["vb"] > 1e-4).all()
    torch.testing.assert_close(wrong["mse"], noise.square().mean((1, 2, 3)))
    assert torch.equal(wrong["loss"], wrong["mse"] + wrong["vb"])


def test_kl_divergence_is_its_integral():
    x = torch.linspace(-20, 20, 200_001, dtype=torch.float64)
    mean1, variance1, mean2, variance2 = 0.3, 0.5, -0.4, 2.0
    log_p = -0.5 * ((x - mean1) ** 2 / variance1 + math.log(2 * math.pi * variance1))
    log_q = -0.5 * ((x - mean2) ** 2 / variance2 + math.log(2 * math.pi * variance2))
    integral = torch.trapezoid(log_p.exp() * (log_p - log_q), x).item()
    parameters = (torch.tensor(v, dtype=torch.float64) for v in (mean1, math.log(0.5), mean2, math.log(2.0)))
    assert normal_kl(*parameters).item() == pytest.approx(integral, rel=1e-6)


@pytest.mark.parametrize("mean, std", [(0.0, 0.1), (0.3, 0.02), (-0.9, 0.3), (1.2, 0.5)])
def test_discretised_likelihood_sums_to_one_over_the_bins(mean, std):
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    nll = discretized_gaussian_nll(bins, torch.tensor(mean).double(), torch.tensor(2 * math.log(std)).double())
    assert nll.neg().exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_normal_cdf_is_approximated_to_three_digits():
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    exact = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    assert 1e-5 < (approximate_normal_cdf(x) - exact).abs().max() < 5e-4  # the approximation, and no other


def test_variational_term_trains_the_variance_alone():
    diffusion = create_diffusion("")
    t = torch.tensor([0, 1, 500, 999])
    output = randn(4, 4, 4, 4).requires_grad_()
    losses = diffusion.training_losses(constant(output), randn(4, 2, 4, 4, seed=1), t, noise=randn(4, 2, 4, 4, seed=2))
    (from_vb,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    (from_mse,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert not from_vb[:, :2].any() and from_vb[:, 2:].abs().amax((1, 2, 3)).all() and from_vb.isfinite().all()
    assert not from_mse[:, 2:].any() and from_mse[:, :2].abs().amax((1, 2, 3)).all()


@pytest.mark.parametrize("options", [{}, {"sigma_small": False}, {"sigma_small": True}], ids=str)
def test_fixed_variance_is_beta_or_the_posterior_variance(options):
    diffusion = create_diffusion("50", learn_sigma=False, **options)
    x, noise = randn(1, 2, 4, 4), randn(1, 2, 4, 4, seed=1)
    variances = diffusion.posterior_variance if options.get("sigma_small") else diffusion.betas
    for t in (1, 20, 49):
        log_variance = diffusion.p_mean_variance(constant(noise), x, torch.tensor([t]))["log_variance"]
        torch.testing.assert_close(log_variance, torch.full_like(x, math.log(variances[t])), atol=1e-5, rtol=0)
    losses = diffusion.training_losses(constant(0.5 * noise), x, torch.tensor([3]), noise=noise)
    torch.testing.assert_close(losses["loss"], (noise / 2).square().mean((1, 2, 3)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_process_of_one_step_is_well_defined(learn_sigma):
    diffusion = create_diffusion("1", learn_sigma=learn_sigma)
    x, output = randn(1, 2, 4, 4), randn(1, 4 if learn_sigma else 2, 4, 4, seed=1)
    expected = diffusion.p_mean_variance(constant(output), x, torch.tensor([0]), clip_denoised=False)["pred_xstart"]
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        close(loop(constant(output), x.shape, x, clip_denoised=False), expected)
    losses = diffusion.training_losses(constant(output), x, torch.tensor([0]))
    assert all(value.isfinite().all() for value in losses.values())


def test_half_precision_model_gives_float32_losses_and_samples():
    diffusion = create_diffusion("10")
    x, noise, output = randn(2, 2, 4, 4), randn(2, 2, 4, 4, seed=1), randn(2, 4, 4, 4, seed=2).bfloat16()
    t = torch.tensor([0, 9])
    half = diffusion.training_losses(constant(output), x, t, noise=noise)
    full = diffusion.training_losses(constant(output.float()), x, t, noise=noise)
    assert all(torch.equal(half[name], full[name]) for name in full)
    sample = diffusion.ddim_sample_loop(constant(output), x.shape, noise)
    assert torch.equal(sample, diffusion.ddim_sample_loop(constant(output.float()), x.shape, noise))


def test_training_after_sampling_in_inference_mode():
    """Tables made in inference mode must not spoil a later backward pass."""
    diffusion = create_diffusion("10")
    x, output = randn(1, 2, 4, 4), randn(1, 4, 4, 4, seed=1)
    with torch.inference_mode():
        diffusion.p_sample_loop(constant(output), x.shape, x)
    trained = output.clone().requires_grad_()
    diffusion.training_losses(constant(trained), x, torch.tensor([4]))["loss"].sum().backward()
    assert trained.grad.isfinite().all() and trained.grad.any()


def test_guided_sampling_uses_the_device_and_labels_of_the_model(fill_weights):
    model = DiT(input_size=8, hidden_size=128, depth=1, num_heads=2, num_classes=10, rope=RopeConfig(rotate=2))
    model = fill_weights(model).eval()
    diffusion = create_diffusion("3")
    kwargs = dict(y=torch.tensor([1, 2]), cfg_scale=1.5)
    torch.manual_seed(0)
    sample = diffusion.p_sample_loop(model.forward_with_cfg, (2, 4, 8, 8), model_kwargs=kwargs)
    torch.manual_seed(0)
    noise = torch.randn(2, 4, 8, 8)
    other = diffusion.p_sample_loop(
        lambda x, t: model.forward_with_cfg(x, t, **kwargs), (2, 4, 8, 8), noise, device="cpu"
    )
    assert torch.equal(sample, other) and not sample.requires_grad


def test_noise_schedules_follow_their_formulas():
    diffusion = create_diffusion("", noise_schedule="squaredcos_cap_v2")
    curve = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(diffusion.alphas_cumprod[:-1], curve[1:-1] / curve[0], rtol=1e-9)
    assert diffusion.betas.max() == 0.999
    for steps in (1000, 100):  # the linear one scales with its number of steps
        expected = [1e-4 * 1000 / steps, 0.02 * 1000 / steps]
        assert create_diffusion("", diffusion_steps=steps).betas[[0, -1]].tolist() == pytest.approx(expected)


def test_counts_choose_evenly_spaced_steps_of_each_section():
    for count in (2, 21, 100, 333, 999, 1000):
        kept = np.array(respaced_timesteps(1000, str(count)))
        assert np.abs(kept - np.linspace(0, 999, count)).max() <= 0.5 + 1e-9
    assert respaced_timesteps(1000, "21")[8:12] == [400, 450, 499, 549]  # 10 x 49.95, as the published code rounds it
    assert respaced_timesteps(10, "1,2,3") == [0, 4, 6, 7, 8, 9]  # sections 0-3, 4-6, 7-9
    assert respaced_timesteps(10, "ddim5") == [0, 2, 4, 6, 8]
    assert respaced_timesteps(10, "ddim3") == [0, 4, 8]
    assert respaced_timesteps(10, None) == respaced_timesteps(10, "") == list(range(10))
    assert respaced_timesteps(1000, 250) == respaced_timesteps(1000, [250]) == respaced_timesteps(1000, "250")
    assert respaced_timesteps(10, [1, 2, 3]) == respaced_timesteps(10, "1,2,3")


@pytest.mark.parametrize(
    "settings, message",
    [
        (["1001"], "cannot choose 1001 timesteps from a section of 1000"),
        (["0"], "cannot choose 0 timesteps from a section of 1000"),
        (["400,10,10"], "cannot choose 400 timesteps from a section of 334"),
        (["ddim300"], "no integer stride gives 300 of 1000 timesteps"),
        (["ddim0"], "no integer stride gives 0 of 1000 timesteps"),
        *(([text], f"timestep respacing '{text}' is not a count") for text in ("fast", "ddim", "-5", "10,")),
        (["", "cosine"], "noise schedule 'cosine' is unknown; expected one of linear, squaredcos"),
        (["", "linear", True, 20], "a linear noise schedule needs more than 20 steps, got 20"),
    ],
)
def test_schedules_that_do_not_fit_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        create_diffusion(*settings)


def test_wrong_shapes_are_refused_with_both_of_them():
    x = randn(1, 2, 4, 4)
    for learn_sigma, output, expected in ((True, x, "4, 4, 4"), (False, x.repeat(1, 2, 1, 1), "2, 4, 4")):
        message = rf"model output \(1, {output.shape[1]}, 4, 4\), expected \(1, {expected}\)"
        with pytest.raises(AssertionError, match=message):
            create_diffusion("5", learn_sigma=learn_sigma).training_losses(constant(output), x, torch.tensor([3]))
    with pytest.raises(AssertionError, match=r"noise \(1, 2, 4, 4\), expected \(2, 2, 4, 4\)"):
        create_diffusion("5").p_sample_loop(constant(x), (2, 2, 4, 4), x)
