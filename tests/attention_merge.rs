//! Merge of partial attention outputs on every device, against an f64 oracle written here from the formula.

#![cfg(feature = "attention")]

mod support;

use nextscale::attention::{Access, Merge, MergeArgs, MergeBuilder, Traffic};
use nextscale::dtype::Float;
use nextscale::{Device, DeviceInfo, Error, In, Layout, Out, Result, Stream, bf16, f16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use support::{Buffer, FLOATS, ForFloats, TestDevice, for_floats, poison, rounding};

/// One problem: everything but the dtypes.
#[derive(Debug, Clone)]
struct Case {
    parts: usize,
    batch: usize,
    rows: usize,
    heads: usize,
    dim: usize,
    /// Dimensions in a random order instead of the usual one.
    shuffled: bool,
    /// Extra elements between heads of the parts and of the output.
    gap: [usize; 2],
    /// Elements by which each buffer starts off its alignment: parts, lse, out, out_lse.
    shift: [usize; 4],
    accumulate: bool,
    /// How far the lse lie apart.
    spread: f32,
    /// Share of the parts with an lse of -inf and NaN for values.
    empty: f64,
    access: Access,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let sizes = (
        prop_oneof![4 => 1..10usize, 1 => 10..40usize],
        0..3usize,
        0..12usize,
        0..5usize,
        prop_oneof![1..40usize, Just(64), Just(128), 1..300usize],
    );
    let layout = (
        any::<bool>(),
        prop_oneof![Just([0; 2]), [0..9usize, 0..9usize]],
        prop_oneof![3 => Just([0; 4]), 1 => [0..5usize, 0..5usize, 0..5usize, 0..5usize]],
    );
    let rest = (
        any::<bool>(),
        prop_oneof![Just(1f32), Just(20.0), Just(300.0)],
        prop_oneof![2 => Just(0.0), 1 => Just(0.4), 1 => Just(0.9)],
        prop_oneof![3 => Just(Access::Auto), 1 => Just(Access::Narrow)],
        any::<u64>(),
    );
    (sizes, layout, rest).prop_map(|(sizes, (shuffled, gap, shift), (accumulate, spread, empty, access, seed))| {
        let (parts, batch, rows, heads, dim) = sizes;
        Case { parts, batch, rows, heads, dim, shuffled, gap, shift, accumulate, spread, empty, access, seed }
    })
}

/// Strides of a dense tensor whose dimensions lie in a random order, the last one innermost if `last_inner`.
fn strides<const N: usize>(shape: [u64; N], shuffled: bool, inner: i64, rng: &mut StdRng) -> [i64; N] {
    let mut order: [usize; N] = std::array::from_fn(|dim| N - 1 - dim);
    if shuffled {
        order.shuffle(rng);
    }
    let mut strides = [0; N];
    let mut stride = inner;
    for dim in order {
        strides[dim] = stride;
        stride *= shape[dim].max(1) as i64;
    }
    strides
}

/// The case with its data and layouts.
struct Problem<P, O> {
    parts: Vec<P>,
    lse: Vec<f32>,
    /// What `out` and `out_lse` hold before.
    out: Vec<O>,
    out_lse: Vec<f32>,
    parts_layout: Layout<5>,
    lse_layout: Layout<4>,
    out_layout: Layout<4>,
    out_lse_layout: Layout<3>,
}

/// What one element should be, and how far it may be from it.
#[derive(Clone, Copy)]
struct Expected {
    value: f64,
    bound: f64,
}

impl Case {
    fn problem<P: Float, O: Float>(&self) -> Problem<P, O> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let [parts, batch, rows, heads, dim] =
            [self.parts, self.batch, self.rows, self.heads, self.dim].map(|n| n as u64);
        let inner = |gap: usize| (self.dim + gap) as i64;
        let [p, b, r, h] = strides([parts, batch, rows, heads], self.shuffled, inner(self.gap[0]), &mut rng);
        let parts_layout = Layout::strided([parts, batch, rows, heads, dim], [p, b, r, h, 1]);
        let lse_shape = [parts, batch, heads, rows];
        let lse_layout = Layout::strided(lse_shape, strides(lse_shape, self.shuffled, 1, &mut rng));
        let [b, r, h] = strides([batch, rows, heads], self.shuffled, inner(self.gap[1]), &mut rng);
        let out_layout = Layout::strided([batch, rows, heads, dim], [b, r, h, 1]);
        let out_lse_shape = [batch, heads, rows];
        let out_lse_layout = Layout::strided(out_lse_shape, strides(out_lse_shape, self.shuffled, 1, &mut rng));

        let mut lse_value = || match rng.random_bool(self.empty) {
            true => f32::NEG_INFINITY,
            false => rng.random_range(-self.spread..=self.spread),
        };
        let lse: Vec<f32> = (0..lse_layout.required_len("").unwrap()).map(|_| lse_value()).collect();
        let mut out_lse = vec![poison(); out_lse_layout.required_len("").unwrap() as usize];
        if self.accumulate {
            out_lse.fill_with(lse_value);
        }
        let mut value = || rng.random_range(-4.0..4.0f32);
        let mut values = vec![poison(); parts_layout.required_len("").unwrap() as usize];
        let mut out = vec![poison(); out_layout.required_len("").unwrap() as usize];
        for (b, r, h) in self.items() {
            for d in 0..dim {
                // What has no weight stays NaN.
                for i in 0..parts {
                    if lse[lse_layout.offset([i, b, h, r]) as usize] > f32::NEG_INFINITY {
                        values[parts_layout.offset([i, b, r, h, d]) as usize] = P::from_f32(value());
                    }
                }
                if self.accumulate && out_lse[out_lse_layout.offset([b, h, r]) as usize] > f32::NEG_INFINITY {
                    out[out_layout.offset([b, r, h, d]) as usize] = O::from_f32(value());
                }
            }
        }
        Problem { parts: values, lse, out, out_lse, parts_layout, lse_layout, out_layout, out_lse_layout }
    }

    fn items(&self) -> impl Iterator<Item = (u64, u64, u64)> + use<> {
        let [batch, rows, heads] = [self.batch, self.rows, self.heads].map(|n| n as u64);
        (0..batch).flat_map(move |b| (0..rows).flat_map(move |r| (0..heads).map(move |h| (b, r, h))))
    }

    fn plan<P: Float, O: Float>(&self, problem: &Problem<P, O>) -> Merge<P, O> {
        let [p, b, r, h, _] = problem.parts_layout.strides();
        let [out_b, out_r, out_h, _] = problem.out_layout.strides();
        let mut builder = Merge::builder(self.parts, self.heads, self.dim)
            .batch(self.batch)
            .rows(self.rows)
            .parts_strides([p, b, r, h])
            .lse_strides(problem.lse_layout.strides())
            .out_strides([out_b, out_r, out_h])
            .out_lse_strides(problem.out_lse_layout.strides())
            .access(self.access);
        if self.accumulate {
            builder = builder.accumulate();
        }
        builder.build(&DeviceInfo::H200).unwrap()
    }

    /// The whole buffers of `out` and `out_lse`; `None` is a gap.
    fn oracle<P: Float, O: Float>(&self, problem: &Problem<P, O>) -> (Vec<Option<Expected>>, Vec<Option<Expected>>) {
        let unit = 2f64.powi(-24);
        let (mut out, mut out_lse) = (vec![None; problem.out.len()], vec![None; problem.out_lse.len()]);
        for (b, r, h) in self.items() {
            let to_lse = problem.out_lse_layout.offset([b, h, r]) as usize;
            let mut lse: Vec<f64> = (0..self.parts as u64)
                .map(|i| f64::from(problem.lse[problem.lse_layout.offset([i, b, h, r]) as usize]))
                .collect();
            if self.accumulate {
                lse.push(f64::from(problem.out_lse[to_lse]));
            }
            let parts = lse.len() as f64;
            let top = lse.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weight = |lse: f64| if lse == f64::NEG_INFINITY { 0.0 } else { (lse - top).exp() };
            let total: f64 = lse.iter().map(|&lse| weight(lse)).sum();
            let value = if total == 0.0 { f64::NEG_INFINITY } else { top + total.ln() };
            let bound = if total == 0.0 { 0.0 } else { unit * (value.abs() + parts + 64.0) };
            out_lse[to_lse] = Some(Expected { value, bound });
            for d in 0..self.dim as u64 {
                let to = problem.out_layout.offset([b, r, h, d]) as usize;
                let (mut sum, mut bound) = (0.0, 0.0);
                for (i, &lse) in lse.iter().enumerate().filter(|(_, lse)| **lse != f64::NEG_INFINITY) {
                    let value = match i < self.parts {
                        true => problem.parts[problem.parts_layout.offset([i as u64, b, r, h, d]) as usize].to_f32(),
                        false => problem.out[to].to_f32(),
                    };
                    sum += weight(lse) * f64::from(value) / total;
                    let share = weight(lse) * f64::from(value.abs()) / total;
                    bound += unit * (2.0 * parts + 64.0 + 3.0 * (top - lse)) * share + 2f64.powi(-126) * 4.0;
                }
                out[to] = Some(Expected { value: sum, bound: bound + rounding::<O>(sum.abs() + bound) });
            }
        }
        (out, out_lse)
    }

    /// Runs on a device.
    fn run<P: Float, O: Float>(
        &self,
        device: &TestDevice,
        plan: &Merge<P, O>,
        problem: &Problem<P, O>,
    ) -> (Vec<O>, Vec<f32>) {
        let parts = Buffer::of(device, &problem.parts, self.shift[0]);
        let lse = Buffer::of(device, &problem.lse, self.shift[1]);
        let mut out = Buffer::of(device, &problem.out, self.shift[2]);
        let mut out_lse = Buffer::of(device, &problem.out_lse, self.shift[3]);
        let (parts, lse, view) = (parts.input(), lse.input(), out.output());
        plan.run(&device.stream(), MergeArgs { parts, lse, out: view, out_lse: Some(out_lse.output()) }).unwrap();
        (out.read(), out_lse.read())
    }
}

