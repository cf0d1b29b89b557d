"""Imports point one way: no module of the project reaches itself again, and no package imports one above it.

Counted are imports anywhere in a file: in functions, and those for type checkers only. A name that a package exports
counts as imported from the module that defines it.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("pallas_kernels",),
    ("slora_jax.errors", "slora_jax.typed", "slora_jax.phases", "slora_jax.metrics"),
    ("slora_jax.parallel", "slora_jax.models", "slora_jax.adapters"),
    ("slora_jax.memory",),
    ("slora_jax.scheduling",),
    ("slora_jax.engine",),
    ("slora_jax.distributed", "slora_jax.training", "slora_jax.simulation", "slora_jax.analysis", "slora_jax.demo"),
    ("slora_jax.serving",),
    ("slora_jax", "slora_jax.cli"),
    ("experiments",),
)
"""From below. A package imports its own layer and those below it."""

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("pallas_kernels", "slora_jax", "experiments")
    for path in (ROOT / package).rglob("*.py")
}


@cache
def imported(module: str) -> dict[str, str]:
    """Name in `module` -> the module or the `module:name` that it is imported from."""
    found: dict[str, str] = {}
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found[alias.asname or alias.name] = inner if inner in MODULES else f"{node.module}:{alias.name}"
    return found


def defining(target: str) -> str | None:
    """The project's module that an import reaches; None for other packages."""
    module, _, name = target.partition(":")
    if module not in MODULES:
        return None
    if name and MODULES[module].name == "__init__.py" and name in imported(module):
        return defining(imported(module)[name])
    return module


@cache
def edges() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports. A package's exports are not its own imports."""
    return {
        module: {reached for target in imported(module).values() if (reached := defining(target)) not in (None, module)}
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules on a way that ends where it begins; empty if there is none."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for reached in sorted(graph.get(module, ())):
            if found := visit(reached, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def layer(module: str) -> int:
    """The number of the layer of the longest package that the module is in."""
    packages = {package: number for number, layer in enumerate(LAYERS) for package in layer}
    parts = module.split(".")
    return next(packages[name] for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in packages)


def test_no_module_imports_itself_by_others() -> None:
    assert not (found := circle(edges())), " -> ".join([*found, found[0]])


def test_no_package_imports_one_above_it() -> None:
    upwards = [(a, b) for a, reached in edges().items() for b in sorted(reached) if layer(b) > layer(a)]
    assert not upwards, "\n".join(f"{a} imports {b}" for a, b in upwards)


@pytest.mark.parametrize(
    ("graph", "found"),
    [({"a": {"b"}, "b": {"c"}, "c": set()}, []), ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c"])],
)
def test_circles_are_found(graph, found) -> None:
    assert circle(graph) == found
