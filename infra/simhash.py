"""SimHash of texts: near-equal texts have hashes at a small Hamming distance."""

import hashlib
import re

import numpy as np

WORDS = 3


def simhash(text: str) -> int:
    """64-bit SimHash over word 3-grams (Charikar 2002, STOC); case and punctuation don't matter.

    A text of fewer than three words is one gram. The empty text has hash 0.
    """
    words = re.findall(r"\w+", text.casefold())
    if not words:
        return 0
    grams = [" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))]
    digests = [hashlib.blake2b(gram.encode(), digest_size=8).digest() for gram in grams]
    bits = np.unpackbits(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 8), axis=1)
    majority = 2 * bits.sum(axis=0) > len(grams)
    return int.from_bytes(np.packbits(majority).tobytes(), "big")
