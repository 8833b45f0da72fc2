//! Trees of drafts on the host: between the forms in which engines write them.

use crate::error::{Error, Result};

/// A tree of drafts. Node 0 is the root, the last token that is certain; every other node is a draft, and comes after its
/// parent. The children of a node are tried in the order in which they are linked.
///
/// Made on the host, once for trees that do not change (Medusa, EAGLE-1); what changes with every step is made on the device
/// by [`TreeBuilder`](super::TreeBuilder). Nodes may be visible to each other as the plain data says:
///
/// ```
/// use nextscale::attention::{Segment, Visibility};
/// use nextscale::verification::Tree;
/// // Two first drafts, and one after the first of them, behind a cache of 40 tokens.
/// let tree = Tree::from_parents(&[-1, 0, 0, 1])?;
/// assert_eq!(tree.depths(), [0, 1, 1, 2]);
/// let mut segments = vec![Segment::tokens(40)];
/// segments.resize(1 + tree.len(), Segment::tokens(1));
/// let sees = |q: usize, k: usize| k == 0 || (q > 0 && tree.sees(q - 1, k - 1));
/// let visibility = Visibility::table(&segments, sees)?.of_queries(1..5);
/// # let _ = visibility;
/// # Ok::<(), nextscale::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tree {
    parents: Vec<i32>,
    first_child: Vec<i32>,
    next_sibling: Vec<i32>,
}

/// More nodes than any plan takes.
const MOST_NODES: u64 = 1 << 20;

fn bad(arg: &'static str, what: &'static str) -> Error {
    Error::Unsupported { arg, what }
}

impl Tree {
    /// From each node's parent, -1 for the root. Children are tried in the order of their numbers.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a node whose parent does not come before it, [`Error::Size`] for no node or more than 2^20.
    pub fn from_parents(parents: &[i32]) -> Result<Self> {
        let n = parents.len();
        if n == 0 || n as u64 > MOST_NODES {
            return Err(Error::Size { arg: "parents", got: n as u64, min: 1, max: MOST_NODES });
        }
        for (node, &parent) in parents.iter().enumerate() {
            let right = if node == 0 { parent == -1 } else { (0..node as i64).contains(&i64::from(parent)) };
            if !right {
                return Err(bad("parents", "the root's is -1, every other node's comes before it"));
            }
        }
        let (mut first_child, mut next_sibling) = (vec![-1; n], vec![-1; n]);
        for node in (1..n).rev() {
            let parent = parents[node] as usize;
            next_sibling[node] = first_child[parent];
            first_child[parent] = node as i32;
        }
        Ok(Tree { parents: parents.to_vec(), first_child, next_sibling })
    }

    /// From each node's first child and next sibling, -1 for none (SGLang, TensorRT-LLM). Nodes that are linked from nowhere
    /// are not allowed.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for links that do not make a tree, or a child that does not come after its parent;
    /// [`Error::Length`] for arrays of different lengths; [`Error::Size`] for no node or more than 2^20.
    pub fn from_links(first_child: &[i32], next_sibling: &[i32]) -> Result<Self> {
        let n = first_child.len();
        if n == 0 || n as u64 > MOST_NODES {
            return Err(Error::Size { arg: "first_child", got: n as u64, min: 1, max: MOST_NODES });
        }
        if next_sibling.len() != n {
            return Err(Error::Length { arg: "next_sibling", need: n as u64, got: next_sibling.len() as u64 });
        }
        let mut parents = vec![-1; n];
        for (node, &first) in first_child.iter().enumerate() {
            let mut child = first;
            while child != -1 {
                // A node that has a parent already is in two lists, or twice in one.
                if child <= node as i32 || child as usize >= n || parents[child as usize] != -1 {
                    return Err(bad("first_child", "each node but the root is one child of a node before it"));
                }
                parents[child as usize] = node as i32;
                child = next_sibling[child as usize];
            }
        }
        if next_sibling[0] != -1 || parents[1..].contains(&-1) {
            return Err(bad("next_sibling", "each node but the root is one child of a node before it"));
        }
        Ok(Tree { parents, first_child: first_child.to_vec(), next_sibling: next_sibling.to_vec() })
    }

