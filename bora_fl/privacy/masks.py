"""The masks of secure aggregation, from a cryptographic stream.

Flower's own generator folds a seed of 256 bits into 32 and feeds it to a Mersenne twister: whoever sees a masked vector
can try all seeds. Client and server put `expand` in its place; the protocol around it is Flower's.
"""

import hashlib
import math

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

_BYTES = 4


def expand(seed: bytes, modulus: int, shapes: list[tuple[int, ...]]) -> list[NDArray[np.int64]]:
    """Return arrays uniform on [0, modulus), the keystream of ChaCha20 under SHA-256 of the seed.

    Args:
        seed: The secret that two clients share, or a client's own.
        modulus: A power of two, at most 2^32.
        shapes: Of the arrays.

    Raises:
        ValueError: If the modulus is not usable.
    """
    if modulus < 2 or modulus & (modulus - 1) or modulus > 2 ** (8 * _BYTES):
        raise ValueError(f"modulus = {modulus}: masks are drawn modulo a power of two up to 2^32")
    stream = Cipher(algorithms.ChaCha20(hashlib.sha256(seed).digest(), bytes(16)), mode=None).encryptor()
    arrays = []
    for shape in shapes:
        bits = stream.update(bytes(_BYTES * math.prod(shape)))
        arrays.append((np.frombuffer(bits, dtype="<u4").astype(np.int64) & (modulus - 1)).reshape(shape))
    return arrays
