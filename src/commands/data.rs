//! `data`: list, fetch, check.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use child_tuning::data::{
    Dataset, Download, FetchEvent, FetchOptions, Fetched, Objective, Split, SplitCheck, TaskCard,
    TokenEncoder, check_splits, data_roots, downloads_of, fetched_data_folder, read_present,
};
use child_tuning::error::Error;
use child_tuning::hub::model_folder;
use clap::{Args, Subcommand, ValueEnum};
use indicatif::BinaryBytes;

use super::progress::TransferDisplay;
use super::signals::end_at_once;
use super::table::table;
use super::{DataArguments, show, tell};

#[derive(Args)]
pub struct DataCommandArguments {
    #[command(subcommand)]
    command: DataCommand,
}

#[derive(Subcommand)]
enum DataCommand {
    /// Show the built-in tasks: what they ask, and where their data are or how to get them.
    List {
        #[command(flatten)]
        data: DataArguments,
    },
    /// Download data sets from where they are published; resumes an interrupted download.
    ///
    /// Experiments find what was fetched without being told where. Every file is compared with its published SHA-256. The
    /// licences of the data sets are their own: they are shown first, and stand beside the data in SOURCE.txt.
    #[command(after_help = "\
Environment variables:
  CHILD_TUNING_CACHE          where to keep downloads [default: $XDG_CACHE_HOME/child-tuning or ~/.cache/child-tuning]
  HTTPS_PROXY, NO_PROXY       as everywhere

Examples:
  child-tuning data fetch cola rte mrpc stsb
  child-tuning data fetch mnli --to /data/glue        # then: child-tuning run ... --data /data/glue")]
    Fetch(FetchArguments),
    /// Count, compare and measure what the data sets hold: labels, repetitions, leaks from train, lengths.
    #[command(after_help = "\
Examples:
  child-tuning data check
  child-tuning data check rte --model models/bert-base-uncased --max-length 128
  child-tuning data check --format csv > data.csv")]
    Check(CheckArguments),
}

#[derive(Args)]
struct FetchArguments {
    /// Tasks whose data to fetch, such as rte; `data list` shows them
    #[arg(required = true, value_name = "TASK", value_delimiter = ',')]
    tasks: Vec<String>,
    /// Folder to make the data sets' folders in [default: data/ in the cache, where experiments look]
    #[arg(long, value_name = "FOLDER")]
    to: Option<PathBuf>,
    /// Mirror: takes the place of scheme and host of every address
    #[arg(long, value_name = "URL", env = "CHILD_TUNING_DATA_ENDPOINT")]
    endpoint: Option<String>,
}

#[derive(Args)]
struct CheckArguments {
    /// Tasks, by name or card file [default: every built-in task with data here]
    #[arg(value_name = "TASK", value_delimiter = ',')]
    tasks: Vec<String>,
    #[command(flatten)]
    data: DataArguments,
    /// Model whose tokenizer to measure lengths in tokens with: a folder, or a model of the Hub that `model fetch` has fetched
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Longest example in tokens, as in `train.max_length`: what is longer is counted
    #[arg(long, default_value = "128", value_name = "N")]
    max_length: NonZeroUsize,
    /// Form of the result
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// A table a task for the terminal
    Text,
    /// One CSV: task, split, measure, value
    Csv,
}

/// Calls the subcommand.
pub fn data(arguments: DataCommandArguments) -> Result<ExitCode> {
    match arguments.command {
        DataCommand::List { data } => list(&data.roots()?),
        DataCommand::Fetch(arguments) => fetch(&arguments),
        DataCommand::Check(arguments) => check(&arguments),
    }
}

fn builtin_cards() -> Vec<TaskCard> {
    TaskCard::builtin_names().into_iter().filter_map(TaskCard::builtin).collect()
}

fn list(roots: &[PathBuf]) -> Result<ExitCode> {
    let header = ["task", "texts", "labels", "headline", "train", "dev", "test", "where", "licence"];
    let mut table = table(&header, 4..7);
    for card in builtin_cards() {
        let found = read_present(&card, roots);
        let place = match &found {
            Ok(splits) if splits.is_empty() => format!("not here: child-tuning data fetch {}", card.name),
            Ok(splits) => places(splits),
            Err(error) => format!("not usable: {error}"),
        };
        let splits = found.unwrap_or_default();
        let rows = |split| {
            let dataset = splits.iter().find(|(found, _)| *found == split);
            dataset.map_or("-".to_owned(), |(_, dataset)| dataset.examples.len().to_string())
        };
        let texts = if card.is_pair() { "two" } else { "one" };
        let labels = match &card.objective {
            Objective::Classification { labels } => labels.len().to_string(),
            Objective::Regression => "score".to_owned(),
        };
        let [train, dev, test] = Split::ALL.map(rows);
        table.add_row([
            card.name.clone(),
            texts.to_owned(),
            labels,
            card.headline.to_string(),
            train,
            dev,
            test,
            place,
            card.licence.clone(),
        ]);
    }
    show(table)?;
    Ok(ExitCode::SUCCESS)
}

