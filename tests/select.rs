//! The selection: against a sort of exact scores, and the kernels against the host.

#![cfg(feature = "compression")]

mod support;

use nextscale::compression::{PositionWeight, Scope, Select, SelectArgs, SelectBuilder, Tie, Traffic, status};
use nextscale::{Device, DeviceInfo, Error, In, Out, Stream};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, TestDevice};

/// What the scores are like. All but `Any` are such that f32 holds every intermediate result.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Any,
    /// Multiples of 1/64, with ties.
    Coarse,
    Equal,
    /// NaN and infinities among them.
    Odd,
    AllNan,
}

#[derive(Debug, Clone)]
struct Case {
    sets: usize,
    heads: usize,
    tokens: usize,
    scope: Scope,
    kind: Kind,
    given: [bool; 2],
    gaps: [usize; 2],
    shift: usize,
    length: usize,
    budget: usize,
    /// Lengths and budgets come from the device, some out of range.
    device_lengths: bool,
    device_budgets: bool,
    sink: usize,
    recent: usize,
    active: usize,
    block: usize,
    lambda: f32,
    relative: bool,
    weighted: bool,
    demoted: usize,
    newest: bool,
    shared_bytes: Option<usize>,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let tokens =
        prop_oneof![0..40usize, 100..300usize, 250..270usize, Just(128), Just(127), Just(129), 1000..1030usize];
    (
        (1..4usize, prop_oneof![Just(1usize), Just(2), Just(4)], tokens, 0..4usize, 0..5usize),
        (any::<[bool; 2]>(), [0..7usize, 0..7usize], 0..4usize, 0.0..1.1f64, 0.0..1.3f64),
        (any::<[bool; 2]>(), 0..6usize, 0..20usize, 0..6usize, prop_oneof![Just(1usize), Just(1), Just(1), 2..9usize]),
        (0..3usize, any::<[bool; 3]>(), prop_oneof![Just(0usize), 0..50usize], any::<u64>()),
    )
        .prop_map(|((sets, heads, tokens, scope, kind), shape, ranges, rest)| {
            let ([first, second], gaps, shift, length, budget) = shape;
            let ([device_lengths, device_budgets], sink, recent, active, block) = ranges;
            let (lambda, [relative, weighted, newest], demoted, seed) = rest;
            let floor = [0.0, 0.25, 1.0][seed as usize % 3];
            let scope = [Scope::PerHead, Scope::PerSet, Scope::Shared, Scope::Ada { floor }][scope];
            let ada = matches!(scope, Scope::Ada { .. });
            Case {
                sets,
                heads,
                tokens,
                scope,
                kind: [Kind::Any, Kind::Coarse, Kind::Equal, Kind::Odd, Kind::AllNan][kind],
                given: [first, second],
                gaps,
                shift,
                length: ((tokens as f64 * length) as usize).min(tokens),
                budget: (tokens as f64 * budget) as usize,
                device_lengths,
                device_budgets,
                sink,
                recent,
                active,
                block: if ada { 1 } else { block },
                lambda: [0.25, 0.5, 0.75][lambda],
                relative: relative && !ada,
                weighted,
                demoted,
                newest,
                shared_bytes: seed.is_multiple_of(2).then_some(16384),
                seed,
            }
        })
}

struct Data {
    scores: [Vec<f32>; 2],
    weights: Vec<f32>,
    lengths: Vec<i32>,
    budgets: Vec<i32>,
}

#[derive(Debug, PartialEq, Clone)]
struct Chosen {
    indices: Vec<Vec<i32>>,
    counts: Vec<i32>,
    status: Vec<u32>,
}

impl Case {
    fn ada(&self) -> bool {
        matches!(self.scope, Scope::Ada { .. })
    }

    fn strides(&self, which: usize) -> [usize; 2] {
        let head = self.tokens + self.gaps[which];
        [self.heads * head, head]
    }

