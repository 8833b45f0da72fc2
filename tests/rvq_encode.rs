//! Codebooks and RVQ encode on every device, against an oracle written here from the formula.

#![cfg(feature = "quantization")]

mod support;

use nextscale::dtype::{Code, Float};
use nextscale::quantization::{
    Codebook, CodebookArgs, EncodeKernel, EncodeSchedule, EncodeVariant, Filter, Metric, Projections, RvqDecode,
    RvqDecodeArgs, RvqEncode, RvqEncodeArgs, RvqEncodeBuilder,
};
use nextscale::{DeviceInfo, Error, In, Layout, Out, Result, Stream, bf16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, CODES, FLOATS, ForDTypes, POISON_BYTE, TestDevice, for_dtypes};

/// What the rows and codes are like.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Data {
    /// Independent normals.
    Gaussian,
    /// Codes within 1e-3 of one of three centres far out, rows too: 16-bit products tell few of them apart.
    Clusters,
    /// Small integers: many exact ties. Codes repeat, also from one tile to the next.
    Lattice,
    /// All codes are the same.
    Same,
    /// Rows and codes of magnitudes from 1e-30 to 1e25, and zeroes.
    Magnitudes,
}

#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    rows: usize,
    levels: usize,
    entries: usize,
    dim: usize,
    latent: usize,
    shared: bool,
    metric: Metric,
    filter: Filter,
    /// Rows are sums, counts go with them.
    average: bool,
    padding_row: bool,
    variant: EncodeVariant,
    data: Data,
    channels_first: bool,
    codes_rows_first: bool,
    /// Extra elements between rows of the outputs.
    gap: usize,
    /// Elements by which the input starts off its alignment.
    shift: usize,
    /// One row has a NaN, another an infinity.
    bad_rows: bool,
    /// Multiprocessors that the plan thinks there are.
    sms: i32,
    seed: u64,
}

impl Case {
    /// The device that is planned for.
    fn facts(&self) -> DeviceInfo {
        let mut facts = DeviceInfo::H200;
        facts.sm_count = self.sms;
        facts
    }
}

fn plain() -> Case {
    Case {
        batch: 1,
        rows: 37,
        levels: 3,
        entries: 200,
        dim: 24,
        latent: 0,
        shared: false,
        metric: Metric::L2,
        filter: Filter::Auto,
        average: false,
        padding_row: false,
        variant: EncodeVariant::Auto,
        data: Data::Gaussian,
        channels_first: false,
        codes_rows_first: false,
        gap: 0,
        shift: 0,
        bad_rows: false,
        sms: 132,
        seed: 7,
    }
}

fn metric() -> impl Strategy<Value = Metric> {
    prop_oneof![
        3 => Just(Metric::L2),
        1 => Just(Metric::CosineRaw { eps: 1e-12 }),
        1 => Just(Metric::CosineUnit { eps: 1e-12 }),
        1 => Just(Metric::CosineUnit { eps: 0.5 }),
    ]
}

fn data() -> impl Strategy<Value = Data> {
    prop_oneof![
        3 => Just(Data::Gaussian),
        2 => Just(Data::Clusters),
        2 => Just(Data::Lattice),
        1 => Just(Data::Same),
        1 => Just(Data::Magnitudes),
    ]
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (
        1..3usize,
        prop_oneof![0..20usize, 0..70usize],
        1..4usize,
        prop_oneof![1..10usize, 100..300usize, Just(128), 385..1100usize],
        prop_oneof![1..10usize, Just(8), Just(32), 1..80usize],
        prop_oneof![4 => Just(0), 1 => 1..50usize],
    );
    let kind = (
        any::<bool>(),
        metric(),
        prop_oneof![Just(Filter::Auto), Just(Filter::Bf16), Just(Filter::Bf16x3)],
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
        prop_oneof![
            Just(EncodeVariant::Auto),
            Just(EncodeVariant::Portable),
            Just(EncodeVariant::Hopper),
            Just(EncodeVariant::Stream),
        ],
        data(),
    );
    let rest = (any::<bool>(), any::<bool>(), 0..3usize, 0..3usize, prop::bool::weighted(0.3), (1..3i32, any::<u64>()));
    (sizes, kind, rest).prop_map(|(sizes, kind, rest)| {
        let (batch, rows, levels, entries, dim, latent) = sizes;
        let (shared, metric, filter, average, padding_row, variant, data) = kind;
        let (channels_first, codes_rows_first, gap, shift, bad_rows, (sms, seed)) = rest;
        let (dim, variant) = match latent {
            0 => (dim, variant),
            _ => (dim.min(32), EncodeVariant::Auto),
        };
        Case {
            batch,
            rows,
            levels,
            entries,
            dim,
            latent,
            shared,
            metric,
            filter,
            average,
            padding_row,
            variant,
            data,
            channels_first,
            codes_rows_first,
            gap,
            shift,
            bad_rows,
            sms: if sms == 1 { 1 } else { 132 },
            seed,
        }
    })
}

const USAGE_EPS: f32 = 1e-2;

/// The case with its data.
struct Problem<X> {
    /// Of the codebook as given, with padding rows.
    source: Vec<X>,
    usage: Vec<f32>,
    input: Vec<X>,
    /// in_weight, in_bias, out_weight, out_bias.
    weights: [Vec<f32>; 4],
    input_layout: Layout<3>,
    vectors_layout: Layout<3>,
    codes_layout: Layout<3>,
}

