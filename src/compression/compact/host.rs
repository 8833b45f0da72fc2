//! The compaction on the host, row after row.

use super::plan::{K, MOST_DIM, Plan, V};
use super::{CompactArgs, RopePairs};
use crate::dtype::{DType, Element, Float, bf16, f16};
use crate::error::{Error, Result};
use crate::view::In;

const HERE: &str = "operands are on the stream's device";

fn to_f32<T: Element>(x: T) -> f32 {
    let bytes = bytemuck::bytes_of(&x);
    match T::DTYPE {
        DType::F32 => bytemuck::pod_read_unaligned(bytes),
        DType::F16 => bytemuck::pod_read_unaligned::<f16>(bytes).to_f32(),
        DType::BF16 => bytemuck::pod_read_unaligned::<bf16>(bytes).to_f32(),
        other => unreachable!("{other} is moved, not converted"),
    }
}

fn from_f32<T: Element>(x: f32) -> T {
    match T::DTYPE {
        DType::F32 => bytemuck::pod_read_unaligned(bytemuck::bytes_of(&x)),
        DType::F16 => bytemuck::pod_read_unaligned(bytemuck::bytes_of(&<f16 as Float>::from_f32(x))),
        DType::BF16 => bytemuck::pod_read_unaligned(bytemuck::bytes_of(&<bf16 as Float>::from_f32(x))),
        other => unreachable!("{other} is moved, not converted"),
    }
}

/// Rows and where they lie.
struct Places<'a> {
    plan: &'a Plan,
    indices: &'a [i32],
    counts: Option<&'a [i32]>,
    input_pages: Option<&'a [i32]>,
    out_pages: Option<&'a [i32]>,
}

/// One kept row of a head.
#[derive(Clone, Copy)]
struct Row {
    row: u64,
    source: u64,
    from: u64,
    to: u64,
}

impl Places<'_> {
    fn count(&self, set: u64, head: u64) -> Result<u64> {
        let kept = self.plan.kept;
        let Some(counts) = self.counts else { return Ok(kept) };
        let at = self.plan.counts.offset([set, head]);
        let count = counts[at as usize].into();
        match u64::try_from(count) {
            Ok(inside) if inside <= kept => Ok(inside),
            _ => Err(Error::RowOutOfRange { arg: "counts", at, row: count, rows: kept }),
        }
    }

    fn place(
        &self,
        arg: &'static str,
        pages: Option<&[i32]>,
        logical: u64,
        rows: u64,
        set: u64,
        row: u64,
    ) -> Result<u64> {
        let Some(pages) = pages else { return Ok(row) };
        let page_rows = self.plan.page_rows;
        let at = set * logical.div_ceil(page_rows) + row / page_rows;
        let page = i64::from(pages[at as usize]);
        let place = page * page_rows as i64 + (row % page_rows) as i64;
        match u64::try_from(place) {
            Ok(inside) if inside < rows => Ok(inside),
            _ => Err(Error::RowOutOfRange { arg, at, row: page, rows: rows / page_rows }),
        }
    }

    fn row(&self, set: u64, head: u64, row: u64) -> Result<Row> {
        let plan = self.plan;
        let at = plan.indices.offset([set, head, row]);
        let index = i64::from(self.indices[at as usize]);
        let least = if plan.in_place { row as i64 } else { 0 };
        if index < least || index >= plan.tokens as i64 {
            return Err(Error::RowOutOfRange { arg: "indices", at, row: index, rows: plan.tokens });
        }
        let source = index as u64;
        let from = self.place("input_pages", self.input_pages, plan.tokens, plan.input_rows, set, source)?;
        let to = match plan.in_place && !plan.paged[1] {
            true => self.place("input_pages", self.input_pages, plan.tokens, plan.out_rows, set, row)?,
            false => self.place("out_pages", self.out_pages, plan.kept, plan.out_rows, set, row)?,
        };
        Ok(Row { row, source, from, to })
    }

    /// Calls `work` for every kept row, in ascending order within a head.
    fn each(&self, mut work: impl FnMut(u64, u64, Row) -> Result<()>) -> Result<()> {
        for set in 0..self.plan.sets {
            for head in 0..self.plan.heads {
                for row in 0..self.count(set, head)? {
                    work(set, head, self.row(set, head, row)?)?;
                }
            }
        }
        Ok(())
    }
}

