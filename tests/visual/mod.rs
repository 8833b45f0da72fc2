//! Steps of `VisualVerifier` as plain data, and an oracle in f64.

use nextscale::dtype::{Element, Float};
use nextscale::verification::{
    Accepted, Drafts, Embeddings, Emitted, Grouped, Lantern, Neighbours, Redraft, VisualOptions, VisualOut, VisualRule,
    VisualVerifier, VisualVerifierArgs, VisualVerifierBuilder,
};
use nextscale::{DType, DeviceInfo, bf16, f16, philox};

use crate::support::{Buffer, TestDevice};
use crate::verification::{Draws, Sampling, draft_draws, draws, sample};

/// A step, as plain data.
#[derive(Debug, Clone)]
pub struct Step<T> {
    pub vocab: usize,
    pub max_drafts: usize,
    pub rule: VisualRule,
    pub redraft: Redraft,
    pub kind: Drafts,
    pub codes: (usize, usize),
    pub target: Vec<T>,
    pub target_free: Option<Vec<T>>,
    pub target_stride: usize,
    pub draft: Vec<T>,
    pub draft_free: Option<Vec<T>>,
    pub draft_stride: usize,
    pub cu_rows: Vec<i32>,
    pub drafts: Vec<i32>,
    pub row_index: Option<Vec<i32>>,
    pub draft_row: Option<Vec<i32>>,
    pub draft_stats: Option<Vec<f32>>,
    pub allow: Option<Vec<u32>>,
    pub syntax: Option<Vec<u32>>,
    /// `[codes, width]`.
    pub neighbours: Vec<i32>,
    pub small_ids: bool,
    pub embeddings: Vec<f32>,
    pub embeddings_dtype: DType,
    pub temperature: Option<Vec<f32>>,
    pub draft_temperature: Option<Vec<f32>>,
    pub guidance: Option<Vec<f32>>,
    pub top_k: Option<Vec<i32>>,
    pub top_p: Option<Vec<f32>>,
    pub min_p: Option<Vec<f32>>,
    pub seeds: Option<Vec<i64>>,
    pub positions: Option<Vec<i64>>,
    pub uniforms: Option<Vec<f32>>,
    /// Elements by which rows start off their alignment.
    pub shift: usize,
}

/// What a step gives; floats by their bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    pub tokens: Vec<i32>,
    pub emitted: Vec<Emitted>,
    pub accepted: Vec<Accepted>,
    pub last_row: Vec<i32>,
    pub status: Vec<u32>,
    pub redrafts: Vec<i32>,
    pub redraft_stats: Vec<u32>,
}

impl Outcome {
    pub fn stats(&self) -> Vec<f32> {
        self.redraft_stats.iter().map(|&bits| f32::from_bits(bits)).collect()
    }
}

/// What a wrong implementation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    None,
    /// LANTERN: a rejection zeroes only the neighbours that were added.
    ZeroesThoseAdded,
    /// LANTERN: zeroes none.
    ZeroesNone,
    /// LANTERN: one neighbour beyond the bound is added.
    OneTooMany,
    /// Grouped: 6 below and 7 above.
    OtherWay,
    /// Grouped: the group's p beside the draft's own q.
    OwnQ,
    /// Grouped: ties go to the highest index.
    HighestFirst,
    /// Grouped: a short list below is taken as it is.
    NoFallback,
    /// A token of p in place of a rejected draft.
    NoResidual,
    /// Guidance the other way round.
    Unguided,
}

fn buffer<T: Element>(device: &TestDevice, of: &Option<Vec<T>>, shift: usize) -> Option<Buffer<T>> {
    of.as_ref().map(|elements| Buffer::of(device, elements, shift))
}

fn bit(mask: &[u32], at: usize) -> bool {
    mask[at / 32] >> (at % 32) & 1 == 1
}

/// -log2 of the uniform of a word.
fn exponential(word: u32) -> f64 {
    -((f64::from(word) + 0.5) / 4_294_967_296.0).log2()
}

