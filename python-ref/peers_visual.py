"""What PyTorch offers for the visual rules, from the same inputs as the bench. bench_peers.py checks and times it.

Every peer takes logits, drafts and uniforms, draws the token that follows and, where the case has it, new drafts. How many
drafts of each request it accepts is checked against f64.
"""

import torch

from nextscale_ref.dtypes import DTYPES
from peers_common import ALWAYS, COMPILERS, Case, compiled

NEIGHBOURS, DIM = 1000, 8


class VisualVerify(Case):
    """Inputs of one case and the calls that decide it."""

    @staticmethod
    def smaller(case):
        return case | {"batch": min(case["batch"], 3), "drafts": min(case["drafts"], 4), "vocab": 1500}

    def __init__(self, case, device):
        self.case, self.device = case, device
        batch, k, vocab = case["batch"], case["drafts"], case["vocab"]
        self.batch, self.k, self.vocab = batch, k, vocab
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[case["dtype"]]

        def logits(rows):
            return (torch.rand(batch, rows, vocab, generator=generator, device=device) * 8 - 4).to(dtype)

        self.target = logits(k + 1)
        self.free = logits(k + 1) if case["guided"] else None
        # As in the bench, q is p, or has nothing to do with it where drafts are to fail.
        other = logits(k) if case["reject"] else self.target[:, :k].contiguous()
        self.draft = other if case["random"] else None
        self.draft_free = self.free[:, :k].contiguous() if case["random"] and case["guided"] else None
        self.drafts = torch.randint(0, vocab, [batch, k], generator=generator, device=device)
        self.uniforms = torch.full([batch, k], 0.999 if case["reject"] else 0.0, device=device)
        code = torch.arange(vocab, device=device)
        if case["rule"].startswith("lantern"):
            self.near = (code[:, None] + torch.arange(1, NEIGHBOURS + 2, device=device) * 13) % vocab
        self.vectors = None
        if case["rule"] == "grouped-embedded":
            self.vectors = (torch.rand(vocab, DIM, generator=generator, device=device) - 0.5) * 0.6
        self.bound = 3.0 if case["rule"] == "lantern++" else 0.1
        # Gumbel noise belongs to position and token: it is made once, and read in every step.
        self.noise = None
        if case["redraft"] == "gumbel":
            self.noise = -torch.empty(batch, k + 1, vocab, device=device).exponential_(generator=generator).log_()

    def reference(self):
        ok = self.test(torch.float64)[0]
        want = ok.cumprod(-1).sum(-1).float()
        return want, torch.zeros_like(want)

    def result(self, out):
        return out[0]

    def rows(self, dtype):
        """p of all rows, and q of the drafts' (None: one-hot); the logits of p."""
        with_, free = self.target.to(dtype), None if self.free is None else self.free.to(dtype)
        scale = 1.0
        logits = with_ if free is None else free + scale * (with_ - free)
        p = logits.softmax(-1)
        if not self.case["random"]:
            return logits, p, None
        draft = self.draft.to(dtype)
        if self.draft_free is not None:
            other = self.draft_free.to(dtype)
            draft = other + scale * (draft - other)
        return logits, p, draft.softmax(-1)

    def test(self, dtype=torch.float32):
        """(which drafts stay by themselves, p, q)."""
        logits, p, q = self.rows(dtype)
        at = self.drafts[..., None]
        own = p[:, : self.k].gather(-1, at)
        of_q = torch.ones_like(own) if q is None else q.gather(-1, at)
        above, below = own[..., 0], of_q[..., 0]
        if self.case["rule"].startswith("lantern"):
            ids = self.near[:, :NEIGHBOURS][self.drafts]
            sums = p[:, : self.k].gather(-1, ids).cumsum(-1)
            most = self.bound if self.bound <= 1 else (self.bound - 1) * own
            above = above + torch.where(sums <= most, sums, 0).amax(-1)
        elif self.case["rule"].startswith("grouped"):
            order = logits[:, : self.k].sort(dim=-1, stable=True).indices
            rank = (order == at).to(torch.int8).argmax(-1, keepdim=True)
            window = rank + torch.arange(-7, 7, device=at.device)
            there = (rank >= 7) & (window < self.vocab)
            members = order.gather(-1, window.clamp(0, self.vocab - 1))
            of_members = p[:, : self.k].gather(-1, members)
            kept = there & ((of_members - own).abs() < 0.15)
            if self.vectors is not None:
                kept &= (self.vectors[members] - self.vectors[at]).square().sum(-1) < 0.5
            kept |= members == at
            # Where there is no window, the draft alone.
            alone = rank[..., 0] < 7
            above = torch.where(alone, above, (of_members * kept).sum(-1))
            if q is not None:
                below = torch.where(alone, below, (q.gather(-1, members) * kept).sum(-1))
        return self.uniforms.to(dtype) * below < above, p, q

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call)."""
        yield "as written", ALWAYS, lambda: self.call
        for mode, name, when in COMPILERS:
            yield f"{name}: as written", when, lambda m=mode: compiled(self.call, m)

    def call(self):
        ok, p, q = self.test()
        accepted = ok.cumprod(-1).sum(-1)
        row = accepted[:, None, None].expand(-1, 1, self.vocab)
        weights = p.gather(1, row)[:, 0]
        rejected = (accepted < self.k)[:, None]
        beside = accepted.clamp(max=self.k - 1)
        d = self.drafts.gather(1, beside[:, None])
        if self.case["rule"].startswith("lantern"):
            gone = torch.zeros_like(weights, dtype=torch.bool).scatter_(1, self.near[d[:, 0]], True)
            weights = torch.where(gone & rejected, 0, weights)
        if q is None:
            one = torch.zeros_like(weights).scatter_(1, d, 1.0)
        else:
            one = q.gather(1, beside[:, None, None].expand(-1, 1, self.vocab))[:, 0]
        weights = (weights - one * rejected).clamp(min=0)
        weights = torch.where(weights.sum(-1, keepdim=True) > 0, weights, 1.0)
        last = (weights / torch.empty_like(weights).exponential_()).argmax(-1)
        if self.case["redraft"] == "none":
            return accepted.float(), last
        return accepted.float(), last, self.redrafted(p, q)

    def redrafted(self, p, q):
        """A draft of each row for the next step."""
        if self.case["redraft"] == "gumbel":
            return (p.log() + self.noise).argmax(-1)
        if self.case["redraft"] == "independent":
            return (p / torch.empty_like(p).exponential_()).argmax(-1)
        # Maximal coupling: a draft stays, or what is drawn is of what its distribution lacks.
        at = self.drafts[..., None]
        stays = self.uniforms * q.gather(-1, at)[..., 0] < p[:, : self.k].gather(-1, at)[..., 0]
        lacking = torch.cat([(p[:, : self.k] - q).clamp(min=0), p[:, self.k :]], 1)
        drawn = (lacking / torch.empty_like(lacking).exponential_()).argmax(-1)
        return torch.where(torch.nn.functional.pad(stays, (0, 1)), torch.nn.functional.pad(self.drafts, (0, 1)), drawn)
