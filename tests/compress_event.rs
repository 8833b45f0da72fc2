//! Whole events of every policy over a cache, once and again, against an f64 oracle written here from the formulas.

#![cfg(feature = "compression")]

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};

use nextscale::compression::{
    CacheSpec, ChunkCache, Compaction, Event, EventArgs, Policy, PositionWeight, RopePairs, Turn,
};
use nextscale::{DType, DeviceInfo, Error, bf16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, TestDevice};

const DIM: usize = 64;
const V_DIM: usize = 8;

#[derive(Debug, Clone)]
struct Case {
    policy: Policy,
    /// What the oracle takes it for.
    meant: Policy,
    layers: usize,
    heads: usize,
    groups: usize,
    page_rows: usize,
    /// Rows of the chunks of the first event, and of each further one.
    chunks: Vec<usize>,
    further: Vec<usize>,
    queries: usize,
    block: usize,
    /// Another branch has the pages too.
    shared: bool,
    workspace: u64,
    seed: u64,
}

fn case(policy: Policy) -> Case {
    Case {
        policy,
        meant: policy,
        layers: 2,
        heads: 2,
        groups: 2,
        page_rows: 12,
        chunks: vec![36, 24, 12],
        further: vec![24, 36],
        queries: policy.queries().unwrap_or(9),
        block: 1,
        shared: false,
        workspace: 64_000_000,
        seed: 1,
    }
}

fn policies() -> Vec<Policy> {
    let flow = |weight| Policy::FlowCache { budget: 30, lambda: 0.07, weight };
    vec![
        flow(PositionWeight::None),
        flow(PositionWeight::Exponential),
        Policy::RKv { budget: 30, window: 8, lambda: 0.1 },
        Policy::SnapKv { budget: 36, window: 8 },
        Policy::H2o { heavy: 20, recent: 9 },
        Policy::KeyDiff { budget: 29 },
        Policy::StreamingLlm { sink: 4, recent: 20 },
        Policy::AdaKv { budget: 20, window: 5, floor: 0.25 },
        Policy::ScaleKv { budget: 30, scale: [4, 5] },
    ]
}

/// A row of a head: its key, its value, where it stands.
#[derive(Clone)]
struct Row {
    k: Vec<f64>,
    position: i32,
}

struct Scene {
    case: Case,
    cache: ChunkCache,
    rng: StdRng,
    k: Vec<bf16>,
    v: Vec<bf16>,
    positions: Vec<i32>,
    norms: Vec<f32>,
    lengths: Vec<i32>,
    /// `[layer][head]`
    rows: Vec<Vec<Vec<Row>>>,
    next: usize,
}

fn uniform(rng: &mut StdRng, len: usize) -> Vec<bf16> {
    (0..len).map(|_| bf16::from_f32(rng.random_range(-2.0f32..2.0))).collect()
}

fn value(layer: usize, head: usize, position: i32) -> bf16 {
    bf16::from_f32((layer * 2 + head) as f32 + position as f32 / 256.0)
}

impl Scene {
    fn new(case: &Case) -> Self {
        let spec = CacheSpec {
            branches: 2,
            layers: case.layers,
            heads: case.heads,
            k_dim: DIM,
            v_dim: V_DIM,
            dtype: DType::BF16,
            packed: None,
            page_rows: case.page_rows,
            spare_pages: 64,
            extras: 1,
            most_rows: 400,
            bytes: 1 << 22,
        };
        let cache = ChunkCache::new(spec).unwrap();
        let places = cache.layout().pages * spec.page_rows * spec.heads;
        Scene {
            case: case.clone(),
            rng: StdRng::seed_from_u64(case.seed),
            k: vec![bf16::NAN; places * DIM],
            v: vec![bf16::NAN; places * V_DIM],
            positions: vec![-1; places],
            norms: vec![f32::NAN; places],
            lengths: vec![-1; 2 * case.layers * case.heads],
            rows: vec![vec![Vec::new(); case.heads]; case.layers],
            cache,
            next: 0,
        }
    }

