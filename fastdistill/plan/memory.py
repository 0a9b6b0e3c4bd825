# SPDX-License-Identifier: Apache-2.0
"""The peak memory of a step by part, for any number of samples, from one trace of a step without memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastdistill.plan.trace import Trace

#: Parts of the memory, with descriptions.
PARTS = {
    "teacher": "weights of the teacher",
    "student": "weights of the student",
    "gradients": "of the student's weights",
    "masters": "float32 copies of 16-bit weights",
    "moments": "of AdamW",
    "averages": "of the weights",
    "adapters": "between features, with gradients and moments",
    "activations": "kept for the backward, and temporary",
    "batch": "what a step draws, and the gradients of its losses",
    "banks": "latents and encodings on the device",
    "encoders": "of texts, where they are encoded while training",
    "gathered": "blocks of a sharded student that are whole for a moment",
    "workspace": "context of the device, libraries, fragmentation",
}
MODELLED = ("gathered", "workspace")  # modelled; the others are sizes of tensors
_WEIGHTS = ("student", "gradients", "masters", "moments", "averages")  # divided among the ranks by sharding
CONTEXT = 600 * 2**20  # bytes of a CUDA context with torch's and the libraries' kernels
_LIBRARIES = 64 * 2**20  # workspaces of cuBLAS and cuDNN
_FRAGMENTS = 0.05  # fraction of the memory that each step allocates and frees


@dataclass(frozen=True)
class Layout:
    """How a step runs, as far as it affects memory.

    graph: in a CUDA graph, where the teacher's forward has its own memory. banks: whether they are on the device.
    ranks: processes that share a batch. sharded: whether the student is divided among them; block: bytes of weights of
    its largest block. cuda: whether it is a GPU.
    """

    graph: bool = False
    banks: bool = True
    ranks: int = 1
    sharded: bool = False
    block: int = 0
    cuda: bool = True


def memory(trace: Trace, micro_batch: int, batch: int, layout: Layout = Layout()) -> dict[str, int]:
    """Bytes of each part (``PARTS``) at the peak, on a rank with ``batch`` samples, ``micro_batch`` at once."""
    sizes, labels = scaled(trace, micro_batch, batch), np.asarray(trace.labels)
    parts = dict.fromkeys(PARTS, 0)
    moving = sizes.copy()
    if not layout.banks:
        moving[labels == "banks"] = 0
    if layout.ranks > 1 and not layout.sharded:  # DDP's buckets stay
        parts["gradients"] = int(sizes[labels == "gradients"].sum())
        moving[labels == "gradients"] = 0
    if layout.graph:  # a branch of a graph never uses memory of the other branch
        own = np.asarray(trace.origins) == "teacher"
        parts["activations"] = int(trace.live(np.where(own, moving, 0)).max(initial=0))
        moving[own] = 0
    alive = _alive(trace, int(trace.live(moving).argmax()))
    for label, size in zip(labels[alive], moving[alive], strict=True):
        parts[{"draw": "batch", "buffers": "batch"}.get(label, label)] += int(size)
    if layout.sharded:
        for part in _WEIGHTS:
            parts[part] = -(-parts[part] // layout.ranks)
        parts["gathered"] = 3 * layout.block  # this block, the next one, and the gradient of one
    parts["workspace"] = int(_FRAGMENTS * (parts["activations"] + parts["gradients"]))
    if layout.cuda:
        parts["workspace"] += CONTEXT + _LIBRARIES * (1 + layout.graph)
    return parts


def total(parts: Mapping[str, int]) -> int:
    return sum(parts.values())


def scaled(trace: Trace, micro_batch: int, batch: int) -> np.ndarray:
    """[storages] int64: the bytes that each storage would have with so many samples."""
    sizes = np.asarray(trace.sizes, dtype=np.int64)
    if not trace.unit:
        return sizes
    labels, origins = np.asarray(trace.labels), np.asarray(trace.origins)
    grows = (sizes % trace.unit == 0) & np.isin(labels, ("activations", "draw", "buffers"))
    whole = grows & ((labels == "draw") | (origins == "draw"))
    each = sizes // trace.unit
    sizes = np.where(grows, each * micro_batch, sizes)
    return np.where(whole, each * batch // trace.parts, sizes)


def _alive(trace: Trace, event: int) -> list[int]:
    """The numbers of the storages that exist after an event."""
    found: dict[int, None] = {}
    for number in trace.events[: event + 1]:
        if number >= 0:
            found[number] = None
        else:
            found.pop(~number)
    return list(found)
