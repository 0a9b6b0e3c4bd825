# SPDX-License-Identifier: Apache-2.0
"""Random numbers that models draw in their forward: dropout, stochastic depth.

All other draws of a step come from its counter. These come from generators with a state, which checkpoints do not
store. An eager step seeds them, so that a resumed run draws the same numbers; a compiled or captured step cannot.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


@contextlib.contextmanager
def seeded(*key: int, device: torch.device) -> Iterator[None]:
    """Inside, the default generators of torch (the CPU's and a GPU's), Python and NumPy are seeded by ``key``, such as
    (seed, step, first sample). Afterwards they are as before. Nothing waits for the device."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    before: tuple[Any, Any] = random.getstate(), np.random.get_state()  # noqa: NPY002
    gpus = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[gpu] for gpu in gpus)):
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


def generator_states(device: torch.device) -> list[bytes]:
    """The state of torch's default generators, on the CPU and on the device."""
    states = [torch.random.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return [state.numpy().tobytes() for state in states]


def drawing(models: Iterable[nn.Module]) -> list[str]:
    """Modules that draw random numbers in their forward, as "0.dropout (Dropout)".

    Those in training mode with a probability above 0 in an attribute whose name, or the name of whose class, has "drop"
    or "stochastic" in it, and torch's RReLU and fractional pooling. What a forward draws without such a module only
    shows when it runs.
    """
    return [
        f"{n} ({type(m).__name__})" for model in models for n, m in model.named_modules() if m.training and _draws(m)
    ]


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
        return True
    kind = type(module).__name__.lower()
    by_class = "drop" in kind or "stochastic" in kind
    for name, value in vars(module).items():
        called = "drop" in name.lower() or (by_class and name in ("p", "prob", "probability", "rate"))
        if called and isinstance(value, float) and 0 < value <= 1:
            return True
    return False
