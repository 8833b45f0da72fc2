"""What PyTorch offers for whole compression events: the published algorithms, layer by layer as they are written, with
their top-k moved to the GPU, and lean ones: one product with the mean key for a matrix of cosines, queries in pieces
that fit, sorted indices, and compiled. bench_peers.py checks and times them.
"""

import torch

from nextscale_ref import importance as reference
from peers_importance import Importance, Redundancy, random
from peers_common import ALWAYS, BEST, FULL, PLAIN_COMPILERS, Case, compiled

SCORES = {
    "flowcache": {"aggregation": "max_logit", "reduction": "mean", "pool": "max", "pool_width": 7},
    "rkv": {"aggregation": "max_logit", "reduction": "mean", "pool": "max", "pool_width": 7},
    "snapkv": {"aggregation": "mean_prob", "reduction": "sum", "pool": "average", "pool_width": 5, "causal": True},
    "scalekv": {"aggregation": "logit", "reduction": "sum", "pool": "max", "pool_width": 5},
}


class CompressEvent(Case):
    """All layers of one event: scores, selection, and K and V of what is kept, in new memory."""

    @staticmethod
    def smaller(case):
        small = case | {"layers": 2, "heads": 2, "tokens": 300, "budget": 100}
        if case["policy"] == "scalekv":
            # Queries are every 256th row.
            return small | {"tokens": 4200}
        return small | {"queries": min(case["queries"], 40)}

    def __init__(self, case, device):
        self.case, self.policy = case, case["policy"]
        self.window = case["window"]
        of_scores = {"causal": False} | SCORES[self.policy]
        self.scorer = Importance(
            of_scores
            | {"sets": case["layers"], "heads": case["heads"], "groups": case["groups"], "dim": case["dim"],
               "tokens": case["tokens"], "queries": case["queries"], "listed": self.policy == "scalekv",
               "excluded": self.window if self.policy == "rkv" else 0,
               "unscored": self.window if self.policy == "snapkv" else 0, "dtype": "bf16"}, device)
        self.q, self.k = self.scorer.q, self.scorer.k
        self.v = random(self.k.shape, torch.bfloat16, device, 2)
        self.layers, self.tokens = case["layers"], case["tokens"]
        self.protected = self.window or (case["queries"] if self.policy == "scalekv" else 0)
        self.base = case["budget"] - self.protected

    # Scores of a layer, [heads, tokens - window]. In f32, and exact but for that.

    def exact(self, layer):
        q, k = self.scorer.queries_of(layer).float(), self.k[layer].float()
        scores = self.scorer.layer(q, k, piece=max(8, self.scorer.piece // 8))
        if self.policy in ("flowcache", "rkv"):
            inverse, sums = Redundancy.norms_of(k)
            if self.policy == "flowcache":
                redundancy = ((k @ sums[..., None])[..., 0] * inverse / self.tokens).softmax(-1)
            else:
                unit = k * inverse[..., None]
                cosines = unit @ unit.transpose(1, 2)
                cosines.diagonal(dim1=1, dim2=2).fill_(0)
                redundancy = torch.stack([reference.similar(c, 0.5) for c in cosines])[:, : scores.shape[1]]
            lam = self.case["lambda"]
            scores = lam * scores - (1 - lam) * redundancy
        return self.without_window(scores)

    def without_window(self, scores):
        """ScaleKV's window stays, and is no candidate."""
        if self.policy != "scalekv":
            return scores
        return scores.index_fill(1, self.scorer.columns, -torch.inf)

    def reference(self):
        """The least score that is kept in each head, of the exact ones."""
        self.of_layers = [self.exact(layer) for layer in range(self.layers)]
        least = torch.stack([scores.topk(self.base).values[:, -1] for scores in self.of_layers])
        size = {"flowcache": 5e-3 / self.tokens, "rkv": 5e-3 / self.tokens, "scalekv": 0.05 * self.case["queries"]}
        slack = size.get(self.policy) or 0.05 * self.of_layers[0].max().item()
        return least, torch.full_like(least, slack)

    def result(self, out):
        """Of what a peer has kept the least exact score; K and V are checked on the way."""
        indices, k, v = out
        for layer in (0, self.layers - 1):
            of_layer = indices[layer].long()
            for mine, theirs in ((self.k, k), (self.v, v)):
                want = mine[layer].gather(1, of_layer[..., None].expand(-1, -1, mine.shape[-1]))
                if not torch.equal(theirs[layer][:, : self.base], want):
                    raise AssertionError("wrong result: rows are not those of the indices")
        kept = [scores.gather(1, of_layer.long()) for scores, of_layer in zip(self.of_layers, indices)]
        return torch.stack([scores.amin(1) for scores in kept])

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call)."""
        large = self.layers * self.case["heads"] * self.tokens * self.case["queries"] > 2**32
        when = FULL if large else ALWAYS
        yield "published, layer by layer, top-k on the GPU", when, lambda: self.whole(self.published)
        yield "lean", BEST, lambda: self.whole(self.lean(None))
        for mode, name, when in PLAIN_COMPILERS:
            yield f"{name}: lean", when, lambda m=mode: self.whole(self.lean(m))

    def whole(self, of_layer):
        def call():
            layers = [of_layer(self.scorer.queries_of(i), self.k[i], self.v[i]) for i in range(self.layers)]
            return tuple(torch.stack(parts) for parts in zip(*layers))

        return call

    def protected_rows(self, x):
        if self.window:
            return x[:, -self.window :]
        return x[:, self.scorer.columns] if self.protected else x[:, :0]

    def published(self, q, k, v):
        scores = self.scorer.published(q, k)
        if self.policy == "flowcache":
            unit = k / (k.norm(dim=-1, keepdim=True) + 1e-8)
            c = ((unit * unit.sum(1, keepdim=True)).sum(-1) - 1) / k.shape[1]
            redundancy = c.softmax(-1, dtype=torch.float32)
        elif self.policy == "rkv":
            redundancy = self.similar(k)[:, : -self.window]
        if self.policy in ("flowcache", "rkv"):
            scores = self.case["lambda"] * scores - (1 - self.case["lambda"]) * redundancy
        indices = self.without_window(scores).topk(self.base).indices
        # The index as large as the rows it names.
        index = indices[..., None].expand(-1, -1, k.shape[-1]).contiguous()
        rows = [torch.cat([x.gather(1, index), self.protected_rows(x)], 1) for x in (k, v)]
        return indices, *rows

    def similar(self, k):
        unit = k / (k.norm(dim=-1, keepdim=True) + 1e-8)
        cosines = unit @ unit.transpose(-1, -2)
        i = torch.arange(k.shape[1], device=k.device)
        cosines = cosines.masked_fill(i == i[:, None], 0.0)
        at = torch.where(cosines > 0.5, i, 0).amax(-1)
        return torch.where(i == at[..., None], 0, cosines).float().mean(-2).softmax(-1)

    def lean(self, mode):
        make = (lambda f: f) if mode is None else lambda f: compiled(f, mode)
        sums, finish = make(self.scorer.column_sums), make(self.finish)

        def of_layer(q, k, v):
            return finish(self.scorer.layer(q, k, piece=self.scorer.piece, sums=sums), k, v)

        return of_layer

    def finish(self, scores, k, v):
        if self.policy == "flowcache":
            x = k.float()
            inverse = 1 / (x.norm(dim=-1) + 1e-8)
            anchor = (x * inverse[..., None]).sum(1, keepdim=True)
            redundancy = ((x * anchor).sum(-1) * inverse / k.shape[1]).softmax(-1)
        elif self.policy == "rkv":
            redundancy = self.similar(k)[:, : -self.window]
        if self.policy in ("flowcache", "rkv"):
            scores = self.case["lambda"] * scores - (1 - self.case["lambda"]) * redundancy
        indices = self.without_window(scores).topk(self.base, sorted=False).indices.sort().values
        heads = torch.arange(k.shape[0], device=k.device)[:, None]
        rows = [torch.cat([x[heads, indices], self.protected_rows(x)], 1) for x in (k, v)]
        return indices, *rows
