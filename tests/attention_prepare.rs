//! Norm, rope and cache append on every device, against an f64 oracle written here from the formulas.

#![cfg(feature = "attention")]

mod support;

use nextscale::attention::{
    Access, AppendAt, Norm, Positions, Prepare, PrepareArgs, PrepareBuilder, PrepareSchedule, Rope, Traffic,
};
use nextscale::dtype::Float;
use nextscale::{Device, DeviceInfo, Error, In, Layout, Out, Result, Stream, bf16, f16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, FLOATS, ForThreeFloats, TestDevice, for_three_floats, poison, rounding};

/// How elements are paired and where their angles are.
#[derive(Debug, Clone, Copy)]
struct RopeCase {
    half: bool,
    rotary_dim: usize,
    axes: usize,
    full: bool,
    table_rows: usize,
    table_gap: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum PositionCase {
    From,
    Appended,
    Shared,
    OfBatch,
}

/// One problem: everything but the dtypes.
#[derive(Debug, Clone)]
struct Case {
    batch: usize,
    rows: usize,
    /// Of q, k and v; `None`: absent.
    heads: [Option<usize>; 3],
    dim: usize,
    cache_rows: usize,
    norm: Norm,
    weights: bool,
    multiplier: bool,
    rope: Option<RopeCase>,
    positions: PositionCase,
    /// Places to append at are read from memory.
    append_in_memory: bool,
    /// Caches are `[batch, heads, rows, dim]`.
    heads_first: bool,
    /// Some positions or places lie outside, where they are read from memory.
    outside: bool,
    /// Elements between heads of the input and of the outputs.
    gap: [usize; 2],
    /// Elements by which the buffers start off their alignment: inputs, outputs, table and weights.
    shift: [usize; 3],
    access: Access,
    seed: u64,
}

fn rope(dim: usize) -> impl Strategy<Value = Option<RopeCase>> {
    let parts = (any::<bool>(), any::<bool>(), 1..4usize, 1..=(dim / 2).max(1), any::<bool>(), 1..40usize, 0..3usize);
    parts.prop_map(move |(half, whole, axes, pairs, full, table_rows, table_gap)| {
        let axes = if half && axes <= pairs { axes } else { 1 };
        let rotary_dim = if whole { dim / 2 * 2 } else { 2 * pairs };
        let rotary_dim = rotary_dim / (2 * axes) * (2 * axes);
        (0 < rotary_dim && rotary_dim <= dim).then_some(RopeCase {
            half,
            rotary_dim,
            axes,
            full,
            table_rows,
            table_gap,
        })
    })
}

fn case() -> impl Strategy<Value = Case> {
    let head = || prop_oneof![1 => Just(None), 4 => (1..6usize).prop_map(Some)];
    let dims = prop_oneof![1..40usize, Just(64), Just(96), Just(128), (1..=32usize).prop_map(|n| n * 8), 1..=256usize];
    let sizes = (0..3usize, 0..10usize, [head(), head(), head()], dims);
    let norm = prop_oneof![
        Just(Norm::None),
        Just(Norm::L2 { eps: 1e-12 }),
        Just(Norm::Rms { eps: 1e-6 }),
        Just(Norm::L2 { eps: 0.5 }),
    ];
    let positions = prop_oneof![
        Just(PositionCase::From),
        Just(PositionCase::Appended),
        Just(PositionCase::Shared),
        Just(PositionCase::OfBatch)
    ];
    let layout = (
        any::<bool>(),
        prop_oneof![Just([0; 2]), Just([8; 2]), [0..9usize, 0..9usize]],
        prop_oneof![3 => Just([0; 3]), 1 => [0..5usize, 0..5usize, 0..5usize]],
        prop_oneof![3 => Just(Access::Auto), 1 => Just(Access::Narrow)],
    );
    (sizes, norm, positions, layout, any::<[bool; 4]>(), any::<u64>()).prop_flat_map(
        |((batch, rows, heads, dim), norm, positions, (heads_first, gap, shift, access), flags, seed)| {
            let heads = if heads == [None; 3] { [Some(2); 3] } else { heads };
            let [weights, multiplier, append_in_memory, outside] = flags;
            (rope(dim), rows..rows + 20).prop_map(move |(rope, cache_rows)| Case {
                batch,
                rows,
                heads,
                dim,
                cache_rows,
                norm,
                weights,
                multiplier,
                rope,
                positions,
                append_in_memory,
                heads_first,
                outside,
                gap,
                shift,
                access,
                seed,
            })
        },
    )
}

/// The case with its data and layouts.
struct Problem<I> {
    /// All inputs, token by token: the heads of q, of k and of v.
    packed: Vec<I>,
    /// Where each begins in the first token.
    first: [usize; 3],
    input: [Layout<4>; 3],
    out: [Layout<4>; 3],
    weights: [Vec<f32>; 2],
    multiplier: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    table_stride: usize,
    positions: Vec<i32>,
    /// Of the array of positions.
    positions_strides: [i64; 2],
    append_at: Vec<i32>,
    first_position: u64,
}

/// What one element should be, how far it may be from it, and its bits where they are known.
#[derive(Clone, Copy)]
struct Expected {
    value: f64,
    bound: f64,
    exact: Option<f32>,
}

impl Case {
    fn takes_weights(&self) -> bool {
        matches!(self.norm, Norm::Rms { .. }) && self.weights
    }

    fn table_rows(&self) -> usize {
        self.rope.map_or(0, |rope| rope.table_rows)
    }

