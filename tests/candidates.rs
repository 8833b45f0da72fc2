//! Gated heads, selected candidates and backspaces: against oracles of their own, and the kernels against the host bit for bit.

#![cfg(feature = "verification")]

mod support;
mod verification;

use nextscale::dtype::Float;
use nextscale::verification::{
    Backspace, BackspaceArgs, BeamRank, BeamRankArgs, GatedSample, GatedSampleArgs, SelectCandidate,
    SelectCandidateArgs, status,
};
use nextscale::{DType, DeviceInfo, Error, bf16, philox};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, FLOATS, ForFloats, TestDevice, for_floats};
use verification::{Sampling, draft_draws, sample};

// ---- two heads ----

#[derive(Debug, Clone)]
struct Gated {
    vocab: usize,
    rows: usize,
    gap: usize,
    given: bool,
    truncated: bool,
    bad: bool,
    shift: usize,
    seed: u64,
}

struct Heads<T> {
    first: Vec<T>,
    second: Vec<T>,
    gate: Vec<f32>,
    temperature: Vec<f32>,
    top_k: Vec<i32>,
    seeds: Vec<i64>,
    positions: Vec<i64>,
    uniforms: Vec<f32>,
}

impl Gated {
    fn data<T: Float>(&self) -> Heads<T> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let stride = self.vocab + self.gap;
        let len = if self.rows == 0 { 0 } else { (self.rows - 1) * stride + self.vocab };
        let mut head = || -> Vec<T> { (0..len).map(|_| T::from_f32(rng.random_range(-4.0..4.0f32))).collect() };
        let (mut first, mut second) = (head(), head());
        if self.bad && self.rows > 0 {
            let r = rng.random_range(0..self.rows) * stride;
            match rng.random_range(0..3) {
                0 => first[r..r + self.vocab].fill(T::from_f32(f32::NAN)),
                1 => second[r..r + self.vocab].fill(T::from_f32(f32::NEG_INFINITY)),
                _ => first[r..r + self.vocab / 2].fill(T::from_f32(f32::NEG_INFINITY)),
            }
        }
        let mut of = |choices: &[f32]| -> Vec<f32> {
            (0..self.rows).map(|_| choices[rng.random_range(0..choices.len())]).collect()
        };
        Heads {
            first,
            second,
            gate: of(&[0.0, 1.0, 0.3, 0.75]),
            temperature: of(&[1.0, 0.0, 0.6]),
            top_k: of(&[0.0, 1.0, 9.0]).iter().map(|&k| k as i32).collect(),
            seeds: (0..self.rows).map(|_| rng.random()).collect(),
            positions: (0..self.rows).map(|_| rng.random_range(0..1 << 40)).collect(),
            uniforms: (0..self.rows * 3).map(|_| rng.random_range(0..1 << 24) as f32 / 16_777_216.0).collect(),
        }
    }

    fn run<T: Float>(&self, device: &TestDevice, data: &Heads<T>, info: &DeviceInfo) -> (Vec<i32>, Vec<u32>, Vec<u32>) {
        let plan = GatedSample::<T>::builder(self.rows, self.vocab)
            .row_stride((self.vocab + self.gap) as i64)
            .row_in_step(2)
            .fallback_token(-7)
            .build(info)
            .unwrap();
        let (first, second) =
            (Buffer::of(device, &data.first, self.shift), Buffer::of(device, &data.second, self.shift));
        let (gate, temperature) = (Buffer::of(device, &data.gate, 1), Buffer::of(device, &data.temperature, 1));
        let top_k = Buffer::of(device, &data.top_k, 1);
        let (seeds, positions) = (Buffer::of(device, &data.seeds, 1), Buffer::of(device, &data.positions, 1));
        let uniforms = Buffer::of(device, &data.uniforms, 1);
        let mut tokens = Buffer::<i32>::poisoned(device, self.rows, 1);
        let mut stats = Buffer::<f32>::poisoned(device, self.rows * 4, 1);
        let mut status = Buffer::<u32>::poisoned(device, self.rows, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        plan.run(
            &device.stream(),
            GatedSampleArgs {
                first: first.input(),
                second: second.input(),
                gate: gate.input(),
                temperature: Some(temperature.input()),
                top_k: self.truncated.then(|| top_k.input()),
                top_p: None,
                min_p: None,
                seeds: Some(seeds.input()),
                positions: Some(positions.input()),
                uniforms: self.given.then(|| uniforms.input()),
                tokens: tokens.output(),
                stats: Some(stats.output()),
                status: status.output(),
                workspace: workspace.output(),
            },
        )
        .unwrap();
        workspace.read();
        (tokens.read(), stats.read().iter().map(|x| x.to_bits()).collect(), status.read())
    }
}

