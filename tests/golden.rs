//! Every device against what PyTorch answered: `python-ref/make_golden.py` wrote the files and describes them.

#![cfg(all(feature = "attention", feature = "quantization"))]

mod support;

use nextscale::attention::{AppendAt, Merge, MergeArgs, Norm, Positions, Prepare, PrepareArgs, Rope};
use nextscale::dtype::{Code, Float};
use nextscale::philox::PhiloxFill;
use nextscale::quantization::{RvqDecode, RvqDecodeArgs};
use nextscale::{DType, DeviceInfo, philox};
use safetensors::SafeTensors;
use serde_json::Value;
use support::{
    Buffer, ForDTypes, ForFloats, ForThreeFloats, TestDevice, Tolerance, dtype, for_dtypes, for_floats,
    for_three_floats, rounding,
};

// Embedded, so that a test binary can run on a machine that has nothing else.
const RVQ_DECODE: &[u8] = include_bytes!("golden/rvq_decode.safetensors");
const ATTENTION_MERGE: &[u8] = include_bytes!("golden/attention_merge.safetensors");
const ATTENTION_PREPARE: &[u8] = include_bytes!("golden/attention_prepare.safetensors");
const PHILOX: &[u8] = include_bytes!("golden/philox.safetensors");

fn open(file: &[u8]) -> (SafeTensors<'_>, Vec<Value>) {
    let (_, metadata) = SafeTensors::read_metadata(file).unwrap();
    let cases = &metadata.metadata().as_ref().unwrap()["cases"];
    (SafeTensors::deserialize(file).unwrap(), serde_json::from_str(cases).unwrap())
}

fn tensor<T: bytemuck::Pod>(file: &SafeTensors<'_>, case: &Value, name: &str) -> Vec<T> {
    let name = format!("{}.{name}", case["name"].as_str().unwrap());
    bytemuck::allocation::pod_collect_to_vec(file.tensor(&name).unwrap().data())
}

struct Check<'a> {
    file: &'a SafeTensors<'a>,
    case: &'a Value,
}

impl ForDTypes for Check<'_> {
    fn call<C: Code, E: Float, O: Float>(self) {
        check::<C, E, O>(self.file, self.case);
    }
}

fn check<C: Code, E: Float, O: Float>(file: &SafeTensors<'_>, case: &Value) {
    let size = |name: &str| case[name].as_u64().unwrap() as usize;
    let flag = |name: &str| case[name].as_bool().unwrap();
    let batch = case["batch"].as_u64().unwrap_or(1) as usize;
    let mut builder =
        RvqDecode::<C, E, O>::builder(size("levels"), size("entries"), size("dim")).batch(batch).rows(size("rows"));
    if flag("rows_first") {
        builder = builder.codes_rows_first();
    }
    if flag("shared") {
        builder = builder.shared_codebook();
    }
    if let Some(null) = case["null_code"].as_i64() {
        builder = builder.null_code(null);
    }
    let plan = builder.build(&DeviceInfo::H200).unwrap();
    let expected: Vec<O> = tensor(file, case, "out");
    let exact: Vec<f64> = tensor(file, case, "exact");
    for device in TestDevice::all() {
        let codes = Buffer::<C>::of(&device, &tensor(file, case, "codes"), 0);
        let codebooks = Buffer::<E>::of(&device, &tensor(file, case, "codebooks"), 0);
        let mut out = Buffer::<O>::poisoned(&device, expected.len(), 0);
        let (codes, codebooks, view) = (codes.input(), codebooks.input(), out.output());
        plan.run(&device.stream(), RvqDecodeArgs { codes, codebooks, out: view, flags: None }).unwrap();
        let out = out.read();
        assert_eq!(
            bytemuck::cast_slice::<O, u8>(&out),
            bytemuck::cast_slice::<O, u8>(&expected),
            "{case} on {device:?}"
        );
        let bits = match O::DTYPE {
            DType::F32 => 20,
            DType::F16 => 11,
            _ => 8,
        };
        let actual: Vec<f64> = out.iter().map(|x| f64::from(x.to_f32())).collect();
        // Terms that cancel leave the rounding of the larger sums before them.
        Tolerance { atol: 1e-4, ..Tolerance::rounded_to(bits) }.check(&actual, &exact).unwrap();
    }
}

