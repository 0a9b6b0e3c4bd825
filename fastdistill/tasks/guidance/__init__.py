# SPDX-License-Identifier: Apache-2.0
"""The effect of guidance on distributions whose scores are known exactly."""
