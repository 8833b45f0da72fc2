//! Prepares codebooks on the host, from the formulas of `nextscale.h`.

use half::bf16;

use super::CodebookArgs;
use super::plan::Codebook;
use crate::dtype::Float;
use crate::error::{Error, Result};

/// Sum of squares: one accumulator, ascending. Defined to the bit, for what is searched depends on it.
pub(crate) fn sum_of_squares(row: &[f32]) -> f32 {
    row.iter().fold(0.0, |sum, &x| x.mul_add(x, sum))
}

/// What a row is divided by.
pub(crate) fn norm(row: &[f32], eps: f32) -> f32 {
    let norm = sum_of_squares(row).sqrt();
    // Not `max`, which would drop a NaN.
    if norm < eps { eps } else { norm }
}

pub(super) fn prepare<E: Float>(codebook: &Codebook, args: &mut CodebookArgs<'_, E>) -> Result<()> {
    const HERE: &str = "operands are on the stream's device";
    let g = &codebook.geometry;
    let rows = args.rows.as_host().expect(HERE);
    let usage = args.usage.as_ref().map(|usage| usage.as_host().expect(HERE));
    let prepared = &mut args.prepared.as_host().expect(HERE)[..g.bytes as usize];
    prepared.fill(0);
    let mut row = vec![0f32; g.dim as usize];
    for level in 0..g.levels {
        let mut most = [0f32; 3];
        for entry in 0..g.padded_entries {
            if entry < g.entries {
                for k in 0..g.dim {
                    let at = codebook.rows.offset([level, entry, k]);
                    let mut value = rows[at as usize].to_f32();
                    if let (Some(usage), Some(eps)) = (usage, codebook.usage_eps) {
                        let at = level * g.entries + entry;
                        let count = usage[at as usize];
                        if !count.is_finite() {
                            return Err(Error::NotFinite { arg: "usage", at });
                        }
                        value /= count.max(f32::from_bits(eps));
                    }
                    if !value.is_finite() {
                        return Err(Error::NotFinite { arg: "rows", at });
                    }
                    row[k as usize] = value;
                }
                let words: &mut [f32] = bytemuck::cast_slice_mut(prepared);
                let unit = g.metric == crate::ffi::NXS_METRIC_COSINE_UNIT as i32;
                if !unit {
                    words[g.value(level, entry, 0)..][..row.len()].copy_from_slice(&row);
                }
                if g.cosine() {
                    let norm = norm(&row, g.eps());
                    row.iter_mut().for_each(|x| *x /= norm);
                }
                if unit {
                    words[g.value(level, entry, 0)..][..row.len()].copy_from_slice(&row);
                }
                for k in 0..g.dim {
                    words[g.search(level, entry, k)] = row[k as usize];
                }
            } else {
                row.fill(0.0);
            }
            filter_row(codebook, bytemuck::cast_slice_mut(prepared), level, entry, &row, &mut most);
        }
        let words: &mut [f32] = bytemuck::cast_slice_mut(prepared);
        words[level as usize * 4..][..3].copy_from_slice(&most);
    }
    Ok(())
}

/// The operand's row, and what it adds to the greatest norms: of rows, second pieces, and what the pieces leave out.
fn filter_row(codebook: &Codebook, operand: &mut [bf16], level: u64, entry: u64, row: &[f32], most: &mut [f32; 3]) {
    let g = &codebook.geometry;
    let mut sums = [0f32; 3];
    for (k, &x) in row.iter().enumerate() {
        let (k, high) = (k as u64, bf16::from_f32(x));
        let mut left = x - high.to_f32();
        operand[g.operand(level, entry, k)] = high;
        if g.pieces == 3 {
            let low = bf16::from_f32(left);
            operand[g.operand(level, entry, g.padded_dim + k)] = high;
            operand[g.operand(level, entry, 2 * g.padded_dim + k)] = low;
            left -= low.to_f32();
            sums[1] = low.to_f32().mul_add(low.to_f32(), sums[1]);
        }
        sums[0] = x.mul_add(x, sums[0]);
        sums[2] = left.mul_add(left, sums[2]);
    }
    // A row that is no code is far from everything.
    let mut norm = if entry < g.entries { -0.5 * sums[0] } else { -(2f32.powi(120)) };
    for piece in 0..3 {
        let rounded = bf16::from_f32(norm);
        operand[g.operand(level, entry, g.pieces * g.padded_dim + piece)] = rounded;
        norm -= rounded.to_f32();
    }
    for (most, sum) in most.iter_mut().zip(sums) {
        *most = most.max(sum.sqrt());
    }
}
