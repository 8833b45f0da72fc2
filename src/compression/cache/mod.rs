//! A cache of chunks within a fixed number of bytes: who has which page.

mod layout;
mod policy;
mod pool;

pub use layout::{CacheLayout, CacheSpec, Packed, Region};
pub use policy::{Policy, PolicyScores};

use super::{Compact, CompactBuilder, EventBuilder, Pack, PackBuilder};
use crate::dtype::{DType, Element, Float};
use crate::error::{Error, Result};
use pool::Pool;

/// Which chunk of a branch; the caller's number.
pub type ChunkId = u64;

/// The bookkeeping of a KV cache of chunks that never outgrows its bytes. Plain data: it holds no device memory, enqueues
/// nothing, and says where rows lie in the one allocation that its caller made of [`ChunkCache::bytes_needed`] bytes.
///
/// A layer of a branch is a list of chunks, each of whole pages of the pool. A chunk is **active** while it is written (appended to,
/// overwritten by each denoising step), **sealed** when it will change no more, and at the start of the list **compressed**: what
/// was kept of sealed chunks, up to `rows` for each head, with the heads' own numbers in the region `lengths`. A row's place in
/// the pool and its position in the sequence are different things; positions lie in the region `positions`, by place.
///
/// Branches share pages after [`ChunkCache::fork`]. What is written is unshared first: each operation says which pages must be
/// copied before ([`PageCopy`]). Every operation either succeeds as a whole or leaves everything as it was.
///
/// Page tables are kept on the host; [`ChunkCache::tables`] gives the words for the region `tables`, which the caller copies
/// before what reads them.
///
/// ```
/// use nextscale::DType;
/// use nextscale::compression::{CacheSpec, ChunkCache};
/// let spec = CacheSpec {
///     branches: 2, layers: 1, heads: 8, k_dim: 128, v_dim: 128, dtype: DType::BF16, packed: None,
///     page_rows: 64, spare_pages: 1, extras: 0, most_rows: 1024, bytes: 1 << 20,
/// };
/// let mut cache = ChunkCache::new(spec)?;
/// assert!(cache.bytes_needed() <= 1 << 20);
/// let placed = cache.append(0, 0, 7, 100, 0)?;
/// assert_eq!(placed.runs.iter().map(|run| run.rows).sum::<usize>(), 100);
/// cache.seal(0, 0, 7)?;
/// let move_rows = cache.compress(0, 0, 40)?.unwrap();
/// assert_eq!((move_rows.tokens, move_rows.kept, move_rows.in_place), (100, 40, true));
/// assert_eq!(cache.pages_used(), 1);
/// # Ok::<(), nextscale::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ChunkCache {
    spec: CacheSpec,
    layout: CacheLayout,
    pool: Pool,
    /// `[branches][layers]`
    lists: Vec<Vec<Chunk>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Chunk {
    id: ChunkId,
    state: ChunkState,
    rows: usize,
    first_position: u32,
    pages: Vec<u32>,
}

/// What may happen to a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChunkState {
    /// It is written yet, and is not compressed.
    Active,
    /// It changes no more.
    Sealed,
    /// It is what was kept of chunks: heads have different rows.
    Compressed,
}

/// Rows that lie one behind the other in the pool, from `place` on: at row `place` of `[pages * page_rows, heads, dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// The first row's place.
    pub place: u64,
    /// Rows.
    pub rows: usize,
}

/// The first `rows` rows of a page, with what belongs to them, are to be copied to another page before anything is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageCopy {
    /// The page.
    pub from: u32,
    /// Its copy.
    pub to: u32,
    /// Rows of it that are in use.
    pub rows: usize,
}

/// Where rows are to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// In the order of the rows.
    pub runs: Vec<Run>,
    /// To be done first.
    pub copies: Vec<PageCopy>,
}

