"""The order of the modules, read from CONTRIBUTING.md, and what is public: page and code cannot drift apart."""

import ast
import inspect
import re
import runpy
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest

import hf_recontrol

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "hf_recontrol"
# Copied into every pushed head: it imports nothing of the package.
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "custom_generate" not in path.parts)
ROOT = {"__init__", "__main__", "_version"}


def wings() -> dict[str, list[str]]:
    """Of each wing or root module, in the table's order, what it may import."""
    rows = re.findall(r"^\| `([\w/.]+)` \|.*\|([^|]*)\|$", (REPO / "CONTRIBUTING.md").read_text(), flags=re.M)
    return {name.rstrip("/").removesuffix(".py"): re.findall(r"`(\w+)`", allowed) for name, allowed in rows}


def name_of(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, only_at_start: bool = False) -> list[tuple[str, ...]]:
    """The package's modules that one imports: also inside functions and for type checkers, unless `only_at_start`."""
    own, found = path.relative_to(PACKAGE).with_suffix("").parts, []
    nodes = tree_of(path).body if only_at_start else ast.walk(tree_of(path))
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "hf_recontrol"]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "hf_recontrol"):
            base = own[: -node.level] if node.level else ()
            parts = (node.module or "").split(".") if node.level else node.module.split(".")[1:]
            target = (*base, *(part for part in parts if part))
            found += [
                (*target, alias.name) if (PACKAGE.joinpath(*target) / f"{alias.name}.py").exists() else target
                for alias in node.names
            ]
    return found


def test_the_table_lists_every_wing_and_each_may_import_only_what_stands_above_it():
    table = wings()
    found = {name_of(path)[0] for path in MODULES} - ROOT
    assert set(table) == found
    for position, (name, allowed) in enumerate(table.items()):
        above = list(table)[:position]
        assert set(allowed) <= set(above), f"{name} may import {allowed}, but only {above} stand above it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: ".".join(name_of(path)))
def test_a_module_imports_only_what_its_wing_may(path):
    own = name_of(path)[0]
    if own in ROOT:
        return
    allowed = {*wings()[own], own, "_version"}
    assert not [target for target in imports(path) if target[0] not in allowed]


def test_no_modules_import_each_other_in_a_circle():
    graph = {name_of(path): set(imports(path, only_at_start=True)) for path in MODULES}
    done, running = set(), []

    def visit(module):
        assert module not in running, [*running, module]
        if module in done or module not in graph:
            return
        running.append(module)
        for target in graph[module]:
            visit(target)
        done.add(running.pop())

    for module in graph:
        visit(module)


def test_every_import_that_the_table_allows_is_made():
    """What nobody needs is not allowed: the table is as strict as the code."""
    made = {}
    for path in MODULES:
        made.setdefault(name_of(path)[0], set()).update(target[0] for target in imports(path) if target)
    for name, allowed in wings().items():
        assert not set(allowed) - made[name], name


def test_only_the_command_and_integrations_import_typer():
    for path in MODULES:
        names = [
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(tree_of(path))
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
            for alias in node.names
        ]
        assert name_of(path)[0] in ("cli", "integrations") or not any(
            (name or "").startswith("typer") for name in names
        )


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(path: Path) -> set[str]:
    """Names with an underscore that a module gives to something: functions, classes, variables, attributes of self."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if _private(name)}


# Names that PyTorch and transformers have too, on objects of theirs.
THEIRS = {"_sample", "_forward"}


def test_no_module_reaches_for_another_modules_underscore_names():
    defined = {path: _defined(path) for path in MODULES}
    for path in MODULES:
        others = set().union(*(names for other, names in defined.items() if other != path)) - defined[path] - THEIRS
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and node.attr in others:
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert is_own, f"{path}, line {node.lineno}: .{node.attr}"
            if isinstance(node, ast.ImportFrom) and node.level:
                private = [a.name for a in node.names if _private(a.name) and node.module != "_version"]
                assert not [name for name in private if name != "_version"], f"{path}, line {node.lineno}: {private}"


def test_files_and_folders_stay_small():
    for path in MODULES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{path} has {lines} lines: look for the second thing that it does"
    for folder in {path.parent for path in MODULES} - {PACKAGE}:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 9, f"{folder} holds {len(files)} modules"


def test_the_public_names_are_those_that_type_checkers_see():
    block = next(node for node in tree_of(PACKAGE / "__init__.py").body if isinstance(node, ast.If))
    typed = {alias.name for node in ast.walk(block) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed | {"__version__"} == set(hf_recontrol.__all__)
    assert all(getattr(hf_recontrol, name) is not None for name in hf_recontrol.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_recontrol.nothing  # noqa: B018


@pytest.mark.parametrize(
    "path", sorted([*REPO.glob("examples/*.py"), *REPO.glob("benchmarks/*.py")]), ids=lambda path: path.name
)
def test_examples_and_benchmarks_import_public_names_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not [alias for alias in node.names if alias.name.startswith("hf_recontrol.")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_recontrol":
            assert node.module == "hf_recontrol"
            assert {alias.name for alias in node.names} <= set(hf_recontrol.__all__)
        elif isinstance(node, ast.Attribute):
            assert (
                not _private(node.attr)
                or (isinstance(node.value, ast.Name) and node.value.id == "self")
                or (node.attr in ("_name_or_path", "_attn_implementation"))
            ), f"line {node.lineno}: .{node.attr}"


def test_the_api_page_is_what_the_docstrings_say():
    page = runpy.run_path(str(REPO / "docs" / "make_api.py"))["page"]()
    assert (REPO / "docs" / "api.md").read_text(encoding="utf-8") == page, "run `make docs`"


def test_every_public_function_and_class_has_a_docstring():
    for name in hf_recontrol.__all__:
        thing = getattr(hf_recontrol, name)
        assert not (inspect.isclass(thing) or inspect.isfunction(thing)) or inspect.getdoc(thing), name


@pytest.mark.parametrize("module", ["hf_recontrol", "hf_recontrol.settings", "hf_recontrol.cli"])
def test_what_is_imported_first_imports_no_torch(module):
    program = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


PAGES = [REPO / "README.md", *sorted(set((REPO / "docs").glob("*.md")) - {REPO / "docs" / "api.md"})]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_in_the_documentation_parses_and_imports_public_names(path):
    for code in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(textwrap.dedent(code))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_recontrol":
                assert node.module == "hf_recontrol"
                assert {each.name for each in node.names} <= set(hf_recontrol.__all__)
