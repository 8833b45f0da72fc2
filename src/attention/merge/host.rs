//! The formula on the host: the oracle of the tests.

use super::MergeArgs;
use super::plan::{MOST_PARTS, Plan};
use crate::dtype::Float;

/// What the lse say of one row: the weights of the parts, and the sums.
struct Weights {
    /// Of what `out` held before.
    before: f32,
    of_part: [f32; MOST_PARTS as usize],
    total: f32,
    lse: f32,
}

impl Weights {
    fn of(before: f32, lse: impl Iterator<Item = f32> + Clone) -> Self {
        // A NaN is never the maximum; its weight is NaN.
        let top = lse.clone().fold(before, |top, lse| if lse > top { lse } else { top });
        let weight = |lse: f32| if lse == f32::NEG_INFINITY { 0.0 } else { (lse - top).exp() };
        let mut weights = Weights { before: weight(before), of_part: [0.0; MOST_PARTS as usize], total: 0.0, lse: 0.0 };
        weights.total = weights.before;
        for (to, lse) in weights.of_part.iter_mut().zip(lse) {
            *to = weight(lse);
            weights.total += *to;
        }
        weights.lse = if weights.total == 0.0 { f32::NEG_INFINITY } else { top + weights.total.ln() };
        weights
    }
}

pub(super) fn run<P: Float, O: Float>(plan: &Plan, args: &mut MergeArgs<'_, P, O>) {
    const HERE: &str = "operands are on the stream's device";
    let parts = args.parts.as_host().expect(HERE);
    let lse = args.lse.as_host().expect(HERE);
    let out = args.out.as_host().expect(HERE);
    let mut out_lse = args.out_lse.as_mut().map(|view| view.as_host().expect(HERE));
    let [of_parts, batch, rows, heads, dim] = plan.parts.shape();
    if plan.out_len == 0 {
        return;
    }
    let items = (0..batch).flat_map(|b| (0..rows).flat_map(move |r| (0..heads).map(move |h| (b, r, h))));
    for (b, r, h) in items {
        let lse_at = |i| plan.lse.offset([i, b, h, r]) as usize;
        let to_lse = plan.out_lse.offset([b, h, r]) as usize;
        let before = match &out_lse {
            Some(out_lse) if plan.accumulate => out_lse[to_lse],
            _ => f32::NEG_INFINITY,
        };
        let weights = Weights::of(before, (0..of_parts).map(|i| lse[lse_at(i)]));
        for d in 0..dim {
            let to = plan.out.offset([b, r, h, d]) as usize;
            let mut sum = 0f32;
            if plan.accumulate && before != f32::NEG_INFINITY {
                sum += weights.before * out[to].to_f32();
            }
            for i in 0..of_parts {
                if lse[lse_at(i)] != f32::NEG_INFINITY {
                    sum += weights.of_part[i as usize] * parts[plan.parts.offset([i, b, r, h, d]) as usize].to_f32();
                }
            }
            out[to] = O::from_f32(if weights.total == 0.0 { 0.0 } else { sum / weights.total });
        }
        if let Some(out_lse) = &mut out_lse {
            out_lse[to_lse] = weights.lse;
        }
    }
}
