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
    /// If the pass is checkpointed, nothing but the input is kept of it until [`Pass::backward`] gets there.
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
        let output = {
            let _guard = tch::no_grad_guard();
            arithmetic(self, input)?
        };
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
            let input = segment.input.f_detach()?.f_set_requires_grad(true)?;
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
