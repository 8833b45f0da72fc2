//! The formula on the host: the oracle of the tests.

use super::plan::{CheckedNorm, K, Plan, Q, Tensor, V};
use super::{AppendAt, Positions, PrepareArgs};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::view::In;

const HERE: &str = "operands are on the stream's device";
const MOST_DIM: usize = 256;

/// Rows and positions, with the arrays they come from.
struct Places<'a> {
    plan: &'a Plan,
    append_at: Result<&'a [i32], i64>,
    positions: PositionsOf<'a>,
}

enum PositionsOf<'a> {
    From(i64),
    Appended,
    Array(&'a [i32]),
}

impl Places<'_> {
    fn append(&self, b: u64) -> i64 {
        self.append_at.map_or_else(|row| row, |rows| rows[b as usize].into())
    }

    /// The position, and the argument and element that it comes from.
    fn position(&self, b: u64, i: u64) -> (i64, &'static str, u64) {
        match self.positions {
            PositionsOf::From(first) => (first + i as i64, "positions", 0),
            PositionsOf::Appended => (self.append(b) + i as i64, "append_at", b),
            PositionsOf::Array(array) => {
                let at = self.plan.positions.offset([b, i]);
                (array[at as usize].into(), "positions", at)
            }
        }
    }

    /// All are in range.
    fn check(&self) -> Result<()> {
        let check = |row: i64, rows: u64, arg, at| match u64::try_from(row) {
            Ok(inside) if inside < rows => Ok(()),
            _ => Err(Error::RowOutOfRange { arg, at, row, rows }),
        };
        for b in 0..self.plan.batch {
            for i in 0..self.plan.rows {
                for tensor in self.plan.tensors[K..].iter().filter(|tensor| tensor.heads > 0) {
                    check(self.append(b) + i as i64, tensor.out.shape()[1], "append_at", b)?;
                }
                if let Some(rope) = &self.plan.rope {
                    let (position, arg, at) = self.position(b, i);
                    check(position, rope.table_rows, arg, at)?;
                }
            }
        }
        Ok(())
    }
}

/// What one tensor goes through.
struct Step<'a> {
    tensor: &'a Tensor,
    norm: CheckedNorm,
    weight: Option<&'a [f32]>,
    multiplier: Option<&'a [f32]>,
    /// Cosines and sines.
    table: Option<[&'a [f32]; 2]>,
    append: bool,
}

impl Step<'_> {
    fn run<I: Float, O: Float>(&self, places: &Places<'_>, from: &[I], to: &mut [O]) {
        let [batch, rows, heads, dim] = self.tensor.input.shape();
        let mut x = [0f32; MOST_DIM];
        let x = &mut x[..dim as usize];
        for b in 0..batch {
            for i in 0..rows {
                let row = if self.append { (places.append(b) + i as i64) as u64 } else { i };
                for h in 0..heads {
                    let start = self.tensor.input.offset([b, i, h, 0]) as usize;
                    for (x, value) in x.iter_mut().zip(&from[start..]) {
                        *x = value.to_f32();
                    }
                    self.normalise(h, x);
                    if let (Some(table), Some(rope)) = (self.table, &places.plan.rope) {
                        let (position, ..) = places.position(b, i);
                        let at = rope.table.offset([position as u64, 0]) as usize;
                        for pair in 0..rope.rotary_dim / 2 {
                            let (elements, columns) = rope.pair(pair);
                            let [cos, sin] = table.map(|table| columns.map(|column| table[at + column as usize]));
                            let [a, b] = elements.map(|element| x[element as usize]);
                            x[elements[0] as usize] = a.mul_add(cos[0], -(b * sin[0]));
                            x[elements[1] as usize] = b.mul_add(cos[1], a * sin[1]);
                        }
                    }
                    let start = self.tensor.out.offset([b, row, h, 0]) as usize;
                    for (to, x) in to[start..].iter_mut().zip(&*x) {
                        *to = O::from_f32(*x);
                    }
                }
            }
        }
    }

    fn normalise(&self, head: u64, x: &mut [f32]) {
        let squares: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let scale = match self.norm {
            CheckedNorm::None => 1.0,
            CheckedNorm::L2 { eps } => 1.0 / squares.sqrt().max(f32::from_bits(eps).into()),
            CheckedNorm::Rms { eps } => 1.0 / (squares / x.len() as f64 + f64::from(f32::from_bits(eps))).sqrt(),
        } as f32;
        let scale = scale * self.multiplier.map_or(1.0, |multiplier| multiplier[head as usize]);
        for (d, x) in x.iter_mut().enumerate() {
            *x *= scale;
            if let Some(weight) = self.weight {
                *x *= weight[d];
            }
        }
    }
}

fn slice<'v, T: crate::dtype::Element>(view: &'v Option<In<'_, T>>) -> Option<&'v [T]> {
    view.as_ref().map(|view| view.as_host().expect(HERE))
}

pub(super) fn run<I: Float, O: Float, C: Float>(plan: &Plan, args: &mut PrepareArgs<'_, I, O, C>) -> Result<()> {
    let places = Places {
        plan,
        append_at: match &args.append_at {
            AppendAt::Row(row) => Err(*row as i64),
            AppendAt::Rows(rows) => Ok(rows.as_host().expect(HERE)),
        },
        positions: match &args.positions {
            Positions::From(first) => PositionsOf::From(*first as i64),
            Positions::Appended => PositionsOf::Appended,
            Positions::Of(array) => PositionsOf::Array(array.as_host().expect(HERE)),
        },
    };
    places.check()?;
    let table = slice(&args.cos).zip(slice(&args.sin)).map(|(cos, sin)| [cos, sin]);
    let step = |at: usize| Step {
        tensor: &plan.tensors[at],
        norm: plan.norm,
        weight: None,
        multiplier: None,
        table,
        append: true,
    };
    if let (Some(from), Some(to)) = (slice(&args.q), &mut args.q_out) {
        let (weight, multiplier) = (slice(&args.q_weight), slice(&args.q_multiplier));
        Step { weight, multiplier, append: false, ..step(Q) }.run(&places, from, to.as_host().expect(HERE));
    }
    if let (Some(from), Some(to)) = (slice(&args.k), &mut args.k_cache) {
        Step { weight: slice(&args.k_weight), ..step(K) }.run(&places, from, to.as_host().expect(HERE));
    }
    if let (Some(from), Some(to)) = (slice(&args.v), &mut args.v_cache) {
        Step { norm: CheckedNorm::None, table: None, ..step(V) }.run(&places, from, to.as_host().expect(HERE));
    }
    Ok(())
}
