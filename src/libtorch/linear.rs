//! The product of a linear layer, by the faster of the libraries that libtorch has for it.

use tch::{Device, Kind, Tensor};

use super::ffi;
use super::gradient_place::{GradientPlace, Operand, Wanted, gradients_of_sums};
use super::own_backward::{is_exclusive, with_backward_of_all};
use super::row_sums::{LISTS, column_sums, has_rows_of_fours};
use crate::error::Result;

/// A linear layer's weight, `[out, in]` in any layout, and its bias, `[out]`.
pub type LinearOperands<'a> = (Operand<'a>, Option<Operand<'a>>);

/// Computes input · weightᵀ + bias, with gradients of those that ask for one: input `[rows, in]`, weight `[out, in]` in any
/// layout, bias `[out]` (`torch.nn.functional.linear`).
///
/// libtorch takes MKL for float32 on the CPU. On an AMD processor with AVX-512 the products with the weights are 1.06 to 1.16
/// times as fast in oneDNN, which libtorch has for bfloat16; those that give the weights their gradients are not. In bfloat16
/// oneDNN itself adds the bias, which libtorch first copies to every row.
///
/// # Errors
/// Fails if shapes or types do not match.
pub fn linear(input: &Tensor, weight: Operand, bias: Option<Operand>) -> Result<Tensor> {
    let brings_gradients = weight.values.kind() == Kind::BFloat16
        && bias.is_some()
        && (input.device().is_cuda() || weight.place.is_some());
    let library = Library::faster();
    match brings_gradients || library.is_onednn_for(input, weight.values) {
        true => Ok(products(library, input, &[(weight, bias)], false)?.swap_remove(0)),
        false => Ok(input.f_linear(weight.values, bias.map(|bias| bias.values))?),
    }
}

/// Computes [`linear`] with the weights and biases of several layers of one type, and returns the input once more at the end, for a
/// residual: so that all that comes back to it is added up within matrix products, or right behind them.
///
/// # Errors
/// Fails if shapes or types do not match.
pub fn linears(input: &Tensor, layers: &[LinearOperands]) -> Result<Vec<Tensor>> {
    products(Library::faster(), input, layers, true)
}

/// Who computes products in float32 on the CPU. (In bfloat16 it is oneDNN, whoever is asked.)
#[derive(Clone, Copy, PartialEq)]
enum Library {
    /// Whom libtorch takes.
    Usual,
    /// oneDNN, where its bits do not depend on the number of threads, but for the gradients of weights.
    OneDnn,
}

impl Library {
    /// Returns the faster one for this processor: oneDNN on AMD's with AVX-512. Only AMD's have SSE4a.
    fn faster() -> Self {
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("sse4a") && std::is_x86_feature_detected!("avx512f") {
            return Library::OneDnn;
        }
        Library::Usual
    }

    /// Returns whether a product goes to oneDNN without libtorch's detours.
    fn is_onednn_for(self, input: &Tensor, weight: &Tensor) -> bool {
        is_onednn_for_halves(input, weight) || (self == Library::OneDnn && suits_onednn(input, weight))
    }

    /// Computes input · weightᵀ + bias, without a graph.
    fn product(self, input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self.is_onednn_for(input, weight) {
            true => onednn_product(input, weight, bias),
            false => Ok(input.f_linear(weight, bias)?),
        }
    }
}

/// A linear layer's matrix, and what backward has to do for it and its bias.
struct Layer {
    matrix: Tensor,
    to_weight: Wanted,
    to_bias: Option<Wanted>,
}

