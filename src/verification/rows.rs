//! Rows of logits: how they are cut, the arithmetic of their weights, and how a token is drawn from one.
//!
//! Every number here is defined operation by operation, f32 rounded to nearest, so that host and kernels agree bit for
//! bit (`kernels/verification/row_stats.cuh` and `sample.cuh` are the same functions). Nothing depends on the batch, the
//! grid or the row's place in memory.
//!
//! A row is cut into chunks of 1024 columns. Within a chunk 32 lanes have 32 places each: column `1024 c + 256 (p / 8) +
//! 8 l + p % 8` is place `p` of lane `l`. Sums run over a lane's places in order, then over lanes by [`scan`].

use bytemuck::{Pod, Zeroable};

use crate::dtype::DType;
use crate::philox;

/// Columns in a chunk.
pub(crate) const CHUNK: u64 = 1024;
pub(crate) const LANES: usize = 32;
/// Places of a lane.
pub(crate) const PLACES: usize = 32;
/// Below this a temperature means greedy.
pub(crate) const LEAST_TEMPERATURE: f32 = 1e-5;
const MOST_TEMPERATURE: f32 = 1e6;
/// Exponents beyond this leave no bits for the fraction: such a row has all its weight on its greatest logit.
const MOST_EXPONENT: f32 = 2_097_152.0;
/// Adding it rounds a float to an integer, which then stands in its low bits.
const MAGIC: f32 = 12_582_912.0;

/// Chunks of a row.
pub(crate) fn chunks(columns: u64) -> u64 {
    columns.div_ceil(CHUNK)
}

/// The column of a place.
pub(crate) fn column(chunk: u64, lane: usize, place: usize) -> u64 {
    chunk * CHUNK + (place as u64 / 8) * 256 + lane as u64 * 8 + place as u64 % 8
}

/// Lanes of a chunk that have a column below `columns` among theirs. What the others have is -inf.
pub(crate) fn lanes_with_columns(chunk: u64, columns: u64) -> usize {
    columns.saturating_sub(chunk * CHUNK).div_ceil(8).min(LANES as u64) as usize
}

fn fma(a: f32, b: f32, c: f32) -> f32 {
    a.mul_add(b, c)
}

/// Inclusive sums over lanes, in the order in which a warp makes them.
pub(crate) fn scan(mut lanes: [f32; LANES]) -> [f32; LANES] {
    for distance in [1, 2, 4, 8, 16] {
        let before = lanes;
        for lane in distance..LANES {
            lanes[lane] = before[lane] + before[lane - distance];
        }
    }
    lanes
}

/// The first lane with weight whose inclusive sum exceeds `target`, or the last one with weight; and what of the target
/// is left for it.
fn pick_lane(weights: &[f32; LANES], sums: &[f32; LANES], target: f32) -> Option<(usize, f32)> {
    let has = |lane: &usize| weights[*lane] > 0.0;
    let lane = (0..LANES).filter(has).find(|&lane| sums[lane] > target).or_else(|| (0..LANES).rev().find(has))?;
    let before = if lane == 0 { 0.0 } else { sums[lane - 1] };
    Some((lane, (target - before).max(0.0)))
}

/// The first of `weights` at which the running sum exceeds `target`, or the last one with weight. Zeros are passed over.
fn pick_in_order(weights: impl Iterator<Item = f32>, target: f32) -> Option<usize> {
    let (mut sum, mut last) = (0f32, None);
    for (at, weight) in weights.enumerate() {
        if weight > 0.0 {
            sum += weight;
            last = Some(at);
            if sum > target {
                break;
            }
        }
    }
    last
}

/// What turns logits into exponents of two.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scale {
    /// log2(e) / temperature
    pub(crate) per_logit: f32,
    /// temperature / log2(e)
    pub(crate) per_exponent: f32,
}

impl Scale {
    /// `None`: greedy.
    pub(crate) fn of(temperature: f32) -> Option<Self> {
        // A NaN is greedy too.
        (temperature >= LEAST_TEMPERATURE)
            .then(|| Self::from_per_logit(core::f32::consts::LOG2_E / temperature.min(MOST_TEMPERATURE)))
    }

    /// From log2(e) / temperature.
    pub(crate) fn from_per_logit(per_logit: f32) -> Self {
        Scale { per_logit, per_exponent: 1.0 / per_logit }
    }

    /// The exponent that a row or chunk with this greatest logit refers to; `None` if the greatest logit is too large,
    /// positive or negative, for its exponent to have a fraction.
    pub(crate) fn reference(&self, top: f32) -> Option<f32> {
        ((top * self.per_logit).abs() <= MOST_EXPONENT).then(|| fma(top, self.per_logit, MAGIC) - MAGIC)
    }