fn normal(rng: &mut StdRng) -> f32 {
    let (u, v): (f32, f32) = (rng.random_range(1e-7..1.0), rng.random_range(0.0..1.0));
    (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}

impl Case {
    fn books(&self) -> usize {
        if self.shared { 1 } else { self.levels }
    }

    fn width(&self) -> usize {
        if self.latent > 0 { self.latent } else { self.dim }
    }

    fn problem<X: Float>(&self) -> Problem<X> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let width = self.width();
        let centres: Vec<Vec<f32>> = (0..3).map(|_| (0..1024).map(|_| 3.0 * normal(&mut rng)).collect()).collect();
        let mut element = {
            let mut rng = StdRng::seed_from_u64(self.seed ^ 1);
            let (mut centre, mut magnitude) = (0, 1.0f32);
            move |data: Data, k: usize| -> f32 {
                if k == 0 {
                    centre = rng.random_range(0..3usize);
                    magnitude = [0.0, 1e-30, 1e-12, 1.0, 1e4, 1e15, 1e25][rng.random_range(0..7usize)];
                }
                match data {
                    Data::Gaussian | Data::Same => normal(&mut rng),
                    Data::Clusters => centres[centre][k] + 1e-3 * normal(&mut rng),
                    Data::Lattice => rng.random_range(-1..2) as f32,
                    Data::Magnitudes => magnitude * normal(&mut rng),
                }
            }
        };
        let all = self.entries + usize::from(self.padding_row);
        let mut source: Vec<X> = Vec::new();
        let mut usage = Vec::new();
        for _ in 0..self.books() {
            let from = source.len();
            for entry in 0..all {
                let copy = match self.data {
                    Data::Same if entry > 0 => Some(0),
                    // Twice the same, on both sides of a tile's edge, and far apart.
                    Data::Lattice if entry % 128 == 0 && entry > 0 => Some(entry - 1),
                    Data::Lattice if entry == 5 => Some(1),
                    _ => None,
                };
                for k in 0..self.dim {
                    let value = element(self.data, k);
                    let value = copy.map_or(X::from_f32(value), |copy| source[from + copy * self.dim + k]);
                    source.push(value);
                }
            }
            usage.extend((0..self.entries).map(|_| [0.0f32, 0.25, 3.0, 1000.0][rng.random_range(0..4usize)]));
        }
        let (batch, rows) = (self.batch as u64, self.rows as u64);
        let strides = |gap: usize| {
            let stride = (width + gap) as i64;
            match self.channels_first {
                true => {
                    let rows = (self.rows + gap) as i64;
                    [rows * width as i64, 1, rows]
                }
                false => [stride * self.rows as i64, stride, 1],
            }
        };
        let input_layout = Layout::strided([batch, rows, width as u64], strides(0));
        let vectors_layout = Layout::strided([batch, rows, width as u64], strides(self.gap));
        let levels = self.levels as i64;
        let codes_layout = Layout::strided(
            [batch, self.levels as u64, rows],
            match self.codes_rows_first {
                true => [self.rows as i64 * (levels + 1), 1, levels + 1],
                false => [self.rows as i64 * levels, self.rows as i64, 1],
            },
        );
        let mut input = vec![X::from_f32(0.0); self.batch * self.rows * width];
        for b in 0..batch {
            for r in 0..rows {
                for k in 0..width {
                    let value = match self.data {
                        // Some rows are codes, so that their distance is 0.
                        Data::Gaussian if r % 3 == 0 && self.latent == 0 => {
                            source[(r as usize % self.entries) * self.dim + k].to_f32()
                        }
                        _ => element(self.data, k),
                    };
                    input[input_layout.offset([b, r, k as u64]) as usize] = X::from_f32(value);
                }
            }
        }
        if self.bad_rows {
            for (r, value) in [(rows / 2, f32::NAN), (rows.saturating_sub(1), f32::INFINITY)] {
                if r < rows {
                    input[input_layout.offset([0, r, width as u64 / 2]) as usize] = X::from_f32(value);
                }
            }
        }
        let (l, d, w) = (self.levels, self.dim, self.latent);
        let weights = [l * d * w, l * d, l * w * d, l * w].map(|len| {
            let mut rng = StdRng::seed_from_u64(self.seed + len as u64);
            (0..if w > 0 { len } else { 0 }).map(|_| 0.3 * normal(&mut rng)).collect()
        });
        Problem { source, usage, input, weights, input_layout, vectors_layout, codes_layout }
    }

    fn codebook(&self) -> Codebook {
        let mut builder =
            Codebook::builder(self.books(), self.entries, self.dim).metric(self.metric).filter(self.filter);
        if self.average {
            builder = builder.moving_average(USAGE_EPS);
        }
        if self.padding_row {
            builder = builder.padding_row();
        }
        builder.build(&DeviceInfo::H200).unwrap()
    }

    fn builder<X: Float, C: Code>(&self, codebook: &Codebook, problem: &Problem<X>) -> RvqEncodeBuilder<X, C> {
        let vectors = problem.vectors_layout.strides();
        let mut builder = RvqEncode::<X, C>::builder(codebook)
            .levels(self.levels)
            .batch(self.batch)
            .rows(self.rows)
            .input_strides(problem.input_layout.strides())
            .quantized_strides(vectors)
            .residual_strides(vectors)
            .codes_strides(problem.codes_layout.strides())
            .variant(self.variant);
        if self.latent > 0 {
            builder = builder.projected(self.latent);
        }
        builder
    }
}

/// What an encode gives, each output in its layout, gaps `None`.
#[derive(Debug, Clone, PartialEq)]
struct Encoded {
    codes: Vec<Option<u32>>,
    /// Bits, `[batch, levels, rows]`.
    distances: Vec<u32>,
    quantized: Vec<Option<f32>>,
    residual: Vec<Option<f32>>,
    histogram: Vec<u32>,
    not_finite: bool,
}

/// A codebook's level as the formula has it: searched rows and values.
struct Level {
    search: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

fn unit(row: &[f32], eps: f32) -> Vec<f32> {
    let mut sum = 0f32;
    for &x in row {
        sum = x.mul_add(x, sum);
    }
    let norm = sum.sqrt();
    let norm = if norm < eps { eps } else { norm };
    row.iter().map(|x| x / norm).collect()
}

impl Case {
    fn levels_of<X: Float>(&self, problem: &Problem<X>) -> Vec<Level> {
        let all = self.entries + usize::from(self.padding_row);
        let book = |book: usize| {
            let values: Vec<Vec<f32>> = (0..self.entries)
                .map(|entry| {
                    let row = &problem.source[(book * all + entry) * self.dim..][..self.dim];
                    let count = problem.usage[book * self.entries + entry].max(USAGE_EPS);
                    let row = row.iter().map(|x| x.to_f32());
                    if self.average { row.map(|x| x / count).collect() } else { row.collect() }
                })
                .collect();
            match self.metric {
                Metric::L2 => Level { search: values.clone(), values },
                Metric::CosineRaw { eps } => {
                    Level { search: values.iter().map(|row| unit(row, eps)).collect(), values }
                }
                Metric::CosineUnit { eps } => {
                    let rows: Vec<_> = values.iter().map(|row| unit(row, eps)).collect();
                    Level { search: rows.clone(), values: rows }
                }
            }
        };
        (0..self.levels).map(|level| book(if self.shared { 0 } else { level })).collect()
    }

