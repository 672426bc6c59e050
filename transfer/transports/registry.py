"""Transports by URL scheme: the only list of them. Each is imported when it is asked for, its library with it.

    tcp://10.0.0.5:7400?streams=4&adapt=1&window=64MiB&segment=4MiB&verify=1
    ucx://10.0.0.5:7400?tls=tcp                  needs the extra: pip install 'pdserve[ucx]'
    nixl://10.0.0.5:7400                         needs the extra: pip install 'pdserve[nixl]'

What comes after the question mark are the fields of the scheme's options, by name. A missing library raises ConfigError with
one sentence; whether to go on with tcp is the caller's to decide (`fallback` names it).
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, urlsplit

import msgspec

from pdserve.errors import ConfigError
from pdserve.transfer.transports.base import Local, Transport
from pdserve.transfer.transports.plane import Limits
from pdserve.transfer.transports.security import Security

#: what serves everywhere
FALLBACK = "tcp"

_UNITS = {"": 1, "K": 2**10, "KIB": 2**10, "M": 2**20, "MIB": 2**20, "G": 2**30, "GIB": 2**30}

Size = Annotated[int, msgspec.Meta(ge=65536, le=2**34)]
Seconds = Annotated[float, msgspec.Meta(ge=1, le=3600)]


class Common(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options that every scheme takes; see session.Limits."""

    segment: Size = 4 << 20
    window: Size = 64 << 20
    verify: bool = True
    silence: Seconds = 20.0

    def limits(self) -> Limits:
        return Limits(self.segment, self.window, self.verify, self.silence)


class TcpOptions(Common, frozen=True, forbid_unknown_fields=True):
    streams: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4
    #: use as many of them as pay off; 0: all of them always
    adapt: bool = True


class UcxOptions(Common, frozen=True, forbid_unknown_fields=True):
    segment: Size = 8 << 20
    #: UCX_TLS: tcp between hosts; rc,tcp or all where a system UCX with verbs is installed
    tls: str = "tcp"


class NixlOptions(Common, frozen=True, forbid_unknown_fields=True):
    segment: Size = 8 << 20
    #: UCX_TLS for the UCX inside NIXL; empty: it chooses
    tls: str = ""


T = TypeVar("T", bound=Common)


def build(url: str, local: Local, security: Security, key: str = "peers.listen") -> Transport:
    """The transport that `url` names, not yet listening; `key` is where the user wrote it. Raises ConfigError."""
    try:
        parts = urlsplit(url)
    except ValueError as e:
        raise ConfigError(key, f"{url!r} is not a URL ({e})", "Write it like tcp://10.0.0.5:7400.") from e
    maker = _MAKERS.get(parts.scheme)
    if maker is None:
        close = difflib.get_close_matches(parts.scheme, _MAKERS, 1)
        hint = f"Did you mean {close[0]}://?" if close else f"Use one of: {known()}."
        raise ConfigError(key, f"{parts.scheme or url!r} is not a transport", hint)
    return maker(parts, local, security, key)


def known() -> str:
    return ", ".join(f"{scheme}://" for scheme in _MAKERS)


def _options(parts: SplitResult, kind: type[T], key: str) -> T:
    allowed = {f.name: f.type for f in msgspec.structs.fields(kind)}
    given: dict[str, Any] = {}
    for name, text in parse_qsl(parts.query, keep_blank_values=True):
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            hint = f"Did you mean {close[0]}?" if close else f"Known are: {', '.join(sorted(allowed))}."
            raise ConfigError(key, f"unknown option {name!r} of {parts.scheme}://", hint)
        given[name] = _value(name, text, getattr(allowed[name], "__origin__", allowed[name]), key)
    try:
        options = msgspec.convert(given, kind)
    except msgspec.ValidationError as e:
        raise ConfigError(key, f"{parts.scheme}://: {e}", "Change the value.") from e
    if "segment" in given and options.segment * 4 > options.window:
        raise ConfigError(
            key, f"window={options.window} holds fewer than four segments of {options.segment}", "Enlarge window."
        )
    return options


def _value(name: str, text: str, kind: Any, key: str) -> object:
    try:
        if kind is bool:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
        if kind is int:
            return _number(text)
        if kind is float:
            return float(text)
    except (ValueError, KeyError) as e:
        want = {bool: "0 or 1", int: "a whole number, or a size such as 64MiB", float: "a number"}[kind]
        raise ConfigError(key, f"{name}={text!r} does not fit", f"Give {want}.") from e
    return text


def _number(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(text)
    return int(match[1]) * _UNITS[match[2].upper()]


# ---- one function per scheme ----


def _tcp(parts: SplitResult, local: Local, security: Security, key: str) -> Transport:
    options = _options(parts, TcpOptions, key)
    module = importlib.import_module("pdserve.transfer.transports.tcp")
    made: Transport = module.TcpTransport(local, security, options.limits(), options.streams, options.adapt)
    return made


def _ucx(parts: SplitResult, local: Local, security: Security, key: str) -> Transport:
    options = _options(parts, UcxOptions, key)
    module = importlib.import_module("pdserve.transfer.transports.ucx")
    return _made(lambda: module.UcxTransport(local, security, options.limits(), options.tls), key)


def _nixl(parts: SplitResult, local: Local, security: Security, key: str) -> Transport:
    options = _options(parts, NixlOptions, key)
    module = importlib.import_module("pdserve.transfer.transports.nixl")
    return _made(lambda: module.NixlTransport(local, security, options.limits(), options.tls), key)


def _made(make: Callable[[], Any], key: str) -> Transport:
    try:
        made: Transport = make()
    except ConfigError as e:
        raise ConfigError(key, e.problem, e.fix) from e  # a missing library: say where it was asked for
    return made


_MAKERS: dict[str, Callable[[SplitResult, Local, Security, str], Transport]] = {
    "tcp": _tcp,
    "ucx": _ucx,
    "nixl": _nixl,
}
