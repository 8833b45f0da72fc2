"""Random cases of importance, key norms and redundancy for compare.py."""

import itertools

import torch

from nextscale_ref import importance as reference
from nextscale_ref.dtypes import DTYPES

AGGREGATIONS = ["max_logit", "mean_prob", "max_prob", "logit"]


def share_of(difference, bound):
    return torch.where(bound > 0, difference / bound, 0).max().item() if difference.numel() else 0.0


def types_of(program):
    return ["f16", "bf16", "f32"] if program.device == "host" else ["f16", "bf16"]


def lengths_of(sets, heads, tokens, rng, generator):
    if rng.random() < 0.5:
        return None
    return torch.randint(-1, tokens + 3, [sets, heads], generator=generator, dtype=torch.int32)


def importance(program, number, rng):
    types = types_of(program)
    combinations = list(itertools.product(AGGREGATIONS, types, ["none", "max", "average"], [64, 96, 128]))
    # 37 has no divisor in common with their number.
    aggregation, dtype, pool, dim = combinations[number * 37 % len(combinations)]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    slow = program.device == "emulated"
    sets, heads, groups = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 1, 2, 3, 4, 8])
    tokens = rng.choice([1, 63, 64, 65, 255, 256, 257, rng.randint(1, 300 if slow else 5000)])
    queries = rng.choice([1, 8, 16, 32, 50, 65, rng.randint(1, 40 if slow else 700)])
    how = dict(aggregation=aggregation, reduction=rng.choice(["mean", "sum"]), causal=rng.random() < 0.4, pool=pool)
    how |= dict(excluded=rng.choice([0, 0, 8]), unscored=rng.choice([0, 0, 32]), pool_width=rng.choice([1, 3, 5, 7, 63]))
    if rng.random() < 0.2:
        how["scale"] = 0.25
    settings = how | {"causal": str(how["causal"]).lower(), "variant": rng.choice(["auto", "portable"])}
    spread = rng.choice([0.2, 1.0, 4.0])
    listed = rng.random() < 0.25
    q = (torch.randn([sets, queries + 20 * listed, heads * groups, dim], generator=generator) * spread).to(DTYPES[dtype])
    k = torch.randn([sets, tokens, heads, dim], generator=generator).to(DTYPES[dtype])
    inputs = {"q": q, "k": k}
    if listed:
        inputs["rows"] = torch.randint(-1, q.shape[1] + 1, [queries], generator=generator, dtype=torch.int32)
        q = q[:, inputs["rows"].long().clamp(0, q.shape[1] - 1)]
    lengths = lengths_of(sets, heads, tokens, rng, generator)
    if lengths is not None:
        inputs["lengths"] = lengths
    masked = old = None
    if rng.random() < 0.2:
        masked = inputs["masked"] = torch.randint(-2, tokens + 2, [16], generator=generator, dtype=torch.int32)
    elif rng.random() < 0.3:
        old = inputs["old_scores"] = torch.rand([sets, heads, tokens], generator=generator)
    if aggregation in ("mean_prob", "max_prob") and rng.random() < 0.4:
        inputs["lse"] = reference.lse(q, k, causal=how["causal"], excluded=how["excluded"], scale=how.get("scale"),
                                      lengths=lengths)
    nan = rng.random() < 0.1
    if nan:
        k[rng.randrange(sets), rng.randrange(tokens), rng.randrange(heads), rng.randrange(dim)] = torch.nan
        inputs.pop("lse", None)

    what = (f"{dtype} {aggregation} {how['reduction']} {sets}x{heads}x{groups} d{dim} {queries} on {tokens} pool {pool}"
            f"{' causal' if how['causal'] else ''}{' lse' if 'lse' in inputs else ''}{' listed' if listed else ''}"
            f"{' masked' if masked is not None else ''}{' accumulated' if old is not None else ''}{' nan' if nan else ''}")
    code, outputs, error = program("importance", inputs, settings, repeat=2 if number % 5 == 0 and old is None else 1)
    if code != 0:
        return what, f"exit code {code}: {error}", 0.0
    want, bound = reference.importance(q, k, **how, lengths=lengths, masked=masked, old=old)
    got = outputs["scores"].double()
    # Of a NaN only whether it is one.
    same = (got == want) | (got.isnan() & want.isnan())
    difference = torch.where(same, 0, (got - want).abs())
    if not (difference <= bound.nan_to_num(0)).all():
        return what, f"outside the bound around the f64 reference: {(~(difference <= bound)).sum().item()} scores", 0.0
    return what, None, share_of(difference, bound)