/// What a compression moves: the operands of [`Compact`](super::Compact).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compaction {
    /// Rows of the sealed chunks, of which to choose: row `r` of them in page `input_pages[r / page_rows]`. Those of a
    /// chunk that was compressed before are all of its pages' rows, whatever it has kept.
    pub tokens: usize,
    /// Rows that each head may keep.
    pub kept: usize,
    /// Rows move within their pages; else to `out_pages`.
    pub in_place: bool,
    /// Pages of the rows.
    pub input_pages: Vec<u32>,
    /// Pages of what is kept; in place the first of `input_pages`.
    pub out_pages: Vec<u32>,
    /// Rows at the start that a compression left, whole pages: a head has so many of them as the region `lengths` says,
    /// and the stages pass over the others ([`KeyPages`](super::KeyPages),
    /// [`SelectBuilder::first_rows`](super::SelectBuilder::first_rows)). 0: no compression has been.
    pub first_rows: usize,
    /// The most of them that a head has.
    pub first_kept: usize,
}

/// A chunk as attention sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    /// The chunk.
    pub chunk: ChunkId,
    /// What it is.
    pub state: ChunkState,
    /// Its rows; of a compressed chunk the most that a head has, and the region `lengths` says how many each has.
    pub rows: usize,
    /// The position of its first row; of a compressed chunk the region `positions` has every row's.
    pub first_position: u32,
    /// Its pages.
    pub pages: &'a [u32],
}

impl Segment<'_> {
    /// Where its rows lie, as attention over views of the pool reads them: rows that follow each other are one run.
    pub fn runs(&self, page_rows: usize) -> Vec<Run> {
        runs(self.pages, page_rows, 0, self.rows)
    }
}

fn runs(pages: &[u32], page_rows: usize, first: usize, rows: usize) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    let (mut at, end) = (first, first + rows);
    while at < end {
        let within = at % page_rows;
        let count = (page_rows - within).min(end - at);
        let place = u64::from(pages[at / page_rows]) * page_rows as u64 + within as u64;
        match runs.last_mut() {
            Some(last) if last.place + last.rows as u64 == place => last.rows += count,
            _ => runs.push(Run { place, rows: count }),
        }
        at += count;
    }
    runs
}

impl ChunkCache {
    /// A cache within `spec.bytes` bytes.
    ///
    /// # Errors
    /// Those of [`CacheSpec::layout`].
    pub fn new(spec: CacheSpec) -> Result<Self> {
        let layout = spec.layout()?;
        Ok(ChunkCache {
            spec,
            layout,
            pool: Pool::new(layout.pages),
            lists: vec![Vec::new(); spec.branches * spec.layers],
        })
    }

    /// What it was made for.
    pub fn spec(&self) -> CacheSpec {
        self.spec
    }

    /// Where everything lies in the allocation.
    pub fn layout(&self) -> CacheLayout {
        self.layout
    }

    /// Bytes of the allocation: no more than the budget, and never more later.
    pub fn bytes_needed(&self) -> u64 {
        self.layout.bytes
    }

    /// Pages that hold rows, those that are shared once.
    pub fn pages_used(&self) -> usize {
        self.layout.pages - self.pool.free()
    }

    /// Pages that can still be appended to: but for the spare ones.
    pub fn pages_left(&self) -> usize {
        self.pool.free().saturating_sub(self.spec.spare_pages)
    }

    /// Bytes in use: of pages that hold rows, and of tables and lengths.
    pub fn bytes_used(&self) -> u64 {
        self.pages_used() as u64 * self.spec.page_bytes() + self.layout.tables.bytes + self.layout.lengths.bytes
    }

    fn list(&self, branch: usize, layer: usize) -> Result<usize> {
        let inside = |arg, got: usize, count: usize| match got < count {
            true => Ok(()),
            false => Err(Error::Size { arg, got: got as u64, min: 0, max: count as u64 - 1 }),
        };
        inside("branch", branch, self.spec.branches)?;
        inside("layer", layer, self.spec.layers)?;
        Ok(branch * self.spec.layers + layer)
    }

    fn find(&self, list: usize, chunk: ChunkId) -> Result<usize> {
        let found = self.lists[list].iter().position(|have| have.id == chunk && have.state != ChunkState::Compressed);
        found.ok_or(Error::Unsupported { arg: "chunk", what: "one of the layer that is not compressed" })
    }

