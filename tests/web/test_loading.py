"""Bundles on their way into a page: interrupted, offline, on a GPU that fails, in little memory.

Apart from test_web.py, so that two workers share the tests of the browser.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.checkpoints import write_prefix_checkpoint
from tests.web.conftest import run_in_chromium
from vlmport.bundle import Bundle
from vlmport.demo import make_server
from vlmport.export import export

FILES = ("degraded.test.ts", "demo.test.ts", "download.test.ts", "memory.test.ts", "probe.test.ts")

# A decoder of 200 MB in float32: what its loading takes can be told from the browser's own memory.
LARGE = {
    "hidden_size": 768,
    "num_hidden_layers": 7,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2304,
    "vocab_size": 1024,
}


@pytest.fixture(scope="session")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A bundle with next to no weights, and one with 200 MB."""
    folders = {}
    for name, text in (("tiny", None), ("large", LARGE)):
        folder = tmp_path_factory.mktemp(name)
        source = write_prefix_checkpoint(folder / "checkpoint", text=text, lora=False)
        folders[name] = str(export(source, folder / name, precisions="fp32").folder)
    return folders


@pytest.fixture(scope="module")
def demo(pages: None, bundle: Bundle) -> Iterator[str]:
    """The address of a running `vlmport demo`."""
    server = make_server(bundle, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.url
    server.shutdown()
    thread.join()
    server.close()


@pytest.mark.parametrize("name", FILES)
def test_in_chromium(
    name: str, node: str, environment: dict[str, str], sizes: dict[str, str], demo: str
) -> None:
    more = {
        "VLMPORT_WEB_TINY": sizes["tiny"],
        "VLMPORT_WEB_LARGE": sizes["large"],
        "VLMPORT_WEB_DEMO": demo,
    }
    run_in_chromium(node, name, {**environment, **more})
