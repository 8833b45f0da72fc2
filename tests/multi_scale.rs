//! Multi-scale quantizers on every device, against an oracle written here from dense resizing matrices in f64.

#![cfg(feature = "quantization")]

mod support;

use nextscale::dtype::Float;
use nextscale::quantization::{
    BIT_FLIP_DOMAIN, DecodeArgs, EncodeArgs, EncodeBitsArgs, FHat, FlipArgs, MultiScale, MultiScaleBuilder, Next,
    PhiTable, StepArgs, Token, TokenKind, Traffic, Up, pack_phi, schedules,
};
use nextscale::{DeviceInfo, Error, In, Out, Result, Stream, bf16, f16, philox};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, TestDevice, poison, rounding};

/// How a step is given the map.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Maps {
    InPlace,
    Turns,
}

#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    channels: usize,
    /// Token grids, the last of the map's size.
    schedule: Vec<(usize, usize)>,
    patch: usize,
    entries: usize,
    /// Which phi each scale has.
    phi: Option<Vec<u8>>,
    last_phi: bool,
    up: Up,
    next: Next,
    repeat: usize,
    maps: Maps,
    /// Elements by which buffers start off their alignment: tokens, map, next.
    shift: [usize; 3],
    /// The plan is one for so little shared memory.
    shared: Option<i32>,
    /// The plan is one for a device without clusters.
    alone: bool,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let scales = prop::collection::vec((1..12usize, 1..12usize), 0..4);
    let what = (1..4usize, prop_oneof![1..14usize, Just(32)], scales, (1..13usize, 1..13usize), 1..30usize);
    let how = (
        prop_oneof![Just(None), prop::collection::vec(0..3u8, 4).prop_map(Some)],
        any::<bool>(),
        prop_oneof![Just(Up::Bicubic), Just(Up::Bilinear)],
        prop_oneof![3 => Just(Next::Area), 2 => Just(Next::Bilinear), 1 => Just(Next::Tokens)],
        1..3usize,
        prop_oneof![Just(Maps::InPlace), Just(Maps::Turns)],
        prop_oneof![2 => Just([0; 3]), 1 => [0..5usize, 0..5usize, 0..5usize]],
    );
    let rest = (
        prop_oneof![2 => Just(1usize), 1 => Just(2)],
        prop_oneof![3 => Just(None), 1 => Just(Some(8000))],
        any::<bool>(),
        any::<u64>(),
    );
    (what, how, rest).prop_map(|(what, how, (patch, shared, alone, seed))| {
        let (batch, channels, mut schedule, size, entries) = what;
        let (phi, last_phi, up, next, repeat, maps, shift) = how;
        schedule.iter_mut().for_each(|(h, w)| (*h, *w) = ((*h).min(size.0), (*w).min(size.1)));
        schedule.push(size);
        let phi = phi.filter(|_| next != Next::Tokens).map(|phis| phis[..schedule.len()].to_vec());
        Case {
            batch,
            channels,
            schedule,
            patch,
            entries,
            phi,
            last_phi,
            up,
            next,
            repeat,
            maps,
            shift,
            shared,
            alone,
            seed,
        }
    })
}

/// Rows of `to` times `from` weights.
type Matrix = Vec<Vec<f64>>;

/// PyTorch's conventions, written out once more.
fn matrix(how: &str, from: usize, to: usize) -> Matrix {
    let mut rows = vec![vec![0.0; from]; to];
    for (i, row) in rows.iter_mut().enumerate() {
        let mut put = |at: i64, weight: f64| row[at.clamp(0, from as i64 - 1) as usize] += weight;
        let source = (2 * i as i64 + 1) * from as i64 - to as i64; // in units of 1 / (2 to)
        let unit = 2 * to as i64;
        match how {
            "area" => {
                let (begin, end) = (i * from / to, ((i + 1) * from).div_ceil(to));
                (begin..end).for_each(|at| put(at as i64, 1.0 / (end - begin) as f64));
            }
            "bilinear" => {
                let source = source.max(0);
                let t = (source % unit) as f64 / unit as f64;
                put(source / unit, 1.0 - t);
                put(source / unit + 1, t);
            }
            _ => {
                let (first, t) = (source.div_euclid(unit), source.rem_euclid(unit) as f64 / unit as f64);
                for tap in -1..3i64 {
                    let x = (tap as f64 - t).abs();
                    // Keys's kernel with a = -0.75.
                    let weight = if x <= 1.0 {
                        1.25 * x * x * x - 2.25 * x * x + 1.0
                    } else {
                        -0.75 * (x * x * x - 5.0 * x * x + 8.0 * x - 4.0)
                    };
                    put(first + tap, weight);
                }
            }
        }
    }
    rows
}

/// One channel, `[height][width]`.
type Plane = Vec<Vec<f64>>;

fn resized(plane: &Plane, how: &str, to: (usize, usize)) -> Plane {
    let (rows, columns) = (matrix(how, plane.len(), to.0), matrix(how, plane[0].len(), to.1));
    let across: Plane = plane
        .iter()
        .map(|line| columns.iter().map(|w| w.iter().zip(line).map(|(w, v)| w * v).sum()).collect())
        .collect();
    rows.iter().map(|w| (0..to.1).map(|x| w.iter().zip(&across).map(|(w, line)| w * line[x]).sum()).collect()).collect()
}

/// Tokens of one type.
trait Make: Token {
    fn make(rng: &mut StdRng, entries: usize) -> Self;
}
macro_rules! make {
    ($($type:ty => |$rng:ident, $entries:ident| $value:expr;)*) => {$(
        impl Make for $type {
            fn make($rng: &mut StdRng, $entries: usize) -> Self { $value }
        }
    )*};
}
make! {
    u16 => |rng, entries| rng.random_range(0..entries) as u16;
    u32 => |rng, entries| rng.random_range(0..entries) as u32;
    i64 => |rng, entries| rng.random_range(0..entries) as i64;
    f32 => |rng, _entries| rng.random_range(-1.0..1.0f32);
    f16 => |rng, _entries| f16::from_f32(rng.random_range(-1.0..1.0f32));
    bf16 => |rng, _entries| bf16::from_f32(rng.random_range(-1.0..1.0f32));
    u8 => |rng, _entries| rng.random_range(0..2u8) * rng.random_range(1..4u8);
}

/// A case with its data.
struct Problem<T> {
    tokens: Vec<T>,
    codebook: Vec<f32>,
    weights: Vec<f32>,
    biases: Vec<f32>,
    ratio: f32,
    packed: Vec<f32>,
}

impl Case {
    fn size(&self) -> (usize, usize) {
        let (h, w) = *self.schedule.last().unwrap();
        (h * self.patch, w * self.patch)
    }

    fn width(&self) -> usize {
        self.channels * self.patch * self.patch
    }

    fn image(&self) -> usize {
        let (h, w) = self.size();
        self.channels * h * w
    }

    /// Tokens before scale `s`.
    fn first(&self, s: usize) -> usize {
        self.schedule[..s].iter().map(|(h, w)| h * w).sum()
    }

    fn elements<T: Token>(&self) -> usize {
        if T::KIND == TokenKind::Codes { 1 } else { self.width() }
    }

    fn phis(&self) -> usize {
        self.phi.as_ref().map_or(0, |table| *table.iter().max().unwrap() as usize + 1)
    }

