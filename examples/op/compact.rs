use nextscale::compression::{Compact, CompactArgs, RopePairs, Turn};
use nextscale::dtype::Element;
use nextscale::{Access, F8E4M3, bf16, f16};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "compact",
    about: "Kept rows of keys and values gathered, or moved together in place.",
    inputs: &[
        TensorHelp {
            name: "k",
            dtypes: "f32, f16, bf16, f8",
            shape: "[sets, tokens, heads, dim]",
            about: "dim from 1 to 1024",
        },
        TensorHelp { name: "v", dtypes: "that of k", shape: "[sets, tokens, heads, its dim]", about: "optional" },
        TensorHelp { name: "indices", dtypes: "i32", shape: "[sets, heads, kept]", about: "in place ascending" },
        TensorHelp { name: "counts", dtypes: "i32", shape: "[sets, heads]", about: "default: kept" },
        TensorHelp { name: "positions", dtypes: "i32", shape: "[sets, heads, tokens]", about: "default: rows" },
        TensorHelp { name: "norms", dtypes: "f32", shape: "[sets, heads, tokens]", about: "optional; moves along" },
        TensorHelp { name: "cos", dtypes: "f32", shape: "[table_rows, rotary_dim / 2]", about: "keys are turned" },
        TensorHelp { name: "sin", dtypes: "f32", shape: "[table_rows, rotary_dim / 2]", about: "with cos" },
    ],
    settings: &[
        SettingHelp { name: "out_dtype", values: "f32 | f16 | bf16", about: "default: that of k" },
        SettingHelp { name: "in_place", values: "true | false", about: "default false" },
        SettingHelp { name: "renumber", values: "position", about: "of the first row; default: rows keep theirs" },
        SettingHelp { name: "pairs", values: "interleaved | half", about: "of the rotation; default half" },
        SettingHelp { name: "access", values: "auto | narrow | wide", about: "default auto" },
    ],
    outputs: &[
        TensorHelp { name: "k", dtypes: "out_dtype", shape: "[sets, kept, heads, dim]", about: "in place all rows" },
        TensorHelp { name: "v", dtypes: "out_dtype", shape: "[sets, kept, heads, its dim]", about: "if given" },
        TensorHelp { name: "positions", dtypes: "i32", shape: "[sets, heads, kept]", about: "in place all rows" },
        TensorHelp { name: "norms", dtypes: "f32", shape: "[sets, heads, kept]", about: "if given" },
        TensorHelp { name: "flags", dtypes: "u32", shape: "[1]", about: "what a kernel clamped" },
    ],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let k = inputs.require("k")?;
    let out = settings.get("out_dtype")?.unwrap_or(k.dtype);
    if k.dtype == out {
        return with_type!("k", k.dtype, T in [f32, f16, bf16, F8E4M3], compact::<T, T>(runner, inputs, settings));
    }
    with_type!("k", k.dtype, I in [f32, f16, bf16], {
        with_type!("out_dtype", out, O in [f32, f16, bf16], compact::<I, O>(runner, inputs, settings))
    })
}