    /// Logits below it have no weight beside the reference.
    pub(crate) fn floor(&self, reference: f32) -> f32 {
        (reference - 120.0) * self.per_exponent
    }

    /// `2^(logit * per_logit - reference)`, for a logit that is not below the floor; relative error below 2^-21.
    pub(crate) fn power(&self, logit: f32, reference: f32) -> f32 {
        let shift = (MAGIC + 127.0) - reference;
        let whole = fma(logit, self.per_logit, shift);
        let fraction = fma(logit, self.per_logit, -(whole - shift));
        power_of_fraction(fraction) * f32::from_bits(whole.to_bits() << 23)
    }

    /// As `power`, 0 below the floor, below `cut` and for NaN.
    pub(crate) fn weight(&self, logit: f32, reference: f32, cut: f32) -> f32 {
        let floor = self.floor(reference);
        let least = if cut > floor { cut } else { floor };
        if logit >= least { self.power(logit, reference) } else { 0.0 }
    }
}

/// `2^f` for `|f| <= 1/2`: the polynomial of degree 5 of least relative error, 7.5e-8 before rounding.
pub(crate) fn power_of_fraction(f: f32) -> f32 {
    const C: [u32; 6] = [0x3f80_0001, 0x3f31_7214, 0x3e75_fc8c, 0x3d63_5b72, 0x3c1e_8629, 0x3aae_0473];
    let [c0, c1, c2, c3, c4, c5] = C.map(f32::from_bits);
    fma(fma(fma(fma(fma(c5, f, c4), f, c3), f, c2), f, c1), f, c0)
}

/// `2^n` for an integer `n` up to 0; 0 below -100.
pub(crate) fn power_of_integer(n: f32) -> f32 {
    if n < -100.0 { 0.0 } else { f32::from_bits(((n as i32 + 127) as u32) << 23) }
}

/// What is known of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Partial {
    /// The greatest logit; -inf if there is none.
    pub(crate) max: f32,
    /// The sum of weights by the reference of `max`; its sign is set if the chunk holds a NaN.
    pub(crate) sum: f32,
}

/// Without NaN, and without the difference between zeroes.
fn greater(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

impl Partial {
    /// Of the logits that `logit` gives for the first `filled` lanes; -inf stands for a column that is not there. Without a
    /// scale only `max` is found.
    pub(crate) fn of(logit: impl Fn(usize, usize) -> f32, filled: usize, scale: Option<&Scale>) -> Self {
        let (mut max, mut nan) = (f32::NEG_INFINITY, false);
        for lane in 0..filled {
            for place in 0..PLACES {
                let logit = logit(lane, place);
                nan |= logit.is_nan();
                max = greater(max, logit);
            }
        }
        max += 0.0; // -0 is 0
        let sum = match scale.and_then(|scale| Some((scale, scale.reference(max)?))) {
            Some((scale, reference)) => {
                let floor = scale.floor(reference);
                // Whatever is below the floor counts as the floor.
                let least = scale.power(floor, reference);
                let nothing = (0..PLACES).fold(0f32, |sum, _| sum + least);
                let lanes = core::array::from_fn(|lane| {
                    if lane >= filled {
                        return nothing;
                    }
                    (0..PLACES).fold(0f32, |sum, place| {
                        let logit = logit(lane, place);
                        sum + if logit > floor { scale.power(logit, reference) } else { least }
                    })
                });
                scan(lanes)[LANES - 1]
            }
            None => 0.0,
        };
        Partial { max, sum: if nan { -sum } else { sum } }
    }

    fn nan(&self) -> bool {
        self.sum.is_sign_negative() || self.sum.is_nan() || self.max.is_nan()
    }
}

/// Where a row's weight lies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Shape {
    /// No column has any.
    Empty,
    /// All on the lowest column of the greatest logit.
    Peak,
    /// On the logits from `cut` on, relative to `2^reference`.
    Spread { scale: Scale, reference: f32, sum: f32, cut: f32 },
}

/// What is known of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Summary {
    pub(crate) top: f32,
    /// The row holds a NaN.
    pub(crate) nan: bool,
    /// It was to be spread, but its greatest logit is too large.
    pub(crate) beyond: bool,
    pub(crate) shape: Shape,
}

/// What chunk `partial` adds to a row.
fn share(partial: &Partial, scale: &Scale, reference: f32) -> f32 {
    match scale.reference(partial.max) {
        Some(own) => partial.sum.abs() * power_of_integer(own - reference),
        None => 0.0,
    }
}

