//! The drafter's sampler on the host.

use super::DraftSampleArgs;
use super::plan::{MOST_DRAFTS, Plan};
use crate::dtype::Float;
use crate::verification::rows::{
    CHUNK, Domain, Partial, Scale, Shape, Summary, Truncation, chunks, column, key_bits, lane_sums, lanes_with_columns,
    scan, uniforms,
};
use crate::verification::{Siblings, status};

pub(super) fn run<Q: Float>(plan: &Plan, args: &mut DraftSampleArgs<'_, Q>) {
    const HERE: &str = "operands are on the stream's device";
    let logits = args.logits.as_host().expect(HERE);
    let map = args.draft_to_target.as_ref().map(|view| view.as_host().expect(HERE));
    let numbers = args.rows_in_step.as_ref().map(|view| view.as_host().expect(HERE));
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
        let (position, row_in_step) = match numbers {
            Some(numbers) => (words(&args.positions, row), numbers[row] as u32 & 0xff_ffff),
            None => (words(&args.positions, row).wrapping_add(plan.row_in_step.into()), plan.row_in_step),
        };
        let seed = words(&args.seeds, row);
        // The columns drawn so far.
        let (mut taken, mut count) = ([0u64; MOST_DRAFTS as usize], 0);
        for draft in 0..plan.drafts as usize {
            let at = row * plan.drafts as usize + draft;
            let [a, b, c, _] = match given {
                Some(given) => given[at * 4..][..4].try_into().expect("four"),
                None => uniforms(seed, position, Domain::Draft, row_in_step, draft as u32),
            };
            // What is taken has no weight any more.
            let left = |column| if taken[..count].contains(&column) { f32::NEG_INFINITY } else { logit(column) };
            let drawn = match summary.shape {
                Shape::Peak => {
                    let top = partials.iter().fold(f32::NEG_INFINITY, |top, partial| top.max(partial.max));
                    (top > f32::NEG_INFINITY).then(|| Summary { top, ..summary }.peak(partials, left)).flatten()
                }
                _ => summary.sample(partials, [a, b, c], plan.vocab, left),
            };
            tokens[at] = match (drawn, map) {
                (Some(column), Some(map)) => map[column as usize],
                (Some(column), None) => column as i32,
                (None, _) if draft == 0 => plan.fallback,
                (None, _) => -1,
            };
            if let Some(log_probs) = &mut log_probs {
                log_probs[at] = match (drawn, summary.shape) {
                    (Some(column), Shape::Spread { .. }) => summary.log_probability(logit(column)),
                    (Some(_), _) if count == 0 => 0.0,
                    (Some(_), _) => f32::NEG_INFINITY,
                    (None, _) => f32::NAN,
                };
            }
            let Some(of) = drawn else { continue };
            if plan.siblings == Siblings::WithReplacement {
                continue;
            }
            taken[count] = of;
            count += 1;
            let left = |column| if taken[..count].contains(&column) { f32::NEG_INFINITY } else { logit(column) };
            let chunk = of / CHUNK;
            let partial = &mut partials[chunk as usize];
            match summary.shape {
                Shape::Spread { scale, cut, .. } => {
                    let reference = scale.reference(partial.max).expect("something was drawn from it");
                    let weight = |lane, place| scale.weight(left(column(chunk, lane, place)), reference, cut);
                    partial.sum = scan(lane_sums(lanes_with_columns(chunk, plan.vocab), &weight))[31];
                }
                _ => {
                    let all = (chunk * CHUNK..(chunk + 1) * CHUNK).map(left);
                    partial.max = all.fold(f32::NEG_INFINITY, f32::max) + 0.0;
                }
            }
        }
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
    }
}
