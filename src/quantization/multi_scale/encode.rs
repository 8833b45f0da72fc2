//! Encoding: what is left of the map, pooled, becomes the tokens of each scale in turn.

use super::host::pooled;
use super::plan::{Next, Plan};
use super::{BIT_FLIP_DOMAIN, Call, EncodeArgs, EncodeBitsArgs, FHat, FlipArgs, MultiScale, cuda, host};
use crate::device::Device;
use crate::dtype::{Code, Float};
use crate::error::{Error, Result};
use crate::launch::Operands;
use crate::philox;
use crate::stream::AsStream;
use crate::view::{In, Out};

const HERE: &str = "operands are on the stream's device";

fn refuse_independent(plan: &Plan) -> Result<()> {
    match plan.next {
        Next::Tokens => {
            Err(Error::Unsupported { arg: "next", what: "scales that do not add up are encoded each by itself" })
        }
        _ => Ok(()),
    }
}

impl<C: Code + super::Token, O: Float> MultiScale<C, O> {
    /// Bytes of workspace that [`MultiScale::encode`] needs on a CUDA stream; on the host none.
    pub fn encode_workspace_bytes(&self) -> u64 {
        let plan = &self.inner;
        let most = plan.scales.iter().map(|scale| scale.tokens).max().unwrap_or(0);
        (plan.batch * most * plan.channels * 4).next_multiple_of(256)
    }

    /// The codes of a map (VAR's `f_to_idxBl_or_fhat`): scale by scale, what the scales before have left is pooled by
    /// area to the scale's size, each pixel becomes the nearest row of the codebook, and these are added up as by
    /// [`MultiScale::step`].
    ///
    /// A pixel's code is the lowest index with the least score, the sum over channels ascending of `(z - row)^2` in
    /// f32, a subtraction and a fused multiply-add each: exact, and the same wherever `z` is the same. A pixel with a
    /// NaN gets code 0. On a CUDA stream two kernels a scale.
    ///
    /// # Errors
    /// As [`MultiScale::step`]; [`Error::Workspace`]; [`Error::Unsupported`] with [`Next::Tokens`];
    /// [`Error::Size`] for more entries than `C` can count.
    pub fn encode<S: AsStream + ?Sized>(&self, stream: &S, args: EncodeArgs<'_, C>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        refuse_independent(plan)?;
        if C::from_i64(plan.entries as i64 - 1).is_none() {
            let max = 1 << (8 * size_of::<C>());
            return Err(Error::Size { arg: "entries", got: plan.entries, min: 1, max });
        }
        let (codebook, phi) = self.constants(plan.phi.iter().any(|&phi| phi >= 0));
        let need = if stream.device() == Device::Host { 0 } else { self.encode_workspace_bytes() };
        Operands::of(&stream)
            .input("f", &args.f, plan.map_len())?
            .input("codebook", &args.codebook, codebook)?
            .input_if("search", &args.search, codebook)?
            .input_needed("phi", &args.phi, phi)?
            .output("codes", &args.codes, plan.batch * plan.tokens)?
            .output("f_hat", &args.f_hat, plan.map_len())?
            .workspace_if(&args.workspace, need)?
            .finish()?;
        if plan.batch == 0 {
            return Ok(());
        }
        match stream.device() {
            Device::Host => on_host(plan, args),
            _ => cuda::encode(plan, &stream, &args),
        }
    }
}

/// What the scales so far have left of the map, pooled to a scale: `(channel, y, x)` of one image.
fn left<'p>(
    plan: &'p Plan,
    scale: usize,
    b: usize,
    f: &'p [f32],
    map: Option<&'p [f32]>,
) -> impl Fn(usize, usize, usize) -> f32 + 'p {
    let (height, width) = (plan.height as usize, plan.width as usize);
    let image = b * plan.channels as usize * height * width;
    let to = plan.scales[scale];
    move |c, y, x| {
        let pixel = |y: usize, x: usize| {
            let at = image + (c * height + y) * width + x;
            f64::from(f[at] - map.map_or(0.0, |map| map[at]))
        };
        pooled(Next::Area, (y, x), (height, width), (to.height as usize, to.width as usize), pixel) as f32
    }
}

