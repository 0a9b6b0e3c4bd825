# SPDX-License-Identifier: Apache-2.0
"""A classifier with two layers, data and a canonical set for it, and functions for other processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.distill.cadistill import CaDistill
from fastdistill.distill.canonical_set import CanonicalSet
from fastdistill.distill.classifier import Augmentation, ClassifierSetting
from fastdistill.train import TrainConfig, distributed
from fastdistill.train.loop import fit
from fastdistill.train.state import state_of
from fastdistill.train.step import TrainStep
from tests.harness import untimed

CLASSES, ROWS, OF_SET = 3, 30, 12
OBJECTIVE = CaDistill(posterior=0.25, augment=Augmentation(hue=0.25, noise=0.1))


class Net(nn.Module):
    """Images [B, 3, 4, 4] -> (feature [B, 5], logits [B, 3]); with ``alone`` only the logits."""

    def __init__(self, alone: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Tanh()), nn.Linear(5, CLASSES)
        self.alone = alone

    def forward(self, images: Tensor) -> Any:
        feature = self.body(images)
        return self.head(feature) if self.alone else (feature, self.head(feature))


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(ROWS) % CLASSES


def canonical(**changes: Any) -> CanonicalSet:
    """Rows 0, 2, 4, ... of the data; features are maps [n, 4, 2, 2]."""
    g = torch.Generator().manual_seed(2)
    rows = 2 * torch.arange(OF_SET)
    made = {
        "rows": rows, "prompt_index": data()[1][rows], "clareps": torch.zeros(OF_SET, 3, 4, 4),
        "samples": torch.randn(OF_SET, 3, 4, 4, generator=g), "features": torch.randn(OF_SET, 4, 2, 2, generator=g),
        "values": torch.zeros(OF_SET, 0), "energy": torch.zeros(OF_SET), "settled": torch.ones(OF_SET).bool(),
        "fingerprint": {"teacher": "of the set", "data": "the same"},
    }  # fmt: skip
    return CanonicalSet(**made | changes)


def setting(**changes: Any) -> ClassifierSetting:
    images, labels = data()
    posterior = torch.randn(OF_SET, CLASSES, generator=torch.Generator().manual_seed(3)).softmax(1)
    given = {"student": Net(), "images": images, "labels": labels, "canonical": canonical(), "batch": 8}
    return ClassifierSetting(**given | {"canonical_batch": 6, "posterior": posterior} | changes)


def run(directory: Path | None = None, progress: Any = None, objective: CaDistill = OBJECTIVE, **options: Any) -> Any:
    """A complete run: its final state, and everything that was logged except times."""
    config = TrainConfig(
        **{"steps": 5, "batch": 8, "lr": 1e-2, "eps": 1e-2, "log_every": 2, "checkpoint_every": 2} | options
    )
    first, batch = distributed.part(config.batch, torch.device("cpu"))
    own = setting(batch=batch, first_sample=first, global_batch=config.batch, micro_batch=config.micro_batch)
    step = TrainStep(objective.bind(own), own.student, config, torch.device("cpu"))
    history = fit(step, own.student, own.fingerprint() | objective.describe(), config, directory, progress).history
    state = {name: value.detach().clone() for name, value in state_of(step, own.student).items()}
    return {"state": state, "history": untimed(history)}


def killed(directory: Path) -> None:
    """Kill itself in the middle of a run, after the first checkpoint."""

    def kill(done: int, _: object) -> None:
        while done == 3:
            if (directory / "step-00000002.safetensors").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)

    run(directory, kill)


def ranks(rank: int, directory: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    torch.save(run(), Path(directory) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
