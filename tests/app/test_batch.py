"""Batches: files of jobs are checked whole, done is done, and workers share and resume the work."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children

import numpy as np
import pytest
from PIL import Image

from packforcing.app.jobs import batch
from packforcing.app.jobs.batch import add_job, share_of
from packforcing.app.jobs.batch_file import BatchFile
from packforcing.app.jobs.events import Began, Ended, Made
from packforcing.app.jobs.pool import Stop, Work, render_here, render_in_processes
from packforcing.app.jobs.records import read_record, record_path, video_path
from packforcing.embeddings import Embedding, save_embedding
from packforcing.presets import policies
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.render_lock import locked_folder
from tests.helpers import TINY
from tests.helpers import run as run_command

RED, BLUE = "a red star over navy stripes", "a blue circle over sand dots"


def run(*args):
    result = run_command("batch", *args)
    return result.exit_code, result.stdout, result.stderr


def read_batch(path, text, **changes):
    path.write_text(text, encoding="utf-8")
    values = {"seconds": 1, "seed": 0, "policy": None, "encoding": False, "one_policy": False}
    return BatchFile(path, TINY, policies(TINY), **{**values, **changes})


@pytest.mark.parametrize(
    ("name", "line", "mistake"),
    [
        ("a.jsonl", '{"prompt": "a red star", "promt": 1}', "unknown field `promt`"),
        ("a.jsonl", '{"prompt": "a red star"', "truncated"),
        ("a.jsonl", '{"id": "x"}', "one of prompt, embedding and schedule"),
        ("a.jsonl", '{"prompt": "a red star", "schedule": "s.toml"}', "one of prompt"),
        ("a.jsonl", '{"prompt": " "}', "the prompt is empty"),
        ("a.jsonl", '{"prompt": "a fox"}', "fox"),
        ("a.jsonl", '{"embedding": "gone.safetensors"}', "gone.safetensors"),
        ("a.jsonl", '{"schedule": "gone.toml"}', "gone.toml"),
        ("a.jsonl", '{"prompt": "a red star", "start": "gone.png"}', "gone.png"),
        ("a.jsonl", '{"prompt": "a red star", "policy": "none"}', "unknown policy 'none'"),
        ("a.jsonl", '{"prompt": "a red star", "seconds": -1}', "seconds"),
        ("a.jsonl", '{"prompt": "a red star", "seed": -1}', "seed"),
        ("a.jsonl", '{"prompt": "a red star", "seed": 1, "seeds": [2]}', "not both"),
        ("a.jsonl", '{"prompt": "a red star", "seeds": [2, 2]}', "different numbers"),
        ("a.jsonl", '{"prompt": "a red star", "id": "../x"}', "no safe file name"),
        ("a.jsonl", '{"prompt": "a red star", "id": "FINE"}', "that of line 1"),
        ("a.csv", "a red star,,5", "3 cells under 2"),
        ("a.csv", "x,a red star", "Expected `float"),
        ("a.txt", "a fox", "fox"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_number(tmp_path, name, line, mistake):
    before = {
        "jsonl": ['{"id": "fine", "prompt": "a red star"}', ""],
        "csv": ["seconds, prompt", "1,a blue circle"],
        "txt": ["a red star", "a red star"],
    }[name.partition(".")[2]]
    path = tmp_path / name
    file = read_batch(path, "\n".join([*before, line, "", line]))
    numbered = [text.split(": ", 1) for text in file.mistakes]
    assert [where for where, _ in numbered] == [f"{path}, line {number}" for number in (3, 5)]
    assert all(mistake in why for _, why in numbered)
    assert file.jobs  # the others were checked as well


def test_the_three_formats_name_the_same_jobs(tmp_path):
    Image.new("RGB", (96, 64)).save(tmp_path / "start.png")
    jsonl = read_batch(
        tmp_path / "a.jsonl",
        json.dumps({"prompt": RED, "seeds": [3, 4], "start": "start.png"})
        + "\n"
        + json.dumps({"prompt": BLUE, "seconds": 2, "policy": "full-history"}),
    )
    table = read_batch(
        tmp_path / "a.csv",
        f"prompt,seeds,start,seconds,policy\n{RED},3 4,start.png,,\n{BLUE},,,2,full-history\n",
    )
    assert not jsonl.mistakes and jsonl.jobs == table.jobs
    star = "a-red-star-over-navy-stripes"
    assert [job.id for job in table.jobs] == [
        f"{star}-s3", f"{star}-s4", "a-blue-circle-over-sand-dots",
    ]  # fmt: skip
    words = read_batch(tmp_path / "a.txt", f"{RED}\n\n{RED}\n", seed=3)
    assert [(job.id, job.seed) for job in words.jobs] == [(star, 3), (f"{star}-3", 3)]


def test_every_job_is_in_one_shard():
    jobs = [*range(11)]
    for count in (1, 3, 11, 12):
        shards = [share_of(jobs, (number, count)) for number in range(1, count + 1)]
        assert sorted(job for shard in shards for job in shard) == jobs
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_done_is_done_and_what_changed_is_rendered_again(tiny_bundle, tmp_path):
    """One run after the other on a folder, each with other jobs."""
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    rows = [
        {"id": "one", "prompt": RED, "seconds": 1},
        {"id": "two", "embedding": "blue.safetensors", "seconds": 1},
        {"id": "three", "prompt": BLUE, "seconds": 1, "start": "start.png"},
    ]

    def embed(value):
        embedding = Embedding(np.full((2, TINY.text_dim), value, np.float32), "blue", "", "")
        save_embedding(tmp_path / "blue.safetensors", embedding)

    def render(*options):
        jobs.write_text("\n".join(map(json.dumps, rows)))
        before = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
        code, _, stderr = run(jobs, "--out", out, "--bundle", tiny_bundle, *options)
        after = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
        return code, stderr, {path.stem for path in after if before.get(path) != after[path]}

    embed(0.5)
    Image.new("RGB", (96, 64), "red").save(tmp_path / "start.png")
    assert render()[::2] == (0, {"one", "two", "three"})
    assert [*out.glob("*.render")] == []
    with Session.open(tiny_bundle) as session:
        session.render(RED, 1, tmp_path / "alone.mp4", 0)
    assert video_path(out, "one").read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    assert render()[::2] == (0, set())

    rows[0]["seed"] = 7
    embed(0.25)
    code, stderr, rendered = render()
    assert (code, rendered) == (0, {"one", "two"})
    assert "one: changed: seed" in stderr and "two: changed: prompt" in stderr

    Image.new("RGB", (96, 64), "blue").save(tmp_path / "start.png")
    video_path(out, "two").unlink()
    code, stderr, rendered = render()
    assert (code, rendered) == (0, {"two", "three"})
    assert "three: changed: start" in stderr and "two: its video is missing" in stderr
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(line["id"], line["status"], line["seed"]) for line in lines] == [
        ("one", "completed", 7), ("two", "completed", 0), ("three", "completed", 0),
    ]  # fmt: skip


def test_a_mistake_that_shows_late_is_a_result(tiny_bundle, tmp_path, monkeypatch):
    """Here the embedding is damaged after it was checked; the other job is rendered."""

    def add_and_damage(folder, job, *args):
        write(folder, job, *args)
        (folder / "bad.prompt-1.safetensors").write_bytes(b"")

    write = batch.add_job
    monkeypatch.setattr(batch, "add_job", add_and_damage)
    rows = np.full((2, TINY.text_dim), 0.5, np.float32)
    save_embedding(tmp_path / "red.safetensors", Embedding(rows, "red", "", ""))
    jobs, out = tmp_path / "jobs.csv", tmp_path / "out"
    jobs.write_text(f"id,embedding,prompt,seconds\nbad,red.safetensors,,1\ngood,,{RED},1\n")
    command = jobs, "--out", out, "--bundle", tiny_bundle
    code, stdout, stderr = run(*command)
    assert code == 1 and "1 of 2 videos" in stdout
    failures = [line for line in stderr.splitlines() if line.startswith("bad: failed: ")]
    assert "bad.prompt-1.safetensors" in failures[0]
    assert {path.name for path in out.glob("*.mp4")} == {"good.mp4"}
    monkeypatch.undo()
    shutil.copy(tmp_path / "red.safetensors", out / "bad.prompt-1.safetensors")
    assert run(*command)[0] == 1  # a failure stands
    assert read_record(record_path(out, "bad")).result.status == "failed"
    assert run(*command, "--retry-failed")[0] == 0
    assert {path.name for path in out.glob("*.mp4")} == {"bad.mp4", "good.mp4"}


def test_several_mistakes_are_shown_at_once_and_nothing_is_written(tiny_bundle, tmp_path):
    jobs, out = tmp_path / "jobs.txt", tmp_path / "out"
    jobs.write_text(f"{RED}\na fox\na hen\n")
    code, stdout, stderr = run(jobs, "--out", out, "--bundle", tiny_bundle)
    assert (code, stdout, out.exists()) == (2, "", False)
    assert "line 2" in stderr and "line 3" in stderr
    assert stderr.splitlines()[-1].startswith("error: 2 lines of")


def prepare(folder, bundle, seconds_by_id):
    """Write jobs as the command does; the prompt and the seed differ."""
    config = read_manifest(bundle).config
    path = folder.parent / f"{folder.name}.jsonl"
    rows = [
        {"id": name, "prompt": (RED, BLUE)[number % 2], "seed": number, "seconds": seconds}
        for number, (name, seconds) in enumerate(seconds_by_id.items())
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    file = BatchFile(
        path, config, {}, seconds=1, seed=0, policy=None, encoding=False, one_policy=False
    )
    folder.mkdir()
    for job in file.jobs:
        add_job(folder, job, "new", config, "")
    return file.jobs


def render_alone(bundle, jobs, folder):
    """Render jobs without any of this; return the bytes by ID."""
    folder.mkdir()
    with Session.open(bundle) as session:
        for job in jobs:
            session.render(job.prompts, job.seconds, folder / f"{job.id}.mp4", job.seed)
    return {path.stem: path.read_bytes() for path in folder.glob("*.mp4")}


def test_a_killed_worker_is_replaced_and_its_video_is_the_same(tiny_bundle, tmp_path):
    """Two processes on four jobs; one of them is killed inside a video, past its snapshot."""
    out = tmp_path / "out"
    jobs = prepare(out, tiny_bundle, {"a": 24, "b": 24, "c": 1, "d": 1})
    alone = render_alone(tiny_bundle, jobs, tmp_path / "alone")
    events, killed = [], []

    def note(worker, event):
        events.append((worker, event))
        if isinstance(event, Made) and event.frames > 22 * TINY.fps and not killed:
            for child in active_children():
                if child.name == f"packforcing worker {worker + 1}":
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append(event.id)

    work = Work(tiny_bundle, out, tuple(job.id for job in jobs), threads=1)
    render_in_processes([work, work], note, Stop())
    assert {path.stem: path.read_bytes() for path in out.glob("*.mp4")} == alone
    begun = [event.id for _, event in events if isinstance(event, Began)]
    assert sorted(begun) == sorted([*alone, *killed])  # each once, and the killed one again
    assert [*out.glob("*.render")] == []
    after_kill = [event for _, event in events if isinstance(event, Made) and event.id in killed]
    assert any(event.recovered for event in after_kill)


def test_jobs_of_another_run_are_waited_for_and_taken_over(tiny_bundle, tmp_path):
    """Here the other run is this test, which has the lock until the other job has ended."""
    out = tmp_path / "out"
    prepare(out, tiny_bundle, {"a": 1, "b": 1})
    order = []
    with locked_folder(video_path(out, "a")) as locked:

        def note(event):
            if isinstance(event, Ended):
                order.append(event.id)
                if event.id == "b":
                    locked.remove()

        render_here(Work(tiny_bundle, out, ("a", "b")), note, Stop())
    assert order == ["b", "a"]


def test_ctrl_c_ends_all_resumably(tiny_bundle, tmp_path):
    jobs, out = tmp_path / "jobs.txt", tmp_path / "out"
    jobs.write_text(f"{RED}\n{BLUE}\n")
    command = [
        sys.executable, "-m", "packforcing.app.cli", "batch", str(jobs), "--out", str(out),
        "--bundle", str(tiny_bundle), "--seconds", "600", "--workers", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not [*out.glob("*.render/latents*")] and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "2 of 2 jobs are left: the same command resumes them" in stderr
    assert len([*out.glob("*.render")]) >= 1 and not [*out.glob("*.mp4")]


@pytest.mark.full
def test_two_hundred_jobs_under_random_kills(tmp_path):
    """The demo model; a worker dies about every four seconds, for four minutes at most."""
    out = tmp_path / "out"
    jobs = prepare(out, demo_bundle(), {f"job-{number:03}": 1 for number in range(200)})
    kills = random.Random(5)
    done = threading.Event()

    def kill():
        while not done.wait(kills.uniform(2, 6)):
            children = [child for child in active_children() if "packforcing" in child.name]
            if children:
                killed.append(kills.choice(children).pid)
                os.kill(killed[-1], signal.SIGKILL)

    def note(worker, event):
        if isinstance(event, Began):
            begun.append(event.id)

    killed: list[int] = []
    begun: list[str] = []
    began = time.monotonic()
    timer, killer = threading.Timer(240, done.set), threading.Thread(target=kill)
    timer.start()
    killer.start()
    try:
        work = Work(demo_bundle(), out, tuple(job.id for job in jobs), threads=1)
        render_in_processes([work, work], note, Stop())
    finally:
        timer.cancel()
        done.set()
        killer.join()
    print(f"{len(jobs)} jobs, {len(killed)} kills, {time.monotonic() - began:.0f} s")
    assert {*begun} == {job.id for job in jobs} and 0 < len(begun) - len(jobs) <= len(killed)
    videos = {path.stem: path.read_bytes() for path in out.glob("*.mp4")}
    assert videos == render_alone(demo_bundle(), jobs, tmp_path / "alone")
