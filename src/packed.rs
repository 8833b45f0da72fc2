//! Rows of keys and values in few bits: the formats, what rotates a row before, and the codebooks.
//!
//! Shared vocabulary: what writes packed caches and what reads them agree on it.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::philox;

/// Elements of a row (a token's head) that a format takes at most.
pub const MOST_DIM: usize = 256;
/// The domain of the signs that [`Rotation::seeded`] draws.
pub const ROTATION_DOMAIN: u32 = 0x726f_7461;

/// How a row of `dim` elements, one token of one head, is packed.
///
/// The codes of a row lie in a **slot**: element k of `bits` bits at bit `k * bits` of its little-endian bytes, so that the slot
/// is [`Format::code_bytes`] long. The **numbers** that go with codes lie in an array of their own, f32 or, but for the
/// first two, f16; or, where a row has one group, in the slot itself: from the next multiple of 16 bytes on, with zeroes
/// before and after up to 16 bytes (`dim + 16` bytes of fp8, as FlashInfer has it).
///
/// | format | a number of | value of code q | error of a value x, before it is rounded to its type |
/// |---|---|---|---|
/// | [`Fp8`](Format::Fp8), [`Int8`](Format::Int8) | row: scale | `q * scale` | fp8: half a unit of the code, `2^-4 abs(x)`, or `2^-10 scale` if that is more; int8: `scale / 2` |
/// | [`Uniform`](Format::Uniform) | group: scale, min | `q * scale + min` | `scale / 2` |
/// | [`Channel`](Format::Channel) | channel and group of rows: scale, min | `q * scale + min` | `scale / 2` |
/// | [`LloydMax`](Format::LloydMax) | row: norm | `norm / sqrt(dim) * centroid[q]` | mean square of rotated rows: 0.117, 0.0345, 0.0095 of `norm^2 / dim` at 2, 3, 4 bits |
///
/// each times `1 + 2^-7`; numbers kept as f16 add `2^-11 ((2^bits - 1) scale + abs(min))`, and `2^-11 norm`. Fp8 and int8
/// with given scales clamp what is beyond them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// fp8 e4m3, `scale = max(greatest magnitude / 448, 2^-96)`, per (token, head) (vLLM, FlashInfer).
    Fp8,
    /// -127 to 127, `scale = max(greatest magnitude / 127, 2^-96)`, per (token, head).
    Int8,
    /// Codes 0 to `2^bits - 1` between the least and the greatest of a group along the row.
    Uniform {
        /// 2, 3, 4 or 8.
        bits: u32,
        /// Elements: a power of two from 8 on that divides `dim`; none: the whole row.
        group: Option<u32>,
    },
    /// The same between the extremes of a channel over a group of rows: keys as KIVI has them (arXiv 2402.02750).
    Channel {
        /// 2, 3, 4 or 8.
        bits: u32,
        /// Rows of a group: 32, 64 or 128.
        rows: u32,
    },
    /// The nearest centroid of a normal distribution, for rows that were rotated and divided by their norm: keys as
    /// TurboQuant has them (arXiv 2504.19874), without its second stage.
    LloydMax {
        /// 2, 3 or 4.
        bits: u32,
        /// The norm kept is that with which what is unpacked has the norm of the row.
        renormalize: bool,
    },
}

impl Format {
    /// 4 bits a row with scale and min. Meant for rotated rows (QuaRot, vLLM's `int4_per_token_head`).
    pub const INT4: Format = Format::Uniform { bits: 4, group: None };

    /// KIVI's keys: per channel, over groups of 32, 64 or 128 tokens.
    pub const fn kivi_key(bits: u32, tokens: u32) -> Format {
        Format::Channel { bits, rows: tokens }
    }

    /// KIVI's values: per token, over groups of elements.
    pub const fn kivi_value(bits: u32, group: u32) -> Format {
        Format::Uniform { bits, group: Some(group) }
    }

    /// TurboQuant's keys, for rotated rows.
    pub const fn turbo_key(bits: u32) -> Format {
        Format::LloydMax { bits, renormalize: true }
    }

    /// TurboQuant's values: a row with scale and min.
    pub const fn turbo_value(bits: u32) -> Format {
        Format::Uniform { bits, group: None }
    }

