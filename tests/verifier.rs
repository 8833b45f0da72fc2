//! Chains of drafts: every rule against an oracle in f64, and the kernels against the host token for token.

#![cfg(feature = "verification")]

mod support;
mod verification;

use nextscale::dtype::Float;
use nextscale::verification::{Accepted, Drafts, Emitted, Rule, Verifier, VerifierBuilder, status};
use nextscale::{DType, DeviceInfo, Error, bf16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{FLOATS, ForFloats, TestDevice, for_floats};
use verification::{Flaw, Outcome, Step};

const RULES: [Rule; 4] = [Rule::Greedy, Rule::Match, Rule::Reject, Rule::Block];

/// A random step: ragged, of mixed rules and temperatures, with some of everything that is optional.
#[derive(Debug, Clone)]
struct Case {
    vocab: usize,
    batch: usize,
    max_drafts: usize,
    rule: Rule,
    kind: Drafts,
    /// row_index, draft_row, reduced draft vocabulary, target_stats, allow, rules, truncation, uniforms, log_probs, bad rows,
    /// draft temperature, gaps between rows, greedy requests
    with: [bool; 13],
    shift: [usize; 2],
    trials: Option<u32>,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let vocab = prop_oneof![4 => 2..40usize, 1 => 1000..1100usize, 1 => 2000..3200usize, 1 => Just(9 * 1024 + 5)];
    (
        vocab,
        0..5usize,
        0..5usize,
        0..4usize,
        0..3usize,
        proptest::array::uniform13(prop_oneof![2 => Just(false), 1 => Just(true)]),
        prop_oneof![2 => Just([0; 2]), 1 => [0..9usize, 0..9usize]],
        prop_oneof![Just(None), Just(Some(0)), Just(Some(3)), Just(Some(12))],
        any::<u64>(),
    )
        .prop_map(|(vocab, batch, max_drafts, rule, kind, with, shift, trials, seed)| Case {
            vocab,
            batch,
            max_drafts,
            rule: RULES[rule],
            kind: [Drafts::Deterministic, Drafts::Logits, Drafts::LogitsAndStats][kind],
            with,
            shift,
            trials,
            seed,
        })
}

impl Case {
    fn step<P: Float, Q: Float>(&self) -> Step<P, Q> {
        let [
            row_index,
            draft_row,
            reduced,
            target_stats,
            allow,
            rules,
            truncation,
            uniforms,
            log_probs,
            bad,
            warm,
            gaps,
            cold,
        ] = self.with;
        let mut rng = StdRng::seed_from_u64(self.seed);
        let (v, batch, k) = (self.vocab, self.batch, self.max_drafts);
        let mut step = Step::<P, Q>::new(v, batch, k);
        (step.rule, step.kind, step.trials, step.shift) = (self.rule, self.kind, self.trials, self.shift);
        (step.log_probs, step.target_stride) = (log_probs, v + if gaps { 3 } else { 0 });
        // Ragged, and now and then nothing.
        for b in 0..batch {
            step.cu_rows[b + 1] = step.cu_rows[b] + rng.random_range(0..=k as i32 + 1);
        }
        let rows = batch * (k + 1);
        let physical = rows + 3;
        let logits: Vec<f32> = (0..rows * v).map(|_| rng.random_range(-3.0..3.0f32)).collect();
        // Where each row of the step lies.
        let place: Vec<usize> = match row_index {
            true => (0..rows).map(|r| (r * 7 + 2) % physical).collect(),
            false => (0..rows).collect(),
        };
        let place: Vec<usize> = if row_index && physical.is_multiple_of(7) { (0..rows).rev().collect() } else { place };
        let of = if rows == 0 { 0 } else { (physical - 1) * step.target_stride + v };
        step.target = vec![P::from_f32(f32::NAN); of];
        for r in 0..rows {
            for x in 0..v {
                step.target[place[r] * step.target_stride + x] = P::from_f32(logits[r * v + x]);
            }
        }
        if row_index {
            step.row_index = Some(place.iter().map(|&at| at as i32).collect());
        }
        let temperatures = [1.0f32, 0.7, 1.4, 0.3];
        let mut temperature: Vec<f32> = (0..batch).map(|_| temperatures[rng.random_range(0..4)]).collect();
        if cold {
            temperature.iter_mut().for_each(|t| {
                if rng.random_bool(0.4) {
                    *t = 0.0;
                }
            });
        }
        step.temperature = Some(temperature.clone());
        if warm {
            step.draft_temperature = Some(temperature.iter().map(|t| t * 0.9 + 0.05).collect());
        }
        // The drafter knows some of the tokens, in another order.
        step.draft_vocab = if reduced { v.div_ceil(2) } else { v };
        let known: Vec<Option<usize>> = (0..v)
            .map(|token| match reduced {
                true => (token % 2 == 0).then_some((token / 2 + 1) % step.draft_vocab),
                false => Some(token),
            })
            .collect();
        if reduced {
            step.target_to_draft = Some(known.iter().map(|column| column.map_or(-1, |c| c as i32)).collect());
        }
        step.draft_stride = step.draft_vocab + if gaps { 5 } else { 0 };
        let drafts = batch * k;
        if self.kind != Drafts::Deterministic {
            let len = if drafts == 0 { 0 } else { (drafts - 1) * step.draft_stride + step.draft_vocab };
            step.draft = vec![Q::from_f32(0.0); len];
        }
        let mut stats = vec![0f32; drafts * 4];
        let draft_place: Vec<usize> = (0..drafts).map(|d| if draft_row { drafts - 1 - d } else { d }).collect();
        if draft_row {
            step.draft_row = Some(vec![-1; rows]);
        }
        let given = &step.draft_temperature.clone().unwrap_or(temperature);
        for b in 0..batch {
            for i in 0..step.rows_of(b).saturating_sub(1) {
                let r = step.cu_rows[b] as usize + i;
                let d = draft_place[b * k + i];
                let mut weights = vec![0f64; v];
                let mut row = vec![0f32; step.draft_vocab];
                for (token, column) in known.iter().enumerate() {
                    if let Some(column) = column {
                        row[*column] = Q::from_f32(logits[r * v + token] + rng.random_range(-1.5..1.5f32)).to_f32();
                        weights[token] = f64::from(row[*column] / given[b].max(0.1)).exp();
                    }
                }
                if self.kind != Drafts::Deterministic {
                    for (column, &logit) in row.iter().enumerate() {
                        step.draft[d * step.draft_stride + column] = Q::from_f32(logit);
                    }
                    if let Some(rows) = &mut step.draft_row {
                        rows[r] = d as i32;
                    }
                    stats[d * 4..][..4].copy_from_slice(&stats_of(&row, given[b]));
                }
                let three = std::array::from_fn(|_| rng.random_range(0.0..1.0f32));
                let mut drawn = verification::sample(&weights, three, &mut 1.0).unwrap();
                // A greedy drafter draws the lowest of the greatest.
                if given[b] < 1e-5 {
                    let top = known.iter().map(|c| c.map_or(f32::NEG_INFINITY, |c| row[c])).fold(f32::MIN, f32::max);
                    let column = row.iter().position(|&x| x == top).unwrap();
                    drawn = known.iter().position(|&c| c == Some(column)).unwrap();
                }
                step.drafts[r] = drawn as i32;
            }
        }
        if self.kind == Drafts::LogitsAndStats {
            step.draft_stats = Some(stats);
        }
        if allow {
            let words = v.div_ceil(32);
            let mut mask: Vec<u32> = (0..rows * words).map(|_| rng.random::<u32>() | rng.random::<u32>()).collect();
            (0..rows).for_each(|r| mask[r * words] |= 1);
            step.allow = Some(mask);
        }
        if rules {
            step.rules = Some((0..batch).map(|_| rng.random_range(-1..5)).collect());
        }
        if truncation {
            step.top_k = Some((0..batch).map(|_| [0, 1, 4, 30][rng.random_range(0..4)]).collect());
            step.top_p = Some((0..batch).map(|_| [1.0, 0.9, 0.6][rng.random_range(0..3)]).collect());
            step.min_p = Some((0..batch).map(|_| [0.0, 0.02, 0.2][rng.random_range(0..3)]).collect());
        }
        if uniforms {
            step.uniforms = Some((0..rows * 4).map(|_| rng.random_range(0..1 << 24) as f32 / 16777216.0).collect());
        } else {
            step.seeds = Some((0..batch).map(|_| rng.random()).collect());
            step.positions = Some((0..batch).map(|_| rng.random_range(0..1 << 40)).collect());
        }
        if bad && rows > 0 {
            for _ in 0..4 {
                let r = rng.random_range(0..rows);
                let at = place[r] * step.target_stride;
                match rng.random_range(0..6) {
                    0 => step.target[at + rng.random_range(0..v)] = P::from_f32(f32::NAN),
                    1 => step.target[at..at + v].fill(P::from_f32(f32::NAN)),
                    2 => step.target[at..at + v].fill(P::from_f32(f32::NEG_INFINITY)),
                    3 => step.drafts[r] = [-1, v as i32, i32::MAX, i32::MIN][rng.random_range(0..4)],
                    4 if !step.draft.is_empty() && self.kind == Drafts::Logits => {
                        let d = rng.random_range(0..drafts) * step.draft_stride;
                        let value = [f32::NAN, f32::NEG_INFINITY][rng.random_range(0..2)];
                        step.draft[d..d + step.draft_vocab].fill(Q::from_f32(value));
                    }
                    _ => {
                        if let Some(index) = &mut step.row_index {
                            index[r] = [-1, physical as i32, i32::MIN][rng.random_range(0..3)];
                        }
                    }
                }
            }
        }
        if target_stats && !allow {
            step.target_stats = Some(target_stats_of(&step));
        }
        step
    }
}

/// What a drafter stores, by the op.
fn stats_of(row: &[f32], temperature: f32) -> [f32; 4] {
    let (_, stats) = verification::draft(&TestDevice::Host, row, row.len(), 0, temperature, &[0], &[0]);
    stats.try_into().unwrap()
}

/// Partials of the physical rows at the temperature of the request that each belongs to.
fn target_stats_of<P: Float, Q: Float>(step: &Step<P, Q>) -> Vec<f32> {
    use nextscale::verification::{RowStats, RowStatsArgs};
    use nextscale::{In, Out, Stream};
    let physical = if step.target.is_empty() { 0 } else { (step.target.len() - step.vocab) / step.target_stride + 1 };
    let chunks = step.vocab.div_ceil(1024);
    let mut temperature = vec![1f32; physical];
    for b in 0..step.batch() {
        for i in 0..step.rows_of(b) {
            let r = step.cu_rows[b] as usize + i;
            let at = step.row_index.as_ref().map_or(r as i32, |index| index[r]);
            if (0..physical as i32).contains(&at) {
                let greedy = step.rule_of(b) == Rule::Greedy;
                // Logarithms of probabilities of greedy rows are those at temperature 1.
                let of = step.temperature.as_ref().unwrap()[b];
                temperature[at as usize] = if (greedy || of < 1e-5) && step.log_probs { 1.0 } else { of };
            }
        }
    }
    let mut partials = vec![0f32; physical * chunks * 2];
    RowStats::<P>::builder(physical, step.vocab)
        .row_stride(step.target_stride as i64)
        .build(&DeviceInfo::H200)
        .unwrap()
        .run(
            &Stream::host(),
            RowStatsArgs {
                logits: In::host(&step.target),
                temperature: Some(In::host(&temperature)),
                allow: None,
                partials: Out::host(&mut partials),
            },
        )
        .unwrap();
    partials
}

/// The decision of each request is the oracle's, unless that was close.
fn agrees<P: Float, Q: Float>(step: &Step<P, Q>, outcome: &Outcome, flaw: Flaw) -> Result<usize, String> {
    let (k, mut close) = (step.max_drafts + 1, 0);
    for b in 0..step.batch() {
        let tokens = &outcome.tokens[b * k..][..k];
        let (emitted, accepted) = (outcome.emitted[b], outcome.accepted[b]);
        let rows = step.rows_of(b);
        if rows == 0 {
            let nothing = tokens.iter().all(|&token| token == -1) && emitted == Emitted(0) && accepted == Accepted(0);
            if !(nothing && outcome.last_row[b] == -1) {
                return Err(format!("request {b} has no rows"));
            }
            continue;
        }
        let (n, token, margin) = step.oracle_with(b, flaw);
        if margin < 1e-4 {
            close += 1;
            continue;
        }
        let first = step.cu_rows[b] as usize;
        let mut expected = vec![-1; k];
        expected[..n].copy_from_slice(&step.drafts[first..][..n]);
        expected[n] = token.map_or(-7, |token| token as i32);
        // Thinning draws otherwise than a sweep.
        let thinned =
            step.rule_of(b) == Rule::Reject && step.uniforms.is_none() && step.trials != Some(0) && n < rows - 1;
        let same = if thinned { tokens[..n] == expected[..n] && tokens[n] != -1 } else { tokens == expected };
        if !same || accepted != Accepted(n as i32) || emitted != Emitted(n as i32 + 1) {
            return Err(format!("request {b}: {tokens:?} instead of {expected:?}, margin {margin}"));
        }
        if outcome.last_row[b] != (first + n) as i32 {
            return Err(format!("last row {}", outcome.last_row[b]));
        }
    }
    Ok(close)
}

struct Oracle<'a>(&'a Case);
impl ForFloats for Oracle<'_> {
    fn call<P: Float, Q: Float>(self) {
        let step = self.0.step::<P, Q>();
        agrees(&step, &step.run(&TestDevice::Host), Flaw::None).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases() * 8, ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_the_definitions(case in case(), dtypes in 0..9usize) {
        for_floats(FLOATS[dtypes / 3], FLOATS[dtypes % 3], Oracle(&case));
    }
}