    fn builder(&self) -> SelectBuilder {
        let strides = [0, 1].map(|which| self.strides(which).map(|stride| stride as i64));
        let mut builder = Select::builder(self.sets, self.heads, self.tokens)
            .scope(self.scope)
            .importance_strides(strides[0])
            .redundancy_strides(strides[1])
            .length(self.length)
            .budget(self.budget)
            .sink(self.sink)
            .recent(self.recent)
            .active(self.active)
            .block(self.block)
            .lambda(self.lambda)
            .relative(self.relative)
            .demote(self.demoted, 1e6)
            .tie(if self.newest { Tie::Newest } else { Tie::Oldest });
        if self.device_budgets {
            builder = builder.capacity(self.tokens + self.active);
        }
        match self.shared_bytes {
            Some(bytes) => builder.shared_bytes(bytes),
            None => builder,
        }
    }

    fn plan(&self) -> Select {
        self.builder().build(&DeviceInfo::H200).unwrap()
    }

    fn data(&self) -> Data {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let score = |rng: &mut StdRng| -> f32 {
            let coarse = rng.random_range(-64..64) as f32 / 64.0;
            match self.kind {
                Kind::Any => rng.random_range(-1.0..1.0f32) * 2f32.powi(rng.random_range(-20..2)),
                Kind::Coarse => coarse,
                Kind::Equal => 0.5,
                Kind::AllNan => f32::NAN,
                Kind::Odd => match rng.random_range(0..12) {
                    0 => f32::NAN,
                    1 => f32::INFINITY,
                    2 => f32::NEG_INFINITY,
                    3 => -0.0,
                    4 => 0.0,
                    _ => coarse,
                },
            }
        };
        let scores = [0, 1].map(|which| {
            let [set, head] = self.strides(which);
            let len = ((self.sets - 1) * set + (self.heads - 1) * head + self.tokens) * usize::from(self.tokens > 0);
            (0..len).map(|_| score(&mut rng)).collect()
        });
        let plan = self.plan();
        let weights = (0..plan.items()).map(|_| rng.random_range(0..5) as f32 / 4.0).collect();
        let tokens = self.tokens as i32;
        let mut some = |most: i32| match rng.random_range(0..8) {
            0 => -3,
            1 => most + 5,
            2 => most,
            3 => 0,
            _ => rng.random_range(0..=most),
        };
        let lengths = (0..plan.lists()).map(|_| some(tokens)).collect();
        let budgets = (0..plan.lists()).map(|_| some(tokens)).collect();
        Data { scores, weights, lengths, budgets }
    }

    fn run(&self, device: &TestDevice, data: &Data) -> Chosen {
        let plan = self.plan();
        let scores = [0, 1].map(|which| Buffer::of(device, &data.scores[which], self.shift));
        let weights = Buffer::of(device, &data.weights, self.shift);
        let lengths = Buffer::of(device, &data.lengths, 1);
        let budgets = Buffer::of(device, &data.budgets, 1);
        let mut indices = Buffer::<i32>::poisoned(device, plan.lists() * plan.capacity(), 1);
        // Poison is -1, which is what stands after the indices too.
        indices.write(&vec![i32::MIN; plan.lists() * plan.capacity()]);
        let mut counts = Buffer::<i32>::poisoned(device, plan.lists(), 1);
        let mut statuses = Buffer::<u32>::poisoned(device, plan.lists(), 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        plan.run(
            &device.stream(),
            SelectArgs {
                importance: self.given[0].then(|| scores[0].input()),
                redundancy: self.given[1].then(|| scores[1].input()),
                weights: self.weighted.then(|| weights.input()),
                lengths: self.device_lengths.then(|| lengths.input()),
                budgets: self.device_budgets.then(|| budgets.input()),
                indices: indices.output(),
                counts: counts.output(),
                status: Some(statuses.output()),
                workspace: Some(workspace.output()),
            },
        )
        .unwrap();
        workspace.read();
        let indices = indices.read();
        let counts = counts.read();
        let lists = (0..plan.lists()).map(|list| {
            let of_list = &indices[list * plan.capacity()..][..plan.capacity()];
            assert!(of_list[counts[list] as usize..].iter().all(|&index| index == -1));
            of_list[..counts[list] as usize].to_vec()
        });
        Chosen { indices: lists.collect(), counts: counts.clone(), status: statuses.read() }
    }
}

/// Lists as a sort chooses them, from scores that are exact.
struct Oracle<'a> {
    case: &'a Case,
    data: &'a Data,
}

