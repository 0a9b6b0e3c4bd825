# SPDX-License-Identifier: Apache-2.0
"""CaDistill: a classifier learns from all its data, and from a diffusion teacher through canonical samples of a few.

Xu, Zhang, Pajouheshgar, Suesstrunk 2025 (2506.09955):

    L = L_CE + w_align L_align + w_cano L_cano + w_dist L_dist

The paper names these terms, but their formulas are not public. Ours, where z is the student's feature of an image, z'
that of a canonical sample, h' the teacher's canonical feature, and the prototype of a class the mean of its z' in the
batch:

    L_align = mean 1 - cos(z_i, sg[prototype of y_i])      L_cano = mean 1 - cos(z'_i, prototype of y_i)
    L_dist  = 1 - CKA(Z', H')                              own labels: cross-entropy on the canonical samples
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fastdistill.data.staged import Batches
from fastdistill.data.values import in_memory
from fastdistill.distill.classifier import Augmentation, ClassifierSetting, classes_of, named, rows_pooled
from fastdistill.errors import InputError
from fastdistill.ops import Draw, _check
from fastdistill.train.config import validated

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LEAST = 4  # minimum number of rows for the debiased form
OF_RANK = 4  # the biased form needs this many rows per dimension of a feature
_WEIGHTED = ("own_labels", "align", "canonical", "distance", "posterior")
_OWN_KEY = -(2**63)  # added to the seed: the canonical set has its own draws


def cka(x: Tensor, y: Tensor, *, debiased: bool = True, eps: float = 1e-8) -> Tensor:
    """Linear centered kernel alignment of two features of the same rows, 0-dim.

    HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) of the Gram matrices (Kornblith et al. 2019, 1905.00414): 1 for features
    that are equal up to rotation, scale and shift. The biased form is |Yc^T Xc|_F^2 / (|Xc^T Xc|_F |Yc^T Yc|_F); it is
    near 1 even for independent features if there are fewer rows than dimensions. The debiased form uses HSIC_1 of Song
    et al. 2012, whose mean is 0 for independent features; it can be negative.

    Args:
        x: [n, p], y: [n, q]; computed in float32, or in float64 if x is float64, also under autocast.
        eps: eps^2 is added to the product under the root (for Gram matrices of mean diagonal 1), so features without
            variance have alignment 0 and no gradient.

    Raises:
        InputError: other shapes; fewer than 4 rows (debiased) or 2 rows (biased).
    """
    _check.tensors(x=x, y=y)
    _check.shape(x, "x", (None, None), "features [n, p]")
    _check.shape(y, "y", (len(x), None), f"features [{len(x)}, q] of the same rows")
    least = LEAST if debiased else 2
    _check.require(len(x) >= least, "x", f"at least {least} rows", len(x))
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        a, b = (_gram(feature.to(dtype), debiased) for feature in (x, y))
        count = len(x) * (len(x) - 3) if debiased else len(x) ** 2
        cross, own_a, own_b = ((left * right).sum() / count for left, right in ((a, b), (a, a), (b, b)))
        return cross / (own_a * own_b + eps**2).sqrt()


def _gram(feature: Tensor, debiased: bool) -> Tensor:
    """The Gram matrix of centered rows with mean square 1. Debiased: without the diagonal and U-centered, so that sums
    of products divided by n (n - 3) are HSIC_1."""
    feature = feature - feature.mean(0)
    square = feature.detach().square().sum(1).mean()  # alignment does not change with scale, so this has no gradient
    feature = feature * square.clamp(min=torch.finfo(square.dtype).tiny).rsqrt()
    gram = feature @ feature.T
    if not debiased:
        return gram
    n = len(gram)
    others = 1 - torch.eye(n, dtype=gram.dtype, device=gram.device)
    gram = gram * others
    means = gram.sum(0) / (n - 2)
    return (gram - means[:, None] - means + gram.sum() / ((n - 1) * (n - 2))) * others


@dataclass(frozen=True)
class CaDistill:
    """Settings of CaDistill, checked when they are used.

    align, canonical, distance: weights of L_align, L_cano and L_dist; 0 leaves a term out. own_labels: add
    cross-entropy on the canonical samples. cka: the form of CKA in L_dist; ``biased`` needs a batch of at least 4 rows
    for each dimension of a feature, and warns if it has fewer. target: what L_dist compares to: the teacher's canonical
    feature, or the one-hot ``labels``. pooled: average the teacher's feature over its positions; otherwise every
    position counts. posterior: weight of the divergence from the ``posterior`` of the setting. augment: the
    augmentation of the images (not of the canonical samples).

    With all weights 0 it is plain cross-entropy. Only the form L = L_CE + ... is the paper's; the rest is our choice.
    """

    align: Weight = 1.0
    canonical: Weight = 0.5
    distance: Weight = 0.5
    own_labels: bool = True
    cka: Literal["debiased", "biased"] = "debiased"
    target: Literal["feature", "labels"] = "feature"
    pooled: bool = False
    posterior: Weight = 0.0
    augment: Augmentation | None = None

    @classmethod
    def plain(cls, augment: Augmentation | None = None) -> CaDistill:
        """Only cross-entropy."""
        return cls(0.0, 0.0, 0.0, own_labels=False, augment=augment)

    def bind(self, setting: ClassifierSetting) -> BoundCaDistill:
        config, call = validated(self, "objective"), setting.call
        try:
            return BoundCaDistill(config, setting)
        except BaseException:
            call.close()
            raise

    def describe(self) -> dict[str, object]:
        return dataclasses.asdict(validated(self, "objective"))


class CanonicalDraw(NamedTuple):
    """A batch of images, whose ``prompt_index`` is the label, and the rows of the canonical set."""

    batch: Draw[Any]
    canonical: Draw[Any] | None

    def part(self, start: int, stop: int) -> CanonicalDraw:
        """Images ``start`` to ``stop`` (exclusive) in the same memory, and all canonical rows."""
        return CanonicalDraw(self.batch.part(start, stop), self.canonical)


class BoundCaDistill:
    """Draws images and canonical rows by counter, each once per epoch. Both go through the student in one forward."""

    metric_names = ("loss", "cross_entropy", *_WEIGHTED, "right")
    trained: Sequence[nn.Module] = ()

    def __init__(self, config: CaDistill, setting: ClassifierSetting) -> None:
        self._config, self._setting = config, setting
        device = setting.device
        setting.check_data()
        compared = bool(config.align or config.canonical or config.distance)
        size, self._classes = setting.check_student(compared)
        augment = config.augment
        if augment is not None and augment.hue and setting.images.shape[1] != 3:
            raise InputError.of("augment.hue", "0 for images that have not 3 channels", augment.hue)
        self._samples = setting.first_sample + torch.arange(setting.batch, device=device)
        self._zero = torch.zeros((), dtype=torch.float32, device=device)
        still = torch.tensor([[1.0, 0.0, 0.0, 0.0]], device="cpu")
        coefficients = still if augment is None else augment.coefficients()
        self._batches = self._drawn(
            setting.images, setting.labels, coefficients, setting.batch, setting.first_sample, setting.global_batch
        )
        self._canonical: Batches | None = None
        if compared or config.own_labels or config.posterior:
            labels, rows = setting.check_canonical(self._classes)
            assert setting.canonical is not None
            if config.distance:
                self._targets = self._targets_of(labels, rows, size)
            if config.posterior:
                if setting.posterior is None:
                    raise InputError.of("posterior", "that of the rows of the set, in the setting", None)
                self._posterior = setting.posterior.to(device, torch.float32)
            self._key = torch.tensor([_OWN_KEY, 0], dtype=torch.int64, device=device)
            self._counter = torch.zeros(2, dtype=torch.int64, device=device)
            samples = setting.canonical.samples
            if isinstance(samples, Tensor) or samples.dtype not in _check.FLOATS:
                dtype = samples.dtype if samples.dtype in _check.FLOATS else torch.float32
                samples = in_memory(samples, device, dtype, "canonical")
            self._canonical = self._drawn(samples, labels, still, rows)

    def _drawn(
        self,
        images: Any,
        labels: Tensor,
        coefficients: Tensor,
        batch: int,
        first_sample: int = 0,
        global_batch: int | None = None,
    ) -> Batches:
        """Draws rows; the label takes the place of a latent's prompt."""
        device = self._setting.device
        nothing = torch.zeros(self._classes + 1, 1, device=device)
        never = torch.zeros(len(coefficients), dtype=torch.int64, device=device)
        return Batches(
            images, labels, nothing, coefficients.to(device), never, batch=batch, null_index=self._classes,
            null_probability=0.0, ahead=self._setting.ahead, first_sample=first_sample, global_batch=global_batch,
        )  # fmt: skip

    def _targets_of(self, labels: Tensor, rows: int, size: int) -> Tensor:
        """H' of all rows of the set, [n, D] float32; checks what the alignment requires of a batch."""
        canonical = self._setting.canonical
        assert canonical is not None
        of_labels = self._config.target == "labels"
        table = classes_of(labels, self._classes)
        if not of_labels:
            table = rows_pooled(canonical.features, whole=not self._config.pooled).to(self._setting.device)
        debiased, widest = self._config.cka == "debiased", max(size, table.shape[1])
        least = LEAST if debiased else 2
        _check.require(rows >= least, "canonical_batch", f"at least {least} rows for the {self._config.cka} CKA", rows)
        if not debiased and rows < OF_RANK * widest:
            text = f"at least {OF_RANK * widest} rows for the biased CKA of features of {widest} dimensions"
            why = "below, independent features seem aligned; cka='debiased' has no such limit"
            warnings.warn(f"canonical_batch: expected {text}, got {rows} ({why})", stacklevel=2)
        return table

    def prepare(self, seed: int, step: int) -> None:
        self._setting.call.attach()
        self._batches.prepare(seed, step)
        if self._canonical is not None:
            self._canonical.prepare(seed + _OWN_KEY, step)

    def close(self) -> None:
        self._setting.call.close()
        self._batches.close()
        if self._canonical is not None:
            self._canonical.close()

    def __call__(self, counter: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.loss(self.draw(counter), counter)

    @torch.no_grad()
    def draw(self, counter: Tensor) -> CanonicalDraw:
        batch = self._batches(counter)
        if (augment := self._config.augment) is not None:
            batch = batch.replaced(x_t=augment.turned(batch.x_t, counter, self._samples))
        if self._canonical is None:
            return CanonicalDraw(batch, None)
        self._counter.copy_(counter + self._key)
        return CanonicalDraw(batch, self._canonical(self._counter))

    def loss(self, draw: CanonicalDraw, counter: Tensor) -> tuple[Tensor, list[Tensor]]:
        (batch, canonical), config = draw, self._config
        labels, count, call = batch.prompt_index, len(batch.prompt_index), self._setting.call
        parts = [batch.x_t] if canonical is None else [batch.x_t, canonical.x_t]
        z, logits = call(torch.cat([part.to(call.dtype) for part in parts]))
        logits = logits.float()
        terms = {"cross_entropy": F.cross_entropy(logits[:count], labels)}
        loss = terms["cross_entropy"]
        if canonical is not None:
            terms |= self._canonical_terms(None if z is None else z.float(), logits, labels, canonical)
            loss = sum((float(getattr(config, name)) * term for name, term in terms.items() if name in _WEIGHTED), loss)
        right = (logits.detach()[:count].argmax(1) == labels).float().mean()
        return loss, named(self.metric_names, terms | {"loss": loss, "right": right}, self._zero)

    def _canonical_terms(
        self, z: Tensor | None, logits: Tensor, labels: Tensor, canonical: Draw[Any]
    ) -> dict[str, Tensor]:
        config, count, own = self._config, len(labels), canonical.prompt_index
        terms = {}
        if config.own_labels:
            terms["own_labels"] = F.cross_entropy(logits[count:], own)
        if config.posterior:
            told = self._posterior.index_select(0, canonical.latent_index)
            terms["posterior"] = F.kl_div(logits[count:].log_softmax(1), told, reduction="batchmean")
        if z is None:
            return terms
        z, theirs = z[:count], z[count:]
        if config.align or config.canonical:
            members = classes_of(own, self._classes)
            sizes = members.sum(0)
            prototypes = (members.T @ theirs) / sizes.clamp(min=1)[:, None]
            near = F.cosine_similarity(theirs, prototypes.index_select(0, own))
            terms["canonical"] = (1 - near).mean()
            near = F.cosine_similarity(z, prototypes.detach().index_select(0, labels))
            there = (sizes > 0).index_select(0, labels)  # a class without a row in this batch has no prototype
            terms["align"] = ((1 - near) * there).mean()
        if config.distance:
            target = self._targets.index_select(0, canonical.latent_index)
            terms["distance"] = 1 - cka(theirs, target, debiased=config.cka == "debiased")
        return terms
