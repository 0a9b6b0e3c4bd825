# SPDX-License-Identifier: Apache-2.0
"""A step of CaDistill (B images and as many canonical ones) against the script that a user would write in PyTorch:
shuffled rows, one forward, the same losses, clipping, AdamW and averaged weights with torch's multi-tensor kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.registry import COMPILED, Case, Run, Workload, generator

SHAPES = [("digits 3x8x8", 8, 16, 64, "cpu"), ("images 3x64x64", 64, 128, 256, "cuda")]  # size, width, batch
SCRIPT = "eager"
_ROWS, _SET, _CLASSES, _FEATURE = 1440, 512, 10, 64
_LR, _DECAY, _CLIP = 2e-3, 0.99, 1.0


def cases() -> Iterator[Case]:
    for name, size, width, batch, device in SHAPES:
        build = functools.partial(_workload, size, width, batch)
        yield Case(
            "cadistill", f"{name} B={batch}", "fp32", device, build, (SCRIPT, COMPILED), headline=device == "cuda"
        )


class Net(nn.Module):
    """Images [B, 3, S, S] -> (feature [B, 64], logits [B, 10])."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o, stride in ((3, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1)):
            layers += [nn.Conv2d(i, o, 3, stride=stride, padding=1), nn.GroupNorm(8, o), nn.SiLU()]
        tail = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * width, _FEATURE), nn.SiLU()]
        self.body, self.head = nn.Sequential(*layers, *tail), nn.Linear(_FEATURE, _CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.body(images)
        return feature, self.head(feature)


class Tables:
    """Images and labels; the canonical set: samples, labels and pooled features of the teacher."""

    def __init__(self, size: int, device: torch.device) -> None:
        g = generator(device)
        self.images, self.samples = (torch.randn(n, 3, size, size, generator=g, device=device) for n in (_ROWS, _SET))
        self.labels = torch.arange(_ROWS, device=device) % _CLASSES
        self.rows = torch.arange(_SET, device=device)
        self.features = torch.randn(_SET, _FEATURE, generator=g, device=device)


def losses(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, own: Tensor, target: Tensor) -> Tensor:
    """CaDistill's default loss as a user would write it."""
    z, logits = model(torch.cat([images, samples]))
    count = len(images)
    loss = F.cross_entropy(logits[:count], labels) + F.cross_entropy(logits[count:], own)
    z, theirs = z[:count], z[count:]
    members = F.one_hot(own, _CLASSES).float()
    prototypes = (members.T @ theirs) / members.sum(0).clamp(min=1)[:, None]
    loss = loss + (1 - F.cosine_similarity(z, prototypes.detach()[labels])).mean()
    loss = loss + 0.5 * (1 - F.cosine_similarity(theirs, prototypes[own])).mean()
    own_theirs, own_target, cross = hsic(theirs, theirs), hsic(target, target), hsic(theirs, target)
    return loss + 0.5 * (1 - cross / (own_theirs * own_target).sqrt())


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_1 (Song et al. 2012, eq. 5) without its constant factor."""
    n = len(x)
    x, y = x - x.mean(0), y - y.mean(0)
    k, m = x @ x.T, y @ y.T
    k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
    return (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) * m.sum(0)).sum()


def script(
    model: nn.Module, tables: Tables, batch: int, loss_of: Callable[..., Tensor], draw: torch.Generator
) -> Callable[[], None]:
    """A step of the script, with rows in shuffled epochs."""
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=_LR, fused=tables.images.is_cuda or None)
    device = tables.images.device

    def rows(count: int) -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(count, generator=draw, device=device).split(batch)[: count // batch]

    of_images, of_set = rows(_ROWS), rows(_SET)

    def step() -> None:
        own, other = next(of_images), next(of_set)
        given = tables.images[own], tables.labels[own], tables.samples[other], tables.labels[other]
        loss_of(model, *given, tables.features[other]).backward()
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - _DECAY)

    return step


def ours(model: nn.Module, tables: Tables, batch: int) -> Any:
    """A step of ``TrainStep``."""
    from fastdistill.distill.cadistill import CaDistill
    from fastdistill.distill.canonical_set import CanonicalSet
    from fastdistill.distill.classifier import ClassifierSetting
    from fastdistill.train import TrainConfig
    from fastdistill.train.step import TrainStep

    none = torch.zeros(_SET, 0)
    labels = tables.labels[tables.rows]
    made = CanonicalSet(tables.rows, labels, none, tables.samples, tables.features, none, none[:, :0], none)
    setting = ClassifierSetting(model, tables.images, tables.labels, made, batch=batch)
    config = TrainConfig(steps=10_000, batch=batch, lr=_LR, ema_decay=_DECAY, clip=_CLIP)
    return TrainStep(CaDistill().bind(setting), model, config, tables.images.device)


def _workload(size: int, width: int, batch: int, device: torch.device) -> Workload:
    tables = Tables(size, device)

    def net() -> nn.Module:
        torch.manual_seed(0)
        return Net(size, width).to(device)

    step = ours(net(), tables, batch)

    def run() -> None:
        step.prepare(0)  # the rows are in memory, so nothing is read ahead
        step()

    compiled = functools.partial(torch.compile, dynamic=False)(losses)
    rivals: dict[str, Run | str] = {
        name: script(net(), tables, batch, loss_of, generator(device))
        for name, loss_of in ((SCRIPT, losses), (COMPILED, compiled))
    }
    return Workload(run, rivals, functools.partial(_check, net(), tables, batch), samples=2 * batch, graphs=False)


def _check(model: nn.Module, tables: Tables, batch: int) -> None:
    """Compare the loss and gradients of a step with those of the script for the same rows; only the sums' order
    differs."""
    bound = ours(model, tables, batch).objective
    counter = torch.tensor([0, 3], device=tables.images.device)
    draw = bound.draw(counter)
    parts = draw.batch.x_t, draw.batch.prompt_index, draw.canonical.x_t, draw.canonical.prompt_index
    found = torch.autograd.grad(bound.loss(draw, counter)[0], list(model.parameters()))
    target = tables.features[draw.canonical.latent_index]
    wanted = torch.autograd.grad(losses(model, *parts, target), list(model.parameters()))
    largest = max(float(value.abs().max()) for value in wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * largest)
