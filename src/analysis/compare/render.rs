//! The comparison as text, as Markdown and as CSV.

use comfy_table::presets::{ASCII_MARKDOWN, UTF8_HORIZONTAL_ONLY};
use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};

use super::{Block, Comparison, Difference, Group, Repetition};
use crate::statistics::is_above;

/// What is said once below all tables, as they show it.
const LEGEND: &str = "\
Scores are times 100; ± is the standard deviation over seeds. Mean, median and best are of the runs that ended ok,
degenerate ones (one class predicted) among them; failed counts diverged runs too. The difference from vanilla is the mean
over common seeds, with its 95 % interval in square brackets and the number of these seeds in round ones.";

const CSV_HEADER: [&str; 26] = [
    "source_task",
    "task",
    "evaluated_on",
    "split",
    "headline",
    "data",
    "model",
    "method",
    "settings",
    "runs",
    "ok",
    "unscored",
    "diverged",
    "failed",
    "degenerate",
    "surplus",
    "mean",
    "standard_deviation",
    "half_width_95",
    "median",
    "best",
    "has_best_mean",
    "common_seeds",
    "difference",
    "difference_standard_deviation",
    "difference_half_width_95",
];

/// How the tables and the lines around them are drawn.
struct Style {
    lines: TableStyle,
    /// Begins a title.
    heading: &'static str,
    /// Stands between two paragraphs, besides the end of the line.
    gap: &'static str,
    /// Stand around the best mean.
    best: [&'static str; 2],
    best_legend: &'static str,
    escape: fn(&str) -> String,
}

const TEXT: Style = Style {
    lines: UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none()),
    heading: "",
    gap: "",
    best: ["* ", ""],
    best_legend: "* marks the best mean of a model.",
    escape: str::to_owned,
};

const MARKDOWN: Style = Style {
    lines: ASCII_MARKDOWN,
    heading: "### ",
    gap: "\n",
    best: ["**", "**"],
    best_legend: "The best mean of a model is bold.",
    escape: markdown_text,
};

/// Writes a text so that Markdown shows its characters, in a cell of a table, too.
pub(crate) fn markdown_text(text: &str) -> String {
    let mut escaped = String::new();
    for character in text.chars() {
        match character {
            '\\' | '|' | '<' | '*' | '`' | '[' | ']' => escaped.extend(['\\', character]),
            _ if character.is_control() => escaped.push(' '),
            _ => escaped.push(character),
        }
    }
    escaped
}

impl Comparison {
    /// Returns aligned tables for the terminal, one a block, each with what the spread of its runs allows to say.
    pub fn to_text(&self) -> String {
        self.render(&TEXT)
    }

    /// Returns the same as Markdown.
    pub fn to_markdown(&self) -> String {
        self.render(&MARKDOWN)
    }

    /// Returns one CSV line a group, with a header. Scores are unscaled here, with all their digits.
    pub fn to_csv(&self) -> String {
        let groups =
            self.blocks.iter().flat_map(|block| block.groups.iter().map(move |group| (block, group)));
        let lines = groups.map(|(block, group)| csv_line(block, group));
        let mut writer = csv::Writer::from_writer(Vec::new());
        for line in std::iter::once(CSV_HEADER.map(str::to_owned)).chain(lines) {
            writer.write_record(&line).expect("lines of equal length can be written to memory");
        }
        let bytes = writer.into_inner().expect("memory can be flushed");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn render(&self, style: &Style) -> String {
        let blocks: String = self.blocks.iter().map(|block| block.render(style) + "\n").collect();
        blocks + &self.notes(style)
    }

    /// Returns in Markdown what is said once below all tables.
    pub(in crate::analysis) fn markdown_notes(&self) -> String {
        self.notes(&MARKDOWN)
    }

    fn notes(&self, style: &Style) -> String {
        let gap = style.gap;
        let mut text = String::new();
        let Repetition { rows, contradictions } = self.repeated;
        if rows > 0 {
            let noun = if rows == 1 { "row" } else { "rows" };
            text += &format!("{rows} {noun} left out: the same run was there already.\n{gap}");
        }
        if contradictions > 0 {
            text += &format!("{}\n{gap}", self.repeated.warning());
        }
        if self.trials > 0 {
            let noun = if self.trials == 1 { "row" } else { "rows" };
            text += &format!("{} {noun} left out: trials that chose the settings.\n{gap}", self.trials);
        }
        format!("{text}{LEGEND}\n{}", style.best_legend)
    }
}

impl Repetition {
    /// Says that scores contradict each other.
    pub fn warning(&self) -> String {
        let have = if self.contradictions == 1 { "has" } else { "have" };
        format!(
            "{} of the rows left out {have} another score than the row of the same run that counts, the first: runs on other devices \
             or machines differ in rounding. Compare such files one by one.",
            self.contradictions
        )
    }
}

impl Block {
    /// Returns title, table and conclusions as Markdown.
    pub(in crate::analysis) fn to_markdown(&self) -> String {
        self.render(&MARKDOWN)
    }

