//! Next-scale generation: a whole scale of tokens at a time, from the map of all before it.

use nextscale::dtype::Float;

use crate::compress::rows_kept;
use crate::dense::Matrix;
use crate::device::{Buffer, Device};
use crate::failure::Result;
use crate::pointwise::{embed, guide};
use crate::sampling::{Image, Sampler, Settings, Stages, conditions};
use crate::tokenizer::Tokenizer;
use crate::transformer::{Cache, Pass, Said, Scratch, Transformer};
use crate::weights::Weights;

pub(crate) struct Var<A> {
    batch: usize,
    guidance: f32,
    transformer: Transformer<A>,
    /// From the map's channels to the transformer's width.
    word: Matrix<A>,
    said: Said,
    cache: Cache<A>,
    scratch: Scratch<A>,
    scales: Vec<Scale<A>>,
    /// `[batch, l, vocab]`
    guided: Buffer<f32>,
    /// `[2, batch, l, channels]`
    next: Buffer<A>,
    /// Counts of all rows of the first scale: row r of what the classes say.
    count: Buffer<i32>,
}

struct Scale<A> {
    pass: Pass<A>,
    sampler: Sampler,
    /// `[2, batch, l]`: places of the tokens in the image.
    place: Buffer<i32>,
    /// `[batch, l]`
    tokens: Buffer<i32>,
}

impl<A: Float> Var<A> {
    /// `budget`: the part of the cache that is kept after each scale; all of it, without compression, if not given.
    pub(crate) fn load(
        device: &Device,
        weights: &Weights,
        batch: usize,
        settings: &Settings,
        budget: Option<f32>,
    ) -> Result<Self> {
        let config = &weights.config;
        let transformer = Transformer::load(device, weights, "var")?;
        let (shape, most) = (transformer.shape, config.scales.iter().map(|side| side * side).max().unwrap_or(0));
        let kept = budget.map(|budget| rows_kept(config, budget));
        let scale = |k: usize| -> Result<Scale<A>> {
            let (first, l) = (config.first(k), config.scales[k] * config.scales[k]);
            let place: Vec<i32> = (0..2 * batch * l).map(|row| (first + row % l) as i32).collect();
            let mut sampler = Sampler::new(device, batch * l, shape.vocab, 0, settings)?;
            sampler.places(device, (0..batch * l).map(|row| first + row % l))?;
            Ok(Scale {
                // With the class said, and without.
                pass: match &kept {
                    Some(kept) => Pass::of_scale_within(device, shape, config, 2 * batch, k, kept)?,
                    None => Pass::of_scale(device, shape, config, 2 * batch, k)?,
                },
                sampler,
                place: device.upload(&place)?,
                tokens: device.zeros(batch * l)?,
            })
        };
        let word = weights.floats("embed", &[shape.width, config.channels])?;
        Ok(Var {
            batch,
            guidance: settings.guidance,
            word: Matrix::new(device, shape.width, config.channels, &word)?,
            said: transformer.unsaid(device, 2 * batch)?,
            cache: transformer.cache(device, 2 * batch, config.tokens())?,
            scratch: transformer.scratch(device, 2 * batch * most)?,
            scales: (0..config.scales.len()).map(scale).collect::<Result<_>>()?,
            guided: device.zeros(batch * most * shape.vocab)?,
            next: device.zeros(2 * batch * most * config.channels)?,
            count: device.upload(&(0..2 * batch as i32).collect::<Vec<_>>())?,
            transformer,
        })
    }

    pub(crate) fn scales(&self) -> usize {
        self.scales.len()
    }

    /// What differs from batch to batch; everything after this is launches alone.
    pub(crate) fn begin(&mut self, device: &Device, images: &[Image]) -> Result<()> {
        assert_eq!(images.len(), self.batch);
        self.transformer.say(device, &conditions(images), &mut self.said)?;
        for scale in &mut self.scales {
            let l = scale.tokens.len() / self.batch;
            scale.sampler.seeds(device, images.iter().flat_map(|image| std::iter::repeat_n(image.seed, l)))?;
        }
        Ok(())
    }

    /// The logits of scale `k` from `next`, with the class said in the first half and without in the second.
    pub(crate) fn logits(&mut self, device: &Device, k: usize) -> Result<&Buffer<f32>> {
        let Var { transformer, scales, said, cache, scratch, .. } = self;
        let (scale, width) = (&mut scales[k], transformer.shape.width);
        let rows = 2 * scale.tokens.len();
        let table = if k == 0 { Some(&said.conditions) } else { None };
        if k > 0 {
            self.word.apply(device, rows, &self.next, &mut scratch.x)?;
        }
        embed(device, &mut scratch.x, table, &self.count, &transformer.positions, &scale.place, [rows, width])?;
        transformer.run(device, &mut scale.pass, None, said, cache, scratch)?;
        Ok(&scratch.logits)
    }

    /// Draws the tokens of scale `k` from its logits.
    pub(crate) fn draw(&mut self, device: &Device, k: usize) -> Result<()> {
        let scale = &mut self.scales[k];
        let count = scale.tokens.len() * self.transformer.shape.vocab;
        guide(device, count, self.guidance, &self.scratch.logits, &mut self.guided, 0)?;
        scale.sampler.draw(device, &self.guided, 0, &mut scale.tokens, None)
    }

    /// Adds the tokens of scale `k` to the map, which makes the next scale's input.
    pub(crate) fn add(&mut self, device: &Device, tokenizer: &mut Tokenizer<A>, k: usize) -> Result<()> {
        let next = (k + 1 < self.scales.len()).then_some(&mut self.next);
        tokenizer.add(device, k, &self.scales[k].tokens, next)
    }

    /// Everything from the classes to the map. `done` is called after each scale.
    pub(crate) fn generate(
        &mut self,
        device: &Device,
        tokenizer: &mut Tokenizer<A>,
        stages: &mut Stages,
        mut done: impl FnMut(),
    ) -> Result<()> {
        for k in 0..self.scales.len() {
            stages.time(device, "transformer", || self.logits(device, k).map(|_| ()))?;
            stages.time(device, "sampling", || self.draw(device, k))?;
            stages.time(device, "multi-scale step", || self.add(device, tokenizer, k))?;
            done();
        }
        Ok(())
    }

    /// Of one scale, `[batch, l]`.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn tokens(&self, device: &Device, k: usize) -> Result<Vec<i32>> {
        device.download(&self.scales[k].tokens)
    }

    /// Puts other tokens in place of those drawn: teacher forcing.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn force(&mut self, device: &Device, k: usize, tokens: &[i32]) -> Result<()> {
        device.write(&mut self.scales[k].tokens, tokens)
    }

    /// The next scale's input, for tests.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn next(&self, device: &Device) -> Result<Vec<A>> {
        device.download(&self.next)
    }
}
