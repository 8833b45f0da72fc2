//! A whole event of a policy over a cache: scores, selection, and the move.

mod plan;

pub use plan::EventBuilder;

use super::{CompactArgs, EXTRAS, ImportanceArgs, KeyNormsArgs, KeyPages, RedundancyArgs, SelectArgs, Traffic};
use crate::dtype::{Element, Float};
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::stream::{AsStream, Stream};
use crate::view::{In, Out};
use plan::Stages;

/// A plan that compresses sets of a [`ChunkCache`](super::ChunkCache) by a [`Policy`](super::Policy), from the queries
/// to the rows in their new places: [`Importance`](super::Importance), [`KeyNorms`](super::KeyNorms),
/// [`Redundancy`](super::Redundancy), [`Select`](super::Select) and [`Compact`](super::Compact), those that the policy
/// has, over the pages of the pool. Nothing is gathered before, and active chunks stay where they are.
///
/// A plan is made once for a shape, from the compactions that the cache gives:
/// [`ChunkCache::event`](super::ChunkCache::event). It runs for any compactions of that shape, in as few groups of sets
/// as its workspace allows; each set comes out as it would alone.
///
/// | operand | shape | |
/// |---|---|---|
/// | `q` | `[sets, rows, heads * groups, k_dim]` | of policies with importance; strides of all but the last |
/// | `k`, `v`, `positions`, `extras` | the cache's regions | in place; `extras`: `[pages, page_rows, heads]` each |
/// | `lengths` | `[sets, heads]` i32 | the sets' in the cache's region: read where a compression was; written |
/// | `input_pages`, `out_pages` | `[sets, pages]` i32 | the compactions' in turn; `out_pages` unless in place |
/// | `rows`, `columns` | [`Event::rows`], [`Event::columns`] | of ScaleKV |
/// | `weights` | [`Event::weights`] | of FlowCache with weights |
/// | `cos`, `sin` | `[table_rows, rotary_dim / 2]` f32 | of [`EventBuilder::turn`] |
/// | `status` | `[sets, heads]` u32, optional | bits of [`status`](super::status) |
///
/// **Exactly the budget** is kept of each head that has as many tokens, of Ada-KV's heads together. A second event, and
/// any further, sees of each head what it has kept and what came after, as one list: queries, windows, pooling and
/// budgets do not see the rows between.
///
/// **Determinism.** Bitwise, and of each set whatever the others are.
///
/// ```
/// use nextscale::compression::{CacheSpec, ChunkCache, EventArgs, Policy};
/// use nextscale::{DType, DeviceInfo, In, Out, Stream};
/// let spec = CacheSpec {
///     branches: 1, layers: 2, heads: 1, k_dim: 64, v_dim: 64, dtype: DType::F32, packed: None,
///     page_rows: 4, spare_pages: 0, extras: 0, most_rows: 64, bytes: 1 << 16,
/// };
/// let mut cache = ChunkCache::new(spec)?;
/// let rows = cache.layout().pages * 4;
/// let (mut k, mut v, mut lengths) = (vec![0f32; rows * 64], vec![0f32; rows * 64], [0; 2]);
/// for layer in 0..2 {
///     for run in cache.append(0, layer, 0, 12, 0)?.runs {
///         let at = run.place as usize * 64;
///         k[at..at + run.rows * 64].iter_mut().enumerate().for_each(|(i, k)| *k = (i / 64) as f32);
///     }
///     cache.seal(0, layer, 0)?;
/// }
/// let policy = Policy::SnapKv { budget: 4, window: 2 };
/// let moves = [0, 1].map(|layer| cache.compress(0, layer, policy.rows(1)).unwrap().unwrap());
/// let stream = Stream::host();
/// let event = cache.event::<f32>(policy, &moves)?.build(&DeviceInfo::of(&stream)?)?;
/// let q = vec![0.01f32; 2 * 2 * 64];
/// let pages: Vec<i32> = moves.iter().flat_map(|moves| &moves.input_pages).map(|&page| page as i32).collect();
/// let mut workspace = vec![0u8; event.workspace_bytes() as usize + 256];
/// let skip = workspace.as_ptr().align_offset(256);
/// let workspace = Out::host(&mut workspace[skip..]);
/// let (k_out, v_out, lengths_out) = (Out::host(&mut k), Out::host(&mut v), Out::host(&mut lengths));
/// let mut args = EventArgs::of(k_out, v_out, lengths_out, In::host(&pages), workspace);
/// args.q = Some(In::host(&q));
/// event.run(&stream, args)?;
/// assert_eq!(lengths, [4, 4]);
/// # Ok::<(), nextscale::Error>(())
/// ```
pub struct Event<T: Float> {
    shape: Shape,
    weights: Option<Vec<f32>>,
    full: Stages<T>,
    rest: Option<Stages<T>>,
}

