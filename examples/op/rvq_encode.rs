use nextscale::dtype::{Code, Float};
use nextscale::quantization::{
    Codebook, CodebookArgs, EncodeVariant, Filter, Metric, Projections, RvqEncode, RvqEncodeArgs,
};
use nextscale::{DType, bf16, f16};

use crate::request::{Failure, Op, Setting, SettingHelp, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "rvq_encode",
    about: "Residual vector quantization: codes of the nearest codebook rows, level by level; exact.",
    inputs: &[
        TensorHelp {
            name: "input",
            dtypes: "f32, f16, bf16",
            shape: "[batch, rows, dim]; with channels_first [batch, dim, rows]; latent in place of dim if projected",
            about: "rows to encode",
        },
        TensorHelp {
            name: "codebooks",
            dtypes: "f32, f16, bf16",
            shape: "[levels, entries, dim], or [entries, dim] shared by all levels; with padding_row one entry more",
            about: "rows, or with usage their sums",
        },
        TensorHelp {
            name: "usage",
            dtypes: "f32",
            shape: "[levels, entries] or [entries]",
            about: "optional: codebooks are divided by max(usage, usage_eps)",
        },
        TensorHelp {
            name: "in_weight",
            dtypes: "f32",
            shape: "[levels, dim, latent]",
            about: "optional, with in_bias [levels, dim], out_weight [levels, latent, dim], out_bias [levels, latent]",
        },
        TensorHelp { name: "in_bias", dtypes: "f32", shape: "[levels, dim]", about: "with in_weight" },
        TensorHelp { name: "out_weight", dtypes: "f32", shape: "[levels, latent, dim]", about: "with in_weight" },
        TensorHelp { name: "out_bias", dtypes: "f32", shape: "[levels, latent]", about: "with in_weight" },
    ],
    settings: &[
        SettingHelp { name: "levels", values: "integer", about: "levels to encode; default: those of codebooks" },
        SettingHelp { name: "codes_dtype", values: "u16 | u32 | i64", about: "default u32" },
        SettingHelp { name: "metric", values: "l2 | cosine_raw | cosine_unit", about: "default l2" },
        SettingHelp { name: "eps", values: "number", about: "least norm of a cosine metric; default 1e-12" },
        SettingHelp { name: "usage_eps", values: "number", about: "least count; default 1e-5" },
        SettingHelp { name: "padding_row", values: "true | false", about: "the last row is no code; default false" },
        SettingHelp { name: "channels_first", values: "true | false", about: "the layout of vectors; default false" },
        SettingHelp { name: "rows_first", values: "true | false", about: "the layout of codes; default false" },
        SettingHelp { name: "filter", values: "auto | bf16 | bf16x3", about: "what kernels filter with; default auto" },
        SettingHelp {
            name: "variant",
            values: "auto | portable | hopper | stream",
            about: "the kernel; refused where it does not take the problem; default auto",
        },
    ],
    outputs: &[
        TensorHelp {
            name: "codes",
            dtypes: "u16, u32, i64",
            shape: "[batch, levels, rows], with rows_first [batch, rows, levels]",
            about: "the least exact score wins, the lowest code of equals",
        },
        TensorHelp {
            name: "quantized",
            dtypes: "that of input",
            shape: "that of input",
            about: "sum of the rows chosen",
        },
        TensorHelp { name: "residual", dtypes: "that of input", shape: "that of input", about: "what is left" },
        TensorHelp { name: "distances", dtypes: "f32", shape: "[batch, levels, rows]", about: "the winners' scores" },
        TensorHelp { name: "histogram", dtypes: "u32", shape: "[levels, entries]", about: "how often each was chosen" },
        TensorHelp {
            name: "flags",
            dtypes: "u32",
            shape: "[1]",
            about: "8: codebooks were not finite (on the host refused); 16: a row had no finite score",
        },
    ],
    run,
};

impl Setting for EncodeVariant {
    const WHAT: &'static str = "auto, portable, hopper or stream";
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "auto" => EncodeVariant::Auto,
            "portable" => EncodeVariant::Portable,
            "hopper" => EncodeVariant::Hopper,
            "stream" => EncodeVariant::Stream,
            _ => return None,
        })
    }
}

impl Setting for Filter {
    const WHAT: &'static str = "auto, bf16 or bf16x3";
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "auto" => Filter::Auto,
            "bf16" => Filter::Bf16,
            "bf16x3" => Filter::Bf16x3,
            _ => return None,
        })
    }
}

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let (input, books) = (inputs.require("input")?, inputs.require("codebooks")?);
    let codes = settings.get("codes_dtype")?.unwrap_or(DType::U32);
    with_type!("codes_dtype", codes, C in [u16, u32, i64], {
        with_type!("input", input.dtype, X in [f32, f16, bf16], {
            with_type!("codebooks", books.dtype, E in [f32, f16, bf16], {
                encode::<C, X, E>(runner, inputs, settings)
            })
        })
    })
}

