//! RVQ decode on every device, against an oracle written here from the formula.

#![cfg(feature = "quantization")]

mod support;

use nextscale::dtype::{Code, Float};
use nextscale::quantization::{
    Access, RvqDecode, RvqDecodeArgs, RvqDecodeBuilder, RvqDecodeTraffic, Schedule, Variant,
};
use nextscale::{Device, DeviceInfo, Error, In, Layout, Out, Result, Stream, bf16, f16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use support::{Buffer, CODES, FLOATS, ForDTypes, POISON_BYTE, TestDevice, Tolerance, for_dtypes};

/// One problem: everything but the dtypes.
#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    rows: usize,
    levels: usize,
    entries: usize,
    dim: usize,
    shared: bool,
    /// Extra elements between rows of the codebooks and of the output.
    gap: [usize; 2],
    /// Elements by which each buffer starts off its alignment: codes, codebooks, out.
    shift: [usize; 3],
    null_code: Option<i64>,
    /// Some codes lie outside the codebook.
    bad_codes: bool,
    access: Access,
    variant: Variant,
    /// The plan is one for an L2 that holds nothing.
    small_l2: bool,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (
        0..4usize,
        0..70usize,
        0..20usize,
        1..50usize,
        prop_oneof![0..40usize, Just(128), 1..300usize, 1000..1100usize],
    );
    let layout = (
        any::<bool>(),
        prop_oneof![Just([0; 2]), [0..9usize, 0..9usize]],
        prop_oneof![
            3 => Just([0; 3]),
            1 => [0..5usize, 0..5usize, 0..5usize],
        ],
    );
    let rest = (
        prop_oneof![Just(None), Just(Some(-1)), (0..50i64).prop_map(Some)],
        prop::bool::weighted(0.3),
        prop_oneof![3 => Just(Access::Auto), 1 => Just(Access::Narrow)],
        prop_oneof![Just(Variant::Rows), Just(Variant::Tiles), Just(Variant::Auto)],
        any::<bool>(),
        any::<u64>(),
    );
    (sizes, layout, rest).prop_map(|(sizes, (shared, gap, shift), rest)| {
        let (batch, rows, levels, entries, dim) = sizes;
        let (null_code, bad_codes, access, variant, small_l2, seed) = rest;
        Case {
            batch,
            rows,
            levels,
            entries,
            dim,
            shared,
            gap,
            shift,
            null_code,
            bad_codes,
            access,
            variant,
            small_l2,
            seed,
        }
    })
}

/// The case with its data and layouts.
struct Problem<C, E> {
    codes: Vec<C>,
    codebooks: Vec<E>,
    codes_layout: Layout<3>,
    codebooks_layout: Layout<3>,
    out_layout: Layout<3>,
}

impl Case {
    fn problem<C: Code, E: Float>(&self) -> Problem<C, E> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let [batch, rows, levels, entries, dim] =
            [self.batch, self.rows, self.levels, self.entries, self.dim].map(|n| n as u64);

        // Codes in a random order of dimensions.
        let mut order = [0, 1, 2];
        order.shuffle(&mut rng);
        let shape = [batch, levels, rows];
        let mut strides = [0i64; 3];
        let mut stride = 1;
        for dim in order {
            strides[dim] = stride;
            stride *= shape[dim].max(1) as i64;
        }
        let codes_layout = Layout::strided(shape, strides);

        let entry_stride = (self.dim + self.gap[0]) as i64;
        let level_stride = if self.shared { 0 } else { entry_stride * self.entries as i64 };
        let codebooks_layout = Layout::strided([levels, entries, dim], [level_stride, entry_stride, 1]);
        let row_stride = (self.dim + self.gap[1]) as i64;
        let out_layout = Layout::strided([batch, rows, dim], [row_stride * self.rows as i64, row_stride, 1]);

        let len = |layout: &Layout<3>| layout.required_len("").unwrap() as usize;
        let mut code = || -> C {
            let null = self.null_code.filter(|_| rng.random_bool(0.2)).and_then(C::from_i64);
            if let Some(null) = null {
                return null;
            }
            if self.bad_codes && rng.random_bool(0.05) {
                let bad = [entries as i64, 65_535, -5, i64::from(u32::MAX), i64::MIN, i64::MAX];
                if let Some(bad) = C::from_i64(bad[rng.random_range(0..bad.len())]) {
                    return bad;
                }
            }
            C::from_i64(rng.random_range(0..entries as i64)).unwrap()
        };
        let codes = (0..len(&codes_layout)).map(|_| code()).collect();
        // Magnitudes that make the order of additions matter.
        let value = || {
            let magnitude = rng.random_range(-6.0..6.0f32).exp2();
            E::from_f32(if rng.random_bool(0.5) { magnitude } else { -magnitude })
        };
        let codebooks = std::iter::repeat_with(value).take(len(&codebooks_layout)).collect();
        Problem { codes, codebooks, codes_layout, codebooks_layout, out_layout }
    }

    /// What the plan is made for.
    fn device(&self) -> DeviceInfo {
        let mut device = DeviceInfo::H200;
        if self.small_l2 {
            device.l2_bytes = 0;
        }
        device
    }

    fn plan<C: Code, E: Float, O: Float>(&self, problem: &Problem<C, E>) -> RvqDecode<C, E, O> {
        let [level, entry, _] = problem.codebooks_layout.strides();
        let [batch, row, _] = problem.out_layout.strides();
        let mut builder = RvqDecode::builder(self.levels, self.entries, self.dim)
            .batch(self.batch)
            .rows(self.rows)
            .codes_strides(problem.codes_layout.strides())
            .codebooks_strides([level, entry])
            .out_strides([batch, row])
            .access(self.access);
        if let Some(null) = self.null_code {
            builder = builder.null_code(null);
        }
        // Where tiles are refused, the other kernel decodes.
        let wanted = builder.clone().variant(self.variant).build(&self.device());
        wanted.unwrap_or_else(|_| builder.build(&self.device()).unwrap())
    }

    /// The whole output buffer, gaps poisoned, and whether a code was clamped. `sum` adds one row's values of a level.
    fn oracle<C: Code, E: Float, S: Copy>(
        &self,
        problem: &Problem<C, E>,
        zero: S,
        add: impl Fn(S, E) -> S,
    ) -> (Vec<Option<S>>, bool) {
        let len = problem.out_layout.required_len("").unwrap() as usize;
        let (mut out, mut clamped) = (vec![None; len], false);
        for b in 0..self.batch as u64 {
            for r in 0..self.rows as u64 {
                for d in 0..self.dim as u64 {
                    let mut sum = zero;
                    for l in 0..self.levels as u64 {
                        let code = problem.codes[problem.codes_layout.offset([b, l, r]) as usize].to_i64();
                        if self.null_code == Some(code) {
                            continue;
                        }
                        let entry = code.clamp(0, self.entries as i64 - 1);
                        clamped |= entry != code;
                        let at = problem.codebooks_layout.offset([l, entry as u64, d]);
                        sum = add(sum, problem.codebooks[at as usize]);
                    }
                    out[problem.out_layout.offset([b, r, d]) as usize] = Some(sum);
                }
            }
        }
        (out, clamped)
    }
}

