use nextscale::dtype::{Code, Float};
use nextscale::quantization::{
    DecodeArgs, EncodeArgs, EncodeBitsArgs, FHat, FlipArgs, MultiScale, MultiScaleBuilder, Next, PhiTable, StepArgs,
    Token, TokenKind, Up, pack_phi,
};
use nextscale::{bf16, f16};

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

const SCHEDULE: SettingHelp = SettingHelp {
    name: "schedule",
    values: "1x1,2x2,...",
    about: "token grids, height x width; the last is the map's",
};
const PATCH: SettingHelp = SettingHelp { name: "patch", values: "1 | 2", about: "pixels of a token's side; default 1" };
const UP: SettingHelp = SettingHelp { name: "up", values: "bicubic | bilinear", about: "default bicubic" };
const NEXT: SettingHelp =
    SettingHelp { name: "next", values: "area | bilinear | tokens", about: "what inputs are made from; default area" };
const TABLE: SettingHelp = SettingHelp { name: "phi_table", values: "0,0,1,...", about: "the phi of each scale" };
const RATIO: SettingHelp = SettingHelp { name: "ratio", values: "number", about: "of the phis; default 0.5" };
const LAST: SettingHelp =
    SettingHelp { name: "last_phi", values: "true | false", about: "whether the last scale has a phi; default true" };
const CODEBOOK: TensorHelp =
    TensorHelp { name: "codebook", dtypes: "f32", shape: "[entries, channels]", about: "of codes" };
const WEIGHTS: TensorHelp = TensorHelp {
    name: "phi_weights",
    dtypes: "f32",
    shape: "[phis, channels, channels, 3, 3]",
    about: "with a phi_table",
};
const BIASES: TensorHelp =
    TensorHelp { name: "phi_biases", dtypes: "f32", shape: "[phis, channels]", about: "with a phi_table" };

pub(crate) static OP: Op = Op {
    name: "multi_scale",
    about: "Multi-scale quantizer: scales added to a map, f_hat += phi(resize(tokens)), and the inputs of the next ones.",
    inputs: &[
        TensorHelp {
            name: "tokens",
            dtypes: "u16, u32, i64; f32, f16, bf16; u8",
            shape: "codes [batch, l]; embeddings or bits [batch, l, width]",
            about: "of all scales, one after the other; width is channels * patch * patch",
        },
        CODEBOOK,
        WEIGHTS,
        BIASES,
    ],
    settings: &[
        SCHEDULE,
        PATCH,
        UP,
        NEXT,
        TABLE,
        RATIO,
        LAST,
        SettingHelp { name: "bit_scale", values: "number", about: "default 1 / sqrt(channels)" },
        SettingHelp { name: "next_dtype", values: "f32 | f16 | bf16", about: "of the inputs; default f32" },
        SettingHelp { name: "repeat", values: "1 | 2", about: "how often inputs are written; default 1" },
        SettingHelp {
            name: "how",
            values: "steps | turns | decode | prefixes | inputs",
            about: "a launch a scale in place, or between two maps; one launch for all, the last map or all; default steps",
        },
    ],
    outputs: &[
        TensorHelp {
            name: "f_hat",
            dtypes: "f32",
            shape: "[batch, channels, height, width]; prefixes: [scales, ...]",
            about: "",
        },
        TensorHelp {
            name: "inputs",
            dtypes: "f32, f16, bf16",
            shape: "[repeat, batch, l of scales 1 and up, width]",
            about: "not for decode and prefixes",
        },
        TensorHelp {
            name: "flags",
            dtypes: "u32",
            shape: "[1]",
            about: "not on the host: bit 0 says that a code was clamped",
        },
    ],
    run,
};

pub(crate) static ENCODE: Op = Op {
    name: "multi_scale_encode",
    about: "Multi-scale quantizer: a map becomes codes or bits, scale by scale.",
    inputs: &[
        TensorHelp { name: "f", dtypes: "f32", shape: "[batch, channels, height, width]", about: "" },
        TensorHelp {
            name: "codebook",
            dtypes: "f32",
            shape: "[entries, channels]",
            about: "without it the map becomes bits",
        },
        TensorHelp {
            name: "search",
            dtypes: "f32",
            shape: "[entries, channels]",
            about: "rows that are searched by cosine instead: normalised ones",
        },
        WEIGHTS,
        BIASES,
        TensorHelp { name: "seeds", dtypes: "i64", shape: "[batch]", about: "of the flips of bits" },
    ],
    settings: &[
        SCHEDULE,
        PATCH,
        UP,
        NEXT,
        TABLE,
        RATIO,
        LAST,
        SettingHelp { name: "codes_dtype", values: "u16 | u32 | i64", about: "default u32" },
        SettingHelp {
            name: "rates",
            values: "0.1,0.1,...",
            about: "with seeds: the probability of a flip in each scale",
        },
    ],
    outputs: &[
        TensorHelp { name: "codes", dtypes: "u16, u32, i64", shape: "[batch, l]", about: "with a codebook" },
        TensorHelp { name: "labels", dtypes: "u8", shape: "[batch, l, width]", about: "without" },
        TensorHelp { name: "flipped", dtypes: "u8", shape: "[batch, l, width]", about: "with seeds" },
        TensorHelp { name: "f_hat", dtypes: "f32", shape: "[batch, channels, height, width]", about: "" },
        TensorHelp { name: "inputs", dtypes: "f32", shape: "[batch, l of scales 1 and up, width]", about: "of bits" },
    ],
    run: run_encode,
};

