//! The rules on the host, written from their definitions.

use super::plan::{Plan, tree_rule};
use super::{Siblings, TreeLinks, TreeVerifierArgs};
use crate::dtype::Float;
use crate::verification::rows::{
    Distribution, Domain, Partial, Scale, Shape, Summary, Truncation, chunks, column, key_bits, lane_sums,
    lanes_with_columns, pick_chunk, pick_place, scan, total, uniforms,
};
use crate::verification::{Accepted, Drafts, Emitted, Rule, status};
use crate::view::{In, Out};

const HERE: &str = "operands are on the stream's device";

/// The inputs of a run, as slices.
struct Inputs<'a, P, Q> {
    plan: &'a Plan,
    target: &'a [P],
    draft: &'a [Q],
    drafts: &'a [i32],
    links: Links<'a>,
    row_index: Option<&'a [i32]>,
    draft_row: Option<&'a [i32]>,
    draft_stats: Option<&'a [f32]>,
    target_stats: Option<&'a [f32]>,
    target_to_draft: Option<&'a [i32]>,
    allow: Option<&'a [u32]>,
    uniforms: Option<&'a [f32]>,
}

enum Links<'a> {
    Parents(&'a [i32]),
    Children { first: &'a [i32], next: &'a [i32] },
}

/// What a request brings.
struct Request {
    index: usize,
    /// Its first row.
    row: usize,
    nodes: usize,
    rule: Rule,
    scale: Option<Scale>,
    draft_scale: Option<Scale>,
    truncation: Truncation,
    seed: u64,
    position: u64,
}

/// Where the walk is.
#[derive(Clone, Copy)]
struct At {
    node: usize,
    depth: usize,
}

/// Scratch of a node.
struct Scratch<'a> {
    target: &'a mut [Partial],
    draft: &'a mut [Partial],
    residual: &'a mut [f32],
    left: &'a mut [f32],
    children: &'a mut [u32],
    /// Tokens tried.
    tried: &'a mut [u32],
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
    summary: Summary,
}

/// What becomes of a node.
enum Step {
    /// On to this child.
    Go(usize),
    /// The walk ends with this token, `None` if none has any weight.
    Emit(Option<u64>),
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

    /// The token of a node, if it is one.
    fn token(&self, request: &Request, node: usize) -> Option<u32> {
        let token = self.drafts[request.row + node];
        (0..self.plan.vocab as i64).contains(&i64::from(token)).then_some(token as u32)
    }

    /// Whether a node is linked as it must be.
    fn is_linked_well(&self, request: &Request, node: usize) -> bool {
        let within =
            |link: i32, least: usize| link == -1 || (least as i64..request.nodes as i64).contains(&i64::from(link));
        match self.links {
            Links::Parents(parents) => {
                let parent = parents[request.row + node];
                if node == 0 { parent == -1 } else { parent == -1 || (0..node as i64).contains(&i64::from(parent)) }
            }
            Links::Children { first, next } => {
                within(first[request.row + node], node + 1) && within(next[request.row + node], 1)
            }
        }
    }

    /// The children of a node that are drafts, in the order of trial; how many.
    fn children(&self, request: &Request, node: usize, children: &mut [u32], said: &mut u32) -> usize {
        let mut count = 0;
        match self.links {
            Links::Parents(parents) => {
                for child in node + 1..request.nodes {
                    if parents[request.row + child] == node as i32 && self.token(request, child).is_some() {
                        children[count] = child as u32;
                        count += 1;
                    }
                }
            }
            Links::Children { first, next } => {
                let mut child = first[request.row + node];
                // A list that is longer than the tree goes in circles.
                for _ in 0..=request.nodes {
                    if !(node as i64 + 1..request.nodes as i64).contains(&i64::from(child)) {
                        if child != -1 {
                            *said |= status::TREE_BAD;
                        }
                        return count;
                    }
                    if self.token(request, child as usize).is_some() && count < request.nodes {
                        children[count] = child as u32;
                        count += 1;
                    }
                    child = next[request.row + child as usize];
                }
                *said |= status::TREE_BAD;
            }
        }
        count
    }

