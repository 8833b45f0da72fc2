//! Shapes, checks and the cut of the work. Pure.

use core::marker::PhantomData;
use std::sync::Arc;

use super::{MultiScale, PhiTable, Token, TokenKind};
use crate::device::{Arch, DeviceInfo};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::plan::Traffic;

/// Scales that the kernels take.
pub(super) const MOST_SCALES: usize = crate::ffi::NXS_MAX_SCALES as usize;
const MOST_SIZE: u64 = 1024;
const MOST_CHANNELS: u64 = 256;
/// With a phi: the sums of a pixel's neighbourhood live on the host's stack.
pub(super) const MOST_PHI_CHANNELS: u64 = 128;
/// Blocks along y and z of a grid.
const MOST_BATCH: u64 = 65_535;
/// Partial sums of a phi: input channels in so many parts.
const PARTS: u64 = 8;

/// How the tokens of a scale become a map of the full size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Up {
    /// `F.interpolate(mode="bicubic")`: a = -0.75, without antialiasing (VAR).
    #[default]
    Bicubic,
    /// `F.interpolate(mode="bilinear")`, which trilinear is for single frames (Infinity).
    Bilinear,
}

/// What the next scale reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Next {
    /// The running map by `F.interpolate(mode="area")`: adaptive average pooling (VAR, HART).
    #[default]
    Area,
    /// The running map by `F.interpolate(mode="bilinear")`: samples of two by two pixels, whatever the ratio
    /// (Infinity).
    Bilinear,
    /// The tokens of the scale themselves, resized to the next scale as [`Up`] says; scales do not add up, and the
    /// map is that of the last one (FlexVAR).
    Tokens,
}

/// Describes a multi-scale quantizer; [`MultiScaleBuilder::build`] makes the plan.
#[derive(Debug, Clone)]
pub struct MultiScaleBuilder<T, O> {
    channels: u64,
    size: (u64, u64),
    schedule: Vec<(usize, usize)>,
    batch: u64,
    entries: u64,
    phi: Option<PhiTable>,
    last_phi: bool,
    up: Up,
    next: Next,
    repeat: u64,
    patch: u64,
    bit_scale: Option<f32>,
    programmatic: bool,
    types: PhantomData<(T, O)>,
}

impl<T: Token, O: Float> MultiScaleBuilder<T, O> {
    pub(super) fn new(channels: usize, size: (usize, usize), schedule: &[(usize, usize)]) -> Self {
        MultiScaleBuilder {
            channels: channels as u64,
            size: (size.0 as u64, size.1 as u64),
            schedule: schedule.to_vec(),
            batch: 1,
            entries: 0,
            phi: None,
            last_phi: true,
            up: Up::default(),
            next: Next::default(),
            repeat: 1,
            patch: 1,
            bit_scale: None,
            programmatic: true,
            types: PhantomData,
        }
    }

    /// Images; 1 if not given.
    pub fn batch(mut self, batch: usize) -> Self {
        self.batch = batch as u64;
        self
    }

    /// Rows of the codebook; needed where tokens are codes.
    pub fn entries(mut self, entries: usize) -> Self {
        self.entries = entries as u64;
        self
    }

    /// Every scale's map goes through the phi that the table names; without, through none.
    pub fn phi(mut self, table: PhiTable) -> Self {
        self.phi = Some(table);
        self
    }

    /// False: the last scale's map goes through no phi (HART's generator). True if not given.
    pub fn last_phi(mut self, last_phi: bool) -> Self {
        self.last_phi = last_phi;
        self
    }

    /// How maps are made larger; bicubic if not given.
    pub fn up(mut self, up: Up) -> Self {
        self.up = up;
        self
    }

    /// What the next scale reads; the area average if not given.
    pub fn next(mut self, next: Next) -> Self {
        self.next = next;
        self
    }

    /// How often the next scale's input is written, the repeats one after the other: 2 for classifier-free guidance.
    /// 1 if not given.
    pub fn repeat(mut self, repeat: usize) -> Self {
        self.repeat = repeat as u64;
        self
    }

    /// 2: a token holds 2 x 2 pixels (Infinity's spatial patchify), element `c * 4 + dy * 2 + dx`; the map is twice
    /// the schedule's sizes. 1 if not given.
    pub fn patch(mut self, patch: usize) -> Self {
        self.patch = patch as u64;
        self
    }

