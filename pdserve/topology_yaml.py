"""Step one and two of reading a topology: YAML to plain data, and what is wrong with its keys, types and ranges in words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import yaml

from pdserve.errors import ConfigError

Sections = Mapping[str, type]  # section of the file -> the struct that says which keys it has


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (YAML would silently keep the last)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ConfigError(str(key), f"this key in line {line} is not text", "Put it in quotes.")
        if key in seen:
            raise ConfigError(key, f"given twice (again in line {line})", "Keep one of them.")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read(text: str) -> dict[str, Any]:
    try:
        raw = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError("", f"not valid YAML: {where}{problem}") from error
    if not isinstance(raw, dict):
        kind = "empty" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError("", f"the topology must be a mapping of keys, this file is {kind}", "See deploy/topologies.")
    return raw


def refuse_unknown_keys(raw: dict[str, Any], top: type, sections: Sections) -> None:
    _check_keys("", raw, top, sections)
    for section, struct in sections.items():
        value: Any = raw
        for word in section.split("."):
            value = value.get(word) if isinstance(value, dict) else None
        if isinstance(value, dict):
            _check_keys(section, value, struct, sections)
        elif isinstance(value, list):
            for i, entry in enumerate(value):
                if isinstance(entry, dict):
                    _check_keys(f"{section}[{i}]", entry, struct, sections)


def _check_keys(path: str, raw: dict[Any, Any], struct: type, sections: Sections) -> None:
    known = [field.name for field in msgspec.structs.fields(struct)]
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            fix = f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(known)}."
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(where, "unknown key", _misplaced(path, str(key), sections) or fix)


def _misplaced(path: str, key: str, sections: Sections) -> str:
    """An engine key at the top is the most likely slip; say where it goes."""
    if not path and key in [field.name for field in msgspec.structs.fields(sections["engine"])]:
        return f"It belongs under engine: (engine.{key}) or to one engine (prefill[0].{key})."
    return ""


_TYPE_WORDS = {
    "int": "an integer",
    "str": "text",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping of keys",
}
_VALUE_WORDS = {
    int: "a number",
    str: "text",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    type(None): "empty",
}


def explain(error: msgspec.ValidationError, raw: dict[str, Any], sections: Sections) -> ConfigError:
    """msgspec says "Expected `int`, got `str` - at `$.decode[0].port`"; we say the path, the value and the fix."""
    message, _, where = str(error).partition(" - at `$")
    path = where.rstrip("`").lstrip(".")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", message)
    if missing:
        return ConfigError(f"{path}.{missing[1]}".lstrip("."), "missing", _MISSING_FIX.get(missing[1], "Add it."))
    value = _value_at(raw, path.replace("[...]", ""))
    if path.endswith("[...]") and isinstance(value, dict):  # a mapping with free keys: name the one that is wrong
        wrong = next(key for key, entry in value.items() if not isinstance(entry, str))
        path, value = f"{path[:-5]}.{wrong}", value[wrong]
    expected = re.match(r"Expected `([^`]+)`(?:, got|$)", message)
    if expected:
        kinds = [kind.strip() for kind in expected[1].split("|")]
        wanted = " or ".join(_TYPE_WORDS.get(kind, kind) for kind in kinds if kind != "null")
        fix = "Put it in quotes." if wanted == "text" and isinstance(value, int | float) else f"Give {wanted}."
        return ConfigError(path, f"{value!r} is {_VALUE_WORDS.get(type(value), type(value).__name__)}", fix)
    if message.startswith("Invalid enum value"):
        known = choices(path, sections)
        close = difflib.get_close_matches(str(value), known, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        return ConfigError(path, f"{value!r} is not known", f"{hint}Known: {', '.join(known)}.")
    if "matching regex" in message:
        return ConfigError(path, f"{value!r} is not a name", "Use small letters, digits and dashes, 40 at most.")
    return ConfigError(path, f"{value!r} is out of range", _range_fix(message))


def _range_fix(message: str) -> str:
    """ "Expected `int` <= 65535" -> "Give an integer <= 65535."."""
    bound = re.sub(r"Expected `(\w+)`", lambda m: f"Give {_TYPE_WORDS.get(m[1], m[1])}", message)
    return bound.replace("that's a", "that is a") + "."


_MISSING_FIX = {
    "name": "Give the deployment a name, e.g. name: local-cpu.",
    "model": "Give demo, a hub id or a folder, e.g. model: demo.",
    "port": "Give each engine a port, e.g. port: 8100.",
    "size": "Give a size, e.g. size: 2GiB.",
}


def choices(path: str, sections: Sections) -> list[str]:
    """What a key such as `engine.dtype` or `decode[0].dtype` may be, when that is a fixed list."""
    section, _, name = path.rpartition(".")
    fields = [*msgspec.structs.fields(sections[section.partition("[")[0]]), *msgspec.structs.fields(sections["engine"])]
    hint = next((field.type for field in reversed(fields) if field.name == name), None)
    return [str(choice) for choice in getattr(hint, "__args__", ())]


def _value_at(raw: Any, path: str) -> Any:
    """The value at a path such as `decode[0].port`; the nearest that exists when it ends in something unnamed."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            raw = raw[int(index)] if index else raw[name]
        except (KeyError, IndexError, TypeError):
            return raw
    return raw


def parse_size(value: int | str, key: str) -> int:
    """Bytes of "2GiB", "512MiB", "1.5 GiB", "2GB" or a plain number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", str(value).strip())
    if not match:
        raise ConfigError(key, f"{value!r} is not a size", "Write a number and a unit, e.g. 2GiB or 512MiB.")
    unit = match[2] or ""
    power = "KMGT".index(unit[0]) + 1 if unit else 0
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)
