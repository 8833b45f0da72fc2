"""Verification of image tokens in f64, from the definitions, with the draws that nextscale documents."""

import math

import torch

from nextscale_ref import philox
from nextscale_ref.verification import sample

LANTERN, GROUPED, JACOBI = "lantern", "grouped", "jacobi"


def guided(target, free, guidance):
    """Rows with guidance, f32: free + s (target - free), -inf where either is. One rounding after the difference's."""
    target, free = target.float(), free.float()
    # The product and the sum in f64 are exact enough that rounding to f32 is that of a fused multiply-add.
    mixed = ((target - free).double() * guidance + free.double()).float()
    return torch.where((target == -torch.inf) | (free == -torch.inf), -torch.inf, mixed)


def group(logits, p, d, rule, codes, embeddings, margin):
    """Tokens that count as draft d. logits: f32 tensor; p: list; codes: (first, count)."""
    below, above = rule["below"], rule["above"]
    first, count = codes
    code = d - first if 0 <= d - first < count else None
    if embeddings is not None and code is None:
        return [d]
    values = torch.where(logits.isnan(), -torch.inf, logits).double() + 0.0
    order = values.sort(stable=True).indices.tolist()
    rank = order.index(d)
    if rank < below:
        return [d]
    kept = []
    for token in order[rank - below : rank + above + 1]:
        gap = abs(p[token] - p[d])
        if token != d:
            margin[0] = min(margin[0], abs(gap - rule["probability_gap"]))
            if gap >= rule["probability_gap"]:
                continue
            if embeddings is not None:
                if not 0 <= token - first < count:
                    continue
                distance = (embeddings[code].double() - embeddings[token - first].double()).square().sum().item()
                margin[0] = min(margin[0], abs(distance - rule["distance"]))
                if distance >= rule["distance"]:
                    continue
        kept.append(token)
    return kept


def neighbours_within(p, d, rule, codes, neighbours, margin):
    """(probability that neighbours add, tokens that a rejection zeroes)."""
    first, count = codes
    ids = neighbours[d - first].tolist()
    tokens = [first + n if 0 <= n < count else None for n in ids]
    most = rule["bound"] if rule["bound"] <= 1 else (rule["bound"] - 1) * p[d]
    added, total = None, 0.0
    for token in tokens[: rule["accumulated"]]:
        total += 0.0 if token is None else p[token]
        if total > 0 and most > 0:
            margin[0] = min(margin[0], abs(total / most - 1))
        if total <= most:
            added = total
    if added is None:
        return 0.0, []
    return added, [token for token in tokens[: rule["zeroed"]] if token is not None]


def race(p, seed, position, margin):
    """The token whose probability over its exponential variate is greatest."""
    scores = []
    for first in range(0, len(p), 4):
        words = philox.block(seed, position, 8, first // 4)
        for token, word in zip(range(first, min(first + 4, len(p))), words):
            scores.append(p[token] / -math.log2((word + 0.5) / 2**32))
    order = sorted(range(len(p)), key=lambda token: -scores[token])
    if len(order) > 1:
        margin[0] = min(margin[0], 1 - scores[order[1]] / scores[order[0]])
    return order[0]


def test(rule, logits, p, q, d, is_peak, draws, codes, tables, margin):
    """(whether draft d stays, else the token in its place). p, q: lists, q None for a bad row; d None: no draft.

    draws: the accept test's uniform, three for a token of p, three for what replaces the draft.
    """
    accept, token, replacing = draws
    first, count = codes

    def of_p(three):
        return max(range(len(p)), key=lambda x: p[x]) if is_peak else sample(p, three, margin)

    if not any(p):
        return False, None
    if d is None:
        return False, of_p(token)
    if is_peak:
        return of_p(token) == d, of_p(token)
    if q is None:
        return False, of_p(token)
    above, below, zeroed = p[d], q[d], []
    if rule["rule"] == GROUPED:
        members = group(logits, p, d, rule, codes, tables.get("embeddings"), margin)
        above, below = math.fsum(p[x] for x in members), math.fsum(q[x] for x in members)
    elif rule["rule"] == LANTERN:
        if 0 <= d - first < count:
            added, zeroed = neighbours_within(p, d, rule, codes, tables["neighbours"], margin)
            above += added
        else:
            above = 0.0
    margin[0] = min(margin[0], abs(accept * below / above - 1) if above else 1.0)
    if accept * below < above:
        return True, None
    weights = [max(a - b, 0.0) for a, b in zip(p, q)]
    for x in zeroed:
        weights[x] = 0.0
    if sum(weights) < 1e-6:
        # Where q is p, rounding leaves something.
        if sum(weights) > 0 or max(q) < 1:
            margin[0] = 0.0
        weights = p
        if rule["rule"] == LANTERN:
            real = logits.tolist()
            weights = [float(first <= x < first + count and real[x] > -math.inf) for x in range(len(p))]
    return False, sample(weights, replacing, margin)


def resampled(rejected, radius):
    """(mask: 0 stays, 1 rejected, 2 near and behind; positions padded with -1; islands; how many) of [height, width]."""
    height, width = rejected.shape
    mask = rejected.long()
    for t in range(height * width):
        if not rejected.view(-1)[t]:
            continue
        y, x = divmod(t, width)
        for v in range(max(y - radius, 0), min(y + radius + 1, height)):
            for u in range(max(x - radius, 0), min(x + radius + 1, width)):
                if v * width + u > t and mask[v, u] == 0:
                    mask[v, u] = 2
    islands = torch.full_like(mask, -1)
    count = 0
    for start in range(height * width):
        y, x = divmod(start, width)
        if mask[y, x] == 0 or islands[y, x] >= 0:
            continue
        flood = [(y, x)]
        while flood:
            y, x = flood.pop()
            if islands[y, x] >= 0:
                continue
            islands[y, x] = count
            for v in range(max(y - 1, 0), min(y + 2, height)):
                for u in range(max(x - 1, 0), min(x + 2, width)):
                    if mask[v, u] and islands[v, u] < 0:
                        flood.append((v, u))
        count += 1
    positions = mask.view(-1).nonzero()[:, 0].tolist()
    return mask, positions + [-1] * (height * width - len(positions)), islands, count


def typical(p, drafts, paths, epsilon, alpha, margin):
    """(nodes accepted, which path): the longest, of those the likeliest, of those the first. p: lists by node."""
    thresholds = []
    for row in p:
        entropy = -math.fsum(x * math.log(x) for x in row if x > 0)
        thresholds.append(min(epsilon, alpha * math.exp(-entropy)))
    best = None
    for number, path in enumerate(paths):
        length, log_sum = 0, 0.0
        for before, node in zip(path, path[1:]):
            of_node = p[before][drafts[node]]
            margin[0] = min(margin[0], abs(of_node / thresholds[before] - 1))
            if of_node <= thresholds[before]:
                break
            length, log_sum = length + 1, log_sum + math.log(of_node)
        if best and length == best[0] and log_sum != best[1]:
            margin[0] = min(margin[0], abs(log_sum - best[1]))
        if best is None or (length, log_sum) > best[:2]:
            best = (length, log_sum, number)
    return best[0], best[2]
