//! What the tests of the verification ops share: steps as plain data, an oracle in f64, chains of a small model.

#![allow(dead_code)] // each test uses its part

use nextscale::dtype::Float;
use nextscale::verification::{
    Accepted, DraftSample, DraftSampleArgs, Drafts, Emitted, Rule, Verifier, VerifierArgs, VerifierBuilder,
    VerifierOptions, VerifierOut,
};
use nextscale::{DeviceInfo, philox};

use crate::support::{Buffer, TestDevice, poison};

pub const LANES: usize = 32;

/// Columns in the order in which the inverse of the cumulative sum goes through them, by level.
pub fn levels(vocab: usize) -> Vec<Vec<Vec<Vec<usize>>>> {
    let chunks = vocab.div_ceil(1024);
    // Chunks by lane, then lanes of a chunk, then places.
    (0..LANES.min(chunks))
        .map(|lane| {
            (lane..chunks)
                .step_by(LANES)
                .map(|chunk| {
                    (0..LANES)
                        .flat_map(|lane| {
                            let of_lane: Vec<usize> = (0..LANES)
                                .map(|place| chunk * 1024 + place / 8 * 256 + lane * 8 + place % 8)
                                .filter(|&column| column < vocab)
                                .collect();
                            (!of_lane.is_empty()).then_some(of_lane)
                        })
                        .collect()
                })
                .collect()
        })
        .collect()
}

/// The first at which the running sum exceeds `uniform` of the whole, and how close that was to being another one.
fn pick(weights: &[f64], uniform: f64, margin: &mut f64) -> Option<usize> {
    let all: f64 = weights.iter().sum();
    if all == 0.0 {
        return None;
    }
    let (mut sum, mut found) = (0.0, None);
    for (at, weight) in weights.iter().enumerate() {
        sum += weight / all;
        if *weight > 0.0 {
            if at + 1 < weights.len() {
                *margin = margin.min((sum - uniform).abs());
            }
            if found.is_none() && sum > uniform {
                found = Some(at);
            }
        }
    }
    found.or_else(|| weights.iter().rposition(|&weight| weight > 0.0))
}

/// A token drawn by three uniforms.
pub fn sample(weights: &[f64], uniforms: [f32; 3], margin: &mut f64) -> Option<usize> {
    let chunks: Vec<Vec<Vec<usize>>> = levels(weights.len()).into_iter().flatten().collect();
    let sum = |columns: &[usize]| columns.iter().map(|&column| weights[column]).sum::<f64>();
    let masses: Vec<f64> = chunks.iter().map(|lanes| lanes.iter().map(|lane| sum(lane)).sum()).collect();
    let lanes = &chunks[pick(&masses, uniforms[0].into(), margin)?];
    let masses: Vec<f64> = lanes.iter().map(|lane| sum(lane)).collect();
    let lane = &lanes[pick(&masses, uniforms[1].into(), margin)?];
    let masses: Vec<f64> = lane.iter().map(|&column| weights[column]).collect();
    Some(lane[pick(&masses, uniforms[2].into(), margin)?])
}

/// How a row is turned into probabilities.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    pub temperature: f32,
    pub top_k: i32,
    pub top_p: f32,
    pub min_p: f32,
}

impl Sampling {
    pub const PLAIN: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    pub fn at(temperature: f32) -> Self {
        Sampling { temperature, ..Self::PLAIN }
    }

