"""Jobs in a folder: what a restart, a cancellation and a foreign file do to them."""

import dataclasses
import json
import threading

import msgspec
import pytest

from packforcing.app.jobs.execute import begin_video
from packforcing.app.jobs.records import Draft, read_draft
from packforcing.app.jobs.room import Room
from packforcing.app.jobs.store import Store
from packforcing.app.jobs.worker import Worker
from packforcing.errors import ConfigError, OutputError, ResumeError
from packforcing.files import seal_json
from packforcing.prompts import Switch
from packforcing.runtime import Session
from packforcing.words import encode_words
from tests.helpers import PROMPT

CIRCLE = "a blue circle over sand"


@pytest.fixture(scope="module")
def session(tiny_bundle):
    with Session.open(tiny_bundle, threads=1) as session:
        yield session


class Interrupted(Store):
    """A store whose process ends, or does something else, once a job has a block."""

    def __init__(self, folder, session, then=Store.close):
        super().__init__(folder, session.manifest, session.config)
        self.then, self.releases = then, threading.Semaphore(0)

    def report_frames(self, frames):
        super().report_frames(frames)
        self.then(self)

    def release(self, result):
        ended = super().release(result)
        self.releases.release()
        return ended


def open_store(folder, session):
    return Store(folder, session.manifest, session.config)


def draft(session, seconds=6.0, **changes):
    rows = encode_words(CIRCLE, session.config)[0, :2]
    switches = [Switch(0, PROMPT), Switch(3, rows, "recompute", 2)]
    return dataclasses.replace(Draft(switches, seconds, seed=7), **changes)


def work(session, store, available_bytes=None):
    """Render until the store is closed or no job is left."""
    worker = Worker(session, store, Room(session, available_bytes))
    closing = store.release

    def release(result):
        ended = closing(result)
        if not store.queued:
            store.close()
        return ended

    store.release = release
    if not store.queued:
        store.close()
    worker.start()
    worker.join()


def undisturbed(session, draft, path):
    session.render(draft.prompts, draft.seconds, path, draft.seed, policy=draft.policy)
    return path.read_bytes()


def test_a_job_goes_on_after_a_restart_and_gives_the_same_video(session, tmp_path):
    """With embeddings, a blend, and a job behind it."""
    with Interrupted(tmp_path / "jobs", session) as store:
        first = store.add(draft(session)).record.id
        second = store.add(draft(session, 2.0, prompts=[Switch(0, PROMPT)])).record.id
        work(session, store)
        assert store.queued == 2 and store.get(first).status == "queued"
        assert (store.folder / f"{first}.mp4.render" / "checkpoint.json").exists()
    with open_store(tmp_path / "jobs", session) as store:
        assert [job.record.id for job in store.list(5, newest_first=False)] == [first, second]
        assert [store.get(name).position for name in (first, second)] == [0, 1]
        work(session, store)
        jobs = [store.get(name) for name in (first, second)]
        assert [job.status for job in jobs] == ["completed", "completed"]
        assert jobs[0].video.read_bytes() == undisturbed(
            session, draft(session), tmp_path / "undisturbed.mp4"
        )
        assert sorted(path.name for path in store.folder.iterdir() if first in path.name) == [
            f"{first}.json", f"{first}.mp4", f"{first}.prompt-2.safetensors",
        ]  # fmt: skip


def test_a_video_that_is_there_is_not_rendered_again(session, tmp_path):
    """A kill came between the video's name and the job's result."""
    with open_store(tmp_path, session) as store:
        name = store.add(draft(session, 2.0)).record.id
        store.get(name).video.write_bytes(b"whole")
        work(session, store)
        assert store.get(name).status == "completed"
        assert store.get(name).video.read_bytes() == b"whole"


def test_a_render_of_another_release_begins_again(session, tmp_path):
    with Interrupted(tmp_path / "jobs", session) as store:
        name = store.add(draft(session)).record.id
        work(session, store)
        checkpoint = store.folder / f"{name}.mp4.render" / "checkpoint.json"
        checkpoint.write_bytes(checkpoint.read_bytes().replace(b"packforcing", b"packforming"))
    with open_store(tmp_path / "jobs", session) as store:
        work(session, store)
        assert store.get(name).video.read_bytes() == undisturbed(
            session, draft(session), tmp_path / "undisturbed.mp4"
        )


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_a_job_may_end_while_it_is_rendered(session, tmp_path, end):
    with open_store(tmp_path, session) as store:
        name = store.add(draft(session)).record.id
    with Interrupted(tmp_path, session, lambda store: getattr(store, end)(name)) as store:
        work(session, store)
        left = {path.name for path in tmp_path.iterdir()} - {"server.lock"}
        if end == "delete":
            assert store.get(name) is None and not left
        else:
            assert store.get(name).status == "cancelled" and store.get(name).began
            assert left == {f"{name}.json", f"{name}.prompt-2.safetensors"}
            assert store.cancel(name).status == "cancelled"
    with open_store(tmp_path, session) as store:
        assert not store.queued