impl Oracle<'_> {
    fn raw(&self, set: usize, head: usize, token: usize) -> f64 {
        let of = |which: usize| {
            let [by_set, by_head] = self.case.strides(which);
            f64::from(self.data.scores[which][set * by_set + head * by_head + token])
        };
        let lambda = f64::from(self.case.lambda);
        match self.case.given {
            [true, true] => lambda * of(0) - (1.0 - lambda) * of(1),
            [true, false] => of(0),
            [false, true] => -of(1),
            [false, false] => 0.0,
        }
    }

    fn token(&self, list: usize, token: usize) -> f64 {
        let case = self.case;
        let of_set =
            |set: usize| (0..case.heads).map(|head| self.raw(set, head, token)).sum::<f64>() / case.heads as f64;
        match case.scope {
            Scope::Shared => (0..case.sets).map(of_set).sum(),
            Scope::PerSet => of_set(list),
            _ => self.raw(list / case.heads, list % case.heads, token),
        }
    }

    fn length(&self, list: usize) -> usize {
        match self.case.device_lengths {
            true => self.data.lengths[list].clamp(0, self.case.tokens as i32) as usize,
            false => self.case.length,
        }
    }

    fn budget(&self, list: usize) -> usize {
        match self.case.device_budgets {
            true => self.data.budgets[list].clamp(0, self.case.tokens as i32) as usize,
            false => self.case.budget,
        }
    }

    /// Raw scores of the items of a list.
    fn items(&self, list: usize) -> Vec<f64> {
        let (block, length) = (self.case.block, self.length(list));
        let of_item = |first: usize| {
            let last = (first + block).min(length);
            let sum: f64 = (first..last).map(|token| self.token(list, token)).sum();
            if block == 1 { sum } else { f64::from(sum as f32 / (last - first) as f32) }
        };
        (0..length).step_by(block).map(of_item).collect()
    }

    /// Protected at the start and the end, and how many of the others are kept; in items.
    fn quota(&self, list: usize, budget: usize) -> [usize; 3] {
        let (case, length) = (self.case, self.length(list));
        let items = length.div_ceil(case.block);
        let budget = if budget >= length { items } else { budget / case.block };
        let mut left = budget;
        let sink = case.sink.div_ceil(case.block).min(items).min(left);
        left -= sink;
        let touched = (0..items).filter(|item| ((item + 1) * case.block).min(length) + case.recent > length).count();
        let recent = touched.min(items - sink).min(left);
        left -= recent;
        [sink, recent, left.min(items - sink - recent)]
    }

    fn final_scores(&self, list: usize, sink: usize, recent: usize) -> Vec<f64> {
        let case = self.case;
        let mut items = self.items(list);
        let candidates = sink..items.len() - recent;
        let finite = items[candidates].iter().copied().filter(|x| x.is_finite());
        let least = finite.fold(f64::INFINITY, f64::min);
        for (i, score) in items.iter_mut().enumerate() {
            // Means of blocks use all bits of an f32, so that what follows is rounded to one: that may make two equal.
            let rounded = |x: f64| if case.block == 1 { x } else { f64::from(x as f32) };
            if case.relative && least.is_finite() {
                *score = rounded(*score - least);
            }
            if case.weighted {
                *score = rounded(*score * f64::from(self.data.weights[i]));
            }
            if i < case.demoted {
                // Not exact: a million takes most of the bits.
                *score = f64::from(*score as f32 - 1e6f32);
            }
        }
        items
    }

    /// Best first.
    fn order(&self, scores: &[f64], mut items: Vec<usize>) -> Vec<usize> {
        let age = |i: usize| if self.case.newest { usize::MAX - i } else { i };
        let rank = |x: f64| (x.is_nan(), if x.is_nan() { 0.0 } else { -x });
        items.sort_by(|&a, &b| rank(scores[a]).partial_cmp(&rank(scores[b])).unwrap().then(age(a).cmp(&age(b))));
        items
    }

    /// Ada-KV's budgets of the heads of a set.
    fn split(&self, set: usize, floor: f32) -> Vec<usize> {
        let heads = self.case.heads;
        let quotas: Vec<_> = (0..heads).map(|h| self.quota(set * heads + h, self.budget(set * heads + h))).collect();
        let (mut scores, mut of_head) = (Vec::new(), Vec::new());
        for (h, &[sink, recent, _]) in quotas.iter().enumerate() {
            let list = set * heads + h;
            let all = self.final_scores(list, sink, recent);
            scores.extend_from_slice(&all[sink..all.len() - recent]);
            of_head.resize(scores.len(), h);
        }
        let total: usize = quotas.iter().map(|quota| quota[2]).sum();
        let best = self.order(&scores, (0..scores.len()).collect());
        let mut won = vec![0; heads];
        best[..total].iter().for_each(|&i| won[of_head[i]] += 1);
        let shares: Vec<f64> = (0..heads)
            .map(|h| won[h] as f64 * (1.0 - f64::from(floor)) + quotas[h][2] as f64 * f64::from(floor))
            .collect();
        let mut whole: Vec<usize> = shares.iter().map(|share| share.floor() as usize).collect();
        let mut by_rest: Vec<usize> = (0..heads).collect();
        by_rest.sort_by(|&a, &b| shares[b].fract().partial_cmp(&shares[a].fract()).unwrap().then(a.cmp(&b)));
        let left = total - whole.iter().sum::<usize>();
        by_rest[..left].iter().for_each(|&h| whole[h] += 1);
        assert_eq!(whole.iter().sum::<usize>(), total);
        (0..heads).map(|h| whole[h] + quotas[h][0] + quotas[h][1]).collect()
    }

    fn chosen(&self) -> Chosen {
        let case = self.case;
        let plan = case.plan();
        let mut chosen = Chosen { indices: Vec::new(), counts: Vec::new(), status: Vec::new() };
        for list in 0..plan.lists() {
            let budget = match case.scope {
                Scope::Ada { floor } => self.split(list / case.heads, floor)[list % case.heads],
                _ => self.budget(list),
            };
            let [sink, recent, kept] = self.quota(list, budget);
            let scores = self.final_scores(list, sink, recent);
            let candidates: Vec<usize> = (sink..scores.len() - recent).collect();
            let has_nan = candidates.iter().any(|&i| scores[i].is_nan());
            let mut items = self.order(&scores, candidates);
            items.truncate(kept);
            items.extend((0..sink).chain(scores.len() - recent..scores.len()));
            items.sort_unstable();
            let length = self.length(list);
            let tokens = items.iter().flat_map(|&item| item * case.block..((item + 1) * case.block).min(length));
            let indices: Vec<i32> = tokens.chain(length..length + case.active).map(|token| token as i32).collect();
            let out_of_range = |array: &[i32], given: bool| given && !(0..=case.tokens as i32).contains(&array[list]);
            let clamped = out_of_range(&self.data.lengths, case.device_lengths)
                || out_of_range(&self.data.budgets, case.device_budgets);
            chosen.counts.push(indices.len() as i32);
            chosen.indices.push(indices);
            let said = |bit, is| if is { bit } else { 0 };
            chosen.status.push(said(status::NAN, has_nan) | said(status::CLAMPED, clamped));
        }
        chosen
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases() * 8, ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_a_sort(mut case in case()) {
        if case.kind == Kind::Any {
            case.kind = Kind::Coarse;
        }
        let data = case.data();
        prop_assert_eq!(case.run(&TestDevice::Host, &data), Oracle { case: &case, data: &data }.chosen());
    }

    /// Whatever the scores: exactly the budget, ascending, and no dropped score above a kept one by more than rounding.
    #[test]
    fn every_kept_score_is_at_least_every_dropped_one(case in case()) {
        let mut case = Case { kind: Kind::Any, active: 0, ..case };
        if case.ada() {
            case.scope = Scope::PerHead;
        }
        let data = case.data();
        let chosen = case.run(&TestDevice::Host, &data);
        let oracle = Oracle { case: &case, data: &data };
        for (list, indices) in chosen.indices.iter().enumerate() {
            prop_assert!(indices.windows(2).all(|pair| pair[0] < pair[1]));
            let (length, budget) = (oracle.length(list), oracle.budget(list));
            if case.block == 1 {
                prop_assert_eq!(indices.len(), budget.min(length));
            }
            let [sink, recent, _] = oracle.quota(list, budget);
            let scores = oracle.final_scores(list, sink, recent);
            let kept = |item: usize| indices.contains(&((item * case.block) as i32));
            let candidates = || sink..scores.len() - recent;
            let least = candidates().filter(|&i| kept(i)).map(|i| scores[i]).fold(f64::INFINITY, f64::min);
            let most = candidates().filter(|&i| !kept(i)).map(|i| scores[i]).fold(f64::NEG_INFINITY, f64::max);
            let magnitude = if case.demoted > 0 { 1e6 } else { 16.0 };
            prop_assert!(least >= most - magnitude * 1e-6, "{} {}", least, most);
        }
    }
}

