//! Trees of drafts: every rule against an oracle in f64, and the kernel against the host token for token.

#![cfg(feature = "verification")]

mod support;
mod trees;
mod verification;

use nextscale::dtype::Float;
use nextscale::verification::{
    Accepted, Drafts, Emitted, Rule, Siblings, Tree, TreeLinks, TreeVerifier, TreeVerifierArgs, TreeVerifierBuilder,
    TreeVerifierOptions, TreeVerifierOut, status,
};
use nextscale::{DeviceInfo, Error, bf16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, FLOATS, ForFloats, TestDevice, for_floats};
use trees::{Flaw, Links, Outcome, Step};

const RULES: [Rule; 3] = [Rule::Greedy, Rule::Match, Rule::Reject];

/// A random step: random trees, ragged, of mixed rules and temperatures, with some of everything that is optional.
#[derive(Debug, Clone)]
struct Case {
    vocab: usize,
    batch: usize,
    max_nodes: usize,
    max_depth: usize,
    rule: Rule,
    kind: Drafts,
    siblings: Siblings,
    cluster: Option<u32>,
    with: With,
    shift: [usize; 2],
    seed: u64,
}

/// What a case has.
#[derive(Debug, Clone, Copy, Default)]
struct With {
    ragged: bool,
    links: bool,
    row_index: bool,
    draft_row: bool,
    reduced: bool,
    target_stats: bool,
    allow: bool,
    rules: bool,
    truncation: bool,
    uniforms: bool,
    log_probs: bool,
    bad: bool,
    warm: bool,
    gaps: bool,
    cold: bool,
    slots: bool,
    /// The drafter is far off.
    astray: bool,
}

impl With {
    fn of(bits: u32) -> Self {
        let bit = |at: u32| bits >> at & 1 == 1;
        With {
            ragged: bit(0),
            links: bit(1),
            row_index: bit(2),
            draft_row: bit(3),
            reduced: bit(4),
            target_stats: bit(5),
            allow: bit(6),
            rules: bit(7),
            truncation: bit(8),
            uniforms: bit(9),
            log_probs: bit(10),
            bad: bit(11),
            warm: bit(12),
            gaps: bit(13),
            cold: bit(14),
            slots: bit(15),
            astray: bit(16),
        }
    }
}

fn case() -> impl Strategy<Value = Case> {
    let vocab = prop_oneof![4 => 2..40usize, 1 => 1000..1100usize, 1 => 2000..3200usize];
    (
        (vocab, 0..4usize, 1..14usize, 0..5usize),
        (0..3usize, 0..3usize, any::<bool>()),
        prop_oneof![Just(None), Just(Some(1)), Just(Some(2)), Just(Some(4))],
        // Each with probability 1/4.
        (any::<u32>(), any::<u32>()).prop_map(|(a, b)| a & b),
        prop_oneof![2 => Just([0; 2]), 1 => [0..9usize, 0..9usize]],
        any::<u64>(),
    )
        .prop_map(|((vocab, batch, max_nodes, max_depth), (rule, kind, distinct), cluster, with, shift, seed)| {
            Case {
                vocab,
                batch,
                max_nodes,
                max_depth,
                rule: RULES[rule],
                kind: [Drafts::Deterministic, Drafts::Logits, Drafts::LogitsAndStats][kind],
                siblings: if distinct { Siblings::WithoutReplacement } else { Siblings::WithReplacement },
                cluster,
                with: With::of(with),
                shift,
                seed,
            }
        })
}

