"""What PyTorch offers for drift, select and compact: the published algorithms, and lean ones compiled.

`published` is FlowCache's way, operation by operation (its selection on the CPU, and moved to the GPU); `lean` the same
result in as little work as PyTorch does it in. bench_peers.py checks and times them.
"""

import torch

from nextscale_ref.dtypes import DTYPES
from peers_common import ALWAYS, COMPILERS, FULL, Case, compiled


class Drift(Case):
    """The decision of a step from features and state; the change is what is checked."""

    @staticmethod
    def smaller(case):
        return case | {"rows": min(case["rows"], 100), "dim": min(case["dim"], 64)}

    def __init__(self, case, device):
        self.keep = case["keep"]
        generator = torch.Generator(device).manual_seed(0)
        shape = [case["chunks"], case["rows"], case["dim"]]
        # In place where it can be: these tensors are large.
        dtype = DTYPES[case["dtype"]]
        random = lambda: torch.empty(shape, device=device, dtype=dtype).uniform_(-1, 1, generator=generator)
        self.features, self.previous = random(), random()
        self.kept = torch.empty_like(self.previous) if self.keep else None
        self.accumulated = torch.zeros(case["chunks"], device=device)
        self.polynomial = [0.1, -0.2, 0.3, 0.9, 0.01][5 - case["terms"] :]

    def reference(self):
        of_chunk = []
        for f, p in zip(self.features, self.previous):
            f, p = f.double(), p.double()
            of_chunk.append((f - p).abs().mean() / (p.abs().mean() + 1e-8))
        want = torch.stack(of_chunk).float()
        # The published one takes differences and means in the features' dtype.
        return want, 3 * torch.finfo(self.features.dtype).eps * want + 1e-6

    def peers(self):
        yield "published, without its read-back", ALWAYS, lambda: self.call(self.published)
        yield "lean", ALWAYS, lambda: self.call(self.lean)
        for mode, name, when in COMPILERS:
            yield f"{name}: lean", when, lambda m=mode: self.call(compiled(self.lean, m))
            yield f"{name}: published", FULL, lambda m=mode: self.call(compiled(self.published, m))

    def call(self, expression):
        return lambda: expression(self.features, self.previous, self.accumulated)

    def decide(self, change, accumulated):
        rescaled = change
        if self.polynomial:
            rescaled = torch.zeros_like(change)
            for coefficient in self.polynomial:
                rescaled = rescaled * change + coefficient
        total = accumulated + rescaled
        reuse = total < 0.01
        accumulated.copy_(torch.where(reuse, total, 0))
        return change

    def published(self, features, previous, accumulated):
        changes = [((f - p).abs().mean() / (p.abs().mean() + 1e-8)).float() for f, p in zip(features, previous)]
        # To keep the features is to keep a reference to them.
        return self.decide(torch.stack(changes), accumulated)

    def lean(self, features, previous, accumulated):
        f, p = features.flatten(1).float(), previous.flatten(1).float()
        change = (f - p).abs().mean(1) / (p.abs().mean(1) + 1e-8)
        change = self.decide(change, accumulated)
        if self.keep:
            # As large a copy as writing over what was read: into memory of its own, for calls are repeated.
            self.kept.copy_(features)
        return change


