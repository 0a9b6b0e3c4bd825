# SPDX-License-Identifier: Apache-2.0
"""Runs Triton's compiled kernels without a GPU: Triton's own launcher with a simulated driver, and an interpreter of
PTX that checks every access. See README.md."""
