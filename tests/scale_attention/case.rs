//! One problem of scale attention: who sees whom, shapes, strides, lengths; and its data, NaN wherever nothing may be
//! read.

use nextscale::attention::{
    Rule, ScaleAttention, ScaleAttentionArgs, ScaleAttentionBuilder, Segment, Variant, Visibility,
};
use nextscale::dtype::Float;
use nextscale::{DType, DeviceInfo};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

use crate::support::{Buffer, POISON_BYTE, TestDevice};

/// Frames, rows and columns of a segment.
pub type Grid = [u32; 3];

pub fn tokens(grid: Grid) -> usize {
    grid.iter().product::<u32>() as usize
}

/// How q, k, v and out lie in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Memory {
    /// Contiguous, the strides not given.
    Plain,
    /// Batch, rows and heads in any order, with gaps.
    AnyOrder,
    /// q, k and v are views of one `[batch, rows, heads + 2 kv_heads, dim]`; any order for packed and for shared keys.
    OneBuffer,
}

/// What q and k hold; v is always drawn from -2 to 2.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Data {
    /// From -2 to 2.
    Plain,
    /// Unit vectors, q times 100: with a scale of 1 the logits reach from -100 to 100, and many are at the ends.
    Sharp,
    /// All alike.
    Equal(f32),
    /// Logits that grow by so much from key to key, for some rows, and fall for the others.
    Ramp(f32),
}

/// All but the dtype.
#[derive(Debug, Clone)]
pub struct Case {
    pub queries: Vec<Grid>,
    pub keys: Vec<Grid>,
    /// Of each segment of keys, the index of its length.
    pub lengths: Vec<Option<u32>>,
    /// `[query segment][key segment]`.
    pub rules: Vec<Vec<Rule>>,
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub memory: Memory,
    /// Rows of k and v beyond the keys.
    pub spare: usize,
    pub packed_keys: bool,
    /// One k and one v for all entries: a batch stride of 0. Not in one buffer with q.
    pub shared_keys: bool,
    pub gathers: bool,
    /// One length for all heads of a batch entry.
    pub shared_lengths: bool,
    /// The plan's choice if not given.
    pub groups: Option<u32>,
    pub splits: Option<u32>,
    pub pack_heads: Option<bool>,
    /// With the bound that the data has, if it is at most 40 and the dtype takes one.
    pub bounded: bool,
    pub scale: Option<f32>,
    pub lse: bool,
    pub data: Data,
    pub variant: Variant,
    pub device: DeviceInfo,
    pub seed: u64,
}

/// The most that a drawn case has.
#[derive(Clone, Copy)]
pub struct Limits {
    tokens: usize,
    /// Pairs of a query and a key, over heads and batch.
    pairs: usize,
}

impl Limits {
    pub fn of(device: &TestDevice) -> Self {
        let slow = device.is_host() || device.is_emulated();
        if slow { Limits { tokens: 300, pairs: 100_000 } } else { Limits { tokens: 900, pairs: 600_000 } }
    }
}

fn grid() -> impl Strategy<Value = Grid> {
    prop_oneof![
        2 => Just([1, 1, 1]),
        1 => Just([1, 1, 0]),
        5 => (2..=10u32).prop_map(|n| [1, n, n]),
        3 => [1..=3u32, 1..=6u32, 1..=7u32],
        2 => prop_oneof![60..=70u32, 124..=132u32, 1..=200u32].prop_map(|n| [1, 1, n]),
    ]
}

fn rule() -> impl Strategy<Value = Rule> {
    let reach = || prop_oneof![3 => 0..3u32, 1 => Just(u32::MAX)];
    prop_oneof![
        4 => Just(Rule::Full),
        3 => Just(Rule::Hidden),
        1 => Just(Rule::Causal),
        1 => Just(Rule::ColumnCausal),
        1 => Just(Rule::DiagonalCausal),
        2 => [reach(), reach(), reach()].prop_map(|[frames, rows, columns]| Rule::Window { frames, rows, columns }),
    ]
}

/// What kind of table.
#[derive(Debug, Clone, Copy)]
enum Table {
    /// Each scale sees itself and those before it (VAR, Infinity), itself alone (HMAR, M-VAR), or what was drawn.
    BlockCausal,
    BlockDiagonal,
    Any,
}