impl Case {
    fn step<P: Float, Q: Float>(&self) -> Step<P, Q> {
        let with = self.with;
        let mut rng = StdRng::seed_from_u64(self.seed);
        let (v, batch, n) = (self.vocab, self.batch, self.max_nodes);
        let mut step = Step::<P, Q>::new(v, batch, &Tree::chain(n - 1));
        step.max_depth = self.max_depth;
        (step.rule, step.kind, step.siblings) = (self.rule, self.kind, self.siblings);
        (step.cluster, step.shift, step.log_probs) = (self.cluster, self.shift, with.log_probs);
        step.target_stride = v + if with.gaps { 3 } else { 0 };
        if with.ragged {
            let mut cu_rows = vec![0i32];
            (0..batch).for_each(|b| cu_rows.push(cu_rows[b] + rng.random_range(0..=n as i32)));
            step.cu_rows = Some(cu_rows);
        }
        let rows = batch * n;
        // Random trees; some rows of padded ones are no nodes.
        let mut parents = vec![-1i32; rows];
        for b in 0..batch {
            let (first, nodes) = step.rows_of(b);
            for node in 1..nodes {
                let parent = match rng.random_range(0..3) {
                    0 => 0,
                    1 => node as i32 - 1,
                    _ => rng.random_range(0..node as i32),
                };
                let is_node = with.ragged || rng.random_bool(0.9);
                parents[first + node] = if is_node { parent } else { -1 };
            }
        }
        let physical = rows + 3;
        let logits: Vec<f32> = (0..rows * v).map(|_| rng.random_range(-3.0..3.0f32)).collect();
        // Where each row of the step lies.
        let place: Vec<usize> = match with.row_index {
            true if physical.is_multiple_of(7) => (0..rows).rev().collect(),
            true => (0..rows).map(|r| (r * 7 + 2) % physical).collect(),
            false => (0..rows).collect(),
        };
        let of = if rows == 0 { 0 } else { (physical - 1) * step.target_stride + v };
        step.target = vec![P::from_f32(f32::NAN); of];
        for r in 0..rows {
            for x in 0..v {
                step.target[place[r] * step.target_stride + x] = P::from_f32(logits[r * v + x]);
            }
        }
        if with.row_index {
            step.row_index = Some(place.iter().map(|&at| at as i32).collect());
        }
        let temperatures = [1.0f32, 0.7, 1.4, 0.3];
        let mut temperature: Vec<f32> = (0..batch).map(|_| temperatures[rng.random_range(0..4)]).collect();
        if with.cold {
            temperature.iter_mut().filter(|_| rng.random_bool(0.4)).for_each(|t| *t = 0.0);
        }
        step.temperature = Some(temperature.clone());
        if with.warm {
            step.draft_temperature = Some(temperature.iter().map(|t| t * 0.9 + 0.05).collect());
        }
        // The drafter knows some of the tokens, in another order.
        step.draft_vocab = if with.reduced { v.div_ceil(2) } else { v };
        let known: Vec<Option<usize>> = (0..v)
            .map(|token| match with.reduced {
                true => (token % 2 == 0).then_some((token / 2 + 1) % step.draft_vocab),
                false => Some(token),
            })
            .collect();
        if with.reduced {
            step.target_to_draft = Some(known.iter().map(|column| column.map_or(-1, |c| c as i32)).collect());
        }
        step.draft_stride = step.draft_vocab + if with.gaps { 5 } else { 0 };
        if self.kind != Drafts::Deterministic {
            let len = if rows == 0 { 0 } else { (rows - 1) * step.draft_stride + step.draft_vocab };
            step.draft = vec![Q::from_f32(0.0); len];
        }
        let mut stats = vec![0f32; rows * 4];
        let draft_place: Vec<usize> = (0..rows).map(|d| if with.draft_row { rows - 1 - d } else { d }).collect();
        if with.draft_row {
            step.draft_row = Some(draft_place.iter().map(|&d| d as i32).collect());
        }
        let given = &step.draft_temperature.clone().unwrap_or(temperature);
        let off = if with.astray { 6.0 } else { 1.5 };
        for b in 0..batch {
            let (first, nodes) = step.rows_of(b);
            for node in 0..nodes {
                let r = first + node;
                let d = draft_place[r];
                let (mut weights, mut row) = (vec![0f64; v], vec![0f32; step.draft_vocab]);
                for (token, column) in known.iter().enumerate() {
                    if let Some(column) = column {
                        row[*column] = Q::from_f32(logits[r * v + token] + rng.random_range(-off..off)).to_f32();
                        weights[token] = f64::from(row[*column] / given[b].max(0.1)).exp();
                    }
                }
                if self.kind != Drafts::Deterministic {
                    for (column, &logit) in row.iter().enumerate() {
                        step.draft[d * step.draft_stride + column] = Q::from_f32(logit);
                    }
                    if self.kind == Drafts::LogitsAndStats {
                        stats[d * 4..][..4].copy_from_slice(&stats_of(&row, given[b]));
                    }
                }
                for child in (node + 1..nodes).filter(|&child| parents[first + child] == node as i32) {
                    let three = std::array::from_fn(|_| rng.random_range(0.0..1.0f32));
                    // Without replacement nothing may be left.
                    let drawn = verification::sample(&weights, three, &mut 1.0).unwrap_or(0);
                    if self.siblings == Siblings::WithoutReplacement {
                        weights[drawn] = 0.0;
                    }
                    step.drafts[first + child] = drawn as i32;
                }
            }
        }
        if self.kind == Drafts::LogitsAndStats {
            step.draft_stats = Some(stats);
        }
        step.links = Links::Parents(parents.clone());
        if with.links {
            let (mut first_child, mut next_sibling) = (vec![-1; rows], vec![-1; rows]);
            for b in 0..batch {
                let (first, nodes) = step.rows_of(b);
                // Some orders of trial are not that of the numbers.
                let backwards = rng.random_bool(0.3);
                let mut order: Vec<usize> = (1..nodes).collect();
                if !backwards {
                    order.reverse();
                }
                for node in order.into_iter().filter(|&node| parents[first + node] >= 0) {
                    let parent = first + parents[first + node] as usize;
                    next_sibling[first + node] = first_child[parent];
                    first_child[parent] = node as i32;
                }
            }
            step.links = Links::Children { first: first_child, next: next_sibling };
        }
        if with.allow {
            let words = v.div_ceil(32);
            let mut mask: Vec<u32> = (0..rows * words).map(|_| rng.random::<u32>() | rng.random::<u32>()).collect();
            (0..rows).for_each(|r| mask[r * words] |= 1);
            step.allow = Some(mask);
        }
        if with.rules {
            step.rules = Some((0..batch).map(|_| rng.random_range(-1..5)).collect());
        }
        if with.truncation {
            step.top_k = Some((0..batch).map(|_| [0, 1, 4, 30][rng.random_range(0..4)]).collect());
            step.top_p = Some((0..batch).map(|_| [1.0, 0.9, 0.6][rng.random_range(0..3)]).collect());
            step.min_p = Some((0..batch).map(|_| [0.0, 0.02, 0.2][rng.random_range(0..3)]).collect());
        }
        if with.uniforms {
            step.uniforms = Some((0..rows * 4).map(|_| rng.random_range(0..1 << 24) as f32 / 16777216.0).collect());
        } else {
            step.seeds = Some((0..batch).map(|_| rng.random()).collect());
            step.positions = Some((0..batch).map(|_| rng.random_range(0..1 << 40)).collect());
        }
        if with.slots {
            step.kv_slots = Some((0..rows as i32).map(|r| r * 5 % 1001).collect());
        } else {
            step.kv_start = Some((0..batch).map(|_| rng.random_range(0..1 << 20)).collect());
        }
        if with.bad && rows > 0 {
            for _ in 0..4 {
                let r = rng.random_range(0..rows);
                let at = place[r] * step.target_stride;
                match rng.random_range(0..6) {
                    0 => step.target[at + rng.random_range(0..v)] = P::from_f32(f32::NAN),
                    1 => step.target[at..at + v].fill(P::from_f32(f32::NAN)),
                    2 => step.target[at..at + v].fill(P::from_f32(f32::NEG_INFINITY)),
                    3 => step.drafts[r] = [-1, v as i32, i32::MAX, i32::MIN][rng.random_range(0..4)],
                    4 if !step.draft.is_empty() && self.kind == Drafts::Logits => {
                        let d = rng.random_range(0..rows) * step.draft_stride;
                        let value = [f32::NAN, f32::NEG_INFINITY][rng.random_range(0..2)];
                        step.draft[d..d + step.draft_vocab].fill(Q::from_f32(value));
                    }
                    _ => {
                        if let Some(index) = &mut step.row_index {
                            index[r] = [-1, physical as i32, i32::MIN][rng.random_range(0..3)];
                        }
                        if let Some(index) = &mut step.draft_row {
                            index[r] = [-1, physical as i32, i32::MIN][rng.random_range(0..3)];
                        }
                    }
                }
            }
        }
        if with.target_stats && !with.allow {
            step.target_stats = Some(target_stats_of(&step));
        }
        step
    }

