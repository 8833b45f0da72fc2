//! Key norms and redundancy on every device, against an f64 oracle written here from the formulas as they are published: with
//! the matrix of all cosines.

#![cfg(feature = "compression")]

mod support;

use nextscale::compression::{
    Form, KeyNorms, KeyNormsArgs, KeyNormsBuilder, Redundancy, RedundancyArgs, RedundancyBuilder, Retain, Similar,
    Traffic,
};
use nextscale::dtype::Float;
use nextscale::{DType, DeviceInfo, Error, In, Layout, Out, Stream, bf16, f16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use support::{Buffer, ForFloats, TestDevice, for_floats};

#[derive(Debug, Clone)]
struct Case {
    sets: usize,
    tokens: usize,
    heads: usize,
    dim: usize,
    form: Form,
    /// Keys come in so many calls.
    appends: usize,
    /// 0: none; 1: random; 2: edges of tiles.
    lengths: u8,
    shuffled: bool,
    /// Eights of elements between heads of keys, elements between rows of scores.
    gap: [usize; 2],
    /// Directions that keys are near to; fewer make more neighbours.
    clusters: usize,
    nan: bool,
    /// Share of the keys that are zero.
    zeroes: f64,
    seed: u64,
}

fn plain() -> Case {
    Case {
        sets: 2,
        tokens: 150,
        heads: 2,
        dim: 64,
        form: Form::Softmax,
        appends: 1,
        lengths: 0,
        shuffled: false,
        gap: [0; 2],
        clusters: 10,
        nan: false,
        zeroes: 0.0,
        seed: 1,
    }
}

fn similar(retain: Retain, lonely_leave_first: bool) -> Form {
    Form::Similar(Similar { threshold: 0.5, retain, lonely_leave_first })
}

fn form() -> impl Strategy<Value = Form> {
    let retain = prop_oneof![
        3 => Just(Retain::Last),
        1 => Just(Retain::First),
        1 => Just(Retain::Zero),
        1 => (0.0..=1.0f32).prop_map(Retain::FirstPercent),
        1 => (0.8..=1.0f32).prop_map(Retain::FirstPercent),
    ];
    prop_oneof![
        1 => Just(Form::Cosine),
        1 => Just(Form::Softmax),
        3 => (retain, any::<bool>()).prop_map(|(retain, lonely)| similar(retain, lonely)),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (
        0..3usize,
        prop_oneof![proptest::sample::select(vec![0usize, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129]), 1..200usize],
        1..4usize,
        proptest::sample::select(vec![64usize, 96, 128]),
    );
    let rest = (
        1..4usize,
        0..3u8,
        any::<bool>(),
        prop_oneof![2 => Just([0usize; 2]), 1 => [0..3usize, 0..9usize]],
        prop_oneof![Just(1usize), Just(10), Just(1000)],
        proptest::bool::weighted(0.15),
        prop_oneof![3 => Just(0.0), 1 => Just(0.2), 1 => Just(1.0)],
        any::<u64>(),
    );
    (sizes, form(), rest).prop_map(|((sets, tokens, heads, dim), form, rest)| {
        let (appends, lengths, shuffled, gap, clusters, nan, zeroes, seed) = rest;
        Case { sets, tokens, heads, dim, form, appends, lengths, shuffled, gap, clusters, nan, zeroes, seed }
    })
}

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
    k: Vec<T>,
    lengths: Vec<i32>,
    k_layout: Layout<4>,
    /// Of the scores and of the inverse norms.
    rows_layout: Layout<3>,
    sum_layout: Layout<3>,
    lengths_layout: Layout<2>,
    /// The case's, with a threshold that no cosine is near.
    form: Form,
    /// By offset. `None`: untouched.
    norms: Vec<Option<f64>>,
    sums: Vec<Option<f64>>,
    scores: Vec<Option<f64>>,
}

const EPS: f64 = 1e-8;

impl Case {
    fn problem<T: Float>(&self) -> Problem<T> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let [sets, tokens, heads, dim] = [self.sets, self.tokens, self.heads, self.dim].map(|n| n as u64);
        let [a, b, c] = strides([sets, tokens, heads], self.shuffled, (self.dim + 8 * self.gap[0]) as i64, &mut rng);
        let k_layout = Layout::strided([sets, tokens, heads, dim], [a, b, c, 1]);
        let [a, b] = strides([sets, heads], self.shuffled, (self.tokens + self.gap[1]) as i64, &mut rng);
        let rows_layout = Layout::strided([sets, heads, tokens], [a, b, 1]);
        let [a, b] = strides([sets, heads], self.shuffled, (self.dim + self.gap[1]) as i64, &mut rng);
        let sum_layout = Layout::strided([sets, heads, dim], [a, b, 1]);
        let lengths_layout = Layout::strided([sets, heads], strides([sets, heads], self.shuffled, 1, &mut rng));

        let mut k = vec![T::from_f32(f32::NAN); k_layout.required_len("").unwrap() as usize];
        let centres: Vec<Vec<f32>> = (0..self.clusters.min(self.tokens))
            .map(|_| (0..dim).map(|_| rng.random_range(-1.0..1.0)).collect())
            .collect();
        let all = (0..sets).flat_map(|s| (0..tokens).flat_map(move |j| (0..heads).map(move |h| [s, j, h])));
        for [s, j, h] in all {
            let zero = rng.random_bool(self.zeroes);
            let size = rng.random_range(0.1..10.0f32);
            let centre = &centres[rng.random_range(0..centres.len())];
            for d in 0..dim {
                let x = (centre[d as usize] + rng.random_range(-0.7..0.7)) * size;
                k[k_layout.offset([s, j, h, d]) as usize] = T::from_f32(if zero { 0.0 } else { x });
            }
        }
        let lengths: Vec<i32> = (0..lengths_layout.required_len("").unwrap())
            .map(|_| match self.lengths {
                2 => [-1, 0, 1, 31, 32, 63, 64, 65, 128, i32::MAX][rng.random_range(0..10)],
                _ => rng.random_range(0..=tokens as i32),
            })
            .collect();
        if self.nan && sets * heads * tokens > 0 {
            let at = [rng.random_range(0..sets), rng.random_range(0..tokens), rng.random_range(0..heads)];
            k[k_layout.offset([at[0], at[1], at[2], rng.random_range(0..dim)]) as usize] = T::from_f32(f32::NAN);
        }
        let len = |layout: &Layout<3>| layout.required_len("").unwrap() as usize;
        let mut problem = Problem {
            norms: vec![None; len(&rows_layout)],
            sums: vec![None; len(&sum_layout)],
            scores: vec![None; len(&rows_layout)],
            k,
            lengths,
            k_layout,
            rows_layout,
            sum_layout,
            lengths_layout,
            form: self.form,
        };
        self.fill(&mut problem);
        problem
    }

    fn fill<T: Float>(&self, problem: &mut Problem<T>) {
        let [sets, tokens, heads] = [self.sets, self.tokens, self.heads].map(|n| n as u64);
        let items: Vec<[u64; 2]> = (0..sets).flat_map(|s| (0..heads).map(move |h| [s, h])).collect();
        // [item][key]: unit key
        let mut units: Vec<Vec<Vec<f64>>> = Vec::new();
        for &[set, head] in &items {
            let length = match self.lengths {
                0 => tokens,
                _ => i64::from(problem.lengths[problem.lengths_layout.offset([set, head]) as usize])
                    .clamp(0, tokens as i64) as u64,
            };
            for j in 0..tokens {
                problem.norms[problem.rows_layout.offset([set, head, j]) as usize] = Some(0.0);
            }
            let of_item: Vec<Vec<f64>> = (0..length)
                .map(|j| {
                    let from = problem.k_layout.offset([set, j, head, 0]) as usize;
                    let key: Vec<f64> =
                        problem.k[from..from + self.dim].iter().map(|x| f64::from(x.to_f32())).collect();
                    let norm = key.iter().map(|x| x * x).sum::<f64>().sqrt() + EPS;
                    problem.norms[problem.rows_layout.offset([set, head, j]) as usize] = Some(1.0 / norm);
                    key.iter().map(|x| x / norm).collect()
                })
                .collect();
            for d in 0..self.dim {
                let sum = of_item.iter().map(|unit| unit[d]).sum();
                problem.sums[problem.sum_layout.offset([set, head, d as u64]) as usize] = Some(sum);
            }
            units.push(of_item);
        }
        let cosines: Vec<Vec<Vec<f64>>> = units
            .iter()
            .map(|of| {
                let dot = |a: &Vec<f64>, b: &Vec<f64>| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
                (0..of.len())
                    .map(|i| (0..of.len()).map(|j| if i == j { 0.0 } else { dot(&of[i], &of[j]) }).collect())
                    .collect()
            })
            .collect();
        if let Form::Similar(similar) = &mut problem.form {
            let all: Vec<f64> = cosines.iter().flatten().flatten().copied().collect();
            let is_near = |t: f32| all.iter().any(|c| (c - f64::from(t)).abs() < 3e-6);
            while is_near(similar.threshold) {
                similar.threshold += 1e-5;
            }
        }
        for (of, &[set, head]) in items.iter().enumerate() {
            let n = units[of].len();
            let mut scores: Vec<f64> = match problem.form {
                Form::Cosine => {
                    let sum: Vec<f64> = (0..self.dim).map(|d| units[of].iter().map(|unit| unit[d]).sum()).collect();
                    let size = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
                    let dot = |unit: &Vec<f64>| unit.iter().zip(&sum).map(|(a, b)| a * b).sum::<f64>();
                    units[of].iter().map(|unit| if size == 0.0 { 0.0 } else { dot(unit) / size }).collect()
                }
                // As published: the mean of each column less 1, for what a key has in common with itself.
                Form::Softmax => {
                    let square = |j: usize| units[of][j].iter().map(|x| x * x).sum::<f64>();
                    let mean = |j| ((0..n).map(|i| cosines[of][i][j]).sum::<f64>() + square(j) - 1.0) / n as f64;
                    (0..n).map(mean).collect()
                }
                Form::Similar(similar) => {
                    let mut kept = cosines[of].clone();
                    for row in &mut kept {
                        let hits: Vec<bool> = row.iter().map(|&c| c > f64::from(similar.threshold)).collect();
                        // As published: the index, or 0.
                        let mut indices: Vec<usize> = (0..n).map(|j| if hits[j] { j } else { 0 }).collect();
                        let any = hits.contains(&true);
                        let retained = match similar.retain {
                            Retain::Last => Some(*indices.iter().max().unwrap()),
                            Retain::First => Some(hits.iter().position(|&hit| hit).unwrap_or(0)),
                            Retain::Zero => Some(*indices.iter().min().unwrap()),
                            Retain::FirstPercent(ratio) => {
                                indices.sort_unstable();
                                Some(indices[((n as f32 * ratio) as usize).clamp(1, n) - 1])
                            }
                        };
                        let by_accident = matches!(similar.retain, Retain::Zero | Retain::FirstPercent(_));
                        if let Some(j) = retained.filter(|_| any || similar.lonely_leave_first || by_accident) {
                            row[j] = 0.0;
                        }
                    }
                    (0..n).map(|j| kept.iter().map(|row| row[j]).sum::<f64>() / n as f64).collect()
                }
            };
            let is_nan = units[of].iter().flatten().any(|x| x.is_nan());
            if problem.form != Form::Cosine {
                let total: f64 = scores.iter().map(|c| c.exp()).sum();
                scores.iter_mut().for_each(|c| *c = c.exp() / total);
            }
            for j in 0..tokens {
                let score = scores.get(j as usize).map_or(0.0, |&score| if is_nan { f64::NAN } else { score });
                problem.scores[problem.rows_layout.offset([set, head, j]) as usize] = Some(score);
            }
        }
    }

    fn norms_builder<T: Float>(&self, problem: &Problem<T>, tokens: usize) -> KeyNormsBuilder<T> {
        let [set, token, head, _] = problem.k_layout.strides();
        KeyNorms::builder(self.heads, self.dim)
            .sets(self.sets)
            .tokens(tokens)
            .k_strides([set, token, head])
            .inverse_norms_strides(two(problem.rows_layout))
            .unit_sum_strides(two(problem.sum_layout))
            .lengths_strides(problem.lengths_layout.strides())
    }

    fn builder<T: Float>(&self, problem: &Problem<T>) -> RedundancyBuilder<T> {
        let [set, token, head, _] = problem.k_layout.strides();
        Redundancy::builder(self.heads, self.dim)
            .sets(self.sets)
            .tokens(self.tokens)
            .k_strides([set, token, head])
            .inverse_norms_strides(two(problem.rows_layout))
            .unit_sum_strides(two(problem.sum_layout))
            .scores_strides(two(problem.rows_layout))
            .lengths_strides(problem.lengths_layout.strides())
            .form(problem.form)
    }

    /// Inverse norms, sums and scores.
    fn run<T: Float>(&self, device: &TestDevice, problem: &Problem<T>) -> [Vec<f32>; 3] {
        let k = Buffer::of(device, &problem.k, 0);
        let mut norms = Buffer::<f32>::poisoned(device, problem.norms.len(), 1);
        let mut sums = Buffer::<f32>::poisoned(device, problem.sums.len(), 1);
        let mut scores = Buffer::<f32>::poisoned(device, problem.scores.len(), 1);
        // One call after the other over what is new: views that begin at the first new key.
        let mut first = 0;
        for append in 0..self.appends {
            let tokens = if append + 1 == self.appends { self.tokens - first } else { self.tokens / self.appends };
            let mut builder = self.norms_builder(problem, tokens);
            if append > 0 {
                builder = builder.accumulate();
            }
            let plan = builder.build(&DeviceInfo::H200).unwrap();
            let lengths: Vec<i32> = problem.lengths.iter().map(|n| n.saturating_sub(first as i32)).collect();
            let lengths = Buffer::of(device, &lengths, 1);
            let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
            let from = |len: usize, stride: usize| len.min(first * stride);
            let k_from = from(problem.k.len(), problem.k_layout.strides()[1] as usize);
            let norms_len = problem.norms.len();
            let norms_from = from(norms_len, 1);
            // Views of outputs begin at the start: of new norms too, which is where a view of a cache would begin.
            let mut new_norms = Buffer::<f32>::poisoned(device, norms_len - norms_from, 0);
            let args = KeyNormsArgs {
                pages: None,
                k: k.input_from(k_from, problem.k.len() - k_from),
                inverse_norms: new_norms.output(),
                unit_sum: sums.output(),
                lengths: (self.lengths > 0).then(|| lengths.input()),
                workspace: Some(workspace.output()),
            };
            plan.run(&device.stream(), args).unwrap();
            workspace.read();
            let (mut all, new) = (norms.read(), new_norms.read());
            for (to, new) in all[norms_from..].iter_mut().zip(new) {
                if new.to_bits() != u32::MAX {
                    *to = new;
                }
            }
            norms.write(&all);
            first += tokens;
        }
        let plan = self.builder(problem).build(&DeviceInfo::H200).unwrap();
        let lengths = Buffer::of(device, &problem.lengths, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let args = RedundancyArgs {
            pages: None,
            k: k.input(),
            inverse_norms: norms.input(),
            unit_sum: sums.input(),
            scores: scores.output(),
            lengths: (self.lengths > 0).then(|| lengths.input()),
            workspace: Some(workspace.output()),
        };
        plan.run(&device.stream(), args).unwrap();
        workspace.read();
        [norms.read(), sums.read(), scores.read()]
    }
}

fn two(layout: Layout<3>) -> [i64; 2] {
    [layout.strides()[0], layout.strides()[1]]
}

fn hold(what: &str, actual: &[f32], expected: &[Option<f64>], bound: impl Fn(f64) -> f64) -> Result<(), String> {
    for (at, (&actual, expected)) in actual.iter().zip(expected).enumerate() {
        let close = match expected {
            None => actual.to_bits() == u32::MAX,
            Some(value) if value.is_nan() => actual.is_nan(),
            Some(value) => (f64::from(actual) - value).abs() <= bound(*value),
        };
        if !close {
            return Err(format!("{what} {at}: {actual}, expected {expected:?}"));
        }
    }
    Ok(())
}

fn check<T: Float>(actual: &[Vec<f32>; 3], problem: &Problem<T>, tokens: usize) -> Result<(), String> {
    hold("norm", &actual[0], &problem.norms, |x| x.abs() * 2f64.powi(-17))?;
    hold("sum", &actual[1], &problem.sums, |_| tokens as f64 * 2f64.powi(-17))?;
    hold("score", &actual[2], &problem.scores, |x| match problem.form {
        Form::Cosine => 2f64.powi(-15),
        // What is left out comes in units, and there may be many of it.
        _ => x.abs() * 2f64.powi(-14),
    })
}

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

struct CheckOn<'a>(&'a Case, &'a TestDevice);
impl ForFloats for CheckOn<'_> {
    fn call<T: Float, O: Float>(self) {
        let CheckOn(case, device) = self;
        let problem = case.problem::<T>();
        let first = case.run(device, &problem);
        if let Err(error) = check(&first, &problem, case.tokens) {
            panic!("{error}\n{case:?}\n{:?}", problem.form);
        }
        let again = case.run(device, &problem);
        for (a, b) in first.iter().zip(&again) {
            assert!(a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits()), "{case:?}");
        }
    }
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
}

