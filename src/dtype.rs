//! Element types of tensors.

use core::fmt;

use bytemuck::{Pod, Zeroable};
pub use half::{bf16, f16};

pub(crate) mod sealed {
    /// Only the crate names it.
    pub trait Sealed {}
}

/// A dtype as a value; the numbers are those of the C ABI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(i32)]
#[allow(missing_docs)]
pub enum DType {
    F32 = 0,
    F16 = 1,
    BF16 = 2,
    F8E4M3 = 3,
    I8 = 4,
    U8 = 5,
    U16 = 6,
    I32 = 7,
    U32 = 8,
    I64 = 9,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F8E4M3 | DType::I8 | DType::U8 => 1,
            DType::F16 | DType::BF16 | DType::U16 => 2,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::I64 => 8,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F8E4M3 => "f8_e4m3",
            DType::I8 => "i8",
            DType::U8 => "u8",
            DType::U16 => "u16",
            DType::I32 => "i32",
            DType::U32 => "u32",
            DType::I64 => "i64",
        })
    }
}

/// A type that a tensor can hold. Sealed: the kernels know just these.
///
/// ```compile_fail,E0277
/// #[derive(Clone, Copy, Debug, PartialEq, bytemuck::Zeroable, bytemuck::Pod)]
/// #[repr(transparent)]
/// struct Mine(u8);
///
/// impl nextscale::dtype::Element for Mine {
///     const DTYPE: nextscale::DType = nextscale::DType::U8;
/// }
/// ```
pub trait Element: sealed::Sealed + Pod + PartialEq + fmt::Debug + Send + Sync {
    /// The dtype as a value.
    const DTYPE: DType;
}

/// Floating-point storage types of activations, weights and caches: `f32`, [`struct@f16`], [`bf16`].
pub trait Float: Element {
    /// Exact.
    fn to_f32(self) -> f32;
    /// Rounds to nearest even; overflow gives infinity.
    fn from_f32(value: f32) -> Self;
}

/// Index types of codes: `u16` (smallest), `u32` (candle), `i64` (PyTorch).
pub trait Code: Element {
    /// Exact.
    fn to_i64(self) -> i64;
    /// `None` if it does not fit.
    fn from_i64(value: i64) -> Option<Self>;
}

macro_rules! elements {
    ($($type:ty => $dtype:ident),* $(,)?) => {$(
        impl sealed::Sealed for $type {}
        impl Element for $type { const DTYPE: DType = DType::$dtype; }
    )*};
}
elements! {
    f32 => F32, f16 => F16, bf16 => BF16, F8E4M3 => F8E4M3,
    i8 => I8, u8 => U8, u16 => U16, i32 => I32, u32 => U32, i64 => I64,
}

impl Float for f32 {
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
}
impl Float for f16 {
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}
impl Float for bf16 {
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

macro_rules! codes {
    ($($type:ty),*) => {$(
        impl Code for $type {
            fn to_i64(self) -> i64 { self.into() }
            fn from_i64(value: i64) -> Option<Self> { value.try_into().ok() }
        }
    )*};
}
codes!(u16, u32, i64);

/// 8-bit float, 4 exponent and 3 mantissa bits, bias 7, no infinity, `S.1111.111` is NaN, greatest value 448 (OCP FP8).
///
/// Equality compares bits.
#[derive(Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct F8E4M3(pub u8);

impl F8E4M3 {
    /// Exact.
    pub fn to_f32(self) -> f32 {
        let (sign, exponent, mantissa) = (self.0 >> 7, (self.0 >> 3) & 15, self.0 & 7);
        let magnitude = match (exponent, mantissa) {
            (15, 7) => f32::NAN,
            (0, m) => f32::from(m) / 512.0,
            (e, m) => (1.0 + f32::from(m) / 8.0) * 2f32.powi(i32::from(e) - 7),
        };
        if sign == 1 { -magnitude } else { magnitude }
    }

    /// Rounds to nearest even and saturates: beyond 448, infinities included, gives 448 with the sign kept.
    /// This is `cvt.rn.satfinite.e4m3x2.f32`.
    pub fn from_f32(value: f32) -> Self {
        let sign = if value.is_sign_negative() { 0x80 } else { 0 };
        let magnitude = value.abs();
        if magnitude.is_nan() {
            return F8E4M3(sign | 0x7f);
        }
        if magnitude >= 448.0 {
            return F8E4M3(sign | 0x7e);
        }
        // Units of the last place: 2^-9 among subnormals, else 2^(exponent - 3). Scaling by a power of two is exact.
        let exponent = (((magnitude.to_bits() >> 23) as i32) - 127).max(-6);
        let steps = (magnitude * 2f32.powi(3 - exponent)).round_ties_even() as i32;
        // Steps of 16 carry into the exponent by themselves, for the code is monotonic.
        let code = ((exponent + 6) * 8 + steps).min(0x7e);
        F8E4M3(sign | code as u8)
    }
}

impl fmt::Debug for F8E4M3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to_f32())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f8_round_trips_every_code() {
        for code in 0..=255u8 {
            let value = F8E4M3(code).to_f32();
            assert_eq!(F8E4M3::from_f32(value).0, code, "{value}");
        }
    }

    /// Against a search over all codes for the nearest, ties to the even mantissa.
    #[test]
    fn f8_rounds_to_nearest_even() {
        let codes: Vec<(f32, u8)> = (0..0x7f).map(|c| (F8E4M3(c).to_f32(), c)).collect();
        let mut x = 1e-4f32;
        while x < 460.0 {
            for value in [x, F8E4M3::from_f32(x).to_f32() * (1.0 + 1.0 / 16.0)] {
                let best = codes
                    .iter()
                    .min_by(|a, b| {
                        let distance = |c: &(f32, u8)| (f64::from(c.0) - f64::from(value)).abs();
                        distance(a).total_cmp(&distance(b)).then((a.1 & 1).cmp(&(b.1 & 1)))
                    })
                    .unwrap();
                assert_eq!(F8E4M3::from_f32(value).0, best.1, "{value}");
                assert_eq!(F8E4M3::from_f32(-value).0, best.1 | 0x80, "-{value}");
            }
            x *= 1.003;
        }
        assert_eq!(F8E4M3::from_f32(f32::INFINITY).0, 0x7e);
        assert_eq!(F8E4M3::from_f32(f32::NAN).0 & 0x7f, 0x7f);
    }

    #[test]
    fn sizes_are_those_of_the_types() {
        fn check<T: Element>() {
            assert_eq!(T::DTYPE.size(), size_of::<T>());
        }
        check::<f32>();
        check::<f16>();
        check::<bf16>();
        check::<F8E4M3>();
        check::<i8>();
        check::<u8>();
        check::<u16>();
        check::<i32>();
        check::<u32>();
        check::<i64>();
    }
}