struct SameTokens<'a>(&'a TestDevice, &'a Case);
impl ForFloats for SameTokens<'_> {
    fn call<P: Float, Q: Float>(self) {
        let step = self.1.step::<P, Q>();
        let (host, device) = (step.run(&TestDevice::Host), step.run(self.0));
        assert_eq!(device.exact(), host.exact());
        for (a, b) in device.log_probs.iter().zip(&host.log_probs) {
            let close = (a - b).abs() <= 1e-5 + b.abs() * 2e-6 || a == b || (a.is_nan() && b.is_nan());
            assert!(close, "{a} {b}");
        }
    }
}

#[test]
fn kernels_agree_with_the_host_token_for_token() {
    for device in TestDevice::kernels() {
        let config =
            ProptestConfig { cases: support::cases() * 2, failure_persistence: None, ..ProptestConfig::default() };
        proptest::test_runner::TestRunner::new(config)
            .run(&(case(), 0..9usize), |(case, dtypes)| {
                for_floats(FLOATS[dtypes / 3], FLOATS[dtypes % 3], SameTokens(&device, &case));
                Ok(())
            })
            .unwrap();
    }
}

fn plain() -> Case {
    Case {
        vocab: 33,
        batch: 40,
        max_drafts: 4,
        rule: Rule::Reject,
        kind: Drafts::Logits,
        with: [false; 13],
        shift: [0; 2],
        trials: Some(0),
        seed: 5,
    }
}

