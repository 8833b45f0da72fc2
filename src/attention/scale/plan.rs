//! Shapes, checks, and the choice of kernel and cut. Pure.

use core::marker::PhantomData;

use super::ScaleAttention;
use super::schedule::{self, Cut, Schedule};
use crate::attention::visibility::Visibility;
use crate::device::{Arch, DeviceInfo};
use crate::dtype::{DType, Float};
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::packed::Format;

const MOST_DIM: u64 = 128;
/// Works and rows are counted in 32 bits.
const MOST: u64 = (1 << 31) - 1;
/// Probabilities of bounded logits reach down to 2^(-2 * 40 * log2(e)), which f32 and bf16 still hold.
const MOST_BOUND: f32 = 40.0;
/// A split of fewer chunks of keys costs more than it gains.
const LEAST_CHUNKS_A_SPLIT: u32 = 4;
const MOST_SPLITS: u32 = 32;

/// Which kernel attends. They agree within the rounding of their sums; each is bitwise repeatable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Variant {
    /// The faster one for the device and the shape.
    #[default]
    Auto,
    /// `mma.sync` and `cp.async`: compute capability 8.0 and newer.
    Portable,
    /// `wgmma` and TMA: compute capability 9.0 alone.
    Hopper,
}

/// Describes an attention; [`ScaleAttentionBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct ScaleAttentionBuilder<T> {
    visibility: Visibility,
    batch: u64,
    heads: u64,
    kv_heads: u64,
    dim: u64,
    kv_rows: Option<u64>,
    q_rows: Option<u64>,
    packed_keys: bool,
    q: Option<[i64; 3]>,
    k: Option<[i64; 3]>,
    v: Option<[i64; 3]>,
    out: Option<[i64; 3]>,
    lse: Option<[i64; 3]>,
    lengths: Option<[i64; 3]>,
    scale: Option<f32>,
    logit_bound: Option<f32>,
    variant: Variant,
    groups: Option<u32>,
    splits: Option<u32>,
    pack_heads: Option<bool>,
    packed: Option<(Format, bool)>,
    numbers: Option<[[i64; 3]; 2]>,
    types: PhantomData<T>,
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident($field:ident: $type:ty);)*) => {$(
        $(#[$doc])*
        pub fn $name(mut self, $field: $type) -> Self {
            self.$field = Some($field);
            self
        }
    )*};
}

impl<T: Float> ScaleAttentionBuilder<T> {
    pub(super) fn new(visibility: &Visibility) -> Self {
        ScaleAttentionBuilder {
            visibility: visibility.clone(),
            batch: 1,
            heads: 1,
            kv_heads: 1,
            dim: 64,
            kv_rows: None,
            q_rows: None,
            packed_keys: false,
            q: None,
            k: None,
            v: None,
            out: None,
            lse: None,
            lengths: None,
            scale: None,
            logit_bound: None,
            variant: Variant::Auto,
            groups: None,
            splits: None,
            pack_heads: None,
            packed: None,
            numbers: None,
            types: PhantomData,
        }
    }

    /// `k` and `v` are packed, in [`Format::Fp8`] or [`Format::INT4`], as [`Pack`](crate::compression::Pack) packs rows with
    /// numbers of f32, which lie in the slots if `inline`; strides of `k` and `v` are then bytes, multiples of 16. For
    /// [`ScaleAttention::run_packed`]. Keys that were rotated meet queries that are rotated alike.
    pub fn packed(mut self, format: Format, inline: bool) -> Self {
        self.packed = Some((format, inline));
        self
    }

    /// Strides of the numbers of `k` and of `v` in elements, `[batch, row, head]`; contiguous `[batch, kv_rows, kv_heads, n]` if
    /// not given.
    pub fn numbers_strides(mut self, k: [i64; 3], v: [i64; 3]) -> Self {
        self.numbers = Some([k, v]);
        self
    }

