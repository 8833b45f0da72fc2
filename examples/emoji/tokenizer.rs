//! From tokens to pixels: the library's multi-scale quantizer, and a convolutional decoder out of dense layers.

use nextscale::dtype::Float;
use nextscale::quantization::{DecodeArgs, FHat, MultiScale, PhiTable, StepArgs, pack_phi};

use crate::dense::Matrix;
use crate::device::{Buffer, Device};
use crate::failure::Result;
use crate::pointwise::{Norm, to_rows, unfold};
use crate::weights::{Config, Weights};

/// VAR's `|quant_resi|`.
const PHI_RATIO: f32 = 0.5;

pub(crate) struct Tokenizer<A> {
    batch: usize,
    quantizer: MultiScale<u32, A>,
    /// `[vocab, channels]`
    codebook: Buffer<f32>,
    phi: Buffer<f32>,
    /// `[batch, channels, side, side]`
    pub(crate) f_hat: Buffer<f32>,
    decoder: Decoder<A>,
}

impl<A: Float> Tokenizer<A> {
    pub(crate) fn load(device: &Device, weights: &Weights, batch: usize) -> Result<Self> {
        let config = &weights.config;
        let (channels, side) = (config.channels, config.side());
        let table = PhiTable::new(&config.phi_table)?;
        let phis = table.phis() as usize;
        let phi = weights.floats("phi.weight", &[phis, channels, channels, 3, 3])?;
        let bias = weights.floats("phi.bias", &[phis, channels])?;
        let schedule: Vec<_> = config.scales.iter().map(|&side| (side, side)).collect();
        Ok(Tokenizer {
            batch,
            quantizer: MultiScale::builder(channels, (side, side), &schedule)
                .batch(batch)
                .entries(config.vocab)
                .phi(table)
                // The next scale is read twice: with the class said, and without.
                .repeat(2)
                .build(&device.info()?)?,
            codebook: device.upload(&weights.floats("codebook", &[config.vocab, channels])?)?,
            phi: device.upload(&pack_phi(channels, &phi, &bias, PHI_RATIO)?)?,
            f_hat: device.zeros(batch * channels * side * side)?,
            decoder: Decoder::load(device, weights, batch)?,
        })
    }

    /// Adds the tokens of a scale to the map, and leaves the next scale's input in `next [2, batch, l, channels]`.
    pub(crate) fn add(
        &mut self,
        device: &Device,
        scale: usize,
        tokens: &Buffer<i32>,
        next: Option<&mut Buffer<A>>,
    ) -> Result<()> {
        let map = self.f_hat.output();
        Ok(self.quantizer.step(
            &device.stream(),
            StepArgs {
                scale,
                tokens: tokens.input_as::<u32>(),
                codebook: Some(self.codebook.input()),
                phi: Some(self.phi.input()),
                f_hat: Some(if scale == 0 { FHat::FromZero(map) } else { FHat::InPlace(map) }),
                next: next.map(Buffer::output),
                flags: None,
            },
        )?)
    }

    /// The map of all tokens, `[batch, tokens]`.
    pub(crate) fn add_all(&mut self, device: &Device, tokens: &Buffer<i32>) -> Result<()> {
        Ok(self.quantizer.decode(
            &device.stream(),
            DecodeArgs {
                tokens: tokens.input_as::<u32>(),
                codebook: Some(self.codebook.input()),
                phi: Some(self.phi.input()),
                f_hat: self.f_hat.output(),
                prefixes: false,
                next: None,
                flags: None,
            },
        )?)
    }

    /// Decodes the map: enqueues it all.
    pub(crate) fn decode(&mut self, device: &Device) -> Result<()> {
        self.decoder.run(device, self.batch, &self.f_hat)
    }

    /// What was decoded: `[batch, size, size, 3]`, -1 to 1 where it is not beyond.
    pub(crate) fn images(&self, device: &Device) -> Result<Vec<f32>> {
        let mut images = device.download(&self.decoder.y)?;
        images.truncate(self.batch * self.decoder.size * self.decoder.size * 3);
        images.chunks_exact_mut(3).for_each(|rgb| rgb.iter_mut().zip(&self.decoder.bias).for_each(|(x, b)| *x += b));
        Ok(images)
    }
}

/// Layers norm, SiLU, convolution; residual blocks of two of them. Pixels are rows.
struct Decoder<A> {
    size: usize,
    side: usize,
    channels: usize,
    first: Matrix<A>,
    stages: Vec<Stage<A>>,
    norm: [Buffer<f32>; 2],
    last: Matrix<A>,
    bias: Vec<f32>,
    /// The residual stream, a block's middle, and what a convolution gave.
    x: Buffer<f32>,
    middle: Buffer<f32>,
    y: Buffer<f32>,
    h: Buffer<A>,
    unfolded: Buffer<A>,
}

struct Stage<A> {
    width: usize,
    blocks: Vec<[Layer<A>; 2]>,
    up: Option<Layer<A>>,
}

