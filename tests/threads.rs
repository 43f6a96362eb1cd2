//! No bit of a training in float32 on the CPU depends on the number of threads. A test program of its own, since how
//! libtorch adds is decided before its first product, for the whole process.

use std::sync::atomic::AtomicBool;

use child_tuning::data::EncodedDataset;
use child_tuning::libtorch::{Operand, keep_the_order_of_sums, linear};
use child_tuning::method::{MethodSpec, Preset};
use child_tuning::model::{Classifier, Labels};
use child_tuning::train::{Control, Hyperparameters, Trainer, prepare};
use child_tuning::verify::{Shape, measured_method, random_data};
use tch::{Device, Kind, Tensor};

/// A random model with dropout and random data.
fn start() -> (Classifier, EncodedDataset) {
    let labels = Labels::Classes(vec!["0".into(), "1".into()]);
    // Long and short, so that attention has rectangles of several lengths.
    let lengths: Vec<usize> = (0..64).map(|example| 5 + example * 37 % 124).collect();
    let data = random_data(&lengths, Shape::SMALL.vocabulary, Shape::SMALL.vocabulary, &labels);
    let mut model = Classifier::untrained(Shape::SMALL.config(0.1, 0.06), labels, Device::Cpu).unwrap();
    model.reset(1).unwrap();
    (model, data)
}

/// Works with so many threads of this program's, and of libtorch's.
fn with_threads<T: Send>(threads: usize, of_libtorch: usize, work: impl FnOnce() -> T + Send) -> T {
    tch::set_num_threads(of_libtorch as i32);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

/// Four steps with dropout; returns the weights.
fn trained(method: &str, threads: usize) -> Tensor {
    with_threads(threads, threads, || {
        let (mut model, data) = start();
        let prepared = measured_method(method, 0.3, &model).unwrap();
        let settings = Hyperparameters { learning_rate: 1e-3, ..Hyperparameters::default() };
        let mut trainer = Trainer::new(&mut model, &data, &settings, prepared, 1).unwrap();
        let numbers: Vec<usize> = (0..data.len()).collect();
        for batch in numbers.chunks(settings.batch_size) {
            let _loss = trainer.step(batch).unwrap();
        }
        drop(trainer);
        model.parameters.values_copy().unwrap()
    })
}

/// Output of a linear layer of given rows, width and width of output, and the gradients of its input and weights.
fn layer([rows, width, output]: [i64; 3], threads: usize) -> [Tensor; 3] {
    with_threads(1, threads, || {
        let wave = |shape: [i64; 2]| {
            Tensor::arange(shape[0] * shape[1], (Kind::Float, Device::Cpu)).sin().reshape(shape)
        };
        let input = wave([rows, width]).set_requires_grad(true);
        let weight = wave([output, width]).set_requires_grad(true);
        let product = linear(&input, Operand::plain(&weight), None).unwrap();
        product.square().sum(Kind::Float).backward();
        [product.detach(), input.grad(), weight.grad()]
    })
}

/// The hash of the mask that a method begins with.
fn mask(method: &str, threads: usize, of_libtorch: usize) -> String {
    with_threads(threads, of_libtorch, || {
        let (mut model, data) = start();
        let method =
            serde_yaml::from_str::<MethodSpec>(method).unwrap().resolve(Preset::Paper).unwrap().remove(0);
        let interrupted = AtomicBool::new(false);
        let mut control = Control { interrupted: &interrupted, report: &mut |_| {} };
        let settings = Hyperparameters::default();
        let prepared = prepare(&mut model, &data, method.as_ref(), &settings, 1, &mut control).unwrap();
        prepared.mask.unwrap().child().unwrap().sha256()
    })
}

#[test]
fn no_bit_depends_on_the_number_of_threads() {
    let strict = keep_the_order_of_sums();
    for method in ["fish_mask: {p: 0.1, examples: 9}", "sift: {examples: 9}", "magnitude_mask"] {
        let several = mask(method, 3, if strict { 3 } else { 1 });
        assert_eq!(mask(method, 1, 1), several, "{method}: the masks with one thread and with 3");
    }
    if !strict {
        println!("skipped: the matrix products of this machine's libtorch have no strict order of sums");
        return;
    }
    // Wide layers and many threads, which a library could give parts of one sum.
    for [rows, width, output] in [[129, 768, 3072], [129, 3072, 768], [160, 1024, 1024], [700, 1024, 4096]] {
        let one = layer([rows, width, output], 1);
        for threads in [2, 9, 16] {
            let other = layer([rows, width, output], threads);
            let equal = one.iter().zip(&other).all(|(one, other)| one == other);
            assert!(equal, "a layer of {rows} × {width} × {output}: bits that differ with {threads} threads");
        }
    }
    for method in ["vanilla", "child_tuning_f"] {
        let one = trained(method, 1);
        for threads in [2, 3] {
            let other = trained(method, threads);
            let different = i64::try_from(one.ne_tensor(&other).sum(Kind::Int64)).unwrap();
            assert_eq!(different, 0, "{method}: bits that differ between one thread and {threads}");
        }
    }
}
