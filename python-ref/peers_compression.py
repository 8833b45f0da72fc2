"""What PyTorch offers for packing and for attention over packed caches. bench_peers.py checks and times it.

Packed codes of fp8, int8 and 4 bits are held against nextscale_ref.packing; KIVI's and Lloyd-Max codes are timed as unpacked
bytes, one a code, which is less work than packing them.
"""

import torch
import torch.nn.functional as F

from nextscale_ref import packing
from peers_attention import ALWAYS, BEST


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
    """Inputs of one case and the expressions that compute it: codes."""

    MODES = ["graph", "eager", "cold"]

    @staticmethod
    def cases(shape):
        return [(shape["name"], shape if shape["how"] == "pack" and not shape["inline"] else None)]

    @staticmethod
    def smaller(case):
        if case is None:
            return None
        return case | {"sets": 1, "tokens": 128, "kept": 64 if case["kept"] else 0, "heads": 2}

    def __init__(self, case, device):
        self.case = case
        generator = torch.Generator(device).manual_seed(0)
        shape = [case["sets"], case["tokens"], case["heads"], case["dim"]]
        self.x = torch.randn(shape, generator=generator, device=device).bfloat16()
        self.index = None
        if case["kept"]:
            index = torch.arange(case["kept"], device=device) * case["tokens"] // case["kept"]
            self.index = index[None, :, None, None].expand(case["sets"], -1, case["heads"], case["dim"])
        self.rotation = packing.rotation(case["dim"], 1).float().to(device).bfloat16() if case["rotate"] else None
        if case["format"] == "lloyd_max":
            centroids = packing.centroids(case["bits"]).float().to(device)
            self.thresholds = (centroids[1:] + centroids[:-1]) / 2

    def reference(self):
        # Where another compiler rounds a scale otherwise, each code may be one off: a unit of fp8, of a byte's fields one each.
        want = self.result(self.compute(self.x))
        fields = sum(1 << self.case["bits"] * i for i in range(8 // self.case["bits"]))
        return want, torch.full_like(want, 32.0 if self.case["format"] == "fp8" else float(fields))

    def result(self, out):
        kinds = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
        return out.view(kinds.get(self.case["format"], torch.uint8)).float()

    def compute(self, x):
        case = self.case
        if self.index is not None:
            x = x.gather(1, self.index)
        if self.rotation is not None:
            x = x @ self.rotation.T
        if case["format"] == "fp8":
            return pack_fp8(x)[0]
        if case["format"] == "int8":
            return pack_int8(x)[0]
        if case["format"] == "channel":
            codes = pack_uniform(x.unflatten(1, (-1, case["group"])), case["bits"], 2)[0].flatten(1, 2)
            return nibbles(codes, case["bits"])
        if case["format"] == "uniform":
            codes = pack_uniform(x.unflatten(-1, (-1, case["group"] or case["dim"])), case["bits"])[0].flatten(-2)
            return nibbles(codes, case["bits"])
        unit = x.float() * case["dim"] ** 0.5 / x.float().norm(dim=-1, keepdim=True)
        return torch.bucketize(unit, self.thresholds).to(torch.uint8)

    def peers(self):
        yield "eager", ALWAYS, lambda: lambda: self.compute(self.x)
        yield "compile", BEST, self.compiled

    def compiled(self):
        torch._dynamo.reset()
        compute = torch.compile(self.compute, dynamic=False)
        return lambda: compute(self.x)


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
            yield "compile", BEST, self.compiled

    def compiled(self):
        torch._dynamo.reset()
        return torch.compile(self.compute, dynamic=False)
