//! Who sees whom: every constructor against a mask written here from the model's own formula, token by token.

#![cfg(feature = "attention")]

mod support;

use nextscale::Error;
use nextscale::attention::{ClipContext, PackedVideo, Past, Rule, Segment, Visibility};
use proptest::prelude::*;

/// Every pair of `visibility` is as `expected` says, and as many are counted.
fn check(visibility: &Visibility, expected: impl Fn(usize, usize) -> bool) {
    let mut pairs = 0;
    for q in 0..visibility.query_count() {
        for k in 0..visibility.key_count() {
            let sees = visibility.sees(q, k);
            assert_eq!(sees, expected(q as usize, k as usize), "query {q}, key {k} of {visibility:?}");
            pairs += u64::from(sees);
        }
    }
    assert_eq!(visibility.visible_pairs(), pairs);
}

fn shape(visibility: &Visibility, queries: usize, keys: usize) {
    assert_eq!((visibility.query_count() as usize, visibility.key_count() as usize), (queries, keys));
}

/// Of each token the number of its scale: what models call d, or a document's id.
fn ids(lengths: &[usize]) -> Vec<usize> {
    lengths.iter().enumerate().flat_map(|(id, &length)| vec![id; length]).collect()
}

const SIDES: [u32; 5] = [1, 2, 3, 5, 6];

fn squares() -> Vec<(u32, u32)> {
    SIDES.map(|side| (side, side)).to_vec()
}

fn squares_lengths() -> Vec<usize> {
    SIDES.map(|side| (side * side) as usize).to_vec()
}

fn square_segments() -> Vec<Segment> {
    squares().into_iter().map(Segment::from).collect()
}

/// VAR: `torch.where(d >= dT, 0, -inf)`.
#[test]
fn scale_causal_is_block_causal() {
    let d = ids(&squares_lengths());
    let var = Visibility::scale_causal(&squares()).unwrap();
    shape(&var, 75, 75);
    check(&var, |q, k| d[q] >= d[k]);

    let d = ids(&[1, 6, 8, 15]);
    check(&Visibility::scale_causal(&[(1, 1), (2, 3), (4, 2), (3, 5)]).unwrap(), |q, k| d[q] >= d[k]);
    let d = ids(&[1, 4, 12, 40]);
    check(&Visibility::scale_causal(&[(1, 1, 1), (1, 2, 2), (3, 2, 2), (5, 2, 4)]).unwrap(), |q, k| d[q] >= d[k]);
    check(&Visibility::scale_causal::<u32>(&[]).unwrap(), |_, _| unreachable!());
}

/// HMAR, M-VAR: d == dT.
#[test]
fn block_diagonal_is_the_same_scale() {
    let d = ids(&squares_lengths());
    check(&Visibility::block_diagonal(&squares()).unwrap(), |q, k| d[q] == d[k]);
}

#[test]
fn bidirectional_is_everything() {
    let all = Visibility::bidirectional(&squares()).unwrap();
    shape(&all, 75, 75);
    check(&all, |_, _| true);
}

#[test]
fn scales_double() {
    let d = ids(&[1, 4, 16, 64]);
    check(&Visibility::doubling((1, 1), 4).unwrap(), |q, k| d[q] >= d[k]);
    let d = ids(&[6, 24]);
    check(&Visibility::doubling((2, 3), 2).unwrap(), |q, k| d[q] >= d[k]);
    assert!(matches!(Visibility::doubling((1, 1), 40), Err(Error::Size { arg: "queries", .. })));
}

#[test]
fn cells_and_chunks_are_block_causal() {
    let cells = Visibility::cells(5, (3, 3)).unwrap();
    shape(&cells, 45, 45);
    check(&cells, |q, k| q / 9 >= k / 9);

    let chunks = Visibility::chunk_causal(50, 16).unwrap();
    shape(&chunks, 50, 50);
    check(&chunks, |q, k| q / 16 >= k / 16);
    check(&Visibility::chunk_causal(48, 16).unwrap(), |q, k| q / 16 >= k / 16);
    shape(&Visibility::chunk_causal(0, 16).unwrap(), 0, 0);
}