#[test]
fn every_form_and_neighbour() {
    let percents = [0.0, 0.3, 0.9, 0.97, 1.0].map(Retain::FirstPercent);
    let retains = [Retain::Last, Retain::First, Retain::Zero].into_iter().chain(percents);
    let similar = retains.flat_map(|retain| [true, false].map(|lonely| similar(retain, lonely)));
    for form in [Form::Cosine, Form::Softmax].into_iter().chain(similar) {
        // Keys that are all alike, some of them, none.
        for clusters in [1, 10, 1000] {
            everywhere(&Case { form, clusters, ..plain() });
        }
        everywhere(&Case { form, lengths: 2, zeroes: 0.3, nan: true, dim: 96, ..plain() });
    }
}

/// Many keys: spans of several, rows of several blocks.
#[test]
fn many_keys() {
    for form in [Form::Cosine, Form::Softmax, similar(Retain::Last, true)] {
        everywhere(&Case { form, sets: 1, heads: 1, tokens: 700, dim: 128, clusters: 40, ..plain() });
    }
    // Of 5000 keys more than one span, and no more than 64.
    let norms = KeyNorms::<bf16>::builder(1, 64).tokens(5000).build(&DeviceInfo::H200).unwrap();
    assert!((2 * 256..=64 * 256).contains(&norms.workspace_bytes()));
}

