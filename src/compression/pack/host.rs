//! The formulas on the host: the oracle of the tests. What is f32 here is f32 in the kernels, in the same order.

use super::plan::Plan;
use super::{PackArgs, UnpackArgs};
use crate::dtype::{DType, F8E4M3, Float};
use crate::error::{Error, Result};
use crate::ffi::NXS_PACK_NOT_FINITE;
use crate::packed::{Codebook, Format, MOST_DIM};
use crate::view::In;

const HERE: &str = "operands are on the stream's device";
/// What is this much or more counts as infinite: sums of squares of a row stay below the end of f32.
pub(super) const BEYOND: f32 = (1u64 << 59) as f32;
/// The least scale of fp8 and int8: 2^-96.
const LEAST_SCALE: f32 = f32::from_bits((127 - 96) << 23);

/// A number as it is stored, in f32.
fn stored<N: Float>(x: f32) -> f32 {
    if N::DTYPE == DType::F16 { N::from_f32(x.clamp(-65504.0, 65504.0)).to_f32() } else { x }
}

/// To 17 bits, ties away from 0: then products with codes are exact, and what a second packing finds rounds to the same.
fn to_17_bits(x: f32) -> f32 {
    f32::from_bits((x.to_bits() + 0x40) & !0x7f)
}

/// `scale, min` of a group's extremes.
fn scale_and_min<N: Float>(least: f32, most: f32, bits: u32) -> (f32, f32) {
    let min = stored::<N>(least + 0.0);
    let scale = stored::<N>(to_17_bits((most - min) / ((1 << bits) - 1) as f32));
    (if scale >= f32::MIN_POSITIVE { scale } else { 0.0 }, min)
}

fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

fn uniform_code(x: f32, (min, inverse): (f32, f32), bits: u32) -> u8 {
    let most = ((1 << bits) - 1) as f32;
    ((x - min) * inverse).clamp(0.0, most).round_ties_even() as u8
}

/// NaN as 0, what is beyond as `most` with its sign.
fn tamed(x: f32, most: f32) -> f32 {
    if x.is_nan() {
        0.0
    } else if x.abs() >= BEYOND {
        most.copysign(x)
    } else {
        x
    }
}

/// The greatest magnitude of what is not beyond, and whether something is, or NaN.
fn greatest(row: &[f32]) -> (f32, bool) {
    let there = row.iter().map(|x| x.abs()).filter(|x| *x < BEYOND);
    (there.fold(0.0, f32::max), row.iter().any(|x| x.is_nan() || x.abs() >= BEYOND))
}

/// Sums as a warp does: eight neighbours after each other, then pairs, pairs of pairs.
fn sum_of_squares(row: &[f32]) -> f32 {
    let mut sums = [0f32; MOST_DIM / 8];
    for (sum, eight) in sums.iter_mut().zip(row.chunks(8)) {
        *sum = eight.iter().fold(0.0, |sum, x| x.mul_add(*x, sum));
    }
    let mut lanes = (row.len() / 8).next_power_of_two();
    while lanes > 1 {
        lanes /= 2;
        for i in 0..lanes {
            sums[i] = sums[2 * i] + sums[2 * i + 1];
        }
    }
    sums[0]
}

/// The code of a value that was divided by the root of its mean square.
fn nearest(book: &Codebook, x: f32) -> (u8, f32) {
    let place = book.thresholds.iter().filter(|t| x.abs() > **t).count();
    let half = book.centroids.len();
    if x < 0.0 {
        ((half - 1 - place) as u8, -book.centroids[place])
    } else {
        ((half + place) as u8, book.centroids[place])
    }
}

fn centroid(book: &Codebook, code: u8) -> f32 {
    let half = book.centroids.len();
    match usize::from(code).checked_sub(half) {
        Some(place) => book.centroids[place],
        None => -book.centroids[half - 1 - usize::from(code)],
    }
}

