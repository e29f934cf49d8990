"""Keep the workers: start them, hear what they say into their manifests, see what was under way when a fault struck.

One thread hears all workers and changes what is remembered of them, under ``Hands.changed``; everything else happens in
the thread that runs the torture.
"""

import contextlib
import json
import math
import os
import pickle
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from .manifest import Entry, Tree, Words
from .shared import KINDS, Shared

#: Seconds after which an operation or a worker is called stuck: a daemon that is started anew takes a few.
STUCK_S = 90.0
#: Seconds for a killed process to go. One for which a mount keeps a request that it took cannot be killed; it is left.
KILLED_S = 60.0


class Process:
    """Be one worker process: commands in, words out."""

    def __init__(self, hear: Callable[["Process", list[Any]], None]) -> None:
        self._hear = hear
        self.fd, writer = os.pipe()
        self._received = b""
        #: The last words but those of operations, for whoever waits for them.
        self.answer = ""
        self.gone = False
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchfs_fuse.torture.worker", str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[writer],
            start_new_session=True,  # Ctrl-C is for us
        )
        os.close(writer)

    def tell(self, *command: Any) -> None:
        """Give a command."""
        self.answer = ""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then it has gone, which is seen
            self._child.stdin.write(json.dumps(command).encode() + b"\n")
            self._child.stdin.flush()

    def take(self) -> None:
        """Take what it says; call it when ``fd`` is readable."""
        data = os.read(self.fd, 1 << 16)
        if not data:
            self.gone = True
            return
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            self._hear(self, json.loads(line))

    def kill(self) -> None:
        """Let it do nothing any more; it ends as soon as a mount that it waits for lets it."""
        self._child.kill()

    def end(self) -> bool:
        """Kill it if it runs, wait until it has gone; tell whether it has, in KILLED_S: its mount may hold it."""
        if self._child.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()
        self._child.kill()
        try:
            self._child.wait(KILLED_S)
        except subprocess.TimeoutExpired:
            return False
        return True


class Hand:
    """Be one worker as we know it, over all the processes that it has been."""

    def __init__(self, number: int, mount: Path, name: str) -> None:
        self.number = number
        self.mount = mount
        #: Its directory in the mount.
        self.name = name
        self.tree = Tree()
        self.lives = 0
        self.process: Process | None = None
        self.under_way: Words | None = None
        self.begun_ns = 0
        #: Errno of the operation under way, which has failed.
        self.failed: int | None = None
        #: What it read and should not have.
        self.wrong = ""

    @property
    def label(self) -> str:
        """Name it and its directory."""
        return f"worker {self.number} ({self.mount.name}/{self.name})"


class Strike:
    """Be the time in which something was killed, or cut off: between two times, ns of CLOCK_MONOTONIC."""

    def __init__(self, begun_ns: int) -> None:
        self.begun_ns = begun_ns
        self.ended_ns: float = math.inf
        #: Kinds of the operations that were under way all the time.
        self.struck: list[str] = []


