"""The reference model as a whole, and its weights in files (safetensors, never a pickle)."""

from __future__ import annotations

import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
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
from packforcing.extras import optional_imports
from packforcing.files import new_file
from packforcing.transformer import Transformer

if TYPE_CHECKING:  # it needs diffusers, which the tiny autoencoder does not
    from packforcing.wan_autoencoder import WanAutoencoder

    Autoencoder = TinyAutoencoder | WanAutoencoder

Weights = Mapping[str, Tensor]  # by checkpoint name: part, a dot, the name in its state dict
Shapes = Mapping[str, tuple[int, ...]]  # likewise


@dataclass
class Model:
    """The parts with weights, for one config."""

    config: Config
    transformer: Transformer
    autoencoder: Autoencoder
    compressor: Compressor

    def parts(self) -> dict[str, nn.Module]:
        """Return the modules by the prefix of their weights in a checkpoint."""
        return {
            "transformer": self.transformer,
            "autoencoder": self.autoencoder,
            "compressor": self.compressor,
        }

    def weights(self) -> dict[str, Tensor]:
        """Return every weight by checkpoint name, rows in the checkpoint's order."""
        return {
            f"{prefix}.{name}": tensor
            for prefix, part in self.parts().items()
            for name, tensor in part.state_dict().items()
        }


def build_model(config: Config) -> Model:
    """Build a model in evaluation mode, on torch's current device and dtype, with torch's initial
    weights."""
    autoencoder = _autoencoder(config)
    model = Model(config, Transformer(config), autoencoder, Compressor(config, autoencoder.encode))
    for part in model.parts().values():
        part.eval().requires_grad_(False)
    return model


def _autoencoder(config: Config) -> Autoencoder:
    if config.vae != "wan":
        return TinyAutoencoder(config)
    with optional_imports("Wan's autoencoder", "export"):
        from packforcing.wan_autoencoder import WanAutoencoder
    return WanAutoencoder(config)


def random_model(config: Config, seed: int = 0) -> Model:
    """Build a model with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(config)


def load_model(config: Config, path: str | os.PathLike[str]) -> Model:
    """Load a model from a file of `save_model`, as float32.

    Raises:
        CheckpointError: The file cannot be read, or holds another model.
    """
    model, weights = random_model(config), open_weights(config, path)
    for prefix, part in model.parts().items():
        part.load_state_dict(
            {name: weights[f"{prefix}.{name}"].float() for name in part.state_dict()}
        )
    return model


def save_model(model: Model, path: str | os.PathLike[str], dtype: torch.dtype) -> None:
    """Write all weights to one safetensors file, which is whole or absent.

    Args:
        model: The model.
        path: The file.
        dtype: Of the weights in the file.

    Raises:
        OutputError: The file cannot be written.
    """
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in model.weights().items()}
    with new_file(path) as partial:
        save_file(tensors, partial, {"model": model.config.name})


class LazyWeights(Mapping[str, Tensor]):
    """Weights that are read or drawn one at a time, on access, and not stored."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the inherited method would read the weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_REMEDY = "a checkpoint as it is published is imported first ('packforcing import-checkpoint')"


def open_weights(config: Config, path: str | os.PathLike[str]) -> Weights:
    """Open a file of `save_model`. Each tensor is read from the disk on access.

    Raises:
        CheckpointError: The file cannot be read, or tensors are missing, unexpected or misshaped.
    """
    try:
        file = safe_open(path, "pt")
    except OSError as error:
        raise CheckpointError(f"cannot read weights from {path}: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"cannot read weights from {path}: {error}; {_REMEDY}") from error
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    expected = weight_shapes(config)
    if problems := describe_mismatch(shapes, expected):
        raise CheckpointError(
            f"{path} does not hold the weights of model '{config.name}' {problems}; {_REMEDY}"
        )
    return LazyWeights(expected, file.get_tensor)


def describe_mismatch(shapes: Shapes, expected: Shapes) -> str:
    """Describe how two sets of weights differ: counts, and the first ten names; "" if equal."""
    problems = [f"missing {name}" for name in expected if name not in shapes]
    problems += [f"unexpected {name}" for name in shapes if name not in expected]
    problems += [
        f"misshaped {name}: {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    kinds = Counter(problem.split()[0] for problem in problems)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
    return f"({counts}): {'; '.join(problems[:10])}{more}" if problems else ""


def random_weights(config: Config, seed: int = 0) -> Weights:
    """Return weights for tests of size and speed, each drawn on access.

    All are different, since builders of engines merge equal ones. Their scale keeps activations
    from vanishing and overflowing.
    """
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
    """Return the shape of every weight by checkpoint name; nothing is allocated."""
    with torch.device("meta"):
        weights = build_model(config).weights()
    return MappingProxyType({name: tuple(tensor.shape) for name, tensor in weights.items()})
