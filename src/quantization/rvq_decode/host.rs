//! The formula on the host: the oracle of the tests.

use super::RvqDecodeArgs;
use super::plan::Plan;
use crate::dtype::{Code, Float};
use crate::error::{Error, Result};

pub(super) fn run<C: Code, E: Float, O: Float>(plan: &Plan, args: &mut RvqDecodeArgs<'_, C, E, O>) -> Result<()> {
    const HERE: &str = "operands are on the stream's device";
    let codes = args.codes.as_host().expect(HERE);
    let codebooks = args.codebooks.as_host().expect(HERE);
    let out = args.out.as_host().expect(HERE);
    let [batch, levels, rows] = plan.codes.shape();
    if plan.out_len == 0 {
        return Ok(());
    }

    // `None` for the null code. All codes are looked at before anything is written.
    let entry = |b, level, row| -> Result<Option<u64>> {
        let at = plan.codes.offset([b, level, row]);
        let code = codes[at as usize].to_i64();
        if plan.null_code == Some(code) {
            return Ok(None);
        }
        match u64::try_from(code) {
            Ok(entry) if entry < plan.entries => Ok(Some(entry)),
            _ => Err(Error::CodeOutOfRange { arg: "codes", at, code, entries: plan.entries }),
        }
    };
    for b in 0..batch {
        for row in 0..rows {
            for level in 0..levels {
                entry(b, level, row)?;
            }
        }
    }

    // A stretch of a row at a time, so that the sums need no allocation.
    const STRETCH: usize = 64;
    let dim = plan.dim() as usize;
    for b in 0..batch {
        for row in 0..rows {
            for start in (0..dim).step_by(STRETCH) {
                let len = STRETCH.min(dim - start);
                let mut sum = [0f32; STRETCH];
                for level in 0..levels {
                    if let Some(entry) = entry(b, level, row)? {
                        let from = plan.codebooks.offset([level, entry, start as u64]) as usize;
                        for (sum, value) in sum.iter_mut().zip(&codebooks[from..from + len]) {
                            *sum += value.to_f32();
                        }
                    }
                }
                let to = plan.out.offset([b, row, start as u64]) as usize;
                for (out, sum) in out[to..to + len].iter_mut().zip(sum) {
                    *out = O::from_f32(sum);
                }
            }
        }
    }
    Ok(())
}