fn list<T: std::str::FromStr>(name: &str, text: &str) -> Result<Vec<T>, Failure> {
    let wrong = |_| Failure::request(format!("{name}={text}: not numbers between commas"));
    text.split(',').map(|part| part.parse().map_err(wrong)).collect()
}

/// What both ops read.
struct Request {
    schedule: Vec<(usize, usize)>,
    patch: usize,
    phi: Vec<f32>,
}

impl Request {
    fn new(inputs: &Tensors, settings: &Settings) -> Result<Self, Failure> {
        let text: String = settings.require("schedule")?;
        let grid = |part: &str| -> Option<(usize, usize)> {
            let (height, width) = part.split_once('x')?;
            Some((height.parse().ok()?, width.parse().ok()?))
        };
        let schedule: Option<Vec<_>> = text.split(',').map(grid).collect();
        let schedule = schedule.ok_or_else(|| Failure::request(format!("schedule={text}: not 1x1,2x2,...")))?;
        let mut phi = Vec::new();
        if let (Some(weights), Some(biases)) = (inputs.get("phi_weights"), inputs.get("phi_biases")) {
            let [_, channels] = biases.shape_of("phi_biases")?;
            let (weights, biases) = (weights.elements::<f32>(), biases.elements::<f32>());
            phi = pack_phi(channels, &weights, &biases, settings.get("ratio")?.unwrap_or(0.5))?;
        }
        Ok(Request { schedule, patch: settings.get("patch")?.unwrap_or(1), phi })
    }

    fn size(&self) -> (usize, usize) {
        let (height, width) = *self.schedule.last().expect("a list of at least one");
        (height * self.patch, width * self.patch)
    }

    fn tokens_before(&self, scale: usize) -> usize {
        self.schedule[..scale].iter().map(|(height, width)| height * width).sum()
    }

    fn builder<T: Token, O: Float>(
        &self,
        channels: usize,
        batch: usize,
        settings: &Settings,
    ) -> Result<MultiScaleBuilder<T, O>, Failure> {
        let word = |name: &str, default: &str| -> Result<String, Failure> {
            Ok(settings.get(name)?.unwrap_or_else(|| default.to_owned()))
        };
        let mut builder = MultiScale::builder(channels, self.size(), &self.schedule).batch(batch).patch(self.patch);
        builder = match word("up", "bicubic")?.as_str() {
            "bicubic" => builder.up(Up::Bicubic),
            "bilinear" => builder.up(Up::Bilinear),
            other => return Err(Failure::request(format!("up={other}: not bicubic or bilinear"))),
        };
        builder = match word("next", "area")?.as_str() {
            "area" => builder.next(Next::Area),
            "bilinear" => builder.next(Next::Bilinear),
            "tokens" => builder.next(Next::Tokens),
            other => return Err(Failure::request(format!("next={other}: not area, bilinear or tokens"))),
        };
        if let Some(table) = settings.get::<String>("phi_table")? {
            builder = builder.phi(PhiTable::new(&list("phi_table", &table)?)?);
        }
        Ok(builder.last_phi(settings.get("last_phi")?.unwrap_or(true)))
    }
}

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let tokens = inputs.require("tokens")?;
    let next = settings.get("next_dtype")?.unwrap_or(nextscale::DType::F32);
    with_type!("tokens", tokens.dtype, T in [u16, u32, i64, f32, f16, bf16, u8], {
        with_type!("next_dtype", next, O in [f32, f16, bf16], add_up::<T, O>(runner, inputs, settings))
    })
}

