//! Shapes, checks and the schedule. Pure.

use core::marker::PhantomData;

use super::Verifier;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::verification::Traffic;
use crate::verification::items::{self, BLOCKS_A_MULTIPROCESSOR, WARPS};
use crate::verification::rows::chunks;

/// Columns of a row, and rows of a batch, are counted in 32 bits with room.
const MOST_VOCAB: u64 = 1 << 24;
const MOST_BATCH: u64 = 1 << 20;
const MOST_DRAFTS: u64 = 1023;
const MOST_TRIALS: u32 = 4096;
/// What the kernel keeps of a pair of rows.
const SUMMARY_BYTES: u64 = 64;

/// When a draft is accepted. `p` is the target's probability, `q` the draft's.
///
/// All are lossless: the tokens that are emitted over any number of steps have the law of the target's own, provided that
/// the drafts were drawn from the q given (for [`Rule::Greedy`] and [`Rule::Match`]: however they came about).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(i32)]
#[non_exhaustive]
pub enum Rule {
    /// The draft is the target's most probable token; the lowest one wins a tie. Temperatures are ignored.
    Greedy = 0,
    /// A token is drawn from the target, and the draft is that one. Needs no q; the tokens do not depend on the drafts at
    /// all. For drafts that are not drawn at random no lossless rule accepts more.
    Match = 1,
    /// `u q(d) < p(d)` for a uniform `u` of `[0, 1)`; in place of the first draft that fails, a token of `max(p - q, 0)`
    /// (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
    #[default]
    Reject = 2,
    /// The longest prefix of drafts that passes a test of its own (Sun et al., *Block Verification Accelerates
    /// Speculative Decoding*, arXiv 2403.10444): never accepts fewer on average than [`Rule::Reject`]. No gain for
    /// [`Drafts::Deterministic`]. Reads all rows twice.
    Block = 3,
}

impl Rule {
    /// From the number of a rule, `rule as i32`.
    pub fn from_code(code: i32) -> Option<Self> {
        [Rule::Greedy, Rule::Match, Rule::Reject, Rule::Block].into_iter().find(|&rule| rule as i32 == code)
    }
}

/// How the drafts were made, and what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Drafts {
    /// Not at random (n-grams, greedy drafters): q is 1 for the draft.
    #[default]
    Deterministic,
    /// Drawn from the softmax of the drafter's logits, whose rows are swept.
    Logits,
    /// Drawn so by [`DraftSample`](crate::verification::DraftSample), which stored what is needed of its rows: only
    /// single logits of the draft are read, and its truncation is known.
    LogitsAndStats,
}

/// Describes a verifier; [`VerifierBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct VerifierBuilder<P, Q> {
    batch: u64,
    max_drafts: u64,
    vocab: u64,
    target_rows: Option<u64>,
    target_stride: Option<i64>,
    draft_vocab: Option<u64>,
    draft_rows: Option<u64>,
    draft_stride: Option<i64>,
    allow_stride: Option<i64>,
    drafts: Drafts,
    rule: Rule,
    rules_per_request: bool,
    trials: Option<u32>,
    fallback: i32,
    by_request: Option<bool>,
    types: PhantomData<(P, Q)>,
}

impl<P: Float, Q: Float> VerifierBuilder<P, Q> {
    pub(super) fn new(batch: usize, max_drafts: usize, vocab: usize) -> Self {
        VerifierBuilder {
            batch: batch as u64,
            max_drafts: max_drafts as u64,
            vocab: vocab as u64,
            target_rows: None,
            target_stride: None,
            draft_vocab: None,
            draft_rows: None,
            draft_stride: None,
            allow_stride: None,
            drafts: Drafts::default(),
            rule: Rule::default(),
            rules_per_request: false,
            trials: None,
            fallback: 0,
            by_request: None,
            types: PhantomData,
        }
    }

    /// Rows of `target`; `batch * (max_drafts + 1)` if not given.
    pub fn target_rows(mut self, rows: usize) -> Self {
        self.target_rows = Some(rows as u64);
        self
    }

    /// Elements from one row of `target` to the next; `vocab` if not given. A target whose head is padded has a stride
    /// larger than `vocab`.
    pub fn target_row_stride(mut self, stride: i64) -> Self {
        self.target_stride = Some(stride);
        self
    }

    /// How the drafts were made; [`Drafts::Deterministic`] if not given.
    pub fn drafts(mut self, drafts: Drafts) -> Self {
        self.drafts = drafts;
        self
    }

    /// Columns of `draft`; `vocab` if not given. A smaller vocabulary needs `target_to_draft`, unless it is the first
    /// columns.
    pub fn draft_vocab(mut self, vocab: usize) -> Self {
        self.draft_vocab = Some(vocab as u64);
        self
    }

