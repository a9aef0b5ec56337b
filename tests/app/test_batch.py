"""Batches: files of jobs are checked whole, done is done, and workers share and resume the work."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import active_children

import numpy as np
import pytest
from PIL import Image

from packforcing.app.jobs import batch
from packforcing.app.jobs.batch import share_of
from packforcing.app.jobs.batch_file import BatchFile
from packforcing.app.jobs.deal import Stop, render_here
from packforcing.app.jobs.events import Began, Ended, Made
from packforcing.app.jobs.processes import ThisMachine
from packforcing.app.jobs.records import read_record, record_path, video_path
from packforcing.embeddings import Embedding, save_embedding
from packforcing.presets import policies
from packforcing.runtime import Session
from packforcing.runtime.render_lock import locked_folder
from tests.batches import BLUE, RED, prepare, render_alone, render_under_kills
from tests.helpers import TINY
from tests.helpers import run as run_command


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


def test_a_killed_worker_is_replaced_and_its_video_is_the_same(tiny_bundle, tmp_path):
    """Two processes on four jobs; one of them is killed inside a video, past its snapshot."""
    out = tmp_path / "out"
    work, jobs = prepare(out, tiny_bundle, {"a": 24, "b": 24, "c": 1, "d": 1})
    alone = render_alone(tiny_bundle, jobs, tmp_path / "alone")
    events, killed = [], []

    def note(worker, event):
        events.append((worker, event))
        if isinstance(event, Made) and event.frames > 22 * TINY.fps and not killed:
            for child in active_children():
                if child.name == f"packforcing worker {worker + 1}":
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append(event.id)

    ThisMachine(2).render(work, [job.id for job in jobs], note, Stop())
    assert {path.stem: path.read_bytes() for path in out.glob("*.mp4")} == alone
    begun = [event.id for _, event in events if isinstance(event, Began)]
    assert sorted(begun) == sorted([*alone, *killed])  # each once, and the killed one again
    assert [*out.glob("*.render")] == []
    after_kill = [event for _, event in events if isinstance(event, Made) and event.id in killed]
    assert any(event.recovered for event in after_kill)


def test_jobs_of_another_run_are_waited_for_and_taken_over(tiny_bundle, tmp_path):
    """Here the other run is this test, which has the lock until the other job has ended."""
    out = tmp_path / "out"
    work, _ = prepare(out, tiny_bundle, {"a": 1, "b": 1})
    order = []
    with locked_folder(video_path(out, "a")) as locked:

        def note(event):
            if isinstance(event, Ended):
                order.append(event.id)
                if event.id == "b":
                    locked.remove()

        render_here(work, ["a", "b"], note, Stop())
    assert order == ["b", "a"]


def test_two_commands_on_one_folder_share_the_work(tiny_bundle, tmp_path):
    """A video that was made twice would be another file than the one that was there first."""
    jobs, out = tmp_path / "jobs.csv", tmp_path / "out"
    names = [f"job-{number}" for number in range(8)]
    lines = [f"{name},{(RED, BLUE)[n % 2]},{n}" for n, name in enumerate(names)]
    jobs.write_text("\n".join(["id,prompt,seed", *lines]))
    command = [
        sys.executable, "-m", "packforcing.app.cli", "batch", str(jobs), "--out", str(out),
        "--bundle", str(tiny_bundle), "--seconds", "6",
    ]  # fmt: skip
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    files: dict[str, int] = {}
    while any(run.poll() is None for run in runs):
        for path in out.glob("*.mp4"):
            files.setdefault(path.stem, path.stat().st_ino)
        time.sleep(0.01)
    printed = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], printed
    assert {path.stem: path.stat().st_ino for path in out.glob("*.mp4")} == files
    assert [*files] and {*files} == {*names} and [*out.glob("*.render")] == []
    assert all(f"{name}: completed" in text for name in names for text in printed)
    with Session.open(tiny_bundle) as session:
        for number, name in enumerate(names):
            session.render((RED, BLUE)[number % 2], 6, tmp_path / "alone.mp4", number)
            assert video_path(out, name).read_bytes() == (tmp_path / "alone.mp4").read_bytes()


def test_ctrl_c_ends_all_resumably(tiny_bundle, tmp_path):
    jobs, out = tmp_path / "jobs.txt", tmp_path / "out"
    jobs.write_text(f"{RED}\n{BLUE}\n")
    command = [
        sys.executable, "-m", "packforcing.app.cli", "batch", str(jobs), "--out", str(out),
        "--bundle", str(tiny_bundle), "--seconds", "600", "--workers", "2",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None:
        if any(name.startswith("latents") for _, _, names in os.walk(out) for name in names):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "2 of 2 jobs are left: the same command resumes them" in stderr
    assert len([*out.glob("*.render")]) >= 1 and not [*out.glob("*.mp4")]


@pytest.mark.full
def test_two_hundred_jobs_under_random_kills(tmp_path, undisturbed):
    """The demo model; a worker dies every fifteen blocks or so."""
    kills = random.Random(5)

    def kill() -> int:
        children = [child for child in active_children() if "packforcing" in child.name]
        if children:
            os.kill(kills.choice(children).pid, signal.SIGKILL)
        return len(children) > 0

    render_under_kills(ThisMachine(2), tmp_path / "out", kill, undisturbed)
