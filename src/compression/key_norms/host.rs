//! The formula on the host: the oracle of the tests.

use super::super::places::HostPlaces;
use super::KeyNormsArgs;
use super::plan::Plan;
use crate::dtype::Float;

pub(super) fn run<T: Float>(plan: &Plan, args: &mut KeyNormsArgs<'_, T>) {
    const HERE: &str = "operands are on the stream's device";
    let k = args.k.as_host().expect(HERE);
    let lengths = args.lengths.as_ref().map(|view| view.as_host().expect(HERE));
    let norms = args.inverse_norms.as_host().expect(HERE);
    let sums = args.unit_sum.as_host().expect(HERE);
    let [sets, tokens, heads, dim] = plan.sizes();
    let places = HostPlaces::new(plan.places, &args.pages, plan.inverse_norms.shape());
    for (set, head) in (0..sets).flat_map(|set| (0..heads).map(move |head| (set, head))) {
        let length = places.length(set, head, lengths.map(|all| all[plan.lengths.offset([set, head]) as usize]));
        let to = plan.unit_sum.offset([set, head, 0]) as usize;
        let sum = &mut sums[to..to + dim as usize];
        if !plan.accumulate {
            sum.fill(0.0);
        }
        for j in 0..tokens {
            let norm = &mut norms[plan.inverse_norms.offset([set, head, j]) as usize];
            if j >= length {
                *norm = 0.0;
                continue;
            }
            let from = plan.k.offset([set, places.place(set, head, j), head, 0]) as usize;
            let key = &k[from..from + dim as usize];
            *norm = 1.0 / (key.iter().map(|x| x.to_f32() * x.to_f32()).sum::<f32>().sqrt() + plan.eps());
            for (sum, x) in sum.iter_mut().zip(key) {
                *sum += x.to_f32() * *norm;
            }
        }
    }
}