    /// Rows of `draft` and of `draft_stats`; `batch * max_drafts` if not given.
    pub fn draft_rows(mut self, rows: usize) -> Self {
        self.draft_rows = Some(rows as u64);
        self
    }

    /// Elements from one row of `draft` to the next; its vocabulary if not given.
    pub fn draft_row_stride(mut self, stride: i64) -> Self {
        self.draft_stride = Some(stride);
        self
    }

    /// Words from one row of `allow` to the next; `ceil(vocab / 32)` if not given.
    pub fn allow_row_stride(mut self, stride: i64) -> Self {
        self.allow_stride = Some(stride);
        self
    }

    /// The rule of all requests; [`Rule::Reject`] if not given.
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rule = rule;
        self
    }

    /// Rules may come with the requests, in `rules`. The plan's is that of requests whose code is none of a rule.
    pub fn rules_per_request(mut self) -> Self {
        self.rules_per_request = true;
        self
    }

    /// How often [`Rule::Reject`] draws from p and keeps with probability `1 - q / p`, before it sweeps the rows for
    /// `max(p - q, 0)`; 32, or none for rows of up to 16384 columns, if not given. The law of the tokens is the same for
    /// any number, the tokens are not. With `uniforms` there are no trials.
    pub fn trials(mut self, trials: u32) -> Self {
        self.trials = Some(trials);
        self
    }

    /// The token in place of one that cannot be drawn, because its row allows none; 0 if not given.
    pub fn fallback_token(mut self, token: i32) -> Self {
        self.fallback = token;
        self
    }

    /// Forces whether each request is decided by blocks of its own, which read all of its rows, or rows by whichever blocks come
    /// to them, which pass over what lies behind a rejection. Without, requests of up to 16384 columns and few rows are decided
    /// by blocks of their own. The outcome is the same. Not together with [`Rule::Block`] or rules per request.
    pub fn by_request(mut self, by_request: bool) -> Self {
        self.by_request = Some(by_request);
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `vocab` or `draft_vocab` outside 1 to 2^24, `batch` above 2^20, `max_drafts` above 1023,
    /// `trials` above 4096, more than 2^31 - 1 rows; [`Error::Stride`] for rows that overlap;
    /// [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Verifier<P, Q>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        size("vocab", self.vocab, 1, MOST_VOCAB)?;
        size("batch", self.batch, 0, MOST_BATCH)?;
        size("max_drafts", self.max_drafts, 0, MOST_DRAFTS)?;
        let draft_vocab = self.draft_vocab.unwrap_or(self.vocab);
        size("draft_vocab", draft_vocab, 1, MOST_VOCAB)?;
        let rows = self.batch * (self.max_drafts + 1);
        let target_rows = self.target_rows.unwrap_or(rows);
        let draft_rows = self.draft_rows.unwrap_or(self.batch * self.max_drafts);
        const MOST_ROWS: u64 = i32::MAX as u64;
        size("target_rows", target_rows, 0, MOST_ROWS)?;
        size("draft_rows", draft_rows, 0, MOST_ROWS)?;
        let trials = self.trials.unwrap_or(if self.vocab <= 16384 { 0 } else { 32 });
        size("trials", trials.into(), 0, MOST_TRIALS.into())?;

        let tensor = |arg, rows, columns, stride: Option<i64>| {
            let layout = Layout::strided([rows, columns], [stride.unwrap_or(columns as i64), 1]);
            if rows > 1 {
                layout.require_disjoint(arg)?;
            }
            Ok::<_, Error>((layout.strides()[0], layout.required_len(arg)?))
        };
        let (target_stride, target_len) = tensor("target", target_rows, self.vocab, self.target_stride)?;
        let (draft_stride, draft_len) = tensor("draft", draft_rows, draft_vocab, self.draft_stride)?;
        let (allow_stride, allow_len) = tensor("allow", rows, self.vocab.div_ceil(32), self.allow_stride)?;
        let plan = Plan {
            batch: self.batch,
            max_drafts: self.max_drafts,
            vocab: self.vocab,
            target_rows,
            target_stride,
            target_len,
            draft_vocab,
            draft_rows,
            draft_stride,
            draft_len: if self.drafts == Drafts::Deterministic { 0 } else { draft_len },
            allow_stride,
            allow_len,
            drafts: self.drafts,
            rule: self.rule,
            rules_per_request: self.rules_per_request,
            trials,
            fallback: self.fallback,
            multiprocessors: device.sm_count.max(1) as u64,
            clusters: device.arch == (Arch { major: 9, minor: 0 }),
            by_request: false,
        };
        // Few enough chunks for the warps of a cluster.
        let chunks = (self.max_drafts + 1) * (chunks(self.vocab) + plan.swept_draft_chunks());
        let small = self.vocab <= 16384 && draft_vocab <= 16384 && chunks <= 512;
        let by_request = self.by_request.unwrap_or(small && !plan.may_block());
        if by_request && plan.may_block() {
            return Err(Error::Unsupported {
                arg: "by_request",
                what: "block verification goes through the rows twice",
            });
        }
        let plan = Plan { by_request, ..plan };
        Ok(Verifier { inner: plan, types: PhantomData })
    }
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
    pub(super) draft_vocab: u64,
    pub(super) draft_rows: u64,
    pub(super) draft_stride: i64,
    pub(super) draft_len: u64,
    pub(super) allow_stride: i64,
    pub(super) allow_len: u64,
    pub(super) drafts: Drafts,
    pub(super) rule: Rule,
    pub(super) rules_per_request: bool,
    pub(super) trials: u32,
    pub(super) fallback: i32,
    multiprocessors: u64,
    clusters: bool,
    by_request: bool,
}

