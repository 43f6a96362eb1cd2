//! Tables on the terminal.

use std::ops::Range;

use comfy_table::{CellAlignment, Table, presets};

/// Makes a table without lines; the columns of `numbers` are flush right.
pub fn table<T: ToString>(header: &[T], numbers: Range<usize>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().map(T::to_string));
    for column in numbers {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}
