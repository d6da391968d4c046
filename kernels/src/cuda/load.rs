//! Weights to the device: from files as they are, converted, or made there.

use super::device::{Arg, Device, DeviceVec, Grid, Kernel};
use super::memory::CudaWeight;
use super::upload::Uploader;
use crate::{GeneratedMatrix, KernelError, MatrixSource, WeightFormat, quant};

/// Elements of a matrix that are converted at a time when its format is not that of the device.
const CONVERTED_ELEMENTS: usize = 1 << 24;

/// Uploads matrices, stacked along their rows, as what activations are.
pub(super) fn matrix(
    device: &Device,
    uploader: &mut Uploader,
    parts: &[MatrixSource<'_>],
) -> Result<CudaWeight, KernelError> {
    let [rows, cols] = stacked(&parts.iter().map(|p| [p.rows(), p.cols()]).collect::<Vec<_>>())?;
    let weight = CudaWeight::new(device, rows, cols)?;
    let mut row = 0;
    for part in parts {
        let at = weight.memory.at(row * cols);
        match part.format() {
            format if format == device.activations().weight_format() => uploader.copy(part.bytes(), at)?,
            format => converted(device, uploader, format, part, at)?,
        }
        row += part.rows();
    }
    Ok(weight)
}

/// Makes random matrices on the device by the kernel `fill_normal`.
pub(super) fn generated(
    device: &Device,
    fill_normal: &Kernel,
    parts: &[GeneratedMatrix],
) -> Result<CudaWeight, KernelError> {
    let [rows, cols] = stacked(&parts.iter().map(|p| [p.rows, p.cols]).collect::<Vec<_>>())?;
    if let Some(part) = parts.iter().find(|part| !part.first_col.is_multiple_of(4)) {
        return Err(KernelError::Shape(format!("generated weights from column {}", part.first_col)));
    }
    let weight = CudaWeight::new(device, rows, cols)?;
    let quantiles = crate::generated::quantiles();
    let table: DeviceVec<f32> = device.alloc(
        quantiles.len(),
        "generating weights: end other programs on the GPU or choose a smaller model",
    )?;
    device.upload(quantiles, table.ptr())?;
    let mut row = 0;
    for part in parts {
        let grid = Grid::of(part.rows.min(65_535) as u32, 1, 256);
        device.launch(
            fill_normal,
            grid,
            &[
                Arg::Ptr(weight.memory.at(row * cols)),
                Arg::U64(part.key),
                Arg::U32(part.rows as u32),
                Arg::U32(cols as u32),
                Arg::Ptr(table.ptr()),
                Arg::U32(part.first_row as u32),
                Arg::U32((part.first_col / 4) as u32),
            ],
        );
        row += part.rows;
    }
    device.synchronize()?;
    Ok(weight)
}

/// Widens a matrix of another format and uploads it as what activations are, a piece at a time.
fn converted(
    device: &Device,
    uploader: &mut Uploader,
    format: WeightFormat,
    part: &MatrixSource<'_>,
    at: u64,
) -> Result<(), KernelError> {
    let stride = format.row_bytes(part.cols()).expect("a matrix source is whole rows");
    let rows = (CONVERTED_ELEMENTS / part.cols()).max(1);
    let mut floats = Vec::new();
    for (index, bytes) in part.bytes().chunks(rows * stride).enumerate() {
        floats.resize(bytes.len() / stride * part.cols(), 0.0);
        quant::dequantize(format, bytes, &mut floats)?;
        let bits = device.activations().rounded(&floats);
        let bytes: Vec<u8> = bits.into_iter().flat_map(u16::to_ne_bytes).collect();
        uploader.copy(&bytes, at + 2 * (index * rows * part.cols()) as u64)?;
    }
    Ok(())
}

/// Checks the shape of stacked matrices and returns it.
fn stacked(parts: &[[usize; 2]]) -> Result<[usize; 2], KernelError> {
    let cols = parts.first().map(|part| part[1]);
    let Some(cols) = cols.filter(|cols| *cols > 0 && cols.is_multiple_of(8)) else {
        return Err(KernelError::Shape(format!(
            "weights {parts:?}: the GPU needs columns in multiples of 8"
        )));
    };
    if parts.iter().any(|part| part[1] != cols) {
        return Err(KernelError::Shape(format!("weights {parts:?} do not stack")));
    }
    Ok([parts.iter().map(|part| part[0]).sum(), cols])
}
