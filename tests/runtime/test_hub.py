"""Bundles from a hub: huggingface_hub against a small one on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")

from huggingface_hub import constants

from packforcing.errors import BackendError, FetchError
from packforcing.runtime import Session
from tests.helpers import PROMPT

BUNDLE = Path(__file__).parents[1] / "formats" / "bundle-4"
COMMIT = "0123456789" * 4


class Answer(BaseHTTPRequestHandler):
    """Three addresses of the hub: a repository, its files, and each of them."""

    protocol_version = "HTTP/1.1"
    requests: list[str]

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in ("/api/models/team/bundle/revision/main", "/api/models/team/bundle"):
            self.send(json.dumps({"id": "team/bundle", "sha": COMMIT}).encode())
        elif path == f"/api/models/team/bundle/tree/{COMMIT}":
            files = [file for file in BUNDLE.rglob("*") if file.is_file()]
            entries = [
                {
                    "type": "file",
                    "path": file.relative_to(BUNDLE).as_posix(),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for file in files
            ]
            self.send(json.dumps(entries).encode())
        elif path.startswith(f"/team/bundle/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/team/bundle/resolve/{COMMIT}/")
            if self.command == "GET":
                self.requests.append(name)
            self.send((BUNDLE / name).read_bytes())
        else:
            self.send(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def send(self, body: bytes, status: int = 200, headers=()) -> None:
        tag = f'"{hashlib.sha1(body).hexdigest()}"'
        named = {"X-Repo-Commit": COMMIT, "ETag": tag, "Content-Length": str(len(body))}
        self.send_response(status)
        for name, value in {**named, **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def requests(tmp_path, monkeypatch):
    """The files that a hub with one bundle was asked for; the cache is empty."""
    Answer.requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield Answer.requests
        server.shutdown()


def test_a_bundle_of_the_hub_renders_as_its_folder_does_and_is_fetched_once(requests):
    with Session.open(BUNDLE, threads=1) as session:
        frames = np.concatenate(list(session.stream(PROMPT, 0.5)))
    for _ in range(2):
        with Session.from_pretrained("team/bundle", threads=1) as session:
            assert session.manifest.license == "CC-BY-NC-SA-4.0"
            stream = np.concatenate(list(session.stream(PROMPT, 0.5)))
        np.testing.assert_array_equal(stream, frames)
    graphs = {path.name for path in BUNDLE.glob("*.onnx")}
    # no engines, and nothing twice
    assert sorted(requests) == sorted({"manifest.json", *graphs})


def test_only_the_engines_of_the_backend_are_fetched(requests):
    from packforcing.runtime.hub import fetch_bundle

    folder = fetch_bundle("team/bundle", COMMIT, "tensorrt-rtx")
    engines = {path.relative_to(BUNDLE).as_posix() for path in BUNDLE.glob("engines/*/*")}
    assert engines and {name for name in requests if "/" in name} == engines
    assert all((folder / name).read_bytes() == (BUNDLE / name).read_bytes() for name in requests)


@pytest.mark.parametrize("name", ["team/other", "no name at all"])
def test_what_is_not_there_is_refused_in_a_line(requests, name):
    with pytest.raises(FetchError, match=f"cannot fetch the bundle {name}: ") as caught:
        Session.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_an_unknown_backend_downloads_nothing(requests):
    with pytest.raises(BackendError, match="unknown backend 'cpu'"):
        Session.from_pretrained("team/bundle", backend="cpu")
    assert not requests