/// What operands are checked against.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Shape {
    sets: usize,
    heads: usize,
    input_pages: usize,
    out_pages: usize,
    first_rows: usize,
    q_len: u64,
    q_stride_set: i64,
    rows: Vec<i32>,
    columns: Vec<i32>,
    k_len: u64,
    v_len: u64,
    /// Places times heads.
    pool: u64,
    /// Elements of the keys of a head.
    keys: u64,
    turns: bool,
}

impl<T: Float> Clone for Event<T> {
    fn clone(&self) -> Self {
        Event {
            shape: self.shape.clone(),
            weights: self.weights.clone(),
            full: self.full.clone(),
            rest: self.rest.clone(),
        }
    }
}

// Weights by their bits.
impl<T: Float> PartialEq for Event<T> {
    fn eq(&self, other: &Self) -> bool {
        let bits =
            |of: &Self| of.weights.as_ref().map(|weights| weights.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        (&self.shape, &self.full, &self.rest) == (&other.shape, &other.full, &other.rest) && bits(self) == bits(other)
    }
}
impl<T: Float> Eq for Event<T> {}

impl<T: Float> core::hash::Hash for Event<T> {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        (&self.shape, &self.full, &self.rest).hash(state);
    }
}

impl<T: Float> core::fmt::Debug for Event<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Event").field("shape", &self.shape).field("full", &self.full).field("rest", &self.rest).finish()
    }
}

