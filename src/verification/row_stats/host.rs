//! The partials on the host.

use super::RowStatsArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::verification::rows::{Partial, Scale, chunks, column, lanes_with_columns};

pub(super) fn run<P: Float>(plan: &Plan, args: &mut RowStatsArgs<'_, P>) {
    const HERE: &str = "operands are on the stream's device";
    let logits = args.logits.as_host().expect(HERE);
    let allow = args.allow.as_ref().map(|view| view.as_host().expect(HERE));
    let temperature = args.temperature.as_ref().map(|view| view.as_host().expect(HERE));
    let partials = args.partials.as_host().expect(HERE);
    let of_row = chunks(plan.vocab) as usize;
    for row in 0..plan.rows as usize {
        let scale = Scale::of(temperature.map_or(1.0, |temperature| temperature[row]));
        for chunk in 0..of_row {
            let logit = |lane, place| {
                let column = column(chunk as u64, lane, place);
                let allowed = |allow: &[u32]| {
                    allow[row * plan.allow_stride as usize + column as usize / 32] >> (column % 32) & 1 == 1
                };
                if column < plan.vocab && allow.is_none_or(allowed) {
                    logits[row * plan.stride as usize + column as usize].to_f32()
                } else {
                    f32::NEG_INFINITY
                }
            };
            let Partial { max, sum } = Partial::of(logit, lanes_with_columns(chunk as u64, plan.vocab), scale.as_ref());
            partials[(row * of_row + chunk) * 2..][..2].copy_from_slice(&[max, sum]);
        }
    }
}
