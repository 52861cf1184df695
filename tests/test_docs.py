"""The documents say what is so: links lead somewhere, codes of errors exist, commands parse."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import vlmport
from tests import cli_reference
from vlmport import cli
from vlmport.error_codes import catalogue

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples/README.md",
    ROOT / "web/README.md",
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text("utf-8"))
    missing = [
        target
        for target in targets
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert missing == []


def test_headings_of_the_troubleshooting_page_name_codes_of_the_catalogue() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    headings = re.findall(r"^### (.*`[a-z]+\..+)$", page, flags=re.MULTILINE)
    named = [code for heading in headings for code in re.findall(r"`(.+?)`", heading)]
    assert len(named) > 60
    assert len(named) == len(set(named))
    assert set(named) <= catalogue().keys()
    for heading in headings:
        assert re.fullmatch(r"`[^`]+`(, `[^`]+`)*", heading), "a heading is codes alone"


NAMED = re.compile(r"`((?:[\w.-]+/)+(?:[\w.-]+\.(?:py|toml|mjs|ts))?)`")
# Folders that are built, or that a page speaks of as the reader's own.
NOT_HERE = re.compile(
    r"(?:standalone|dist|web_page|models|wheels|out|page|bundles|verified|engines|tuned|site)\b|\."
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_file_of_the_repository_that_is_named_exists(document: Path) -> None:
    named = NAMED.findall(document.read_text("utf-8"))
    assert document.name != "architecture.md" or len(named) > 20
    places = [ROOT, ROOT / "src/vlmport", ROOT / "web", document.parent]
    missing = [
        name
        for name in named
        if not NOT_HERE.match(name) and not any((place / name).exists() for place in places)
    ]
    assert missing == []


def commands(document: Path) -> list[tuple[str, str]]:
    """Each command of vlmport in a page's blocks of code: its name, and what follows."""
    blocks = re.findall(r"^ *```.*?^ *```", document.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    line = re.compile(r"^ *(?:\$ )?(?:\w+=\S+ )*vlmport (\w+)(.*?)(?: #.*)?$", re.MULTILINE)
    return [(name, rest) for block in blocks for name, rest in line.findall(block)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_command_exists_with_its_options(document: Path) -> None:
    group: Any = typer.main.get_command(cli.app)
    for name, rest in commands(document):
        known = {
            option
            for parameter in group.commands[name].params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        used = re.findall(r"(?<!\S)--?[a-z][\w-]*", re.sub(r"'[^']*'|\"[^\"]*\"", "", rest))
        assert set(used) <= known, (name, rest)


def test_commands_are_found_on_the_pages() -> None:
    found = {name for document in DOCUMENTS for name, _ in commands(document)}
    group: Any = typer.main.get_command(cli.app)
    assert set(group.commands) - {"models"} <= found
    assert {name for name, _ in commands(ROOT / "README.md")} >= {"export", "verify", "caption"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_python_block_names_what_exists(document: Path) -> None:
    text = document.read_text("utf-8")
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vlmport":
                assert node.attr in vlmport.__all__, node.attr


def test_the_page_of_the_python_api_has_every_public_name() -> None:
    page = (ROOT / "docs/python-api.md").read_text("utf-8")
    described = set(re.findall(r"^::: vlmport\.(\w+)$", page, re.MULTILINE))
    errors = {name for name in vlmport.__all__ if name.endswith(("Error", "Warning"))}
    aliases = {"Caption": vlmport.Response}  # another name of a class that is there
    assert all(getattr(vlmport, name) is value for name, value in aliases.items())
    assert described == set(vlmport.__all__) - {"__version__"} - errors - set(aliases)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 120


def test_the_page_of_the_command_line_is_what_the_commands_say() -> None:
    page = (ROOT / "docs/cli.md").read_text("utf-8")
    assert page == cli_reference.page(), "run python -m tests.cli_reference"


def site_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/theme/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ('<script src="https://cdn.example/a.js"></script>', ["https://cdn.example/a.js"]),
        ('<link rel="stylesheet" href="//fonts.example/a">', ["//fonts.example/a"]),
        ('<p style="background: url(http://a.example/b.png)">', ["http://a.example/b.png"]),
        ('<img src="https://a.example/badge.svg">', ["https://a.example/badge.svg"]),
        ('<a href="https://a.example">a link</a><img src="flow.svg"><script src="/a.js">', []),
    ],
)
def test_the_site_build_finds_what_a_page_loads_from_other_hosts(
    html: str, found: list[str]
) -> None:
    assert site_hooks().foreign_loads(html) == found


def test_a_diagram_that_the_theme_would_fetch_a_script_for_is_found() -> None:
    assert len(site_hooks().foreign_loads('<pre class="mermaid">graph TD</pre>')) == 1
