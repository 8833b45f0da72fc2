//! The definitions, on the host.

use super::TypicalVerifierArgs;
use super::plan::Plan;
use crate::dtype::{Element, Float};
use crate::verification::host_rows::said_of;
use crate::verification::log2::log2;
use crate::verification::moments::{Moments, RowMoments, power_of_minus};
use crate::verification::rows::{Domain, Partial, Scale, Shape, Summary, chunks, column, uniforms};
use crate::verification::{Accepted, Emitted, status};
use crate::view::In;

const HERE: &str = "operands are on the stream's device";

fn slice<'a, T: Element>(view: &'a Option<In<'_, T>>) -> Option<&'a [T]> {
    view.as_ref().map(|view| view.as_host().expect(HERE))
}

/// What is known of a node's row.
struct Node<'a> {
    summary: Summary,
    moments: &'a [Moments],
    /// Of weights.
    threshold: f32,
    said: u32,
}

struct Inputs<'a, T> {
    plan: &'a Plan,
    target: &'a [T],
    row_index: Option<&'a [i32]>,
    paths: Option<&'a [i32]>,
    drafts: &'a [i32],
}

impl<T: Float> Inputs<'_, T> {
    fn row(&self, logical: usize) -> Option<usize> {
        let row = self.row_index.map_or(logical as i64, |index| i64::from(index[logical]));
        (0..self.plan.target_rows as i64).contains(&row).then_some(row as usize)
    }

    fn logit(&self, row: Option<usize>, column: u64) -> f32 {
        match row {
            Some(row) if column < self.plan.vocab => {
                self.target[row * self.plan.target_stride as usize + column as usize].to_f32()
            }
            _ => f32::NEG_INFINITY,
        }
    }

    fn node<'a>(&self, logical: usize, scale: Option<&Scale>, moments: &'a mut [Moments]) -> Node<'a> {
        let row = self.row(logical);
        for (chunk, of) in moments.iter_mut().enumerate() {
            *of = Moments::of(|lane, place| self.logit(row, column(chunk as u64, lane, place)), scale);
        }
        let of = RowMoments::of(moments, scale);
        let mut said = said_of(&of.summary);
        if row.is_none() {
            said |= status::ROW_OUT_OF_RANGE;
        }
        let (epsilon, alpha) = (f32::from_bits(self.plan.epsilon), f32::from_bits(self.plan.alpha));
        let (typical, sum) = match of.summary.shape {
            Shape::Spread { sum, .. } => (alpha * power_of_minus(of.entropy_bits()), sum),
            _ => (alpha, 1.0),
        };
        let threshold = if typical < epsilon { typical } else { epsilon } * sum;
        Node { summary: of.summary, moments, threshold, said }
    }

    fn peak(&self, node: &Node<'_>, row: Option<usize>) -> Option<u64> {
        let chunk = node.moments.iter().position(|of| of.max == node.summary.top)? as u64;
        (chunk * 1024..(chunk + 1) * 1024).find(|&column| self.logit(row, column) == node.summary.top)
    }

    fn at(&self, path: usize, j: usize) -> Option<usize> {
        let node = match self.paths {
            Some(paths) => i64::from(paths[path * self.plan.depth as usize + j]),
            None => j as i64,
        };
        (0..self.plan.nodes as i64).contains(&node).then_some(node as usize)
    }

    /// How many drafts of a path are accepted, and the sum of their log2 p.
    fn walk(&self, b: usize, path: usize, scale: Option<&Scale>, scratch: &mut [Moments]) -> (usize, f32) {
        let (mut accepted, mut log_sum) = (0, 0f32);
        if self.at(path, 0) != Some(0) {
            return (0, 0.0);
        }
        let nodes = self.plan.nodes as usize;
        for j in 1..self.plan.depth as usize {
            let (Some(from), Some(to)) = (self.at(path, j - 1), self.at(path, j)) else { break };
            let token = i64::from(self.drafts[b * nodes + to]);
            if !(0..self.plan.vocab as i64).contains(&token) {
                break;
            }
            let token = token as u64;
            let row = self.row(b * nodes + from);
            let node = self.node(b * nodes + from, scale, scratch);
            let logit = self.logit(row, token);
            let (weight, log) = match node.summary.shape {
                Shape::Empty => (0.0, 0.0),
                Shape::Peak => (f32::from(self.peak(&node, row) == Some(token)), 0.0),
                Shape::Spread { scale, reference, sum, .. } => {
                    (node.summary.weight(logit), logit.mul_add(scale.per_logit, -reference) - log2(sum))
                }
            };
            // Neither is NaN.
            if weight <= node.threshold {
                break;
            }
            log_sum += log;
            accepted += 1;
        }
        (accepted, log_sum)
    }
}

