"""Lend memory to other libraries without a copy: DLPack 0.8's C structures, by ctypes.

A producer hands out a capsule named "dltensor" that owns a `DLManagedTensor`. The consumer renames
the capsule and calls the tensor's deleter when it is done; a capsule that nobody took calls it
itself. https://dmlc.github.io/dlpack/latest/c_api.html
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

CPU, CUDA = 1, 2  # DLDeviceType
_CODES = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode, by NumPy's kind
_NAME = b"dltensor"

_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", _Deleter))


_lent: dict[int, tuple[object, ...]] = {}  # what is in use elsewhere, by the address of its tensor


def capsule(
    address: int, shape: tuple[int, ...], dtype: np.dtype, device: tuple[int, int], owner: object
) -> Any:
    """Make a DLPack capsule of C-contiguous memory.

    Args:
        address: Where the memory begins.
        shape: Its shape.
        dtype: A signed, unsigned or floating-point dtype of NumPy's own.
        device: DLPack's device type and the device's number.
        owner: Kept alive while the memory is lent.

    Raises:
        BufferError: DLPack has no name for the dtype.
    """
    if dtype.kind not in _CODES:
        raise BufferError(f"DLPack has no {dtype}")
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    steps = (math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    strides = (ctypes.c_int64 * len(shape))(*steps)  # in elements
    managed = _ManagedTensor()
    code, bits = _CODES[dtype.kind], 8 * dtype.itemsize
    managed.tensor = _Tensor(address, *device, len(shape), code, bits, 1, sizes, strides, 0)
    managed.deleter = _give_back
    place = ctypes.addressof(managed)
    _lent[place] = managed, sizes, strides, owner
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, _Destructor)
    return new(place, _NAME, _end_of_capsule)


@_Deleter
def _give_back(place: int) -> None:
    _lent.pop(place, None)


@_Destructor
def _end_of_capsule(address: int) -> None:
    """Give the memory back if no consumer took it: one that did has renamed the capsule."""
    capsule_object = ctypes.c_void_p(address)
    is_valid, pointer = ctypes.pythonapi.PyCapsule_IsValid, ctypes.pythonapi.PyCapsule_GetPointer
    is_valid.argtypes = pointer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    pointer.restype = ctypes.c_void_p
    if is_valid(capsule_object, _NAME):
        _give_back(pointer(capsule_object, _NAME))