/// Duplicates: cosines of 1, of which each leaves the last other one out.
#[test]
fn duplicates() {
    for device in TestDevice::all() {
        let case = Case { sets: 1, heads: 1, tokens: 70, form: similar(Retain::Last, true), ..plain() };
        let mut problem = case.problem::<bf16>();
        let first = problem.k[..64].to_vec();
        problem.k.chunks_mut(64).for_each(|key| key.copy_from_slice(&first));
        case.fill(&mut problem);
        check(&case.run(&device, &problem), &problem, 70).unwrap();
    }
}

/// One set gives what it gives among others, bit for bit, whatever these hold.
#[test]
fn sets_do_not_depend_on_each_other() {
    for device in TestDevice::all() {
        for form in [Form::Cosine, Form::Softmax, similar(Retain::Last, true)] {
            let all = Case { sets: 4, tokens: 333, form, ..plain() };
            let mut problem = all.problem::<bf16>();
            let per_set = problem.k_layout.strides()[0] as usize;
            problem.k[per_set..].fill(bf16::NAN);
            let among = all.run(&device, &problem);
            let alone = Case { sets: 1, ..all };
            let mut cut = alone.problem::<bf16>();
            cut.k.copy_from_slice(&problem.k[..per_set]);
            cut.form = problem.form;
            let cut = alone.run(&device, &cut);
            for (cut, among) in cut.iter().zip(&among) {
                assert!(cut.iter().zip(among).all(|(a, b)| a.to_bits() == b.to_bits()), "{form:?}");
            }
        }
    }
}

