use super::super::gradient_place::GradientPlace;
use super::*;
use crate::random::{Bernoulli, Key, group};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
const KEY: [u32; 2] = [7, 0xFFFF_FFF1];
const SITE: u32 = 5;

fn random(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, CPU).to_kind(Kind::BFloat16)
}

fn positions(rows: i64) -> [Tensor; 2] {
    let numbers = |number: fn(i64) -> i64| Tensor::from_slice(&(0..rows).map(number).collect::<Vec<_>>());
    [numbers(|row| row % 7), numbers(|row| row / 7 + 3)]
}

fn pattern(rows: DropoutRows) -> DropoutPattern {
    let key = Tensor::from_slice(&KEY.map(u32::cast_signed));
    DropoutPattern { key, limit: Bernoulli::new(0.7).limit, scale: 1.0 / 0.7, site: SITE, rows }
}

/// The factors of rows whose counters are known, `[rows, width]`.
fn factors(counters: &[[u32; 3]], width: usize) -> Tensor {
    let limit = Bernoulli::new(0.7).limit;
    let of_row = |&counter: &[u32; 3]| {
        (0..width.div_ceil(GROUP))
            .flat_map(move |index| group(Key(KEY), index as u32, counter))
            .take(width)
            .map(move |number| if number <= limit { 1.0 / 0.7 } else { 0.0f32 })
    };
    let numbers: Vec<f32> = counters.iter().flat_map(of_row).collect();
    Tensor::from_slice(&numbers).view([counters.len() as i64, width as i64])
}

fn close(found: &Tensor, expected: &Tensor, share: f64, about: &str) {
    let [found, expected] = [found, expected].map(|tensor| tensor.to_kind(Kind::Double));
    let largest = f64::try_from(expected.abs().max()).unwrap();
    let difference = f64::try_from((found - expected).abs().max()).unwrap();
    assert!(difference <= share * largest, "{about}: {difference} of {largest}");
}

#[test]
fn dropout_draws_for_all_sorts_of_rows_what_the_generator_says() {
    tch::manual_seed(1);
    for width in [1, 64, 100, 192] {
        let [own, slots] = positions(12);
        let token = |row: u32| [row % 7, row / 7 + 3, SITE];
        let cases = [
            (DropoutRows::Tokens { positions: own, slots }, (0..12).map(token).collect::<Vec<_>>()),
            (
                DropoutRows::Examples { slots: positions(12)[1].shallow_clone() },
                (0..12).map(|row| [0, row / 7 + 3, SITE]).collect(),
            ),
            (DropoutRows::Shared(4), (0..12).map(|row| [row % 4, u32::MAX, SITE]).collect()),
        ];
        for (rows, counters) in cases {
            let expected = factors(&counters, width);
            let input = Tensor::randn([12, width as i64], CPU).set_requires_grad(true);
            let pattern = pattern(rows);
            let half = dropped(&input.detach().to_kind(Kind::BFloat16), &pattern).unwrap();
            assert_eq!(
                half,
                (input.detach().to_kind(Kind::BFloat16).to_kind(Kind::Float) * &expected)
                    .to_kind(Kind::BFloat16)
            );
            let output = drop_rows(&input, pattern).unwrap();
            assert_eq!(output, &input * &expected);
            output.sum(Kind::Float).backward();
            assert_eq!(input.grad(), expected);
        }
    }
}