    fn problem<I: Float>(&self) -> Problem<I> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let heads = self.heads.map(|heads| heads.unwrap_or(0));
        let (head, all) = (self.dim + self.gap[0], heads.iter().sum::<usize>());
        let first = [0, heads[0] * head, (heads[0] + heads[1]) * head];
        let (batch, rows, dim) = (self.batch as u64, self.rows as u64, self.dim as u64);
        let token = (all * head) as i64;
        let input = heads.map(|heads| {
            Layout::strided([batch, rows, heads as u64, dim], [rows as i64 * token, token, head as i64, 1])
        });
        let out_head = (self.dim + self.gap[1]) as i64;
        let out = [0, 1, 2].map(|at: usize| {
            let out_rows = if at == 0 { self.rows } else { self.cache_rows } as i64;
            let heads = heads[at] as i64;
            let [row, head] = match self.heads_first {
                true => [out_head, out_rows * out_head],
                false => [heads * out_head, out_head],
            };
            Layout::strided([batch, out_rows as u64, heads as u64, dim], [out_rows * heads * out_head, row, head, 1])
        });
        let len = self.batch * self.rows * all * head;
        let mut value = || {
            let magnitude = rng.random_range(-3.0..3.0f32).exp2();
            if rng.random_bool(0.5) { magnitude } else { -magnitude }
        };
        let packed: Vec<I> = std::iter::repeat_with(|| I::from_f32(value())).take(len).collect();
        let weights = [0, 1].map(|_| std::iter::repeat_with(&mut value).take(self.dim).collect());
        let multiplier = std::iter::repeat_with(&mut value).take(heads[0]).collect();
        let (mut cos, mut sin, mut table_stride) = (Vec::new(), Vec::new(), 0);
        if let Some(rope) = self.rope {
            let columns = if rope.full { rope.rotary_dim } else { rope.rotary_dim / 2 };
            table_stride = columns + rope.table_gap;
            let angles: Vec<f32> =
                (0..table_stride * rope.table_rows).map(|_| rng.random_range(-3.2..3.2f32)).collect();
            cos = angles.iter().map(|angle| angle.cos()).collect();
            sin = angles.iter().map(|angle| angle.sin()).collect();
        }
        let outside = |rng: &mut StdRng| self.outside && rng.random_bool(0.1);
        let bad = [i32::MIN, -1, i32::MAX, 1000];
        let most = self.cache_rows.saturating_sub(self.rows) as i32;
        // With `Appended` the place is a position too.
        let most = match (self.positions, self.rope) {
            (PositionCase::Appended, Some(rope)) => most.min((rope.table_rows as i32 - self.rows as i32).max(0)),
            _ => most,
        };
        let append_at = (0..self.batch.max(1))
            .map(|_| if outside(&mut rng) { bad[rng.random_range(0..4)] } else { rng.random_range(0..=most) })
            .collect();
        let (batches, positions_strides) = match self.positions {
            PositionCase::OfBatch => (self.batch, [self.rows as i64, 1]),
            _ => (1, [0, 1]),
        };
        let table_rows = self.table_rows().max(1) as i32;
        let positions = (0..batches * self.rows)
            .map(|_| if outside(&mut rng) { bad[rng.random_range(0..4)] } else { rng.random_range(0..table_rows) })
            .collect();
        let first_position = rng.random_range(0..=self.table_rows().saturating_sub(self.rows) as u64);
        Problem {
            packed,
            first,
            input,
            out,
            weights,
            multiplier,
            cos,
            sin,
            table_stride,
            positions,
            positions_strides,
            append_at,
            first_position,
        }
    }

    fn builder<I: Float, O: Float, C: Float>(&self, problem: &Problem<I>) -> PrepareBuilder<I, O, C> {
        let three = |layout: &Layout<4>| {
            let [b, r, h, _] = layout.strides();
            [b, r, h]
        };
        let mut builder = Prepare::builder(self.dim).batch(self.batch).rows(self.rows).norm(self.norm);
        builder = builder.access(self.access).positions_strides(problem.positions_strides);
        if let Some(heads) = self.heads[0] {
            builder = builder.q(heads).q_strides(three(&problem.input[0])).q_out_strides(three(&problem.out[0]));
        }
        if let Some(heads) = self.heads[1] {
            builder = builder.k(heads, self.cache_rows).k_strides(three(&problem.input[1]));
            builder = builder.k_cache_strides(three(&problem.out[1]));
        }
        if let Some(heads) = self.heads[2] {
            builder = builder.v(heads, self.cache_rows).v_strides(three(&problem.input[2]));
            builder = builder.v_cache_strides(three(&problem.out[2]));
        }
        if let Some(case) = self.rope {
            let rope = if case.half { Rope::half(case.table_rows) } else { Rope::interleaved(case.table_rows) };
            let rope = rope.rotary_dim(case.rotary_dim).axes(case.axes).table_stride(problem.table_stride as i64);
            builder = builder.rope(if case.full { rope.full_table() } else { rope });
        }
        builder
    }

    fn append<I>(&self, problem: &Problem<I>, b: usize) -> i64 {
        problem.append_at[if self.append_in_memory { b } else { 0 }].into()
    }

    /// Before clamping.
    fn position<I>(&self, problem: &Problem<I>, b: usize, i: usize) -> i64 {
        match self.positions {
            PositionCase::From => (problem.first_position as usize + i) as i64,
            PositionCase::Appended => self.append(problem, b) + i as i64,
            _ => problem.positions[b * problem.positions_strides[0] as usize + i].into(),
        }
    }

    /// The bits that a kernel sets.
    fn flags<I>(&self, problem: &Problem<I>) -> u32 {
        let mut flags = 0;
        for b in 0..self.batch {
            for i in 0..self.rows {
                let inside = |row: i64, rows: usize| (0..rows as i64).contains(&row);
                if self.heads[1..].iter().any(Option::is_some)
                    && !inside(self.append(problem, b) + i as i64, self.cache_rows)
                {
                    flags |= Prepare::<f32, f32, f32>::APPEND_SKIPPED;
                }
                if self.rope.is_some()
                    && self.heads[..2].iter().any(Option::is_some)
                    && !inside(self.position(problem, b, i), self.table_rows())
                {
                    flags |= Prepare::<f32, f32, f32>::POSITION_CLAMPED;
                }
            }
        }
        flags
    }

    /// The whole buffer of one output; `None` is a gap, or a row that is not written.
    fn oracle<I: Float, O: Float>(&self, problem: &Problem<I>, at: usize) -> Vec<Option<Expected>> {
        let out = &problem.out[at];
        let mut expected = vec![None; out.required_len("").unwrap() as usize];
        for b in 0..self.batch {
            for i in 0..self.rows {
                let row = if at == 0 { i as i64 } else { self.append(problem, b) + i as i64 };
                if at > 0 && !(0..self.cache_rows as i64).contains(&row) {
                    continue;
                }
                for h in 0..self.heads[at].unwrap_or(0) {
                    let from = problem.first[at] + problem.input[at].offset([b as u64, i as u64, h as u64, 0]) as usize;
                    let x: Vec<f32> = problem.packed[from..from + self.dim].iter().map(|x| x.to_f32()).collect();
                    let row_of = self.expected_row(problem, at, h, self.position(problem, b, i), &x);
                    for (d, element) in row_of.into_iter().enumerate() {
                        let to = out.offset([b as u64, row as u64, h as u64, d as u64]) as usize;
                        let bound = element.bound + rounding::<O>(element.value.abs() + element.bound);
                        expected[to] = Some(Expected { bound, ..element });
                    }
                }
            }
        }
        expected
    }

