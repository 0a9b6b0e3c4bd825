# SPDX-License-Identifier: Apache-2.0
"""DiT: a transformer that is conditioned on the number of a class (Peebles and Xie, arXiv 2212.09748)."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from fastdistill.errors import InputError
from fastdistill.models.families.base import Condition, Family


class DiT(Family):
    """``class_labels``: int64, a number per prompt; ``num_embeds_ada_norm`` stands for no class (the null prompt).

    In training mode DiT randomly drops labels; here the draw does this, so it is switched off in the model.
    """

    name, kind = "dit", DiTTransformer2DModel
    products = ("attn1", "ff")
    pipelines, aliases = ("DiTPipeline",), ("Transformer2DModel",)

    def conditions(self, config: Mapping[str, Any]) -> dict[str, Condition]:
        return {"class_labels": Condition((), "num_embeds_ada_norm + 1", True, config["num_embeds_ada_norm"] + 1)}

    def call(self, model: nn.Module, x_t: Tensor, timestep: Tensor, rows: Mapping[str, Tensor]) -> Any:
        return model(x_t, timestep, class_labels=rows["class_labels"])

    def _encode(
        self, pipeline: Any, texts: list[str], null: bool, config: Mapping[str, Any], options: dict[str, Any]
    ) -> dict[str, Tensor]:
        if options:
            raise InputError.of("options", "none (DiT has no text encoder)", ", ".join(options))
        classes = config["num_embeds_ada_norm"]
        if null and texts == [""]:
            numbers = [classes]
        else:
            numbers = [_number(text, place, pipeline.labels, classes) for place, text in enumerate(texts)]
        return {"class_labels": torch.tensor(numbers, device=pipeline._execution_device)}

    def prepare(self, model: nn.Module) -> Callable[[], None]:
        found = [(m, m.dropout_prob) for m in model.modules() if isinstance(m, LabelEmbedding)]

        def undo() -> None:
            for module, probability in found:
                module.dropout_prob = probability

        for module, _ in found:
            module.dropout_prob = 0.0
        return undo


def _number(text: str, place: int, labels: Mapping[str, int], classes: int) -> int:
    """The number of the class with this name or number."""
    if text in labels:
        return int(labels[text])
    if text.isdecimal() and int(text) < classes:
        return int(text)
    near = difflib.get_close_matches(text, labels, n=3)
    hint = f" (near: {', '.join(map(repr, near))})" if near else ""
    names = "the name of a class, or " if labels else ""
    raise InputError.of(f"prompts[{place}]", f"{names}a number from 0 to {classes - 1}{hint}", repr(text))