    fn problem<T: Make>(&self) -> Problem<T> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let count = self.batch * self.first(self.schedule.len()) * self.elements::<T>();
        let tokens = (0..count).map(|_| T::make(&mut rng, self.entries)).collect();
        let mut floats = |n: usize, most: f32| (0..n).map(|_| rng.random_range(-most..most)).collect::<Vec<f32>>();
        let codebook = floats(self.entries * self.channels, 1.0);
        let spread = (3.0 / (9 * self.channels) as f32).sqrt();
        let weights = floats(self.phis() * self.channels * self.channels * 9, spread);
        let biases = floats(self.phis() * self.channels, 0.2);
        let packed = if self.phi.is_some() { pack_phi(self.channels, &weights, &biases, 0.5).unwrap() } else { vec![] };
        Problem { tokens, codebook, weights, biases, ratio: 0.5, packed }
    }

    fn builder<T: Token, O: Float>(&self) -> MultiScaleBuilder<T, O> {
        let mut builder = MultiScale::builder(self.channels, self.size(), &self.schedule)
            .batch(self.batch)
            .entries(self.entries)
            .last_phi(self.last_phi)
            .up(self.up)
            .next(self.next)
            .repeat(self.repeat)
            .patch(self.patch);
        if let Some(table) = &self.phi {
            builder = builder.phi(PhiTable::new(table).unwrap());
        }
        builder
    }

    fn plan<T: Token, O: Float>(&self) -> MultiScale<T, O> {
        let mut device = DeviceInfo::H200;
        device.smem_per_block = self.shared.unwrap_or(device.smem_per_block);
        if self.alone {
            device.arch = DeviceInfo::A100.arch;
        }
        // Where that is too little, the device's.
        let built = self.builder().build(&device);
        built.unwrap_or_else(|_| self.builder().build(&DeviceInfo::H200).unwrap())
    }

    /// The map of a scale's tokens.
    fn grid<T: Token>(&self, problem: &Problem<T>, b: usize, s: usize) -> Vec<Plane> {
        let (h, w) = self.schedule[s];
        let first = b * self.first(self.schedule.len()) + self.first(s);
        let at = |c: usize, y: usize, x: usize| {
            let (p, token) = (self.patch, first + y / self.patch * w + x / self.patch);
            let element = (c * p + y % p) * p + x % p;
            f64::from(match T::KIND {
                TokenKind::Codes => problem.codebook[problem.tokens[token].code() as usize * self.channels + c],
                TokenKind::Embeddings => problem.tokens[token * self.width() + element].value(),
                TokenKind::Bits => {
                    let bit = problem.tokens[token * self.width() + element].value();
                    (2.0 * bit - 1.0) * (1.0 / (self.channels as f64).sqrt()) as f32
                }
            })
        };
        let plane = |c| (0..h * self.patch).map(|y| (0..w * self.patch).map(|x| at(c, y, x)).collect()).collect();
        (0..self.channels).map(plane).collect()
    }

    fn up_name(&self) -> &'static str {
        if self.up == Up::Bicubic { "bicubic" } else { "bilinear" }
    }

    /// What scale `s` adds to the map of image `b`.
    fn added<T: Token>(&self, problem: &Problem<T>, b: usize, s: usize) -> Vec<Plane> {
        let h: Vec<Plane> =
            self.grid(problem, b, s).iter().map(|plane| resized(plane, self.up_name(), self.size())).collect();
        let last = s + 1 == self.schedule.len();
        match &self.phi {
            Some(table) if self.last_phi || !last => {
                let (n, phi, (height, width)) = (self.channels, table[s] as usize, self.size());
                let ratio = f64::from(problem.ratio);
                let convolved = |out: usize, y: usize, x: usize| {
                    let mut sum = f64::from(problem.biases[phi * n + out]);
                    for (input, plane) in h.iter().enumerate() {
                        for tap in 0..9 {
                            let (y, x) = ((y + tap / 3).wrapping_sub(1), (x + tap % 3).wrapping_sub(1));
                            if y < height && x < width {
                                let weight = problem.weights[((phi * n + out) * n + input) * 9 + tap];
                                sum += f64::from(weight) * plane[y][x];
                            }
                        }
                    }
                    (1.0 - ratio) * h[out][y][x] + ratio * sum
                };
                let plane = |c| (0..height).map(|y| (0..width).map(|x| convolved(c, y, x)).collect()).collect();
                (0..n).map(plane).collect()
            }
            _ => h,
        }
    }

    /// The maps after each scale and the inputs of the scales after it, of image `b`: token-major.
    fn chain<T: Token>(&self, problem: &Problem<T>, b: usize) -> Vec<Made> {
        let (height, width) = self.size();
        let mut map = vec![vec![vec![0.0; width]; height]; self.channels];
        let mut all = Vec::new();
        for s in 0..self.schedule.len() {
            let added = self.added(problem, b, s);
            if self.next == Next::Tokens {
                map = added;
            } else {
                for (old, new) in map.iter_mut().flatten().flatten().zip(added.iter().flatten().flatten()) {
                    *old += new;
                }
            }
            let next = self.schedule.get(s + 1).map_or(vec![], |&(h, w)| {
                let to = (h * self.patch, w * self.patch);
                let made: Vec<Plane> = match self.next {
                    Next::Area => map.iter().map(|plane| resized(plane, "area", to)).collect(),
                    Next::Bilinear => map.iter().map(|plane| resized(plane, "bilinear", to)).collect(),
                    Next::Tokens => {
                        self.grid(problem, b, s).iter().map(|plane| resized(plane, self.up_name(), to)).collect()
                    }
                };
                token_major(&made, self.patch)
            });
            all.push((map.iter().flatten().flatten().copied().collect(), next));
        }
        all
    }
}

/// `[tokens, width]` of a map.
fn token_major(map: &[Plane], patch: usize) -> Vec<f64> {
    let (height, width, elements) = (map[0].len(), map[0][0].len(), map.len() * patch * patch);
    let mut tokens = vec![f64::NAN; height * width * map.len()];
    for (c, plane) in map.iter().enumerate() {
        for (y, line) in plane.iter().enumerate() {
            for (x, &value) in line.iter().enumerate() {
                let token = y / patch * (width / patch) + x / patch;
                tokens[token * elements + (c * patch + y % patch) * patch + x % patch] = value;
            }
        }
    }
    tokens
}

/// The bound of the documentation, and the rounding to `O`.
fn close<O: Float>(what: &str, actual: &[O], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let most = expected.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let error = (f64::from(actual.to_f32()) - expected).abs();
        let bound = 2e-6 * most + if size_of::<O>() < 4 { rounding::<O>(expected.abs() + 2e-6 * most) } else { 0.0 };
        assert!(error <= bound + 1e-37, "{what}, element {i}: {actual:?} instead of {expected}, most {most}");
    }
}

/// The map after a scale, and the input of the next.
type Made = (Vec<f64>, Vec<f64>);

/// The buffers of all steps of a case.
struct Buffers<T, O> {
    tokens: Vec<Buffer<T>>,
    codebook: Buffer<f32>,
    phi: Buffer<f32>,
    maps: [Buffer<f32>; 2],
    next: Vec<Buffer<O>>,
}

impl<T: Make, O: Float> Buffers<T, O> {
    fn new(device: &TestDevice, case: &Case, problem: &Problem<T>) -> Self {
        let (elements, all) = (case.elements::<T>(), case.first(case.schedule.len()));
        let of_scale = |s: usize| {
            let (first, count) = (case.first(s), case.schedule[s].0 * case.schedule[s].1);
            let of_image = |b: usize| &problem.tokens[(b * all + first) * elements..][..count * elements];
            let tokens: Vec<T> = (0..case.batch).flat_map(of_image).copied().collect();
            Buffer::of(device, &tokens, case.shift[0])
        };
        let map = || Buffer::poisoned(device, case.batch * case.image(), case.shift[1]);
        let next = |s: usize| {
            let (h, w) = case.schedule[s];
            Buffer::poisoned(device, case.repeat * case.batch * h * w * case.width(), case.shift[2])
        };
        Buffers {
            tokens: (0..case.schedule.len()).map(of_scale).collect(),
            codebook: Buffer::of(device, &problem.codebook, case.shift[0]),
            phi: Buffer::of(device, &problem.packed, 0),
            maps: [map(), map()],
            next: (1..case.schedule.len()).map(next).collect(),
        }
    }

    /// Step `s`; the map is then in `maps[written(s)]`.
    fn step(&mut self, device: &TestDevice, case: &Case, plan: &MultiScale<T, O>, s: usize) -> Result<()> {
        let [first, second] = &mut self.maps;
        let f_hat = match (case.maps, s) {
            (_, 0) => FHat::FromZero(first.output()),
            (Maps::InPlace, _) => FHat::InPlace(first.output()),
            (Maps::Turns, s) if s % 2 == 1 => FHat::Between(first.input(), second.output()),
            _ => FHat::Between(second.input(), first.output()),
        };
        plan.step(
            &device.stream(),
            StepArgs {
                scale: s,
                tokens: self.tokens[s].input(),
                codebook: (T::KIND == TokenKind::Codes).then(|| self.codebook.input()),
                phi: case.phi.is_some().then(|| self.phi.input()),
                f_hat: Some(f_hat),
                next: self.next.get_mut(s).map(|next| next.output()),
                flags: None,
            },
        )
    }