    /// Bits of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Format::Fp8 | Format::Int8 => 8,
            Format::Uniform { bits, .. } | Format::Channel { bits, .. } | Format::LloydMax { bits, .. } => bits,
        }
    }

    /// Bytes of the codes of a row.
    pub const fn code_bytes(self, dim: usize) -> usize {
        dim * self.bits() as usize / 8
    }

    /// Bytes of a slot that holds the row's numbers too.
    pub const fn inline_bytes(self, dim: usize) -> usize {
        self.code_bytes(dim).next_multiple_of(16) + 16
    }

    /// Groups of a row, and of a [`Format::Channel`] of a group of rows.
    pub const fn groups(self, dim: usize) -> usize {
        match self {
            Format::Uniform { group: Some(group), .. } if group > 0 => dim / group as usize,
            Format::Channel { .. } => dim,
            _ => 1,
        }
    }

    /// Numbers of a group.
    pub const fn numbers(self) -> usize {
        match self {
            Format::Uniform { .. } | Format::Channel { .. } => 2,
            _ => 1,
        }
    }

    /// Rows that share numbers: 1 but for [`Format::Channel`].
    pub const fn rows(self) -> usize {
        match self {
            Format::Channel { rows, .. } => rows as usize,
            _ => 1,
        }
    }

    /// Bytes of a token of one head, codes and numbers, with numbers of that type in an array of their own.
    pub fn bytes_per_token(self, dim: usize, numbers: DType) -> f64 {
        let numbers = (self.groups(dim) * self.numbers() * numbers.size()) as f64;
        self.code_bytes(dim) as f64 + numbers / self.rows() as f64
    }

    /// # Errors
    /// [`Error::Size`] for a `dim` outside 8 to 256, [`Error::Unsupported`] for one that is no multiple of 8, and for bits or
    /// groups that there are not.
    pub fn check(self, dim: usize) -> Result<()> {
        let refuse = |arg, what| Err(Error::Unsupported { arg, what });
        if !(8..=MOST_DIM).contains(&dim) {
            return Err(Error::Size { arg: "head_dim", got: dim as u64, min: 8, max: MOST_DIM as u64 });
        }
        if !dim.is_multiple_of(8) {
            return refuse("head_dim", "multiples of 8");
        }
        let bits = self.bits();
        match self {
            Format::LloydMax { .. } if !(2..=4).contains(&bits) => return refuse("bits", "2, 3 or 4"),
            _ if ![2, 3, 4, 8].contains(&bits) => return refuse("bits", "2, 3, 4 or 8"),
            _ => {}
        }
        match self {
            Format::Uniform { group: Some(group), .. }
                if group < 8 || !group.is_power_of_two() || !dim.is_multiple_of(group as usize) =>
            {
                refuse("group", "a power of two from 8 that divides head_dim")
            }
            Format::Channel { rows, .. } if ![32, 64, 128].contains(&rows) => refuse("group", "32, 64 or 128 rows"),
            _ => Ok(()),
        }
    }
}

/// An orthonormal rotation of rows: `R x = H (signs * x)`, with the Walsh-Hadamard transform `H` in natural order, divided by
/// the root of its size.
///
/// H has the size of a row where that is a power of two; else each block of the greatest power of two that divides it (32 of
/// 96) is transformed for itself. Queries that meet rotated keys are rotated alike, and the sums of rotated values are rotated
/// back ([`Rotate`](crate::compression::Rotate)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Rotation {
    signs: [u32; MOST_DIM / 32],
}

impl Rotation {
    /// No signs: H alone.
    pub const HADAMARD: Rotation = Rotation { signs: [0; MOST_DIM / 32] };

    /// Random signs: element k is negated where bit `k % 32` of word `k / 32 % 4` of `philox::block(seed, k / 128,
    /// ROTATION_DOMAIN, 0)` is set.
    pub fn seeded(seed: u64) -> Rotation {
        let mut signs = [0; MOST_DIM / 32];
        for (i, word) in signs.iter_mut().enumerate() {
            *word = philox::block(seed, i as u64 / 4, ROTATION_DOMAIN, 0)[i % 4];
        }
        Rotation { signs }
    }