/// Weights of the chunks of each lane (chunk `c` belongs to lane `c % 32`), added in order.
fn lanes_of(chunks: usize, weight: &impl Fn(usize) -> f32) -> [f32; LANES] {
    core::array::from_fn(|lane| (lane..chunks).step_by(LANES).fold(0.0, |sum, chunk| sum + weight(chunk)))
}

/// The sum over all chunks.
pub(crate) fn total(chunks: usize, weight: impl Fn(usize) -> f32) -> f32 {
    scan(lanes_of(chunks, &weight))[LANES - 1]
}

/// A chunk, drawn by its weight with one uniform.
pub(crate) fn pick_chunk(chunks: usize, uniform: f32, weight: impl Fn(usize) -> f32) -> Option<usize> {
    let lanes = lanes_of(chunks, &weight);
    let sums = scan(lanes);
    let (lane, rest) = pick_lane(&lanes, &sums, uniform * sums[LANES - 1])?;
    let at = pick_in_order((lane..chunks).step_by(LANES).map(weight), rest)?;
    Some(lane + at * LANES)
}

/// Weights of each lane's places, added in order; 0 for lanes that are not filled.
pub(crate) fn lane_sums(filled: usize, weight: &impl Fn(usize, usize) -> f32) -> [f32; LANES] {
    core::array::from_fn(|lane| match lane < filled {
        true => (0..PLACES).fold(0.0, |sum, place| sum + weight(lane, place)),
        false => 0.0,
    })
}

/// A place of a chunk (lane, place), drawn by its weight with two uniforms.
pub(crate) fn pick_place(
    uniforms: [f32; 2],
    filled: usize,
    weight: impl Fn(usize, usize) -> f32,
) -> Option<(usize, usize)> {
    let lanes = lane_sums(filled, &weight);
    let sums = scan(lanes);
    let (lane, _) = pick_lane(&lanes, &sums, uniforms[0] * sums[LANES - 1])?;
    let place = pick_in_order((0..PLACES).map(|place| weight(lane, place)), uniforms[1] * lanes[lane])?;
    Some((lane, place))
}

impl Summary {
    /// From the chunks' partials. `scale` is `None` for a greedy row.
    pub(crate) fn of(partials: &[Partial], scale: Option<&Scale>) -> Self {
        Self::from_fn(partials.len(), |chunk| partials[chunk], scale)
    }

    /// From the partials by chunk.
    pub(crate) fn from_fn(chunks: usize, partial: impl Fn(usize) -> Partial, scale: Option<&Scale>) -> Self {
        let top = (0..chunks).fold(f32::NEG_INFINITY, |top, chunk| greater(top, partial(chunk).max));
        let nan = (0..chunks).any(|chunk| partial(chunk).nan());
        let mut summary = Summary { top, nan, beyond: false, shape: Shape::Peak };
        if top == f32::NEG_INFINITY {
            summary.shape = Shape::Empty;
        } else if let Some(scale) = scale {
            match scale.reference(top) {
                None => summary.beyond = true,
                Some(reference) => {
                    let sum = total(chunks, |chunk| share(&partial(chunk), scale, reference));
                    summary.shape = Shape::Spread { scale: *scale, reference, sum, cut: f32::NEG_INFINITY };
                }
            }
        }
        summary
    }

    /// From what a drafter stored of its row: greatest logit, sum, cut, scale (0: greedy).
    pub(crate) fn of_draft([top, sum, cut, per_logit]: [f32; 4]) -> Self {
        let partial = Partial { max: top, sum };
        let mut summary = Summary { top, nan: partial.nan(), beyond: false, shape: Shape::Peak };
        if top == f32::NEG_INFINITY {
            summary.shape = Shape::Empty;
        } else if per_logit > 0.0 {
            let scale = Scale::from_per_logit(per_logit);
            if let Some(reference) = scale.reference(top) {
                summary.shape = Shape::Spread { scale, reference, sum: sum.abs(), cut };
            }
        }
        summary
    }

    /// A token by three uniforms. `logit` by column.
    pub(crate) fn sample(
        &self,
        partials: &[Partial],
        uniforms: [f32; 3],
        columns: u64,
        logit: impl Fn(u64) -> f32,
    ) -> Option<u64> {
        match self.shape {
            Shape::Peak => self.peak(partials, logit),
            _ => self.sample_from(partials.len(), |chunk| partials[chunk], uniforms, columns, logit),
        }
    }

