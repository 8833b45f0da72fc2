//! From who sees whom to the words that the kernels read: items, runs, masks (kernels/include/nextscale.h has the format).

use core::hash::{Hash, Hasher};
use core::ops::Range;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use crate::attention::visibility::Visibility;
use crate::ffi;

const ITEM_WORDS: usize = ffi::NXS_SCHEDULE_ITEM_WORDS as usize;
const RUN_WORDS: usize = ffi::NXS_SCHEDULE_RUN_WORDS as usize;
const TILE_ROWS: u32 = ffi::NXS_SCHEDULE_TILE_ROWS;
/// Threads that share a mask.
const MASK_THREADS: u32 = 128;
const MOST_GROUPS: usize = 4;

/// What a tile sees of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sight {
    All,
    Nothing,
    /// Number of a mask.
    Some(u32),
}

/// Keys that follow each other and that each tile of an item sees alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u32,
    keys: u32,
    /// Index and first key of the length that limits it.
    length: Option<(u32, u32)>,
    sights: [Sight; MOST_GROUPS],
}

impl Run {
    fn chunks(&self, chunk: u32) -> u32 {
        self.keys.div_ceil(chunk)
    }
}

/// Rows that one warpgroup computes: at most 64, those of one segment, or several whole small segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    first: u32,
    rows: u32,
}

type KeySet = Rc<Vec<Range<u32>>>;
/// Keys that one length, by index and first key, or none limits.
type Zone = (Range<u32>, Option<(u32, u32)>);

/// How the rows are cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Cut {
    /// Tiles of an item, 4 of them shared by a pair of thread blocks.
    pub(super) groups: u32,
    /// Parts that the keys of an item are split into.
    pub(super) splits: u32,
    /// Heads of one kv head that share the rows of a tile.
    pub(super) pack: u32,
}

impl Cut {
    /// Thread blocks that share an item.
    pub(super) fn pair(&self) -> u32 {
        if self.groups < 4 { 1 } else { 2 }
    }

    /// Keys of a chunk.
    fn chunk(&self) -> u32 {
        if self.groups < 4 { ffi::NXS_SCHEDULE_CHUNK_KEYS } else { ffi::NXS_SCHEDULE_WIDE_CHUNK_KEYS }
    }

    fn mask_words(&self) -> usize {
        let words = if self.groups < 4 { ffi::NXS_SCHEDULE_MASK_WORDS } else { ffi::NXS_SCHEDULE_WIDE_MASK_WORDS };
        words as usize
    }
}

/// The words for the kernels, and what planning needs to know of them. Cheap to clone.
#[derive(Clone)]
pub struct Schedule {
    words: Arc<[u32]>,
    items: u32,
    chunks: u64,
    longest: u32,
    digest: u32,
    head_words: u32,
    cut: Cut,
}

impl Schedule {
    /// The words, to be copied to the device once.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Items of all splits.
    pub fn items(&self) -> u32 {
        self.items
    }

    /// Parts that the keys of a row are split into; more than one needs a workspace.
    pub fn splits(&self) -> u32 {
        self.cut.splits
    }

    /// Tiles of 64 rows in an item; 4 are shared by a pair of thread blocks.
    pub fn groups(&self) -> u32 {
        self.cut.groups
    }

    /// Heads whose rows lie together in a tile.
    pub fn pack(&self) -> u32 {
        self.cut.pack
    }

    pub(super) fn cut(&self) -> Cut {
        self.cut
    }

    /// Chunks of each item, longest first, and how many of them a mask is needed for.
    pub(super) fn lengths(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let masked =
            |run: &[u32]| run[4..].iter().any(|&word| word != ffi::NXS_MASK_NONE && word != ffi::NXS_MASK_HIDDEN);
        self.words.chunks_exact(ITEM_WORDS).take(self.items as usize).map(move |item| {
            let runs = self.words[item[0] as usize..].chunks_exact(RUN_WORDS).take(item[1] as usize);
            runs.fold((0, 0), |(all, some), run| {
                let chunks = run[1].div_ceil(self.cut.chunk());
                (all + chunks, if masked(run) { some + chunks } else { some })
            })
        })
    }

    /// Chunks of 128 keys that the items of one head read; of 160 where [`Schedule::groups`] is 4.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Chunks of the longest item.
    pub fn longest(&self) -> u32 {
        self.longest
    }

