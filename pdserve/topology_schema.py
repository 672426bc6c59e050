"""The topology's JSON Schema (editors complete and check with it) and its reference page, both made from the structs.

The structs say names, types, ranges and defaults; topology_keys.py says what each key means, with an example.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import yaml

from pdserve import topology
from pdserve.topology_keys import KEYS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SIZE = r"^\d+(\.\d+)?\s*([KMGT]i?)?B?$"
#: keys that take "2GiB" as well as a number of bytes
SIZES = ("cache.size", "cache.disk.size", "cache.disk.min_free")
# The roles share one struct: its keys are described once, under the first.
_FIRST, *_OTHERS = topology.ROLES
_NAMES = {"_File": "Topology", "_Override": "EngineInstance", "_CacheFile": "Cache", "_DiskFile": "Disk"}
Schema = dict[str, Any]


def schema() -> Schema:
    """JSON Schema of the file as written. Rules that span keys are the reader's alone: `pdserve topology check`."""
    (_, made) = msgspec.json.schema_components([topology._File], ref_template="#/$defs/{name}")
    parts = {_NAMES.get(name, name): _renamed(part) for name, part in made.items()}
    for part in parts.values():
        part["title"] = _NAMES.get(part["title"], part["title"])
        part["additionalProperties"] = False
    top = parts.pop("Topology")
    full = {"$schema": DIALECT, **top, "title": "pdserve topology", "$defs": parts}
    for path, key in KEYS.items():
        found = _at(full, path)
        if found is not None:
            _describe(found, path, key.meaning, key.example)
    for name, inherited in parts["EngineInstance"]["properties"].items():
        if (shared := KEYS.get(f"engine.{name}")) is not None:
            _describe(inherited, f"engine.{name}", shared.meaning, shared.example)
    plain: Schema = json.loads(json.dumps(full))  # msgspec leaves tuples in defaults
    return plain


def _renamed(part: Any) -> Any:
    """Without private names and without defaults that are whole sections."""
    if isinstance(part, dict):
        kept = {k: v for k, v in part.items() if not (k == "default" and isinstance(v, dict) and v)}
        return {k: _reference(v) if k == "$ref" else _renamed(v) for k, v in kept.items()}
    return [_renamed(entry) for entry in part] if isinstance(part, list) else part


def _reference(target: str) -> str:
    name = target.rpartition("/")[2]
    return f"#/$defs/{_NAMES.get(name, name)}"


