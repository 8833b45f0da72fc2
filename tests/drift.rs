//! The drift test: against an f64 oracle, and the kernel against the host bit for bit.

#![cfg(feature = "compression")]

mod support;

use nextscale::compression::{Drift, DriftArgs, Force, Traffic};
use nextscale::dtype::Float;
use nextscale::{Access, DType, Device, DeviceInfo, Error, In, Out, Stream, bf16, f16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, FLOATS, ForFloats, TestDevice, for_floats};

#[derive(Debug, Clone)]
struct Case {
    chunks: usize,
    elements: usize,
    gaps: [usize; 2],
    shifts: [usize; 2],
    threshold: f32,
    eps: f64,
    polynomial: Vec<f64>,
    warmup: usize,
    before: usize,
    from: usize,
    reset: bool,
    keep: bool,
    forced: bool,
    /// Of 0 to 4 steps, a chunk's features are NaN.
    nan: bool,
    seed: u64,
}

const STEPS: usize = 6;
/// FLUX's coefficients.
const FLUX: [f64; 5] = [498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861];

fn case() -> impl Strategy<Value = Case> {
    let elements =
        prop_oneof![1..64usize, 2000..2100usize, 16380..16390usize, Just(16384usize), Just(32768), 32760..40000usize];
    (
        (1..5usize, elements, any::<[bool; 4]>(), [0..9usize, 0..9usize], [0..9usize, 0..9usize]),
        (0.005..0.2f32, any::<bool>(), 0..3usize, 0..4usize, 0..3usize, 3..8usize),
        any::<[bool; 4]>(),
        any::<u64>(),
    )
        .prop_map(|(shape, settings, [reset, keep, forced, nan], seed)| {
            let (chunks, elements, [gap, shift, ..], gaps, shifts) = shape;
            let (threshold, eps, polynomial, warmup, before, from) = settings;
            Case {
                chunks,
                elements,
                gaps: if gap { gaps } else { [0; 2] },
                shifts: if shift { shifts } else { [0; 2] },
                threshold,
                eps: if eps { 1e-8 } else { 0.0 },
                polynomial: match polynomial {
                    0 => Vec::new(),
                    1 => FLUX.to_vec(),
                    _ => vec![0.5, 0.001],
                },
                warmup,
                before,
                from,
                reset,
                keep,
                forced,
                nan: nan && seed.is_multiple_of(4),
                seed,
            }
        })
}

/// What a run of steps left behind.
#[derive(Debug, PartialEq)]
struct Trace {
    decisions: Vec<Vec<i32>>,
    /// Bits.
    changes: Vec<Vec<u32>>,
    accumulated: Vec<Vec<u32>>,
    steps: Vec<i32>,
    previous: Vec<Vec<u32>>,
}

struct Data<T> {
    /// `[steps][chunks * stride]`
    features: Vec<Vec<T>>,
    previous: Vec<T>,
    force: Vec<Vec<i32>>,
}

impl Case {
    fn strides(&self) -> [usize; 2] {
        self.gaps.map(|gap| self.elements + gap)
    }

    fn data<T: Float>(&self) -> Data<T> {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let [stride, previous_stride] = self.strides();
        let len = |stride: usize| (self.chunks - 1) * stride + self.elements;
        let base: Vec<f32> = (0..len(stride)).map(|_| rng.random_range(-2.0..2.0f32)).collect();
        let mut features = Vec::new();
        for step in 0..STEPS {
            let size = rng.random_range(0.0..0.1f32);
            let mut of_step: Vec<T> =
                base.iter().map(|x| T::from_f32(x + size * rng.random_range(-1.0..1.0f32))).collect();
            if self.nan && step == 3 {
                of_step[self.elements / 2] = T::from_f32(f32::NAN);
            }
            features.push(of_step);
        }
        let previous = (0..len(previous_stride)).map(|_| T::from_f32(rng.random_range(-2.0..2.0))).collect();
        let force = (0..STEPS)
            .map(|_| (0..self.chunks).map(|_| if rng.random_bool(0.3) { rng.random_range(1..3) } else { 0 }).collect())
            .collect();
        Data { features, previous, force }
    }