    fn expected_row<I>(&self, problem: &Problem<I>, at: usize, head: usize, position: i64, x: &[f32]) -> Vec<Expected> {
        let norm = if at == 2 { Norm::None } else { self.norm };
        let multiplier = if at == 0 && self.multiplier { problem.multiplier[head] } else { 1.0 };
        let squares: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
        let divisor = match norm {
            Norm::None => 1.0,
            Norm::L2 { eps } => squares.sqrt().max(f64::from(eps)),
            Norm::Rms { eps } => (squares / x.len() as f64 + f64::from(eps)).sqrt(),
        };
        let weight = |d: usize| if at < 2 && self.takes_weights() { problem.weights[at][d] } else { 1.0 };
        let normed: Vec<f64> =
            (0..x.len()).map(|d| f64::from(x[d]) / divisor * f64::from(multiplier) * f64::from(weight(d))).collect();
        // Without a norm every operation is specified.
        let exact: Option<Vec<f32>> = (norm == Norm::None).then(|| x.iter().map(|x| x * multiplier).collect());
        let relative = 2f64.powi(-19);
        let element = |value: f64, magnitude: f64, exact| Expected { value, bound: relative * magnitude, exact };
        let mut row: Vec<Expected> =
            (0..x.len()).map(|d| element(normed[d], normed[d].abs(), exact.as_ref().map(|exact| exact[d]))).collect();
        if let Some(rope) = self.rope.filter(|_| at < 2) {
            let position = position.clamp(0, rope.table_rows as i64 - 1) as usize;
            let block = rope.rotary_dim / rope.axes;
            for a in 0..rope.rotary_dim {
                // From either element of a pair to the other, independently of how the op counts pairs.
                let (partner, is_first, pair) = match rope.half {
                    false => (a ^ 1, a % 2 == 0, a / 2),
                    true => {
                        let in_block = a % block;
                        let is_first = in_block < block / 2;
                        let partner = if is_first { a + block / 2 } else { a - block / 2 };
                        (partner, is_first, a / block * (block / 2) + in_block % (block / 2))
                    }
                };
                let column = position * problem.table_stride + if rope.full { a } else { pair };
                let (cos, sin) = (problem.cos[column], problem.sin[column]);
                let sign = if is_first { -1.0 } else { 1.0 };
                let (own, other) = (normed[a] * f64::from(cos), sign * normed[partner] * f64::from(sin));
                let exact = exact.as_ref().map(|x| x[a].mul_add(cos, sign as f32 * (x[partner] * sin)));
                row[a] = element(own + other, own.abs() + other.abs(), exact);
            }
        }
        row
    }

    /// Runs on a device: what was said, the three outputs, the flags.
    #[allow(clippy::type_complexity)]
    fn run<I: Float, O: Float, C: Float>(
        &self,
        device: &TestDevice,
        plan: &Prepare<I, O, C>,
        problem: &Problem<I>,
    ) -> (Result<()>, Vec<O>, [Vec<C>; 2], u32) {
        let packed = Buffer::of(device, &problem.packed, self.shift[0]);
        let weights = problem.weights.each_ref().map(|weight| Buffer::of(device, weight, self.shift[2]));
        let multiplier = Buffer::of(device, &problem.multiplier, self.shift[2]);
        let [cos, sin] = [&problem.cos, &problem.sin].map(|table| Buffer::of(device, table, self.shift[2]));
        let positions = Buffer::of(device, &problem.positions, self.shift[0]);
        let append_at = Buffer::of(device, &problem.append_at, self.shift[1]);
        let len = |at: usize| problem.out[at].required_len("").unwrap() as usize;
        let mut q_out = Buffer::<O>::poisoned(device, len(0), self.shift[1]);
        let mut caches = [1, 2].map(|at| Buffer::<C>::poisoned(device, len(at), self.shift[1]));
        let mut flags = Buffer::of(device, &[0x100u32], 0);
        let input = |at: usize| {
            self.heads[at].map(|_| {
                let first = problem.first[at].min(problem.packed.len());
                packed.input_from(first, problem.input[at].required_len("").unwrap() as usize)
            })
        };
        let weight = |at: usize| self.heads[at].filter(|_| self.takes_weights()).map(|_| weights[at].input());
        let [k_cache, v_cache] = &mut caches;
        let ran = plan.run(
            &device.stream(),
            PrepareArgs {
                q: input(0),
                k: input(1),
                v: input(2),
                q_out: self.heads[0].map(|_| q_out.output()),
                k_cache: self.heads[1].map(|_| k_cache.output()),
                v_cache: self.heads[2].map(|_| v_cache.output()),
                q_weight: weight(0),
                k_weight: weight(1),
                q_multiplier: self.heads[0].filter(|_| self.multiplier).map(|_| multiplier.input()),
                cos: self.rope.map(|_| cos.input()),
                sin: self.rope.map(|_| sin.input()),
                positions: match self.positions {
                    PositionCase::From => Positions::From(problem.first_position),
                    PositionCase::Appended => Positions::Appended,
                    _ => Positions::Of(positions.input()),
                },
                append_at: match self.append_in_memory {
                    true => AppendAt::Rows(append_at.input()),
                    false => AppendAt::Row(problem.append_at[0] as u64),
                },
                flags: Some(flags.output()),
            },
        );
        (ran, q_out.read(), caches.map(|cache| cache.read()), flags.read()[0])
    }
}

/// Within the bound and, where they are known, with the bits; or a gap and untouched.
fn compare<T: Float>(actual: &[T], expected: &[Option<Expected>]) -> Result<(), String> {
    assert_eq!(actual.len(), expected.len());
    let bytes = |value: &T| bytemuck::bytes_of(value).to_vec();
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let right = match expected {
            None => bytes(actual) == bytes(&poison::<T>()),
            Some(Expected { value, bound, exact }) => {
                let close = (f64::from(actual.to_f32()) - value).abs() <= *bound;
                close && exact.is_none_or(|exact| bytes(actual) == bytes(&T::from_f32(exact)))
            }
        };
        if !right {
            let expected = expected.map(|e| (e.value, e.bound, e.exact));
            return Err(format!("element {i}: {actual:?} instead of {expected:?}"));
        }
    }
    Ok(())
}

/// The rows that are not written hold NaN.
fn bits<T: Float>(out: &[T]) -> &[u8] {
    bytemuck::cast_slice(out)
}

fn is_poison<T: Float>(out: &[T]) -> bool {
    bytemuck::cast_slice::<T, u8>(out).iter().all(|&byte| byte == support::POISON_BYTE)
}

