# SPDX-License-Identifier: Apache-2.0
"""Classifies the color and the digit of an image; fitted only to the real scans, never to images of a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.errors import FastdistillError
from fastdistill.tasks.digits.data import COLORS, DIGITS, SHAPE, scans, tints


class Judge:
    """Predicts the color as the tint with the smallest least-squares residual, and the digit from the remaining ink.

    The digit classifier is a support vector machine with an RBF kernel, fitted to the 1,437 training scans when the
    judge is created. ``accuracy_on_real`` is its accuracy on the 360 held-out scans.

    Raises:
        FastdistillError: scikit-learn is not installed.
    """

    def __init__(self) -> None:
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise FastdistillError("the judge needs scikit-learn: pip install 'fastdistill[demo]'") from error
        kept, held_out = scans()
        self._classifier = SVC(C=10.0, gamma="scale").fit(kept.ink.flatten(1).numpy(), kept.digit.numpy())
        predicted = self._classifier.predict(held_out.ink.flatten(1).numpy())
        self.accuracy_on_real = float((predicted == held_out.digit.numpy()).mean())

    def __call__(self, images: Tensor) -> Tensor:
        """Predicted rows of ``data.PROMPTS``, [n] int64, for images [n, 3, 8, 8] in [-1, 1]."""
        images = images.detach().float().cpu()
        if not len(images):
            return torch.empty(0, dtype=torch.int64)
        color, ink = self.unmixed(images)
        return color * len(DIGITS) + self.digits(ink)

    def features(self, images: Tensor) -> Tensor:
        """[n, 72] float32, the basis of the judge's decisions for images [n, 3, 8, 8] in [-1, 1]: the ink in the
        predicted color [64], and the root mean square residual of each color [8]."""
        _, ink, residual = _unmixed(images.detach().float().cpu())
        return torch.cat([ink.flatten(1), (residual / math.prod(SHAPE)).sqrt()], 1)

    def unmixed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Colors [n] int64 and the ink in them [n, 8, 8] float32 of images [n, 3, 8, 8]."""
        return _unmixed(images.detach().float().cpu())[:2]

    def digits(self, ink: Tensor) -> Tensor:
        """Predicted digits [n] int64 of ink [n, 8, 8] in [0, 1], on the CPU."""
        return torch.from_numpy(self._classifier.predict(ink.flatten(1).numpy()))

    def right(self, images: Tensor, prompt: Tensor) -> Tensor:
        """[n] bool: the image shows both the digit and the color of its prompt (a row of ``data.PROMPTS``)."""
        return self(images) == prompt.cpu()


def _unmixed(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best color [n], the ink in it [n, 8, 8], and the sum of squared residuals for each color [n, 8]: for each
    tint the least-squares ink in [0, 1], then the best tint."""
    tint = tints() / SHAPE[0] ** 0.5  # unit vectors
    ink = torch.einsum("nchw,kc->nkhw", images, tint).div(SHAPE[0] ** 0.5).clamp(0, 1)
    explained = ink[:, :, None] * tints()[None, :, :, None, None]
    residual = (images[:, None] - explained).square().sum((2, 3, 4))
    color = residual.argmin(1)
    assert residual.shape[1] == len(COLORS)
    return color, ink[torch.arange(len(images)), color], residual
