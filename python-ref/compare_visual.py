"""Random cases of the visual rules for compare.py. A decision that was close in f64 is not compared."""

import torch

from nextscale_ref import verification, visual

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FLOATS = list(DTYPES)
RULES = [visual.LANTERN, visual.LANTERN, visual.GROUPED, visual.JACOBI]
REDRAFTS = ["none", "independent", "maximal", "gumbel"]
# Closer than this, f32 may decide otherwise than f64.
CLOSE = 1e-4


def visual_verify(program, number, rng):
    kind, dtype, redraft = number % 4, FLOATS[number // 4 % 3], REDRAFTS[number // 12 % 4]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))

    def random(*shape):
        return torch.rand(shape, generator=generator)

    vocab = rng.choice([2, 7, 33, 64, 1000, 1025, rng.randint(2, 2500)])
    batch, most = rng.choice([0, 1, 2, 4]), rng.choice([0, 1, 2, 4])
    counts = [rng.randint(0, most + 1) for _ in range(batch)]
    cu_rows = [0]
    for count in counts:
        cu_rows.append(cu_rows[-1] + count)
    rows = batch * (most + 1)
    codes = (vocab // 4, max(vocab // 2, 1)) if rng.random() < 0.3 else (0, vocab)
    rule = {"rule": RULES[kind], "first_code": codes[0], "codes": codes[1]}
    settings = rule | {"redraft": redraft, "fallback": -7}
    target = (random(rows, vocab) * 6 - 3).to(DTYPES[dtype])
    inputs = {"target": target, "cu_rows": torch.tensor(cu_rows, dtype=torch.int32)}
    temperature = torch.tensor([rng.choice([1.0, 0.7, 1.5, 0.0]) for _ in range(batch)])
    inputs["temperature"] = temperature
    sampling = [(t, 0, 1.0, 0.0) for t in temperature.tolist()]
    if rng.random() < 0.3:
        top_k = torch.tensor([rng.choice([0, 1, 5, 40]) for _ in range(batch)], dtype=torch.int32)
        top_p = torch.tensor([rng.choice([1.0, 0.9, 0.5]) for _ in range(batch)])
        min_p = torch.tensor([rng.choice([0.0, 0.05, 0.3]) for _ in range(batch)])
        inputs |= {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampling = list(zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist()))
    guidance = None
    mixed = target.float()
    if rng.random() < 0.4 and batch:
        guidance = torch.tensor([rng.choice([1.0, 3.0, 1.5]) for _ in range(batch)])
        free = (random(rows, vocab) * 6 - 3).to(DTYPES[dtype])
        inputs |= {"target_free": free, "guidance": guidance}
        of_rows = torch.ones(rows)
        for b in range(batch):
            of_rows[cu_rows[b] : cu_rows[b + 1]] = guidance[b]
        mixed = visual.guided(target, free, of_rows[:, None].double())

    with_q = rng.random() < 0.7
    drafts = torch.full([batch, most + 1], -1, dtype=torch.int32)
    flat = drafts.view(-1)
    draft = (random(max(batch * most, 1), vocab) * 6 - 3).to(DTYPES[dtype])
    draft_free = (random(max(batch * most, 1), vocab) * 6 - 3).to(DTYPES[dtype])
    of_draft = draft.float()
    if guidance is not None and most:
        each = guidance.repeat_interleave(most)[:, None].double()
        of_draft = visual.guided(draft, draft_free, each)
    for b, count in enumerate(counts):
        for i in range(count - 1):
            p = (of_draft[b * most + i] / max(sampling[b][0], 0.1)).softmax(0)
            flat[cu_rows[b] + i] = int(torch.multinomial(p, 1, generator=generator))
            if rng.random() < 0.05:
                flat[cu_rows[b] + i] = rng.choice([-1, vocab])
    inputs["drafts"] = drafts
    if with_q:
        inputs["draft"] = draft
        if guidance is not None:
            inputs["draft_free"] = draft_free
    tables = {}
    if kind < 2:
        few = min(codes[1], 60)
        rule |= {"accumulated": rng.randint(0, few), "zeroed": rng.randint(0, few)}
        # As f32, as the op takes it.
        rule["bound"] = torch.tensor(rng.uniform(0.01, 0.5) + (1.5 if kind else 0.0)).item()
        width = max(rule["accumulated"], rule["zeroed"])
        ids = (torch.arange(codes[1])[:, None] + torch.arange(1, width + 1)) % codes[1]
        ids = ids.masked_fill(random(*ids.shape) < 0.03, -1)
        small = rng.random() < 0.5
        # -1 as 16 bits is no code either.
        inputs["neighbours"] = (ids % 65536).to(torch.uint16) if small else ids.to(torch.int32)
        tables["neighbours"] = ids
    elif kind == 2:
        rule |= {"below": rng.randint(0, 15), "above": rng.randint(0, 15), "distance": 0.5}
        rule["probability_gap"] = torch.tensor(rng.uniform(0.01, 0.3)).item()
        if rng.random() < 0.5:
            dim = rng.choice([1, 8, 33, 256])
            vectors = ((random(codes[1], dim) - 0.5) * 2 / dim**0.5).to(DTYPES[rng.choice(FLOATS)])
            inputs["embeddings"] = tables["embeddings"] = vectors
    settings |= rule
    given = redraft != "gumbel" and rng.random() < 0.5
    uniforms = torch.randint(0, 1 << 24, [batch, most + 1, 4], generator=generator).float() * 2.0**-24
    seeds = torch.randint(-(2**62), 2**62, [batch], generator=generator)
    positions = torch.randint(0, 2**40, [batch], generator=generator)
    inputs |= {"uniforms": uniforms} if given else {"seeds": seeds, "positions": positions}
    what = f"{rule['rule']} {dtype} {redraft} {batch}x{most} of {vocab}"
    code, out, error = program("visual_verify", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0

    compared = 0
    for b, count in enumerate(counts):
        tokens = out["tokens"][b].tolist()
        if count == 0:
            if tokens != [-1] * (most + 1) or out["emitted"][b] != 0 or out["last_row"][b] != -1:
                return what, f"request {b} has no rows, but {tokens}", 0.0
            continue
        margin, first, end, redrafts = [1.0], cu_rows[b], None, []
        seed, position = seeds[b].item() % 2**64, positions[b].item()
        for i in range(count):
            logits = mixed[first + i]
            p = verification.probabilities(logits, *sampling[b], False, margin)
            is_peak = sampling[b][0] < 1e-5
            d = flat[first + i].item() if i + 1 < count else -1
            d = d if 0 <= d < vocab else None
            q = None
            if d is not None and (not with_q or is_peak):
                q = [float(x == d) for x in range(vocab)]
            elif d is not None:
                q = verification.probabilities(of_draft[b * most + i], sampling[b][0], 0, 1.0, 0.0, False, margin)
            if given:
                accept, *three = uniforms[b, i].tolist()
                draws, for_draft = (accept, three, three), three
            else:
                draws = verification.draws(seed, position + i, i)
                words = verification.philox.block(seed, position + i, i << 8, 0)
                for_draft = [(word >> 8) * 2.0**-24 for word in words[:3]]
            stays, token = visual.test(rule, logits, p, q, d, is_peak, draws, codes, tables, margin)
            if end is not None:
                if redraft == "maximal":
                    redrafts.append(d if stays else token)
                elif redraft == "gumbel" and not is_peak:
                    redrafts.append(visual.race(p, seed, position + i, margin))
                else:
                    redrafts.append(verification.sample(p, for_draft, margin))
            elif not stays:
                end = (i, token)
                if redraft == "none":
                    break
        if margin[0] < CLOSE:
            continue
        accepted, token = end
        expected = flat[first : first + accepted].tolist() + [-7 if token is None else token]
        expected += [-1] * (most + 1 - len(expected))
        if tokens != expected or out["accepted"][b] != accepted or out["emitted"][b] != accepted + 1:
            return what, f"request {b}: {tokens} instead of {expected}", 0.0
        if out["last_row"][b] != first + accepted:
            return what, f"request {b}: last row {out['last_row'][b]}", 0.0
        if redraft != "none":
            expected = [-1] * (accepted + 1) + [-7 if token is None else token for token in redrafts]
            expected += [-1] * (most + 1 - len(expected))
            if out["redrafts"][b].tolist() != expected:
                return what, f"request {b}: re-drafts {out['redrafts'][b].tolist()} instead of {expected}", 0.0
        compared += 1
    return f"{what}, {compared} compared", None, 0.0


OPS = {"visual_verify": visual_verify}
