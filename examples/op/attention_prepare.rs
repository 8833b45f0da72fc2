use nextscale::attention::{AppendAt, Norm, Positions, Prepare, PrepareArgs, Rope};
use nextscale::dtype::{Element, Float};
use nextscale::{bf16, f16};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "attention_prepare",
    about: "Norm, rotary position embedding and cache append of queries, keys and values.",
    inputs: &[
        TensorHelp {
            name: "q",
            dtypes: "f32, f16, bf16",
            shape: "[batch, rows, heads, dim]",
            about: "optional, as are k and v; dim from 1 to 256",
        },
        TensorHelp {
            name: "k",
            dtypes: "that of q",
            shape: "[batch, rows, kv_heads, dim]",
            about: "goes to k_cache; without it no k_cache",
        },
        TensorHelp { name: "v", dtypes: "that of q", shape: "[batch, rows, kv_heads, dim]", about: "goes to v_cache" },
        TensorHelp {
            name: "k_cache",
            dtypes: "f32, f16, bf16",
            shape: "[batch, cache_rows, kv_heads, dim]",
            about: "what the cache holds before",
        },
        TensorHelp {
            name: "v_cache",
            dtypes: "that of k_cache",
            shape: "[batch, cache_rows, kv_heads, dim]",
            about: "what the cache holds before",
        },
        TensorHelp { name: "q_weight", dtypes: "f32", shape: "[dim]", about: "with norm=rms; default ones" },
        TensorHelp { name: "k_weight", dtypes: "f32", shape: "[dim]", about: "with norm=rms; default ones" },
        TensorHelp { name: "q_multiplier", dtypes: "f32", shape: "[heads]", about: "after the norm; default ones" },
        TensorHelp {
            name: "cos",
            dtypes: "f32",
            shape: "[table_rows, rotary_dim / 2], with full_table [table_rows, rotary_dim]",
            about: "with rope",
        },
        TensorHelp { name: "sin", dtypes: "f32", shape: "that of cos", about: "with rope" },
        TensorHelp {
            name: "positions",
            dtypes: "i32",
            shape: "[rows] or [batch, rows]",
            about: "rows of cos and sin; default: from the setting position on",
        },
        TensorHelp {
            name: "append_at",
            dtypes: "i32",
            shape: "[batch]",
            about: "first row of the caches that is written; default: the setting append_at for all",
        },
    ],
    settings: &[
        SettingHelp { name: "out_dtype", values: "f32 | f16 | bf16", about: "of q_out; default: that of q" },
        SettingHelp { name: "norm", values: "none | l2 | rms", about: "of q and k; default none" },
        SettingHelp { name: "eps", values: "number", about: "of the norm; default 1e-12 with l2, 1e-6 with rms" },
        SettingHelp {
            name: "rope",
            values: "none | interleaved | half",
            about: "how elements are paired; default none",
        },
        SettingHelp {
            name: "axes",
            values: "integer",
            about: "with rope=half: blocks with halves of their own; default 1",
        },
        SettingHelp { name: "full_table", values: "true | false", about: "a column an element; default false" },
        SettingHelp { name: "position", values: "integer", about: "of row 0; default 0" },
        SettingHelp {
            name: "position_at_append",
            values: "true | false",
            about: "position is where the row is appended",
        },
        SettingHelp { name: "append_at", values: "integer", about: "default 0" },
        SettingHelp {
            name: "access",
            values: "auto | narrow | wide",
            about: "how a kernel reaches memory; wide is refused where sizes do not allow it; default auto",
        },
    ],
    outputs: &[
        TensorHelp {
            name: "q_out",
            dtypes: "f32, f16, bf16",
            shape: "[batch, rows, heads, dim]",
            about: "if there is q; rounded once, to nearest even",
        },
        TensorHelp {
            name: "k_cache",
            dtypes: "f32, f16, bf16",
            shape: "[batch, cache_rows, kv_heads, dim]",
            about: "if there is k: the cache with the new rows",
        },
        TensorHelp {
            name: "v_cache",
            dtypes: "f32, f16, bf16",
            shape: "[batch, cache_rows, kv_heads, dim]",
            about: "if there is v: the cache with the new rows",
        },
        TensorHelp {
            name: "flags",
            dtypes: "u32",
            shape: "[1]",
            about: "not on the host: bit 1 says that a row was not appended, bit 2 that a position was clamped",
        },
    ],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let first = ["q", "k", "v"].into_iter().find_map(|name| inputs.get(name));
    let input = first.ok_or_else(|| Failure::request("one of the input tensors q, k, v is needed"))?.dtype;
    let cache = ["k_cache", "v_cache"].into_iter().find_map(|name| inputs.get(name)).map_or(input, |cache| cache.dtype);
    let out = settings.get("out_dtype")?.unwrap_or(input);
    with_type!("q, k, v", input, I in [f32, f16, bf16], {
        with_type!("out_dtype", out, O in [f32, f16, bf16], {
            with_type!("caches", cache, C in [f32, f16, bf16], prepare::<I, O, C>(runner, inputs, settings))
        })
    })
}

