//! Attention of models that generate scale by scale: who sees whom is a table of segments, not a mask.

mod merge;
mod patterns;
mod prepare;
mod scale;
mod visibility;

pub use crate::layout::Access;
pub use crate::plan::Traffic;
pub use merge::{Merge, MergeArgs, MergeBuilder, MergeSchedule};
pub use patterns::{ClipContext, PackedVideo, Past};
pub use prepare::{
    AppendAt, Norm, Positions, Prepare, PrepareArgs, PrepareBuilder, PrepareCell, PrepareSchedule, Rope,
};
pub use scale::{
    ScaleAttention, ScaleAttentionArgs, ScaleAttentionBuilder, ScaleAttentionPackedArgs, Schedule, Variant,
};
pub use visibility::{Rule, Segment, Visibility};
