# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits colored by the prompt ("a red seven"): random conditioning on real data, minutes on a CPU."""