    /// The words before the masks.
    #[cfg_attr(not(nxs_kernels), allow(dead_code))]
    pub(super) fn head_words(&self) -> u32 {
        self.head_words
    }

    #[cfg_attr(not(nxs_kernels), allow(dead_code))]
    pub(super) fn digest(&self) -> u32 {
        self.digest
    }
}

impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        (self.digest, self.cut) == (other.digest, other.cut) && self.words == other.words
    }
}
impl Eq for Schedule {}
impl Hash for Schedule {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
        self.cut.hash(state);
    }
}
impl core::fmt::Debug for Schedule {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Schedule({} items, {} chunks, {:?}, {} words)", self.items, self.chunks, self.cut, self.words.len())
    }
}

/// Rows a tile each: a segment begins a new one unless it and what is there fit in one.
fn tiles(visibility: &Visibility, pack: u32) -> Vec<Tile> {
    let mut tiles: Vec<Tile> = Vec::new();
    let mut open = false;
    for q in 0..visibility.queries().len() {
        let tokens = visibility.query_range(q);
        let (mut first, mut rows) = (tokens.start * pack, (tokens.end - tokens.start) * pack);
        if rows == 0 {
            continue;
        }
        if let (true, Some(last)) = (open, tiles.last_mut())
            && last.rows + rows <= TILE_ROWS
        {
            last.rows += rows;
            continue;
        }
        // The end of a large segment stays alone: what follows may see far fewer keys.
        open = rows < TILE_ROWS;
        while rows > 0 {
            let here = rows.min(TILE_ROWS);
            tiles.push(Tile { first, rows: here });
            (first, rows) = (first + here, rows - here);
        }
    }
    tiles
}

/// How many tiles there are, for choosing a cut.
pub(super) fn tile_count(visibility: &Visibility, pack: u32) -> u32 {
    tiles(visibility, pack).len() as u32
}

fn merged(ranges: impl IntoIterator<Item = Range<u32>>) -> Vec<Range<u32>> {
    let mut merged: Vec<Range<u32>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

fn union<'a>(sets: impl IntoIterator<Item = &'a KeySet>) -> Vec<Range<u32>> {
    let mut all: Vec<Range<u32>> = sets.into_iter().flat_map(|set| set.iter().cloned()).collect();
    all.sort_unstable_by_key(|range| range.start);
    merged(all)
}

/// The range of a set that reaches beyond `key`, if any does.
fn at_or_after(set: &[Range<u32>], key: u32) -> Option<&Range<u32>> {
    set.get(set.partition_point(|range| range.end <= key))
}

fn covers(set: &[Range<u32>], keys: &Range<u32>) -> bool {
    at_or_after(set, keys.start).is_some_and(|range| range.start <= keys.start && keys.end <= range.end)
}

fn meets(set: &[Range<u32>], keys: &Range<u32>) -> bool {
    at_or_after(set, keys.start).is_some_and(|range| range.start < keys.end)
}

struct Lowering<'a> {
    visibility: &'a Visibility,
    pack: u32,
    /// Keys of a chunk.
    chunk: u32,
    mask_words: usize,
    /// Of segments whose rows all see the same.
    segment_sets: Vec<Option<KeySet>>,
    masks: Vec<Rc<[u32]>>,
    mask_numbers: HashMap<Rc<[u32]>, u32>,
    zones: Vec<Zone>,
}

impl<'a> Lowering<'a> {
    fn new(visibility: &'a Visibility, cut: Cut) -> Self {
        let mut zones: Vec<Zone> = Vec::new();
        for (k, segment) in visibility.keys().iter().enumerate() {
            let range = visibility.key_range(k);
            if range.is_empty() {
                continue;
            }
            let length = segment.length().map(|index| (index, range.start));
            match zones.last_mut() {
                Some((last, None)) if length.is_none() => last.end = range.end,
                _ => zones.push((range, length)),
            }
        }
        Lowering {
            visibility,
            pack: cut.pack,
            chunk: cut.chunk(),
            mask_words: cut.mask_words(),
            segment_sets: vec![None; visibility.queries().len()],
            masks: Vec::new(),
            mask_numbers: HashMap::new(),
            zones,
        }
    }

    fn keys_of(&mut self, token: u32) -> KeySet {
        let q = self.visibility.segment_of(token);
        if let Some(set) = &self.segment_sets[q] {
            return set.clone();
        }
        let mut ranges = Vec::new();
        self.visibility.for_each_range(token, |range| ranges.push(range));
        let set = Rc::new(merged(ranges));
        if !self.visibility.differs_within(q) {
            self.segment_sets[q] = Some(set.clone());
        }
        set
    }

