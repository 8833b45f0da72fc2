"""What PyTorch offers for draft sampling and the rules beside chains and trees. bench_peers.py checks and times it.

| rule | what PyTorch does | what is checked |
|---|---|---|
| draft | softmax, `list` distinct columns by a race of exponentials or by multinomial; log-sum-exps | log-sum-exps |
| pooled | softmax, the neighbours gathered, a threshold, its neighbourhood by pooling | the mask |
| typical | softmax, entropy, the drafts gathered, prefixes of paths; a token of the last row | accepted, and which path |
| confidence | softmax, its maximum, the rows of the greatest | tokens, -1 elsewhere |
| gated | both heads mixed, softmax, a race of exponentials | log-sum-exps |
| beam | log-softmax, scores, topk | the scores kept |
| select | softmax of scores, a race, the sequence gathered | that it is one of the candidates' |
| backspace | a token at a time, for the batch at once | lengths |

What depends on chance is drawn and added with the factor 0, so that it is not left out.
"""

import torch

from nextscale_ref.dtypes import DTYPES
from peers_common import ALWAYS, COMPILERS, FULL, Case, compiled

DEPTH = 5


def race(p):
    """A column of each row, by its probability."""
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


class DecodeRules(Case):
    """Inputs of one case and the calls that decide it."""

    @staticmethod
    def smaller(case):
        rows = {"pooled": 36, "typical": min(case["rows"], 9)}.get(case["rule"], min(case["rows"], 12))
        return case | {"batch": min(case["batch"], 3), "rows": rows, "vocab": min(case["vocab"], 1500)}

    def __init__(self, case, device):
        self.case, self.device = case, device
        self.batch, self.rows, self.vocab, self.list = (case[key] for key in ("batch", "rows", "vocab", "list"))
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[case["dtype"]]

        def logits():
            return (torch.rand(self.batch, self.rows, self.vocab, generator=generator, device=device) * 8 - 4).to(dtype)

        def integers(most, *shape):
            return torch.randint(0, most, shape, generator=generator, device=device)

        rule = case["rule"]
        if rule not in ("select", "backspace"):
            self.logits = logits()
            self.other = logits() if rule == "gated" or case["guided"] else None
            self.drafts = integers(self.vocab, self.batch, self.rows)
        if rule == "pooled":
            code = torch.arange(self.vocab, device=device)
            self.near = (code[:, None] + torch.arange(self.list + 1, device=device) * 13) % self.vocab
            self.threshold = (self.list + 1) / self.vocab
            self.side = round(self.rows**0.5)
        elif rule == "typical":
            paths = [[1 + (p // (d + 1) + d * 7) % (self.rows - 1) for d in range(1, DEPTH)] for p in range(self.list)]
            paths = [[0] + path for path in paths] or [list(range(self.rows))]
            self.paths = torch.tensor(paths, device=device)
            # Some drafts are typical: their rows give them much.
            gain = torch.rand(self.batch, self.rows, 1, generator=generator, device=device) * 12
            at = self.drafts[:, 1:, None]
            before = self.logits[:, :-1].float()
            self.logits[:, :-1] = before.scatter_add(-1, at, gain[:, 1:]).to(dtype)
        elif rule == "gated":
            self.gate = torch.rand(self.batch, self.rows, 1, generator=generator, device=device)
        elif rule == "beam":
            self.scores = torch.rand(self.batch, self.rows, generator=generator, device=device) * -5
        elif rule == "select":
            self.scores = torch.rand(self.batch, self.list, generator=generator, device=device) * 6 - 3
            # A candidate is known by its first token.
            self.sequences = integers(1 << 20, self.batch, self.list, self.rows)
            self.sequences[:, :, 0] = torch.arange(self.list, device=device)
        elif rule == "backspace":
            self.emitted = integers(4, self.batch, self.list)
            self.lengths = torch.full([self.batch], self.rows // 2, device=device)
            self.sequences = torch.full([self.batch, self.rows], 7, device=device)

    def reference(self):
        rule = self.case["rule"]
        if rule == "select":
            want = torch.ones(self.batch, device=self.device)
            return want, torch.zeros_like(want)
        if rule == "backspace":
            lengths = []
            for tokens in self.emitted.tolist():
                length = self.rows // 2
                for token in tokens:
                    length = max(length - 1, 0) if token == 3 else min(length + 1, self.rows)
                lengths.append(length)
            want = torch.tensor(lengths, device=self.device).float()
            return want, torch.zeros_like(want)
        want = getattr(self, rule)(torch.float64).float()
        # A choice between what is closer than f32 can tell may go either way.
        bound = {"draft": 1e-4, "gated": 1e-4, "beam": 1e-4, "confidence": 1e9, "typical": 1e9, "pooled": 1e9}[rule]
        tolerance = torch.full_like(want, bound)
        if bound > 1:
            tolerance = torch.where(self.close(), tolerance, 0).expand_as(want)
        return want, tolerance

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call)."""
        rule = self.case["rule"]
        yield "as written", ALWAYS, lambda: lambda: getattr(self, rule)(torch.float32)
        if rule == "draft":
            yield "multinomial", FULL, lambda: lambda: self.draft(torch.float32, True)
        for mode, name, when in COMPILERS:
            yield f"{name}: as written", when, lambda m=mode: self.compiled(m)

    def compiled(self, mode):
        call = compiled(getattr(self, self.case["rule"]), mode)
        return lambda: call(torch.float32)

    def close(self):
        """Where rounding decides, by the shape of the result."""
        rule = self.case["rule"]
        if rule == "pooled":
            near = (self.mass(torch.float64) / self.threshold - 1).abs() < 1e-4
            near = near.view(self.batch, 1, self.side, self.side).float()
            return torch.nn.functional.max_pool2d(near, 3, 1, 1).view(self.batch, self.rows) > 0
        if rule == "typical":
            p, bound, own = self.tests(torch.float64)
            return ((own / bound - 1).abs() < 1e-4).any(-1).any(-1)[:, None]
        # Of confidence: those close to the least that is committed, and rows whose greatest logits tie.
        top = self.logits.double().softmax(-1).topk(2, -1).values
        least = top[..., 0].topk(min(self.list, self.rows), -1).values[:, -1:]
        tie = top[..., 0] == top[..., 1]
        return ((top[..., 0] / least - 1).abs() < 1e-5) | tie

    # ---- the rules

    def draft(self, dtype, multinomial=False):
        logits = self.logits.to(dtype).view(-1, self.vocab)
        p = logits.softmax(-1)
        if multinomial:
            tokens = torch.multinomial(p, self.list)
        else:
            tokens = (p / torch.empty_like(p).exponential_()).topk(self.list, -1).indices
        return logits.logsumexp(-1) + 0 * tokens.sum(-1)

    def mass(self, dtype):
        logits = self.logits.to(dtype)
        if self.other is not None:
            free = self.other.to(dtype)
            logits = free + 1.0 * (logits - free)
        return logits.softmax(-1).gather(-1, self.near[self.drafts]).sum(-1)

    def pooled(self, dtype):
        rejected = (self.mass(dtype) < self.threshold).view(self.batch, self.side, self.side)
        # Near a rejected token, and behind one: of the rows above those on both sides, of its own those before it.
        padded = torch.nn.functional.pad(rejected, (1, 1, 1, 0))
        above = padded[:, :-1, :-2] | padded[:, :-1, 1:-1] | padded[:, :-1, 2:]
        near = above | padded[:, 1:, :-2]
        return torch.where(rejected, 1.0, torch.where(near, 2.0, 0.0)).view(self.batch, self.rows)

    def tests(self, dtype):
        p = self.logits.to(dtype).softmax(-1)
        entropy = -torch.special.xlogy(p, p).sum(-1)
        bound = (0.09 * (-entropy).exp()).clamp(max=0.3)
        before, after = self.paths[:, :-1], self.paths[:, 1:]
        own = p[torch.arange(self.batch, device=self.device)[:, None, None], before, self.drafts[:, after]]
        return p, bound[:, before], own

    def typical(self, dtype):
        p, bound, own = self.tests(dtype)
        length = (own > bound).to(torch.int64).cumprod(-1)
        count = length.sum(-1)
        likely = (own.log() * length).sum(-1)
        # The longest, of those the likeliest.
        most = count.amax(-1, keepdim=True)
        best = torch.where(count == most, likely, -torch.inf).argmax(-1, keepdim=True)
        last = self.paths[best[:, 0], most[:, 0]]
        row = p.gather(1, last[:, None, None].expand(-1, 1, self.vocab))[:, 0]
        return most.to(dtype) + 0 * race(row)[:, None]

    def confidence(self, dtype):
        best = self.logits.to(dtype).softmax(-1).max(-1)
        chosen = best.values.topk(min(self.list, self.rows), -1).indices
        tokens = torch.full_like(best.indices, -1)
        return tokens.scatter(-1, chosen, best.indices.gather(-1, chosen)).to(dtype)

    def gated(self, dtype):
        first, second = self.logits.to(dtype), self.other.to(dtype)
        mixed = second + self.gate.to(dtype) * (first - second)
        return mixed.logsumexp(-1) + 0 * race(mixed.softmax(-1))

    def beam(self, dtype):
        total = self.scores.to(dtype)[..., None] + self.logits.to(dtype).log_softmax(-1)
        best = total.flatten(1).topk(self.list, -1)
        return best.values + 0 * (best.indices // self.vocab + best.indices % self.vocab)

    def select(self, dtype):
        chosen = race(self.scores.to(dtype).softmax(-1))
        sequence = self.sequences.gather(1, chosen[:, None, None].expand(-1, 1, self.rows))[:, 0]
        return (sequence[:, 0] == chosen).float() + 0 * sequence.sum(-1)

    def backspace(self, dtype):
        lengths, sequences = self.lengths, self.sequences.clone()
        for token in self.emitted.unbind(1):
            back = token == 3
            at = lengths.clamp(max=self.rows - 1)[:, None]
            kept = back | (lengths == self.rows)
            sequences = sequences.scatter(1, at, torch.where(kept[:, None], sequences.gather(1, at), token[:, None]))
            lengths = torch.where(back, (lengths - 1).clamp(min=0), (lengths + 1).clamp(max=self.rows))
        return lengths.float() + 0 * sequences.sum(-1)
