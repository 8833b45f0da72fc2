//! Chains of image tokens: every rule against an oracle in f64, the kernels against the host bit for bit, and the law of
//! speculative Jacobi decoding.

#![cfg(feature = "verification")]

mod support;
mod verification;
mod visual;

use nextscale::dtype::Float;
use nextscale::verification::{
    Accepted, Drafts, Emitted, Grouped, Lantern, Redraft, VisualOptions, VisualRule, VisualVerifier, status,
};
use nextscale::{DType, DeviceInfo, Error, bf16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{FLOATS, ForFloats, TestDevice, for_floats};
use visual::{Flaw, Outcome, Step};

const REDRAFTS: [Redraft; 4] = [Redraft::None, Redraft::Independent, Redraft::Maximal, Redraft::Gumbel];

/// A random step: ragged, with some of everything that is optional.
#[derive(Debug, Clone)]
struct Case {
    vocab: usize,
    batch: usize,
    max_drafts: usize,
    /// LANTERN, LANTERN++, grouped, Jacobi.
    rule: usize,
    redraft: Redraft,
    kind: Drafts,
    /// guidance, row_index, draft_row, allow, syntax, truncation, uniforms, bad rows, gaps, cold, codes, embeddings, ties
    with: [bool; 13],
    shift: usize,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let vocab = prop_oneof![4 => 2..60usize, 2 => 1000..1100usize, 1 => 2000..3200usize, 1 => Just(9 * 1024 + 5)];
    (
        vocab,
        0..4usize,
        0..4usize,
        0..4usize,
        0..4usize,
        0..3usize,
        proptest::array::uniform13(prop_oneof![2 => Just(false), 1 => Just(true)]),
        prop_oneof![2 => Just(0), 1 => 0..9usize],
        any::<u64>(),
    )
        .prop_map(|(vocab, batch, max_drafts, rule, redraft, kind, with, shift, seed)| Case {
            vocab,
            batch,
            max_drafts,
            rule,
            redraft: REDRAFTS[redraft],
            kind: [Drafts::Deterministic, Drafts::Logits, Drafts::LogitsAndStats][kind],
            with,
            shift,
            seed,
        })
}

impl Case {
    fn step<T: Float>(&self) -> Step<T> {
        let [
            guided,
            row_index,
            draft_row,
            allow,
            syntax,
            truncation,
            uniforms,
            bad,
            gaps,
            cold,
            codes,
            embeddings,
            ties,
        ] = self.with;
        let mut rng = StdRng::seed_from_u64(self.seed);
        let (v, batch, k) = (self.vocab, self.batch, self.max_drafts);
        let of_codes = if codes { (v / 4, v / 2) } else { (0, v) };
        let of_codes = (of_codes.0, of_codes.1.max(1));
        let few = of_codes.1.min(40);
        let rule = match self.rule {
            0 => VisualRule::Lantern(Lantern {
                accumulated: rng.random_range(0..=few * 2),
                zeroed: rng.random_range(0..=few * 2),
                bound: rng.random_range(0.01..0.5),
            }),
            1 => VisualRule::Lantern(Lantern {
                accumulated: rng.random_range(0..=few),
                zeroed: rng.random_range(0..=few),
                bound: 1.0 + rng.random_range(0.5..9.0f32),
            }),
            2 => VisualRule::Grouped(Grouped {
                below: rng.random_range(0..=15),
                above: rng.random_range(0..=15),
                probability_gap: rng.random_range(0.01..0.3),
                distance: 0.5,
                dim: if embeddings { rng.random_range(1..70) } else { 0 },
            }),
            _ => VisualRule::Jacobi,
        };
        let mut step = Step::<T>::new(v, batch, k, rule);
        (step.kind, step.shift, step.codes) = (self.kind, self.shift, of_codes);
        step.redraft = self.redraft;
        (step.target_stride, step.draft_stride) = (v + if gaps { 3 } else { 0 }, v + if gaps { 5 } else { 0 });
        for b in 0..batch {
            step.cu_rows[b + 1] = step.cu_rows[b] + rng.random_range(0..=k as i32 + 1);
        }
        let rows = batch * (k + 1);
        let physical = if row_index { rows + 3 } else { rows };
        let mut random = |len: usize| -> Vec<f32> {
            let grain = if ties { 4.0 } else { 4096.0 };
            (0..len).map(|_| (rng.random_range(-3.0..3.0f32) * grain).round() / grain).collect()
        };
        let logits = random(rows * v);
        let free = random(rows * v);
        let noise = random(batch * k * v);
        let place: Vec<usize> = match row_index {
            true if !physical.is_multiple_of(7) => (0..rows).map(|r| (r * 7 + 2) % physical).collect(),
            true => (0..rows).rev().collect(),
            false => (0..rows).collect(),
        };
        let spread = |of: &dyn Fn(usize) -> Vec<f32>, place: &[usize], physical: usize, stride: usize| -> Vec<T> {
            let len = if place.is_empty() { 0 } else { (physical - 1) * stride + v };
            let mut to = vec![T::from_f32(f32::NAN); len];
            for (r, &at) in place.iter().enumerate() {
                for (to, x) in to[at * stride..][..v].iter_mut().zip(of(r)) {
                    *to = T::from_f32(x);
                }
            }
            to
        };
        step.target = spread(&|r| logits[r * v..][..v].to_vec(), &place, physical, step.target_stride);
        if guided {
            step.target_free = Some(spread(&|r| free[r * v..][..v].to_vec(), &place, physical, step.target_stride));
            step.guidance = Some((0..batch).map(|_| [1.0, 3.0, 0.0, 1.5][rng.random_range(0..4)]).collect());
        }
        if row_index {
            step.row_index = Some(place.iter().map(|&at| at as i32).collect());
        }
        let temperature: Vec<f32> = (0..batch)
            .map(|_| if cold && rng.random_bool(0.4) { 0.0 } else { [1.0, 0.7, 1.4, 0.5][rng.random_range(0..4)] })
            .collect();
        step.temperature = Some(temperature.clone());
        if cold {
            step.draft_temperature = Some(temperature.iter().map(|t| t * 0.9 + 0.05).collect());
        }
        // What the drafter drew from is like what its row of the target is.
        let drafts = batch * k;
        let draft_place: Vec<usize> = (0..drafts).map(|d| if draft_row { drafts - 1 - d } else { d }).collect();
        let row_of = |d: usize| (step.cu_rows[d / k] as usize + d % k).min(rows - 1);
        if self.kind != Drafts::Deterministic {
            let with = |d: usize| (0..v).map(|x| logits[row_of(d) * v + x] + 0.3 * noise[d * v + x]).collect();
            step.draft = spread(&with, &draft_place, drafts, step.draft_stride);
            if guided {
                let free = |d: usize| free[row_of(d) * v..][..v].to_vec();
                step.draft_free = Some(spread(&free, &draft_place, drafts, step.draft_stride));
            }
        }
        if draft_row {
            step.draft_row = Some(vec![-1; rows]);
        }
        let mut stats = vec![0f32; drafts * 4];
        for b in 0..batch {
            for i in 0..step.rows_of(b).saturating_sub(1) {
                let r = step.cu_rows[b] as usize + i;
                let d = draft_place[b * k + i];
                let mut mixed: Vec<f32> = (0..v).map(|x| logits[r * v + x]).collect();
                if self.kind != Drafts::Deterministic {
                    for (x, mixed) in mixed.iter_mut().enumerate() {
                        let at = d * step.draft_stride + x;
                        *mixed = step.draft[at].to_f32();
                        if let Some(free) = &step.draft_free {
                            let free = free[at].to_f32();
                            *mixed = step.guidance.as_ref().unwrap()[b].mul_add(*mixed - free, free);
                        }
                    }
                    if let Some(rows) = &mut step.draft_row {
                        rows[r] = d as i32;
                    }
                }
                let temperature = step.draft_temperature.as_ref().map_or(temperature[b], |of| of[b]);
                let seed = [self.seed as i64 + r as i64];
                let (token, of) = verification::draft(&TestDevice::Host, &mixed, v, 0, temperature, &seed, &[r as i64]);
                step.drafts[r] = token[0];
                stats[d * 4..][..4].copy_from_slice(&of);
            }
        }
        if self.kind == Drafts::LogitsAndStats {
            step.draft_stats = Some(stats);
        }
        if let VisualRule::Lantern(Lantern { accumulated, zeroed, .. }) = rule {
            step.small_ids = rng.random_bool(0.5);
            // Each neighbour once, and here and there none.
            let width = accumulated.max(zeroed);
            for code in 0..of_codes.1 {
                let mut near: Vec<i32> = (1..of_codes.1).map(|n| ((code + n) % of_codes.1) as i32).collect();
                near.truncate(width);
                near.resize(width, -1);
                near.iter_mut().for_each(|id| {
                    if rng.random_bool(0.03) {
                        *id = [-1, of_codes.1 as i32, 65535][rng.random_range(0..3)];
                    }
                });
                step.neighbours.extend(near);
            }
        }
        if let VisualRule::Grouped(Grouped { dim, .. }) = rule {
            step.embeddings_dtype = FLOATS[rng.random_range(0..3)];
            let scale = 0.5 / (dim.max(1) as f32).sqrt();
            step.embeddings = (0..of_codes.1 * dim).map(|_| rng.random_range(-2.0..2.0f32) * scale).collect();
        }
        let words = v.div_ceil(32);
        if allow {
            let mut mask: Vec<u32> = (0..rows * words).map(|_| rng.random::<u32>() | rng.random::<u32>()).collect();
            (0..rows).for_each(|r| mask[r * words] |= 1);
            step.allow = Some(mask);
        }
        if syntax {
            step.syntax = Some((0..words).map(|_| rng.random::<u32>() & rng.random::<u32>()).collect());
        }
        if truncation {
            step.top_k = Some((0..batch).map(|_| [0, 1, 4, 30][rng.random_range(0..4)]).collect());
            step.top_p = Some((0..batch).map(|_| [1.0, 0.9, 0.6][rng.random_range(0..3)]).collect());
            step.min_p = Some((0..batch).map(|_| [0.0, 0.02, 0.2][rng.random_range(0..3)]).collect());
        }
        if uniforms && self.redraft != Redraft::Gumbel {
            step.uniforms = Some((0..rows * 4).map(|_| rng.random_range(0..1 << 24) as f32 / 16777216.0).collect());
        } else {
            step.seeds = Some((0..batch).map(|_| rng.random()).collect());
            step.positions = Some((0..batch).map(|_| rng.random_range(0..1 << 40)).collect());
        }
        if bad && rows > 0 {
            for _ in 0..4 {
                let r = rng.random_range(0..rows);
                let at = place[r] * step.target_stride;
                match rng.random_range(0..7) {
                    0 => step.target[at + rng.random_range(0..v)] = T::from_f32(f32::NAN),
                    1 => step.target[at..at + v].fill(T::from_f32(f32::NAN)),
                    2 => step.target[at..at + v].fill(T::from_f32(f32::NEG_INFINITY)),
                    3 => step.drafts[r] = [-1, v as i32, i32::MAX, i32::MIN][rng.random_range(0..4)],
                    4 => step.target[at..at + v / 2].fill(T::from_f32(f32::NEG_INFINITY)),
                    5 if !step.draft.is_empty() && self.kind == Drafts::Logits => {
                        let d = rng.random_range(0..drafts) * step.draft_stride;
                        let value = [f32::NAN, f32::NEG_INFINITY][rng.random_range(0..2)];
                        step.draft[d..d + v].fill(T::from_f32(value));
                    }
                    _ => {
                        if let Some(index) = &mut step.row_index {
                            index[r] = [-1, physical as i32, i32::MIN][rng.random_range(0..3)];
                        }
                    }
                }
            }
        }
        step
    }
}

/// The decision of each request is the oracle's, unless that was close. How many were.
fn agrees<T: Float>(step: &Step<T>, outcome: &Outcome, flaw: Flaw) -> Result<usize, String> {
    let (k, mut close) = (step.max_drafts + 1, 0);
    for b in 0..step.batch() {
        let tokens = &outcome.tokens[b * k..][..k];
        let (emitted, accepted) = (outcome.emitted[b], outcome.accepted[b]);
        if step.rows_of(b) == 0 {
            let nothing = tokens.iter().all(|&token| token == -1) && emitted == Emitted(0) && accepted == Accepted(0);
            if !(nothing && outcome.last_row[b] == -1) {
                return Err(format!("request {b} has no rows"));
            }
            continue;
        }
        let (n, token, redrafts, margin) = step.oracle(b, flaw);
        if margin < 1e-4 {
            close += 1;
            continue;
        }
        let first = step.cu_rows[b] as usize;
        let or_fallback = |token: Option<usize>| token.map_or(-7, |token| token as i32);
        let mut expected = vec![-1; k];
        expected[..n].copy_from_slice(&step.drafts[first..][..n]);
        expected[n] = or_fallback(token);
        if tokens != expected || accepted != Accepted(n as i32) || emitted != Emitted(n as i32 + 1) {
            return Err(format!("request {b}: {tokens:?} instead of {expected:?}, margin {margin}"));
        }
        if outcome.last_row[b] != (first + n) as i32 {
            return Err(format!("last row {}", outcome.last_row[b]));
        }
        if step.redraft != Redraft::None {
            let mut expected = vec![-1; k];
            for (to, redraft) in expected[n + 1..].iter_mut().zip(redrafts) {
                *to = or_fallback(redraft);
            }
            let got = &outcome.redrafts[b * k..][..k];
            if got != expected {
                return Err(format!("request {b}: re-drafts {got:?} instead of {expected:?}, margin {margin}"));
            }
            let stats = &outcome.stats()[b * k * 4..][..k * 4];
            let behind = n + 1..step.rows_of(b);
            if (0..k * 4).any(|at| !behind.contains(&(at / 4)) && !stats[at].is_nan()) {
                return Err(format!("request {b}: stats {stats:?}"));
            }
        }
    }
    Ok(close)
}

struct Oracle<'a>(&'a Case);
impl ForFloats for Oracle<'_> {
    fn call<T: Float, O: Float>(self) {
        let step = self.0.step::<T>();
        agrees(&step, &step.run(&TestDevice::Host), Flaw::None).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases() * 6, ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_the_definitions(case in case(), dtype in 0..3usize) {
        for_floats(FLOATS[dtype], DType::F32, Oracle(&case));
    }
}