/// Computes products as libtorch does, but for the library and for the gradients. In those of biases its kernel for
/// sums over a few thousand rows in bfloat16 takes several times as long as reading them. Gradients that have a place in float32 are not
/// rounded on their way.
fn products(
    library: Library,
    input: &Tensor,
    layers: &[LinearOperands],
    has_residual: bool,
) -> Result<Vec<Tensor>> {
    let asks_input = input.requires_grad();
    let values = input.f_detach()?;
    let (mut outputs, mut inputs, mut own) = (Vec::new(), vec![input], Vec::new());
    for (weight, bias) in layers {
        let matrix = weight.values.f_detach()?;
        let added = bias.map(|bias| bias.values.f_detach()).transpose()?;
        outputs.push(library.product(&values, &matrix, added.as_ref())?);
        inputs.extend([weight.values].into_iter().chain(bias.map(|bias| bias.values)));
        own.push(Layer { matrix, to_weight: weight.wanted(), to_bias: bias.map(|bias| bias.wanted()) });
    }
    if has_residual {
        outputs.push(input.f_data()?);
    }
    with_backward_of_all(outputs, &inputs, move |gradients| {
        let mut to_input = Sum::new(gradients.get(own.len()));
        let mut to_weights = Vec::with_capacity(own.len());
        for (layer, gradient) in own.iter().zip(gradients) {
            if asks_input {
                to_input.add_product(library, gradient, &layer.matrix)?;
            }
            to_weights.push(layer.weight_gradient(gradient, &values)?);
        }
        let to_biases = bias_gradients(&own, gradients)?;
        let to_parameters = to_weights.into_iter().zip(to_biases);
        let to_parameters = to_parameters.flat_map(|(weight, bias)| [weight].into_iter().chain(bias));
        Ok(std::iter::once(to_input.total).chain(to_parameters).collect())
    })
}

/// What comes back to an input, added up.
struct Sum {
    /// Undefined before anything has come.
    total: Tensor,
    /// Whether its memory may be written to.
    is_own: bool,
}

impl Sum {
    fn new(first: Option<&Tensor>) -> Self {
        let is_own = first.is_some_and(is_exclusive);
        Self { total: first.map_or_else(Tensor::new, Tensor::shallow_clone), is_own }
    }

    /// Adds gradient · matrix, `[rows, out]` · `[out, in]`.
    fn add_product(&mut self, library: Library, gradient: &Tensor, matrix: &Tensor) -> Result<()> {
        let transposed = matrix.f_transpose(0, 1)?;
        self.total = match (self.total.defined(), self.is_own) {
            (false, _) => library.product(gradient, &transposed, None)?,
            (true, _) if library.is_onednn_for(gradient, &transposed) => {
                onednn_product(gradient, &transposed, None)?.f_add_(&self.total)?
            }
            (true, true) => self.total.f_addmm_(gradient, matrix)?,
            (true, false) => self.total.f_addmm(gradient, matrix)?,
        };
        self.is_own = true;
        Ok(())
    }
}

/// Sums the gradients of outputs over their rows: those of layers as wide as each other together, where kernels of our own do it.
fn bias_gradients(layers: &[Layer], gradients: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
    let rows = gradients.iter().take(layers.len()).map(Tensor::f_contiguous);
    let rows = rows.collect::<std::result::Result<Vec<_>, _>>()?;
    let wanted: Vec<&Wanted> = layers.iter().filter_map(|layer| layer.to_bias.as_ref()).collect();
    let alike = wanted.len() == layers.len()
        && layers.len() <= LISTS
        && (wanted.iter().zip(&rows))
            .all(|(wanted, own)| wanted.asked && sums_columns(wanted, own) && own.size() == rows[0].size());
    if alike {
        let sums = column_sums(&rows.iter().collect::<Vec<_>>())?;
        return Ok(gradients_of_sums(&sums, &wanted)?.into_iter().map(Some).collect());
    }
    let gradient = |(layer, rows): (&Layer, &Tensor)| {
        layer.to_bias.as_ref().map(|wanted| bias_gradient(wanted, rows)).transpose()
    };
    layers.iter().zip(&rows).map(gradient).collect()
}

