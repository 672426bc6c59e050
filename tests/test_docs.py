"""The documentation: builds as a site without a warning (dead links and anchors are warnings), works without internet, and
names commands that exist."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from prometheus_client import Histogram

from pdserve import cli_tree
from pdserve.metrics import reference
from pdserve.metrics.metric import PREFIX

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "material"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (pip install 'pdserve[dev]')")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    problems = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
    assert done.returncode == 0, "\n".join(problems) or done.stderr
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    assert {page.with_suffix(".html").name for page in PAGES} <= {file.name for file in site.glob("*.html")}


class _Fetched(HTMLParser):
    """What a browser would fetch for a page by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.found.append(given.get("href") or "")


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for file in site.glob("*.html"):
        parser = _Fetched()
        parser.feed(file.read_text())
        assert not [url for url in parser.found if url.startswith(("http:", "https:", "//"))], file
        # 404.html, shown under any address, names its files from the site's root.
        missing = [url for url in parser.found if url and not (site / url.partition("?")[0].lstrip("/")).exists()]
        assert not missing, (file, missing)


def commands(text: str) -> Iterator[str]:
    """The words after `pdserve` in code: blocks of shell lines and `inline` code."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        yield from re.findall(r"(?:^|[ /|(])pdserve ([a-z]+)(?= |$|\))", block, re.MULTILINE)
    yield from re.findall(r"`pdserve ([a-z]+)(?= |`)", text)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_that_are_named_exist(page: Path) -> None:
    unknown = set(commands(page.read_text())) - set(cli_tree.COMMANDS)
    assert not unknown, f"{page.name} names commands that do not exist: {unknown}"


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return cli_tree.whole()


def whole_commands(text: str, inline: bool) -> Iterator[str]:
    """Command lines in code, without what is said behind them. `inline`: those within sentences, too."""
    fenced = re.findall(r"```(?:sh|text)?\n(.*?)```", text, re.DOTALL)
    indented = re.findall(r"^ {4}(.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    for line in [line for block in fenced for line in block.replace("\\\n", " ").splitlines()] + indented:
        if found := re.match(r"(?:\$ |\.venv/bin/|[A-Z_]+=\S+ )*pdserve (.*)", line):
            yield re.split(r" {2,}| [#|>&]|; ", found[1])[0]
    if inline:
        yield from re.findall(r"`pdserve ([a-z][^`\n]*)`", text)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_are_understood_as_they_stand(page: Path, parser: argparse.ArgumentParser) -> None:
    wrong = []
    # In other pages a sentence may name an option without its value; what is read at night is to be typed as it stands.
    for words in set(whole_commands(page.read_text(), inline=page.name == "troubleshooting.md")):
        given = shlex.split(re.sub(r"\.\.\.|…", "x", words))
        if given[0] in cli_tree.COMMANDS and (len(given) > 1 or given[0] not in BARE):
            try:
                parser.parse_args(given)
            except SystemExit as end:
                if end.code:
                    wrong.append(words)
    assert not wrong, f"{page.name}: {wrong}"


# Commands that want more words, where a text speaks of them by name.
BARE = ("launch", "bench", "topology", "cache", "completion", "model", "size")


def catalogue() -> set[str]:
    suffixes = {Histogram: ("_bucket", "_count", "_sum")}
    names = {PREFIX + name: about for _, table, _ in reference.TABLES for name, about in table.items()}
    return {name + suffix for name, about in names.items() for suffix in ("", *suffixes.get(about.kind, ()))}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_metrics_that_are_named_exist(page: Path) -> None:
    kinds = "|".join(sorted({name.split("_")[1] for name in catalogue()}))
    named = set(re.findall(rf"(?<![\w/.-])pdserve_(?:{kinds})_\w+(?![\w*])", page.read_text()))
    unknown = named - catalogue()
    assert not unknown, f"{page.name} names metrics that do not exist: {unknown}"


# What troubleshooting.md tells people to look for in logs: the words must be those that are written.
LOGGED = (
    "handover not begun",
    "lower tier too slow",
    "no room in the cache",
    "load failed",
    "digest mismatch",
    "never stored",
    "evicted from",
    "the prompt differs from that of",
    "could not be asked",
    "was estimated to be faster than loading it",
    "was killed by",
    "full attention",
    "is running already",
)


@pytest.mark.parametrize("words", LOGGED)
def test_words_to_look_for_are_written_somewhere(words: str) -> None:
    assert words in (ROOT / "docs" / "troubleshooting.md").read_text().replace("\n   ", " ")
    sources = (file for part in ("pdserve", "transfer", "deploy", "proxy") for file in (ROOT / part).rglob("*.py"))
    assert any(words in file.read_text() for file in sources if "doctor" not in file.parts), words


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_of_the_files_beside_the_site(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (ROOT / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").rglob("*.svg")), ids=lambda p: p.name)
def test_pictures_are_whole_and_say_what_they_show(picture: Path) -> None:
    root = ET.parse(picture).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert root.findtext(f"{space}title")
    assert not re.search(r'(?:href|src)="https?:', picture.read_text())
