"""NVIDIA's assembler, which ships in JAX's CUDA wheels: what a kernel takes of a multiprocessor."""

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
"""Where the wheels of CUDA 12 and 13 put it, under `nvidia/`."""


@dataclass(frozen=True)
class Resources:
    """registers: of a thread. spill_bytes: of all spill stores and loads of a thread. shared_bytes: static, of a
    block."""

    registers: int
    spill_bytes: int
    shared_bytes: int


def ptxas() -> Path:
    """The assembler's path: in the installed CUDA wheels, or else on PATH.

    Raises:
      ConfigError: there is none.
    """
    package = importlib.util.find_spec("nvidia")
    for root in (package.submodule_search_locations or ()) if package else ():
        for place in PLACES:
            if (path := Path(root) / place).exists():
                return path
    if found := shutil.which("ptxas"):
        return Path(found)
    raise ConfigError(
        "ptxas is not installed, so registers and spills cannot be told: install the extra that brings it, "
        "make install EXTRAS=cuda12"
    )


@cache
def assemble(ptx: str) -> Resources:
    """Assembles PTX for the architecture that it names.

    Raises:
      ConfigError: there is no `ptxas`, or it refuses.
    """
    arch = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    if arch is None:
        raise ConfigError(f"PTX without a .target: {ptx[:200]!r}")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas()), "-v", "-arch", arch[1], file.name, "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ConfigError(f"{command[0]} for {arch[1]} failed: {result.stderr.strip()[:2000]}")
    return read_report(result.stderr)


def read_report(text: str) -> Resources:
    """Reads what `ptxas -v` says of one kernel (and of functions that it calls)."""

    def numbers(pattern: str) -> list[int]:
        return [int(number) for number in re.findall(pattern, text)]

    registers = numbers(r"Used (\d+) registers")
    if not registers:
        raise ConfigError(f"ptxas -v reports no registers: {text.strip()[:2000]!r}")
    spills = numbers(r"(\d+) bytes spill stores") + numbers(r"(\d+) bytes spill loads")
    return Resources(max(registers), sum(spills), sum(numbers(r"(\d+) bytes smem")))