#[test]
fn kernels_agree_with_the_host() {
    for device in TestDevice::kernels() {
        let config = ProptestConfig {
            cases: support::cases() * if device.is_emulated() { 2 } else { 8 },
            failure_persistence: None,
            ..ProptestConfig::default()
        };
        proptest::test_runner::TestRunner::new(config)
            .run(&case(), |case| {
                let data = case.data();
                prop_assert_eq!(case.run(&device, &data), case.run(&TestDevice::Host, &data));
                Ok(())
            })
            .unwrap();
    }
}

fn plain() -> Case {
    Case {
        sets: 2,
        heads: 2,
        tokens: 300,
        scope: Scope::PerHead,
        kind: Kind::Any,
        given: [true; 2],
        gaps: [0; 2],
        shift: 0,
        length: 300,
        budget: 100,
        device_lengths: false,
        device_budgets: false,
        sink: 0,
        recent: 0,
        active: 0,
        block: 1,
        lambda: 0.07,
        relative: false,
        weighted: false,
        demoted: 0,
        newest: false,
        shared_bytes: None,
        seed: 11,
    }
}

/// Around the tiles, with the scores in shared memory and without.
#[test]
fn lengths_and_budgets_at_the_edges() {
    for device in TestDevice::kernels() {
        let many = [1, 2, 127, 128, 129, 511, 512, 513, 2047, 2048, 2049, 2500, 8192, 8200];
        let lengths = if device.is_emulated() { &many[..12] } else { &many[..] };
        for &tokens in lengths {
            for budget in [0, 1, tokens / 2, tokens - 1, tokens, tokens + 7] {
                for (kind, shared_bytes, newest) in
                    [(Kind::Any, None, false), (Kind::Coarse, Some(16384), true), (Kind::Odd, None, true)]
                {
                    let case = Case { sets: 1, tokens, length: tokens, budget, kind, shared_bytes, newest, ..plain() };
                    if let (Some(_), 2048..) = (shared_bytes, tokens) {
                        assert!(!case.plan().cached());
                    }
                    let data = case.data();
                    let chosen = case.run(&device, &data);
                    assert!(chosen.counts.iter().all(|&count| count as usize == budget.min(tokens)));
                    assert_eq!(chosen, case.run(&TestDevice::Host, &data), "{case:?}");
                }
            }
        }
    }
}

