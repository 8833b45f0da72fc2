//! Verification of drafts on the shapes of `benches/shapes.json`. `benches/support` says what the modes time.
//!
//! Without noise the drafter's logits are the target's: all drafts are accepted, and every row is read. With noise some are
//! rejected: rows behind them need not be read, and the residual is drawn from. `draft` is how the drafts were made: not at
//! random, from logits that the op reads, or from logits of which it has the drafter's statistics.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::dtype::Float;
use nextscale::verification::{
    Accepted, DraftSample, DraftSampleArgs, Drafts, Emitted, Rule, Verifier, VerifierArgs, VerifierOptions, VerifierOut,
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
    drafts: usize,
    vocab: usize,
    draft: String,
    noise: f32,
    dtype: String,
}

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
    let Shape { batch, drafts: k, vocab, noise, .. } = *shape;
    let device = TestDevice::Cuda(stream.clone());
    let info = DeviceInfo::of(stream).unwrap();
    let rule = match shape.rule.as_str() {
        "greedy" => Rule::Greedy,
        "match" => Rule::Match,
        "reject" => Rule::Reject,
        "block" => Rule::Block,
        other => panic!("no rule {other}"),
    };
    let kind = match shape.draft.as_str() {
        "none" => Drafts::Deterministic,
        "logits" => Drafts::Logits,
        "stats" => Drafts::LogitsAndStats,
        other => panic!("no drafts {other}"),
    };
    let mut rng = StdRng::seed_from_u64(1);
    let stretch: Vec<f32> = (0..vocab + (1 << 20)).map(|_| rng.random_range(-4.0..4.0f32)).collect();
    let noisy: Vec<f32> = stretch.iter().map(|x| x + noise * rng.random_range(-1.0..1.0f32)).collect();
    let target = Buffer::of(&device, &logits::<T>(batch * (k + 1), vocab, &stretch), 0);
    // Row i of a request beside draft i.
    let of_drafts: Vec<T> = {
        let all = logits::<T>(batch * (k + 1), vocab, &noisy);
        (0..batch).flat_map(|b| all[b * (k + 1) * vocab..][..k * vocab].to_vec()).collect()
    };
    let draft = Buffer::of(&device, &of_drafts, 0);
    drop(of_drafts);

    // Drafts by the library's sampler.
    let rows = batch * k;
    let mut drawn = Buffer::<i32>::poisoned(&device, rows, 0);
    let mut stats = Buffer::<f32>::poisoned(&device, rows * 4, 0);
    let mut status = Buffer::<u32>::poisoned(&device, rows, 0);
    let seeds: Vec<i64> = (0..rows as i64).collect();
    let plan = DraftSample::<T>::builder(rows, vocab).build(&info).unwrap();
    let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
    let mut counters = Buffer::of(&device, &vec![0u32; plan.counter_words()], 0);
    let draft_seeds = Buffer::of(&device, &seeds, 0);
    // Without randomness the draft is what the target takes.
    let cold = Buffer::of(&device, &vec![if kind == Drafts::Deterministic { 0f32 } else { 1.0 }; rows], 0);
    plan.run(
        stream,
        DraftSampleArgs {
            logits: draft.input(),
            temperature: Some(cold.input()),
            top_k: None,
            top_p: None,
            min_p: None,
            draft_to_target: None,
            seeds: Some(draft_seeds.input()),
            positions: None,
            rows_in_step: None,
            uniforms: None,
            tokens: drawn.output(),
            stats: Some(stats.output()),
            log_probs: None,
            status: status.output(),
            workspace: workspace.output(),
            counters: counters.output(),
        },
    )
    .unwrap();
    let drawn = drawn.read();
    let drafts: Vec<i32> = (0..batch).flat_map(|b| [&drawn[b * k..][..k], &[-1]].concat()).collect();
    let drafts = Buffer::of(&device, &drafts, 0);
    let cu_rows: Vec<i32> = (0..=batch).map(|b| (b * (k + 1)) as i32).collect();
    let cu_rows = Buffer::of(&device, &cu_rows, 0);
    let seeds: Vec<i64> = (0..batch as i64).map(|b| b + (1 << 32)).collect();
    let seeds = Buffer::of(&device, &seeds, 0);

    let make = |batch| Verifier::<T, T>::builder(batch, k, vocab).rule(rule).drafts(kind).build(&info).unwrap();
    let plan = make(batch);
    let traffic = plan.traffic();
    struct Out {
        tokens: Buffer<i32>,
        emitted: Buffer<Emitted>,
        accepted: Buffer<Accepted>,
        status: Buffer<u32>,
        workspace: Buffer<u8>,
        counters: Buffer<u32>,
    }
    let out = RefCell::new(Out {
        tokens: Buffer::poisoned(&device, batch * (k + 1), 0),
        emitted: Buffer::poisoned(&device, batch, 0),
        accepted: Buffer::poisoned(&device, batch, 0),
        status: Buffer::poisoned(&device, batch, 0),
        workspace: Buffer::poisoned(&device, plan.workspace_bytes() as usize, 0),
        counters: Buffer::of(&device, &vec![0u32; plan.counter_words()], 0),
    });
    let run = |plan: &Verifier<T, T>| {
        let out = &mut *out.borrow_mut();
        plan.run(
            stream,
            VerifierArgs {
                target: target.input(),
                cu_rows: cu_rows.input(),
                drafts: drafts.input(),
                options: VerifierOptions {
                    draft: (kind != Drafts::Deterministic).then(|| draft.input()),
                    draft_stats: (kind == Drafts::LogitsAndStats).then(|| stats.input()),
                    seeds: Some(seeds.input()),
                    ..VerifierOptions::default()
                },
                out: VerifierOut {
                    tokens: out.tokens.output(),
                    emitted: out.emitted.output(),
                    accepted: out.accepted.output(),
                    status: out.status.output(),
                    last_row: None,
                    log_probs: None,
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
    let name = ("verify", shape.name.as_str(), traffic.read + traffic.written);
    support::time(criterion, stream, name, || run(&plan), || run(&empty));
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("verify") {
        match dtype(&shape.dtype) {
            DType::F32 => bench::<f32>(&mut criterion, &stream, shape),
            DType::F16 => bench::<f16>(&mut criterion, &stream, shape),
            _ => bench::<bf16>(&mut criterion, &stream, shape),
        }
    }
    criterion.final_summary();
}