fn add_up<T: Token, O: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let request = Request::new(inputs, settings)?;
    let tokens = inputs.require("tokens")?;
    let codes = T::KIND == TokenKind::Codes;
    let codebook = inputs.get("codebook");
    let (batch, elements) = match tokens.shape[..] {
        [batch, _] if codes => (batch, 1),
        [batch, _, width] if !codes => (batch, width),
        _ => return Err(Failure::request(format!("tokens: shape {:?}", tokens.shape))),
    };
    let (entries, channels) = match codebook {
        Some(codebook) if codes => codebook.shape_of("codebook").map(|[entries, channels]| (entries, channels))?,
        _ => (0, elements / (request.patch * request.patch).max(1)),
    };
    let width = channels * request.patch * request.patch;
    let scales = request.schedule.len();
    let repeat: usize = settings.get("repeat")?.unwrap_or(1);
    let mut builder = request.builder::<T, O>(channels, batch, settings)?.entries(entries).repeat(repeat);
    if let Some(scale) = settings.get("bit_scale")? {
        builder = builder.bit_scale(scale);
    }
    let plan = builder.build(&runner.info()?)?;

    let all = tokens.elements::<T>();
    if all.len() != batch * plan.all_tokens() * elements {
        return Err(Failure::request(format!("tokens: the schedule has {} of each image", plan.all_tokens())));
    }
    let codebook = match codebook {
        Some(codebook) => Some(runner.upload(&codebook.elements::<f32>())?),
        None => None,
    };
    let phi = if request.phi.is_empty() { None } else { Some(runner.upload(&request.phi)?) };
    let mut flags = runner.upload(&[0u32])?;
    let (height, map_width) = request.size();
    let image = channels * height * map_width;
    let how: String = settings.get("how")?.unwrap_or_else(|| "steps".to_owned());
    let mut outputs = Tensors::default();
    let (f_hat, made) = match how.as_str() {
        "steps" | "turns" => {
            let mut maps = [runner.output::<f32>(batch * image)?, runner.output::<f32>(batch * image)?];
            let inputs_of_all = plan.all_tokens() - request.tokens_before(1);
            let mut made = vec![O::from_f32(0.0); repeat * batch * inputs_of_all * width];
            let mut written = 0;
            for scale in 0..scales {
                let (first, count) = (request.tokens_before(scale), plan.tokens(scale).expect("a scale"));
                let of_image = |b: usize| &all[(b * plan.all_tokens() + first) * elements..][..count * elements];
                let tokens: Vec<T> = (0..batch).flat_map(of_image).copied().collect();
                let tokens = runner.upload(&tokens)?;
                let next_count = plan.tokens(scale + 1).unwrap_or(0);
                let mut next = runner.output::<O>(repeat * batch * next_count * width)?;
                let [first_map, second_map] = &mut maps;
                let f_hat = match (how.as_str(), scale) {
                    (_, 0) => FHat::FromZero(first_map.as_out()),
                    ("steps", _) => FHat::InPlace(first_map.as_out()),
                    (_, scale) if scale % 2 == 1 => FHat::Between(first_map.as_in(), second_map.as_out()),
                    _ => FHat::Between(second_map.as_in(), first_map.as_out()),
                };
                let args = StepArgs {
                    scale,
                    tokens: tokens.as_in(),
                    codebook: codebook.as_ref().map(Buffer::as_in),
                    phi: phi.as_ref().map(Buffer::as_in),
                    f_hat: Some(f_hat),
                    next: (scale + 1 < scales).then(|| next.as_out()),
                    flags: Some(flags.as_out()),
                };
                runner.run(|stream| plan.step(stream, args))?;
                written = if how == "turns" { scale % 2 } else { 0 };
                let next = next.download()?;
                let at = if next_count > 0 { request.tokens_before(scale + 1) - request.tokens_before(1) } else { 0 };
                for (entry, from) in next.chunks(next_count.max(1) * width).enumerate() {
                    made[(entry * inputs_of_all + at) * width..][..from.len()].copy_from_slice(from);
                }
            }
            let [first, second] = maps;
            ((if written == 0 { first } else { second }).download()?, Some(made))
        }
        "decode" | "prefixes" | "inputs" => {
            let maps = if how == "prefixes" { scales } else { 1 };
            let mut f_hat = runner.output::<f32>(maps * batch * image)?;
            let count = if how == "inputs" { plan.all_tokens() - request.tokens_before(1) } else { 0 };
            let mut next = runner.output::<O>(batch * count * width)?;
            let tokens = runner.upload(&all)?;
            let args = DecodeArgs {
                tokens: tokens.as_in(),
                codebook: codebook.as_ref().map(Buffer::as_in),
                phi: phi.as_ref().map(Buffer::as_in),
                f_hat: f_hat.as_out(),
                prefixes: how == "prefixes",
                next: (how == "inputs").then(|| next.as_out()),
                flags: Some(flags.as_out()),
            };
            runner.run(|stream| plan.decode(stream, args))?;
            (f_hat.download()?, if how == "inputs" { Some(next.download()?) } else { None })
        }
        other => return Err(Failure::request(format!("how={other}: not steps, turns, decode, prefixes or inputs"))),
    };
    let map_shape = [batch, channels, height, map_width];
    outputs = if how == "prefixes" {
        outputs.with("f_hat", Tensor::new(&[&[scales][..], &map_shape].concat(), &f_hat))
    } else {
        outputs.with("f_hat", Tensor::new(&map_shape, &f_hat))
    };
    if let Some(made) = made {
        let repeat = if how == "inputs" { 1 } else { repeat };
        let count = plan.all_tokens() - request.tokens_before(1);
        outputs = outputs.with("inputs", Tensor::new(&[repeat, batch, count, width], &made));
    }
    Ok(if runner.is_host() { outputs } else { outputs.with("flags", Tensor::new(&[1], &flags.download()?)) })
}

