"""Which tensors of the experts lie in one segment, and where in it: decided from digests and sizes alone.

Equal tensors belong to the set of experts that hold them. What belongs to one and the same set is one shared segment,
so that a trunk that fifty fine-tunes froze is stored, read and resident once, whatever else they do not share. Tensors
are known by their content: neither names nor architectures matter. This module reads and writes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes. What CUDA wants of a bound slice; the CPU's 64 divide it."""
PAGE = 4096
LEAST_SHARED_BYTES = 64 << 10
"""What fewer bytes would save is stored twice: a segment costs a file, a mapping and a read of its own."""
MOST_SHARED = 6
"""Shared segments per expert. Experts that froze their trunks at every depth would otherwise have one per layer."""

Recipe = tuple[str, ...]
"""A segment as the digests of its tensors in the order in which they lie in it. Equal recipes are equal bytes."""


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of one tensor."""

    sha256: str
    bytes: int


def recipes(experts: Mapping[str, Sequence[Content]]) -> dict[str, tuple[Recipe, ...]]:
    """The segments of each expert, its private one first; together they hold each of its tensors once.

    What would save most is shared first. An expert that has enough shared segments keeps the rest to itself.
    """
    holders, place, size = defaultdict[str, set[str]](set), dict[str, int](), dict[str, int]()
    for expert, tensors in experts.items():
        for number, tensor in enumerate(tensors):
            holders[tensor.sha256].add(expert)
            size[tensor.sha256] = tensor.bytes
            place[tensor.sha256] = min(number, place.get(tensor.sha256, number))
    groups = defaultdict[frozenset[str], list[str]](list)
    for digest in sorted(holders, key=lambda digest: (place[digest], digest)):
        if len(holders[digest]) > 1:
            groups[frozenset(holders[digest])].append(digest)
    weights = {group: sum(size[digest] for digest in digests) for group, digests in groups.items()}
    shared: dict[str, list[Recipe]] = {expert: [] for expert in experts}
    for group in sorted(groups, key=lambda group: (-weights[group] * (len(group) - 1), groups[group])):
        takers = [expert for expert in group if len(shared[expert]) < MOST_SHARED]
        if len(takers) > 1 and weights[group] >= LEAST_SHARED_BYTES:
            for expert in takers:
                shared[expert].append(tuple(groups[group]))
    return {expert: _with_private(tensors, shared[expert]) for expert, tensors in experts.items()}


def _with_private(tensors: Sequence[Content], shared: Sequence[Recipe]) -> tuple[Recipe, ...]:
    elsewhere = {digest for recipe in shared for digest in recipe}
    private = tuple(dict.fromkeys(t.sha256 for t in tensors if t.sha256 not in elsewhere))
    return (private, *shared) if private or not shared else tuple(shared)


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes lie in a segment, and the segment's size in whole pages (at least one)."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(_rounded_up(end, ALIGNMENT))
        end = offsets[-1] + size
    return offsets, max(_rounded_up(end, PAGE), PAGE)


def _rounded_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
