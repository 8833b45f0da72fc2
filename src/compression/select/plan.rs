//! Shapes, checks and the schedule. Pure.

use super::{Scope, Select, Tie};
use crate::compression::Traffic;
use crate::device::{Arch, DeviceInfo};
use crate::error::{Error, Result};
use crate::layout::Layout;

const MOST: u64 = (1 << 30) - 1;
const MOST_LISTS: u64 = i32::MAX as u64;
const MOST_ADA_HEADS: u64 = 1024;
const LEAST_SHARED: u64 = 16384;
const MOST_SHARED: u64 = 227 << 10;
/// Shared memory of a block besides the scores.
const FIXED: u64 = 2048 * 4 + 32 * 4 + 8 * 64;
const TILE: u64 = 128;

/// Describes a selection; [`SelectBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct SelectBuilder {
    sets: u64,
    heads: u64,
    tokens: u64,
    scope: Scope,
    importance: Option<[i64; 2]>,
    redundancy: Option<[i64; 2]>,
    length: Option<u64>,
    first_rows: u64,
    budget: u64,
    capacity: Option<u64>,
    sink: u64,
    recent: u64,
    active: u64,
    block: u64,
    lambda: f32,
    relative: bool,
    demoted: u64,
    demotion: f32,
    tie: Tie,
    shared_bytes: Option<u64>,
}

impl SelectBuilder {
    pub(super) fn new(sets: usize, heads: usize, tokens: usize) -> Self {
        SelectBuilder {
            sets: sets as u64,
            heads: heads as u64,
            tokens: tokens as u64,
            scope: Scope::PerHead,
            importance: None,
            redundancy: None,
            length: None,
            first_rows: 0,
            budget: 0,
            capacity: None,
            sink: 0,
            recent: 0,
            active: 0,
            block: 1,
            lambda: 0.07,
            relative: false,
            demoted: 0,
            demotion: 0.0,
            tie: Tie::Oldest,
            shared_bytes: None,
        }
    }

    /// Who shares a set of kept tokens; [`Scope::PerHead`] if not given.
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Strides of `importance` in elements, `[set, head]`; contiguous `[sets, heads, tokens]` if not given.
    pub fn importance_strides(mut self, strides: [i64; 2]) -> Self {
        self.importance = Some(strides);
        self
    }

    /// Strides of `redundancy` in elements, `[set, head]`; contiguous `[sets, heads, tokens]` if not given.
    pub fn redundancy_strides(mut self, strides: [i64; 2]) -> Self {
        self.redundancy = Some(strides);
        self
    }

    /// Tokens of each list where no `lengths` are given; `tokens` if not given.
    pub fn length(mut self, length: usize) -> Self {
        self.length = Some(length as u64);
        self
    }

    /// The first `rows` rows of the tokens are what a compression left: a list has as many of them as `counts` says,
    /// which is read before it is written, and the other tokens follow at row `rows`. Indices are rows, as
    /// [`Compact`](super::super::Compact) wants them; scores are those of the tokens that there are, one behind the
    /// other, as [`Importance`](super::super::Importance) and [`Redundancy`](super::super::Redundancy) write them of a
    /// cache.
    pub fn first_rows(mut self, rows: usize) -> Self {
        self.first_rows = rows as u64;
        self
    }

    /// Tokens to keep of each list, the protected ones among them, where no `budgets` are given. More than there are: all.
    pub fn budget(mut self, budget: usize) -> Self {
        self.budget = budget as u64;
        self
    }

    /// Places of a list in `indices`; if not given as many as the budget can need, and the active tokens. A budget that is
    /// read on the device is cut to it, less the active tokens.
    pub fn capacity(mut self, capacity: usize) -> Self {
        self.capacity = Some(capacity as u64);
        self
    }

    /// The first tokens of a list that are kept in any case (attention sinks); 0 if not given.
    pub fn sink(mut self, tokens: usize) -> Self {
        self.sink = tokens as u64;
        self
    }

    /// The last tokens of a list that are kept in any case (the window); 0 if not given. If the budget does not hold both,
    /// the sink comes first, and of the recent tokens the last.
    pub fn recent(mut self, tokens: usize) -> Self {
        self.recent = tokens as u64;
        self
    }

    /// Tokens after a list that are listed as kept too, have no scores and do not count: chunks that are not clean yet.
    pub fn active(mut self, tokens: usize) -> Self {
        self.active = tokens as u64;
        self
    }

