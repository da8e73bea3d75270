"""Every random stream of a run derives from (run seed, purpose, round, client)."""

import hashlib


def derive(seed: int, purpose: str, *where: int) -> int:
    """A 63-bit seed for one purpose in one place of the run, the same on every machine.

    Args:
        seed: ``run.seed``.
        purpose: What the numbers are for, such as ``"batches"``; streams of different purposes are independent.
        where: Round and client, as far as they apply.
    """
    text = ":".join([str(seed), purpose, *map(str, where)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
