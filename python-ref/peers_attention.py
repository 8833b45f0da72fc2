"""What PyTorch and FlashAttention-3 offer for scale attention. bench_peers.py checks and times it.

FlashAttention-3 comes as the optional wheel `fa3-fwd` (module `fa3_fwd_interface`); without it its peers are left out.
Masks, index tensors and layouts that a peer wants are made beforehand and not timed; what depends on the data is.
"""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nextscale_ref import scale_cases
from peers_common import ALWAYS, BEST, FULL, compiled

try:
    import fa3_fwd_interface as fa3
except ImportError as error:
    fa3 = None
    print(f"SKIPPED FlashAttention-3 (fa3-fwd): {error}", flush=True)

CUDNN = SDPBackend.CUDNN_ATTENTION
# Masks of more elements than this take peers that read them too long.
DENSE_MASK = 1 << 23
# Bytes of logits that the reference holds at a time.
REFERENCE_BYTES = 2 << 30
# Where max-autotuned FlexAttention beats everything else, and with which block size.
FLEX_WINS = {"var256-d30/causal": 128, "var256-d30/diag": 64, "acdit-T4-B256": 128, "acdit-T16-B16": 128}


class ScaleAttention:
    """Inputs of one case and the calls that compute it. Tensors are [batch, rows, heads, dim], bf16."""

    MODES = ["graph"]

    @staticmethod
    def cases(shape):
        return [(case.name, case) for case in scale_cases.expand(shape)]

    @staticmethod
    def smaller(case):
        """Small enough for any device, if there are not too many tokens."""
        if sum(case.queries) * sum(case.keys) > 1 << 20:
            return None
        batch, kv_heads = min(case.batch, 2), min(case.kv_heads, 2)
        lengths = case.lengths and [entry[:kv_heads] for entry in case.lengths[:batch]]
        heads = kv_heads * (case.heads // case.kv_heads)
        small = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "lengths": lengths}
        return scale_cases.dataclasses.replace(case, **small)

    def __init__(self, case, device):
        self.case = case
        generator = torch.Generator(device).manual_seed(0)
        normal = functools.partial(torch.randn, generator=generator, device=device, dtype=torch.float32)
        self.q = normal(case.batch, case.rows, case.heads, case.dim).bfloat16()
        self.k = normal(case.batch, case.capacity, case.kv_heads, case.dim).bfloat16()
        self.v = normal(case.batch, case.capacity, case.kv_heads, case.dim).bfloat16()
        self.scale = case.dim**-0.5
        self.ranges = case.query_ranges()
        self.seen = [case.seen(q) for q in range(len(case.queries))]
        # The keys that there are, of the rows that there is room for.
        self.keys = sum(case.keys)
        # Every segment sees all keys up to some end: then one after the other are dense problems on one cache.
        self.prefix = all(len(seen) == 1 and seen[0][0] == 0 for seen in self.seen) and case.lengths is None

    def integers(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.q.device)

    def lengths_of_heads(self):
        """[batch, heads]: keys that are there up to the end of the limited segment; or None."""
        if self.case.lengths is None:
            return None
        first = self.case.key_ranges()[self.case.limited][0]
        lengths = torch.tensor(self.case.lengths, device=self.q.device) + first
        return lengths.repeat_interleave(self.case.heads // self.case.kv_heads, 1)

    # ---- what is right

    def reference(self):
        """[batch, rows, heads, dim] in f32, and how far a peer may be from it: weights of 16 bits, and one rounding."""
        case = self.case
        want = torch.zeros(self.q.shape, device=self.q.device)
        most = self.lengths_of_heads()
        for (first, end), seen in zip(self.ranges, self.seen):
            if first == end or not seen:
                continue
            index = torch.cat([torch.arange(a, b, device=self.q.device) for a, b in seen])
            # [batch * heads, rows or keys, dim]
            q = self.q[:, first:end].float().transpose(1, 2).flatten(0, 1)
            k, v = (
                x[:, index].float().transpose(1, 2).repeat_interleave(case.heads // case.kv_heads, 1).flatten(0, 1)
                for x in (self.k, self.v)
            )
            out = torch.empty_like(q)
            step = max(1, REFERENCE_BYTES // (4 * (end - first) * len(index)))
            for at in range(0, len(q), step):
                part = slice(at, at + step)
                logits = q[part] @ k[part].transpose(1, 2) * self.scale
                if most is not None:
                    there = index[None, None] < most.flatten()[part, None, None]
                    logits = logits.masked_fill(~there, -torch.inf)
                out[part] = torch.softmax(logits, -1) @ v[part]
            want[:, first:end] = out.unflatten(0, (case.batch, case.heads)).transpose(1, 2)
        size = want.square().mean(-1, keepdim=True).sqrt()
        return want.to(self.q.dtype), 0.03 * size + 0.01 * want.abs() + 1e-6

    def result(self, out):
        """A tensor like the reference, of what a call returned: a tensor, or one for each segment that sees any."""
        if isinstance(out, torch.Tensor):
            return out.reshape(self.q.shape)
        whole = torch.zeros_like(self.q)
        parts = iter(out)
        for (first, end), seen in zip(self.ranges, self.seen):
            if first < end and seen:
                whole[:, first:end] = next(parts)
        return whole

    # ---- the peers

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call)."""
        case = self.case
        if case.lengths is not None:
            if fa3:
                yield "fa3, heads as batch entries", ALWAYS, self.fa3_heads_as_batch
        elif len(set(map(str, self.seen))) == 1:
            yield from self.dense_peers()
        else:
            yield from self.segment_peers()
        if len(case.queries) > 1 or case.lengths is not None:
            yield from self.mask_peers()

    def dense_peers(self):
        """One dense problem: a step, or all that sees all."""
        end = self.seen[0][0][1]
        k, v = self.k[:, :end], self.v[:, :end]
        if fa3:
            if len(self.case.queries) > 1:
                yield "fa3", ALWAYS, lambda: lambda: fa3.flash_attn_func(self.q, k, v)
            yield "fa3, splits=auto", ALWAYS, lambda: lambda: fa3.flash_attn_func(self.q, k, v, num_splits=0)
            if len(self.case.queries) == 1:
                yield "fa3, cache of full capacity + lengths", FULL, lambda: self.fa3_cache(end)
        for name, backend, when in [("flash", SDPBackend.FLASH_ATTENTION, ALWAYS), ("cudnn", CUDNN, FULL)]:
            yield f"sdpa {name}", when, lambda b=backend: lambda: self.sdpa([b], self.q, k, v)

    def segment_peers(self):
        if fa3:
            one = lambda q, k, v: fa3.flash_attn_func(q, k, v)
            yield "fa3 one call a scale", ALWAYS, lambda: lambda: self.one_call_a_segment(one)
            if self.prefix:
                yield "fa3 virtual batches", ALWAYS, lambda: self.fa3_virtual_batches()
                name = "fa3 virtual batches, metadata made once"
                yield name, ALWAYS, lambda: self.fa3_virtual_batches(metadata=True)
            if all(seen == [own] for seen, own in zip(self.seen, self.ranges)):
                yield "fa3 varlen", ALWAYS, self.fa3_varlen
            if self.case.name.startswith("acdit"):
                yield "fa3 two calls and merge", FULL, self.fa3_two_calls
        flash = lambda q, k, v: self.sdpa([SDPBackend.FLASH_ATTENTION], q, k, v)
        yield "sdpa flash one call a scale", ALWAYS, lambda: lambda: self.one_call_a_segment(flash)
        # cuDNN takes no single row.
        cudnn = lambda q, k, v: self.sdpa([CUDNN if q.shape[1] > 1 else SDPBackend.FLASH_ATTENTION], q, k, v)
        yield "sdpa cudnn one call a scale", FULL, lambda: lambda: self.one_call_a_segment(cudnn)

    def mask_peers(self):
        rows, keys = self.case.rows, self.keys
        if rows * keys <= DENSE_MASK:
            for name, backend in [("efficient", SDPBackend.EFFICIENT_ATTENTION), ("cudnn", CUDNN)]:
                yield f"sdpa {name}, dense mask", FULL, lambda b=backend: self.sdpa_mask(b)
        tuned = "max-autotune-no-cudagraphs"
        wins = FLEX_WINS.get(self.case.name)
        # Nothing else takes a pack of many samples at once.
        yield "flex", BEST if not self.prefix and wins is None and len(self.seen) > 20 else FULL, self.flex
        for block in [128, 64] if rows <= 1024 else [128]:
            name = "flex max-autotune" + (", blocks of 64" if block == 64 else "")
            yield name, BEST if wins == block else FULL, lambda b=block: self.flex(b, tuned)

    def one_call_a_segment(self, attend):
        outs = []
        for (first, end), seen in zip(self.ranges, self.seen):
            if first == end or not seen:
                continue
            # What is not in one piece is put together first, as generation does it.
            k, v = (
                x[:, seen[0][0] : seen[0][1]] if len(seen) == 1 else torch.cat([x[:, a:b] for a, b in seen], 1)
                for x in (self.k, self.v)
            )
            outs.append(attend(self.q[:, first:end], k, v))
        return outs

    def sdpa(self, backends, q, k, v, **more):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = self.case.heads != self.case.kv_heads
        with sdpa_kernel(backends if self.q.is_cuda else SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=gqa, **more).transpose(1, 2)

    def mask(self):
        """[rows, keys] bool, or [batch, heads, rows, keys] if heads have lengths of their own."""
        mask = torch.zeros(self.case.rows, self.keys, dtype=torch.bool, device=self.q.device)
        for (first, end), seen in zip(self.ranges, self.seen):
            for a, b in seen:
                mask[first:end, a:b] = True
        most = self.lengths_of_heads()
        if most is None:
            return mask
        return mask & (torch.arange(self.keys, device=self.q.device) < most[:, :, None, None])

    def sdpa_mask(self, backend):
        mask = self.mask()
        k, v = self.k[:, : self.keys], self.v[:, : self.keys]
        return lambda: self.sdpa([backend], self.q, k, v, attn_mask=mask)

    def flex(self, block=128, mode=None):
        case, device = self.case, self.q.device
        # Each row sees few ranges of keys: two comparisons for each.
        count = max(len(seen) for seen in self.seen)
        starts, ends = torch.zeros(2, count, case.rows, dtype=torch.int32, device=device)
        for (first, end), seen in zip(self.ranges, self.seen):
            for i, (a, b) in enumerate(seen):
                starts[i, first:end], ends[i, first:end] = a, b
        most = self.lengths_of_heads()

        def mask(b, h, q, k):
            seen = (k >= starts[0, q]) & (k < ends[0, q])
            for i in range(1, count):
                seen = seen | ((k >= starts[i, q]) & (k < ends[i, q]))
            return seen if most is None else seen & (k < most[b, h])

        def prefix_mask(b, h, q, k):
            return k < ends[0, q]

        shape = (case.batch, case.heads) if most is not None else (None, None)
        blocks = create_block_mask(
            prefix_mask if self.prefix else mask, *shape, case.rows, self.keys, device=device, BLOCK_SIZE=block
        )
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k[:, : self.keys], self.v[:, : self.keys]))
        attend = flex_attention
        if device.type == "cuda":
            attend = compiled(flex_attention, mode)
        more = {"block_mask": blocks, "scale": self.scale, "enable_gqa": case.heads != case.kv_heads}
        return lambda: attend(q, k, v, **more).transpose(1, 2)

    # ---- FlashAttention-3

    def fa3_cache(self, end):
        lengths = self.integers([end] * self.case.batch)
        return lambda: fa3.flash_attn_with_kvcache(self.q, self.k, self.v, cache_seqlens=lengths, num_splits=0)

    def packed(self):
        """(q [batch * rows, heads, dim], cumulative lengths of all segments of all batch entries, the longest)"""
        sizes = self.integers([0, *self.case.queries * self.case.batch])
        return self.q.flatten(0, 1), sizes.cumsum(0, dtype=torch.int32), max(self.case.queries)

    def virtual_batches(self, ends, metadata=False, **more):
        """A call for all segments at once, each a batch entry that sees the keys of its own up to an end."""
        case = self.case
        q, starts, longest = self.packed()
        lengths = self.integers(ends * case.batch)
        entries = self.integers([b for b in range(case.batch) for _ in ends])
        how = {"cache_seqlens": lengths, "cu_seqlens_q": starts, "num_splits": 0}
        if metadata:
            how["scheduler_metadata"] = fa3.get_scheduler_metadata(
                len(lengths), longest, case.capacity, case.heads, case.kv_heads, case.dim, **how
            )
        how |= {"cache_batch_idx": entries, "max_seqlen_q": longest} | more
        return lambda: fa3.flash_attn_with_kvcache(q, self.k, self.v, **how)

    def fa3_virtual_batches(self, metadata=False):
        return self.virtual_batches([seen[0][1] for seen in self.seen], metadata)

    def fa3_varlen(self):
        q, starts, longest = self.packed()
        k, v = self.k.flatten(0, 1), self.v.flatten(0, 1)
        return lambda: fa3.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest)

    def fa3_two_calls(self):
        """ACDiT: all blocks on the clean ones before, the noised ones on themselves, then both by their sums."""
        count = len(self.case.queries) // 2
        ends = [seen[0][1] if q < count or len(seen) > 1 else 0 for q, seen in enumerate(self.seen)]
        clean = self.virtual_batches(ends, return_softmax_lse=True)
        q, starts, longest = self.packed()
        k, v = self.k.flatten(0, 1), self.v.flatten(0, 1)
        own = self.integers([0 if i < count else size for i, size in enumerate(self.case.queries)] * self.case.batch)
        how = {"seqused_k": own, "return_attn_probs": True}

        def merge(out, lse, more, its_lse):
            # [heads, rows] of each; one of the two is never empty.
            share = torch.sigmoid(its_lse - lse).T[..., None]
            return torch.where(share > 0, more.float() * share, 0).add(
                torch.where(share < 1, out.float() * (1 - share), 0)
            ).to(out.dtype)

        if self.q.is_cuda:
            merge = compiled(merge)

        def call():
            out, lse, *_ = clean()
            more, its_lse, *_ = fa3.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, **how)
            return merge(out, lse, more, its_lse)

        return call

    def fa3_heads_as_batch(self):
        """For lengths of each head: every head a batch entry, queries and cache laid out for it."""
        case = self.case
        heads = lambda x: x.transpose(1, 2).contiguous().flatten(0, 1)[:, :, None]
        k, v = (heads(x.repeat_interleave(case.heads // case.kv_heads, 2)) for x in (self.k, self.v))
        q, lengths = heads(self.q), self.lengths_of_heads().flatten().to(torch.int32)
        attend = lambda: fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, num_splits=0)
        return lambda: attend().unflatten(0, (case.batch, case.heads)).squeeze(3).transpose(1, 2)
