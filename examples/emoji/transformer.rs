//! The transformer that all samplers share: l2-normed attention through `Prepare` and `ScaleAttention`, modulated by
//! the class.

use nextscale::attention::{AppendAt, Norm as QkNorm, Prepare, PrepareArgs, Rule, ScaleAttention, ScaleAttentionArgs};
use nextscale::attention::{Segment, Visibility};
use nextscale::dtype::Float;

use crate::compress::{Compressor, Event};
use crate::dense::{Matrix, multiply};
use crate::device::{Buffer, Device};
use crate::failure::Result;
use crate::pointwise::{Norm, gelu};
use crate::weights::{Config, Weights};

#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) width: usize,
    pub(crate) depth: usize,
    heads: usize,
    head_dim: usize,
    mlp: usize,
    pub(crate) vocab: usize,
}

pub(crate) struct Transformer<A> {
    pub(crate) shape: Shape,
    layers: Vec<Layer<A>>,
    head: Matrix<A>,
    /// `[tokens, width]`
    pub(crate) positions: Buffer<f32>,
    modulation: Modulation,
}

struct Layer<A> {
    qkv: Matrix<A>,
    out: Matrix<A>,
    up: Matrix<A>,
    down: Matrix<A>,
    /// `[heads]`: what queries are multiplied by.
    multiplier: Buffer<f32>,
}

/// What turns classes into gates, scales and shifts; on the host, once a request.
struct Modulation {
    /// `[conditions, width]`: nothing said, categories, classes.
    conditions: Vec<f32>,
    /// `[6 width, width]`, shared by the layers, and `[6 width]` of each.
    shared: Vec<f32>,
    layers: Vec<Vec<f32>>,
    /// `[2 width, width]`, `[2 width]`.
    head: Vec<f32>,
    head_bias: Vec<f32>,
}

/// What a batch of classes says.
pub(crate) struct Said {
    /// `[batch, width]`
    pub(crate) conditions: Buffer<f32>,
    /// `[depth, 6, batch, width]`: gate, scale, shift of attention, then of the MLP.
    layers: Buffer<f32>,
    /// `[2, batch, width]`: scale, shift.
    head: Buffer<f32>,
}

/// Buffers between the layers.
pub(crate) struct Scratch<A> {
    /// The residual stream, `[rows, width]`; the input is left here.
    pub(crate) x: Buffer<f32>,
    y: Buffer<f32>,
    h: Buffer<A>,
    wide: Buffer<f32>,
    wide_h: Buffer<A>,
    q: Buffer<A>,
    attended: Buffer<A>,
    /// `[rows, vocab]`
    pub(crate) logits: Buffer<f32>,
}

/// Keys and values of each layer, `[batch, rows, heads, head_dim]`.
pub(crate) struct Cache<A> {
    layers: Vec<[Buffer<A>; 2]>,
}

/// The plans for one kind of call.
pub(crate) struct Pass<A> {
    pub(crate) batch: usize,
    pub(crate) rows: usize,
    width: usize,
    append: usize,
    prepare: Prepare<f32, A, A>,
    /// With a past: keys and values are stored once more, where the next call finds them.
    keep: Option<Prepare<f32, A, A>>,
    attention: ScaleAttention<A>,
    schedule: Buffer<u32>,
    workspace: Buffer<u8>,
    /// What the cache goes through afterwards.
    compressor: Option<Compressor<A>>,
}

/// Of each batch entry, for a [`Pass`] with a past.
pub(crate) struct Past {
    /// Tokens that it has.
    pub(crate) lengths: Buffer<i32>,
    /// The row of the cache that its next token goes to.
    pub(crate) append_at: Buffer<i32>,
}

