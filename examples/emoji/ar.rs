//! Next-token generation over the same tokens, one after the other: plainly, or drafted by a small model and verified.

use nextscale::dtype::Float;
use nextscale::verification::{Accepted, Drafts, Emitted, Rule, Verifier, VerifierArgs, VerifierOptions, VerifierOut};

use crate::device::{Buffer, Device};
use crate::failure::Result;
use crate::pointwise::{embed, guide};
use crate::sampling::{Image, Sampler, Settings, Stages, conditions};
use crate::transformer::{Cache, Pass, Past, Said, Scratch, Transformer};
use crate::weights::Weights;

/// A next-token model that takes `rows` tokens a call, each batch entry from where it is.
pub(crate) struct Causal<A> {
    transformer: Transformer<A>,
    /// Tokens' rows, then those of conditions: what a sequence begins with.
    table: Buffer<f32>,
    said: Said,
    conditions: Vec<usize>,
    tokens: usize,
    rows: usize,
    pass: Pass<A>,
    past: Past,
    cache: Cache<A>,
    scratch: Scratch<A>,
    /// `[2, batch, rows]`
    index: Buffer<i32>,
    place: Buffer<i32>,
}

impl<A: Float> Causal<A> {
    pub(crate) fn load(device: &Device, weights: &Weights, part: &str, batch: usize, rows: usize) -> Result<Self> {
        let config = &weights.config;
        let transformer = Transformer::load(device, weights, part)?;
        let shape = transformer.shape;
        let mut table = weights.floats("embed", &[shape.vocab, shape.width])?;
        table.extend(transformer.conditions());
        // A call may begin at the last token, and finished entries stay there.
        let room = config.tokens() + rows;
        Ok(Causal {
            table: device.upload(&table)?,
            said: transformer.unsaid(device, 2 * batch)?,
            conditions: Vec::new(),
            tokens: config.tokens(),
            rows,
            pass: Pass::of_tokens(device, shape, 2 * batch, rows, room)?,
            past: Past { lengths: device.zeros(2 * batch)?, append_at: device.zeros(2 * batch)? },
            cache: transformer.cache(device, 2 * batch, rows + room)?,
            scratch: transformer.scratch(device, 2 * batch * rows)?,
            index: device.zeros(2 * batch * rows)?,
            place: device.zeros(2 * batch * rows)?,
            transformer,
        })
    }

    pub(crate) fn begin(&mut self, device: &Device, images: &[Image]) -> Result<()> {
        self.conditions = conditions(images);
        self.transformer.say(device, &self.conditions, &mut self.said)
    }

    /// Logits after each of `inputs [batch, rows]`, of which entry b's first stands at place `at[b]`; the token there
    /// is the one before the place, and at place 0 the class. With the class said, then without.
    pub(crate) fn logits(&mut self, device: &Device, inputs: &[i32], at: &[usize]) -> Result<&Buffer<f32>> {
        let (rows, vocab, width) = (self.rows, self.transformer.shape.vocab, self.transformer.shape.width);
        let entries = 2 * at.len();
        let at = |entry: usize| at[entry % at.len()];
        let (mut index, mut place) = (Vec::with_capacity(entries * rows), Vec::with_capacity(entries * rows));
        for entry in 0..entries {
            for i in 0..rows {
                index.push(match at(entry) + i {
                    0 => (vocab + self.conditions[entry]) as i32,
                    _ => inputs[entry % (entries / 2) * rows + i],
                });
                place.push((at(entry) + i).min(self.tokens - 1) as i32);
            }
        }
        let lengths: Vec<i32> = (0..entries).map(|entry| at(entry) as i32).collect();
        let append_at: Vec<i32> = lengths.iter().map(|length| length + rows as i32).collect();
        device.write(&mut self.index, &index)?;
        device.write(&mut self.place, &place)?;
        device.write(&mut self.past.lengths, &lengths)?;
        device.write(&mut self.past.append_at, &append_at)?;
        let Causal { transformer, scratch, .. } = self;
        let shape = [entries * rows, width];
        embed(device, &mut scratch.x, Some(&self.table), &self.index, &transformer.positions, &self.place, shape)?;
        transformer.run(device, &mut self.pass, Some(&self.past), &self.said, &mut self.cache, scratch)?;
        Ok(&scratch.logits)
    }
}

/// What a run of a sampler was like.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Counts {
    /// Calls of the target.
    pub(crate) calls: usize,
    /// Over images that were not finished: steps, tokens that they emitted, drafts that could have been and were
    /// accepted.
    pub(crate) steps: usize,
    pub(crate) emitted: usize,
    pub(crate) drafted: usize,
    pub(crate) accepted: usize,
}

/// The target, and with `drafts > 0` a drafter that proposes so many tokens a step.
pub(crate) struct Sequential<A> {
    batch: usize,
    tokens: usize,
    vocab: usize,
    drafts: usize,
    settings: Settings,
    target: Causal<A>,
    drafter: Option<Drafter<A>>,
    verifier: Verifier<f32, f32>,
    guided: Buffer<f32>,
    inputs: VerifierInputs,
    outputs: VerifierOutputs,
}