pub fn case(limits: Limits) -> impl Strategy<Value = Case> {
    const MOST: usize = 8;
    let seen = (
        prop::collection::vec(grid(), 1..=MOST),
        // Which queries: of all segments, of the last one alone (a step of generation), or others.
        prop_oneof![
            3 => Just(None),
            1 => Just(Some(Vec::new())),
            1 => prop::collection::vec(grid(), 1..=MOST).prop_map(Some),
        ],
        prop_oneof![Just(Table::BlockCausal), Just(Table::BlockDiagonal), Just(Table::Any), Just(Table::Any)],
        prop::collection::vec(rule(), MOST * MOST),
        prop_oneof![
            2 => Just(vec![None; MOST]),
            1 => prop::collection::vec(prop_oneof![Just(None), (0..4u32).prop_map(Some)], MOST),
        ],
    );
    let sizes = (
        prop_oneof![3 => 1..=3usize, 1 => 1..=6usize],
        prop_oneof![2 => Just(1usize), 1 => 2..=6usize],
        prop_oneof![2 => Just(1usize), 1 => 2..=4usize],
        prop_oneof![3 => Just(64usize), 2 => Just(128), 1 => prop::sample::select(vec![8, 40, 80, 96, 104, 72])],
    );
    let layout = (
        prop_oneof![Just(Memory::Plain), Just(Memory::AnyOrder), Just(Memory::AnyOrder), Just(Memory::OneBuffer)],
        prop_oneof![1 => Just(0usize), 1 => 1..=140usize],
        prop_oneof![6 => Just((false, false)), 1 => Just((true, false)), 1 => Just((false, true))],
        prop::bool::weighted(0.2),
        any::<bool>(),
    );
    let cut = (
        prop::option::weighted(0.8, 1..=4u32),
        prop_oneof![1 => Just(None), 3 => Just(Some(1)), 2 => (2..=5u32).prop_map(Some)],
        prop::option::of(any::<bool>()),
        prop::sample::select(vec![1, 2, 3, 5, 132]),
        1..=7usize,
    );
    let numbers = (
        prop::bool::weighted(0.3),
        prop_oneof![3 => Just(None), 1 => prop::sample::select(vec![0.01f32, 0.3, 1.0]).prop_map(Some)],
        prop::bool::weighted(0.8),
        prop_oneof![
            8 => Just(Data::Plain),
            2 => Just(Data::Sharp),
            1 => prop::sample::select(vec![0.0, 1.0]).prop_map(Data::Equal),
            // Across a chunk of 128 keys: within what needs no rescaling, and far beyond.
            2 => prop::sample::select(vec![0.01, 0.04, 0.3]).prop_map(Data::Ramp),
        ],
        any::<u64>(),
    );
    (seen, sizes, layout, cut, numbers).prop_map(move |(seen, sizes, layout, cut, numbers)| {
        let (mut keys, queries, table, rules, lengths) = seen;
        let (mut batch, mut kv_heads, mut per_kv, dim) = sizes;
        let (memory, spare, (packed_keys, shared_keys), gathers, shared_lengths) = layout;
        let (groups, splits, pack_heads, sm_count, kv_heads_at_once) = cut;
        let (bounded, scale, lse, data, seed) = numbers;

        let fit = |grids: &mut Vec<Grid>| {
            while grids.iter().copied().map(tokens).sum::<usize>() > limits.tokens {
                grids.pop();
            }
        };
        fit(&mut keys);
        let (first, mut queries) = match queries {
            None => (0, keys.clone()),
            Some(none) if none.is_empty() => {
                (keys.len().saturating_sub(1), keys.iter().copied().last().into_iter().collect())
            }
            Some(others) => (0, others),
        };
        fit(&mut queries);
        let rules = (0..queries.len()).map(|q| {
            let of = |k: usize| match table {
                Table::BlockCausal if k <= q + first => Rule::Full,
                Table::BlockDiagonal if k == q + first => Rule::Full,
                Table::Any => match rules[q * MOST + k] {
                    Rule::ColumnCausal if queries[q] != keys[k] => Rule::Causal,
                    rule => rule,
                },
                _ => Rule::Hidden,
            };
            (0..keys.len()).map(of).collect()
        });
        let rules = rules.collect();
        let rows: usize = queries.iter().copied().map(tokens).sum();
        let pairs = rows.max(1) * keys.iter().copied().map(tokens).sum::<usize>().max(1);
        for size in [&mut batch, &mut kv_heads, &mut per_kv] {
            *size = (*size).min((limits.pairs / pairs).max(1));
        }
        while batch * kv_heads * per_kv * pairs > limits.pairs && batch * kv_heads * per_kv > 1 {
            *[&mut batch, &mut kv_heads, &mut per_kv].into_iter().max().unwrap() -= 1;
        }
        let lengths = lengths.into_iter().take(keys.len()).map(|length| length.or(packed_keys.then_some(0))).collect();
        let mut device = DeviceInfo::H200;
        // Half of L2 holds K and V of that many heads.
        let keys_and_values = 4 * dim * keys.iter().copied().map(tokens).sum::<usize>().max(1);
        (device.sm_count, device.l2_bytes) = (sm_count, (2 * kv_heads_at_once * keys_and_values) as i64);
        Case {
            queries,
            keys,
            lengths,
            rules,
            batch,
            heads: kv_heads * per_kv,
            kv_heads,
            dim,
            memory,
            spare,
            packed_keys,
            shared_keys,
            gathers,
            shared_lengths,
            groups,
            splits,
            pack_heads,
            bounded,
            scale: if data == Data::Sharp { Some(1.0) } else { scale },
            lse,
            data,
            variant: Variant::Hopper,
            device,
            seed,
        }
    })
}

