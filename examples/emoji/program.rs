//! What the program does: classes, a device, batches of images, a sheet, and where time went.

use std::ffi::OsString;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use nextscale::dtype::Float;
use nextscale::{f16, philox};

use crate::ar::{Counts, Sequential};
use crate::compress::rows_kept;
use crate::device::Device;
use crate::failure::{Failure, Result};
use crate::options::{HELP, How, Options, parse};
use crate::sampling::{Image, Stages};
use crate::sheet::Target;
use crate::tokenizer::Tokenizer;
use crate::var::Var;
use crate::weights::{Classes, Config, Weights};

/// Images that are made at once.
const BATCH: usize = 16;
/// The Philox domain of the choice of classes: none of the library's.
const CLASS_DOMAIN: u32 = 255;

/// Which classes the images are of: of what was asked for, or of each category in turn; within a category as often as
/// the square root of a class's size says.
fn images(options: &Options, classes: &Classes) -> Result<Vec<Image>> {
    let all = classes.categories.len();
    let named = |names: &[String], name: &str| names.iter().position(|known| known == name);
    let pick = |category: usize, seed: u64| {
        let weight = |class: usize| match classes.category_of[class] == category {
            true => (classes.counts[class] as f32).sqrt(),
            false => 0.0,
        };
        let total: f32 = (0..classes.names.len()).map(weight).sum();
        let mut left = philox::uniform(philox::block(seed, 0, CLASS_DOMAIN, 0)[0]) * total;
        let class = (0..classes.names.len()).find(|&class| {
            left -= weight(class);
            left < 0.0
        });
        // Row 0 says nothing; categories follow, then classes. A category without classes stands for itself.
        class.map_or(1 + category, |class| 1 + all + class)
    };
    let condition: Box<dyn Fn(usize, u64) -> usize> = match options.category.as_deref() {
        None => Box::new(move |i, seed| pick(i % all, seed)),
        Some(name) => match (named(&classes.categories, name), named(&classes.names, name)) {
            (Some(category), _) => Box::new(move |_, seed| pick(category, seed)),
            (None, Some(class)) => Box::new(move |_, _| 1 + all + class),
            (None, None) => {
                let known = classes.categories.join(", ");
                return Err(Failure::request(format!("--category {name}: none of {known}; --list has classes too")));
            }
        },
    };
    Ok((0..options.count)
        .map(|i| {
            let seed = options.seed.wrapping_add(i as u64);
            Image { condition: condition(i, seed), seed }
        })
        .collect())
}

/// Runs the program; what it has to say when all went well.
pub(crate) fn run(args: impl Iterator<Item = OsString>) -> Result<String> {
    let Some(options) = parse(args)? else { return Ok(format!("{HELP}\n")) };
    let tokenizer = Weights::open(&options.weights, "tokenizer")?;
    let classes = tokenizer.classes()?;
    if options.list {
        let of =
            |category: usize| classes.names.iter().zip(&classes.category_of).filter(move |(_, of)| **of == category);
        let line = |(category, name): (usize, &String)| {
            let names: Vec<&str> = of(category).map(|(name, _)| name.as_str()).collect();
            format!("{name}: {}\n", names.join(", "))
        };
        return Ok(classes.categories.iter().enumerate().map(line).collect());
    }
    let images = images(&options, &classes)?;
    let device = Device::open(&options.device)?;
    let target = Target::open(&options.out)?;
    let made = match device {
        Device::Host => make::<f32>(&device, &options, &tokenizer, &images),
        #[allow(unreachable_patterns)]
        _ => make::<f16>(&device, &options, &tokenizer, &images),
    };
    let written = made.and_then(|(pixels, said)| {
        target.write(&pixels, tokenizer.config.size)?;
        Ok(format!("{said}{}\n", options.out.display()))
    });
    if written.is_err() {
        target.give_up();
    }
    written
}

