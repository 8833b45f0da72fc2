//! The selection on the host, from the formula: a threshold by halving, then one walk in order.

use super::SelectArgs;
use super::plan::{Kind, Plan};
use super::status;

const HERE: &str = "operands are on the stream's device";
const LANES: usize = 32;

/// Integers in the order of the floats; NaN is 0.
fn key(score: f32) -> u32 {
    let bits = (score + 0.0).to_bits();
    match score.is_nan() {
        true => 0,
        false if bits >> 31 == 1 => !bits,
        false => bits | 0x8000_0000,
    }
}

struct Scores<'a> {
    plan: &'a Plan,
    importance: Option<&'a [f32]>,
    redundancy: Option<&'a [f32]>,
}

impl Scores<'_> {
    fn raw(&self, set: u64, head: u64, token: u64) -> f32 {
        let a = self.importance.map(|scores| scores[self.plan.importance.offset([set, head, token]) as usize]);
        let b = self.redundancy.map(|scores| scores[self.plan.redundancy.offset([set, head, token]) as usize]);
        let lambda = self.plan.lambda();
        match (a, b) {
            (Some(a), Some(b)) => lambda.mul_add(a, -((1.0 - lambda) * b)),
            (Some(a), None) => a,
            (None, Some(b)) => -b,
            (None, None) => 0.0,
        }
    }

    /// Over the sets and heads of a list.
    fn aggregated(&self, list: u64, token: u64) -> f32 {
        let (plan, all) = (self.plan, self.plan.heads());
        let (sets, heads) = match plan.scope {
            Kind::Shared => (0..plan.sets(), 0..all),
            Kind::PerSet => (list..list + 1, 0..all),
            Kind::PerHead | Kind::Ada => (list / all..list / all + 1, list % all..list % all + 1),
        };
        let part = 1.0 / (heads.end - heads.start) as f32;
        let mut total = 0f32;
        for set in sets {
            total += heads.clone().map(|head| self.raw(set, head, token)).fold(0f32, |sum, x| sum + x) * part;
        }
        total
    }

    /// The mean over the tokens of an item, in the order of a warp.
    fn of_item(&self, list: u64, item: u64, length: u64) -> f32 {
        let begin = item * self.plan.block;
        let tokens = self.plan.block.min(length - begin);
        if self.plan.block == 1 {
            return self.aggregated(list, begin);
        }
        let mut lanes = [0f32; LANES];
        for i in 0..tokens {
            lanes[i as usize % LANES] += self.aggregated(list, begin + i);
        }
        for distance in [16, 8, 4, 2, 1] {
            let before = lanes;
            for lane in 0..LANES {
                lanes[lane] = before[lane] + before[lane ^ distance];
            }
        }
        lanes[0] / tokens as f32
    }
}

/// What of a list is kept, in items.
#[derive(Clone, Copy)]
struct Quota {
    length: u64,
    /// Tokens of the first rows, which a compression left, and rows after them that hold none.
    first_rows: [u64; 2],
    items: u64,
    /// Candidates.
    first: u64,
    end: u64,
    kept: u64,
    clamped: bool,
}

impl Quota {
    fn of(plan: &Plan, list: u64, lengths: Lengths<'_>, budgets: Option<&[i32]>) -> Self {
        let most = plan.capacity - plan.active;
        let read = |array: &[i32], most: u64| {
            let asked = i64::from(array[list as usize]);
            let clamped = asked.clamp(0, most as i64);
            (clamped as u64, clamped != asked)
        };
        let first_rows = plan.first_rows;
        let (mut first, mut length_clamped) = (0, false);
        let length = match lengths {
            Lengths::Planned => plan.length,
            Lengths::Given(array) => {
                let (length, clamped) = read(array, plan.tokens());
                length_clamped = clamped;
                length
            }
            Lengths::First(array) => {
                (first, length_clamped) = read(array, first_rows);
                plan.tokens() - first_rows + first
            }
        };
        let (budget, budget_clamped) = budgets.map_or((plan.budget.min(most), false), |array| read(array, most));
        let first_rows = [first, first_rows - first];
        Self::with_budget(plan, length, first_rows, budget, length_clamped || budget_clamped)
    }

    fn row(&self, token: u64) -> u64 {
        let [first, skipped] = self.first_rows;
        if token < first { token } else { token + skipped }
    }