struct SameBits<'a>(&'a TestDevice, &'a Case);
impl ForFloats for SameBits<'_> {
    fn call<T: Float, O: Float>(self) {
        let step = self.1.step::<T>();
        assert_eq!(step.run(self.0), step.run(&TestDevice::Host));
    }
}

#[test]
fn kernels_agree_with_the_host_bit_for_bit() {
    for device in TestDevice::kernels() {
        let config =
            ProptestConfig { cases: support::cases() * 2, failure_persistence: None, ..ProptestConfig::default() };
        proptest::test_runner::TestRunner::new(config)
            .run(&(case(), 0..3usize), |(case, dtype)| {
                for_floats(FLOATS[dtype], DType::F32, SameBits(&device, &case));
                Ok(())
            })
            .unwrap();
    }
}

fn plain(rule: usize) -> Case {
    Case {
        vocab: 60,
        batch: 40,
        max_drafts: 4,
        rule,
        redraft: Redraft::None,
        kind: Drafts::Logits,
        with: [false; 13],
        shift: 0,
        seed: 5,
    }
}

/// The comparison must be able to fail.
#[test]
fn wrong_decisions_are_told() {
    let lantern = |bound| VisualRule::Lantern(Lantern { accumulated: 20, zeroed: 21, bound });
    for (rule, flaw) in [
        (0, Flaw::ZeroesThoseAdded),
        (0, Flaw::ZeroesNone),
        (0, Flaw::OneTooMany),
        (1, Flaw::ZeroesNone),
        (1, Flaw::OneTooMany),
        (2, Flaw::OtherWay),
        (2, Flaw::OwnQ),
        (2, Flaw::HighestFirst),
        (2, Flaw::NoFallback),
        (3, Flaw::NoResidual),
        (3, Flaw::Unguided),
    ] {
        let mut case = Case { batch: 300, ..plain(rule) };
        case.with[0] = flaw == Flaw::Unguided;
        case.with[12] = flaw == Flaw::HighestFirst;
        let mut step = case.step::<f32>();
        match rule {
            0 | 1 => {
                step.rule = lantern(if rule == 0 { 0.2 } else { 3.0 });
                step.neighbours = (0..60).flat_map(|code| (1..=21).map(move |n| (code + n) % 60)).collect();
            }
            2 => {
                let below = if flaw == Flaw::NoFallback { 15 } else { 7 };
                step.rule = VisualRule::Grouped(Grouped { below, probability_gap: 0.5, ..Grouped::default() });
            }
            _ => {}
        }
        let outcome = step.run(&TestDevice::Host);
        agrees(&step, &outcome, Flaw::None).unwrap();
        agrees(&step, &outcome, flaw).expect_err(&format!("{flaw:?}"));
    }
}

