# SPDX-License-Identifier: Apache-2.0
"""Digits with tints that scatter around the color in the prompt: classes that overlap, for guidance.

Each channel of a tint is the color's +-1 plus N(0, 0.7^2). So the eight colors are the corners of a cube, whose
distribution under guidance is known, within real handwriting.
"""