fn check<I: Float, O: Float, C: Float>(device: &TestDevice, case: &Case) {
    let problem = case.problem::<I>();
    let plan = case.builder::<I, O, C>(&problem).build(&DeviceInfo::H200).unwrap();
    let (ran, q_out, [k_cache, v_cache], flags) = case.run(device, &plan, &problem);
    let expected_flags = case.flags(&problem);
    // What is known before a launch is refused on every device; what is read from memory only where the host reads it.
    let known_append = expected_flags & Prepare::<I, O, C>::APPEND_SKIPPED != 0 && !case.append_in_memory;
    let known_position = match case.positions {
        PositionCase::From => true,
        PositionCase::Appended => !case.append_in_memory,
        _ => false,
    };
    let position_outside = case.rope.is_some()
        && (0..case.batch)
            .any(|b| (0..case.rows).any(|i| !(0..case.table_rows() as i64).contains(&case.position(&problem, b, i))));
    if known_append
        || (position_outside && known_position)
        || (device.is_host() && (expected_flags != 0 || position_outside))
    {
        assert!(matches!(ran, Err(Error::RowOutOfRange { .. })), "{ran:?}");
        assert!(is_poison(&q_out) && is_poison(&k_cache) && is_poison(&v_cache), "nothing is written");
        return;
    }
    ran.unwrap();
    assert_eq!(flags, 0x100 | expected_flags, "bits are set, never cleared");
    compare(&q_out, &case.oracle::<I, O>(&problem, 0)).unwrap_or_else(|e| panic!("q_out: {e}"));
    compare(&k_cache, &case.oracle::<I, C>(&problem, 1)).unwrap_or_else(|e| panic!("k_cache: {e}"));
    compare(&v_cache, &case.oracle::<I, C>(&problem, 2)).unwrap_or_else(|e| panic!("v_cache: {e}"));
}

/// One of the 27 combinations of dtypes.
fn check_any(device: &TestDevice, case: &Case, dtypes: usize) {
    struct Check<'a>(&'a TestDevice, &'a Case);
    impl ForThreeFloats for Check<'_> {
        fn call<I: Float, O: Float, C: Float>(self) {
            check::<I, O, C>(self.0, self.1);
        }
    }
    for_three_floats(FLOATS[dtypes / 9], FLOATS[dtypes / 3 % 3], FLOATS[dtypes % 3], Check(device, case));
}

