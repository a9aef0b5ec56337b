"""The reference model: shapes of the real family, and equalities that hold exactly."""

from functools import partial

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from packforcing import Policy, model_config
from packforcing.autoencoder import TinyAutoencoder
from packforcing.compressor import Compressor
from packforcing.errors import CheckpointError
from packforcing.model import Model, load_model, random_model, save_model
from packforcing.reference import (
    PastBlock,
    call_transformer,
    drop_unread,
    gather_context,
    rope_tensors,
)
from packforcing.rope import block_positions, compressed_positions
from packforcing.runtime.bundle import contract
from packforcing.transformer import Transformer, patchify, rotate, unpatchify


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_wan_has_the_published_size():
    with torch.device("meta"):
        transformer = Transformer(model_config("wan-1.3b"))
    assert parameters(transformer) == 1_418_996_800
    assert len(transformer.state_dict()) == 825


def test_autoencoder_has_the_size_of_taew2_1():
    autoencoder = TinyAutoencoder(model_config("wan-1.3b"))
    assert parameters(autoencoder) == 11_315_539
    assert parameters(autoencoder.decoder) == 9_844_611
    assert len(autoencoder.state_dict()) == 128


def test_token_counts_of_the_paper():
    config = model_config("wan-1.3b")
    assert (config.block_tokens, config.compressed_tokens) == (6240, 182)
    assert config.context_tokens + config.block_tokens == 27_872


def test_patchify_and_back(tiny_config):
    latents = torch.randn(2, 3, 4, *tiny_config.latent_size)
    tokens = patchify(latents, tiny_config.patch)
    assert tokens.shape[1:] == (tiny_config.block_tokens, tiny_config.token_dim)
    assert torch.equal(unpatchify(tokens, tiny_config.grid, tiny_config.patch), latents)


def test_state_dict_keeps_the_checkpoint_order_of_the_head(tiny_config, tiny_model):
    """Saving returns what was loaded, though rows are reordered in between."""
    weights = {k: torch.randn_like(v) for k, v in tiny_model.transformer.state_dict().items()}
    transformer = Transformer(tiny_config)
    transformer.load_state_dict(weights)
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    channel, row, column = 2, 1, 0  # channel-fastest on disk, (channel, row, column) in use
    on_disk = weights["head.head.bias"][(row * 2 + column) * 4 + channel]
    assert transformer.head.head.bias[channel * 4 + row * 2 + column] == on_disk


