"""Who may use the pages under /admin. Pure: what a request says of itself goes in, a refusal comes out.

The admin key opens everything. Without one configured, nothing can be changed, and looking is allowed from this machine
alone: the connection comes from loopback, was not passed on by another server, and was asked for by a name of this
machine (another site's page in a browser here could otherwise make its own name point at 127.0.0.1).
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping

from pdserve.errors import RequestError

_PASSED_ON = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


class Access:
    def __init__(self, key: str) -> None:
        self._key = key

    @property
    def keyed(self) -> bool:
        return bool(self._key)

    def change(self, headers: Mapping[str, str]) -> None:
        """Raises RequestError unless the admin key is given."""
        if not self._key:
            text = "The proxy was started without an admin key (PDSERVE_ADMIN_TOKEN)."
            raise RequestError(403, text, "permission_error", code="no_admin_key")
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), self._key.encode()):
            raise RequestError(401, "The admin key is missing or wrong.", "authentication_error", code="invalid_key")

    def look(self, headers: Mapping[str, str], peer: str) -> None:
        """The same with a key; without one, raises RequestError unless `peer` (the client's address) is this machine."""
        if self._key:
            return self.change(headers)
        if not _is_loopback(peer) or not _is_local(headers.get("host", "")) or any(h in headers for h in _PASSED_ON):
            text = "Without an admin key (PDSERVE_ADMIN_TOKEN) this is shown only on the proxy's own machine."
            raise RequestError(403, text, "permission_error", code="no_admin_key")


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def _is_local(host: str) -> bool:
    """Of a Host header, its port included."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower() == "localhost" or _is_loopback(name)
