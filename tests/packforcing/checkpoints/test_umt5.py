"""Embeddings from UMT5, against transformers."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from packforcing.embeddings import Embedding, load_embedding, save_embedding
from packforcing.errors import CheckpointError, ConfigError, PromptError, PromptWarning
from packforcing.presets import model_config
from tests.helpers import assert_refused, run, umt5_bundle

MAX_TOKENS = 512  # that Wan reads


@pytest.fixture(autouse=True)
def no_cache_of_others(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved_umt5(tmp_path_factory) -> Path:
    """A random UMT5 of two layers, as wide as the demo model reads, and a tokenizer of letters, as
    transformers saves them."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("ftfy")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("umt5")
    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxyz&'"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, ("▁fox", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=len(pieces), d_model=model_config("demo").text_dim, d_kv=8, d_ff=48,
        num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformers.UMT5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def umt5(saved_umt5, tmp_path) -> Path:
    """The same, to damage."""
    return Path(shutil.copytree(saved_umt5, tmp_path / "umt5"))


def encode(prompt: str, folder: Path, weights: str = "bf16", **options) -> Embedding:
    from packforcing.checkpoints.umt5 import encode_umt5

    return encode_umt5([prompt], folder, weights, **options)[0]


def wan_clean(prompt: str) -> str:
    """`whitespace_clean(basic_clean(prompt))` of Wan2.1's tokenizers.py, whose \\s is regex's."""
    import html

    import ftfy
    import regex

    basic = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return regex.sub(r"\s+", " ", basic).strip()


def wan_rows(folder: Path, prompt: str) -> np.ndarray:
    """All 512 rows as Wan makes them: cut and padded to 512 tokens, masked in the encoder, zeroed
    after it (`HuggingfaceTokenizer` and `T5EncoderModel` of Wan2.1)."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
    read = tokenizer(wan_clean(prompt), **options, add_special_tokens=True, return_tensors="pt")
    with torch.no_grad():
        rows = UMT5EncoderModel.from_pretrained(folder).eval()(**read).last_hidden_state
    return (rows * read.attention_mask[..., None])[0].numpy()


def test_the_encoder_gives_wans_rows(umt5):
    made = encode("  the fox\n runs &amp;amp; a fox\u2019s ", umt5, "fp32")
    expected = wan_rows(umt5, "  the fox\n runs &amp;amp; a fox\u2019s ")
    assert made.prompt == "the fox runs & a fox's"
    tokens = len(made.text)
    assert 10 < tokens < 40 and expected[tokens - 1].any() and not expected[tokens:].any()
    np.testing.assert_allclose(made.text, expected[:tokens], rtol=0, atol=1e-4)


def test_encode_prompt_writes_what_the_encoder_says_in_bfloat16(umt5, tmp_path):
    out = tmp_path / "fox.safetensors"
    result = run("encode-prompt", "a fox", "--encoder", umt5, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    output, read = json.loads(result.stdout), load_embedding(out)
    assert output["tokens"] == len(read.text) == 4  # ▁ a ▁fox </s>
    assert output["width"] == model_config("demo").text_dim
    assert (read.prompt, read.encoder) == ("a fox", "umt5")
    assert len(read.encoder_sha256) == 64 and output["encoder_sha256"] == read.encoder_sha256
    exact = torch.from_numpy(read.text)
    assert torch.equal(exact.bfloat16().float(), exact)
    np.testing.assert_allclose(read.text, wan_rows(umt5, "a fox")[:4], rtol=0, atol=0.05)


def test_the_layout_of_diffusers_gives_the_same(umt5, tmp_path):
    wan = tmp_path / "wan"
    shutil.copytree(umt5, wan / "text_encoder", ignore=shutil.ignore_patterns("tokenizer*"))
    (wan / "tokenizer").mkdir()
    for file in umt5.glob("tokenizer*"):
        shutil.copy(file, wan / "tokenizer")
    one, other = encode("a fox", umt5), encode("a fox", wan)
    np.testing.assert_array_equal(one.text, other.text)
    assert one.encoder_sha256 == other.encoder_sha256


def test_a_sharded_encoder_gives_the_same_and_needs_every_shard(umt5):
    from transformers import UMT5EncoderModel

    whole = encode("a fox", umt5)
    model = UMT5EncoderModel.from_pretrained(umt5)
    (umt5 / "model.safetensors").unlink()
    model.save_pretrained(umt5, max_shard_size="20KB")
    shards = sorted(umt5.glob("model-*.safetensors"))
    assert len(shards) > 1
    np.testing.assert_array_equal(encode("a fox", umt5).text, whole.text)
    shards[-1].unlink()
    with pytest.raises(CheckpointError, match=shards[-1].name):
        encode("a fox", umt5)


def test_the_help_names_the_memory_of_umt5_xxl():
    model = umt5_xxl()
    count = sum(tensor.numel() for tensor in model.parameters())
    linear = sum(
        part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear)
    )
    output = run("encode-prompt", "--help").output
    assert count == 5_680_910_336  # Wan's
    assert f"{2 * count / 1e9:.1f} GB of memory, {(2 * count - linear) / 1e9:.1f} GB with" in (
        " ".join(output.split())
    )


def umt5_xxl():
    """The real encoder, without memory for it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.UMT5EncoderModel(config)


