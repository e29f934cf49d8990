"""``benchfs bench network``: what it measures, that it checks what arrives, and that nothing of it stays."""

import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import trio
from cli_help import PATIENCE_S, Done, command_line, refused, running_benchfs, sentence_of, wait_until
from rich.console import Console

from benchfs_fuse import processes
from benchfs_fuse.bench import network
from benchfs_fuse.bench.connection import COUNT, GIVE, SUM, TAKE, Order, Service, measure
from benchfs_fuse.bench.network import IN_FLIGHT, Report, Side, run_network
from benchfs_fuse.bench.samples import ratio_of
from benchfs_fuse.errors import ProtocolError, UserError
from benchfs_fuse.hosts import Namespace
from benchfs_fuse.limits import MIB
from benchfs_fuse.model import ClientId
from benchfs_fuse.ports import Channel, Peer, Reply
from benchfs_fuse.processes import ProcessId
from benchfs_fuse.rpc.memory import MemoryNetwork

SECONDS = 1
#: Say where one is, in a file named after the first word, and do what it says below.
FAKE = """#!/bin/sh
case $1 in --server) name=server;; *) name=client;; esac
readlink /proc/self/ns/net >{place}/$name.new && mv {place}/$name.new {place}/$name
"""
LISTENS = "[ $name = client ] || { echo Server listening; exec sleep 600; }\n"


def inhabitants(namespaces: Sequence[str]) -> list[ProcessId]:
    """Return the processes in network namespaces."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            inside = os.readlink(entry / "ns" / "net") in namespaces
        except OSError:
            continue  # it has just ended
        if inside and (process := processes.identify(int(entry.name))) is not None:
            found.append(process)
    return found


def named_namespaces() -> set[str]:
    done = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the network namespaces that are made."""
    noted: list[str] = []

    class Noted(Namespace):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            noted.append(os.readlink(f"/proc/{self.pid}/ns/net"))

    monkeypatch.setattr(network, "Namespace", Noted)
    monkeypatch.setattr(network, "LENGTHS", (MIB,))
    return noted