/// An input, uploaded if it is there.
fn upload<T: Element>(
    runner: &Runner,
    inputs: &Tensors,
    name: &str,
    shape: &[usize],
) -> Result<Option<Buffer<T>>, Failure> {
    inputs.get(name).map(|tensor| runner.upload(&tensor.expect(name, shape)?)).transpose()
}

fn prepare<I: Float, O: Float, C: Float>(
    runner: &Runner,
    inputs: &Tensors,
    settings: &Settings,
) -> Result<Tensors, Failure> {
    let shape = |name: &str| inputs.get(name).map(|tensor| tensor.shape_of::<4>(name)).transpose();
    let shapes = [shape("q")?, shape("k")?, shape("v")?];
    let [batch, rows, _, dim] = *shapes.iter().flatten().next().expect("one of them is there");
    let access = settings.get("access")?.unwrap_or_default();
    let mut plan = Prepare::<I, O, C>::builder(dim).batch(batch).rows(rows).access(access);

    let heads = |at: usize| shapes[at].map_or(0, |[_, _, heads, _]| heads);
    let input = |at: usize, name| upload::<I>(runner, inputs, name, &[batch, rows, heads(at), dim]);
    let (q, k, v) = (input(0, "q")?, input(1, "k")?, input(2, "v")?);
    let mut q_out = None;
    if q.is_some() {
        plan = plan.q(heads(0));
        q_out = Some(runner.output::<O>(batch * rows * heads(0) * dim)?);
    }
    let cache = |at: usize, name: &'static str| -> Result<Option<(usize, Buffer<C>)>, Failure> {
        if shapes[at].is_none() {
            return Ok(None);
        }
        let [_, cache_rows, ..] = inputs.require(name)?.shape_of::<4>(name)?;
        let cache = upload(runner, inputs, name, &[batch, cache_rows, heads(at), dim])?;
        Ok(cache.map(|cache| (cache_rows, cache)))
    };
    let (mut k_cache, mut v_cache) = (cache(1, "k_cache")?, cache(2, "v_cache")?);
    if let Some((cache_rows, _)) = &k_cache {
        plan = plan.k(heads(1), *cache_rows);
    }
    if let Some((cache_rows, _)) = &v_cache {
        plan = plan.v(heads(2), *cache_rows);
    }

    let eps = settings.get("eps")?;
    plan = plan.norm(match settings.get::<String>("norm")?.as_deref().unwrap_or("none") {
        "none" => Norm::None,
        "l2" => Norm::L2 { eps: eps.unwrap_or(1e-12) },
        "rms" => Norm::Rms { eps: eps.unwrap_or(1e-6) },
        other => return Err(Failure::request(format!("norm={other}: not none, l2 or rms"))),
    });
    let rope = settings.get::<String>("rope")?.unwrap_or("none".into());
    let (mut cos, mut sin) = (None, None);
    if rope != "none" {
        let [table_rows, columns] = inputs.require("cos")?.shape_of("cos")?;
        cos = upload::<f32>(runner, inputs, "cos", &[table_rows, columns])?;
        sin = upload::<f32>(runner, inputs, "sin", &[table_rows, columns])?;
        let full = settings.get("full_table")?.unwrap_or(false);
        let mut described = match rope.as_str() {
            "interleaved" => Rope::interleaved(table_rows),
            "half" => Rope::half(table_rows),
            other => return Err(Failure::request(format!("rope={other}: not none, interleaved or half"))),
        }
        .rotary_dim(if full { columns } else { 2 * columns });
        if full {
            described = described.full_table();
        }
        plan = plan.rope(described.axes(settings.get("axes")?.unwrap_or(1)));
    }
    let positions = match inputs.get("positions") {
        Some(tensor) if tensor.shape.len() == 2 => {
            plan = plan.positions_strides([rows as i64, 1]);
            upload::<i32>(runner, inputs, "positions", &[batch, rows])?
        }
        _ => upload(runner, inputs, "positions", &[rows])?,
    };
    let append_at = upload::<i32>(runner, inputs, "append_at", &[batch])?;
    let weight = |name| upload::<f32>(runner, inputs, name, &[dim]);
    let (q_weight, k_weight) = (weight("q_weight")?, weight("k_weight")?);
    let q_multiplier = upload::<f32>(runner, inputs, "q_multiplier", &[heads(0)])?;
    let (position, row) = (settings.get("position")?.unwrap_or(0), settings.get("append_at")?.unwrap_or(0));
    let at_append = settings.get("position_at_append")?.unwrap_or(false);

    let plan = plan.build(&runner.info()?)?;
    let mut flags = runner.upload(&[0u32])?;
    runner.run(|stream| {
        plan.run(
            stream,
            PrepareArgs {
                q: q.as_ref().map(Buffer::as_in),
                k: k.as_ref().map(Buffer::as_in),
                v: v.as_ref().map(Buffer::as_in),
                q_out: q_out.as_mut().map(Buffer::as_out),
                k_cache: k_cache.as_mut().map(|(_, cache)| cache.as_out()),
                v_cache: v_cache.as_mut().map(|(_, cache)| cache.as_out()),
                q_weight: q_weight.as_ref().map(Buffer::as_in),
                k_weight: k_weight.as_ref().map(Buffer::as_in),
                q_multiplier: q_multiplier.as_ref().map(Buffer::as_in),
                cos: cos.as_ref().map(Buffer::as_in),
                sin: sin.as_ref().map(Buffer::as_in),
                positions: match &positions {
                    Some(positions) => Positions::Of(positions.as_in()),
                    None if at_append => Positions::Appended,
                    None => Positions::From(position),
                },
                append_at: match &append_at {
                    Some(rows) => AppendAt::Rows(rows.as_in()),
                    None => AppendAt::Row(row),
                },
                flags: Some(flags.as_out()),
            },
        )
    })?;

    let mut outputs = Tensors::default();
    if let Some(q_out) = q_out {
        outputs = outputs.with("q_out", Tensor::new(&[batch, rows, heads(0), dim], &q_out.download()?));
    }
    for (at, name, cache) in [(1, "k_cache", k_cache), (2, "v_cache", v_cache)] {
        if let Some((cache_rows, cache)) = cache {
            let cache = cache.download()?;
            outputs = outputs.with(name, Tensor::new(&[batch, cache_rows, heads(at), dim], &cache));
        }
    }
    // The host refuses what a kernel would flag.
    Ok(if runner.is_host() { outputs } else { outputs.with("flags", Tensor::new(&[1], &flags.download()?)) })
}
