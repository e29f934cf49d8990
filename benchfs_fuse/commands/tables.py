"""Write what commands have to show: consoles that cut nothing, and columns."""

from collections.abc import Sequence

from rich.console import Console


def make_console() -> Console:
    """Return a console that cuts nothing, and takes nothing in a name for markup."""
    return Console(soft_wrap=True, highlight=False, markup=False)


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lay rows out in columns as wide as their widest cell, whatever the terminal's width is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
