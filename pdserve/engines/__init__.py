"""The engines pdserve knows: a name and the modules behind it, imported only when asked for. The only list of them.

Each engine is one folder with `dialect.py` (what it wants in a request; used by the proxy) and `command.py` (how it is
started; used by deploy). Both are plain modules whose functions fit the Protocols in base.py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from pdserve.errors import ConfigError

if TYPE_CHECKING:
    from pdserve.engines.base import Command, Dialect

_FOLDERS = {"vllm": "pdserve.engines.vllm", "fake": "pdserve.engines.fake"}


def names() -> tuple[str, ...]:
    """Every engine that can be named in a topology or on the proxy's command line."""
    return tuple(_FOLDERS)


def dialect(name: str) -> Dialect:
    """How the engine called `name` is talked to."""
    return cast("Dialect", importlib.import_module(f"{_folder(name)}.dialect"))


def command(name: str) -> Command:
    """How the engine called `name` is started."""
    return cast("Command", importlib.import_module(f"{_folder(name)}.command"))


def _folder(name: str) -> str:
    if name not in _FOLDERS:
        raise ConfigError("engine.kind", f"{name!r} is not an engine", f"Known engines: {', '.join(_FOLDERS)}.")
    return _FOLDERS[name]
