//! The definitions, on the host.

use super::ConfidenceRankArgs;
use super::plan::{Confidence, Plan};
use crate::dtype::{Element, Float};
use crate::philox;
use crate::verification::host_rows::distribution;
use crate::verification::log2::{exponential, log2};
use crate::verification::moments::{Moments, RowMoments};
use crate::verification::rows::{Domain, Partial, Scale, Shape, Truncation, chunks, column, key_bits, order_key};
use crate::view::In;

const HERE: &str = "operands are on the stream's device";

fn slice<'a, T: Element>(view: &'a Option<In<'_, T>>) -> Option<&'a [T]> {
    view.as_ref().map(|view| view.as_host().expect(HERE))
}

/// What is kept of a row.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Row {
    /// -1: none, or not masked.
    candidate: i32,
    confidence: f32,
    score: f32,
    said: u32,
}

/// How sure the model is of a token.
fn confidence(kind: Confidence, sure: &RowMoments, logit: f32) -> f32 {
    let summary = &sure.summary;
    let Shape::Spread { scale, reference, sum, .. } = summary.shape else {
        // All weight is on the greatest logit.
        let certain = logit == summary.top;
        return match kind {
            Confidence::Probability => f32::from(certain),
            Confidence::LogProbability => {
                if certain {
                    0.0
                } else {
                    f32::NEG_INFINITY
                }
            }
            Confidence::Margin => 1.0,
            Confidence::Entropy => 0.0,
        };
    };
    match kind {
        Confidence::Probability => summary.weight(logit) / sum,
        Confidence::LogProbability => {
            (logit.mul_add(scale.per_logit, -reference) - log2(sum)) * core::f32::consts::LN_2
        }
        Confidence::Margin => (summary.weight(summary.top) - summary.weight(sure.second)) / sum,
        Confidence::Entropy => -(sure.entropy_bits() * core::f32::consts::LN_2),
    }
}

pub(super) fn run<T: Float>(plan: &Plan, args: &mut ConfidenceRankArgs<'_, T>) {
    let logits = args.logits.as_host().expect(HERE);
    let masked = slice(&args.masked);
    let number = |view: &Option<In<'_, f32>>, b: usize, otherwise: f32| slice(view).map_or(otherwise, |of| of[b]);
    let word = |view: &Option<In<'_, i64>>, b: usize| slice(view).map_or(0, |of| of[b] as u64);
    let counts = args.counts.as_host().expect(HERE);
    let tokens = args.out.tokens.as_host().expect(HERE);
    let committed = args.out.committed.as_host().expect(HERE);
    let statuses = args.out.status.as_host().expect(HERE);
    let mut candidates = args.out.candidates.as_mut().map(|view| view.as_host().expect(HERE));
    let mut confidences = args.out.confidence.as_mut().map(|view| view.as_host().expect(HERE));
    let of_row = chunks(plan.vocab) as usize;
    let workspace = args.workspace.as_host().expect(HERE);
    let (rows, rest) = workspace.split_at_mut(plan.rows() as usize * 16);
    let rows: &mut [Row] = bytemuck::cast_slice_mut(rows);
    let (moments, rest) = rest.split_at_mut(of_row * 16);
    let moments: &mut [Moments] = bytemuck::cast_slice_mut(moments);
    let partials: &mut [Partial] = bytemuck::cast_slice_mut(&mut rest[..of_row * 8]);
    let length = plan.length as usize;
    for b in 0..plan.batch as usize {
        let scale = Scale::of(number(&args.temperature, b, 0.0));
        let truncation = Truncation {
            top_k: slice(&args.top_k).map_or(0, |of| of[b].max(0) as u32),
            top_p: number(&args.top_p, b, 1.0),
            min_p: number(&args.min_p, b, 0.0),
        };
        let noise = number(&args.noise, b, 0.0);
        statuses[b] = 0;
        let first = b * length;
        for i in 0..length {
            let r = first + i;
            let mut kept = Row { candidate: -1, confidence: f32::NAN, score: f32::NEG_INFINITY, said: 0 };
            if masked.is_none_or(|masked| masked[r] != 0) {
                let logit = |column: u64| match column < plan.vocab {
                    true => logits[r * plan.stride as usize + column as usize].to_f32(),
                    false => f32::NEG_INFINITY,
                };
                let one = Scale::of(1.0);
                for (chunk, of) in moments.iter_mut().enumerate() {
                    *of = Moments::of(|lane, place| logit(column(chunk as u64, lane, place)), one.as_ref());
                }
                let sure = RowMoments::of(moments, one.as_ref());
                let (p, said) =
                    distribution(partials, scale.as_ref(), &truncation, key_bits(T::DTYPE), plan.vocab, logit);
                kept.said = said;
                let words = |domain: Domain| {
                    let position = word(&args.positions, b).wrapping_add(i as u64);
                    philox::block(word(&args.seeds, b), position, domain as u32 | plan.step << 8, 0)
                };
                let token = p.peak.or_else(|| {
                    let [x, y, z, _] = words(Domain::Candidate).map(philox::uniform);
                    p.summary.sample(partials, [x, y, z], plan.vocab, logit)
                });
                if let Some(token) = token {
                    kept.candidate = token as i32;
                    kept.confidence = confidence(plan.confidence, &sure, logit(token));
                    kept.score = kept.confidence;
                    if noise > 0.0 {
                        let variate = exponential(words(Domain::Rank)[0]);
                        kept.score = kept.confidence / noise - log2(variate) * core::f32::consts::LN_2;
                    }
                }
            }
            statuses[b] |= kept.said;
            rows[r] = kept;
        }
        let rows = &rows[first..first + length];
        let is_there = |row: &Row| row.candidate >= 0;
        let is_above =
            |row: &Row| is_there(row) && slice(&args.threshold).is_some_and(|threshold| row.confidence > threshold[b]);
        let any = rows.iter().any(is_above);
        let eligible = rows.iter().filter(|row| is_there(row)).count();
        let n = usize::try_from(counts[b]).map_or(eligible, |n| n.min(eligible));
        committed[b] = 0;
        for (i, row) in rows.iter().enumerate() {
            // Of how many it is not among the greatest.
            let before = |(j, other): &(usize, &Row)| {
                let (key, of_other) = (order_key(row.score), order_key(other.score));
                is_there(other) && (of_other > key || (of_other == key && *j < i))
            };
            let commits = match any {
                true => is_above(row),
                false => is_there(row) && rows.iter().enumerate().filter(before).count() < n,
            };
            tokens[first + i] = if commits { row.candidate } else { -1 };
            committed[b] += i32::from(commits);
            if let Some(out) = &mut candidates {
                out[first + i] = row.candidate;
            }
            if let Some(out) = &mut confidences {
                out[first + i] = row.confidence;
            }
        }
    }
}
