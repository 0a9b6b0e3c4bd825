# SPDX-License-Identifier: Apache-2.0
"""Loaded before any test module: Triton decides at its first import whether it interprets."""

import tests.gpu_on_cpu  # noqa: F401
