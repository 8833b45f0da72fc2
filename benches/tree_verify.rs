//! Verification of trees of drafts on the shapes of `benches/shapes.json`. `benches/support` says what the modes time.
//!
//! `levels` are the nodes at each depth; of each level the first third have the next one's nodes as children. Without noise
//! the drafter's logits are the target's: the first child is accepted, down to a leaf. With noise some fail, and what is left is
//! summed for each. `peak` is the probability that the target gives the first child of each node; 0: logits are random.
//! `visited` is how many rows of the target a walk comes to, on average.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::dtype::Float;
use nextscale::verification::{
    Accepted, DraftSample, DraftSampleArgs, Drafts, Emitted, Rule, Siblings, Tree, TreeLinks, TreeVerifier,
    TreeVerifierArgs, TreeVerifierOptions, TreeVerifierOut,
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
    levels: Vec<usize>,
    vocab: usize,
    draft: String,
    noise: f32,
    peak: f64,
    distinct: bool,
    visited: f64,
    dtype: String,
}

/// The tree of a case, as `python-ref/peers_trees.py` has it.
fn tree(levels: &[usize]) -> Tree {
    let (mut parents, mut first, mut before) = (vec![-1], 0, 1);
    for &width in levels {
        let used = before.min((width / 3).max(1));
        parents.extend((0..width).map(|k| (first + k * used / width) as i32));
        (first, before) = (first + before, width);
    }
    Tree::from_parents(&parents).unwrap()
}

/// Tokens drawn from the softmax of a row, one after the other, with or without replacement.
fn draw<T: Float>(row: &[T], count: usize, distinct: bool, rng: &mut StdRng) -> Vec<i32> {
    let mut weights: Vec<f64> = row.iter().map(|x| f64::from(x.to_f32()).exp()).collect();
    let mut all: f64 = weights.iter().sum();
    (0..count)
        .map(|_| {
            let mut rest = rng.random_range(0.0..all);
            let token = weights.iter().position(|weight| {
                rest -= weight;
                rest < 0.0
            });
            let token = token.unwrap_or(0);
            if distinct {
                all -= std::mem::take(&mut weights[token]);
            }
            token as i32
        })
        .collect()
}

