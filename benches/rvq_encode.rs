//! RVQ encode on the shapes of `benches/shapes.json`. `benches/support` says what the modes time.

mod support;

use std::sync::Arc;

use criterion::Criterion;
use nextscale::DeviceInfo;
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::quantization::{Codebook, CodebookArgs, EncodeVariant, Metric, Projections, RvqEncode, RvqEncodeArgs};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, TestDevice};

#[derive(Deserialize)]
struct Shape {
    name: String,
    rows: usize,
    levels: usize,
    entries: usize,
    dim: usize,
    shared: bool,
    metric: String,
    /// "gaussian", or "clusters": codes that 16-bit products hardly tell apart.
    data: String,
    #[serde(default)]
    latent: usize,
    #[serde(default)]
    variant: String,
}

fn normal(rng: &mut StdRng) -> f32 {
    let (u, v): (f32, f32) = (rng.random_range(1e-7..1.0), rng.random_range(0.0..1.0));
    (-2.0 * u.ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}

/// Rows of normals, or within 0.1 of one of 64 centres.
fn rows(rng: &mut StdRng, shape: &Shape, count: usize, width: usize, scale: f32) -> Vec<f32> {
    let mut of_centres = StdRng::seed_from_u64(9);
    let centres: Vec<f32> = (0..64 * width).map(|_| normal(&mut of_centres)).collect();
    let mut rows = Vec::with_capacity(count * width);
    for _ in 0..count {
        let centre = rng.random_range(0..64usize) * width;
        rows.extend((0..width).map(|k| match shape.data.as_str() {
            "gaussian" => scale * normal(rng),
            "clusters" => scale * (centres[centre + k] + 0.1 * normal(rng)),
            other => panic!("no data {other}"),
        }));
    }
    rows
}

fn bench(criterion: &mut Criterion, stream: &Arc<CudaStream>, shape: &Shape) {
    let Shape { rows: count, levels, entries, dim, shared, latent, .. } = *shape;
    let device = TestDevice::Cuda(stream.clone());
    let info = DeviceInfo::of(stream).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let metric = match shape.metric.as_str() {
        "l2" => Metric::L2,
        "cosine_raw" => Metric::CosineRaw { eps: 1e-12 },
        "cosine_unit" => Metric::CosineUnit { eps: 1e-12 },
        other => panic!("no metric {other}"),
    };
    let variant = match shape.variant.as_str() {
        "" => EncodeVariant::Auto,
        "portable" => EncodeVariant::Portable,
        "hopper" => EncodeVariant::Hopper,
        other => panic!("no variant {other}"),
    };
    let books = if shared { 1 } else { levels };
    // Levels grow finer, as those of trained codebooks do.
    let source: Vec<f32> =
        (0..books).flat_map(|level| rows(&mut rng, shape, entries, dim, 0.9f32.powi(level as i32))).collect();
    let book = Codebook::builder(books, entries, dim).metric(metric).build(&info).unwrap();
    let source = Buffer::of(&device, &source, 0);
    let mut prepared = Buffer::<u8>::poisoned(&device, book.bytes() as usize, 0);
    let args = CodebookArgs { rows: source.input(), usage: None, prepared: prepared.output(), flags: None };
    book.prepare(stream, args).unwrap();

    let width = if latent > 0 { latent } else { dim };
    let input = Buffer::of(&device, &rows(&mut rng, shape, count, width, 1.0), 0);
    let weights = [levels * dim * latent, levels * dim, levels * latent * dim, levels * latent].map(|len| {
        let scale = 1.0 / (width as f32).sqrt();
        let weight: Vec<f32> = (0..if latent > 0 { len } else { 0 }).map(|_| scale * normal(&mut rng)).collect();
        Buffer::of(&device, &weight, 0)
    });
    let codes = std::cell::RefCell::new(Buffer::<u16>::poisoned(&device, levels * count, 0));
    let plan = |rows| {
        let mut plan = RvqEncode::<f32, u16>::builder(&book).levels(levels).rows(rows).variant(variant);
        if latent > 0 {
            plan = plan.projected(latent);
        }
        plan.build(&info).unwrap()
    };
    let run = |plan: &RvqEncode<f32, u16>| {
        let mut codes = codes.borrow_mut();
        let mut args = RvqEncodeArgs::new(input.input(), prepared.input(), codes.output());
        let [in_weight, in_bias, out_weight, out_bias] = &weights;
        args.projections = (latent > 0).then(|| Projections {
            in_weight: in_weight.input(),
            in_bias: in_bias.input(),
            out_weight: out_weight.input(),
            out_bias: out_bias.input(),
        });
        plan.run(stream, args).unwrap();
    };
    let (full, empty) = (plan(count), plan(0));
    let name = ("rvq_encode", shape.name.as_str(), full.work().bytes);
    support::time(criterion, stream, name, || run(&full), || run(&empty));
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("rvq_encode") {
        bench(&mut criterion, &stream, shape);
    }
    criterion.final_summary();
}