    /// Tokens that are kept or dropped together (frames, chunks, pages), by the mean of their scores; 1 if not given. The
    /// last block of a list may be shorter. The budget is rounded down to whole blocks, but for one that holds the list;
    /// protected ranges are rounded up.
    pub fn block(mut self, tokens: usize) -> Self {
        self.block = tokens as u64;
        self
    }

    /// The part of importance in the score where both are given; 0.07 if not given.
    pub fn lambda(mut self, lambda: f32) -> Self {
        self.lambda = lambda;
        self
    }

    /// The least finite score of a list's candidates is taken from each, before the weights: FlowCache. Matters only with
    /// weights.
    pub fn relative(mut self, relative: bool) -> Self {
        self.relative = relative;
        self
    }

    /// `by` is taken from the scores of the first `items` (tokens, or blocks), after the weights: FlowCache's `hard_code`,
    /// with a chunk and 1e6.
    pub fn demote(mut self, items: usize, by: f32) -> Self {
        self.demoted = items as u64;
        self.demotion = by;
        self
    }

    /// Which of equal scores are kept; [`Tie::Oldest`] if not given.
    pub fn tie(mut self, tie: Tie) -> Self {
        self.tie = tie;
        self
    }

    /// The most shared memory that a block takes, for tests and tuning: lists whose scores do not fit are read in several
    /// passes. What the device has, if not given.
    pub fn shared_bytes(mut self, bytes: usize) -> Self {
        self.shared_bytes = Some(bytes as u64);
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for 2^30 tokens or places, 2^31 lists, a length or first rows of more than `tokens`, a capacity
    /// that does not hold the budget and the active tokens, a block of no tokens, less than 16 KiB of shared memory, or
    /// with [`Scope::Ada`] more than 1024 heads or 2^30 tokens of a set; [`Error::Stride`] for a negative stride;
    /// [`Error::Unsupported`] for Ada-KV with blocks or relative scores, or for a `lambda`, demotion or floor that is
    /// not a number (the floor: from 0 to 1); [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<Select> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        let Self { sets, heads, tokens, .. } = self;
        size("tokens", tokens, 0, MOST)?;
        size("sets", sets, 0, MOST_LISTS)?;
        size("heads", heads, 0, MOST_LISTS)?;
        size("sets * heads", sets * heads, 0, MOST_LISTS)?;
        let length = self.length.unwrap_or(tokens);
        size("length", length, 0, tokens)?;
        size("first_rows", self.first_rows, 0, tokens)?;
        size("block", self.block, 1, MOST)?;
        size("active", self.active, 0, MOST)?;
        let unsupported = |arg, what| Err(Error::Unsupported { arg, what });
        if !self.lambda.is_finite() {
            return unsupported("lambda", "finite numbers only");
        }
        if self.demotion.is_nan() {
            return unsupported("demotion", "numbers only");
        }
        if self.first_rows > 0 && length < tokens {
            return unsupported("length", "all tokens, where first rows have lengths of their own");
        }
        let mut floor_alpha = 0;
        if let Scope::Ada { floor } = self.scope {
            size("heads", heads, 0, MOST_ADA_HEADS)?;
            size("heads * tokens", heads * tokens, 0, MOST)?;
            if self.block > 1 {
                return unsupported("block", "Ada-KV splits budgets over tokens");
            }
            if self.relative {
                return unsupported("relative", "Ada-KV compares the scores of different heads");
            }
            if !(0.0..=1.0).contains(&floor) {
                return unsupported("floor", "from 0 to 1");
            }
            floor_alpha = (f64::from(floor) * 65536.0).round() as u32;
        }
        let budget = self.budget.min(tokens);
        let most = match self.scope {
            Scope::Ada { .. } => budget.saturating_mul(heads.max(1)).min(tokens),
            _ => budget,
        };
        let least_capacity = most + self.active;
        let capacity = self.capacity.unwrap_or(least_capacity);
        size("capacity", capacity, least_capacity, MOST)?;
        let device_shared = (device.smem_per_block.max(0) as u64).min(MOST_SHARED);
        let shared_bytes = self.shared_bytes.unwrap_or(device_shared);
        size("shared_bytes", shared_bytes, LEAST_SHARED, device_shared)?;
        if let Scope::Ada { .. } = self.scope {
            size("shared_bytes", shared_bytes, FIXED + (12 * heads).next_multiple_of(16), device_shared)?;
        }
        let layout = |strides: Option<[i64; 2]>| {
            let shape = [sets, heads, tokens];
            strides.map_or(Layout::contiguous(shape), |[set, head]| Layout::strided(shape, [set, head, 1]))
        };
        let (importance, redundancy) = (layout(self.importance), layout(self.redundancy));
        Ok(Select {
            inner: Plan {
                importance_len: importance.required_len("importance")?,
                redundancy_len: redundancy.required_len("redundancy")?,
                importance,
                redundancy,
                scope: match self.scope {
                    Scope::Ada { .. } => Kind::Ada,
                    Scope::PerHead => Kind::PerHead,
                    Scope::PerSet => Kind::PerSet,
                    Scope::Shared => Kind::Shared,
                },
                floor_alpha,
                length,
                first_rows: self.first_rows,
                budget,
                capacity,
                sink: self.sink.min(tokens),
                recent: self.recent.min(tokens),
                active: self.active,
                block: self.block,
                lambda: self.lambda.to_bits(),
                relative: self.relative,
                demoted: self.demoted.min(MOST),
                demotion: self.demotion.to_bits(),
                newest: self.tie == Tie::Newest,
                shared_bytes,
            },
        })
    }
}

