"""Run the same random system calls on two directories, and show their first difference with the fewest calls.

python -m benchfs_fuse.testing.differential LEFT RIGHT --seed 1 --runs 100
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchfs_fuse.testing.calls import CALLS, Argument, Call, Kind
from benchfs_fuse.testing.invent import EXTRA_FLAGS, invent
from benchfs_fuse.testing.sides import Allowance, Depth, Difference, Pair, Plan, SideFailedError

# How often to repeat the shrinking passes: each one that removes nothing ends it, this bounds the others.
SHRINK_PASSES_MAX = 8


def _allow_atime(difference: Difference) -> bool:
    """Allow other access times: a FUSE kernel serves cached reads without telling anybody."""
    return difference.field == "atime"


def _allow_allocated(difference: Difference) -> bool:
    """Allow blocks under an empty file: ext4 counts the block that holds its extended attributes."""
    return difference.field == "allocated"


def _allow_xattr_ctime(difference: Difference) -> bool:
    """Allow either ctime where an attribute is set to what it is or removed again: tmpfs moves it, ext4 not."""
    sets = "xattr" in difference.call.name or difference.call.name == "setacl"
    return sets and difference.field in ("ctime", "mtime to ctime")


def _allow_truncate_times(difference: Difference) -> bool:
    """Allow either times where truncate leaves the size as it is: ext4 moves them, tmpfs does not."""
    return difference.field in ("mtime", "ctime", "mtime to ctime") and (
        difference.call.name in ("truncate", "ftruncate") and not difference.context["size moved"]
    )


def _allow_seekdir(difference: Difference) -> bool:
    """Allow EINVAL where a reader seeks in a directory that has been removed: ext4 does, tmpfs does not."""
    return difference.call.name == "seekdir" and {difference.left, difference.right} == {"<EINVAL>", None}


def _allow_chown_nothing(difference: Difference) -> bool:
    """Allow either ctime where chown changes neither owner: the times need not be updated then (POSIX, chown).

    Nor need somebody else be refused it, who would take set-ID bits away: Linux looks whose file it is, FUSE does not.
    """
    if difference.call.name not in ("chown", "lchown", "fchown") or difference.call.args[1:3] != (-1, -1):
        return False
    return difference.field in ("ctime", "mtime to ctime") or (difference.left, difference.right) == (None, "<EPERM>")


def _allow_nodev(difference: Difference) -> bool:
    """Allow EACCES where a device is opened on the left: FUSE mounts are `nodev`, so nobody asks for its driver."""
    return difference.call.name == "open" and (difference.left, difference.right) == ("<EACCES>", "<ENXIO>")


def _allow_unnamed(difference: Difference) -> bool:
    """Allow O_TMPFILE to be refused on the left, where it would have been granted."""
    return difference.call.name == "open_unnamed" and (difference.left, difference.right) == ("<ENOTSUP>", None)


def _allow_ofd_pid(difference: Difference) -> bool:
    """Allow F_GETLK to name, on the left, the process that took a lock of an open file description; Linux says -1."""
    left, right = difference.left, difference.right
    return (
        difference.call.name == "getlk"
        and isinstance(left, tuple)
        and isinstance(right, tuple)
        and (left[:3], left[3:], right[3:]) == (right[:3], (True,), (False,))
    )


def _allow_map_times(difference: Difference) -> bool:
    """Allow any times of what a mapping writes: tmpfs does not move them, others when they come to know of it."""
    return difference.call.name == "map_write" and difference.field in ("mtime", "ctime", "mtime to ctime")


ALLOWANCES: dict[str, Allowance] = {
    "atime": _allow_atime,
    "allocated": _allow_allocated,
    "xattr-ctime": _allow_xattr_ctime,
    "truncate-times": _allow_truncate_times,
    "seekdir": _allow_seekdir,
    "nodev": _allow_nodev,
    "chown-nothing": _allow_chown_nothing,
    "unnamed": _allow_unnamed,
    "ofd-pid": _allow_ofd_pid,
    "map-times": _allow_map_times,
}


def shrink(plan: Plan, found: Difference, run: Callable[[Plan], Difference | None]) -> tuple[Plan, Difference]:
    """Drop calls, and make arguments simpler, as long as `run` still finds a difference of the same kind."""
    best, best_found = replace(plan, calls=plan.calls[: found.index + 1]), found

    def attempt(calls: tuple[Call, ...], depth: Depth) -> bool:
        nonlocal best, best_found
        again = run(Plan(calls, depth)) if calls else None
        if again is None or again.kind() != found.kind():
            return False
        best, best_found = Plan(calls[: again.index + 1], depth), again
        return True

    for depth in Depth:
        if depth is best.depth or attempt(best.calls, depth):
            break
    for _ in range(SHRINK_PASSES_MAX):
        before = best
        _drop_calls(lambda: best.calls, lambda calls: attempt(calls, best.depth))
        _simplify_calls(lambda: best.calls, lambda calls: attempt(calls, best.depth))
        if best == before:
            break
    return best, best_found


def _drop_calls(current: Callable[[], tuple[Call, ...]], attempt: Callable[[tuple[Call, ...]], bool]) -> None:
    length = max(1, len(current()) // 2)
    while length:
        start = 0
        while start < len(current()):
            calls = current()
            if not attempt(calls[:start] + calls[start + length :]):
                start += length
        length //= 2


def _simplify_calls(current: Callable[[], tuple[Call, ...]], attempt: Callable[[tuple[Call, ...]], bool]) -> None:
    index = 0
    while index < len(current()):
        for simpler in _simpler(current()[index]):
            calls = current()
            if index < len(calls) and attempt((*calls[:index], simpler, *calls[index + 1 :])):
                break
        index += 1


def _simpler(call: Call) -> Iterator[Call]:
    if call.uid:
        yield replace(call, uid=0)
    for place, (kind, argument) in enumerate(zip(CALLS[call.name], call.args, strict=True)):
        for value in _simpler_argument(kind, argument):
            yield replace(call, args=(*call.args[:place], value, *call.args[place + 1 :]))


def _simpler_argument(kind: Kind, argument: Argument) -> Iterator[Argument]:
    if isinstance(argument, bytes):
        if kind is Kind.PATH and b"/" in argument.strip(b"/"):
            yield argument.rsplit(b"/", 1)[-1]
        return
    if kind is Kind.OPEN_FLAGS:
        yield from (argument & ~extra for extra in EXTRA_FLAGS if argument & extra == extra)
    elif kind in (Kind.LENGTH, Kind.OFFSET, Kind.SIZE, Kind.EXTENT):
        yield from (value for value in (0, 1, 10, 4096) if value < argument)
    elif kind is Kind.MODE and argument != 0o755:
        yield 0o755
    elif kind is Kind.FILL and argument:
        yield 0


def reproduction(plan: Plan, difference: Difference, seed: int | None = None) -> str:
    """Write a plan as a Python program that runs it on two directories."""
    origin = f"Seed {seed}. " if seed is not None else ""
    comment = "\n".join(f"# {line}" for line in str(difference).splitlines())
    calls = "\n".join(f"    {call}," for call in plan.calls)
    return (
        f"# {origin}Run with two directories: the one under test, the reference.\n{comment}\n"
        "import os\nimport sys\n\n"
        "from benchfs_fuse.testing.calls import TIME_NOW, TIME_OMIT, Call\n"
        "from benchfs_fuse.testing.differential import Depth, Plan, replay\n"
        "from benchfs_fuse.testing.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT\n\n"
        f"CALLS = (\n{calls}\n)\n\n"
        'if __name__ == "__main__":\n'
        f"    sys.exit(replay(Plan(CALLS, {plan.depth}), sys.argv[1], sys.argv[2]))\n"
    )


def replay(plan: Plan, left: str, right: str) -> int:
    """Run a written plan, print the difference if there is one, and return the exit code."""
    with Pair(Path(left), Path(right)) as pair:
        difference = pair.run(plan)
    sys.stdout.write(f"{difference or 'no difference'}\n")
    return 1 if difference else 0


class DifferenceFoundError(AssertionError):
    """Two sides differ; the text is the report, `plan` and `difference` the smallest case."""

    def __init__(self, plan: Plan, difference: Difference, seed: int | None) -> None:
        super().__init__(f"{difference}\n\n{reproduction(plan, difference, seed)}")
        self.plan = plan
        self.difference = difference


def check(pair: Pair, seed: int, count: int) -> None:
    """Compare two sides over the plan of one seed.

    Raises DifferenceFoundError with the smallest case, SideFailedError.
    """
    plan = invent(seed, count, direct=pair.accepts_direct(), zero_range=pair.accepts_zero_range())
    difference = pair.run(plan)
    if difference is not None:
        raise DifferenceFoundError(*shrink(plan, difference, pair.run), seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare two directories over many seeds; print the first difference and exit with 1."""
    parser = argparse.ArgumentParser(prog="differential", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("left", type=Path, help="directory under test")
    parser.add_argument("right", type=Path, help="directory on the reference file system, tmpfs for one")
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--runs", type=int, default=100, help="number of seeds")
    parser.add_argument("--calls", type=int, default=60, help="calls in each run")
    parser.add_argument(
        "--allow", action="append", default=[], choices=sorted(ALLOWANCES), help="a difference to ignore"
    )
    options = parser.parse_args(arguments)
    with Pair(options.left, options.right, tuple(ALLOWANCES[name] for name in options.allow)) as pair:
        for seed in range(options.seed, options.seed + options.runs):
            try:
                check(pair, seed, options.calls)
            except (DifferenceFoundError, SideFailedError) as error:
                sys.stdout.write(f"seed {seed}: {error}\n")
                return 1
    sys.stdout.write(f"{options.runs} runs of {options.calls} calls from seed {options.seed}: no difference\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