/// A long list: over more threads, and over global memory.
#[test]
fn long_lists() {
    for device in TestDevice::kernels() {
        let lengths: &[usize] = if device.is_emulated() { &[9000] } else { &[24300, 57000, 131072, 300_001] };
        for &tokens in lengths {
            for kind in [Kind::Any, Kind::Coarse, Kind::Equal] {
                for shared_bytes in [None, Some(16384)] {
                    let case = Case { tokens, length: tokens - 1, budget: tokens / 3, kind, shared_bytes, ..plain() };
                    let case = Case { sets: 1, sink: 5, recent: 100, relative: true, weighted: true, ..case };
                    let data = case.data();
                    assert_eq!(case.run(&device, &data), case.run(&TestDevice::Host, &data), "{tokens} {kind:?}");
                }
            }
        }
    }
}

/// Ada-KV's total is exact, whatever the floor.
#[test]
fn ada_keeps_the_total() {
    for device in TestDevice::all() {
        for (i, floor) in [0.0, 0.1, 0.2, 1.0 / 3.0, 0.5, 0.9, 1.0].into_iter().enumerate() {
            let case = Case { scope: Scope::Ada { floor }, heads: 7, sink: 2, recent: 3, seed: i as u64, ..plain() };
            let case = Case { given: [true, false], shared_bytes: (i % 2 == 0).then_some(16384), ..case };
            let data = case.data();
            let chosen = case.run(&device, &data);
            for of_set in chosen.counts.chunks(7) {
                assert_eq!(of_set.iter().sum::<i32>(), 7 * 100);
                let least = 5.0 + (95.0 * f64::from(floor)).floor();
                assert!(of_set.iter().all(|&count| f64::from(count) >= least), "{of_set:?}");
            }
            if floor == 1.0 {
                assert!(chosen.counts.iter().all(|&count| count == 100));
            } else if floor == 0.0 {
                assert!(chosen.counts.iter().any(|&count| count != 100));
            }
        }
    }
}

