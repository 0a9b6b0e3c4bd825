# SPDX-License-Identifier: Apache-2.0
"""Triton's compiled kernels on a machine without a GPU: its own launcher on a driver that is not there, and an
interpreter of PTX that watches every access. See README.md."""
