"""Turn a rollout between two blocks into arrays, and arrays back into a rollout.

A snapshot has parts, each a set of named arrays:

    state     keys and values of the recent blocks, their clean tokens, the decoder's state
    sink      keys and values of the sink blocks; they never change once all are there
    archive   keys, values and pooled keys of the blocks archived since the snapshot before

A limited archive has its blocks one by one instead, so that those it evicts can go, and the state
names those it holds.

Who stores the parts (`packforcing.runtime.resume`) gives them back through a `SnapshotReader`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from packforcing.files import flush
from packforcing.runtime.allocations import archive_rows
from packforcing.runtime.archive import Archive
from packforcing.runtime.bundle import DTYPES
from packforcing.runtime.cache import Slot

if TYPE_CHECKING:
    from packforcing.runtime.rollout import Rollout

Arrays = dict[str, np.ndarray]
Form = tuple[tuple[int, ...], np.dtype]  # shape and dtype


class Counters(NamedTuple):
    """The numbers of a rollout between two blocks."""

    block: int = 0  # blocks of the video so far
    scene: int = 0  # its block that the scene began with; `oldest` and `mids` count from there
    oldest: int = 0  # as in `Cache`
    mids: tuple[int, ...] = ()


class Snapshot(NamedTuple):
    """A rollout between two blocks."""

    counters: Counters
    parts: dict[str, Arrays]
    blocks: dict[int, Arrays]  # that a limited archive holds, by number in the video
    valid: frozenset[str]  # the parts of the snapshots before that are still needed


class SnapshotReader(Protocol):
    """Gives back the parts of a snapshot."""

    def archive_parts(self) -> Sequence[tuple[str, int]]:
        """Return the archive's parts in order, each with the video's block that it ends before."""

    def read_part(self, part: str, forms: Mapping[str, Form]) -> Arrays:
        """Read arrays of exactly these forms."""

    def read_block(self, block: int, forms: Mapping[str, Form]) -> Arrays:
        """Read arrays of exactly these forms, of a limited archive's block of the video."""


def take_snapshot(rollout: Rollout, before: Counters) -> Snapshot:
    """Copy what decides about the next blocks to the host.

    Args:
        rollout: Between two blocks.
        before: The counters of the snapshot before, or of a video's beginning.

    Returns:
        The snapshot. Arrays of the archive are views of the rollout's.
    """
    config, cache, policy = rollout.config, rollout.cache, rollout.config.policy
    full = [slot for slot in cache.layout().slots if not slot.compressed]
    sink = [slot for slot in full if slot.block < policy.sink]
    parts: dict[str, Arrays] = {
        "state": {
            "key_values": _read_tokens(rollout, full[len(sink) :]),
            "recent": _recent(rollout),
            **{name: rollout.device.read(array) for name, array in rollout.decoder_state.items()},
        }
    }
    valid = set()
    snapshot_blocks = before.block - before.scene if before.scene == rollout.scene else 0
    if sink and len(sink) == min(snapshot_blocks, policy.sink):
        valid.add("sink")
    else:
        parts["sink"] = {"key_values": _read_tokens(rollout, sink)}
    archive, blocks = _archive_arrays(rollout.archive), {}
    rows = slice(archive_rows(config, snapshot_blocks), archive_rows(config, cache.committed))
    if rollout.archive.limit is not None:
        stored = rollout.archive.rows
        parts["state"]["archived"] = np.array([*stored], np.int64)
        blocks = {rollout.scene + block: _at(row, archive) for block, row in stored.items()}
    else:
        if snapshot_blocks:
            valid.add("archive")
        if rows.start < rows.stop:
            parts["archive"] = _at(rows, archive)
    block = rollout.scene + cache.committed
    counters = Counters(block, rollout.scene, cache.oldest, tuple(cache.mids))
    return Snapshot(counters, parts, blocks, frozenset(valid))


def _archive_arrays(archive: Archive) -> Arrays:
    return {"key_values": archive.key_values, "pooled_keys": archive.pooled_keys}


def _at(rows: int | slice, arrays: Arrays) -> Arrays:
    return {name: array[rows] for name, array in arrays.items()}