/// Makes all images, a batch at a time: pixels, and what to say about it.
fn make<A: Float>(
    device: &Device,
    options: &Options,
    tokenizer: &Weights,
    images: &[Image],
) -> Result<(Vec<f32>, String)> {
    let batch = images.len().min(BATCH);
    let mut stages = Stages::default();
    let begun = Instant::now();
    let open = |part: &str| -> Result<Weights> {
        let weights = Weights::open(&options.weights, part)?;
        weights.require_config(&tokenizer.config)?;
        Ok(weights)
    };
    let mut pixels = Tokenizer::<A>::load(device, tokenizer, batch)?;
    let mut maker = match options.how {
        How::Var => {
            let var = Var::<A>::load(device, &open("var")?, batch, &options.settings, options.budget)?;
            Maker::Var(Box::new(var))
        }
        How::Ar => {
            Maker::Sequential(Box::new(Sequential::load(device, &open("ar")?, None, batch, &options.settings)?), None)
        }
        How::Speculative => {
            let (ar, draft) = (open("ar")?, open("draft")?);
            let draft = Some((&draft, options.drafts, options.rule));
            let drafted = Sequential::<A>::load(device, &ar, draft, batch, &options.settings)?;
            // What it is compared with.
            let plain = Sequential::<A>::load(device, &ar, None, batch, &options.settings)?;
            Maker::Sequential(Box::new(drafted), Some(Box::new(plain)))
        }
    };
    stages.count("loading", begun.elapsed());

    let batches: Vec<Vec<Image>> = images
        .chunks(batch)
        // The last one is filled up with what is then left out.
        .map(|part| part.iter().chain(std::iter::repeat_n(&part[0], batch - part.len())).copied().collect())
        .collect();
    let steps = match &maker {
        Maker::Var(var) => var.scales() + 1,
        Maker::Sequential(..) => batch * tokenizer.config.tokens() + 1,
    };
    let bar = if options.quiet { ProgressBar::hidden() } else { ProgressBar::new((batches.len() * steps) as u64) };
    bar.set_style(
        ProgressStyle::with_template("{wide_bar} {percent}% {elapsed}").unwrap_or(ProgressStyle::default_bar()),
    );
    let mut all = Vec::with_capacity(images.len() * tokenizer.config.size * tokenizer.config.size * 3);
    let mut said = String::new();
    let mut total = (Counts::default(), 0.0);
    for part in &batches {
        maker.run(device, &mut pixels, part, &mut stages, &bar, &mut total)?;
        all.extend(stages.time(device, "pixels to the host", || pixels.images(device))?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Maker::Sequential(_, plain) = &mut maker {
        said += &tell(&total, options);
        if let Some(plain) = plain {
            let begun = Instant::now();
            let (_, counts) = plain.generate(device, &batches[0], usize::MAX, &mut Stages::default(), |_| {})?;
            let (plain, drafted) = (begun.elapsed().as_secs_f64(), total.1 / batches.len() as f64);
            said += &format!(
                "speed-up: {:.2} ({:.1} ms a batch, {:.1} ms and {} calls without drafts)\n",
                plain / drafted,
                drafted * 1e3,
                plain * 1e3,
                counts.calls
            );
        }
    }
    if let Some(budget) = options.budget {
        said += &tell_budget(&tokenizer.config, budget);
        let mut whole = Var::<A>::load(device, &open("var")?, batch, &options.settings, None)?;
        whole.begin(device, &batches[0])?;
        whole.generate(device, &mut pixels, &mut Stages::untimed(), || ())?;
        pixels.decode(device)?;
        let (whole, size) = (pixels.images(device)?, tokenizer.config.size);
        let count = images.len().min(batch) * size * size * 3;
        said += &format!("change of the picture: {}\n", change(&all[..count], &whole[..count]));
    }
    all.truncate(images.len() * tokenizer.config.size * tokenizer.config.size * 3);
    said += &stages.table(images.len());
    if options.repeat > 0 {
        said += &maker.repeat(device, &mut pixels, &batches[0], options.repeat)?;
    }
    Ok((all, said))
}

/// What the last scale finds of the scales before it, in all layers, of one image.
fn tell_budget(config: &Config, budget: f32) -> String {
    let before = config.scales.len().saturating_sub(1);
    let kept = rows_kept(config, budget)[..before].last().copied().unwrap_or(0);
    let [width, depth] = config.transformer("var");
    let bytes = |rows: usize| rows * 2 * 2 * width * depth * size_of::<f16>();
    let (kept, all) = (bytes(kept), bytes(config.first(before)));
    format!("cache before the last scale: {kept} of {all} bytes of f16 an image ({:.1}%)\n", percent(kept, all))
}

/// By how much one picture is not the other.
fn change(a: &[f32], b: &[f32]) -> String {
    let pixel = |x: &f32| f64::from(x.clamp(-1.0, 1.0)) * 0.5;
    let squares: f64 = a.iter().zip(b).map(|(a, b)| (pixel(a) - pixel(b)).powi(2)).sum();
    match squares {
        0.0 => "none".into(),
        _ => format!("{:.1} dB PSNR", -10.0 * (squares / a.len() as f64).log10()),
    }
}

fn percent(a: usize, b: usize) -> f64 {
    a as f64 / b.max(1) as f64 * 100.0
}

fn tell((counts, _): &(Counts, f64), options: &Options) -> String {
    let ratio = |a: usize, b: usize| a as f64 / b.max(1) as f64;
    let mut text = format!("{:.2} tokens a step of each image\n", ratio(counts.emitted, counts.steps));
    if options.how == How::Speculative {
        text += &format!("acceptance rate: {:.1}%\n", ratio(counts.accepted, counts.drafted) * 100.0);
    }
    text
}

/// What makes the map of tokens.
enum Maker<A> {
    Var(Box<Var<A>>),
    /// And the same without drafts, if it has them.
    Sequential(Box<Sequential<A>>, Option<Box<Sequential<A>>>),
}

impl<A: Float> Maker<A> {
    /// A batch, from classes to decoded pixels on the device.
    fn run(
        &mut self,
        device: &Device,
        pixels: &mut Tokenizer<A>,
        images: &[Image],
        stages: &mut Stages,
        bar: &ProgressBar,
        total: &mut (Counts, f64),
    ) -> Result<()> {
        match self {
            Maker::Var(var) => {
                stages.time(device, "conditions", || var.begin(device, images))?;
                var.generate(device, pixels, stages, || bar.inc(1))?;
            }
            Maker::Sequential(model, _) => {
                let begun = Instant::now();
                let (tokens, counts) = model.generate(device, images, usize::MAX, stages, |new| bar.inc(new as u64))?;
                total.0.calls += counts.calls;
                total.0.steps += counts.steps;
                total.0.emitted += counts.emitted;
                total.0.drafted += counts.drafted;
                total.0.accepted += counts.accepted;
                total.1 += begun.elapsed().as_secs_f64();
                let tokens = device.upload(&tokens.concat())?;
                stages.time(device, "multi-scale decode", || pixels.add_all(device, &tokens))?;
            }
        }
        stages.time(device, "decoder", || pixels.decode(device))
    }

    /// The same batch again and again: the median time, of VAR on CUDA also as one graph.
    fn repeat(&mut self, device: &Device, pixels: &mut Tokenizer<A>, images: &[Image], times: usize) -> Result<String> {
        let hidden = ProgressBar::hidden();
        let mut once = |maker: &mut Self| -> Result<f64> {
            let (mut stages, mut total) = (Stages::untimed(), Default::default());
            let begun = Instant::now();
            maker.run(device, pixels, images, &mut stages, &hidden, &mut total)?;
            device.wait()?;
            Ok(begun.elapsed().as_secs_f64() * 1e3)
        };
        let median = |mut ms: Vec<f64>| {
            ms.sort_by(f64::total_cmp);
            ms[ms.len() / 2]
        };
        let ms = median((0..times).map(|_| once(self)).collect::<Result<_>>()?);
        let line = |what: &str, ms: f64| {
            let each = ms / images.len() as f64;
            format!("{what}: {ms:.3} ms a batch of {}, {each:.3} ms an image (median of {times})\n", images.len())
        };
        #[allow(unused_mut)]
        let mut said = line("launch by launch", ms);
        #[cfg(feature = "cudarc-0_19")]
        if let (Device::Cuda(cuda), Maker::Var(var)) = (device, self) {
            let mut stages = Stages::untimed();
            let graph = cuda.capture(|| {
                var.generate(device, pixels, &mut stages, || ())?;
                pixels.decode(device)
            })?;
            let mut replay = |classes: bool| -> Result<f64> {
                let begun = Instant::now();
                if classes {
                    var.begin(device, images)?;
                }
                graph.launch()?;
                device.wait()?;
                Ok(begun.elapsed().as_secs_f64() * 1e3)
            };
            replay(true)?;
            for (what, classes) in [("as one CUDA graph", true), ("the graph alone, classes said before", false)] {
                said += &line(what, median((0..times).map(|_| replay(classes)).collect::<Result<_>>()?));
            }
        }
        Ok(said)
    }
}