fn owners(schedule: &PrepareSchedule) -> Result<(), String> {
    let [q, k, v] = schedule.heads;
    let dim = schedule.dim;
    let mut owned = [q, k, v].map(|heads| vec![0; (schedule.tokens * heads * dim) as usize]);
    for block in 0..schedule.grid() {
        for thread in 0..schedule.threads() {
            for cell in schedule.cells(block, thread) {
                for d in cell.elements {
                    if d >= dim || cell.token >= schedule.tokens || cell.head >= schedule.heads[cell.tensor] {
                        return Err(format!("element {d} of head {} of token {}", cell.head, cell.token));
                    }
                    let row = cell.token * schedule.heads[cell.tensor] + cell.head;
                    owned[cell.tensor][(row * dim + d) as usize] += 1;
                }
            }
        }
    }
    match owned.iter().flatten().all(|&n| n == 1) {
        true => Ok(()),
        false => Err("an element has not one owner".into()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases(), ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_the_formula(case in case(), dtypes in 0..27usize) {
        check_any(&TestDevice::Host, &case, dtypes);
    }

    /// Every element of the outputs belongs to exactly one thread, and no thread to an element outside.
    #[test]
    fn the_schedule_owns_every_output_once(case in case()) {
        let wide = case.builder::<bf16, f32, f32>(&case.problem()).build(&DeviceInfo::H200).unwrap();
        owners(&wide.schedule()).map_err(TestCaseError::fail)?;
        let wide = case.builder::<f32, f32, f32>(&case.problem()).build(&DeviceInfo::H200).unwrap();
        owners(&wide.schedule()).map_err(TestCaseError::fail)?;
    }
}

#[test]
fn kernels_agree_with_the_formula() {
    for device in TestDevice::kernels() {
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
            cases: support::cases() * 8,
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
        rows: 5,
        heads: [Some(6), Some(2), Some(2)],
        dim: 128,
        cache_rows: 12,
        norm: Norm::L2 { eps: 1e-12 },
        weights: true,
        multiplier: true,
        rope: Some(RopeCase { half: false, rotary_dim: 128, axes: 1, full: false, table_rows: 40, table_gap: 0 }),
        positions: PositionCase::From,
        append_in_memory: false,
        heads_first: false,
        outside: false,
        gap: [0; 2],
        shift: [0; 3],
        access: Access::Auto,
        seed: 5,
    }
}

#[test]
fn every_dtype_on_every_device_at_the_edges() {
    for device in TestDevice::all() {
        for dtypes in 0..27 {
            for dim in [1, 2, 8, 16, 30, 64, 72, 96, 128, 256] {
                let rope = (dim > 1).then_some(RopeCase {
                    half: dtypes % 2 == 0,
                    rotary_dim: dim / 2 * 2,
                    axes: 1,
                    full: dtypes % 4 < 2,
                    table_rows: 40,
                    table_gap: 0,
                });
                check_any(&device, &Case { dim, rope, rows: 2, ..plain() }, dtypes);
            }
        }
        for norm in [Norm::None, Norm::Rms { eps: 1e-6 }, Norm::L2 { eps: 1e-12 }] {
            for (half, rotary_dim, axes, full) in [
                (false, 128, 1, false),
                (false, 64, 1, true),
                (true, 128, 1, false),
                (true, 128, 4, false),
                (true, 96, 3, true),
                (true, 64, 2, false),
                (true, 16, 1, true),
                (true, 2, 1, false),
            ] {
                let rope = Some(RopeCase { half, rotary_dim, axes, full, table_rows: 40, table_gap: 4 });
                check::<bf16, f32, bf16>(&device, &Case { rope, norm, heads_first: true, ..plain() });
                check::<f32, f32, f32>(&device, &Case { rope, norm, ..plain() });
            }
            check::<f16, f16, f16>(&device, &Case { rope: None, norm, ..plain() });
        }
        for heads in [[Some(3), None, None], [None, Some(3), Some(3)], [None, None, Some(1)], [None, Some(5), None]] {
            check::<bf16, bf16, bf16>(&device, &Case { heads, ..plain() });
        }
        for append_in_memory in [false, true] {
            for positions in [PositionCase::From, PositionCase::Appended, PositionCase::Shared, PositionCase::OfBatch] {
                for outside in [false, true] {
                    for seed in 0..4 {
                        check::<bf16, bf16, bf16>(
                            &device,
                            &Case { append_in_memory, positions, outside, seed, rows: 11, ..plain() },
                        );
                    }
                }
            }
        }
    }
}

/// A row of zeroes has no direction: an L2 norm leaves it zero.
#[test]
fn zeroes_stay_zero() {
    for device in TestDevice::all() {
        for norm in [Norm::L2 { eps: 1e-12 }, Norm::Rms { eps: 1e-6 }] {
            let case = Case { norm, ..plain() };
            let mut problem = case.problem::<bf16>();
            problem.packed.fill(bf16::ZERO);
            let plan = case.builder::<bf16, f32, bf16>(&problem).build(&DeviceInfo::H200).unwrap();
            let (ran, q_out, ..) = case.run(&device, &plan, &problem);
            ran.unwrap();
            assert!(q_out.iter().all(|&x| x == 0.0));
        }
    }
}

/// A turn keeps the length: the pairs of the output are as long as those of the normalised input.
#[test]
fn turns_keep_lengths() {
    for device in TestDevice::all() {
        let case = Case { multiplier: false, ..plain() };
        let problem = case.problem::<f32>();
        let plan = case.builder::<f32, f32, f32>(&problem).build(&DeviceInfo::H200).unwrap();
        let (ran, q_out, ..) = case.run(&device, &plan, &problem);
        ran.unwrap();
        for row in q_out.chunks(128) {
            let length: f32 = row.iter().map(|x| x * x).sum();
            assert!((length - 1.0).abs() < 1e-5, "{length}");
        }
    }
}

/// The check must be able to fail: angles of the wrong sign or row, the other pairing, a forgotten norm or multiplier,
/// and a cache that is one row off are caught.
#[test]
fn a_broken_preparation_is_caught() {
    let case = Case { norm: Norm::L2 { eps: 1e-12 }, ..plain() };
    let problem = case.problem::<f32>();
    let broken = |case: &Case, change: &dyn Fn(&mut Problem<f32>)| {
        let mut changed = plain().problem::<f32>();
        change(&mut changed);
        let plan = case.builder::<f32, f32, f32>(&changed).build(&DeviceInfo::H200).unwrap();
        let (ran, q_out, [k_cache, v_cache], _) = case.run(&TestDevice::Host, &plan, &changed);
        ran.unwrap();
        [
            compare(&q_out, &plain().oracle::<f32, f32>(&problem, 0)).is_err(),
            compare(&k_cache, &plain().oracle::<f32, f32>(&problem, 1)).is_err(),
            compare(&v_cache, &plain().oracle::<f32, f32>(&problem, 2)).is_err(),
        ]
    };
    assert_eq!(broken(&case, &|_| {}), [false; 3]);
    assert_eq!(broken(&case, &|p| p.sin.iter_mut().for_each(|x| *x = -*x)), [true, true, false]);
    assert_eq!(broken(&case, &|p| p.first_position ^= 1), [true, true, false]);
    assert_eq!(broken(&case, &|p| p.append_at[0] ^= 1), [false, true, true]);
    let half = Some(RopeCase { half: true, ..case.rope.unwrap() });
    assert_eq!(broken(&Case { rope: half, ..plain() }, &|_| {}), [true, true, false]);
    assert_eq!(broken(&Case { multiplier: false, ..plain() }, &|_| {}), [true, false, false]);
    assert_eq!(
        broken(&Case { norm: Norm::Rms { eps: 1e-6 }, weights: false, ..plain() }, &|_| {}),
        [true, true, false]
    );
    assert_eq!(broken(&Case { norm: Norm::None, ..plain() }, &|_| {}), [true, true, false]);
}

/// A row's result does not depend on what else is in the batch, or on repetition.
#[test]
fn bitwise_repeatable_in_any_batch() {
    for device in TestDevice::all() {
        let case = Case { rows: 40, cache_rows: 50, ..plain() };
        let problem = case.problem::<bf16>();
        let plan = case.builder::<bf16, f32, f16>(&problem).build(&DeviceInfo::H200).unwrap();
        let all = case.run(&device, &plan, &problem);
        for _ in 0..if device.is_emulated() { 2 } else { 20 } {
            let again = case.run(&device, &plan, &problem);
            assert!(
                again.1 == all.1 && again.2.each_ref().map(|out| bits(out)) == all.2.each_ref().map(|out| bits(out))
            );
        }
        // The first batch entry alone: the same bits.
        let one = Case { batch: 1, ..case.clone() };
        let plan = one.builder::<bf16, f32, f16>(&problem).build(&DeviceInfo::H200).unwrap();
        let alone = Problem { packed: problem.packed.clone(), ..one.problem::<bf16>() };
        let alone = Problem {
            multiplier: problem.multiplier.clone(),
            cos: problem.cos.clone(),
            sin: problem.sin.clone(),
            append_at: problem.append_at.clone(),
            first_position: problem.first_position,
            ..alone
        };
        let (ran, q_out, ..) = one.run(&device, &plan, &alone);
        ran.unwrap();
        assert!(q_out == all.1[..40 * 6 * 128]);
    }
}

#[test]
fn bad_plans_are_refused() {
    type Builder = PrepareBuilder<f32, f32, f32>;
    let builder = || -> Builder { Prepare::builder(64).batch(2).rows(10).q(4).k(2, 30).v(2, 30) };
    let build = |b: Builder| b.build(&DeviceInfo::H200).map(|_| ());
    assert_eq!(build(builder()), Ok(()));
    let size = |result: Result<()>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    size(build(Prepare::builder(0).q(1)), "dim");
    size(build(Prepare::builder(257).q(1)), "dim");
    size(build(builder().batch(usize::MAX)), "batch");
    size(build(builder().rows(1 << 31)), "batch * rows");
    size(build(builder().q(1 << 31)), "heads of q");
    size(build(builder().rows(1 << 29).k(4, 1 << 30)), "heads of q");
    size(build(builder().k(2, usize::MAX)), "rows of k_cache");
    size(build(builder().q_strides([i64::MAX, 1, 1])), "q");
    size(build(builder().rope(Rope::half(0))), "table_rows");
    size(build(builder().rope(Rope::half(9).rotary_dim(66))), "rotary_dim");
    size(build(builder().rope(Rope::half(9).rotary_dim(0))), "rotary_dim");
    size(build(builder().rope(Rope::half(9).axes(0))), "axes");
    size(build(builder().rope(Rope::half(9).axes(33))), "axes");
    let unsupported = |result: Result<()>, name: &str| {
        assert!(matches!(result, Err(Error::Unsupported { arg, .. }) if arg == name), "{result:?}");
    };
    unsupported(build(Prepare::builder(64)), "q, k, v");
    unsupported(build(builder().rope(Rope::half(9).rotary_dim(33))), "rotary_dim");
    unsupported(build(builder().rope(Rope::half(9).axes(3))), "rotary_dim");
    unsupported(build(builder().rope(Rope::interleaved(9).axes(2))), "axes");
    for eps in [f32::NAN, -1.0, 2.0, 1e-20] {
        unsupported(build(builder().norm(Norm::L2 { eps })), "eps");
    }
    unsupported(build(builder().norm(Norm::Rms { eps: -1e-6 })), "eps");
    assert_eq!(build(builder().norm(Norm::Rms { eps: 0.0 })), Ok(()));
    unsupported(build(Builder::access(Prepare::builder(30).q(1), Access::Wide)), "dim");
    unsupported(build(builder().rope(Rope::half(9).axes(16)).access(Access::Wide)), "rotary_dim");
    let stride = |result: Result<()>, name: &str, at: usize| {
        assert!(matches!(result, Err(Error::Stride { arg, dim, .. }) if arg == name && dim == at), "{result:?}");
    };
    stride(build(builder().q_strides([2560, -256, 64])), "q", 1);
    stride(build(builder().q_out_strides([2560, 256, 63])), "q_out", 2);
    stride(build(builder().k_cache_strides([0, 128, 64])), "k_cache", 0);
    stride(build(builder().v_cache_strides([3840, 127, 64])), "v_cache", 1);
    stride(build(builder().rope(Rope::half(9)).positions_strides([-1, 1])), "positions", 0);
    stride(build(builder().rope(Rope::half(9).table_stride(-32))), "cos", 0);
    stride(build(builder().access(Access::Wide).v_strides([1290, 129, 64])), "v", 0);
    stride(build(builder().access(Access::Wide).rope(Rope::half(9).table_stride(33))), "cos", 0);
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder().build(&old), Err(Error::UnsupportedDevice { have: Some(_), .. })));
}