    /// `pick` is the search: the score and the code.
    fn oracle<X: Float>(&self, problem: &Problem<X>, pick: impl Fn(&[f32], &[Vec<f32>]) -> (f32, usize)) -> Encoded {
        let (batch, rows, width) = (self.batch as u64, self.rows as u64, self.width() as u64);
        let levels = self.levels_of(problem);
        let vectors = problem.vectors_layout.required_len("").unwrap() as usize;
        let mut encoded = Encoded {
            codes: vec![None; problem.codes_layout.required_len("").unwrap() as usize],
            distances: vec![0; self.batch * self.levels * self.rows],
            quantized: vec![None; vectors],
            residual: vec![None; vectors],
            histogram: vec![0; self.levels * self.entries],
            not_finite: false,
        };
        for b in 0..batch {
            for r in 0..rows {
                let at = |k: u64| problem.input[problem.input_layout.offset([b, r, k]) as usize].to_f32();
                let mut left: Vec<f32> = (0..width).map(at).collect();
                let mut sum = vec![0f32; width as usize];
                for (l, level) in levels.iter().enumerate() {
                    let mut search = left.clone();
                    if self.latent > 0 {
                        let row = |j: usize| l * self.dim + j;
                        search = (0..self.dim)
                            .map(|j| {
                                let weight = &problem.weights[0][row(j) * self.latent..][..self.latent];
                                let chain = |c: usize| {
                                    let of = (0..self.latent).filter(|k| k / 4 % 32 == c);
                                    of.fold(0f32, |sum, k| weight[k].mul_add(left[k], sum))
                                };
                                fn paired(chain: &dyn Fn(usize) -> f32, c: usize, apart: usize) -> f32 {
                                    if apart == 32 {
                                        return chain(c);
                                    }
                                    paired(chain, c, apart * 2) + paired(chain, c + apart, apart * 2)
                                }
                                problem.weights[1][row(j)] + paired(&chain, 0, 1)
                            })
                            .collect();
                    }
                    if let Metric::CosineRaw { eps } | Metric::CosineUnit { eps } = self.metric {
                        search = unit(&search, eps);
                    }
                    let (score, code) = pick(&search, &level.search);
                    encoded.codes[problem.codes_layout.offset([b, l as u64, r]) as usize] = Some(code as u32);
                    encoded.distances[(b as usize * self.levels + l) * self.rows + r as usize] = score.to_bits();
                    encoded.histogram[l * self.entries + code] += 1;
                    encoded.not_finite |= score == f32::INFINITY;
                    for k in 0..width as usize {
                        let taken = match self.latent {
                            0 => level.values[code][k],
                            latent => {
                                let row = l * latent + k;
                                let weight = &problem.weights[2][row * self.dim..][..self.dim];
                                let mut y = problem.weights[3][row];
                                for (w, v) in weight.iter().zip(&level.values[code]) {
                                    y = w.mul_add(*v, y);
                                }
                                y
                            }
                        };
                        left[k] -= taken;
                        sum[k] += taken;
                    }
                }
                for k in 0..width {
                    let at = problem.vectors_layout.offset([b, r, k]) as usize;
                    encoded.quantized[at] = Some(X::from_f32(sum[k as usize]).to_f32());
                    encoded.residual[at] = Some(X::from_f32(left[k as usize]).to_f32());
                }
            }
        }
        encoded
    }
}

/// Finds the score and the code of what is nearest.
type Search<'a> = &'a dyn Fn(&[f32], &[Vec<f32>]) -> (f32, usize);

/// The score of the formula.
fn score(x: &[f32], c: &[f32]) -> f32 {
    let mut sum = 0f32;
    for (x, c) in x.iter().zip(c) {
        let difference = x - c;
        sum = difference.mul_add(difference, sum);
    }
    sum
}

fn nearest(x: &[f32], codes: &[Vec<f32>]) -> (f32, usize) {
    let mut best = (f32::INFINITY, 0);
    for (code, c) in codes.iter().enumerate() {
        let score = score(x, c);
        if score < best.0 {
            best = (score, code);
        }
    }
    best
}

/// Prepares the codebook of a case on a device. Panics if the device's codebook is not that of the host to the bit.
fn prepare<X: Float>(device: &TestDevice, case: &Case, problem: &Problem<X>) -> (Codebook, Buffer<u8>) {
    let codebook = case.codebook();
    let source = Buffer::of(device, &problem.source, case.shift);
    let usage = Buffer::of(device, &problem.usage, 0);
    let mut prepared = Buffer::<u8>::poisoned(device, codebook.bytes() as usize, 0);
    let mut flags = Buffer::of(device, &[0x100u32], 0);
    codebook
        .prepare(
            &device.stream(),
            CodebookArgs {
                rows: source.input(),
                usage: case.average.then(|| usage.input()),
                prepared: prepared.output(),
                flags: Some(flags.output()),
            },
        )
        .unwrap();
    assert_eq!(flags.read(), [0x100]);
    (codebook, prepared)
}

fn encode<X: Float, C: Code>(device: &TestDevice, case: &Case, problem: &Problem<X>) -> Encoded {
    let (codebook, prepared) = prepare(device, case, problem);
    let builder = case.builder::<X, C>(&codebook, problem);
    // Where a kernel is refused, another one encodes.
    let facts = case.facts();
    let plan = builder.clone().build(&facts);
    let plan = plan.unwrap_or_else(|_| builder.variant(EncodeVariant::Auto).build(&facts).unwrap());
    run_plan(device, case, problem, &plan, &prepared)
}

fn run_plan<X: Float, C: Code>(
    device: &TestDevice,
    case: &Case,
    problem: &Problem<X>,
    plan: &RvqEncode<X, C>,
    prepared: &Buffer<u8>,
) -> Encoded {
    let vectors = problem.vectors_layout.required_len("").unwrap() as usize;
    let input = Buffer::of(device, &problem.input, case.shift);
    let weights = problem.weights.each_ref().map(|weight| Buffer::of(device, weight, case.shift));
    let mut codes = Buffer::<C>::poisoned(device, problem.codes_layout.required_len("").unwrap() as usize, case.shift);
    let mut distances = Buffer::<f32>::poisoned(device, case.batch * case.levels * case.rows, case.shift);
    let mut quantized = Buffer::<X>::poisoned(device, vectors, case.shift);
    let mut residual = Buffer::<X>::poisoned(device, vectors, case.shift);
    let start: Vec<u32> = (0..case.levels * case.entries).map(|i| i as u32 * 3).collect();
    let mut histogram = Buffer::of(device, &start, 0);
    let mut flags = Buffer::of(device, &[0x100u32], 0);
    let [in_weight, in_bias, out_weight, out_bias] = &weights;
    plan.run(
        &device.stream(),
        RvqEncodeArgs {
            input: input.input(),
            codebook: prepared.input(),
            codes: codes.output(),
            quantized: Some(quantized.output()),
            residual: Some(residual.output()),
            distances: Some(distances.output()),
            histogram: Some(histogram.output()),
            flags: Some(flags.output()),
            projections: (case.latent > 0).then(|| Projections {
                in_weight: in_weight.input(),
                in_bias: in_bias.input(),
                out_weight: out_weight.input(),
                out_bias: out_bias.input(),
            }),
        },
    )
    .unwrap_or_else(|error| panic!("{error}: {}, {case:?}", report()));
    let flags = flags.read()[0];
    assert_eq!(flags & !RvqEncode::<X, C>::NOT_FINITE, 0x100);
    // Gaps are untouched: what is not poison was written.
    let vector = |all: Vec<X>, expected: &Layout<3>| -> Vec<Option<f32>> {
        let mut out = vec![None; all.len()];
        let mut seen = vec![false; all.len()];
        let [b, r, k] = expected.shape();
        for i in 0..b * r * k {
            let at = expected.offset([i / (r * k), i / k % r, i % k]) as usize;
            (out[at], seen[at]) = (Some(all[at].to_f32()), true);
        }
        for (value, seen) in all.iter().zip(seen) {
            assert!(seen || bytemuck::bytes_of(value).iter().all(|&byte| byte == POISON_BYTE), "a gap was written");
        }
        out
    };
    let codes_all = codes.read();
    let mut codes = vec![None; codes_all.len()];
    let [b, l, r] = problem.codes_layout.shape();
    for i in 0..b * l * r {
        let at = problem.codes_layout.offset([i / (l * r), i / r % l, i % r]) as usize;
        codes[at] = Some(codes_all[at].to_i64() as u32);
    }
    for (value, code) in codes_all.iter().zip(&codes) {
        assert!(
            code.is_some() || bytemuck::bytes_of(value).iter().all(|&byte| byte == POISON_BYTE),
            "a gap was written"
        );
    }
    Encoded {
        codes,
        distances: distances.read().iter().map(|x| x.to_bits()).collect(),
        quantized: vector(quantized.read(), &problem.vectors_layout),
        residual: vector(residual.read(), &problem.vectors_layout),
        histogram: histogram.read().iter().zip(start).map(|(now, start)| now - start).collect(),
        not_finite: flags & RvqEncode::<X, C>::NOT_FINITE != 0,
    }
}

/// What the emulator found.
fn report() -> String {
    #[cfg(feature = "emulate")]
    return nextscale::emulator::report();
    #[cfg(not(feature = "emulate"))]
    String::new()
}

/// Equal to the bit, but any NaN is like any other.
fn same(actual: &Encoded, expected: &Encoded) -> Result<(), String> {
    let floats = |what: &str, actual: &[Option<f32>], expected: &[Option<f32>]| {
        for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
            let alike = match (a, e) {
                (Some(a), Some(e)) => a.to_bits() == e.to_bits() || (a.is_nan() && e.is_nan()),
                (None, None) => true,
                _ => false,
            };
            if !alike {
                return Err(format!("{what} {i}: {a:?} instead of {e:?}"));
            }
        }
        Ok(())
    };
    for (i, (a, e)) in actual.codes.iter().zip(&expected.codes).enumerate() {
        if a != e {
            return Err(format!("code {i}: {a:?} instead of {e:?}"));
        }
    }
    let distances = |encoded: &Encoded| encoded.distances.iter().map(|&x| Some(f32::from_bits(x))).collect::<Vec<_>>();
    floats("distance", &distances(actual), &distances(expected))?;
    floats("quantized", &actual.quantized, &expected.quantized)?;
    floats("residual", &actual.residual, &expected.residual)?;
    if actual.histogram != expected.histogram {
        return Err("histograms differ".into());
    }
    if actual.not_finite != expected.not_finite {
        return Err(format!("not finite: {} instead of {}", actual.not_finite, expected.not_finite));
    }
    Ok(())
}

