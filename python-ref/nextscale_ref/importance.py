"""Importance and redundancy of cached keys, from the formulas: with the matrices that the library never stores.

Shapes as in the library: q [sets, queries, heads * groups, dim], k [sets, tokens, heads, dim], scores [sets, heads, tokens].
"""

import torch
import torch.nn.functional as F


def logits(q, k, scale):
    """[sets, heads, groups, queries, tokens] in the dtype of the arguments."""
    heads = k.shape[2]
    q = q.unflatten(2, (heads, -1))
    return torch.einsum("sqhgd,snhd->shgqn", q, k) * scale


def pooled(raw, pool, width):
    """Over the last dimension, of scored columns alone."""
    if pool == "none" or raw.shape[-1] == 0:
        return raw
    if pool == "max":
        return F.max_pool1d(raw, width, stride=1, padding=width // 2)
    return F.avg_pool1d(raw, width, stride=1, padding=width // 2)


def importance(q, k, *, aggregation="max_logit", reduction="mean", causal=False, excluded=0, unscored=0, pool="none",
               pool_width=7, scale=None, lengths=None, masked=None, old=None):
    """(scores, how far nextscale may be from them), both f64. One set and head after the other."""
    sets, tokens, heads, dim = k.shape
    queries, groups = q.shape[1], q.shape[2] // heads
    scale = scale or dim**-0.5
    scores = torch.zeros(sets, heads, tokens, dtype=torch.float64)
    bound = torch.zeros_like(scores)
    if old is not None:
        scores += old.double()
    for s in range(sets):
        for h in range(heads):
            length = tokens if lengths is None else min(max(int(lengths[s, h]), 0), tokens)
            seen = max(length - excluded, 0)
            scored = max(seen - unscored, 0)
            if scored == 0 or queries == 0:
                continue
            of_q = q[s : s + 1, :, h * groups : (h + 1) * groups].double()
            of_k = k[s : s + 1, :seen, h : h + 1].double()
            x = logits(of_q, of_k, scale)[0, 0]
            # A NaN is one whatever the bound is.
            most = logits(of_q.abs(), of_k.abs(), scale)[0, 0].nan_to_num(0.0).amax((0, 2))[:, None]
            hidden = torch.zeros(queries, seen, dtype=torch.bool)
            if causal:
                hidden = torch.arange(seen) > length - queries + torch.arange(queries)[:, None]
            if aggregation == "logit":
                each = x.masked_fill(hidden, 0).sum(0)
                error = (2.0**-16 * groups * most).expand_as(each)
            else:
                x = x.masked_fill(hidden, -torch.inf)
                if aggregation == "max_logit":
                    each = x.amax(0).softmax(-1)
                else:
                    each = x.softmax(-1)
                    each = each.sum(0) if aggregation == "mean_prob" else each.amax(0)
                each = each.masked_fill(hidden, 0)  # of a query that sees nothing too
                error = each * 2.0**-15 * (1 + most)
            divisor = 1
            if reduction == "mean":
                divisor = queries * (groups if aggregation in ("mean_prob", "logit") else 1)
            raw, error = each[:, :scored].sum(0) / divisor, error[:, :scored].sum(0) / divisor
            error = error + 2.0**-18 * each[:, :scored].abs().sum(0) / divisor + 1e-36
            if masked is not None:
                at = masked[(masked >= 0) & (masked < scored)].long()
                raw[at], error[at] = -torch.inf, 0
            raw = pooled(raw[None], pool, pool_width)[0]
            scores[s, h, :scored] += raw
            finite = torch.where(raw.isfinite(), raw.abs() + scores[s, h, :scored].abs(), 0)
            bound[s, h, :scored] = pooled(error[None], "max" if pool != "none" else pool, pool_width)[0] + finite * 2.0**-22
    return scores, bound


def lse(q, k, *, causal=False, excluded=0, scale=None, lengths=None):
    """The log-sum-exps that attention over the visible keys leaves: f32 [sets, heads * groups, queries]."""
    sets, tokens, heads, dim = k.shape
    queries, groups = q.shape[1], q.shape[2] // heads
    out = torch.full([sets, heads * groups, queries], -torch.inf)
    for s in range(sets):
        for h in range(heads):
            length = tokens if lengths is None else min(max(int(lengths[s, h]), 0), tokens)
            seen = max(length - excluded, 0)
            if seen == 0:
                continue
            x = logits(q[s : s + 1, :, h * groups : (h + 1) * groups].double(), k[s : s + 1, :seen, h : h + 1].double(),
                       scale or dim**-0.5)[0, 0]
            if causal:
                hidden = torch.arange(seen) > length - queries + torch.arange(queries)[:, None]
                x = x.masked_fill(hidden, -torch.inf)
            out[s, h * groups : (h + 1) * groups] = x.logsumexp(-1).float()
    return out


def units(k, eps=1e-8):
    """(unit keys, inverse norms), in the dtype of k."""
    inverse = 1 / (k.norm(dim=-1) + eps)
    return k * inverse[..., None], inverse


def similar(cosines, threshold, retain="last", ratio=0.1, lonely_leave_first=True):
    """R-KV's redundancy from the matrix of cosines [n, n], diagonal 0: softmax over keys of the column means, after one
    neighbour of each row was set to 0."""
    n = cosines.shape[-1]
    hits = cosines > threshold
    indices = torch.where(hits, torch.arange(n, device=cosines.device), 0)
    if retain == "last":
        at = indices.amax(-1)
    elif retain == "first":
        at = hits.float().argmax(-1)  # 0 where there is none
    elif retain == "zero":
        at = indices.amin(-1)
    else:
        some = min(max(1, int(torch.tensor(n, dtype=torch.float32) * torch.tensor(ratio, dtype=torch.float32))), n)
        at = indices.sort(-1).values[:, some - 1]
    keep = torch.zeros(n, dtype=torch.bool, device=cosines.device)
    if not lonely_leave_first and retain in ("last", "first"):
        keep = ~hits.any(-1)
    rows = torch.arange(n, device=cosines.device)[~keep]
    cosines = cosines.clone()
    cosines[rows, at[~keep]] = 0
    return cosines.mean(0).softmax(-1)