def restore_snapshot(rollout: Rollout, counters: Counters, reader: SnapshotReader) -> None:
    """Bring a rollout that has just begun to a snapshot.

    Args:
        rollout: Has begun a video that is long enough.
        counters: Of the snapshot.
        reader: Reads its parts.

    Raises:
        ValueError: The counters contradict the policy or the parts.
    """
    config, policy = rollout.config, rollout.config.policy
    committed = counters.block - counters.scene
    if not policy.sink <= counters.oldest <= max(policy.sink, committed):
        raise ValueError(f"no recent block can be the oldest at {counters.oldest}")
    rollout.set_counters(counters.scene, committed, counters.oldest, counters.mids)
    slots = rollout.cache.layout().slots
    sink = [slot for slot in slots if slot.block < policy.sink]
    recent = [slot for slot in slots if slot not in sink and not slot.compressed]
    decoder = {name: (a.shape, a.dtype) for name, a in rollout.decoder_state.items()}
    tokens = _recent(rollout)
    forms = {"key_values": _tokens_form(rollout, recent), "recent": (tokens.shape, tokens.dtype)}
    archived = policy.sink + np.arange(archive_rows(config, committed))
    if (limit := rollout.archive.limit) is not None:
        forms["archived"] = archived[:limit].shape, archived.dtype
    state = reader.read_part("state", {**forms, **decoder})
    tokens[...] = state["recent"]
    if "archived" in state:
        archived, all_blocks = state["archived"], archived
        if (np.diff(archived) <= 0).any() or not np.isin(archived, all_blocks).all():
            raise ValueError("the archive cannot hold what it names")
    rollout.archive.restore(archived.tolist())
    mids = set(counters.mids) & set(rollout.archive.stored(rollout.cache.candidates()))
    if not len(mids) == len(counters.mids) <= policy.mid:
        raise ValueError(f"mid blocks {counters.mids} cannot be read")
    _restore_archive(rollout.archive, rollout, counters, reader)
    values = {
        slot.block: rollout.archive.get(slot.block)[:, :, 0] for slot in slots if slot.compressed
    }
    values |= _by_block(recent, state["key_values"])
    if sink:
        first = reader.read_part("sink", {"key_values": _tokens_form(rollout, sink)})
        values |= _by_block(sink, first["key_values"])
    context = rollout.buffers.context
    for layer, kind in np.ndindex(context.shape[:2]):
        tokens = np.zeros(context.shape[2:], context.dtype)
        for slot in slots:
            part = values[slot.block][layer, kind]
            tokens[0, :, slot.first : slot.first + part.shape[-2]] = part
        rollout.device.write(context[layer, kind], tokens)
    for name, array in rollout.decoder_state.items():
        rollout.device.write(array, state[name])


def _restore_archive(
    archive: Archive, rollout: Rollout, counters: Counters, reader: SnapshotReader
) -> None:
    sink, first, arrays = rollout.config.policy.sink, 0, _archive_arrays(archive)
    parts = reader.archive_parts()
    if archive.limit is not None and not parts:
        forms = {name: (array.shape[1:], array.dtype) for name, array in arrays.items()}
        for block, row in archive.rows.items():
            for name, values in reader.read_block(counters.scene + block, forms).items():
                arrays[name][row] = values
        return
    for part, end in parts:
        last = archive_rows(rollout.config, end - counters.scene)
        forms = {
            name: ((last - first, *array.shape[1:]), array.dtype) for name, array in arrays.items()
        }
        for name, values in reader.read_part(part, forms).items():
            for i in range(last - first):
                # renders of version 2 have a limited archive's evicted blocks too, as zeros
                if sink + first + i in archive.rows:
                    arrays[name][archive.rows[sink + first + i]] = values[i]
        first = last
    if first != archive_rows(rollout.config, counters.block - counters.scene):
        raise ValueError(f"{first} archived blocks are there")


def _read_tokens(rollout: Rollout, slots: Sequence[Slot]) -> np.ndarray:
    """Copy keys and values of full blocks in the context, [L, 2, H, slots x N, d]."""
    context, size = rollout.buffers.context, rollout.config.block_tokens
    key_values = np.empty(*_tokens_form(rollout, slots))
    for layer, kind in np.ndindex(key_values.shape[:2]) if slots else ():
        tokens = rollout.device.read(context[layer, kind])[0]
        for i, slot in enumerate(slots):
            part = tokens[:, slot.first : slot.first + size]
            key_values[layer, kind, :, i * size : (i + 1) * size] = part
    return key_values


def _recent(rollout: Rollout) -> np.ndarray:
    """Return the clean tokens of the recent blocks, without rows that no block has written yet."""
    return rollout.buffers.recent[: rollout.cache.committed]


def _tokens_form(rollout: Rollout, slots: Sequence[Slot]) -> Form:
    layers, kinds, _, heads, _, width = rollout.buffers.context.shape
    tokens = len(slots) * rollout.config.block_tokens
    return (layers, kinds, heads, tokens, width), rollout.buffers.context.dtype


def _by_block(slots: Sequence[Slot], tokens: np.ndarray) -> dict[int, np.ndarray]:
    """Split what `_read_tokens` gave by block, each [L, 2, H, N, d]."""
    parts = np.split(tokens, len(slots), axis=3) if slots else []
    return {slot.block: part for slot, part in zip(slots, parts)}


def write_part(path: Path, arrays: Arrays) -> None:
    """Write a part of a snapshot as a safetensors file, flushed to the disk.

    fp8, for which safetensors has no NumPy type, is written as bytes.

    Raises:
        OSError: The disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {
        name: array.view(np.uint8) if array.dtype == DTYPES["fp8"] else array
        for name, array in arrays.items()
    }
    try:
        save_file(arrays, path)
    except SafetensorError as error:  # what the system says is in its text
        raise OSError(str(error)) from error
    flush(path)


def read_part(path: Path, forms: Mapping[str, Form]) -> Arrays:
    """Read what `write_part` wrote.

    Raises:
        ValueError: The file cannot be read, or holds arrays of other forms.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        for name, (_, dtype) in forms.items():
            if dtype == DTYPES["fp8"]:
                arrays[name] = arrays[name].view(dtype)
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from error
    if {name: (array.shape, array.dtype) for name, array in arrays.items()} != dict(forms):
        raise ValueError("it holds other arrays")
    return arrays