fn gated() -> impl Strategy<Value = Gated> {
    let vocab = prop_oneof![4 => 1..60usize, 1 => 1000..1100usize, 1 => 2000..3100usize];
    (vocab, 0..5usize, 0..4usize, any::<[bool; 3]>(), 0..4usize, any::<u64>()).prop_map(
        |(vocab, rows, gap, [given, truncated, bad], shift, seed)| Gated {
            vocab,
            rows,
            gap,
            given,
            truncated,
            bad,
            shift,
            seed,
        },
    )
}

/// `swapped`: a wrong one, with the gate the other way round.
fn check_gated<T: Float>(case: &Gated, swapped: bool) -> Result<(), String> {
    let data = case.data::<T>();
    let (tokens, _, said) = case.run(&TestDevice::Host, &data, &DeviceInfo::H200);
    for r in 0..case.rows {
        let gate = if swapped { 1.0 - data.gate[r] } else { data.gate[r] };
        let logits: Vec<f64> = (0..case.vocab)
            .map(|column| {
                let at = r * (case.vocab + case.gap) + column;
                let (first, second) = (data.first[at].to_f32(), data.second[at].to_f32());
                match first == f32::NEG_INFINITY || second == f32::NEG_INFINITY {
                    true => f64::NEG_INFINITY,
                    false => f64::from(gate.mul_add(first - second, second)),
                }
            })
            .collect();
        let mut sampling = Sampling::at(data.temperature[r]);
        sampling.top_k = if case.truncated { data.top_k[r] } else { 0 };
        let mut margin = 1.0;
        let p = sampling.probabilities(&logits, false, &mut margin);
        let three = match case.given {
            true => [0, 1, 2].map(|k| data.uniforms[r * 3 + k]),
            false => draft_draws(data.seeds[r] as u64, data.positions[r] as u64, 2),
        };
        let token = match p.iter().filter(|&&p| p > 0.0).count() {
            0 => None,
            1 => p.iter().position(|&p| p > 0.0),
            _ => sample(&p, three, &mut margin),
        };
        if margin > 1e-4 && tokens[r] != token.map_or(-7, |token| token as i32) {
            return Err(format!("row {r}: {} instead of {token:?}", tokens[r]));
        }
        if (said[r] & status::TARGET_EMPTY != 0) != token.is_none() {
            return Err(format!("row {r}: status {}", said[r]));
        }
    }
    Ok(())
}

struct GatedOracle<'a>(&'a Gated);
impl ForFloats for GatedOracle<'_> {
    fn call<T: Float, O: Float>(self) {
        check_gated::<T>(self.0, false).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases() * 4, ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_the_definitions(case in gated(), dtype in 0..3usize) {
        for_floats(FLOATS[dtype], DType::F32, GatedOracle(&case));
    }
}

#[test]
fn a_gate_the_other_way_round_is_told() {
    let case = Gated { vocab: 40, rows: 30, gap: 0, given: false, truncated: false, bad: false, shift: 0, seed: 3 };
    check_gated::<f32>(&case, false).unwrap();
    check_gated::<f32>(&case, true).unwrap_err();
}

struct SameBits<'a>(&'a TestDevice, &'a Gated);
impl ForFloats for SameBits<'_> {
    fn call<T: Float, O: Float>(self) {
        let data = self.1.data::<T>();
        let host = self.1.run(&TestDevice::Host, &data, &DeviceInfo::H200);
        assert_eq!(self.1.run(self.0, &data, &DeviceInfo::H200), host);
        let mut small = DeviceInfo::A100;
        small.sm_count = 1;
        assert_eq!(self.1.run(self.0, &data, &small), host);
    }
}