/// Against libtorch's operations in float64, of the same rounded numbers; with and without dropout and places, over fewer and
/// more rows than there are blocks.
#[test]
fn the_sum_is_normalised_as_by_libtorch_and_all_gradients_are_its() {
    tch::manual_seed(1);
    for (rows, width, drops, has_places) in [
        (1, 64, true, true),
        (5, 320, false, true),
        (300, 128, true, false),
        (2200, 64, true, true),
        (37, 1024, true, true),
    ] {
        let leaf = |shape: &[i64]| random(shape).set_requires_grad(true);
        let (input, residual) = (leaf(&[rows, width]), leaf(&[rows, width]));
        let vectors = [leaf(&[width]), leaf(&[width]), leaf(&[width])];
        let counters: Vec<[u32; 3]> = (0..rows as u32).map(|row| [row % 7, row / 7 + 3, SITE]).collect();
        let weights = random(&[rows, width]);

        let exact = |tensor: &Tensor| tensor.detach().to_kind(Kind::Double).set_requires_grad(true);
        let [own, added, scale, shift] = [&input, &residual, &vectors[0], &vectors[1]].map(exact);
        let kept = match drops {
            true => &own * factors(&counters, width as usize).to_kind(Kind::Double),
            false => own.shallow_clone(),
        };
        let expected_sum = kept + &added;
        let expected = expected_sum.layer_norm([width], Some(&scale), Some(&shift), 1e-3, false);
        (&expected * weights.to_kind(Kind::Double)).sum(Kind::Double).backward();

        let places: Vec<GradientPlace> =
            vectors.iter().map(|_| GradientPlace::new(Tensor::full([width], 9.0, CPU))).collect();
        let operand =
            |number: usize| Operand { values: &vectors[number], place: has_places.then(|| &places[number]) };
        let [positions, slots] = positions(rows);
        let [output, sum] = add_and_norm(AddAndNorm {
            input: &input,
            bias: operand(2),
            residual: &residual,
            scale: operand(0),
            shift: operand(1),
            epsilon: 1e-3,
            dropout: drops.then(|| pattern(DropoutRows::Tokens { positions, slots })),
        })
        .unwrap();
        close(&sum, &expected_sum, 0.01, "sum");
        close(&output, &expected, 0.01, "output");
        (&output * &weights).sum(Kind::Float).backward();
        close(&input.grad(), &own.grad(), 0.02, "input");
        close(&residual.grad(), &added.grad(), 0.02, "residual");
        let of_vector = |number: usize| match has_places {
            true => places[number].numbers().shallow_clone(),
            false => vectors[number].grad(),
        };
        close(&of_vector(0), &scale.grad(), 0.02, "scale");
        close(&of_vector(1), &shift.grad(), 0.02, "shift");
        // That of the bias is what comes to the input.
        close(&of_vector(2), &own.grad().sum_dim_intlist(0, false, Kind::Double), 0.02, "bias");
    }
}

#[test]
fn gelu_brings_the_bias_the_sums_of_its_gradient() {
    tch::manual_seed(1);
    for (rows, width) in [(1, 4), (70, 64), (301, 128), (4201, 8)] {
        let input = (random(&[rows, width]) * 2.0).detach().set_requires_grad(true);
        let bias = random(&[width]).set_requires_grad(true);
        let weights = random(&[rows, width]);
        let own = input.detach().to_kind(Kind::Double).set_requires_grad(true);
        let expected = own.gelu("none");
        (&expected * weights.to_kind(Kind::Double)).sum(Kind::Double).backward();
        let output = gelu_after_bias(&input, Operand::plain(&bias)).unwrap();
        close(&output, &expected, 0.01, "output");
        (&output * &weights).sum(Kind::Float).backward();
        close(&input.grad(), &own.grad(), 0.01, "input");
        close(&bias.grad(), &own.grad().sum_dim_intlist(0, false, Kind::Double), 0.02, "bias");
    }
}

/// Of all sizes of inputs: no further from the exact slope, times a gradient, than rounding it to bfloat16 can be.
#[test]
fn the_slope_of_gelu_is_exact_to_the_rounding() {
    let values: Vec<f32> = (0..4096).map(|number| (number - 2048) as f32 / 256.0).collect();
    let input = Tensor::from_slice(&values).to_kind(Kind::BFloat16).view([64, 64]).set_requires_grad(true);
    let bias = Tensor::zeros([64], (Kind::BFloat16, Device::Cpu));
    gelu_after_bias(&input, Operand::plain(&bias)).unwrap().sum(Kind::Float).backward();
    let own = input.detach().to_kind(Kind::Double).set_requires_grad(true);
    own.gelu("none").sum(Kind::Double).backward();
    let difference = (input.grad().to_kind(Kind::Double) - own.grad()).abs();
    let allowed = own.grad().abs() * 2f64.powi(-8) + 3e-7;
    assert!(bool::try_from(difference.le_tensor(&allowed).all()).unwrap());
}

#[test]
fn rows_that_do_not_belong_together_are_refused() {
    let rows = random(&[9, 64]);
    let short = || positions(8);
    let [own, slots] = short();
    assert!(drop_rows(&rows, pattern(DropoutRows::Tokens { positions: own, slots })).is_err());
    assert!(drop_rows(&rows.to_kind(Kind::Double), pattern(DropoutRows::Shared(9))).is_err());
    let vector = random(&[64]);
    let (fewer, floats) = (rows.narrow(0, 0, 8), vector.to_kind(Kind::Float));
    let operation = |residual, scale| AddAndNorm {
        input: &rows,
        bias: Operand::plain(&vector),
        residual,
        scale: Operand::plain(scale),
        shift: Operand::plain(&vector),
        epsilon: 1e-5,
        dropout: None,
    };
    assert!(add_and_norm(operation(&rows, &vector)).is_ok());
    assert!(add_and_norm(operation(&fewer, &vector)).is_err());
    assert!(add_and_norm(operation(&rows, &floats)).is_err());
    assert!(!normalises(1088) && !normalises(100) && normalises(768));
}