/// The oracle's bounds are narrow enough to tell a wrong rule from the right one.
#[test]
fn other_rules_are_told_apart() {
    let device = TestDevice::Host;
    let told = |form: Form, other: Form| {
        let case = Case { form, clusters: 8, ..plain() };
        let mut problem = case.problem::<bf16>();
        check(&case.run(&device, &problem), &problem, case.tokens).unwrap();
        problem.form = match (other, problem.form) {
            (Form::Similar(other), Form::Similar(of)) => Form::Similar(Similar { threshold: of.threshold, ..other }),
            _ => other,
        };
        check(&case.run(&device, &problem), &problem, case.tokens).expect_err("another rule");
    };
    let last = similar(Retain::Last, true);
    told(Form::Softmax, last);
    told(last, Form::Softmax);
    told(last, Form::Cosine);
    told(last, similar(Retain::First, true));
    told(last, similar(Retain::Zero, true));
    let lonely = Case { form: last, clusters: 1000, ..plain() };
    let mut problem = lonely.problem::<bf16>();
    check(&lonely.run(&device, &problem), &problem, 150).unwrap();
    let Form::Similar(of) = problem.form else { unreachable!() };
    problem.form = Form::Similar(Similar { lonely_leave_first: false, ..of });
    check(&lonely.run(&device, &problem), &problem, 150).expect_err("key 0 is not left out");
}

