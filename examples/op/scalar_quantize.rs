use nextscale::dtype::{Code, Float};
use nextscale::quantization::{
    BitOrder, Bits, BitsArgs, Flips, Fsq, FsqArgs, FsqBound, Remap, RemapArgs, Token, TokenKind,
};
use nextscale::{DType, bf16, f16};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

const VALUES_DTYPE: SettingHelp =
    SettingHelp { name: "values_dtype", values: "f32 | f16 | bf16", about: "default f32" };
const CODES_DTYPE: SettingHelp = SettingHelp { name: "codes_dtype", values: "u16 | u32 | i64", about: "default u32" };
const FLAGS: TensorHelp = TensorHelp {
    name: "flags",
    dtypes: "u32",
    shape: "[1]",
    about: "not on the host: bit 0 says that a code was clamped",
};

pub(crate) static BITS: Op = Op {
    name: "bits",
    about: "Bits between their forms (LFQ, BSQ): values by their signs, labels, integers; with random flips.",
    inputs: &[
        TensorHelp {
            name: "input",
            dtypes: "f32, f16, bf16; u8; u16, u32, i64",
            shape: "values or labels [rows, dim]; integers [rows]",
            about: "",
        },
        TensorHelp { name: "seeds", dtypes: "i64", shape: "[ceil(rows / rows_per_seed)]", about: "with a rate" },
    ],
    settings: &[
        SettingHelp { name: "dim", values: "integer", about: "of integers" },
        SettingHelp { name: "order", values: "msb | lsb", about: "whether channel 0 is the highest bit; default msb" },
        SettingHelp { name: "scale", values: "number", about: "default 1 / sqrt(dim)" },
        SettingHelp { name: "rate", values: "number", about: "the probability of a flip" },
        SettingHelp { name: "rows_per_seed", values: "integer", about: "default all" },
        SettingHelp { name: "first_row", values: "integer", about: "default 0" },
        VALUES_DTYPE,
        CODES_DTYPE,
    ],
    outputs: &[
        TensorHelp { name: "labels", dtypes: "u8", shape: "[rows, dim]", about: "" },
        TensorHelp { name: "values", dtypes: "f32, f16, bf16", shape: "[rows, dim]", about: "" },
        TensorHelp { name: "codes", dtypes: "u16, u32, i64", shape: "[rows]", about: "if dim bits fit" },
    ],
    run: run_bits,
};

pub(crate) static FSQ: Op = Op {
    name: "fsq",
    about: "Finite scalar quantization, of one or more quantizers one after the other.",
    inputs: &[
        TensorHelp { name: "z", dtypes: "f32, f16, bf16", shape: "[rows, dim]", about: "or indices, to go back from" },
        TensorHelp { name: "indices", dtypes: "u16, u32, i64", shape: "[rows, quantizers]", about: "" },
        TensorHelp { name: "scales", dtypes: "f32", shape: "[quantizers, dim]", about: "default: one of ones" },
        TensorHelp {
            name: "soft_clamp",
            dtypes: "f32",
            shape: "[dim]",
            about: "z becomes tanh(z / c) c; default: not",
        },
    ],
    settings: &[
        SettingHelp { name: "levels", values: "8,5,5,...", about: "of each channel" },
        SettingHelp { name: "bound", values: "tanh | symmetric | clamp", about: "default tanh" },
        VALUES_DTYPE,
        CODES_DTYPE,
    ],
    outputs: &[
        TensorHelp { name: "values", dtypes: "f32, f16, bf16", shape: "[rows, dim]", about: "" },
        TensorHelp { name: "indices", dtypes: "u16, u32, i64", shape: "[rows, quantizers]", about: "from z" },
        FLAGS,
    ],
    run: run_fsq,
};

pub(crate) static REMAP: Op = Op {
    name: "remap",
    about: "Labels by a table: out[i] = table[codes[i]].",
    inputs: &[
        TensorHelp { name: "codes", dtypes: "u16, u32, i64", shape: "[count]", about: "" },
        TensorHelp { name: "table", dtypes: "u16, u32, i64", shape: "[entries]", about: "" },
    ],
    settings: &[],
    outputs: &[TensorHelp { name: "out", dtypes: "that of table", shape: "[count]", about: "" }, FLAGS],
    run: run_remap,
};