/// The comparison must be able to fail.
#[test]
fn wrong_decisions_are_told() {
    for (rule, flaw) in [
        (Rule::Reject, Flaw::NoResidual),
        (Rule::Reject, Flaw::Inverted),
        (Rule::Reject, Flaw::TakesDraftsForDeterministic),
        (Rule::Block, Flaw::BreaksAtFirstFailure),
        (Rule::Block, Flaw::PlainResidual),
    ] {
        let step = Case { rule, ..plain() }.step::<f32, f32>();
        let outcome = step.run(&TestDevice::Host);
        agrees(&step, &outcome, Flaw::None).unwrap();
        agrees(&step, &outcome, flaw).unwrap_err();
    }
}

/// Logits of one token alone.
fn one_hot(vocab: usize, token: usize) -> Vec<f32> {
    (0..vocab).map(|x| if x == token { 0.0 } else { f32::NEG_INFINITY }).collect()
}

/// `u = 0` accepts nothing that the target cannot draw: the test is strict.
#[test]
fn a_uniform_of_zero_accepts_nothing_impossible() {
    for device in TestDevice::all() {
        for rule in [Rule::Reject, Rule::Block] {
            for kind in [Drafts::Deterministic, Drafts::Logits] {
                let mut step = Step::<f32, f32>::new(4, 1, 1);
                (step.rule, step.kind) = (rule, kind);
                step.target = [one_hot(4, 2), one_hot(4, 1)].concat();
                // Two tokens, so that the target is no peak.
                step.target[3] = 0.0;
                step.draft = vec![0.0; 4];
                step.drafts = vec![0, -1];
                step.uniforms = Some(vec![0.0; 8]);
                let outcome = step.run(&device);
                assert_eq!((outcome.accepted[0], outcome.tokens), (Accepted(0), vec![2, -1]), "{rule:?} {kind:?}");
            }
        }
    }
}

