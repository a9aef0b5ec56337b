"""The runtime against the reference, through exported graphs, and the rules it keeps.

All of it on the host, where device memory and the host's view of it are one, and on the memory
of an emulated GPU, where they are two.
"""

import copy
import tracemalloc
from types import SimpleNamespace

import msgspec
import numpy as np
import psutil
import pytest
import torch

from packforcing import Policy
from packforcing.config import Precision
from packforcing.errors import BackendError, ConfigError
from packforcing.model import Model
from packforcing.presets import model_config, policies
from packforcing.prompts import Switch
from packforcing.reference import rollout
from packforcing.runtime import Session
from packforcing.runtime.allocations import archive_bytes, memory_by_purpose
from packforcing.runtime.backends.onnxruntime import OnnxGraph
from packforcing.runtime.blocks import to_bytes
from packforcing.runtime.buffers import Buffers
from packforcing.runtime.bundle import contract, graph_file
from packforcing.runtime.device import HostDevice, view
from packforcing.runtime.plan import make_plan
from packforcing.runtime.rollout import Rollout
from packforcing.sampler import draw_noise
from packforcing.words import encode_words
from tests.emulated import Cuda, cuda_device, gpu_session, on_gpu
from tests.helpers import POLICIES, PROMPT, SEED, TINY, assert_follows_reference


def begin(session, blocks, policy=None) -> Rollout:
    config = msgspec.structs.replace(session.config, policy=policy) if policy else session.config
    run = Rollout(config, session.backend)
    run.begin(encode_words(PROMPT, config), blocks, SEED)
    return run


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_blocks_equal_the_reference_given_the_same_history(session, reference, policy):
    assert_follows_reference(begin(session, 12, policy), reference(12, policy), 1e-4, 1e-4, 1e-4)


@pytest.mark.parametrize("device", ["host", "gpu"])
def test_half_precision_follows_the_reference(tiny_half_bundle, reference, device):
    """Two to three digits, as fp16 has, under the reference's selections."""
    expected = reference(12)
    with Session.open(tiny_half_bundle) as session:
        if device == "gpu":
            session = gpu_session(session)
        run = begin(session, 12)
        run.select = lambda block, _: np.array(expected[min(block + 1, 11)].read, int)
        assert_follows_reference(run, expected, latents=1e-3, frames=0.02, query=2e-3)


def test_sixty_blocks_stay_with_the_reference(session, reference):
    """At least 80 dB on latents and 40 dB on frames, each on its own history, the reference's
    selections replayed. (Below 50 dB this tiny model would forgive a wrong archived block.)"""
    expected = reference(60)
    run = begin(session, 60)
    run.select = lambda block, _: np.array(expected[min(block + 1, 59)].read, int)
    for block in expected:
        run.next_block()
        truth = block.latents.numpy()
        latents = run.buffers.latents.host[0]
        error = np.square(latents - truth).mean() / np.square(truth).mean()
        assert error < 1e-8, f"block {block.index}: latents {-10 * np.log10(error):.1f} dB"
        error = np.square(run.buffers.pixels.host[0] - block.frames.numpy()).mean()
        assert error < 1e-4, f"block {block.index}: {-10 * np.log10(error):.1f} dB"


def test_garbage_in_the_unfilled_context_is_never_read(session):
    clean, dirty = begin(session, 5), begin(session, 5)
    rng = np.random.default_rng(0)
    for _ in range(5):
        valid = dirty.cache.layout().valid
        beyond = view(dirty.buffers.context)[..., valid:, :]
        beyond[...] = 1e4 * rng.standard_normal(beyond.shape)
        for run in (clean, dirty):
            run.next_block()
        np.testing.assert_allclose(dirty.buffers.pixels.host, clean.buffers.pixels.host, atol=1e-5)


