//! The formula, dense and in f64, and how far from it a result may be.

use nextscale::DType;
use nextscale::dtype::Float;

use crate::case::{Case, Problem, Ran};

/// What a row should be, and what rounding may do to it.
struct Row {
    out: Vec<f64>,
    lse: f64,
    /// Error that each element may have.
    within: Vec<f64>,
    lse_within: f64,
}

/// The answers to a problem.
pub struct Expected {
    /// `[batch, rows, heads]`
    rows: Vec<Row>,
    /// The largest error of a plain computation in the dtype.
    plain_error: f64,
    /// Differences that are nobody's fault.
    floor: f64,
}

/// How the result was computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Path {
    /// In f64, rounded once.
    Host,
    /// As documented for kernels.
    Kernel,
}

/// Half a unit in the last place of 1, and the least positive number.
fn precision<T: Float>() -> (f64, f64) {
    match T::DTYPE {
        DType::F32 => (2f64.powi(-24), 2f64.powi(-149)),
        DType::F16 => (2f64.powi(-11), 2f64.powi(-24)),
        DType::BF16 => (2f64.powi(-8), 2f64.powi(-133)),
        other => panic!("{other} is no float"),
    }
}

/// Factors of the probabilities in the plain computation. The kernel's are relative to a maximum that need not be the
/// row's last one, nor of the row at all: no factor is special, and with 1 alone a row of one key would have no error.
/// The last two are the worst to round.
const FACTORS: [f32; 5] = [1.0, 1.37, 1.71, 1.0 + 0.98 / 256.0, 1.0 + 0.98 / 2048.0];

impl Expected {
    pub fn of<T: Float>(case: &Case, problem: &Problem<T>) -> Self {
        let keys = case.key_count();
        Self::with(case, problem, f64::from(problem.scale), |b, g, row, key| {
            problem.sees[row * keys + key] && problem.exists(case, b, g, key)
        })
    }

    /// With another scale, or another opinion of who sees whom: `sees(batch, kv_head, row, key)`.
    pub fn with<T: Float>(
        case: &Case,
        problem: &Problem<T>,
        scale: f64,
        sees: impl Fn(usize, usize, usize, usize) -> bool,
    ) -> Self {
        let (half_ulp, least) = precision::<T>();
        let (rows, heads, keys) = (case.rows(), case.heads, case.key_count());
        let floats = |values: &[T]| -> Vec<f32> { values.iter().map(|x| x.to_f32()).collect() };
        let mut expected = Expected { rows: Vec::new(), plain_error: 0.0, floor: 0.0 };
        for b in 0..case.batch {
            let of_batch = |g, of: &dyn Fn(usize) -> Vec<f32>| -> Vec<Vec<f32>> {
                let live = |&key: &usize| (0..rows).any(|row| sees(b, g, row, key));
                (0..keys).map(|key| if live(&key) { of(key) } else { Vec::new() }).collect()
            };
            let sides: Vec<_> = (0..case.kv_heads)
                .map(|g| {
                    let k = of_batch(g, &|key| floats(problem.k_of(case, b, key, g)));
                    (k, of_batch(g, &|key| floats(problem.v_of(case, b, key, g))))
                })
                .collect();
            for row in 0..rows {
                for h in 0..heads {
                    let g = h / (heads / case.kv_heads);
                    let seen: Vec<usize> = (0..keys).filter(|&key| sees(b, g, row, key)).collect();
                    let q = floats(problem.q_of(case, b, row, h));
                    let values: Vec<&[f32]> = seen.iter().map(|&key| &sides[g].1[key][..]).collect();
                    // Of each key the logit; and how far the largest may be off: by 2^-20 of what is added up.
                    let (mut logits, mut doubt) = (Vec::new(), 0f64);
                    for &key in &seen {
                        let (mut sum, mut magnitudes) = (0f64, 0f64);
                        for (&q, &k) in q.iter().zip(&sides[g].0[key]) {
                            let product = f64::from(q) * f64::from(k);
                            sum += product;
                            magnitudes += product.abs();
                        }
                        logits.push(sum * scale);
                        doubt = doubt.max(magnitudes * scale);
                    }
                    let doubt = (1.0 + doubt) * 2f64.powi(-20);
                    let (probabilities, lse) = softmax(&logits);
                    let (mut out, mut squares, mut largest) = (vec![0f64; case.dim], vec![0f64; case.dim], 0f64);
                    for (p, values) in probabilities.iter().zip(&values) {
                        for (d, &v) in values.iter().enumerate() {
                            let weighted = p * f64::from(v);
                            out[d] += weighted;
                            squares[d] += weighted * weighted;
                            largest = largest.max(f64::from(v.abs()));
                        }
                    }
                    // Doubts of the logits, and probabilities below the least of the dtype.
                    let floor = largest * (2.0 * doubt + seen.len() as f64 * least);
                    // Each probability and the result are rounded: that many independent errors add up to less than
                    // this, but for one case in 10^7.
                    let spread = |(square, out): (&f64, &f64)| 6.0 * half_ulp * (square + out * out).sqrt() + floor;
                    let within = squares.iter().zip(&out).map(spread).collect();
                    expected.floor = expected.floor.max(floor);
                    let plain_error = plain_error::<T>(&logits, &values, &out);
                    expected.plain_error = expected.plain_error.max(plain_error);
                    expected.rows.push(Row { out, lse, within, lse_within: 2e-4_f64.max(2.0 * doubt) });
                }
            }
        }
        expected
    }