    /// A token by three uniforms, of a row that is no peak; `partial` by chunk.
    pub(crate) fn sample_from(
        &self,
        chunks: usize,
        partial: impl Fn(usize) -> Partial,
        uniforms: [f32; 3],
        columns: u64,
        logit: impl Fn(u64) -> f32,
    ) -> Option<u64> {
        let Shape::Spread { scale, reference, cut, .. } = self.shape else { return None };
        let chunk = pick_chunk(chunks, uniforms[0], |chunk| share(&partial(chunk), &scale, reference))?;
        // By the chunk's own reference something of it always has weight.
        let reference = scale.reference(partial(chunk).max)?;
        let at = |lane, place| scale.weight(logit(column(chunk as u64, lane, place)), reference, cut);
        let filled = lanes_with_columns(chunk as u64, columns);
        let (lane, place) = pick_place([uniforms[1], uniforms[2]], filled, at)?;
        Some(column(chunk as u64, lane, place))
    }

    /// The lowest column of the greatest logit.
    pub(crate) fn peak(&self, partials: &[Partial], logit: impl Fn(u64) -> f32) -> Option<u64> {
        let chunk = partials.iter().position(|partial| partial.max == self.top)? as u64;
        // -0 is 0 here as there.
        (chunk * CHUNK..(chunk + 1) * CHUNK).find(|&column| logit(column) == self.top)
    }

    /// The weight of a logit, and what all weights add up to. A peak is not asked.
    pub(crate) fn weight(&self, logit: f32) -> f32 {
        match self.shape {
            Shape::Spread { scale, reference, cut, .. } => scale.weight(logit, reference, cut),
            Shape::Peak | Shape::Empty => 0.0,
        }
    }

    /// What all weights add up to.
    pub(crate) fn sum(&self) -> f32 {
        match self.shape {
            Shape::Spread { sum, .. } => sum,
            Shape::Peak | Shape::Empty => 0.0,
        }
    }

    /// The natural logarithm of a logit's probability.
    pub(crate) fn log_probability(&self, logit: f32) -> f32 {
        match self.shape {
            Shape::Spread { scale, reference, sum, cut } if logit >= cut => {
                (fma(logit, scale.per_logit, -reference) - sum.log2()) * core::f32::consts::LN_2
            }
            _ => f32::NEG_INFINITY,
        }
    }
}

/// A row to draw from or to ask for the weight of one column.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Distribution {
    pub(crate) summary: Summary,
    /// The column that has all weight, if one has.
    pub(crate) peak: Option<u64>,
}

impl Distribution {
    /// All weight on one column.
    pub(crate) fn on(column: u64) -> Self {
        let summary = Summary { top: 0.0, nan: false, beyond: false, shape: Shape::Peak };
        Distribution { summary, peak: Some(column) }
    }

    pub(crate) fn weight(&self, column: u64, logit: f32) -> f32 {
        match self.peak {
            Some(peak) => f32::from(column == peak),
            None => self.summary.weight(logit),
        }
    }

    pub(crate) fn sum(&self) -> f32 {
        if self.peak.is_some() { 1.0 } else { self.summary.sum() }
    }
}

/// A column's part of `max(factor * p - q, 0)`, in units of 1 / (sum of p * sum of q).
pub(crate) fn residual(factor: f32, p: f32, p_sum: f32, q: f32, q_sum: f32) -> f32 {
    if p == 0.0 { 0.0 } else { greater(0.0, fma(p * factor, q_sum, -(q * p_sum))) }
}

/// What leaves columns of a row without weight, in this order: all but the `top_k` greatest logits; those with less than
/// `min_p` of the greatest probability; of what is left, those outside the smallest set of greatest logits that has
/// `top_p` of the mass. Logits that tie with the last one kept are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Truncation {
    /// 0: off.
    pub(crate) top_k: u32,
    /// From 1 on: off.
    pub(crate) top_p: f32,
    /// 0: off.
    pub(crate) min_p: f32,
}

/// Unsigned integers in the order of the floats, -0 being 0.
pub(crate) fn order_key(logit: f32) -> u32 {
    key(logit)
}

/// Unsigned integers in the order of the floats.
fn key(logit: f32) -> u32 {
    let bits = (logit + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

fn logit_of_key(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key & !(1 << 31) } else { !key })
}

/// The greatest key of `bits` leading bits, not above `most`, that `enough` holds for; 0 if it holds for none above.
/// What holds for a key holds for all below it.
fn greatest_key(bits: u32, most: u32, enough: impl Fn(u32) -> bool) -> u32 {
    (32 - bits..32).rev().map(|bit| 1 << bit).fold(0, |found, bit| {
        let next = found | bit;
        if next <= most && enough(next) { next } else { found }
    })
}

