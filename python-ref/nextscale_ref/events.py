"""Whole compression events, from the publications: the scores of the tokens of one head, and which stay whatever they
score.

References for nextscale::compression::Event, in f64, with all the matrices. A head's keys are [tokens, dim], its
queries [queries, groups, dim], in the order of the tokens.
"""

import torch

from nextscale_ref import importance


def grid(height, width, size=4):
    """Rows of ScaleKV's queries in a scale."""
    centres = lambda n: [i * (n // size) + (n // size - 1) // 2 for i in range(size)]
    return [y * width + x for y in centres(height) for x in centres(width)]


def scores(policy, q, k, *, window=0, sink=0, lam=0.07, height=0, width=0):
    """(scores [tokens], whether they stay [tokens], how far scores of f32 may be off)"""
    k, q = k.double(), None if q is None else q.double()
    n, dim = k.shape
    stay = torch.zeros(n, dtype=torch.bool)
    logits = None if q is None else torch.einsum("igd,nd->ign", q, k) * dim**-0.5
    if policy in ("flowcache", "rkv"):
        scored = n - window if policy == "rkv" else n
        p = logits.amax(1)[:, :scored].softmax(-1).mean(0)
        own = torch.zeros(n, dtype=torch.float64)
        own[:scored] = importance.pooled(p[None], "max", 7)[0]
        unit, _ = importance.units(k)
        cosines = unit @ unit.T
        cosines.fill_diagonal_(0)
        if policy == "flowcache":
            redundancy = cosines.mean(0).softmax(0)
        else:
            redundancy = importance.similar(cosines, 0.5)
            stay[n - window :] = True
        lam = torch.tensor(lam, dtype=torch.float32).double()
        return lam * own - (1 - lam) * redundancy, stay, 1e-4 / n
    if policy in ("snapkv", "adakv", "h2o"):
        queries = len(q)
        hidden = torch.arange(n) > n - queries + torch.arange(queries)[:, None]
        p = logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1).sum((0, 1))
        stay[n - window :] = True
        if policy != "h2o":
            pool = ("average", 5) if policy == "snapkv" else ("max", 7)
            p[: n - window] = importance.pooled(p[None, : n - window], *pool)[0]
        return p, stay, 1e-4 * p.max().item()
    if policy == "keydiff":
        unit, _ = importance.units(k)
        anchor = unit.mean(0)
        return -(unit @ anchor) / anchor.norm(), stay, 1e-4
    if policy == "streaming":
        stay[:sink] = True
        return torch.arange(n, dtype=torch.float64), stay, 0.0
    if policy == "scalekv":
        rows = torch.tensor(grid(height, width))
        raw = torch.einsum("igd,nd->n", q[rows], k) * dim**-0.5
        columns = n - height * width + rows
        raw[columns] = -torch.inf
        stay[columns] = True
        return importance.pooled(raw[None], "max", 5)[0], stay, 1e-2
    raise ValueError(policy)


def blocks(scores, block):
    return torch.stack([part.mean() for part in scores.split(block)]) if block > 1 else scores
