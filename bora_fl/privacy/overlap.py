"""Notice that a data set holds records of another one, whose ledger they have spent from already.

Beside each ledger lies a sketch of the data set: the k smallest of the keyed 64-bit hashes of its records (a bottom-k
sketch, Cohen and Kaplan, 2007). Below the smaller of two sketches' largest values both hold every hash there is, so
that the share of one's values that the other holds too estimates the share of common records; for sets of up to k
records it is exact. The key is the site's secret: who holds a sketch without it cannot try records.
"""

import os
import secrets
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bora_fl.paths import write_atomically

SIZE = 1 << 14
KEY, SUFFIX = "sketch.key", ".sketch"

Sketch = NDArray[np.uint64]


def make_sketch(records: Iterable[str], key: bytes, size: int = SIZE) -> Sketch:
    """The smallest hashes of a data set, ascending; a record that is there twice counts once.

    Args:
        records: Each record's text; white space around it is left out.
        key: The site's secret.
        size: How many hashes are kept.
    """
    hashes = {blake2b(record.strip().encode(), key=key, digest_size=8).digest() for record in records}
    return np.unique(np.frombuffer(b"".join(hashes), dtype=np.uint64))[:size]


def common_share(of: Sketch, other: Sketch, size: int = SIZE) -> float:
    """Estimate the share of one data set's records that another holds too."""
    known = min([int(s[-1]) for s in (of, other) if len(s) == size], default=2**64 - 1)
    seen = of[of <= np.uint64(known)]
    return float(np.isin(seen, other).mean()) if len(seen) else 0.0


def note(folder: Path, name: str, records: Iterable[str]) -> dict[str, float]:
    """Keep a data set's sketch beside its ledger, with all records that it ever held, and compare it with the others.

    Args:
        folder: Where the ledgers are.
        name: The ledger's name.
        records: Each record's text.

    Returns:
        Other ledger's name to the share of the records, as they are now, that its data set holds or has held.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    now = make_sketch(records, _key(folder / KEY))
    file = folder / f"{name}{SUFFIX}"
    ever = np.unique(np.concatenate([now, _read(file)]))[:SIZE] if file.exists() else now
    if not file.exists() or not np.array_equal(ever, _read(file)):
        write_atomically(file, ever.astype("<u8").tobytes(), mode=0o600)
    others = [other for other in sorted(folder.glob(f"*{SUFFIX}")) if other != file]
    shares = {other.name.removesuffix(SUFFIX): common_share(now, _read(other)) for other in others}
    return {other: share for other, share in shares.items() if share > 0}


def _read(file: Path) -> Sketch:
    return np.frombuffer(file.read_bytes(), dtype="<u8").astype(np.uint64)


def _key(file: Path) -> bytes:
    """The site's secret; made once, readable by its owner alone."""
    try:
        with open(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as new:
            new.write(secrets.token_bytes(32))
    except FileExistsError:
        pass
    return file.read_bytes()