struct Layer<A> {
    /// Scale, shift.
    norm: [Buffer<f32>; 2],
    conv: Matrix<A>,
}

impl<A: Float> Decoder<A> {
    fn load(device: &Device, weights: &Weights, batch: usize) -> Result<Self> {
        let config: &Config = &weights.config;
        let conv = |name: &str, outputs: usize, inputs: usize| {
            Matrix::new(device, outputs, 9 * inputs, &weights.floats(name, &[outputs, 9 * inputs])?)
        };
        let norm = |name: &str, width: usize| -> Result<[Buffer<f32>; 2]> {
            let part = |part: &str| device.upload(&weights.floats(&format!("{name}.{part}"), &[width])?);
            Ok([part("scale")?, part("shift")?])
        };
        let stage = |s: usize| -> Result<Stage<A>> {
            let width = config.decoder[s];
            let layer = |block: usize, i: usize| -> Result<Layer<A>> {
                Ok(Layer {
                    norm: norm(&format!("decoder.{s}.{block}.norm{i}"), width)?,
                    conv: conv(&format!("decoder.{s}.{block}.conv{i}"), width, width)?,
                })
            };
            let up = |&next: &usize| -> Result<Layer<A>> {
                let norm = norm(&format!("decoder.{s}.up.norm"), width)?;
                Ok(Layer { norm, conv: conv(&format!("decoder.{s}.up.conv"), next, width)? })
            };
            let block = |block: usize| Ok([layer(block, 1)?, layer(block, 2)?]);
            Ok(Stage {
                width,
                blocks: (0..config.decoder_blocks[s]).map(block).collect::<Result<_>>()?,
                up: config.decoder.get(s + 1).map(up).transpose()?,
            })
        };
        let last = *config.decoder.last().expect("there is a stage");
        // Of all stages, the most of each.
        let pixels = |s: usize| batch * (config.side() << s) * (config.side() << s);
        let stages = config.decoder.len();
        let rows = |width: &dyn Fn(usize) -> usize| (0..stages).map(|s| pixels(s) * width(s)).max().unwrap_or(0);
        let wide = rows(&|s| config.decoder[s].max(config.channels));
        // An enlarging convolution unfolds the channels of the stage before.
        let unfolded = rows(&|s| 9 * config.decoder[s].max(config.decoder[s.saturating_sub(1)]).max(config.channels));
        Ok(Decoder {
            size: config.size,
            side: config.side(),
            channels: config.channels,
            first: conv("decoder.in", config.decoder[0], config.channels)?,
            stages: (0..stages).map(stage).collect::<Result<_>>()?,
            norm: norm("decoder.norm", last)?,
            last: conv("decoder.out", 3, last)?,
            bias: weights.floats("decoder.out.bias", &[3])?,
            x: device.zeros(wide)?,
            middle: device.zeros(wide)?,
            y: device.zeros(wide.max(pixels(stages - 1) * 3))?,
            h: device.zeros(wide)?,
            unfolded: device.zeros(unfolded)?,
        })
    }

    /// From the map to `y`.
    fn run(&mut self, device: &Device, batch: usize, f_hat: &Buffer<f32>) -> Result<()> {
        let Decoder { x, middle, y, h, unfolded, .. } = self;
        let mut side = self.side;
        to_rows(device, f_hat, h, [batch, self.channels, side * side])?;
        unfold(device, h, unfolded, [batch, side, self.channels, 1])?;
        self.first.apply(device, batch * side * side, unfolded, x)?;
        // A block's sum is made by the norm that follows it.
        let mut pending = false;
        for stage in &self.stages {
            let rows = batch * side * side;
            let norm = |[scale, shift]: &[Buffer<f32>; 2], x: &mut Buffer<f32>, y: Option<&Buffer<f32>>, h: &mut _| {
                let (width, scale, shift) = (stage.width, (scale, 0), (shift, 0));
                Norm { rows, width, rows_a_group: rows, silu: true, y, gate: None, scale, shift }.run(device, x, h)
            };
            for [one, two] in &stage.blocks {
                norm(&one.norm, x, pending.then_some(&*y), h)?;
                unfold(device, h, unfolded, [batch, side, stage.width, 1])?;
                one.conv.apply(device, rows, unfolded, middle)?;
                norm(&two.norm, middle, None, h)?;
                unfold(device, h, unfolded, [batch, side, stage.width, 1])?;
                two.conv.apply(device, rows, unfolded, y)?;
                pending = true;
            }
            let up = stage.up.as_ref();
            norm(up.map_or(&self.norm, |up| &up.norm), x, pending.then_some(&*y), h)?;
            unfold(device, h, unfolded, [batch, side, stage.width, 1 + usize::from(up.is_some())])?;
            match up {
                Some(up) => {
                    side *= 2;
                    up.conv.apply(device, batch * side * side, unfolded, x)?;
                }
                None => self.last.apply(device, rows, unfolded, y)?,
            }
            pending = false;
        }
        Ok(())
    }
}
