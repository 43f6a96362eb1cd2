//! Types of numbers that weights and activations have in the memory of the CPU.

use half::bf16;

use super::memory::Element;

/// A type that kernels read and write; they compute in float32.
pub trait Number: Element + Send + Sync {
    /// Returns the number in float32, exactly.
    fn to_float(self) -> f32;

    /// Returns the nearest number to one in float32, of two equally near ones that whose last bit is zero.
    fn from_float(value: f32) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn to_float(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_float(value: f32) -> Self {
        value
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn to_float(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// By arithmetic on bits, without branches: the conversion of `half` would keep loops from being vectorised.
    #[inline(always)]
    fn from_float(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
        // Rounding must not turn a NaN with low bits only into an infinity.
        bf16::from_bits(if value.is_nan() { 0x7FC0 } else { rounded as u16 })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// As the crate `half` has it, which decides by branches.
        #[test]
        fn bfloat16_is_exact_in_float32_and_the_nearest_to_it(bits in any::<u32>(), few in any::<u16>()) {
            for value in [f32::from_bits(bits), f32::from_bits(bits & 0xFFFF_8000)] {
                let (found, expected) = (<bf16 as Number>::from_float(value), bf16::from_f32(value));
                prop_assert_eq!(found.is_nan(), expected.is_nan());
                prop_assert!(found.is_nan() || found.to_bits() == expected.to_bits());
            }
            let half = bf16::from_bits(few);
            prop_assert_eq!(half.to_float().is_nan(), half.is_nan());
            prop_assert!(half.is_nan() || <bf16 as Number>::from_float(half.to_float()) == half);
        }
    }
}