/// Within the bound, or a gap and untouched.
fn compare<T: Float>(actual: &[T], expected: &[Option<Expected>]) -> Result<(), String> {
    assert_eq!(actual.len(), expected.len());
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let close = match expected {
            None => bytemuck::bytes_of(actual) == bytemuck::bytes_of(&poison::<T>()),
            Some(Expected { value, bound }) => {
                let actual = f64::from(actual.to_f32());
                // Infinities are equal; a NaN is close to nothing.
                actual == *value || (actual - value).abs() <= *bound
            }
        };
        if !close {
            return Err(format!(
                "element {i}: {actual:?} instead of {:?}",
                expected.map(|Expected { value, bound }| (value, bound))
            ));
        }
    }
    Ok(())
}

fn check<P: Float, O: Float>(device: &TestDevice, case: &Case) {
    let problem = case.problem::<P, O>();
    let plan = case.plan(&problem);
    let (out, out_lse) = case.run(device, &plan, &problem);
    let (expected, expected_lse) = case.oracle(&problem);
    compare(&out, &expected).unwrap_or_else(|e| panic!("out: {e}"));
    compare(&out_lse, &expected_lse).unwrap_or_else(|e| panic!("out_lse: {e}"));
}

/// One of the 9 combinations of dtypes.
fn check_any(device: &TestDevice, case: &Case, dtypes: usize) {
    struct Check<'a>(&'a TestDevice, &'a Case);
    impl ForFloats for Check<'_> {
        fn call<P: Float, O: Float>(self) {
            check::<P, O>(self.0, self.1);
        }
    }
    for_floats(FLOATS[dtypes / 3], FLOATS[dtypes % 3], Check(device, case));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases(), ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_the_formula(case in case(), dtypes in 0..9usize) {
        check_any(&TestDevice::Host, &case, dtypes);
    }

    /// Every element of the output belongs to exactly one thread, no thread to an element outside, and lane 0 has a
    /// part of every item, for it writes the lse.
    #[test]
    fn the_schedule_owns_every_output_once(
        batch in 0..3usize, rows in 0..20usize, heads in 0..5usize,
        dim in prop_oneof![1..40usize, 1..=1024usize, (1..=128usize).prop_map(|n| n * 8)], narrow in any::<bool>(),
    ) {
        let access = if narrow { Access::Narrow } else { Access::Auto };
        let plan = Merge::<bf16, f32>::builder(3, heads, dim).batch(batch).rows(rows).access(access);
        let schedule = plan.build(&DeviceInfo::H200).unwrap().schedule();
        prop_assert!(schedule.lanes.is_power_of_two() && schedule.lanes <= 32);
        let mut owners = vec![0; batch * rows * heads * dim];
        for block in 0..schedule.grid() {
            for thread in 0..schedule.threads() {
                let cells = schedule.cells(block, thread);
                let item = block * u64::from(schedule.threads() / schedule.lanes) + u64::from(thread / schedule.lanes);
                prop_assert!(thread % schedule.lanes != 0 || item >= schedule.items || !cells.is_empty());
                for (item, elements) in cells {
                    for d in elements {
                        prop_assert!(d < dim as u64);
                        owners[(item * dim as u64 + d) as usize] += 1;
                    }
                }
            }
        }
        prop_assert!(owners.iter().all(|&n| n == 1));
    }
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
            .run(&(case(), 0..9usize), |(case, dtypes)| {
                check_any(&device, &case, dtypes);
                Ok(())
            })
            .unwrap();
    }
}

