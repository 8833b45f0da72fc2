//! The rules on the host, written from their definitions.

use super::VerifierArgs;
use super::plan::{Drafts, Plan, Rule};
use crate::dtype::Float;
use crate::verification::rows::{
    CHUNK, Distribution, Domain, Partial, Scale, Shape, Summary, Truncation, chunks, column, key_bits, lane_sums,
    lanes_with_columns, pick_chunk, pick_place, residual, scan, total, uniforms,
};
use crate::verification::{Accepted, Emitted, status};

const HERE: &str = "operands are on the stream's device";

/// The inputs of a run, as slices.
struct Inputs<'a, P, Q> {
    plan: &'a Plan,
    target: &'a [P],
    draft: &'a [Q],
    drafts: &'a [i32],
    row_index: Option<&'a [i32]>,
    draft_row: Option<&'a [i32]>,
    draft_stats: Option<&'a [f32]>,
    target_stats: Option<&'a [f32]>,
    target_to_draft: Option<&'a [i32]>,
    allow: Option<&'a [u32]>,
    uniforms: Option<&'a [f32]>,
}

/// What a request brings.
struct Request {
    index: usize,
    /// Its first row.
    row: usize,
    /// Number of drafts.
    drafts: usize,
    rule: Rule,
    scale: Option<Scale>,
    draft_scale: Option<Scale>,
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

impl<P: Float, Q: Float> Inputs<'_, P, Q> {
    /// A logit of a row of the target, -inf where there is none.
    fn target(&self, row: Option<usize>, logical: usize, column: u64) -> f32 {
        let allowed = self.allow.is_none_or(|allow| {
            let words = &allow[logical * self.plan.allow_stride as usize..];
            column < self.plan.vocab && words[column as usize / 32] >> (column % 32) & 1 == 1
        });
        match row {
            Some(row) if column < self.plan.vocab && allowed => {
                self.target[row * self.plan.target_stride as usize + column as usize].to_f32()
            }
            _ => f32::NEG_INFINITY,
        }
    }

    /// A logit of a row of the draft by its own columns.
    fn draft(&self, row: usize, column: u64) -> f32 {
        if column < self.plan.draft_vocab {
            self.draft[row * self.plan.draft_stride as usize + column as usize].to_f32()
        } else {
            f32::NEG_INFINITY
        }
    }

    /// The draft's column of a token.
    fn draft_column(&self, token: u64) -> Option<u64> {
        let column = match self.target_to_draft {
            Some(map) => map.get(token as usize).map_or(-1, |&column| i64::from(column)),
            None => token as i64,
        };
        (0..self.plan.draft_vocab as i64).contains(&column).then_some(column as u64)
    }

    fn target_row(&self, logical: usize, said: &mut u32) -> Option<usize> {
        let row = self.row_index.map_or(logical as i64, |index| i64::from(index[logical]));
        let row = (0..self.plan.target_rows as i64).contains(&row).then_some(row as usize);
        if row.is_none() {
            *said |= status::ROW_OUT_OF_RANGE;
        }
        row
    }

