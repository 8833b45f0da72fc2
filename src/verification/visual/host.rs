//! The rules on the host, written from their definitions.

use super::plan::{Plan, Redraft, RuleOfPlan};
use super::{Embeddings, Neighbours, VisualOptions, VisualVerifierArgs};
use crate::dtype::{Element, Float};
use crate::philox;
use crate::verification::host_rows::{distribution, guide};
use crate::verification::log2::exponential;
use crate::verification::rows::{
    Distribution, Domain, LANES, Partial, Scale, Shape, Summary, Truncation, chunks, column, key_bits, lane_sums,
    lanes_with_columns, order_key, pick_chunk, pick_place, residual, scan, total, uniforms,
};
use crate::verification::{Accepted, Drafts, Emitted, status};
use crate::view::In;

const HERE: &str = "operands are on the stream's device";

fn slice<'a, T: Element>(view: &'a Option<In<'_, T>>) -> Option<&'a [T]> {
    view.as_ref().map(|view| view.as_host().expect(HERE))
}

/// The inputs of a run, as slices.
struct Inputs<'a, T> {
    plan: &'a Plan,
    target: &'a [T],
    target_free: Option<&'a [T]>,
    draft: Option<&'a [T]>,
    draft_free: Option<&'a [T]>,
    drafts: &'a [i32],
    row_index: Option<&'a [i32]>,
    draft_row: Option<&'a [i32]>,
    draft_stats: Option<&'a [f32]>,
    allow: Option<&'a [u32]>,
    syntax: Option<&'a [u32]>,
    neighbours: &'a Option<Neighbours<'a>>,
    embeddings: &'a Option<Embeddings<'a>>,
    uniforms: Option<&'a [f32]>,
}

/// What a request brings.
struct Request {
    index: usize,
    /// Its first row, and how many.
    row: usize,
    rows: usize,
    scale: Option<Scale>,
    draft_scale: Option<Scale>,
    guidance: f32,
    truncation: Truncation,
    seed: u64,
    position: u64,
}

/// Scratch of one row pair.
struct Scratch<'a> {
    target: &'a mut [Partial],
    draft: &'a mut [Partial],
    residual: &'a mut [f32],
}

struct Target {
    /// `None`: outside the tensor.
    row: Option<usize>,
    logical: usize,
    distribution: Distribution,
}

struct Draft {
    row: usize,
    distribution: Distribution,
}

/// What becomes of a row.
#[derive(Debug, Clone, Copy)]
struct Decision {
    accepted: bool,
    /// Else the token that the step ends with; `None`: none has any weight.
    token: Option<u64>,
    redraft: Option<u64>,
    stats: [f32; 4],
    said: u32,
}

fn bit(mask: &[u32], column: u64) -> bool {
    mask[column as usize / 32] >> (column % 32) & 1 == 1
}

