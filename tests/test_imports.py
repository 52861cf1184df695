"""Imports point one way, heavy ones wait, and generic code knows no family."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/vlmport"
MODULES = sorted(PACKAGE.rglob("*.py"))
TORCH = {"torch", "transformers", "peft", "torchvision"}
# Words of one family, of the models in it, and its options of the image processor. The registry is
# families/, and checkpoint/ only speaks of a family where it gives an example.
IMAGE_OPTIONS = ("do_image_splitting", "min_pixels", "max_pixels")
FAMILY_WORDS = re.compile(
    r"prefix_conditioning|siglip|llava|distilvit|smolvlm|qwen|llama|no-split"
    + f"|(?-i:{'|'.join(IMAGE_OPTIONS)})",  # MAX_PIXELS is another: the most that Pillow opens
    re.I,
)
GENERIC = [
    "app",
    "benchmark",
    "bundle",
    "cli",
    "errors.py",
    "evaluation",
    "exporter",
    "files",
    "inspection.py",
    "loading.py",
    "runtime",
    "text",
]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports at run time, as a whole name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield node.module


def loaded_by(code: str) -> set[str]:
    """The modules that are loaded after some code ran in a new process."""
    program = f"{code}\nimport sys\nprint(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split("\n"))


def test_there_are_modules_to_look_at() -> None:
    names = {name_of(path) for path in MODULES}
    assert {"cli/caption.py", "runtime/model.py", "families/prefix/family.py"} <= names


def is_reference(name: str) -> bool:
    """Whether a module may import torch: a family's reference, or what references share."""
    return (name.startswith("parity/references/") and not name.endswith("__init__.py")) or (
        name.startswith("families/") and name.endswith("/reference.py")
    )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_torch_is_imported_by_the_references_alone(path: Path) -> None:
    heavy = {module for module in imports(path) if module.partition(".")[0] in TORCH}
    assert bool(heavy) == is_reference(name_of(path))


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("families/*/reference.py")), ids=name_of)
def test_a_reference_shares_no_code_with_the_export(path: Path) -> None:
    """A mistake in the export's reading or arithmetic must not repeat itself in its reference."""
    ours = {module.split(".")[1] for module in imports(path) if module.startswith("vlmport.")}
    assert ours <= {"parity", "errors"}


def test_choosing_a_reference_loads_no_torch() -> None:
    assert not TORCH & loaded_by("import vlmport.parity, vlmport.parity.references")


# Room → the rooms that it may import, besides itself. References are looked at by themselves.
ALLOWED = {
    "app": {"errors", "builtin", "runtime"},
    "benchmark": {"errors", "bundle", "runtime"},
    "builtin": set(),
    "bundle": {"errors", "files"},
    "checkpoint": {"errors", "files", "text"},
    "errors.py": set(),
    "evaluation": {"errors", "files", "bundle", "builtin", "runtime", "loading", "__version__"},
    "exporter": {
        "errors", "bundle", "text", "checkpoint", "graph", "families", "runtime", "builtin",
        "__version__",
    },
    "families": {"errors", "bundle", "text", "checkpoint", "graph"},
    "files": {"errors"},
    "graph": {"errors", "bundle", "checkpoint"},
    "parity": {
        "errors", "bundle", "text", "checkpoint", "families", "runtime", "builtin", "loading",
    },
    "runtime": {"errors", "files", "bundle", "text"},
    "serve": {
        "errors", "signals", "builtin", "bundle", "demo", "runtime", "loading", "__version__",
    },
    "signals.py": set(),
    "text": {"errors", "files"},
}  # fmt: skip


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part: str) -> None:
    root = PACKAGE / part
    for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
        if is_reference(name_of(path)):
            continue
        for module in imports(path):
            if module == "vlmport":  # `from vlmport import __version__`
                assert part in ("exporter", "evaluation", "runtime", "serve"), path
            elif module.startswith("vlmport."):
                room = module.split(".")[1]
                allowed = room == part or room in ALLOWED[part]
                assert allowed, f"{name_of(path)} imports {module}"


def test_every_room_is_looked_at() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE}
    assert rooms - {"cli"} <= set(ALLOWED)  # the command line may import everything


def test_no_room_imports_itself_by_its_front_door() -> None:
    """`bundle/__init__` imports the modules of the room; they do not import it."""
    for path in (PACKAGE / "bundle").glob("*.py"):
        assert "vlmport.bundle" not in set(imports(path)), path


def test_the_runtime_loads_neither_exporter_nor_torch() -> None:
    modules = loaded_by(
        "import vlmport.runtime.model, vlmport.runtime.probe, vlmport.runtime.graphs.components"
    )
    assert "onnxruntime" in modules
    for other in ("families", "graph", "exporter", "checkpoint", "parity"):
        assert not any(name.startswith(f"vlmport.{other}") for name in modules), other
    assert not {"onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub", *TORCH} & modules


def test_a_model_that_is_exported_loads_no_exporter() -> None:
    """It would take longer than most captions."""
    modules = loaded_by("import vlmport; vlmport.load")
    assert "vlmport.runtime.model" in modules
    assert not {"onnx", "onnxscript", "vlmport.exporter", "vlmport.families"} & modules
    # To read a checkpoint, and to fetch from an address: neither is needed to run a bundle.
    assert not {"vlmport.checkpoint.weights", "ml_dtypes", "ssl", "http.client"} & modules


def test_import_vlmport_is_instant() -> None:
    modules = loaded_by("import vlmport")
    assert {name for name in modules if name.startswith("vlmport")} == {"vlmport"}
    assert not {"numpy", "onnx", "onnxruntime", "PIL", "typer"} & modules


@pytest.mark.parametrize("first", ["", "import vlmport.exporter, vlmport.parity, vlmport.loading"])
def test_the_api_is_plain_functions_whatever_was_imported_first(first: str) -> None:
    code = f"{first}\n" + (
        "import inspect, vlmport\n"
        "for name in ('export', 'verify', 'evaluate', 'load'):\n"
        "    function = getattr(vlmport, name)\n"
        "    assert inspect.isfunction(function), name\n"
        "    kinds = {one.kind for one in inspect.signature(function).parameters.values()}\n"
        "    assert not kinds & {inspect.Parameter.VAR_POSITIONAL}, name\n"
        "try:\n"
        "    vlmport.export('/nowhere/at/all', '/nowhere/else')\n"
        "except vlmport.VlmportError as error:\n"
        "    assert 'no such folder' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    assert not TORCH & loaded_by(code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import vlmport

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = vlmport.nothing
    assert set(vlmport.__all__) <= set(dir(vlmport))


def strings_and_names(path: Path) -> Iterator[tuple[int, str]]:
    """String constants but docstrings, and every name, with their lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias):
            yield 0, node.name


@pytest.mark.parametrize("part", GENERIC)
def test_generic_code_names_no_family(part: str) -> None:
    root = PACKAGE / part
    for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
        for line, text in strings_and_names(path):
            assert not FAMILY_WORDS.search(text), f"{name_of(path)}:{line}: {text}"


def test_the_search_for_names_finds_some() -> None:
    found = [text for _, text in strings_and_names(PACKAGE / "families/prefix/family.py")]
    assert any(FAMILY_WORDS.search(text) for text in found)
