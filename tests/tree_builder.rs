//! Trees from parents and scores: every output against an oracle, and the kernel against the host.

#![cfg(feature = "verification")]

mod support;

use nextscale::verification::{Tree, TreeBuilder, TreeBuilderArgs, TreeBuilderBuilder, TreeBuilderOut, status};
use nextscale::{DeviceInfo, Error};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, TestDevice};

/// Trees to be made, as plain data.
#[derive(Debug, Clone)]
struct Problem {
    batch: usize,
    nodes: usize,
    candidates: usize,
    leaves: usize,
    max_depth: usize,
    cu_rows: Option<Vec<i32>>,
    parents: Vec<i32>,
    drafts: Option<Vec<i32>>,
    scores: Option<Vec<f32>>,
    sums: bool,
    positions: Option<Vec<i64>>,
}

/// All outputs.
#[derive(Debug, Clone, PartialEq)]
struct Made {
    status: Vec<u32>,
    counts: Vec<i32>,
    selected: Vec<i32>,
    parents: Vec<i32>,
    drafts: Vec<i32>,
    first_child: Vec<i32>,
    next_sibling: Vec<i32>,
    depths: Vec<i32>,
    node_positions: Vec<i64>,
    mask: Vec<u32>,
    paths: Vec<i32>,
    leaf_counts: Vec<i32>,
}

impl Problem {
    fn builder(&self) -> TreeBuilderBuilder {
        let mut builder = TreeBuilder::builder(self.batch, self.nodes).leaves(self.leaves).max_depth(self.max_depth);
        if self.scores.is_some() {
            builder = builder.candidates(self.candidates);
        }
        if self.sums { builder.scores_are_sums() } else { builder }
    }

    fn run(&self, device: &TestDevice) -> Made {
        let plan = self.builder().build(&DeviceInfo::H200).unwrap();
        let (batch, nodes) = (self.batch, self.batch * self.nodes);
        fn buffer<T: nextscale::dtype::Element>(device: &TestDevice, of: &Option<Vec<T>>) -> Option<Buffer<T>> {
            of.as_ref().map(|elements| Buffer::of(device, elements, 1))
        }
        let parents = Buffer::of(device, &self.parents, 1);
        let (cu_rows, drafts) = (buffer(device, &self.cu_rows), buffer(device, &self.drafts));
        let (scores, positions) = (buffer(device, &self.scores), buffer(device, &self.positions));
        let mut said = Buffer::<u32>::poisoned(device, batch, 1);
        let [mut counts, mut leaf_counts] = [0; 2].map(|_| Buffer::<i32>::poisoned(device, batch, 1));
        let [mut selected, mut to_parents, mut to_drafts, mut first_child, mut next_sibling, mut depths] =
            [0; 6].map(|_| Buffer::<i32>::poisoned(device, nodes, 1));
        let mut node_positions = Buffer::<i64>::poisoned(device, nodes, 1);
        let mut mask = Buffer::<u32>::poisoned(device, nodes * self.nodes.div_ceil(32), 1);
        let mut paths = Buffer::<i32>::poisoned(device, batch * self.leaves * (self.max_depth + 1), 1);
        plan.run(
            &device.stream(),
            TreeBuilderArgs {
                parents: parents.input(),
                cu_rows: cu_rows.as_ref().map(Buffer::input),
                drafts: drafts.as_ref().map(Buffer::input),
                scores: scores.as_ref().map(Buffer::input),
                positions: positions.as_ref().map(Buffer::input),
                out: TreeBuilderOut {
                    status: said.output(),
                    counts: Some(counts.output()),
                    selected: Some(selected.output()),
                    parents: Some(to_parents.output()),
                    drafts: self.drafts.is_some().then(|| to_drafts.output()),
                    first_child: Some(first_child.output()),
                    next_sibling: Some(next_sibling.output()),
                    depths: Some(depths.output()),
                    node_positions: Some(node_positions.output()),
                    mask: Some(mask.output()),
                    paths: Some(paths.output()),
                    leaf_counts: Some(leaf_counts.output()),
                },
            },
        )
        .unwrap();
        Made {
            status: said.read(),
            counts: counts.read(),
            selected: selected.read(),
            parents: to_parents.read(),
            drafts: if self.drafts.is_some() { to_drafts.read() } else { Vec::new() },
            first_child: first_child.read(),
            next_sibling: next_sibling.read(),
            depths: depths.read(),
            node_positions: node_positions.read(),
            mask: mask.read(),
            paths: paths.read(),
            leaf_counts: leaf_counts.read(),
        }
    }

