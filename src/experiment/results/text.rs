//! Rows as text: how they are written and read.

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::contents::is_run_id;
use super::row::{Row, SCHEMA_VERSION};
use crate::csv_lines::{record_line, record_start};
use crate::error::{Error, Result};
use crate::spelling::{quoted, visible};

/// What is wrong with a file that a spreadsheet has saved in its own way.
pub(super) const SEMICOLONS: &str =
    "has semicolons between its cells, as some spreadsheets write them; save it with commas";

/// Reads the rows of a results file.
///
/// Takes what pandas would take, and what pandas writes: columns in any order, further columns (ignored), optional
/// columns left out, `True` for `true` and `12.0` for a whole number.
///
/// # Errors
/// Fails if the file cannot be read, is empty, or holds a row that does not parse; the error names the line.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<Row>> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let rows = parse_with_lines(path, &bytes)?;
    if let Some((line, row)) = rows.iter().find(|(_, row)| row.score.is_some_and(f64::is_infinite)) {
        let message = format!("the score of run `{}` is infinite, which none can be", row.run);
        return Err(Error::data(path, *line, message));
    }
    refuse_mangled_runs(path, &rows)?;
    Ok(rows.into_iter().map(|(_, row)| row).collect())
}

/// Refuses rows whose ids are not what they were when the runs wrote them: a spreadsheet takes many for numbers, and different runs
/// then share one.
fn refuse_mangled_runs(path: &Path, rows: &[(usize, Row)]) -> Result<()> {
    let mut first: HashMap<&str, &Row> = HashMap::new();
    for (line, row) in rows {
        let is_id = is_run_id(&row.run);
        let earlier = first.entry(&row.run).or_insert(row);
        let is_one_run = (&earlier.task, &earlier.method, earlier.seed) == (&row.task, &row.method, row.seed);
        if !is_id || !is_one_run {
            let (run, message) = (
                quoted(&row.run),
                match is_id {
                    false => {
                        "is no id of a run, 16 hexadecimal digits; a spreadsheet may have taken it for a number"
                    }
                    true => "is the id of another run in a line above, with another task, method or seed",
                },
            );
            return Err(Error::data(path, *line, format!("column `run`: {run} {message}")));
        }
    }
    Ok(())
}

/// Parses the text of a results file; `path` is for messages.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<Row>> {
    Ok(parse_with_lines(path, bytes)?.into_iter().map(|(_, row)| row).collect())
}

/// Parses the same with the line, counted from 1, that each row begins in.
fn parse_with_lines(path: &Path, bytes: &[u8]) -> Result<Vec<(usize, Row)>> {
    let mut reader = csv::Reader::from_reader(bytes);
    let misread = |error: csv::Error| misread(path, bytes, error);
    let header = reader.headers().map_err(misread)?.clone();
    if header.is_empty() {
        return Err(Error::data(path, 0, "is empty: a results file starts with a line of column names"));
    }
    if let Some(column) =
        ["task", "method", "status", "score"].iter().find(|name| !header.iter().any(|own| own == **name))
    {
        let message = match header.get(0).is_some_and(|first| first.starts_with("schema_version;")) {
            true => SEMICOLONS.to_owned(),
            false => format!("is not a results file of this program: it has no column `{column}`"),
        };
        return Err(Error::data(path, 1, message));
    }
    let version = header.iter().position(|column| column == "schema_version");
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = match record {
            Ok(record) => record,
            // The last row, while another process writes it or after one was killed: its run is done again.
            Err(error) if is_cut_off(bytes, &error) => break,
            Err(error) => return Err(misread(error)),
        };
        // Looked at first: in a row of another version nothing else need parse.
        let written = version.and_then(|column| record.get(column)).unwrap_or_default();
        if version.is_some() && written != SCHEMA_VERSION.to_string() {
            return Err(other_version(path, record_line(bytes, record.position()), written));
        }
        let row = record.deserialize(Some(&header));
        let row = row.map_err(|error| misread_row(path, bytes, &header, &record, error))?;
        rows.push((record_line(bytes, record.position()), row));
    }
    Ok(rows)
}

