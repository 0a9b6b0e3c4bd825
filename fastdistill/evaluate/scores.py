# SPDX-License-Identifier: Apache-2.0
"""KID, by torchmetrics, and the CLIP score, of features that are given; the FID is their ``frechet_distance``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.evaluate._optional import require

KID_SIZE = 1000  # images of a subset


class _Given(nn.Module):
    """The extractor of a metric whose images are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def kid(real: Tensor, fake: Tensor, *, subsets: int = 100, size: int = KID_SIZE, seed: int = 0) -> float:
    """Squared maximum mean discrepancy of features under (x.y / D + 1)^3 (Binkowski et al., arXiv 1801.01401):
    the KID, where they are Inception's. Unbiased, and below 0 by chance.

    Of more than ``size`` images on both sides it is the mean over ``subsets`` of so many, drawn by ``seed``; of fewer
    that of all (of the first of the larger side).
    """
    least = min(len(real), len(fake))
    if least <= size:
        real, fake, subsets, size = real[:least], fake[:least], 1, least
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return float(_metric(real, fake, subsets=subsets, subset_size=size)[0])


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """[N] float64: 100 times the cosine of the CLIP embeddings [N, D] of images and of their prompts, at least 0
    (Hessel et al., arXiv 2104.08718, in the scale of torchmetrics)."""
    if images.ndim != 2 or images.shape != texts.shape:
        raise InputError.of("texts", f"embeddings like those of the images {tuple(images.shape)}", tuple(texts.shape))
    return 100 * nn.functional.cosine_similarity(images.double(), texts.double()).clamp(min=0)


def _metric(real: Tensor, fake: Tensor, **options: Any) -> Any:
    for argument, features in (("real", real), ("fake", fake)):
        if features.ndim != 2 or len(features) < 2:
            raise InputError.of(argument, "features [N, D] of at least 2 images", tuple(features.shape))
    if real.shape[1] != fake.shape[1]:
        raise InputError.of("fake", f"{real.shape[1]} values per feature, as real has", fake.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all features are kept in memory
        make = require("torchmetrics.image.kid", "metrics").KernelInceptionDistance
        metric = make(feature=_Given(real.shape[1]), **options).to(real.device)
        metric.update(real.double(), real=True)
        metric.update(fake.to(real.device).double(), real=False)
        return metric.compute()
