"""Who may talk to us, and whether others can listen: the shared secret, and TLS where certificates are given."""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.errors import ConfigError

MIN_SECRET = 16


@dataclass(frozen=True)
class Security:
    """The same `secret` on every host. TLS is on when a certificate or a CA is given:

    cert, key   PEM files of this daemon's certificate; whoever listens needs them
    ca          PEM file; the peer must then show a certificate that it has signed, whichever side dialled (mutual TLS)

    Without a CA the certificate is still bound into the proof of the secret, so nobody can stand in between. Names inside
    certificates are not compared with addresses: what counts is the CA and the secret.
    """

    secret: bytes = field(repr=False)
    cert: str = ""
    key: str = ""
    ca: str = ""

    def __post_init__(self) -> None:
        if len(self.secret) < MIN_SECRET:
            raise ConfigError(
                "peers.secret",
                f"has {len(self.secret)} bytes, at least {MIN_SECRET} are needed",
                "Make one with: openssl rand -hex 32",
            )
        if bool(self.cert) != bool(self.key):
            raise ConfigError(
                "peers.tls", "a certificate and its key belong together", "Give both cert and key, or neither."
            )
        for name in ("cert", "key", "ca"):
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise ConfigError(f"peers.tls.{name}", f"no file {path!r}", "Give the path of a PEM file.")

    @property
    def tls(self) -> bool:
        return bool(self.cert or self.ca)

    def context(self, server_side: bool) -> ssl.SSLContext:
        """For one side. Raises ConfigError when the files are of no use."""
        if server_side and not self.cert:
            raise ConfigError("peers.tls", "listening with TLS needs a certificate", "Give cert and key.")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED if self.ca else ssl.CERT_NONE
        try:
            if self.cert:
                context.load_cert_chain(self.cert, self.key)
            if self.ca:
                context.load_verify_locations(self.ca)
        except (ssl.SSLError, OSError) as e:
            raise ConfigError(
                "peers.tls", f"cannot use {self.cert or self.ca}: {e}", "Check the PEM files and their rights."
            ) from e
        return context

    def own_fingerprint(self) -> bytes:
        """Of the certificate that we show when we listen."""
        text = Path(self.cert).read_text()
        end = "-----END CERTIFICATE-----"
        first = text[text.index("-----BEGIN CERTIFICATE-----") : text.index(end) + len(end)]
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(first)).digest()