/// Runs a case on a device and compares: with the f32 sum bit for bit, with f64 within the rounding, gaps untouched.
fn check<C: Code, E: Float, O: Float>(device: &TestDevice, case: &Case) {
    let problem = case.problem::<C, E>();
    let plan = case.plan::<C, E, O>(&problem);
    let (expected, clamped) = case.oracle(&problem, 0f32, |sum, value: E| sum + value.to_f32());

    let codes = Buffer::of(device, &problem.codes, case.shift[0]);
    let codebooks = Buffer::of(device, &problem.codebooks, case.shift[1]);
    let mut out = Buffer::<O>::poisoned(device, expected.len(), case.shift[2]);
    let mut flags = Buffer::of(device, &[0x100u32], 0);
    let ran = plan.run(
        &device.stream(),
        RvqDecodeArgs {
            codes: codes.input(),
            codebooks: codebooks.input(),
            out: out.output(),
            flags: Some(flags.output()),
        },
    );
    let out = out.read();
    if device.is_host() && clamped {
        assert!(matches!(ran, Err(Error::CodeOutOfRange { arg: "codes", .. })), "{ran:?}");
        assert!(bytemuck::cast_slice::<O, u8>(&out).iter().all(|&byte| byte == POISON_BYTE), "nothing is written");
        return;
    }
    ran.unwrap();
    // Bits are set, never cleared; the host refuses instead of clamping.
    assert_eq!(flags.read(), [0x100 | if clamped { RvqDecode::<C, E, O>::CODE_CLAMPED } else { 0 }]);

    let poison: O = bytemuck::pod_read_unaligned(&vec![POISON_BYTE; size_of::<O>()]);
    let bits = |value: &O| bytemuck::bytes_of(value).to_vec();
    for (i, (actual, expected)) in out.iter().zip(&expected).enumerate() {
        let expected = expected.map_or(poison, O::from_f32);
        assert_eq!(bits(actual), bits(&expected), "element {i}: {actual:?} instead of {expected:?}");
    }
    let (reference, _) = case.oracle(&problem, 0f64, |sum, value: E| sum + f64::from(value.to_f32()));
    // Values reach 64 and at most 20 are added, each sum within 2^-24 of itself: 20 * 20 * 64 * 2^-24 = 0.0015.
    let tolerance = Tolerance { atol: 2e-3, rtol: 1.0 / 256.0, rel_l2: 1.0 / 256.0 };
    let written = |i: &usize| reference[*i].is_some();
    let actual: Vec<f64> = (0..out.len()).filter(written).map(|i| f64::from(out[i].to_f32())).collect();
    let reference: Vec<f64> = reference.iter().copied().flatten().collect();
    tolerance.check(&actual, &reference).unwrap();
}

/// Calls `work` with one of the 27 combinations of dtypes.
fn with_dtypes(dtypes: usize, work: impl ForDTypes) {
    for_dtypes(CODES[dtypes / 9], FLOATS[dtypes / 3 % 3], FLOATS[dtypes % 3], work);
}

