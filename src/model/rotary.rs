//! Rotary position embeddings (Su et al., 2021).

use multiversion::multiversion;
use rayon::prelude::*;
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::libtorch::{elements, elements_mut, with_backward};

/// Tokens that one task on the CPU turns.
const BLOCK: usize = 32;

/// The angles by which the pairs of numbers of a head turn, for every token of a batch.
///
/// The pair i of a head of size d is its numbers i and i + d/2, and it turns by position · theta^(−2i/d).
pub(super) struct Rotation {
    /// `[tokens, d/2]`, float32.
    cosines: Tensor,
    /// The sines with a minus sign, and the sines, `[tokens, d]`, float32: what the partner of each number is multiplied by.
    sines: Tensor,
}

impl Rotation {
    /// Computes the angles of tokens at the given positions, `[tokens]`, for heads of an even size. Nothing is copied to the
    /// device.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn new(positions: &Tensor, theta: f64, head_size: i64) -> Result<Self> {
        // The roundings of the reference: every step in float32.
        let options = (Kind::Float, positions.device());
        let exponents = Tensor::f_arange_start_step(0, head_size, 2, options)?.f_div_scalar(head_size)?;
        let frequencies = Tensor::f_pow_scalar(theta, &exponents)?.f_reciprocal()?;
        let angles = positions.f_to_kind(Kind::Float)?.f_unsqueeze(1)?.f_mul(&frequencies)?;
        let sines = angles.f_sin()?;
        Ok(Self { cosines: angles.f_cos()?, sines: Tensor::f_cat(&[sines.f_neg()?, sines], 1)? })
    }

    /// Turns queries and keys: takes `[tokens, 3 · hidden]`, queries, keys and values side by side, and returns each as
    /// `[tokens, hidden]`, the values as they were.
    ///
    /// Backward is the turn back, of all three gradients at once.
    ///
    /// # Errors
    /// Fails if libtorch cannot allocate.
    pub fn apply(&self, together: &Tensor) -> Result<[Tensor; 3]> {
        let (tokens, hidden) = (together.size()[0], together.size()[1] / 3);
        let values = together.detach();
        let mut turned = values.f_new_empty([3, tokens, hidden], (values.kind(), values.device()))?;
        self.turn(Turn::Forward, &values, &mut turned)?;
        let back = Self { cosines: self.cosines.shallow_clone(), sines: self.sines.shallow_clone() };
        let turned = with_backward(turned, &[together], move |gradient| {
            let options = (gradient.kind(), gradient.device());
            let mut to_input = gradient.f_new_empty([tokens, 3 * hidden], options)?;
            back.turn(Turn::Back, gradient, &mut to_input)?;
            Ok(vec![to_input])
        })?;
        let parts = turned.f_unbind(0)?;
        parts.try_into().map_err(|_| Error::Libtorch("query, key and value came apart wrongly".into()))
    }

    /// Turns all tokens of `from` into `to`; they are `[tokens, 3 · hidden]` and `[3, tokens, hidden]`, the latter first on the
    /// way back.
    fn turn(&self, turn: Turn, from: &Tensor, to: &mut Tensor) -> Result<()> {
        if (from.kind(), from.device()) == (Kind::Float, Device::Cpu) {
            let from = from.f_contiguous()?;
            let half = self.cosines.size()[1] as usize;
            let rows = Angles { half, cosines: elements(&self.cosines)?, sines: elements(&self.sines)? };
            rows.turn_all(turn, elements(&from)?, elements_mut(to)?);
            return Ok(());
        }
        let (tokens, half) = (self.cosines.size()[0], self.cosines.size()[1]);
        // Both as [tokens, 3, heads, 2, d/2], whatever they are in memory.
        let side_by_side = |rows: &Tensor| rows.f_view([tokens, 3, -1, 2, half]);
        let apart = |parts: &Tensor| parts.f_view([3, tokens, -1, 2, half])?.f_transpose(0, 1);
        let cosines = self.cosines.f_view([tokens, 1, 1, 1, half])?;
        let sines = self.sines.f_view([tokens, 1, 1, 2, half])?;
        let (from, to, sines) = match turn {
            Turn::Forward => (side_by_side(from)?, apart(to)?, sines),
            Turn::Back => (apart(&from.f_contiguous()?)?, side_by_side(to)?, sines.f_neg()?),
        };
        let pairs = from.f_narrow(1, 0, 2)?;
        // In float32, and rounded once.
        let turned = pairs.f_flip([3])?.f_mul(&sines)?.f_addcmul(&pairs, &cosines)?;
        to.f_narrow(1, 0, 2)?.f_copy_(&turned)?;
        to.f_select(1, 2)?.f_copy_(&from.f_select(1, 2)?)?;
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    Forward,
    Back,
}

/// A [`Rotation`] on the CPU.
struct Angles<'a> {
    half: usize,
    cosines: &'a [f32],
    sines: &'a [f32],
}

