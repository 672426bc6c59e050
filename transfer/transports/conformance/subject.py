"""What a transport under test has to bring along."""

from __future__ import annotations

from pdserve.transfer.transports.base import Local, Transport


class Subject:
    """A transport under test and what can be done to the way between two ends. `None` where a fault cannot be arranged."""

    def make(self, local: Local) -> Transport:
        raise NotImplementedError

    def url(self, name: str) -> str:
        """Where the daemon `name` listens."""
        raise NotImplementedError

    def way(self, bound: str) -> str:
        """What the other end dials, given what listen() returned: through a relay, where faults need one."""
        return bound

    def nobody(self) -> str:
        """An address where nobody listens."""
        raise NotImplementedError

    def wedged(self) -> str | None:
        """An address that accepts and never answers."""
        return None

    def stall(self, sender: str, receiver: str) -> bool:
        """Bytes from one to the other stop somewhere; False: cannot be arranged."""
        return False

    def resume(self, sender: str, receiver: str) -> None:
        """The opposite."""

    def cut(self, one: str, other: str) -> bool:
        """Ends what is between the two, at once and from outside."""
        return False

    def close(self) -> None:
        """Takes relays and the like down."""