fn put(slot: &mut [u8], k: usize, bits: u32, code: u8) {
    let at = k * bits as usize;
    let word = u16::from(code) << (at % 8);
    slot[at / 8] |= word as u8;
    if at % 8 + bits as usize > 8 {
        slot[at / 8 + 1] |= (word >> 8) as u8;
    }
}

fn code_at(slot: &[u8], k: usize, bits: u32) -> u8 {
    let at = k * bits as usize;
    let next = if at % 8 + bits as usize > 8 { slot[at / 8 + 1] } else { 0 };
    let word = u16::from(slot[at / 8]) | u16::from(next) << 8;
    (word >> (at % 8) & ((1 << bits) - 1)) as u8
}

/// Rows of each head; refused where they are out of range.
fn rows_of(plan: &Plan, counts: &Option<In<'_, i32>>, set: u64, head: u64) -> Result<u64> {
    let rows = plan.codes.shape()[1];
    let Some(counts) = counts.as_ref().filter(|_| plan.counted) else { return Ok(rows) };
    let at = plan.counts.offset([set, head]);
    let got = counts.as_host().expect(HERE)[at as usize];
    match u64::try_from(got) {
        Ok(got) if got <= rows => Ok(got),
        _ => Err(Error::RowOutOfRange { arg: "counts", at, row: got.into(), rows }),
    }
}

/// A row's codes and numbers. `numbers` has two places for each group.
fn quantize<N: Float>(plan: &Plan, given: Option<f32>, row: &[f32], slot: &mut [u8], numbers: &mut [f32]) {
    let bits = plan.format.bits();
    match plan.format {
        Format::Fp8 | Format::Int8 => {
            let fp8 = plan.format == Format::Fp8;
            let most = if fp8 { 448.0 } else { 127.0 };
            let scale = match given {
                Some(scale) if scale > 0.0 && scale.is_finite() => scale,
                Some(_) => 0.0,
                None => to_17_bits((greatest(row).0 / most).max(LEAST_SCALE)),
            };
            numbers[0] = scale;
            let inverse = inverse(scale);
            for (slot, x) in slot.iter_mut().zip(row) {
                let x = x * inverse;
                let code = |x: f32| x.clamp(-127.0, 127.0).round_ties_even() as i8 as u8;
                *slot = if fp8 { F8E4M3::from_f32(x).0 } else { code(x) };
            }
        }
        Format::Uniform { group, .. } => {
            let group = group.map_or(row.len(), |group| group as usize);
            for (g, elements) in row.chunks(group).enumerate() {
                let least = elements.iter().copied().fold(f32::INFINITY, f32::min);
                let most = elements.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let (scale, min) = scale_and_min::<N>(least, most, bits);
                (numbers[2 * g], numbers[2 * g + 1]) = (scale, min);
                for (k, x) in elements.iter().enumerate() {
                    put(slot, g * group + k, bits, uniform_code(*x, (min, inverse(scale)), bits));
                }
            }
        }
        Format::LloydMax { renormalize, .. } => {
            let book = Codebook::of(bits);
            let root = (row.len() as f64).sqrt() as f32;
            let norm = sum_of_squares(row).sqrt();
            let inverse = if norm > 0.0 { root / norm } else { 0.0 };
            let mut chosen = [0f32; MOST_DIM];
            for (k, x) in row.iter().enumerate() {
                let (code, centroid) = nearest(&book, x * inverse);
                put(slot, k, bits, code);
                chosen[k] = centroid;
            }
            let of_chosen = sum_of_squares(&chosen[..row.len()]).sqrt();
            numbers[0] = stored::<N>(if renormalize { norm * (root / of_chosen) } else { norm });
        }
        Format::Channel { .. } => unreachable!("by groups of rows"),
    }
}