impl Case {
    /// A table of segments that are queries and keys, one head of 64, everything else as plain as can be.
    pub fn table(segments: &[Grid], rule: impl Fn(usize, usize) -> Rule) -> Case {
        Case::cross(segments, segments, rule)
    }

    pub fn cross(queries: &[Grid], keys: &[Grid], rule: impl Fn(usize, usize) -> Rule) -> Case {
        Case {
            queries: queries.to_vec(),
            keys: keys.to_vec(),
            lengths: vec![None; keys.len()],
            rules: (0..queries.len()).map(|q| (0..keys.len()).map(|k| rule(q, k)).collect()).collect(),
            batch: 1,
            heads: 1,
            kv_heads: 1,
            dim: 64,
            memory: Memory::Plain,
            spare: 0,
            packed_keys: false,
            shared_keys: false,
            gathers: false,
            shared_lengths: false,
            groups: Some(1),
            splits: Some(1),
            pack_heads: None,
            bounded: false,
            scale: None,
            lse: true,
            data: Data::Plain,
            variant: Variant::Hopper,
            device: DeviceInfo::H200,
            seed: 7,
        }
    }

    /// The scales of VAR, n x n tokens each: a scale sees itself and those before it.
    pub fn var(scales: &[u32]) -> Case {
        let grids: Vec<Grid> = scales.iter().map(|&n| [1, n, n]).collect();
        Case::table(&grids, |q, k| if k <= q { Rule::Full } else { Rule::Hidden })
    }

    pub fn rows(&self) -> usize {
        self.queries.iter().copied().map(tokens).sum()
    }

    pub fn key_count(&self) -> usize {
        self.keys.iter().copied().map(tokens).sum()
    }

    pub fn visibility(&self) -> Visibility {
        let segment = |&[frames, height, width]: &Grid| Segment::video(frames, height, width);
        let queries: Vec<Segment> = self.queries.iter().map(segment).collect();
        let keys = self.keys.iter().zip(&self.lengths).map(|(grid, length)| match length {
            Some(index) => segment(grid).with_length(*index),
            None => segment(grid),
        });
        Visibility::new(&queries, &keys.collect::<Vec<_>>(), |q, k| self.rules[q][k]).unwrap()
    }

    /// `[rows, keys]`: whether a query may see a key, lengths left aside. Asked pair by pair.
    pub fn sees(&self) -> Vec<bool> {
        let mut sees = Vec::new();
        for (q, &queries) in self.queries.iter().enumerate() {
            for query in 0..tokens(queries) {
                for (k, &keys) in self.keys.iter().enumerate() {
                    let rule = self.rules[q][k];
                    sees.extend((0..tokens(keys)).map(|key| is_seen(rule, queries, query as u32, keys, key as u32)));
                }
            }
        }
        sees
    }

    pub fn problem<T: Float>(&self) -> Problem<T> {
        Problem::new(self)
    }
}

