use nextscale::compression::{Format, Pack, PackArgs, PackBuilder, Rotate, RotateArgs, Rotation, UnpackArgs};
use nextscale::dtype::Float;
use nextscale::{DType, bf16, f16};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

const FORMAT: SettingHelp =
    SettingHelp { name: "format", values: "fp8 | int8 | uniform | channel | lloyd_max", about: "" };
const BITS: SettingHelp = SettingHelp { name: "bits", values: "2 | 3 | 4 | 8", about: "of the last three; default 4" };
const GROUP: SettingHelp = SettingHelp {
    name: "group",
    values: "integer",
    about: "uniform: elements, default a row; channel: rows, default 32",
};
const RENORMALIZE: SettingHelp =
    SettingHelp { name: "renormalize", values: "true | false", about: "of lloyd_max; default true" };
const INLINE: SettingHelp =
    SettingHelp { name: "inline", values: "true | false", about: "numbers in the slots; default false" };
const ROTATION: SettingHelp =
    SettingHelp { name: "rotation", values: "none | hadamard | a seed", about: "default none" };
const NUMBERS: SettingHelp = SettingHelp { name: "numbers_dtype", values: "f32 | f16", about: "default f32" };
const ACCESS: SettingHelp = SettingHelp { name: "access", values: "auto | narrow | wide", about: "default auto" };
const COUNTS: TensorHelp =
    TensorHelp { name: "counts", dtypes: "i32", shape: "[sets, heads]", about: "rows that there are; default all" };
const SCALES: TensorHelp =
    TensorHelp { name: "scales", dtypes: "f32", shape: "[sets, heads]", about: "given scales, of fp8 and int8" };
const FLAGS: TensorHelp = TensorHelp {
    name: "flags",
    dtypes: "u32",
    shape: "[1]",
    about: "1: not finite; 2, 4: a kept index or a count was clamped",
};
const NUMBERS_SHAPE: &str = "[sets, rows / rows of a group, heads, groups * n], if neither inline nor given";

pub(crate) static PACK: Op = Op {
    name: "pack",
    about: "Rows of keys or values in few bits: gathered, rotated, quantized.",
    inputs: &[
        TensorHelp { name: "input", dtypes: "f32, f16, bf16", shape: "[sets, tokens, heads, dim]", about: "" },
        TensorHelp { name: "kept", dtypes: "i32", shape: "[sets, heads, rows]", about: "tokens; default all" },
        COUNTS,
        SCALES,
    ],
    settings: &[FORMAT, BITS, GROUP, RENORMALIZE, INLINE, ROTATION, NUMBERS, ACCESS],
    outputs: &[
        TensorHelp { name: "codes", dtypes: "u8", shape: "[sets, rows, heads, slot]", about: "" },
        TensorHelp { name: "numbers", dtypes: "f32, f16", shape: NUMBERS_SHAPE, about: "" },
        FLAGS,
    ],
    run: |runner, inputs, settings| with_types(runner, inputs, settings, inputs.require("input")?.dtype, true),
};

pub(crate) static UNPACK: Op = Op {
    name: "unpack",
    about: "What `pack` packed, unpacked: to `dtype`, of `dim` elements.",
    inputs: &[
        TensorHelp { name: "codes", dtypes: "u8", shape: "[sets, rows, heads, slot]", about: "" },
        TensorHelp { name: "numbers", dtypes: "f32, f16", shape: NUMBERS_SHAPE, about: "" },
        COUNTS,
        SCALES,
    ],
    settings: &[
        FORMAT,
        BITS,
        GROUP,
        RENORMALIZE,
        INLINE,
        ROTATION,
        NUMBERS,
        ACCESS,
        SettingHelp { name: "dim", values: "integer", about: "" },
        SettingHelp { name: "dtype", values: "f32 | f16 | bf16", about: "default f32" },
    ],
    outputs: &[
        TensorHelp { name: "out", dtypes: "f32, f16, bf16", shape: "[sets, rows, heads, dim]", about: "" },
        FLAGS,
    ],
    run: |runner, inputs, settings| {
        let dtype = settings.get("dtype")?.unwrap_or(DType::F32);
        with_types(runner, inputs, settings, dtype, false)
    },
};

