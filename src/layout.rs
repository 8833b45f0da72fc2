//! Shapes and strides.

use crate::error::{Error, Result};

/// Shape and strides of a tensor of `N` dimensions, outermost first, in elements.
///
/// Strides may be anything from 0 on; a dimension of stride 0 repeats what is inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout<const N: usize> {
    shape: [u64; N],
    strides: [i64; N],
}

impl<const N: usize> Layout<N> {
    /// Row-major without gaps. A product beyond `i64` is left for [`Layout::required_len`] to refuse.
    pub fn contiguous(shape: [u64; N]) -> Self {
        let mut strides = [0; N];
        let mut stride = 1i64;
        for dim in (0..N).rev() {
            strides[dim] = stride;
            stride = stride.saturating_mul(i64::try_from(shape[dim].max(1)).unwrap_or(i64::MAX));
        }
        Layout { shape, strides }
    }

    /// Of no elements.
    pub(crate) const fn empty() -> Self {
        Layout { shape: [0; N], strides: [0; N] }
    }

    /// Any strides.
    pub fn strided(shape: [u64; N], strides: [i64; N]) -> Self {
        Layout { shape, strides }
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> [u64; N] {
        self.shape
    }

    /// Strides, outermost first.
    pub fn strides(&self) -> [i64; N] {
        self.strides
    }

    /// Position of an index tuple in the buffer.
    #[inline]
    pub fn offset(&self, index: [u64; N]) -> u64 {
        index.iter().zip(&self.strides).map(|(&i, &stride)| i * stride as u64).sum()
    }

    /// Elements that a buffer must hold for every index to lie inside it.
    ///
    /// # Errors
    /// [`Error::Stride`] for a negative stride, [`Error::Size`] if the extent does not fit in an `i64`.
    pub fn required_len(&self, arg: &'static str) -> Result<u64> {
        for (dim, &stride) in self.strides.iter().enumerate() {
            if stride < 0 {
                return Err(Error::Stride { arg, dim, got: stride, need: "must not be negative" });
            }
        }
        if self.shape.contains(&0) {
            return Ok(0);
        }
        let last = self
            .shape
            .iter()
            .zip(&self.strides)
            .try_fold(0u64, |sum, (&n, &stride)| sum.checked_add((n - 1).checked_mul(stride as u64)?))
            .filter(|&last| last < i64::MAX as u64);
        match last {
            Some(last) => Ok(last + 1),
            None => Err(Error::Size { arg, got: u64::MAX, min: 0, max: i64::MAX as u64 }),
        }
    }

    /// For outputs: no two indices name one element. Asks that the dimensions nest (each stride is at least the extent
    /// of the dimensions with smaller ones), as those of any view of a dense tensor do.
    ///
    /// # Errors
    /// [`Error::Stride`] naming the dimension that overlaps.
    pub fn require_disjoint(&self, arg: &'static str) -> Result<()> {
        if self.shape.contains(&0) {
            return Ok(());
        }
        let mut order: [usize; N] = core::array::from_fn(|dim| dim);
        order.sort_unstable_by_key(|&dim| self.strides[dim]);
        let mut extent = 1u64;
        for dim in order {
            let (n, stride) = (self.shape[dim], self.strides[dim]);
            if n > 1 {
                if (stride as u64) < extent {
                    return Err(Error::Stride {
                        arg,
                        dim,
                        got: stride,
                        need: "elements of an output must not overlap",
                    });
                }
                extent = extent.saturating_add((n - 1).saturating_mul(stride as u64));
            }
        }
        Ok(())
    }
}

/// How a kernel reaches memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Access {
    /// Wide where layouts and addresses allow it, else narrow.
    #[default]
    Auto,
    /// One element at a time.
    Narrow,
    /// 16 bytes at a time; refused where layouts or addresses do not allow it.
    Wide,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn offsets(layout: &Layout<3>) -> Vec<u64> {
        let [a, b, c] = layout.shape();
        let index = move |i: u64| [i / (b * c), i / c % b, i % c];
        (0..a * b * c).map(|i| layout.offset(index(i))).collect()
    }

    proptest! {
        #[test]
        fn required_len_is_the_greatest_offset(
            shape in [0u64..5, 0u64..5, 0u64..5], strides in [0i64..30, 0i64..30, 0i64..30],
        ) {
            let layout = Layout::strided(shape, strides);
            let most = offsets(&layout).into_iter().max().map_or(0, |last| last + 1);
            prop_assert_eq!(layout.required_len("x").unwrap(), most);
        }

        #[test]
        fn disjoint_layouts_never_repeat_an_offset(
            shape in [1u64..5, 1u64..5, 1u64..5], strides in [0i64..30, 0i64..30, 0i64..30],
        ) {
            let layout = Layout::strided(shape, strides);
            if layout.require_disjoint("x").is_ok() {
                let all = offsets(&layout);
                prop_assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
            }
        }

        #[test]
        fn dense_views_are_disjoint(shape in [0u64..5, 0u64..5, 0u64..5], order in Just([0usize, 1, 2]).prop_shuffle()) {
            let permuted = order.map(|dim| shape[dim]);
            let dense = Layout::contiguous(permuted).strides();
            let mut strides = [0; 3];
            for (i, dim) in order.into_iter().enumerate() {
                strides[dim] = dense[i];
            }
            prop_assert!(Layout::strided(shape, strides).require_disjoint("x").is_ok());
        }
    }

    #[test]
    fn refusals_name_the_argument_and_dimension() {
        let negative = Layout::strided([2, 3], [3, -1]).required_len("x");
        assert!(matches!(negative, Err(Error::Stride { arg: "x", dim: 1, got: -1, .. })));
        let repeated = Layout::strided([2, 3], [2, 1]).require_disjoint("out");
        assert!(matches!(repeated, Err(Error::Stride { arg: "out", dim: 0, got: 2, .. })));
        let huge = Layout::contiguous([u64::MAX, u64::MAX]).required_len("x");
        assert!(matches!(huge, Err(Error::Size { arg: "x", .. })));
        let empty = Layout::contiguous([u64::MAX, 0]).required_len("x");
        assert_eq!(empty, Ok(0));
    }
}