    /// The keys that each row of a tile sees.
    fn rows_of(&mut self, tile: &Tile) -> Vec<KeySet> {
        (tile.first..tile.first + tile.rows).map(|row| self.keys_of(row / self.pack)).collect()
    }

    fn mask(&mut self, rows: &[KeySet], first: u32) -> u32 {
        let mut words = vec![0u32; self.mask_words];
        let of_thread = self.mask_words as u32 / MASK_THREADS;
        for (row, set) in rows.iter().enumerate() {
            let row = row as u32;
            // A thread has its row, the one eight below, and of every eight keys two.
            let (warp, within) = (row / 16, row % 16);
            for range in set.iter() {
                let keys =
                    range.start.max(first).saturating_sub(first)..range.end.saturating_sub(first).min(self.chunk);
                for key in keys {
                    let thread = warp * 32 + within % 8 * 4 + key % 8 / 2;
                    let element = key / 8 * 4 + within / 8 * 2 + key % 2;
                    words[(of_thread * thread + element / 32) as usize] |= 1 << (element % 32);
                }
            }
        }
        self.number_of(words)
    }

    fn number_of(&mut self, words: Vec<u32>) -> u32 {
        let words = Rc::from(words);
        if let Some(&number) = self.mask_numbers.get(&words) {
            return number;
        }
        let number = self.masks.len() as u32;
        self.masks.push(Rc::clone(&words));
        self.mask_numbers.insert(words, number);
        number
    }

    /// The runs of an item, in the order of the keys.
    fn runs(&mut self, tiles: &[Tile]) -> Vec<Run> {
        let rows: Vec<Vec<KeySet>> = tiles.iter().map(|tile| self.rows_of(tile)).collect();
        // Rows mostly share their sets: look at each set once.
        let distinct: Vec<Vec<KeySet>> = rows
            .iter()
            .map(|rows| {
                let mut sets: Vec<KeySet> = Vec::new();
                for set in rows {
                    if !sets.iter().rev().any(|known| Rc::ptr_eq(known, set) || known == set) {
                        sets.push(set.clone());
                    }
                }
                sets
            })
            .collect();
        let all = union(distinct.iter().flatten());
        let mut edges: Vec<u32> =
            distinct.iter().flatten().flat_map(|set| set.iter().flat_map(|range| [range.start, range.end])).collect();
        edges.sort_unstable();
        edges.dedup();

        let mut runs: Vec<Run> = Vec::new();
        for (zone, length) in self.zones.clone() {
            let from = all.partition_point(|range| range.end <= zone.start);
            for range in &all[from..] {
                if range.start >= zone.end {
                    break;
                }
                let (mut at, end) = (range.start.max(zone.start), range.end.min(zone.end));
                let interval = runs.len();
                while at < end {
                    let edge = edges.get(edges.partition_point(|&edge| edge <= at)).map_or(end, |&edge| edge.min(end));
                    // Up to the next edge all is alike; a chunk with an edge inside stands alone.
                    let plain = if edge == end { end - at } else { (edge - at) / self.chunk * self.chunk };
                    let keys = if plain > 0 { plain } else { self.chunk.min(end - at) };
                    let span = at..at + keys;
                    let mut sights = [Sight::Nothing; MOST_GROUPS];
                    for (g, sets) in distinct.iter().enumerate() {
                        sights[g] = if sets.iter().all(|set| covers(set, &span)) {
                            Sight::All
                        } else if !sets.iter().any(|set| meets(set, &span)) {
                            Sight::Nothing
                        } else {
                            Sight::Some(self.mask(&rows[g], at))
                        };
                    }
                    match runs[interval..].last_mut() {
                        Some(last) if last.sights == sights && last.keys % self.chunk == 0 && plain > 0 => {
                            last.keys += keys
                        }
                        _ => runs.push(Run { first: at, keys, length, sights }),
                    }
                    at += keys;
                }
            }
        }
        runs
    }
}