pub(crate) static ROTATE: Op = Op {
    name: "rotate",
    about: "Rows rotated by signs and a Walsh-Hadamard transform, or back.",
    inputs: &[TensorHelp { name: "input", dtypes: "f32, f16, bf16", shape: "[batch, rows, heads, dim]", about: "" }],
    settings: &[ROTATION, SettingHelp { name: "inverse", values: "true | false", about: "default false" }],
    outputs: &[TensorHelp { name: "out", dtypes: "that of input", shape: "[batch, rows, heads, dim]", about: "" }],
    run: run_rotate,
};

fn with_types(
    runner: &Runner,
    inputs: &Tensors,
    settings: &Settings,
    dtype: DType,
    packs: bool,
) -> Result<Tensors, Failure> {
    let numbers = settings.get("numbers_dtype")?.unwrap_or(DType::F32);
    with_type!("input", dtype, T in [f32, f16, bf16], {
        with_type!("numbers_dtype", numbers, N in [f32, f16], {
            if packs { pack::<T, N>(runner, inputs, settings) } else { unpack::<T, N>(runner, inputs, settings) }
        })
    })
}

fn rotation(settings: &Settings) -> Result<Option<Rotation>, Failure> {
    match settings.get::<String>("rotation")?.as_deref() {
        None | Some("none") => Ok(None),
        Some("hadamard") => Ok(Some(Rotation::HADAMARD)),
        Some(_) => Ok(settings.get("rotation")?.map(Rotation::seeded)),
    }
}

fn format(settings: &Settings) -> Result<Format, Failure> {
    let bits = settings.get("bits")?.unwrap_or(4);
    let group: Option<u32> = settings.get("group")?;
    match settings.require::<String>("format")?.as_str() {
        "fp8" => Ok(Format::Fp8),
        "int8" => Ok(Format::Int8),
        "uniform" => Ok(Format::Uniform { bits, group }),
        "channel" => Ok(Format::Channel { bits, rows: group.unwrap_or(32) }),
        "lloyd_max" => Ok(Format::LloydMax { bits, renormalize: settings.get("renormalize")?.unwrap_or(true) }),
        other => Err(Failure::request(format!("format={other}: not fp8, int8, uniform, channel or lloyd_max"))),
    }
}

/// What both directions set.
fn common<T: Float, N: Float>(
    mut builder: PackBuilder<T, N>,
    inputs: &Tensors,
    settings: &Settings,
    sets: usize,
    heads: usize,
) -> Result<PackBuilder<T, N>, Failure> {
    builder = builder.sets(sets).access(settings.get("access")?.unwrap_or_default());
    if let Some(rotation) = rotation(settings)? {
        builder = builder.rotation(rotation);
    }
    if settings.get("inline")?.unwrap_or(false) {
        builder = builder.inline();
    }
    if inputs.get("counts").is_some() {
        builder = builder.counted();
    }
    Ok(if inputs.get("scales").is_some() { builder.given_scales([heads as i64, 1]) } else { builder })
}

fn lists<T: nextscale::dtype::Element>(
    runner: &Runner,
    inputs: &Tensors,
    name: &str,
    shape: &[usize],
) -> Result<Option<Buffer<T>>, Failure> {
    inputs.get(name).map(|tensor| runner.upload(&tensor.expect::<T>(name, shape)?)).transpose()
}

