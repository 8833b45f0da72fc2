//! Verification of image tokens on the shapes of `benches/shapes.json`. `benches/support` says what the modes time.
//!
//! The drafter's logits are the target's, and uniforms are given: 0, so that every draft is accepted and all rows are read. With
//! `reject` the drafter's have nothing to do with the target's and uniforms are just below 1, so that most steps end early and
//! a token is drawn from what is left.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::dtype::Float;
use nextscale::verification::{
    Accepted, Drafts, Embeddings, Emitted, Grouped, Lantern, Neighbours, Redraft, VisualOptions, VisualOut, VisualRule,
    VisualVerifier, VisualVerifierArgs,
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
    redraft: String,
    batch: usize,
    drafts: usize,
    vocab: usize,
    random: bool,
    guided: bool,
    reject: bool,
    dtype: String,
}

const DIM: usize = 8;

/// Rows of random logits: windows of a stretch of random numbers, for there are too many to draw.
fn logits<T: Float>(rows: usize, vocab: usize, stretch: &[f32]) -> Vec<T> {
    let stretch: Vec<T> = stretch.iter().map(|&x| T::from_f32(x)).collect();
    let mut logits = Vec::with_capacity(rows * vocab);
    for row in 0..rows {
        let first = row * 9973 % (stretch.len() - vocab);
        logits.extend_from_slice(&stretch[first..first + vocab]);
    }
    logits
}

