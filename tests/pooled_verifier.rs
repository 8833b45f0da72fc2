//! Pooled acceptance of images against an oracle in f64, and the kernels against the host bit for bit.

#![cfg(feature = "verification")]

mod support;
mod verification;

use nextscale::dtype::Float;
use nextscale::verification::{
    Neighbours, PooledOptions, PooledOut, PooledVerifier, PooledVerifierArgs, PooledVerifierBuilder, status,
};
use nextscale::{DType, DeviceInfo, Error, bf16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, FLOATS, ForFloats, TestDevice, for_floats};
use verification::Sampling;

#[derive(Debug, Clone)]
struct Case {
    vocab: usize,
    batch: usize,
    image: [usize; 2],
    radius: usize,
    near: usize,
    threshold: f32,
    /// guidance, truncation, threshold a request, bad rows, gap, codes, small ids, greedy
    with: [bool; 8],
    shift: usize,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    (
        prop_oneof![4 => 1..60usize, 1 => 1000..1100usize, 1 => 2000..2100usize],
        0..4usize,
        [1..8usize, 1..8usize],
        0..4usize,
        0..40usize,
        0.0..1.0f32,
        proptest::array::uniform8(any::<bool>()),
        0..4usize,
        any::<u64>(),
    )
        .prop_map(|(vocab, batch, image, radius, near, threshold, with, shift, seed)| Case {
            vocab,
            batch,
            image,
            radius,
            near,
            threshold,
            with,
            shift,
            seed,
        })
}

struct Data<T> {
    target: Vec<T>,
    free: Vec<T>,
    drafts: Vec<i32>,
    near: Vec<i32>,
    guidance: Vec<f32>,
    temperature: Vec<f32>,
    top_k: Vec<i32>,
    threshold: Vec<f32>,
}

#[derive(Debug, PartialEq)]
struct Decided {
    resample: Vec<u8>,
    positions: Vec<i32>,
    islands: Vec<i32>,
    counts: Vec<i32>,
    /// Bits.
    pooled: Vec<u32>,
    status: Vec<u32>,
}

impl Case {
    fn tokens(&self) -> usize {
        self.image[0] * self.image[1]
    }

    fn codes(&self) -> (usize, usize) {
        if self.with[5] { (self.vocab / 3, (self.vocab / 2).max(1)) } else { (0, self.vocab) }
    }

    fn stride(&self) -> usize {
        self.vocab + if self.with[4] { 3 } else { 0 }
    }

