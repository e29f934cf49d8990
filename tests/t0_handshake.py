"""Check the handshake: it succeeds with the secret alone, and any bytes give progress or a clear refusal."""

from collections.abc import Callable
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchfs_fuse.errors import AuthenticationFailed, ProtocolError
from benchfs_fuse.limits import HANDSHAKE_MESSAGE_MAX
from benchfs_fuse.rpc import handshake
from benchfs_fuse.rpc.handshake import Card, Handshake, Role

SECRET = bytes(range(32))
CLUSTER = b"cluster-id-16-by"
CLIENT_CARD = Card(11, -1, "node1", 101, "boot", "shares", b"")
SERVER_CARD = Card(22, 3, "node2", 202, "boot", "shares", b"server address")


class Talk:
    """Let a client and a server talk; ``change`` sees every piece on its way: (number, bytes) → bytes."""

    def __init__(self, client: Handshake, server: Handshake) -> None:
        self.client = client
        self.server = server
        self.said: list[bytes] = []

    def run(self, change: Callable[[int, bytes], bytes] = lambda number, data: data) -> None:
        pairs = [(self.client, self.server), (self.server, self.client)]
        while any(self.step(speaker, listener, change) for speaker, listener in pairs):
            pass

    def step(self, speaker: Handshake, listener: Handshake, change: Callable[[int, bytes], bytes]) -> bool:
        data = speaker.to_send()
        if not data:
            return False
        self.said.append(data)
        listener.receive(change(len(self.said) - 1, data))
        answer(listener)
        return True


def answer(side: Handshake) -> None:
    """Do what the driver of a handshake has to do now."""
    if side.done or side.peer is None:
        return
    if side._role is Role.CLIENT:
        side.give_address(b"client address")
    elif side.address is None:
        side.give_card(SERVER_CARD)
    else:
        side.give_ready()


def client(secret: bytes = SECRET, cluster: bytes = CLUSTER, nonce: bytes | None = None) -> Handshake:
    return Handshake(Role.CLIENT, secret, cluster, CLIENT_CARD, nonce)


def server(secret: bytes = SECRET, cluster: bytes = CLUSTER, nonce: bytes | None = None) -> Handshake:
    return Handshake(Role.SERVER, secret, cluster, None, nonce)


def test_both_sides_learn_who_the_other_is() -> None:
    talk = Talk(client(), server())
    talk.run()
    assert talk.client.done and talk.server.done
    assert (talk.client.peer, talk.client.address) == (SERVER_CARD, b"server address")
    assert (talk.server.peer, talk.server.address) == (CLIENT_CARD, b"client address")
    assert len(talk.said) == 6


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_pieces_of_any_size_will_do(size: int) -> None:
    here, there = client(), server()
    for _ in range(3):
        for speaker, listener in ((here, there), (there, here)):
            data = speaker.to_send()
            for start in range(0, len(data), size):
                listener.receive(data[start : start + size])
            answer(listener)
    assert here.done and there.done


def test_a_wrong_secret_is_told_so_by_either_side() -> None:
    with pytest.raises(AuthenticationFailed, match="could not prove that it holds this cluster's secret"):
        Talk(client(bytes(32)), server()).run()
    # A server with a wrong secret that lets everybody pass is found out by the client.
    here, there = client(), server(bytes(32))
    there.receive(here.to_send())
    here.receive(there.to_send())
    there.peer = CLIENT_CARD
    there.give_card(SERVER_CARD)
    with pytest.raises(AuthenticationFailed, match="could not prove"):
        here.receive(there.to_send())
    assert here.peer is None and here.address is None


def test_the_refused_side_learns_why() -> None:
    here, there = client(bytes(32)), server()
    there.receive(here.to_send())
    here.receive(there.to_send())
    with pytest.raises(AuthenticationFailed):
        there.receive(here.to_send())
    with pytest.raises(AuthenticationFailed, match=r"refused: .*could not prove"):
        here.receive(there.to_send())


def test_another_cluster_and_another_version_get_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AuthenticationFailed, match="different clusters"):
        Talk(client(cluster=b"another cluster!"), server()).run()
    here = client()
    hello = here.to_send()
    monkeypatch.setattr(handshake, "PROTOCOL_VERSION", 2)
    with pytest.raises(AuthenticationFailed, match="version 1, the other 2"):
        server().receive(hello)


def test_no_address_before_the_proof() -> None:
    here, there = client(bytes(32)), server()
    there.receive(here.to_send())
    here.receive(there.to_send())
    with pytest.raises(AuthenticationFailed):
        there.receive(here.to_send())
    assert there.peer is None
    assert b"address" not in there.to_send()