impl Plan {
    pub(super) fn rows(&self) -> u64 {
        self.batch * (self.max_drafts + 1)
    }

    /// Whether a request may be decided by blocks: the rows are then gone through twice.
    pub(super) fn may_block(&self) -> bool {
        self.rule == Rule::Block || self.rules_per_request
    }

    /// Of the device, and of the host, which needs less.
    pub(super) fn workspace_bytes(&self) -> u64 {
        let partials = self.rows() * (chunks(self.vocab) + self.swept_draft_chunks()) * 8;
        let residuals = self.rows() * chunks(self.vocab) * 4;
        let summaries = self.rows() * SUMMARY_BYTES;
        (partials + residuals + summaries).max(super::host::workspace_bytes(self.vocab, self.draft_vocab))
    }

    /// One a row, and two a request.
    pub(super) fn counter_words(&self) -> u64 {
        self.rows() + self.batch * 2
    }

    pub(super) fn swept_draft_chunks(&self) -> u64 {
        if self.drafts == Drafts::Logits { chunks(self.draft_vocab) } else { 0 }
    }

    /// For elements of so many bytes.
    pub(super) fn traffic(&self, target: usize, draft: usize) -> Traffic {
        let rows = self.rows() as u128 * self.vocab as u128 * target as u128;
        let sweeps = self.drafts == Drafts::Logits && !matches!(self.rule, Rule::Greedy | Rule::Match);
        let drafts = if sweeps { (self.batch * self.max_drafts) as u128 } else { 0 };
        let read = rows + drafts * self.draft_vocab as u128 * draft as u128;
        let written = self.rows() * 4 + self.batch * 12;
        Traffic { read: read.try_into().unwrap_or(u64::MAX), written }
    }

    pub(super) fn schedule(&self) -> VerifierSchedule {
        let of_target = chunks(self.vocab);
        let of_draft = self.swept_draft_chunks();
        let blocks = self.multiprocessors * BLOCKS_A_MULTIPROCESSOR;
        let rounds = items::rounds(self.multiprocessors, |rounds| {
            let of_pairs = self.max_drafts * (of_target + of_draft).div_ceil(rounds * WARPS);
            self.batch * (of_pairs + of_target.div_ceil(rounds * WARPS))
        });
        let slices = (of_target + of_draft).div_ceil(rounds * WARPS);
        let items = self.rows() * slices;
        // As many blocks a request as keep two on each multiprocessor, and their warps busy.
        let fits = |n: u64| n == 1 || (self.clusters && self.batch * n <= 2 * self.multiprocessors);
        let busy = |n: u64| n == 1 || (self.max_drafts + 1) * (of_target + of_draft) >= n * WARPS;
        let cluster = [8, 4, 2, 1].into_iter().find(|&n| self.by_request && fits(n) && busy(n)).unwrap_or(0);
        VerifierSchedule {
            cluster: cluster as u32,
            of_target,
            of_draft,
            slices,
            chunks_per_item: (rounds * WARPS) as u32,
            items,
            blocks: blocks.min(items) as u32,
        }
    }
}

/// How the kernel cuts a step up. An item is `chunks_per_item` chunks of a row of the target and the row of the draft
/// beside it, the target's first; items are numbered by row of the request, then by request, then by slice, and block `i`
/// takes those that leave the rest `i` by `blocks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VerifierSchedule {
    /// Chunks of 1024 columns of a row of the target.
    pub of_target: u64,
    /// Chunks of a row of the draft that are swept.
    pub of_draft: u64,
    /// Items of a pair of rows.
    pub slices: u64,
    /// Chunks in an item.
    pub chunks_per_item: u32,
    /// Items of the step.
    pub items: u64,
    /// Blocks of the grid.
    pub blocks: u32,
    /// Blocks of a request's own, a cluster that shares out its chunks, instead of all this; or 0.
    pub cluster: u32,
}
