//! Multi-scale quantizers on the shapes of `benches/shapes.json`: all steps of a generation, a decode, an encode.
//! `benches/support` says what the modes time; one run is all launches of a case.

mod support;

use std::cell::RefCell;
use std::sync::Arc;

use criterion::Criterion;
use nextscale::cudarc_0_19::cudarc::driver::CudaStream;
use nextscale::quantization::{
    DecodeArgs, EncodeArgs, EncodeBitsArgs, FHat, MultiScale, Next, PhiTable, StepArgs, Token, Up, pack_phi, schedules,
};
use nextscale::{DeviceInfo, bf16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use support::{Buffer, TestDevice};

#[derive(Deserialize)]
struct Shape {
    name: String,
    /// steps, turns, decode, encode
    how: String,
    batch: usize,
    channels: usize,
    /// 0: tokens are bits.
    entries: usize,
    sides: Vec<usize>,
    phi: bool,
}

/// `T` are the tokens; inputs are bf16, with a repeat as guidance needs it.
fn bench<T: Token>(criterion: &mut Criterion, stream: &Arc<CudaStream>, shape: &Shape, token: impl Fn(&mut StdRng) -> T)
where
    MultiScale<T, bf16>: Encode,
{
    let device = TestDevice::Cuda(stream.clone());
    let (side, scales) = (*shape.sides.last().unwrap(), shape.sides.len());
    let builder = |batch: usize, programmatic: bool| {
        let mut builder =
            MultiScale::<T, bf16>::builder(shape.channels, (side, side), &schedules::square(&shape.sides));
        if shape.entries == 0 {
            builder = builder.up(Up::Bilinear).next(Next::Bilinear);
        }
        if shape.phi {
            builder = builder.phi(if scales == 14 { PhiTable::var_14() } else { PhiTable::var_10() });
        }
        let builder = builder.batch(batch).entries(shape.entries).programmatic(programmatic);
        builder.build(&DeviceInfo::of(stream).unwrap()).unwrap()
    };
    let (plan, empty) = (builder(shape.batch, true), builder(0, true));
    // Beside it, in a graph alone: launches that wait for the one before them to end.
    let plain = builder(shape.batch, false);
    let mut rng = StdRng::seed_from_u64(1);
    let elements = if shape.entries == 0 { shape.channels } else { 1 };
    let of_scale = |scale: usize| plan.tokens(scale).unwrap() * shape.batch;
    let tokens: Vec<Buffer<T>> = (0..scales)
        .map(|scale| {
            let tokens: Vec<T> = (0..of_scale(scale) * elements).map(|_| token(&mut rng)).collect();
            Buffer::of(&device, &tokens, 0)
        })
        .collect();
    let all: Vec<T> = (0..shape.batch * plan.all_tokens() * elements).map(|_| token(&mut rng)).collect();
    let all = Buffer::of(&device, &all, 0);
    let mut floats = |n: usize, most: f32| -> Vec<f32> { (0..n).map(|_| rng.random_range(-most..most)).collect() };
    let n = shape.channels;
    let image = n * side * side;
    let codebook = Buffer::of(&device, &floats(shape.entries * n, 1.0), 0);
    let packed = pack_phi(n, &floats(4 * n * n * 9, 0.1), &floats(4 * n, 0.1), 0.5).unwrap();
    let phi = Buffer::of(&device, &packed, 0);
    let f = Buffer::of(&device, &floats(shape.batch * image, 2.0), 0);
    let maps = RefCell::new([0, 1].map(|_| Buffer::<f32>::poisoned(&device, shape.batch * image, 0)));
    let next: Vec<_> =
        (1..scales).map(|scale| RefCell::new(Buffer::<bf16>::poisoned(&device, of_scale(scale) * n, 0))).collect();
    let books = || (shape.entries > 0).then(|| codebook.input());
    let phis = || shape.phi.then(|| phi.input());

    let steps = |plan: &MultiScale<T, bf16>, turns: bool| {
        for scale in 0..scales {
            let mut maps = maps.borrow_mut();
            let [first, second] = &mut *maps;
            let f_hat = match scale {
                0 => FHat::FromZero(first.output()),
                _ if !turns => FHat::InPlace(first.output()),
                scale if scale % 2 == 1 => FHat::Between(first.input(), second.output()),
                _ => FHat::Between(second.input(), first.output()),
            };
            let mut next = next.get(scale).map(RefCell::borrow_mut);
            plan.step(
                stream,
                StepArgs {
                    scale,
                    tokens: tokens[scale].input(),
                    codebook: books(),
                    phi: phis(),
                    f_hat: Some(f_hat),
                    next: next.as_deref_mut().map(Buffer::output),
                    flags: None,
                },
            )
            .unwrap();
        }
    };
    let decode = |plan: &MultiScale<T, bf16>| {
        let mut maps = maps.borrow_mut();
        plan.decode(
            stream,
            DecodeArgs {
                tokens: all.input(),
                codebook: books(),
                phi: phis(),
                f_hat: maps[0].output(),
                prefixes: false,
                next: None,
                flags: None,
            },
        )
        .unwrap();
    };
    let moved: u64 = (0..scales).map(|scale| plan.traffic(scale).unwrap()).map(|t| t.read + t.written).sum();
    let name = ("multi_scale", shape.name.as_str(), moved);
    let encoded = RefCell::new(plan.buffers(&device, shape.batch, n));
    let encode = |plan: &MultiScale<T, bf16>| {
        plan.encode_all(stream, &f, &codebook, shape.phi.then_some(&phi), &mut encoded.borrow_mut(), &maps);
    };
    let run = |plan: &MultiScale<T, bf16>| match shape.how.as_str() {
        "steps" => steps(plan, false),
        "turns" => steps(plan, true),
        "decode" => decode(plan),
        "encode" => encode(plan),
        other => panic!("how {other:?}"),
    };
    support::time(criterion, stream, name, || run(&plan), || run(&empty));
    let mut group = criterion.benchmark_group("multi_scale");
    support::time_graph(&mut group, stream, &format!("{}@plain", shape.name), || run(&plain));
    group.finish();
}

/// What an encode writes: codes or labels, and the workspace.
struct Encoded {
    codes: Buffer<u16>,
    labels: Buffer<u8>,
    workspace: Buffer<u8>,
}

/// Encoding differs with the tokens.
trait Encode {
    fn buffers(&self, device: &TestDevice, batch: usize, channels: usize) -> Encoded;
    fn encode_all(
        &self,
        stream: &Arc<CudaStream>,
        f: &Buffer<f32>,
        codebook: &Buffer<f32>,
        phi: Option<&Buffer<f32>>,
        to: &mut Encoded,
        maps: &RefCell<[Buffer<f32>; 2]>,
    );
}

impl Encode for MultiScale<u16, bf16> {
    fn buffers(&self, device: &TestDevice, batch: usize, _: usize) -> Encoded {
        Encoded {
            codes: Buffer::poisoned(device, batch * self.all_tokens(), 0),
            labels: Buffer::poisoned(device, 0, 0),
            workspace: Buffer::poisoned(device, self.encode_workspace_bytes() as usize, 0),
        }
    }

    fn encode_all(
        &self,
        stream: &Arc<CudaStream>,
        f: &Buffer<f32>,
        codebook: &Buffer<f32>,
        phi: Option<&Buffer<f32>>,
        to: &mut Encoded,
        maps: &RefCell<[Buffer<f32>; 2]>,
    ) {
        self.encode(
            stream,
            EncodeArgs {
                f: f.input(),
                codebook: codebook.input(),
                search: None,
                phi: phi.map(Buffer::input),
                codes: to.codes.output(),
                f_hat: maps.borrow_mut()[0].output(),
                workspace: Some(to.workspace.output()),
            },
        )
        .unwrap();
    }
}

impl Encode for MultiScale<u8, bf16> {
    fn buffers(&self, device: &TestDevice, batch: usize, channels: usize) -> Encoded {
        Encoded {
            codes: Buffer::poisoned(device, 0, 0),
            labels: Buffer::poisoned(device, batch * self.all_tokens() * channels, 0),
            workspace: Buffer::poisoned(device, 0, 0),
        }
    }

    fn encode_all(
        &self,
        stream: &Arc<CudaStream>,
        f: &Buffer<f32>,
        _: &Buffer<f32>,
        _: Option<&Buffer<f32>>,
        to: &mut Encoded,
        maps: &RefCell<[Buffer<f32>; 2]>,
    ) {
        self.encode_bits(
            stream,
            EncodeBitsArgs {
                f: f.input(),
                labels: to.labels.output(),
                flips: None,
                f_hat: maps.borrow_mut()[0].output(),
                next: None,
            },
        )
        .unwrap();
    }
}

fn main() {
    let Some(stream) = support::gpu() else { return };
    let mut criterion = support::criterion();
    for shape in &support::shapes::<Shape>("multi_scale") {
        if shape.entries == 0 {
            bench::<u8>(&mut criterion, &stream, shape, |rng| rng.random_range(0..2));
        } else {
            bench::<u16>(&mut criterion, &stream, shape, |rng| rng.random_range(0..shape.entries as u16));
        }
    }
    criterion.final_summary();
}