    fn plan<T: Float>(&self, access: Access) -> Drift<T> {
        let [features, previous] = self.strides();
        Drift::<T>::builder(self.chunks, self.elements)
            .features_stride(features as i64)
            .previous_stride(previous as i64)
            .threshold(self.threshold)
            .eps(self.eps)
            .polynomial(&self.polynomial)
            .warmup(self.warmup)
            .compute_before(self.before)
            .compute_from(self.from)
            .reset_forced(self.reset)
            .keep(self.keep)
            .access(access)
            .build(&DeviceInfo::H200)
            .unwrap()
    }

    fn run<T: Float>(&self, device: &TestDevice, data: &Data<T>, access: Access) -> Trace {
        let plan = self.plan::<T>(access);
        let mut previous = Buffer::of(device, &data.previous, self.shifts[1]);
        let mut accumulated = Buffer::of(device, &vec![0f32; self.chunks], 1);
        let mut steps = Buffer::of(device, &vec![0i32; self.chunks], 1);
        let mut decision = Buffer::<i32>::poisoned(device, self.chunks, 1);
        let mut change = Buffer::<f32>::poisoned(device, self.chunks, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(device, &vec![0u32; self.chunks], 1);
        let mut trace = Trace {
            decisions: Vec::new(),
            changes: Vec::new(),
            accumulated: Vec::new(),
            steps: Vec::new(),
            previous: Vec::new(),
        };
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        for step in 0..STEPS {
            let features = Buffer::of(device, &data.features[step], self.shifts[0]);
            let force = Buffer::of(device, &data.force[step], 1);
            plan.run(
                &device.stream(),
                DriftArgs {
                    features: features.input(),
                    previous: previous.output(),
                    accumulated: accumulated.output(),
                    steps: steps.output(),
                    force: self.forced.then(|| force.input()),
                    decision: decision.output(),
                    change: Some(change.output()),
                    workspace: workspace.output(),
                    counters: counters.output(),
                },
            )
            .unwrap();
            workspace.read();
            assert!(counters.read().iter().all(|&count| count == 0));
            trace.decisions.push(decision.read());
            trace.changes.push(bits(change.read().iter().map(|x| if x.is_nan() { f32::NAN } else { *x }).collect()));
            trace.accumulated.push(bits(accumulated.read()));
            trace.previous.push(bits(previous.read().into_iter().map(Float::to_f32).collect()));
        }
        trace.steps = steps.read();
        trace
    }
}

/// The formula in f64, step after step, with the state of the run so that errors do not add up.
fn check_oracle<T: Float>(case: &Case) {
    let data = case.data::<T>();
    let trace = case.run::<T>(&TestDevice::Host, &data, Access::Auto);
    let [stride, previous_stride] = case.strides();
    let mut previous: Vec<T> = data.previous.clone();
    let mut steps = vec![0i32; case.chunks];
    let mut accumulated = vec![0f64; case.chunks];
    for step in 0..STEPS {
        for chunk in 0..case.chunks {
            let forced = if case.forced { data.force[step][chunk] } else { 0 };
            let got = (trace.decisions[step][chunk], f32::from_bits(trace.changes[step][chunk]));
            if forced == 2 {
                if step > 0 {
                    assert_eq!(trace.decisions[step][chunk], trace.decisions[step - 1][chunk]);
                }
                assert_eq!(f64::from(f32::from_bits(trace.accumulated[step][chunk])), accumulated[chunk]);
                continue;
            }
            let features = &data.features[step][chunk * stride..][..case.elements];
            let before = &mut previous[chunk * previous_stride..][..case.elements];
            let at = steps[chunk] as usize;
            if forced == 1 || at < case.before || at >= case.from {
                assert_eq!(got.0, 1);
                assert!(got.1.is_nan());
                accumulated[chunk] = if case.reset { 0.0 } else { accumulated[chunk] };
            } else if at < case.warmup {
                assert_eq!(got.0, 1);
                assert!(got.1.is_nan());
                accumulated[chunk] = 0.0;
            } else {
                let pairs =
                    || features.iter().zip(&*before).map(|(f, p)| (f64::from(f.to_f32()), f64::from(p.to_f32())));
                let n = case.elements as f64;
                let change = (pairs().map(|(f, p)| (f - p).abs()).sum::<f64>() / n)
                    / (pairs().map(|(_, p)| p.abs()).sum::<f64>() / n + case.eps);
                assert!(change.is_nan() == got.1.is_nan());
                assert!(change.is_nan() || (f64::from(got.1) - change).abs() <= change * 2e-6, "{got:?} {change}");
                let degree = case.polynomial.len();
                let terms = case.polynomial.iter().enumerate();
                let power: f64 = terms.clone().map(|(i, c)| c * change.powi((degree - 1 - i) as i32)).sum();
                let rescaled = if degree == 0 { change } else { power };
                let weight: f64 =
                    terms.map(|(i, c)| c.abs() * change.powi((degree - 1 - i) as i32) * (degree - i) as f64).sum();
                let sum = accumulated[chunk] + rescaled;
                let error = if change.is_nan() { 0.0 } else { (change.abs() + weight) * 3e-6 + 1e-7 };
                let threshold = f64::from(case.threshold);
                if (sum - threshold).abs() > error || sum.is_nan() {
                    assert_eq!(got.0, i32::from(sum.is_nan() || sum >= threshold), "{sum} {threshold}");
                }
                accumulated[chunk] = if got.0 == 1 { 0.0 } else { sum };
                let have = f64::from(f32::from_bits(trace.accumulated[step][chunk]));
                assert!((have - accumulated[chunk]).abs() <= error, "{have} {}", accumulated[chunk]);
            }
            // What follows starts from what the run has.
            accumulated[chunk] = f32::from_bits(trace.accumulated[step][chunk]).into();
            steps[chunk] += 1;
            if case.keep {
                before.copy_from_slice(features);
            }
        }
        let kept: Vec<u32> = previous.iter().map(|x| x.to_f32().to_bits()).collect();
        assert_eq!(kept, trace.previous[step]);
    }
    assert_eq!(steps, trace.steps);
}

struct Oracle<'a>(&'a Case);
impl ForFloats for Oracle<'_> {
    fn call<E: Float, O: Float>(self) {
        check_oracle::<E>(self.0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases(), ..ProptestConfig::default() })]

    #[test]
    fn host_agrees_with_the_formula(case in case(), dtype in 0..3usize) {
        for_floats(FLOATS[dtype], DType::F32, Oracle(&case));
    }
}