fn encode<C: Code, X: Float, E: Float>(
    runner: &Runner,
    inputs: &Tensors,
    settings: &Settings,
) -> Result<Tensors, Failure> {
    let (input, books) = (inputs.require("input")?, inputs.require("codebooks")?);
    let flag = |name| Ok::<_, Failure>(settings.get(name)?.unwrap_or(false));
    let (channels_first, rows_first) = (flag("channels_first")?, flag("rows_first")?);
    let padding_row = flag("padding_row")?;
    let [batch, first, second] = input.shape_of::<3>("input")?;
    let (rows, width) = if channels_first { (second, first) } else { (first, second) };
    let (book_levels, all, dim) = match books.shape[..] {
        [levels, all, dim] => (levels, all, dim),
        [all, dim] => (1, all, dim),
        _ => return Err(Failure::request(format!("codebooks: shape {:?} has not 2 or 3 dimensions", books.shape))),
    };
    let entries = all.saturating_sub(usize::from(padding_row));
    let levels = settings.get("levels")?.unwrap_or(book_levels);
    let projected = inputs.get("in_weight").is_some();
    if !projected && width != dim {
        return Err(Failure::request(format!("input has rows of {width}, codebooks of {dim}")));
    }

    let eps = settings.get("eps")?.unwrap_or(1e-12f32);
    let metric = match settings.get::<String>("metric")?.as_deref().unwrap_or("l2") {
        "l2" => Metric::L2,
        "cosine_raw" => Metric::CosineRaw { eps },
        "cosine_unit" => Metric::CosineUnit { eps },
        other => return Err(Failure::request(format!("metric: {other:?} is not l2, cosine_raw or cosine_unit"))),
    };
    let info = runner.info()?;
    let mut book =
        Codebook::builder(book_levels, entries, dim).metric(metric).filter(settings.get("filter")?.unwrap_or_default());
    let usage = inputs.get("usage").map(|usage| usage.elements::<f32>());
    if usage.is_some() {
        book = book.moving_average(settings.get("usage_eps")?.unwrap_or(1e-5f32));
    }
    if padding_row {
        book = book.padding_row();
    }
    let book = book.build(&info)?;
    let mut plan = RvqEncode::<X, C>::builder(&book)
        .levels(levels)
        .batch(batch)
        .rows(rows)
        .variant(settings.get("variant")?.unwrap_or_default());
    if projected {
        plan = plan.projected(width);
    }
    if channels_first {
        plan = plan.channels_first();
    }
    if rows_first {
        plan = plan.codes_rows_first();
    }
    let plan = plan.build(&info)?;

    let mut flags = runner.upload(&[0u32])?;
    let mut prepared = runner.output::<u8>(book.bytes() as usize)?;
    let source = runner.upload(&books.elements::<E>())?;
    let usage = usage.map(|usage| runner.upload(&usage)).transpose()?;
    runner.run(|stream| {
        let args = CodebookArgs {
            rows: source.as_in(),
            usage: usage.as_ref().map(|usage| usage.as_in()),
            prepared: prepared.as_out(),
            flags: Some(flags.as_out()),
        };
        book.prepare(stream, args)
    })?;

    let vectors = batch * rows * width;
    let x = runner.upload(&input.elements::<X>())?;
    let mut codes = runner.output::<C>(batch * levels * rows)?;
    let (mut quantized, mut residual) = (runner.output::<X>(vectors)?, runner.output::<X>(vectors)?);
    let mut distances = runner.output::<f32>(batch * levels * rows)?;
    let mut histogram = runner.upload(&vec![0u32; levels * entries])?;
    let weights = if projected {
        let of = |name, shape: &[usize]| runner.upload(&inputs.require(name)?.expect::<f32>(name, shape)?);
        let latent = width;
        Some([
            of("in_weight", &[levels, dim, latent])?,
            of("in_bias", &[levels, dim])?,
            of("out_weight", &[levels, latent, dim])?,
            of("out_bias", &[levels, latent])?,
        ])
    } else {
        None
    };
    runner.run(|stream| {
        plan.run(
            stream,
            RvqEncodeArgs {
                input: x.as_in(),
                codebook: prepared.as_in(),
                codes: codes.as_out(),
                quantized: Some(quantized.as_out()),
                residual: Some(residual.as_out()),
                distances: Some(distances.as_out()),
                histogram: Some(histogram.as_out()),
                flags: Some(flags.as_out()),
                projections: weights.as_ref().map(|[in_weight, in_bias, out_weight, out_bias]| Projections {
                    in_weight: in_weight.as_in(),
                    in_bias: in_bias.as_in(),
                    out_weight: out_weight.as_in(),
                    out_bias: out_bias.as_in(),
                }),
            },
        )
    })?;

    let codes_shape = if rows_first { [batch, rows, levels] } else { [batch, levels, rows] };
    Ok(Tensors::default()
        .with("codes", Tensor::new(&codes_shape, &codes.download()?))
        .with("quantized", Tensor::new(&input.shape, &quantized.download()?))
        .with("residual", Tensor::new(&input.shape, &residual.download()?))
        .with("distances", Tensor::new(&[batch, levels, rows], &distances.download()?))
        .with("histogram", Tensor::new(&[levels, entries], &histogram.download()?))
        .with("flags", Tensor::new(&[1], &flags.download()?)))
}