fn pack<T: Float, N: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let input = inputs.require("input")?;
    let [sets, tokens, heads, dim] = input.shape_of("input")?;
    let format = format(settings)?;
    let mut builder = common(Pack::<T, N>::builder(format, tokens, heads, dim), inputs, settings, sets, heads)?;
    let mut rows = tokens;
    if let Some(kept) = inputs.get("kept") {
        [_, _, rows] = kept.shape_of("kept")?;
        builder = builder.kept(rows);
    }
    let plan = builder.build(&runner.info()?)?;
    let kept = lists::<i32>(runner, inputs, "kept", &[sets, heads, rows])?;
    let counts = lists::<i32>(runner, inputs, "counts", &[sets, heads])?;
    let scales = lists::<f32>(runner, inputs, "scales", &[sets, heads])?;
    let of_input = runner.upload(&input.elements::<T>())?;
    let mut codes = runner.output::<u8>(plan.codes_len() as usize)?;
    let mut numbers = runner.output::<N>(plan.numbers_len() as usize)?;
    let mut flags = runner.upload(&[0u32])?;
    let args = PackArgs {
        input: of_input.as_in(),
        codes: codes.as_out(),
        numbers: (plan.numbers_len() > 0).then(|| numbers.as_out()),
        scales: scales.as_ref().map(Buffer::as_in),
        kept: kept.as_ref().map(Buffer::as_in),
        counts: counts.as_ref().map(Buffer::as_in),
        flags: Some(flags.as_out()),
    };
    runner.run(|stream| plan.pack(stream, args))?;
    let mut outputs = Tensors::default()
        .with("codes", Tensor::new(&[sets, rows, heads, plan.slot_bytes()], &codes.download()?))
        .with("flags", Tensor::new(&[1], &flags.download()?));
    if plan.numbers_len() > 0 {
        let shape = [sets, rows / format.rows(), heads, format.groups(dim) * format.numbers()];
        outputs = outputs.with("numbers", Tensor::new(&shape, &numbers.download()?));
    }
    Ok(outputs)
}

fn unpack<T: Float, N: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let codes = inputs.require("codes")?;
    let [sets, rows, heads, slot] = codes.shape_of("codes")?;
    let (format, dim) = (format(settings)?, settings.require("dim")?);
    let plan = common(Pack::<T, N>::builder(format, rows, heads, dim), inputs, settings, sets, heads)?
        .build(&runner.info()?)?;
    if slot != plan.slot_bytes() {
        return Err(Failure::request(format!("codes: slots of {slot} bytes instead of {}", plan.slot_bytes())));
    }
    let shape = [sets, rows / format.rows(), heads, format.groups(dim) * format.numbers()];
    let numbers = lists::<N>(runner, inputs, "numbers", &shape)?;
    let counts = lists::<i32>(runner, inputs, "counts", &[sets, heads])?;
    let scales = lists::<f32>(runner, inputs, "scales", &[sets, heads])?;
    let of_codes = runner.upload(&codes.expect::<u8>("codes", &[sets, rows, heads, slot])?)?;
    let mut out = runner.output::<T>(sets * rows * heads * dim)?;
    let mut flags = runner.upload(&[0u32])?;
    let args = UnpackArgs {
        codes: of_codes.as_in(),
        numbers: numbers.as_ref().map(Buffer::as_in),
        scales: scales.as_ref().map(Buffer::as_in),
        counts: counts.as_ref().map(Buffer::as_in),
        out: out.as_out(),
        flags: Some(flags.as_out()),
    };
    runner.run(|stream| plan.unpack(stream, args))?;
    Ok(Tensors::default()
        .with("out", Tensor::new(&[sets, rows, heads, dim], &out.download()?))
        .with("flags", Tensor::new(&[1], &flags.download()?)))
}

fn run_rotate(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let input = inputs.require("input")?;
    with_type!("input", input.dtype, T in [f32, f16, bf16], {
        let [batch, rows, heads, dim] = input.shape_of("input")?;
        let rotation = rotation(settings)?.unwrap_or(Rotation::HADAMARD);
        let mut builder = Rotate::<T>::builder(rotation, rows, heads, dim).batch(batch);
        if settings.get("inverse")?.unwrap_or(false) {
            builder = builder.inverse();
        }
        let plan = builder.build(&runner.info()?)?;
        let of_input = runner.upload(&input.elements::<T>())?;
        let mut out = runner.output::<T>(batch * rows * heads * dim)?;
        let args = RotateArgs { input: of_input.as_in(), out: out.as_out() };
        runner.run(|stream| plan.run(stream, args))?;
        Ok(Tensors::default().with("out", Tensor::new(&[batch, rows, heads, dim], &out.download()?)))
    })
}
