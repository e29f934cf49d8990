"""``benchfs torture``: many workers, faults aimed at them, and a verdict on everything that was acknowledged."""

import json
import secrets
import sys
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import UserError
from ..torture.run import Plan, Verdict, torture
from .tables import make_console

#: Exit codes beside those of all commands: something acknowledged is lost or wrong; it could not be done to the end.
EXIT_UNSOUND = 1
EXIT_BROKEN_OFF = 3
#: Complaints that are shown; --json has them all.
SHOWN_MAX = 50
#: Seeds that are drawn have so many bits: short enough to be typed.
SEED_BITS = 32


class TortureError(UserError):
    """Say why there is no verdict."""

    exit_code = EXIT_BROKEN_OFF


def draw_seed() -> int:
    """Draw a seed."""
    return secrets.randbits(SEED_BITS)


def run_torture(plan: Plan, *, as_json: bool) -> int:
    """Do it, show how far it is, and the verdict; return the exit code. UserError: there is none."""
    console = Console(stderr=True, highlight=False, markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[more]}"))
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=plan.seconds, more="")

            faults = " and ".join(["kills"] * bool(plan.kill) + ["cuts"] * plan.cut_network)

            def tell(what: str, seconds: float, operations: int, struck: int) -> None:
                more = f"{operations} operations" + (f", {struck} {faults}" if faults else "")
                progress.update(task, description=what, completed=min(seconds, plan.seconds), more=more)

            verdict = torture(plan, tell)
    except UserError as error:
        raise TortureError(f"there is no verdict: {error}; again: {_command(plan)}") from None
    if as_json:
        sys.stdout.write(json.dumps(_plain(plan, verdict), indent=2) + "\n")
    else:
        _show(make_console(), plan, verdict)
    return EXIT_UNSOUND if verdict.complaints else 0


def _command(plan: Plan) -> str:
    """Return the command line that does the same again."""
    words = ["benchfs torture", "--local" if plan.mountpoint is None else str(plan.mountpoint)]
    words += [f"--minutes {plan.seconds / 60:g}", f"--seed {plan.seed}", f"--workers {plan.workers}"]
    words += [f"--kill {','.join(sorted(plan.kill))}"] if plan.kill else []
    words += ["--cut-network"] if plan.cut_network else []
    words += ["--lose-chunks"] if plan.lose_chunks else []
    words += ["--fill-disk"] if plan.fill_disk else []
    return " ".join(words)


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _show(console: Console, plan: Plan, verdict: Verdict) -> None:
    for sentence in verdict.complaints[:SHOWN_MAX]:
        console.print(sentence)
    if len(verdict.complaints) > SHOWN_MAX:
        console.print(f"and {len(verdict.complaints) - SHOWN_MAX} more; --json has them all")
    console.print(
        f"{verdict.operations.total()} operations were acknowledged in {verdict.seconds:.0f} s"
        f"{', which a signal cut short' if verdict.interrupted else ''}: {_counts(verdict.operations)}"
    )
    if plan.kill:
        console.print(f"kills that met operations under way: {_counts(verdict.kills) or 'none'}")
        console.print(f"  they met: {_counts(verdict.struck) or 'nothing'}")
    if verdict.missed:
        console.print(f"  not counted, as nothing was under way: {_counts(verdict.missed)}")
    if plan.cut_network:
        console.print(f"cuts that stopped traffic with operations under way: {_counts(verdict.cuts) or 'none'}")
        console.print(f"  all the time there were: {_counts(verdict.cut_off) or 'none'}")
    if verdict.cuts_missed:
        console.print(f"  not counted, as nothing was under way: {_counts(verdict.cuts_missed)}")
    if plan.lose_chunks:
        console.print(f"{verdict.lost_chunks} chunk files were removed or cut short, and missed")
    if plan.fill_disk:
        console.print(
            f"the disks were full {verdict.fills} times; {verdict.refused} operations of workers were refused"
        )
    if verdict.kept is not None:
        what = "data directories and logs are" if plan.mountpoint is None else "what is known of each worker is"
        console.print(f"{what} kept in {verdict.kept}")
    if verdict.left is not None:
        console.print(f"what the workers made is left in {verdict.left}")
    console.print(f"seed {plan.seed}; again: {_command(plan)}")
    if verdict.complaints:
        console.print("NOT SOUND: something acknowledged is lost or wrong", style="bold red")
    else:
        console.print("sound: everything acknowledged is there, nothing is left over", style="bold")


def _plain(plan: Plan, verdict: Verdict) -> dict[str, object]:
    return {
        "sound": not verdict.complaints,
        "complaints": verdict.complaints,
        "seconds": verdict.seconds,
        "interrupted": verdict.interrupted,
        "operations": verdict.operations,
        "kills": verdict.kills,
        "missed": verdict.missed,
        "struck": verdict.struck,
        "cuts": verdict.cuts,
        "cuts_missed": verdict.cuts_missed,
        "cut_off": verdict.cut_off,
        "lost_chunks": verdict.lost_chunks,
        "fills": verdict.fills,
        "refused": verdict.refused,
        "kept": None if verdict.kept is None else str(verdict.kept),
        "left": None if verdict.left is None else str(verdict.left),
        "seed": plan.seed,
        "again": _command(plan),
    }