    /// The distribution of the target in row `i` of a request; its partials are left in the scratch.
    fn p(&self, request: &Request, i: usize, scratch: &mut Scratch<'_>, log_probs: bool, said: &mut u32) -> Target {
        let logical = request.row + i;
        let row = self.target_row(logical, said);
        let logit = |column| self.target(row, logical, column);
        // Greedy rows need no sums, but for logarithms of probabilities, which are those at temperature 1.
        let measure = request.scale.or(log_probs.then(|| Scale::of(1.0)).flatten());
        for (chunk, partial) in scratch.target.iter_mut().enumerate() {
            *partial = match (self.target_stats, row) {
                (Some(stats), Some(row)) => {
                    let at = (row * chunks(self.plan.vocab) as usize + chunk) * 2;
                    Partial { max: stats[at], sum: stats[at + 1] }
                }
                (Some(_), None) => Partial { max: f32::NEG_INFINITY, sum: 0.0 },
                (None, _) => Partial::of(
                    |lane, place| logit(column(chunk as u64, lane, place)),
                    lanes_with_columns(chunk as u64, self.plan.vocab),
                    measure.as_ref(),
                ),
            };
        }
        let mut measured = Summary::of(scratch.target, measure.as_ref());
        let mut summary = Summary::of(scratch.target, request.scale.as_ref());
        request.truncation.apply(&mut summary, scratch.target, key_bits(P::DTYPE), self.plan.vocab, logit);
        if request.scale.is_some() {
            measured = summary;
        }
        if summary.nan {
            *said |= status::TARGET_NAN;
        }
        if summary.beyond || summary.top == f32::INFINITY {
            *said |= status::TARGET_BEYOND;
        }
        let peak = match summary.shape {
            Shape::Peak => summary.peak(scratch.target, logit),
            _ => None,
        };
        if summary.shape == Shape::Empty {
            *said |= status::TARGET_EMPTY;
        }
        Target { row, logical, distribution: Distribution { summary, peak }, measured }
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
                    let logit = |lane, place| self.draft(row, column(chunk as u64, lane, place));
                    let filled = lanes_with_columns(chunk as u64, self.plan.draft_vocab);
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

    /// Weight of a token in the draft.
    fn q_weight(&self, q: &Draft, token: u64) -> f32 {
        match q.distribution.peak {
            Some(peak) => f32::from(peak == token),
            None => match self.draft_column(token) {
                Some(column) => q.distribution.summary.weight(self.draft(q.row, column)),
                None => 0.0,
            },
        }
    }

    fn p_weight(&self, p: &Target, token: u64) -> f32 {
        p.distribution.weight(token, self.target(p.row, p.logical, token))
    }

    /// The four uniforms of a row that a caller gave.
    fn given(&self, request: &Request, i: usize) -> Option<[f32; 4]> {
        let rows = self.plan.max_drafts as usize + 1;
        self.uniforms.map(|given| given[(request.index * rows + i) * 4..][..4].try_into().expect("four"))
    }

    fn draws(&self, request: &Request, i: usize, domain: Domain, draw: u32) -> [f32; 4] {
        let row = if domain == Domain::Sample { 0 } else { i as u32 };
        uniforms(request.seed, request.position.wrapping_add(i as u64), domain, row, draw)
    }

    fn accept_uniform(&self, request: &Request, i: usize) -> f32 {
        self.given(request, i).map_or_else(|| self.draws(request, i, Domain::Accept, 0)[0], |given| given[0])
    }

    fn three(&self, request: &Request, i: usize, domain: Domain) -> [f32; 3] {
        match self.given(request, i) {
            Some([_, a, b, c]) => [a, b, c],
            None => {
                let [a, b, c, _] = self.draws(request, i, domain, 0);
                [a, b, c]
            }
        }
    }

    /// A token of the target itself.
    fn sample(&self, request: &Request, i: usize, p: &Target, partials: &[Partial], domain: Domain) -> Option<u64> {
        p.distribution.peak.or_else(|| {
            let logit = |column| self.target(p.row, p.logical, column);
            p.distribution.summary.sample(partials, self.three(request, i, domain), self.plan.vocab, logit)
        })
    }

    /// The sum over a row of `max(factor * p - q, 0)`, chunks' sums left in the scratch.
    fn residual_mass(&self, factor: f32, p: &Target, q: &Draft, scratch: &mut Scratch<'_>) -> f32 {
        for (chunk, sum) in scratch.residual.iter_mut().enumerate() {
            let chunk = chunk as u64;
            let weight = |lane, place| self.residual(factor, p, q, column(chunk, lane, place));
            let lanes = lane_sums(lanes_with_columns(chunk, self.plan.vocab), &weight);
            *sum = scan(lanes)[31];
        }
        total(scratch.residual.len(), |chunk| scratch.residual[chunk])
    }

    fn residual(&self, factor: f32, p: &Target, q: &Draft, column: u64) -> f32 {
        let (p_sum, q_sum) = (p.distribution.sum(), q.distribution.sum());
        residual(factor, self.p_weight(p, column), p_sum, self.q_weight(q, column), q_sum)
    }

    /// A token of `max(factor * p - q, 0)`, whose chunks' sums are in the scratch.
    fn sample_residual(
        &self,
        request: &Request,
        i: usize,
        factor: f32,
        (p, q): (&Target, &Draft),
        scratch: &mut Scratch<'_>,
    ) -> Option<u64> {
        if self.residual_mass(factor, p, q, scratch) > 0.0 {
            let [a, b, c] = self.three(request, i, Domain::Residual);
            let chunk = pick_chunk(scratch.residual.len(), a, |chunk| scratch.residual[chunk])? as u64;
            let weight = |lane, place| self.residual(factor, p, q, column(chunk, lane, place));
            let (lane, place) = pick_place([b, c], lanes_with_columns(chunk, self.plan.vocab), weight)?;
            return Some(column(chunk, lane, place));
        }
        // p is q but for rounding.
        self.sample(request, i, p, scratch.target, Domain::Residual)
    }

    /// A token of `max(p - q, 0)`: of those drawn from p, the first that is kept with probability 1 - q / p.
    fn thin(&self, request: &Request, i: usize, (p, q): (&Target, &Draft), scratch: &mut Scratch<'_>) -> Option<u64> {
        if p.distribution.peak.is_some() {
            return p.distribution.peak;
        }
        let trials = if self.uniforms.is_some() { 0 } else { self.plan.trials };
        for trial in 0..trials {
            let [a, b, c, keep] = self.draws(request, i, Domain::Thin, trial);
            let logit = |column| self.target(p.row, p.logical, column);
            let token = p.distribution.summary.sample(scratch.target, [a, b, c], self.plan.vocab, logit)?;
            let (p_weight, q_weight) = (self.p_weight(p, token), self.q_weight(q, token));
            if keep * p_weight * q.distribution.sum() >= q_weight * p.distribution.sum() {
                return Some(token);
            }
        }
        self.sample_residual(request, i, 1.0, (p, q), scratch)
    }
}

struct Target {
    /// `None`: outside the tensor.
    row: Option<usize>,
    logical: usize,
    distribution: Distribution,
    /// For logarithms of probabilities.
    measured: Summary,
}

struct Draft {
    row: usize,
    distribution: Distribution,
}

/// What a request gets.
struct Decision {
    accepted: usize,
    /// `None`: no token had any weight.
    last: Option<u64>,
}

pub(super) fn run<P: Float, Q: Float>(plan: &Plan, args: &mut VerifierArgs<'_, P, Q>) {
    let cu_rows = args.cu_rows.as_host().expect(HERE);
    let rules = args.options.rules.as_ref().map(|view| view.as_host().expect(HERE));
    let floats = |view: &Option<crate::view::In<'_, f32>>, b: usize| view.as_ref().map(|v| v.as_host().expect(HERE)[b]);
    let words = |view: &Option<crate::view::In<'_, i64>>, b: usize| {
        view.as_ref().map_or(0, |v| v.as_host().expect(HERE)[b] as u64)
    };
    let inputs = Inputs {
        plan,
        target: args.target.as_host().expect(HERE),
        draft: args.options.draft.as_ref().map_or(&[], |view| view.as_host().expect(HERE)),
        drafts: args.drafts.as_host().expect(HERE),
        row_index: args.options.row_index.as_ref().map(|view| view.as_host().expect(HERE)),
        draft_row: args.options.draft_row.as_ref().map(|view| view.as_host().expect(HERE)),
        draft_stats: args.options.draft_stats.as_ref().map(|view| view.as_host().expect(HERE)),
        target_stats: args.options.target_stats.as_ref().map(|view| view.as_host().expect(HERE)),
        target_to_draft: args.options.target_to_draft.as_ref().map(|view| view.as_host().expect(HERE)),
        allow: args.options.allow.as_ref().map(|view| view.as_host().expect(HERE)),
        uniforms: args.options.uniforms.as_ref().map(|view| view.as_host().expect(HERE)),
    };
    let tokens = args.out.tokens.as_host().expect(HERE);
    let emitted = args.out.emitted.as_host().expect(HERE);
    let accepted = args.out.accepted.as_host().expect(HERE);
    let statuses = args.out.status.as_host().expect(HERE);
    let mut last_row = args.out.last_row.as_mut().map(|view| view.as_host().expect(HERE));
    let mut log_probs = args.out.log_probs.as_mut().map(|view| view.as_host().expect(HERE));

