"""What Perfetto is given: JSON, slices that nest, arrows that begin and end in them."""

import io
import json
from collections import defaultdict
from typing import Any

from hypothesis import given
from t0_timeline import T, anything, operation, request, served, stage

from benchfs_fuse.observe import perfetto, spans
from benchfs_fuse.observe.spans import Operation, Request, Served
from benchfs_fuse.observe.timeline import KernelTimes, Timelines, join


def written(timelines: Timelines) -> list[dict[str, Any]]:
    file = io.StringIO()
    perfetto.write(timelines, lambda op: f"op{op}", file)
    content = json.loads(file.getvalue())
    assert content["displayTimeUnit"] == "ns"
    events: list[dict[str, Any]] = content["traceEvents"]
    return events


def slices(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[tuple[int, int, str]]]:
    """Return begin and end in ns and name of all slices, by process and track, in their order."""
    found = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            start = round(event["ts"] * 1000)
            found[event["pid"], event["tid"]].append((start, start + round(event["dur"] * 1000), event["name"]))
    return {track: sorted(on_it, key=lambda one: (one[0], -one[1])) for track, on_it in found.items()}


def nest(on_track: list[tuple[int, int, str]]) -> bool:
    """Tell whether each two slices lie within each other or apart."""
    under_way: list[int] = []
    for start, end, _ in on_track:
        while under_way and under_way[-1] <= start:
            under_way.pop()
        if under_way and end > under_way[-1]:
            return False
        under_way.append(end)
    return True


def test_operations_requests_and_daemons_have_tracks_and_arrows_between_them() -> None:
    operations = [
        operation(10, 100, stage(spans.ORDER, 12, 15), received=8),
        operation(50, 120, number=2),
        operation(130, 140, number=3),
    ]
    requests = [request(20, 80, daemon=1), request(60, 90, number=2, of=2), request(95, 300, number=3, of=0)]
    there = {1: [served(30, 70, stage(spans.STORE, 40, 50))], 0: [served(65, 85, number=2)]}
    events = written(join(operations, requests, there, {2: KernelTimes(T, T + 110_000)}))
    assert {event["args"]["name"]: event["pid"] for event in events if event["ph"] == "M"} == {
        "mount": 1,
        "daemon 0": 100,
        "daemon 1": 101,
    }
    tracks = slices(events)
    assert all(map(nest, tracks.values()))
    # The first and the second overlap; the third finds the first track free again.
    assert [name for _, _, name in tracks[1, 0]].count("read") == 2
    assert tracks[1, 1][0] == (T + 50_000, T + 120_000, "read")
    assert (T + 40_000, T + 50_000, spans.STORE) in tracks[101, 0]
    assert (T, T + 110_000, "read") in tracks[1, 0]
    arrows = [event for event in events if event["ph"] in "sf"]
    assert sorted((arrow["ph"], arrow["pid"], round(arrow["ts"] * 1000) - T) for arrow in arrows) == [
        ("f", 100, 65_000),
        ("f", 101, 30_000),
        ("s", 1, 20_000),
        ("s", 1, 60_000),
    ]


def test_stages_of_a_daemon_that_overlap_or_go_on_behind_its_answer_are_cut_off() -> None:
    stages = [
        stage(spans.DISK, 35, 50),
        stage(spans.SUBMIT, 36, 40),
        stage(spans.STORE, 45, 60),
        stage(spans.DISK, 69, 90),
    ]
    events = written(join([], [request(20, 80, of=0)], {0: [served(30, 70, *stages)]}, {}))
    assert [(start - T, end - T, name) for start, end, name in slices(events)[100, 0]] == [
        (30_000, 70_000, "op9"),
        (35_000, 50_000, spans.DISK),
        (36_000, 40_000, spans.SUBMIT),
        (45_000, 50_000, spans.STORE),
        (69_000, 70_000, spans.DISK),
    ]


@given(anything())
def test_whatever_was_recorded_can_be_drawn(
    found: tuple[list[Operation], list[Request], dict[int, list[Served]], dict[int, KernelTimes]],
) -> None:
    timelines = join(*found)
    events = written(timelines)
    tracks = slices(events)
    assert all(map(nest, tracks.values()))
    drawn = [
        name for (process, track), on_it in tracks.items() for _, _, name in on_it if name == "op9" and process == 1
    ]
    assert len(drawn) == len(found[1])
    arrows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] in "sf":
            arrows[event["id"]].append(event)
    exchanges = [one for traced in timelines.operations for one in traced.exchanges] + list(timelines.behind)
    assert len(arrows) == sum(one.served is not None for one in exchanges)
    for begin, end in arrows.values():
        assert (begin["ph"], end["ph"]) == ("s", "f") and begin["pid"] == 1 and end["pid"] >= 100
        for arrow in (begin, end):
            at = round(arrow["ts"] * 1000)
            assert any(start <= at <= stop for start, stop, name in tracks[arrow["pid"], arrow["tid"]] if name == "op9")
        assert begin["name"] == end["name"] == "op9"


def test_nothing_recorded_is_still_a_file() -> None:
    assert [event["ph"] for event in written(join([], [], {}, {}))] == ["M"]