impl<A: Float> Transformer<A> {
    pub(crate) fn load(device: &Device, weights: &Weights, part: &str) -> Result<Self> {
        let config = &weights.config;
        let [width, depth] = config.transformer(part);
        let shape = Shape {
            width,
            depth,
            heads: width / config.head_dim,
            head_dim: config.head_dim,
            mlp: config.mlp,
            vocab: config.vocab,
        };
        let matrix = |name: &str, outputs, inputs| {
            Matrix::new(device, outputs, inputs, &weights.floats(name, &[outputs, inputs])?)
        };
        let layer = |l: usize| -> Result<Layer<A>> {
            let name = |part: &str| format!("layers.{l}.{part}");
            Ok(Layer {
                qkv: matrix(&name("qkv"), 3 * width, width)?,
                out: matrix(&name("out"), width, width)?,
                up: matrix(&name("up"), shape.mlp * width, width)?,
                down: matrix(&name("down"), width, shape.mlp * width)?,
                multiplier: device.upload(&weights.floats(&name("multiplier"), &[shape.heads])?)?,
            })
        };
        Ok(Transformer {
            shape,
            layers: (0..depth).map(layer).collect::<Result<_>>()?,
            head: matrix("head", config.vocab, width)?,
            positions: device.upload(&weights.floats("positions", &[config.tokens(), width])?)?,
            modulation: Modulation {
                conditions: weights.floats("conditions", &[weights.rows_of("conditions")?, width])?,
                shared: weights.floats("modulation", &[6 * width, width])?,
                layers: (0..depth)
                    .map(|l| weights.floats(&format!("layers.{l}.modulation"), &[6, width]))
                    .collect::<Result<_>>()?,
                head: weights.floats("head.modulation", &[2 * width, width])?,
                head_bias: weights.floats("head.modulation.bias", &[2 * width])?,
            },
        })
    }

    /// All rows of the table of conditions.
    pub(crate) fn conditions(&self) -> &[f32] {
        &self.modulation.conditions
    }

    /// Room for what `batch` conditions say.
    pub(crate) fn unsaid(&self, device: &Device, batch: usize) -> Result<Said> {
        let Shape { width, depth, .. } = self.shape;
        Ok(Said {
            conditions: device.zeros(batch * width)?,
            layers: device.zeros(depth * 6 * batch * width)?,
            head: device.zeros(2 * batch * width)?,
        })
    }

    /// What these conditions say, rows of the table: once a batch.
    pub(crate) fn say(&self, device: &Device, conditions: &[usize], said: &mut Said) -> Result<()> {
        let (modulation, batch, width) = (&self.modulation, conditions.len(), self.shape.width);
        let said_of = |&row: &usize| &modulation.conditions[row * width..][..width];
        let rows: Vec<f32> = conditions.iter().flat_map(said_of).copied().collect();
        let active: Vec<f32> = rows.iter().map(|c| c / (1.0 + (-c).exp())).collect();
        let mut shared = vec![0f32; batch * 6 * width];
        multiply([batch, width, 6 * width], &active, &modulation.shared, &mut shared);
        let mut head = vec![0f32; batch * 2 * width];
        multiply([batch, width, 2 * width], &active, &modulation.head, &mut head);
        // From [batch, parts, width] to [parts, batch, width], and a layer's or the head's own added.
        let parts = |to: &mut Vec<f32>, values: &[f32], own: &[f32]| {
            for (part, own) in own.chunks_exact(width).enumerate() {
                for entry in values.chunks_exact(values.len() / batch) {
                    to.extend(entry[part * width..].iter().zip(own).map(|(value, own)| value + own));
                }
            }
        };
        let (mut layers, mut head_parts) = (Vec::with_capacity(said.layers.len()), Vec::with_capacity(head.len()));
        modulation.layers.iter().for_each(|own| parts(&mut layers, &shared, own));
        parts(&mut head_parts, &head, &modulation.head_bias);
        device.write(&mut said.conditions, &rows)?;
        device.write(&mut said.layers, &layers)?;
        device.write(&mut said.head, &head_parts)
    }

    pub(crate) fn scratch(&self, device: &Device, rows: usize) -> Result<Scratch<A>> {
        let Shape { width, mlp, vocab, .. } = self.shape;
        Ok(Scratch {
            x: device.zeros(rows * width)?,
            y: device.zeros(rows * width)?,
            h: device.zeros(rows * width)?,
            wide: device.zeros(rows * width * mlp.max(3))?,
            wide_h: device.zeros(rows * width * mlp)?,
            q: device.zeros(rows * width)?,
            attended: device.zeros(rows * width)?,
            logits: device.zeros(rows * vocab)?,
        })
    }