    let (of_target, of_draft) = (chunks(plan.vocab) as usize, chunks(plan.draft_vocab) as usize);
    let workspace = args.workspace.as_host().expect(HERE);
    let floats_of: &mut [f32] = bytemuck::cast_slice_mut(&mut workspace[..(of_target * 3 + of_draft * 2) * 4]);
    let (target, rest) = floats_of.split_at_mut(of_target * 2);
    let (draft, rest) = rest.split_at_mut(of_draft * 2);
    let scratch = &mut Scratch {
        target: bytemuck::cast_slice_mut(target),
        draft: bytemuck::cast_slice_mut(draft),
        residual: &mut rest[..of_target],
    };

    let most_rows = plan.max_drafts as usize + 1;
    for b in 0..plan.batch as usize {
        let (mut said, mut decision) = (0, Decision { accepted: 0, last: None });
        let (first, end) = (i64::from(cu_rows[b]), i64::from(cu_rows[b + 1]));
        let most = plan.batch as i64 * most_rows as i64;
        // Rows outside the arrays of rows are not there.
        let first = first.clamp(0, most);
        let rows = (end.min(most) - first).clamp(0, most_rows as i64) as usize;
        if end - first > rows as i64 {
            said |= status::DRAFTS_IGNORED;
        }
        let temperature = floats(&args.options.temperature, b).unwrap_or(1.0);
        let rule = rules.map_or(plan.rule, |rules| Rule::from_code(rules[b]).unwrap_or(plan.rule));
        let scale = if rule == Rule::Greedy { None } else { Scale::of(temperature) };
        let request = Request {
            index: b,
            row: first as usize,
            drafts: rows.saturating_sub(1),
            rule,
            scale,
            draft_scale: Scale::of(floats(&args.options.draft_temperature, b).unwrap_or(temperature)),
            truncation: Truncation {
                top_k: args.options.top_k.as_ref().map_or(0, |view| view.as_host().expect(HERE)[b].max(0) as u32),
                top_p: floats(&args.options.top_p, b).unwrap_or(1.0),
                min_p: floats(&args.options.min_p, b).unwrap_or(0.0),
            },
            seed: words(&args.options.seeds, b),
            position: words(&args.options.positions, b),
        };
        let of_tokens = &mut tokens[b * most_rows..][..most_rows];
        of_tokens.fill(-1);
        if rows > 0 {
            decision = match rule {
                Rule::Block => inputs.block(&request, scratch, &mut said),
                _ => inputs.chain(&request, scratch, &mut said),
            };
            let n = decision.accepted;
            of_tokens[..n].copy_from_slice(&inputs.drafts[request.row..][..n]);
            of_tokens[n] = decision.last.map_or(plan.fallback, |token| token as i32);
        }
        emitted[b] = Emitted(if rows > 0 { decision.accepted as i32 + 1 } else { 0 });
        accepted[b] = Accepted(decision.accepted as i32);
        statuses[b] = said;
        if let Some(last_row) = &mut last_row {
            last_row[b] = if rows > 0 { (request.row + decision.accepted) as i32 } else { -1 };
        }
        if let Some(log_probs) = &mut log_probs {
            let of_tokens = &tokens[b * most_rows..][..most_rows];
            for (i, to) in log_probs[b * most_rows..][..most_rows].iter_mut().enumerate() {
                *to = f32::NAN;
                if i <= decision.accepted && rows > 0 {
                    let p = inputs.p(&request, i, scratch, true, &mut 0);
                    let logit = inputs.target(p.row, p.logical, of_tokens[i].max(0) as u64);
                    *to = p.measured.log_probability(logit);
                }
            }
        }
    }
}

