//! Row statistics and the drafter's sampler: against an f64 oracle, and the kernels against the host bit for bit.

#![cfg(feature = "verification")]

mod support;
mod verification;

use nextscale::dtype::Float;
use nextscale::verification::{DraftSample, DraftSampleArgs, RowStats, RowStatsArgs, Siblings, status};
use nextscale::{DType, DeviceInfo, Error, bf16, f16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, FLOATS, ForFloats, TestDevice, for_floats};
use verification::{Sampling, sample, sibling_draws};

/// What is special about a row.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    Nan,
    AllNan,
    NothingFinite,
    PlusInfinity,
    Huge,
    Ties,
    Sparse,
}

const KINDS: [Kind; 8] = [
    Kind::Plain,
    Kind::Nan,
    Kind::AllNan,
    Kind::NothingFinite,
    Kind::PlusInfinity,
    Kind::Huge,
    Kind::Ties,
    Kind::Sparse,
];

fn row<T: Float>(kind: Kind, columns: usize, rng: &mut StdRng) -> Vec<T> {
    let mut row: Vec<f32> = (0..columns).map(|_| rng.random_range(-6.0..6.0f32)).collect();
    let mut some = || rng.random_range(0..columns);
    match kind {
        Kind::Plain => {}
        Kind::Nan => (0..3).for_each(|_| row[some()] = f32::NAN),
        Kind::AllNan => row.fill(f32::NAN),
        Kind::NothingFinite => row.fill(f32::NEG_INFINITY),
        Kind::PlusInfinity => (0..2).for_each(|_| row[some()] = f32::INFINITY),
        Kind::Huge => row.iter_mut().for_each(|x| *x *= if T::DTYPE == DType::F16 { 8000.0 } else { 1e30 }),
        Kind::Ties => row.iter_mut().for_each(|x| *x = (*x / 4.0).trunc()),
        Kind::Sparse => {
            let kept = [some(), some(), some()];
            for (i, x) in row.iter_mut().enumerate() {
                if !kept.contains(&i) {
                    *x = f32::NEG_INFINITY;
                }
            }
        }
    }
    row.into_iter().map(T::from_f32).collect()
}

#[derive(Debug, Clone)]
struct Case {
    columns: usize,
    rows: usize,
    gap: usize,
    shift: usize,
    given: bool,
    truncated: bool,
    allowed: bool,
    mapped: bool,
    /// The rows' numbers are given.
    numbered: bool,
    distinct: bool,
    drafts: usize,
    row_in_step: u32,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let columns =
        prop_oneof![1..40usize, 1000..1100usize, 1..3000usize, Just(1024usize), Just(2048), Just(9 * 1024 + 3)];
    (
        columns,
        0..5usize,
        prop_oneof![Just(0usize), 0..9usize],
        prop_oneof![Just(0usize), 0..9usize],
        any::<[bool; 6]>(),
        prop_oneof![Just(1usize), 2..6usize, Just(32usize)],
        0..5u32,
        any::<u64>(),
    )
        .prop_map(|(columns, rows, gap, shift, flags, drafts, row_in_step, seed)| {
            let [given, truncated, allowed, mapped, numbered, distinct] = flags;
            Case {
                columns,
                rows,
                gap,
                shift,
                given,
                truncated,
                allowed,
                mapped,
                numbered,
                distinct,
                drafts,
                row_in_step,
                seed,
            }
        })
}

struct Data<T> {
    logits: Vec<T>,
    temperature: Vec<f32>,
    top_k: Vec<i32>,
    top_p: Vec<f32>,
    min_p: Vec<f32>,
    seeds: Vec<i64>,
    positions: Vec<i64>,
    numbers: Vec<i32>,
    uniforms: Vec<f32>,
    map: Vec<i32>,
    allow: Vec<u32>,
}

#[derive(Debug, PartialEq)]
struct Drawn {
    tokens: Vec<i32>,
    /// Bits.
    stats: Vec<u32>,
    status: Vec<u32>,
}