#[test]
fn kernels_agree_with_the_host_bit_for_bit() {
    for device in TestDevice::kernels() {
        let config = ProptestConfig { cases: support::cases(), failure_persistence: None, ..ProptestConfig::default() };
        proptest::test_runner::TestRunner::new(config)
            .run(&(gated(), 0..3usize), |(case, dtype)| {
                for_floats(FLOATS[dtype], DType::F32, SameBits(&device, &case));
                Ok(())
            })
            .unwrap();
    }
}

// ---- one of several ----

type Selected = (Vec<i32>, Vec<i32>, Vec<u32>);

fn select(
    device: &TestDevice,
    scores: &[f32],
    candidates: usize,
    length: usize,
    temperature: &[f32],
    seeds: &[i64],
) -> Selected {
    let batch = temperature.len();
    let plan = SelectCandidate::new(batch, candidates, length, &DeviceInfo::H200).unwrap();
    let sequences: Vec<i32> = (0..(batch * candidates * length) as i32).collect();
    let (scores, sequences) = (Buffer::of(device, scores, 1), Buffer::of(device, &sequences, 1));
    let (temperature, seeds) = (Buffer::of(device, temperature, 1), Buffer::of(device, seeds, 1));
    let mut parents = Buffer::<i32>::poisoned(device, batch, 1);
    let mut selected = Buffer::<i32>::poisoned(device, batch * length, 1);
    let mut status = Buffer::<u32>::poisoned(device, batch, 1);
    plan.run(
        &device.stream(),
        SelectCandidateArgs {
            scores: scores.input(),
            sequences: Some(sequences.input()),
            temperature: Some(temperature.input()),
            seeds: Some(seeds.input()),
            positions: None,
            uniforms: None,
            parents: parents.output(),
            selected: Some(selected.output()),
            status: status.output(),
        },
    )
    .unwrap();
    (parents.read(), selected.read(), status.read())
}

/// Weights of exp(score / temperature), the sequence that goes with it, and best of n at temperature 0.
#[test]
fn candidates_are_selected_by_their_weights() {
    let mut rng = StdRng::seed_from_u64(9);
    for (candidates, length) in [(1, 0), (5, 7), (33, 1), (1024, 300)] {
        let batch = 40;
        let scores: Vec<f32> = (0..batch * candidates).map(|_| rng.random_range(-3.0..3.0f32)).collect();
        let temperature: Vec<f32> = (0..batch).map(|b| [1.0, 0.0, 0.5][b % 3]).collect();
        let seeds: Vec<i64> = (0..batch).map(|_| rng.random()).collect();
        let host = select(&TestDevice::Host, &scores, candidates, length, &temperature, &seeds);
        for device in TestDevice::kernels() {
            assert_eq!(select(&device, &scores, candidates, length, &temperature, &seeds), host);
        }
        for b in 0..batch {
            let of: Vec<f64> = scores[b * candidates..][..candidates].iter().map(|&x| x.into()).collect();
            let mut margin = 1.0;
            let p = Sampling::at(temperature[b]).probabilities(&of, false, &mut margin);
            let [x, y, z, _] = philox::block(seeds[b] as u64, 0, 11, 0).map(philox::uniform);
            let expected = match p.iter().filter(|&&p| p > 0.0).count() {
                1 => p.iter().position(|&p| p > 0.0),
                _ => sample(&p, [x, y, z], &mut margin),
            };
            if margin > 1e-4 {
                assert_eq!(Some(host.0[b] as usize), expected);
            }
            let first = (b * candidates + host.0[b] as usize) * length;
            let sequence: Vec<i32> = (first as i32..(first + length) as i32).collect();
            assert_eq!(host.1[b * length..][..length], sequence);
        }
    }
}

