"""The packed layout of int8 weights that the native linear and embedding operators read.

`packed[n // 16, k // 64, (k % 64) // 4, n % 16, k % 4] == weight[n, k]`, zero padded: rows of 64
bytes that AMX tiles, AVX-512 VNNI, AVX2 and Arm dot products all load as they are.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

BLOCK_N = 16
BLOCK_K = 64
# Beyond this many terms a sum of uint8 * int8 may leave int32.
MAX_IN_FEATURES = 65536

T = TypeVar("T", bound=np.generic)


def packed_shape(out_features: int, in_features: int) -> tuple[int, int, int, int, int]:
    """Shape of the packed form of an `[out_features, in_features]` matrix."""
    return (-(-out_features // BLOCK_N), -(-in_features // BLOCK_K), BLOCK_K // 4, BLOCK_N, 4)


def pack_weight(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """Int8 `[N, K]` to packed int8 `[ceil(N/16), ceil(K/64), 16, 16, 4]`.

    Raises:
        ValueError: not a non-empty int8 matrix, or K above what int32 accumulation holds.
    """
    if weight.ndim != 2 or weight.dtype != np.int8 or weight.size == 0:
        raise ValueError(f"expected a non-empty int8 matrix, got {weight.dtype} {weight.shape}")
    out_features, in_features = weight.shape
    if in_features > MAX_IN_FEATURES:
        raise ValueError(f"expected at most {MAX_IN_FEATURES} input features, got {in_features}")
    n_blocks, k_blocks, *_ = packed_shape(out_features, in_features)
    padded = weight
    if weight.shape != (n_blocks * BLOCK_N, k_blocks * BLOCK_K):
        padded = np.zeros((n_blocks * BLOCK_N, k_blocks * BLOCK_K), np.int8)
        padded[:out_features, :in_features] = weight
    blocks = padded.reshape(n_blocks, BLOCK_N, k_blocks, BLOCK_K // 4, 4)
    return np.ascontiguousarray(blocks.transpose(0, 2, 3, 1, 4))


def unpack_weight(
    packed: NDArray[np.int8], out_features: int, in_features: int
) -> NDArray[np.int8]:
    """The inverse of `pack_weight`: int8 `[out_features, in_features]`.

    Raises:
        ValueError: `packed` does not have the packed shape of such a matrix.
    """
    expected = packed_shape(out_features, in_features)
    if packed.shape != expected:
        raise ValueError(f"expected packed shape {expected}, got {packed.shape}")
    n_blocks, k_blocks, *_ = expected
    padded = packed.transpose(0, 3, 1, 2, 4).reshape(n_blocks * BLOCK_N, k_blocks * BLOCK_K)
    return np.ascontiguousarray(padded[:out_features, :in_features])


def weight_sum(weight: NDArray[np.int8]) -> NDArray[np.int32]:
    """Sum over K of an int8 `[N, K]` matrix, int32 `[N]`: what the zero point is multiplied by."""
    return weight.sum(axis=1, dtype=np.int32)


def interleave_gate_up(gate: NDArray[T], up: NDArray[T]) -> NDArray[T]:
    """Rows (or elements) of gate and up in alternating blocks of 16, as swiglu expects them.

    Args:
        gate, up: `[N, ...]` each, N a multiple of 16: weights before packing, scales or biases.

    Returns:
        `[2 N, ...]`: 16 of gate, 16 of up, and so on.

    Raises:
        ValueError: the shapes differ or N is not a multiple of 16.
    """
    if gate.shape != up.shape or gate.ndim == 0 or gate.shape[0] % BLOCK_N:
        raise ValueError(
            f"expected equal shapes with a multiple of {BLOCK_N} rows, got {gate.shape} and "
            f"{up.shape}"
        )
    blocks = gate.shape[0] // BLOCK_N
    pair = np.stack([part.reshape(blocks, BLOCK_N, *gate.shape[1:]) for part in (gate, up)], axis=1)
    return pair.reshape(2 * gate.shape[0], *gate.shape[1:])