    fn data<T: Float>(&self) -> Data<T> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let rows = self.batch * self.tokens();
        let len = if rows == 0 { 0 } else { (rows - 1) * self.stride() + self.vocab };
        let mut logits = || -> Vec<T> { (0..len).map(|_| T::from_f32(rng.random_range(-4.0..4.0f32))).collect() };
        let (mut target, free) = (logits(), logits());
        let mut drafts: Vec<i32> = (0..rows).map(|_| rng.random_range(0..self.vocab as i32)).collect();
        if self.with[3] && rows > 0 {
            for _ in 0..4 {
                let r = rng.random_range(0..rows);
                let row = r * self.stride()..r * self.stride() + self.vocab;
                match rng.random_range(0..4) {
                    0 => target[row].fill(T::from_f32(f32::NAN)),
                    1 => target[row].fill(T::from_f32(f32::NEG_INFINITY)),
                    2 => target[row.start + rng.random_range(0..self.vocab)] = T::from_f32(f32::NAN),
                    _ => drafts[r] = [-1, self.vocab as i32, i32::MAX, i32::MIN][rng.random_range(0..4)],
                }
            }
        }
        let (_, codes) = self.codes();
        let near = (0..codes)
            .flat_map(|code| (1..=self.near).map(move |n| ((code + n) % codes) as i32))
            .map(|id| if rng.random_bool(0.05) { [-1, 65535, codes as i32][rng.random_range(0..3)] } else { id })
            .collect();
        let mut of = |choices: &[f32]| -> Vec<f32> {
            (0..self.batch).map(|_| choices[rng.random_range(0..choices.len())]).collect()
        };
        Data {
            target,
            free,
            drafts,
            near,
            guidance: of(&[1.0, 3.0, 1.5]),
            temperature: of(if self.with[7] { &[1.0, 0.0, 0.5] } else { &[1.0, 0.7, 1.5] }),
            top_k: of(&[0.0, 1.0, 20.0]).iter().map(|&k| k as i32).collect(),
            threshold: of(&[0.0, 0.2, 0.7, 1.1]),
        }
    }

    fn builder<T: Float>(&self) -> PooledVerifierBuilder<T> {
        let (first, codes) = self.codes();
        let builder = PooledVerifier::builder(self.batch, self.image, self.vocab)
            .target_row_stride(self.stride() as i64)
            .codes(first, codes)
            .neighbours(self.near)
            .radius(self.radius)
            .threshold(self.threshold);
        if self.with[0] { builder.guided() } else { builder }
    }

    fn run<T: Float>(&self, device: &TestDevice, data: &Data<T>, info: &DeviceInfo) -> Decided {
        let plan = self.builder::<T>().build(info).unwrap();
        let rows = self.batch * self.tokens();
        let [guided, truncated, own_threshold, ..] = self.with;
        let (target, free) = (Buffer::of(device, &data.target, self.shift), Buffer::of(device, &data.free, self.shift));
        let drafts = Buffer::of(device, &data.drafts, 1);
        let ids: Vec<u16> = data.near.iter().map(|&id| id as u16).collect();
        let (small, large) = (Buffer::of(device, &ids, 1), Buffer::of(device, &data.near, 1));
        let (guidance, temperature) = (Buffer::of(device, &data.guidance, 1), Buffer::of(device, &data.temperature, 1));
        let (top_k, threshold) = (Buffer::of(device, &data.top_k, 1), Buffer::of(device, &data.threshold, 1));
        let mut resample = Buffer::<u8>::poisoned(device, rows, 1);
        let mut positions = Buffer::<i32>::poisoned(device, rows, 1);
        let mut islands = Buffer::<i32>::poisoned(device, rows, 1);
        let mut counts = Buffer::<i32>::poisoned(device, self.batch * 2, 1);
        let mut pooled = Buffer::<f32>::poisoned(device, rows, 1);
        let mut status = Buffer::<u32>::poisoned(device, self.batch, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(device, &vec![0u32; plan.counter_words()], 1);
        plan.run(
            &device.stream(),
            PooledVerifierArgs {
                target: target.input(),
                drafts: drafts.input(),
                options: PooledOptions {
                    target_free: guided.then(|| free.input()),
                    neighbours: (self.near > 0).then(|| match self.with[6] {
                        true => Neighbours::U16(small.input()),
                        false => Neighbours::I32(large.input()),
                    }),
                    guidance: guided.then(|| guidance.input()),
                    temperature: Some(temperature.input()),
                    top_k: truncated.then(|| top_k.input()),
                    top_p: None,
                    min_p: None,
                    threshold: own_threshold.then(|| threshold.input()),
                },
                out: PooledOut {
                    resample: resample.output(),
                    positions: Some(positions.output()),
                    islands: Some(islands.output()),
                    counts: counts.output(),
                    pooled: Some(pooled.output()),
                    status: status.output(),
                },
                workspace: workspace.output(),
                counters: counters.output(),
            },
        )
        .unwrap();
        workspace.read();
        assert!(counters.read().iter().all(|&count| count == 0));
        Decided {
            resample: resample.read(),
            positions: positions.read(),
            islands: islands.read(),
            counts: counts.read(),
            pooled: pooled.read().iter().map(|x| x.to_bits()).collect(),
            status: status.read(),
        }
    }
}