/// The parameters that are published, at the size of an image model's vocabulary.
#[test]
fn published_parameters() {
    for device in TestDevice::kernels() {
        for rule in 0..4 {
            let vocab = if device.is_emulated() { 2048 } else { 16384 };
            let mut step = Case { vocab, batch: 3, max_drafts: 2, ..plain(rule) }.step::<bf16>();
            match &mut step.rule {
                VisualRule::Lantern(lantern) => {
                    *lantern = Lantern { bound: if rule == 0 { 0.1 } else { 3.0 }, ..Lantern::default() };
                    step.neighbours =
                        (0..vocab as i32).flat_map(|code| (1..=1001).map(move |n| (code + n) % vocab as i32)).collect();
                }
                VisualRule::Grouped(grouped) => *grouped = Grouped::default(),
                _ => {}
            }
            assert_eq!(step.run(&device), step.run(&TestDevice::Host));
        }
    }
}

/// Rows by which a draft is accepted or rejected exactly as the definition has it, whatever the rounding.
#[test]
fn groups_by_hand() {
    // Logits 0 to 19 in reverse: token 19 - r has rank r. p falls by e each rank.
    let row: Vec<f32> = (0..20).rev().map(|x| x as f32 * 1e-3).collect();
    for device in TestDevice::all() {
        let accepted = |d: i32, u: f32, grouped: Grouped, row: &[f32]| {
            let mut step = Step::<f32>::new(20, 1, 1, VisualRule::Grouped(grouped));
            (step.kind, step.draft) = (Drafts::Logits, vec![0.0; 20]);
            step.target[..20].copy_from_slice(row);
            step.drafts = vec![d, -1];
            step.uniforms = Some(vec![u, 0.5, 0.5, 0.5, 0.0, 0.5, 0.5, 0.5]);
            step.run(&device).accepted[0] == Accepted(1)
        };
        let p = |d: i32| f64::from(row[d as usize]).exp() / row.iter().map(|&x| f64::from(x).exp()).sum::<f64>() * 20.0;
        let u_of = |ratio: f64, above: f64| (ratio * above) as f32;
        // Rank 8: ranks 1 to 14 are the group, beside 14 tokens of q = 1/20.
        let group = |from: i32, to: i32| (from..=to).map(|rank| p(19 - rank)).sum::<f64>() / f64::from(to - from + 1);
        let published = Grouped::default();
        assert!(group(1, 14) < 1.0);
        for (d, ratio) in [(11, group(1, 14)), (12, group(0, 13)), (13, p(13)), (19, p(19))] {
            assert!(ratio < 0.9999);
            assert!(accepted(d, u_of(ratio, 0.99999), published, &row), "draft {d}");
            assert!(!accepted(d, u_of(ratio, 1.00001), published, &row), "draft {d}");
        }
        // At the top the group is short, and more probable than in q.
        assert!(accepted(0, 0.999, published, &row) && accepted(4, 0.999, published, &row));
        // Ties: all the same, but three tokens without probability, which are the lowest in the order. Draft 10 then has the
        // tokens 3 to 16 beside it: rank 10, the lower index first.
        let mut ties = vec![0.0f32; 20];
        ties[17..].fill(f32::NEG_INFINITY);
        // 17 tokens of 1/17; of token 10 the 7 below are 3 to 9, and 6 above: 11 to 16.
        assert!(accepted(10, 0.999, published, &ties));
        // Of token 3 the 7 below are 2, 1, 0, then 19, 18, 17 and no more: alone, and 1/17 > 1/20.
        assert!(accepted(3, 0.999, published, &ties));
        // Of token 4: 3 to 0, 19, 18, 17: a gap of 1/17 < 0.15, so they are in: 11 of 14 have p.
        let ratio = 11.0 / 17.0 / (14.0 / 20.0);
        assert!(accepted(4, u_of(ratio, 0.99999), published, &ties));
        assert!(!accepted(4, u_of(ratio, 1.00001), published, &ties));
        // With a narrower gap they are not.
        assert!(accepted(4, 0.999, Grouped { probability_gap: 0.05, ..published }, &ties));
    }
}

