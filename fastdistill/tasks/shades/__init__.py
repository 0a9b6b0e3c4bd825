# SPDX-License-Identifier: Apache-2.0
"""Digits whose prompt names a color that the tint of an image only scatters around: classes that overlap, for guidance.

Each channel of a tint is the color's +-1 plus N(0, 0.7^2), so that the eight colors are the corners of a cube, whose
law under guidance is known, inside of real handwriting.
"""
