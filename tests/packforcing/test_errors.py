"""Every exception of this project survives pickling and copying, as process pools need it."""

from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from packforcing.errors import MissingDependency, PackForcingError, PlanError, PromptWarning
from packforcing.files import VersionError

ARGUMENTS = {"str": "what, where,\nwhat to do", "int": 5 << 30}  # by the parameter's type
for module in (
    "checkpoints.fetch",
    "checkpoints.lora",
    "runtime.session",
    "export.engines",
    "app.jobs.worker",
):
    importlib.import_module(f"packforcing.{module}")  # they may have errors of their own


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from subclasses(subclass)


def make_error(kind: type[Exception]) -> Exception:
    """Make an exception, with a value for each argument that its constructor names."""
    if "__init__" not in vars(kind):
        return kind(ARGUMENTS["str"])
    parameters = inspect.signature(kind).parameters.values()
    return kind(*(ARGUMENTS[parameter.annotation] for parameter in parameters))


def assert_same(again: BaseException, error: BaseException) -> None:
    assert type(again) is type(error) and str(again) == str(error) == ARGUMENTS["str"]
    assert again.args == error.args and vars(again) == vars(error)


@pytest.mark.parametrize("kind", [*subclasses(PackForcingError), VersionError, PromptWarning])
def test_every_error_survives_pickling_and_copying(kind):
    error = make_error(kind)
    error.add_note("a note")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert_same(pickle.loads(pickle.dumps(error, protocol)), error)
    assert_same(copy.copy(error), error)
    assert_same(copy.deepcopy(error), error)


def test_every_error_survives_the_serialization_of_ray():
    ray_pickle = pytest.importorskip("ray.cloudpickle", reason="Ray is not installed")
    for kind in subclasses(PackForcingError):
        error = make_error(kind)
        assert_same(pickle.loads(ray_pickle.dumps(error)), error)


def test_attributes_survive_pickling():
    assert pickle.loads(pickle.dumps(PlanError("too small", smallest=7))).smallest == 7
    missing = MissingDependency("install it", name="torch")
    assert pickle.loads(pickle.dumps(missing)).name == "torch"


def raise_error(kind: type[Exception]) -> None:
    try:
        raise OSError("the cause")
    except OSError as cause:
        raise make_error(kind) from cause


def test_errors_pass_from_a_process_of_a_pool():
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawned) as pool:
        for kind in (PlanError, MissingDependency, PackForcingError):
            assert_same(pool.submit(raise_error, kind).exception(), make_error(kind))