fn check_any(device: &TestDevice, case: &Case, dtypes: usize) {
    struct Check<'a>(&'a TestDevice, &'a Case);
    impl ForDTypes for Check<'_> {
        fn call<C: Code, E: Float, O: Float>(self) {
            check::<C, E, O>(self.0, self.1);
        }
    }
    with_dtypes(dtypes, Check(device, case));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases(), ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_the_formula(case in case(), dtypes in 0..27usize) {
        check_any(&TestDevice::Host, &case, dtypes);
    }

    /// Every element of the output belongs to exactly one thread, and no thread to an element outside.
    #[test]
    fn the_schedule_owns_every_output_once(
        batch in 0..4usize, rows in 0..70usize, levels in 7..11usize, dim in prop_oneof![0..40usize, 0..2500usize],
        narrow in any::<bool>(), tiles in any::<bool>(), f32_books in any::<bool>(), small_l2 in any::<bool>(),
    ) {
        let case = Case {
            batch, rows, levels, dim, entries: 16,
            access: if narrow { Access::Narrow } else { Access::Auto },
            variant: if tiles { Variant::Tiles } else { Variant::Rows },
            small_l2,
            ..plain()
        };
        let schedule = if f32_books { schedule_of::<f32>(&case) } else { schedule_of::<bf16>(&case) };
        let mut owners = vec![0; batch * rows * dim];
        for x in 0..schedule.grid()[0] {
            for y in 0..schedule.grid()[1] {
                for thread in 0..schedule.threads() {
                    for (row, elements) in schedule.cells([x, y], thread) {
                        for d in elements {
                            prop_assert!(d < dim as u64);
                            owners[(row * dim as u64 + d) as usize] += 1;
                        }
                    }
                }
            }
        }
        prop_assert!(owners.iter().all(|&n| n == 1));
    }
}

/// How a case of contiguous operands is cut up; without tiles where they are refused.
fn schedule_of<E: Float>(case: &Case) -> Schedule {
    let builder = RvqDecode::<u32, E, f32>::builder(case.levels, case.entries, case.dim);
    let builder = builder.batch(case.batch).rows(case.rows).access(case.access);
    let plan = builder.clone().variant(case.variant).build(&case.device());
    plan.unwrap_or_else(|_| builder.build(&case.device()).unwrap()).schedule()
}

#[test]
fn kernels_agree_with_the_formula() {
    for device in TestDevice::kernels() {
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
            cases: support::cases() * 4,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        runner
            .run(&(case(), 0..27usize), |(case, dtypes)| {
                check_any(&device, &case, dtypes);
                Ok(())
            })
            .unwrap();
    }
}

fn plain() -> Case {
    Case {
        batch: 2,
        rows: 37,
        levels: 8,
        entries: 40,
        dim: 128,
        shared: false,
        gap: [0; 2],
        shift: [0; 3],
        null_code: None,
        bad_codes: false,
        access: Access::Auto,
        variant: Variant::Auto,
        small_l2: false,
        seed: 5,
    }
}

#[test]
fn every_dtype_on_every_device_at_the_edges() {
    for device in TestDevice::all() {
        for dtypes in 0..27 {
            for (rows, dim) in [(1, 1), (7, 8), (8, 127), (9, 128), (33, 129), (31, 264)] {
                for levels in [0, 1, 7, 8, 9, 17] {
                    for variant in [Variant::Rows, Variant::Tiles] {
                        let case = Case { rows, dim, levels, variant, small_l2: dim == 264, ..plain() };
                        check_any(&device, &case, dtypes);
                    }
                }
            }
        }
    }
}

/// The check must be able to fail: a decoder that sums in another order, or reads the wrong row, is caught.
#[test]
fn a_broken_decoder_is_caught() {
    let case = plain();
    let problem = case.problem::<u32, f32>();
    let (right, _) = case.oracle(&problem, 0f32, |sum, value: f32| sum + value);
    let reversed = {
        let mut backwards = case.problem::<u32, f32>();
        let [_, levels, _] = backwards.codes_layout.shape();
        for b in 0..2 {
            for r in 0..37 {
                for l in 0..levels / 2 {
                    let (from, to) = (
                        backwards.codes_layout.offset([b, l, r]),
                        backwards.codes_layout.offset([b, levels - 1 - l, r]),
                    );
                    backwards.codes.swap(from as usize, to as usize);
                }
            }
        }
        let stride = backwards.codebooks_layout.strides()[0] as usize;
        let books: Vec<f32> = backwards.codebooks.chunks(stride).rev().flatten().copied().collect();
        backwards.codebooks = books;
        case.oracle(&backwards, 0f32, |sum, value: f32| sum + value).0
    };
    let as_f64 = |out: &[Option<f32>]| -> Vec<f64> { out.iter().flatten().map(|&x| f64::from(x)).collect() };
    assert_ne!(right, reversed, "the order of additions shows in the bits");
    let close = Tolerance { atol: 1e-4, ..Tolerance::rounded_to(24) };
    assert_eq!(close.check(&as_f64(&right), &as_f64(&reversed)), Ok(()), "and only there");
    let mut off_by_one = as_f64(&right);
    off_by_one.rotate_right(1);
    assert!(Tolerance::rounded_to(8).check(&off_by_one, &as_f64(&right)).is_err());
}

/// A row's result does not depend on what else is in the batch, or on repetition.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for device in TestDevice::all() {
        let case = Case { rows: 300, ..plain() };
        let problem = case.problem::<u32, bf16>();
        let codes = Buffer::of(&device, &problem.codes, 0);
        let codebooks = Buffer::of(&device, &problem.codebooks, 0);
        let plan = case.plan::<u32, bf16, f16>(&problem);
        let decode = |plan: &RvqDecode<u32, bf16, f16>, len| {
            let mut out = Buffer::<f16>::poisoned(&device, len, 0);
            let (codes, codebooks, view) = (codes.input(), codebooks.input(), out.output());
            plan.run(&device.stream(), RvqDecodeArgs { codes, codebooks, out: view, flags: None }).unwrap();
            out.read()
        };
        let all = decode(&plan, 2 * 300 * 128);
        for _ in 0..20 {
            assert_eq!(decode(&plan, 2 * 300 * 128), all);
        }
        let few = Case { batch: 1, rows: 5, ..case.clone() };
        let strides = problem.codes_layout.strides();
        let prefix = RvqDecode::builder(8, few.entries, 128).rows(5).codes_strides(strides).build(&DeviceInfo::H200);
        assert_eq!(decode(&prefix.unwrap(), 5 * 128), all[..5 * 128]);
    }
}

