"""`vlmport serve --ray`: two replicas on one machine, one of which is killed under load.

Ray starts half a dozen processes: `make verify-all` runs what needs it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import vlmport
from tests.errors import raises
from tests.overlays import overlay
from tests.serve.conftest import RED_SQUARE
from tests.serve.test_chat import question
from vlmport.cli.serve import _ray_options
from vlmport.errors import DependencyError, OptionError
from vlmport.serve.ray_replicas import replicas
from vlmport.serve.settings import Settings

MODEL = "shapes-smolvlm"
REPLICA = b"ray::ServeReplica:vlmport"
CLIENTS, EACH = 6, 10


def test_without_ray_it_says_what_to_install() -> None:
    with (
        raises(DependencyError, "dependency.missing", "ray"),
        replicas({MODEL: MODEL}, Settings(), {}, log_json=False),
    ):
        pass


def test_options_of_the_replicas() -> None:
    assert _ray_options(True, 2, None) == {"num_replicas": 2}
    scales = '{"autoscaling_config": {"max_replicas": 4}}'
    assert _ray_options(True, 1, scales) == {"autoscaling_config": {"max_replicas": 4}}
    more = '{"ray_actor_options": {"num_cpus": 2}}'
    assert _ray_options(True, 3, more) == {
        "num_replicas": 3,
        "ray_actor_options": {"num_cpus": 2},
    }
    with raises(OptionError, "option.contradiction", "--replicas"):
        _ray_options(True, 2, scales)
    with raises(OptionError, "option.contradiction", "--ray"):
        _ray_options(False, 2, None)
    with raises(OptionError, "option.not-json"):
        _ray_options(True, 1, "{")
    with raises(OptionError, "option.wrong-value", "list"):
        _ray_options(True, 1, "[]")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas that answer, ended by Ctrl-C."""
    run_folder = tmp_path_factory.getbasetemp().parent
    path = overlay("ray", run_folder)
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "PYTHONPATH": str(path), "HOME": str(home)}
    command = ["-m", "vlmport", "serve", "--ray", "--replicas", "2", "--threads", "1"]
    with (
        (home / "stderr").open("w") as stderr,
        subprocess.Popen(
            [sys.executable, *command, "--port", "0", "--preload", MODEL],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        watchdog = threading.Timer(600, process.kill)
        watchdog.start()
        try:
            url = process.stdout.readline().strip()
            assert url, (home / "stderr").read_text()
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
            watchdog.cancel()
    assert process.returncode == 0, (home / "stderr").read_text()
    assert not replica_processes()


def replica_processes() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(REPLICA):
                found.append(int(folder.name))
        except OSError:
            pass  # it ended meanwhile
    return found


def client(address: str, retries: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=retries)


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="replicas are found in /proc")
def test_a_session_stays_at_its_replica(address: str, red_square: str) -> None:
    """The second question prefills no image again. Each session begins with words of its own."""
    assert len(replica_processes()) == 2
    for number in range(8):
        system = {"role": "system", "content": f"This is session {number}."}
        asked: list[Any] = [system, *question(red_square)]
        ask = client(address, 0).chat.completions.create
        headers = {"x-session-id": f"session-{number}"}
        first = ask(model=MODEL, messages=asked, extra_headers=headers)
        asked.append({"role": "assistant", "content": first.choices[0].message.content})
        asked.append({"role": "user", "content": "what color is the background?"})
        second = ask(model=MODEL, messages=asked, extra_headers=headers)
        assert first.usage is not None
        assert first.usage.prompt_tokens_details is not None
        assert second.usage is not None
        assert second.usage.prompt_tokens_details is not None
        cached = second.usage.prompt_tokens_details.cached_tokens or 0
        images = first.usage.prompt_tokens_details.image_tokens or 0
        assert cached >= images > 0


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="replicas are found in /proc")
def test_a_killed_replica_loses_no_request_of_a_client_that_tries_again(
    address: str, red_square: str
) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What color is the square?"}]
    with vlmport.load(MODEL, threads=1) as model:
        expected = model.generate([{"role": "user", "content": parts}], [RED_SQUARE]).text
    before = replica_processes()
    answered = threading.Semaphore(0)

    def ask(_: int) -> list[str | None]:
        texts = []
        for _ in range(EACH):
            answer = client(address, 8).chat.completions.create(
                model=MODEL, messages=question(red_square)
            )
            texts.append(answer.choices[0].message.content)
            answered.release()
        return texts

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask, number) for number in range(CLIENTS)]
        for _ in range(CLIENTS):  # all are under way
            assert answered.acquire(timeout=120)
        os.kill(before[0], signal.SIGKILL)
        texts = [text for one in asking for text in one.result(300)]
    assert texts == [expected] * (CLIENTS * EACH)

    until = time.monotonic() + 120  # and Ray starts another
    while len(replica_processes()) < 2 and time.monotonic() < until:
        time.sleep(0.5)
    assert len(set(replica_processes()) - {before[0]}) == 2
    assert httpx.get(f"{address}/health", timeout=60).status_code == 200