struct SameBits<'a>(&'a TestDevice, &'a Case);
impl ForFloats for SameBits<'_> {
    fn call<T: Float, O: Float>(self) {
        let SameBits(device, case) = self;
        let data = case.data::<T>();
        let host = case.run::<T>(&TestDevice::Host, &data, Access::Auto);
        assert_eq!(case.run::<T>(device, &data, Access::Auto), host);
        assert_eq!(case.run::<T>(device, &data, Access::Narrow), host);
    }
}

#[test]
fn kernels_agree_with_the_host_bit_for_bit() {
    for device in TestDevice::kernels() {
        let cases = if device.is_emulated() { support::cases().min(24) } else { support::cases() };
        let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
        proptest::test_runner::TestRunner::new(config)
            .run(&(case(), 0..3usize), |(case, dtype)| {
                for_floats(FLOATS[dtype], DType::F32, SameBits(&device, &case));
                Ok(())
            })
            .unwrap();
    }
}

fn plain() -> Case {
    Case {
        chunks: 2,
        elements: 20000,
        gaps: [0; 2],
        shifts: [0; 2],
        threshold: 0.1,
        eps: 1e-8,
        polynomial: Vec::new(),
        warmup: 0,
        before: 1,
        from: STEPS - 1,
        reset: false,
        keep: true,
        forced: false,
        nan: false,
        seed: 5,
    }
}

#[test]
fn every_dtype_at_the_edges() {
    for device in TestDevice::kernels() {
        for elements in [1, 7, 8, 9, 2047, 2048, 2049, 16383, 16384, 16385] {
            for dtype in FLOATS {
                let case = Case { elements, seed: elements as u64, ..plain() };
                for_floats(dtype, DType::F32, SameBits(&device, &case));
            }
        }
    }
}

/// A chunk's numbers are its own.
#[test]
fn independent_of_other_chunks() {
    for device in TestDevice::all() {
        let case = plain();
        let data = case.data::<bf16>();
        let both = case.run::<bf16>(&device, &data, Access::Auto);
        let alone = Case { chunks: 1, shifts: [3, 5], ..case.clone() };
        let second = |all: &Vec<bf16>| all[case.elements..].to_vec();
        let data = Data {
            features: data.features.iter().map(second).collect(),
            previous: second(&data.previous),
            force: vec![vec![0]; STEPS],
        };
        let alone = alone.run::<bf16>(&device, &data, Access::Auto);
        for step in 0..STEPS {
            assert_eq!(alone.decisions[step][0], both.decisions[step][1]);
            assert_eq!(alone.changes[step][0], both.changes[step][1]);
            assert_eq!(alone.accumulated[step][0], both.accumulated[step][1]);
        }
    }
}

/// The rules, with numbers that are exact.
#[test]
fn the_order_of_the_rules() {
    for device in TestDevice::all() {
        // Every step changes ones by an eighth: the sum is exact.
        let run = |builder: nextscale::compression::DriftBuilder<f32>, force: [i32; 7]| {
            let plan = builder.eps(0.0).build(&DeviceInfo::H200).unwrap();
            let mut previous = Buffer::of(&device, &[f32::NAN; 64], 0);
            let mut accumulated = Buffer::of(&device, &[0f32], 0);
            let mut steps = Buffer::of(&device, &[0i32], 0);
            let mut decision = Buffer::<i32>::poisoned(&device, 1, 0);
            let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
            let mut counters = Buffer::of(&device, &[0u32], 0);
            let mut trace = String::new();
            for force in force {
                let features = Buffer::of(&device, &[1.125f32; 64], 0);
                let force = Buffer::of(&device, &[force], 0);
                plan.run(
                    &device.stream(),
                    DriftArgs {
                        features: features.input(),
                        previous: previous.output(),
                        accumulated: accumulated.output(),
                        steps: steps.output(),
                        force: Some(force.input()),
                        decision: decision.output(),
                        change: None,
                        workspace: workspace.output(),
                        counters: counters.output(),
                    },
                )
                .unwrap();
                previous.write(&[1.0; 64]);
                trace += &format!("{}:{} ", decision.read()[0], accumulated.read()[0] * 8.0);
            }
            trace
        };
        let builder = || Drift::<f32>::builder(1, 64).threshold(0.375);
        let test = [0; 7];
        // Strictly less: the third change reaches the threshold.
        assert_eq!(run(builder(), test), "1:0 0:1 0:2 1:0 0:1 0:2 1:0 ");
        assert_eq!(run(builder().warmup(3), test), "1:0 1:0 1:0 0:1 0:2 1:0 0:1 ");
        assert_eq!(run(builder().compute_from(3), test), "1:0 0:1 0:2 1:2 1:2 1:2 1:2 ");
        assert_eq!(run(builder().compute_from(3).reset_forced(true), test), "1:0 0:1 0:2 1:0 1:0 1:0 1:0 ");
        assert_eq!(run(builder(), [0, 0, 1, 0, 0, 0, 0]), "1:0 0:1 1:1 0:2 1:0 0:1 0:2 ");
        assert_eq!(run(builder(), [0, 0, 2, 2, 0, 0, 0]), "1:0 0:1 0:1 0:1 0:2 1:0 0:1 ");
        assert_eq!(run(builder().compute_before(2), test), "1:0 1:0 0:1 0:2 1:0 0:1 0:2 ");
        assert_eq!(run(builder().polynomial(&[0.5, 0.0]), test), "1:0 0:0.5 0:1 0:1.5 0:2 0:2.5 1:0 ");
        // A change of NaN, of zeros against zeros.
        assert_eq!(
            run(builder().polynomial(&[f64::MIN_POSITIVE]).threshold(0.0), test),
            "1:0 1:0 1:0 1:0 1:0 1:0 1:0 "
        );
        assert_eq!(Force::Leave as i32, 2);
    }
}

#[test]
fn bad_plans_and_buffers_are_refused() {
    let build = |builder: nextscale::compression::DriftBuilder<bf16>| builder.build(&DeviceInfo::H200).map(|_| ());
    let builder = || Drift::<bf16>::builder(2, 8);
    let size = |built: Result<(), Error>, name: &str| {
        assert!(matches!(built, Err(Error::Size { arg, .. }) if arg == name), "{built:?}");
    };
    size(build(Drift::builder(65536, 8)), "chunks");
    size(build(Drift::builder(1, 0)), "elements");
    size(build(Drift::builder(1, 1 << 46)), "elements");
    size(build(builder().polynomial(&[0.0; 9])), "polynomial");
    size(build(builder().warmup(1 << 31)), "warmup");
    size(build(builder().compute_before(1 << 31)), "compute_before");
    size(build(builder().compute_from(1 << 31)), "compute_from");
    let unsupported = |built: Result<(), Error>, name: &str| {
        assert!(matches!(built, Err(Error::Unsupported { arg, .. }) if arg == name), "{built:?}");
    };
    unsupported(build(builder().threshold(f32::NAN)), "threshold");
    unsupported(build(builder().eps(-1.0)), "eps");
    unsupported(build(builder().polynomial(&[f64::INFINITY])), "polynomial");
    let stride = |built: Result<(), Error>, name: &str, stride: i64| {
        assert!(matches!(built, Err(Error::Stride { arg, got, .. }) if arg == name && got == stride), "{built:?}");
    };
    stride(build(builder().previous_stride(7)), "previous", 7);
    stride(build(builder().features_stride(-1)), "features", -1);
    stride(build(builder().features_stride(12).access(Access::Wide)), "features", 12);
    assert_eq!(build(builder().features_stride(0)), Ok(()));
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(builder().build(&old), Err(Error::UnsupportedDevice { .. })));

    let plan = builder().build(&DeviceInfo::H200).unwrap();
    let run = |lens: [usize; 8], at: u64, device: i32| {
        let [features, previous, accumulated, steps, force, decision, workspace, counters] = lens;
        // SAFETY: every call is refused before anything is launched.
        unsafe {
            let args = DriftArgs {
                features: In::<bf16>::from_raw(at, features, device),
                previous: Out::from_raw(0x2000, previous, 0),
                accumulated: Out::from_raw(0x3000, accumulated, 0),
                steps: Out::from_raw(0x4000, steps, 0),
                force: Some(In::from_raw(0x5000, force, 0)),
                decision: Out::from_raw(0x6000, decision, 0),
                change: None,
                workspace: Out::from_raw(0x7000, workspace, 0),
                counters: Out::from_raw(0x8000, counters, 0),
            };
            plan.run(&Stream::from_raw(std::ptr::null_mut(), 0), args)
        }
    };
    let fits = [16, 16, 2, 2, 2, 2, 16, 2];
    for (i, arg) in ["features", "previous", "accumulated", "steps", "force", "decision", "", "counters"]
        .into_iter()
        .enumerate()
        .filter(|(_, arg)| !arg.is_empty())
    {
        let mut lens = fits;
        lens[i] -= 1;
        assert_eq!(run(lens, 0x1000, 0), Err(Error::Length { arg, need: fits[i] as u64, got: lens[i] as u64 }));
    }
    let mut lens = fits;
    lens[6] = 15;
    assert_eq!(run(lens, 0x1000, 0), Err(Error::Workspace { need: 16, got: 15 }));
    assert_eq!(run(fits, 0x1001, 0), Err(Error::Alignment { arg: "features", need: 2 }));
    assert_eq!(run(fits, 0x2010, 0), Err(Error::Overlap { written: "previous", other: "features" }));
    let other = Error::DeviceMismatch { arg: "features", stream: Device::Cuda(0), got: Device::Cuda(1) };
    assert_eq!(run(fits, 0x1000, 1), Err(other));
}

#[test]
fn plans_are_plain_data() {
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<Drift<f16>>();
    let plan = |threshold| Drift::<f16>::builder(2, 8).threshold(threshold).build(&DeviceInfo::H200).unwrap();
    assert_eq!(plan(0.1), plan(0.1));
    assert_ne!(plan(0.1), plan(0.2));
    let of = |keep| Drift::<bf16>::builder(3, 100).keep(keep).build(&DeviceInfo::H200).unwrap().traffic();
    assert_eq!(of(false), Traffic { read: 3 * 100 * 2 * 2, written: 0 });
    assert_eq!(of(true), Traffic { read: 3 * 100 * 2 * 2, written: 600 });
}

/// What the emulator counts, beside what the plan says.
#[cfg(feature = "emulate")]
#[test]
fn kernels_move_what_the_plan_says() {
    use nextscale::emulator;
    for keep in [false, true] {
        let case = Case { keep, elements: 32768, before: 0, from: STEPS, chunks: 3, ..plain() };
        let data = case.data::<bf16>();
        emulator::reset();
        case.run::<bf16>(&TestDevice::Emulated, &data, Access::Wide);
        let counted = emulator::counters();
        let traffic = case.plan::<bf16>(Access::Wide).traffic();
        let steps = STEPS as u64;
        // Sectors of state and partials besides.
        let (loads, stores) = (counted.global_load_bytes, counted.global_store_bytes);
        let more = 3 * steps * 5000;
        assert!((traffic.read * steps..traffic.read * steps + more).contains(&loads), "{loads} {traffic:?}");
        assert!((traffic.written * steps..traffic.written * steps + more).contains(&stores), "{stores} {traffic:?}");
    }
}

/// More than 2^31 elements between two chunks.
#[test]
fn offsets_are_64_bit() {
    if std::env::var_os("NXS_SMALL").is_some() {
        eprintln!("SKIPPED: NXS_SMALL is set, and this takes 9 GiB");
        return;
    }
    for device in TestDevice::kernels().into_iter().filter(|device| !device.is_emulated()) {
        let far = (1i64 << 31) + 64;
        let plan = Drift::<bf16>::builder(2, 8).features_stride(far).previous_stride(far).compute_before(0).keep(true);
        let plan = plan.threshold(0.6).build(&DeviceInfo::H200).unwrap();
        let mut features = vec![bf16::ONE; far as usize + 8];
        features[far as usize..].fill(bf16::from_f32(2.0));
        let features = Buffer::of(&device, &features, 0);
        let mut previous = Buffer::of(&device, &vec![bf16::ONE; far as usize + 8], 0);
        let mut accumulated = Buffer::of(&device, &[0f32; 2], 0);
        let mut steps = Buffer::of(&device, &[0i32; 2], 0);
        let mut decision = Buffer::<i32>::poisoned(&device, 2, 0);
        let mut change = Buffer::<f32>::poisoned(&device, 2, 0);
        let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(&device, &[0u32; 2], 0);
        plan.run(
            &device.stream(),
            DriftArgs {
                features: features.input(),
                previous: previous.output(),
                accumulated: accumulated.output(),
                steps: steps.output(),
                force: None,
                decision: decision.output(),
                change: Some(change.output()),
                workspace: workspace.output(),
                counters: counters.output(),
            },
        )
        .unwrap();
        assert_eq!((decision.read(), change.read()), (vec![0, 1], vec![0.0, 1.0]));
        assert_eq!(previous.read()[far as usize], bf16::from_f32(2.0));
    }
}

/// A captured graph replays with the features and the state of the moment.
#[cfg(feature = "cudarc-0_19")]
#[test]
fn graphs_replay() {
    let Some(TestDevice::Cuda(stream)) = TestDevice::cuda() else { return };
    let device = TestDevice::Cuda(stream.clone());
    let case = plain();
    let data = case.data::<bf16>();
    let plan = case.plan::<bf16>(Access::Auto);
    let eager = case.run::<bf16>(&device, &data, Access::Auto);
    let mut features = Buffer::of(&device, &data.features[0], 0);
    let mut previous = Buffer::of(&device, &data.previous, 0);
    let mut accumulated = Buffer::of(&device, &[0f32; 2], 0);
    let mut steps = Buffer::of(&device, &[0i32; 2], 0);
    let mut decision = Buffer::<i32>::poisoned(&device, 2, 0);
    let mut workspace = Buffer::<u8>::poisoned(&device, plan.workspace_bytes() as usize, 0);
    let mut counters = Buffer::of(&device, &[0u32; 2], 0);
    let graph = support::capture(&stream, || {
        let args = DriftArgs {
            features: features.input(),
            previous: previous.output(),
            accumulated: accumulated.output(),
            steps: steps.output(),
            force: None,
            decision: decision.output(),
            change: None,
            workspace: workspace.output(),
            counters: counters.output(),
        };
        plan.run(&stream, args).unwrap();
    });
    for step in 0..STEPS {
        features.write(&data.features[step]);
        graph.launch().unwrap();
        assert_eq!(decision.read(), eager.decisions[step]);
    }
}
