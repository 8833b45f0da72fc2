//! The definitions, on the host.

use super::PooledVerifierArgs;
use super::plan::Plan;
use crate::dtype::{Element, Float};
use crate::verification::Neighbours;
use crate::verification::host_rows::{distribution, guide};
use crate::verification::rows::{LANES, Partial, Scale, Shape, Truncation, chunks, key_bits, scan};
use crate::view::In;

const HERE: &str = "operands are on the stream's device";

fn slice<'a, T: Element>(view: &'a Option<In<'_, T>>) -> Option<&'a [T]> {
    view.as_ref().map(|view| view.as_host().expect(HERE))
}

pub(super) fn run<T: Float>(plan: &Plan, args: &mut PooledVerifierArgs<'_, T>) {
    let options = &args.options;
    let (target, free) = (args.target.as_host().expect(HERE), slice(&options.target_free));
    let drafts = args.drafts.as_host().expect(HERE);
    let number =
        |view: &Option<In<'_, f32>>, b: usize, otherwise: f32| slice(view).map_or(otherwise, |numbers| numbers[b]);
    let resample = args.out.resample.as_host().expect(HERE);
    let counts = args.out.counts.as_host().expect(HERE);
    let statuses = args.out.status.as_host().expect(HERE);
    let mut positions = args.out.positions.as_mut().map(|view| view.as_host().expect(HERE));
    let mut islands = args.out.islands.as_mut().map(|view| view.as_host().expect(HERE));
    let mut pooled_out = args.out.pooled.as_mut().map(|view| view.as_host().expect(HERE));
    let of_row = chunks(plan.vocab) as usize;
    let workspace = args.workspace.as_host().expect(HERE);
    let (labels, rest) = workspace.split_at_mut((plan.rows() as usize * 12).next_multiple_of(16));
    let labels: &mut [i32] = bytemuck::cast_slice_mut(&mut labels[..plan.rows() as usize * 4]);
    let partials: &mut [Partial] = bytemuck::cast_slice_mut(&mut rest[..of_row * 8]);

    let (tokens, width, height) = (plan.tokens() as usize, plan.width as usize, plan.height as usize);
    let bits = if plan.guided { 32 } else { key_bits(T::DTYPE) };
    let code_of = |token: u64| token.checked_sub(plan.first_code).filter(|&code| code < plan.codes);
    let neighbour = |code: u64, n: usize| {
        let at = code as usize * plan.neighbours_stride as usize + n;
        let code = match options.neighbours.as_ref().expect("there are neighbours") {
            Neighbours::U16(view) => i64::from(view.as_host().expect(HERE)[at]),
            Neighbours::I32(view) => i64::from(view.as_host().expect(HERE)[at]),
        };
        (0..plan.codes as i64).contains(&code).then(|| plan.first_code + code as u64)
    };
    for b in 0..plan.batch as usize {
        let scale = Scale::of(number(&options.temperature, b, 1.0));
        let guidance = number(&options.guidance, b, 1.0);
        let threshold = number(&options.threshold, b, f32::from_bits(plan.threshold));
        let truncation = Truncation {
            top_k: slice(&options.top_k).map_or(0, |of| of[b].max(0) as u32),
            top_p: number(&options.top_p, b, 1.0),
            min_p: number(&options.min_p, b, 0.0),
        };
        let first = b * tokens;
        statuses[b] = 0;
        for r in first..first + tokens {
            let logit = |column: u64| {
                if column >= plan.vocab {
                    return f32::NEG_INFINITY;
                }
                let at = r * plan.target_stride as usize + column as usize;
                let with = target[at].to_f32();
                free.map_or(with, |free| guide(with, free[at].to_f32(), guidance))
            };
            let (p, said) = distribution(partials, scale.as_ref(), &truncation, bits, plan.vocab, logit);
            statuses[b] |= said;
            let weight = |token: u64| p.weight(token, logit(token));
            let drafted = u64::try_from(drafts[r]).ok().filter(|&d| d < plan.vocab);
            let pooled = drafted.filter(|_| p.summary.shape != Shape::Empty).map(|d| {
                let mut sum = 0f32;
                if let Some(code) = code_of(d) {
                    for group in (0..plan.neighbours as usize).step_by(LANES) {
                        let weights = core::array::from_fn(|lane| {
                            let n = group + lane;
                            let token = (n < plan.neighbours as usize).then(|| neighbour(code, n)).flatten();
                            token.map_or(0.0, weight)
                        });
                        sum += scan(weights)[LANES - 1];
                    }
                }
                weight(d) + sum
            });
            let accepted = pooled.is_some_and(|pooled| pooled >= threshold * p.sum());
            resample[r] = u8::from(!accepted);
            if let Some(out) = &mut pooled_out {
                out[r] = pooled.map_or(0.0, |pooled| pooled / p.sum());
            }
        }
        // What lies near a rejected token and behind it.
        let of_request = &mut resample[first..first + tokens];
        let radius = plan.radius as usize;
        for t in 0..tokens {
            if of_request[t] != 1 {
                continue;
            }
            let (row, column) = (t / width, t % width);
            for y in row..(row + radius + 1).min(height) {
                for x in column.saturating_sub(radius)..(column + radius + 1).min(width) {
                    let u = y * width + x;
                    if u > t && of_request[u] == 0 {
                        of_request[u] = 2;
                    }
                }
            }
        }
        // Islands: each token's label becomes the least token of its island.
        let labels = &mut labels[first..first + tokens];
        for (t, label) in labels.iter_mut().enumerate() {
            *label = if of_request[t] > 0 { t as i32 } else { -1 };
        }
        let mut changed = true;
        while changed {
            changed = false;
            for t in (0..tokens).filter(|&t| of_request[t] > 0) {
                let (row, column) = (t / width, t % width);
                for y in row.saturating_sub(1)..(row + 2).min(height) {
                    for x in column.saturating_sub(1)..(column + 2).min(width) {
                        let other = labels[y * width + x];
                        if other >= 0 && other < labels[t] {
                            labels[t] = other;
                            changed = true;
                        }
                    }
                }
            }
        }
        let (mut listed, mut numbered) = (0, 0);
        for t in 0..tokens {
            let root = labels[t];
            if let Some(islands) = &mut islands {
                islands[first + t] = match root {
                    -1 => -1,
                    _ if root as usize == t => numbered,
                    // Less than this one: it has its number.
                    _ => islands[first + root as usize],
                };
            }
            numbered += i32::from(root == t as i32);
            if root >= 0 {
                if let Some(positions) = &mut positions {
                    positions[first + listed] = t as i32;
                }
                listed += 1;
            }
        }
        if let Some(positions) = &mut positions {
            positions[first + listed..first + tokens].fill(-1);
        }
        counts[b * 2..][..2].copy_from_slice(&[listed as i32, numbered]);
    }
}
