"""Random cases of packing for compare.py: what is packed is held, code by code, against the formulas in PyTorch."""

import itertools

import torch

from nextscale_ref import packing
from nextscale_ref.dtypes import DTYPES

FORMATS = [("fp8", 8, None), ("int8", 8, None), ("uniform", 4, None), ("uniform", 2, 32), ("uniform", 3, None),
           ("uniform", 8, 64), ("channel", 2, 32), ("channel", 4, 64), ("channel", 3, 128), ("lloyd_max", 2, None),
           ("lloyd_max", 3, None), ("lloyd_max", 4, None)]


def case_of(number, rng):
    combinations = list(itertools.product(FORMATS, ["f32", "f16", "bf16"], ["auto", "narrow"]))
    (fmt, bits, group), dtype, access = combinations[number * 29 % len(combinations)]
    dim = rng.choice([64, 96, 128, 256, 72])
    if group and fmt == "uniform" and dim % group:
        dim = 128
    sets, heads, tokens = rng.choice([1, 2]), rng.choice([1, 3, 4]), rng.choice([1, 17, rng.randint(1, 150)])
    kept = rng.choice([None, rng.randint(1, 100)])
    if fmt == "channel":
        tokens = -(-tokens // group) * group
        kept = kept and -(-kept // group) * group
    scaled = fmt in ("fp8", "int8")
    given = scaled and rng.random() < 0.25
    return {
        "fmt": fmt, "bits": bits, "group": group, "dtype": dtype, "access": access, "dim": dim, "sets": sets, "heads": heads,
        "tokens": tokens, "kept": kept, "given": given, "numbers": "f32" if scaled else rng.choice(["f32", "f16"]),
        "inline": fmt != "channel" and not given and not (group and fmt == "uniform" and group != dim) and rng.random() < 0.4,
        "rotation": None if fmt == "channel" else rng.choice([None, "hadamard", rng.getrandbits(40)]),
        "wild": rng.random() < 0.2, "renormalize": rng.random() < 0.5,
    }


def settings_of(case):
    settings = {"format": case["fmt"], "bits": case["bits"], "access": case["access"], "numbers_dtype": case["numbers"],
                "inline": str(case["inline"]).lower(), "renormalize": str(case["renormalize"]).lower(),
                "rotation": case["rotation"] if case["rotation"] is not None else "none"}
    return settings | ({"group": case["group"]} if case["group"] else {})


def make(program, number, rng):
    case = case_of(number, rng)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    sets, tokens, heads, dim = (case[k] for k in ("sets", "tokens", "heads", "dim"))
    x = torch.randn([sets, tokens, heads, dim], generator=generator) * torch.rand([dim], generator=generator).exp() ** 2
    if case["wild"]:
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
        pick = torch.randint(0, 40, x.shape, generator=generator)
        x = torch.where(pick < 4, special[pick.clamp_max(3)], x)
    x = x.to(DTYPES[case["dtype"]])
    inputs = {"input": x}
    rows = x
    if case["kept"]:
        kept = torch.randint(0, tokens, [sets, heads, case["kept"]], generator=generator).sort(-1).values
        inputs["kept"] = kept.to(torch.int32)
        rows = x.gather(1, kept.transpose(1, 2)[..., None].expand(-1, -1, -1, dim))
    if case["given"]:
        inputs["scales"] = 0.01 + torch.rand([sets, heads], generator=generator) / 30
    what = (f"{case['fmt']}{case['bits']} {case['group'] or ''} {case['dtype']}/{case['numbers']} {case['access']} "
            f"{tuple(rows.shape)}{' kept' if case['kept'] else ''}{' inline' if case['inline'] else ''}"
            f"{' given' if case['given'] else ''}{' rotated' if case['rotation'] is not None else ''}"
            f"{' wild' if case['wild'] else ''}")
    return case, inputs, rows, what, program("pack", inputs, settings_of(case), repeat=2 if number % 5 == 0 else 1)


def numbers_of(case, outputs, inputs, rows):
    """scale, or scale and min, or norm, each broadcast to a row's elements."""
    dim, n = case["dim"], 2 if case["fmt"] in ("uniform", "channel") else 1
    if case["given"]:
        return [inputs["scales"][:, None, :, None]]
    if case["inline"]:
        first = -(-dim * case["bits"] // 128) * 16
        dtype = DTYPES[case["numbers"]]
        raw = outputs["codes"][..., first : first + n * dtype.itemsize].contiguous().view(dtype)
        if outputs["codes"][..., first + n * dtype.itemsize :].any():
            raise ValueError("the rest of a slot is not 0")
    else:
        raw = outputs["numbers"]
    if raw.dtype != DTYPES[case["numbers"]]:
        raise ValueError(f"numbers are {raw.dtype}")
    raw = raw.float()
    if case["fmt"] == "channel":
        raw = raw.unflatten(-1, (dim, 2)).repeat_interleave(case["group"], 1)
        return [raw[..., 0], raw[..., 1]]
    raw = raw.unflatten(-1, (-1, n)).repeat_interleave(dim // (raw.shape[-1] // n), -2)
    return [raw[..., i] for i in range(n)]


def turned_of(case, rows):
    """What is quantized, f64."""
    x = rows.double()
    if case["fmt"] == "channel":
        x = packing.tamed(x.unflatten(1, (-1, case["group"])), 2).flatten(1, 2)
    else:
        x = packing.tamed(x, -1)
    if case["rotation"] is None:
        return x
    return x @ packing.rotation(case["dim"], None if case["rotation"] == "hadamard" else case["rotation"]).T


def pack(program, number, rng):
    case, inputs, rows, what, (exit_code, outputs, error) = make(program, number, rng)
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    bits, dim, fmt = case["bits"], case["dim"], case["fmt"]
    x = turned_of(case, rows)
    wild = not (rows.float().abs() < packing.BEYOND).all()
    if outputs["flags"].tolist() != [int(wild)]:
        return what, f"flags are {outputs['flags'].tolist()}", 0.0
    codes = packing.codes_of(outputs["codes"], bits, dim)
    numbers = numbers_of(case, outputs, inputs, rows)

    # Unrotated, codes and numbers are the f32 formulas' bit for bit.
    if case["rotation"] is None and fmt != "lloyd_max":
        plain, dtype = x.float(), DTYPES[case["numbers"]]
        if fmt in ("fp8", "int8"):
            want, scale = packing.scaled(plain, fmt == "fp8", numbers[0] if case["given"] else None)
            exact = [scale]
        elif fmt == "channel":
            want, *exact = packing.uniform(plain.unflatten(1, (-1, case["group"])), bits, 2, dtype)
            want, exact = want.flatten(1, 2), [e.expand(-1, -1, case["group"], -1, -1).flatten(1, 2) for e in exact]
        else:
            group = case["group"] or dim
            want, *exact = packing.uniform(plain.unflatten(-1, (-1, group)), bits, -1, dtype)
            want, exact = want.flatten(-2), [e.expand(*e.shape[:-1], group).flatten(-2) for e in exact]
        if not torch.equal(codes, want.long()):
            return what, f"{(codes != want).sum().item()} codes differ from the f32 formula", 0.0
        for got, one in zip(numbers, exact):
            if not torch.equal(got.expand(x.shape), one.expand(x.shape)):
                return what, "numbers differ from the f32 formula", 0.0

    # And in any case the values lie within the stated bounds of what was packed.
    got = packing.values(fmt, codes, numbers, bits, dim)
    slop = x.abs().amax(-1, keepdim=True) * dim * 2.0**-22
    f16 = 2.0**-11 if case["numbers"] == "f16" else 0.0
    if fmt == "lloyd_max":
        norm = x.norm(dim=-1, keepdim=True)
        u, table = x * dim**0.5 / norm.clamp_min(1e-30), packing.centroids(bits)
        nearest = (u[..., None] - table).abs().amin(-1)
        worst = ((u - table[codes]).abs() - nearest).max().item()
        want = norm
        if case["renormalize"]:
            want = norm * dim**0.5 / table[codes].norm(dim=-1, keepdim=True)
        off = ((numbers[0].double() - want).abs() - want * (f16 + 1e-5)).max().item()
        return what, None if worst < 1e-4 and off <= 1e-7 else f"nearest missed by {worst}, norm by {off}", 0.0
    scale = numbers[0].double()
    if fmt == "fp8":
        bound = torch.maximum(x.abs() / 16, scale / 1024)
        reach = scale * 448
    else:
        bound = scale / 2
        reach = scale * 127 if fmt == "int8" else torch.full_like(scale, torch.inf)
    if fmt in ("uniform", "channel"):
        bound = bound + f16 * ((2**bits - 1) * scale + numbers[1].double().abs()) + (2.0**-24 * 2**bits if f16 else 0)
    bound = bound * (1 + 2.0**-7) + slop + 1e-37
    inside = x.abs() <= reach if case["given"] else torch.ones_like(x, dtype=torch.bool)
    share = torch.where(inside, (got - x).abs() / bound, 0).max().item()
    return what, None if share <= 1 else "beyond the stated bound", share


def unpack(program, number, rng):
    case, inputs, rows, what, (exit_code, outputs, error) = make(program, number, rng)
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    to = rng.choice(["f32", "f16", "bf16"])
    packed = {name: outputs[name] for name in ("codes", "numbers") if name in outputs}
    if case["given"]:
        packed["scales"] = inputs["scales"]
    settings = settings_of(case) | {"dim": case["dim"], "dtype": to}
    exit_code, restored, error = program("unpack", packed, settings)
    what = f"{what} to {to}"
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    codes = packing.codes_of(outputs["codes"], case["bits"], case["dim"])
    want = packing.values(case["fmt"], codes, numbers_of(case, outputs, inputs, rows), case["bits"], case["dim"])
    slop = want.abs().amax(-1, keepdim=True) * case["dim"] * 2.0**-22
    if case["rotation"] is not None:
        want = want @ packing.rotation(case["dim"], None if case["rotation"] == "hadamard" else case["rotation"])
    got = restored["out"]
    if got.dtype != DTYPES[to] or got.shape != want.shape:
        return what, f"{got.dtype} {tuple(got.shape)}", 0.0
    rounding = torch.maximum(want.abs() * torch.finfo(DTYPES[to]).eps / 2, torch.tensor(2.0**-25 if to == "f16" else 1e-38))
    beyond = (want.abs() > 65000) if to == "f16" else torch.zeros_like(want, dtype=torch.bool)
    share = torch.where(beyond, 0, (got.double() - want).abs() / (rounding * 1.01 + slop)).max().item()
    return what, None if share <= 1 else "is not what the bytes say", share


def rotate(program, number, rng):
    dtype = ["f32", "f16", "bf16"][number % 3]
    shape = [rng.choice([1, 3]), rng.choice([0, 1, 33, rng.randint(1, 100)]), rng.choice([1, 4]),
             rng.choice([64, 96, 128, 256, 8, 72])]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    x = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    seed, inverse = rng.choice([None, rng.getrandbits(50)]), rng.random() < 0.5
    settings = {"rotation": "hadamard" if seed is None else seed, "inverse": str(inverse).lower()}
    what = f"{dtype} {shape} {'back' if inverse else ''}"
    exit_code, outputs, error = program("rotate", {"input": x}, settings, repeat=2 if number % 5 == 0 else 1)
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    matrix = packing.rotation(shape[-1], seed)
    want = x.double() @ (matrix if inverse else matrix.T)
    if want.numel() == 0:
        return what, None, 0.0
    bound = want.abs() * torch.finfo(DTYPES[dtype]).eps / 2 * 1.01 + 1e-5
    share = ((outputs["out"].double() - want).abs() / bound).max().item()
    return what, None if share <= 1 else "beyond the bound", share


OPS = {"pack": pack, "unpack": unpack, "rotate": rotate}
