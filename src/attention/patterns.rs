//! The visibilities of models.
//!
//! Scales and blocks are anything that is a [`Segment`]: `(height, width)`, `(frames, height, width)`, a number of
//! tokens, or a segment that names a length.

use super::visibility::{Rule, Segment, Visibility};
use crate::error::Result;

/// What a frame sees of the frames before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Past {
    /// All of their scales.
    AllScales,
    /// The last of their scales.
    LastScale,
}

/// One video, or image, of a pack of them.
#[derive(Debug, Clone, Copy)]
pub struct PackedVideo<'a> {
    /// Its scales, clip after clip.
    pub scales: &'a [Segment],
    /// Its text.
    pub text: Segment,
}

/// What a scale of a [`PackedVideo`] sees of the scales before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ClipContext<'a> {
    /// Nothing (`inner_scale_only`).
    Nothing,
    /// Every scale (`context_from_largest_no` of 0).
    Everything,
    /// One scale of the clip before its own; the first clip, the image, sees none.
    PreviousClip {
        /// Scales of each clip.
        scales_a_clip: usize,
        /// Which one, counted from the clip's last: 1 is its full resolution, InfinityStar's default
        /// (`context_from_largest_no`). The first scale if there are fewer.
        from_largest: usize,
    },
    /// The scales of full resolution that are less than so many scales back (`video_tower`).
    Tower {
        /// Numbers of the scales of full resolution.
        full: &'a [usize],
        /// Scales back (`context_frames`).
        within: usize,
    },
    /// One scale, the first of full resolution (`two_pyramid`).
    TwoPyramid {
        /// Its number.
        full: usize,
    },
}

fn segments<S: Into<Segment> + Copy>(from: &[S]) -> Vec<Segment> {
    from.iter().map(|&segment| segment.into()).collect()
}

fn full(sees: bool) -> Rule {
    if sees { Rule::Full } else { Rule::Hidden }
}

/// What models let see. Any other table is [`Visibility::table`]'s, any other rule [`Visibility::new`]'s; all fail as
/// that does.
///
/// Where queries and keys are the same segments, [`Visibility::step`] and [`Visibility::steps`] give what generation
/// needs:
///
/// ```
/// use nextscale::attention::Visibility;
///
/// let var = Visibility::scale_causal(&[1, 2, 3, 4, 5, 6, 8, 10, 13, 16].map(|side| (side, side)))?;
/// assert_eq!(var.query_count(), 680);
/// assert!(var.sees(1, 4) && !var.sees(0, 1));
/// // The last scale against the cache, and the last two at once.
/// assert_eq!((var.step(9).query_count(), var.step(9).key_count()), (256, 680));
/// assert_eq!(var.steps(8..10).query_count(), 425);
/// # Ok::<(), nextscale::Error>(())
/// ```
///
/// A prompt of its own length in each batch entry, in front of the scales:
///
/// ```
/// use nextscale::attention::{Rule, Segment, Visibility};
///
/// let prompt = Segment::tokens(77).with_length(0);
/// let hart = Visibility::prefixed(prompt, Rule::Full, &[(1, 1), (2, 2), (3, 3)])?;
/// assert_eq!(hart.key_range(1), 77..78);
/// assert_eq!(hart.length_count(), 1);
/// # Ok::<(), nextscale::Error>(())
/// ```
impl Visibility {
    /// Every query sees every key.
    ///
    /// One step of restoration over the whole pyramid (VARestorer, arXiv 2604.21450, EternalEvan/VARestorer: no mask
    /// over all scales, and where there are long inputs one more of the last scale's size); masked models (MAR, each
    /// pass of Hi-MAR).
    pub fn bidirectional<S: Into<Segment> + Copy>(scales: &[S]) -> Result<Self> {
        Self::table(&segments(scales), |_, _| true)
    }

    /// A scale sees itself and the scales before it, whole.
    ///
    /// VAR (arXiv 2404.02905, FoundationVision/VAR: level >= level), Infinity (arXiv 2412.04431), and with any list of
    /// scales FlexVAR (arXiv 2502.20313).
    pub fn scale_causal<S: Into<Segment> + Copy>(scales: &[S]) -> Result<Self> {
        Self::table(&segments(scales), |q, k| k <= q)
    }