    /// Rows of a layer; of a compressed chunk the most that a head has.
    ///
    /// # Errors
    /// [`Error::Size`] for a branch or layer that is not there.
    pub fn rows(&self, branch: usize, layer: usize) -> Result<usize> {
        Ok(self.lists[self.list(branch, layer)?].iter().map(|chunk| chunk.rows).sum())
    }

    fn table_pages_of(&self, list: usize) -> usize {
        self.lists[list].iter().map(|chunk| chunk.pages.len()).sum()
    }

    fn runs(&self, chunk: &Chunk, first: usize, rows: usize) -> Vec<Run> {
        runs(&chunk.pages, self.spec.page_rows, first, rows)
    }

    /// Room for `rows` rows at the end of a layer: of chunk `chunk`, if it is the last one and active, else of a new chunk whose
    /// first row has position `first_position`. A layer that skips a step is not appended to.
    ///
    /// # Errors
    /// [`Error::Size`] if pages or the layer's page table do not suffice; [`Error::Unsupported`] for a chunk that is there and not
    /// the last, or not active.
    pub fn append(
        &mut self,
        branch: usize,
        layer: usize,
        chunk: ChunkId,
        rows: usize,
        first_position: u32,
    ) -> Result<Placed> {
        let list = self.list(branch, layer)?;
        let page_rows = self.spec.page_rows;
        let last = self.lists[list].len().checked_sub(1);
        let same = |have: &Chunk| have.id == chunk && have.state != ChunkState::Compressed;
        let extends = match self.lists[list].iter().position(same) {
            None => None,
            Some(at) if Some(at) == last && self.lists[list][at].state == ChunkState::Active => Some(at),
            Some(_) => {
                return Err(Error::Unsupported {
                    arg: "chunk",
                    what: "the last one, while it is active, or a new one",
                });
            }
        };
        let (have_rows, have_pages) = extends.map_or((0, 0), |at| {
            let chunk = &self.lists[list][at];
            (chunk.rows, chunk.pages.len())
        });
        let need = (have_rows + rows).div_ceil(page_rows) - have_pages;
        // The page that is not full, if someone else has it too.
        let partial = extends
            .filter(|_| rows > 0 && have_rows % page_rows > 0)
            .map(|at| *self.lists[list][at].pages.last().expect("a partial page"))
            .filter(|&page| self.pool.shared(page));
        let taken = need + usize::from(partial.is_some());
        let left = self.pages_left();
        if taken > left {
            return Err(Error::Size { arg: "pages", got: taken as u64, min: 0, max: left as u64 });
        }
        let (in_table, most) = (self.table_pages_of(list) + need, self.spec.table_pages());
        if in_table > most {
            return Err(Error::Size { arg: "most_rows", got: in_table as u64, min: 0, max: most as u64 });
        }
        let at = extends.unwrap_or_else(|| {
            let new = Chunk { id: chunk, state: ChunkState::Active, rows: 0, first_position, pages: Vec::new() };
            self.lists[list].push(new);
            self.lists[list].len() - 1
        });
        let mut copies = Vec::new();
        if let Some(page) = partial {
            let to = self.pool.take();
            copies.push(PageCopy { from: page, to, rows: have_rows % page_rows });
            self.pool.drop(page);
            *self.lists[list][at].pages.last_mut().expect("a partial page") = to;
        }
        for _ in 0..need {
            let page = self.pool.take();
            self.lists[list][at].pages.push(page);
        }
        self.lists[list][at].rows += rows;
        Ok(Placed { runs: self.runs(&self.lists[list][at], have_rows, rows), copies })
    }

