"""What surrounds attention: merging partial outputs, and preparing queries, keys and values.

Both in f64 from the formulas, with the bounds that nextscale states around them.
"""

import torch
import torch.nn.functional as F

U = 2.0**-24  # Half a unit in the last place of an f32, relative.


def rounding(magnitude, dtype):
    """How far rounding to `dtype` may move values of this magnitude."""
    info = torch.finfo(dtype)
    return info.eps / 2 * magnitude + info.smallest_normal * info.eps / 2


# ---- merge


def merge(parts, lse, old=None):
    """Attention outputs over disjoint keys, merged by their log-sum-exps (ring attention, arXiv 2310.01889).

    parts: [parts, batch, rows, heads, dim]; lse: [parts, batch, heads, rows] f32, natural logarithm; -inf: no weight.
    old: what comes before part 0, as ([batch, rows, heads, dim], [batch, heads, rows]).
    Returns f64 (out, lse) of the shapes of `old`, and how far nextscale may be from them before `out` is rounded.
    """
    if old is not None:
        parts = torch.cat([old[0].double()[None], parts.double()])
        lse = torch.cat([old[1][None], lse])
    # [parts, batch, rows, heads, 1]
    logits = lse.double().transpose(-1, -2)[..., None]
    top = logits.max(0).values
    weights = torch.where(logits == -torch.inf, 0, (logits - top).exp())
    total = weights.sum(0)
    values = torch.where(logits == -torch.inf, 0, parts.double())
    out = torch.where(total == 0, 0, (weights * values).sum(0) / total)
    merged = torch.where(total == 0, -torch.inf, top + total.log())

    count = parts.shape[0]
    spread = torch.where(logits == -torch.inf, 0, top - logits)
    out_bound = ((2 * count + 64 + 3 * spread) * U * weights * values.abs()).sum(0) / total.clamp_min(1)
    lse_bound = torch.where(total == 0, 0, U * (merged.abs() + count + 64))

    def of_rows(x):
        return x[..., 0].transpose(-1, -2).contiguous()

    # Weights below 2^-126 count as 0.
    return out, of_rows(merged), out_bound + 2.0**-126 * values.abs().sum(0), of_rows(lse_bound)


# ---- prepare


def normalise(x, norm, eps, weight=None):
    """x [..., dim] in f64. norm: none, l2 (VAR, Infinity) or rms (LLaMA), over the last dimension."""
    if norm == "l2":
        return F.normalize(x, dim=-1, eps=eps)
    if norm == "rms":
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        return x if weight is None else x * weight
    return x


def rotate_interleaved(x, cos, sin):
    """Pairs (2j, 2j+1), as Infinity's rope. x [..., dim]; cos and sin [..., dim / 2], or [..., dim]: one an element."""
    if cos.shape[-1] == x.shape[-1]:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], -1).flatten(-2)
        return x * cos + turned * sin
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2)


def rotate_half(x, cos, sin, axes=1):
    """Halves (j, j + dim / 2), as LLaMA's and ACDiT's rope, of each of `axes` blocks. Shapes as above."""
    if cos.shape[-1] != x.shape[-1]:
        def wide(t):
            return t.unflatten(-1, (axes, -1)).repeat_interleave(2, -2).flatten(-2)

        cos, sin = wide(cos), wide(sin)
    first, second = x.unflatten(-1, (axes, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], -2).flatten(-3)
    return x * cos + turned * sin


def rotate(x, cos, sin, rope, axes=1):
    """The first elements of x [..., dim] by tables whose width says how many; the rest as it is."""
    turn = rotate_interleaved if rope.startswith("interleaved") else lambda *a: rotate_half(*a, axes)
    rotary = cos.shape[-1] * (1 if rope.endswith("full") else 2)
    return torch.cat([turn(x[..., :rotary], cos, sin), x[..., rotary:]], -1)


def prepare(x, norm="none", eps=0.0, weight=None, multiplier=None, rope="none", axes=1, cos=None, sin=None):
    """One of queries, keys and values, and how far nextscale may be from it before it is rounded.

    x: [batch, rows, heads, dim]. weight: [dim]; multiplier: [heads].
    rope: none, interleaved, interleaved-full, half or half-full; full: the table has a column an element.
    cos, sin: [rows, columns] or [batch, rows, columns] f32: the rows of the table at the tokens' positions.
    """
    y = normalise(x.double(), norm, eps, None if weight is None else weight.double())
    if multiplier is not None:
        y = y * multiplier.double()[:, None]
    magnitude = y.abs()
    if rope != "none":
        # One table for all heads.
        cos, sin = (t.double().unsqueeze(-2) for t in (cos, sin))
        magnitude = rotate(y, cos, 0 * sin, rope, axes).abs() + rotate(y, 0 * cos, sin, rope, axes).abs()
        y = rotate(y, cos, sin, rope, axes)
    return y, 2.0**-19 * magnitude


def append(cache, x, at):
    """`cache` [batch, cache_rows, heads, dim] with x [batch, rows, heads, dim] at its rows at[b] + i, as far as it goes."""
    cache = cache.clone()
    for b, first in enumerate(at):
        for i in range(x.shape[1]):
            if 0 <= first + i < cache.shape[1]:
                cache[b, first + i] = x[b, i]
    return cache
