"""What PyTorch offers for packing and unpacking, and it and FlashAttention-3 for attention over packed caches. bench_peers.py
checks and times it.

Codes are held against nextscale_ref.packing, what is unpacked against f64. Codes of 3 bits stay bytes, one a code: less
work than packing them. A cache that PyTorch attends to is unpacked first.
"""

import torch
import torch.nn.functional as F

from nextscale_ref import packing
from peers_attention import fa3
from peers_common import ALWAYS, PLAIN_COMPILERS, compiled


def pack_fp8(x):
    scale = (x.abs().amax(-1, keepdim=True).float() / 448).clamp_min(1e-6)
    return (x.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale


def pack_int8(x):
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min(1e-6)
    return (x.float() / scale).round().to(torch.int8).view(torch.uint8), scale


def pack_uniform(x, bits, dim=-1):
    x = x.float()
    least = x.amin(dim, keepdim=True)
    scale = (x.amax(dim, keepdim=True) - least).clamp_min(1e-30) / (2**bits - 1)
    return ((x - least) / scale).round().to(torch.uint8), scale, least


def nibbles(codes, bits):
    parts = codes.unflatten(-1, (-1, 8 // bits))
    out = parts[..., 0]
    for i in range(1, 8 // bits):
        out = out | parts[..., i] << (bits * i)
    return out


class Pack:
    """Inputs of one case and the expressions that compute it: codes and their numbers, or the values again."""

    MODES = ["graph", "eager", "cold"]

    @staticmethod
    def cases(shape):
        # Numbers beside the codes of a row are a layout of ours.
        return [(shape["name"], None if shape["inline"] else shape)]

    @staticmethod
    def smaller(case):
        if case is None:
            return None
        return case | {"sets": 1, "tokens": 128, "kept": 64 if case["kept"] else 0, "heads": 2}

    def __init__(self, case, device):
        self.case, self.format, self.bits = case, case["format"], case["bits"]
        self.group = case["group"] or case["dim"]
        generator = torch.Generator(device).manual_seed(0)
        shape = [case["sets"], case["tokens"], case["heads"], case["dim"]]
        self.x = torch.randn(shape, generator=generator, device=device).bfloat16()
        self.index = None
        if case["kept"]:
            index = torch.arange(case["kept"], device=device) * case["tokens"] // case["kept"]
            self.index = index[None, :, None, None].expand(case["sets"], -1, case["heads"], case["dim"])
        self.rotation = packing.rotation(case["dim"], 1).float().to(device).bfloat16() if case["rotate"] else None
        if self.format == "lloyd_max":
            centroids = packing.centroids(self.bits).float().to(device)
            self.thresholds = (centroids[1:] + centroids[:-1]) / 2
        self.packed = self.pack(self.x) if case["how"] == "unpack" else None

    def rows(self, x):
        """What is packed: kept rows, rotated."""
        if self.index is not None:
            x = x.gather(1, self.index)
        return x if self.rotation is None else x @ self.rotation.T

    def pack(self, x):
        """Codes, then their numbers."""
        x = self.rows(x)
        if self.format == "fp8":
            return pack_fp8(x)
        if self.format == "int8":
            return pack_int8(x)
        if self.format == "channel":
            codes, *numbers = pack_uniform(x.unflatten(1, (-1, self.group)), self.bits, 2)
            return nibbles(codes.flatten(1, 2), self.bits), *numbers
        if self.format == "uniform":
            codes, *numbers = pack_uniform(x.unflatten(-1, (-1, self.group)), self.bits)
            return nibbles(codes.flatten(-2), self.bits), *numbers
        norm = x.float().norm(dim=-1, keepdim=True)
        codes = torch.bucketize(x.float() * self.case["dim"] ** 0.5 / norm, self.thresholds).to(torch.uint8)
        return nibbles(codes, self.bits) if self.bits == 4 else codes, norm

    def unpack(self, codes, *numbers):
        if self.format == "fp8":
            x = codes.view(torch.float8_e4m3fn).float() * numbers[0]
        else:
            shift = torch.arange(0, 8, self.bits, device=codes.device, dtype=torch.uint8)
            x = (codes[..., None] >> shift & (1 << self.bits) - 1).flatten(-2).float()
            dim = (1, (-1, self.group)) if self.format == "channel" else (-1, (-1, self.group))
            x = x.unflatten(*dim) * numbers[0] + numbers[1]
            x = x.flatten(1, 2) if self.format == "channel" else x.flatten(-2)
        x = x.bfloat16()
        return x if self.rotation is None else x @ self.rotation

    def reference(self):
        """Codes as nextscale_ref.packing has them, which rounds scales to 17 bits: a code may be one off, a unit of fp8; of
        a byte's fields each. Or what they stand for, in f64, which a peer rounds to 16 bits twice."""
        if self.packed is not None:
            x = self.rows(self.x).double()
            if self.rotation is not None:
                x = x @ self.rotation.double()
            size = self.x.float().abs().amax()
            # Half a step of the codes, and two roundings.
            step = {"fp8": 2.0**-4, "int8": 2.0**-8}.get(self.format, 1.2 / (2**self.bits - 1))
            return x.float(), torch.full_like(x, 2 * step * size.item(), dtype=torch.float32)
        x = self.rows(self.x).float()
        if self.format in ("fp8", "int8"):
            codes = packing.scaled(x, self.format == "fp8")[0]
        elif self.format == "lloyd_max":
            unit = x.double() * self.case["dim"] ** 0.5 / x.double().norm(dim=-1, keepdim=True)
            codes = torch.bucketize(unit, self.thresholds.double())
            codes = packing.pack_codes(codes, 4) if self.bits == 4 else codes.to(torch.uint8)
        elif self.format == "channel":
            codes = packing.uniform(x.unflatten(1, (-1, self.group)), self.bits, 2, torch.float32)[0].flatten(1, 2)
            codes = packing.pack_codes(codes, self.bits)
        else:
            codes = packing.uniform(x.unflatten(-1, (-1, self.group)), self.bits, -1, torch.float32)[0].flatten(-2)
            codes = packing.pack_codes(codes, self.bits)
        want = self.as_numbers(codes)
        fields = sum(1 << self.bits * i for i in range(8 // self.bits)) if self.bits != 3 else 1
        return want, torch.full_like(want, 32.0 if self.format == "fp8" else float(fields))

    def as_numbers(self, codes):
        kinds = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
        return codes.view(kinds.get(self.format, torch.uint8)).float()

    def result(self, out):
        return out.float() if self.packed is not None else self.as_numbers(out[0])

    def peers(self):
        expression, arguments = (self.pack, (self.x,)) if self.packed is None else (self.unpack, self.packed)
        yield "eager", ALWAYS, lambda: lambda: expression(*arguments)
        for mode, name, when in PLAIN_COMPILERS:
            yield name, when, lambda m=mode: self.compiled(expression, m, arguments)

    def compiled(self, expression, mode, arguments):
        expression = compiled(expression, mode)
        return lambda: expression(*arguments)


class PackedAttention:
    """One step over a cache: SDPA on bf16, and on a cache that is unpacked first."""

    MODES = ["graph", "eager", "cold"]

    @staticmethod
    def cases(shape):
        return [(shape["name"], None if shape["format"] in ("bf16-portable", "fp8-inline") else shape)]

    @staticmethod
    def smaller(case):
        return None if case is None else case | {"keys": 96, "rows": min(case["rows"], 8)}

    def __init__(self, case, device):
        self.case = case
        generator = torch.Generator(device).manual_seed(0)
        normal = lambda heads, rows: torch.randn(
            [case["batch"], heads, rows, case["dim"]], generator=generator, device=device
        ).bfloat16()
        self.q = normal(case["heads"], case["rows"])
        self.plain = [normal(case["kv_heads"], case["keys"]) for _ in range(2)]
        if case["format"] == "fp8":
            self.packed = [pack_fp8(x) for x in self.plain]
        elif case["format"] == "int4":
            self.packed = [pack_uniform(x, 4) for x in self.plain]
            self.packed = [(nibbles(codes, 4), scale, least) for codes, scale, least in self.packed]

    def unpack(self, packed):
        if self.case["format"] == "fp8":
            codes, scale = packed
            return (codes.view(torch.float8_e4m3fn).float() * scale).bfloat16()
        codes, scale, least = packed
        return (torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float() * scale + least).bfloat16()

    def attend(self, k, v):
        return F.scaled_dot_product_attention(self.q, k, v, enable_gqa=self.case["heads"] != self.case["kv_heads"])

    def compute(self):
        if self.case["format"] == "bf16":
            return self.attend(*self.plain)
        return self.attend(*map(self.unpack, self.packed))

    def reference(self):
        groups = self.case["heads"] // self.case["kv_heads"]
        kv = self.plain if self.case["format"] == "bf16" else [self.unpack(p) for p in self.packed]
        k, v = (x.float().repeat_interleave(groups, 1) for x in kv)
        want = F.scaled_dot_product_attention(self.q.float(), k, v)
        return want, torch.full_like(want, 0.02)

    def result(self, out):
        return out.float()

    def peers(self):
        yield "sdpa", ALWAYS, lambda: self.compute
        if self.case["format"] != "bf16":
            for mode, name, when in PLAIN_COMPILERS:
                yield f"{name}: unpack, then sdpa", when, lambda m=mode: self.compiled(m)
        elif fa3:
            yield "fa3, splits=auto", ALWAYS, self.fa3

    def compiled(self, mode):
        return compiled(self.compute, mode)

    def fa3(self):
        # Rows before heads, as FlashAttention has them.
        q, k, v = (x.transpose(1, 2).contiguous() for x in (self.q, *self.plain))
        return lambda: fa3.flash_attn_func(q, k, v, num_splits=0).transpose(1, 2)