impl<T: Float> Step<T> {
    /// Contiguous rows, all requests with the same number of drafts, nothing optional.
    pub fn new(vocab: usize, batch: usize, drafts: usize, rule: VisualRule) -> Self {
        let rows = batch * (drafts + 1);
        Step {
            vocab,
            max_drafts: drafts,
            rule,
            redraft: Redraft::None,
            kind: Drafts::Deterministic,
            codes: (0, vocab),
            target: vec![T::from_f32(0.0); rows * vocab],
            target_free: None,
            target_stride: vocab,
            draft: Vec::new(),
            draft_free: None,
            draft_stride: vocab,
            cu_rows: (0..=batch).map(|b| (b * (drafts + 1)) as i32).collect(),
            drafts: vec![-1; rows],
            row_index: None,
            draft_row: None,
            draft_stats: None,
            allow: None,
            syntax: None,
            neighbours: Vec::new(),
            small_ids: true,
            embeddings: Vec::new(),
            embeddings_dtype: DType::F32,
            temperature: None,
            draft_temperature: None,
            guidance: None,
            top_k: None,
            top_p: None,
            min_p: None,
            seeds: None,
            positions: None,
            uniforms: None,
            shift: 0,
        }
    }

    pub fn batch(&self) -> usize {
        self.cu_rows.len() - 1
    }

    pub fn rows_of(&self, b: usize) -> usize {
        ((self.cu_rows[b + 1] - self.cu_rows[b]).max(0) as usize).min(self.max_drafts + 1)
    }

    pub fn builder(&self) -> VisualVerifierBuilder<T> {
        let rows = |len: usize, stride: usize| match len {
            0 => 0,
            _ => (len - self.vocab) / stride.max(1) + 1,
        };
        let builder = VisualVerifier::builder(self.batch(), self.max_drafts, self.vocab, self.rule)
            .target_rows(rows(self.target.len(), self.target_stride))
            .target_row_stride(self.target_stride as i64)
            .draft_rows(rows(self.draft.len(), self.draft_stride))
            .draft_row_stride(self.draft_stride as i64)
            .drafts(self.kind)
            .codes(self.codes.0, self.codes.1)
            .redraft(self.redraft)
            .fallback_token(-7);
        if self.target_free.is_some() { builder.guided() } else { builder }
    }

    pub fn run(&self, device: &TestDevice) -> Outcome {
        self.run_for(device, &DeviceInfo::H200)
    }

