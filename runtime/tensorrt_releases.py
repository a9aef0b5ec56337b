"""What the releases of TensorRT take: one table, which the loader and the builder read.

Names of the Python API were read from the bindings of releases 10.3.0, 10.14.1.48, 10.15.1.29,
10.16.1.11, 11.0.0.114, 11.1.0.106, 11.2.1.2, 11.3.0.99 and 11.4.0.106, in the wheels
`tensorrt-cu12-bindings` and `tensorrt-cu13-bindings`. tests/tensorrt_api.json has those of two, and
the tests hold loader and builder to them. Of what these use, 11.0 changed:

- Typing. A network of 10.16 is weakly typed unless it is created with the flag STRONGLY_TYPED. 11
  knows strong typing alone and ignores the flag, whose number changed: only its name is used.
  Builder flags of precisions (FP16, INT8, ...) are gone; the graph has all dtypes, so none is set.
- The length of attention's keys. `IAttention.key_value_lengths` came with 11.0. Before, a mask
  does it.
- `ICudaEngine`: device_memory_size, get_device_memory_size_for_profile, weight_streaming_budget
  and create_execution_context_without_device_memory are gone. Their successors with _v2, and
  create_execution_context of an IRuntimeConfig, are in both.

The parser knows `Attention` from 10.14, `RotaryEmbedding` and `RMSNormalization` from 10.15: pages
10.14.1.html and 10.15.1.html under
https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/release-notes-10/.
What 10.16 does with the input `nonpad_kv_seqlen` of `Attention` is not documented; 11 drops it with
a warning, and the builder sets the length anyway. So a parser before 11 gets a graph without this
input.

JetPack 7.2 has 10.16.2, for Orin and Thor; from 7.2.2 on, 11.4.1 can be installed:
https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-jetson.html.
JetPack 6 has 10.3, which has neither `IAttention` nor a stream to write an engine to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from packforcing.errors import BackendError
from packforcing.runtime.engine_records import Length

L4T = Path("/etc/nv_tegra_release")  # "# R36 (release), REVISION: 4.7, ...": that of JetPack 6
JETPACKS = {35: "5", 36: "6"}  # too old, by the major version of their L4T
UPGRADE = "upgrade the Jetson to JetPack 7.2 or later, which has TensorRT 10.16 (docs/jetson.md)"


class Release(NamedTuple):
    """What releases take, from one on.

    Attributes:
        oldest: The first of them.
        network_flags: Names of `NetworkDefinitionCreationFlag` that make a strongly typed network.
        lengths: How attention can be told the length of its keys, the better first.
        reads_length: Whether the parser reads a graph whose `Attention` has the length as an input.
        states_sizes: Whether the builder's log has scratch by profile and kernels, as that of
            TensorRT-RTX; otherwise the engine is asked, which needs the GPU that builds it.
    """

    oldest: tuple[int, ...]
    network_flags: tuple[str, ...]
    lengths: tuple[Length, ...]
    reads_length: bool
    states_sizes: bool


RELEASES = {  # newest first
    "tensorrt-rtx": (Release((1,), (), ("input", "mask"), True, True),),
    "tensorrt": (
        Release((11, 0), (), ("input", "mask"), True, False),
        Release((10, 16), ("STRONGLY_TYPED",), ("mask",), False, False),
    ),
}


def find_release(backend: str, version: str) -> Release:
    """Return what a version of a backend's library takes.

    Args:
        backend: "tensorrt-rtx" or "tensorrt".
        version: Of the library, like "10.16.2.10".

    Raises:
        BackendError: It is too old.
    """
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:4])
    for release in RELEASES[backend]:
        if numbers >= release.oldest:
            return release
    oldest = ".".join(map(str, RELEASES[backend][-1].oldest))
    remedy = old_jetpack() or f"install a newer one, or {UPGRADE}"
    raise BackendError(f"{backend} {version} is too old, {oldest} or newer is needed: {remedy}")


def old_jetpack() -> str:
    """Say what to do on a Jetson whose JetPack is too old; "" on any other machine."""
    try:
        release = re.search(r"# R(\d+) .*?REVISION: ([\d.]+)", L4T.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    if release is None or int(release[1]) not in JETPACKS:
        return ""
    name = JETPACKS[int(release[1])]
    has = ": TensorRT 10.3, CUDA 12.6, Python 3.10" if name == "6" else ""
    return f"this is JetPack {name} (L4T {release[1]}.{release[2]}{has}); {UPGRADE}"
