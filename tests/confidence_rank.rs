//! Ranking by confidence against an oracle in f64, the kernels against the host bit for bit, and the law of noisy ranks.

#![cfg(feature = "verification")]

mod support;
mod verification;

use nextscale::dtype::Float;
use nextscale::verification::{Confidence, ConfidenceOut, ConfidenceRank, ConfidenceRankArgs, status};
use nextscale::{DType, DeviceInfo, Error, bf16, philox};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, FLOATS, ForFloats, TestDevice, for_floats};
use verification::{Sampling, sample};

const KINDS: [Confidence; 4] =
    [Confidence::Probability, Confidence::LogProbability, Confidence::Margin, Confidence::Entropy];

#[derive(Debug, Clone)]
struct Case {
    vocab: usize,
    batch: usize,
    length: usize,
    kind: usize,
    step: u32,
    /// mask, temperature, truncation, threshold, noise, bad rows, gap, ties
    with: [bool; 8],
    shift: usize,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    (
        prop_oneof![4 => 1..60usize, 1 => 1000..1100usize, 1 => 2000..3100usize],
        0..4usize,
        1..12usize,
        0..4usize,
        0..9u32,
        proptest::array::uniform8(any::<bool>()),
        0..4usize,
        any::<u64>(),
    )
        .prop_map(|(vocab, batch, length, kind, step, with, shift, seed)| Case {
            vocab,
            batch,
            length,
            kind,
            step,
            with,
            shift,
            seed,
        })
}

struct Data<T> {
    logits: Vec<T>,
    masked: Vec<u8>,
    temperature: Vec<f32>,
    top_k: Vec<i32>,
    threshold: Vec<f32>,
    counts: Vec<i32>,
    noise: Vec<f32>,
    seeds: Vec<i64>,
    positions: Vec<i64>,
}

#[derive(Debug, PartialEq)]
struct Ranked {
    tokens: Vec<i32>,
    candidates: Vec<i32>,
    /// Bits.
    confidence: Vec<u32>,
    committed: Vec<i32>,
    status: Vec<u32>,
}

impl Case {
    fn stride(&self) -> usize {
        self.vocab + if self.with[6] { 3 } else { 0 }
    }

