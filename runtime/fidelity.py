"""Metrics of features, computed by torch-fidelity: Fréchet distance, Inception Score, KID, precision and recall."""

import numpy as np
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

IS_SPLITS = 10
NEIGHBOURS = 3  # k of precision and recall, as in ADM
SEED = 2020  # torch-fidelity's: shuffles before the Inception Score is split, draws the subsets of KID


def statistics(features: Tensor) -> dict[str, np.ndarray]:
    """Mean mu (D,) and covariance sigma (D, D) of features (N, D), in float64."""
    return fid_features_to_statistics(features.double())


def frechet_distance(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) of two Gaussians as statistics gives them."""
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def inception_score(logits: Tensor) -> dict[str, float]:
    """exp of the mean KL divergence between p(class | image) and p(class): mean and deviation over IS_SPLITS parts."""
    found = isc_features_to_metric(logits, splits=IS_SPLITS, shuffle=True, rng_seed=SEED)
    return {"inception_score": found[KEY_METRIC_ISC_MEAN], "inception_score_std": found[KEY_METRIC_ISC_STD]}


def kernel_distance(samples: Tensor, reference: Tensor, subsets: int, subset_size: int) -> dict[str, float]:
    """KID: mean and deviation over pairs of subsets of the squared MMD with the kernel (x.y / D + 1)^3."""
    settings = dict(kid_subsets=subsets, kid_subset_size=subset_size, rng_seed=SEED, verbose=False)
    found = kid_features_to_metric(samples, reference, **settings)
    return {"kid": found[KEY_METRIC_KID_MEAN], "kid_std": found[KEY_METRIC_KID_STD]}


def precision_recall(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """precision: share of the samples inside the reference's manifold; recall: of the reference inside the samples'.

    The manifold of a set is the union of the balls around its members that reach to their NEIGHBOURS-th neighbour.
    """
    # save_cpu_ram: a block of distances at a time; the whole matrix of 50,000 samples would take 10 GB.
    found = prc_features_to_metric(samples, reference, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False)
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}
