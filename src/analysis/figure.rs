//! The scores of a block as an SVG figure: a row for each group, a dot for each seed.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::compare::{Block, Group};
use crate::statistics::{maximum, minimum};

const FONT: (&str, i32) = ("sans-serif", 13);
const ROW_HEIGHT: usize = 22;
/// Above the first row.
const TOP: usize = 8;
/// Numbers and words below the last row.
const AXIS: usize = 44;
const PANEL_WIDTH: usize = 400;
/// What a character of a label takes, at most on average.
const CHARACTER_WIDTH: usize = 7;
const DOTS: RGBColor = RGBColor(110, 150, 200);

/// What a row of a panel shows, times 100.
struct Spread {
    dots: Vec<f64>,
    /// Mean, and how far the line through it reaches to both sides.
    mean: Option<(f64, f64)>,
}

impl Spread {
    /// Takes what can be drawn; a file may hold infinity, and numbers far from any score.
    fn new(dots: &[f64], mean: Option<f64>, reach: Option<f64>) -> Self {
        let finite = |number: &f64| number.abs() < 1e3;
        let reach = reach.filter(finite).unwrap_or(0.0);
        Self {
            dots: dots.iter().filter(|dot| finite(dot)).map(|dot| 100.0 * dot).collect(),
            mean: mean.filter(finite).map(|mean| (100.0 * mean, 100.0 * reach)),
        }
    }

    fn scores(group: &Group) -> Self {
        Self::new(&group.scores, group.mean, group.standard_deviation)
    }

    fn differences(group: &Group) -> Self {
        let difference = group.difference;
        Self::new(
            &group.differences,
            difference.map(|difference| difference.mean),
            difference.and_then(|difference| difference.half_width),
        )
    }

    fn ends(&self) -> impl Iterator<Item = f64> {
        let line = self.mean.map(|(mean, reach)| [mean - reach, mean + reach]);
        self.dots.iter().copied().chain(line.into_iter().flatten())
    }
}