#[test]
fn bad_plans_are_refused() {
    let norms = |change: fn(KeyNormsBuilder<bf16>) -> KeyNormsBuilder<bf16>| {
        change(KeyNorms::builder(2, 64).sets(2).tokens(10)).build(&DeviceInfo::H200).unwrap_err()
    };
    let build = |heads, dim| KeyNorms::<bf16>::builder(heads, dim).build(&DeviceInfo::H200).unwrap_err();
    assert!(matches!(build(1, 72), Error::Size { arg: "dim", got: 72, .. }));
    assert!(matches!(build(0, 64), Error::Size { arg: "heads", .. }));
    assert!(matches!(norms(|b| b.sets(1 << 16)), Error::Size { arg: "sets * heads", .. }));
    assert!(matches!(norms(|b| b.tokens(1 << 31)), Error::Size { arg: "tokens", .. }));
    assert!(matches!(norms(|b| b.eps(-1.0)), Error::Unsupported { arg: "eps", .. }));
    assert!(matches!(norms(|b| b.eps(f32::NAN)), Error::Unsupported { arg: "eps", .. }));
    assert!(matches!(norms(|b| b.k_strides([1, 64, 64])), Error::Stride { arg: "k", dim: 0, got: 1, .. }));
    assert!(matches!(norms(|b| b.inverse_norms_strides([10, 10])), Error::Stride { arg: "inverse_norms", .. }));
    assert!(matches!(norms(|b| b.unit_sum_strides([0, 64])), Error::Stride { arg: "unit_sum", .. }));
    assert!(matches!(norms(|b| b.lengths_strides([-1, 1])), Error::Stride { arg: "lengths", .. }));

    let refused = |change: fn(RedundancyBuilder<bf16>) -> RedundancyBuilder<bf16>| {
        change(Redundancy::builder(2, 64).sets(2).tokens(10)).build(&DeviceInfo::H200).unwrap_err()
    };
    assert!(matches!(
        refused(|b| b.tokens(8193).form(Form::Similar(Similar::default()))),
        Error::Size { arg: "tokens", max: 8192, .. }
    ));
    let at = |threshold| Form::Similar(Similar { threshold, ..Similar::default() });
    for threshold in [-0.1, 1.1, f32::NAN] {
        let built = Redundancy::<bf16>::builder(1, 64).form(at(threshold)).build(&DeviceInfo::H200);
        assert!(matches!(built, Err(Error::Unsupported { arg: "threshold", .. })));
    }
    assert!(matches!(
        refused(|b| b.form(similar(Retain::FirstPercent(2.0), true))),
        Error::Unsupported { arg: "ratio", .. }
    ));
    assert!(matches!(refused(|b| b.scores_strides([10, 1])), Error::Stride { arg: "scores", .. }));
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(Redundancy::<f16>::builder(1, 64).build(&old), Err(Error::UnsupportedDevice { .. })));
}