fn bias_gradient(wanted: &Wanted, rows: &Tensor) -> Result<Tensor> {
    let sums = match wanted {
        Wanted { asked: false, .. } => return Ok(Tensor::new()),
        _ if sums_columns(wanted, rows) => column_sums(&[rows])?,
        Wanted { place: None, .. } => return Ok(rows.f_sum_dim_intlist(0, false, None)?),
        Wanted { place: Some(_), .. } => rows.f_sum_dim_intlist(0, true, Kind::Float)?,
    };
    Ok(gradients_of_sums(&sums, &[wanted])?.swap_remove(0))
}

/// Returns whether a kernel of our own sums columns: on a GPU, and on the CPU in tests, whose gradients have places.
fn sums_columns(wanted: &Wanted, rows: &Tensor) -> bool {
    (rows.device().is_cuda() || wanted.place.is_some()) && has_rows_of_fours(rows)
}

impl Layer {
    /// Computes gradientᵀ · values, `[out, in]`.
    fn weight_gradient(&self, gradient: &Tensor, values: &Tensor) -> Result<Tensor> {
        // In the layout in which the weight is stored.
        let is_stored = self.matrix.is_contiguous();
        let (left, right) = if is_stored { (gradient, values) } else { (values, gradient) };
        let left = left.f_transpose(0, 1)?;
        match &self.to_weight {
            Wanted { asked: false, .. } => Ok(Tensor::new()),
            Wanted { place: None, .. } if is_stored => Ok(left.f_mm(right)?),
            Wanted { place: None, .. } => Ok(left.f_mm(right)?.f_transpose(0, 1)?),
            Wanted { place: Some(place), .. } => {
                product_in_place(&left, right, place)?;
                Ok(Tensor::new())
            }
        }
    }
}

/// Computes a product of matrices in bfloat16 into the place of a gradient, in float32.
fn product_in_place(left: &Tensor, right: &Tensor, place: &GradientPlace) -> Result<()> {
    let target = place.numbers().f_view([left.size()[0], right.size()[1]])?;
    match (place.claim(), left.device().is_cuda()) {
        (false, true) => drop(left.f_mm_dtype_out(&target, right, Kind::Float)?),
        (true, true) => drop(target.shallow_clone().f_add_(&left.f_mm_dtype(right, Kind::Float)?)?),
        // Where libtorch has no product with another type: only tests come here.
        (adds, false) => {
            let product = left.f_to_kind(Kind::Float)?.f_mm(&right.f_to_kind(Kind::Float)?)?;
            let sum = if adds { product.f_add(&target)? } else { product };
            target.shallow_clone().f_copy_(&sum)?;
        }
    }
    Ok(())
}

/// Returns whether oneDNN computes a product in float32 and its bits do not depend on the number of threads.
///
/// With few rows, and many threads for the weights as backward reads them, it gives parts of a sum to several threads: found by
/// comparing the bits of 1 to 96 threads over the widths of the known encoders (oneDNN 3.10).
fn suits_onednn(input: &Tensor, weight: &Tensor) -> bool {
    let (&[rows, _], &[output, width]) = (&input.size()[..], &weight.size()[..]) else { return false };
    let is_transposed = weight.stride()[0] == 1;
    let is_split = rows <= 128 || (is_transposed && output % 1024 == 0 && width > 768);
    input.device() == Device::Cpu
        && [input, weight].iter().all(|tensor| tensor.kind() == Kind::Float)
        && !is_split
}

/// Returns whether a product in bfloat16 goes to oneDNN directly: on processors that have such products, with weights in rows. With
/// weights in columns libtorch's way to oneDNN is faster, by up to 1.5 with AMX.
fn is_onednn_for_halves(input: &Tensor, weight: &Tensor) -> bool {
    #[cfg(target_arch = "x86_64")]
    let has_products = std::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let has_products = false;
    has_products
        && input.device() == Device::Cpu
        && [input, weight].iter().all(|tensor| tensor.kind() == Kind::BFloat16)
        && weight.is_contiguous()
}

