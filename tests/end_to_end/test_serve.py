"""`packforcing serve` as a process: it is killed, it is stopped, and it has a thousand jobs."""

from __future__ import annotations

import http.client
import json
import random
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest

from packforcing.runtime import Session

KILLS, WAITING, MOST_JOBS, SECONDS, SEED = 30, 4, 90, 30, 2026
PROMPT = "a red star over navy stripes"


class Server:
    """A process that serves; `url` is what it printed."""

    def __init__(self, bundle, folder, log):
        command = [
            sys.executable, "-m", "packforcing.app.cli", "serve", bundle, "--port", "0",
            "--out", folder, "--threads", "1",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout
        assert select.select([self.process.stdout], [], [], 120)[0]
        self.place = re.fullmatch(r"http://(.*)/\n", self.process.stdout.readline())[1]

    def ask(self, method, path, fields=None):
        connection = http.client.HTTPConnection(self.place, timeout=60)
        data = None if fields is None else json.dumps(fields).encode()
        try:
            connection.request(method, path, data, {"content-type": "application/json"})
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status == 429:
            time.sleep(float(answer.headers["retry-after"]))
            return self.ask(method, path, fields)
        return answer.status, json.loads(body)

    def end(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60)
        self.process.stdout.close()
        return code


@contextmanager
def serve(bundle, folder, log):
    server = Server(bundle, folder, log)
    try:
        yield server
    finally:
        server.end(signal.SIGKILL)


def test_ctrl_c_ends_the_server_and_says_what_goes_on(tiny_bundle, tmp_path):
    log = (tmp_path / "log").open("w+")
    with log, serve(tiny_bundle, tmp_path / "jobs", log) as server:
        status, job = server.ask("POST", "/v1/videos", {"prompt": PROMPT, "seconds": 3600})
        assert (status, job["status"]) == (200, "queued")
        assert server.end(signal.SIGINT) == 128 + signal.SIGINT
        log.seek(0)
        assert "stopped; 1 job goes on at the next start" in log.read()
        assert (tmp_path / "jobs" / f"{job['id']}.json").exists()


@pytest.mark.full
def test_jobs_survive_kills(tiny_bundle, tmp_path):
    """No job is lost, none is done twice, and every video is the undisturbed one."""
    moments, folder = random.Random(SEED), tmp_path / "jobs"
    path = tmp_path / "undisturbed.mp4"
    made: dict[str, int] = {}  # seeds by ID
    done: dict[str, tuple[int, int]] = {}  # inode and time of each video that was completed
    kills = 0
    with (tmp_path / "log").open("w+") as log:
        while True:
            with serve(tiny_bundle, folder, log) as server:
                listed = {
                    job["id"]: job for job in server.ask("GET", "/v1/videos?limit=100")[1]["data"]
                }
                assert set(made) <= set(listed), "a job is lost"
                while len(made) < min(MOST_JOBS, len(done) + WAITING) and kills < KILLS:
                    fields = {"prompt": PROMPT, "seconds": SECONDS, "seed": len(made)}
                    job = server.ask("POST", "/v1/videos", fields)[1]
                    made[job["id"]] = job["seed"]
                ends = time.monotonic() + moments.uniform(0.05, 4.0)
                while True:
                    jobs = server.ask("GET", "/v1/videos?limit=100")[1]["data"]
                    for job in jobs:
                        if job["status"] == "completed":
                            state = (folder / f"{job['id']}.mp4").stat()
                            mark = state.st_ino, state.st_mtime_ns
                            assert done.setdefault(job["id"], mark) == mark, "done twice"
                        assert job["status"] != "failed", job
                    if kills >= KILLS and len(done) == len(made):
                        break
                    if kills < KILLS and time.monotonic() > ends:
                        kills += 1
                        break
                    time.sleep(0.02)
                if kills >= KILLS and len(done) == len(made):
                    break
        log.seek(0)
        completed = re.findall(r"job (\w+): completed", log.read())
        assert len(completed) == len(set(completed)) and set(completed) <= set(made)
    with Session.open(tiny_bundle, threads=1) as session:
        for name, seed in made.items():
            session.render(PROMPT, SECONDS, path, seed)
            assert (folder / f"{name}.mp4").read_bytes() == path.read_bytes(), seed
    print(f"{kills} kills, {len(made)} jobs, {len(done)} videos as undisturbed")


@pytest.mark.full
def test_a_thousand_jobs_wait(tiny_bundle, tmp_path):
    """They are created, listed in pages and deleted; memory does not grow much with them."""
    jobs = 1000
    with (tmp_path / "log").open("w+") as log, serve(tiny_bundle, tmp_path / "jobs", log) as server:
        process = psutil.Process(server.process.pid)
        long = server.ask("POST", "/v1/videos", {"prompt": PROMPT, "seconds": 3600})[1]
        before = process.memory_info().rss
        began, names, slowest = time.perf_counter(), [], 0.0
        for seed in range(jobs):
            sent = time.perf_counter()
            fields = {"prompt": PROMPT, "seconds": 1, "seed": seed}
            status, job = server.ask("POST", "/v1/videos", fields)
            assert (status, job["queue_position"]) == (200, seed + 1), job
            names.append(job["id"])
            slowest = max(slowest, time.perf_counter() - sent)
        created = time.perf_counter() - began
        growth = process.memory_info().rss - before
        listed, after = [], ""
        while True:
            page = server.ask("GET", f"/v1/videos?limit=100&order=asc{after}")[1]
            listed += [job["id"] for job in page["data"]]
            after = f"&after={page['last_id']}"
            if not page["has_more"]:
                break
        assert listed == [long["id"], *names]
        for name in [*names, long["id"]]:
            assert server.ask("DELETE", f"/v1/videos/{name}")[0] == 200
        assert server.ask("GET", "/v1/videos")[1]["data"] == []
        print(
            f"{jobs} jobs: {1000 * created / jobs:.1f} ms to create one, at most "
            f"{1000 * slowest:.0f} ms, {growth / jobs / 1024:.1f} KiB of memory each"
        )
        assert growth < 64 << 20
        server.end()
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["server.lock"]