fn check<X: Float, C: Code>(device: &TestDevice, case: &Case) {
    let problem = case.problem::<X>();
    let expected = case.oracle(&problem, nearest);
    let actual = encode::<X, C>(device, case, &problem);
    same(&actual, &expected).unwrap_or_else(|why| panic!("{why}, on {device:?}: {case:?}"));
}

fn check_any(device: &TestDevice, case: &Case, dtypes: usize) {
    struct Check<'a>(&'a TestDevice, &'a Case);
    impl ForDTypes for Check<'_> {
        fn call<C: Code, X: Float, O: Float>(self) {
            check::<X, C>(self.0, self.1);
        }
    }
    for_dtypes(CODES[dtypes / 3], FLOATS[dtypes % 3], FLOATS[0], Check(device, case));
}

/// f16 reaches to 65504 only.
fn fits(case: &Case, dtypes: usize) -> bool {
    case.data != Data::Magnitudes || dtypes % 3 != 1
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases(), ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_the_formula(case in case(), dtypes in 0..9usize) {
        if fits(&case, dtypes) {
            check_any(&TestDevice::Host, &case, dtypes);
        }
    }

    /// Every row belongs to one block or cluster.
    #[test]
    fn the_schedule_owns_every_row_once(
        batch in 0..4usize, rows in 0..3000usize, dim in 1..=512usize, entries in 1..5000usize,
        cosine in any::<bool>(), variant in 0..4usize, sm80 in any::<bool>(),
    ) {
        let metric = if cosine { Metric::CosineRaw { eps: 1e-12 } } else { Metric::L2 };
        let variant = [EncodeVariant::Auto, EncodeVariant::Portable, EncodeVariant::Hopper, EncodeVariant::Stream][variant];
        let mut device = if sm80 { DeviceInfo::A100 } else { DeviceInfo::H200 };
        if sm80 && dim <= 256 && !cosine {
            device.smem_per_block = 99 << 10; // sm_86
        }
        let codebook = Codebook::builder(1, entries, dim).metric(metric).build(&device).unwrap();
        let plan = RvqEncode::<f32, u32>::builder(&codebook).levels(4).batch(batch).rows(rows).variant(variant).build(&device);
        let Ok(plan) = plan else {
            prop_assert!(variant == EncodeVariant::Hopper || sm80);
            return Ok(());
        };
        let schedule: EncodeSchedule = plan.schedule();
        let mut owners = vec![0u32; batch * rows];
        for block in (0..schedule.blocks()).step_by(schedule.splits as usize) {
            for row in schedule.rows_of(block) {
                owners[row as usize] += 1;
            }
            prop_assert_eq!(schedule.rows_of(block), schedule.rows_of(block + u64::from(schedule.splits) - 1));
        }
        prop_assert!(owners.iter().all(|&n| n == 1));
        match schedule.kernel {
            EncodeKernel::Portable => prop_assert!(schedule.stages >= 2, "{:?}", schedule),
            EncodeKernel::Hopper => prop_assert!(schedule.stages >= 2 && !sm80),
            EncodeKernel::Stream => prop_assert!(schedule.splits.is_power_of_two() && schedule.splits <= 16 && !sm80),
            EncodeKernel::Projected => prop_assert!(false),
        }
    }
}

#[test]
fn kernels_agree_with_the_formula() {
    for device in TestDevice::kernels() {
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
            cases: support::cases() * 2,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        runner
            .run(&(case(), 0..9usize), |(case, dtypes)| {
                if fits(&case, dtypes) {
                    check_any(&device, &case, dtypes);
                }
                Ok(())
            })
            .unwrap();
    }
}

const VARIANTS: [EncodeVariant; 3] = [EncodeVariant::Portable, EncodeVariant::Hopper, EncodeVariant::Stream];

#[test]
fn every_kernel_at_the_edges() {
    for device in TestDevice::all() {
        for variant in VARIANTS {
            for (rows, entries, dim) in
                [(1, 1, 1), (16, 128, 8), (17, 129, 64), (63, 127, 72), (65, 257, 20), (0, 4, 4)]
            {
                for data in [Data::Gaussian, Data::Clusters, Data::Lattice] {
                    let case = Case { rows, entries, dim, variant, data, levels: 2, ..plain() };
                    check::<f32, u16>(&device, &case);
                }
            }
            if device.is_host() {
                break;
            }
        }
    }
}

/// Blocks of several tiles of rows share what they stream, also those of a last cluster that have no rows.
#[test]
fn tiles_of_rows_share_the_codes() {
    for device in TestDevice::kernels() {
        for (rows, sms, sharers) in [(65, 132, 2), (140, 132, 2), (193, 1, 4), (300, 1, 4), (64, 132, 1)] {
            for (dim, metric, entries) in
                [(9, Metric::L2, 385), (80, Metric::CosineRaw { eps: 1e-12 }, 700), (250, Metric::L2, 130)]
            {
                // Splitting the codes comes first where there are few rows.
                let entries = if sms == 132 { entries.min(383) } else { entries };
                let case = Case { rows, entries, dim, metric, sms, variant: EncodeVariant::Hopper, ..plain() };
                let case = Case { bad_rows: true, ..case };
                let plan = RvqEncode::<f32, u16>::builder(&case.codebook()).rows(rows).variant(case.variant);
                assert_eq!(plan.build(&case.facts()).unwrap().schedule().sharers, sharers, "{case:?}");
                check::<f32, u16>(&device, &case);
            }
        }
    }
}

/// Few rows and many codes: clusters of 2, 4 and 8 blocks deal out the codes of a level.
#[test]
fn codes_dealt_out_to_a_cluster_agree() {
    for device in TestDevice::kernels() {
        for (entries, splits) in [(385, 2), (1025, 4), (2047, 8)] {
            for data in [Data::Gaussian, Data::Lattice, Data::Same] {
                let case = Case { rows: 70, entries, dim: 9, data, variant: EncodeVariant::Hopper, ..plain() };
                let case = Case { bad_rows: data == Data::Gaussian, ..case };
                let schedule = RvqEncode::<f32, u16>::builder(&case.codebook()).rows(70).variant(case.variant);
                assert_eq!(schedule.build(&DeviceInfo::H200).unwrap().schedule().splits, splits);
                check::<f32, u16>(&device, &case);
            }
        }
    }
}

/// The dimensions of models, a few codes of them.
#[test]
fn every_kernel_at_the_widths_of_models() {
    for device in TestDevice::kernels() {
        for variant in VARIANTS {
            for (dim, metric) in
                [(8, Metric::CosineUnit { eps: 1e-12 }), (32, Metric::L2), (128, Metric::L2), (256, Metric::L2)]
            {
                for filter in [Filter::Bf16, Filter::Bf16x3] {
                    let case = Case { rows: 20, entries: 260, dim, metric, filter, variant, levels: 2, ..plain() };
                    check::<f32, u32>(&device, &case);
                }
            }
        }
        let case = Case { rows: 3, entries: 140, dim: 512, levels: 1, ..plain() };
        check::<f32, u32>(&device, &Case { variant: EncodeVariant::Portable, ..case.clone() });
        check::<f32, u32>(&device, &Case { variant: EncodeVariant::Stream, ..case });
        let dac =
            Case { rows: 17, entries: 64, dim: 8, latent: 128, metric: Metric::CosineRaw { eps: 1e-12 }, ..plain() };
        check::<f32, i64>(&device, &dac);
        check::<f32, u32>(&device, &Case { latent: 300, dim: 32, ..dac.clone() });
        check::<bf16, i64>(&device, &Case { latent: 33, dim: 13, ..dac });
    }
}