fn run_encode(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    if inputs.get("codebook").is_none() {
        return to_bits(runner, inputs, settings);
    }
    let codes = settings.get("codes_dtype")?.unwrap_or(nextscale::DType::U32);
    with_type!("codes_dtype", codes, C in [u16, u32, i64], to_codes::<C>(runner, inputs, settings))
}

fn to_codes<C: Code + Token>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let request = Request::new(inputs, settings)?;
    let f = inputs.require("f")?;
    let shape: [usize; 4] = f.shape_of("f")?;
    let [batch, channels, ..] = shape;
    let codebook = inputs.require("codebook")?;
    let [entries, _] = codebook.shape_of("codebook")?;
    let plan = request.builder::<C, f32>(channels, batch, settings)?.entries(entries).build(&runner.info()?)?;
    let upload = |tensor: &Tensor| runner.upload(&tensor.elements::<f32>());
    let (of_f, codebook) = (upload(f)?, upload(codebook)?);
    let search = inputs.get("search").map(upload).transpose()?;
    let phi = if request.phi.is_empty() { None } else { Some(runner.upload(&request.phi)?) };
    let mut codes = runner.output::<C>(batch * plan.all_tokens())?;
    let mut f_hat = runner.output::<f32>(shape.iter().product())?;
    let mut workspace = runner.output::<u8>(plan.encode_workspace_bytes() as usize)?;
    let args = EncodeArgs {
        f: of_f.as_in(),
        codebook: codebook.as_in(),
        search: search.as_ref().map(Buffer::as_in),
        phi: phi.as_ref().map(Buffer::as_in),
        codes: codes.as_out(),
        f_hat: f_hat.as_out(),
        workspace: (!runner.is_host()).then(|| workspace.as_out()),
    };
    runner.run(|stream| plan.encode(stream, args))?;
    Ok(Tensors::default()
        .with("codes", Tensor::new(&[batch, plan.all_tokens()], &codes.download()?))
        .with("f_hat", Tensor::new(&shape, &f_hat.download()?)))
}

fn to_bits(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let request = Request::new(inputs, settings)?;
    let f = inputs.require("f")?;
    let shape: [usize; 4] = f.shape_of("f")?;
    let [batch, channels, ..] = shape;
    let plan = request.builder::<u8, f32>(channels, batch, settings)?.build(&runner.info()?)?;
    let width = channels * request.patch * request.patch;
    let of_f = runner.upload(&f.elements::<f32>())?;
    let count = batch * plan.all_tokens() * width;
    let (mut labels, mut flipped) = (runner.output::<u8>(count)?, runner.output::<u8>(count)?);
    let mut f_hat = runner.output::<f32>(shape.iter().product())?;
    let inputs_of_all = plan.all_tokens() - request.tokens_before(1);
    let mut next = runner.output::<f32>(batch * inputs_of_all * width)?;
    let seeds = inputs.get("seeds").map(|seeds| seeds.expect::<i64>("seeds", &[batch])).transpose()?;
    let seeds = seeds.map(|seeds| runner.upload(&seeds)).transpose()?;
    let rates: Vec<f32> = match settings.get::<String>("rates")? {
        Some(rates) => list("rates", &rates)?,
        None => vec![0.0; request.schedule.len()],
    };
    let args = EncodeBitsArgs {
        f: of_f.as_in(),
        labels: labels.as_out(),
        flips: seeds.as_ref().map(|seeds| FlipArgs { flipped: flipped.as_out(), seeds: seeds.as_in(), rates: &rates }),
        f_hat: f_hat.as_out(),
        next: Some(next.as_out()),
    };
    runner.run(|stream| plan.encode_bits(stream, args))?;
    let bits = [batch, plan.all_tokens(), width];
    let mut outputs = Tensors::default()
        .with("labels", Tensor::new(&bits, &labels.download()?))
        .with("f_hat", Tensor::new(&shape, &f_hat.download()?))
        .with("inputs", Tensor::new(&[batch, inputs_of_all, width], &next.download()?));
    if seeds.is_some() {
        outputs = outputs.with("flipped", Tensor::new(&bits, &flipped.download()?));
    }
    Ok(outputs)
}
