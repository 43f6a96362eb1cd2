//! The comparison of methods, from the rows of result files.
//!
//! Runs that differ in nothing but the seed make a group, groups that answer the same question stand in a block. Runs
//! that failed are counted, not dropped, and a method is set against vanilla on the seeds that both have finished.

mod render;

use std::collections::{BTreeMap, HashMap, HashSet};

pub(crate) use render::markdown_text;

use super::cost::Cost;
use crate::experiment::results::{Row, Status};
use crate::method::option_list;
use crate::statistics::{confidence_half_width, is_above, maximum, mean, median, standard_deviation};

/// Name of the method that the others are set against: plain fine-tuning.
const BASELINE: &str = "vanilla";

/// A comparison of all groups of runs; shown by [`Comparison::to_text`] and its siblings.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// The blocks, in the order in which they first appear.
    pub blocks: Vec<Block>,
    /// Rows left out because the same run was there already, as when two files share runs.
    pub repeated: Repetition,
    /// Rows left out because they are of trials that only chose hyper-parameters.
    pub trials: usize,
}

/// The groups that were trained on the same task and scored with the same metric on the same split.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// Tasks that were trained on before, between `>`; empty where training started from pretrained weights.
    pub source_task: String,
    /// Task that was trained on.
    pub task: String,
    /// Task that was scored.
    pub evaluated_on: String,
    /// Split that was scored.
    pub split: String,
    /// Name of the headline metric.
    pub headline: String,
    /// The beginning of the hash of the data that were scored, where other blocks have other data under the same names.
    pub data: String,
    /// The groups, in the order in which they first appear.
    pub groups: Vec<Group>,
}

/// The runs that differ in nothing but the seed. Scores are unscaled: 1 is best.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// The pretrained encoder.
    pub model: String,
    /// Name of the method; of a chain of stages, the names between `>`.
    pub method: String,
    /// The settings that tell this group from others of its block, as `key=value` pairs between spaces.
    pub settings: String,
    /// All runs, however they ended.
    pub runs: usize,
    /// Runs that ended well, degenerate ones among them; the statistics are of these.
    pub ok: usize,
    /// Runs that ended well and have no score; the metric is undefined for their predictions.
    pub unscored: usize,
    /// Runs whose loss or gradient stopped being finite.
    pub diverged: usize,
    /// Runs that ended in an error.
    pub failed: usize,
    /// Runs that ended well and predicted one class only.
    pub degenerate: usize,
    /// Runs beyond the first of a seed: they differ in something that the result file has no column for.
    pub surplus: usize,
    /// The scores of the runs that have one.
    pub scores: Vec<f64>,
    /// Mean score.
    pub mean: Option<f64>,
    /// Standard deviation of the scores over seeds.
    pub standard_deviation: Option<f64>,
    /// Half the width of the 95 % confidence interval of the mean.
    pub half_width: Option<f64>,
    /// Median score.
    pub median: Option<f64>,
    /// Highest score.
    pub best: Option<f64>,
    /// Whether this is what the others are set against: plain fine-tuning, in every stage.
    pub is_baseline: bool,
    /// Number of vanillas that were each tuned by themselves, where there is more than one: no difference is given then.
    pub rival_baselines: usize,
    /// Whether no group of the same model in this block has a higher mean.
    pub has_best_mean: bool,
    /// What sets it apart from vanilla with the same model and hyper-parameters.
    pub difference: Option<Difference>,
    /// The differences that it sums up, one a common seed.
    pub differences: Vec<f64>,
    /// What the runs took.
    pub cost: Cost,
    /// Seconds of preparation and training over those of this vanilla, where the devices are the same.
    pub relative_time: Option<f64>,
}

/// The differences of scores to vanilla, seed by seed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difference {
    /// Seeds that both have a score for.
    pub seeds: usize,
    /// Mean difference; above 0, vanilla is beaten.
    pub mean: f64,
    /// Standard deviation of the differences.
    pub standard_deviation: Option<f64>,
    /// Half the width of the 95 % confidence interval of the mean difference; nothing where the seeds tell nothing of the spread: one
    /// alone, or several that happen to agree, as accuracies of few examples do.
    pub half_width: Option<f64>,
}