#[test]
fn text_is_causal_and_prefixes_are_seen() {
    check(&Visibility::token_causal(33).unwrap(), |q, k| k <= q);
    let lm = Visibility::prefix_lm(7, 20).unwrap();
    shape(&lm, 27, 27);
    check(&lm, |q, k| k <= q || k < 7);
}

/// HART: the text has the level of the first scale, and all levels are block-causal.
#[test]
fn prefixed_scales_see_the_prefix() {
    let lengths: Vec<usize> = [11].into_iter().chain(squares_lengths()).collect();
    let d = ids(&lengths);
    let text = Segment::tokens(11).with_length(2);
    let whole = Visibility::prefixed(text, Rule::Full, &squares()).unwrap();
    check(&whole, |q, k| d[q] >= d[k]);
    assert_eq!((whole.length_count(), whole.keys()[0].length()), (3, Some(2)));
    let read = Visibility::prefixed(text, Rule::Causal, &squares()).unwrap();
    check(&read, |q, k| if q < 11 { k <= q } else { d[q] >= d[k] });
    // A step sees it too.
    check(&read.step(3), |q, k| d[q + 16] >= d[k]);
    shape(&read.step(3), 9, 25);
}

/// `build_text_neighbor_ar_mask`: text causal, images see the text, and of themselves step(k) <= step(q) with step = r
/// + c.
#[test]
fn two_way_grows_from_the_corner() {
    let (height, width, text) = (4usize, 6usize, 5usize);
    let step = |token: usize| token / width + token % width;
    let expected = |q: usize, k: usize| match (q < text, k < text) {
        (true, _) => k <= q,
        (false, true) => true,
        (false, false) => step(k - text) <= step(q - text),
    };
    check(&Visibility::two_way(text as u32, height as u32, width as u32).unwrap(), expected);

    // Diagonal by diagonal: the same under another order of tokens.
    let mut order: Vec<usize> = (0..height * width).collect();
    order.sort_by_key(|&token| step(token));
    let at = |n: usize| if n < text { n } else { text + order[n - text] };
    for (height, width) in [(height, width), (width, height), (1, 7), (7, 1), (1, 1)] {
        let steps = Visibility::two_way_steps(text as u32, height as u32, width as u32).unwrap();
        shape(&steps, text + height * width, text + height * width);
        assert_eq!(steps.queries().len(), height + width);
    }
    let steps = Visibility::two_way_steps(text as u32, height as u32, width as u32).unwrap();
    check(&steps, |q, k| expected(at(q), at(k)));
    // A step reads all that was there before it, and itself.
    check(&steps.step(4), |_, _| true);
    shape(&steps.step(4), 4, text + 1 + 2 + 3 + 4);
    shape(&Visibility::two_way_steps(3, 0, 5).unwrap(), 3, 3);
}

/// NAR's videos: frame + row + column.
#[test]
fn diagonals_cross_frames() {
    let place = |token: usize| token / 12 + token / 4 % 3 + token % 4;
    let video = Visibility::ordered_image(0, (3, 3, 4), Rule::DiagonalCausal).unwrap();
    check(&video, |q, k| place(k) <= place(q));
}

#[test]
fn images_are_read_by_rows_or_by_columns() {
    let (height, width) = (5, 3);
    let rows = Visibility::ordered_image(2, (height, width), Rule::Causal).unwrap();
    check(&rows, |q, k| k <= q);
    let columns = Visibility::ordered_image(0, (height, width), Rule::ColumnCausal).unwrap();
    let transposed = |token: usize| token % width as usize * height as usize + token / width as usize;
    check(&columns, |q, k| transposed(k) <= transposed(q));
    // Frame by frame.
    let video = Visibility::ordered_image(0, (4, 5, 3), Rule::ColumnCausal).unwrap();
    check(&video, |q, k| (k / 15, transposed(k % 15)) <= (q / 15, transposed(q % 15)));
}