pub(super) fn pack<T: Float, N: Float>(plan: &Plan, args: &mut PackArgs<'_, T, N>) -> Result<()> {
    let [sets, _, heads, _] = plan.codes.shape();
    let tokens = plan.input.shape()[1];
    if plan.codes_len == 0 {
        return Ok(());
    }
    let kept = args.kept.as_ref().filter(|_| plan.gathers).map(|view| view.as_host().expect(HERE));
    let token_of = |set, head, row| -> Result<u64> {
        let Some(kept) = kept else { return Ok(row) };
        let at = plan.kept.offset([set, head, row]);
        let got = kept[at as usize];
        match u64::try_from(got) {
            Ok(got) if got < tokens => Ok(got),
            _ => Err(Error::RowOutOfRange { arg: "kept", at, row: got.into(), rows: tokens }),
        }
    };
    for set in 0..sets {
        for head in 0..heads {
            for row in 0..rows_of(plan, &args.counts, set, head)? {
                token_of(set, head, row)?;
            }
        }
    }

    let input = args.input.as_host().expect(HERE);
    let codes = args.codes.as_host().expect(HERE);
    let scales = args.scales.as_ref().filter(|_| plan.given).map(|view| view.as_host().expect(HERE));
    let mut numbers = args.numbers.as_mut().filter(|_| plan.numbers_len > 0).map(|view| view.as_host().expect(HERE));
    let (dim, bits) = (plan.dim(), plan.format.bits());
    let load = |set, head, row, to: &mut [f32]| -> Result<()> {
        let from = plan.input.offset([set, token_of(set, head, row)?, head, 0]) as usize;
        to.iter_mut().zip(&input[from..from + dim]).for_each(|(to, x)| *to = x.to_f32());
        Ok(())
    };
    let mut bad = false;
    for set in 0..sets {
        for head in 0..heads {
            let count = rows_of(plan, &args.counts, set, head)?;
            if let Format::Channel { rows: group, .. } = plan.format {
                let group = u64::from(group);
                for first in (0..count).step_by(group as usize) {
                    let end = (first + group).min(count);
                    let mut row = [0f32; MOST_DIM];
                    let row = &mut row[..dim];
                    // The extremes of each channel; first the greatest magnitude of what is not beyond.
                    let (mut most, mut low, mut high) =
                        ([0f32; MOST_DIM], [f32::INFINITY; MOST_DIM], [f32::NEG_INFINITY; MOST_DIM]);
                    for r in first..end {
                        load(set, head, r, row)?;
                        for (most, x) in most.iter_mut().zip(&*row) {
                            let (magnitude, beyond) = greatest(&[*x]);
                            *most = most.max(magnitude);
                            bad |= beyond;
                        }
                    }
                    for r in first..end {
                        load(set, head, r, row)?;
                        for (k, x) in row.iter().enumerate() {
                            let x = tamed(*x, most[k]);
                            (low[k], high[k]) = (low[k].min(x), high[k].max(x));
                        }
                    }
                    let mut pairs = [(0f32, 0f32); MOST_DIM];
                    let to = plan.numbers.offset([set, first / group, head, 0]) as usize;
                    let numbers = numbers.as_mut().expect("the operands were checked");
                    for k in 0..dim {
                        pairs[k] = scale_and_min::<N>(low[k], high[k], bits);
                        numbers[to + 2 * k] = N::from_f32(pairs[k].0);
                        numbers[to + 2 * k + 1] = N::from_f32(pairs[k].1);
                    }
                    for r in first..end {
                        load(set, head, r, row)?;
                        let at = plan.codes.offset([set, r, head, 0]) as usize;
                        let slot = &mut codes[at..at + plan.format.code_bytes(dim)];
                        slot.fill(0);
                        for (k, x) in row.iter().enumerate() {
                            let (scale, min) = pairs[k];
                            put(slot, k, bits, uniform_code(tamed(*x, most[k]), (min, inverse(scale)), bits));
                        }
                    }
                }
                continue;
            }
            let given = scales.map(|scales| scales[plan.scales.offset([set, head]) as usize]);
            for r in 0..count {
                let mut row = [0f32; MOST_DIM];
                let row = &mut row[..dim];
                load(set, head, r, row)?;
                let (most, beyond) = greatest(row);
                if beyond {
                    bad = true;
                    row.iter_mut().for_each(|x| *x = tamed(*x, most));
                }
                if let Some(rotation) = &plan.rotation {
                    rotation.apply(row);
                }
                let at = plan.codes.offset([set, r, head, 0]) as usize;
                let slot = &mut codes[at..at + plan.codes.shape()[3] as usize];
                slot.fill(0);
                let mut found = [0f32; MOST_DIM / 4];
                quantize::<N>(plan, given, row, slot, &mut found);
                let count = plan.format.groups(dim) * plan.format.numbers();
                if plan.inline {
                    for (i, x) in found[..count].iter().enumerate() {
                        let to = plan.inline_at() + i * size_of::<N>();
                        slot[to..to + size_of::<N>()].copy_from_slice(bytemuck::bytes_of(&N::from_f32(*x)));
                    }
                } else if let Some(numbers) = &mut numbers {
                    let to = plan.numbers.offset([set, r, head, 0]) as usize;
                    numbers[to..to + count].iter_mut().zip(found).for_each(|(to, x)| *to = N::from_f32(x));
                }
            }
        }
    }
    if let Some(flags) = args.flags.as_mut().filter(|_| bad) {
        flags.as_host().expect(HERE)[0] |= NXS_PACK_NOT_FINITE;
    }
    Ok(())
}

