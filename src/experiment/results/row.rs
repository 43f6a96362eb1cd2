//! One row of a results file: its columns, how it is written and how it is read.

use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, Result};

/// The version of the columns below; a column that is added, dropped or given another meaning raises it.
pub const SCHEMA_VERSION: u32 = 1;

/// How a run ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Trained and evaluated.
    #[default]
    Ok,
    /// The loss or a gradient stopped being a finite number; training it again would end in the same way.
    Diverged,
    /// Something outside the mathematics went wrong, such as memory or a file; it is tried again.
    Failed,
}

/// One run as evaluated on one data set; the fields are the columns, in this order.
///
/// What may be missing is an `Option` and an empty field of the file; so is a number that is NaN.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// [`SCHEMA_VERSION`] at the time of writing.
    pub schema_version: u32,

    /// Name of the experiment.
    pub experiment: String,
    /// Hash of the resolved run, 16 hexadecimal characters.
    pub run: String,
    /// Hub id or folder of the pretrained encoder.
    pub model: String,
    /// SHA-256 of the weights that training started from.
    pub model_sha256: String,
    /// Task that was trained on.
    pub task: String,
    /// Task that was scored; the same as `task` unless domains are transferred.
    pub evaluated_on: String,
    /// Split of `evaluated_on` that was scored.
    pub split: String,
    /// `paper` or `official`.
    pub preset: String,
    /// Name of the fine-tuning method, such as `child_tuning_d`.
    pub method: String,
    /// Settings of the method as `key=value` pairs between spaces, such as `p=0.3 scope=backbone`.
    pub method_config: String,
    /// Seed of the head, the order of examples, dropout and random masks.
    pub seed: u64,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Passes over the training examples.
    pub epochs: f64,
    /// Examples of one optimizer step.
    pub batch_size: u64,
    /// Micro-batches that one optimizer step is split into.
    pub gradient_accumulation: u64,
    /// Longest input in tokens; what is longer was cut.
    pub max_length: u64,
    /// Warmup as a share of all optimizer steps.
    pub warmup: f64,
    /// Coefficient of the decoupled weight decay.
    pub weight_decay: f64,
    /// Norm that gradients are clipped to; empty if they are not clipped.
    pub max_gradient_norm: Option<f64>,
    /// Rule of the optimizer, `torch` or `hf_legacy`.
    pub adamw: String,
    /// Arithmetic of the forward and backward pass, such as `bf16`.
    pub precision: String,
    /// Checkpoint that was scored, `last` or `best`.
    pub checkpoint: String,

    /// How the run ended.
    pub status: Status,
    /// Why it diverged or failed, on one line.
    pub reason: Option<String>,
    /// Name of the headline metric of `evaluated_on`; known before a run starts, so failed runs name it too.
    pub headline: String,
    /// The headline metric, unscaled: 1 is best.
    #[serde(default, with = "number")]
    pub score: Option<f64>,
    /// Share of right answers.
    #[serde(default, with = "number")]
    pub accuracy: Option<f64>,
    /// F1 of the positive class.
    #[serde(default, with = "number")]
    pub f1: Option<f64>,
    /// Matthews correlation.
    #[serde(default, with = "number")]
    pub matthews: Option<f64>,
    /// Pearson correlation.
    #[serde(default, with = "number")]
    pub pearson: Option<f64>,
    /// Spearman correlation.
    #[serde(default, with = "number")]
    pub spearman: Option<f64>,
    /// Plain mean of the task's two metrics.
    #[serde(default, with = "number")]
    pub combined: Option<f64>,
    /// Mean loss over the scored examples.
    #[serde(default, with = "number")]
    pub loss: Option<f64>,
    /// Whether every prediction was of one class.
    #[serde(default, deserialize_with = "flag")]
    pub degenerate: Option<bool>,
    /// Epochs behind the scored checkpoint.
    #[serde(default, with = "number")]
    pub epoch: Option<f64>,
    /// Optimizer steps behind the scored checkpoint.
    #[serde(default, deserialize_with = "count")]
    pub step: Option<u64>,

    /// Examples that were trained on; 0 if the run failed before they were read.
    pub examples_train: u64,
    /// Examples that were scored; 0 if the run failed before they were read.
    pub examples_evaluated: u64,
    /// Seconds of training, without what `prepare_seconds` and `evaluate_seconds` hold.
    #[serde(default, with = "number")]
    pub train_seconds: Option<f64>,
    /// Seconds of the Fisher information and the mask.
    #[serde(default, with = "number")]
    pub prepare_seconds: Option<f64>,
    /// Seconds of scoring.
    #[serde(default, with = "number")]
    pub evaluate_seconds: Option<f64>,
    /// Training examples a second of `train_seconds`.
    #[serde(default, with = "number")]
    pub examples_per_second: Option<f64>,
    /// Real tokens, padding not counted, a second of `train_seconds`.
    #[serde(default, with = "number")]
    pub tokens_per_second: Option<f64>,
    /// Most memory held during the run, in MiB: of the device on CUDA, of the process on the CPU.
    #[serde(default, with = "number")]
    pub peak_memory_mb: Option<f64>,
    /// Optimizer state in MiB.
    #[serde(default, with = "number")]
    pub optimizer_state_mb: Option<f64>,
    /// Parameters that the optimizer may change, in weights.
    #[serde(default, deserialize_with = "count")]
    pub trainable_parameters: Option<u64>,
    /// Weights of the child network; empty for methods without one.
    #[serde(default, deserialize_with = "count")]
    pub child_parameters: Option<u64>,
    /// Child network as a share of the weights in the mask's scope.
    #[serde(default, with = "number")]
    pub child_share: Option<f64>,
    /// SHA-256 of the mask; empty where there is none or a new one at every step.
    pub mask_sha256: Option<String>,

    /// Name of the device.
    pub device: String,
    /// Version of libtorch.
    pub torch: String,
    /// Version of this program.
    pub version: String,
    /// Commit that this program was built from, if it was known.
    pub commit: Option<String>,
    /// Start of the run, RFC 3339 in UTC.
    pub started_at: String,
}