fn plain() -> Case {
    Case {
        parts: 5,
        batch: 2,
        rows: 9,
        heads: 3,
        dim: 128,
        shuffled: false,
        gap: [0; 2],
        shift: [0; 4],
        accumulate: false,
        spread: 6.0,
        empty: 0.0,
        access: Access::Auto,
        seed: 5,
    }
}

#[test]
fn every_dtype_on_every_device_at_the_edges() {
    for device in TestDevice::all() {
        for dtypes in 0..9 {
            for dim in [1, 7, 8, 9, 64, 127, 128, 136, 256, 1023, 1024] {
                check_any(&device, &Case { batch: 1, rows: 2, dim, ..plain() }, dtypes);
            }
            for parts in [1, 2, 3, 4, 5, 8, 9, 16, 17] {
                for accumulate in [false, true] {
                    check_any(&device, &Case { parts, dim: 72, empty: 0.2, accumulate, ..plain() }, dtypes);
                }
            }
        }
        check::<f32, bf16>(&device, &Case { parts: 256, rows: 2, heads: 1, ..plain() });
        check::<f16, f32>(&device, &Case { parts: 255, rows: 2, heads: 1, accumulate: true, empty: 0.5, ..plain() });
    }
}

/// One part with a finite lse among empty ones is copied, bit for bit; none at all gives 0 and -inf.
#[test]
fn a_single_part_is_copied_and_none_is_zero() {
    for device in TestDevice::all() {
        for (parts, accumulate) in [(1, false), (2, false), (9, false), (1, true)] {
            let case = Case { parts, accumulate, ..plain() };
            let mut problem = case.problem::<f32, f32>();
            problem.out_lse.fill(f32::NEG_INFINITY);
            problem.out.fill(f32::NAN);
            let [_, batch, rows, heads, dim] = problem.parts_layout.shape();
            for i in 0..parts as u64 {
                for (b, r, h) in case.items() {
                    // Row 0 of each head has nothing; of the others one part, by turns.
                    if r == 0 || (r + h) % parts as u64 != i {
                        problem.lse[problem.lse_layout.offset([i, b, h, r]) as usize] = f32::NEG_INFINITY;
                        for d in 0..dim {
                            problem.parts[problem.parts_layout.offset([i, b, r, h, d]) as usize] = f32::NAN;
                        }
                    }
                }
            }
            let (out, out_lse) = case.run(&device, &case.plan(&problem), &problem);
            assert_eq!(out.len() as u64, batch * rows * heads * dim);
            for (b, r, h) in case.items() {
                let i = (r + h) % parts as u64;
                let lse = out_lse[problem.out_lse_layout.offset([b, h, r]) as usize];
                let was = problem.lse[problem.lse_layout.offset([i, b, h, r]) as usize];
                assert_eq!(lse, was, "lse of row {r}");
                for d in 0..dim {
                    let value = out[problem.out_layout.offset([b, r, h, d]) as usize];
                    let part = problem.parts[problem.parts_layout.offset([i, b, r, h, d]) as usize];
                    assert_eq!(value.to_bits(), if r == 0 { 0 } else { part.to_bits() }, "row {r} of {parts} parts");
                }
            }
        }
    }
}

