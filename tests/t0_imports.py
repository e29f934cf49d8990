"""Imports point one way: from the roots through adapters and services to the ports and the pure core.

The tables below are the rule. A new module has to be put into one of the rooms, or this test fails.
"""

import ast
import graphlib
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "benchfs_fuse"
SOURCE = Path(__file__).parent.parent / PACKAGE


class Room(NamedTuple):
    """Say who lives in a room (patterns of module names below the package) and what they may import."""

    modules: tuple[str, ...]
    rooms: tuple[str, ...]
    packages: tuple[str, ...]


#: All that roots may use, and what measures them too.
_BELOW_ROOTS = (
    *("pure", "instruments", "ports", "shared", "services", "twins"),
    *("compiled", "adapters", "companion", "front", "machine"),
)

#: A module belongs to the first room that names it. Every room may import the standard library, less BANNED_IN.
ROOMS = {
    "pure": Room(
        modules=(
            *(
                "",
                "bench",
                "chunks",
                "kv",
                "rpc",
                "services",
                "testing",
                "torture",
            ),  # the packages' own __init__: docstrings
            *("model", "limits", "errors", "layout", "acl", "privileges", "disk", "comparison"),
            *("observe", "observe.durations", "observe.spans", "observe.timeline", "observe.perfetto"),
            *("rpc.messages", "rpc.frames", "rpc.handshake", "bench.samples"),
            *("torture.manifest", "torture.shared"),
        ),
        rooms=("pure",),
        packages=("msgspec",),
    ),
    "instruments": Room(  # clocks and counters in the way of every operation
        modules=("observe.recording", "observe.seldom", "observe.statistics"),
        rooms=("pure", "instruments"),
        packages=(),
    ),
    "ports": Room(
        modules=("ports", "rpc.network"),
        rooms=("pure", "ports"),
        packages=(),
    ),
    "shared": Room(  # logic over ports that adapters and their twins have in common
        modules=("chunks.table",),
        rooms=("pure", "ports", "shared"),
        packages=("msgspec",),
    ),
    "services": Room(
        modules=("services.*", "rpc.client", "rpc.server"),
        rooms=("pure", "instruments", "ports", "services"),
        packages=("trio", "msgspec"),
    ),
    "lossy": Room(  # a disk that loses power, under real daemons
        modules=("testing.lossy_fs", "testing.lossy_operations"),
        rooms=("pure", "twins", "companion", "front", "machine", "lossy"),
        packages=("trio", "pyfuse3"),
    ),
    "twins": Room(
        modules=("testing.*", "*.memory", "chunks.faulty"),
        rooms=("pure", "ports", "shared", "services", "twins"),
        packages=("trio", "msgspec"),
    ),
    "compiled": Room(  # what there is of our own C
        modules=("compiled",),
        rooms=(),
        packages=(),
    ),
    "adapters": Room(
        modules=(
            *("rpc.ucx", "rpc.wire", "rpc.segments", "rpc.pidwatch", "rpc.meeting", "rpc.addresses"),
            *("chunks.*", "kv.rocks"),
        ),
        rooms=("pure", "instruments", "ports", "shared", "compiled", "same package"),
        packages=("trio", "msgspec", "ucxx", "liburing", "rocksdict"),
    ),
    "companion": Room(  # the C library that completes libfuse, and its binding
        modules=("companion",),
        rooms=("pure", "compiled"),
        packages=(),
    ),
    "front": Room(  # adapters that call the services, where the others are called by them
        modules=("fuse", "at_once", "callers", "extras", "interrupts"),
        rooms=("pure", "instruments", "ports", "services", "companion", "front"),
        packages=("trio", "msgspec", "pyfuse3"),
    ),
    "machine": Room(  # this host's processes and files: what roots share
        modules=(
            *(
                "config",
                "control",
                "datadir",
                "holders",
                "hosts",
                "kernel_mounts",
                "mountpoints",
                "observe.kernel",
                "processes",
                "registry",
            ),
            *("runtime", "scheduling"),
        ),
        rooms=("pure", "machine"),
        packages=("trio", "msgspec"),
    ),
    "roots": Room(
        modules=(
            "mount",
            "daemon",
            "cli",
            "commands",
            "commands.*",
            "mount_helper",
            "client",
            "doctor",
            "quickcheck",
            "telling",
        ),
        rooms=(*_BELOW_ROOTS, "roots", "bench", "torture"),
        packages=("trio", "msgspec", "rich", "matplotlib"),
    ),
    "torture": Room(  # what runs clusters to hurt them: processes, from outside
        modules=("torture.*",),
        rooms=("pure", "twins", "machine", "roots", "torture"),
        packages=(),
    ),
    "bench": Room(  # what measures: it uses whatever it measures
        modules=("bench.*",),
        rooms=(*_BELOW_ROOTS, "roots", "bench"),
        packages=("trio", "msgspec", "rich", "matplotlib"),
    ),
}

#: Each binding has one importer, roots included: what else depends on it depends on a port. The floor under a mount is
#: a second file system of its own, the disk that loses power a third.
ONLY_IMPORTER = {"pyfuse3": "fuse", "ucxx": "rpc.ucx", "liburing": "chunks.uring", "rocksdict": "kv.rocks"}
OTHER_IMPORTERS = {"pyfuse3": ("bench.memory_operations", "testing.lossy_operations")}

