"""What `bench diff` calls a change: the rule, on reports that nobody has run."""

import itertools
import math
import random
from pathlib import Path

import pytest
from bench_help import TINY, Times, make_report
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse.bench import diff, report
from benchfs_fuse.bench.diff import EFFECT_MIN, P_MAX, Verdict, changes, judge, rank_p
from benchfs_fuse.bench.report import BadReport, Report

ROUNDS = st.lists(st.integers(1_000, 10**9), min_size=1, max_size=8)
#: Rounds that lie within 3 % of each other, as on a quiet machine.
QUIET = st.integers(10_000, 10**8).flatmap(
    lambda base: st.lists(st.integers(base, base + base * 3 // 100), min_size=5, max_size=8)
)


def times_of(mount: list[int], tmpfs: list[int]) -> Report:
    return make_report({"mount": {("tree in", ""): mount}, "tmpfs": {("tree in", ""): tmpfs}})


def verdicts(a: Report, b: Report) -> dict[str, Verdict]:
    return {one.place: one.verdict for one in changes(a, b)}


def scaled(rounds: list[int], by: float) -> list[int]:
    return [round(one * by) for one in rounds]


# ── the rank test ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 3), (4, 4), (5, 3)])
def test_the_rank_test_counts_orders(a: int, b: int) -> None:
    """Against the definition: the share of all orders that lie at least as far apart."""
    everything = range(a + b)

    def distance(first: tuple[int, ...]) -> float:
        wins = sum(one > other for one in first for other in everything if other not in first)
        return abs(wins - a * b / 2)

    orders = [distance(first) for first in itertools.combinations(everything, a)]
    for first in itertools.combinations(everything, a):
        p = sum(one >= distance(first) for one in orders) / len(orders)
        others = [one for one in everything if one not in first]
        assert rank_p(list(first), others) == pytest.approx(p)


@given(ROUNDS, ROUNDS)
def test_the_rank_test_has_no_sides(a: list[int], b: list[int]) -> None:
    assert rank_p(a, b) == rank_p(b, a)
    assert 0 < rank_p(a, b) <= 1


@given(st.lists(st.integers(1, 3), min_size=5, max_size=7), st.lists(st.integers(1, 3), min_size=5, max_size=7))
def test_ties_count_against_a_change(a: list[int], b: list[int]) -> None:
    """Broken in favour of a change, ties would never give a larger p."""
    order = [(one, side) for side, rounds in ((0, a), (1, b)) for one in rounds]
    apart = []
    for sign in (1, -1):
        ranked = sorted(order, key=lambda item: (item[0], sign * item[1]))
        places = {0: [], 1: []}  # type: dict[int, list[int]]
        for place, (_, side) in enumerate(ranked):
            places[side].append(place)
        apart.append(rank_p(places[0], places[1]))
    assert rank_p(a, b) >= min(apart) - 1e-12


# ── what a change is ─────────────────────────────────────────────────────────────────────────────────────────────────


@given(ROUNDS, ROUNDS)
def test_what_is_identical_did_not_change(mount: list[int], tmpfs: list[int]) -> None:
    same = times_of(mount, tmpfs)
    assert not set(verdicts(same, same).values()) & {Verdict.SLOWER, Verdict.FASTER}


@given(QUIET, QUIET)
def test_thirty_percent_are_a_change(mount: list[int], tmpfs: list[int]) -> None:
    before, after = times_of(mount, tmpfs), times_of(scaled(mount, 1.3), tmpfs)
    assert verdicts(before, after) == {"mount": Verdict.SLOWER, "tmpfs": Verdict.SAME}
    assert verdicts(after, before) == {"mount": Verdict.FASTER, "tmpfs": Verdict.SAME}


@given(QUIET, QUIET)
def test_what_the_whole_machine_does_is_not_the_mounts_doing(mount: list[int], tmpfs: list[int]) -> None:
    before, after = times_of(mount, tmpfs), times_of(scaled(mount, 1.3), scaled(tmpfs, 1.3))
    assert verdicts(before, after) == {"mount": Verdict.SAME, "tmpfs": Verdict.SLOWER}


@given(QUIET)
def test_what_nobody_feels_is_no_change(mount: list[int]) -> None:
    assert judge(mount, scaled(mount, 1 + (EFFECT_MIN - 1) / 2)) is Verdict.SAME


@pytest.mark.parametrize(("a", "b", "told"), [(3, 3, False), (4, 4, False), (4, 6, True), (5, 5, True), (0, 9, False)])
def test_too_few_rounds_tell_nothing(a: int, b: int, told: bool) -> None:
    assert judge([10] * a, [1000] * b) is (Verdict.SLOWER if told else Verdict.UNKNOWN)


def test_noise_is_called_a_change_as_seldom_as_promised() -> None:
    dice = random.Random(1)
    tries = 1500
    found = sum(
        judge(*([math.exp(dice.gauss(0, 0.5)) * 1e6 for _ in range(5)] for _ in range(2))) is not Verdict.SAME
        for _ in range(tries)
    )
    assert 0 < found <= P_MAX * tries


# ── two folders ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_compared_with_their_own_kind() -> None:
    slow, fast = [200, 201, 202, 203, 204], [100, 101, 102, 103, 104]
    before = make_report({"mount": {("a", "cold"): slow, ("a", "warm"): fast, ("gone", ""): fast}, "tmpfs": {}})
    after = make_report({"mount": {("a", "warm"): fast, ("a", "cold"): slow, ("new", ""): fast}, "tmpfs": {}})
    assert [(one.name, one.heat, one.verdict) for one in changes(before, after)] == [
        ("a", "cold", Verdict.SAME),
        ("a", "warm", Verdict.SAME),
    ]


def test_different_work_is_not_compared() -> None:
    from msgspec.structs import replace

    rows: Times = {"mount": {("a", ""): [1, 2, 3, 4, 5]}}
    a, b = make_report(rows), make_report(rows, sizes=replace(TINY, name="other", names=16))
    with pytest.raises(BadReport, match="one did the work of 'tiny', the other of 'other'"):
        changes(a, b)
    changes(a, make_report(rows, sizes=replace(TINY, name="more rounds", rounds=9)))


def test_nothing_in_common_is_said() -> None:
    with pytest.raises(BadReport, match="nothing in common"):
        changes(make_report({"mount": {("a", ""): [1]}}), make_report({"mount": {("b", ""): [1]}}))


def test_the_exit_code_tells_what_became_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet, tmpfs = [1_000_000 + one for one in range(5)], [500_000 + one for one in range(5)]
    for name, factor in (("a", 1.0), ("slow", 1.3), ("fast", 0.7)):
        (tmp_path / name).mkdir()
        report.save(times_of(scaled(quiet, factor), tmpfs), tmp_path / name, [])
    a, slow, fast = tmp_path / "a", tmp_path / "slow", tmp_path / "fast"
    assert diff.run_diff(a, a, False) == 0
    assert capsys.readouterr().out == "no change beyond noise in 2 rows\n"
    assert diff.run_diff(a, slow, False) == 1
    said = capsys.readouterr().out
    assert "slower" in said and "1.30" in said
    assert "2 rows compared: 1 slower, 0 faster, 1 without change beyond noise" in said
    assert diff.run_diff(a, fast, False) == 0
    assert "1 faster" in capsys.readouterr().out
    assert diff.run_diff(a, slow, True) == 1
    assert '"verdict": "slower"' in capsys.readouterr().out
    with pytest.raises(BadReport, match="holds no report"):
        diff.run_diff(a, tmp_path / "none", False)
