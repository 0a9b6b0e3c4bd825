# SPDX-License-Identifier: Apache-2.0
"""Training: configuration, the step, checkpoints and the trainer around them.

The modules are imported at first use, because the optimizer alone needs only torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {"AdamWEMA": "optimizer", "DistillTrainer": "trainer", "FitResult": "loop", "TrainConfig": "config"}
__all__ = ["AdamWEMA", "DistillTrainer", "FitResult", "TrainConfig"]

if TYPE_CHECKING:
    from fastdistill.train.config import TrainConfig as TrainConfig
    from fastdistill.train.loop import FitResult as FitResult
    from fastdistill.train.optimizer import AdamWEMA as AdamWEMA
    from fastdistill.train.trainer import DistillTrainer as DistillTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdistill.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastdistill.train.{_HOME[name]}"), name)