/// NaN and +inf among the lse are not hidden, and stay in their row.
#[test]
fn lse_of_nan_and_infinity_make_nan_of_the_row_alone() {
    for device in TestDevice::all() {
        for parts in [2, 11] {
            let case = Case { parts, batch: 1, rows: 4, heads: 1, ..plain() };
            let mut problem = case.problem::<f32, f32>();
            for (r, bad) in [(1, f32::NAN), (2, f32::INFINITY)] {
                problem.lse[problem.lse_layout.offset([parts as u64 - 1, 0, 0, r]) as usize] = bad;
            }
            // NaN beside nothing but -inf.
            for i in 0..parts as u64 {
                let lse = if i == 1 { f32::NAN } else { f32::NEG_INFINITY };
                problem.lse[problem.lse_layout.offset([i, 0, 0, 3]) as usize] = lse;
            }
            let (out, out_lse) = case.run(&device, &case.plan(&problem), &problem);
            for r in 0..4 {
                let row = &out[r * 128..][..128];
                assert!(row.iter().all(|x| x.is_nan() == (r > 0)), "row {r}: {row:?}");
                assert_eq!(out_lse[r].is_nan(), r > 0);
            }
        }
    }
}

/// Parts that come one after the other give what they give at once: exactly the same sums when out is f32, up to
/// rounding.
#[test]
fn accumulating_is_merging() {
    for device in TestDevice::all() {
        let case = Case { parts: 6, empty: 0.3, spread: 20.0, ..plain() };
        let problem = case.problem::<f32, f32>();
        let (expected, expected_lse) = case.oracle(&problem);
        let part_len = problem.parts.len() / 6;
        let lse_len = problem.lse.len() / 6;
        let mut out = Buffer::of(&device, &vec![f32::NAN; part_len], 0);
        let mut out_lse = Buffer::of(&device, &vec![f32::NEG_INFINITY; lse_len], 0);
        for (first, count) in [(0, 1), (1, 2), (3, 3)] {
            let plan = Merge::<f32, f32>::builder(count, 3, 128).batch(2).rows(9).accumulate();
            let parts = Buffer::of(&device, &problem.parts[first * part_len..][..count * part_len], 0);
            let lse = Buffer::of(&device, &problem.lse[first * lse_len..][..count * lse_len], 0);
            let (parts, lse, view) = (parts.input(), lse.input(), out.output());
            let args = MergeArgs { parts, lse, out: view, out_lse: Some(out_lse.output()) };
            plan.build(&DeviceInfo::H200).unwrap().run(&device.stream(), args).unwrap();
            device.sync();
        }
        // Three calls round thrice.
        let wider = |expected: Vec<Option<Expected>>| -> Vec<_> {
            expected.into_iter().map(|e| e.map(|e| Expected { bound: 3.0 * e.bound + 1e-6, ..e })).collect()
        };
        compare(&out.read(), &wider(expected)).unwrap();
        compare(&out_lse.read(), &wider(expected_lse)).unwrap();
    }
}

