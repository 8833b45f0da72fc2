//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::VisualVerifier;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::verification::rows::chunks;
use crate::verification::{Drafts, Traffic};

/// A block keeps a bit of each column in shared memory.
const MOST_VOCAB: u64 = 1 << 18;
const MOST_BATCH: u64 = 1 << 20;
const MOST_DRAFTS: u64 = 1023;
const MOST_NEIGHBOURS: u64 = 65535;
const MOST_BESIDE: u64 = 15;
const MOST_DIM: u64 = 65536;
/// What is kept of a row of the step.
const ROW_BYTES: u64 = 32;
/// Words of a chunk: two partials and a sum.
const CHUNK_WORDS: u64 = 5;
/// Blocks that share a multiprocessor.
const BLOCKS_A_MULTIPROCESSOR: u64 = 4;

/// When a draft of an image model is accepted. `p` is the target's probability, `q` the draft's, `d` the draft.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum VisualRule {
    /// **Lossy.** Codes that lie close to the draft's in latent space count as the draft.
    Lantern(Lantern),
    /// **Lossy.** Codes that are about as probable as the draft count as the draft.
    Grouped(Grouped),
    /// **Lossless.** `u q(d) < p(d)`, else a token of `max(p - q, 0)`: with q the model's own distribution of the step
    /// before it is speculative Jacobi decoding (arXiv 2410.01699). [`Redraft`] says what becomes of the tail.
    Jacobi,
}

/// LANTERN (arXiv 2410.03355) and LANTERN++ (arXiv 2502.06352).
///
/// With `s_n` the probability of the `n` codes nearest to the draft, and `n` the greatest one up to `accumulated`
/// whose `s_n` is within the bound (that of [`Lantern::bound`]), the draft is accepted if `u q(d) < p(d) + s_n`. If
/// it is not and `n > 0`, the `zeroed` nearest codes lose their probability; then a token is drawn from `max(p - q,
/// 0)`; if nothing is left, uniformly from the codes that the row allows. A token that is no code is rejected, and p
/// left as it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lantern {
    /// Neighbours whose probability may be added: k. 1000 as published.
    pub accumulated: usize,
    /// Neighbours that a rejection leaves without probability: k + 1 as published.
    pub zeroed: usize,
    /// Up to 1: the most probability that is added (delta; 0.1 as published). Above 1: 1 more than the most that is
    /// added for each unit of the draft's own probability (LANTERN++'s lambda).
    pub bound: f32,
}

impl Default for Lantern {
    fn default() -> Self {
        Lantern { accumulated: 1000, zeroed: 1001, bound: 0.1 }
    }
}

/// Grouped speculative decoding (arXiv 2508.07747).
///
/// In the order of the target's logits, ties by their index, the group is the draft, the `below` tokens before and
/// the `above` after it; of these only those whose probability differs from the draft's by less than
/// `probability_gap` and, with embeddings, whose embedding's squared distance from the draft's is below `distance`.
/// The draft is accepted if `u` times the group's q is below the group's p; else a token of `max(p - q, 0)` is drawn.
/// A draft with fewer than `below` tokens before it has no group but itself, nor has one that is no code where there
/// are embeddings. NaNs are in the order as -inf.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grouped {
    /// 7 as published.
    pub below: usize,
    /// 6 as published; fewer where there are no more.
    pub above: usize,
    /// 0.15 as published.
    pub probability_gap: f32,
    /// 0.5 as published.
    pub distance: f32,
    /// Dimensions of the embeddings; 0: none.
    pub dim: usize,
}

impl Default for Grouped {
    fn default() -> Self {
        Grouped { below: 7, above: 6, probability_gap: 0.15, distance: 0.5, dim: 0 }
    }
}

/// What is drawn for the positions behind the last token that a step emits: drafts of the next step, whose q is this
/// step's row. All are lossless.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(i32)]
#[non_exhaustive]
pub enum Redraft {
    /// Nothing; rows behind a rejection need not be read.
    #[default]
    None = 0,
    /// A token of each row, whatever was drafted.
    Independent = 1,
    /// The draft, if its own test passes, else the token that its rejection draws: the coupling under which most
    /// drafts stay as they are (arXiv 2510.24211).
    Maximal = 2,
    /// The greatest of logit plus Gumbel noise, noise that belongs to position and token and is the same in each step
    /// (arXiv 2510.24211).
    Gumbel = 3,
}

/// Describes a verifier; [`VisualVerifierBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct VisualVerifierBuilder<T> {
    batch: u64,
    max_drafts: u64,
    vocab: u64,
    target_rows: Option<u64>,
    target_stride: Option<i64>,
    draft_rows: Option<u64>,
    draft_stride: Option<i64>,
    allow_stride: Option<i64>,
    neighbours_stride: Option<i64>,
    embeddings_stride: Option<i64>,
    codes: Option<(u64, u64)>,
    drafts: Drafts,
    rule: VisualRule,
    redraft: Redraft,
    guided: bool,
    fallback: i32,
    types: PhantomData<T>,
}