    /// With a plan made for `info`, which decides how the work is cut.
    pub fn run_for(&self, device: &TestDevice, info: &DeviceInfo) -> Outcome {
        let plan = self.builder().build(info).unwrap();
        let (batch, rows) = (self.batch(), self.batch() * (self.max_drafts + 1));
        let target = Buffer::of(device, &self.target, self.shift);
        let target_free = buffer(device, &self.target_free, self.shift);
        let random = self.kind != Drafts::Deterministic;
        let draft = random.then(|| Buffer::of(device, &self.draft, self.shift));
        let draft_free = self.draft_free.as_ref().filter(|_| random).map(|of| Buffer::of(device, of, self.shift));
        let (cu_rows, drafts) = (Buffer::of(device, &self.cu_rows, 0), Buffer::of(device, &self.drafts, 0));
        let (row_index, draft_row) = (buffer(device, &self.row_index, 1), buffer(device, &self.draft_row, 1));
        let draft_stats = buffer(device, &self.draft_stats, 1);
        let (allow, syntax) = (buffer(device, &self.allow, 1), buffer(device, &self.syntax, 1));
        let ids: Vec<u16> = self.neighbours.iter().map(|&id| id as u16).collect();
        let (small, large) = (Buffer::of(device, &ids, 1), Buffer::of(device, &self.neighbours, 1));
        let f32s = Buffer::of(device, &self.embeddings, 1);
        let f16s: Vec<f16> = self.embeddings.iter().map(|&x| f16::from_f32(x)).collect();
        let bf16s: Vec<bf16> = self.embeddings.iter().map(|&x| bf16::from_f32(x)).collect();
        let (f16s, bf16s) = (Buffer::of(device, &f16s, 1), Buffer::of(device, &bf16s, 1));
        let (temperature, draft_temperature) =
            (buffer(device, &self.temperature, 1), buffer(device, &self.draft_temperature, 1));
        let guidance = buffer(device, &self.guidance, 1);
        let (top_k, top_p, min_p) =
            (buffer(device, &self.top_k, 1), buffer(device, &self.top_p, 1), buffer(device, &self.min_p, 1));
        let (seeds, positions) = (buffer(device, &self.seeds, 1), buffer(device, &self.positions, 1));
        let uniforms = buffer(device, &self.uniforms, 1);
        let mut tokens = Buffer::<i32>::poisoned(device, rows, 1);
        let mut emitted = Buffer::<Emitted>::poisoned(device, batch, 1);
        let mut accepted = Buffer::<Accepted>::poisoned(device, batch, 1);
        let mut status = Buffer::<u32>::poisoned(device, batch, 1);
        let mut last_row = Buffer::<i32>::poisoned(device, batch, 1);
        let redrafting = self.redraft != Redraft::None;
        let mut redrafts = Buffer::<i32>::poisoned(device, rows, 1);
        let mut redraft_stats = Buffer::<f32>::poisoned(device, rows * 4, 1);
        let mut workspace = Buffer::<u8>::poisoned(device, plan.workspace_bytes() as usize, 0);
        let mut counters = Buffer::of(device, &vec![0u32; plan.counter_words()], 1);
        plan.run(
            &device.stream(),
            VisualVerifierArgs {
                target: target.input(),
                cu_rows: cu_rows.input(),
                drafts: drafts.input(),
                options: VisualOptions {
                    target_free: target_free.as_ref().map(Buffer::input),
                    row_index: row_index.as_ref().map(Buffer::input),
                    draft: draft.as_ref().map(Buffer::input),
                    draft_free: draft_free.as_ref().map(Buffer::input),
                    draft_row: draft_row.as_ref().map(Buffer::input),
                    draft_stats: draft_stats.as_ref().map(Buffer::input),
                    allow: allow.as_ref().map(Buffer::input),
                    syntax: syntax.as_ref().map(Buffer::input),
                    neighbours: matches!(self.rule, VisualRule::Lantern(_)).then(|| match self.small_ids {
                        true => Neighbours::U16(small.input()),
                        false => Neighbours::I32(large.input()),
                    }),
                    embeddings: matches!(self.rule, VisualRule::Grouped(Grouped { dim, .. }) if dim > 0).then(|| {
                        match self.embeddings_dtype {
                            DType::F16 => Embeddings::F16(f16s.input()),
                            DType::BF16 => Embeddings::BF16(bf16s.input()),
                            _ => Embeddings::F32(f32s.input()),
                        }
                    }),
                    temperature: temperature.as_ref().map(Buffer::input),
                    draft_temperature: draft_temperature.as_ref().map(Buffer::input),
                    guidance: guidance.as_ref().map(Buffer::input),
                    top_k: top_k.as_ref().map(Buffer::input),
                    top_p: top_p.as_ref().map(Buffer::input),
                    min_p: min_p.as_ref().map(Buffer::input),
                    seeds: seeds.as_ref().map(Buffer::input),
                    positions: positions.as_ref().map(Buffer::input),
                    uniforms: uniforms.as_ref().map(Buffer::input),
                },
                out: VisualOut {
                    tokens: tokens.output(),
                    emitted: emitted.output(),
                    accepted: accepted.output(),
                    status: status.output(),
                    last_row: Some(last_row.output()),
                    redrafts: redrafting.then(|| redrafts.output()),
                    redraft_stats: redrafting.then(|| redraft_stats.output()),
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
            redrafts: if redrafting { redrafts.read() } else { Vec::new() },
            redraft_stats: match redrafting {
                true => redraft_stats.read().iter().map(|x| x.to_bits()).collect(),
                false => Vec::new(),
            },
        }
    }

    fn mix(&self, b: usize, with: T, free: Option<T>, flaw: Flaw) -> f64 {
        let (with, nothing) = (with.to_f32(), f32::NEG_INFINITY);
        let Some(free) = free.map(T::to_f32) else { return with.into() };
        if flaw == Flaw::Unguided {
            return with.into();
        }
        if with == nothing || free == nothing {
            return nothing.into();
        }
        // In f32, as it is defined, for the order of logits depends on it.
        self.guidance.as_ref().map_or(1.0, |of| of[b]).mul_add(with - free, free).into()
    }

    /// The logits of row `i` of request `b`, -inf where it is not allowed.
    fn target_logits(&self, b: usize, i: usize, flaw: Flaw) -> Option<Vec<f64>> {
        let logical = self.cu_rows[b] as usize + i;
        let row = self.row_index.as_ref().map_or(logical as i32, |index| index[logical]);
        if row < 0 || row as usize * self.target_stride + self.vocab > self.target.len() {
            return None;
        }
        let words = self.vocab.div_ceil(32);
        let logits = (0..self.vocab).map(|column| match &self.allow {
            Some(allow) if !bit(&allow[logical * words..], column) => f64::NEG_INFINITY,
            _ => {
                let at = row as usize * self.target_stride + column;
                self.mix(b, self.target[at], self.target_free.as_ref().map(|free| free[at]), flaw)
            }
        });
        Some(logits.collect())
    }

    pub fn sampling(&self, b: usize) -> Sampling {
        Sampling {
            temperature: self.temperature.as_ref().map_or(1.0, |of| of[b]),
            top_k: self.top_k.as_ref().map_or(0, |of| of[b]),
            top_p: self.top_p.as_ref().map_or(1.0, |of| of[b]),
            min_p: self.min_p.as_ref().map_or(0.0, |of| of[b]),
        }
    }

    fn draws(&self, b: usize, i: usize) -> (Draws, [f32; 3]) {
        if let Some(all) = &self.uniforms {
            let [accept, a, b, c] = all[(b * (self.max_drafts + 1) + i) * 4..][..4].try_into().unwrap();
            return (Draws { accept, sample: [a, b, c], residual: [a, b, c] }, [a, b, c]);
        }
        let word = |of: &Option<Vec<i64>>| of.as_ref().map_or(0, |of| of[b] as u64);
        let (seed, position) = (word(&self.seeds), word(&self.positions));
        (draws(seed, position, i), draft_draws(seed, position, i))
    }

    fn neighbour(&self, code: usize, n: usize) -> Option<usize> {
        let VisualRule::Lantern(Lantern { accumulated, zeroed, .. }) = self.rule else { unreachable!() };
        let id = self.neighbours[code * accumulated.max(zeroed) + n];
        let id = if self.small_ids { i32::from(id as u16) } else { id };
        (id >= 0 && (id as usize) < self.codes.1).then(|| self.codes.0 + id as usize)
    }

    /// The tokens of a draft's group.
    fn group(&self, logits: &[f64], p: &[f64], d: usize, flaw: Flaw, margin: &mut f64) -> Vec<usize> {
        let VisualRule::Grouped(rule) = self.rule else { unreachable!() };
        let (mut below, mut above) = (rule.below, rule.above);
        if flaw == Flaw::OtherWay {
            (below, above) = (above, below);
        }
        let code = |token: usize| token.checked_sub(self.codes.0).filter(|&code| code < self.codes.1);
        if rule.dim > 0 && code(d).is_none() {
            return vec![d];
        }
        let mut order: Vec<usize> = (0..self.vocab).collect();
        let value = |token: usize| if logits[token].is_nan() { f64::NEG_INFINITY } else { logits[token] + 0.0 };
        let tie = |a: usize, b: usize| if flaw == Flaw::HighestFirst { b.cmp(&a) } else { a.cmp(&b) };
        order.sort_by(|&a, &b| value(a).partial_cmp(&value(b)).unwrap().then(tie(a, b)));
        let rank = order.iter().position(|&token| token == d).unwrap();
        if rank < below && flaw != Flaw::NoFallback {
            return vec![d];
        }
        let window = &order[rank.saturating_sub(below)..(rank + above + 1).min(self.vocab)];
        let rounded = |at: usize| match self.embeddings_dtype {
            DType::F16 => f64::from(f16::from_f32(self.embeddings[at]).to_f32()),
            DType::BF16 => f64::from(bf16::from_f32(self.embeddings[at]).to_f32()),
            _ => f64::from(self.embeddings[at]),
        };
        let near = window.iter().copied().filter(|&token| {
            if token == d {
                return true;
            }
            let gap = (p[token] - p[d]).abs();
            *margin = margin.min((gap - f64::from(rule.probability_gap)).abs());
            if gap >= f64::from(rule.probability_gap) {
                return false;
            }
            if rule.dim == 0 {
                return true;
            }
            let Some(other) = code(token) else { return false };
            let mine = code(d).unwrap();
            let distance: f64 =
                (0..rule.dim).map(|k| (rounded(mine * rule.dim + k) - rounded(other * rule.dim + k)).powi(2)).sum();
            *margin = margin.min((distance - f64::from(rule.distance)).abs());
            distance < f64::from(rule.distance)
        });
        near.collect()
    }

    /// The oracle's decision for request `b`: accepted, the token after them, the re-drafts, how close any choice was.
    pub fn oracle(&self, b: usize, flaw: Flaw) -> (usize, Option<usize>, Vec<Option<usize>>, f64) {
        let mut margin = 1.0;
        let rows = self.rows_of(b);
        let (mut end, mut redrafts) = (None, Vec::new());
        for i in 0..rows {
            let (stays, token, redraft) = self.decide(b, i, flaw, &mut margin);
            if end.is_some() {
                redrafts.push(redraft);
            } else if !stays {
                end = Some((i, token));
                if self.redraft == Redraft::None {
                    break;
                }
            }
        }
        let (accepted, token) = end.expect("the last row ends the step");
        (accepted, token, redrafts, margin)
    }

    #[allow(clippy::type_complexity)] // taken apart at once
    fn decide(&self, b: usize, i: usize, flaw: Flaw, margin: &mut f64) -> (bool, Option<usize>, Option<usize>) {
        let logits = self.target_logits(b, i, flaw);
        let p = match &logits {
            Some(logits) => self.sampling(b).probabilities(logits, false, margin),
            None => vec![0.0; self.vocab],
        };
        let (draws, for_draft) = self.draws(b, i);
        // All weight on one token not by chance, but by temperature or an infinite logit.
        let top = logits.iter().flatten().copied().fold(f64::NEG_INFINITY, f64::max);
        let is_peak = self.sampling(b).temperature < 1e-5 || top == f64::INFINITY;
        let of_p = |three: [f32; 3], margin: &mut f64| match is_peak {
            true => p.iter().position(|&p| p > 0.0),
            false => sample(&p, three, margin),
        };
        let d = (i + 1 < self.rows_of(b)).then(|| self.drafts[self.cu_rows[b] as usize + i]);
        let d = d.and_then(|d| usize::try_from(d).ok()).filter(|&d| d < self.vocab);
        let (stays, token) = self.test(b, i, d, logits.as_deref().unwrap_or(&[]), &p, is_peak, &draws, flaw, margin);
        let redraft = match self.redraft {
            Redraft::None => None,
            Redraft::Maximal => {
                if stays {
                    d
                } else {
                    token
                }
            }
            Redraft::Gumbel if !is_peak => {
                let word = |of: &Option<Vec<i64>>| of.as_ref().map_or(0, |of| of[b] as u64);
                let scores: Vec<f64> = (0..self.vocab)
                    .map(|v| {
                        let block = philox::block(word(&self.seeds), word(&self.positions) + i as u64, 8, v as u32 / 4);
                        p[v] / exponential(block[v % 4])
                    })
                    .collect();
                let best = (0..self.vocab).max_by(|&x, &y| scores[x].total_cmp(&scores[y])).unwrap();
                for (v, score) in scores.iter().enumerate() {
                    if v != best && scores[best] > 0.0 {
                        *margin = margin.min(1.0 - score / scores[best]);
                    }
                }
                (scores[best] > 0.0).then_some(best)
            }
            _ => of_p(for_draft, margin),
        };
        (stays, token, redraft)
    }

    #[allow(clippy::too_many_arguments)] // of one caller
    fn test(
        &self,
        b: usize,
        i: usize,
        d: Option<usize>,
        logits: &[f64],
        p: &[f64],
        is_peak: bool,
        draws: &Draws,
        flaw: Flaw,
        margin: &mut f64,
    ) -> (bool, Option<usize>) {
        if p.iter().all(|&p| p == 0.0) {
            return (false, None);
        }
        let of_p = |three: [f32; 3], margin: &mut f64| match is_peak {
            true => p.iter().position(|&p| p > 0.0),
            false => sample(p, three, margin),
        };
        let Some(d) = d else { return (false, of_p(draws.sample, margin)) };
        if self.syntax.as_ref().is_some_and(|syntax| bit(syntax, d)) {
            return (true, None);
        }
        if is_peak {
            let peak = p.iter().position(|&p| p > 0.0);
            return (peak == Some(d), peak);
        }
        let mut q = vec![0.0; self.vocab];
        q[d] = 1.0;
        if self.kind != Drafts::Deterministic {
            let logical = self.cu_rows[b] as usize + i;
            let row = self.draft_row.as_ref().map_or((b * self.max_drafts + i) as i32, |rows| rows[logical]);
            let there = row >= 0 && row as usize * self.draft_stride + self.vocab <= self.draft.len();
            let of_draft: Vec<f64> = match there {
                true => (0..self.vocab)
                    .map(|column| {
                        let at = row as usize * self.draft_stride + column;
                        self.mix(b, self.draft[at], self.draft_free.as_ref().map(|free| free[at]), Flaw::None)
                    })
                    .collect(),
                false => Vec::new(),
            };
            if of_draft.iter().any(|x| x.is_nan()) || of_draft.iter().all(|&x| x == f64::NEG_INFINITY) {
                return (false, of_p(draws.sample, margin));
            }
            let temperature = self.draft_temperature.as_ref().or(self.temperature.as_ref()).map_or(1.0, |of| of[b]);
            if temperature >= 1e-5 {
                q = Sampling::at(temperature).probabilities(&of_draft, false, margin);
            }
        }
        let (mut above, mut below, mut zeroed) = (p[d], q[d], Vec::new());
        match self.rule {
            VisualRule::Grouped(_) => {
                let group = self.group(logits, p, d, flaw, margin);
                above = group.iter().map(|&token| p[token]).sum();
                if flaw != Flaw::OwnQ {
                    below = group.iter().map(|&token| q[token]).sum();
                }
            }
            VisualRule::Lantern(rule) => match d.checked_sub(self.codes.0).filter(|&code| code < self.codes.1) {
                None => above = 0.0,
                Some(code) => {
                    let bound = f64::from(rule.bound);
                    let most = if bound <= 1.0 { bound } else { (bound - 1.0) * p[d] };
                    let mut sum = 0.0;
                    let mut within = Vec::new();
                    for n in 0..rule.accumulated {
                        sum += self.neighbour(code, n).map_or(0.0, |token| p[token]);
                        if sum > 0.0 && most > 0.0 {
                            *margin = margin.min((sum / most - 1.0).abs());
                        }
                        within.push(sum);
                    }
                    let mut last = within.iter().rposition(|&sum| sum <= most);
                    if flaw == Flaw::OneTooMany && !within.is_empty() {
                        last = Some(last.map_or(0, |last| (last + 1).min(within.len() - 1)));
                    }
                    if let Some(last) = last {
                        above += within[last];
                        let count = match flaw {
                            Flaw::ZeroesNone => 0,
                            Flaw::ZeroesThoseAdded => last + 1,
                            _ => rule.zeroed,
                        };
                        zeroed = (0..count).filter_map(|n| self.neighbour(code, n)).collect();
                    }
                }
            },
            _ => {}
        }
        let tested = f64::from(draws.accept) * below;
        *margin = margin.min(if above == 0.0 { 1.0 } else { (tested / above - 1.0).abs() });
        if tested < above {
            return (true, None);
        }
        if flaw == Flaw::NoResidual {
            return (false, of_p(draws.residual, margin));
        }
        let mut weights: Vec<f64> = p.iter().zip(&q).map(|(p, q)| (p - q).max(0.0)).collect();
        zeroed.into_iter().for_each(|token: usize| weights[token] = 0.0);
        let mass: f64 = weights.iter().sum();
        if mass < 1e-6 {
            // Where q is p, rounding leaves something.
            if mass > 0.0 || self.kind != Drafts::Deterministic {
                *margin = 0.0;
            }
            weights = match self.rule {
                VisualRule::Lantern(_) => (0..self.vocab)
                    .map(|v| {
                        let code = v >= self.codes.0 && v - self.codes.0 < self.codes.1;
                        f64::from(u8::from(code && logits[v] > f64::NEG_INFINITY))
                    })
                    .collect(),
                _ => p.to_vec(),
            };
        }
        (false, sample(&weights, draws.residual, margin))
    }
}