struct Drafter<A> {
    model: Causal<A>,
    /// One for each draft of a step: it draws by its number.
    samplers: Vec<Sampler>,
    /// `[drafts, batch, vocab]`, and what the samplers found out about it.
    guided: Buffer<f32>,
    stats: Buffer<f32>,
    tokens: Buffer<i32>,
}

/// In the memory of the device.
struct VerifierInputs {
    cu_rows: Buffer<i32>,
    drafts: Buffer<i32>,
    draft_row: Buffer<i32>,
    temperature: Buffer<f32>,
    top_k: Buffer<i32>,
    top_p: Buffer<f32>,
    seeds: Buffer<i64>,
    positions: Buffer<i64>,
}

struct VerifierOutputs {
    tokens: Buffer<i32>,
    emitted: Buffer<Emitted>,
    accepted: Buffer<Accepted>,
    status: Buffer<u32>,
    workspace: Buffer<u8>,
    counters: Buffer<u32>,
}

impl<A: Float> Sequential<A> {
    /// `draft`: its weights, the number of drafts a step, and when they are accepted.
    pub(crate) fn load(
        device: &Device,
        weights: &Weights,
        draft: Option<(&Weights, usize, Rule)>,
        batch: usize,
        settings: &Settings,
    ) -> Result<Self> {
        let (tokens, vocab) = (weights.config.tokens(), weights.config.vocab);
        let drafts = draft.map_or(0, |(_, drafts, _)| drafts);
        let rows = drafts + 1;
        let mut verifier = Verifier::builder(batch, drafts, vocab);
        if let Some((_, _, rule)) = draft {
            verifier = verifier.drafts(Drafts::LogitsAndStats).rule(rule);
        }
        let verifier = verifier.build(&device.info()?)?;
        let drafter = |(weights, drafts, _): (&Weights, usize, Rule)| -> Result<Drafter<A>> {
            let sampler = |i| Sampler::new(device, batch, vocab, i as u32, settings);
            Ok(Drafter {
                model: Causal::load(device, weights, "draft", batch, 1)?,
                samplers: (0..drafts).map(sampler).collect::<Result<_>>()?,
                guided: device.zeros(drafts * batch * vocab)?,
                stats: device.zeros(drafts * batch * 4)?,
                tokens: device.zeros(batch)?,
            })
        };
        // Draft i of image b is drawn from row [i, b] of the drafter's logits; an image's last row scores no draft.
        let draft_row = |row: usize| (row % rows * batch + row / rows).min((drafts * batch).saturating_sub(1)) as i32;
        Ok(Sequential {
            batch,
            tokens,
            vocab,
            drafts,
            settings: *settings,
            target: Causal::load(device, weights, "ar", batch, rows)?,
            drafter: draft.map(drafter).transpose()?,
            guided: device.zeros(batch * rows * vocab)?,
            inputs: VerifierInputs {
                cu_rows: device.upload(&(0..=batch).map(|b| (b * rows) as i32).collect::<Vec<_>>())?,
                drafts: device.zeros(batch * rows)?,
                draft_row: device.upload(&(0..batch * rows).map(draft_row).collect::<Vec<_>>())?,
                temperature: device.upload(&vec![settings.temperature; batch])?,
                top_k: device.upload(&vec![settings.top_k; batch])?,
                top_p: device.upload(&vec![settings.top_p; batch])?,
                seeds: device.zeros(batch)?,
                positions: device.zeros(batch)?,
            },
            outputs: VerifierOutputs {
                tokens: device.zeros(batch * rows)?,
                emitted: device.zeros(batch)?,
                accepted: device.zeros(batch)?,
                status: device.zeros(batch)?,
                workspace: device.zeros(verifier.workspace_bytes() as usize)?,
                counters: device.zeros(verifier.counter_words())?,
            },
            verifier,
        })
    }

