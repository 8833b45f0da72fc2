//! Timing on the GPU for criterion: CUDA events round the work, in the modes that `python-ref/bench_peers.py` uses too.
//!
//! | mode | what is timed |
//! |---|---|
//! | `graph` | replays of a CUDA graph of 20 runs; L2 holds what fits |
//! | `stream` | runs enqueued one after the other; L2 as in `graph` |
//! | `cold` | one run after 256 MiB were written, which leaves nothing of it in L2 |
//! | `host_enqueue` | what the calling thread spends in `run`, CUDA's launch included |
//! | `host_checks` | the same for an empty problem: all but CUDA's launch |
//!
//! A CUDA graph of runs that take longer has fewer of them. What is timed in a graph follows a rest of 200 ms, for a GPU under
//! load lowers its clock: within a tenth of a second by up to a tenth.

#![allow(dead_code)] // each bench uses its part

#[path = "../../tests/support/mod.rs"]
mod harness;

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use nextscale::cudarc_0_19::cudarc::driver::{CudaSlice, CudaStream, sys};

pub use harness::*;

const RUNS_PER_GRAPH: u64 = 20;
/// A graph of fewer runs, if they would take longer than this.
const LONG_GRAPH: Duration = Duration::from_millis(4);
/// Before a graph is timed; bench_peers.py does the same.
const REST: Duration = Duration::from_millis(200);
const FLUSH_BYTES: usize = 256 << 20;
/// Enqueued before the queue is let run dry: fewer than the driver's queue holds.
const ENQUEUED: u64 = 256;

/// A GPU to time on, or `None` with the reason printed.
pub fn gpu() -> Option<Arc<CudaStream>> {
    match TestDevice::cuda()? {
        TestDevice::Cuda(stream) => Some(stream),
        TestDevice::Host => None,
    }
}

/// The cases of an op in `benches/shapes.json`.
pub fn shapes<T: serde::de::DeserializeOwned>(op: &str) -> Vec<T> {
    let mut ops: serde_json::Value = serde_json::from_str(include_str!("../shapes.json")).unwrap();
    serde_json::from_value(ops[op].take()).unwrap()
}

/// Criterion with few, short samples: GPU time is dear, and medians settle fast. A case takes about two seconds in all modes.
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(15)
        .nresamples(2000)
        .warm_up_time(Duration::from_millis(60))
        .measurement_time(Duration::from_millis(200))
        .without_plots()
        .configure_from_args()
}

/// The same for an op of a hundred cases.
pub fn quick_criterion() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .nresamples(2000)
        .warm_up_time(Duration::from_millis(25))
        .measurement_time(Duration::from_millis(100))
        .without_plots()
        .configure_from_args()
}

/// Times `run` in every mode, as `op/<mode>/<case>`. `bytes` are those that it moves. `run_empty` runs a problem without
/// elements.
pub fn time(
    criterion: &mut Criterion,
    stream: &Arc<CudaStream>,
    (op, case, bytes): (&str, &str, u64),
    run: impl Fn(),
    run_empty: impl Fn(),
) {
    let mut group = criterion.benchmark_group(op);
    group.throughput(Throughput::Bytes(bytes));
    time_in(&mut group, stream, case, run);
    group.bench_function(BenchmarkId::new("host_checks", case), |b| b.iter(&run_empty));
    group.finish();
}

/// [`time`] of what has no empty problem.
pub fn time_in(group: &mut BenchmarkGroup<'_, WallTime>, stream: &Arc<CudaStream>, case: &str, run: impl Fn()) {
    let mut flush = stream.alloc_zeros::<u8>(FLUSH_BYTES).expect("256 MiB");
    time_graph(group, stream, case, &run);
    group.bench_function(BenchmarkId::new("stream", case), |b| {
        b.iter_custom(|iterations| events(stream, || (0..iterations).for_each(|_| run())));
    });
    group.bench_function(BenchmarkId::new("cold", case), |b| {
        b.iter_custom(|iterations| (0..iterations).map(|_| cold(stream, &mut flush, &run)).sum());
    });
    time_host(group, stream, case, &run);
}

/// Times replays, as `<group>/graph/<case>`.
pub fn time_graph(group: &mut BenchmarkGroup<'_, WallTime>, stream: &Arc<CudaStream>, case: &str, run: impl Fn()) {
    run(); // loads the code
    let once = events(stream, &run).max(Duration::from_nanos(1));
    let runs = (LONG_GRAPH.div_duration_f64(once) as u64).clamp(1, RUNS_PER_GRAPH);
    let graph = capture(stream, || (0..runs).for_each(|_| run()));
    std::thread::sleep(REST);
    group.bench_function(BenchmarkId::new("graph", case), |b| {
        b.iter_custom(|iterations| {
            let replays = iterations.div_ceil(runs);
            let elapsed = events(stream, || (0..replays).for_each(|_| graph.launch().expect("a replay")));
            elapsed.mul_f64(iterations as f64 / (replays * runs) as f64)
        });
    });
}

/// Times the calling thread, as `<group>/host_enqueue/<case>`.
pub fn time_host(group: &mut BenchmarkGroup<'_, WallTime>, stream: &Arc<CudaStream>, case: &str, run: impl Fn()) {
    group.bench_function(BenchmarkId::new("host_enqueue", case), |b| {
        b.iter_custom(|iterations| host(stream, iterations, &run));
    });
}

fn events(stream: &Arc<CudaStream>, work: impl FnOnce()) -> Duration {
    let event = || stream.context().new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).expect("an event");
    let (start, end) = (event(), event());
    start.record(stream).expect("recorded");
    work();
    end.record(stream).expect("recorded");
    end.synchronize().expect("the work ran without a fault");
    Duration::from_secs_f64(f64::from(start.elapsed_ms(&end).expect("both are recorded")) / 1e3)
}

fn cold(stream: &Arc<CudaStream>, flush: &mut CudaSlice<u8>, run: &impl Fn()) -> Duration {
    stream.memset_zeros(flush).expect("a flush");
    events(stream, run)
}

fn host(stream: &Arc<CudaStream>, iterations: u64, run: &impl Fn()) -> Duration {
    let (mut left, mut total) = (iterations, Duration::ZERO);
    while left > 0 {
        let batch = left.min(ENQUEUED);
        stream.synchronize().expect("the work ran without a fault");
        let start = Instant::now();
        (0..batch).for_each(|_| run());
        total += start.elapsed();
        left -= batch;
    }
    stream.synchronize().expect("the work ran without a fault");
    total
}