    fn with_budget(plan: &Plan, length: u64, first_rows: [u64; 2], budget: u64, clamped: bool) -> Self {
        let items = length.div_ceil(plan.block);
        let budget = if budget >= length { items } else { budget / plan.block };
        let recent = match plan.recent {
            0 => 0,
            recent => items - length.saturating_sub(recent) / plan.block,
        };
        let first = plan.sink.div_ceil(plan.block).min(budget).min(items);
        let recent = recent.min(budget - first).min(items - first);
        let end = items - recent;
        Quota { length, first_rows, items, first, end, kept: (budget - first - recent).min(end - first), clamped }
    }
}

/// How long lists are.
#[derive(Clone, Copy)]
enum Lengths<'a> {
    /// As the plan says.
    Planned,
    /// As it is given.
    Given(&'a [i32]),
    /// As the first rows are, with the rest.
    First(&'a [i32]),
}

/// Keys above `key` are kept, and `need` of those that equal it.
#[derive(Clone, Copy)]
struct Threshold {
    key: u32,
    need: u64,
    equal: u64,
}

/// The threshold that keeps `kept` (at least 1) of what `count` counts: keys of at least a value.
fn threshold(kept: u64, count: impl Fn(u32) -> u64) -> Threshold {
    let mut key = 0;
    for bit in (0..32).rev() {
        let higher = key | 1 << bit;
        if count(higher) >= kept {
            key = higher;
        }
    }
    let above = if key == u32::MAX { 0 } else { count(key + 1) };
    Threshold { key, need: kept - above, equal: count(key) - above }
}

/// Whether the `rank`-th of equal keys is kept.
fn keeps(threshold: Threshold, newest: bool, rank: u64) -> bool {
    if newest { rank >= threshold.equal - threshold.need } else { rank < threshold.need }
}

/// Ada-KV: heads earn what they have above the threshold of the whole set, and get a part evenly.
struct Split<'a> {
    scores: &'a Scores<'a>,
    lists: &'a Lists<'a>,
    lengths: Lengths<'a>,
    budgets: Option<&'a [i32]>,
}

impl Split<'_> {
    fn run(&self, set: u64, to: &mut [i32]) {
        let plan = self.scores.plan;
        let heads = plan.heads();
        let quota = |head| Quota::of(plan, set * heads + head, self.lengths, self.budgets);
        let key = |head: u64, item: u64| key(self.lists.score(set * heads + head, item, 0.0));
        let of_head = |head: u64, least: u32| {
            let quota = quota(head);
            (quota.first..quota.end).filter(|&item| key(head, item) >= least).count() as u64
        };
        let kept: u64 = (0..heads).map(|head| quota(head).kept).sum();
        let found = (kept > 0).then(|| threshold(kept, |least| (0..heads).map(|head| of_head(head, least)).sum()));
        let mut rank = 0;
        let mut left = kept;
        // In units of 2^-16. All shares are `kept`: the largest remainders fill up what rounding down left.
        let mut share = |head: u64| {
            let count = found.map_or(0, |found| {
                let above = if found.key == u32::MAX { 0 } else { of_head(head, found.key + 1) };
                let equal = of_head(head, found.key) - above;
                let kept = (rank..rank + equal).filter(|&rank| keeps(found, plan.newest, rank)).count() as u64;
                rank += equal;
                above + kept
            });
            let even = u64::from(plan.floor_alpha);
            count * (65536 - even) + quota(head).kept * even
        };
        let mut shares = [0u64; 1024];
        for head in 0..heads {
            shares[head as usize] = share(head);
            left -= shares[head as usize] >> 16;
        }
        let rest = |head: u64| shares[head as usize] & 0xffff;
        for head in 0..heads {
            let before = |other: u64| rest(other) > rest(head) || (rest(other) == rest(head) && other < head);
            let rank = (0..heads).filter(|&other| before(other)).count() as u64;
            let quota = quota(head);
            let share = (shares[head as usize] >> 16) + u64::from(rank < left);
            to[head as usize] = (quota.first + (quota.items - quota.end) + share) as i32;
        }
    }
}

/// Scores of items, final but for the least one.
struct Lists<'a> {
    scores: &'a Scores<'a>,
    /// Raw scores, if they were averaged.
    averaged: Option<&'a [f32]>,
    weights: Option<&'a [f32]>,
}

impl Lists<'_> {
    fn raw(&self, list: u64, item: u64) -> f32 {
        let plan = self.scores.plan;
        match self.averaged {
            Some(averaged) => averaged[(list * plan.workspace_stride() + item) as usize],
            None => self.scores.raw(list / plan.heads(), list % plan.heads(), item),
        }
    }

    fn score(&self, list: u64, item: u64, least: f32) -> f32 {
        let plan = self.scores.plan;
        let mut score = self.raw(list, item);
        if plan.relative {
            score -= least;
        }
        if let Some(weights) = self.weights {
            score *= weights[item as usize];
        }
        if item < plan.demoted {
            score -= plan.demotion();
        }
        score
    }
}

