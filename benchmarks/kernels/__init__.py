# SPDX-License-Identifier: Apache-2.0
"""What the compilers produce for every kernel, without a GPU: registers, spills, shared memory, occupancy."""