@pytest.fixture
def fake_iperf3(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Return what makes an iperf3 that does something else; what that returns is the environment to find it."""

    def make(does: str) -> dict[str, str]:
        program = tmp_path / "iperf3"
        program.write_text(FAKE.format(place=tmp_path) + does)
        program.chmod(0o755)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    return make


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_are_measured_in_turn_and_nothing_stays(made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = named_namespaces()
    assert run_network(rounds=2, seconds=SECONDS, as_json=True) == 0
    report = msgspec.json.decode(capsys.readouterr().out, type=Report)
    assert (report.seconds, report.in_flight) == (SECONDS, IN_FLIGHT)
    assert report.iperf3_version.startswith("iperf 3") and report.machine.versions["ucxx-cu12"]
    assert [(row.operation, row.length) for row in report.rows] == [("read", MIB), ("write", MIB)]
    for moved in (report.iperf3, *(row.moved for row in report.rows)):
        assert len(moved.rounds) == 2
        for one in moved.rounds:
            assert one.ns >= 0.9 * SECONDS * 1e9 and 10 < one.mib_per_s < 1_000_000
        assert min(moved.rates) <= moved.mib_per_s <= max(moved.rates)
    for row in report.rows:
        assert all(one.bytes % MIB == 0 and one.bytes >= IN_FLIGHT * MIB for one in row.moved.rounds)
        assert row.ratio == ratio_of(row.moved.rates, report.iperf3.rates)
        assert 0.01 < row.ratio.low <= row.ratio.value <= row.ratio.high
    network.show(report, Console(highlight=False))
    table = capsys.readouterr().out
    for words in (
        report.iperf3_version,
        str(report.iperf3),
        "read 1 MiB",
        str(report.rows[1].ratio),
        "2 rounds of 1 s",
    ):
        assert words in table
    assert len(set(made)) == 2 and inhabitants(made) == []
    assert named_namespaces() <= before


# ── what arrives is checked ──────────────────────────────────────────────────────────────────────────────────────────


class Liar(Service):
    """Serve, but say something else once ``op`` has been asked for so many times."""

    def __init__(self, op: int, honest: int) -> None:
        super().__init__()
        self._op, self._honest = op, honest

    def handle_now(self, channel: Channel, op: int, body: bytes, payload: memoryview | None, want: int) -> Reply:
        reply = super().handle_now(channel, op, body, payload, want)
        if op != self._op or self._honest > 0:
            self._honest -= op == self._op
            return reply
        if op == GIVE:
            return Reply(0, b"", memoryview(bytes(want)))
        return Reply(0, (int.from_bytes(reply.body, "big") ^ 1).to_bytes(8, "big"))


async def moved_with(service: Service, *, writes: bool, seconds: float = 0.01) -> int:
    """Do a round with a service; return the bytes that it moved."""
    order = Order(writes, 256, IN_FLIGHT, seconds)
    peers = [Peer(ClientId(number), number - 2, "host", number, "boot") for number in (1, 2)]
    with trio.fail_after(PATIENCE_S):
        async with MemoryNetwork(seed=7) as memory:
            client, server = (memory.node(peer) for peer in peers)
            moved = await measure(await client.connect(await server.listen(service)), order)
    assert moved.ns >= seconds * 1e9
    return moved.bytes


@pytest.mark.parametrize("writes", [False, True])
async def test_whole_payloads_are_counted(writes: bool) -> None:
    bytes_moved = await moved_with(Service(), writes=writes)
    assert bytes_moved >= IN_FLIGHT * 256 and bytes_moved % 256 == 0


@pytest.mark.parametrize(
    ("op", "honest", "writes", "told"),
    [
        (SUM, 0, True, "what arrives at the server is not what was sent"),
        (TAKE, 3, True, r"257 bytes of 256 have arrived at the server"),
        (COUNT, 1, True, "requests were answered, but the server has taken"),
        (GIVE, 0, False, "what comes from the server is not what it has"),
        (GIVE, 3, False, "what comes from the server is not what it has"),
    ],
)
async def test_what_does_not_arrive_as_it_was_sent_is_told(op: int, honest: int, writes: bool, told: str) -> None:
    with pytest.raises(ProtocolError, match=told):
        await moved_with(Liar(op, honest), writes=writes)


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("dies", "told"),
    [
        (0, "the client of our connection could not go on: the connection to .* ended"),
        (1, "the client of our connection was killed by SIGKILL"),
    ],
    ids=["server", "client"],
)
def test_a_side_that_dies_is_told(dies: int, told: str, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[Side] = []
    begin, real = Side.__enter__, Side.measure

    def entered(self: Side) -> Side:
        sides.append(self)
        return begin(self)

    def measured(self: Side, order: Order) -> object:
        sides[dies].popen.kill()
        sides[dies].popen.wait()
        return real(self, order)

    monkeypatch.setattr(Side, "__enter__", entered)
    monkeypatch.setattr(Side, "measure", measured)
    with pytest.raises(UserError, match=told):
        run_network(rounds=1, seconds=SECONDS, as_json=True)
    assert len(made) == 2 and inhabitants(made) == []


@pytest.mark.parametrize(
    ("does", "told"),
    [
        (
            "echo no port is free >&2; exit 1",
            "the server of iperf3 ended with code 1 before it listened: no port is free",
        ),
        (LISTENS + """echo '{"end": {}, "error": "no route"}'; exit 1""", "iperf3 ended with code 1: no route"),
        (LISTENS + "kill -9 $$", "iperf3 was killed by SIGKILL: "),
        (LISTENS + "echo '{}'", "iperf3 ended with code 0: it says nothing about what it sent"),
    ],
)
def test_an_iperf3_that_fails_is_told(does: str, told: str, fake_iperf3: Callable[[str], dict[str, str]]) -> None:
    assert told in refused("bench", "network", env=fake_iperf3(does))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_nothing_stays_whatever_ends_it(
    number: signal.Signals, code: int, tmp_path: Path, fake_iperf3: Callable[[str], dict[str, str]]
) -> None:
    with running_benchfs("bench", "network", env=fake_iperf3(LISTENS + "exec sleep 600")) as running:
        wait_until((tmp_path / "client").exists, tmp_path)
        namespaces = [(tmp_path / name).read_text().strip() for name in ("server", "client")]
        there = inhabitants(namespaces)
        assert len(there) >= 6  # who holds them, both ends of our connection, both of iperf3 (and mv, perhaps)
        os.kill(running.pid, number)
        assert running.wait().code == code
    if code > 0:
        assert inhabitants(namespaces) == []
    assert all(processes.wait_end(process, PATIENCE_S) for process in there)


def test_who_cannot_is_told_why(tmp_path: Path) -> None:
    def refused_with(*privileges: str) -> str:
        words = ["setpriv", *privileges, *command_line("bench", "network")]
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
        return sentence_of(Done(done.returncode, done.stdout, done.stderr))

    caps = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")  # wherever Python lies
    assert "run it as root" in refused_with("--reuid=65534", "--regid=65534", "--clear-groups", *caps)
    refusal = refused_with("--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    assert refusal.startswith("no network namespace can be made: ") and "Operation not permitted" in refusal
    missing = refused("bench", "network", env={"PATH": str(tmp_path)})
    assert missing == "iperf3 is not installed: apt-get install iperf3"
    assert "a round lasts 1 to 3600 seconds" in refused("bench", "network", "--seconds", 0, code=2)
