//! What the tests of trees share: steps as plain data, an oracle in f64 by the definitions, trees of a small model.

#![allow(dead_code)] // each test uses its part

use nextscale::dtype::Float;
use nextscale::verification::{
    Accepted, DraftSample, DraftSampleArgs, Drafts, Emitted, Rule, Siblings, Tree, TreeLinks, TreeVerifier,
    TreeVerifierArgs, TreeVerifierBuilder, TreeVerifierOptions, TreeVerifierOut,
};
use nextscale::{DeviceInfo, philox};

use crate::support::{Buffer, TestDevice};
use crate::verification::{Chain, Draws, Sampling, draft, draft_draws, sample};

/// What a wrong implementation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    None,
    /// Every sibling is tested against p / q as they were, and the token comes from max(p - q, 0).
    OriginalRatio,
    /// max(r - q, 0) is not normalised.
    NotNormalised,
    /// Siblings were drawn without replacement and are taken for independent ones.
    ForgetsReplacement,
    /// After the last sibling a token of p.
    NoResidual,
    /// p and q swapped.
    Inverted,
}

/// How nodes are linked.
#[derive(Debug, Clone, PartialEq)]
pub enum Links {
    Parents(Vec<i32>),
    Children { first: Vec<i32>, next: Vec<i32> },
}

/// A step, as plain data. Rows are `batch * max_nodes`.
#[derive(Debug, Clone)]
pub struct Step<P, Q> {
    pub vocab: usize,
    pub batch: usize,
    pub max_nodes: usize,
    pub max_depth: usize,
    pub target: Vec<P>,
    pub target_stride: usize,
    pub links: Links,
    pub drafts: Vec<i32>,
    pub kind: Drafts,
    pub siblings: Siblings,
    pub rule: Rule,
    pub cluster: Option<u32>,
    pub cu_rows: Option<Vec<i32>>,
    pub draft: Vec<Q>,
    pub draft_vocab: usize,
    pub draft_stride: usize,
    pub row_index: Option<Vec<i32>>,
    pub draft_row: Option<Vec<i32>>,
    pub draft_stats: Option<Vec<f32>>,
    pub target_to_draft: Option<Vec<i32>>,
    pub target_stats: Option<Vec<f32>>,
    pub allow: Option<Vec<u32>>,
    pub rules: Option<Vec<i32>>,
    pub temperature: Option<Vec<f32>>,
    pub draft_temperature: Option<Vec<f32>>,
    pub top_k: Option<Vec<i32>>,
    pub top_p: Option<Vec<f32>>,
    pub min_p: Option<Vec<f32>>,
    pub seeds: Option<Vec<i64>>,
    pub positions: Option<Vec<i64>>,
    pub uniforms: Option<Vec<f32>>,
    pub kv_start: Option<Vec<i32>>,
    pub kv_slots: Option<Vec<i32>>,
    pub log_probs: bool,
    /// Elements by which the target and the draft start off their alignment.
    pub shift: [usize; 2],
}

/// What a step gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub tokens: Vec<i32>,
    pub emitted: Vec<Emitted>,
    pub accepted: Vec<Accepted>,
    pub last_row: Vec<i32>,
    pub status: Vec<u32>,
    pub path: Vec<i32>,
    pub kv: [Vec<i32>; 2],
    /// Empty if not asked for.
    pub log_probs: Vec<f32>,
}

impl Outcome {
    /// All that is the same on every device.
    pub fn exact(&self) -> Outcome {
        Outcome { log_probs: Vec::new(), ..self.clone() }
    }
}

impl<P: Float, Q: Float> Step<P, Q> {
    /// Contiguous rows of zeroes, all requests with this tree, nothing optional.
    pub fn new(vocab: usize, batch: usize, tree: &Tree) -> Self {
        let rows = batch * tree.len();
        Step {
            vocab,
            batch,
            max_nodes: tree.len(),
            max_depth: tree.max_depth(),
            target: vec![P::from_f32(0.0); rows * vocab],
            target_stride: vocab,
            links: Links::Parents(tree.parents().repeat(batch)),
            drafts: vec![-1; rows],
            kind: Drafts::Deterministic,
            siblings: Siblings::WithReplacement,
            rule: Rule::Reject,
            cluster: None,
            cu_rows: None,
            draft: Vec::new(),
            draft_vocab: vocab,
            draft_stride: vocab,
            row_index: None,
            draft_row: None,
            draft_stats: None,
            target_to_draft: None,
            target_stats: None,
            allow: None,
            rules: None,
            temperature: None,
            draft_temperature: None,
            top_k: None,
            top_p: None,
            min_p: None,
            seeds: None,
            positions: None,
            uniforms: None,
            kv_start: None,
            kv_slots: None,
            log_probs: false,
            shift: [0; 2],
        }
    }

