"""Select the archived blocks to read next (paper, section 3.4 and appendix G). NumPy only.

The paper scores a block by the sum over sampled queries i and its keys j of q_i . k_j / sqrt(d),
without softmax. The sum is linear in both, so up to the two counts it equals the mean query times
the mean key: one pooled key per block and head ranks blocks exactly as the full keys do, and the
archive never has to be on the GPU.

The component that all queries share dominates that score. It adds the same amount to a block for
every query, so that a few blocks are always selected (the reports of `packforcing compare` show
them as rows that never end). Likeness, which is not from the paper, uses the newest block's own
key as the query and subtracts the mean of all keys.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from packforcing.config import Policy


def affinity(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Score blocks by the mean over layers and heads of mean query . mean key / sqrt(d).

    Args:
        queries: Mean query of the block just committed, [L, H, d].
        keys: Mean keys of the candidates, [blocks, L, H, d].

    Returns:
        One score per candidate.
    """
    layers, heads, d = queries.shape
    # einsum, not @: for a long archive @ is threaded BLAS, whose idle threads spin on the cores
    # that the graphs need (time per block doubled from 350 archived blocks on)
    scores = np.einsum("bi,i->b", keys.reshape(len(keys), -1), queries.ravel())
    return scores / (layers * heads * d**0.5)


def likeness(key: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Score blocks by the cosine of their mean key with another block's, both centered.

    Args:
        key: Mean key of the newest block, [L, H, d].
        keys: Mean keys of the candidates, [blocks, L, H, d]; their mean is the center.

    Returns:
        One score per candidate.
    """
    rows = keys.reshape(len(keys), -1)
    mean = rows.mean(0)
    rows, query = rows - mean, key.ravel() - mean
    lengths = np.sqrt(np.einsum("bi,bi->b", rows, rows) * np.einsum("i,i->", query, query))
    return np.einsum("bi,i->b", rows, query) / np.maximum(lengths, np.finfo(np.float32).tiny)


def select(
    policy: Policy, candidates: np.ndarray, scores: np.ndarray | None, seed: int, block: int
) -> np.ndarray:
    """Select the blocks to read after `block` was committed.

    Args:
        policy: How many blocks, and by which rule.
        candidates: Indices of the selectable blocks, ascending.
        scores: One per candidate; not read by "recency" and "random". Of equal scores, the newer
            block's wins.
        seed: Of the video, for "random".
        block: Index of the block just committed, for "random".

    Returns:
        Block indices, ascending.
    """
    count = min(policy.mid, len(candidates))
    if count == len(candidates) or policy.selection == "recency":
        return candidates[len(candidates) - count :]
    if policy.selection == "random":
        rng = np.random.Generator(
            np.random.Philox(key=np.array([seed, 1], np.uint64), counter=[0, 0, 0, block])
        )
        return np.sort(rng.choice(candidates, count, replace=False))
    assert scores is not None
    return np.sort(candidates[np.argsort(scores, kind="stable")[len(candidates) - count :]])


def selects_at_first_step(policy: Policy, switched: bool) -> bool:
    """Tell whether a block selects mid blocks again, by the mean query of its first step.

    The paper does so for every block. Here the selection is made while the block before is
    committed, so that the upload is done when the next block begins; its queries cannot know a
    prompt that is new, however.

    Args:
        policy: The policy.
        switched: Whether the block is the first that follows another prompt.
    """
    return policy.selection == "first-step" or (policy.selection == "affinity" and switched)


def evict(blocks: Sequence[int], needed: Collection[int]) -> int:
    """Choose the block that a full archive gives up: the one that leaves the smallest gap.

    The archive so thins out evenly: what it holds spans the whole past, ever more coarsely. Of
    equal gaps the older one is closed. The first block is never given up.

    Args:
        blocks: The stored blocks, ascending.
        needed: Blocks that are not given up; fewer than there are blocks.

    Returns:
        A block out of `blocks`.
    """
    gaps = {
        after - before: block
        for before, block, after in reversed([*zip(blocks, blocks[1:], blocks[2:])])
        if block not in needed
    }
    if gaps:
        return gaps[min(gaps)]
    return next(block for block in blocks if block not in needed)