/// Draws the scores of each group, and beside them, where vanilla is there, the differences to it. A dot is a seed; the line
/// through the mean is as long as the standard deviation to both sides, and for differences as the 95 % interval.
pub fn figure(block: &Block) -> String {
    let mut svg = String::new();
    draw(block, &mut svg).expect("a string can be drawn to");
    svg
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw(block: &Block, svg: &mut String) -> Drawn {
    let labels: Vec<String> = block.groups.iter().map(|group| block.label(group)).collect();
    let longest = labels.iter().map(|label| label.chars().count()).max().unwrap_or(0);
    let label_width = CHARACTER_WIDTH * longest + 16;
    let compares = block.groups.iter().any(|group| group.difference.is_some());
    let panels = if compares { 2 } else { 1 };
    let height = TOP + ROW_HEIGHT * labels.len() + AXIS;
    let size = ((label_width + panels * PANEL_WIDTH) as u32, height as u32);

    let root = SVGBackend::with_string(svg, size).into_drawing_area();
    root.fill(&WHITE)?;
    let (label_area, plots) = root.split_horizontally(label_width as i32);
    let right_aligned = FONT.into_font().into_text_style(&root).pos(Pos::new(HPos::Right, VPos::Center));
    for (row, label) in labels.iter().enumerate() {
        let middle = TOP + ROW_HEIGHT * row + ROW_HEIGHT / 2;
        label_area.draw_text(label, &right_aligned, (label_width as i32 - 8, middle as i32))?;
    }
    let areas = plots.split_evenly((1, panels));
    let scores: Vec<Spread> = block.groups.iter().map(Spread::scores).collect();
    panel(&areas[0], &format!("{} × 100: seeds, mean ± sd", block.headline), &scores, None)?;
    if compares {
        let differences: Vec<Spread> = block.groups.iter().map(Spread::differences).collect();
        panel(
            &areas[1],
            "difference from vanilla × 100: seeds, mean, 95 % interval",
            &differences,
            Some(0.0),
        )?;
    }
    root.present()?;
    Ok(())
}

/// Draws one panel, its rows from top to bottom; `origin` is where a line goes from top to bottom.
fn panel<'s>(
    area: &DrawingArea<SVGBackend<'s>, plotters::coord::Shift>,
    words: &str,
    rows: &[Spread],
    origin: Option<f64>,
) -> Drawn {
    let ends: Vec<f64> = rows.iter().flat_map(Spread::ends).chain(origin).collect();
    let (low, high) = (minimum(&ends).unwrap_or(0.0), maximum(&ends).unwrap_or(100.0));
    // Something to either side, also where all scores are the same.
    let margin = (0.04 * (high - low)).max(0.05);
    let count = rows.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .margin_top(TOP as i32)
        .margin_right(12)
        .x_label_area_size(AXIS as i32)
        .build_cartesian_2d(low - margin..high + margin, count..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_labels(8)
        // The sum turns a zero that rounding left negative into one without a sign.
        .x_label_formatter(&|score| format!("{}", (100.0 * score).round() / 100.0 + 0.0))
        .light_line_style(TRANSPARENT)
        .label_style(FONT)
        .axis_desc_style(FONT)
        .x_desc(words)
        .draw()?;
    if let Some(origin) = origin {
        chart.draw_series([PathElement::new([(origin, 0.0), (origin, count)], BLACK.mix(0.5))])?;
    }
    for (place, row) in rows.iter().enumerate() {
        let middle = place as f64 + 0.5;
        chart.draw_series(row.dots.iter().map(|&dot| Circle::new((dot, middle), 3, DOTS.filled())))?;
        if let Some((mean, reach)) = row.mean {
            let line = vec![(mean - reach, middle), (mean + reach, middle)];
            chart.draw_series([PathElement::new(line, BLACK.stroke_width(2))])?;
            chart.draw_series([Circle::new((mean, middle), 4, BLACK.filled())])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::compare::compare;
    use super::*;
    use crate::experiment::results::Row;

    fn run(method: &str, seed: u64, score: f64) -> Row {
        let run = format!("{method}{seed}");
        Row { run, method: method.into(), seed, score: Some(score), headline: "f1".into(), ..Row::default() }
    }

    fn figure_of(rows: &[Row]) -> String {
        figure(&compare(rows).blocks[0])
    }

    #[test]
    fn every_seed_and_every_mean_is_a_dot() {
        let alone =
            [run("vanilla", 1, 0.5), run("vanilla", 2, 0.5), Row { score: None, ..run("vanilla", 3, 0.0) }];
        let svg = figure_of(&alone);
        assert_eq!(svg.matches("<circle").count(), 3, "two seeds and their mean: {svg}");
        assert!(svg.contains("f1 × 100") && !svg.contains("difference"), "{svg}");

        let mut rows = alone.to_vec();
        rows.extend([run("r3f", 1, 0.4), run("r3f", 2, 0.8), run("r3f", 4, 0.6)]);
        let svg = figure_of(&rows);
        // Beside the scores of both: two differences and their mean.
        assert_eq!(svg.matches("<circle").count(), 3 + 4 + 3, "{svg}");
        assert!(svg.contains("difference from vanilla"), "{svg}");
    }

    #[test]
    fn better_is_further_to_the_right() {
        let svg = figure_of(&[run("vanilla", 1, 0.5), run("r3f", 1, 0.7)]);
        let places: Vec<f64> = svg
            .split("<circle cx=\"")
            .skip(1)
            .map(|circle| circle.split('"').next().unwrap().parse().unwrap())
            .collect();
        // Dot and mean of vanilla, then those of the method.
        assert!(places[0] == places[1] && places[2] == places[3] && places[0] < places[2], "{places:?}");
    }

    #[test]
    fn nothing_to_draw_is_drawn_too() {
        for none in [f64::INFINITY, f64::NAN, 1e308] {
            assert!(!figure_of(&[run("r3f", 1, none)]).contains("<circle"));
        }
        let svg = figure_of(&[Row { score: None, ..run("a<b & c", 1, 0.0) }]);
        assert!(svg.contains("a&lt;b &amp; c") && !svg.contains("<circle"), "{svg}");
    }
}
