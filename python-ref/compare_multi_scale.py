"""Random cases of the multi-scale and scalar quantizers for compare.py."""

import torch

from nextscale_ref import multi_scale as reference
from nextscale_ref import philox

DTYPES = {"u8": torch.uint8, "u16": torch.uint16, "u32": torch.uint32, "i64": torch.int64, "f32": torch.float32,
          "f16": torch.float16, "bf16": torch.bfloat16}
# Of the greatest element of a map.
BOUND = 2e-6
BIT_FLIP_DOMAIN = 0x62666C70
VAR_256 = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


def off(name, out, exact, dtype=torch.float32):
    """(None or why not, worst error as a share of the bound)"""
    if out.dtype != dtype or out.shape != exact.shape:
        return f"{name} is {out.dtype} {list(out.shape)}", 0.0
    if not out.numel():
        return None, 0.0
    most = exact.abs().max()
    bound = BOUND * most + torch.zeros_like(exact)
    if dtype != torch.float32:
        info = torch.finfo(dtype)
        bound += info.eps / 2 * (exact.abs() + BOUND * most) + info.smallest_normal * info.eps / 2
    difference = (out.double() - exact).abs()
    if not (difference <= bound + 1e-37).all():
        return f"{name} is off by {difference.max().item():.3g}, the greatest element is {most.item():.3g}", 0.0
    return None, (difference / (bound + 1e-37)).max().item()


def schedule_of(device, rng):
    """Token grids, the last the largest."""
    kind = rng.random()
    if kind < 0.15 and device != "emulated":
        return [(side, side) for side in VAR_256]
    most = 12 if device == "emulated" else 40
    last = (rng.randint(1, most), rng.randint(1, most))
    grids = [(rng.randint(1, last[0]), rng.randint(1, last[1])) for _ in range(rng.randint(0, 5))]
    return sorted(grids, key=lambda grid: grid[0] * grid[1]) + [last]


class Case:
    """A quantizer: its settings of `op`, and the reference."""

    def __init__(self, device, number, rng, bits=None):
        self.rng, self.generator = rng, torch.Generator().manual_seed(rng.getrandbits(63))
        self.schedule = schedule_of(device, rng)
        self.batch = rng.choice([1, 1, 2, 3])
        self.channels = rng.choice([1, 3, 4, 8, 13, 16, 32, 32])
        self.next = rng.choice(["area", "area", "bilinear"]) if bits is not None else \
            rng.choice(["area", "area", "bilinear", "tokens"])
        self.up = rng.choice(["bicubic", "bicubic", "bilinear"])
        self.patch = rng.choice([1, 2]) if bits else 1
        self.settings = {"schedule": ",".join(f"{h}x{w}" for h, w in self.schedule), "up": self.up, "next": self.next,
                         "patch": self.patch}
        self.inputs, phis, last_phi = {}, None, True
        if not bits and self.next != "tokens" and rng.random() < 0.6:
            count = rng.randint(1, 4)
            table = [rng.randrange(count) for _ in self.schedule]
            table[0] = count - 1
            n = self.channels
            weights = self.normal([count, n, n, 3, 3]) / (9 * n) ** 0.5
            biases, ratio = self.normal([count, n]) * 0.1, rng.choice([0.5, 0.5, 0.0, 1.0])
            last_phi = rng.random() < 0.7
            phis = (weights, biases, ratio, table)
            self.inputs |= {"phi_weights": weights, "phi_biases": biases}
            self.settings |= {"phi_table": ",".join(map(str, table)), "ratio": ratio, "last_phi": str(last_phi).lower()}
        self.quantizer = reference.Quantizer(self.schedule, self.up, self.next, phis, last_phi, self.patch,
                                             self.channels**-0.5)
        self.width = self.channels * self.patch**2
        self.tokens = self.quantizer.starts[-1]
        grids = self.schedule if len(self.schedule) < 8 else "var256"
        self.what = (f"{self.batch}x{self.channels} {grids} {self.up} {self.next}"
                     f"{f' {len(phis[0])} phis' if phis else ''}{f' patch {self.patch}' if self.patch > 1 else ''}")

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator)

    def map(self):
        return self.normal([self.batch, self.channels, *self.quantizer.size])