    /// With links that lead anywhere.
    fn broken<P: Float, Q: Float>(&self) -> Step<P, Q> {
        let mut step = self.step::<P, Q>();
        let mut rng = StdRng::seed_from_u64(self.seed ^ 1);
        let n = self.max_nodes as i32;
        let mut damage = |links: &mut Vec<i32>| {
            for link in links {
                let wrong = [-2, -1, 0, n - 1, n, i32::MAX, i32::MIN, rng.random_range(0..n)][rng.random_range(0..8)];
                if rng.random_bool(0.2) {
                    *link = wrong;
                }
            }
        };
        match &mut step.links {
            Links::Parents(parents) => damage(parents),
            Links::Children { first, next } => {
                damage(first);
                damage(next);
            }
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
    for b in 0..step.batch {
        let (first, nodes) = step.rows_of(b);
        for r in first..first + nodes {
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

/// The decision of each request is the oracle's, unless that was close; how many were.
fn agrees<P: Float, Q: Float>(step: &Step<P, Q>, outcome: &Outcome, flaw: Flaw) -> Result<usize, String> {
    let (columns, mut close) = (step.max_depth + 1, 0);
    for b in 0..step.batch {
        let of = |all: &[i32]| all[b * columns..][..columns].to_vec();
        let padded = |mut all: Vec<i32>| {
            all.resize(columns, -1);
            all
        };
        let (first, nodes) = step.rows_of(b);
        if nodes == 0 {
            let counts = (outcome.emitted[b], outcome.accepted[b], outcome.last_row[b]);
            if of(&outcome.tokens) != vec![-1; columns] || counts != (Emitted(0), Accepted(0), -1) {
                return Err(format!("request {b} has no rows"));
            }
            continue;
        }
        let (path, token, margin) = step.oracle(b, flaw);
        if margin < 1e-4 {
            close += 1;
            continue;
        }
        let mut tokens: Vec<i32> = path[1..].iter().map(|&node| step.drafts[first + node]).collect();
        tokens.push(token.map_or(-7, |token| token as i32));
        if of(&outcome.tokens) != padded(tokens.clone()) {
            return Err(format!("request {b}: {:?} instead of {tokens:?}, margin {margin}", of(&outcome.tokens)));
        }
        let accepted = path.len() as i32 - 1;
        if outcome.accepted[b] != Accepted(accepted) || outcome.emitted[b] != Emitted(accepted + 1) {
            return Err(format!("counts of request {b}"));
        }
        let slot = |node: usize| match (&step.kv_slots, &step.kv_start) {
            (Some(slots), _) => slots[first + node],
            (None, start) => start.as_ref().map_or(0, |start| start[b]) + node as i32,
        };
        let expected = [
            path.iter().map(|&node| node as i32).collect(),
            path.iter().map(|&node| slot(node)).collect(),
            (0..path.len()).map(slot).collect::<Vec<i32>>(),
        ];
        if [of(&outcome.path), of(&outcome.kv[0]), of(&outcome.kv[1])] != expected.map(padded) {
            return Err(format!("paths of request {b}: {:?}", of(&outcome.path)));
        }
        if outcome.last_row[b] != (first + path.last().unwrap()) as i32 {
            return Err(format!("last row {}", outcome.last_row[b]));
        }
        if step.log_probs && step.rule_of(b) != Rule::Greedy {
            for (i, (&node, &token)) in path.iter().zip(&tokens).enumerate() {
                let p = step.p(b, first + node, &mut 1.0);
                // Those of greedy rows are at temperature 1.
                if token < 0 || p.iter().filter(|&&p| p > 0.0).count() < 2 {
                    continue;
                }
                let (got, exact) = (f64::from(outcome.log_probs[b * columns + i]), p[token as usize].ln());
                if (got - exact).abs() > 1e-4 {
                    return Err(format!("log probability {got} instead of {exact}"));
                }
            }
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

fn assert_same(device: &Outcome, host: &Outcome) {
    assert_eq!(device.exact(), host.exact());
    for (a, b) in device.log_probs.iter().zip(&host.log_probs) {
        let close = (a - b).abs() <= 1e-5 + b.abs() * 2e-6 || a == b || (a.is_nan() && b.is_nan());
        assert!(close, "{a} {b}");
    }
}

struct SameTokens<'a>(&'a TestDevice, &'a Case, bool);
impl ForFloats for SameTokens<'_> {
    fn call<P: Float, Q: Float>(self) {
        let step = if self.2 { self.1.broken::<P, Q>() } else { self.1.step::<P, Q>() };
        assert_same(&step.run(self.0), &step.run(&TestDevice::Host));
    }
}

#[test]
fn kernels_agree_with_the_host_token_for_token() {
    for device in TestDevice::kernels() {
        let config =
            ProptestConfig { cases: support::cases() * 2, failure_persistence: None, ..ProptestConfig::default() };
        proptest::test_runner::TestRunner::new(config)
            .run(&(case(), 0..9usize, proptest::bool::weighted(0.2)), |(case, dtypes, broken)| {
                for_floats(FLOATS[dtypes / 3], FLOATS[dtypes % 3], SameTokens(&device, &case, broken));
                Ok(())
            })
            .unwrap();
    }
}

fn plain() -> Case {
    Case {
        vocab: 33,
        batch: 40,
        max_nodes: 12,
        max_depth: 4,
        rule: Rule::Reject,
        kind: Drafts::Logits,
        siblings: Siblings::WithReplacement,
        cluster: None,
        with: With::default(),
        shift: [0; 2],
        seed: 5,
    }
}

/// The comparison must be able to fail.
#[test]
fn wrong_decisions_are_told() {
    for siblings in [Siblings::WithReplacement, Siblings::WithoutReplacement] {
        let case = Case { siblings, batch: 200, with: With { astray: true, ..With::default() }, ..plain() };
        let step = case.step::<f32, f32>();
        let outcome = step.run(&TestDevice::Host);
        let close = agrees(&step, &outcome, Flaw::None).unwrap();
        assert!(close < 50, "{close} of 200 were close");
        for flaw in [Flaw::OriginalRatio, Flaw::NotNormalised, Flaw::NoResidual, Flaw::Inverted] {
            agrees(&step, &outcome, flaw).expect_err(&format!("{flaw:?} {siblings:?}"));
        }
        if siblings == Siblings::WithoutReplacement {
            agrees(&step, &outcome, Flaw::ForgetsReplacement).unwrap_err();
        }
    }
}

/// A tree that is a chain gives what the verifier of chains gives without trials.
#[test]
fn chains_are_those_of_the_verifier() {
    for (rule, kind) in [
        (Rule::Greedy, Drafts::Deterministic),
        (Rule::Match, Drafts::Deterministic),
        (Rule::Reject, Drafts::Logits),
        (Rule::Reject, Drafts::LogitsAndStats),
    ] {
        let (v, k, batch) = (50, 4, 60);
        let case = Case { rule, kind, vocab: v, max_nodes: k + 1, batch, ..plain() };
        let mut step = case.step::<f32, f32>();
        step.links = Links::Parents(Tree::chain(k).parents().repeat(batch));
        // Drafts of the rows they hang on now.
        let mut rng = StdRng::seed_from_u64(3);
        for r in (0..batch * (k + 1)).filter(|r| r % (k + 1) > 0) {
            let weights: Vec<f64> = match kind {
                Drafts::Deterministic => step.target[(r - 1) * v..][..v].iter().map(|&x| f64::from(x).exp()).collect(),
                _ => {
                    let temperature = step.temperature.as_ref().unwrap()[r / (k + 1)];
                    step.draft[(r - 1) * v..][..v].iter().map(|&x| f64::from(x / temperature).exp()).collect()
                }
            };
            let three = std::array::from_fn(|_| rng.random_range(0.0..1.0f32));
            let drawn = verification::sample(&weights, three, &mut 1.0).unwrap();
            let best = (0..v).max_by(|&x, &y| weights[x].total_cmp(&weights[y])).unwrap();
            let is_best = kind == Drafts::Deterministic && rng.random_bool(0.8);
            step.drafts[r] = if is_best { best } else { drawn } as i32;
        }
        let mut chain = verification::Step::<f32, f32>::new(v, batch, k);
        (chain.rule, chain.kind, chain.trials) = (rule, kind, Some(0));
        chain.target = step.target[..batch * (k + 1) * v].to_vec();
        for r in 0..batch * (k + 1) {
            if r % (k + 1) < k {
                chain.drafts[r] = step.drafts[r + 1];
                if kind != Drafts::Deterministic {
                    chain.draft.extend_from_slice(&step.draft[r * v..][..v]);
                }
            }
        }
        chain.draft_stats = step.draft_stats.as_ref().map(|stats| {
            (0..batch * (k + 1)).filter(|r| r % (k + 1) < k).flat_map(|r| stats[r * 4..][..4].to_vec()).collect()
        });
        (chain.temperature, chain.seeds, chain.positions) =
            (step.temperature.clone(), step.seeds.clone(), step.positions.clone());
        let (tree, chain) = (step.run(&TestDevice::Host), chain.run(&TestDevice::Host));
        assert_eq!(tree.tokens, chain.tokens, "{rule:?} {kind:?}");
        assert_eq!((tree.accepted, tree.status, tree.last_row), (chain.accepted, chain.status, chain.last_row));
        assert!(tree.emitted.iter().any(|n| n.0 == 1) && tree.emitted.iter().any(|n| n.0 > 2));
    }
}

/// The three forms of a tree say the same.
#[test]
fn forms_of_trees() {
    // Medusa's numbers go by depth; its paths by leaves.
    let paths = [0, 1, 4, -1, 0, 1, 3, 6, 0, 2, 5, -1i32];
    let tree = Tree::from_paths(&paths, 4).unwrap();
    assert_eq!(tree.parents(), [-1, 0, 0, 1, 1, 2, 3]);
    assert_eq!(
        (tree.first_child(), tree.next_sibling()),
        (&[1, 4, 5, 6, -1, -1, -1][..], &[-1, 2, -1, -1, 3, -1, -1][..])
    );
    assert_eq!(tree.paths(), (paths.to_vec(), 3));
    assert_eq!(Tree::from_links(tree.first_child(), tree.next_sibling()).unwrap(), tree);
    assert_eq!(tree.depths(), [0, 1, 1, 2, 2, 2, 3]);
    assert_eq!(tree.max_depth(), 3);
    assert_eq!(tree.ancestors(), [0b1, 0b11, 0b101, 0b1011, 0b10011, 0b100101, 0b1001011]);
    assert!(tree.sees(6, 3) && tree.sees(6, 0) && tree.sees(6, 6) && !tree.sees(6, 2) && !tree.sees(3, 6));
    assert_eq!(tree.runs()[6], [0..2, 3..4, 6..7]);
    // The order of trial is that of the numbers if it comes from parents.
    let by_parents = Tree::from_parents(tree.parents()).unwrap();
    assert_eq!(by_parents.paths().0[..8], [0, 1, 3, 6, 0, 1, 4, -1]);
    assert_eq!(Tree::from_paths(&by_parents.paths().0, 4).unwrap(), by_parents);
    assert_eq!(Tree::chain(2).parents(), [-1, 0, 1]);
    for bad in [&[0, 0][..], &[-1, 1], &[-1, -1], &[-1, 2, 0], &[-1, -3]] {
        assert!(matches!(Tree::from_parents(bad), Err(Error::Unsupported { arg: "parents", .. })));
    }
    assert!(matches!(Tree::from_parents(&[]), Err(Error::Size { .. })));
    for (first, next) in
        [([1, 1], [-1, -1]), ([1, -1], [-1, 1]), ([-1, -1], [-1, -1]), ([2, -1], [-1, -1]), ([1, 0], [-1, -1])]
    {
        assert!(matches!(Tree::from_links(&first, &next), Err(Error::Unsupported { .. })), "{first:?}");
    }
    assert!(matches!(Tree::from_links(&[-1], &[]), Err(Error::Length { .. })));
    for bad in [&[1, 2][..], &[0, 2], &[0, 1, 0, 1, 2, 1]] {
        assert!(Tree::from_paths(bad, 2).is_err(), "{bad:?}");
    }
    assert!(Tree::from_paths(&[0], 0).is_err() && Tree::from_paths(&[0, 1, 2], 2).is_err());
}

/// Random trees survive every conversion.
#[test]
fn forms_of_random_trees() {
    let mut rng = StdRng::seed_from_u64(9);
    for n in 1..60 {
        let parents: Vec<i32> = (0..n).map(|node| if node == 0 { -1 } else { rng.random_range(0..node) }).collect();
        let tree = Tree::from_parents(&parents).unwrap();
        let (paths, leaves) = tree.paths();
        assert_eq!(leaves, (0..n).filter(|node| !parents.contains(node)).count());
        assert_eq!(Tree::from_paths(&paths, tree.max_depth() + 1).unwrap(), tree);
        assert_eq!(Tree::from_links(tree.first_child(), tree.next_sibling()).unwrap(), tree);
        let words = (n as usize).div_ceil(32);
        for node in 0..n as usize {
            let runs = &tree.runs()[node];
            for other in 0..n as usize {
                let sees = tree.ancestors()[node * words + other / 32] >> (other % 32) & 1 == 1;
                assert_eq!(tree.sees(node, other), sees);
                assert_eq!(runs.iter().any(|run| run.contains(&other)), sees);
            }
        }
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
        for siblings in [Siblings::WithReplacement, Siblings::WithoutReplacement] {
            let mut step = Step::<f32, f32>::new(4, 1, &Tree::from_parents(&[-1, 0, 0]).unwrap());
            (step.kind, step.siblings) = (Drafts::Logits, siblings);
            step.target = [one_hot(4, 2), one_hot(4, 1), one_hot(4, 1)].concat();
            // Two tokens, so that the target is no peak.
            step.target[3] = 0.0;
            step.draft = vec![0.0; 12];
            step.drafts = vec![0, 0, 1];
            step.uniforms = Some(vec![0.0; 12]);
            let outcome = step.run(&device);
            assert_eq!((outcome.accepted[0], outcome.tokens), (Accepted(0), vec![2, -1]), "{siblings:?}");
        }
    }
}

/// p and q that are the same to the last bit leave nothing: no sibling can be rejected but the impossible ones, and a
/// second sibling is not reached.
#[test]
fn nothing_is_left_of_equal_rows() {
    for device in TestDevice::all() {
        let row = [0.3, -0.2, 1.0, 0.1, f32::NEG_INFINITY];
        let mut step = Step::<f32, f32>::new(5, 8, &Tree::from_parents(&[-1, 0, 0]).unwrap());
        step.kind = Drafts::Logits;
        step.target = row.repeat(24);
        step.draft = row.repeat(24);
        step.seeds = Some((0..8).collect());
        for (first, second) in [(4, 4), (1, 2), (4, 2)] {
            step.drafts = [0, first, second].repeat(8);
            let outcome = step.run(&device);
            for b in 0..8 {
                let tokens = &outcome.tokens[b * 2..][..2];
                match (first, second) {
                    (4, 4) => assert!((0..4).contains(&tokens[0]) && tokens[1] == -1),
                    (1, 2) => assert_eq!((tokens[0], outcome.path[b * 2 + 1]), (1, 1)),
                    _ => assert_eq!((tokens[0], outcome.path[b * 2 + 1]), (2, 2)),
                }
                assert_eq!(outcome.status[b], if first == 4 { status::DRAFT_IMPOSSIBLE } else { 0 });
            }
        }
    }
}

/// A draft with q = 0 that the target can draw is accepted, and said to be impossible; so is one that comes again though
/// siblings are distinct, which is passed over.
#[test]
fn impossible_drafts_are_said() {
    for device in TestDevice::all() {
        let mut step = Step::<f32, f32>::new(4, 1, &Tree::from_parents(&[-1, 0, 0]).unwrap());
        step.kind = Drafts::Logits;
        step.draft = one_hot(4, 1).repeat(3);
        step.draft[2] = 0.0;
        step.drafts = vec![0, 3, 1];
        step.uniforms = Some(vec![0.999; 12]);
        let outcome = step.run(&device);
        assert_eq!((outcome.path, outcome.status[0]), (vec![0, 1], status::DRAFT_IMPOSSIBLE));
        // Token 1 fails at first (1/4 of 1/2), and cannot come again.
        step.siblings = Siblings::WithoutReplacement;
        step.drafts = vec![0, 1, 1];
        step.uniforms = Some(vec![0.9; 12]);
        let outcome = step.run(&device);
        assert_eq!((outcome.accepted[0], outcome.status[0]), (Accepted(0), status::DRAFT_IMPOSSIBLE));
        assert!([0, 3].contains(&outcome.tokens[0]));
    }
}

/// The lowest of tied tokens, wherever chunks, lanes and reads begin and end; -0 ties with 0.
#[test]
fn greedy_takes_the_lowest_of_ties() {
    for device in TestDevice::all() {
        for (low, high) in [(0, 1), (7, 8), (255, 256), (1023, 1024), (1024, 2047), (31, 32), (3, 2999), (2048, 2050)] {
            for (a, b) in [(2.5f32, 2.5f32), (0.0, -0.0), (-0.0, 0.0)] {
                let mut step = Step::<bf16, bf16>::new(3000, 1, &Tree::from_parents(&[-1, 0, 0]).unwrap());
                (step.rule, step.cluster) = (Rule::Greedy, Some(2));
                step.target.fill(bf16::from_f32(-1.5));
                for row in 0..3 {
                    step.target[row * 3000 + low] = bf16::from_f32(a);
                    step.target[row * 3000 + high] = bf16::from_f32(b);
                }
                step.drafts = vec![0, high as i32, low as i32];
                let outcome = step.run(&device);
                assert_eq!((outcome.tokens, outcome.path), (vec![low as i32; 2], vec![0, 2]));
            }
        }
    }
}

/// Every bad row sets its bit, gives a defined token, and changes nothing for the other requests.
#[test]
fn bad_rows_harm_no_one_else() {
    let case = Case { batch: 5, vocab: 1500, max_nodes: 5, cluster: Some(2), ..plain() };
    for device in TestDevice::all() {
        for rule in RULES {
            let good = Case { rule, ..case.clone() }.step::<f32, f32>();
            let reference = good.run(&device);
            let (b, columns) = (2, good.max_depth + 1);
            let row = b * 5 * 1500..(b * 5 + 1) * 1500;
            assert!(!good.children(b, 0).is_empty());
            for bad in 0..6 {
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
                        step.row_index.as_mut().unwrap()[b * 5] = -5;
                        expected |= status::ROW_OUT_OF_RANGE;
                    }
                    3 => {
                        step.target[row.start + 1200] = f32::INFINITY;
                        step.target[row.start + 1300] = f32::INFINITY;
                        expected = status::TARGET_BEYOND;
                    }
                    4 => {
                        step.draft[row.start + 700] = f32::NAN;
                        expected = if rule == Rule::Reject { status::DRAFT_BAD } else { 0 };
                    }
                    _ => {
                        let Links::Parents(parents) = &mut step.links else { unreachable!() };
                        parents[b * 5 + 1..b * 5 + 5].copy_from_slice(&[2, 3, 4, 1 << 20]);
                        expected = status::TREE_BAD;
                    }
                }
                let outcome = step.run(&device);
                assert_eq!(outcome.status[b] & expected, expected, "{rule:?} {bad}: {:?}", outcome.status);
                let token = outcome.tokens[b * columns];
                match bad {
                    0..=2 => assert_eq!((token, outcome.emitted[b]), (-7, Emitted(1))),
                    3 => assert_eq!(token, 1200),
                    4 => assert!((0..1500).contains(&token)),
                    _ => assert_eq!(outcome.emitted[b], Emitted(1)),
                }
                for other in (0..5).filter(|&other| other != b) {
                    let of = other * columns..(other + 1) * columns;
                    assert_eq!(outcome.tokens[of.clone()], reference.tokens[of]);
                    assert_eq!(outcome.status[other], reference.status[other]);
                }
            }
        }
    }
}

/// Rows and links that are not there are not looked at; lists in circles end.
#[test]
fn padding_and_lies_are_harmless() {
    for device in TestDevice::all() {
        let mut step = Case { batch: 3, ..plain() }.step::<f32, f32>();
        for lies in [[0, 100, 200, 300], [5, 3, 1, 0], [-3, 2, 4, 1 << 30], [i32::MIN, i32::MAX, 0, 7]] {
            step.cu_rows = Some(lies.to_vec());
            let (host, outcome) = (step.run(&TestDevice::Host), step.run(&device));
            assert_eq!(outcome.exact(), host.exact());
        }
        assert_ne!(step.run(&device).status[0] & status::DRAFTS_IGNORED, 0);
        step.cu_rows = None;
        // No drafts at all.
        let mut without = step.clone();
        without.drafts.fill(-1);
        let outcome = without.run(&device);
        assert!(outcome.accepted.iter().all(|&n| n == Accepted(0)) && outcome.status == [0; 3]);
        // Deeper than the plan goes.
        step.max_depth = 1;
        step.links = Links::Parents(Tree::chain(11).parents().repeat(3));
        step.rule = Rule::Greedy;
        step.target.fill(0.0);
        step.drafts.fill(0);
        let outcome = step.run(&device);
        assert_eq!((outcome.tokens, outcome.path), (vec![0; 6], vec![0, 1, 0, 1, 0, 1]));
        assert_eq!(outcome.status, [status::DRAFTS_IGNORED; 3]);
        // In circles.
        let (mut first, mut next) = (vec![-1; 36], vec![-1; 36]);
        (first[0], next[1], next[2]) = (1, 2, 1);
        step.links = Links::Children { first, next };
        step.drafts.fill(9);
        let outcome = step.run(&device);
        assert_eq!((outcome.status[0], outcome.tokens[0]), (status::TREE_BAD, 0));
    }
}

/// A request's tokens do not depend on its place, on the others, or on how many blocks share it.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for device in TestDevice::all() {
        for (rule, siblings) in [
            (Rule::Greedy, Siblings::WithReplacement),
            (Rule::Match, Siblings::WithReplacement),
            (Rule::Reject, Siblings::WithReplacement),
            (Rule::Reject, Siblings::WithoutReplacement),
        ] {
            let with = With { astray: true, ..With::default() };
            let (n, v) = (6, 5000);
            let case = Case { rule, siblings, vocab: v, batch: 4, max_nodes: n, with, ..plain() };
            let mut step = case.step::<bf16, bf16>();
            let all = step.run(&device);
            for cluster in [1, 2, 4, 8] {
                step.cluster = Some(cluster);
                assert_eq!(step.run(&device), all, "{cluster} blocks");
            }
            step.cluster = None;
            assert_eq!(step.run_for(&device, &DeviceInfo::A100), all);
            // Alone.
            for b in 0..4 {
                let rows = b * n..(b + 1) * n;
                let of = rows.start * v..rows.end * v;
                let mut alone = step.clone();
                alone.batch = 1;
                let Links::Parents(parents) = &step.links else { unreachable!() };
                alone.links = Links::Parents(parents[rows.clone()].to_vec());
                (alone.target, alone.draft) = (step.target[of.clone()].to_vec(), step.draft[of].to_vec());
                alone.drafts = step.drafts[rows].to_vec();
                alone.temperature = Some(vec![step.temperature.as_ref().unwrap()[b]]);
                alone.seeds = Some(vec![step.seeds.as_ref().unwrap()[b]]);
                alone.positions = Some(vec![step.positions.as_ref().unwrap()[b]]);
                alone.kv_start = Some(vec![step.kv_start.as_ref().unwrap()[b]]);
                alone.shift = [3, 5];
                let outcome = alone.run(&device);
                let columns = step.max_depth + 1;
                assert_eq!(outcome.tokens, all.tokens[b * columns..][..columns], "{rule:?}");
                assert_eq!((outcome.accepted[0], outcome.status[0]), (all.accepted[b], all.status[b]));
            }
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
        let columns = step.max_depth + 1;
        let alone = without.run(&device);
        assert!((0..9).all(|b| alone.tokens[b * columns] == outcome.tokens[b * columns]));
        let accepted: Vec<usize> = (0..9).filter(|&b| outcome.accepted[b].0 > 0).collect();
        assert!(!accepted.is_empty());
        for b in accepted {
            // From the node it went on to, as if that were the root of the next step.
            let mut next = without.clone();
            let row = (b * step.max_nodes) as i32 + outcome.path[b * columns + 1];
            next.row_index = Some(vec![row; next.drafts.len()]);
            next.positions.as_mut().unwrap()[b] += 1;
            assert_eq!(next.run(&device).tokens[b * columns], outcome.tokens[b * columns + 1]);
        }
    }
}

/// Rows whose partials do not fit into shared memory, those of 128256 columns, and a whole cluster.
#[test]
fn large_vocabularies() {
    for device in TestDevice::kernels() {
        for (vocab, rule, kind, cluster) in [
            (128256, Rule::Reject, Drafts::LogitsAndStats, 16),
            (540_000, Rule::Reject, Drafts::Logits, 4),
            (151937, Rule::Greedy, Drafts::Deterministic, 8),
        ] {
            let with = With { astray: true, ..With::default() };
            let case = Case { vocab, batch: 1, max_nodes: 4, max_depth: 2, rule, kind, with, ..plain() };
            let mut step = case.step::<bf16, bf16>();
            step.cluster = Some(cluster);
            let plan = step.builder().build(&DeviceInfo::H200).unwrap();
            assert_eq!(plan.schedule().shared_partials, vocab < 500_000);
            assert_same(&step.run(&device), &step.run(&TestDevice::Host));
        }
    }
}

/// As many nodes and levels as a plan may have.
#[test]
fn large_trees() {
    for device in TestDevice::all() {
        for links in [false, true] {
            let case = Case { batch: 2, max_nodes: 1024, max_depth: 64, vocab: 6, kind: Drafts::Logits, ..plain() };
            let mut step = Case { with: With { links, ..With::default() }, ..case }.step::<f32, f32>();
            // Deep: the first 64 drafts are a chain that the target likes.
            let chain: Vec<i32> = (0..1024).map(|node| if node <= 64 { node - 1 } else { node % 64 }).collect();
            let tree = Tree::from_parents(&chain).unwrap();
            step.links = match links {
                false => Links::Parents(chain.repeat(2)),
                true => Links::Children { first: tree.first_child().repeat(2), next: tree.next_sibling().repeat(2) },
            };
            let (rows, v) = (2048, 6);
            for r in 0..rows {
                step.drafts[r] = step.drafts[r].max(0);
                let token = step.drafts[if r % 1024 < 64 { r + 1 } else { r }].max(0) as usize;
                step.target[r * v + token] = 12.0;
                step.draft[r * v + token] = 12.0;
            }
            let outcome = step.run(&device);
            assert_same(&outcome, &step.run(&TestDevice::Host));
            assert!(outcome.accepted.iter().all(|n| n.0 > 20), "{:?}", outcome.accepted);
        }
    }
}

#[test]
fn every_dtype_with_everything() {
    for device in TestDevice::kernels() {
        for dtypes in 0..9 {
            for (seed, rule) in RULES.into_iter().enumerate() {
                let with = With::of(if seed % 2 == 0 { 0x1ffbf } else { 0x1ffdf });
                let case = Case {
                    rule,
                    vocab: 1100,
                    batch: 4,
                    max_nodes: 8,
                    siblings: [Siblings::WithReplacement, Siblings::WithoutReplacement][dtypes % 2],
                    cluster: Some([1, 2][(dtypes + seed) % 2]),
                    with,
                    shift: [dtypes % 3, seed],
                    seed: seed as u64,
                    ..plain()
                };
                for_floats(FLOATS[dtypes / 3], FLOATS[dtypes % 3], SameTokens(&device, &case, false));
            }
        }
    }
}

#[test]
fn bad_plans_are_refused() {
    let builder = || TreeVerifier::<f32, f32>::builder(4, 3, 2, 100);
    let build = |b: TreeVerifierBuilder<f32, f32>| b.build(&DeviceInfo::H200).map(|_| ());
    assert_eq!(build(builder()), Ok(()));
    let size = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    size(build(TreeVerifier::builder(4, 3, 2, 0)), "vocab");
    size(build(TreeVerifier::builder(4, 3, 2, (1 << 24) + 1)), "vocab");
    size(build(TreeVerifier::builder((1 << 20) + 1, 3, 2, 10)), "batch");
    size(build(TreeVerifier::builder(4, 0, 2, 10)), "max_nodes");
    size(build(TreeVerifier::builder(4, 1025, 2, 10)), "max_nodes");
    size(build(TreeVerifier::builder(4, 3, 65, 10)), "max_depth");
    size(build(builder().draft_vocab(0)), "draft_vocab");
    size(build(builder().target_rows(1 << 31)), "target_rows");
    size(build(builder().draft_rows(1 << 31)), "draft_rows");
    let stride = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Stride { arg, .. }) if arg == name), "{result:?}");
    };
    stride(build(builder().target_row_stride(99)), "target");
    stride(build(builder().draft_row_stride(-100)), "draft");
    stride(build(builder().allow_row_stride(3)), "allow");
    let unsupported = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Unsupported { arg, .. }) if arg == name), "{result:?}");
    };
    unsupported(build(builder().rule(Rule::Block)), "rule");
    unsupported(build(builder().cluster(3)), "cluster");
    unsupported(build(builder().cluster(32)), "cluster");
    unsupported(builder().cluster(2).build(&DeviceInfo::A100).map(|_| ()), "cluster");
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder().build(&old), Err(Error::UnsupportedDevice { have: Some(_), .. })));
}