/// A NaN in one row changes no other, and sets the flag.
#[test]
fn rows_that_are_not_finite_keep_to_themselves() {
    for device in TestDevice::all() {
        for variant in VARIANTS {
            let case = Case { variant, bad_rows: true, ..plain() };
            let problem = case.problem::<f32>();
            let bad = encode::<f32, u32>(&device, &case, &problem);
            assert!(bad.not_finite);
            let mut mended = case.problem::<f32>();
            mended.input.iter_mut().filter(|x| !x.is_finite()).for_each(|x| *x = 0.5);
            let good = encode::<f32, u32>(&device, &case, &mended);
            assert!(!good.not_finite);
            let rows = case.rows;
            for (i, (bad, good)) in bad.codes.iter().zip(&good.codes).enumerate() {
                let of_bad_row = [rows / 2, rows - 1].contains(&(i % rows));
                assert!(if of_bad_row { *bad == Some(0) } else { bad == good }, "code {i} on {device:?}");
            }
        }
    }
}

/// The first levels of many are those of few; a row alone gets what it gets among others.
#[test]
fn levels_are_prefixes_and_batches_do_not_matter() {
    for device in TestDevice::all() {
        let case = Case { levels: 4, entries: 130, dim: 40, data: Data::Clusters, ..plain() };
        let problem = case.problem::<f32>();
        let (codebook, prepared) = prepare(&device, &case, &problem);
        let input = Buffer::of(&device, &problem.input, 0);
        let run = |levels: usize, first: usize, rows: usize, variant: EncodeVariant| {
            let plan = RvqEncode::<f32, u32>::builder(&codebook).levels(levels).rows(rows).variant(variant);
            let plan = plan.build(&DeviceInfo::H200).unwrap();
            let mut codes = Buffer::<u32>::poisoned(&device, levels * rows, 0);
            let view = input.input_from(first * case.dim, rows * case.dim);
            plan.run(&device.stream(), RvqEncodeArgs::new(view, prepared.input(), codes.output())).unwrap();
            codes.read()
        };
        let all = run(4, 0, case.rows, EncodeVariant::Hopper);
        for variant in VARIANTS {
            assert_eq!(run(2, 0, case.rows, variant), all[..2 * case.rows]);
            for row in [0, 5, 36] {
                let alone = run(4, row, 1, variant);
                assert!((0..4).all(|l| alone[l] == all[l * case.rows + row]), "row {row} with {variant:?}");
            }
        }
        assert_eq!(run(4, 0, case.rows, EncodeVariant::Hopper), all, "repeated");
    }
}

/// What an encode says it quantized to is what a decode of its codes gives, from the prepared codebook's own memory.
#[test]
fn decode_gives_what_was_quantized() {
    for device in TestDevice::all() {
        for metric in [Metric::L2, Metric::CosineRaw { eps: 1e-6 }, Metric::CosineUnit { eps: 1e-6 }] {
            let case = Case { metric, ..plain() };
            let problem = case.problem::<f32>();
            let encoded = encode::<f32, u32>(&device, &case, &problem);
            let (codebook, prepared) = prepare(&device, &case, &problem);
            let (first, values) = codebook.values();
            let [level, entry, _] = values.strides();
            let plan = RvqDecode::<u32, f32, f32>::builder(case.levels, case.entries, case.dim).rows(case.rows);
            let plan = plan.codebooks_strides([level, entry]).build(&DeviceInfo::H200).unwrap();
            let words: Vec<f32> = bytemuck::allocation::pod_collect_to_vec(&prepared.read());
            let words = Buffer::of(&device, &words, 0);
            let codes: Vec<u32> = encoded.codes.iter().map(|code| code.unwrap()).collect();
            let codes = Buffer::of(&device, &codes, 0);
            let mut out = Buffer::<f32>::poisoned(&device, case.rows * case.dim, 0);
            let len = values.required_len("values").unwrap() as usize;
            let args = RvqDecodeArgs {
                codes: codes.input(),
                codebooks: words.input_from(first, len),
                out: out.output(),
                flags: None,
            };
            plan.run(&device.stream(), args).unwrap();
            assert_eq!(out.read().into_iter().map(Some).collect::<Vec<_>>(), encoded.quantized);
        }
    }
}

/// Kernels prepare what the host does, to the bit.
#[test]
fn prepared_codebooks_are_those_of_the_host() {
    for device in TestDevice::kernels() {
        for (metric, filter) in [
            (Metric::L2, Filter::Bf16),
            (Metric::CosineRaw { eps: 1e-12 }, Filter::Bf16x3),
            (Metric::CosineUnit { eps: 1e-3 }, Filter::Bf16),
        ] {
            for data in [Data::Gaussian, Data::Clusters, Data::Lattice] {
                for average in [false, true] {
                    let case = Case { metric, filter, data, average, padding_row: average, dim: 13, ..plain() };
                    let problem = case.problem::<bf16>();
                    let (codebook, host) = prepare(&TestDevice::Host, &case, &problem);
                    let (_, device) = prepare(&device, &case, &problem);
                    let (host, device) = (host.read(), device.read());
                    let poisoned = |at: usize| device[at] == POISON_BYTE && host[at] == 0;
                    let differ = (0..host.len()).filter(|&at| host[at] != device[at] && !poisoned(at)).count();
                    assert_eq!(differ, 0, "{case:?}");
                    // What kernels leave alone are the ends of sections.
                    let left = (0..host.len()).filter(|&at| poisoned(at)).count();
                    assert!(left < 4 * 256, "{left} bytes of {} were left out", codebook.bytes());
                }
            }
        }
    }
}

#[test]
fn codebooks_that_are_not_finite_are_refused_or_flagged() {
    let codebook = Codebook::builder(2, 3, 4).build(&DeviceInfo::H200).unwrap();
    let average = Codebook::builder(2, 3, 4).moving_average(1e-5).build(&DeviceInfo::H200).unwrap();
    for device in TestDevice::all() {
        let run = |codebook: &Codebook, rows: &[f32], usage: Option<&[f32]>| {
            let rows = Buffer::of(&device, rows, 0);
            let usage = usage.map(|usage| Buffer::of(&device, usage, 0));
            let mut prepared = Buffer::<u8>::poisoned(&device, codebook.bytes() as usize, 0);
            let mut flags = Buffer::of(&device, &[0u32], 0);
            let args = CodebookArgs {
                rows: rows.input(),
                usage: usage.as_ref().map(|usage| usage.input()),
                prepared: prepared.output(),
                flags: Some(flags.output()),
            };
            let ran = codebook.prepare(&device.stream(), args);
            (ran, flags.read()[0])
        };
        for (at, value) in [(0, f32::NAN), (23, f32::INFINITY), (12, f32::NEG_INFINITY)] {
            let mut rows = [1.0f32; 24];
            rows[at] = value;
            let expected = match device.is_host() {
                true => (Err(Error::NotFinite { arg: "rows", at: at as u64 }), 0),
                false => (Ok(()), Codebook::NOT_FINITE),
            };
            assert_eq!(run(&codebook, &rows, None), expected);
        }
        let mut usage = [1.0f32; 6];
        usage[4] = f32::NAN;
        let expected = match device.is_host() {
            true => (Err(Error::NotFinite { arg: "usage", at: 4 }), 0),
            false => (Ok(()), Codebook::NOT_FINITE),
        };
        assert_eq!(run(&average, &[1.0; 24], Some(&usage)), expected);
        // A sum that is finite, but not divided by its count.
        usage[4] = 0.0;
        let mut rows = [1.0f32; 24];
        rows[17] = f32::MAX;
        let expected = match device.is_host() {
            true => (Err(Error::NotFinite { arg: "rows", at: 17 }), 0),
            false => (Ok(()), Codebook::NOT_FINITE),
        };
        assert_eq!(run(&average, &rows, Some(&usage)), expected);
        assert_eq!(run(&average, &[1.0; 24], Some(&[1.0; 6])), (Ok(()), 0));
    }
}