/// Importance resampling has the law of the weights; the wrong sign of the scores has not.
#[test]
fn resampling_has_its_law() {
    let batch = 60_000;
    let weights = [0.1f64, 0.4, 0.2, 0.25, 0.05];
    let apart = |sign: f32| {
        let scores: Vec<f32> = (0..batch).flat_map(|_| weights.map(|w| sign * w.ln() as f32)).collect();
        let seeds: Vec<i64> = (0..batch as i64).map(|b| b.wrapping_mul(0x9E37_79B9_7F4A_7C15u64 as i64)).collect();
        let (parents, ..) = select(&TestDevice::Host, &scores, 5, 0, &vec![1.0; batch], &seeds);
        let chi: f64 = weights
            .iter()
            .enumerate()
            .map(|(i, w)| {
                let count = parents.iter().filter(|&&parent| parent == i as i32).count() as f64;
                (count - w * batch as f64).powi(2) / (w * batch as f64)
            })
            .sum();
        (chi - 4.0) / 8f64.sqrt()
    };
    assert!(apart(1.0) < 4.0, "{}", apart(1.0));
    assert!(apart(-1.0) > 10.0);
}

/// Ties go to the first; NaN and -inf are not selected; where nothing can be it is 0, and said.
#[test]
fn bad_scores_harm_no_one_else() {
    let nothing = f32::NEG_INFINITY;
    let scores = [[2.0, 5.0, 5.0], [f32::NAN, nothing, -9.0], [nothing; 3], [f32::NAN; 3], [1.0, f32::INFINITY, 0.0]];
    for device in TestDevice::all() {
        for temperature in [0.0, 1.0] {
            let (parents, _, said) = select(&device, &scores.concat(), 3, 2, &[temperature; 5], &[0; 5]);
            if temperature == 0.0 {
                assert_eq!(parents[0], 1);
            }
            assert_eq!(parents[1..], [2, 0, 0, 1]);
            let empty = status::TARGET_EMPTY;
            let nan = status::TARGET_NAN;
            assert_eq!(said, [0, nan, empty, empty | nan, status::TARGET_BEYOND]);
        }
    }
}

// ---- beams ----

#[derive(Debug, Clone)]
struct Beams {
    vocab: usize,
    batch: usize,
    beams: usize,
    width: usize,
    gap: usize,
    ties: bool,
    bad: bool,
    shift: usize,
    seed: u64,
}

type Ranked = (Vec<i32>, Vec<i32>, Vec<u32>, Vec<u32>);

impl Beams {
    fn data<T: Float>(&self) -> (Vec<T>, Vec<f32>, Vec<f32>) {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let rows = self.batch * self.beams;
        let stride = self.vocab + self.gap;
        let len = if rows == 0 { 0 } else { (rows - 1) * stride + self.vocab };
        let grain = if self.ties { 1.0 } else { 1024.0 };
        let mut logits: Vec<T> =
            (0..len).map(|_| T::from_f32((rng.random_range(-4.0..4.0f32) * grain).round() / grain)).collect();
        let mut scores: Vec<f32> = (0..rows).map(|_| rng.random_range(-5.0..0.0f32)).collect();
        if self.bad && rows > 0 {
            let r = rng.random_range(0..rows);
            let row = r * stride..r * stride + self.vocab;
            match rng.random_range(0..5) {
                0 => logits[row].fill(T::from_f32(f32::NAN)),
                1 => logits[row.start..row.start + self.vocab / 2].fill(T::from_f32(f32::NEG_INFINITY)),
                2 => logits[row.start + rng.random_range(0..self.vocab)] = T::from_f32(f32::INFINITY),
                3 => scores[r] = f32::NEG_INFINITY,
                _ => scores[r] = f32::NAN,
            }
        }
        (logits, scores, (0..self.batch).map(|_| [1.0, 0.7][rng.random_range(0..2)]).collect())
    }

