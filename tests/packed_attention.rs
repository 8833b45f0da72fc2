//! Attention over packed caches: what it gives is what attention over the unpacked cache gives, bit for bit.

#![cfg(all(feature = "attention", feature = "compression"))]

mod support;

use nextscale::attention::{
    Rule, ScaleAttention, ScaleAttentionArgs, ScaleAttentionBuilder, ScaleAttentionPackedArgs, Segment, Variant,
    Visibility,
};
use nextscale::compression::{Format, Pack, PackArgs, UnpackArgs};
use nextscale::dtype::Float;
use nextscale::{DeviceInfo, Error, In, Out, Result, Stream, bf16, f16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, TestDevice};

#[derive(Debug, Clone)]
struct Case {
    format: Format,
    inline: bool,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    /// Query tokens, keys of a cache with a length, keys of the step itself.
    shape: [usize; 3],
    causal: bool,
    /// Rows of the cache beyond the keys.
    spare: usize,
    /// Bytes between slots' rows, in units of 16, and numbers between those.
    gaps: [usize; 2],
    splits: Option<u32>,
    pack_heads: Option<bool>,
    packed_keys: bool,
    gathered: bool,
    /// Tiles an item, of the Hopper kernel; 0: the portable one.
    groups: u32,
    /// Above 0, for logits that the case keeps within it.
    bound: f32,
    seed: u64,
}

fn any_case() -> impl Strategy<Value = Case> {
    let format = prop_oneof![Just(Format::Fp8), Just(Format::INT4)];
    let heads = prop::sample::select(vec![(1usize, 1usize), (2, 2), (4, 2), (6, 2), (8, 1)]);
    let shape = [1..70usize, 0..400usize, 1..80usize];
    let flags = (any::<bool>(), any::<bool>(), prop::bool::weighted(0.3), prop::bool::weighted(0.3));
    (
        (format, heads, prop::sample::select(vec![64usize, 96, 128])),
        (1..3usize, shape, 0..40usize, [0..3usize, 0..3usize]),
        flags,
        (prop::option::of(1..4u32), prop::option::of(any::<bool>())),
        (0..4u32, prop::bool::weighted(0.2), any::<u64>()),
    )
        .prop_map(
            |(
                (format, (heads, kv_heads), dim),
                (batch, shape, spare, gaps),
                flags,
                (splits, pack_heads),
                (groups, bounded, seed),
            )| Case {
                format,
                inline: flags.0,
                batch,
                heads,
                kv_heads,
                dim,
                shape,
                causal: flags.1,
                spare,
                gaps,
                splits,
                pack_heads,
                packed_keys: flags.2,
                gathered: flags.3,
                groups: if dim > 64 { groups % 3 } else { groups },
                bound: if bounded { 30.0 } else { 0.0 },
                seed,
            },
        )
}

struct Ran<T> {
    out: Vec<T>,
    lse: Vec<f32>,
}

impl Case {
    fn visibility(&self) -> Visibility {
        let [queries, cache, own] = self.shape.map(|n| n as u32);
        let own = if self.packed_keys { Segment::tokens(own).with_length(1) } else { Segment::tokens(own) };
        let keys = [Segment::tokens(cache).with_length(0), own];
        let last = if self.causal && self.shape[0] == self.shape[2] { Rule::Causal } else { Rule::Full };
        Visibility::new(&[Segment::tokens(queries)], &keys, |_, k| if k == 0 { Rule::Full } else { last }).unwrap()
    }

    fn rows(&self) -> usize {
        (self.shape[1] + self.shape[2]) * if self.packed_keys { self.batch } else { 1 } + self.spare
    }

    fn kv_batch(&self) -> usize {
        if self.packed_keys { 1 } else { self.batch }
    }

    fn slot(&self) -> usize {
        let bytes = if self.inline { self.format.inline_bytes(self.dim) } else { self.format.code_bytes(self.dim) };
        bytes + 16 * self.gaps[0]
    }