#[test]
fn empty_problems_need_nothing() {
    for device in TestDevice::all() {
        for (batch, rows, heads) in [(0, 5, 2), (3, 0, 2), (3, 5, 0)] {
            let plan = Prepare::<f32, f32, f32>::builder(8).batch(batch).rows(rows).q(heads).v(heads, 9);
            let plan = plan.rope(Rope::half(7)).build(&DeviceInfo::A100).unwrap();
            let nothing = Buffer::of(&device, &[0f32; 0], 0);
            let mut outs = [0, 1].map(|_| Buffer::<f32>::poisoned(&device, 0, 0));
            let [q_out, v_cache] = &mut outs;
            plan.run(
                &device.stream(),
                PrepareArgs {
                    q: Some(nothing.input()),
                    v: Some(nothing.input()),
                    cos: Some(nothing.input()),
                    sin: Some(nothing.input()),
                    q_out: Some(q_out.output()),
                    v_cache: Some(v_cache.output()),
                    ..PrepareArgs::default()
                },
            )
            .unwrap();
        }
    }
}

#[test]
fn bad_buffers_are_refused_before_anything_is_written() {
    for device in TestDevice::all() {
        let plan = Prepare::<f32, f32, f32>::builder(4).batch(2).rows(3).q(2).k(1, 5).rope(Rope::half(9));
        let plan = plan.norm(Norm::L2 { eps: 1e-12 }).build(&DeviceInfo::A100).unwrap();
        let ones = Buffer::of(&device, &[1f32; 48], 0);
        let numbers = Buffer::of(&device, &[0i32; 3], 0);
        let mut q_out = Buffer::<f32>::poisoned(&device, 48, 0);
        let mut k_cache = Buffer::<f32>::poisoned(&device, 40, 0);
        let mut flags = Buffer::of(&device, &[0u32], 0);
        /// Changes arguments that are right.
        type Change<'c> = &'c dyn for<'a> Fn(&mut PrepareArgs<'a, f32, f32, f32>, &'a Buffer<f32>, &'a Buffer<i32>);
        let mut run = |q_out_len, k_cache_len, flags_len, change: Change<'_>| {
            let mut args = PrepareArgs {
                q: Some(ones.input_of(48)),
                k: Some(ones.input_of(24)),
                q_out: Some(q_out.output_of(q_out_len)),
                k_cache: Some(k_cache.output_of(k_cache_len)),
                cos: Some(ones.input_of(18)),
                sin: Some(ones.input_of(18)),
                flags: Some(flags.output_of(flags_len)),
                ..PrepareArgs::default()
            };
            change(&mut args, &ones, &numbers);
            plan.run(&device.stream(), args)
        };
        let length = |arg, need, got| Err(Error::Length { arg, need, got });
        assert_eq!(run(47, 40, 1, &|_, _, _| {}), length("q_out", 48, 47));
        assert_eq!(run(48, 39, 1, &|_, _, _| {}), length("k_cache", 40, 39));
        assert_eq!(run(48, 40, 0, &|_, _, _| {}), length("flags", 1, 0));
        assert_eq!(run(48, 40, 1, &|args, ones, _| args.q = Some(ones.input_of(47))), length("q", 48, 47));
        assert_eq!(run(48, 40, 1, &|args, ones, _| args.k = Some(ones.input_of(23))), length("k", 24, 23));
        assert_eq!(run(48, 40, 1, &|args, ones, _| args.cos = Some(ones.input_of(17))), length("cos", 18, 17));
        assert_eq!(run(48, 40, 1, &|args, ones, _| args.sin = Some(ones.input_of(17))), length("sin", 18, 17));
        assert_eq!(
            run(48, 40, 1, &|args, ones, _| args.q_multiplier = Some(ones.input_of(1))),
            length("q_multiplier", 2, 1)
        );
        assert_eq!(
            run(48, 40, 1, &|args, _, numbers| args.positions = Positions::Of(numbers.input_of(2))),
            length("positions", 3, 2)
        );
        assert_eq!(
            run(48, 40, 1, &|args, _, numbers| args.append_at = AppendAt::Rows(numbers.input_of(1))),
            length("append_at", 2, 1)
        );
        let unsupported = |ran: Result<()>, name: &str| {
            assert!(matches!(ran, Err(Error::Unsupported { arg, .. }) if arg == name), "{ran:?}");
        };
        unsupported(run(48, 40, 1, &|args, _, _| args.q = None), "q");
        unsupported(run(48, 40, 1, &|args, _, _| args.k_cache = None), "k_cache");
        unsupported(run(48, 40, 1, &|args, _, _| args.sin = None), "sin");
        unsupported(run(48, 40, 1, &|args, ones, _| args.v = Some(ones.input())), "v");
        unsupported(run(48, 40, 1, &|args, ones, _| args.k_weight = Some(ones.input())), "k_weight");
        let outside = |arg, row, rows| Err(Error::RowOutOfRange { arg, at: 0, row, rows });
        assert_eq!(run(48, 40, 1, &|args, _, _| args.append_at = AppendAt::Row(3)), outside("append_at", 5, 5));
        assert_eq!(
            run(48, 40, 1, &|args, _, _| args.append_at = AppendAt::Row(u64::MAX)),
            outside("append_at", i64::MAX, 5)
        );
        assert_eq!(run(48, 40, 1, &|args, _, _| args.positions = Positions::From(7)), outside("positions", 9, 9));
        assert!(q_out.read().iter().chain(&k_cache.read()).all(|x| x.to_bits() == u32::MAX));
    }
}