/// The nearest row; the lowest index among equals, 0 if no score is below infinity.
fn nearest(z: &[f32], codebook: &[f32]) -> usize {
    let (mut best, mut least) = (0, f32::INFINITY);
    for (i, row) in codebook.chunks_exact(z.len()).enumerate() {
        let score = z.iter().zip(row).fold(0f32, |sum, (z, c)| (z - c).mul_add(z - c, sum));
        if score < least {
            (best, least) = (i, score);
        }
    }
    best
}

fn normalize(z: &mut [f32]) {
    let norm = z.iter().fold(0f32, |sum, z| z.mul_add(*z, sum)).sqrt().max(1e-12);
    z.iter_mut().for_each(|z| *z /= norm);
}

fn on_host<C: Code + super::Token>(plan: &Plan, args: EncodeArgs<'_, C>) -> Result<()> {
    let EncodeArgs { f, codebook, search, phi, mut codes, f_hat, .. } = args;
    let (entries, channels) = (plan.entries as usize, plan.channels as usize);
    let mut f_hat = FHat::FromZero(f_hat);
    for s in 0..plan.scales.len() {
        let scale = plan.scales[s];
        let source = f.as_host().expect(HERE);
        let rows = &search.as_ref().unwrap_or(&codebook).as_host().expect(HERE)[..entries * channels];
        let codes_of = codes.as_host().expect(HERE);
        for b in 0..plan.batch as usize {
            let map = if s == 0 { None } else { Some(f_hat.written()) };
            let left = left(plan, s, b, source, map);
            for token in 0..scale.tokens as usize {
                let (y, x) = (token / scale.width as usize, token % scale.width as usize);
                let mut z = [0f32; 256];
                let z = &mut z[..channels];
                z.iter_mut().enumerate().for_each(|(c, z)| *z = left(c, y, x));
                if search.is_some() {
                    normalize(z);
                }
                let code = C::from_i64(nearest(z, rows) as i64).expect("the entries fit");
                codes_of[b * plan.tokens as usize + scale.first as usize + token] = code;
            }
        }
        let tokens = In::host(&*codes_of);
        host::run::<C, f32>(
            plan,
            Call {
                first: s,
                scales: 1,
                tokens: Some(&tokens),
                tokens_at: scale.first as usize,
                tokens_stride: plan.tokens as usize,
                codebook: Some(&codebook),
                phi: phi.as_ref(),
                f_hat: Some(&mut f_hat),
                prefixes: false,
                next: None,
                repeat: 1,
                flags: None,
            },
        )?;
        f_hat = f_hat.in_place();
    }
    Ok(())
}

impl<O: Float> MultiScale<u8, O> {
    /// The bits of a map (Infinity's `MultiScaleBSQ`, and `BitwiseSelfCorrection.flip_requant`): scale by scale, what
    /// the scales before have left is pooled by area to the scale's size, each element becomes its sign, bits are
    /// flipped if asked for, and these are added up as by [`MultiScale::step`].
    ///
    /// On a CUDA stream one kernel a scale and one before.
    ///
    /// # Errors
    /// As [`MultiScale::step`]; [`Error::Unsupported`] with [`Next::Tokens`], for another number of rates than
    /// scales, or for one outside 0 to 1.
    pub fn encode_bits<S: AsStream + ?Sized>(&self, stream: &S, args: EncodeBitsArgs<'_, O>) -> Result<()> {
        let stream = stream.as_stream();
        let plan = &self.inner;
        refuse_independent(plan)?;
        let all = plan.batch * plan.tokens * plan.token_width();
        let mut operands = Operands::of(&stream)
            .input("f", &args.f, plan.map_len())?
            .output("labels", &args.labels, all)?
            .output("f_hat", &args.f_hat, plan.map_len())?
            .output_if("next", &args.next, plan.batch * plan.input_tokens() * plan.token_width())?;
        if let Some(FlipArgs { flipped, seeds, rates }) = &args.flips {
            if rates.len() != plan.scales.len() || !rates.iter().all(|rate| (0.0..=1.0).contains(rate)) {
                return Err(Error::Unsupported { arg: "rates", what: "a probability for each scale" });
            }
            operands = operands.output("flipped", flipped, all)?.input("seeds", seeds, plan.batch)?;
        }
        operands.finish()?;
        if plan.phi.iter().any(|&phi| phi >= 0) {
            return Err(Error::Unsupported { arg: "phi", what: "bits are added up without" });
        }
        if plan.batch == 0 {
            return Ok(());
        }
        match stream.device() {
            Device::Host => bits_on_host(plan, args),
            _ => cuda::encode_bits(plan, &stream, args),
        }
    }
}

