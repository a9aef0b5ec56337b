"""The reference model as a whole, and its weights on disk (safetensors, never a pickle)."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from packforcing.autoencoder import TinyAutoencoder
from packforcing.compressor import Compressor
from packforcing.config import Config
from packforcing.errors import CheckpointError
from packforcing.transformer import Transformer


@dataclass
class Model:
    """Everything with weights, for one config."""

    config: Config
    transformer: Transformer
    autoencoder: TinyAutoencoder
    compressor: Compressor

    def parts(self) -> dict[str, nn.Module]:
        """The modules by the prefix their weights carry in a checkpoint."""
        return {
            "transformer": self.transformer,
            "autoencoder": self.autoencoder,
            "compressor": self.compressor,
        }


def random_model(config: Config, seed: int = 0) -> Model:
    """A model with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        autoencoder = TinyAutoencoder(config)
        model = Model(config, Transformer(config), autoencoder, Compressor(config, autoencoder))
    for part in model.parts().values():
        part.eval().requires_grad_(False)
    return model


def save_model(model: Model, path: str | os.PathLike[str], dtype: torch.dtype) -> None:
    """Writes all weights as one safetensors file in `dtype`."""
    tensors = {
        f"{prefix}.{name}": tensor.to(dtype).contiguous()
        for prefix, part in model.parts().items()
        for name, tensor in part.state_dict().items()
    }
    partial = Path(f"{path}.partial")
    save_file(tensors, partial, {"model": model.config.name})
    partial.replace(path)


def load_model(config: Config, path: str | os.PathLike[str]) -> Model:
    """Reads a file of `save_model`, computing in float32.

    Raises `CheckpointError` naming missing, unexpected or misshaped tensors.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights from {path}: {error}") from error
    model = random_model(config)
    wanted = {
        f"{prefix}.{name}": tensor.shape
        for prefix, part in model.parts().items()
        for name, tensor in part.state_dict().items()
    }
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        kinds = Counter(problem.split()[0] for problem in problems)
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise CheckpointError(
            f"{path} does not hold the weights of model '{config.name}' "
            f"({kinds['missing']} missing, {kinds['unexpected']} unexpected): "
            f"{'; '.join(problems[:10])}{more}"
        )
    for prefix, part in model.parts().items():
        part.load_state_dict(
            {name: tensors[f"{prefix}.{name}"].float() for name in part.state_dict()}
        )
    return model