/// Compares runs. All headline metrics are taken to be better the higher they are.
pub fn compare(rows: &[Row]) -> Comparison {
    let (rows, repeated) = without_repetition(rows);
    let (trials, rows): (Vec<&Row>, Vec<&Row>) = rows.into_iter().partition(|row| row.is_trial());
    let mut blocks: Vec<Block> = gather(&rows, |row| {
        ([&row.source_task, &row.task, &row.evaluated_on, &row.split, &row.headline], &row.evaluated_sha256)
    })
    .into_iter()
    .map(|(([source_task, task, evaluated_on, split, headline], data), rows)| Block {
        source_task: source_task.clone(),
        task: task.clone(),
        evaluated_on: evaluated_on.clone(),
        split: split.clone(),
        headline: headline.clone(),
        data: short_hash(data),
        groups: groups(&rows),
    })
    .collect();
    let names: Vec<[String; 5]> = blocks.iter().map(Block::names).collect();
    for block in &mut blocks {
        if names.iter().filter(|names| **names == block.names()).count() == 1 {
            block.data.clear();
        }
    }
    Comparison { blocks, repeated, trials: trials.len() }
}

impl Block {
    fn names(&self) -> [String; 5] {
        [&self.source_task, &self.task, &self.evaluated_on, &self.split, &self.headline].map(String::clone)
    }
}

/// Returns enough of a hash to tell two things apart.
pub(super) fn short_hash(hash: &str) -> String {
    hash.chars().take(12).collect()
}

/// Rows of runs that there are rows of already.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Repetition {
    /// How many there are.
    pub rows: usize,
    /// Those of them with another score than the row that counts, as runs on another device may have.
    pub contradictions: usize,
}

/// Keeps one row of each (run, purpose, data set, split, hash of the data), and counts the others. The first is kept, unless it
/// failed.
pub(super) fn without_repetition(rows: &[Row]) -> (Vec<&Row>, Repetition) {
    let mut places: HashMap<_, usize> = HashMap::new();
    let mut kept: Vec<&Row> = Vec::new();
    let mut contradictions = 0;
    for row in rows {
        let key = (&row.run, &row.purpose, &row.evaluated_on, &row.split, &row.evaluated_sha256);
        let place = *places.entry(key).or_insert(kept.len());
        match kept.get_mut(place) {
            None => kept.push(row),
            Some(earlier) if earlier.status == Status::Failed => *earlier = row,
            Some(earlier) => {
                let both = earlier.score.zip(row.score);
                contradictions +=
                    usize::from(both.is_some_and(|(one, other)| one.to_bits() != other.to_bits()));
            }
        }
    }
    let repeated = Repetition { rows: rows.len() - kept.len(), contradictions };
    (kept, repeated)
}

/// Collects rows by a key, in the order in which the keys first appear.
fn gather<'r, K: PartialEq>(rows: &[&'r Row], key: impl Fn(&'r Row) -> K) -> Vec<(K, Vec<&'r Row>)> {
    let mut collected: Vec<(K, Vec<&Row>)> = Vec::new();
    for &row in rows {
        let key = key(row);
        match collected.iter_mut().find(|(other, _)| *other == key) {
            Some((_, members)) => members.push(row),
            None => collected.push((key, vec![row])),
        }
    }
    collected
}

/// A setting of a method or a run.
#[derive(PartialEq)]
struct Setting {
    /// The stage that it belongs to, in a chain of them.
    stage: usize,
    name: String,
    value: String,
}

/// Hyper-parameters that trials may choose for each method on its own; methods are then compared across them.
const TUNED: [&str; 14] = [
    "learning_rate",
    "epochs",
    "batch_size",
    "micro_batch",
    "max_length",
    "warmup",
    "weight_decay",
    "max_gradient_norm",
    "optimizer",
    "epsilon",
    "adamw",
    "precision",
    "order",
    "checkpoint",
];