#: No I/O and no clock in the pure core; no I/O of their own in the services.
BANNED_IN = {
    "pure": ("socket", "select", "selectors", "time", "datetime", "asyncio", "subprocess", "threading", "tempfile"),
    "ports": ("socket", "select", "selectors", "time", "datetime", "asyncio", "subprocess", "threading", "tempfile"),
    "services": ("socket", "select", "selectors", "asyncio", "subprocess", "tempfile"),
}


def room_of(module: str) -> str | None:
    """Name the room of a module, None if nobody assigned it."""
    for name, room in ROOMS.items():
        if any(fnmatchcase(module, pattern) for pattern in room.modules):
            return name
    return None


def module_name(path: Path, source: Path) -> str:
    """Name a file below the package: "" for its __init__, "rpc" for rpc/__init__.py, "rpc.ucx" for rpc/ucx.py."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, source: Path) -> Iterator[str]:
    """Yield the full names that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    inside = [PACKAGE, *path.relative_to(source).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import x`: x is a module of ours, or else a name inside the package.
            for alias in node.names:
                submodule = source.joinpath(*target.split(".")[1:], alias.name)
                ours = target.split(".")[0] == PACKAGE and (submodule.is_dir() or submodule.with_suffix(".py").exists())
                yield f"{target}.{alias.name}" if ours else target


def violations_of(source: Path) -> list[str]:
    """Say each broken rule in a sentence."""
    found = []
    for path in sorted(source.rglob("*.py")):
        module = module_name(path, source)
        home = room_of(module)
        if home is None:
            found.append(f"{module} is in no room: assign it in tests/t0_imports.py")
            continue
        room = ROOMS[home]
        for target in imports_of(path, source):
            top, _, below = target.partition(".")
            if top == PACKAGE:
                there = room_of(below)
                sibling = "same package" in room.rooms and below.rpartition(".")[0] == module.rpartition(".")[0] != ""
                if there not in room.rooms and not (there == home and sibling):
                    found.append(f"{module} ({home}) imports {below} ({there or 'no room'})")
            elif top in ONLY_IMPORTER:
                if module not in (ONLY_IMPORTER[top], *OTHER_IMPORTERS.get(top, ())):
                    found.append(f"{module} ({home}) imports {top}: only {ONLY_IMPORTER[top]} may")
            elif top in sys.stdlib_module_names:
                if top in BANNED_IN.get(home, ()):
                    found.append(f"{module} ({home}) imports {top}")
            elif top not in room.packages:
                found.append(f"{module} ({home}) imports {top}")
    return found


def test_every_import_points_inwards() -> None:
    assert violations_of(SOURCE) == []


def test_imports_have_no_cycle() -> None:
    graph = {}
    for path in SOURCE.rglob("*.py"):
        module = module_name(path, SOURCE)
        targets = (target.partition(".") for target in imports_of(path, SOURCE))
        graph[module] = {below for top, _, below in targets if top == PACKAGE and below}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, naming the cycle


@pytest.mark.parametrize(
    ("file", "text", "violation"),
    [
        ("model.py", "import trio", "model (pure) imports trio"),
        ("model.py", "def f():\n    import time.sub", "model (pure) imports time"),
        ("model.py", "from .ports import ChunkStore", "model (pure) imports ports (ports)"),
        ("ports.py", "from benchfs_fuse.services.store import x", "ports (ports) imports services.store (services)"),
        (
            "services/store.py",
            "from ..chunks import uring",
            "services.store (services) imports chunks.uring (adapters)",
        ),
        ("services/store.py", "import pyfuse3", "services.store (services) imports pyfuse3: only fuse may"),
        ("services/store.py", "from numpy import array", "services.store (services) imports numpy"),
        ("chunks/uring.py", "from ..kv.rocks import x", "chunks.uring (adapters) imports kv.rocks (adapters)"),
        (
            "chunks/uring.py",
            "from ..services.store import x",
            "chunks.uring (adapters) imports services.store (services)",
        ),
        ("fuse.py", "from .rpc.ucx import x", "fuse (front) imports rpc.ucx (adapters)"),
        ("daemon.py", "import rocksdict", "daemon (roots) imports rocksdict: only kv.rocks may"),
        ("forgotten.py", "", "forgotten is in no room: assign it in tests/t0_imports.py"),
        ("model.py", "from . import forgotten", "model (pure) imports forgotten (no room)"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path: Path, file: str, text: str, violation: str) -> None:
    for neighbour in ("chunks/uring.py", "services/store.py", "forgotten.py"):
        (tmp_path / neighbour).parent.mkdir(exist_ok=True)
        (tmp_path / neighbour).touch()
    (tmp_path / file).write_text(text)
    assert violation in violations_of(tmp_path)


def test_what_the_rules_allow_is_allowed(tmp_path: Path) -> None:
    allowed = {
        "model.py": "import msgspec, struct",
        "ports.py": "from .model import Ino",
        "services/store.py": "import trio\nfrom ..ports import ChunkStore\nfrom . import other",
        "services/other.py": "from ..model import Ino",
        "chunks/uring.py": "import liburing\nfrom ..ports import ChunkStore",
        "daemon.py": "import socket, trio\nfrom .chunks.uring import Ring\nfrom .services import store",
    }
    for file, text in allowed.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    assert violations_of(tmp_path) == []
