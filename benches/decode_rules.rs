//! Draft sampling and the rules beside chains and trees, on the shapes of `benches/shapes.json`. `benches/support` says
//! what the modes time. `rows` are a request's rows and `list` is what the rule lists; each function says what that is.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::dtype::{Element, Float};
use nextscale::verification::{
    Accepted, Backspace, BackspaceArgs, BeamRank, BeamRankArgs, ConfidenceOut, ConfidenceRank, ConfidenceRankArgs,
    DraftSample, DraftSampleArgs, Emitted, GatedSample, GatedSampleArgs, Neighbours, PooledOptions, PooledOut,
    PooledVerifier, PooledVerifierArgs, SelectCandidate, SelectCandidateArgs, TypicalOut, TypicalVerifier,
    TypicalVerifierArgs,
};
use nextscale::{DType, DeviceInfo, bf16, f16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, TestDevice, dtype};

#[derive(Deserialize)]
struct Shape {
    name: String,
    rule: String,
    batch: usize,
    rows: usize,
    vocab: usize,
    list: usize,
    guided: bool,
    dtype: String,
}

/// What the runs of a case have in common.
struct Bench<'a> {
    criterion: &'a mut Criterion,
    stream: &'a Arc<CudaStream>,
    device: TestDevice,
    info: DeviceInfo,
    shape: &'a Shape,
    rng: StdRng,
}

