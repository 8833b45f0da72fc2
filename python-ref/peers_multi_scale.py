"""What PyTorch offers for multi-scale quantizers. bench_peers.py checks and times it.

The expressions are those of the models' own code: embedding, interpolate, convolution, accumulate, pool. A call is all
steps of a generation, a decode or an encode. TF32 is off: with it maps are off by 1e-3.
"""

import torch
import torch.nn.functional as F

from nextscale_ref.multi_scale import Quantizer
from peers_common import ALWAYS, COMPILERS, Case, compiled

TABLES = {10: [0, 0, 1, 1, 1, 2, 2, 3, 3, 3], 14: [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]}


class MultiScale(Case):
    """Inputs of one case and the expressions that compute it."""

    @staticmethod
    def smaller(case):
        return case | {"batch": min(case["batch"], 2), "entries": min(case["entries"], 100),
                       "sides": [side for side in case["sides"] if side <= 16]}

    def __init__(self, case, device):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.how, self.bits, self.sides = case["how"], case["entries"] == 0, case["sides"]
        batch, channels, side = case["batch"], case["channels"], self.sides[-1]
        self.scale = channels**-0.5
        self.up, self.down = ("bilinear", "bilinear") if self.bits else ("bicubic", "area")
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=device)

        self.book = normal(max(case["entries"], 1), channels)
        self.phis = None
        if case["phi"]:
            table = TABLES.get(len(self.sides), [0] * len(self.sides))
            self.phis = (normal(4, channels, channels, 3, 3) / (9 * channels) ** 0.5, normal(4, channels) * 0.1, 0.5, table)
        most = 2 if self.bits else case["entries"]
        width = [channels] if self.bits else []
        self.tokens = [torch.randint(0, most, [batch, s * s, *width], generator=generator, device=device)
                       for s in self.sides]
        if self.bits:
            self.tokens = [tokens.to(torch.uint8) for tokens in self.tokens]
        self.f = normal(batch, channels, side, side) * 2
        self.quantizer = Quantizer([(s, s) for s in self.sides], self.up, self.down, self.phis, bit_scale=self.scale)
        self.shape = [batch, channels, side, side]

    def result(self, out):
        # Of an encode the map alone: a code that differs by rounding changes what follows.
        return out

    def reference(self):
        if self.how == "encode":
            out = self.encode(self.f)
            # Its own codes: a sanity check of the peers, not of us.
            return out, torch.full_like(out, float(self.f.abs().max()) * 4)
        tokens = torch.cat(self.tokens, 1)
        maps, inputs = self.quantizer.chain(tokens, None if self.bits else self.book, self.bits)
        wanted = [maps[-1].float()]
        tolerance = [torch.full_like(wanted[0], 1e-4)]
        if self.how != "decode":
            wanted += [x.bfloat16() for x in inputs]
            tolerance += [torch.full_like(x, 0.05, dtype=torch.float32) for x in wanted[1:]]
        return tuple(wanted), tuple(tolerance)

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call)."""
        expression, arguments = {"encode": (self.encode, (self.f,)), "decode": (self.decode, self.tokens)}.get(
            self.how, (self.steps, self.tokens))
        yield "as written", ALWAYS, lambda: lambda: expression(*arguments)
        for mode, name, when in COMPILERS:
            yield f"{name}: as written", when, lambda m=mode: self.call(expression, m, arguments)

    def call(self, expression, mode, arguments):
        call = compiled(expression, mode)
        return lambda: call(*arguments)

    def looked_up(self, tokens, scale):
        side = self.sides[scale]
        rows = (tokens.float() * 2 - 1) * self.scale if self.bits else F.embedding(tokens, self.book)
        return rows.transpose(1, 2).reshape(*self.shape[:2], side, side)

    def added(self, h, scale):
        if scale + 1 < len(self.sides):
            h = F.interpolate(h, size=self.shape[2:], mode=self.up, align_corners=False)
        if self.phis is None:
            return h
        weights, biases, ratio, table = self.phis
        return h * (1 - ratio) + F.conv2d(h, weights[table[scale]], biases[table[scale]], padding=1) * ratio

    def next_input(self, f_hat, scale):
        how = {} if self.down == "area" else {"align_corners": False}
        x = F.interpolate(f_hat, size=[self.sides[scale + 1]] * 2, mode=self.down, **how)
        return x.flatten(2).transpose(1, 2).bfloat16().contiguous()

    def steps(self, *tokens):
        f_hat, inputs = torch.zeros(self.shape, device=self.f.device), []
        for scale, of_scale in enumerate(tokens):
            f_hat = f_hat + self.added(self.looked_up(of_scale, scale), scale)
            if scale + 1 < len(tokens):
                inputs.append(self.next_input(f_hat, scale))
        return f_hat, *inputs

    def decode(self, *tokens):
        f_hat = torch.zeros(self.shape, device=self.f.device)
        for scale, of_scale in enumerate(tokens):
            f_hat = f_hat + self.added(self.looked_up(of_scale, scale), scale)
        return (f_hat,)

    def encode(self, f):
        rest, f_hat = f, torch.zeros_like(f)
        for scale, side in enumerate(self.sides):
            z = F.interpolate(rest, size=[side, side], mode="area") if side != self.sides[-1] else rest
            rows = z.flatten(2).transpose(1, 2)
            if self.bits:
                code = (rows > 0).to(torch.uint8)
            else:
                rows = rows.reshape(-1, rows.shape[-1])
                distance = rows.square().sum(1, keepdim=True) + self.book.square().sum(1)
                code = torch.addmm(distance, rows, self.book.T, alpha=-2).argmin(1).view(self.shape[0], -1)
            h = self.added(self.looked_up(code, scale), scale)
            rest, f_hat = rest - h, f_hat + h
        return f_hat