    /// A chunk in all layers, which take pages in turn.
    fn append(&mut self, rows: usize) {
        let (heads, first) = (self.case.heads, self.next);
        for layer in 0..self.case.layers {
            let placed = self.cache.append(0, layer, first as u64, rows, first as u32).unwrap();
            let places = placed.runs.iter().flat_map(|run| run.place as usize..run.place as usize + run.rows);
            for (i, place) in places.enumerate() {
                for head in 0..heads {
                    let (at, position) = (place * heads + head, (first + i) as i32);
                    let mut k = uniform(&mut self.rng, DIM);
                    // Some are like one before.
                    if self.rng.random_range(0..5) == 0
                        && let Some(like) = self.rows[layer][head].last()
                    {
                        k.iter_mut().zip(&like.k).for_each(|(k, &like)| {
                            *k = bf16::from_f64(like + self.rng.random_range(-0.5..0.5));
                        });
                    }
                    self.k[at * DIM..][..DIM].copy_from_slice(&k);
                    self.v[at * V_DIM..][..V_DIM].fill(value(layer, head, position));
                    self.positions[at] = position;
                    self.norms[at] = position as f32;
                    let k = k.iter().map(|k| k.to_f64()).collect();
                    self.rows[layer][head].push(Row { k, position });
                }
            }
            self.cache.seal(0, layer, first as u64).unwrap();
        }
        self.next += rows;
    }

    fn plan(&self, moves: &[Compaction], info: &DeviceInfo) -> Event<bf16> {
        let mut builder = self.cache.event::<bf16>(self.case.policy, moves).unwrap();
        builder = builder.groups(self.case.groups).block(self.case.block).workspace(self.case.workspace);
        if self.case.policy.queries().is_none() {
            builder = builder.queries(self.case.queries);
        }
        builder.build(info).unwrap()
    }

    /// One event, checked.
    fn compress(&mut self, device: &TestDevice) {
        let Case { policy, meant, layers, heads, groups, page_rows, .. } = self.case.clone();
        let before: Vec<Vec<u32>> = (0..layers).map(|layer| self.pages(0, layer)).collect();
        if self.case.shared {
            self.cache.fork(0, 1).unwrap();
        }
        let moves: Vec<_> =
            (0..layers).map(|layer| self.cache.compress(0, layer, policy.rows(heads)).unwrap().unwrap()).collect();
        let event = self.plan(&moves, &DeviceInfo::H200);
        let words = |of: fn(&Compaction) -> &Vec<u32>| -> Vec<i32> {
            moves.iter().flat_map(of).map(|&page| page as i32).collect()
        };
        let grid = event.rows().to_vec();
        let q_rows = match policy {
            Policy::ScaleKv { scale: [height, width], .. } => height * width,
            _ => self.case.queries,
        };
        let q = uniform(&mut self.rng, layers * q_rows * heads * groups * DIM);

        let mut k = Buffer::of(device, &self.k, 0);
        let mut v = Buffer::of(device, &self.v, 0);
        let mut positions = Buffer::of(device, &self.positions, 0);
        let mut norms = Buffer::of(device, &self.norms, 0);
        let mut lengths = Buffer::of(device, &self.lengths[..layers * heads], 0);
        let (input_pages, out_pages) = (
            Buffer::of(device, &words(|moves| &moves.input_pages), 0),
            Buffer::of(device, &words(|moves| &moves.out_pages), 0),
        );
        let queries = Buffer::of(device, &q, 0);
        let (rows, columns) = (Buffer::of(device, event.rows(), 0), Buffer::of(device, event.columns(), 0));
        let weights = event.weights().map(|weights| Buffer::of(device, weights, 0));
        let mut workspace = Buffer::<u8>::poisoned(device, event.workspace_bytes() as usize, 0);
        {
            let mut args =
                EventArgs::of(k.output(), v.output(), lengths.output(), input_pages.input(), workspace.output());
            args.q = policy.scores().importance.then(|| queries.input());
            args.positions = Some(positions.output());
            args.extras[0] = Some(norms.output());
            args.out_pages = self.case.shared.then(|| out_pages.input());
            args.rows = (!grid.is_empty()).then(|| rows.input());
            args.columns = (!grid.is_empty()).then(|| columns.input());
            args.weights = weights.as_ref().map(|weights| weights.input());
            event.run(&device.stream(), args).unwrap();
        }
        let old_positions = std::mem::take(&mut self.positions);
        (self.k, self.v, self.positions, self.norms) = (k.read(), v.read(), positions.read(), norms.read());
        let lengths = lengths.read();
        self.lengths[..layers * heads].copy_from_slice(&lengths);

        for layer in 0..layers {
            let pages = self.pages(0, layer);
            let mut scores = Vec::new();
            for head in 0..heads {
                let of_query = |i: usize, g: usize| -> Vec<f64> {
                    let row = grid.get(i).map_or(i, |&row| row as usize);
                    let at = ((layer * q_rows + row) * heads + head) * groups + g;
                    q[at * DIM..][..DIM].iter().map(|x| x.to_f64()).collect()
                };
                let keys: Vec<&[f64]> = self.rows[layer][head].iter().map(|row| &row.k[..]).collect();
                scores.push(oracle(&meant, &keys, self.case.queries, groups, self.case.block, of_query));
            }
            let budgets = budgets(&meant, &scores, self.case.block);
            for head in 0..heads {
                let length = lengths[layer * heads + head] as usize;
                let old = &self.rows[layer][head];
                assert_eq!(length, budgets[head].min(old.len()), "{policy:?}: rows of head {head}, layer {layer}");
                let mut kept = Vec::new();
                for row in 0..length {
                    let at = (pages[row / page_rows] as usize * page_rows + row % page_rows) * heads + head;
                    let position = self.positions[at];
                    let from = old.iter().position(|row| row.position == position).expect("a row of the head");
                    assert!(kept.last().is_none_or(|&last| from > last), "{policy:?}: rows do not ascend");
                    kept.push(from);
                    let k = self.k[at * DIM..][..DIM].iter().map(|k| k.to_f64());
                    assert!(k.eq(old[from].k.iter().copied()), "{policy:?}: another key");
                    assert!(self.v[at * V_DIM..][..V_DIM].iter().all(|&v| v == value(layer, head, position)));
                    assert_eq!(self.norms[at], position as f32);
                }
                scores[head].judge(&kept, &format!("{meant:?}, layer {layer}, head {head}"));
                self.rows[layer][head] = kept.iter().map(|&from| old[from].clone()).collect();
            }
            if self.case.shared {
                // The other branch has what it had.
                for &page in &before[layer] {
                    let at = page as usize * page_rows * heads..(page as usize + 1) * page_rows * heads;
                    assert_eq!(self.positions[at.clone()], old_positions[at]);
                }
            }
        }
        if self.case.shared {
            self.cache.clear(1).unwrap();
        }
    }

