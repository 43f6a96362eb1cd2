//! Forward and backward passes of a GPU that are recorded once for each shape of batch and started again with one launch.
//!
//! Batches are filled up to one of a few shapes. A shape is recorded when it has come some times: the first passes let
//! libtorch choose its kernels and allocate what it keeps. The weights, whose memory never moves, the gradient buffer, the
//! batch, the key of dropout and the loss are the same tensors each time; the generator is seeded before each start, so that a
//! replay draws what the passes would draw. Masks, norm and optimizer step stay outside.

use std::collections::HashMap;

use tch::{Device, Tensor};

use super::hyperparameters::Hyperparameters;
use crate::child::GradientHooks;
use crate::data::{BatchShape, EncodedDataset, PackedBatch};
use crate::error::Result;
use crate::libtorch::{CudaGraph, OwnStream, flash_attention_runs, release_cached_memory};
use crate::model::{Classifier, Dropout, Pass, loss};

/// How often a shape runs before it is recorded.
pub const WARM_UP: usize = 3;

/// The most shapes that are recorded; others run as they come.
const MOST: usize = 32;

/// The recorded passes of a run.
pub struct StepGraphs {
    recorded: HashMap<BatchShape, Recorded>,
    seen: HashMap<BatchShape, usize>,
    warm_up: usize,
    max_length: usize,
    _stream: OwnStream,
}

struct Recorded {
    graph: CudaGraph,
    batch: PackedBatch,
    targets: Tensor,
    dropout: Dropout,
    loss: Tensor,
    collected: Vec<bool>,
}

impl StepGraphs {
    /// Prepares recording, if the run allows it and its device has it: bfloat16 on a GPU with flash attention, since padded
    /// attention has a shape for each batch, and a model that uses it. `warm_up` says how often a shape runs before it is
    /// recorded ([`WARM_UP`]).
    ///
    /// # Errors
    /// Fails if the program was built without the headers of CUDA.
    pub fn prepare(
        settings: &Hyperparameters,
        warm_up: usize,
        classifier: &Classifier,
    ) -> Result<Option<Self>> {
        let device = classifier.parameters.device();
        let Device::Cuda(index) = device else { return Ok(None) };
        let asked = settings.cuda_graphs && settings.recording_obstacle().is_none();
        if !asked || !flash_attention_runs(device) {
            return Ok(None);
        }
        if !classifier.own_shape()?.reads_packed_tokens {
            return Ok(None);
        }
        let _stream = OwnStream::enter(index)?;
        let max_length = settings.max_length;
        Ok(Some(Self { recorded: HashMap::new(), seen: HashMap::new(), warm_up, max_length, _stream }))
    }

    /// Returns how many shapes are recorded.
    pub fn shapes(&self) -> usize {
        self.recorded.len()
    }

    /// Gives up what is recorded, and its memory; shapes that come later may be recorded again.
    pub fn forget(&mut self) {
        self.recorded.clear();
        self.seen.clear();
    }

    /// Runs examples forward and backward, from a record where there is one; the hooks collect what comes out. Whoever calls
    /// has just made `dropout`, which seeds the device's generator. Returns the mean loss, on the device.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation or its recording.
    pub fn run(
        &mut self,
        classifier: &Classifier,
        weights: &[Tensor],
        hooks: &GradientHooks,
        (data, examples): (&EncodedDataset, &[usize]),
        dropout: Dropout,
    ) -> Result<Tensor> {
        let lengths: Vec<usize> = examples.iter().map(|&number| data.inputs[number].ids.len()).collect();
        let shape = BatchShape::of(&lengths, self.max_length);
        let (batch, targets) = data.filled_batch(examples, shape, classifier.parameters.device())?;
        if let Some(recorded) = self.recorded.get_mut(&shape) {
            recorded.batch.overwrite(&batch)?;
            recorded.targets.f_copy_(&targets)?;
            recorded.dropout.overwrite(&dropout)?;
            return recorded.replay(hooks);
        }
        let passes = || -> Result<Tensor> {
            let pass = Pass::new(weights, &batch, Some(dropout.clone())).collecting(hooks.places());
            let loss = loss(&classifier.logits(&pass)?, &targets, examples.len())?;
            pass.backward(&loss)?;
            Ok(loss.f_detach()?)
        };
        let seen = self.seen.entry(shape).or_default();
        *seen += 1;
        if *seen <= self.warm_up || self.recorded.len() == MOST {
            return passes();
        }
        // The memory of a record is its own, and cannot be what the passes before have left in the cache.
        release_cached_memory(classifier.parameters.device())?;
        let sharing = self.recorded.values().next().map(|recorded| &recorded.graph);
        let (graph, loss) = CudaGraph::record(sharing, passes)?;
        let recorded = Recorded { graph, batch, targets, dropout, loss, collected: hooks.collected() };
        // Recording has computed nothing yet.
        let mean_loss = recorded.replay(hooks)?;
        self.recorded.insert(shape, recorded);
        Ok(mean_loss)
    }
}

impl Recorded {
    fn replay(&self, hooks: &GradientHooks) -> Result<Tensor> {
        self.graph.replay()?;
        hooks.note_collected(&self.collected);
        // The next replay writes over it.
        let mut loss = self.loss.f_empty_like()?;
        loss.f_copy_(&self.loss)?;
        Ok(loss)
    }
}