/// Misaligned, overlapping, foreign and wrongly ordered buffers: addresses that are compared, never reached.
#[test]
fn bad_addresses_are_refused_before_the_driver_is_asked() {
    let plan = Prepare::<f32, f32, f32>::builder(4).rows(3).q(2).k(1, 5).build(&DeviceInfo::A100).unwrap();
    // SAFETY: every call below is refused before anything is launched.
    let run = |q: u64, k: u64, q_out: u64, k_cache: u64, rows: u64, device: i32| unsafe {
        plan.run(
            &Stream::from_raw(std::ptr::null_mut(), 0),
            PrepareArgs {
                q: Some(In::from_raw(q, 24, 0)),
                k: Some(In::from_raw(k, 12, device)),
                q_out: Some(Out::from_raw(q_out, 24, 0)),
                k_cache: Some(Out::from_raw(k_cache, 20, 0)),
                append_at: AppendAt::Rows(In::from_raw(rows, 1, 0)),
                ..PrepareArgs::default()
            },
        )
    };
    let (q, k, q_out, k_cache, rows) = (0x1000, 0x2000, 0x3000, 0x4000, 0x5000);
    assert_eq!(run(q + 2, k, q_out, k_cache, rows, 0), Err(Error::Alignment { arg: "q", need: 4 }));
    assert_eq!(run(q, k, q_out + 2, k_cache, rows, 0), Err(Error::Alignment { arg: "q_out", need: 4 }));
    assert_eq!(run(q, k, q_out, k_cache, rows + 1, 0), Err(Error::Alignment { arg: "append_at", need: 4 }));
    assert_eq!(run(q, k, q, k_cache, rows, 0), Err(Error::Overlap { written: "q_out", other: "q" }));
    assert_eq!(run(q, k, q_out, k + 44, rows, 0), Err(Error::Overlap { written: "k_cache", other: "k" }));
    assert_eq!(run(q, k, q_out, q_out + 92, rows, 0), Err(Error::Overlap { written: "q_out", other: "k_cache" }));
    assert_eq!(run(q, k, q_out, rows - 76, rows, 0), Err(Error::Overlap { written: "k_cache", other: "append_at" }));
    assert_eq!(
        run(q, k, q_out, k_cache, rows, 1),
        Err(Error::DeviceMismatch { arg: "k", stream: Device::Cuda(0), got: Device::Cuda(1) })
    );
    // Packed inputs may share what they like. Where there is a driver, this would be launched, at addresses of nothing.
    if !nextscale::driver_present() {
        let packed = run(q, q + 32, q_out, k_cache, rows, 0);
        assert!(matches!(packed, Err(Error::NotCompiled | Error::DriverUnavailable { .. })));
    }
}

#[test]
fn wide_access_is_refused_where_addresses_do_not_allow_it() {
    for device in TestDevice::kernels() {
        let plan = Prepare::<bf16, bf16, f32>::builder(16).rows(3).q(2).v(1, 3).rope(Rope::half(9));
        let plan = plan.access(Access::Wide).build(&DeviceInfo::A100).unwrap();
        let run = |shift: [usize; 4]| {
            let (q, v) = (Buffer::of(&device, &[bf16::ONE; 96], shift[0]), Buffer::of(&device, &[bf16::ONE; 48], 0));
            let (cos, sin) = (Buffer::of(&device, &[1f32; 72], shift[1]), Buffer::of(&device, &[0f32; 72], 0));
            let mut q_out = Buffer::<bf16>::poisoned(&device, 96, shift[2]);
            let mut v_cache = Buffer::<f32>::poisoned(&device, 48, shift[3]);
            let ran = plan.run(
                &device.stream(),
                PrepareArgs {
                    q: Some(q.input()),
                    v: Some(v.input()),
                    cos: Some(cos.input()),
                    sin: Some(sin.input()),
                    q_out: Some(q_out.output()),
                    v_cache: Some(v_cache.output()),
                    ..PrepareArgs::default()
                },
            );
            q_out.read();
            v_cache.read();
            ran
        };
        assert_eq!(run([0; 4]), Ok(()));
        assert_eq!(run([4, 0, 0, 0]), Err(Error::Alignment { arg: "q", need: 16 }));
        assert_eq!(run([0, 2, 0, 0]), Err(Error::Alignment { arg: "cos", need: 16 }));
        assert_eq!(run([0, 0, 4, 0]), Err(Error::Alignment { arg: "q_out", need: 16 }));
        assert_eq!(run([0, 0, 0, 1]), Err(Error::Alignment { arg: "v_cache", need: 16 }));
        assert_eq!(run([8, 4, 8, 4]), Ok(()));
    }
}

/// More than 2^31 elements between the first and the last of a buffer.
#[test]
fn offsets_are_64_bit() {
    let far = (1i64 << 31) + 64;
    let plan = Prepare::<bf16, bf16, bf16>::builder(64).batch(2).v(1, 4).v_strides([far, 0, 0]);
    let plan = plan.v_cache_strides([far, 64, 0]).build(&DeviceInfo::H200).unwrap();
    if std::env::var_os("NXS_SMALL").is_some() {
        eprintln!("SKIPPED: NXS_SMALL is set, and this takes 8 GiB");
        return;
    }
    for device in TestDevice::kernels().into_iter().filter(|device| !device.is_emulated()) {
        let mut values = vec![bf16::ZERO; far as usize + 64];
        for d in 0..64 {
            values[d] = bf16::from_f32(d as f32);
            values[far as usize + d] = bf16::from_f32(100.0 + d as f32);
        }
        let v = Buffer::of(&device, &values, 0);
        let mut v_cache = Buffer::<bf16>::poisoned(&device, far as usize + 256, 0);
        plan.run(
            &device.stream(),
            PrepareArgs {
                v: Some(v.input()),
                v_cache: Some(v_cache.output()),
                append_at: AppendAt::Row(3),
                ..PrepareArgs::default()
            },
        )
        .unwrap();
        let out = v_cache.read();
        for d in 0..64 {
            assert_eq!(out[192 + d].to_f32(), d as f32);
            assert_eq!(out[far as usize + 192 + d].to_f32(), 100.0 + d as f32);
        }
    }
}

#[test]
fn plans_are_plain_data() {
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<Prepare<f32, f16, bf16>>();
    let plan = |rows, eps| {
        let builder = Prepare::<f32, f16, bf16>::builder(64).rows(rows).q(2).norm(Norm::L2 { eps });
        builder.build(&DeviceInfo::H200).unwrap()
    };
    assert_eq!(plan(4, 1e-12), plan(4, 1e-12));
    assert_ne!(plan(4, 1e-12), plan(5, 1e-12));
    assert_ne!(plan(4, 1e-12), plan(4, 1e-6));
    assert_eq!(plan(4, 1e-12).workspace_bytes(), 0);
}

