//! Attention of models that generate scale by scale: who sees whom is a table of segments, not a mask.

mod patterns;
mod scale;
mod visibility;

pub use patterns::{ClipContext, PackedVideo, Past};
pub use scale::{ScaleAttention, ScaleAttentionArgs, ScaleAttentionBuilder, Schedule, Variant};
pub use visibility::{Rule, Segment, Visibility};