impl Default for Row {
    /// Returns a row of the present schema version in which all else is empty.
    fn default() -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            experiment: String::new(),
            run: String::new(),
            model: String::new(),
            model_sha256: String::new(),
            task: String::new(),
            evaluated_on: String::new(),
            split: String::new(),
            preset: String::new(),
            method: String::new(),
            method_config: String::new(),
            seed: 0,
            learning_rate: 0.0,
            epochs: 0.0,
            batch_size: 0,
            gradient_accumulation: 0,
            max_length: 0,
            warmup: 0.0,
            weight_decay: 0.0,
            max_gradient_norm: None,
            adamw: String::new(),
            precision: String::new(),
            checkpoint: String::new(),
            status: Status::Ok,
            reason: None,
            headline: String::new(),
            score: None,
            accuracy: None,
            f1: None,
            matthews: None,
            pearson: None,
            spearman: None,
            combined: None,
            loss: None,
            degenerate: None,
            epoch: None,
            step: None,
            examples_train: 0,
            examples_evaluated: 0,
            train_seconds: None,
            prepare_seconds: None,
            evaluate_seconds: None,
            examples_per_second: None,
            tokens_per_second: None,
            peak_memory_mb: None,
            optimizer_state_mb: None,
            trainable_parameters: None,
            child_parameters: None,
            child_share: None,
            mask_sha256: None,
            device: String::new(),
            torch: String::new(),
            version: String::new(),
            commit: None,
            started_at: String::new(),
        }
    }
}

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
    parse(path, &bytes)
}

/// Parses the text of a results file; `path` is for messages.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Vec<Row>> {
    let mut reader = csv::Reader::from_reader(bytes);
    let header = reader.headers().map_err(|error| misread(path, &csv::StringRecord::new(), error))?.clone();
    if header.is_empty() {
        return Err(Error::data(path, 0, "is empty: a results file starts with a line of column names"));
    }
    reader
        .records()
        .map(|record| {
            let row: Row = record
                .and_then(|record| record.deserialize(Some(&header)))
                .map_err(|error| misread(path, &header, error))?;
            Ok(row)
        })
        .collect()
}

