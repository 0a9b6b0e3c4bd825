# SPDX-License-Identifier: Apache-2.0
"""The diffusion process: noise schedules, p(t) of random conditioning, samplers."""
