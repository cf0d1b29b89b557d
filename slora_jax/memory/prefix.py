"""The prefix cache: full pages of keys and values, by adapter and tokens, shared by all requests that begin alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from slora_jax.errors import PoolError
from slora_jax.memory.allocator import DUMMY_PAGE, PageKind
from slora_jax.memory.eviction import Evictable, Evictor


class PrefixNode(Evictable):
    """One page of a tree of prefixes: the keys and values of `block` after those of all its ancestors.

    users: running requests that hold this page, so all that hold one of its descendants: never fewer than any child
    has. depth: pages from the first token to this one; 0 for a root, which has no page, and is its own parent. top:
    the ancestor of depth 1.
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
        """This node and its ancestors, the deepest first, without the root."""
        node = self
        while node.depth:
            yield node
            node = node.parent


class PrefixCache:
    """Which full pages of keys and values lie in the pool, by adapter content (digest, None for the base model) and by
    the tokens from the first one on.

    A tree per digest. An edge is a block of exactly `page_size` token ids: int32, as bytes, compared in full, so no two
    prefixes are ever taken for one another. Tokens are passed as such bytes (`Request.token_bytes`). A request holds
    the deepest node of its path; pages that no request holds stay, idle, until their room is wanted, leaves first, and
    compete with idle adapters as the evictor's policy says.
    """

    def __init__(self, evictor: Evictor, page_size: int) -> None:
        self.evictor = evictor
        self.page_size = page_size
        self._block_bytes = page_size * np.dtype(np.int32).itemsize
        self._roots: dict[str | None, PrefixNode] = {}
        self.in_use = bytearray(evictor.allocator.num_pages)
        """By page: 1 while running requests hold it as a prefix."""
        evictor.register(PageKind.PREFIX, self._evict)

    def match(self, digest: str | None, tokens: bytes, most: int) -> PrefixNode | None:
        """The deepest node whose tokens these begin with, at most `most` pages deep. Changes nothing."""
        node = self._roots.get(digest)
        if node is None:
            return None
        size = self._block_bytes
        for at in range(0, min(most * size, len(tokens) - size + 1), size):
            child = node.children.get(tokens[at : at + size])
            if child is None:
                break
            node = child
        return node if node.depth else None

    def idle_pages(self, node: PrefixNode | None) -> int:
        """How many pages of its path nobody holds: those stop being evictable when it is acquired."""
        count = 0
        while node is not None and node.depth and not node.users:
            count += 1
            node = node.parent
        return count

    def acquire(self, node: PrefixNode) -> list[int]:
        """Takes a node and all its ancestors into use. Returns their pages, the first token's first."""
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
        self, node: PrefixNode | None, digest: str | None, tokens: bytes, pages: Sequence[int]
    ) -> PrefixNode | None:
        """Registers `pages` (KV pages of a request that holds `node`, None: nothing yet), which hold the blocks of
        `tokens` that follow the node's, as held by this request. Returns the deepest node, which it holds from now on.

        Stops at a block that is registered already, with the same contents in another page.
        """
        if not pages:
            return node
        first = parent = node or self._roots.setdefault(digest, PrefixNode(None, digest, b"", DUMMY_PAGE))
        size = self._block_bytes
        at = first.depth * size
        for page in pages:
            block = tokens[at : at + size]
            if block in parent.children:
                break
            child = PrefixNode(parent, digest, block, page)
            self.in_use[page] = 1
            parent.children[block] = child
            parent = child
            at += size
        count = parent.depth - first.depth
        self.evictor.allocator.convert(np.array(pages[:count], np.int32), PageKind.PREFIX)
        return parent if parent.depth else None

    def release(self, node: PrefixNode) -> None:
        """Ends one request's use of a node and its ancestors, the deepest first.

        Raises:
          PoolError: nobody holds it.
        """
        if not node.users:
            raise PoolError(f"release of a prefix of {node.depth} pages, which is not in use")
        for held in node.path():
            held.users -= 1
            if not held.users:
                self.in_use[held.page] = 0
                self.evictor.add(held, exposed=not held.children)

    def forget(self, node: PrefixNode | None, keep: int) -> None:
        """Evicts this idle node and its ancestors, but for the first `keep` pages: they were never written. Nodes that
        are gone already are passed over."""
        for gone in node.path() if node is not None else ():
            if gone.depth > keep and gone.idle and gone.parent.children.get(gone.block) is gone:
                self.evictor.evict(gone)

    def drop(self, digest: str | None) -> None:
        """Evicts all that is idle of one adapter's content (after an unload)."""
        for node in reversed(self._nodes(digest)):
            if node.idle:
                self.evictor.evict(node)

    def pages(self) -> np.ndarray:
        """All pages of the cache: int32."""
        return np.array([node.page for digest in self._roots for node in self._nodes(digest)], np.int32)

    def check(self, held: Sequence[PrefixNode]) -> None:
        """Compares the numbers of users with the nodes that running requests hold, and the idle pages with the
        evictor's.

        Raises:
          PoolError: they disagree.
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
            raise PoolError(f"{idle} prefix pages are idle, the evictor has {self.evictor.pages(PageKind.PREFIX)}")

    def _nodes(self, digest: str | None) -> list[PrefixNode]:
        """Of one digest, parents before their children."""
        root = self._roots.get(digest)
        nodes = [] if root is None else list(root.children.values())
        for node in nodes:  # grows on the way
            nodes += node.children.values()
        return nodes

    def _evict(self, node: Evictable) -> None:
        assert isinstance(node, PrefixNode)
        parent = node.parent
        del parent.children[node.block]
        self.evictor.allocator.free_page(node.page)
        self.evictor.counters.prefix_evictions += 1
        if not parent.children:
            if not parent.depth:
                del self._roots[parent.digest]
            elif parent.idle:
                self.evictor.expose(parent)