    /// Where the rows of an active chunk are to be written again, all of them: the next denoising step.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a chunk that is not there or not active; [`Error::Size`] if it is shared and pages do not
    /// suffice.
    pub fn overwrite(&mut self, branch: usize, layer: usize, chunk: ChunkId) -> Result<Placed> {
        let list = self.list(branch, layer)?;
        let at = self.find(list, chunk)?;
        if self.lists[list][at].state != ChunkState::Active {
            return Err(Error::Unsupported { arg: "chunk", what: "an active one" });
        }
        let shared = self.lists[list][at].pages.iter().filter(|&&page| self.pool.shared(page)).count();
        let left = self.pages_left();
        if shared > left {
            return Err(Error::Size { arg: "pages", got: shared as u64, min: 0, max: left as u64 });
        }
        for page in &mut self.lists[list][at].pages {
            if self.pool.shared(*page) {
                self.pool.drop(*page);
                *page = self.pool.take();
            }
        }
        let chunk = &self.lists[list][at];
        Ok(Placed { runs: self.runs(chunk, 0, chunk.rows), copies: Vec::new() })
    }

    /// Takes the last `rows` rows of a layer away: rejected drafts, a backspace. Chunks that lose all of theirs are gone.
    ///
    /// # Errors
    /// [`Error::Size`] for more rows than there are behind the compressed chunk.
    pub fn truncate(&mut self, branch: usize, layer: usize, rows: usize) -> Result<()> {
        let list = self.list(branch, layer)?;
        let loose = self.lists[list].iter().filter(|chunk| chunk.state != ChunkState::Compressed);
        let most = loose.map(|chunk| chunk.rows).sum::<usize>();
        if rows > most {
            return Err(Error::Size { arg: "rows", got: rows as u64, min: 0, max: most as u64 });
        }
        let mut left = rows;
        while left > 0 {
            let chunk = self.lists[list].last_mut().expect("there are rows left");
            let taken = left.min(chunk.rows);
            chunk.rows -= taken;
            left -= taken;
            for page in chunk.pages.drain(chunk.rows.div_ceil(self.spec.page_rows)..) {
                self.pool.drop(page);
            }
            if chunk.rows == 0 {
                self.lists[list].pop();
            }
        }
        Ok(())
    }

    /// Branch `to` becomes what `from` is, sharing its pages; what it had is given back. The region `lengths` of `to` is to be
    /// copied from that of `from`.
    ///
    /// # Errors
    /// [`Error::Size`] for a branch that is not there.
    pub fn fork(&mut self, from: usize, to: usize) -> Result<()> {
        self.list(from, 0)?;
        self.list(to, 0)?;
        if from == to {
            return Ok(());
        }
        for layer in 0..self.spec.layers {
            let copy = self.lists[from * self.spec.layers + layer].clone();
            copy.iter().flat_map(|chunk| &chunk.pages).for_each(|&page| self.pool.share(page));
            self.replace(to * self.spec.layers + layer, copy);
        }
        Ok(())
    }

    /// Gives back all that a branch has.
    ///
    /// # Errors
    /// [`Error::Size`] for a branch that is not there.
    pub fn clear(&mut self, branch: usize) -> Result<()> {
        self.list(branch, 0)?;
        (0..self.spec.layers).for_each(|layer| self.replace(branch * self.spec.layers + layer, Vec::new()));
        Ok(())
    }

    fn replace(&mut self, list: usize, with: Vec<Chunk>) {
        for chunk in std::mem::replace(&mut self.lists[list], with) {
            chunk.pages.into_iter().for_each(|page| self.pool.drop(page));
        }
    }

    /// The chunk will change no more.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a chunk that is not there.
    pub fn seal(&mut self, branch: usize, layer: usize, chunk: ChunkId) -> Result<()> {
        let list = self.list(branch, layer)?;
        let at = self.find(list, chunk)?;
        self.lists[list][at].state = ChunkState::Sealed;
        Ok(())
    }

