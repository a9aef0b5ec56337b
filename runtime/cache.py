"""Which block sits where in the context: the history's bookkeeping, without a single array.

The context is one row of tokens per layer, cut into slots: `sink` slots and `recent` slots of a
full block each, then `mid` slots of a compressed block each. The protocol, block after block:

1. `layout()` says what the block reads: how many tokens are valid, the position of every slot
   and where the block itself begins. All steps of the block, its commit call and its mid pass
   read exactly this; none of them changes anything here.
2. `commit()` closes the block and says where its full keys and values go: the next sink slot,
   then the next recent slot, then over the oldest recent block. Blocks beyond the sink were
   also compressed (`compresses`), and that form is in the archive by now.
3. `select_mids(blocks)` names the archived blocks to read next, out of `candidates()`; it says which
   mid slots have to be filled. A block that stays selected stays where it is.

Between two blocks, a prompt switch may have the recent ones recomputed: `rewind()` takes them out
to be committed again, oldest first, as in 1 and 2. The mids stay selected, but lie right behind
the full blocks that are in: after `rewind()` and after each commit, `mid_slots()` says where. A
cut needs nothing here: it begins a new `Cache`.

What always holds: sink fills before recent, recent before mid, so the valid tokens are a prefix
and no mask is needed; a block is in the context once, full or compressed; slots say nothing
about time, positions do (packed: sink, selected mids in time order, recent, the new block, with
no gap between them; absolute: the block's true first frame).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from packforcing.config import Config


class Slot(NamedTuple):
    """A block in context."""

    block: int
    compressed: bool
    first: int  # its first token in the context
    start: float  # its temporal position, in latent frames


class Layout(NamedTuple):
    """What one block reads."""

    slots: list[Slot]
    valid: int  # tokens of context that may be read
    start: float  # temporal position of the block itself


class Cache:
    """Bookkeeping of one video's history."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.committed = 0  # blocks so far; the next block's index
        self.mids: list[int] = []  # the block in each filled mid slot
        self.oldest = config.policy.sink  # the block that was first to take a recent slot

    def layout(self) -> Layout:
        """What block number `committed` reads."""
        config, policy = self.config, self.config.policy
        full = [*range(min(self.committed, policy.sink)), *self._recent()]
        absolute = policy.positions == "absolute"
        slots, position = [], 0.0
        for block in sorted((*full, *self.mids)):
            compressed = block in self.mids
            first = self._mid_first(self.mids.index(block)) if compressed else self._first(block)
            start = float(block * config.block_frames) if absolute else position
            slots.append(Slot(block, compressed, first, start))
            position += config.mid_span if compressed else config.block_frames
        if absolute:
            position = float(self.committed * config.block_frames)
        valid = len(full) * config.block_tokens + len(self.mids) * config.compressed_tokens
        return Layout(slots, valid, position)

    def compresses(self) -> bool:
        """Whether the block in work is to be compressed: it will outlive the recent slots."""
        return self.config.policy.mid > 0 and self.committed >= self.config.policy.sink

    def commit(self) -> int | None:
        """Closes the block in work; returns the first token of the slot its keys and values go
        to, or None where the policy keeps no full block beyond the sink."""
        block = self.committed
        self.committed += 1
        keeps = block < self.config.policy.sink or self.config.policy.recent > 0
        return self._first(block) if keeps else None

    def candidates(self) -> range:
        """The archived blocks that may be read: no longer in a recent slot."""
        policy = self.config.policy
        if not policy.mid:
            return range(0)
        return range(policy.sink, max(policy.sink, self.committed - policy.recent))

    def select_mids(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """Selects archived blocks; returns (block, first token) of each slot to fill."""
        assert set(blocks) <= set(self.candidates()) and len(blocks) <= self.config.policy.mid
        assert len(blocks) >= len(self.mids)  # candidates only grow, so the prefix stays whole
        wanted = [block for block in blocks if block not in self.mids]
        fill = []
        for slot in range(len(blocks)):
            if slot >= len(self.mids):
                self.mids.append(-1)
            if self.mids[slot] not in blocks:
                self.mids[slot] = wanted.pop()
                fill.append((self.mids[slot], self._mid_first(slot)))
        return fill

    def rewind(self) -> range:
        """Takes the recent blocks out of the context, as if they were still to be committed;
        returns them."""
        blocks = self._recent()
        if blocks:
            self.committed = self.oldest = blocks.start
        return blocks

    def mid_slots(self) -> list[tuple[int, int]]:
        """(block, first token) of each mid slot."""
        return [(block, self._mid_first(slot)) for slot, block in enumerate(self.mids)]

    def _recent(self) -> range:
        oldest = max(self.oldest, self.committed - self.config.policy.recent)
        return range(oldest, max(oldest, self.committed))

    def _first(self, block: int) -> int:
        policy = self.config.policy
        slot = block
        if block >= policy.sink:
            slot = policy.sink + (block - self.oldest) % policy.recent
        return slot * self.config.block_tokens

    def _mid_first(self, slot: int) -> int:
        full = min(self.committed, self.config.policy.sink) + len(self._recent())
        return full * self.config.block_tokens + slot * self.config.compressed_tokens
