# SPDX-License-Identifier: Apache-2.0
"""KID (by torchmetrics) and CLIP score from given features; for the FID use ``frechet_distance`` of the features."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.evaluate._optional import require

KID_SIZE = 1000  # images per subset


class _Given(nn.Module):
    """A metric's extractor for images that are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def kid(real: Tensor, fake: Tensor, *, subsets: int = 100, size: int = KID_SIZE, seed: int = 0) -> float:
    """Squared maximum mean discrepancy of features under (x.y / D + 1)^3 (Binkowski et al., arXiv 1801.01401). With
    Inception features it is the KID. It is unbiased, so it can be below 0 by chance.

    With more than ``size`` images on both sides it is the mean over ``subsets`` subsets of ``size`` images, drawn by
    ``seed``; otherwise that of all images (on the larger side, of its first ones).
    """
    least = min(len(real), len(fake))
    if least <= size:
        real, fake, subsets, size = real[:least], fake[:least], 1, least
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return float(_metric(real, fake, subsets=subsets, subset_size=size)[0])


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """[N] float64: 100 times the cosine of the CLIP embeddings [N, D] of images and of their prompts, at least 0
    (Hessel et al., arXiv 2104.08718, scaled as in torchmetrics)."""
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
        warnings.simplefilter("ignore")  # a warning that all features are kept in memory
        make = require("torchmetrics.image.kid", "metrics").KernelInceptionDistance
        metric = make(feature=_Given(real.shape[1]), **options).to(real.device)
        metric.update(real.double(), real=True)
        metric.update(fake.to(real.device).double(), real=False)
        return metric.compute()