    /// With `rows` of room for each batch entry.
    pub(crate) fn cache(&self, device: &Device, batch: usize, rows: usize) -> Result<Cache<A>> {
        let len = batch * rows * self.shape.width;
        let layer = |_| -> Result<[Buffer<A>; 2]> { Ok([device.zeros(len)?, device.zeros(len)?]) };
        Ok(Cache { layers: (0..self.shape.depth).map(layer).collect::<Result<_>>()? })
    }

    /// From the rows in `scratch.x` to their logits; the keys and values are appended to the cache.
    pub(crate) fn run(
        &self,
        device: &Device,
        pass: &mut Pass<A>,
        past: Option<&Past>,
        said: &Said,
        cache: &mut Cache<A>,
        scratch: &mut Scratch<A>,
    ) -> Result<()> {
        let Shape { width, mlp, .. } = self.shape;
        let (rows, group) = (pass.batch * pass.rows, pass.batch * width);
        let Scratch { x, y, h, wide, wide_h, q, attended, logits } = scratch;
        // A layer's last sum is made by the norm that follows.
        let mut gate = None;
        for (l, layer) in self.layers.iter().enumerate() {
            let part = |part: usize| (&said.layers, (l * 6 + part) * group);
            let norm = Norm {
                rows,
                width,
                rows_a_group: pass.rows,
                silu: false,
                y: gate.is_some().then_some(&*y),
                gate,
                scale: part(1),
                shift: part(2),
            };
            norm.run(device, x, h)?;
            layer.qkv.apply(device, rows, h, wide)?;
            pass.attend(device, past, &layer.multiplier, wide, &mut cache.layers[l], q, attended)?;
            layer.out.apply(device, rows, attended, y)?;
            let norm = Norm {
                rows,
                width,
                rows_a_group: pass.rows,
                silu: false,
                y: Some(y),
                gate: Some(part(0)),
                scale: part(4),
                shift: part(5),
            };
            norm.run(device, x, h)?;
            layer.up.apply(device, rows, h, wide)?;
            gelu(device, rows * mlp * width, wide, wide_h)?;
            layer.down.apply(device, rows, wide_h, y)?;
            gate = Some(part(3));
        }
        let norm = Norm {
            rows,
            width,
            rows_a_group: pass.rows,
            silu: false,
            y: gate.is_some().then_some(&*y),
            gate,
            scale: (&said.head, 0),
            shift: (&said.head, group),
        };
        norm.run(device, x, h)?;
        self.head.apply(device, rows, h, logits)
    }
}

impl<A: Float> Pass<A> {
    /// One scale of VAR's, against a cache of all tokens.
    pub(crate) fn of_scale(device: &Device, shape: Shape, config: &Config, batch: usize, scale: usize) -> Result<Self> {
        let scales: Vec<(u32, u32)> = config.scales.iter().map(|&side| (side as u32, side as u32)).collect();
        let visibility = Visibility::scale_causal(&scales)?.step(scale);
        Self::new(device, shape, batch, &visibility, config.tokens(), config.first(scale), false)
    }

    /// The same with a cache that is compressed after each scale, to so many rows.
    pub(crate) fn of_scale_within(
        device: &Device,
        shape: Shape,
        config: &Config,
        batch: usize,
        scale: usize,
        kept: &[usize],
    ) -> Result<Self> {
        let past = scale.checked_sub(1).map_or(0, |before| kept[before]);
        let new = Segment::grid(config.scales[scale] as u32, config.scales[scale] as u32);
        let visibility = Visibility::new(&[new], &[Segment::tokens(past as u32), new], |_, _| Rule::Full)?;
        let mut pass = Self::new(device, shape, batch, &visibility, config.tokens(), past, false)?;
        if scale + 1 < config.scales.len() {
            let event = Event {
                batch,
                heads: shape.heads,
                head_dim: shape.head_dim,
                queries: pass.rows,
                room: config.tokens(),
                rows: past + pass.rows,
                kept: kept[scale],
            };
            pass.compressor = Some(Compressor::new(device, event)?);
        }
        Ok(pass)
    }

