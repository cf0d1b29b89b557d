"""The CUDA graph of a compiled program: which kernel waits for which, read from XLA's log."""

from __future__ import annotations

import re
from dataclasses import dataclass

LOG = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "command_executor=3"}
"""Environment of a process that compiles one program, so that XLA logs the program's graph to stderr."""


@dataclass(frozen=True)
class Node:
    """A command of the graph. name: the kernel's, or "kCustomCall". after: the commands that it waits for."""

    name: str
    after: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """nodes: in the order of the schedule. is_sequential: whether each waits for the one before."""

    nodes: tuple[Node, ...]
    is_sequential: bool

    def ancestors(self, node: int) -> set[int]:
        """Returns the commands that must have ended before `node` starts."""
        found: set[int] = set()
        waiting = [node]
        while waiting:
            new = set(self.nodes[waiting.pop()].after) - found
            found |= new
            waiting += new
        return found


def read_graph(log: str) -> Graph:
    """Reads the log of a process with the environment `LOG` that compiled one program with one command buffer.

    Raises:
      ValueError: the log does not have exactly one graph, or not one command for each of its nodes.
    """
    graphs = re.findall(r"Execution graph: .*is_sequential=(true|false)", log)
    names = re.findall(r"command_executor\.cc:\d+\] (\S+) .*resources=\[", log)
    edges = re.findall(r"^node \d+ .*: in=\[(.*)\] out=", log, re.MULTILINE)
    if len(graphs) != 1 or len(names) != len(edges):
        raise ValueError(f"{len(graphs)} graphs, {len(names)} commands, {len(edges)} nodes in XLA's log")
    nodes = [Node(n, tuple(map(int, re.findall(r"id: (\d+)", e)))) for n, e in zip(names, edges, strict=True)]
    return Graph(tuple(nodes), graphs[0] == "true")
