//! What typical acceptance and confidences need of a row: entropy, and the second greatest logit. Operation by operation, so
//! that host and kernels agree bit for bit (`kernels/verification/moments.cuh` is the same).

use bytemuck::{Pod, Zeroable};

use super::log2::log2;
use super::rows::{LANES, PLACES, Partial, Scale, Shape, Summary, power_of_fraction, power_of_integer, scan, total};

/// What is known of a chunk.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Moments {
    /// As those of [`Partial`].
    pub(crate) max: f32,
    pub(crate) second: f32,
    pub(crate) sum: f32,
    /// The sum of weights times exponents.
    pub(crate) moment: f32,
}

impl Moments {
    /// Of the logits that `logit` gives by lane and place, -inf for a column that is not there.
    pub(crate) fn of(logit: impl Fn(usize, usize) -> f32, scale: Option<&Scale>) -> Self {
        let partial = Partial::of(&logit, LANES, scale);
        let (mut max, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for lane in 0..LANES {
            for place in 0..PLACES {
                let x = logit(lane, place);
                if x > max {
                    (second, max) = (max, x);
                } else if x > second {
                    second = x;
                }
            }
        }
        let moment = match scale.and_then(|scale| Some((scale, scale.reference(partial.max)?))) {
            Some((scale, reference)) => {
                let floor = scale.floor(reference);
                let lanes = core::array::from_fn(|lane| {
                    (0..PLACES).fold(0f32, |sum, place| {
                        let x = logit(lane, place);
                        let x = if x > floor { x } else { floor };
                        let exponent = x.mul_add(scale.per_logit, -reference);
                        scale.power(x, reference).mul_add(exponent, sum)
                    })
                });
                scan(lanes)[LANES - 1]
            }
            None => 0.0,
        };
        Moments { max: partial.max, second: second + 0.0, sum: partial.sum, moment }
    }
}

/// What is known of a row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowMoments {
    pub(crate) summary: Summary,
    pub(crate) second: f32,
    moment: f32,
}

impl RowMoments {
    /// From the chunks'.
    pub(crate) fn of(moments: &[Moments], scale: Option<&Scale>) -> Self {
        let partial = |chunk: usize| Partial { max: moments[chunk].max, sum: moments[chunk].sum };
        let summary = Summary::from_fn(moments.len(), partial, scale);
        let (mut max, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for of in moments {
            for x in [of.max, of.second] {
                if x > max {
                    (second, max) = (max, x);
                } else if x > second {
                    second = x;
                }
            }
        }
        let moment = match (summary.shape, scale) {
            (Shape::Spread { reference, .. }, Some(scale)) => total(moments.len(), |chunk| {
                let of = &moments[chunk];
                match scale.reference(of.max) {
                    Some(own) => {
                        let apart = own - reference;
                        power_of_integer(apart) * apart.mul_add(of.sum.abs(), of.moment)
                    }
                    None => 0.0,
                }
            }),
            _ => 0.0,
        };
        RowMoments { summary, second, moment }
    }

    /// Of a spread row.
    pub(crate) fn entropy_bits(&self) -> f32 {
        let bits = log2(self.summary.sum()) - self.moment / self.summary.sum();
        if bits > 0.0 { bits } else { 0.0 }
    }
}

/// `2^-x` for x from 0 on; 0 above 100.
pub(crate) fn power_of_minus(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    if x <= 100.0 {
        let whole = (x + MAGIC) - MAGIC;
        power_of_fraction(whole - x) * power_of_integer(-whole)
    } else {
        0.0
    }
}
