"""`pdserve completion SHELL`: the completion script, made from the parsers themselves."""

from __future__ import annotations

import argparse

import shtab

from pdserve import cli_tree, topology

EXAMPLES = """examples:
  source <(pdserve completion bash)                        this shell only
  pdserve completion bash > ~/.local/share/bash-completion/completions/pdserve
  pdserve completion zsh  > "${fpath[1]}/_pdserve"
  pdserve completion fish > ~/.config/fish/completions/pdserve.fish
"""
SHELLS = ("bash", "zsh", "fish")
# What an argument stands for is told by its name: topologies are files or shipped names.
_TOPOLOGY_DESTS = ("topology", "topologies", "target")
_FILE_WORDS = ("FILE", "FILE.jsonl", "PATH")
_TOPOLOGIES = {
    "bash": "_pdserve_topologies",
    "zsh": "_pdserve_topologies",
    "fish": "(__pdserve_topologies)",
}
_PREAMBLE = {
    "bash": '_pdserve_topologies() { compgen -W "NAMES" -- "$1"; compgen -o default -f -- "$1"; }',
    "zsh": "_pdserve_topologies() { _alternative 'names:shipped topology:(NAMES)' 'files:file:_files' }",
    "fish": "function __pdserve_topologies; string split ' ' 'NAMES'; __fish_complete_path (commandline -ct); end",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="whose script to print")


def main(args: argparse.Namespace) -> int:
    print(script(args.shell))
    return 0


def script(shell: str) -> str:
    top = cli_tree.whole()
    for parser in cli_tree.walk(top):
        for action in parser._actions:
            _complete(action)
    names = " ".join(topology.shipped_topologies())
    preamble = {name: text.replace("NAMES", names) for name, text in _PREAMBLE.items()}
    return str(shtab.complete(top, shell=shell, preamble=preamble))  # type: ignore[arg-type]


def _complete(action: argparse.Action) -> None:
    if action.choices is not None or action.nargs == 0:
        return
    word = action.metavar if isinstance(action.metavar, str) else ""
    if action.dest in _TOPOLOGY_DESTS:
        action.complete = _TOPOLOGIES  # type: ignore[attr-defined]
    elif word == "FOLDER":
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif word in _FILE_WORDS:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