impl<T: Float> Inputs<'_, T> {
    /// A logit of a row of the target, -inf where there is none.
    fn target(&self, request: &Request, row: Option<usize>, logical: usize, column: u64) -> f32 {
        let allowed = |allow: &[u32]| bit(&allow[logical * self.plan.allow_stride as usize..], column);
        match row {
            Some(row) if column < self.plan.vocab && self.allow.is_none_or(allowed) => {
                let at = row * self.plan.target_stride as usize + column as usize;
                let with = self.target[at].to_f32();
                self.target_free.map_or(with, |free| guide(with, free[at].to_f32(), request.guidance))
            }
            _ => f32::NEG_INFINITY,
        }
    }

    fn draft(&self, request: &Request, row: usize, column: u64) -> f32 {
        match self.draft {
            Some(draft) if column < self.plan.vocab => {
                let at = row * self.plan.draft_stride as usize + column as usize;
                let with = draft[at].to_f32();
                self.draft_free.map_or(with, |free| guide(with, free[at].to_f32(), request.guidance))
            }
            _ => f32::NEG_INFINITY,
        }
    }

    fn p(&self, request: &Request, i: usize, scratch: &mut Scratch<'_>, said: &mut u32) -> Target {
        let logical = request.row + i;
        let row = self.row_index.map_or(logical as i64, |index| i64::from(index[logical]));
        let row = (0..self.plan.target_rows as i64).contains(&row).then_some(row as usize);
        if row.is_none() {
            *said |= status::ROW_OUT_OF_RANGE;
        }
        let logit = |column| self.target(request, row, logical, column);
        let bits = if self.plan.guided { 32 } else { key_bits(T::DTYPE) };
        let (distribution, bits_of_row) =
            distribution(scratch.target, request.scale.as_ref(), &request.truncation, bits, self.plan.vocab, logit);
        *said |= bits_of_row;
        Target { row, logical, distribution }
    }

    /// The distribution of the draft in row `i`; `None` if it is of no use.
    fn q(&self, request: &Request, i: usize, scratch: &mut Scratch<'_>, said: &mut u32) -> Option<Draft> {
        let drafted = self.drafts[request.row + i];
        let one_hot = Draft { row: 0, distribution: Distribution::on(drafted as u64) };
        if self.plan.drafts == Drafts::Deterministic {
            return Some(one_hot);
        }
        let row = match self.draft_row {
            Some(rows) => i64::from(rows[request.row + i]),
            None => (request.index * self.plan.max_drafts as usize + i) as i64,
        };
        if !(0..self.plan.draft_rows as i64).contains(&row) {
            *said |= status::ROW_OUT_OF_RANGE | status::DRAFT_BAD;
            return None;
        }
        let row = row as usize;
        let summary = match self.draft_stats {
            Some(stats) => Summary::of_draft(stats[row * 4..][..4].try_into().expect("four")),
            None => {
                for (chunk, partial) in scratch.draft.iter_mut().enumerate() {
                    let logit = |lane, place| self.draft(request, row, column(chunk as u64, lane, place));
                    let filled = lanes_with_columns(chunk as u64, self.plan.vocab);
                    *partial = Partial::of(logit, filled, request.draft_scale.as_ref());
                }
                Summary::of(scratch.draft, request.draft_scale.as_ref())
            }
        };
        match summary.shape {
            _ if summary.nan => {}
            Shape::Empty => {}
            // A greedy drafter can draw nothing else.
            Shape::Peak => return Some(Draft { row, ..one_hot }),
            Shape::Spread { .. } => return Some(Draft { row, distribution: Distribution { summary, peak: None } }),
        }
        *said |= status::DRAFT_BAD;
        None
    }

    fn p_weight(&self, request: &Request, p: &Target, token: u64) -> f32 {
        p.distribution.weight(token, self.target(request, p.row, p.logical, token))
    }

    fn q_weight(&self, request: &Request, q: &Draft, token: u64) -> f32 {
        q.distribution.weight(token, self.draft(request, q.row, token))
    }

    fn draws(&self, request: &Request, i: usize, domain: Domain) -> [f32; 4] {
        if let Some(given) = self.uniforms {
            let rows = self.plan.max_drafts as usize + 1;
            let [accept, a, b, c] = given[(request.index * rows + i) * 4..][..4].try_into().expect("four");
            return if domain == Domain::Accept { [accept, a, b, c] } else { [a, b, c, 0.0] };
        }
        let row = if domain == Domain::Sample { 0 } else { i as u32 };
        uniforms(request.seed, request.position.wrapping_add(i as u64), domain, row, 0)
    }

    /// A token of the target itself.
    fn sample(&self, request: &Request, i: usize, p: &Target, partials: &[Partial], domain: Domain) -> Option<u64> {
        p.distribution.peak.or_else(|| {
            let logit = |column| self.target(request, p.row, p.logical, column);
            let [a, b, c, _] = self.draws(request, i, domain);
            p.distribution.summary.sample(partials, [a, b, c], self.plan.vocab, logit)
        })
    }

    /// A token drawn by the weights that are given, whose chunks' sums are left in the scratch; `None` if all are 0.
    fn draw(&self, sums: &mut [f32], draws: [f32; 4], weight: impl Fn(u64) -> f32) -> Option<u64> {
        for (chunk, sum) in sums.iter_mut().enumerate() {
            let weight = |lane, place| weight(column(chunk as u64, lane, place));
            *sum = scan(lane_sums(lanes_with_columns(chunk as u64, self.plan.vocab), &weight))[LANES - 1];
        }
        if total(sums.len(), |chunk| sums[chunk]) <= 0.0 {
            return None;
        }
        let [a, b, c, _] = draws;
        let chunk = pick_chunk(sums.len(), a, |chunk| sums[chunk])? as u64;
        let weight = |lane, place| weight(column(chunk, lane, place));
        let (lane, place) = pick_place([b, c], lanes_with_columns(chunk, self.plan.vocab), weight)?;
        Some(column(chunk, lane, place))
    }

    fn code(&self, token: u64) -> Option<u64> {
        token.checked_sub(self.plan.first_code).filter(|&code| code < self.plan.codes)
    }

    /// The token that is the `n`-th neighbour of a code.
    fn neighbour(&self, code: u64, n: u32) -> Option<u64> {
        let at = code as usize * self.plan.neighbours_stride as usize + n as usize;
        let code = match self.neighbours.as_ref().expect("LANTERN has neighbours") {
            Neighbours::U16(view) => i64::from(view.as_host().expect(HERE)[at]),
            Neighbours::I32(view) => i64::from(view.as_host().expect(HERE)[at]),
        };
        (0..self.plan.codes as i64).contains(&code).then(|| self.plan.first_code + code as u64)
    }

    /// What neighbours add to the draft's weight; `None` if the bound allows none.
    fn added(&self, request: &Request, p: &Target, code: u64, accumulated: u32, most: f32) -> Option<f32> {
        let (mut before, mut added) = (0f32, None);
        for group in 0..accumulated.div_ceil(LANES as u32) {
            let weights = core::array::from_fn(|lane| {
                let n = group * LANES as u32 + lane as u32;
                let token = (n < accumulated).then(|| self.neighbour(code, n)).flatten();
                token.map_or(0.0, |token| self.p_weight(request, p, token))
            });
            let sums = scan(weights);
            for (lane, sum) in sums.iter().enumerate() {
                if group * (LANES as u32) + (lane as u32) < accumulated && before + sum <= most {
                    added = Some(before + sum);
                }
            }
            before += sums[LANES - 1];
        }
        added
    }

    /// The squared distance of two codes' embeddings.
    fn distance(&self, a: u64, b: u64, dim: u64) -> f32 {
        fn of<E: Float>(rows: &[E], a: usize, b: usize, dim: u64) -> f32 {
            let lanes = core::array::from_fn(|lane| {
                (lane..dim as usize).step_by(LANES).fold(0f32, |sum, d| {
                    let difference = rows[a + d].to_f32() - rows[b + d].to_f32();
                    difference.mul_add(difference, sum)
                })
            });
            scan(lanes)[LANES - 1]
        }
        let [a, b] = [a, b].map(|code| code as usize * self.plan.embeddings_stride as usize);
        match self.embeddings.as_ref().expect("the plan has a dim") {
            Embeddings::F32(view) => of(view.as_host().expect(HERE), a, b, dim),
            Embeddings::F16(view) => of(view.as_host().expect(HERE), a, b, dim),
            Embeddings::BF16(view) => of(view.as_host().expect(HERE), a, b, dim),
        }
    }

    /// Weights of a draft's group, in p and in q.
    fn group(&self, request: &Request, (p, q): (&Target, &Draft), drafted: u64) -> (f32, f32) {
        let RuleOfPlan::Grouped { below, above, probability_gap, distance, dim } = self.plan.rule else {
            unreachable!("the rule is grouped")
        };
        let place = |token: u64| {
            let logit = self.target(request, p.row, p.logical, token);
            (order_key(if logit.is_nan() { f32::NEG_INFINITY } else { logit }), token)
        };
        let here = place(drafted);
        // Nearest first; as many as there are lanes, beside the draft.
        let nearest = |n: u32, beyond: &dyn Fn((u32, u64), (u32, u64)) -> bool| -> [Option<(u32, u64)>; 15] {
            let mut found = [None; 15];
            let mut last = here;
            for slot in &mut found[..n as usize] {
                let next = (0..self.plan.vocab)
                    .map(place)
                    .filter(|&at| beyond(at, last))
                    .reduce(|best, at| if beyond(best, at) { at } else { best });
                let Some(next) = next else { break };
                (*slot, last) = (Some(next), next);
            }
            found
        };
        let before = nearest(below, &|at, than| at < than);
        let after = nearest(above, &|at, than| at > than);
        let own = self.p_weight(request, p, drafted);
        let alone = (below > 0 && before[below as usize - 1].is_none()) || (dim > 0 && self.code(drafted).is_none());
        let mut members = [None; LANES];
        members[0] = Some(drafted);
        if !alone {
            let near = before[..below as usize].iter().chain(&after[..above as usize]);
            for (slot, member) in members[1..].iter_mut().zip(near) {
                *slot = member.map(|(_, token)| token).filter(|&token| {
                    let gap = (self.p_weight(request, p, token) - own).abs();
                    gap < f32::from_bits(probability_gap) * p.distribution.sum()
                        && (dim == 0
                            || match (self.code(token), self.code(drafted)) {
                                (Some(a), Some(b)) => self.distance(b, a, dim) < f32::from_bits(distance),
                                _ => false,
                            })
                });
            }
        }
        let sum = |weight: &dyn Fn(u64) -> f32| scan(members.map(|token| token.map_or(0.0, weight)))[LANES - 1];
        (sum(&|token| self.p_weight(request, p, token)), sum(&|token| self.q_weight(request, q, token)))
    }

    /// The row's distribution as a drafter would have stored it.
    fn stats(p: &Target) -> [f32; 4] {
        let summary = &p.distribution.summary;
        let (sum, cut, per_logit) = match summary.shape {
            Shape::Spread { scale, sum, cut, .. } => (sum, cut, scale.per_logit),
            Shape::Peak | Shape::Empty => (0.0, f32::NEG_INFINITY, 0.0),
        };
        [summary.top, if summary.nan { -sum } else { sum }, cut, per_logit]
    }

    /// The token whose weight over its own exponential variate is greatest.
    fn race(&self, request: &Request, i: usize, p: &Target) -> Option<u64> {
        let position = request.position.wrapping_add(i as u64);
        let (mut best, mut most) = (None, 0f32);
        for first in (0..self.plan.vocab).step_by(4) {
            let words = philox::block(request.seed, position, Domain::Noise as u32, (first / 4) as u32);
            for (token, word) in (first..self.plan.vocab).zip(words) {
                let score = self.p_weight(request, p, token) / exponential(word);
                if score > most {
                    (best, most) = (Some(token), score);
                }
            }
        }
        best
    }

    fn decide(&self, request: &Request, i: usize, scratch: &mut Scratch<'_>) -> Decision {
        let mut said = 0;
        let p = self.p(request, i, scratch, &mut said);
        let (accepted, token) = self.test(request, i, &p, scratch, &mut said);
        let drafted = self.drafts[request.row + i] as u64;
        let redraft = match self.plan.redraft {
            Redraft::None => None,
            Redraft::Maximal => {
                if accepted {
                    Some(drafted)
                } else {
                    token
                }
            }
            _ if p.distribution.summary.shape == Shape::Empty => None,
            Redraft::Gumbel if p.distribution.peak.is_none() => self.race(request, i, &p),
            _ => self.sample(request, i, &p, scratch.target, Domain::Draft),
        };
        Decision { accepted, token, redraft, stats: Self::stats(&p), said }
    }

    /// Whether the draft of row `i` is accepted, and else the token in its place.
    fn test(
        &self,
        request: &Request,
        i: usize,
        p: &Target,
        scratch: &mut Scratch<'_>,
        said: &mut u32,
    ) -> (bool, Option<u64>) {
        if p.distribution.summary.shape == Shape::Empty {
            return (false, None);
        }
        let drafted = (i + 1 < request.rows).then(|| i64::from(self.drafts[request.row + i]));
        let Some(drafted) = drafted.filter(|d| (0..self.plan.vocab as i64).contains(d)) else {
            return (false, self.sample(request, i, p, scratch.target, Domain::Sample));
        };
        let drafted = drafted as u64;
        if self.syntax.is_some_and(|syntax| bit(syntax, drafted)) {
            return (true, None);
        }
        if let Some(peak) = p.distribution.peak {
            return (peak == drafted, Some(peak));
        }
        let Some(q) = self.q(request, i, scratch, said) else {
            return (false, self.sample(request, i, p, scratch.target, Domain::Sample));
        };
        let q_weight = self.q_weight(request, &q, drafted);
        if q_weight == 0.0 {
            *said |= status::DRAFT_IMPOSSIBLE;
        }
        let own = self.p_weight(request, p, drafted);
        let (p_sum, q_sum) = (p.distribution.sum(), q.distribution.sum());
        // What the draft counts for in p and q, and whether neighbours lose their probability.
        let (above, below, zeroing) = match self.plan.rule {
            RuleOfPlan::Jacobi => (own, q_weight, None),
            RuleOfPlan::Grouped { .. } => {
                let (above, below) = self.group(request, (p, &q), drafted);
                (above, below, None)
            }
            RuleOfPlan::Lantern { accumulated, bound, .. } => match self.code(drafted) {
                None => (0.0, q_weight, None),
                Some(code) => {
                    let bound = f32::from_bits(bound);
                    let most = if bound <= 1.0 { bound * p_sum } else { (bound - 1.0) * own };
                    let added = self.added(request, p, code, accumulated, most);
                    (own + added.unwrap_or(0.0), q_weight, added.map(|_| code))
                }
            },
        };
        let [u, ..] = self.draws(request, i, Domain::Accept);
        if u * below * p_sum < above * q_sum {
            return (true, None);
        }
        let RuleOfPlan::Lantern { zeroed, .. } = self.plan.rule else {
            let weight = |x| residual(1.0, self.p_weight(request, p, x), p_sum, self.q_weight(request, &q, x), q_sum);
            let token = self.draw(scratch.residual, self.draws(request, i, Domain::Residual), weight);
            // p is q but for rounding.
            return (false, token.or_else(|| self.sample(request, i, p, scratch.target, Domain::Residual)));
        };
        let is_zeroed = |x: u64| zeroing.is_some_and(|code| (0..zeroed).any(|n| self.neighbour(code, n) == Some(x)));
        let weight = |x: u64| {
            let p_weight = self.p_weight(request, p, x);
            if p_weight == 0.0 || is_zeroed(x) {
                return 0.0;
            }
            residual(1.0, p_weight, p_sum, self.q_weight(request, &q, x), q_sum)
        };
        let token = self.draw(scratch.residual, self.draws(request, i, Domain::Residual), weight);
        let token = token.or_else(|| {
            let uniform = |x: u64| {
                let allowed = self.target(request, p.row, p.logical, x) > f32::NEG_INFINITY;
                f32::from(allowed && self.code(x).is_some())
            };
            self.draw(scratch.residual, self.draws(request, i, Domain::Residual), uniform)
        });
        (false, token)
    }
}

