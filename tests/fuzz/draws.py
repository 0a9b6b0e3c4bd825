# SPDX-License-Identifier: Apache-2.0
"""Arguments of the draw of a batch. Its kernels give the bits of the reference, and noise within 4e-6."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdistill.ops import noise_gather
from tests.fuzz.calls import Call
from tests.fuzz.tensors import Spec, limited, plain, sizes, small_sizes, spec

PROMPTS = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8, torch.float64)


def noise_gather_call(draw: Any) -> Call:
    rows, texts, steps = (draw(st.sampled_from((1, 2, 5, 11))) for _ in range(3))
    batch = draw(small_sizes)
    kind = draw(st.sampled_from(("one", "one", "list", "tuple", "dict")))
    banks = [_bank(draw, texts) for _ in range(1 if kind == "one" else draw(st.sampled_from((1, 2, 9))))]
    named = {"one": banks[0], "list": banks, "tuple": tuple(banks), "dict": {f"b{i}": b for i, b in enumerate(banks)}}
    arguments: dict[str, Any] = {
        "latents": plain(spec(draw, (rows, *limited((*draw(st.lists(sizes, min_size=1, max_size=2)), rows))[:-1]))),
        "latent_prompts": Spec((rows,), torch.int64, below=texts + (draw(st.integers(0, 15)) == 15)),
        "prompts": named[kind],
        "coefficients": plain(spec(draw, (steps, 4), torch.float32, values="normal", scale=0.2)),
        "replace": Spec((steps,), torch.int64, below=2**32),
        "counter": Spec((2,), torch.int64, below=draw(st.sampled_from((2**40, 3, 2**62)))),
        "batch": batch,
        "null_index": draw(st.integers(0, texts - 1)),
        "null_probability": draw(st.sampled_from((0.1, 0.0, 1.0, 0.5))),
        "pool": draw(st.sampled_from((None, 1, texts))),
        "first_sample": draw(st.sampled_from((0, 3))),
        "global_batch": draw(st.sampled_from((None, batch + 3, batch + 100))),
        "with_replacement": draw(st.booleans()),
        "target": draw(st.booleans()),
    }
    if arguments["first_sample"] and arguments["global_batch"] is None:
        arguments["global_batch"] = batch + 3
    if draw(st.integers(0, 7)) == 7:
        arguments["latent_rows"] = rows * draw(st.sampled_from((1, 3)))
        arguments["prompt_rows"] = draw(st.sampled_from((0, texts)))
        ring = draw(st.sampled_from((1, 2, 3)))
        latents = arguments["latents"]
        arguments["latents"] = Spec(**{**vars(latents), "shape": (ring * batch, *latents.shape[1:])})
        arguments["latent_prompts"] = Spec((arguments["latent_rows"],), torch.int64, below=texts)

    if draw(st.booleans()):  # a layout that kernels support
        arguments = tree_map_only(Spec, lambda one: Spec(**{**vars(one), "layout": "contiguous"}), arguments)

    def function(**given: Any) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(tuple(noise_gather(**given))))

    return Call("noise_gather", function, arguments, None, close=4e-6)


def _bank(draw: Any, texts: int) -> Spec:
    return plain(spec(draw, (texts, *draw(st.lists(small_sizes, max_size=2))), draw(st.sampled_from(PROMPTS))))