/// Within the bound and the rounding to the type; infinities are equal.
fn compare<T: Float>(what: &str, actual: &[T], exact: &[f64], bound: &[f64]) {
    assert_eq!(actual.len(), exact.len(), "{what}");
    for (i, ((actual, exact), bound)) in actual.iter().zip(exact).zip(bound).enumerate() {
        let actual = f64::from(actual.to_f32());
        let bound = bound + rounding::<T>(exact.abs() + bound);
        assert!(
            actual == *exact || (actual - exact).abs() <= bound,
            "{what}: element {i}: {actual} instead of {exact}"
        );
    }
}

impl ForFloats for Check<'_> {
    fn call<P: Float, O: Float>(self) {
        let Check { file, case } = self;
        let [of_parts, batch, rows, heads, dim] =
            ["parts", "batch", "rows", "heads", "dim"].map(|name| case[name].as_u64().unwrap() as usize);
        let accumulate = case["accumulate"].as_bool().unwrap();
        let mut builder = Merge::<P, O>::builder(of_parts, heads, dim).batch(batch).rows(rows);
        if accumulate {
            builder = builder.accumulate();
        }
        let plan = builder.build(&DeviceInfo::H200).unwrap();
        let real = |name| tensor::<f64>(file, case, name);
        for device in TestDevice::all() {
            let parts = Buffer::<P>::of(&device, &tensor(file, case, "parts"), 0);
            let lse = Buffer::<f32>::of(&device, &tensor(file, case, "lse"), 0);
            let (mut out, mut out_lse) = if accumulate {
                let old: (Vec<O>, Vec<f32>) = (tensor(file, case, "old_out"), tensor(file, case, "old_lse"));
                (Buffer::of(&device, &old.0, 0), Buffer::of(&device, &old.1, 0))
            } else {
                let items = batch * rows * heads;
                (Buffer::poisoned(&device, items * dim, 0), Buffer::poisoned(&device, items, 0))
            };
            let args = MergeArgs {
                parts: parts.input(),
                lse: lse.input(),
                out: out.output(),
                out_lse: Some(out_lse.output()),
            };
            plan.run(&device.stream(), args).unwrap();
            let what = |name| format!("{name} of {case} on {device:?}");
            compare(&what("out"), &out.read(), &real("exact"), &real("bound"));
            compare(&what("out_lse"), &out_lse.read(), &real("exact_lse"), &real("bound_lse"));
        }
    }
}

#[test]
fn attention_merge() {
    let (file, cases) = open(ATTENTION_MERGE);
    assert!(cases.len() >= 5);
    for case in &cases {
        let [parts, out] = ["in", "out"].map(|name| dtype(case[name].as_str().unwrap()));
        for_floats(parts, out, Check { file: &file, case });
    }
}