    /// Batch entries; 1 if not given.
    pub fn batch(mut self, batch: usize) -> Self {
        self.batch = batch as u64;
        self
    }

    /// Heads of `q`, and of `k` and `v`: equal, or each of these serves as many of those (GQA, MQA).
    pub fn heads(mut self, heads: usize, kv_heads: usize) -> Self {
        (self.heads, self.kv_heads) = (heads as u64, kv_heads as u64);
        self
    }

    /// Elements of a head; 64 if not given.
    pub fn head_dim(mut self, dim: usize) -> Self {
        self.dim = dim as u64;
        self
    }

    /// Rows of `k` and `v` for each batch entry, if there are more than keys: a cache with room left.
    pub fn kv_rows(mut self, rows: usize) -> Self {
        self.kv_rows = Some(rows as u64);
        self
    }

    /// `k` and `v` are `[rows, kv_heads, dim]` for the whole batch, and the keys of an entry begin at its `kv_offset`: prompts
    /// of different length one after the other. Use with [`Segment::with_length`](crate::attention::Segment::with_length).
    pub fn packed_keys(mut self, rows: usize) -> Self {
        (self.kv_rows, self.packed_keys) = (Some(rows as u64), true);
        self
    }

    /// Row i of the call is row `row_index[b, i]` of `q_rows` rows of `q`: pruned queries (FastVAR). `out` stays in the order
    /// of the call.
    pub fn gathered_rows(mut self, q_rows: usize) -> Self {
        self.q_rows = Some(q_rows as u64);
        self
    }

    /// Strides of `k` in elements, `[batch, row, head]`, and of `v`: contiguous `[batch, kv_rows, kv_heads, dim]` if not given.
    /// A batch stride of 0 is one `k` for all entries.
    pub fn kv_strides(mut self, k: [i64; 3], v: [i64; 3]) -> Self {
        (self.k, self.v) = (Some(k), Some(v));
        self
    }

    setters! {
        /// Strides of `q` in elements, `[batch, row, head]`; contiguous `[batch, q_rows, heads, dim]` if not given. A batch
        /// stride of 0 is one `q` for all entries.
        q_strides(q: [i64; 3]);
        /// Strides of `out` in elements, `[batch, row, head]`; contiguous `[batch, rows, heads, dim]` if not given.
        out_strides(out: [i64; 3]);
        /// Strides of `lse` in elements, `[batch, head, row]`; contiguous if not given.
        lse_strides(lse: [i64; 3]);
        /// Strides of `lengths` in elements, `[length, batch, kv_head]`; contiguous if not given. A head stride of 0 is one
        /// length for all heads of a batch entry.
        lengths_strides(lengths: [i64; 3]);
        /// What the logits are multiplied by; 1 / sqrt(dim) if not given. 1 for models that normalise q and k.
        softmax_scale(scale: f32);
        /// The caller vouches that no scaled logit exceeds this in magnitude, as with l2-normalised q and k, where it is the
        /// head's multiplier: then no maximum is looked for at first. For bf16, at most 40. A logit beyond it is no error;
        /// rows whose logits are all 80 below it lose precision.
        logit_bound(logit_bound: f32);
        /// Forces how many tiles of 64 rows share their keys: 1, 2 or 3; beyond a head_dim of 64 1, 2, or 4 in a pair of thread
        /// blocks, of packed caches 1 or 2; 1 for [`Variant::Portable`].
        tiles_an_item(groups: u32);
        /// Forces into how many parts the keys are split: 1 to 32.
        splits(splits: u32);
        /// Forces whether the heads of one kv head share tiles of rows.
        pack_heads(pack_heads: bool);
    }

    /// Forces the kernel.
    pub fn variant(mut self, variant: Variant) -> Self {
        self.variant = variant;
        self
    }