fn compact<I: Element, O: Element>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let k = inputs.require("k")?;
    let k_shape @ [sets, tokens, heads, dim] = k.shape_of("k")?;
    let indices = inputs.require("indices")?;
    let indices_shape @ [_, _, kept] = indices.shape_of("indices")?;
    let in_place = settings.get("in_place")?.unwrap_or(false);
    let rows = if in_place { tokens } else { kept };
    let mut plan = Compact::<I, O>::builder(sets, heads, tokens, kept)
        .k(dim)
        .access(settings.get::<Access>("access")?.unwrap_or_default());
    if in_place {
        plan = plan.in_place();
    }
    if let Some(first) = settings.get("renumber")? {
        plan = plan.renumber(first);
    }
    let v = match inputs.get("v") {
        Some(v) => {
            let shape @ [_, _, _, its] = v.shape_of("v")?;
            plan = plan.v(its);
            Some((v.expect::<I>("v", &[sets, tokens, heads, its])?, shape))
        }
        None => None,
    };
    let table = match (inputs.get("cos"), inputs.get("sin")) {
        (Some(cos), Some(sin)) => {
            let shape @ [table_rows, half] = cos.shape_of("cos")?;
            let pairs = match settings.get::<String>("pairs")?.as_deref() {
                None | Some("half") => RopePairs::Half,
                Some("interleaved") => RopePairs::Interleaved,
                Some(other) => return Err(Failure::request(format!("pairs={other}: not interleaved or half"))),
            };
            plan = plan.turn(Turn { pairs, rotary_dim: 2 * half, table_rows, table_stride: None });
            Some([
                runner.upload(&cos.expect::<f32>("cos", &shape)?)?,
                runner.upload(&sin.expect::<f32>("sin", &shape)?)?,
            ])
        }
        (None, None) => None,
        _ => return Err(Failure::request("cos and sin go together")),
    };
    let plan = plan.build(&runner.info()?)?;

    let of_rows = [sets, heads, tokens];
    let positions = match inputs.get("positions") {
        Some(positions) => positions.expect::<i32>("positions", &of_rows)?,
        None => (0..sets * heads).flat_map(|_| 0..tokens as i32).collect(),
    };
    let norms = inputs.get("norms").map(|norms| norms.expect::<f32>("norms", &of_rows)).transpose()?;
    let counts = match inputs.get("counts") {
        Some(counts) => Some(runner.upload(&counts.expect::<i32>("counts", &[sets, heads])?)?),
        None => None,
    };
    let indices = runner.upload(&indices.expect::<i32>("indices", &[sets, heads, indices_shape[2]])?)?;
    let k = k.elements::<I>();
    // In place the inputs are where the outputs go; equal dtypes are checked by the plan.
    let out_of = |input: &[I], dim: usize| match in_place {
        true => runner.upload(bytemuck::cast_slice::<I, O>(input)),
        false => runner.output::<O>(sets * kept * heads * dim),
    };
    let mut k_out = out_of(&k, dim)?;
    let mut v_out = v.as_ref().map(|(v, shape)| out_of(v, shape[3])).transpose()?;
    let values = sets * heads * rows;
    let mut positions_out = if in_place { runner.upload(&positions)? } else { runner.output::<i32>(values)? };
    let mut norms_out = match &norms {
        Some(norms) if in_place => Some(runner.upload(norms)?),
        Some(_) => Some(runner.output::<f32>(values)?),
        None => None,
    };
    let (k, positions) = (runner.upload(&k)?, runner.upload(&positions)?);
    let v_in = v.as_ref().map(|(v, _)| runner.upload(v)).transpose()?;
    let norms = norms.map(|norms| runner.upload(&norms)).transpose()?;
    let mut flags = runner.upload(&[0u32])?;
    runner.run(|stream| {
        let mut args = CompactArgs::<I, O>::of(indices.as_in());
        args.k = (!in_place).then(|| k.as_in());
        args.v = v_in.as_ref().filter(|_| !in_place).map(|v| v.as_in());
        args.k_out = Some(k_out.as_out());
        args.v_out = v_out.as_mut().map(|v| v.as_out());
        args.counts = counts.as_ref().map(|counts| counts.as_in());
        args.positions = (!in_place).then(|| positions.as_in());
        args.positions_out = Some(positions_out.as_out());
        args.extras[0] = norms.as_ref().filter(|_| !in_place).map(|norms| norms.as_in());
        args.extras_out[0] = norms_out.as_mut().map(|norms| norms.as_out());
        args.cos = table.as_ref().map(|[cos, _]| cos.as_in());
        args.sin = table.as_ref().map(|[_, sin]| sin.as_in());
        args.flags = Some(flags.as_out());
        plan.run(stream, args)
    })?;
    let mut outputs = Tensors::default()
        .with("k", Tensor::new(&[sets, rows, heads, k_shape[3]], &k_out.download()?))
        .with("positions", Tensor::new(&[sets, heads, rows], &positions_out.download()?))
        .with("flags", Tensor::new(&[1], &flags.download()?));
    if let (Some(v_out), Some((_, shape))) = (v_out, v) {
        outputs = outputs.with("v", Tensor::new(&[sets, rows, heads, shape[3]], &v_out.download()?));
    }
    if let Some(norms) = norms_out {
        outputs = outputs.with("norms", Tensor::new(&[sets, heads, rows], &norms.download()?));
    }
    Ok(outputs)
}