/// Leading bits of a key that tell the values of a dtype apart.
pub(crate) fn key_bits(dtype: DType) -> u32 {
    match dtype {
        DType::BF16 => 16,
        DType::F16 => 19,
        _ => 32,
    }
}

/// Masses are counted in these parts of the weight `2^reference`, so that their sums do not depend on any order.
const MASS: f32 = 2_147_483_648.0;

impl Truncation {
    /// Cuts the row down: `summary` gets its `cut`, and the partials the sums of what is left. `logit` by column.
    pub(crate) fn apply(
        &self,
        summary: &mut Summary,
        partials: &mut [Partial],
        bits: u32,
        columns: u64,
        logit: impl Fn(u64) -> f32,
    ) {
        let Shape::Spread { scale, reference, sum, cut } = &mut summary.shape else { return };
        let top_k = self.top_k > 0 && u64::from(self.top_k) < columns;
        let top_p = self.top_p < 1.0;
        let min_p = self.min_p > 0.0;
        if !(top_k || top_p || min_p) {
            return;
        }
        let most = key(summary.top);
        let mut least = 0;
        if top_k {
            least = greatest_key(bits, most, |least| {
                (0..columns).filter(|&column| key_at_least(logit(column), least)).count() as u64
                    >= u64::from(self.top_k)
            });
        }
        if min_p {
            let bound = self.min_p * scale.power(summary.top, *reference);
            // The greatest key that is still too small, and one step up. Below 0, logits of this many bits have ones after
            // them.
            let step = 1 << (32 - bits);
            let below = greatest_key(bits, most, |key| {
                let logit = logit_of_key(if key >> 31 == 1 { key } else { key | (step - 1) });
                scale.weight(logit, *reference, f32::NEG_INFINITY) < bound
            });
            least = least.max(below.saturating_add(step).min(most & !(step - 1)));
        }
        if top_p {
            let mass = |least: u32| -> u64 {
                let of = |column| {
                    let logit = logit(column);
                    let weight = scale.weight(logit, *reference, f32::NEG_INFINITY);
                    if key_at_least(logit, least) { u64::from((weight * MASS) as u32) } else { 0 }
                };
                (0..columns).map(of).sum()
            };
            let all = mass(least);
            let part = (self.top_p.max(0.0) * 16_777_216.0) as u64;
            let need = ((all >> 24) * part + (((all & 0xff_ffff) * part + 0xff_ffff) >> 24)).max(1);
            least = least.max(greatest_key(bits, most, |least| mass(least) >= need));
        }
        // Keys up to that of -inf are NaNs.
        *cut = if least <= key(f32::NEG_INFINITY) { f32::NEG_INFINITY } else { logit_of_key(least) };
        for (chunk, partial) in partials.iter_mut().enumerate() {
            partial.sum = match scale.reference(partial.max) {
                Some(own) if partial.max >= *cut => {
                    let chunk = chunk as u64;
                    let weight = |lane, place| scale.weight(logit(column(chunk, lane, place)), own, *cut);
                    let lanes = lane_sums(lanes_with_columns(chunk, columns), &weight);
                    scan(lanes)[LANES - 1]
                }
                _ => 0.0,
            };
        }
        *sum = total(partials.len(), |chunk| share(&partials[chunk], scale, *reference));
    }
}

fn key_at_least(logit: f32, least: u32) -> bool {
    !logit.is_nan() && key(logit) >= least
}

/// Which use of a position a Philox block is for; the low byte of the counter's domain word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Domain {
    /// The drafter's token.
    Draft = 0,
    /// The accept test of a draft.
    Accept = 1,
    /// A token of the residual, by a full sweep.
    Residual = 2,
    /// A token of the target: bonus, sampled match, no draft. Independent of the row's number in the step.
    Sample = 3,
    /// A trial of thinning.
    Thin = 4,
    /// Noise that belongs to a token of a position. Independent of the row's number in the step.
    Noise = 8,
    /// The candidate of a row that is ranked. The rest of the word is the number of the step.
    Candidate = 9,
    /// The noise of its rank.
    Rank = 10,
    /// Which of several candidates is selected.
    Select = 11,
}

/// Four uniforms of a request. `row`: which row of the step; it keeps two steps apart that see one position.
pub(crate) fn uniforms(seed: u64, position: u64, domain: Domain, row: u32, draw: u32) -> [f32; 4] {
    philox::block(seed, position, domain as u32 | row << 8, draw).map(philox::uniform)
}
