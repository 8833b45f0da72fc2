//! `--kv-budget`: where a cache is compressed between scales.
//!
//! VAR's cache ([`crate::transformer::Cache`]) is appended to by every scale and read by all later ones. A budget
//! below 1 keeps, in each layer and head, only that part of the rows of the scales so far: between two scales the
//! rows are scored, the best are selected and moved to the front, and the next scale's attention is told how many
//! there are, by `Segment::with_length` in its table and a `lengths` operand. That needs the compression family,
//! which this program does not use yet.

use crate::failure::{Failure, Result};

/// Refuses what is not there.
pub(crate) fn check(budget: f32) -> Result<()> {
    if !(budget > 0.0 && budget <= 1.0) {
        return Err(Failure::request(format!("--kv-budget {budget}: above 0 and at most 1")));
    }
    if budget < 1.0 {
        return Err(Failure::request("--kv-budget below 1: this build does not compress caches"));
    }
    Ok(())
}