    fn data<T: Float>(&self) -> Data<T> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let rows = self.batch * self.length;
        let len = if rows == 0 { 0 } else { (rows - 1) * self.stride() + self.vocab };
        let grain = if self.with[7] { 1.0 } else { 1024.0 };
        let mut logits: Vec<T> =
            (0..len).map(|_| T::from_f32((rng.random_range(-4.0..4.0f32) * grain).round() / grain)).collect();
        if self.with[5] && rows > 0 {
            for _ in 0..3 {
                let row = rng.random_range(0..rows) * self.stride();
                let row = row..row + self.vocab;
                match rng.random_range(0..4) {
                    0 => logits[row].fill(T::from_f32(f32::NAN)),
                    1 => logits[row].fill(T::from_f32(f32::NEG_INFINITY)),
                    2 => logits[row.start + rng.random_range(0..self.vocab)] = T::from_f32(f32::NAN),
                    _ => logits[row.start + rng.random_range(0..self.vocab)] = T::from_f32(f32::INFINITY),
                }
            }
        }
        let mut of = |choices: &[f32]| -> Vec<f32> {
            (0..self.batch).map(|_| choices[rng.random_range(0..choices.len())]).collect()
        };
        let (temperature, noise) = (of(&[1.0, 0.0, 0.6, 1.6]), of(&[0.5, 0.0, 2.0]));
        let thresholds: &[f32] = match KINDS[self.kind] {
            Confidence::LogProbability => &[-0.1, -1.0, -3.0, 1.0],
            Confidence::Entropy => &[-0.5, -2.0, 1.0],
            _ => &[0.9, 0.3, 0.05, 2.0],
        };
        Data {
            logits,
            temperature,
            noise,
            top_k: of(&[0.0, 1.0, 20.0]).iter().map(|&k| k as i32).collect(),
            threshold: of(thresholds),
            counts: of(&[0.0, 1.0, 3.0, 100.0, -1.0]).iter().map(|&n| n as i32).collect(),
            masked: (0..rows).map(|_| u8::from(rng.random_bool(0.7)) * 3).collect(),
            seeds: (0..self.batch).map(|_| rng.random()).collect(),
            positions: (0..self.batch).map(|_| rng.random_range(0..1 << 40)).collect(),
        }
    }

    fn run<T: Float>(&self, device: &TestDevice, data: &Data<T>, info: &DeviceInfo) -> Ranked {
        let plan = ConfidenceRank::<T>::builder(self.batch, self.length, self.vocab)
            .row_stride(self.stride() as i64)
            .confidence(KINDS[self.kind])
            .step(self.step)
            .build(info)
            .unwrap();
        let [mask, temperature, truncation, threshold, noise, ..] = self.with;
        let rows = self.batch * self.length;
        let logits = Buffer::of(device, &data.logits, self.shift);
        let masked = Buffer::of(device, &data.masked, 1);
        let of_temperature = Buffer::of(device, &data.temperature, 1);
        let (top_k, of_threshold) = (Buffer::of(device, &data.top_k, 1), Buffer::of(device, &data.threshold, 1));
        let (counts, of_noise) = (Buffer::of(device, &data.counts, 1), Buffer::of(device, &data.noise, 1));
        let (seeds, positions) = (Buffer::of(device, &data.seeds, 1), Buffer::of(device, &data.positions, 1));
        let mut tokens = Buffer::<i32>::poisoned(device, rows, 1);
        let mut candidates = Buffer::<i32>::poisoned(device, rows, 1);
        let mut confidence = Buffer::<f32>::poisoned(device, rows, 1);
        let mut committed = Buffer::<i32>::poisoned(device, self.batch, 1);
        let mut status = Buffer::<u32>::poisoned(device, self.batch, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(device, &vec![0u32; plan.counter_words()], 1);
        plan.run(
            &device.stream(),
            ConfidenceRankArgs {
                logits: logits.input(),
                masked: mask.then(|| masked.input()),
                temperature: temperature.then(|| of_temperature.input()),
                top_k: truncation.then(|| top_k.input()),
                top_p: None,
                min_p: None,
                threshold: threshold.then(|| of_threshold.input()),
                counts: counts.input(),
                noise: noise.then(|| of_noise.input()),
                seeds: Some(seeds.input()),
                positions: Some(positions.input()),
                out: ConfidenceOut {
                    tokens: tokens.output(),
                    candidates: Some(candidates.output()),
                    confidence: Some(confidence.output()),
                    committed: committed.output(),
                    status: status.output(),
                },
                workspace: workspace.output(),
                counters: counters.output(),
            },
        )
        .unwrap();
        workspace.read();
        assert!(counters.read().iter().all(|&count| count == 0));
        Ranked {
            tokens: tokens.read(),
            candidates: candidates.read(),
            confidence: confidence.read().iter().map(|x| x.to_bits()).collect(),
            committed: committed.read(),
            status: status.read(),
        }
    }
}

/// What a wrong implementation does.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Flaw {
    None,
    /// Confidence at the temperature of the candidates.
    AtTemperature,
    /// Ties go to the last row.
    LastFirst,
    /// Above or at the threshold it commits only as many as the count.
    CountsAlways,
}

