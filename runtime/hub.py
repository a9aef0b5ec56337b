"""Bundles on the Hugging Face hub: fetch one into the hub's cache on this machine, push one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from packforcing.errors import BackendError, ConfigError, FetchError, OutputError
from packforcing.extras import optional_imports
from packforcing.runtime.backends import ENGINE_BACKENDS
from packforcing.runtime.bundle import ENGINE_FOLDER, MANIFEST, check_files, read_manifest
from packforcing.runtime.engine_records import (
    EngineRecord,
    engine_file,
    read_records,
    record_file,
)

MODEL_CARD = "README.md"


def fetch_bundle(
    repository: str, revision: str | None, backend: str, check: Callable[[Path], object]
) -> Path:
    """Download what a session needs of a bundle, unless the cache has it.

    That is the manifest, the files it lists, and the engines of one backend. Without a connection
    the cache serves.

    Args:
        repository: Its name on the hub, as in "user/repo".
        revision: A branch, tag or commit; None: the newest.
        backend: What is going to run the bundle.
        check: Called with the folder once it has the manifest and the records of the engines,
            which are small. What it raises ends the download.

    Returns:
        The bundle's folder, whose files are links into the cache.

    Raises:
        FetchError: It cannot be downloaded.
        BackendError: `check` says that the engines do not run here.
        BundleError: It is none that this release reads.
        MissingDependency: huggingface_hub is not installed.
    """
    with optional_imports("from_pretrained", "fetch"):
        from huggingface_hub import errors, snapshot_download

    def download(revision: str | None, *names: str) -> Path:
        try:
            return Path(snapshot_download(repository, revision=revision, allow_patterns=[*names]))
        except (errors.HTTPError, errors.HFValidationError, OSError) as error:
            raise FetchError(
                f"cannot fetch the bundle {repository}: {_reason(error)}; check its name and the "
                "connection, log in with 'hf auth login' where it is private, or open a folder "
                "that has it"
            ) from error

    engines = f"{ENGINE_FOLDER}/{backend}"
    folder = download(revision, MANIFEST, f"{engines}/*.json")
    try:
        check(folder)
    except BackendError as error:
        reason = str(error).partition(": run 'packforcing build")[0]  # which has no graphs yet
        raise BackendError(
            f"nothing more of {repository} was downloaded: {reason}; for engines of your own, run "
            f"'hf download {repository} --local-dir bundle' and 'packforcing build bundle'"
        ) from error
    # of the commit that the manifest is of, whatever is pushed meanwhile
    commit = folder.name
    files = read_manifest(folder).files
    return download(commit, MANIFEST, *files, f"{engines}/*.json", f"{engines}/*.engine")


def check_repository_name(repository: str) -> None:
    """Check that a bundle can be pushed under a name.

    Raises:
        ConfigError: It is no name on the hub.
        MissingDependency: huggingface_hub is not installed.
    """
    with optional_imports("pushing", "fetch"):
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"no name on the hub: {_reason(error)}") from error
    if "/" not in repository:
        raise ConfigError(f"'{repository}' has no user or organization: name it user/{repository}")


def list_bundle_files(directory: Path) -> tuple[dict[str, Path], dict[str, list[EngineRecord]]]:
    """List what of a bundle others need, once all of it is intact.

    Returns:
        Files by their name in the bundle: the manifest, what it lists, engines with their records.
        Then the records of the engines, by backend.

    Raises:
        BundleError: A file is missing or damaged.
        BackendError: An engine is missing, damaged or built from another graph.
    """
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    files = {name: directory / name for name in (MANIFEST, *sorted(manifest.files))}
    engines: dict[str, list[EngineRecord]] = {}
    for backend in ENGINE_BACKENDS:
        if not any((directory / ENGINE_FOLDER / backend).glob("*.json")):
            continue
        records = read_records(directory, backend)
        engines[backend] = list(records.values())
        for graph in records:
            for place in (engine_file, record_file):
                path = place(directory, backend, graph)
                files[path.relative_to(directory).as_posix()] = path
    return files, engines


def push_bundle(
    files: dict[str, Path], repository: str, model_card: bytes, message: str, private: bool = False
) -> str:
    """Commit a bundle to a repository of the hub, which is made where there is none.

    It is one commit, so that readers see the older bundle or this one. Graphs and engines of an
    older one that this one lacks are removed; all else in the repository stays. After an
    interruption, what was uploaded is not uploaded again.

    Args:
        files: What `list_bundle_files` lists.
        repository: Its name on the hub, as in "user/repo".
        model_card: The model card, a file in Markdown.
        message: The commit's first line.
        private: Make the repository a private one.

    Returns:
        The commit's address.

    Raises:
        OutputError: It cannot be pushed, or has to be private and the repository is not.
        MissingDependency: huggingface_hub is not installed.
    """
    with optional_imports("pushing", "fetch"):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    api = HfApi(library_name="packforcing")
    try:
        # None: as the account or organization has it
        name = api.create_repo(repository, private=private or None, exist_ok=True).repo_id
        present = api.model_info(name)
        if private and not present.private:
            raise OutputError(
                f"{name} is public: make it private in its settings on the hub, or choose another"
            )
        older = {entry.rfilename for entry in present.siblings or []}
        additions = [CommitOperationAdd(file, path) for file, path in files.items()]
        commit = api.create_commit(
            name,
            [
                *additions,
                CommitOperationAdd(MODEL_CARD, model_card),
                *map(CommitOperationDelete, sorted(filter(_is_of_bundle, older - files.keys()))),
            ],
            commit_message=message,
        )
        return commit.commit_url
    except (errors.HTTPError, ValueError, RuntimeError, OSError) as error:
        raise OutputError(
            f"cannot push to {repository}: {_reason(error)}; check its name and the connection, "
            "log in with 'hf auth login' and a token that may write, and run this again"
        ) from error


def _is_of_bundle(name: str) -> bool:
    """Tell whether a file of a repository is a graph, weights of one, or of an engine."""
    folder, _, file = name.rpartition("/")
    return folder.startswith(f"{ENGINE_FOLDER}/") or (not folder and ".onnx" in file)


def _reason(error: Exception) -> str:
    """Return the first line that an error has for people: the hub's own words, where it has any."""
    words = getattr(error, "server_message", None) or str(error)
    return words.strip().partition("\n")[0].rstrip(".")
