#!/usr/bin/env python3
"""Tests of the references, and of the goldens against what the references answer now. `python test_ref.py`."""

import json
import random

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

import make_golden
from nextscale_ref import attention, multi_scale, philox, rvq, scale_attention, trees, verification


def test_philox_known_answers():
    for counter, key, words in philox.KNOWN_ANSWERS:
        assert philox.philox(counter, key) == words
        # The same through the op's counter: position, domain and draw make up its words.
        position, seed = counter[0] | counter[1] << 32, key[0] | key[1] << 32
        assert philox.block(seed, position, counter[2], counter[3]) == words
        assert philox.philox_fill(1, seed, position, counter[2], counter[3]).tolist() == [list(words)]


def test_philox_positions_wrap():
    wrapped = philox.philox_fill(4, seed=9, first_position=2**64 - 2)
    assert wrapped[2:].tolist() == philox.philox_fill(2, seed=9).tolist()
    assert philox.philox_fill(0).shape == (0, 4)


def test_philox_uniforms():
    words = philox.philox_fill(64, seed=5).to(torch.int64)
    uniforms = philox.philox_fill(64, seed=5, dtype=torch.float32)
    assert torch.equal(uniforms.double(), (words >> 8).double() / 2**24)
    assert 0 <= uniforms.min() and uniforms.max() < 1 and abs(uniforms.mean() - 0.5) < 0.1


def naive(codes, codebooks, null_code=None):
    """rvq_decode in loops. codes [levels, rows], codebooks [levels, entries, dim]; returns f32 [rows, dim]."""
    out = torch.zeros(codes.shape[1], codebooks.shape[2])
    for row in range(codes.shape[1]):
        for level in range(codes.shape[0]):
            code = int(codes[level, row])
            if code != null_code:
                out[row] += codebooks[level, code].float()
    return out


def test_rvq_matches_loops():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 6, (5, 7), generator=generator)
    books = torch.randn(5, 6, 9, generator=generator)
    for null_code in [None, 2]:
        want = naive(codes, books, null_code)
        assert torch.equal(rvq.rvq_decode(codes, books, null_code=null_code), want)
        assert torch.equal(rvq.rvq_decode(codes.T, books, null_code=null_code, rows_first=True), want)
        batched = rvq.rvq_decode(torch.stack([codes, codes.flip(1)]), books, null_code=null_code)
        assert torch.equal(batched, torch.stack([want, want.flip(0)]))
        half = rvq.rvq_decode(codes, books.bfloat16(), torch.float16, null_code)
        assert torch.equal(half, naive(codes, books.bfloat16(), null_code).half())


def test_rvq_shared_is_repeated():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 6, (2, 4, 3), generator=generator).to(torch.uint16)
    book = torch.randn(6, 5, generator=generator)
    assert torch.equal(rvq.rvq_decode(codes, book), rvq.rvq_decode(codes, book.expand(4, 6, 5)))


def test_rvq_order_and_start():
    # Ascending, not pairwise or descending: 1 + 2^25 loses the 1, then 2^25 - 2^25 leaves 0.
    books = torch.tensor([1.0, 2.0**25, -(2.0**25)]).reshape(3, 1, 1)
    codes = torch.zeros(3, 1, dtype=torch.int64)
    assert rvq.rvq_decode(codes, books).item() == 0 and rvq.rvq_decode_f64(codes, books).item() == 1
    # +0 + -0 is +0.
    assert not torch.signbit(rvq.rvq_decode(codes, torch.full((3, 1, 1), -0.0))).any()
    # One rounding at the end: in bf16, 256 + 1 + 1 would stay at 256.
    books = torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16).reshape(3, 1, 1)
    assert rvq.rvq_decode(codes, books).item() == 258


def test_rvq_null_outside_the_codebook():
    codes = torch.tensor([[0, -1], [-1, -1]])
    books = torch.ones(2, 1, 3)
    assert rvq.rvq_decode(codes, books, null_code=-1).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_rvq_without_elements():
    assert rvq.rvq_decode(torch.zeros(3, 0, dtype=torch.int64), torch.ones(3, 2, 4)).shape == (0, 4)
    assert rvq.rvq_decode(torch.zeros(0, 2, dtype=torch.int64), torch.ones(0, 2, 4)).tolist() == [[0] * 4] * 2


def test_rvq_is_the_usual_expression():
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 64, (8, 100), generator=generator)
    books = torch.randn(8, 64, 32, generator=generator)
    usual = sum(F.embedding(codes[level], books[level]) for level in range(8))
    assert torch.equal(rvq.rvq_decode(codes, books), usual)


