"""The demo model's text encoder."""

import msgspec
import pytest

from packforcing import model_config
from packforcing.errors import PromptError
from packforcing.words import VOCABULARY, encode_words

WAN = model_config("wan-1.3b")


def test_prompts_become_one_hot_rows_in_any_order():
    config = model_config("demo")
    first = encode_words("A red star, over the NAVY stripes!", config)
    assert first.shape == (1, config.text_len, config.text_dim) and first.sum() == 4
    names = [VOCABULARY[i] for i in first[0].argmax(1)[:4]]
    assert names == ["red", "star", "navy", "stripes"] and not first[0, 4:].any()
    swapped = encode_words("navy stripes red star", config)
    assert {row.tobytes() for row in first[0]} == {row.tobytes() for row in swapped[0]}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red stra over navy stripes", "'stra' .did you mean 'star'"),
        ("a red star over navy zzz", "does not know 'zzz'"),
        ("", "names nothing"),
        ("over the", "names nothing"),
        ("red " * 9, "9 words; at most 8"),
    ],
)
def test_prompts_the_model_cannot_read_are_explained(prompt, message):
    with pytest.raises(PromptError, match=message):
        encode_words(prompt, model_config("demo"))


def test_a_model_without_channels_for_places_does_not_know_them():
    old = msgspec.structs.replace(model_config("demo"), text_dim=22)
    rows = encode_words("a red star at the harbor", model_config("demo"))
    assert VOCABULARY[rows[0, 2].argmax()] == "harbor"
    with pytest.raises(PromptError, match=r"does not know 'harbor'; [^\d]*pattern \([^)]*\)$"):
        encode_words("a red star at the harbor", old)


def test_other_encoders_are_not_faked():
    with pytest.raises(PromptError, match="umt5-xxl"):
        encode_words("a red star", WAN)