    fn pages(&self, branch: usize, layer: usize) -> Vec<u32> {
        self.cache.view(branch, layer).unwrap().flat_map(|segment| segment.pages.to_vec()).collect()
    }
}

/// Scores of a head's items, +inf where they stay, and how far a kept one may be below a dropped one.
struct Scores {
    items: Vec<f64>,
    stay: Vec<bool>,
    slack: f64,
    block: usize,
}

impl Scores {
    fn judge(&self, kept: &[usize], what: &str) {
        let is_kept: Vec<bool> = (0..self.items.len()).map(|item| kept.contains(&(item * self.block))).collect();
        for (item, &stays) in self.stay.iter().enumerate() {
            assert!(!stays || is_kept[item], "{what}: token {item} was to stay");
        }
        let of = |wanted: bool| {
            let items = self.items.iter().zip(&is_kept).zip(&self.stay);
            items.filter(move |&((_, &kept), &stays)| !stays && kept == wanted).map(|((&score, _), _)| score)
        };
        let (lowest, highest) = (of(true).fold(f64::INFINITY, f64::min), of(false).fold(f64::NEG_INFINITY, f64::max));
        assert!(lowest >= highest - self.slack, "{what}: {highest} was dropped, {lowest} was kept");
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - most).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

/// Over the neighbours that there are.
fn pooled(x: &[f64], width: usize, average: bool) -> Vec<f64> {
    let half = width / 2;
    let around = |j: usize| &x[j.saturating_sub(half)..(j + half + 1).min(x.len())];
    let pool = |j: usize| match average {
        true => around(j).iter().sum::<f64>() / width as f64,
        false => around(j).iter().copied().fold(f64::NEG_INFINITY, f64::max),
    };
    (0..x.len()).map(pool).collect()
}

/// The scores of a policy, from its publication.
fn oracle(
    policy: &Policy,
    keys: &[&[f64]],
    queries: usize,
    groups: usize,
    block: usize,
    q: impl Fn(usize, usize) -> Vec<f64>,
) -> Scores {
    let n = keys.len();
    let scale = (DIM as f64).sqrt().recip();
    let logits = |i: usize, g: usize| -> Vec<f64> {
        let q = q(i, g);
        keys.iter().map(|k| dot(&q, k) * scale).collect()
    };
    let largest = |i: usize, seen: usize| -> Vec<f64> {
        let all: Vec<_> = (0..groups).map(|g| logits(i, g)).collect();
        (0..seen).map(|j| all.iter().map(|x| x[j]).fold(f64::NEG_INFINITY, f64::max)).collect()
    };
    let mean_of_largest = |seen: usize| -> Vec<f64> {
        let mut total = vec![0.0; seen];
        for i in 0..queries {
            softmax(&largest(i, seen)).iter().zip(&mut total).for_each(|(p, total)| *total += p / queries as f64);
        }
        total
    };
    // The queries are those of the last keys.
    let probabilities = |scored: usize| -> Vec<f64> {
        let mut total = vec![0.0; scored];
        for (i, g) in (0..queries).flat_map(|i| (0..groups).map(move |g| (i, g))) {
            let x = &logits(i, g)[..n + i + 1 - queries];
            softmax(x).iter().zip(&mut total).for_each(|(p, total)| *total += p);
        }
        total
    };
    let unit: Vec<Vec<f64>> = keys
        .iter()
        .map(|k| {
            let norm = dot(k, k).sqrt() + 1e-8;
            k.iter().map(|x| x / norm).collect()
        })
        .collect();
    let sum: Vec<f64> = (0..DIM).map(|d| unit.iter().map(|u| u[d]).sum()).collect();
    let mut stay = vec![false; n];
    let mut slack = 1e-4;
    let mut items: Vec<f64> = match *policy {
        Policy::FlowCache { lambda, .. } => {
            let redundancy = softmax(&unit.iter().map(|u| (dot(u, &sum) - 1.0) / n as f64).collect::<Vec<_>>());
            let importance = pooled(&mean_of_largest(n), 7, false);
            slack /= n as f64;
            let lambda = f64::from(lambda);
            importance.iter().zip(&redundancy).map(|(i, r)| lambda * i - (1.0 - lambda) * r).collect()
        }
        Policy::RKv { window, lambda, .. } => {
            let mut importance = pooled(&mean_of_largest(n - window), 7, false);
            importance.resize(n, 0.0);
            let mut means = vec![0.0; n];
            for i in 0..n {
                let cosines: Vec<f64> = (0..n).map(|j| if i == j { 0.0 } else { dot(&unit[i], &unit[j]) }).collect();
                let retained = (0..n).rev().find(|&j| cosines[j] > 0.5).unwrap_or(0);
                (0..n).filter(|&j| j != retained).for_each(|j| means[j] += cosines[j] / n as f64);
            }
            stay[n - window..].fill(true);
            slack /= n as f64;
            let lambda = f64::from(lambda);
            importance.iter().zip(softmax(&means)).map(|(i, r)| lambda * i - (1.0 - lambda) * r).collect()
        }
        Policy::SnapKv { window, .. } | Policy::AdaKv { window, .. } => {
            let (width, average) = if matches!(policy, Policy::SnapKv { .. }) { (5, true) } else { (7, false) };
            let mut scores = pooled(&probabilities(n - window), width, average);
            scores.resize(n, 0.0);
            stay[n - window..].fill(true);
            scores
        }
        Policy::H2o { recent, .. } => {
            stay[n - recent..].fill(true);
            probabilities(n)
        }
        Policy::KeyDiff { .. } => {
            let size = dot(&sum, &sum).sqrt();
            unit.iter().map(|u| -dot(u, &sum) / size).collect()
        }
        Policy::StreamingLlm { sink, recent } => {
            stay[..sink].fill(true);
            stay[n - recent..].fill(true);
            vec![0.0; n]
        }
        Policy::ScaleKv { scale: [height, width], .. } => {
            let mut scores = vec![0.0; n];
            for (i, g) in (0..16).flat_map(|i| (0..groups).map(move |g| (i, g))) {
                logits(i, g).iter().zip(&mut scores).for_each(|(x, score)| *score += x);
            }
            let last = n - height * width;
            let centre = |i: usize, size: usize| i * (size / 4) + (size / 4 - 1) / 2;
            let window: Vec<usize> =
                (0..16).map(|i| last + centre(i / 4, height) * width + centre(i % 4, width)).collect();
            window.iter().for_each(|&j| scores[j] = f64::NEG_INFINITY);
            window.iter().for_each(|&j| stay[j] = true);
            slack = 1e-2;
            pooled(&scores, 5, false)
        }
        _ => panic!("no policy of the test"),
    };
    if let Policy::FlowCache { weight, .. } = *policy {
        if weight != PositionWeight::None || block > 1 {
            items = items.chunks(block).map(|items| items.iter().sum::<f64>() / items.len() as f64).collect();
            stay.truncate(items.len());
        }
        if weight != PositionWeight::None {
            let least = items.iter().copied().fold(f64::INFINITY, f64::min);
            let count = items.len();
            items.iter_mut().enumerate().for_each(|(i, x)| *x = (*x - least) * f64::from(weight.at(i, count)));
        }
    }
    Scores { items, stay, slack, block }
}

/// How many each head keeps.
fn budgets(policy: &Policy, scores: &[Scores], block: usize) -> Vec<usize> {
    let Policy::AdaKv { budget, window, floor } = *policy else {
        return vec![policy.budget() / block * block; scores.len()];
    };
    // Candidates of all heads, the greatest first; heads get what they win and a part evenly.
    let base: Vec<usize> = scores.iter().map(|scores| (budget - window).min(scores.items.len() - window)).collect();
    let total: usize = base.iter().sum();
    let mut all: Vec<(f64, usize)> = scores
        .iter()
        .enumerate()
        .flat_map(|(head, of)| {
            of.items.iter().zip(&of.stay).filter(|(_, stays)| !**stays).map(move |(&x, _)| (x, head))
        })
        .collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    let shares: Vec<f64> = (0..scores.len())
        .map(|head| {
            let won = all[..total].iter().filter(|one| one.1 == head).count() as f64;
            won * (1.0 - f64::from(floor)) + base[head] as f64 * f64::from(floor)
        })
        .collect();
    let mut counts: Vec<usize> = shares.iter().map(|share| *share as usize).collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| (shares[b].fract()).total_cmp(&shares[a].fract()).then(a.cmp(&b)));
    let left = total - counts.iter().sum::<usize>();
    order[..left].iter().for_each(|&head| counts[head] += 1);
    counts.iter().map(|count| count + window).collect()
}