    fn run<T: Float>(&self, device: &TestDevice, data: &(Vec<T>, Vec<f32>, Vec<f32>), info: &DeviceInfo) -> Ranked {
        let stride = Some((self.vocab + self.gap) as i64);
        let plan = BeamRank::<T>::new(self.batch, self.beams, self.width, self.vocab, stride, info).unwrap();
        let (logits, scores) = (Buffer::of(device, &data.0, self.shift), Buffer::of(device, &data.1, 1));
        let temperature = Buffer::of(device, &data.2, 1);
        let out = self.batch * self.width;
        let mut parents = Buffer::<i32>::poisoned(device, out, 1);
        let mut tokens = Buffer::<i32>::poisoned(device, out, 1);
        let mut best = Buffer::<f32>::poisoned(device, out, 1);
        let mut status = Buffer::<u32>::poisoned(device, self.batch, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(device, &vec![0u32; plan.counter_words()], 1);
        plan.run(
            &device.stream(),
            BeamRankArgs {
                logits: logits.input(),
                scores: scores.input(),
                temperature: Some(temperature.input()),
                parents: parents.output(),
                tokens: tokens.output(),
                best: best.output(),
                status: status.output(),
                workspace: workspace.output(),
                counters: counters.output(),
            },
        )
        .unwrap();
        workspace.read();
        assert!(counters.read().iter().all(|&count| count == 0));
        (parents.read(), tokens.read(), best.read().iter().map(|x| x.to_bits()).collect(), status.read())
    }
}

fn beams() -> impl Strategy<Value = Beams> {
    let vocab = prop_oneof![4 => 1..60usize, 1 => 1000..1100usize, 1 => 2000..3100usize];
    (vocab, 0..4usize, 1..6usize, 1..33usize, 0..4usize, any::<[bool; 2]>(), 0..4usize, any::<u64>()).prop_map(
        |(vocab, batch, beams, width, gap, [ties, bad], shift, seed)| Beams {
            vocab,
            batch,
            beams,
            width,
            gap,
            ties,
            bad,
            shift,
            seed,
        },
    )
}

/// By sorting all pairs. `alone`: a wrong one, without the beams' scores.
fn check_beams<T: Float>(case: &Beams, alone: bool) -> Result<(), String> {
    let data = case.data::<T>();
    let (parents, tokens, best, _) = case.run(&TestDevice::Host, &data, &DeviceInfo::H200);
    for b in 0..case.batch {
        let mut all: Vec<(f64, usize, f64, usize)> = Vec::new();
        for beam in 0..case.beams {
            let r = b * case.beams + beam;
            let logits: Vec<f64> = (0..case.vocab)
                .map(|column| f64::from(data.0[r * (case.vocab + case.gap) + column].to_f32()))
                .collect();
            let p = Sampling::at(data.2[b]).probabilities(&logits, false, &mut 1.0);
            let score = if alone { 0.0 } else { f64::from(data.1[r]) };
            if score.is_nan() {
                continue;
            }
            all.extend(
                (0..case.vocab).filter(|&x| p[x] > 0.0).map(|x| (score + p[x].ln(), beam, -(logits[x] + 0.0), x)),
            );
        }
        all.retain(|of| of.0 > f64::NEG_INFINITY);
        all.sort_by(|x, y| y.0.total_cmp(&x.0).then(x.1.cmp(&y.1)).then(x.2.total_cmp(&y.2)).then(x.3.cmp(&y.3)));
        for n in 0..case.width {
            let at = b * case.width + n;
            let got = f64::from(f32::from_bits(best[at]));
            match all.get(n) {
                None if (parents[at], tokens[at]) == (-1, -1) && got == f64::NEG_INFINITY => {}
                None => return Err(format!("{n}: {} {}", parents[at], tokens[at])),
                Some(&(score, beam, _, token)) => {
                    if (got - score).abs() > 1e-4 {
                        return Err(format!("{n}: {got} instead of {score}"));
                    }
                    // In f32 close ones may change places.
                    let near = |other: usize| {
                        all.get(other).is_some_and(|of| (of.0 - score).abs() < 1e-4 && (of.1, of.2) != (beam, all[n].2))
                    };
                    let close = near(n + 1) || (n > 0 && near(n - 1));
                    let close = close || all.iter().filter(|of| (of.0 - score).abs() < 1e-4).any(|of| of.1 != beam);
                    if !close && (parents[at], tokens[at]) != (beam as i32, token as i32) {
                        return Err(format!("{n}: {} {} instead of {beam} {token}", parents[at], tokens[at]));
                    }
                }
            }
        }
    }
    Ok(())
}

struct BeamsOracle<'a>(&'a Beams);
impl ForFloats for BeamsOracle<'_> {
    fn call<T: Float, O: Float>(self) {
        check_beams::<T>(self.0, false).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases() * 4, ..ProptestConfig::default() })]

    #[test]
    fn beams_agree_with_a_sort(case in beams(), dtype in 0..3usize) {
        for_floats(FLOATS[dtype], DType::F32, BeamsOracle(&case));
    }
}

