# SPDX-License-Identifier: Apache-2.0
"""Digits before colored backgrounds: their hue tells the class in a classifier's data, and nothing in its tests."""