/// p and q that are the same to the last bit have no residual; what is rejected by rounding is drawn from p.
#[test]
fn a_residual_of_nothing_is_drawn_from_the_target() {
    for device in TestDevice::all() {
        for rule in [Rule::Reject, Rule::Block] {
            let mut step = Step::<f32, f32>::new(5, 3, 1);
            (step.rule, step.kind, step.trials) = (rule, Drafts::Logits, Some(0));
            // The drafter cannot have drawn token 4, which p does not give either: rejected, and p - q is 0 everywhere.
            let row = [0.3, -0.2, 1.0, 0.1, f32::NEG_INFINITY];
            step.target = (0..6).flat_map(|_| row).collect();
            step.draft = (0..3).flat_map(|_| row).collect();
            step.drafts = vec![4, -1, 4, -1, 4, -1];
            step.seeds = Some(vec![1, 2, 3]);
            let outcome = step.run(&device);
            for b in 0..3 {
                assert_eq!(outcome.accepted[b], Accepted(0));
                assert!((0..4).contains(&outcome.tokens[b * 2]), "{:?}", outcome.tokens);
                assert_eq!(outcome.status[b], status::DRAFT_IMPOSSIBLE);
            }
        }
    }
}

/// A draft with q = 0 that the target can draw is accepted, and said to be impossible.
#[test]
fn an_impossible_draft_is_said() {
    for device in TestDevice::all() {
        let mut step = Step::<f32, f32>::new(4, 1, 1);
        (step.rule, step.kind) = (Rule::Reject, Drafts::Logits);
        step.draft = one_hot(4, 1);
        step.drafts = vec![3, -1];
        step.uniforms = Some(vec![0.999; 8]);
        let outcome = step.run(&device);
        assert_eq!((outcome.accepted[0], outcome.status[0]), (Accepted(1), status::DRAFT_IMPOSSIBLE));
    }
}

/// The lowest of tied tokens, wherever chunks, lanes and reads begin and end; -0 ties with 0.
#[test]
fn greedy_takes_the_lowest_of_ties() {
    for device in TestDevice::all() {
        for (low, high) in [(0, 1), (7, 8), (255, 256), (1023, 1024), (1024, 2047), (31, 32), (3, 2999), (2048, 2050)] {
            for (a, b) in [(2.5f32, 2.5f32), (0.0, -0.0), (-0.0, 0.0)] {
                let mut step = Step::<bf16, bf16>::new(3000, 2, 1);
                step.rule = Rule::Greedy;
                step.target.fill(bf16::from_f32(-1.5));
                for row in 0..4 {
                    step.target[row * 3000 + low] = bf16::from_f32(a);
                    step.target[row * 3000 + high] = bf16::from_f32(b);
                }
                step.drafts = vec![low as i32, -1, high as i32, -1];
                let outcome = step.run(&device);
                let low = low as i32;
                assert_eq!(outcome.tokens, [low, low, low, -1]);
                assert_eq!(outcome.accepted, [Accepted(1), Accepted(0)]);
            }
        }
    }
}