/// Computes input · weightᵀ + bias in oneDNN, without a graph (`torch.ops.mkldnn._linear_pointwise`).
fn onednn_product(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let mut handles = [input, weight].map(Tensor::shallow_clone);
    let [input, weight] = handles.each_mut().map(Tensor::as_mut_ptr);
    let mut bias = bias.map(Tensor::shallow_clone);
    let bias = bias.as_mut().map_or(std::ptr::null_mut(), Tensor::as_mut_ptr);
    let mut output = std::ptr::null_mut();
    // SAFETY: all are live tensors or null where one may be missing, and `output` is valid for writing during the call.
    ffi::check(unsafe { ffi::child_tuning_onednn_linear(input, weight, bias, &mut output) })?;
    // SAFETY: the shim wrote a new tensor, which this handle owns.
    Ok(unsafe { Tensor::from_ptr(output) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn difference(one: &Tensor, other: &Tensor) -> f64 {
        f64::try_from((one.to_kind(Kind::Double) - other.to_kind(Kind::Double)).abs().max()).unwrap()
    }

    /// Gradients of input, weight and bias, of which some ask for none, and the output.
    fn results(
        product: impl Fn(&Tensor, &Tensor, Option<&Tensor>) -> Tensor,
        inputs: &[Tensor; 3],
        asked: [bool; 3],
        is_transposed: bool,
    ) -> Vec<Tensor> {
        let leaves: Vec<Tensor> =
            inputs.iter().zip(asked).map(|(tensor, asked)| tensor.copy().set_requires_grad(asked)).collect();
        let weight = match is_transposed {
            true => leaves[1].transpose(0, 1),
            false => leaves[1].shallow_clone(),
        };
        let output = product(&leaves[0], &weight, Some(&leaves[2]));
        // A gradient without memory of its own, as the mean over rows gives it.
        output.square().mean_dim(0, false, Kind::Float).sum(Kind::Float).backward();
        let gradients = leaves.iter().zip(asked).filter(|(_, asked)| *asked).map(|(leaf, _)| leaf.grad());
        gradients.chain([output.detach()]).collect()
    }

    #[test]
    fn halves_get_the_gradients_that_libtorch_gives() {
        tch::manual_seed(1);
        for (rows, width, output) in [(300, 96, 32), (130, 64, 7)] {
            let shapes = [vec![rows, width], vec![output, width], vec![output]];
            let inputs = shapes.map(|shape| Tensor::randn(shape, CPU).to_kind(Kind::BFloat16));
            for asked in [[true; 3], [false, true, true], [true, false, false]] {
                let expected =
                    results(|input, weight, bias| input.linear(weight, bias), &inputs, asked, false);
                let product = |input: &Tensor, weight: &Tensor, bias: Option<&Tensor>| {
                    let layer = (Operand::plain(weight), bias.map(Operand::plain));
                    products(Library::Usual, input, &[layer], false).unwrap().swap_remove(0)
                };
                let found = results(product, &inputs, asked, false);
                assert_eq!(found.len(), expected.len());
                for (found, expected) in found.iter().zip(&expected) {
                    let largest = f64::try_from(expected.to_kind(Kind::Float).abs().max()).unwrap();
                    assert!(difference(found, expected) <= 0.01 * largest, "{rows} {width} {output}");
                }
            }
        }
    }

    /// Three layers, of which one is stored with its inputs first, and a residual: all gradients of two passes, the second of which
    /// adds to places.
    #[test]
    fn layers_over_one_input_bring_their_gradients_to_places_and_add_up_to_that_of_the_input() {
        tch::manual_seed(1);
        let random = |shape: &[i64]| Tensor::randn(shape, CPU).to_kind(Kind::BFloat16);
        let leaf = |shape: &[i64]| random(shape).set_requires_grad(true);
        let input = leaf(&[70, 24]);
        let weights = [leaf(&[16, 24]), leaf(&[24, 16]), leaf(&[16, 24])];
        let biases = [(); 3].map(|()| leaf(&[16]));
        let viewed = || [weights[0].shallow_clone(), weights[1].transpose(0, 1), weights[2].shallow_clone()];
        let factors = [16, 16, 16, 24].map(|width| random(&[70, width]));
        let loss = |outputs: &[Tensor]| -> Tensor {
            let terms =
                outputs.iter().zip(&factors).map(|(output, factor)| (output * factor).sum(Kind::Float));
            terms.sum()
        };
        let views = viewed();
        let plainly = views.iter().zip(&biases).map(|(weight, bias)| input.linear(weight, Some(bias)));
        loss(&plainly.chain([input.shallow_clone()]).collect::<Vec<_>>()).backward();
        let leaves = || std::iter::once(&input).chain(&weights).chain(&biases);
        let expected: Vec<Tensor> = leaves().map(|leaf| leaf.grad().to_kind(Kind::Float)).collect();
        leaves().for_each(|leaf| leaf.shallow_clone().zero_grad());

        let places: Vec<GradientPlace> = (leaves().skip(1))
            .map(|leaf| GradientPlace::new(Tensor::full([leaf.numel() as i64], 9.0, CPU)))
            .collect();
        for pass in 1..=2 {
            let views = viewed();
            let layers: Vec<LinearOperands> = (0..3)
                .map(|layer| {
                    let operand = |values, place: usize| Operand { values, place: Some(&places[place]) };
                    (operand(&views[layer], layer), Some(operand(&biases[layer], 3 + layer)))
                })
                .collect();
            loss(&linears(&input, &layers).unwrap()).backward();
            let found = std::iter::once(input.grad().to_kind(Kind::Float) / f64::from(pass))
                .chain(places.iter().map(|place| place.numbers() / f64::from(pass)));
            for (found, expected) in found.zip(&expected) {
                let largest = f64::try_from(expected.abs().max()).unwrap();
                assert!(difference(&found.view_as(expected), expected) <= 0.01 * largest, "pass {pass}");
            }
        }
        let untouched = weights.iter().chain(&biases).all(|leaf| {
            let gradient = leaf.grad();
            !gradient.defined() || f64::try_from(gradient.to_kind(Kind::Float).abs().max()).unwrap() == 0.0
        });
        assert!(untouched, "gradients went to places alone");
    }

    fn in_onednn(input: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let layer = (Operand::plain(weight), bias.map(Operand::plain));
        Ok(products(Library::OneDnn, input, &[layer], false)?.swap_remove(0))
    }

    /// The gradients of layers over one input, of which one has no bias and one's gradient is not asked for, and of a residual.
    #[test]
    fn layers_over_one_input_get_the_gradients_that_libtorch_gives() {
        tch::manual_seed(1);
        for (library, rows) in [(Library::Usual, 40), (Library::OneDnn, 40), (Library::OneDnn, 140)] {
            let leaf = |shape: &[i64], asked: bool| Tensor::randn(shape, CPU).set_requires_grad(asked);
            let input = leaf(&[rows, 24], true);
            let weights = [leaf(&[16, 24], true), leaf(&[24, 16], true), leaf(&[16, 24], false)];
            let biases = [Some(leaf(&[16], true)), None, Some(leaf(&[16], true))];
            let views = [weights[0].shallow_clone(), weights[1].transpose(0, 1), weights[2].shallow_clone()];
            let factors = [16, 16, 16, 24].map(|width| Tensor::randn([rows, width], CPU));
            let gradients = |outputs: Vec<Tensor>| -> Vec<Tensor> {
                let terms =
                    outputs.iter().zip(&factors).map(|(output, factor)| (output * factor).sum(Kind::Float));
                let loss: Tensor = terms.sum();
                let leaves = [&input, &weights[0], &weights[1]].into_iter().chain(biases.iter().flatten());
                Tensor::run_backward(&[loss], &leaves.collect::<Vec<_>>(), false, false)
            };
            let plainly = views.iter().zip(&biases).map(|(weight, bias)| input.linear(weight, bias.as_ref()));
            let expected = gradients(plainly.chain([input.shallow_clone()]).collect());
            let layers: Vec<LinearOperands> = (views.iter().zip(&biases))
                .map(|(weight, bias)| (Operand::plain(weight), bias.as_ref().map(Operand::plain)))
                .collect();
            let found = gradients(products(library, &input, &layers, true).unwrap());
            for (found, expected) in found.iter().zip(&expected) {
                let largest = f64::try_from(expected.abs().max()).unwrap();
                assert!(difference(found, expected) <= 1e-5 * largest, "{rows}");
            }
        }
    }

    #[test]
    fn onednn_gives_what_libtorch_gives() {
        tch::manual_seed(1);
        for (rows, width, output) in
            [(129, 64, 192), (300, 96, 32), (131, 7, 5), (2, 64, 64), (140, 1024, 1024)]
        {
            for is_transposed in [false, true] {
                let weight = if is_transposed { [width, output] } else { [output, width] };
                let inputs = [
                    Tensor::randn([rows, width], CPU),
                    Tensor::randn(weight, CPU),
                    Tensor::randn(output, CPU),
                ];
                for asked in [[true; 3], [false, true, true], [true, false, false], [false, true, false]] {
                    let of = |product: &dyn Fn(&Tensor, &Tensor, Option<&Tensor>) -> Tensor| {
                        results(product, &inputs, asked, is_transposed)
                    };
                    let expected = of(&|input, weight, bias| input.linear(weight, bias));
                    let found = of(&|input, weight, bias| in_onednn(input, weight, bias).unwrap());
                    assert_eq!(found.len(), expected.len());
                    for (found, expected) in found.iter().zip(&expected) {
                        assert_eq!(found.size(), expected.size());
                        let scale = f64::try_from(expected.abs().max()).unwrap();
                        let difference = difference(found, expected);
                        assert!(
                            difference <= 1e-5 * scale,
                            "{rows} {width} {output}: {difference} of {scale}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_is_recorded_without_a_gradient_and_shapes_are_checked() {
        let [input, weight] = [[200, 8], [4, 8]].map(|shape| Tensor::randn(shape, CPU));
        let of_weight = weight.copy().set_requires_grad(true);
        assert!(!in_onednn(&input, &weight, None).unwrap().requires_grad());
        assert!(in_onednn(&input, &of_weight, None).unwrap().requires_grad());
        assert!(!tch::no_grad(|| in_onednn(&input, &of_weight, None).unwrap()).requires_grad());
        for of_other_width in [Tensor::randn([4, 7], CPU), Tensor::randn([4, 9], CPU)] {
            assert!(in_onednn(&input, &of_other_width, None).is_err());
            assert!(linear(&input, Operand::plain(&of_other_width), None).is_err());
        }
    }

    #[test]
    fn few_rows_and_other_types_are_left_to_libtorch() {
        let ones = |shape: [i64; 2], kind| Tensor::ones(shape, (kind, Device::Cpu));
        let (rows, weight) = (ones([129, 16], Kind::Float), ones([8, 16], Kind::Float));
        assert!(suits_onednn(&rows, &weight));
        assert!(!suits_onednn(&rows.narrow(0, 0, 128), &weight));
        assert!(!suits_onednn(&rows.to_kind(Kind::BFloat16), &weight.to_kind(Kind::BFloat16)));
        assert!(!suits_onednn(&rows, &weight.to_kind(Kind::Double)));
        let wide = ones([1024, 1024], Kind::Float);
        assert!(suits_onednn(&wide, &wide));
        assert!(!suits_onednn(&wide, &wide.transpose(0, 1)));
    }
}
