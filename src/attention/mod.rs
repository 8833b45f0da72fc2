//! Attention of models that generate scale by scale: who sees whom is a table of segments, not a mask.

mod merge;
mod patterns;
mod prepare;
mod scale;
mod visibility;

pub use crate::layout::Access;
pub use merge::{Merge, MergeArgs, MergeBuilder, MergeSchedule};
pub use patterns::{ClipContext, PackedVideo, Past};
pub use prepare::{
    AppendAt, Norm, Positions, Prepare, PrepareArgs, PrepareBuilder, PrepareCell, PrepareSchedule, Rope,
};
pub use scale::{ScaleAttention, ScaleAttentionArgs, ScaleAttentionBuilder, Schedule, Variant};
pub use visibility::{Rule, Segment, Visibility};

/// The bytes that any kernel must move, however it cuts the work up: each element that is read once, and each that is
/// written once. Saturates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Traffic {
    /// From all inputs.
    pub read: u64,
    /// To all outputs.
    pub written: u64,
}
