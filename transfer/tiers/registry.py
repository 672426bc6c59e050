"""Lower tiers by URL: the only list of them. Each is imported when it is asked for, its client library with it.

    redis://[user]:${NAME}@host:port/db?ttl=86400       rediss:// with TLS; valkey:// and valkeys:// mean the same
    s3://bucket/prefix?endpoint=http://host:9000        credentials from the usual places (environment, ~/.aws, the instance)
    mooncake://master:50051?segment=1GiB                &metrics_port=9003, where the master lists the pool (for deleting)
    file:///shared/directory?ttl=604800
    memory:                                             this process's own memory, for trying things out

What comes after the question mark are the fields of the tier's options, by name; an error names the key, the value and
what would be right. A password is best left to the environment (${NAME}) or to a file (?password_file=PATH): one that is
written out can be read by everybody in the list of processes. Passwords never appear in an error.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import msgspec

from pdserve import secret
from pdserve.errors import ConfigError
from pdserve.transfer.tiers.base import Tier
from pdserve.transfer.tiers.breaker import Guarded

S = TypeVar("S", bound=msgspec.Struct)

_UNITS = {
    "": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


def build(url: str, key: str = "cache.tiers[0]", get_timeout: float = 10.0) -> Guarded:
    """The tier that `url` names, behind a circuit breaker; `key` is where the user wrote it.

    Raises ConfigError. Connects to nothing yet.
    """
    return Guarded(bare(url, key), get_timeout=get_timeout)


def bare(url: str, key: str = "cache.tiers[0]") -> Tier:
    """The tier alone."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise ConfigError(key, f"{show(url)!r} is not a URL ({e})", "Write it like redis://host:6379/0.") from e
    maker = _MAKERS.get(parts.scheme)
    if maker is None:
        raise ConfigError(key, f"{parts.scheme or show(url)!r} is not a kind of tier", f"Use one of: {known()}.")
    return maker(_Wanted(url, key, parts, port))


def known() -> str:
    return ", ".join(f"{scheme}://" for scheme in _MAKERS)


def show(url: str) -> str:
    """The URL as it may be logged: without its password."""
    return secret.hidden(url)


class _Wanted:
    """A URL taken apart, and complaints about it."""

    def __init__(self, url: str, key: str, parts: SplitResult, port: int | None) -> None:
        self.url, self.key, self.parts, self.port = url, key, parts, port
        self.host = parts.hostname or ""
        self.path = unquote(parts.path)
        self._shown = show(url)

    def wrong(self, problem: str, fix: str) -> ConfigError:
        return ConfigError(self.key, f"{problem} in {self._shown}", fix)

    def need_host(self, what: str) -> None:
        if not self.host:
            raise self.wrong(f"no {what}", f"Write {self.parts.scheme}://{what}...")

    def options(self, kind: type[S], fixed: dict[str, Any]) -> S:
        """Options of `kind`: `fixed` ones from the URL itself, the rest from its query."""
        allowed = {f.name: f.type for f in msgspec.structs.fields(kind) if f.name not in fixed}
        given: dict[str, Any] = dict(fixed)
        for name, text in parse_qsl(self.parts.query, keep_blank_values=True):
            if name not in allowed:
                close = difflib.get_close_matches(name, allowed, 1)
                hint = f"Did you mean {close[0]}?" if close else f"Known are: {', '.join(sorted(allowed))}."
                raise self.wrong(f"unknown option {name!r}", hint)
            given[name] = self._value(name, text, allowed[name])
        try:
            return msgspec.convert(given, kind)
        except msgspec.ValidationError as e:
            raise self.wrong(str(e), "Change the value.") from e

    def _value(self, name: str, text: str, kind: Any) -> object:
        kind = getattr(kind, "__origin__", kind)
        try:
            if kind is bool:
                return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[text.lower()]
            if kind is int:
                return _number(text)
            if kind is float:
                return float(text)
        except (ValueError, KeyError) as e:
            want = {bool: "0 or 1", int: "a whole number, or a size such as 512MiB", float: "a number"}[kind]
            raise self.wrong(f"{name}={text!r} does not fit", f"Give {want}.") from e
        return text