def test_a_step_leaves_the_history_untouched(session):
    run = begin(session, 8)
    for _ in range(7):
        run.next_block()

    def history():
        run.device.synchronize()
        archive = run.archive.key_values.tobytes(), run.archive.pooled_keys.tobytes()
        return view(run.buffers.context).tobytes(), archive, copy.deepcopy(vars(run.cache))

    before = history()
    run.place()
    run.denoise()
    assert history() == before


def test_one_seed_gives_one_video(session):
    def video(seed):
        return np.concatenate(list(session.stream(PROMPT, 6, seed)))

    first = video(1)
    assert not np.array_equal(first, video(2))
    assert np.array_equal(first, video(1))


@pytest.mark.parametrize("seconds", [0.125, 1, 1.2, 1.125, 1.25, 3.3])
def test_exactly_the_frames_asked_for(session, seconds):
    blocks = list(session.stream(PROMPT, seconds))
    assert sum(map(len, blocks)) == round(seconds * session.config.fps)
    assert all(len(block) for block in blocks)
    assert blocks[0].dtype == np.uint8 and blocks[0].shape[1:] == (64, 96, 3)


@pytest.mark.parametrize(("frames", "given_blocks"), [(1, 1), (9, 1), (20, 1), (21, 2), (40, 3)])
def test_start_from_frames_equals_the_reference(
    session, tiny_model, reference, frames, given_blocks
):
    """Frame 0 is a latent frame of its own, four frames each later one; then it goes on."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 256, (frames, 64, 96, 3), np.uint8)
    latents = given_blocks * session.config.block_frames
    sources = np.clip(np.arange(latents * 4) - 3, 0, frames - 1)
    pixels = torch.from_numpy(start[sources]).permute(0, 3, 1, 2)[None] / 255
    with torch.inference_mode():
        clip = tiny_model.autoencoder.encode(pixels)[0]
    expected = reference(given_blocks + 1, clip=clip)
    expected_frames = (
        torch.cat([block.frames for block in expected])[3:].permute(0, 2, 3, 1).numpy()
    )
    seconds = (12 * (given_blocks + 1) - 3) / session.config.fps
    frames_made = np.concatenate(list(session.stream(PROMPT, seconds, SEED, start=start)))
    assert frames_made.shape == expected_frames.shape
    assert np.abs(frames_made / 255 - expected_frames).max() < 0.01
    other = np.concatenate(list(session.stream(PROMPT, seconds, SEED)))
    assert np.abs(frames_made[-1].astype(int) - other[-1]).max() > 10, (
        "the start made no difference"
    )


@pytest.mark.parametrize("device", ["host", "gpu"])
@torch.inference_mode()
def test_causvids_long_video_is_rollouts_in_a_row(tiny_bundle, tiny_model, device):
    """Published, in blocks of 3 latent frames: rollouts of 21, each of 81 frames, overlapping by 3.

    Frame 72 of a rollout, the last that its latent 18 is decoded to, is encoded as a first frame;
    that and latents 19 and 20 begin the next one, which knows nothing else. Frames 0 to 71 go out
    of each rollout, and of the last one all there are. Here, of 15 blocks, 7 are made in the
    first, 6 in the second, and 2 in the third: 72 + 72 + 33 frames.
    """
    policy = model_config("causvid").policy
    assert policy.restart * TINY.block_frames == 21
    text = torch.from_numpy(encode_words(PROMPT, TINY))
    endless = msgspec.structs.replace(policy, restart=0)
    model = Model(
        msgspec.structs.replace(TINY, policy=endless), tiny_model.transformer,
        tiny_model.autoencoder, tiny_model.compressor,
    )  # fmt: skip
    published, clip = [], None  # every rollout's frames
    for first, count in ((0, 7), (6, 7), (12, 3)):
        noise = lambda block, step, first=first: draw_noise(TINY, SEED, first + block, step)  # noqa: E731
        blocks = list(rollout(model, text, count, noise, seed=SEED, clip=clip))
        frames = torch.cat([block.frames for block in blocks])[3:]
        latents = torch.cat([block.latents for block in blocks])
        published.append(frames)
        if count == 7:
            again = model.autoencoder.encode(frames[72].repeat(4, 1, 1, 1)[None])[0]
            clip = torch.cat((again, latents[19:]))
    assert [len(frames) for frames in published] == [81, 81, 33]
    alone = published[0].permute(0, 2, 3, 1).numpy()
    published = torch.cat((published[0][:72], published[1][:72], published[2]))

    config = msgspec.structs.replace(TINY, policy=policy)
    model = Model(config, model.transformer, model.autoencoder, model.compressor)
    noise = lambda block, step: draw_noise(TINY, SEED, block, step)  # noqa: E731
    blocks = list(rollout(model, text, 15, noise, seed=SEED))
    reference = torch.cat([block.frames for block in blocks])[3:]
    torch.testing.assert_close(reference, published, atol=1e-4, rtol=0)

    with Session.open(tiny_bundle, policy=policy) as session:
        if device == "gpu":
            gpu = on_gpu(session.backend, Cuda())
            session = Session(session.manifest, gpu, policy=policy)
        infos = []
        frames_made = np.concatenate(
            list(session.stream(PROMPT, 177 / TINY.fps, SEED, on_block=infos.append))
        )
        assert [info.frames for info in infos] == list(range(9, 178, 12))
        assert frames_made.shape == (177, 64, 96, 3)
        assert np.abs(frames_made / 255 - published.permute(0, 2, 3, 1).numpy()).max() < 0.01
        # a video of one rollout ends as that one does
        short = np.concatenate(list(session.stream(PROMPT, 81 / TINY.fps, SEED)))
        assert np.abs(short / 255 - alone).max() < 0.01
        assert np.abs(frames_made[72:81] / 255 - alone[72:]).max() > 0.05


RESTARTING = Policy(sink=1, mid=2, recent=1, restart=3, selection="recency")


def test_rollouts_in_a_row_remember_and_follow_prompts(tiny_bundle, tiny_model):
    """With sink, mids and every effect of a switch: in the middle of a rollout, right after one
    ended, and with a cut there, which begins the count anew. What is before the cut does not
    foresee it: a live switch may come at any time."""
    config = msgspec.structs.replace(TINY, policy=RESTARTING)
    model = Model(config, tiny_model.transformer, tiny_model.autoencoder, tiny_model.compressor)
    words = [PROMPT, "a blue circle over sand", "a white square"]
    # a scene's rollouts end with blocks 2, 4, 6; that of the cut at 7 with 9
    effects = {1: "recompute", 3: "recompute", 5: "keep", 7: "cut", 10: "keep"}
    embedded = [torch.from_numpy(encode_words(text, config)) for text in words]
    noise = lambda block, step: draw_noise(config, SEED, block, step)  # noqa: E731
    switches = {at: (embedded[at % 3], effect) for at, effect in effects.items()}
    blocks = list(rollout(model, embedded[0], 12, noise, seed=SEED, switches=switches))
    expected_frames = [block.frames[3 if block.index in (0, 7) else 0 :] for block in blocks]
    schedule = [Switch(0, PROMPT)]
    for at, effect in effects.items():  # the frame with which a block begins
        frame = 12 * at - 3 * (1 + (at > 7))
        schedule.append(Switch(frame / TINY.fps, words[at % 3], effect))
    frames, infos = 12 * 12 - 6, []
    with Session.open(tiny_bundle, policy=RESTARTING) as session:
        stream = session.stream(schedule, frames / TINY.fps, SEED, on_block=infos.append)
        frames_made = np.concatenate(list(stream))
        uncut = list(session.stream(schedule[:4], 93 / TINY.fps, SEED))
    assert [info.read for info in infos] == [block.read for block in blocks]
    # block 9 of the scene from 7 is the next rollout's first: its own sink, so nothing archived
    assert [info.read for info in infos[7:]] == [[], [], [], [], []]
    assert (
        np.abs(frames_made / 255 - torch.cat(expected_frames).permute(0, 2, 3, 1).numpy()).max()
        < 0.01
    )
    np.testing.assert_array_equal(np.concatenate(uncut)[:81], frames_made[:81])


def test_a_single_image_starts_a_video(session):
    image = np.zeros((64, 96, 3), np.uint8)
    assert sum(map(len, session.stream(PROMPT, 2, start=image))) == 16
    with pytest.raises(ConfigError, match="uint8"):
        session.stream(PROMPT, 2, start=image.astype(np.float32))


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e9, 0.01])
def test_impossible_lengths_are_refused_at_once(session, seconds):
    with pytest.raises(ConfigError, match="seconds"):
        session.stream(PROMPT, seconds)


def test_a_closed_session_refuses_to_make_videos(tiny_bundle):
    session = Session.open(tiny_bundle)
    begun = session.stream(PROMPT, 1)
    session.close()
    session.close()
    with pytest.raises(BackendError, match="closed"):
        next(begun)
    with pytest.raises(BackendError, match="closed"):
        session.stream(PROMPT, 1)


def test_nothing_is_allocated_or_moved_in_a_hundred_blocks(tiny_bundle):
    """Once every partition is full, each block makes the same calls at the same addresses and
    copies the same bytes, but for the archived blocks that it brings back; no array is left.
    The block after a prompt switch selects once more; later ones are as before."""
    full, cuda = TINY.policy.capacity + 2, Cuda()
    with Session.open(tiny_bundle) as session:
        run = Rollout(TINY, on_gpu(session.backend, cuda))
    run.begin(encode_words(PROMPT, TINY), full + 100, SEED)
    for _ in range(full):
        run.next_block()
    context, compressed = run.buffers.context, run.buffers.new_compressed
    blocks, brought_back = [], 0
    for index in range(100):
        if index == 50:
            run.switch(encode_words("a blue circle", TINY), "recompute")
        if index == 80:
            tracemalloc.start()
        cuda.log.clear()
        before = set(run.cache.mids)
        run.next_block()
        steady, loads = [], 0
        for entry in cuda.log:
            if compressed.host.ctypes.data == entry[1] or compressed.address == entry[1]:
                loads += 1
            elif entry[0] == "copy" and 0 <= entry[2] - context.address < context.nbytes:
                steady.append((entry[1], entry[3]))  # its slot is another one each time
            else:
                steady.append(entry)
        moved = len(set(run.cache.mids) - before)
        assert loads == 1 + 2 * moved  # to the archive; then up and into its slot
        brought_back += moved
        blocks.append(steady)
    arrays = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    left = tracemalloc.take_snapshot().filter_traces([arrays])
    tracemalloc.stop()
    assert not left.traces
    assert {entry[0] for entry in blocks[0]} == {"copy", "call", run.buffers.new.address}
    # the decoder's two sets of state take turns
    others = [(index, block) for index, block in enumerate(blocks) if index != 50]
    assert all(block == blocks[index % 2] for index, block in others)
    assert brought_back > 5


def test_switches_and_blends_allocate_nothing(tiny_bundle):
    """A live video, its archive full, steered alike three times: nothing on the GPU or pinned
    after the first time. On the host no array is left but the prompt's and the blend's, and a block
    takes what it took the time before: its frames."""
    switches = {2: ("keep", 1), 5: ("recompute", 1), 8: ("keep", 4), 13: ("recompute", 3),
                17: ("cut", 1), 19: ("keep", 2)}  # fmt: skip
    words, blocks, cuda = ["a blue circle", "a white square"], 24, Cuda()
    arrays = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    peaks, left = np.zeros((3, blocks)), []
    with Session.open(tiny_bundle, threads=1) as host:
        video = gpu_session(host, cuda).begin(PROMPT, SEED, lead=None, archive_limit=6)
        for time, block in np.ndindex(peaks.shape):
            if (time, block) == (1, 0):
                cuda.log.clear()
                tracemalloc.start()
            if switch := switches.get(block):
                video.switch(words[block % 2], switch[0], over=switch[1])
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            next(video)
            peaks[time, block] = tracemalloc.get_traced_memory()[1] - before
            cuda.log[:] = [entry for entry in cuda.log if entry[0] not in ("copy", "call", "fill")]
            if time and block == blocks - 1:
                traces = tracemalloc.take_snapshot().filter_traces([arrays]).traces
                left.append(sum(trace.size for trace in traces))
        tracemalloc.stop()
    assert cuda.log == []
    assert left[0] == left[1] <= 2 * 4 * TINY.text_len * TINY.text_dim
    assert np.abs(peaks[2] - peaks[1]).max() < 0.01 * peaks[1].max()


def test_a_video_grows_by_its_archive_alone(session):
    run = begin(session, 10)
    archive = run.archive.key_values.nbytes + run.archive.pooled_keys.nbytes
    assert (
        archive
        == archive_bytes(run.config, 10)
        == 9 * memory_by_purpose(run.config)["archive_per_block"]
    )


HALF = Precision(compute="fp16", weights="fp16", cache="fp16")


@pytest.mark.parametrize("precision", [Precision(), HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize("widths", [TINY.compressor_widths, ()], ids=["both", "low branch"])
@pytest.mark.parametrize("restart", [0, 3])
def test_memory_is_what_is_allocated(restart, widths, precision):
    """The plan equals, to the byte, what is allocated on the host alone, on a card, and in
    page-locked memory beside it; all of it is given back."""
    config = msgspec.structs.replace(
        TINY,
        compressor_widths=widths,
        precision=precision,
        policy=msgspec.structs.replace(TINY.policy, restart=restart),
    )
    stated, plan = memory_by_purpose(config), make_plan(config, "sm89")
    del stated["archive_per_block"]
    host, cuda = HostDevice(), Cuda()
    card = cuda_device(cuda)
    buffers = [Buffers(config, device) for device in (host, card)]
    assert host.allocated == stated
    on_card = {
        name: size
        for name, size in plan.device.items()
        if name not in ("scratch", "reserve") and not name.startswith("weights.")
    }
    assert sum(on_card.values()) == card.allocated.total() == cuda.used("device")
    assert plan.host["copies"] == card.host.allocated.total()
    encoder = sum(array.nbytes for array in (buffers[1].encoder or {}).values())
    assert (encoder > 0) == (restart > 0)
    host_bytes = buffers[1].text.nbytes + buffers[1].recent.nbytes + encoder
    assert plan.host["copies"] == cuda.used("host") + host_bytes
    del buffers
    assert host.allocated.total() == card.allocated.total() == card.host.allocated.total() == 0
    assert cuda.used("device") == cuda.used("host") == 0


@pytest.mark.parametrize("make", [HostDevice, lambda: cuda_device(Cuda())], ids=["host", "gpu"])
def test_copies_are_what_numpy_would_do(make):
    """Of parts, of tokens in the middle of a row of tokens, and in the order of the calls."""
    device = make()
    numbers = np.arange(2 * 3 * 5 * 4, dtype=np.float16).reshape(2, 3, 5, 4)
    small, large = numbers[:, :, :2], numbers + 1000
    source, target = (
        device.allocate("test", array.shape, array.dtype, host=True) for array in (small, large)
    )
    for array, values in ((source, small), (target, large)):
        array.host[...] = values
        device.upload(array)
    if device.host is not device:
        target.host[...] = 0  # a view may be written right after its upload
    device.copy_tokens(source, target, 2)
    device.zero(target[1, 2])
    part = target[1].reshape(3, 20)[0]
    device.download(target)
    large[:, :, 2:4] = small
    large[1, 2] = 0
    np.testing.assert_array_equal(target.host, large)
    np.testing.assert_array_equal(view(part), large[1, 0].ravel())
    np.testing.assert_array_equal(part.host, large[1, 0].ravel())


def test_memory_lives_as_long_as_what_sees_it():
    device = HostDevice()
    seen = view(device.allocate("test", (4,), np.float32))
    assert device.allocated["test"] == 16
    del seen
    assert device.allocated["test"] == 0


def test_half_precision_pixels_become_the_nearest_bytes():
    """All float16 from 0 to 1, against float64 arithmetic."""
    halves = np.arange(0x3C01, dtype=np.uint16).view(np.float16)
    pixels = np.repeat(halves[None, None, None], 3, axis=1)
    expected = np.floor(halves.astype(np.float64) * 255 + 0.5)
    np.testing.assert_array_equal(to_bytes(pixels)[0, 0], np.stack([expected] * 3, axis=-1))


def test_videos_beyond_the_machine_are_refused(tiny_bundle, monkeypatch):
    with Session.open(tiny_bundle, policy=policies(TINY)["full-history"]) as session:
        assert sum(map(len, session.stream(PROMPT, 5))) == 40
        machine = SimpleNamespace(total=9_000_000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
        session.stream(PROMPT, 5)
        with pytest.raises(ConfigError, match="of memory under its policy"):
            session.stream(PROMPT, 500)


@pytest.mark.parametrize("seed", [2**63, 2**63 + 1, 2**64 - 1])
def test_large_seeds_are_seeds_of_their_own(seed):
    """No two collide, as they would if the key passed through float64."""
    others = [draw_noise(TINY, other, 0, 0) for other in (seed - 1, 0)]
    assert not any(np.array_equal(draw_noise(TINY, seed, 0, 0), other) for other in others)


@pytest.mark.parametrize("n", [1, 2, TINY.block_tokens])
def test_graph_takes_any_block_and_context_size(tiny_bundle, tiny_model, n):
    """N and C are open: one graph serves full and compressed blocks and any policy."""
    from packforcing.export.graphs import Denoiser

    spec = contract(TINY)["denoiser"]
    graph = OnnxGraph(tiny_bundle / graph_file("denoiser"), spec, threads=1)
    rng = np.random.default_rng(0)
    axes = {"N": n, "C": 7}
    memory = HostDevice()
    arrays = {
        tensor.name: memory.allocate(
            "test", tuple(axes.get(x, x) for x in tensor.shape), tensor.dtype, host=True
        )
        for tensor in (*spec.inputs, *spec.outputs)
    }
    for array in arrays.values():
        array.host[...] = rng.standard_normal(array.shape)
    arrays["kv_len"].host[0] = n + 5
    graph.bind(arrays)()
    with torch.inference_mode():
        inputs = [torch.from_numpy(arrays[tensor.name].host) for tensor in spec.inputs]
        expected = Denoiser(tiny_model)(*inputs)
    for tensor, truth in zip(spec.outputs, expected):
        np.testing.assert_allclose(
            arrays[tensor.name].host, truth.numpy(), atol=2e-5, err_msg=tensor.name
        )


def test_videos_of_one_session_have_policies_of_their_own(tiny_bundle):
    """Made in turns, each is what a session of its policy makes."""
    names = ["packforcing", "sink-window", "full-history"]
    chosen = [policies(TINY)[name] for name in names]
    with Session.open(tiny_bundle, threads=1) as session:
        videos = [session.begin(PROMPT, SEED, seconds=6, policy=p, lead=None) for p in chosen]
        before = session.graph_seconds()
        together = [[block.frames for block in blocks] for blocks in zip(*videos)]
        for name, seconds in session.graph_seconds().items():  # each call is one video's
            shares = sum(video.graph_seconds[name] for video in videos)
            assert shares == pytest.approx(seconds - before[name])
        session.backend.any_policy = False  # as engines
        with pytest.raises(BackendError, match="engines fit the policy"):
            session.begin(PROMPT, policy=chosen[1])
    for number, policy in enumerate(chosen):
        with Session.open(tiny_bundle, policy=policy, threads=1) as session:
            alone = list(session.stream(PROMPT, 6, SEED))
        np.testing.assert_array_equal(
            np.concatenate(alone), np.concatenate([frames[number] for frames in together])
        )
    assert not np.array_equal(together[-1][0], together[-1][1])
