"""examples/serving: the container and the systemd unit start the server that they promise."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from vlmport import cli
from vlmport.builtin import builtin_models
from vlmport.serve.guard import OPEN_PATHS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/serving"
UNIT = FOLDER / "vlmport.service"


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters of `vlmport serve …`; fails where it would not take them."""
    assert words[:2] == ["vlmport", "serve"]
    group: Any = typer.main.get_command(cli.app)
    context = group.commands["serve"].make_context("serve", words[2:])
    assert set(context.params["models"]) <= builtin_models().keys()
    return context.params


def seconds(text: str) -> float:
    return float(re.fullmatch(r"([0-9]+)s?", text)[1])  # type: ignore[index]


def test_the_container() -> None:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text("utf-8"))
    docker = (FOLDER / "Dockerfile").read_text("utf-8")
    lines = dict(re.findall(r"^([A-Z]+) (.+(?:\\\n.*)*)$", docker, re.MULTILINE))
    service = compose["services"]["vlmport"]
    context = (FOLDER / service["build"]["context"]).resolve()
    assert context == ROOT
    assert (context / service["build"]["dockerfile"]).resolve() == FOLDER / "Dockerfile"

    taken = parsed([*json.loads(lines["ENTRYPOINT"]), *service["command"]])
    assert taken["host"] == "0.0.0.0"
    assert str(taken["api_key_file"]) == f"/run/secrets/{service['secrets'][0]}"
    assert set(service["secrets"]) == set(compose["secrets"])
    assert taken["port"] == int(lines["EXPOSE"])
    assert service["ports"] == [f"127.0.0.1:{taken['port']}:{taken['port']}"]
    assert seconds(service["stop_grace_period"]) > taken["grace"]

    probe = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", service["healthcheck"]["test"][-1])
    assert probe is not None
    assert (int(probe[1]), probe[2] in OPEN_PATHS) == (taken["port"], True)
    compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")

    (volume,) = service["volumes"]
    assert volume == f"{next(iter(compose['volumes']))}:{lines['VOLUME']}"
    assert all(one.split("=")[1].startswith(lines["VOLUME"]) for one in lines["ENV"].split())
    assert lines["USER"] != "root"
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = re.findall(r"/source\[([\w,]+)\]", docker)
    assert named
    assert set(",".join(named).split(",")) <= extras["optional-dependencies"].keys()


def test_the_image_holds_no_key() -> None:
    """What is copied into an image stays in it, also where a later line removes it."""
    docker = (FOLDER / "Dockerfile").read_text("utf-8")
    copied = [name for line in re.findall(r"^(?:COPY|ADD) (.+)$", docker, re.MULTILINE)
              for name in line.split()[:-1]]  # fmt: skip
    assert sorted(copied) == ["LICENSE", "README.md", "pyproject.toml", "src"]
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text("utf-8"))
    (key,) = compose["secrets"].values()
    assert not any((FOLDER / key["file"]).resolve().is_relative_to(ROOT / name) for name in copied)
    user = re.search(r"useradd --uid (\d+)", docker)
    assert user is not None
    for path in (FOLDER / "compose.yaml", ROOT / "docs/how-to/run-a-server.md"):
        text = path.read_text("utf-8")
        assert f"install -o {user[1]} -m 400 /dev/stdin {Path(key['file']).name}" in text
        assert "chmod" not in text


def test_the_unit_starts_the_server() -> None:
    (start,) = re.findall(r"^ExecStart=(.+)$", UNIT.read_text("utf-8"), re.MULTILINE)
    words = shlex.split(start)
    taken = parsed(["vlmport", *words[1:]])
    assert words[0].endswith("/bin/vlmport")
    assert taken["host"] == "127.0.0.1"
    (stop,) = re.findall(r"^TimeoutStopSec=(.+)$", UNIT.read_text("utf-8"), re.MULTILINE)
    assert seconds(stop) > taken["grace"]
    (given,) = re.findall(r"^LoadCredential=(\w+):", UNIT.read_text("utf-8"), re.MULTILINE)
    assert str(taken["api_key_file"]) == f"%d/{given}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
@pytest.mark.parametrize("broken", [False, True])
def test_systemd_takes_the_unit(tmp_path: Path, broken: bool) -> None:
    text = UNIT.read_text("utf-8").replace("/opt/vlmport/bin/vlmport", sys.executable)
    if broken:
        text = text.replace("ProtectSystem=strict", "ProtectSystem=very")
    unit = tmp_path / UNIT.name
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert ("vlmport.service" in done.stderr) == broken, done.stderr
