//! The emoji example: its engine against PyTorch, its samplers, and how it fails.
//!
//! On tiny weights that `python-ref/emoji/train.py --smoke` wrote, and on the real ones where the checkout has them.

#![cfg(all(feature = "attention", feature = "compression", feature = "quantization", feature = "verification"))]

#[path = "../examples/emoji/ar.rs"]
mod ar;
#[path = "../examples/emoji/compress.rs"]
mod compress;
#[cfg(feature = "cudarc-0_19")]
#[path = "../examples/emoji/cuda.rs"]
mod cuda;
#[path = "../examples/emoji/dense.rs"]
mod dense;
#[path = "../examples/emoji/device.rs"]
mod device;
#[path = "../examples/emoji/failure.rs"]
mod failure;
#[path = "../examples/emoji/options.rs"]
mod options;
#[path = "../examples/emoji/pointwise.rs"]
mod pointwise;
#[path = "../examples/emoji/program.rs"]
mod program;
#[path = "../examples/emoji/sampling.rs"]
mod sampling;
#[path = "../examples/emoji/sheet.rs"]
mod sheet;
#[path = "../examples/emoji/tokenizer.rs"]
mod tokenizer;
#[path = "../examples/emoji/transformer.rs"]
mod transformer;
#[path = "../examples/emoji/var.rs"]
mod var;
#[path = "../examples/emoji/weights.rs"]
mod weights;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use nextscale::dtype::Float;
use nextscale::f16;
use nextscale::verification::Rule;
use safetensors::SafeTensors;

use ar::{Causal, Sequential};
use device::Device;
use failure::Failure;
use sampling::{Image, Settings, Stages};
use tokenizer::Tokenizer;
use var::Var;
use weights::Weights;

// Embedded, so that a test binary can run on a machine that has nothing else.
const TINY: [(&str, &[u8]); 5] = [
    ("tokenizer", include_bytes!("emoji/tokenizer.safetensors")),
    ("var", include_bytes!("emoji/var.safetensors")),
    ("ar", include_bytes!("emoji/ar.safetensors")),
    ("draft", include_bytes!("emoji/draft.safetensors")),
    ("golden", include_bytes!("emoji/golden.safetensors")),
];

const PLAIN: Settings = Settings { guidance: 1.5, temperature: 1.0, top_k: 0, top_p: 1.0 };

