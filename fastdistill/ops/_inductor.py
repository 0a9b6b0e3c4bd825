# SPDX-License-Identifier: Apache-2.0
"""A repair of torch's compiler, without which compiled ops that write into their outputs give wrong numbers on a CPU.

``SchedulerNode.recompute_size_and_body`` works out anew what a loop reads, and forgets that a buffer of that name has
been written to since (pytorch/pytorch#185509, in torch 2.13 and before): once two loops are brought to one shape, the
fused one may be scheduled before the op whose output it reads.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def keep_order() -> None:
    """Have such a loop depend on the op that wrote last, as it did before; where torch does so itself, this changes
    nothing."""
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