def test_rvq_bound_holds_and_is_not_slack():
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 64, (32, 200), generator=generator)
    books = torch.randn(32, 64, 32, generator=generator)
    exact = rvq.rvq_decode_f64(codes, books)
    for dtype in [torch.float32, torch.float16, torch.bfloat16]:
        error = (rvq.rvq_decode(codes, books, dtype).double() - exact).abs()
        bound = rvq.error_bound(codes, books, dtype)
        assert (error <= bound).all() and (error > bound / 1000).any()
    assert (rvq.error_bound(codes[:1], books[:1], torch.float32) == 0).all()


def grid(*segments):
    return torch.tensor(segments)


def test_attention_mask_of_scales():
    """VAR's own mask: a token sees the tokens of its scale and of those before."""
    sides = [1, 2, 3, 4]
    scale_of = torch.cat([torch.full([n * n], n) for n in sides])
    segments = grid(*([1, n, n] for n in sides))
    causal = torch.ones(4, 4).tril().int()
    seen = scale_attention.visible(segments, segments, causal)
    assert torch.equal(seen, scale_of[:, None] >= scale_of[None, :])
    seen = scale_attention.visible(segments, segments, torch.eye(4).int())
    assert torch.equal(seen, scale_of[:, None] == scale_of[None, :])


def test_attention_mask_of_orders():
    text = grid([1, 1, 4])
    causal = torch.tensor([[scale_attention.CAUSAL]])
    assert torch.equal(scale_attention.visible(text, text, causal), torch.ones(4, 4).tril().bool())
    # Raster order of the transposed grid.
    frames, height, width = 2, 3, 4
    order = torch.arange(frames * height * width).reshape(frames, width, height).transpose(1, 2).flatten()
    video = grid([frames, height, width])
    seen = scale_attention.visible(video, video, torch.tensor([[scale_attention.COLUMN]]))
    assert torch.equal(seen, order[:, None] >= order[None, :])


def test_attention_mask_of_windows():
    # Onto its own grid a place is itself.
    image = grid([1, 5, 6])
    window = torch.tensor([[scale_attention.WINDOWS]])
    assert torch.equal(scale_attention.visible(image, image, window, grid([0, 0, 0])), torch.eye(30).bool())
    seen = scale_attention.visible(image, image, window, grid([0, 1, 2])).reshape(5, 6, 5, 6)
    for y in range(5):
        for x in range(6):
            near = torch.zeros(5, 6, dtype=torch.bool)
            near[max(y - 1, 0) : y + 2, max(x - 2, 0) : x + 3] = True
            assert torch.equal(seen[y, x], near)
    # Coarser and finer grids: by the real numbers.
    for count, of in [(3, 7), (7, 3), (16, 13), (1, 9), (9, 1)]:
        seen = scale_attention.visible(grid([1, 1, count]), grid([of, 1, 1]), window, grid([0, 0, 0]))
        # Only the frames are projected onto more than one: the middle.
        assert seen.sum(1).tolist() == [1] * count and seen[:, of // 2].all()
        seen = scale_attention.visible(grid([1, count, 1]), grid([1, of, 1]), window, grid([0, 0, 0]))
        assert seen.int().argmax(1).tolist() == [int((i + 0.5) * of / count + 1e-9) for i in range(count)]


def test_attention_is_pytorchs():
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 14, 4 if i == 0 else 2, 8, generator=generator, dtype=torch.float64) for i in range(3))
    segments = grid(*make_golden.VAR)
    seen = scale_attention.visible(segments, segments, torch.tensor(make_golden.CAUSAL))
    out, lse = scale_attention.scale_attention(q, k, v, seen, 0.3)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=0.3, enable_gqa=True)
    assert torch.allclose(out, theirs.transpose(1, 2), rtol=1e-12)
    logits = heads_first[0] @ heads_first[1].repeat_interleave(2, 1).transpose(2, 3) * 0.3
    assert torch.allclose(lse, logits.masked_fill(~seen, -torch.inf).logsumexp(-1), rtol=1e-12)


