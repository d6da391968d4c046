//! What a paper found, as a configuration's `[[claim]]` states it: typed, so that a run can be held against it.

use serde::{Deserialize, Serialize};

use super::{Config, ConfigError, Device, Source, Step, no_system};
use crate::metrics::Metric;

/// A finding of a paper, as a bound on a quantity of one system, or on its ratio to the same of another.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaimConfig {
    /// What the paper found, in a sentence.
    pub says: String,
    /// Which paper, and where in it.
    pub source: String,
    /// What is measured.
    pub quantity: Quantity,
    /// Of which system.
    pub system: String,
    /// Divided by the same of this one.
    pub over: Option<String>,
    /// In which panel; may be left out where there is one.
    pub panel: Option<String>,
    /// The claim holds from here on.
    pub at_least: Option<f64>,
    /// The claim holds up to here.
    pub at_most: Option<f64>,
    /// The device without which the claim cannot be judged.
    pub needs: Option<Device>,
}

/// What a claim is about.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Quantity {
    /// A metric at a rate.
    Metric {
        /// Which.
        metric: Metric,
        /// Where.
        rate: RateChoice,
    },
    /// The highest rate at which mean normalized latency stays within bounds, see [`crate::RunData::capacity`].
    Capacity {},
    /// The highest rate at which at least [`SLO_SHARE`](crate::metrics::SLO_SHARE) of the requests meet the limits of `[slo]`.
    WithinSlo {},
    /// The highest rate at which mean normalized latency is at most so many times that of a system at its lowest rate: one
    /// bound for all systems, whatever their own latencies.
    RateAt {
        /// How many times.
        times: f64,
        /// Of which system's.
        of: String,
    },
}

/// A rate of a panel. All are fixed by the configuration, never by what a run found.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(untagged, expecting = "a rate of the panel, or \"lowest\" or \"highest\"")]
pub enum RateChoice {
    /// This one, requests a second.
    At(f64),
    /// By its place among the panel's rates.
    End(RateEnd),
    /// The one that depends on what was left out.
    Served(ServedEnd),
}

/// A rate by what ran at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServedEnd {
    /// The highest at which the claim's systems ran: others, after one where a system was saturated, are left out.
    HighestServed,
}

/// A rate by its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RateEnd {
    /// The first.
    Lowest,
    /// The last.
    Highest,
}

/// The claims of a configuration, whatever else it has: what a run keeps of its configuration may be of a later form.
#[derive(Debug, Deserialize)]
pub(crate) struct Claims {
    #[serde(default)]
    pub(crate) claim: Vec<ClaimConfig>,
}

impl ClaimConfig {
    /// The panel it is about, of those that there are.
    pub(crate) fn panel<'a>(&'a self, panels: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
        panel_of(self.panel.as_deref(), panels)
    }

    /// Checks it against the configuration that it is part of: on every device, since a mistake should not wait for one.
    pub(crate) fn check(&self, config: &Config, source: &Source, index: usize) -> Result<(), ConfigError> {
        let refuse = |key, message: String| {
            Err(source.error(&[Step::Key("claim"), Step::Index(index), Step::Key(key)], message))
        };
        let added = config.cuda.iter().flat_map(|cuda| &cuda.system);
        let systems = || config.system.iter().chain(added.clone());
        let known = |name: &String| systems().any(|s| s.names().contains(name));
        for (key, name) in [("system", Some(&self.system)), ("over", self.over.as_ref())] {
            if let Some(name) = name.filter(|name| !known(name)) {
                return refuse(key, no_system(name, systems()));
            }
        }
        if let Quantity::RateAt { times, of } = &self.quantity {
            if !known(of) {
                return refuse("quantity", no_system(of, systems()));
            }
            if !(times.is_finite() && *times >= 1.0) {
                return refuse("quantity", format!("`times` is {times}: choose 1 or more"));
            }
        }
        let Some(panel) = self.panel(config.panel.iter().map(|p| &*p.name)) else {
            return refuse(
                "panel",
                match &self.panel {
                    Some(name) => format!("no panel `{name}`"),
                    None => "there are several panels: `panel` must say which the claim is about".into(),
                },
            );
        };
        let of = match &self.quantity {
            Quantity::RateAt { of, .. } => Some(of),
            _ => None,
        };
        let elsewhere = |name: &String| systems().any(|s| s.names().contains(name) && !s.runs_in(panel));
        for (key, name) in [("system", Some(&self.system)), ("over", self.over.as_ref()), ("quantity", of)] {
            if let Some(name) = name.filter(|name| elsewhere(name)) {
                return refuse(key, format!("`{name}` does not run in panel `{panel}`"));
            }
        }
        if let Quantity::Metric { rate: RateChoice::At(rate), .. } = self.quantity {
            let default = config.panel.iter().filter(|p| p.name == panel).map(|p| &p.rates);
            let profiles = [Some(&config.quick), Some(&config.full), config.cuda.as_ref().map(|c| &c.run)];
            let changed = profiles.into_iter().flatten().filter_map(|profile| profile.rates.get(panel));
            if !default.chain(changed).any(|rates| rates.contains(&rate)) {
                return refuse("quantity", format!("panel `{panel}` has no rate {rate} in any profile"));
            }
        }
        match check_bounds(self.at_least, self.at_most) {
            Ok(()) => Ok(()),
            Err(message) => refuse("at_least", message.into()),
        }
    }
}

/// The panel that a claim means, of those that there are: the one it names, or the only one.
pub(crate) fn panel_of<'a>(
    named: Option<&str>,
    panels: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let mut panels = panels.into_iter();
    match named {
        Some(name) => panels.find(|panel| *panel == name),
        None => panels.next().filter(|_| panels.next().is_none()),
    }
}

/// Checks the ends of a claim's range.
pub(crate) fn check_bounds(at_least: Option<f64>, at_most: Option<f64>) -> Result<(), &'static str> {
    match (at_least, at_most) {
        (None, None) => Err("a claim must have a bound: `at_least`, `at_most` or both"),
        (low, high) if low.into_iter().chain(high).any(|bound| !bound.is_finite()) => {
            Err("a bound must be a finite number")
        }
        (Some(low), Some(high)) if low > high => Err("`at_least` is above `at_most`: nothing can hold"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_numbers_or_ends() {
        let parse = |text: &str| toml::from_str::<Quantity>(text);
        let at = |rate| Quantity::Metric { metric: Metric::Running, rate };
        let text = "kind = \"metric\"\nmetric = \"running\"\nrate = ";
        assert_eq!(parse(&format!("{text}7")).unwrap(), at(RateChoice::At(7.0)));
        assert_eq!(parse(&format!("{text}\"highest\"")).unwrap(), at(RateChoice::End(RateEnd::Highest)));
        let served = RateChoice::Served(ServedEnd::HighestServed);
        assert_eq!(parse(&format!("{text}\"highest_served\"")).unwrap(), at(served));
        let error = parse(&format!("{text}\"hihgest\"")).unwrap_err().to_string();
        assert!(error.contains("\"lowest\" or \"highest\""), "{error}");
    }

    #[test]
    fn bounds_leave_room() {
        assert!(check_bounds(None, None).is_err());
        assert!(check_bounds(Some(2.0), Some(1.0)).is_err());
        assert!(check_bounds(Some(f64::NAN), None).is_err());
        assert!(check_bounds(Some(1.0), Some(1.0)).is_ok());
    }
}