impl ForThreeFloats for Check<'_> {
    fn call<I: Float, O: Float, C: Float>(self) {
        let Check { file, case } = self;
        let number = |name: &str| case[name].as_u64().unwrap() as usize;
        let [batch, rows, heads, kv_heads, dim] = ["batch", "rows", "heads", "kv_heads", "dim"].map(number);
        let (cache_rows, append_at) = (number("cache_rows"), number("append_at"));
        let eps = case["eps"].as_f64().unwrap() as f32;
        let norm = match case["norm"].as_str().unwrap() {
            "l2" => Norm::L2 { eps },
            "rms" => Norm::Rms { eps },
            _ => Norm::None,
        };
        let full = case["full_table"].as_bool().unwrap();
        let columns = number("rotary_dim") / if full { 1 } else { 2 };
        let turns = case["rope"] != "none";
        let cos: Vec<f32> = if turns { tensor(file, case, "cos") } else { Vec::new() };
        let sin: Vec<f32> = if turns { tensor(file, case, "sin") } else { Vec::new() };
        let mut builder = Prepare::<I, O, C>::builder(dim).batch(batch).rows(rows).norm(norm);
        builder = builder.q(heads).k(kv_heads, cache_rows).v(kv_heads, cache_rows);
        builder = builder.positions_strides([rows as i64, 1]);
        if turns {
            let table_rows = cos.len() / columns;
            let rope = match case["rope"].as_str().unwrap() {
                "interleaved" => Rope::interleaved(table_rows),
                _ => Rope::half(table_rows).axes(number("axes")),
            };
            let rope = rope.rotary_dim(number("rotary_dim"));
            builder = builder.rope(if full { rope.full_table() } else { rope });
        }
        let plan = builder.build(&DeviceInfo::H200).unwrap();
        let optional =
            |name: &str, there: bool| -> Vec<f32> { if there { tensor(file, case, name) } else { Vec::new() } };
        let (rms, l2) = (matches!(norm, Norm::Rms { .. }), matches!(norm, Norm::L2 { .. }));
        let gathered = turns && case["position"].is_null();
        let positions: Vec<i32> = if gathered { tensor(file, case, "positions") } else { Vec::new() };
        for device in TestDevice::all() {
            let [q, k, v] = ["q", "k", "v"].map(|name| Buffer::<I>::of(&device, &tensor(file, case, name), 0));
            let [q_weight, k_weight] =
                ["q_weight", "k_weight"].map(|name| Buffer::of(&device, &optional(name, rms), 0));
            let multiplier = Buffer::of(&device, &optional("q_multiplier", l2), 0);
            let (cos, sin) = (Buffer::of(&device, &cos, 0), Buffer::of(&device, &sin, 0));
            let positions = Buffer::of(&device, &positions, 0);
            let mut q_out = Buffer::<O>::poisoned(&device, batch * rows * heads * dim, 0);
            let cache = batch * cache_rows * kv_heads * dim;
            let [mut k_cache, mut v_cache] = [0, 1].map(|_| Buffer::<C>::poisoned(&device, cache, 0));
            let args = PrepareArgs {
                q: Some(q.input()),
                k: Some(k.input()),
                v: Some(v.input()),
                q_out: Some(q_out.output()),
                k_cache: Some(k_cache.output()),
                v_cache: Some(v_cache.output()),
                q_weight: rms.then(|| q_weight.input()),
                k_weight: rms.then(|| k_weight.input()),
                q_multiplier: l2.then(|| multiplier.input()),
                cos: turns.then(|| cos.input()),
                sin: turns.then(|| sin.input()),
                positions: match case["position"].as_u64() {
                    None if gathered => Positions::Of(positions.input()),
                    first => Positions::From(first.unwrap_or(0)),
                },
                append_at: AppendAt::Row(append_at as u64),
                flags: None,
            };
            plan.run(&device.stream(), args).unwrap();
            let what = |name| format!("{name} of {case} on {device:?}");
            let real = |name| tensor::<f64>(file, case, name);
            compare(&what("q"), &q_out.read(), &real("exact_q"), &real("bound_q"));
            // The new rows of each batch entry.
            let token = kv_heads * dim;
            let new = |cache: Vec<C>| -> Vec<C> {
                let entries = cache.chunks(cache_rows * token);
                entries.flat_map(|entry| entry[append_at * token..][..rows * token].to_vec()).collect()
            };
            compare(&what("k"), &new(k_cache.read()), &real("exact_k"), &real("bound_k"));
            let exact = real("exact_v");
            compare(&what("v"), &new(v_cache.read()), &exact, &vec![0.0; exact.len()]);
        }
    }
}

#[test]
fn attention_prepare() {
    let (file, cases) = open(ATTENTION_PREPARE);
    assert!(cases.len() >= 8);
    for case in &cases {
        let [input, out, cache] = ["in", "out", "cache"].map(|name| dtype(case[name].as_str().unwrap()));
        for_three_floats(input, out, cache, Check { file: &file, case });
    }
}

#[test]
fn rvq_decode() {
    let (file, cases) = open(RVQ_DECODE);
    assert!(cases.len() >= 10);
    for case in &cases {
        let [codes, codebooks, out] = ["codes", "codebooks", "out"].map(|name| dtype(case[name].as_str().unwrap()));
        for_dtypes(codes, codebooks, out, Check { file: &file, case });
    }
}

