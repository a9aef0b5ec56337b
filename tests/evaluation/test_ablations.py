"""Ablation policies against the reference; the shipped rollout refuses them."""

import msgspec
import pytest

from packforcing import Policy
from packforcing.errors import ConfigError
from packforcing.evaluation.ablations import make_rollout
from packforcing.runtime.rollout import Rollout
from packforcing.words import encode_words
from tests.helpers import ABLATIONS, PROMPT, SEED, TINY, assert_follows_reference


@pytest.mark.parametrize("policy", ABLATIONS.values(), ids=ABLATIONS.keys())
def test_an_ablation_equals_the_reference_given_the_same_history(session, reference, policy):
    config = msgspec.structs.replace(TINY, policy=policy)
    rollout = make_rollout(config, session.backend)
    rollout.begin(encode_words(PROMPT, config), 12, SEED)
    assert_follows_reference(rollout, reference(12, policy), 1e-4, 1e-4, 1e-4)


@pytest.mark.parametrize("policy", ABLATIONS.values(), ids=ABLATIONS.keys())
def test_the_shipped_rollout_refuses_an_ablation(session, policy):
    with pytest.raises(ConfigError, match="is an ablation: only 'packforcing compare'"):
        Rollout(msgspec.structs.replace(TINY, policy=policy), session.backend)


def test_the_first_step_selects_other_blocks_than_the_commit_before(reference):
    at_commit, at_step = (
        [block.read for block in reference(12, Policy(sink=1, mid=2, recent=1, selection=name))]
        for name in ("affinity", "first-step")
    )
    assert at_commit[:4] == at_step[:4]  # nothing to choose from yet
    assert at_commit[4:] != at_step[4:]
