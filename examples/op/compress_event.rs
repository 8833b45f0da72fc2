use nextscale::bf16;
use nextscale::compression::{CacheSpec, ChunkCache, Compaction, Event, EventArgs, Policy, PositionWeight};
use nextscale::dtype::Float;
use nextscale::f16;

use crate::request::{Failure, Op, SettingHelp, Settings, TensorHelp};
use crate::runner::Runner;
use crate::tensors::{Tensor, Tensors, with_type};

pub(crate) static OP: Op = Op {
    name: "compress_event",
    about: "A whole compression event of a policy over a cache in pages, and a second one after more tokens.",
    inputs: &[
        TensorHelp { name: "k", dtypes: "bf16, f16, f32", shape: "[sets, tokens, heads, dim]", about: "sealed chunks" },
        TensorHelp { name: "v", dtypes: "as k", shape: "[sets, tokens, heads, dim]", about: "" },
        TensorHelp {
            name: "q",
            dtypes: "as k",
            shape: "[sets, rows, q_heads, dim]",
            about: "if the policy scores by queries",
        },
        TensorHelp {
            name: "k_more",
            dtypes: "as k",
            shape: "[sets, more, heads, dim]",
            about: "optional: appended for a second event",
        },
        TensorHelp { name: "v_more", dtypes: "as k", shape: "[sets, more, heads, dim]", about: "with k_more" },
        TensorHelp { name: "q_more", dtypes: "as k", shape: "as q", about: "of the second event" },
    ],
    settings: &[
        SettingHelp {
            name: "policy",
            values: "flowcache | rkv | snapkv | h2o | keydiff | streaming | adakv | scalekv",
            about: "",
        },
        SettingHelp { name: "budget", values: "tokens", about: "to keep of a head" },
        SettingHelp { name: "window", values: "tokens", about: "recent ones that stay; h2o, streaming: of the budget" },
        SettingHelp { name: "sink", values: "tokens", about: "of streaming; default 0" },
        SettingHelp { name: "lambda", values: "a number", about: "default 0.07" },
        SettingHelp { name: "floor", values: "0 to 1", about: "of adakv; default 0.2" },
        SettingHelp {
            name: "weighting",
            values: "none | exponential | polynomial | upper_convex | gaussian",
            about: "of flowcache, with power 3; default none",
        },
        SettingHelp { name: "block", values: "tokens", about: "kept or dropped together; default 1" },
        SettingHelp { name: "height", values: "rows", about: "of scalekv's last scale" },
        SettingHelp { name: "width", values: "columns", about: "of scalekv's last scale" },
        SettingHelp { name: "page_rows", values: "rows", about: "of a page; tokens is a multiple of it; default 16" },
        SettingHelp { name: "workspace", values: "bytes", about: "the most; default 64 MB" },
    ],
    outputs: &[
        TensorHelp {
            name: "positions",
            dtypes: "i32",
            shape: "[sets, heads, kept]",
            about: "of kept rows; -1 after them",
        },
        TensorHelp { name: "k", dtypes: "as k", shape: "[sets, kept, heads, dim]", about: "" },
        TensorHelp { name: "v", dtypes: "as k", shape: "[sets, kept, heads, dim]", about: "" },
        TensorHelp { name: "lengths", dtypes: "i32", shape: "[sets, heads]", about: "" },
        TensorHelp {
            name: "first_positions",
            dtypes: "i32",
            shape: "[sets, heads, kept]",
            about: "after the first event",
        },
    ],
    run,
};

fn run(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    with_type!("k", inputs.require("k")?.dtype, T in [bf16, f16, f32], compress::<T>(runner, inputs, settings))
}

fn policy_of(settings: &Settings) -> Result<Policy, Failure> {
    let number = |key| settings.get::<usize>(key).map(Option::unwrap_or_default);
    let (budget, window, sink) = (number("budget")?, number("window")?, number("sink")?);
    let lambda = settings.get("lambda")?.unwrap_or(0.07);
    let weight = match settings.get::<String>("weighting")?.as_deref() {
        None | Some("none") => PositionWeight::None,
        Some("exponential") => PositionWeight::Exponential,
        Some("polynomial") => PositionWeight::Polynomial(3),
        Some("upper_convex") => PositionWeight::UpperConvexPolynomial(3),
        Some("gaussian") => PositionWeight::Gaussian,
        Some(other) => return Err(Failure::request(format!("weighting={other}: there is none"))),
    };
    Ok(match settings.require::<String>("policy")?.as_str() {
        "flowcache" => Policy::FlowCache { budget, lambda, weight },
        "rkv" => Policy::RKv { budget, window, lambda },
        "snapkv" => Policy::SnapKv { budget, window },
        "h2o" => Policy::H2o { heavy: budget.saturating_sub(window), recent: window },
        "keydiff" => Policy::KeyDiff { budget },
        "streaming" => Policy::StreamingLlm { sink, recent: budget.saturating_sub(sink) },
        "adakv" => Policy::AdaKv { budget, window, floor: settings.get("floor")?.unwrap_or(0.2) },
        "scalekv" => Policy::ScaleKv { budget, scale: [number("height")?, number("width")?] },
        other => return Err(Failure::request(format!("policy={other}: there is none"))),
    })
}