@torch.inference_mode()
def test_autoencoder_streams_what_it_computes_at_once(tiny_config, tiny_model):
    autoencoder = tiny_model.autoencoder
    clip = torch.rand(16, 3, tiny_config.height, tiny_config.width)
    latents = autoencoder.encode(clip[None])[0]
    state = autoencoder.encoder_state(tiny_config.height, tiny_config.width)
    for i in range(4):
        latent, state = autoencoder.encode_frame(clip[4 * i : 4 * i + 4], state)
        torch.testing.assert_close(latent[0], latents[i], atol=1e-4, rtol=0)
    frames = autoencoder.decode(latents[None])[0].clamp(0, 1)
    state = autoencoder.decoder_state()
    for i in range(4):
        four, state = autoencoder.decode_frame(latents[i : i + 1], state)
        torch.testing.assert_close(four, frames[4 * i : 4 * i + 4], atol=1e-4, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("block_frames", (3, 4))
@pytest.mark.parametrize("size", [(64, 64), (80, 112), (96, 64), (112, 144)])
def test_any_size_of_whole_tokens_works(tiny_config, tiny_model, size, block_frames):
    """The contract's shapes are the model's, also where 4 does not divide the grid."""
    height, width = size
    config = msgspec.structs.replace(
        tiny_config, height=height, width=width, block_frames=block_frames, vae_strips=5
    )
    model = random_model(config)
    graphs = contract(config)
    latents, pixels = (torch.rand(spec.shape) for spec in graphs["compressor"].inputs)
    for result, spec in zip(model.compressor(latents, pixels), graphs["compressor"].outputs):
        assert result.shape == spec.shape
    latent, *state = (torch.rand(spec.shape) for spec in graphs["vae_decoder"].inputs)
    frames, after = model.autoencoder.decode_frame(latent, state)
    for result, spec in zip((frames, *after), graphs["vae_decoder"].outputs):
        assert result.shape == spec.shape


@pytest.mark.parametrize("strips", (2, 3, 8, 100))
def test_decoding_in_strips_is_exact(tiny_config, tiny_model, strips):
    whole = tiny_model.autoencoder
    config = msgspec.structs.replace(tiny_config, vae_strips=strips)
    parts = TinyAutoencoder(config)
    parts.load_state_dict(whole.state_dict())
    latent = torch.randn(1, config.latent_channels, *config.latent_size)
    for a, b in zip(*(m.decode_frame(latent, m.decoder_state()) for m in (whole, parts))):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_autoencoder_clips_do_not_see_each_other(tiny_model):
    clips = torch.rand(2, 8, 3, 64, 96)
    both = tiny_model.autoencoder.encode(clips)
    torch.testing.assert_close(both[1:], tiny_model.autoencoder.encode(clips[1:]))


def test_compressor_sizes_at_480x832():
    config = model_config("wan-1.3b")
    with torch.device("meta"):
        compressor = Compressor(config, TinyAutoencoder(config).encode)
        tokens, extra = compressor(torch.zeros(1, 4, 16, 60, 104), torch.zeros(1, 16, 3, 480, 832))
    assert tokens.shape == (1, 182, 64)
    assert extra.shape == (1, 182, 1536)


@torch.inference_mode()
def test_odd_block_repeats_its_last_frame(tiny_config, tiny_model):
    latents = torch.randn(1, 3, 4, *tiny_config.latent_size)
    pixels = torch.rand(1, 12, 3, tiny_config.height, tiny_config.width)
    even = msgspec.structs.replace(tiny_config, block_frames=4)
    padded = Compressor(even, tiny_model.autoencoder.encode)
    padded.load_state_dict(tiny_model.compressor.state_dict())
    expected = padded(
        torch.cat((latents, latents[:, -1:]), 1),
        torch.cat((pixels, *[pixels[:, -1:]] * 4), 1),
    )
    result = tiny_model.compressor(latents, pixels)
    for a, b in zip(result, expected):
        torch.testing.assert_close(a, b)


@torch.inference_mode()
def test_without_weights_the_low_branch_serves_alone(tiny_config, tiny_model):
    bare = Compressor(
        msgspec.structs.replace(tiny_config, compressor_widths=()), tiny_model.autoencoder.encode
    )
    latents = torch.randn(1, 3, 4, *tiny_config.latent_size)
    pixels = torch.rand(1, 12, 3, tiny_config.height, tiny_config.width)
    tokens, extra = bare(latents, pixels)
    assert not extra.any()
    assert torch.equal(tokens, tiny_model.compressor(latents, pixels)[0])


@torch.inference_mode()
def test_cached_rollout_equals_one_masked_pass(tiny_config, tiny_model):
    """Teacher forcing in one pass over [clean | compressed | noisy] is what the cache computes.

    Five blocks; policy sink 1, recent 1, every older block read compressed, at full span, so
    that packed positions are the absolute ones the single pass can give its tokens.
    """
    config = msgspec.structs.replace(tiny_config, policy=Policy(sink=1, mid=9, recent=1))
    model = Model(config, tiny_model.transformer, tiny_model.autoencoder, tiny_model.compressor)
    transformer, blocks = model.transformer, 5
    n, c = config.block_tokens, config.compressed_tokens
    torch.manual_seed(0)
    clean = torch.randn(blocks, n, config.token_dim)
    noisy = torch.randn(blocks, n, config.token_dim)
    small = torch.randn(blocks, c, config.token_dim)
    extra = torch.randn(blocks, c, config.dim)
    cross = transformer.cross_kv(torch.randn(1, config.text_len, config.text_dim))
    starts = [b * config.block_frames for b in range(blocks)]
    full_at = [block_positions(config, s) for s in starts]
    small_at = [compressed_positions(config, s, config.block_frames) for s in starts]

    # one pass: who reads whom
    sizes = [n] * blocks + [c] * blocks + [n] * blocks
    owner = np.repeat(np.arange(3 * blocks), sizes)
    kind, block = np.divmod(owner, blocks)  # 0 clean, 1 compressed, 2 noisy
    row, column = np.arange(len(owner))[:, None], np.arange(len(owner))[None]
    past = block[column] < block[row]
    whole = (block[column] == 0) | (block[column] == block[row] - 1)
    reads = past & np.where(whole, kind[column] == 0, kind[column] == 1)
    mask = torch.from_numpy(reads | (owner[row] == owner[column]))
    tables = rope_tensors(config, np.concatenate(full_at + small_at + full_at))
    zeros = torch.zeros(blocks * n, config.dim)
    head_time, layer_time = transformer.embed_time(torch.tensor([[0.0, 700.0]]))
    segments = torch.from_numpy((kind == 2).astype(np.int64))

    def attend(q, k, v):
        return F.scaled_dot_product_attention(rotate(q, tables), rotate(k, tables), v, mask)

    flow = transformer.run(
        torch.cat((clean.flatten(0, 1), small.flatten(0, 1), noisy.flatten(0, 1)))[None],
        torch.cat((zeros, extra.flatten(0, 1), zeros))[None],
        head_time[:, segments],
        layer_time[:, segments],
        cross,
        attend,
    )[0, -blocks * n :].unflatten(0, (blocks, n))

    # block by block, through the reference rollout's own history
    history: list[PastBlock] = []
    for b in range(blocks):
        context, context_rope, start = gather_context(config, history, list(range(1, b - 1)))
        assert start == starts[b]
        call = partial(call_transformer, model, cross, context, context_rope)
        result = call(noisy[b][None], 700.0, full_at[b])[0]
        torch.testing.assert_close(result[0], flow[b], atol=1e-5, rtol=0)
        full = call(clean[b][None], 0.0, full_at[b])[1]
        history.append(
            PastBlock(b, full, call(small[b][None], 0.0, small_at[b], extra[b][None])[1])
        )
        drop_unread(config, history)


@torch.inference_mode()
def test_kv_len_hides_garbage(tiny_config, tiny_model):
    """A call with garbage beyond `kv_len` equals the call on the smaller context."""
    config, n, valid, room = tiny_config, tiny_config.block_tokens, 20, 50
    torch.manual_seed(0)

    def context(tokens):
        torch.manual_seed(1)
        whole = [
            torch.randn(1, config.heads, room, config.head_dim) for _ in range(2 * config.layers)
        ]
        for tensor in whole:
            tensor[:, :, valid:] = 1e6
        return [(k[:, :, :tokens], v[:, :, :tokens]) for k, v in zip(whole[::2], whole[1::2])]

    at = np.random.default_rng(0).uniform(0, 20, (room, 3))
    tokens, extra = torch.randn(1, n, config.token_dim), torch.randn(1, n, config.dim)
    cross = tiny_model.transformer.cross_kv(torch.randn(1, config.text_len, config.text_dim))
    new = rope_tensors(config, block_positions(config, 20))

    def call(size, kv_len):
        return tiny_model.transformer(
            tokens, extra, torch.tensor([500.0]), cross, new,
            context(size), rope_tensors(config, at[:size]), kv_len,
        )[0]  # fmt: skip

    torch.testing.assert_close(call(room, torch.tensor([n + valid])), call(valid, None))


def test_weights_round_trip_and_name_what_is_wrong(tiny_config, tiny_model, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_model(tiny_model, path, torch.float32)
    loaded = load_model(tiny_config, path)
    for part, other in zip(tiny_model.parts().values(), loaded.parts().values()):
        for (name, a), b in zip(part.state_dict().items(), other.state_dict().values()):
            assert torch.equal(a, b), name
    deeper = msgspec.structs.replace(tiny_config, layers=3)
    with pytest.raises(CheckpointError, match=r"missing transformer\.blocks\.2"):
        load_model(deeper, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot read weights"):
        load_model(tiny_config, path)


def test_random_models_repeat(tiny_config):
    a, b = (random_model(tiny_config, seed=3).transformer.head.head.weight for _ in range(2))
    assert torch.equal(a, b)
