//! The matrix unit of Intel's processors (AMX): products of bfloat16 tiles with sums in float32.
//!
//! It takes subnormal numbers for zero. Rust has no stable functions for it, so this is the one place with machine code.

use std::marker::PhantomData;
use std::sync::OnceLock;

use half::bf16;

/// Rows and columns of a product, and how many terms a step adds to each of its numbers.
pub const SIDE: usize = 32;

/// One step's part of a factor of a product, [`SIDE`] × [`SIDE`] numbers in two tiles of a kilobyte.
///
/// Of the left factor, number `term` of line `line` is at `line * SIDE + term`. Of the right one it is at [`right_place`].
#[derive(Clone)]
#[repr(C, align(64))]
pub struct Step(pub [bf16; SIDE * SIDE]);

impl Step {
    /// A step that adds nothing.
    pub const ZERO: Self = Self([bf16::ZERO; SIDE * SIDE]);
}

/// Returns where in a step of the right factor a term of a column is: two tiles of 16 columns, in which pairs of terms lie side by side.
pub const fn right_place(term: usize, column: usize) -> usize {
    column / 16 * 512 + term / 2 * 32 + column % 16 * 2 + term % 2
}

/// Returns whether the processor has the unit and the system lets this process use it.
pub fn has_matrix_unit() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(machine::is_there)
}

/// While this value lives, its thread multiplies in the matrix unit.
pub struct MatrixUnit(PhantomData<*const ()>);

impl MatrixUnit {
    /// Sets the unit up for this thread.
    ///
    /// # Panics
    /// If there is none ([`has_matrix_unit`]).
    pub fn enter() -> Self {
        assert!(has_matrix_unit(), "this machine has no matrix unit");
        machine::configure();
        Self(PhantomData)
    }

    /// Computes the sum over steps of the products of their parts, line by line: `left` · `right`, each of as many steps.
    pub fn multiply(&self, left: &[Step], right: &[Step], product: &mut [[f32; SIDE]; SIDE]) {
        assert_eq!(left.len(), right.len());
        machine::multiply(left, right, product);
    }
}

impl Drop for MatrixUnit {
    fn drop(&mut self) {
        machine::release();
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod machine {
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;

    use super::{SIDE, Step};

    pub fn is_there() -> bool {
        const REQUEST_PERMISSION: libc::c_long = 0x1023;
        const TILE_DATA: libc::c_long = 18;
        // AMX-BF16 and AMX-TILE, of a leaf that processors with AVX-512 have.
        let wanted = 1 << 22 | 1 << 24;
        std::arch::is_x86_feature_detected!("avx512f")
            && __cpuid_count(7, 0).edx & wanted == wanted
            // SAFETY: no pointers are involved.
            && unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) } == 0
    }

    /// Eight tiles of 16 lines of 64 bytes.
    #[repr(C, align(64))]
    struct Configuration([u8; 64]);

    const CONFIGURATION: Configuration = {
        let mut bytes = [0; 64];
        // The palette, the bytes of each tile's lines in 16 bits each, and their number.
        bytes[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            bytes[16 + 2 * tile] = 64;
            bytes[48 + tile] = 16;
            tile += 1;
        }
        Configuration(bytes)
    };

    pub fn configure() {
        // SAFETY: the unit is there (`MatrixUnit::enter`), and the configuration is one that it has.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIGURATION, options(nostack, readonly)) };
    }

    pub fn release() {
        // SAFETY: as above; whoever needs the unit next sets it up for itself.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    pub fn multiply(left: &[Step], right: &[Step], product: &mut [[f32; SIDE]; SIDE]) {
        if left.is_empty() {
            *product = [[0.0; SIDE]; SIDE];
            return;
        }
        // SAFETY: the unit is set up for tiles of 16 lines of 64 bytes. It reads two of them of each step on either side, 2048 bytes, of
        // as many steps as there are, and writes four quarters of the product, whose lines have 128 bytes.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{left} + {line}]",
                "tileloadd tmm6, [{right} + {line}]",
                "tileloadd tmm7, [{right} + {line} + 1024]",
                "tileloadd tmm5, [{left} + {line} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 2048",
                "add {right}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{product} + {double}], tmm0",
                "tilestored [{product} + {double} + 64], tmm1",
                "tilestored [{product} + {double} + 2048], tmm2",
                "tilestored [{product} + {double} + 2112], tmm3",
                left = inout(reg) left.as_ptr() => _,
                right = inout(reg) right.as_ptr() => _,
                steps = inout(reg) left.len() => _,
                line = in(reg) 64usize,
                double = in(reg) 128usize,
                product = in(reg) product,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
mod machine {
    use super::{SIDE, Step};

    pub fn is_there() -> bool {
        false
    }

    pub fn configure() {}

    pub fn release() {}

    pub fn multiply(_: &[Step], _: &[Step], _: &mut [[f32; SIDE]; SIDE]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_of_steps_is_that_of_their_numbers() {
        if !has_matrix_unit() {
            println!("skipped: this machine has no matrix unit");
            return;
        }
        let unit = MatrixUnit::enter();
        let number = |index: usize| bf16::from_f32((index as f32 * 0.37).sin());
        for steps in [0, 1, 5] {
            let (mut left, mut right) = (vec![Step::ZERO; steps], vec![Step::ZERO; steps]);
            let mut expected = [[0f64; SIDE]; SIDE];
            for step in 0..steps {
                for (term, line) in (0..SIDE).flat_map(|term| (0..SIDE).map(move |line| (term, line))) {
                    left[step].0[line * SIDE + term] = number(step * 7 + line * 31 + term);
                    right[step].0[right_place(term, line)] = number(step * 5 + line * 3 + term * 17 + 1);
                }
                for (line, row) in expected.iter_mut().enumerate() {
                    for (column, sum) in row.iter_mut().enumerate() {
                        *sum += (0..SIDE)
                            .map(|term| {
                                let first = left[step].0[line * SIDE + term].to_f64();
                                first * right[step].0[right_place(term, column)].to_f64()
                            })
                            .sum::<f64>();
                    }
                }
            }
            let mut product = [[f32::NAN; SIDE]; SIDE];
            unit.multiply(&left, &right, &mut product);
            for (found, expected) in product.as_flattened().iter().zip(expected.as_flattened()) {
                assert!((f64::from(*found) - expected).abs() < 1e-4, "{found} {expected}");
            }
        }
    }
}
