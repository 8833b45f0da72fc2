//! The field's policies, as what the stages are set to.

use crate::compression::{
    Aggregation, Form, Importance, ImportanceBuilder, Pool, PositionWeight, Reduction, Scope, Select, SelectBuilder,
    Similar, Tie,
};
use crate::dtype::Float;

/// ScaleKV's queries along either axis.
const GRID: usize = 4;

/// What to keep, by the names of the field. A policy of one's own is a [`SelectBuilder`] with scores of one's own.
///
/// A policy says which scores [`Select`] wants ([`Policy::scores`]), of the queries and pooling that its publication has, and
/// how it is set ([`Policy::select`]). Budgets count the protected tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Policy {
    /// arXiv 2602.10825: importance (greatest logit of a group, softmax, mean over the queries, max-pool 7) and anchor
    /// redundancy, relative, weighted by place. The published lambda is 0.07.
    FlowCache {
        /// Tokens to keep of each head.
        budget: usize,
        /// Part of importance.
        lambda: f32,
        /// Weights by place.
        weight: PositionWeight,
    },
    /// arXiv 2505.24133: importance of the last `window` queries (as FlowCache's) and last-similar redundancy; the window stays.
    /// The published lambda is 0.1, that of the code 0.07; the window 8.
    RKv {
        /// Tokens to keep of each head.
        budget: usize,
        /// Last tokens that stay.
        window: usize,
        /// Part of importance.
        lambda: f32,
    },
    /// arXiv 2404.14469: mean probabilities of the last `window` queries, average-pool 5; the window stays.
    SnapKv {
        /// Tokens to keep of each head.
        budget: usize,
        /// Last tokens that stay.
        window: usize,
    },
    /// arXiv 2306.14048: accumulated probabilities; `heavy` tokens and the last `recent`.
    H2o {
        /// Tokens that stay for their score.
        heavy: usize,
        /// Last tokens that stay.
        recent: usize,
    },
    /// arXiv 2504.15364: the keys least like the mean key stay: anchor redundancy alone.
    KeyDiff {
        /// Tokens to keep of each head.
        budget: usize,
    },
    /// arXiv 2309.17453: the first `sink` and the last `recent` tokens; no scores.
    StreamingLlm {
        /// First tokens that stay.
        sink: usize,
        /// Last tokens that stay.
        recent: usize,
    },
    /// arXiv 2407.11550: SnapKV's scores (max-pool 7); heads compete for the budget of a layer.
    AdaKv {
        /// Tokens to keep of a head on average.
        budget: usize,
        /// Last tokens that stay.
        window: usize,
        /// Part of the budget that every head gets.
        floor: f32,
    },
    /// arXiv 2505.19602: raw logits of the queries at the centres of a 4 x 4 grid over the last scale, max-pool 5; the
    /// tokens of these queries stay: their scores are +inf
    /// ([`ImportanceBuilder::protect_masked`](super::super::ImportanceBuilder::protect_masked)).
    ScaleKv {
        /// Tokens to keep of each head: the layer's budget for the scale.
        budget: usize,
        /// Rows and columns of the last scale, 4 or more.
        scale: [usize; 2],
    },
}

/// Which scores a policy chooses by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PolicyScores {
    /// [`SelectArgs::importance`](super::super::SelectArgs::importance)
    pub importance: bool,
    /// [`SelectArgs::redundancy`](super::super::SelectArgs::redundancy)
    pub redundancy: bool,
}

/// SnapKV's and H2O's scores: of queries that are those of the last keys.
fn probabilities<T: Float>(builder: ImportanceBuilder<T>) -> ImportanceBuilder<T> {
    builder.aggregation(Aggregation::MeanProb).reduction(Reduction::Sum).causal()
}

impl Policy {
    /// Which scores it chooses by.
    pub fn scores(&self) -> PolicyScores {
        let (importance, redundancy) = match self {
            Policy::FlowCache { .. } | Policy::RKv { .. } => (true, true),
            Policy::SnapKv { .. } | Policy::H2o { .. } | Policy::AdaKv { .. } | Policy::ScaleKv { .. } => (true, false),
            Policy::KeyDiff { .. } => (false, true),
            Policy::StreamingLlm { .. } => (false, false),
        };
        PolicyScores { importance, redundancy }
    }