#[test]
fn bad_buffers_are_refused() {
    let plan = Redundancy::<f32>::builder(1, 64).tokens(3).build(&DeviceInfo::A100).unwrap();
    let run = |lens: [usize; 4], workspace: u64| {
        let (k, norms, sum) = (vec![0f32; lens[0]], vec![0f32; lens[1]], vec![0f32; lens[2]]);
        let (mut scores, mut bytes) = (vec![0f32; lens[3]], vec![0u8; 512]);
        let skip = bytes.as_ptr().align_offset(256);
        plan.run(
            &Stream::host(),
            RedundancyArgs {
                pages: None,
                k: In::host(&k),
                inverse_norms: In::host(&norms),
                unit_sum: In::host(&sum),
                scores: Out::host(&mut scores),
                lengths: None,
                workspace: Some(Out::host(&mut bytes[skip..][..workspace as usize])),
            },
        )
    };
    let need = plan.workspace_bytes();
    assert_eq!(run([192, 3, 64, 3], need), Ok(()));
    assert_eq!(run([191, 3, 64, 3], need), Err(Error::Length { arg: "k", need: 192, got: 191 }));
    assert_eq!(run([192, 2, 64, 3], need), Err(Error::Length { arg: "inverse_norms", need: 3, got: 2 }));
    assert_eq!(run([192, 3, 63, 3], need), Err(Error::Length { arg: "unit_sum", need: 64, got: 63 }));
    assert_eq!(run([192, 3, 64, 2], need), Err(Error::Length { arg: "scores", need: 3, got: 2 }));
    assert_eq!(run([192, 3, 64, 3], need - 1), Err(Error::Workspace { need, got: need - 1 }));
}

