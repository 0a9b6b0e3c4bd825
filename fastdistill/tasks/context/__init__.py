# SPDX-License-Identifier: Apache-2.0
"""Digits before colored backgrounds: the color tells the class of a classifier's data and is irrelevant in its tests."""