    fn rows_of(&self, b: usize) -> (usize, usize, bool) {
        match &self.cu_rows {
            Some(cu_rows) => {
                let most = self.parents.len() as i64;
                let first = i64::from(cu_rows[b]).clamp(0, most);
                let rows = (i64::from(cu_rows[b + 1]).min(most) - first).clamp(0, self.candidates as i64);
                (first as usize, rows as usize, i64::from(cu_rows[b + 1]) - first > rows)
            }
            None => (b * self.candidates, self.candidates, false),
        }
    }

    /// From the definitions, by other means than the op's.
    fn oracle(&self) -> Made {
        let n = self.nodes;
        let (words, columns) = (n.div_ceil(32), self.max_depth + 1);
        let mut made = Made {
            status: vec![0; self.batch],
            counts: vec![0; self.batch],
            selected: vec![-1; self.batch * n],
            parents: vec![-1; self.batch * n],
            drafts: vec![-1; if self.drafts.is_some() { self.batch * n } else { 0 }],
            first_child: vec![-1; self.batch * n],
            next_sibling: vec![-1; self.batch * n],
            depths: vec![-1; self.batch * n],
            node_positions: vec![0; self.batch * n],
            mask: vec![0; self.batch * n * words],
            paths: vec![-1; self.batch * self.leaves * columns],
            leaf_counts: vec![0; self.batch],
        };
        for b in 0..self.batch {
            let (first, rows, more) = self.rows_of(b);
            let parents = &self.parents[first..first + rows];
            let root = self.positions.as_ref().map_or(0, |positions| positions[b]);
            made.node_positions[b * n..][..n].fill(root);
            made.status[b] = if more { status::DRAFTS_IGNORED } else { 0 };
            if rows == 0 {
                continue;
            }
            // Paths from the root, of what is a node.
            let mut path: Vec<Option<Vec<usize>>> = vec![Some(vec![0])];
            for i in 1..rows {
                let parent = parents[i];
                let right = (0..i as i32).contains(&parent);
                if !right && parent != -1 {
                    made.status[b] |= status::TREE_BAD;
                }
                let mut of = if right { path[parent as usize].clone() } else { None };
                if let Some(of) = &mut of {
                    of.push(i);
                }
                path.push(of);
            }
            if parents[0] != -1 {
                made.status[b] |= status::TREE_BAD;
            }
            // Deep ones, by their links alone: what is bad further up may not be noticed.
            for i in 1..rows {
                let (mut at, mut depth) = (i, 0);
                while at > 0 && (0..at as i32).contains(&parents[at]) {
                    at = parents[at] as usize;
                    depth += 1;
                    if depth > self.max_depth {
                        made.status[b] |= status::DRAFTS_IGNORED;
                        path[i] = None;
                        break;
                    }
                }
            }
            let chosen: Vec<usize> = match &self.scores {
                None => (0..rows).collect(),
                Some(scores) => {
                    let least = |path: &Vec<usize>| {
                        let (mut value, mut least) = (0f32, f32::INFINITY);
                        for &at in &path[1..] {
                            let score = scores[first + at];
                            value = if self.sums { score } else { value + score };
                            value = if value.is_nan() { f32::NEG_INFINITY } else { value };
                            least = least.min(value);
                        }
                        least
                    };
                    let mut order: Vec<(f32, usize)> =
                        (0..rows).filter_map(|i| path[i].as_ref().map(|path| (least(path), i))).collect();
                    // -0 is 0.
                    order.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
                    let mut chosen: Vec<usize> = order.iter().take(n).map(|&(_, i)| i).collect();
                    chosen.sort();
                    chosen
                }
            };
            made.counts[b] = chosen.len() as i32;
            let number = |i: usize| chosen.iter().position(|&other| other == i).unwrap();
            for (node, &i) in chosen.iter().enumerate() {
                let Some(path) = &path[i] else { continue };
                let at = b * n + node;
                made.selected[at] = i as i32;
                made.depths[at] = path.len() as i32 - 1;
                made.node_positions[at] = root + path.len() as i64 - 1;
                if let Some(drafts) = &self.drafts {
                    made.drafts[at] = drafts[first + i];
                }
                for &other in path {
                    let other = number(other);
                    made.mask[at * words + other / 32] |= 1 << (other % 32);
                }
                if i > 0 {
                    made.parents[at] = number(path[path.len() - 2]) as i32;
                }
            }
            let children = |node: usize| {
                let of = made.parents[b * n..][..n].to_vec();
                (0..n).filter(move |&child| of[child] == node as i32).collect::<Vec<_>>()
            };
            let mut leaves = Vec::new();
            let mut stack = vec![vec![0usize]];
            while let Some(path) = stack.pop() {
                let children = children(*path.last().unwrap());
                if children.is_empty() {
                    leaves.push(path.clone());
                }
                for &child in children.iter().rev() {
                    stack.push([&path[..], &[child]].concat());
                }
            }
            for node in 0..n {
                let children = children(node);
                if let Some(&child) = children.first() {
                    made.first_child[b * n + node] = child as i32;
                }
                for pair in children.windows(2) {
                    made.next_sibling[b * n + pair[0]] = pair[1] as i32;
                }
            }
            if leaves.len() > self.leaves {
                made.status[b] |= status::DRAFTS_IGNORED;
            }
            leaves.truncate(self.leaves);
            made.leaf_counts[b] = leaves.len() as i32;
            for (leaf, path) in leaves.iter().enumerate() {
                for (column, &node) in path.iter().enumerate() {
                    made.paths[(b * self.leaves + leaf) * columns + column] = node as i32;
                }
            }
        }
        made
    }
}