/// The bound as published: the last partial sum that is within it; and what a rejection leaves.
#[test]
fn neighbours_by_hand() {
    // Weights 1, 1, 2, 4, 8 of 16: the neighbours of 0 are 1, 2, 3, 4.
    let row: Vec<f32> = [1.0f32, 1.0, 2.0, 4.0, 8.0].map(|w| w.ln()).to_vec();
    for device in TestDevice::all() {
        let run = |lantern: Lantern, u: f32, token: f32, d: i32| {
            let mut step = Step::<f32>::new(5, 1, 1, VisualRule::Lantern(lantern));
            let width = lantern.accumulated.max(lantern.zeroed) as i32;
            step.neighbours = (0..5).flat_map(|code| (1..=width).map(move |n| (code + n) % 5)).collect();
            step.target[..5].copy_from_slice(&row);
            step.drafts = vec![d, -1];
            step.uniforms = Some(vec![u, 0.0, 0.0, token, 0.0, 0.0, 0.0, 0.0]);
            let outcome = step.run(&device);
            (outcome.accepted[0].0, outcome.tokens[0])
        };
        let four = |bound| Lantern { accumulated: 4, zeroed: 4, bound };
        // Within 0.2: 1/16 + 2/16.
        assert_eq!(run(four(0.2), 0.2499, 0.0, 0), (1, 0));
        // 1 to 4 and the draft itself are gone: uniform.
        for (token, u) in [(0, 0.1), (1, 0.3), (2, 0.5), (3, 0.7), (4, 0.9)] {
            assert_eq!(run(four(0.2), 0.2501, u, 0), (0, token));
        }
        // Within 1: all, whatever the rounding.
        assert_eq!(run(four(1.0), 0.9999, 0.0, 0), (1, 0));
        // lambda 3: within 3/16, as much as 0.2.
        assert_eq!(run(four(4.1), 0.2499, 0.0, 0), (1, 0));
        assert_eq!(run(four(4.1), 0.2501, 0.9, 0), (0, 4));
        // None within: p stays as it is, but for the draft.
        assert_eq!(run(four(0.05), 0.0624, 0.0, 0), (1, 0));
        assert_eq!(run(four(0.05), 0.0626, 0.0, 0), (0, 1));
        assert_eq!(run(four(0.0), 0.0626, 0.9, 0), (0, 4));
        // Only as many are zeroed as are to be, and none but the draft if that is none.
        assert_eq!(run(Lantern { accumulated: 4, zeroed: 3, bound: 0.2 }, 0.2501, 0.0, 0), (0, 4));
        assert_eq!(run(Lantern { accumulated: 2, zeroed: 0, bound: 0.2 }, 0.2501, 0.0, 0), (0, 1));
        // Fewer are added than the bound allows.
        assert_eq!(run(Lantern { accumulated: 1, zeroed: 1, bound: 0.9 }, 0.1251, 0.0, 0), (0, 2));
        // No neighbour is to be added: p(d).
        assert_eq!(run(Lantern { accumulated: 0, zeroed: 2, bound: 0.9 }, 0.0626, 0.0, 0), (0, 1));
    }
}

/// `u = 0` accepts nothing that has no probability, q = 0 is said, and p = q to the last bit is drawn from p.
#[test]
fn edges_of_the_test() {
    for device in TestDevice::all() {
        for rule in [VisualRule::Jacobi, VisualRule::Grouped(Grouped { below: 0, above: 0, ..Grouped::default() })] {
            let nothing = f32::NEG_INFINITY;
            let mut step = Step::<f32>::new(4, 1, 1, rule);
            step.target = vec![nothing, nothing, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0];
            (step.kind, step.draft) = (Drafts::Logits, vec![0.0; 4]);
            step.drafts = vec![0, -1];
            step.uniforms = Some(vec![0.0; 8]);
            let outcome = step.run(&device);
            assert_eq!((outcome.accepted[0], outcome.tokens, outcome.status[0]), (Accepted(0), vec![2, -1], 0));

            step.draft = vec![nothing, 0.0, 0.0, nothing];
            step.drafts = vec![3, -1];
            let outcome = step.run(&device);
            assert_eq!((outcome.accepted[0], outcome.status[0]), (Accepted(1), status::DRAFT_IMPOSSIBLE));

            let row = [0.3, -0.2, 1.0, nothing];
            step.target = [row, row].concat();
            (step.draft, step.uniforms, step.seeds) = (row.to_vec(), None, Some(vec![7]));
            let outcome = step.run(&device);
            assert_eq!((outcome.accepted[0], outcome.status[0]), (Accepted(0), status::DRAFT_IMPOSSIBLE));
            assert!((0..3).contains(&outcome.tokens[0]));
        }
    }
}

/// Every bad row sets its bit, gives a defined token, and changes nothing for the other requests.
#[test]
fn bad_rows_harm_no_one_else() {
    for device in TestDevice::all() {
        for rule in 0..4 {
            for redraft in [Redraft::None, Redraft::Maximal, Redraft::Gumbel] {
                let good = Case { batch: 5, vocab: 1500, redraft, ..plain(rule) }.step::<f32>();
                let reference = good.run(&device);
                let b = (0..5).find(|&b| good.rows_of(b) > 1).unwrap();
                let first = good.cu_rows[b] as usize;
                let row = first * 1500..(first + 1) * 1500;
                for bad in 0..5 {
                    let mut step = good.clone();
                    let mut expected = status::TARGET_EMPTY;
                    match bad {
                        0 => {
                            step.target[row.clone()].fill(f32::NAN);
                            expected |= status::TARGET_NAN;
                        }
                        1 => step.target[row.clone()].fill(f32::NEG_INFINITY),
                        2 => {
                            step.row_index = Some((0..good.drafts.len() as i32).collect());
                            step.row_index.as_mut().unwrap()[first] = -5;
                            expected |= status::ROW_OUT_OF_RANGE;
                        }
                        3 => {
                            step.target[row.start + 1200] = f32::INFINITY;
                            step.target[row.start + 1300] = f32::INFINITY;
                            expected = status::TARGET_BEYOND;
                        }
                        _ => {
                            step.draft[b * 4 * 1500 + 700] = f32::NAN;
                            expected = status::DRAFT_BAD;
                        }
                    }
                    let outcome = step.run(&device);
                    assert_eq!(outcome.status[b] & expected, expected, "{rule} {bad}: {:?}", outcome.status);
                    let token = outcome.tokens[b * 5];
                    match bad {
                        0..=2 => assert_eq!((token, outcome.emitted[b]), (-7, Emitted(1))),
                        3 => assert_eq!(token, 1200),
                        _ => assert!((0..1500).contains(&token)),
                    }
                    for other in (0..5).filter(|&other| other != b) {
                        assert_eq!(outcome.tokens[other * 5..][..5], reference.tokens[other * 5..][..5]);
                        assert_eq!(outcome.status[other], reference.status[other]);
                    }
                }
            }
        }
    }
}