#[cfg(feature = "attention")]
mod attention {
    use nextscale::attention::{Rule, ScaleAttention, ScaleAttentionArgs, Segment, Variant, Visibility};
    use nextscale::{DType, bf16, f16};
    use serde::Deserialize;

    use super::*;

    const SCALE_ATTENTION: &[u8] = include_bytes!("golden/scale_attention.safetensors");

    #[derive(Deserialize)]
    struct Case {
        name: String,
        batch: usize,
        heads: usize,
        kv_heads: usize,
        dim: usize,
        queries: Vec<[u32; 3]>,
        keys_of: Vec<[u32; 3]>,
        rules: Vec<Vec<usize>>,
        windows: Vec<[u32; 3]>,
        segment_lengths: Vec<i64>,
        lengths: Option<usize>,
        kv_rows: usize,
        q_rows: usize,
        gathered: bool,
        packed: bool,
        scale: Option<f32>,
        bound: Option<f32>,
    }

    impl Case {
        fn visibility(&self) -> Visibility {
            let segment = |&[frames, height, width]: &[u32; 3]| Segment::video(frames, height, width);
            let queries: Vec<Segment> = self.queries.iter().map(segment).collect();
            let keys =
                self.keys_of.iter().zip(&self.segment_lengths).map(|(keys, &length)| match u32::try_from(length) {
                    Ok(index) => segment(keys).with_length(index),
                    Err(_) => segment(keys),
                });
            let rule = |q: usize, k: usize| match self.rules[q][k] {
                0 => Rule::Hidden,
                1 => Rule::Full,
                2 => Rule::Causal,
                3 => Rule::ColumnCausal,
                code => {
                    let [frames, rows, columns] = self.windows[code - 4];
                    Rule::Window { frames, rows, columns }
                }
            };
            Visibility::new(&queries, &keys.collect::<Vec<_>>(), rule).unwrap()
        }
    }

    fn check<T: Float>(file: &SafeTensors<'_>, metadata: &Value) {
        let case: Case = serde_json::from_value(metadata.clone()).unwrap();
        let integers = |name: &str, there: bool| there.then(|| tensor::<i32>(file, metadata, name));
        let lengths = integers("lengths", case.lengths.is_some());
        let (row_index, kv_offset) = (integers("row_index", case.gathered), integers("kv_offset", case.packed));
        let [q, k, v] = ["q", "k", "v"].map(|name| tensor::<T>(file, metadata, name));
        let [out, lse, magnitude] = ["out", "lse", "magnitude"].map(|name| tensor::<f32>(file, metadata, name));

        let mut builder = ScaleAttention::<T>::builder(&case.visibility())
            .batch(case.batch)
            .heads(case.heads, case.kv_heads)
            .head_dim(case.dim);
        builder = if case.packed { builder.packed_keys(case.kv_rows) } else { builder.kv_rows(case.kv_rows) };
        if case.gathered {
            builder = builder.gathered_rows(case.q_rows);
        }
        if let Some(scale) = case.scale {
            builder = builder.softmax_scale(scale);
        }
        if let Some(bound) = case.bound {
            builder = builder.logit_bound(bound);
        }
        let bits = match T::DTYPE {
            DType::F32 => 24,
            DType::F16 => 11,
            _ => 8,
        };
        let half_ulp = 0.5f64.powi(bits);
        for (device, variant) in devices(T::DTYPE) {
            let plan = builder.clone().variant(variant).build(&DeviceInfo::H200).unwrap();
            let integers = |elements: &Option<Vec<i32>>| elements.as_ref().map(|all| Buffer::of(&device, all, 0));
            let (lengths, row_index, kv_offset) = (integers(&lengths), integers(&row_index), integers(&kv_offset));
            let [q, k, v] = [&q, &k, &v].map(|elements| Buffer::of(&device, elements, 0));
            let schedule = Buffer::of(&device, plan.schedule().words(), 0);
            let mut got = Buffer::<T>::poisoned(&device, out.len(), 0);
            let mut got_lse = Buffer::<f32>::poisoned(&device, lse.len(), 0);
            let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
            let args = ScaleAttentionArgs {
                q: q.input(),
                k: k.input(),
                v: v.input(),
                out: got.output(),
                lse: Some(got_lse.output()),
                schedule: schedule.input(),
                lengths: lengths.as_ref().map(|buffer| buffer.input()),
                row_index: row_index.as_ref().map(|buffer| buffer.input()),
                kv_offset: kv_offset.as_ref().map(|buffer| buffer.input()),
                workspace: Some(workspace.output()),
            };
            plan.run(&device.stream(), args).unwrap();
            let close = |got: f64, want: f32, bound: f64| (got - f64::from(want)).abs() <= bound;
            for (i, (got, &want)) in got.read().into_iter().zip(&out).enumerate() {
                let exact = f64::from(want.abs());
                let bound = if device.is_host() {
                    exact * (half_ulp + 1e-7) + 1e-7
                } else {
                    // Weights are rounded before they are summed.
                    (exact + f64::from(magnitude[i / case.dim])) * (half_ulp + 2e-4) + 1e-7
                };
                let got = f64::from(got.to_f32());
                assert!(
                    close(got, want, bound),
                    "{}, {variant:?} on {device:?}: {got} for {want}, element {i}",
                    case.name
                );
            }
            let bound = if device.is_host() { 1e-6 } else { 2e-4 };
            for (i, (got, &want)) in got_lse.read().into_iter().zip(&lse).enumerate() {
                let same = got == want || close(f64::from(got), want, bound);
                assert!(same, "{}, {variant:?} on {device:?}: lse {got} for {want}, element {i}", case.name);
            }
        }
    }