impl<T: Float> VisualVerifierBuilder<T> {
    pub(super) fn new(batch: usize, max_drafts: usize, vocab: usize, rule: VisualRule) -> Self {
        VisualVerifierBuilder {
            batch: batch as u64,
            max_drafts: max_drafts as u64,
            vocab: vocab as u64,
            target_rows: None,
            target_stride: None,
            draft_rows: None,
            draft_stride: None,
            allow_stride: None,
            neighbours_stride: None,
            embeddings_stride: None,
            codes: None,
            drafts: Drafts::default(),
            rule,
            redraft: Redraft::None,
            guided: false,
            fallback: 0,
            types: PhantomData,
        }
    }

    /// Rows of `target`; `batch * (max_drafts + 1)` if not given.
    pub fn target_rows(mut self, rows: usize) -> Self {
        self.target_rows = Some(rows as u64);
        self
    }

    /// Elements from one row of `target` to the next, and of `target_free`; `vocab` if not given.
    pub fn target_row_stride(mut self, stride: i64) -> Self {
        self.target_stride = Some(stride);
        self
    }

    /// How the drafts were made; [`Drafts::Deterministic`] if not given.
    pub fn drafts(mut self, drafts: Drafts) -> Self {
        self.drafts = drafts;
        self
    }

    /// Rows of `draft` and of `draft_stats`; `batch * max_drafts` if not given.
    pub fn draft_rows(mut self, rows: usize) -> Self {
        self.draft_rows = Some(rows as u64);
        self
    }

    /// Elements from one row of `draft` to the next, and of `draft_free`; `vocab` if not given.
    pub fn draft_row_stride(mut self, stride: i64) -> Self {
        self.draft_stride = Some(stride);
        self
    }

    /// Words from one row of `allow` to the next; `ceil(vocab / 32)` if not given.
    pub fn allow_row_stride(mut self, stride: i64) -> Self {
        self.allow_stride = Some(stride);
        self
    }

    /// Which tokens are codes: `codes` from `first` on; all if not given. Tables have a row for each.
    pub fn codes(mut self, first: usize, codes: usize) -> Self {
        self.codes = Some((first as u64, codes as u64));
        self
    }

    /// Entries from one row of `neighbours` to the next; the greater of `accumulated` and `zeroed` if not given.
    pub fn neighbours_row_stride(mut self, stride: i64) -> Self {
        self.neighbours_stride = Some(stride);
        self
    }

    /// Elements from one row of `embeddings` to the next; their `dim` if not given.
    pub fn embeddings_row_stride(mut self, stride: i64) -> Self {
        self.embeddings_stride = Some(stride);
        self
    }

    /// What is drawn for the tail; [`Redraft::None`] if not given.
    pub fn redraft(mut self, redraft: Redraft) -> Self {
        self.redraft = redraft;
        self
    }

    /// Classifier-free guidance: rows of `target` and, where there are any, of `draft` have rows without the
    /// condition beside them.
    pub fn guided(mut self) -> Self {
        self.guided = true;
        self
    }