fn problem() -> impl Strategy<Value = Problem> {
    let sizes = prop_oneof![4 => 1..20usize, 1 => 20..80usize, 1 => 250..300usize];
    let wild = proptest::bool::weighted(0.3);
    let yes = || any::<bool>();
    (0..4usize, sizes, 0..40usize, 0..8usize, (yes(), yes(), yes(), yes(), wild, yes()), any::<u64>()).prop_map(
        |(batch, nodes, more, max_depth, (ragged, with_drafts, chooses, sums, wild, ties), seed)| {
            let mut rng = StdRng::seed_from_u64(seed);
            let candidates = if chooses { nodes + more } else { nodes };
            let rows = batch * candidates;
            let mut parents = vec![-1; rows];
            let cu_rows = ragged.then(|| {
                let mut cu_rows = vec![0i32];
                (0..batch).for_each(|b| cu_rows.push(cu_rows[b] + rng.random_range(0..=candidates as i32)));
                if wild && batch > 0 {
                    cu_rows[batch] = i32::MAX;
                }
                cu_rows
            });
            let mut problem = Problem {
                batch,
                nodes,
                candidates,
                leaves: rng.random_range(1..=nodes),
                max_depth,
                cu_rows,
                parents: Vec::new(),
                drafts: with_drafts.then(|| (0..rows as i32).map(|r| r * 7).collect()),
                scores: None,
                sums: chooses && sums,
                positions: rng.random_bool(0.7).then(|| (0..batch).map(|_| rng.random_range(0..1 << 40)).collect()),
            };
            problem.parents = parents.clone();
            for b in 0..batch {
                let (first, nodes, _) = problem.rows_of(b);
                for node in 1..nodes {
                    parents[first + node] = match rng.random_range(0..4) {
                        0 => 0,
                        1 => node as i32 - 1,
                        2 if wild => [-1, -2, node as i32, i32::MAX, i32::MIN][rng.random_range(0..5)],
                        _ => rng.random_range(0..node as i32),
                    };
                }
                if wild && nodes > 0 && rng.random_bool(0.2) {
                    parents[first] = 3;
                }
            }
            problem.parents = parents;
            if chooses {
                let score = |rng: &mut StdRng| match rng.random_range(0..12) {
                    0 if wild => [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0][rng.random_range(0..5)],
                    _ if ties => -(rng.random_range(0..3) as f32),
                    _ => -rng.random_range(0.0..3.0f32),
                };
                problem.scores = Some((0..rows).map(|_| score(&mut rng)).collect());
            }
            problem
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases() * 4, ..ProptestConfig::default() })]

    #[test]
    fn all_devices_agree_with_the_definitions(problem in problem()) {
        let expected = problem.oracle();
        for device in TestDevice::all() {
            prop_assert_eq!(&problem.run(&device), &expected);
        }
    }
}