#[test]
fn empty_problems_need_nothing() {
    for device in TestDevice::all() {
        let tree = Tree::chain(2);
        let outcome = Step::<f32, f32>::new(10, 0, &tree).run(&device);
        assert!(outcome.tokens.is_empty() && outcome.emitted.is_empty());
        // A batch of requests without rows, and of requests without drafts.
        let mut step = Step::<f32, f32>::new(10, 3, &tree);
        step.cu_rows = Some(vec![0; 4]);
        let outcome = step.run(&device);
        assert_eq!((outcome.tokens, outcome.last_row), (vec![-1; 9], vec![-1; 3]));
        assert_eq!((outcome.emitted, outcome.status), (vec![Emitted(0); 3], vec![0; 3]));
        step.cu_rows = Some(vec![0, 1, 2, 3]);
        let outcome = step.run(&device);
        assert_eq!((outcome.emitted, outcome.last_row), (vec![Emitted(1); 3], vec![0, 1, 2]));
    }
}

#[test]
fn plans_are_plain_data() {
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<TreeVerifier<f32, bf16>>();
    plain::<Tree>();
    let plan = |vocab| TreeVerifier::<f32, bf16>::builder(8, 4, 3, vocab).build(&DeviceInfo::H200).unwrap();
    assert_eq!(plan(40), plan(40));
    assert_ne!(plan(40), plan(41));
}