/// The check must be able to fail: a merge that ignores the weights, drops a part, or takes the lse for base 2 is
/// caught.
#[test]
fn a_broken_merge_is_caught() {
    let case = Case { parts: 3, spread: 2.0, ..plain() };
    let problem = case.problem::<f32, f32>();
    let plan = case.plan(&problem);
    let (expected, expected_lse) = case.oracle(&problem);
    let broken = |change: &dyn Fn(&mut Problem<f32, f32>)| {
        let mut changed = case.problem::<f32, f32>();
        change(&mut changed);
        let (out, out_lse) = case.run(&TestDevice::Host, &plan, &changed);
        [compare(&out, &expected).is_err(), compare(&out_lse, &expected_lse).is_err()]
    };
    assert_eq!(broken(&|_| {}), [false; 2]);
    assert_eq!(broken(&|p| p.lse.fill(1.0)), [true; 2]);
    assert_eq!(broken(&|p| p.lse[..54].fill(f32::NEG_INFINITY)), [true; 2]);
    assert_eq!(broken(&|p| p.lse.iter_mut().for_each(|lse| *lse *= std::f32::consts::LN_2)), [true; 2]);
    // One part in a thousand too much.
    assert_eq!(broken(&|p| p.parts.iter_mut().for_each(|x| *x *= 1.001)), [true, false]);
    assert_eq!(broken(&|p| p.lse.iter_mut().for_each(|lse| *lse += 2e-5)), [false, true]);
}

/// A row's result does not depend on what else is in the batch, or on repetition.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for device in TestDevice::all() {
        let case = Case { rows: 60, parts: 11, ..plain() };
        let problem = case.problem::<bf16, f16>();
        let all = case.run(&device, &case.plan(&problem), &problem);
        for _ in 0..if device.is_emulated() { 2 } else { 20 } {
            assert_eq!(case.run(&device, &case.plan(&problem), &problem), all);
        }
        let [part, batch, row, head, _] = problem.parts_layout.strides();
        let few = Merge::<bf16, f16>::builder(11, 3, 128)
            .rows(5)
            .parts_strides([part, batch, row, head])
            .lse_strides(problem.lse_layout.strides())
            .build(&DeviceInfo::H200)
            .unwrap();
        let (parts, lse) = (Buffer::of(&device, &problem.parts, 0), Buffer::of(&device, &problem.lse, 0));
        let mut out = Buffer::<f16>::poisoned(&device, 5 * 3 * 128, 0);
        let (parts, lse, view) = (parts.input(), lse.input(), out.output());
        few.run(&device.stream(), MergeArgs { parts, lse, out: view, out_lse: None }).unwrap();
        assert_eq!(out.read(), all.0[..5 * 3 * 128]);
    }
}

#[test]
fn bad_plans_are_refused() {
    let builder = || Merge::<f32, f32>::builder(4, 3, 32).batch(2).rows(10);
    let build = |b: MergeBuilder<f32, f32>| b.build(&DeviceInfo::H200).map(|_| ());
    assert_eq!(build(builder()), Ok(()));
    let size = |result: Result<()>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    size(build(Merge::builder(0, 3, 32)), "parts");
    size(build(Merge::builder(257, 3, 32)), "parts");
    size(build(Merge::builder(4, 3, 0)), "dim");
    size(build(Merge::builder(4, 3, 1025)), "dim");
    size(build(Merge::builder(4, 1 << 31, 32)), "heads");
    size(build(builder().rows(1 << 30)), "batch * rows * heads");
    size(build(builder().batch(usize::MAX)), "batch");
    size(build(builder().parts_strides([i64::MAX, 1, 1, 1])), "parts");
    size(build(builder().lse_strides([i64::MAX, 1, 1, 1])), "lse");
    let stride = |result: Result<()>, name: &str, at: usize| {
        assert!(matches!(result, Err(Error::Stride { arg, dim, .. }) if arg == name && dim == at), "{result:?}");
    };
    stride(build(builder().parts_strides([1920, -960, 96, 32])), "parts", 1);
    stride(build(builder().lse_strides([60, 30, 10, -1])), "lse", 3);
    stride(build(builder().out_strides([960, 96, 31])), "out", 2);
    stride(build(builder().out_strides([960, 95, 32])), "out", 1);
    stride(build(builder().out_strides([0, 96, 32])), "out", 0);
    stride(build(builder().out_lse_strides([30, 10, 0])), "out_lse", 2);
    stride(build(builder().out_lse_strides([30, 9, 1])), "out_lse", 1);
    stride(build(builder().access(Access::Wide).parts_strides([1920, 960, 96, 33])), "parts", 3);
    stride(build(builder().access(Access::Wide).out_strides([970, 97, 32])), "out", 0);
    let odd = Merge::<f32, f32>::builder(4, 3, 31).access(Access::Wide);
    assert!(matches!(build(odd), Err(Error::Unsupported { arg: "dim", .. })));
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder().build(&old), Err(Error::UnsupportedDevice { have: Some(_), .. })));
}