    fn written(case: &Case, s: usize) -> usize {
        if case.maps == Maps::Turns { s % 2 } else { 0 }
    }
}

/// All steps of a case, then its decodes.
fn check<T: Make, O: Float>(device: &TestDevice, case: &Case) {
    let problem = case.problem::<T>();
    let expected: Vec<_> = (0..case.batch).map(|b| case.chain(&problem, b)).collect();
    let of = |s: usize, part: fn(&Made) -> &Vec<f64>| -> Vec<f64> {
        expected.iter().flat_map(|image| part(&image[s])).copied().collect()
    };
    let plan = case.plan::<T, O>();
    let mut buffers = Buffers::<T, O>::new(device, case, &problem);
    let last = case.schedule.len() - 1;
    for s in 0..=last {
        buffers.step(device, case, &plan, s).unwrap();
        if case.next != Next::Tokens || s == last {
            let map = buffers.maps[Buffers::<T, O>::written(case, s)].read();
            close(&format!("map after scale {s}"), &map, &of(s, |(map, _)| map));
        }
        if s < last {
            let next = of(s, |(_, next)| next);
            let made = buffers.next[s].read();
            for repeat in made.chunks(made.len() / case.repeat) {
                close(&format!("input of scale {}", s + 1), repeat, &next);
            }
        }
    }

    let tokens = Buffer::of(device, &problem.tokens, case.shift[0]);
    let decode = |prefixes: bool, with_next: bool| {
        let maps = if prefixes { last + 1 } else { 1 };
        let mut f_hat = Buffer::<f32>::poisoned(device, maps * case.batch * case.image(), case.shift[1]);
        let inputs = case.first(last + 1) - case.first(1);
        let mut next = Buffer::<O>::poisoned(device, case.batch * inputs * case.width(), case.shift[2]);
        plan.decode(
            &device.stream(),
            DecodeArgs {
                tokens: tokens.input(),
                codebook: (T::KIND == TokenKind::Codes).then(|| buffers.codebook.input()),
                phi: case.phi.is_some().then(|| buffers.phi.input()),
                f_hat: f_hat.output(),
                prefixes,
                next: with_next.then(|| next.output()),
                flags: None,
            },
        )
        .unwrap();
        (f_hat.read(), next.read())
    };
    close("decoded", &decode(false, false).0, &of(last, |(map, _)| map));
    let prefixes = decode(true, false).0;
    for (s, map) in prefixes.chunks(case.batch * case.image()).enumerate() {
        close(&format!("prefix {s}"), map, &of(s, |(map, _)| map));
    }
    let (map, next) = decode(false, true);
    close("decoded with inputs", &map, &of(last, |(map, _)| map));
    let forced: Vec<f64> = expected.iter().flat_map(|image| image.iter().flat_map(|(_, next)| next)).copied().collect();
    close("inputs", &next, &forced);
}

const TOKENS: usize = 7;

