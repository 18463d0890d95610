"""Who imports whom: no torch in the process that serves, and nobody reaches up for what belongs below."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "torchao", "diffusers", "transformers", "lpips", "torchvision"}
TORCH_FREE = """
__main__ catalog columns environment errors events files formats leaving logs machine quantized reference request
results safety vocabulary benchmark benchmark.methods benchmark.overview benchmark.plots compiler metrics metrics.ruler
metrics.statistics outputs outputs.blind outputs.pool outputs.recordings quality quality.claims quality.prompts
quality.report quantization quantization.recipe_files quantization.roles reproduction reproduction.cards
reproduction.cells reproduction.plausibility reproduction.report reproduction.run reproduction.tables runtime serving
serving.admission serving.contracts serving.command_line serving.doctor serving.lent serving.process serving.rehearse
serving.telemetry serving.worker weights weights.checkpoint weights.fingerprint weights.hub weights.lora weights.own
weights.source weights.torchao_layout
"""
"""Modules of engine/ that may be imported where torch must not be."""
WITHOUT = {f"engine.{name}" for name in TORCH_FREE.split()}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in (*(ROOT / "engine").glob("**/*.py"), *(ROOT / "ui").glob("**/*.py"))}


def imported(body: list[ast.stmt]) -> set[str]:
    """What these statements import when they run, without what only a type checker sees."""
    found = set()
    for statement in body:
        match statement:
            case ast.Import(names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(_, names, 0):
                found |= {statement.module, *(f"{statement.module}.{alias.name}" for alias in names)}
            case ast.If(ast.Name("TYPE_CHECKING")) | ast.FunctionDef() | ast.AsyncFunctionDef():
                pass
            case _:
                for inner in ("body", "orelse", "finalbody", "handlers"):
                    found |= imported(getattr(statement, inner, []))
    return found


@functools.cache
def directly(module: str) -> frozenset[str]:
    return frozenset(imported(ast.parse(MODULES[module].read_text()).body))


def way_to_torch(module: str, passed: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The modules on a way from this one to a library that brings torch; empty without one."""
    way = (*passed, module)
    for other in sorted(directly(module)):
        if other.partition(".")[0] in HEAVY or other == "safetensors.torch":
            return (*way, other)
        if other in MODULES and other not in way and (found := way_to_torch(other, way)):
            return found
    return ()


@pytest.mark.parametrize("module", sorted(WITHOUT | {name for name in MODULES if name.split(".")[0] == "ui"}))
def test_a_torch_free_module_does_not_reach_torch(module):
    assert way_to_torch(module) == ()


def test_the_list_of_torch_free_modules_is_whole():
    """So that a new module is put on it, or is known to bring torch."""
    engine = {name for name in MODULES if name.startswith("engine.")}
    assert {name for name in engine if not way_to_torch(name)} == WITHOUT


def test_the_architecture_names_the_same_modules():
    said = (ROOT / "engine" / "README.md").read_text().partition("do without torch: ")[2].partition(". All other")[0]
    packages = {name for name in WITHOUT if MODULES[name].name == "__init__.py"}
    assert {f"engine.{name}" for name in re.findall(r"`([\w.]+)`", said)} | {"engine.__main__"} | packages == WITHOUT


def test_importing_them_all_brings_no_torch():
    names = sorted(WITHOUT | {name for name in MODULES if name.split(".")[0] == "ui"} | {"app"})
    program = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    brought = {sorted(HEAVY)!r} and set({sorted(HEAVY)!r}) & set(sys.modules)
    assert not brought, (name, brought)
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


# Rooms

ARROWS = re.compile(r"<!-- arrows -->\n(.*?)<!-- /arrows -->", re.DOTALL)


def room(module: str) -> str:
    """A module's room, such as "engine/weights"; "engine" for what lies in itself, "command" for the command line."""
    parts = module.split(".")
    if module == "engine.__main__":
        return "command"
    return "/".join(parts[: 2 if MODULES[module].name == "__init__.py" or len(parts) > 2 else 1])


@functools.cache
def anywhere(module: str) -> frozenset[str]:
    """The modules of this project that a module imports, also within functions, but for a type checker alone."""
    tree, found = ast.parse(MODULES[module].read_text()), set()
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(str(base), names, 0) if id(node) not in skipped:
                full = [f"{base}.{alias.name}" for alias in names]
                found |= {name if name in MODULES else base for name in full}
            case ast.Import(names):
                found |= {alias.name for alias in names}
    return frozenset(found & MODULES.keys())


def arrows(package: str) -> dict[str, set[str]]:
    """Rooms of a package -> the rooms of this project that they import."""
    found: dict[str, set[str]] = {}
    for module in (name for name in MODULES if name.split(".")[0] == package):
        found.setdefault(room(module), set()).update({room(other) for other in anywhere(module)} - {room(module)})
    return found


def test_the_arrows_between_rooms_are_those_of_the_architecture():
    said = ARROWS.search((ROOT / "engine" / "README.md").read_text(encoding="utf-8"))[1]
    told = dict(re.findall(r"^\| `([\w/]+)` \| (.*?) \|$", said, re.MULTILINE))
    drawn = {
        one.removeprefix("engine/"): ", ".join(f"`{other.removeprefix('engine/')}`" for other in sorted(others)) or "–"
        for one, others in arrows("engine").items()
    }
    assert told == drawn


def test_no_arrow_leads_back():
    """Of two rooms one lies above the other, or neither."""
    drawn = arrows("engine")

    def below(one: str, seen: set[str]) -> set[str]:
        for other in drawn.get(one, set()) - seen:
            seen.add(other)
            below(other, seen)
        return seen

    assert [one for one in drawn if one in below(one, set())] == []
    assert not [one for one, others in drawn.items() if any(other.split("/")[0] == "ui" for other in others)]


def test_no_module_imports_itself_in_a_circle():
    def way_back(module: str, target: str, seen: set[str]) -> bool:
        for other in (directly(module) & MODULES.keys()) - seen - {module}:
            seen.add(other)
            if other == target or way_back(other, target, seen):
                return True
        return False

    assert [module for module in MODULES if way_back(module, module, set())] == []


def test_no_part_of_the_page_reaches_into_a_tab():
    tabs = {name for name in MODULES if room(name) == "ui/tabs"}
    parts = {name for name in MODULES if room(name) in ("ui/html", "ui/web", "ui/words")} | {
        "ui.view",
        "ui.link",
        "ui.style",
    }
    assert tabs and parts <= MODULES.keys()
    assert {(part, name) for part in parts for name in anywhere(part) & tabs} == set()
