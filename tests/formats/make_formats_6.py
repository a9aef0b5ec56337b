"""How bundle-6 and model-3 were made: a record, like make_formats.py.

bundle-6/     schema version 6, which has the origin of each part of the weights: graphs and engine
              records of bundle-5
frames-6.npy  therefore those of bundle-5
model-3/      version 3 of the description, for the same reason: weights of model-2
"""

import json
import shutil
from pathlib import Path

import msgspec

from packforcing.checkpoints.published import DESCRIPTION, WEIGHTS, read_model_folder
from packforcing.export.exporter import write_bundle_manifest
from packforcing.origins import Origin
from packforcing.runtime.bundle import read_manifest

HERE = Path(__file__).parent
ORIGINS = (
    Origin("transformer", "gdhe17/Self-Forcing", "CC-BY-NC-SA-4.0"),
    Origin("autoencoder", "lightx2v/Autoencoders", "Apache-2.0"),  # invented
)


def main() -> None:
    old, new = HERE / "bundle-5", HERE / "bundle-6"
    manifest = read_manifest(old)
    new.mkdir()
    for name in manifest.files:
        shutil.copyfile(old / name, new / name)
    write_bundle_manifest(new, manifest.config, manifest.tools, ORIGINS)
    shutil.copytree(old / "engines", new / "engines")
    shutil.copyfile(HERE / "frames-5.npy", HERE / "frames-6.npy")

    old, new = HERE / "model-2", HERE / "model-3"
    folder = msgspec.structs.replace(read_model_folder(old), origins=ORIGINS)
    new.mkdir()
    shutil.copyfile(old / WEIGHTS, new / WEIGHTS)
    (new / DESCRIPTION).write_text(json.dumps(msgspec.to_builtins(folder), indent=1))


if __name__ == "__main__":
    main()
