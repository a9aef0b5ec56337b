"""A session has a thread for each core of its process; a resumed render has those it began with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from packforcing.errors import BackendError, BundleError, RenderStopped, ResumeError
from packforcing.runtime import Session, render_record
from tests.helpers import PROMPT, frames_of, render, stop_after


def record_of(path):
    """What an unfinished render runs on."""
    record = render_record.read_record(path.with_name(f"{path.name}.render"))
    assert record is not None
    return record.request["runs on"]


def interrupt(session, path):
    with pytest.raises(RenderStopped):
        render(session, path, on_block=stop_after(session, 3))


@pytest.fixture
def begun(tiny_bundle, tmp_path):
    """A render that was interrupted on 2 threads, and its frames uninterrupted."""
    path = tmp_path / "a.mkv"
    with Session.open(tiny_bundle, threads=2) as session:
        render(session, tmp_path / "whole.mkv")
        interrupt(session, path)
    assert record_of(path) == "onnxruntime, 2 threads, the CPU"
    return path, frames_of(tmp_path / "whole.mkv")


def test_a_resumed_render_has_the_threads_it_began_with(tiny_bundle, begun, monkeypatch):
    path, expected = begun
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Session.open(tiny_bundle) as session:
        assert session.backend.threads == 1
        summary = render(session, path, resume=True)
        assert session.backend.threads == 2
        np.testing.assert_array_equal(frames_of(path), expected)
        assert min(summary.seconds_graphs.values()) >= 0
        # the next video is a new one
        interrupt(session, path.with_name("b.mkv"))
        assert session.backend.threads == 1
    assert record_of(path.with_name("b.mkv")) == "onnxruntime, 1 threads, the CPU"


def test_a_bundle_that_is_gone_closes_the_session(tiny_bundle, begun, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with Session.open(bundle) as session:
        (bundle / "denoiser.onnx").unlink()
        with pytest.raises(BundleError, match="denoiser"):
            render(session, begun[0], resume=True)
        with pytest.raises(BackendError, match="the session is closed"):
            session.stream(PROMPT, 1)


def test_another_number_that_was_chosen_is_refused(tiny_bundle, begun):
    with (
        Session.open(tiny_bundle, threads=1) as session,
        pytest.raises(ResumeError, match="2 threads, the CPU, now onnxruntime, 1 threads"),
    ):
        render(session, begun[0], resume=True)


@pytest.mark.parametrize("count", ["0", "1025", "99999", "9" * 30])
def test_an_absurd_number_in_a_record_is_not_followed(tiny_bundle, begun, count):
    """A record may come from anybody, and each thread takes memory."""
    folder = begun[0].with_name(f"{begun[0].name}.render")
    record = render_record.read_record(folder)
    record.request["runs on"] = f"onnxruntime, {count} threads, the CPU"
    render_record.write_record(folder, record)
    with Session.open(tiny_bundle) as session, pytest.raises(ResumeError, match="runs on was"):
        render(session, begun[0], resume=True)


def test_more_threads_than_cores_are_used_as_requested(tiny_bundle, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Session.open(tiny_bundle, threads=3) as session:
        assert len(np.concatenate(list(session.stream(PROMPT, 0.5))))
        assert session.backend.identity == "onnxruntime, 3 threads, the CPU"
        if sys.platform == "linux":
            assert len(os.listdir("/proc/self/task")) >= 3


@pytest.mark.skipif(not shutil.which("taskset"), reason="binds a process with taskset")
def test_a_bound_process_renders_on_its_own_cores(tiny_bundle):
    code = (
        "import sys; from packforcing.runtime import Session;"
        "print(Session.open(sys.argv[1]).backend.identity)"
    )
    environment = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-c", code]
    printed = subprocess.check_output([*command, str(tiny_bundle)], env=environment, text=True)
    assert printed == "onnxruntime, 1 threads, the CPU\n"