def multi_scale(program, number, rng):
    tokens_t = ["u16", "f32", "u8", "u32", "bf16", "i64", "f16"][number % 7]
    next_t = ["f32", "bf16", "f16"][number % 3]
    codes = tokens_t in ("u16", "u32", "i64")
    case = Case(program.device, number, rng, bits=None)
    patch = 1 if codes or case.next == "tokens" and rng.random() < 0.5 else rng.choice([1, 2])
    if patch == 2 and not case.inputs:
        case.patch, case.width = 2, case.channels * 4
        case.settings["patch"] = 2
        case.quantizer = reference.Quantizer(case.schedule, case.up, case.next, None, True, 2, case.channels**-0.5)
    codebook = None
    if codes:
        entries = rng.choice([1, 5, 300, 4096])
        codebook = case.normal([entries, case.channels])
        tokens = torch.randint(0, entries, [case.batch, case.tokens], generator=case.generator)
        case.inputs["codebook"] = codebook
    elif tokens_t == "u8":
        tokens = torch.randint(0, 2, [case.batch, case.tokens, case.width], generator=case.generator)
    else:
        tokens = case.normal([case.batch, case.tokens, case.width])
    tokens = tokens.to(DTYPES[tokens_t])
    how = rng.choice(["steps", "steps", "turns", "turns", "decode", "prefixes", "inputs"])
    repeat = rng.choice([1, 2]) if how in ("steps", "turns") else 1
    settings = case.settings | {"how": how, "next_dtype": next_t, "repeat": repeat}
    what = f"{tokens_t}->{next_t} {how} {case.what}"
    exit_code, outputs, error = program("multi_scale", case.inputs | {"tokens": tokens}, settings,
                                        repeat=2 if number % 5 == 0 else 1)
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    maps, inputs = case.quantizer.chain(tokens, codebook, tokens_t == "u8")
    exact = torch.stack(maps) if how == "prefixes" else maps[-1]
    problem, share = off("f_hat", outputs["f_hat"], exact)
    if problem is None and "inputs" in outputs:
        shape = [case.batch, 0, case.width]
        exact = torch.cat(inputs, 1) if inputs else torch.zeros(shape, dtype=torch.float64)
        problem, other = off("inputs", outputs["inputs"], exact.expand(repeat, *exact.shape), DTYPES[next_t])
        share = max(share, other)
    if problem is None and program.device != "host" and outputs["flags"].tolist() != [0]:
        problem = "flags are set"
    return what, problem, share


def multi_scale_encode(program, number, rng):
    bits = number % 3 == 2
    case = Case(program.device, number, rng, bits=bits)
    f = case.map() * 2
    repeat = 2 if number % 5 == 0 else 1
    return (encode_bits if bits else encode_codes)(program, case, f, repeat, number, rng)


