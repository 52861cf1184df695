"""Hooks of the documentation's site (mkdocs.yml).

- Pages of the repository outside docs/ (README files, the changelog) become pages of the site.
- Links to files that are no page (sources, images of examples) become plain text: the site does not
  hold them.
- The build fails if a page would load anything from another host.
"""

from __future__ import annotations

import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: the tests read this file without MkDocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "examples/README.md",
    "testdata/golden/README.md",
    "training/*/README.md",
]

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()#\s]+)(#[^()\s]*)?\)")


def pages_outside() -> list[str]:
    """The pages outside docs/, by their path in the repository."""
    found = (path for pattern in OUTSIDE for path in ROOT.glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for name in pages_outside():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between files of the repository to the pages of the site."""
    source = page.file.src_uri
    outside = set(pages_outside())
    home = source if source in outside else f"docs/{source}"

    def rewritten(link: re.Match[str]) -> str:
        mark, text, target, anchor = link.groups()
        if ":" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(home), target))
        name = path if path in outside else path.removeprefix("docs/")
        if files.get_file_from_path(name) is None:
            return link[0] if path.startswith("docs/") else text
        relative = posixpath.relpath(name, posixpath.dirname(source) or ".")
        return f"{mark}[{text}]({relative}{anchor or ''})"

    return LINK.sub(rewritten, markdown)


# What a browser loads by itself. A link that a reader may follow is none of these.
LOADED = {
    "audio": "src", "embed": "src", "iframe": "src", "img": "src", "input": "src", "link": "href",
    "object": "data", "script": "src", "source": "src", "track": "src", "video": "src",
}  # fmt: skip
CSS_URL = re.compile(r"(?:url\(\s*|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)")


class _Loads(HTMLParser):
    """Collect the addresses on other hosts that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get(LOADED.get(tag, "")) or ""
        if tag == "link" and values.get("rel") == "canonical":
            return
        if re.match(r"(?:https?:)?//", address):
            self.foreign.append(address)
        self.foreign += CSS_URL.findall(values.get("style") or "")
        if "mermaid" in (values.get("class") or "").split():
            self.foreign.append("mermaid, which the theme's script would fetch from unpkg.com")


def foreign_loads(html: str) -> list[str]:
    """The addresses on other hosts that a browser would load for this page."""
    parser = _Loads()
    parser.feed(html)
    return parser.foreign


def on_post_build(config: MkDocsConfig) -> None:
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    found = [
        f"{page.relative_to(site)}: {address}"
        for page in sorted(site.rglob("*.html"))
        for address in foreign_loads(page.read_text("utf-8"))
    ]
    found += [
        f"{sheet.relative_to(site)}: {address}"
        for sheet in sorted(site.rglob("*.css"))
        for address in CSS_URL.findall(sheet.read_text("utf-8"))
    ]
    if found:
        raise PluginError("pages load from other hosts:\n" + "\n".join(found))
