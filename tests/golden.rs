//! Every device against what PyTorch answered: `python-ref/make_golden.py` wrote the files and describes them.

#![cfg(feature = "quantization")]

mod support;

use nextscale::dtype::{Code, Float};
use nextscale::philox::PhiloxFill;
use nextscale::quantization::{RvqDecode, RvqDecodeArgs};
use nextscale::{DType, DeviceInfo, philox};
use safetensors::SafeTensors;
use serde_json::Value;
use support::{Buffer, ForDTypes, TestDevice, Tolerance, dtype, for_dtypes};

// Embedded, so that a test binary can run on a machine that has nothing else.
const RVQ_DECODE: &[u8] = include_bytes!("golden/rvq_decode.safetensors");
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

#[test]
fn rvq_decode() {
    let (file, cases) = open(RVQ_DECODE);
    assert!(cases.len() >= 10);
    for case in &cases {
        let [codes, codebooks, out] = ["codes", "codebooks", "out"].map(|name| dtype(case[name].as_str().unwrap()));
        for_dtypes(codes, codebooks, out, Check { file: &file, case });
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