pub(super) fn unpack<T: Float, N: Float>(plan: &Plan, args: &mut UnpackArgs<'_, T, N>) -> Result<()> {
    let [sets, _, heads, slot] = plan.codes.shape();
    if plan.codes_len == 0 {
        return Ok(());
    }
    for set in 0..sets {
        for head in 0..heads {
            rows_of(plan, &args.counts, set, head)?;
        }
    }
    let codes = args.codes.as_host().expect(HERE);
    let scales = args.scales.as_ref().filter(|_| plan.given).map(|view| view.as_host().expect(HERE));
    let numbers = args.numbers.as_ref().filter(|_| plan.numbers_len > 0).map(|view| view.as_host().expect(HERE));
    let out = args.out.as_host().expect(HERE);
    let (dim, bits) = (plan.dim(), plan.format.bits());
    let root = (1.0 / (dim as f64).sqrt()) as f32;
    for set in 0..sets {
        for head in 0..heads {
            for r in 0..rows_of(plan, &args.counts, set, head)? {
                let at = plan.codes.offset([set, r, head, 0]) as usize;
                let slot = &codes[at..at + slot as usize];
                let number = |i: usize| -> f32 {
                    if let Some(scales) = scales {
                        let scale = scales[plan.scales.offset([set, head]) as usize];
                        return if scale > 0.0 && scale.is_finite() { scale } else { 0.0 };
                    }
                    match numbers {
                        Some(numbers) => {
                            let row = r / plan.format.rows() as u64;
                            numbers[plan.numbers.offset([set, row, head, i as u64]) as usize].to_f32()
                        }
                        None => {
                            let from = plan.inline_at() + i * size_of::<N>();
                            bytemuck::pod_read_unaligned::<N>(&slot[from..from + size_of::<N>()]).to_f32()
                        }
                    }
                };
                let mut row = [0f32; MOST_DIM];
                let row = &mut row[..dim];
                let group = dim / plan.format.groups(dim);
                for (k, x) in row.iter_mut().enumerate() {
                    let code = code_at(slot, k, bits);
                    *x = match plan.format {
                        Format::Fp8 => F8E4M3(code).to_f32() * number(0),
                        Format::Int8 => f32::from(code as i8) * number(0),
                        Format::Uniform { .. } | Format::Channel { .. } => {
                            let g = k / group;
                            f32::from(code).mul_add(number(2 * g), number(2 * g + 1))
                        }
                        Format::LloydMax { .. } => number(0) * root * centroid(&Codebook::of(bits), code),
                    };
                }
                if let Some(rotation) = &plan.rotation {
                    rotation.invert(row);
                }
                let to = plan.out.offset([set, r, head, 0]) as usize;
                out[to..to + dim].iter_mut().zip(row).for_each(|(to, x)| *to = T::from_f32(*x));
            }
        }
    }
    Ok(())
}