/// Drafts and rows that are not there are not looked at.
#[test]
fn padding_and_lies_about_rows_are_harmless() {
    for device in TestDevice::all() {
        for rule in 0..4 {
            let mut step = Case { batch: 3, redraft: Redraft::Independent, ..plain(rule) }.step::<f32>();
            step.drafts.fill(-1);
            assert!(step.run(&device).accepted.iter().all(|&n| n == Accepted(0)));
            for lies in [[0, 100, 200, 300], [5, 3, 1, 0], [-3, 2, 4, 1 << 30], [i32::MIN, i32::MAX, 0, 7]] {
                step.cu_rows = lies.to_vec();
                assert_eq!(step.run(&device), step.run(&TestDevice::Host));
            }
            assert_ne!(step.run(&device).status[0] & status::DRAFTS_IGNORED, 0);
        }
    }
}

/// The draft's syntax is accepted, other tokens that are no codes are not.
#[test]
fn tokens_that_are_no_codes() {
    for device in TestDevice::all() {
        let mut step = Case { batch: 1, max_drafts: 1, kind: Drafts::Deterministic, ..plain(0) }.step::<f32>();
        step.codes = (10, 50);
        step.rule = VisualRule::Lantern(Lantern { accumulated: 1, zeroed: 1, bound: 0.5 });
        step.neighbours = vec![0; 50];
        step.cu_rows = vec![0, 2];
        step.drafts = vec![3, -1];
        step.uniforms = Some(vec![0.0; 8]);
        assert_eq!(step.run(&device).accepted[0], Accepted(0));
        step.syntax = Some(vec![1 << 3, 0]);
        step.uniforms.as_mut().unwrap()[0] = 0.999;
        assert_eq!(step.run(&device).accepted[0], Accepted(1));
    }
}

/// What a request gets does not depend on its place, on the others, or on how the plan cuts the work.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for device in TestDevice::all() {
        for rule in 0..4 {
            for redraft in [Redraft::None, Redraft::Gumbel] {
                let step = Case { vocab: 3000, batch: 6, redraft, ..plain(rule) }.step::<bf16>();
                let all = step.run(&device);
                assert_eq!(step.run(&device), all);
                let mut info = DeviceInfo::A100;
                info.sm_count = 1;
                assert_eq!(step.run_for(&device, &info), all);
                let b = (0..6).rev().find(|&b| step.rows_of(b) > 2).unwrap();
                let (first, rows) = (step.cu_rows[b] as usize, step.rows_of(b));
                let mut alone = step.clone();
                alone.cu_rows = vec![0, rows as i32];
                alone.target = step.target[first * 3000..][..rows * 3000].to_vec();
                alone.target.resize(5 * 3000, bf16::ZERO);
                alone.drafts = step.drafts[first..][..rows].to_vec();
                alone.drafts.resize(5, -1);
                alone.draft = step.draft[b * 4 * 3000..][..4 * 3000].to_vec();
                alone.temperature = Some(vec![step.temperature.as_ref().unwrap()[b]]);
                alone.seeds = Some(vec![step.seeds.as_ref().unwrap()[b]]);
                alone.positions = Some(vec![step.positions.as_ref().unwrap()[b]]);
                alone.shift = 3;
                let outcome = alone.run(&device);
                assert_eq!(outcome.tokens, all.tokens[b * 5..][..5], "{rule:?}");
                assert_eq!((outcome.accepted[0], outcome.status[0]), (all.accepted[b], all.status[b]));
                if redraft != Redraft::None {
                    assert_eq!(outcome.redrafts, all.redrafts[b * 5..][..5]);
                }
            }
        }
    }
}

#[test]
fn every_dtype_with_everything_at_the_edges() {
    for device in TestDevice::kernels() {
        for vocab in [1, 2, 31, 33, 1023, 1024, 1025, 2049, 8193] {
            for rule in 0..4 {
                for (i, dtype) in FLOATS.into_iter().enumerate() {
                    let mut with = [true; 13];
                    (with[0], with[6], with[9]) = ((vocab + i) % 2 == 0, false, false);
                    let redraft = REDRAFTS[(rule + i) % 4];
                    let seed = (vocab + rule) as u64;
                    let kind = [Drafts::Logits, Drafts::LogitsAndStats][(vocab + rule) % 2];
                    let case =
                        Case { vocab, batch: 3, max_drafts: 2, redraft, kind, with, shift: i, seed, ..plain(rule) };
                    for_floats(dtype, DType::F32, SameBits(&device, &case));
                }
            }
        }
    }
}

/// Beyond 65536 columns another word holds value and column; 2^18 is the most.
#[test]
fn large_vocabularies() {
    for device in TestDevice::kernels() {
        for vocab in [65536, 65537, 1 << 18] {
            let mut case = Case { vocab, batch: 1, max_drafts: 1, ..plain(2) };
            // Ties at both ends of the row.
            case.with[12] = true;
            let mut step = case.step::<bf16>();
            step.cu_rows = vec![0, 2];
            step.drafts = vec![vocab as i32 - 1, -1];
            assert_eq!(step.run(&device), step.run(&TestDevice::Host));
        }
    }
}

/// The bytes that the kernel moves: rows once for the sweep, those that are read again from the cache.
#[cfg(feature = "emulate")]
#[test]
fn rows_behind_a_rejection_are_not_read() {
    let mut step =
        Case { vocab: 8192, batch: 1, max_drafts: 7, kind: Drafts::Deterministic, ..plain(3) }.step::<bf16>();
    step.cu_rows = vec![0, 8];
    step.drafts.fill(0);
    // Token 0 has no probability anywhere.
    step.target.iter_mut().step_by(8192).for_each(|x| *x = bf16::NEG_INFINITY);
    let mut info = DeviceInfo::H200;
    let device = TestDevice::Emulated;
    let mut read = |sms| {
        info.sm_count = sms;
        nextscale::emulator::reset();
        assert_eq!(step.run_for(&device, &info).accepted[0], Accepted(0));
        nextscale::emulator::counters().global_load_bytes
    };
    // Four blocks are under way before the first rejection is known; with eight nothing is saved.
    let (one, all) = (read(1), read(132));
    assert!(one < all * 3 / 4, "{one} {all}");
}

