//! A contact sheet of images, as PNG.

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

/// Opens the file, before any work is done for it.
pub(crate) fn create(path: &Path) -> Result<std::fs::File> {
    std::fs::File::create(path).map_err(|e| Failure::failed(format!("{}: {e}", path.display())))
}

pub(crate) fn write(path: &Path, file: std::fs::File, images: &[f32], size: usize) -> Result<()> {
    let (width, height, sheet) = pixels(images, size);
    let failed = |e: png::EncodingError| Failure::failed(format!("{}: {e}", path.display()));
    let mut encoder = png::Encoder::new(BufWriter::new(file), width as u32, height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(&sheet).map_err(failed)?;
    writer.finish().map_err(failed)
}
