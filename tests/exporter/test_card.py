"""The model card says where a bundle comes from, runs as written, and claims nothing unmeasured."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.checkpoints import write_prefix_checkpoint
from vlmport.bundle import CARD, Bundle
from vlmport.exporter import export

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = "---\nlicense: apache-2.0\nbase_model: org/tower\nlanguage: en\n---\n# Hi\n"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export("shapes", tmp_path_factory.mktemp("card") / "shapes", precisions="q8,q4")


def read(bundle: Bundle) -> str:
    return (bundle.folder / CARD).read_text(encoding="utf-8")


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


def test_what_came_from_the_hub_names_its_repository_and_commit(tmp_path: Path) -> None:
    """As the Hub's cache lays snapshots out; the repository is the base model, not its own base."""
    snapshot = tmp_path / "models--org--captioner/snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    write_prefix_checkpoint(snapshot)
    (snapshot / "README.md").write_text(SOURCE, encoding="utf-8")
    bundle = export(snapshot, tmp_path / "out", precisions="fp32", name="org/captioner")
    card = ModelCard.load(bundle.folder / CARD)
    assert card.data.base_model == "org/captioner"
    assert card.data.license == "apache-2.0"
    assert f"| made from | `org/captioner`, commit `{COMMIT}` |" in card.text
    assert "| licence | `apache-2.0` |" in card.text


def test_a_folder_names_what_its_own_card_does(tmp_path: Path) -> None:
    folder = write_prefix_checkpoint(tmp_path / "captioner")
    (folder / "README.md").write_text(SOURCE, encoding="utf-8")
    card = ModelCard.load(export(folder, tmp_path / "out", precisions="fp32").folder / CARD)
    assert card.data.base_model == "org/tower"
    assert "| made from | the checkpoint `captioner` |" in card.text
    assert "| base model | `org/tower` |" in card.text


def test_names_from_elsewhere_are_text_in_the_card(tmp_path: Path) -> None:
    evil = "`|\n# A title\n<script>alert(1)</script><!-- parity -->\n---\nx: y"
    folder = write_prefix_checkpoint(tmp_path / "captioner")
    front = yaml.safe_dump({"license": "other", "license_name": evil, "base_model": [evil, "a/b"]})
    (folder / "README.md").write_text(f"---\n{front}---\n# Hi\n", encoding="utf-8")
    bundle = export(folder, tmp_path / "out", precisions="fp32", name=f"a[b](c)_{evil}")
    card = ModelCard.load(bundle.folder / CARD)
    assert card.data.license_name == evil  # YAML's own quoting
    titles = [line for line in card.text.splitlines() if line.startswith("#")]
    assert [line for line in titles if "A title" in line] == titles[:1]
    assert r"# a\[b\](c)_\`\|" in titles[0]
    assert not re.search(r"(?<!\\)<script", re.sub(r"`[^`\n]*`", "", card.text))
    assert card.text.count("<!-- parity -->") == 1
    rows = [line for line in card.text.splitlines() if line.startswith(("| licence", "| base"))]
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 3, row


def test_twice_gives_the_same_bytes(shapes: Bundle, tmp_path: Path) -> None:
    assert read(export("shapes", tmp_path / "shapes", precisions="q8,q4")) == read(shapes)


def test_nothing_is_claimed_before_it_is_measured(shapes: Bundle) -> None:
    card = read(shapes)
    assert "Not measured yet" in card
    assert "Not verified yet" in card
    assert not re.search(r"\d %", card)
    assert "base model | not named by its source" in card


def test_a_source_without_a_licence_has_none_in_the_card(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    card = read(export(tiny_checkpoint, tmp_path / "tiny", precisions="fp32"))
    assert "licence | not named by its source" in card


def test_every_precision_has_a_row_with_its_size(shapes: Bundle) -> None:
    rows = re.findall(r"^\| `(\w+)` \| .*; \d+\.\d MB \|$", read(shapes), flags=re.MULTILINE)
    assert rows == ["q8", "q4"]


def test_a_layout_that_vlmport_does_not_run_promises_no_use_of_it(tmp_path: Path) -> None:
    bundle = export("shapes", tmp_path / "shapes", precisions="fp32", layout="components")
    card = ModelCard.load(bundle.folder / CARD)
    assert card.data.library_name is None
    for text in ("transformers.js", "vlmport caption", "vlmport eval", "@vlmport/web"):
        assert text not in card.text
    assert "<!-- parity -->" in card.text


def test_the_python_in_it_runs(shapes: Bundle, tmp_path: Path) -> None:
    (code,) = blocks(read(shapes), "python")
    code = code.replace("MODEL", str(shapes.folder))
    code = code.replace("photo.jpg", str(ROOT / "examples/red_square.png"))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == "a red square on a white background\n"
