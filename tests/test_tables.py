# SPDX-License-Identifier: Apache-2.0
"""Tables in a terminal."""

import io

from rich.console import Console

from fastdistill.tables import print_table


def test_cells_are_whole_where_the_terminal_is_narrow() -> None:
    printed = io.StringIO()
    row = ("8@10,-1@2,0", "0.502 [0.467, 0.534]", "37")
    print_table(Console(file=printed, width=20), ("schedule", "given back", "passes"), [row], title="Windows")
    lines = printed.getvalue().splitlines()
    assert lines[0].rstrip() == "Windows"
    assert any(all(cell in line for cell in row) for line in lines)