#[test]
fn bad_plans_are_refused() {
    let builder = || RvqDecode::<u32, f32, f32>::builder(8, 16, 32).batch(2).rows(10);
    let build = |b: RvqDecodeBuilder<u32, f32, f32>| b.build(&DeviceInfo::H200).map(|_| ());
    assert_eq!(build(builder()), Ok(()));
    let size = |result: Result<()>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    size(build(RvqDecode::builder(65_537, 16, 32)), "levels");
    size(build(RvqDecode::builder(8, 0, 32)), "entries");
    size(build(RvqDecode::builder(8, 16, (1 << 20) + 1)), "dim");
    size(build(builder().rows(1 << 31)), "batch * rows");
    size(build(builder().batch(usize::MAX)), "batch");
    size(build(builder().codes_strides([i64::MAX, 1, 8])), "codes");
    size(build(RvqDecode::builder(8, 1 << 31, 32)), "entries");
    size(build(builder().codebooks_strides([i64::MAX / 4, 32])), "codebooks");
    let stride = |result: Result<()>, name: &str, at: usize| {
        assert!(matches!(result, Err(Error::Stride { arg, dim, .. }) if arg == name && dim == at), "{result:?}");
    };
    stride(build(builder().codes_strides([80, -1, 8])), "codes", 1);
    stride(build(builder().codebooks_strides([-4, 32])), "codebooks", 0);
    stride(build(builder().codebooks_strides([32, 1 << 30])), "codebooks", 1);
    stride(build(builder().out_strides([320, 31])), "out", 1);
    stride(build(builder().out_strides([319, 32])), "out", 0);
    stride(build(builder().out_strides([0, 32])), "out", 0);
    stride(build(builder().access(Access::Wide).out_strides([330, 33])), "out", 0);
    stride(build(builder().access(Access::Wide).codebooks_strides([16 * 33, 33])), "codebooks", 1);
    let odd = RvqDecode::<u32, f32, f32>::builder(8, 16, 31).access(Access::Wide);
    assert!(matches!(build(odd), Err(Error::Unsupported { arg: "dim", .. })));
    let tiles = |b: RvqDecodeBuilder<u32, f32, f32>, name| {
        let built = build(b.variant(Variant::Tiles));
        assert!(matches!(built, Err(Error::Unsupported { arg, .. }) if arg == name), "{built:?}");
    };
    tiles(builder().null_code(-1), "null_code");
    tiles(builder().codebooks_strides([1 << 33, 32]), "codebooks");
    tiles(builder().codebooks_strides([1 << 30, 32]).access(Access::Narrow), "codebooks");
    tiles(RvqDecode::builder(8, 16, 16), "dim");
    tiles(RvqDecode::builder(0, 16, 32), "levels");
    assert_eq!(build(builder().variant(Variant::Tiles)), Ok(()));
    assert_eq!(build(builder().codebooks_strides([1 << 30, 32]).variant(Variant::Tiles)), Ok(()));
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder().build(&old), Err(Error::UnsupportedDevice { have: Some(_), .. })));
}

/// Many rows are a matter for tiles, few are not; nor are batch entries that would leave much of their last tile empty,
/// unless their rows continue each other.
#[test]
fn tiles_are_for_many_rows() {
    let schedule = |b: RvqDecodeBuilder<u32, f32, f32>| b.build(&DeviceInfo::H200).unwrap().schedule();
    let builder = |batch, rows| RvqDecode::builder(8, 16, 128).batch(batch).rows(rows);
    let tiles = |batch, rows| schedule(builder(batch, rows)).tiles;
    assert!(tiles(1, 100_000) && !tiles(1, 10));
    assert!(tiles(1000, 100) && !tiles(20_000, 5));
    let cut = schedule(builder(20_000, 5).codes_rows_first());
    assert_eq!((cut.tiles, cut.batch, cut.rows), (true, 1, 100_000));
    let cut = schedule(builder(100_000, 1));
    assert_eq!((cut.tiles, cut.batch, cut.rows), (true, 1, 100_000));
    let cut = schedule(builder(20_000, 5).codes_rows_first().out_strides([768, 128]));
    assert_eq!((cut.tiles, cut.batch, cut.rows), (false, 20_000, 5));
}

/// 128 bytes to a slice; of codebooks of 16 bits 256 where codes and outputs exceed L2.
#[test]
fn slices_of_tiles() {
    fn cut<E: Float>(rows: usize) -> (u32, u32) {
        let schedule = schedule_of::<E>(&Case { batch: 1, rows, levels: 8, ..plain() });
        assert!(schedule.tiles);
        (schedule.lanes, schedule.passes)
    }
    assert_eq!([cut::<f32>(48_000), cut::<f32>(1_000_000)], [(8, 2); 2]);
    assert_eq!([cut::<bf16>(48_000), cut::<bf16>(1_000_000)], [(8, 4), (16, 4)]);
}

