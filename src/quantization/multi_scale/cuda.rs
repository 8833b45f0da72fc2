//! From plan and views to the C ABI.

use super::plan::Plan;
use super::{Call, EncodeArgs, EncodeBitsArgs, Token};
use crate::dtype::{Code, Float};
#[cfg(not(nxs_kernels))]
use crate::error::Error;
use crate::error::Result;
use crate::stream::Stream;

#[cfg(nxs_kernels)]
mod launches {
    use super::super::{FHat, TokenKind, Up, plan::Next};
    use super::*;
    use crate::dtype::{DType, Element};
    use crate::error::Error;
    use crate::ffi;
    use crate::view::{In, Out};
    use core::ptr::null_mut;

    type Params = ffi::nxs_multi_scale_params;

    fn of<T: Element>(view: &In<'_, T>, at: usize) -> usize {
        view.span().address + at * size_of::<T>()
    }

    fn of_out<T: Element>(view: &Out<'_, T>, at: usize) -> usize {
        view.span().address + at * size_of::<T>()
    }

    /// What all passes of a plan share.
    fn base<T: Token>(plan: &Plan, codebook: Option<&In<'_, f32>>, phi: Option<&In<'_, f32>>) -> Result<Params> {
        if phi.is_some_and(|phi| plan.phis > 0 && !phi.span().address.is_multiple_of(16)) {
            return Err(Error::Alignment { arg: "phi", need: 16 });
        }
        Ok(Params {
            codebook_or_null: codebook.map_or(0, |view| of(view, 0)) as *const _,
            phi_or_null: phi.map_or(0, |view| of(view, 0)) as *const _,
            batch: plan.batch as i64,
            entries: plan.entries as i64,
            channels: plan.channels as i32,
            height: plan.height as i32,
            width: plan.width as i32,
            patch: plan.patch as i32,
            independent: (plan.next == Next::Tokens).into(),
            up: match plan.up {
                Up::Bicubic => ffi::NXS_RESIZE_BICUBIC,
                Up::Bilinear => ffi::NXS_RESIZE_BILINEAR,
            } as i32,
            down: match plan.next {
                Next::Bilinear => ffi::NXS_RESIZE_BILINEAR,
                Next::Area | Next::Tokens => ffi::NXS_RESIZE_AREA,
            } as i32,
            repeat: 1,
            tokens_kind: match T::KIND {
                TokenKind::Codes => ffi::NXS_TOKENS_CODES,
                TokenKind::Embeddings => ffi::NXS_TOKENS_EMBEDDINGS,
                TokenKind::Bits => ffi::NXS_TOKENS_BITS,
            } as i32,
            tokens_dtype: T::DTYPE as i32,
            next_dtype: DType::F32 as i32,
            bit_scale: plan.bit_scale(),
            group: plan.cut.group as i32,
            band: plan.cut.band as i32,
            plane_shared: plan.cut.plane_shared.into(),
            blocks: plan.cut.blocks as i32,
            programmatic: plan.programmatic.into(),
            ..Params::default()
        })
    }

    fn take(params: &mut Params, plan: &Plan, first: usize, scales: usize) {
        params.scales = scales as i32;
        for (i, s) in (first..first + scales).enumerate() {
            params.scale_height[i] = plan.scales[s].height as u16;
            params.scale_width[i] = plan.scales[s].width as u16;
            params.scale_phi[i] = plan.phi[s];
        }
    }

    /// The pass also makes something of the size of scale `s`.
    fn then(params: &mut Params, plan: &Plan, s: usize) {
        params.next_height = plan.scales[s].height as i32;
        params.next_width = plan.scales[s].width as i32;
    }

    fn launch(params: &Params, stream: &Stream<'_>) -> Result<()> {
        crate::launch::launch("nxs_multi_scale", stream, |handle| {
            // SAFETY: every address the kernel reaches lies in the operands, which are checked against the plan; codes
            // are clamped to the entries.
            unsafe { ffi::nxs_multi_scale(params, handle) }
        })
    }