/// A folder of its own with the tiny weights; removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("nextscale-emoji-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        TINY.iter()
            .for_each(|(part, bytes)| std::fs::write(folder.join(format!("{part}.safetensors")), bytes).unwrap());
        Folder(folder)
    }

    fn file(&self, part: &str) -> PathBuf {
        self.0.join(format!("{part}.safetensors"))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The real weights: in the folder that `NXS_EMOJI_WEIGHTS` names, or where the checkout has them.
fn real() -> Option<PathBuf> {
    let named = std::env::var_os("NXS_EMOJI_WEIGHTS").map(PathBuf::from);
    let committed = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/emoji/weights"));
    let folder = named.clone().unwrap_or_else(committed);
    (named.is_some() || folder.join("golden.safetensors").exists()).then_some(folder)
}

/// Devices with kernels.
fn kernels() -> Vec<Device> {
    let mut devices = Vec::new();
    #[cfg(feature = "emulate")]
    devices.push(Device::Emulated);
    match Device::open("cuda") {
        Ok(device) => devices.push(device),
        Err(why) => {
            assert!(std::env::var_os("NXS_REQUIRE_GPU").is_none(), "NXS_REQUIRE_GPU is set: {why}");
            eprintln!("SKIPPED on CUDA: {why}");
        }
    }
    devices
}

/// The emulator takes its time.
fn slow(_device: &Device) -> bool {
    #[cfg(feature = "emulate")]
    return matches!(_device, Device::Emulated);
    #[cfg(not(feature = "emulate"))]
    false
}

/// `‖a - b‖ / ‖b‖`
fn distance(a: impl IntoIterator<Item = f32>, b: &[f32]) -> f64 {
    let (mut error, mut norm, mut count) = (0f64, 0f64, 0);
    for (a, b) in a.into_iter().zip(b) {
        error += f64::from(a - b).powi(2);
        norm += f64::from(*b).powi(2);
        count += 1;
    }
    assert_eq!(count, b.len());
    (error / norm).sqrt()
}

/// What PyTorch said of one image.
struct Golden {
    weights: Weights,
    tokens: Vec<i32>,
    rows: Vec<usize>,
    image: Image,
}

impl Golden {
    fn open(folder: &Path) -> Self {
        let weights = Weights::open(folder, "golden").unwrap();
        let rows = weights.rows_of("golden.rows").unwrap();
        let classes = Weights::open(folder, "tokenizer").unwrap().classes().unwrap();
        let class = weights.integers("golden.class", &[1]).unwrap()[0] as usize;
        Golden {
            tokens: weights.integers("golden.tokens", &[weights.config.tokens()]).unwrap(),
            rows: weights.integers("golden.rows", &[rows]).unwrap().iter().map(|&row| row as usize).collect(),
            image: Image { condition: 1 + classes.categories.len() + class, seed: 3 },
            weights,
        }
    }

    fn logits(&self, part: &str) -> Vec<f32> {
        let shape = [self.rows.len(), self.weights.config.vocab];
        self.weights.floats(&format!("golden.{part}.logits"), &shape).unwrap()
    }

    /// Rows `first..` of `logits [.., vocab]` that PyTorch's are known of: (which, row).
    fn known(&self, first: usize, count: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        let known = self.rows.iter().enumerate().filter(move |(_, row)| (first..first + count).contains(*row));
        known.map(move |(which, row)| (which, row - first))
    }
}

/// The engine's answers are PyTorch's, within `close`.
fn check_goldens<A: Float>(device: &Device, folder: &Path, close: f64) {
    let golden = Golden::open(folder);
    let config = &golden.weights.config;
    let (vocab, l) = (config.vocab, config.scales.iter().map(|side| side * side));
    let open = |part| Weights::open(folder, part).unwrap();
    // Two entries, the other one of another class: what one gets must not depend on its place.
    let images = [Image { condition: 2, seed: 9 }, golden.image];

    let mut pixels = Tokenizer::<A>::load(device, &open("tokenizer"), 2).unwrap();
    let mut var = Var::<A>::load(device, &open("var"), 2, &PLAIN, None).unwrap();
    var.begin(device, &images).unwrap();
    let (expected, mut made) = (golden.logits("var"), vec![0f32; golden.rows.len() * vocab]);
    let inputs = golden.weights.floats("golden.inputs", &[config.tokens() - 1, config.channels]).unwrap();
    for (k, l) in l.enumerate() {
        let first = config.first(k);
        let logits = var.logits(device, k).map(|logits| device.download(logits).unwrap()).unwrap();
        for (which, row) in golden.known(first, l) {
            made[which * vocab..][..vocab].copy_from_slice(&logits[(l + row) * vocab..][..vocab]);
        }
        let tokens = &golden.tokens[first..first + l];
        var.force(device, k, &[tokens, tokens].concat()).unwrap();
        var.add(device, &mut pixels, k).unwrap();
        if k + 1 < config.scales.len() {
            // Both halves, all entries.
            let (next, count) = (var.next(device).unwrap(), config.scales[k + 1].pow(2) * config.channels);
            let known = &inputs[(first + l - 1) * config.channels..][..count];
            for half in 0..4 {
                let next = next[half * count..][..count].iter().map(|value| value.to_f32());
                assert!(distance(next, known) < close, "the input of scale {}", k + 1);
            }
        }
    }
    let off = distance(made, &expected);
    assert!(off < close, "VAR's logits are off by {off}");

    // The map, and the picture.
    let side = config.side();
    let map = golden.weights.floats("golden.f_hat", &[config.channels, side, side]).unwrap();
    assert!(distance(device.download(&pixels.f_hat).unwrap()[map.len()..].iter().copied(), &map) < close);
    let all = device.upload(&[&golden.tokens[..], &golden.tokens].concat()).unwrap();
    pixels.add_all(device, &all).unwrap();
    assert!(distance(device.download(&pixels.f_hat).unwrap()[map.len()..].iter().copied(), &map) < close);
    pixels.decode(device).unwrap();
    let picture = golden.weights.floats("golden.image", &[config.size, config.size, 3]).unwrap();
    let off = distance(pixels.images(device).unwrap()[picture.len()..].iter().copied(), &picture);
    assert!(off < close, "the picture is off by {off}");

    // Next-token models, one token a call and several.
    for part in ["ar", "draft"] {
        let expected = golden.logits(part);
        for rows in if slow(device) { vec![3] } else { vec![1, 3] } {
            let mut model = if part == "ar" {
                Causal::<A>::load(device, &open("ar"), "ar", 2, rows).unwrap()
            } else {
                Causal::<A>::load(device, &open("draft"), "draft", 2, rows).unwrap()
            };
            model.begin(device, &images).unwrap();
            let mut made = vec![0f32; golden.rows.len() * vocab];
            // Calls overlap: what is appended twice is written over.
            for at in (0..config.tokens()).step_by((rows - 1).max(1)) {
                let before =
                    |i: usize| (at + i).checked_sub(1).map_or(-1, |i| golden.tokens[i.min(config.tokens() - 1)]);
                let inputs: Vec<i32> = (0..2 * rows).map(|row| before(row % rows)).collect();
                let logits = model.logits(device, &inputs, &[at, at]).map(|logits| device.download(logits).unwrap());
                let logits = logits.unwrap();
                for (which, row) in golden.known(at, rows) {
                    made[which * vocab..][..vocab].copy_from_slice(&logits[(rows + row) * vocab..][..vocab]);
                }
            }
            let off = distance(made, &expected);
            assert!(off < close, "the logits of {part}, {rows} tokens a call, are off by {off}");
        }
    }
}

#[test]
fn the_engine_agrees_with_pytorch() {
    let folder = Folder::new("golden");
    check_goldens::<f32>(&Device::Host, &folder.0, 1e-5);
    if let Some(real) = real() {
        check_goldens::<f32>(&Device::Host, &real, 1e-4);
    }
}

#[test]
fn kernels_agree_with_pytorch() {
    let folder = Folder::new("golden-kernels");
    for device in kernels() {
        check_goldens::<f16>(&device, &folder.0, 4e-3);
        #[cfg(feature = "cudarc-0_19")]
        if let (Device::Cuda(_), Some(real)) = (&device, real()) {
            check_goldens::<f16>(&device, &real, 1e-2);
        }
    }
}

#[test]
fn a_model_with_another_weight_is_noticed() {
    let folder = Folder::new("golden-broken");
    // One multiplier of one head, a tenth more.
    rewrite(&folder.file("var"), |name, data, _| {
        if name == "layers.1.multiplier" {
            let scaled = f32::from_le_bytes(data[..4].try_into().unwrap()) * 1.1;
            data[..4].copy_from_slice(&scaled.to_le_bytes());
        }
    });
    let broken = std::panic::catch_unwind(|| check_goldens::<f32>(&Device::Host, &folder.0, 1e-5));
    assert!(broken.unwrap_err().downcast_ref::<String>().unwrap().contains("VAR's logits are off"));
}

/// The tokens of VAR and what the device drew them from.
fn draw<A: Float>(device: &Device, folder: &Path, images: &[Image], forced: Option<&[Vec<i32>]>) -> Vec<Vec<i32>> {
    draw_within::<A>(device, folder, images, forced, None)
}

fn draw_within<A: Float>(
    device: &Device,
    folder: &Path,
    images: &[Image],
    forced: Option<&[Vec<i32>]>,
    budget: Option<f32>,
) -> Vec<Vec<i32>> {
    let settings = Settings { guidance: 1.5, temperature: 1.0, top_k: 12, top_p: 0.9 };
    let mut pixels = Tokenizer::<A>::load(device, &Weights::open(folder, "tokenizer").unwrap(), images.len()).unwrap();
    let mut var =
        Var::<A>::load(device, &Weights::open(folder, "var").unwrap(), images.len(), &settings, budget).unwrap();
    var.begin(device, images).unwrap();
    (0..var.scales())
        .map(|k| {
            var.logits(device, k).unwrap();
            var.draw(device, k).unwrap();
            let drawn = var.tokens(device, k).unwrap();
            if let Some(forced) = forced {
                var.force(device, k, &forced[k]).unwrap();
            }
            var.add(device, &mut pixels, k).unwrap();
            drawn
        })
        .collect()
}

fn some_images(count: usize) -> Vec<Image> {
    (0..count).map(|i| Image { condition: 1 + i % 20, seed: 40 + i as u64 }).collect()
}

#[test]
fn kernels_draw_the_tokens_that_the_host_draws() {
    let folder = Folder::new("tokens-kernels");
    for device in kernels() {
        let images = some_images(if slow(&device) { 4 } else { 16 });
        let there = draw::<f16>(&device, &folder.0, &images, None);
        assert_eq!(there, draw::<f16>(&device, &folder.0, &images, None), "twice the same");
        let here = draw::<f32>(&Device::Host, &folder.0, &images, Some(&there)).concat();
        let there = there.concat();
        let same = here.iter().zip(&there).filter(|(here, there)| here == there).count();
        // f16 moves a logit by some thousandths: now and then a token's share of the interval ends elsewhere.
        assert!(same * 100 >= there.len() * 97, "{same} of {}", there.len());
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    let (folder, images) = (Folder::new("batch"), some_images(5));
    let all = draw::<f32>(&Device::Host, &folder.0, &images, None);
    let alone = draw::<f32>(&Device::Host, &folder.0, &images[3..4], None);
    for (all, alone) in all.iter().zip(&alone) {
        assert_eq!(all[3 * alone.len()..][..alone.len()], alone[..]);
    }
    assert_ne!(all[3][..16], all[3][16..32]);
}

/// Weights of heads of 64 elements, which compression asks for: random, of the tiny shape otherwise.
fn wide_heads(test: &str) -> Folder {
    let folder = Folder::new(test);
    for (part, _) in &TINY[..2] {
        let path = folder.file(part);
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let mut metadata = header.metadata().clone().unwrap();
        let config = metadata["config"].replace("\"head_dim\": 16", "\"head_dim\": 64");
        metadata.insert(
            "config".into(),
            config
                .replace("\"var\": [32, 2]", "\"var\": [64, 2]")
                .replace("[32, 2]", "[64, 2]")
                .replace("[16, 1]", "[64, 1]"),
        );
        let tokens = 30;
        let mut shapes: Vec<(String, Vec<usize>)> = Vec::new();
        if *part == "var" {
            let (w, v) = (64, 32);
            for (name, shape) in [
                ("conditions", vec![108, w]),
                ("positions", vec![tokens, w]),
                ("embed", vec![w, 8]),
                ("modulation", vec![6 * w, w]),
                ("head.modulation", vec![2 * w, w]),
                ("head.modulation.bias", vec![2 * w]),
                ("head", vec![v, w]),
            ] {
                shapes.push((name.into(), shape));
            }
            for l in 0..2 {
                for (name, shape) in [
                    ("modulation", vec![6, w]),
                    ("multiplier", vec![1]),
                    ("qkv", vec![3 * w, w]),
                    ("out", vec![w, w]),
                    ("up", vec![2 * w, w]),
                    ("down", vec![w, 2 * w]),
                ] {
                    shapes.push((format!("layers.{l}.{name}"), shape));
                }
            }
        }
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let mut word = 0;
        let mut random = |name: &str| {
            word += 1;
            let uniform = nextscale::philox::uniform(nextscale::philox::block(5, word, 0, 0)[0]);
            // Sharp attention: what is dropped shows.
            if name.ends_with("multiplier") { 8.0 } else { (uniform - 0.5) * 0.8 }
        };
        let tensors: Vec<_> = match *part {
            "var" => shapes
                .into_iter()
                .map(|(name, shape)| {
                    let count: usize = shape.iter().product();
                    let data = (0..count).flat_map(|_| f16::from_f32(random(&name)).to_le_bytes()).collect::<Vec<u8>>();
                    (name, safetensors::Dtype::F16, shape, data)
                })
                .collect(),
            _ => {
                file.tensors().into_iter().map(|(n, t)| (n, t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect()
            }
        };
        std::fs::write(&path, file_of(metadata, &tensors)).unwrap();
    }
    folder
}

#[test]
fn a_compressed_cache() {
    let folder = wide_heads("budget");
    let images = some_images(3);
    let run = |budget| draw_within::<f32>(&Device::Host, &folder.0, &images, None, budget);
    let whole = run(None);
    // All rows are scored, selected and moved, and nothing changes.
    assert_eq!(run(Some(1.0)), whole);
    let half = run(Some(0.5));
    assert_eq!(half, run(Some(0.5)));
    assert_ne!(half, whole);
    // The first scale has nothing behind it.
    assert_eq!(half[0], whole[0]);
    for device in kernels() {
        let there = draw_within::<f16>(&device, &folder.0, &images, None, Some(0.5));
        let here = draw_within::<f32>(&Device::Host, &folder.0, &images, Some(&there), Some(0.5));
        let (there, here) = (there.concat(), here.concat());
        let same = here.iter().zip(&there).filter(|(here, there)| here == there).count();
        assert!(same * 100 >= there.len() * 90, "{same} of {}", there.len());
    }
    let said = program(&folder, &["--kv-budget", "0.5", "--count", "2"]).unwrap();
    assert!(said.contains("change of the picture: ") && !said.contains("picture: none"), "{said}");
    // 7 of the 14 tokens before the last scale.
    assert!(said.contains("(50.0%)"), "{said}");
    let said = program(&folder, &["--kv-budget", "1", "--count", "2"]).unwrap();
    assert!(said.contains("picture: none") && said.contains("(100.0%)"), "{said}");
}

const IMAGES: usize = 4000;
const FIRST: usize = 3;

/// The first tokens of many images of one class.
fn first_tokens(folder: &Path, settings: &Settings, draft: Option<Rule>, seed: u64) -> Vec<Vec<i32>> {
    let device = Device::Host;
    let open = |part| Weights::open(folder, part).unwrap();
    let (ar, small) = (open("ar"), open("draft"));
    let draft = draft.map(|rule| (&small, 2, rule));
    let mut model = Sequential::<f32>::load(&device, &ar, draft, 100, settings).unwrap();
    let mut all = Vec::new();
    for batch in 0..IMAGES / 100 {
        let seeds = (0..100).map(|i| seed + (batch * 100 + i) as u64);
        let images: Vec<Image> = seeds.map(|seed| Image { condition: 7, seed }).collect();
        let (tokens, counts) = model.generate(&device, &images, FIRST, &mut Stages::untimed(), |_| ()).unwrap();
        assert!(tokens.iter().all(|tokens| tokens.len() == FIRST));
        assert_eq!(counts.emitted, 100 * FIRST);
        assert_eq!(draft.is_some(), counts.calls < FIRST || counts.drafted > 0);
        all.extend(tokens);
    }
    all
}

/// How many standard deviations the chi-square of two samples lies above its mean: of each token, and of neighbours.
fn farthest(a: &[Vec<i32>], b: &[Vec<i32>], vocab: usize) -> f64 {
    let mut farthest = f64::NEG_INFINITY;
    for first in 0..FIRST {
        for last in first..(first + 2).min(FIRST) {
            let cells = if first == last { vocab } else { vocab * vocab };
            let count = |sample: &[Vec<i32>]| {
                let mut counts = vec![0f64; cells];
                for tokens in sample {
                    let pair = tokens[first] as usize * if first == last { 0 } else { vocab };
                    counts[pair + tokens[last] as usize] += 1.0;
                }
                counts
            };
            let (a, b) = (count(a), count(b));
            // Cells with few of both go together.
            let (mut chi, mut used, mut rest) = (0.0, 0.0, (0.0, 0.0));
            let mut add = |a: f64, b: f64| {
                chi += (a - b) * (a - b) / (a + b);
                used += 1.0;
            };
            for (&a, &b) in a.iter().zip(&b) {
                if a + b >= 12.0 { add(a, b) } else { rest = (rest.0 + a, rest.1 + b) }
            }
            if rest.0 + rest.1 > 0.0 {
                add(rest.0, rest.1);
            }
            let freedom: f64 = used - 1.0;
            assert!(freedom > 2.0);
            farthest = farthest.max((chi - freedom) / (2.0 * freedom).sqrt());
        }
    }
    farthest
}

#[test]
fn speculative_sampling_has_the_law_of_the_target() {
    let folder = Folder::new("law");
    let plain = first_tokens(&folder.0, &PLAIN, None, 0);
    let drafted = first_tokens(&folder.0, &PLAIN, Some(Rule::Reject), 1 << 32);
    let off = farthest(&plain, &drafted, 32);
    assert!(off < 4.5, "{off}");
    // That would not pass with another law.
    let other = first_tokens(&folder.0, &Settings { temperature: 0.8, ..PLAIN }, Some(Rule::Reject), 1 << 32);
    let off = farthest(&plain, &other, 32);
    assert!(off > 10.0, "{off}");
    // Truncated on both sides.
    let cut = Settings { top_k: 9, top_p: 0.8, ..PLAIN };
    let (plain, drafted) =
        (first_tokens(&folder.0, &cut, None, 0), first_tokens(&folder.0, &cut, Some(Rule::Reject), 1 << 32));
    let off = farthest(&plain, &drafted, 32);
    assert!(off < 4.5, "{off}");
    // By the rule of matching, drafts do not show at all.
    assert_eq!(first_tokens(&folder.0, &cut, Some(Rule::Match), 0), plain);
}

#[test]
fn whole_images_are_the_same_with_matched_drafts() {
    let (folder, images) = (Folder::new("match"), some_images(6));
    let open = |part| Weights::open(&folder.0, part).unwrap();
    let (ar, small) = (open("ar"), open("draft"));
    let run = |device: &Device, draft| {
        let mut model = Sequential::<f32>::load(device, &ar, draft, images.len(), &PLAIN).unwrap();
        model.generate(device, &images, usize::MAX, &mut Stages::untimed(), |_| ()).unwrap()
    };
    let (plain, counts) = run(&Device::Host, None);
    assert_eq!((counts.calls, counts.emitted), (ar.config.tokens(), 6 * ar.config.tokens()));
    let (drafted, counts) = run(&Device::Host, Some((&small, 4, Rule::Match)));
    assert_eq!(plain, drafted);
    // A token of its own a step, but for an image's last one where that ends with an accepted draft.
    let own = counts.emitted - counts.accepted;
    assert!(counts.accepted > 0 && own <= counts.steps && own + images.len() >= counts.steps, "{counts:?}");
}

#[test]
fn kernels_run_every_sampler() {
    let folder = Folder::new("samplers");
    let open = |part| Weights::open(&folder.0, part).unwrap();
    let (ar, small) = (open("ar"), open("draft"));
    for device in kernels() {
        for draft in [None, Some((&small, 3, Rule::Reject))] {
            let mut model = Sequential::<f16>::load(&device, &ar, draft, 2, &PLAIN).unwrap();
            let most = if slow(&device) { 9 } else { usize::MAX };
            let mut run = || model.generate(&device, &some_images(2), most, &mut Stages::untimed(), |_| ()).unwrap().0;
            let tokens = run();
            assert!(tokens.iter().flatten().all(|&token| (0..ar.config.vocab as i32).contains(&token)));
            assert_eq!(tokens, run());
        }
    }
}

/// Changes tensors of a file (name, data, shape) and mends its checksum.
fn rewrite(path: &Path, change: impl Fn(&str, &mut Vec<u8>, &mut Vec<usize>)) {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut metadata = header.metadata().clone().unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> = file
        .tensors()
        .into_iter()
        .filter_map(|(name, view)| {
            let (mut data, mut shape) = (view.data().to_vec(), view.shape().to_vec());
            change(&name, &mut data, &mut shape);
            (!data.is_empty()).then_some((name, view.dtype(), shape, data))
        })
        .collect();
    std::fs::write(path, file_of(std::mem::take(&mut metadata), &tensors)).unwrap();
}

/// A file with the right checksum.
fn file_of(
    mut metadata: std::collections::HashMap<String, String>,
    tensors: &[(String, safetensors::Dtype, Vec<usize>, Vec<u8>)],
) -> Vec<u8> {
    let write = |metadata: &std::collections::HashMap<String, String>| {
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            (name.clone(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        safetensors::serialize(views, Some(metadata.clone())).unwrap()
    };
    let draft = write(&metadata);
    let (header, _) = SafeTensors::read_metadata(&draft).unwrap();
    metadata.insert("checksum".into(), format!("crc32={:08x}", crc32fast::hash(&draft[8 + header..])));
    write(&metadata)
}

/// The program on these arguments and the tiny weights, writing `out.png`.
fn program(folder: &Folder, args: &[&str]) -> Result<String, Failure> {
    let mut all: Vec<OsString> = vec!["--weights".into(), folder.0.clone().into(), "--quiet".into()];
    all.extend(["--out".into(), folder.0.join("out.png").into(), "--top-k".into(), "12".into()]);
    all.extend(args.iter().map(OsString::from));
    program::run(all.into_iter())
}

/// The program fails with this exit code and says this; no picture is left.
fn refused(folder: &Folder, args: &[&str], code: u8, says: &str) {
    let failure = program(folder, args).unwrap_err();
    assert!(failure.to_string().contains(says), "{failure}");
    assert_eq!(failure.exit_code(), code, "{failure}");
    assert!(!folder.0.join("out.png").exists());
}

#[test]
fn the_same_seed_gives_the_same_picture() {
    let folder = Folder::new("seed");
    let run = |args: &[&str]| {
        program(&folder, args).unwrap();
        std::fs::read(folder.0.join("out.png")).unwrap()
    };
    let picture = run(&["--seed", "7", "--count", "3", "--category", "animals"]);
    assert_eq!(picture, run(&["--seed", "7", "--count", "3", "--category", "animals"]));
    assert_ne!(picture, run(&["--seed", "8", "--count", "3", "--category", "animals"]));
    assert_ne!(picture, run(&["--seed", "7", "--count", "3", "--category", "food"]));

    let decoder = png::Decoder::new(std::io::Cursor::new(&picture));
    let reader = decoder.read_info().unwrap();
    // Three images of 16 pixels in two columns.
    assert_eq!((reader.info().width, reader.info().height), (2 * 20 + 4, 2 * 20 + 4));
}

#[test]
fn every_sampler_writes_a_sheet_and_says_where_time_went() {
    let folder = Folder::new("program");
    let said = program(&folder, &["--count", "18"]).unwrap();
    for stage in ["loading", "transformer", "sampling", "multi-scale step", "decoder", "all", "out.png"] {
        assert!(said.contains(stage), "{said}");
    }
    let said = program(&folder, &["--count", "2", "--sampler", "ar", "--category", "cat-face"]).unwrap();
    assert!(said.contains("1.00 tokens a step"), "{said}");
    let said = program(&folder, &["--count", "2", "--sampler", "speculative", "--repeat", "2"]).unwrap();
    for part in ["acceptance rate", "tokens a step", "speed-up", "verification", "launch by launch"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(program(&folder, &["--help"]).unwrap().contains("usage"));
    assert!(program(&folder, &["--list"]).unwrap().contains("animals: animal-amphibian"));
}

#[test]
fn bad_requests_are_refused() {
    let folder = Folder::new("requests");
    refused(&folder, &["--category", "spaceships"], 2, "--category spaceships: none of smileys, people");
    refused(&folder, &["--sampler", "gan"], 2, "--sampler gan");
    refused(&folder, &["--rule", "block"], 2, "--rule block");
    refused(&folder, &["--count", "0"], 2, "--count");
    refused(&folder, &["--count", "x"], 2, "x");
    refused(&folder, &["--top-p", "0"], 2, "--top-p");
    refused(&folder, &["--guidance", "nan"], 2, "--guidance");
    refused(&folder, &["--temperature", "-1"], 2, "--temperature");
    refused(&folder, &["--drafts", "0"], 2, "--drafts");
    refused(&folder, &["--kv-budget", "0"], 2, "--kv-budget");
    refused(&folder, &["--colour", "red"], 2, "--colour");
    refused(&folder, &["--device", "tpu"], 2, "--device tpu: not one of host");
    refused(&folder, &["--device", "cuda:x"], 2, "\"x\" is not an ordinal");
    // No such device, whatever this build has and this machine.
    refused(&folder, &["--device", "cuda:1000"], 1, "--device cuda");
    // The last --out counts.
    let nowhere = folder.0.join("no/such/folder.png");
    refused(&folder, &["--out", nowhere.to_str().unwrap()], 1, "folder.png: ");
    refused(&folder, &["--out", folder.0.to_str().unwrap()], 1, "directory");
}

#[test]
fn bad_files_are_refused() {
    let folder = Folder::new("files");
    refused(&folder, &["--weights", "/no/such/folder"], 1, "/no/such/folder/tokenizer.safetensors: ");
    let (_, whole) = TINY[1];
    let var = folder.file("var");

    std::fs::remove_file(&var).unwrap();
    refused(&folder, &[], 1, "var.safetensors: ");
    std::fs::write(&var, &whole[..whole.len() - 100]).unwrap();
    refused(&folder, &[], 1, "var.safetensors: damaged");
    std::fs::write(&var, &whole[..5]).unwrap();
    refused(&folder, &[], 1, "var.safetensors: damaged");
    std::fs::write(&var, b"hello").unwrap();
    refused(&folder, &[], 1, "var.safetensors: damaged");
    // One bit of a weight.
    let mut flipped = whole.to_vec();
    *flipped.last_mut().unwrap() ^= 4;
    std::fs::write(&var, &flipped).unwrap();
    refused(&folder, &[], 1, "its content has crc32=");
    // Another model's file.
    std::fs::write(&var, TINY[2].1).unwrap();
    refused(&folder, &[], 1, "it holds \"ar\", not \"var\"");
    // One tensor of another shape, and one that is not there, in files that are whole.
    std::fs::write(&var, whole).unwrap();
    rewrite(&var, |name, data, shape| {
        if name == "head" {
            shape[0] -= 1;
            data.truncate(shape.iter().product::<usize>() * 2);
        }
    });
    refused(&folder, &[], 1, "head has the shape [31, 32], not [32, 32]");
    std::fs::write(&var, whole).unwrap();
    rewrite(&var, |name, data, _| {
        if name == "layers.0.qkv" {
            data.clear();
        }
    });
    refused(&folder, &[], 1, "it has no tensor layers.0.qkv");
    std::fs::write(&var, whole).unwrap();
    program(&folder, &["--count", "1"]).unwrap();
    // What was there before outlives a run that fails.
    let picture = std::fs::read(folder.0.join("out.png")).unwrap();
    std::fs::remove_file(&var).unwrap();
    program(&folder, &[]).unwrap_err();
    assert_eq!(std::fs::read(folder.0.join("out.png")).unwrap(), picture);
}