/// The limits themselves are fine.
#[test]
fn empty_problems_need_nothing() {
    for device in TestDevice::all() {
        for (batch, rows, levels, dim) in [(0, 5, 2, 8), (3, 0, 2, 8), (3, 5, 2, 0)] {
            let plan = RvqDecode::builder(levels, 4, dim).batch(batch).rows(rows).build(&DeviceInfo::A100).unwrap();
            let (codes, codebooks) = (Buffer::of(&device, &[0u32; 0], 0), Buffer::of(&device, &[0f32; 0], 0));
            let mut out = Buffer::<f32>::poisoned(&device, 0, 0);
            let (codes, codebooks, out) = (codes.input(), codebooks.input(), out.output());
            plan.run(&device.stream(), RvqDecodeArgs { codes, codebooks, out, flags: None }).unwrap();
        }
    }
}

#[test]
fn bad_buffers_are_refused_before_anything_is_written() {
    for device in TestDevice::all() {
        let plan = RvqDecode::<u32, f32, f32>::builder(2, 4, 8).rows(3).build(&DeviceInfo::A100).unwrap();
        let codes = Buffer::of(&device, &[1u32; 6], 0);
        let codebooks = Buffer::of(&device, &[1f32; 64], 0);
        let mut out = Buffer::<f32>::poisoned(&device, 24, 0);
        let mut flags = Buffer::of(&device, &[0u32], 0);
        let mut run = |codes_len, books_len, out_len, flags_len| {
            plan.run(
                &device.stream(),
                RvqDecodeArgs {
                    codes: codes.input_of(codes_len),
                    codebooks: codebooks.input_of(books_len),
                    out: out.output_of(out_len),
                    flags: Some(flags.output_of(flags_len)),
                },
            )
        };
        assert_eq!(run(5, 64, 24, 1), Err(Error::Length { arg: "codes", need: 6, got: 5 }));
        assert_eq!(run(6, 63, 24, 1), Err(Error::Length { arg: "codebooks", need: 64, got: 63 }));
        assert_eq!(run(6, 64, 23, 1), Err(Error::Length { arg: "out", need: 24, got: 23 }));
        assert_eq!(run(6, 64, 24, 0), Err(Error::Length { arg: "flags", need: 1, got: 0 }));
        assert!(out.read().iter().all(|x| x.to_bits() == u32::MAX));
    }
}

/// Misaligned, overlapping, foreign and wrongly ordered buffers: addresses that are compared, never reached.
#[test]
fn bad_addresses_are_refused_before_the_driver_is_asked() {
    let plan = RvqDecode::<u32, f32, f32>::builder(2, 4, 8).rows(3).build(&DeviceInfo::A100).unwrap();
    // SAFETY: every call below is refused before it reaches the driver.
    let run = |codes: u64, codebooks: u64, out: u64, flags: u64, codes_device: i32| unsafe {
        plan.run(
            &Stream::from_raw(std::ptr::null_mut(), 0),
            RvqDecodeArgs {
                codes: In::from_raw(codes, 6, codes_device),
                codebooks: In::from_raw(codebooks, 64, 0),
                out: Out::from_raw(out, 24, 0),
                flags: Some(Out::from_raw(flags, 1, 0)),
            },
        )
    };
    let (codes, books, out, flags) = (0x1000, 0x2000, 0x3000, 0x4000);
    assert_eq!(run(codes + 2, books, out, flags, 0), Err(Error::Alignment { arg: "codes", need: 4 }));
    assert_eq!(run(codes, books + 1, out, flags, 0), Err(Error::Alignment { arg: "codebooks", need: 4 }));
    assert_eq!(run(codes, books, out + 2, flags, 0), Err(Error::Alignment { arg: "out", need: 4 }));
    assert_eq!(run(codes, books, out, flags + 1, 0), Err(Error::Alignment { arg: "flags", need: 4 }));
    assert_eq!(run(codes, books, codes + 20, flags, 0), Err(Error::Overlap { written: "out", other: "codes" }));
    assert_eq!(run(codes, books, books - 4, flags, 0), Err(Error::Overlap { written: "out", other: "codebooks" }));
    assert_eq!(run(codes, books, out, out + 92, 0), Err(Error::Overlap { written: "out", other: "flags" }));
    assert_eq!(run(codes, books, out, books, 0), Err(Error::Overlap { written: "flags", other: "codebooks" }));
    assert_eq!(
        run(codes, books, out, flags, 1),
        Err(Error::DeviceMismatch { arg: "codes", stream: Device::Cuda(0), got: Device::Cuda(1) })
    );
    let mut host = [0f32; 24];
    // SAFETY: as above.
    let mixed = unsafe {
        plan.run(
            &Stream::from_raw(std::ptr::null_mut(), 0),
            RvqDecodeArgs {
                codes: In::from_raw(codes, 6, 0),
                codebooks: In::from_raw(books, 64, 0),
                out: Out::host(&mut host),
                flags: None,
            },
        )
    };
    assert!(matches!(mixed, Err(Error::DeviceMismatch { arg: "out", got: Device::Host, .. })));
}

/// Without kernels or without a driver a CUDA stream is an error value, not a crash.
#[test]
fn a_cuda_stream_without_cuda_is_an_error() {
    if nextscale::driver_present() && cfg!(feature = "cuda") {
        return;
    }
    let plan = RvqDecode::<u32, f32, f32>::builder(2, 4, 8).rows(3).build(&DeviceInfo::A100).unwrap();
    // SAFETY: there is nothing to launch with.
    let ran = unsafe {
        plan.run(
            &Stream::from_raw(std::ptr::null_mut(), 0),
            RvqDecodeArgs {
                codes: In::from_raw(0x1000, 6, 0),
                codebooks: In::from_raw(0x2000, 64, 0),
                out: Out::from_raw(0x3000, 24, 0),
                flags: None,
            },
        )
    };
    if cfg!(feature = "cuda") {
        assert!(matches!(ran, Err(Error::DriverUnavailable { .. })), "{ran:?}");
    } else {
        assert_eq!(ran, Err(Error::NotCompiled));
    }
}

