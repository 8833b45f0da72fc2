"""What PyTorch, FlashInfer and Triton offer for the verification of drafts. bench_peers.py checks and times it.

Every peer takes logits, drafts and the uniforms of the accept tests and returns how many drafts of each request it accepts,
which is checked, and the tokens, the one that follows among them. FlashInfer draws its own uniforms: what is checked of it
is only that it accepts all drafts where p is q. `flashinfer` and `triton` are optional; TRITON_INTERPRET=1 runs Triton's
kernels without a GPU.
"""

import os

import torch

from nextscale_ref.dtypes import DTYPES
from peers_common import ALWAYS, COMPILERS, Case, compiled

try:
    import flashinfer
except ImportError as error:
    flashinfer = None
    print(f"SKIPPED FlashInfer: {error}", flush=True)
try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = None
    print(f"SKIPPED Triton: {error}", flush=True)

BLOCK = 8192

if triton is not None:

    @triton.jit
    def stats_kernel(logits, partials, vocab, chunks, BLOCK: tl.constexpr):
        """Greatest logit and sum of exponentials of each block of a row."""
        row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * vocab + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
        top = tl.max(x, 0)
        tl.store(partials + (row * chunks + chunk) * 2, top)
        tl.store(partials + (row * chunks + chunk) * 2 + 1, tl.sum(tl.exp(x - top), 0))

    @triton.jit
    def lse_of(partials, row, chunks, CHUNKS: tl.constexpr):
        at = tl.arange(0, CHUNKS)
        top = tl.load(partials + (row * chunks + at) * 2, mask=at < chunks, other=-float("inf"))
        sums = tl.load(partials + (row * chunks + at) * 2 + 1, mask=at < chunks, other=0.0)
        most = tl.max(top, 0)
        return most + tl.log(tl.sum(sums * tl.exp(top - most), 0))

    @triton.jit
    def walk_kernel(p, q, p_partials, q_partials, drafts, uniforms, accepted, lses, vocab, chunks, K: tl.constexpr,
                    CHUNKS: tl.constexpr):
        """One program a request: tests draft after draft."""
        b = tl.program_id(0).to(tl.int64)
        count, go = 0, 1
        for i in range(K):
            d = tl.load(drafts + b * K + i)
            p_lse = lse_of(p_partials, b * (K + 1) + i, chunks, CHUNKS)
            q_lse = lse_of(q_partials, b * K + i, chunks, CHUNKS)
            log_p = tl.load(p + (b * (K + 1) + i) * vocab + d).to(tl.float32) - p_lse
            log_q = tl.load(q + (b * K + i) * vocab + d).to(tl.float32) - q_lse
            if go == 1:
                tl.store(lses + b * 2, p_lse)
                tl.store(lses + b * 2 + 1, q_lse)
            ok = log_p > tl.log(tl.load(uniforms + b * K + i)) + log_q
            go = tl.where(ok, go, 0)
            count += go
        tl.store(accepted + b, count)

    @triton.jit
    def resample_kernel(p, q, accepted, lses, best, best_at, seed, vocab, chunks, K: tl.constexpr, BLOCK: tl.constexpr):
        """The greatest of log residual + Gumbel noise, by block, in the row after the accepted drafts."""
        b, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        i = tl.load(accepted + b)
        at = chunk * BLOCK + tl.arange(0, BLOCK)
        mask = at < vocab
        x = tl.load(p + (b * (K + 1) + i) * vocab + at, mask=mask, other=-float("inf")).to(tl.float32)
        if i < K:
            y = tl.load(q + (b * K + i) * vocab + at, mask=mask, other=-float("inf")).to(tl.float32)
            log_p, log_q = x - tl.load(lses + b * 2), y - tl.load(lses + b * 2 + 1)
            x = tl.where(log_q < log_p, log_p + tl.log(1 - tl.exp(log_q - log_p)), -float("inf"))
        noise = tl.rand(seed, b * vocab + at)
        x = tl.where(mask, x - tl.log(-tl.log(tl.maximum(noise, 1e-7))), -float("inf"))
        tl.store(best + b * chunks + chunk, tl.max(x, 0))
        tl.store(best_at + b * chunks + chunk, chunk * BLOCK + tl.argmax(x, 0))

    @triton.jit
    def finish_kernel(drafts, accepted, best, best_at, tokens, chunks, K: tl.constexpr, ROWS: tl.constexpr,
                      CHUNKS: tl.constexpr):
        b = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, CHUNKS)
        top = tl.load(best + b * chunks + at, mask=at < chunks, other=-float("inf"))
        token = tl.load(best_at + b * chunks + tl.argmax(top, 0))
        count, i = tl.load(accepted + b), tl.arange(0, ROWS)
        d = tl.load(drafts + b * K + i, mask=i < K, other=-1)
        tl.store(tokens + b * (K + 1) + i, tl.where(i < count, d, tl.where(i == count, token, -1)), mask=i < K + 1)