fn check<T: Float>(case: &Case, flaw: Flaw) -> Result<(), String> {
    let data = case.data::<T>();
    let ranked = case.run(&TestDevice::Host, &data, &DeviceInfo::H200);
    let [mask, temperature, truncation, threshold, noise, ..] = case.with;
    for b in 0..case.batch {
        let mut margin = 1.0;
        let rows = b * case.length..(b + 1) * case.length;
        let mut scores: Vec<Option<(f64, f64)>> = Vec::new();
        for r in rows.clone() {
            if mask && data.masked[r] == 0 {
                if ranked.candidates[r] != -1 || !f32::from_bits(ranked.confidence[r]).is_nan() {
                    return Err(format!("row {r} is not masked"));
                }
                scores.push(None);
                continue;
            }
            let i = (r - rows.start) as u64;
            let logits: Vec<f64> =
                (0..case.vocab).map(|column| f64::from(data.logits[r * case.stride() + column].to_f32())).collect();
            let mut of_candidate = Sampling::at(if temperature { data.temperature[b] } else { 0.0 });
            of_candidate.top_k = if truncation { data.top_k[b] } else { 0 };
            let p = of_candidate.probabilities(&logits, false, &mut margin);
            let block =
                |use_: u32| philox::block(data.seeds[b] as u64, data.positions[b] as u64 + i, use_ | case.step << 8, 0);
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let candidate = match p.iter().filter(|&&p| p > 0.0).count() {
                0 => None,
                1 => p.iter().position(|&p| p > 0.0),
                _ => {
                    let [x, y, z, _] = block(9).map(philox::uniform);
                    sample(&p, [x, y, z], &mut margin)
                }
            };
            let at = if flaw == Flaw::AtTemperature { of_candidate } else { Sampling::PLAIN };
            let mut sure = at.probabilities(&logits, false, &mut 1.0);
            let of = candidate.map(|x| {
                // Without a spread the rank of the second is 0 all the same.
                let own = if top.is_infinite() && logits[x] == top { 1.0 } else { sure[x] };
                match KINDS[case.kind] {
                    Confidence::Probability => own,
                    Confidence::LogProbability => own.ln(),
                    Confidence::Margin => {
                        sure.sort_by(|a, b| b.total_cmp(a));
                        sure[0] - sure.get(1).copied().unwrap_or(0.0)
                    }
                    _ => sure.iter().filter(|&&p| p > 0.0).map(|p| p * p.ln()).sum(),
                }
            });
            if margin > 1e-4 {
                if ranked.candidates[r] != candidate.map_or(-1, |x| x as i32) {
                    return Err(format!("row {r}: {} instead of {candidate:?}", ranked.candidates[r]));
                }
                let got = f64::from(f32::from_bits(ranked.confidence[r]));
                let close = of.map_or(got.is_nan(), |of| (got - of).abs() < 2e-5 * (1.0 + of.abs()) || got == of);
                if !close {
                    return Err(format!("row {r}: {got} instead of {of:?}"));
                }
            }
            let noise = if noise { f64::from(data.noise[b]) } else { 0.0 };
            scores.push(of.map(|of| {
                let variate = -((f64::from(block(10)[0]) + 0.5) / 4_294_967_296.0).log2();
                (of, if noise > 0.0 { of / noise - variate.ln() + 2f64.ln().ln() } else { of })
            }));
        }
        let above =
            |score: &Option<(f64, f64)>| score.is_some_and(|(of, _)| threshold && of > f64::from(data.threshold[b]));
        for score in scores.iter().flatten() {
            margin = margin.min((score.0 - f64::from(data.threshold[b])).abs());
        }
        let mut order: Vec<usize> = (0..scores.len()).filter(|&i| scores[i].is_some()).collect();
        let score = |i: usize| scores[i].unwrap().1;
        order.sort_by(|&i, &j| {
            let tie = if flaw == Flaw::LastFirst { j.cmp(&i) } else { i.cmp(&j) };
            score(j).total_cmp(&score(i)).then(tie)
        });
        let n = usize::try_from(data.counts[b]).map_or(order.len(), |n| n.min(order.len()));
        let any = scores.iter().any(above) && flaw != Flaw::CountsAlways;
        let expected: Vec<bool> = match any {
            true => scores.iter().map(above).collect(),
            false => (0..scores.len()).map(|i| order[..n].contains(&i)).collect(),
        };
        if !any && n > 0 && n < order.len() {
            // Rows that are the same tie exactly; others must be apart.
            let same = |i: usize, j: usize| {
                let of = |i: usize| {
                    let at = (rows.start + i) * case.stride();
                    data.logits[at..at + case.vocab].iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>()
                };
                of(i) == of(j) && !noise && !temperature
            };
            for &i in &order[..n] {
                for &j in &order[n..] {
                    if !same(i, j) && score(i).is_finite() {
                        margin = margin.min((score(i) - score(j)).abs() / (1.0 + score(i).abs()));
                    }
                }
            }
        }
        if margin < 1e-4 {
            continue;
        }
        for (i, &commits) in expected.iter().enumerate() {
            let r = rows.start + i;
            let token = if commits { ranked.candidates[r] } else { -1 };
            if ranked.tokens[r] != token {
                return Err(format!("row {r}: {} instead of {token}; {scores:?}", ranked.tokens[r]));
            }
        }
        let committed = expected.iter().filter(|&&commits| commits).count() as i32;
        if ranked.committed[b] != committed {
            return Err(format!("request {b}: {} instead of {committed}", ranked.committed[b]));
        }
    }
    Ok(())
}