    /// The token in place of one that cannot be drawn, because its row allows none; 0 if not given.
    pub fn fallback_token(mut self, token: i32) -> Self {
        self.fallback = token;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `vocab` outside 1 to 2^18, `batch` above 2^20, `max_drafts` above 1023, 2^31 rows and more,
    /// `codes` that are none or not in the vocabulary, more than 65535 neighbours, more than 15 tokens on a side of the
    /// draft, `dim` above 65536; [`Error::Unsupported`] for a bound, gap or distance that is negative or NaN;
    /// [`Error::Stride`] for rows that overlap; [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<VisualVerifier<T>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("vocab", self.vocab, 1, MOST_VOCAB)?;
        size("batch", self.batch, 0, MOST_BATCH)?;
        size("max_drafts", self.max_drafts, 0, MOST_DRAFTS)?;
        let rows = self.batch * (self.max_drafts + 1);
        let target_rows = self.target_rows.unwrap_or(rows);
        let draft_rows = self.draft_rows.unwrap_or(self.batch * self.max_drafts);
        const MOST_ROWS: u64 = i32::MAX as u64;
        size("target_rows", target_rows, 0, MOST_ROWS)?;
        size("draft_rows", draft_rows, 0, MOST_ROWS)?;
        let (first_code, codes) = self.codes.unwrap_or((0, self.vocab));
        size("first code", first_code, 0, self.vocab - 1)?;
        size("codes", codes, 1, self.vocab - first_code)?;
        let number = |arg, x: f32| match x >= 0.0 {
            true => Ok(x.to_bits()),
            false => Err(Error::Unsupported { arg, what: "0 and above" }),
        };
        let rule = match self.rule {
            VisualRule::Lantern(rule) => {
                size("accumulated", rule.accumulated as u64, 0, MOST_NEIGHBOURS)?;
                size("zeroed", rule.zeroed as u64, 0, MOST_NEIGHBOURS)?;
                RuleOfPlan::Lantern {
                    accumulated: rule.accumulated as u32,
                    zeroed: rule.zeroed as u32,
                    bound: number("bound", rule.bound)?,
                }
            }
            VisualRule::Grouped(rule) => {
                size("below", rule.below as u64, 0, MOST_BESIDE)?;
                size("above", rule.above as u64, 0, MOST_BESIDE)?;
                size("dim", rule.dim as u64, 0, MOST_DIM)?;
                RuleOfPlan::Grouped {
                    below: rule.below as u32,
                    above: rule.above as u32,
                    probability_gap: number("probability_gap", rule.probability_gap)?,
                    distance: number("distance", rule.distance)?,
                    dim: rule.dim as u64,
                }
            }
            VisualRule::Jacobi => RuleOfPlan::Jacobi,
        };
        let tensor = |arg, rows, columns, stride: Option<i64>| {
            let layout = Layout::strided([rows, columns], [stride.unwrap_or(columns as i64), 1]);
            if rows > 1 {
                layout.require_disjoint(arg)?;
            }
            Ok::<_, Error>((layout.strides()[0], layout.required_len(arg)?))
        };
        let (target_stride, target_len) = tensor("target", target_rows, self.vocab, self.target_stride)?;
        let (draft_stride, draft_len) = tensor("draft", draft_rows, self.vocab, self.draft_stride)?;
        let (allow_stride, allow_len) = tensor("allow", rows, self.vocab.div_ceil(32), self.allow_stride)?;
        let (neighbours_stride, neighbours_len) = match rule {
            RuleOfPlan::Lantern { accumulated, zeroed, .. } => {
                tensor("neighbours", codes, accumulated.max(zeroed).into(), self.neighbours_stride)?
            }
            _ => (0, 0),
        };
        let (embeddings_stride, embeddings_len) = match rule {
            RuleOfPlan::Grouped { dim, .. } => tensor("embeddings", codes, dim, self.embeddings_stride)?,
            _ => (0, 0),
        };
        let plan = Plan {
            batch: self.batch,
            max_drafts: self.max_drafts,
            vocab: self.vocab,
            target_rows,
            target_stride,
            target_len,
            draft_rows,
            draft_stride,
            draft_len: if self.drafts == Drafts::Deterministic { 0 } else { draft_len },
            allow_stride,
            allow_len,
            neighbours_stride,
            neighbours_len,
            embeddings_stride,
            embeddings_len,
            first_code,
            codes,
            drafts: self.drafts,
            rule,
            redraft: self.redraft,
            guided: self.guided,
            fallback: self.fallback,
            multiprocessors: device.sm_count.max(1) as u64,
        };
        Ok(VisualVerifier { inner: plan, types: PhantomData })
    }
}

/// The rule, with the bits of its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum RuleOfPlan {
    Lantern { accumulated: u32, zeroed: u32, bound: u32 },
    Grouped { below: u32, above: u32, probability_gap: u32, distance: u32, dim: u64 },
    Jacobi,
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) batch: u64,
    pub(super) max_drafts: u64,
    pub(super) vocab: u64,
    pub(super) target_rows: u64,
    pub(super) target_stride: i64,
    pub(super) target_len: u64,
    pub(super) draft_rows: u64,
    pub(super) draft_stride: i64,
    pub(super) draft_len: u64,
    pub(super) allow_stride: i64,
    pub(super) allow_len: u64,
    pub(super) neighbours_stride: i64,
    pub(super) neighbours_len: u64,
    pub(super) embeddings_stride: i64,
    pub(super) embeddings_len: u64,
    pub(super) first_code: u64,
    pub(super) codes: u64,
    pub(super) drafts: Drafts,
    pub(super) rule: RuleOfPlan,
    pub(super) redraft: Redraft,
    pub(super) guided: bool,
    pub(super) fallback: i32,
    multiprocessors: u64,
}

impl Plan {
    pub(super) fn rows(&self) -> u64 {
        self.batch * (self.max_drafts + 1)
    }

    /// Of the device; the host needs that of one block.
    pub(super) fn workspace_bytes(&self) -> u64 {
        let block = (chunks(self.vocab) * CHUNK_WORDS).next_multiple_of(2) * 4;
        self.rows() * ROW_BYTES + u64::from(self.blocks()).max(1) * block
    }

    /// Two a request.
    pub(super) fn counter_words(&self) -> u64 {
        self.batch * 2
    }

    /// A row of the step is an item; items are numbered by row of the request, then by request.
    pub(super) fn blocks(&self) -> u32 {
        (self.multiprocessors * BLOCKS_A_MULTIPROCESSOR).min(self.rows()) as u32
    }

    /// For elements of so many bytes.
    pub(super) fn traffic(&self, element: usize) -> Traffic {
        let swept = if self.drafts == Drafts::Logits { self.batch * self.max_drafts } else { 0 };
        let rows = (self.rows() + swept) as u128 * if self.guided { 2 } else { 1 };
        let read = rows * self.vocab as u128 * element as u128;
        let redrafts = if self.redraft == Redraft::None { 0 } else { self.rows() * 4 };
        let written = self.rows() * 4 + self.batch * 12 + redrafts;
        Traffic { read: read.try_into().unwrap_or(u64::MAX), written }
    }
}