    /// Checks the description and makes the schedule.
    ///
    /// # Errors
    /// [`Error::Size`] for a dim of 0 or beyond 128, heads of 0, more than 2^31 - 1 rows, works or keys, fewer `kv_rows` than
    /// keys, a bound out of range, or forced values out of range; [`Error::Unsupported`] for a dim that is no multiple of 8,
    /// heads that are no multiple of `kv_heads`, a scale that is not positive, a bound for f16, packed keys without a length,
    /// a packed format or head_dim that there is no kernel for, or a kernel the device has not; [`Error::Stride`] for strides that are negative, no multiples of 8, or let outputs
    /// overlap; [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<ScaleAttention<T>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        let refuse = |arg, what| Err(Error::Unsupported { arg, what });
        let visibility = &self.visibility;
        let (rows, keys) = (u64::from(visibility.query_count()), u64::from(visibility.key_count()));
        size("head_dim", self.dim, 1, MOST_DIM)?;
        if !self.dim.is_multiple_of(8) {
            return refuse("head_dim", "multiples of 8 up to 128");
        }
        size("heads", self.heads, 1, MOST)?;
        size("kv_heads", self.kv_heads, 1, self.heads)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            return refuse("kv_heads", "a divisor of heads");
        }
        size("batch", self.batch, 0, MOST)?;
        let kv_rows = self.kv_rows.unwrap_or(keys);
        size("kv_rows", kv_rows, if self.packed_keys { 0 } else { keys }, MOST)?;
        let q_rows = self.q_rows.unwrap_or(rows);
        size("q_rows", q_rows, u64::from(self.q_rows.is_some() && rows > 0), MOST)?;
        let length_count = visibility.length_count();
        size("lengths", u64::from(length_count), 0, 1 << 16)?;
        if self.packed_keys && visibility.keys().iter().any(|segment| segment.length().is_none()) {
            return refuse("packed_keys", "every segment of keys with a length");
        }
        let scale = self.scale.unwrap_or(1.0 / (self.dim as f32).sqrt());
        if !(scale > 0.0 && scale.is_finite()) {
            return refuse("softmax_scale", "finite and positive");
        }
        if let Some(bound) = self.logit_bound {
            if !(bound > 0.0 && bound <= MOST_BOUND) {
                return refuse("logit_bound", "positive, at most 40");
            }
            if T::DTYPE == DType::F16 {
                return refuse(
                    "logit_bound",
                    "not for f16, whose least numbers are too large for probabilities below it",
                );
            }
        }

        let shape = |rows, heads| [self.batch, rows, heads, self.dim];
        let layout = |arg, shape, strides: Option<[i64; 3]>| -> Result<Layout<4>> {
            let layout = match strides {
                None => Layout::contiguous(shape),
                Some([batch, row, head]) => Layout::strided(shape, [batch, row, head, 1]),
            };
            for (dim, &got) in layout.strides()[..3].iter().enumerate() {
                // Pieces of 16 bytes; the tensor copies of the Hopper kernel reach 2^40 bytes.
                if got < 0 || got % 8 != 0 || got >= 1 << 38 {
                    return Err(Error::Stride { arg, dim, got, need: "multiples of 8, not negative, below 2^38" });
                }
            }
            Ok(layout)
        };
        let q = layout("q", shape(q_rows, self.heads), self.q)?;
        let kv_shape = [if self.packed_keys { 1 } else { self.batch }, kv_rows, self.kv_heads, self.dim];
        let mut slot_shape = kv_shape;
        if let Some((format, inline)) = self.packed {
            if ![Format::Fp8, Format::INT4].contains(&format) {
                return refuse("format", "Fp8 and INT4");
            }
            if ![64, 96, 128].contains(&self.dim) {
                return refuse("head_dim", "64, 96 and 128 of packed keys and values");
            }
            let dim = self.dim as usize;
            slot_shape[3] = if inline { format.inline_bytes(dim) } else { format.code_bytes(dim) } as u64;
        }
        let k = layout("k", slot_shape, self.k)?;
        let v = layout("v", slot_shape, self.v)?;
        let numbers_shape = [kv_shape[0], kv_shape[1], kv_shape[2], self.packed.map_or(0, |(f, _)| f.numbers() as u64)];
        let numbers = |strides: Option<[i64; 3]>| {
            strides.map_or(Layout::contiguous(numbers_shape), |[b, r, h]| Layout::strided(numbers_shape, [b, r, h, 1]))
        };
        let numbers = [numbers(self.numbers.map(|n| n[0])), numbers(self.numbers.map(|n| n[1]))];
        if self.packed.is_some() {
            for (arg, layout, multiple) in [
                ("k", &k, 16),
                ("v", &v, 16),
                ("k_numbers", &numbers[0], numbers_shape[3] as i64),
                ("v_numbers", &numbers[1], numbers_shape[3] as i64),
            ] {
                for (dim, &got) in layout.strides()[..3].iter().enumerate() {
                    if got % multiple != 0 {
                        return Err(Error::Stride {
                            arg,
                            dim,
                            got,
                            need: "packed: multiples of 16 bytes, whole numbers",
                        });
                    }
                }
            }
        }
        for (arg, layout) in [("q", &q), ("k", &k), ("v", &v)] {
            // A tensor copy may have no stride of 0; the batch's is left out of it. Of no rows there is no copy.
            let copied = !layout.shape().contains(&0);
            for dim in [1, 2] {
                if copied && layout.shape()[dim] > 1 && layout.strides()[dim] == 0 {
                    return Err(Error::Stride { arg, dim, got: 0, need: "of rows and of heads not 0" });
                }
            }
        }
        let out = layout("out", shape(rows, self.heads), self.out)?;
        out.require_disjoint("out")?;
        let lse_shape = [self.batch, self.heads, rows];
        let lse = self.lse.map_or(Layout::contiguous(lse_shape), |strides| Layout::strided(lse_shape, strides));
        let lse_len = lse.required_len("lse")?;
        lse.require_disjoint("lse")?;
        let lengths_shape = [u64::from(length_count), self.batch, self.kv_heads];
        let lengths =
            self.lengths.map_or(Layout::contiguous(lengths_shape), |strides| Layout::strided(lengths_shape, strides));
        let row_index_shape = [if self.q_rows.is_some() { self.batch } else { 0 }, rows];
        let row_index = Layout::contiguous(row_index_shape);

        let hopper_can = device.arch == (Arch { major: 9, minor: 0 });
        // Of one tile a head, the portable kernel has several blocks a multiprocessor: measured, it ends first, and where
        // there are many heads also with a few more keys.
        let many = self.dim <= 64 && self.batch * self.heads >= 4 * device.sm_count.max(1) as u64;
        let small = rows <= 64 && keys <= if many { 160 } else { 64 } && self.groups.is_none();
        let variant = match self.variant {
            Variant::Auto if hopper_can && !small => Variant::Hopper,
            Variant::Auto => Variant::Portable,
            Variant::Hopper if !hopper_can => {
                return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_90 for Variant::Hopper" });
            }
            variant => variant,
        };
        let sms = device.sm_count.max(1) as u32;
        let per_kv = (self.heads / self.kv_heads) as u32;
        // Packed tiles pay where the rows of a head alone would leave most of a tile empty.
        let pack_heads = self.pack_heads.unwrap_or(per_kv > 1 && rows * u64::from(per_kv) <= 128 && rows % 64 != 0);
        let pack = if pack_heads { per_kv } else { 1 };
        size("rows", rows * u64::from(pack), 0, MOST)?;
        let heads_taken = self.batch * (self.heads / u64::from(pack));
        let tiles = u64::from(schedule::tile_count(visibility, pack));
        size(
            "batch * heads * rows",
            heads_taken.saturating_mul(tiles.max(1)).saturating_mul(u64::from(MOST_SPLITS)),
            0,
            MOST,
        )?;
        let possible: &[u32] = match (variant, self.dim) {
            (Variant::Portable, _) => &[1],
            (_, ..=64) => &[1, 2, 3],
            // A pair of blocks would unpack all twice.
            _ if self.packed.is_some() => &[1, 2],
            _ => &[1, 2, 4],
        };
        if let Some(groups) = self.groups {
            size("tiles_an_item", u64::from(groups), 1, u64::from(possible[possible.len() - 1]))?;
            if !possible.contains(&groups) {
                return refuse(
                    "tiles_an_item",
                    "1, 2 or 3; beyond a head_dim of 64, 1, 2 or 4, of packed caches 1 or 2",
                );
            }
        }
        let mut schedule = possible
            .iter()
            .filter(|&&groups| self.groups.is_none_or(|forced| groups == forced))
            .map(|&groups| schedule::schedule(visibility, Cut { groups, splits: 1, pack }))
            .min_by_key(|schedule| estimated_cycles(schedule, heads_taken, self.dim, sms))
            .expect("there is a candidate");
        let mut cut = schedule.cut();
        cut.splits = match self.splits {
            Some(splits) => {
                size("splits", u64::from(splits), 1, u64::from(MOST_SPLITS))?;
                splits
            }
            None => choose_splits(&schedule, heads_taken, sms / cut.pair()),
        };
        if cut.splits > 1 {
            schedule = schedule::schedule(visibility, cut);
        }
        let works = heads_taken * u64::from(schedule.items());
        size("batch * heads * items", works, 0, MOST)?;
        // Keys of the heads in work at once should stay in L2 until all of their items are done.
        let kv_bytes = 4 * keys.max(1) * if self.packed.is_some() { slot_shape[3] / 2 } else { self.dim };
        let kv_heads_at_once = (device.l2_bytes.max(0) as u64 / 2 / kv_bytes).max(1);
        let section = kv_heads_at_once.saturating_mul(u64::from(per_kv / pack));
        let section = if section >= heads_taken { 0 } else { section as u32 };

        let out_len = out.required_len("out")?;
        let rows_of_splits = u64::from(cut.splits) * self.batch * self.heads * rows;
        let workspace_bytes =
            if cut.splits > 1 { (rows_of_splits * self.dim * 4).next_multiple_of(16) + rows_of_splits * 4 } else { 0 };
        let mut plan = Plan {
            q_len: q.required_len("q")?,
            k_len: k.required_len("k")?,
            v_len: v.required_len("v")?,
            numbers_len: match self.packed {
                Some((_, false)) => [numbers[0].required_len("k_numbers")?, numbers[1].required_len("v_numbers")?],
                _ => [0; 2],
            },
            packed: self.packed,
            numbers,
            out_len,
            lse_len,
            lengths_len: lengths.required_len("lengths")?,
            row_index_len: row_index.required_len("row_index")?,
            kv_offset_len: if self.packed_keys { self.batch } else { 0 },
            q,
            k,
            v,
            out,
            lse,
            lengths,
            row_index,
            length_count,
            packed_keys: self.packed_keys,
            gathers: self.q_rows.is_some(),
            scale,
            logit_bound: self.logit_bound.unwrap_or(0.0),
            variant,
            blocks: cut.pair() * works.min(u64::from((sms / cut.pair()).max(1))) as u32,
            section,
            workspace_bytes,
            useful_flops: (4 * self.dim * self.batch * self.heads).saturating_mul(visibility.visible_pairs()),
            schedule,
            visibility: self.visibility,
        };
        if out_len == 0 {
            // What nothing reaches need not be there.
            plan.q_len = 0;
            plan.k_len = 0;
            plan.v_len = 0;
            plan.numbers_len = [0; 2];
            plan.lengths_len = 0;
            plan.row_index_len = 0;
            plan.kv_offset_len = 0;
        }
        Ok(ScaleAttention { inner: plan, types: PhantomData })
    }
}

