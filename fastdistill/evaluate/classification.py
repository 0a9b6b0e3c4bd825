# SPDX-License-Identifier: Apache-2.0
"""The accuracy of a classifier, its calibration, and which pixels of an image it uses.

A classifier is any module whose output is logits [n, K], or a tuple that ends with logits, such as (feature, logits).
Its forwards here run in eval mode and do not change it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastdistill.errors import InputError, described
from fastdistill.models.calling import compute_dtype, trial
from fastdistill.ops import _check

_BINS = 15  # of confidence (Guo et al. 2017)


class Calibration(NamedTuple):
    """ece: expected calibration error, 0 to 1. nll: mean negative log likelihood of the labels, nats."""

    ece: float
    nll: float


class Frozen(nn.Module):
    """A classifier as a function of images [n, C, H, W] alone: float32 logits [n, K] on the images' device.

    The model is no submodule and its weights are constants, so this module cannot train, move or change it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._held = (model,)
        self._weights = {name: weight.detach() for name, weight in model.named_parameters()}
        self._dtype = compute_dtype(model)
        tensors = [*model.parameters(), *model.buffers()]
        self._device = tensors[0].device if tensors else None

    def forward(self, images: Tensor) -> Tensor:
        found = functional_call(self._held[0], self._weights, (images.to(self._device, self._dtype),))
        return _logits(found, len(images)).to(images.device, torch.float32)


def logits_of(model: nn.Module, images: Tensor, *, batch: int = 512) -> Tensor:
    """Logits [n, K] float32 of images [n, C, H, W], on the images' device.

    Raises:
        InputError: invalid arguments or an output that is not logits.
    """
    check_images(images)
    _check.whole(batch, "batch", "a whole number from 1")
    frozen = Frozen(_module(model))
    with trial(model):
        return torch.cat([frozen(part) for part in torch.split(images.detach(), batch)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch: int = 512) -> float:
    """The share of images [n, C, H, W] whose largest logit is that of their label [n] int64."""
    logits = logits_of(model, images, batch=batch)
    check_labels(labels, logits)
    return _share(logits, labels)


def calibration(logits: Tensor, labels: Tensor) -> Calibration:
    """Expected calibration error, by 15 bins of confidence of equal width (Guo et al. 2017, eq. 3), and mean negative
    log likelihood, for logits [n, K] and labels [n] int64; computed in float64."""
    _check.valued(logits=logits, labels=labels)
    _check.shape(logits, "logits", (None, None), "[n, K]")
    check_labels(labels, logits)
    _finite(logits, "logits")
    logs = logits.detach().double().cpu().log_softmax(1)
    labels = labels.cpu()
    confidence, predicted = logs.exp().max(1)
    place = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, place, (predicted == labels).double() - confidence)
    return Calibration(float(gaps.abs().sum() / len(logs)), float(-logs.gather(1, labels[:, None]).mean()))


def reliance(model: nn.Module, own: Tensor, other: Tensor, labels: Tensor, *, batch: int = 512) -> float:
    """How much a classifier relies on backgrounds: its accuracy on ``own`` [n, C, H, W] (images in front of the
    background of their own label [n]) minus that on ``other`` (the same with backgrounds of other labels)."""
    check_images(other, "other", own.shape if isinstance(own, Tensor) else None)
    return accuracy(model, own, labels, batch=batch) - accuracy(model, other, labels, batch=batch)


def saliency(model: nn.Module, images: Tensor, labels: Tensor, *, batch: int = 512) -> Tensor:
    """[n, H, W] float32, the magnitude of the gradient of a margin in each pixel, summed over channels.

    The margin is the logit of the label [n] minus the largest other logit: unlike the gradient of a likelihood, its
    gradient does not vanish if the classifier is certain.
    """
    check_images(images)
    _check.whole(batch, "batch", "a whole number from 1")
    frozen, parts = Frozen(_module(model)), []
    check_labels(labels, logits_of(model, images[:1]), len(images))
    with trial(model), torch.enable_grad():
        for part, own in _batches(images.detach(), labels.to(images.device), batch):
            x = part.float().requires_grad_()
            margin = margins(frozen(x), own).sum()
            parts.append(torch.autograd.grad(margin, x)[0].abs().sum(1))
    return torch.cat(parts)


def saliency_on(model: nn.Module, images: Tensor, labels: Tensor, mask: Tensor, *, batch: int = 512) -> float:
    """The share of the ``saliency`` of images that is on mask [n, H, W], values in [0, 1]; mean over the images.

    A gradient that is the same in all pixels gives the mask's share of the area (``mask.mean()``), and so does an image
    whose gradient is 0 everywhere.
    """
    check_images(images)
    _check.valued(mask=mask)
    size = (len(images), *images.shape[2:])
    _check.shape(mask, "mask", size, f"{list(size)}, one of each image")
    _within(mask, "mask", 0, 1)
    found, mask = saliency(model, images, labels, batch=batch).double(), mask.to(images.device, torch.float64)
    whole = found.sum((1, 2))
    shares = torch.where(whole > 0, (found * mask).sum((1, 2)) / whole.where(whole > 0, 1), mask.mean((1, 2)))
    return float(shares.mean())


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """[n], the logit of the label minus the largest other logit."""
    own = labels[:, None]
    other = logits.scatter(1, own, float("-inf")).amax(1)
    return logits.gather(1, own)[:, 0] - other


def check_images(
    images: Tensor, argument: str = "images", shape: torch.Size | None = None, bounds: tuple[float, float] | None = None
) -> None:
    """InputError unless images are finite [n, C, H, W] with n >= 1, of this shape and within these bounds."""
    _check.valued(**{argument: images})
    is_one = images.ndim == 4 and images.numel() > 0 and images.dtype.is_floating_point
    _check.require(is_one, argument, "floating point [n, C, H, W]", f"{images.dtype} {tuple(images.shape)}")
    if shape is not None:
        _check.shape(images, argument, tuple(shape), f"the shape of the other images, {tuple(shape)}")
    _finite(images, argument)
    if bounds is not None:
        _within(images, argument, *bounds)


def check_labels(labels: Tensor, logits: Tensor, n: int | None = None) -> None:
    """InputError unless labels are [n] int64 classes of logits [n, K]."""
    _check.valued(labels=labels)
    n = len(logits) if n is None else n
    _check.dtype(labels, "labels", torch.int64)
    _check.shape(labels, "labels", (n,), f"[{n}], one of each image")
    _check.rows(labels.cpu(), "labels", logits.shape[1], "the logits")


def _share(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels.to(logits.device)).double().mean())


def _batches(images: Tensor, labels: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(images, batch), torch.split(labels, batch), strict=True)


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise InputError.of("model", "a module that gives logits", described(model))
    return model


def _logits(output: object, n: int) -> Tensor:
    found = output[-1] if isinstance(output, tuple | list) and output else output
    fits = isinstance(found, Tensor) and found.ndim == 2 and len(found) == n and found.shape[1] > 1
    if not fits:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError.of("model", f"logits [{n}, K] of two classes or more, or a tuple that ends with them", got)
    return found  # type: ignore[return-value]


def _finite(tensor: Tensor, argument: str) -> None:
    _check.require(bool(tensor.isfinite().all()), argument, "finite values", "NaN or infinity")


def _within(tensor: Tensor, argument: str, low: float, high: float) -> None:
    least, most = (float(end) for end in tensor.aminmax())
    _check.require(
        low <= least and most <= high, argument, f"values from {low:g} to {high:g}", f"{least:g} to {most:g}"
    )
