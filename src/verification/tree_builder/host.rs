//! Trees on the host, written from the definitions.

use super::TreeBuilderArgs;
use super::plan::{MOST_CANDIDATES, MOST_NODES, Plan};
use crate::verification::status;

const HERE: &str = "operands are on the stream's device";
const NONE: i32 = -1;

/// The depth of a candidate that is a node; what is wrong if it is none.
fn depth_of(parents: &[i32], candidate: usize, max_depth: u64) -> Result<i32, u32> {
    let (mut at, mut depth) = (candidate, 0);
    while at > 0 {
        let parent = parents[at];
        if !(0..at as i64).contains(&i64::from(parent)) {
            // Only its own link is held against a candidate.
            return Err(if at == candidate && parent != NONE { status::TREE_BAD } else { 0 });
        }
        at = parent as usize;
        depth += 1;
        if depth as u64 > max_depth {
            return Err(status::DRAFTS_IGNORED);
        }
    }
    Ok(depth)
}

/// The nodes of a request. What is no node has the depth -1.
struct Nodes {
    selected: [i32; MOST_NODES as usize],
    parents: [i32; MOST_NODES as usize],
    depths: [i32; MOST_NODES as usize],
    first_child: [i32; MOST_NODES as usize],
    next_sibling: [i32; MOST_NODES as usize],
    count: usize,
}

impl Nodes {
    fn of(plan: &Plan, parents: &[i32], scores: Option<&[f32]>, said: &mut u32) -> Self {
        let all = || [NONE; MOST_NODES as usize];
        let mut nodes =
            Nodes { selected: all(), parents: all(), depths: all(), first_child: all(), next_sibling: all(), count: 0 };
        if !parents.is_empty() && parents[0] != NONE {
            *said |= status::TREE_BAD;
        }
        let mut depths = [NONE; MOST_CANDIDATES as usize];
        for (candidate, to) in depths[..parents.len()].iter_mut().enumerate() {
            match depth_of(parents, candidate, plan.max_depth) {
                Ok(depth) => *to = depth,
                Err(wrong) => *said |= wrong,
            }
        }
        // The number of each candidate as a node.
        let mut number = [NONE; MOST_CANDIDATES as usize];
        let candidates = 0..parents.len();
        match scores {
            None => {
                nodes.count = parents.len();
                candidates.filter(|&i| depths[i] >= 0).for_each(|i| number[i] = i as i32);
            }
            Some(scores) => {
                let mut value = [0f32; MOST_CANDIDATES as usize];
                let mut least = [f32::INFINITY; MOST_CANDIDATES as usize];
                for i in candidates.clone().skip(1).filter(|&i| depths[i] >= 0) {
                    let parent = parents[i] as usize;
                    let own = if plan.sums { scores[i] } else { value[parent] + scores[i] };
                    value[i] = if own.is_nan() { f32::NEG_INFINITY } else { own };
                    least[i] = if value[i] < least[parent] { value[i] } else { least[parent] };
                }
                for i in candidates.clone().filter(|&i| depths[i] >= 0) {
                    let before = |k: usize| least[k] > least[i] || (least[k] == least[i] && k < i);
                    let rank = candidates.clone().filter(|&k| depths[k] >= 0 && before(k)).count();
                    if (rank as u64) < plan.nodes {
                        number[i] = nodes.count as i32;
                        nodes.count += 1;
                    }
                }
            }
        }
        for i in (0..parents.len()).filter(|&i| number[i] >= 0) {
            let node = number[i] as usize;
            nodes.selected[node] = i as i32;
            nodes.depths[node] = depths[i];
            nodes.parents[node] = if i == 0 { NONE } else { number[parents[i] as usize] };
        }
        for node in (1..plan.nodes as usize).rev().filter(|&node| nodes.depths[node] >= 0) {
            let parent = nodes.parents[node] as usize;
            nodes.next_sibling[node] = nodes.first_child[parent];
            nodes.first_child[parent] = node as i32;
        }
        nodes
    }

    /// The next node in the order of trial, children before siblings.
    fn after(&self, node: usize) -> Option<usize> {
        if self.first_child[node] >= 0 {
            return Some(self.first_child[node] as usize);
        }
        let mut at = node as i32;
        while at >= 0 {
            if self.next_sibling[at as usize] >= 0 {
                return Some(self.next_sibling[at as usize] as usize);
            }
            at = self.parents[at as usize];
        }
        None
    }
}

