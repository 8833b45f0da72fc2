//! The phis of VAR: which scale has which, and their weights as the kernels read them.

use crate::error::{Error, Result};

/// Which phi each scale goes through.
///
/// VAR chooses by rounding in f64, ties among it, so that formulas that are equal on paper choose differently: its
/// tables are given here as numbers.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PhiTable(pub(super) Vec<u8>);

impl PhiTable {
    /// VAR's and HART's schedules of 10 scales (256 and 512 pixels) with four phis.
    pub fn var_10() -> Self {
        PhiTable(vec![0, 0, 1, 1, 1, 2, 2, 3, 3, 3])
    }

    /// VAR's schedule of 14 scales (1024 pixels) with four phis.
    pub fn var_14() -> Self {
        PhiTable(vec![0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    }

    /// Schedules of 8 scales with four phis.
    pub fn var_8() -> Self {
        PhiTable(vec![0, 0, 1, 1, 2, 2, 3, 3])
    }

    /// One phi for all scales.
    pub fn shared(scales: usize) -> Self {
        PhiTable(vec![0; scales])
    }

    /// A phi for each scale, up to 32.
    pub fn per_scale(scales: usize) -> Self {
        PhiTable((0..scales.min(32) as u8).collect())
    }

    /// Any table.
    ///
    /// # Errors
    /// [`Error::Size`] for a phi beyond 127.
    pub fn new(phis: &[u8]) -> Result<Self> {
        match phis.iter().find(|&&phi| phi > 127) {
            Some(&phi) => Err(Error::Size { arg: "phi table", got: phi.into(), min: 0, max: 127 }),
            None => Ok(PhiTable(phis.to_vec())),
        }
    }

    /// Phis that the table speaks of: one more than the greatest.
    pub fn phis(&self) -> u64 {
        self.0.iter().max().map_or(0, |&phi| u64::from(phi) + 1)
    }
}

/// Elements of one packed phi.
pub(super) fn packed_len(channels: usize) -> usize {
    channels.div_ceil(4) * (9 * channels + 1) * 4
}

/// Packs the 3x3 convolutions of `phis` phis for the operand `phi`: once, when a model is loaded.
///
/// `phi(h) = (1 - ratio) h + ratio (weight * h + bias)`, as one convolution. `weights` is PyTorch's `[phis, channels,
/// channels, 3, 3]` (output, input, row, column), `biases` `[phis, channels]`; `ratio` is VAR's `|quant_resi|`, 0.5.
/// The result is `[phis, ceil(channels / 4), 9 channels + 1, 4]`.
///
/// # Errors
/// [`Error::Length`] where a length does not fit.
///
/// ```
/// // A phi of ratio 0 is the identity: the middle tap of its own channel.
/// let packed = nextscale::quantization::pack_phi(1, &[3.0; 9], &[5.0], 0.0)?;
/// assert_eq!(packed[4 * 4], 1.0);
/// assert_eq!(packed.iter().sum::<f32>(), 1.0);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub fn pack_phi(channels: usize, weights: &[f32], biases: &[f32], ratio: f32) -> Result<Vec<f32>> {
    let length = |arg, need, got| Err(Error::Length { arg, need: need as u64, got: got as u64 });
    if channels == 0 || !biases.len().is_multiple_of(channels) {
        return length("biases", channels, biases.len());
    }
    let phis = biases.len() / channels;
    if weights.len() != phis * channels * channels * 9 {
        return length("weights", phis * channels * channels * 9, weights.len());
    }
    let (mut packed, rows) = (vec![0f32; phis * packed_len(channels)], 9 * channels + 1);
    let ratio = f64::from(ratio);
    for phi in 0..phis {
        for out in 0..channels {
            let place = |row: usize| phi * packed_len(channels) + (out / 4 * rows + row) * 4 + out % 4;
            for input in 0..channels {
                for tap in 0..9 {
                    let weight = ratio * f64::from(weights[((phi * channels + out) * channels + input) * 9 + tap]);
                    let own = if tap == 4 && input == out { 1.0 - ratio } else { 0.0 };
                    packed[place(input * 9 + tap)] = (weight + own) as f32;
                }
            }
            packed[place(9 * channels)] = (ratio * f64::from(biases[phi * channels + out])) as f32;
        }
    }
    Ok(packed)
}