    /// `rows` tokens in a line, each of which sees those before it and the past of its batch entry. The cache has the
    /// rows of the call first, then those of the past: where they lie in the past depends on the entry.
    pub(crate) fn of_tokens(device: &Device, shape: Shape, batch: usize, rows: usize, past: usize) -> Result<Self> {
        let new = Segment::tokens(rows as u32);
        let keys = [new, Segment::tokens(past as u32).with_length(0)];
        let visibility = Visibility::new(&[new], &keys, |_, k| if k == 0 { Rule::Causal } else { Rule::Full })?;
        Self::new(device, shape, batch, &visibility, rows + past, 0, true)
    }

    fn new(
        device: &Device,
        shape: Shape,
        batch: usize,
        visibility: &Visibility,
        cache_rows: usize,
        append: usize,
        has_past: bool,
    ) -> Result<Self> {
        let (info, rows) = (device.info()?, visibility.query_count() as usize);
        let Shape { width, heads, head_dim, .. } = shape;
        // q, k and v lie next to each other in each row.
        let strides = [(rows * 3 * width) as i64, (3 * width) as i64, head_dim as i64];
        let prepare = || {
            Prepare::builder(head_dim)
                .batch(batch)
                .rows(rows)
                .k(heads, cache_rows)
                .v(heads, cache_rows)
                .k_strides(strides)
                .v_strides(strides)
                .norm(QkNorm::L2 { eps: 1e-12 })
        };
        let attention = ScaleAttention::builder(visibility)
            .batch(batch)
            .heads(heads, heads)
            .head_dim(head_dim)
            .kv_rows(cache_rows)
            .softmax_scale(1.0)
            // One length for all heads.
            .lengths_strides([batch as i64, 1, 0])
            .build(&info)?;
        Ok(Pass {
            batch,
            rows,
            width,
            append,
            prepare: prepare().q(heads).q_strides(strides).build(&info)?,
            keep: has_past.then(|| prepare().build(&info)).transpose()?,
            schedule: device.upload(attention.schedule().words())?,
            workspace: device.zeros(attention.workspace_bytes() as usize)?,
            attention,
            compressor: None,
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn attend(
        &mut self,
        device: &Device,
        past: Option<&Past>,
        multiplier: &Buffer<f32>,
        qkv: &Buffer<f32>,
        [k_cache, v_cache]: &mut [Buffer<A>; 2],
        q: &mut Buffer<A>,
        attended: &mut Buffer<A>,
    ) -> Result<()> {
        let (stream, width) = (device.stream(), self.width);
        let part = |at: usize| Some(qkv.input_of(at * width..qkv.len()));
        self.prepare.run(
            &stream,
            PrepareArgs {
                q: part(0),
                k: part(1),
                v: part(2),
                q_out: Some(q.output()),
                k_cache: Some(k_cache.output()),
                v_cache: Some(v_cache.output()),
                q_multiplier: Some(multiplier.input()),
                append_at: AppendAt::Row(self.append as u64),
                ..PrepareArgs::default()
            },
        )?;
        self.attention.run(
            &stream,
            ScaleAttentionArgs {
                q: q.input(),
                k: k_cache.input(),
                v: v_cache.input(),
                out: attended.output(),
                lse: None,
                schedule: self.schedule.input(),
                lengths: past.map(|past| past.lengths.input()),
                row_index: None,
                kv_offset: None,
                workspace: Some(self.workspace.output()),
            },
        )?;
        if let Some(compressor) = &mut self.compressor {
            compressor.run(device, q, k_cache, v_cache)?;
        }
        let (Some(keep), Some(past)) = (&self.keep, past) else { return Ok(()) };
        keep.run(
            &stream,
            PrepareArgs {
                k: part(1),
                v: part(2),
                k_cache: Some(k_cache.output()),
                v_cache: Some(v_cache.output()),
                append_at: AppendAt::Rows(past.append_at.input()),
                ..PrepareArgs::default()
            },
        )?;
        Ok(())
    }
}
