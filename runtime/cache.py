"""Keep track of which block is where in the context, without a single array.

The context is one row of tokens per layer, cut into slots: `sink` slots and `recent` slots of a
full block each, then `mid` slots of a compressed block each. The protocol, block after block:

1. `layout()` tells what the block reads: how many tokens are valid, the position of every slot,
   and the position of the block itself. All steps of the block, its commit call and its mid pass
   read exactly this; none of them changes anything here.
2. `commit()` closes the block and returns where its full keys and values go: the next sink slot,
   then the next recent slot, then over the oldest recent block. Blocks beyond the sink were
   also compressed (`compresses`), and that form is in the archive by now.
3. `select_mids(blocks)` sets the archived blocks to read next, out of `candidates()`, and returns
   the mid slots that have to be filled. A block that stays selected stays in its slot.

Between two blocks, a prompt switch may recompute the recent ones: `rewind()` takes them out, to be
committed again as in 1 and 2, oldest first. The mids stay selected, but move to right behind the
full blocks that are left: `mid_slots()` says where, after `rewind()` and after each commit. A cut
needs nothing here: it begins a new `Cache`.

Invariants:
- Sink fills before recent, and recent before mid, so the valid tokens are a prefix of the context
  and attention needs no mask.
- A block is in the context once, full or compressed.
- Slots say nothing about time; positions do. Packed positions count the sink, the selected mids in
  time order, the recent blocks and the new block without gaps. Absolute positions are each
  block's true first frame.
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
    """The bookkeeping of one video's history.

    Attributes:
        committed: Blocks so far, which is the number of the next block.
        mids: The block in each filled mid slot.
        oldest: The block that was the first to take a recent slot.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.committed = 0
        self.mids: list[int] = []
        self.oldest = config.policy.sink

    def layout(self) -> Layout:
        """Return what the current block, number `committed`, reads."""
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
        """Tell whether the current block is compressed, to outlive the recent slots."""
        return self.config.policy.mid > 0 and self.committed >= self.config.policy.sink

    def commit(self) -> int | None:
        """Close the current block.

        Returns:
            The first token of the slot for its keys and values. None: the policy has no slots for
            full blocks beyond the sink.
        """
        block = self.committed
        self.committed += 1
        keeps = block < self.config.policy.sink or self.config.policy.recent > 0
        return self._first(block) if keeps else None

    def candidates(self) -> range:
        """Return the archived blocks that may be selected: those no longer in a recent slot."""
        policy = self.config.policy
        if not policy.mid:
            return range(0)
        return range(policy.sink, max(policy.sink, self.committed - policy.recent))

    def select_mids(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """Select archived blocks to read; return (block, first token) of each slot to fill."""
        candidates = self.candidates()
        assert (
            all(block in candidates for block in blocks) and len(blocks) <= self.config.policy.mid
        )
        assert len(blocks) >= len(self.mids)  # candidates only grow, so the prefix stays whole
        entering = [block for block in blocks if block not in self.mids]
        fill = []
        for slot in range(len(blocks)):
            if slot >= len(self.mids):
                self.mids.append(-1)
            if self.mids[slot] not in blocks:
                self.mids[slot] = entering.pop()
                fill.append((self.mids[slot], self._mid_first(slot)))
        return fill

    def rewind(self) -> range:
        """Take the recent blocks out of the context, to be committed again, and return them."""
        blocks = self._recent()
        if blocks:
            self.committed = self.oldest = blocks.start
        return blocks

    def mid_slots(self) -> list[tuple[int, int]]:
        """Return (block, first token) of each mid slot."""
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
