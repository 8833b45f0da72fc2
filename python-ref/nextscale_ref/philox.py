"""Philox 4x32-10 (J. Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC'11), in Python integers."""

import torch

WORD = 0xFFFFFFFF

# The known answers published with Random123 (kat_vectors): counter, key, output.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """The four 32-bit words of one block. counter: 4 words, key: 2 words."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = 0xD2511F53 * x0
        product1 = 0xCD9E8D57 * x2
        x0, x1 = (product1 >> 32) ^ x1 ^ k0, product1 & WORD
        x2, x3 = (product0 >> 32) ^ x3 ^ k1, product0 & WORD
        # The Weyl sequence of the key: the golden ratio and the square root of 3, less 1.
        k0 = (k0 + 0x9E3779B9) & WORD
        k1 = (k1 + 0xBB67AE85) & WORD
    return x0, x1, x2, x3


def block(seed, position, domain, draw):
    """nextscale's counter: the position in the lower 64 bits, then domain and draw; the seed is the key."""
    return philox((position & WORD, position >> 32, domain, draw), (seed & WORD, seed >> 32))


def philox_fill(positions, seed=0, first_position=0, domain=0, draw=0, dtype=torch.uint32):
    """[positions, 4]: block i is that of position (first_position + i) mod 2^64.

    dtype: torch.uint32 for words, torch.float32 for their upper 24 bits as a number in [0, 1).
    """
    words = [block(seed, (first_position + i) & (2**64 - 1), domain, draw) for i in range(positions)]
    if dtype == torch.uint32:
        return torch.tensor(words, dtype=torch.int64).reshape(positions, 4).to(torch.uint32)
    # 24 bits fit in a float, so every number here is exact.
    uniforms = [[(word >> 8) * 2.0**-24 for word in four] for four in words]
    return torch.tensor(uniforms, dtype=dtype).reshape(positions, 4)