/// Every bad row sets its bit, gives a defined token, and changes nothing for the other requests.
#[test]
fn bad_rows_harm_no_one_else() {
    let case = Case { batch: 7, vocab: 1500, ..plain() };
    for device in TestDevice::all() {
        for rule in RULES {
            let good = Case { rule, ..case.clone() }.step::<f32, f32>();
            let reference = good.run(&device);
            let last = |b: usize| good.cu_rows[b] as usize;
            let b = (0..7).find(|&b| good.rows_of(b) > 1).unwrap();
            let row = last(b) * 1500..(last(b) + 1) * 1500;
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
                        step.row_index.as_mut().unwrap()[last(b)] = -5;
                        expected |= status::ROW_OUT_OF_RANGE;
                    }
                    3 => {
                        step.target[row.start + 1200] = f32::INFINITY;
                        step.target[row.start + 1300] = f32::INFINITY;
                        expected = status::TARGET_BEYOND;
                    }
                    _ => {
                        let d = b * 4 * 1500;
                        step.draft[d + 700] = f32::NAN;
                        expected = if matches!(rule, Rule::Reject | Rule::Block) { status::DRAFT_BAD } else { 0 };
                    }
                }
                let outcome = step.run(&device);
                assert_eq!(outcome.status[b] & expected, expected, "{rule:?} {bad}: {:?}", outcome.status);
                let token = outcome.tokens[b * 5];
                match bad {
                    0..=2 => assert_eq!((token, outcome.emitted[b]), (-7, Emitted(1))),
                    3 => assert_eq!(token, 1200),
                    _ => assert!((0..1500).contains(&token)),
                }
                for other in (0..7).filter(|&other| other != b) {
                    assert_eq!(outcome.tokens[other * 5..][..5], reference.tokens[other * 5..][..5]);
                    assert_eq!(outcome.status[other], reference.status[other]);
                }
            }
        }
    }
}

/// Drafts and rows that are not there are not looked at.
#[test]
fn padding_and_lies_about_rows_are_harmless() {
    for device in TestDevice::all() {
        let mut step = Case { batch: 3, ..plain() }.step::<f32, f32>();
        step.drafts.fill(-1);
        let outcome = step.run(&device);
        assert!(outcome.accepted.iter().all(|&n| n == Accepted(0)));
        // Counts that run beyond what the plan has, backwards, and below 0.
        for lies in [[0, 100, 200, 300], [5, 3, 1, 0], [-3, 2, 4, 1 << 30], [i32::MIN, i32::MAX, 0, 7]] {
            step.cu_rows = lies.to_vec();
            let (host, outcome) = (step.run(&TestDevice::Host), step.run(&device));
            assert_eq!(outcome.exact(), host.exact());
            for b in 0..3 {
                assert!(outcome.emitted[b].0 <= 5);
            }
        }
        assert_ne!(step.run(&device).status[0] & status::DRAFTS_IGNORED, 0);
    }
}

/// A request's tokens do not depend on its place, on the others, or on how the plan cuts the work.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for device in TestDevice::all() {
        for rule in RULES {
            let case = Case { rule, vocab: 5000, batch: 6, trials: Some(9), ..plain() };
            let step = case.step::<bf16, bf16>();
            let all = step.run(&device);
            assert_eq!(step.run(&device), all);
            let mut info = DeviceInfo::A100;
            info.sm_count = 1;
            assert_eq!(step.run_for(&device, &info), all);
            // Alone.
            let b = (0..6).rev().find(|&b| step.rows_of(b) > 2).unwrap();
            let (first, rows) = (step.cu_rows[b] as usize, step.rows_of(b));
            let mut alone = step.clone();
            alone.cu_rows = vec![0, rows as i32];
            alone.target = step.target[first * 5000..][..5 * 5000.min(step.target.len() - first * 5000)].to_vec();
            alone.target.resize(5 * 5000, bf16::ZERO);
            alone.drafts = step.drafts[first..][..rows].to_vec();
            alone.drafts.resize(5, -1);
            alone.draft = step.draft[b * 4 * 5000..][..(rows - 1) * 5000].to_vec();
            alone.draft.resize(4 * 5000, bf16::ZERO);
            alone.temperature = Some(vec![step.temperature.as_ref().unwrap()[b]]);
            alone.seeds = Some(vec![step.seeds.as_ref().unwrap()[b]]);
            alone.positions = Some(vec![step.positions.as_ref().unwrap()[b]]);
            alone.shift = [3, 5];
            let outcome = alone.run(&device);
            assert_eq!(outcome.tokens, all.tokens[b * 5..][..5], "{rule:?}");
            assert_eq!((outcome.accepted[0], outcome.status[0]), (all.accepted[b], all.status[b]));
        }
    }
}

