"""The key table, the JSON Schema and the reference page: complete, true, and what is committed is what would be made now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pdserve import topology, topology_schema
from pdserve.topology_keys import KEYS, Key

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = topology_schema.schema()
BASE: dict[str, Any] = {
    "name": "base",
    "model": "Qwen/Qwen3-8B",
    "prefill": [{"port": 8100}],
    "decode": [{"port": 8200}],
    "cache": {"size": "1GiB", "disk": {"size": "1GiB"}},
    "proxy": {"port": 8000},
}


def placed(key: str, value: Any, into: dict[str, Any]) -> None:
    """Sets `cache.disk.size` or `prefill[].port` in a topology as written."""
    *way, last = key.split(".")
    for word in way:
        name, many = word.removesuffix("[]"), word.endswith("[]")
        into = into.setdefault(name, [{}] if many else {})
        into = into[0] if many else into
    into[last] = value


def test_every_key_is_described_and_nothing_else() -> None:
    assert sorted(topology_schema.paths(SCHEMA)) == sorted(KEYS)


@pytest.mark.parametrize(("path", "key"), KEYS.items(), ids=list(KEYS))
def test_each_example_is_read(path: str, key: Key) -> None:
    written = json.loads(json.dumps(BASE))
    for needed, value in key.needs.items():
        placed(needed, value, written)
    placed(path, yaml.safe_load(key.example), written)
    topology.parse(yaml.safe_dump(written))
    jsonschema.validate(written, SCHEMA)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", topology.shipped_topologies().values(), ids=lambda file: file.stem)
def test_shipped_topologies_fit_and_name_the_schema(file: Path) -> None:
    jsonschema.validate(yaml.safe_load(file.read_text()), SCHEMA)
    first = file.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    named = (file.parent / first.partition("$schema=")[2]).resolve()
    assert named == ROOT / "docs" / "topology.schema.json"
    assert named.is_file()


@pytest.mark.parametrize(
    "spoil",
    [
        {"engine": {"devise": "cpu"}},
        {"prefill": [{"port": "many"}]},
        {"prefill": [{}]},
        {"cache": {"size": "much"}},
        {"cache": {"size": "1GiB", "chunk_tokens": 100}},
        {"proxy": {"policy": "fastest"}},
        {"name": "Not A Name"},
        {"lunch": True},
    ],
    ids=str,
)
def test_reader_and_schema_refuse_the_same(spoil: dict[str, Any]) -> None:
    written = {**BASE, **spoil}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written, SCHEMA)
    with pytest.raises(topology.ConfigError):
        topology.parse(yaml.safe_dump(written))


def test_the_committed_pages_are_up_to_date() -> None:
    stale = "run `make docs-generate`"
    assert (ROOT / "docs" / "topology.md").read_text() == topology_schema.page(), stale
    assert json.loads((ROOT / "docs" / "topology.schema.json").read_text()) == SCHEMA, stale