def key_norms(program, number, rng):
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    dtype, dim = types_of(program)[number % len(types_of(program))], [64, 96, 128][number // 3 % 3]
    sets, heads, tokens = rng.choice([1, 3]), rng.choice([1, 2, 5]), rng.choice([1, 63, 64, 65, rng.randint(1, 6000)])
    k = torch.randn([sets, tokens, heads, dim], generator=generator)
    k = (k * 10 ** (torch.rand([sets, tokens, heads, 1], generator=generator) * 2 - 1)).to(DTYPES[dtype])
    k[:, torch.rand(tokens, generator=generator) < 0.1] = 0
    inputs = {"k": k}
    lengths = lengths_of(sets, heads, tokens, rng, generator)
    if lengths is not None:
        inputs["lengths"] = lengths
    if old := rng.random() < 0.4:
        inputs["old_unit_sum"] = torch.randn([sets, heads, dim], generator=generator)
    what = f"{dtype} {sets}x{heads} d{dim} {tokens}{' lengths' if lengths is not None else ''}{' accumulated' if old else ''}"
    code, outputs, error = program("key_norms", inputs, {}, repeat=2 if number % 5 == 0 and not old else 1)
    if code != 0:
        return what, f"exit code {code}: {error}", 0.0
    unit, inverse = reference.units(k.double())
    there = torch.arange(tokens)[None, :, None] < (torch.full([sets, 1, heads], tokens) if lengths is None
                                                   else lengths[:, None])
    want = torch.where(there, inverse, 0).transpose(1, 2)
    total = (unit * there[..., None]).sum(1) + (inputs["old_unit_sum"].double() if old else 0)
    norms = (outputs["inverse_norms"].double() - want).abs()
    sums = (outputs["unit_sum"].double() - total).abs()
    if not (norms <= want * 2.0**-17).all():
        return what, "norms outside the bound around the f64 reference", 0.0
    if not (sums <= (tokens + 1) * 2.0**-17).all():
        return what, "sums outside the bound around the f64 reference", 0.0
    return what, None, share_of(sums, torch.full_like(sums, (tokens + 1) * 2.0**-17))


def redundancy(program, number, rng):
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    combinations = list(itertools.product(["cosine", "softmax", "similar", "similar"], types_of(program), [64, 96, 128]))
    form, dtype, dim = combinations[number * 7 % len(combinations)]
    slow = program.device == "emulated"
    sets, heads = rng.choice([1, 2]), rng.choice([1, 2])
    tokens = rng.choice([1, 63, 64, 65, 129, rng.randint(1, 200 if slow else 1500)])
    clusters = torch.randn([rng.choice([1, 20, tokens]), dim], generator=generator)
    k = clusters[torch.randint(0, len(clusters), [sets, tokens, heads], generator=generator)]
    k = (k + torch.randn(k.shape, generator=generator) * rng.choice([0.1, 0.8])).to(DTYPES[dtype])
    lengths = lengths_of(sets, heads, tokens, rng, generator)
    unit, inverse = reference.units(k.double())
    there = torch.arange(tokens)[None, :, None] < (torch.full([sets, 1, heads], tokens) if lengths is None
                                                   else lengths[:, None])
    inputs = {"k": k, "inverse_norms": torch.where(there, inverse, 0).transpose(1, 2).float(),
              "unit_sum": (unit * there[..., None]).sum(1).float()}
    if lengths is not None:
        inputs["lengths"] = lengths
    retain, lonely = rng.choice(["last", "last", "first", "zero", "first_percent"]), rng.random() < 0.7
    ratio = rng.choice([0.1, 0.2, 0.97])
    threshold = 0.5
    # [set][head]: unit keys
    items = [[unit[s, : int(there[s, :, h].sum()), h] for h in range(heads)] for s in range(sets)]
    cosines = [[(u @ u.T).fill_diagonal_(0) for u in of] for of in items]
    while any(((c - threshold).abs() < 3e-6).any() for of in cosines for c in of):
        threshold += 1e-5
    settings = {"form": form}
    if form == "similar":
        settings |= {"threshold": threshold, "retain": retain, "ratio": ratio, "lonely_leave_first": str(lonely).lower()}
    what = f"{dtype} {form} {retain if form == 'similar' else ''} {sets}x{heads} d{dim} {tokens}"
    code, outputs, error = program("redundancy", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if code != 0:
        return what, f"exit code {code}: {error}", 0.0
    want = torch.zeros(sets, heads, tokens, dtype=torch.float64)
    for s, h in itertools.product(range(sets), range(heads)):
        u = items[s][h]
        n = len(u)
        if n == 0:
            continue
        if form == "similar":
            threshold32 = torch.tensor(threshold, dtype=torch.float32).double()
            want[s, h, :n] = reference.similar(cosines[s][h], threshold32, retain, ratio, lonely)
        elif form == "softmax":
            want[s, h, :n] = (u @ u.mean(0)).softmax(-1)
        else:
            want[s, h, :n] = u @ (u.sum(0) / u.sum(0).norm())
    difference = (outputs["scores"].double() - want).abs()
    bound = torch.full_like(want, 2.0**-15) if form == "cosine" else want * 2.0**-14
    if not (difference <= bound).all():
        return what, f"outside the bound around the f64 reference: {(difference > bound).sum().item()} scores", 0.0
    return what, None, share_of(difference, bound)


OPS = {"importance": importance, "key_norms": key_norms, "redundancy": redundancy}
