"""Make reports of comparisons that nobody has run."""

from collections.abc import Mapping, Sequence

from benchfs_fuse.bench.machine import Machine, MountFacts, Storage
from benchfs_fuse.bench.report import Place, Report, Sample
from benchfs_fuse.bench.work import Heat, Measure, Sizes
from benchfs_fuse.limits import MIB

TINY = Sizes("tiny", 1, 6, MIB, MIB // 4, 8, MIB)

STORAGE = Storage("/mnt", "tmpfs", "none", "/", "rw", 1 << 40, {"/sys/knob": "1"})
MACHINE = Machine(
    *("host", 0.0, "6.1", "Debian", "cpu", 2, 2, 1 << 33, True, (0.1, 0.1, 0.1), {"benchfs": "0.1.0"}, {}),
)
FACTS = MountFacts(STORAGE, "0.1.0", {"0": "shm"}, (), ("/mnt", "--registry-dir", "/reg"))

#: Place → row → time of each round, ns.
Times = Mapping[str, Mapping[tuple[str, Heat], Sequence[int]]]


def make_report(times: Times, *, sizes: Sizes = TINY, trouble: str = "") -> Report:
    """Make a report; the places are "mount", "tmpfs", and whatever else has times."""
    samples = tuple(
        Sample(number, place, "some work", Measure(name, heat, time_ns, 10, 4096, {time_ns // 10: 9, time_ns: 1}))
        for place, rows in times.items()
        for (name, heat), rounds in rows.items()
        for number, time_ns in enumerate(rounds)
    )
    return Report(
        complete=not trouble,
        trouble=trouble,
        sizes=sizes,
        mount_name="mount",
        baseline_name="tmpfs",
        places=tuple(Place(name, STORAGE) for name in times),
        machine=MACHINE,
        mount=FACTS,
        cold="cold: not at all",
        left_out=("mount: mmap: No such device",),
        samples=samples,
    )
