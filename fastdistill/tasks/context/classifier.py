# SPDX-License-Identifier: Apache-2.0
"""The student of the task: a small convolutional network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdistill.tasks.context.data import DIGITS, SHAPE

FEATURE = 64


class Classifier(nn.Module):
    """images [B, 3, 8, 8] in [-1, 1] -> (feature [B, 64], logits [B, 10]); the initial weights are those of ``seed``.

    Two convolutions, each followed by 2 x 2 max pooling, and a linear layer of all positions, because the position of
    the ink shows the digit. No normalization: with group normalization the classifiers were easier to attack
    (docs/canonical.md).
    """

    def __init__(self, seed: int = 0, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            channels, height, across = SHAPE
            self.body = nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(2 * width * (height // 4) * (across // 4), FEATURE), nn.ReLU(),
            )  # fmt: skip
            self.head = nn.Linear(FEATURE, len(DIGITS))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature: Tensor = self.body(images)
        return feature, self.head(feature)
