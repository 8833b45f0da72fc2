//! A contact sheet of images, as PNG.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use crate::failure::{Failure, Result};

/// Pixels between images.
const GAP: usize = 4;

/// `images`: `[count, size, size, 3]` from -1 to 1, clamped. Columns as for a square.
pub(crate) fn pixels(images: &[f32], size: usize) -> (usize, usize, Vec<u8>) {
    let count = images.len() / (size * size * 3);
    let columns = (1..).find(|n| n * n >= count).unwrap_or(1).max(1);
    let (width, height) = (columns * (size + GAP) + GAP, count.div_ceil(columns) * (size + GAP) + GAP);
    let mut sheet = vec![255u8; width * height * 3];
    for (i, row) in images.chunks_exact(size * 3).enumerate() {
        let (image, y) = (i / size, i % size);
        let (left, top) = (GAP + image % columns * (size + GAP), GAP + image / columns * (size + GAP));
        let to = &mut sheet[((top + y) * width + left) * 3..][..size * 3];
        for (to, value) in to.iter_mut().zip(row) {
            // A NaN is black.
            *to = ((value.clamp(-1.0, 1.0) + 1.0) * 127.5).round() as u8;
        }
    }
    (width, height, sheet)
}

/// A file that can be written, known before any work is done for it. What it held stays until then.
pub(crate) struct Target<'a> {
    path: &'a Path,
    file: File,
    is_new: bool,
}

impl<'a> Target<'a> {
    pub(crate) fn open(path: &'a Path) -> Result<Self> {
        let is_new = !path.exists();
        let opened = File::options().write(true).create(true).truncate(false).open(path);
        let file = opened.map_err(|e| Failure::failed(format!("{}: {e}", path.display())))?;
        Ok(Target { path, file, is_new })
    }

    /// An empty file would look like a result.
    pub(crate) fn give_up(self) {
        if self.is_new {
            let _ = std::fs::remove_file(self.path);
        }
    }

    pub(crate) fn write(&self, images: &[f32], size: usize) -> Result<()> {
        let (width, height, sheet) = pixels(images, size);
        let failed = |what: &dyn std::fmt::Display| Failure::failed(format!("{}: {what}", self.path.display()));
        self.file.set_len(0).map_err(|e| failed(&e))?;
        let mut encoder = png::Encoder::new(BufWriter::new(&self.file), width as u32, height as u32);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(|e| failed(&e))?;
        writer.write_image_data(&sheet).map_err(|e| failed(&e))?;
        writer.finish().map_err(|e| failed(&e))
    }
}