fn check_any(device: &TestDevice, case: &Case, types: usize) {
    fn with_next<T: Make>(device: &TestDevice, case: &Case, next: usize) {
        match next {
            0 => check::<T, f32>(device, case),
            1 => check::<T, f16>(device, case),
            _ => check::<T, bf16>(device, case),
        }
    }
    let case = Case { patch: if types / 3 < 3 { 1 } else { case.patch }, ..case.clone() };
    match types / 3 {
        0 => with_next::<u16>(device, &case, types % 3),
        1 => with_next::<u32>(device, &case, types % 3),
        2 => with_next::<i64>(device, &case, types % 3),
        3 => with_next::<f32>(device, &case, types % 3),
        4 => with_next::<f16>(device, &case, types % 3),
        5 => with_next::<bf16>(device, &case, types % 3),
        _ => with_next::<u8>(device, &case, types % 3),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases(), ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_the_formula(case in case(), types in 0..3 * TOKENS) {
        check_any(&TestDevice::Host, &case, types);
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
            .run(&(case(), 0..3 * TOKENS), |(case, types)| {
                check_any(&device, &case, types);
                Ok(())
            })
            .unwrap();
    }
}

fn plain() -> Case {
    Case {
        batch: 2,
        channels: 8,
        schedule: vec![(1, 1), (2, 3), (4, 4), (7, 5)],
        patch: 1,
        entries: 20,
        phi: Some(vec![0, 1, 1, 0]),
        last_phi: true,
        up: Up::Bicubic,
        next: Next::Area,
        repeat: 1,
        maps: Maps::InPlace,
        shift: [0; 3],
        shared: None,
        alone: false,
        seed: 1,
    }
}

/// VAR's own shapes: ten scales, phi table and all, and HART's last scale without one.
#[test]
fn var_256_on_every_device_at_the_edges() {
    for device in TestDevice::all() {
        for last_phi in [true, false] {
            let case = Case {
                batch: if device.is_emulated() { 1 } else { 2 },
                channels: 32,
                schedule: schedules::square(&schedules::VAR_256),
                entries: 512,
                phi: Some(vec![0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
                last_phi,
                repeat: 2,
                ..plain()
            };
            check::<u16, bf16>(&device, &case);
            if device.is_emulated() {
                break;
            }
        }
    }
}

/// Infinity's, with and without its patches.
#[test]
fn infinity_on_every_device_at_the_edges() {
    for device in TestDevice::all() {
        for (patch, maps) in [(1, Maps::Turns), (2, Maps::Turns), (1, Maps::InPlace)] {
            let case = Case {
                batch: 1,
                channels: 16,
                schedule: schedules::square(&schedules::INFINITY_0_06M[..if patch == 2 { 5 } else { 7 }]),
                phi: None,
                up: Up::Bilinear,
                next: Next::Bilinear,
                patch,
                maps,
                ..plain()
            };
            check::<u8, bf16>(&device, &case);
        }
    }
}

/// Maps of one pixel, one row, one column, one channel; and one that comes in bands.
#[test]
fn edges() {
    for device in TestDevice::all() {
        for (types, schedule) in [
            (0, vec![(1, 1)]),
            (4, vec![(1, 1), (1, 9)]),
            (8, vec![(1, 1), (9, 1)]),
            (20, vec![(2, 1), (3, 1), (33, 3)]),
            (9, vec![(5, 40), (9, 70)]),
        ] {
            for (channels, next) in [(1, Next::Area), (5, Next::Area), (4, Next::Bilinear), (3, Next::Tokens)] {
                for shared in [None, Some(12_000)] {
                    let phi = (next == Next::Area).then(|| vec![0; schedule.len()]);
                    let case = Case { channels, next, phi, schedule: schedule.clone(), shared, ..plain() };
                    check_any(&device, &case, types);
                    check_any(&device, &Case { maps: Maps::Turns, phi: None, patch: 2, ..case }, types);
                }
            }
        }
    }
}

/// Maps that come in bands, scale after scale, with and without a phi, and what is not kept in shared memory.
#[test]
fn bands_on_every_device_at_the_edges() {
    for device in TestDevice::all() {
        let schedule = vec![(2, 2), (5, 6), (20, 5), (21, 6)];
        let cuts = [
            (10_800, true, true, true),
            (10_800, false, true, false),
            (8_800, true, true, false),
            (60_000, true, false, true),
            (60_000, false, false, true),
        ];
        for (shared, alone, bands, kept) in cuts {
            let case = Case {
                channels: 4,
                schedule: schedule.clone(),
                shared: Some(shared),
                alone,
                last_phi: false,
                ..plain()
            };
            let cut = case.plan::<f32, f32>().cut();
            assert_eq!((cut.band < 21, cut.plane_shared), (bands, kept), "{cut:?}");
            // Where blocks can make a cluster, they share the bands.
            assert_eq!(cut.blocks > 1, bands && !alone, "{cut:?}");
            assert!(cut.shared_bytes <= shared as u64);
            check::<f32, f32>(&device, &case);
            check::<u16, bf16>(&device, &Case { last_phi: true, ..case.clone() });
            let phi = None;
            let case = Case { phi, up: Up::Bilinear, next: Next::Bilinear, ..case };
            assert_eq!(case.plan::<u8, f16>().cut().blocks, if alone { 1 } else { 2 });
            check::<u8, f16>(&device, &case);
        }
    }
}

/// The weights of PyTorch's bicubic resizing, to the digits that it prints; and the windows of its adaptive average.
#[test]
fn known_answers() {
    fn map_of(device: &TestDevice, row: &[f32], to: usize, last: &[f32]) -> Vec<f32> {
        let tokens = [row, last].map(|row| Buffer::of(device, row, 0));
        let plan = MultiScale::<f32, f32>::builder(1, (1, to), &[(1, row.len()), (1, to)]);
        let plan = plan.build(&DeviceInfo::H200).unwrap();
        let mut map = Buffer::<f32>::poisoned(device, to, 0);
        plan.step(
            &device.stream(),
            StepArgs {
                scale: 0,
                tokens: tokens[0].input(),
                codebook: None,
                phi: None,
                f_hat: Some(FHat::FromZero(map.output())),
                next: None,
                flags: None,
            },
        )
        .unwrap();
        map.read()
    }
    for device in TestDevice::all() {
        let weights = |from: usize, to: usize, place: usize, first: usize| -> Vec<f32> {
            let at = |tap: usize| {
                let mut impulse = vec![0f32; from];
                impulse[first + tap] = 1.0;
                map_of(&device, &impulse, to, &vec![0.0; to])[place]
            };
            (0..4).map(at).collect()
        };
        assert_eq!(weights(8, 12, 4, 1), [-0.09375, 0.59375, 0.59375, -0.09375]);
        for (got, want) in weights(10, 16, 6, 2).iter().zip([-0.080_749_51f32, 0.510_559_1, 0.674_011_2, -0.103_820_8])
        {
            assert!((got - want).abs() < 1e-7, "{got} {want}");
        }

        // 16 to 13: (0, 2) (1, 3) (2, 4) (3, 5) (4, 7) (6, 8) ... (14, 16).
        let ramp: Vec<f32> = (0..16).map(|x| (x * x) as f32).collect();
        let tokens = Buffer::of(&device, &ramp, 0);
        let plan = MultiScale::<f32, f32>::builder(1, (1, 16), &[(1, 16), (1, 13), (1, 16)]);
        let plan = plan.build(&DeviceInfo::H200).unwrap();
        let mut map = Buffer::<f32>::poisoned(&device, 16, 0);
        let mut next = Buffer::<f32>::poisoned(&device, 13, 0);
        plan.step(
            &device.stream(),
            StepArgs {
                scale: 0,
                tokens: tokens.input(),
                codebook: None,
                phi: None,
                f_hat: Some(FHat::FromZero(map.output())),
                next: Some(next.output()),
                flags: None,
            },
        )
        .unwrap();
        assert_eq!(map.read(), ramp, "a scale of the map's size is a copy");
        let windows = [(0, 2), (1, 3), (2, 4), (3, 5), (4, 7), (6, 8), (7, 9), (8, 10), (9, 12), (11, 13), (12, 14)];
        let mean = |(from, to): (usize, usize)| ramp[from..to].iter().sum::<f32>() / (to - from) as f32;
        let windows = windows.into_iter().chain([(13, 15), (14, 16)]).map(mean);
        for (got, want) in next.read().iter().zip(windows) {
            assert!((got - want).abs() <= want * 1e-6, "{got} {want}");
        }
    }
}

/// The oracle must be able to fail: what another convention gives is outside the bound.
#[test]
fn another_convention_is_caught() {
    let case = plain();
    let problem = case.problem::<u32>();
    let right = case.chain(&problem, 0);
    let map: Vec<f32> = right[3].0.iter().map(|&x| x as f32).collect();
    close("rounded", &map, &right[3].0);
    let others = [
        Case { up: Up::Bilinear, ..case.clone() },
        Case { last_phi: false, ..case.clone() },
        Case { phi: Some(vec![0, 0, 1, 0]), ..case.clone() },
        Case { schedule: vec![(1, 1), (3, 2), (4, 4), (7, 5)], ..case.clone() },
    ];
    for other in others {
        let expected = other.chain(&problem, 0)[3].0.clone();
        let caught = std::panic::catch_unwind(|| close("other", &map, &expected));
        assert!(caught.is_err(), "{other:?}");
    }
    let nexts = |case: &Case| case.chain(&problem, 0)[1].1.clone();
    let next: Vec<f32> = nexts(&case).iter().map(|&x| x as f32).collect();
    let other = nexts(&Case { next: Next::Bilinear, ..case.clone() });
    assert!(std::panic::catch_unwind(|| close("other", &next, &other)).is_err());
}

/// The same bits again, in any batch, from any cut of the work, and by decoding; NaN stays in its image.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for device in TestDevice::all() {
        for (phi, next) in [(Some(vec![0, 1, 1, 0]), Next::Area), (None, Next::Bilinear)] {
            let case = Case { batch: 3, phi, next, channels: 12, ..plain() };
            let run = |case: &Case, problem: &Problem<f32>| {
                let plan = case.plan::<f32, f32>();
                let mut buffers = Buffers::<f32, f32>::new(&device, case, problem);
                (0..4).for_each(|s| buffers.step(&device, case, &plan, s).unwrap());
                let bits = |values: Vec<f32>| values.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
                let next: Vec<u32> = buffers.next.iter().map(Buffer::read).flat_map(bits).collect();
                (bits(buffers.maps[Buffers::<f32, f32>::written(case, 3)].read()), next)
            };
            let mut problem = case.problem::<f32>();
            let all = run(&case, &problem);
            assert_eq!(run(&case, &problem), all);
            assert_eq!(run(&Case { shared: Some(16_000), ..case.clone() }, &problem), all, "another cut");
            assert_eq!(run(&Case { alone: true, ..case.clone() }, &problem), all, "without clusters");
            let plain = case.builder::<f32, f32>().programmatic(false).build(&DeviceInfo::H200).unwrap();
            let mut buffers = Buffers::<f32, f32>::new(&device, &case, &problem);
            (0..4).for_each(|s| buffers.step(&device, &case, &plain, s).unwrap());
            let map: Vec<u32> = buffers.maps[0].read().iter().map(|x| x.to_bits()).collect();
            assert_eq!(map, all.0, "another way to launch");
            let one = Case { batch: 1, ..case.clone() };
            let per_image = problem.tokens.len() / 3;
            let middle = Problem { tokens: problem.tokens[per_image..2 * per_image].to_vec(), ..case.problem() };
            assert_eq!(run(&one, &middle).0, all.0[case.image()..2 * case.image()]);

            problem.tokens[per_image] = f32::NAN;
            problem.tokens[2 * per_image - 1] = f32::INFINITY;
            let spoiled = run(&case, &problem);
            for b in [0, 2] {
                let image = b * case.image()..(b + 1) * case.image();
                assert_eq!(spoiled.0[image.clone()], all.0[image]);
            }
            assert!(spoiled.0[case.image()..2 * case.image()].iter().any(|&x| f32::from_bits(x).is_nan()));
        }
    }
}

#[test]
fn codes_out_of_range() {
    for device in TestDevice::all() {
        let case = Case { phi: None, ..plain() };
        let mut problem = case.problem::<i64>();
        let plan = case.plan::<i64, f32>();
        problem.tokens[0] = -3;
        problem.tokens[1] = i64::MAX;
        let tokens = Buffer::of(&device, &problem.tokens, 0);
        let codebook = Buffer::of(&device, &problem.codebook, 0);
        let mut f_hat = Buffer::<f32>::poisoned(&device, 2 * case.image(), 0);
        let mut flags = Buffer::of(&device, &[0x100u32], 0);
        let ran = plan.decode(
            &device.stream(),
            DecodeArgs {
                tokens: tokens.input(),
                codebook: Some(codebook.input()),
                phi: None,
                f_hat: f_hat.output(),
                prefixes: false,
                next: None,
                flags: Some(flags.output()),
            },
        );
        if device.is_host() {
            assert_eq!(ran, Err(Error::CodeOutOfRange { arg: "tokens", at: 0, code: -3, entries: 20 }));
            assert!(f_hat.read().iter().all(|x| x.to_bits() == poison::<f32>().to_bits()));
            continue;
        }
        ran.unwrap();
        assert_eq!(flags.read(), [0x100 | MultiScale::<i64, f32>::CODE_CLAMPED]);
        (problem.tokens[0], problem.tokens[1]) = (0, 19);
        let expected: Vec<f64> = (0..2).flat_map(|b| case.chain(&problem, b)[3].0.clone()).collect();
        close("clamped", &f_hat.read(), &expected);
    }
}

#[test]
fn bad_plans_are_refused() {
    let plan = |b: MultiScaleBuilder<u16, f32>| b.build(&DeviceInfo::H200).map(|_| ());
    let builder = || MultiScale::<u16, f32>::builder(32, (16, 16), &[(1, 1), (16, 16)]).entries(10);
    assert_eq!(plan(builder()), Ok(()));
    let size = |result: Result<()>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{name}: {result:?}");
    };
    let unsupported = |result: Result<()>, name: &str| {
        assert!(matches!(result, Err(Error::Unsupported { arg, .. }) if arg == name), "{name}: {result:?}");
    };
    let of = |channels, size, schedule: &[(usize, usize)]| {
        plan(MultiScale::<u16, f32>::builder(channels, size, schedule).entries(10))
    };
    size(of(0, (4, 4), &[(4, 4)]), "channels");
    size(of(257, (4, 4), &[(4, 4)]), "channels");
    size(of(4, (0, 4), &[(0, 4)]), "height");
    size(of(4, (4, 1025), &[(4, 1025)]), "width");
    size(of(4, (4, 4), &[]), "scales");
    size(of(4, (4, 4), &[(1, 1); 33]), "scales");
    size(of(4, (4, 4), &[(0, 1), (4, 4)]), "scale height");
    size(of(4, (4, 4), &[(5, 1), (4, 4)]), "scale height");
    size(of(4, (4, 4), &[(4, 5), (4, 4)]), "scale width");
    size(of(4, (4, 4), &[(1, 1), (3, 4)]), "last_scale height");
    size(of(4, (4, 4), &[(1, 1), (4, 3)]), "last_scale width");
    size(plan(builder().entries(0)), "entries");
    size(plan(builder().entries(1 << 31)), "entries");
    size(plan(builder().batch(65_536)), "batch");
    size(plan(builder().repeat(3)), "repeat");
    size(plan(builder().repeat(0)), "repeat");
    size(plan(builder().patch(3)), "patch");
    size(plan(builder().phi(PhiTable::shared(3))), "phi table");
    size(PhiTable::new(&[128]).map(|_| ()), "phi table");
    unsupported(plan(builder().next(Next::Tokens).phi(PhiTable::shared(2))), "phi");
    unsupported(plan(builder().bit_scale(f32::NAN)), "bit_scale");
    let patched = MultiScale::<u16, f32>::builder(4, (4, 4), &[(2, 2)]).entries(10).patch(2);
    unsupported(plan(patched), "patch");
    let large = MultiScale::<u16, f32>::builder(128, (64, 1024), &[(64, 1024)]).entries(10).phi(PhiTable::shared(1));
    unsupported(plan(large), "channels");
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder().build(&old), Err(Error::UnsupportedDevice { .. })));
    for (table, scales) in [(PhiTable::var_10(), 10), (PhiTable::var_14(), 14), (PhiTable::var_8(), 8)] {
        assert_eq!(table.phis(), 4);
        let sides: Vec<usize> = (1..=scales).collect();
        let plan = MultiScale::<u16, f32>::builder(32, (scales, scales), &schedules::square(&sides));
        plan.entries(10).phi(table).build(&DeviceInfo::A100).unwrap();
    }
}