fn check(case: &Case) {
    for device in TestDevice::all() {
        let mut scene = Scene::new(case);
        case.chunks.iter().for_each(|&rows| scene.append(rows));
        scene.compress(&device);
        for &rows in &case.further {
            scene.append(rows);
            scene.compress(&device);
        }
    }
}

#[test]
fn every_policy_once_and_again() {
    for policy in policies() {
        for shared in [false, true] {
            check(&Case { shared, ..case(policy) });
        }
    }
}

/// Pages of which chunks fill many, none, or a part of; many queries, for the other kernels; frames; a window across
/// the gap that uneven heads leave.
#[test]
fn pages_and_windows() {
    let flow = Policy::FlowCache { budget: 40, lambda: 0.07, weight: PositionWeight::None };
    check(&Case { page_rows: 130, chunks: vec![260, 130], further: vec![61], queries: 256, layers: 1, ..case(flow) });
    check(&Case {
        page_rows: 128,
        chunks: vec![128, 128, 9],
        further: vec![70],
        queries: 300,
        layers: 1,
        ..case(flow)
    });
    check(&Case { block: 12, ..case(Policy::FlowCache { budget: 36, lambda: 0.07, weight: PositionWeight::None }) });
    check(&Case { block: 6, ..case(Policy::FlowCache { budget: 36, lambda: 0.5, weight: PositionWeight::Gaussian }) });
    let ada = Policy::AdaKv { budget: 20, window: 9, floor: 0.1 };
    check(&Case { page_rows: 1, chunks: vec![50], further: vec![4, 30, 7], ..case(ada) });
    check(&Case { page_rows: 7, chunks: vec![70], further: vec![2, 21, 5], heads: 3, groups: 1, ..case(ada) });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases().div_ceil(8), ..ProptestConfig::default() })]

    #[test]
    fn random_events(
        which in 0..9usize, layers in 1..4usize, heads in 1..4usize, groups in 1..4usize, page_rows in 1..40usize,
        pages in 1..5usize, rest in 1..40usize, further in proptest::collection::vec(20..60usize, 0..3),
        queries in 1..30usize, shared in any::<bool>(),
        workspace in proptest::sample::select(vec![0u64, 40_000, 64_000_000]), seed in any::<u64>(),
    ) {
        let policy = policies()[which];
        let first = (120usize.div_ceil(page_rows) + pages) * page_rows;
        let queries = policy.queries().unwrap_or(queries);
        check(&Case {
            layers, heads, groups, page_rows, chunks: vec![first, rest + 20], further, queries, shared, workspace, seed,
            ..case(policy)
        });
    }
}