    /// The magnitude that a bit stands for; 1 / sqrt(channels) if not given. (With a patch, channels of the map.)
    pub fn bit_scale(mut self, scale: f32) -> Self {
        self.bit_scale = Some(scale);
        self
    }

    /// Whether kernels may be scheduled before the one before them on the stream has ended, for which they then wait
    /// (programmatic dependent launch; sm_90 only). True if not given.
    pub fn programmatic(mut self, programmatic: bool) -> Self {
        self.programmatic = programmatic;
        self
    }

    /// Checks the description.
    ///
    /// # Errors
    /// [`Error::Size`] for `channels` outside 1 to 256 (with a phi 128), a map or scale outside 1 to 1024, `scales`
    /// outside 1 to 32, a batch beyond 65535, a `repeat` or `patch` other than 1 or 2, `entries` beyond 2^31 - 1 or
    /// none where tokens are codes, `last_scale` of another size than the map, a scale larger than the map, a phi
    /// table of another length; [`Error::Unsupported`] for a bit scale that is not finite, a patch of codes, a phi
    /// whose working set no block's shared memory holds, or that goes with [`Next::Tokens`];
    /// [`Error::UnsupportedDevice`] below compute capability 8.0.
    pub fn build(self, device: &DeviceInfo) -> Result<MultiScale<T, O>> {
        if device.arch < (Arch { major: 8, minor: 0 }) {
            return Err(Error::UnsupportedDevice { have: Some(device.arch), need: "sm_80 and newer" });
        }
        let size = |arg, got, min, max| {
            if (min..=max).contains(&got) { Ok(()) } else { Err(Error::Size { arg, got, min, max }) }
        };
        let refuse = |arg, what| Err(Error::Unsupported { arg, what });
        let (height, width) = self.size;
        size("channels", self.channels, 1, if self.phi.is_some() { MOST_PHI_CHANNELS } else { MOST_CHANNELS })?;
        size("height", height, 1, MOST_SIZE)?;
        size("width", width, 1, MOST_SIZE)?;
        size("batch", self.batch, 0, MOST_BATCH)?;
        size("scales", self.schedule.len() as u64, 1, MOST_SCALES as u64)?;
        size("repeat", self.repeat, 1, 2)?;
        size("patch", self.patch, 1, 2)?;
        let mut scales = Vec::with_capacity(self.schedule.len());
        let mut first = 0;
        for &(h, w) in &self.schedule {
            let (h, w) = (h as u64, w as u64);
            size("scale height", h, 1, height / self.patch)?;
            size("scale width", w, 1, width / self.patch)?;
            scales.push(Scale { height: h * self.patch, width: w * self.patch, first, tokens: h * w });
            first += h * w;
        }
        let last = scales.last().expect("at least one");
        size("last_scale height", last.height, height, height)?;
        size("last_scale width", last.width, width, width)?;
        if T::KIND == TokenKind::Codes {
            size("entries", self.entries, 1, i32::MAX as u64)?;
            if self.patch != 1 {
                return refuse("patch", "tokens that are codes are whole pixels");
            }
        }
        if let Some(table) = &self.phi {
            size("phi table", table.0.len() as u64, scales.len() as u64, scales.len() as u64)?;
            if self.next == Next::Tokens {
                return refuse("phi", "scales that do not add up have none");
            }
        }
        let bit_scale = self.bit_scale.unwrap_or((1.0 / (self.channels as f64).sqrt()) as f32);
        if !bit_scale.is_finite() {
            return refuse("bit_scale", "a finite number");
        }
        let phis = self.phi.as_ref().map_or(0, PhiTable::phis);
        let mut phi: Vec<i8> = match &self.phi {
            Some(table) => table.0.iter().map(|&phi| phi as i8).collect(),
            None => vec![-1; scales.len()],
        };
        if !self.last_phi {
            *phi.last_mut().expect("at least one") = -1;
        }
        let mut plan = Plan {
            channels: self.channels,
            height,
            width,
            batch: self.batch,
            entries: self.entries,
            tokens: first,
            scales: scales.into(),
            phi: phi.into(),
            phis,
            up: self.up,
            next: self.next,
            repeat: self.repeat,
            patch: self.patch,
            bit_scale: bit_scale.to_bits(),
            cut: Cut::default(),
            rows_fit: false,
            sm_count: device.sm_count.max(1) as u64,
            // Later GPUs run the PTX of sm_80, which knows neither clusters nor programmatic launches.
            most_splits: if device.arch.major == 9 { 8 } else { 1 },
            programmatic: self.programmatic && device.arch.major == 9,
        };
        plan.cut = plan.cut_for(device)?;
        plan.rows_fit = plan.rows_smem() <= device.smem_per_block.max(0) as u64;
        if plan.next == Next::Tokens && !plan.rows_fit {
            return refuse("channels", "a row of tokens must fit in a block's shared memory");
        }
        Ok(MultiScale { inner: plan, types: PhantomData })
    }
}