/// A pretrained model: its contents, whatever rows call it.
#[derive(Clone, Copy, PartialEq)]
struct Model<'r> {
    /// As the first row with these contents names it.
    name: &'r str,
    /// The `model_config` of that row.
    overrides: &'r str,
    /// SHA-256 of the weights, which may have been others under the same name, of the config that trained, and of the
    /// tokenizer.
    contents: [&'r str; 3],
}

impl<'r> Model<'r> {
    /// Returns the model of a row as the first of some rows names it.
    fn of(row: &'r Row, rows: &[&'r Row]) -> Self {
        let contents = |row: &'r Row| [&*row.model_sha256, &*row.config_sha256, &*row.tokenizer_sha256];
        // Rows that people made may have no hashes.
        let is_same = |other: &&&'r Row| {
            contents(other) == contents(row) && (other.model == row.model || !row.model_sha256.is_empty())
        };
        let first = rows.iter().find(is_same).copied().unwrap_or(row);
        Self { name: &first.model, overrides: &first.model_config, contents: contents(row) }
    }

    /// Returns what tells it from others of the same name.
    fn telling_contents(&self, others: impl Iterator<Item = Model<'r>> + Clone) -> Vec<String> {
        let namesakes = others.filter(|other| other.name == self.name);
        let differs =
            |place: usize| namesakes.clone().any(|other| other.contents[place] != self.contents[place]);
        let mut telling = Vec::new();
        for (place, name) in ["weights", "config", "tokenizer"].into_iter().enumerate() {
            if differs(place) {
                let is_typed =
                    name == "config" && namesakes.clone().any(|other| other.overrides != self.overrides);
                telling.push(match is_typed {
                    true => format!("model_config={}", self.overrides),
                    false => format!("{name}={}", short_hash(self.contents[place])),
                });
            }
        }
        telling
    }
}

/// What the runs of a group have in common.
#[derive(PartialEq)]
struct Identity<'r> {
    model: Model<'r>,
    /// SHA-256 of the training data, which may have been others under the same name.
    data: &'r str,
    method: String,
    method_settings: Vec<Setting>,
    hyperparameters: Vec<Setting>,
}

impl Identity<'_> {
    /// Returns the settings that are needed to tell this group from the others: a method's own settings from groups of the
    /// same method, hyper-parameters from all.
    fn telling_settings(&self, others: &[Identity]) -> String {
        let same_method = |other: &&Identity| other.method == self.method;
        let own = self.method_settings.iter().filter(|&setting| {
            others.iter().filter(same_method).any(|other| !other.method_settings.contains(setting))
        });
        let shared = (self.hyperparameters.iter())
            .filter(|&setting| others.iter().any(|other| !other.hyperparameters.contains(setting)));
        // In a chain a setting of one name may be of several stages; then all tell their stage, in each row.
        let elsewhere = |setting: &Setting| {
            let is_it = |other: &Setting| other.name == setting.name && other.stage != setting.stage;
            others.iter().filter(same_method).any(|other| other.method_settings.iter().any(is_it))
        };
        let of_stage = |setting: &Setting| match elsewhere(setting) {
            true => format!("stage{}.{}={}", setting.stage + 1, setting.name, setting.value),
            false => format!("{}={}", setting.name, setting.value),
        };
        let shared = shared.map(|setting| format!("{}={}", setting.name, setting.value));
        let mut settings: Vec<String> = own.map(of_stage).chain(shared).collect();
        settings.extend(self.model.telling_contents(others.iter().map(|other| other.model)));
        if others.iter().any(|other| other.data != self.data) {
            settings.push(format!("train_data={}", short_hash(self.data)));
        }
        settings.join(" ")
    }

    /// Whether every stage is plain fine-tuning.
    fn is_baseline(&self) -> bool {
        self.method_settings.is_empty() && self.method.split('>').all(|method| method == BASELINE)
    }

    /// Whether the other is vanilla, and all that vanilla shares with this one is equal.
    fn has_baseline(&self, other: &Identity) -> bool {
        let stages = |identity: &Identity| identity.method.split('>').count();
        let is_tuned = |own: &Setting| own.name == "purpose" && own.value == "tuned";
        let tuned = self.hyperparameters.iter().any(is_tuned);
        let alike = |(left, right): (&Setting, &Setting)| {
            left == right || (tuned && left.name == right.name && TUNED.contains(&left.name.as_str()))
        };
        other.is_baseline()
            && !self.is_baseline()
            && (other.model, other.data) == (self.model, self.data)
            && stages(other) == stages(self)
            && other.hyperparameters.len() == self.hyperparameters.len()
            && other.hyperparameters.iter().zip(&self.hyperparameters).all(alike)
    }
}