    /// The distribution of the target after a node; its partials are left in the scratch.
    fn p(&self, request: &Request, at: At, scratch: &mut Scratch<'_>, log_probs: bool, said: &mut u32) -> Target {
        let logical = request.row + at.node;
        let row = self.row_index.map_or(logical as i64, |index| i64::from(index[logical]));
        let row = (0..self.plan.target_rows as i64).contains(&row).then_some(row as usize);
        if row.is_none() {
            *said |= status::ROW_OUT_OF_RANGE;
        }
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

    /// The distribution that the children of a node were drawn from. `Ok(None)`: the drafter is greedy; `Err`: it is of no use.
    fn q(&self, request: &Request, at: At, scratch: &mut Scratch<'_>, said: &mut u32) -> Result<Option<Draft>, ()> {
        let logical = request.row + at.node;
        let row = self.draft_row.map_or(logical as i64, |rows| i64::from(rows[logical]));
        if !(0..self.plan.draft_rows as i64).contains(&row) {
            *said |= status::ROW_OUT_OF_RANGE | status::DRAFT_BAD;
            return Err(());
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
            Shape::Peak => return Ok(None),
            Shape::Spread { .. } => return Ok(Some(Draft { row, summary })),
        }
        *said |= status::DRAFT_BAD;
        Err(())
    }

    /// Weight of a token in the draft.
    fn q_weight(&self, q: &Draft, token: u64) -> f32 {
        match self.draft_column(token) {
            Some(column) => q.summary.weight(self.draft(q.row, column)),
            None => 0.0,
        }
    }

    fn p_weight(&self, p: &Target, token: u64) -> f32 {
        p.distribution.weight(token, self.target(p.row, p.logical, token))
    }

    /// The four uniforms of a node that a caller gave.
    fn given(&self, request: &Request, node: usize) -> Option<[f32; 4]> {
        let nodes = self.plan.max_nodes as usize;
        self.uniforms.map(|given| given[(request.index * nodes + node) * 4..][..4].try_into().expect("four"))
    }

    fn draws(&self, request: &Request, at: At, domain: Domain, draw: u32) -> [f32; 4] {
        let row = if domain == Domain::Sample { 0 } else { at.depth as u32 };
        uniforms(request.seed, request.position.wrapping_add(at.depth as u64), domain, row, draw)
    }

    fn three(&self, request: &Request, at: At, domain: Domain) -> [f32; 3] {
        match self.given(request, at.node) {
            Some([_, a, b, c]) => [a, b, c],
            None => {
                let [a, b, c, _] = self.draws(request, at, domain, 0);
                [a, b, c]
            }
        }
    }

    /// A token of the target itself.
    fn sample(&self, request: &Request, at: At, p: &Target, partials: &[Partial], domain: Domain) -> Option<u64> {
        p.distribution.peak.or_else(|| {
            let logit = |column| self.target(p.row, p.logical, column);
            p.distribution.summary.sample(partials, self.three(request, at, domain), self.plan.vocab, logit)
        })
    }

    /// What the walk does at a node.
    fn step(&self, request: &Request, at: At, p: &Target, scratch: &mut Scratch<'_>, said: &mut u32) -> Step {
        let count = self.children(request, at.node, scratch.children, said);
        let leaf = at.depth == self.plan.max_depth as usize;
        if count > 0 && leaf {
            *said |= status::DRAFTS_IGNORED;
        }
        if p.distribution.summary.shape == Shape::Empty {
            return Step::Emit(None);
        }
        let count = if leaf { 0 } else { count };
        let random = request.rule == Rule::Reject
            && self.plan.drafts != Drafts::Deterministic
            && p.distribution.peak.is_none()
            && count > 0;
        let q = if random { self.q(request, at, scratch, said) } else { Ok(None) };
        match q {
            Ok(Some(q)) => self.try_children(request, at, p, &q, count, scratch, said),
            other => {
                let token = self.sample(request, at, p, scratch.target, Domain::Sample);
                let chosen = scratch.children[..count]
                    .iter()
                    .find(|&&child| other.is_ok() && self.token(request, child as usize).map(u64::from) == token);
                match chosen {
                    Some(&child) => Step::Go(child as usize),
                    None => Step::Emit(token),
                }
            }
        }
    }

    /// Recursive rejection: what is left of p after some children is `max(p - c q, 0)`, here in units of p's weights.
    #[allow(clippy::too_many_arguments)]
    fn try_children(
        &self,
        request: &Request,
        at: At,
        p: &Target,
        q: &Draft,
        count: usize,
        scratch: &mut Scratch<'_>,
        said: &mut u32,
    ) -> Step {
        let distinct = self.plan.siblings == Siblings::WithoutReplacement;
        let (p_sum, q_sum) = (p.distribution.sum(), q.summary.sum());
        // A child's test is u * step + c against p / q; step is what c grows by when it fails.
        let (mut c, mut step, mut tried) = (0f32, p_sum / q_sum, 0);
        for j in 0..count {
            let child = scratch.children[j] as usize;
            let token = self.token(request, child).expect("children are drafts");
            let (p_weight, q_weight) = (self.p_weight(p, token.into()), self.q_weight(q, token.into()));
            let again = distinct && scratch.tried[..tried].contains(&token);
            if q_weight == 0.0 || again {
                *said |= status::DRAFT_IMPOSSIBLE;
                if p_weight > 0.0 && !again {
                    return Step::Go(child);
                }
                continue;
            }
            let uniform = match self.given(request, child) {
                Some([uniform, ..]) => uniform,
                None => self.draws(request, at, Domain::Accept, j as u32)[0],
            };
            let threshold = uniform.mul_add(step, c);
            if (-threshold).mul_add(q_weight, p_weight) > 0.0 {
                return Step::Go(child);
            }
            c += step;
            scratch.tried[tried] = token;
            tried += 1;
            let mass = self.residual_mass(c, p, q, scratch);
            if mass == 0.0 {
                // p is q but for rounding.
                return Step::Emit(self.sample(request, at, p, scratch.target, Domain::Residual));
            }
            step = mass / if distinct { self.left(q, scratch, tried) } else { q_sum };
        }
        if tried == 0 {
            return Step::Emit(self.sample(request, at, p, scratch.target, Domain::Sample));
        }
        let [x, y, z] = self.three(request, at, Domain::Residual);
        let token = pick_chunk(scratch.residual.len(), x, |chunk| scratch.residual[chunk]).and_then(|chunk| {
            let chunk = chunk as u64;
            let weight = |lane, place| self.residual(c, p, q, column(chunk, lane, place));
            let (lane, place) = pick_place([y, z], lanes_with_columns(chunk, self.plan.vocab), weight)?;
            Some(column(chunk, lane, place))
        });
        Step::Emit(token)
    }

    fn residual(&self, c: f32, p: &Target, q: &Draft, column: u64) -> f32 {
        let of_p = self.p_weight(p, column);
        if of_p == 0.0 {
            return 0.0;
        }
        let rest = (-c).mul_add(self.q_weight(q, column), of_p);
        if rest > 0.0 { rest } else { 0.0 }
    }

    /// The sum over a row of `max(p - c q, 0)`, chunks' sums left in the scratch.
    fn residual_mass(&self, c: f32, p: &Target, q: &Draft, scratch: &mut Scratch<'_>) -> f32 {
        for (chunk, sum) in scratch.residual.iter_mut().enumerate() {
            let chunk = chunk as u64;
            let weight = |lane, place| self.residual(c, p, q, column(chunk, lane, place));
            let lanes = lane_sums(lanes_with_columns(chunk, self.plan.vocab), &weight);
            *sum = scan(lanes)[31];
        }
        total(scratch.residual.len(), |chunk| scratch.residual[chunk])
    }

    /// What q has beside the tokens tried.
    fn left(&self, q: &Draft, scratch: &mut Scratch<'_>, tried: usize) -> f32 {
        for (chunk, sum) in scratch.left.iter_mut().enumerate() {
            let chunk = chunk as u64;
            let weight = |lane, place| {
                let column = column(chunk, lane, place);
                let is_tried = |&token: &u32| self.draft_column(token.into()) == Some(column);
                let tried = scratch.tried[..tried].iter().any(is_tried);
                if tried { 0.0 } else { q.summary.weight(self.draft(q.row, column)) }
            };
            let lanes = lane_sums(lanes_with_columns(chunk, self.plan.draft_vocab), &weight);
            *sum = scan(lanes)[31];
        }
        total(scratch.left.len(), |chunk| scratch.left[chunk])
    }
}

pub(super) fn run<P: Float, Q: Float>(plan: &Plan, args: &mut TreeVerifierArgs<'_, P, Q>) {
    let options = &args.options;
    let cu_rows = options.cu_rows.as_ref().map(|view| view.as_host().expect(HERE));
    let rules = options.rules.as_ref().map(|view| view.as_host().expect(HERE));
    let floats = |view: &Option<In<'_, f32>>, b: usize| view.as_ref().map(|v| v.as_host().expect(HERE)[b]);
    let words = |view: &Option<In<'_, i64>>, b: usize| view.as_ref().map_or(0, |v| v.as_host().expect(HERE)[b] as u64);
    let inputs = Inputs {
        plan,
        target: args.target.as_host().expect(HERE),
        draft: options.draft.as_ref().map_or(&[], |view| view.as_host().expect(HERE)),
        drafts: args.drafts.as_host().expect(HERE),
        links: match &args.tree {
            TreeLinks::Parents(parents) => Links::Parents(parents.as_host().expect(HERE)),
            TreeLinks::Children { first_child, next_sibling } => {
                Links::Children { first: first_child.as_host().expect(HERE), next: next_sibling.as_host().expect(HERE) }
            }
        },
        row_index: options.row_index.as_ref().map(|view| view.as_host().expect(HERE)),
        draft_row: options.draft_row.as_ref().map(|view| view.as_host().expect(HERE)),
        draft_stats: options.draft_stats.as_ref().map(|view| view.as_host().expect(HERE)),
        target_stats: options.target_stats.as_ref().map(|view| view.as_host().expect(HERE)),
        target_to_draft: options.target_to_draft.as_ref().map(|view| view.as_host().expect(HERE)),
        allow: options.allow.as_ref().map(|view| view.as_host().expect(HERE)),
        uniforms: options.uniforms.as_ref().map(|view| view.as_host().expect(HERE)),
    };
    let kv_start = options.kv_start.as_ref().map(|view| view.as_host().expect(HERE));
    let kv_slots = options.kv_slots.as_ref().map(|view| view.as_host().expect(HERE));
    let tokens = args.out.tokens.as_host().expect(HERE);
    let emitted = args.out.emitted.as_host().expect(HERE);
    let accepted = args.out.accepted.as_host().expect(HERE);
    let statuses = args.out.status.as_host().expect(HERE);
    fn opened<'v, T: crate::dtype::Element>(view: &'v mut Option<Out<'_, T>>) -> Option<&'v mut [T]> {
        view.as_mut().map(|view| view.as_host().expect(HERE))
    }
    let mut last_row = opened(&mut args.out.last_row);
    let mut path = opened(&mut args.out.path);
    let mut kv_source = opened(&mut args.out.kv_source);
    let mut kv_destination = opened(&mut args.out.kv_destination);
    let mut log_probs = opened(&mut args.out.log_probs);

    let (of_target, of_draft) = (chunks(plan.vocab) as usize, chunks(plan.draft_vocab) as usize);
    let workspace = args.workspace.as_host().expect(HERE);
    let bytes = workspace_bytes(plan.vocab, plan.draft_vocab, plan.max_nodes) as usize;
    let floats_of: &mut [f32] = bytemuck::cast_slice_mut(&mut workspace[..bytes]);
    let (target, rest) = floats_of.split_at_mut(of_target * 2);
    let (draft, rest) = rest.split_at_mut(of_draft * 2);
    let (residual, rest) = rest.split_at_mut(of_target);
    let (left, rest) = rest.split_at_mut(of_draft);
    let (children, rest) = rest.split_at_mut(plan.max_nodes as usize);
    let scratch = &mut Scratch {
        target: bytemuck::cast_slice_mut(target),
        draft: bytemuck::cast_slice_mut(draft),
        residual,
        left,
        children: bytemuck::cast_slice_mut(children),
        tried: bytemuck::cast_slice_mut(&mut rest[..plan.max_nodes as usize]),
    };

    let columns = plan.max_depth as usize + 1;
    let wants_log_probs = log_probs.is_some();
    for b in 0..plan.batch as usize {
        let mut said = 0;
        let most = plan.rows() as i64;
        let (first, end) = match cu_rows {
            Some(cu_rows) => (i64::from(cu_rows[b]), i64::from(cu_rows[b + 1])),
            None => (b as i64 * plan.max_nodes as i64, (b + 1) as i64 * plan.max_nodes as i64),
        };
        // Rows outside the arrays of rows are not there.
        let first = first.clamp(0, most);
        let nodes = (end.min(most) - first).clamp(0, plan.max_nodes as i64) as usize;
        if end - first > nodes as i64 {
            said |= status::DRAFTS_IGNORED;
        }
        let temperature = floats(&args.options.temperature, b).unwrap_or(1.0);
        let rule = rules.map_or(plan.rule, |rules| tree_rule(rules[b]).unwrap_or(plan.rule));
        let request = Request {
            index: b,
            row: first as usize,
            nodes,
            rule,
            scale: if rule == Rule::Greedy { None } else { Scale::of(temperature) },
            draft_scale: Scale::of(floats(&args.options.draft_temperature, b).unwrap_or(temperature)),
            truncation: Truncation {
                top_k: args.options.top_k.as_ref().map_or(0, |view| view.as_host().expect(HERE)[b].max(0) as u32),
                top_p: floats(&args.options.top_p, b).unwrap_or(1.0),
                min_p: floats(&args.options.min_p, b).unwrap_or(0.0),
            },
            seed: words(&args.options.seeds, b),
            position: words(&args.options.positions, b),
        };
        if !(0..nodes).all(|node| inputs.is_linked_well(&request, node)) {
            said |= status::TREE_BAD;
        }
        let of_step = b * columns..(b + 1) * columns;
        tokens[of_step.clone()].fill(-1);
        for plain in [&mut path, &mut kv_source, &mut kv_destination].into_iter().flatten() {
            plain[of_step.clone()].fill(-1);
        }
        if let Some(log_probs) = &mut log_probs {
            log_probs[of_step.clone()].fill(f32::NAN);
        }
        let mut at = At { node: 0, depth: 0 };
        let mut going = nodes > 0;
        while going {
            let place = of_step.start + at.depth;
            if let Some(path) = &mut path {
                path[place] = at.node as i32;
            }
            let slot = |node: usize| match (kv_slots, kv_start) {
                (Some(slots), _) => slots[request.row + node],
                (None, start) => start.map_or(0, |start| start[b]).wrapping_add(node as i32),
            };
            if let Some(source) = &mut kv_source {
                source[place] = slot(at.node);
            }
            if let Some(destination) = &mut kv_destination {
                destination[place] = slot(at.depth);
            }
            let p = inputs.p(&request, at, scratch, wants_log_probs, &mut said);
            let step = inputs.step(&request, at, &p, scratch, &mut said);
            tokens[place] = match step {
                Step::Go(child) => inputs.drafts[request.row + child],
                Step::Emit(token) => token.map_or(plan.fallback, |token| token as i32),
            };
            if let Some(log_probs) = &mut log_probs {
                let logit = inputs.target(p.row, p.logical, tokens[place].max(0) as u64);
                log_probs[place] = p.measured.log_probability(logit);
            }
            match step {
                Step::Go(child) => at = At { node: child, depth: at.depth + 1 },
                Step::Emit(_) => going = false,
            }
        }
        emitted[b] = Emitted(if nodes > 0 { at.depth as i32 + 1 } else { 0 });
        accepted[b] = Accepted(at.depth as i32);
        statuses[b] = said;
        if let Some(last_row) = &mut last_row {
            last_row[b] = if nodes > 0 { (request.row + at.node) as i32 } else { -1 };
        }
    }
}

/// Bytes of workspace that the host needs.
pub(super) fn workspace_bytes(vocab: u64, draft_vocab: u64, max_nodes: u64) -> u64 {
    (chunks(vocab) * 3 + chunks(draft_vocab) * 3 + max_nodes * 2) * 4
}