    /// Tokens that a head keeps, or with Ada-KV keeps on average.
    pub fn budget(&self) -> usize {
        match *self {
            Policy::FlowCache { budget, .. }
            | Policy::RKv { budget, .. }
            | Policy::SnapKv { budget, .. }
            | Policy::KeyDiff { budget }
            | Policy::AdaKv { budget, .. }
            | Policy::ScaleKv { budget, .. } => budget,
            Policy::H2o { heavy, recent } => heavy + recent,
            Policy::StreamingLlm { sink, recent } => sink + recent,
        }
    }

    /// The selection that it is.
    pub fn select(&self, sets: usize, heads: usize, tokens: usize) -> SelectBuilder {
        let builder = Select::builder(sets, heads, tokens).budget(self.budget());
        match *self {
            Policy::FlowCache { lambda, weight, .. } => builder.lambda(lambda).relative(weight != PositionWeight::None),
            Policy::RKv { window, lambda, .. } => builder.lambda(lambda).recent(window),
            Policy::SnapKv { window, .. } => builder.recent(window),
            Policy::H2o { recent, .. } => builder.recent(recent),
            Policy::KeyDiff { .. } | Policy::ScaleKv { .. } => builder,
            Policy::StreamingLlm { sink, .. } => builder.sink(sink).tie(Tie::Newest),
            Policy::AdaKv { window, floor, .. } => builder.recent(window).scope(Scope::Ada { floor }),
        }
    }

    /// Rows that a head has place for after the event: its budget, or with Ada-KV all that it can win. What
    /// [`ChunkCache::compress`](super::ChunkCache::compress) is told.
    pub fn rows(&self, heads: usize) -> usize {
        match self {
            Policy::AdaKv { budget, .. } => budget * heads,
            _ => self.budget(),
        }
    }

    /// The queries that it wants, where it says so: the last `window`, or 16 of a grid.
    pub fn queries(&self) -> Option<usize> {
        match *self {
            Policy::RKv { window, .. } | Policy::SnapKv { window, .. } | Policy::AdaKv { window, .. } => Some(window),
            Policy::ScaleKv { .. } => Some(GRID * GRID),
            _ => None,
        }
    }

    /// Rows of the last scale that are its queries; else none.
    pub fn grid(&self) -> Vec<i32> {
        let Policy::ScaleKv { scale: [height, width], .. } = *self else { return Vec::new() };
        let centres = |size: usize| (0..GRID).map(move |i| i * (size / GRID) + (size / GRID).saturating_sub(1) / 2);
        centres(height).flat_map(|y| centres(width).map(move |x| (y * width + x) as i32)).collect()
    }

    /// The scores that it wants of the queries, without their numbers; `None`: no importance.
    pub fn importance<T: Float>(&self, heads: usize, groups: usize, dim: usize) -> Option<ImportanceBuilder<T>> {
        let builder = Importance::builder(heads, groups, dim);
        Some(match *self {
            Policy::FlowCache { .. } => builder.pool(Pool::Max(7)),
            Policy::RKv { window, .. } => builder.excluded(window).pool(Pool::Max(7)),
            Policy::SnapKv { window, .. } => probabilities(builder).unscored(window).pool(Pool::Average(5)),
            Policy::AdaKv { window, .. } => probabilities(builder).unscored(window).pool(Pool::Max(7)),
            Policy::H2o { .. } => probabilities(builder),
            Policy::ScaleKv { scale: [height, width], .. } => builder
                .aggregation(Aggregation::Logit)
                .reduction(Reduction::Sum)
                .listed_queries(height * width)
                .masked(GRID * GRID)
                .protect_masked()
                .pool(Pool::Max(5)),
            Policy::KeyDiff { .. } | Policy::StreamingLlm { .. } => return None,
        })
    }

    /// The form of the redundancy that it wants; `None`: none.
    pub fn redundancy(&self) -> Option<Form> {
        match self {
            Policy::FlowCache { .. } => Some(Form::Softmax),
            Policy::RKv { .. } => Some(Form::Similar(Similar::default())),
            Policy::KeyDiff { .. } => Some(Form::Cosine),
            _ => None,
        }
    }

    /// What [`SelectArgs::weights`](super::super::SelectArgs::weights) is to hold; `None`: nothing.
    pub fn weights(&self, tokens: usize) -> Option<Vec<f32>> {
        match *self {
            Policy::FlowCache { weight, .. } if weight != PositionWeight::None => Some(weight.table(tokens)),
            _ => None,
        }
    }
}
