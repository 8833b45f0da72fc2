//! Importance on every device, against an f64 oracle written here from the formula.

#![cfg(feature = "compression")]

mod support;

use nextscale::compression::{
    Aggregation, Importance, ImportanceArgs, ImportanceBuilder, ImportanceVariant, Pool, Reduction, Traffic,
};
use nextscale::dtype::Float;
use nextscale::{DType, DeviceInfo, Error, In, Layout, Out, Result, Stream, bf16, f16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use support::{Buffer, ForFloats, TestDevice, for_floats, poison};

/// One problem: everything but the dtype.
#[derive(Debug, Clone)]
struct Case {
    sets: usize,
    tokens: usize,
    queries: usize,
    heads: usize,
    groups: usize,
    dim: usize,
    aggregation: Aggregation,
    reduction: Reduction,
    causal: bool,
    excluded: usize,
    unscored: usize,
    pool: Pool,
    accumulate: bool,
    /// The queries are listed among so many more rows.
    listed: Option<usize>,
    masked: usize,
    given_lse: bool,
    /// 0: none; 1: random; 2: edges of tiles.
    lengths: u8,
    shuffled: bool,
    /// Eights of elements between heads, elements between rows of scores.
    gap: [usize; 3],
    /// How large the queries are.
    spread: f32,
    /// A NaN among the keys of one set and head.
    nan: bool,
    /// Multiprocessors that the plan thinks there are: what is split depends on it.
    multiprocessors: i32,
    variant: ImportanceVariant,
    seed: u64,
}

fn plain() -> Case {
    Case {
        sets: 2,
        tokens: 300,
        queries: 20,
        heads: 2,
        groups: 3,
        dim: 64,
        aggregation: Aggregation::MaxLogit,
        reduction: Reduction::Mean,
        causal: false,
        excluded: 0,
        unscored: 0,
        pool: Pool::None,
        accumulate: false,
        listed: None,
        masked: 0,
        given_lse: false,
        lengths: 0,
        shuffled: false,
        gap: [0; 3],
        spread: 1.0,
        nan: false,
        multiprocessors: 132,
        variant: ImportanceVariant::Auto,
        seed: 1,
    }
}

const AGGREGATIONS: [Aggregation; 4] =
    [Aggregation::MaxLogit, Aggregation::MeanProb, Aggregation::MaxProb, Aggregation::Logit];

fn case() -> impl Strategy<Value = Case> {
    let sizes = (
        0..3usize,
        prop_oneof![
            4 => proptest::sample::select(vec![0usize, 1, 7, 31, 32, 33, 63, 64, 65, 127, 129, 255, 256, 257]),
            2 => 1..200usize,
            1 => 1..600usize
        ],
        prop_oneof![
            3 => proptest::sample::select(vec![0usize, 1, 2, 7, 8, 9, 16, 17]),
            1 => proptest::sample::select(vec![32usize, 50, 63, 64, 65, 130])
        ],
        1..4usize,
        prop_oneof![3 => 1..5usize, 1 => 5..9usize],
        proptest::sample::select(vec![64usize, 96, 128]),
    );
    let what = (
        proptest::sample::select(AGGREGATIONS.to_vec()),
        proptest::sample::select(vec![Reduction::Mean, Reduction::Sum]),
        any::<bool>(),
        prop_oneof![2 => Just(0usize), 1 => 1..20usize],
        prop_oneof![2 => Just(0usize), 1 => 1..40usize],
        prop_oneof![2 => Just(Pool::None), 1 => (0..6u32).prop_map(|n| Pool::Max(2 * n + 1)), 1 => (0..6u32).prop_map(|n| Pool::Average(2 * n + 1)), 1 => Just(Pool::Max(63))],
        any::<bool>(),
    );
    let more = (
        proptest::option::weighted(0.3, 0..30usize),
        prop_oneof![3 => Just(0usize), 1 => 1..17usize],
        any::<bool>(),
        0..3u8,
        any::<bool>(),
        prop_oneof![2 => Just([0usize; 3]), 1 => [0..3usize, 0..3usize, 0..9usize]],
    );
    let rest = (
        prop_oneof![3 => Just(1f32), 1 => Just(0.1), 1 => Just(20.0)],
        proptest::bool::weighted(0.15),
        prop_oneof![1 => Just(132), 1 => Just(4), 1 => Just(20)],
        any::<bool>(),
        any::<u64>(),
    );
    (sizes, what, more, rest).prop_map(|(sizes, what, more, rest)| {
        let (sets, tokens, queries, heads, groups, dim) = sizes;
        let (aggregation, reduction, causal, excluded, unscored, pool, accumulate) = what;
        let (listed, masked, given_lse, lengths, shuffled, gap) = more;
        let (spread, nan, multiprocessors, hopper, seed) = rest;
        let lse_fits = aggregation != Aggregation::Logit && (aggregation != Aggregation::MaxLogit || groups == 1);
        let fits = sets * tokens * queries > 0
            && listed.is_none()
            && aggregation != Aggregation::Logit
            && (aggregation != Aggregation::MaxLogit || groups <= 4);
        let hopper = hopper && fits;
        let causal = causal && !hopper;
        Case {
            sets,
            tokens,
            queries,
            heads,
            groups,
            dim,
            aggregation,
            reduction,
            causal,
            excluded,
            unscored,
            pool,
            accumulate: accumulate && masked == 0,
            listed,
            masked,
            given_lse: given_lse && lse_fits,
            lengths,
            shuffled,
            gap,
            spread,
            nan,
            multiprocessors,
            variant: if hopper { ImportanceVariant::Hopper } else { ImportanceVariant::Auto },
            seed,
        }
    })
}

/// Strides of a dense tensor whose dimensions lie in a random order, the innermost `inner` apart.
fn strides<const N: usize>(shape: [u64; N], shuffled: bool, inner: i64, rng: &mut StdRng) -> [i64; N] {
    let mut order: [usize; N] = std::array::from_fn(|dim| N - 1 - dim);
    if shuffled {
        order.shuffle(rng);
    }
    let mut strides = [0; N];
    let mut stride = inner;
    for dim in order {
        strides[dim] = stride;
        stride *= shape[dim].max(1) as i64;
    }
    strides
}

struct Problem<T> {
    q: Vec<T>,
    k: Vec<T>,
    old: Vec<f32>,
    rows: Vec<i32>,
    masked: Vec<i32>,
    lengths: Vec<i32>,
    lse: Vec<f32>,
    q_layout: Layout<4>,
    k_layout: Layout<4>,
    scores_layout: Layout<3>,
    lengths_layout: Layout<2>,
    lse_layout: Layout<3>,
    /// Of each element of the scores' buffer: what it should be, and how far it may be from it. `None`: untouched.
    expected: Vec<Option<(f64, f64)>>,
}

impl Case {
    fn q_rows(&self) -> usize {
        self.listed.map_or(self.queries, |more| self.queries / 2 + more + 1)
    }

    fn device(&self) -> DeviceInfo {
        let mut device = DeviceInfo::H200;
        device.sm_count = self.multiprocessors;
        device
    }

    fn problem<T: Float>(&self) -> Problem<T> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let [sets, tokens, queries, heads, groups, dim] =
            [self.sets, self.tokens, self.queries, self.heads, self.groups, self.dim].map(|n| n as u64);
        let q_rows = self.q_rows() as u64;
        let inner = |gap: usize| (self.dim + 8 * gap) as i64;
        let [a, b, c] = strides([sets, q_rows, heads * groups], self.shuffled, inner(self.gap[0]), &mut rng);
        let q_layout = Layout::strided([sets, q_rows, heads * groups, dim], [a, b, c, 1]);
        let [a, b, c] = strides([sets, tokens, heads], self.shuffled, inner(self.gap[1]), &mut rng);
        let k_layout = Layout::strided([sets, tokens, heads, dim], [a, b, c, 1]);
        let [a, b] = strides([sets, heads], self.shuffled, (self.tokens + self.gap[2]) as i64, &mut rng);
        let scores_layout = Layout::strided([sets, heads, tokens], [a, b, 1]);
        let lengths_shape = [sets, heads];
        let lengths_layout = Layout::strided(lengths_shape, strides(lengths_shape, self.shuffled, 1, &mut rng));
        let lse_shape = [sets, heads * groups, queries];
        let lse_layout = Layout::strided(lse_shape, strides(lse_shape, self.shuffled, 1, &mut rng));

        let mut values = |len: u64, spread: f32| -> Vec<T> {
            (0..len).map(|_| T::from_f32(rng.random_range(-1.0..1.0f32) * spread)).collect()
        };
        let q = values(q_layout.required_len("").unwrap(), self.spread);
        let mut k = values(k_layout.required_len("").unwrap(), 1.0);
        let old: Vec<f32> = (0..scores_layout.required_len("").unwrap())
            .map(|_| if self.accumulate { rng.random_range(0.0..1.0) } else { poison() })
            .collect();
        // Beyond the ends too.
        let rows: Vec<i32> = (0..queries).map(|_| rng.random_range(-2..q_rows as i32 + 2)).collect();
        let masked: Vec<i32> = (0..self.masked).map(|_| rng.random_range(-3..tokens as i32 + 3)).collect();
        let lengths: Vec<i32> = (0..lengths_layout.required_len("").unwrap())
            .map(|_| match self.lengths {
                2 => [-1, 0, 1, 31, 32, 63, 64, 65, 256, i32::MAX][rng.random_range(0..10)],
                _ => rng.random_range(0..=tokens as i32),
            })
            .collect();
        let nan_at = (self.nan && sets * heads * tokens > 0).then(|| {
            let at = [rng.random_range(0..sets), rng.random_range(0..tokens), rng.random_range(0..heads)];
            k[k_layout.offset([at[0], at[1], at[2], rng.random_range(0..dim)]) as usize] = T::from_f32(f32::NAN);
            at
        });
        let mut lse = vec![0f32; lse_layout.required_len("").unwrap() as usize];
        let mut expected = vec![None; old.len()];

        let scale = 1.0 / (self.dim as f64).sqrt();
        for (set, head) in (0..sets).flat_map(|s| (0..heads).map(move |h| (s, h))) {
            let length = match self.lengths {
                0 => tokens,
                _ => i64::from(lengths[lengths_layout.offset([set, head]) as usize]).clamp(0, tokens as i64) as u64,
            };
            let seen = length.saturating_sub(self.excluded as u64);
            let scored = seen.saturating_sub(self.unscored as u64);
            let is_nan = nan_at.is_some_and(|[s, j, h]| (s, h) == (set, head) && j < seen);
            let vector = |from: &[T], at: u64| -> Vec<f64> {
                from[at as usize..][..self.dim].iter().map(|x| f64::from(x.to_f32())).collect()
            };
            let keys: Vec<Vec<f64>> = (0..seen).map(|j| vector(&k, k_layout.offset([set, j, head, 0]))).collect();
            // [column]: value, bound
            let mut raw = vec![(0f64, 0f64); scored as usize];
            let mut nan_column = vec![false; scored as usize];
            for i in 0..queries {
                let row = match self.listed {
                    Some(_) => i64::from(rows[i as usize]).clamp(0, q_rows as i64 - 1) as u64,
                    None => i,
                };
                let visible = match self.causal {
                    true => ((length + i + 1).saturating_sub(queries)).min(seen),
                    false => seen,
                };
                // [group][key]: logit; the largest sum of magnitudes
                let mut largest = 0f64;
                let logits: Vec<Vec<f64>> = (0..groups)
                    .map(|g| {
                        let q = vector(&q, q_layout.offset([set, row, head * groups + g, 0]));
                        let dot = |key: &Vec<f64>| {
                            largest =
                                f64::max(largest, q.iter().zip(key).map(|(a, b)| (a * b).abs()).sum::<f64>() * scale);
                            q.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() * scale
                        };
                        keys[..visible as usize].iter().map(dot).collect()
                    })
                    .collect();
                let lse_of = |x: &[f64]| {
                    let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    if x.is_empty() { top } else { top + x.iter().map(|x| (x - top).exp()).sum::<f64>().ln() }
                };
                for (g, logits) in logits.iter().enumerate() {
                    let at = lse_layout.offset([set, head * groups + g as u64, i]);
                    lse[at as usize] = if is_nan { f32::NAN } else { lse_of(logits) as f32 };
                }
                let max_logits: Vec<f64> = (0..visible as usize)
                    .map(|j| logits.iter().map(|of| of[j]).fold(f64::NEG_INFINITY, f64::max))
                    .collect();
                let lses: Vec<f64> = logits.iter().map(|x| lse_of(x)).collect();
                let lse_of_max = lse_of(&max_logits);
                for j in 0..visible.min(scored) as usize {
                    let probability = |g: usize| (logits[g][j] - lses[g]).exp();
                    let x = match self.aggregation {
                        Aggregation::MaxLogit => (max_logits[j] - lse_of_max).exp(),
                        Aggregation::MeanProb => (0..self.groups).map(probability).sum(),
                        Aggregation::MaxProb => (0..self.groups).map(probability).fold(0.0, f64::max),
                        Aggregation::Logit => logits.iter().map(|of| of[j]).sum(),
                    };
                    raw[j].0 += x;
                    raw[j].1 += match self.aggregation {
                        Aggregation::Logit => groups as f64 * largest * 2f64.powi(-16),
                        _ => x * (1.0 + largest) * 2f64.powi(-15),
                    };
                    nan_column[j] |= keys[j].iter().any(|x| x.is_nan());
                }
            }
            let divisor = match (self.reduction, self.aggregation) {
                (Reduction::Sum, _) => 1.0,
                (_, Aggregation::MeanProb | Aggregation::Logit) => (queries * groups).max(1) as f64,
                _ => queries.max(1) as f64,
            };
            let raw: Vec<(f64, f64)> = raw
                .iter()
                .enumerate()
                .map(|(j, &(value, bound))| match masked[..].contains(&(j as i32)) {
                    true => (f64::NEG_INFINITY, 0.0),
                    false if queries > 0 && is_nan && (self.aggregation != Aggregation::Logit || nan_column[j]) => {
                        (f64::NAN, 0.0)
                    }
                    false => (value / divisor, bound / divisor + value.abs() * 2f64.powi(-18) / divisor + 1e-36),
                })
                .collect();
            for j in 0..tokens {
                let at = scores_layout.offset([set, head, j]) as usize;
                let before = if self.accumulate { f64::from(old[at]) } else { 0.0 };
                let (mut value, mut bound) = (0.0, 0.0);
                if j < scored {
                    let half = match self.pool {
                        Pool::None => 0,
                        Pool::Max(width) | Pool::Average(width) => u64::from(width / 2),
                    };
                    let around = &raw[j.saturating_sub(half) as usize..(j + half + 1).min(scored) as usize];
                    bound = around.iter().map(|x| x.1).fold(0.0, f64::max);
                    value = match self.pool {
                        Pool::Average(width) => around.iter().map(|x| x.0).sum::<f64>() / f64::from(width),
                        _ if around.iter().any(|x| x.0.is_nan()) => f64::NAN,
                        _ => around.iter().map(|x| x.0).fold(f64::NEG_INFINITY, f64::max),
                    };
                }
                let total = before + value;
                expected[at] = Some((total, bound + (value.abs() + total.abs()).min(1e30) * 2f64.powi(-22)));
            }
        }
        Problem {
            q,
            k,
            old,
            rows,
            masked,
            lengths,
            lse,
            q_layout,
            k_layout,
            scores_layout,
            lengths_layout,
            lse_layout,
            expected,
        }
    }

    fn builder<T: Float>(&self, problem: &Problem<T>) -> ImportanceBuilder<T> {
        let three = |strides: [i64; 4]| [strides[0], strides[1], strides[2]];
        let [set, head, _] = problem.scores_layout.strides();
        let mut builder = Importance::builder(self.heads, self.groups, self.dim)
            .sets(self.sets)
            .tokens(self.tokens)
            .queries(self.queries)
            .masked(self.masked)
            .q_strides(three(problem.q_layout.strides()))
            .k_strides(three(problem.k_layout.strides()))
            .scores_strides([set, head])
            .lengths_strides(problem.lengths_layout.strides())
            .lse_strides(problem.lse_layout.strides())
            .aggregation(self.aggregation)
            .reduction(self.reduction)
            .excluded(self.excluded)
            .unscored(self.unscored)
            .pool(self.pool)
            .variant(self.variant);
        if self.listed.is_some() {
            builder = builder.listed_queries(self.q_rows());
        }
        if self.causal {
            builder = builder.causal();
        }
        if self.accumulate {
            builder = builder.accumulate();
        }
        if self.given_lse {
            builder = builder.given_lse();
        }
        builder
    }

    fn plan<T: Float>(&self, problem: &Problem<T>) -> Importance<T> {
        self.builder(problem).build(&self.device()).unwrap()
    }

    /// The buffer of scores after a run.
    fn run<T: Float>(&self, device: &TestDevice, plan: &Importance<T>, problem: &Problem<T>) -> Vec<f32> {
        let (q, k) = (Buffer::of(device, &problem.q, 0), Buffer::of(device, &problem.k, 0));
        let rows = Buffer::of(device, &problem.rows, 1);
        let masked = Buffer::of(device, &problem.masked, 1);
        let lengths = Buffer::of(device, &problem.lengths, 1);
        let lse = Buffer::of(device, &problem.lse, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let mut scores = Buffer::of(device, &problem.old, 1);
        let args = ImportanceArgs {
            pages: None,
            q: q.input(),
            k: k.input(),
            scores: scores.output(),
            rows: self.listed.map(|_| rows.input()),
            masked: (self.masked > 0).then(|| masked.input()),
            lengths: (self.lengths > 0).then(|| lengths.input()),
            lse: self.given_lse.then(|| lse.input()),
            workspace: Some(workspace.output()),
        };
        plan.run(&device.stream(), args).unwrap();
        workspace.read();
        scores.read()
    }
}

fn check<T: Float>(actual: &[f32], problem: &Problem<T>) -> std::result::Result<(), String> {
    for (at, (&actual, expected)) in actual.iter().zip(&problem.expected).enumerate() {
        let close = match expected {
            None => actual.to_bits() == problem.old[at].to_bits(),
            Some((value, _)) if value.is_nan() => actual.is_nan(),
            Some((value, _)) if value.is_infinite() => f64::from(actual) == *value,
            Some((value, bound)) => (f64::from(actual) - value).abs() <= *bound,
        };
        if !close {
            return Err(format!("element {at}: {actual}, expected {expected:?}"));
        }
    }
    Ok(())
}

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

struct CheckOn<'a>(&'a Case, &'a TestDevice);
impl ForFloats for CheckOn<'_> {
    fn call<T: Float, O: Float>(self) {
        let CheckOn(case, device) = self;
        let problem = case.problem::<T>();
        let plan = case.plan(&problem);
        let first = case.run(device, &plan, &problem);
        if let Err(error) = check(&first, &problem) {
            panic!("{error}\n{case:?}\n{:?}", plan.schedule());
        }
        let again = case.run(device, &plan, &problem);
        assert_eq!(bits(&first), bits(&again), "{case:?}");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn everywhere(case: &Case) {
    for dtype in TYPES {
        for device in TestDevice::all() {
            if dtype != DType::F32 || device.is_host() {
                for_floats(dtype, dtype, CheckOn(case, &device));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases(), ..ProptestConfig::default() })]

    #[test]
    fn scores_are_those_of_the_formula(case in case(), dtype in 0..3usize) {
        for device in TestDevice::all() {
            let dtype = if device.is_host() { TYPES[dtype] } else { TYPES[1 + dtype % 2] };
            for_floats(dtype, dtype, CheckOn(&case, &device));
        }
    }

    /// Every row and key belongs to one block, of each pass.
    #[test]
    fn schedules_cover_all(
        (heads, groups) in (1..12usize, 1..17usize),
        tokens in 0..70_000usize,
        queries in prop_oneof![0..200usize, 0..13_000usize],
        aggregation in proptest::sample::select(AGGREGATIONS.to_vec()),
        sets in 1..40usize,
        dim in proptest::sample::select(vec![64usize, 96, 128]),
    ) {
        let builder = |sets| {
            Importance::<bf16>::builder(heads, groups, dim).sets(sets).tokens(tokens).queries(queries).aggregation(aggregation)
        };
        let plan = builder(sets).build(&DeviceInfo::H200).unwrap();
        let schedule = plan.schedule();
        let together = groups > 1 && matches!(aggregation, Aggregation::MaxLogit | Aggregation::MaxProb);
        let vectors = if together { groups as u64 } else { 1 };
        let rows = (queries * groups) as u64 / vectors;
        prop_assert!(schedule.stat_rows % 8 == 0 && schedule.sum_rows % 8 == 0);
        let rows = if schedule.hopper { queries as u64 } else { rows };
        prop_assert_eq!(schedule.stat_splits, (tokens as u64).div_ceil(schedule.stat_span).max(1));
        prop_assert_eq!(schedule.sum_splits, rows.div_ceil(schedule.sum_rows_split).max(1));
        prop_assert_eq!(schedule.sum_rows_split % schedule.sum_rows, 0);
        let buffers = if rows > schedule.sum_rows { 2 } else { 1 };
        prop_assert!(schedule.hopper || schedule.sum_rows * vectors * buffers * dim as u64 * 2 <= 96 << 10);
        prop_assert!(buffers == 1 || schedule.hopper || schedule.sum_rows * vectors <= 256);
        prop_assert!(plan.workspace_bytes() < 4 * (sets * heads * (queries * groups + 64)) as u64 * 2
            + 4 * schedule.sum_splits * (sets * heads * tokens) as u64
            + 8 * schedule.stat_splits * (sets * heads * queries * groups) as u64 + 512);
        // What decides of a result does not depend on the number of sets.
        let one = builder(1).build(&DeviceInfo::H200).unwrap().schedule();
        prop_assert_eq!((one.stat_rows, one.stat_span, one.sum_rows, one.sum_rows_split),
            (schedule.stat_rows, schedule.stat_span, schedule.sum_rows, schedule.sum_rows_split));
    }
}

#[test]
fn published_rules() {
    // SnapKV: a window of the last queries, causal, its keys not scored.
    let snap = Case {
        queries: 32,
        groups: 4,
        aggregation: Aggregation::MeanProb,
        reduction: Reduction::Sum,
        causal: true,
        unscored: 32,
        pool: Pool::Average(5),
        lengths: 2,
        ..plain()
    };
    // R-KV: softmax over all but the window.
    let rkv = Case { queries: 8, groups: 4, excluded: 8, pool: Pool::Max(7), dim: 128, ..plain() };
    // FlowCache, 50 queries.
    let flow = Case { queries: 50, groups: 3, pool: Pool::Max(7), dim: 128, lengths: 1, ..plain() };
    // H2O: all queries, added to what there was.
    let h2o = Case {
        queries: 70,
        tokens: 70,
        groups: 1,
        aggregation: Aggregation::MeanProb,
        reduction: Reduction::Sum,
        causal: true,
        accumulate: true,
        ..plain()
    };
    // ScaleKV: logits of a grid of queries, whose columns do not compete.
    let scale = Case {
        queries: 16,
        groups: 1,
        aggregation: Aggregation::Logit,
        reduction: Reduction::Sum,
        listed: Some(30),
        masked: 16,
        pool: Pool::Max(5),
        ..plain()
    };
    for case in [snap, rkv, flow, h2o, scale] {
        everywhere(&case);
    }
}

/// Few keys and many queries: blocks share the queries of a key, and sums are added up afterwards.
#[test]
fn queries_are_split() {
    for (aggregation, groups) in [(Aggregation::MeanProb, 1), (Aggregation::MaxLogit, 2), (Aggregation::MaxProb, 2)] {
        let variant = ImportanceVariant::Portable;
        let case = Case { sets: 1, heads: 1, tokens: 40, queries: 1100, groups, aggregation, variant, ..plain() };
        let plan = case.plan(&case.problem::<bf16>());
        assert!(plan.schedule().sum_splits > 1, "{:?}", plan.schedule());
        everywhere(&case);
        everywhere(&Case { causal: true, accumulate: true, ..case.clone() });
    }
}

/// Hopper's kernels on what is special to them: tiles of 64, 128 and 256 rows, chunks of 128 keys, all numbers of query heads.
#[test]
fn hopper_is_those_of_the_formula() {
    for (tokens, queries, heads, groups, dim) in
        [(300, 70, 2, 3, 128), (129, 130, 1, 4, 96), (257, 257, 1, 1, 64), (64, 1, 2, 2, 128)]
    {
        for aggregation in [Aggregation::MaxLogit, Aggregation::MeanProb, Aggregation::MaxProb] {
            let case = Case {
                tokens,
                queries,
                heads,
                groups,
                dim,
                aggregation,
                variant: ImportanceVariant::Hopper,
                ..plain()
            };
            assert!(case.plan(&case.problem::<bf16>()).schedule().hopper);
            everywhere(&case);
            everywhere(&Case {
                lengths: 2,
                pool: Pool::Max(7),
                excluded: 3,
                accumulate: true,
                shuffled: true,
                ..case.clone()
            });
            everywhere(&Case { nan: true, lengths: 1, gap: [1, 2, 3], multiprocessors: 4, ..case.clone() });
        }
    }
    // Queries and keys are split.
    let case = Case {
        sets: 1,
        heads: 1,
        tokens: 600,
        queries: 1100,
        groups: 1,
        variant: ImportanceVariant::Hopper,
        ..plain()
    };
    let schedule = case.plan(&case.problem::<bf16>()).schedule();
    assert!(schedule.sum_splits > 1 && schedule.stat_splits > 1, "{schedule:?}");
    everywhere(&case);
}

/// Many keys for few queries: the softmax of a row is put together from several blocks'.
#[test]
fn keys_are_split() {
    for aggregation in AGGREGATIONS {
        let case =
            Case { sets: 1, heads: 1, tokens: 1500, queries: 5, groups: 2, aggregation, spread: 20.0, ..plain() };
        if aggregation != Aggregation::Logit {
            assert!(case.plan(&case.problem::<bf16>()).schedule().stat_splits > 2);
        }
        everywhere(&case);
    }
}

/// One set gives what it gives among others, bit for bit, whatever these hold.
#[test]
fn sets_do_not_depend_on_each_other() {
    for device in TestDevice::all() {
        for aggregation in AGGREGATIONS {
            let all = Case { sets: 5, tokens: 333, aggregation, lengths: 1, multiprocessors: 4, ..plain() };
            let mut problem = all.problem::<bf16>();
            // The others hold what would spread if anything could.
            let per_set = problem.k_layout.strides()[0] as usize;
            problem.k[per_set..].fill(bf16::NAN);
            let among = all.run(&device, &all.plan(&problem), &problem);
            let alone = Case { sets: 1, ..all.clone() };
            let cut = alone.run(
                &device,
                &alone.plan(&problem),
                &Problem {
                    old: problem.old[..2 * 333].to_vec(),
                    q: problem.q.clone(),
                    k: problem.k[..per_set].to_vec(),
                    rows: vec![],
                    masked: vec![],
                    lengths: problem.lengths.clone(),
                    lse: vec![],
                    expected: vec![],
                    ..problem
                },
            );
            assert_eq!(bits(&cut), bits(&among[..2 * 333]), "{aggregation:?}");
        }
    }
}

/// The oracle's bounds are narrow enough to tell a wrong rule from the right one.
#[test]
fn other_rules_are_told_apart() {
    let case = Case { tokens: 130, queries: 17, causal: true, unscored: 3, pool: Pool::Max(3), lengths: 1, ..plain() };
    let problem = case.problem::<bf16>();
    let device = TestDevice::Host;
    check(&case.run(&device, &case.plan(&problem), &problem), &problem).unwrap();
    let others = [
        Case { aggregation: Aggregation::MaxProb, ..case.clone() },
        Case { aggregation: Aggregation::MeanProb, ..case.clone() },
        Case { causal: false, ..case.clone() },
        Case { unscored: 4, ..case.clone() },
        Case { excluded: 1, unscored: 2, ..case.clone() },
        Case { pool: Pool::Max(5), ..case.clone() },
        Case { pool: Pool::Average(3), ..case.clone() },
        Case { reduction: Reduction::Sum, ..case.clone() },
        Case { lengths: 0, ..case.clone() },
    ];
    for other in others {
        check(&other.run(&device, &other.plan(&problem), &problem), &problem).expect_err("another rule");
    }
}

fn refusal(change: impl FnOnce(ImportanceBuilder<bf16>) -> ImportanceBuilder<bf16>) -> Error {
    let builder = Importance::<bf16>::builder(2, 3, 64).sets(2).tokens(100).queries(10);
    change(builder).build(&DeviceInfo::H200).unwrap_err()
}

#[test]
fn bad_plans_are_refused() {
    let build =
        |heads, groups, dim| Importance::<bf16>::builder(heads, groups, dim).build(&DeviceInfo::H200).unwrap_err();
    assert!(matches!(build(1, 1, 80), Error::Size { arg: "dim", got: 80, .. }));
    assert!(matches!(build(0, 1, 64), Error::Size { arg: "heads", .. }));
    assert!(matches!(build(1, 0, 64), Error::Size { arg: "groups", .. }));
    assert!(matches!(build(1, 17, 64), Error::Size { arg: "groups", max: 16, .. }));
    assert!(matches!(refusal(|b| b.sets(40_000)), Error::Size { arg: "sets * heads", .. }));
    assert!(matches!(refusal(|b| b.tokens(1 << 31)), Error::Size { arg: "tokens", .. }));
    assert!(matches!(refusal(|b| b.queries(1 << 30)), Error::Size { arg: "queries * groups", .. }));
    assert!(matches!(refusal(|b| b.masked(1025)), Error::Size { arg: "masked", .. }));
    assert!(matches!(refusal(|b| b.listed_queries(0)), Error::Size { arg: "q_rows", .. }));
    assert!(matches!(refusal(|b| b.pool(Pool::Max(65))), Error::Size { arg: "pool", .. }));
    assert!(matches!(refusal(|b| b.pool(Pool::Average(4))), Error::Unsupported { arg: "pool", .. }));
    assert!(matches!(refusal(|b| b.scale(0.0)), Error::Unsupported { arg: "scale", .. }));
    assert!(matches!(refusal(|b| b.scale(f32::NAN)), Error::Unsupported { arg: "scale", .. }));
    assert!(matches!(refusal(|b| b.given_lse()), Error::Unsupported { arg: "lse", .. }));
    assert!(matches!(
        refusal(|b| b.given_lse().aggregation(Aggregation::Logit)),
        Error::Unsupported { arg: "lse", .. }
    ));
    assert!(matches!(refusal(|b| b.masked(1).accumulate()), Error::Unsupported { arg: "masked", .. }));
    assert!(matches!(refusal(|b| b.q_strides([1 << 20, 4, 64])), Error::Stride { arg: "q", dim: 1, got: 4, .. }));
    assert!(matches!(refusal(|b| b.k_strides([-8, 8, 64])), Error::Stride { arg: "k", dim: 0, got: -8, .. }));
    assert!(matches!(refusal(|b| b.scores_strides([100, 100])), Error::Stride { arg: "scores", .. }));
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    let plan = Importance::<bf16>::builder(1, 1, 64).build(&old);
    assert!(matches!(plan, Err(Error::UnsupportedDevice { .. })));
    let plan = Importance::<bf16>::builder(1, 1, 64).variant(ImportanceVariant::Hopper).build(&DeviceInfo::A100);
    assert!(matches!(plan, Err(Error::Unsupported { arg: "variant", .. })));
}

#[test]
fn bad_buffers_are_refused() {
    let plan = |change: fn(ImportanceBuilder<f32>) -> ImportanceBuilder<f32>| {
        let builder = Importance::<f32>::builder(1, 1, 64).tokens(3).queries(2).pool(Pool::Max(3));
        change(builder).build(&DeviceInfo::A100).unwrap()
    };
    let run = |plan: &Importance<f32>, lens: [usize; 6], workspace: u64| -> Result<()> {
        let (q, k, ints, lse) = (vec![0f32; lens[0]], vec![0f32; lens[1]], vec![0i32; 8], vec![0f32; lens[5]]);
        let (mut scores, mut bytes) = (vec![0f32; lens[2]], vec![0u8; 2048]);
        let skip = bytes.as_ptr().align_offset(256);
        plan.run(
            &Stream::host(),
            ImportanceArgs {
                pages: None,
                q: In::host(&q),
                k: In::host(&k),
                scores: Out::host(&mut scores),
                rows: (lens[3] > 0).then(|| In::host(&ints[..lens[3]])),
                masked: (lens[4] > 0).then(|| In::host(&ints[..lens[4]])),
                lengths: None,
                lse: (lens[5] > 0).then(|| In::host(&lse)),
                workspace: Some(Out::host(&mut bytes[skip..][..workspace as usize])),
            },
        )
    };
    let of = plan(|b| b);
    let bytes = of.workspace_bytes();
    assert_eq!(run(&of, [128, 192, 3, 0, 0, 0], bytes), Ok(()));
    assert_eq!(run(&of, [127, 192, 3, 0, 0, 0], bytes), Err(Error::Length { arg: "q", need: 128, got: 127 }));
    assert_eq!(run(&of, [128, 191, 3, 0, 0, 0], bytes), Err(Error::Length { arg: "k", need: 192, got: 191 }));
    assert_eq!(run(&of, [128, 192, 2, 0, 0, 0], bytes), Err(Error::Length { arg: "scores", need: 3, got: 2 }));
    assert_eq!(run(&of, [128, 192, 3, 0, 0, 0], bytes - 1), Err(Error::Workspace { need: bytes, got: bytes - 1 }));
    let listed = plan(|b| b.listed_queries(2));
    assert_eq!(run(&listed, [128, 192, 3, 0, 0, 0], 512), Err(Error::Length { arg: "rows", need: 2, got: 0 }));
    assert_eq!(run(&listed, [128, 192, 3, 1, 0, 0], 512), Err(Error::Length { arg: "rows", need: 2, got: 1 }));
    let masked = plan(|b| b.masked(2));
    assert_eq!(run(&masked, [128, 192, 3, 0, 1, 0], 512), Err(Error::Length { arg: "masked", need: 2, got: 1 }));
    let given = plan(|b| b.given_lse());
    assert_eq!(run(&given, [128, 192, 3, 0, 0, 1], 512), Err(Error::Length { arg: "lse", need: 2, got: 1 }));
    assert_eq!(run(&given, [128, 192, 3, 0, 0, 2], 512), Ok(()));
}

/// What only kernels ask for.
#[test]
fn kernels_refuse_f32_and_odd_addresses() {
    for device in TestDevice::kernels() {
        let case = Case { sets: 1, heads: 1, tokens: 8, queries: 1, groups: 1, ..plain() };
        let problem = case.problem::<f32>();
        let plan = case.plan(&problem);
        let run = |plan: &Importance<f32>| {
            let (q, k) = (Buffer::of(&device, &problem.q, 0), Buffer::of(&device, &problem.k, 0));
            let mut scores = Buffer::<f32>::poisoned(&device, 8, 0);
            let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
            let ran = plan.run(
                &device.stream(),
                ImportanceArgs {
                    pages: None,
                    q: q.input(),
                    k: k.input(),
                    scores: scores.output(),
                    rows: None,
                    masked: None,
                    lengths: None,
                    lse: None,
                    workspace: Some(workspace.output()),
                },
            );
            device.sync();
            ran
        };
        assert!(matches!(run(&plan), Err(Error::DType { arg: "q", .. })));
        let problem = case.problem::<f16>();
        let plan = case.plan(&problem);
        for (arg, shifts) in [("q", [1, 0]), ("k", [0, 4])] {
            let (q, k) = (Buffer::of(&device, &problem.q, shifts[0]), Buffer::of(&device, &problem.k, shifts[1]));
            let mut scores = Buffer::<f32>::poisoned(&device, 8, 0);
            let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
            let ran = plan.run(
                &device.stream(),
                ImportanceArgs {
                    pages: None,
                    q: q.input(),
                    k: k.input(),
                    scores: scores.output(),
                    rows: None,
                    masked: None,
                    lengths: None,
                    lse: None,
                    workspace: Some(workspace.output()),
                },
            );
            assert_eq!(ran, Err(Error::Alignment { arg, need: 16 }));
        }
    }
}

#[test]
fn plans_are_plain_data() {
    fn plain_data<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain_data::<Importance<bf16>>();
    let plan =
        |tokens| Importance::<bf16>::builder(8, 3, 128).tokens(tokens).queries(50).build(&DeviceInfo::H200).unwrap();
    assert_eq!(plan(4), plan(4));
    assert_ne!(plan(4), plan(5));
}

#[test]
fn traffic_and_flops_are_those_of_the_formula() {
    let of = |b: ImportanceBuilder<bf16>| b.build(&DeviceInfo::H200).unwrap();
    let plan = of(Importance::builder(8, 3, 128).sets(34).tokens(24_300).queries(50));
    let (keys, queries, scores) = (34 * 8 * 24_300, 34 * 24 * 50, 34 * 8 * 24_300 * 4);
    assert_eq!(plan.traffic(), Traffic { read: (keys + queries) * 256, written: scores });
    assert_eq!(plan.flops(), 2 * 2 * keys * 50 * 3 * 128);
    let plan =
        of(Importance::builder(8, 3, 128).aggregation(Aggregation::MeanProb).given_lse().tokens(10).accumulate());
    assert_eq!(plan.traffic(), Traffic { read: (80 + 24) * 256 + 320, written: 320 });
    assert_eq!(plan.flops(), 2 * 80 * 3 * 128);
    // Every event of the models in docs/importance.md fits 64 MB.
    for (sets, heads, groups, tokens, queries) in
        [(34, 8, 3, 24_300, 12_150), (34, 8, 3, 24_300, 50), (30, 12, 1, 32_760, 1560), (32, 8, 4, 32_768, 32)]
    {
        let plan =
            of(Importance::builder(heads, groups, 128).sets(sets).tokens(tokens).queries(queries).pool(Pool::Max(7)));
        assert!(plan.workspace_bytes() < 64_000_000, "{} for {tokens}", plan.workspace_bytes());
    }
}

/// A captured graph replays to the same bits, with the keys and lengths of the moment; all kernels.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn graphs_replay() {
    let Some(TestDevice::Cuda(stream)) = TestDevice::cuda() else { return };
    let device = TestDevice::Cuda(stream.clone());
    for variant in [ImportanceVariant::Portable, ImportanceVariant::Hopper] {
        let case = Case { variant, pool: Pool::Max(7), lengths: 1, ..plain() };
        let problem = case.problem::<bf16>();
        let Ok(plan) = case.builder(&problem).build(&DeviceInfo::of(&stream).unwrap()) else { continue };
        let (q, mut k) = (Buffer::of(&device, &problem.q, 0), Buffer::of(&device, &problem.k, 0));
        let mut lengths = Buffer::of(&device, &problem.lengths, 0);
        let scores = || std::cell::RefCell::new(Buffer::<f32>::poisoned(&device, problem.old.len(), 0));
        let (out, eager) = (scores(), scores());
        let workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
        let workspace = std::cell::RefCell::new(workspace);
        let run = |k: &Buffer<bf16>, lengths: &Buffer<i32>, scores: &std::cell::RefCell<Buffer<f32>>| {
            let (mut scores, mut workspace) = (scores.borrow_mut(), workspace.borrow_mut());
            let args = ImportanceArgs {
                pages: None,
                q: q.input(),
                k: k.input(),
                scores: scores.output(),
                rows: None,
                masked: None,
                lengths: Some(lengths.input()),
                lse: None,
                workspace: Some(workspace.output()),
            };
            plan.run(&stream, args).unwrap();
        };
        run(&k, &lengths, &eager); // loads the code
        let graph = support::capture(&stream, || run(&k, &lengths, &out));
        for replay in 0..3 {
            let moved: Vec<bf16> = problem.k.iter().map(|x| bf16::from_f32(x.to_f32() * (replay + 1) as f32)).collect();
            k.write(&moved);
            lengths.write(&problem.lengths.iter().map(|n| n / (replay + 1)).collect::<Vec<_>>());
            graph.launch().unwrap();
            run(&k, &lengths, &eager);
            assert_eq!(out.borrow().read(), eager.borrow().read());
        }
    }
}

/// More than 2^31 elements between the first and the last of a buffer.
#[test]
fn offsets_are_64_bit() {
    let far = (1i64 << 31) + 64;
    if std::env::var_os("NXS_SMALL").is_some() {
        eprintln!("SKIPPED: NXS_SMALL is set, and this takes 8 GiB");
        return;
    }
    for device in TestDevice::kernels().into_iter().filter(|device| !device.is_emulated()) {
        for variant in [ImportanceVariant::Portable, ImportanceVariant::Hopper] {
            // Two sets that hold the same, the second far away.
            let case = Case { sets: 1, heads: 1, groups: 1, tokens: 70, queries: 9, variant, ..plain() };
            let problem = case.problem::<bf16>();
            let mut keys = vec![bf16::ZERO; far as usize + problem.k.len()];
            keys[..problem.k.len()].copy_from_slice(&problem.k);
            keys[far as usize..].copy_from_slice(&problem.k);
            let builder = Importance::<bf16>::builder(1, 1, 64).sets(2).tokens(70).queries(9).variant(variant);
            let builder = builder.k_strides([far, 64, 64]).q_strides([0, 64, 64]);
            let Ok(plan) = builder.build(&DeviceInfo::of(&device.stream()).unwrap()) else { continue };
            let (q, k) = (Buffer::of(&device, &problem.q, 0), Buffer::of(&device, &keys, 0));
            let mut scores = Buffer::<f32>::poisoned(&device, 140, 0);
            let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
            let args = ImportanceArgs {
                pages: None,
                q: q.input(),
                k: k.input(),
                scores: scores.output(),
                rows: None,
                masked: None,
                lengths: None,
                lse: None,
                workspace: Some(workspace.output()),
            };
            plan.run(&device.stream(), args).unwrap();
            let scores = scores.read();
            check(&scores[..70], &problem).unwrap();
            check(&scores[70..], &problem).unwrap();
        }
    }
}

/// What the emulator counts, beside what the plan says: keys once a pass, queries once a block.
#[cfg(feature = "emulate")]
#[test]
fn kernels_move_what_the_plan_says() {
    use nextscale::emulator;
    for aggregation in AGGREGATIONS {
        let case = Case { tokens: 1024, queries: 16, dim: 128, aggregation, ..plain() };
        let problem = case.problem::<bf16>();
        let (plan, device) = (case.plan(&problem), TestDevice::Emulated);
        emulator::reset();
        case.run(&device, &plan, &problem);
        let counted = emulator::counters();
        let (traffic, schedule) = (plan.traffic(), plan.schedule());
        let passes = if schedule.has_stats { 2 } else { 1 };
        let keys = 4 * 1024 * 256;
        // Four heads; a block reads its queries and what is known of their softmaxes.
        let blocks = 4 * (schedule.stat_splits + 1024 / schedule.sum_span);
        let most = passes * keys + blocks * 48 * (256 + 32 * (1 + schedule.stat_splits)) + 8192;
        let counted = (counted.global_load_bytes, counted.global_store_bytes);
        assert!(
            (traffic.read..=most).contains(&counted.0),
            "{aggregation:?}: {counted:?}, not {} to {most}",
            traffic.read
        );
        let most = traffic.written + 4 * schedule.stat_splits * 48 * 32 + 8192;
        assert!((traffic.written..=most).contains(&counted.1), "{aggregation:?}: {counted:?}, not to {most}");
    }
}