impl Case {
    fn stride(&self) -> usize {
        self.columns + self.gap
    }

    fn data<T: Float>(&self) -> Data<T> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut logits = Vec::new();
        for r in 0..self.rows {
            let kind = if rng.random_bool(0.6) { Kind::Plain } else { KINDS[rng.random_range(0..KINDS.len())] };
            logits.extend(row::<T>(kind, self.columns, &mut rng));
            // What stands between rows is no one's.
            let gap = if r + 1 < self.rows { self.gap } else { 0 };
            logits.extend(std::iter::repeat_n(T::from_f32(f32::NAN), gap));
        }
        let rows = self.rows;
        let temperatures = [1.0, 1.0, 0.7, 0.0, 2.5, 1e-6, 0.05, f32::NAN];
        let mut of =
            |choices: &[f32]| -> Vec<f32> { (0..rows).map(|_| choices[rng.random_range(0..choices.len())]).collect() };
        let temperature = of(&temperatures);
        let (top_k, top_p, min_p) = match self.truncated {
            true => (
                of(&[0.0, 1.0, 3.0, 50.0, 1e6]).into_iter().map(|k| k as i32).collect(),
                of(&[1.0, 0.9, 0.5, 0.01, 0.0]),
                of(&[0.0, 0.0, 0.05, 0.3, 1.0]),
            ),
            false => (vec![0; rows], vec![1.0; rows], vec![0.0; rows]),
        };
        let words = |rng: &mut StdRng| (0..rows).map(|_| rng.random::<i64>()).collect();
        let words_of_row = self.columns.div_ceil(32);
        Data {
            logits,
            temperature,
            top_k,
            top_p,
            min_p,
            seeds: words(&mut rng),
            positions: (0..rows).map(|_| rng.random_range(0..1 << 40)).collect(),
            numbers: (0..rows).map(|_| rng.random_range(0..1 << 24)).collect(),
            uniforms: (0..rows * self.drafts * 4)
                .map(|_| rng.random_range(0..1 << 24) as f32 / (1 << 24) as f32)
                .collect(),
            map: (0..self.columns as i32).map(|column| column * 3 + 5).collect(),
            allow: (0..rows * words_of_row).map(|_| rng.random::<u32>() | rng.random::<u32>()).collect(),
        }
    }

    fn draw<T: Float>(&self, device: &TestDevice, data: &Data<T>, info: &DeviceInfo) -> (Drawn, Vec<f32>) {
        let plan = DraftSample::<T>::builder(self.rows, self.columns)
            .row_stride(self.stride() as i64)
            .row_in_step(self.row_in_step)
            .drafts(self.drafts as u32)
            .siblings(if self.distinct { Siblings::WithoutReplacement } else { Siblings::WithReplacement })
            .fallback_token(-9)
            .build(info)
            .unwrap();
        let logits = Buffer::of(device, &data.logits, self.shift);
        let temperature = Buffer::of(device, &data.temperature, 1);
        let top_k = Buffer::of(device, &data.top_k, 1);
        let (top_p, min_p) = (Buffer::of(device, &data.top_p, 1), Buffer::of(device, &data.min_p, 1));
        let (seeds, positions) = (Buffer::of(device, &data.seeds, 1), Buffer::of(device, &data.positions, 1));
        let (uniforms, map) = (Buffer::of(device, &data.uniforms, 1), Buffer::of(device, &data.map, 1));
        let numbers = Buffer::of(device, &data.numbers, 1);
        let mut tokens = Buffer::<i32>::poisoned(device, self.rows * self.drafts, 1);
        let mut stats = Buffer::<f32>::poisoned(device, self.rows * 4, 1);
        let mut log_probs = Buffer::<f32>::poisoned(device, self.rows * self.drafts, 1);
        let mut status = Buffer::<u32>::poisoned(device, self.rows, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(device, &vec![0u32; plan.counter_words()], 1);
        plan.run(
            &device.stream(),
            DraftSampleArgs {
                logits: logits.input(),
                temperature: Some(temperature.input()),
                top_k: self.truncated.then(|| top_k.input()),
                top_p: self.truncated.then(|| top_p.input()),
                min_p: self.truncated.then(|| min_p.input()),
                draft_to_target: self.mapped.then(|| map.input()),
                seeds: Some(seeds.input()),
                positions: Some(positions.input()),
                rows_in_step: self.numbered.then(|| numbers.input()),
                uniforms: self.given.then(|| uniforms.input()),
                tokens: tokens.output(),
                stats: Some(stats.output()),
                log_probs: Some(log_probs.output()),
                status: status.output(),
                workspace: workspace.output(),
                counters: counters.output(),
            },
        )
        .unwrap();
        workspace.read();
        assert!(counters.read().iter().all(|&count| count == 0));
        let stats = stats.read().iter().map(|x| x.to_bits()).collect();
        (Drawn { tokens: tokens.read(), stats, status: status.read() }, log_probs.read())
    }

    fn partials<T: Float>(&self, device: &TestDevice, data: &Data<T>) -> Vec<f32> {
        let plan = RowStats::<T>::builder(self.rows, self.columns).row_stride(self.stride() as i64);
        let plan = plan.build(&DeviceInfo::H200).unwrap();
        let logits = Buffer::of(device, &data.logits, self.shift);
        let temperature = Buffer::of(device, &data.temperature, 1);
        let allow = Buffer::of(device, &data.allow, 1);
        let mut partials = Buffer::<f32>::poisoned(device, self.rows * self.columns.div_ceil(1024) * 2, 0);
        plan.run(
            &device.stream(),
            RowStatsArgs {
                logits: logits.input(),
                temperature: Some(temperature.input()),
                allow: self.allowed.then(|| allow.input()),
                partials: partials.output(),
            },
        )
        .unwrap();
        partials.read()
    }

    fn logits<T: Float>(&self, data: &Data<T>, row: usize) -> Vec<f64> {
        (0..self.columns).map(|column| f64::from(data.logits[row * self.stride() + column].to_f32())).collect()
    }
}