/// The oracle tells policies apart.
#[test]
fn a_wrong_policy_fails() {
    let flow = |lambda, weight| Policy::FlowCache { budget: 30, lambda, weight };
    let none = PositionWeight::None;
    for (policy, meant) in [
        (flow(0.07, none), flow(0.6, none)),
        (flow(0.07, none), flow(0.07, PositionWeight::Gaussian)),
        (Policy::SnapKv { budget: 36, window: 8 }, Policy::H2o { heavy: 28, recent: 8 }),
        (Policy::RKv { budget: 30, window: 8, lambda: 0.1 }, Policy::KeyDiff { budget: 30 }),
        (Policy::AdaKv { budget: 20, window: 5, floor: 0.25 }, Policy::AdaKv { budget: 20, window: 5, floor: 1.0 }),
    ] {
        let wrong = Case { meant, queries: policy.queries().unwrap_or(8), ..case(policy) };
        assert!(catch_unwind(AssertUnwindSafe(|| check(&wrong))).is_err(), "{policy:?} passed for {meant:?}");
    }
}

/// The published shapes: the workspace of all layers stays below 64 MB, and a plan is made.
#[test]
fn workspace_at_published_shapes() {
    let spec = CacheSpec {
        branches: 1,
        layers: 34,
        heads: 8,
        k_dim: 128,
        v_dim: 128,
        dtype: DType::BF16,
        packed: None,
        page_rows: 12150,
        spare_pages: 0,
        extras: 0,
        most_rows: 12150 * 5,
        bytes: 9 << 30,
    };
    let llama = CacheSpec { layers: 32, page_rows: 16, most_rows: 1 << 17, bytes: 18 << 30, ..spec };
    let infinity = CacheSpec { layers: 40, heads: 28, page_rows: 1, most_rows: 10521, bytes: 10 << 30, ..spec };
    let flow = Policy::FlowCache { budget: 12150, lambda: 0.07, weight: PositionWeight::None };
    let rkv = |budget| Policy::RKv { budget, window: 8, lambda: 0.1 };
    let snap = Policy::SnapKv { budget: 2048, window: 32 };
    for (spec, policy, chunks, groups, queries, most_groups) in [
        (spec, flow, vec![12150; 2], 3, Some(50), 2),
        (spec, flow, vec![12150; 2], 3, Some(2025), 2),
        (spec, flow, vec![12150; 2], 3, Some(12150), 2),
        (llama, snap, vec![32768], 4, None, 2),
        (llama, snap, vec![131072], 4, None, 5),
        (llama, rkv(128), vec![256], 4, None, 1),
        (llama, rkv(1024), vec![1152], 4, None, 1),
        (llama, rkv(1536), vec![1664], 4, None, 1),
        (infinity, Policy::ScaleKv { budget: 6200, scale: [64, 64] }, vec![10521], 1, None, 3),
    ] {
        let mut cache = ChunkCache::new(CacheSpec { bytes: 64 << 30, ..spec }).unwrap();
        let mut moves = Vec::new();
        for layer in 0..spec.layers {
            for (chunk, &rows) in chunks.iter().enumerate() {
                cache.append(0, layer, chunk as u64, rows, 0).unwrap();
                cache.seal(0, layer, chunk as u64).unwrap();
            }
            moves.push(cache.compress(0, layer, policy.rows(spec.heads)).unwrap().unwrap());
        }
        let mut builder = cache.event::<bf16>(policy, &moves).unwrap().groups(groups);
        if let Some(queries) = queries {
            builder = builder.queries(queries);
        }
        let event = builder.build(&DeviceInfo::H200).unwrap();
        let (bytes, its) = (event.workspace_bytes(), event.groups());
        println!("{policy:?}, {queries:?} queries of {chunks:?}: {:.1} MB in {its} groups", bytes as f64 / 1e6);
        assert!(bytes < 64_000_000 && its <= most_groups, "{policy:?}: {bytes} bytes, {its} groups");
        let (lists, kept) = ((spec.layers * spec.heads) as u64, policy.budget() as u64 * 512);
        let traffic = event.traffic();
        assert_eq!(traffic.read, lists * (chunks.iter().sum::<usize>() as u64 * 256 + kept));
        assert_eq!(traffic.written, lists * kept);
    }
}

