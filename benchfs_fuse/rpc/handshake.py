"""Let two strangers prove to each other that they hold the cluster's secret, then tell each other who they are.

Sans-IO: bytes in, bytes out, no clock, no socket. ``Handshake`` is one side of the conversation. Six messages, each a
fixed header and a payload of at most ``HANDSHAKE_MESSAGE_MAX`` bytes:

====  ==========  ========================================================================================
from  message     payload
====  ==========  ========================================================================================
C     HELLO       protocol version, cluster id, 32 random bytes
S     HELLO       the same of the server
C     CARD        proof, then who the client is and what it can share
S     CARD        proof, then the same of the server and the address of its UCX worker for this connection
C     ADDRESS     proof, then the address of the client's UCX worker
S     READY       proof: the server serves from now on
S, C  REFUSAL     instead of any of these: one sentence for people, not proven
====  ==========  ========================================================================================

A proof is HMAC-SHA256 over everything said before it, the sender's role and the payload behind it, under a key derived
from the secret and both random numbers. A recorded conversation proves nothing in another one (the other side's number
is new), a proof reflected to its sender proves nothing (the role differs), and no byte of the conversation can be
changed without notice. Nobody gets an address who has not proven the secret before.

Header: magic ``BFSH`` (4 bytes), message kind (1 byte), length of the payload (2 bytes, little-endian).
"""

import enum
import hashlib
import hmac
import secrets
import struct
from typing import Annotated

import msgspec

from ..errors import AuthenticationFailed, ProtocolError
from ..limits import DAEMONS_MAX, HANDSHAKE_MESSAGE_MAX

#: Version of everything that peers say to each other: handshake, frames and messages.
PROTOCOL_VERSION = 1
#: Characters of a refusal that people get to see: a stranger wrote it.
REFUSAL_SHOWN_MAX = 300

_MAGIC = b"BFSH"
_HEADER = struct.Struct("<4sBH")
_HELLO = struct.Struct("<I16s32s")
_PROOF_SIZE = hashlib.sha256().digest_size
NONCE_SIZE = 32
CLUSTER_ID_SIZE = 16


class Role(enum.Enum):
    """Say who opened the connection; the value is what proofs are made over."""

    CLIENT = b"client"
    SERVER = b"server"


class _Kind(enum.IntEnum):
    HELLO = 1
    CARD = 2
    ADDRESS = 3
    READY = 4
    REFUSAL = 5


#: Names of hosts and boots, which also get into logs: printable ASCII, at most HOST_NAME_MAX of POSIX.
Word = Annotated[str, msgspec.Meta(max_length=255, pattern=r"\A[ -~]*\Z")]