#[test]
fn traffic_is_that_of_the_formula() {
    let plan = |rows| {
        let builder = Prepare::<bf16, f32, f16>::builder(64).batch(2).rows(rows).q(8).k(2, 100).v(2, 100);
        builder.build(&DeviceInfo::H200).unwrap().traffic()
    };
    assert_eq!(plan(50), Traffic { read: 100 * 12 * 64 * 2, written: 100 * 64 * (8 * 4 + 4 * 2) });
    assert_eq!(plan(0), Traffic { read: 0, written: 0 });
}

/// What the emulator counts, beside what the plan says.
#[cfg(feature = "emulate")]
mod traffic {
    use super::*;
    use nextscale::emulator::{self, Counters};

    /// Whether the bytes counted are no fewer than a plan's, and no more than these with what the kernel adds: the
    /// cosines and sines for every group of heads, a head again where the last group is not full, and the sectors of a
    /// chunk of more than 16 bytes of output a second time.
    fn compare<I: Float, O: Float>(counted: &Counters, plan: &Prepare<I, O, O>, case: &Case) -> Result<(), String> {
        let (schedule, traffic) = (plan.schedule(), plan.traffic());
        let groups = schedule.heads.map(|heads| heads.div_ceil(schedule.heads_at_once()));
        let filled = groups.iter().sum::<u64>() * schedule.heads_at_once();
        let inputs = schedule.tokens * filled * schedule.dim * size_of::<I>() as u64;
        // Neighbours of a wide chunk have half as many columns as elements: two loads of a pair touch its sectors.
        let columns = case.rope.map_or(0, |rope| rope.rotary_dim as u64);
        let angles = schedule.tokens * (groups[0] + groups[1]) * columns * 2 * size_of::<f32>() as u64;
        let halves = if schedule.vec as usize * size_of::<O>() > 16 { 2 } else { 1 };
        let hold = |what, least: u64, counted: u64, most: u64| match (least..=most).contains(&counted) {
            true => Ok(()),
            false => Err(format!("{what}: {counted} bytes, not {least} to {most}; {schedule:?}, {case:?}")),
        };
        hold("loads", traffic.read, counted.global_load_bytes, inputs + angles)?;
        hold("stores", traffic.written, counted.global_store_bytes, halves * traffic.written)
    }

    fn count<I: Float, O: Float>(case: &Case) -> (Prepare<I, O, O>, Counters) {
        let problem = case.problem::<I>();
        let plan = case.builder::<I, O, O>(&problem).build(&DeviceInfo::H200).unwrap();
        emulator::reset();
        case.run(&TestDevice::Emulated, &plan, &problem).0.unwrap();
        (plan, emulator::counters())
    }

    #[test]
    fn kernels_move_what_the_plan_says() {
        for dim in [64, 128, 256] {
            for half in [false, true] {
                let rope = RopeCase { half, rotary_dim: dim, axes: 1, full: false, table_rows: 40, table_gap: 0 };
                for rope in [None, Some(rope)] {
                    let access = Access::Wide;
                    let case = Case { dim, rope, access, multiplier: false, weights: false, rows: 11, ..plain() };
                    for heads in [[Some(6), Some(2), Some(2)], [Some(3), Some(1), None]] {
                        let case = Case { heads, ..case.clone() };
                        let (plan, counted) = count::<bf16, bf16>(&case);
                        compare(&counted, &plan, &case).unwrap();
                        let (plan, counted) = count::<bf16, f32>(&case);
                        compare(&counted, &plan, &case).unwrap();
                        let (plan, counted) = count::<f32, f16>(&case);
                        compare(&counted, &plan, &case).unwrap();
                    }
                }
            }
        }
    }

    /// The bounds are narrow enough to tell one token more or fewer.
    #[test]
    fn another_plan_is_told_from_what_was_counted() {
        let case = Case { rope: None, multiplier: false, access: Access::Wide, ..plain() };
        let (plan, counted) = count::<bf16, bf16>(&case);
        compare(&counted, &plan, &case).unwrap();
        for rows in [4, 6] {
            let other = Case { rows, ..case.clone() };
            let plan = other.builder::<bf16, bf16, bf16>(&other.problem()).build(&DeviceInfo::H200).unwrap();
            compare(&counted, &plan, &other).unwrap_err();
        }
    }
}

/// A captured graph replays with the places and positions of the moment.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn graphs_replay() {
    let Some(TestDevice::Cuda(stream)) = TestDevice::cuda() else { return };
    let device = TestDevice::Cuda(stream.clone());
    let plan = Prepare::<bf16, bf16, bf16>::builder(64).batch(2).rows(3).q(4).k(2, 20).v(2, 20);
    let plan = plan.norm(Norm::L2 { eps: 1e-12 }).rope(Rope::interleaved(20)).build(&DeviceInfo::H200).unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let mut random = |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let mut tensor = |heads: usize| -> Vec<bf16> { random(6 * heads * 64).into_iter().map(bf16::from_f32).collect() };
    let [q, k, v] = [4, 2, 2].map(|heads| Buffer::of(&device, &tensor(heads), 0));
    let [cos, sin] = [0, 1].map(|_| Buffer::of(&device, &random(20 * 32), 0));
    let mut append_at = Buffer::of(&device, &[0i32, 0], 0);
    let outs = || {
        (
            Buffer::<bf16>::poisoned(&device, 6 * 4 * 64, 0),
            [0, 1].map(|_| Buffer::<bf16>::poisoned(&device, 2 * 20 * 2 * 64, 0)),
        )
    };
    let (mut replayed, mut eager) = (outs(), outs());
    let run = |append_at: &Buffer<i32>, (q_out, caches): &mut (Buffer<bf16>, [Buffer<bf16>; 2])| {
        let [k_cache, v_cache] = caches;
        let args = PrepareArgs {
            q: Some(q.input()),
            k: Some(k.input()),
            v: Some(v.input()),
            cos: Some(cos.input()),
            sin: Some(sin.input()),
            q_out: Some(q_out.output()),
            k_cache: Some(k_cache.output()),
            v_cache: Some(v_cache.output()),
            positions: Positions::Appended,
            append_at: AppendAt::Rows(append_at.input()),
            ..PrepareArgs::default()
        };
        plan.run(&stream, args).unwrap();
    };
    run(&append_at, &mut eager); // loads the code
    let graph = support::capture(&stream, || run(&append_at, &mut replayed));
    for step in 0..5 {
        append_at.write(&[3 * step, 17 - 3 * step]);
        graph.launch().unwrap();
        run(&append_at, &mut eager);
        assert_eq!(replayed.0.read(), eager.0.read());
        for (replayed, eager) in replayed.1.iter().zip(&eager.1) {
            // The eager caches have the row of the first run too.
            let (replayed, eager) = (replayed.read(), eager.read());
            let written = |(replayed, _): &(&bf16, &bf16)| replayed.to_bits() != u16::MAX;
            assert!(replayed.iter().zip(&eager).filter(written).all(|(a, b)| a == b));
        }
    }
}