#[test]
fn empty_problems_need_nothing() {
    for device in TestDevice::all() {
        for (batch, rows, heads) in [(0, 5, 2), (3, 0, 2), (3, 5, 0)] {
            let plan = Merge::builder(4, heads, 8).batch(batch).rows(rows).build(&DeviceInfo::A100).unwrap();
            let (parts, lse) = (Buffer::of(&device, &[0f32; 0], 0), Buffer::of(&device, &[0f32; 0], 0));
            let mut out = Buffer::<f32>::poisoned(&device, 0, 0);
            let (parts, lse, out) = (parts.input(), lse.input(), out.output());
            plan.run(&device.stream(), MergeArgs { parts, lse, out, out_lse: None }).unwrap();
        }
    }
}

#[test]
fn bad_buffers_are_refused_before_anything_is_written() {
    for device in TestDevice::all() {
        let plan = Merge::<f32, f32>::builder(2, 2, 4).rows(3).accumulate().build(&DeviceInfo::A100).unwrap();
        let parts = Buffer::of(&device, &[1f32; 48], 0);
        let lse = Buffer::of(&device, &[1f32; 12], 0);
        let mut out = Buffer::<f32>::poisoned(&device, 24, 0);
        let mut out_lse = Buffer::<f32>::poisoned(&device, 6, 0);
        let mut run = |parts_len, lse_len, out_len, out_lse_len: Option<usize>| {
            plan.run(
                &device.stream(),
                MergeArgs {
                    parts: parts.input_of(parts_len),
                    lse: lse.input_of(lse_len),
                    out: out.output_of(out_len),
                    out_lse: out_lse_len.map(|len| out_lse.output_of(len)),
                },
            )
        };
        assert_eq!(run(47, 12, 24, Some(6)), Err(Error::Length { arg: "parts", need: 48, got: 47 }));
        assert_eq!(run(48, 11, 24, Some(6)), Err(Error::Length { arg: "lse", need: 12, got: 11 }));
        assert_eq!(run(48, 12, 23, Some(6)), Err(Error::Length { arg: "out", need: 24, got: 23 }));
        assert_eq!(run(48, 12, 24, Some(5)), Err(Error::Length { arg: "out_lse", need: 6, got: 5 }));
        assert!(matches!(run(48, 12, 24, None), Err(Error::Unsupported { arg: "out_lse", .. })));
        assert!(out.read().iter().chain(&out_lse.read()).all(|x| x.to_bits() == u32::MAX));
    }
}

/// Misaligned, overlapping, foreign and wrongly ordered buffers: addresses that are compared, never reached.
#[test]
fn bad_addresses_are_refused_before_the_driver_is_asked() {
    let plan = Merge::<f32, f32>::builder(2, 2, 4).rows(3).build(&DeviceInfo::A100).unwrap();
    // SAFETY: every call below is refused before it reaches the driver.
    let run = |parts: u64, lse: u64, out: u64, out_lse: u64, lse_device: i32| unsafe {
        plan.run(
            &Stream::from_raw(std::ptr::null_mut(), 0),
            MergeArgs {
                parts: In::from_raw(parts, 48, 0),
                lse: In::from_raw(lse, 12, lse_device),
                out: Out::from_raw(out, 24, 0),
                out_lse: Some(Out::from_raw(out_lse, 6, 0)),
            },
        )
    };
    let (parts, lse, out, out_lse) = (0x1000, 0x2000, 0x3000, 0x4000);
    assert_eq!(run(parts + 2, lse, out, out_lse, 0), Err(Error::Alignment { arg: "parts", need: 4 }));
    assert_eq!(run(parts, lse + 1, out, out_lse, 0), Err(Error::Alignment { arg: "lse", need: 4 }));
    assert_eq!(run(parts, lse, out + 2, out_lse, 0), Err(Error::Alignment { arg: "out", need: 4 }));
    assert_eq!(run(parts, lse, out, out_lse + 1, 0), Err(Error::Alignment { arg: "out_lse", need: 4 }));
    assert_eq!(run(parts, lse, parts + 188, out_lse, 0), Err(Error::Overlap { written: "out", other: "parts" }));
    assert_eq!(run(parts, lse, out, lse + 44, 0), Err(Error::Overlap { written: "out_lse", other: "lse" }));
    assert_eq!(run(parts, lse, out, out + 92, 0), Err(Error::Overlap { written: "out", other: "out_lse" }));
    assert_eq!(
        run(parts, lse, out, out_lse, 1),
        Err(Error::DeviceMismatch { arg: "lse", stream: Device::Cuda(0), got: Device::Cuda(1) })
    );
}

