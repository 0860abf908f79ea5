//! Figures, and what they are held against.

use serde_json::json;

pub fn median(values: Vec<f64>) -> f64 {
    quantile(values, 0.5)
}

/// The value below which the share `at` of the values is; between two of them in proportion.
fn quantile(mut values: Vec<f64>, at: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let place = at * (values.len() - 1) as f64;
    let (low, high) = (values[place.floor() as usize], values[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

/// What a figure is held against.
#[derive(Debug)]
pub struct Against<'a> {
    peer: &'a str,
    theirs: f64,
    ratio: f64,
    /// The ratios' quartiles, where there are several.
    quartiles: Option<(f64, f64)>,
}

impl<'a> Against<'a> {
    pub fn once(ours: f64, (peer, theirs): (&'a str, f64)) -> Against<'a> {
        Against { peer, theirs, ratio: ours / theirs, quartiles: None }
    }

    /// Each round has a ratio of its own, and the median of those is told: what a machine does in one round it does to
    /// both, more or less, and its speed of two rounds is not to be compared.
    pub fn in_rounds(peer: &'a str, ours: &[f64], theirs: Vec<f64>) -> Against<'a> {
        let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
        let quartiles = (quantile(ratios.clone(), 0.25), quantile(ratios.clone(), 0.75));
        let quartiles = (ratios.len() > 1).then_some(quartiles);
        Against { peer, theirs: median(theirs), ratio: median(ratios), quartiles }
    }
}

/// One line a figure.
#[derive(Debug)]
pub struct Report {
    pub json: bool,
}

impl Report {
    pub fn figure(&mut self, figure: &str, unit: &str, ours: f64, against: Option<Against<'_>>) {
        if self.json {
            let quartiles = against.as_ref().and_then(|against| against.quartiles);
            let line = json!({
                "figure": figure, "unit": unit, "ours": rounded(ours),
                "peer": against.as_ref().map(|against| against.peer),
                "theirs": against.as_ref().map(|against| rounded(against.theirs)),
                "ratio": against.as_ref().map(|against| rounded(against.ratio)),
                "ratio_quartiles": quartiles.map(|(low, high)| [rounded(low), rounded(high)]),
            });
            println!("{line}");
            return;
        }
        let compared = against.map_or(String::new(), |Against { peer, theirs, ratio, quartiles }| {
            let spread = quartiles.map_or(String::new(), |(low, high)| format!(" ({low:.2} to {high:.2})"));
            format!("{peer:20} {theirs:>10.2}  ratio {ratio:.2}{spread}")
        });
        println!("{figure:58} {ours:>10.2} {unit:6} {compared}");
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
