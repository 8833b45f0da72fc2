use nextscale::attention::{Rule, ScaleAttention, ScaleAttentionArgs, Segment, Variant, Visibility};
use nextscale::dtype::Float;
use nextscale::{bf16, f16};

use crate::request::{Failure, Op, Setting, SettingHelp, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "scale_attention",
    about: "Attention in which segments of tokens see segments of tokens: \
            out[b, i, h, :] = sum over visible j of softmax_j(scale * q[b, i, h, :] . k[b, j, g, :]) v[b, j, g, :].",
    inputs: &[
        TensorHelp {
            name: "q",
            dtypes: "bf16, f16, f32",
            shape: "[batch, q_rows, heads, dim]; with heads_first [batch, heads, q_rows, dim]",
            about: "one row for each token of segments_q, unless row_index is given; f32 on the host only",
        },
        TensorHelp {
            name: "k",
            dtypes: "as q",
            shape: "[batch, kv_rows, kv_heads, dim]; with heads_first [batch, kv_heads, kv_rows, dim]",
            about: "one row for each token of segments_k, or more; one batch entry for all with kv_offset",
        },
        TensorHelp { name: "v", dtypes: "as q", shape: "that of k", about: "a row for each row of k" },
        TensorHelp {
            name: "segments_q",
            dtypes: "i32",
            shape: "[n, 3]",
            about: "frames, height and width of each segment of queries",
        },
        TensorHelp {
            name: "segments_k",
            dtypes: "i32",
            shape: "[m, 3]",
            about: "the same of keys; if it is missing, the segments of queries are those of keys too",
        },
        TensorHelp {
            name: "rules",
            dtypes: "i32",
            shape: "[n, m]",
            about: "what a segment sees of another: 0 nothing, 1 all, 2 causal, 3 causal by columns, 4 + i window i",
        },
        TensorHelp {
            name: "windows",
            dtypes: "i32",
            shape: "[windows, 3]",
            about: "frames, rows and columns to either side; needed if a rule names one",
        },
        TensorHelp {
            name: "segment_lengths",
            dtypes: "i32",
            shape: "[m]",
            about: "for each segment of keys the index of the length that limits it, or -1; missing: -1",
        },
        TensorHelp {
            name: "lengths",
            dtypes: "i32",
            shape: "[lengths, batch, kv_heads]",
            about: "keys that exist of a segment; needed if segment_lengths names one",
        },
        TensorHelp {
            name: "row_index",
            dtypes: "i32",
            shape: "[batch, rows]",
            about: "the row of q that each row is; missing: itself",
        },
        TensorHelp {
            name: "kv_offset",
            dtypes: "i32",
            shape: "[batch]",
            about: "the row of k and v at which the keys of an entry begin; missing: each entry has rows of its own",
        },
    ],
    settings: &[
        SettingHelp { name: "scale", values: "number", about: "of the logits; default 1 / sqrt(dim)" },
        SettingHelp {
            name: "logit_bound",
            values: "number",
            about: "no scaled logit exceeds it; at most 40; default: there is none",
        },
        SettingHelp { name: "heads_first", values: "true | false", about: "layout of q, k, v and out; default false" },
        SettingHelp { name: "variant", values: "auto | portable | hopper", about: "the kernel; default auto" },
        SettingHelp { name: "groups", values: "1 | 2 | 3", about: "tiles of 64 rows that share keys; default: chosen" },
        SettingHelp { name: "splits", values: "1 to 32", about: "parts that the keys are split into; default: chosen" },
        SettingHelp { name: "pack", values: "true | false", about: "heads of a kv head share tiles; default: chosen" },
    ],
    outputs: &[
        TensorHelp {
            name: "out",
            dtypes: "as q",
            shape: "[batch, rows, heads, dim]; with heads_first [batch, heads, rows, dim]",
            about: "zero where nothing is seen",
        },
        TensorHelp {
            name: "lse",
            dtypes: "f32",
            shape: "[batch, heads, rows]",
            about: "natural logarithm of the sum of exponentials; -inf where nothing is seen",
        },
    ],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let q = inputs.require("q")?;
    with_type!("q", q.dtype, T in [f32, f16, bf16], attend::<T>(runner, inputs, settings))
}

