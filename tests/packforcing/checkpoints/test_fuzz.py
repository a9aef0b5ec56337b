"""Import of changed checkpoints of every container: a right model, or one line.

What is harmless has to be imported, and gives the weights that were stored. What is harmful is
refused in one line. A change of bytes is either: what is imported then is what an independent
reader finds in the file. Nothing is executed, nothing is left behind, and memory stays small.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from packforcing import MODELS
from packforcing.checkpoints.convert import import_checkpoint
from packforcing.checkpoints.names import split_name
from packforcing.errors import PackForcingError
from packforcing.presets import model_config
from tests.packforcing.checkpoints.forms import IN_PLACE, gguf_file
from tests.packforcing.checkpoints.layouts import diffusers_name, imported, other, wan_shapes

KIND, CONTAINERS = "self-forcing", ("safetensors", "torch", "sharded", "gguf", "diffusers")
FULL, SAMPLE = 2000, 50
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole() -> Weights:
    """A transformer of one layer, its values exact in bfloat16."""
    generator = torch.Generator().manual_seed(5)
    shapes = wan_shapes(32, 64, 32, 32, 1)
    return {
        name: torch.randn(s, generator=generator).bfloat16().float() for name, s in shapes.items()
    }


@pytest.fixture(autouse=True)
def one_layer(monkeypatch, tiny_models):
    config = msgspec.structs.replace(
        model_config(KIND), layers=1, dim=32, ffn_dim=64, text_dim=32, freq_dim=32
    )
    monkeypatch.setitem(MODELS, KIND, config)


# Changes of tensors: names, shapes and dtypes, before they are written


def wrap(rng: random.Random, w: Weights) -> Weights:
    prefix = "".join(
        rng.choice(["model.", "module.", "_orig_mod.", "net.", "model.diffusion_model."])
        for _ in range(rng.randrange(4))
    )
    return {prefix + name: tensor for name, tensor in w.items()}


def wrap_blocks(rng: random.Random, w: Weights) -> Weights:
    infix = rng.choice(
        ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"]
    )
    return {name.replace("blocks.0.", f"blocks.0.{infix}."): tensor for name, tensor in w.items()}


def shuffle(rng: random.Random, w: Weights) -> Weights:
    return dict(rng.sample(list(w.items()), len(w)))


def narrow(rng: random.Random, w: Weights) -> Weights:
    return {
        name: tensor.bfloat16() if tensor.dtype == torch.float32 and rng.random() < 0.5 else tensor
        for name, tensor in w.items()
    }


def add_critic(rng: random.Random, w: Weights) -> Weights:
    critic = rng.choice(["critic.model.", "fake_score.", "teacher.module."])
    return w | {critic + name: tensor for name, tensor in other(w).items()}


def add_counter(rng: random.Random, w: Weights) -> Weights:
    return w | {rng.choice(["step", "n_averaged", "epoch"]): torch.tensor(3.0)}


def pick(rng: random.Random, w: Weights) -> str:
    beside = "critic", "fake_score", "teacher"
    return rng.choice([name for name in w if "." in name and not name.startswith(beside)])


def drop(rng: random.Random, w: Weights) -> Weights:
    lost = pick(rng, w)
    return {name: tensor for name, tensor in w.items() if name != lost}


def rename(rng: random.Random, w: Weights) -> Weights:
    renamed, position = pick(rng, w), rng.random()
    begin = max(renamed.rfind("mod.") + 4, renamed.rfind("module.") + 7)  # after what wraps it
    at = begin + int(position * (len(renamed) - begin))
    return {
        name[:at] + rng.choice("xyzq") + name[at:] if name == renamed else name: tensor
        for name, tensor in w.items()
    }


def add(rng: random.Random, w: Weights) -> Weights:
    name = rng.choice(["blocks.0.extra.weight", "blocks.9.ffn.0.bias", "head.other", "head.x.y"])
    return w | {name: torch.zeros(rng.choice([(2,), (3, 4), (0,)]))}


def reshape(rng: random.Random, w: Weights) -> Weights:
    name = pick(rng, w)
    shape = rng.choice([(-1,), (1, *w[name].shape), (*w[name].shape, 1)])
    changed = (
        w[name].reshape(shape) if w[name].reshape(shape).shape != w[name].shape else w[name][:-1]
    )
    return w | {name: changed.clone()}


def cast(rng: random.Random, w: Weights) -> Weights:
    name = pick(rng, w)
    return w | {name: w[name].to(rng.choice([torch.int32, torch.float64, torch.bool, torch.int8]))}


def spoil(rng: random.Random, w: Weights) -> Weights:
    name, changed = pick(rng, w), {}
    changed[name] = w[name].clone()
    changed[name].view(-1)[rng.randrange(w[name].numel())] = float(rng.choice(["nan", "inf"]))
    return w | changed


def double(rng: random.Random, w: Weights) -> Weights:
    name = pick(rng, w)
    return w | {f"module.{name}": w[name] + 1}


HARMLESS = [wrap, wrap_blocks, shuffle, narrow, add_critic, add_counter]
HARMFUL = [drop, rename, add, reshape, cast, spoil, double]


# Containers


def write(rng: random.Random, container: str, folder: Path, w: Weights) -> Path:
    """Write weights into a container; returns what is named at import."""
    w = {name: tensor.contiguous() for name, tensor in w.items()}
    if container == "safetensors":
        metadata = {"format": "pt", "note": "x" * rng.randrange(100)}
        save_file(w, folder / "a.safetensors", metadata)
        return folder / "a.safetensors"
    if container == "torch":
        content: dict = w
        for key in rng.sample(["state_dict", "model", "generator_ema", "module"], rng.randrange(3)):
            content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": w}}}}
        torch.save(content, folder / "a.pt")
        return folder / "a.pt"
    if container == "gguf":
        return gguf_file(folder, {name: t.float() for name, t in w.items()}, "F32")[0]
    if container == "diffusers":
        (folder / "transformer").mkdir()
        (folder / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
        (folder / "transformer" / "config.json").write_text("{}")
        w = {diffusers_name(name): tensor for name, tensor in w.items()}
        save_file(w, folder / "transformer" / "diffusion_pytorch_model.safetensors")
        return folder
    names, weight_map = list(w), {}
    for number in (1, 2, 3):
        part = {name: w[name] for name in names[number - 1 :: 3]}
        save_file(part, folder / f"model-{number:05}-of-00003.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number:05}-of-00003.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read_again(folder: Path) -> Weights:
    """All weights in a folder by an independent reader, by Wan's names."""
    tensors: Weights = {}
    for path in sorted(folder.rglob("*.*")):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        elif path.suffix == ".pt":
            flatten((), torch.load(path, weights_only=True), tensors)
        elif path.suffix == ".gguf":
            import gguf

            for one in gguf.GGUFReader(path).tensors:
                values = gguf.quants.dequantize(one.data, one.tensor_type)
                shape = tuple(reversed(one.shape.tolist()))
                tensors[one.name] = torch.from_numpy(np.array(values, np.float32)).reshape(shape)
    named = {split_name(name): tensor for name, tensor in tensors.items()}
    entries = {entry for entry, _ in named}
    entry = "generator_ema" if "generator_ema" in entries else ""
    return {name: tensor for (of, name), tensor in named.items() if of == entry}


