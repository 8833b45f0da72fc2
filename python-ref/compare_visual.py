"""Random cases of the visual rules for compare.py. A decision that was close in f64 is not compared."""

import torch

from nextscale_ref import verification, visual
from nextscale_ref.dtypes import DTYPES

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


def pooled_verify(program, number, rng):
    dtype = FLOATS[number % 3]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))

    def random(*shape):
        return torch.rand(shape, generator=generator)

    vocab = rng.choice([2, 33, 64, 1000, 1025, rng.randint(2, 2500)])
    batch, height, width = rng.choice([0, 1, 2, 4]), rng.randint(1, 9), rng.randint(1, 9)
    radius, near = rng.randint(0, 3), rng.choice([0, 1, 8, 31, 32, 33, 70])
    codes = (vocab // 4, max(vocab // 2, 1)) if rng.random() < 0.3 else (0, vocab)
    tokens = height * width
    target = (random(batch * tokens, vocab) * 6 - 3).to(DTYPES[dtype])
    drafts = torch.randint(0, vocab, [batch, height, width], generator=generator).to(torch.int32)
    drafts = drafts.masked_fill(random(batch, height, width) < 0.03, -1)
    threshold = random(batch) * 0.3
    inputs = {"target": target, "drafts": drafts, "threshold": threshold}
    settings = {"radius": radius, "first_code": codes[0], "codes": codes[1]}
    p = target.double()
    if rng.random() < 0.4 and batch:
        free = (random(batch * tokens, vocab) * 6 - 3).to(DTYPES[dtype])
        guidance = torch.tensor([rng.choice([1.0, 3.0, 1.5]) for _ in range(batch)])
        inputs |= {"target_free": free, "guidance": guidance}
        p = visual.guided(target, free, guidance.repeat_interleave(tokens)[:, None].double()).double()
    temperature = torch.tensor([rng.choice([1.0, 0.7, 1.5]) for _ in range(batch)])
    inputs["temperature"] = temperature
    p = (p / temperature.double().repeat_interleave(tokens)[:, None]).softmax(-1)
    ids = torch.zeros([codes[1], 0], dtype=torch.long)
    if near:
        ids = (torch.arange(codes[1])[:, None] + torch.arange(1, near + 1)) % codes[1]
        ids = ids.masked_fill(random(*ids.shape) < 0.03, -1)
        inputs["neighbours"] = (ids % 65536).to(torch.uint16) if rng.random() < 0.5 else ids.to(torch.int32)
    what = f"{dtype} {batch}x{height}x{width} of {vocab}, {near} neighbours, radius {radius}"
    code, out, error = program("pooled_verify", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0

    flat = drafts.view(-1).long()
    rows = torch.arange(batch * tokens)
    own = torch.where(flat >= 0, p[rows, flat.clamp(min=0)] if batch else torch.zeros(0), 0)
    code_of = flat - codes[0]
    is_code = (flat >= 0) & (code_of >= 0) & (code_of < codes[1])
    beside = ids[code_of.clamp(0, codes[1] - 1)]
    of_near = p.gather(1, (beside + codes[0]).clamp(0, vocab - 1)) if batch else torch.zeros([0, near])
    pooled = own + (of_near * (beside >= 0)).sum(1) * is_code
    error = (out["pooled"].view(-1).double() - pooled).abs().max().item() if batch else 0.0
    if error > 2e-5:
        return what, f"pooled probabilities are off by {error}", error / 2e-5
    rejected = (flat < 0) | (pooled < threshold.double().repeat_interleave(tokens))
    for b in range(batch):
        of = slice(b * tokens, (b + 1) * tokens)
        if ((pooled[of] - threshold[b].double()).abs() < CLOSE).any():
            continue
        mask, positions, islands, count = visual.resampled(rejected[of].view(height, width), radius)
        if not torch.equal(out["resample"][b].long(), mask):
            return what, f"request {b}: {out['resample'][b]} instead of {mask}", 0.0
        if out["positions"][b].tolist() != positions or not torch.equal(out["islands"][b].long(), islands):
            return what, f"request {b}: positions or islands differ", 0.0
        if out["counts"][b].tolist() != [int((mask > 0).sum()), count]:
            return what, f"request {b}: counts {out['counts'][b]}", 0.0
    return what, None, error / 2e-5


def typical_verify(program, number, rng):
    dtype = FLOATS[number % 3]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    vocab, batch, nodes = rng.choice([2, 33, 1000, 1025, 3000]), rng.choice([0, 1, 2, 4]), rng.randint(1, 9)
    target = (torch.rand([batch * nodes, vocab], generator=generator) * 6 - 3)
    drafts = torch.randint(0, vocab, [batch, nodes], generator=generator)
    for b in range(batch):
        for n in range(nodes):
            target[b * nodes + rng.randrange(nodes), drafts[b, n]] = rng.uniform(1.0, 9.0)
    target = target.to(DTYPES[dtype])
    temperature = torch.tensor([rng.choice([1.0, 0.7, 0.0]) for _ in range(batch)])
    uniforms = torch.randint(0, 1 << 24, [batch, 3], generator=generator).float() * 2.0**-24
    inputs = {"target": target, "drafts": drafts.to(torch.int32), "temperature": temperature, "uniforms": uniforms}
    depth, paths = nodes, [list(range(nodes))]
    if rng.random() < 0.7:
        depth = rng.randint(1, 6)
        paths = [[0] + [rng.randrange(nodes) for _ in range(rng.randrange(depth))] for _ in range(rng.randint(1, 12))]
        inputs["paths"] = torch.tensor([path + [-1] * (depth - len(path)) for path in paths], dtype=torch.int32)
    epsilon, alpha = 0.25, 0.5
    what = f"{dtype} {batch}x{nodes} of {vocab}, {len(paths)} paths"
    code, out, error = program("typical_verify", inputs, {"epsilon": epsilon, "alpha": alpha, "fallback": -7},
                               repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0
    for b in range(batch):
        margin = [1.0]
        p = [verification.probabilities(target[b * nodes + n], temperature[b].item(), 0, 1.0, 0.0, False, margin)
             for n in range(nodes)]
        length, path = visual.typical(p, drafts[b].tolist(), paths, epsilon, alpha, margin)
        last = paths[path][length] if length else 0
        token = verification.sample(p[last], uniforms[b].tolist(), margin)
        if margin[0] < CLOSE:
            continue
        walked = paths[path][: length + 1]
        tokens = [drafts[b, n].item() for n in walked[1:]] + [token]
        tokens += [-1] * (depth - len(tokens))
        if out["tokens"][b].tolist() != tokens or out["accepted"][b] != length or out["path"][b] != path:
            return what, f"request {b}: {out['tokens'][b].tolist()} instead of {tokens}, path {path}", 0.0
        if out["nodes"][b].tolist() != walked + [-1] * (depth - len(walked)):
            return what, f"request {b}: nodes {out['nodes'][b].tolist()}", 0.0
        if out["last_row"][b] != b * nodes + last:
            return what, f"request {b}: last row {out['last_row'][b]}", 0.0
    return what, None, 0.0


def confidence_rank(program, number, rng):
    dtype = FLOATS[number % 3]
    kind = ["probability", "log_probability", "margin", "entropy"][number // 3 % 4]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    vocab = rng.choice([2, 33, 1000, 1025, 3000])
    batch, length, step = rng.choice([0, 1, 2, 4]), rng.choice([1, 7, 30]), rng.randint(0, 9)
    logits = (torch.rand([batch, length, vocab], generator=generator) * 8 - 4).to(DTYPES[dtype])
    masked = (torch.rand([batch, length], generator=generator) < 0.7).to(torch.uint8)
    counts = torch.tensor([rng.choice([0, 1, 3, 100, -1]) for _ in range(batch)], dtype=torch.int32)
    choices = {"log_probability": [-0.1, -2.0, 1.0], "entropy": [-0.5, -3.0, 1.0]}.get(kind, [0.9, 0.2, 0.05, 2.0])
    threshold = torch.tensor([rng.choice(choices) for _ in range(batch)])
    noise = torch.tensor([rng.choice([0.0, 0.5]) for _ in range(batch)])
    seeds = torch.randint(-(2**62), 2**62, [batch], generator=generator)
    positions = torch.randint(0, 2**40, [batch], generator=generator)
    inputs = {"logits": logits, "masked": masked, "counts": counts, "threshold": threshold, "noise": noise,
              "seeds": seeds, "positions": positions}
    what = f"{kind} {dtype} {batch}x{length} of {vocab}"
    code, out, error = program("confidence_rank", inputs, {"confidence": kind, "step": step},
                               repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0
    worst = 0.0
    for b in range(batch):
        p = logits[b].double().softmax(-1)
        candidates = logits[b].float().argmax(-1)
        top = p.sort(descending=True).values
        sure = {
            "probability": top[:, 0],
            "log_probability": top[:, 0].log(),
            "margin": top[:, 0] - top[:, 1],
            "entropy": (p * p.clamp(min=1e-300).log()).sum(-1),
        }[kind]
        there = masked[b].bool()
        difference = (out["confidence"][b].double() - sure).abs() / (1 + sure.abs())
        if there.any():
            worst = max(worst, difference[there].max().item() / 2e-5)
        if worst > 1:
            return what, f"request {b}: confidences are off", worst
        if not torch.equal(out["candidates"][b].long(), torch.where(there, candidates, -1)):
            return what, f"request {b}: candidates {out['candidates'][b].tolist()}", worst
        score = sure.clone()
        if noise[b] > 0:
            words = [verification.philox.block(seeds[b].item() % 2**64, positions[b].item() + i, 10 | step << 8, 0)[0]
                     for i in range(length)]
            variate = -((torch.tensor(words, dtype=torch.float64) + 0.5) / 2**32).log2()
            score = sure / noise[b].double() - variate.log()
        above = there & (sure > threshold[b].double())
        margin = (sure[there] - threshold[b].double()).abs().min().item() if there.any() else 1.0
        want = above
        if not above.any():
            n = int(there.sum()) if counts[b] < 0 else min(int(counts[b]), int(there.sum()))
            order = torch.where(there, score, -torch.inf).sort(descending=True, stable=True)
            want = torch.zeros(length, dtype=torch.bool)
            want[order.indices[:n]] = True
            if 0 < n < int(there.sum()):
                margin = min(margin, (order.values[n - 1] - order.values[n]).item())
        if margin < CLOSE:
            continue
        if not torch.equal(out["tokens"][b].long(), torch.where(want, candidates, -1)):
            return what, f"request {b}: {out['tokens'][b].tolist()} instead of {want.tolist()}", worst
        if out["committed"][b] != int(want.sum()):
            return what, f"request {b}: {out['committed'][b]} committed", worst
    return what, None, worst


OPS |= {"pooled_verify": pooled_verify, "typical_verify": typical_verify, "confidence_rank": confidence_rank}


def gated_sample(program, number, rng):
    dtype = FLOATS[number % 3]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    vocab, rows = rng.choice([2, 33, 1000, 1025, 3000]), rng.choice([0, 1, 3, 8])
    first, second = ((torch.rand([rows, vocab], generator=generator) * 8 - 4).to(DTYPES[dtype]) for _ in range(2))
    gate = torch.tensor([rng.choice([0.0, 1.0, 0.3, 0.75]) for _ in range(rows)])
    temperature = torch.tensor([rng.choice([1.0, 0.5, 0.0]) for _ in range(rows)])
    top_k = torch.tensor([rng.choice([0, 1, 20]) for _ in range(rows)], dtype=torch.int32)
    uniforms = torch.randint(0, 1 << 24, [rows, 3], generator=generator).float() * 2.0**-24
    inputs = {"first": first, "second": second, "gate": gate, "temperature": temperature, "top_k": top_k,
              "uniforms": uniforms}
    what = f"{dtype} {rows} of {vocab}"
    code, out, error = program("gated_sample", inputs, {}, repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0
    mixed = visual.guided(first, second, gate[:, None].double())
    for r in range(rows):
        margin = [1.0]
        p = verification.probabilities(mixed[r], temperature[r].item(), top_k[r].item(), 1.0, 0.0, False, margin)
        token = verification.sample(p, uniforms[r].tolist(), margin)
        if margin[0] >= CLOSE and out["tokens"][r] != token:
            return what, f"row {r}: {out['tokens'][r]} instead of {token}", 0.0
    return what, None, 0.0


def select_candidate(program, number, rng):
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    batch, count, length = rng.choice([0, 1, 5]), rng.choice([1, 4, 33, 1024]), rng.choice([0, 1, 300])
    scores = torch.rand([batch, count], generator=generator) * 6 - 3
    sequences = torch.randint(0, 1 << 20, [batch, count, length], generator=generator).to(torch.int32)
    temperature = torch.tensor([rng.choice([1.0, 0.0, 0.5]) for _ in range(batch)])
    uniforms = torch.randint(0, 1 << 24, [batch, 3], generator=generator).float() * 2.0**-24
    inputs = {"scores": scores, "sequences": sequences, "temperature": temperature, "uniforms": uniforms}
    what = f"{batch}x{count} of {length}"
    code, out, error = program("select_candidate", inputs, {}, repeat=2)
    if code:
        return what, f"exit code {code}: {error}", 0.0
    for b in range(batch):
        margin = [1.0]
        p = verification.probabilities(scores[b], temperature[b].item(), 0, 1.0, 0.0, False, margin)
        parent = verification.sample(p, uniforms[b].tolist(), margin)
        if margin[0] >= CLOSE and out["parents"][b] != parent:
            return what, f"request {b}: {out['parents'][b]} instead of {parent}", 0.0
        if not torch.equal(out["selected"][b], sequences[b, out["parents"][b]]):
            return what, f"request {b}: another sequence", 0.0
    return what, None, 0.0


def beam_rank(program, number, rng):
    dtype = FLOATS[number % 3]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    vocab, batch, beams = rng.choice([2, 33, 1000, 1025, 3000]), rng.choice([0, 1, 3]), rng.choice([1, 4, 32])
    width = rng.choice([1, 5, 32])
    logits = (torch.rand([batch, beams, vocab], generator=generator) * 8 - 4).to(DTYPES[dtype])
    scores = torch.rand([batch, beams], generator=generator) * -5
    scores = scores.masked_fill(torch.rand([batch, beams], generator=generator) < 0.1, -torch.inf)
    what = f"{dtype} {batch}x{beams} of {vocab}, {width} kept"
    code, out, error = program("beam_rank", {"logits": logits, "scores": scores}, {"width": width}, repeat=2)
    if code:
        return what, f"exit code {code}: {error}", 0.0
    worst = 0.0
    for b in range(batch):
        total = (scores[b].double()[:, None] + logits[b].double().log_softmax(-1)).view(-1)
        best = total.sort(descending=True, stable=True)
        for n in range(width):
            parent, token = out["parents"][b, n].item(), out["tokens"][b, n].item()
            if n >= len(total) or best.values[n] == -torch.inf:
                if (parent, token) != (-1, -1):
                    return what, f"request {b}, {n}: {parent} {token} where there is nothing", worst
                continue
            want = best.values[n].item()
            worst = max(worst, abs(out["best"][b, n].item() - want) / 1e-4)
            # What is close may change places, but must have its score.
            if worst > 1 or abs(total[parent * vocab + token].item() - want) > 1e-4:
                return what, f"request {b}, {n}: {parent} {token} {out['best'][b, n].item()} instead of {want}", worst
        pairs = list(zip(out["parents"][b].tolist(), out["tokens"][b].tolist()))
        pairs = [pair for pair in pairs if pair != (-1, -1)]
        if len(set(pairs)) != len(pairs):
            return what, f"request {b}: a pair twice", worst
    return what, None, worst


def backspace(program, number, rng):
    batch, most, capacity = rng.choice([0, 1, 300]), rng.choice([0, 1, 6]), rng.choice([0, 1, 5])
    emitted = torch.tensor([[rng.randint(-1, 11) for _ in range(most)] for _ in range(batch)], dtype=torch.int32)
    lengths = [rng.randint(0, capacity) for _ in range(batch)]
    before = torch.full([batch, capacity], 77, dtype=torch.int32)
    inputs = {"emitted": emitted.view(batch, most), "sequences": before,
              "lengths": torch.tensor(lengths, dtype=torch.int32)}
    what = f"{batch} of {capacity}, {most} emitted"
    code, out, error = program("backspace", inputs, {"token": 9}, repeat=2)
    if code:
        return what, f"exit code {code}: {error}", 0.0
    for b in range(batch):
        stack = [77] * lengths[b]
        kept = len(stack)
        for token in emitted.view(batch, most)[b].tolist():
            if token < 0:
                break
            if token == 9:
                stack = stack[:-1]
            elif len(stack) < capacity:
                stack.append(token)
            kept = min(kept, len(stack))
        length = out["lengths"][b].item()
        if out["sequences"][b, :length].tolist() != stack or out["kept"][b] != kept:
            return what, f"request {b}: {out['sequences'][b].tolist()} {length} instead of {stack}", 0.0
    return what, None, 0.0


OPS |= {"gated_sample": gated_sample, "select_candidate": select_candidate, "beam_rank": beam_rank,
        "backspace": backspace}
