//! What the host paths of several ops ask of a row.

use super::rows::{Distribution, Partial, Scale, Shape, Summary, Truncation, column, lanes_with_columns};
use super::status;

/// A logit with guidance.
pub(crate) fn guide(with: f32, free: f32, guidance: f32) -> f32 {
    let nothing = f32::NEG_INFINITY;
    if with == nothing || free == nothing { nothing } else { guidance.mul_add(with - free, free) }
}

/// A row's distribution, and what there is to say of it as a row of the target. `logit` by column, -inf beyond the last.
pub(crate) fn distribution(
    partials: &mut [Partial],
    scale: Option<&Scale>,
    truncation: &Truncation,
    bits: u32,
    columns: u64,
    logit: impl Fn(u64) -> f32,
) -> (Distribution, u32) {
    for (chunk, partial) in partials.iter_mut().enumerate() {
        let of = |lane, place| logit(column(chunk as u64, lane, place));
        *partial = Partial::of(of, lanes_with_columns(chunk as u64, columns), scale);
    }
    let mut summary = Summary::of(partials, scale);
    truncation.apply(&mut summary, partials, bits, columns, &logit);
    let said = said_of(&summary);
    let peak = match summary.shape {
        Shape::Peak => summary.peak(partials, logit),
        _ => None,
    };
    (Distribution { summary, peak }, said)
}

/// What there is to say of a row of the target.
pub(crate) fn said_of(summary: &Summary) -> u32 {
    let mut said = 0;
    if summary.nan {
        said |= status::TARGET_NAN;
    }
    if summary.beyond || summary.top == f32::INFINITY {
        said |= status::TARGET_BEYOND;
    }
    if summary.shape == Shape::Empty {
        said |= status::TARGET_EMPTY;
    }
    said
}