/// The rules, each from its own words in the documentation.
fn is_seen(rule: Rule, queries: Grid, query: u32, keys: Grid, key: u32) -> bool {
    let place =
        |[_, height, width]: Grid, token: u32| [token / (height * width), token / width % height, token % width];
    match rule {
        Rule::Hidden => false,
        Rule::Full => true,
        Rule::Causal => key <= query,
        Rule::ColumnCausal => {
            let ([t, y, x], [frame, row, column]) = (place(queries, query), place(keys, key));
            frame < t || (frame == t && (column < x || (column == x && row <= y)))
        }
        Rule::DiagonalCausal => place(keys, key).iter().sum::<u32>() <= place(queries, query).iter().sum::<u32>(),
        Rule::Window { frames, rows, columns } => {
            let (at, key) = (place(queries, query), place(keys, key));
            let reach = [frames, rows, columns];
            (0..3).all(|axis| {
                let centre = ((f64::from(at[axis]) + 0.5) * f64::from(keys[axis]) / f64::from(queries[axis])).floor();
                (f64::from(key[axis]) - centre).abs() <= f64::from(reach[axis])
            })
        }
    }
}

/// Where q, k or v is: a buffer, its first element there, strides of batch, row and head.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub buffer: usize,
    pub first: usize,
    pub len: usize,
    pub strides: [usize; 3],
}

impl Place {
    pub fn at(&self, b: usize, row: usize, head: usize) -> usize {
        self.first + [b, row, head].iter().zip(self.strides).map(|(i, stride)| i * stride).sum::<usize>()
    }
}

/// A case's data and layouts.
#[derive(Debug, Clone)]
pub struct Problem<T> {
    pub buffers: Vec<Vec<T>>,
    pub q: Place,
    pub k: Place,
    pub v: Place,
    pub out: Place,
    /// Strides of batch, head, row.
    pub lse: Place,
    /// `[index, batch, kv_head]`
    pub lengths: Vec<i32>,
    pub lengths_strides: [usize; 3],
    pub row_index: Vec<i32>,
    pub q_rows: usize,
    pub kv_offset: Vec<i32>,
    pub kv_rows: usize,
    pub bound: Option<f32>,
    pub scale: f32,
    /// [`Case::sees`].
    pub sees: Vec<bool>,
    /// The segment of each key, and the key's number there.
    pub key_places: Vec<(usize, usize)>,
}

pub fn poison<T: Float>() -> T {
    bytemuck::pod_read_unaligned(&[POISON_BYTE; 8][..size_of::<T>()])
}

/// Strides of three dimensions around `unit` elements, in a random order, with gaps of up to two `step`s; and the
/// length.
fn strided(rng: &mut StdRng, shape: [usize; 3], unit: usize, step: usize, any_order: bool) -> ([usize; 3], usize) {
    let mut order = [0, 1, 2];
    if any_order {
        order.shuffle(rng);
    }
    let gap = |rng: &mut StdRng| if any_order && rng.random_bool(0.5) { step * rng.random_range(0..3) } else { 0 };
    let mut strides = [0; 3];
    let mut stride = unit + gap(rng);
    for dim in order.into_iter().rev() {
        strides[dim] = stride;
        stride = stride * shape[dim].max(1) + gap(rng);
    }
    (strides, reach(shape, strides, unit))
}

pub fn reach(shape: [usize; 3], strides: [usize; 3], unit: usize) -> usize {
    if shape.contains(&0) {
        return 0;
    }
    shape.iter().zip(strides).map(|(n, stride)| (n - 1) * stride).sum::<usize>() + unit
}