/// A list knows nothing of the others.
#[test]
fn independent_of_other_lists() {
    for device in TestDevice::all() {
        let case = Case { relative: true, weighted: true, ..plain() };
        let data = case.data();
        let all = case.run(&device, &data);
        let alone = Case { sets: 1, heads: 1, shift: 3, ..case.clone() };
        let last = |scores: &Vec<f32>| scores[3 * 300..].to_vec();
        let own = Data {
            scores: [last(&data.scores[0]), last(&data.scores[1])],
            weights: data.weights.clone(),
            lengths: vec![],
            budgets: vec![],
        };
        assert_eq!(alone.run(&device, &own).indices[0], all.indices[3]);
        assert_eq!(case.run(&device, &data), all);
    }
}

/// FlowCache's weights, by its formulas in f32.
#[test]
fn weights_by_name() {
    let n = 1000usize;
    for i in [0, 1, 499, 998, 999] {
        let x = i as f32 / (n - 1) as f32;
        let close = |name: PositionWeight, want: f32| {
            let have = name.at(i, n);
            assert!((have - want).abs() < 1e-5, "{name:?} {i}: {have} {want}");
        };
        close(PositionWeight::None, 1.0);
        close(PositionWeight::Exponential, 0.1 + 0.9 * ((1.0 - (-2.0 * x).exp()) / (1.0 - (-2.0f32).exp())));
        close(PositionWeight::Polynomial(3), 0.1 + 0.9 * x.powi(3));
        close(PositionWeight::UpperConvexPolynomial(3), 2.0 * (1.0 - (1.0 - x).powi(3)));
        let sigma = n as f32 / 4.0;
        let decay = |i: f32| (-0.5 * (i / sigma).powi(2)).exp();
        let least = decay((n - 1) as f32);
        close(PositionWeight::Gaussian, 0.1 + 0.9 * ((decay(i as f32) - least) / (1.0 - least)));
    }
    assert_eq!(PositionWeight::Exponential.table(3).len(), 3);
    for weight in [PositionWeight::Exponential, PositionWeight::Polynomial(3), PositionWeight::Gaussian] {
        assert!(weight.at(0, 1).is_finite());
    }
}

