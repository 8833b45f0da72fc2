"""Random cases of RVQ encode for compare.py: metrics, layouts, data that 16-bit products cannot tell apart, all kernels."""

import itertools

import torch

from nextscale_ref import rvq_encode as reference

DTYPES = {
    "u16": torch.uint16,
    "u32": torch.uint32,
    "i64": torch.int64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
VARIANTS = ["portable", "hopper", "stream", "auto"]
DATA = ["gaussian", "clusters", "lattice"]


def same_bits(a, b):
    """Equality that tells -0 from 0 and knows NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    as_bytes = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return torch.equal(*as_bytes)


def rows_like(kind, shape, generator):
    if kind == "lattice":
        return torch.randint(-1, 2, shape, generator=generator).float()
    rows = torch.randn(shape, generator=generator)
    if kind == "clusters":
        centres = 3 * torch.randn([3, shape[-1]], generator=torch.Generator().manual_seed(shape[-1]))
        rows = centres[torch.randint(0, 3, shape[:-1], generator=generator)] + 1e-3 * rows
    return rows


def rvq_encode(program, number, rng):
    # Consecutive numbers walk all combinations: 13 and their number, 108, have no common divisor.
    combinations = list(itertools.product(VARIANTS, DATA, ["f32", "f16", "bf16"], ["u16", "u32", "i64"]))
    variant, data, in_t, codes_t = combinations[number * 13 % len(combinations)]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    emulated = program.device == "emulated"
    if program.device == "host" and variant in ("hopper", "stream"):
        # A host is no GPU with such kernels.
        variant = "auto"
    metric = rng.choice(["l2", "l2", "cosine_raw", "cosine_unit"])
    eps = rng.choice([1e-12, 1e-6, 0.5])
    dim = rng.choice([1, 8, 8, 32, 64, 127, 128, 256, rng.randint(1, 60)])
    entries = rng.choice([1, 127, 128, 129, 512, rng.randint(1, 600)])
    levels = rng.choice([1, 2, 3, 5])
    batch, rows = rng.choice([1, 1, 3]), rng.choice([0, 1, 5, 16, 63, 64, 65, rng.randint(1, 150)])
    if variant == "stream":
        rows = min(rows, 64)
    if emulated:
        dim, entries, rows, levels = min(dim, 64), min(entries, 300), min(rows, 70), min(levels, 3)
    shared, rows_first, channels_first = (rng.random() < 0.3 for _ in range(3))
    projected = rng.random() < 0.15
    width = dim
    if projected:
        dim, width, variant = min(dim, 32), rng.choice([16, 33, 64, 128]), "auto"

    books = rows_like(data, [1 if shared else levels, entries, dim], generator).to(DTYPES[in_t])
    if rng.random() < 0.3 and entries > 1:
        # One code twice, far apart.
        books[:, -1] = books[:, 0]
    x = rows_like(data, [batch, rows, width], generator)
    if not projected and rng.random() < 0.5 and rows > 2:
        x[:, 1] = books[0, rng.randrange(entries)].float()
        x[:, 2] = 0
    x = x.to(DTYPES[in_t])
    how, settings = {"metric": metric, "eps": eps}, {"metric": metric, "eps": eps, "variant": variant}
    settings |= {"levels": levels, "codes_dtype": codes_t, "filter": rng.choice(["auto", "bf16", "bf16x3"])}
    settings |= {"rows_first": str(rows_first).lower(), "channels_first": str(channels_first).lower()}
    inputs = {"codebooks": books[0] if shared else books, "input": x.transpose(1, 2) if channels_first else x}
    usage = {}
    if rng.random() < 0.2:
        usage = {"usage": torch.tensor([0, 0.25, 3, 1000])[torch.randint(0, 4, books.shape[:2], generator=generator)]}
        inputs["usage"] = usage["usage"][0] if shared else usage["usage"]
        settings["usage_eps"] = usage["usage_eps"] = 0.01
    projections = None
    if projected:
        shapes = [[levels, dim, width], [levels, dim], [levels, width, dim], [levels, width]]
        projections = [0.3 * torch.randn(shape, generator=generator) for shape in shapes]
        inputs |= dict(zip(["in_weight", "in_bias", "out_weight", "out_bias"], projections))
    if rng.random() < 0.2:
        source = inputs["codebooks"]
        inputs["codebooks"] = torch.cat([source, torch.full_like(source[..., :1, :], torch.nan)], -2)
        settings["padding_row"] = "true"

    what = (f"{in_t}->{codes_t} {variant} {data} {metric} {batch}x{rows}x{width} {levels} of {entries}x{dim}"
            f"{' shared' if shared else ''}{' projected' if projected else ''}{' average' if usage else ''}")
    exit_code, outputs, error = program("rvq_encode", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    want = reference.codebooks(books, usage=usage.get("usage"), usage_eps=usage.get("usage_eps", 1e-5), **how)
    flat = x.float().reshape(-1, width)
    codes, distances, quantized, residual = reference.rvq_encode(flat, want, levels, projections=projections, **how)

    def per_code(values):
        return values.view(levels, batch, rows).transpose(0, 1)

    def vectors(values):
        values = values.view(batch, rows, width).to(DTYPES[in_t])
        return values.transpose(1, 2) if channels_first else values

    got = outputs["codes"].long()
    got = got.transpose(1, 2) if rows_first else got
    if outputs["codes"].dtype != DTYPES[codes_t] or not torch.equal(got, per_code(codes)):
        return what, f"{(got != per_code(codes)).sum().item()} codes differ", 0.0
    counts = torch.stack([level.bincount(minlength=entries) for level in codes]).to(torch.int64)
    for name, values in [
        ("distances", per_code(distances)),
        ("quantized", vectors(quantized)),
        ("residual", vectors(residual)),
    ]:
        if not same_bits(outputs[name], values):
            return what, f"{name} differ from the f32-sequential reference", 0.0
    if not torch.equal(outputs["histogram"].long(), counts):
        return what, "histogram differs", 0.0
    if outputs["flags"].tolist() != [0]:
        return what, f"flags are {outputs['flags'].tolist()}", 0.0
    return what, None, 0.0