/// The cache in host memory between events: the op's runner gives a buffer up where it is read.
struct Pool<T> {
    k: Vec<T>,
    v: Vec<T>,
    positions: Vec<i32>,
    lengths: Vec<i32>,
}

fn compress<T: Float>(runner: &Runner, inputs: &Tensors, settings: &Settings) -> Result<Tensors, Failure> {
    let policy = policy_of(settings)?;
    let [sets, tokens, heads, dim] = inputs.require("k")?.shape_of("k")?;
    let more = match inputs.get("k_more") {
        Some(more) => more.shape_of::<4>("k_more")?[1],
        None => 0,
    };
    let page_rows = settings.get("page_rows")?.unwrap_or(16usize);
    let pages = 2 * sets * (tokens + more).div_ceil(page_rows.max(1)) + 2 * sets;
    let row = heads * (2 * dim * size_of::<T>() + 4);
    let spec = CacheSpec {
        branches: 1,
        layers: sets,
        heads,
        k_dim: dim,
        v_dim: dim,
        dtype: T::DTYPE,
        packed: None,
        page_rows,
        spare_pages: 0,
        extras: 0,
        most_rows: 2 * (tokens + more + page_rows),
        bytes: (pages * page_rows * row) as u64 + (1 << 20),
    };
    let mut cache = ChunkCache::new(spec)?;
    let places = cache.layout().pages * page_rows * heads;
    let mut pool = Pool {
        k: vec![T::from_f32(f32::NAN); places * dim],
        v: vec![T::from_f32(f32::NAN); places * dim],
        positions: vec![-1; places],
        lengths: vec![0; sets * heads],
    };
    // Page by page in all layers, so that no layer's pages are next to each other.
    let append = |cache: &mut ChunkCache, pool: &mut Pool<T>, names: [&str; 2], first: usize, rows: usize| {
        let [k, v] =
            names.map(|name| inputs.require(name).and_then(|it| it.expect::<T>(name, &[sets, rows, heads, dim])));
        let (k, v) = (k?, v?);
        for from in (0..rows).step_by(page_rows) {
            let count = page_rows.min(rows - from);
            for set in 0..sets {
                let chunk = (first + from) as u64;
                let placed = cache.append(0, set, chunk, count, (first + from) as u32)?;
                let its = placed.runs.iter().flat_map(|run| run.place as usize..run.place as usize + run.rows);
                for (i, place) in its.enumerate() {
                    let at = (set * rows + from + i) * heads * dim;
                    pool.k[place * heads * dim..][..heads * dim].copy_from_slice(&k[at..][..heads * dim]);
                    pool.v[place * heads * dim..][..heads * dim].copy_from_slice(&v[at..][..heads * dim]);
                    pool.positions[place * heads..][..heads].fill((first + from + i) as i32);
                }
                cache.seal(0, set, chunk)?;
            }
        }
        Ok::<(), Failure>(())
    };
    append(&mut cache, &mut pool, ["k", "v"], 0, tokens)?;
    event(runner, inputs, settings, policy, &mut cache, &mut pool, "q")?;
    let first = kept(&cache, &pool, policy.rows(heads), dim);
    let mut last = kept(&cache, &pool, policy.rows(heads), dim);
    if more > 0 {
        append(&mut cache, &mut pool, ["k_more", "v_more"], tokens, more)?;
        event(runner, inputs, settings, policy, &mut cache, &mut pool, "q_more")?;
        last = kept(&cache, &pool, policy.rows(heads), dim);
    }
    let rows = policy.rows(heads);
    let shape = [sets, rows, heads, dim];
    Ok(Tensors::default()
        .with("positions", Tensor::new(&[sets, heads, rows], &last.2))
        .with("first_positions", Tensor::new(&[sets, heads, rows], &first.2))
        .with("k", Tensor::new(&shape, &last.0))
        .with("v", Tensor::new(&shape, &last.1))
        .with("lengths", Tensor::new(&[sets, heads], &pool.lengths)))
}