/// The buffers of one event. See [`Event`] for shapes.
#[derive(Debug)]
pub struct EventArgs<'a, T>
where
    T: Float,
{
    /// Queries of all sets.
    pub q: Option<In<'a, T>>,
    /// The region `k`.
    pub k: Out<'a, T>,
    /// The region `v`.
    pub v: Out<'a, T>,
    /// The region `positions`; not needed by the event itself.
    pub positions: Option<Out<'a, i32>>,
    /// Parts of the region `extras` that move along.
    pub extras: [Option<Out<'a, f32>>; EXTRAS],
    /// The sets' part of the region `lengths`.
    pub lengths: Out<'a, i32>,
    /// Pages of the compactions.
    pub input_pages: In<'a, i32>,
    /// Where they move to.
    pub out_pages: Option<In<'a, i32>>,
    /// [`Event::rows`], on the device.
    pub rows: Option<In<'a, i32>>,
    /// [`Event::columns`], on the device.
    pub columns: Option<In<'a, i32>>,
    /// [`Event::weights`], on the device.
    pub weights: Option<In<'a, f32>>,
    /// Cosines.
    pub cos: Option<In<'a, f32>>,
    /// Sines.
    pub sin: Option<In<'a, f32>>,
    /// What the selection has to say.
    pub status: Option<Out<'a, u32>>,
    /// [`Event::workspace_bytes`], 256-byte aligned; its content is of no interest.
    pub workspace: Out<'a, u8>,
}

impl<'a, T: Float> EventArgs<'a, T> {
    /// What every event needs.
    pub fn of(
        k: Out<'a, T>,
        v: Out<'a, T>,
        lengths: Out<'a, i32>,
        input_pages: In<'a, i32>,
        workspace: Out<'a, u8>,
    ) -> Self {
        EventArgs {
            q: None,
            k,
            v,
            positions: None,
            extras: [const { None }; EXTRAS],
            lengths,
            input_pages,
            out_pages: None,
            rows: None,
            columns: None,
            weights: None,
            cos: None,
            sin: None,
            status: None,
            workspace,
        }
    }
}

impl<T: Float> Event<T> {
    /// Sets that are compressed.
    pub fn sets(&self) -> usize {
        self.shape.sets
    }

    /// Groups that they are taken in.
    pub fn groups(&self) -> usize {
        self.shape.sets.div_ceil(self.full.sets)
    }

    /// Rows of `q` that are the queries, for the operand `rows`; empty if all are.
    pub fn rows(&self) -> &[i32] {
        &self.shape.rows
    }

    /// Columns of these queries, for the operand `columns`; empty if there are none.
    pub fn columns(&self) -> &[i32] {
        &self.shape.columns
    }

    /// Weights by place, for the operand `weights`.
    pub fn weights(&self) -> Option<&[f32]> {
        self.weights.as_deref()
    }

    /// Bytes of `workspace`.
    pub fn workspace_bytes(&self) -> u64 {
        self.full.parts.bytes.max(self.rest.as_ref().map_or(0, |rest| rest.parts.bytes))
    }

    /// The bytes of keys and values that any kernels must move: keys once if they are scored, and what is kept.
    pub fn traffic(&self) -> Traffic {
        let mut all = Traffic { read: 0, written: 0 };
        self.each(|_, stages| {
            let keys = (stages.sets * self.shape.heads) as u64 * self.shape.keys * size_of::<T>() as u64;
            let its = stages.traffic(keys);
            all.read = all.read.saturating_add(its.read);
            all.written = all.written.saturating_add(its.written);
            Ok(())
        })
        .expect("nothing here fails");
        all
    }

    /// Calls `f` with the first set of each group, and its stages.
    fn each(&self, mut f: impl FnMut(usize, &Stages<T>) -> Result<()>) -> Result<()> {
        let mut set = 0;
        while set + self.full.sets <= self.shape.sets {
            f(set, &self.full)?;
            set += self.full.sets;
        }
        self.rest.as_ref().map_or(Ok(()), |rest| f(set, rest))
    }

    /// Compresses on `stream`. On a CUDA stream it enqueues up to twelve kernels a group and returns.
    ///
    /// # Errors
    /// Nothing was launched or written: an operand that the plan needs and is missing, or has no use for; a buffer too
    /// short, misaligned, overlapping an output, on another device or ordered on another stream; on CUDA `f32` with
    /// scores. What CUDA said of a launch may come after others of the event.
    pub fn run<S: AsStream + ?Sized>(&self, stream: &S, mut args: EventArgs<'_, T>) -> Result<()> {
        let stream = stream.as_stream();
        self.check(&stream, &args)?;
        self.each(|set, stages| self.run_group(&stream, set, stages, &mut args))
    }

    fn check(&self, stream: &Stream<'_>, args: &EventArgs<'_, T>) -> Result<()> {
        const PLANNED: &str = "given if and only if the plan has it";
        let shape = &self.shape;
        let rule = |arg, given: bool, wanted: bool| match given == wanted {
            true => Ok(()),
            false => Err(Error::Unsupported { arg, what: PLANNED }),
        };
        let scored = self.full.importance.is_some();
        rule("q", args.q.is_some(), scored)?;
        rule("rows", args.rows.is_some(), !shape.rows.is_empty())?;
        rule("columns", args.columns.is_some(), !shape.columns.is_empty())?;
        rule("weights", args.weights.is_some(), self.weights.is_some())?;
        rule("out_pages", args.out_pages.is_some(), shape.out_pages > 0)?;
        rule("cos", args.cos.is_some(), shape.turns)?;
        rule("sin", args.sin.is_some(), shape.turns)?;
        let lists = (shape.sets * shape.heads) as u64;
        let mut operands = Operands::of(stream)
            .input_if("q", &args.q, shape.q_len)?
            .output("k", &args.k, shape.k_len)?
            .output("v", &args.v, shape.v_len)?
            .output_if("positions", &args.positions, shape.pool)?
            .output("lengths", &args.lengths, lists)?
            .input("input_pages", &args.input_pages, (shape.sets * shape.input_pages) as u64)?
            .input_if("out_pages", &args.out_pages, (shape.sets * shape.out_pages) as u64)?
            .input_if("rows", &args.rows, shape.rows.len() as u64)?
            .input_if("columns", &args.columns, shape.columns.len() as u64)?
            .input_if("weights", &args.weights, self.weights.as_ref().map_or(0, Vec::len) as u64)?
            .input_if("cos", &args.cos, 0)?
            .input_if("sin", &args.sin, 0)?
            .output_if("status", &args.status, lists)?
            .workspace(&args.workspace, self.workspace_bytes())?;
        for extra in &args.extras {
            operands = operands.output_if("extras", extra, shape.pool)?;
        }
        operands.finish()?;
        #[cfg(nxs_kernels)]
        if stream.device() != crate::device::Device::Host && (scored || self.full.redundancy.is_some()) {
            if T::DTYPE == crate::dtype::DType::F32 {
                return Err(Error::DType { arg: "k", what: "kernels score bf16 and f16" });
            }
            let q = args.q.as_ref().map_or(0, |q| q.span().address);
            for (arg, address) in [("k", args.k.span().address), ("q", q)] {
                if address % 16 != 0 {
                    return Err(Error::Alignment { arg, need: 16 });
                }
            }
        }
        Ok(())
    }

    fn run_group(
        &self,
        stream: &Stream<'_>,
        set: usize,
        stages: &Stages<T>,
        args: &mut EventArgs<'_, T>,
    ) -> Result<()> {
        let (shape, parts, sets) = (&self.shape, &stages.parts, stages.sets);
        let (first_list, lists) = (set * shape.heads, sets * shape.heads);
        self.score(stream, set, stages, args)?;
        let [mut importance, mut redundancy, mut indices, workspace] =
            args.workspace.parts([parts.importance, parts.redundancy, parts.indices, parts.select_workspace]);
        let (importance, redundancy) = (importance.cast(), redundancy.cast());
        let select = SelectArgs {
            importance: stages.importance.as_ref().map(|_| importance.as_in()),
            redundancy: stages.redundancy.as_ref().map(|_| redundancy.as_in()),
            weights: args.weights.as_ref().map(whole),
            lengths: None,
            budgets: None,
            indices: indices.cast(),
            counts: args.lengths.part(first_list, lists),
            status: args.status.as_mut().map(|status| status.part(first_list, lists)),
            workspace: Some(workspace),
        };
        stages.select.run(stream, select)?;
        let (indices, lengths) = (indices.cast(), args.lengths.as_in());
        let mut compact = CompactArgs::of(indices.as_in());
        compact.k_out = Some(args.k.whole());
        compact.v_out = Some(args.v.whole());
        compact.counts = Some(lengths.part(first_list, lists));
        compact.positions_out = args.positions.as_mut().map(|view| view.whole());
        for (to, extra) in compact.extras_out.iter_mut().zip(&mut args.extras) {
            *to = extra.as_mut().map(|view| view.whole());
        }
        compact.input_pages = Some(args.input_pages.part(set * shape.input_pages, sets * shape.input_pages));
        let out_pages = args.out_pages.as_ref();
        compact.out_pages = out_pages.map(|view| view.part(set * shape.out_pages, sets * shape.out_pages));
        compact.cos = args.cos.as_ref().map(whole);
        compact.sin = args.sin.as_ref().map(whole);
        stages.compact.run(stream, compact)
    }

    /// The scores of a group, into the workspace.
    fn score(&self, stream: &Stream<'_>, set: usize, stages: &Stages<T>, args: &mut EventArgs<'_, T>) -> Result<()> {
        let (shape, parts, sets) = (&self.shape, &stages.parts, stages.sets);
        let (first_list, lists) = (set * shape.heads, sets * shape.heads);
        let input_pages = args.input_pages.part(set * shape.input_pages, sets * shape.input_pages);
        let lengths = args.lengths.as_in();
        let key_pages = || {
            Some(KeyPages {
                pages: whole(&input_pages),
                kept: (shape.first_rows > 0).then(|| lengths.part(first_list, lists)),
            })
        };
        if let Some(importance) = &stages.importance {
            let q = args.q.as_ref().expect("checked");
            let [mut scores, workspace] = args.workspace.parts([parts.importance, parts.importance_workspace]);
            let args = ImportanceArgs {
                q: q.part(set * shape.q_stride_set as usize, q.len()),
                k: args.k.as_in(),
                scores: scores.cast(),
                rows: args.rows.as_ref().map(whole),
                masked: args.columns.as_ref().map(whole),
                pages: key_pages(),
                lengths: None,
                lse: None,
                workspace: Some(workspace),
            };
            importance.run(stream, args)?;
        }
        if let Some((norms, redundancy)) = &stages.redundancy {
            let [mut scores, mut inverse_norms, mut unit_sum, norms_workspace, workspace] = args.workspace.parts([
                parts.redundancy,
                parts.inverse_norms,
                parts.unit_sum,
                parts.norms_workspace,
                parts.redundancy_workspace,
            ]);
            let k = args.k.as_in();
            let norms_args = KeyNormsArgs {
                k: whole(&k),
                inverse_norms: inverse_norms.cast(),
                unit_sum: unit_sum.cast(),
                pages: key_pages(),
                lengths: None,
                workspace: Some(norms_workspace),
            };
            norms.run(stream, norms_args)?;
            let (inverse_norms, unit_sum) = (inverse_norms.cast(), unit_sum.cast());
            let args = RedundancyArgs {
                k,
                inverse_norms: inverse_norms.as_in(),
                unit_sum: unit_sum.as_in(),
                scores: scores.cast(),
                pages: key_pages(),
                lengths: None,
                workspace: Some(workspace),
            };
            redundancy.run(stream, args)?;
        }
        Ok(())
    }
}

fn whole<'v, T: Element>(view: &'v In<'_, T>) -> In<'v, T> {
    view.part(0, view.len())
}