/// With all drafts accepted the sweep is all that reads rows, but for the chunk that a token is drawn from; and so it is for
/// neighbours, one logit each.
#[cfg(feature = "emulate")]
#[test]
fn accepted_rows_are_read_once() {
    for rule in [0, 3] {
        let case = Case { vocab: 16384, batch: 2, max_drafts: 3, kind: Drafts::Deterministic, ..plain(rule) };
        let mut step = case.step::<bf16>();
        step.cu_rows = vec![0, 4, 8];
        step.drafts = vec![5, 6, 7, -1, 8, 9, 10, -1];
        step.uniforms = Some(vec![0.0; 32]);
        if rule == 0 {
            step.rule = VisualRule::Lantern(Lantern { accumulated: 64, zeroed: 65, bound: 0.1 });
            step.neighbours = (0..16384).flat_map(|code| (1..=65).map(move |n| (code + n * 37) % 16384)).collect();
        }
        nextscale::emulator::reset();
        let outcome = step.run(&TestDevice::Emulated);
        assert_eq!(outcome.accepted, [Accepted(3); 2]);
        let read = step.builder().build(&DeviceInfo::H200).unwrap().traffic().read as f64;
        let counted = nextscale::emulator::counters().global_load_bytes as f64;
        assert!(counted >= read && counted < read * 1.25, "{rule}: {counted} {read}");
    }
}

// ---- the law ----

/// A small image: logits of the next token by the last one, drawn by speculative Jacobi decoding.
struct Image {
    vocab: usize,
    target: Vec<f32>,
}

/// What is wrong with a decoder.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wrong {
    Nothing,
    /// q is that of the present step.
    OtherQ,
    /// Re-drafts with the noise of the residual: the accept test's neighbour in the same step.
    DraftsFromTheFuture,
    /// A lossy rule.
    Group,
}

/// The first three tokens of each request, counted by number.
fn decode(image: &Image, redraft: Redraft, wrong: Wrong, requests: usize, with_stats: bool) -> (Vec<u64>, f64) {
    let (v, window, first) = (image.vocab, 3usize, 3usize);
    let rule = match wrong {
        Wrong::Group => {
            VisualRule::Grouped(Grouped { below: 1, above: 1, probability_gap: 1.0, distance: 1.0, dim: 0 })
        }
        _ => VisualRule::Jacobi,
    };
    let row = |last: i32| &image.target[last as usize * v..][..v];
    let mut written: Vec<Vec<i32>> = vec![Vec::new(); requests];
    // Each request's drafts, and the rows that they were drawn from: first all the same.
    let mut drafts = vec![vec![0i32; window]; requests];
    let mut from = vec![vec![vec![0f32; v]; window]; requests];
    let mut stats = vec![[0f32; 4]; requests * window];
    let seeds: Vec<i64> = (0..requests as i64).map(|b| b.wrapping_mul(0x9E37_79B9_7F4A_7C15u64 as i64)).collect();
    for b in 0..requests {
        for i in 0..window {
            let (token, of) =
                verification::draft(&TestDevice::Host, &from[b][i], v, 1000 + i % 20, 1.0, &seeds[b..=b], &[1]);
            drafts[b][i] = token[0];
            stats[b * window + i] = of.try_into().unwrap();
        }
    }
    let (mut steps, mut emitted) = (0u64, 0u64);
    while written.iter().any(|tokens| tokens.len() < first) {
        let mut step = Step::<f32>::new(v, requests, window, rule);
        (step.redraft, step.kind) = (redraft, if with_stats { Drafts::LogitsAndStats } else { Drafts::Logits });
        step.draft = vec![0.0; requests * window * v];
        for b in 0..requests {
            let mut last = written[b].last().copied().unwrap_or(0);
            for i in 0..=window {
                step.target[(b * (window + 1) + i) * v..][..v].copy_from_slice(row(last));
                if i < window {
                    let of = if wrong == Wrong::OtherQ { row(last) } else { &from[b][i] };
                    step.draft[(b * window + i) * v..][..v].copy_from_slice(of);
                    last = drafts[b][i];
                    step.drafts[b * (window + 1) + i] = last;
                }
            }
        }
        if with_stats {
            step.draft_stats = Some(stats.concat());
        }
        step.seeds = Some(seeds.clone());
        step.positions = Some(written.iter().map(|tokens| 1 + tokens.len() as i64).collect());
        let outcome = step.run(&TestDevice::Host);
        let of_rows = outcome.stats();
        for b in 0..requests {
            let rows = b * (window + 1);
            let n = outcome.emitted[b].0 as usize;
            written[b].extend(&outcome.tokens[rows..rows + n]);
            (steps, emitted) = (steps + 1, emitted + n as u64);
            // Rows n to window gave drafts of the next tokens; what lies behind them starts anew.
            for i in 0..window {
                let r = n + i;
                if r <= window {
                    drafts[b][i] = match wrong {
                        Wrong::DraftsFromTheFuture => {
                            let p = softmax(&step.target[(rows + r) * v..][..v]);
                            let position = step.positions.as_ref().unwrap()[b] as u64;
                            // The uniforms that this position will be tested with in the next step.
                            let accept = verification::draws(seeds[b] as u64, position + n as u64, i).accept;
                            verification::sample(&p, [0.0, 0.0, accept], &mut 1.0).unwrap() as i32
                        }
                        _ => outcome.redrafts[rows + r],
                    };
                    from[b][i] = step.target[(rows + r) * v..][..v].to_vec();
                    stats[b * window + i] = of_rows[(rows + r) * 4..][..4].try_into().unwrap();
                } else {
                    from[b][i] = vec![0.0; v];
                    let position = 1 + written[b].len() as i64 + i as i64;
                    let (token, of) =
                        verification::draft(&TestDevice::Host, &from[b][i], v, 1000, 1.0, &seeds[b..=b], &[position]);
                    drafts[b][i] = token[0];
                    stats[b * window + i] = of.try_into().unwrap();
                }
            }
        }
    }
    let mut counts = vec![0u64; v.pow(first as u32)];
    for tokens in &written {
        counts[tokens[..first].iter().fold(0, |number, &token| number * v + token as usize)] += 1;
    }
    (counts, emitted as f64 / steps as f64)
}

fn softmax(row: &[f32]) -> Vec<f64> {
    verification::Sampling::PLAIN.probabilities(&row.iter().map(|&x| x.into()).collect::<Vec<_>>(), false, &mut 1.0)
}

/// How many standard deviations chi-square lies above its mean.
fn excess(image: &Image, redraft: Redraft, wrong: Wrong, requests: usize, with_stats: bool) -> f64 {
    let (counts, _) = decode(image, redraft, wrong, requests, with_stats);
    let chain = verification::Chain { vocab: image.vocab, target: image.target.clone(), draft: Vec::new() };
    let (chi, freedom) = chain.chi_square(&counts, 3, 1.0);
    (chi - freedom) / (2.0 * freedom).sqrt()
}

fn image(seed: u64) -> Image {
    let mut rng = StdRng::seed_from_u64(seed);
    Image { vocab: 4, target: (0..16).map(|_| rng.random_range(-2.0..2.0f32)).collect() }
}

