//! How tokens are drawn, and what all samplers share.

use std::time::{Duration, Instant};

use nextscale::verification::{DraftSample, DraftSampleArgs};

use crate::device::{Buffer, Device};
use crate::failure::Result;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub(crate) guidance: f32,
    pub(crate) temperature: f32,
    pub(crate) top_k: i32,
    pub(crate) top_p: f32,
}

/// One image of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Image {
    /// A row of the table of conditions.
    pub(crate) condition: usize,
    /// All that is random about it: the same in any batch.
    pub(crate) seed: u64,
}

/// The conditions of a batch, then as many times nothing: for guidance.
pub(crate) fn conditions(images: &[Image]) -> Vec<usize> {
    images.iter().map(|image| image.condition).chain(images.iter().map(|_| 0)).collect()
}

/// `DraftSample` with its buffers: a token for each of some rows of guided logits.
pub(crate) struct Sampler {
    plan: DraftSample<f32>,
    rows: usize,
    vocab: usize,
    temperature: Buffer<f32>,
    top_k: Buffer<i32>,
    top_p: Buffer<f32>,
    seeds: Buffer<i64>,
    positions: Buffer<i64>,
    status: Buffer<u32>,
    workspace: Buffer<u8>,
    counters: Buffer<u32>,
}

impl Sampler {
    /// `row_in_step`: which draft of its step, for verification.
    pub(crate) fn new(
        device: &Device,
        rows: usize,
        vocab: usize,
        row_in_step: u32,
        settings: &Settings,
    ) -> Result<Self> {
        let plan = DraftSample::builder(rows, vocab).row_in_step(row_in_step).build(&device.info()?)?;
        Ok(Sampler {
            rows,
            vocab,
            temperature: device.upload(&vec![settings.temperature; rows])?,
            top_k: device.upload(&vec![settings.top_k; rows])?,
            top_p: device.upload(&vec![settings.top_p; rows])?,
            seeds: device.zeros(rows)?,
            positions: device.zeros(rows)?,
            status: device.zeros(rows)?,
            workspace: device.zeros(plan.workspace_bytes() as usize)?,
            counters: device.zeros(plan.counter_words())?,
            plan,
        })
    }

    /// Of each row: its image's seed.
    pub(crate) fn seeds(&mut self, device: &Device, seeds: impl Iterator<Item = u64>) -> Result<()> {
        device.write(&mut self.seeds, &seeds.map(|seed| seed as i64).collect::<Vec<_>>())
    }

    /// Of each row: the token's place in the image.
    pub(crate) fn places(&mut self, device: &Device, places: impl Iterator<Item = usize>) -> Result<()> {
        device.write(&mut self.positions, &places.map(|place| place as i64).collect::<Vec<_>>())
    }

    /// From the logits at `at` on; `stats`: where a verifier finds them.
    pub(crate) fn draw(
        &mut self,
        device: &Device,
        logits: &Buffer<f32>,
        at: usize,
        tokens: &mut Buffer<i32>,
        stats: Option<(&mut Buffer<f32>, usize)>,
    ) -> Result<()> {
        Ok(self.plan.run(
            &device.stream(),
            DraftSampleArgs {
                logits: logits.input_of(at..at + self.rows * self.vocab),
                temperature: Some(self.temperature.input()),
                top_k: Some(self.top_k.input()),
                top_p: Some(self.top_p.input()),
                min_p: None,
                draft_to_target: None,
                seeds: Some(self.seeds.input()),
                positions: Some(self.positions.input()),
                rows_in_step: None,
                uniforms: None,
                tokens: tokens.output(),
                stats: stats.map(|(stats, at)| stats.output_of(at..at + self.rows * 4)),
                log_probs: None,
                status: self.status.output(),
                workspace: self.workspace.output(),
                counters: self.counters.output(),
            },
        )?)
    }
}

/// Where time goes.
#[derive(Debug, Default)]
pub(crate) struct Stages {
    stages: Vec<(&'static str, Duration)>,
    untimed: bool,
}

impl Stages {
    /// Nobody waits for the device and no time is told: for capture.
    pub(crate) fn untimed() -> Self {
        Stages { untimed: true, ..Stages::default() }
    }

    /// Does the work, waits for it, and counts its time in.
    pub(crate) fn time<T>(
        &mut self,
        device: &Device,
        name: &'static str,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if self.untimed {
            return work();
        }
        let begun = Instant::now();
        let made = work()?;
        device.wait()?;
        self.count(name, begun.elapsed());
        Ok(made)
    }

    pub(crate) fn count(&mut self, name: &'static str, took: Duration) {
        match self.stages.iter_mut().find(|(known, _)| *known == name) {
            Some((_, total)) => *total += took,
            None => self.stages.push((name, took)),
        }
    }

    /// A line a stage.
    pub(crate) fn table(&self, images: usize) -> String {
        let whole: Duration = self.stages.iter().map(|(_, took)| *took).sum();
        let mut text = format!("{:<24}{:>12}{:>14}{:>8}\n", "stage", "ms", "ms an image", "share");
        for (name, took) in self.stages.iter().map(|(name, took)| (*name, *took)).chain([("all", whole)]) {
            let (ms, share) = (took.as_secs_f64() * 1e3, took.as_secs_f64() / whole.as_secs_f64().max(1e-12));
            text += &format!("{name:<24}{ms:>12.2}{:>14.3}{:>7.1}%\n", ms / images as f64, share * 100.0);
        }
        text
    }
}