struct Oracle<'a>(&'a Case);
impl ForFloats for Oracle<'_> {
    fn call<T: Float, O: Float>(self) {
        check::<T>(self.0, Flaw::None).unwrap();
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
    Case { vocab: 40, batch: 30, length: 9, kind: 0, step: 3, with: [false; 8], shift: 0, seed: 3 }
}

/// The comparison must be able to fail.
#[test]
fn wrong_ranks_are_told() {
    let warm = [true, true, false, false, false, false, false, false];
    let thresholds = [false, false, false, true, false, false, false, false];
    // Two logits: many rows are the same.
    let ties = Case { vocab: 2, with: [false, false, false, false, false, false, false, true], ..plain() };
    for (case, flaw) in [
        (Case { with: warm, ..plain() }, Flaw::AtTemperature),
        (ties, Flaw::LastFirst),
        (Case { with: thresholds, ..plain() }, Flaw::CountsAlways),
    ] {
        check::<f32>(&case, Flaw::None).unwrap();
        check::<f32>(&case, flaw).expect_err(&format!("{flaw:?}"));
    }
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

/// More rows than a block has threads.
#[test]
fn long_sequences_and_every_dtype_at_the_edges() {
    for device in TestDevice::kernels() {
        let lengths = if device.is_emulated() { vec![257] } else { vec![255, 256, 257, 600, 5000] };
        let lengths = lengths.into_iter().flat_map(|length| [(length, DType::BF16)]);
        for (i, (length, dtype)) in lengths.chain(FLOATS.map(|dtype| (5, dtype))).enumerate() {
            let mut with = [true; 8];
            with[3] = i % 2 == 1;
            let case = Case { vocab: 3, batch: 1 + i % 2, length, kind: i % 4, with, ..plain() };
            for_floats(dtype, DType::F32, SameBits(&device, &case));
        }
    }
}

/// However the plan cuts the work, and whatever else is in the batch; bad rows harm no other request.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for device in TestDevice::all() {
        let case = Case {
            vocab: 1500,
            batch: 3,
            length: 5,
            with: [true, true, true, false, true, false, false, false],
            ..plain()
        };
        let data = case.data::<bf16>();
        let all = case.run(&device, &data, &DeviceInfo::H200);
        let mut small = DeviceInfo::A100;
        small.sm_count = 1;
        assert_eq!(case.run(&device, &data, &small), all);
        let mut bad = case.data::<bf16>();
        bad.logits[6 * 1500..7 * 1500].fill(bf16::NAN);
        bad.masked[6] = 1;
        let harmed = case.run(&device, &bad, &DeviceInfo::H200);
        assert_eq!(harmed.status, [0, status::TARGET_NAN | status::TARGET_EMPTY, 0]);
        assert_eq!(harmed.candidates[6], -1);
        assert_eq!((&harmed.tokens[..5], &harmed.tokens[10..]), (&all.tokens[..5], &all.tokens[10..]));
        let mut one = Case { batch: 1, shift: 3, ..case.clone() }.data::<bf16>();
        one.logits = data.logits[10 * 1500..].to_vec();
        one.masked = data.masked[10..].to_vec();
        (one.temperature, one.top_k) = (vec![data.temperature[2]], vec![data.top_k[2]]);
        (one.counts, one.noise) = (vec![data.counts[2]], vec![data.noise[2]]);
        (one.seeds, one.positions) = (vec![data.seeds[2]], vec![data.positions[2]]);
        let alone = Case { batch: 1, shift: 3, ..case }.run(&device, &one, &DeviceInfo::H200);
        assert_eq!((&alone.tokens[..], &alone.confidence[..]), (&all.tokens[10..], &all.confidence[10..]));
    }
}