    /// Returns what names a group in this block: the method, the settings that tell it apart and, of several, the model.
    pub(in crate::analysis) fn label(&self, group: &Group) -> String {
        match self.models().len() {
            1 => group.label(),
            _ => format!("{}  {}", group.model, group.label()),
        }
    }

    fn render(&self, style: &Style) -> String {
        let gap = style.gap;
        let title = (style.escape)(&self.title());
        let mut text = format!("{}{title}\n{gap}{}\n", style.heading, self.table(style));
        for line in self.conclusions(style) {
            text += &format!("{gap}{line}\n");
        }
        text
    }

    /// Returns the models, in the order in which they first appear.
    fn models(&self) -> Vec<&str> {
        let mut models: Vec<&str> = Vec::new();
        for group in &self.groups {
            if !models.contains(&group.model.as_str()) {
                models.push(&group.model);
            }
        }
        models
    }

    /// Returns the tasks, the split, the model if there is one only, and the metric.
    pub(in crate::analysis) fn title(&self) -> String {
        let mut task = match self.source_task.is_empty() {
            true => self.task.clone(),
            false => format!("{} > {}", self.source_task.replace('>', " > "), self.task),
        };
        if self.task != self.evaluated_on {
            task += &format!(", evaluated on {}", self.evaluated_on);
        }
        let model = match self.models()[..] {
            [model] => format!(", {model}"),
            _ => String::new(),
        };
        let data = match self.data.as_str() {
            "" => String::new(),
            data => format!(", data {data}"),
        };
        format!("{task} ({}{data}){model}: {}", self.split, self.headline)
    }

    fn table(&self, style: &Style) -> String {
        let with_models = self.models().len() > 1;
        let texts = if with_models { 2 } else { 1 };
        let mut header =
            vec!["method", "runs", "ok", "mean ± sd", "median", "best", "failed", "degenerate", "vs vanilla"];
        if with_models {
            header.insert(0, "model");
        }
        let mut table = Table::new();
        table.load_style(style.lines).set_header(header);
        for group in &self.groups {
            let [before, after] = if group.has_best_mean { style.best } else { ["", ""] };
            let mut cells = vec![
                (style.escape)(&group.label()),
                group.runs.to_string(),
                group.ok.to_string(),
                format!("{before}{}{after}", with_spread(group.mean.map(percent), group.standard_deviation)),
                group.median.map_or("-".into(), percent),
                group.best.map_or("-".into(), percent),
                (group.failed + group.diverged).to_string(),
                group.degenerate.to_string(),
                group.difference.map_or("-".into(), |difference| difference.cell()),
            ];
            if with_models {
                cells.insert(0, (style.escape)(&group.model));
            }
            table.add_row(cells);
        }
        table.column_iter_mut().skip(texts).for_each(|column| {
            column.set_cell_alignment(CellAlignment::Right);
        });
        table.trim_fmt()
    }

    /// Returns one sentence a model on what its runs show about vanilla, and one for whatever the table hides.
    fn conclusions(&self, style: &Style) -> Vec<String> {
        let models = self.models();
        let mut lines: Vec<String> = models
            .iter()
            .filter_map(|model| {
                let sentence = self.conclusion(model)?;
                Some(if models.len() > 1 { format!("{model}, {sentence}") } else { sentence })
            })
            .collect();
        for (count, what) in [
            (
                self.sum(|group| group.unscored),
                "ended ok without a score, and are missing from the statistics",
            ),
            (
                self.sum(|group| group.surplus),
                "repeat a seed of their group, so that something else sets them apart",
            ),
        ] {
            if count > 0 {
                lines.push(format!("{count} of {} runs {what}", self.sum(|group| group.runs)));
            }
        }
        if let Some(rivals) =
            self.groups.iter().map(|group| group.rival_baselines).max().filter(|&most| most > 1)
        {
            lines.push(format!(
                "vanilla was tuned {rivals} times, and nothing tells which of them a tuned method belongs to: no difference; \
                 give each tuning a results file of its own"
            ));
        }
        lines.iter().map(|line| (style.escape)(line)).collect()
    }

