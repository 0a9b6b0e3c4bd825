# SPDX-License-Identifier: Apache-2.0
"""Training on prompts that are encoded on demand: the same bits as with a stored bank."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.data.prompt_bank import PromptBank
from fastdistill.errors import InputError
from fastdistill.train.state import state_of
from tests import tiny

ROWS = torch.randn(9, 5, 6, generator=torch.Generator().manual_seed(4))
TEXTS = [f"prompt {row}" for row in range(8)]
MADE = {"made": "by hand"}


class Interrupted(BaseException):  # like a kill: nothing is saved
    pass


def looked_up(texts: list[str]) -> Tensor:
    """Rows that do not depend on the size of the batch."""
    return ROWS[[TEXTS.index(text) for text in texts]]


def on_demand(encode: Callable[[list[str]], Tensor] = looked_up) -> PromptBank:
    return PromptBank.on_demand(TEXTS, encode, encoder=MADE, encode_null=lambda text: ROWS[-1:])


def trainer(prompts: PromptBank, **options: Any) -> Any:
    return tiny.trainer(prompts=prompts, **{"steps": 6, "log_every": 2, "checkpoint_every": 2} | options)


def state(trainer: Any) -> dict[str, Tensor]:
    return state_of(trainer.step, trainer.student)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fastdistill-rows")]


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2, "ahead": 1}], ids=str)
def test_a_run_is_that_of_a_stored_bank(tmp_path: Path, options: dict[str, Any]) -> None:
    """Also if stopped and continued, on demand or stored."""
    stored = PromptBank(ROWS, TEXTS, encoder=MADE)
    whole = trainer(stored, **options)
    whole.fit()
    threads: set[str] = set()

    def encode(texts: list[str]) -> Tensor:
        threads.add(threading.current_thread().name.split("_")[0])
        return looked_up(texts)

    def stop(done: int, _: object) -> None:
        if done == 3:
            raise Interrupted

    for banks in ((on_demand(encode), on_demand(encode)), (stored, on_demand(encode)), (on_demand(encode), stored)):
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(Interrupted):
            trainer(banks[0], **options).fit(run, progress=stop)
        again = trainer(banks[1], **options)
        again.fit(run)
        assert same(state(again), state(whole)) and not readers()
    assert threads == {"MainThread", "fastdistill-rows"}  # the main thread for a trial of the models


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastdistill.train.step import TrainStep

    monkeypatch.setitem(TrainStep.compile.__kwdefaults__, "backend", "aot_eager")  # type: ignore[attr-defined]
    eager, compiled = (trainer(on_demand(), execution=execution) for execution in ("eager", "compiled"))
    pairs = zip(eager.fit().history, compiled.fit().history, strict=True)
    for one, two in pairs:  # rounding only: different draws would differ by more
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_an_encoder_that_fails_ends_the_run_by_the_name_of_the_text(tmp_path: Path) -> None:
    calls = itertools.count()

    def encode(texts: list[str]) -> Tensor:
        return looked_up(texts) / (next(calls) < 5)

    with pytest.raises(InputError, match=r"encode\(texts\): expected finite values, got others for 'prompt \d'"):
        trainer(on_demand(encode)).fit(tmp_path)
    assert not readers()
    again = trainer(on_demand())
    assert again.fit(tmp_path).steps == 6


def test_previews_and_the_trial_encode_what_they_need(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def encode(texts: list[str]) -> Tensor:
        asked.append(texts)
        return looked_up(texts)

    preview = {"every": 1, "prompts": ["prompt 7", 2], "steps": 1}
    run = trainer(on_demand(encode), preview=preview, steps=1, decode=lambda x: x[:, :3])
    assert asked == [["prompt 0"]] * 2  # teacher and student
    run.fit(tmp_path)
    assert asked.count(["prompt 2", "prompt 7"]) == 3