/// The check must be able to fail: a search that takes the last of equals, or that rounds as tensor cores do, is caught.
#[test]
fn a_broken_search_is_caught() {
    let lattice = Case { data: Data::Lattice, dim: 4, ..plain() };
    let clusters = Case { data: Data::Clusters, ..plain() };
    let last = |x: &[f32], codes: &[Vec<f32>]| {
        let mut best = nearest(x, codes);
        for (code, c) in codes.iter().enumerate() {
            if score(x, c) == best.0 {
                best.1 = code;
            }
        }
        best
    };
    let expanded = |round: fn(f32) -> f32| {
        move |x: &[f32], codes: &[Vec<f32>]| {
            let mut best = (f32::INFINITY, 0);
            for (code, c) in codes.iter().enumerate() {
                let dot: f32 = x.iter().zip(c).map(|(&x, &c)| round(x) * round(c)).sum();
                let score = 0.5 * c.iter().map(|c| c * c).sum::<f32>() - dot;
                if score < best.0 {
                    best = (score, code);
                }
            }
            (score(x, &codes[best.1]), best.1)
        }
    };
    let tf32 = |x: f32| f32::from_bits(x.to_bits() & !0x1fff);
    let caught = |case: &Case, broken: Search<'_>| {
        let problem = case.problem::<f32>();
        let (right, wrong) = (case.oracle(&problem, nearest), case.oracle(&problem, broken));
        same(&right, &right).unwrap();
        same(&wrong, &right).expect_err("a broken search");
    };
    caught(&lattice, &last);
    caught(&clusters, &expanded(tf32));
    caught(&clusters, &expanded(|x| bf16::from_f32(x).to_f32()));
}

/// The search agrees with that in f64 but for distances that f32 cannot tell apart.
#[test]
fn scores_are_as_good_as_f32_allows() {
    for data in [Data::Gaussian, Data::Clusters] {
        let case = Case { data, levels: 1, entries: 300, dim: 64, ..plain() };
        let problem = case.problem::<f32>();
        let codes = &case.levels_of(&problem)[0].search;
        let encoded = encode::<f32, u32>(&TestDevice::Host, &case, &problem);
        for (r, code) in encoded.codes.iter().enumerate() {
            let x = &problem.input[r * 64..][..64];
            let exact = |c: &[f32]| x.iter().zip(c).map(|(&x, &c)| (f64::from(x) - f64::from(c)).powi(2)).sum::<f64>();
            let least = codes.iter().map(|c| exact(c)).fold(f64::INFINITY, f64::min);
            let got = exact(&codes[code.unwrap() as usize]);
            assert!(got <= least * (1.0 + 2.0 * 67.0 * 2f64.powi(-24)), "{got} instead of {least}");
        }
    }
}

#[test]
fn bad_plans_are_refused() {
    let device = DeviceInfo::H200;
    let size = |result: Result<Codebook>, arg: &str| {
        assert!(matches!(result, Err(Error::Size { arg: got, .. }) if got == arg), "{result:?}");
    };
    size(Codebook::builder(0, 4, 4).build(&device), "levels");
    size(Codebook::builder(1, 0, 4).build(&device), "entries");
    size(Codebook::builder(1, 131_073, 4).build(&device), "entries");
    size(Codebook::builder(1, 4, 0).build(&device), "dim");
    size(Codebook::builder(1, 4, 513).build(&device), "dim");
    for eps in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let metric = Codebook::builder(1, 4, 4).metric(Metric::CosineRaw { eps }).build(&device);
        assert!(matches!(metric, Err(Error::Unsupported { arg: "metric", .. })));
        let average = Codebook::builder(1, 4, 4).moving_average(eps).build(&device);
        assert!(matches!(average, Err(Error::Unsupported { arg: "moving_average", .. })));
    }
    let negative = Codebook::builder(2, 4, 4).strides([-1, 4]).build(&device);
    assert!(matches!(negative, Err(Error::Stride { arg: "rows", dim: 0, .. })));

    let codebook = Codebook::builder(8, 70_000, 16).build(&device).unwrap();
    let of = || RvqEncode::<f32, u32>::builder(&codebook);
    let refused = |builder: RvqEncodeBuilder<f32, u32>| builder.build(&device).unwrap_err();
    assert_eq!(refused(of().levels(9)), Error::Size { arg: "levels", got: 9, min: 1, max: 8 });
    assert_eq!(refused(of().levels(0)), Error::Size { arg: "levels", got: 0, min: 1, max: 8 });
    assert!(matches!(refused(of().rows(1 << 31)), Error::Size { arg: "batch * rows", .. }));
    assert!(matches!(refused(of().rows(usize::MAX).batch(8)), Error::Size { .. }));
    assert!(matches!(refused(of().rows(2).codes_strides([0, 0, 1])), Error::Stride { arg: "codes", .. }));
    assert!(matches!(refused(of().rows(2).quantized_strides([32, 8, 1])), Error::Stride { arg: "quantized", .. }));
    assert!(matches!(refused(of().rows(2).residual_strides([32, 8, 1])), Error::Stride { arg: "residual", .. }));
    assert!(matches!(refused(of().rows(2).distances_strides([0, 1, 1])), Error::Stride { arg: "distances", .. }));
    assert!(matches!(refused(of().rows(2).input_strides([0, -1, 1])), Error::Stride { arg: "input", dim: 1, .. }));
    assert!(matches!(refused(of().projected(1025)), Error::Size { arg: "latent", .. }));
    let small = RvqEncode::<f32, u16>::builder(&codebook).build(&device);
    assert!(matches!(small, Err(Error::Size { arg: "entries", got: 70_000, .. })));
    let a100 = of().variant(EncodeVariant::Hopper).build(&DeviceInfo::A100);
    assert!(matches!(a100, Err(Error::Unsupported { arg: "variant", .. })));
    let a100 = of().variant(EncodeVariant::Stream).build(&DeviceInfo::A100);
    assert!(matches!(a100, Err(Error::Unsupported { arg: "variant", .. })));
    let wide = Codebook::builder(1, 4, 257).build(&device).unwrap();
    let wide = RvqEncode::<f32, u32>::builder(&wide).variant(EncodeVariant::Hopper).build(&device);
    assert!(matches!(wide, Err(Error::Unsupported { arg: "variant", .. })));
    let wide = Codebook::builder(1, 4, 33).build(&device).unwrap();
    let wide = RvqEncode::<f32, u32>::builder(&wide).projected(64).build(&device);
    assert!(matches!(wide, Err(Error::Size { arg: "dim", .. })));
    let one = Codebook::builder(1, 4, 16).build(&device).unwrap();
    let shared = RvqEncode::<f32, u32>::builder(&one).levels(33).build(&device);
    assert!(matches!(shared, Err(Error::Size { arg: "levels", max: 32, .. })));
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(Codebook::builder(1, 4, 16).build(&old), Err(Error::UnsupportedDevice { .. })));
    assert!(matches!(RvqEncode::<f32, u32>::builder(&one).build(&old), Err(Error::UnsupportedDevice { .. })));
}

