//! Compression of KV caches: what of a cache to keep, and in how many bits, within a budget of bytes.
//!
//! # Shapes
//! A **set** is what is compressed at once and for itself: one layer of one sequence (or of one branch of guidance). All sets of
//! an event go into one launch. Keys and values are `[sets, tokens, heads, head_dim]` by strides, the last dimension
//! contiguous, where `heads` are the heads of K and V; queries are `[sets, queries, groups * heads, head_dim]`, the query heads
//! of a KV head next to each other. Scores are `[sets, heads, tokens]` f32, kept indices `[sets, heads, kept]` i32 and
//! ascending. A token has a **row**, where it lies in a buffer, and a **position**, where it stands in its sequence: after a
//! compression they differ, and both are kept.

mod cache;
mod compact;
mod drift;
mod event;
mod importance;
mod key_norms;
mod pack;
mod places;
mod redundancy;
mod rotate;
mod select;

pub use crate::packed::{Format, Rotation};
pub use crate::plan::Traffic;
pub use cache::{
    CacheLayout, CacheSpec, ChunkCache, ChunkId, ChunkState, Compaction, Packed, PageCopy, Placed, Policy,
    PolicyScores, Region, Run, Segment,
};
pub use compact::{Compact, CompactArgs, CompactBuilder, CompactSchedule, EXTRAS, RopePairs, Turn, flags};
pub use drift::{Drift, DriftArgs, DriftBuilder, Force};
pub use event::{Event, EventArgs, EventBuilder};
pub use importance::{
    Aggregation, Importance, ImportanceArgs, ImportanceBuilder, ImportanceSchedule, ImportanceVariant, Pool, Reduction,
};
pub use key_norms::{KeyNorms, KeyNormsArgs, KeyNormsBuilder};
pub use pack::{Pack, PackArgs, PackBuilder, UnpackArgs};
pub use places::KeyPages;
pub use redundancy::{Form, Redundancy, RedundancyArgs, RedundancyBuilder, Retain, Similar};
pub use rotate::{Rotate, RotateArgs, RotateBuilder};
pub use select::{PositionWeight, Scope, Select, SelectArgs, SelectBuilder, Tie, status};