/// Cycles that the Hopper kernel takes for all works of a schedule: a model fitted to an H200.
fn estimated_cycles(schedule: &Schedule, heads: u64, dim: u64, sms: u32) -> u64 {
    const MOST_SIMULATED: u64 = 1 << 14;
    /// More, for a chunk with a mask.
    const MASK: u64 = 600;
    // Of a block or a pair, for a work and for each chunk of it.
    let (work, chunk) = match (dim, schedule.groups()) {
        (..=64, 1) => (1830, 1570),
        (..=64, 2) => (2560, 1960),
        (..=64, _) => (3490, 2430),
        (_, 1) => (2330, 2110),
        (_, 2) => (4450, 2470),
        // For 160 keys. A pair reads L2 half as much, which leaves power for a higher clock.
        _ => (6900, 2880),
    };
    let sms = (sms / schedule.cut().pair()).max(1);
    let costs: Vec<u64> = schedule
        .lengths()
        .map(|(chunks, masked)| work + chunk * u64::from(chunks) + MASK * u64::from(masked))
        .collect();
    let blocks = u64::from(sms);
    if costs.len() as u64 * heads > MOST_SIMULATED {
        return costs.iter().sum::<u64>() * heads / blocks + costs[0] / 2;
    }
    // Works go to the blocks back and forth.
    let mut loads = vec![0u64; sms as usize];
    for (i, cost) in costs.iter().flat_map(|&cost| (0..heads).map(move |_| cost)).enumerate() {
        let (round, at) = (i as u64 / blocks, i as u64 % blocks);
        loads[if round % 2 == 0 { at } else { blocks - 1 - at } as usize] += cost;
    }
    loads.into_iter().max().unwrap_or(0)
}

