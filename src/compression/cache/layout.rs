//! What lies where in the cache's one allocation.

use crate::dtype::DType;
use crate::error::{Error, Result};

/// Regions begin at multiples of this.
const ALIGN: u64 = 256;
const MOST: u64 = i32::MAX as u64;

/// What a cache holds, and within how many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheSpec {
    /// Sequences, or branches of guidance, or candidates.
    pub branches: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of keys and values.
    pub heads: usize,
    /// Elements of a key.
    pub k_dim: usize,
    /// Elements of a value.
    pub v_dim: usize,
    /// Type of keys and values.
    pub dtype: DType,
    /// Rows of a page: of a chunk where chunks are all of one size, or a part of it.
    pub page_rows: usize,
    /// Pages that stay free for compressing what is shared: as many as a compressed chunk has, or none.
    pub spare_pages: usize,
    /// Values of 4 bytes for each row and head besides its position: norms, scales.
    pub extras: usize,
    /// The most rows of one layer of one branch: what page tables have room for.
    pub most_rows: usize,
    /// The most bytes of all: pages, positions, extras, tables and lengths, spare pages among them.
    pub bytes: u64,
}

/// A part of the allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Region {
    /// Bytes from the start of the allocation.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Where everything lies.
///
/// | region | shape |
/// |---|---|
/// | `k` | `[pages, page_rows, heads, k_dim]` |
/// | `v` | `[pages, page_rows, heads, v_dim]` |
/// | `positions` | `[pages, page_rows, heads]` i32 |
/// | `extras` | `[extras, pages, page_rows, heads]` f32 |
/// | `tables` | `[branches, layers, ceil(most_rows / page_rows)]` i32: pages |
/// | `lengths` | `[branches, layers, heads]` i32: rows of the compressed chunk |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheLayout {
    /// Pages of the pool.
    pub pages: usize,
    /// Keys.
    pub k: Region,
    /// Values.
    pub v: Region,
    /// Positions of rows.
    pub positions: Region,
    /// Other values of rows.
    pub extras: Region,
    /// Page tables.
    pub tables: Region,
    /// Lengths of compressed chunks.
    pub lengths: Region,
    /// Bytes of all.
    pub bytes: u64,
}

impl CacheSpec {
    /// Pages of one layer of one branch at most.
    pub fn table_pages(&self) -> usize {
        self.most_rows.div_ceil(self.page_rows.max(1))
    }

    /// Bytes of a page with what belongs to its rows.
    pub fn page_bytes(&self) -> u64 {
        let row = (self.k_dim + self.v_dim) as u64 * self.dtype.size() as u64 + 4 + 4 * self.extras as u64;
        self.page_rows as u64 * self.heads as u64 * row
    }

    fn with_pages(&self, pages: u64) -> CacheLayout {
        let rows = pages * self.page_rows as u64 * self.heads as u64;
        let lists = (self.branches * self.layers) as u64;
        let mut end = 0;
        let mut region = |bytes: u64| {
            let region = Region { offset: end, bytes };
            end = (end + bytes).next_multiple_of(ALIGN);
            region
        };
        let element = self.dtype.size() as u64;
        let k = region(rows * self.k_dim as u64 * element);
        let v = region(rows * self.v_dim as u64 * element);
        let positions = region(rows * 4);
        let extras = region(rows * 4 * self.extras as u64);
        let tables = region(lists * self.table_pages() as u64 * 4);
        let lengths = region(lists * self.heads as u64 * 4);
        let bytes = lengths.offset + lengths.bytes;
        CacheLayout { pages: pages as usize, k, v, positions, extras, tables, lengths, bytes }
    }

    /// As many pages as the budget holds.
    ///
    /// # Errors
    /// [`Error::Size`] for a size of 0 or beyond 2^31 - 1 rows, or a budget that does not hold a page besides the spare ones.
    pub fn layout(&self) -> Result<CacheLayout> {
        let size = |arg, got: u64, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        for (arg, got) in [
            ("branches", self.branches),
            ("layers", self.layers),
            ("heads", self.heads),
            ("page_rows", self.page_rows),
            ("most_rows", self.most_rows),
        ] {
            size(arg, got as u64, 1, MOST)?;
        }
        size("branches * layers * heads", (self.branches as u64) * self.layers as u64 * self.heads as u64, 1, MOST)?;
        size("k_dim", self.k_dim as u64, 1, 1024)?;
        size("v_dim", self.v_dim as u64, 1, 1024)?;
        size("extras", self.extras as u64, 0, super::super::EXTRAS as u64)?;
        size("bytes", self.bytes, 0, i64::MAX as u64)?;
        let least = self.with_pages(self.spare_pages as u64 + 1);
        size("bytes", self.bytes, least.bytes, i64::MAX as u64)?;
        // Places are counted in 31 bits, as tables of places are.
        let most = (MOST / self.page_rows as u64).min(self.bytes / self.page_bytes());
        let mut layout = self.with_pages(most);
        while layout.bytes > self.bytes {
            let beyond = (layout.bytes - self.bytes).div_ceil(self.page_bytes()).max(1);
            layout = self.with_pages(layout.pages as u64 - beyond.min(layout.pages as u64 - 1));
        }
        Ok(layout)
    }
}
