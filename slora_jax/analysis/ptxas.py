"""NVIDIA's assembler from JAX's CUDA wheels, which reports a kernel's registers, spills and shared memory."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from slora_jax.errors import ConfigError

PLACES = ("cuda_nvcc/bin/ptxas", "cu13/bin/ptxas")
"""Paths of the assembler under `nvidia/` in the wheels of CUDA 12 and 13."""


@dataclass(frozen=True)
class Resources:
    """registers: per thread. spill_bytes: spill stores and loads per thread. shared_bytes: static, per block."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def ptxas() -> Path:
    """Returns the assembler's path: in the installed CUDA wheels, or else on PATH.

    Raises:
      ConfigError: it is not installed.
    """
    package = importlib.util.find_spec("nvidia")
    for root in (package.submodule_search_locations or ()) if package else ():
        for place in PLACES:
            if (path := Path(root) / place).exists():
                return path
    if found := shutil.which("ptxas"):
        return Path(found)
    raise ConfigError(
        "ptxas, which reports registers and spills, is not installed: install the extra that has it, "
        "make install EXTRAS=cuda12"
    )


def architecture(ptx: str) -> str:
    """Returns the `.target` architecture of PTX, such as "sm_90a"."""
    found = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    if found is None:
        raise ConfigError(f"PTX without a .target: {ptx[:200]!r}")
    return found[1]


@cache
def assemble(ptx: str) -> Resources:
    """Assembles PTX for its `.target` architecture. Results are kept by PTX.

    Raises:
      ConfigError: `ptxas` is not installed, or fails.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas()), "-v", "-arch", architecture(ptx), file.name, "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ConfigError(f"{command[0]} for {architecture(ptx)} failed: {result.stderr.strip()[:2000]}")
    return read_report(result.stderr)


def read_report(text: str) -> Resources:
    """Reads the report of `ptxas -v` on one kernel and its callees."""

    def numbers(pattern: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, text)]

    registers = numbers(r"Used (\d+) registers")
    if not registers:
        raise ConfigError(f"ptxas -v reports no registers: {text.strip()[:2000]!r}")
    spills = numbers(r"(\d+) bytes spill stores") + numbers(r"(\d+) bytes spill loads")
    return Resources(max(registers), sum(spills), sum(numbers(r"(\d+) bytes smem")))
