"""A tiny model that differs from the demo on every axis, and its bundle, made once."""

from __future__ import annotations

import functools
import os
import shutil
import signal
from pathlib import Path

# Models of the tests are tiny: a thread per core costs more than it gains, most on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from packforcing import Config
from packforcing.config import Precision
from tests.helpers import PROMPT, SEED, TINY, make_tiny_model

# A shell's background job ignores Ctrl-C and nohup ignores SIGHUP, and so would the programs that
# tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    return TINY


@pytest.fixture(scope="session")
def tiny_model():
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model, tmp_path_factory) -> Path:
    from packforcing.export import export_bundle

    directory = tmp_path_factory.mktemp("bundles") / "tiny"
    export_bundle(tiny_model.config, tiny_model.weights(), directory)
    return directory


@pytest.fixture(scope="session")
def tiny_half_bundle(tiny_model, tmp_path_factory) -> Path:
    """The same weights, computed in float16."""
    import msgspec

    from packforcing.export import export_bundle

    half = Precision(compute="fp16", weights="fp16", cache="fp16")
    config = msgspec.structs.replace(tiny_model.config, precision=half)
    directory = tmp_path_factory.mktemp("bundles") / "tiny-half"
    export_bundle(config, tiny_model.weights(), directory)
    return directory


@pytest.fixture(scope="module", params=["host", "gpu"])
def session(request, tiny_bundle):
    """The tiny model's, on the host and on an emulated GPU."""
    from packforcing.runtime import Session
    from tests.emulated import gpu_session

    with Session.open(tiny_bundle) as session:
        if request.param == "gpu":
            session = gpu_session(session)
        yield session


@pytest.fixture(scope="module")
def reference(tiny_model):
    """The reference's blocks for PROMPT and SEED, each video made once."""
    import msgspec
    import torch

    from packforcing.model import Model
    from packforcing.reference import rollout
    from packforcing.sampler import draw_noise
    from packforcing.words import encode_words

    @functools.cache
    def blocks(count, policy=None, clip=None):
        config = msgspec.structs.replace(TINY, policy=policy) if policy else TINY
        parts = tiny_model.transformer, tiny_model.autoencoder, tiny_model.compressor
        text = torch.from_numpy(encode_words(PROMPT, config))
        noise = lambda block, step: draw_noise(config, SEED, block, step)  # noqa: E731
        return list(rollout(Model(config, *parts), text, count, noise, seed=SEED, clip=clip))

    return blocks


@pytest.fixture
def browser():
    """Chromium as the system has it, driven by Playwright: with H.264, which Playwright's lacks.

    One per test: Playwright keeps an event loop in this thread while it runs.
    """
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium or Chrome is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_on_phone(browser):
    """Open a page 390 pixels wide, with all that is folded, and check that nothing is wider."""

    def open_page(path: Path):
        page = browser.new_page(viewport={"width": 390, "height": 844}, is_mobile=True)
        errors: list[object] = []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert not errors
        return page

    return open_page