/// The mask, the list and the islands of a set of rejected tokens, by flooding.
fn expected(image: [usize; 2], radius: usize, rejected: &[bool]) -> (Vec<u8>, Vec<i32>, Vec<i32>, i32) {
    let [height, width] = image;
    let place = |t: usize| ((t / width) as i64, (t % width) as i64);
    let near = |t: usize, u: usize, radius: i64| {
        let ((a, b), (c, d)) = (place(t), place(u));
        (a - c).abs() <= radius && (b - d).abs() <= radius
    };
    let tokens = height * width;
    let mask: Vec<u8> = (0..tokens)
        .map(|u| match rejected[u] {
            true => 1,
            false if (0..u).any(|t| rejected[t] && near(t, u, radius as i64)) => 2,
            false => 0,
        })
        .collect();
    let mut islands = vec![-1; tokens];
    let mut number = 0;
    for start in 0..tokens {
        if mask[start] == 0 || islands[start] >= 0 {
            continue;
        }
        let mut flood = vec![start];
        while let Some(t) = flood.pop() {
            if islands[t] < 0 {
                islands[t] = number;
                flood.extend((0..tokens).filter(|&u| mask[u] > 0 && islands[u] < 0 && near(t, u, 1)));
            }
        }
        number += 1;
    }
    let mut positions: Vec<i32> = (0..tokens as i32).filter(|&t| mask[t as usize] > 0).collect();
    positions.resize(tokens, -1);
    (mask, positions, islands, number)
}

fn check<T: Float>(case: &Case, raster: bool) -> Result<(), String> {
    let data = case.data::<T>();
    let decided = case.run(&TestDevice::Host, &data, &DeviceInfo::H200);
    let tokens = case.tokens();
    let (first, codes) = case.codes();
    for b in 0..case.batch {
        let (mut rejected, mut close) = (Vec::new(), false);
        for t in 0..tokens {
            let r = b * tokens + t;
            let at = r * case.stride();
            let logits: Vec<f64> = (at..at + case.vocab)
                .map(|at| {
                    let (with, free) = (data.target[at].to_f32(), data.free[at].to_f32());
                    match case.with[0] {
                        true if with > f32::NEG_INFINITY || with.is_nan() => {
                            f64::from(data.guidance[b].mul_add(with - free, free))
                        }
                        _ => f64::from(with),
                    }
                })
                .collect();
            let mut sampling = Sampling::at(data.temperature[b]);
            sampling.top_k = if case.with[1] { data.top_k[b] } else { 0 };
            let p = sampling.probabilities(&logits, false, &mut 1.0);
            let d = data.drafts[r];
            let sum = match usize::try_from(d).ok().filter(|&d| d < case.vocab && p.iter().any(|&p| p > 0.0)) {
                None => 0.0,
                Some(d) => {
                    let near: f64 = match d.checked_sub(first).filter(|&code| code < codes) {
                        Some(code) => data.near[code * case.near..][..case.near]
                            .iter()
                            .filter(|&&id| id >= 0 && (id as usize) < codes)
                            .map(|&id| p[first + id as usize])
                            .sum(),
                        None => 0.0,
                    };
                    p[d] + near
                }
            };
            let threshold = if case.with[2] { data.threshold[b] } else { case.threshold };
            let none = !(0..case.vocab as i32).contains(&d) || p.iter().all(|&p| p == 0.0);
            rejected.push(none || sum < f64::from(threshold));
            close |= !none && (sum - f64::from(threshold)).abs() < 1e-5 && sum > 0.0;
            let got = f64::from(f32::from_bits(decided.pooled[r]));
            if (got - sum).abs() > 2e-5 {
                return Err(format!("token {t}: {got} instead of {sum}"));
            }
        }
        if close {
            continue;
        }
        let (mut mask, positions, islands, number) = expected(case.image, case.radius, &rejected);
        if !raster {
            // A wrong one: in all directions.
            mask = (0..tokens)
                .map(|u| {
                    let near = |t: usize| {
                        let w = case.image[1];
                        (t / w).abs_diff(u / w) <= case.radius && (t % w).abs_diff(u % w) <= case.radius
                    };
                    if rejected[u] { 1 } else { 2 * u8::from((0..tokens).any(|t| rejected[t] && near(t))) }
                })
                .collect();
        }
        let of = b * tokens..(b + 1) * tokens;
        let count = positions.iter().filter(|&&t| t >= 0).count() as i32;
        if decided.resample[of.clone()] != mask
            || decided.positions[of.clone()] != positions
            || decided.islands[of] != islands
            || decided.counts[b * 2..][..2] != [count, number]
        {
            return Err(format!("request {b}: {decided:?}"));
        }
    }
    Ok(())
}

