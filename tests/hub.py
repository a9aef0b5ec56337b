"""A Hugging Face hub on this machine, with the addresses that fetching and pushing use.

They are those of the hub's documentation: repositories, their trees and files, `preupload`, git
LFS's batch API with uploads and verification, and commits as lines of JSON. What the hub checks is
checked: tokens, the metadata of model cards, checksums of uploads, and that a commit has no file
that was not uploaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

TOKEN = "hf_test"
REGULAR_BYTES = 20_000  # larger files are for LFS; on the real hub, 10 MB and binary files
LICENSES = {"apache-2.0", "mit", "cc-by-nc-sa-4.0", "unknown", "other"}


class Repository:
    """The newest commit of a repository, and how many there were."""

    def __init__(self, files: dict[str, bytes], private: bool = False) -> None:
        self.files, self.private, self.commits = files, private, 1

    @property
    def commit(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The hub.

    Attributes:
        repositories: By name, as in "team/bundle".
        downloads: Names of files that were downloaded, in order.
        uploads: Contents in LFS, by SHA-256.
        cut_after: Uploads of LFS after which the hub breaks down.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, Repository] = {}
        self.downloads: list[str] = []
        self.uploads: dict[str, bytes] = {}
        self.cut_after: int | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(?:/(tree|revision)/(\w+))?", path)
        file = re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/(\w+)/(.+)", path)
        name = (api or file or [None, ""])[1]
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.may_write()):
            self.send_json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif api and api[2] == "tree":
            self.send_json([entry(*item) for item in repository.files.items()])
        elif api:
            siblings = [{"rfilename": file} for file in repository.files]
            info = {"id": name, "sha": repository.commit, "private": repository.private}
            self.send_json({**info, "siblings": siblings})
        elif file and file[3] in repository.files:
            if self.command == "GET":
                self.server.downloads.append(file[3])
            self.send_body(repository.files[file[3]], headers={"X-Repo-Commit": repository.commit})
        else:
            self.send_json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if not self.may_write():
            self.send_json({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            errors = check_card(json.loads(body)["content"])
            self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            self.preupload(self.server.repositories[match[1]], json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.lfs_batch(json.loads(body))
        elif path == "/lfs-verify":
            asked_for = json.loads(body)
            content = self.server.uploads.get(asked_for["oid"], b"")
            self.send_json({}, 200 if len(content) == asked_for["size"] else 404)
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.send_json({}, 404)

    def do_PUT(self) -> None:
        """Take an upload of LFS; its address is signed, so it needs no token."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        if hub.cut_after is not None and len(hub.uploads) >= hub.cut_after:
            self.send_json({"error": "out of order"}, 400)
            return
        sha256 = self.path.removeprefix("/lfs/")
        intact = hashlib.sha256(content).hexdigest() == sha256
        if intact:
            assert sha256 not in hub.uploads, "uploaded twice"
            hub.uploads[sha256] = content
        self.send_json({}, 200 if intact else 400)

    def create(self, request: dict) -> None:
        name = f"{request['organization']}/{request['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            self.send_json({"error": "You already created this model repo", "url": url}, 409)
            return
        private = request.get("visibility") == "private"
        first = {".gitattributes": b"*.onnx filter=lfs\n"}
        self.server.repositories[name] = Repository(first, private)
        self.send_json({"url": url})

    def preupload(self, repository: Repository, request: dict) -> None:
        answers = []
        for file in request["files"]:
            mode = "lfs" if file["size"] > REGULAR_BYTES else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if (content := repository.files.get(file["path"])) is not None:
                answer["oid"] = oid(content)
            answers.append(answer)
        self.send_json({"files": answers})

    def lfs_batch(self, request: dict) -> None:
        assert request["operation"] == "upload" and request["hash_algo"] == "sha256"
        objects = []
        for item in request["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.server.url}/lfs-verify"},
            }
            missing = item["oid"] not in self.server.uploads
            objects.append({**item, "actions": actions} if missing else item)
        self.send_json({"transfer": "basic", "objects": objects})

    def commit(self, name: str, lines: list[dict]) -> None:
        repository = self.server.repositories[name]
        assert lines[0]["key"] == "header" and lines[0]["value"]["summary"]
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        repository.files = files
        repository.commits += 1
        url = f"{self.server.url}/{name}/commit/{repository.commit}"
        self.send_json({"commitUrl": url, "commitOid": repository.commit})

    def may_write(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def send_json(self, value: object, status: int = 200, headers=()) -> None:
        self.send_body(json.dumps(value).encode(), status, headers)

    def send_body(self, body: bytes, status: int = 200, headers=()) -> None:
        self.send_response(status)
        tag = f'"{hashlib.sha1(body).hexdigest()}"'
        lengths = {"ETag": tag, "Content-Length": str(len(body))}
        for name, value in {**lengths, **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def oid(content: bytes) -> str:
    """What the hub names a file by: git's SHA-1, or the SHA-256 of one in LFS."""
    if len(content) > REGULAR_BYTES:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(name: str, content: bytes) -> dict:
    """A file of a repository's tree."""
    size = len(content)
    return {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(content).hexdigest()}


def check_card(text: str) -> list[dict]:
    """Check a model card's metadata by the rules of the hub's documentation."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if not match:
        return []
    data = yaml.safe_load(match[1])
    licenses = data.get("license", [])
    licenses = [licenses] if isinstance(licenses, str) else licenses
    errors = [f'"license" must be one of {LICENSES}' for name in licenses if name not in LICENSES]
    if "other" in licenses and not re.fullmatch("[a-z0-9.-]+", data.get("license_name", "")):
        errors.append('"license_name" is required')
    relation = data.get("base_model_relation", "quantized")
    if relation not in ("adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" is unknown')
    return [{"message": message} for message in errors]


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by their path in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@contextmanager
def local_hub(monkeypatch, cache: Path) -> Iterator[Hub]:
    """Let huggingface_hub meet this hub, with a token, an empty cache and without Xet."""
    from huggingface_hub import constants

    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()