#[test]
fn wide_access_is_refused_where_addresses_do_not_allow_it() {
    for device in TestDevice::kernels() {
        let plan = RvqDecode::<u32, f32, bf16>::builder(2, 4, 8).rows(3).access(Access::Wide);
        let plan = plan.build(&DeviceInfo::A100).unwrap();
        let codes = Buffer::of(&device, &[1u32; 6], 0);
        let run = |shift_books, shift_out| {
            let codebooks = Buffer::of(&device, &[1f32; 64], shift_books);
            let mut out = Buffer::<bf16>::poisoned(&device, 24, shift_out);
            let (codes, codebooks, view) = (codes.input(), codebooks.input(), out.output());
            let ran = plan.run(&device.stream(), RvqDecodeArgs { codes, codebooks, out: view, flags: None });
            out.read();
            ran
        };
        assert_eq!(run(0, 0), Ok(()));
        assert_eq!(run(1, 0), Err(Error::Alignment { arg: "codebooks", need: 16 }));
        // Four bf16 go with a read of four f32: 8 bytes.
        assert_eq!(run(0, 2), Err(Error::Alignment { arg: "out", need: 8 }));
        assert_eq!(run(0, 4), Ok(()));
    }
}

/// More than 2^31 elements between the first and the last of a buffer.
#[test]
fn offsets_are_64_bit() {
    let far = (1i64 << 31) + 64;
    let plan = RvqDecode::<u16, bf16, bf16>::builder(2, 4, 64).rows(2).out_strides([0, far]);
    let plan = plan.codebooks_strides([far, 64]).build(&DeviceInfo::H200).unwrap();
    if std::env::var_os("NXS_SMALL").is_some() {
        eprintln!("SKIPPED: NXS_SMALL is set, and this takes 8 GiB");
        return;
    }
    for device in TestDevice::kernels().into_iter().filter(|device| !device.is_emulated()) {
        let codes = Buffer::of(&device, &[0u16, 3, 2, 1], 0);
        let ramp: Vec<bf16> = (0..4 * 64).map(|i| bf16::from_f32((i % 128) as f32)).collect();
        let mut books = vec![bf16::ZERO; far as usize + 256];
        books[..256].copy_from_slice(&ramp);
        books[far as usize..].copy_from_slice(&ramp);
        let codebooks = Buffer::of(&device, &books, 0);
        let mut out = Buffer::<bf16>::poisoned(&device, far as usize + 64, 0);
        let args = RvqDecodeArgs { codes: codes.input(), codebooks: codebooks.input(), out: out.output(), flags: None };
        plan.run(&device.stream(), args).unwrap();
        let out = out.read();
        for d in 0..64 {
            let row = |r: usize| out[r * far as usize + d].to_f32();
            assert_eq!(row(0), ramp[d].to_f32() + ramp[2 * 64 + d].to_f32());
            assert_eq!(row(1), ramp[3 * 64 + d].to_f32() + ramp[64 + d].to_f32());
        }
    }
}

#[test]
fn plans_are_plain_data() {
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<RvqDecode<u32, f32, bf16>>();
    let plan = |rows| RvqDecode::<u32, f32, bf16>::builder(8, 16, 32).rows(rows).build(&DeviceInfo::H200).unwrap();
    assert_eq!(plan(4), plan(4));
    assert_ne!(plan(4), plan(5));
    assert_eq!(plan(4).workspace_bytes(), 0);
}

#[test]
fn traffic_is_that_of_the_formula() {
    let plan = |b: RvqDecodeBuilder<u16, f32, bf16>| b.build(&DeviceInfo::H200).unwrap().traffic();
    let of = |rows| plan(RvqDecode::builder(8, 1024, 128).batch(2).rows(rows));
    assert_eq!(of(24_000), RvqDecodeTraffic { codes: 768_000, gathered: 196_608_000, written: 12_288_000 });
    assert_eq!(of(0), RvqDecodeTraffic { codes: 0, gathered: 0, written: 0 });
    assert_eq!(plan(RvqDecode::builder(0, 0, 128)), RvqDecodeTraffic { codes: 0, gathered: 0, written: 256 });
    assert_eq!(plan(RvqDecode::builder(8, 4, 0)), RvqDecodeTraffic { codes: 0, gathered: 0, written: 0 });
    let huge = plan(RvqDecode::builder(1 << 16, 4, 1 << 20).rows((1 << 31) - 1).shared_codebook());
    assert_eq!(huge.gathered, u64::MAX);
}

/// What the emulator counts, beside what the plan says.
#[cfg(feature = "emulate")]
mod traffic {
    use super::*;
    use nextscale::emulator::{self, Counters};

    const SECTOR: u64 = 32;