/// `skip_causal_attn_mask_mod_gen(b, h, q_idx, kv_idx, block_size, len1)` of ACDiT.
#[test]
fn skip_causal_is_acdits() {
    let (blocks, block) = (4, 6);
    let expected = |q: usize, k: usize| {
        let (q, k) = (q / block, k / block);
        let clean = q < blocks && k < blocks && q >= k;
        let noised = q >= blocks && k < blocks && q - blocks > k;
        clean || noised || q == k
    };
    let training = Visibility::skip_causal(blocks, (2, 3)).unwrap();
    shape(&training, 48, 48);
    check(&training, expected);

    for step in 0..blocks {
        let pass = Visibility::skip_causal_step(step, (2, 3)).unwrap();
        let fresh = step.min(1) * block;
        shape(&pass, fresh + block, (step + 1) * block);
        // In training's terms: queries clean block step - 1 and noised block step; keys clean up to there, noised block
        // step.
        let noised = (blocks + step) * block;
        let query = |q: usize| if q < fresh { (step - 1) * block + q } else { noised + q - fresh };
        let key = |k: usize| if k < step * block { k } else { noised + k - step * block };
        check(&pass, |q, k| expected(query(q), key(k)));
        let last = pass.queries().len() - 1;
        check(&pass.of_queries(last..last + 1), |_, _| true);
    }
}

/// VAREdit: document ids of `[source, scales]`, causal.
#[test]
fn edits_see_their_source() {
    let lengths: Vec<usize> = [36].into_iter().chain(squares_lengths()).collect();
    let d = ids(&lengths);
    check(&Visibility::source_then_target((6, 6), &squares()).unwrap(), |q, k| d[q] >= d[k]);

    // Layer 0: keys are the source, it pooled to each scale, the scales.
    let key_lengths: Vec<usize> = [36].into_iter().chain(squares_lengths()).chain(squares_lengths()).collect();
    let e = ids(&key_lengths);
    let aligned = Visibility::scale_aligned_source((6, 6), &squares()).unwrap();
    shape(&aligned, 111, 186);
    check(&aligned, |q, k| {
        let scale = d[q]; // 0: the source
        let pooled = (1..=5).contains(&e[k]) && e[k] == scale;
        let target = e[k] > 5 && e[k] - 5 <= scale;
        if scale == 0 { e[k] == 0 } else { pooled || target }
    });

    // doc_q >= doc_k and doc_q % T >= doc_k % T.
    let twice: Vec<usize> = [squares_lengths(), squares_lengths()].concat();
    let d = ids(&twice);
    let block = Visibility::edit_block(&squares()).unwrap();
    shape(&block, 150, 150);
    check(&block, |q, k| d[q] >= d[k] && d[q] % 5 >= d[k] % 5);
}