# Wan's own file


def wan_shapes(dim=4096, ffn=10240, heads=64, kv=64, layers=24, words=256384):
    """The tensors of Wan's UMT5, written down from its public definition."""
    shapes = {"token_embedding.weight": (words, dim), "norm.weight": (dim,)}
    for layer in range(layers):
        block = f"blocks.{layer}"
        shapes |= {f"{block}.norm{number}.weight": (dim,) for number in (1, 2)}
        shapes |= {f"{block}.attn.{name}.weight": (heads * kv, dim) for name in "qkv"}
        shapes[f"{block}.attn.o.weight"] = (dim, heads * kv)
        shapes |= {f"{block}.ffn.{name}.weight": (ffn, dim) for name in ("gate.0", "fc1")}
        shapes[f"{block}.ffn.fc2.weight"] = (dim, ffn)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (32, heads)
    return shapes


@pytest.fixture
def wan(saved_umt5, tmp_path) -> Path:
    """The same encoder in a folder like that of Wan2.1, in float32."""
    from packforcing.checkpoints.umt5 import WAN_FILE, WAN_TOKENIZER

    theirs = load_file(saved_umt5 / "model.safetensors")
    words, dim = theirs["shared.weight"].shape
    shapes = wan_shapes(dim, ffn=48, heads=4, kv=8, layers=2, words=words)
    tensors = {"norm.weight": theirs.pop("encoder.final_layer_norm.weight")}
    for name in shapes:
        where = name
        for wans, other in (
            ("token_embedding", "shared"), ("blocks.", "encoder.block."),
            ("norm1", "layer.0.layer_norm"), ("norm2", "layer.1.layer_norm"),
            ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
            ("attn", "layer.0.SelfAttention"), ("ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
            ("ffn.fc1", "layer.1.DenseReluDense.wi_1"), ("ffn.fc2", "layer.1.DenseReluDense.wo"),
        ):  # fmt: skip
            where = where.replace(wans, other)
        if name != "norm.weight":
            tensors[name] = theirs.pop(where)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert not set(theirs) - {"encoder.embed_tokens.weight"}
    folder = tmp_path / "wan"
    (folder / WAN_TOKENIZER).mkdir(parents=True)
    for file in saved_umt5.glob("tokenizer*"):
        shutil.copy(file, folder / WAN_TOKENIZER)
    torch.save(tensors, folder / WAN_FILE)
    return folder


def test_wans_own_file_gives_the_same(wan, saved_umt5):
    one, other = encode("a fox", wan, "fp32"), encode("a fox", saved_umt5, "fp32")
    np.testing.assert_array_equal(one.text, other.text)


def test_wans_names_at_full_size_are_those_of_transformers():
    pytest.importorskip("ftfy")
    from packforcing.checkpoints.umt5 import TIED, transformers_name

    named = {transformers_name(name): shape for name, shape in wan_shapes().items()}
    expected = {name: tuple(tensor.shape) for name, tensor in umt5_xxl().state_dict().items()}
    del expected[TIED]
    assert named == expected and len(named) == 242


def test_wans_own_file_is_read_without_running_it(wan):
    from packforcing.checkpoints.umt5 import WAN_FILE

    path = wan / WAN_FILE
    whole = torch.load(path, weights_only=True)
    torch.save({name: tensor for name, tensor in whole.items() if "fc1" not in name}, path)
    with pytest.raises(CheckpointError, match=r"2 missing.*block.0.layer.1.DenseReluDense.wi_1"):
        encode("a fox", wan)
    torch.save({"head": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="cannot read the encoder in"):
        encode("a fox", wan)
    torch.save(whole | {"code": SimpleNamespace()}, path)
    with pytest.raises(CheckpointError, match="would run code when loaded"):
        encode("a fox", wan)


# Eight bits


def test_an_int8_layer_is_off_by_half_a_step_at_most():
    """|y - W x| <= scale / 2 * sum |x|, where the scale is an output's largest weight / 127. One x
    that is 1 at a single place reads one weight, which is half a step off at most."""
    from packforcing.checkpoints.umt5 import Int8Linear

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 300, generator=generator) * torch.logspace(-3, 2, 40)[:, None]
    weight[7] = 0
    x = torch.cat((torch.eye(300), torch.randn(16, 300, generator=generator)))
    layer = Int8Linear(weight, torch.float32)
    error = (layer(x).double() - x.double() @ weight.double().T).abs()
    bound = weight.abs().amax(1) / 127 / 2 * x.abs().sum(1, keepdim=True)
    assert (error <= bound * (1 + 1e-4)).all() and error.max() > 0
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().max() == 127
    assert not layer(x)[:, 7].any()


def test_an_int8_encoder_is_as_exact_as_its_layers_say(umt5, record_property):
    """Rounding to a step of `scale` is noise of scale / sqrt(12). Relative to the weights it stays
    below the sum of that over the 14 layers, and bfloat16's own error, which is in both."""
    rows = {kind: encode("the fox runs", umt5, kind).text for kind in ("fp32", "bf16", "int8")}
    off = {
        kind: float(np.linalg.norm(rows[kind] - rows["fp32"]) / np.linalg.norm(rows["fp32"]))
        for kind in ("bf16", "int8")
    }
    record_property("relative error", off)
    bound = 0.0
    for name, weight in load_file(umt5 / "model.safetensors").items():
        if "SelfAttention.relative" not in name and weight.ndim == 2 and "block" in name:
            step = weight.abs().amax(1) / 127
            bound += float(step.square().mean().sqrt() / 12**0.5 / weight.square().mean().sqrt())
    assert off["bf16"] < off["int8"] < off["bf16"] + bound < 0.2
    output = encode("the fox runs", umt5, "int8")
    assert output.encoder == "umt5-int8"


# What was encoded before


def test_a_prompt_is_encoded_once_by_each_encoder(umt5, tmp_path, monkeypatch):
    """A prompt differs where its cleaning does; another format or other weights are another
    encoder."""
    from packforcing.checkpoints import umt5 as module

    cache, loaded = tmp_path / "cache", []
    load = module.load_umt5
    monkeypatch.setattr(module, "load_umt5", lambda *args: loaded.append(args) or load(*args))
    first = encode("a fox", umt5, cache=cache)
    again = encode(" a  fox ", umt5, cache=cache)
    np.testing.assert_array_equal(first.text, again.text)
    assert (again.prompt, again.encoder, again.encoder_sha256) == (
        first.prompt, first.encoder, first.encoder_sha256,
    )  # fmt: skip
    assert len(loaded) == 1 and len(list(cache.iterdir())) == 1
    encode("a dog", umt5, cache=cache)
    encode("a fox", umt5, "int8", cache=cache)
    tensors = load_file(umt5 / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"][0] += 1
    save_file(tensors, umt5 / "model.safetensors", {"format": "pt"})
    assert (encode("a fox", umt5, cache=cache).text != first.text).any()
    assert len(loaded) == 4 and len(list(cache.iterdir())) == 4

    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    encode("a fox", umt5, cache=cache)
    encode("a fox", umt5, cache=cache)
    assert len(loaded) == 5
    assert len(module.encode_umt5(["a fox", "a cat", "a fox"], umt5, "bf16", cache)) == 3
    assert len(loaded) == 6


@pytest.mark.parametrize(
    "damage",
    [
        {"text": np.full((4, 24), np.nan, np.float32)},
        {"text": np.zeros((0, 24), np.float32)},
        {"text": np.ones((5, 24), np.float32)},  # of four tokens
        {"text": np.ones(4, np.float32)},
        {"encoder_sha256": "ab" * 32},
        {"encoder": "umt5-int8"},
    ],
    ids=repr,
)
def test_a_cached_embedding_that_does_not_fit_is_computed_again(umt5, tmp_path, damage):
    made = encode("a fox", umt5, cache=tmp_path / "cache")
    [file] = (tmp_path / "cache").iterdir()
    save_embedding(file, replace(made, **damage))
    again = encode("a fox", umt5, cache=tmp_path / "cache")
    np.testing.assert_array_equal(again.text, made.text)
    cached = load_embedding(file)
    np.testing.assert_array_equal(cached.text, made.text)
    assert (cached.encoder, cached.encoder_sha256) == (made.encoder, made.encoder_sha256)


def test_hashing_the_encoder_shows_its_progress(umt5):
    bars = []

    def bar(**options):
        bars.append(tqdm(file=io.StringIO(), **options))
        return bars[-1]

    encode("a fox", umt5, bar=bar)
    names = "model.safetensors", "config.json", "tokenizer.json"
    assert bars[0].n == bars[0].total >= sum((umt5 / name).stat().st_size for name in names)


def test_a_cache_that_cannot_be_written_is_ignored(umt5, tmp_path):
    (tmp_path / "file").touch()
    assert len(encode("a fox", umt5, cache=tmp_path / "file").text) == 4


def test_render_encodes_the_prompt_itself(umt5, tmp_path):
    bundle, file = umt5_bundle(tmp_path), tmp_path / "a.safetensors"
    options = "--no-metadata", "--bundle", bundle, "--seconds", 1, "--out"
    for args in (("render", "a fox", "--encoder", umt5, *options, f"{tmp_path / 'one'}/"),
                 ("encode-prompt", "a fox", "--encoder", umt5, "--out", file),
                 ("render", "--embedding", file, *options, f"{tmp_path / 'other'}/")):  # fmt: skip
        result = run(*args)
        assert result.exit_code == 0, result.output
    one, other = (sorted((tmp_path / name).iterdir()) for name in ("one", "other"))
    assert one and [file.read_bytes() for file in one] == [file.read_bytes() for file in other]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1

    (tmp_path / "scenes.toml").write_text(
        '[[switch]]\ntime = 0\nprompt = "a fox"\n[[switch]]\ntime = 0.5\nprompt = "a dog"\n'
    )
    result = run("render", "--schedule", tmp_path / "scenes.toml", "--encoder", umt5,
                 *options, f"{tmp_path / 'both'}/", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    prompts = json.loads(result.stdout)["prompts"]
    assert [switch["prompt"] for switch in prompts] == ["a fox", "a dog"]
    both = [file.read_bytes() for file in sorted((tmp_path / "both").iterdir())]
    assert both[0] == one[0].read_bytes() and both[-1] != one[-1].read_bytes()
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2

    ask = "render", "a fox", "--encoder", tmp_path / "none"
    assert_refused(run(*ask, *options, tmp_path / "none" / "a.mkv"), "no folder")
    assert_refused(run(*ask, *options, tmp_path / "c.mkv"), "is not a text encoder")
    assert_refused(run(*ask, "--out", tmp_path / "c.mkv"), "leave out --encoder")
    again = run("render", "--embedding", file, *ask[2:], *options, tmp_path / "c.mkv")
    assert_refused(again, "encoded already")
    (tmp_path / "scenes.toml").write_text('[[switch]]\ntime = 0\nembedding = "a.safetensors"\n')
    again = run("render", "--schedule", tmp_path / "scenes.toml", *ask[2:], *options,
                tmp_path / "c.mkv")  # fmt: skip
    assert_refused(again, "encoded already")


def test_other_weights_have_another_hash(umt5):
    before = encode("a fox", umt5).encoder_sha256
    tensors = load_file(umt5 / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"][0] += 1
    save_file(tensors, umt5 / "model.safetensors", {"format": "pt"})
    assert encode("a fox", umt5).encoder_sha256 != before


# Prompts that are too long, or empty

# ▁fox is one token and ▁dog is four; the last of 512 is </s>
FITS = " ".join(["fox"] * 511)
TOO_LONG = [
    (FITS + " fox", 513, " fox"),
    (FITS + " dog", 516, " dog"),
    (" ".join(["fox"] * 509) + " dog cat", 518, "og cat"),  # within a word
    (" ".join(["fox"] * 1500), 1501, " fox" * 989),
    ("&quot;" + FITS, 516, " fox" * 4),  # cleaned before: ▁ " f o x are five
]


@pytest.mark.parametrize("prompt", ["", " \n\t", "&nbsp;", "\u3000", "\u200a&#x20;"])
def test_an_empty_prompt_is_the_end_token_alone(umt5, prompt):
    made, expected = encode(prompt, umt5, "fp32"), wan_rows(umt5, prompt)
    assert (made.prompt, made.text.shape[0]) == ("", 1)
    assert expected[0].any() and not expected[1:].any()
    np.testing.assert_allclose(made.text, expected[:1], rtol=0, atol=1e-4)


def test_a_prompt_of_512_tokens_is_read_whole(umt5, recwarn):
    made = encode(FITS, umt5, "fp32", strict=True)
    assert len(made.text) == MAX_TOKENS and not len(recwarn)
    np.testing.assert_allclose(made.text, wan_rows(umt5, FITS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("prompt", "tokens", "unread"), TOO_LONG, ids=range(len(TOO_LONG)))
def test_a_longer_prompt_is_cut_as_wan_cuts_it_and_the_rest_is_shown(umt5, prompt, tokens, unread):
    with pytest.warns(PromptWarning, match=f"has {tokens} tokens, of which 512") as caught:
        made = encode(prompt, umt5, "fp32")
    [warning] = caught
    assert warning.filename == __file__  # of the caller
    assert (warning.message.prompt, warning.message.unread) == (wan_clean(prompt), unread)
    assert str(warning.message).endswith(f"{unread[-200:]}'")
    assert len(made.text) == MAX_TOKENS and made.prompt == wan_clean(prompt)
    np.testing.assert_allclose(made.text, wan_rows(umt5, prompt), rtol=0, atol=1e-4)
    with pytest.raises(PromptError, match=f"has {tokens} tokens.*not read: .*; shorten it"):
        encode(prompt, umt5, strict=True)
    again = pickle.loads(pickle.dumps(warning.message))
    assert (str(again), again.unread) == (str(warning.message), unread)


PIECES = ("a", " ", "fox", "\t\n", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "\u2019", "\u201c",
          "&", "#", ";", "x", "1", "&amp;", "&#x20;", "\u00e2\u20ac\u2122")  # fmt: skip


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_prompts_are_cleaned_as_wan_cleans_them(text):
    pytest.importorskip("ftfy")
    from packforcing.checkpoints.umt5 import clean_prompt

    assert clean_prompt(text) == wan_clean(text)


def test_every_command_that_encodes_says_what_it_does_not_read(umt5, tmp_path, monkeypatch):
    from packforcing.checkpoints import umt5 as module

    out, unread = tmp_path / "a.safetensors", " dog"
    ask = "encode-prompt", f"{FITS} dog", "--encoder", umt5, "--out", out
    result = run(*ask)
    assert result.exit_code == 0 and "512 tokens" in result.stdout
    assert result.stderr.count("warning: ") == 1 and "not read: ' dog'" in result.stderr
    assert json.loads(run(*ask, "--json").stdout)["unread"] == unread
    assert_refused(run(*ask, "--strict"), "516 tokens", "not read: ' dog'", "shorten it")
    result = run("encode-prompt", " ", "--encoder", umt5, "--out", out, "--json")
    assert json.loads(result.stdout)["tokens"] == 1
    assert len(load_embedding(out).text) == 1

    monkeypatch.setattr(module, "MAX_TOKENS", 8)  # which the demo's graphs read
    scenes, video = tmp_path / "scenes.toml", tmp_path / "a.mkv"
    long = "fox " * 6 + "dog"
    scenes.write_text(
        f'[[switch]]\ntime = 0\nprompt = ""\n[[switch]]\ntime = 0.5\nprompt = "{long}"\n'
    )
    render = "render", "--bundle", umt5_bundle(tmp_path), "--encoder", umt5, "--seconds", 1
    for prompts in ((long,), ("--schedule", scenes)):
        refused = run(*render, *prompts, "--out", video, "--strict")
        assert_refused(refused, "11 tokens, of which 8", "not read: 'dog'")
        result = run(*render, *prompts, "--out", video)
        assert result.exit_code == 0 and "not read: 'dog'" in result.stderr, result.stderr


def test_damaged_encoders_are_refused(umt5, tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            encode("a fox", umt5)

    weights, config = umt5 / "model.safetensors", umt5 / "config.json"
    tensors, settings = load_file(weights), config.read_text()
    lacking = {name: tensor for name, tensor in tensors.items() if "layer.1" not in name}
    save_file(lacking, weights, {"format": "pt"})
    refused(r"not those of its encoder \(8 missing\): missing encoder.block.0.layer.1")
    save_file(tensors, weights, {"format": "pt"})
    cast = {name: t.to(torch.int8) if t.ndim == 2 else t for name, t in tensors.items()}
    save_file(cast, weights, {"format": "pt"})
    refused("model.safetensors is quantized as int8 .*which is not read here")
    save_file(tensors, weights, {"format": "pt"})
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("cannot read .*model.safetensors, which is damaged")
    weights.rename(umt5 / "model.bin")
    refused("cannot read .*model.bin, which is damaged: cut off after")
    (umt5 / "model.bin").unlink()
    refused("holds no .safetensors file")
    save_file(tensors, weights, {"format": "pt"})
    config.write_text(settings.replace('"d_ff": 48', '"d_ff": 64'))
    refused(r"not those of its encoder \(6 misshaped\)")
    config.write_text(settings.replace('"umt5"', '"t5"'))
    refused("of kind 't5', not umt5")
    config.write_text(settings[:9])
    refused("config.json is missing or damaged")
    config.write_text(settings)
    (umt5 / "tokenizer.json").write_text("{")
    refused("cannot read a tokenizer from")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("d_ff", -5),
        ("dense_act_fn", "nope"),
        ("num_layers", "2"),
        ("relative_attention_max_distance", 0),
        ("relative_attention_num_buckets", 0),
    ],
)
def test_impossible_settings_of_an_encoder_are_refused(umt5, setting, value):
    config = umt5 / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {setting: value}))
    with pytest.raises(CheckpointError, match="cannot read the encoder in"):
        encode("a fox", umt5)


def change_tokenizer(folder: Path, **parts) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


def test_the_tokenizer_is_loaded_from_its_file(umt5):
    """What is built by its class's name, without the file's normalizer, is another one."""
    named = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>"}
    (umt5 / "text_encoder").mkdir()  # diffusers' layout
    for name in ("config.json", "model.safetensors"):
        (umt5 / name).rename(umt5 / "text_encoder" / name)
    (umt5 / "tokenizer").mkdir()
    (umt5 / "tokenizer.json").rename(umt5 / "tokenizer" / "tokenizer.json")
    (umt5 / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(named))
    before = encode("a fox", umt5)
    change_tokenizer(umt5 / "tokenizer", normalizer={"type": "Lowercase"})
    after = encode("A FOX", umt5)
    np.testing.assert_array_equal(after.text, before.text)
    assert after.encoder_sha256 != before.encoder_sha256


def test_a_tokenizer_of_another_model_is_refused(umt5):
    tensors, config = load_file(umt5 / "model.safetensors"), umt5 / "config.json"
    words = len(tensors["shared.weight"]) - 1  # without the last, fox
    tensors["shared.weight"] = tensors["shared.weight"][:words].clone()
    tensors.pop("encoder.embed_tokens.weight", None)
    save_file(tensors, umt5 / "model.safetensors", {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": words}))
    assert len(encode("a dog", umt5).text) == 7  # ▁ a ▁ d o g </s>
    with pytest.raises(
        CheckpointError, match=f"tokenizer.json gives token {words}, .* {words} tokens:"
    ):
        encode("a fox", umt5)
    change_tokenizer(umt5, post_processor=None, normalizer={"type": "Replace", "pattern": {
        "String": "a fox"}, "content": ""})  # fmt: skip
    with pytest.raises(CheckpointError, match="finds no token in a prompt"):
        encode("a fox", umt5)


def test_memory_is_checked_before_the_encoder_is_read(umt5, monkeypatch):
    from packforcing.checkpoints import umt5 as module

    size = 2 * sum(tensor.numel() for tensor in load_file(umt5 / "model.safetensors").values())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))
    encode("a fox", umt5)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size - 1))
    monkeypatch.setattr(module, "tensor_reader", None)
    with pytest.raises(ConfigError, match="close other programs"):
        encode("a fox", umt5)


def test_encode_prompt_explains_mistakes(tmp_path):
    options = "--out", tmp_path / "a.safetensors", "--encoder", tmp_path
    assert_refused(
        run("encode-prompt", "a", *options[:1], tmp_path / "a.npy", *options[2:]), "NAME.s"
    )
    pytest.importorskip("transformers")
    pytest.importorskip("ftfy")
    assert_refused(run("encode-prompt", "a", *options), "is not a text encoder")
    assert not any(tmp_path.iterdir())
