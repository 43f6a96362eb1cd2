//! libtorch's flash attention over examples of different lengths, without padding.

use std::sync::Mutex;

use tch::{Device, Kind, Tensor};

use super::ffi;
use crate::error::{Error, Result};
use crate::locking::locked;

/// The examples of a packed batch, as flash attention wants to know them.
pub struct PackedLengths<'a> {
    /// Number of tokens before each example, and of all tokens: `[examples + 1]`, int32, on the device.
    pub cumulative: &'a Tensor,
    /// Number of tokens of the longest example.
    pub longest: usize,
}

/// Which tokens of the examples attend to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlashQueries {
    /// Each.
    All {
        /// How far away a token may be that one attends to, if there is a limit.
        window: Option<i64>,
    },
    /// One of each example.
    OnePerExample,
}

/// Computes softmax(q kᵀ · scale) v within each example, with a gradient; keys and values are `[tokens, heads, head_size]`,
/// queries and the result as many or `[examples, heads, head_size]`, in bfloat16 on CUDA (`at::_flash_attention_forward`).
/// What dropout drops comes from libtorch's generator of the device.
///
/// # Errors
/// Fails where [`flash_attention_runs`] says no, and for head sizes that are no multiple of 8.
pub fn flash_attention(
    [query, key, value]: [&Tensor; 3],
    lengths: &PackedLengths,
    queries: FlashQueries,
    dropout: f64,
    scale: f64,
) -> Result<Tensor> {
    let tokens = lengths.cumulative;
    let (query_counts, most_queries, window) = match queries {
        FlashQueries::All { window } => (tokens.shallow_clone(), lengths.longest as i64, window),
        FlashQueries::OnePerExample => {
            (Tensor::f_arange(tokens.size()[0], (Kind::Int, tokens.device()))?, 1, None)
        }
    };
    let mut handles = [query, key, value, &query_counts, tokens].map(Tensor::shallow_clone);
    let [query, key, value, query_counts, token_counts] = handles.each_mut().map(Tensor::as_mut_ptr);
    let mut context = std::ptr::null_mut();
    // SAFETY: all five are live tensors, and `context` is valid for writing during the call.
    ffi::check(unsafe {
        ffi::child_tuning_flash_attention(
            query,
            key,
            value,
            query_counts,
            token_counts,
            most_queries,
            lengths.longest as i64,
            window.unwrap_or(-1),
            dropout,
            scale,
            &mut context,
        )
    })?;
    // SAFETY: the shim wrote a new tensor, which this handle owns.
    Ok(unsafe { Tensor::from_ptr(context) })
}

/// Returns whether flash attention runs on a device: on NVIDIA GPUs from compute capability 8.0 on. Found out by trying
/// it once on each device, since libtorch's build and the GPU must both have it.
pub fn flash_attention_runs(device: Device) -> bool {
    static TRIED: Mutex<Vec<(usize, bool)>> = Mutex::new(Vec::new());
    let Device::Cuda(index) = device else { return false };
    let mut tried = locked(&TRIED);
    if let Some((_, runs)) = tried.iter().find(|(known, _)| *known == index) {
        return *runs;
    }
    let attempt = || -> Result<Tensor> {
        let rows = Tensor::f_zeros([8, 1, 64], (Kind::BFloat16, device))?;
        let cumulative = Tensor::from_slice(&[0i32, 8]).f_to_device(device)?;
        let lengths = PackedLengths { cumulative: &cumulative, longest: 8 };
        flash_attention([&rows; 3], &lengths, FlashQueries::All { window: None }, 0.0, 1.0)
    };
    let outcome = tch::no_grad(attempt);
    // A full GPU says nothing about what it can do.
    if !outcome.as_ref().is_err_and(Error::is_out_of_memory) {
        tried.push((index, outcome.is_ok()));
    }
    outcome.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_there_is_no_gpu_it_does_not_run_and_says_so() {
        assert!(!flash_attention_runs(Device::Cpu));
        let rows = Tensor::zeros([8, 1, 64], (Kind::BFloat16, Device::Cpu));
        let cumulative = Tensor::from_slice(&[0i32, 3, 8]);
        let lengths = PackedLengths { cumulative: &cumulative, longest: 5 };
        for (queries, rows_of_queries) in [
            (FlashQueries::All { window: None }, &rows),
            (FlashQueries::OnePerExample, &rows.narrow(0, 0, 2)),
        ] {
            let error =
                flash_attention([rows_of_queries, &rows, &rows], &lengths, queries, 0.0, 1.0).unwrap_err();
            assert!(error.to_string().contains("_flash_attention_forward"), "{error}");
        }
    }
}