/// One scale, in pixels of its map; its tokens are counted over the schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Scale {
    pub(super) height: u64,
    pub(super) width: u64,
    pub(super) first: u64,
    pub(super) tokens: u64,
}

/// How the kernel of whole channels cuts its work up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Cut {
    /// Channels that a block owns: a multiple of 4.
    pub group: u64,
    /// Rows of the map that it works on at a time: even.
    pub band: u64,
    /// Whether what the next scale is made from stays in shared memory.
    pub plane_shared: bool,
    /// Blocks of a cluster that take turns at the bands; 1 where there are no clusters.
    pub blocks: u64,
    /// Bytes of shared memory a block.
    pub shared_bytes: u64,
}

/// The plan behind the types.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) channels: u64,
    pub(super) height: u64,
    pub(super) width: u64,
    pub(super) batch: u64,
    pub(super) entries: u64,
    /// Of all scales.
    pub(super) tokens: u64,
    pub(super) scales: Arc<[Scale]>,
    /// Of each scale, or -1.
    pub(super) phi: Arc<[i8]>,
    pub(super) phis: u64,
    pub(super) up: Up,
    pub(super) next: Next,
    pub(super) repeat: u64,
    pub(super) patch: u64,
    bit_scale: u32,
    pub(super) cut: Cut,
    /// A row of the widest scale fits where the kernel of rows keeps it.
    pub(super) rows_fit: bool,
    sm_count: u64,
    /// Blocks of a cluster that a search may take; 1 where there are no clusters.
    most_splits: u64,
    pub(super) programmatic: bool,
}

impl Plan {
    pub(super) fn bit_scale(&self) -> f32 {
        f32::from_bits(self.bit_scale)
    }

    /// Elements of a token that is not a code.
    pub(super) fn token_width(&self) -> u64 {
        self.channels * self.patch * self.patch
    }

    pub(super) fn map_len(&self) -> u64 {
        self.batch * self.channels * self.height * self.width
    }

    pub(super) fn phi_len(&self) -> u64 {
        self.phis * super::phi::packed_len(self.channels as usize) as u64
    }

    /// Tokens of the inputs of scales 1 and up: what teacher forcing reads.
    pub(super) fn input_tokens(&self) -> u64 {
        self.tokens - self.scales[0].tokens
    }

    fn taps(&self) -> u64 {
        match self.up {
            Up::Bicubic => 4,
            Up::Bilinear => 2,
        }
    }

    /// Shared memory of the kernel of whole channels, as its launcher counts it; the plane not among it.
    fn owner_smem(&self, group: u64, band: u64) -> u64 {
        let (channels4, width4) = (self.channels.next_multiple_of(4), self.width.next_multiple_of(4));
        let mut bytes = (self.height * 20).next_multiple_of(16);
        let (mut work, mut conv) = (0, false);
        for (scale, &phi) in self.scales.iter().zip(self.phi.iter()) {
            let phi = phi >= 0;
            conv |= phi;
            let (rows, channels) = if phi { (band + 2, channels4) } else { (band, group) };
            let copy = (scale.height, scale.width) == (self.height, self.width);
            let rows = if copy { rows } else { ((rows - 1) * scale.height).div_ceil(self.height) + self.taps() };
            work = work.max(rows.min(scale.height) * scale.width * (channels + 4) * 4);
        }
        if conv {
            let stride = if width4 == 16 { 24 } else { width4 + 4 };
            let plane = (band + 2) * stride;
            let plane = if plane.is_multiple_of(8) { plane + 4 } else { plane };
            bytes += group / 4 * (9 * self.channels + 1) * 16 + channels4 * plane * 4;
            work = work.max(PARTS * 16 * band * width4);
        }
        bytes + work
    }