def test_attention_of_nothing():
    q, k, v = (torch.ones(1, 3, 1, 8) for _ in range(3))
    seen = torch.tensor([[True, False, False], [False, False, False], [True, True, False]])
    # What nobody sees may hold anything.
    k[:, 2], v[:, 2] = torch.nan, torch.inf
    out, lse = scale_attention.scale_attention(q, k, v, seen, 1.0)
    assert out[0, :, 0, 0].tolist() == [1, 0, 1] and lse[0, 0].tolist()[1] == -torch.inf
    assert torch.equal(lse[0, 0, [0, 2]], 8 + torch.tensor([1.0, 2.0]).double().log())
    # Keys beyond a length are not there.
    there = scale_attention.exists(grid([1, 1, 3]), torch.tensor([0]), torch.tensor([[[1]]]))
    assert there.tolist() == [[[True, False, False]]]
    _, lse = scale_attention.scale_attention(q, k, v, seen, 1.0, there)
    assert lse[0, 0].tolist() == [8, -torch.inf, 8]


def test_attention_gathers_and_packs():
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 5, 1, 8, generator=generator) for _ in range(3))
    seen = torch.ones(3, 5, dtype=torch.bool)
    index = torch.tensor([[4, 0, 0], [1, 2, 3]])
    out, lse = scale_attention.scale_attention(q, k, v, seen, 1.0, row_index=index)
    for b in range(2):
        alone = scale_attention.scale_attention(q[b : b + 1, index[b]], k[b : b + 1], v[b : b + 1], seen, 1.0)
        assert torch.equal(out[b], alone[0][0]) and torch.equal(lse[b], alone[1][0])
    # Five keys of the first entry and two of the second, which its length cuts off.
    packed = [torch.cat([x[0], x[1, :2]])[None] for x in (k, v)]
    there = torch.tensor([[[True] * 5], [[True] * 2 + [False] * 3]])
    out, _ = scale_attention.scale_attention(q, *packed, seen, 1.0, there, kv_offset=torch.tensor([0, 5]))
    assert torch.equal(out, scale_attention.scale_attention(q, k, v, seen, 1.0, there)[0])


def test_attention_usual_is_close():
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 100, 2, 64, generator=generator).bfloat16() for _ in range(3))
    seen = torch.ones(100, 100).tril().bool()
    exact, _ = scale_attention.scale_attention(q, k, v, seen, 0.125)
    error = (scale_attention.usual(q, k, v, seen, 0.125) - exact).abs().max()
    assert 1e-3 < error < 5e-2


def attend(q, k, v):
    """Attention in f64, and its log-sum-exp. q [rows, dim], k and v [keys, dim]."""
    logits = q.double() @ k.double().T
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


def test_merge_is_attention_over_all_keys():
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(n, 8, generator=generator) for n in [5, 30, 30])
    cuts = [(0, 3), (3, 4), (4, 30)]
    parts, lse = zip(*[attend(q, k[a:b], v[a:b]) for a, b in cuts])
    # As [parts, batch, rows, heads, dim] and [parts, batch, heads, rows]; an empty part full of NaN changes nothing.
    parts = torch.stack([*parts, torch.full((5, 8), torch.nan).double()])[:, None, :, None]
    lse = torch.stack([*lse, torch.full((5,), -torch.inf).double()])[:, None, None].float()
    out, merged, bound, lse_bound = attention.merge(parts, lse)
    want, want_lse = attend(q, k, v)
    # The lse were rounded to f32.
    assert torch.allclose(out[0, :, 0], want, atol=1e-5) and torch.allclose(merged[0, 0], want_lse, atol=1e-5)
    assert (bound > 0).all() and (bound < 1e-4).all() and (lse_bound < 1e-5).all()
    # In two steps.
    first = attention.merge(parts[:2], lse[:2])
    again, merged_again, *_ = attention.merge(parts[2:], lse[2:], (first[0], first[1].float()))
    assert torch.allclose(again, out, atol=1e-6) and torch.allclose(merged_again, merged, atol=1e-6)


def test_merge_of_nothing():
    nothing = torch.full((3, 1, 2, 1, 4), torch.nan), torch.full((3, 1, 1, 2), -torch.inf)
    out, lse, bound, lse_bound = attention.merge(*nothing)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert (bound == 0).all() and (lse_bound == 0).all()


def naive_rope(x, cos, sin, pairs, columns):
    """x [rows, dim] with each pair of elements turned by its own columns."""
    y = x.clone()
    for row in range(x.shape[0]):
        for (a, b), (i, j) in zip(pairs, columns):
            y[row, a] = x[row, a] * cos[row, i] - x[row, b] * sin[row, i]
            y[row, b] = x[row, b] * cos[row, j] + x[row, a] * sin[row, j]
    return y