fn run_bits(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let input = inputs.require("input")?;
    let values = settings.get("values_dtype")?.unwrap_or(DType::F32);
    let codes = settings.get("codes_dtype")?.unwrap_or(DType::U32);
    with_type!("input", input.dtype, I in [f32, f16, bf16, u8, u16, u32, i64], {
        with_type!("values_dtype", values, O in [f32, f16, bf16], {
            with_type!("codes_dtype", codes, C in [u16, u32, i64], bits::<I, O, C>(runner, inputs, settings))
        })
    })
}

fn bits<I: Token, O: Float, C: Code>(
    runner: &Runner,
    inputs: &Tensors,
    settings: &Settings,
) -> Result<Tensors, Failure> {
    let input = inputs.require("input")?;
    let (rows, dim) = match input.shape[..] {
        [rows] if I::KIND == TokenKind::Codes => (rows, settings.require("dim")?),
        [rows, dim] if I::KIND != TokenKind::Codes => (rows, dim),
        _ => return Err(Failure::request(format!("input: shape {:?}", input.shape))),
    };
    let mut builder = Bits::<I, O, C>::builder(rows, dim);
    match settings.get::<String>("order")?.as_deref() {
        None | Some("msb") => {}
        Some("lsb") => builder = builder.order(BitOrder::LsbFirst),
        Some(other) => return Err(Failure::request(format!("order={other}: not msb or lsb"))),
    }
    if let Some(scale) = settings.get("scale")? {
        builder = builder.scale(scale);
    }
    let rate: Option<f32> = settings.get("rate")?;
    if let Some(rate) = rate {
        let rows_per_seed = settings.get("rows_per_seed")?.unwrap_or(rows.max(1));
        builder = builder.flips(Flips { rate, rows_per_seed, first_row: settings.get("first_row")?.unwrap_or(0) });
    }
    let plan = builder.build(&runner.info()?)?;
    let of_input = runner.upload(&input.elements::<I>())?;
    let seeds = inputs.get("seeds").map(|seeds| runner.upload(&seeds.elements::<i64>())).transpose()?;
    let fits = dim <= 8 * size_of::<C>();
    let mut labels = runner.output::<u8>(rows * dim)?;
    let mut values = runner.output::<O>(rows * dim)?;
    let mut codes = runner.output::<C>(rows)?;
    let args = BitsArgs {
        input: of_input.as_in(),
        labels: Some(labels.as_out()),
        values: Some(values.as_out()),
        codes: fits.then(|| codes.as_out()),
        seeds: seeds.as_ref().map(Buffer::as_in),
    };
    runner.run(|stream| plan.run(stream, args))?;
    let outputs = Tensors::default()
        .with("labels", Tensor::new(&[rows, dim], &labels.download()?))
        .with("values", Tensor::new(&[rows, dim], &values.download()?));
    Ok(if fits { outputs.with("codes", Tensor::new(&[rows], &codes.download()?)) } else { outputs })
}

fn run_fsq(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let z = inputs.get("z").map_or(DType::F32, |z| z.dtype);
    let values = settings.get("values_dtype")?.unwrap_or(DType::F32);
    let codes = match inputs.get("indices") {
        Some(given) => given.dtype,
        None => settings.get("codes_dtype")?.unwrap_or(DType::U32),
    };
    with_type!("z", z, Z in [f32, f16, bf16], {
        with_type!("values_dtype", values, O in [f32, f16, bf16], {
            with_type!("indices", codes, C in [u16, u32, i64], fsq::<Z, O, C>(runner, inputs, settings))
        })
    })
}

