//! Scale attention on the shapes of `benches/shapes.json`, bf16, inputs from a normal distribution.
//!
//! A case with `steps` is the steps of one image, each a case of its own, `<name>/k<step>`: the queries of a scale, a cache
//! with room for all. `also` names variants beside the one the plan chooses: `<case>@portable`, and `<case>@bounded`, for
//! which the caller vouches for a bound of the logits. `host` asks for what the calling thread pays, and for the time of
//! making a plan (`plan`). `benches/support` says what the other modes time.

mod support;

use std::cell::RefCell;
use std::process::ExitCode;
use std::sync::Arc;

use criterion::{BenchmarkGroup, Throughput, measurement::WallTime};
use nextscale::attention::{
    Rule, ScaleAttention, ScaleAttentionArgs, ScaleAttentionBuilder, Segment, Variant, Visibility,
};
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::{DeviceInfo, bf16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, TestDevice};

/// Above every logit of the inputs: their products are normal with a deviation of 1.
const LOGIT_BOUND: f32 = 20.0;
/// Random values, repeated; a prime, so that no two rows are equal.
const VALUES: usize = 1_048_583;

#[derive(Deserialize)]
struct Shape {
    name: String,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    /// Segments of keys, and of queries too if these are not given.
    scales: Vec<Scale>,
    queries: Option<Vec<Scale>>,
    table: Table,
    lengths: Option<Lengths>,
    #[serde(default)]
    steps: bool,
    #[serde(default)]
    also: Vec<String>,
    #[serde(default)]
    host: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Scale {
    Square(u32),
    Grid([u32; 2]),
    Video([u32; 3]),
}

/// Who sees whom: by name, or for each segment of queries the segments of keys that it sees.
#[derive(Deserialize)]
#[serde(untagged)]
enum Table {
    Named(String),
    Listed(Vec<Vec<usize>>),
}

/// A segment of keys of which each head of each batch entry has another number left.
#[derive(Deserialize)]
struct Lengths {
    segment: usize,
    least: u32,
    most: u32,
}

impl Scale {
    fn segment(&self) -> Segment {
        match *self {
            Scale::Square(side) => Segment::grid(side, side),
            Scale::Grid([height, width]) => Segment::grid(height, width),
            Scale::Video([frames, height, width]) => Segment::video(frames, height, width),
        }
    }
}

impl Table {
    fn sees(&self, q: usize, k: usize, segments: usize) -> bool {
        match self {
            Table::Listed(sees) => sees[q].contains(&k),
            Table::Named(name) => match name.as_str() {
                "full" => true,
                "causal" => k <= q,
                "diag" => k == q,
                // Clean blocks, then as many noised ones.
                "skip-causal" => k == q || k < q % (segments / 2),
                other => panic!("no table {other}"),
            },
        }
    }
}

impl Lengths {
    /// `[batch, kv_heads]`, spread over what there is.
    fn all(&self, shape: &Shape) -> Vec<i32> {
        let length = |i| self.least + i * 37 % (self.most - self.least + 1);
        (0..(shape.batch * shape.kv_heads) as u32).map(|i| length(i) as i32).collect()
    }
}

impl Shape {
    /// With the segment of keys that has lengths as this says.
    fn visibility(&self, limited: impl Fn(Segment) -> Segment) -> Visibility {
        let mut keys: Vec<Segment> = self.scales.iter().map(Scale::segment).collect();
        let queries = self.queries.as_ref().map_or(keys.clone(), |all| all.iter().map(Scale::segment).collect());
        if let Some(lengths) = &self.lengths {
            keys[lengths.segment] = limited(keys[lengths.segment]);
        }
        let rule = |q, k| if self.table.sees(q, k, keys.len()) { Rule::Full } else { Rule::Hidden };
        Visibility::new(&queries, &keys, rule).unwrap()
    }

    /// What is timed, with names.
    fn cases(&self) -> Vec<(String, Visibility)> {
        let all = self.visibility(|segment| segment.with_length(0));
        if !self.steps {
            return vec![(self.name.clone(), all)];
        }
        (0..self.scales.len()).map(|k| (format!("{}/k{k}", self.name), all.step(k))).collect()
    }

    fn useful_flops(&self, plan: &ScaleAttention<bf16>) -> u64 {
        let Some(lengths) = &self.lengths else { return plan.useful_flops() };
        let pairs = |length: i32| self.visibility(|_| Segment::tokens(length as u32)).visible_pairs();
        let per_kv_head = 4 * self.dim as u64 * (self.heads / self.kv_heads) as u64;
        lengths.all(self).into_iter().map(|length| per_kv_head * pairs(length)).sum()
    }

    fn key_count(&self) -> usize {
        self.scales.iter().map(|scale| scale.segment().len() as usize).sum()
    }

