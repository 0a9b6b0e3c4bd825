# SPDX-License-Identifier: Apache-2.0
"""How the milliseconds of a training step are distributed over kinds of ops, from torch's profiler.

On a GPU each kernel is counted for the op that launched it. In a CUDA graph no op launches kernels, so a kernel is
counted by its own name (plain elementwise kernels are "other" there). On a CPU each op counts without the ops that it
calls; a compiled region is a single op, "other".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

STEPS = 2
OTHER = "other"
# The first whose pattern is in the name of a kernel, an op or a range.
GROUPS = {
    "optimizer": r"adam|grad_square_sum|foreach_(lerp|copy|mul|add|norm)|multi_tensor|clip_grad|optimizer",
    "loss": r"feature_match|output_match|scale_gradients|mse_loss|mseloss"
    r"|match<|finish<|add_samples|(match|finish)_output",
    "attention": r"attention|flash|fmha|sdpa|softmax",
    "norms+activations": r"norm|silu|sigmoid|gelu|geglu|modulate|welford|tanh|add_bias|bias_gradient"
    r"|cluster_(forward|backward)|add_channels",
    "conv+matmul": r"conv|gemm|gemv|(^|[^a-z])(add|b|badd)?mm(_|$|[^a-z])|addmm|bmm|linear|cutlass|cublas|xmma|wgrad"
    r"|dgrad|nvjet|matmul|einsum",
    "copies+casts": r"copy|memcpy|memset|clone|contiguous|(^|::)_?to(_copy)?$|tobackward|transpose_?kernel|nchwto"
    r"|nhwcto|quantize|(^|::|_)cat(_|$|[^a-z])|catarray|fill|zero|ones",
}
_PATTERNS = {group: re.compile(pattern) for group, pattern in GROUPS.items()}


def group(names: Iterable[str]) -> str:
    """The group of the first name (innermost first) that belongs to one."""
    for name in names:
        for found, pattern in _PATTERNS.items():
            if pattern.search(name.lower()):
                return found
    return OTHER


def attribution(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of one run by group, mean over a few runs; on a GPU of its kernels, on a CPU of the whole run."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    run()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            with torch.profiler.record_function("run"):
                run()
        if on_gpu:
            torch.cuda.synchronize(device)
    parts = kernels(profiler.events()) if on_gpu else ops(profiler.events())
    return {name: parts[name] / 1e3 / STEPS for name in (*GROUPS, OTHER)}


def ops(events: Iterable[Any]) -> Counter[str]:
    """Microseconds of profiled ops on a CPU, by group."""
    parts: Counter[str] = Counter()
    for event in events:
        parts[group(_chain(event))] += event.self_cpu_time_total
    return parts


def kernels(events: Iterable[Any]) -> Counter[str]:
    """Microseconds of profiled kernels on a GPU, by group. Kernels count for the op that launched them; if most were
    not launched by ops, all count by their own names."""
    by_op, by_name = Counter[str](), Counter[str]()
    for event in events:
        if event.device_type == DeviceType.CUDA:
            if not event.is_user_annotation:
                by_name[group([event.name])] += event.time_range.elapsed_us()
            continue
        for kernel in event.kernels:
            by_op[group([*_chain(event), kernel.name])] += kernel.duration
    rest = by_name.total() - by_op.total()
    if rest > 0.5 * by_name.total():
        return by_name
    by_op[OTHER] += max(rest, 0)
    return by_op


def _chain(event: Any) -> Iterable[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent
