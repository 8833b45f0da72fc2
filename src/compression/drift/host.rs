//! The test on the host, in the order of additions of the kernel.

use super::plan::{GROUP, Plan, SLAB, THREADS};
use super::{DriftArgs, Force};
use crate::dtype::Float;

const HERE: &str = "operands are on the stream's device";
const LANES: usize = 32;

/// Adds what `THREADS` threads have: lanes of a warp pairwise, then warps in order.
fn add_block(threads: &[f32; THREADS]) -> f32 {
    let mut sum = 0f32;
    for warp in threads.chunks_exact(LANES) {
        let mut lanes: [f32; LANES] = warp.try_into().expect("a warp");
        for distance in [16, 8, 4, 2, 1] {
            let before = lanes;
            for lane in 0..LANES {
                lanes[lane] = before[lane] + before[lane ^ distance];
            }
        }
        sum += lanes[0];
    }
    sum
}

/// The sums of `|f - p|` and `|p|` over one slab.
fn slab<P: Float>(features: &[P], previous: &[P]) -> [f32; 2] {
    let (mut differences, mut magnitudes) = ([0f32; THREADS], [0f32; THREADS]);
    for (i, (f, p)) in features.iter().zip(previous).enumerate() {
        let (f, p) = (f.to_f32(), p.to_f32());
        let thread = i / GROUP % THREADS;
        differences[thread] += (f - p).abs();
        magnitudes[thread] += p.abs();
    }
    [add_block(&differences), add_block(&magnitudes)]
}

/// The mean change of a chunk relative to the mean magnitude.
fn change<P: Float>(plan: &Plan, features: &[P], previous: &[P]) -> f32 {
    let (mut difference, mut magnitude) = ([0f64; THREADS], [0f64; THREADS]);
    let slabs = features.chunks(SLAB as usize).zip(previous.chunks(SLAB as usize));
    for (i, (features, previous)) in slabs.enumerate() {
        let [d, m] = slab(features, previous);
        difference[i % THREADS] += f64::from(d);
        magnitude[i % THREADS] += f64::from(m);
    }
    let [difference, magnitude] = [difference, magnitude].map(|mut threads| {
        let mut half = THREADS / 2;
        while half > 0 {
            for i in 0..half {
                threads[i] += threads[i + half];
            }
            half /= 2;
        }
        threads[0]
    });
    let elements = plan.elements as f64;
    ((difference / elements) / (magnitude / elements + plan.eps())) as f32
}

fn rescale(plan: &Plan, change: f32) -> f32 {
    if plan.terms == 0 {
        return change;
    }
    let polynomial = plan.polynomial();
    let x = f64::from(change);
    polynomial[..plan.terms].iter().fold(0.0, |sum, &coefficient| f64::mul_add(sum, x, coefficient)) as f32
}

pub(super) fn run<P: Float>(plan: &Plan, args: &mut DriftArgs<'_, P>) {
    let features = args.features.as_host().expect(HERE);
    let force = args.force.as_ref().map(|view| view.as_host().expect(HERE));
    let previous = args.previous.as_host().expect(HERE);
    let accumulated = args.accumulated.as_host().expect(HERE);
    let steps = args.steps.as_host().expect(HERE);
    let decision = args.decision.as_host().expect(HERE);
    let mut changes = args.change.as_mut().map(|view| view.as_host().expect(HERE));
    for chunk in 0..plan.chunks as usize {
        let forced = force.map_or(Force::Test as i32, |force| force[chunk]);
        if forced == Force::Leave as i32 {
            continue;
        }
        let features = &features[chunk * plan.features_stride as usize..][..plan.elements as usize];
        let previous = &mut previous[chunk * plan.previous_stride as usize..][..plan.elements as usize];
        let step = steps[chunk];
        let mut measured = f32::NAN;
        let mut compute = true;
        if forced == Force::Compute as i32 || step < plan.compute_before || step >= plan.compute_from {
            if plan.reset_forced {
                accumulated[chunk] = 0.0;
            }
        } else if step < plan.warmup {
            accumulated[chunk] = 0.0;
        } else {
            measured = change(plan, features, previous);
            let sum = accumulated[chunk] + rescale(plan, measured);
            compute = sum.is_nan() || sum >= plan.threshold();
            accumulated[chunk] = if compute { 0.0 } else { sum };
        }
        decision[chunk] = compute.into();
        if let Some(changes) = &mut changes {
            changes[chunk] = measured;
        }
        steps[chunk] = step.saturating_add(1);
        if plan.keep {
            previous.copy_from_slice(features);
        }
    }
}