/// As many blocks share a request as there is room for and work.
#[test]
fn schedules() {
    let cluster = |batch, vocab, info: &DeviceInfo| {
        let plan = TreeVerifier::<bf16, bf16>::builder(batch, 60, 8, vocab).build(info).unwrap();
        let schedule = plan.schedule();
        assert_eq!(schedule.blocks, batch as u64 * u64::from(schedule.cluster));
        assert_eq!((schedule.of_target, schedule.of_draft), ((vocab as u64).div_ceil(1024), 0));
        schedule.cluster
    };
    assert_eq!(cluster(16, 128256, &DeviceInfo::H200), 16);
    assert_eq!(cluster(1, 128256, &DeviceInfo::H200), 16);
    assert_eq!(cluster(64, 128256, &DeviceInfo::H200), 4);
    assert_eq!(cluster(1000, 128256, &DeviceInfo::H200), 1);
    assert_eq!(cluster(1, 16384, &DeviceInfo::H200), 2);
    assert_eq!(cluster(1, 4096, &DeviceInfo::H200), 1);
    assert_eq!(cluster(16, 128256, &DeviceInfo::A100), 1);
    let plan = TreeVerifier::<bf16, bf16>::builder(16, 60, 8, 128256).build(&DeviceInfo::H200).unwrap();
    assert_eq!(plan.traffic(4).read, 16 * 5 * 128256 * 2);
    let plan = TreeVerifier::<bf16, f32>::builder(16, 60, 8, 128256).drafts(Drafts::Logits);
    assert_eq!(plan.build(&DeviceInfo::H200).unwrap().traffic(4).read, 16 * (5 * 2 + 4 * 4) * 128256);
}