    fn numbers(&self) -> usize {
        self.format.numbers() * (1 + self.gaps[1])
    }

    fn strides(&self, head: usize) -> [i64; 3] {
        [self.rows() * self.kv_heads * head, self.kv_heads * head, head].map(|stride| stride as i64)
    }

    fn builder<T: Float>(&self, visibility: &Visibility) -> ScaleAttentionBuilder<T> {
        let mut builder = ScaleAttention::<T>::builder(visibility)
            .batch(self.batch)
            .heads(self.heads, self.kv_heads)
            .head_dim(self.dim)
            .variant(if self.groups == 0 { Variant::Portable } else { Variant::Hopper });
        if self.groups > 0 {
            builder = builder.tiles_an_item(self.groups);
        }
        if self.bound > 0.0 && T::DTYPE == nextscale::DType::BF16 {
            builder = builder.logit_bound(self.bound);
        }
        builder = if self.packed_keys { builder.packed_keys(self.rows()) } else { builder.kv_rows(self.rows()) };
        if let Some(splits) = self.splits {
            builder = builder.splits(splits);
        }
        if let Some(pack) = self.pack_heads {
            builder = builder.pack_heads(pack);
        }
        if self.gathered { builder.gathered_rows(self.shape[0] + 3) } else { builder }
    }
}

/// A cache packed on the host, and what it is unpacked to.
struct Cache<T> {
    codes: Vec<u8>,
    numbers: Vec<f32>,
    unpacked: Vec<T>,
}

fn cache<T: Float>(case: &Case, rng: &mut StdRng) -> Cache<T> {
    let stream = Stream::host();
    let elements = case.kv_batch() * case.rows() * case.kv_heads * case.dim;
    let input: Vec<T> = (0..elements).map(|_| T::from_f32(rng.random_range(-2.0..2.0f32))).collect();
    let mut builder = Pack::<T, f32>::builder(case.format, case.rows(), case.kv_heads, case.dim)
        .sets(case.kv_batch())
        .codes_strides(case.strides(case.slot()))
        .numbers_strides(case.strides(case.numbers()));
    if case.inline {
        builder = builder.inline();
    }
    let plan = builder.build(&DeviceInfo::H200).unwrap();
    let device = TestDevice::Host;
    let of_input = Buffer::of(&device, &input, 0);
    let mut codes = Buffer::<u8>::poisoned(&device, plan.codes_len() as usize, 0);
    let mut numbers = Buffer::<f32>::poisoned(&device, plan.numbers_len() as usize, 0);
    let there = plan.numbers_len() > 0;
    plan.pack(
        &stream,
        PackArgs {
            input: of_input.input(),
            codes: codes.output(),
            numbers: there.then(|| numbers.output()),
            scales: None,
            kept: None,
            counts: None,
            flags: None,
        },
    )
    .unwrap();
    let mut out = Buffer::<T>::poisoned(&device, elements, 0);
    plan.unpack(
        &stream,
        UnpackArgs {
            codes: codes.input(),
            numbers: there.then(|| numbers.input()),
            scales: None,
            counts: None,
            out: out.output(),
            flags: None,
        },
    )
    .unwrap();
    Cache { codes: codes.read(), numbers: numbers.read(), unpacked: out.read() }
}

struct Problem<T> {
    q: Vec<T>,
    k: Cache<T>,
    v: Cache<T>,
    lengths: Vec<i32>,
    row_index: Vec<i32>,
    kv_offset: Vec<i32>,
}

