"""A bundle or an adapter that lies on the Hub is fetched, and used from the Hub's cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.exporter.comparing import contents
from tests.exporter.test_same_model import write_adapter
from tests.hub import Hub, hub_environment
from vlmport.exporter import export
from vlmport.loading import load

RUN = """
import sys, vlmport
precision = sys.argv[3] if sys.argv[3:] else "auto"
vlm = vlmport.load(sys.argv[1], precision=precision)
print(vlm.caption(sys.argv[2], max_new_tokens=4).token_ids)
"""


def run(
    source: str, picture: Path, environment: dict[str, str], *precision: str
) -> subprocess.CompletedProcess[str]:
    """A caption's token ids in a process of its own: the Hub client reads its settings once."""
    return subprocess.run(
        [sys.executable, "-c", RUN, source, str(picture), *precision],
        env=environment,
        cwd=picture.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def caption(source: str, picture: Path, environment: dict[str, str], *precision: str) -> str:
    done = run(source, picture, environment, *precision)
    assert done.returncode == 0, done.stderr
    return done.stdout


def local(bundle: Path, picture: Path, precision: str = "auto") -> str:
    """The same of a bundle that lies here, in this process."""
    with load(bundle, precision=precision) as vlm:
        return f"{vlm.caption(picture, max_new_tokens=4).token_ids}\n"


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def fetched(hub: Hub) -> set[str]:
    """The graphs that were asked for."""
    return {path.rpartition("/")[2] for path in hub.asked if ".onnx" in path}


def test_a_bundle_on_the_hub_runs_and_then_runs_offline(
    tiny_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    with Hub.serving(files_of(tiny_bundle)) as hub:
        environment = hub_environment(tmp_path / "hub", hub.url)
        online = caption("org/name", picture, environment)
    offline = caption("org/name", picture, environment | {"HF_HUB_OFFLINE": "1"})
    assert online == offline == local(tiny_bundle, picture)


def test_a_bundle_on_the_hub_that_is_not_as_its_manifest_says(
    tiny_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    files = files_of(tiny_bundle)
    graph = "onnx/embed_tokens.onnx"
    files[graph] = files[graph][:-1] + bytes([files[graph][-1] ^ 1])
    with Hub.serving(files) as hub:
        done = run("org/name", picture, hub_environment(tmp_path / "hub", hub.url), "fp32")
    assert done.returncode != 0
    assert f"{graph}: its SHA-256 is not the manifest's" in done.stderr


def test_only_the_graphs_that_run_are_fetched(
    tiny_bundle: Path, picture: Path, tmp_path: Path
) -> None:
    """Each precision alone, and what a mix names; the next one adds what it lacks."""
    with Hub.serving(files_of(tiny_bundle)) as hub:
        environment = hub_environment(tmp_path / "hub", hub.url)

        def fetched_for(precision: str) -> set[str]:
            hub.asked.clear()
            made = caption("org/name", picture, environment, precision)
            assert made == local(tiny_bundle, picture, precision)
            return fetched(hub)

        assert fetched_for("fp32") == {
            "image_processor.onnx",
            "vision_encoder.onnx",
            "embed_tokens.onnx",
            "decoder_model_merged.onnx",
        }
        assert fetched_for("fp32") == set()
        assert fetched_for("vision=fp32,embed=fp32,decoder=q4") == {"decoder_model_merged_q4.onnx"}
        hub.asked.clear()
        done = run("org/name", picture, environment, "q4f16")
        assert "precision 'q4f16' is not in this bundle" in done.stderr
        assert fetched(hub) == set()
        snapshot = next((tmp_path / "hub").glob("models--*/snapshots/*"))
        assert (snapshot / "tokenizer.json").is_file()
        assert not (snapshot / "onnx/vision_encoder_q4.onnx").exists()


def test_an_adapter_on_the_hub(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny_checkpoint)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    asked = [str(tiny_checkpoint), str(tmp_path / "out"), "-p", "fp32", "--adapter", "org/adapter"]
    with Hub.serving(files) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "vlmport", "export", *asked],
            env=hub_environment(tmp_path / "hub", hub.url),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert "--adapter org/adapter" in done.stderr.splitlines()[-1]  # what to run next
    here = export(tiny_checkpoint, tmp_path / "here", precisions=("fp32",), adapter=folder)
    decoder = "onnx/decoder_model_merged.onnx"
    assert contents(tmp_path / "out")[decoder] == contents(here.folder)[decoder]
    assert contents(tiny_bundle)[decoder] != contents(here.folder)[decoder]
