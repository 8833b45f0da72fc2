use nextscale::dtype::Float;
use nextscale::verification::{Confidence, ConfidenceOut, ConfidenceRank, ConfidenceRankArgs};
use nextscale::{bf16, f16};

use crate::draft_sample::optional;
use crate::request::{Failure, Op, Setting, SettingHelp, Settings, TensorHelp};
use crate::runner::{Buffer, Runner};
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "confidence_rank",
    about: "Which masked tokens are committed: those of which the model is sure (Dimple, MaskGIT).",
    inputs: &[
        TensorHelp {
            name: "logits",
            dtypes: "f32, f16, bf16",
            shape: "[batch, length, vocab]",
            about: "vocab up to 2^24",
        },
        TensorHelp {
            name: "masked",
            dtypes: "u8",
            shape: "[batch, length]",
            about: "0: decided; default: all are not",
        },
        TensorHelp { name: "temperature", dtypes: "f32", shape: "[batch]", about: "of candidates; default: 0" },
        TensorHelp { name: "top_k", dtypes: "i32", shape: "[batch]", about: "0 and default: off" },
        TensorHelp { name: "top_p", dtypes: "f32", shape: "[batch]", about: "1 and default: off" },
        TensorHelp { name: "min_p", dtypes: "f32", shape: "[batch]", about: "0 and default: off" },
        TensorHelp { name: "threshold", dtypes: "f32", shape: "[batch]", about: "default: off" },
        TensorHelp { name: "counts", dtypes: "i32", shape: "[batch]", about: "where none is above; negative: all" },
        TensorHelp { name: "noise", dtypes: "f32", shape: "[batch]", about: "its temperature; 0 and default: none" },
        TensorHelp { name: "seeds", dtypes: "i64", shape: "[batch]", about: "default: 0" },
        TensorHelp { name: "positions", dtypes: "i64", shape: "[batch]", about: "of row 0; default: 0" },
    ],
    settings: &[
        SettingHelp {
            name: "confidence",
            values: "probability | log_probability | margin | entropy",
            about: "default probability",
        },
        SettingHelp { name: "step", values: "0 to 16777215", about: "number of the step; default 0" },
    ],
    outputs: &[
        TensorHelp { name: "tokens", dtypes: "i32", shape: "[batch, length]", about: "committed, else -1" },
        TensorHelp { name: "candidates", dtypes: "i32", shape: "[batch, length]", about: "of masked rows, else -1" },
        TensorHelp { name: "confidence", dtypes: "f32", shape: "[batch, length]", about: "of masked rows, else NaN" },
        TensorHelp { name: "committed", dtypes: "i32", shape: "[batch]", about: "how many" },
        TensorHelp { name: "status", dtypes: "u32", shape: "[batch]", about: "bits; 0: nothing to say" },
    ],
    run,
};

impl Setting for Confidence {
    const WHAT: &'static str = "probability, log_probability, margin or entropy";
    fn parse(value: &str) -> Option<Self> {
        match value {
            "probability" => Some(Confidence::Probability),
            "log_probability" => Some(Confidence::LogProbability),
            "margin" => Some(Confidence::Margin),
            "entropy" => Some(Confidence::Entropy),
            _ => None,
        }
    }
}

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let logits = inputs.require("logits")?.dtype;
    with_type!("logits", logits, T in [f32, f16, bf16], rank::<T>(runner, inputs, settings))
}

fn rank<T: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let logits = inputs.require("logits")?;
    let [batch, length, vocab] = logits.shape_of("logits")?;
    let plan = ConfidenceRank::<T>::builder(batch, length, vocab)
        .confidence(settings.get("confidence")?.unwrap_or_default())
        .step(settings.get("step")?.unwrap_or(0))
        .build(&runner.info()?)?;
    let logits = runner.upload(&logits.elements::<T>())?;
    let masked = optional::<u8>(runner, inputs, "masked", &[batch, length])?;
    let temperature = optional::<f32>(runner, inputs, "temperature", &[batch])?;
    let top_k = optional::<i32>(runner, inputs, "top_k", &[batch])?;
    let top_p = optional::<f32>(runner, inputs, "top_p", &[batch])?;
    let min_p = optional::<f32>(runner, inputs, "min_p", &[batch])?;
    let threshold = optional::<f32>(runner, inputs, "threshold", &[batch])?;
    let counts = runner.upload(&inputs.require("counts")?.expect::<i32>("counts", &[batch])?)?;
    let noise = optional::<f32>(runner, inputs, "noise", &[batch])?;
    let seeds = optional::<i64>(runner, inputs, "seeds", &[batch])?;
    let positions = optional::<i64>(runner, inputs, "positions", &[batch])?;
    let rows = batch * length;
    let (mut tokens, mut candidates) = (runner.output::<i32>(rows)?, runner.output::<i32>(rows)?);
    let (mut confidence, mut committed) = (runner.output::<f32>(rows)?, runner.output::<i32>(batch)?);
    let mut status = runner.output::<u32>(batch)?;
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    let mut counters = runner.upload(&vec![0u32; plan.counter_words()])?;
    runner.run(|stream| {
        plan.run(
            stream,
            ConfidenceRankArgs {
                logits: logits.as_in(),
                masked: masked.as_ref().map(Buffer::as_in),
                temperature: temperature.as_ref().map(Buffer::as_in),
                top_k: top_k.as_ref().map(Buffer::as_in),
                top_p: top_p.as_ref().map(Buffer::as_in),
                min_p: min_p.as_ref().map(Buffer::as_in),
                threshold: threshold.as_ref().map(Buffer::as_in),
                counts: counts.as_in(),
                noise: noise.as_ref().map(Buffer::as_in),
                seeds: seeds.as_ref().map(Buffer::as_in),
                positions: positions.as_ref().map(Buffer::as_in),
                out: ConfidenceOut {
                    tokens: tokens.as_out(),
                    candidates: Some(candidates.as_out()),
                    confidence: Some(confidence.as_out()),
                    committed: committed.as_out(),
                    status: status.as_out(),
                },
                workspace: workspace.as_out(),
                counters: counters.as_out(),
            },
        )
    })?;
    let rows = [batch, length];
    Ok(Tensors::default()
        .with("tokens", Tensor::new(&rows, &tokens.download()?))
        .with("candidates", Tensor::new(&rows, &candidates.download()?))
        .with("confidence", Tensor::new(&rows, &confidence.download()?))
        .with("committed", Tensor::new(&[batch], &committed.download()?))
        .with("status", Tensor::new(&[batch], &status.download()?)))
}