fn problem<T: Float>(case: &Case) -> Problem<T> {
    let mut rng = StdRng::seed_from_u64(case.seed);
    let [rows, cache_keys, own] = case.shape;
    let q_rows = if case.gathered { rows + 3 } else { rows };
    let q =
        (0..case.batch * q_rows * case.heads * case.dim).map(|_| T::from_f32(rng.random_range(-1.0..1.0f32))).collect();
    let (k, v) = (cache(case, &mut rng), cache(case, &mut rng));
    let mut lengths: Vec<i32> =
        (0..case.batch * case.kv_heads).map(|_| rng.random_range(0..=cache_keys as i32)).collect();
    if case.packed_keys {
        lengths.extend((0..case.batch * case.kv_heads).map(|_| rng.random_range(0..=own as i32)));
    }
    let row_index = (0..case.batch * rows).map(|_| rng.random_range(0..q_rows as i32)).collect();
    let kv_offset = (0..case.batch).map(|b| (b * (cache_keys + own)) as i32).collect();
    Problem { q, k, v, lengths, row_index, kv_offset }
}

fn attend<T: Float>(device: &TestDevice, case: &Case, problem: &Problem<T>, packed: bool) -> Ran<T> {
    let visibility = case.visibility();
    let mut builder = case.builder::<T>(&visibility);
    if packed {
        builder = builder
            .packed(case.format, case.inline)
            .kv_strides(case.strides(case.slot()), case.strides(case.slot()))
            .numbers_strides(case.strides(case.numbers()), case.strides(case.numbers()));
    }
    let plan = builder.build(&DeviceInfo::H200).unwrap();
    let rows = case.shape[0];
    let q = Buffer::of(device, &problem.q, 0);
    let schedule = Buffer::of(device, plan.schedule().words(), 0);
    let (lengths, row_index) = (Buffer::of(device, &problem.lengths, 0), Buffer::of(device, &problem.row_index, 0));
    let kv_offset = Buffer::of(device, &problem.kv_offset, 0);
    let mut out = Buffer::<T>::poisoned(device, case.batch * rows * case.heads * case.dim, 0);
    let mut lse = Buffer::<f32>::poisoned(device, case.batch * rows * case.heads, 0);
    let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
    let stream = device.stream();
    if packed {
        let (k, k_numbers) = (Buffer::of(device, &problem.k.codes, 0), Buffer::of(device, &problem.k.numbers, 0));
        let (v, v_numbers) = (Buffer::of(device, &problem.v.codes, 0), Buffer::of(device, &problem.v.numbers, 0));
        let args = ScaleAttentionPackedArgs {
            q: q.input(),
            k: k.input(),
            k_numbers: (!case.inline).then(|| k_numbers.input()),
            v: v.input(),
            v_numbers: (!case.inline).then(|| v_numbers.input()),
            out: out.output(),
            lse: Some(lse.output()),
            schedule: schedule.input(),
            lengths: Some(lengths.input()),
            row_index: case.gathered.then(|| row_index.input()),
            kv_offset: case.packed_keys.then(|| kv_offset.input()),
            workspace: Some(workspace.output()),
        };
        plan.run_packed(&stream, args).unwrap();
        return Ran { out: out.read(), lse: lse.read() };
    }
    let (k, v) = (Buffer::of(device, &problem.k.unpacked, 0), Buffer::of(device, &problem.v.unpacked, 0));
    let args = ScaleAttentionArgs {
        q: q.input(),
        k: k.input(),
        v: v.input(),
        out: out.output(),
        lse: Some(lse.output()),
        schedule: schedule.input(),
        lengths: Some(lengths.input()),
        row_index: case.gathered.then(|| row_index.input()),
        kv_offset: case.packed_keys.then(|| kv_offset.input()),
        workspace: Some(workspace.output()),
    };
    plan.run(&stream, args).unwrap();
    Ran { out: out.read(), lse: lse.read() }
}

fn bits<T: Float>(ran: &Ran<T>) -> (Vec<u8>, Vec<u32>) {
    (bytemuck::cast_slice(&ran.out).to_vec(), ran.lse.iter().map(|x| x.to_bits()).collect())
}