#[test]
fn beams_without_their_scores_are_told() {
    let case = Beams { vocab: 50, batch: 5, beams: 4, width: 8, gap: 0, ties: false, bad: false, shift: 0, seed: 3 };
    check_beams::<f32>(&case, false).unwrap();
    check_beams::<f32>(&case, true).unwrap_err();
}

struct SameBeams<'a>(&'a TestDevice, &'a Beams);
impl ForFloats for SameBeams<'_> {
    fn call<T: Float, O: Float>(self) {
        let data = self.1.data::<T>();
        let host = self.1.run(&TestDevice::Host, &data, &DeviceInfo::H200);
        assert_eq!(self.1.run(self.0, &data, &DeviceInfo::H200), host);
        let mut small = DeviceInfo::A100;
        small.sm_count = 1;
        assert_eq!(self.1.run(self.0, &data, &small), host);
    }
}

#[test]
fn beams_agree_with_the_host_bit_for_bit() {
    for device in TestDevice::kernels() {
        let config = ProptestConfig { cases: support::cases(), failure_persistence: None, ..ProptestConfig::default() };
        proptest::test_runner::TestRunner::new(config)
            .run(&(beams(), 0..3usize), |(case, dtype)| {
                for_floats(FLOATS[dtype], DType::F32, SameBeams(&device, &case));
                Ok(())
            })
            .unwrap();
        let most =
            Beams { vocab: 9000, batch: 1, beams: 32, width: 32, gap: 0, ties: true, bad: false, shift: 1, seed: 1 };
        let fewer = if device.is_emulated() { Beams { beams: 3, ..most } } else { most };
        SameBeams(&device, &fewer).call::<bf16, f32>();
    }
}

// ---- backspaces ----

type Appended = (Vec<i32>, Vec<i32>, Vec<i32>, Vec<u32>);

fn append(device: &TestDevice, emitted: &[i32], least: Option<&[i32]>, start: (&[i32], &[i32])) -> Appended {
    let batch = start.1.len();
    let (most, capacity) = (emitted.len() / batch.max(1), start.0.len() / batch.max(1));
    let plan = Backspace::new(batch, most, capacity, 9, &DeviceInfo::H200).unwrap();
    let emitted = Buffer::of(device, emitted, 1);
    let least = least.map(|least| Buffer::of(device, least, 1));
    let mut sequences = Buffer::of(device, start.0, 1);
    let mut lengths = Buffer::of(device, start.1, 1);
    let mut kept = Buffer::<i32>::poisoned(device, batch, 1);
    let mut status = Buffer::<u32>::poisoned(device, batch, 1);
    plan.run(
        &device.stream(),
        BackspaceArgs {
            emitted: emitted.input(),
            least: least.as_ref().map(Buffer::input),
            sequences: sequences.output(),
            lengths: lengths.output(),
            kept: kept.output(),
            status: status.output(),
        },
    )
    .unwrap();
    (sequences.read(), lengths.read(), kept.read(), status.read())
}

