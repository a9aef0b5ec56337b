"""A session of the tiny model, and the frames of a video that nothing happened to."""

from __future__ import annotations

import numpy as np
import pytest

from packforcing.runtime import Session
from tests.helpers import PROMPT
from tests.helpers import RENDER_SECONDS as SECONDS
from tests.helpers import RENDER_SEED as SEED


@pytest.fixture(scope="module")
def plain(tiny_bundle):
    with Session.open(tiny_bundle) as session:
        yield session


@pytest.fixture(scope="module")
def truth(plain) -> np.ndarray:
    return np.concatenate(list(plain.stream(PROMPT, SECONDS, SEED)))
