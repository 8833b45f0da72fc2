//! Packing and unpacking on the shapes of `benches/shapes.json`, bf16. `benches/support` says what the modes time.

mod support;

use std::cell::RefCell;

use nextscale::compression::{Format, Pack, PackArgs, PackBuilder, Rotation, Traffic, UnpackArgs};
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
    how: String,
    format: String,
    bits: u32,
    /// 0: the format's own.
    group: u32,
    inline: bool,
    rotate: bool,
    sets: usize,
    tokens: usize,
    /// 0: all tokens.
    kept: usize,
    heads: usize,
    dim: usize,
}

impl Shape {
    fn builder(&self, empty: bool) -> PackBuilder<bf16, f32> {
        let format = match self.format.as_str() {
            "fp8" => Format::Fp8,
            "int8" => Format::Int8,
            "uniform" => Format::Uniform { bits: self.bits, group: (self.group > 0).then_some(self.group) },
            "channel" => Format::Channel { bits: self.bits, rows: self.group },
            "lloyd_max" => Format::LloydMax { bits: self.bits, renormalize: true },
            other => panic!("no format {other}"),
        };
        let tokens = if empty { 0 } else { self.tokens };
        let mut builder = Pack::builder(format, tokens, self.heads, self.dim).sets(self.sets);
        if self.kept > 0 {
            builder = builder.kept(if empty { 0 } else { self.kept });
        }
        if self.inline {
            builder = builder.inline();
        }
        if self.rotate { builder.rotation(Rotation::seeded(1)) } else { builder }
    }
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    let device = TestDevice::Cuda(stream.clone());
    for shape in &support::shapes::<Shape>("pack") {
        let plan = shape.builder(false).build(&DeviceInfo::of(&stream).unwrap()).unwrap();
        let empty = shape.builder(true).build(&DeviceInfo::H200).unwrap();
        let mut rng = StdRng::seed_from_u64(1);
        let values: Vec<bf16> = (0..VALUES).map(|_| bf16::from_f32(rng.random_range(-1.0..1.0f32))).collect();
        let rows = if shape.kept > 0 { shape.kept } else { shape.tokens };
        let elements = |rows: usize| shape.sets * rows * shape.heads * shape.dim;
        let input: Vec<bf16> = values.iter().copied().cycle().take(elements(shape.tokens)).collect();
        let input = Buffer::of(&device, &input, 0);
        // Every second token or so, ascending, others for each head.
        let mut kept: Vec<i32> = Vec::new();
        for list in 0..if shape.kept > 0 { shape.sets * shape.heads } else { 0 } {
            let step = |r: usize| (r * shape.tokens / shape.kept + (r * 7 + list) % 2).min(shape.tokens - 1);
            kept.extend((0..shape.kept).map(|r| step(r) as i32));
        }
        let kept = Buffer::of(&device, &kept, 0);
        let codes = Buffer::<u8>::poisoned(&device, plan.codes_len() as usize, 0);
        let numbers = Buffer::<f32>::poisoned(&device, plan.numbers_len() as usize, 0);
        let packed = RefCell::new((codes, numbers));
        let pack = |plan: &Pack<bf16, f32>| {
            let (codes, numbers) = &mut *packed.borrow_mut();
            let args = PackArgs {
                input: input.input(),
                codes: codes.output(),
                numbers: (!shape.inline).then(|| numbers.output()),
                scales: None,
                kept: (shape.kept > 0).then(|| kept.input()),
                counts: None,
                flags: None,
            };
            plan.pack(&stream, args).unwrap();
        };
        pack(&plan);
        let Traffic { read, written } = plan.pack_traffic();
        let name = ("pack", shape.name.as_str(), read + written);
        if shape.how == "pack" {
            support::time(&mut criterion, &stream, name, || pack(&plan), || pack(&empty));
            continue;
        }
        let out = RefCell::new(Buffer::<bf16>::poisoned(&device, elements(rows), 0));
        let unpack = |plan: &Pack<bf16, f32>| {
            let (packed, mut out) = (packed.borrow(), out.borrow_mut());
            let args = UnpackArgs {
                codes: packed.0.input(),
                numbers: (!shape.inline).then(|| packed.1.input()),
                scales: None,
                counts: None,
                out: out.output(),
                flags: None,
            };
            plan.unpack(&stream, args).unwrap();
        };
        support::time(&mut criterion, &stream, name, || unpack(&plan), || unpack(&empty));
    }
    criterion.final_summary();
}
