"""Read from the source, without running it, which class raises which code."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmport import errors

SOURCE = Path(errors.__file__).parent
CODE = re.compile(r"[a-z]+\.[a-z0-9]+(?:-[a-z0-9]+)*")
WEB = Path(__file__).parents[1] / "web/src"
THROWN = re.compile(r"new VlmportError\(\s*'(\w+)',\s*'([a-z]+\.[a-z0-9-]+)'")
TS_CODE = re.compile(rf"'({CODE.pattern})'")
ROOTS = ("VlmportError", "VlmportWarning")
# Classes and functions that carry a code to an error, and the class of that error.
CARRIERS = {"Kind": ["ImageError"], "TemplateLimitError": ["PromptError"]}
GIVEN = ("check_file", "load_json")  # raise the class that they are given, as `error(…)`


@dataclass(frozen=True)
class Scope:
    """A place in a module: the classes and functions around it, the outermost first."""

    module: ast.Module
    around: tuple[ast.AST, ...]

    @property
    def function(self) -> ast.FunctionDef | None:
        inner = [one for one in self.around if isinstance(one, ast.FunctionDef)]
        return inner[-1] if inner else None


@functools.cache
def trees() -> Mapping[Path, ast.Module]:
    paths = sorted(SOURCE.rglob("*.py"))
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}


@functools.cache
def classes() -> Mapping[str, str]:
    """Each class of errors or warnings → its base."""
    nodes = (node for tree in trees().values() for node in ast.walk(tree))
    bases = {
        n.name: ast.unparse(n.bases[0]) for n in nodes if isinstance(n, ast.ClassDef) and n.bases
    }
    return {name: bases[name] for name in bases if set(ROOTS) & set(_line(name, bases))}


def is_a(name: str, base: str) -> bool:
    """Whether a class is, or derives from, another."""
    return base in _line(name, classes())


def raised() -> dict[str, set[str]]:
    """Code → the classes that it is raised with. Raises ValueError for one that can't be read."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    given = _classes_given()
    for path, tree in trees().items():
        for call, scope in _calls(tree, Scope(tree, ())):
            code = next((one.value for one in call.keywords if one.arg == "code"), None)
            if code is None or (names := _classes_of(call, given)) is None:
                continue
            if isinstance(code, ast.Attribute) and ast.unparse(code) != "self._code":
                continue  # that of another error or carrier
            codes = set(_values(code, scope))
            if not codes:
                raise ValueError(f"{path}:{call.lineno}: code={ast.unparse(code)}")
            for one in codes:
                found[one].update(names)
    return dict(found)


def _classes_of(call: ast.Call, given: Iterable[str]) -> Iterable[str] | None:
    """The classes of errors that a call with a code makes; None for one that passes it on."""
    name = ast.unparse(call.func)
    if name in classes() or name in ROOTS:
        return [name]
    return given if name == "error" else CARRIERS.get(name)


def _classes_given() -> set[str]:
    """The classes that are passed to GIVEN, and their defaults."""
    nodes = [node for tree in trees().values() for node in ast.walk(tree)]
    calls = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) in GIVEN]
    values = [one for n in calls for one in (*n.args, *(kw.value for kw in n.keywords))]
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name in GIVEN:
            values += [one for one in node.args.kw_defaults if one is not None]
    return {one.id for one in values if isinstance(one, ast.Name) and one.id in classes()}


def _values(code: ast.expr, scope: Scope) -> Iterator[str]:
    """The codes that an expression may have."""
    if isinstance(code, ast.Constant) and isinstance(code.value, str):
        yield code.value
    elif isinstance(code, ast.IfExp):
        yield from _values(code.body, scope)
        yield from _values(code.orelse, scope)
    elif isinstance(code, ast.Attribute):  # self._code: a property
        for node in ast.walk(scope.around[0]):
            if isinstance(node, ast.FunctionDef) and node.name == code.attr:
                for one in ast.walk(node):
                    if isinstance(one, ast.Return) and one.value is not None:
                        yield from _values(one.value, scope)
    elif isinstance(code, ast.Name):
        yield from _values_of_name(code.id, scope)


def _values_of_name(name: str, scope: Scope) -> Iterator[str]:
    function = scope.function
    if function is not None and name in {one.arg for one in function.args.kwonlyargs}:
        for call, there in _calls(scope.module, Scope(scope.module, ())):
            if ast.unparse(call.func) == function.name:
                for keyword in call.keywords:
                    if keyword.arg == name:
                        yield from _values(keyword.value, there)
        return
    for where in filter(None, (function, scope.module)):
        if values := list(_assigned(name, where)):
            for value in values:
                yield from _values(value, scope)
            return
    for node in scope.module.body:  # a constant of another module
        if isinstance(node, ast.ImportFrom) and name in {one.name for one in node.names}:
            ending = f"{(node.module or '').replace('.', '/')}"
            for path, tree in trees().items():
                if f"{path.with_suffix('')}".endswith(ending) or path.parent.as_posix().endswith(
                    ending
                ):
                    for value in _assigned(name, tree):
                        yield from _values(value, Scope(tree, ()))


def _assigned(name: str, where: ast.AST) -> Iterator[ast.expr]:
    """The values that a name is given, in a function or at the top of a module."""
    nodes = where.body if isinstance(where, ast.Module) else ast.walk(where)
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name) and target.id == name:
                    yield node.value
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=False)
                    yield from (v for t, v in pairs if isinstance(t, ast.Name) and t.id == name)


def _calls(node: ast.AST, scope: Scope) -> Iterator[tuple[ast.Call, Scope]]:
    """Each call under a node, with its place."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield child, scope
        inner = isinstance(child, ast.FunctionDef | ast.ClassDef)
        yield from _calls(child, Scope(scope.module, (*scope.around, child)) if inner else scope)


def _line(name: str, bases: Mapping[str, str]) -> list[str]:
    """A class and those that it derives from."""
    line = [name]
    while line[-1] in bases and bases[line[-1]] not in line:
        line.append(bases[line[-1]])
    return line


def class_facts(name: str) -> tuple[str, int | None]:
    """The first line of a class's docstring, and its exit code (None for a warning)."""
    nodes = [node for tree in trees().values() for node in ast.walk(tree)]
    found = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    text = (ast.get_docstring(found[name]) or "").split("\n\n")[0].replace("\n", " ")
    for one in _line(name, classes()):
        if one in found and (values := list(_assigned("exit_code", found[one]))):
            return text, ast.literal_eval(values[0])
    return text, None


def raised_in_web() -> dict[str, set[str]]:
    """Code → the kinds that the TypeScript package throws it with."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for path in sorted(WEB.rglob("*.ts")):
        for kind, code in THROWN.findall(path.read_text(encoding="utf-8")):
            found[code].add(kind)
    return dict(found)


def codes_of_web() -> list[str]:
    """The codes that its type ErrorCode has."""
    return TS_CODE.findall((WEB / "error-codes.ts").read_text(encoding="utf-8"))


def used_in_web() -> set[str]:
    """The texts between quotes in the TypeScript package that have the form of a code."""
    paths = [path for path in WEB.rglob("*.ts") if path.name != "error-codes.ts"]
    return {code for path in paths for code in TS_CODE.findall(path.read_text(encoding="utf-8"))}
