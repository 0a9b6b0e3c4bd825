# SPDX-License-Identifier: Apache-2.0
"""The accuracy of a classifier under attack, and checks whether the result can be trusted.

The attacks are from the adversarial-robustness-toolbox (the extra ``robustness``), with a limit on the maximum norm:
PGD (Madry et al., 1706.06083), APGD with cross-entropy and with the difference of logits ratio (Croce and Hein,
2003.01690), and Square, which only uses outputs (Andriushchenko et al., 1912.00049).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdistill.errors import InputError, described
from fastdistill.evaluate._optional import require
from fastdistill.evaluate.classification import Frozen, check_images, check_labels, logits_of
from fastdistill.models.calling import trial
from fastdistill.ops import _check
from fastdistill.ops.philox import permute

#: Names for ``robustness``; ``attacked`` distinguishes the two losses of APGD.
ATTACKS = ("pgd", "apgd", "square")
_SINGLE = ("pgd", "apgd_ce", "apgd_dlr", "square")
_TOLERANCE = 0.01  # of accuracies in the checks for masking: one percentage point
_SQUARE = 0.8  # share of an image that the first square covers
_LOSS_STEPS = (1, 5, 20)  # numbers of PGD steps over which the loss must rise
_FALL = 0.01  # allowed fall of the loss between two of them, as a share


@dataclass(frozen=True)
class Masking:
    """Whether the gradients used by the white-box attack are meaningful (Carlini et al., 1902.06705, 3.1).

    Attributes:
        failed: a sentence for each failed check; if there are any, the white-box accuracy means nothing.
        square, transfer: for each epsilon, the accuracy under the black-box attack minus that of the same images under
            the white-box attack; below -0.01 the check fails. None: not run.
        beyond: accuracy under the white-box attack with epsilon = the whole range of the images; must be at most 0.01.
        steps, loss: numbers of PGD steps, and the mean cross-entropy after them at the middle epsilon; it must rise.
    """

    failed: tuple[str, ...]
    square: tuple[float, ...] | None
    transfer: tuple[float, ...] | None
    beyond: float
    steps: tuple[int, ...]
    loss: tuple[float, ...]

    @property
    def passed(self) -> bool:
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"passed": self.passed, **plain}


def robustness(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: Sequence[float],
    attacks: Sequence[str] = ATTACKS,
    steps: int = 20,
    pgd_steps: int = 20,
    queries: int = 500,
    queried: int | None = 100,
    seed: int = 0,
    bounds: tuple[float, float] = (-1.0, 1.0),
    transfer_from: nn.Module | None = None,
    batch: int = 512,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """The accuracy of a classifier under attacks, and the checks of gradient masking.

    An image that is misclassified without an attack counts as wrong under every attack. For ``apgd``, an image counts
    as right if it is right after the attacks with both losses (with two classes only cross-entropy is used, because the
    other loss needs three).

    Args:
        model: gives logits, or a tuple that ends with them. images: [n, C, H, W] within ``bounds``. labels: [n] int64.
        epsilon: largest change of a value, in units of the images; several values in ascending order.
        attacks: from ``ATTACKS``. steps: of APGD. pgd_steps: of PGD, with step size epsilon / 4.
        queries: of Square per image. queried: number of images for Square, drawn by the seed; None: all.
        seed: for the starts of the attacks; the same values give the same result if ``batch`` is the same.
        transfer_from: another classifier; the images that APGD makes for it are also tested on this one.
        batch: images per forward. progress: called with (attacks done, all).

    Returns:
        ``n``, ``clean`` (accuracy), ``epsilon``, ``steps``, ``pgd_steps``, ``queries``, ``square_n``, ``seed``; for
        each attack, and ``transfer``, a list of accuracies, one for each epsilon; ``masking`` (``Masking.to_json``), or
        None without a white-box attack.

    Raises:
        InputError: arguments that do not fit. FastdistillError: the extra is missing. Both before anything runs.
    """
    radii = _radii(epsilon)
    names = _names(attacks)
    for name, value in (("steps", steps), ("pgd_steps", pgd_steps), ("queries", queries)):
        _check.whole(value, name, "a whole number from 1")
    if queried is not None:
        _check.whole(queried, "queried", "a whole number from 1, or None")
    logits = _checked(model, images, labels, bounds, seed, batch)
    if transfer_from is not None:
        theirs = logits_of(transfer_from, images[:1]).shape[1]
        _check.require(theirs == logits.shape[1], "transfer_from", f"a classifier of {logits.shape[1]} classes", theirs)
    clean = logits.argmax(1) == labels.to(logits.device)
    rows = _drawn(len(images), queried, seed)
    white = next((name for name in ("apgd", "pgd") if name in names), None)
    count = {"pgd": pgd_steps, "apgd": steps, "square": queries, "transfer": steps}
    ran = [*names, *(["transfer"] if transfer_from is not None else [])]
    total, done = len(ran) * len(radii) + (1 + len(_LOSS_STEPS) if white else 0), 0
    report = progress or (lambda done, total: None)
    report(done, total)

    def right(name: str, radius: float) -> Tensor:
        """[n] bool (for Square: only of its rows)."""
        nonlocal done
        options: dict[str, Any] = {"epsilon": radius, "seed": seed, "bounds": bounds, "batch": batch}
        chosen = rows if name == "square" else torch.arange(len(images))
        chosen = chosen.to(images.device)
        kept = clean[chosen]
        for loss in _losses(name, logits.shape[1]):
            of = transfer_from if name == "transfer" and transfer_from is not None else model
            found = attacked(of, images[chosen], labels.to(images.device)[chosen], loss, steps=count[name], **options)
            kept = kept & (logits_of(model, found, batch=batch).argmax(1) == labels.to(images.device)[chosen])
        done += 1
        report(done, total)
        return kept

    found = {name: [right(name, radius) for radius in radii] for name in ran}
    masking = None
    if white is not None:
        places = {"square": rows.to(images.device), "transfer": torch.arange(len(images), device=images.device)}
        gaps = {
            name: tuple(_mean(b) - _mean(w[at]) for b, w in zip(found[name], found[white], strict=True))
            for name, at in places.items()
            if name in found
        }
        beyond = _mean(right(white, bounds[1] - bounds[0]))
        loss = []
        for number in _LOSS_STEPS:
            options = {"epsilon": radii[len(radii) // 2], "steps": number, "seed": seed, "bounds": bounds}
            made = attacked(model, images, labels, "pgd", batch=batch, **options)  # type: ignore[arg-type]
            after = logits_of(model, made, batch=batch).double()
            loss.append(float(nn.functional.cross_entropy(after, labels.to(after.device))))
            done += 1
            report(done, total)
        masking = _masking(white, radii, gaps, beyond, tuple(loss)).to_json()
    return {
        "n": len(images),
        "clean": _mean(clean),
        "epsilon": list(radii),
        "steps": steps,
        "pgd_steps": pgd_steps,
        "queries": queries,
        "square_n": len(rows) if "square" in names else 0,
        "seed": seed,
        **{name: [_mean(kept) for kept in parts] for name, parts in found.items()},
        "masking": masking,
    }


def attacked(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: str,
    *,
    epsilon: float,
    steps: int,
    seed: int = 0,
    bounds: tuple[float, float] = (-1.0, 1.0),
    batch: int = 512,
) -> Tensor:
    """The images [n, C, H, W] float32 that an attack makes, within epsilon of the originals and within ``bounds``.

    Args:
        attack: ``pgd``, ``apgd_ce``, ``apgd_dlr`` (needs three classes) or ``square``. steps: for Square, queries.
            Other arguments as for ``robustness``.
    """
    _check.require(attack in _SINGLE, "attack", f"one of {', '.join(_SINGLE)}", described(attack))
    (radius,) = _radii([epsilon])
    _check.whole(steps, "steps", "a whole number from 1")
    classes = _checked(model, images, labels, bounds, seed, batch).shape[1]
    _check.require(attack != "apgd_dlr" or classes > 2, "attack", "apgd_ce, for a model of two classes", attack)
    x, y = images.detach().cpu().float(), labels.cpu()
    made = []
    with trial(model), torch.enable_grad(), _seeded(seed):
        for part, own in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
            made.append(torch.from_numpy(_attack(model, part, own, attack, radius, steps, bounds, classes)))
    found = torch.maximum(torch.minimum(torch.cat(made), x + radius), x - radius)  # corrects the toolbox's rounding
    return found.clamp(*bounds).to(images.device)


def _attack(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    attack: str,
    radius: float,
    steps: int,
    bounds: tuple[float, float],
    classes: int,
) -> np.ndarray:
    evasion = require("art.attacks.evasion", "robustness")
    given: dict[str, Any] = {"eps": radius, "max_iter": steps, "batch_size": len(x), "verbose": False}
    y = nn.functional.one_hot(labels, classes).numpy()
    if attack == "square":  # it asks three times for an unchanged image
        padded = nn.functional.pad(x, (0, 1, 0, 1))
        height, width = x.shape[2:]
        share = min(_SQUARE * height * width, min(height, width) ** 2) / padded[0, 0].numel()
        seen = _estimator(Remembered(Cropped(model)), tuple(padded.shape[1:]), classes, bounds)
        found = evasion.SquareAttack(seen, p_init=share, **given).generate(padded.numpy(), y)
        return np.asarray(found, np.float32)[:, :, :-1, :-1].copy()
    seen = _estimator(Frozen(model), tuple(x.shape[1:]), classes, bounds)
    if attack == "pgd":
        steepest = evasion.ProjectedGradientDescent(seen, eps_step=radius / 4, num_random_init=1, **given)
        return np.asarray(steepest.generate(x.numpy(), y), np.float32)
    loss = {"apgd_ce": "cross_entropy", "apgd_dlr": "difference_logits_ratio"}[attack]
    descent = evasion.AutoProjectedGradientDescent(seen, eps_step=2 * radius, nb_random_init=1, loss_type=loss, **given)
    right = seen.predict(x.numpy()).argmax(1) == labels.numpy()
    found = np.asarray(descent.generate(x.numpy(), y), np.float32)
    if right.any():  # the toolbox returns the last point if that is wrong, not the one with the highest loss
        still = seen.predict(found[right]).argmax(1) == labels.numpy()[right]
        best = np.flatnonzero(right)[still]
        found[best] = descent.x_max[still]
    return found


class Remembered(nn.Module):
    """A classifier that caches the results of its last calls, and evaluates only other images [n, *S]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._before: dict[bytes, Tensor] = {}
        self._known: dict[bytes, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        keys = [row.tobytes() for row in images.numpy()]
        known = self._before | self._known
        if new := [place for place, key in enumerate(keys) if key not in known]:
            logits: Tensor = self.model(images[new])
            known |= zip((keys[place] for place in new), logits, strict=True)
        if len(self._known) > 2 * len(keys):
            self._before, self._known = self._known, {}
        self._known |= {key: known[key] for key in keys}
        return torch.stack([known[key] for key in keys])


class Cropped(Frozen):
    """A classifier that ignores the last row and column of its images.

    The toolbox's Square never covers those, and fails if a square is as large as the image. Therefore its images get an
    additional row and column that the classifier ignores, and squares always fit.
    """

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images[:, :, :-1, :-1])


