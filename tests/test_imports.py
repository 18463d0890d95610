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
__main__ blind catalog checkpoint contracts content door environment errors events files fingerprint formats hub
leaving logs machine methods options plots process prompts record reference rehearse report request results ruler source
statistics telemetry tuned worker
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
    assert {f"engine.{name}" for name in re.findall(r"`(\w+)`", said)} | {"engine.__main__"} == WITHOUT


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


BELOW = [
    ("engine.environment", "engine.door"),
    ("engine.content", "engine.door"),
    ("engine.options", "engine.door"),
    ("engine.residency", "engine.door"),
    ("ui.shelf", "engine.door"),
    ("engine.evaluate", "engine.worker"),
    ("engine.bench", "engine.worker"),
    ("engine.tune", "engine.evaluate"),
    ("engine.lab", "engine.compare"),
    ("engine.worker", "engine.device"),
]


@pytest.mark.parametrize(("module", "above"), BELOW)
def test_nobody_reaches_up(module, above):
    assert module in MODULES and above in MODULES
    assert not {name for name in directly(module) if name == above or name.startswith(f"{above}.")}


def test_no_part_of_the_page_reaches_into_a_tab():
    tabs = {f"ui.{name}" for name in ("benchmarks", "blind", "gallery", "how", "quality", "recipe")}
    parts = {f"ui.{name}" for name in ("cards", "scatter", "tables", "view", "link", "shelf", "style")}
    assert tabs | parts <= MODULES.keys()
    assert {(part, name) for part in parts for name in directly(part) & tabs} == set()