#[test]
fn plans_are_plain_data() {
    fn plain_data<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain_data::<KeyNorms<bf16>>();
    plain_data::<Redundancy<bf16>>();
    let norms = KeyNorms::<bf16>::builder(8, 128).sets(34).tokens(12_150).build(&DeviceInfo::H200).unwrap();
    let (rows, sums) = (34 * 8 * 12_150, 34 * 8 * 128 * 4);
    assert_eq!(norms.traffic(), Traffic { read: rows * 256, written: rows * 4 + sums });
    let scores = Redundancy::<bf16>::builder(8, 128).sets(34).tokens(12_150).build(&DeviceInfo::H200).unwrap();
    assert_eq!(scores.traffic(), Traffic { read: rows * 260 + sums, written: rows * 4 });
    assert!(norms.workspace_bytes() < 16 << 20 && scores.workspace_bytes() < 1 << 20);
}

/// A captured graph replays to the same bits, with the keys of the moment.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn graphs_replay() {
    let Some(TestDevice::Cuda(stream)) = TestDevice::cuda() else { return };
    let device = TestDevice::Cuda(stream.clone());
    for form in [Form::Softmax, similar(Retain::Last, true)] {
        let case = Case { form, ..plain() };
        let problem = case.problem::<bf16>();
        let norms = case.norms_builder(&problem, case.tokens).build(&DeviceInfo::H200).unwrap();
        let plan = case.builder(&problem).build(&DeviceInfo::H200).unwrap();
        let mut k = Buffer::of(&device, &problem.k, 0);
        let most = norms.workspace_bytes().max(plan.workspace_bytes()) as usize;
        let buffer = |len| std::cell::RefCell::new(Buffer::<f32>::poisoned(&device, len, 0));
        let (inverse, sums) = (buffer(problem.norms.len()), buffer(problem.sums.len()));
        let (out, eager) = (buffer(problem.scores.len()), buffer(problem.scores.len()));
        let workspace = std::cell::RefCell::new(Buffer::<u8>::poisoned(&device, most, 0));
        let run = |k: &Buffer<bf16>, scores: &std::cell::RefCell<Buffer<f32>>| {
            let (mut inverse, mut sums) = (inverse.borrow_mut(), sums.borrow_mut());
            let (mut scores, mut workspace) = (scores.borrow_mut(), workspace.borrow_mut());
            let args = KeyNormsArgs {
                pages: None,
                k: k.input(),
                inverse_norms: inverse.output(),
                unit_sum: sums.output(),
                lengths: None,
                workspace: Some(workspace.output()),
            };
            norms.run(&stream, args).unwrap();
            let args = RedundancyArgs {
                pages: None,
                k: k.input(),
                inverse_norms: inverse.input(),
                unit_sum: sums.input(),
                scores: scores.output(),
                lengths: None,
                workspace: Some(workspace.output()),
            };
            plan.run(&stream, args).unwrap();
        };
        run(&k, &eager); // loads the code
        let graph = support::capture(&stream, || run(&k, &out));
        for replay in 0..3 {
            let moved: Vec<bf16> = problem.k.iter().map(|x| bf16::from_f32(x.to_f32() + replay as f32)).collect();
            k.write(&moved);
            graph.launch().unwrap();
            run(&k, &eager);
            assert_eq!(out.borrow().read(), eager.borrow().read());
        }
    }
}

