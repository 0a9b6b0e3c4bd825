# SPDX-License-Identifier: Apache-2.0
"""Digits on colored backgrounds: the hue depends on the class in a classifier's training data, but not in its tests."""