/// InfinityStar: a table from `get_scale_pack_info` for each example, texts after all scales, padding last.
#[test]
fn packs_are_infinitystars() {
    let clip = |frames| [1u32, 2, 3].map(|side| Segment::video(frames, side, side));
    let examples = [[clip(1), clip(2), clip(2)].concat(), clip(1).to_vec(), [clip(1), clip(3)].concat()];
    let texts = [5, 3, 4];
    let videos: Vec<PackedVideo> =
        examples.iter().zip(texts).map(|(scales, text)| PackedVideo { scales, text: text.into() }).collect();
    let scales: Vec<(usize, usize)> = examples
        .iter()
        .enumerate()
        .flat_map(|(example, scales)| (0..scales.len()).map(move |s| (example, s)))
        .collect();
    let mut lengths: Vec<usize> = examples.iter().flatten().map(|scale| scale.len() as usize).collect();
    lengths.extend(texts.map(|text| text as usize));
    lengths.push(9);
    let sid = ids(&lengths);

    for from_largest in [0usize, 1, 2, 3, 5] {
        // `querysid_refsid`.
        let mut table = vec![vec![false; lengths.len()]; lengths.len()];
        let mut first = 0;
        for (example, of) in examples.iter().enumerate() {
            for si in 0..of.len() {
                let (clip_id, context) = (si / 3, from_largest);
                let refs: Vec<usize> = match (context, clip_id) {
                    (0, _) => (0..si).collect(),
                    (_, 0) => vec![],
                    _ => vec![(clip_id - 1) * 3 + 3usize.saturating_sub(context)],
                };
                for seen in refs.into_iter().chain([si]) {
                    table[first + si][first + seen] = true;
                }
                table[first + si][scales.len() + example] = true;
            }
            table[scales.len() + example][scales.len() + example] = true;
            first += of.len();
        }
        let context = match from_largest {
            0 => ClipContext::Everything,
            from_largest => ClipContext::PreviousClip { scales_a_clip: 3, from_largest },
        };
        let pack = Visibility::packed_videos(&videos, context, 9).unwrap();
        check(&pack, |q, k| table[sid[q]][sid[k]]);
    }

    // What the last scale of the first example's last clip needs of a cache.
    let context = ClipContext::PreviousClip { scales_a_clip: 3, from_largest: 1 };
    let pack = Visibility::packed_videos(&videos, context, 9).unwrap();
    let (step, kept) = pack.of_queries(8..9).seen_keys();
    assert_eq!(kept, [5, 8, 18]);
    check(&step, |_, _| true);
    shape(&step, 18, 18 + 18 + 5);
}

/// `_generate_video_tower_mask`, `_generate_two_pyramid_mask`, `_generate_inner_scale_only_mask`: one video, its text
/// last.
#[test]
fn older_masks_of_infinitystar() {
    let lengths: Vec<usize> = squares_lengths().into_iter().chain([7]).collect();
    let d = ids(&lengths);
    let scales = square_segments();
    let visual = 75;
    let text_or = |q: usize, k: usize, more: bool| match q < visual {
        true => d[q] == d[k] || k >= visual || more,
        false => k >= visual,
    };
    let video = [PackedVideo { scales: &scales, text: Segment::tokens(7).with_length(0) }];
    let mask = |context| Visibility::packed_videos(&video, context, 0).unwrap();
    check(&mask(ClipContext::Nothing), |q, k| text_or(q, k, false));
    check(&mask(ClipContext::TwoPyramid { full: 2 }), |q, k| text_or(q, k, d[q] > d[k] && d[k] == 2));
    let full = [1, 3];
    check(&mask(ClipContext::Tower { full: &full, within: 3 }), |q, k| {
        text_or(q, k, d[q] > d[k] && d[q] - d[k] < 3 && full.contains(&d[k]))
    });
    assert_eq!(mask(ClipContext::Nothing).length_count(), 1);
}

#[test]
fn frames_see_the_past() {
    let (frames, scales, tokens) = (4, [1usize, 4, 9], 14);
    let frame = [(1, 1), (2, 2), (3, 3)];
    let d = ids(&scales);
    let within = |q: usize, k: usize| q / tokens == k / tokens && d[q % tokens] >= d[k % tokens];
    let all = Visibility::frame_causal(frames, &frame, Past::AllScales).unwrap();
    shape(&all, 56, 56);
    check(&all, |q, k| within(q, k) || k / tokens < q / tokens);
    let last = Visibility::frame_causal(frames, &frame, Past::LastScale).unwrap();
    check(&last, |q, k| within(q, k) || k / tokens < q / tokens && d[k % tokens] == 2);

    let sliding = Visibility::sliding_frames(frames, &frame, Past::LastScale, 1, 1).unwrap();
    check(&sliding, |q, k| {
        let (own, other) = (q / tokens, k / tokens);
        within(q, k) || (other < own && d[k % tokens] == 2 && (other + 1 == own || other == 0))
    });
    // Frames without scales.
    check(&Visibility::sliding_frames(6, &[(2, 2)], Past::AllScales, 2, 0).unwrap(), |q, k| {
        k / 4 <= q / 4 && q / 4 - k / 4 <= 2
    });
    shape(&Visibility::frame_causal::<u32>(3, &[], Past::AllScales).unwrap(), 0, 0);
}