/// Makes the groups of one block.
fn groups(rows: &[&Row]) -> Vec<Group> {
    let mut sizes: Vec<u64> = rows.iter().map(|row| row.examples_train).filter(|&size| size > 0).collect();
    sizes.sort_unstable();
    sizes.dedup();
    // Runs that failed early may not know the size; it is a setting only where it was set.
    let size_is_setting = sizes.len() > 1;
    let (identities, members): (Vec<Identity>, Vec<Vec<&Row>>) = gather(rows, |row| Identity {
        model: Model::of(row, rows),
        data: &row.train_sha256,
        method: chain(row, &row.source_method, &row.method),
        method_settings: method_settings(row),
        hyperparameters: hyperparameters(row, size_is_setting),
    })
    .into_iter()
    .unzip();
    let mut groups: Vec<Group> = identities
        .iter()
        .zip(&members)
        .map(|(identity, rows)| {
            let baselines: Vec<&Vec<&Row>> = (identities.iter().zip(&members))
                .filter_map(|(other, rows)| identity.has_baseline(other).then_some(rows))
                .collect();
            group(identity, identity.telling_settings(&identities), rows, &baselines)
        })
        .collect();
    let models: Vec<_> =
        identities.iter().map(|own| [own.model.name, own.model.contents[0], own.data]).collect();
    mark_best_means(&mut groups, &models);
    groups
}

/// Makes the group of some rows; `baselines` are the rows of each vanilla that it could be set against: more than one where
/// vanilla was tuned more than once, and then nothing tells which of them was tuned alike.
fn group(identity: &Identity, settings: String, rows: &[&Row], baselines: &[&Vec<&Row>]) -> Group {
    let baseline = match baselines {
        [baseline] => Some(&baseline[..]),
        _ => None,
    };
    let with = |status| rows.iter().filter(|row| row.status == status).count();
    let ok: Vec<&&Row> = rows.iter().filter(|row| row.status == Status::Ok).collect();
    let scores: Vec<f64> = ok.iter().filter_map(|row| row.score).collect();
    let surplus = surplus(rows);
    // Which of several runs of a seed belongs to which, nothing tells.
    let paired = baseline.filter(|baseline| surplus == 0 && self::surplus(baseline) == 0);
    let differences = paired.map_or(Vec::new(), |baseline| differences(rows, baseline));
    let cost = Cost::of(rows);
    Group {
        model: identity.model.name.to_owned(),
        method: identity.method.clone(),
        settings,
        runs: rows.len(),
        ok: ok.len(),
        unscored: ok.len() - scores.len(),
        diverged: with(Status::Diverged),
        failed: with(Status::Failed),
        degenerate: ok.iter().filter(|row| row.degenerate == Some(true)).count(),
        surplus,
        mean: mean(&scores),
        standard_deviation: standard_deviation(&scores),
        half_width: confidence_half_width(&scores),
        median: median(&scores),
        best: maximum(&scores),
        is_baseline: identity.is_baseline(),
        rival_baselines: if baselines.len() > 1 { baselines.len() } else { 0 },
        has_best_mean: false,
        difference: difference(&differences),
        relative_time: baseline.and_then(|baseline| cost.relative_time(&Cost::of(baseline))),
        scores,
        differences,
        cost,
    }
}