/// Kept keys that hold their rotary embedding are turned to their new positions.
#[test]
fn turned_to_positions_in_the_cache() {
    let case = case(Policy::StreamingLlm { sink: 4, recent: 20 });
    let (rows, heads, page_rows) = (72usize, case.heads, case.page_rows);
    let frequency = |pair: usize| 100f64.powf(-(pair as f64) / (DIM / 2) as f64);
    let table: Vec<[f32; 2]> = (0..rows * DIM / 2)
        .map(|i| (i / (DIM / 2)) as f64 * frequency(i % (DIM / 2)))
        .map(|angle| [angle.cos() as f32, angle.sin() as f32])
        .collect();
    for device in TestDevice::all() {
        let mut scene = Scene::new(&case);
        case.chunks.iter().for_each(|&rows| scene.append(rows));
        let moves: Vec<_> = (0..2).map(|layer| scene.cache.compress(0, layer, 24).unwrap().unwrap()).collect();
        let turn = Turn { pairs: RopePairs::Half, rotary_dim: DIM, table_rows: rows, table_stride: None };
        let event =
            scene.cache.event::<bf16>(case.policy, &moves).unwrap().turn(0, turn).build(&DeviceInfo::H200).unwrap();
        let mut k = Buffer::of(&device, &scene.k, 0);
        let mut v = Buffer::of(&device, &scene.v, 0);
        let mut positions = Buffer::of(&device, &scene.positions, 0);
        let mut lengths = Buffer::<i32>::poisoned(&device, 2 * heads, 0);
        let pages: Vec<i32> = moves.iter().flat_map(|moves| &moves.input_pages).map(|&page| page as i32).collect();
        let pages = Buffer::of(&device, &pages, 0);
        let [cos, sin] = [0, 1].map(|i| Buffer::of(&device, &table.iter().map(|pair| pair[i]).collect::<Vec<_>>(), 0));
        let mut workspace = Buffer::<u8>::poisoned(&device, event.workspace_bytes() as usize, 0);
        {
            let mut args = EventArgs::of(k.output(), v.output(), lengths.output(), pages.input(), workspace.output());
            args.positions = Some(positions.output());
            args.cos = Some(cos.input());
            args.sin = Some(sin.input());
            event.run(&device.stream(), args).unwrap();
        }
        let (k, positions) = (k.read(), positions.read());
        for (layer, head, row) in (0..2).flat_map(|l| (0..heads).flat_map(move |h| (0..24).map(move |r| (l, h, r)))) {
            let page = scene.pages(0, layer)[row / page_rows] as usize;
            let at = (page * page_rows + row % page_rows) * heads + head;
            assert_eq!(positions[at], row as i32);
            let was = if row < 4 { row } else { rows - 24 + row };
            let old = &scene.rows[layer][head][was].k;
            for pair in 0..DIM / 2 {
                let (sin, cos) = ((row as f64 - was as f64) * frequency(pair)).sin_cos();
                let (a, b) = (old[pair], old[pair + DIM / 2]);
                for (at, want) in [(at * DIM + pair, a * cos - b * sin), (at * DIM + pair + DIM / 2, a * sin + b * cos)]
                {
                    assert!((k[at].to_f64() - want).abs() <= 2f64.powi(-8) * want.abs() + 1e-4, "{} not {want}", k[at]);
                }
            }
        }
    }
}