    /// The whole output against the answers: every element, every gap still poisoned.
    ///
    /// A kernel's largest error is at most twice that of the plain computation, and no element is further off than its
    /// own roundings explain: 6 standard deviations of them. Log-sum-exps are within 2e-4, more only where logits
    /// beyond 100 have cancelled in f32. The host computes in f64 and rounds once.
    pub fn check<T: Float>(&self, case: &Case, problem: &Problem<T>, ran: &Ran<T>, path: Path) -> Result<(), String> {
        if ran.out.len() != problem.out.len || (case.lse && ran.lse.len() != problem.lse.len) {
            return Err("lengths".into());
        }
        let (half_ulp, least) = precision::<T>();
        let (mut out_gaps, mut lse_gaps) = (vec![true; ran.out.len()], vec![true; ran.lse.len()]);
        let mut worst = 0f64;
        let mut rows = self.rows.iter();
        for b in 0..case.batch {
            for row in 0..case.rows() {
                for h in 0..case.heads {
                    let expected = rows.next().unwrap();
                    let nothing = expected.lse == f64::NEG_INFINITY;
                    let first = problem.out.at(b, row, h);
                    for d in 0..case.dim {
                        let (actual, right) = (f64::from(ran.out[first + d].to_f32()), expected.out[d]);
                        let error = (actual - right).abs();
                        let within = match path {
                            _ if nothing => 0.0,
                            Path::Host => half_ulp * right.abs() * 1.001 + least + 1e-12,
                            Path::Kernel => expected.within[d],
                        };
                        if error.is_nan() || error > within {
                            return Err(format!(
                                "batch {b}, row {row}, head {h}, element {d}: {actual} instead of {right} +- {within}"
                            ));
                        }
                        worst = worst.max(error);
                        out_gaps[first + d] = false;
                    }
                    if case.lse {
                        let at = problem.lse.at(b, h, row);
                        let (actual, right) = (f64::from(ran.lse[at]), expected.lse);
                        let within = match path {
                            Path::Host => right.abs() * 1e-7,
                            Path::Kernel => expected.lse_within,
                        };
                        if !(actual == right || (actual - right).abs() <= within) {
                            return Err(format!(
                                "lse of batch {b}, head {h}, row {row}: {actual} instead of {right} +- {within}"
                            ));
                        }
                        lse_gaps[at] = false;
                    }
                }
            }
        }
        if path == Path::Kernel && worst > 2.0 * self.plain_error + self.floor {
            return Err(format!("an error of {worst}, of a plain computation {}", self.plain_error));
        }
        let written = |value: &[u8]| value.iter().any(|&byte| byte != crate::support::POISON_BYTE);
        for (at, _) in out_gaps.iter().enumerate().filter(|(_, gap)| **gap) {
            if written(bytemuck::bytes_of(&ran.out[at])) {
                return Err(format!("out written at {at}, which is no element of it"));
            }
        }
        for (at, _) in lse_gaps.iter().enumerate().filter(|(_, gap)| **gap) {
            if written(bytemuck::bytes_of(&ran.lse[at])) {
                return Err(format!("lse written at {at}, which is no element of it"));
            }
        }
        Ok(())
    }
}

fn softmax(logits: &[f64]) -> (Vec<f64>, f64) {
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if logits.is_empty() {
        return (Vec::new(), most);
    }
    let weights: Vec<f64> = logits.iter().map(|logit| (logit - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    (weights.iter().map(|weight| weight / total).collect(), most + total.ln())
}

/// The error of a row as PyTorch's dense attention computes it: sums and softmax in f32, probabilities rounded to `T`,
/// the result too.
fn plain_error<T: Float>(logits: &[f64], values: &[&[f32]], right: &[f64]) -> f64 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |most, &logit| most.max(logit as f32));
    let weights: Vec<f32> = logits.iter().map(|&logit| (logit as f32 - most).exp()).collect();
    let total: f32 = weights.iter().sum();
    let mut worst = 0f64;
    for factor in FACTORS {
        let mut sums = vec![0f32; right.len()];
        for (weight, values) in weights.iter().zip(values) {
            let p = T::from_f32(weight / total * factor).to_f32();
            sums.iter_mut().zip(*values).for_each(|(sum, v)| *sum += p * v);
        }
        for (sum, right) in sums.iter().zip(right) {
            worst = worst.max((f64::from(T::from_f32(sum / factor).to_f32()) - right).abs());
        }
    }
    worst
}
