//! What the command line asks for.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::prelude::*;
use nextscale::verification::Rule;

use crate::failure::{Failure, Result};
use crate::sampling::Settings;

pub(crate) const HELP: &str = "\
usage: emoji [--out emoji.png] [--category NAME] [--count 16] [--seed 0] [--sampler NAME] [--device NAME] ...

  --out FILE          the contact sheet, a PNG; emoji.png
  --category NAME     a category or class; --list names them; all in turn if not given
  --count N           images; 16
  --seed N            image i has the seed N + i; 0
  --sampler NAME      var: scale by scale; ar: token by token; speculative: token by token, drafted and verified
  --device NAME       host, cuda or cuda:ordinal; host
  --guidance G        classifier-free guidance; 2
  --temperature T     1
  --top-k K           200
  --top-p P           0.95
  --drafts N          of a speculative step; 4
  --rule NAME         reject or match: when drafts are accepted; both are lossless; reject
  --kv-budget B       of var: the part of the cache that is kept between scales; all if not given
  --repeat N          makes the first batch N times more and prints the median time: for benches
  --weights FOLDER    where training has left its files
  --list              names of categories and classes
  --quiet             no progress bar";

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum How {
    Var,
    Ar,
    Speculative,
}

pub(crate) struct Options {
    pub(crate) out: PathBuf,
    pub(crate) category: Option<String>,
    pub(crate) count: usize,
    pub(crate) seed: u64,
    pub(crate) how: How,
    pub(crate) device: String,
    pub(crate) settings: Settings,
    pub(crate) drafts: usize,
    pub(crate) rule: Rule,
    pub(crate) budget: Option<f32>,
    pub(crate) repeat: usize,
    pub(crate) weights: PathBuf,
    pub(crate) list: bool,
    pub(crate) quiet: bool,
}

/// `None`: help was asked for.
pub(crate) fn parse(args: impl Iterator<Item = OsString>) -> Result<Option<Options>> {
    let mut options = Options {
        out: "emoji.png".into(),
        category: None,
        count: 16,
        seed: 0,
        how: How::Var,
        device: "host".into(),
        settings: Settings { guidance: 2.0, temperature: 1.0, top_k: 200, top_p: 0.95 },
        drafts: 4,
        rule: Rule::Reject,
        budget: None,
        repeat: 0,
        weights: concat!(env!("CARGO_MANIFEST_DIR"), "/examples/emoji/weights").into(),
        list: false,
        quiet: false,
    };
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(argument) = parser.next()? {
        match argument {
            Short('h') | Long("help") => return Ok(None),
            Long("out") => options.out = parser.value()?.into(),
            Long("category") => options.category = Some(parser.value()?.string()?),
            Long("count") => options.count = parser.value()?.parse()?,
            Long("seed") => options.seed = parser.value()?.parse()?,
            Long("sampler") => {
                options.how = match parser.value()?.string()?.as_str() {
                    "var" => How::Var,
                    "ar" => How::Ar,
                    "speculative" => How::Speculative,
                    other => {
                        return Err(Failure::request(format!("--sampler {other}: not one of var, ar, speculative")));
                    }
                }
            }
            Long("device") => options.device = parser.value()?.string()?,
            Long("guidance") => options.settings.guidance = parser.value()?.parse()?,
            Long("temperature") => options.settings.temperature = parser.value()?.parse()?,
            Long("top-k") => options.settings.top_k = parser.value()?.parse()?,
            Long("top-p") => options.settings.top_p = parser.value()?.parse()?,
            Long("drafts") => options.drafts = parser.value()?.parse()?,
            Long("rule") => {
                options.rule = match parser.value()?.string()?.as_str() {
                    "reject" => Rule::Reject,
                    "match" => Rule::Match,
                    other => return Err(Failure::request(format!("--rule {other}: not one of reject, match"))),
                }
            }
            Long("kv-budget") => options.budget = Some(parser.value()?.parse()?),
            Long("repeat") => options.repeat = parser.value()?.parse()?,
            Long("weights") => options.weights = parser.value()?.into(),
            Long("list") => options.list = true,
            Long("quiet") => options.quiet = true,
            _ => return Err(argument.unexpected().into()),
        }
    }
    let within = |name: &str, fits: bool, what: &str| match fits {
        true => Ok(()),
        false => Err(Failure::request(format!("{name}: {what}"))),
    };
    let settings = &options.settings;
    within("--count", (1..=4096).contains(&options.count), "from 1 to 4096")?;
    within("--drafts", (1..=32).contains(&options.drafts), "from 1 to 32")?;
    let budget = options.budget.unwrap_or(1.0);
    within("--kv-budget", budget > 0.0 && budget <= 1.0, "above 0 and at most 1")?;
    within("--kv-budget", options.budget.is_none() || options.how == How::Var, "goes with --sampler var")?;
    within("--guidance", settings.guidance.is_finite() && settings.guidance >= 0.0, "0 or more")?;
    within("--temperature", settings.temperature.is_finite() && settings.temperature >= 0.0, "0 or more")?;
    within("--top-k", settings.top_k >= 0, "0 (off) or more")?;
    within("--top-p", settings.top_p > 0.0 && settings.top_p <= 1.0, "above 0 and at most 1")?;
    Ok(Some(options))
}
