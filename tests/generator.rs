//! What a GPU draws, tried on the CPU's tensors. A test program of its own, since libtorch's generator is one for the whole
//! process, and tests beside it would draw from it, too.

use child_tuning::child::{BernoulliMask, MaskScope};
use child_tuning::model::{ParameterKind, ParameterPlace, ParameterTable};
use tch::{Device, Kind, Tensor};

const COUNT: usize = 100_003;

#[test]
fn the_mask_of_a_device_has_the_share_and_the_scale_and_comes_again_for_any_type() {
    let mut table = ParameterTable::default();
    table.declare("weight", &[COUNT as i64], ParameterKind::Weight, ParameterPlace::Head);
    let parameter = table.iter().next().unwrap();
    let ones = Tensor::ones([COUNT as i64], (Kind::Float, Device::Cpu));
    for (rescale, scale) in [(true, Some(4.0)), (false, None)] {
        let mask = BernoulliMask::new(MaskScope::All, 0.25, rescale, 7);
        mask.begin_step(3);
        let first = mask.on_device(&ones, parameter).unwrap();
        let _other_draws = Tensor::rand([7], (Kind::Float, Device::Cpu));
        assert_eq!(first, mask.on_device(&ones, parameter).unwrap());
        // Whatever the type of the gradient.
        let half = mask.on_device(&ones.to_kind(Kind::BFloat16), parameter).unwrap();
        assert_eq!((half.kind(), half.to_kind(Kind::Float)), (Kind::BFloat16, first.copy()));
        let factor = mask.scale_on(Device::Cpu).unwrap();
        assert_eq!(factor.map(|factor| f64::try_from(factor).unwrap()), scale);
        let kept = f64::try_from(first.sum(Kind::Double)).unwrap();
        assert!((kept - 0.25 * COUNT as f64).abs() < 5.0 * (0.25 * 0.75 * COUNT as f64).sqrt(), "{kept}");
        assert_eq!(f64::try_from(first.max()).unwrap(), 1.0);
        mask.begin_step(4);
        assert_ne!(first, mask.on_device(&ones, parameter).unwrap());
    }
    let all = BernoulliMask::new(MaskScope::All, 1.0, true, 7);
    assert_eq!(all.on_device(&ones, parameter).unwrap(), ones);
}