#[test]
fn refusals_name_the_argument() {
    let flow = Policy::FlowCache { budget: 12, lambda: 0.07, weight: PositionWeight::None };
    let mut scene = Scene::new(&Case { chunks: vec![], ..case(flow) });
    scene.append(36);
    let moves: Vec<_> = (0..2).map(|layer| scene.cache.compress(0, layer, 12).unwrap().unwrap()).collect();
    let cache = &scene.cache;
    let unsupported = |error: Option<Error>, name: &str| {
        assert!(matches!(error, Some(Error::Unsupported { arg, .. }) if arg == name), "{name}: {error:?}");
    };
    unsupported(cache.event::<bf16>(flow, &[]).err(), "compactions");
    assert!(matches!(cache.event::<f32>(flow, &moves).err(), Some(Error::DType { arg: "T", .. })));
    let mut others = moves.clone();
    others[1].tokens += 1;
    unsupported(cache.event::<bf16>(flow, &others).err(), "compactions");
    let build = |policy| cache.event::<bf16>(policy, &moves).unwrap().build(&DeviceInfo::H200).err();
    unsupported(build(flow), "queries");
    let snap = cache.event::<bf16>(Policy::SnapKv { budget: 12, window: 4 }, &moves).unwrap();
    unsupported(snap.queries(5).build(&DeviceInfo::H200).err(), "queries");
    let blocks = cache.event::<bf16>(flow, &moves).unwrap().queries(5).block(5);
    unsupported(blocks.build(&DeviceInfo::H200).err(), "block");
    unsupported(build(Policy::ScaleKv { budget: 12, scale: [3, 4] }), "scale");
    assert!(matches!(build(Policy::ScaleKv { budget: 12, scale: [6, 7] }), Some(Error::Size { arg: "scale", .. })));
    // The compactions have place for 12 rows.
    assert!(matches!(build(Policy::SnapKv { budget: 13, window: 4 }), Some(Error::Size { arg: "capacity", .. })));
}