    pub fn rows(&self) -> usize {
        self.batch * self.max_nodes
    }

    /// The first row of a request, and its nodes.
    pub fn rows_of(&self, b: usize) -> (usize, usize) {
        match &self.cu_rows {
            Some(cu_rows) => {
                let first = cu_rows[b].clamp(0, self.rows() as i32);
                let end = cu_rows[b + 1].min(self.rows() as i32);
                (first as usize, ((end - first).max(0) as usize).min(self.max_nodes))
            }
            None => (b * self.max_nodes, self.max_nodes),
        }
    }

    pub fn builder(&self) -> TreeVerifierBuilder<P, Q> {
        let rows = |len: usize, columns: usize, stride: usize| match len {
            0 => 0,
            _ => (len - columns) / stride.max(1) + 1,
        };
        let mut builder = TreeVerifier::builder(self.batch, self.max_nodes, self.max_depth, self.vocab)
            .target_rows(rows(self.target.len(), self.vocab, self.target_stride))
            .target_row_stride(self.target_stride as i64)
            .draft_vocab(self.draft_vocab)
            .draft_rows(rows(self.draft.len(), self.draft_vocab, self.draft_stride))
            .draft_row_stride(self.draft_stride as i64)
            .drafts(self.kind)
            .siblings(self.siblings)
            .rule(self.rule)
            .fallback_token(-7);
        if self.rules.is_some() {
            builder = builder.rules_per_request();
        }
        if let Some(cluster) = self.cluster {
            builder = builder.cluster(cluster);
        }
        builder
    }

    pub fn run(&self, device: &TestDevice) -> Outcome {
        self.run_for(device, &DeviceInfo::H200)
    }

