//! The binary logarithm and exponential variates, operation by operation, so that host and kernels agree bit for bit
//! (`kernels/verification/log2.cuh` is the same).

/// About sqrt(1/2), as bits.
const ROOT_HALF: u32 = 0x3f35_04f3;

/// log2(1 + t) for 1 + t from sqrt(1/2) to sqrt(2): t times the polynomial of degree 8 of least relative error, 2.6e-8
/// before rounding.
fn log2_of_one_plus(t: f32) -> f32 {
    t * polynomial(t)
}

fn polynomial(t: f32) -> f32 {
    const C: [u32; 9] = [
        0x3fb8_aa3b,
        0xbf38_aa38,
        0x3ef6_39eb,
        0xbeb8_ae27,
        0x3e93_69c2,
        0xbe74_adf4,
        0x3e5c_e48d,
        0xbe54_3e84,
        0x3e00_db6b,
    ];
    let [c0, c1, c2, c3, c4, c5, c6, c7, c8] = C.map(f32::from_bits);
    let high = c8.mul_add(t, c7).mul_add(t, c6).mul_add(t, c5);
    high.mul_add(t, c4).mul_add(t, c3).mul_add(t, c2).mul_add(t, c1).mul_add(t, c0)
}

/// Of a positive, normal number: relative error below 2^-21, also beside 1.
pub(crate) fn log2(x: f32) -> f32 {
    let shifted = x.to_bits().wrapping_sub(ROOT_HALF);
    let exponent = (shifted as i32) >> 23;
    let t = f32::from_bits((shifted & 0x7f_ffff) + ROOT_HALF) - 1.0;
    t.mul_add(polynomial(t), exponent as f32)
}

/// An exponential variate (in units of ln 2) of a random word: -log2(u), u = (word + 1/2) / 2^32. Never 0, and as fine beside
/// 0 as the word is.
pub(crate) fn exponential(word: u32) -> f32 {
    const SCALE: f32 = 1.0 / 4_294_967_296.0;
    if word >= 0xb504_f334 {
        -log2_of_one_plus((!word as f32 + 0.5) * -SCALE)
    } else {
        -log2((word as f32 + 0.5) * SCALE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn within_their_errors() {
        let mut word = 1u32;
        for i in 0..200_000u32 {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let word = match i % 4 {
                0 => word >> (i / 4 % 32),
                1 => !(word >> (i / 4 % 32)),
                _ => word,
            };
            let exact = -((f64::from(word) + 0.5) / 4_294_967_296.0).log2();
            let got = f64::from(exponential(word));
            assert!(got > 0.0 && (got / exact - 1.0).abs() < 4e-7, "{word}: {got} {exact}");
            let x = f32::from_bits(0x0080_0000 + word % 0x7e00_0000);
            let exact = f64::from(x).log2();
            assert!((f64::from(log2(x)) - exact).abs() <= exact.abs() * 4e-7 + 1e-12, "{x}: {} {exact}", log2(x));
        }
        assert_eq!(log2(1.0), 0.0);
    }
}
