//! Generation steps over caches in bf16, fp8 and 4 bits, on the shapes of `benches/shapes.json`. `benches/support` says what
//! the modes time.

mod support;

use std::cell::RefCell;

use nextscale::attention::{
    Rule, ScaleAttention, ScaleAttentionArgs, ScaleAttentionPackedArgs, Segment, Variant, Visibility,
};
use nextscale::compression::{Format, Pack, PackArgs};
use nextscale::{DeviceInfo, bf16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, TestDevice};

/// Random values, repeated; a prime, so that no two rows are equal.
const VALUES: usize = 1_048_583;

#[derive(Deserialize)]
struct Shape {
    name: String,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    keys: usize,
    rows: usize,
    format: String,
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    let device = TestDevice::Cuda(stream.clone());
    let info = DeviceInfo::of(&stream).unwrap();
    for shape in &support::shapes::<Shape>("packed_attention") {
        let (format, inline) = match shape.format.as_str() {
            "fp8" => (Some(Format::Fp8), false),
            "fp8-inline" => (Some(Format::Fp8), true),
            "int4" => (Some(Format::INT4), false),
            _ => (None, false),
        };
        let segments = |rows: usize| [Segment::tokens(rows as u32)];
        let plan = |rows: usize| {
            let visibility = Visibility::new(&segments(rows), &segments(shape.keys), |_, _| Rule::Full).unwrap();
            let mut builder = ScaleAttention::<bf16>::builder(&visibility)
                .batch(shape.batch)
                .heads(shape.heads, shape.kv_heads)
                .head_dim(shape.dim);
            if shape.format == "bf16-portable" {
                builder = builder.variant(Variant::Portable);
            }
            if let Some(format) = format {
                builder = builder.packed(format, inline);
            }
            builder.build(&info).unwrap()
        };
        let (full, empty) = (plan(shape.rows), plan(0));
        let mut rng = StdRng::seed_from_u64(1);
        let values: Vec<bf16> = (0..VALUES).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0f32))).collect();
        let some = |len: usize| -> Vec<bf16> { values.iter().copied().cycle().take(len).collect() };
        let elements = |rows: usize, heads: usize| shape.batch * rows * heads * shape.dim;
        let q = Buffer::of(&device, &some(elements(shape.rows, shape.heads)), 0);
        let kv = [(); 2].map(|()| Buffer::of(&device, &some(elements(shape.keys, shape.kv_heads)), 0));
        let mut packed = Vec::new();
        if let Some(format) = format {
            for input in &kv {
                let mut builder =
                    Pack::<bf16, f32>::builder(format, shape.keys, shape.kv_heads, shape.dim).sets(shape.batch);
                if inline {
                    builder = builder.inline();
                }
                let pack = builder.build(&info).unwrap();
                let mut codes = Buffer::<u8>::poisoned(&device, pack.codes_len() as usize, 0);
                let mut numbers = Buffer::<f32>::poisoned(&device, pack.numbers_len() as usize, 0);
                let args = PackArgs {
                    input: input.input(),
                    codes: codes.output(),
                    numbers: (!inline).then(|| numbers.output()),
                    scales: None,
                    kept: None,
                    counts: None,
                    flags: None,
                };
                pack.pack(&stream, args).unwrap();
                packed.push((codes, numbers));
            }
        }
        let schedules = [&full, &empty].map(|plan| Buffer::of(&device, plan.schedule().words(), 0));
        let out = Buffer::<bf16>::poisoned(&device, elements(shape.rows, shape.heads), 0);
        let workspace = Buffer::<u8>::poisoned(&device, full.workspace_bytes() as usize, 0);
        let written = RefCell::new((out, workspace));
        let run = |plan: &ScaleAttention<bf16>, schedule: &Buffer<u32>| {
            let (out, workspace) = &mut *written.borrow_mut();
            let (q, schedule, workspace) = (q.input(), schedule.input(), Some(workspace.output()));
            if let [k, v] = &packed[..] {
                let args = ScaleAttentionPackedArgs {
                    q,
                    k: k.0.input(),
                    k_numbers: (!inline).then(|| k.1.input()),
                    v: v.0.input(),
                    v_numbers: (!inline).then(|| v.1.input()),
                    out: out.output(),
                    lse: None,
                    schedule,
                    lengths: None,
                    row_index: None,
                    kv_offset: None,
                    workspace,
                };
                return plan.run_packed(&stream, args).unwrap();
            }
            let (k, v, out) = (kv[0].input(), kv[1].input(), out.output());
            let args = ScaleAttentionArgs {
                q,
                k,
                v,
                out,
                lse: None,
                schedule,
                lengths: None,
                row_index: None,
                kv_offset: None,
                workspace,
            };
            plan.run(&stream, args).unwrap();
        };
        let row = match (format, inline) {
            (Some(format), true) => format.inline_bytes(shape.dim),
            (Some(format), false) => format.code_bytes(shape.dim) + 4 * format.numbers(),
            (None, _) => 2 * shape.dim,
        };
        let bytes = 2 * shape.batch * shape.keys * shape.kv_heads * row;
        let name = ("packed_attention", shape.name.as_str(), bytes as u64);
        support::time(&mut criterion, &stream, name, || run(&full, &schedules[0]), || run(&empty, &schedules[1]));
    }
    criterion.final_summary();
}
