"""`pdserve topology list|check|show|schema`: topology files without a deployment."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import msgspec

from pdserve import output, secret, topology, topology_schema
from pdserve.errors import ConfigError

EXAMPLES = """examples:
  pdserve topology list                        what is shipped
  pdserve topology check my.yaml other.yaml    is it right? one line a file, exit code 2 if one is not
  pdserve topology show my.yaml                with every default filled in
  pdserve topology schema > topology.schema.json     for editors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|check|show|schema")
    listed = actions.add_parser("list", help="the topologies shipped with pdserve", epilog=_example("list"))
    listed.add_argument("--json", action="store_true", help="for programs")
    check = actions.add_parser(
        "check", help="read files as launch does; start nothing", epilog=_example("check my.yaml")
    )
    check.add_argument("topologies", nargs="+", metavar="TOPOLOGY", help="a YAML file, or the name of a shipped one")
    check.add_argument("--json", action="store_true", help="for programs")
    show = actions.add_parser("show", help="one topology with all defaults", epilog=_example("show local-cpu --json"))
    show.add_argument("topology", metavar="TOPOLOGY", help="a YAML file, or the name of a shipped one")
    show.add_argument("--json", action="store_true", help="as JSON (default: YAML)")
    actions.add_parser("schema", help="its JSON Schema (2020-12)", epilog=_example("schema"))


def _example(words: str) -> str:
    return f"example: pdserve topology {words}"


def main(args: argparse.Namespace) -> int:
    return {"list": _list, "check": _check, "show": _show, "schema": _schema}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    rows = []
    for name, file in sorted(topology.shipped_topologies().items()):
        top = topology.load(file)
        engines = " + ".join(f"{len(top.of(role))} {role}" for role in topology.ROLES if top.of(role))
        rows.append({"name": name, "engines": engines, "model": top.model, "file": str(file)})
    if args.json:
        return output.print_json(rows)
    output.table(("name", "engines", "model"), [(r["name"], r["engines"], r["model"]) for r in rows])
    return 0


def _check(args: argparse.Namespace) -> int:
    results = []
    for name in args.topologies:
        try:
            topology.load(name)
            results.append({"file": name, "ok": True, "problem": ""})
        except ConfigError as error:
            results.append({"file": name, "ok": False, "problem": str(error)})
    if args.json:
        output.print_json(results)
    else:
        for result in results:
            stream = sys.stdout if result["ok"] else sys.stderr
            print(f"{result['file']}: {result['problem'] or 'ok'}", file=stream)
    return 0 if all(result["ok"] for result in results) else ConfigError.exit_code


def _show(args: argparse.Namespace) -> int:
    facts: dict[str, Any] = msgspec.to_builtins(topology.load(args.topology))
    if facts["cache"]:
        facts["cache"]["tiers"] = [secret.hidden(url) for url in facts["cache"]["tiers"]]
    if args.json:
        return output.print_json(facts)
    print(msgspec.yaml.encode(facts).decode(), end="")
    return 0


def _schema(args: argparse.Namespace) -> int:
    print(json.dumps(topology_schema.schema(), indent=2))
    return 0
