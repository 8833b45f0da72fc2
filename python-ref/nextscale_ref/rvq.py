"""Residual vector quantization, the decoder side.

SoundStream (arXiv 2107.03312) and EnCodec: a row is the sum over levels of one entry of each level's codebook.
RQ-VAE (arXiv 2203.01941) shares one codebook between the levels and stores codes rows first.
"""

import torch
import torch.nn.functional as F


def levels_first(codes, rows_first=False):
    """Codes as [batch, levels, rows] int64 (or [levels, rows] if they have no batch).

    codes: [batch, levels, rows] or [levels, rows], any integer dtype; with `rows_first` the last two are exchanged.
    """
    codes = codes.to(torch.int64)
    return codes.transpose(-1, -2) if rows_first else codes


def codebook(codebooks, level):
    """[entries, dim] of one level, of codebooks [levels, entries, dim] or [entries, dim] shared by all levels."""
    return codebooks[level] if codebooks.dim() == 3 else codebooks


def terms(codes, codebooks, dtype, null_code=None, rows_first=False):
    """Yields what each level adds, levels ascending: [batch, rows, dim] (or [rows, dim]) of `dtype`.

    A code equal to `null_code` adds nothing, also if it is outside the codebook.
    """
    codes = levels_first(codes, rows_first)
    for level in range(codes.shape[-2]):
        index = codes[..., level, :]
        null = torch.zeros_like(index, dtype=torch.bool) if null_code is None else index == null_code
        row = F.embedding(index.masked_fill(null, 0), codebook(codebooks, level)).to(dtype)
        yield row.masked_fill(null[..., None], 0)


def rvq_decode(codes, codebooks, out_dtype=None, null_code=None, rows_first=False):
    """What nextscale promises bit for bit: f32 additions one after the other, from +0, rounded once to `out_dtype`.

    codes: [batch, levels, rows] or [levels, rows], any integer dtype; with `rows_first` the last two are exchanged.
    codebooks: [levels, entries, dim] or [entries, dim], f32, f16 or bf16.
    Returns [batch, rows, dim] or [rows, dim] of `out_dtype` (default: that of codebooks).
    """
    total = _zeros(codes, codebooks, torch.float32, rows_first)
    for term in terms(codes, codebooks, torch.float32, null_code, rows_first):
        total = total + term
    return total.to(out_dtype or codebooks.dtype)


def rvq_decode_f64(codes, codebooks, null_code=None, rows_first=False):
    """The sum in f64. Arguments as in `rvq_decode`; returns f64."""
    total = _zeros(codes, codebooks, torch.float64, rows_first)
    for term in terms(codes, codebooks, torch.float64, null_code, rows_first):
        total = total + term
    return total


def error_bound(codes, codebooks, out_dtype, null_code=None, rows_first=False):
    """How far `rvq_decode` may be from the exact sum, element by element, in f64.

    n - 1 roundings of f32 sums (the first addition, to +0, is exact) give (n - 1) u / (1 - (n - 1) u) * sum of |terms|
    with u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2); rounding to `out_dtype` adds
    half a unit in the last place of the result, or half the smallest subnormal.
    """
    magnitude = _zeros(codes, codebooks, torch.float64, rows_first)
    roundings = -1
    for term in terms(codes, codebooks, torch.float64, null_code, rows_first):
        magnitude = magnitude + term.abs()
        roundings += 1
    u = max(roundings, 0) * 2.0**-24
    bound = u / (1 - u) * magnitude
    if out_dtype != torch.float32:
        info = torch.finfo(out_dtype)
        bound = bound + info.eps / 2 * (magnitude + bound) + info.smallest_normal * info.eps / 2
    return bound


def _zeros(codes, codebooks, dtype, rows_first):
    shape = levels_first(codes, rows_first).shape
    return torch.zeros(*shape[:-2], shape[-1], codebooks.shape[-1], dtype=dtype, device=codebooks.device)
