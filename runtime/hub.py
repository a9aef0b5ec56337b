"""Bring a bundle from the Hugging Face hub into its cache on this machine."""

from __future__ import annotations

from pathlib import Path

from packforcing.errors import FetchError
from packforcing.extras import optional_imports
from packforcing.runtime.bundle import ENGINE_FOLDER, MANIFEST, read_manifest


def fetch_bundle(repository: str, revision: str | None, backend: str) -> Path:
    """Download what a session needs of a bundle, unless the cache has it.

    That is the manifest, the files it lists, and the engines of one backend; each engine serves all
    GPUs that it was built for. Without a connection the cache serves.

    Args:
        repository: Its name on the hub, as in "user/repo".
        revision: A branch, tag or commit; None: the newest.
        backend: What is going to run the bundle.

    Returns:
        The bundle's folder, whose files are links into the cache.

    Raises:
        FetchError: It cannot be downloaded.
        BundleError: It is none that this release reads.
        MissingDependency: huggingface_hub is not installed.
    """
    with optional_imports("from_pretrained", "fetch"):
        from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[MANIFEST]))
        names = [MANIFEST, *read_manifest(folder).files, f"{ENGINE_FOLDER}/{backend}/*"]
        # the commit that the manifest is of, whatever is pushed meanwhile
        return Path(snapshot_download(repository, revision=folder.name, allow_patterns=names))
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise FetchError(
            f"cannot fetch the bundle {repository}: {reason}; check its name and the connection, "
            "log in with 'hf auth login' where it is private, or open a folder that has it"
        ) from error
