"""The inference library, behind two calls: load a graph, bind it to fixed arrays.

ONNX Runtime on the CPU. All that knows of the library is in this file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from packforcing.errors import BackendError, BundleError
from packforcing.runtime.bundle import GraphSpec

TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)"}  # as the library names them


class Graph:
    """A loaded graph; `seconds` adds up the time spent inside it."""

    def __init__(self, path: Path, spec: GraphSpec, threads: int | None) -> None:
        ort = _onnxruntime()
        cores = os.cpu_count() or 1
        options = ort.SessionOptions()
        options.intra_op_num_threads = min(threads or cores, cores)
        options.log_severity_level = 3
        # graphs take turns: one must not spin on the cores that the next one needs
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library raises its own unrelated types
            raise BackendError(f"ONNX Runtime cannot load {path}: {error}") from error
        self.spec, self.seconds = spec, 0.0
        loaded = (self._session.get_inputs(), self._session.get_outputs())
        for found, wanted in zip(loaded, (spec.inputs, spec.outputs)):
            have = [(tensor.name, tuple(tensor.shape), tensor.type) for tensor in found]
            want = [(tensor.name, tensor.shape, TYPES[tensor.dtype]) for tensor in wanted]
            if have != want:
                raise BundleError(f"{path} does not have the tensors its manifest lists")

    def bind(self, arrays: dict[str, np.ndarray]) -> Callable[[], None]:
        """Fixes inputs and outputs to these arrays for good; returns the call that runs it."""
        binding = self._session.io_binding()
        for tensors, bind in (
            (self.spec.inputs, binding.bind_input),
            (self.spec.outputs, binding.bind_output),
        ):
            for tensor in tensors:
                array = arrays[tensor.name]
                assert array.flags.c_contiguous and array.dtype == tensor.dtype, tensor.name
                bind(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        run = self._session.run_with_iobinding

        def call(keep_alive: dict[str, np.ndarray] = arrays) -> None:
            began = time.perf_counter()
            run(binding)
            self.seconds += time.perf_counter() - began

        return call


def _onnxruntime():
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise BackendError(
            "ONNX Runtime is not installed: pip install onnxruntime "
            "(or onnxruntime-gpu; install exactly one of the two)"
        ) from error
    except ImportError as error:
        raise BackendError(f"ONNX Runtime is installed but does not load: {error}") from error
    return onnxruntime
