"""Likelihood terms of the variational bound, in nats."""

import math

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence between diagonal Gaussians, element by element."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """Standard normal CDF by its tanh approximation (Page, 1977)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Negative log-likelihood of x, discretised to bins of half-width 1/255, open-ended beyond +-0.999.

    Source: arXiv 2006.11239, Eq. 13.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    cdf_upper = approximate_normal_cdf((x - mean + 1 / 255) * inverse_std)
    cdf_lower = approximate_normal_cdf((x - mean - 1 / 255) * inverse_std)
    probability = torch.where(x < -0.999, cdf_upper, torch.where(x > 0.999, 1 - cdf_lower, cdf_upper - cdf_lower))
    return -probability.clamp(min=1e-12).log()
