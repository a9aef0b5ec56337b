"""Write tests/tensorrt_api.json: the public names of TensorRT's Python API, per release.

    pip download --no-deps --only-binary :all: tensorrt-cu13-bindings==10.16.1.11
    unzip the wheel into FOLDER, then, with libraries that export the symbols which it imports:
    python tests/make_tensorrt_api.py 10.16.1.11 FOLDER/tensorrt_bindings

The bindings import nine functions of libnvinfer, libnvonnxparser and libnvinfer_plugin; libraries
of functions that return 0 are enough to read names. A call adds or replaces one release.
"""

import json
import sys
from pathlib import Path

API = Path(__file__).with_name("tensorrt_api.json")
# What the loader and the builder touch, and every enum that they read
CLASSES = (
    "AttentionIOForm", "Builder", "BuilderFlag", "ElementWiseOperation", "EngineCapability",
    "ExecutionContextAllocationStrategy", "FillOperation", "IAttention", "IAttentionInputLayer",
    "EngineInspector", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IFillLayer", "ILayer",
    "ILogger", "INetworkDefinition", "IOptimizationProfile", "IProgressMonitor", "IRuntimeConfig",
    "IShuffleLayer", "IStreamWriter", "ITensor", "LayerInformationFormat", "LayerType", "Logger",
    "NetworkDefinitionCreationFlag", "OnnxParser", "ProfilingVerbosity", "Runtime",
)  # fmt: skip


def public(thing: object) -> list[str]:
    return sorted(name for name in dir(thing) if not name.startswith("_"))


def main(version: str, folder: str) -> None:
    sys.path.insert(0, folder)
    import tensorrt

    api = json.loads(API.read_text(encoding="utf-8")) if API.exists() else {}
    classes = {name: public(getattr(tensorrt, name)) for name in CLASSES if hasattr(tensorrt, name)}
    api[version] = {"": public(tensorrt), **classes}
    lines = (
        f'"{release}": {{\n'
        + ",\n".join(f" {json.dumps(name)}: {json.dumps(names)}" for name, names in entry.items())
        + "\n}"
        for release, entry in sorted(api.items())
    )
    API.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
