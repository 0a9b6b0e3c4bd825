# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits tinted by prompt ("a red seven"): random conditioning on real data in minutes on a CPU."""