def test_rope_matches_loops():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 24, generator=generator).double()
    interleaved = [(2 * j, 2 * j + 1) for j in range(12)]
    axes = [(8 * axis + j, 8 * axis + j + 4) for axis in range(3) for j in range(4)]
    for rope, of_axes, rotary, pairs in [
        ("interleaved", 1, 24, interleaved),
        ("interleaved", 1, 12, interleaved[:6]),
        ("half", 1, 24, [(j, j + 12) for j in range(12)]),
        ("half", 1, 12, [(j, j + 6) for j in range(6)]),
        ("half", 3, 24, axes),
    ]:
        for full in [False, True]:
            cos, sin = torch.randn(2, 3, rotary if full else rotary // 2, generator=generator).double()
            columns = pairs if full else [(j, j) for j in range(len(pairs))]
            want = naive_rope(x, cos, sin, pairs, columns)
            got = attention.rotate(x, cos, sin, rope + ("-full" if full else ""), of_axes)
            assert torch.allclose(got, want, atol=1e-12), (rope, of_axes, rotary, full)


def test_interleaved_rope_multiplies_complex_numbers():
    generator = torch.Generator().manual_seed(6)
    x, angle = torch.randn(4, 10, generator=generator).double(), torch.randn(4, 5, generator=generator).double()
    want = torch.view_as_real(torch.view_as_complex(x.view(4, 5, 2)) * torch.polar(torch.ones_like(angle), angle))
    assert torch.allclose(attention.rotate(x, angle.cos(), angle.sin(), "interleaved"), want.flatten(-2), atol=1e-12)


def test_prepare_steps():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 3, 4, 8, generator=generator)
    unit, bound = attention.prepare(x, norm="l2", eps=1e-12)
    assert torch.allclose(unit.norm(dim=-1), torch.ones(2, 3, 4).double()) and (bound < 1e-5).all()
    weight = torch.randn(8, generator=generator)
    rms, _ = attention.prepare(x, norm="rms", eps=1e-6, weight=weight)
    assert torch.allclose(rms, F.rms_norm(x.double(), (8,), weight.double(), 1e-6))
    scaled, _ = attention.prepare(x, norm="l2", eps=1e-12, multiplier=torch.tensor([1.0, 2, 3, 4]))
    assert torch.allclose(scaled.norm(dim=-1), torch.tensor([1.0, 2, 3, 4]).double().expand(2, 3, 4))
    assert torch.equal(attention.prepare(x)[0], x.double())
    zero, _ = attention.prepare(torch.zeros(1, 1, 1, 4), norm="l2", eps=1e-12)
    assert (zero == 0).all()


def test_append_leaves_out_what_does_not_fit():
    cache, x = torch.zeros(3, 4, 1, 1), torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1).expand(3, 3, 1, 1)
    got = attention.append(cache, x, [1, 2, -1])[..., 0, 0]
    assert got.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2], [2, 3, 0, 0]]


def test_goldens_are_current():
    """The committed files hold the same bits as those made now."""
    for name, (tensors, cases) in make_golden.golden().items():
        path = make_golden.GOLDEN / f"{name}.safetensors"
        assert path.stat().st_size < make_golden.LARGEST
        committed = load_file(path)
        assert committed.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert committed[key].dtype == tensor.dtype
            if tensor.dtype == torch.float64 and name.startswith("attention"):
                # Exponentials and roots: a version of PyTorch may round them otherwise.
                assert torch.allclose(committed[key], tensor, rtol=1e-12, atol=1e-18), key
            else:
                assert torch.equal(bits(committed[key]), bits(tensor)), key
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["cases"]) == cases


def bits(tensor):
    """The bytes of a tensor: equality that tells -0 from 0 and knows NaN."""
    return tensor.contiguous().flatten().view(torch.uint8)


def main():
    for name, test in sorted(globals().items()):
        if name.startswith("test_"):
            test()
            print(f"{name}: ok")


def test_multi_scale_conventions():
    # Weights half way between pixels, windows of 16 to 13, and tokens of 2 x 2 pixels.
    impulses = torch.eye(8, dtype=torch.float64).view(8, 1, 1, 8)
    weights = multi_scale.resize(impulses, (1, 12), "bicubic")[1:5, 0, 0, 4]
    assert torch.allclose(weights, torch.tensor([-0.09375, 0.59375, 0.59375, -0.09375], dtype=torch.float64), atol=1e-12)
    ramp = torch.arange(16, dtype=torch.float64).view(1, 1, 1, 16)
    windows = [(0, 2), (1, 3), (2, 4), (3, 5), (4, 7), (6, 8), (7, 9), (8, 10), (9, 12), (11, 13), (12, 14), (13, 15), (14, 16)]
    means = torch.tensor([(first + last - 1) / 2 for first, last in windows], dtype=torch.float64)
    assert torch.allclose(multi_scale.resize(ramp, (1, 13), "area")[0, 0, 0], means)
    tokens = torch.arange(24, dtype=torch.float32).view(1, 3, 8)
    pixels = multi_scale.grid(tokens, (1, 3), patch=2)
    assert pixels.shape == (1, 2, 2, 6) and pixels[0, 1, 1, 2] == 8 + 4 * 1 + 2 * 1 + 0
    assert torch.equal(multi_scale.token_major(pixels, 2), tokens.double())


