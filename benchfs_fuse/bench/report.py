"""Keep what a comparison has measured in a folder: for programs (JSON), spreadsheets (CSV) and people (Markdown).

A folder of a run that broke off holds what was measured until then; ``complete`` tells.
"""

import csv
import io
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..limits import MIB
from .machine import Machine, MountFacts, Storage, load_note
from .samples import Ratio, Samples, ratio
from .work import Heat, Measure, Sizes

#: Columns that no table exceeds.
_WIDTH_MAX = 1000
JSON_NAME, MARKDOWN_NAME, CSV_NAME = "report.json", "report.md", "samples.csv"


class BadReport(UserError):
    """Refuse a folder that holds no report, or two that cannot be compared."""

    exit_code = 2


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name one directory that was measured, and what holds it."""

    name: str
    storage: Storage


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say where and in which round something was measured. Rounds count from 0."""

    round: int
    place: str
    work: str
    measure: Measure


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold everything that is known about one comparison."""

    complete: bool
    #: Why it is not complete, in a sentence; else "".
    trouble: str
    sizes: Sizes
    #: Names of the place that is measured, and of the one to compare with.
    mount_name: str
    baseline_name: str
    places: tuple[Place, ...]
    machine: Machine
    mount: MountFacts
    #: How caches were dropped before cold parts.
    cold: str
    #: What was not measured, and why.
    left_out: tuple[str, ...]
    samples: tuple[Sample, ...]
    #: Other numbers are other shapes: never read one as the other.
    format: Literal[1] = 1


class Row(NamedTuple):
    """Name what is compared between places."""

    name: str
    heat: Heat

    def __str__(self) -> str:
        """Write name and heat."""
        return f"{self.name}, {self.heat}" if self.heat else self.name


class Cell(NamedTuple):
    """Hold what one place did in one row, over all rounds."""

    times: Samples
    operations: int
    size: int
    latencies_ns: Mapping[int, int]

    @property
    def rate(self) -> str:
        """Return the speed of its median round."""
        return rate_of(self.times.median_ns, self.operations, self.size)


def rate_of(time_ns: float, operations: int, size: int) -> str:
    """Write what people call a speed: operations in a second, or MiB."""
    per_s = 1e9 / max(1.0, time_ns)
    return f"{operations * per_s:,.0f}/s" if operations else f"{size * per_s / MIB:,.0f} MiB/s"


def table_of(report: Report) -> dict[Row, dict[str, Cell]]:
    """Arrange the samples: row → place → what it did. In the order in which they were measured first."""
    found: dict[Row, dict[str, list[Sample]]] = {}
    for sample in report.samples:
        row = Row(sample.measure.name, sample.measure.heat)
        found.setdefault(row, {}).setdefault(sample.place, []).append(sample)
    return {
        row: {place: _cell([one.measure for one in samples]) for place, samples in places.items()}
        for row, places in found.items()
    }


def _cell(measures: Sequence[Measure]) -> Cell:
    latencies: dict[int, int] = {}
    for measure in measures:
        for duration, count in measure.latencies_ns.items():
            latencies[duration] = latencies.get(duration, 0) + count
    first = measures[0]
    return Cell(Samples.of([one.time_ns] for one in measures), first.operations, first.size, latencies)


def ratio_of(cells: Mapping[str, Cell], place: str, baseline: str) -> Ratio | None:
    """Compare a place with the baseline, round by round; None where one of them was not measured."""
    if place not in cells or baseline not in cells:
        return None
    return ratio(cells[place].times, cells[baseline].times)


def percentile_ns(latencies_ns: Mapping[int, int], percent: float) -> int:
    """Return the smallest latency that so many percent of all do not exceed."""
    left = percent / 100 * sum(latencies_ns.values())
    ordered = sorted(latencies_ns)
    for duration in ordered:
        left -= latencies_ns[duration]
        if left <= 0:
            return duration
    return ordered[-1]


# ── for people ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _heads(report: Report) -> list[str]:
    names = [place.name for place in report.places]
    others = [name for name in names if name != report.baseline_name]
    return ["what", "", *names, *(f"{name} ÷ {report.baseline_name}" for name in others)]


def _digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _written(ratio: Ratio | None, extremes: bool) -> str:
    if ratio is None:
        return "–"
    return _digits(ratio.value) + (f" ({_digits(ratio.low)}-{_digits(ratio.high)})" if extremes else "")


def _lines(report: Report, extremes: bool = True) -> Iterator[list[str]]:
    """Yield the cells of the table: rates, and times as ratios to the baseline, with the extremes of the rounds."""
    names = [place.name for place in report.places]
    for row, cells in table_of(report).items():
        rates = [cells[name].rate if name in cells else "–" for name in names]
        ratios = [ratio_of(cells, name, report.baseline_name) for name in names if name != report.baseline_name]
        yield [row.name, row.heat, *rates, *(_written(one, extremes) for one in ratios)]


def rich_table(report: Report, extremes: bool) -> Table:
    """Lay the comparison out for a terminal, with the extremes of the ratios or, for narrow ones, without."""
    table = Table(title=_title(report), box=SIMPLE)
    for index, head in enumerate(_heads(report)):
        table.add_column(head, justify="left" if index < 2 else "right", no_wrap=True)
    for line in _lines(report, extremes):
        table.add_row(*line)
    return table


def _title(report: Report) -> str:
    rounds = 1 + max((sample.round for sample in report.samples), default=-1)
    return f"medians of {rounds} alternating rounds ({report.sizes.name}), every byte checked"


def _markdown_table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    yield line(heads)
    yield line(["---" if index < 2 else "---:" for index in range(len(heads))])
    yield from map(line, lines)
    yield ""


def _latency_lines(report: Report) -> Iterator[list[str]]:
    for row, cells in table_of(report).items():
        for place in report.places:
            cell = cells.get(place.name)
            if cell is not None and cell.latencies_ns:
                shown = (percentile_ns(cell.latencies_ns, percent) for percent in (50, 90, 99, 100))
                yield [str(row), place.name, *(f"{duration / 1000:,.1f}" for duration in shown)]


def markdown(report: Report, pictures: Sequence[str]) -> str:
    """Write the report for people."""
    machine, mount = report.machine, report.mount
    lines = [f"# {report.mount_name} compared with {report.baseline_name}", ""]
    if not report.complete:
        lines += [f"**Incomplete**: {report.trouble}.", ""]
    if note := load_note(machine):
        lines += [f"**{note[0].upper()}{note[1:]}.**", ""]
    lines += [f"{_title(report)[0].upper()}{_title(report)[1:]}. {report.cold[0].upper()}{report.cold[1:]}.", ""]
    lines += _markdown_table(_heads(report), _lines(report))
    lines += [
        f"Rates are those of the median round. ÷: how many times as long as {report.baseline_name}, the median over the"
        " rounds, and the extremes among them. Less is better; 1 is as fast.",
        "",
    ]
    for picture in pictures:
        lines += [f"![{Path(picture).stem}]({picture})", ""]
    if report.left_out:
        lines += ["## Left out", "", *(f"* {sentence}" for sentence in report.left_out), ""]
    lines += ["## Latencies of single operations, µs", ""]
    lines += _markdown_table(["what", "where", "p50", "p90", "p99", "max"], _latency_lines(report))
    lines += ["## Where", ""]
    lines += _markdown_table(
        ["name", "directory", "file system", "options", "knobs"],
        (
            [place.name, one.path, f"{one.filesystem} ({one.source})", one.options, _pairs(one.knobs)]
            for place in report.places
            for one in [place.storage]
        ),
    )
    facts = {
        "machine": f"{machine.host}, {machine.cpu}, {machine.cpus} of {machine.cpus_all} processors, "
        f"{machine.memory_bytes / 2**30:.1f} GiB{', virtual' if machine.virtual else ''}",
        "kernel": f"{machine.kernel}, {machine.distribution}",
        "load average at the start": " ".join(f"{load:.2f}" for load in machine.load),
        "when": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(machine.taken_s)),
        "versions": _pairs(machine.versions),
        "UCX variables": _pairs(machine.ucx_environment),
        "transports by daemon": _pairs(mount.transports),
        "mount started with": " ".join(mount.arguments),
        "not tuned": "; ".join(mount.not_tuned),
    }
    lines += _markdown_table(["", ""], ([name, value or "–"] for name, value in facts.items()))
    return "\n".join(lines)


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items() if value)


def show_table(table: Table, narrow: Table | None = None) -> None:
    """Print a table as wide as it is; ``narrow`` instead, if there is one, on a terminal that it does not fit."""
    console = Console(markup=False, highlight=False)
    width = console.measure(table, options=console.options.update(max_width=_WIDTH_MAX)).maximum
    if console.is_terminal and width > console.width and narrow is not None:
        console.print(narrow)
    else:
        Console(markup=False, highlight=False, width=max(width, console.width)).print(table)


def show(report: Report) -> None:
    """Print the report on standard output."""
    show_table(rich_table(report, extremes=True), rich_table(report, extremes=False))
    sys.stdout.writelines(f"left out: {sentence}\n" for sentence in report.left_out)


# ── the folder ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    new.rename(path)


def save_json(report: Report, folder: Path) -> None:
    """Keep what is known so far: whoever kills us loses nothing of it. OSError."""
    _replace(folder / JSON_NAME, msgspec.json.encode(report))


def save(report: Report, folder: Path, pictures: Sequence[str]) -> None:
    """Write all that is not a picture. OSError."""
    save_json(report, folder)
    text = io.StringIO(newline="")
    sheet = csv.writer(text)
    sheet.writerow(["round", "place", "work", "name", "heat", "time_ns", "operations", "bytes"])
    for sample in report.samples:
        one = sample.measure
        sheet.writerow(
            [sample.round, sample.place, sample.work, one.name, one.heat, one.time_ns, one.operations, one.size]
        )
    _replace(folder / CSV_NAME, text.getvalue().encode())
    _replace(folder / MARKDOWN_NAME, markdown(report, pictures).encode())


def load(folder: Path) -> Report:
    """Read a folder. BadReport says what is wrong with it."""
    path = folder / JSON_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise BadReport(f"{folder} holds no report of a comparison: {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadReport(f"{path} is damaged, or of another version of benchfs: {error}") from None