fn check_oracle<T: Float>(case: &Case) {
    let data = case.data::<T>();
    let (drawn, log_probs) = case.draw(&TestDevice::Host, &data, &DeviceInfo::H200);
    let partials = case.partials(&TestDevice::Host, &data);
    for r in 0..case.rows {
        let logits = case.logits(&data, r);
        let mut sampling = Sampling::at(if data.temperature[r].is_nan() { 0.0 } else { data.temperature[r] });
        if case.truncated {
            (sampling.top_k, sampling.top_p, sampling.min_p) = (data.top_k[r], data.top_p[r], data.min_p[r]);
        }
        let mut margin = 1.0;
        let p = sampling.probabilities(&logits, false, &mut margin);
        // All weight is on one token: greedy, or too great for a sum.
        let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let peak = data.temperature[r].is_nan()
            || data.temperature[r] < 1e-5
            || top.abs() == f64::INFINITY
            || (top / f64::from(data.temperature[r])).abs() > 1.4e6;
        let token = |column: usize| if case.mapped { column as i32 * 3 + 5 } else { column as i32 };
        let (mut left, mut of_left) = (p.clone(), logits.clone());
        for j in 0..case.drafts {
            let at = r * case.drafts + j;
            let (seed, position) = (data.seeds[r] as u64, data.positions[r] as u64);
            let draws = match (case.given, case.numbered) {
                (true, _) => [0, 1, 2].map(|i| data.uniforms[at * 4 + i]),
                (false, true) => sibling_draws(seed, position, data.numbers[r] as u32, j as u32),
                (false, false) => {
                    sibling_draws(seed, position.wrapping_add(case.row_in_step.into()), case.row_in_step, j as u32)
                }
            };
            let expected = if peak {
                let top = of_left.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                of_left.iter().position(|&logit| logit == top && logit > f64::NEG_INFINITY)
            } else {
                // Weights that are nothing beside the greatest one are none in f32.
                if left.iter().any(|&p| p > 0.0 && p < 1e-25) && left.iter().all(|&p| p < 1e-20) {
                    margin = 0.0;
                }
                sample(&left, draws, &mut margin)
            };
            if margin > 2e-5 {
                assert_eq!(drawn.tokens[at], expected.map_or(if j == 0 { -9 } else { -1 }, token), "row {r} draft {j}");
                let log_prob = f64::from(log_probs[at]);
                match expected {
                    Some(column) if p[column] == 0.0 => assert_eq!(log_prob, f64::NEG_INFINITY),
                    Some(column) => assert!((log_prob - p[column].ln()).abs() < 1e-4, "{log_prob} {}", p[column].ln()),
                    None => assert!(log_prob.is_nan()),
                }
            }
            if let Some(column) = expected
                && case.distinct
            {
                (left[column], of_left[column]) = (0.0, f64::NEG_INFINITY);
            }
        }
        let said = drawn.status[r];
        assert_eq!(said & status::TARGET_NAN != 0, logits.iter().any(|x| x.is_nan()));
        assert_eq!(said & status::TARGET_EMPTY != 0, top == f64::NEG_INFINITY);

        // The partials.
        let words = case.columns.div_ceil(32);
        for chunk in 0..case.columns.div_ceil(1024) {
            let columns = chunk * 1024..((chunk + 1) * 1024).min(case.columns);
            let allowed =
                |column: usize| !case.allowed || data.allow[r * words + column / 32] >> (column % 32) & 1 == 1;
            let of_chunk: Vec<f64> = columns.filter(|&column| allowed(column)).map(|column| logits[column]).collect();
            let [max, sum] = [0, 1].map(|i| partials[(r * case.columns.div_ceil(1024) + chunk) * 2 + i]);
            let top = of_chunk.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert_eq!(f64::from(max), top);
            let nan = of_chunk.iter().any(|x| x.is_nan());
            assert_eq!(sum.is_sign_negative(), nan, "{sum}");
            let scale = std::f64::consts::LOG2_E / f64::from(data.temperature[r]);
            if data.temperature[r] >= 1e-5 && (top * scale).abs() < 2e6 {
                let exact: f64 = of_chunk
                    .iter()
                    .filter(|x| !x.is_nan())
                    .map(|x| (x * scale - (top * scale).round_ties_even()).exp2())
                    .sum();
                // The scale in f32 is off by half an ulp, which large exponents multiply.
                let bound = exact * (1e-5 + (top * scale).abs() * 2e-7);
                let near_half = (top * scale).fract().abs() - 0.5;
                assert!((f64::from(sum.abs()) - exact).abs() < bound || near_half.abs() < 1e-2, "{sum} {exact}");
            } else if data.temperature[r] < 1e-5 || data.temperature[r].is_nan() {
                assert_eq!(sum.abs(), 0.0);
            }
        }
    }
}

