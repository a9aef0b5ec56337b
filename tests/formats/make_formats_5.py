"""How bundle-5, statistics-2.safetensors and model-2 were made: a record, like make_formats.py.

bundle-5/    schema version 5, which added how blocks are committed, and the dtype of attention:
             graphs of bundle-4; frames-5.npy therefore those of bundle-4; engine records of
             version 2, which added the version and the kernels
statistics-2 with those of what attention reads
model-2/     version 2, which added the version and the same two fields: weights of model-1
"""

import shutil
from pathlib import Path

import msgspec

from packforcing.calibration.activations import calibrate
from packforcing.checkpoints.published import DESCRIPTION, WEIGHTS, read_model_folder
from packforcing.runtime.bundle import SCHEMA_VERSION, read_manifest, write_manifest
from packforcing.runtime.engine_records import (
    Kernels,
    encode_record,
    read_records,
    record_file,
)

HERE = Path(__file__).parent


def main() -> None:
    old, new = HERE / "bundle-4", HERE / "bundle-5"
    manifest = read_manifest(old)
    shutil.copytree(old, new)
    write_manifest(new, msgspec.structs.replace(manifest, schema_version=SCHEMA_VERSION))
    for graph, record in read_records(old, "tensorrt-rtx").items():
        kernels = [Kernels(call, "attention", ("fp16",) * 3, 4) for call in record.scratch]
        kernels += [Kernels(call, "product", ("fp16",) * 2, 9, 1 << 20) for call in record.scratch]
        record = msgspec.structs.replace(record, kernels=tuple(kernels))
        record_file(new, "tensorrt-rtx", graph).write_bytes(encode_record(record))
    shutil.copyfile(HERE / "frames-4.npy", HERE / "frames-5.npy")
    prompts = ["a red star over navy stripes", "a white circle over sand dots"]
    calibrate(new, prompts, HERE / "statistics-2.safetensors", seconds=2.0, seed=5)
    old, new = HERE / "model-1", HERE / "model-2"
    new.mkdir()
    shutil.copyfile(old / WEIGHTS, new / WEIGHTS)
    description = msgspec.json.format(msgspec.json.encode(read_model_folder(old)), indent=1)
    (new / DESCRIPTION).write_bytes(description + b"\n")


if __name__ == "__main__":
    main()
