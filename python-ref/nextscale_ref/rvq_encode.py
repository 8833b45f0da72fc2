"""Residual vector quantization, the encoder side, with the score that nextscale defines to the bit.

EnCodec and SoundStream (arXiv 2107.03312), Mimi, RQ-VAE (arXiv 2203.01941), DAC (arXiv 2306.06546), LlamaGen (arXiv
2406.06525): the codebook row nearest to what is left, level by level.
"""

import torch


def fma(a, b, c):
    """a * b + c of f32, rounded once.

    The product of two f32 is exact in f64. Their sum is rounded to f64 first: the second rounding gives another result
    only where the first one lands on the middle between two f32 by itself, about once in 2^29.
    """
    return (a.double() * b.double() + c.double()).float()


def chain(a, b):
    """Sum of a * b over the last dimension, f32, one fma a term, in order from 0."""
    total = torch.zeros(torch.broadcast_shapes(a.shape, b.shape)[:-1], device=a.device)
    for k in range(a.shape[-1]):
        total = fma(a[..., k], b[..., k], total)
    return total


def unit(rows, eps):
    """Rows divided by max(norm, eps)."""
    # The root of f32 is not rounded correctly by every build of PyTorch; through f64 it is.
    norm = chain(rows, rows).double().sqrt().float()
    return rows / torch.where(norm < eps, eps, norm)[..., None]


def scores(x, codes):
    """[rows, entries] of x [rows, dim] and codes [entries, dim], f32."""
    total = torch.zeros(x.shape[0], codes.shape[0], device=x.device)
    for k in range(x.shape[1]):
        difference = x[:, k, None] - codes[None, :, k]
        total = fma(difference, difference, total)
    return total


def nearest(x, codes):
    """The least score and its code, the lowest of equals; (inf, 0) where no score is finite."""
    score = scores(x, codes)
    score = torch.where(score < torch.inf, score, torch.inf)
    least = score.amin(1)
    # The first of the least: argmin on every device promises less.
    index = torch.arange(codes.shape[0], device=x.device).expand_as(score)
    code = torch.where(score == least[:, None], index, codes.shape[0]).amin(1)
    return least, code


def codebooks(rows, metric="l2", eps=1e-12, usage=None, usage_eps=1e-5):
    """(searched rows, rows that codes stand for), each [levels, entries, dim] f32, of rows [levels, entries, dim]."""
    rows = rows.float()
    if usage is not None:
        rows = rows / usage.clamp(min=usage_eps)[..., None]
    if metric == "l2":
        return rows, rows
    return unit(rows, eps), unit(rows, eps) if metric == "cosine_unit" else rows


def project(weight, x, bias):
    """32 chains of fma of four neighbours each, added in pairs: [rows, dim] of weight [dim, latent], x [rows, latent]."""
    sums = [torch.zeros(x.shape[0], weight.shape[0], device=x.device)] * 32
    for k in range(x.shape[1]):
        sums[k // 4 % 32] = fma(weight[None, :, k], x[:, k, None], sums[k // 4 % 32])
    for apart in (16, 8, 4, 2, 1):
        sums = [sums[c] + sums[c + apart] for c in range(apart)]
    return bias + sums[0]


def rvq_encode(x, books, levels, metric="l2", eps=1e-12, projections=None):
    """x [rows, dim] f32, books as `codebooks` gives them (one level is shared by all), or with projections (in_weight,
    in_bias, out_weight, out_bias) x [rows, latent]. Returns codes [levels, rows], distances [levels, rows], quantized and
    residual, f32.
    """
    search, values = books
    left, total, codes, distances = x.clone(), torch.zeros_like(x), [], []
    for level in range(levels):
        book = level if search.shape[0] > 1 else 0
        row = left if projections is None else project(projections[0][level], left, projections[1][level])
        if metric != "l2":
            row = unit(row, eps)
        distance, code = nearest(row, search[book])
        taken = values[book][code]
        if projections is not None:
            weight, y = projections[2][level], projections[3][level].expand(x.shape[0], -1)
            for j in range(weight.shape[1]):
                y = fma(weight[None, :, j], taken[:, j, None], y)
            taken = y
        left, total = left - taken, total + taken
        codes.append(code)
        distances.append(distance)
    return torch.stack(codes), torch.stack(distances), total, left