    /// Probabilities in f64; all zero if nothing can be drawn. NaN has none. The margin is how close a column came to
    /// being kept or left out.
    pub fn probabilities(&self, logits: &[f64], greedy: bool, margin: &mut f64) -> Vec<f64> {
        let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut p = vec![0.0; logits.len()];
        if top == f64::NEG_INFINITY {
            return p;
        }
        let temperature = f64::from(self.temperature);
        if greedy || self.temperature < 1e-5 || top == f64::INFINITY || (top / temperature).abs() > 1.4e6 {
            p[logits.iter().position(|&logit| logit == top).unwrap()] = 1.0;
            return p;
        }
        for (p, logit) in p.iter_mut().zip(logits) {
            *p = if logit.is_nan() { 0.0 } else { ((logit - top) / temperature).exp() };
        }
        let mut order: Vec<usize> = (0..logits.len()).filter(|&i| !logits[i].is_nan()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
        let mut cut = f64::NEG_INFINITY;
        if self.top_k > 0 && (self.top_k as usize) < order.len() {
            cut = logits[order[self.top_k as usize - 1]];
        }
        if self.min_p > 0.0 {
            let bound = f64::from(self.min_p);
            for &i in &order {
                *margin = margin.min((p[i] / bound - 1.0).abs());
            }
            let least = order.iter().filter(|&&i| p[i] >= bound).map(|&i| logits[i]).fold(top, f64::min);
            cut = cut.max(least);
        }
        if self.top_p < 1.0 {
            let kept: f64 = order.iter().filter(|&&i| logits[i] >= cut).map(|&i| p[i]).sum();
            let (mut sum, mut least) = (0.0, cut);
            for (rank, &i) in order.iter().enumerate() {
                sum += p[i] / kept;
                if rank + 1 < order.len() && logits[order[rank + 1]] == logits[i] {
                    continue;
                }
                *margin = margin.min((sum - f64::from(self.top_p.max(0.0))).abs());
                if sum >= f64::from(self.top_p) {
                    least = logits[i];
                    break;
                }
            }
            cut = cut.max(least);
        }
        p.iter_mut().zip(logits).for_each(|(p, logit)| {
            // A NaN has none.
            if *logit < cut {
                *p = 0.0;
            }
        });
        let all: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= all);
        p
    }
}

/// What a wrong implementation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    None,
    /// `u q <= p`.
    NotStrict,
    /// Block: stops at the first test that fails.
    BreaksAtFirstFailure,
    /// Block: in place of a draft, the residual of plain rejection.
    PlainResidual,
    /// In place of a draft, a token of p.
    NoResidual,
    /// Accepts with the target's probability, whatever the draft's was.
    TakesDraftsForDeterministic,
    /// The ratio upside down.
    Inverted,
}

/// A decision in f64, from the definitions, with uniforms for each row as the op takes them. `q`: None is a bad row. The
/// margin is how close any choice was to another.
pub fn decide(
    rule: Rule,
    p: &[Vec<f64>],
    q: &[Option<Vec<f64>>],
    drafts: &[Option<usize>],
    uniforms: &dyn Fn(usize) -> Draws,
    flaw: Flaw,
    margin: &mut f64,
) -> (usize, Option<usize>) {
    let k = drafts.len();
    let is_peak = |p: &[f64]| p.iter().filter(|&&p| p > 0.0).count() == 1;
    let token = |weights: &[f64], draws: [f32; 3], margin: &mut f64| match is_peak(weights) {
        true => weights.iter().position(|&weight| weight > 0.0),
        false => sample(weights, draws, margin),
    };
    let residual = |ratio: f64, i: usize| -> Vec<f64> {
        let q = q[i].as_ref().unwrap();
        p[i].iter().zip(q).map(|(p, q)| (ratio * p - q).max(0.0)).collect()
    };
    let replace = |ratio: f64, i: usize, margin: &mut f64| {
        let mut weights = residual(ratio, i);
        if weights.iter().sum::<f64>() < 1e-6 {
            *margin = 0.0;
            weights = p[i].clone();
        }
        match flaw {
            Flaw::NoResidual => sample(&p[i], uniforms(i).residual, margin),
            _ => token(&weights, uniforms(i).residual, margin),
        }
    };
    if rule != Rule::Block {
        for i in 0..k {
            let draw = uniforms(i);
            if p[i].iter().all(|&p| p == 0.0) {
                return (i, None);
            }
            let Some(d) = drafts[i] else { return (i, token(&p[i], draw.sample, margin)) };
            if rule != Rule::Reject || is_peak(&p[i]) {
                // Of a peak that truncation has left, a bad draft is refused, and the peak emitted in its place.
                if rule == Rule::Reject && q[i].is_none() {
                    *margin = 0.0;
                }
                let drawn = token(&p[i], draw.sample, margin);
                if drawn != Some(d) {
                    return (i, drawn);
                }
                continue;
            }
            let Some(of_q) = &q[i] else { return (i, token(&p[i], draw.sample, margin)) };
            let (above, below) = match flaw {
                Flaw::TakesDraftsForDeterministic => (p[i][d], 1.0),
                Flaw::Inverted => (of_q[d], p[i][d]),
                _ => (p[i][d], of_q[d]),
            };
            let tested = f64::from(draw.accept) * below;
            *margin = margin.min(if above == 0.0 { 1.0 } else { (tested / above - 1.0).abs() });
            let accepted = if flaw == Flaw::NotStrict { tested <= above } else { tested < above };
            if !accepted {
                return (i, replace(1.0, i, margin));
            }
        }
        return (k, token(&p[k], uniforms(k).sample, margin));
    }
    // Where the chain of useful rows ends.
    let end = (0..k).find(|&i| drafts[i].is_none() || q[i].is_none() || p[i].iter().all(|&p| p == 0.0)).unwrap_or(k);
    let (mut ratio, mut tau, mut tau_ratio) = (1.0f64, 0, 1.0);
    for i in 1..=end {
        let (d, of_q) = (drafts[i - 1].unwrap(), q[i - 1].as_ref().unwrap());
        ratio = match of_q[d] {
            0.0 => f64::from(u8::from(ratio * p[i - 1][d] > 0.0)),
            below => (ratio * p[i - 1][d] / below).min(1.0),
        };
        let passing = if i == end {
            ratio
        } else {
            let mass: f64 = residual(ratio, i).iter().sum();
            if mass + 1.0 - ratio > 1e-9 { mass / (mass + 1.0 - ratio) } else { 1.0 }
        };
        let u = f64::from(uniforms(i - 1).accept);
        *margin = margin.min((u - passing).abs());
        if u < passing {
            (tau, tau_ratio) = (i, ratio);
        } else if flaw == Flaw::BreaksAtFirstFailure {
            break;
        }
    }
    if p[tau].iter().all(|&p| p == 0.0) {
        return (tau, None);
    }
    if tau == end {
        return (tau, token(&p[tau], uniforms(tau).sample, margin));
    }
    (tau, replace(if flaw == Flaw::PlainResidual { 1.0 } else { tau_ratio }, tau, margin))
}

