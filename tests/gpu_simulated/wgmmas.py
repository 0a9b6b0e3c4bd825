# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.gpu_simulated.wgmmas``: a line for every kernel with wgmmas: launch, kernel, how many take A from
registers, hazards, and the number of hazards if nothing waited."""

from __future__ import annotations

from benchmarks.kernels import lint
from benchmarks.kernels.launches import LAUNCHES
from benchmarks.kernels.triton import compiled
from tests.gpu_simulated.hazards import hazards


def main() -> None:
    launches = {name: launch for name, launch in LAUNCHES.items() if name.startswith("cross_attention")}
    for one in compiled(launches, (lint.ARCH,)):
        (code,) = lint.code_of(one.cubin).values()
        products = [i for i in code if i.name == "HGMMA"]
        if products:
            found = ", ".join(f"{what} at {address:#x}" for address, what in sorted(hazards(code)))
            planted = hazards([i for i in code if not i.operation.startswith("WARPGROUP.DEPBAR")])
            from_registers = sum(i.operands[1].startswith("R") for i in products)
            print(one.op, one.kernel, from_registers, found, len(planted), sep="\t")


if __name__ == "__main__":
    main()