/// Groups of sets and repetition change no bit.
#[test]
fn bitwise_in_any_groups() {
    for device in TestDevice::all() {
        for policy in policies() {
            let outcome = |workspace: u64| {
                let mut scene = Scene::new(&Case { workspace, layers: 3, ..case(policy) });
                scene.append(72);
                scene.compress(&device);
                scene.append(36);
                scene.compress(&device);
                let bits = |values: &[bf16]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                (bits(&scene.k), bits(&scene.v), scene.positions, scene.lengths)
            };
            let want = outcome(64_000_000);
            assert_eq!(outcome(64_000_000), want, "{policy:?}");
            assert_eq!(outcome(0), want, "{policy:?}");
        }
    }
}

/// A captured graph compresses what its buffers hold at the time: other queries, other pages.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn graphs_replay() {
    let Some(TestDevice::Cuda(stream)) = TestDevice::cuda() else { return };
    let device = TestDevice::Cuda(stream.clone());
    let policy = Policy::FlowCache { budget: 30, lambda: 0.07, weight: PositionWeight::None };
    let case = case(policy);
    let prepared = |seed: u64, turned: bool| {
        let mut scene = Scene::new(&Case { seed, ..case.clone() });
        if turned {
            // Other pages for the same rows.
            scene.cache.append(1, 0, 0, 30, 0).unwrap();
        }
        scene.append(72);
        let moves: Vec<_> = (0..2).map(|layer| scene.cache.compress(0, layer, 30).unwrap().unwrap()).collect();
        let pages: Vec<i32> = moves.iter().flat_map(|moves| &moves.input_pages).map(|&page| page as i32).collect();
        let q = uniform(&mut scene.rng, 2 * case.queries * 4 * DIM);
        (scene, moves, pages, q)
    };
    let (scene, moves, pages, q) = prepared(1, false);
    let event = scene.plan(&moves, &DeviceInfo::H200);
    let mut k = Buffer::of(&device, &scene.k, 0);
    let mut v = Buffer::of(&device, &scene.v, 0);
    let mut lengths = Buffer::<i32>::poisoned(&device, 4, 0);
    let mut pages = Buffer::of(&device, &pages, 0);
    let mut q = Buffer::of(&device, &q, 0);
    let mut workspace = Buffer::<u8>::poisoned(&device, event.workspace_bytes() as usize, 0);
    {
        let mut run = || {
            let mut args = EventArgs::of(k.output(), v.output(), lengths.output(), pages.input(), workspace.output());
            args.q = Some(q.input());
            event.run(&stream, args).unwrap();
        };
        run(); // loads the code
    }
    let graph = support::capture(&stream, || {
        let mut args = EventArgs::of(k.output(), v.output(), lengths.output(), pages.input(), workspace.output());
        args.q = Some(q.input());
        event.run(&stream, args).unwrap();
    });
    for seed in 2..5 {
        let (scene, _, words, queries) = prepared(seed, seed % 2 == 0);
        k.write(&scene.k);
        v.write(&scene.v);
        pages.write(&words);
        q.write(&queries);
        graph.launch().unwrap();
        // The same again without a graph.
        let mut want_k = Buffer::of(&device, &scene.k, 0);
        let mut want_v = Buffer::of(&device, &scene.v, 0);
        let mut want_lengths = Buffer::<i32>::poisoned(&device, 4, 0);
        let mut other = Buffer::<u8>::poisoned(&device, event.workspace_bytes() as usize, 0);
        {
            let (out_k, out_v) = (want_k.output(), want_v.output());
            let mut args = EventArgs::of(out_k, out_v, want_lengths.output(), pages.input(), other.output());
            args.q = Some(q.input());
            event.run(&stream, args).unwrap();
        }
        let bits = |buffer: &Buffer<bf16>| buffer.read().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&k), bits(&want_k));
        assert_eq!(bits(&v), bits(&want_v));
        assert_eq!(lengths.read(), want_lengths.read());
        assert_ne!(bits(&k), scene.k.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    }
}