    /// Element k is negated where `negative[k]`; those beyond are not. What is beyond 256 is not looked at.
    pub fn with_signs(negative: &[bool]) -> Rotation {
        let mut signs = [0; MOST_DIM / 32];
        for (k, _) in negative.iter().take(MOST_DIM).enumerate().filter(|(_, negative)| **negative) {
            signs[k / 32] |= 1 << (k % 32);
        }
        Rotation { signs }
    }

    /// Bit `k % 32` of word `k / 32` for element k.
    pub fn sign_words(&self) -> [u32; MOST_DIM / 32] {
        self.signs
    }

    /// Elements that H mixes, of rows of `dim`.
    pub const fn block(dim: usize) -> usize {
        dim & dim.wrapping_neg()
    }

    /// Rotates a row, in f32: what the kernels do, bit for bit.
    pub fn apply(&self, row: &mut [f32]) {
        self.flip(row);
        Self::transform(row);
    }

    /// Rotates a row back.
    pub fn invert(&self, row: &mut [f32]) {
        Self::transform(row);
        self.flip(row);
    }

    fn flip(&self, row: &mut [f32]) {
        for (k, x) in row.iter_mut().enumerate() {
            if self.signs[k / 32 % 8] >> (k % 32) & 1 == 1 {
                *x = -*x;
            }
        }
    }

    fn transform(row: &mut [f32]) {
        let block = Self::block(row.len());
        let norm = (1.0 / (block as f64).sqrt()) as f32;
        for row in row.chunks_exact_mut(block.max(1)) {
            let mut apart = 1;
            while apart < block {
                for first in (0..block).filter(|i| i & apart == 0) {
                    let (a, b) = (row[first], row[first + apart]);
                    (row[first], row[first + apart]) = (a + b, a - b);
                }
                apart *= 2;
            }
            for x in row {
                *x *= norm;
            }
        }
    }
}

/// A scalar quantizer of values that are distributed alike around 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Codebook {
    /// The positive centroids, ascending.
    pub(crate) centroids: &'static [f32],
    /// What lies in the middle between neighbours.
    pub(crate) thresholds: &'static [f32],
}

