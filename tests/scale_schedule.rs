//! The schedule of scale attention, read as kernels/include/nextscale.h describes it and held against who sees whom.
//!
//! The reader below knows the words from the header's comment alone, and the expectation comes from `Visibility::sees`.

#![cfg(feature = "attention")]

mod support;

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use nextscale::attention::{
    ClipContext, PackedVideo, Past, Rule, ScaleAttention, Schedule, Segment, Variant, Visibility,
};
use nextscale::{DeviceInfo, bf16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// The `#define`s of the header.
struct Header {
    item_words: usize,
    run_words: usize,
    mask_words: usize,
    wide_mask_words: usize,
    tile_rows: usize,
    chunk_keys: usize,
    wide_chunk_keys: usize,
    none: usize,
    hidden: usize,
}

static HEADER: LazyLock<Header> = LazyLock::new(|| {
    let header = include_str!("../kernels/include/nextscale.h");
    let number = |name: &str| {
        let value =
            header.lines().find_map(|line| line.strip_prefix("#define NXS_")?.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|value| value.trim_end_matches('u').parse().ok()).unwrap_or_else(|| panic!("no number {name}"))
    };
    Header {
        item_words: number("SCHEDULE_ITEM_WORDS"),
        run_words: number("SCHEDULE_RUN_WORDS"),
        mask_words: number("SCHEDULE_MASK_WORDS"),
        wide_mask_words: number("SCHEDULE_WIDE_MASK_WORDS"),
        tile_rows: number("SCHEDULE_TILE_ROWS"),
        chunk_keys: number("SCHEDULE_CHUNK_KEYS"),
        wide_chunk_keys: number("SCHEDULE_WIDE_CHUNK_KEYS"),
        none: number("MASK_NONE"),
        hidden: number("MASK_HIDDEN"),
    }
});

/// A schedule's words and the params that go with them.
#[derive(Clone)]
struct Words {
    words: Vec<u32>,
    items: usize,
    splits: usize,
    groups: usize,
    pack: usize,
}

#[derive(Debug)]
struct Tile {
    first: usize,
    rows: usize,
}

#[derive(Debug, PartialEq)]
enum Mask {
    None,
    Hidden,
    Bits(usize),
}

#[derive(Debug)]
struct Run {
    first: usize,
    keys: usize,
    /// Index, and the first key that it counts from.
    length: Option<(usize, usize)>,
    masks: Vec<Mask>,
}

#[derive(Debug)]
struct Item {
    split: usize,
    tiles: Vec<Tile>,
    runs: Vec<Run>,
}

impl Item {
    fn chunks(&self, chunk_keys: usize) -> usize {
        self.runs.iter().map(|run| run.keys.div_ceil(chunk_keys)).sum()
    }
}

macro_rules! ensure {
    ($holds:expr, $($why:tt)+) => {
        if !$holds {
            return Err(format!($($why)+));
        }
    };
}

impl Words {
    /// Keys of a chunk and words of a mask: the header has others for items of four tiles.
    fn sizes(&self) -> (usize, usize) {
        let h = &*HEADER;
        if self.groups == 4 { (h.wide_chunk_keys, h.wide_mask_words) } else { (h.chunk_keys, h.mask_words) }
    }

    /// The word of a mask, and the bit in it, of which the header says that they are this row and key.
    fn place(&self, row: usize, key: usize) -> (usize, usize) {
        let thread = row / 16 * 32 + row % 8 * 4 + key % 8 / 2;
        let element = key / 8 * 4 + row / 8 % 2 * 2 + key % 2;
        (self.sizes().1 / 128 * thread + element / 32, element % 32)
    }

    fn of(schedule: &Schedule) -> Self {
        Words {
            words: schedule.words().to_vec(),
            items: schedule.items() as usize,
            splits: schedule.splits() as usize,
            groups: schedule.groups() as usize,
            pack: schedule.pack() as usize,
        }
    }

    fn at(&self, offset: usize) -> Result<usize, String> {
        self.words.get(offset).map(|&word| word as usize).ok_or(format!("offset {offset} is out of bounds"))
    }

    /// Items and runs; what can be said of the words without knowing who sees whom.
    fn read(&self) -> Result<Vec<Item>, String> {
        let Header { item_words, run_words, none, hidden, .. } = *HEADER;
        let (_, mask_words) = self.sizes();
        let digest = if self.items > 0 { self.at(3)? } else { 1 };
        ensure!(digest != 0, "no digest");
        let mut items = Vec::new();
        for i in 0..self.items {
            let head = i * item_words;
            ensure!(self.at(head + 3)? == digest, "item {i} has another digest");
            let (first_run, runs) = (self.at(head)?, self.at(head + 1)?);
            ensure!(first_run % 4 == 0, "the runs of item {i} are not 16-byte aligned");
            let tile = |g| -> Result<Tile, String> {
                Ok(Tile { first: self.at(head + 4 + 2 * g)?, rows: self.at(head + 5 + 2 * g)? })
            };
            let run = |r| -> Result<Run, String> {
                let run = first_run + r * run_words;
                let mask = |g| -> Result<Mask, String> {
                    let word = self.at(run + 4 + g)?;
                    if word == none {
                        return Ok(Mask::None);
                    }
                    if word == hidden {
                        return Ok(Mask::Hidden);
                    }
                    ensure!(word % 4 == 0, "mask at offset {word}, no multiple of 4");
                    ensure!(word >= self.items * item_words, "mask at {word} is among the items");
                    self.at(word + mask_words - 1)?;
                    Ok(Mask::Bits(word))
                };
                let (index, base) = (self.at(run + 2)?, self.at(run + 3)?);
                Ok(Run {
                    first: self.at(run)?,
                    keys: self.at(run + 1)?,
                    length: index.checked_sub(1).map(|index| (index, base)),
                    masks: (0..self.groups).map(mask).collect::<Result<_, _>>()?,
                })
            };
            items.push(Item {
                split: self.at(head + 2)?,
                tiles: (0..self.groups).map(tile).collect::<Result<_, _>>()?,
                runs: (0..runs).map(run).collect::<Result<_, _>>()?,
            });
        }
        Ok(items)
    }

    /// Whether a mask lets a row of its tile see a key of its chunk.
    fn bit(&self, mask: usize, row: usize, key: usize) -> bool {
        let (word, bit) = self.place(row, key);
        self.words[mask + word] >> bit & 1 == 1
    }

    /// Everything the header promises, with these lengths: each visible pair of a row and a key once over the splits,
    /// and no other.
    fn check(&self, visibility: &Visibility, lengths: &[i32]) -> Result<(), String> {
        let tile_rows = HEADER.tile_rows;
        let (chunk_keys, _) = self.sizes();
        let (tokens, keys) = (visibility.query_count() as usize, visibility.key_count() as usize);
        let rows = tokens * self.pack;
        let items = self.read()?;
        let mut owned = vec![0; self.splits * rows];
        let mut seen = vec![0u8; rows * keys];
        let mut longest = usize::MAX;
        for (i, item) in items.iter().enumerate() {
            ensure!(item.split < self.splits, "item {i} is of split {}", item.split);
            ensure!(item.chunks(chunk_keys) <= longest, "item {i} is longer than the one before");
            longest = item.chunks(chunk_keys);
            for (g, tile) in item.tiles.iter().enumerate() {
                ensure!(tile.rows <= tile_rows, "tile {g} of item {i} has {} rows", tile.rows);
                ensure!(tile.first + tile.rows <= rows, "tile {g} of item {i} has rows that are none");
                for row in tile.first..tile.first + tile.rows {
                    owned[item.split * rows + row] += 1;
                }
                // Runs of which the tile sees something.
                let sees = |run: &Run| match run.masks[g] {
                    Mask::None => tile.rows > 0,
                    Mask::Hidden => false,
                    Mask::Bits(mask) => {
                        (0..tile.rows).any(|row| (0..run.keys.min(chunk_keys)).any(|key| self.bit(mask, row, key)))
                    }
                };
                if let Some(first) = item.runs.iter().position(sees) {
                    let last = item.runs.iter().rposition(sees).unwrap();
                    let hidden = item.runs[first..last].iter().any(|run| run.masks[g] == Mask::Hidden);
                    ensure!(!hidden, "a run between those that tile {g} of item {i} sees is hidden");
                }
            }
            for (r, run) in item.runs.iter().enumerate() {
                ensure!(run.keys > 0 && run.first + run.keys <= keys, "run {r} of item {i} has keys that are none");
                let mut exist = run.keys;
                if let Some((index, base)) = run.length {
                    ensure!(base <= run.first, "the length of run {r} of item {i} counts from beyond its keys");
                    let length = lengths.get(index).ok_or(format!("no length {index}"))?;
                    exist = exist.min((base + (*length).max(0) as usize).saturating_sub(run.first));
                }
                for key in 0..exist {
                    for (tile, mask) in item.tiles.iter().zip(&run.masks) {
                        for row in 0..tile.rows {
                            let visible = match *mask {
                                Mask::None => true,
                                Mask::Hidden => false,
                                Mask::Bits(mask) => self.bit(mask, row, key % chunk_keys),
                            };
                            let seen = &mut seen[(tile.first + row) * keys + run.first + key];
                            *seen = seen.saturating_add(u8::from(visible));
                        }
                    }
                }
            }
        }
        let other = owned.iter().position(|&tiles| tiles != 1);
        ensure!(other.is_none(), "row and split {other:?} belong to none or to several tiles");
        for (segment, range) in (0..visibility.keys().len()).map(|k| (visibility.keys()[k], visibility.key_range(k))) {
            let exist = segment.length().map_or(range.len(), |index| lengths[index as usize].max(0) as usize);
            for key in range.clone() {
                let exists = ((key - range.start) as usize) < exist;
                for token in 0..tokens {
                    let expected = u8::from(exists && visibility.sees(token as u32, key));
                    for row in token * self.pack..(token + 1) * self.pack {
                        let times = seen[row * keys + key as usize];
                        ensure!(times == expected, "row {row} sees key {key} {times} times, not {expected}");
                    }
                }
            }
        }
        Ok(())
    }
}

fn plan(visibility: &Visibility, groups: u32, splits: u32, pack: usize) -> ScaleAttention<bf16> {
    ScaleAttention::builder(visibility)
        .heads(2 * pack, 2)
        .head_dim(if groups == 4 { 128 } else { 64 })
        .variant(Variant::Hopper)
        .tiles_an_item(groups)
        .splits(splits)
        .pack_heads(pack > 1)
        .build(&DeviceInfo::H200)
        .unwrap()
}

fn words(visibility: &Visibility, groups: u32, splits: u32, pack: usize) -> Words {
    let plan = plan(visibility, groups, splits, pack);
    let words = Words::of(plan.schedule());
    assert_eq!((words.groups, words.splits, words.pack), (groups as usize, splits as usize, pack));
    words
}

/// One problem: who sees whom, and how it is cut.
#[derive(Debug, Clone)]
struct Case {
    visibility: Visibility,
    lengths: Vec<i32>,
    groups: u32,
    splits: u32,
    pack: usize,
}

fn segment() -> impl Strategy<Value = Segment> {
    let sizes = prop_oneof![
        2 => Just(0u32),
        2 => Just(1u32),
        3 => 2..63u32,
        3 => 63..66u32,
        3 => 127..130u32,
        1 => 130..400u32,
        1 => 400..600u32,
    ];
    let shape = prop_oneof![
        3 => sizes.prop_map(Segment::tokens),
        2 => (1..13u32, 1..13u32).prop_map(|(height, width)| Segment::grid(height, width)),
        1 => (1..5u32, 1..6u32, 1..6u32).prop_map(|(frames, height, width)| Segment::video(frames, height, width)),
    ];
    (shape, prop::option::weighted(0.2, 0..3u32)).prop_map(|(segment, length)| match length {
        Some(index) => segment.with_length(index),
        None => segment,
    })
}

fn rule() -> impl Strategy<Value = Rule> {
    let window = (0..3u32, 0..4u32, 0..40u32);
    prop_oneof![
        4 => Just(Rule::Hidden),
        4 => Just(Rule::Full),
        1 => Just(Rule::Causal),
        1 => Just(Rule::ColumnCausal),
        1 => Just(Rule::DiagonalCausal),
        1 => window.prop_map(|(frames, rows, columns)| Rule::Window { frames, rows, columns }),
    ]
}

const MOST_SEGMENTS: usize = 6;

fn case() -> impl Strategy<Value = Case> {
    let segments = || prop::collection::vec(segment(), 0..=MOST_SEGMENTS);
    // Tables of any rules, of whole segments alone, and block-causal ones.
    let rules = prop_oneof![
        3 => prop::collection::vec(rule(), MOST_SEGMENTS * MOST_SEGMENTS),
        2 => prop::collection::vec(
            any::<bool>().prop_map(|sees| if sees { Rule::Full } else { Rule::Hidden }),
            MOST_SEGMENTS * MOST_SEGMENTS
        ),
        1 => Just(vec![Rule::Full; MOST_SEGMENTS * MOST_SEGMENTS]),
    ];
    let lengths = prop::collection::vec(
        prop_oneof![Just(0), -5..0i32, 1..140i32, 100..700i32, Just(i32::MAX), Just(i32::MIN)],
        3,
    );
    let cut = (1..=4u32, 1..=5u32, 1..=4usize);
    (segments(), prop::option::of(segments()), rules, any::<bool>(), lengths, cut).prop_map(
        |(queries, keys, rules, causal, lengths, (groups, splits, pack))| {
            let keys = keys.unwrap_or_else(|| queries.clone());
            let alike = |q: usize, k: usize| queries[q].with_length(0) == keys[k].with_length(0);
            let rule = |q: usize, k: usize| match rules[q * MOST_SEGMENTS + k] {
                _ if causal && k > q => Rule::Hidden,
                Rule::ColumnCausal if !alike(q, k) => Rule::Causal,
                rule => rule,
            };
            let visibility = Visibility::new(&queries, &keys, rule).unwrap();
            Case { visibility, lengths, groups, splits, pack }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases(), ..ProptestConfig::default() })]

    #[test]
    fn schedules_show_what_is_visible_and_nothing_else(case in case()) {
        let Case { visibility, lengths, groups, splits, pack } = &case;
        let plan = plan(visibility, *groups, *splits, *pack);
        let words = Words::of(plan.schedule());
        let sound = words.check(visibility, lengths);
        prop_assert_eq!(sound, Ok(()));
        // What the plan says of itself.
        let chunks: Vec<usize> = words.read().unwrap().iter().map(|item| item.chunks(words.sizes().0)).collect();
        prop_assert_eq!(plan.schedule().chunks(), chunks.iter().sum::<usize>() as u64);
        prop_assert_eq!(plan.schedule().longest() as usize, chunks.first().copied().unwrap_or(0));
    }

    /// Segments without tokens leave no trace.
    #[test]
    fn empty_segments_change_nothing(case in case()) {
        let Case { visibility, groups, splits, pack, .. } = &case;
        let full = |segments: &[Segment]| -> Vec<usize> {
            (0..segments.len()).filter(|&s| !segments[s].is_empty()).collect()
        };
        let (queries, keys) = (full(visibility.queries()), full(visibility.keys()));
        let of = |segments: &[Segment], kept: &[usize]| kept.iter().map(|&s| segments[s]).collect::<Vec<_>>();
        let rule = |q: usize, k: usize| visibility.rule(queries[q], keys[k]);
        let (q, k) = (of(visibility.queries(), &queries), of(visibility.keys(), &keys));
        let without = Visibility::new(&q, &k, rule).unwrap();
        let [with, without] = [visibility, &without].map(|visibility| words(visibility, *groups, *splits, *pack).words);
        prop_assert_eq!(with, without);
    }
}

