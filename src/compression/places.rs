//! Where the keys of a cache lie that is read in place.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::view::In;

/// The page tables of keys that lie in the pages of a pool: for [`Importance`](super::Importance),
/// [`KeyNorms`](super::KeyNorms) and [`Redundancy`](super::Redundancy) over a [`ChunkCache`](super::ChunkCache).
///
/// Row `r` of a set lies at place `pages[set, r / page_rows] * page_rows + r % page_rows` of the pool. Where a
/// compression has been, a head has `kept[set, head]` of the first rows, and its other keys follow at row `first_rows`,
/// whatever lies between: an op sees its keys as one list without gaps, `kept + tokens - first_rows` long.
#[derive(Debug)]
pub struct KeyPages<'a> {
    /// `[sets, ceil(tokens / page_rows)]`; those that there are not are clamped.
    pub pages: In<'a, i32>,
    /// `[sets, heads]`, of plans with first rows: clamped into `0..=first_rows`.
    pub kept: Option<In<'a, i32>>,
}

/// What a plan knows of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(super) struct Places {
    /// 0: keys follow each other.
    pub(super) page_rows: u64,
    pub(super) pages: u64,
    pub(super) first_rows: u64,
}

impl Places {
    pub(super) fn paged(page_rows: usize, pages: usize) -> Self {
        // A page of no rows is refused by `check`, not taken for none.
        Places { page_rows: (page_rows as u64).max(1), pages: pages as u64, first_rows: 0 }
    }

    pub(super) fn is_paged(&self) -> bool {
        self.page_rows > 0
    }

    pub(super) fn check(&self, tokens: u64) -> Result<()> {
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        if self.is_paged() {
            size("pages", self.pages, 1, i32::MAX as u64)?;
            size("pages * page_rows", self.pages.saturating_mul(self.page_rows), 1, i32::MAX as u64)?;
        }
        size("first_rows", self.first_rows, 0, tokens)?;
        if self.first_rows > 0 && (!self.is_paged() || !self.first_rows.is_multiple_of(self.page_rows)) {
            return Err(Error::Unsupported { arg: "first_rows", what: "whole pages" });
        }
        Ok(())
    }

    /// Rows of the keys' tensor.
    pub(super) fn rows(&self, tokens: u64) -> u64 {
        if self.is_paged() { self.pages * self.page_rows } else { tokens }
    }

    fn pages_of(&self, tokens: u64) -> u64 {
        if self.is_paged() { tokens.div_ceil(self.page_rows) } else { 0 }
    }

    /// Rows of chunks of so many, none of which reaches beyond a page.
    pub(super) fn chunk_rows(&self, tokens: u64, chunk: u64) -> u64 {
        match self.page_rows {
            0 => tokens,
            rows => tokens / rows * rows.next_multiple_of(chunk) + (tokens % rows).next_multiple_of(chunk),
        }
    }

    /// Adds the operands, which are to be there if the plan has pages, and nothing besides.
    pub(super) fn operands<'s>(
        &self,
        operands: Operands<'s>,
        [sets, heads, tokens]: [u64; 3],
        given: &Option<KeyPages<'_>>,
        has_lengths: bool,
    ) -> Result<Operands<'s>> {
        let rule = |arg, fits, what| if fits { Ok(()) } else { Err(Error::Unsupported { arg, what }) };
        rule("pages", given.is_some() == self.is_paged(), "given if and only if the plan has them")?;
        let Some(given) = given else { return Ok(operands) };
        rule("kept", given.kept.is_some() == (self.first_rows > 0), "given if and only if the plan has first rows")?;
        rule("lengths", !has_lengths || given.kept.is_none(), "none where `kept` says them")?;
        operands.input("pages", &given.pages, sets * self.pages_of(tokens))?.input_if("kept", &given.kept, sets * heads)
    }

    #[cfg(nxs_kernels)]
    pub(super) fn params(
        &self,
        given: &Option<KeyPages<'_>>,
        [_, heads, tokens]: [u64; 3],
    ) -> crate::ffi::nxs_key_places {
        let Some(given) = given else { return Default::default() };
        crate::ffi::nxs_key_places {
            pages_or_null: given.pages.span().address as *const _,
            kept_or_null: crate::launch::address(&given.kept),
            pages_stride_set: self.pages_of(tokens) as i64,
            kept_stride_set: heads as i64,
            kept_stride_head: 1,
            page_rows: self.page_rows as i32,
            pool_pages: self.pages as i32,
            first_rows: self.first_rows as i32,
        }
    }
}

/// The same on the host.
pub(super) struct HostPlaces<'a> {
    places: Places,
    pages: Option<&'a [i32]>,
    kept: Option<&'a [i32]>,
    pages_of: u64,
    heads: u64,
    tokens: u64,
}

impl<'a> HostPlaces<'a> {
    pub(super) fn new(places: Places, given: &'a Option<KeyPages<'_>>, [_, heads, tokens]: [u64; 3]) -> Self {
        const HERE: &str = "operands are on the stream's device";
        debug_assert!(given.as_ref().is_none_or(|given| given.pages.device() == Device::Host));
        HostPlaces {
            places,
            pages: given.as_ref().map(|given| given.pages.as_host().expect(HERE)),
            kept: given.as_ref().and_then(|given| given.kept.as_ref()).map(|kept| kept.as_host().expect(HERE)),
            pages_of: places.pages_of(tokens),
            heads,
            tokens,
        }
    }

    /// Keys of the first rows.
    fn first(&self, set: u64, head: u64) -> u64 {
        let first_rows = self.places.first_rows;
        self.kept.map_or(first_rows, |kept| {
            i64::from(kept[(set * self.heads + head) as usize]).clamp(0, first_rows as i64) as u64
        })
    }

    /// Keys of a head, if `length` says nothing else.
    pub(super) fn length(&self, set: u64, head: u64, length: Option<i32>) -> u64 {
        match length {
            Some(length) => i64::from(length).clamp(0, self.tokens as i64) as u64,
            None => self.tokens - self.places.first_rows + self.first(set, head),
        }
    }

    /// Where key `key` lies: a row of k.
    pub(super) fn place(&self, set: u64, head: u64, key: u64) -> u64 {
        let first = self.first(set, head);
        let row = if key < first { key } else { key + self.places.first_rows - first };
        let Some(pages) = self.pages else { return row };
        let page_rows = self.places.page_rows;
        let page = pages[(set * self.pages_of + row / page_rows) as usize];
        i64::from(page).clamp(0, self.places.pages as i64 - 1) as u64 * page_rows + row % page_rows
    }
}