impl Codebook {
    /// The least mean square error for the normal distribution of variance 1 (J. Max, 1960; S. Lloyd, 1982): each centroid is
    /// the mean of its cell, each threshold the middle between centroids. Lloyd's iteration in f64 with the density and `erfc`
    /// in closed form, until nothing moves by more than 1e-15; a test holds both conditions against numerical integrals.
    pub(crate) fn of(bits: u32) -> Codebook {
        match bits {
            2 => Codebook { centroids: &[0.452_780_04, 1.510_417_6], thresholds: &[0.981_598_8] },
            3 => Codebook {
                centroids: &[0.245_094_18, 0.756_005_3, 1.343_909_3, 2.151_945_6],
                thresholds: &[0.500_549_73, 1.049_957_3, 1.747_927_5],
            },
            _ => Codebook {
                centroids: &[
                    0.128_395_04,
                    0.388_048_3,
                    0.656_759_14,
                    0.942_340_43,
                    1.256_231_2,
                    1.618_046_4,
                    2.069_017_2,
                    2.732_589_5,
                ],
                thresholds: &[
                    0.258_221_66,
                    0.522_403_7,
                    0.799_549_76,
                    1.099_285_8,
                    1.437_138_8,
                    1.843_531_8,
                    2.400_803_3,
                ],
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Integrals of the normal density and of it times x, by Simpson's rule.
    fn moments(from: f64, to: f64) -> (f64, f64) {
        let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let (n, width) = (4000, (to - from) / 4000.0);
        let weight = |i| {
            if i == 0 || i == n {
                1.0
            } else if i % 2 == 1 {
                4.0
            } else {
                2.0
            }
        };
        (0..=n).fold((0.0, 0.0), |(mass, first), i| {
            let x = from + f64::from(i) * width;
            let part = weight(i) * density(x) * width / 3.0;
            (mass + part, first + part * x)
        })
    }

    #[test]
    fn codebooks_are_lloyd_max_and_have_the_known_errors() {
        for (bits, error) in [(2, 0.1175), (3, 0.03454), (4, 0.009497)] {
            let Codebook { centroids, thresholds } = Codebook::of(bits);
            assert_eq!(centroids.len(), 1 << (bits - 1));
            assert_eq!(thresholds.len() + 1, centroids.len());
            let mut explained = 0.0;
            for (i, &centroid) in centroids.iter().enumerate() {
                let from = if i == 0 { 0.0 } else { f64::from(thresholds[i - 1]) };
                let to = thresholds.get(i).map_or(12.0, |&t| f64::from(t));
                let (mass, first) = moments(from, to);
                assert!(
                    (first / mass - f64::from(centroid)).abs() < 2e-7,
                    "{bits} bits: {} is not {centroid}",
                    first / mass
                );
                if let Some(&threshold) = thresholds.get(i) {
                    let middle = (f64::from(centroid) + f64::from(centroids[i + 1])) / 2.0;
                    assert!((middle - f64::from(threshold)).abs() < 2e-7);
                }
                explained += 2.0 * mass * f64::from(centroid).powi(2);
            }
            assert!((1.0 - explained - error).abs() < 1e-4, "{bits} bits: {}", 1.0 - explained);
        }
    }

    #[test]
    fn a_rotation_is_orthonormal_and_its_inverse_undoes_it() {
        for dim in [8, 64, 96, 128, 256] {
            for rotation in [Rotation::HADAMARD, Rotation::seeded(7), Rotation::with_signs(&[true, false, true])] {
                // The matrix against H[i][j] = (-1)^popcount(i & j) and the signs.
                let (block, norm) = (Rotation::block(dim), 1.0 / (Rotation::block(dim) as f64).sqrt());
                for j in 0..dim {
                    let mut row = vec![0f32; dim];
                    row[j] = 1.0;
                    rotation.apply(&mut row);
                    let negative = rotation.sign_words()[j / 32] >> (j % 32) & 1 == 1;
                    for (i, &got) in row.iter().enumerate() {
                        let odd = ((i & j) % block).count_ones() % 2 == 1;
                        let want = if i / block != j / block {
                            0.0
                        } else if odd != negative {
                            -norm
                        } else {
                            norm
                        };
                        assert!((f64::from(got) - want).abs() < 1e-7, "{dim} {i} {j}");
                    }
                    rotation.invert(&mut row);
                    let far = |(i, &x): (usize, &f32)| (f64::from(x) - f64::from(u8::from(i == j))).abs() > 1e-6;
                    assert!(!row.iter().enumerate().any(far));
                }
            }
        }
        assert_ne!(Rotation::seeded(1), Rotation::seeded(2));
        assert_eq!(Rotation::block(96), 32);
    }

    #[test]
    fn slots_have_the_documented_sizes() {
        assert_eq!(Format::Fp8.inline_bytes(128), 144);
        assert_eq!(Format::INT4.bytes_per_token(128, DType::F32), 72.0);
        assert_eq!(Format::turbo_key(3).bytes_per_token(128, DType::F16), 50.0);
        assert_eq!(Format::turbo_value(3).bytes_per_token(128, DType::F16), 52.0);
        // KIVI: 2 bits and groups of 32 are 3 bits an element.
        assert_eq!(Format::kivi_key(2, 32).bytes_per_token(128, DType::F16), 48.0);
        assert_eq!(Format::kivi_value(2, 32).bytes_per_token(128, DType::F16), 48.0);
    }

    #[test]
    fn formats_are_checked() {
        let unsupported = |format: Format, dim, name| {
            assert!(
                matches!(format.check(dim), Err(Error::Unsupported { arg, .. }) if arg == name),
                "{format:?} {dim}"
            );
        };
        for dim in [8, 64, 96, 128, 256] {
            for format in [Format::Fp8, Format::Int8, Format::INT4, Format::turbo_key(3), Format::kivi_key(2, 32)] {
                assert_eq!(format.check(dim), Ok(()));
            }
        }
        unsupported(Format::Fp8, 100, "head_dim");
        assert!(matches!(Format::Fp8.check(264), Err(Error::Size { arg: "head_dim", .. })));
        unsupported(Format::kivi_value(5, 32), 128, "bits");
        unsupported(Format::turbo_key(8), 128, "bits");
        unsupported(Format::kivi_value(2, 48), 96, "group");
        unsupported(Format::kivi_value(2, 64), 96, "group");
        unsupported(Format::kivi_value(2, 4), 96, "group");
        unsupported(Format::kivi_key(2, 16), 96, "group");
    }
}
