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
# Words of one family or of the models in it. The registry is families/, and checkpoint/ only
# speaks of a family where it gives an example.
FAMILY_WORDS = re.compile(r"prefix_conditioning|siglip|llava|distilvit|smolvlm|qwen|llama", re.I)
GENERIC = [
    "runtime",
    "export",
    "tokenizer.py",
    "chat_template.py",
    "bundle.py",
    "cli",
    "source.py",
    "bundle_cache.py",
    "inspection.py",
    "benchmark",
    "evaluation",
    "recording.py",
    "errors.py",
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
    assert {"cli/caption.py", "runtime/model.py", "families/prefix.py"} <= names


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_torch_is_imported_by_the_references_alone(path: Path) -> None:
    """By every module of the folder but the one that chooses among them."""
    heavy = {module for module in imports(path) if module.partition(".")[0] in TORCH}
    name = name_of(path)
    is_reference = name.startswith("verify/references/") and path.name != "__init__.py"
    assert bool(heavy) == is_reference


def test_choosing_a_reference_loads_no_torch() -> None:
    assert not TORCH & loaded_by("import vlmport.verify, vlmport.verify.references")


# Folder → what it may import of the package, besides errors and bundle.
ALLOWED = {
    "bundle.py": {"errors", "hashing", "bundle_checks", "layouts", "json_files", "precisions"},
    "foreign_files.py": {"errors"},
    "json_files.py": {"errors", "foreign_files"},
    "hashing.py": set(),
    "precisions.py": {"errors"},
    "errors.py": set(),
    "tokenizer.py": {"errors", "json_files", "killable", "tokenizer_checks"},
    "tokenizer_checks.py": set(),
    "chat_template.py": {"errors", "killable"},
    "killable.py": set(),
    "killable_services.py": {"killable", "chat_template"},
    "onnx_bytes.py": {"errors"},
    "checkpoint": {"checkpoint", "errors", "foreign_files", "json_files", "killable",
        "killable_services"},
    "graph": {"graph", "checkpoint", "errors", "bundle"},
    "families": {
        "families", "graph", "checkpoint", "errors", "bundle", "layouts", "tokenizer",
        "chat_template",
    },
    "runtime": {
        "runtime", "errors", "bundle", "json_files", "layouts", "onnx_bytes", "precisions",
        "tokenizer", "chat_template", "foreign_files",
    },
    "layouts.py": {"errors"},
    "bundle_checks.py": {"bundle", "hashing", "layouts", "precisions"},
    "export": {
        "layouts",
        "export", "families", "graph", "checkpoint", "runtime", "errors", "bundle", "builtin",
        "tokenizer", "__version__",
    },
    "recording.py": {"bundle"},
    "benchmark": {"benchmark", "runtime", "errors", "bundle"},
    "evaluation": {
        "evaluation", "runtime", "builtin", "errors", "bundle", "json_files", "precisions",
        "recording", "__version__",
    },
    "verify": {
        "verify", "recording", "runtime", "checkpoint", "errors", "bundle", "builtin", "layouts",
        "chat_template", "tokenizer",
    },
}  # fmt: skip


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part: str) -> None:
    root = PACKAGE / part
    for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
        for module in imports(path):
            if module == "vlmport":  # `from vlmport import __version__`
                assert part in ("export", "evaluation", "runtime"), path
            elif module.startswith("vlmport."):
                assert module.split(".")[1] in ALLOWED[part], f"{name_of(path)} imports {module}"


def test_the_runtime_loads_neither_exporter_nor_torch() -> None:
    modules = loaded_by(
        "import vlmport.runtime.model, vlmport.runtime.probe, vlmport.runtime.components"
    )
    assert "onnxruntime" in modules
    for other in ("families", "graph", "export", "checkpoint", "verify"):
        assert not any(name.startswith(f"vlmport.{other}") for name in modules), other
    assert not {"onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub", *TORCH} & modules


def test_a_model_that_is_exported_loads_no_exporter() -> None:
    """It would take longer than most captions."""
    modules = loaded_by("import vlmport; vlmport.load")
    assert "vlmport.runtime.model" in modules
    assert not {"onnx", "onnxscript", "vlmport.export", "vlmport.families"} & modules


def test_import_vlmport_is_instant() -> None:
    modules = loaded_by("import vlmport")
    assert {name for name in modules if name.startswith("vlmport")} == {"vlmport"}
    assert not {"numpy", "onnx", "onnxruntime", "PIL", "typer"} & modules


@pytest.mark.parametrize("first", ["", "vlmport.load; import vlmport.export, vlmport.verify"])
def test_the_api_is_callable_whatever_was_imported_first(first: str) -> None:
    """`vlmport.export` and `vlmport.verify` are folders and functions of one name."""
    code = f"import vlmport\n{first}\n" + (
        "for name in vlmport.__all__:\n"
        "    assert callable(getattr(vlmport, name)) or name == '__version__', name\n"
        "import vlmport.export.exporter as exporter\n"
        "for call in (vlmport.export, vlmport.export.export, exporter.export):\n"
        "    try:\n"
        "        call('/nowhere/at/all', '/nowhere/else')\n"
        "    except vlmport.VlmportError as error:\n"
        "        assert 'no such folder' in str(error), error\n"
        "    else:\n"
        "        raise SystemExit('no error')\n"
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
    found = [text for _, text in strings_and_names(PACKAGE / "families/prefix.py")]
    assert any(FAMILY_WORDS.search(text) for text in found)