fn check<T: Float>(device: &TestDevice, case: &Case) {
    let problem = problem::<T>(case);
    let (packed, plain) = (attend(device, case, &problem, true), attend(device, case, &problem, false));
    assert!(bits(&packed) == bits(&plain), "other bits than over the unpacked cache: {case:?}");
    if !device.is_host() {
        // And near to the host's, which computes in f64.
        let host = attend(&TestDevice::Host, case, &problem, true);
        let tolerance = if T::DTYPE == nextscale::DType::BF16 { 0.02 } else { 0.003 };
        for (i, (got, want)) in packed.out.iter().zip(&host.out).enumerate() {
            assert!((got.to_f32() - want.to_f32()).abs() <= tolerance, "{case:?}: element {i}, {got:?} {want:?}");
        }
        for (got, want) in packed.lse.iter().zip(&host.lse) {
            assert!(got == want || (got - want).abs() < 1e-2, "{case:?}: lse {got} {want}");
        }
    }
}

#[test]
fn packed_caches_agree_with_unpacked_ones() {
    for device in TestDevice::all() {
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
            cases: support::cases() / 2,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let run = |(case, dtype): (Case, bool)| {
            if dtype {
                check::<bf16>(&device, &case)
            } else {
                check::<f16>(&device, &case)
            }
            Ok(())
        };
        runner.run(&(any_case(), any::<bool>()), run).unwrap();
    }
}

/// Generation steps at the edges of halves and chunks, of every format and head_dim.
#[test]
fn steps_at_the_edges() {
    for device in TestDevice::all() {
        for format in [Format::Fp8, Format::INT4] {
            for dim in [64, 96, 128] {
                for (i, cache) in [0, 1, 63, 64, 65, 127, 128, 129, 300].into_iter().enumerate() {
                    let of = |groups| Case {
                        format,
                        inline: i % 2 == 0,
                        batch: 2,
                        heads: 4,
                        kv_heads: 2,
                        dim,
                        shape: [1, cache, 1],
                        causal: false,
                        spare: i % 3,
                        gaps: [i % 2, i % 3],
                        splits: Some(1 + (i % 3) as u32),
                        pack_heads: Some(i % 2 == 1),
                        packed_keys: false,
                        gathered: false,
                        groups,
                        bound: 0.0,
                        seed: i as u64,
                    };
                    for groups in 0..if dim == 64 { 4 } else { 3 } {
                        check::<bf16>(&device, &of(groups));
                        check::<f16>(&device, &of(groups));
                    }
                }
            }
        }
    }
}

/// A cache whose numbers are wrong gives another result: the test above can fail.
#[test]
fn another_scale_is_noticed() {
    for device in TestDevice::all() {
        let of = |groups| Case {
            format: Format::INT4,
            inline: false,
            batch: 1,
            heads: 2,
            kv_heads: 1,
            dim: 64,
            shape: [3, 100, 5],
            causal: false,
            spare: 0,
            gaps: [0; 2],
            splits: None,
            pack_heads: None,
            packed_keys: false,
            gathered: false,
            groups,
            bound: 0.0,
            seed: 1,
        };
        for groups in 0..4 {
            let case = of(groups);
            let mut problem = problem::<bf16>(&case);
            problem.lengths[0] = 100;
            let before = attend(&device, &case, &problem, true);
            problem.v.numbers[2 * 77 + 1] += 1.0;
            assert!(bits(&before) != bits(&attend(&device, &case, &problem, true)));
            problem.v.numbers[2 * 77 + 1] -= 1.0;
            problem.k.codes[32 * 99] ^= 0x80;
            assert!(bits(&before) != bits(&attend(&device, &case, &problem, true)));
        }
    }
}