#[test]
fn bad_buffers_are_refused() {
    for device in TestDevice::all() {
        let case = Case { levels: 2, entries: 8, dim: 4, rows: 5, ..plain() };
        let problem = case.problem::<f32>();
        let (codebook, prepared) = prepare(&device, &case, &problem);
        let plan = RvqEncode::<f32, u32>::builder(&codebook).rows(5).build(&DeviceInfo::H200).unwrap();
        let input = Buffer::of(&device, &problem.input, 0);
        let mut codes = Buffer::<u32>::poisoned(&device, 10, 0);
        let mut distances = Buffer::<f32>::poisoned(&device, 9, 0);
        let stream = device.stream();
        let bytes = codebook.bytes() as usize;
        let short = plan.run(&stream, RvqEncodeArgs::new(input.input_of(19), prepared.input(), codes.output()));
        assert_eq!(short, Err(Error::Length { arg: "input", need: 20, got: 19 }));
        let short = plan.run(&stream, RvqEncodeArgs::new(input.input(), prepared.input_of(bytes - 1), codes.output()));
        assert_eq!(short, Err(Error::Length { arg: "codebook", need: codebook.bytes(), got: codebook.bytes() - 1 }));
        let short = plan.run(&stream, RvqEncodeArgs::new(input.input(), prepared.input(), codes.output_of(9)));
        assert_eq!(short, Err(Error::Length { arg: "codes", need: 10, got: 9 }));
        let mut args = RvqEncodeArgs::new(input.input(), prepared.input(), codes.output());
        args.distances = Some(distances.output());
        assert_eq!(plan.run(&stream, args), Err(Error::Length { arg: "distances", need: 10, got: 9 }));
        let mut args = RvqEncodeArgs::new(input.input(), prepared.input(), codes.output());
        args.projections = Some(Projections {
            in_weight: input.input(),
            in_bias: input.input(),
            out_weight: input.input(),
            out_bias: input.input(),
        });
        assert!(matches!(plan.run(&stream, args), Err(Error::Unsupported { arg: "projections", .. })));
        assert!(codes.read().iter().all(|&code| code == u32::MAX), "nothing is written");

        let padded = Buffer::of(&device, &vec![0u8; bytes + 1], 0);
        let off = plan.run(&stream, RvqEncodeArgs::new(input.input(), padded.input_from(1, bytes), codes.output()));
        let need = if device.is_host() { 4 } else { 256 };
        assert_eq!(off, Err(Error::Alignment { arg: "codebook", need }));
        let usage = Buffer::of(&device, &problem.usage, 0);
        let rows = Buffer::of(&device, &problem.source, 0);
        let mut memory = Buffer::<u8>::poisoned(&device, bytes, 0);
        let args =
            CodebookArgs { rows: rows.input(), usage: Some(usage.input()), prepared: memory.output(), flags: None };
        assert!(matches!(codebook.prepare(&stream, args), Err(Error::Unsupported { arg: "usage", .. })));
        let args = CodebookArgs { rows: rows.input(), usage: None, prepared: memory.output_of(bytes - 1), flags: None };
        assert!(matches!(codebook.prepare(&stream, args), Err(Error::Length { arg: "prepared", .. })));
    }
    let codebook = Codebook::builder(1, 4, 4).build(&DeviceInfo::H200).unwrap();
    let plan = RvqEncode::<f32, u32>::builder(&codebook).build(&DeviceInfo::H200).unwrap();
    // SAFETY: refused before anything is launched.
    let elsewhere = unsafe { In::<f32>::from_raw(4096, 4, 3) };
    let mut codes = [0u32; 1];
    let mixed = plan.run(&Stream::host(), RvqEncodeArgs::new(elsewhere, In::host(&[]), Out::host(&mut codes)));
    assert!(matches!(mixed, Err(Error::DeviceMismatch { arg: "input", .. })));
}

#[test]
fn plans_are_plain_data() {
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<Codebook>();
    plain::<RvqEncode<f32, u32>>();
    let codebook = |dim| Codebook::builder(2, 4, dim).build(&DeviceInfo::H200).unwrap();
    assert_eq!(codebook(4), codebook(4));
    assert_ne!(codebook(4), codebook(5));
    let plan = |rows| RvqEncode::<f32, u32>::builder(&codebook(4)).rows(rows).build(&DeviceInfo::H200).unwrap();
    assert_eq!(plan(4), plan(4));
    assert_ne!(plan(4), plan(5));
    assert_eq!(plan(4).workspace_bytes(), 0);
    let work = RvqEncode::<f32, u16>::builder(&codebook(4)).rows(10).build(&DeviceInfo::H200).unwrap().work();
    assert_eq!((work.distances, work.flops, work.bytes), (80, 640, 10 * 4 * 4 + 2 * 4 * 4 * 4 + 10 * 2 * 2));
}

#[test]
fn models_get_the_kernels_meant_for_them() {
    let device = DeviceInfo::H200;
    let schedule = |levels, entries, dim, rows| {
        let codebook = Codebook::builder(levels, entries, dim).build(&device).unwrap();
        RvqEncode::<f32, u32>::builder(&codebook).rows(rows).build(&device).unwrap().schedule()
    };
    let encodec = schedule(32, 1024, 128, 48_000);
    assert_eq!((encodec.kernel, encodec.sharers, encodec.blocks()), (EncodeKernel::Hopper, 4, 752));
    assert!(encodec.stages >= 2);
    let mimi = schedule(8, 2048, 256, 8000);
    assert_eq!((mimi.kernel, mimi.sharers, mimi.blocks()), (EncodeKernel::Hopper, 2, 126));
    let rqvae = schedule(4, 16_384, 256, 4096);
    assert_eq!((rqvae.kernel, rqvae.splits, rqvae.blocks()), (EncodeKernel::Hopper, 2, 128));
    let frame = schedule(8, 2048, 256, 1);
    assert_eq!((frame.kernel, frame.blocks(), frame.splits), (EncodeKernel::Stream, 16, 16));
    assert_eq!(schedule(1, 16_384, 8, 16_384).kernel, EncodeKernel::Hopper);
    assert_eq!(schedule(1, 16_384, 512, 4096).kernel, EncodeKernel::Portable);
}

/// What the emulator counts: that tensor cores filter, and that little is left to score.
#[cfg(feature = "emulate")]
mod work {
    use super::*;
    use nextscale::emulator::{self, Counters};

    fn count(case: &Case) -> Counters {
        let problem = case.problem::<f32>();
        let (codebook, prepared) = prepare(&TestDevice::Emulated, case, &problem);
        let plan = RvqEncode::<f32, u16>::builder(&codebook).levels(case.levels).rows(case.rows).variant(case.variant);
        let plan = plan.build(&DeviceInfo::H200).unwrap();
        let input = Buffer::of(&TestDevice::Emulated, &problem.input, 0);
        let mut codes = Buffer::<u16>::poisoned(&TestDevice::Emulated, case.rows * case.levels, 0);
        emulator::reset();
        let args = RvqEncodeArgs::new(input.input(), prepared.input(), codes.output());
        plan.run(&TestDevice::Emulated.stream(), args).unwrap();
        emulator::counters()
    }

    /// Bytes beside the operand that is streamed: rows, codes, scored rows, values.
    fn beside(counted: &Counters, streamed: u64) -> u64 {
        counted.global_load_bytes.checked_sub(streamed).expect("the operand is streamed whole")
    }