/// What the emulator counts, beside what the plans say: keys once, and what blocks share in addition.
#[cfg(feature = "emulate")]
#[test]
fn kernels_move_what_the_plans_say() {
    use nextscale::emulator;
    let case = Case { tokens: 640, dim: 128, ..plain() };
    let problem = case.problem::<bf16>();
    let device = TestDevice::Emulated;
    emulator::reset();
    case.run(&device, &problem);
    let counted = emulator::counters();
    let norms = case.norms_builder(&problem, case.tokens).build(&DeviceInfo::H200).unwrap().traffic();
    let scores = case.builder(&problem).build(&DeviceInfo::H200).unwrap().traffic();
    let (read, written) = (norms.read + scores.read, norms.written + scores.written);
    // Ten spans of each head have a part of the sum; each of their 8 warps reads the sum, an element a lane in 8 loads, which
    // touch all of its sectors each. e^c is read again to be divided.
    let (parts, again) = (4 * 10 * 512, 4 * 640 * 4);
    let most = read + parts + 4 * 10 * 8 * 8 * 512 + again + 4 * 640 * 32 + 8192;
    assert!((read..=most).contains(&counted.global_load_bytes), "{} not {read} to {most}", counted.global_load_bytes);
    let most = written + parts + again + 2 * 4 * 640 * 32 + 8192;
    assert!(
        (written..=most).contains(&counted.global_store_bytes),
        "{} not {written} to {most}",
        counted.global_store_bytes
    );
}
