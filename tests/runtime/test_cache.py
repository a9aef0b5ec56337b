"""Which block is where in the context, for any policy. Without torch: aarch64 runs this too."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing import MODELS, Config, Policy
from packforcing.runtime.cache import Cache
from tests.helpers import TINY


@settings(deadline=None)  # one of the first examples may wait for a busy machine
@given(
    policy=st.builds(
        Policy,
        sink=st.integers(0, 3),
        mid=st.integers(0, 4),
        recent=st.integers(0, 3),
        mid_span=st.floats(0.5, 4),
        positions=st.sampled_from(["packed", "absolute"]),
    ),
    blocks=st.integers(0, 25),
    data=st.data(),
)
def test_cache_keeps_its_promises(policy, blocks, data):
    """For any policy and any selections: prefix, no block twice, no gap, bounded positions; also
    while recent blocks are recomputed, from what stood before them."""
    config: Config = msgspec.structs.replace(TINY, policy=policy)
    cache = Cache(config)
    at: dict[int, int] = {}  # token -> block, as a reader of the cache's answers would fill it

    def check(oldest: int, index: int) -> None:
        """The layout that block `index` reads, `oldest` being the first recent block."""
        layout = cache.layout()
        size = {
            s: config.compressed_tokens if s.compressed else config.block_tokens
            for s in layout.slots
        }
        covered = sorted(t for s in layout.slots for t in range(s.first, s.first + size[s]))
        assert covered == list(range(layout.valid)) and layout.valid <= config.context_tokens
        assert all(
            at[t] == s.block for s in layout.slots for t in range(s.first, s.first + size[s])
        )
        in_context = [slot.block for slot in layout.slots]
        assert in_context == sorted(set(in_context))
        newest = range(oldest, index)
        full = {slot.block for slot in layout.slots if not slot.compressed}
        assert full == set(newest) | set(range(min(index, policy.sink)))
        if policy.positions == "absolute":
            assert all(slot.start == slot.block * config.block_frames for slot in layout.slots)
            assert layout.start == index * config.block_frames
        else:
            ends = [
                s.start + (config.mid_span if s.compressed else config.block_frames)
                for s in layout.slots
            ]
            assert [slot.start for slot in layout.slots] + [layout.start] == [0.0, *ends]

    def put(slots: list[tuple[int, int]], size: int) -> None:
        at.update({t: block for block, first in slots for t in range(first, first + size)})

    for index in range(blocks):
        oldest = max(0, index - policy.recent)
        check(oldest, index)
        if data.draw(st.booleans()):
            before, rewound = cache.layout(), list(cache.rewind())
            assert rewound == list(range(max(policy.sink, oldest), index))
            for block in rewound:
                put(cache.mid_slots(), config.compressed_tokens)
                check(rewound[0], block)
                put([(block, cache.commit())], config.block_tokens)
            put(cache.mid_slots(), config.compressed_tokens)
            check(oldest, index)
            after = cache.layout()
            assert [s._replace(first=0) for s in after.slots] == [
                s._replace(first=0) for s in before.slots
            ]
        assert cache.compresses() == (policy.mid > 0 and index >= policy.sink)

        first = cache.commit()
        if first is not None:
            put([(index, first)], config.block_tokens)
        candidates = list(cache.candidates())
        count = min(policy.mid, len(candidates))
        chosen = data.draw(st.permutations(candidates)) if candidates else []
        put(cache.select_mids(sorted(chosen[:count])), config.compressed_tokens)
        assert sorted(cache.mids) == sorted(chosen[:count])


@pytest.mark.parametrize(
    ("name", "capacity", "sink", "by_hand"),
    [
        ("self-forcing", 21, 0, {0: [], 6: [(0, 17)], 7: [(3, 20)], 20: [(42, 59)]}),
        ("longlive", 12, 3, {3: [(0, 8)], 4: [(0, 2), (6, 11)], 20: [(0, 2), (54, 59)]}),
    ],
)  # fmt: skip
def test_rolling_windows_hold_the_published_frames(name, capacity, sink, by_hand):
    """Which frames block n reads, at their absolute positions: some by hand, and 40 blocks by
    Self-Forcing's rule, in frames: if a block does not fit, the oldest entries behind the sink
    are dropped; then it is appended, and read together with what is there."""
    config = MODELS[name]
    cache, blocks_read = Cache(config), []
    for block in range(40):
        own = [*range(3 * block, 3 * block + 3)]
        over = len(blocks_read) + 3 - capacity
        if over > 0:
            blocks_read = blocks_read[:sink] + blocks_read[sink + over :]
        layout = cache.layout()
        read = [int(slot.start) + frame for slot in layout.slots for frame in range(3)]
        assert read == blocks_read and layout.start == own[0]
        assert all(slot.start == 3 * slot.block for slot in layout.slots)
        if block in by_hand:
            spans = [range(first, last + 1) for first, last in by_hand[block]]
            assert read == [frame for span in spans for frame in span]
        blocks_read += own
        cache.commit()
