"""Random cases of drift, select and compact for compare.py."""

import itertools

import torch

from nextscale_ref import keep
from nextscale_ref.dtypes import DTYPES

FLOATS = list(DTYPES)


def drift(program, number, rng):
    dtype, access = FLOATS[number % 3], ["auto", "narrow"][number // 3 % 2]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    chunks = rng.choice([0, 1, 2, 5])
    elements = rng.choice([1, 7, 8, 2048, 16383, 16384, 16385, 40000, rng.randint(1, 70000)])
    previous = torch.randn([chunks, elements], generator=generator).to(DTYPES[dtype])
    size = torch.rand([chunks, 1], generator=generator) * rng.choice([0.01, 0.1, 1])
    features = (previous.float() + size * torch.randn([chunks, elements], generator=generator)).to(DTYPES[dtype])
    accumulated = torch.rand([chunks], generator=generator) * 0.1
    steps = torch.randint(0, 8, [chunks], generator=generator, dtype=torch.int32)
    force = torch.tensor([rng.choice([0, 0, 0, 1, 2]) for _ in range(chunks)], dtype=torch.int32)
    polynomial = rng.choice([[], [], [0.5, 0.001], [49.0, -28.0, 5.5, 0.75, 0.25]])
    settings = {"threshold": rng.choice([0.01, 0.1, 0.3]), "eps": rng.choice([1e-8, 0.0]), "warmup": rng.choice([0, 3]),
                "compute_before": rng.choice([0, 1]), "compute_from": rng.choice([6, 100]), "access": access,
                "reset_forced": rng.choice(["true", "false"]), "keep": rng.choice(["true", "false"])}
    inputs = {"features": features, "previous": previous, "accumulated": accumulated, "steps": steps, "force": force}
    if polynomial:
        inputs["polynomial"] = torch.tensor(polynomial, dtype=torch.float32)
    what = f"{dtype} {access} {chunks} chunks of {elements}, {len(polynomial)} terms"
    code, out, error = program("drift", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0
    exact = keep.change(features, previous, settings["eps"])
    coefficients = inputs.get("polynomial", torch.zeros(0)).double().tolist()
    worst = 0.0
    for c in range(chunks):
        before, at = accumulated[c].item(), steps[c].item()
        kept = settings["keep"] == "true" and force[c] != keep.LEAVE
        if not torch.equal(out["previous"][c], (features if kept else previous)[c]):
            return what, f"chunk {c}: previous is not what was kept", 0.0
        got = {name: out[name][c].item() for name in ("decision", "change", "accumulated", "steps")}
        if force[c] == keep.LEAVE:
            if got["accumulated"] != before or got["steps"] != at or got["decision"] != -1:
                return what, f"chunk {c} was not left alone: {got}", 0.0
            continue
        if got["steps"] != at + 1:
            return what, f"chunk {c}: {got['steps']} steps after {at}", 0.0
        forced = force[c] == keep.COMPUTE or at < settings["compute_before"] or at >= settings["compute_from"]
        if forced or at < settings["warmup"]:
            want = before if forced and settings["reset_forced"] == "false" else 0.0
            if got["decision"] != 1 or got["accumulated"] != want or got["change"] == got["change"]:
                return what, f"chunk {c} was tested: {got}", 0.0
            continue
        share = abs(got["change"] - exact[c].item()) / (2e-6 * exact[c].item() + 1e-30)
        worst = max(worst, share)
        total = before + keep.rescaled(exact[c], coefficients).item()
        threshold = torch.tensor(settings["threshold"], dtype=torch.float32).item()
        size = sum(abs(a) for a in coefficients) + 1
        if abs(total - threshold) > 1e-5 * size and got["decision"] != int(not total < threshold):
            return what, f"chunk {c}: decision {got['decision']} at {total}", worst
        want = 0.0 if got["decision"] else total
        if abs(got["accumulated"] - want) > 1e-5 * size:
            return what, f"chunk {c}: accumulated {got['accumulated']} instead of {want}", worst
    return what, None if worst <= 1 else "the change is off", worst


def select(program, number, rng):
    scope = ["head", "set", "shared", "ada"][number % 4]
    kind = ["both", "importance", "redundancy"][number // 4 % 3]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    sets, heads = rng.choice([1, 2, 3]), rng.choice([1, 2, 5])
    tokens = rng.choice([1, 2, 127, 128, 129, 500, 2050, 9000, rng.randint(1, 3000)])
    block = 1 if scope == "ada" else rng.choice([1, 1, 1, 7, 64])
    shape = [sets, heads, tokens]
    ties = rng.random() < 0.4
    scores = {}
    for name in ["importance", "redundancy"]:
        if kind in ("both", name):
            x = torch.randn(shape, generator=generator).exp() / tokens
            # Multiples of 1/64: every sum is exact, and many are equal.
            scores[name] = torch.randint(-20, 20, shape, generator=generator) / 64.0 if ties else x
            if rng.random() < 0.15:
                holes = torch.rand(shape, generator=generator) < 0.1
                scores[name] = scores[name].masked_fill(holes, float("nan"))
    lists = {"head": sets * heads, "set": sets, "shared": 1, "ada": sets * heads}[scope]
    budget = rng.choice([0, 1, tokens // 2, tokens - 1, tokens, tokens + 9])
    sink, recent, active = rng.choice([0, 0, 4]), rng.choice([0, 0, 30]), rng.choice([0, 0, 11])
    exact = ties and (scope not in ("set", "shared") or heads in (1, 2)) and block in (1, 64)
    relative = rng.random() < 0.3 and scope != "ada"
    weighting = rng.choice(["none", "exponential", "polynomial", "upper_convex", "gaussian"]) if relative else "none"
    lam = 0.5 if ties else 0.07
    tie = rng.choice(["oldest", "newest"])
    settings = {"scope": scope, "budget": budget, "sink": sink, "recent": recent, "active": active, "block": block,
                "lambda": lam, "relative": str(relative).lower(), "weighting": weighting, "tie": tie}
    if number % 3 == 1:
        settings["shared_bytes"] = 16384
    inputs = dict(scores)
    lengths, budgets = [tokens] * lists, [budget] * lists
    if rng.random() < 0.4:
        lengths = [rng.randint(0, tokens) for _ in range(lists)]
        inputs["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    if rng.random() < 0.4:
        budgets = [rng.randint(0, tokens) for _ in range(lists)]
        inputs["budgets"] = torch.tensor(budgets, dtype=torch.int32)
        settings["capacity"] = tokens + active
    floor = rng.choice([0.0, 0.25, 1.0])
    if scope == "ada":
        settings["floor"] = floor
    what = f"{scope} {kind} {sets}x{heads}x{tokens}, {budget} of them in blocks of {block}{', ties' if ties else ''}"
    code, out, error = program("select", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0

    raw = keep.raw_scores(scores.get("importance"), scores.get("redundancy"), lam, scope)
    weights = keep.position_weight(weighting, -(-tokens // block))
    quotas = [keep.quota(lengths[i], budgets[i], sink, recent, block) for i in range(lists)]
    counts = out["counts"].tolist()
    if scope == "ada" and exact:
        for first in range(0, lists, heads):
            of_set = slice(first, first + heads)
            split = keep.split_ada(raw[of_set], quotas[of_set], floor, tie == "newest")
            # What a head wins is its budget: where that protects more than its own did, so be it.
            won = [a + b + count for count, (a, b, _, _) in zip(split, quotas[of_set])]
            quotas[of_set] = [keep.quota(length, n, sink, recent) for length, n in zip(lengths[of_set], won)]
    elif scope == "ada":
        for first in range(0, lists, heads):
            of_set = slice(first, first + heads)
            total = sum(a + b + kept + active for a, b, kept, _ in quotas[of_set])
            if sum(counts[of_set]) != total:
                return what, f"{sum(counts[of_set])} tokens in a set instead of {total}", 0.0
            quotas[of_set] = [keep.quota(length, count - active, sink, recent)
                              for length, count in zip(lengths[of_set], counts[of_set])]
    worst = 0.0
    for i, (first, last, kept, items) in enumerate(quotas):
        got = out["indices"][i].tolist()
        if any(x != -1 for x in got[counts[i] :]):
            return what, f"list {i}: more than {counts[i]} indices", worst
        got = got[: counts[i]]
        if active and got[len(got) - active :] != list(range(lengths[i], lengths[i] + active)):
            return what, f"list {i}: active tokens are missing", worst
        got = got[: len(got) - active]
        row = keep.block_scores(raw[i], lengths[i], block)
        candidates = list(range(first, items - last))
        finite = [x for x in row[first : items - last].tolist() if x == x and abs(x) != float("inf")]
        least = min(finite, default=0.0)
        final = (row - least if relative else row) * weights[:items]
        has_nan = bool(final[first : items - last].isnan().any())
        if bool(out["status"][i].item() & keep.NAN) != has_nan:
            return what, f"list {i}: status {out['status'][i].item()}", worst
        if exact and weighting == "none":
            chosen = sorted(candidates[j] for j in keep.order(final[first : items - last], tie == "newest")[:kept])
            want = keep.tokens_of([*range(first), *chosen, *range(items - last, items)], block, lengths[i])
            if got != want:
                return what, f"list {i}: {got[:20]} instead of {want[:20]}", worst
            continue
        if sorted(set(got)) != got:
            return what, f"list {i}: indices do not ascend", worst
        chosen = sorted({token // block for token in got})
        protected = [*range(first), *range(items - last, items)]
        if keep.tokens_of(chosen, block, lengths[i]) != got or not set(protected) <= set(chosen):
            return what, f"list {i}: blocks or protected ranges are torn", worst
        if len(chosen) != first + last + kept:
            return what, f"list {i}: {len(chosen)} items instead of {first + last + kept}", worst
        values = final.nan_to_num(nan=float("-inf")).tolist()
        in_list = set(chosen)
        lowest = min((values[j] for j in candidates if j in in_list), default=float("inf"))
        highest = max((values[j] for j in candidates if j not in in_list), default=float("-inf"))
        if highest > float("-inf") and lowest < float("inf"):
            # Rounding of scores of the list's size.
            size = max(abs(x) for x in values if abs(x) != float("inf")) + abs(least)
            worst = max(worst, (highest - lowest) / (4e-6 * size + 1e-30) if highest > lowest else 0.0)
    return what, None if worst <= 1 else "a dropped score is above a kept one", worst


def compact(program, number, rng):
    combinations = list(itertools.product(["auto", "narrow", "wide"], FLOATS, FLOATS))
    access, in_t, out_t = combinations[number * 10 % len(combinations)]
    in_place = rng.random() < 0.3
    out_t = in_t if in_place else out_t
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    sets, heads, tokens = rng.choice([1, 2]), rng.choice([1, 3, 8]), rng.choice([1, 5, 64, 300, rng.randint(1, 700)])
    kept = rng.choice([0, 1, tokens // 2, tokens])
    turned = rng.random() < 0.4
    dim = rng.choice([8, 64, 128, 256]) if access == "wide" else rng.choice([2, 6, 64, 80, 128])
    its = dim if access == "wide" else rng.choice([2, 10, 128])
    k = torch.randn([sets, tokens, heads, dim], generator=generator).to(DTYPES[in_t])
    v = torch.randn([sets, tokens, heads, its], generator=generator).to(DTYPES[in_t])
    lists = [torch.randperm(tokens, generator=generator)[:kept].sort().values for _ in range(sets * heads)]
    indices = torch.stack(lists).view(sets, heads, kept).int()
    counts = torch.randint(0, kept + 1, [sets, heads], generator=generator, dtype=torch.int32)
    positions = torch.randint(0, 900, [sets, heads, tokens], generator=generator, dtype=torch.int32)
    norms = torch.rand([sets, heads, tokens], generator=generator)
    inputs = {"k": k, "v": v, "indices": indices, "counts": counts, "positions": positions, "norms": norms}
    settings = {"out_dtype": out_t, "access": access, "in_place": str(in_place).lower()}
    half = rng.random() < 0.5
    if turned:
        rotary = dim if access == "wide" or rng.random() < 0.5 else max(2, dim // 4 * 2)
        frequencies = 100.0 ** -(torch.arange(rotary // 2, dtype=torch.float64) / (rotary // 2))
        angles = torch.arange(2000, dtype=torch.float64)[:, None] * frequencies
        inputs |= {"cos": angles.cos().float(), "sin": angles.sin().float()}
        settings |= {"renumber": rng.randint(0, 50), "pairs": "half" if half else "interleaved"}
    what = (f"{in_t}->{out_t} {access} {sets}x{tokens}x{heads}x{dim}, {kept} kept{' in place' if in_place else ''}"
            f"{' turned' if turned else ''}")
    code, out, error = program("compact", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0
    if out["flags"].tolist() != [0]:
        return what, f"flags are {out['flags'].tolist()}", 0.0
    worst, by_row = 0.0, lambda x: x.transpose(1, 2)
    old = keep.compact(by_row(positions), indices)
    new = old if not turned else (settings["renumber"] + torch.arange(kept))[None, :, None].expand_as(old).int()
    exact_k = keep.compact(k.double(), indices)
    if turned:
        exact_k = keep.turn(exact_k, new - old, frequencies, half)
    wants = {"k": exact_k, "v": keep.compact(v.double(), indices), "positions": by_row(new),
             "norms": by_row(keep.compact(by_row(norms), indices))}
    live = torch.arange(kept)[None, :, None] < counts[:, None, :]
    for name, want in wants.items():
        got = out[name]
        if name in ("positions", "norms"):
            if not torch.equal(by_row(got)[:, :kept][live], by_row(want)[live].to(got.dtype)):
                return what, f"{name} did not move along", worst
            continue
        got, want = got[:, :kept][live], want[live]
        if name == "k" and turned:
            scale = torch.finfo(DTYPES[out_t]).eps
            bound = scale * want.abs().clamp(min=1e-2) + 1e-5
            worst = max(worst, ((got.double() - want).abs() / bound).max().item() if got.numel() else 0.0)
        elif not torch.equal(got, want.to(DTYPES[in_t]).to(DTYPES[out_t])):
            return what, f"{name} is not the gather", worst
    return what, None if worst <= 1 else "turned keys are off", worst


OPS = {"drift": drift, "select": select, "compact": compact}