def test_only_leftovers_of_this_store_are_swept(session, tmp_path):
    with open_store(tmp_path, session) as store:
        job = store.add(draft(session, start=b"picture"))
        spare = store.spare_path(".mp4")
        spare.write_bytes(b"a recording that was never finished")
        others = ["mine.mp4", "video_1.mp4", "notes.json", "videos"]
        for name in others:
            (tmp_path / name).write_text("mine")
    with open_store(tmp_path, session) as store:
        assert not spare.exists()
        assert all((tmp_path / name).read_text() == "mine" for name in others)
        assert read_draft(tmp_path, job.record).start == b"picture"
        assert store.delete(job.record.id) and not store.delete(job.record.id)
        assert {path.name for path in tmp_path.iterdir()} == {*others, "server.lock"}


def test_a_recording_is_a_job_that_is_completed(session, tmp_path):
    with open_store(tmp_path, session) as store:
        path = store.spare_path(".mp4")
        path.write_bytes(b"recorded")
        job = store.add_recording(draft(session), path, 30)
        assert (job.status, job.frames, job.record.recorded) == ("completed", 30, True)
        assert job.video.read_bytes() == b"recorded" and not path.exists() and not store.queued


def test_a_folder_that_cannot_be_used_says_why(session, tmp_path):
    with open_store(tmp_path, session) as store:
        job = store.add(draft(session))
        with pytest.raises(OutputError, match="another server has"):
            open_store(tmp_path, session)
    path = tmp_path / f"{job.record.id}.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"seed":7', b'"seed":8'))
    with pytest.raises(ResumeError, match="damaged"):
        open_store(tmp_path, session)
    path.write_bytes(whole)
    record = json.loads(whole)["job"] | {"version": 2}
    path.write_bytes(seal_json("job", json.dumps(record).encode()))
    with pytest.raises(ResumeError, match="update packforcing"):
        open_store(tmp_path, session)
    path.write_bytes(whole)
    other = msgspec.structs.replace(session.manifest, tools={"made": "elsewhere"})
    with pytest.raises(ConfigError, match="jobs of another bundle"):
        Store(tmp_path, other, session.config)
    with open_store(tmp_path, session) as store:  # its lock is free again
        assert store.queued == 1


def test_a_failure_is_told_and_the_next_job_is_rendered(session, tmp_path):
    with open_store(tmp_path, session) as store:
        broken = store.add(draft(session, 2.0, start=b"no picture")).record.id
        whole = store.add(draft(session, 2.0, prompts=[Switch(0, PROMPT)])).record.id
        work(session, store)
        assert store.get(broken).status == "failed"
        assert "cannot start from" in store.get(broken).record.result.error
        assert store.get(whole).status == "completed"


def test_a_job_waits_while_a_live_video_has_the_memory(session, tmp_path):
    """It is interrupted when the live video begins, and goes on after its end."""
    live = session.begin(PROMPT, archive_limit=6)
    needed = Room(session).video_bytes(live)
    began, room = threading.Event(), Room(session, needed + 1000)
    with Interrupted(tmp_path, session, lambda store: began.set()) as store:
        worker = Worker(session, store, room)
        job = store.add(draft(session)).record.id
        assert room.fits(begin_video(session, draft(session), None))
        assert not room.fits(live, live)
        worker.start()
        assert began.wait(60)
        with worker.beside(live), live:
            for _ in range(2):  # it is interrupted, and does not begin again
                assert store.releases.acquire(timeout=60)
            assert store.get(job).status == "queued"
            for _ in range(3):
                next(live)
            assert store.get(job).status == "queued"
        store.release, release = lambda result: (release(result), store.close())[0], store.release
        worker.join()
        assert store.get(job).status == "completed"
    with pytest.raises(ConfigError, match="GiB of host memory"):
        Room(session, needed - 1).check(live)