impl<T: Float> Problem<T> {
    fn new(case: &Case) -> Self {
        let mut rng = StdRng::seed_from_u64(case.seed);
        let &Case { batch, heads, kv_heads, dim, .. } = case;
        let (rows, keys) = (case.rows(), case.key_count());
        let key_places: Vec<(usize, usize)> =
            case.keys.iter().enumerate().flat_map(|(s, &grid)| (0..tokens(grid)).map(move |key| (s, key))).collect();

        // Lengths that every segment of their index has.
        let count = case.lengths.iter().flatten().map(|&index| index as usize + 1).max().unwrap_or(0);
        let own_heads = if case.shared_lengths { 1 } else { kv_heads };
        let (mut lengths_strides, lengths_len) = strided(&mut rng, [count, batch, own_heads], 1, 1, true);
        let mut lengths = vec![-1; lengths_len];
        for index in 0..count {
            let named = case.keys.iter().zip(&case.lengths).filter(|(_, length)| **length == Some(index as u32));
            let most = named.map(|(&grid, _)| tokens(grid)).min().unwrap_or(0);
            for b in 0..batch {
                for g in 0..own_heads {
                    let at = index * lengths_strides[0] + b * lengths_strides[1] + g * lengths_strides[2];
                    lengths[at] = match rng.random_range(0..4) {
                        0 => 0,
                        1 => most as i32,
                        _ => rng.random_range(0..=most) as i32,
                    };
                }
            }
        }
        if case.shared_lengths {
            lengths_strides[2] = 0;
        }

        let q_rows = if case.gathers && rows > 0 { rng.random_range(1..=rows + 4) } else { rows };
        let row_index: Vec<i32> = if case.gathers {
            (0..batch * rows).map(|_| rng.random_range(0..q_rows) as i32).collect()
        } else {
            Vec::new()
        };

        let mut problem = Problem {
            buffers: Vec::new(),
            q: Place { buffer: 0, first: 0, len: 0, strides: [0; 3] },
            k: Place { buffer: 1, first: 0, len: 0, strides: [0; 3] },
            v: Place { buffer: 2, first: 0, len: 0, strides: [0; 3] },
            out: Place { buffer: 0, first: 0, len: 0, strides: [0; 3] },
            lse: Place { buffer: 0, first: 0, len: 0, strides: [0; 3] },
            lengths,
            lengths_strides,
            row_index,
            q_rows,
            kv_offset: Vec::new(),
            kv_rows: keys + case.spare,
            bound: None,
            scale: case.scale.unwrap_or(1.0 / (dim as f32).sqrt()),
            sees: case.sees(),
            key_places,
        };
        if case.packed_keys {
            // Entries one after the other, in a random order, with gaps.
            let mut order: Vec<usize> = (0..batch).collect();
            order.shuffle(&mut rng);
            problem.kv_offset = vec![0; batch];
            let mut row = 0;
            for b in order {
                row += rng.random_range(0..3);
                problem.kv_offset[b] = row as i32;
                let last = (0..keys).filter(|&key| (0..kv_heads).any(|g| problem.exists(case, b, g, key))).max();
                row += last.map_or(0, |last| last + 1);
            }
            problem.kv_rows = row + case.spare;
        }

        let any_order = case.memory != Memory::Plain;
        if case.memory == Memory::OneBuffer && !(case.packed_keys || case.shared_keys) {
            let all = heads + 2 * kv_heads;
            let row = all * dim + 8 * rng.random_range(0..3);
            let strides = [q_rows.max(problem.kv_rows) * row, row, dim];
            for (place, first, rows, heads) in [
                (&mut problem.q, 0, q_rows, heads),
                (&mut problem.k, heads * dim, problem.kv_rows, kv_heads),
                (&mut problem.v, (heads + kv_heads) * dim, problem.kv_rows, kv_heads),
            ] {
                let len = reach([batch, rows, heads], strides, dim);
                *place = Place { buffer: 0, first: first.min(len), len, strides };
            }
            problem.buffers = vec![vec![poison(); batch * strides[0]]];
        } else {
            let entries = if case.packed_keys || case.shared_keys { 1 } else { batch };
            for (place, shape) in [
                (&mut problem.q, [batch, q_rows, heads]),
                (&mut problem.k, [entries, problem.kv_rows, kv_heads]),
                (&mut problem.v, [entries, problem.kv_rows, kv_heads]),
            ] {
                (place.strides, place.len) = strided(&mut rng, shape, dim, 8, any_order);
                if any_order && shape[1] == 0 {
                    // Contiguous, heads first.
                    place.strides = [0, dim, 0];
                }
                problem.buffers.push(vec![poison(); place.len]);
            }
            if case.shared_keys {
                (problem.k.strides[0], problem.v.strides[0]) = (0, 0);
            }
        }
        (problem.out.strides, problem.out.len) = strided(&mut rng, [batch, rows, heads], dim, 8, any_order);
        (problem.lse.strides, problem.lse.len) = strided(&mut rng, [batch, heads, rows], 1, 1, any_order);

        // What is read gets numbers.
        let random = |rng: &mut StdRng| -> Vec<f32> { (0..dim).map(|_| rng.random_range(-2.0..2.0f32)).collect() };
        let unit = |vector: Vec<f32>| -> Vec<f32> {
            let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
            vector.iter().map(|x| x / norm).collect()
        };
        let axis = unit(random(&mut rng));
        let logit_side = |rng: &mut StdRng, key: Option<usize>| -> Vec<f32> {
            let times = if key.is_none() { 100.0 } else { 1.0 };
            match (case.data, key) {
                (Data::Plain, _) => random(rng),
                (Data::Equal(value), _) => vec![value; dim],
                (Data::Ramp(_), None) => vec![[1.0, -1.0][rng.random_range(0..2)]; dim],
                (Data::Ramp(slope), Some(key)) => vec![slope * key as f32 / (dim as f32).sqrt(); dim],
                (Data::Sharp, _) => {
                    let sign = [1.0, -1.0, 0.0][rng.random_range(0..3)];
                    let vector = if sign == 0.0 { unit(random(rng)) } else { axis.iter().map(|x| x * sign).collect() };
                    vector.iter().map(|x| x * times).collect()
                }
            }
        };
        for b in 0..batch {
            for row in 0..rows {
                for h in 0..heads {
                    let at = problem.q.at(b, problem.source(b, row, rows), h);
                    put(&mut problem.buffers[problem.q.buffer][at..], &logit_side(&mut rng, None));
                }
            }
            for key in (0..keys).filter(|&key| (0..rows).any(|row| problem.sees[row * keys + key])) {
                for g in 0..kv_heads {
                    if problem.exists(case, b, g, key) {
                        let (k, v) = (problem.k_at(case, b, key, g), problem.v_at(case, b, key, g));
                        put(&mut problem.buffers[problem.k.buffer][k..], &logit_side(&mut rng, Some(key)));
                        put(&mut problem.buffers[problem.v.buffer][v..], &random(&mut rng));
                    }
                }
            }
        }
        if case.bounded && T::DTYPE != DType::F16 {
            let most = problem.largest_logit(case);
            problem.bound = (most > 0.0 && most < 39.9).then_some(most as f32 * 1.0001 + 1e-3);
        }
        problem
    }