/// Tokens of sampled match are those without drafts.
#[test]
fn match_emits_what_no_drafts_would() {
    for device in TestDevice::all() {
        let step = Case { rule: Rule::Match, kind: Drafts::Deterministic, batch: 9, ..plain() }.step::<f32, f32>();
        let outcome = step.run(&device);
        let mut without = step.clone();
        without.drafts.fill(-1);
        // Row 0 of each, then row 1 as if it were row 0 of the next step.
        assert!(
            (0..9)
                .filter(|&b| step.rows_of(b) > 0)
                .all(|b| without.run(&device).tokens[b * 5] == outcome.tokens[b * 5])
        );
        let accepted = (0..9).filter(|&b| outcome.accepted[b].0 > 0);
        for b in accepted {
            let mut next = without.clone();
            next.cu_rows = (0..=9).map(|b| i32::from(b > 0)).collect();
            next.row_index = Some(vec![step.cu_rows[b] + 1; next.drafts.len()]);
            next.positions.as_mut().unwrap()[0] = step.positions.as_ref().unwrap()[b] + 1;
            next.seeds.as_mut().unwrap()[0] = step.seeds.as_ref().unwrap()[b];
            next.temperature.as_mut().unwrap()[0] = step.temperature.as_ref().unwrap()[b];
            assert_eq!(next.run(&device).tokens[0], outcome.tokens[b * 5 + 1]);
        }
    }
}

/// Thinning and the sweep have the same law; and a kernel's eight trials at a time are the host's, one after the other.
#[test]
fn trials_are_taken_in_order() {
    for device in TestDevice::kernels() {
        for trials in [1, 7, 8, 9, 31] {
            let case = Case { batch: 30, vocab: 1300, trials: Some(trials), seed: trials.into(), ..plain() };
            let step = case.step::<f32, f32>();
            assert_eq!(step.run(&device).exact(), step.run(&TestDevice::Host).exact());
        }
    }
}

/// Rows of 262144 columns, the tail of the last chunk, and drafts far up.
#[test]
fn large_vocabularies() {
    for device in TestDevice::kernels() {
        for (vocab, rule) in [(262144, Rule::Reject), (128256, Rule::Match), (151937, Rule::Greedy)] {
            let case = Case { vocab, batch: 1, max_drafts: 1, rule, trials: None, ..plain() };
            let mut step = case.step::<bf16, bf16>();
            step.cu_rows = vec![0, 2];
            let host = step.run(&TestDevice::Host);
            assert_eq!(step.run(&device).exact(), host.exact());
        }
    }
}

#[test]
fn every_dtype_with_everything() {
    for device in TestDevice::kernels() {
        for dtypes in 0..9 {
            for (seed, rule) in RULES.into_iter().enumerate() {
                let case = Case {
                    rule,
                    vocab: 1100,
                    batch: 5,
                    with: [
                        true,
                        true,
                        dtypes % 2 == 0,
                        seed % 2 == 0,
                        seed % 2 == 1,
                        true,
                        true,
                        false,
                        true,
                        true,
                        true,
                        true,
                        true,
                    ],
                    shift: [dtypes % 3, seed],
                    seed: seed as u64,
                    ..plain()
                };
                for_floats(FLOATS[dtypes / 3], FLOATS[dtypes % 3], SameTokens(&device, &case));
            }
        }
    }
}

#[test]
fn bad_plans_are_refused() {
    let builder = || Verifier::<f32, f32>::builder(4, 3, 100);
    let build = |b: VerifierBuilder<f32, f32>| b.build(&DeviceInfo::H200).map(|_| ());
    assert_eq!(build(builder()), Ok(()));
    let size = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    size(build(Verifier::builder(4, 3, 0)), "vocab");
    size(build(Verifier::builder(4, 3, (1 << 24) + 1)), "vocab");
    size(build(Verifier::builder((1 << 20) + 1, 3, 10)), "batch");
    size(build(Verifier::builder(4, 1024, 10)), "max_drafts");
    size(build(builder().draft_vocab(0)), "draft_vocab");
    size(build(builder().target_rows(1 << 31)), "target_rows");
    size(build(builder().draft_rows(1 << 31)), "draft_rows");
    size(build(builder().trials(4097)), "trials");
    let stride = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Stride { arg, .. }) if arg == name), "{result:?}");
    };
    stride(build(builder().target_row_stride(99)), "target");
    stride(build(builder().draft_row_stride(-100)), "draft");
    stride(build(builder().allow_row_stride(3)), "allow");
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder().build(&old), Err(Error::UnsupportedDevice { have: Some(_), .. })));
}

#[test]
fn empty_problems_need_nothing() {
    for device in TestDevice::all() {
        let outcome = Step::<f32, f32>::new(10, 0, 3).run(&device);
        assert!(outcome.tokens.is_empty() && outcome.emitted.is_empty());
        // A batch of requests without rows.
        let mut step = Step::<f32, f32>::new(10, 3, 2);
        step.cu_rows.fill(0);
        let outcome = step.run(&device);
        assert_eq!((outcome.tokens, outcome.last_row), (vec![-1; 9], vec![-1; 3]));
        assert_eq!(outcome.emitted, [Emitted(0); 3]);
    }
}

#[test]
fn plans_are_plain_data() {
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<Verifier<f32, bf16>>();
    let plan = |vocab| Verifier::<f32, bf16>::builder(8, 4, vocab).build(&DeviceInfo::H200).unwrap();
    assert_eq!(plan(40), plan(40));
    assert_ne!(plan(40), plan(41));
    assert_eq!(Emitted::default(), Emitted(0));
    assert_eq!(<Accepted as nextscale::dtype::Element>::DTYPE, DType::I32);
}