/// Jacobi decoding has the law of the target in the joint, over several steps, with every way to draw the tail.
#[test]
fn jacobi_has_the_law_of_the_target() {
    for redraft in [Redraft::Independent, Redraft::Maximal, Redraft::Gumbel] {
        for with_stats in [false, true] {
            let excess = excess(&image(3), redraft, Wrong::Nothing, 12_000, with_stats);
            assert!(excess < 4.0, "{redraft:?} {with_stats}: {excess}");
        }
    }
}

#[test]
fn wrong_decoders_have_not() {
    for wrong in [Wrong::OtherQ, Wrong::DraftsFromTheFuture, Wrong::Group] {
        let excess = excess(&image(3), Redraft::Independent, wrong, 12_000, false);
        assert!(excess > 10.0, "{wrong:?}: {excess}");
    }
}

/// Coupled drafts change less from step to step, and more of them are accepted.
#[test]
fn couplings_accept_more() {
    let of = |redraft| decode(&image(3), redraft, Wrong::Nothing, 3_000, true).1;
    let (independent, maximal, gumbel) = (of(Redraft::Independent), of(Redraft::Maximal), of(Redraft::Gumbel));
    assert!(independent < gumbel && gumbel < maximal + 0.05, "{independent} {gumbel} {maximal}");
}

// ---- what is refused ----

#[test]
fn bad_plans_are_refused() {
    type Builder = nextscale::verification::VisualVerifierBuilder<f32>;
    let builder = || VisualVerifier::<f32>::builder(4, 3, 100, VisualRule::Jacobi);
    let build = |b: Builder| b.build(&DeviceInfo::H200).map(|_| ());
    assert_eq!(build(builder()), Ok(()));
    let size = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    let jacobi = VisualRule::Jacobi;
    size(build(VisualVerifier::builder(4, 3, 0, jacobi)), "vocab");
    size(build(VisualVerifier::builder(4, 3, (1 << 18) + 1, jacobi)), "vocab");
    size(build(VisualVerifier::builder((1 << 20) + 1, 3, 10, jacobi)), "batch");
    size(build(VisualVerifier::builder(4, 1024, 10, jacobi)), "max_drafts");
    size(build(builder().target_rows(1 << 31)), "target_rows");
    size(build(builder().draft_rows(1 << 31)), "draft_rows");
    size(build(builder().codes(100, 1)), "first code");
    size(build(builder().codes(0, 0)), "codes");
    size(build(builder().codes(50, 51)), "codes");
    let of = |rule| build(VisualVerifier::builder(4, 3, 100, rule));
    let lantern = Lantern::default();
    size(of(VisualRule::Lantern(Lantern { accumulated: 65536, ..lantern })), "accumulated");
    size(of(VisualRule::Lantern(Lantern { zeroed: 65536, ..lantern })), "zeroed");
    let grouped = Grouped::default();
    size(of(VisualRule::Grouped(Grouped { below: 16, ..grouped })), "below");
    size(of(VisualRule::Grouped(Grouped { above: 16, ..grouped })), "above");
    size(of(VisualRule::Grouped(Grouped { dim: 65537, ..grouped })), "dim");
    let refused = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Unsupported { arg, .. }) if arg == name), "{result:?}");
    };
    for number in [-0.1, f32::NAN] {
        refused(of(VisualRule::Lantern(Lantern { bound: number, ..lantern })), "bound");
        refused(of(VisualRule::Grouped(Grouped { probability_gap: number, ..grouped })), "probability_gap");
        refused(of(VisualRule::Grouped(Grouped { distance: number, ..grouped })), "distance");
    }
    let stride = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Stride { arg, .. }) if arg == name), "{result:?}");
    };
    stride(build(builder().target_row_stride(99)), "target");
    stride(build(builder().draft_row_stride(-100)), "draft");
    stride(build(builder().allow_row_stride(3)), "allow");
    let wide = VisualVerifier::<f32>::builder(1, 1, 100, VisualRule::Lantern(lantern));
    stride(build(wide.neighbours_row_stride(1000)), "neighbours");
    let wide = VisualVerifier::<f32>::builder(1, 1, 100, VisualRule::Grouped(Grouped { dim: 8, ..grouped }));
    stride(build(wide.embeddings_row_stride(7)), "embeddings");
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder().build(&old), Err(Error::UnsupportedDevice { have: Some(_), .. })));
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<VisualVerifier<bf16>>();
}

#[test]
fn empty_problems_need_nothing() {
    for device in TestDevice::all() {
        let outcome = Step::<f32>::new(10, 0, 3, VisualRule::Jacobi).run(&device);
        assert!(outcome.tokens.is_empty() && outcome.emitted.is_empty());
        let mut step = Step::<f32>::new(10, 3, 2, VisualRule::Jacobi);
        step.cu_rows.fill(0);
        let outcome = step.run(&device);
        assert_eq!((outcome.tokens, outcome.last_row), (vec![-1; 9], vec![-1; 3]));
        assert_eq!(outcome.emitted, [Emitted(0); 3]);
    }
}

