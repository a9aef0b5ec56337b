"""Which archived blocks are read next (paper, section 3.4 and appendix G). Numpy only.

The paper scores a block by the sum over sampled queries i and its keys j of q_i . k_j / sqrt(d),
raw, without softmax. That sum is linear in both, so up to the two counts it equals the mean
query times the mean key: one pooled key per block and head ranks blocks exactly as the full
keys do, and the archive never has to be on the card.

What all queries have in common dominates that score: it adds the same to a block whatever is
asked, so a few blocks win always (the reports of `packforcing compare` show it as rows that never
end). Likeness, which is ours, asks with the newest block's own key and takes out what all keys
have in common.
"""

from __future__ import annotations

import numpy as np

from packforcing.config import Policy


def affinity(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Mean over layers and heads of mean query . mean key / sqrt(d).

    queries [L, H, d]; keys [blocks, L, H, d]. Returns one score per block.
    """
    layers, heads, d = queries.shape
    # einsum, not @: for a long archive that is threaded BLAS, whose idle threads spin on the
    # cores that the graphs need (time per block doubled from 350 archived blocks on)
    scores = np.einsum("bi,i->b", keys.reshape(len(keys), -1), queries.ravel())
    return scores / (layers * heads * d**0.5)


def likeness(key: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Cosine of a block's mean key with others', all less the mean of those others.

    key [L, H, d]; keys [blocks, L, H, d]. Returns one score per block.
    """
    rows = keys.reshape(len(keys), -1)
    mean = rows.mean(0)
    rows, asked = rows - mean, key.ravel() - mean
    lengths = np.sqrt(np.einsum("bi,bi->b", rows, rows) * np.einsum("i,i->", asked, asked))
    return np.einsum("bi,i->b", rows, asked) / np.maximum(lengths, np.finfo(np.float32).tiny)


def select(
    policy: Policy, candidates: np.ndarray, scores: np.ndarray | None, seed: int, block: int
) -> np.ndarray:
    """The block indices to read after `block` was committed, oldest first.

    candidates: indices of selectable blocks, ascending; scores: one per candidate, needed by
    all but "recency" and "random" (ties go to the newer block).
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
