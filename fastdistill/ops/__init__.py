# SPDX-License-Identifier: Apache-2.0
"""The fused ops, each usable alone; ``fastdistill doctor`` prints this index with the kernels of each.

=======================  =============================================================================================
``add_bias``             x + h + bias of each channel: the end of a residual block, channels last
``adamw_ema``            all tensors: clip by the global norm, AdamW, average, low-precision copy and zeroed gradients
``attention``            softmax(scale q k^T) v by the backend that was measured to be the fastest for the shape
``cross_attention``      softmax(scale q k^T + bias) v for up to 512 keys, forward and backward, rows of K and V shared
``feature_match``        sum_l weight_l * distance(student_l, teacher_l) over all taps, loss and gradient in one pass
``geglu``                a gelu(g) after a feed-forward block's gated projection
``group_norm_silu``      group norm with a bias before the statistics, scale and shift and SiLU after, either layout
``layer_norm_modulate``  layer norm, scale and shift of a sample, with the gated residual before it where there is one
``noise_gather``         a batch of noised latents, timesteps and paired, random or null prompts from banks, by counter
``output_match``         a student's output against a guided teacher's and the draw's own target, with gradient
``quantize_rows``        rows in float8 with a scale each, for products in front of a frozen linear layer
=======================  =============================================================================================

All can be captured in a CUDA graph after one call with the same shapes and dtypes: the first launch loads a kernel
and, with Triton, compiles it.
"""

from fastdistill.ops._dispatch import OPS, use, used
from fastdistill.ops.adamw_ema import AdamWGroup, adamw_ema, grad_square_sum
from fastdistill.ops.add_bias import add_bias
from fastdistill.ops.attention import attention, tune_attention
from fastdistill.ops.cross_attention import cross_attention
from fastdistill.ops.feature_match import FeatureMatch, feature_match
from fastdistill.ops.geglu import geglu
from fastdistill.ops.group_norm_silu import group_norm_silu
from fastdistill.ops.layer_norm_modulate import layer_norm_modulate, residual_layer_norm_modulate
from fastdistill.ops.noise_gather import Draw, NoiseGather, empty_draw, noise_gather
from fastdistill.ops.output_match import OutputMatch, Task, output_match
from fastdistill.ops.quantize_rows import quantize_rows

__all__ = [
    "OPS",
    "AdamWGroup",
    "Draw",
    "FeatureMatch",
    "NoiseGather",
    "OutputMatch",
    "Task",
    "adamw_ema",
    "add_bias",
    "attention",
    "cross_attention",
    "empty_draw",
    "feature_match",
    "geglu",
    "grad_square_sum",
    "group_norm_silu",
    "layer_norm_modulate",
    "noise_gather",
    "output_match",
    "quantize_rows",
    "residual_layer_norm_modulate",
    "tune_attention",
    "use",
    "used",
]