struct Oracle<'a>(&'a Case);
impl ForFloats for Oracle<'_> {
    fn call<E: Float, O: Float>(self) {
        check_oracle::<E>(self.0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases() * 4, ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_the_formula(case in case(), dtype in 0..3usize) {
        for_floats(FLOATS[dtype], DType::F32, Oracle(&case));
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

struct SameBits<'a>(&'a TestDevice, &'a Case);
impl ForFloats for SameBits<'_> {
    fn call<T: Float, O: Float>(self) {
        let SameBits(device, case) = self;
        let data = case.data::<T>();
        let (host, host_log) = case.draw(&TestDevice::Host, &data, &DeviceInfo::H200);
        let (drawn, log) = case.draw(device, &data, &DeviceInfo::H200);
        assert_eq!(drawn, host);
        for (a, b) in log.iter().zip(&host_log) {
            assert!((a - b).abs() <= 1e-5 + b.abs() * 2e-6 || a == b || (a.is_nan() && b.is_nan()), "{a} {b}");
        }
        assert_eq!(bits(&case.partials(device, &data)), bits(&case.partials(&TestDevice::Host, &data)));
    }
}

#[test]
fn kernels_agree_with_the_host_bit_for_bit() {
    for device in TestDevice::kernels() {
        let config = ProptestConfig { cases: support::cases(), failure_persistence: None, ..ProptestConfig::default() };
        proptest::test_runner::TestRunner::new(config)
            .run(&(case(), 0..3usize), |(case, dtype)| {
                for_floats(FLOATS[dtype], DType::F32, SameBits(&device, &case));
                Ok(())
            })
            .unwrap();
    }
}

fn plain() -> Case {
    Case {
        columns: 5000,
        rows: 3,
        gap: 0,
        shift: 0,
        given: false,
        truncated: false,
        allowed: false,
        mapped: false,
        numbered: false,
        distinct: true,
        drafts: 1,
        row_in_step: 1,
        seed: 3,
    }
}

/// Distinct drafts of a row that has fewer tokens than are asked for: all of them, then none; in order where it is
/// greedy.
#[test]
fn rows_run_out() {
    for device in TestDevice::all() {
        let case = Case { columns: 1030, rows: 2, drafts: 5, ..plain() };
        let mut data = case.data::<f32>();
        data.logits.fill(f32::NEG_INFINITY);
        for r in 0..2 {
            for (column, logit) in [(3, 1.0), (1025, 1.5), (700, 1.0)] {
                data.logits[r * 1030 + column] = logit;
            }
        }
        data.temperature = vec![0.0, 1.0];
        let (drawn, log_probs) = case.draw(&device, &data, &DeviceInfo::H200);
        assert_eq!(drawn.tokens[..5], [1025, 3, 700, -1, -1]);
        assert_eq!(log_probs[..3], [0.0, f32::NEG_INFINITY, f32::NEG_INFINITY]);
        let mut random = drawn.tokens[5..].to_vec();
        assert_eq!(random[3..], [-1, -1]);
        random.sort_unstable();
        assert_eq!(random, [-1, -1, 3, 700, 1025]);
        assert!(log_probs[3..5].iter().chain(&log_probs[8..]).all(|x| x.is_nan()));
        let all: f64 = log_probs[5..8].iter().map(|&x| f64::from(x).exp()).sum();
        assert!((all - 1.0).abs() < 1e-5, "{all}");
    }
}

/// Ordered pairs of distinct drafts have the probability q(x) q(y) / (1 - q(x)), and pairs that are drawn with
/// replacement have not.
#[test]
fn pairs_have_the_law_of_drawing_without_replacement() {
    let logits = [0.3f32, -1.0, 1.2, 0.0, 0.7];
    let (columns, rows) = (logits.len(), 60_000);
    let all: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    let q: Vec<f64> = logits.iter().map(|&x| f64::from(x).exp() / all).collect();
    for distinct in [true, false] {
        let case = Case { columns, rows, distinct, drafts: 2, numbered: true, ..plain() };
        let mut data = case.data::<f32>();
        data.logits = logits.repeat(rows);
        data.temperature.fill(1.0);
        // One request, many nodes.
        data.seeds.fill(77);
        data.positions.fill(5);
        data.numbers = (0..rows as i32).collect();
        let (drawn, _) = case.draw(&TestDevice::Host, &data, &DeviceInfo::H200);
        let mut counts = vec![0u32; columns * columns];
        drawn.tokens.chunks_exact(2).for_each(|pair| counts[pair[0] as usize * columns + pair[1] as usize] += 1);
        let (mut chi, mut impossible) = (0.0, 0);
        for x in 0..columns {
            for y in 0..columns {
                let count = counts[x * columns + y];
                if x == y {
                    impossible += count;
                } else {
                    let expected = q[x] * q[y] / (1.0 - q[x]) * rows as f64;
                    chi += (f64::from(count) - expected).powi(2) / expected;
                }
            }
        }
        let freedom = (columns * (columns - 1) - 1) as f64;
        let excess = (chi - freedom) / (2.0 * freedom).sqrt();
        match distinct {
            true => assert!(impossible == 0 && excess < 4.0, "{impossible} {excess}"),
            false => assert!(impossible > 0 && excess > 10.0, "{impossible} {excess}"),
        }
    }
}

/// However the plan cuts the work, and whatever else is in the batch.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for device in TestDevice::all() {
        let case = Case { truncated: true, drafts: 3, ..plain() };
        let data = case.data::<bf16>();
        let (all, _) = case.draw(&device, &data, &DeviceInfo::H200);
        let mut small = DeviceInfo::A100;
        small.sm_count = 1;
        assert_eq!(case.draw(&device, &data, &small).0, all);
        let mut one = Case { rows: 1, ..case.clone() }.data::<bf16>();
        one.logits = data.logits[2 * 5000..].to_vec();
        (one.temperature, one.top_k) = (vec![data.temperature[2]], vec![data.top_k[2]]);
        (one.top_p, one.min_p) = (vec![data.top_p[2]], vec![data.min_p[2]]);
        (one.seeds, one.positions) = (vec![data.seeds[2]], vec![data.positions[2]]);
        let (alone, _) = Case { rows: 1, shift: 3, ..case.clone() }.draw(&device, &one, &DeviceInfo::H200);
        assert_eq!((&alone.tokens[..], &alone.stats[..]), (&all.tokens[6..], &all.stats[8..]));
    }
}