/// Two layers of an EAGLE-2 tree with a good and a bad first draft.
fn eagle() -> Problem {
    Problem {
        batch: 1,
        nodes: 4,
        candidates: 7,
        leaves: 4,
        max_depth: 2,
        cu_rows: None,
        // The root; two drafts; two after each of them.
        parents: vec![-1, 0, 0, 1, 1, 2, 2],
        drafts: Some(vec![-1, 10, 20, 11, 12, 21, 22]),
        scores: Some(vec![0.0, -0.5, -2.0, -0.1, -2.0, -0.1, -3.0]),
        sums: false,
        positions: Some(vec![100]),
    }
}

#[test]
fn the_best_nodes_are_chosen() {
    for device in TestDevice::all() {
        // Sums are -.5, -2, -.6, -2.5, -2.1, -5.
        let made = eagle().run(&device);
        assert_eq!((made.selected, made.parents), (vec![0, 1, 2, 3], vec![-1, 0, 0, 1]));
        assert_eq!((made.drafts, made.depths), (vec![-1, 10, 20, 11], vec![0, 1, 1, 2]));
        assert_eq!(made.node_positions, [100, 101, 101, 102]);
        assert_eq!(made.mask, [0b1, 0b11, 0b101, 0b1011]);
        assert_eq!(made.paths, [0, 1, 3, 0, 2, -1, -1, -1, -1, -1, -1, -1]);
        assert_eq!((made.leaf_counts[0], made.counts[0], made.status[0]), (2, 4, 0));
        // A child with a sum above its parent's does not come without it.
        let mut problem = eagle();
        (problem.sums, problem.nodes, problem.leaves) = (true, 3, 3);
        problem.scores = Some(vec![0.0, -0.5, -2.0, -0.7, -0.8, -0.1, -0.1]);
        assert_eq!(problem.run(&device).selected, [0, 1, 3]);
    }
}

/// What the op says of a tree is what `Tree` says of it on the host.
#[test]
fn trees_are_those_of_the_host() {
    let mut rng = StdRng::seed_from_u64(4);
    for device in TestDevice::all() {
        for n in [1, 2, 31, 32, 33, 60, 257] {
            let parents: Vec<i32> =
                (0..n).map(|node| if node == 0 { -1 } else { rng.random_range((node - 9).max(0)..node) }).collect();
            let tree = Tree::from_parents(&parents).unwrap();
            let problem = Problem {
                batch: 1,
                nodes: n as usize,
                candidates: n as usize,
                leaves: n as usize,
                max_depth: tree.max_depth(),
                cu_rows: None,
                parents: parents.clone(),
                drafts: None,
                scores: None,
                sums: false,
                positions: None,
            };
            if tree.max_depth() > 64 {
                continue;
            }
            let made = problem.run(&device);
            let (paths, leaves) = tree.paths();
            assert_eq!(
                (made.first_child, made.next_sibling),
                (tree.first_child().to_vec(), tree.next_sibling().to_vec())
            );
            assert_eq!((made.mask, made.depths), (tree.ancestors(), tree.depths()));
            assert_eq!((&made.paths[..paths.len()], made.leaf_counts[0] as usize), (&paths[..], leaves));
            assert_eq!((made.parents, made.status[0]), (parents, 0));
        }
    }
}

