"""A built-in name works wherever a model or a bundle is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import vlmport
from vlmport import Bundle, cli
from vlmport.benchmark import bench
from vlmport.errors import BundleError, SourceError
from vlmport.loading import open_bundle

NAME = "shapes"
IMAGE = str(Path(__file__).parents[1] / "examples/red_square.png")
QUICK = ["--rounds", 1, "--new-tokens", 2, "--tokens", 5, "--no-cold", "--threads", 1]

COMMANDS: dict[str, list[object]] = {
    "caption": [IMAGE, "--model", NAME],
    "ask": [IMAGE, "--model", NAME],
    "chat": ["--model", NAME],
    "export": [NAME, "{out}", "--precision", "q4"],
    "verify": [NAME, "--reference", NAME],
    "eval": [NAME, "--limit", 2, "--no-record"],
    "bench": [NAME, "--precision", "q4", *QUICK],
    "inspect": [NAME],
    "demo": ["--model", NAME, "--port", 0],
    "serve": [NAME, "--port", 0, "--preload"],
    "tune": [NAME, "--seconds", 1],
}
OTHERS = {"models"}  # take neither
ELSEWHERE = {"app"}  # needs Gradio, and opens models as `caption` does


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def one_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is exported once for all of these tests."""
    monkeypatch.setenv("VLMPORT_CACHE", str(cache))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `verify`, `demo` and `serve` are given; none of them runs."""
    bundles: list[Any] = []

    class Report:
        passed = True

    class Server:
        url = "http://127.0.0.1:1/"

        def serve_forever(self) -> None:
            raise KeyboardInterrupt

        def close(self) -> None: ...

    def verify(bundle: Any, *arguments: Any, **options: Any) -> Report:
        bundles.append(bundle)
        return Report()

    def make_server(bundle: Any, port: int) -> Server:
        bundles.append(bundle)
        return Server()

    async def serve(server: Any, sockets: Any) -> None:  # --preload has opened the model
        models = server.app.state.service.models
        bundles.extend(one.vlm.components.bundle for one in models.open_models)
        await models.close(0)

    monkeypatch.setattr("vlmport.parity.verify", verify)
    monkeypatch.setattr("vlmport.demo.make_server", make_server)
    monkeypatch.setattr("vlmport.serve.server.Server.serve", serve)
    return bundles


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments], catch_exceptions=False)


def test_the_table_has_every_command() -> None:
    import typer

    group: Any = typer.main.get_command(cli.app)
    assert set(COMMANDS) | OTHERS | ELSEWHERE == set(group.commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_a_builtin_name(command: str, tmp_path: Path, taken: list[Any]) -> None:
    arguments = [str(one).format(out=tmp_path / "out") for one in COMMANDS[command]]
    done = run(command, *arguments)
    assert done.exit_code == 0, done.stderr
    if command in ("verify", "demo", "serve"):
        (bundle,) = taken
        assert isinstance(bundle, Bundle)
        assert bundle.manifest.name == NAME
    if command in ("caption", "ask"):
        assert done.stdout == "a red square on a white background\n"


def test_functions_take_a_builtin_name(tmp_path: Path) -> None:
    assert vlmport.load(NAME).caption(IMAGE).text == "a red square on a white background"
    assert vlmport.export(NAME, tmp_path / "out", precisions="q4").manifest.name == NAME
    assert vlmport.evaluate(NAME, limit=2, record=False).passed is not None
    with pytest.raises(SourceError, match="no such folder"):  # the bundle is found before that
        vlmport.verify(NAME, "./nowhere/at/all")


def test_other_precisions_of_a_builtin_model_are_exported_on_request() -> None:
    assert open_bundle(NAME).manifest.precisions == ("fp32", "q8", "q4")
    fp16 = open_bundle(NAME, precisions=["fp16", "auto", "vision=q8,decoder=q4"])
    assert fp16.manifest.precisions == ("fp32", "fp16", "q8", "q4")


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    for take in (open_bundle, vlmport.evaluate, lambda name: vlmport.verify(name, name)):
        with pytest.raises(BundleError) as caught:
            take(NAME)
        assert caught.value.code == "bundle.no-manifest"


def test_bench_takes_the_bundle_of_one() -> None:
    report = bench(open_bundle(NAME), precisions=["q4"], lengths=(5,), rounds=1, cold=False)
    assert report.bundle == NAME


@pytest.mark.parametrize(
    "take",
    [
        vlmport.load,
        vlmport.evaluate,
        lambda name: vlmport.export(name, "out"),
        lambda name: vlmport.verify(name, NAME),
        lambda name: vlmport.verify(NAME, name),
    ],
    ids=["load", "evaluate", "export", "verify", "reference"],
)
def test_a_misspelt_name_is_recognized(take: Any) -> None:
    with pytest.raises((BundleError, SourceError), match=r"did you mean 'shapes'\?") as caught:
        take("shape")
    assert caught.value.code == "source.not-found"
    assert "vlmport models" in (caught.value.hint or "")