fn fsq<Z: Float, O: Float, C: Code>(
    runner: &Runner,
    inputs: &Tensors,
    settings: &Settings,
) -> Result<Tensors, Failure> {
    let text: String = settings.require("levels")?;
    let levels: Result<Vec<usize>, _> = text.split(',').map(str::parse).collect();
    let levels = levels.map_err(|_| Failure::request(format!("levels={text}: not numbers between commas")))?;
    let (z, given) = (inputs.get("z"), inputs.get("indices"));
    let source = z.or(given).ok_or_else(|| Failure::request("z or indices, one of them"))?;
    let [rows, _] = source.shape_of("z or indices")?;
    let mut builder = Fsq::<Z, O, C>::builder(rows, &levels);
    let mut quantizers = 1;
    if let Some(scales) = inputs.get("scales") {
        let [count, dim] = scales.shape_of("scales")?;
        quantizers = count;
        let scales: Vec<Vec<f32>> = scales.elements::<f32>().chunks(dim.max(1)).map(<[f32]>::to_vec).collect();
        builder = builder.scales(&scales);
    }
    if let Some(clamp) = inputs.get("soft_clamp") {
        builder = builder.soft_clamp(&clamp.elements::<f32>());
    }
    builder = builder.bound(match settings.get::<String>("bound")?.as_deref() {
        None | Some("tanh") => FsqBound::Tanh,
        Some("symmetric") => FsqBound::Symmetric,
        Some("clamp") => FsqBound::Clamp,
        Some(other) => return Err(Failure::request(format!("bound={other}: not tanh, symmetric or clamp"))),
    });
    let plan = builder.build(&runner.info()?)?;
    let of_z = z.map(|z| runner.upload(&z.elements::<Z>())).transpose()?;
    let of_given = given.filter(|_| z.is_none()).map(|given| runner.upload(&given.elements::<C>())).transpose()?;
    let mut values = runner.output::<O>(rows * levels.len())?;
    let mut indices = runner.output::<C>(rows * quantizers)?;
    let mut flags = runner.upload(&[0u32])?;
    let args = FsqArgs {
        z: of_z.as_ref().map(Buffer::as_in),
        values: Some(values.as_out()),
        indices: z.is_some().then(|| indices.as_out()),
        given: of_given.as_ref().map(Buffer::as_in),
        flags: Some(flags.as_out()),
    };
    runner.run(|stream| plan.run(stream, args))?;
    let mut outputs = Tensors::default().with("values", Tensor::new(&[rows, levels.len()], &values.download()?));
    if z.is_some() {
        outputs = outputs.with("indices", Tensor::new(&[rows, quantizers], &indices.download()?));
    }
    Ok(if runner.is_host() { outputs } else { outputs.with("flags", Tensor::new(&[1], &flags.download()?)) })
}

fn run_remap(runner: &Runner, inputs: &Tensors, _: &Settings) -> Result<Tensors, Failure> {
    let (codes, table) = (inputs.require("codes")?, inputs.require("table")?);
    with_type!("codes", codes.dtype, C in [u16, u32, i64], {
        with_type!("table", table.dtype, O in [u16, u32, i64], remap::<C, O>(runner, codes, table))
    })
}

fn remap<C: Code, O: Code>(runner: &Runner, codes: &Tensor, table: &Tensor) -> Result<Tensors, Failure> {
    let ([count], [entries]) = (codes.shape_of("codes")?, table.shape_of("table")?);
    let plan = Remap::<C, O>::new(count, entries)?;
    let (of_codes, of_table) = (runner.upload(&codes.elements::<C>())?, runner.upload(&table.elements::<O>())?);
    let mut out = runner.output::<O>(count)?;
    let mut flags = runner.upload(&[0u32])?;
    let args =
        RemapArgs { codes: of_codes.as_in(), table: of_table.as_in(), out: out.as_out(), flags: Some(flags.as_out()) };
    runner.run(|stream| plan.run(stream, args))?;
    let outputs = Tensors::default().with("out", Tensor::new(&[count], &out.download()?));
    Ok(if runner.is_host() { outputs } else { outputs.with("flags", Tensor::new(&[1], &flags.download()?)) })
}