fn lengths_of<'a>(plan: &Plan, given: Option<&'a [i32]>, counts: &'a [i32]) -> Lengths<'a> {
    match given {
        _ if plan.first_rows > 0 => Lengths::First(counts),
        Some(given) => Lengths::Given(given),
        None => Lengths::Planned,
    }
}

pub(super) fn run(plan: &Plan, args: &mut SelectArgs<'_>) {
    let counts = args.counts.as_host().expect(HERE);
    let given = args.lengths.as_ref().map(|view| view.as_host().expect(HERE));
    let budgets = args.budgets.as_ref().map(|view| view.as_host().expect(HERE));
    let weights = args.weights.as_ref().map(|view| view.as_host().expect(HERE));
    let scores = Scores {
        plan,
        importance: args.importance.as_ref().map(|view| view.as_host().expect(HERE)),
        redundancy: args.redundancy.as_ref().map(|view| view.as_host().expect(HERE)),
    };
    let workspace = args.workspace.as_mut().map_or(&mut [][..], |view| view.as_host().expect(HERE));
    let workspace = &mut workspace[..plan.workspace_bytes() as usize];
    let lists = plan.lists();
    let mut averaged = None;
    let mut split: Option<&[i32]> = None;
    if plan.aggregates() {
        let to: &mut [f32] = bytemuck::cast_slice_mut(workspace);
        let lengths = lengths_of(plan, given, counts);
        for list in 0..lists {
            let quota = Quota::of(plan, list, lengths, budgets);
            for item in 0..quota.items {
                to[(list * plan.workspace_stride() + item) as usize] = scores.of_item(list, item, quota.length);
            }
        }
        averaged = Some(&*to);
    } else if plan.scope == Kind::Ada {
        let to: &mut [i32] = bytemuck::cast_slice_mut(workspace);
        let lengths = lengths_of(plan, given, counts);
        let of_set = Lists { scores: &scores, averaged: None, weights };
        let of_set = Split { scores: &scores, lists: &of_set, lengths, budgets };
        for set in 0..plan.sets() {
            of_set.run(set, &mut to[(set * plan.heads()) as usize..]);
        }
        split = Some(&*to);
    }
    let of_list = Lists { scores: &scores, averaged, weights };
    let indices = args.indices.as_host().expect(HERE);
    let mut statuses = args.status.as_mut().map(|view| view.as_host().expect(HERE));
    for list in 0..lists {
        let mut quota = Quota::of(plan, list, lengths_of(plan, given, counts), budgets);
        if let Some(split) = split {
            let (budget, most) = (split[list as usize] as u64, plan.capacity - plan.active);
            let clamped = quota.clamped || budget > most;
            quota = Quota::with_budget(plan, quota.length, quota.first_rows, budget.min(most), clamped);
        }
        let candidates = quota.first..quota.end;
        let mut least = f32::INFINITY;
        if plan.relative {
            least =
                candidates.clone().map(|item| of_list.raw(list, item)).filter(|x| x.is_finite()).fold(least, f32::min);
        }
        let least = if least.is_finite() { least } else { 0.0 };
        let key = |item: u64| key(of_list.score(list, item, least));
        let has_nan = candidates.clone().any(|item| key(item) == 0);
        let found = (quota.kept > 0).then(|| {
            threshold(quota.kept, |least| candidates.clone().filter(|&item| key(item) >= least).count() as u64)
        });

        let to = &mut indices[(list * plan.capacity) as usize..][..plan.capacity as usize];
        let mut count = 0;
        let mut rank = 0;
        for item in 0..quota.items {
            let kept = !candidates.contains(&item)
                || found.is_some_and(|found| {
                    let key = key(item);
                    let equal = key == found.key;
                    rank += u64::from(equal);
                    key > found.key || (equal && keeps(found, plan.newest, rank - 1))
                });
            if kept {
                for token in item * plan.block..((item + 1) * plan.block).min(quota.length) {
                    to[count] = quota.row(token) as i32;
                    count += 1;
                }
            }
        }
        for token in quota.length..quota.length + plan.active {
            to[count] = quota.row(token) as i32;
            count += 1;
        }
        to[count..].fill(-1);
        counts[list as usize] = count as i32;
        if let Some(statuses) = &mut statuses {
            let said = |bit, is| if is { bit } else { 0 };
            statuses[list as usize] = said(status::NAN, has_nan) | said(status::CLAMPED, quota.clamped);
        }
    }
}
