# SPDX-License-Identifier: Apache-2.0
"""The needs of a run before it starts: memory by part, time and disk; without a GPU and without weights."""

from fastdistill.plan.cards import CARDS, GIB, Card, available, card_here, card_named
from fastdistill.plan.plan import Plan, Remedy, default_micro_batch, fits, planned
from fastdistill.plan.step import Job
from fastdistill.plan.trace import Trace

__all__ = [
    "CARDS",
    "GIB",
    "Card",
    "Job",
    "Plan",
    "Remedy",
    "Trace",
    "available",
    "card_here",
    "card_named",
    "default_micro_batch",
    "fits",
    "planned",
]