    fn cut_for(&self, device: &DeviceInfo) -> Result<Cut> {
        let most = device.smem_per_block.max(0) as u64;
        let channels4 = self.channels.next_multiple_of(4);
        // Fewer channels a block than that fill no more multiprocessors.
        let mut group = 4;
        while group < channels4 && self.batch * channels4.div_ceil(group) > device.sm_count.max(1) as u64 {
            group *= 2;
        }
        let even_height = self.height.next_multiple_of(2);
        let conv = self.phi.iter().any(|&phi| phi >= 0);
        // With a phi: a tile of 2 x 4 pixels and an eighth of the inputs for each of 256 threads.
        let wanted =
            if conv { 256u64.div_ceil(self.width.next_multiple_of(4)).next_multiple_of(2) } else { even_height };
        loop {
            let mut band = wanted.min(even_height);
            loop {
                let bytes = self.owner_smem(group, band);
                let plane = group * self.height * self.width * 4;
                if bytes <= most {
                    let plane_shared = bytes + plane <= most;
                    let shared_bytes = bytes + if plane_shared { plane } else { 0 };
                    let cut = Cut { group, band, plane_shared, blocks: 1, shared_bytes };
                    return Ok(self.shared_by_clusters(cut, conv, device));
                }
                if band == 2 {
                    break;
                }
                band = (band / 2).next_multiple_of(2).min(band - 2);
            }
            if group == 4 {
                let what = "the working set of two rows must fit in a block's shared memory";
                return Err(Error::Unsupported { arg: "channels", what });
            }
            group = (group / 2).max(4);
        }
    }

    /// Lets a cluster share the bands where multiprocessors would have nothing to do. Without a phi a band may be as
    /// short as eight rows; with one, shorter bands would leave threads without a tile.
    fn shared_by_clusters(&self, cut: Cut, conv: bool, device: &DeviceInfo) -> Cut {
        if device.arch != (Arch { major: 9, minor: 0 }) {
            return cut;
        }
        let groups = self.batch * self.channels.next_multiple_of(4).div_ceil(cut.group);
        let shared = |blocks: u64| {
            let band = if conv { cut.band } else { cut.band.min(self.height.div_ceil(blocks).next_multiple_of(2)) };
            let fits = (blocks - 1) * band < self.height && (conv || band >= 8);
            let shared_bytes = self.owner_smem(cut.group, band);
            (fits && groups * blocks <= device.sm_count.max(1) as u64).then_some(Cut {
                band,
                blocks,
                plane_shared: false,
                shared_bytes,
                ..cut
            })
        };
        [8, 4, 2].into_iter().find_map(shared).unwrap_or(cut)
    }

    /// Shared memory of the kernel of rows, as its launcher counts it.
    fn rows_smem(&self) -> u64 {
        let widest = self.scales.iter().map(|scale| scale.width).max().unwrap_or(0);
        (2 * widest + self.width) * (self.channels.next_multiple_of(4) + 4) * 4
    }

    /// Whether a step from one map to another can go by the kernel of rows.
    pub(super) fn takes_rows(&self, scale: usize) -> bool {
        self.rows_fit && self.phi[scale] < 0 && (self.next != Next::Area || scale + 1 == self.scales.len())
    }

    /// How the search for `tokens` vectors of each image is cut up: enough blocks for all multiprocessors, of as many
    /// vectors as still give that, for each block reads its part of the codebook.
    pub(super) fn search_cut(&self, tokens: u64) -> SearchCut {
        let rows = self.batch * tokens;
        let mut cut = SearchCut { tile: 8, splits: 1 };
        let blocks = |cut: SearchCut| rows.div_ceil(cut.tile) * cut.splits;
        while cut.tile < 32 && 4 * rows.div_ceil(cut.tile * 2) * self.most_splits >= 3 * self.sm_count {
            cut.tile *= 2;
        }
        while cut.splits < self.most_splits && blocks(cut) < self.sm_count {
            cut.splits *= 2;
        }
        cut
    }

    /// The bytes that a step must move, for tokens and inputs of so many bytes.
    pub(super) fn traffic(&self, scale: usize, token: u64, out: u64, map: bool) -> Traffic {
        let tokens = self.batch * self.scales[scale].tokens;
        let next = self.scales.get(scale + 1).map_or(0, |next| self.batch * next.tokens * self.token_width());
        let map = if map { self.map_len() * 4 } else { 0 };
        Traffic { read: tokens * token + map, written: map + next * self.repeat * out }
    }
}

/// How a search is cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SearchCut {
    /// Vectors of a block.
    pub(super) tile: u64,
    /// Blocks of a cluster, each with a part of the codebook.
    pub(super) splits: u64,
}