    /// A scale sees itself alone.
    ///
    /// HMAR (arXiv 2506.04421: the scale before enters through the input), M-VAR within its scales (arXiv 2411.10433).
    pub fn block_diagonal<S: Into<Segment> + Copy>(scales: &[S]) -> Result<Self> {
        Self::table(&segments(scales), |q, k| k == q)
    }

    /// As [`Visibility::scale_causal`], for `scales` grids each of twice the sides of the one before.
    ///
    /// FlowAR (arXiv 2412.15205), by its abstract: next-scale prediction as in VAR, each scale double the one before.
    pub fn doubling(first: (u32, u32), scales: u32) -> Result<Self> {
        let side = |first: u32, scale| first.saturating_mul(1u32.checked_shl(scale).unwrap_or(u32::MAX));
        let scales: Vec<_> = (0..scales).map(|scale| (side(first.0, scale), side(first.1, scale))).collect();
        Self::scale_causal(&scales)
    }

    /// A cell sees itself and the cells before it, whole; tokens lie cell by cell.
    ///
    /// xAR (arXiv 2502.20388), by its abstract: an entity, at its best a square cell of patches, is predicted from the
    /// noisy ones before it.
    pub fn cells<S: Into<Segment> + Copy>(cells: usize, cell: S) -> Result<Self> {
        Self::scale_causal(&vec![cell; cells])
    }

    /// A chunk sees itself and the chunks before it, whole; the last one may be shorter.
    ///
    /// ARFlow (arXiv 2501.16085, TheFllood/ARFlow: a chunk is one image of a sequence of ever less noise. Its attention
    /// to the chunks before is linear; this is who sees whom.)
    ///
    /// # Panics
    /// If a chunk has no tokens.
    pub fn chunk_causal(tokens: u32, chunk: u32) -> Result<Self> {
        let chunks: Vec<u32> = (0..tokens.div_ceil(chunk)).map(|n| chunk.min(tokens - n * chunk)).collect();
        Self::scale_causal(&chunks)
    }

    /// A token sees itself and the tokens before it: text, images in raster order.
    pub fn token_causal(tokens: u32) -> Result<Self> {
        let segments = [Segment::tokens(tokens)];
        Self::new(&segments, &segments, |_, _| Rule::Causal)
    }

    /// `tokens` as in [`Visibility::token_causal`], after a prefix that they see and that sees itself, whole.
    pub fn prefix_lm(prefix: impl Into<Segment>, tokens: u32) -> Result<Self> {
        Self::token_causal(tokens)?.with_prefix(prefix, Rule::Full)
    }

    /// This, after one more segment that every query sees, and that sees itself by `order`: [`Rule::Full`] or
    /// [`Rule::Causal`]. With [`Segment::with_length`], the prompts of a batch may differ in length; what the rows of
    /// the prefix beyond a prompt's length give is of no interest.
    pub fn with_prefix(&self, prefix: impl Into<Segment>, order: Rule) -> Result<Self> {
        let prefix = prefix.into();
        let queries: Vec<Segment> = [prefix].iter().chain(self.queries()).copied().collect();
        let keys: Vec<Segment> = [prefix].iter().chain(self.keys()).copied().collect();
        Self::new(&queries, &keys, |q, k| match (q, k) {
            (0, 0) => order,
            (0, _) => Rule::Hidden,
            (_, 0) => Rule::Full,
            _ => self.rule(q - 1, k - 1),
        })
    }

    /// Scales as in [`Visibility::scale_causal`], after a prefix that they see: [`Visibility::with_prefix`].
    ///
    /// HART (arXiv 2410.10812: the text, bidirectional, in the place of the first scale), class tokens, text that is
    /// read token by token.
    pub fn prefixed<S: Into<Segment> + Copy>(prefix: impl Into<Segment>, order: Rule, scales: &[S]) -> Result<Self> {
        Self::scale_causal(scales)?.with_prefix(prefix, order)
    }