/// The greatest c with c <= (place + 1/2) keys / queries.
fn centre(place: usize, queries: usize, keys: usize) -> usize {
    (0..keys).rev().find(|c| 2 * queries * c <= (2 * place + 1) * keys).unwrap()
}

fn near(q: [usize; 3], k: [usize; 3], of: [usize; 3], grid: [usize; 3], reach: [usize; 3]) -> bool {
    (0..3).all(|axis| centre(q[axis], of[axis], grid[axis]).abs_diff(k[axis]) <= reach[axis])
}

fn place(token: usize, [_, height, width]: [usize; 3]) -> [usize; 3] {
    [token / (height * width), token / width % height, token % width]
}

#[test]
fn windows_are_projected() {
    let grid = [3, 4, 5];
    let own = Visibility::window((3, 4, 5), 1, 2, 1).unwrap();
    check(&own, |q, k| near(place(q, grid), place(k, grid), grid, grid, [1, 2, 1]));
    let open = Visibility::window((3, 4, 5), u32::MAX, 0, u32::MAX).unwrap();
    check(&open, |q, k| place(q, grid)[1] == place(k, grid)[1]);

    let shapes = [[1, 1, 1], [1, 2, 3], [2, 4, 4], [3, 7, 5]];
    for of in shapes {
        for grid in shapes {
            for reach in [[0, 0, 0], [0, 1, 2], [2, 0, 1]] {
                let segment = |[t, h, w]: [usize; 3]| Segment::video(t as u32, h as u32, w as u32);
                let [frames, rows, columns] = reach.map(|n| n as u32);
                let rule = Rule::Window { frames, rows, columns };
                let window = Visibility::new(&[segment(of)], &[segment(grid)], |_, _| rule).unwrap();
                check(&window, |q, k| near(place(q, of), place(k, grid), of, grid, reach));
            }
        }
    }
}

#[test]
fn late_scales_see_sinks_and_their_surroundings() {
    let d = ids(&squares_lengths());
    let starts = [0, 1, 5, 14, 39];
    let local = Visibility::scale_local(&squares(), 3, 2, 1, 0).unwrap();
    check(&local, |q, k| {
        let (s, t) = (d[q], d[k]);
        if t > s {
            return false;
        }
        let grid = |scale: usize| [1, SIDES[scale] as usize, SIDES[scale] as usize];
        let (from, at) = (place(q - starts[s], grid(s)), place(k - starts[t], grid(t)));
        s < 3 || t < 2 || near(from, at, grid(s), grid(t), [0, 1, 0])
    });
}

#[test]
fn the_rest() {
    let pivots = Visibility::low_resolution_pivots(3, (2, 2), (4, 4)).unwrap();
    shape(&pivots, 23, 23);
    check(&pivots, |q, k| q >= 7 || k < 7);

    let cross = Visibility::cross_attention(10, Segment::tokens(6).with_length(0)).unwrap();
    shape(&cross, 10, 6);
    check(&cross, |_, _| true);
    assert_eq!(cross.length_count(), 1);

    let (d, e) = (ids(&squares_lengths()), ids(&[1, 2, 3, 4, 5]));
    check(&Visibility::guided(&squares(), &squares()).unwrap(), |q, k| d[q] >= d[k]);
    let other = [1u32, 2, 3, 4, 5].map(|n| (1, n));
    check(&Visibility::guided(&squares(), &other).unwrap(), |q, k| d[q] >= e[k]);
    check(&Visibility::guided(&squares(), &other).unwrap().step(2), |_, _| true);

    let step = Visibility::cached_step(Segment::tokens(40).with_length(1), (3, 3)).unwrap();
    shape(&step, 9, 49);
    check(&step, |_, _| true);
    assert_eq!((step.keys()[0].length(), step.keys()[1].length()), (Some(1), None));
}