class Select(Case):
    """Indices of the kept, sorted or not. What is checked is the least kept score of each list."""

    @staticmethod
    def smaller(case):
        tokens = min(case["tokens"], 30 * case["block"] if case["block"] > 1 else 300)
        budget = max(tokens // 2 // case["block"] * case["block"], case["recent"] + 1)
        return case | {"sets": min(case["sets"], 3), "tokens": tokens, "budget": budget}

    def __init__(self, case, device):
        self.case = case
        shape = [case["sets"], case["heads"], case["tokens"]]
        generator = torch.Generator(device).manual_seed(0)
        random = lambda: torch.randn(shape, generator=generator, device=device).mul_(1.2).exp_().div_(case["tokens"])
        self.importance = random()
        self.redundancy = random() if case["redundancy"] else None
        self.base = case["budget"] - case["recent"]
        self.block = case["block"]

    def scores(self, importance, redundancy):
        """Of the tokens that are not protected, [lists, candidates]."""
        scores = importance if redundancy is None else 0.07 * importance - 0.93 * redundancy
        if self.case["scope"] == "shared":
            scores = scores.mean(1).sum(0, keepdim=True)
        elif self.case["scope"] == "set":
            scores = scores.mean(1)
        else:
            scores = scores.flatten(0, 1)
        scores = scores[:, : scores.shape[1] - self.case["recent"]]
        return scores.view(len(scores), -1, self.block).mean(2) if self.block > 1 else scores

    def reference(self):
        scores = self.scores(self.importance, self.redundancy)
        if self.case["scope"] == "ada":
            heads = self.case["heads"]
            least = scores.reshape(-1, heads * scores.shape[1]).topk(self.base * heads).values[:, -1:]
        else:
            least = scores.topk(self.base // self.block).values[:, -1:]
        return least, least.abs() * 1e-5 + 1e-9

    def result(self, out):
        scores = self.scores(self.importance, self.redundancy)
        if self.case["scope"] == "ada":
            return scores.flatten().gather(0, out.flatten()).view(self.case["sets"], -1).amin(1, keepdim=True)
        return scores.gather(1, out).amin(1, keepdim=True)

    def peers(self):
        if self.case["scope"] == "ada":
            yield "published: top-k over heads", ALWAYS, lambda: self.call(self.ada)
            for mode, name, when in COMPILERS:
                yield f"{name}: top-k over heads", when, lambda m=mode: self.call(compiled(self.ada, m))
            return
        yield "published, top-k on the CPU", FULL, lambda: self.call(self.on_cpu)
        yield "published, layer by layer", ALWAYS, lambda: self.call(self.by_layer)
        yield "lean, unsorted", ALWAYS, lambda: self.call(self.unsorted)
        yield "lean, sorted", ALWAYS, lambda: self.call(self.sorted)
        for mode, name, when in COMPILERS:
            yield f"{name}: lean, sorted", when, lambda m=mode: self.call(compiled(self.sorted, m))
            yield f"{name}: lean, unsorted", when, lambda m=mode: self.call(compiled(self.unsorted, m))

    def call(self, expression):
        return lambda: expression(self.importance, self.redundancy)

    def unsorted(self, importance, redundancy):
        return self.scores(importance, redundancy).topk(self.base // self.block, sorted=False).indices

    def sorted(self, importance, redundancy):
        return self.unsorted(importance, redundancy).sort().values

    def on_cpu(self, importance, redundancy):
        """FlowCache moves the scores of each layer to the CPU, and the indices back."""
        if self.case["scope"] == "shared":
            one = [None if x is None else x.cpu() for x in (importance, redundancy)]
            return self.scores(*one).topk(self.base // self.block).indices.to(importance.device)
        of_layer = []
        for layer in range(len(importance)):
            one = [None if x is None else x[layer : layer + 1].cpu() for x in (importance, redundancy)]
            of_layer.append(self.scores(*one).topk(self.base // self.block).indices.to(importance.device))
        return torch.cat(of_layer)

    def by_layer(self, importance, redundancy):
        if self.case["scope"] == "shared":
            return self.unsorted(importance, redundancy)
        of_layer = []
        for layer in range(len(importance)):
            one = [None if x is None else x[layer : layer + 1] for x in (importance, redundancy)]
            of_layer.append(self.scores(*one).topk(self.base // self.block).indices)
        return torch.cat(of_layer)

    def ada(self, importance, redundancy):
        """Indices into the flattened lists of all sets; and the heads' counts, with a floor of 0.2, as published."""
        heads = self.case["heads"]
        scores = self.scores(importance, redundancy)
        tokens = scores.shape[1]
        best = scores.reshape(-1, heads * tokens).topk(self.base * heads, sorted=False).indices
        counts = torch.zeros(len(best), heads, device=best.device, dtype=torch.int64)
        counts.scatter_add_(1, best // tokens, torch.ones_like(best))
        self.counts = (counts * 0.8 + 0.2 * self.base).round()
        # What follows when published: a sort of each head, of which a head takes as many as it got.
        self.order = scores.sort(1, descending=True).indices
        return best + torch.arange(len(best), device=best.device)[:, None] * (heads * tokens)


class Compact(Case):
    """K and V gathered; in place they are gathered, then copied over a cache."""

    @staticmethod
    def smaller(case):
        return case | {"sets": min(case["sets"], 2), "tokens": 60, "kept": 25}

    def __init__(self, case, device):
        self.case, self.out_dtype = case, DTYPES[case["out"]]
        generator = torch.Generator(device).manual_seed(0)
        shape = [case["sets"], case["tokens"], case["heads"], case["dim"]]
        dtype = DTYPES[case["in"]]
        random = lambda: torch.empty(shape, device=device, dtype=dtype).uniform_(-1, 1, generator=generator)
        self.k, self.v = random(), random()
        noise = torch.rand([case["sets"], case["heads"], case["tokens"]], generator=generator, device=device)
        indices = noise.topk(case["kept"]).indices.sort().values
        self.rows = indices.transpose(1, 2).contiguous()  # [sets, kept, heads]
        self.index = self.rows[..., None].expand(-1, -1, -1, case["dim"])
        self.caches = [torch.empty_like(x) for x in (self.k, self.v)] if case["in_place"] else None
        half = case["dim"] // 2
        frequencies = 1e4 ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
        turns = torch.arange(case["kept"], device=device)[None, :, None] - self.rows
        self.angles = turns[..., None].float() * frequencies if case["turn"] else None
        self.table = (self.angles.cos(), self.angles.sin()) if case["turn"] else None
        self.sets = torch.arange(case["sets"], device=device)[:, None, None]
        self.heads = torch.arange(case["heads"], device=device)[None, None, :]

    def reference(self):
        k, v = (x.gather(1, self.index) for x in (self.k, self.v))
        if self.table:
            k = self.turn(k.double(), *(t.double() for t in self.table))
        want = k.to(self.out_dtype), v.to(self.out_dtype)
        eps = torch.finfo(self.out_dtype).eps
        return want, (want[0].float().abs() * eps + eps if self.table else 0 * want[0].float(), 0 * want[1].float())

    def turn(self, k, cos, sin):
        a, b = k.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def peers(self):
        yield "published: gather by an expanded index", ALWAYS, lambda: self.call(self.gathered)
        yield "lean: index by set, row and head", ALWAYS, lambda: self.call(self.indexed)
        for mode, name, when in COMPILERS:
            yield f"{name}: gather", when, lambda m=mode: self.call(compiled(self.gathered, m))
            yield f"{name}: index", when, lambda m=mode: self.call(compiled(self.indexed, m))

    def call(self, expression):
        # The published index is as large as the rows it names.
        index = self.index.contiguous() if expression == self.gathered else self.index
        return lambda: expression(self.k, self.v, index, self.rows, self.table)

    def finish(self, k, v, table):
        if table:
            k = self.turn(k.float(), *table)
        k, v = k.to(self.out_dtype), v.to(self.out_dtype)
        if self.caches is None:
            return k, v
        for cache, rows in zip(self.caches, (k, v)):
            cache[:, : rows.shape[1]].copy_(rows)
        return tuple(cache[:, : k.shape[1]] for cache in self.caches)

    def gathered(self, k, v, index, rows, table):
        return self.finish(k.gather(1, index), v.gather(1, index), table)

    def indexed(self, k, v, index, rows, table):
        return self.finish(k[self.sets, rows, self.heads], v[self.sets, rows, self.heads], table)
