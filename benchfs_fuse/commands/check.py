"""``benchfs check``: compare what all daemons of a cluster hold, say what is wrong, remove what is left over."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from .. import config, kernel_mounts, mountpoints
from ..client import Session, open_session
from ..comparison import Category, Finding
from ..errors import FsError, UserError
from ..registry import Registry
from ..services.checking import PARTS, Checked, Checker
from .tables import make_console

#: Exit codes beside those of all commands: only left-overs were found; something is damaged; nothing was found, but
#: some things changed so often that nothing can be said of them.
EXIT_LEFT_OVER = 3
EXIT_DAMAGED = 4
EXIT_UNDECIDED = 5
#: Findings of one category that are shown; --json has them all.
SHOWN_MAX = 100

_TITLES = {
    "inodes": "reading inodes",
    "names": "reading names",
    "chunks": "looking at chunks",
    "files": "looking for strays",
    "records": "comparing records",
    "again": "looking again",
}


def check(place: Path, *, repair: bool, as_json: bool, settings: config.Settings) -> int:
    """Check the cluster of a registry or a mount point; return the exit code. UserError: it could not be done."""
    registry = registry_of(place)
    with Registry(registry) as known:
        missing = known.missing()
    if missing:
        names = ", ".join(f"{daemon} ({why})" for daemon, why in sorted(missing.items()))
        raise UserError(f"a cluster can only be checked whole; missing: daemon {names}")
    return trio.run(_check, registry, repair, as_json, settings)


def registry_of(place: Path) -> Path:
    """Return the registry of what a path names: itself, or what is mounted there. UserError."""
    path = kernel_mounts.plain_path(place)
    found = mountpoints.look(path)
    if found.mount is not None:
        return Path(found.served()[1].registry)
    if (path / "cluster.json").exists():
        return path
    raise UserError(f"{place} is neither a benchfs mount nor the registry of a cluster")


async def _check(registry: Path, repair: bool, as_json: bool, settings: config.Settings) -> int:
    console = Console(stderr=True, highlight=False, markup=False)
    async with open_session(registry, settings, kind="tool", label="benchfs check") as session:
        try:
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            ) as progress:
                task = progress.add_task("", total=1.0)

                def show(part: str, share: float) -> None:
                    position = (PARTS.index(part) + min(share, 1.0)) / len(PARTS)
                    progress.update(task, description=_TITLES[part], completed=position)

                checker = Checker(session.links, show)
                checked = await checker.check()
            done = await checker.repair(checked.findings) if repair else {}
        except FsError as error:
            raise UserError(f"the check was broken off: {str(error) or type(error).__name__}") from None
    if as_json:
        _write_json(session, checked, done)
    else:
        _show(make_console(), session, checked, done)
    left = [finding for finding in checked.findings if done.get(finding) != ""]
    if any(finding.problem.category is Category.DAMAGED for finding in left):
        return EXIT_DAMAGED
    if left:
        return EXIT_LEFT_OVER
    return EXIT_UNDECIDED if checked.undecided else 0


def _place(finding: Finding) -> str:
    """Name the inode, the chunk and the daemon of a finding."""
    chunk = f"chunk {finding.index} of " if finding.index >= 0 else ""
    inode = f"{chunk}inode {finding.ino} " if finding.ino else ""
    return f"{inode}on daemon {finding.daemon}"


def _line(finding: Finding, checked: Checked, done: dict[Finding, str]) -> str:
    path = checked.comparison.path_to(finding)
    parts = [f"{finding.problem}: {path + ', ' if path else ''}{_place(finding)}"]
    parts += [finding.file] if finding.file else []
    parts += [finding.what] if finding.what else []
    parts += [decimal(finding.size)] if finding.size > 0 else []
    if finding in done:
        parts.append(f"not removed: {done[finding]}" if done[finding] else "removed")
    return "; ".join(parts)


def _show(console: Console, session: Session, checked: Checked, done: dict[Finding, str]) -> None:
    comparison = checked.comparison
    console.print(
        f"cluster {session.cluster_id}: {len(session.links.daemons)} daemons, {len(comparison.inodes)} inodes, "
        f"{comparison.name_count} names, {comparison.chunk_count} chunks with {decimal(comparison.chunk_bytes)}"
    )
    for category in Category:
        findings = [finding for finding in checked.findings if finding.problem.category is category]
        _show_some(console, category.value, findings, checked, done)
    _show_some(console, "undecided", checked.undecided, checked, done)
    console.print("; ".join(_summary(checked, done)))


def _show_some(
    console: Console, title: str, findings: Sequence[Finding], checked: Checked, done: dict[Finding, str]
) -> None:
    if not findings:
        return
    console.print(f"{title}:", style="bold red" if title == Category.DAMAGED else "bold")
    for finding in findings[:SHOWN_MAX]:
        console.print(f"  {_line(finding, checked, done)}")
    if len(findings) > SHOWN_MAX:
        console.print(f"  and {len(findings) - SHOWN_MAX} more; --json has them all")


def _summary(checked: Checked, done: dict[Finding, str]) -> Iterator[str]:
    counts = Counter(finding.problem.category for finding in checked.findings)
    if counts:
        yield ", ".join(f"{counts[category]} {category}" for category in Category if counts[category])
    else:
        yield "nothing is wrong" if not checked.undecided else "nothing wrong was found"
    removed = [finding for finding in done if not done[finding]]
    if removed:
        yield f"{len(removed)} removed, {decimal(sum(max(0, finding.size) for finding in removed))}"
    elif not done and any(finding.problem.category is not Category.DAMAGED for finding in checked.findings):
        yield "--repair removes what is orphaned or leaked"
    if checked.undecided:
        yield f"{len(checked.undecided)} changed too often to be compared: check again when less goes on"
    if checked.in_use:
        yield f"{checked.in_use} files are being written to: their space was not compared"


def _write_json(session: Session, checked: Checked, done: dict[Finding, str]) -> None:
    comparison = checked.comparison

    def plain(finding: Finding) -> dict[str, Any]:
        return {
            "problem": finding.problem.value,
            "category": finding.problem.category.value,
            "path": comparison.path_to(finding) or None,
            "daemon": finding.daemon,
            "ino": finding.ino or None,
            "chunk": finding.index if finding.index >= 0 else None,
            "file": finding.file or None,
            "bytes": finding.size,
            "what": finding.what,
            "removed": finding in done and not done[finding],
            "error": done.get(finding) or None,
        }

    content = {
        "cluster": session.cluster_id,
        "daemons": len(session.links.daemons),
        "inodes": len(comparison.inodes),
        "names": comparison.name_count,
        "chunks": comparison.chunk_count,
        "bytes": comparison.chunk_bytes,
        "in_use": checked.in_use,
        "findings": [plain(finding) for finding in checked.findings],
        "undecided": [plain(finding) for finding in checked.undecided],
    }
    sys.stdout.write(json.dumps(content, indent=2) + "\n")
