"""Where checkpoints come from: folders, and a Hub that a small local server plays."""

from __future__ import annotations

import errno
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import write_json, write_prefix_checkpoint
from tests.errors import assert_error, raises
from tests.hub import COMMIT, Hub, hub_environment
from vlmport.checkpoint import Weights, locate, locate_adapter, source
from vlmport.errors import SourceError, VlmportError
from vlmport.files.json_files import load_json

RUN = """
import json, sys, warnings
warnings.simplefilter("error")
from vlmport.checkpoint import locate, source
from vlmport.errors import SourceError
source.TIMEOUT = 1.0
try:
    print(json.dumps({"folder": str(locate(sys.argv[1], sys.argv[2] or None))}))
except SourceError as error:
    print(json.dumps({"error": str(error), "hint": error.hint, "code": error.code}))
"""
FILES = {
    "config.json": b'{"model_type": "x"}',
    "model.safetensors": b"weights",
    "chat_template.jinja": b"{{ x }}",
    "tokenizer.model": b"spm",
    "merges.txt": b"a b",
    "README.md": b"card",
    "pytorch_model.bin": b"pickle",
    "onnx/model.safetensors": b"not at the root",
}


def failure(*args: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        locate(*args)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return caught.value


# Folders


def test_a_folder_is_returned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_prefix_checkpoint(tmp_path / "org" / "name")
    assert locate(folder) == folder
    assert locate(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert locate("org/name") == Path("org/name")  # before it is taken for a Hub id
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/org/name") == folder


def test_a_missing_folder_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "smolvlm").mkdir()
    wrong = tmp_path / "smolvml"
    assert_error(failure(wrong), "source.not-found", wrong, "'smolvlm'")
    assert_error(failure(str(tmp_path / "x")), "source.not-found", tmp_path / "x")
    deeper = failure(tmp_path / "x" / "y")
    assert_error(deeper, "source.not-found", tmp_path / "x" / "y")
    assert "either" in str(deeper)  # its parent is missing too


@pytest.mark.parametrize("name", ["./org/name", "../name", "~/no/such", "a/b/c", "a/../b", "/a/b"])
def test_what_can_only_be_a_path_is_not_looked_up(name: str) -> None:
    assert_error(failure(name), "source.not-found", "folder")


@pytest.mark.parametrize("name", ["name", "", " ", "some words", "naïve", "org\\name", "a:b"])
def test_neither_a_folder_nor_a_hub_id(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nam").mkdir()
    text = str(failure(name))
    assert "neither a folder nor a Hub id" in text
    assert ("did you mean 'nam'" in text) == (name == "name")


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/x", "a\0b", "\ud800"])
def test_names_that_no_file_system_takes(name: str) -> None:
    assert len(str(failure(name))) < 200


@settings(deadline=None)
@given(st.text("ab./~ -\\:\0é", max_size=8))
def test_any_name_gives_a_source_error(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "_fetch", lambda repo, revision: Path("/nowhere-at-all"))
        failure(name)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("vlmport.checkpoint.folders._found", refuse)
    assert_error(failure(tmp_path), "source.unreadable", tmp_path, "Permission denied")
    with raises(SourceError, "source.unreadable", tmp_path, "Permission denied"):
        locate_adapter(tmp_path)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    error = failure(file)
    assert_error(error, "source.not-a-folder", file)
    assert str(tmp_path) in (error.hint or "")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    assert_error(failure(tmp_path, "v2"), "source.no-revision", tmp_path, "'v2'")


def test_folders_that_are_something_else(tmp_path: Path) -> None:
    assert_error(failure(tmp_path), "source.no-config", tmp_path, "config.json", "empty")
    (tmp_path / "notes.txt").write_text("x")
    assert_error(failure(tmp_path), "source.no-config", tmp_path, "config.json", "'notes.txt'")
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "config.json").write_text("{}")
    error = failure(tmp_path)
    assert_error(error, "source.in-subfolder", "config.json", "'checkpoint-10'")
    assert (error.hint or "").endswith(f" {tmp_path / 'checkpoint-10'}")
    (tmp_path / "adapter_config.json").write_text("{}")
    error = failure(tmp_path)
    assert_error(error, "source.is-adapter", "adapter_config.json")
    assert "--adapter" in (error.hint or "")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert locate(tmp_path) == tmp_path
    (tmp_path / "vlmport.json").write_text("{}")
    assert_error(failure(tmp_path), "source.is-bundle", "vlmport.json")


def test_an_adapter_folder(tmp_path: Path) -> None:
    with raises(SourceError, "adapter.no-config", "adapter_config.json"):
        locate_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert locate_adapter(tmp_path) == tmp_path


# The Hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub.serving(FILES) as server:
        yield server


def ask(cache: Path, endpoint: str, repo: str, revision: str = "", **env: str) -> dict[str, str]:
    """What `locate` answers in a process of its own: the Hub client reads its settings once."""
    values = hub_environment(cache, endpoint) | env
    done = subprocess.run(
        [sys.executable, "-c", RUN, repo, revision],
        env=values,
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer.get("hint", "x"), answer
    assert "\n" not in answer.get("error", "")
    return answer


def test_a_repository_is_fetched_once_and_then_works_offline(tmp_path: Path, hub: Hub) -> None:
    folder = Path(ask(tmp_path, hub.url, "org/name", HF_TOKEN="hf_x")["folder"])
    assert folder == tmp_path / "models--org--name" / "snapshots" / COMMIT
    wanted = {"config.json", "model.safetensors", "chat_template.jinja"}
    wanted |= {"tokenizer.model", "merges.txt", "README.md"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert "Bearer hf_x" in hub.tokens
    hub.asked.clear()
    offline = ask(tmp_path, hub.url, "org/name", HF_HUB_OFFLINE="1")
    assert offline == {"folder": str(folder)}
    assert not hub.asked
    without_network = ask(tmp_path, closed_port(), "org/name")
    assert without_network == {"folder": str(folder)}


def test_a_revision_is_fetched(tmp_path: Path, hub: Hub) -> None:
    assert ask(tmp_path, hub.url, "org/name", "v1")["folder"].endswith(COMMIT)
    assert (tmp_path / "models--org--name" / "refs" / "v1").read_text() == COMMIT


def test_a_cache_laid_out_by_another_program_works_offline(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    for folder in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs" / "0").write_text("{}")
    (repo / "snapshots" / COMMIT / "config.json").symlink_to("../../blobs/0")
    answer = ask(tmp_path, "https://huggingface.co", "org/name", HF_HUB_OFFLINE="1")
    assert answer == {"folder": str(repo / "snapshots" / COMMIT)}


@pytest.mark.parametrize(
    ("repo", "revision", "env", "error", "hint"),
    [
        ("org/missing", "", {}, "no such model at http", "HF_TOKEN"),
        ("org/name", "v9", {}, "no revision 'v9'", "/org/name"),
        ("org/gated", "", {}, "access is gated", "accept its terms at http"),
        ("org/secret", "", {"HF_TOKEN": "hf_x"}, "refuses access (401)", "HF_TOKEN"),
        ("org/broken", "", {}, "answers with an error: HfHubHTTPError", "run it again"),
        ("org/name", "", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
    ],
)
def test_what_the_hub_refuses(
    tmp_path: Path, hub: Hub, repo: str, revision: str, env: dict[str, str], error: str, hint: str
) -> None:
    answer = ask(tmp_path, hub.url, repo, revision, **env)
    assert answer["error"].startswith(f"{repo}: ")
    assert error in answer["error"]
    assert hint in answer["hint"]


@pytest.mark.parametrize("repo", ["org/portal", "org/pages"])
def test_a_web_page_in_the_place_of_the_hub(repo: str, tmp_path: Path, hub: Hub) -> None:
    """A login that answers everything, or the files alone, with status 200."""
    answer = ask(tmp_path, hub.url, repo)
    assert answer["code"] == "hub.web-page"
    assert "web page" in answer["error"]
    assert hub.url in answer["error"]


def test_a_web_page_in_the_place_of_a_file(tmp_path: Path, hub: Hub) -> None:
    folder = Path(ask(tmp_path, hub.url, "org/swapped")["folder"])
    for read in (lambda: load_json(folder / "config.json"), lambda: Weights.open(folder)):
        with pytest.raises(VlmportError) as caught:
            read()
        assert caught.value.code == "source.web-page"
        assert str(folder) in str(caught.value)


def test_a_misspelt_folder_of_two_parts_suggests_its_neighbour(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "org" / "missin").mkdir(parents=True)
    answer = ask(tmp_path, hub.url, "org/missing")
    assert "no such folder (did you mean 'missin'?), and no such model" in answer["error"]


def test_a_name_that_the_hub_does_not_allow(tmp_path: Path, hub: Hub) -> None:
    answer = ask(tmp_path, hub.url, "org/two--dashes")
    assert "no such folder, and no Hub id: HFValidationError" in answer["error"]


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_no_network_is_said_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    answer = ask(tmp_path, closed_port(), "org/name")
    assert re.search(r"can't be fetched from http://127.0.0.1:\d+: ConnectError", answer["error"])
    assert "check the network" in answer["hint"]
    assert time.monotonic() - start < 15


def test_a_silent_server_does_not_hang_us(tmp_path: Path, hub: Hub) -> None:
    assert "gives no answer" in ask(tmp_path, hub.url, "org/silent")["error"]


XET_FULL = "Data processing error: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError(XET_FULL), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "the cache can't be written"),
        (OSError(errno.EROFS, "Read-only file system"), "the cache can't be written"),
    ],
)
def test_a_disk_that_takes_no_more(
    error: Exception, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise RuntimeError("wrapped") from error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    caught = failure("org/name")
    assert str(caught) == f"org/name: {expected}: {tmp_path}"
    assert "HF_HUB_CACHE" in (caught.hint or "")


def test_a_foreign_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise ZeroDivisionError("\n first line\nsecond line")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert str(failure("org/name")).endswith("ZeroDivisionError: first line")
    assert source._line(KeyError()) == "KeyError"


def test_a_fetched_adapter_or_bundle_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    siblings: list[Any] = []
    info = SimpleNamespace(siblings=siblings)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    write_json(tmp_path / "adapter_config.json", {})
    assert_error(failure("org/name"), "source.is-adapter", "adapter_config.json")
    assert locate_adapter("org/name") == tmp_path
    # What is not fetched is accounted for too.
    siblings.append(SimpleNamespace(rfilename="non_lora_trainables.bin"))
    with raises(SourceError, "adapter.other-weights", "'non_lora_trainables.bin'"):
        locate_adapter("org/name")
