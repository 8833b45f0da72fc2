//! The cache's bookkeeping against a model that moves tokens about, and its compressions through the stages.

#![cfg(feature = "compression")]

mod support;

use std::collections::HashMap;

use nextscale::compression::{
    CacheSpec, ChunkCache, ChunkState, CompactArgs, Format, PackArgs, Packed, Placed, Policy, PositionWeight,
    SelectArgs, UnpackArgs,
};
use nextscale::{DType, DeviceInfo, Error, In, Out, Stream, bf16};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::{Buffer, TestDevice};

fn spec(bytes: u64) -> CacheSpec {
    CacheSpec {
        branches: 3,
        layers: 2,
        heads: 2,
        k_dim: 16,
        v_dim: 8,
        dtype: DType::BF16,
        packed: None,
        page_rows: 4,
        spare_pages: 2,
        extras: 1,
        most_rows: 64,
        bytes,
    }
}

/// What a layer should hold: chunk, state, and a number for each row.
type Layer = Vec<(u64, ChunkState, Vec<u64>)>;

struct Model {
    cache: ChunkCache,
    layers: Vec<Layer>,
    /// By place: the number that was written there.
    memory: HashMap<u64, u64>,
    next: u64,
}

impl Model {
    fn new(spec: CacheSpec) -> Self {
        let cache = ChunkCache::new(spec).unwrap();
        Model { cache, layers: vec![Vec::new(); spec.branches * spec.layers], memory: HashMap::new(), next: 1 }
    }

    fn page_rows(&self) -> u64 {
        self.cache.spec().page_rows as u64
    }

    fn write(&mut self, placed: &Placed, rows: usize) -> Vec<u64> {
        for copy in &placed.copies {
            for row in 0..copy.rows as u64 {
                let value = self.memory[&(u64::from(copy.from) * self.page_rows() + row)];
                self.memory.insert(u64::from(copy.to) * self.page_rows() + row, value);
            }
        }
        let mut written = Vec::new();
        for run in &placed.runs {
            for row in 0..run.rows as u64 {
                self.memory.insert(run.place + row, self.next);
                written.push(self.next);
                self.next += 1;
            }
        }
        assert_eq!(written.len(), rows);
        written
    }