    #[test]
    fn products_filter_and_little_is_left() {
        // 128 rows, 4 tiles of 128 codes.
        for (dim, filter, operand) in [(64, Filter::Bf16, 96), (64, Filter::Bf16x3, 224), (8, Filter::Bf16x3, 32)] {
            for variant in [EncodeVariant::Portable, EncodeVariant::Hopper] {
                let of = |data| {
                    let case = Case { rows: 128, entries: 500, levels: 2, dim, filter, variant, data, ..plain() };
                    let counted = count(&case);
                    let flops = 2 * 2 * 128 * 512 * operand;
                    let (mma, wgmma) = if variant == EncodeVariant::Hopper { (0, flops) } else { (flops, 0) };
                    assert_eq!((counted.mma_bf16_flops, counted.wgmma_bf16_flops), (mma, wgmma), "{case:?}");
                    // Each block of 16 rows, or two together of 64, streams the operand of both levels.
                    let blocks = if variant == EncodeVariant::Hopper { 1 } else { 8 };
                    beside(&counted, blocks * 2 * 512 * operand * 2)
                };
                let (gaussian, scanned) = (of(Data::Gaussian), of(Data::Same));
                let every_code = 2 * 128 * 500 * dim as u64 * 4;
                assert!(scanned > every_code / 2, "codes that are all the same are scored, each: {scanned}");
                assert!(gaussian * 8 < every_code, "{gaussian} of {every_code} for {dim} dimensions, {variant:?}");
            }
        }
    }

    /// A cluster reads the searched rows once, however many rows it has.
    #[test]
    fn few_rows_read_the_codebook_once_a_cluster() {
        for (rows, clusters) in [(1, 1), (7, 7), (14, 7)] {
            let case = Case { rows, entries: 256, dim: 64, levels: 3, variant: EncodeVariant::Stream, ..plain() };
            let counted = count(&case);
            let streamed = clusters * 3 * 256 * 64 * 4;
            // Beside it each block reads its rows, and their winners' values at each level.
            let blocks = clusters * 8;
            assert_eq!(beside(&counted, streamed), blocks * (rows as u64).div_ceil(clusters) * 64 * 4 * (1 + 3));
            assert_eq!(counted.cluster_barriers, clusters * 4);
        }
    }
}

/// More than 2^31 elements between the first and the last of a buffer.
#[test]
fn offsets_are_64_bit() {
    if std::env::var_os("NXS_SMALL").is_some() {
        eprintln!("SKIPPED: NXS_SMALL is set, and this takes 8 GiB");
        return;
    }
    let far = (1i64 << 31) + 64;
    for device in TestDevice::kernels().into_iter().filter(|device| !device.is_emulated()) {
        let case = Case { rows: 2, levels: 2, entries: 200, dim: 16, ..plain() };
        let problem = case.problem::<bf16>();
        let expected = case.oracle(&problem, nearest);
        let (codebook, prepared) = prepare(&device, &case, &problem);
        let mut spread = vec![bf16::ZERO; far as usize + 16];
        spread[..16].copy_from_slice(&problem.input[..16]);
        spread[far as usize..].copy_from_slice(&problem.input[16..]);
        let input = Buffer::of(&device, &spread, 0);
        for variant in VARIANTS {
            let plan = RvqEncode::<bf16, u16>::builder(&codebook).rows(2).variant(variant);
            let plan = plan.input_strides([0, far, 1]).codes_strides([0, far, 1]).build(&DeviceInfo::H200).unwrap();
            let mut codes = Buffer::<u16>::poisoned(&device, far as usize + 2, 0);
            plan.run(&device.stream(), RvqEncodeArgs::new(input.input(), prepared.input(), codes.output())).unwrap();
            let codes = codes.read();
            let got = [0, 1, far as usize, far as usize + 1].map(|at| Some(u32::from(codes[at])));
            assert_eq!(got, expected.codes[..], "{variant:?}");
        }
    }
}

#[cfg(feature = "cudarc-0_19")]
mod cudarc {
    use super::*;

    fn gpus() -> Option<[TestDevice; 2]> {
        Some([TestDevice::cuda()?, TestDevice::cuda()?])
    }

    /// A captured graph replays to the same bits, with the input of the moment.
    #[test]
    fn graphs_replay() {
        let Some([device, _]) = gpus() else { return };
        let TestDevice::Cuda(stream) = device.clone() else { return };
        for variant in VARIANTS {
            let case = Case { rows: 100, entries: 600, variant, ..plain() };
            let problem = case.problem::<f32>();
            let (codebook, prepared) = prepare(&device, &case, &problem);
            let plan = RvqEncode::<f32, u32>::builder(&codebook).rows(100).variant(variant);
            let plan = plan.build(&DeviceInfo::of(&stream).unwrap()).unwrap();
            let mut input = Buffer::of(&device, &problem.input, 0);
            let mut codes = Buffer::<u32>::poisoned(&device, 300, 0);
            let mut eager = Buffer::<u32>::poisoned(&device, 300, 0);
            let run = |input: In<'_, f32>, codes: Out<'_, u32>| {
                plan.run(&stream, RvqEncodeArgs::new(input, prepared.input(), codes)).unwrap();
            };
            run(input.input(), eager.output()); // loads the code
            let graph = support::capture(&stream, || run(input.input(), codes.output()));
            for replay in 0..3 {
                let moved: Vec<f32> = problem.input.iter().map(|x| x + replay as f32).collect();
                input.write(&moved);
                graph.launch().unwrap();
                run(input.input(), eager.output());
                assert_eq!(codes.read(), eager.read());
            }
        }
    }

    /// Two streams at once give what one after the other gives.
    #[test]
    fn streams_do_not_disturb_each_other() {
        let Some(devices) = gpus() else { return };
        let case = Case { rows: 2000, entries: 600, dim: 64, ..plain() };
        let problem = case.problem::<f32>();
        let inputs: Vec<_> = devices
            .iter()
            .map(|device| (Buffer::of(device, &problem.input, 0), prepare(device, &case, &problem)))
            .collect();
        for variant in [EncodeVariant::Portable, EncodeVariant::Hopper] {
            let plan = RvqEncode::<f32, u32>::builder(&inputs[0].1.0).rows(2000).variant(variant);
            let plan = plan.build(&DeviceInfo::H200).unwrap();
            let mut all: Vec<_> = (0..8).map(|i| Buffer::<u32>::poisoned(&devices[i % 2], 6000, 0)).collect();
            devices.iter().for_each(TestDevice::sync);
            for (i, codes) in all.iter_mut().enumerate() {
                let (input, (_, prepared)) = &inputs[i % 2];
                let args = RvqEncodeArgs::new(input.input(), prepared.input(), codes.output());
                plan.run(&devices[i % 2].stream(), args).unwrap();
            }
            let expected = all[0].read();
            assert!(all.iter().all(|codes| codes.read() == expected));
        }
    }

    /// The shapes of models at full size, against the host: each row alone decides.
    #[test]
    fn models_agree_with_the_formula() {
        let Some([device, _]) = gpus() else { return };
        for (rows, levels, entries, dim, metric, data) in [
            (300, 8, 1024, 128, Metric::L2, Data::Gaussian),
            (200, 4, 2048, 256, Metric::L2, Data::Clusters),
            (70, 2, 16_384, 256, Metric::L2, Data::Gaussian),
            (2000, 1, 16_384, 8, Metric::CosineUnit { eps: 1e-12 }, Data::Gaussian),
            (500, 1, 8912, 32, Metric::CosineUnit { eps: 1e-12 }, Data::Clusters),
            (64, 4, 2048, 256, Metric::L2, Data::Gaussian),
            (5, 8, 2048, 256, Metric::L2, Data::Clusters),
        ] {
            for variant in [EncodeVariant::Auto, EncodeVariant::Portable] {
                check::<f32, u32>(&device, &Case { rows, levels, entries, dim, metric, data, variant, ..plain() });
            }
        }
    }
}
