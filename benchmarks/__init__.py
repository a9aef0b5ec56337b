import packforcing  # noqa: F401  before ONNX Runtime, which reports usage otherwise
