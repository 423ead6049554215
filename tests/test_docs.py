"""What README and docs/ say can be done: links lead somewhere, files are there, commands parse."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from zipc.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(
    r"`((?:benchmarks|docs|examples|exporters|latency_tables|numerics|profiler|pruner|tests|zipc)"
    r"/[\w./-]+)`"
)
COMMAND = re.compile(r"^    (zipc .+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links to them, as GitHub spells it."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        flat = re.sub(r"\s+", " ", page.read_text())
        yield from ((page, link) for link in LINK.findall(flat) if "://" not in link)


def commands() -> list[str]:
    return [c.split("  #")[0].strip() for page in PAGES for c in COMMAND.findall(page.read_text())]


def test_links_lead_to_a_page_and_a_heading() -> None:
    found = list(links())
    assert len(found) > 10
    for page, link in found:
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), f"{page.name}: {link}"
        assert not heading or heading in anchors(target), f"{page.name}: {link}"


def test_files_that_are_named_are_there() -> None:
    named = {name for page in PAGES for name in FILE.findall(page.read_text())}
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    _, verb, *arguments = shlex.split(command)
    typer.main.get_command(app).commands[verb].make_context(verb, arguments)
