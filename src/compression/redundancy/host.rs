//! The formula on the host: the oracle of the tests.

use super::super::places::HostPlaces;
use super::RedundancyArgs;
use super::plan::{Kind, Neighbour, Plan};
use crate::dtype::Float;

pub(super) fn run<T: Float>(plan: &Plan, args: &mut RedundancyArgs<'_, T>) {
    const HERE: &str = "operands are on the stream's device";
    let k = args.k.as_host().expect(HERE);
    let norms = args.inverse_norms.as_host().expect(HERE);
    let sums = args.unit_sum.as_host().expect(HERE);
    let lengths = args.lengths.as_ref().map(|view| view.as_host().expect(HERE));
    let scores = args.scores.as_host().expect(HERE);
    let workspace = args.workspace.as_mut().map_or(&mut [][..], |view| view.as_host().expect(HERE));
    let [sets, tokens, heads, dim] = plan.sizes();
    if plan.scores_len == 0 {
        return;
    }
    let places = HostPlaces::new(plan.places, &args.pages, plan.scores.shape());
    for (set, head) in (0..sets).flat_map(|set| (0..heads).map(move |head| (set, head))) {
        let length = places.length(set, head, lengths.map(|all| all[plan.lengths.offset([set, head]) as usize]));
        let key = |j: u64| &k[plan.k.offset([set, places.place(set, head, j), head, 0]) as usize..][..dim as usize];
        let norm = |j: u64| norms[plan.inverse_norms.offset([set, head, j]) as usize];
        let sum = &sums[plan.unit_sum.offset([set, head, 0]) as usize..][..dim as usize];
        let to_sum = |j: u64| key(j).iter().zip(sum).map(|(x, s)| x.to_f32() * s).sum::<f32>() * norm(j);
        let cosine = |i: u64, j: u64| {
            let dot: f32 = key(i).iter().zip(key(j)).map(|(a, b)| a.to_f32() * b.to_f32()).sum();
            dot * norm(i) * norm(j)
        };
        let to = plan.scores.offset([set, head, 0]) as usize;
        let scores = &mut scores[to..to + tokens as usize];
        scores[length as usize..].fill(0.0);
        let scores = &mut scores[..length as usize];
        match plan.form {
            Kind::Anchor { softmax } => {
                let size = sum.iter().map(|s| s * s).sum::<f32>().sqrt();
                for (j, score) in scores.iter_mut().enumerate() {
                    *score = match softmax {
                        true => to_sum(j as u64) / length as f32,
                        false if size == 0.0 => 0.0,
                        false => to_sum(j as u64) / size,
                    };
                }
                if !softmax {
                    continue;
                }
            }
            Kind::Similar { threshold, neighbour, lonely } => {
                let threshold = f32::from_bits(threshold);
                let retained = |i: u64| {
                    let hit = |&j: &u64| i != j && cosine(i, j) > threshold;
                    let found = match neighbour {
                        Neighbour::First => (0..length).find(hit),
                        _ => match neighbour.nth(length) {
                            0 => None,
                            nth => (0..length).rev().filter(hit).nth(nth as usize - 1),
                        },
                    };
                    found.or(lonely.then_some(0))
                };
                let at = |i: u64| ((set * heads + head) * plan.retained_row() + i) as usize * 8;
                for i in 0..length {
                    let key = retained(i).map_or(-1, |j| j as i32);
                    workspace[at(i)..][..4].copy_from_slice(&key.to_ne_bytes());
                }
                for (j, score) in scores.iter_mut().enumerate() {
                    let kept = |&i: &u64| {
                        let key: [u8; 4] = workspace[at(i)..][..4].try_into().expect("four bytes");
                        i != j as u64 && i32::from_ne_bytes(key) != j as i32
                    };
                    *score = (0..length).filter(kept).map(|i| cosine(i, j as u64)).sum::<f32>() / length as f32;
                    // A NaN says so also where it is left out as the key's own.
                    if cosine(j as u64, j as u64).is_nan() {
                        *score = f32::NAN;
                    }
                }
            }
        }
        // None leaves -1 to 1: no maximum is needed.
        scores.iter_mut().for_each(|score| *score = score.exp());
        let total: f32 = scores.iter().sum();
        scores.iter_mut().for_each(|score| *score /= total);
    }
}
