"""Figures of GPUs: memory, bandwidth and the dense rate of their tensor cores, by product name.

`gpus.toml` has the data, its sources and the formula of the rates.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from packforcing.errors import ConfigError
from packforcing.units import GIB

# Operations per SM and clock of the tensor cores, with sums in fp16 where a GPU has that
PER_SM = {"fp16": 1024, "int8": 2048, "fp8": 2048, "nvfp4": 4096}
FLOAT_SUMS = ("fp16", "fp8")  # slower on GeForce where sums are fp32, which they are here
BOARD = Path("/proc/device-tree/model")  # the name of a Jetson, like "NVIDIA Jetson Orin Nano"
HERE = "here"  # stands for the GPU of this machine
SUGGESTIONS = 4


class GpuFigures(NamedTuple):
    """A GPU's figures.

    Attributes:
        name: Product name; with the memory where there are several, with the watts of a laptop's
            or the power mode of a Jetson's.
        target: Architecture, like "sm89".
        memory: GiB.
        bandwidth: GB/s.
        tflops: Dense rate by dtype, in 10^12 operations per second, with sums in fp32 or int32.
            A dtype that it lacks is not there.
    """

    name: str
    target: str
    memory: float
    bandwidth: float
    tflops: Mapping[str, float]

    @property
    def memory_bytes(self) -> int:
        """Return the memory in bytes."""
        return int(self.memory * GIB)


class _Model(NamedTuple):
    """A row of the table.

    `clock` in MHz and `watts` from the lowest to the highest. `mode` is a power mode, or empty.
    """

    series: dict[str, Any]
    name: str
    sms: int
    clock: tuple[float, float]
    memory: int
    bandwidth: float
    watts: tuple[float, float] | None
    mode: str = ""

    def at(self, watts: float | None = None) -> GpuFigures:
        """Return its figures; of a laptop's at a power, the lowest by default.

        Between the two powers that NVIDIA states, the clock is taken to grow linearly. Clocks
        published for powers in between are from 11% below that (RTX 4080 Laptop at 110 W) to 16%
        above it (RTX 5060 Laptop at 60 W).
        """
        name, clock = self.name, self.clock[0]
        if self.watts is not None:
            low, high = self.watts
            watts = min(watts or low, high)
            clock += (self.clock[1] - clock) * (watts - low) / (high - low)
            name += f" {watts:g} W"
        if self.mode:
            name += f" {self.mode}"
        per_second, per_sm = self.sms * clock * 1e6 / 1e12, self.series.get("per_sm", PER_SM)
        share = dict.fromkeys(FLOAT_SUMS, self.series["accumulate"])
        rates = {
            dtype: per_second * per_sm[dtype] * share.get(dtype, 1)
            for dtype in self.series["dtypes"]
        }
        rates["fp32"] = per_second * self.series["fp32"]
        return GpuFigures(name, self.series["target"], self.memory, self.bandwidth, rates)


@lru_cache(1)
def _models() -> dict[tuple[str, ...], list[_Model]]:
    """Return the rows of the table by the words of their names."""
    data = tomllib.loads(Path(__file__).with_name("gpus.toml").read_text(encoding="utf-8"))
    models: dict[tuple[str, ...], list[_Model]] = {}
    for series in data["series"]:
        for name, sms, clock, memory, bandwidth, *power in series["gpus"]:
            low, high = clock if isinstance(clock, list) else (clock, clock)
            mode = power[0] if power and isinstance(power[0], str) else ""
            watts = (power[0][0], power[0][1]) if power and not mode else None
            model = _Model(series, name, sms, (low, high), memory, bandwidth, watts, mode)
            models.setdefault(_words(name), []).append(model)
    named = {
        words: [
            model._replace(name=f"{model.name} {model.memory} GB")
            if len({other.memory for other in same}) > 1
            else model
            for model in same
        ]
        for words, same in models.items()
    }
    others = {
        other: name for s in data["series"] for other, name in s.get("other_names", {}).items()
    }
    return named | {_words(other): named[_words(name)] for other, name in others.items()}


@lru_cache(1)
def known_gpus() -> dict[str, GpuFigures]:
    """Return all GPUs with figures, by name; those of laptops at both ends of their power."""
    figures = [
        model.at(watts)
        for same in _models().values()
        for model in same
        for watts in model.watts or (None,)
    ]
    return {gpu.name: gpu for gpu in figures}


_AROUND_NAME = re.compile(  # what tools print before and after a GPU's name
    r"""^\s*(?:gpu|device)?\s*\#?\d{1,2}\s*[:-]  # nvidia-smi -L, Task Manager: an index
    | ^\s*cuda:\d+                               # torch
    | \(uuid:.*\)                                # nvidia-smi -L
    | ^.*\[(?=[^]]*rtx) | \].*$                  # lspci: the chip, and a revision
    | /pcie/sse2                                 # OpenGL
    | \((?:tm|r)\)                               # trademarks
    """,
    re.IGNORECASE | re.VERBOSE,
)
_GENERIC_WORDS = {
    "nvidia", "corporation", "geforce", "gpu", "graphics", "desktop", "with", "design",
    "generation", "workstation", "edition", "blackwell",
    "jetson", "developer", "kit", "engineering", "reference", "module",
}  # fmt: skip
_LAPTOP_WORDS = {"laptop", "mobile", "notebook", "m", "max", "q", "\u7b14\u8bb0\u672c\u7535\u8111"}
_ARCHITECTURES = {  # of names without figures
    r"\borin\b": "sm87",
    r"\bthor\b": "sm110",
    r"rtx pro \d+.* blackwell|rtx 50[5-9]0": "sm120",
    r"\bada\b|rtx 40[5-9]0|\bl40?s?\b": "sm89",
    r"rtx 30[5-9]0|\brtx a\d{3,4}\b|\ba(?:10|16|40)\b": "sm86",
    r"\ba(?:30|100)\b": "sm80",
    r"rtx 20[5-8]0|quadro rtx|titan rtx|gtx 16\d0|\bt4\b": "sm75",
}
_MAXN = re.compile(r"\bmaxn(?:[ _]super)?\b")
_MEMORY, _WATTS = re.compile(r"(\d+)\s*([gm])i?b\b"), re.compile(r"(\d+)\s*w(?:atts?)?\b")


def _words(name: str) -> tuple[str, ...]:
    """Return the words of a name that tell GPUs apart, in no particular order.

    "Super" is a word of GeForce's names, and for Orin that of a clock that every module has.
    """
    words = [
        "laptop" if word in _LAPTOP_WORDS else word
        for word in re.findall(r"[^\W\d_]+|\d+", name.lower().replace("rtx", " "))
        if word not in _GENERIC_WORDS
    ]
    if "orin" in words:
        words = [word for word in words if word != "super"]
    return tuple(sorted({"laptop"} & {*words}) + sorted(word for word in words if word != "laptop"))


def find_gpu(name: str) -> GpuFigures:
    """Return the figures of a GPU by its name, as tools print it or people write it.

    A word that is not part of the product's name, like Ti, SUPER, D or Laptop, or another amount
    of memory, makes it another GPU. A laptop's may come with its watts, as in "4070 laptop 80W";
    the lowest that NVIDIA states are assumed otherwise. A Jetson may come with its power mode, as
    in "Orin NX 16GB 25W"; the one without limits, MAXN, is assumed otherwise.

    Args:
        name: The name, or "here" for the first GPU of this machine.

    Raises:
        ConfigError: There are no figures for it, or it has no such mode or so few watts.
        BackendError: There is no GPU here.
    """
    if name.strip().lower() == HERE:
        return _gpu_here()
    text = _AROUND_NAME.sub(" ", name.lower())
    memory, watts = _MEMORY.search(text), _WATTS.search(text)
    text = _MAXN.sub(" ", _WATTS.sub(" ", _MEMORY.sub(" ", text)))
    models = _models().get(_words(text), [])
    if memory:
        memory_gib = int(memory[1]) / (1 if memory[2] == "g" else 1024)
        models = [model for model in models if model.memory == round(memory_gib)]
    if not models:
        raise ConfigError(_unknown(name, text))
    model = models[0]
    if watts and model.mode:
        modes = {one.mode: one for one in models if one.memory == model.memory}
        if f"{watts[1]}W" not in modes:
            raise ConfigError(
                f"no figures for {model.name} at {watts[1]} W; its modes with figures: "
                f"{', '.join(modes)}"
            )
        return modes[f"{watts[1]}W"].at()
    if watts and model.watts and int(watts[1]) < model.watts[0]:
        raise ConfigError(
            f"{model.name} takes from {model.watts[0]} to {model.watts[1]} W, not {watts[1]}"
        )
    return model.at(int(watts[1]) if watts else None)


def _gpu_here() -> GpuFigures:
    """Return the figures of this machine's first GPU, with the power that it is limited to.

    One that shares the host's memory is known by the name of the board. Its memory is the smallest
    power of two that holds what the system sees of it.
    """
    from packforcing.runtime.nvml import UNIFIED_TARGETS, gpus

    gpu = gpus()[0]
    if gpu.target in UNIFIED_TARGETS:
        memory_gib = 1 << (gpu.memory_total - 1 >> 30).bit_length()
        try:
            board = BOARD.read_text(encoding="utf-8").strip("\0\n ")
        except OSError:
            board = gpu.name
        return find_gpu(f"{board}, {memory_gib} GB")
    watts = f", {gpu.power_limit:.0f} W" if gpu.power_limit else ""
    return find_gpu(f"{gpu.name}, {gpu.memory_total >> 20} MiB{watts}")


def _unknown(name: str, text: str) -> str:
    """Say that there are no figures for a GPU, which ones have a similar name, and what to do."""
    known = {model.name: words for words, same in _models().items() for model in same}
    words = {*_words(text)}
    numbers = {word for word in words if len(word) > 2 and word.isdigit()}
    telling = numbers | (words & {"orin", "thor"})
    near = [other for other, its_words in known.items() if telling & {*its_words}]
    near.sort(key=lambda other: len(words ^ {*known[other]}))  # words that one of the two lacks
    product = " ".join(text.upper().replace("RTX", "").split())
    near = near or difflib.get_close_matches(f"RTX {product}", known, SUGGESTIONS, 0.8)
    spaced = re.sub(r"\brtx(?=\d)", "rtx ", " ".join(re.findall(r"\w+", text)))
    target = next((t for form, t in _ARCHITECTURES.items() if re.search(form, spaced)), None)
    return (
        f"no figures for a GPU '{name}'"
        + (f"; did you mean {' or '.join(near[:SUGGESTIONS])}? " if near else ". ")
        + (f"For this one use --target {target}" if target else "For others use --target")
        + ", --budget with its memory in GiB and, with --fps, --rates"
    )


def parse_rates(text: str, target: str, memory: float) -> GpuFigures:
    """Return a GPU from figures that a user states.

    Args:
        text: Dense TFLOPS by dtype, and `bandwidth` in GB/s, as in "fp16=30,fp8=60,bandwidth=272".
        target: Its architecture.
        memory: GiB.

    Raises:
        ConfigError: The text is of another form, or lacks fp16 or the bandwidth.
    """
    figures: dict[str, float] = {}
    for part in text.split(","):
        dtype, _, rate = part.strip().partition("=")
        try:
            figures[dtype] = float(rate)
        except ValueError:
            figures[dtype] = 0
        if dtype not in {*PER_SM, "fp32", "bandwidth"} or not 0 < figures[dtype] < 1e9:
            raise ConfigError(
                f"'{part}' in --rates is not DTYPE=TFLOPS or bandwidth=GB/s, like "
                f"fp16=30,fp8=60,bandwidth=272; dtypes: fp32, {', '.join(PER_SM)}"
            )
    if not {"fp16", "bandwidth"} <= figures.keys():
        raise ConfigError("--rates needs fp16 and bandwidth, like fp16=30,fp8=60,bandwidth=272")
    bandwidth = figures.pop("bandwidth")
    return GpuFigures(f"a GPU for {target}", target, memory, bandwidth, figures)
