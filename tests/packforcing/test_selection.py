"""The scores of archived blocks and the selection by them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from packforcing import Policy
from packforcing.selection import affinity, select


def test_pooled_score_is_the_papers_double_sum():
    """Equation 11: raw scaled logits of all query-key pairs, summed; here as means."""
    rng = np.random.default_rng(0)
    layers, heads, d, n, keys_each = 2, 3, 8, 20, 5
    q = rng.standard_normal((layers, heads, n, d))
    k = rng.standard_normal((4, layers, heads, keys_each, d))
    double_sum = np.zeros(4)
    for m in range(4):
        for layer in range(layers):
            for head in range(heads):
                for i in range(n):
                    for j in range(keys_each):
                        double_sum[m] += q[layer, head, i] @ k[m, layer, head, j] / np.sqrt(d)
    pooled = affinity(q.mean(2), k.mean(3))
    np.testing.assert_allclose(pooled * layers * heads * n * keys_each, double_sum)


@given(
    st.lists(st.floats(-1, 1, allow_nan=False), min_size=0, max_size=30),
    st.integers(1, 10),
    st.sampled_from(["affinity", "recency", "random"]),
)
def test_selection_is_the_best_in_time_order(scores, mid, selection):
    policy = Policy(sink=1, mid=mid, recent=1, selection=selection)
    candidates = np.arange(1, 1 + len(scores))
    chosen = select(policy, candidates, np.array(scores), seed=5, block=7)
    assert len(chosen) == min(mid, len(scores))
    assert list(chosen) == sorted(set(chosen)) and set(chosen) <= set(candidates)
    if selection == "affinity" and len(chosen):
        left = [s for c, s in zip(candidates, scores) if c not in chosen]
        assert not left or max(left) <= min(scores[c - 1] for c in chosen)
    if selection == "recency":
        assert list(chosen) == list(candidates[len(candidates) - len(chosen) :])
    again = select(policy, candidates, np.array(scores), seed=5, block=7)
    assert np.array_equal(chosen, again)
