"""Which tokens of a KV cache are kept, and whether a chunk is computed anew: drift, select and compact.

References for nextscale::compression, in f64 where sums are taken, as plain as the formulas.
"""

import math

import torch

COMPUTE, LEAVE = 1, 2
NAN, CLAMPED = 1, 2


def change(features, previous, eps=1e-8):
    """Relative L1 change of each chunk, [chunks] f64; of [chunks, elements]."""
    f, p = features.double(), previous.double()
    return (f - p).abs().mean(1) / (p.abs().mean(1) + eps)


def rescaled(change, polynomial):
    """What is accumulated: poly1d of the change, coefficients of the highest power first; none: the change."""
    if not polynomial:
        return change
    total = torch.zeros_like(change)
    for coefficient in polynomial:
        total = total * change + coefficient
    return total


def position_weight(name, items, power=3):
    """FlowCache's weights by the place of a token, [items] f64."""
    i = torch.arange(items, dtype=torch.float64)
    x = i / (items - 1) if items > 1 else torch.zeros(items, dtype=torch.float64)
    if name == "exponential":
        return 0.1 + 0.9 * (1 - torch.exp(-2 * x)) / (1 - math.exp(-2))
    if name == "polynomial":
        return 0.1 + 0.9 * x**power
    if name == "upper_convex":
        return 2 * (1 - (1 - x) ** power)
    if name == "gaussian":
        decay = torch.exp(-0.5 * (4 * i / items) ** 2)
        if items > 1:
            return 0.1 + 0.9 * (decay - decay[-1]) / (1 - decay[-1])
    return torch.ones(items, dtype=torch.float64)


def raw_scores(importance, redundancy, lam, scope="head"):
    """[lists, tokens] f64, of [sets, heads, tokens] or None."""
    if importance is None:
        scores = -redundancy.double()
    elif redundancy is None:
        scores = importance.double()
    else:
        # lambda is an f32, as is what is left of 1.
        lam = torch.tensor(lam, dtype=torch.float32)
        scores = lam.double() * importance.double() - (1 - lam).double() * redundancy.double()
    if scope == "set":
        return scores.mean(1)
    if scope == "shared":
        return scores.mean(1).sum(0, keepdim=True)
    return scores.flatten(0, 1)


def block_scores(scores, length, block):
    """Means over blocks of a list's first `length` tokens, the last one shorter; [items]."""
    return torch.stack([part.mean() for part in scores[:length].split(block)]) if length else scores[:0]


def quota(length, budget, sink, recent, block=1):
    """(protected at the start, at the end, how many of the others are kept, items), in items."""
    items = -(-length // block)
    budget = items if budget >= length else budget // block
    first = min(-(-sink // block), budget, items)
    last = items - max(length - recent, 0) // block if recent else 0
    last = min(last, budget - first, items - first)
    return first, last, min(budget - first - last, items - first - last), items


def order(scores, newest=False):
    """Indices, best first: NaN last, of equal scores the oldest or the newest first."""
    values = scores.tolist()
    key = lambda i: (math.isnan(values[i]), 0 if math.isnan(values[i]) else -values[i], -i if newest else i)
    return sorted(range(len(values)), key=key)


def tokens_of(items, block, length):
    return [token for item in items for token in range(item * block, min((item + 1) * block, length))]


def split_ada(scores, quotas, floor, newest=False):
    """Ada-KV's numbers of tokens to choose in each head of a set: their sum is that of the quotas."""
    flat, owner = [], []
    for head, (row, (first, last, _, items)) in enumerate(zip(scores, quotas)):
        flat += row[first : items - last].tolist()
        owner += [head] * (items - last - first)
    total = sum(kept for _, _, kept, _ in quotas)
    won = [0] * len(quotas)
    for i in order(torch.tensor(flat, dtype=torch.float64), newest)[:total]:
        won[owner[i]] += 1
    even = round(floor * 65536)
    shares = [count * (65536 - even) + kept * even for count, (_, _, kept, _) in zip(won, quotas)]
    whole = [share >> 16 for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda head: (-(shares[head] & 65535), head))
    for head in by_rest[: total - sum(whole)]:
        whole[head] += 1
    return whole


def compact(x, indices):
    """Rows of [sets, tokens, heads, ...] by [sets, heads, kept]: [sets, kept, heads, ...]."""
    index = indices.long().transpose(1, 2)
    for _ in x.shape[3:]:
        index = index[..., None]
    return x.gather(1, index.expand(-1, -1, -1, *x.shape[3:]))


def turn(x, turns, frequencies, half):
    """Rotates the first elements of [..., dim] f64 by turns [...] times the pairs' frequencies."""
    angle = turns.double()[..., None] * frequencies.double()
    cos, sin = angle.cos(), angle.sin()
    rotary = 2 * len(frequencies)
    head, rest = x[..., :rotary], x[..., rotary:]
    if half:
        a, b = head.chunk(2, -1)
        head = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = head[..., 0::2], head[..., 1::2]
        head = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([head, rest], -1)
