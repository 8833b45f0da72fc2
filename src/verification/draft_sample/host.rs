//! The drafter's sampler on the host.

use super::DraftSampleArgs;
use super::plan::Plan;
use crate::dtype::Float;
use crate::verification::rows::{
    Domain, Partial, Scale, Shape, Summary, Truncation, chunks, column, key_bits, lanes_with_columns, uniforms,
};
use crate::verification::status;

pub(super) fn run<Q: Float>(plan: &Plan, args: &mut DraftSampleArgs<'_, Q>) {
    const HERE: &str = "operands are on the stream's device";
    let logits = args.logits.as_host().expect(HERE);
    let map = args.draft_to_target.as_ref().map(|view| view.as_host().expect(HERE));
    let given = args.uniforms.as_ref().map(|view| view.as_host().expect(HERE));
    let floats = |view: &Option<crate::view::In<'_, f32>>, at: usize, or: f32| {
        view.as_ref().map_or(or, |view| view.as_host().expect(HERE)[at])
    };
    let words = |view: &Option<crate::view::In<'_, i64>>, at: usize| {
        view.as_ref().map_or(0, |view| view.as_host().expect(HERE)[at] as u64)
    };
    let tokens = args.tokens.as_host().expect(HERE);
    let statuses = args.status.as_host().expect(HERE);
    let mut stats = args.stats.as_mut().map(|view| view.as_host().expect(HERE));
    let mut log_probs = args.log_probs.as_mut().map(|view| view.as_host().expect(HERE));
    let workspace = args.workspace.as_host().expect(HERE);
    let bytes = chunks(plan.vocab) as usize * 8;
    let partials: &mut [Partial] = bytemuck::cast_slice_mut(&mut workspace[..bytes]);

    for row in 0..plan.rows as usize {
        let scale = Scale::of(floats(&args.temperature, row, 1.0));
        let truncation = Truncation {
            top_k: args.top_k.as_ref().map_or(0, |view| view.as_host().expect(HERE)[row].max(0) as u32),
            top_p: floats(&args.top_p, row, 1.0),
            min_p: floats(&args.min_p, row, 0.0),
        };
        let logit = |column: u64| {
            if column < plan.vocab {
                logits[row * plan.stride as usize + column as usize].to_f32()
            } else {
                f32::NEG_INFINITY
            }
        };
        for (chunk, partial) in partials.iter_mut().enumerate() {
            let filled = lanes_with_columns(chunk as u64, plan.vocab);
            *partial = Partial::of(|lane, place| logit(column(chunk as u64, lane, place)), filled, scale.as_ref());
        }
        let mut summary = Summary::of(partials, scale.as_ref());
        truncation.apply(&mut summary, partials, key_bits(Q::DTYPE), plan.vocab, logit);
        let draws = match given {
            Some(given) => given[row * 4..][..4].try_into().expect("four"),
            None => {
                let position = words(&args.positions, row).wrapping_add(plan.row_in_step.into());
                uniforms(words(&args.seeds, row), position, Domain::Draft, plan.row_in_step, 0)
            }
        };
        let [a, b, c, _] = draws;
        let drawn = summary.sample(partials, [a, b, c], plan.vocab, logit);
        tokens[row] = match (drawn, map) {
            (Some(column), Some(map)) => map[column as usize],
            (Some(column), None) => column as i32,
            (None, _) => plan.fallback,
        };
        let mut said = if summary.nan { status::TARGET_NAN } else { 0 };
        if summary.beyond || summary.top == f32::INFINITY {
            said |= status::TARGET_BEYOND;
        }
        if summary.shape == Shape::Empty {
            said |= status::TARGET_EMPTY;
        }
        statuses[row] = said;
        if let Some(stats) = &mut stats {
            let of_row = match summary.shape {
                Shape::Spread { scale, sum, cut, .. } => {
                    [summary.top, if summary.nan { -sum } else { sum }, cut, scale.per_logit]
                }
                _ => [summary.top, if summary.nan { -0.0 } else { 0.0 }, f32::NEG_INFINITY, 0.0],
            };
            stats[row * 4..][..4].copy_from_slice(&of_row);
        }
        if let Some(log_probs) = &mut log_probs {
            log_probs[row] = match (drawn, summary.shape) {
                (Some(column), Shape::Spread { .. }) => summary.log_probability(logit(column)),
                (Some(_), _) => 0.0,
                (None, _) => f32::NAN,
            };
        }
    }
}
