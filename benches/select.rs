//! The selection on the shapes of `benches/shapes.json`. `benches/support` says what the modes time.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::DeviceInfo;
use nextscale::compression::{Scope, Select, SelectArgs};
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, TestDevice};

#[derive(Deserialize)]
struct Shape {
    name: String,
    sets: usize,
    heads: usize,
    tokens: usize,
    budget: usize,
    recent: usize,
    block: usize,
    scope: String,
    redundancy: bool,
}

fn bench(criterion: &mut Criterion, stream: &Arc<CudaStream>, shape: &Shape) {
    let Shape { sets, heads, tokens, budget, recent, block, redundancy, .. } = *shape;
    let scope = match shape.scope.as_str() {
        "head" => Scope::PerHead,
        "set" => Scope::PerSet,
        "shared" => Scope::Shared,
        _ => Scope::Ada { floor: 0.2 },
    };
    let info = DeviceInfo::of(stream).unwrap();
    let plan = |sets| {
        let builder = Select::builder(sets, heads, tokens).scope(scope).budget(budget).recent(recent).block(block);
        builder.build(&info).unwrap()
    };
    let (plan, empty) = (plan(sets), plan(0));
    let device = TestDevice::Cuda(stream.clone());
    let mut rng = StdRng::seed_from_u64(1);
    // Sums to 1, as a softmax does, and as uneven.
    let mut scores = || {
        let scores: Vec<f32> = (0..sets * heads * tokens)
            .map(|_| (2.0 * rng.random_range(-1.0..1.0f32) + rng.random_range(-1.0..1.0f32)).exp() / tokens as f32)
            .collect();
        Buffer::of(&device, &scores, 0)
    };
    let (importance, its_redundancy) = (scores(), scores());
    let outs = RefCell::new((
        Buffer::<i32>::poisoned(&device, plan.lists() * plan.capacity(), 0),
        Buffer::<i32>::poisoned(&device, plan.lists(), 0),
        Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0),
    ));
    let run = |plan: &Select| {
        let (indices, counts, workspace) = &mut *outs.borrow_mut();
        let args = SelectArgs {
            importance: Some(importance.input()),
            redundancy: redundancy.then(|| its_redundancy.input()),
            weights: None,
            lengths: None,
            budgets: None,
            indices: indices.output(),
            counts: counts.output(),
            status: None,
            workspace: Some(workspace.output()),
        };
        plan.run(stream, args).unwrap();
    };
    let traffic = plan.traffic(1 + usize::from(redundancy));
    let name = ("select", shape.name.as_str(), traffic.read + traffic.written);
    support::time(criterion, stream, name, || run(&plan), || run(&empty));
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("select") {
        bench(&mut criterion, &stream, shape);
    }
    criterion.final_summary();
}