def _estimator(seen: nn.Module, shape: tuple[int, ...], classes: int, bounds: tuple[float, float]) -> Any:
    """The toolbox's adapter through which every attack calls the model."""
    base = require("art.estimators.classification", "robustness").PyTorchClassifier

    class Estimator(base):  # type: ignore[misc, valid-type]
        def predict(self, x: np.ndarray, batch_size: int = 0, **options: Any) -> np.ndarray:
            """All images at once: the toolbox's loader would take longer than a small model."""
            with torch.no_grad():
                logits: Tensor = seen(torch.from_numpy(np.asarray(x, np.float32)))
            return logits.numpy()

    return Estimator(
        model=seen, loss=nn.CrossEntropyLoss(), input_shape=shape, nb_classes=classes, clip_values=bounds,
        device_type="cpu",
    )  # fmt: skip


def _masking(
    white: str, radii: Sequence[float], gaps: dict[str, tuple[float, ...]], beyond: float, loss: tuple[float, ...]
) -> Masking:
    failed = []
    for name, title in (("square", "Square"), ("transfer", "Images made for another model")):
        for radius, gap in zip(radii, gaps.get(name, ()), strict=False):
            if gap < -_TOLERANCE - 1e-9:
                failed.append(f"{title} beat {white} by {-100 * gap:.1f} points at epsilon {radius:g}")
    if beyond > _TOLERANCE:
        failed.append(f"{100 * beyond:.1f} % are right when the whole range is allowed")
    for before, after, steps in zip(loss, loss[1:], _LOSS_STEPS[1:], strict=False):
        if not after >= (1 - _FALL) * before:
            failed.append(f"the loss falls from {before:.3g} to {after:.3g} by step {steps} of PGD")
    return Masking(tuple(failed), gaps.get("square"), gaps.get("transfer"), beyond, _LOSS_STEPS, loss)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds NumPy's global generator, which the toolbox uses; afterwards its former state is restored."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(np.random.SeedSequence(seed % 2**64).generate_state(4))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _checked(
    model: nn.Module, images: Tensor, labels: Tensor, bounds: tuple[float, float], seed: int, batch: int
) -> Tensor:
    """The logits of the images, after checks of all arguments and of the extra."""
    _check.seed(seed)
    low, high = (_check.real(end, "bounds") for end in bounds)
    _check.require(-math.inf < low < high < math.inf, "bounds", "(lowest, highest) finite value of the images", bounds)
    check_images(images, bounds=(low, high))
    require("art.attacks.evasion", "robustness")
    logits = logits_of(model, images, batch=batch)
    check_labels(labels, logits)
    return logits