    /// An image that is read in some order, after a prefix that it sees and that is read token by token. Row by row is
    /// [`Rule::Causal`] (LlamaGen, arXiv 2406.06525), column by column [`Rule::ColumnCausal`]; tokens lie in raster
    /// order.
    pub fn ordered_image(prefix: impl Into<Segment>, image: impl Into<Segment>, order: Rule) -> Result<Self> {
        let image = [image.into()];
        Self::new(&image, &image, |_, _| order)?.with_prefix(prefix, Rule::Causal)
    }

    /// An image that grows from a corner, a diagonal at a time, after a prefix that is read token by token: a token
    /// sees the prefix and those whose row + column is at most its own. Tokens lie in raster order, as in training.
    ///
    /// FlashAR's two-way next-token prediction (arXiv 2605.09430, lxazjk/LlamaGen-FlashAR: both heads, next in the row
    /// and next in the column, see this), NAR (arXiv 2503.10696). [`Visibility::two_way_steps`] is the same in the
    /// order of generation.
    pub fn two_way(prefix: impl Into<Segment>, height: u32, width: u32) -> Result<Self> {
        Self::ordered_image(prefix, (height, width), Rule::DiagonalCausal)
    }

    /// [`Visibility::two_way`] with the tokens diagonal by diagonal, each a segment, as a cache holds them that is
    /// appended to: [`Visibility::step`] is a step of generation. Segment 0 is the prefix.
    pub fn two_way_steps(prefix: impl Into<Segment>, height: u32, width: u32) -> Result<Self> {
        let diagonals = if height == 0 || width == 0 { 0 } else { height.saturating_add(width) - 1 };
        let on = |n: u32| (n + 1).min(height).min(width).min(diagonals - n);
        Self::scale_causal(&(0..diagonals).map(on).collect::<Vec<_>>())?.with_prefix(prefix, Rule::Causal)
    }

    /// Clean blocks, then as many noised ones. A clean block sees itself and the clean ones before it; a noised block
    /// sees the clean ones before it, and itself.
    ///
    /// ACDiT's skip-causal mask (arXiv 2412.07720, thunlp/ACDiT), for training.
    pub fn skip_causal<S: Into<Segment> + Copy>(blocks: usize, block: S) -> Result<Self> {
        Self::table(&segments(&vec![block; 2 * blocks]), |q, k| match (q < blocks, k < blocks) {
            (true, true) => k <= q,
            (true, false) => false,
            (false, true) => k < q - blocks,
            (false, false) => k == q,
        })
    }

    /// The pass of [`Visibility::skip_causal`] that begins block `block` of generation: the queries are the block
    /// before it, now clean, unless it is the first, then block `block`, noised. The keys are the clean blocks before
    /// it, then itself.
    ///
    /// Later passes over the same noised block have cached the clean one: they are the last segment of the queries
    /// ([`Visibility::of_queries`]).
    pub fn skip_causal_step<S: Into<Segment> + Copy>(block: usize, shape: S) -> Result<Self> {
        let shape = shape.into();
        let noised = block.min(1);
        Self::new(&vec![shape; noised + 1], &vec![shape; block + 1], |q, k| full(q == noised || k < block))
    }

    /// A source image, which sees itself, then the scales of the target: a scale sees the source, itself and the scales
    /// before it.
    ///
    /// VAREdit (arXiv 2508.15772, HiDream-ai/VAREdit: mask `var`; the source is given at the finest scale).
    pub fn source_then_target<S: Into<Segment> + Copy>(source: impl Into<Segment>, scales: &[S]) -> Result<Self> {
        let all: Vec<Segment> = [source.into()].into_iter().chain(segments(scales)).collect();
        Self::scale_causal(&all)
    }

    /// As [`Visibility::source_then_target`], but a scale of the target sees, instead of the source, the source pooled
    /// to its own shape. Queries: source, scales. Keys: source, the pooled sources, scales.
    ///
    /// VAREdit's scale-aligned reference, in its first layer (arXiv 2508.15772, HiDream-ai/VAREdit).
    pub fn scale_aligned_source<S: Into<Segment> + Copy>(source: impl Into<Segment>, scales: &[S]) -> Result<Self> {
        let (source, scales) = ([source.into()], segments(scales));
        let (queries, n) = ([&source[..], &scales].concat(), scales.len());
        Self::new(&queries, &[&source[..], &scales, &scales].concat(), |q, k| match (q, k) {
            (0, _) => full(k == 0),
            (_, k) if k > n => full(k - n <= q),
            (_, k) => full(k == q),
        })
    }

