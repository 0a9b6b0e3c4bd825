# SPDX-License-Identifier: Apache-2.0
"""A fix for torch's compiler: without it, compiled ops that write into their outputs give wrong numbers on a CPU.

``SchedulerNode.recompute_size_and_body`` computes the reads of a loop again, but ignores that an op has written to the
buffer since (pytorch/pytorch#185509, in torch 2.13 and before). When two loops are changed to one shape and fused, the
fused loop may then be scheduled before the op whose output it reads.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def keep_order() -> None:
    """Keep the dependency of such a loop on the op that wrote last. No effect in versions of torch that keep it
    themselves."""
    try:
        from torch._inductor.scheduler import SchedulerNode
    except ImportError:  # no compiler in this build of torch
        return
    recompute = SchedulerNode.recompute_size_and_body

    @functools.wraps(recompute)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> None:
        recompute(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    SchedulerNode.recompute_size_and_body = renamed  # type: ignore[method-assign]