    /// Counts a decode in which no two rows have a level's code in common: a warp would read its entry once for both.
    fn count<C: Code, E: Float, O: Float>(case: &Case) -> (RvqDecode<C, E, O>, Counters) {
        let mut problem = case.problem::<C, E>();
        let [batch, levels, rows] = problem.codes_layout.shape();
        assert_eq!(case.entries % 2, 1);
        assert!(case.entries as u64 >= batch * rows);
        for b in 0..batch {
            for l in 0..levels {
                for r in 0..rows {
                    let code = (2 * (b * rows + r) + l) % case.entries as u64;
                    problem.codes[problem.codes_layout.offset([b, l, r]) as usize] = C::from_i64(code as i64).unwrap();
                }
            }
        }
        let plan = case.plan::<C, E, O>(&problem);
        let device = TestDevice::Emulated;
        let codes = Buffer::of(&device, &problem.codes, case.shift[0]);
        let codebooks = Buffer::of(&device, &problem.codebooks, case.shift[1]);
        let len = problem.out_layout.required_len("out").unwrap() as usize;
        let mut out = Buffer::<O>::poisoned(&device, len, case.shift[2]);
        let args = RvqDecodeArgs { codes: codes.input(), codebooks: codebooks.input(), out: out.output(), flags: None };
        emulator::reset();
        plan.run(&device.stream(), args).unwrap();
        (plan, emulator::counters())
    }

    /// Whether the bytes counted are no fewer than a plan's, and no more than these with what the kernels add: what a
    /// warp reaches of a row at once, a stretch, is rounded out to whole sectors; each stretch has its codes read, a
    /// sector each; tiles read rows that fill a batch entry's last tile up; and a chunk of more than 16 bytes of output
    /// is written by two instructions, which touch the same sectors.
    fn compare<C: Code, E: Float, O: Float>(
        counted: &Counters,
        plan: &RvqDecode<C, E, O>,
        case: &Case,
    ) -> Result<(), String> {
        let (schedule, traffic) = (plan.schedule(), plan.traffic());
        let stretch = u64::from(schedule.vec * schedule.lanes.min(32));
        let stretches = schedule.dim.div_ceil(stretch);
        let rounding = |element: usize, shift: usize, gap: usize| {
            let ends = [shift, case.dim, gap, stretch as usize].map(|elements| (elements * element) as u64);
            let aligned = 1 << ends.iter().fold(SECTOR, |all, end| all | end).trailing_zeros();
            stretches * 2 * (SECTOR - aligned)
        };
        let written = schedule.batch * schedule.rows;
        let tile = if schedule.tiles { schedule.rows_per_warp() } else { 1 };
        let rows = schedule.batch * schedule.rows.next_multiple_of(tile);
        let an_entry = stretches * SECTOR + rounding(size_of::<E>(), case.shift[1], case.gap[0]);
        let most_loaded = traffic.gathered / written * rows + rows * case.levels as u64 * an_entry;
        let most_stored = if schedule.vec as usize * size_of::<O>() > 16 {
            traffic.written * 2
        } else {
            traffic.written + written * rounding(size_of::<O>(), case.shift[2], case.gap[1])
        };
        let hold = |what, least: u64, counted: u64, most: u64| {
            if (least..=most).contains(&counted) {
                return Ok(());
            }
            Err(format!("{what}: {counted} bytes, not {least} to {most}; {schedule:?}, {case:?}"))
        };
        hold("loads", traffic.codes + traffic.gathered, counted.global_load_bytes, most_loaded)?;
        hold("stores", traffic.written, counted.global_store_bytes, most_stored)
    }

    const VARIANTS: [Variant; 2] = [Variant::Rows, Variant::Tiles];

    #[test]
    fn kernels_move_what_the_plan_says() {
        struct Check<'a>(&'a Case);
        impl ForDTypes for Check<'_> {
            fn call<C: Code, E: Float, O: Float>(self) {
                let (plan, counted) = count::<C, E, O>(self.0);
                let schedule = plan.schedule();
                assert_eq!(schedule.tiles, self.0.variant == Variant::Tiles);
                assert_eq!(schedule.vec > 1, self.0.access == Access::Wide);
                compare(&counted, &plan, self.0).unwrap();
            }
        }
        let wide = [(1, 40, 1, 0), (9, 1032, 5, 8), (19, 264, 9, 0)].map(|case| (Access::Wide, 0, case));
        let narrow = [(1, 5, 7, 0), (9, 1032, 2, 1), (37, 41, 8, 3)].map(|case| (Access::Narrow, 1, case));
        for (access, shift, (rows, dim, levels, gap)) in wide.into_iter().chain(narrow) {
            for variant in VARIANTS {
                let (entries, gap, shift) = (4 * rows + 1, [gap; 2], [shift; 3]);
                let case = Case { rows, dim, levels, entries, gap, shift, access, variant, ..plain() };
                for dtypes in 0..27 {
                    with_dtypes(dtypes, Check(&case));
                }
            }
        }
    }

    /// The bounds are narrow enough to tell one level of four more or fewer; of eight they are not, as each slice of 128
    /// bytes may read its codes by the sector.
    #[test]
    fn another_plan_is_told_from_what_was_counted() {
        struct Check<'a>(&'a Case);
        impl ForDTypes for Check<'_> {
            fn call<C: Code, E: Float, O: Float>(self) {
                let (plan, counted) = count::<C, E, O>(self.0);
                compare(&counted, &plan, self.0).unwrap();
                for levels in [3, 5] {
                    let other = Case { levels, ..self.0.clone() };
                    let plan = other.plan::<C, E, O>(&other.problem());
                    compare(&counted, &plan, &other).expect_err("other loads");
                }
            }
        }
        for variant in VARIANTS {
            let case = Case { rows: 32, levels: 4, dim: 512, entries: 65, access: Access::Wide, variant, ..plain() };
            for dtypes in 0..27 {
                with_dtypes(dtypes, Check(&case));
            }
        }
    }
}

#[cfg(feature = "cudarc-0_19")]
mod cudarc {
    use super::*;
    use nextscale::cudarc_0_19::{AsIn, AsOut};

