"""TLS without a socket: bytes in, bytes out. Used by the handshake and the control way on the loop, and by streams on threads."""

from __future__ import annotations

import hashlib
import ssl
import threading

from pdserve.transfer.transports.base import PeerLost, PeerRefused

#: what one read() may bring: a few records
_READ = 256 << 10


class TlsPipe:
    """One TLS connection. Reading and writing may happen on two threads: OpenSSL allows only one at a time, so they take turns."""

    def __init__(self, context: ssl.SSLContext, server_side: bool) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._lock = threading.Lock()

    def handshake(self) -> bool:
        """Goes as far as it can with what was fed; True when it is complete. Raises PeerRefused."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as e:
            raise PeerRefused(f"TLS: {e.verify_message if isinstance(e, ssl.SSLCertVerificationError) else e}") from e
        return True

    def feed(self, data: bytes | memoryview) -> None:
        with self._lock:
            self._incoming.write(data)

    def read_into(self, view: memoryview) -> int:
        """Decrypted bytes into `view`; 0: more must be fed first. Raises PeerLost."""
        with self._lock:
            try:
                return self._object.read(len(view), view)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                return 0
            except ssl.SSLError as e:
                raise PeerLost(f"TLS: {e}") from e

    def read(self) -> bytes:
        with self._lock:
            try:
                return self._object.read(_READ)
            except ssl.SSLWantReadError:
                return b""
            except ssl.SSLError as e:
                raise PeerLost(f"TLS: {e}") from e

    def encrypt(self, data: bytes | memoryview) -> bytes:
        with self._lock:
            self._object.write(data)
            return self._outgoing.read()

    def outgoing(self) -> bytes:
        """What must be sent to the peer on TLS's own account."""
        with self._lock:
            return self._outgoing.read()

    def peer_fingerprint(self) -> bytes:
        der = self._object.getpeercert(True)
        return hashlib.sha256(der or b"").digest()