/// Each chunk of each row belongs to one item, and each item to one block.
#[test]
fn the_schedule_covers_every_chunk() {
    for (batch, drafts, vocab, kind) in [
        (1, 4, 128256, Drafts::Logits),
        (64, 4, 128256, Drafts::Logits),
        (256, 4, 4096, Drafts::LogitsAndStats),
        (3, 0, 1, Drafts::Deterministic),
    ] {
        let plan = Verifier::<bf16, bf16>::builder(batch, drafts, vocab).drafts(kind).build(&DeviceInfo::H200).unwrap();
        let schedule = plan.schedule();
        let chunks = schedule.of_target + schedule.of_draft;
        assert_eq!(schedule.of_target, (vocab as u64).div_ceil(1024));
        assert_eq!(schedule.slices, chunks.div_ceil(schedule.chunks_per_item.into()));
        assert_eq!(schedule.items, schedule.slices * (batch * (drafts + 1)) as u64);
        assert!(schedule.chunks_per_item.is_multiple_of(8) && schedule.blocks >= 1);
        assert!(u64::from(schedule.blocks) <= schedule.items);
    }
}

/// More than 2^32 elements between the first row and the last.
#[test]
fn offsets_are_64_bit() {
    use nextscale::In;
    use nextscale::verification::{VerifierArgs, VerifierOptions, VerifierOut};
    if std::env::var_os("NXS_SMALL").is_some() {
        eprintln!("SKIPPED: NXS_SMALL is set, and this takes 16 GiB of addresses");
        return;
    }
    let (vocab, far) = (2000, (1usize << 31) + 16);
    // Zeroes that are never written take no memory.
    let mut target = vec![0u16; 2 * far + vocab];
    for row in 0..3 {
        target[row * far + 1500 + row] = bf16::from_f32(9.0).to_bits();
    }
    let plan = Verifier::<bf16, bf16>::builder(1, 2, vocab).rule(Rule::Greedy).target_row_stride(far as i64);
    let plan = plan.build(&DeviceInfo::H200).unwrap();
    for device in TestDevice::all() {
        let target: &[bf16] = bytemuck::cast_slice(&target);
        let (cu_rows, drafts) =
            (support::Buffer::of(&device, &[0, 3], 0), support::Buffer::of(&device, &[1500, 1501, -1], 0));
        let mut tokens = support::Buffer::<i32>::poisoned(&device, 3, 0);
        let mut emitted = support::Buffer::<Emitted>::poisoned(&device, 1, 0);
        let mut accepted = support::Buffer::<Accepted>::poisoned(&device, 1, 0);
        let mut status = support::Buffer::<u32>::poisoned(&device, 1, 0);
        let mut workspace = support::Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
        let mut counters = support::Buffer::of(&device, &vec![0u32; plan.counter_words()], 0);
        let on_device = (!device.is_host() && !device.is_emulated()).then(|| support::Buffer::of(&device, target, 0));
        let view = match &on_device {
            Some(buffer) => buffer.input(),
            #[cfg(feature = "emulate")]
            None if device.is_emulated() => In::emulated(target),
            None => In::host(target),
        };
        let args = VerifierArgs {
            target: view,
            cu_rows: cu_rows.input(),
            drafts: drafts.input(),
            options: VerifierOptions::default(),
            out: VerifierOut {
                tokens: tokens.output(),
                emitted: emitted.output(),
                accepted: accepted.output(),
                status: status.output(),
                last_row: None,
                log_probs: None,
            },
            workspace: workspace.output(),
            counters: counters.output(),
        };
        plan.run(&device.stream(), args).unwrap();
        assert_eq!(tokens.read(), [1500, 1501, 1502]);
    }
}

