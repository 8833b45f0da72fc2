//! Typical acceptance of chains and candidate paths against an oracle in f64, and the kernels against the host bit for bit.

#![cfg(feature = "verification")]

mod support;
mod verification;

use nextscale::dtype::Float;
use nextscale::verification::{
    Accepted, Emitted, TypicalOut, TypicalVerifier, TypicalVerifierArgs, TypicalVerifierBuilder, status,
};
use nextscale::{DType, DeviceInfo, Error, bf16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, FLOATS, ForFloats, TestDevice, for_floats};
use verification::{Sampling, draws, sample};

#[derive(Debug, Clone)]
struct Case {
    vocab: usize,
    batch: usize,
    nodes: usize,
    /// 0: a chain.
    paths: usize,
    depth: usize,
    /// row_index, greedy, uniforms, bad rows, gap
    with: [bool; 5],
    shift: usize,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    (
        prop_oneof![4 => 1..40usize, 1 => 1000..1100usize, 1 => 2000..3100usize],
        0..4usize,
        1..9usize,
        0..12usize,
        1..6usize,
        proptest::array::uniform5(any::<bool>()),
        0..4usize,
        any::<u64>(),
    )
        .prop_map(|(vocab, batch, nodes, paths, depth, with, shift, seed)| Case {
            vocab,
            batch,
            nodes,
            paths,
            depth: if paths == 0 { nodes } else { depth },
            with,
            shift,
            seed,
        })
}

struct Data<T> {
    target: Vec<T>,
    drafts: Vec<i32>,
    paths: Vec<i32>,
    row_index: Vec<i32>,
    temperature: Vec<f32>,
    seeds: Vec<i64>,
    positions: Vec<i64>,
    uniforms: Vec<f32>,
}

#[derive(Debug, PartialEq)]
struct Decided {
    tokens: Vec<i32>,
    emitted: Vec<Emitted>,
    accepted: Vec<Accepted>,
    nodes: Vec<i32>,
    path: Vec<i32>,
    last_row: Vec<i32>,
    status: Vec<u32>,
}

/// What a wrong implementation does.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Flaw {
    None,
    /// The threshold is alpha alone.
    NoEntropy,
    /// The first of the longest paths, whatever its probability.
    FirstLongest,
    /// Accepts behind a draft that is not.
    NoPrefix,
}

const EPSILON: f32 = 0.25;
const ALPHA: f32 = 0.4;

impl Case {
    fn stride(&self) -> usize {
        self.vocab + if self.with[4] { 3 } else { 0 }
    }