fn bench<T: Float>(criterion: &mut Criterion, stream: &Arc<CudaStream>, shape: &Shape) {
    let Shape { batch, drafts: k, vocab, random, guided, .. } = *shape;
    let device = TestDevice::Cuda(stream.clone());
    let info = DeviceInfo::of(stream).unwrap();
    let rule = match shape.rule.as_str() {
        "lantern" => VisualRule::Lantern(Lantern::default()),
        "lantern++" => VisualRule::Lantern(Lantern { bound: 3.0, ..Lantern::default() }),
        "grouped" => VisualRule::Grouped(Grouped::default()),
        "grouped-embedded" => VisualRule::Grouped(Grouped { dim: DIM, ..Grouped::default() }),
        "jacobi" => VisualRule::Jacobi,
        other => panic!("no rule {other}"),
    };
    let redraft = match shape.redraft.as_str() {
        "none" => Redraft::None,
        "independent" => Redraft::Independent,
        "maximal" => Redraft::Maximal,
        "gumbel" => Redraft::Gumbel,
        other => panic!("no redraft {other}"),
    };
    let mut rng = StdRng::seed_from_u64(1);
    let mut stretch = || -> Vec<f32> { (0..vocab + (1 << 20)).map(|_| rng.random_range(-4.0..4.0f32)).collect() };
    let (with, free, other) = (stretch(), stretch(), stretch());
    let rows = batch * (k + 1);
    let target = Buffer::of(&device, &logits::<T>(rows, vocab, &with), 0);
    let target_free = guided.then(|| Buffer::of(&device, &logits::<T>(rows, vocab, &free), 0));
    // Row i of a request beside draft i.
    let beside = |stretch: &[f32]| -> Vec<T> {
        let all = logits::<T>(rows, vocab, stretch);
        (0..batch).flat_map(|b| all[b * (k + 1) * vocab..][..k * vocab].to_vec()).collect()
    };
    let draft = random.then(|| Buffer::of(&device, &beside(if shape.reject { &other } else { &with }), 0));
    let draft_free = (random && guided).then(|| Buffer::of(&device, &beside(&free), 0));
    let drafts: Vec<i32> =
        (0..rows).map(|r| if r % (k + 1) == k { -1 } else { rng.random_range(0..vocab as i32) }).collect();
    let drafts = Buffer::of(&device, &drafts, 0);
    let cu_rows: Vec<i32> = (0..=batch).map(|b| (b * (k + 1)) as i32).collect();
    let cu_rows = Buffer::of(&device, &cu_rows, 0);
    let accept = if shape.reject { 0.999 } else { 0.0 };
    let uniforms: Vec<f32> = (0..rows).flat_map(|r| [accept, r as f32 / rows as f32, 0.4, 0.6]).collect();
    // A race needs seeds.
    let uniforms = (redraft != Redraft::Gumbel).then(|| Buffer::of(&device, &uniforms, 0));
    let seeds = Buffer::of(&device, &(0..batch as i64).collect::<Vec<_>>(), 0);
    let near: Vec<u16> = match rule {
        VisualRule::Lantern(_) => {
            (0..vocab).flat_map(|code| (1..=1001).map(move |n| ((code + n * 13) % vocab) as u16)).collect()
        }
        _ => Vec::new(),
    };
    let near = Buffer::of(&device, &near, 0);
    let vectors: Vec<bf16> = (0..vocab * DIM).map(|_| bf16::from_f32(rng.random_range(-0.3..0.3f32))).collect();
    let vectors = Buffer::of(&device, &vectors, 0);

    let make = |batch| {
        let kind = if random { Drafts::Logits } else { Drafts::Deterministic };
        let plan = VisualVerifier::<T>::builder(batch, k, vocab, rule).drafts(kind).redraft(redraft);
        let plan = if guided { plan.guided() } else { plan };
        plan.build(&info).unwrap()
    };
    let plan = make(batch);
    let traffic = plan.traffic();
    struct Out {
        tokens: Buffer<i32>,
        redrafts: Buffer<i32>,
        emitted: Buffer<Emitted>,
        accepted: Buffer<Accepted>,
        status: Buffer<u32>,
        workspace: Buffer<u8>,
        counters: Buffer<u32>,
    }
    let out = RefCell::new(Out {
        tokens: Buffer::poisoned(&device, rows, 0),
        redrafts: Buffer::poisoned(&device, rows, 0),
        emitted: Buffer::poisoned(&device, batch, 0),
        accepted: Buffer::poisoned(&device, batch, 0),
        status: Buffer::poisoned(&device, batch, 0),
        workspace: Buffer::poisoned(&device, plan.workspace_bytes() as usize, 0),
        counters: Buffer::of(&device, &vec![0u32; plan.counter_words()], 0),
    });
    let run = |plan: &VisualVerifier<T>| {
        let out = &mut *out.borrow_mut();
        plan.run(
            stream,
            VisualVerifierArgs {
                target: target.input(),
                cu_rows: cu_rows.input(),
                drafts: drafts.input(),
                options: VisualOptions {
                    target_free: target_free.as_ref().map(Buffer::input),
                    draft: draft.as_ref().map(Buffer::input),
                    draft_free: draft_free.as_ref().map(Buffer::input),
                    neighbours: matches!(rule, VisualRule::Lantern(_)).then(|| Neighbours::U16(near.input())),
                    embeddings: matches!(rule, VisualRule::Grouped(Grouped { dim: DIM, .. }))
                        .then(|| Embeddings::BF16(vectors.input())),
                    seeds: Some(seeds.input()),
                    uniforms: uniforms.as_ref().map(Buffer::input),
                    ..VisualOptions::default()
                },
                out: VisualOut {
                    tokens: out.tokens.output(),
                    emitted: out.emitted.output(),
                    accepted: out.accepted.output(),
                    status: out.status.output(),
                    last_row: None,
                    redrafts: (redraft != Redraft::None).then(|| out.redrafts.output()),
                    redraft_stats: None,
                },
                workspace: out.workspace.output(),
                counters: out.counters.output(),
            },
        )
        .unwrap();
    };
    run(&plan);
    let accepted: i32 = out.borrow().accepted.read().iter().map(|n| n.0).sum();
    eprintln!("{}: {:.2} of {k} drafts accepted", shape.name, f64::from(accepted) / batch as f64);
    let empty = make(0);
    let name = ("visual_verify", shape.name.as_str(), traffic.read + traffic.written);
    support::time(criterion, stream, name, || run(&plan), || run(&empty));
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("visual_verify") {
        match dtype(&shape.dtype) {
            DType::F32 => bench::<f32>(&mut criterion, &stream, shape),
            DType::F16 => bench::<f16>(&mut criterion, &stream, shape),
            _ => bench::<bf16>(&mut criterion, &stream, shape),
        }
    }
    criterion.final_summary();
}