    pub(in super::super) fn run<T: Token, O: Float>(
        plan: &Plan,
        stream: &Stream<'_>,
        call: Call<'_, '_, '_, '_, T, O>,
    ) -> Result<()> {
        let mut params = base::<T>(plan, call.codebook, call.phi)?;
        take(&mut params, plan, call.first, call.scales);
        params.tokens_or_null = call.tokens.map_or(0, |tokens| of(tokens, call.tokens_at)) as *const _;
        params.tokens_stride_batch = call.tokens_stride as i64;
        let mut turns = true;
        if let Some(f_hat) = call.f_hat {
            let (before, after) = match f_hat {
                FHat::InPlace(map) => {
                    turns = false;
                    (of_out(map, 0), of_out(map, 0))
                }
                FHat::FromZero(map) => (0, of_out(map, 0)),
                FHat::Between(before, map) => (of(before, 0), of_out(map, 0)),
            };
            (params.f_hat_or_null, params.f_hat_out_or_null) = (before as *const _, after as *mut _);
        }
        params.prefixes = call.prefixes.into();
        let mut to_next = false;
        if let Some((next, at, stride)) = call.next {
            params.next_or_null = of_out(next, at) as *mut _;
            params.next_stride_batch = stride as i64;
            params.next_dtype = O::DTYPE as i32;
            params.repeat = call.repeat as i32;
            then(&mut params, plan, call.first + call.scales);
            to_next = true;
        }
        params.flags_or_null = call.flags.map_or(null_mut(), |flags| of_out(flags, 0) as *mut _);
        let rows = turns && call.scales == 1 && plan.takes_rows(call.first) && !(to_next && plan.next == Next::Area);
        params.rows = (rows && !call.prefixes).into();
        launch(&params, stream)
    }

    pub(in super::super) fn encode<C: Code + Token>(
        plan: &Plan,
        stream: &Stream<'_>,
        args: &EncodeArgs<'_, C>,
    ) -> Result<()> {
        let workspace = args.workspace.as_ref().map_or(0, |workspace| of_out(workspace, 0));
        let map = of_out(&args.f_hat, 0);
        let mut params = base::<C>(plan, Some(&args.codebook), args.phi.as_ref())?;
        params.target_or_null = of(&args.f, 0) as *const _;
        params.tokens_stride_batch = plan.tokens as i64;
        // What is left is pooled by area, whatever a generation's next scale reads.
        params.down = ffi::NXS_RESIZE_AREA as i32;
        let rows = args.search.as_ref().unwrap_or(&args.codebook);
        // What the first scale searches for; then each pass makes what the next scale does.
        let pass = |params: &mut Params, scale: usize| {
            params.next_or_null = core::ptr::null_mut();
            (params.next_height, params.next_width) = (0, 0);
            if let Some(next) = plan.scales.get(scale) {
                params.next_or_null = workspace as *mut _;
                params.next_stride_batch = (next.tokens * plan.channels) as i64;
                params.next_of_residual = 1;
                then(params, plan, scale);
            }
            launch(params, stream)
        };
        pass(&mut params, 0)?;
        for (s, scale) in plan.scales.iter().enumerate() {
            let codes = of_out(&args.codes, scale.first as usize);
            let cut = plan.search_cut(scale.tokens);
            let search = ffi::nxs_nearest_code_params {
                z: workspace as *const _,
                codebook: of(rows, 0) as *const _,
                codes: codes as *mut _,
                codes_stride_batch: plan.tokens as i64,
                batch: plan.batch as i64,
                rows: scale.tokens as i64,
                entries: plan.entries as i64,
                channels: plan.channels as i32,
                normalize: args.search.is_some().into(),
                eps: 1e-12,
                codes_dtype: C::DTYPE as i32,
                log2_tile: cut.tile.trailing_zeros() as i32,
                splits: cut.splits as i32,
                programmatic: plan.programmatic.into(),
            };
            crate::launch::launch("nxs_nearest_code", stream, |handle| {
                // SAFETY: the workspace holds the vectors, and the operands are checked against the plan.
                unsafe { ffi::nxs_nearest_code(&search, handle) }
            })?;
            take(&mut params, plan, s, 1);
            params.tokens_or_null = codes as *const _;
            params.f_hat_or_null = if s == 0 { 0 } else { map } as *const _;
            params.f_hat_out_or_null = map as *mut _;
            pass(&mut params, s + 1)?;
        }
        Ok(())
    }