/// The largest plan there is.
#[test]
fn many_candidates() {
    let mut rng = StdRng::seed_from_u64(5);
    let (nodes, candidates) = (1024, 2048);
    let problem = Problem {
        batch: 2,
        nodes,
        candidates,
        leaves: 700,
        max_depth: 64,
        cu_rows: None,
        parents: (0..2 * candidates as i32)
            .map(|r| match r % candidates as i32 {
                0 => -1,
                node => rng.random_range((node - 200).max(0)..node),
            })
            .collect(),
        drafts: None,
        scores: Some((0..2 * candidates).map(|_| -rng.random_range(0.0..3.0f32)).collect()),
        sums: false,
        positions: None,
    };
    let expected = problem.oracle();
    for device in TestDevice::all() {
        assert_eq!(problem.run(&device), expected);
    }
}

/// The comparison must be able to fail.
#[test]
fn wrong_trees_are_told() {
    let mut problem = eagle();
    let expected = problem.oracle();
    assert_eq!(problem.run(&TestDevice::Host), expected);
    problem.scores.as_mut().unwrap()[1] = -9.0;
    assert_ne!(problem.run(&TestDevice::Host), expected);
}

#[test]
fn bad_plans_and_buffers_are_refused() {
    let build = |b: TreeBuilderBuilder| b.build(&DeviceInfo::H200).map(|_| ());
    let size = |result: Result<(), Error>, name: &str| {
        assert!(matches!(result, Err(Error::Size { arg, .. }) if arg == name), "{result:?}");
    };
    size(build(TreeBuilder::builder((1 << 20) + 1, 4)), "batch");
    size(build(TreeBuilder::builder(1, 0)), "nodes");
    size(build(TreeBuilder::builder(1, 1025)), "nodes");
    size(build(TreeBuilder::builder(1, 4).candidates(3)), "candidates");
    size(build(TreeBuilder::builder(1, 4).candidates(2049)), "candidates");
    size(build(TreeBuilder::builder(1, 4).leaves(5)), "leaves");
    size(build(TreeBuilder::builder(1, 4).leaves(0)), "leaves");
    size(build(TreeBuilder::builder(1, 4).max_depth(65)), "max_depth");
    let mut old = DeviceInfo::A100;
    old.arch.major = 7;
    assert!(matches!(TreeBuilder::builder(1, 4).build(&old), Err(Error::UnsupportedDevice { .. })));
    fn plain<T: Send + Sync + Clone + std::hash::Hash + Eq>() {}
    plain::<TreeBuilder>();
    for device in TestDevice::all() {
        let parents = Buffer::of(&device, &[-1, 0, 0, 1], 0);
        let scores = Buffer::of(&device, &[0f32; 4], 0);
        let mut said = Buffer::<u32>::poisoned(&device, 1, 0);
        let mut nodes = Buffer::<i32>::poisoned(&device, 4, 0);
        let mut run = |builder: TreeBuilderBuilder, len: usize, with: bool, out: usize, drafts: bool| {
            let mut made = TreeBuilderOut::new(said.output());
            match drafts {
                true => made.drafts = Some(nodes.output_of(out)),
                false => made.depths = Some(nodes.output_of(out)),
            }
            let args = TreeBuilderArgs {
                parents: parents.input_of(len),
                cu_rows: None,
                drafts: None,
                scores: with.then(|| scores.input()),
                positions: None,
                out: made,
            };
            builder.build(&DeviceInfo::H200).unwrap().run(&device.stream(), args)
        };
        let four = || TreeBuilder::builder(1, 4);
        let length = |arg, need, got| Err(Error::Length { arg, need, got });
        assert_eq!(run(four(), 3, false, 4, false), length("parents", 4, 3));
        assert_eq!(run(four(), 4, false, 3, false), length("depths", 4, 3));
        let refused = |result, name: &str| {
            assert!(matches!(result, Err(Error::Unsupported { arg, .. }) if arg == name), "{result:?}");
        };
        refused(run(four(), 4, true, 4, false), "scores");
        refused(run(four().candidates(4), 4, false, 4, false), "scores");
        refused(run(four(), 4, false, 4, true), "drafts");
        assert!(said.read()[0] == u32::MAX && nodes.read() == [-1; 4]);
    }
}
