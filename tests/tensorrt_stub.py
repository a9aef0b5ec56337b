"""The module `tensorrt` of two releases, on the emulated GPU: as loader and builder know it.

`make_library(version, cuda)` returns a module whose classes have the public names of that release's
Python API (tests/tensorrt_api.json) and no others: `AttributeError`, as of the bindings. Its
engines are files that name their graph, which ONNX Runtime runs on the emulated GPU.
`install(folder, version)` puts the release where an interpreter finds it, so that the builder's
child process has it too.

It is stricter than a release where that is not documented: the parser of 10.16 refuses the length
that `Attention` reads, and a weakly typed network does not build.
"""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnx

from tests import emulated
from tests.emulated import Cuda

API = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text(encoding="utf-8"))
VERSIONS = tuple(API)
ORIN = (8, 7)
LAYERS = (
    "Layers:\nName: _gemm_mha_v2_myl0_1, LayerType: kgen, Inputs: ["
    + ", ".join(3 * ["{ Name: x, Dimensions: [2,4,8], Strides: [1], Datatype: Half }"])
    + "], Constants: [], Outputs: [], TacticName: none"
)


def has_lengths(version: str) -> bool:
    return "key_value_lengths" in API[version]["IAttention"]


def install(folder: Path, version: str, target=ORIN) -> None:
    """Write the package and pip's record of it into a folder of the module search path."""
    (folder / "tensorrt").mkdir(parents=True)
    (folder / "tensorrt" / "__init__.py").write_text(
        "import sys\n"
        "from tests.emulated import Cuda\n"
        "from tests.tensorrt_stub import make_library\n"
        f"sys.modules[__name__] = make_library({version!r}, Cuda(1 << 33, target={target}))\n"
    )
    info = folder / f"tensorrt-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: tensorrt\nVersion: {version}\n")


def make_library(version: str, cuda: Cuda) -> ModuleType:
    """Make the module of a release."""
    api = API[version]

    def guard(thing, name):
        """Let through what the class has in this release, and what it returns likewise."""
        if type(thing) in (Guard, int, str, bytes, bool, tuple, type(None)) or isinstance(
            thing, IntEnum
        ):
            return thing
        return Guard(thing, name) if name in api else thing

    class Guard:
        def __init__(self, thing, name):
            object.__setattr__(self, "guarded", thing)
            object.__setattr__(self, "class_name", name)

        def _check(self, attribute):
            if attribute not in api[self.class_name]:
                raise AttributeError(f"{self.class_name} of TensorRT {version} has no {attribute}")

        def __getattr__(self, attribute):
            self._check(attribute)
            value = getattr(self.guarded, attribute)
            if callable(value):
                return lambda *args: wrapped(value(*map(bare, args)))
            return wrapped(value)

        def __setattr__(self, attribute, value):
            if attribute == "__class__":  # the builder names the class of a layer
                object.__setattr__(self, "class_name", value.__name__)
                return
            self._check(attribute)
            setattr(self.guarded, attribute, bare(value))

    def bare(thing):
        return thing.guarded if type(thing) is Guard else thing

    def wrapped(thing):
        return guard(thing, NAMES.get(type(thing).__name__, type(thing).__name__))

    library = emulated.TensorRT(cuda)
    library.strong, library.lengths = not _weak(version), has_lengths(version)

    class ILogger:
        VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR = (
            SimpleNamespace(name=name)
            for name in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR")
        )

    library.ILogger = ILogger

    def named_class(name):
        return type(name, (), {})

    contents = {
        "__version__": version,
        "ILogger": ILogger,
        "Logger": ILogger,
        "IProgressMonitor": named_class("IProgressMonitor"),
        "IStreamWriter": named_class("IStreamWriter"),
        "IAttentionInputLayer": named_class("IAttentionInputLayer"),
        "Builder": lambda logger: guard(Builder(library, logger), "Builder"),
        "OnnxParser": lambda network, logger: guard(
            OnnxParser(bare(network), logger), "OnnxParser"
        ),
        "Runtime": lambda logger: guard(Runtime(library, logger), "Runtime"),
        "ExecutionContextAllocationStrategy": library.ExecutionContextAllocationStrategy,
        **{name: _enum(api, name) for name in ENUMS},
        **{name: name for name in ("int32", "int64", "fp8", "float16")},
    }
    module = ModuleType("tensorrt")
    for name, value in contents.items():
        assert name in api[""] or name.startswith("__"), f"TensorRT {version} has no {name}"
        setattr(module, name, value)
    library.LayerType = contents["LayerType"]
    library.STRONGLY_TYPED = contents["NetworkDefinitionCreationFlag"].STRONGLY_TYPED
    return module


ENUMS = (
    "BuilderFlag", "ElementWiseOperation", "FillOperation", "LayerInformationFormat", "LayerType",
    "NetworkDefinitionCreationFlag", "ProfilingVerbosity",
)  # fmt: skip
NAMES = {  # of the classes below, in the API
    "Engine": "ICudaEngine", "Layer": "ILayer", "AttentionLayer": "ILayer", "Tensor": "ITensor",
    "Attention": "IAttention", "Network": "INetworkDefinition", "Config": "IBuilderConfig",
    "Profile": "IOptimizationProfile", "Inspector": "EngineInspector",
    "ShuffleLayer": "IShuffleLayer", "FillLayer": "IFillLayer",
}  # fmt: skip


