# SPDX-License-Identifier: Apache-2.0
"""Adapters: project student features to the teacher's channels before they are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.models.taps import channels


class _Project(nn.Conv2d):
    """A 1x1 convolution over the channels of a map [B, C, H, W] or of tokens [B, L, C]."""

    def forward(self, feature: Tensor) -> Tensor:
        if feature.ndim == 3:
            return nn.functional.linear(feature, self.weight.flatten(1), self.bias)
        return super().forward(feature)


class Adapters(nn.ModuleList):
    """One 1x1 convolution student -> teacher a tap, in the order of the taps; identity where the channels are equal.

    They are trained with the student: hand their parameters to the same optimizer and gradient clipping and save their
    ``state_dict`` in checkpoints. An exported student does not need them. (BK-SDM's and random conditioning's students
    of smaller width, arXiv 2305.15798 and 2504.02011.)

    ``pairs`` holds (student channels, teacher channels) of each tap. ``seed`` fixes the initial weights and leaves
    torch's global generator alone. Weights are fp32 on the CPU.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], *, seed: int = 0) -> None:
        for index, pair in enumerate(pairs):
            if len(pair) != 2 or min(pair) < 1:
                raise InputError.of(f"pairs[{index}]", "(student channels, teacher channels), both positive", pair)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            super().__init__(nn.Identity() if s == t else _Project(s, t, kernel_size=1) for s, t in pairs)
        self.pairs = tuple((s, t) for s, t in pairs)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """One feature a tap, [B, C_student, H, W] or [B, L, C_student] -> the same with the teacher's channels."""
        if len(features) != len(self):
            raise InputError.of("features", f"{len(self)} tensors, one for each adapter", len(features))
        for index, (feature, (student, _)) in enumerate(zip(features, self.pairs, strict=True)):
            if channels(feature.shape) != student:
                raise InputError.of(f"features[{index}]", f"{student} channels", f"shape {tuple(feature.shape)}")
        return [adapter(feature) for adapter, feature in zip(self, features, strict=True)]
