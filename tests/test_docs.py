"""The documents say what is so: links lead somewhere, quoted errors exist, commands parse."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from vlmport import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples/README.md",
    ROOT / "web/README.md",
]
SOURCE = "\n".join(path.read_text("utf-8") for path in (ROOT / "src/vlmport").rglob("*.py"))
# String literals that are joined over lines, and what is filled in, are no obstacle.
TEXT = re.sub(r'"\s*\n\s*f?"', "", SOURCE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text("utf-8"))
    missing = [
        target
        for target in targets
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert missing == []


def test_each_error_of_the_troubleshooting_page_is_one_that_we_raise() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"^### `(.+)`$", page, flags=re.MULTILINE)
    assert len(quoted) > 20
    assert [text for text in quoted if text not in TEXT] == []


def test_each_command_of_the_readme_exists_with_its_options() -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^\$ vlmport (\w+)(.*?)(?:#.*)?$", page, flags=re.MULTILINE)
    assert {name for name, _ in commands} >= {"export", "verify", "caption"}
    for name, rest in commands:
        done = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"})
        assert done.exit_code == 0, name
        for option in re.findall(r"--[\w-]+", rest):
            assert option in done.stdout, (name, option)


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