/// Returns the number of runs beyond the first of their seed.
fn surplus(rows: &[&Row]) -> usize {
    rows.len() - rows.iter().map(|row| row.seed).collect::<HashSet<_>>().len()
}

/// Returns the score of each seed that has one.
fn scores_by_seed(rows: &[&Row]) -> BTreeMap<u64, f64> {
    let ok = rows.iter().filter(|row| row.status == Status::Ok);
    ok.filter_map(|row| Some((row.seed, row.score?))).collect()
}

/// Returns what sets the scores of some rows apart from those of others, one number a common seed.
fn differences(rows: &[&Row], baseline: &[&Row]) -> Vec<f64> {
    let baseline = scores_by_seed(baseline);
    let scores = scores_by_seed(rows);
    scores.iter().filter_map(|(seed, score)| Some(score - baseline.get(seed)?)).collect()
}

fn difference(differences: &[f64]) -> Option<Difference> {
    Some(Difference {
        seeds: differences.len(),
        mean: mean(differences)?,
        standard_deviation: standard_deviation(differences),
        half_width: confidence_half_width(differences).filter(|half_width| *half_width > 1e-12),
    })
}

/// Marks, among the groups of each model, its weights and what it was trained on, those that no other surpasses. A group that
/// stands alone is not marked.
fn mark_best_means(groups: &mut [Group], models: &[[&str; 3]]) {
    let means: Vec<Option<f64>> = groups.iter().map(|group| group.mean).collect();
    for (group, model) in groups.iter_mut().zip(models) {
        let of_model = models.iter().zip(&means).filter(|(other, _)| *other == model);
        let rivals: Vec<f64> = of_model.filter_map(|(_, mean)| *mean).collect();
        let is_beaten = |mean: f64| rivals.iter().any(|rival| is_above(*rival, mean));
        group.has_best_mean = rivals.len() > 1 && group.mean.is_some_and(|mean| !is_beaten(mean));
    }
}

/// Joins what the stages before a run have, if there are any, with what it has itself.
fn chain(row: &Row, earlier: &str, own: &str) -> String {
    if row.source_method.is_empty() { own.to_owned() } else { format!("{earlier}>{own}") }
}

/// Name of what stands among the settings of a first stage that started from a folder of unknown making.
const START: &str = "start";

/// Splits the settings of a run's method, or of those of several stages, into names and values.
fn method_settings(row: &Row) -> Vec<Setting> {
    let mut settings = stage_settings(&chain(row, &row.source_config, &row.method_config));
    settings.retain(|setting| setting.name != START);
    settings
}

fn stage_settings(config: &str) -> Vec<Setting> {
    let of_stage = |(stage, config): (usize, &str)| {
        let setting = move |(name, value)| Setting { stage, name, value };
        option_list(config).into_iter().map(setting).collect::<Vec<_>>()
    };
    config.split('>').enumerate().flat_map(of_stage).collect()
}

/// Returns what a run shares with runs of every other method, and the same of the stages before it.
fn hyperparameters(row: &Row, size_is_setting: bool) -> Vec<Setting> {
    let own = row.settings().into_iter().map(|(name, value)| (name.to_owned(), value));
    let of_sources = stage_settings(&row.source_settings)
        .into_iter()
        .map(|setting| (format!("stage{}.{}", setting.stage + 1, setting.name), setting.value));
    let mut settings: Vec<(String, String)> = own.chain(of_sources).collect();
    settings.push(("purpose".into(), row.purpose.clone()));
    // Runs that start from a folder of unknown making: all that tells them apart is what is in it.
    let of_chain = stage_settings(&row.source_config).into_iter().find(|setting| setting.name == START);
    let of_run = (row.source_method.is_empty() && !row.source_run.is_empty()).then(|| row.source_run.clone());
    settings.extend(of_chain.map(|setting| setting.value).or(of_run).map(|start| (START.into(), start)));
    if size_is_setting {
        settings.push(("examples_train".into(), row.examples_train.to_string()));
    }
    settings.into_iter().map(|(name, value)| Setting { stage: 0, name, value }).collect()
}

#[cfg(test)]
mod tests;
