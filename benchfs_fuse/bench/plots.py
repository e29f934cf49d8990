"""Draw a report as PNG, with matplotlib: the extra ``plot`` brings it."""

import itertools
from pathlib import Path

from ..errors import UserError
from .report import Report, Row, ratio_of, table_of

#: Inches for one bar, and for one picture of a latency distribution; dots for one inch.
_BAR_INCHES, _PICTURE_INCHES, _DPI = 0.16, (4.2, 2.6), 110
#: Distributions beside each other.
_COLUMNS = 3


def draw(report: Report, folder: Path) -> list[str]:
    """Draw the ratios to the baseline and the latency distributions; return the names of the files.

    UserError: matplotlib is not installed. OSError.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed: there are no plots (pip install 'benchfs-fuse[plot]')") from None
    table = table_of(report)
    names = [place.name for place in report.places]
    drawn = []

    others = [name for name in names if name != report.baseline_name]
    rows = [row for row, cells in table.items() if any(ratio_of(cells, name, report.baseline_name) for name in others)]
    if rows:
        figure = Figure(figsize=(9, 1.5 + _BAR_INCHES * len(rows) * (len(others) + 0.5)), dpi=_DPI, layout="tight")
        axes = figure.add_subplot()
        thickness = 0.9 / len(others)
        for index, name in enumerate(others):
            at, values, low, high = [], [], [], []
            for position, row in enumerate(rows):
                ratio = ratio_of(table[row], name, report.baseline_name)
                if ratio is not None:
                    at.append(position + index * thickness)
                    values.append(ratio.value)
                    low.append(ratio.value - ratio.low)
                    high.append(ratio.high - ratio.value)
            # From 1 on: to the left is faster than the baseline, to the right slower.
            lengths = [value - 1 for value in values]
            axes.barh(at, lengths, thickness, left=1, label=name, xerr=[low, high], error_kw={"elinewidth": 0.8})
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yticks([position + 0.45 - thickness / 2 for position in range(len(rows))], list(map(str, rows)))
        axes.tick_params(axis="y", labelsize=7)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_xlabel(f"times as long as {report.baseline_name} (bars: medians; lines: extremes of the rounds)")
        axes.legend(fontsize=7)
        figure.savefig(folder / "ratios.png")
        drawn.append("ratios.png")

    timed: list[Row] = [row for row, cells in table.items() if any(cell.latencies_ns for cell in cells.values())]
    if timed:
        height = -(-len(timed) // _COLUMNS)
        figure = Figure(figsize=(_PICTURE_INCHES[0] * _COLUMNS, _PICTURE_INCHES[1] * height), dpi=_DPI, layout="tight")
        for number, row in enumerate(timed):
            axes = figure.add_subplot(height, _COLUMNS, number + 1)
            for name in names:
                if name not in table[row] or not table[row][name].latencies_ns:
                    continue
                latencies = sorted(table[row][name].latencies_ns.items())
                total = sum(count for _, count in latencies)
                shares = itertools.accumulate(count / total for _, count in latencies)
                axes.step([duration / 1000 for duration, _ in latencies], list(shares), where="post", label=name)
            axes.set_xscale("log")
            axes.set_title(str(row), fontsize=8)
            axes.set_xlabel("µs", fontsize=7)
            axes.set_ylabel("share that took no longer", fontsize=7)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        figure.savefig(folder / "latencies.png")
        drawn.append("latencies.png")
    return drawn
