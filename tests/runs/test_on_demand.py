# SPDX-License-Identifier: Apache-2.0
"""Runs whose prompts are encoded during the training, with latents of several sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistill import runs
from fastdistill.data.encoded import EncodedRows
from fastdistill.runs.distill import trainer_of
from fastdistill.runs.plan import job_of
from tests.runs.conftest import run_config


@pytest.mark.slow
def test_a_run_goes_on_with_prompts_encoded_on_demand(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """With the stored latents, also if the run began with stored prompts; then the stored prompts are not needed."""
    pytest.importorskip("transformers")
    sizes = {"sizes": [[32, 32], [32, 64]]}
    config = run_config(saved("sdxl"), tmp_path, cache=sizes, train={"steps": 2})
    runs.cache(config)
    begun = runs.distill(config)
    on_demand = dataclasses.replace(config.cache, encodings="on_demand")
    longer = dataclasses.replace(config.train, steps=4)
    config = dataclasses.replace(config, cache=on_demand, train=longer)
    assert runs.cache(config).made == 0
    with trainer_of(runs.opened(config)) as trainer:
        kinds = {name: type(rows) for name, rows in trainer._setting.prompts.items()}  # type: ignore[union-attr]
        assert kinds["encoder_hidden_states"] is EncodedRows and len(trainer._setting.buckets) == 2
        parts: Any = trainer.step.objective._batches._parts  # type: ignore[attr-defined]
        rings = sum(ring.nbytes for part in parts for _, ring in part._prompts)
        assert rings == sum(rows.nbytes for rows in job_of(runs.opened(config), "cpu").prompts.values())
    result = runs.distill(config)
    assert [metrics["step"] for metrics in result.history] == [1, 2, 3, 4]
    assert [metrics["loss"] for metrics in result.history[:2]] == [metrics["loss"] for metrics in begun.history]