#[test]
fn wide_access_is_refused_where_addresses_do_not_allow_it() {
    for device in TestDevice::kernels() {
        let plan = Merge::<f32, bf16>::builder(2, 1, 8).rows(3).access(Access::Wide).build(&DeviceInfo::A100).unwrap();
        let lse = Buffer::of(&device, &[1f32; 6], 0);
        let run = |shift_parts, shift_out| {
            let parts = Buffer::of(&device, &[1f32; 48], shift_parts);
            let mut out = Buffer::<bf16>::poisoned(&device, 24, shift_out);
            let (parts, lse, view) = (parts.input(), lse.input(), out.output());
            let ran = plan.run(&device.stream(), MergeArgs { parts, lse, out: view, out_lse: None });
            out.read();
            ran
        };
        assert_eq!(run(0, 0), Ok(()));
        assert_eq!(run(1, 0), Err(Error::Alignment { arg: "parts", need: 16 }));
        // Four bf16 go with a read of four f32: 8 bytes.
        assert_eq!(run(0, 2), Err(Error::Alignment { arg: "out", need: 8 }));
        assert_eq!(run(0, 4), Ok(()));
    }
}

/// More than 2^31 elements between the first and the last of a buffer.
#[test]
fn offsets_are_64_bit() {
    let far = (1i64 << 31) + 64;
    let plan = Merge::<bf16, bf16>::builder(2, 1, 64).rows(2).parts_strides([far, 0, 64, 0]).out_strides([0, far, 0]);
    let plan = plan.build(&DeviceInfo::H200).unwrap();
    if std::env::var_os("NXS_SMALL").is_some() {
        eprintln!("SKIPPED: NXS_SMALL is set, and this takes 8 GiB");
        return;
    }
    for device in TestDevice::kernels().into_iter().filter(|device| !device.is_emulated()) {
        let mut values = vec![bf16::ZERO; far as usize + 128];
        for d in 0..128 {
            values[d] = bf16::from_f32(d as f32);
            values[far as usize + d] = bf16::from_f32(3.0 * d as f32);
        }
        let parts = Buffer::of(&device, &values, 0);
        let lse = Buffer::of(&device, &[1f32; 4], 0);
        let mut out = Buffer::<bf16>::poisoned(&device, far as usize + 64, 0);
        let args = MergeArgs { parts: parts.input(), lse: lse.input(), out: out.output(), out_lse: None };
        plan.run(&device.stream(), args).unwrap();
        let out = out.read();
        for r in 0..2 {
            for d in 0..64 {
                assert_eq!(out[r * far as usize + d].to_f32(), 2.0 * (r * 64 + d) as f32);
            }
        }
    }
}

#[test]
fn plans_are_plain_data() {
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<Merge<f32, bf16>>();
    let plan = |rows| Merge::<f32, bf16>::builder(8, 16, 32).rows(rows).build(&DeviceInfo::H200).unwrap();
    assert_eq!(plan(4), plan(4));
    assert_ne!(plan(4), plan(5));
    assert_ne!(plan(4), Merge::builder(8, 16, 32).rows(4).accumulate().build(&DeviceInfo::H200).unwrap());
    assert_eq!(plan(4).workspace_bytes(), 0);
}

#[test]
fn traffic_is_that_of_the_formula() {
    let builder = || Merge::<bf16, f32>::builder(8, 16, 128).batch(2).rows(100);
    let plan = |b: MergeBuilder<bf16, f32>| b.build(&DeviceInfo::H200).unwrap().traffic();
    assert_eq!(plan(builder()), Traffic { read: 3200 * 8 * 260, written: 3200 * 516 });
    assert_eq!(plan(builder().accumulate()), Traffic { read: 3200 * (8 * 260 + 516), written: 3200 * 516 });
    assert_eq!(plan(builder().rows(0)), Traffic { read: 0, written: 0 });
}

/// What the emulator counts, beside what the plan says.
#[cfg(feature = "emulate")]
mod traffic {
    use super::*;
    use nextscale::emulator::{self, Counters};

    const SECTOR: u64 = 32;