#[test]
fn bad_calls_are_refused_before_anything_is_written() {
    for device in TestDevice::all() {
        let case = plain();
        let problem = case.problem::<u16>();
        let plan = case.plan::<u16, f32>();
        let mut buffers = Buffers::<u16, f32>::new(&device, &case, &problem);
        let stream = device.stream();
        let image = 2 * case.image();
        // Lengths of tokens, codebook, phi, map and next; usize::MAX: none is given.
        let mut run = |scale: usize, lens: [usize; 5]| {
            let [tokens, codebook, phi, map, next] = lens;
            plan.step(
                &stream,
                StepArgs {
                    scale,
                    tokens: buffers.tokens[scale.min(3)].input_of(tokens),
                    codebook: (codebook < usize::MAX).then(|| buffers.codebook.input_of(codebook)),
                    phi: (phi < usize::MAX).then(|| buffers.phi.input_of(phi)),
                    f_hat: (map < usize::MAX).then(|| FHat::FromZero(buffers.maps[0].output_of(map))),
                    next: (next < usize::MAX).then(|| buffers.next[scale.min(2)].output_of(next)),
                    flags: None,
                },
            )
        };
        let packed = problem.packed.len();
        let length = |arg, need, got| Err(Error::Length { arg, need, got });
        assert_eq!(run(1, [11, 160, packed, image, 256]), length("tokens", 12, 11));
        assert_eq!(run(1, [12, 159, packed, image, 256]), length("codebook", 160, 159));
        assert_eq!(run(1, [12, usize::MAX, packed, image, 256]), length("codebook", 160, 0));
        assert_eq!(run(1, [12, 160, packed - 1, image, 256]), length("phi", packed as u64, packed as u64 - 1));
        assert_eq!(run(1, [12, 160, usize::MAX, image, 256]), length("phi", packed as u64, 0));
        assert_eq!(run(1, [12, 160, packed, image - 1, 256]), length("f_hat", image as u64, image as u64 - 1));
        assert_eq!(run(1, [12, 160, packed, usize::MAX, 256]), length("f_hat", image as u64, 0));
        assert_eq!(run(1, [12, 160, packed, image, 255]), length("next", 256, 255));
        let size = Err(Error::Size { arg: "scale", got: 4, min: 0, max: 3 });
        assert_eq!(run(4, [70, 160, packed, image, usize::MAX]), size);
        assert!(matches!(run(3, [70, 160, packed, image, 0]), Err(Error::Unsupported { arg: "next", .. })));
        if !device.is_host() {
            buffers.phi = Buffer::of(&device, &problem.packed, 1);
            let misaligned = buffers.step(&device, &case, &plan, 0);
            assert_eq!(misaligned, Err(Error::Alignment { arg: "phi", need: 16 }));
        }
        assert!(buffers.maps[0].read().iter().all(|x| x.to_bits() == u32::MAX));
        assert_eq!(plan.tokens(1), Some(6));
        assert_eq!((plan.tokens(4), plan.all_tokens()), (None, 58));
    }
    let plan = MultiScale::<f32, f32>::builder(4, (2, 2), &[(1, 1), (2, 2)]).build(&DeviceInfo::H200).unwrap();
    // SAFETY: every call is refused before it reaches a driver.
    let run = |before: u64, after: u64, next: u64| unsafe {
        plan.step(
            &Stream::from_raw(std::ptr::null_mut(), 0),
            StepArgs {
                scale: 0,
                tokens: In::from_raw(0x1000, 4, 0),
                codebook: None,
                phi: None,
                f_hat: Some(FHat::Between(In::from_raw(before, 16, 0), Out::from_raw(after, 16, 0))),
                next: Some(Out::from_raw(next, 16, 0)),
                flags: None,
            },
        )
    };
    assert_eq!(run(0x2000, 0x2000, 0x3000), Err(Error::Overlap { written: "f_hat", other: "f_hat" }));
    assert_eq!(run(0x2000, 0x4000, 0x4020), Err(Error::Overlap { written: "next", other: "f_hat" }));
    assert_eq!(run(0x2000, 0x4002, 0x3000), Err(Error::Alignment { arg: "f_hat", need: 4 }));
    assert_eq!(run(0x2000, 0x4000, 0x1004), Err(Error::Overlap { written: "next", other: "tokens" }));
}

