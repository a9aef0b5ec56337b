"""Bundles from a hub and to one: huggingface_hub against a small one on this machine."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("huggingface_hub")

from packforcing.errors import BackendError, BundleError, ConfigError, FetchError, OutputError
from packforcing.origins import describe_licenses
from packforcing.runtime import Session
from packforcing.runtime.hub import (
    check_repository_name,
    fetch_bundle,
    list_bundle_files,
    push_bundle,
)
from tests.emulated import Cuda, TensorRT, build_engines
from tests.helpers import PROMPT
from tests.hub import Repository, local_hub, read_folder

BUNDLE = Path(__file__).parents[1] / "formats" / "bundle-6"
GRAPHS = {path.name for path in BUNDLE.glob("*.onnx")}
CARD = b"---\nlicense: mit\n---\n# A card\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one bundle, team/bundle."""
    with local_hub(monkeypatch, tmp_path / "cache") as server:
        server.repositories["team/bundle"] = Repository(read_folder(BUNDLE))
        yield server


def render(session: Session) -> np.ndarray:
    return np.concatenate(list(session.stream(PROMPT, 0.5)))


def push(bundle: Path, **settings) -> str:
    return push_bundle(list_bundle_files(bundle)[0], "team/new", CARD, "Push", **settings)


def test_a_bundle_of_the_hub_renders_as_its_folder_does_and_is_fetched_once(hub):
    with Session.open(BUNDLE, threads=1) as session:
        frames = render(session)
    for _ in range(2):
        with Session.from_pretrained("team/bundle", threads=1) as session:
            assert "CC-BY-NC-SA-4.0" in describe_licenses(session.manifest.origins)
            np.testing.assert_array_equal(render(session), frames)
    # no engines, and nothing twice
    assert sorted(hub.downloads) == sorted({"manifest.json", *GRAPHS})


def test_only_the_engines_of_the_backend_are_fetched_and_after_their_records_alone(hub):
    engines = {path.relative_to(BUNDLE).as_posix() for path in BUNDLE.glob("engines/*/*")}
    records = {name for name in engines if name.endswith(".json")}
    files = hub.repositories["team/bundle"].files
    files["engines/tensorrt/denoiser.engine"] = files["engines/tensorrt-rtx/denoiser.log"] = b"?"

    def check(folder: Path) -> None:
        assert set(hub.downloads) == {"manifest.json", *records}
        assert all((folder / name).is_file() for name in records)

    folder = fetch_bundle("team/bundle", None, "tensorrt-rtx", check)
    assert set(hub.downloads) == {"manifest.json", *GRAPHS, *engines}
    assert all((folder / name).read_bytes() == (BUNDLE / name).read_bytes() for name in engines)


def test_engines_for_other_gpus_are_not_downloaded(hub, tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    build_engines(bundle, targets=("sm86", "sm120"))
    hub.repositories["team/bundle"].files = read_folder(bundle)
    library = TensorRT(Cuda())  # its GPU is sm89
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr("packforcing.runtime.device._cuda_runtime", lambda extra: library.cuda)
    with pytest.raises(BackendError, match="for sm86, sm120; NVIDIA Nothing is sm89") as caught:
        Session.from_pretrained("team/bundle", backend="tensorrt-rtx")
    assert "'hf download team/bundle" in str(caught.value) and "\n" not in str(caught.value)
    assert not [name for name in hub.downloads if name.endswith((".engine", ".onnx"))]


@pytest.mark.parametrize("name", ["team/other", "no name at all"])
def test_what_is_not_there_is_refused_in_a_line(hub, name):
    with pytest.raises(FetchError, match=f"cannot fetch the bundle {name}: ") as caught:
        Session.from_pretrained(name)
    assert "\n" not in str(caught.value)


def test_an_unknown_backend_downloads_nothing(hub):
    with pytest.raises(BackendError, match="unknown backend 'cpu'"):
        Session.from_pretrained("team/bundle", backend="cpu")
    assert not hub.downloads


def test_a_pushed_bundle_comes_back_and_renders_the_same_frames(hub):
    url = push(BUNDLE)
    repository = hub.repositories["team/new"]
    assert url == f"{hub.url}/team/new/commit/{repository.commit}"
    assert repository.commits == 2 and not repository.private  # made, and filled at once
    expected = {**read_folder(BUNDLE), "README.md": CARD}
    assert repository.files == {**expected, ".gitattributes": b"*.onnx filter=lfs\n"}
    assert len(hub.uploads) == len(GRAPHS)  # the rest is small
    with Session.open(BUNDLE, threads=1) as session:
        frames = render(session)
    with Session.from_pretrained("team/new", threads=1) as session:
        np.testing.assert_array_equal(render(session), frames)


def test_a_second_push_replaces_the_bundle_and_leaves_other_files_alone(hub, tmp_path):
    push(BUNDLE)
    files = hub.repositories["team/new"].files
    files["sample.mp4"], files["denoiser.onnx.data"] = b"video", b"weights of an older export"
    bundle = tmp_path / "bundle"
    shutil.copytree(BUNDLE, bundle, ignore=shutil.ignore_patterns("engines"))
    (bundle / ".DS_Store").touch()  # and what lies beside the bundle stays here
    push(bundle)
    assert set(hub.repositories["team/new"].files) == {
        ".gitattributes", "README.md", "manifest.json", "sample.mp4", *GRAPHS
    }  # fmt: skip
    commits = hub.repositories["team/new"].commits
    push(bundle)  # nothing changed
    assert hub.repositories["team/new"].commits == commits


def test_an_interrupted_push_leaves_no_commit_and_uploads_only_the_rest(hub):
    hub.cut_after = 2
    with pytest.raises(OutputError, match=r"cannot push to team/new: .*run this again") as caught:
        push(BUNDLE)
    assert "\n" not in str(caught.value)
    assert set(hub.repositories["team/new"].files) == {".gitattributes"}
    hub.cut_after = None
    push(BUNDLE)  # the hub asserts that nothing is uploaded twice
    assert set(hub.repositories["team/new"].files) > GRAPHS


def test_a_private_bundle_is_pushed_to_no_public_repository(hub):
    push(BUNDLE, private=True)
    assert hub.repositories["team/new"].private
    hub.repositories["team/new"].private = False
    before = dict(hub.repositories["team/new"].files)
    with pytest.raises(OutputError, match="team/new is public"):
        push(BUNDLE, private=True)
    assert hub.repositories["team/new"].files == before


@pytest.mark.parametrize("token", ["", "hf_other"])
def test_who_may_not_write_is_told_to_log_in(hub, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OutputError, match=r"cannot push to team/new: .*'hf auth login'"):
        push(BUNDLE)
    assert "team/new" not in hub.repositories


def test_a_damaged_bundle_or_engine_is_not_pushed(tmp_path):
    bundle = Path(shutil.copytree(BUNDLE, tmp_path / "bundle"))
    (bundle / "engines/tensorrt-rtx/denoiser.engine").write_bytes(b"?")
    with pytest.raises(BackendError, match=r"denoiser\.engine is damaged"):
        list_bundle_files(bundle)
    (bundle / "prompt.onnx").write_bytes(b"?")
    with pytest.raises(BundleError, match=r"prompt\.onnx is damaged"):
        list_bundle_files(bundle)


@pytest.mark.parametrize("name", ["bundle", "team/bundle/main", "team/two words", "team/-", ""])
def test_what_is_no_name_on_the_hub_is_refused(name):
    with pytest.raises(ConfigError):
        check_repository_name(name)