def _number(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in _UNITS or ("." in match[1] and not match[2]):
        raise ValueError(text)
    return int(float(match[1]) * _UNITS[match[2].upper()]) if match[2] else int(match[1])


# ---- one function per kind ----


def _redis(wanted: _Wanted) -> Tier:
    module = importlib.import_module("pdserve.transfer.tiers.redis")
    wanted.need_host("host")
    db = wanted.path.strip("/") or "0"
    if not db.isdigit():
        raise wanted.wrong(
            f"the database {db!r} is not a number", "Write it after the slash, like redis://host:6379/0."
        )
    user, password = secret.user_and_password(wanted.url, wanted.key)
    fixed = {
        "host": wanted.host,
        "port": wanted.port or 6379,
        "db": int(db),
        "username": user,
        "password": password,
        "tls": wanted.parts.scheme in ("rediss", "valkeys"),
    }
    options = wanted.options(module.RedisOptions, fixed)
    if password and options.password_file:
        raise wanted.wrong("a password and password_file", "Give one of them.")
    for name in ("ca", "cert", "cert_key", "password_file"):
        _need_file(wanted, name, getattr(options, name))
    return _made(wanted, module.RedisTier, options)


def _s3(wanted: _Wanted) -> Tier:
    module = importlib.import_module("pdserve.transfer.tiers.s3")
    wanted.need_host("bucket")
    if wanted.parts.username or wanted.parts.password:
        raise wanted.wrong("credentials", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or profile=NAME, instead.")
    options = wanted.options(module.S3Options, {"bucket": wanted.parts.netloc, "prefix": wanted.path.strip("/")})
    if options.endpoint and urlsplit(options.endpoint).scheme not in ("http", "https"):
        raise wanted.wrong(f"endpoint={options.endpoint!r} is not a URL", "Write endpoint=https://host:port.")
    return _made(wanted, module.S3Tier, options)


def _mooncake(wanted: _Wanted) -> Tier:
    module = importlib.import_module("pdserve.transfer.tiers.mooncake")
    wanted.need_host("master")
    master = f"{wanted.host}:{wanted.port or 50051}"
    return _made(wanted, module.MooncakeTier, wanted.options(module.MooncakeOptions, {"master": master}))


def _file(wanted: _Wanted) -> Tier:
    module = importlib.import_module("pdserve.transfer.tiers.fs")
    if wanted.host not in ("", "localhost"):
        raise wanted.wrong(
            f"the host {wanted.host!r}", "A mounted directory is meant: file:///path, with three slashes."
        )
    if not Path(wanted.path).is_dir():
        raise wanted.wrong(f"no directory {wanted.path or '/'}", "Make or mount it first.")
    return _made(wanted, module.FsTier, wanted.options(module.FsOptions, {"root": wanted.path}))


def _memory(wanted: _Wanted) -> Tier:
    module = importlib.import_module("pdserve.transfer.tiers.memory")
    tier: Tier = module.MemoryTier()
    return tier


def _made(wanted: _Wanted, kind: Callable[[Any], Tier], options: object) -> Tier:
    try:
        return kind(options)
    except ConfigError as e:
        raise ConfigError(wanted.key, e.problem, e.fix) from e  # a missing library: say where it was asked for


def _need_file(wanted: _Wanted, name: str, path: str) -> None:
    if path and not Path(path).is_file():
        raise wanted.wrong(f"{name}={path!r}: no such file", "Give the path of a file that can be read.")


_MAKERS: dict[str, Callable[[_Wanted], Tier]] = {
    "redis": _redis,
    "rediss": _redis,
    "valkey": _redis,
    "valkeys": _redis,
    "s3": _s3,
    "mooncake": _mooncake,
    "file": _file,
    "memory": _memory,
}