    pub(in super::super) fn encode_bits<O: Float>(
        plan: &Plan,
        stream: &Stream<'_>,
        args: EncodeBitsArgs<'_, O>,
    ) -> Result<()> {
        let map = of_out(&args.f_hat, 0);
        let width = plan.token_width();
        let mut params = base::<u8>(plan, None, None)?;
        params.target_or_null = of(&args.f, 0) as *const _;
        params.tokens_stride_batch = (plan.tokens * width) as i64;
        params.labels_stride_batch = params.tokens_stride_batch;
        params.next_stride_batch = (plan.input_tokens() * width) as i64;
        params.next_dtype = O::DTYPE as i32;
        params.seeds_or_null = args.flips.as_ref().map_or(0, |flips| of(&flips.seeds, 0)) as *const _;
        let labels = |scale: usize| of_out(&args.labels, (plan.scales[scale].first * width) as usize);
        let flipped = |scale: usize| {
            let at = (plan.scales[scale].first * width) as usize;
            args.flips.as_ref().map(|flips| of_out(&flips.flipped, at))
        };
        let pass = |params: &mut Params, scale: usize| {
            (params.labels_or_null, params.flipped_or_null) = (null_mut(), null_mut());
            params.next_or_null = null_mut();
            (params.next_height, params.next_width) = (0, 0);
            if let Some(next) = plan.scales.get(scale) {
                params.labels_or_null = labels(scale) as *mut _;
                params.flipped_or_null = flipped(scale).unwrap_or(0) as *mut _;
                params.flip_rate = args.flips.as_ref().map_or(0.0, |flips| flips.rates[scale]);
                params.first_label = next.first as i64;
                if let (Some(inputs), true) = (&args.next, scale > 0) {
                    let at = (next.first - plan.scales[0].tokens) * width;
                    params.next_or_null = of_out(inputs, at as usize) as *mut _;
                }
                then(params, plan, scale);
            }
            launch(params, stream)
        };
        pass(&mut params, 0)?;
        for s in 0..plan.scales.len() {
            take(&mut params, plan, s, 1);
            params.tokens_or_null = flipped(s).unwrap_or(labels(s)) as *const _;
            params.f_hat_or_null = if s == 0 { 0 } else { map } as *const _;
            params.f_hat_out_or_null = map as *mut _;
            pass(&mut params, s + 1)?;
        }
        Ok(())
    }
}
#[cfg(nxs_kernels)]
pub(super) use launches::{encode, encode_bits, run};

#[cfg(not(nxs_kernels))]
pub(super) fn run<T: Token, O: Float>(
    plan: &Plan,
    _stream: &Stream<'_>,
    call: Call<'_, '_, '_, '_, T, O>,
) -> Result<()> {
    let _ = (plan.takes_rows(0), plan.search_cut(1), plan.programmatic, call.repeat, call.flags);
    Err(Error::NotCompiled)
}

#[cfg(not(nxs_kernels))]
pub(super) fn encode<C: Code + Token>(_: &Plan, _: &Stream<'_>, _: &EncodeArgs<'_, C>) -> Result<()> {
    Err(Error::NotCompiled)
}

#[cfg(not(nxs_kernels))]
pub(super) fn encode_bits<O: Float>(_: &Plan, _: &Stream<'_>, _: EncodeBitsArgs<'_, O>) -> Result<()> {
    Err(Error::NotCompiled)
}