class Verify(Case):
    """Inputs of one case and the calls that decide it."""

    @staticmethod
    def smaller(case):
        return case | {"batch": min(case["batch"], 3), "vocab": min(case["vocab"], 20011)}

    def __init__(self, case, device):
        self.case, self.device = case, device
        self.rule, self.random = case["rule"], case["draft"] != "none"
        batch, k, vocab = case["batch"], case["drafts"], case["vocab"]
        self.batch, self.k, self.vocab = batch, k, vocab
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[case["dtype"]]
        self.target = (torch.rand(batch, k + 1, vocab, generator=generator, device=device) * 8 - 4).to(dtype)
        noise = 0
        if case["noise"]:
            noise = (torch.rand(batch, k, vocab, generator=generator, device=device) * 2 - 1) * case["noise"]
        self.draft = (self.target[:, :k].float() + noise).to(dtype)
        if self.random:
            # Row by row: the softmax of all would be large.
            drawn = [torch.multinomial(row.float().softmax(-1), 1, generator=generator) for row in self.draft.flatten(0, 1)]
            self.drafts = torch.cat(drawn).view(batch, k)
        else:
            self.drafts = self.target[:, :k].argmax(-1)
        self.uniforms = torch.rand(batch, k, generator=generator, device=device)

    def reference(self):
        """Drafts accepted, in f64. Sampled match draws at random: nothing is asked of it."""
        if self.rule == "greedy":
            ok = self.target[:, : self.k].argmax(-1) == self.drafts
        elif self.rule == "match":
            return torch.zeros(self.batch, device=self.device), torch.full([self.batch], float(self.k), device=self.device)
        else:
            at = self.drafts[..., None]
            p, q = (torch.stack([row.double().log_softmax(-1) for row in x]).gather(-1, at)[..., 0]
                    for x in (self.target[:, : self.k], self.draft))
            ok = self.uniforms.double().log() + q < p
        want = ok.cumprod(-1).sum(-1).float()
        return want, torch.zeros_like(want)

    def result(self, out):
        return out[0]

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call)."""
        if self.rule == "block":
            return
        expression = {"greedy": self.greedy, "match": self.match, "reject": self.reject}[self.rule]
        arguments = (self.target, self.draft, self.drafts, self.uniforms)
        yield "as written", ALWAYS, lambda: lambda: expression(*arguments)
        for mode, name, when in COMPILERS:
            yield f"{name}: as written", when, lambda m=mode: self.compiled(expression, m, arguments)
        runs = self.target.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
        if self.rule == "reject" and triton is not None and runs:
            yield "Triton, from logits", ALWAYS, lambda: lambda: self.by_triton(*arguments)
        # Its own uniforms: only what does not depend on them can be checked.
        if self.rule == "reject" and not self.case["noise"] and flashinfer is not None and self.target.is_cuda:
            yield "FlashInfer: softmax of both, chain sampling", ALWAYS, lambda: self.by_flashinfer

    def compiled(self, expression, mode, arguments):
        expression = compiled(expression, mode)
        return lambda: expression(*arguments)

    def emit(self, ok, drafts, last):
        accepted = ok.cumprod(-1).sum(-1)
        i = torch.arange(self.k + 1, device=drafts.device)
        padded = torch.nn.functional.pad(drafts, (0, 1), value=-1)
        tokens = torch.where(i < accepted[:, None], padded, torch.where(i == accepted[:, None], last[:, None], -1))
        return accepted.float(), tokens

    def greedy(self, target, draft, drafts, uniforms):
        best = target.argmax(-1)
        ok = best[:, : self.k] == drafts
        accepted = ok.cumprod(-1).sum(-1)
        return self.emit(ok, drafts, best.gather(1, accepted[:, None])[:, 0])

    def match(self, target, draft, drafts, uniforms):
        noise = torch.empty_like(target, dtype=torch.float32).exponential_()
        drawn = (target.float().softmax(-1) / noise).argmax(-1)
        ok = drawn[:, : self.k] == drafts
        accepted = ok.cumprod(-1).sum(-1)
        return self.emit(ok, drafts, drawn.gather(1, accepted[:, None])[:, 0])

    def reject(self, target, draft, drafts, uniforms):
        p, q = target.float().softmax(-1), draft.float().softmax(-1)
        at = drafts[..., None]
        ok = uniforms * q.gather(-1, at)[..., 0] < p[:, : self.k].gather(-1, at)[..., 0]
        accepted = ok.cumprod(-1).sum(-1)
        row = accepted[:, None, None].expand(-1, 1, self.vocab)
        after = p.gather(1, row)[:, 0]
        beside = q.gather(1, row.clamp(max=self.k - 1))[:, 0] * (accepted < self.k)[:, None]
        weights = (after - beside).clamp(min=0)
        last = (weights / torch.empty_like(weights).exponential_()).argmax(-1)
        return self.emit(ok, drafts, last)

    def by_flashinfer(self):
        p = flashinfer.sampling.softmax(self.target.flatten(0, 1)).view(self.batch, self.k + 1, self.vocab)
        q = flashinfer.sampling.softmax(self.draft.flatten(0, 1)).view(self.batch, self.k, self.vocab)
        tokens, _, _ = flashinfer.sampling.chain_speculative_sampling(q, self.drafts.int(), p)
        return ((tokens >= 0).sum(-1) - 1).float(), tokens

    def by_triton(self, target, draft, drafts, uniforms):
        batch, k, vocab = self.batch, self.k, self.vocab
        chunks = triton.cdiv(vocab, BLOCK)
        of = dict(device=target.device, dtype=torch.float32)
        p_partials = torch.empty(batch * (k + 1), chunks, 2, **of)
        q_partials = torch.empty(batch * k, chunks, 2, **of)
        lses, best = torch.empty(batch, 2, **of), torch.empty(batch, chunks, **of)
        best_at = torch.empty(batch, chunks, device=target.device, dtype=torch.int64)
        accepted = torch.empty(batch, device=target.device, dtype=torch.int64)
        tokens = torch.empty(batch, k + 1, device=target.device, dtype=torch.int64)
        stats_kernel[(batch * (k + 1), chunks)](target, p_partials, vocab, chunks, BLOCK, num_warps=8)
        stats_kernel[(batch * k, chunks)](draft, q_partials, vocab, chunks, BLOCK, num_warps=8)
        most = triton.next_power_of_2(chunks)
        walk_kernel[(batch,)](target, draft, p_partials, q_partials, drafts, uniforms, accepted, lses, vocab, chunks, k,
                              most, num_warps=1)
        resample_kernel[(batch, chunks)](target, draft, accepted, lses, best, best_at, 7, vocab, chunks, k, BLOCK,
                                         num_warps=8)
        finish_kernel[(batch,)](drafts, accepted, best, best_at, tokens, chunks, k, triton.next_power_of_2(k + 1), most,
                                num_warps=1)
        return accepted.float(), tokens
