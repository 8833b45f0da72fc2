//! The field's policies, as what the stages are set to.

use crate::compression::{PositionWeight, Scope, Select, SelectBuilder, Tie};

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
    /// arXiv 2505.19602: raw logits of a 4 x 4 grid of queries, max-pool 5; the `window` stays.
    ScaleKv {
        /// Tokens to keep of each head: the layer's budget for the scale.
        budget: usize,
        /// Last tokens that stay.
        window: usize,
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
            Policy::SnapKv { window, .. } | Policy::ScaleKv { window, .. } => builder.recent(window),
            Policy::H2o { recent, .. } => builder.recent(recent),
            Policy::KeyDiff { .. } => builder,
            Policy::StreamingLlm { sink, .. } => builder.sink(sink).tie(Tie::Newest),
            Policy::AdaKv { window, floor, .. } => builder.recent(window).scope(Scope::Ada { floor }),
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
