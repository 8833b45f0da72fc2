//! Whole compression events on the shapes of `benches/shapes.json`: all layers, over the pages of a cache, in place. A
//! case is timed from the queries to the rows in their places. `benches/support` says what the modes time.
//!
//! Layers take their pages in turn, as an engine fills them. Every run compresses the same rows again: what the one
//! before has moved are keys like others.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::{Criterion, Throughput};
use nextscale::compression::{CacheSpec, ChunkCache, Compaction, EventArgs, Policy, PositionWeight};
use nextscale::cudarc_0_19::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use nextscale::{DType, DeviceInfo, In, Out, bf16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, TestDevice};

#[derive(Deserialize)]
struct Shape {
    name: String,
    policy: String,
    layers: usize,
    heads: usize,
    groups: usize,
    dim: usize,
    tokens: usize,
    budget: usize,
    window: usize,
    queries: usize,
    page_rows: usize,
    lambda: f32,
}

/// Random vectors in device memory, a stretch of them over and over: there are too many to draw.
fn random(stream: &Arc<CudaStream>, len: usize, seed: u64) -> CudaSlice<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    // No multiple of a row of keys.
    let stretch: Vec<bf16> = (0..(4 << 20) + 8 * 129).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0))).collect();
    let stretch: &[u8] = bytemuck::cast_slice(&stretch);
    let all = 2 * len;
    let mut memory = stream.alloc_zeros::<u8>(all.max(1)).expect("device memory");
    for first in (0..all).step_by(stretch.len()) {
        let some = stretch.len().min(all - first);
        stream.memcpy_htod(&stretch[..some], &mut memory.slice_mut(first..first + some)).expect("a copy to the device");
    }
    memory
}

fn bench(criterion: &mut Criterion, stream: &Arc<CudaStream>, shape: &Shape) {
    let &Shape { layers, heads, groups, dim, tokens, budget, window, queries, page_rows, lambda, .. } = shape;
    let policy = match shape.policy.as_str() {
        "flowcache" => Policy::FlowCache { budget, lambda, weight: PositionWeight::None },
        "rkv" => Policy::RKv { budget, window, lambda },
        "snapkv" => Policy::SnapKv { budget, window },
        "scalekv" => Policy::ScaleKv { budget, scale: [64, 64] },
        other => panic!("no policy {other}"),
    };
    let pages = layers * tokens.div_ceil(page_rows);
    let spec = CacheSpec {
        branches: 1,
        layers,
        heads,
        k_dim: dim,
        v_dim: dim,
        dtype: DType::BF16,
        packed: None,
        page_rows,
        spare_pages: 0,
        extras: 0,
        most_rows: tokens,
        bytes: (pages * page_rows * heads * (4 * dim + 4)) as u64 + (8 << 20),
    };
    let mut cache = ChunkCache::new(spec).unwrap();
    for first in (0..tokens).step_by(page_rows) {
        for layer in 0..layers {
            cache.append(0, layer, first as u64, page_rows.min(tokens - first), first as u32).unwrap();
            cache.seal(0, layer, first as u64).unwrap();
        }
    }
    let moves: Vec<Compaction> =
        (0..layers).map(|layer| cache.compress(0, layer, policy.rows(heads)).unwrap().unwrap()).collect();
    let mut builder = cache.event::<bf16>(policy, &moves).unwrap().groups(groups);
    if policy.queries().is_none() {
        builder = builder.queries(queries);
    }
    let event = builder.build(&DeviceInfo::of(stream).unwrap()).unwrap();
    eprintln!("{}: workspace of {:.1} MB, {} groups", shape.name, event.workspace_bytes() as f64 / 1e6, event.groups());

    let device = TestDevice::Cuda(stream.clone());
    let rows = cache.layout().pages * page_rows * heads;
    let q_rows = if event.rows().is_empty() { queries } else { 64 * 64 };
    let q_len = layers * q_rows * heads * groups * dim;
    let q = random(stream, q_len, 1);
    let caches = [2, 3].map(|seed| RefCell::new(random(stream, rows * dim, seed)));
    let words: Vec<i32> = moves.iter().flat_map(|moves| &moves.input_pages).map(|&page| page as i32).collect();
    let pages = Buffer::of(&device, &words, 0);
    let (grid, columns) = (Buffer::of(&device, event.rows(), 0), Buffer::of(&device, event.columns(), 0));
    let positions = RefCell::new(Buffer::of(&device, &vec![0i32; rows], 0));
    let lengths = RefCell::new(Buffer::<i32>::poisoned(&device, layers * heads, 0));
    let workspace = RefCell::new(Buffer::<u8>::poisoned(&device, event.workspace_bytes() as usize, 0));
    let run = || {
        let [mut k, mut v] = caches.each_ref().map(|cache| cache.borrow_mut());
        let out = |cache: &mut CudaSlice<u8>| {
            let (address, _guard) = cache.device_ptr_mut(stream);
            // SAFETY: the memory is that long, outlives the call, and is used on one stream.
            unsafe { Out::<bf16>::from_raw(address, rows * dim, 0) }
        };
        let (mut lengths, mut positions, mut workspace) =
            (lengths.borrow_mut(), positions.borrow_mut(), workspace.borrow_mut());
        let mut args = EventArgs::of(out(&mut k), out(&mut v), lengths.output(), pages.input(), workspace.output());
        let (address, _guard) = q.device_ptr(stream);
        // SAFETY: as above.
        args.q = Some(unsafe { In::from_raw(address, q_len, 0) });
        args.positions = Some(positions.output());
        args.rows = (!event.rows().is_empty()).then(|| grid.input());
        args.columns = (!event.columns().is_empty()).then(|| columns.input());
        event.run(stream, args).unwrap();
    };
    let traffic = event.traffic();
    let mut group = criterion.benchmark_group("compress_event");
    group.throughput(Throughput::Bytes(traffic.read + traffic.written));
    support::time_in(&mut group, stream, &shape.name, run);
    group.finish();
    assert_eq!(lengths.borrow().read(), vec![budget as i32; layers * heads], "{}", shape.name);
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("compress_event") {
        bench(&mut criterion, &stream, shape);
    }
    criterion.final_summary();
}