def flatten(keys: tuple[str, ...], content: object, tensors: Weights) -> None:
    if isinstance(content, Tensor):
        tensors[".".join(keys)] = content
    elif isinstance(content, dict):
        for key, value in content.items():
            flatten((*keys, str(key)), value, tensors)


# Changes of files


class Code:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def header_bytes(path: Path, content: bytearray) -> tuple[int, int]:
    """Where the part of a file is that is not values."""
    if path.suffix == ".safetensors":
        return 0, 8 + int.from_bytes(content[:8], "little")
    if path.suffix == ".gguf":
        return 0, 4096
    if path.suffix == ".pt" and bool(content[-1] & 1):
        return content.rindex(b"PK\x01\x02"), len(content)
    return 0, min(len(content), 4096)


def flip(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    begin, end = header_bytes(path, content)
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(begin, end)] = rng.randrange(256)
    path.write_bytes(content)


def truncate(rng: random.Random, path: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def append(rng: random.Random, path: Path) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 99)))


def insert(rng: random.Random, path: Path) -> None:
    content, at = path.read_bytes(), rng.randrange(path.stat().st_size)
    path.write_bytes(content[:at] + rng.randbytes(rng.randint(1, 20)) + content[at:])


def zero(rng: random.Random, path: Path) -> None:
    content = bytearray(path.read_bytes())
    begin, end = header_bytes(path, content)
    at = rng.randrange(begin, end)
    content[at : min(end, at + rng.randint(1, 64))] = bytes(min(end, at + 64) - at)[: end - at]
    path.write_bytes(content)


def claim(rng: random.Random, path: Path) -> None:
    """A number of eight bytes in the header becomes one of terabytes."""
    content = bytearray(path.read_bytes())
    content += bytes(max(0, 8 - len(content)))
    begin, end = header_bytes(path, content)
    struct.pack_into("<Q", content, rng.randrange(begin, max(begin + 1, end - 8)),
                     rng.choice([2**40, 2**62, 2**64 - 1]))  # fmt: skip
    path.write_bytes(content)


def replace(rng: random.Random, path: Path) -> None:
    path.write_bytes(IN_PLACE[rng.choice(sorted(IN_PLACE))][0])


def delete(rng: random.Random, path: Path) -> None:
    path.unlink()


def hostile(rng: random.Random, path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(2)}, "x": Code(path.parent / "was-run")}, path)


def bomb(rng: random.Random, path: Path) -> None:
    """A pickle that asks for a terabyte."""
    torch.save({"a.b": torch.zeros(2)}, path)
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    asks = rng.choice(
        [b"cbuiltins\nbytearray\n", b"c__builtin__\nbytearray\n", b"ctorch\nFloatTensor\n"]
    )
    with zipfile.ZipFile(path, "w") as copy:
        for name, content in entries.items():
            if name.endswith("data.pkl"):
                content = (
                    b"\x80\x02}X\x03\x00\x00\x00a.b" + asks + b"\x8a\x06" + b"\0\0\0\0\0\1\x85Rs."
                )
            copy.writestr(name, content)