    /// The host, and each device with the kernels that it has. Kernels take no f32.
    fn devices(dtype: DType) -> Vec<(TestDevice, Variant)> {
        let kernels = if dtype == DType::F32 { Vec::new() } else { TestDevice::kernels() };
        let mut devices = vec![(TestDevice::Host, Variant::Auto)];
        for device in kernels {
            if DeviceInfo::of(&device.stream()).unwrap().arch == DeviceInfo::H200.arch {
                devices.push((device.clone(), Variant::Hopper));
            }
            devices.push((device, Variant::Portable));
        }
        devices
    }

    #[test]
    fn scale_attention() {
        let (file, cases) = open(SCALE_ATTENTION);
        assert!(cases.len() >= 10);
        for case in &cases {
            match dtype(case["dtype"].as_str().unwrap()) {
                DType::F32 => check::<f32>(&file, case),
                DType::F16 => check::<f16>(&file, case),
                _ => check::<bf16>(&file, case),
            }
        }
    }
}

#[test]
fn philox_fill() {
    let (file, cases) = open(PHILOX);
    assert!(!cases.is_empty());
    for case in &cases {
        let number = |name: &str| case[name].as_str().unwrap().parse::<u64>().unwrap();
        let (words, uniforms): (Vec<u32>, Vec<f32>) = (tensor(&file, case, "words"), tensor(&file, case, "uniforms"));
        let fill = PhiloxFill::new(number("seed"), case["positions"].as_u64().unwrap())
            .first_position(number("first_position"))
            .domain(case["domain"].as_u64().unwrap() as u32)
            .draw(case["draw"].as_u64().unwrap() as u32);
        for device in TestDevice::all() {
            let mut out = Buffer::<u32>::poisoned(&device, words.len(), 0);
            let mut uniform = Buffer::<f32>::poisoned(&device, words.len(), 0);
            fill.run(&device.stream(), out.output()).unwrap();
            fill.run(&device.stream(), uniform.output()).unwrap();
            assert_eq!(out.read(), words);
            assert_eq!(uniform.read(), uniforms);
        }
    }
    let known = serde_json::json!({ "name": "known" });
    let [counter, key, words] = ["counter", "key", "words"].map(|name| tensor::<u32>(&file, &known, name));
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    for ((counter, key), words) in counter.chunks(4).zip(key.chunks(2)).zip(words.chunks(4)) {
        let (seed, position) = (join(key[0], key[1]), join(counter[0], counter[1]));
        assert_eq!(philox::block(seed, position, counter[2], counter[3]), words);
    }
}