/// Makes the error for a file of another schema version; `line` counts from 1, 0 means the whole file.
pub(super) fn other_version(path: &Path, line: usize, written: &str) -> Error {
    let place = Error::data(
        path,
        line,
        format!(
            "has schema version `{written}` where this program knows {SCHEMA_VERSION}; use the program that wrote it, \
             or name another file with `results:`"
        ),
    );
    Error::configuration(place.to_string())
}

/// Returns whether a row lacks fields because it is the last and has no end.
fn is_cut_off(bytes: &[u8], error: &csv::Error) -> bool {
    let lacks = matches!(error.kind(), csv::ErrorKind::UnequalLengths { expected_len, len, .. } if len < expected_len);
    let start = record_start(bytes, error.position());
    lacks && !bytes[start..].contains(&b'\n')
}

/// Says what csv found wrong, in terms of this file's lines and columns.
fn misread(path: &Path, bytes: &[u8], error: csv::Error) -> Error {
    let line = error.position().map_or(0, |position| record_line(bytes, Some(position)));
    let message = match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => format!(
            "has {len} fields under {expected_len} column names; delete the line, and the run will be done again"
        ),
        _ => error.to_string(),
    };
    Error::data(path, line, message)
}

/// Says which cell of a row is not what its column holds.
fn misread_row(
    path: &Path,
    bytes: &[u8],
    header: &csv::StringRecord,
    record: &csv::StringRecord,
    error: csv::Error,
) -> Error {
    let csv::ErrorKind::Deserialize { err, .. } = error.kind() else { return misread(path, bytes, error) };
    let message = err.kind().to_string();
    if let Some(column) = message.strip_prefix("missing field ") {
        return Error::data(path, 1, format!("has no column {column}"));
    }
    // Where csv does not know the column, the message has the cell.
    let has_cell = |cell: &str| !cell.is_empty() && message.contains(&format!("`{cell}`"));
    let field = err.field().map(|field| field as usize).or_else(|| record.iter().position(has_cell));
    let message = match field.and_then(|field| Some((header.get(field)?, record.get(field)?))) {
        Some((column, cell)) if has_cell(cell) => format!("column `{column}`: {message}"),
        Some((column, cell)) => format!("column `{column}`: {message}: {}", quoted(cell)),
        None => message,
    };
    Error::data(path, record_line(bytes, record.position()), visible(&message))
}

/// Returns the header line, with its newline.
pub(super) fn header() -> csv::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut writer = csv::Writer::from_writer(&mut bytes);
    writer.serialize(Row::default())?;
    writer.flush()?;
    drop(writer);
    bytes.truncate(bytes.iter().position(|&byte| byte == b'\n').map_or(0, |end| end + 1));
    Ok(bytes)
}

/// Writes rows as lines of text.
///
/// Control characters become spaces, so that a row is one line whatever a reason holds.
pub(super) fn encode(rows: &[&Row]) -> csv::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for row in rows {
        let start = bytes.len();
        let mut writer = csv::WriterBuilder::new().has_headers(false).from_writer(&mut bytes);
        writer.serialize(row)?;
        writer.flush()?;
        drop(writer);
        bytes.pop();
        bytes[start..].iter_mut().filter(|byte| byte.is_ascii_control()).for_each(|byte| *byte = b' ');
        bytes.push(b'\n');
    }
    Ok(bytes)
}