def alter_json(rng: random.Random, path: Path) -> None:
    """The header of safetensors, or an index, with a value replaced; the lengths stay right."""
    content = path.read_bytes()
    framed = path.suffix == ".safetensors"
    length = int.from_bytes(content[:8], "little") if framed else len(content)
    start = 8 if framed else 0
    header = json.loads(content[start : start + length])
    entries = header if framed else header.setdefault("weight_map", {})
    key = rng.choice(sorted(entries) or ["x"])
    odd = [None, [], {}, -1, 2**63, "F32", "../x", {"dtype": "F32", "shape": [2**40, 2**40],
           "data_offsets": [0, 2**62]}, [[[[]]]], True]  # fmt: skip
    if framed and isinstance(entries[key], dict) and rng.random() < 0.7:
        field = rng.choice(["dtype", "shape", "data_offsets"])
        entries[key] = {**entries[key], field: rng.choice(odd)}
    else:
        entries[key] = rng.choice(odd)
    encoded = json.dumps(header).encode()
    framing = len(encoded).to_bytes(8, "little") if framed else b""
    path.write_bytes(framing + encoded + (content[start + length :] if framed else b""))


BYTES = [flip, flip, truncate, append, insert, zero, claim, replace, delete, hostile, bomb]


def change_files(rng: random.Random, folder: Path) -> str:
    """Change one of a checkpoint's files; returns what was done."""
    files = sorted(path for path in folder.rglob("*.*") if path.is_file())
    path = rng.choice(files)
    changes: list[Callable] = list(BYTES)
    if path.suffix in (".safetensors", ".json"):
        changes += [alter_json] * 3
    change = rng.choice(changes)
    change(rng, path)
    return f"{change.__name__} of {path.name}"


def run_case(number: int, whole: Weights, folder: Path) -> str:
    """Change one checkpoint and import it; returns "imported", "refused" or what is wrong."""
    rng = random.Random(f"import {number}")
    source = folder / "source"
    source.mkdir(parents=True)
    container = rng.choice(CONTAINERS)
    changes = rng.sample(HARMLESS, rng.randint(0, 3))
    kind = rng.choice(["harmless", "harmful", "bytes", "bytes"])
    if container == "gguf":  # it has no int64, and one dtype here
        changes = [change for change in changes if change is not narrow]
    if container == "diffusers":  # whose names are whole
        changes = [change for change in changes if change in (shuffle, narrow)]
    order = sorted(changes, key=[narrow, shuffle, wrap_blocks, wrap, add_critic, add_counter].index)
    weights = whole
    for change in order:
        weights = change(rng, weights)
    what = [container, *(change.__name__ for change in order)]
    if kind == "harmful":
        harm = rng.choice([one for one in HARMFUL if container != "gguf" or one is not cast])
        weights = harm(rng, weights)
        what.append(harm.__name__)
    path = write(rng, container, source, weights)
    if kind == "bytes":
        what.append(change_files(rng, source))
    label = f"case {number} ({', '.join(what)})"
    try:
        import_checkpoint([path], folder / "model", kind=KIND)
    except PackForcingError as error:
        outcome = "refused" if kind != "harmless" else f"{label} refused: {error}"
        if "\n" in str(error) or not str(error):
            outcome = f"{label}: {error!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome = f"{label}: {error!r}"
    else:
        copied = {n.removeprefix("transformer."): t for n, t in imported(folder / "model").items()}
        expected = whole if kind == "harmless" else read_again(source)
        same = all(
            n in expected and t.float().equal(expected[n].float()) for n, t in copied.items()
        )
        outcome = "imported" if same and len(copied) == len(whole) else f"{label}: other weights"
        if kind == "harmful":
            outcome = f"{label}: imported"
        shutil.rmtree(folder / "model")
    left = {entry.name for entry in folder.iterdir()} - {"source"}
    if left or (source / "was-run").exists() or (source / "transformer" / "was-run").exists():
        outcome = f"{label} left {left} or was executed"
    shutil.rmtree(folder)
    return outcome


def peak_bytes() -> int:
    resource = pytest.importorskip("resource")
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize(
    "cases", [pytest.param(range(SAMPLE), id="50"),
              pytest.param(range(SAMPLE, FULL), id="2000", marks=pytest.mark.full)]
)  # fmt: skip
def test_a_changed_checkpoint_is_a_right_model_or_one_line(cases, whole, tmp_path):
    run_case(-1, whole, tmp_path / "first")  # loads what all need
    before = peak_bytes()
    outcomes = [run_case(number, whole, tmp_path / str(number)) for number in cases]
    faults = [outcome for outcome in outcomes if outcome not in ("imported", "refused")]
    assert not faults, "\n".join(faults)
    assert outcomes.count("imported") > len(outcomes) / 8 < outcomes.count("refused")
    assert peak_bytes() - before < 300e6
