"""Published weights from a hub: huggingface_hub against a small one on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import Result
from filelock import FileLock
from tqdm import tqdm

pytest.importorskip("huggingface_hub")

from huggingface_hub import constants, file_download, try_to_load_from_cache
from huggingface_hub.utils import logging

from packforcing.checkpoints import fetch as fetching
from packforcing.checkpoints.published import PARTS, PUBLISHED, Published
from packforcing.errors import CheckpointError, FetchError
from tests.helpers import assert_one_line, run

REVISION = "0123456789abcdef0123456789abcdef01234567"
LARGE, SMALL = "weights/large.safetensors", "tokenizer.json"
CONTENT = {LARGE: os.urandom(300_000), SMALL: b'{"small": 1}\n' * 40}
CHUNK = 1 << 14


class Hub(ThreadingHTTPServer):
    """The two addresses of a hub that fetching uses, for the one repository team/model."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = dict(CONTENT)
        self.license: object = "cc-by-nc-sa-4.0"
        self.requests: list[tuple[str, str | None]] = []  # files, and which part of them
        self.cut_at: int | None = None  # bytes of a file, after which connections break
        self.hangs = False  # instead of breaking it
        self.elsewhere = ""  # a host that files are partial_bytes on
        self.tokens: list[str | None] = []  # shown for a file, here and there
        self.refuse: tuple[int, str] | None = None  # status and the hub's code for it
        self.refused = "/"  # what the refused addresses have in them
        self.url = f"http://127.0.0.1:{self.server_port}"

    def info(self) -> dict:
        siblings = []
        for path, content in self.content.items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            file = {"rfilename": path, "size": len(content), "blobId": git}
            if path != SMALL:
                sha256 = hashlib.sha256(content).hexdigest()
                file["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(file)
        card = {"license": self.license} if self.license else None
        return {"id": "team/model", "sha": REVISION, "siblings": siblings, "cardData": card}


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server
        if hub.refuse and hub.refused in self.path:
            status, code = hub.refuse
            self.start(status, b"", {"X-Error-Code": code} if code else {})
            return
        if self.path.startswith("/api/models/team/model"):
            self.start(200, json.dumps(hub.info()).encode())
            return
        path = self.path.removeprefix(f"/team/model/resolve/{REVISION}/")
        if path == self.path:
            self.start(404, b"")
            return
        hub.tokens.append(self.headers["Authorization"])
        if hub.elsewhere and self.headers["Host"] != hub.elsewhere:
            self.start(302, b"", {"Location": f"http://{hub.elsewhere}{self.path}"})
            return
        byte_range = self.headers["Range"]
        hub.requests.append((path, byte_range))
        content = self.server.content[path]
        first = int(re.fullmatch(r"bytes=(\d+)-", byte_range)[1]) if byte_range else 0
        end = len(content) if hub.cut_at is None else max(first, hub.cut_at)
        self.start(206 if byte_range else 200, content[first:end], length=len(content) - first)
        if hub.hangs:
            threading.Event().wait(60)

    def start(self, status: int, body: bytes, headers=(), length: int | None = None) -> None:
        self.send_response(status)
        length = len(body) if length is None else length
        for name, value in {**dict(headers), "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        self.close_connection = self.close_connection or length > len(body)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    """A hub that publishes 'model', whose files are LARGE and SMALL."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    row = Published("team/model", (LARGE, SMALL), "generator", "CC-BY-NC-SA-4.0")
    monkeypatch.setitem(PUBLISHED, "model", row)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)  # between its retries
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "downloads" / "model"


def assert_refused(result: Result, *parts: str) -> None:
    """One line on stderr; the license may stand on stdout already."""
    assert_one_line(result.exit_code, "", result.stderr, "")
    assert all(part in result.stderr for part in parts), result.stderr


def files(folder: Path) -> set[str]:
    partials = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return partials - {fetching.LOCK}


def assert_complete(folder: Path) -> None:
    """Every file is what was published, and there is nothing else but the record of it."""
    assert files(folder) == {*CONTENT, fetching.RECORD}
    record = fetching.read_record(folder)
    for path, content in CONTENT.items():
        assert (folder / path).read_bytes() == content
        assert record[path].sha256 == hashlib.sha256(content).hexdigest()
        assert (record[path].source, record[path].revision) == ("team/model", REVISION)
        assert record[path].license.startswith("cc-by-nc-sa-4.0")


def test_files_come_with_license_record_and_the_next_command(hub, folder):
    result = run("fetch", "model")
    assert result.exit_code == 0, result.output
    output = result.stdout.splitlines()
    assert output[0] == "model: 2 files, 300.5 kB, from team/model at 0123456789ab"
    assert output[1] == "license of the weights: cc-by-nc-sa-4.0, says its model card"
    assert output[-2:] == [
        "next: packforcing fetch taew2_1",
        f"next: packforcing import-checkpoint downloads/model/{LARGE} downloads/model/{SMALL} "
        "downloads/taew2_1/taew2_1.pth --out model",
    ]
    assert_complete(folder)
    assert sorted(hub.requests) == [(SMALL, None), (LARGE, None)]

    again = json.loads(run("fetch", "model", "--json").stdout)  # asks for no file
    assert len(hub.requests) == 2 and set(again["files"]) == set(CONTENT)


def test_the_verbosity_of_huggingface_hub_does_not_change(hub, folder):
    before = logging.get_verbosity()
    run("fetch", "model")
    hub.refuse = (500, "")
    run("fetch", "model", "--out", "b")
    assert logging.get_verbosity() == before < logging.ERROR


def test_the_model_cards_license_is_shown(hub, folder):
    """Where the card says another than was read before, both are shown; where none, that one."""
    hub.license = "other"
    assert "license of the weights: other, says its model card; known here: CC-BY" in (
        run("fetch", "model").stdout
    )
    hub.license = None
    assert "license of the weights: CC-BY-NC-SA-4.0\n" in run("fetch", "model").stdout


def test_a_broken_download_is_resumed(hub, folder):
    """First by huggingface_hub itself, five times; then by the next run, from the partial file."""
    hub.cut_at = 5 * CHUNK + 100
    result = run("fetch", "model")
    assert_refused(result, "cannot be reached", "run the same command again to resume")
    [partial] = files(folder)
    whole = hashlib.sha256(CONTENT[LARGE]).hexdigest()
    assert partial == f"{LARGE}.{whole[:12]}.partial"
    partial_bytes = (folder / partial).stat().st_size
    assert 5 * CHUNK <= partial_bytes < hub.cut_at + 1
    assert [part for _, part in hub.requests[:2]] == [None, f"bytes={partial_bytes}-"]

    hub.cut_at, hub.requests = None, []
    assert run("fetch", "model").exit_code == 0
    assert hub.requests == [(LARGE, f"bytes={partial_bytes}-"), (SMALL, None)]
    assert_complete(folder)


def test_a_redirect_keeps_the_range_and_drops_the_token(hub, folder, monkeypatch):
    """The hub keeps large files with others."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.elsewhere, hub.cut_at = f"localhost:{hub.server_port}", 5 * CHUNK
    assert run("fetch", "model").exit_code == 2
    hub.cut_at, hub.requests, hub.tokens = None, [], []
    assert run("fetch", "model").exit_code == 0
    assert_complete(folder)
    assert hub.requests[0][1] and hub.tokens == ["Bearer hf_secret", None] * 2


def test_a_download_is_resumed_after_a_full_disk(hub, folder, monkeypatch):
    def until_full(offer, path, out, size, bar):
        out.write(CONTENT[path][:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(fetching, "_transfer", until_full)
        assert_refused(run("fetch", "model"), "No space left", "make room", "to resume")
    assert run("fetch", "model").exit_code == 0
    assert hub.requests[0] == (LARGE, "bytes=1000-")
    assert_complete(folder)


def test_a_download_is_resumed_after_an_interrupt(hub, folder):
    """The program itself, told by its environment to use this hub, and Ctrl-C."""
    hub.cut_at, hub.hangs = 9 * CHUNK, True
    program = f"""
import sys
from huggingface_hub import constants
from packforcing.app.cli import main
from packforcing.checkpoints.published import PUBLISHED, Published
constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}
PUBLISHED["model"] = Published("team/model", ({LARGE!r}, {SMALL!r}), "generator", "")
main(["fetch", "model"])
"""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "PYTHONPATH": str(Path(__file__).parents[3]),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (partials := list(folder.glob("*/*.partial"))) or not partials[0].stat().st_size:
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=30)
    assert process.returncode == 130 and "run the same command again to resume" in output
    assert "Traceback" not in output
    assert files(folder) == {f"{LARGE}.{hashlib.sha256(CONTENT[LARGE]).hexdigest()[:12]}.partial"}

    partial_bytes = partials[0].stat().st_size
    hub.cut_at, hub.hangs, hub.requests = None, False, []
    assert run("fetch", "model").exit_code == 0
    assert partial_bytes and hub.requests[0] == (LARGE, f"bytes={partial_bytes}-")
    assert_complete(folder)


@pytest.mark.parametrize("path", [LARGE, SMALL])
def test_a_file_with_a_wrong_checksum_is_removed(hub, folder, path, monkeypatch):
    published = hub.info()
    monkeypatch.setattr(hub, "info", lambda: published)
    hub.content[path] = bytes([hub.content[path][0] ^ 1]) + hub.content[path][1:]
    assert_refused(run("fetch", "model"), f"{path} of team/model came with a wrong checksum")
    assert path not in files(folder) and not list(folder.rglob("*.partial"))
    hub.content = dict(CONTENT)
    assert run("fetch", "model").exit_code == 0
    assert_complete(folder)


def test_only_damaged_or_newer_files_are_fetched_again(hub, folder):
    run("fetch", "model")
    (folder / LARGE).write_bytes(CONTENT[LARGE][:-1] + b"?")
    hub.requests = []
    assert run("fetch", "model").exit_code == 0
    assert hub.requests == [(LARGE, None)]
    assert_complete(folder)
    hub.content[SMALL], hub.requests = b"newer", []
    assert run("fetch", "model").exit_code == 0
    assert hub.requests == [(SMALL, None)] and (folder / SMALL).read_bytes() == b"newer"


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ((403, "GatedRepo"), ("team/model is gated", "accept its conditions", "HF_TOKEN")),
        ((401, "GatedRepo"), ("team/model is gated", "accept its conditions", "hf auth login")),
        ((404, "RepoNotFound"), ("not on the hub, or is private", "HF_TOKEN")),
        ((401, ""), ("hf auth login",)),
        ((403, ""), ("HTTP 403", "log in")),
        ((500, ""), ("HTTP 500", "again later")),
    ],
)
def test_refusals_of_the_hub_are_explained(hub, folder, answer, parts):
    hub.refuse = answer
    assert_refused(run("fetch", "model"), *parts)
    assert not folder.exists()


def test_a_gated_repository_is_explained_after_its_license(hub, folder):
    hub.refuse, hub.refused = (403, "GatedRepo"), "/resolve/"
    result = run("fetch", "model")
    assert "license of the weights: cc-by-nc-sa-4.0" in result.stdout
    assert_refused(result, "team/model is gated", "accept its conditions")
    assert not files(folder)


def test_a_file_that_left_the_repository_is_named(hub, folder):
    del hub.content[LARGE]
    assert_refused(run("fetch", "model"), f"no longer has {LARGE}", "import-checkpoint")


def test_unknown_names_are_refused(folder):
    assert_refused(run("fetch", "sora"), "nothing is published as 'sora'", "self-forcing, causvid")
    assert_refused(run("fetch", "packforcing-unofficial"), "no public place")


def test_disk_space_is_checked_before_anything_is_fetched(hub, folder, monkeypatch):
    """What a partial file holds already is not counted."""
    size = sum(map(len, CONTENT.values()))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(
        "packforcing.files.shutil.disk_usage", lambda _: usage._replace(free=size - 1)
    )
    assert_refused(run("fetch", "model"), "the download needs 300.5 kB", "make room")
    assert hub.requests == [] and not files(folder)
    sha256 = hashlib.sha256(CONTENT[LARGE]).hexdigest()
    (folder / "weights").mkdir()
    (folder / f"{LARGE}.{sha256[:12]}.partial").write_bytes(CONTENT[LARGE][:1])
    assert run("fetch", "model").exit_code == 0
    assert hub.requests[0] == (LARGE, "bytes=1-")


def test_only_files_of_the_table_are_fetched(hub, folder):
    hub.content |= {"code.py": b"import os", "../up.safetensors": b"x"}
    assert run("fetch", "model").exit_code == 0
    assert_complete(folder)
    for row in (*PUBLISHED.values(), *PARTS.values()):
        for path in row.files:
            assert Path(path).suffix in (".pt", ".pth", ".safetensors", ".json", ".model")
            assert not Path(path).is_absolute() and ".." not in Path(path).parts


# Without the hub


def test_a_folder_of_the_same_layout_replaces_the_hub(hub, folder, tmp_path):
    """With the checksums of its record where it has one; else they are taken as they come, and
    output to be so."""
    run("fetch", "model", "--out", "stick")
    hub.requests, hub.refuse = [], (500, "")
    result = run("fetch", "model", "--from", "stick")
    assert result.exit_code == 0 and "no checksum" not in result.stdout
    assert_complete(folder)

    (tmp_path / "stick" / LARGE).write_bytes(CONTENT[LARGE][::-1])
    assert_refused(run("fetch", "model", "--from", "stick", "--out", "b"), "wrong checksum")
    (tmp_path / "stick" / fetching.RECORD).unlink()
    result = run("fetch", "model", "--from", "stick", "--out", "b")
    assert f"no checksum is published: {LARGE}, {SMALL}" in result.stdout
    assert (tmp_path / "b" / LARGE).read_bytes() == CONTENT[LARGE][::-1]

    (tmp_path / "stick" / SMALL).unlink()
    assert_refused(run("fetch", "model", "--from", "stick"), f"lacks {SMALL}", "laid out")
    assert hub.requests == []


def test_a_file_without_a_checksum_must_have_the_offered_size(folder, tmp_path):
    """A copy that is cut after it was looked up."""
    stick = tmp_path / "stick"
    [path] = PARTS["taew2_1"].files
    stick.mkdir()
    (stick / path).write_bytes(CONTENT[LARGE])
    offer = fetching.look_up("taew2_1", folder, stick)
    (stick / path).write_bytes(CONTENT[LARGE][:400])
    with pytest.raises(FetchError, match=f"{path} .* came with a wrong size and was removed"):
        fetching.fetch(offer, folder, tqdm)
    assert not files(folder)


def test_two_processes_cannot_fetch_into_one_folder(hub, folder):
    folder.mkdir(parents=True)
    with FileLock(folder / fetching.LOCK):
        assert_refused(run("fetch", "model"), "another process is fetching into downloads/model")
    assert not files(folder) and run("fetch", "model").exit_code == 0


def test_an_empty_file_is_copied(folder, tmp_path):
    stick = tmp_path / "stick"
    stick.mkdir()
    (stick / PARTS["taew2_1"].files[0]).touch()
    fetching.fetch(fetching.look_up("taew2_1", folder, stick), folder, tqdm)
    assert files(folder) == {PARTS["taew2_1"].files[0], fetching.RECORD}


def test_a_file_that_cannot_be_written_is_reported(hub, folder, monkeypatch):
    def forbidden(path, mode="r", *options, **named):
        if mode == "ab":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, mode, *options, **named)

    opened = Path.open
    monkeypatch.setattr(Path, "open", forbidden)
    assert_refused(run("fetch", "model"), "Permission denied")


def test_a_size_that_differs_from_the_announced_one_is_explained(hub, folder, monkeypatch):
    published = hub.info()
    monkeypatch.setattr(hub, "info", lambda: published)
    hub.content[LARGE] += b"more"
    result = run("fetch", "model")
    assert_refused(result, "team/model sent less or more", "run the same command again")
    assert "force_download" not in result.stderr


def test_without_a_network_local_files_are_used(hub, folder, monkeypatch):
    run("fetch", "model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    result = run("fetch", "model")
    assert result.exit_code == 0 and "from downloads/model" in result.stdout
    assert_complete(folder)
    assert_refused(run("fetch", "model", "--out", "b"), "cannot be reached", "--from")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(run("fetch", "model", "--out", "b"), "HF_HUB_OFFLINE", "--from")


def test_the_hubs_cache_serves_offline(hub, folder, tmp_path, monkeypatch):
    """As huggingface_hub lays it out: links into blobs that are named by their checksums."""
    cache = tmp_path / "no-cache" / "models--team--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(REVISION)
    for file in hub.info()["siblings"]:
        link = cache / "snapshots" / REVISION / file["rfilename"]
        blob = cache / "blobs" / file.get("lfs", {}).get("sha256", file["blobId"])
        for path in (link, blob):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(CONTENT[file["rfilename"]])
        link.symlink_to(blob)
    assert isinstance(try_to_load_from_cache("team/model", LARGE), str)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.license = None
    result = run("fetch", "model")
    assert result.exit_code == 0 and "no checksum" not in result.stdout, result.output
    record = fetching.read_record(folder)
    assert record[LARGE].revision == REVISION and record[LARGE].license == "CC-BY-NC-SA-4.0"
    assert not (folder / LARGE).is_symlink() and hub.requests == []


# What import-checkpoint makes of it


def test_a_file_is_compared_with_the_record_above_it(hub, folder, tmp_path):
    """tests/packforcing/test_import.py has the import itself."""
    run("fetch", "model")
    assert (
        fetching.recorded_file(folder / LARGE)[1].license == "cc-by-nc-sa-4.0, says its model card"
    )
    assert fetching.recorded_file(tmp_path / "elsewhere.pt") is None
    (folder / LARGE).write_bytes(CONTENT[LARGE][::-1])
    with pytest.raises(CheckpointError, match=r"damaged or was replaced .*fetch it again"):
        fetching.recorded_file(folder / LARGE)
    link = tmp_path / "link.safetensors"
    link.symlink_to(folder / LARGE)
    (tmp_path / "other").mkdir()
    for way in (link, tmp_path / "other" / ".." / "downloads" / "model" / LARGE):
        with pytest.raises(CheckpointError, match="damaged or was replaced"):
            fetching.recorded_file(way)
    (tmp_path / fetching.RECORD).write_text('{"elsewhere.pt": [1, 2]}')  # another program's
    assert fetching.recorded_file(tmp_path / "elsewhere.pt") is None
    (folder / fetching.RECORD).write_text("{")
    with pytest.raises(CheckpointError, match="is damaged: remove it and fetch again"):
        fetching.recorded_file(folder / LARGE)