/// Names the folders that splits were found in.
fn places(splits: &[(Split, Dataset)]) -> String {
    let folders: BTreeSet<_> = splits.iter().filter_map(|(_, dataset)| dataset.path.parent()).collect();
    folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn fetch(arguments: &FetchArguments) -> Result<ExitCode> {
    let cards = arguments.tasks.iter().map(|task| TaskCard::named(task)).collect::<Result<Vec<_>, _>>()?;
    let downloads = downloads_of(&cards)?;
    let to = arguments.to.clone().or_else(fetched_data_folder).ok_or_else(|| {
        Error::configuration("there is no home folder to keep downloads in; name a folder with --to")
    })?;
    let options = FetchOptions { to, endpoint: arguments.endpoint.clone() };
    end_at_once()?;
    for (card, download) in downloads {
        fetch_one(card, download, &options)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn fetch_one(card: &TaskCard, download: &Download, options: &FetchOptions) -> Result<()> {
    let folder = options.to.join(&download.folder);
    if !download.is_complete(&options.to) {
        tell(format_args!("{}: {}, {}", card.name, card.source, BinaryBytes(download.bytes())));
        tell(format_args!("licence: {}", card.licence));
    }
    let mut display = TransferDisplay::new();
    let result = download.fetch(card, options, &mut |event| match event {
        FetchEvent::Transfer(event) => display.show(event),
        FetchEvent::Unpacking => display.line("unpacking"),
    });
    display.finish();
    let result = result?;
    if Some(&options.to) == fetched_data_folder().as_ref() {
        let roots = data_roots(&[], &[])?;
        let before = roots.iter().take_while(|root| **root != options.to);
        let mut folders = before.flat_map(|root| card.folders.iter().map(move |folder| root.join(folder)));
        if let Some(nearer) = folders.find(|path| path.exists()) {
            let (nearer, to) = (nearer.display(), options.to.display());
            tell(format_args!(
                "note: experiments started here find {nearer} first; --data {to} puts what was fetched before it"
            ));
        }
    }
    match result {
        Fetched::New => show(format_args!("{}: in {}", card.name, folder.display())),
        Fetched::Already => show(format_args!("{}: is complete already, in {}", card.name, folder.display())),
    }
}

fn check(arguments: &CheckArguments) -> Result<ExitCode> {
    let named = arguments.tasks.iter().map(|task| TaskCard::named(task)).collect::<Result<Vec<_>, _>>()?;
    let all = named.is_empty();
    let cards = if all { builtin_cards() } else { named };
    let roots = arguments.data.roots()?;
    let encoder = |name: &String| TokenEncoder::from_folder(&model_folder(name)?.0);
    let encoder = arguments.model.as_ref().map(encoder).transpose()?;
    let mut csv = csv::Writer::from_writer(Vec::new());
    csv.write_record(["task", "split", "measure", "value"])?;
    let (mut checked, mut unreadable) = (0, false);
    for card in &cards {
        let splits = match read_present(card, &roots) {
            Ok(splits) if splits.is_empty() && all => continue,
            Ok(splits) if splits.is_empty() => return Err(absent(card, &roots).into()),
            Ok(splits) => splits,
            Err(error) => {
                // The other tasks are worth a look all the same.
                tell(format_args!("error: {error}"));
                unreadable = true;
                continue;
            }
        };
        let checks = check_splits(card, &splits, arguments.max_length.get(), encoder.as_ref())?;
        checked += 1;
        match arguments.format {
            Format::Text => show(format_args!("{}\n", text(card, &checks, arguments.max_length.get())))?,
            Format::Csv => {
                for check in &checks {
                    for measure in measures(check, arguments.max_length.get()) {
                        csv.write_record([&card.name, check.split.name(), &measure.name, &measure.value])?;
                    }
                }
            }
        }
    }
    if let Format::Csv = arguments.format {
        let bytes = csv.into_inner().context("cannot finish the CSV")?;
        show(String::from_utf8(bytes)?.trim_end())?;
    } else if checked == 0 && !unreadable {
        show("no data set of a built-in task is here; `child-tuning data fetch TASK` gets one")?;
    }
    Ok(ExitCode::from(if unreadable { 2 } else { 0 }))
}

fn absent(card: &TaskCard, roots: &[PathBuf]) -> Error {
    let places: Vec<_> = roots.iter().map(|root| root.display().to_string()).collect();
    let advice = match Download::of(&card.name) {
        Some(_) => format!("`child-tuning data fetch {}` gets them", card.name),
        None => "name a folder with --data".to_owned(),
    };
    Error::configuration(format!("no data of task `{}` are in {}; {advice}", card.name, places.join(", ")))
}

/// One figure about a split.
struct Measure {
    /// The name in the CSV, which sorts and filters well.
    name: String,
    /// The value in the CSV.
    value: String,
    /// The value in a table, with its share of the rows.
    shown: String,
}

fn measures(check: &SplitCheck, max_length: usize) -> Vec<Measure> {
    let mut measures = Vec::new();
    let mut plain = |name: &str, value: String| {
        measures.push(Measure { name: name.to_owned(), shown: value.clone(), value });
    };
    plain("rows", check.rows.to_string());
    if let Some(published) = check.published {
        plain("published", published.to_string());
    }
    let mut count = |name: &str, count: usize| {
        let percent = format!("{:.2} %", 100.0 * count as f64 / check.rows.max(1) as f64);
        let shown = if count == 0 { "0".to_owned() } else { format!("{count} ({percent})") };
        measures.push(Measure { name: name.to_owned(), value: count.to_string(), shown });
    };
    for (label, rows) in &check.labels {
        count(&format!("label {label}"), *rows);
    }
    count("unlabelled", check.unlabelled);
    count("duplicates", check.duplicates);
    count("contradictions", check.contradictions);
    if let Some(common) = check.in_train {
        count("in train", common.rows);
        count("in train with another label", common.other_label);
    }
    count("empty texts", check.empty);
    count(&format!("over {max_length} words"), check.long);
    if let Some(tokens) = &check.tokens {
        count(&format!("over {max_length} tokens"), tokens.cut);
    }
    let mut plain = |name: String, value: String| {
        measures.push(Measure { name, shown: value.clone(), value });
    };
    if let Some(scores) = check.scores {
        plain("score mean".into(), format!("{:.3}", scores.mean));
        plain("score least".into(), scores.least.to_string());
        plain("score greatest".into(), scores.greatest.to_string());
    }
    let kinds = [("words", Some(check.words)), ("tokens", check.tokens.map(|tokens| tokens.lengths))];
    for (kind, lengths) in kinds.into_iter().filter_map(|(kind, lengths)| Some((kind, lengths?))) {
        plain(format!("{kind} mean"), format!("{:.1}", lengths.mean));
        plain(format!("{kind} median"), lengths.median.to_string());
        plain(format!("{kind} 95 %"), lengths.percentile_95.to_string());
        plain(format!("{kind} longest"), lengths.longest.to_string());
    }
    measures
}

/// Puts the splits of a task side by side.
fn text(card: &TaskCard, checks: &[SplitCheck], max_length: usize) -> String {
    let mut header = vec![card.name.as_str()];
    header.extend(checks.iter().map(|check| check.split.name()));
    let mut table = table(&header, 1..header.len());
    let columns: Vec<Vec<Measure>> = checks.iter().map(|check| measures(check, max_length)).collect();
    let mut names: Vec<&str> = Vec::new();
    for measure in columns.iter().flatten() {
        if !names.contains(&measure.name.as_str()) {
            names.push(&measure.name);
        }
    }
    for name in names {
        let cell = |column: &Vec<Measure>| {
            let measure = column.iter().find(|measure| measure.name == name);
            measure.map_or("-".to_owned(), |measure| measure.shown.clone())
        };
        table.add_row([name.to_owned()].into_iter().chain(columns.iter().map(cell)));
    }
    let verdicts = checks.iter().map(|check| {
        let verdict = match check.published {
            None => "no published count".to_owned(),
            Some(published) if published == check.rows => "as many rows as published".to_owned(),
            Some(published) => format!("differs: found {} rows, published {published}", check.rows),
        };
        format!(" {}: {verdict}; {}", check.split, check.path.display())
    });
    [table.to_string()].into_iter().chain(verdicts).collect::<Vec<_>>().join("\n")
}
