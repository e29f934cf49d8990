"""Say what changed between two comparisons beyond noise.

A row of a place *changed* if both hold:

* an exact two-sided rank test (Mann and Whitney) over the rounds' times gives P_MAX or less: so seldom do rounds of the
  same thing lie so far apart in order. Ties count against a change. Five rounds on each side are the fewest that can.
* the medians differ by EFFECT_MIN or more: less is nothing that anybody feels.

For what is not the baseline, both must also hold after each side's times were divided by the median of its own
baseline in that row: where the whole machine became slower, the file system did not. Rows of the baseline itself
stand for the machine.
"""

import functools
import math
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from statistics import median

import msgspec
from rich.box import SIMPLE
from rich.table import Table

from .report import BadReport, Report, Row, load, show_table, table_of

#: One row in a hundred that did not change may come out so, by the order of its rounds alone.
P_MAX = 0.01
#: Times as long, or as short. Below this lies what two runs of the same program differ by on one machine.
EFFECT_MIN = 1.10


class Verdict(StrEnum):
    """Say what became of a row."""

    SLOWER = "slower"
    FASTER = "faster"
    SAME = "no change"
    UNKNOWN = "too few rounds"


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Compare one row of one place. Times in ns; ``times``: how many times as long B took, by the medians."""

    place: str
    name: str
    heat: str
    a_ns: float
    b_ns: float
    times: float
    #: ``times`` over that of the baseline in this row; None for the baseline, and where it has no such row.
    times_to_baseline: float | None
    p: float
    verdict: Verdict


@functools.cache
def _orders(a: int, b: int, wins: int) -> int:
    """Count the orders of ``a`` and ``b`` things in which those of the first kind are behind in ``wins`` pairs."""
    if wins < 0:
        return 0
    if not a or not b:
        return int(wins == 0)
    return _orders(a - 1, b, wins - b) + _orders(a, b - 1, wins)


def rank_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the exact two-sided p of the rank test. Ties count half, rounded towards no change."""
    if not a or not b:
        return 1.0
    wins = sum((one > other) + (one == other) / 2 for one in a for other in b)
    fewer = math.ceil(min(wins, len(a) * len(b) - wins))
    orders = sum(_orders(len(a), len(b), number) for number in range(fewer + 1))
    return min(1.0, 2 * orders / math.comb(len(a) + len(b), len(a)))


def judge(a: Sequence[float], b: Sequence[float]) -> Verdict:
    """Compare rounds of one thing, before and after."""
    if not a or not b or rank_p(range(len(a)), range(len(a), len(a) + len(b))) > P_MAX:
        return Verdict.UNKNOWN  # not even the clearest order would do
    times = median(b) / max(1.0, median(a))
    if rank_p(a, b) > P_MAX or max(times, 1 / max(times, 1e-9)) < EFFECT_MIN:
        return Verdict.SAME
    return Verdict.SLOWER if times > 1 else Verdict.FASTER


def _times(report: Report) -> dict[tuple[str, Row], list[float]]:
    return {
        (place, row): cell.times.medians_ns for row, cells in table_of(report).items() for place, cell in cells.items()
    }


def changes(a: Report, b: Report) -> list[Change]:
    """Compare all rows that both have. BadReport: they have none, or did not do the same work."""
    if msgspec.structs.replace(a.sizes, rounds=0, name="") != msgspec.structs.replace(b.sizes, rounds=0, name=""):
        raise BadReport(
            f"one did the work of {a.sizes.name!r}, the other of {b.sizes.name!r}: their times differ anyway"
        )
    before, after = _times(a), _times(b)
    found = []
    for key, ours in before.items():
        if key not in after:
            continue
        place, row = key
        theirs = after[key]
        verdict, times = judge(ours, theirs), median(theirs) / max(1.0, median(ours))
        base_a, base_b = before.get((a.baseline_name, row)), after.get((b.baseline_name, row))
        relative = None
        if place != a.baseline_name and base_a and base_b:
            unit_a, unit_b = max(1.0, median(base_a)), max(1.0, median(base_b))
            relative = times * unit_a / unit_b
            # Times of the same scale as before, so that a clock's single ticks stay small.
            scaled = [one * unit_a / unit_b for one in theirs]
            if verdict is not judge(ours, scaled):
                verdict = Verdict.SAME
        found.append(
            Change(
                place, row.name, row.heat, median(ours), median(theirs), times, relative, rank_p(ours, theirs), verdict
            )
        )
    if not found:
        raise BadReport("the two have nothing in common that was measured")
    return found


def rich_table(found: Sequence[Change]) -> Table:
    """Show what changed."""
    table = Table(title="changed beyond noise", box=SIMPLE)
    for index, head in enumerate(("where", "what", "", "A, ms", "B, ms", "B ÷ A", "to baseline", "p", "")):
        table.add_column(head, justify="right" if 3 <= index <= 7 else "left", no_wrap=True)
    for one in found:
        relative = "–" if one.times_to_baseline is None else f"{one.times_to_baseline:.2f}"
        cells = (f"{one.a_ns / 1e6:,.2f}", f"{one.b_ns / 1e6:,.2f}", f"{one.times:.2f}", relative, f"{one.p:.4f}")
        table.add_row(one.place, one.name, one.heat, *cells, str(one.verdict))
    return table


def summary(a: Report, b: Report, found: Sequence[Change]) -> list[str]:
    """Say in sentences what came out, and what speaks against trusting it."""
    count = {verdict: sum(one.verdict is verdict for one in found) for verdict in Verdict}
    changed = count[Verdict.SLOWER] + count[Verdict.FASTER]
    said = [
        f"{len(found)} rows compared: {count[Verdict.SLOWER]} slower, {count[Verdict.FASTER]} faster, "
        f"{count[Verdict.SAME]} without change beyond noise"
        if changed
        else f"no change beyond noise in {count[Verdict.SAME]} rows"
    ]
    if count[Verdict.UNKNOWN]:
        said.append(f"{count[Verdict.UNKNOWN]} rows have too few rounds to tell")
    base = [one for one in found if one.place == a.baseline_name and one.verdict in (Verdict.SLOWER, Verdict.FASTER)]
    if base:
        said.append(
            f"{len(base)} of the changes are of the baseline {a.baseline_name}: the machine changed, or its load"
        )
    said += [f"{name} is incomplete: {one.trouble}" for name, one in (("A", a), ("B", b)) if not one.complete]
    differing = [
        name
        for name in ("host", "kernel", "cpu", "cpus", "versions")
        if getattr(a.machine, name) != getattr(b.machine, name)
    ]
    if differing:
        said.append(f"A and B differ in {', '.join(differing)}")
    return said


def run_diff(folder_a: Path, folder_b: Path, as_json: bool) -> int:
    """Compare two folders and show what came out; 1 if anything became slower. BadReport."""
    a, b = load(folder_a), load(folder_b)
    found = changes(a, b)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n")
    else:
        changed = [one for one in found if one.verdict in (Verdict.SLOWER, Verdict.FASTER)]
        if changed:
            show_table(rich_table(changed))
        sys.stdout.write("\n".join(summary(a, b, found)) + "\n")
    return int(any(one.verdict is Verdict.SLOWER for one in found))