/// Makes the schedule.
pub(super) fn schedule(visibility: &Visibility, cut: Cut) -> Schedule {
    let mut lowering = Lowering::new(visibility, cut);
    let tiles = tiles(visibility, cut.pack);
    struct Item {
        tiles: Vec<Tile>,
        split: u32,
        runs: Vec<Run>,
    }
    let mut items: Vec<Item> = Vec::new();
    // From the end, where the most keys are seen: what is left alone is short.
    for tiles in tiles.rchunks(cut.groups as usize) {
        let mut runs = lowering.runs(tiles);
        // The last chunk first: it is the one with a tail, and nothing of it overlaps with another's.
        runs.reverse();
        let chunks: u32 = runs.iter().map(|run| run.chunks(cut.chunk())).sum();
        for split in 0..cut.splits {
            let part = |n: u32| (u64::from(chunks) * u64::from(n) / u64::from(cut.splits)) as u32;
            let runs = slice(&runs, part(split)..part(split + 1), cut.chunk());
            items.push(Item { tiles: tiles.to_vec(), split, runs });
        }
    }
    for item in &mut items {
        for g in 0..item.tiles.len() {
            let visible = |run: &Run| run.sights[g] != Sight::Nothing;
            let first = item.runs.iter().position(visible);
            let last = item.runs.iter().rposition(visible);
            // Between runs that a tile sees it is shown the others too, with a mask that lets nothing through.
            if let (Some(first), Some(last)) = (first, last) {
                for run in &mut item.runs[first..last] {
                    if run.sights[g] == Sight::Nothing {
                        run.sights[g] = Sight::Some(lowering.number_of(vec![0; cut.mask_words()]));
                    }
                }
            }
        }
    }
    let length = |item: &Item| item.runs.iter().map(|run| run.chunks(cut.chunk())).sum::<u32>();
    items.sort_by_key(|item| core::cmp::Reverse(length(item)));

    let runs_at = (items.len() * ITEM_WORDS).next_multiple_of(4);
    let run_count: usize = items.iter().map(|item| item.runs.len()).sum();
    let masks_at = runs_at + run_count * RUN_WORDS;
    let mut words = vec![0u32; masks_at];
    let mut run_at = runs_at;
    for (i, item) in items.iter().enumerate() {
        let head = &mut words[i * ITEM_WORDS..][..ITEM_WORDS];
        head[..3].copy_from_slice(&[run_at as u32, item.runs.len() as u32, item.split]);
        for (g, tile) in item.tiles.iter().enumerate() {
            head[4 + 2 * g..][..2].copy_from_slice(&[tile.first, tile.rows]);
        }
        for run in &item.runs {
            let (length, base) = run.length.map_or((0, 0), |(index, base)| (index + 1, base));
            let out = &mut words[run_at..][..RUN_WORDS];
            out[..4].copy_from_slice(&[run.first, run.keys, length, base]);
            for (out, sight) in out[4..].iter_mut().zip(run.sights) {
                *out = match sight {
                    Sight::All => ffi::NXS_MASK_NONE,
                    Sight::Nothing => ffi::NXS_MASK_HIDDEN,
                    Sight::Some(number) => (masks_at + number as usize * cut.mask_words()) as u32,
                };
            }
            run_at += RUN_WORDS;
        }
    }
    words.extend(lowering.masks.iter().flat_map(|mask| mask.iter()));

    // FNV-1a: enough to notice the schedule of another plan.
    let digest = words.iter().fold(0x811c_9dc5u32, |hash, &word| (hash ^ word).wrapping_mul(0x0100_0193)) | 1;
    for i in 0..items.len() {
        words[i * ITEM_WORDS + 3] = digest;
    }
    Schedule {
        items: items.len() as u32,
        chunks: items.iter().map(|item| u64::from(length(item))).sum(),
        longest: items.first().map_or(0, length),
        words: words.into(),
        digest,
        head_words: masks_at as u32,
        cut,
    }
}

/// The chunks `wanted` of runs that are taken as listed, the chunks of each from its last to its first.
fn slice(runs: &[Run], wanted: Range<u32>, chunk: u32) -> Vec<Run> {
    let mut slice = Vec::new();
    let mut before = 0;
    for run in runs {
        let chunks = run.chunks(chunk);
        let from = wanted.start.clamp(before, before + chunks) - before;
        let to = wanted.end.clamp(before, before + chunks) - before;
        if from < to {
            // Chunk number n of the order is chunk number chunks - 1 - n of the keys.
            let first = (chunks - to) * chunk;
            let end = run.keys.min((chunks - from) * chunk);
            slice.push(Run { first: run.first + first, keys: end - first, ..*run });
        }
        before += chunks;
    }
    slice
}
