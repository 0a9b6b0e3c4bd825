# SPDX-License-Identifier: Apache-2.0
"""The averaged student: written by name, into a model of its own that it fits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdistill.errors import InputError
from tests.train.ranks import Tiny, make
from tests.train.test_resume import Reordered


def test_an_average_goes_by_name() -> None:
    trainer = make(steps=2, ema_decay=0.5)
    trainer.fit()
    wanted = trainer.ema_student().state_dict()
    found = trainer.ema_student(to=Reordered(6)).state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[k], found[k]) for k in wanted)


def test_an_average_is_written_only_where_it_fits() -> None:
    trainer = make(steps=1)
    trainer.fit()
    other = Tiny(4)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(InputError, match=r"to: .*inner.weight: expected \[6, 3, 3, 3\], got \[4, 3, 3, 3\]"):
        trainer.ema_student(to=other)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    flat = Tiny(6)
    flat.inner.bias = nn.Parameter(torch.ones(1))  # which could be broadcast
    with pytest.raises(InputError, match=r"to: .*inner.bias: expected \[6\], got \[1\]"):
        trainer.step.optimizer.copy_average(trainer.student, flat)
    with pytest.raises(InputError, match=r"to: expected weights with values, got inner.weight on the meta device"):
        trainer.ema_student(to=Tiny(6).to("meta"))
    with pytest.raises(InputError, match=r"to: expected a model of its own, got one that shares inner\.weight"):
        trainer.ema_student(to=trainer.student)
    assert all(p.requires_grad for p in trainer.student.parameters())


def test_a_student_that_cannot_be_copied_can_still_be_exported() -> None:
    """As one whose hook keeps a feature of the last forward."""
    trainer = make(steps=1)
    trainer.fit(progress=lambda done, _: setattr(trainer.student, "kept", next(trainer.student.parameters()) * 2))
    with pytest.raises(InputError, match=r"to: expected a model .*, and the student cannot be copied \(RuntimeError"):
        trainer.ema_student()
    trainer.ema_student(to=Tiny(6))
