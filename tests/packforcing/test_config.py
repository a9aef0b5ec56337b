"""Configs, policies and presets: what is refused, and what the derived sizes are."""

import msgspec
import pytest

from packforcing import Policy
from packforcing.config import WORD_COUNT
from packforcing.errors import ConfigError
from packforcing.presets import model_config
from packforcing.words import VOCABULARY

WAN = model_config("wan-1.3b")


def test_the_words_encoder_has_one_channel_per_word():
    assert len(set(VOCABULARY)) == WORD_COUNT
    with pytest.raises(ConfigError, match=f"text_dim of at least {WORD_COUNT}"):
        msgspec.structs.replace(model_config("demo"), text_dim=WORD_COUNT - 1).__post_init__()


def test_full_history_has_as_many_slots_as_the_video_has_earlier_blocks():
    full = Policy(sink=0, mid=0, recent=1_000_000)
    own = Policy(sink=1, mid=6, recent=2)
    assert full.fit_to_video(50, own).recent == 49
    assert full.fit_to_video(1, own).recent == own.recent
    assert own.fit_to_video(50, own) == own


def test_full_resolution_blocks_are_the_first_and_the_latest():
    policy = Policy(sink=2, mid=4, recent=3)
    for block in range(40):
        sink, recent = policy.full_resolution_blocks(block)
        earlier = list(range(block))
        assert list(sink) == earlier[:2]
        assert list(recent) == earlier[2:][-3:]