impl Angles<'_> {
    fn turn_all(&self, turn: Turn, from: &[f32], to: &mut [f32]) {
        let plane = to.len() / 3;
        let hidden = plane / (self.cosines.len() / self.half).max(1);
        if hidden == 0 {
            return;
        }
        match turn {
            Turn::Forward => {
                let (queries, rest) = to.split_at_mut(plane);
                let (keys, values) = rest.split_at_mut(plane);
                queries
                    .par_chunks_mut(BLOCK * hidden)
                    .zip(keys.par_chunks_mut(BLOCK * hidden))
                    .zip(values.par_chunks_mut(BLOCK * hidden))
                    .enumerate()
                    .for_each(|(block, ((queries, keys), values))| {
                        let rows = queries.chunks_mut(hidden).zip(keys.chunks_mut(hidden));
                        for (row, ((query, key), value)) in rows.zip(values.chunks_mut(hidden)).enumerate() {
                            let token = block * BLOCK + row;
                            let own = &from[token * 3 * hidden..][..3 * hidden];
                            self.turn_row(token, 1.0, &own[..hidden], query);
                            self.turn_row(token, 1.0, &own[hidden..2 * hidden], key);
                            value.copy_from_slice(&own[2 * hidden..]);
                        }
                    });
            }
            Turn::Back => to.par_chunks_mut(BLOCK * 3 * hidden).enumerate().for_each(|(block, rows)| {
                for (row, own) in rows.chunks_mut(3 * hidden).enumerate() {
                    let token = block * BLOCK + row;
                    let part = |which: usize| &from[which * plane + token * hidden..][..hidden];
                    self.turn_row(token, -1.0, part(0), &mut own[..hidden]);
                    self.turn_row(token, -1.0, part(1), &mut own[hidden..2 * hidden]);
                    own[2 * hidden..].copy_from_slice(part(2));
                }
            }),
        }
    }

    fn turn_row(&self, token: usize, direction: f32, from: &[f32], to: &mut [f32]) {
        let cosines = &self.cosines[token * self.half..][..self.half];
        let sines = &self.sines[(2 * token + 1) * self.half..][..self.half];
        turn_row(cosines, sines, direction, from, to);
    }
}

/// Turns the heads of one token, in the direction of a sign.
#[multiversion(targets = "simd")]
fn turn_row(cosines: &[f32], sines: &[f32], direction: f32, from: &[f32], to: &mut [f32]) {
    let half = cosines.len();
    for (from, to) in from.chunks_exact(2 * half).zip(to.chunks_exact_mut(2 * half)) {
        let ((first, second), (to_first, to_second)) = (from.split_at(half), to.split_at_mut(half));
        let pairs = first.iter().zip(second).zip(cosines.iter().zip(sines));
        for (((first, second), (cosine, sine)), (to_first, to_second)) in
            pairs.zip(to_first.iter_mut().zip(to_second))
        {
            let sine = sine * direction;
            *to_first = first * cosine - second * sine;
            *to_second = second * cosine + first * sine;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: i64 = 6;
    const HIDDEN: i64 = 2 * HEAD;

    fn numbers(shape: &[i64], kind: Kind) -> Tensor {
        let count = shape.iter().product::<i64>();
        ((Tensor::arange(count, (Kind::Float, Device::Cpu)) * 0.37).sin() * 2.0).to_kind(kind).view(shape)
    }

    /// The definition: the pair (x, y) as x + iy times e^(i · angle), in float64.
    fn expected(together: &Tensor, positions: &[i64], theta: f64) -> Tensor {
        let mut rows: Vec<f64> = Vec::try_from(together.to_kind(Kind::Double).view([-1])).unwrap();
        for (row, &position) in rows.chunks_mut(3 * HIDDEN as usize).zip(positions) {
            for head in row[..2 * HIDDEN as usize].chunks_mut(HEAD as usize) {
                for pair in 0..HEAD as usize / 2 {
                    let angle = position as f64 * theta.powf(-2.0 * pair as f64 / HEAD as f64);
                    let (first, second) = (head[pair], head[pair + HEAD as usize / 2]);
                    head[pair] = first * angle.cos() - second * angle.sin();
                    head[pair + HEAD as usize / 2] = second * angle.cos() + first * angle.sin();
                }
            }
        }
        Tensor::from_slice(&rows).view(together.size().as_slice())
    }

    #[test]
    fn pairs_turn_by_their_angles_and_gradients_turn_back() {
        let positions: Vec<i64> = (0..35).chain(0..2).chain([8191]).collect();
        let rotation = Rotation::new(&Tensor::from_slice(&positions), 50.0, HEAD).unwrap();
        // Those of bfloat16 are rounded once.
        for (kind, tolerance) in [(Kind::Float, 2e-3), (Kind::BFloat16, 1e-2)] {
            let shape = [positions.len() as i64, 3 * HIDDEN];
            let together = numbers(&shape, kind).set_requires_grad(true);
            let [query, key, value] = rotation.apply(&together).unwrap();
            assert_eq!((query.size(), value.kind()), (vec![shape[0], HIDDEN], kind));
            let found = Tensor::cat(&[query, key, value], 1);
            let difference =
                (found.to_kind(Kind::Double) - expected(&together.detach(), &positions, 50.0)).abs().max();
            assert!(difference.double_value(&[]) < tolerance, "{kind:?} {difference}");
            // A rotation keeps products: ⟨R x, R y⟩ = ⟨x, y⟩, so the gradient of Σ R x · R y is y.
            let other = (numbers(&shape, Kind::Float) + 0.5).to_kind(kind);
            let turned = Tensor::cat(&rotation.apply(&other).unwrap(), 1);
            (found * turned).sum(Kind::Float).backward();
            let difference = (together.grad() - other).to_kind(Kind::Float).abs().max();
            assert!(difference.double_value(&[]) < if kind == Kind::Float { 1e-5 } else { 3e-2 });
        }
    }
}