pub(super) fn run(plan: &Plan, args: &mut TreeBuilderArgs<'_>) {
    let parents = args.parents.as_host().expect(HERE);
    let cu_rows = args.cu_rows.as_ref().map(|view| view.as_host().expect(HERE));
    let drafts = args.drafts.as_ref().map(|view| view.as_host().expect(HERE));
    let scores = args.scores.as_ref().map(|view| view.as_host().expect(HERE));
    let positions = args.positions.as_ref().map(|view| view.as_host().expect(HERE));
    let out = &mut args.out;
    let statuses = out.status.as_host().expect(HERE);
    let mut counts = out.counts.as_mut().map(|view| view.as_host().expect(HERE));
    let mut leaf_counts = out.leaf_counts.as_mut().map(|view| view.as_host().expect(HERE));
    let mut to_selected = out.selected.as_mut().map(|view| view.as_host().expect(HERE));
    let mut to_parents = out.parents.as_mut().map(|view| view.as_host().expect(HERE));
    let mut to_drafts = out.drafts.as_mut().map(|view| view.as_host().expect(HERE));
    let mut to_first = out.first_child.as_mut().map(|view| view.as_host().expect(HERE));
    let mut to_next = out.next_sibling.as_mut().map(|view| view.as_host().expect(HERE));
    let mut to_depths = out.depths.as_mut().map(|view| view.as_host().expect(HERE));
    let mut to_positions = out.node_positions.as_mut().map(|view| view.as_host().expect(HERE));
    let mut to_mask = out.mask.as_mut().map(|view| view.as_host().expect(HERE));
    let mut to_paths = out.paths.as_mut().map(|view| view.as_host().expect(HERE));

    for b in 0..plan.batch as usize {
        let most = (plan.batch * plan.candidates) as i64;
        let (first, end) = match cu_rows {
            Some(cu_rows) => (i64::from(cu_rows[b]), i64::from(cu_rows[b + 1])),
            None => (b as i64 * plan.candidates as i64, (b + 1) as i64 * plan.candidates as i64),
        };
        // Rows outside the arrays of rows are not there.
        let first = first.clamp(0, most);
        let rows = (end.min(most) - first).clamp(0, plan.candidates as i64);
        let mut said = if end - first > rows { status::DRAFTS_IGNORED } else { 0 };
        let of_request = first as usize..(first + rows) as usize;
        let of_scores = scores.map(|scores| &scores[of_request.clone()]);
        let tree = Nodes::of(plan, &parents[of_request.clone()], of_scores, &mut said);

        let n = plan.nodes as usize;
        for (to, from) in [
            (&mut to_selected, &tree.selected),
            (&mut to_parents, &tree.parents),
            (&mut to_first, &tree.first_child),
            (&mut to_next, &tree.next_sibling),
            (&mut to_depths, &tree.depths),
        ] {
            if let Some(to) = to {
                to[b * n..][..n].copy_from_slice(&from[..n]);
            }
        }
        if let (Some(to), Some(drafts)) = (&mut to_drafts, drafts) {
            for (to, &from) in to[b * n..][..n].iter_mut().zip(&tree.selected) {
                *to = if from >= 0 { drafts[of_request.start + from as usize] } else { NONE };
            }
        }
        if let Some(to) = &mut to_positions {
            let root = positions.map_or(0, |positions| positions[b]);
            for (to, &depth) in to[b * n..][..n].iter_mut().zip(&tree.depths) {
                *to = root.wrapping_add(i64::from(depth.max(0)));
            }
        }
        if let Some(to) = &mut to_mask {
            let words = n.div_ceil(32);
            let to = &mut to[b * n * words..][..n * words];
            to.fill(0);
            for node in (0..n).filter(|&node| tree.depths[node] >= 0) {
                let mut at = node as i32;
                while at >= 0 {
                    to[node * words + at as usize / 32] |= 1 << (at % 32);
                    at = tree.parents[at as usize];
                }
            }
        }
        let (columns, leaves) = (plan.max_depth as usize + 1, plan.leaves as usize);
        if let Some(to) = &mut to_paths {
            to[b * leaves * columns..][..leaves * columns].fill(NONE);
        }
        let (mut leaf, mut next) = (0, (rows > 0).then_some(0));
        while let Some(node) = next {
            if tree.first_child[node] < 0 {
                if leaf < leaves {
                    if let Some(to) = &mut to_paths {
                        let mut at = node;
                        for place in (0..=tree.depths[node] as usize).rev() {
                            to[(b * leaves + leaf) * columns + place] = at as i32;
                            at = tree.parents[at].max(0) as usize;
                        }
                    }
                    leaf += 1;
                } else {
                    said |= status::DRAFTS_IGNORED;
                }
            }
            next = tree.after(node);
        }
        if let Some(counts) = &mut counts {
            counts[b] = tree.count as i32;
        }
        if let Some(leaf_counts) = &mut leaf_counts {
            leaf_counts[b] = leaf as i32;
        }
        statuses[b] = said;
    }
}
