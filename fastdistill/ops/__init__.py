# SPDX-License-Identifier: Apache-2.0
"""The fused ops, each usable alone; ``fastdistill doctor`` prints this index with the kernels of each.

==================  ==============================================================================================
``adamw_ema``       clip by the global norm, AdamW, average, low-precision copy and zeroed gradients over all tensors
``feature_match``   sum_l weight_l * distance(student_l, teacher_l) over all taps, loss and gradient in one pass
``noise_gather``    a batch of noised latents, timesteps and paired, random or null prompts from banks, by counter
==================  ==============================================================================================
"""

from fastdistill.ops._dispatch import OPS, use, used
from fastdistill.ops.adamw_ema import AdamWGroup, adamw_ema, grad_square_sum
from fastdistill.ops.feature_match import FeatureMatch, feature_match
from fastdistill.ops.noise_gather import Draw, NoiseGather, empty_draw, noise_gather

__all__ = [
    "OPS",
    "AdamWGroup",
    "Draw",
    "FeatureMatch",
    "NoiseGather",
    "adamw_ema",
    "empty_draw",
    "feature_match",
    "grad_square_sum",
    "noise_gather",
    "use",
    "used",
]