    fn data<T: Float>(&self) -> Data<T> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let rows = self.batch * self.nodes;
        let len = if rows == 0 { 0 } else { (rows - 1) * self.stride() + self.vocab };
        let mut target: Vec<T> = (0..len).map(|_| T::from_f32(rng.random_range(-3.0..3.0f32))).collect();
        let row_index: Vec<i32> = (0..rows as i32).rev().collect();
        let place = |r: usize| if self.with[0] { rows - 1 - r } else { r };
        // Each node's token is likely after some other node.
        let mut drafts: Vec<i32> = (0..rows).map(|_| rng.random_range(0..self.vocab as i32)).collect();
        for r in 0..rows {
            let from = r / self.nodes * self.nodes + rng.random_range(0..self.nodes);
            let row = &mut target[place(from) * self.stride()..][..self.vocab];
            row[drafts[r] as usize] = T::from_f32(rng.random_range(1.0..6.0f32));
        }
        let mut paths = Vec::new();
        for _ in 0..self.paths {
            let end = rng.random_range(0..=self.depth);
            for j in 0..self.depth {
                let node = if j == 0 { 0 } else { rng.random_range(0..self.nodes as i32) };
                let none = [-1, self.nodes as i32, -2][rng.random_range(0..3)];
                paths.push(if j < end { node } else { none });
            }
        }
        if self.with[3] && rows > 0 {
            for _ in 0..3 {
                let r = rng.random_range(0..rows);
                let row = r * self.stride()..r * self.stride() + self.vocab;
                match rng.random_range(0..4) {
                    0 => target[row].fill(T::from_f32(f32::NAN)),
                    1 => target[row].fill(T::from_f32(f32::NEG_INFINITY)),
                    2 => target[row.start + rng.random_range(0..self.vocab)] = T::from_f32(f32::NAN),
                    _ => drafts[r] = [-1, self.vocab as i32, i32::MIN][rng.random_range(0..3)],
                }
            }
        }
        Data {
            target,
            drafts,
            paths,
            row_index,
            temperature: (0..self.batch)
                .map(|_| if self.with[1] { 0.0 } else { [1.0, 0.7, 1.5][rng.random_range(0..3)] })
                .collect(),
            seeds: (0..self.batch).map(|_| rng.random()).collect(),
            positions: (0..self.batch).map(|_| rng.random_range(0..1 << 40)).collect(),
            uniforms: (0..self.batch * 3).map(|_| rng.random_range(0..1 << 24) as f32 / 16_777_216.0).collect(),
        }
    }

    fn builder<T: Float>(&self) -> TypicalVerifierBuilder<T> {
        let builder = TypicalVerifier::builder(self.batch, self.nodes, self.vocab)
            .target_row_stride(self.stride() as i64)
            .epsilon(EPSILON)
            .alpha(ALPHA)
            .fallback_token(-7);
        if self.paths > 0 { builder.paths(self.paths, self.depth) } else { builder }
    }

    fn run<T: Float>(&self, device: &TestDevice, data: &Data<T>, info: &DeviceInfo) -> Decided {
        let plan = self.builder::<T>().build(info).unwrap();
        let [indexed, _, given, ..] = self.with;
        let out = self.batch * self.depth;
        let target = Buffer::of(device, &data.target, self.shift);
        let (drafts, paths) = (Buffer::of(device, &data.drafts, 1), Buffer::of(device, &data.paths, 1));
        let row_index = Buffer::of(device, &data.row_index, 1);
        let temperature = Buffer::of(device, &data.temperature, 1);
        let (seeds, positions) = (Buffer::of(device, &data.seeds, 1), Buffer::of(device, &data.positions, 1));
        let uniforms = Buffer::of(device, &data.uniforms, 1);
        let mut tokens = Buffer::<i32>::poisoned(device, out, 1);
        let mut nodes = Buffer::<i32>::poisoned(device, out, 1);
        let mut emitted = Buffer::<Emitted>::poisoned(device, self.batch, 1);
        let mut accepted = Buffer::<Accepted>::poisoned(device, self.batch, 1);
        let mut path = Buffer::<i32>::poisoned(device, self.batch, 1);
        let mut last_row = Buffer::<i32>::poisoned(device, self.batch, 1);
        let mut status = Buffer::<u32>::poisoned(device, self.batch, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(device, &vec![0u32; plan.counter_words()], 1);
        plan.run(
            &device.stream(),
            TypicalVerifierArgs {
                target: target.input(),
                drafts: drafts.input(),
                paths: (self.paths > 0).then(|| paths.input()),
                row_index: indexed.then(|| row_index.input()),
                temperature: Some(temperature.input()),
                seeds: Some(seeds.input()),
                positions: Some(positions.input()),
                uniforms: given.then(|| uniforms.input()),
                out: TypicalOut {
                    tokens: tokens.output(),
                    emitted: emitted.output(),
                    accepted: accepted.output(),
                    nodes: Some(nodes.output()),
                    path: Some(path.output()),
                    last_row: Some(last_row.output()),
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
            tokens: tokens.read(),
            emitted: emitted.read(),
            accepted: accepted.read(),
            nodes: nodes.read(),
            path: path.read(),
            last_row: last_row.read(),
            status: status.read(),
        }
    }
}

fn check<T: Float>(case: &Case, flaw: Flaw) -> Result<(), String> {
    let data = case.data::<T>();
    let decided = case.run(&TestDevice::Host, &data, &DeviceInfo::H200);
    for b in 0..case.batch {
        let mut margin = 1.0f64;
        let p: Vec<Vec<f64>> = (0..case.nodes)
            .map(|n| {
                let r = b * case.nodes + n;
                let row = if case.with[0] { data.row_index[r] as usize } else { r };
                let logits: Vec<f64> = (0..case.vocab)
                    .map(|column| f64::from(data.target[row * case.stride() + column].to_f32()))
                    .collect();
                Sampling::at(data.temperature[b]).probabilities(&logits, false, &mut 1.0)
            })
            .collect();
        let threshold = |n: usize| {
            let entropy: f64 = p[n].iter().filter(|&&p| p > 0.0).map(|p| -p * p.ln()).sum();
            let typical = f64::from(ALPHA) * if flaw == Flaw::NoEntropy { 1.0 } else { (-entropy).exp() };
            typical.min(EPSILON.into())
        };
        let list = |path: usize| -> Vec<usize> {
            if case.paths == 0 {
                return (0..case.nodes).collect();
            }
            let of = &data.paths[path * case.depth..][..case.depth];
            let of = of.iter().map_while(|&n| usize::try_from(n).ok().filter(|&n| n < case.nodes));
            of.collect()
        };
        let mut best: Option<(usize, f64, usize)> = None;
        for path in 0..case.paths.max(1) {
            let nodes = list(path);
            let (mut length, mut log_sum) = (0, 0.0);
            let walked = if nodes.first() == Some(&0) { &nodes[..] } else { &[] };
            for pair in walked.windows(2) {
                let token = data.drafts[b * case.nodes + pair[1]];
                let of = usize::try_from(token).ok().filter(|&x| x < case.vocab).map_or(0.0, |x| p[pair[0]][x]);
                margin = margin.min((of / threshold(pair[0]) - 1.0).abs());
                let ok = of > threshold(pair[0]);
                if !ok && flaw != Flaw::NoPrefix {
                    break;
                }
                if ok {
                    length += 1;
                    log_sum += of.ln();
                }
            }
            let better = best.is_none_or(|(n, sum, other)| {
                // Paths that accept the same nodes tie in every arithmetic; others only in this one.
                let same = list(other).iter().take(n + 1).eq(nodes.iter().take(length + 1));
                if n == length && (sum != log_sum || (length > 0 && !same)) {
                    margin = margin.min((sum - log_sum).abs());
                }
                length > n || (length == n && log_sum > sum && flaw != Flaw::FirstLongest)
            });
            if better {
                best = Some((length, log_sum, path));
            }
        }
        let (length, _, path) = best.unwrap();
        let nodes = list(path);
        let last = if length == 0 { 0 } else { nodes[length.min(nodes.len().saturating_sub(1))] };
        let three = match case.with[2] {
            true => [0, 1, 2].map(|k| data.uniforms[b * 3 + k]),
            false => draws(data.seeds[b] as u64, data.positions[b] as u64 + length as u64, 0).sample,
        };
        let token = match p[last].iter().filter(|&&p| p > 0.0).count() {
            0 => None,
            1 => p[last].iter().position(|&p| p > 0.0),
            _ => sample(&p[last], three, &mut margin),
        };
        // Paths that share what is accepted tie exactly, but in f64 by chance.
        if margin < 1e-4 {
            continue;
        }
        let mut tokens = vec![-1; case.depth];
        let mut kept = vec![-1; case.depth];
        kept[0] = 0;
        for j in 0..length.min(nodes.len().saturating_sub(1)) {
            tokens[j] = data.drafts[b * case.nodes + nodes[j + 1]];
            kept[j + 1] = nodes[j + 1] as i32;
        }
        tokens[length] = token.map_or(-7, |token| token as i32);
        let of = b * case.depth..(b + 1) * case.depth;
        if decided.tokens[of.clone()] != tokens
            || decided.nodes[of] != kept
            || decided.accepted[b] != Accepted(length as i32)
            || decided.emitted[b] != Emitted(length as i32 + 1)
            || decided.path[b] != path as i32
            || decided.last_row[b] != (b * case.nodes + last) as i32
        {
            return Err(format!("request {b}: {decided:?} instead of {tokens:?}, {kept:?}, path {path}, {margin}"));
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
    Case { vocab: 30, batch: 60, nodes: 8, paths: 10, depth: 5, with: [false; 5], shift: 0, seed: 3 }
}

/// The comparison must be able to fail.
#[test]
fn wrong_decisions_are_told() {
    check::<f32>(&plain(), Flaw::None).unwrap();
    for flaw in [Flaw::NoEntropy, Flaw::FirstLongest, Flaw::NoPrefix] {
        let told = std::panic::catch_unwind(|| check::<f32>(&plain(), flaw)).map_or(true, |told| told.is_err());
        assert!(told, "{flaw:?}");
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

/// More paths than a block has threads, and all of them the same: the first wins.
#[test]
fn many_paths_and_ties_at_the_edges() {
    for device in TestDevice::all() {
        let case = Case { vocab: 20, batch: 2, nodes: 6, paths: 300, depth: 4, ..plain() };
        let mut data = case.data::<f32>();
        assert_eq!(case.run(&device, &data, &DeviceInfo::H200), case.run(&TestDevice::Host, &data, &DeviceInfo::H200));
        data.paths = (0..300).flat_map(|path| if path < 2 { [-1, 1, 2, 3] } else { [0, 1, 2, 3] }).collect();
        data.target.fill(0.0);
        for r in 0..12 {
            data.target[r * 20 + data.drafts[(r + 1) % 12] as usize] = 9.0;
        }
        let decided = case.run(&device, &data, &DeviceInfo::H200);
        assert_eq!((decided.path, decided.accepted), (vec![2, 2], vec![Accepted(3), Accepted(3)]));
    }
}

/// However the plan cuts the work, and whatever else is in the batch; bad rows harm no other request.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for device in TestDevice::all() {
        let case = Case { vocab: 1500, batch: 3, nodes: 4, ..plain() };
        let data = case.data::<bf16>();
        let all = case.run(&device, &data, &DeviceInfo::H200);
        let mut small = DeviceInfo::A100;
        small.sm_count = 1;
        assert_eq!(case.run(&device, &data, &small), all);
        let mut bad = case.data::<bf16>();
        bad.target[4 * 1500..5 * 1500].fill(bf16::NAN);
        let harmed = case.run(&device, &bad, &DeviceInfo::H200);
        assert_eq!(harmed.status, [0, status::TARGET_NAN | status::TARGET_EMPTY, 0]);
        assert_eq!((harmed.tokens[5], harmed.accepted[1]), (-7, Accepted(0)));
        assert_eq!((&harmed.tokens[..5], &harmed.tokens[10..]), (&all.tokens[..5], &all.tokens[10..]));
        let mut one = Case { batch: 1, shift: 3, ..case.clone() }.data::<bf16>();
        one.target = data.target[8 * 1500..].to_vec();
        one.drafts = data.drafts[8..].to_vec();
        one.paths = data.paths.clone();
        one.temperature = vec![data.temperature[2]];
        (one.seeds, one.positions) = (vec![data.seeds[2]], vec![data.positions[2]]);
        let alone = Case { batch: 1, shift: 3, ..case }.run(&device, &one, &DeviceInfo::H200);
        assert_eq!((&alone.tokens[..], &alone.nodes[..]), (&all.tokens[10..], &all.nodes[10..]));
    }
}

#[test]
fn bad_plans_and_buffers_are_refused() {
    let build = |b: TypicalVerifierBuilder<f32>| b.build(&DeviceInfo::H200).map(|_| ());
    let size = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    let builder = TypicalVerifier::<f32>::builder;
    assert_eq!(build(builder(2, 3, 4)), Ok(()));
    size(build(builder(1, 1, 0)), "vocab");
    size(build(builder((1 << 20) + 1, 1, 1)), "batch");
    size(build(builder(1, 0, 1)), "nodes");
    size(build(builder(1, 1025, 1)), "nodes");
    size(build(builder(1, 2, 1).paths(0, 1)), "paths");
    size(build(builder(1, 2, 1).paths(1, 1025)), "depth");
    size(build(builder(1, 2, 1).target_rows(1 << 31)), "target_rows");
    assert!(matches!(build(builder(2, 3, 4).target_row_stride(3)), Err(Error::Stride { .. })));
    assert!(matches!(build(builder(2, 3, 4).epsilon(-1.0)), Err(Error::Unsupported { arg: "epsilon", .. })));
    assert!(matches!(build(builder(2, 3, 4).alpha(f32::NAN)), Err(Error::Unsupported { arg: "alpha", .. })));
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder(1, 1, 1).build(&old), Err(Error::UnsupportedDevice { .. })));
    for device in TestDevice::all() {
        let (target, drafts) = (Buffer::of(&device, &[0f32; 24], 0), Buffer::of(&device, &[1; 6], 0));
        let mut tokens = Buffer::<i32>::poisoned(&device, 6, 0);
        let mut emitted = Buffer::<Emitted>::poisoned(&device, 2, 0);
        let mut accepted = Buffer::<Accepted>::poisoned(&device, 2, 0);
        let mut status = Buffer::<u32>::poisoned(&device, 2, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, 1 << 12, 0);
        let mut counters = Buffer::of(&device, &[0u32; 2], 0);
        let mut run = |builder: TypicalVerifierBuilder<f32>, lens: [usize; 3], paths: bool| {
            builder.build(&DeviceInfo::H200).unwrap().run(
                &device.stream(),
                TypicalVerifierArgs {
                    target: target.input_of(lens[0]),
                    drafts: drafts.input_of(lens[1]),
                    paths: paths.then(|| drafts.input_of(5)),
                    row_index: None,
                    temperature: None,
                    seeds: None,
                    positions: None,
                    uniforms: None,
                    out: TypicalOut {
                        tokens: tokens.output_of(lens[2]),
                        emitted: emitted.output(),
                        accepted: accepted.output(),
                        nodes: None,
                        path: None,
                        last_row: None,
                        status: status.output(),
                    },
                    workspace: workspace.output(),
                    counters: counters.output(),
                },
            )
        };
        let chain = || builder(2, 3, 4);
        let length = |arg, need, got| Err(Error::Length { arg, need, got });
        assert_eq!(run(chain(), [23, 6, 6], false), length("target", 24, 23));
        assert_eq!(run(chain(), [24, 5, 6], false), length("drafts", 6, 5));
        assert_eq!(run(chain(), [24, 6, 5], false), length("tokens", 6, 5));
        assert!(matches!(run(chain(), [24, 6, 6], true), Err(Error::Unsupported { arg: "paths", .. })));
        assert!(matches!(run(chain().paths(2, 3), [24, 6, 6], false), Err(Error::Unsupported { arg: "paths", .. })));
        assert_eq!(run(chain().paths(2, 3), [24, 6, 6], true), length("paths", 6, 5));
        assert_eq!(run(chain(), [24, 6, 6], false), Ok(()));
    }
}
