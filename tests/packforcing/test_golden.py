"""The reference rollout and the runtime against numbers that share no code with them.

`tests/golden` has a rollout in plain NumPy, float64, and the numbers that it gave. The package
computes in float32. Over all blocks of all cases, latents (up to 10) differ by 3e-5 at the most and
pixels by 4e-5, so a tolerance of 1e-4 leaves room for the kernels of other machines. Flows (up to
10) differ by 6e-5 and have twice the tolerance: at timestep 1000 the angles of the time embedding
are 3e-5 off in float32. The closest decision of the selection is 7e-3 apart; float32 changes an
affinity by 2e-6.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from packforcing import Config, Policy
from packforcing.reference import rollout
from packforcing.runtime import Session
from packforcing.runtime.backends import open_backend
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.rollout import Rollout
from packforcing.sampler import draw_noise
from packforcing.transformer import patchify, unpatchify
from tests.golden import self_forcing
from tests.golden.cases import CASES, FOLDER, TINY, Case, make_text, make_weights, thumbnails
from tests.helpers import make_model

CHECKOUT = Path(__file__).parents[2]
TOLERANCE, FLOW_TOLERANCE = 1e-4, 2e-4
UNITS = round(TOLERANCE * 65535)  # of stored pixels

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# the bundle that all tests share is that of the tiny model
each_tiny_case = pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.model is TINY], ids=lambda case: case.name
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads slow down products of this size, tenfold on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_config(case: Case) -> Config:
    return Config(**case.model, **case.sampler, policy=Policy(**case.policy))


def load_golden(case: Case, folder: Path = FOLDER) -> dict[str, np.ndarray]:
    with np.load(folder / f"{case.name}.npz") as file:
        return dict(file)


def selected(row: np.ndarray) -> list[int]:
    """The blocks of a stored row, without what fills it up."""
    return [int(block) for block in row if block >= 0]


def assert_near(actual, expected, tolerance=TOLERANCE) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def assert_pictured(frames, expected, units=UNITS) -> None:
    """Compare frames [n, 3, H, W] in 0..1 with stored thumbnails."""
    assert_near(thumbnails(frames).astype(int), expected.astype(int), units)


@each_case
def test_reference_equals_golden_data(case):
    config, expected = make_config(case), load_golden(case)
    model = make_model(config, make_weights(case.model))
    text = torch.from_numpy(make_text(case.model))[None]
    noise = lambda block, draw: draw_noise(config, case.seed, block, draw)  # noqa: E731
    for block in rollout(model, text, case.blocks, noise):
        flow = unpatchify(block.first_flow[None], config.grid, config.patch)[0]
        assert block.read == selected(expected["read"][block.index])
        assert_near(flow.numpy(), expected["first_flow"][block.index], FLOW_TOLERANCE)
        assert_near(block.latents.numpy(), expected["latents"][block.index])
        assert_pictured(block.frames.numpy(), expected["frames"][block.index])


@pytest.fixture(scope="module")
def backend(tiny_bundle):
    manifest = read_manifest(tiny_bundle)
    backend = open_backend("onnxruntime", tiny_bundle, manifest, manifest.config, threads=1)
    yield backend
    backend.close()


@each_tiny_case
def test_runtime_equals_golden_data(case, backend):
    config, expected = make_config(case), load_golden(case)
    text = np.zeros((1, config.text_len, config.text_dim), np.float32)
    text[0, : len(make_text(TINY))] = make_text(TINY)
    video = Rollout(config, backend)
    video.begin(text, case.blocks, case.seed)
    for index in range(case.blocks):
        video.next_block()
        assert video.read == selected(expected["read"][index])
        assert_near(video.buffers.latents.host[0], expected["latents"][index])
        assert_pictured(video.buffers.pixels.host[0], expected["frames"][index])


def test_session_streams_golden_frames(tiny_bundle):
    """Frames as users get them: 8 bits, without those that stand for time before the video."""
    case = CASES["packforcing"]
    config, expected = make_config(case), load_golden(case)
    frame_count = case.blocks * config.block_pixel_frames - config.trimmed_frames
    read = []
    with Session.open(tiny_bundle, threads=1) as session:
        stream = session.stream(
            make_text(TINY),
            frame_count / config.fps,
            case.seed,
            on_block=lambda block: read.append(block.read),
        )
        frames = np.concatenate(list(stream)).transpose(0, 3, 1, 2)
    assert read == [selected(row) for row in expected["read"]]
    rounding = round(65535 / 255 / 2)
    assert_pictured(frames / 255, np.concatenate(expected["frames"])[3:], rounding + UNITS)


def test_golden_selection_follows_neither_age_nor_the_choice_before():
    case = CASES["packforcing"]
    sink, mid, recent = (case.policy[name] for name in ("sink", "mid", "recent"))
    choices = set()
    for index, row in enumerate(load_golden(case)["read"]):
        archive = list(range(sink, index - recent))
        if len(archive) <= mid:
            assert selected(row) == archive
        elif selected(row) not in (archive[:mid], archive[-mid:]):
            choices.add(tuple(selected(row)))
    assert len(choices) > 1


def run_alone(module: str, folder: Path) -> Path:
    """Run a module of `tests.golden` where nothing can be imported that its data are to prove."""
    program = (
        "import sys; sys.modules.update(packforcing=None, torch=None, onnxruntime=None); "
        f"from tests.golden.{module} import main; main()"
    )
    command = [sys.executable, "-c", program, "--folder", str(folder)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=CHECKOUT, env=environment)
    return folder


@pytest.fixture(scope="module")
def recomputed(tmp_path_factory) -> Path:
    return run_alone("make_golden", tmp_path_factory.mktemp("recomputed"))


@each_case
def test_numpy_rollout_yields_the_stored_data(case, recomputed):
    computed, expected = load_golden(case, recomputed), load_golden(case)
    assert computed["read"].tolist() == expected["read"].tolist()
    assert_near(computed["first_flow"], expected["first_flow"], 1e-6)
    assert_near(computed["latents"], expected["latents"], 1e-6)
    assert_near(computed["frames"].astype(int), expected["frames"].astype(int), 1)


published_only = pytest.mark.skipif(
    not self_forcing.PUBLISHED.is_dir(),
    reason=f"there is no {self_forcing.PUBLISHED} with Self-Forcing's own numbers",
)
each_published_policy = pytest.mark.parametrize("name", self_forcing.POLICIES)


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    return self_forcing.load_published()


@published_only
@each_published_policy
def test_reference_equals_self_forcing(name, published):
    config = Config(
        name="self-forcing-tiny", height=64, width=96, fps=16, dim=256, heads=2, layers=3,
        ffn_dim=512, block_frames=3, text_encoder="umt5-xxl", text_len=16, text_dim=48,
        vae_encoder_width=8, vae_decoder_widths=(8, 8, 8, 8),
        policy=Policy(**self_forcing.POLICIES[name]),
    )  # fmt: skip

    def noise(block: int, draw: int) -> np.ndarray:
        latents = torch.from_numpy(self_forcing.pick_noise(published, block, draw))
        return patchify(latents[None], config.patch)[0].numpy()

    model = make_model(config, self_forcing.load_weights())
    text = torch.from_numpy(published["text"])
    for block in rollout(model, text, self_forcing.BLOCKS, noise):
        frames = slice(3 * block.index, 3 * block.index + 3)
        flow = unpatchify(block.first_flow[None], config.grid, config.patch)
        assert_near(block.latents.numpy(), published[f"{name}_latents"][0, frames])
        assert_near(flow.numpy(), published[f"{name}_flow_first"][block.index])


@pytest.fixture(scope="module")
def numpy_of_published(tmp_path_factory) -> Path:
    return run_alone("self_forcing", tmp_path_factory.mktemp("published"))


@published_only
@each_published_policy
def test_numpy_rollout_equals_self_forcing(name, published, numpy_of_published):
    with np.load(numpy_of_published / f"{name}.npz") as computed:
        latents, flows = computed["latents"], computed["first_flow"]
    assert_near(np.concatenate(latents), published[f"{name}_latents"][0])
    assert_near(flows, published[f"{name}_flow_first"][:, 0])