/// Sizes of `[batch, rows, heads, dim]`, or of `[batch, heads, rows, dim]`, in the former order.
fn shape_of(name: &str, tensor: &Tensor, heads_first: bool) -> Result<[usize; 4], Failure> {
    match tensor.shape[..] {
        [batch, heads, rows, dim] if heads_first => Ok([batch, rows, heads, dim]),
        [batch, rows, heads, dim] => Ok([batch, rows, heads, dim]),
        _ => Err(Failure::request(format!("{name}: shape {:?} has not 4 dimensions", tensor.shape))),
    }
}

/// Strides of batch, row and head.
fn strides_of([_, rows, heads, dim]: [usize; 4], heads_first: bool) -> [i64; 3] {
    let (row, head) = if heads_first { (dim, rows * dim) } else { (heads * dim, dim) };
    [rows * heads * dim, row, head].map(|stride| stride as i64)
}

/// The elements of a tensor whose trailing dimensions are `inner`.
fn integers(name: &str, tensor: &Tensor, inner: &[usize]) -> Result<Vec<i32>, Failure> {
    if tensor.shape.len() != inner.len() + 1 || tensor.shape[1..] != *inner {
        return Err(Failure::request(format!("{name}: shape {:?} is not [n, {inner:?}]", tensor.shape)));
    }
    with_type!(name, tensor.dtype, T in [i32], Ok(tensor.elements::<T>()))
}

/// The same, none of them negative, in groups.
fn triples(name: &str, tensor: &Tensor) -> Result<Vec<[u32; 3]>, Failure> {
    let negative = |_| Failure::request(format!("{name}: a negative element"));
    let elements = integers(name, tensor, &[3])?.into_iter().map(u32::try_from).collect::<Result<Vec<_>, _>>();
    Ok(elements.map_err(negative)?.chunks(3).map(|three| [three[0], three[1], three[2]]).collect())
}

