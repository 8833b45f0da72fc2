//! The files that training leaves: safetensors in f16, with the model's shape and a checksum among the metadata.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use nextscale::f16;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::failure::{Failure, Result};

const FORMAT: &str = "nextscale-emoji-1";

/// The shape of the models.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct Config {
    /// Pixels along a side.
    pub(crate) size: usize,
    /// Tokens along a side of each scale; of the last: pixels of the latent map.
    pub(crate) scales: Vec<usize>,
    pub(crate) phi_table: Vec<u8>,
    pub(crate) channels: usize,
    pub(crate) vocab: usize,
    /// Channels of the decoder's stages, and residual blocks in each.
    pub(crate) decoder: Vec<usize>,
    pub(crate) decoder_blocks: Vec<usize>,
    pub(crate) head_dim: usize,
    pub(crate) mlp: usize,
    /// Width and depth of the transformers.
    var: [usize; 2],
    ar: [usize; 2],
    draft: [usize; 2],
}

impl Config {
    pub(crate) fn side(&self) -> usize {
        *self.scales.last().expect("checked when the file was read")
    }

    /// Tokens of all scales.
    pub(crate) fn tokens(&self) -> usize {
        self.scales.iter().map(|side| side * side).sum()
    }

    /// The first token of a scale.
    pub(crate) fn first(&self, scale: usize) -> usize {
        self.scales[..scale].iter().map(|side| side * side).sum()
    }

    /// Width and depth of a transformer by its file's name.
    pub(crate) fn transformer(&self, part: &str) -> [usize; 2] {
        match part {
            "var" => self.var,
            "ar" => self.ar,
            _ => self.draft,
        }
    }

    /// What would make the engine divide by zero or run out of memory.
    fn makes_sense(&self) -> bool {
        let widths = [self.var, self.ar, self.draft];
        let sizes = [self.size, self.channels, self.vocab, self.head_dim, self.mlp];
        let all = sizes.iter().chain(&self.scales).chain(&self.decoder).chain(widths.as_flattened());
        all.clone().all(|size| (1..=1 << 16).contains(size))
            && !self.scales.is_empty()
            && self.scales.len() <= 32
            && self.scales.len() == self.phi_table.len()
            && self.decoder.len() == self.decoder_blocks.len()
            && (1..16).contains(&self.decoder.len())
            && self.size == self.side() << (self.decoder.len() - 1)
            && widths.iter().all(|[width, _]| width.is_multiple_of(self.head_dim))
    }
}

/// What can be asked for.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Classes {
    pub(crate) categories: Vec<String>,
    pub(crate) names: Vec<String>,
    /// Of each class.
    pub(crate) category_of: Vec<usize>,
    /// Images of each class that were trained on.
    pub(crate) counts: Vec<usize>,
}

/// One file in memory.
pub(crate) struct Weights {
    path: PathBuf,
    bytes: Vec<u8>,
    metadata: HashMap<String, String>,
    pub(crate) config: Config,
}

impl Weights {
    /// `part`: tokenizer, var, ar, draft or golden.
    pub(crate) fn open(folder: &Path, part: &str) -> Result<Self> {
        let path = folder.join(format!("{part}.safetensors"));
        let bytes = std::fs::read(&path).map_err(|e| Failure::failed(format!("{}: {e}", path.display())))?;
        let damaged =
            |what: &str| Failure::failed(format!("{}: damaged or not of this program: {what}", path.display()));
        let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| damaged(&e.to_string()))?;
        SafeTensors::deserialize(&bytes).map_err(|e| damaged(&e.to_string()))?;
        let metadata = metadata.metadata().clone().unwrap_or_default();
        let said = |key: &str| metadata.get(key).map_or("", String::as_str);
        if said("format") != FORMAT {
            return Err(damaged(&format!("its format is {:?}, not {FORMAT:?}", said("format"))));
        }
        if said("part") != part {
            return Err(damaged(&format!("it holds {:?}, not {part:?}", said("part"))));
        }
        let checksum = format!("crc32={:08x}", crc32fast::hash(&bytes[8 + header..]));
        if said("checksum") != checksum {
            return Err(damaged(&format!("its content has {checksum}, not {}", said("checksum"))));
        }
        let config: Config =
            serde_json::from_str(said("config")).map_err(|e| damaged(&format!("its shape cannot be read: {e}")))?;
        if !config.makes_sense() {
            return Err(damaged("its shape makes no sense"));
        }
        Ok(Weights { path, bytes, metadata, config })
    }

    pub(crate) fn classes(&self) -> Result<Classes> {
        let text = self.metadata.get("classes").map_or("", String::as_str);
        let classes: Classes = serde_json::from_str(text).map_err(|e| self.wrong(format!("its classes: {e}")))?;
        let count = classes.names.len();
        let known = |category: &usize| *category < classes.categories.len();
        if count == 0
            || [classes.category_of.len(), classes.counts.len()] != [count; 2]
            || !classes.category_of.iter().all(known)
        {
            return Err(self.wrong("its classes make no sense".into()));
        }
        Ok(classes)
    }

    fn wrong(&self, what: String) -> Failure {
        Failure::failed(format!("{}: {what}", self.path.display()))
    }

    /// The files belong together.
    pub(crate) fn require_config(&self, config: &Config) -> Result<()> {
        if self.config == *config { Ok(()) } else { Err(self.wrong("of another shape than the tokenizer".into())) }
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<(Dtype, Vec<u8>)> {
        let file = SafeTensors::deserialize(&self.bytes).map_err(|e| self.wrong(e.to_string()))?;
        let tensor = file.tensor(name).map_err(|_| self.wrong(format!("it has no tensor {name}")))?;
        if tensor.shape() != shape {
            return Err(self.wrong(format!("{name} has the shape {:?}, not {shape:?}", tensor.shape())));
        }
        Ok((tensor.dtype(), tensor.data().to_vec()))
    }

    /// f16 or f32 in the file.
    pub(crate) fn floats(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let (dtype, data) = self.tensor(name, shape)?;
        match dtype {
            Dtype::F16 => {
                Ok(bytemuck::pod_collect_to_vec::<u8, f16>(&data).iter().map(|value| value.to_f32()).collect())
            }
            Dtype::F32 => Ok(bytemuck::pod_collect_to_vec(&data)),
            other => Err(self.wrong(format!("{name} is of {other:?}, not f16 or f32"))),
        }
    }

    pub(crate) fn rows_of(&self, name: &str) -> Result<usize> {
        let file = SafeTensors::deserialize(&self.bytes).map_err(|e| self.wrong(e.to_string()))?;
        let tensor = file.tensor(name).map_err(|_| self.wrong(format!("it has no tensor {name}")))?;
        tensor.shape().first().copied().ok_or_else(|| self.wrong(format!("{name} is a number")))
    }

    /// i32 in the file.
    #[cfg_attr(not(test), allow(dead_code))]
    pub(crate) fn integers(&self, name: &str, shape: &[usize]) -> Result<Vec<i32>> {
        match self.tensor(name, shape)? {
            (Dtype::I32, data) => Ok(bytemuck::pod_collect_to_vec(&data)),
            (other, _) => Err(self.wrong(format!("{name} is of {other:?}, not i32"))),
        }
    }
}