/// What a run refuses, and that it then writes nothing.
#[test]
fn bad_buffers_are_refused_before_anything_is_written() {
    use nextscale::verification::{Embeddings, Neighbours, VisualOut, VisualVerifierArgs};
    use support::Buffer;
    for device in TestDevice::all() {
        let builder = |rule| VisualVerifier::<f32>::builder(2, 1, 10, rule);
        let build =
            |builder: nextscale::verification::VisualVerifierBuilder<f32>| builder.build(&DeviceInfo::H200).unwrap();
        let target = Buffer::of(&device, &[0f32; 40], 0);
        let (cu_rows, drafts) = (Buffer::of(&device, &[0, 2, 4], 0), Buffer::of(&device, &[1, -1, 1, -1], 0));
        let floats = Buffer::of(&device, &[0f32; 40], 0);
        let ids = Buffer::of(&device, &[0u16; 40], 0);
        let mut tokens = Buffer::<i32>::poisoned(&device, 4, 0);
        let mut emitted = Buffer::<Emitted>::poisoned(&device, 2, 0);
        let mut accepted = Buffer::<Accepted>::poisoned(&device, 2, 0);
        let mut status = Buffer::<u32>::poisoned(&device, 2, 0);
        let mut redrafts = Buffer::<i32>::poisoned(&device, 4, 0);
        let plain = build(builder(VisualRule::Jacobi));
        let mut workspace = Buffer::<u8>::poisoned(&device, plain.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(&device, &[0u32; 4], 0);
        assert_eq!(plain.counter_words(), 4);
        let mut run = |plan: &VisualVerifier<f32>, lens: [usize; 4], options: VisualOptions<'_, f32>, re: bool| {
            let args = VisualVerifierArgs {
                target: target.input_of(lens[0]),
                cu_rows: cu_rows.input_of(lens[1]),
                drafts: drafts.input_of(lens[2]),
                options,
                out: VisualOut {
                    tokens: tokens.output(),
                    emitted: emitted.output(),
                    accepted: accepted.output(),
                    status: status.output(),
                    last_row: None,
                    redrafts: re.then(|| redrafts.output()),
                    redraft_stats: None,
                },
                workspace: workspace.output_of(if lens[3] == 0 { 3 } else { plan.workspace_bytes() as usize }),
                counters: counters.output_of(lens[3]),
            };
            plan.run(&device.stream(), args)
        };
        let none = VisualOptions::default;
        let length = |arg, need, got| Err(Error::Length { arg, need, got });
        assert_eq!(run(&plain, [39, 3, 4, 4], none(), false), length("target", 40, 39));
        assert_eq!(run(&plain, [40, 2, 4, 4], none(), false), length("cu_rows", 3, 2));
        assert_eq!(run(&plain, [40, 3, 3, 4], none(), false), length("drafts", 4, 3));
        assert_eq!(run(&plain, [40, 3, 4, 3], none(), false), length("counters", 4, 3));
        assert!(matches!(run(&plain, [40, 3, 4, 0], none(), false), Err(Error::Workspace { got: 3, .. })));
        let refused = |result, name: &str| {
            assert!(matches!(result, Err(Error::Unsupported { arg, .. }) if arg == name), "{result:?} {name}");
        };
        let all = [40, 3, 4, 4];
        let draft = || VisualOptions { draft: Some(floats.input_of(20)), ..none() };
        refused(run(&plain, all, draft(), false), "draft");
        refused(
            run(&plain, all, VisualOptions { draft_stats: Some(floats.input_of(8)), ..none() }, false),
            "draft_stats",
        );
        refused(run(&plain, all, VisualOptions { target_free: Some(floats.input()), ..none() }, false), "target_free");
        refused(run(&plain, all, VisualOptions { guidance: Some(floats.input_of(2)), ..none() }, false), "guidance");
        let near = || VisualOptions { neighbours: Some(Neighbours::U16(ids.input_of(20))), ..none() };
        refused(run(&plain, all, near(), false), "neighbours");
        let vectors = || VisualOptions { embeddings: Some(Embeddings::F32(floats.input_of(20))), ..none() };
        refused(run(&plain, all, vectors(), false), "embeddings");
        refused(run(&plain, all, none(), true), "redrafts");
        let gumbel = build(builder(VisualRule::Jacobi).redraft(Redraft::Gumbel));
        refused(run(&gumbel, all, none(), false), "redrafts");
        refused(run(&gumbel, all, VisualOptions { uniforms: Some(floats.input_of(16)), ..none() }, true), "uniforms");
        let guided = build(builder(VisualRule::Jacobi).guided().drafts(Drafts::Logits));
        refused(run(&guided, all, none(), false), "target_free");
        let free = VisualOptions { target_free: Some(floats.input()), ..draft() };
        refused(run(&guided, all, free, false), "draft_free");
        let lantern = build(builder(VisualRule::Lantern(Lantern { accumulated: 2, zeroed: 1, bound: 0.1 })));
        refused(run(&lantern, all, none(), false), "neighbours");
        let short = VisualOptions { neighbours: Some(Neighbours::U16(ids.input_of(19))), ..none() };
        assert_eq!(run(&lantern, all, short, false), length("neighbours", 20, 19));
        let grouped = build(builder(VisualRule::Grouped(Grouped { dim: 2, ..Grouped::default() })));
        refused(run(&grouped, all, none(), false), "embeddings");
        let short = VisualOptions { embeddings: Some(Embeddings::F32(floats.input_of(19))), ..none() };
        assert_eq!(run(&grouped, all, short, false), length("embeddings", 20, 19));
        assert!(tokens.read().iter().all(|&token| token == -1) && status.read().iter().all(|&said| said == u32::MAX));
    }
}

/// A captured graph takes what the buffers hold when it is replayed.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn graphs_replay() {
    use nextscale::verification::{VisualOut, VisualVerifierArgs};
    use support::Buffer;
    let Some(TestDevice::Cuda(stream)) = TestDevice::cuda() else { return };
    let device = TestDevice::Cuda(stream.clone());
    let step = Case { vocab: 16384, redraft: Redraft::Gumbel, ..plain(3) }.step::<bf16>();
    let plan = step.builder().build(&DeviceInfo::of(&stream).unwrap()).unwrap();
    let (target, draft) = (Buffer::of(&device, &step.target, 0), Buffer::of(&device, &step.draft, 0));
    let (cu_rows, mut drafts) = (Buffer::of(&device, &step.cu_rows, 0), Buffer::of(&device, &step.drafts, 0));
    let temperature = Buffer::of(&device, step.temperature.as_ref().unwrap(), 0);
    let seeds = Buffer::of(&device, step.seeds.as_ref().unwrap(), 0);
    let mut positions = Buffer::of(&device, step.positions.as_ref().unwrap(), 0);
    let (batch, rows) = (step.batch(), step.drafts.len());
    let mut tokens = Buffer::<i32>::poisoned(&device, rows, 0);
    let mut redrafts = Buffer::<i32>::poisoned(&device, rows, 0);
    let mut emitted = Buffer::<Emitted>::poisoned(&device, batch, 0);
    let mut accepted = Buffer::<Accepted>::poisoned(&device, batch, 0);
    let mut status = Buffer::<u32>::poisoned(&device, batch, 0);
    let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
    let mut counters = Buffer::of(&device, &vec![0u32; plan.counter_words()], 0);
    let mut run = |drafts: &Buffer<i32>, positions: &Buffer<i64>| {
        let args = VisualVerifierArgs {
            target: target.input(),
            cu_rows: cu_rows.input(),
            drafts: drafts.input(),
            options: VisualOptions {
                draft: Some(draft.input()),
                temperature: Some(temperature.input()),
                seeds: Some(seeds.input()),
                positions: Some(positions.input()),
                ..VisualOptions::default()
            },
            out: VisualOut {
                tokens: tokens.output(),
                emitted: emitted.output(),
                accepted: accepted.output(),
                status: status.output(),
                last_row: None,
                redrafts: Some(redrafts.output()),
                redraft_stats: None,
            },
            workspace: workspace.output(),
            counters: counters.output(),
        };
        plan.run(&stream, args).unwrap();
    };
    run(&drafts, &positions); // loads the code
    let graph = support::capture(&stream, || run(&drafts, &positions));
    for replay in 0..3 {
        let mut now = step.clone();
        now.positions.as_mut().unwrap().iter_mut().for_each(|position| *position += replay);
        now.drafts.rotate_left(replay as usize * (step.max_drafts + 1));
        drafts.write(&now.drafts);
        positions.write(now.positions.as_ref().unwrap());
        graph.launch().unwrap();
        let host = now.run(&TestDevice::Host);
        assert_eq!((tokens.read(), redrafts.read()), (host.tokens, host.redrafts));
    }
}