    fn elements(&self) -> usize {
        let rows = self.visibility(|segment| segment).query_count() as usize;
        self.batch * self.dim * (rows * self.heads).max(self.key_count() * self.kv_heads)
    }
}

/// Buffers large enough for every case.
struct Tensors {
    q: Buffer<bf16>,
    k: Buffer<bf16>,
    v: Buffer<bf16>,
    out: RefCell<Buffer<bf16>>,
    lse: RefCell<Buffer<f32>>,
    workspace: RefCell<Buffer<u8>>,
}

/// Normal values, by the method of Box and Muller.
fn normal_values(rng: &mut StdRng) -> Vec<bf16> {
    let mut value = || {
        let (radius, angle) = (1.0 - rng.random::<f32>(), rng.random::<f32>() * core::f32::consts::TAU);
        bf16::from_f32((-2.0 * radius.ln()).sqrt() * angle.cos())
    };
    (0..VALUES).map(|_| value()).collect()
}

impl Tensors {
    fn new(device: &TestDevice, shapes: &[Shape]) -> Self {
        let most = shapes.iter().map(Shape::elements).max().unwrap_or(0);
        let mut rng = StdRng::seed_from_u64(1);
        let mut normal = || {
            let values = normal_values(&mut rng);
            Buffer::of(device, &values.iter().copied().cycle().take(most).collect::<Vec<_>>(), 0)
        };
        let (q, k, v) = (normal(), normal(), normal());
        Tensors {
            q,
            k,
            v,
            out: RefCell::new(Buffer::poisoned(device, most, 0)),
            // Heads have at least 8 elements.
            lse: RefCell::new(Buffer::poisoned(device, most / 8, 0)),
            workspace: RefCell::new(Buffer::poisoned(device, 0, 0)),
        }
    }
}

struct Bench<'a> {
    stream: &'a Arc<CudaStream>,
    device: &'a TestDevice,
    tensors: &'a Tensors,
    info: DeviceInfo,
}

impl Bench<'_> {
    /// Whether it ran.
    fn time(
        &self,
        group: &mut BenchmarkGroup<'_, WallTime>,
        shape: &Shape,
        name: &str,
        builder: &ScaleAttentionBuilder<bf16>,
        with_host: bool,
    ) -> bool {
        let plan = builder.clone().build(&self.info).unwrap();
        let schedule = Buffer::of(self.device, plan.schedule().words(), 0);
        let lengths = shape.lengths.as_ref().map(|lengths| Buffer::of(self.device, &lengths.all(shape), 0));
        let tensors = self.tensors;
        *tensors.workspace.borrow_mut() = Buffer::poisoned(self.device, plan.workspace_bytes() as usize, 0);
        let run = || {
            let (mut out, mut lse) = (tensors.out.borrow_mut(), tensors.lse.borrow_mut());
            let mut workspace = tensors.workspace.borrow_mut();
            plan.run(
                self.stream,
                ScaleAttentionArgs {
                    q: tensors.q.input(),
                    k: tensors.k.input(),
                    v: tensors.v.input(),
                    out: out.output(),
                    lse: Some(lse.output()),
                    schedule: schedule.input(),
                    lengths: lengths.as_ref().map(|lengths| lengths.input()),
                    row_index: None,
                    kv_offset: None,
                    workspace: Some(workspace.output()),
                },
            )
        };
        // A kernel that this build has not must not cost the others their times.
        if let Err(error) = run() {
            eprintln!("{name}: {error}");
            return false;
        }
        let run = || run().unwrap();
        eprintln!("{name}: {:?}, {:?}", plan.variant(), plan.schedule());
        group.throughput(Throughput::Elements(shape.useful_flops(&plan)));
        support::time_graph(group, self.stream, name, run);
        if with_host {
            support::time_host(group, self.stream, name, run);
            group.bench_function(criterion::BenchmarkId::new("plan", name), |b| {
                b.iter(|| builder.clone().build(&self.info).unwrap());
            });
        }
        true
    }
}

fn main() -> ExitCode {
    let Some(stream) = support::gpu() else { return ExitCode::SUCCESS };
    let device = TestDevice::Cuda(stream.clone());
    let shapes = support::shapes::<Shape>("scale_attention");
    let tensors = Tensors::new(&device, &shapes);
    let bench = Bench { stream: &stream, device: &device, tensors: &tensors, info: DeviceInfo::of(&stream).unwrap() };
    let mut criterion = support::quick_criterion();
    let mut group = criterion.benchmark_group("scale_attention");
    let mut all_ran = true;
    for shape in &shapes {
        for (name, visibility) in shape.cases() {
            let builder = ScaleAttention::<bf16>::builder(&visibility)
                .batch(shape.batch)
                .heads(shape.heads, shape.kv_heads)
                .head_dim(shape.dim)
                .kv_rows(shape.key_count());
            all_ran &= bench.time(&mut group, shape, &name, &builder, shape.host);
            for variant in &shape.also {
                let builder = match variant.as_str() {
                    "portable" => builder.clone().variant(Variant::Portable),
                    "bounded" => builder.clone().logit_bound(LOGIT_BOUND),
                    other => panic!("no variant {other}"),
                };
                all_ran &= bench.time(&mut group, shape, &format!("{name}@{variant}"), &builder, false);
            }
        }
    }
    group.finish();
    criterion.final_summary();
    if all_ran { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