struct Oracle<'a>(&'a Case);
impl ForFloats for Oracle<'_> {
    fn call<T: Float, O: Float>(self) {
        check::<T>(self.0, true).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases() * 4, ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_the_definitions(case in case(), dtype in 0..3usize) {
        for_floats(FLOATS[dtype], DType::F32, Oracle(&case));
    }
}

fn plain() -> Case {
    Case { vocab: 30, batch: 6, image: [7, 9], radius: 1, near: 8, threshold: 0.1, with: [false; 8], shift: 0, seed: 3 }
}

/// The comparison must be able to fail.
#[test]
fn a_mask_without_the_raster_order_is_told() {
    check::<f32>(&plain(), true).unwrap();
    check::<f32>(&plain(), false).unwrap_err();
}

struct SameBits<'a>(&'a TestDevice, &'a Case);
impl ForFloats for SameBits<'_> {
    fn call<T: Float, O: Float>(self) {
        let data = self.1.data::<T>();
        let on = |device: &TestDevice| self.1.run(device, &data, &DeviceInfo::H200);
        assert_eq!(on(self.0), on(&TestDevice::Host));
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

/// Snakes, spirals and combs: islands whose labels have far to go; and images larger than a block.
#[test]
fn shapes_at_the_edges() {
    for device in TestDevice::all() {
        for (height, width) in [(1, 1), (1, 300), (300, 1), (16, 16), (17, 31)] {
            for shape in 0..4 {
                let marked = |t: usize| {
                    let (y, x) = (t / width, t % width);
                    match shape {
                        // A snake: rows 0, 4, 8 whole, joined at alternate ends.
                        0 => y % 4 == 0 || (x == if y / 4 % 2 == 0 { width - 1 } else { 0 }),
                        1 => x % 3 == 0 || y == height - 1,
                        2 => (x + y) % 2 == 0,
                        _ => x % 3 == 1 && y % 3 == 1,
                    }
                };
                let tokens = height * width;
                let case =
                    Case { vocab: 2, batch: 1, image: [height, width], radius: 0, near: 0, threshold: 0.5, ..plain() };
                let mut data = case.data::<f32>();
                data.temperature = vec![1.0];
                for t in 0..tokens {
                    data.target[t * 2..][..2].copy_from_slice(if marked(t) { &[0.0, 5.0] } else { &[5.0, 0.0] });
                    data.drafts[t] = 0;
                }
                let rejected: Vec<bool> = (0..tokens).map(marked).collect();
                let decided = case.run(&device, &data, &DeviceInfo::H200);
                let (mask, positions, islands, number) = expected(case.image, 0, &rejected);
                assert_eq!((decided.resample, decided.positions, decided.islands), (mask, positions, islands));
                assert_eq!(decided.counts[1], number);
            }
        }
    }
}

/// However the plan cuts the work, and whatever else is in the batch; bad rows harm no other request.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for device in TestDevice::all() {
        let case = Case { vocab: 1500, image: [3, 4], batch: 3, ..plain() };
        let data = case.data::<bf16>();
        let all = case.run(&device, &data, &DeviceInfo::H200);
        let mut small = DeviceInfo::A100;
        small.sm_count = 1;
        assert_eq!(case.run(&device, &data, &small), all);
        let mut bad = case.data::<bf16>();
        bad.target[12 * 1500..13 * 1500].fill(bf16::NAN);
        let harmed = case.run(&device, &bad, &DeviceInfo::H200);
        assert_eq!(harmed.status, [0, status::TARGET_NAN | status::TARGET_EMPTY, 0]);
        assert_eq!(harmed.resample[12], 1);
        assert_eq!((&harmed.resample[..12], &harmed.resample[24..]), (&all.resample[..12], &all.resample[24..]));
        let mut one = Case { batch: 1, shift: 3, ..case.clone() }.data::<bf16>();
        one.target = data.target[24 * 1500..].to_vec();
        one.drafts = data.drafts[24..].to_vec();
        one.near = data.near.clone();
        (one.temperature, one.top_k) = (vec![data.temperature[2]], vec![data.top_k[2]]);
        let alone = Case { batch: 1, shift: 3, ..case }.run(&device, &one, &DeviceInfo::H200);
        assert_eq!((&alone.resample[..], &alone.pooled[..]), (&all.resample[24..], &all.pooled[24..]));
    }
}

