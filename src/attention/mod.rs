//! Attention of models that generate scale by scale.

mod merge;
mod prepare;

pub use crate::layout::Access;
pub use merge::{Merge, MergeArgs, MergeBuilder, MergeSchedule};
pub use prepare::{
    AppendAt, Norm, Positions, Prepare, PrepareArgs, PrepareBuilder, PrepareCell, PrepareSchedule, Rope,
};
