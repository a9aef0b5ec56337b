"""How bundle-4 was made: a record, like make_formats.py.

bundle-4/    schema version 4, which added the license: graphs and engine records of bundle-3
frames-4.npy therefore those of bundle-3
"""

import shutil
from pathlib import Path

from packforcing.export.exporter import write_bundle_manifest
from packforcing.runtime.bundle import read_manifest

HERE = Path(__file__).parent


def main() -> None:
    old, new = HERE / "bundle-3", HERE / "bundle-4"
    manifest = read_manifest(old)
    new.mkdir()
    for name in manifest.files:
        shutil.copyfile(old / name, new / name)
    write_bundle_manifest(new, manifest.config, manifest.tools, "CC-BY-NC-SA-4.0")
    shutil.copytree(old / "engines", new / "engines")
    shutil.copyfile(HERE / "frames-3.npy", HERE / "frames-4.npy")


if __name__ == "__main__":
    main()
