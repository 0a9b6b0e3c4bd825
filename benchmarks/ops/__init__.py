# SPDX-License-Identifier: Apache-2.0
"""One file an op: what is measured of it."""
