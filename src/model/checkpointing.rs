//! Gradient checkpointing: of a segment of the network only the input is kept, and backward computes the rest again.

use tch::Tensor;

use super::pass::Pass;
use crate::error::Result;

/// The arithmetic of a segment, from its input to its output.
type Arithmetic<'a> = Box<dyn Fn(&Pass<'a>, &Tensor) -> Result<Tensor> + 'a>;

/// A segment that has been run forward without a graph.
pub(super) struct Segment<'a> {
    input: Tensor,
    /// A leaf: backward through the rest of the network ends in its gradient.
    output: Tensor,
    /// The number of the segment's first place of dropout.
    site: u32,
    arithmetic: Arithmetic<'a>,
}

impl<'a> Pass<'a> {
    /// Runs a layer of the encoder as a segment of the network, with this pass's noise: `[tokens, hidden]` to the same.
    ///
    /// # Errors
    /// Whatever the arithmetic finds wrong.
    pub fn layer(
        &self,
        states: &Tensor,
        arithmetic: impl Fn(&Pass<'a>, &Tensor) -> Result<Tensor> + 'a,
    ) -> Result<Tensor> {
        let layer = self.next_layer();
        self.segment(states, move |pass, states| arithmetic(pass, &pass.noisy(states, layer)?))
    }

    /// Runs a segment of the network, such as a layer: `[rows, width]` to the same.
    ///
    /// If the pass is checkpointed, nothing but the input is kept of it until [`Pass::backward`] gets there, which it does not
    /// where nothing trains in this segment and those before.
    ///
    /// # Errors
    /// Whatever the arithmetic finds wrong.
    pub fn segment(
        &self,
        input: &Tensor,
        arithmetic: impl Fn(&Pass<'a>, &Tensor) -> Result<Tensor> + 'a,
    ) -> Result<Tensor> {
        let Some(segments) = self.segments() else { return arithmetic(self, input) };
        let site = self.begin_segment(None)?;
        let output = match input.requires_grad() {
            true => {
                let _guard = tch::no_grad_guard();
                arithmetic(self, input)?
            }
            // Its graph shows whether anything trains in it.
            false => arithmetic(self, input)?,
        };
        if !input.requires_grad() && !output.requires_grad() {
            return Ok(output);
        }
        let output = output.f_detach()?.f_set_requires_grad(true)?;
        segments.borrow_mut().push(Segment {
            input: input.shallow_clone(),
            output: output.shallow_clone(),
            site,
            arithmetic: Box::new(arithmetic),
        });
        Ok(output)
    }

    /// Computes the gradients of a loss that came out of this pass.
    ///
    /// # Errors
    /// Fails if libtorch refuses an operation.
    pub fn backward(&self, loss: &Tensor) -> Result<()> {
        loss.f_backward()?;
        let Some(segments) = self.segments() else { return Ok(()) };
        while let Some(segment) = pop(segments) {
            let input = segment.input.f_detach()?.f_set_requires_grad(segment.input.requires_grad())?;
            self.begin_segment(Some(segment.site))?;
            let output = (segment.arithmetic)(self, &input)?;
            backward_from(&output, &segment.output.f_grad()?)?;
            drop(output);
            // Into the leaf before this segment, or the graph of what is not a segment, if anything there trains.
            if segment.input.requires_grad() {
                backward_from(&segment.input, &input.f_grad()?)?;
            }
        }
        Ok(())
    }
}

/// Takes the last segment, so that nothing is borrowed while it runs.
fn pop<'a>(segments: &std::cell::RefCell<Vec<Segment<'a>>>) -> Option<Segment<'a>> {
    segments.borrow_mut().pop()
}

/// Goes backward from an output whose gradient is known: the derivative of Σ output · gradient.
fn backward_from(output: &Tensor, gradient: &Tensor) -> Result<()> {
    Ok(output.f_mul(gradient)?.f_sum(output.kind())?.f_backward()?)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tch::{Device, Kind};

    use super::*;
    use crate::model::dropout::tests::batch;

    #[test]
    fn segments_are_computed_again_from_the_last_to_the_first_that_trains() {
        let batch = batch(&[2], 0);
        let options = (Kind::Float, Device::Cpu);
        let [frozen, trains, above] = [2.0, 3.0, 5.0].map(|value| Tensor::full([2, 1], value, options));
        let trains = trains.set_requires_grad(true);
        let runs: [Cell<usize>; 3] = Default::default();
        let pass = Pass::new(&[], &batch, None).checkpointed();
        let mut states = Tensor::ones([2, 1], options);
        for (count, weight) in runs.iter().zip([&frozen, &trains, &above]) {
            states = pass
                .segment(&states, |_, states| {
                    count.set(count.get() + 1);
                    Ok(states.f_mul(weight)?)
                })
                .unwrap();
        }
        pass.backward(&states.sum(Kind::Float)).unwrap();
        assert_eq!(runs.each_ref().map(Cell::get), [1, 2, 2]);
        assert_eq!(trains.grad(), Tensor::full([2, 1], 10.0, options));
    }
}
