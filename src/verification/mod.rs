//! Verification of drafts: which of the tokens that a cheap model proposed the model itself would have drawn.
//!
//! [`Verifier`] decides a whole batch of chains in one call, [`TreeVerifier`] of trees, which [`TreeBuilder`] and [`Tree`]
//! prepare; [`DraftSample`] is the sampler of the drafter, which leaves
//! behind what the verifier needs to know of its rows; [`RowStats`] finds what is needed of the target's rows, for engines
//! that do not let their LM head find it.
//!
//! # Randomness
//! Every draw is a Philox block of (request's seed, absolute position, use, draw), so what a request emits does not depend
//! on its place in a batch or on who else is in it. The counter's third word is `use | row << 8`, where `use` is 0 for a
//! drafter's token, 1 for an accept test, 2 for the residual, 3 for a token of the target, 4 for a trial of thinning, 8 for
//! noise that belongs to a token of a position, 9 and 10 for candidates and their ranks, 11 for which of several is selected,
//! and `row` is the number of the row in the step (of a tree: the depth of the node, for a drafter's tokens the number of the
//! node that they follow), 0 for uses 3, 8 and 11: two steps that see the same position draw independently, and a token of the
//! target is the same with drafts and without.
//!
//! # Lossless and lossy
//! [`Verifier`] and [`VisualRule::Jacobi`] give tokens that have the target's law; the other rules of [`VisualVerifier`],
//! [`PooledVerifier`], [`TypicalVerifier`] and [`ConfidenceRank`] are lossy, and say so.

mod candidates;
mod confidence;
mod draft_sample;
mod host_rows;
mod items;
mod log2;
mod moments;
mod pooled;
mod row_stats;
mod rows;
mod tree;
mod tree_builder;
mod tree_verifier;
mod typical;
mod verifier;
mod visual;

pub use crate::plan::Traffic;
pub use candidates::{
    Backspace, BackspaceArgs, BeamRank, BeamRankArgs, GatedSample, GatedSampleArgs, GatedSampleBuilder,
    SelectCandidate, SelectCandidateArgs,
};
pub use confidence::{Confidence, ConfidenceOut, ConfidenceRank, ConfidenceRankArgs, ConfidenceRankBuilder};
pub use draft_sample::{DraftSample, DraftSampleArgs, DraftSampleBuilder, DraftSampleSchedule};
pub use pooled::{PooledOptions, PooledOut, PooledVerifier, PooledVerifierArgs, PooledVerifierBuilder};
pub use row_stats::{RowStats, RowStatsArgs, RowStatsBuilder, RowStatsSchedule};
pub use tree::Tree;
pub use tree_builder::{TreeBuilder, TreeBuilderArgs, TreeBuilderBuilder, TreeBuilderOut};
pub use tree_verifier::{
    Siblings, TreeLinks, TreeVerifier, TreeVerifierArgs, TreeVerifierBuilder, TreeVerifierOptions, TreeVerifierOut,
    TreeVerifierSchedule,
};
pub use typical::{TypicalOut, TypicalVerifier, TypicalVerifierArgs, TypicalVerifierBuilder};
pub use verifier::{
    Drafts, Rule, Verifier, VerifierArgs, VerifierBuilder, VerifierOptions, VerifierOut, VerifierSchedule,
};
pub use visual::{
    Embeddings, Grouped, Lantern, Neighbours, Redraft, VisualOptions, VisualOut, VisualRule, VisualVerifier,
    VisualVerifierArgs, VisualVerifierBuilder,
};

use bytemuck::{Pod, Zeroable};

use crate::dtype::{DType, Element, sealed};

macro_rules! counts {
    ($($(#[doc = $doc:literal])+ $name:ident;)+) => {$(
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Pod, Zeroable)]
        #[repr(transparent)]
        pub struct $name(pub i32);

        impl sealed::Sealed for $name {}
        impl Element for $name {
            const DTYPE: DType = DType::I32;
        }
    )+};
}
counts! {
    /// How many tokens a step emits for a request: the accepted drafts and one more. 0 for a request without rows.
    Emitted;
    /// How many drafts of a request a step accepts.
    Accepted;
}

/// Bits of a request's status word. 0: nothing to say.
pub mod status {
    /// A row of the target that the decision looked at holds a NaN. NaNs have no probability.
    pub const TARGET_NAN: u32 = 1;
    /// A row of the draft holds a NaN or nothing that is allowed: its draft was not accepted, and the token in its place
    /// is drawn from the target.
    pub const DRAFT_BAD: u32 = 2;
    /// A row of the target allows no token: the step ends there with the fallback token.
    pub const TARGET_EMPTY: u32 = 4;
    /// Greatest logits of the target are infinite, or too large for their temperature: the lowest token of the greatest
    /// one was taken.
    pub const TARGET_BEYOND: u32 = 8;
    /// By its row, the drafter cannot have drawn the draft. It was accepted if the target could have.
    pub const DRAFT_IMPOSSIBLE: u32 = 16;
    /// A row index lies outside its tensor. Such a row of the target allows no token, such a row of the draft is bad.
    pub const ROW_OUT_OF_RANGE: u32 = 32;
    /// The request has more drafts than the plan allows; those beyond were ignored.
    pub const DRAFTS_IGNORED: u32 = 64;
    /// Tokens had no place in their sequence and were dropped.
    pub const SEQUENCE_FULL: u32 = 1024;
    /// A link of the request's tree leads nowhere or back: to no node of the tree, to a node before it, or in a circle.
    /// What hangs on it was ignored.
    pub const TREE_BAD: u32 = 4096;
}