/// A text that each query sees can stand before anything.
#[test]
fn prefixes_stand_before_anything() {
    let inner = Visibility::skip_causal(3, 4).unwrap();
    let outer = inner.with_prefix(Segment::tokens(5).with_length(0), Rule::Causal).unwrap();
    check(&outer, |q, k| match (q < 5, k < 5) {
        (true, _) => k <= q,
        (false, true) => true,
        (false, false) => inner.sees(q as u32 - 5, k as u32 - 5),
    });
}

fn rule() -> impl Strategy<Value = Rule> {
    prop_oneof![
        2 => Just(Rule::Hidden),
        2 => Just(Rule::Full),
        1 => Just(Rule::Causal),
        1 => Just(Rule::DiagonalCausal),
        1 => (0..3u32, 0..4u32, 0..4u32).prop_map(|(frames, rows, columns)| Rule::Window { frames, rows, columns }),
    ]
}

fn segment() -> impl Strategy<Value = Segment> {
    prop_oneof![
        1 => Just(Segment::tokens(0)),
        2 => (0..20u32).prop_map(Segment::tokens),
        2 => (1..6u32, 1..6u32).prop_map(|(height, width)| Segment::grid(height, width)),
        1 => (0..4u32, 1..4u32, 0..5u32).prop_map(|(frames, height, width)| Segment::video(frames, height, width)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases(), ..ProptestConfig::default() })]

    /// The parts of a visibility are parts of its mask, and pairs are counted right for any rules.
    #[test]
    fn parts_are_parts(
        segments in prop::collection::vec(segment(), 0..7),
        rules in prop::collection::vec(rule(), 49),
        range in (0..8usize, 0..8usize),
    ) {
        let whole = Visibility::new(&segments, &segments, |q, k| rules[q * 7 + k]).unwrap();
        check(&whole, |q, k| whole.sees(q as u32, k as u32));
        let n = segments.len();
        let range = range.0.min(range.1).min(n)..range.0.max(range.1).min(n);
        let first = if range.start < n { whole.query_range(range.start).start } else { whole.query_count() };
        let seen = |q: usize, k: usize| whole.sees(first + q as u32, k as u32);
        check(&whole.of_queries(range.clone()), seen);
        let steps = whole.steps(range.clone());
        check(&steps, seen);
        prop_assert_eq!(steps.keys(), &segments[..range.end]);
        for (q, k) in range.clone().flat_map(|q| (0..range.end).map(move |k| (q, k))) {
            prop_assert_eq!(steps.rule(q - range.start, k), rules[q * 7 + k]);
        }

        let part = whole.of_queries(range.clone());
        let (few, kept) = part.seen_keys();
        let hidden = |k: usize| range.clone().all(|q| rules[q * 7 + k] == Rule::Hidden);
        prop_assert_eq!(&kept, &(0..n).filter(|&k| !hidden(k)).collect::<Vec<_>>());
        let tokens: Vec<usize> = kept.iter().flat_map(|&k| whole.key_range(k)).map(|key| key as usize).collect();
        check(&few, |q, k| seen(q, tokens[k]));
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let many = [Segment::tokens(1 << 30); 2];
    let refused =
        |arg, visibility| matches!(visibility, Err(Error::Size { arg: a, got, .. }) if a == arg && got >= 1 << 31);
    assert!(refused("queries", Visibility::scale_causal(&many)));
    assert!(refused("keys", Visibility::cross_attention(1, (1 << 16, 1 << 16))));
    let shapes = [Segment::grid(2, 3), Segment::grid(3, 2)];
    let mixed = Visibility::new(&shapes, &shapes, |_, _| Rule::ColumnCausal);
    assert!(matches!(mixed, Err(Error::Unsupported { arg: "rule", .. })));
}

#[test]
#[should_panic(expected = "no query 75")]
fn there_are_no_more_queries() {
    Visibility::scale_causal(&squares()).unwrap().sees(75, 0);
}