/// Says what csv found wrong, in terms of this file's lines and columns.
fn misread(path: &Path, header: &csv::StringRecord, error: csv::Error) -> Error {
    let line = error.position().map_or(0, |position| position.line() as usize);
    let message = match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => format!(
            "has {len} fields under {expected_len} column names; delete the line, and the run will be done again"
        ),
        csv::ErrorKind::Deserialize { err, .. } => {
            match err.field().and_then(|field| header.get(field as usize)) {
                Some(column) => format!("column `{column}`: {}", err.kind()),
                None => err.kind().to_string(),
            }
        }
        _ => error.to_string(),
    };
    Error::data(path, line, message)
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

/// A number that may be missing; NaN counts as missing, as it does in pandas.
mod number {
    use super::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        value.filter(|number| !number.is_nan()).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        Ok(Option::<f64>::deserialize(deserializer)?.filter(|number| !number.is_nan()))
    }
}

/// Reads a whole number that may be missing; pandas writes one as `12.0` if the column has gaps.
fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let parse = |text: String| {
        let digits = text.strip_suffix(".0").unwrap_or(&text);
        digits.parse().map_err(|_| serde::de::Error::custom(format!("`{text}` is not a whole number")))
    };
    Option::<String>::deserialize(deserializer)?.map(parse).transpose()
}

/// Reads a truth value that may be missing, in any case of letters.
fn flag<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<bool>, D::Error> {
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
        assert!(line.starts_with("1,\"a,b\",,\"say \"\"x\"\"\",,"), "{line}");
    }

    #[test]
    fn nan_is_an_empty_field() {
        let row = Row { score: Some(f64::NAN), loss: Some(f64::INFINITY), ..Row::default() };
        let back = parse(Path::new("results.csv"), &file_of(&[&row])).unwrap();
        assert_eq!((back[0].score, back[0].loss), (None, Some(f64::INFINITY)));
    }

    /// The columns that must be there, in another order, with one of the user's own.
    const REQUIRED: &str = "note,seed,learning_rate,epochs,batch_size,gradient_accumulation,max_length,warmup,\
        weight_decay,schema_version,experiment,run,model,model_sha256,task,evaluated_on,split,preset,method,\
        method_config,adamw,precision,checkpoint,status,headline,examples_train,examples_evaluated,device,torch,\
        version,started_at";
    const VALUES: &str = "mine,42,4e-5,3.0,16,1,128,0.1,0.01,1,e,0f,m,s,rte,rte,validation,paper,vanilla,,torch,\
        bf16,last,ok,accuracy,10,5,cpu,2.11.0,0.1.0,2026-01-01T00:00:00Z";

    #[test]
    fn takes_any_order_missing_optional_columns_and_further_ones() {
        let rows = parsed(&format!("{REQUIRED}\n{VALUES}\n")).unwrap();
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
        let bad_number = parsed(&format!("{REQUIRED},score\n{VALUES},1\n{VALUES},high\n")).unwrap_err().to_string();
        assert_eq!(bad_number, "results.csv:3: column `score`: invalid float literal");
        let bad_step = parsed(&format!("{REQUIRED},step\n{VALUES},1.5\n")).unwrap_err().to_string();
        assert!(bad_step.starts_with("results.csv:2: ") && bad_step.contains("`1.5` is not a whole"), "{bad_step}");
        let torn = parsed(&format!("{REQUIRED}\n{VALUES}\nmine,42")).unwrap_err().to_string();
        assert!(torn.starts_with("results.csv:3: has 2 fields under 31 column names"), "{torn}");
        let missing = parsed("schema_version\n1\n").unwrap_err().to_string();
        assert!(missing.starts_with("results.csv:2: ") && missing.contains("`experiment`"), "{missing}");
        assert_eq!(
            parsed("").unwrap_err().to_string(),
            "results.csv: is empty: a results file starts with a line of column names"
        );
    }
}
