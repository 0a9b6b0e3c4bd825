# SPDX-License-Identifier: Apache-2.0
"""Measures of an image's background, which is irrelevant to its class, and of its ink, which is relevant."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.tasks.context.data import INK, SHAPE
from fastdistill.tasks.digits import judge as digits

_LARGEST = 10.0  # samples of a model exceed [-1, 1]; pixels from 0 to 255 are an error


def ink(images: Tensor) -> Tensor:
    """[n, 8, 8] float64: the mean over the channels / 0.95, in [0, 1] except for errors of a model."""
    return _checked(images).mean(1) / INK


def chroma(images: Tensor) -> Tensor:
    """[n, 2] float64, the color of the background computed from the image alone: length 0.6 sqrt(3/2), angle 2 pi hue,
    except for the waves behind the ink.

    The least-squares factor of 1 - ink in the two directions of color space without gray.
    """
    images = _checked(images)
    angle = 2 * math.pi * torch.arange(3, dtype=torch.float64) / 3
    plane = math.sqrt(2 / 3) * torch.stack([angle.cos(), angle.sin()])
    behind = 1 - (images.mean(1) / INK).clamp(0, 1)
    found = torch.einsum("nhw,nchw,kc->nk", behind, images, plane)
    return found / behind.square().sum((1, 2)).clamp(min=torch.finfo(torch.float64).tiny)[:, None]


def within(features: Tensor, labels: Tensor) -> float:
    """The trace of the covariance within a class, mean over classes.

    features: [n, ...]. labels: [n] integers.

    Raises:
        InputError: other shapes; a class with one row.
    """
    if labels.ndim != 1 or labels.is_floating_point() or features.ndim < 1 or len(features) != len(labels):
        raise InputError.of("labels", f"[{len(features)}] integers", f"{labels.dtype} {tuple(labels.shape)}")
    rows = features.detach().to("cpu", torch.float64).flatten(1)
    count = Counter(labels.tolist())
    if min(count.values(), default=0) < 2:
        raise InputError.of("labels", "two rows or more of each class", dict(count))
    traces = [rows[labels.cpu() == one].var(0).sum() for one in count]
    return float(torch.stack(traces).mean())


class Judge:
    """The digits' judge, a support vector machine fitted to the training scans, for the ink of an image without hue.

    Raises:
        FastdistillError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        self._judge = _judge()

    def digits(self, images: Tensor) -> Tensor:
        """Predicted digits [n] int64 of images [n, 3, 8, 8]; InputError for images out of range."""
        if not len(images):
            return torch.empty(0, dtype=torch.int64)
        return self._judge.digits(ink(images).clamp(0, 1).float()).cpu()

    def right(self, images: Tensor, digit: Tensor) -> Tensor:
        """[n] bool: the image shows its digit [n]."""
        return self.digits(images) == digit.cpu()


@cache
def _judge() -> digits.Judge:
    return digits.Judge()


def _checked(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1:] != SHAPE:
        given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError.of("images", f"[n, {', '.join(map(str, SHAPE))}]", given)
    found = images.detach().to("cpu", torch.float64)
    if not found.isfinite().all() or found.abs().gt(_LARGEST).any():
        worst = float(found.abs().nan_to_num(nan=math.inf).max())
        raise InputError.of("images", f"finite values around [-1, 1], none beyond {_LARGEST:g}", worst)
    return found