def test_a_recorded_conversation_proves_nothing() -> None:
    talk = Talk(client(), server())
    talk.run()
    there = server()
    there.receive(talk.said[0])
    with pytest.raises(AuthenticationFailed):
        there.receive(talk.said[2])
    # Nor do the server's words prove anything to another client.
    here = client()
    here.to_send()
    here.receive(talk.said[1])
    with pytest.raises(AuthenticationFailed):
        here.receive(talk.said[3])


def test_reflected_words_prove_nothing() -> None:
    # The attacker knows no secret and returns to the client what the client says.
    here = client(nonce=bytes(32))
    here.receive(here.to_send())
    with pytest.raises(AuthenticationFailed):
        here.receive(here.to_send())
    # Two servers, told each other's words: the same roles meet.
    one, other = server(nonce=bytes(32)), server(nonce=bytes(32))
    one.receive(client(nonce=bytes(32)).to_send())
    other.receive(client(nonce=bytes(32)).to_send())
    one.peer = CLIENT_CARD
    one.to_send()
    one.give_card(SERVER_CARD)
    with pytest.raises(AuthenticationFailed):
        other.receive(one.to_send())


@given(st.integers(0, 5), st.data())
def test_no_byte_can_be_changed(number: int, data: st.DataObject) -> None:
    def change(at: int, piece: bytes) -> bytes:
        if at != number:
            return piece
        index = data.draw(st.integers(0, len(piece) - 1))
        other = data.draw(st.integers(0, 255).filter(lambda value: value != piece[index]))
        return piece[:index] + bytes([other]) + piece[index + 1 :]

    talk = Talk(client(), server())
    with suppress(AuthenticationFailed, ProtocolError):
        talk.run(change)
    assert not (talk.client.done and talk.server.done)


@given(st.lists(st.binary(max_size=100), max_size=10), st.sampled_from([client, server]))
def test_any_bytes_give_progress_or_a_refusal(pieces: list[bytes], make: Callable[[], Handshake]) -> None:
    side = make()
    for piece in pieces:
        try:
            side.receive(piece)
        except (AuthenticationFailed, ProtocolError):
            break
    assert side.peer is None and not side.done
    assert len(side.to_send()) < 1000


@given(st.integers(0, 255), st.binary(max_size=200))
def test_a_proven_card_of_any_bytes_gives_a_refusal(kind: int, payload: bytes) -> None:
    # Who holds the secret may still talk nonsense.
    here, there = client(), server()
    there.receive(here.to_send())
    here.receive(there.to_send())
    here.to_send()
    proof = here._proof(Role.CLIENT, handshake._Kind.CARD, payload)
    message = handshake._HEADER.pack(b"BFSH", kind, len(proof + payload)) + proof + payload
    with pytest.raises((AuthenticationFailed, ProtocolError)):
        there.receive(message)


def test_a_message_too_long_is_refused_before_it_came() -> None:
    with pytest.raises(ProtocolError):
        server().receive(handshake._HEADER.pack(b"BFSH", 1, HANDSHAKE_MESSAGE_MAX + 1))


def test_a_strangers_refusal_cannot_write_to_the_terminal() -> None:
    here, there = client(), server()
    there.refuse("no\x1b[31m way\n" + "x" * 5000)
    with pytest.raises(AuthenticationFailed) as caught:
        here.receive(there.to_send())
    assert str(caught.value).startswith("the other side refused: no?[31m way?xxx")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "changes",
    [
        *({"client_id": number} for number in (-1, 1 << 63, (1 << 64) - 1)),
        *({"daemon_id": number} for number in (-2, 256, 1 << 40)),
        *({"pid": number} for number in (-1, 1 << 31)),
        *({"host": host} for host in ("a\nb", "\x1b[31m", "x" * 256)),
        *({"boot_id": word} for word in ("\n", "x" * 256)),
        {"shares": "x" * 2000},
    ],
)
def test_a_proven_card_that_nobody_can_have_is_refused(changes: dict[str, int | str]) -> None:
    card = msgspec.structs.replace(CLIENT_CARD, **changes)
    with pytest.raises(ProtocolError, match="damaged card"):
        Talk(Handshake(Role.CLIENT, SECRET, CLUSTER, card), server()).run()


def test_a_proven_card_that_is_nested_deeply_is_refused() -> None:
    here, there = client(), server()
    there.receive(here.to_send())
    here.receive(there.to_send())
    here.to_send()
    here._transcript = there._transcript.copy()
    payload = b"\x91" * 8000
    proof = here._proof(Role.CLIENT, handshake._Kind.CARD, payload)
    with pytest.raises(ProtocolError):
        there.receive(handshake._HEADER.pack(b"BFSH", 2, len(proof + payload)) + proof + payload)