pub(super) fn run<T: Float>(plan: &Plan, args: &mut TypicalVerifierArgs<'_, T>) {
    let inputs = Inputs {
        plan,
        target: args.target.as_host().expect(HERE),
        row_index: slice(&args.row_index),
        paths: slice(&args.paths),
        drafts: args.drafts.as_host().expect(HERE),
    };
    let (temperature, given) = (slice(&args.temperature), slice(&args.uniforms));
    let (seeds, positions) = (slice(&args.seeds), slice(&args.positions));
    let tokens = args.out.tokens.as_host().expect(HERE);
    let emitted = args.out.emitted.as_host().expect(HERE);
    let accepted = args.out.accepted.as_host().expect(HERE);
    let statuses = args.out.status.as_host().expect(HERE);
    let mut nodes_out = args.out.nodes.as_mut().map(|view| view.as_host().expect(HERE));
    let mut path_out = args.out.path.as_mut().map(|view| view.as_host().expect(HERE));
    let mut last_row = args.out.last_row.as_mut().map(|view| view.as_host().expect(HERE));
    let workspace = args.workspace.as_host().expect(HERE);
    let of_row = chunks(plan.vocab) as usize * 16;
    let scratch: &mut [Moments] = match plan.rows() {
        0 => &mut [],
        _ => bytemuck::cast_slice_mut(&mut workspace[..of_row]),
    };
    let (nodes, depth) = (plan.nodes as usize, plan.depth as usize);
    for b in 0..plan.batch as usize {
        let scale = Scale::of(temperature.map_or(1.0, |of| of[b]));
        let mut said = 0;
        for n in 0..nodes {
            said |= inputs.node(b * nodes + n, scale.as_ref(), scratch).said;
        }
        let (mut length, mut log_sum, mut best) = (0, 0f32, None);
        for path in 0..plan.paths as usize {
            let (n, sum) = inputs.walk(b, path, scale.as_ref(), scratch);
            if best.is_none() || n > length || (n == length && sum > log_sum) {
                (length, log_sum, best) = (n, sum, Some(path));
            }
        }
        let best = best.expect("there is a path");
        let last = if length == 0 { 0 } else { inputs.at(best, length).expect("it was walked") };
        let row = inputs.row(b * nodes + last);
        let node = inputs.node(b * nodes + last, scale.as_ref(), scratch);
        let token = match node.summary.shape {
            Shape::Empty => None,
            Shape::Peak => inputs.peak(&node, row),
            Shape::Spread { .. } => {
                let [x, y, z] = match given {
                    Some(given) => given[b * 3..][..3].try_into().expect("three"),
                    None => {
                        let word = |of: Option<&[i64]>| of.map_or(0, |of| of[b] as u64);
                        let position = word(positions).wrapping_add(length as u64);
                        let [x, y, z, _] = uniforms(word(seeds), position, Domain::Sample, 0, 0);
                        [x, y, z]
                    }
                };
                let partial = |chunk: usize| Partial { max: node.moments[chunk].max, sum: node.moments[chunk].sum };
                let logit = |column| inputs.logit(row, column);
                node.summary.sample_from(node.moments.len(), partial, [x, y, z], plan.vocab, logit)
            }
        };
        for j in 0..depth {
            let accepted = |j: usize| inputs.at(best, j).expect("it was walked");
            tokens[b * depth + j] = match j {
                _ if j < length => inputs.drafts[b * nodes + accepted(j + 1)],
                _ if j == length => token.map_or(plan.fallback, |token| token as i32),
                _ => -1,
            };
            if let Some(out) = &mut nodes_out {
                out[b * depth + j] = match j {
                    0 => 0,
                    _ if j <= length => accepted(j) as i32,
                    _ => -1,
                };
            }
        }
        emitted[b] = Emitted(length as i32 + 1);
        accepted[b] = Accepted(length as i32);
        statuses[b] = said;
        if let Some(out) = &mut path_out {
            out[b] = best as i32;
        }
        if let Some(out) = &mut last_row {
            out[b] = (b * nodes + last) as i32;
        }
    }
}
