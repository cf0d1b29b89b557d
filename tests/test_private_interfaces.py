"""Private interfaces of other packages: each use is listed in pyproject.toml, each package has an upper bound."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INTERFACES = PROJECT["tool"]["slora"]["private-interfaces"]
FOLDERS = ("slora_jax", "pallas_kernels", "experiments", "tests")


def imported(source: str) -> Iterator[str]:
    """Yields dotted names of all imports, and of attributes of imported modules."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            case ast.Attribute():
                yield ast.unparse(node)


def private_interface(name: str) -> str | None:
    """Returns the key of the table that `name` belongs to; for an unlisted `package._module`, that name."""
    for key in INTERFACES:
        if name == key or name.startswith(key + "."):
            return key
    unlisted = re.match(r"(jax|jaxlib|jax_triton|triton|uvicorn|httptools)(\.\w+)*?\._[a-z]\w*", name)
    return unlisted and unlisted[0]


def test_every_use_of_a_private_interface_is_listed():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    used = {
        (key, str(path.relative_to(ROOT)))
        for path in files
        for name in imported(path.read_text())
        if (key := private_interface(name))
    }
    assert used == {(key, file) for key, entry in INTERFACES.items() for file in entry["files"]}


def test_a_package_with_a_private_interface_is_bounded_around_the_tested_version():
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(line) for group in groups for line in group]
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    for package in {package for entry in INTERFACES.values() for package in entry["packages"]}:
        bounds = [r.specifier for r in requirements if r.name == package and r.specifier]
        assert bounds, package
        for specifier in bounds:
            assert any(clause.operator == "<" for clause in specifier), (package, specifier)
            assert tested[package] in specifier, (package, specifier)
