# SPDX-License-Identifier: Apache-2.0
"""The diffusion classifier: which class explains the noise in an image best (Li et al. 2023, 2303.16203)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdistill.data.encoded import rows_of
from fastdistill.diffusion.prompts import Rows
from fastdistill.diffusion.schedule import PredictionType, Schedule, check_prediction_type
from fastdistill.errors import InputError
from fastdistill.models.calling import Predictor
from fastdistill.ops import _check, philox


@torch.no_grad()
def diffusion_posterior(
    model: nn.Module,
    x: Tensor,
    prompts: Rows,
    *,
    schedule: Schedule,
    prediction_type: PredictionType | None = None,
    draws: int = 16,
    seed: int = 0,
    rows: Tensor | None = None,
    batch: int = 256,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """p(c | x) for a uniform prior, [N, classes] float32: the softmax over classes of - mean |target - f(x_t, t, c)|^2.

    Squared norms are sums over the elements of a sample, as in the paper. All classes share the same noise, at
    ``draws`` timesteps evenly spaced over the schedule; the noise of a row is drawn by counter from (seed, row).

    Args:
        model: the teacher, in eval mode. x: [N, *S], scaled as for the teacher.
        prompts: one row per class, [classes, ...].
        prediction_type: what the model predicts; None: the default of the schedule.
        rows: [N] int64, the numbers of the rows; None: 0 to N - 1.
        batch: samples per forward. progress: called with (draws done, draws).
    """
    _check.valued(x=x)
    if x.ndim < 2 or not x.dtype.is_floating_point:
        raise InputError.of("x", "floating point [N, ...]", f"{x.dtype} {tuple(x.shape)}")
    _check.whole(draws, "draws", "a whole number from 1")
    _check.require(draws <= len(schedule), "draws", f"at most {len(schedule)}, the timesteps", draws)
    _check.whole(batch, "batch", "a whole number from 1")
    kind = check_prediction_type(prediction_type or schedule.prediction_types[0])
    times = None if schedule.times is None else schedule.times.to(x.device, torch.float32)
    predict = Predictor(model, times=times)
    own = torch.arange(len(x), device=x.device) if rows is None else rows.to(x.device)
    classes = len(next(iter(prompts.values())) if isinstance(prompts, dict) else prompts)
    table = schedule.coefficients(kind).double()
    errors = torch.zeros(len(x), classes, dtype=torch.float64, device=x.device)
    key = torch.tensor(_check.seed(seed), dtype=torch.int64, device=x.device)
    for draw in range(draws):
        t = (2 * draw + 1) * len(schedule) // (2 * draws)
        signal, noise, target_signal, target_noise = table[t].tolist()
        eps = philox.normal(key, key.new_tensor(1 + draw), own, x.shape[1:], stream=philox.INITIAL_NOISE).to(x.dtype)
        x_t, target = signal * x + noise * eps, target_signal * x + target_noise * eps
        pairs = torch.cartesian_prod(torch.arange(len(x)), torch.arange(classes)).to(x.device)
        for pair in torch.split(pairs, batch):
            image, label = pair.unbind(1)
            told = predict(x_t[image], torch.full_like(image, t), rows_of(prompts, label, x.device))
            told = told[:, : x.shape[1]]  # drop the channels of a learned variance
            errors[image, label] += (told - target[image]).double().square().flatten(1).sum(1) / draws
        if progress is not None:
            progress(draw + 1, draws)
    return (-errors).softmax(1).float()
