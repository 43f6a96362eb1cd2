//! The character map of a SentencePiece file: a trie of what is replaced, and the texts that replace it.
//!
//! The layout is that of SentencePiece's `precompiled_charsmap`: the bytes of the trie as u32, the trie (a double array of
//! u32 units), and texts in UTF-8 that end in a zero byte. All numbers are little-endian.

/// Checks that a map can be walked with any text whatever: the library that does so trusts it.
///
/// # Errors
///
/// What is wrong with the map.
pub(super) fn check(map: &[u8]) -> Result<(), String> {
    let (size, rest) = map.split_first_chunk::<4>().ok_or("its character map is cut off")?;
    let size = u32::from_le_bytes(*size) as usize;
    if !size.is_multiple_of(4) || size > rest.len() {
        return Err(format!("its character map has a trie of {size} bytes in {}", rest.len()));
    }
    let (trie, texts) = rest.split_at(size);
    let texts = std::str::from_utf8(texts).map_err(|_| "the texts of its character map are no UTF-8")?;
    let units: Vec<u32> = trie.as_chunks::<4>().0.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
    if units.is_empty() {
        return Err("its character map has an empty trie".to_owned());
    }
    for (place, &unit) in units.iter().enumerate() {
        // A unit with the highest bit is a value, which no byte leads to.
        if place > 0 && unit & IS_VALUE != 0 {
            continue;
        }
        // The walk goes on in the block of 256 units that this leads to.
        let next = place ^ offset(unit);
        if next | 0xff >= units.len() {
            return Err(format!("unit {place} of its character map's trie leads out of it"));
        }
        let value = (units[next] & !IS_VALUE) as usize;
        if unit & HAS_VALUE != 0 && !texts.is_char_boundary(value) {
            return Err(format!("unit {place} of its character map's trie leads to no text"));
        }
    }
    Ok(())
}

const IS_VALUE: u32 = 1 << 31;
const HAS_VALUE: u32 = 1 << 8;

/// How far it is from a unit to those that follow it, in the coding of the double array.
fn offset(unit: u32) -> usize {
    ((unit >> 10) as usize) << ((unit & (1 << 9)) >> 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map with a trie of 256 units, of which some are as given, and texts.
    fn map(units: &[(usize, u32)], texts: &[u8]) -> Vec<u8> {
        let mut trie = [0u32; 256];
        for &(place, unit) in units {
            trie[place] = unit;
        }
        let mut map = 1024u32.to_le_bytes().to_vec();
        map.extend(trie.iter().flat_map(|unit| unit.to_le_bytes()));
        map.extend(texts);
        map
    }

    #[test]
    fn only_a_map_that_can_be_walked_passes() {
        let texts = "ab\0é\0".as_bytes();
        // The unit of `x` has a value at the unit it leads to.
        let good = map(
            &[(b'x'.into(), u32::from(b'x') | HAS_VALUE | 1 << 10), (b'x' as usize ^ 1, IS_VALUE | 3)],
            texts,
        );
        assert_eq!(check(&good), Ok(()));
        let precompiled = tokenizers::normalizers::Precompiled::from(&good).unwrap();
        assert_eq!(precompiled.transform("x"), Some("é"));
        let message = |map: &[u8]| check(map).unwrap_err();
        assert!(message(&good[..3]).contains("cut off"));
        assert!(message(&good[..1000]).contains("a trie of 1024 bytes in 996"));
        assert!(message(&good[..good.len() - 2]).contains("no UTF-8"));
        assert!(message(&[0; 8]).contains("empty trie"));
        assert!(
            message(&map(&[(0, 256 << 10)], texts))
                .contains("unit 0 of its character map's trie leads out of it")
        );
        for value in [4, 7, 1 << 20] {
            let bad = map(&[(5, 5 | HAS_VALUE | 1 << 10), (4, IS_VALUE | value)], texts);
            assert!(message(&bad).contains("unit 5 of its character map's trie leads to no text"), "{value}");
        }
    }
}