impl Bench<'_> {
    fn floats(&mut self, count: usize, least: f32, most: f32) -> Vec<f32> {
        (0..count).map(|_| self.rng.random_range(least..most)).collect()
    }

    /// All rows of random logits: windows of a stretch of random numbers, for there are too many to draw.
    fn logits<T: Float>(&mut self) -> Buffer<T> {
        let Shape { batch, rows, vocab, .. } = *self.shape;
        let stretch: Vec<T> = self.floats(vocab + (1 << 20), -4.0, 4.0).into_iter().map(T::from_f32).collect();
        let mut logits = Vec::with_capacity(batch * rows * vocab);
        for row in 0..batch * rows {
            let first = row * 9973 % (stretch.len() - vocab);
            logits.extend_from_slice(&stretch[first..first + vocab]);
        }
        Buffer::of(&self.device, &logits, 0)
    }

    fn tokens(&mut self, count: usize, most: usize) -> Buffer<i32> {
        let tokens: Vec<i32> = (0..count).map(|_| self.rng.random_range(0..most as i32)).collect();
        Buffer::of(&self.device, &tokens, 0)
    }

    fn seeds(&self, count: usize) -> Buffer<i64> {
        Buffer::of(&self.device, &(0..count as i64).collect::<Vec<_>>(), 0)
    }

    fn out<T: Element>(&self, count: usize) -> RefCell<Buffer<T>> {
        RefCell::new(Buffer::poisoned(&self.device, count, 0))
    }

    fn zeros(&self, count: usize) -> RefCell<Buffer<u32>> {
        RefCell::new(Buffer::of(&self.device, &vec![0u32; count], 0))
    }

    fn time(self, bytes: u64, run: impl Fn(), empty: impl Fn()) {
        support::time(self.criterion, self.stream, ("decode_rules", &self.shape.name, bytes), run, empty);
    }

    /// `list` drafts a row, distinct.
    fn draft<T: Float>(mut self) {
        let Shape { batch, rows, vocab, list, .. } = *self.shape;
        let (logits, rows) = (self.logits::<T>(), batch * rows);
        let make = |rows| DraftSample::<T>::builder(rows, vocab).drafts(list as u32).build(&self.info).unwrap();
        let plan = make(rows);
        let seeds = self.seeds(rows);
        let (tokens, stats) = (self.out::<i32>(rows * list), self.out::<f32>(rows * 4));
        let (status, workspace) = (self.out::<u32>(rows), self.out::<u8>(plan.workspace_bytes() as usize));
        let counters = self.zeros(plan.counter_words());
        let stream = self.stream;
        let run = |plan: &DraftSample<T>| {
            plan.run(
                stream,
                DraftSampleArgs {
                    logits: logits.input(),
                    temperature: None,
                    top_k: None,
                    top_p: None,
                    min_p: None,
                    draft_to_target: None,
                    seeds: Some(seeds.input()),
                    positions: None,
                    rows_in_step: None,
                    uniforms: None,
                    tokens: tokens.borrow_mut().output(),
                    stats: Some(stats.borrow_mut().output()),
                    log_probs: None,
                    status: status.borrow_mut().output(),
                    workspace: workspace.borrow_mut().output(),
                    counters: counters.borrow_mut().output(),
                },
            )
            .unwrap();
        };
        let (empty, traffic) = (make(0), plan.traffic());
        self.time(traffic.read + traffic.written, || run(&plan), || run(&empty));
    }

    /// Square images of `rows` tokens, `list` neighbours of each code.
    fn pooled<T: Float>(mut self) {
        let Shape { batch, rows, vocab, list, guided, .. } = *self.shape;
        let side = rows.isqrt();
        assert_eq!(side * side, rows);
        let target = self.logits::<T>();
        let free = guided.then(|| self.logits::<T>());
        let drafts = self.tokens(batch * rows, vocab);
        let near: Vec<u16> =
            (0..vocab).flat_map(|code| (1..=list).map(move |n| ((code + n * 13) % vocab) as u16)).collect();
        let near = Buffer::of(&self.device, &near, 0);
        // About half of the drafts stay: a neighbourhood of uniform logits has `list + 1` of `vocab`.
        let threshold = Buffer::of(&self.device, &vec![(list + 1) as f32 / vocab as f32; batch], 0);
        let make = |batch| {
            let plan = PooledVerifier::<T>::builder(batch, [side, side], vocab).neighbours(list).radius(1);
            let plan = if guided { plan.guided() } else { plan };
            plan.build(&self.info).unwrap()
        };
        let plan = make(batch);
        let (resample, positions) = (self.out::<u8>(batch * rows), self.out::<i32>(batch * rows));
        let (islands, counts) = (self.out::<i32>(batch * rows), self.out::<i32>(batch * 2));
        let (status, workspace) = (self.out::<u32>(batch), self.out::<u8>(plan.workspace_bytes() as usize));
        let counters = self.zeros(plan.counter_words());
        let stream = self.stream;
        let run = |plan: &PooledVerifier<T>| {
            plan.run(
                stream,
                PooledVerifierArgs {
                    target: target.input(),
                    drafts: drafts.input(),
                    options: PooledOptions {
                        target_free: free.as_ref().map(Buffer::input),
                        neighbours: Some(Neighbours::U16(near.input())),
                        threshold: Some(threshold.input()),
                        ..PooledOptions::default()
                    },
                    out: PooledOut {
                        resample: resample.borrow_mut().output(),
                        positions: Some(positions.borrow_mut().output()),
                        islands: Some(islands.borrow_mut().output()),
                        counts: counts.borrow_mut().output(),
                        pooled: None,
                        status: status.borrow_mut().output(),
                    },
                    workspace: workspace.borrow_mut().output(),
                    counters: counters.borrow_mut().output(),
                },
            )
            .unwrap();
        };
        run(&plan);
        let found = counts.borrow().read();
        eprintln!("{}: {} of {rows} tokens are drawn again, {} islands", self.shape.name, found[0], found[1]);
        let (empty, traffic) = (make(0), plan.traffic());
        self.time(traffic.read + traffic.written, || run(&plan), || run(&empty));
    }

    /// `rows` nodes; a chain, or with `list` that many paths of up to 5 nodes.
    fn typical<T: Float>(mut self) {
        const DEPTH: usize = 5;
        let Shape { batch, rows, vocab, list, .. } = *self.shape;
        let (target, drafts) = (self.logits::<T>(), self.tokens(batch * rows, vocab));
        // Path p: node 0, then nodes that later paths share the first of.
        let paths: Vec<i32> = (0..list)
            .flat_map(|p| {
                (0..DEPTH).map(move |d| if d == 0 { 0 } else { (1 + (p / (d + 1) + d * 7) % (rows - 1)) as i32 })
            })
            .collect();
        let paths = Buffer::of(&self.device, &paths, 0);
        let make = |batch| {
            let plan = TypicalVerifier::<T>::builder(batch, rows, vocab);
            let plan = if list > 0 { plan.paths(list, DEPTH) } else { plan };
            plan.build(&self.info).unwrap()
        };
        let plan = make(batch);
        let seeds = self.seeds(batch);
        let depth = if list > 0 { DEPTH } else { rows };
        let (tokens, emitted) = (self.out::<i32>(batch * depth), self.out::<Emitted>(batch));
        let (accepted, status) = (self.out::<Accepted>(batch), self.out::<u32>(batch));
        let workspace = self.out::<u8>(plan.workspace_bytes() as usize);
        let counters = self.zeros(plan.counter_words());
        let stream = self.stream;
        let run = |plan: &TypicalVerifier<T>| {
            plan.run(
                stream,
                TypicalVerifierArgs {
                    target: target.input(),
                    drafts: drafts.input(),
                    paths: (list > 0).then(|| paths.input()),
                    row_index: None,
                    temperature: None,
                    seeds: Some(seeds.input()),
                    positions: None,
                    uniforms: None,
                    out: TypicalOut {
                        tokens: tokens.borrow_mut().output(),
                        emitted: emitted.borrow_mut().output(),
                        accepted: accepted.borrow_mut().output(),
                        nodes: None,
                        path: None,
                        last_row: None,
                        status: status.borrow_mut().output(),
                    },
                    workspace: workspace.borrow_mut().output(),
                    counters: counters.borrow_mut().output(),
                },
            )
            .unwrap();
        };
        let (empty, traffic) = (make(0), plan.traffic());
        self.time(traffic.read + traffic.written, || run(&plan), || run(&empty));
    }

    /// `rows` masked rows, of which `list` are committed.
    fn confidence<T: Float>(mut self) {
        let Shape { batch, rows, vocab, list, .. } = *self.shape;
        let logits = self.logits::<T>();
        let wanted = Buffer::of(&self.device, &vec![list as i32; batch], 0);
        let make = |batch| ConfidenceRank::<T>::builder(batch, rows, vocab).build(&self.info).unwrap();
        let plan = make(batch);
        let (tokens, committed) = (self.out::<i32>(batch * rows), self.out::<i32>(batch));
        let (status, workspace) = (self.out::<u32>(batch), self.out::<u8>(plan.workspace_bytes() as usize));
        let counters = self.zeros(plan.counter_words());
        let stream = self.stream;
        let run = |plan: &ConfidenceRank<T>| {
            plan.run(
                stream,
                ConfidenceRankArgs {
                    logits: logits.input(),
                    masked: None,
                    temperature: None,
                    top_k: None,
                    top_p: None,
                    min_p: None,
                    threshold: None,
                    counts: wanted.input(),
                    noise: None,
                    seeds: None,
                    positions: None,
                    out: ConfidenceOut {
                        tokens: tokens.borrow_mut().output(),
                        candidates: None,
                        confidence: None,
                        committed: committed.borrow_mut().output(),
                        status: status.borrow_mut().output(),
                    },
                    workspace: workspace.borrow_mut().output(),
                    counters: counters.borrow_mut().output(),
                },
            )
            .unwrap();
        };
        let (empty, traffic) = (make(0), plan.traffic());
        self.time(traffic.read + traffic.written, || run(&plan), || run(&empty));
    }

    fn gated<T: Float>(mut self) {
        let Shape { batch, rows, vocab, .. } = *self.shape;
        let (first, second, rows) = (self.logits::<T>(), self.logits::<T>(), batch * rows);
        let gate = self.floats(rows, 0.0, 1.0);
        let (gate, seeds) = (Buffer::of(&self.device, &gate, 0), self.seeds(rows));
        let make = |rows| GatedSample::<T>::builder(rows, vocab).build(&self.info).unwrap();
        let plan = make(rows);
        let (tokens, status) = (self.out::<i32>(rows), self.out::<u32>(rows));
        let workspace = self.out::<u8>(plan.workspace_bytes() as usize);
        let stream = self.stream;
        let run = |plan: &GatedSample<T>| {
            plan.run(
                stream,
                GatedSampleArgs {
                    first: first.input(),
                    second: second.input(),
                    gate: gate.input(),
                    temperature: None,
                    top_k: None,
                    top_p: None,
                    min_p: None,
                    seeds: Some(seeds.input()),
                    positions: None,
                    uniforms: None,
                    tokens: tokens.borrow_mut().output(),
                    stats: None,
                    status: status.borrow_mut().output(),
                    workspace: workspace.borrow_mut().output(),
                },
            )
            .unwrap();
        };
        let (empty, traffic) = (make(0), plan.traffic());
        self.time(traffic.read + traffic.written, || run(&plan), || run(&empty));
    }

    /// `rows` beams, `list` kept.
    fn beam<T: Float>(mut self) {
        let Shape { batch, rows, vocab, list, .. } = *self.shape;
        let logits = self.logits::<T>();
        let scores = self.floats(batch * rows, -5.0, 0.0);
        let scores = Buffer::of(&self.device, &scores, 0);
        let make = |batch| BeamRank::<T>::new(batch, rows, list, vocab, None, &self.info).unwrap();
        let plan = make(batch);
        let (parents, tokens) = (self.out::<i32>(batch * list), self.out::<i32>(batch * list));
        let (best, status) = (self.out::<f32>(batch * list), self.out::<u32>(batch));
        let workspace = self.out::<u8>(plan.workspace_bytes() as usize);
        let counters = self.zeros(plan.counter_words());
        let stream = self.stream;
        let run = |plan: &BeamRank<T>| {
            plan.run(
                stream,
                BeamRankArgs {
                    logits: logits.input(),
                    scores: scores.input(),
                    temperature: None,
                    parents: parents.borrow_mut().output(),
                    tokens: tokens.borrow_mut().output(),
                    best: best.borrow_mut().output(),
                    status: status.borrow_mut().output(),
                    workspace: workspace.borrow_mut().output(),
                    counters: counters.borrow_mut().output(),
                },
            )
            .unwrap();
        };
        let (empty, traffic) = (make(0), plan.traffic());
        self.time(traffic.read + traffic.written, || run(&plan), || run(&empty));
    }

    /// Of `list` candidates of `rows` tokens.
    fn select(mut self) {
        let Shape { batch, rows, list, .. } = *self.shape;
        let scores = self.floats(batch * list, -3.0, 3.0);
        let scores = Buffer::of(&self.device, &scores, 0);
        let (sequences, seeds) = (self.tokens(batch * list * rows, 1 << 20), self.seeds(batch));
        let make = |batch| SelectCandidate::new(batch, list, rows, &self.info).unwrap();
        let plan = make(batch);
        let (parents, status) = (self.out::<i32>(batch), self.out::<u32>(batch));
        let selected = self.out::<i32>(batch * rows);
        let stream = self.stream;
        let run = |plan: &SelectCandidate| {
            plan.run(
                stream,
                SelectCandidateArgs {
                    scores: scores.input(),
                    sequences: Some(sequences.input()),
                    temperature: None,
                    seeds: Some(seeds.input()),
                    positions: None,
                    uniforms: None,
                    parents: parents.borrow_mut().output(),
                    selected: Some(selected.borrow_mut().output()),
                    status: status.borrow_mut().output(),
                },
            )
            .unwrap();
        };
        let empty = make(0);
        let bytes = batch * (list * 4 + rows * 8 + 8);
        self.time(bytes as u64, || run(&plan), || run(&empty));
    }

    /// `list` tokens emitted, in sequences of `rows`; a fourth of them are backspaces.
    fn backspace(mut self) {
        let Shape { batch, rows, list, .. } = *self.shape;
        let emitted = self.tokens(batch * list, 4);
        let make = |batch| Backspace::new(batch, list, rows, 3, &self.info).unwrap();
        let plan = make(batch);
        // A token more or less each run: they do not fill up within the time of a bench.
        let lengths = RefCell::new(Buffer::of(&self.device, &vec![(rows / 2) as i32; batch], 0));
        let sequences = RefCell::new(Buffer::of(&self.device, &vec![7i32; batch * rows], 0));
        let (kept, status) = (self.out::<i32>(batch), self.out::<u32>(batch));
        let stream = self.stream;
        let run = |plan: &Backspace| {
            plan.run(
                stream,
                BackspaceArgs {
                    emitted: emitted.input(),
                    least: None,
                    sequences: sequences.borrow_mut().output(),
                    lengths: lengths.borrow_mut().output(),
                    kept: kept.borrow_mut().output(),
                    status: status.borrow_mut().output(),
                },
            )
            .unwrap();
        };
        let empty = make(0);
        let bytes = batch * (list * 8 + 16);
        self.time(bytes as u64, || run(&plan), || run(&empty));
    }

    fn bench<T: Float>(self) {
        match self.shape.rule.as_str() {
            "draft" => self.draft::<T>(),
            "pooled" => self.pooled::<T>(),
            "typical" => self.typical::<T>(),
            "confidence" => self.confidence::<T>(),
            "gated" => self.gated::<T>(),
            "beam" => self.beam::<T>(),
            "select" => self.select(),
            "backspace" => self.backspace(),
            other => panic!("no rule {other}"),
        }
    }
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("decode_rules") {
        let bench = Bench {
            criterion: &mut criterion,
            stream: &stream,
            device: TestDevice::Cuda(stream.clone()),
            info: DeviceInfo::of(&stream).unwrap(),
            shape,
            rng: StdRng::seed_from_u64(1),
        };
        match dtype(&shape.dtype) {
            DType::F32 => bench.bench::<f32>(),
            DType::F16 => bench.bench::<f16>(),
            _ => bench.bench::<bf16>(),
        }
    }
    criterion.final_summary();
}
