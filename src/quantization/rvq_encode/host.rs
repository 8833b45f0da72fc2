//! The formula on the host: the oracle of the tests.

use super::RvqEncodeArgs;
use super::plan::Plan;
use crate::dtype::{Code, Float};
use crate::quantization::codebook::{MOST_DIM, norm};

const HERE: &str = "operands are on the stream's device";
const MOST_WIDTH: usize = 1024;

/// 32 chains of four neighbours each, added in pairs.
fn project(weight: &[f32], row: &[f32], bias: f32) -> f32 {
    let mut sum = [0f32; 32];
    for (k, (&w, &x)) in weight.iter().zip(row).enumerate() {
        let chain = k / 4 % 32;
        sum[chain] = w.mul_add(x, sum[chain]);
    }
    for apart in [16, 8, 4, 2, 1] {
        for chain in 0..apart {
            sum[chain] += sum[chain + apart];
        }
    }
    bias + sum[0]
}

pub(super) fn run<X: Float, C: Code>(plan: &Plan, args: &mut RvqEncodeArgs<'_, X, C>) {
    let g = &plan.geometry;
    let input = args.input.as_host().expect(HERE);
    let book: &[f32] = bytemuck::cast_slice(&args.codebook.as_host().expect(HERE)[..g.bytes as usize]);
    let codes = args.codes.as_host().expect(HERE);
    let mut quantized = args.quantized.as_mut().map(|out| out.as_host().expect(HERE));
    let mut residual = args.residual.as_mut().map(|out| out.as_host().expect(HERE));
    let mut distances = args.distances.as_mut().map(|out| out.as_host().expect(HERE));
    let mut histogram = args.histogram.as_mut().map(|out| out.as_host().expect(HERE));
    let mut flags = args.flags.as_mut().map(|out| out.as_host().expect(HERE));
    let projections = args
        .projections
        .as_ref()
        .map(|p| [&p.in_weight, &p.in_bias, &p.out_weight, &p.out_bias].map(|view| view.as_host().expect(HERE)));

    let [batch, rows, width] = plan.input.shape();
    let (dim, latent) = (g.dim as usize, width as usize);
    let (mut left_all, mut sum_all, mut search_all) =
        ([0f32; MOST_WIDTH], [0f32; MOST_WIDTH], [0f32; MOST_DIM as usize]);
    let (left, sum, search) = (&mut left_all[..width as usize], &mut sum_all[..width as usize], &mut search_all[..dim]);
    for b in 0..batch {
        for r in 0..rows {
            for (k, x) in left.iter_mut().enumerate() {
                *x = input[plan.input.offset([b, r, k as u64]) as usize].to_f32();
            }
            sum.fill(0.0);
            for level in 0..plan.levels {
                let (at, of) = (level as usize, plan.book(level));
                match projections {
                    Some([weight, bias, ..]) => {
                        for (j, e) in search.iter_mut().enumerate() {
                            let row = at * dim + j;
                            *e = project(&weight[row * latent..][..latent], left, bias[row]);
                        }
                    }
                    None => search.copy_from_slice(left),
                }
                if g.cosine() {
                    let norm = norm(search, g.eps());
                    search.iter_mut().for_each(|x| *x /= norm);
                }

                let (mut least, mut code) = (f32::INFINITY, 0);
                for entry in 0..g.entries {
                    let mut score = 0f32;
                    for (k, x) in search.iter().enumerate() {
                        let difference = x - book[g.search(of, entry, k as u64)];
                        score = difference.mul_add(difference, score);
                    }
                    if score < least {
                        (least, code) = (score, entry);
                    }
                }

                codes[plan.codes.offset([b, level, r]) as usize] =
                    C::from_i64(code as i64).expect("the plan's type holds every code");
                if let Some(distances) = &mut distances {
                    distances[plan.distances.offset([b, level, r]) as usize] = least;
                }
                if let Some(histogram) = &mut histogram {
                    let count = &mut histogram[(level * g.entries + code) as usize];
                    *count = count.wrapping_add(1);
                }
                if let (Some(flags), true) = (&mut flags, least == f32::INFINITY) {
                    flags[0] |= crate::ffi::NXS_FLAG_ROW_NOT_FINITE;
                }
                let value = &book[g.value(of, code, 0)..][..dim];
                for k in 0..width as usize {
                    let taken = match projections {
                        Some([.., weight, bias]) => {
                            let row = at * latent + k;
                            let weights = &weight[row * dim..][..dim];
                            weights.iter().zip(value).fold(bias[row], |y, (&w, &v)| w.mul_add(v, y))
                        }
                        None => value[k],
                    };
                    left[k] -= taken;
                    sum[k] += taken;
                }
            }
            for k in 0..width as usize {
                if let Some(out) = &mut quantized {
                    out[plan.quantized.offset([b, r, k as u64]) as usize] = X::from_f32(sum[k]);
                }
                if let Some(out) = &mut residual {
                    out[plan.residual.offset([b, r, k as u64]) as usize] = X::from_f32(left[k]);
                }
            }
        }
    }
}