class Hands:
    """Keep all workers, and what all of them said. A context manager: at its end their processes are gone."""

    def __init__(
        self, directory: Path, mounts: Sequence[Path], base: str, count: int, seed: int, may_drop: bool
    ) -> None:
        self._directory = directory
        self._seed = seed
        self._may_drop = may_drop
        self.hands = [Hand(number, mounts[number % len(mounts)], f"{base}worker-{number}") for number in range(count)]
        #: The directory that all share.
        self.together = f"{base}shared"
        self.shared = Shared()
        self.acknowledged: Counter[str] = Counter()
        self.changed = threading.Condition()
        self._strike: Strike | None = None
        self._processes: dict[int, Process] = {}
        self._wake_reader, self._wake_writer = os.pipe()
        self._ended = False
        self._thread = threading.Thread(target=self._listen, name="hands")

    def __enter__(self) -> "Hands":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for process in list(self._processes.values()):
            process.end()
        self._ended = True
        os.write(self._wake_writer, b"x")
        self._thread.join()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    # ── hearing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _listen(self) -> None:
        while not self._ended:
            readable = select.select([self._wake_reader, *self._processes], [], [])[0]
            with self.changed:
                for fd in readable:
                    if fd == self._wake_reader:
                        os.read(fd, 100)
                        continue
                    process = self._processes[fd]
                    process.take()
                    if process.gone:
                        del self._processes[fd]
                        os.close(fd)
                self.changed.notify_all()

    def _spawn(self, hear: Callable[[Process, list[Any]], None]) -> Process:
        process = Process(hear)
        with self.changed:
            self._processes[process.fd] = process
        os.write(self._wake_writer, b"x")
        return process

    def _hear(self, hand: Hand, process: Process, words: list[Any]) -> None:
        match words:
            case ["begin", operation, time_ns]:
                hand.under_way, hand.begun_ns = operation, time_ns
            case ["end", result, time_ns] if hand.under_way is not None:
                done, hand.under_way = hand.under_way, None
                self._note(hand.begun_ns, time_ns, done[0])
                self.acknowledged[done[0]] += 1
                hand.tree.apply(done)
                if done[0] in KINDS:
                    self.shared.end(hand.number, done, result)
            case ["fail", int(number), time_ns] if hand.under_way is not None:
                hand.failed = number
                self._note(hand.begun_ns, time_ns, hand.under_way[0])
            case ["wrong", str(sentence), _]:
                hand.wrong = sentence
            case ["cannot", str(sentence), _]:
                hand.wrong = sentence
            case [str(answer), _]:
                process.answer = answer

    def _note(self, begun_ns: int, ended_ns: int, kind: str) -> None:
        """Note an operation that has ended or failed, if it was under way all the time in which a fault struck."""
        if (strike := self._strike) is not None and begun_ns < strike.begun_ns and ended_ns > strike.ended_ns:
            strike.struck.append(kind)

    # ── aiming ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def wait_under_way(self, hands: Iterable[Hand], kind: str, timeout_s: float) -> None:
        """Wait until one of these does something of a kind; if nobody does in time, that is no matter."""
        some = list(hands)
        with self.changed:
            self.changed.wait_for(
                lambda: any(hand.under_way is not None and hand.under_way[0] == kind for hand in some), timeout_s
            )

    @contextlib.contextmanager
    def striking(self) -> Iterator[Strike]:
        """Note what is under way all the time from the begin to the end of the block."""
        with self.changed:
            self._strike = strike = Strike(time.monotonic_ns())
        yield strike
        strike.ended_ns = time.monotonic_ns()

    def struck(self, strike: Strike) -> list[str]:
        """Return the kinds of the operations that were under way when a fault struck; ask once all is back."""
        with self.changed:
            self._strike = None
            left = [
                hand.under_way[0]
                for hand in self.hands
                if hand.under_way is not None and hand.failed is None and hand.begun_ns < strike.begun_ns
            ]
        return strike.struck + left

    def failed_since(self, strike: Strike, hands: Sequence[Hand]) -> list[str]:
        """Return the kinds of the operations of these that were under way when a fault struck and failed by it."""
        with self.changed:
            return [
                hand.under_way[0]
                for hand in hands
                if hand.under_way is not None and hand.failed is not None and hand.begun_ns < strike.begun_ns
            ]

    def wait_failed(self, hands: Sequence[Hand]) -> bool:
        """Wait until an operation of each of these has failed; tell whether it came in time."""
        with self.changed:
            return self.changed.wait_for(lambda: all(hand.failed is not None or hand.wrong for hand in hands), STUCK_S)

    # ── starting and ending ──────────────────────────────────────────────────────────────────────────────────────────

    def run(self, command: str, root: Path, *more: Any) -> str:
        """Have another process do one thing; return what went wrong, empty: nothing."""
        said: list[list[Any]] = []
        process = self._spawn(lambda process, words: said.append(words))
        process.tell(command, str(root), *more)
        with self.changed:
            self.changed.wait_for(lambda: process.gone or said, STUCK_S)
        gone = process.gone
        process.end()
        match said:
            case [["cannot", sentence, _]]:
                return f"{command} {root} failed: {sentence}"
            case [_]:
                return ""
        return f"{command} {root} {'failed' if gone else f'did not end in {STUCK_S:g} s'}"

    def look(self, root: Path) -> list[Entry] | str:
        """Have another process look at all that is there; what went wrong instead, as a sentence."""
        file = self._directory / "found"
        if sentence := self.run("look", root, str(file)):
            return sentence
        found: list[Entry] = pickle.loads(file.read_bytes())
        return found

    def blocks(self, root: Path) -> dict[int, list[bytes | None]] | str:
        """Have another process read files that were kept; what went wrong instead, as a sentence."""
        file = self._directory / "found"
        if sentence := self.run("blocks", root, str(file)):
            return sentence
        found: dict[int, list[bytes | None]] = pickle.loads(file.read_bytes())
        return found

    def start(self, hands: Sequence[Hand]) -> list[str]:
        """Start workers; each looks at its tree first. Say what is wrong with what they found; then they do nothing."""
        for hand in hands:
            hand.process = self._spawn(partial(self._hear, hand))
            hand.process.tell("look", str(hand.mount / hand.name), str(self._file(hand)))
        complaints = []
        for hand in hands:
            process = hand.process
            assert process is not None
            if not self._wait(process, "looked"):
                complaints.append(f"{hand.label} cannot look at its directory")
                continue
            found = pickle.loads(self._file(hand).read_bytes())
            complaints += self.settle(hand, found)
            hand.lives += 1
            self._file(hand).write_bytes(pickle.dumps(hand.tree))
        if complaints:
            return complaints
        for hand in hands:
            assert hand.process is not None
            seed = hash((self._seed, hand.number, hand.lives)) & 0xFFFF_FFFF
            together = hand.mount / self.together
            root = hand.mount / hand.name
            hand.process.tell(
                "work", hand.number, seed, str(root), str(together), str(self._file(hand)), self._may_drop
            )
        return []

    def settle(self, hand: Hand, found: list[Entry]) -> list[str]:
        """Compare a worker's tree with what is there; what was under way may be done or not."""
        with self.changed:
            if hand.under_way is not None:
                self.shared.doubt(hand.number, hand.under_way)
            complaints = hand.tree.settle(found, hand.under_way)
            under_way, hand.under_way, hand.failed = hand.under_way, None, None
        return [f"{hand.label}, {under_way} under way: {sentence}" for sentence in complaints]

    def _file(self, hand: Hand) -> Path:
        return self._directory / f"worker-{hand.number}"

    def _wait(self, process: Process, answer: str) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: process.gone or process.answer == answer, STUCK_S) and not process.gone

    def kill(self, hand: Hand) -> None:
        """Let a worker begin nothing any more."""
        if hand.process is not None:
            hand.process.kill()

    def bury(self, hand: Hand) -> None:
        """Kill a worker's process, and hear its last words. UserError: its mount neither answers nor is dead."""
        process, hand.process = hand.process, None
        if process is not None:
            if not process.end():
                raise UserError(f"{hand.label} cannot be killed: its mount does not let it go")
            with self.changed:
                self.changed.wait_for(lambda: process.gone, STUCK_S)

    def stop(self) -> list[str]:
        """Have all workers end what they do and close everything; say who does not."""
        complaints = []
        for hand in self.hands:
            if hand.process is not None:
                hand.process.tell("stop")
        for hand in self.hands:
            if hand.process is None:
                continue
            if not self._wait(hand.process, "stopped"):
                complaints.append(f"{hand.label} does not stop: {hand.under_way}")
                continue
            self.bury(hand)
        return complaints

    def complaints(self) -> list[str]:
        """Say what was seen to be wrong by now."""
        with self.changed:
            found = [f"{hand.label} read something wrong: {hand.wrong}" for hand in self.hands if hand.wrong]
            now_ns = time.monotonic_ns()
            found += [
                f"{hand.label} is stuck for more than {STUCK_S:g} s: {hand.under_way}"
                for hand in self.hands
                if hand.under_way is not None and hand.failed is None and now_ns - hand.begun_ns > STUCK_S * 1e9
            ]
            return found + self.shared.complaints

    def failed(self) -> list[Hand]:
        """Return the workers of which an operation has failed."""
        with self.changed:
            return [hand for hand in self.hands if hand.failed is not None]