/// What is drawn for one row.
#[derive(Debug, Clone, Copy)]
pub struct Draws {
    pub accept: f32,
    pub sample: [f32; 3],
    pub residual: [f32; 3],
}

/// The draws of row `i` as the documentation says.
pub fn draws(seed: u64, position: u64, i: usize) -> Draws {
    let block = |domain: u32, row: usize| {
        philox::block(seed, position + i as u64, domain | (row as u32) << 8, 0).map(philox::uniform)
    };
    let three = |[a, b, c, _]: [f32; 4]| [a, b, c];
    Draws { accept: block(1, i)[0], sample: three(block(3, 0)), residual: three(block(2, i)) }
}

/// The draws of a drafter.
pub fn draft_draws(seed: u64, position: u64, i: usize) -> [f32; 3] {
    sibling_draws(seed, position + i as u64, i as u32, 0)
}

/// The draws of a drafter for draft `j` of a row.
pub fn sibling_draws(seed: u64, position: u64, row: u32, j: u32) -> [f32; 3] {
    let [a, b, c, _] = philox::block(seed, position, row << 8, j).map(philox::uniform);
    [a, b, c]
}

/// A step, as plain data.
#[derive(Debug, Clone)]
pub struct Step<P, Q> {
    pub vocab: usize,
    pub max_drafts: usize,
    pub target: Vec<P>,
    pub target_stride: usize,
    pub cu_rows: Vec<i32>,
    pub drafts: Vec<i32>,
    pub kind: Drafts,
    pub rule: Rule,
    pub trials: Option<u32>,
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
    /// Bits; empty if not asked for.
    pub log_probs: Vec<f32>,
}

impl Outcome {
    /// All that is the same on every device.
    #[allow(clippy::type_complexity)] // only ever compared
    pub fn exact(&self) -> (&[i32], &[Emitted], &[Accepted], &[i32], &[u32]) {
        (&self.tokens, &self.emitted, &self.accepted, &self.last_row, &self.status)
    }
}