#[test]
fn empty_problems_need_nothing() {
    for device in TestDevice::all() {
        let plan = MultiScale::<u16, f32>::builder(4, (2, 2), &[(1, 1), (2, 2)]).entries(3).batch(0);
        let plan = plan.build(&DeviceInfo::H200).unwrap();
        let (tokens, mut map) = (Buffer::of(&device, &[0u16; 0], 0), Buffer::<f32>::poisoned(&device, 0, 0));
        let codebook = Buffer::of(&device, &[0f32; 0], 0);
        plan.step(
            &device.stream(),
            StepArgs {
                scale: 0,
                tokens: tokens.input(),
                codebook: None,
                phi: None,
                f_hat: Some(FHat::FromZero(map.output())),
                next: None,
                flags: None,
            },
        )
        .unwrap();
        let (f, mut codes) = (Buffer::of(&device, &[0f32; 0], 0), Buffer::<u16>::poisoned(&device, 0, 0));
        plan.encode(
            &device.stream(),
            EncodeArgs {
                f: f.input(),
                codebook: codebook.input(),
                search: None,
                phi: None,
                codes: codes.output(),
                f_hat: map.output(),
                workspace: None,
            },
        )
        .unwrap();
    }
}

#[test]
fn plans_are_plain_data() {
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<MultiScale<u16, bf16>>();
    let plan = |batch| super_plain().batch(batch).build(&DeviceInfo::H200).unwrap();
    fn super_plain() -> MultiScaleBuilder<u16, bf16> {
        MultiScale::builder(32, (16, 16), &schedules::square(&schedules::VAR_256)).entries(4096).phi(PhiTable::var_10())
    }
    assert_eq!(plan(4), plan(4));
    assert_ne!(plan(4), plan(5));
    // One image: eight blocks of four channels; 64: two a multiprocessor's worth.
    assert_eq!(
        [plan(1).cut().group, plan(16).cut().group, plan(64).cut().group, plan(1000).cut().group],
        [4, 4, 16, 32]
    );
    let map = 64 * 32 * 256 * 4;
    let traffic = Traffic { read: 64 * 100 * 2 + map, written: map + 64 * 169 * 32 * 2 };
    assert_eq!(plan(64).traffic(7), Ok(traffic));
    assert!(plan(64).traffic(10).is_err());
}

mod encode {
    use super::*;

    /// What is left after the codes of the scales before `s`, pooled to `s`: token-major.
    fn left<T: Token>(case: &Case, problem: &Problem<T>, f: &[f32], b: usize, s: usize) -> Vec<f64> {
        let (height, width) = case.size();
        let map = if s == 0 { vec![0.0; case.image()] } else { case.chain(problem, b)[s - 1].0.clone() };
        let plane = |c: usize| -> Plane {
            let at = |y: usize, x: usize| (c * height + y) * width + x;
            let value = |y, x| f64::from(f[b * case.image() + at(y, x)]) - map[at(y, x)];
            (0..height).map(|y| (0..width).map(|x| value(y, x)).collect()).collect()
        };
        let (h, w) = case.schedule[s];
        let to = (h * case.patch, w * case.patch);
        let pooled: Vec<Plane> = (0..case.channels).map(|c| resized(&plane(c), "area", to)).collect();
        token_major(&pooled, case.patch)
    }