/// Writes rows as a results file holds them, without its header; for [`from_text`].
///
/// # Errors
/// Fails if memory does.
pub fn to_text(rows: &[Row]) -> Result<String> {
    let bytes =
        encode(&rows.iter().collect::<Vec<_>>()).map_err(|error| Error::io("write", "rows")(error.into()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Reads what [`to_text`] wrote.
///
/// # Errors
/// Fails if a row does not parse.
pub fn from_text(text: &str) -> Result<Vec<Row>> {
    let header = header().map_err(|error| Error::io("write", "rows")(error.into()))?;
    parse(Path::new("rows"), &[&header, text.as_bytes()].concat())
}

/// A number that may be missing; NaN counts as missing, as it does in pandas.
pub(super) mod number {
    use super::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        value.filter(|number| !number.is_nan()).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        Ok(Option::<f64>::deserialize(deserializer)?.filter(|number| !number.is_nan()))
    }
}

/// Reads a whole number that may be missing; pandas writes one as `12.0` if the column has gaps.
pub(super) fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let parse = |text: String| {
        let digits = text.strip_suffix(".0").unwrap_or(&text);
        digits.parse().map_err(|_| serde::de::Error::custom(format!("`{text}` is not a whole number")))
    };
    Option::<String>::deserialize(deserializer)?.map(parse).transpose()
}

/// Reads a truth value that may be missing, in any case of letters.
pub(super) fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
    let parse = |text: String| match text.to_ascii_lowercase().as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(serde::de::Error::custom(format!("`{text}` is neither true nor false"))),
    };
    Option::<String>::deserialize(deserializer)?.map(parse).transpose()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::experiment::results::Status;

    fn file_of(rows: &[&Row]) -> Vec<u8> {
        [header().unwrap(), encode(rows).unwrap()].concat()
    }

    fn parsed(text: &str) -> Result<Vec<Row>> {
        parse(Path::new("results.csv"), text.as_bytes())
    }

    /// Any finite or infinite number, of any bits.
    fn any_number() -> impl Strategy<Value = f64> {
        any::<u64>().prop_map(f64::from_bits).prop_filter("NaN is an empty field", |number| !number.is_nan())
    }

    proptest! {
        #[test]
        fn rows_come_back_bit_for_bit(
            texts in prop::array::uniform4("[ -~äß漢\"',;]{0,20}"),
            numbers in prop::array::uniform4(any_number()),
            optional in prop::option::of(any_number()),
            whole in prop::option::of(any::<u64>()),
            flag in prop::option::of(any::<bool>()),
            seed in any::<u64>(),
        ) {
            let [experiment, model, method_config, reason] = texts;
            let row = Row {
                experiment,
                model,
                method_config,
                reason: Some(reason).filter(|text| !text.is_empty()),
                seed,
                learning_rate: numbers[0],
                epochs: numbers[1],
                warmup: numbers[2],
                weight_decay: numbers[3],
                score: optional,
                step: whole,
                degenerate: flag,
                status: Status::Diverged,
                ..Row::default()
            };
            let back = parse(Path::new("results.csv"), &file_of(&[&row, &row])).unwrap();
            prop_assert_eq!(&back, &vec![row.clone(), row.clone()]);
            // PartialEq takes -0 for 0; the bits tell them apart.
            prop_assert_eq!(back[0].learning_rate.to_bits(), row.learning_rate.to_bits());
        }
    }

    #[test]
    fn control_characters_become_spaces() {
        let row = Row { reason: Some("out of\r\nmemory,\t\"8\u{7f}GB\"".into()), ..Row::default() };
        let bytes = file_of(&[&row]);
        assert_eq!(bytes.iter().filter(|&&byte| byte == b'\n').count(), 2);
        let back = parse(Path::new("results.csv"), &bytes).unwrap();
        assert_eq!(back[0].reason.as_deref(), Some("out of  memory, \"8 GB\""));
    }

    #[test]
    fn quotes_as_rfc_4180_does() {
        let row = Row { experiment: "a,b".into(), model: "say \"x\"".into(), ..Row::default() };
        let line = String::from_utf8(encode(&[&row]).unwrap()).unwrap();
        assert!(line.starts_with("6,\"a,b\",,\"say \"\"x\"\"\",,"), "{line}");
    }

    #[test]
    fn nan_is_an_empty_field() {
        let row = Row { score: Some(f64::NAN), loss: Some(f64::INFINITY), ..Row::default() };
        let back = parse(Path::new("results.csv"), &file_of(&[&row])).unwrap();
        assert_eq!((back[0].score, back[0].loss), (None, Some(f64::INFINITY)));
    }

    /// The columns that must be there, in another order, with one of the user's own.
    const REQUIRED: &str = "note,seed,learning_rate,epochs,batch_size,micro_batch,max_length,warmup,\
        weight_decay,schema_version,experiment,run,purpose,model_config,source_run,source_task,source_method,\
        source_config,source_settings,config_sha256,tokenizer_sha256,train_sha256,evaluated_sha256,freeze,head,optimizer,beta1,beta2,label_noise,model,model_sha256,model_revision,task,evaluated_on,split,preset,method,\
        method_config,epsilon,adamw,precision,order,checkpoint,status,headline,passes_per_step,examples_prepared,examples_train,examples_evaluated,device,torch,\
        version,started_at";
    const VALUES: &str = "mine,42,4e-5,3.0,16,1,128,0.1,0.01,6,e,0f,report,,,,,,,c,k,t,d,nothing,keep,adamw,0.9,0.999,0,m,s,,rte,rte,validation,paper,vanilla,,1e-8,torch,\
        bf16,shuffled,last,ok,accuracy,1,0,10,5,cpu,2.11.0,0.1.0,2026-01-01T00:00:00Z";

    #[test]
    fn takes_any_order_missing_optional_columns_and_further_ones() {
        let rows = parsed(&format!("{REQUIRED},score\n{VALUES},\n")).unwrap();
        assert_eq!((rows[0].seed, rows[0].learning_rate, rows[0].task.as_str()), (42, 4e-5, "rte"));
        assert_eq!((rows[0].score, rows[0].step, rows[0].degenerate), (None, None, None));
    }

    #[test]
    fn takes_what_pandas_writes() {
        let text = format!("{REQUIRED},step,degenerate,score\n{VALUES},12.0,True,\n{VALUES},,False,0.5\n");
        let rows = parsed(&text).unwrap();
        assert_eq!((rows[0].step, rows[0].degenerate, rows[0].score), (Some(12), Some(true), None));
        assert_eq!((rows[1].step, rows[1].degenerate, rows[1].score), (None, Some(false), Some(0.5)));
    }

    #[test]
    fn errors_name_file_line_and_column() {
        let bad_number =
            parsed(&format!("{REQUIRED},score\n{VALUES},1\n{VALUES},high\n")).unwrap_err().to_string();
        assert_eq!(bad_number, "results.csv:3: column `score`: invalid float literal: `high`");
        let bad_step = parsed(&format!("{REQUIRED},score,step\n{VALUES},,1.5\n")).unwrap_err().to_string();
        assert!(
            bad_step.starts_with("results.csv:2: ") && bad_step.contains("`1.5` is not a whole"),
            "{bad_step}"
        );
        let odd = VALUES.replace(",ok,", ",OK,");
        let odd = parsed(&format!("{REQUIRED},score\n{odd},\n")).unwrap_err().to_string();
        assert!(odd.starts_with("results.csv:2: column `status`: unknown variant `OK`"), "{odd}");
        let torn = parsed(&format!("{REQUIRED},score\n{VALUES},\nmine,42\n")).unwrap_err().to_string();
        assert!(torn.starts_with("results.csv:3: has 2 fields under 54 column names"), "{torn}");
        let missing =
            parsed("schema_version,task,method,status,score\n6,rte,vanilla,ok,\n").unwrap_err().to_string();
        assert_eq!(missing, "results.csv:1: has no column `experiment`");
        let newer =
            parsed("schema_version,task,method,status,score,unheard_of\n7,,,,,x\n").unwrap_err().to_string();
        assert!(newer.starts_with("results.csv:2: has schema version `7`"), "{newer}");
        assert_eq!(
            parsed("").unwrap_err().to_string(),
            "results.csv: is empty: a results file starts with a line of column names"
        );
    }

    #[test]
    fn lines_are_counted_whatever_ends_them() {
        let (header, row) = (format!("{REQUIRED},score"), format!("{VALUES},"));
        let rows = |end: &str| [&*header, &row, "", &row, "mine,42", &row].join(end);
        for end in ["\n", "\r\n"] {
            let message = parsed(&rows(end)).unwrap_err().to_string();
            assert!(message.starts_with("results.csv:5: has 2 fields"), "{end:?}: {message}");
        }
    }

    #[test]
    fn a_last_row_that_was_cut_off_is_not_there_yet() {
        for end in ["\n", "\r\n"] {
            let text = [&*format!("{REQUIRED},score"), &format!("{VALUES},"), "mine,42"].join(end);
            assert_eq!(parsed(&text).unwrap().len(), 1, "{end:?}");
        }
    }

    #[test]
    fn foreign_files_are_called_so() {
        for (text, message) in [
            (
                "index\tsentence1\tsentence2\n0\ta\tb, c\n",
                "is not a results file of this program: it has no column `task`",
            ),
            ("schema_version;task;method;status\n5;a;b;ok\n", SEMICOLONS),
        ] {
            assert_eq!(parsed(text).unwrap_err().to_string(), format!("results.csv:1: {message}"));
        }
    }
}