/// The angles of a turn, and whether it goes backwards.
struct Turned<'a> {
    plan: &'a Plan,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Turned<'_> {
    fn check(&self, row: Row, old: i64) -> Result<()> {
        let distance = self.distance(row, old).abs();
        let rows = self.plan.table.shape()[0];
        match (distance as u64) < rows {
            true => Ok(()),
            false => Err(Error::RowOutOfRange { arg: "positions", at: row.source, row: distance, rows }),
        }
    }

    fn distance(&self, row: Row, old: i64) -> i64 {
        self.plan.renumber.unwrap_or(0) + row.row as i64 - old
    }

    fn run(&self, row: Row, old: i64, x: &mut [f32]) {
        let turn = self.distance(row, old);
        let at = self.plan.table.offset([turn.unsigned_abs(), 0]) as usize;
        let half = self.plan.rotary_dim as usize / 2;
        for pair in 0..half {
            let [i, j] = match self.plan.pairs {
                RopePairs::Interleaved => [2 * pair, 2 * pair + 1],
                RopePairs::Half => [pair, half + pair],
            };
            let cos = self.cos[at + pair];
            let sin = if turn < 0 { -self.sin[at + pair] } else { self.sin[at + pair] };
            let [a, b] = [x[i], x[j]];
            x[i] = a.mul_add(cos, -(b * sin));
            x[j] = b.mul_add(cos, a * sin);
        }
    }
}

fn slice<'v, T: Element>(view: &'v Option<In<'_, T>>) -> Option<&'v [T]> {
    view.as_ref().map(|view| view.as_host().expect(HERE))
}

pub(super) fn run<I: Element, O: Element>(plan: &Plan, args: &mut CompactArgs<'_, I, O>) -> Result<()> {
    let places = Places {
        plan,
        indices: args.indices.as_host().expect(HERE),
        counts: slice(&args.counts),
        input_pages: slice(&args.input_pages),
        out_pages: slice(&args.out_pages),
    };
    let turned = slice(&args.cos).zip(slice(&args.sin)).filter(|_| plan.rotary_dim > 0);
    let turned = turned.map(|(cos, sin)| Turned { plan, cos, sin });
    let positions = slice(&args.positions);
    let mut positions_out = args.positions_out.as_mut().map(|view| view.as_host().expect(HERE));
    let old = |own: Option<&[i32]>, set: u64, head: u64, row: Row| match own {
        Some(positions) => positions[plan.values.offset([set, head, row.from]) as usize].into(),
        None => row.source as i64,
    };
    // In place the positions are in the output.
    let own = |out: &Option<&mut [i32]>, set, head, row| match plan.in_place {
        true => old(out.as_deref(), set, head, row),
        false => old(positions, set, head, row),
    };
    // Nothing is written unless everything can be.
    places.each(|set, head, row| match &turned {
        Some(turned) => turned.check(row, own(&positions_out, set, head, row)),
        None => Ok(()),
    })?;

    for at in [K, V] {
        let tensor = &plan.tensors[at];
        if tensor.dim == 0 {
            continue;
        }
        let input = slice(if at == K { &args.k } else { &args.v });
        let out = if at == K { &mut args.k_out } else { &mut args.v_out };
        let out = out.as_mut().expect("the plan has it").as_host().expect(HERE);
        let turned = turned.as_ref().filter(|_| at == K);
        let dim = tensor.dim as usize;
        places.each(|set, head, row| {
            let from = tensor.input.offset([set, row.from, head, 0]) as usize;
            let to = tensor.out.offset([set, row.to, head, 0]) as usize;
            if plan.copies {
                match input {
                    Some(input) => {
                        let source: &[O] = bytemuck::cast_slice(&input[from..from + dim]);
                        out[to..to + dim].copy_from_slice(source);
                    }
                    None => out.copy_within(from..from + dim, to),
                }
                return Ok(());
            }
            let mut x = [0f32; MOST_DIM as usize];
            let x = &mut x[..dim];
            match input {
                Some(input) => x.iter_mut().zip(&input[from..]).for_each(|(x, &value)| *x = to_f32(value)),
                None => x.iter_mut().zip(&out[from..]).for_each(|(x, &value)| *x = to_f32(value)),
            }
            if let Some(turned) = turned {
                turned.run(row, own(&positions_out, set, head, row), x);
            }
            out[to..].iter_mut().zip(&*x).for_each(|(to, &x)| *to = from_f32(x));
            Ok(())
        })?;
    }

    for (input, out) in args.extras.iter().zip(&mut args.extras_out) {
        let Some(out) = out else { continue };
        let (input, out) = (slice(input), out.as_host().expect(HERE));
        places.each(|set, head, row| {
            let from = plan.values.offset([set, head, row.from]) as usize;
            let value = input.map_or_else(|| out[from], |input| input[from]);
            out[plan.values_out.offset([set, head, row.to]) as usize] = value;
            Ok(())
        })?;
    }
    if positions_out.is_some() {
        places.each(|set, head, row| {
            let position = match plan.renumber {
                Some(first) => first + row.row as i64,
                None => own(&positions_out, set, head, row),
            };
            if let Some(out) = &mut positions_out {
                out[plan.values_out.offset([set, head, row.to]) as usize] = position as i32;
            }
            Ok(())
        })?;
    }
    Ok(())
}
