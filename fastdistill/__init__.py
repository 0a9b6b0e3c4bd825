# SPDX-License-Identifier: Apache-2.0
"""Distil conditional diffusion models into smaller or cheaper ones, fast."""

__version__ = "0.1.0.dev0"