#[test]
fn bad_plans_and_buffers_are_refused() {
    let build = |builder: SelectBuilder| builder.build(&DeviceInfo::H200).map(|_| ());
    let builder = || Select::builder(2, 3, 100).budget(10);
    let size = |built: Result<(), Error>, name: &str| {
        assert!(matches!(built, Err(Error::Size { arg, .. }) if arg == name), "{built:?}");
    };
    size(build(Select::builder(1, 1, 1 << 30)), "tokens");
    size(build(Select::builder(1 << 20, 1 << 12, 1)), "sets * heads");
    size(build(builder().length(101)), "length");
    size(build(builder().block(0)), "block");
    size(build(builder().capacity(9)), "capacity");
    size(build(builder().capacity(1 << 30)), "capacity");
    size(build(builder().active(4).capacity(13)), "capacity");
    size(build(builder().shared_bytes(16383)), "shared_bytes");
    size(build(builder().shared_bytes(300 << 10)), "shared_bytes");
    let ada = Scope::Ada { floor: 0.2 };
    size(build(Select::builder(1, 1025, 10).scope(ada)), "heads");
    size(build(Select::builder(1, 1024, 1 << 21).scope(ada)), "heads * tokens");
    size(build(builder().scope(ada).capacity(29)), "capacity");
    let unsupported = |built: Result<(), Error>, name: &str| {
        assert!(matches!(built, Err(Error::Unsupported { arg, .. }) if arg == name), "{built:?}");
    };
    unsupported(build(builder().scope(ada).block(2)), "block");
    unsupported(build(builder().scope(ada).relative(true)), "relative");
    unsupported(build(builder().scope(Scope::Ada { floor: 1.5 })), "floor");
    unsupported(build(builder().lambda(f32::NAN)), "lambda");
    unsupported(build(builder().demote(1, f32::NAN)), "demotion");
    let negative = build(builder().redundancy_strides([-1, 100]));
    assert!(matches!(negative, Err(Error::Stride { arg: "redundancy", got: -1, .. })));
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder().build(&old), Err(Error::UnsupportedDevice { .. })));

    let plan = builder().scope(Scope::PerSet).build(&DeviceInfo::H200).unwrap();
    let workspace = plan.workspace_bytes() as usize;
    let run = |lens: [usize; 9], at: u64, device: i32| {
        // SAFETY: every call is refused before anything is launched.
        unsafe {
            let args = SelectArgs {
                importance: Some(In::from_raw(at, lens[0], device)),
                redundancy: Some(In::from_raw(0x2000, lens[1], 0)),
                weights: Some(In::from_raw(0x3000, lens[2], 0)),
                lengths: Some(In::from_raw(0x4000, lens[3], 0)),
                budgets: Some(In::from_raw(0x5000, lens[4], 0)),
                indices: Out::from_raw(0x6000, lens[5], 0),
                counts: Out::from_raw(0x7000, lens[6], 0),
                status: Some(Out::from_raw(0x8000, lens[7], 0)),
                workspace: Some(Out::from_raw(0x9000, lens[8], 0)),
            };
            plan.run(&Stream::from_raw(std::ptr::null_mut(), 0), args)
        }
    };
    let fits = [600, 600, 100, 2, 2, 20, 2, 2, workspace];
    let names = ["importance", "redundancy", "weights", "lengths", "budgets", "indices", "counts", "status"];
    for (i, arg) in names.into_iter().enumerate() {
        let mut lens = fits;
        lens[i] -= 1;
        assert_eq!(run(lens, 0x1000, 0), Err(Error::Length { arg, need: fits[i] as u64, got: lens[i] as u64 }));
    }
    let mut lens = fits;
    lens[8] -= 1;
    assert_eq!(run(lens, 0x1000, 0), Err(Error::Workspace { need: workspace as u64, got: workspace as u64 - 1 }));
    assert_eq!(run(fits, 0x1002, 0), Err(Error::Alignment { arg: "importance", need: 4 }));
    assert_eq!(run(fits, 0x6010, 0), Err(Error::Overlap { written: "indices", other: "importance" }));
    let other = Error::DeviceMismatch { arg: "importance", stream: Device::Cuda(0), got: Device::Cuda(1) };
    assert_eq!(run(fits, 0x1000, 1), Err(other));
}

/// StreamingLLM: no scores, a sink, and of equals the newest.
#[test]
fn without_scores_age_decides() {
    for device in TestDevice::all() {
        let case = Case { given: [false; 2], sink: 4, budget: 50, newest: true, ..plain() };
        let chosen = case.run(&device, &case.data());
        let want: Vec<i32> = (0..4).chain(254..300).collect();
        assert!(chosen.indices.iter().all(|indices| *indices == want));
    }
}

#[test]
fn plans_are_plain_data() {
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<Select>();
    let plan = |budget| Select::builder(2, 3, 100).budget(budget).build(&DeviceInfo::H200).unwrap();
    assert_eq!(plan(10), plan(10));
    assert_ne!(plan(10), plan(11));
    assert_eq!((plan(10).workspace_bytes(), plan(10).capacity(), plan(10).lists()), (0, 10, 6));
    assert_eq!(plan(10).traffic(2), Traffic { read: 600 * 4 * 2, written: 6 * 44 });
    assert_eq!(plan(1000).capacity(), 100);
}

