# SPDX-License-Identifier: Apache-2.0
"""Embedded tasks: real data, a teacher and a judge that are part of the package."""
