"""The reference model as a whole, and its weights on disk (safetensors, never a pickle)."""

from __future__ import annotations

import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from packforcing.autoencoder import TinyAutoencoder
from packforcing.compressor import Compressor
from packforcing.config import Config
from packforcing.errors import CheckpointError
from packforcing.transformer import Transformer

if TYPE_CHECKING:  # needs diffusers, which the tiny one does not
    from packforcing.wan_autoencoder import WanAutoencoder

    Autoencoder = TinyAutoencoder | WanAutoencoder

Weights = Mapping[str, Tensor]  # by checkpoint name: part, a dot, the name in its state dict
Shapes = Mapping[str, tuple[int, ...]]  # likewise


@dataclass
class Model:
    """Everything with weights, for one config."""

    config: Config
    transformer: Transformer
    autoencoder: Autoencoder
    compressor: Compressor

    def parts(self) -> dict[str, nn.Module]:
        """The modules by the prefix their weights carry in a checkpoint."""
        return {
            "transformer": self.transformer,
            "autoencoder": self.autoencoder,
            "compressor": self.compressor,
        }

    def weights(self) -> dict[str, Tensor]:
        """Every weight, in the checkpoint's order of rows."""
        return {
            f"{prefix}.{name}": tensor
            for prefix, part in self.parts().items()
            for name, tensor in part.state_dict().items()
        }


def skeleton(config: Config) -> Model:
    """A model in evaluation mode, on torch's current device and dtype, weights as they come."""
    autoencoder = _autoencoder(config)
    model = Model(config, Transformer(config), autoencoder, Compressor(config, autoencoder.encode))
    for part in model.parts().values():
        part.eval().requires_grad_(False)
    return model


def _autoencoder(config: Config) -> Autoencoder:
    if config.vae != "wan":
        return TinyAutoencoder(config)
    try:
        from packforcing.wan_autoencoder import WanAutoencoder
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"Wan's autoencoder needs {error.name}, which is not installed: "
            "pip install '.[export]' in the checkout"
        ) from error
    return WanAutoencoder(config)


def random_model(config: Config, seed: int = 0) -> Model:
    """A model with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return skeleton(config)


def load_model(config: Config, path: str | os.PathLike[str]) -> Model:
    """Reads a file of `save_model`, computing in float32; raises `CheckpointError`."""
    model, weights = random_model(config), open_weights(config, path)
    for prefix, part in model.parts().items():
        part.load_state_dict(
            {name: weights[f"{prefix}.{name}"].float() for name in part.state_dict()}
        )
    return model


def save_model(model: Model, path: str | os.PathLike[str], dtype: torch.dtype) -> None:
    """Writes all weights as one safetensors file in `dtype`."""
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.weights().items()}
    partial = Path(f"{path}.partial")
    save_file(tensors, partial, {"model": model.config.name})
    partial.replace(path)


class LazyWeights(Mapping[str, Tensor]):
    """Weights that are read or drawn one at a time, when asked for, and not kept."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the inherited one would read it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_weights(config: Config, path: str | os.PathLike[str]) -> Weights:
    """The tensors of a file of `save_model`, each read from the disk when it is asked for.

    Raises `CheckpointError` naming missing, unexpected or misshaped tensors.
    """
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights from {path}: {error}") from error
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = weight_shapes(config)
    if problems := describe_mismatch(found, wanted):
        raise CheckpointError(
            f"{path} does not hold the weights of model '{config.name}' {problems}"
        )
    return LazyWeights(wanted, file.get_tensor)


def describe_mismatch(found: Shapes, wanted: Shapes) -> str:
    """What tells two sets of weights apart: how many names, and the first ten; "" if nothing."""
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted]
    problems += [
        f"misshaped {name}: {found[name]}, not {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    kinds = Counter(problem.split()[0] for problem in problems)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
    return f"({counts}): {'; '.join(problems[:10])}{more}" if problems else ""


def random_weights(config: Config, seed: int = 0) -> Weights:
    """Weights for tests of size and speed, each drawn when it is asked for: all different, as
    builders of engines merge equal ones, and scaled so that activations neither vanish nor
    overflow."""
    shapes = weight_shapes(config)

    def draw(name: str) -> Tensor:
        shape = shapes[name]
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = torch.from_numpy(rng.random(shape, np.float32)).sub_(0.5)  # variance 1/12
        if len(shape) < 2:  # biases around 0, scales of norms around 1
            return values.mul_(0.1).add_(float(name.endswith("weight")))
        return values.mul_((12 / math.prod(shape[1:])) ** 0.5)

    return LazyWeights(shapes, draw)


@cache
def weight_shapes(config: Config) -> Shapes:
    """Shape of every weight by checkpoint name; nothing is allocated."""
    with torch.device("meta"):
        weights = skeleton(config).weights()
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in weights.items()})