fn bits_on_host<O: Float>(plan: &Plan, args: EncodeBitsArgs<'_, O>) -> Result<()> {
    let EncodeBitsArgs { f, mut labels, mut flips, f_hat, mut next } = args;
    let (patch, width) = (plan.patch as usize, plan.token_width() as usize);
    let (stride, inputs) = (plan.tokens as usize * width, plan.input_tokens() as usize * width);
    let mut f_hat = FHat::FromZero(f_hat);
    for s in 0..plan.scales.len() {
        let scale = plan.scales[s];
        let source = f.as_host().expect(HERE);
        let labels_of = labels.as_host().expect(HERE);
        for b in 0..plan.batch as usize {
            let map = if s == 0 { None } else { Some(f_hat.written()) };
            let left = left(plan, s, b, source, map);
            for token in 0..scale.tokens as usize {
                let columns = scale.width as usize / patch;
                let corner = (token / columns * patch, token % columns * patch);
                for element in 0..width {
                    let (c, dy, dx) = (element / (patch * patch), element / patch % patch, element % patch);
                    let bit = u8::from(left(c, corner.0 + dy, corner.1 + dx) > 0.0);
                    let at = (b * plan.tokens as usize + scale.first as usize + token) * width + element;
                    labels_of[at] = bit;
                    if let Some(FlipArgs { flipped, seeds, rates }) = &mut flips {
                        let position = (scale.first + token as u64) * width.div_ceil(4) as u64 + element as u64 / 4;
                        let seed = seeds.as_host().expect(HERE)[b] as u64;
                        let word = philox::block(seed, position, BIT_FLIP_DOMAIN, 0)[element % 4];
                        let flip = philox::uniform(word) < rates[s];
                        flipped.as_host().expect(HERE)[at] = bit ^ u8::from(flip);
                    }
                }
            }
        }
        let tokens = match &mut flips {
            Some(flips) => In::host(&*flips.flipped.as_host().expect(HERE)),
            None => In::host(&*labels_of),
        };
        let at = plan.scales.get(s + 1).map_or(0, |to| (to.first - plan.scales[0].tokens) as usize * width);
        let next = if s + 1 < plan.scales.len() { next.as_mut() } else { None };
        add_bits(plan, s, &tokens, stride, &mut f_hat, next.map(|next| (next, at, inputs)))?;
        f_hat = f_hat.in_place();
    }
    Ok(())
}

/// A step from bits that lie among those of the other scales.
fn add_bits<O: Float>(
    plan: &Plan,
    s: usize,
    tokens: &In<'_, u8>,
    tokens_stride: usize,
    f_hat: &mut FHat<'_>,
    next: Option<(&mut Out<'_, O>, usize, usize)>,
) -> Result<()> {
    host::run::<u8, O>(
        plan,
        Call {
            first: s,
            scales: 1,
            tokens: Some(tokens),
            tokens_at: plan.scales[s].first as usize * plan.token_width() as usize,
            tokens_stride,
            codebook: None,
            phi: None,
            f_hat: Some(f_hat),
            prefixes: false,
            next,
            repeat: 1,
            flags: None,
        },
    )
}
