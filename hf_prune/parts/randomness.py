"""Random numbers that depend on what they are for, and on nothing that ran before."""

from __future__ import annotations

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream is a function of `key` alone: the same on every process and after a resume.

    torch's CPU engine looks at the lower 32 bits of a seed only, so the key is hashed into those.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