def _radii(epsilon: Sequence[float]) -> tuple[float, ...]:
    rule = "numbers above 0, ascending"
    is_list = isinstance(epsilon, Sequence) and not isinstance(epsilon, str) and len(epsilon) > 0
    _check.require(is_list, "epsilon", rule, described(epsilon))
    found = tuple(_check.real(one, "epsilon", rule) for one in epsilon)
    _check.require(all(0 < one < math.inf for one in found), "epsilon", rule, described(list(found)))
    _check.require(all(a < b for a, b in itertools.pairwise(found)), "epsilon", rule, described(list(found)))
    return found


def _names(attacks: Sequence[str]) -> list[str]:
    if isinstance(attacks, str) or not attacks or any(name not in ATTACKS for name in attacks):
        raise InputError.of("attacks", f"some of {', '.join(ATTACKS)}", described(attacks))
    return [name for name in ATTACKS if name in attacks]


def _losses(name: str, classes: int) -> tuple[str, ...]:
    if name in ("apgd", "transfer"):
        return ("apgd_ce", "apgd_dlr") if classes > 2 else ("apgd_ce",)
    return (name,)


def _drawn(n: int, many: int | None, seed: int) -> Tensor:
    """The rows for Square, ascending."""
    if many is None or many >= n:
        return torch.arange(n)
    key = torch.tensor([seed, 0], dtype=torch.int64)
    return permute(torch.arange(many), n, key[0], key[1]).sort().values


def _mean(right: Tensor) -> float:
    return float(right.double().mean())
