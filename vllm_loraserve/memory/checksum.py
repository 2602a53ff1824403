"""The page checksum: the extension's where it is built, else the same function in numpy.

The algorithm is written down in `csrc/pool/page_hash.h`: 64 bits, XXH3's 32x32 multiplication per 64-bit
word, lanes and chunks independent. It finds corruption and mixed-up pages; it does not resist forgery, which
is the work of the cluster key (`transfer/auth.py`) and of the adapter's sha256 digest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from vllm_loraserve.memory import extension

LANES, STRIPES = 8, 16
CHUNK = LANES * STRIPES * 8
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_LOW = np.uint64(0xFFFFFFFF)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)), np.uint64)


_KEYS = _mix(np.arange(1, STRIPES * LANES + 1, dtype=np.uint64) * GOLDEN).reshape(STRIPES, LANES)


def checksum_of(data: bytes | bytearray | memoryview | np.ndarray) -> int:
    """The checksum of a buffer, by numpy. The extension's result for the same bytes is the same."""
    flat = np.frombuffer(data, np.uint8)
    length = flat.size
    chunks = -(-length // CHUNK)
    if chunks * CHUNK != length:
        flat = np.concatenate([flat, np.zeros(chunks * CHUNK - length, np.uint8)])
    words = flat.view("<u8").reshape(chunks, STRIPES, LANES)
    x = words ^ _KEYS
    product = ((x & _LOW) * (x >> np.uint64(32))).sum(axis=1, dtype=np.uint64)
    trail = np.zeros((chunks, LANES), np.uint64)
    for stripe in range(STRIPES):
        trail = ((trail << np.uint64(1)) | (trail >> np.uint64(63))) + words[:, stripe]
    position = (np.arange(1, chunks * LANES + 1, dtype=np.uint64) * GOLDEN).reshape(chunks, LANES)
    terms = _mix(_mix(product + position) ^ trail)
    total = terms.sum(dtype=np.uint64).reshape(1)
    return int(_mix(total ^ np.array([length], np.uint64) * GOLDEN)[0])


def checksums(addresses: Sequence[int], lengths: Sequence[int], device: int = extension.HOST) -> list[int]:
    """The checksum of each (address, length) in bytes. Device memory needs the extension.

    Raises `extension.ExtensionError` for device memory where the extension is missing.
    """
    library = extension.load()
    if library is not None:
        return library.checksums(addresses, lengths, device)
    if device != extension.HOST:
        raise extension.ExtensionError("checksums of device memory need the extension, which is not built")
    return [
        checksum_of(memoryview((ctypes.c_ubyte * length).from_address(address))) if length else checksum_of(b"")
        for address, length in zip(addresses, lengths, strict=True)
    ]