    /// Whether a key is within its segment's length.
    pub fn exists(&self, case: &Case, b: usize, g: usize, key: usize) -> bool {
        let (segment, token) = self.key_places[key];
        case.lengths[segment].is_none_or(|index| {
            let strides = self.lengths_strides;
            (token as i32) < self.lengths[index as usize * strides[0] + b * strides[1] + g * strides[2]]
        })
    }

    /// The row of q that a row is.
    pub fn source(&self, b: usize, row: usize, rows: usize) -> usize {
        self.row_index.get(b * rows + row).map_or(row, |&row| row as usize)
    }

    pub fn k_at(&self, case: &Case, b: usize, key: usize, g: usize) -> usize {
        self.key_at(&self.k, case, b, key, g)
    }

    pub fn v_at(&self, case: &Case, b: usize, key: usize, g: usize) -> usize {
        self.key_at(&self.v, case, b, key, g)
    }

    fn key_at(&self, place: &Place, case: &Case, b: usize, key: usize, g: usize) -> usize {
        if case.packed_keys { place.at(0, self.kv_offset[b] as usize + key, g) } else { place.at(b, key, g) }
    }

    pub fn q_of(&self, case: &Case, b: usize, row: usize, h: usize) -> &[T] {
        &self.buffers[self.q.buffer][self.q.at(b, self.source(b, row, case.rows()), h)..][..case.dim]
    }

    pub fn k_of(&self, case: &Case, b: usize, key: usize, g: usize) -> &[T] {
        &self.buffers[self.k.buffer][self.k_at(case, b, key, g)..][..case.dim]
    }

    pub fn v_of(&self, case: &Case, b: usize, key: usize, g: usize) -> &[T] {
        &self.buffers[self.v.buffer][self.v_at(case, b, key, g)..][..case.dim]
    }

    /// The magnitude of the largest scaled logit that is seen.
    fn largest_logit(&self, case: &Case) -> f64 {
        let (rows, keys) = (case.rows(), case.key_count());
        let mut most = 0f64;
        for b in 0..case.batch {
            for h in 0..case.heads {
                let g = h / (case.heads / case.kv_heads);
                for row in 0..rows {
                    let q = self.q_of(case, b, row, h);
                    for key in (0..keys).filter(|&key| self.sees[row * keys + key] && self.exists(case, b, g, key)) {
                        let k = self.k_of(case, b, key, g);
                        let dot: f64 =
                            q.iter().zip(k).map(|(q, k)| f64::from(q.to_f32()) * f64::from(k.to_f32())).sum();
                        most = most.max((dot * f64::from(self.scale)).abs());
                    }
                }
            }
        }
        most
    }