    /// Whether the bytes counted are no fewer than a plan's, and no more than these with what the kernel adds: parts
    /// that fill the last group up are those of the last one again, lse are read a sector each for every stretch of a
    /// row, with more parts than a group twice, and a chunk of more than 16 bytes of output is two instructions, which
    /// touch the same sectors.
    fn compare<P: Float, O: Float>(counted: &Counters, plan: &Merge<P, O>, case: &Case) -> Result<(), String> {
        let (schedule, traffic, parts) = (plan.schedule(), plan.traffic(), case.parts as u64);
        let group = match (schedule.vec, parts) {
            (1, _) | (_, 3..=4) => 4,
            (_, ..=2) => 2,
            _ => 8,
        };
        let (read, items) = (parts.next_multiple_of(group), schedule.items);
        let halves = if schedule.vec as usize * size_of::<O>() > 16 { 2 } else { 1 };
        let out = items * (schedule.dim * size_of::<O>() as u64 * halves + SECTOR);
        let stretches = schedule.dim.div_ceil(u64::from(schedule.vec * schedule.lanes));
        let lse = stretches * (2 * read - group) * SECTOR;
        let part = schedule.dim * size_of::<P>() as u64;
        let old = if case.accumulate { out } else { 0 };
        let hold = |what, least: u64, counted: u64, most: u64| match (least..=most).contains(&counted) {
            true => Ok(()),
            false => Err(format!("{what}: {counted} bytes, not {least} to {most}; {schedule:?}, {case:?}")),
        };
        hold("loads", traffic.read, counted.global_load_bytes, items * (read * part + lse) + old)?;
        hold("stores", traffic.written, counted.global_store_bytes, out)
    }

    fn count<P: Float, O: Float>(case: &Case) -> (Merge<P, O>, Counters) {
        let problem = case.problem::<P, O>();
        let plan = case.plan(&problem);
        emulator::reset();
        case.run(&TestDevice::Emulated, &plan, &problem);
        (plan, emulator::counters())
    }

    #[test]
    fn kernels_move_what_the_plan_says() {
        struct Check<'a>(&'a Case);
        impl ForFloats for Check<'_> {
            fn call<P: Float, O: Float>(self) {
                let (plan, counted) = count::<P, O>(self.0);
                assert_eq!(plan.schedule().vec > 1, self.0.access == Access::Wide);
                compare(&counted, &plan, self.0).unwrap();
            }
        }
        for (access, parts, accumulate) in [
            (Access::Wide, 2, false),
            (Access::Wide, 3, true),
            (Access::Wide, 8, true),
            (Access::Wide, 17, false),
            (Access::Narrow, 5, true),
        ] {
            for dtypes in 0..9 {
                let case = Case { access, parts, accumulate, rows: 33, ..plain() };
                for_floats(FLOATS[dtypes / 3], FLOATS[dtypes % 3], Check(&case));
            }
        }
    }

    /// The bounds are narrow enough to tell one part more or fewer.
    #[test]
    fn another_plan_is_told_from_what_was_counted() {
        let case = Case { access: Access::Wide, parts: 8, dim: 512, ..plain() };
        let (plan, counted) = count::<f32, f32>(&case);
        compare(&counted, &plan, &case).unwrap();
        for parts in [7, 9] {
            let other = Case { parts, ..case.clone() };
            let plan = other.plan::<f32, f32>(&other.problem());
            // Seven parts are read as eight.
            assert_eq!(compare(&counted, &plan, &other).is_err(), parts == 9);
        }
        let wider = Case { dim: 520, ..case };
        compare(&counted, &wider.plan::<f32, f32>(&wider.problem()), &wider).unwrap_err();
    }
}

/// A captured graph replays to the same bits, with the parts of the moment.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn graphs_replay() {
    let Some(TestDevice::Cuda(stream)) = TestDevice::cuda() else { return };
    let device = TestDevice::Cuda(stream.clone());
    let case = plain();
    let problem = case.problem::<f32, f32>();
    let plan = case.plan(&problem);
    let mut parts = Buffer::of(&device, &problem.parts, 0);
    let lse = Buffer::of(&device, &problem.lse, 0);
    let mut out = Buffer::<f32>::poisoned(&device, problem.out.len(), 0);
    let mut eager = Buffer::<f32>::poisoned(&device, problem.out.len(), 0);
    let run = |parts: &Buffer<f32>, out: Out<'_, f32>| {
        plan.run(&stream, MergeArgs { parts: parts.input(), lse: lse.input(), out, out_lse: None }).unwrap();
    };
    run(&parts, eager.output()); // loads the code
    let graph = support::capture(&stream, || run(&parts, out.output()));
    for replay in 0..3 {
        let moved: Vec<f32> = problem.parts.iter().map(|x| x + replay as f32).collect();
        parts.write(&moved);
        graph.launch().unwrap();
        run(&parts, eager.output());
        assert_eq!(out.read(), eager.read());
    }
}