fn var_256() -> Visibility {
    Visibility::scale_causal(&[1, 2, 3, 4, 5, 6, 8, 10, 13, 16].map(|n| (n, n))).unwrap()
}

#[test]
fn models_have_sound_schedules() {
    let var = var_256();
    let clip = |frames| [1u32, 3, 6].map(|side| Segment::video(frames, side, side));
    let (long, image) = ([clip(1), clip(4), clip(4)].concat(), clip(1));
    let videos = [
        PackedVideo { scales: &long, text: Segment::tokens(30).with_length(0) },
        PackedVideo { scales: &image, text: 9.into() },
    ];
    let context = ClipContext::PreviousClip { scales_a_clip: 3, from_largest: 1 };
    let scales = [1, 2, 3, 5, 8, 12].map(|n| (n, n));
    for visibility in [
        var.step(0),
        var.step(9),
        var.steps(7..10),
        Visibility::block_diagonal(&scales).unwrap(),
        Visibility::prefixed(Segment::tokens(77).with_length(0), Rule::Causal, &scales).unwrap(),
        Visibility::skip_causal(4, (8, 8)).unwrap(),
        Visibility::scale_aligned_source((12, 12), &scales).unwrap(),
        Visibility::edit_block(&scales).unwrap(),
        Visibility::packed_videos(&videos, context, 100).unwrap(),
        Visibility::sliding_frames(9, &scales[..4], Past::LastScale, 2, 1).unwrap(),
        Visibility::scale_local(&scales, 3, 2, 1, 1).unwrap(),
        Visibility::two_way(9, 14, 11).unwrap(),
        Visibility::two_way_steps(9, 14, 11).unwrap(),
        Visibility::token_causal(500).unwrap(),
        Visibility::cross_attention(300, Segment::tokens(256).with_length(0)).unwrap(),
        Visibility::cached_step(Segment::tokens(700).with_length(0), (12, 12)).unwrap(),
        var,
    ] {
        for (groups, splits, pack) in [(1, 1, 1), (2, 1, 1), (3, 3, 1), (2, 2, 4), (4, 2, 1)] {
            for length in [-1, 0, 5, 129, i32::MAX] {
                words(&visibility, groups, splits, pack).check(&visibility, &[length]).unwrap();
            }
        }
    }
}