/// What a run refuses, and that it then writes nothing.
#[test]
fn bad_buffers_are_refused_before_anything_is_written() {
    use nextscale::verification::{VerifierArgs, VerifierOptions, VerifierOut};
    use support::Buffer;
    for device in TestDevice::all() {
        let plan = |kind| Verifier::<f32, f32>::builder(2, 1, 10).drafts(kind).build(&DeviceInfo::H200).unwrap();
        let plain = plan(Drafts::Deterministic);
        let target = Buffer::of(&device, &[0f32; 40], 0);
        let (cu_rows, drafts) = (Buffer::of(&device, &[0, 2, 4], 0), Buffer::of(&device, &[1, -1, 1, -1], 0));
        let floats = Buffer::of(&device, &[0f32; 40], 0);
        let codes = Buffer::of(&device, &[0i32; 2], 0);
        let mut tokens = Buffer::<i32>::poisoned(&device, 4, 0);
        let mut emitted = Buffer::<Emitted>::poisoned(&device, 2, 0);
        let mut accepted = Buffer::<Accepted>::poisoned(&device, 2, 0);
        let mut status = Buffer::<u32>::poisoned(&device, 2, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, plan(Drafts::Logits).workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(&device, &[0u32; 8], 0);
        assert_eq!(plain.counter_words(), 8);
        let mut run = |plan: &Verifier<f32, f32>, lens: [usize; 5], options: VerifierOptions<'_, f32>| {
            let args = VerifierArgs {
                target: target.input_of(lens[0]),
                cu_rows: cu_rows.input_of(lens[1]),
                drafts: drafts.input_of(lens[2]),
                options,
                out: VerifierOut {
                    tokens: tokens.output_of(lens[3]),
                    emitted: emitted.output(),
                    accepted: accepted.output(),
                    status: status.output(),
                    last_row: None,
                    log_probs: None,
                },
                workspace: workspace.output_of(if lens[4] == 0 { 3 } else { plan.workspace_bytes() as usize }),
                counters: counters.output_of(lens[4]),
            };
            plan.run(&device.stream(), args)
        };
        let none = VerifierOptions::default;
        let length = |arg, need, got| Err(Error::Length { arg, need, got });
        assert_eq!(run(&plain, [39, 3, 4, 4, 8], none()), length("target", 40, 39));
        assert_eq!(run(&plain, [40, 2, 4, 4, 8], none()), length("cu_rows", 3, 2));
        assert_eq!(run(&plain, [40, 3, 3, 4, 8], none()), length("drafts", 4, 3));
        assert_eq!(run(&plain, [40, 3, 4, 3, 8], none()), length("tokens", 4, 3));
        assert_eq!(run(&plain, [40, 3, 4, 4, 7], none()), length("counters", 8, 7));
        assert!(matches!(run(&plain, [40, 3, 4, 4, 0], none()), Err(Error::Workspace { got: 3, .. })));
        let refused = |result, name: &str| {
            assert!(matches!(result, Err(Error::Unsupported { arg, .. }) if arg == name), "{result:?}");
        };
        let all = [40, 3, 4, 4, 8];
        let draft = || VerifierOptions { draft: Some(floats.input_of(20)), ..none() };
        let stats = || Some(floats.input_of(8));
        refused(run(&plain, all, draft()), "draft");
        refused(run(&plain, all, VerifierOptions { draft_stats: stats(), ..none() }), "draft_stats");
        refused(run(&plain, all, VerifierOptions { rules: Some(codes.input()), ..none() }), "rules");
        refused(run(&plan(Drafts::Logits), all, none()), "draft");
        refused(run(&plan(Drafts::Logits), all, VerifierOptions { draft_stats: stats(), ..draft() }), "draft_stats");
        refused(run(&plan(Drafts::LogitsAndStats), all, draft()), "draft_stats");
        let short = VerifierOptions { draft: Some(floats.input_of(19)), ..none() };
        assert_eq!(run(&plan(Drafts::Logits), all, short), length("draft", 20, 19));
        let short = VerifierOptions { temperature: Some(floats.input_of(1)), ..none() };
        assert_eq!(run(&plain, all, short), length("temperature", 2, 1));
        assert!(tokens.read().iter().all(|&token| token == -1) && status.read().iter().all(|&said| said == u32::MAX));
    }
}

/// A captured graph takes what the buffers hold when it is replayed.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn graphs_replay() {
    use nextscale::verification::{VerifierArgs, VerifierOptions, VerifierOut};
    use support::Buffer;
    let Some(TestDevice::Cuda(stream)) = TestDevice::cuda() else { return };
    let device = TestDevice::Cuda(stream.clone());
    for rule in RULES {
        let step = Case { rule, vocab: 20000, ..plain() }.step::<bf16, bf16>();
        let plan = step.plan(&DeviceInfo::of(&stream).unwrap());
        let target = Buffer::of(&device, &step.target, 0);
        let draft = Buffer::of(&device, &step.draft, 0);
        let (cu_rows, mut drafts) = (Buffer::of(&device, &step.cu_rows, 0), Buffer::of(&device, &step.drafts, 0));
        let temperature = Buffer::of(&device, step.temperature.as_ref().unwrap(), 0);
        let seeds = Buffer::of(&device, step.seeds.as_ref().unwrap(), 0);
        let mut positions = Buffer::of(&device, step.positions.as_ref().unwrap(), 0);
        let (batch, rows) = (step.batch(), step.drafts.len());
        let mut tokens = Buffer::<i32>::poisoned(&device, rows, 0);
        let mut emitted = Buffer::<Emitted>::poisoned(&device, batch, 0);
        let mut accepted = Buffer::<Accepted>::poisoned(&device, batch, 0);
        let mut status = Buffer::<u32>::poisoned(&device, batch, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(&device, &vec![0u32; plan.counter_words()], 0);
        let mut run = |drafts: &Buffer<i32>, positions: &Buffer<i64>| {
            let args = VerifierArgs {
                target: target.input(),
                cu_rows: cu_rows.input(),
                drafts: drafts.input(),
                options: VerifierOptions {
                    draft: Some(draft.input()),
                    temperature: Some(temperature.input()),
                    seeds: Some(seeds.input()),
                    positions: Some(positions.input()),
                    ..VerifierOptions::default()
                },
                out: VerifierOut {
                    tokens: tokens.output(),
                    emitted: emitted.output(),
                    accepted: accepted.output(),
                    status: status.output(),
                    last_row: None,
                    log_probs: None,
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
            assert_eq!(tokens.read(), now.run(&TestDevice::Host).tokens, "{rule:?}");
        }
    }
}