def encode_codes(program, case, f, repeat, number, rng):
    codes_t = ["u16", "u32", "i64"][number // 3 % 3]
    entries = rng.choice([1, 5, 300, 1000])
    codebook = case.normal([entries, case.channels])
    cosine = rng.random() < 0.3
    rows = torch.nn.functional.normalize(codebook, dim=1) if cosine else codebook
    inputs = case.inputs | {"f": f, "codebook": codebook} | ({"search": rows} if cosine else {})
    what = f"{codes_t} of {entries}{' cosine' if cosine else ''} {case.what}"
    exit_code, outputs, error = program("multi_scale_encode", inputs, case.settings | {"codes_dtype": codes_t}, repeat)
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    codes = outputs["codes"].long()
    if codes.min() < 0 or codes.max() >= entries:
        return what, "a code is out of range", 0.0
    maps, _ = case.quantizer.chain(codes, codebook)
    worst = 0.0
    for scale in range(len(case.schedule)):
        z = case.quantizer.left(f, maps[scale - 1] if scale else 0, scale)
        if cosine:
            z = torch.nn.functional.normalize(z, dim=-1)
        scores = (z[:, :, None] - rows.double()).square().sum(-1)
        chosen = scores.gather(-1, case.quantizer.of_scale(codes, scale)[..., None])[..., 0]
        # A row as near as the nearest, but for the rounding of what is left and of the score.
        excess = (chosen - scores.amin(-1)) / (1e-5 * (1 + chosen))
        worst = max(worst, excess.max().item())
    if not worst <= 1:
        return what, f"a row that is not the nearest: {worst:.3g} of the slack", 0.0
    problem, share = off("f_hat", outputs["f_hat"], maps[-1])
    return what, problem, max(share, worst)


def flips(seeds, first, count, width, rate):
    """Which bits of `count` tokens from `first` on are flipped: [batch, count, width]."""
    rows = []
    for seed in seeds.tolist():
        chunks = -(-width // 4)
        uniforms = philox.philox_fill(count * chunks, seed=seed % 2**64, first_position=first * chunks,
                                      domain=BIT_FLIP_DOMAIN, draw=0, dtype=torch.float32)
        rows.append(uniforms.view(count, chunks * 4)[:, :width] < torch.tensor(rate, dtype=torch.float32))
    return torch.stack(rows)


def encode_bits(program, case, f, repeat, number, rng):
    inputs, settings, rates = {"f": f}, dict(case.settings), None
    if rng.random() < 0.6:
        rates = [rng.choice([0.0, 0.1, 0.5, 1.0]) for _ in case.schedule]
        seeds = torch.tensor([rng.getrandbits(63) - 2**62 for _ in range(case.batch)])
        inputs["seeds"] = seeds
        settings["rates"] = ",".join(map(str, rates))
    what = f"bits{' flipped' if rates else ''} {case.what}"
    exit_code, outputs, error = program("multi_scale_encode", inputs, settings, repeat)
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    labels = outputs["labels"]
    used = outputs["flipped"] if rates else labels
    maps, made = case.quantizer.chain(used, bits=True)
    for scale in range(len(case.schedule)):
        z = case.quantizer.left(f, maps[scale - 1] if scale else 0, scale)
        of_labels = case.quantizer.of_scale(labels, scale)
        if not ((of_labels == (z > 0)) | (z.abs() < 1e-5)).all():
            return what, f"labels of scale {scale} are not the signs", 0.0
        if rates:
            first, last = case.quantizer.starts[scale : scale + 2]
            flipped = flips(seeds, first, last - first, case.width, rates[scale])
            if not torch.equal(case.quantizer.of_scale(used, scale), of_labels ^ flipped.to(torch.uint8)):
                return what, f"flips of scale {scale}", 0.0
    problem, share = off("f_hat", outputs["f_hat"], maps[-1])
    if problem is None and made:
        problem, other = off("inputs", outputs["inputs"], torch.cat(made, 1))
        share = max(share, other)
    return what, problem, share


def bits(program, number, rng):
    input_t = ["f32", "f16", "bf16", "u8", "u16", "u32", "i64"][number % 7]
    values_t, codes_t = rng.choice(["f32", "f16", "bf16"]), rng.choice(["u16", "u32", "i64"])
    integers = input_t in ("u16", "u32", "i64")
    most = {"u16": 16, "u32": 32, "i64": 63}
    dim = rng.randint(1, most[input_t]) if integers else rng.choice([1, 8, 13, 16, 18, 32, 64, rng.randint(1, 300)])
    rows, order = rng.choice([0, 1, 7, 100, 3000]), rng.choice(["msb", "lsb"])
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    settings = {"order": order, "values_dtype": values_t, "codes_dtype": codes_t, "dim": dim}
    scale = rng.choice([None, 1.0, 0.25])
    if scale is not None:
        settings["scale"] = scale
    nan = torch.zeros([rows, dim], dtype=torch.bool)
    if integers or input_t == "u8":
        bit = torch.randint(0, 2, [rows, dim], generator=generator)
        source = pack(bit, order) if integers else bit
    else:
        source = torch.randn([rows, dim], generator=generator)
        source[torch.rand([rows, dim], generator=generator) < 0.1] = 0.0
        source[torch.rand([rows, dim], generator=generator) < 0.05] = torch.nan
        source = source.to(DTYPES[input_t])
        bit, nan = (source > 0).long(), source.isnan()
    inputs = {"input": source.to(DTYPES[input_t])}
    if rows and rng.random() < 0.4:
        rate, per_seed, first = rng.choice([0.0, 0.3, 1.0]), rng.choice([1, 5, rows]), rng.choice([0, 77])
        seeds = torch.randint(-(2**62), 2**62, [-(-rows // per_seed)], generator=generator)
        inputs["seeds"] = seeds
        settings |= {"rate": rate, "rows_per_seed": per_seed, "first_row": first}
        bit = bit ^ flips(seeds, first, per_seed, dim, rate).flatten(0, 1)[:rows].long()
    what = f"{input_t}->{values_t},{codes_t} {rows}x{dim} {order}{' flipped' if 'seeds' in inputs else ''}"
    exit_code, outputs, error = program("bits", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    if not torch.equal(outputs["labels"].long(), bit):
        return what, "labels differ", 0.0
    magnitude = torch.tensor(dim**-0.5 if scale is None else scale, dtype=torch.float32)
    values = torch.where(bit == 1, magnitude, -magnitude).masked_fill(nan, torch.nan).to(DTYPES[values_t])
    if not torch.equal(outputs["values"].nan_to_num(7.0), values.nan_to_num(7.0)):
        return what, "values differ", 0.0
    if ("codes" in outputs) != (dim <= {"u16": 16, "u32": 32, "i64": 64}[codes_t]):
        return what, "codes are there or not", 0.0
    if "codes" in outputs and not torch.equal(outputs["codes"].long(), pack(bit, order)):
        return what, "codes differ", 0.0
    return what, None, 0.0


def pack(bit, order):
    """Integers of up to 64 bits; the 64th is the sign."""
    dim = bit.shape[1]
    places = range(dim - 1, -1, -1) if order == "msb" else range(dim)
    total = torch.zeros(bit.shape[0], dtype=torch.int64)
    for k, place in enumerate(places):
        total |= bit[:, k].long() << place
    return total


def fsq(program, number, rng):
    z_t, values_t, codes_t = (["f32", "f16", "bf16"][number % 3], ["f32", "f16", "bf16"][number // 3 % 3],
                              rng.choice(["u16", "u32", "i64"]))
    levels = rng.choice([[8, 5, 5, 5], [8, 8, 8, 5, 5, 5], [2], [16], [7, 5, 5, 5, 5], [4] * 8])
    bound = rng.choice(["tanh", "tanh", "symmetric", "clamp"])
    rows, quantizers = rng.choice([0, 1, 255, 257, 2000]), rng.choice([1, 1, 2, 4])
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    of = torch.tensor(levels)
    z = (torch.randn([rows, len(levels)], generator=generator) * 1.5).to(DTYPES[z_t])
    inputs, settings = {"z": z}, {"levels": ",".join(map(str, levels)), "bound": bound, "values_dtype": values_t,
                                  "codes_dtype": codes_t if of.prod() <= 65536 or codes_t != "u16" else "u32"}
    scales = torch.ones(1, len(levels))
    if quantizers > 1:
        scales = torch.stack([of.float() ** -q for q in range(quantizers)])
        inputs["scales"] = scales
    rest = z.double()
    if rng.random() < 0.4:
        clamp = 1 + 1 / (of.float() - 1)
        inputs["soft_clamp"] = clamp
        rest = (rest / clamp.double()).tanh() * clamp.double()
    what = f"{z_t}->{values_t} {rows} of {levels} {bound} {quantizers} quantizers"
    exit_code, outputs, error = program("fsq", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    basis = torch.cat([torch.ones(1, dtype=torch.int64), of.cumprod(0)[:-1]])
    index = outputs["indices"].long()
    if rows and (index.min() < 0 or index.max() >= of.prod()):
        return what, "an index is out of range", 0.0
    total = torch.zeros_like(rest)
    for q in range(quantizers):
        level = index[:, q, None].div(basis, rounding_mode="floor") % of
        exact = reference.fsq_level(rest / scales[q].double(), of, bound).clamp(torch.zeros(len(levels)).double(), of.double() - 1)
        # Where rounding decides, either level is right.
        if not ((exact - level).abs() <= 0.5 + 2e-5 / scales[q].double()).all():
            return what, f"levels of quantizer {q}", 0.0
        value = reference.fsq_value(level, of, bound) * scales[q].double()
        rest, total = rest - value, total + value
    info = torch.finfo(DTYPES[values_t])
    if not ((outputs["values"].double() - total).abs() <= info.eps / 2 * total.abs() + 1e-6).all():
        return what, "values differ", 0.0
    back_settings = {name: settings[name] for name in ("levels", "bound", "values_dtype")}
    back_inputs = {"indices": outputs["indices"]} | ({"scales": scales} if quantizers > 1 else {})
    exit_code, back, error = program("fsq", back_inputs, back_settings)
    if exit_code != 0:
        return what, f"back: exit code {exit_code}: {error}", 0.0
    return what, None if torch.equal(back["values"], outputs["values"]) else "back to other values", 0.0


def remap(program, number, rng):
    codes_t, out_t = ["u16", "u32", "i64"][number % 3], ["u16", "u32", "i64"][number // 3 % 3]
    count, entries = rng.choice([0, 1, 7, 680, 4096, 100003]), rng.choice([1, 5, 16384])
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    codes = torch.randint(0, entries, [count], generator=generator)
    table = torch.randint(0, 65536, [entries], generator=generator)
    beyond = count > 0 and rng.random() < 0.3
    if beyond:
        codes[rng.randrange(count)] = entries + rng.choice([0, 7])
    what = f"{codes_t}->{out_t} {count} of {entries}{' out of range' if beyond else ''}"
    inputs = {"codes": codes.to(DTYPES[codes_t]), "table": table.to(DTYPES[out_t])}
    exit_code, outputs, error = program("remap", inputs, {})
    if beyond and program.device == "host":
        return what, None if exit_code == 1 and "codes: code " in error else "not refused", 0.0
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    if not torch.equal(outputs["out"].long(), table[codes.clamp(0, entries - 1)]):
        return what, "labels differ", 0.0
    if program.device != "host" and outputs["flags"].tolist() != [int(beyond)]:
        return what, f"flags are {outputs['flags'].tolist()}", 0.0
    return what, None, 0.0


OPS = {"multi_scale": multi_scale, "multi_scale_encode": multi_scale_encode, "bits": bits, "fsq": fsq, "remap": remap}