#[test]
fn what_packed_plans_refuse() {
    let visibility = Visibility::new(&[Segment::tokens(1)], &[Segment::tokens(8)], |_, _| Rule::Full).unwrap();
    let build = |edit: fn(ScaleAttentionBuilder<bf16>) -> ScaleAttentionBuilder<bf16>| -> Result<ScaleAttention<bf16>> {
        edit(ScaleAttention::<bf16>::builder(&visibility).head_dim(64).packed(Format::Fp8, false))
            .build(&DeviceInfo::H200)
    };
    let unsupported = |result: Result<ScaleAttention<bf16>>, name: &str| {
        assert!(matches!(result, Err(Error::Unsupported { arg, .. }) if arg == name), "{name}: {result:?}");
    };
    let plan = build(|b| b).unwrap();
    assert_eq!(plan.variant(), Variant::Portable);
    let long = Visibility::new(&[Segment::tokens(1)], &[Segment::tokens(4096)], |_, _| Rule::Full).unwrap();
    let long = ScaleAttention::<bf16>::builder(&long).head_dim(128).heads(8, 2).packed(Format::INT4, true);
    let long = long.build(&DeviceInfo::H200).unwrap();
    assert_eq!((long.variant(), long.schedule().groups(), long.schedule().pack()), (Variant::Hopper, 1, 4));
    unsupported(build(|b| b.packed(Format::turbo_key(4), false)), "format");
    unsupported(build(|b| b.packed(Format::kivi_value(4, 32), false)), "format");
    unsupported(build(|b| b.head_dim(80)), "head_dim");
    assert_eq!(build(|b| b.variant(Variant::Hopper)).unwrap().variant(), Variant::Hopper);
    unsupported(build(|b| b.variant(Variant::Hopper).tiles_an_item(2).head_dim(32)), "head_dim");
    let pairs = build(|b| b.head_dim(128).variant(Variant::Hopper).tiles_an_item(4));
    assert!(matches!(pairs, Err(Error::Size { arg: "tiles_an_item", .. })), "{pairs:?}");
    let odd = build(|b| b.kv_strides([512, 72, 72], [512, 64, 64]));
    assert!(matches!(odd, Err(Error::Stride { arg: "k", .. })), "{odd:?}");
    let odd = build(|b| b.packed(Format::INT4, false).numbers_strides([16, 2, 2], [16, 3, 3]));
    assert!(matches!(odd, Err(Error::Stride { arg: "v_numbers", .. })), "{odd:?}");

    let stream = Stream::host();
    let (q, codes, numbers, mut out) = ([bf16::from_f32(1.0); 64], [0u8; 512], [1f32; 8], [bf16::from_f32(0.0); 64]);
    let mut run = |codes_len: usize, numbers: Option<&[f32]>| {
        plan.run_packed(
            &stream,
            ScaleAttentionPackedArgs {
                q: In::host(&q),
                k: In::host(&codes[..codes_len]),
                k_numbers: numbers.map(In::host),
                v: In::host(&codes),
                v_numbers: Some(In::host(&[1f32; 8])),
                out: Out::host(&mut out),
                lse: None,
                schedule: In::host(&[]),
                lengths: None,
                row_index: None,
                kv_offset: None,
                workspace: None,
            },
        )
    };
    assert_eq!(run(512, Some(&numbers)), Ok(()));
    assert_eq!(run(511, Some(&numbers)), Err(Error::Length { arg: "k", need: 512, got: 511 }));
    assert_eq!(run(512, Some(&numbers[1..])), Err(Error::Length { arg: "k_numbers", need: 8, got: 7 }));
    assert_eq!(run(512, None), Err(Error::Length { arg: "k_numbers", need: 8, got: 0 }));
    let plain = plan.run(
        &stream,
        ScaleAttentionArgs {
            q: In::host(&q),
            k: In::host(&q),
            v: In::host(&q),
            out: Out::host(&mut out),
            lse: None,
            schedule: In::host(&[]),
            lengths: None,
            row_index: None,
            kv_offset: None,
            workspace: None,
        },
    );
    assert!(matches!(plain, Err(Error::Unsupported { arg: "k", .. })));
}
