# SPDX-License-Identifier: Apache-2.0
"""Words of ``tl.philox``, Triton's own implementation."""

import triton
import triton.language as tl


@triton.jit
def words(out, seed, N: tl.constexpr):
    """out: [N, 4] int64, for samples 0 to N - 1, block 65536, stream 3 and step 77 of the contract."""
    i = tl.arange(0, N)
    z = tl.zeros([N], dtype=tl.uint32)
    words = tl.philox(seed, i.to(tl.uint32), z + 65536, z + 3, z + 77)
    for k in tl.static_range(4):
        tl.store(out + 4 * i + k, words[k].to(tl.int64, bitcast=False) & 0xFFFFFFFF)