#[test]
fn bad_plans_and_buffers_are_refused() {
    type Builder = PooledVerifierBuilder<f32>;
    let build = |b: Builder| b.build(&DeviceInfo::H200).map(|_| ());
    let builder = || PooledVerifier::<f32>::builder(2, [3, 4], 10);
    assert_eq!(build(builder()), Ok(()));
    let size = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    size(build(PooledVerifier::builder(1, [3, 4], 0)), "vocab");
    size(build(PooledVerifier::builder(1, [3, 4], (1 << 18) + 1)), "vocab");
    size(build(PooledVerifier::builder((1 << 20) + 1, [1, 1], 2)), "batch");
    size(build(PooledVerifier::builder(1, [0, 4], 2)), "height");
    size(build(PooledVerifier::builder(1, [4, 0], 2)), "width");
    size(build(PooledVerifier::builder(1, [1 << 11, 1 << 10], 2)), "height * width");
    size(build(PooledVerifier::builder(1 << 12, [1 << 10, 1 << 10], 2)), "rows");
    size(build(builder().codes(10, 1)), "first code");
    size(build(builder().codes(5, 6)), "codes");
    size(build(builder().neighbours(65536)), "neighbours");
    size(build(builder().radius(256)), "radius");
    let stride = |result: Result<(), Error>| assert!(matches!(result, Err(Error::Stride { .. })), "{result:?}");
    stride(build(builder().target_row_stride(9)));
    stride(build(builder().neighbours(3).neighbours_row_stride(2)));
    assert!(matches!(build(builder().threshold(f32::NAN)), Err(Error::Unsupported { arg: "threshold", .. })));
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder().build(&old), Err(Error::UnsupportedDevice { .. })));

    for device in TestDevice::all() {
        let target = Buffer::of(&device, &[0f32; 240], 0);
        let drafts = Buffer::of(&device, &[0i32; 24], 0);
        let ids = Buffer::of(&device, &[0u16; 24], 0);
        let mut resample = Buffer::<u8>::poisoned(&device, 24, 0);
        let mut counts = Buffer::<i32>::poisoned(&device, 4, 0);
        let mut status = Buffer::<u32>::poisoned(&device, 2, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, 1 << 12, 0);
        let mut counters = Buffer::of(&device, &[0u32; 2], 0);
        let mut run = |builder: Builder, lens: [usize; 3], options: PooledOptions<'_, f32>| {
            builder.build(&DeviceInfo::H200).unwrap().run(
                &device.stream(),
                PooledVerifierArgs {
                    target: target.input_of(lens[0]),
                    drafts: drafts.input_of(lens[1]),
                    options,
                    out: PooledOut {
                        resample: resample.output_of(lens[2]),
                        positions: None,
                        islands: None,
                        counts: counts.output(),
                        pooled: None,
                        status: status.output(),
                    },
                    workspace: workspace.output(),
                    counters: counters.output(),
                },
            )
        };
        let none = PooledOptions::default;
        let length = |arg, need, got| Err(Error::Length { arg, need, got });
        let all = [240, 24, 24];
        assert_eq!(run(builder(), [239, 24, 24], none()), length("target", 120 * 2, 239));
        assert_eq!(run(builder(), [240, 23, 24], none()), length("drafts", 24, 23));
        assert_eq!(run(builder(), [240, 24, 23], none()), length("resample", 24, 23));
        let near = || PooledOptions { neighbours: Some(Neighbours::U16(ids.input_of(19))), ..none() };
        assert_eq!(run(builder().neighbours(2), all, near()), length("neighbours", 20, 19));
        let refused = |result, name: &str| {
            assert!(matches!(result, Err(Error::Unsupported { arg, .. }) if arg == name), "{result:?}");
        };
        refused(run(builder(), all, near()), "neighbours");
        refused(run(builder().neighbours(2), all, none()), "neighbours");
        refused(run(builder().guided(), all, none()), "target_free");
        refused(run(builder(), all, PooledOptions { guidance: Some(target.input_of(2)), ..none() }), "guidance");
        assert_eq!(run(builder(), all, none()), Ok(()));
    }
}
