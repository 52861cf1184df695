"""A bundle or an adapter that lies on the Hub is fetched, and used from the Hub's cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.checkpoints import write_prefix_checkpoint
from tests.export.comparing import contents
from tests.export.test_same_model import write_adapter
from tests.hub import Hub, hub_environment
from vlmport.export import export

RUN = """
import sys, vlmport
print(vlmport.load(sys.argv[1]).caption(sys.argv[2], max_new_tokens=4).token_ids)
"""


def caption(source: str, picture: Path, environment: dict[str, str]) -> str:
    """Token ids in a process of its own: the Hub client reads its settings once."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, source, str(picture)],
        env=environment,
        cwd=picture.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bundle_on_the_hub_runs_and_then_runs_offline(tmp_path: Path) -> None:
    bundle = export(write_prefix_checkpoint(tmp_path / "checkpoint"), tmp_path / "bundle")
    files = {
        path.relative_to(bundle.folder).as_posix(): path.read_bytes()
        for path in bundle.folder.rglob("*")
        if path.is_file()
    }
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    with Hub.serving(files) as hub:
        environment = hub_environment(tmp_path / "hub", hub.url)
        online = caption("org/name", picture, environment)
        assert any("onnx/vision_encoder_q4.onnx" in path for path in hub.asked)
    offline = caption("org/name", picture, environment | {"HF_HUB_OFFLINE": "1"})
    assert online == offline == caption(str(bundle.folder), picture, environment)


def test_an_adapter_on_the_hub(tiny_checkpoint: Path, tmp_path: Path) -> None:
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
    local = export(tiny_checkpoint, tmp_path / "local", precisions=("fp32",), adapter=folder)
    decoder = "onnx/decoder_model_merged.onnx"
    assert contents(tmp_path / "out")[decoder] == contents(local.folder)[decoder]
    plain = export(tiny_checkpoint, tmp_path / "plain", precisions=("fp32",))
    assert contents(plain.folder)[decoder] != contents(local.folder)[decoder]