    /// One operation drawn from `rng`. What fails leaves everything as it was.
    fn step(&mut self, rng: &mut StdRng) {
        let spec = self.cache.spec();
        let (branch, layer) = (rng.random_range(0..spec.branches), rng.random_range(0..spec.layers));
        let at = branch * spec.layers + layer;
        let before = format!("{:?}", self.cache);
        let refused = |error: Error, cache: &ChunkCache| {
            assert!(matches!(error, Error::Size { .. } | Error::Unsupported { .. }), "{error}");
            assert_eq!(format!("{cache:?}"), before);
        };
        match rng.random_range(0..12) {
            0..=3 => {
                let last = self.layers[at].last().filter(|chunk| chunk.1 == ChunkState::Active);
                let chunk = match last {
                    Some(last) if rng.random() => last.0,
                    _ => self.next + 1000,
                };
                let rows = if rng.random() { rng.random_range(0..9) } else { 4 * rng.random_range(1..4) };
                match self.cache.append(branch, layer, chunk, rows, 7) {
                    Ok(placed) => {
                        let written = self.write(&placed, rows);
                        match self.layers[at].iter_mut().find(|have| have.0 == chunk) {
                            Some(have) => have.2.extend(written),
                            None => self.layers[at].push((chunk, ChunkState::Active, written)),
                        }
                    }
                    Err(error) => refused(error, &self.cache),
                }
            }
            4 | 5 => {
                let active: Vec<_> = self.layers[at].iter().filter(|chunk| chunk.1 == ChunkState::Active).collect();
                let Some(chunk) = active.first().map(|chunk| chunk.0) else { return };
                match self.cache.overwrite(branch, layer, chunk) {
                    Ok(placed) => {
                        let rows = self.layers[at].iter().find(|have| have.0 == chunk).unwrap().2.len();
                        let written = self.write(&placed, rows);
                        self.layers[at].iter_mut().find(|have| have.0 == chunk).unwrap().2 = written;
                    }
                    Err(error) => refused(error, &self.cache),
                }
            }
            6 => {
                let rows = rng.random_range(0..10);
                match self.cache.truncate(branch, layer, rows) {
                    Ok(()) => {
                        let mut left = rows;
                        while left > 0 {
                            let last = self.layers[at].last_mut().unwrap();
                            let taken = left.min(last.2.len());
                            last.2.truncate(last.2.len() - taken);
                            left -= taken;
                            if last.2.is_empty() {
                                self.layers[at].pop();
                            }
                        }
                    }
                    Err(error) => refused(error, &self.cache),
                }
            }
            7 => {
                let to = rng.random_range(0..spec.branches);
                self.cache.fork(branch, to).unwrap();
                for layer in 0..spec.layers {
                    self.layers[to * spec.layers + layer] = self.layers[branch * spec.layers + layer].clone();
                }
            }
            8 | 9 => {
                let Some(chunk) = self.layers[at].iter_mut().find(|chunk| chunk.1 == ChunkState::Active) else {
                    return;
                };
                chunk.1 = ChunkState::Sealed;
                self.cache.seal(branch, layer, chunk.0).unwrap();
            }
            10 => {
                let kept = if rng.random() { 4 * rng.random_range(0..5) } else { rng.random_range(0..20) };
                match self.cache.compress(branch, layer, kept) {
                    Ok(None) => assert_eq!(format!("{:?}", self.cache), before),
                    Ok(Some(moves)) => {
                        let sealed = self.layers[at].iter().take_while(|chunk| chunk.1 != ChunkState::Active).count();
                        let first = self.layers[at][0].0;
                        let rows: Vec<u64> = self.layers[at].drain(..sealed).flat_map(|chunk| chunk.2).collect();
                        let gap = moves.first_rows - moves.first_kept;
                        assert_eq!((rows.len() + gap, kept), (moves.tokens, moves.kept));
                        let row_of = |row: usize| if row < moves.first_kept { row } else { row + gap };
                        let mut left = kept;
                        let mut chosen = Vec::new();
                        for row in 0..rows.len() {
                            if rng.random_range(0..rows.len() - row) < left {
                                chosen.push(row);
                                left -= 1;
                            }
                        }
                        let place = |pages: &[u32], row: usize| {
                            u64::from(pages[row / spec.page_rows]) * self.page_rows() + (row % spec.page_rows) as u64
                        };
                        let values: Vec<u64> =
                            chosen.iter().map(|&row| self.memory[&place(&moves.input_pages, row_of(row))]).collect();
                        let places: Vec<u64> = (0..kept).map(|row| place(&moves.out_pages, row)).collect();
                        self.memory.extend(places.into_iter().zip(values));
                        let kept_rows: Vec<u64> = chosen.into_iter().map(|row| rows[row]).collect();
                        if kept > 0 {
                            self.layers[at].insert(0, (first, ChunkState::Compressed, kept_rows));
                        }
                    }
                    Err(error) => refused(error, &self.cache),
                }
            }
            _ => {
                self.cache.clear(branch).unwrap();
                (0..spec.layers).for_each(|layer| self.layers[branch * spec.layers + layer].clear());
            }
        }
    }

