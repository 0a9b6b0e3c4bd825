# SPDX-License-Identifier: Apache-2.0
"""What guidance does to distributions whose scores are known exactly."""