fn bench<T: Float>(criterion: &mut Criterion, stream: &Arc<CudaStream>, shape: &Shape) {
    let Shape { batch, vocab, noise, distinct, .. } = *shape;
    let device = TestDevice::Cuda(stream.clone());
    let info = DeviceInfo::of(stream).unwrap();
    let rule = match shape.rule.as_str() {
        "greedy" => Rule::Greedy,
        "match" => Rule::Match,
        "reject" => Rule::Reject,
        other => panic!("no rule {other}"),
    };
    let kind = match shape.draft.as_str() {
        "none" => Drafts::Deterministic,
        "logits" => Drafts::Logits,
        "stats" => Drafts::LogitsAndStats,
        other => panic!("no drafts {other}"),
    };
    let tree = tree(&shape.levels);
    let n = tree.len();
    let mut rng = StdRng::seed_from_u64(1);
    // Windows of a stretch of random numbers, for there are too many to draw.
    let stretch: Vec<f32> = (0..vocab + (1 << 20)).map(|_| rng.random_range(-4.0..4.0f32)).collect();
    let window = |row: usize| row * 9973 % (stretch.len() - vocab);
    let noisy: Vec<f32> = stretch.iter().map(|x| x + noise * rng.random_range(-1.0..1.0f32)).collect();
    let rows = |from: &[f32]| -> Vec<T> {
        (0..batch * n).flat_map(|row| from[window(row)..][..vocab].iter().map(|&x| T::from_f32(x))).collect()
    };
    let mut of_target = rows(&stretch);
    let of_draft = if kind == Drafts::Deterministic { Vec::new() } else { rows(&noisy) };
    let mut drafts: Vec<i32> = (0..batch * n).map(|_| rng.random_range(0..vocab as i32)).collect();
    // The others together weigh about 6.82 each.
    let bump = (6.82 * vocab as f64 * shape.peak / (1.0 - shape.peak)).ln() as f32;
    for b in 0..batch {
        for parent in 0..n {
            let children: Vec<usize> = (1..n).filter(|&node| tree.parents()[node] == parent as i32).collect();
            let Some(&first) = children.first() else { continue };
            let at = (b * n + parent) * vocab;
            if shape.peak > 0.0 {
                of_target[at + drafts[b * n + first] as usize] = T::from_f32(bump);
            }
            if rule == Rule::Greedy {
                let row = &of_target[at..][..vocab];
                let best = (0..vocab).rev().max_by(|&x, &y| row[x].to_f32().total_cmp(&row[y].to_f32())).unwrap();
                drafts[b * n + first] = best as i32;
            } else if rule == Rule::Reject {
                let drawn = draw(&of_draft[at..][..vocab], children.len(), distinct, &mut rng);
                children.iter().zip(drawn).for_each(|(&child, token)| drafts[b * n + child] = token);
            }
        }
    }
    let target = Buffer::of(&device, &of_target, 0);
    let draft = Buffer::of(&device, &of_draft, 0);
    drop((of_target, of_draft));

    // The drafter's statistics, by the library's sampler.
    let mut stats = Buffer::<f32>::poisoned(&device, batch * n * 4, 0);
    if kind == Drafts::LogitsAndStats {
        let rows = batch * n;
        let plan = DraftSample::<T>::builder(rows, vocab).build(&info).unwrap();
        let mut drawn = Buffer::<i32>::poisoned(&device, rows, 0);
        let mut status = Buffer::<u32>::poisoned(&device, rows, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(&device, &vec![0u32; plan.counter_words()], 0);
        let args = DraftSampleArgs {
            logits: draft.input(),
            temperature: None,
            top_k: None,
            top_p: None,
            min_p: None,
            draft_to_target: None,
            seeds: None,
            positions: None,
            rows_in_step: None,
            uniforms: None,
            tokens: drawn.output(),
            stats: Some(stats.output()),
            log_probs: None,
            status: status.output(),
            workspace: workspace.output(),
            counters: counters.output(),
        };
        plan.run(stream, args).unwrap();
        drawn.read();
    }
    let drafts = Buffer::of(&device, &drafts, 0);
    let parents = Buffer::of(&device, &tree.parents().repeat(batch), 0);
    let seeds: Vec<i64> = (0..batch as i64).map(|b| b + (1 << 32)).collect();
    let seeds = Buffer::of(&device, &seeds, 0);

    let depth = tree.max_depth();
    let siblings = if distinct { Siblings::WithoutReplacement } else { Siblings::WithReplacement };
    let make = |batch| {
        let builder = TreeVerifier::<T, T>::builder(batch, n, depth, vocab).rule(rule).drafts(kind).siblings(siblings);
        builder.build(&info).unwrap()
    };
    let plan = make(batch);
    struct Out {
        tokens: Buffer<i32>,
        emitted: Buffer<Emitted>,
        accepted: Buffer<Accepted>,
        status: Buffer<u32>,
        path: Buffer<i32>,
        workspace: Buffer<u8>,
    }
    let out = RefCell::new(Out {
        tokens: Buffer::poisoned(&device, batch * (depth + 1), 0),
        emitted: Buffer::poisoned(&device, batch, 0),
        accepted: Buffer::poisoned(&device, batch, 0),
        status: Buffer::poisoned(&device, batch, 0),
        path: Buffer::poisoned(&device, batch * (depth + 1), 0),
        workspace: Buffer::poisoned(&device, plan.workspace_bytes() as usize, 0),
    });
    let run = |plan: &TreeVerifier<T, T>| {
        let out = &mut *out.borrow_mut();
        let args = TreeVerifierArgs {
            target: target.input(),
            tree: TreeLinks::Parents(parents.input()),
            drafts: drafts.input(),
            options: TreeVerifierOptions {
                draft: (kind != Drafts::Deterministic).then(|| draft.input()),
                draft_stats: (kind == Drafts::LogitsAndStats).then(|| stats.input()),
                seeds: Some(seeds.input()),
                ..TreeVerifierOptions::default()
            },
            out: TreeVerifierOut {
                path: Some(out.path.output()),
                ..TreeVerifierOut::new(
                    out.tokens.output(),
                    out.emitted.output(),
                    out.accepted.output(),
                    out.status.output(),
                )
            },
            workspace: out.workspace.output(),
        };
        plan.run(stream, args).unwrap();
    };
    run(&plan);
    let visited: i32 = out.borrow().accepted.read().iter().map(|n| n.0 + 1).sum();
    let mean = f64::from(visited) / batch as f64;
    let cluster = plan.schedule().cluster;
    eprintln!("{}: {mean:.2} rows a request, {:.2} expected; {cluster} blocks a request", shape.name, shape.visited);
    // What this run's walks came to.
    let row = (vocab * size_of::<T>()) as f64;
    let of_draft = if kind == Drafts::Logits { visited as f64 - batch as f64 } else { 0.0 };
    let bytes = ((f64::from(visited) + of_draft) * row) as u64;
    let empty = make(0);
    support::time(criterion, stream, ("tree_verify", shape.name.as_str(), bytes), || run(&plan), || run(&empty));
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("tree_verify") {
        match dtype(&shape.dtype) {
            DType::F32 => bench::<f32>(&mut criterion, &stream, shape),
            DType::F16 => bench::<f16>(&mut criterion, &stream, shape),
            _ => bench::<bf16>(&mut criterion, &stream, shape),
        }
    }
    criterion.final_summary();
}