/// Splits fill idle multiprocessors, as long as each has a few chunks.
fn choose_splits(schedule: &Schedule, heads: u64, sms: u32) -> u32 {
    let works = heads * u64::from(schedule.items());
    if works == 0 || works * 2 > u64::from(sms) {
        return 1;
    }
    let idle = (u64::from(sms) / works) as u32;
    idle.min(schedule.longest() / LEAST_CHUNKS_A_SPLIT).clamp(1, MOST_SPLITS)
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    pub(super) visibility: Visibility,
    pub(super) q: Layout<4>,
    pub(super) k: Layout<4>,
    pub(super) v: Layout<4>,
    pub(super) out: Layout<4>,
    /// `[batch, heads, rows]`.
    pub(super) lse: Layout<3>,
    /// `[lengths, batch, kv_heads]`.
    pub(super) lengths: Layout<3>,
    /// `[batch, rows]`.
    pub(super) row_index: Layout<2>,
    pub(super) q_len: u64,
    pub(super) k_len: u64,
    pub(super) v_len: u64,
    /// Of k and v; 0 where they are inline.
    pub(super) numbers_len: [u64; 2],
    /// Of packed k and v, and whether numbers are inline. Layouts of k and v are then of slots, in bytes.
    pub(super) packed: Option<(Format, bool)>,
    /// `[batch, kv_rows, kv_heads, n]`.
    pub(super) numbers: [Layout<4>; 2],
    pub(super) out_len: u64,
    pub(super) lse_len: u64,
    pub(super) lengths_len: u64,
    pub(super) row_index_len: u64,
    pub(super) kv_offset_len: u64,
    pub(super) length_count: u32,
    pub(super) packed_keys: bool,
    pub(super) gathers: bool,
    pub(super) scale: f32,
    /// 0: none.
    pub(super) logit_bound: f32,
    pub(super) variant: Variant,
    pub(super) blocks: u32,
    pub(super) section: u32,
    pub(super) workspace_bytes: u64,
    pub(super) useful_flops: u64,
    pub(super) schedule: Schedule,
}

// The floats of a plan are finite.
impl Eq for Plan {}
impl core::hash::Hash for Plan {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.schedule.hash(state);
        (self.q, self.k, self.v, self.out, self.lse, self.packed, self.numbers).hash(state);
        (self.scale.to_bits(), self.logit_bound.to_bits(), self.variant).hash(state);
    }
}
