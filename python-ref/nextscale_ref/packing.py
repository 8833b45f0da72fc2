"""Packed keys and values, in PyTorch: formats as nextscale.h has them, in f32 for values, f64 for what judges them."""

import math

import torch

from nextscale_ref import philox

ROTATION_DOMAIN = 0x726F7461
BEYOND = 2.0**59


def signs(seed, dim):
    """+1 and -1 of a seeded rotation."""
    words = philox.philox_fill(2, seed=seed, first_position=0, domain=ROTATION_DOMAIN, draw=0, dtype=torch.uint32)
    words = words.to(torch.int64).flatten()
    bits = (words[:, None] >> torch.arange(32)) & 1
    return 1.0 - 2.0 * bits.flatten()[:dim].double()


def rotation(dim, seed=None):
    """The matrix R [dim, dim], f64: R x is the rotated row."""
    block = dim & -dim
    i = torch.arange(dim)
    both = i[:, None] & i[None, :] & (block - 1)
    odd = torch.zeros_like(both)
    while both.any():
        odd ^= both & 1
        both = both >> 1
    matrix = (1.0 - 2.0 * odd.double()) / math.sqrt(block)
    matrix = matrix * (i[:, None] // block == i[None, :] // block)
    return matrix if seed is None else matrix * signs(seed, dim)


def tamed(x, dims):
    """NaN as 0, what is 2^59 or more as the greatest magnitude below that over `dims`."""
    beyond = ~(x.abs() < BEYOND)
    most = torch.where(beyond, 0, x.abs()).amax(dims, keepdim=True)
    x = torch.where(x.isnan(), 0, x)
    return torch.where(x.abs() < BEYOND, x, most * x.sign())


def codes_of(packed, bits, dim):
    """[..., slot] u8 -> [..., dim] int64."""
    all_bits = ((packed[..., : dim * bits // 8, None].to(torch.int64) >> torch.arange(8)) & 1).flatten(-2)
    return (all_bits.unflatten(-1, (dim, bits)) << torch.arange(bits)).sum(-1)


def pack_codes(codes, bits):
    """[..., dim] integers -> [..., dim * bits / 8] u8."""
    all_bits = ((codes[..., None].to(torch.int64) >> torch.arange(bits, device=codes.device)) & 1).flatten(-2)
    return (all_bits.unflatten(-1, (-1, 8)) << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def centroids(bits):
    """Of the normal distribution, f64: Lloyd's iteration with the density in closed form."""
    half = 2 ** (bits - 1)
    found = (torch.arange(half).double() + 0.5) * 2.5 / half
    for _ in range(2000):
        edges = torch.cat([torch.zeros(1), (found[1:] + found[:-1]) / 2, torch.tensor([40.0])]).double()
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.erfc(edges / math.sqrt(2)) / 2
        found = (density[:-1] - density[1:]) / (mass[:-1] - mass[1:])
    return torch.cat([-found.flip(0), found])


def to_17_bits(x):
    return ((x.float().view(torch.int32) + 0x40) & ~0x7F).view(torch.float32)


def scaled(x, fp8, scale=None):
    """Codes and scales of fp8 and int8, in f32 as the kernels compute: x [..., dim]."""
    most = 448.0 if fp8 else 127.0
    if scale is None:
        scale = to_17_bits((x.abs().amax(-1, keepdim=True) / most).clamp_min(2.0**-96))
    v = x * (1 / scale)
    if fp8:
        return v.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scale
    return v.clamp(-127, 127).round().to(torch.int8).view(torch.uint8), scale


def uniform(x, bits, dims, numbers):
    """Codes and (scale, min) between the extremes over `dims`, in f32 as the kernels compute."""
    def stored(n):
        return n if numbers == torch.float32 else n.clamp(-65504, 65504).half().float()

    least = stored(x.amin(dims, keepdim=True) + 0.0)
    scale = stored(to_17_bits((x.amax(dims, keepdim=True) - least) / (2**bits - 1)))
    scale = torch.where(scale >= 2.0**-126, scale, 0)
    v = (x - least) * torch.where(scale > 0, 1 / scale, 0)
    return v.clamp(0, 2**bits - 1).round().to(torch.uint8), scale, least


def values(fmt, codes, numbers, bits, dim):
    """What codes [..., dim] stand for, f64, before they are rotated back. `numbers` broadcast against them."""
    numbers = [n.double() for n in numbers]
    if fmt == "fp8":
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).double() * numbers[0]
    if fmt == "int8":
        return codes.to(torch.uint8).view(torch.int8).double() * numbers[0]
    if fmt == "lloyd_max":
        return centroids(bits)[codes] * numbers[0] / math.sqrt(dim)
    return codes.double() * numbers[0] + numbers[1]