fn visibility(inputs: &Tensors) -> Result<Visibility, Failure> {
    let segments = |name| -> Result<Vec<Segment>, Failure> {
        let triples = triples(name, inputs.require(name)?)?;
        Ok(triples.into_iter().map(|[frames, height, width]| Segment::video(frames, height, width)).collect())
    };
    let queries = segments("segments_q")?;
    let mut keys = if inputs.get("segments_k").is_some() { segments("segments_k")? } else { queries.clone() };
    if let Some(tensor) = inputs.get("segment_lengths") {
        let lengths = integers("segment_lengths", tensor, &[])?;
        if lengths.len() != keys.len() {
            let (lengths, keys) = (lengths.len(), keys.len());
            return Err(Failure::request(format!("segment_lengths: {lengths} for {keys} segments of keys")));
        }
        for (key, &length) in keys.iter_mut().zip(&lengths) {
            if let Ok(index) = u32::try_from(length) {
                *key = key.with_length(index);
            }
        }
    }
    let windows = inputs.get("windows").map_or(Ok(Vec::new()), |tensor| triples("windows", tensor))?;
    let rules = inputs.require("rules")?;
    if rules.shape[..] != [queries.len(), keys.len()] {
        let (n, m) = (queries.len(), keys.len());
        return Err(Failure::request(format!("rules: shape {:?}, but there are {n} x {m} segments", rules.shape)));
    }
    let rules = integers("rules", rules, &[keys.len()])?
        .into_iter()
        .map(|code| match code {
            0 => Ok(Rule::Hidden),
            1 => Ok(Rule::Full),
            2 => Ok(Rule::Causal),
            3 => Ok(Rule::ColumnCausal),
            _ => match usize::try_from(i64::from(code) - 4).ok().and_then(|window| windows.get(window)) {
                Some(&[frames, rows, columns]) => Ok(Rule::Window { frames, rows, columns }),
                None => Err(Failure::request(format!("rules: {code} with {} windows", windows.len()))),
            },
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Visibility::new(&queries, &keys, |q, k| rules[q * keys.len() + k])?)
}

fn attend<T: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let heads_first = settings.get("heads_first")?.unwrap_or(false);
    let visibility = visibility(inputs)?;
    let (q, k, v) = (inputs.require("q")?, inputs.require("k")?, inputs.require("v")?);
    let (row_index, kv_offset) = (inputs.get("row_index"), inputs.get("kv_offset"));
    let q_shape = shape_of("q", q, heads_first)?;
    let k_shape = shape_of("k", k, heads_first)?;
    let [batch, q_rows, heads, dim] = q_shape;
    let [k_batch, kv_rows, kv_heads, k_dim] = k_shape;
    let rows = visibility.query_count() as usize;
    let refuse = |what: String| Err(Failure::request(what));
    if k.shape != v.shape || k_dim != dim || k_batch != if kv_offset.is_some() { 1 } else { batch } {
        return refuse(format!("k has shape {:?}, v {:?}, and q {:?}", k.shape, v.shape, q.shape));
    }
    if k.dtype != q.dtype || v.dtype != q.dtype {
        return refuse(format!("q is {}, k {}, and v {}", q.dtype, k.dtype, v.dtype));
    }
    if row_index.is_none() && q_rows != rows {
        return refuse(format!("q has {q_rows} rows, but segments_q {rows} tokens"));
    }

    let out_shape = [batch, rows, heads, dim];
    let mut plan = ScaleAttention::<T>::builder(&visibility)
        .batch(batch)
        .heads(heads, kv_heads)
        .head_dim(dim)
        .q_strides(strides_of(q_shape, heads_first))
        .kv_strides(strides_of(k_shape, heads_first), strides_of(k_shape, heads_first))
        .out_strides(strides_of(out_shape, heads_first))
        .variant(settings.get("variant")?.unwrap_or_default());
    plan = if kv_offset.is_some() { plan.packed_keys(kv_rows) } else { plan.kv_rows(kv_rows) };
    if row_index.is_some() {
        plan = plan.gathered_rows(q_rows);
    }
    if let Some(scale) = settings.get("scale")? {
        plan = plan.softmax_scale(scale);
    }
    if let Some(bound) = settings.get("logit_bound")? {
        plan = plan.logit_bound(bound);
    }
    if let Some(groups) = settings.get("groups")? {
        plan = plan.tiles_an_item(groups);
    }
    if let Some(splits) = settings.get("splits")? {
        plan = plan.splits(splits);
    }
    if let Some(pack) = settings.get("pack")? {
        plan = plan.pack_heads(pack);
    }
    let plan = plan.build(&runner.info()?)?;

    let upload = |name: &str, inner: &[usize]| match inputs.get(name) {
        Some(tensor) => Ok::<_, Failure>(Some(runner.upload(&integers(name, tensor, inner)?)?)),
        None => Ok(None),
    };
    let lengths = upload("lengths", &[batch, kv_heads])?;
    let (row_index, kv_offset) = (upload("row_index", &[rows])?, upload("kv_offset", &[])?);
    let [q, k, v] = [q, k, v].map(|tensor| runner.upload(&tensor.elements::<T>()));
    let (q, k, v) = (q?, k?, v?);
    let schedule = runner.upload(plan.schedule().words())?;
    let elements = |shape: &[usize]| shape.iter().product::<usize>();
    let mut out = runner.output::<T>(elements(&out_shape))?;
    let mut lse = runner.output::<f32>(elements(&[batch, heads, rows]))?;
    let workspace_bytes = usize::try_from(plan.workspace_bytes());
    let mut workspace = runner.output::<u8>(workspace_bytes.map_err(|_| Failure::request("too large a workspace"))?)?;
    runner.run(|stream| {
        plan.run(
            stream,
            ScaleAttentionArgs {
                q: q.as_in(),
                k: k.as_in(),
                v: v.as_in(),
                out: out.as_out(),
                lse: Some(lse.as_out()),
                schedule: schedule.as_in(),
                lengths: lengths.as_ref().map(|lengths| lengths.as_in()),
                row_index: row_index.as_ref().map(|index| index.as_in()),
                kv_offset: kv_offset.as_ref().map(|offset| offset.as_in()),
                workspace: Some(workspace.as_out()),
            },
        )
    })?;

    let out_shape = if heads_first { [batch, heads, rows, dim] } else { out_shape };
    Ok(Tensors::default()
        .with("out", Tensor::new(&out_shape, &out.download()?))
        .with("lse", Tensor::new(&[batch, heads, rows], &lse.download()?)))
}

impl Setting for Variant {
    const WHAT: &'static str = "auto, portable or hopper";
    fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Variant::Auto),
            "portable" => Some(Variant::Portable),
            "hopper" => Some(Variant::Hopper),
            _ => None,
        }
    }
}