    fn gpus() -> Option<[std::sync::Arc<nextscale::cudarc_0_19::cudarc::driver::CudaStream>; 2]> {
        let stream = || match TestDevice::cuda()? {
            TestDevice::Cuda(stream) => Some(stream),
            TestDevice::Host => None,
        };
        Some([stream()?, stream()?])
    }

    #[test]
    fn slices_and_views_run_on_their_own_stream_only() {
        let Some([stream, other]) = gpus() else { return };
        let plan = RvqDecode::builder(2, 4, 8).rows(3).build(&DeviceInfo::of(&stream).unwrap()).unwrap();
        let codes = stream.clone_htod(&[9u32, 0, 1, 2, 3, 2, 1]).unwrap();
        let books: Vec<f32> = (0..64).map(|x| x as f32).collect();
        let codebooks = stream.clone_htod(&books).unwrap();
        let mut out = stream.alloc_zeros::<f32>(30).unwrap();
        plan.run(
            &stream,
            RvqDecodeArgs {
                codes: codes.slice(1..).as_in(&stream),
                codebooks: codebooks.as_in(&stream),
                out: out.slice_mut(4..28).as_out(&stream),
                flags: None,
            },
        )
        .unwrap();
        let got = stream.clone_dtoh(&out).unwrap();
        for (r, (first, second)) in [(0, 3), (1, 2), (2, 1)].into_iter().enumerate() {
            for d in 0..8 {
                assert_eq!(got[4 + r * 8 + d], (first * 8 + d + 32 + second * 8 + d) as f32);
            }
        }
        assert!(got[..4].iter().chain(&got[28..]).all(|&x| x == 0.0));

        let wrong = plan.run(
            &other,
            RvqDecodeArgs {
                codes: codes.slice(1..).as_in(&other),
                codebooks: codebooks.as_in(&stream),
                out: out.as_out(&other),
                flags: None,
            },
        );
        assert_eq!(wrong, Err(Error::StreamMismatch { arg: "codebooks" }));
    }

    /// A captured graph replays to the same bits, with the codes of the moment.
    #[test]
    fn graphs_replay() {
        let Some([stream, _]) = gpus() else { return };
        let device = TestDevice::Cuda(stream.clone());
        let case = plain();
        let problem = case.problem::<u32, f32>();
        let plan = case.plan::<u32, f32, f32>(&problem);
        let codebooks = Buffer::of(&device, &problem.codebooks, 0);
        let mut codes = stream.clone_htod(&problem.codes).unwrap();
        let mut out = Buffer::<f32>::poisoned(&device, 2 * 37 * 128, 0);
        let mut eager = Buffer::<f32>::poisoned(&device, 2 * 37 * 128, 0);
        let run = |codes: In<'_, u32>, out: Out<'_, f32>| {
            plan.run(&stream, RvqDecodeArgs { codes, codebooks: codebooks.input(), out, flags: None }).unwrap();
        };
        run(codes.as_in(&stream), eager.output()); // loads the code
        let graph = support::capture(&stream, || run(codes.as_in(&stream), out.output()));
        for replay in 0..3 {
            let moved: Vec<u32> = problem.codes.iter().map(|code| (code + replay) % 40).collect();
            stream.memcpy_htod(&moved, &mut codes).unwrap();
            graph.launch().unwrap();
            run(codes.as_in(&stream), eager.output());
            assert_eq!(out.read(), eager.read());
        }
    }

    /// Two streams at once give what one after the other gives.
    #[test]
    fn streams_do_not_disturb_each_other() {
        let Some([first, second]) = gpus() else { return };
        let case = Case { rows: 3000, ..plain() };
        let problem = case.problem::<u32, f32>();
        let plan = case.plan::<u32, f32, bf16>(&problem);
        let devices = [TestDevice::Cuda(first), TestDevice::Cuda(second)];
        let inputs: Vec<_> = devices
            .iter()
            .map(|device| (Buffer::of(device, &problem.codes, 0), Buffer::of(device, &problem.codebooks, 0)))
            .collect();
        let mut outs: Vec<_> = (0..8).map(|i| Buffer::<bf16>::poisoned(&devices[i % 2], 2 * 3000 * 128, 0)).collect();
        for device in &devices {
            device.sync();
        }
        for (i, out) in outs.iter_mut().enumerate() {
            let (codes, codebooks) = &inputs[i % 2];
            let (codes, codebooks, out) = (codes.input(), codebooks.input(), out.output());
            plan.run(&devices[i % 2].stream(), RvqDecodeArgs { codes, codebooks, out, flags: None }).unwrap();
        }
        let expected = outs[0].read();
        assert!(outs.iter().all(|out| out.read() == expected));
    }

    #[test]
    fn a_stream_of_another_device_is_refused() {
        let Some([stream, _]) = gpus() else { return };
        let plan = RvqDecode::<u32, f32, f32>::builder(1, 1, 1).build(&DeviceInfo::A100).unwrap();
        // SAFETY: refused before the launch: the device that is current is another one.
        let ran = unsafe {
            plan.run(
                &Stream::from_raw(stream.cu_stream().cast(), 7),
                RvqDecodeArgs {
                    codes: In::from_raw(0x1000, 1, 7),
                    codebooks: In::from_raw(0x2000, 1, 7),
                    out: Out::from_raw(0x3000, 1, 7),
                    flags: None,
                },
            )
        };
        assert!(matches!(ran, Err(Error::DeviceMismatch { arg: "stream", .. })), "{ran:?}");
    }
}
