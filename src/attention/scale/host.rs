//! The formula on the host, in f64: the oracle of the tests.

use super::plan::Plan;
use super::{KeysAndValues, Rest};
use crate::dtype::{F8E4M3, Float};
use crate::error::{Error, Result};
use crate::packed::Format;

const MOST_DIM: usize = 128;

const HERE: &str = "operands are on the stream's device";

/// A row of k (0) or v (1), unpacked to `T` where it is packed.
fn load<T: Float>(plan: &Plan, kv: &KeysAndValues<'_, T>, which: usize, at: [u64; 3], row: &mut [f64]) {
    let from = [&plan.k, &plan.v][which].offset([at[0], at[1], at[2], 0]) as usize;
    let (codes, numbers) = match kv {
        KeysAndValues::Plain { k, v } => {
            let elements = &[k, v][which].as_host().expect(HERE)[from..];
            return row.iter_mut().zip(elements).for_each(|(x, element)| *x = f64::from(element.to_f32()));
        }
        KeysAndValues::Packed { k, k_numbers, v, v_numbers } => ([k, v][which], [k_numbers, v_numbers][which]),
    };
    let (format, inline) = plan.packed.expect("a plan of packed keys");
    let slot = &codes.as_host().expect(HERE)[from..];
    let inline_at = format.code_bytes(row.len()).next_multiple_of(16);
    let number = |i: usize| match numbers {
        Some(numbers) if !inline => {
            numbers.as_host().expect(HERE)[plan.numbers[which].offset([at[0], at[1], at[2], i as u64]) as usize]
        }
        _ => {
            let first = inline_at + 4 * i;
            f32::from_le_bytes(slot[first..first + 4].try_into().expect("four bytes"))
        }
    };
    for (k, x) in row.iter_mut().enumerate() {
        let value = match format {
            Format::Fp8 => F8E4M3(slot[k]).to_f32() * number(0),
            _ => f32::from(slot[k / 2] >> (k % 2 * 4) & 15).mul_add(number(0), number(1)),
        };
        *x = f64::from(T::from_f32(value).to_f32());
    }
}

pub(super) fn run<T: Float>(plan: &Plan, kv: &KeysAndValues<'_, T>, args: &mut Rest<'_, T>) -> Result<()> {
    let [batch, rows, heads, dim] = plan.out.shape();
    let [_, kv_rows, kv_heads, _] = plan.k.shape();
    let q_rows = plan.q.shape()[1];
    if plan.out_len == 0 {
        return Ok(());
    }
    let q = args.q.as_host().expect(HERE);
    let lengths = args.lengths.as_ref().map(|view| view.as_host().expect(HERE));
    let row_index = args.row_index.as_ref().filter(|_| plan.gathers).map(|view| view.as_host().expect(HERE));
    let kv_offset = args.kv_offset.as_ref().filter(|_| plan.packed_keys).map(|view| view.as_host().expect(HERE));

    // All that could be refused is looked at before anything is written.
    let source = |b, row| -> Result<u64> {
        let Some(index) = row_index else { return Ok(row) };
        let at = plan.row_index.offset([b, row]);
        let got = index[at as usize];
        match u64::try_from(got) {
            Ok(got) if got < q_rows => Ok(got),
            _ => Err(Error::CodeOutOfRange { arg: "row_index", at, code: got.into(), entries: q_rows }),
        }
    };
    let first_key = |b: u64| kv_offset.map_or(0, |offsets| i64::from(offsets[b as usize]));
    let length = |index: u32, b, g| -> i64 {
        let lengths = lengths.expect("the operands were checked");
        i64::from(lengths[plan.lengths.offset([index.into(), b, g]) as usize])
    };
    for b in 0..batch {
        for row in 0..rows {
            source(b, row)?;
        }
        for (s, segment) in plan.visibility.keys().iter().enumerate() {
            let keys = plan.visibility.key_range(s);
            for g in 0..kv_heads {
                let most = i64::from(keys.end - keys.start);
                let exist = segment.length().map_or(most, |index| length(index, b, g));
                if !(0..=most).contains(&exist) {
                    let at = plan.lengths.offset([segment.length().unwrap_or(0).into(), b, g]);
                    return Err(Error::CodeOutOfRange { arg: "lengths", at, code: exist, entries: most as u64 });
                }
                let first = first_key(b);
                if first < 0 || (exist > 0 && first + i64::from(keys.start) + exist > kv_rows as i64) {
                    return Err(Error::CodeOutOfRange { arg: "kv_offset", at: b, code: first, entries: kv_rows });
                }
            }
        }
    }

    let out = args.out.as_host().expect(HERE);
    let mut lse = args.lse.as_mut().map(|view| view.as_host().expect(HERE));
    for b in 0..batch {
        let key_batch = if plan.packed_keys { 0 } else { b };
        for h in 0..heads {
            let g = h / (heads / kv_heads);
            for row in 0..rows {
                let q_at = plan.q.offset([b, source(b, row)?, h, 0]) as usize;
                let query = &q[q_at..q_at + dim as usize];
                // Online: the sum and the maximum so far.
                let (mut most, mut total, mut sums) = (f64::NEG_INFINITY, 0f64, [0f64; MOST_DIM]);
                plan.visibility.for_each_range(row as u32, |range| {
                    let mut segment = 0;
                    for key in range {
                        while plan.visibility.key_range(segment).end <= key {
                            segment += 1;
                        }
                        let exist =
                            plan.visibility.keys()[segment].length().map_or(i64::MAX, |index| length(index, b, g));
                        if i64::from(key - plan.visibility.key_range(segment).start) >= exist {
                            continue;
                        }
                        let at = (first_key(b) + i64::from(key)) as u64;
                        let mut loaded = [0f64; MOST_DIM];
                        let loaded = &mut loaded[..dim as usize];
                        load(plan, kv, 0, [key_batch, at, g], loaded);
                        let dot = query.iter().zip(&*loaded).map(|(q, k)| f64::from(q.to_f32()) * k);
                        let logit = dot.sum::<f64>() * f64::from(plan.scale);
                        if logit == f64::NEG_INFINITY {
                            continue;
                        }
                        let larger = most.max(logit);
                        let (keep, weight) = ((most - larger).exp(), (logit - larger).exp());
                        most = if logit.is_nan() { logit } else { larger };
                        total = total * keep + weight;
                        load(plan, kv, 1, [key_batch, at, g], loaded);
                        for (sum, value) in sums[..dim as usize].iter_mut().zip(loaded) {
                            *sum = *sum * keep + weight * *value;
                        }
                    }
                });
                let seen = most != f64::NEG_INFINITY;
                let to = plan.out.offset([b, row, h, 0]) as usize;
                for (out, sum) in out[to..to + dim as usize].iter_mut().zip(sums) {
                    *out = T::from_f32(if seen { (sum / total) as f32 } else { 0.0 });
                }
                if let Some(lse) = &mut lse {
                    lse[plan.lse.offset([b, h, row]) as usize] =
                        if seen { (most + total.ln()) as f32 } else { f32::NEG_INFINITY };
                }
            }
        }
    }
    Ok(())
}
