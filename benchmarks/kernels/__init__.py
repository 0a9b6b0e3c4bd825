# SPDX-License-Identifier: Apache-2.0
"""What the compilers made of every kernel, without a GPU: registers, spills, shared memory, occupancy."""