/// K, V `[sets, rows, heads, dim]` and positions `[sets, heads, rows]` of what was kept.
fn kept<T: Float>(cache: &ChunkCache, pool: &Pool<T>, rows: usize, dim: usize) -> (Vec<T>, Vec<T>, Vec<i32>) {
    let CacheSpec { layers, heads, page_rows, .. } = cache.spec();
    let mut k = vec![T::from_f32(0.0); layers * rows * heads * dim];
    let mut v = k.clone();
    let mut positions = vec![-1; layers * heads * rows];
    for set in 0..layers {
        let segment = cache.view(0, set).expect("a layer").next().expect("a compressed chunk");
        for head in 0..heads {
            for row in 0..pool.lengths[set * heads + head] as usize {
                let at = (segment.pages[row / page_rows] as usize * page_rows + row % page_rows) * heads + head;
                positions[(set * heads + head) * rows + row] = pool.positions[at];
                let to = ((set * rows + row) * heads + head) * dim;
                k[to..][..dim].copy_from_slice(&pool.k[at * dim..][..dim]);
                v[to..][..dim].copy_from_slice(&pool.v[at * dim..][..dim]);
            }
        }
    }
    (k, v, positions)
}

fn event<T: Float>(
    runner: &Runner,
    inputs: &Tensors,
    settings: &Settings,
    policy: Policy,
    cache: &mut ChunkCache,
    pool: &mut Pool<T>,
    q: &str,
) -> Result<(), Failure> {
    let CacheSpec { layers, heads, k_dim, .. } = cache.spec();
    let mut moves: Vec<Compaction> = Vec::new();
    for set in 0..layers {
        let compaction = cache.compress(0, set, policy.rows(heads))?;
        moves.push(compaction.ok_or_else(|| Failure::request("there are no more tokens than are kept"))?);
    }
    let mut builder = cache.event::<T>(policy, &moves)?;
    builder = builder.block(settings.get("block")?.unwrap_or(1));
    if let Some(bytes) = settings.get::<usize>("workspace")? {
        builder = builder.workspace(bytes as u64);
    }
    let mut queries = None;
    if policy.scores().importance {
        let given = inputs.require(q)?;
        let [sets, rows, q_heads, dim] = given.shape_of(q)?;
        if sets != layers || dim != k_dim || q_heads % heads != 0 {
            return Err(Failure::request(format!("{q} does not fit k")));
        }
        builder = builder.groups(q_heads / heads);
        if policy.queries().is_none() {
            builder = builder.queries(rows);
        }
        queries = Some(runner.upload(&given.expect::<T>(q, &[sets, rows, q_heads, dim])?)?);
    }
    let plan: Event<T> = builder.build(&runner.info()?)?;
    let words: Vec<i32> = moves.iter().flat_map(|moves| &moves.input_pages).map(|&page| page as i32).collect();
    let pages = runner.upload(&words)?;
    let list = |words: &[i32]| if words.is_empty() { Ok(None) } else { runner.upload(words).map(Some) };
    let (rows, columns) = (list(plan.rows())?, list(plan.columns())?);
    let weights = plan.weights().map(|weights| runner.upload(weights)).transpose()?;
    let (mut k, mut v) = (runner.upload(&pool.k)?, runner.upload(&pool.v)?);
    let mut positions = runner.upload(&pool.positions)?;
    let mut lengths = runner.upload(&pool.lengths)?;
    let mut workspace = runner.output::<u8>(plan.workspace_bytes() as usize)?;
    runner.run(|stream| {
        let mut args = EventArgs::of(k.as_out(), v.as_out(), lengths.as_out(), pages.as_in(), workspace.as_out());
        args.q = queries.as_ref().map(|q| q.as_in());
        args.positions = Some(positions.as_out());
        args.rows = rows.as_ref().map(|rows| rows.as_in());
        args.columns = columns.as_ref().map(|columns| columns.as_in());
        args.weights = weights.as_ref().map(|weights| weights.as_in());
        plan.run(stream, args)
    })?;
    pool.k = k.download()?;
    pool.v = v.download()?;
    pool.positions = positions.download()?;
    pool.lengths = lengths.download()?;
    Ok(())
}