    /// From paths that lead from the root to the leaves, `[leaves, columns]`, what is negative being padding: the
    /// `retrieve_indices` of Medusa and EAGLE. A path ends where padding begins. Children are tried in the order in which the paths name them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for paths that do not begin at node 0 or disagree, for a child that does not come after its
    /// parent, and for nodes that are on no path; [`Error::Size`] for no columns or nodes beyond 2^20.
    pub fn from_paths(paths: &[i32], columns: usize) -> Result<Self> {
        if columns == 0 || !paths.len().is_multiple_of(columns) {
            return Err(Error::Size { arg: "columns", got: columns as u64, min: 1, max: paths.len() as u64 });
        }
        let most = paths.iter().copied().max().unwrap_or(0).max(0) as u64;
        if most >= MOST_NODES {
            return Err(Error::Size { arg: "paths", got: most + 1, min: 1, max: MOST_NODES });
        }
        let n = most as usize + 1;
        let mut parents = vec![-2; n];
        parents[0] = -1;
        let (mut first_child, mut next_sibling, mut last_child) = (vec![-1; n], vec![-1; n], vec![-1; n]);
        for path in paths.chunks(columns) {
            let mut parent = -1;
            for &node in path.iter().take_while(|&&node| node >= 0) {
                let known = parents[node as usize];
                let begins = if parent == -1 { node == 0 } else { node > parent };
                if !begins || (known != -2 && known != parent) {
                    return Err(bad("paths", "they begin at node 0, and a node has one parent, which comes before it"));
                }
                if known == -2 {
                    parents[node as usize] = parent;
                    match last_child[parent as usize] {
                        -1 => first_child[parent as usize] = node,
                        last => next_sibling[last as usize] = node,
                    }
                    last_child[parent as usize] = node;
                }
                parent = node;
            }
        }
        if parents.contains(&-2) {
            return Err(bad("paths", "every node is on one"));
        }
        Ok(Tree { parents, first_child, next_sibling })
    }

    /// A chain of so many drafts.
    pub fn chain(drafts: usize) -> Self {
        let parents: Vec<i32> = (-1..drafts as i32).collect();
        Self::from_parents(&parents).expect("each node comes after the one before it")
    }

    /// Number of nodes, the root among them.
    #[allow(clippy::len_without_is_empty)] // there is a root
    pub fn len(&self) -> usize {
        self.parents.len()
    }

    /// Each node's parent, -1 for the root.
    pub fn parents(&self) -> &[i32] {
        &self.parents
    }

    /// Each node's first child, -1 for none.
    pub fn first_child(&self) -> &[i32] {
        &self.first_child
    }

    /// The next child of each node's parent, -1 for none.
    pub fn next_sibling(&self) -> &[i32] {
        &self.next_sibling
    }

    /// How many drafts lead to each node, itself included: add the root's position for that of the node.
    pub fn depths(&self) -> Vec<i32> {
        let mut depths = vec![0; self.len()];
        for node in 1..self.len() {
            depths[node] = depths[self.parents[node] as usize] + 1;
        }
        depths
    }

    /// The most drafts on one path.
    pub fn max_depth(&self) -> usize {
        self.depths().into_iter().max().unwrap_or(0) as usize
    }

    /// Whether `other` is the node itself or on the path to it.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn sees(&self, node: usize, other: usize) -> bool {
        let mut at = node as i32;
        while at > other as i32 {
            at = self.parents[at as usize];
        }
        at == other as i32
    }

    /// Of each node the nodes that it sees, `[len, ceil(len / 32)]`: bit `j % 32` of word `j / 32` is node `j`.
    pub fn ancestors(&self) -> Vec<u32> {
        let words = self.len().div_ceil(32);
        let mut bits = vec![0u32; self.len() * words];
        for node in 0..self.len() {
            if node > 0 {
                let parent = self.parents[node] as usize;
                bits.copy_within(parent * words..(parent + 1) * words, node * words);
            }
            bits[node * words + node / 32] |= 1 << (node % 32);
        }
        bits
    }

    /// Of each node the runs of consecutive nodes that it sees, ascending: where each begins, and one past its end.
    pub fn runs(&self) -> Vec<Vec<core::ops::Range<usize>>> {
        let of = |node: usize| {
            let mut runs: Vec<core::ops::Range<usize>> = Vec::new();
            let mut at = node as i32;
            while at >= 0 {
                match runs.last_mut() {
                    Some(run) if run.start == at as usize + 1 => run.start = at as usize,
                    _ => runs.push(at as usize..at as usize + 1),
                }
                at = self.parents[at as usize];
            }
            runs.reverse();
            runs
        };
        (0..self.len()).map(of).collect()
    }

    /// The paths from the root to the leaves, `[leaves, max_depth + 1]` and -1 behind their ends, in the order in which
    /// children are tried; and how many there are.
    pub fn paths(&self) -> (Vec<i32>, usize) {
        let columns = self.max_depth() + 1;
        let (mut paths, mut leaves, mut path) = (Vec::new(), 0, vec![0i32]);
        // Down to the first child, else on to the next sibling of the last node that has one.
        loop {
            let node = path[path.len() - 1] as usize;
            if self.first_child[node] >= 0 {
                path.push(self.first_child[node]);
                continue;
            }
            paths.extend(&path);
            paths.resize((leaves + 1) * columns, -1);
            leaves += 1;
            loop {
                let Some(node) = path.pop() else { return (paths, leaves) };
                if self.next_sibling[node as usize] >= 0 {
                    path.push(self.next_sibling[node as usize]);
                    break;
                }
            }
        }
    }
}