def test_multi_scale_adds_up_as_var_does():
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(7, 4, generator=generator)
    phis = (torch.randn(2, 4, 4, 3, 3, generator=generator), torch.randn(2, 4, generator=generator), 0.5, [0, 1, 1])
    quantizer = multi_scale.Quantizer([(1, 1), (2, 2), (3, 3)], phis=phis)
    codes = torch.randint(0, 7, [2, 14], generator=generator)
    maps, inputs = quantizer.chain(codes, book)
    f_hat = torch.zeros(2, 4, 3, 3, dtype=torch.float64)
    for scale, side in enumerate([1, 2, 3]):
        h = book.double()[codes[:, [0, 1, 5][scale] : [1, 5, 14][scale]]].transpose(1, 2).reshape(2, 4, side, side)
        if side < 3:
            h = F.interpolate(h, size=(3, 3), mode="bicubic")
        weight, bias = phis[0][phis[3][scale]].double(), phis[1][phis[3][scale]].double()
        f_hat = f_hat + h * 0.5 + F.conv2d(h, weight, bias, padding=1) * 0.5
        assert torch.allclose(maps[scale], f_hat)
        if scale < 2:
            area = F.interpolate(f_hat, size=(side + 1, side + 1), mode="area")
            assert torch.allclose(inputs[scale], area.flatten(2).transpose(1, 2))


def test_fsq_levels():
    levels = torch.tensor([8, 5])
    for bound in ["tanh", "symmetric", "clamp"]:
        z = torch.tensor([[9.0, 9.0], [-9.0, -9.0]], dtype=torch.float64)
        level = multi_scale.fsq_level(z, levels, bound).round()
        assert level.tolist() == [[7, 4], [0, 0]]
        value = multi_scale.fsq_value(level, levels, bound)
        assert value.tolist() == ([[0.75, 1.0], [-1.0, -1.0]] if bound == "tanh" else [[1.0, 1.0], [-1.0, -1.0]])


def test_tree_walk_of_a_chain_is_decide():
    rng = random.Random(1)

    def row(vocab):
        weights = [rng.random() ** 3 for _ in range(vocab)]
        return [weight / sum(weights) for weight in weights]

    compared = 0
    for _ in range(300):
        vocab, count, rule = rng.choice([3, 9, 40]), rng.randint(0, 4), rng.choice([1, 2])
        p, q = [row(vocab) for _ in range(count + 1)], [row(vocab) for _ in range(count)]
        ids = [rng.choices(range(vocab), of)[0] for of in q]
        seed, at, margins = rng.getrandbits(64), rng.getrandbits(40), ([1.0], [1.0])
        chain = verification.decide(rule, p, q, ids, lambda i: verification.draws(seed, at + i, i), margins[0])
        path, last = trees.walk(
            rule, lambda n: p[n], lambda n: q[n], lambda n: [n + 1] if n < count else [], lambda n: ids[n - 1], count,
            False, lambda n, depth: verification.draws(seed, at + depth, depth)[1:],
            lambda n, depth, child, j: trees.accept_draw(seed, at, depth, j), margins[1])
        if min(margins[0] + margins[1]) > 1e-4:
            assert chain == (len(path) - 1, last)
            compared += 1
    assert compared > 250


def test_trees_of_candidates():
    scores = [0.0, -0.5, -2.0, -0.1, -2.0, -0.1, -3.0]
    assert trees.choose([-1, 0, 0, 1, 1, 2, 2], scores, 4, 2, False) == [0, 1, 2, 3]
    assert trees.choose([-1, 0, 0, 1, 1, 2, 2], [0, -0.5, -2, -0.7, -0.8, -0.1, -0.1], 3, 2, True) == [0, 1, 3]
    assert trees.paths_of([-1, 0, 1, -1, 3, 2], 2) == [[0], [0, 1], [0, 1, 2], None, None, None]


if __name__ == "__main__":
    main()