    /// With a plan made for `info`, which decides how the work is cut.
    pub fn run_for(&self, device: &TestDevice, info: &DeviceInfo) -> Outcome {
        let plan = self.builder().build(info).unwrap();
        let batch = self.batch;
        let written = batch * (self.max_depth + 1);
        fn buffer<T: nextscale::dtype::Element>(device: &TestDevice, of: &Option<Vec<T>>) -> Option<Buffer<T>> {
            of.as_ref().map(|elements| Buffer::of(device, elements, 1))
        }
        let target = Buffer::of(device, &self.target, self.shift[0]);
        let draft = Buffer::of(device, &self.draft, self.shift[1]);
        let drafts = Buffer::of(device, &self.drafts, 0);
        let (one, other) = match &self.links {
            Links::Parents(parents) => (Buffer::of(device, parents, 1), None),
            Links::Children { first, next } => (Buffer::of(device, first, 1), Some(Buffer::of(device, next, 1))),
        };
        let tree = match &other {
            None => TreeLinks::Parents(one.input()),
            Some(next) => TreeLinks::Children { first_child: one.input(), next_sibling: next.input() },
        };
        let cu_rows = buffer(device, &self.cu_rows);
        let row_index = buffer(device, &self.row_index);
        let draft_row = buffer(device, &self.draft_row);
        let draft_stats = buffer(device, &self.draft_stats);
        let target_to_draft = buffer(device, &self.target_to_draft);
        let target_stats = buffer(device, &self.target_stats);
        let allow = buffer(device, &self.allow);
        let rules = buffer(device, &self.rules);
        let temperature = buffer(device, &self.temperature);
        let draft_temperature = buffer(device, &self.draft_temperature);
        let (top_k, top_p, min_p) =
            (buffer(device, &self.top_k), buffer(device, &self.top_p), buffer(device, &self.min_p));
        let (seeds, positions) = (buffer(device, &self.seeds), buffer(device, &self.positions));
        let uniforms = buffer(device, &self.uniforms);
        let (kv_start, kv_slots) = (buffer(device, &self.kv_start), buffer(device, &self.kv_slots));
        let mut tokens = Buffer::<i32>::poisoned(device, written, 1);
        let mut emitted = Buffer::<Emitted>::poisoned(device, batch, 1);
        let mut accepted = Buffer::<Accepted>::poisoned(device, batch, 1);
        let mut status = Buffer::<u32>::poisoned(device, batch, 1);
        let mut last_row = Buffer::<i32>::poisoned(device, batch, 1);
        let mut path = Buffer::<i32>::poisoned(device, written, 1);
        let mut kv = [0; 2].map(|_| Buffer::<i32>::poisoned(device, written, 1));
        let mut log_probs = Buffer::<f32>::poisoned(device, written, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let [source, destination] = &mut kv;
        plan.run(
            &device.stream(),
            TreeVerifierArgs {
                target: target.input(),
                tree,
                drafts: drafts.input(),
                options: TreeVerifierOptions {
                    cu_rows: cu_rows.as_ref().map(Buffer::input),
                    row_index: row_index.as_ref().map(Buffer::input),
                    draft: (self.kind != Drafts::Deterministic).then(|| draft.input()),
                    draft_row: draft_row.as_ref().map(Buffer::input),
                    draft_stats: draft_stats.as_ref().map(Buffer::input),
                    target_to_draft: target_to_draft.as_ref().map(Buffer::input),
                    target_stats: target_stats.as_ref().map(Buffer::input),
                    allow: allow.as_ref().map(Buffer::input),
                    rules: rules.as_ref().map(Buffer::input),
                    temperature: temperature.as_ref().map(Buffer::input),
                    draft_temperature: draft_temperature.as_ref().map(Buffer::input),
                    top_k: top_k.as_ref().map(Buffer::input),
                    top_p: top_p.as_ref().map(Buffer::input),
                    min_p: min_p.as_ref().map(Buffer::input),
                    seeds: seeds.as_ref().map(Buffer::input),
                    positions: positions.as_ref().map(Buffer::input),
                    uniforms: uniforms.as_ref().map(Buffer::input),
                    kv_start: kv_start.as_ref().map(Buffer::input),
                    kv_slots: kv_slots.as_ref().map(Buffer::input),
                },
                out: TreeVerifierOut {
                    tokens: tokens.output(),
                    emitted: emitted.output(),
                    accepted: accepted.output(),
                    status: status.output(),
                    last_row: Some(last_row.output()),
                    path: Some(path.output()),
                    kv_source: Some(source.output()),
                    kv_destination: Some(destination.output()),
                    log_probs: self.log_probs.then(|| log_probs.output()),
                },
                workspace: workspace.output(),
            },
        )
        .unwrap();
        workspace.read();
        Outcome {
            tokens: tokens.read(),
            emitted: emitted.read(),
            accepted: accepted.read(),
            last_row: last_row.read(),
            status: status.read(),
            path: path.read(),
            kv: kv.map(|buffer| buffer.read()),
            log_probs: if self.log_probs { log_probs.read() } else { Vec::new() },
        }
    }

    /// The logits of a row, -inf where it is not allowed.
    pub fn target_logits(&self, logical: usize) -> Option<Vec<f64>> {
        let row = self.row_index.as_ref().map_or(logical as i32, |index| index[logical]);
        if row < 0 || row as usize * self.target_stride + self.vocab > self.target.len() {
            return None;
        }
        let words = self.vocab.div_ceil(32);
        let logits = (0..self.vocab).map(|column| match &self.allow {
            Some(allow) if allow[logical * words + column / 32] >> (column % 32) & 1 == 0 => f64::NEG_INFINITY,
            _ => f64::from(self.target[row as usize * self.target_stride + column].to_f32()),
        });
        Some(logits.collect())
    }

    pub fn rule_of(&self, b: usize) -> Rule {
        let given = self.rules.as_ref().and_then(|rules| Rule::from_code(rules[b]));
        given.filter(|&rule| rule != Rule::Block).unwrap_or(self.rule)
    }

    pub fn sampling(&self, b: usize) -> Sampling {
        Sampling {
            temperature: self.temperature.as_ref().map_or(1.0, |of| of[b]),
            top_k: self.top_k.as_ref().map_or(0, |of| of[b]),
            top_p: self.top_p.as_ref().map_or(1.0, |of| of[b]),
            min_p: self.min_p.as_ref().map_or(0.0, |of| of[b]),
        }
    }

    /// The distribution of the target after a node; all zero if there is none.
    pub fn p(&self, b: usize, logical: usize, margin: &mut f64) -> Vec<f64> {
        match self.target_logits(logical) {
            Some(logits) => self.sampling(b).probabilities(&logits, self.rule_of(b) == Rule::Greedy, margin),
            None => vec![0.0; self.vocab],
        }
    }

    /// What the children of a node were drawn from: `Err` for a bad row, `Ok(None)` if not at random.
    pub fn q(&self, b: usize, logical: usize, margin: &mut f64) -> Result<Option<Vec<f64>>, ()> {
        if self.kind == Drafts::Deterministic {
            return Ok(None);
        }
        let row = self.draft_row.as_ref().map_or(logical as i32, |rows| rows[logical]);
        if row < 0 || row as usize * self.draft_stride + self.draft_vocab > self.draft.len() {
            return Err(());
        }
        let logits: Vec<f64> = (0..self.draft_vocab)
            .map(|column| f64::from(self.draft[row as usize * self.draft_stride + column].to_f32()))
            .collect();
        if logits.iter().any(|logit| logit.is_nan()) || logits.iter().all(|&l| l == f64::NEG_INFINITY) {
            return Err(());
        }
        let temperature = match &self.draft_temperature {
            Some(of) => of[b],
            None => self.sampling(b).temperature,
        };
        if temperature < 1e-5 {
            return Ok(None);
        }
        let of_draft = Sampling::at(temperature).probabilities(&logits, false, margin);
        let by_token = (0..self.vocab).map(|token| match &self.target_to_draft {
            Some(map) if map[token] < 0 => 0.0,
            Some(map) => of_draft[map[token] as usize],
            None => of_draft.get(token).copied().unwrap_or(0.0),
        });
        Ok(Some(by_token.collect()))
    }

    /// The children of a node that are drafts, in the order of trial.
    pub fn children(&self, b: usize, node: usize) -> Vec<usize> {
        let (first, nodes) = self.rows_of(b);
        let is_draft = |&child: &usize| (0..self.vocab as i32).contains(&self.drafts[first + child]);
        match &self.links {
            Links::Parents(parents) => {
                (node + 1..nodes).filter(|&c| parents[first + c] == node as i32).filter(is_draft).collect()
            }
            Links::Children { first: first_child, next } => {
                let mut all = Vec::new();
                let mut at = first_child[first + node];
                while at != -1 {
                    all.push(at as usize);
                    at = next[first + at as usize];
                }
                all.into_iter().filter(is_draft).collect()
            }
        }
    }

    /// The oracle's walk for request `b`: nodes from the root on, the token after them, how close any choice was.
    pub fn oracle(&self, b: usize, flaw: Flaw) -> (Vec<usize>, Option<usize>, f64) {
        let (mut path, mut margin) = (vec![0], 1.0);
        let (first, _) = self.rows_of(b);
        let rule = self.rule_of(b);
        let token_of = |node: usize| self.drafts[first + node] as usize;
        loop {
            let (node, depth) = (*path.last().unwrap(), path.len() - 1);
            let p = self.p(b, first + node, &mut margin);
            if p.iter().all(|&p| p == 0.0) {
                return (path, None, margin);
            }
            // Not where truncation or the mask left only one.
            let top = self.target_logits(first + node).unwrap().into_iter().fold(f64::NEG_INFINITY, f64::max);
            let temperature = self.sampling(b).temperature;
            let is_peak = rule == Rule::Greedy
                || temperature < 1e-5
                || top == f64::INFINITY
                || (top / f64::from(temperature)).abs() > 1.4e6;
            let children = if depth < self.max_depth { self.children(b, node) } else { Vec::new() };
            let word = |of: &Option<Vec<i64>>| of.as_ref().map_or(0, |of| of[b] as u64);
            let drawn = draws(word(&self.seeds), word(&self.positions), depth);
            let given = |node: usize| {
                self.uniforms.as_ref().map(|all| {
                    let of = &all[(b * self.max_nodes + node) * 4..][..4];
                    (of[0], [of[1], of[2], of[3]])
                })
            };
            let of_target = given(node).map_or(drawn.sample, |of| of.1);
            let of_residual = given(node).map_or(drawn.residual, |of| of.1);
            let token = |weights: &[f64], draws: [f32; 3], margin: &mut f64| match is_peak {
                true => weights.iter().position(|&weight| weight > 0.0),
                false => sample(weights, draws, margin),
            };
            let random = rule == Rule::Reject && !is_peak && !children.is_empty();
            let q = if random { self.q(b, first + node, &mut margin) } else { Ok(None) };
            let Ok(Some(q)) = q else {
                let x = token(&p, of_target, &mut margin);
                let matches = q.is_ok();
                match children.into_iter().find(|&child| matches && Some(token_of(child)) == x) {
                    Some(child) => path.push(child),
                    None => return (path, x, margin),
                }
                continue;
            };
            let (mut r, mut rest, mut tried) = (p.clone(), q.clone(), Vec::new());
            // How much of p is left: errors grow as it shrinks.
            let mut left = 1.0;
            let mut chosen = None;
            for (j, &child) in children.iter().enumerate() {
                let x = token_of(child);
                let again = self.siblings == Siblings::WithoutReplacement && tried.contains(&x);
                if q[x] == 0.0 || again {
                    if p[x] > 0.0 && !again {
                        chosen = Some(child);
                        break;
                    }
                    continue;
                }
                let u = match given(child) {
                    Some((u, _)) => u,
                    None => accept_draw(word(&self.seeds), word(&self.positions), depth, j as u32),
                };
                let (above, below) = match flaw {
                    Flaw::OriginalRatio => (p[x], q[x]),
                    Flaw::Inverted => (rest[x], r[x]),
                    _ => (r[x], rest[x]),
                };
                let tested = f64::from(u) * below;
                if above > 0.0 {
                    margin = f64::min(margin, (tested / above - 1.0).abs() * left);
                }
                if tested < above {
                    chosen = Some(child);
                    break;
                }
                tried.push(x);
                let residual: Vec<f64> = r.iter().zip(&rest).map(|(r, q)| (r - q).max(0.0)).collect();
                let mass: f64 = residual.iter().sum();
                if mass * left < 1e-4 {
                    return (path, sample(&p, of_residual, &mut margin), 0.0);
                }
                left *= mass;
                let whole = if flaw == Flaw::NotNormalised { 1.0 } else { mass };
                r = residual.iter().map(|r| r / whole).collect();
                if self.siblings == Siblings::WithoutReplacement && flaw != Flaw::ForgetsReplacement {
                    rest[x] = 0.0;
                    let whole: f64 = rest.iter().sum();
                    if whole > 0.0 {
                        rest.iter_mut().for_each(|q| *q /= whole);
                    }
                }
            }
            if let Some(child) = chosen {
                path.push(child);
                continue;
            }
            if tried.is_empty() {
                let x = sample(&p, of_target, &mut margin);
                return (path, x, margin);
            }
            if flaw == Flaw::OriginalRatio {
                r = p.iter().zip(&q).map(|(p, q)| (p - q).max(0.0)).collect();
            }
            if flaw == Flaw::NoResidual {
                r = p;
            }
            let mut close = 1.0;
            let x = sample(&r, of_residual, &mut close);
            return (path, x, f64::min(margin, close * left));
        }
    }
}

/// The draws at a depth as the documentation says.
pub fn draws(seed: u64, position: u64, depth: usize) -> Draws {
    crate::verification::draws(seed, position, depth)
}

/// The accept test of a child.
pub fn accept_draw(seed: u64, position: u64, depth: usize, child: u32) -> f32 {
    philox::uniform(philox::block(seed, position.wrapping_add(depth as u64), 1 | (depth as u32) << 8, child)[0])
}

/// How the tokens of a model are made.
#[derive(Debug, Clone)]
pub struct How {
    pub tree: Tree,
    pub rule: Rule,
    pub kind: Drafts,
    pub siblings: Siblings,
    pub temperature: f32,
    /// Decisions by the oracle with this flaw, instead of the op.
    pub flaw: Option<Flaw>,
    /// The residual's uniforms are those of the drafter's first child.
    pub shares_noise: bool,
    /// The children of a node are drawn in one go, like this, instead of one after the other from rows that lack the
    /// others.
    pub at_once: Option<Siblings>,
}

impl How {
    pub fn plain(parents: &[i32], rule: Rule, kind: Drafts, siblings: Siblings) -> Self {
        let tree = Tree::from_parents(parents).unwrap();
        How { tree, rule, kind, siblings, temperature: 1.0, flaw: None, shares_noise: false, at_once: None }
    }
}

/// The children of a node, drawn by one call.
struct Children {
    count: usize,
    parent: usize,
    drawing: Siblings,
    temperature: f32,
}

impl Children {
    /// Tokens, `count` a row, and the op's stats.
    fn draw(
        &self,
        device: &TestDevice,
        logits: &[f32],
        vocab: usize,
        seeds: &[i64],
        positions: &[i64],
    ) -> (Vec<i32>, Vec<f32>) {
        let rows = seeds.len();
        let plan = DraftSample::<f32>::builder(rows, vocab).drafts(self.count as u32).siblings(self.drawing);
        let plan = plan.build(&DeviceInfo::H200).unwrap();
        let logits = Buffer::of(device, logits, 0);
        let temperature = Buffer::of(device, &vec![self.temperature; rows], 0);
        let (seeds, positions) = (Buffer::of(device, seeds, 0), Buffer::of(device, positions, 0));
        let numbers = Buffer::of(device, &vec![self.parent as i32; rows], 0);
        let mut tokens = Buffer::<i32>::poisoned(device, rows * self.count, 0);
        let mut stats = Buffer::<f32>::poisoned(device, rows * 4, 0);
        let mut status = Buffer::<u32>::poisoned(device, rows, 0);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(device, &vec![0u32; plan.counter_words()], 0);
        let args = DraftSampleArgs {
            logits: logits.input(),
            temperature: Some(temperature.input()),
            top_k: None,
            top_p: None,
            min_p: None,
            draft_to_target: None,
            seeds: Some(seeds.input()),
            positions: Some(positions.input()),
            rows_in_step: Some(numbers.input()),
            uniforms: None,
            tokens: tokens.output(),
            stats: Some(stats.output()),
            log_probs: None,
            status: status.output(),
            workspace: workspace.output(),
            counters: counters.output(),
        };
        plan.run(&device.stream(), args).unwrap();
        (tokens.read(), stats.read())
    }
}

/// `first` tokens of each of `requests` requests that start after token 0, as counts by the number of which they are the
/// digits; and how many drafts were accepted a step. Children are drawn by the library's own drafter.
pub fn run(chain: &Chain, device: &TestDevice, how: &How, requests: usize, first: u32) -> (Vec<u64>, f64) {
    let (v, n) = (chain.vocab, how.tree.len());
    let depths = how.tree.depths();
    let mut written: Vec<Vec<i32>> = vec![Vec::new(); requests];
    let (mut steps, mut accepted) = (0u64, 0u64);
    while written.iter().any(|tokens| tokens.len() < first as usize) {
        let seeds: Vec<i64> = (0..requests as i64).map(|b| b.wrapping_mul(0x9E37_79B9_7F4A_7C15u64 as i64)).collect();
        let positions: Vec<i64> = written.iter().map(|tokens| 1 + tokens.len() as i64).collect();
        let mut step = Step::<f32, f32>::new(v, requests, &how.tree);
        (step.rule, step.kind, step.siblings) = (how.rule, how.kind, how.siblings);
        step.temperature = Some(vec![how.temperature; requests]);
        step.draft = vec![0.0; requests * n * v];
        let mut stats = vec![0f32; requests * n * 4];
        for node in 0..n {
            // The token of the node: the last one, or a draft after its parent.
            let parent = how.tree.parents()[node];
            for b in 0..requests {
                if node == 0 {
                    step.drafts[b * n] = written[b].last().copied().unwrap_or(0);
                }
            }
            if parent >= 0 {
                let parent = parent as usize;
                let siblings: Vec<usize> =
                    (1..node).filter(|&other| how.tree.parents()[other] == parent as i32).collect();
                let mut drafting = vec![0f32; requests * v];
                for b in 0..requests {
                    let row = &mut drafting[b * v..][..v];
                    row.copy_from_slice(&step.draft[(b * n + parent) * v..][..v]);
                    if how.siblings == Siblings::WithoutReplacement || how.kind == Drafts::Deterministic {
                        for &other in &siblings {
                            row[step.drafts[b * n + other] as usize] = f32::NEG_INFINITY;
                        }
                    }
                }
                let at: Vec<i64> = positions.iter().map(|at| at + i64::from(depths[parent]) - node as i64).collect();
                let drawn = match how.at_once {
                    Some(drawing) => {
                        let drafting: Vec<f32> =
                            (0..requests).flat_map(|b| step.draft[(b * n + parent) * v..][..v].to_vec()).collect();
                        let count = (1..n).filter(|&other| how.tree.parents()[other] == parent as i32).count();
                        let at: Vec<i64> = positions.iter().map(|at| at + i64::from(depths[parent])).collect();
                        let of = Children { count, parent, drawing, temperature: how.temperature };
                        let (tokens, stats) = of.draw(device, &drafting, v, &seeds, &at);
                        (tokens.chunks_exact(count).map(|of_row| of_row[siblings.len()]).collect(), stats)
                    }
                    None => draft(device, &drafting, v, node, how.temperature, &seeds, &at),
                };
                for b in 0..requests {
                    step.drafts[b * n + node] = match how.kind {
                        // The most probable ones.
                        Drafts::Deterministic => {
                            let of = &drafting[b * v..][..v];
                            (0..v).max_by(|&x, &y| of[x].total_cmp(&of[y])).unwrap() as i32
                        }
                        _ => drawn.0[b],
                    };
                    if siblings.is_empty() {
                        stats[(b * n + parent) * 4..][..4].copy_from_slice(&drawn.1[b * 4..][..4]);
                    }
                }
            }
            for b in 0..requests {
                let last = step.drafts[b * n + node] as usize;
                let row = (b * n + node) * v;
                step.target[row..row + v].copy_from_slice(&chain.target[last * v..][..v]);
                step.draft[row..row + v].copy_from_slice(&chain.draft[last * v..][..v]);
            }
        }
        if how.kind == Drafts::LogitsAndStats {
            step.draft_stats = Some(stats);
        }
        (step.seeds, step.positions) = (Some(seeds.clone()), Some(positions.clone()));
        if how.shares_noise {
            let all = (0..requests).flat_map(|b| {
                let (seed, position) = (seeds[b] as u64, positions[b] as u64);
                let (tree, depths) = (&how.tree, &depths);
                (0..n).flat_map(move |node| {
                    let depth = depths[node] as u64;
                    // The draws of the first child of this node.
                    let child = tree.first_child()[node].max(0) as u64;
                    let [x, y, z] = draft_draws(seed, (position + depth).wrapping_sub(child), child as usize);
                    let parent = tree.parents()[node].max(0) as usize;
                    let accept = accept_draw(seed ^ 1 << 50, position, depths[parent] as usize, node as u32);
                    [accept, x, y, z]
                })
            });
            step.uniforms = Some(all.collect());
        }
        match how.flaw {
            Some(flaw) => {
                for (b, tokens) in written.iter_mut().enumerate() {
                    let (path, token, _) = step.oracle(b, flaw);
                    tokens.extend(path[1..].iter().map(|&node| step.drafts[b * n + node]));
                    tokens.push(token.expect("a token") as i32);
                    accepted += path.len() as u64 - 1;
                }
            }
            None => {
                let outcome = step.run(device);
                assert!(outcome.status.iter().all(|&said| said == 0));
                let columns = step.max_depth + 1;
                for (b, tokens) in written.iter_mut().enumerate() {
                    tokens.extend(&outcome.tokens[b * columns..][..outcome.emitted[b].0 as usize]);
                    accepted += outcome.accepted[b].0 as u64;
                }
            }
        }
        steps += requests as u64;
    }
    let mut counts = vec![0; v.pow(first)];
    for tokens in &written {
        counts[tokens[..first as usize].iter().fold(0, |number, &token| number * v + token as usize)] += 1;
    }
    (counts, accepted as f64 / steps as f64)
}