/// A table of 2000 segments, as large as InfinityStar's.
#[test]
fn two_thousand_segments() {
    let mut rng = StdRng::seed_from_u64(7);
    let segments: Vec<Segment> = (0..2000).map(|_| Segment::tokens(rng.random_range(0..4))).collect();
    // Mostly itself, a few others, a text that all see.
    let links: Vec<[usize; 3]> = (0..2000).map(|q| [0; 3].map(|_| rng.random_range(0..=q))).collect();
    let sparse = Visibility::table(&segments, |q, k| q == k || k == 1999 || links[q].contains(&k)).unwrap();
    words(&sparse, 2, 2, 1).check(&sparse, &[]).unwrap();
    let causal = Visibility::table(&segments, |q, k| k <= q).unwrap();
    words(&causal, 3, 1, 1).check(&causal, &[]).unwrap();
}

/// The checker finds what a broken planner could do.
#[test]
fn broken_schedules_are_noticed() {
    // Tiles with none, some and all of their keys hidden; lengths; runs of several chunks; gaps.
    let scales = [1, 4, 7, 9, 16].map(|n| (n, n));
    let inner = Visibility::scale_local(&scales, 3, 1, 1, 1).unwrap();
    let visibility = inner.with_prefix(Segment::tokens(300).with_length(0), Rule::Causal).unwrap();
    let Header { item_words, run_words, .. } = *HEADER;
    let sound = words(&visibility, 2, 2, 1);
    sound.check(&visibility, &[200]).unwrap();
    let items = sound.read().unwrap();
    // Keys of a run that its length leaves.
    let exist =
        |run: &Run| run.length.map_or(run.keys, |(_, base)| (base + 200).saturating_sub(run.first).min(run.keys));
    let run_at = |i: usize, r: usize| sound.words[i * item_words] as usize + r * run_words;
    let broken = |what: &str, change: &dyn Fn(&mut Vec<u32>)| {
        let mut broken = sound.clone();
        change(&mut broken.words);
        assert!(broken.check(&visibility, &[200]).is_err(), "{what} is not noticed");
    };

    let mut kinds = [false; 6];
    for (i, item) in items.iter().enumerate() {
        broken("another split", &|words| words[i * item_words + 2] ^= 1);
        broken("a digest", &|words| words[i * item_words + 3] ^= 1 << 20);
        broken("one more run", &|words| words[i * item_words + 1] += 1);
        if item.runs.last().is_some_and(|run| run.masks.contains(&Mask::None) && exist(run) > 0) {
            kinds[0] = true;
            broken("a run that is left out", &|words| words[i * item_words + 1] -= 1);
        }
        for (g, tile) in item.tiles.iter().enumerate().filter(|(_, tile)| tile.rows > 0) {
            broken("a tile that begins late", &|words| words[i * item_words + 4 + 2 * g] += 1);
            broken("a tile with a row less", &|words| words[i * item_words + 5 + 2 * g] -= 1);
            broken("a tile with a row more", &|words| words[i * item_words + 5 + 2 * g] += 1);
            for (r, run) in item.runs.iter().enumerate() {
                let at = run_at(i, r);
                let exist = exist(run);
                match run.masks[g] {
                    _ if exist == 0 => {}
                    Mask::None => {
                        kinds[1] = true;
                        broken("a hidden run", &|words| words[at + 4 + g] = 1);
                        if exist == run.keys {
                            broken("a short run", &|words| words[at + 1] -= 1);
                        }
                        broken("a shifted run", &|words| words[at] += 1);
                    }
                    Mask::Hidden => {
                        kinds[2] = true;
                        broken("a run that is shown", &|words| words[at + 4 + g] = 0);
                    }
                    Mask::Bits(mask) => {
                        kinds[3] = true;
                        broken("an odd mask", &|words| words[at + 4 + g] += 1);
                        broken("a mask beyond the end", &|words| words[at + 4 + g] = words.len() as u32 - 254);
                        // Any bit of a row and a key that are there.
                        for n in 0..6 {
                            let (word, bit) = sound.place(n * 37 % tile.rows, n * 53 % exist.min(128));
                            broken("a bit of a mask", &|words| words[mask + word] ^= 1 << bit);
                        }
                    }
                }
                if run.length.is_some() && run.masks[g] != Mask::Hidden && run.first + run.keys > 200 {
                    kinds[4] = true;
                    broken("a length that is left out", &|words| words[at + 2] = 0);
                }
                if run.length.is_some() {
                    broken("a length that is none", &|words| words[at + 2] += 1);
                }
            }
        }
        let [before, here] = [i.saturating_sub(1), i].map(|i| items[i].chunks(sound.sizes().0));
        if before > here {
            kinds[5] = true;
            broken("items in disorder", &|words| {
                (0..item_words).for_each(|w| words.swap(i * item_words + w, (i - 1) * item_words + w))
            });
        }
    }
    assert_eq!(kinds, [true; 6], "the schedule has something of every kind");
}

/// Planning is cheap enough to be done whenever a shape is new. The best of many, with slack for slow machines;
/// unoptimised arithmetic is checked, and takes longer. `benches/scale_plan.rs` measures.
#[test]
fn planning_takes_no_time() {
    let limit = Duration::from_millis(if cfg!(debug_assertions) { 10 } else { 1 });
    for (name, sides) in [
        ("VAR 256", &[1u32, 2, 3, 4, 5, 6, 8, 10, 13, 16][..]),
        ("VAR 512", &[1, 2, 3, 4, 6, 9, 13, 18, 24, 32]),
        ("VAR 1024", &[1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64]),
        ("Infinity 1M", &[1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64]),
    ] {
        let scales: Vec<(u32, u32)> = sides.iter().map(|&n| (n, n)).collect();
        let time = || {
            let start = Instant::now();
            let visibility = Visibility::scale_causal(&scales).unwrap();
            let plan = ScaleAttention::<bf16>::builder(&visibility).batch(2).heads(16, 16).head_dim(128);
            plan.build(&DeviceInfo::H200).unwrap();
            start.elapsed()
        };
        let best = (0..50).map(|_| time()).min().unwrap();
        assert!(best < limit, "{name}: {best:?}");
    }
}
