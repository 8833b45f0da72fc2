"""What PyTorch offers for importance and redundancy of cached keys: the published algorithms, layer by layer as they are
written, and lean ones, which use what the library uses (no matrix of cosines, norms and sums kept, queries in pieces that fit)
and are compiled. bench_peers.py checks and times them.
"""

import torch
import torch.nn.functional as F

from nextscale_ref import importance as reference
from nextscale_ref.dtypes import DTYPES
from peers_common import ALWAYS, FULL, PLAIN_COMPILERS, Case, compiled


def random(shape, dtype, device, seed):
    """Uniform, drawn in pieces: an f32 copy of the largest would not fit."""
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(shape, dtype=dtype, device=device)
    for piece in out.split(max(1, 2**28 // out[0].numel())):
        piece.copy_(torch.rand(piece.shape, generator=generator, device=device) * 2 - 1)
    return out


class Importance(Case):
    """All layers of one event."""

    @staticmethod
    def smaller(case):
        most = {"sets": 2, "heads": 2, "tokens": 300, "queries": 40}
        return case | {size: min(case[size], most[size]) for size in most}

    def __init__(self, case, device):
        self.case, self.groups, self.heads, self.dim = case, case["groups"], case["heads"], case["dim"]
        self.sets, self.tokens, self.queries = case["sets"], case["tokens"], case["queries"]
        self.window = case["excluded"] + case["unscored"]
        self.step = 256 if case["listed"] else 1
        self.listed = torch.arange(self.queries, device=device) * 256 + 100
        rows = self.queries * self.step
        dtype = DTYPES[case["dtype"]]
        # Keys of a head together, as caches of these methods have them.
        self.q = random([self.sets, self.heads * self.groups, rows, self.dim], dtype, device, 0)
        self.k = random([self.sets, self.heads, self.tokens, self.dim], dtype, device, 1)
        # Columns of the queries' own tokens.
        self.columns = None
        if case["listed"]:
            columns = self.tokens - rows + self.listed
            self.columns = columns[(columns >= 0) & (columns < self.tokens - self.window)]
        self.piece = max(16, min(self.queries, 2**31 // (self.heads * self.groups * self.tokens * 4)))
        self.exact = self.tokens * self.queries * self.sets * self.heads < 2**22

    def layer(self, q, k, dtype=torch.float32, piece=None, sums=None):
        """Scores of a layer [heads, tokens - window], q [heads * groups, queries, dim], k [heads, tokens, dim]."""
        case = self.case
        scored = self.tokens - self.window
        total = 0
        for first in range(0, self.queries, piece or self.queries):
            some = q[:, first : first + (piece or self.queries)].unflatten(0, (self.heads, self.groups))
            # A compiler makes a version for each number that it is given.
            total = total + (sums or self.column_sums)(some, k, first if case["causal"] else 0)
        raw = total[:, :scored]
        if case["reduction"] == "mean":
            raw = raw / (self.queries * (self.groups if case["aggregation"] in ("mean_prob", "logit") else 1))
        return self.pooled(raw)

    def pooled(self, raw):
        if self.columns is not None:
            raw = raw.index_fill(1, self.columns, -torch.inf)
        return reference.pooled(raw, self.case["pool"], self.case["pool_width"])

    def column_sums(self, q, k, first):
        """[heads, tokens] f32 of some of the queries: q [heads, groups, some, dim]."""
        case, seen = self.case, self.tokens - self.case["excluded"]
        if case["aggregation"] == "logit":
            total = (q.flatten(1, 2).float().sum(1, keepdim=True).to(k.dtype) @ k.transpose(1, 2))[:, 0]
            return total.float() * self.dim**-0.5
        # One product for all query heads of a group: a key that was repeated would be copied first.
        x = (q.flatten(1, 2) @ k[:, :seen].transpose(1, 2)).unflatten(1, q.shape[1:3]) * self.dim**-0.5
        if case["causal"]:
            i = first + torch.arange(q.shape[2], device=q.device)[:, None]
            x = x.masked_fill(torch.arange(seen, device=q.device) > self.tokens - self.queries + i, -torch.inf)
        if case["aggregation"] == "max_logit":
            x = x.amax(1).softmax(-1, dtype=torch.float32).sum(1)
        else:
            x = x.softmax(-1, dtype=torch.float32)
            x = (x.sum(1) if case["aggregation"] == "mean_prob" else x.amax(1)).sum(1)
        return F.pad(x, (0, self.tokens - seen))

    def queries_of(self, layer):
        return self.q[layer][:, self.listed] if self.case["listed"] else self.q[layer]

    def reference(self):
        """In f32, from f32 logits; and how far a peer may be from it, which rounds logits to 16 bits."""
        want = []
        for layer in range(self.sets):
            q, k = self.queries_of(layer).float(), self.k[layer].float()
            want.append(self.layer(q, k, piece=max(8, self.piece // 8)))
        want = torch.stack(want)
        finite = torch.where(want.isfinite(), want, 0)
        if self.case["aggregation"] == "logit":
            return finite, torch.full_like(finite, 0.05 * self.queries)
        return finite, finite.abs() * 0.05 + 1e-6

    def result(self, out):
        return torch.where(out.isfinite(), out, 0)

    def all_layers(self, of_layer):
        return torch.stack([of_layer(self.queries_of(layer), self.k[layer]) for layer in range(self.sets)])

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call)."""
        large = self.sets * self.heads * self.tokens * self.queries > 2**32
        yield "published, layer by layer", FULL if large else ALWAYS, lambda: lambda: self.all_layers(self.published)
        for mode, name, when in PLAIN_COMPILERS:
            yield f"{name}: lean", when, lambda m=mode: self.lean(m)

    def published(self, q, k):
        """As FlowCache, R-KV, SnapKV and ScaleKV write it."""
        case, scored = self.case, self.tokens - self.window
        if case["aggregation"] == "mean_prob":
            # SnapKV repeats the keys first, and masks the window alone.
            x = q @ k.repeat_interleave(self.groups, 0).transpose(1, 2) / self.dim**0.5
            if case["causal"]:
                least = torch.finfo(x.dtype).min
                x[:, :, -self.queries :] += torch.full([self.queries] * 2, least, dtype=x.dtype, device=x.device).triu(1)
            x = x.softmax(-1, dtype=torch.float32).to(q.dtype).sum(1)[:, :scored]
            return self.pooled(x.float().unflatten(0, (self.heads, self.groups)).sum(1))
        if case["aggregation"] == "logit":
            return self.pooled((q @ k.transpose(1, 2) / self.dim**0.5).sum(1).float()[:, :scored])
        most = None
        for group in range(self.groups):
            # A product for each query head of a group.
            x = q[group :: self.groups] @ k.transpose(1, 2) / self.dim**0.5
            most = x if most is None else torch.maximum(most, x)
        return self.pooled(most[:, :, :scored].softmax(-1, dtype=torch.float32).mean(1))

    def lean(self, mode):
        sums = compiled(self.column_sums, mode)
        return lambda: self.all_layers(lambda q, k: self.layer(q, k, piece=self.piece, sums=sums))


class Redundancy(Case):
    """All layers of one event."""

    @staticmethod
    def smaller(case):
        most = {"sets": 2, "heads": 2, "tokens": 300}
        return case | {size: min(case[size], most[size]) for size in most}

    def __init__(self, case, device):
        self.case, self.what = case, case["what"]
        shape = [case["sets"], case["heads"], case["tokens"], case["dim"]]
        self.k = random(shape, DTYPES[case["dtype"]], device, 1)
        # What the library keeps up to date.
        layers = [self.norms_of(k) for k in self.k]
        self.inverse = torch.stack([inverse for inverse, _ in layers])
        self.sums = torch.stack([sums for _, sums in layers])

    @staticmethod
    def norms_of(k):
        """[heads, tokens], [heads, dim] of a layer."""
        k = k.float()
        inverse = 1 / (k.norm(dim=-1) + 1e-8)
        return inverse, (k * inverse[..., None]).sum(-2)

    def reference(self):
        if self.what == "update":
            return self.sums, torch.full_like(self.sums, 1e-4 * self.case["tokens"])
        want = []
        for layer, k in enumerate(self.k):
            unit = k.float() * self.inverse[layer][..., None]
            if self.what == "similar":
                cosines = unit @ unit.transpose(1, 2)
                cosines.diagonal(dim1=1, dim2=2).fill_(0)
                want.append(torch.stack([reference.similar(c, 0.5) for c in cosines]))
            else:
                c = (unit @ self.sums[layer][..., None])[..., 0]
                want.append((c / k.shape[1]).softmax(-1) if self.what == "softmax"
                            else c / self.sums[layer].norm(dim=-1, keepdim=True))
        want = torch.stack(want)
        return want, torch.full_like(want, 0.02) if self.what == "cosine" else want * 0.02

    def result(self, out):
        return out.float()

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call)."""
        published = {"update": self.update, "softmax": self.cosines_summed, "cosine": self.keydiff, "similar": self.matrix}
        lean = {"update": self.update, "softmax": self.anchor, "cosine": self.keydiff, "similar": self.matrix_all}[self.what]
        expression = published[self.what]
        yield "published, layer by layer", ALWAYS, lambda: lambda: torch.stack([expression(l) for l in range(len(self.k))])
        for mode, name, when in PLAIN_COMPILERS:
            yield f"{name}: lean", when, lambda m=mode: self.lean(lean, m)

    def lean(self, expression, mode):
        if self.what == "similar":
            whole = compiled(expression, mode)
            return lambda: whole(self.k)
        of_layer = compiled(self.of_layer(expression), mode)
        return lambda: torch.stack([of_layer(k, n, s) for k, n, s in zip(self.k, self.inverse, self.sums)])

    def of_layer(self, expression):
        return {
            self.update: lambda k, n, s: self.norms_of(k)[1],
            self.anchor: lambda k, n, s: ((k.float() * s[:, None]).sum(-1) * n / k.shape[1]).softmax(-1),
            self.keydiff: lambda k, n, s: (k.float() * s[:, None]).sum(-1) * n / s.norm(dim=-1, keepdim=True),
        }[expression]

    def update(self, layer):
        return self.norms_of(self.k[layer])[1]

    def anchor(self, layer):
        return self.of_layer(self.anchor)(self.k[layer], self.inverse[layer], self.sums[layer])

    def cosines_summed(self, layer):
        """FlowCache: the norms at each event, rounded as it rounds them."""
        k = self.k[layer]
        unit = k / (k.norm(dim=-1, keepdim=True) + 1e-8)
        c = ((unit * unit.sum(1, keepdim=True)).sum(-1) - 1) / k.shape[1]
        return c.softmax(-1, dtype=torch.float32)

    def keydiff(self, layer):
        k = self.k[layer]
        anchor = F.normalize(k, dim=-1).mean(1, keepdim=True)
        return F.cosine_similarity(k, anchor, dim=-1)

    def matrix(self, layer):
        """R-KV, operation by operation."""
        k = self.k[layer]
        unit = k / (k.norm(dim=-1, keepdim=True) + 1e-8)
        cosines = unit @ unit.transpose(-1, -2)
        for head in cosines:
            head.fill_diagonal_(0.0)
        i = torch.arange(k.shape[-2], device=k.device)
        at = torch.where(cosines > 0.5, i, torch.zeros_like(i)).amax(-1)
        cosines.scatter_(-1, at[..., None], 0.0)
        return cosines.mean(-2, dtype=torch.float32).softmax(-1)

    def matrix_all(self, k):
        unit = k / (k.norm(dim=-1, keepdim=True) + 1e-8)
        cosines = unit @ unit.transpose(-1, -2)
        n = k.shape[-2]
        i = torch.arange(n, device=k.device)
        cosines = cosines.masked_fill(i == i[:, None], 0.0)
        at = torch.where(cosines > 0.5, i, 0).amax(-1)
        cosines = torch.where(i == at[..., None], 0, cosines)
        return cosines.float().mean(-2).softmax(-1)