class Card(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Say who one side is, and what decides about the way the bytes will take.

    ``shares`` names everything that two processes must have in common to use shared memory (boot, user, namespaces);
    empty: this side wants none. ``address`` is the UCX worker's, empty in the client's card.
    """

    client_id: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    daemon_id: Annotated[int, msgspec.Meta(ge=-1, lt=DAEMONS_MAX)]
    host: Word
    pid: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    boot_id: Word
    shares: Annotated[str, msgspec.Meta(max_length=1024)]
    address: bytes


class Handshake:
    """Be one side. Feed ``receive``, send what ``to_send`` returns, answer when ``card`` asks, until ``done``.

    As client: ``card`` goes out with the own address missing; when ``peer`` has become known, call ``give_address``.
    As server: when ``peer`` has become known, call ``give_card``; when ``address`` has, ``give_ready``.
    """

    def __init__(
        self, role: Role, secret: bytes, cluster_id: bytes, card: Card | None = None, nonce: bytes | None = None
    ) -> None:
        assert len(cluster_id) == CLUSTER_ID_SIZE and (card is not None) == (role is Role.CLIENT)
        #: The other side's card, once it is proven.
        self.peer: Card | None = None
        #: The address of the other side's UCX worker, once it is proven.
        self.address: bytes | None = None
        #: Whether everything has been said; what follows on the socket is no longer ours.
        self.done = False
        self._role = role
        self._secret = secret
        self._cluster_id = cluster_id
        self._card = card
        self._nonce = nonce or secrets.token_bytes(NONCE_SIZE)
        self._key = b""
        self._transcript = hashlib.sha256()
        self._input = bytearray()
        self._output = bytearray()
        self._expected = _Kind.HELLO
        if role is Role.CLIENT:
            self._say_hello()

    def to_send(self) -> bytes:
        """Return what has to be sent now, and forget it."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def receive(self, data: bytes) -> None:
        """Take bytes from the other side, in pieces of any size.

        Raise AuthenticationFailed or ProtocolError, with a sentence for people; then send what ``to_send`` has (it
        tells the other side why) and hang up.
        """
        self._input += data
        try:
            while len(self._input) >= _HEADER.size:
                magic, kind, length = _HEADER.unpack_from(self._input)
                if magic != _MAGIC or length > HANDSHAKE_MESSAGE_MAX:
                    raise ProtocolError("the other side does not speak the benchfs protocol")
                if len(self._input) < _HEADER.size + length:
                    break
                message = bytes(self._input[: _HEADER.size + length])
                del self._input[: len(message)]
                self._take(kind, message)
        except (AuthenticationFailed, ProtocolError) as error:
            self.refuse(str(error))
            raise

    def refuse(self, sentence: str) -> None:
        """Tell the other side why this will not become a connection."""
        self._put(_Kind.REFUSAL, sentence.encode()[:HANDSHAKE_MESSAGE_MAX])

    def give_card(self, card: Card) -> None:
        """Answer the client's card, as server; ``card`` has the address of the worker made for this connection."""
        assert self._role is Role.SERVER and self.peer is not None
        self._say(_Kind.CARD, msgspec.msgpack.encode(card))

    def give_address(self, address: bytes) -> None:
        """Answer the server's card, as client, with the address of the worker made for this connection."""
        assert self._role is Role.CLIENT and self.peer is not None
        self._say(_Kind.ADDRESS, address)

    def give_ready(self) -> None:
        """Tell the client that everything is in place, as server."""
        assert self._role is Role.SERVER and self.address is not None
        self._say(_Kind.READY, b"")
        self.done = True

    def _say_hello(self) -> None:
        message = self._put(_Kind.HELLO, _HELLO.pack(PROTOCOL_VERSION, self._cluster_id, self._nonce))
        self._transcript.update(message)

    def _say(self, kind: _Kind, payload: bytes) -> None:
        message = self._put(kind, self._proof(self._role, kind, payload) + payload)
        self._transcript.update(message)

    def _put(self, kind: _Kind, payload: bytes) -> bytes:
        assert len(payload) <= HANDSHAKE_MESSAGE_MAX, f"handshake message of {len(payload)} bytes"
        message = _HEADER.pack(_MAGIC, kind, len(payload)) + payload
        self._output += message
        return message

    def _proof(self, role: Role, kind: _Kind, payload: bytes) -> bytes:
        said = self._transcript.digest()
        return hmac.digest(self._key, b"|".join((role.value, b"%d" % kind, said, payload)), "sha256")

    def _take(self, kind: int, message: bytes) -> None:
        payload = message[_HEADER.size :]
        if kind == _Kind.REFUSAL:
            sentence = payload.decode(errors="replace")[:REFUSAL_SHOWN_MAX]
            shown = "".join(character if character.isprintable() else "?" for character in sentence)
            raise AuthenticationFailed(f"the other side refused: {shown}")
        if kind != self._expected or self.done:
            raise ProtocolError("the other side said something out of turn in the handshake")
        if kind == _Kind.HELLO:
            self._take_hello(payload)
            self._transcript.update(message)
            self._after_hello()
            return
        theirs = Role.SERVER if self._role is Role.CLIENT else Role.CLIENT
        proof, payload = payload[:_PROOF_SIZE], payload[_PROOF_SIZE:]
        if not hmac.compare_digest(proof, self._proof(theirs, _Kind(kind), payload)):
            raise AuthenticationFailed("the other side could not prove that it holds this cluster's secret")
        self._transcript.update(message)
        if kind == _Kind.CARD:
            self._take_card(payload)
        elif kind == _Kind.ADDRESS:
            self.address = payload
        else:
            self.done = True

    def _take_hello(self, payload: bytes) -> None:
        """Check version and cluster before any proof: whoever differs there gets told so, not «wrong secret»."""
        if len(payload) != _HELLO.size:
            raise ProtocolError("the other side sent a damaged greeting")
        version, cluster_id, nonce = _HELLO.unpack(payload)
        if version != PROTOCOL_VERSION:
            raise AuthenticationFailed(f"one side speaks protocol version {version}, the other {PROTOCOL_VERSION}")
        if cluster_id != self._cluster_id:
            raise AuthenticationFailed(
                f"the sides belong to different clusters: {cluster_id.hex()} and {self._cluster_id.hex()}"
            )
        client, server = (self._nonce, nonce) if self._role is Role.CLIENT else (nonce, self._nonce)
        self._key = hmac.digest(self._secret, b"benchfs handshake" + client + server, "sha256")

    def _after_hello(self) -> None:
        if self._role is Role.SERVER:
            self._say_hello()
        else:
            self._say(_Kind.CARD, msgspec.msgpack.encode(self._card))
        self._expected = _Kind.CARD

    def _take_card(self, payload: bytes) -> None:
        try:
            self.peer = msgspec.msgpack.decode(payload, type=Card)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError("the other side sent a damaged card") from error
        if self._role is Role.SERVER:
            self._expected = _Kind.ADDRESS
        else:
            self.address = self.peer.address
            self._expected = _Kind.READY