    /// Batch entry `b` alone; its output is contiguous.
    pub fn entry(&self, case: &Case, b: usize) -> (Case, Problem<T>) {
        let alone = Case { batch: 1, ..case.clone() };
        let &Case { heads, kv_heads, dim, .. } = case;
        let rows = case.rows();
        let of = |place: &Place, rows: usize, heads: usize| {
            let first = place.at(b, 0, 0);
            let len = reach([1, rows, heads], place.strides, dim);
            Place { first: if len == 0 { 0 } else { first }, len, ..*place }
        };
        let keys = |place: &Place| if case.packed_keys { *place } else { of(place, self.kv_rows, kv_heads) };
        let count = case.lengths.iter().flatten().map(|&index| index as usize + 1).max().unwrap_or(0);
        let [of_index, of_batch, of_head] = self.lengths_strides;
        let all =
            (0..count).flat_map(|index| (0..kv_heads).map(move |g| index * of_index + b * of_batch + g * of_head));
        let entry = Problem {
            q: of(&self.q, self.q_rows, heads),
            k: keys(&self.k),
            v: keys(&self.v),
            out: Place { first: 0, ..of(&self.out, rows, heads) },
            lse: Place { len: reach([1, heads, rows], self.lse.strides, 1), ..self.lse },
            lengths: all.map(|at| self.lengths[at]).collect(),
            lengths_strides: [kv_heads, kv_heads, 1],
            row_index: if case.gathers { self.row_index[b * rows..][..rows].to_vec() } else { Vec::new() },
            kv_offset: self.kv_offset.get(b).map(|&offset| vec![offset]).unwrap_or_default(),
            ..self.clone()
        };
        (alone, entry)
    }

    /// The bits of a row of the output, and of its log-sum-exp.
    pub fn row_bits(&self, case: &Case, ran: &Ran<T>, [b, row, h]: [usize; 3]) -> (Vec<u8>, Option<u32>) {
        let out = &ran.out[self.out.at(b, row, h)..][..case.dim];
        (bytemuck::cast_slice(out).to_vec(), case.lse.then(|| ran.lse[self.lse.at(b, h, row)].to_bits()))
    }

    pub fn builder(&self, case: &Case) -> ScaleAttentionBuilder<T> {
        let strides = |place: &Place| place.strides.map(|stride| stride as i64);
        let mut builder = ScaleAttention::<T>::builder(&case.visibility())
            .batch(case.batch)
            .heads(case.heads, case.kv_heads)
            .head_dim(case.dim)
            .variant(case.variant)
            .lengths_strides(self.lengths_strides.map(|stride| stride as i64));
        if case.packed_keys {
            builder = builder.packed_keys(self.kv_rows);
        } else if case.spare > 0 {
            builder = builder.kv_rows(self.kv_rows);
        }
        if case.gathers {
            builder = builder.gathered_rows(self.q_rows);
        }
        if case.memory != Memory::Plain || case.shared_keys {
            builder = builder.q_strides(strides(&self.q)).kv_strides(strides(&self.k), strides(&self.v));
            builder = builder.out_strides(strides(&self.out)).lse_strides(strides(&self.lse));
        }
        if let Some(groups) = case.groups {
            builder = builder.tiles_an_item(groups);
        }
        if let Some(splits) = case.splits {
            builder = builder.splits(splits);
        }
        if let Some(scale) = case.scale {
            builder = builder.softmax_scale(scale);
        }
        if let Some(bound) = self.bound {
            builder = builder.logit_bound(bound);
        }
        if let Some(pack) = case.pack_heads {
            builder = builder.pack_heads(pack);
        }
        builder
    }

    pub fn plan(&self, case: &Case) -> ScaleAttention<T> {
        self.builder(case).build(&case.device).unwrap_or_else(|error| panic!("{error}: {case:?}"))
    }
}

pub fn put<T: Float>(to: &mut [T], values: &[f32]) {
    for (to, &value) in to.iter_mut().zip(values) {
        *to = T::from_f32(value);
    }
}

