//! The formula on the host: the oracle of the tests.

use super::super::places::HostPlaces;
use super::ImportanceArgs;
use super::plan::{Aggregation, Plan, Pool};
use crate::dtype::Float;

/// Columns that a pool reaches over, to a power of two.
const RING: usize = 64;

/// One set and head.
struct Item<'a, T> {
    plan: &'a Plan,
    q: &'a [T],
    k: &'a [T],
    rows: Option<&'a [i32]>,
    set: u64,
    head: u64,
    length: u64,
    seen: u64,
    places: &'a HostPlaces<'a>,
}

impl<T: Float> Item<'_, T> {
    /// Keys that query `i` sees.
    fn visible(&self, i: u64) -> u64 {
        let up_to = (self.length + i + 1).saturating_sub(self.plan.queries);
        if self.plan.causal { self.seen.min(up_to) } else { self.seen }
    }

    fn logit(&self, i: u64, g: u64, j: u64) -> f32 {
        let q_rows = self.plan.q.shape()[1] as i64;
        let row = self.rows.map_or(i, |rows| i64::from(rows[i as usize]).clamp(0, q_rows - 1) as u64);
        let q = self.plan.q.offset([self.set, row, self.head * self.plan.groups + g, 0]) as usize;
        let k = self.plan.k.offset([self.set, self.places.place(self.set, self.head, j), self.head, 0]) as usize;
        let dim = self.plan.k.shape()[3] as usize;
        let pairs = self.q[q..q + dim].iter().zip(&self.k[k..k + dim]);
        pairs.map(|(q, k)| q.to_f32() * k.to_f32()).sum::<f32>() * self.plan.scale()
    }

    /// The logit of a row of the statistics: of a query, or of one of its heads.
    fn row_logit(&self, row: u64, j: u64) -> f32 {
        let groups = self.plan.groups;
        match self.plan.aggregation {
            Aggregation::MaxLogit => (0..groups).map(|g| self.logit(row, g, j)).fold(f32::NEG_INFINITY, maximum),
            _ => self.logit(row / groups, row % groups, j),
        }
    }

    fn lse(&self, row: u64) -> f32 {
        let query = if self.plan.aggregation == Aggregation::MaxLogit { row } else { row / self.plan.groups };
        let logits = (0..self.visible(query)).map(|j| self.row_logit(row, j));
        let top = logits.clone().fold(f32::NEG_INFINITY, f32::max);
        let reference = if top == f32::NEG_INFINITY { 0.0 } else { top };
        reference + logits.map(|x| (x - reference).exp()).sum::<f32>().ln()
    }

    /// What query `i` adds to column `j`.
    fn share(&self, lse: &impl Fn(u64) -> f32, i: u64, j: u64) -> f32 {
        if j >= self.visible(i) {
            return 0.0;
        }
        let probability = |row| {
            let lse = lse(row);
            // A row that has seen nothing.
            if lse == f32::NEG_INFINITY { 0.0 } else { (self.row_logit(row, j) - lse).exp() }
        };
        let rows = i * self.plan.groups..(i + 1) * self.plan.groups;
        match self.plan.aggregation {
            Aggregation::MaxLogit => probability(i),
            Aggregation::MeanProb => rows.map(probability).sum(),
            Aggregation::MaxProb => rows.map(probability).fold(0.0, maximum),
            Aggregation::Logit => rows.map(|row| self.row_logit(row, j)).sum(),
        }
    }
}

/// Of a NaN and anything the NaN.
fn maximum(a: f32, b: f32) -> f32 {
    if a.is_nan() || a > b { a } else { b }
}

pub(super) fn run<T: Float>(plan: &Plan, args: &mut ImportanceArgs<'_, T>) {
    const HERE: &str = "operands are on the stream's device";
    let q = args.q.as_host().expect(HERE);
    let k = args.k.as_host().expect(HERE);
    let rows = args.rows.as_ref().filter(|_| plan.listed).map(|view| view.as_host().expect(HERE));
    let masked = args.masked.as_ref().filter(|_| plan.masked > 0).map_or(&[][..], |view| view.as_host().expect(HERE));
    let masked = &masked[..plan.masked as usize];
    let lengths = args.lengths.as_ref().map(|view| view.as_host().expect(HERE));
    let given = args.lse.as_ref().filter(|_| plan.given_lse).map(|view| view.as_host().expect(HERE));
    let scores = args.scores.as_host().expect(HERE);
    let workspace = args.workspace.as_mut().map_or(&mut [][..], |view| view.as_host().expect(HERE));
    let [sets, heads, tokens] = plan.scores.shape();
    if plan.scores_len == 0 {
        return;
    }
    let places = HostPlaces::new(plan.places, &args.pages, plan.scores.shape());
    for (set, head) in (0..sets).flat_map(|set| (0..heads).map(move |head| (set, head))) {
        let length = places.length(set, head, lengths.map(|all| all[plan.lengths.offset([set, head]) as usize]));
        let (seen, scored) = plan.seen_and_scored(length);
        let item = Item { plan, q, k, rows, set, head, length, seen, places: &places };
        let at_row = |row: u64| 4 * ((set * heads + head) * plan.stat_rows() + row) as usize;
        if plan.stats_bytes() > 0 {
            for row in 0..plan.stat_rows() {
                workspace[at_row(row)..][..4].copy_from_slice(&item.lse(row).to_ne_bytes());
            }
        }
        let lse = |row: u64| match given {
            Some(lse) => {
                let (query, group) = (row / plan.groups, row % plan.groups);
                lse[plan.lse.offset([set, head * plan.groups + group, query]) as usize]
            }
            None => f32::from_ne_bytes(workspace[at_row(row)..][..4].try_into().expect("four bytes")),
        };
        let raw = |j: u64| {
            if i32::try_from(j).is_ok_and(|j| masked.contains(&j)) {
                return f32::NEG_INFINITY;
            }
            (0..plan.queries).map(|i| item.share(&lse, i, j)).sum::<f32>() * plan.factor()
        };
        let half = match plan.pool {
            Pool::None => 0,
            Pool::Max(width) | Pool::Average(width) => u64::from(width / 2),
        };
        // The raw scores of the columns that a pool still reaches.
        let mut ring = [0f32; RING];
        for j in 0..scored.min(half) {
            ring[j as usize % RING] = raw(j);
        }
        for j in 0..tokens {
            if j + half < scored {
                ring[(j + half) as usize % RING] = raw(j + half);
            }
            let around = || (j.saturating_sub(half)..(j + half + 1).min(scored)).map(|j| ring[j as usize % RING]);
            let score = match plan.pool {
                _ if j >= scored => 0.0,
                _ if plan.protect && i32::try_from(j).is_ok_and(|j| masked.contains(&j)) => f32::INFINITY,
                Pool::None => ring[j as usize % RING],
                Pool::Max(_) => around().fold(f32::NEG_INFINITY, maximum),
                Pool::Average(width) => around().sum::<f32>() / width as f32,
            };
            let to = &mut scores[plan.scores.offset([set, head, j]) as usize];
            *to = if plan.accumulate { *to + score } else { score };
        }
    }
}