    /// Sealed chunks at the start of a layer, the compressed one among them, become one of up to `kept` rows a head;
    /// `None` if they have no more. Says what to move: [`ChunkCache::event`] is all of it, before anything else is
    /// written. Active chunks stay where they are.
    ///
    /// The rows of several chunks are rows of one list only where all that were not compressed, but for the last, fill
    /// their pages.
    ///
    /// Out of place, the pages that are read are given back here too: another owner holds those that are shared, and the others
    /// are not taken by anything before the move if it is enqueued next.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if a chunk before the last sealed one does not fill its pages; [`Error::Size`] if pages are shared
    /// and the free ones do not suffice.
    pub fn compress(&mut self, branch: usize, layer: usize, kept: usize) -> Result<Option<Compaction>> {
        let list = self.list(branch, layer)?;
        let page_rows = self.spec.page_rows;
        let sealed = self.lists[list].iter().take_while(|chunk| chunk.state != ChunkState::Active).count();
        let chunks = &self.lists[list][..sealed];
        let rows: usize = chunks.iter().map(|chunk| chunk.rows).sum();
        if rows <= kept {
            return Ok(None);
        }
        let was_compressed = chunks[0].state == ChunkState::Compressed;
        let first_kept = if was_compressed { chunks[0].rows } else { 0 };
        let first_rows = if was_compressed { chunks[0].pages.len() * page_rows } else { 0 };
        let tokens = first_rows + rows - first_kept;
        if chunks[usize::from(was_compressed).min(sealed - 1)..sealed - 1]
            .iter()
            .any(|chunk| chunk.rows % page_rows > 0)
        {
            return Err(Error::Unsupported {
                arg: "kept",
                what: "chunks between the compressed and the last sealed one that fill their pages",
            });
        }
        let input_pages: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.pages.iter().copied()).collect();
        let first = &chunks[0];
        let (id, first_position) = (first.id, first.first_position);
        let out = kept.div_ceil(page_rows);
        let in_place = !input_pages.iter().any(|&page| self.pool.shared(page));
        let out_pages: Vec<u32> = if in_place {
            input_pages[..out].to_vec()
        } else {
            // The spare pages are for this.
            if out > self.pool.free() {
                return Err(Error::Size { arg: "pages", got: out as u64, min: 0, max: self.pool.free() as u64 });
            }
            (0..out).map(|_| self.pool.take()).collect()
        };
        let given_back = if in_place { &input_pages[out..] } else { &input_pages[..] };
        given_back.iter().for_each(|&page| self.pool.drop(page));
        let compressed =
            Chunk { id, state: ChunkState::Compressed, rows: kept, first_position, pages: out_pages.clone() };
        let begin = if kept > 0 { vec![compressed] } else { Vec::new() };
        self.lists[list].splice(..sealed, begin);
        Ok(Some(Compaction { tokens, kept, in_place, input_pages, out_pages, first_rows, first_kept }))
    }

    /// The plan that moves what `sets` compressions of one shape say, in place over the regions `k`, `v`, `positions` and
    /// `extras`: these are the operands `k_out`, `v_out`, `positions_out` and `extras_out`. `input_pages` are the compressions'
    /// pages, one set after the other, and so are `out_pages`, which are given unless all are `in_place`.
    ///
    /// # Errors
    /// [`Error::DType`] if `T` is not the cache's type, of a packed one `u8`.
    pub fn compact<T: Element>(&self, sets: usize, compaction: &Compaction) -> Result<CompactBuilder<T, T>> {
        let stored = if self.spec.packed.is_some() { DType::U8 } else { self.spec.dtype };
        if T::DTYPE != stored {
            return Err(Error::DType { arg: "T", what: "the cache's type, u8 of a packed one" });
        }
        Ok(self.compact_rows(sets, compaction, self.spec.row_bytes().map(|bytes| bytes / size_of::<T>())))
    }

    /// The plan that moves the numbers of packed keys and values, after the slots, by the same indices: over the
    /// regions `k_numbers` and `v_numbers`, the operands `k_out` and `v_out`. `None` where there are none.
    pub fn compact_numbers(&self, sets: usize, compaction: &Compaction) -> Option<CompactBuilder<f32, f32>> {
        let numbers = self.spec.numbers();
        (numbers != [0, 0]).then(|| self.compact_rows(sets, compaction, numbers))
    }

    /// How the keys and the values of a run of `rows` rows are packed. Slots and numbers begin at row `place` of their
    /// regions: at byte `place * heads * slot`, and at number `place * heads * n`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] of a cache that is not packed.
    pub fn pack<T: Float>(&self, rows: usize) -> Result<[PackBuilder<T, f32>; 2]> {
        let spec = &self.spec;
        let packed =
            spec.packed.ok_or(Error::Unsupported { arg: "packed", what: "a cache of packed keys and values" })?;
        Ok([(packed.k, spec.k_dim), (packed.v, spec.v_dim)].map(|(format, dim)| {
            let builder = Pack::builder(format, rows, spec.heads, dim);
            if packed.inline { builder.inline() } else { builder }
        }))
    }

    fn compact_rows<T: Element>(
        &self,
        sets: usize,
        compaction: &Compaction,
        [k_dim, v_dim]: [usize; 2],
    ) -> CompactBuilder<T, T> {
        let (heads, pages) = (self.spec.heads, self.layout.pages);
        // All sets lie in one pool.
        let of = |dim: usize| [0, (heads * dim) as i64, dim as i64];
        let values = [0, 1, heads as i64];
        let builder = Compact::builder(sets, heads, compaction.tokens, compaction.kept)
            .k(k_dim)
            .k_strides(of(k_dim))
            .k_out_strides(of(k_dim))
            .v(v_dim)
            .v_strides(of(v_dim))
            .v_out_strides(of(v_dim))
            .values_strides(values)
            .values_out_strides(values)
            .input_pages(self.spec.page_rows, pages)
            .in_place();
        match compaction.in_place {
            true => builder,
            false => builder.out_pages(self.spec.page_rows, pages),
        }
    }

    /// The whole event of a policy: scores, selection and move of what `compactions` say, which are of one shape, one a
    /// set. A set is a layer of a branch.
    ///
    /// # Errors
    /// [`Error::DType`] if `T` is not the cache's type; [`Error::Unsupported`] for no compactions, or of different
    /// shapes, or of packed keys, which are not scored: [`Select`](super::Select) with scores of one's own, and
    /// [`ChunkCache::compact`].
    pub fn event<T: Float>(&self, policy: Policy, compactions: &[Compaction]) -> Result<EventBuilder<T>> {
        if self.spec.packed.is_some() {
            return Err(Error::Unsupported { arg: "packed", what: "keys that are not packed: these are not scored" });
        }
        let Some(first) = compactions.first() else {
            return Err(Error::Unsupported { arg: "compactions", what: "at least one" });
        };
        let shape = |of: &Compaction| (of.tokens, of.kept, of.in_place, of.first_rows, of.first_kept);
        if compactions.iter().any(|other| shape(other) != shape(first)) {
            return Err(Error::Unsupported { arg: "compactions", what: "of one shape: more events for more shapes" });
        }
        // The pages are operands.
        let shape = Compaction { input_pages: Vec::new(), out_pages: Vec::new(), ..*first };
        let compact = self.compact::<T>(compactions.len(), first)?;
        Ok(EventBuilder::new(policy, self.spec, self.layout.pages, compactions.len(), shape, compact))
    }

    /// The chunks of a layer, in order.
    ///
    /// # Errors
    /// [`Error::Size`] for a branch or layer that is not there.
    pub fn view(&self, branch: usize, layer: usize) -> Result<impl Iterator<Item = Segment<'_>>> {
        Ok(self.lists[self.list(branch, layer)?].iter().map(|chunk| Segment {
            chunk: chunk.id,
            state: chunk.state,
            rows: chunk.rows,
            first_position: chunk.first_position,
            pages: &chunk.pages,
        }))
    }

    /// Writes the words of the region `tables`: for each branch and layer its pages in order, and -1 after them.
    ///
    /// # Errors
    /// [`Error::Length`] if `words` are not as many as the region has.
    pub fn tables(&self, words: &mut [i32]) -> Result<()> {
        let pages = self.spec.table_pages();
        let need = self.lists.len() * pages;
        if words.len() != need {
            return Err(Error::Length { arg: "words", need: need as u64, got: words.len() as u64 });
        }
        words.fill(-1);
        for (list, words) in self.lists.iter().zip(words.chunks_mut(pages)) {
            let all = list.iter().flat_map(|chunk| &chunk.pages);
            words.iter_mut().zip(all).for_each(|(word, &page)| *word = page as i32);
        }
        Ok(())
    }
}
