"""What an adapter takes of an instance's memory: pages, not the bytes of its checkpoint.

A checkpoint may be in another precision, and lacks what pages add: rows up to a whole page, the empty rows of modules
that share a fused layer with one that is targeted, and what tensor-parallel workers hold each.
"""

from __future__ import annotations

from vllm_loraserve.coordinator.messages import AdapterRecord, Capacity


def rank_rows(record: AdapterRecord, capacity: Capacity) -> int:
    """Rank rows of the arena that its pages take."""
    return -(-record.rank // capacity.page_rows) * capacity.page_rows


def page_bytes(record: AdapterRecord, capacity: Capacity) -> int:
    """Bytes of its pages on all workers of the instance; those of its checkpoint where the instance does not say how
    pages are made up."""
    row = sum(
        group.row_bytes for group in capacity.page_groups if not set(group.modules).isdisjoint(record.target_modules)
    )
    return rank_rows(record, capacity) * row if row else record.size_bytes
