# SPDX-License-Identifier: Apache-2.0
"""One file per op: its benchmark cases."""