#[test]
fn backspaces_by_hand() {
    for device in TestDevice::all() {
        let emitted = [[1, 9, 2, 3, -1], [9, 9, 9, 4, 9], [5, 6, 7, 8, 1], [9, 9, -5, 1, 2]].concat();
        let start = [[7, 0, 0, 0], [7, 7, 0, 0], [7, 7, 0, 0], [7, 7, 7, 0]].concat();
        let (sequences, lengths, kept, said) = append(&device, &emitted, None, (&start, &[1, 2, 2, 3]));
        assert_eq!(sequences, [[7, 2, 3, 0], [4, 7, 0, 0], [7, 7, 5, 6], [7, 7, 7, 0]].concat());
        assert_eq!((lengths, kept), (vec![3, 0, 4, 1], vec![1, 0, 2, 1]));
        assert_eq!(said, [0, 0, status::SEQUENCE_FULL, 0]);
        // What is never taken away, and lengths that are none.
        let (_, lengths, kept, _) = append(&device, &emitted, Some(&[1, 2, -3, 2]), (&start, &[-4, 2, 100, 3]));
        assert_eq!((lengths, kept), (vec![3, 2, 4, 2], vec![0, 2, 4, 2]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn backspaces_agree_with_a_stack(
        emitted in prop::collection::vec(-1..12i32, 300 * 4), lengths in prop::collection::vec(0..7i32, 300),
    ) {
        let start = vec![77; 300 * 6];
        let host = append(&TestDevice::Host, &emitted, None, (&start, &lengths));
        for b in 0..300 {
            let mut stack: Vec<i32> = start[..lengths[b] as usize].to_vec();
            let mut kept = stack.len();
            for &token in emitted[b * 4..][..4].iter().take_while(|&&token| token >= 0) {
                match token {
                    9 => drop(stack.pop()),
                    _ if stack.len() < 6 => stack.push(token),
                    _ => {}
                }
                kept = kept.min(stack.len());
            }
            prop_assert_eq!(&host.0[b * 6..][..stack.len()], &stack[..]);
            prop_assert_eq!((host.1[b], host.2[b]), (stack.len() as i32, kept as i32));
        }
        for device in TestDevice::kernels() {
            prop_assert_eq!(&append(&device, &emitted, None, (&start, &lengths)), &host);
        }
    }
}

#[test]
fn bad_plans_and_buffers_are_refused() {
    let info = &DeviceInfo::H200;
    let size = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    size(GatedSample::<f32>::builder(1, 0).build(info).map(drop), "vocab");
    size(GatedSample::<f32>::builder((1 << 20) + 1, 1).build(info).map(drop), "rows");
    size(GatedSample::<f32>::builder(1, 1).row_in_step(1024).build(info).map(drop), "row_in_step");
    assert!(matches!(GatedSample::<bf16>::builder(2, 5).row_stride(4).build(info), Err(Error::Stride { .. })));
    size(BeamRank::<f32>::new(1, 1, 1, 0, None, info).map(drop), "vocab");
    size(BeamRank::<f32>::new(1, 33, 1, 9, None, info).map(drop), "beams");
    size(BeamRank::<f32>::new(1, 1, 0, 9, None, info).map(drop), "width");
    assert!(matches!(BeamRank::<f32>::new(1, 2, 1, 9, Some(8), info), Err(Error::Stride { .. })));
    size(SelectCandidate::new(1, 0, 1, info).map(drop), "candidates");
    size(SelectCandidate::new(1, 1025, 1, info).map(drop), "candidates");
    size(SelectCandidate::new((1 << 20) + 1, 1, 1, info).map(drop), "batch");
    size(SelectCandidate::new(1, 1, 1 << 31, info).map(drop), "length");
    size(Backspace::new(1 << 31, 1, 1, 0, info).map(drop), "batch");
    size(Backspace::new(1, 1, 1, 1 << 31, info).map(drop), "token");
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(Backspace::new(1, 1, 1, 0, &old), Err(Error::UnsupportedDevice { .. })));
    for device in TestDevice::all() {
        let plan = SelectCandidate::new(2, 3, 4, info).unwrap();
        let (scores, ids) = (Buffer::of(&device, &[0f32; 6], 0), Buffer::of(&device, &[0i32; 24], 0));
        let mut parents = Buffer::<i32>::poisoned(&device, 2, 0);
        let mut selected = Buffer::<i32>::poisoned(&device, 8, 0);
        let mut status = Buffer::<u32>::poisoned(&device, 2, 0);
        let mut run = |lens: [usize; 3], out: bool| {
            plan.run(
                &device.stream(),
                SelectCandidateArgs {
                    scores: scores.input_of(lens[0]),
                    sequences: Some(ids.input_of(lens[1])),
                    temperature: None,
                    seeds: None,
                    positions: None,
                    uniforms: None,
                    parents: parents.output_of(lens[2]),
                    selected: out.then(|| selected.output()),
                    status: status.output(),
                },
            )
        };
        let length = |arg, need, got| Err(Error::Length { arg, need, got });
        assert_eq!(run([5, 24, 2], true), length("scores", 6, 5));
        assert_eq!(run([6, 23, 2], true), length("sequences", 24, 23));
        assert_eq!(run([6, 24, 1], true), length("parents", 2, 1));
        assert!(matches!(run([6, 24, 2], false), Err(Error::Unsupported { arg: "selected", .. })));
        assert_eq!(run([6, 24, 2], true), Ok(()));
    }
}
