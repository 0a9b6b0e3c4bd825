# SPDX-License-Identifier: Apache-2.0
"""A small latent cache, and a function that creates it."""

import torch

from fastdistill.data.latent_cache import generate_latent_cache
from fastdistill.diffusion.sampler import initial_noise

FINGERPRINT = {"teacher": "a" * 8, "sampler": {"steps": 25, "guidance": 7.5}, "seed": 3}
SHAPE = (2, 3, 5)
PROMPT_INDEX = torch.arange(23) % 4


def teacher(rows, prompt_index):
    return initial_noise(3, rows, SHAPE) + prompt_index[:, None, None, None]


def make(path, generate=teacher, **changes):
    arguments = {
        "prompt_index": PROMPT_INDEX,
        "row_shape": SHAPE,
        "dtype": torch.float16,
        "fingerprint": FINGERPRINT,
        "rows_per_shard": 6,
        "batch": 4,
    }
    generate_latent_cache(path, generate, **(arguments | changes))


def content(path):
    """The bytes of every file that a reader reads."""
    return {entry.name: entry.read_bytes() for entry in path.iterdir() if not entry.name.startswith(".")}