    fn random(case: &Case, spread: f32) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(case.seed ^ 0xF);
        (0..case.batch * case.image()).map(|_| rng.random_range(-spread..spread)).collect()
    }

    /// Each code is of a row as near as the nearest one to what is left in f64, but for rounding, and the map is that
    /// of the codes.
    fn check_codes<C: Make + nextscale::dtype::Code>(device: &TestDevice, case: &Case, cosine: bool) {
        let mut problem = case.problem::<C>();
        let n = case.channels;
        // Some rows are there twice: the lower index wins.
        for i in 0..case.entries / 4 {
            let (from, to) = (i * n..(i + 1) * n, (case.entries - 1 - i) * n);
            problem.codebook.copy_within(from, to);
        }
        let normalized: Vec<f32> = problem
            .codebook
            .chunks(n)
            .flat_map(|row| {
                let norm = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt().max(1e-12);
                row.iter().map(move |x| (f64::from(*x) / norm) as f32)
            })
            .collect();
        let f = random(case, 2.0);
        let plan = case.plan::<C, f32>();
        let (of_f, codebook) =
            (Buffer::of(device, &f, case.shift[1]), Buffer::of(device, &problem.codebook, case.shift[0]));
        let (search, phi) = (Buffer::of(device, &normalized, case.shift[0]), Buffer::of(device, &problem.packed, 0));
        let mut codes = Buffer::<C>::poisoned(device, problem.tokens.len(), case.shift[2]);
        let mut f_hat = Buffer::<f32>::poisoned(device, case.batch * case.image(), case.shift[1]);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.encode_workspace_bytes() as usize, 0);
        plan.encode(
            &device.stream(),
            EncodeArgs {
                f: of_f.input(),
                codebook: codebook.input(),
                search: cosine.then(|| search.input()),
                phi: case.phi.is_some().then(|| phi.input()),
                codes: codes.output(),
                f_hat: f_hat.output(),
                workspace: Some(workspace.output()),
            },
        )
        .unwrap();
        problem.tokens = codes.read();
        let rows = if cosine { &normalized } else { &problem.codebook };
        let all = case.first(case.schedule.len());
        for b in 0..case.batch {
            for s in 0..case.schedule.len() {
                let z = left(case, &problem, &f, b, s);
                for (token, z) in z.chunks(n).enumerate() {
                    let norm = if cosine { z.iter().map(|z| z * z).sum::<f64>().sqrt().max(1e-12) } else { 1.0 };
                    let z: Vec<f64> = z.iter().map(|z| z / norm).collect();
                    let score = |i: usize| -> f64 {
                        rows[i * n..(i + 1) * n].iter().zip(&z).map(|(c, z)| (z - f64::from(*c)).powi(2)).sum()
                    };
                    let code = problem.tokens[b * all + case.first(s) + token].to_i64() as usize;
                    let least = (0..case.entries).map(score).fold(f64::INFINITY, f64::min);
                    let slack = 1e-5 * (1.0 + least);
                    assert!(score(code) <= least + slack, "image {b}, scale {s}, token {token}: {code}");
                    let twin = (0..code).find(|&i| rows[i * n..(i + 1) * n] == rows[code * n..(code + 1) * n]);
                    assert_eq!(twin, None, "the lowest of equal rows");
                }
            }
            let map = &f_hat.read()[b * case.image()..(b + 1) * case.image()];
            close("map", map, &case.chain(&problem, b).last().unwrap().0);
        }
    }

    #[test]
    fn codes_are_of_the_nearest_rows_at_the_edges() {
        for device in TestDevice::all() {
            for cosine in [false, true] {
                check_codes::<u16>(&device, &Case { entries: 300, ..plain() }, cosine);
                check_codes::<u32>(&device, &Case { phi: None, channels: 5, entries: 130, ..plain() }, cosine);
                let other = Case { batch: 3, channels: 1, up: Up::Bilinear, shift: [1, 1, 1], entries: 9, ..plain() };
                check_codes::<i64>(&device, &other, cosine);
                // What is left is pooled by area, whatever the next scale of a generation reads.
                check_codes::<u16>(&device, &Case { next: Next::Bilinear, entries: 300, ..plain() }, cosine);
            }
            let one = Case { schedule: vec![(3, 3)], phi: None, entries: 1, ..plain() };
            check_codes::<u16>(&device, &one, false);
        }
    }

    /// A search alone, where the answer is known to the bit: one scale, so that the vectors are the map's own.
    #[test]
    fn searches_agree_bit_for_bit() {
        for device in TestDevice::all() {
            for (batch, side, channels, entries, cosine) in [
                (1, 3, 32, 1000, false),
                (5, 9, 8, 257, false),
                (2, 4, 7, 64, true),
                (1, 1, 1, 5, false),
                (1, 12, 32, 700, true),
                (1, 2, 256, 70, false),
                (1, 3, 130, 300, true),
                (70, 5, 8, 40, false),
            ] {
                let case = Case { batch, channels, entries, schedule: vec![(side, side)], phi: None, ..plain() };
                let mut rng = StdRng::seed_from_u64(batch as u64);
                // Tight clusters, in which a score that is not exact picks others.
                let mut clusters = |n: usize, near: f32| -> Vec<f32> {
                    (0..n * channels)
                        .map(|i| ((i % channels) as f32).sin() * 3.0 + near * rng.random_range(-1.0..1.0f32))
                        .collect()
                };
                let codebook = clusters(entries, 0.01);
                let rows = clusters(batch * side * side, 0.01);
                let mut f = vec![0f32; rows.len()];
                for (i, &value) in rows.iter().enumerate() {
                    let (b, at, c) = (i / channels / (side * side), i / channels % (side * side), i % channels);
                    f[(b * channels + c) * side * side + at] = value;
                }
                f[0] = if side == 9 { f32::NAN } else { f[0] };
                let plan = case.plan::<u32, f32>();
                let (of_f, book) = (Buffer::of(&device, &f, 0), Buffer::of(&device, &codebook, 0));
                let mut codes = Buffer::<u32>::poisoned(&device, batch * side * side, 0);
                let mut f_hat = Buffer::<f32>::poisoned(&device, f.len(), 0);
                let mut workspace = Buffer::<u8>::poisoned(&device, plan.encode_workspace_bytes() as usize, 0);
                plan.encode(
                    &device.stream(),
                    EncodeArgs {
                        f: of_f.input(),
                        codebook: book.input(),
                        search: cosine.then(|| book.input()),
                        phi: None,
                        codes: codes.output(),
                        f_hat: f_hat.output(),
                        workspace: Some(workspace.output()),
                    },
                )
                .unwrap();
                let codes = codes.read();
                for (row, code) in codes.iter().enumerate() {
                    let mut z: Vec<f32> = rows[row * channels..(row + 1) * channels].to_vec();
                    if row == 0 && side == 9 {
                        assert_eq!(*code, 0, "a vector with a NaN");
                        continue;
                    }
                    if cosine {
                        let norm = z.iter().fold(0f32, |sum, z| z.mul_add(*z, sum)).sqrt().max(1e-12);
                        z.iter_mut().for_each(|z| *z /= norm);
                    }
                    let mut best = (f32::INFINITY, 0);
                    for i in 0..entries {
                        let mut score = 0f32;
                        for (z, c) in z.iter().zip(&codebook[i * channels..]) {
                            score = (z - c).mul_add(z - c, score);
                        }
                        if score < best.0 {
                            best = (score, i as u32);
                        }
                    }
                    assert_eq!(*code, best.1, "row {row} of {case:?}");
                }
            }
        }
    }

    fn check_bits<O: Float>(device: &TestDevice, case: &Case, rates: Option<&[f32]>) {
        let mut problem = case.problem::<u8>();
        let f = random(case, 1.0);
        let plan = case.plan::<u8, O>();
        let of_f = Buffer::of(device, &f, case.shift[1]);
        let seeds: Vec<i64> = (0..case.batch as i64).map(|b| b - 1).collect();
        let of_seeds = Buffer::of(device, &seeds, 0);
        let count = problem.tokens.len();
        let [mut labels, mut flipped] = [0, 1].map(|_| Buffer::<u8>::poisoned(device, count, case.shift[0]));
        let mut f_hat = Buffer::<f32>::poisoned(device, case.batch * case.image(), case.shift[1]);
        let inputs = case.batch * (case.first(case.schedule.len()) - case.first(1)) * case.width();
        let mut next = Buffer::<O>::poisoned(device, inputs, case.shift[2]);
        plan.encode_bits(
            &device.stream(),
            EncodeBitsArgs {
                f: of_f.input(),
                labels: labels.output(),
                flips: rates.map(|rates| FlipArgs { flipped: flipped.output(), seeds: of_seeds.input(), rates }),
                f_hat: f_hat.output(),
                next: Some(next.output()),
            },
        )
        .unwrap();
        let labels = labels.read();
        problem.tokens = if rates.is_some() { flipped.read() } else { labels.clone() };
        assert!(problem.tokens.iter().all(|&bit| bit <= 1));
        let all = case.first(case.schedule.len()) * case.width();
        let mut flips = 0;
        for (b, &seed) in seeds.iter().enumerate() {
            for s in 0..case.schedule.len() {
                let z = left(case, &problem, &f, b, s);
                for (i, z) in z.iter().enumerate() {
                    let at = b * all + case.first(s) * case.width() + i;
                    // Where rounding decides, either is right.
                    assert!(z.abs() < 1e-6 || labels[at] == u8::from(*z > 0.0), "image {b}, scale {s}: {i}");
                    let (token, element) = (case.first(s) + i / case.width(), i % case.width());
                    let position = (token * case.width().div_ceil(4) + element / 4) as u64;
                    let word = philox::block(seed as u64, position, BIT_FLIP_DOMAIN, 0)[element % 4];
                    let flip = rates.is_some_and(|rates| philox::uniform(word) < rates[s]);
                    assert_eq!(problem.tokens[at], labels[at] ^ u8::from(flip));
                    flips += usize::from(flip);
                }
            }
        }
        assert_eq!(flips > 0, rates.is_some_and(|rates| rates.iter().any(|&rate| rate > 0.0)));
        let chains: Vec<_> = (0..case.batch).map(|b| case.chain(&problem, b)).collect();
        let map: Vec<f64> = chains.iter().flat_map(|chain| chain.last().unwrap().0.clone()).collect();
        close("map", &f_hat.read(), &map);
        let inputs: Vec<f64> = chains.iter().flatten().flat_map(|(_, next)| next.clone()).collect();
        close("inputs", &next.read(), &inputs);
    }

    #[test]
    fn bits_are_the_signs_of_what_is_left_at_the_edges() {
        let bits = Case { phi: None, up: Up::Bilinear, next: Next::Bilinear, ..plain() };
        for device in TestDevice::all() {
            for rates in [None, Some([0.3, 0.0, 1.0, 0.1].as_slice())] {
                check_bits::<f32>(&device, &bits, rates);
                check_bits::<bf16>(&device, &Case { channels: 6, patch: 2, shift: [1; 3], ..bits.clone() }, rates);
                check_bits::<f16>(&device, &Case { channels: 3, next: Next::Area, ..bits.clone() }, rates);
            }
        }
    }

    #[test]
    fn bad_encodes_are_refused() {
        let device = TestDevice::Host;
        let of = |case: &Case, rates: &[f32], labels_len: usize| {
            let plan = case.plan::<u8, f32>();
            let f = Buffer::of(&device, &random(case, 1.0), 0);
            let count = case.batch * case.first(case.schedule.len()) * case.width();
            let [mut labels, mut flipped] = [0, 1].map(|_| Buffer::<u8>::poisoned(&device, count, 0));
            let mut f_hat = Buffer::<f32>::poisoned(&device, case.batch * case.image(), 0);
            let seeds = Buffer::of(&device, &vec![0i64; case.batch], 0);
            plan.encode_bits(
                &device.stream(),
                EncodeBitsArgs {
                    f: f.input(),
                    labels: labels.output_of(count.min(labels_len)),
                    flips: Some(FlipArgs { flipped: flipped.output(), seeds: seeds.input(), rates }),
                    f_hat: f_hat.output(),
                    next: None,
                },
            )
        };
        let bits = Case { phi: None, ..plain() };
        assert_eq!(of(&bits, &[0.0; 4], usize::MAX), Ok(()));
        let unsupported = |result: Result<()>, name: &str| {
            assert!(matches!(result, Err(Error::Unsupported { arg, .. }) if arg == name), "{result:?}");
        };
        unsupported(of(&bits, &[0.0; 3], usize::MAX), "rates");
        unsupported(of(&bits, &[0.0, 0.0, 1.1, 0.0], usize::MAX), "rates");
        unsupported(of(&bits, &[0.0, f32::NAN, 1.0, 0.0], usize::MAX), "rates");
        unsupported(of(&Case { next: Next::Tokens, ..bits.clone() }, &[0.0; 4], usize::MAX), "next");
        unsupported(of(&plain(), &[0.0; 4], usize::MAX), "phi");
        assert!(matches!(of(&bits, &[0.0; 4], 5), Err(Error::Length { arg: "labels", .. })));

        let plan =
            MultiScale::<u16, f32>::builder(1, (1, 1), &[(1, 1)]).entries(65_537).build(&DeviceInfo::H200).unwrap();
        let (f, book) = ([0f32], vec![0f32; 65_537]);
        let (mut codes, mut f_hat) = ([0u16], [0f32]);
        let ran = plan.encode(
            &Stream::host(),
            EncodeArgs {
                f: In::host(&f),
                codebook: In::host(&book),
                search: None,
                phi: None,
                codes: Out::host(&mut codes),
                f_hat: Out::host(&mut f_hat),
                workspace: None,
            },
        );
        assert_eq!(ran, Err(Error::Size { arg: "entries", got: 65_537, min: 1, max: 65_536 }));
        for device in TestDevice::kernels() {
            let plan =
                MultiScale::<u16, f32>::builder(1, (1, 1), &[(1, 1)]).entries(2).build(&DeviceInfo::H200).unwrap();
            let (f, book) = (Buffer::of(&device, &[0f32], 0), Buffer::of(&device, &[0f32; 2], 0));
            let (mut codes, mut f_hat) =
                (Buffer::<u16>::poisoned(&device, 1, 0), Buffer::<f32>::poisoned(&device, 1, 0));
            let ran = plan.encode(
                &device.stream(),
                EncodeArgs {
                    f: f.input(),
                    codebook: book.input(),
                    search: None,
                    phi: None,
                    codes: codes.output(),
                    f_hat: f_hat.output(),
                    workspace: None,
                },
            );
            assert_eq!(ran, Err(Error::Workspace { need: 256, got: 0 }));
        }
    }
}

