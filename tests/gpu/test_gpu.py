"""What only a card can show: every GPU backend against ONNX Runtime on the CPU, in fp16.

    pytest -m gpu tests/gpu

Without a card all of this is skipped, but for the emulated one, which shows that the tests
themselves are sound.
"""

from collections import Counter

import msgspec
import numpy as np
import pytest

from packforcing import model_config
from packforcing.config import Precision
from packforcing.errors import BackendError, MissingDependency
from packforcing.export import export_bundle
from packforcing.export.engines import build_engines
from packforcing.model import open_weights
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.allocations import allocations
from packforcing.runtime.backends import BACKENDS, ENGINE_BACKENDS
from packforcing.runtime.device import CudaDevice
from packforcing.runtime.doctor import CHECKS
from packforcing.runtime.rollout import Rollout
from packforcing.words import encode_words
from tests.emulated import gpu_session

PROMPT = "a red star over navy stripes"
HALF = Precision(compute="fp16", weights="fp16", cache="fp16")
BLOCKS = 12  # every partition is full after nine
ON_CARD = [pytest.param(name, marks=pytest.mark.gpu) for name in BACKENDS if name != "onnxruntime"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The demo model in fp16."""
    weights = demo_bundle().parent / "model.safetensors"
    config = msgspec.structs.replace(model_config("demo"), precision=HALF)
    folder = tmp_path_factory.mktemp("gpu") / "bundle"
    export_bundle(config, open_weights(config, weights), folder)
    return folder


@pytest.fixture(scope="module")
def ready(request):
    """Skips what this machine cannot run; builds engines where they are needed."""

    def prepare(backend):
        try:
            CHECKS[f"run with {backend}"]()
        except (BackendError, MissingDependency) as error:
            pytest.skip(str(error))
        if backend in ENGINE_BACKENDS:
            device = CudaDevice()
            build_engines(request.getfixturevalue("bundle"), [device.target], backend=backend)
            device.close()

    return prepare


@pytest.fixture(scope="module", params=["emulated", *ON_CARD])
def sessions(request, ready):
    """A session on the card and one of the same bundle on the CPU."""
    emulated = request.param == "emulated"
    if not emulated:
        ready(request.param)
    bundle = request.getfixturevalue("tiny_half_bundle" if emulated else "bundle")
    backend = "onnxruntime" if emulated else request.param
    with Session.open(bundle, backend=backend) as on_card, Session.open(bundle) as on_cpu:
        if emulated:
            on_card = gpu_session(on_card)
        yield on_card, on_cpu


@pytest.fixture
def session(sessions):
    return sessions[0]


def begin(session) -> Rollout:
    run = Rollout(session.config, session.backend)
    run.begin(encode_words(PROMPT, session.config), BLOCKS, seed=0)
    return run


def test_blocks_equal_the_cpu_given_the_same_history(sessions):
    """Within 1% of the largest latent and 2% of full scale in frames: both sides round."""
    run, expected = map(begin, sessions)
    for _ in range(BLOCKS):
        run.select = lambda *_: np.array(sorted(expected.cache.mids), int)
        expected.next_block()
        truth = expected.buffers.latents.host[0]
        run.place()
        run.denoise()
        run.buffers.latents_as_patches[...] = run.buffers.tokens_as_latents
        error = np.abs(run.buffers.latents.host[0] - truth).max()
        assert error <= 0.01 * np.abs(truth).max()
        run.next_block(clean=truth)
        frames = expected.buffers.pixels.host
        np.testing.assert_allclose(run.buffers.pixels.host, frames, atol=0.02)


def test_buffers_take_what_the_plan_says(session):
    _run = begin(session)  # holds the buffers
    stated = Counter[str]()
    for entry in allocations(session.config):
        if entry.place == "device":
            stated[entry.purpose] += entry.nbytes
    allocated = +session.backend.device.allocated
    assert {name: allocated[name] for name in stated} == stated
    assert allocated.keys() - stated.keys() <= {"scratch"}


def test_nothing_is_allocated_after_warm_up(session):
    """Free memory, as the driver tells it; nobody else may use the card meanwhile."""
    run = begin(session)
    run.next_block()
    run.next_block()
    before = session.backend.device.free_memory()
    for _ in range(BLOCKS - 2):
        run.next_block()
    assert session.backend.device.free_memory() == before


def test_garbage_beyond_the_length_is_never_read(session):
    clean, dirty = begin(session), begin(session)
    context, device = dirty.buffers.context, session.backend.device
    for _ in range(3):
        valid = dirty.cache.layout().valid
        shape = (*context.shape[:-2], context.shape[-2] - valid, context.shape[-1])
        garbage = device.allocate("test", shape, context.dtype, host=True)
        garbage.host[...] = 1e4 * np.random.default_rng(0).standard_normal(shape)
        device.upload(garbage)
        device.copy_tokens(garbage, context, valid)
        for run in (clean, dirty):
            run.next_block()
        np.testing.assert_array_equal(dirty.buffers.pixels.host, clean.buffers.pixels.host)


@pytest.mark.gpu
def test_compiled_kernels_are_kept_for_the_next_start(ready, request):
    """The second start finds all kernels in the cache and leaves it as it was."""
    ready("tensorrt-rtx")
    bundle = request.getfixturevalue("bundle")
    caches = []
    for _ in range(2):
        with Session.open(bundle, backend="tensorrt-rtx") as session:
            begin(session).next_block()
        caches.append((bundle / "engines" / "tensorrt-rtx" / "runtime.cache").read_bytes())
    assert caches[0] and caches[0] == caches[1]