/// What the emulator counts, beside what the plan says.
#[cfg(feature = "emulate")]
#[test]
fn scores_that_fit_are_read_once() {
    use nextscale::emulator;
    for (shared_bytes, least, most) in [(None, 1.0, 1.05), (Some(16384), 4.0, 8.0)] {
        let case = Case { tokens: 2560, length: 2560, budget: 640, shared_bytes, ..plain() };
        let data = case.data();
        emulator::reset();
        case.run(&TestDevice::Emulated, &data);
        let loads = emulator::counters().global_load_bytes as f64 / case.plan().traffic(2).read as f64;
        assert!((least..most).contains(&loads), "{loads}");
    }
}

/// More than 2^31 elements between two sets.
#[test]
fn offsets_are_64_bit() {
    if std::env::var_os("NXS_SMALL").is_some() {
        eprintln!("SKIPPED: NXS_SMALL is set, and this takes 9 GiB");
        return;
    }
    for device in TestDevice::kernels().into_iter().filter(|device| !device.is_emulated()) {
        let far = (1i64 << 31) + 64;
        let plan = Select::builder(2, 1, 16).importance_strides([far, 0]).budget(3).build(&DeviceInfo::H200).unwrap();
        let mut scores = vec![0f32; far as usize + 16];
        [1, 4, 9].into_iter().for_each(|i| scores[i] = 1.0);
        [2, 3, 15].into_iter().for_each(|i| scores[far as usize + i] = 1.0);
        let scores = Buffer::of(&device, &scores, 0);
        let mut indices = Buffer::<i32>::poisoned(&device, 6, 0);
        let mut counts = Buffer::<i32>::poisoned(&device, 2, 0);
        plan.run(
            &device.stream(),
            SelectArgs {
                importance: Some(scores.input()),
                redundancy: None,
                weights: None,
                lengths: None,
                budgets: None,
                indices: indices.output(),
                counts: counts.output(),
                status: None,
                workspace: None,
            },
        )
        .unwrap();
        assert_eq!((indices.read(), counts.read()), (vec![1, 4, 9, 2, 3, 15], vec![3, 3]));
    }
}

/// A captured graph replays with the scores, lengths and budgets of the moment.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn graphs_replay() {
    let Some(TestDevice::Cuda(stream)) = TestDevice::cuda() else { return };
    let device = TestDevice::Cuda(stream.clone());
    let case = Case { device_lengths: true, device_budgets: true, scope: Scope::Ada { floor: 0.25 }, ..plain() };
    let plan = case.plan();
    let first = case.data();
    let mut importance = Buffer::of(&device, &first.scores[0], 0);
    let mut lengths = Buffer::of(&device, &first.lengths, 0);
    let mut budgets = Buffer::of(&device, &first.budgets, 0);
    let mut indices = Buffer::<i32>::poisoned(&device, plan.lists() * plan.capacity(), 0);
    let mut counts = Buffer::<i32>::poisoned(&device, plan.lists(), 0);
    let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
    let case = Case { given: [true, false], ..case };
    case.run(&device, &first); // loads the code
    let graph = support::capture(&stream, || {
        let args = SelectArgs {
            importance: Some(importance.input()),
            redundancy: None,
            weights: None,
            lengths: Some(lengths.input()),
            budgets: Some(budgets.input()),
            indices: indices.output(),
            counts: counts.output(),
            status: None,
            workspace: Some(workspace.output()),
        };
        plan.run(&stream, args).unwrap();
    });
    for seed in 0..4 {
        let case = Case { seed, ..case.clone() };
        let data = case.data();
        importance.write(&data.scores[0]);
        lengths.write(&data.lengths);
        budgets.write(&data.budgets);
        graph.launch().unwrap();
        let want = case.run(&TestDevice::Host, &data);
        assert_eq!(counts.read(), want.counts);
        let indices = indices.read();
        for (list, of_list) in want.indices.iter().enumerate() {
            assert_eq!(&indices[list * plan.capacity()..][..of_list.len()], of_list);
        }
    }
}