/// With noise the first rank is drawn by the softmax of confidence / noise.
#[test]
fn noisy_ranks_have_their_law() {
    let batch = 40_000;
    let row = |p: f32| [p.ln(), (1.0 - p).ln()];
    let logits: Vec<f32> = (0..batch).flat_map(|_| [row(0.9), row(0.7), row(0.55)].concat()).collect();
    let case =
        Case { vocab: 2, batch, length: 3, with: [false, false, false, false, true, false, false, false], ..plain() };
    for (kind, weights) in [(0, [0.9f64, 0.7, 0.55].map(|c| (c / 0.5).exp())), (1, [0.9f64, 0.7, 0.55].map(|c| c * c))]
    {
        let case = Case { kind, ..case.clone() };
        let mut data = case.data::<f32>();
        (data.logits, data.noise, data.counts) = (logits.clone(), vec![0.5; batch], vec![1; batch]);
        let ranked = case.run(&TestDevice::Host, &data, &DeviceInfo::H200);
        let all: f64 = weights.iter().sum();
        for (i, weight) in weights.iter().enumerate() {
            let count = (0..batch).filter(|b| ranked.tokens[b * 3 + i] >= 0).count() as f64;
            let p = weight / all;
            let apart = (count - p * batch as f64) / (batch as f64 * p * (1.0 - p)).sqrt();
            assert!(apart.abs() < 4.5, "{kind} {i}: {apart}");
        }
    }
}

#[test]
fn bad_plans_and_buffers_are_refused() {
    let build = |b: nextscale::verification::ConfidenceRankBuilder<f32>| b.build(&DeviceInfo::H200).map(|_| ());
    let size = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    let builder = ConfidenceRank::<f32>::builder;
    assert_eq!(build(builder(2, 3, 4)), Ok(()));
    size(build(builder(1, 1, 0)), "vocab");
    size(build(builder(1, 1, (1 << 24) + 1)), "vocab");
    size(build(builder((1 << 20) + 1, 1, 1)), "batch");
    size(build(builder(1, 0, 1)), "length");
    size(build(builder(1, (1 << 20) + 1, 1)), "length");
    size(build(builder(1 << 12, 1 << 20, 1)), "rows");
    size(build(builder(1, 1, 1).step(1 << 24)), "step");
    assert!(matches!(build(builder(2, 3, 4).row_stride(3)), Err(Error::Stride { .. })));
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder(1, 1, 1).build(&old), Err(Error::UnsupportedDevice { .. })));
    for device in TestDevice::all() {
        let plan = builder(2, 3, 4).build(&DeviceInfo::H200).unwrap();
        let (logits, counts) = (Buffer::of(&device, &[0f32; 24], 0), Buffer::of(&device, &[1; 2], 0));
        let mut tokens = Buffer::<i32>::poisoned(&device, 6, 0);
        let mut committed = Buffer::<i32>::poisoned(&device, 2, 0);
        let mut status = Buffer::<u32>::poisoned(&device, 2, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(&device, &[0u32; 2], 0);
        let mut run = |lens: [usize; 3]| {
            plan.run(
                &device.stream(),
                ConfidenceRankArgs {
                    logits: logits.input_of(lens[0]),
                    masked: None,
                    temperature: None,
                    top_k: None,
                    top_p: None,
                    min_p: None,
                    threshold: None,
                    counts: counts.input_of(lens[1]),
                    noise: None,
                    seeds: None,
                    positions: None,
                    out: ConfidenceOut {
                        tokens: tokens.output_of(lens[2]),
                        candidates: None,
                        confidence: None,
                        committed: committed.output(),
                        status: status.output(),
                    },
                    workspace: workspace.output(),
                    counters: counters.output(),
                },
            )
        };
        let length = |arg, need, got| Err(Error::Length { arg, need, got });
        assert_eq!(run([23, 2, 6]), length("logits", 24, 23));
        assert_eq!(run([24, 1, 6]), length("counts", 2, 1));
        assert_eq!(run([24, 2, 5]), length("tokens", 6, 5));
        assert_eq!(run([24, 2, 6]), Ok(()));
    }
}