def _describe(found: Schema, path: str, meaning: str, example: str) -> None:
    found["description"] = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", meaning).replace("`", "")
    found["examples"] = [yaml.safe_load(example)]
    if path in SIZES:
        for kind in found.get("anyOf", []):
            if kind.get("type") == "string":
                kind["pattern"] = SIZE


def _at(full: Schema, path: str) -> Schema | None:
    """The property that a path such as `cache.disk.size` or `prefill[].port` names."""
    here: Schema = full
    for word in path.split("."):
        here = _resolve(full, here)
        found = here.get("properties", {}).get(word.removesuffix("[]"))
        if found is None:
            return None
        here = found["items"] if word.endswith("[]") else found
    return here


def _resolve(full: Schema, here: Schema) -> Schema:
    for kind in (here, *here.get("anyOf", [])):
        if "$ref" in kind:
            found: Schema = full["$defs"][kind["$ref"].rpartition("/")[2]]
            return found
    return here


def paths(full: Schema | None = None) -> Iterator[str]:
    """Every key of the file, in the structs' order; the engine's keys once, an instance's own once."""
    full = full or schema()
    yield from _paths(full, full, "")


def _paths(full: Schema, here: Schema, prefix: str) -> Iterator[str]:
    engine = set(full["$defs"]["Engine"]["properties"])
    for name, part in here["properties"].items():
        path = f"{prefix}.{name}" if prefix else name
        if prefix.endswith("[]") and name in engine:
            continue
        yield path
        if path in _OTHERS:
            continue
        items = part.get("items", {})
        below, path = (items, f"{path}[]") if "$ref" in items else (part, path)
        found = _resolve(full, below)
        if found is not below and "properties" in found:
            yield from _paths(full, found, path)


# --- the page -----------------------------------------------------------------------------------------------------

_HEAD = """<!-- Made by `make docs-generate` from pdserve/topology.py and pdserve/topology_keys.py. Do not edit. -->
# Topology reference

One YAML describes a deployment. Words are vLLM's own. An unknown key is an error that names the nearest known one; every
error names the key's path (`decode[1].port`), its value and the fix.

```sh
pdserve topology check my.yaml         # reads it as launch does, and looks at nothing else
pdserve doctor my.yaml                 # whether this machine can run it, and what to change
pdserve launch my.yaml --dry-run       # the exact processes, without starting any
```

## In an editor

[topology.schema.json](topology.schema.json) lets an editor complete keys, show their meaning and mark mistakes. With a YAML
language server this line at the top of the file is enough (the shipped topologies have it):

```yaml
# yaml-language-server: $schema=https://.../topology.schema.json    # or a path: $schema=./topology.schema.json
```

`pdserve topology schema > topology.schema.json` writes it beside your file. What spans several keys (a port used twice,
GPUs that do not match tensor_parallel_size) only `pdserve topology check` and `launch` see.

## A whole file

```yaml
EXAMPLE```

"""


def page() -> str:
    """docs/topology.md."""
    full = schema()
    example = topology.shipped_topologies()["gpu-1p1d"].read_text()
    text = [_HEAD.replace("EXAMPLE", example)]
    listed = list(paths(full))
    sections = ["", *(p for p in listed if any(q.startswith((f"{p}.", f"{p}[].")) for q in listed))]
    for section in sections:
        inside = [p for p in listed if p.rpartition(".")[0].removesuffix("[]") == section]
        text.append(_section(full, section, inside))
    return "".join(text)


def _section(full: Schema, section: str, inside: list[str]) -> str:
    title = {"": "Top level", _FIRST: "An engine: " + ", ".join(topology.ROLES)}.get(section, section)
    intro = f"{KEYS[section].meaning}\n\n" if section in KEYS and section != _FIRST else ""
    if section == _FIRST:
        intro = "Beside these, every key of [engine](#engine) may stand here and then holds for this one engine.\n\n"
    lines = [f"## {title}\n\n{intro}"]
    for path in inside:
        lines.append(_entry(full, path))
    return "".join(lines)


def _entry(full: Schema, path: str) -> str:
    key, part = KEYS[path], _at(full, path) or {}
    name = path.rpartition(".")[2]
    facts = ", ".join(filter(None, [kind(full, part, path), default(full, part, path)]))
    example = yaml.safe_load(key.example)
    shown = f"{name}: {key.example}"
    assert example is not None or key.example == "null", path
    return f"### `{path}`\n\n{key.meaning}\n\n{facts}. Example: `{shown}`\n\n"


def kind(full: Schema, part: Schema, path: str) -> str:
    """Its type in words."""
    if path in SIZES:
        return "size (`2GiB`, `512MiB`, or bytes)"
    words = [_kind(full, option) for option in part.get("anyOf", [part])]
    return " or ".join(dict.fromkeys(word for word in words if word))


def _kind(full: Schema, part: Schema) -> str:
    if "$ref" in part:
        return "section"
    if "enum" in part:
        return "one of " + ", ".join(f"`{value}`" for value in part["enum"])
    word = {
        "integer": "integer",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "object": "mapping",
        "null": "",
    }.get(part.get("type", ""), "")
    if part.get("type") == "array":
        inner = _kind(full, part.get("items", {}))
        return "list of sections" if inner == "section" else f"list of {inner}"
    low = part.get("minimum", part.get("exclusiveMinimum"))
    high = part.get("maximum", part.get("exclusiveMaximum"))
    above = "above" if "exclusiveMinimum" in part else "from"
    bounds = [f"{above} {low}" if low is not None else "", f"up to {high}" if high is not None else ""]
    step = f"a multiple of {part['multipleOf']}" if "multipleOf" in part else ""
    return " ".join(filter(None, [word, *bounds, step]))


def default(full: Schema, part: Schema, path: str) -> str:
    above, _, name = path.rpartition(".")
    owner = _resolve(full, _at(full, above) or {}) if above else full
    if name in owner.get("required", ()):
        return "required"
    value = part.get("default")
    if value in (None, "", [], {}):
        return ""
    return f"default `{str(value).lower() if isinstance(value, bool) else value}`"
