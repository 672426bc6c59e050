"""The first words on a new connection: greeting, TLS, proof of the secret by both sides. What is said, without sockets.

    dialler                                   listener
    greeting "pdserve-transport 1 plain" ->
                                         <-   greeting (closes here when version or TLS differ: the dialler says it in words)
    [TLS, when both greetings say tls]
    Hello(name, nonce, what for)         ->
                                         <-   Challenge(name, nonce)
    Proof(HMAC over all the above)       ->
                                         <-   Welcome(HMAC over all the above, session)  or  Refusal(sentence)

Every connection, each stream too, does all of it with nonces of its own, so nothing recorded can be used again. Both proofs
cover version, mode, names, nonces and the listener's certificate, and say which side they are of, so none can be reflected or
relayed. Until the proof is checked, no more than a few hundred bytes are read from a peer.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Annotated, Literal, TypeVar

import msgspec

from pdserve.errors import ProtocolError
from pdserve.transfer.transports.base import PeerRefused
from pdserve.transfer.transports.messages import Sentence

VERSION = 1
GREETING_BYTES = 32
_MAGIC = b"pdserve-transport "
MAX_FRAME = 2048

T = TypeVar("T", bound=msgspec.Struct)
Nonce = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Token = Annotated[bytes, msgspec.Meta(max_length=16)]
Window = Annotated[int, msgspec.Meta(ge=65536, le=2**40)]


class Hello(msgspec.Struct, array_like=True, frozen=True):
    name: Name
    nonce: Nonce
    scheme: Annotated[str, msgspec.Meta(max_length=20)]
    what: Literal["control", "stream"]
    #: a stream's: which session it belongs to
    session: Token
    #: bytes that may be under way to the dialler
    window: Window


class Challenge(msgspec.Struct, array_like=True, frozen=True):
    name: Name
    nonce: Nonce
    window: Window


class Proof(msgspec.Struct, array_like=True, frozen=True, tag=1):
    mac: Nonce


class Welcome(msgspec.Struct, array_like=True, frozen=True, tag=2):
    mac: Nonce
    session: Token


class Refusal(msgspec.Struct, array_like=True, frozen=True, tag=3):
    reason: Sentence


def nonce() -> bytes:
    return secrets.token_bytes(32)


def greeting(tls: bool, version: int = VERSION) -> bytes:
    text = b"%s%d %s" % (_MAGIC, version, b"tls" if tls else b"plain")
    return text.ljust(GREETING_BYTES - 1) + b"\n"


def read_greeting(data: bytes) -> tuple[int, bool]:
    """(version, tls). Raises ProtocolError when it is none."""
    words = data[len(_MAGIC) :].split()
    if not data.startswith(_MAGIC) or len(data) != GREETING_BYTES or len(words) != 2 or not words[0].isdigit():
        raise ProtocolError("this is not a pdserve daemon's greeting")
    return int(words[0]), words[1] == b"tls"


def looks_like_greeting(start: bytes) -> bool:
    """Judges by the first bytes, so that others are shown out before they fill a greeting."""
    return start.startswith(_MAGIC[: len(start)])


PREFIX_BYTES = len(_MAGIC)


def check_greeting(data: bytes, tls: bool, address: str) -> None:
    """The dialler's judgement of the listener's greeting. Raises PeerRefused in words."""
    try:
        version, their_tls = read_greeting(data)
    except ProtocolError as e:
        raise PeerRefused(f"{address} answers, but is not a pdserve daemon's transport") from e
    if version != VERSION:
        raise PeerRefused(
            f"{address} speaks version {version} of the transport, this daemon version {VERSION}: upgrade the older one"
        )
    if their_tls != tls:
        theirs, ours = ("TLS", "plain TCP") if their_tls else ("plain TCP", "TLS")
        raise PeerRefused(
            f"{address} wants {theirs}, this daemon is set to {ours}: give both the same peers.tls settings"
        )


def encode(message: msgspec.Struct) -> bytes:
    """A frame: 2 bytes of length, then msgpack."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(2, "little") + body


def frame_length(header: bytes) -> int:
    length = int.from_bytes(header, "little")
    if not 0 < length <= MAX_FRAME:
        raise ProtocolError(f"a frame of {length} bytes before the secret was proved; at most {MAX_FRAME}")
    return length


def decode(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ProtocolError(f"not a {kind.__name__}: {e}") from e


def decode_answer(body: bytes) -> Welcome | Refusal:
    try:
        return msgspec.msgpack.decode(body, type=Welcome | Refusal)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ProtocolError(f"neither a welcome nor a refusal: {e}") from e


def decode_proof(body: bytes) -> Proof:
    return decode(body, Proof)


def mac(
    secret: bytes, side: Literal["dialler", "listener"], hello: Hello, challenge: Challenge, channel: bytes
) -> bytes:
    """The proof of one side. `channel` is the fingerprint of the listener's certificate, empty without TLS."""
    said = msgspec.msgpack.encode(["pdserve-transport", VERSION, side, hello, challenge, channel])
    return hmac.new(secret, said, hashlib.sha256).digest()


def proves(given: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(given, expected)
