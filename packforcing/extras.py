"""Import optional packages, or say which extra of this package installs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from packforcing.errors import MissingDependency

_ROOT = Path(__file__).resolve().parents[1]


def install_command(*extras: str) -> str:
    """Name the command that installs extras, right for a wheel and for a checkout.

    Args:
        extras: Names under `[project.optional-dependencies]` in pyproject.toml; without any,
            the command installs what the package itself requires.
    """
    source = _ROOT if (_ROOT / "pyproject.toml").is_file() else "packforcing"
    names = f"[{','.join(extras)}]" if extras else ""
    return f'pip install "{source}{names}"'


@contextmanager
def optional_imports(purpose: str, *extras: str) -> Iterator[None]:
    """Turn the failure of an import inside the block into an error with a remedy.

    Args:
        purpose: What needs the packages, the subject of the message, like "exporting".
        extras: The extras that install them.

    Raises:
        MissingDependency: A package imported inside the block is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "a package").partition(".")[0]
        if module == "packforcing":  # a fault of this package, not of its installation
            raise
        raise MissingDependency(
            f"{purpose} needs {module}, which is not installed: {install_command(*extras)}"
        ) from error


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
