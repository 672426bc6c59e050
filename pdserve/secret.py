"""Passwords in URLs: kept out of command lines, which every user of a machine can read, and out of what is shown.

A URL may name an environment variable, `redis://:${REDIS_PASSWORD}@host`; whoever opens the URL looks it up. A password that
is written out in a topology goes to its process through the environment, and `${...}` takes its place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

from pdserve.errors import ConfigError

_NAME = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def names(text: str) -> list[str]:
    """The environment variables that `text` asks for."""
    return _NAME.findall(text)


def reveal(text: str, key: str, variables: Mapping[str, str] | None = None) -> str:
    """`text` with every ${NAME} replaced by that variable. Raises ConfigError, naming `key`, when one is not set."""
    known = os.environ if variables is None else variables

    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ConfigError(key, f"the environment variable {match[1]} is not set", f"Run: export {match[1]}=...")
        return known[match[1]]

    return _NAME.sub(value, text)


def user_and_password(url: str, key: str) -> tuple[str, str]:
    """What stands before the @ of `url`, decoded and with variables replaced."""
    parts = urlsplit(url)
    user, password = parts.username or "", parts.password or ""
    # A variable's value is taken as it is; only what is written out in the URL is percent-encoded.
    return tuple(reveal(t, key) if names(t) else unquote(t) for t in (user, password))  # type: ignore[return-value]


def written_out(url: str) -> str:
    """The password that stands in `url` itself; empty when there is none, or when it is a variable's."""
    try:
        password = urlsplit(url).password or ""
    except ValueError:
        return ""
    return "" if names(password) else unquote(password)


def moved_to(url: str, name: str) -> tuple[str, dict[str, str]]:
    """`url` with its password replaced by ${name}, and {name: password}; as it is when no password is written out."""
    password = written_out(url)
    if not password:
        return url, {}
    head, _, rest = url.partition("://")
    user, _, _ = rest.rpartition("@")[0].partition(":")
    return f"{head}://{user}:${{{name}}}@{rest.rpartition('@')[2]}", {name: password}


def hidden(url: str) -> str:
    """The URL as it may be shown: without user and password."""
    return re.sub(r"(?<=://)(?!/)[^?#]*@", "...@", url)