def _weak(version):
    return "FP16" in API[version]["BuilderFlag"]


def _enum(api, name):
    """An enum of a release. That of networks begins with EXPLICIT_BATCH, which 11 lacks."""
    members = [member for member in api[name] if member not in ("name", "value")]
    if name == "NetworkDefinitionCreationFlag":
        members.sort(key=lambda member: (member.startswith("PREFER"), member))
    return IntEnum(name, members, start=0)


class Builder:
    def __init__(self, library, logger):
        self._library, self._logger = library, logger

    def create_network(self, flags):
        strong = self._library.strong or flags & 1 << self._library.STRONGLY_TYPED
        return Network(self._library, bool(strong))

    def create_builder_config(self):
        return Config()

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network_to_stream(self, network, config, writer):
        logger = self._logger

        def log(severity, text):
            logger.log(getattr(logger, severity), text)

        if not network.strong:
            log("ERROR", "the network is weakly typed")
            return False
        for attention in network.attentions:
            length = attention.key_value_lengths or attention.mask
            if attention.reads_length and length is None:
                log("WARNING", "Unused Input: kv_len")
            if attention.over_context and length is None:
                log("ERROR", "attention over the context has no length")
                return False
        config.progress_monitor.phase_start("Building", None, 1)
        config.progress_monitor.step_complete("Building", 0)
        config.progress_monitor.phase_finish("Building")
        log("INFO", "Total Weights Memory: 1000 bytes")
        writer.write(str(network.path).encode())
        return True


class Network:
    def __init__(self, library, strong):
        self.library, self.strong = library, strong
        self.path, self.inputs, self.layers, self.attentions = None, [], [], []

    @property
    def num_inputs(self):
        return len(self.inputs)

    @property
    def num_layers(self):
        return len(self.layers)

    def get_input(self, index):
        return self.inputs[index]

    def get_layer(self, index):
        return self.layers[index]

    def __getattr__(self, name):
        if not name.startswith("add_"):
            raise AttributeError(name)
        special = {"add_shuffle": ShuffleLayer, "add_fill": FillLayer}
        return lambda *args: special.get(name, Layer)()


class Layer:
    """Any layer that the builder adds; its output is a tensor."""

    type = None

    def get_output(self, index):
        return Tensor("", ())

    def set_input(self, index, tensor):
        pass


class ShuffleLayer(Layer):
    reshape_dims = None


class FillLayer(Layer):
    pass


class AttentionLayer(Layer):
    def __init__(self, library, attention):
        self.type, self.attention = library.LayerType.ATTENTION_INPUT, attention


class Attention:
    mask = key_value_lengths = normalization_quantize_to_type = normalization_quantize_scale = None

    def __init__(self, node, over_context):
        self.reads_length = len(node.input) > 6 and bool(node.input[6])
        self.over_context = over_context

    def get_input(self, index):
        return Tensor("", (1, 2, -1 if self.over_context else 4, 8))


class Tensor:
    def __init__(self, name, shape):
        self.name, self.shape = name, shape


class Config:
    progress_monitor = profiling_verbosity = None

    def set_flag(self, flag):
        pass

    def add_optimization_profile(self, profile):
        return 0


class Profile:
    def set_shape(self, name, least, best, most):
        assert least == best == most


class OnnxParser:
    def __init__(self, network, logger):
        self._network, self._logger = network, logger

    def parse_from_file(self, path):
        return self.parse(Path(path).read_bytes(), path)

    def parse(self, model, path):
        network = self._network
        network.path = Path(path).resolve()
        graph = onnx.load_model_from_string(model).graph
        network.inputs = [Tensor(tensor.name, ()) for tensor in graph.input]
        text = {tensor.name for tensor in graph.input if tensor.name.startswith("cross_")}
        for node in graph.node:
            if node.op_type != "Attention":
                continue
            attention = Attention(node, over_context=not text & {*_origins(graph, node.input[1])})
            if attention.reads_length and not network.library.lengths:
                self._logger.log(self._logger.ERROR, "Attention: unknown input nonpad_kv_seqlen")
                return False
            network.attentions.append(attention)
            network.layers.append(AttentionLayer(network.library, attention))
        return True


def _origins(graph, name):
    """The names that a tensor comes from through nodes of one data input."""
    while True:
        yield name
        node = next((node for node in graph.node if name in node.output), None)
        if node is None:
            return
        name = node.input[0]


class Runtime(emulated.Runtime):
    def deserialize_cuda_engine(self, blob):
        engine = super().deserialize_cuda_engine(blob)
        if engine is not None:
            engine.__class__ = Engine
        return engine


class Inspector:
    def get_engine_information(self, form):
        assert form.name == "ONELINE"
        return LAYERS


class Engine(emulated.ICudaEngine):
    def create_engine_inspector(self):
        return Inspector()

    def create_execution_context(self, config):
        assert config.strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return emulated.IExecutionContext(self)

    def get_tensor_dtype(self, name):
        names = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "int8": "INT8"}
        return SimpleNamespace(name=names[self.tensors[name].dtype])