impl<P: Float, Q: Float> Step<P, Q> {
    /// Contiguous rows, all requests with the same number of drafts, nothing optional.
    pub fn new(vocab: usize, batch: usize, drafts: usize) -> Self {
        let rows = batch * (drafts + 1);
        Step {
            vocab,
            max_drafts: drafts,
            target: vec![P::from_f32(0.0); rows * vocab],
            target_stride: vocab,
            cu_rows: (0..=batch).map(|b| (b * (drafts + 1)) as i32).collect(),
            drafts: vec![-1; rows],
            kind: Drafts::Deterministic,
            rule: Rule::Reject,
            trials: None,
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
            log_probs: false,
            shift: [0; 2],
        }
    }

    pub fn batch(&self) -> usize {
        self.cu_rows.len() - 1
    }

    pub fn rows_of(&self, b: usize) -> usize {
        ((self.cu_rows[b + 1] - self.cu_rows[b]).max(0) as usize).min(self.max_drafts + 1)
    }

    pub fn builder(&self) -> VerifierBuilder<P, Q> {
        let rows = |len: usize, columns: usize, stride: usize| match len {
            0 => 0,
            _ => (len - columns) / stride.max(1) + 1,
        };
        let mut builder = Verifier::builder(self.batch(), self.max_drafts, self.vocab)
            .target_rows(rows(self.target.len(), self.vocab, self.target_stride))
            .target_row_stride(self.target_stride as i64)
            .draft_vocab(self.draft_vocab)
            .draft_rows(rows(self.draft.len(), self.draft_vocab, self.draft_stride))
            .draft_row_stride(self.draft_stride as i64)
            .drafts(self.kind)
            .rule(self.rule)
            .fallback_token(-7);
        if self.rules.is_some() {
            builder = builder.rules_per_request();
        }
        if let Some(trials) = self.trials {
            builder = builder.trials(trials);
        }
        builder
    }

    pub fn plan(&self, device: &DeviceInfo) -> Verifier<P, Q> {
        self.builder().build(device).unwrap()
    }

    pub fn run(&self, device: &TestDevice) -> Outcome {
        self.run_for(device, &DeviceInfo::H200)
    }

    /// With a plan made for `info`, which decides how the work is cut; by both kernels, which have to agree.
    pub fn run_for(&self, device: &TestDevice, info: &DeviceInfo) -> Outcome {
        if matches!(device, TestDevice::Host) || self.rule == Rule::Block || self.rules.is_some() {
            return self.run_as(device, &self.plan(info));
        }
        let [by_request, by_row] =
            [true, false].map(|forced| self.run_as(device, &self.builder().by_request(forced).build(info).unwrap()));
        let bits = |outcome: &Outcome| outcome.log_probs.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        assert_eq!(bits(&by_request), bits(&by_row));
        let but_for = |outcome: &Outcome| Outcome { log_probs: Vec::new(), ..outcome.clone() };
        assert_eq!(but_for(&by_request), but_for(&by_row));
        by_row
    }