/// [`Scope`] without its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    PerHead,
    PerSet,
    Shared,
    Ada,
}

/// The checked description. Numbers by their bits.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) importance: Layout<3>,
    pub(super) redundancy: Layout<3>,
    pub(super) importance_len: u64,
    pub(super) redundancy_len: u64,
    pub(super) scope: Kind,
    /// Of 65536.
    pub(super) floor_alpha: u32,
    pub(super) length: u64,
    pub(super) first_rows: u64,
    pub(super) budget: u64,
    pub(super) capacity: u64,
    pub(super) sink: u64,
    pub(super) recent: u64,
    pub(super) active: u64,
    pub(super) block: u64,
    lambda: u32,
    pub(super) relative: bool,
    pub(super) demoted: u64,
    demotion: u32,
    pub(super) newest: bool,
    pub(super) shared_bytes: u64,
}

impl Plan {
    pub(super) fn sets(&self) -> u64 {
        self.importance.shape()[0]
    }

    pub(super) fn heads(&self) -> u64 {
        self.importance.shape()[1]
    }

    pub(super) fn tokens(&self) -> u64 {
        self.importance.shape()[2]
    }

    pub(super) fn lambda(&self) -> f32 {
        f32::from_bits(self.lambda)
    }

    pub(super) fn demotion(&self) -> f32 {
        f32::from_bits(self.demotion)
    }

    pub(super) fn lists(&self) -> u64 {
        match self.scope {
            _ if self.sets() * self.heads() == 0 => 0,
            Kind::PerHead | Kind::Ada => self.sets() * self.heads(),
            Kind::PerSet => self.sets(),
            Kind::Shared => 1,
        }
    }

    pub(super) fn items(&self) -> u64 {
        self.tokens().div_ceil(self.block)
    }

    /// Scores are averaged before anything else.
    pub(super) fn aggregates(&self) -> bool {
        self.block > 1 || matches!(self.scope, Kind::PerSet | Kind::Shared)
    }

    /// From one list's raw scores to the next in the workspace.
    pub(super) fn workspace_stride(&self) -> u64 {
        self.items().next_multiple_of(4)
    }

    pub(super) fn workspace_bytes(&self) -> u64 {
        let words = match (self.aggregates(), self.scope) {
            (true, _) => self.workspace_stride() + if self.block > 1 { self.items() } else { 0 },
            (false, Kind::Ada) => 1,
            _ => 0,
        };
        self.lists().saturating_mul(words).saturating_mul(4)
    }

    pub(super) fn threads(&self) -> u32 {
        match self.items() {
            0..=2048 => 128,
            2049..=8192 => 256,
            _ => 512,
        }
    }

    pub(super) fn cached(&self) -> bool {
        FIXED + self.items().next_multiple_of(TILE) * 4 <= self.shared_bytes
    }

    pub(super) fn traffic(&self, operands: u64) -> Traffic {
        let scores = self.sets().saturating_mul(self.heads()).saturating_mul(self.length).saturating_mul(4);
        Traffic { read: scores.saturating_mul(operands), written: self.lists() * (self.capacity * 4 + 4) }
    }
}
