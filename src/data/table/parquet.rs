//! Apache Parquet, the form in which the Hugging Face Hub holds data sets.

use std::borrow::Cow;
use std::sync::Arc;

use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;

use super::{DataFile, Request, Row, Rows};
use crate::error::{Error, Result};

pub(super) fn fits(file: &DataFile) -> bool {
    file.bytes.starts_with(b"PAR1") || file.extension() == "parquet"
}

/// Reads the wanted columns of every row; a row's line is its number from 1.
pub(super) fn read<'a>(file: &'a DataFile, request: &Request) -> Result<Rows<'a>> {
    let refuse = |error: ParquetError| {
        Error::data(&file.path, 0, format!("is not a whole Parquet file ({error}); fetch it again"))
    };
    let reader = SerializedFileReader::new(file.bytes.clone()).map_err(refuse)?;
    let schema = reader.metadata().file_metadata().schema();
    let columns: Vec<String> = schema.get_fields().iter().map(|field| field.name().to_string()).collect();
    let wanted: Vec<usize> = (0..columns.len()).filter(|column| request.wants(&columns[*column])).collect();
    let fields = wanted.iter().map(|column| Arc::clone(&schema.get_fields()[*column])).collect();
    let projection = Type::group_type_builder(schema.name()).with_fields(fields).build().map_err(refuse)?;
    let mut rows = Vec::new();
    for (index, row) in reader.get_row_iter(Some(projection)).map_err(refuse)?.enumerate() {
        let row = row.map_err(refuse)?;
        let mut cells = vec![None; columns.len()];
        for (position, (_, field)) in wanted.iter().zip(row.get_column_iter()) {
            cells[*position] = scalar(field).map(Cow::Owned);
        }
        rows.push(Row { line: index + 1, cells });
    }
    Ok(Rows { columns: Some(columns), quoted: false, rows })
}

/// The text of a string, number or truth value; `None` for null and for all that has parts.
fn scalar(field: &Field) -> Option<String> {
    match field {
        Field::Str(text) => Some(text.clone()),
        Field::Bool(truth) => Some(truth.to_string()),
        Field::Byte(number) => Some(number.to_string()),
        Field::Short(number) => Some(number.to_string()),
        Field::Int(number) => Some(number.to_string()),
        Field::Long(number) => Some(number.to_string()),
        Field::UByte(number) => Some(number.to_string()),
        Field::UShort(number) => Some(number.to_string()),
        Field::UInt(number) => Some(number.to_string()),
        Field::ULong(number) => Some(number.to_string()),
        Field::Float16(number) => Some(number.to_string()),
        Field::Float(number) => Some(number.to_string()),
        Field::Double(number) => Some(number.to_string()),
        Field::Bytes(bytes) => bytes.as_utf8().ok().map(str::to_string),
        _ => None,
    }
}

#[cfg(test)]
pub(in crate::data) mod tests {
    use parquet::data_type::{ByteArray, ByteArrayType, FloatType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    use super::super::tests::{file, show};
    use super::super::{Format, Request};
    use super::*;

    /// A column to write, `None` being null.
    pub enum Column<'a> {
        Text(&'a str, &'a [Option<&'a str>]),
        Integer(&'a str, &'a [i64]),
        Float(&'a str, &'a [f32]),
    }

    /// Writes columns of one length as a Parquet file with the Hub's types.
    pub fn write(columns: &[Column]) -> Vec<u8> {
        let declare = |column: &Column| match column {
            Column::Text(name, _) => format!("optional binary {name} (utf8);"),
            Column::Integer(name, _) => format!("optional int64 {name};"),
            Column::Float(name, _) => format!("optional float {name};"),
        };
        let fields: String = columns.iter().map(declare).collect();
        let schema = Arc::new(parse_message_type(&format!("message schema {{ {fields} }}")).unwrap());
        let properties = WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY);
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, Arc::new(properties.build())).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for column in columns {
            let mut cells = group.next_column().unwrap().unwrap();
            match column {
                Column::Text(_, values) => {
                    let present: Vec<ByteArray> =
                        values.iter().flatten().map(|text| (*text).into()).collect();
                    let levels: Vec<i16> = values.iter().map(|value| value.is_some().into()).collect();
                    cells.typed::<ByteArrayType>().write_batch(&present, Some(&levels), None).unwrap();
                }
                Column::Integer(_, values) => {
                    let levels = vec![1; values.len()];
                    cells.typed::<Int64Type>().write_batch(values, Some(&levels), None).unwrap();
                }
                Column::Float(_, values) => {
                    let levels = vec![1; values.len()];
                    cells.typed::<FloatType>().write_batch(values, Some(&levels), None).unwrap();
                }
            }
            cells.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
        bytes
    }

    #[test]
    fn cells_come_back_as_text_and_nulls_as_gaps() {
        let content = write(&[
            Column::Text("sentence", &[Some("said \"a\"\tb\nc"), None, Some("é")]),
            Column::Integer("label", &[1, 0, -1]),
            Column::Float("score", &[3.8, 4.0, -1.0]),
        ]);
        let (_folder, file) = file("f.parquet", &content);
        assert_eq!(file.guess_format(), Format::Parquet);
        let rows = file.rows(Format::Parquet, &Request::default()).unwrap();
        assert_eq!(rows.columns.as_ref().unwrap(), &["sentence", "label", "score"]);
        assert_eq!(show(&rows), ["1:said \"a\"\tb\nc|1|3.8", "2:~|0|4", "3:é|-1|-1"]);
        let request = Request { columns: Some(&["label"]), ..Request::default() };
        assert_eq!(show(&file.rows(Format::Parquet, &request).unwrap()), ["1:~|1|~", "2:~|0|~", "3:~|-1|~"]);
    }

    #[test]
    fn a_file_that_was_cut_short_is_refused() {
        let content = write(&[Column::Integer("label", &[1])]);
        let (_folder, file) = file("f.parquet", &content[..content.len() - 9]);
        let message = file.rows(Format::Parquet, &Request::default()).err().unwrap().to_string();
        assert!(message.contains("f.parquet: is not a whole Parquet file"), "{message}");
    }
}