#[test]
fn every_dtype_at_the_edges() {
    for device in TestDevice::kernels() {
        for columns in [1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 8191, 8192, 8193] {
            for (i, dtype) in FLOATS.into_iter().enumerate() {
                let case = Case { columns, gap: i, shift: columns % 3, drafts: 4, seed: columns as u64, ..plain() };
                for_floats(dtype, DType::F32, SameBits(&device, &case));
            }
        }
    }
}

#[test]
fn bad_plans_and_buffers_are_refused() {
    let size = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    let info = &DeviceInfo::H200;
    size(DraftSample::<f32>::builder(1, 0).build(info).map(drop), "vocab");
    size(DraftSample::<f32>::builder(1, (1 << 24) + 1).build(info).map(drop), "vocab");
    size(DraftSample::<f32>::builder((1 << 20) + 1, 5).build(info).map(drop), "rows");
    size(DraftSample::<f32>::builder(1, 5).row_in_step(1024).build(info).map(drop), "row_in_step");
    size(DraftSample::<f32>::builder(1, 5).drafts(0).build(info).map(drop), "drafts");
    size(DraftSample::<f32>::builder(1, 5).drafts(33).build(info).map(drop), "drafts");
    size(RowStats::<f32>::builder(1, 0).build(info).map(drop), "vocab");
    size(RowStats::<f32>::builder(1 << 20, 1 << 24).build(info).map(drop), "rows * chunks");
    let stride = |result: Result<(), Error>| assert!(matches!(result, Err(Error::Stride { .. })), "{result:?}");
    stride(DraftSample::<f32>::builder(2, 5).row_stride(4).build(info).map(drop));
    stride(RowStats::<f32>::builder(2, 5).row_stride(-5).build(info).map(drop));
    stride(RowStats::<f32>::builder(2, 65).allow_row_stride(2).build(info).map(drop));
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(RowStats::<f16>::builder(1, 5).build(&old), Err(Error::UnsupportedDevice { .. })));
    for device in TestDevice::all() {
        let plan = RowStats::<f32>::builder(2, 2000).build(info).unwrap();
        let logits = Buffer::of(&device, &[0f32; 4000], 0);
        let mut partials = Buffer::<f32>::poisoned(&device, 8, 0);
        let mut run = |len, out| {
            let logits = logits.input_of(len);
            let partials = partials.output_of(out);
            plan.run(&device.stream(), RowStatsArgs { logits, temperature: None, allow: None, partials })
        };
        assert_eq!(run(3999, 8), Err(Error::Length { arg: "logits", need: 4000, got: 3999 }));
        assert_eq!(run(4000, 7), Err(Error::Length { arg: "partials", need: 8, got: 7 }));
        assert_eq!(run(4000, 8), Ok(()));
    }
}