    fn conclusion(&self, model: &str) -> Option<String> {
        let groups = || self.groups.iter().filter(|group| group.model == model);
        let compared = || groups().filter_map(|group| Some((group, group.mean?, group.difference?)));
        // The first of equals.
        let best = compared().reduce(|best, other| if is_above(other.1, best.1) { other } else { best });
        let Some((best, _, difference)) = best else {
            let mut others =
                groups().filter(|group| !group.is_baseline && group.rival_baselines == 0).peekable();
            others.peek()?;
            let reason = match groups().any(|group| group.surplus > 0) {
                true => "seeds have more than one run in a group",
                false => "no seed has a score of it and of another method with the same settings",
            };
            return Some(format!("no difference from vanilla: {reason}"));
        };
        let choice = match compared().count() {
            1 => String::new(),
            count => format!(" (the best of {count} means, which favours it)"),
        };
        Some(format!("{}: {}{choice}", best.label(), difference.sentence()))
    }

    fn sum(&self, count: fn(&Group) -> usize) -> usize {
        self.groups.iter().map(count).sum()
    }
}

impl Group {
    fn label(&self) -> String {
        match self.settings.as_str() {
            "" => self.method.clone(),
            settings => format!("{}  {settings}", self.method),
        }
    }
}

impl Difference {
    /// Returns the ends of the 95 % interval of the mean.
    fn interval(&self) -> Option<(f64, f64)> {
        let half_width = self.half_width?;
        Some((self.mean - half_width, self.mean + half_width))
    }

    fn cell(&self) -> String {
        let interval = self.interval().map_or(String::new(), |(low, high)| {
            format!(" [{}, {}]", signed_percent(low), signed_percent(high))
        });
        format!("{}{interval} ({})", signed_percent(self.mean), self.seeds)
    }

    fn sentence(&self) -> String {
        let mean = signed_percent(self.mean);
        let seeds = self.seeds;
        let Some((low, high)) = self.interval() else {
            return match seeds {
                1 => {
                    format!(
                        "difference from vanilla {mean} on 1 common seed, which says nothing about the spread"
                    )
                }
                _ => format!(
                    "difference from vanilla {mean} over {seeds} common seeds, the same on each, so that nothing is known \
                     of the spread"
                ),
            };
        };
        let verdict = if low > 0.0 {
            "better than vanilla"
        } else if high < 0.0 {
            "worse than vanilla"
        } else {
            "which does not separate them"
        };
        format!(
            "difference from vanilla {} over {seeds} common seeds; 95 % interval of the mean {} to {}, {verdict}",
            with_spread(Some(mean), self.standard_deviation),
            signed_percent(low),
            signed_percent(high)
        )
    }
}

fn percent(score: f64) -> String {
    format!("{:.2}", 100.0 * score)
}

fn signed_percent(difference: f64) -> String {
    let text = format!("{:+.2}", 100.0 * difference);
    // What rounds to nothing has no sign.
    if text == "-0.00" { "+0.00".into() } else { text }
}

/// Joins a mean and its standard deviation, as far as there are any.
fn with_spread(mean: Option<String>, standard_deviation: Option<f64>) -> String {
    let mean = mean.unwrap_or("-".into());
    standard_deviation.map_or(mean.clone(), |deviation| format!("{mean} ± {}", percent(deviation)))
}

fn csv_line(block: &Block, group: &Group) -> [String; CSV_HEADER.len()] {
    let number = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
    let difference = group.difference;
    [
        block.source_task.clone(),
        block.task.clone(),
        block.evaluated_on.clone(),
        block.split.clone(),
        block.headline.clone(),
        block.data.clone(),
        group.model.clone(),
        group.method.clone(),
        group.settings.clone(),
        group.runs.to_string(),
        group.ok.to_string(),
        group.unscored.to_string(),
        group.diverged.to_string(),
        group.failed.to_string(),
        group.degenerate.to_string(),
        group.surplus.to_string(),
        number(group.mean),
        number(group.standard_deviation),
        number(group.half_width),
        number(group.median),
        number(group.best),
        group.has_best_mean.to_string(),
        difference.map_or(0, |difference| difference.seeds).to_string(),
        number(difference.map(|difference| difference.mean)),
        number(difference.and_then(|difference| difference.standard_deviation)),
        number(difference.and_then(|difference| difference.half_width)),
    ]
}
