//! Where the rows of a CSV begin. The reader counts the second half of a Windows line end, and empty lines, to the row that
//! follows.

use csv::Position;

/// Returns the first byte of a row that the reader found at a position.
pub(crate) fn record_start(bytes: &[u8], position: Option<&Position>) -> usize {
    let start = position.map_or(0, |position| position.byte() as usize).min(bytes.len());
    start + bytes[start..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count()
}

/// Returns the line of a row that the reader found at a position, from 1.
pub(crate) fn record_line(bytes: &[u8], position: Option<&Position>) -> usize {
    let (reported, first) =
        position.map_or((1, 0), |position| (position.line() as usize, position.byte() as usize));
    let first = first.min(bytes.len());
    // Half of the line end before may be reported as behind it.
    let skipped = &bytes[first..record_start(bytes, position)];
    reported + skipped.iter().filter(|&&byte| byte == b'\n').count()
}
