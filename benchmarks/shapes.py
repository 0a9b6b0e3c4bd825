# SPDX-License-Identifier: Apache-2.0
"""Sizes of real models, from their published configurations."""

from __future__ import annotations

Sizes = tuple[int, ...]

# Outputs of the down and up blocks of the Stable Diffusion 1.5 U-Net at 512 x 512: the taps of bk_base.
SD15_TAPS = (
    (320, 32, 32),
    (640, 16, 16),
    (1280, 8, 8),
    (1280, 8, 8),
    (1280, 16, 16),
    (1280, 32, 32),
    (640, 64, 64),
    (320, 64, 64),
)
# The same for SDXL at 1024 x 1024, with its mid block.
SDXL_TAPS = (
    (320, 64, 64),
    (640, 32, 32),
    (1280, 32, 32),
    (1280, 32, 32),
    (1280, 64, 64),
    (640, 128, 128),
    (320, 128, 128),
)
# Every other block of the 28 of PixArt-XL/2 at 512 x 512: 1024 tokens.
PIXART_TAPS = ((1024, 1152),) * 14

# (latent, prompt) of one sample.
SD15_SAMPLE: tuple[Sizes, Sizes] = (4, 64, 64), (77, 768)
SDXL_SAMPLE: tuple[Sizes, Sizes] = (4, 128, 128), (77, 2048)
PIXART_SAMPLE: tuple[Sizes, Sizes] = (4, 64, 64), (120, 4096)
DIT_SAMPLE: tuple[Sizes, Sizes] = (4, 32, 32), ()  # the prompt is a class number
# Other inputs that belong to the prompt: pooled embeddings and time ids; the mask of the tokens.
SDXL_CONDITIONS: tuple[Sizes, ...] = (1280,), (6,)
PIXART_CONDITIONS: tuple[Sizes, ...] = ((120,),)

# Widths of the stages of the SD 1.5 U-Net; a block is a resnet with its time projection, and a transformer.
SD15_WIDTHS = (320, 640, 1280)


def sd15_weights() -> list[Sizes]:
    """The shapes of the parameters of one block of each width."""
    return [shape for width in SD15_WIDTHS for shape in _unet_block(width)]


def _unet_block(width: int) -> list[Sizes]:
    resnet = [(width,), (width,), (width, width, 3, 3), (width,), (width, 1280), (width,)]
    resnet += [(width,), (width,), (width, width, 3, 3), (width,)]
    attention = [(width,), (width,), *[(width, width)] * 4, (width,), (width, width), (width,)]
    cross = [(width, width), (width, 768), (width, 768), (width, width), (width,)]
    return [*resnet, *attention, *cross, (8 * width, width), (8 * width,), (width, 4 * width), (width,)]


def pixart_weights(blocks: int = 28) -> list[Sizes]:
    """The shapes of the parameters of PixArt-XL/2's transformer blocks."""
    width = 1152
    attention = [(width, width), (width,)] * 8
    feed_forward = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(6, width), *attention, *feed_forward] * blocks


# (tokens, heads, head dim, keys of the prompt) of attention: SD-1.5 at 512 x 512, SDXL at 1024 x 1024, PixArt-XL/2.
SD15_ATTENTION = ((4096, 8, 40, 77), (1024, 8, 80, 77), (256, 8, 160, 77))
SDXL_ATTENTION = ((4096, 10, 64, 77), (1024, 20, 64, 77))
PIXART_ATTENTION = ((1024, 16, 72, 120),)