impl<P: Float, Q: Float> Inputs<'_, P, Q> {
    /// Greedy, sampled match and rejection: row after row, up to the first draft that is not accepted.
    fn chain(&self, request: &Request, scratch: &mut Scratch<'_>, said: &mut u32) -> Decision {
        for i in 0..request.drafts {
            let p = self.p(request, i, scratch, false, said);
            let stop = |last| Decision { accepted: i, last };
            if p.distribution.summary.shape == Shape::Empty {
                return stop(None);
            }
            let drafted = self.drafts[request.row + i];
            let drafted = (0..self.plan.vocab as i64).contains(&i64::from(drafted)).then_some(drafted as u64);
            let sampled = |scratch: &Scratch<'_>| self.sample(request, i, &p, scratch.target, Domain::Sample);
            let Some(drafted) = drafted else { return stop(sampled(scratch)) };
            if request.rule != Rule::Reject || p.distribution.peak.is_some() {
                let token = sampled(scratch);
                if token != Some(drafted) {
                    return stop(token);
                }
                continue;
            }
            let Some(q) = self.q(request, i, scratch, said) else { return stop(sampled(scratch)) };
            let (p_weight, q_weight) = (self.p_weight(&p, drafted), self.q_weight(&q, drafted));
            if q_weight == 0.0 {
                *said |= status::DRAFT_IMPOSSIBLE;
            }
            let uniform = self.accept_uniform(request, i);
            let accepted = uniform * q_weight * p.distribution.sum() < p_weight * q.distribution.sum();
            if !accepted {
                return stop(self.thin(request, i, (&p, &q), scratch));
            }
        }
        let i = request.drafts;
        let p = self.p(request, i, scratch, false, said);
        Decision { accepted: i, last: self.sample(request, i, &p, scratch.target, Domain::Sample) }
    }

    /// Block verification: the longest prefix whose own test passes, whatever becomes of shorter ones.
    fn block(&self, request: &Request, scratch: &mut Scratch<'_>, said: &mut u32) -> Decision {
        // Row `i` follows the prefix of `i` drafts, which has the ratio `ratio`.
        let (mut ratio, mut accepted, mut accepted_ratio) = (1f32, 0, 1f32);
        // Rows up to here are of use.
        let mut rows = request.drafts;
        for i in 0..=request.drafts {
            let p = self.p(request, i, scratch, false, said);
            let drafted = (i < request.drafts).then(|| self.drafts[request.row + i]);
            let drafted = drafted.filter(|&id| (0..self.plan.vocab as i64).contains(&i64::from(id)));
            let empty = p.distribution.summary.shape == Shape::Empty;
            let q = match drafted {
                Some(_) if !empty => self.q(request, i, scratch, said),
                _ => None,
            };
            // The test of the prefix of `i` drafts: its mass goes on where the row that follows leaves room.
            if i > 0 {
                let passing = match &q {
                    Some(q) => {
                        let sums = p.distribution.sum() * q.distribution.sum();
                        let mass = self.residual_mass(ratio, &p, q, scratch) / sums;
                        let all = mass + (1.0 - ratio);
                        if all > 0.0 { mass / all } else { 1.0 }
                    }
                    None => ratio,
                };
                if self.accept_uniform(request, i - 1) < passing {
                    (accepted, accepted_ratio) = (i, ratio);
                }
            }
            let (Some(drafted), Some(q)) = (drafted, q) else {
                rows = i;
                break;
            };
            let (p_weight, q_weight) = (self.p_weight(&p, drafted as u64), self.q_weight(&q, drafted as u64));
            if q_weight == 0.0 {
                *said |= status::DRAFT_IMPOSSIBLE;
            }
            let (above, below) = (ratio * p_weight * q.distribution.sum(), q_weight * p.distribution.sum());
            ratio = if above >= below { f32::from(above > 0.0) } else { above / below };
        }
        let (i, mut nothing) = (accepted, 0);
        let p = self.p(request, i, scratch, false, &mut nothing);
        if p.distribution.summary.shape == Shape::Empty {
            return Decision { accepted, last: None };
        }
        let last = match (i < rows).then(|| self.q(request, i, scratch, &mut nothing)).flatten() {
            Some(q) => self.sample_residual(request, i, accepted_ratio, (&p, &q), scratch),
            None => self.sample(request, i, &p, scratch.target, Domain::Sample),
        };
        Decision { accepted, last }
    }
}

/// Bytes of workspace that the host needs.
pub(super) fn workspace_bytes(vocab: u64, draft_vocab: u64) -> u64 {
    (chunks(vocab) * 3 + chunks(draft_vocab) * 2) * 4
}

const _: () = assert!(CHUNK == 1024);
