# SPDX-License-Identifier: Apache-2.0
"""Training: configuration, the step, checkpoints and the trainer around them."""

from fastdistill.train.config import TrainConfig
from fastdistill.train.loop import FitResult
from fastdistill.train.optimizer import AdamWEMA
from fastdistill.train.trainer import DistillTrainer

__all__ = ["AdamWEMA", "DistillTrainer", "FitResult", "TrainConfig"]
