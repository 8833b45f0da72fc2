//! Key norms and redundancy on the shapes of `benches/shapes.json`: all layers of an event. `benches/support` says what the
//! modes time. `update` is key norms alone, of keys that are appended; `similar` both, for R-KV starts anew at every event;
//! `softmax` and `cosine` the scores alone. Random keys have no neighbours: the search for them looks at all pairs.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::DeviceInfo;
use nextscale::compression::{Form, KeyNorms, KeyNormsArgs, Redundancy, RedundancyArgs, Similar};
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::dtype::Float;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, ForFloats, TestDevice, dtype, for_floats};

#[derive(Deserialize)]
struct Shape {
    name: String,
    sets: usize,
    heads: usize,
    dim: usize,
    tokens: usize,
    what: String,
    dtype: String,
}

struct Bench<'a> {
    criterion: &'a mut Criterion,
    stream: &'a Arc<CudaStream>,
    shape: &'a Shape,
}

impl ForFloats for Bench<'_> {
    fn call<T: Float, O: Float>(self) {
        let Shape { sets, heads, dim, tokens, .. } = *self.shape;
        let form = match self.shape.what.as_str() {
            "update" => None,
            "softmax" => Some(Form::Softmax),
            "cosine" => Some(Form::Cosine),
            "similar" => Some(Form::Similar(Similar::default())),
            other => panic!("no form {other}"),
        };
        let info = DeviceInfo::of(self.stream).unwrap();
        let norms = |sets| {
            let builder = KeyNorms::<T>::builder(heads, dim).sets(sets).tokens(tokens);
            if form.is_none() { builder.accumulate() } else { builder }.build(&info).unwrap()
        };
        let scores = |sets| {
            let builder = Redundancy::<T>::builder(heads, dim).sets(sets).tokens(tokens);
            builder.form(form.unwrap_or_default()).build(&info).unwrap()
        };

        let device = TestDevice::Cuda(self.stream.clone());
        let mut rng = StdRng::seed_from_u64(1);
        // A stretch of random numbers over and over: there are too many to draw.
        let stretch: Vec<T> = (0..(4 << 20) + 8 * 129).map(|_| T::from_f32(rng.random_range(-1.0..1.0))).collect();
        let keys: Vec<T> = stretch.iter().copied().cycle().take(sets * tokens * heads * dim).collect();
        let k = Buffer::of(&device, &keys, 0);
        drop(keys);
        let (norms, no_norms, scores, no_scores) = (norms(sets), norms(0), scores(sets), scores(0));
        let inverse_norms = RefCell::new(Buffer::<f32>::poisoned(&device, sets * heads * tokens, 0));
        let unit_sum = RefCell::new(Buffer::of(&device, &vec![0f32; sets * heads * dim], 0));
        let out = RefCell::new(Buffer::<f32>::poisoned(&device, sets * heads * tokens, 0));
        let most = norms.workspace_bytes().max(scores.workspace_bytes()) as usize;
        let workspace = RefCell::new(Buffer::<u8>::poisoned(&device, most, 0));
        let update = |plan: &KeyNorms<T>| {
            let (mut inverse_norms, mut unit_sum) = (inverse_norms.borrow_mut(), unit_sum.borrow_mut());
            let mut workspace = workspace.borrow_mut();
            let args = KeyNormsArgs {
                pages: None,
                k: k.input(),
                inverse_norms: inverse_norms.output(),
                unit_sum: unit_sum.output(),
                lengths: None,
                workspace: Some(workspace.output()),
            };
            plan.run(self.stream, args).unwrap();
        };
        let score = |plan: &Redundancy<T>| {
            let (inverse_norms, unit_sum) = (inverse_norms.borrow(), unit_sum.borrow());
            let (mut out, mut workspace) = (out.borrow_mut(), workspace.borrow_mut());
            let args = RedundancyArgs {
                pages: None,
                k: k.input(),
                inverse_norms: inverse_norms.input(),
                unit_sum: unit_sum.input(),
                scores: out.output(),
                lengths: None,
                workspace: Some(workspace.output()),
            };
            plan.run(self.stream, args).unwrap();
        };
        update(&norms);
        let run = |norms: &KeyNorms<T>, scores: &Redundancy<T>| {
            if matches!(self.shape.what.as_str(), "update" | "similar") {
                update(norms);
            }
            if form.is_some() {
                score(scores);
            }
        };
        let traffic = if form.is_none() { norms.traffic() } else { scores.traffic() };
        let name = ("redundancy", self.shape.name.as_str(), traffic.read + traffic.written);
        support::time(self.criterion, self.stream, name, || run(&norms, &scores), || run(&no_norms, &no_scores));
    }
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("redundancy") {
        let dtype = dtype(&shape.dtype);
        for_floats(dtype, dtype, Bench { criterion: &mut criterion, stream: &stream, shape });
    }
    criterion.final_summary();
}
