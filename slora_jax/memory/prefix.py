"""The prefix cache: full KV pages keyed by adapter and tokens, shared by requests with a common prefix.

The KV before the first token that an activated LoRA acts on is the base model's. Its pages are in the base model's
tree, and the adapter's own pages branch off there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from slora_jax.errors import PoolError
from slora_jax.memory.allocator import DUMMY_PAGE, PageKind
from slora_jax.memory.eviction import Evictable, Evictor


class PrefixNode(Evictable):
    """One page of a prefix tree: the KV of the tokens in `block`, which follow the blocks of its ancestors.

    Attributes:
      block: `page_size` int32 token ids, as bytes; of a page in another model's tree, with a key before them.
      page: page id.
      users: running requests that hold this node or a descendant.
      depth: number of pages from the first token through this one; 0 for a root, which has no page.
      parent: parent node; a root is its own parent.
      top: ancestor of depth 1.
    """

    __slots__ = ("block", "children", "depth", "digest", "page", "parent", "top", "users")

    def __init__(self, parent: PrefixNode | None, digest: str | None, block: bytes, page: int) -> None:
        super().__init__(kind=PageKind.PREFIX, num_pages=1, uses=1)
        self.digest = digest
        self.block = block
        self.page = page
        self.children: dict[bytes, PrefixNode] = {}
        self.users = 1
        self.parent: PrefixNode = self if parent is None else parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.top: PrefixNode = self if self.depth < 2 else self.parent.top

    def path(self) -> Iterator[PrefixNode]:
        """Yields this node and its ancestors without the root, deepest first."""
        node = self
        while node.depth:
            yield node
            node = node.parent


class PrefixCache:
    """One tree of full KV pages per adapter digest (None for the base model).

    An edge is a block of exactly `page_size` token ids. Blocks are compared in full, not by hash, so prefixes cannot
    collide. Tokens are passed as the bytes of int32 ids (`Request.token_bytes`). A request holds the deepest node of
    its path. Pages that no request holds stay in the pool as idle content until the evictor needs them, leaves first.

    Arguments `start` are the position of the first token that the adapter acts on.

    Attributes:
      page_size: tokens per page.
      in_use: `[num_pages]`, 1 for each prefix page that a running request holds.
    """

    def __init__(self, evictor: Evictor, page_size: int) -> None:
        self.evictor = evictor
        self.page_size = page_size
        self._block_bytes = page_size * np.dtype(np.int32).itemsize
        self._roots: dict[str | None, PrefixNode] = {}
        self._branches: dict[str, dict[PrefixNode, None]] = {}  # pages of an adapter in the base model's tree
        self.in_use = bytearray(evictor.allocator.num_pages)
        evictor.register(PageKind.PREFIX, self._evict)

    def match(self, digest: str | None, tokens: bytes, most: int, start: int = 0) -> PrefixNode | None:
        """Returns the deepest node that matches a prefix of `tokens`, at most `most` pages deep; None if none does."""
        node = self._roots.get(None if start else digest)
        if node is None:
            return None
        size = self._block_bytes
        for at in range(0, min(most * size, len(tokens) - size + 1), size):
            child = node.children.get(self._key(digest, start, tokens[at : at + size], node.depth))
            if child is None:
                break
            node = child
        return node if node.depth else None

    def idle_pages(self, node: PrefixNode | None) -> int:
        """Number of idle pages on the node's path; acquiring the node makes them unevictable."""
        count = 0
        while node is not None and node.depth and not node.users:
            count += 1
            node = node.parent
        return count

    def acquire(self, node: PrefixNode) -> list[int]:
        """Marks a node and its ancestors as used by one more request. Returns their pages in token order."""
        pages = []
        for held in node.path():
            if not held.users:
                self.evictor.remove(held)
                self.in_use[held.page] = 1
            held.users += 1
            held.uses += 1
            pages.append(held.page)
        self.evictor.counters.prefix_hit_tokens += node.depth * self.page_size
        pages.reverse()
        return pages

    def extend(
        self, node: PrefixNode | None, digest: str | None, tokens: bytes, pages: Sequence[int], start: int = 0
    ) -> PrefixNode | None:
        """Registers KV pages of a running request below `node`, and returns the deepest node that it now holds.

        Stops at the first block that is already registered with another page.

        Args:
          node: the node that the request holds, or None.
          digest: its adapter's digest.
          tokens: its tokens from the first one on; those after the node's blocks are the contents of `pages`.
          pages: page ids of full pages, in token order.
        """
        if not pages:
            return node
        root = None if start else digest
        first = parent = node or self._roots.setdefault(root, PrefixNode(None, root, b"", DUMMY_PAGE))
        size = self._block_bytes
        at = first.depth * size
        for page in pages:
            block = self._key(digest, start, tokens[at : at + size], parent.depth)
            if block in parent.children:
                break
            is_branch = len(block) > size
            child = PrefixNode(parent, digest if is_branch else root, block, page)
            if is_branch:
                assert digest is not None
                self._branches.setdefault(digest, {})[child] = None
            self.in_use[page] = 1
            parent.children[block] = child
            parent = child
            at += size
        count = parent.depth - first.depth
        self.evictor.allocator.convert(np.array(pages[:count], np.int32), PageKind.PREFIX)
        return parent if parent.depth else None

    def release(self, node: PrefixNode) -> None:
        """Ends one request's use of a node and its ancestors. Raises PoolError if no request holds the node."""
        if not node.users:
            raise PoolError(f"release of a prefix of {node.depth} pages: it is not in use")
        for held in node.path():
            held.users -= 1
            if not held.users:
                self.in_use[held.page] = 0
                self.evictor.add(held, exposed=not held.children)

    def forget(self, node: PrefixNode | None, keep: int) -> None:
        """Evicts a node and its ancestors deeper than `keep`, whose pages were never written, if idle and present."""
        for gone in node.path() if node is not None else ():
            if gone.depth > keep and gone.idle and gone.parent.children.get(gone.block) is gone:
                self.evictor.evict(gone)

    def drop(self, digest: str | None) -> None:
        """Evicts all idle pages of one adapter, after it is unloaded."""
        branches = [] if digest is None else sorted(self._branches.get(digest, {}), key=lambda node: node.depth)
        for node in reversed(self._nodes(digest) + branches):
            if node.idle:
                self.evictor.evict(node)

    def pages(self) -> np.ndarray:
        """Page ids of all nodes, int32."""
        return np.array([node.page for digest in self._roots for node in self._nodes(digest)], np.int32)

    def check(self, held: Sequence[PrefixNode]) -> None:
        """Checks every node's user count and the number of idle pages.

        Args:
          held: deepest node of each running request that holds one.

        Raises:
          PoolError: a node's users disagree with `held`, or the idle pages with the evictor's.
        """
        users: dict[PrefixNode, int] = {}
        for node in (node for deepest in held for node in deepest.path()):
            users[node] = users.get(node, 0) + 1
        nodes = [node for digest in self._roots for node in self._nodes(digest)]
        for node in nodes:
            count = users.pop(node, 0)
            if (node.users, node.idle, node.exposed) != (count, not count, not count and not node.children):
                raise PoolError(
                    f"prefix page {node.page}: {count} requests hold it, its users={node.users}, idle={node.idle}, "
                    f"exposed={node.exposed}, children={len(node.children)}"
                )
        if users:
            raise PoolError(f"requests hold {len(users)} prefix pages that are not in the cache")
        idle = sum(node.idle for node in nodes)
        if idle != self.evictor.pages(PageKind.PREFIX):
            raise PoolError(f"{idle} prefix pages are idle; the evictor counts {self.evictor.pages(PageKind.PREFIX)}")

    def _key(self, digest: str | None, start: int, block: bytes, depth: int) -> bytes:
        """The key of the page after `depth` pages: its tokens, and what distinguishes it from the tree's own pages."""
        if not start or depth < start // self.page_size:
            return block
        return f"{digest} from {start} ".encode() + block

    def _nodes(self, digest: str | None) -> list[PrefixNode]:
        """All nodes of one digest's tree, parents before children."""
        root = self._roots.get(digest)
        nodes = [] if root is None else list(root.children.values())
        for node in nodes:  # the list grows during the loop
            nodes += node.children.values()
        return nodes

    def _evict(self, node: Evictable) -> None:
        assert isinstance(node, PrefixNode)
        parent = node.parent
        del parent.children[node.block]
        self.evictor.allocator.free_page(node.page)
        self.evictor.counters.prefix_evictions += 1
        if len(node.block) > self._block_bytes:
            assert node.digest is not None
            branches = self._branches[node.digest]
            del branches[node]
            if not branches:
                del self._branches[node.digest]
        if not parent.children:
            if not parent.depth:
                del self._roots[parent.digest]
            elif parent.idle:
                self.evictor.expose(parent)
