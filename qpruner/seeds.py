"""Seeds that depend on what they are for, and on nothing else."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the meaning of a random draw, such as ``derive_seed(seed, "batch", epoch, index, rank)``.

    Streams made this way are independent of each other, of the order in which they are drawn and of everything that
    was drawn before, which is what lets a resumed run repeat the numbers of an uninterrupted one.
    """
    digest = hashlib.sha256("/".join(map(repr, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