/// A case's buffers on a device.
pub struct Loaded<T> {
    pub inputs: Vec<Buffer<T>>,
    pub out: Buffer<T>,
    pub lse: Option<Buffer<f32>>,
    pub schedule: Buffer<u32>,
    pub lengths: Buffer<i32>,
    pub row_index: Buffer<i32>,
    pub kv_offset: Buffer<i32>,
    pub workspace: Buffer<u8>,
    places: [Place; 3],
    /// Of out, lse, schedule, lengths, row_index, kv_offset, workspace.
    lens: [usize; 7],
}

/// What a run left behind.
#[derive(Debug, Clone)]
pub struct Ran<T> {
    pub out: Vec<T>,
    pub lse: Vec<f32>,
}

impl<T: Float> Ran<T> {
    /// To compare by: a gap is NaN, which is not equal to itself.
    pub fn bits(&self) -> [&[u8]; 2] {
        [bytemuck::cast_slice(&self.out), bytemuck::cast_slice(&self.lse)]
    }
}

impl<T: Float> Loaded<T> {
    pub fn new(device: &TestDevice, case: &Case, problem: &Problem<T>, plan: &ScaleAttention<T>) -> Self {
        Loaded {
            // 16 bytes off their alignment now and then.
            inputs: problem.buffers.iter().map(|data| Buffer::of(device, data, case.seed as usize % 2 * 8)).collect(),
            out: Buffer::poisoned(device, problem.out.len, case.seed as usize / 2 % 2 * 8),
            lse: case.lse.then(|| Buffer::poisoned(device, problem.lse.len, 0)),
            schedule: Buffer::of(device, plan.schedule().words(), 0),
            lengths: Buffer::of(device, &problem.lengths, 0),
            row_index: Buffer::of(device, &problem.row_index, 0),
            kv_offset: Buffer::of(device, &problem.kv_offset, 0),
            workspace: Buffer::poisoned(device, plan.workspace_bytes() as usize, 0),
            places: [problem.q, problem.k, problem.v],
            lens: [
                problem.out.len,
                problem.lse.len,
                plan.schedule().words().len(),
                problem.lengths.len(),
                problem.row_index.len(),
                problem.kv_offset.len(),
                plan.workspace_bytes() as usize,
            ],
        }
    }

    pub fn args(&mut self) -> ScaleAttentionArgs<'_, T> {
        self.args_short_of("")
    }

    /// With one operand an element too short.
    pub fn args_short_of(&mut self, operand: &str) -> ScaleAttentionArgs<'_, T> {
        let len = |of: &str, len: usize| if of == operand { len - 1 } else { len };
        let [q, k, v] = self.places;
        let input = |of, place: Place| self.inputs[place.buffer].input_from(place.first, len(of, place.len));
        ScaleAttentionArgs {
            q: input("q", q),
            k: input("k", k),
            v: input("v", v),
            out: self.out.output_of(len("out", self.lens[0])),
            lse: self.lse.as_mut().map(|lse| lse.output_of(len("lse", self.lens[1]))),
            schedule: self.schedule.input_of(len("schedule", self.lens[2])),
            lengths: Some(self.lengths.input_of(len("lengths", self.lens[3]))),
            row_index: Some(self.row_index.input_of(len("row_index", self.lens[4]))),
            kv_offset: Some(self.kv_offset.input_of(len("kv_offset", self.lens[5]))),
            workspace: Some(self.workspace.output_of(len("workspace", self.lens[6]))),
        }
    }

    pub fn read(&self) -> Ran<T> {
        // The others' canaries too.
        self.inputs.iter().for_each(|buffer| drop(buffer.read()));
        self.workspace.read();
        Ran { out: self.out.read(), lse: self.lse.as_ref().map(Buffer::read).unwrap_or_default() }
    }

    /// Nothing was written.
    pub fn assert_untouched(&self) {
        assert!(self.read().bits().concat().iter().all(|&byte| byte == POISON_BYTE), "something was written");
    }
}

/// Runs a case.
pub fn attend<T: Float>(device: &TestDevice, case: &Case, problem: &Problem<T>) -> Ran<T> {
    let plan = problem.plan(case);
    let mut loaded = Loaded::new(device, case, problem, &plan);
    let ran = plan.run(&device.stream(), loaded.args());
    ran.unwrap_or_else(|error| panic!("{error}: {case:?}"));
    loaded.read()
}