pub(super) fn run<T: Float>(plan: &Plan, args: &mut VisualVerifierArgs<'_, T>) {
    let cu_rows = args.cu_rows.as_host().expect(HERE);
    let options: &VisualOptions<'_, T> = &args.options;
    let floats = |view: &Option<In<'_, f32>>, b: usize| slice(view).map(|of| of[b]);
    let words = |view: &Option<In<'_, i64>>, b: usize| slice(view).map_or(0, |of| of[b] as u64);
    let inputs = Inputs {
        plan,
        target: args.target.as_host().expect(HERE),
        target_free: slice(&options.target_free),
        draft: slice(&options.draft),
        draft_free: slice(&options.draft_free),
        drafts: args.drafts.as_host().expect(HERE),
        row_index: slice(&options.row_index),
        draft_row: slice(&options.draft_row),
        draft_stats: slice(&options.draft_stats),
        allow: slice(&options.allow),
        syntax: slice(&options.syntax),
        neighbours: &options.neighbours,
        embeddings: &options.embeddings,
        uniforms: slice(&options.uniforms),
    };
    let tokens = args.out.tokens.as_host().expect(HERE);
    let emitted = args.out.emitted.as_host().expect(HERE);
    let accepted = args.out.accepted.as_host().expect(HERE);
    let statuses = args.out.status.as_host().expect(HERE);
    let mut last_row = args.out.last_row.as_mut().map(|view| view.as_host().expect(HERE));
    let mut redrafts = args.out.redrafts.as_mut().map(|view| view.as_host().expect(HERE));
    let mut stats = args.out.redraft_stats.as_mut().map(|view| view.as_host().expect(HERE));

    let of_row = chunks(plan.vocab) as usize;
    let workspace = args.workspace.as_host().expect(HERE);
    let floats_of: &mut [f32] = bytemuck::cast_slice_mut(&mut workspace[..of_row * 20]);
    let (target, rest) = floats_of.split_at_mut(of_row * 2);
    let (draft, residual) = rest.split_at_mut(of_row * 2);
    let scratch =
        &mut Scratch { target: bytemuck::cast_slice_mut(target), draft: bytemuck::cast_slice_mut(draft), residual };

    let most_rows = plan.max_drafts as usize + 1;
    for b in 0..plan.batch as usize {
        let mut said = 0;
        let most = plan.batch as i64 * most_rows as i64;
        // Rows outside the arrays of rows are not there.
        let first = i64::from(cu_rows[b]).clamp(0, most);
        let end = i64::from(cu_rows[b + 1]);
        let rows = (end.min(most) - first).clamp(0, most_rows as i64) as usize;
        if end - first > rows as i64 {
            said |= status::DRAFTS_IGNORED;
        }
        let temperature = floats(&options.temperature, b).unwrap_or(1.0);
        let request = Request {
            index: b,
            row: first as usize,
            rows,
            scale: Scale::of(temperature),
            draft_scale: Scale::of(floats(&options.draft_temperature, b).unwrap_or(temperature)),
            guidance: floats(&options.guidance, b).unwrap_or(1.0),
            truncation: Truncation {
                top_k: slice(&options.top_k).map_or(0, |of| of[b].max(0) as u32),
                top_p: floats(&options.top_p, b).unwrap_or(1.0),
                min_p: floats(&options.min_p, b).unwrap_or(0.0),
            },
            seed: words(&options.seeds, b),
            position: words(&options.positions, b),
        };
        let slots = b * most_rows..(b + 1) * most_rows;
        tokens[slots.clone()].fill(-1);
        if let Some(redrafts) = &mut redrafts {
            redrafts[slots.clone()].fill(-1);
        }
        if let Some(stats) = &mut stats {
            stats[slots.start * 4..slots.end * 4].fill(f32::NAN);
        }
        // The row that ends the step.
        let mut end = None;
        for i in 0..rows {
            let row = inputs.decide(&request, i, scratch);
            let or_fallback = |token: Option<u64>| token.map_or(plan.fallback, |token| token as i32);
            said |= row.said;
            match end {
                None if row.accepted => tokens[slots.start + i] = inputs.drafts[request.row + i],
                None => {
                    tokens[slots.start + i] = or_fallback(row.token);
                    end = Some(i);
                }
                Some(_) => {
                    if let Some(redrafts) = &mut redrafts {
                        redrafts[slots.start + i] = or_fallback(row.redraft);
                    }
                    if let Some(stats) = &mut stats {
                        stats[(slots.start + i) * 4..][..4].copy_from_slice(&row.stats);
                    }
                }
            }
            if end.is_some() && plan.redraft == Redraft::None {
                break;
            }
        }
        let n = end.unwrap_or(0);
        emitted[b] = Emitted(if rows > 0 { n as i32 + 1 } else { 0 });
        accepted[b] = Accepted(n as i32);
        statuses[b] = said;
        if let Some(last_row) = &mut last_row {
            last_row[b] = if rows > 0 { (request.row + n) as i32 } else { -1 };
        }
    }
}
