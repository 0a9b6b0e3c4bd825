# SPDX-License-Identifier: Apache-2.0
"""Adapters: linear maps of student features to the teacher's channels, applied before the comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdistill.errors import InputError, described
from fastdistill.models.taps import channels
from fastdistill.ops import _check


class _Project(nn.Linear):
    """A linear map of the channels of a vector [B, C], of tokens [B, L, C], or of a map [B, C, ...]."""

    def forward(self, feature: Tensor) -> Tensor:
        feature = feature.to(self.weight.dtype)  # a module kept in float32 outputs float32
        if feature.ndim <= 3:
            return super().forward(feature)
        convolve = nn.functional.conv2d if feature.ndim == 4 else nn.functional.conv3d
        return convolve(feature, self.weight[(..., *[None] * (feature.ndim - 2))], self.bias)


class Adapters(nn.ModuleList):
    """A linear map from the student's channels to the teacher's for each tap, in their order (for maps a 1x1
    convolution); the identity if the channels are equal.

    They are trained with the student: pass their parameters to the same optimizer and gradient clipping, and save their
    ``state_dict`` in checkpoints. An exported student does not need them. (As for the narrower students of BK-SDM and
    random conditioning, arXiv 2305.15798 and 2504.02011.)

    Args:
        pairs: (student channels, teacher channels) of each tap.
        seed: determines the initial weights; torch's global generator is not used. Weights are float32 on the CPU.

    Raises:
        InputError: a pair that is not two positive integers; a seed that is not an int64.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], *, seed: int = 0) -> None:
        if not isinstance(pairs, Sequence):
            raise InputError.of("pairs", "a list of (student channels, teacher channels)", described(pairs))
        for index, pair in enumerate(pairs):
            if not (isinstance(pair, Sequence) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)):
                raise InputError.of(
                    f"pairs[{index}]", "(student channels, teacher channels), both positive", described(pair)
                )
        seed = _check.seed(seed)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            super().__init__(nn.Identity() if s == t else _Project(s, t, dtype=torch.float32) for s, t in pairs)
        self.pairs = tuple((s, t) for s, t in pairs)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One feature per tap -> the same with the teacher's channels; mapped features have the adapters' dtype.

        Features are vectors [B, C], tokens [B, L, C] or maps [B, C, ...].
        """
        if not isinstance(features, list | tuple) or len(features) != len(self):
            got = len(features) if isinstance(features, list | tuple) else described(features)
            raise InputError.of("features", f"{len(self)} tensors, one per adapter", got)
        for index, (feature, (student, _)) in enumerate(zip(features, self.pairs, strict=True)):
            _check.tensors(**{f"features[{index}]": feature})
            if feature.ndim < 2 or channels(feature.shape) != student:
                raise InputError.of(f"features[{index}]", f"{student} channels", f"shape {tuple(feature.shape)}")
        return [adapter(feature) for adapter, feature in zip(self, features, strict=True)]