/// More than 2^32 elements between the first row and the last.
#[test]
fn offsets_are_64_bit() {
    use nextscale::In;
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
    let plan = TreeVerifier::<bf16, bf16>::builder(1, 3, 2, vocab).rule(Rule::Greedy).target_row_stride(far as i64);
    let plan = plan.build(&DeviceInfo::H200).unwrap();
    for device in TestDevice::all() {
        let target: &[bf16] = bytemuck::cast_slice(&target);
        let (parents, drafts) = (Buffer::of(&device, &[-1, 0, 1], 0), Buffer::of(&device, &[0, 1500, 1501], 0));
        let mut tokens = Buffer::<i32>::poisoned(&device, 3, 0);
        let mut emitted = Buffer::<Emitted>::poisoned(&device, 1, 0);
        let mut accepted = Buffer::<Accepted>::poisoned(&device, 1, 0);
        let mut status = Buffer::<u32>::poisoned(&device, 1, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
        let on_device = (!device.is_host() && !device.is_emulated()).then(|| Buffer::of(&device, target, 0));
        let view = match &on_device {
            Some(buffer) => buffer.input(),
            #[cfg(feature = "emulate")]
            None if device.is_emulated() => In::emulated(target),
            None => In::host(target),
        };
        let args = TreeVerifierArgs {
            target: view,
            tree: TreeLinks::Parents(parents.input()),
            drafts: drafts.input(),
            options: TreeVerifierOptions::<bf16>::default(),
            out: TreeVerifierOut::new(tokens.output(), emitted.output(), accepted.output(), status.output()),
            workspace: workspace.output(),
        };
        plan.run(&device.stream(), args).unwrap();
        assert_eq!(tokens.read(), [1500, 1501, 1502]);
    }
}

/// What a run refuses, and that it then writes nothing.
#[test]
fn bad_buffers_are_refused_before_anything_is_written() {
    for device in TestDevice::all() {
        let plan = |kind| TreeVerifier::<f32, f32>::builder(2, 2, 1, 10).drafts(kind).build(&DeviceInfo::H200).unwrap();
        let plain = plan(Drafts::Deterministic);
        let target = Buffer::of(&device, &[0f32; 40], 0);
        let (parents, drafts) = (Buffer::of(&device, &[-1, 0, -1, 0], 0), Buffer::of(&device, &[1, -1, 1, -1], 0));
        let floats = Buffer::of(&device, &[0f32; 40], 0);
        let codes = Buffer::of(&device, &[0i32; 2], 0);
        let mut tokens = Buffer::<i32>::poisoned(&device, 4, 0);
        let mut emitted = Buffer::<Emitted>::poisoned(&device, 2, 0);
        let mut accepted = Buffer::<Accepted>::poisoned(&device, 2, 0);
        let mut status = Buffer::<u32>::poisoned(&device, 2, 0);
        let mut path = Buffer::<i32>::poisoned(&device, 4, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, plan(Drafts::Logits).workspace_bytes() as usize, 0);
        let mut run = |plan: &TreeVerifier<f32, f32>, lens: [usize; 6], options: TreeVerifierOptions<'_, f32>| {
            let args = TreeVerifierArgs {
                target: target.input_of(lens[0]),
                tree: match lens[1] {
                    0 => TreeLinks::Children { first_child: parents.input(), next_sibling: parents.input_of(3) },
                    len => TreeLinks::Parents(parents.input_of(len)),
                },
                drafts: drafts.input_of(lens[2]),
                options,
                out: TreeVerifierOut {
                    path: Some(path.output_of(lens[4])),
                    ..TreeVerifierOut::new(
                        tokens.output_of(lens[3]),
                        emitted.output(),
                        accepted.output(),
                        status.output(),
                    )
                },
                workspace: workspace.output_of(if lens[5] == 0 { 3 } else { plan.workspace_bytes() as usize }),
            };
            plan.run(&device.stream(), args)
        };
        let none = TreeVerifierOptions::default;
        let length = |arg, need, got| Err(Error::Length { arg, need, got });
        assert_eq!(run(&plain, [39, 4, 4, 4, 4, 1], none()), length("target", 40, 39));
        assert_eq!(run(&plain, [40, 3, 4, 4, 4, 1], none()), length("parents", 4, 3));
        assert_eq!(run(&plain, [40, 0, 4, 4, 4, 1], none()), length("next_sibling", 4, 3));
        assert_eq!(run(&plain, [40, 4, 3, 4, 4, 1], none()), length("drafts", 4, 3));
        assert_eq!(run(&plain, [40, 4, 4, 3, 4, 1], none()), length("tokens", 4, 3));
        assert_eq!(run(&plain, [40, 4, 4, 4, 3, 1], none()), length("path", 4, 3));
        assert!(matches!(run(&plain, [40, 4, 4, 4, 4, 0], none()), Err(Error::Workspace { got: 3, .. })));
        let refused = |result, name: &str| {
            assert!(matches!(result, Err(Error::Unsupported { arg, .. }) if arg == name), "{result:?}");
        };
        let all = [40, 4, 4, 4, 4, 1];
        let draft = || TreeVerifierOptions { draft: Some(floats.input_of(40)), ..none() };
        let stats = || Some(floats.input_of(16));
        refused(run(&plain, all, draft()), "draft");
        refused(run(&plain, all, TreeVerifierOptions { draft_stats: stats(), ..none() }), "draft_stats");
        refused(run(&plain, all, TreeVerifierOptions { rules: Some(codes.input()), ..none() }), "rules");
        refused(run(&plan(Drafts::Logits), all, none()), "draft");
        refused(
            run(&plan(Drafts::Logits), all, TreeVerifierOptions { draft_stats: stats(), ..draft() }),
            "draft_stats",
        );
        refused(run(&plan(Drafts::LogitsAndStats), all, draft()), "draft_stats");
        let short = TreeVerifierOptions { draft: Some(floats.input_of(39)), ..none() };
        assert_eq!(run(&plan(Drafts::Logits), all, short), length("draft", 40, 39));
        let short = TreeVerifierOptions { kv_start: Some(codes.input_of(1)), ..none() };
        assert_eq!(run(&plain, all, short), length("kv_start", 2, 1));
        assert!(tokens.read().iter().all(|&token| token == -1) && status.read().iter().all(|&said| said == u32::MAX));
    }
}

