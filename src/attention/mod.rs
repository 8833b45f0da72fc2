//! Attention of models that generate scale by scale.

mod merge;

pub use crate::layout::Access;
pub use merge::{Merge, MergeArgs, MergeBuilder, MergeSchedule};
