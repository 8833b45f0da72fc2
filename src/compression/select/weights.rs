//! Weights by the place of a token, by FlowCache's names.

/// How much the score of an item counts by its place among `n` items: with `x = i / (n - 1)` for item `i`, or 0 if `n` is 1.
///
/// These multiply scores that are not negative: see [`SelectBuilder::relative`](super::SelectBuilder::relative). FlowCache's
/// `hard_code` is [`SelectBuilder::demote`](super::SelectBuilder::demote).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PositionWeight {
    /// 1: `no_weight`.
    None,
    /// `0.1 + 0.9 (1 - e^(-2 x)) / (1 - e^-2)`: late items count more.
    Exponential,
    /// `0.1 + 0.9 x^power`; the published power is 3.
    Polynomial(u32),
    /// `2 (1 - (1 - x)^power)`; the published power is 3.
    UpperConvexPolynomial(u32),
    /// With `g(i) = e^(-(4 i / n)² / 2)`: `0.1 + 0.9 (g(i) - g(n - 1)) / (1 - g(n - 1))`: early items count more.
    Gaussian,
}

impl PositionWeight {
    /// The weight of item `i` of `n`.
    pub fn at(self, i: usize, n: usize) -> f32 {
        let x = if n > 1 { i as f64 / (n - 1) as f64 } else { 0.0 };
        let weight = match self {
            PositionWeight::None => 1.0,
            PositionWeight::Exponential => 0.1 + 0.9 * (1.0 - (-2.0 * x).exp()) / (1.0 - (-2f64).exp()),
            PositionWeight::Polynomial(power) => 0.1 + 0.9 * x.powi(power as i32),
            PositionWeight::UpperConvexPolynomial(power) => 2.0 * (1.0 - (1.0 - x).powi(power as i32)),
            // One item: the quotient's limit.
            PositionWeight::Gaussian if n == 1 => 1.0,
            PositionWeight::Gaussian => {
                let decay = |i: usize| (-0.5 * (4.0 * i as f64 / n as f64).powi(2)).exp();
                0.1 + 0.9 * (decay(i) - decay(n - 1)) / (1.0 - decay(n - 1))
            }
        };
        weight as f32
    }

    /// The weights of `n` items: what [`SelectArgs::weights`](super::SelectArgs::weights) takes.
    pub fn table(self, n: usize) -> Vec<f32> {
        (0..n).map(|i| self.at(i, n)).collect()
    }
}