/// Rows beside the path are not read, those on it once, and again only for children that fail.
#[cfg(feature = "emulate")]
#[test]
fn only_the_path_is_read() {
    use nextscale::emulator;
    for (rule, kind) in
        [(Rule::Greedy, Drafts::Deterministic), (Rule::Match, Drafts::Deterministic), (Rule::Reject, Drafts::Logits)]
    {
        let (vocab, batch, cluster) = (32768, 3, 4);
        let case = Case { rule, kind, vocab, batch, max_nodes: 24, cluster: Some(cluster), ..plain() };
        let mut step = case.step::<bf16, bf16>();
        // Each node's first child is sure to be accepted.
        for b in 0..batch {
            for node in 0..24 {
                let Some(&child) = step.children(b, node).first() else { continue };
                let at = (b * 24 + node) * vocab + step.drafts[b * 24 + child] as usize;
                step.target[at] = bf16::from_f32(60.0);
                if kind != Drafts::Deterministic {
                    step.draft[at] = bf16::from_f32(60.0);
                }
            }
        }
        emulator::reset();
        let outcome = step.run(&TestDevice::Emulated);
        let counted = emulator::counters().global_load_bytes;
        let rows: u64 = outcome.emitted.iter().map(|n| n.0 as u64).sum();
        let leaves: u64 = outcome.path.iter().filter(|&&node| node >= 0).count() as u64;
        assert_eq!(rows, leaves);
        assert!((6..20).contains(&rows), "{rows}");
        let row = vocab as u64 * 2;
        // No row of the draft at leaves, nor at a walk's greatest depth.
        let of_draft = if kind == Drafts::Logits { rows - batch as u64 } else { 0 };
        let least = (rows + of_draft) * row;
        // The chunk of the token, by each block; the tree and the parameters.
        let more = rows * u64::from(cluster) * 2 * 2048 + (batch as u64 * u64::from(cluster)) * 32 * 1024;
        assert!(
            (least..=least + more).contains(&counted),
            "{rule:?}: {counted} instead of {least} to {}",
            least + more
        );
        assert!(counted < (batch * 24) as u64 * row / 2);
    }
}