    /// All tokens of a batch, up to `most` of each image. `done` is called with the number of each step's new tokens.
    pub(crate) fn generate(
        &mut self,
        device: &Device,
        images: &[Image],
        most: usize,
        stages: &mut Stages,
        mut done: impl FnMut(usize),
    ) -> Result<(Vec<Vec<i32>>, Counts)> {
        let (batch, rows, most) = (self.batch, self.drafts + 1, most.min(self.tokens));
        assert_eq!(images.len(), batch);
        let seeds = images.iter().map(|image| image.seed);
        device.write(&mut self.inputs.seeds, &seeds.clone().map(|seed| seed as i64).collect::<Vec<_>>())?;
        self.target.begin(device, images)?;
        if let Some(drafter) = &mut self.drafter {
            drafter.model.begin(device, images)?;
            drafter.samplers.iter_mut().try_for_each(|sampler| sampler.seeds(device, seeds.clone()))?;
        }

        let mut emitted: Vec<Vec<i32>> = vec![Vec::with_capacity(self.tokens + rows); batch];
        let mut counts = Counts::default();
        while emitted.iter().any(|tokens| tokens.len() < most) {
            // Where each image is. Those that are finished are carried along, at their end.
            let at: Vec<usize> = emitted.iter().map(Vec::len).collect();
            let last = |b: usize| emitted[b].last().copied().unwrap_or(0);
            // [batch, rows]: the last token, then drafts.
            let mut inputs = vec![0; batch * rows];
            (0..batch).for_each(|b| inputs[b * rows] = last(b));
            if let Some(drafter) = &mut self.drafter {
                stages.time(device, "drafts", || drafter.propose(device, &self.settings, &at, rows, &mut inputs))?;
            }
            stages.time(device, "target", || self.target.logits(device, &inputs, &at).map(|_| ()))?;
            let decided = stages.time(device, "verification", || {
                let (guidance, logits) = (self.settings.guidance, &self.target.scratch.logits);
                guide(device, batch * rows * self.vocab, guidance, logits, &mut self.guided, 0)?;
                // Row i scores draft i, which is the input of the row after it.
                let score = |row: usize| if row % rows + 1 < rows { inputs[row + 1] } else { -1 };
                device.write(&mut self.inputs.drafts, &(0..batch * rows).map(score).collect::<Vec<_>>())?;
                device.write(&mut self.inputs.positions, &at.iter().map(|&at| at as i64).collect::<Vec<_>>())?;
                self.verify(device)
            })?;
            counts.calls += 1;
            let mut new = 0;
            for (b, image) in emitted.iter_mut().enumerate().filter(|(_, image)| image.len() < most) {
                let Emitted(count) = decided.emitted[b];
                let kept = (count as usize).min(most - image.len());
                counts.steps += 1;
                counts.emitted += kept;
                counts.drafted += self.drafts.min(most - image.len());
                counts.accepted += (decided.accepted[b].0 as usize).min(most - image.len());
                image.extend(&decided.tokens[b * rows..][..kept]);
                new += kept;
            }
            done(new);
        }
        Ok((emitted, counts))
    }

    /// Decides the drafts of all images in one call.
    fn verify(&mut self, device: &Device) -> Result<Decided> {
        let VerifierInputs { cu_rows, drafts, draft_row, temperature, top_k, top_p, seeds, positions } = &self.inputs;
        let VerifierOutputs { tokens, emitted, accepted, status, workspace, counters } = &mut self.outputs;
        let drafter = self.drafter.as_ref();
        self.verifier.run(
            &device.stream(),
            VerifierArgs {
                target: self.guided.input(),
                cu_rows: cu_rows.input(),
                drafts: drafts.input(),
                options: VerifierOptions {
                    draft: drafter.map(|drafter| drafter.guided.input()),
                    draft_row: drafter.map(|_| draft_row.input()),
                    draft_stats: drafter.map(|drafter| drafter.stats.input()),
                    temperature: Some(temperature.input()),
                    top_k: Some(top_k.input()),
                    top_p: Some(top_p.input()),
                    seeds: Some(seeds.input()),
                    positions: Some(positions.input()),
                    ..VerifierOptions::default()
                },
                out: VerifierOut {
                    tokens: tokens.output(),
                    emitted: emitted.output(),
                    accepted: accepted.output(),
                    status: status.output(),
                    last_row: None,
                    log_probs: None,
                },
                workspace: workspace.output(),
                counters: counters.output(),
            },
        )?;
        Ok(Decided {
            tokens: device.download(tokens)?,
            emitted: device.download(emitted)?,
            accepted: device.download(accepted)?,
        })
    }
}

struct Decided {
    tokens: Vec<i32>,
    emitted: Vec<Emitted>,
    accepted: Vec<Accepted>,
}

impl<A: Float> Drafter<A> {
    /// Draws the drafts of a step and writes them behind the last tokens in `inputs [batch, rows]`.
    fn propose(
        &mut self,
        device: &Device,
        settings: &Settings,
        at: &[usize],
        rows: usize,
        inputs: &mut [i32],
    ) -> Result<()> {
        let (batch, drafts, vocab) = (at.len(), rows - 1, self.model.transformer.shape.vocab);
        for i in 0..drafts {
            let current: Vec<i32> = (0..batch).map(|b| inputs[b * rows + i]).collect();
            let place: Vec<usize> = at.iter().map(|at| (at + i).min(self.model.tokens)).collect();
            let logits = self.model.logits(device, &current, &place)?;
            guide(device, batch * vocab, settings.guidance, logits, &mut self.guided, i * batch * vocab)?;
            let sampler = &mut self.samplers[i];
            // Positions are those of the step's first draft: the sampler adds its number.
            sampler.places(device, at.iter().copied())?;
            let stats = Some((&mut self.stats, i * batch * 4));
            sampler.draw(device, &self.guided, i * batch * vocab, &mut self.tokens, stats)?;
            let drawn = device.download(&self.tokens)?;
            drawn.iter().enumerate().for_each(|(b, &token)| inputs[b * rows + i + 1] = token);
        }
        // If all are accepted, the next step's past has the last one too.
        let current: Vec<i32> = (0..batch).map(|b| inputs[b * rows + drafts]).collect();
        let place: Vec<usize> = at.iter().map(|at| (at + drafts).min(self.model.tokens)).collect();
        self.model.logits(device, &current, &place)?;
        Ok(())
    }
}