    /// The scales of a source, then those of the target. Scale k of the source sees the source up to its scale k; scale
    /// k of the target sees the source and the target up to their scales k.
    ///
    /// VAREdit's mask `var_edit_block` (HiDream-ai/VAREdit).
    pub fn edit_block<S: Into<Segment> + Copy>(scales: &[S]) -> Result<Self> {
        let scales = segments(scales);
        let n = scales.len();
        Self::table(&[&scales[..], &scales].concat(), |q, k| k <= q && k % n <= q % n)
    }

    /// All scales of all videos, then all of their texts, then padding. A scale sees itself, the text of its video and
    /// what `context` says of the scales of its video before it; a text sees itself; padding sees nothing and is not
    /// seen. Give a text a length ([`Segment::with_length`]) if it is padded within.
    ///
    /// InfinityStar (arXiv 2511.04675, FoundationVision/InfinityStar: `_generate_infinity_pack` and
    /// `get_scale_pack_info`, and the older masks of the same file). For generation, [`Visibility::of_queries`] and
    /// [`Visibility::seen_keys`].
    ///
    /// # Panics
    /// If a clip has no scales.
    pub fn packed_videos(videos: &[PackedVideo<'_>], context: ClipContext<'_>, padding: u32) -> Result<Self> {
        let scales = videos.iter().flat_map(|video| video.scales.iter().copied());
        let texts = videos.iter().map(|video| video.text);
        let all: Vec<Segment> = scales.chain(texts).chain([Segment::tokens(padding)]).collect();
        // Of each segment its video, and its number among the scales; texts have none.
        let scale_of = |v: usize| move |s: usize| (v, Some(s));
        let scales = videos.iter().enumerate().flat_map(|(v, video)| (0..video.scales.len()).map(scale_of(v)));
        let of: Vec<(usize, Option<usize>)> = scales.chain((0..videos.len()).map(|v| (v, None))).collect();
        let earlier = |q: usize, k: usize| match context {
            ClipContext::Nothing => false,
            ClipContext::Everything => true,
            ClipContext::PreviousClip { scales_a_clip, from_largest } => {
                k / scales_a_clip + 1 == q / scales_a_clip
                    && k % scales_a_clip == scales_a_clip.saturating_sub(from_largest).min(scales_a_clip - 1)
            }
            ClipContext::Tower { full, within } => q - k < within && full.contains(&k),
            ClipContext::TwoPyramid { full } => k == full,
        };
        Self::table(&all, |q, k| match (of.get(q), of.get(k)) {
            (Some((a, _)), Some((b, _))) if a != b => false,
            (Some((_, Some(_))), Some((_, None))) => true,
            (Some((_, Some(q))), Some((_, Some(k)))) => q == k || k < q && earlier(*q, *k),
            (Some((_, None)), Some((_, None))) => true,
            _ => false,
        })
    }

    /// `frames` frames of the scales `frame` each. A scale sees itself and the scales before it of its own frame, and
    /// `past` of the frames before.
    ///
    /// VideoAR (arXiv 2601.05966), by its abstract: VAR within a frame, causal from frame to frame. That leaves open
    /// which scales of the past are seen, hence the choice.
    pub fn frame_causal<S: Into<Segment> + Copy>(frames: usize, frame: &[S], past: Past) -> Result<Self> {
        Self::sliding_frames(frames, frame, past, frames, 0)
    }

    /// As [`Visibility::frame_causal`], but of the frames before it a frame sees the last `window` and the first
    /// `sinks` alone: long videos with a bounded cache. A frame of one scale is a frame without scales.
    pub fn sliding_frames<S: Into<Segment> + Copy>(
        frames: usize,
        frame: &[S],
        past: Past,
        window: usize,
        sinks: usize,
    ) -> Result<Self> {
        let (scales, last) = (frame.len(), frame.len().saturating_sub(1));
        Self::table(&segments(frame).repeat(frames), |q, k| {
            let [(own, q), (other, k)] = [q, k].map(|segment| (segment / scales, segment % scales));
            if own == other {
                return k <= q;
            }
            other < own && (own - other <= window || other < sinks) && (past == Past::AllScales || k == last)
        })
    }

    /// A token sees those of its own grid within so many frames, rows and columns of it: [`Rule::Window`]. At the
    /// borders the window is cut off, not moved.
    ///
    /// Neighbourhood attention without a moved window; sliding windows over the frames of a video that is made at once.
    pub fn window(grid: impl Into<Segment>, frames: u32, rows: u32, columns: u32) -> Result<Self> {
        let grid = [grid.into()];
        Self::new(&grid, &grid, |_, _| Rule::Window { frames, rows, columns })
    }

    /// As [`Visibility::scale_causal`] up to `dense` scales. A later scale sees the first `sinks` scales whole, and of
    /// each other one up to its own the tokens within so many rows and columns of its own place there
    /// ([`Rule::Window`], all frames).
    ///
    /// SparVAR's attention sinks and cross-scale local attention (arXiv 2602.04361), by its abstract; the sizes are the
    /// caller's. Its indices that are predicted at run time are another matter.
    pub fn scale_local<S: Into<Segment> + Copy>(
        scales: &[S],
        dense: usize,
        sinks: usize,
        rows: u32,
        columns: u32,
    ) -> Result<Self> {
        let scales = segments(scales);
        Self::new(&scales, &scales, |q, k| match k <= q {
            true if q >= dense && k >= sinks => Rule::Window { frames: u32::MAX, rows, columns },
            sees => full(sees),
        })
    }

    /// A condition and the tokens of a low resolution, which see each other, and the tokens of the full resolution,
    /// which see all.
    ///
    /// Hi-MAR's pivots (arXiv 2505.20288), by its idea: so the pivots, once there, can be cached. HiDream-ai/himar runs
    /// a pass a resolution instead, over condition, pivots and full resolution (less what is masked, in the encoder),
    /// in each of which all see all: that is [`Visibility::bidirectional`].
    pub fn low_resolution_pivots(
        condition: impl Into<Segment>,
        pivots: impl Into<Segment>,
        dense: impl Into<Segment>,
    ) -> Result<Self> {
        Self::table(&[condition.into(), pivots.into(), dense.into()], |q, k| k < 2 || q == 2)
    }

    /// Queries that see all keys of a condition, as far as it goes: text of a length of its own in each batch entry
    /// ([`Segment::with_length`], and `packed_keys` of the plan where the texts lie one after the other).
    ///
    /// The cross-attention of Infinity (arXiv 2412.04431) and its kin.
    pub fn cross_attention(queries: impl Into<Segment>, condition: impl Into<Segment>) -> Result<Self> {
        Self::new(&[queries.into()], &[condition.into()], |_, _| Rule::Full)
    }

    /// Queries of the scales of a guide, keys of the scales of a target: scale k of the guide sees the target up to its
    /// scale k.
    ///
    /// StyleVAR's blended cross-attention (arXiv 2604.21052, Senfier-LiqiJing/StyleVAR): style and content are each a
    /// guide, of the target's own shapes, and ask its history which of it matters; the two results are blended outside.
    pub fn guided<S: Into<Segment> + Copy>(guide: &[S], target: &[S]) -> Result<Self> {
        Self::new(&segments(guide), &segments(target), |q, k| full(k <= q))
    }

    /// A scale that sees a cache and itself. With a length ([`Segment::with_length`]), a cache that was pruned, to a
    /// length of its own in each batch entry and head.
    ///
    /// ScaleKV (arXiv 2505.19602), HACK (arXiv 2504.09261).
    pub fn cached_step(cache: impl Into<Segment>, scale: impl Into<Segment>) -> Result<Self> {
        let scale = scale.into();
        Self::new(&[scale], &[cache.into(), scale], |_, _| Rule::Full)
    }
}