    fn check(&self) {
        let spec = self.cache.spec();
        assert!(self.cache.bytes_used() <= self.cache.bytes_needed() && self.cache.bytes_needed() <= spec.bytes);
        let mut words = vec![0; spec.branches * spec.layers * spec.table_pages()];
        self.cache.tables(&mut words).unwrap();
        let mut used = std::collections::HashSet::new();
        for (at, layer) in self.layers.iter().enumerate() {
            let (branch, number) = (at / spec.layers, at % spec.layers);
            let segments: Vec<_> = self.cache.view(branch, number).unwrap().collect();
            assert_eq!(segments.len(), layer.len());
            let table = &words[at * spec.table_pages()..][..spec.table_pages()];
            let mut pages = table.iter();
            for (segment, (chunk, state, rows)) in segments.iter().zip(layer) {
                assert_eq!((segment.chunk, segment.state, segment.rows), (*chunk, *state, rows.len()));
                assert_eq!(segment.pages.len(), rows.len().div_ceil(spec.page_rows));
                for (row, value) in rows.iter().enumerate() {
                    let page = segment.pages[row / spec.page_rows];
                    let place = u64::from(page) * self.page_rows() + (row % spec.page_rows) as u64;
                    assert_eq!(
                        self.memory[&place], *value,
                        "branch {branch}, layer {number}, chunk {chunk}, row {row}"
                    );
                }
                for &page in segment.pages {
                    assert!((page as usize) < self.cache.layout().pages);
                    assert_eq!(*pages.next().unwrap(), page as i32);
                    used.insert(page);
                }
            }
            assert!(pages.all(|&word| word == -1));
            assert_eq!(
                self.cache.rows(branch, number).unwrap(),
                layer.iter().map(|chunk| chunk.2.len()).sum::<usize>()
            );
        }
        assert_eq!(used.len(), self.cache.pages_used());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: support::cases(), ..ProptestConfig::default() })]

    /// Whatever happens: every row is where it should be, and nothing outgrows the budget.
    #[test]
    fn rows_are_where_they_should_be(seed in any::<u64>(), bytes in 12_000u64..40_000) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut model = Model::new(spec(bytes));
        for _ in 0..60 {
            model.step(&mut rng);
            model.check();
        }
    }

    /// The budget is used as far as whole pages go.
    #[test]
    fn layouts_use_the_budget(
        bytes in 0u64..1 << 24, page_rows in 1usize..100, heads in 1usize..9, dims in [1usize..130, 1usize..130],
        extras in 0usize..4, spare_pages in 0usize..9,
    ) {
        let spec = CacheSpec {
            page_rows, heads, k_dim: dims[0], v_dim: dims[1], extras, spare_pages, bytes, most_rows: 1000, ..spec(0)
        };
        match spec.layout() {
            Ok(layout) => {
                prop_assert!(layout.bytes <= bytes && layout.pages > spare_pages);
                // One more page would not fit, but for what aligning five regions may take.
                prop_assert!(layout.bytes + spec.page_bytes() + 5 * 256 > bytes);
                let regions = [layout.k, layout.v, layout.positions, layout.extras, layout.tables, layout.lengths];
                for pair in regions.windows(2) {
                    prop_assert!(pair[0].offset + pair[0].bytes <= pair[1].offset && pair[1].offset % 256 == 0);
                }
                prop_assert_eq!(layout.k.bytes, (layout.pages * page_rows * heads * dims[0] * 2) as u64);
                prop_assert_eq!(layout.bytes, layout.lengths.offset + layout.lengths.bytes);
            }
            Err(Error::Size { arg: "bytes", min, .. }) => {
                prop_assert!(min > bytes);
                let enough = CacheSpec { bytes: min, ..spec }.layout().unwrap();
                prop_assert_eq!(enough.pages, spare_pages + 1);
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
    }
}

/// Formats of keys and values, with and without numbers of their own.
fn packings() -> Vec<Option<Packed>> {
    let uniform = Format::Uniform { bits: 4, group: Some(8) };
    let all = [
        (Format::Fp8, Format::Fp8, false),
        (Format::Fp8, Format::Int8, true),
        (Format::Int8, Format::INT4, false),
        (Format::INT4, Format::INT4, true),
        (Format::INT4, uniform, false),
    ];
    all.into_iter().map(|(k, v, inline)| Some(Packed { k, v, inline })).chain([None]).collect()
}

/// Never a byte over budget, over a thousand chunks: FlowCache's way of working, each event freeing a chunk.
#[test]
fn a_thousand_chunks() {
    for packed in packings() {
        a_thousand_chunks_of(packed);
    }
}

fn a_thousand_chunks_of(packed: Option<Packed>) {
    let spec = CacheSpec { branches: 1, layers: 2, most_rows: 40, bytes: 8_000, packed, ..spec(0) };
    let layout = spec.layout().unwrap();
    // Every byte of a row is counted: slots, numbers, its position, its norm.
    let [k, v] = packed.map_or([32, 16], |of| {
        let bytes = |format: Format, dim: usize| {
            if of.inline { format.inline_bytes(dim) } else { format.bytes_per_token(dim, DType::F32) as usize }
        };
        [bytes(of.k, 16), bytes(of.v, 8)]
    });
    assert_eq!(spec.page_bytes(), (4 * 2 * (k + v + 4 + 4)) as u64);
    let regions = [layout.k, layout.v, layout.k_numbers, layout.v_numbers, layout.positions, layout.extras];
    assert_eq!(regions.iter().map(|region| region.bytes).sum::<u64>(), layout.pages as u64 * spec.page_bytes());
    let mut model = Model::new(spec);
    let mut rng = StdRng::seed_from_u64(1);
    for chunk in 0..1000u64 {
        for layer in 0..2 {
            while model
                .cache
                .append(0, layer, chunk, 8, chunk as u32 * 8)
                .map(|placed| model.write(&placed, 8))
                .is_err()
            {
                let held = model.cache.rows(0, layer).unwrap();
                let kept = 4 * rng.random_range(1..=(held / 4 - 2));
                assert!(model.cache.compress(0, layer, kept).unwrap().is_some());
            }
            for _ in 0..rng.random_range(0..3) {
                model.cache.overwrite(0, layer, chunk).unwrap();
            }
            model.cache.seal(0, layer, chunk).unwrap();
            assert!(model.cache.bytes_used() <= 8_000 && model.cache.bytes_needed() <= 8_000);
        }
    }
}

/// Rows are packed where they are appended, moved as bytes, and unpacked where attention reads them: the same as if
/// each were packed alone.
#[test]
fn packed_rows_through_the_stages() {
    for (device, packed) in
        TestDevice::all().iter().flat_map(|device| packings().into_iter().map(move |it| (device, it)))
    {
        let Some(packed) = packed else { continue };
        let spec = CacheSpec { branches: 1, packed: Some(packed), ..spec(1 << 16) };
        let (heads, page_rows) = (spec.heads, spec.page_rows);
        let mut cache = ChunkCache::new(spec).unwrap();
        let layout = cache.layout();
        let places = layout.pages * page_rows;
        let ([k_slot, v_slot], [k_numbers, v_numbers]) = (spec.row_bytes(), spec.numbers());
        assert_eq!(layout.k.bytes as usize, places * heads * k_slot);
        assert_eq!(layout.v_numbers.bytes as usize, places * heads * v_numbers * 4);
        let mut slots = [k_slot, v_slot].map(|slot| Buffer::of(device, &vec![0u8; places * heads * slot], 0));
        let mut numbers =
            [k_numbers, v_numbers].map(|count| Buffer::of(device, &vec![0f32; (places * heads * count).max(1)], 0));
        let mut rng = StdRng::seed_from_u64(7);
        let dims = [spec.k_dim, spec.v_dim];
        // `[layer][k or v][row, head, dim]`
        let mut written = vec![[Vec::new(), Vec::new()]; 2];
        for (chunk, layer) in (0..3u64).flat_map(|chunk| (0..2).map(move |layer| (chunk, layer))) {
            let placed = cache.append(0, layer, chunk, 8, chunk as u32 * 8).unwrap();
            for run in placed.runs {
                let plans = cache.pack::<bf16>(run.rows).unwrap().map(|plan| plan.build(&DeviceInfo::H200).unwrap());
                for (which, plan) in plans.iter().enumerate() {
                    let rows: Vec<bf16> = (0..run.rows * heads * dims[which])
                        .map(|_| bf16::from_f32(rng.random_range(-3.0f32..3.0)))
                        .collect();
                    let input = Buffer::of(device, &rows, 0);
                    // Views that begin at the run's place: copies here, for the buffers of the test are whole.
                    let (slot, count) = ([k_slot, v_slot][which], [k_numbers, v_numbers][which]);
                    let mut codes = Buffer::<u8>::poisoned(device, run.rows * heads * slot, 0);
                    let mut its = Buffer::<f32>::poisoned(device, (run.rows * heads * count).max(1), 0);
                    let args = PackArgs {
                        input: input.input(),
                        codes: codes.output(),
                        numbers: (count > 0).then(|| its.output()),
                        scales: None,
                        kept: None,
                        counts: None,
                        flags: None,
                    };
                    plan.pack(&device.stream(), args).unwrap();
                    let at = run.place as usize * heads;
                    let mut all = slots[which].read();
                    all[at * slot..(at + run.rows * heads) * slot].copy_from_slice(&codes.read());
                    slots[which].write(&all);
                    if count > 0 {
                        let mut all = numbers[which].read();
                        all[at * count..(at + run.rows * heads) * count].copy_from_slice(&its.read());
                        numbers[which].write(&all);
                    }
                    written[layer][which].extend(rows);
                }
            }
            cache.seal(0, layer, chunk).unwrap();
        }
        let policy = Policy::StreamingLlm { sink: 3, recent: 6 };
        let kept: Vec<usize> = (0..3).chain(18..24).collect();
        let moves: Vec<_> = (0..2).map(|layer| cache.compress(0, layer, 9).unwrap().unwrap()).collect();
        assert!(matches!(cache.event::<bf16>(policy, &moves), Err(Error::Unsupported { arg: "packed", .. })));
        let indices: Vec<i32> = (0..2 * heads).flat_map(|_| kept.iter().map(|&row| row as i32)).collect();
        let indices = Buffer::of(device, &indices, 0);
        let pages: Vec<i32> = moves.iter().flat_map(|moves| &moves.input_pages).map(|&page| page as i32).collect();
        let pages = Buffer::of(device, &pages, 0);
        {
            let plan = cache.compact::<u8>(2, &moves[0]).unwrap().build(&DeviceInfo::H200).unwrap();
            let [k, v] = &mut slots;
            let mut args = CompactArgs::of(indices.input());
            (args.k_out, args.v_out) = (Some(k.output()), Some(v.output()));
            args.input_pages = Some(pages.input());
            plan.run(&device.stream(), args).unwrap();
        }
        assert_eq!(cache.compact_numbers(2, &moves[0]).is_none(), packed.inline);
        if let Some(plan) = cache.compact_numbers(2, &moves[0]) {
            let plan = plan.build(&DeviceInfo::H200).unwrap();
            let [k, v] = &mut numbers;
            let mut args = CompactArgs::of(indices.input());
            (args.k_out, args.v_out) = (Some(k.output()), Some(v.output()));
            args.input_pages = Some(pages.input());
            plan.run(&device.stream(), args).unwrap();
        }
        let (slots, numbers) = (slots.map(|slots| slots.read()), numbers.map(|numbers| numbers.read()));
        for (layer, which) in (0..2).flat_map(|layer| [(layer, 0), (layer, 1)]) {
            let (slot, count, dim) = ([k_slot, v_slot][which], [k_numbers, v_numbers][which], dims[which]);
            let segments: Vec<_> = cache.view(0, layer).unwrap().collect();
            let runs = segments[0].runs(page_rows);
            assert_eq!(runs.iter().map(|run| run.rows).sum::<usize>(), 9);
            let mut row = 0;
            for run in runs {
                let at = run.place as usize * heads;
                let [plan, other] =
                    cache.pack::<bf16>(run.rows).unwrap().map(|plan| plan.build(&DeviceInfo::H200).unwrap());
                let plan = if which == 0 { plan } else { other };
                let of = |codes: &[u8], numbers: &[f32], rows: usize| {
                    let mut out = vec![bf16::ZERO; rows * heads * dim];
                    let args = UnpackArgs {
                        codes: In::host(codes),
                        numbers: (count > 0).then(|| In::host(numbers)),
                        scales: None,
                        counts: None,
                        out: Out::host(&mut out),
                        flags: None,
                    };
                    plan.unpack(&Stream::host(), args).unwrap();
                    out
                };
                let codes = &slots[which][at * slot..(at + run.rows * heads) * slot];
                let its = &numbers[which][at * count..(at + run.rows * heads) * count];
                let moved = of(codes, its, run.rows);
                // The rows that were kept, packed anew on the host.
                let old: Vec<bf16> = (row..row + run.rows)
                    .flat_map(|row| {
                        written[layer][which][kept[row] * heads * dim..(kept[row] + 1) * heads * dim].to_vec()
                    })
                    .collect();
                let mut codes = vec![0u8; run.rows * heads * slot];
                let mut its = vec![0f32; run.rows * heads * count];
                let args = PackArgs {
                    input: In::host(&old),
                    codes: Out::host(&mut codes),
                    numbers: (count > 0).then(|| Out::host(&mut its)),
                    scales: None,
                    kept: None,
                    counts: None,
                    flags: None,
                };
                plan.pack(&Stream::host(), args).unwrap();
                assert_eq!(moved, of(&codes, &its, run.rows), "{packed:?}, layer {layer}");
                let most = old.iter().map(|x| x.to_f32().abs()).fold(0f32, f32::max);
                let close = moved.iter().zip(&old).all(|(a, b)| (a.to_f32() - b.to_f32()).abs() <= most / 4.0);
                assert!(close, "{packed:?}");
                row += run.rows;
            }
        }
    }
}

#[test]
fn refusals_name_the_argument() {
    let size = |made: Result<ChunkCache, Error>, name: &str| {
        assert!(matches!(made, Err(Error::Size { arg, .. }) if arg == name));
    };
    size(ChunkCache::new(CacheSpec { heads: 0, ..spec(1 << 20) }), "heads");
    size(ChunkCache::new(CacheSpec { page_rows: 0, ..spec(1 << 20) }), "page_rows");
    size(ChunkCache::new(CacheSpec { extras: 5, ..spec(1 << 20) }), "extras");
    size(ChunkCache::new(CacheSpec { k_dim: 2000, ..spec(1 << 20) }), "k_dim");
    size(ChunkCache::new(spec(100)), "bytes");
    let packed = |k, v, inline| {
        let packed = Some(Packed { k, v, inline });
        ChunkCache::new(CacheSpec { packed, ..spec(1 << 20) }).err()
    };
    let unsupported = |error: Option<Error>, name: &str| {
        assert!(matches!(error, Some(Error::Unsupported { arg, .. }) if arg == name), "{error:?}");
    };
    unsupported(packed(Format::kivi_key(2, 32), Format::Fp8, false), "packed");
    unsupported(packed(Format::kivi_value(2, 8), Format::Fp8, true), "inline");
    unsupported(packed(Format::Uniform { bits: 5, group: None }, Format::Fp8, false), "bits");
    unsupported(ChunkCache::new(spec(1 << 20)).unwrap().pack::<bf16>(4).err(), "packed");
    let mut cache = ChunkCache::new(spec(1 << 20)).unwrap();
    assert!(matches!(cache.append(3, 0, 0, 1, 0), Err(Error::Size { arg: "branch", .. })));
    assert!(matches!(cache.append(0, 2, 0, 1, 0), Err(Error::Size { arg: "layer", .. })));
    assert!(matches!(cache.append(0, 0, 0, 65, 0), Err(Error::Size { arg: "most_rows", .. })));
    assert!(matches!(cache.overwrite(0, 0, 0), Err(Error::Unsupported { arg: "chunk", .. })));
    cache.append(0, 0, 0, 6, 0).unwrap();
    cache.append(0, 0, 1, 6, 6).unwrap();
    assert!(matches!(cache.append(0, 0, 0, 1, 0), Err(Error::Unsupported { arg: "chunk", .. })));
    cache.seal(0, 0, 0).unwrap();
    cache.seal(0, 0, 1).unwrap();
    assert!(matches!(cache.overwrite(0, 0, 0), Err(Error::Unsupported { arg: "chunk", .. })));
    // The first chunk does not fill its pages.
    assert!(matches!(cache.compress(0, 0, 4), Err(Error::Unsupported { arg: "kept", .. })));
    assert!(matches!(cache.truncate(0, 0, 13), Err(Error::Size { arg: "rows", .. })));
    assert!(matches!(cache.tables(&mut [0]), Err(Error::Length { arg: "words", .. })));
    cache.clear(0).unwrap();
    cache.append(0, 0, 0, 8, 0).unwrap();
    cache.seal(0, 0, 0).unwrap();
    let moves = cache.compress(0, 0, 4).unwrap().unwrap();
    assert!(matches!(cache.compact::<f32>(1, &moves), Err(Error::DType { arg: "T", .. })));
}

/// Two layers compressed by a policy, through the stages, over one pool: rows, positions and norms are those of what was
/// chosen. `shared`: another branch has the pages too, and keeps what it had.
fn compress(device: &TestDevice, policy: Policy, scores: [Option<&[f32]>; 2], shared: bool) -> Vec<Vec<Vec<i32>>> {
    let spec = CacheSpec { branches: 2, spare_pages: 8, ..spec(1 << 16) };
    let (heads, page_rows, tokens) = (spec.heads, spec.page_rows, 24);
    let mut cache = ChunkCache::new(spec).unwrap();
    let layout = cache.layout();
    let places = layout.pages * page_rows;
    // A value that says whose row it is.
    let number = |layer: usize, row: usize, head: usize| bf16::from_f32((layer * 100 + row * 2 + head) as f32);
    let mut k = vec![bf16::ZERO; places * heads * spec.k_dim];
    let mut v = vec![bf16::ZERO; places * heads * spec.v_dim];
    let mut positions = vec![-1i32; places * heads];
    let mut norms = vec![0f32; places * heads];
    for layer in 0..2 {
        // Chunks in turn, so that a layer's pages are not in order.
        for chunk in 0..3u64 {
            let placed = cache.append(0, layer, chunk, 8, chunk as u32 * 8).unwrap();
            let rows = placed.runs.iter().flat_map(|run| run.place as usize..run.place as usize + run.rows);
            for (i, place) in rows.enumerate() {
                let row = chunk as usize * 8 + i;
                for head in 0..heads {
                    let at = place * heads + head;
                    k[at * spec.k_dim..][..spec.k_dim].fill(number(layer, row, head));
                    v[at * spec.v_dim..][..spec.v_dim].fill(number(layer, row, head));
                    positions[at] = row as i32;
                    norms[at] = row as f32;
                }
            }
            cache.seal(0, layer, chunk).unwrap();
        }
    }
    if shared {
        cache.fork(0, 1).unwrap();
    }
    let before: Vec<Vec<u32>> = (0..2)
        .map(|layer| cache.view(0, layer).unwrap().flat_map(|segment| segment.pages.to_vec()).collect())
        .collect();
    let select = policy.select(2, heads, tokens).build(&DeviceInfo::H200).unwrap();
    let moves: Vec<_> =
        (0..2).map(|layer| cache.compress(0, layer, select.capacity()).unwrap().expect("more than is kept")).collect();
    assert!(moves.iter().all(|moves| moves.in_place != shared));
    let compact = cache.compact::<bf16>(2, &moves[0]).unwrap().build(&DeviceInfo::H200).unwrap();

    let words = |pages: &dyn Fn(usize) -> Vec<u32>| -> Vec<i32> {
        (0..2).flat_map(|layer| pages(layer).into_iter().map(|page| page as i32)).collect()
    };
    let input_pages = Buffer::of(device, &words(&|layer| moves[layer].input_pages.clone()), 0);
    let out_pages = Buffer::of(device, &words(&|layer| moves[layer].out_pages.clone()), 0);
    let scores = scores.map(|scores| scores.map(|scores| Buffer::of(device, scores, 0)));
    let weights = policy.weights(tokens).map(|weights| Buffer::of(device, &weights, 0));
    let mut indices = Buffer::<i32>::poisoned(device, select.lists() * select.capacity(), 0);
    let mut lengths = Buffer::<i32>::poisoned(device, select.lists(), 0);
    let mut workspace = Buffer::<u8>::poisoned(device, select.workspace_bytes() as usize, 0);
    let args = SelectArgs {
        importance: scores[0].as_ref().map(|scores| scores.input()),
        redundancy: scores[1].as_ref().map(|scores| scores.input()),
        weights: weights.as_ref().map(|weights| weights.input()),
        lengths: None,
        budgets: None,
        indices: indices.output(),
        counts: lengths.output(),
        status: None,
        workspace: Some(workspace.output()),
    };
    select.run(&device.stream(), args).unwrap();
    let (mut k, mut v) = (Buffer::of(device, &k, 0), Buffer::of(device, &v, 0));
    let (mut positions, mut norms) = (Buffer::of(device, &positions, 0), Buffer::of(device, &norms, 0));
    {
        let mut args = CompactArgs::of(indices.input());
        args.out_pages = shared.then(|| out_pages.input());
        args.k_out = Some(k.output());
        args.v_out = Some(v.output());
        args.positions_out = Some(positions.output());
        args.extras_out[0] = Some(norms.output());
        args.counts = Some(lengths.input());
        args.input_pages = Some(input_pages.input());
        compact.run(&device.stream(), args).unwrap();
    }
    let (k, v, positions, norms) = (k.read(), v.read(), positions.read(), norms.read());
    let lengths = lengths.read();
    let row_at = |pages: &[u32], layer: usize, head: usize, row: usize| -> i32 {
        let at = (pages[row / page_rows] as usize * page_rows + row % page_rows) * heads + head;
        let position = positions[at];
        let want = number(layer, position as usize, head);
        assert!(k[at * spec.k_dim..][..spec.k_dim].iter().all(|&x| x == want));
        assert!(v[at * spec.v_dim..][..spec.v_dim].iter().all(|&x| x == want));
        assert_eq!(norms[at], position as f32);
        position
    };
    let mut chosen = Vec::new();
    for layer in 0..2 {
        let segments: Vec<_> = cache.view(0, layer).unwrap().collect();
        assert_eq!((segments.len(), segments[0].state), (1, ChunkState::Compressed));
        let of_head = |head: usize| {
            let length = lengths[layer * heads + head] as usize;
            assert!(length <= segments[0].rows);
            (0..length).map(|row| row_at(segments[0].pages, layer, head, row)).collect::<Vec<_>>()
        };
        chosen.push((0..heads).map(of_head).collect());
        if shared {
            let all: Vec<i32> = (0..tokens).map(|row| row_at(&before[layer], layer, 1, row)).collect();
            assert_eq!(all, (0..tokens as i32).collect::<Vec<_>>());
        }
    }
    chosen
}

#[test]
fn policies_through_the_stages() {
    // Scores that choose the odd rows of head 0 and the even ones of head 1, in both layers.
    let importance: Vec<f32> = (0..96).map(|i| ((i % 24 + i / 24) % 2) as f32 + (i % 24) as f32 * 1e-3).collect();
    let redundancy: Vec<f32> = importance.iter().map(|x| -x).collect();
    let odd: Vec<i32> = (0..12).map(|i| 2 * i + 1).collect();
    let even: Vec<i32> = (0..12).map(|i| 2 * i).collect();
    for device in TestDevice::all() {
        for shared in [false, true] {
            let streaming = Policy::StreamingLlm { sink: 2, recent: 6 };
            let want: Vec<i32> = [0, 1].into_iter().chain(18..24).collect();
            assert_eq!(compress(&device, streaming, [None, None], shared), vec![vec![want; 2]; 2]);
            let by_keys = compress(&device, Policy::KeyDiff { budget: 12 }, [None, Some(&redundancy)], shared);
            assert_eq!(by_keys, vec![vec![odd.clone(), even.clone()]; 2]);
            let weight = PositionWeight::Exponential;
            let flow = Policy::FlowCache { budget: 12, lambda: 0.5, weight };
            let joint = compress(&device, flow, [Some(&importance), Some(&redundancy)], shared);
            assert_eq!(joint, vec![vec![odd.clone(), even.clone()]; 2]);
            for (policy, recent) in
                [(Policy::SnapKv { budget: 8, window: 4 }, 4), (Policy::H2o { heavy: 4, recent: 4 }, 4)]
            {
                for of_layer in compress(&device, policy, [Some(&importance), None], shared) {
                    for (head, rows) in of_layer.iter().enumerate() {
                        // The last ones, and of the others the best: the latest of the head's parity.
                        let best = (0..24 - recent).rev().filter(|row| row % 2 == 1 - head as i32);
                        let mut want: Vec<i32> = best.take(8 - recent as usize).chain(24 - recent..24).collect();
                        want.sort_unstable();
                        assert_eq!(*rows, want, "{policy:?}");
                    }
                }
            }
            let rkv = Policy::RKv { budget: 8, window: 4, lambda: 0.1 };
            let kept = compress(&device, rkv, [Some(&importance), Some(&redundancy)], shared);
            assert!(kept.iter().flatten().all(|rows| rows.len() == 8 && rows.ends_with(&[20, 21, 22, 23])));
            // Head 0 has the greater scores: it takes all but the floor of the other.
            let uneven: Vec<f32> =
                importance.iter().enumerate().map(|(i, x)| x + if i / 24 % 2 == 0 { 5.0 } else { 0.0 }).collect();
            let ada = Policy::AdaKv { budget: 6, window: 2, floor: 0.5 };
            for of_layer in compress(&device, ada, [Some(&uneven), None], shared) {
                // Of 4 each to compete for: half of all 8 and 2, and 2.
                assert_eq!(of_layer.iter().map(Vec::len).collect::<Vec<_>>(), [2 + 4 + 2, 2 + 2]);
            }
        }
    }
}

#[test]
fn policies_say_what_they_need() {
    let needs = |policy: Policy| {
        let scores = policy.scores();
        [scores.importance, scores.redundancy]
    };
    assert_eq!(needs(Policy::StreamingLlm { sink: 4, recent: 8 }), [false, false]);
    assert_eq!(needs(Policy::KeyDiff { budget: 8 }), [false, true]);
    assert_eq!(needs(Policy::SnapKv { budget: 8, window: 2 }), [true, false]);
    assert_eq!(needs(Policy::RKv { budget: 8, window: 2, lambda: 0.1 }), [true, true]);
    assert_eq!(Policy::H2o { heavy: 3, recent: 4 }.budget(), 7);
    let flow = |weight| Policy::FlowCache { budget: 8, lambda: 0.07, weight };
    assert_eq!(flow(PositionWeight::None).weights(9), None);
    assert_eq!(flow(PositionWeight::Gaussian).weights(9).unwrap().len(), 9);
}