/// A captured graph takes what the buffers hold when it is replayed.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn graphs_replay() {
    let Some(TestDevice::Cuda(stream)) = TestDevice::cuda() else { return };
    let device = TestDevice::Cuda(stream.clone());
    for rule in RULES {
        let with = With { astray: true, ..With::default() };
        let step = Case { rule, vocab: 20000, with, ..plain() }.step::<bf16, bf16>();
        let plan = step.builder().build(&DeviceInfo::of(&stream).unwrap()).unwrap();
        let target = Buffer::of(&device, &step.target, 0);
        let draft = Buffer::of(&device, &step.draft, 0);
        let Links::Parents(parents) = &step.links else { unreachable!() };
        let (parents, mut drafts) = (Buffer::of(&device, parents, 0), Buffer::of(&device, &step.drafts, 0));
        let temperature = Buffer::of(&device, step.temperature.as_ref().unwrap(), 0);
        let seeds = Buffer::of(&device, step.seeds.as_ref().unwrap(), 0);
        let mut positions = Buffer::of(&device, step.positions.as_ref().unwrap(), 0);
        let (batch, written) = (step.batch, step.batch * (step.max_depth + 1));
        let mut tokens = Buffer::<i32>::poisoned(&device, written, 0);
        let mut emitted = Buffer::<Emitted>::poisoned(&device, batch, 0);
        let mut accepted = Buffer::<Accepted>::poisoned(&device, batch, 0);
        let mut status = Buffer::<u32>::poisoned(&device, batch, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
        let mut run = |drafts: &Buffer<i32>, positions: &Buffer<i64>| {
            let args = TreeVerifierArgs {
                target: target.input(),
                tree: TreeLinks::Parents(parents.input()),
                drafts: drafts.input(),
                options: TreeVerifierOptions {
                    draft: Some(draft.input()),
                    temperature: Some(temperature.input()),
                    seeds: Some(seeds.input()),
                    positions: Some(positions.input()),
                    ..TreeVerifierOptions::default()
                },
                out: TreeVerifierOut::new(tokens.output(), emitted.output(), accepted.output(), status.output()),
                workspace: workspace.output(),
            };
            plan.run(&stream, args).unwrap();
        };
        run(&drafts, &positions); // loads the code
        let graph = support::capture(&stream, || run(&drafts, &positions));
        for replay in 0..3 {
            let mut now = step.clone();
            now.positions.as_mut().unwrap().iter_mut().for_each(|position| *position += replay);
            now.drafts.rotate_left(replay as usize * step.max_nodes);
            drafts.write(&now.drafts);
            positions.write(now.positions.as_ref().unwrap());
            graph.launch().unwrap();
            assert_eq!(tokens.read(), now.run(&TestDevice::Host).tokens, "{rule:?}");
        }
    }
}
