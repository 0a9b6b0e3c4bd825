# SPDX-License-Identifier: Apache-2.0
"""GEGLU in eager torch: the specification of the op's kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gelu_and_slope(g: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """gelu(g) and its derivative.

    erf: g Phi(g), Phi(g) + g phi(g).  tanh: g s, s + g s (1 - s) 2u', with u = sqrt(2 / pi) (g + 0.044715 g^3),
    s = sigmoid(2u) and 1 - s = sigmoid(-2u), which is accurate also if s is near 1.
    """
    if tanh:
        root = 2 * math.sqrt(2 / math.pi)
        twice_u = root * (g + 0.044715 * g**3)
        s, rest = twice_u.sigmoid(), (-twice_u).sigmoid()
        return g * s, s + g * s * rest * root * (1 + 3 * 0.044715 * g * g)
    below = torch.special.erfc(g * -math.sqrt(0.5)) / 2  # ndtr of many floats adds 1 to nearly -1 below -1
    return g * below, below + g * (-0.5 * g * g).exp() / math.sqrt(2 * math.pi)


def geglu(x: Tensor, tanh: bool, y: Tensor) -> None:
    """Fill ``y`` [..., D] from ``x`` [..., 2 D]; computed in float32."""
    a, g = x.float().chunk(2, -1)
    y.copy_(a * gelu_and_slope(g, tanh)[0])


def geglu_backward(grad: Tensor, x: Tensor, tanh: bool, dx: Tensor, dbias: Sequence[Tensor] = ()) -> None:
    """Fill ``dx`` like ``x``: (grad gelu(g), grad a gelu'(g)); and ``dbias`` [2 D], if any, with its sum over rows."""
    a, g = x.float().chunk(2, -1)
    value, slope = gelu_and_slope(g, tanh)
    d = torch.cat([grad.float() * value, grad.float() * a * slope], -1)
    dx.copy_(d)
    for total in dbias:
        total.copy_(d.reshape(-1, d.shape[-1]).sum(0))