    fn run_as(&self, device: &TestDevice, plan: &Verifier<P, Q>) -> Outcome {
        let (batch, rows) = (self.batch(), self.batch() * (self.max_drafts + 1));
        let target = Buffer::of(device, &self.target, self.shift[0]);
        let draft = Buffer::of(device, &self.draft, self.shift[1]);
        let cu_rows = Buffer::of(device, &self.cu_rows, 0);
        let drafts = Buffer::of(device, &self.drafts, 0);
        fn buffer<T: nextscale::dtype::Element>(device: &TestDevice, of: &Option<Vec<T>>) -> Option<Buffer<T>> {
            of.as_ref().map(|elements| Buffer::of(device, elements, 1))
        }
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
        let mut tokens = Buffer::<i32>::poisoned(device, rows, 1);
        let mut emitted = Buffer::<Emitted>::poisoned(device, batch, 1);
        let mut accepted = Buffer::<Accepted>::poisoned(device, batch, 1);
        let mut status = Buffer::<u32>::poisoned(device, batch, 1);
        let mut last_row = Buffer::<i32>::poisoned(device, batch, 1);
        let mut log_probs = Buffer::<f32>::poisoned(device, rows, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(device, &vec![0u32; plan.counter_words()], 1);
        plan.run(
            &device.stream(),
            VerifierArgs {
                target: target.input(),
                cu_rows: cu_rows.input(),
                drafts: drafts.input(),
                options: VerifierOptions {
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
                },
                out: VerifierOut {
                    tokens: tokens.output(),
                    emitted: emitted.output(),
                    accepted: accepted.output(),
                    status: status.output(),
                    last_row: Some(last_row.output()),
                    log_probs: self.log_probs.then(|| log_probs.output()),
                },
                workspace: workspace.output(),
                counters: counters.output(),
            },
        )
        .unwrap();
        workspace.read();
        assert!(counters.read().iter().all(|&count| count == 0), "counters are left as they were found");
        Outcome {
            tokens: tokens.read(),
            emitted: emitted.read(),
            accepted: accepted.read(),
            last_row: last_row.read(),
            status: status.read(),
            log_probs: if self.log_probs { log_probs.read() } else { Vec::new() },
        }
    }

    /// The logits of row `i` of request `b`, -inf where it is not allowed.
    pub fn target_logits(&self, b: usize, i: usize) -> Option<Vec<f64>> {
        let logical = self.cu_rows[b] as usize + i;
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
        self.rules.as_ref().and_then(|rules| Rule::from_code(rules[b])).unwrap_or(self.rule)
    }

    pub fn sampling(&self, b: usize) -> Sampling {
        Sampling {
            temperature: self.temperature.as_ref().map_or(1.0, |of| of[b]),
            top_k: self.top_k.as_ref().map_or(0, |of| of[b]),
            top_p: self.top_p.as_ref().map_or(1.0, |of| of[b]),
            min_p: self.min_p.as_ref().map_or(0.0, |of| of[b]),
        }
    }

    /// The oracle's decision for request `b`: accepted, the token after them, how close any choice was.
    pub fn oracle(&self, b: usize) -> (usize, Option<usize>, f64) {
        self.oracle_with(b, Flaw::None)
    }

    pub fn oracle_with(&self, b: usize, flaw: Flaw) -> (usize, Option<usize>, f64) {
        let mut margin = 1.0;
        let rule = self.rule_of(b);
        let sampling = self.sampling(b);
        let rows = self.rows_of(b);
        let p: Vec<Vec<f64>> = (0..rows)
            .map(|i| match self.target_logits(b, i) {
                Some(logits) => sampling.probabilities(&logits, rule == Rule::Greedy, &mut margin),
                None => vec![0.0; self.vocab],
            })
            .collect();
        let first = self.cu_rows[b] as usize;
        let drafts: Vec<Option<usize>> =
            (0..rows - 1).map(|i| usize::try_from(self.drafts[first + i]).ok().filter(|&d| d < self.vocab)).collect();
        let q: Vec<Option<Vec<f64>>> = (0..rows - 1)
            .map(|i| {
                let d = drafts[i]?;
                let mut one_hot = vec![0.0; self.vocab];
                one_hot[d] = 1.0;
                if self.kind == Drafts::Deterministic {
                    return Some(one_hot);
                }
                let row = self.draft_row.as_ref().map_or((b * self.max_drafts + i) as i32, |rows| rows[first + i]);
                if row < 0 || row as usize * self.draft_stride + self.draft_vocab > self.draft.len() {
                    return None;
                }
                let logits: Vec<f64> = (0..self.draft_vocab)
                    .map(|column| f64::from(self.draft[row as usize * self.draft_stride + column].to_f32()))
                    .collect();
                if logits.iter().any(|logit| logit.is_nan()) || logits.iter().all(|&l| l == f64::NEG_INFINITY) {
                    return None;
                }
                let temperature = match &self.draft_temperature {
                    Some(of) => of[b],
                    None => sampling.temperature,
                };
                if temperature < 1e-5 {
                    return Some(one_hot);
                }
                let of_draft = Sampling::at(temperature).probabilities(&logits, false, &mut margin);
                Some(
                    (0..self.vocab)
                        .map(|token| match &self.target_to_draft {
                            Some(map) if map[token] < 0 => 0.0,
                            Some(map) => of_draft[map[token] as usize],
                            None => of_draft.get(token).copied().unwrap_or(0.0),
                        })
                        .collect(),
                )
            })
            .collect();
        let rows_of_all = self.max_drafts + 1;
        let given = |i: usize| match &self.uniforms {
            Some(all) => {
                let of = &all[(b * rows_of_all + i) * 4..][..4];
                let three = [of[1], of[2], of[3]];
                Draws { accept: of[0], sample: three, residual: three }
            }
            None => {
                let word = |of: &Option<Vec<i64>>| of.as_ref().map_or(0, |of| of[b] as u64);
                draws(word(&self.seeds), word(&self.positions), i)
            }
        };
        let (accepted, token) = decide(rule, &p, &q, &drafts, &given, flaw, &mut margin);
        (accepted, token, margin)
    }
}

/// A small model and its drafter: logits of the next token by the last one.
#[derive(Debug, Clone)]
pub struct Chain {
    pub vocab: usize,
    pub target: Vec<f32>,
    pub draft: Vec<f32>,
}

/// How the tokens of a chain are made.
#[derive(Debug, Clone, Copy)]
pub struct How {
    pub rule: Rule,
    pub kind: Drafts,
    pub drafts: usize,
    pub trials: Option<u32>,
    pub temperature: f32,
    /// Decisions by the oracle with this flaw, instead of the op.
    pub flaw: Option<Flaw>,
    /// In place of what is drawn for a row: what a wrong engine would use, from (seed, position of the row, its number).
    pub instead: Option<fn(u64, u64, usize) -> Draws>,
}

impl How {
    pub fn plain(rule: Rule, kind: Drafts) -> Self {
        How { rule, kind, drafts: 3, trials: None, temperature: 1.0, flaw: None, instead: None }
    }
}

impl Chain {
    /// `first` tokens of each of `requests` independent requests that start after token 0, as counts by the number of
    /// which they are the digits; and how many drafts were accepted a step.
    pub fn run(&self, device: &TestDevice, how: How, requests: usize, first: u32) -> (Vec<u64>, f64) {
        let v = self.vocab;
        let mut written: Vec<Vec<i32>> = vec![Vec::new(); requests];
        let (mut steps, mut accepted) = (0u64, 0u64);
        let logits = |table: &[f32], last: i32| table[last as usize * v..][..v].to_vec();
        while written.iter().any(|tokens| tokens.len() < first as usize) {
            let seeds: Vec<i64> =
                (0..requests as i64).map(|b| b.wrapping_mul(0x9E37_79B9_7F4A_7C15u64 as i64)).collect();
            let positions: Vec<i64> = written.iter().map(|tokens| 1 + tokens.len() as i64).collect();
            let mut context: Vec<i32> = written.iter().map(|tokens| tokens.last().copied().unwrap_or(0)).collect();
            let mut step = Step::<f32, f32>::new(v, requests, how.drafts);
            (step.rule, step.kind, step.trials) = (how.rule, how.kind, how.trials);
            step.temperature = Some(vec![how.temperature; requests]);
            step.draft = vec![0.0; requests * how.drafts * v];
            let mut stats = vec![0f32; requests * how.drafts * 4];
            for i in 0..=how.drafts {
                for (b, &last) in context.iter().enumerate() {
                    let row = &mut step.target[(b * (how.drafts + 1) + i) * v..][..v];
                    row.copy_from_slice(&logits(&self.target, last));
                }
                if i == how.drafts {
                    break;
                }
                let drafting: Vec<f32> = context.iter().flat_map(|&last| logits(&self.draft, last)).collect();
                let drawn = draft(device, &drafting, v, i, how.temperature, &seeds, &positions);
                for (b, last) in context.iter_mut().enumerate() {
                    *last = match how.kind {
                        // The most probable one.
                        Drafts::Deterministic => {
                            let of = &drafting[b * v..][..v];
                            (0..v).max_by(|&x, &y| of[x].total_cmp(&of[y])).unwrap() as i32
                        }
                        _ => drawn.0[b],
                    };
                    step.drafts[b * (how.drafts + 1) + i] = *last;
                    let row = b * how.drafts + i;
                    step.draft[row * v..][..v].copy_from_slice(&drafting[b * v..][..v]);
                    stats[row * 4..][..4].copy_from_slice(&drawn.1[b * 4..][..4]);
                }
            }
            if how.kind == Drafts::LogitsAndStats {
                step.draft_stats = Some(stats);
            }
            (step.seeds, step.positions) = (Some(seeds.clone()), Some(positions.clone()));
            if let Some(instead) = how.instead {
                let all = (0..requests).flat_map(|b| {
                    let (seed, position) = (seeds[b] as u64, positions[b] as u64);
                    (0..=how.drafts).flat_map(move |i| {
                        let Draws { accept, residual: [x, y, z], .. } = instead(seed, position + i as u64, i);
                        [accept, x, y, z]
                    })
                });
                step.uniforms = Some(all.collect());
            }
            match how.flaw {
                Some(flaw) => {
                    for (b, tokens) in written.iter_mut().enumerate() {
                        let (n, token, _) = step.oracle_with(b, flaw);
                        tokens.extend(&step.drafts[b * (how.drafts + 1)..][..n]);
                        tokens.push(token.expect("a token") as i32);
                        accepted += n as u64;
                    }
                }
                None => {
                    let outcome = step.run(device);
                    assert!(outcome.status.iter().all(|&said| said == 0));
                    for (b, tokens) in written.iter_mut().enumerate() {
                        tokens.extend(&outcome.tokens[b * (how.drafts + 1)..][..outcome.emitted[b].0 as usize]);
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

    /// Chi-square of counts against the target's own law, and its degrees of freedom; sequences expected less than five
    /// times count as one.
    pub fn chi_square(&self, counts: &[u64], first: u32, temperature: f32) -> (f64, f64) {
        let v = self.vocab;
        let all: u64 = counts.iter().sum();
        let rows: Vec<Vec<f64>> = (0..v)
            .map(|last| {
                let logits: Vec<f64> = self.target[last * v..][..v].iter().map(|&x| x.into()).collect();
                Sampling::at(temperature).probabilities(&logits, false, &mut 1.0)
            })
            .collect();
        let (mut chi, mut cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
        for (number, &count) in counts.iter().enumerate() {
            let (mut last, mut p) = (0, 1.0);
            for digit in (0..first).rev() {
                let token = number / v.pow(digit) % v;
                p *= rows[last][token];
                last = token;
            }
            let expected = p * all as f64;
            if expected < 5.0 {
                rest = (rest.0 + expected, rest.1 + count as f64);
            } else {
                chi += (count as f64 - expected).powi(2) / expected;
                cells += 1.0;
            }
        }
        if rest.0 > 0.5 {
            chi += (rest.1 - rest.0).powi(2) / rest.0;
            cells += 1.0;
        }
        assert!(rest.0 > 0.5 || rest.1 < 10.0, "what is nearly impossible came often");
        (chi, cells - 1.0)
    }
}

/// One draft for each row: the tokens and stats of the op.
pub fn draft(
    device: &TestDevice,
    logits: &[f32],
    vocab: usize,
    row_in_step: usize,
    temperature: f32,
    seeds: &[i64],
    positions: &[i64],
) -> (Vec<i32>, Vec<f32>) {
    let rows = seeds.len();
    let plan =
        DraftSample::<f32>::builder(rows, vocab).row_in_step(row_in_step as u32).build(&DeviceInfo::H200).unwrap();
    let logits = Buffer::of(device, logits, 0);
    let temperature = Buffer::of(device, &vec![temperature; rows], 0);
    let (seeds, positions) = (Buffer::of(device, seeds, 0), Buffer::of(device, positions, 0));
    let mut tokens = Buffer::<i32>::poisoned(device, rows, 0);
    let mut stats = Buffer::<f32>::poisoned(device, rows * 4, 0);
    let mut status = Buffer::<u32>::poisoned(device, rows, 0);
    let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
    let mut counters = Buffer::of(device, &vec![0u32; plan.counter_words()], 0);
    plan.run(
        &device.stream(),
        DraftSampleArgs {
            logits: logits.input(),
            temperature: Some(temperature.input()),
            top_k: None,
            top_p: None,
            min_p: None,
            draft_to_target: None,
            seeds: Some(seeds.input()),
            positions: Some(positions.input()),
            rows_in_step: None,
            uniforms: None,
            tokens: tokens.output(),
            stats: Some(stats.output()),
            log_probs: None,
            status: status.output(),
            workspace: workspace.output(),
            counters: counters.output(),
        },
    )
    .unwrap();
    assert!(counters.read().iter().all(|&count| count == 0));
    assert!(!tokens.read().contains(&poison()));
    (tokens.read(), stats.read())
}
