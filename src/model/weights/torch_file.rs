//! A file that `torch.save` wrote, in either of its two forms.

use super::file::WeightsFile;
use super::stored_tensor::StoredTensor;
use super::{torch_archive, torch_legacy};
use crate::error::Result;

/// The longest pickle that is read; one of a thousand tensors has some hundred kilobytes.
pub(super) const LONGEST_PICKLE: u64 = 16 << 20;

/// Reads the names and places of the tensors.
///
/// # Errors
/// Fails if the file has neither form, is damaged, or asks for anything but tensors.
pub(super) fn read_table(file: &WeightsFile) -> Result<Vec<(String, StoredTensor)>> {
    let beginning = file.map(0..file.length().min(torch_legacy::BEGINNING.len() as u64))?;
    if beginning.starts_with(b"PK") {
        torch_archive::read_table(file)
    } else if *beginning == torch_legacy::BEGINNING {
        torch_legacy::read_table(file)
    } else {
        Err(file.fault(
            "is neither a ZIP archive nor a pickle of torch.save, or it is cut off; download it again, or load it in \
             Python and save the model with save_pretrained",
        ))
    }
}
