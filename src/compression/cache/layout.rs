//! What lies where in the cache's one allocation.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::packed::Format;

/// Regions begin at multiples of this.
const ALIGN: u64 = 256;
const MOST: u64 = i32::MAX as u64;

/// Keys and values in few bits: rows of codes ([`Pack`](super::super::Pack)), with numbers of f32.
///
/// Rows are chosen and moved one by one, so that they have numbers of their own: formats by channels are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Packed {
    /// Of keys.
    pub k: Format,
    /// Of values.
    pub v: Format,
    /// The numbers of a row lie in its slot, not in regions of their own.
    pub inline: bool,
}

impl Packed {
    /// Bytes of a slot.
    fn slot(&self, format: Format, dim: usize) -> usize {
        if self.inline { format.inline_bytes(dim) } else { format.code_bytes(dim) }
    }

    /// Numbers beside a slot.
    fn numbers(&self, format: Format, dim: usize) -> usize {
        if self.inline { 0 } else { format.groups(dim) * format.numbers() }
    }

    fn check(&self, format: Format, dim: usize) -> Result<()> {
        format.check(dim)?;
        match format {
            Format::Channel { .. } => Err(Error::Unsupported { arg: "packed", what: "formats whose rows stand alone" }),
            _ if self.inline && format.groups(dim) != 1 => {
                Err(Error::Unsupported { arg: "inline", what: "of formats with one group a row" })
            }
            _ => Ok(()),
        }
    }
}

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
    /// Type of keys and values; of packed ones that of what is packed.
    pub dtype: DType,
    /// Keys and values are packed.
    pub packed: Option<Packed>,
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
/// | `k` | `[pages, page_rows, heads, k_dim]`, or slots of bytes |
/// | `v` | `[pages, page_rows, heads, v_dim]`, or slots of bytes |
/// | `k_numbers`, `v_numbers` | `[pages, page_rows, heads, groups * numbers]` f32, of packed ones that are not inline |
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
    /// Numbers of packed keys.
    pub k_numbers: Region,
    /// Numbers of packed values.
    pub v_numbers: Region,
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

    /// Bytes of a key and of a value, without numbers beside them.
    pub fn row_bytes(&self) -> [usize; 2] {
        match &self.packed {
            Some(packed) => [packed.slot(packed.k, self.k_dim), packed.slot(packed.v, self.v_dim)],
            None => [self.k_dim * self.dtype.size(), self.v_dim * self.dtype.size()],
        }
    }

    /// Numbers beside a key and a value.
    pub fn numbers(&self) -> [usize; 2] {
        self.packed
            .map_or([0; 2], |packed| [packed.numbers(packed.k, self.k_dim), packed.numbers(packed.v, self.v_dim)])
    }

    /// Bytes of a page with what belongs to its rows.
    pub fn page_bytes(&self) -> u64 {
        let numbers = self.numbers();
        let row = self.row_bytes().iter().sum::<usize>() + 4 * (numbers[0] + numbers[1] + 1 + self.extras);
        let row = row as u64;
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
        let ([k, v], [k_numbers, v_numbers]) = (self.row_bytes(), self.numbers());
        let [k, v, k_numbers, v_numbers] = [k, v, 4 * k_numbers, 4 * v_numbers].map(|row| region(rows * row as u64));
        let positions = region(rows * 4);
        let extras = region(rows * 4 * self.extras as u64);
        let tables = region(lists * self.table_pages() as u64 * 4);
        let lengths = region(lists * self.heads as u64 * 4);
        let bytes = lengths.offset + lengths.bytes;
        CacheLayout { pages: pages as usize, k, v, k_numbers, v_numbers, positions, extras, tables, lengths, bytes }
    }

    /// As many pages as the budget holds.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for formats that the cache does not hold ([`Packed`]), or those of [`Format::check`];
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
        if let Some(packed) = &self.packed {
            packed.check(packed.k, self.k_dim)?;
            packed.check(packed.v, self.v_dim)?;
        }
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