/// Steps that are launched early wait for those before them: chains without a pause, on full multiprocessors.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn streams_of_steps_are_ordered() {
    let Some(device @ TestDevice::Cuda(_)) = TestDevice::cuda() else { return };
    let small = std::env::var_os("NXS_SMALL").is_some();
    let var = Case {
        batch: if small { 2 } else { 64 },
        channels: 32,
        schedule: schedules::square(&schedules::VAR_256),
        phi: Some(vec![0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        ..plain()
    };
    let infinity = Case {
        schedule: schedules::square(&schedules::INFINITY_1M[..if small { 7 } else { 13 }]),
        batch: 2,
        phi: None,
        up: Up::Bilinear,
        next: Next::Bilinear,
        maps: Maps::Turns,
        ..var.clone()
    };
    for case in [var, infinity] {
        let problem = case.problem::<f32>();
        let (scales, plan) = (case.schedule.len(), case.plan::<f32, bf16>());
        let mut buffers = Buffers::<f32, bf16>::new(&device, &case, &problem);
        let chain = |buffers: &mut Buffers<f32, bf16>| {
            (0..scales).for_each(|s| buffers.step(&device, &case, &plan, s).unwrap());
        };
        let bits = |buffers: &Buffers<f32, bf16>| {
            let map = buffers.maps[Buffers::<f32, bf16>::written(&case, scales - 1)].read();
            let next: Vec<u16> = buffers.next.iter().flat_map(|next| next.read()).map(bf16::to_bits).collect();
            (map.iter().map(|x| x.to_bits()).collect::<Vec<u32>>(), next)
        };
        // One step at a time, then without a pause.
        for s in 0..scales {
            buffers.step(&device, &case, &plan, s).unwrap();
            device.sync();
        }
        let one_by_one = bits(&buffers);
        for _ in 0..5 {
            (0..if small { 2 } else { 20 }).for_each(|_| chain(&mut buffers));
            assert!(bits(&buffers) == one_by_one);
        }
    }
}

/// A captured graph replays to the same bits, with the tokens of the moment.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn graphs_replay() {
    let Some(device @ TestDevice::Cuda(_)) = TestDevice::cuda() else { return };
    let TestDevice::Cuda(stream) = device.clone() else { return };
    for (phi, next, maps) in [(Some(vec![0, 1, 1, 0]), Next::Area, Maps::InPlace), (None, Next::Bilinear, Maps::Turns)]
    {
        let case = Case { phi, next, maps, ..plain() };
        let problem = case.problem::<u32>();
        let plan = case.plan::<u32, bf16>();
        let mut buffers = Buffers::<u32, bf16>::new(&device, &case, &problem);
        let mut eager = Buffers::<u32, bf16>::new(&device, &case, &problem);
        (0..4).for_each(|s| eager.step(&device, &case, &plan, s).unwrap());
        let graph = support::capture(&stream, || (0..4).for_each(|s| buffers.step(&device, &case, &plan, s).unwrap()));
        for _ in 0..3 {
            graph.launch().unwrap();
            let at = Buffers::<u32, bf16>::written(&case, 3);
            assert_eq!(buffers.maps[at].read(), eager.maps[at].read());
            for (a, b) in buffers.next.iter().zip(&eager.next) {
                assert_eq!(a.read(), b.read());
            }
        }
    }
}

/// What the emulator counts, beside what the plan says.
#[cfg(feature = "emulate")]
mod traffic {
    use super::*;
    use nextscale::emulator::{self, Counters};

    fn count<T: Make>(case: &Case, s: usize) -> (Traffic, Counters) {
        let problem = case.problem::<T>();
        let plan = case.plan::<T, bf16>();
        let device = TestDevice::Emulated;
        let mut buffers = Buffers::<T, bf16>::new(&device, case, &problem);
        (0..s).for_each(|s| buffers.step(&device, case, &plan, s).unwrap());
        emulator::reset();
        buffers.step(&device, case, &plan, s).unwrap();
        (plan.traffic(s).unwrap(), emulator::counters())
    }

    fn hold(what: &str, least: u64, counted: u64, most: u64) {
        assert!((least..=most).contains(&counted), "{what}: {counted} bytes, not {least} to {most}");
    }

    /// One launch a step, which moves what it must: the map once each way, the next as often as it is repeated, and
    /// of tokens, codebook and phi no more than each of the blocks that share an image reads.
    #[test]
    fn steps_move_what_the_plan_says() {
        let schedule = vec![(1, 1), (3, 3), (8, 8), (16, 16)];
        let phi = Some(vec![0, 0, 0, 0]);
        let case = Case { channels: 8, schedule, phi, repeat: 2, batch: 2, ..plain() };
        for s in 1..4 {
            let (traffic, counted) = count::<f32>(&case, s);
            assert_eq!(counted.launches, 1);
            hold("stores", traffic.written, counted.global_store_bytes, traffic.written * 2);
            // Two blocks an image read all tokens and half of the phi each; 32 bytes for each load of four weights.
            let [blocks, images] = [2, 2];
            let phi = 2 * (9 * 8 + 1) * 16;
            let most = traffic.read * blocks + images * phi * 2;
            hold("loads", traffic.read + images * phi, counted.global_load_bytes, most);
        }
    }

    /// Maps that take turns: no phi, tokens read by the rows that need them.
    #[test]
    fn rows_move_what_the_plan_says() {
        let schedule = vec![(1, 1), (4, 4), (8, 8), (16, 16)];
        let case = Case {
            channels: 8,
            schedule,
            phi: None,
            up: Up::Bilinear,
            next: Next::Bilinear,
            maps: Maps::Turns,
            repeat: 2,
            batch: 2,
            ..plain()
        };
        for s in 1..4 {
            let (traffic, counted) = count::<u8>(&case, s);
            assert_eq!(counted.launches, 1);
            hold("stores", traffic.written, counted.global_store_bytes, traffic.written * 2);
            let map = 2 * 8 * 256 * 4;
            // A row of the map reads two rows of tokens, one of next up to four pixels of the map for each of its own.
            let next = if s == 3 { 0 } else { (case.schedule[s + 1].0 * case.schedule[s + 1].1) as u64 };
            let most = map + 16 * 2 * 2 * 16 * 32 + 2 * next * 8 * 4 * 32;
            hold("loads", traffic.read, counted.global_load_bytes, most);
        }
    }
}
