//! Ending an output at a text: what might be the beginning of one is held back until it is known.

/// Watches a stream of text for the first of some texts.
#[derive(Debug)]
pub(crate) struct StopText {
    stops: Vec<String>,
    held: String,
}

/// What may be shown, and whether the end was found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) text: String,
    pub(crate) ended: bool,
}

impl StopText {
    /// Watches for each of `stops`; empty ones never match.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Takes the next piece of text.
    pub(crate) fn push(&mut self, piece: &str) -> Shown {
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return Shown { text: std::mem::take(&mut self.held), ended: true };
        }
        let keep = self.held.char_indices().map(|(at, _)| at).find(|&at| {
            let tail = &self.held[at..];
            self.stops.iter().any(|stop| stop.starts_with(tail))
        });
        let rest = self.held.split_off(keep.unwrap_or(self.held.len()));
        Shown { text: std::mem::replace(&mut self.held, rest), ended: false }
    }

    /// What was held back when the output ended on its own.
    pub(crate) fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut watch = StopText::new(stops.iter().map(|&s| s.to_owned()).collect());
        let mut out = String::new();
        for piece in pieces {
            let shown = watch.push(piece);
            out += &shown.text;
            if shown.ended {
                return (out, true);
            }
        }
        out += &watch.finish();
        (out, false)
    }

    #[test]
    fn a_stop_across_pieces_ends_the_output_before_it() {
        assert_eq!(feed(&["END"], &["some tE", "N", "D more"]), ("some t".into(), true));
        assert_eq!(feed(&["\n\n", "é!"], &["café", "! x"]), ("caf".into(), true));
    }

    #[test]
    fn a_false_start_is_shown_after_all() {
        assert_eq!(feed(&["END"], &["tE", "N", "d", " E"]), ("tENd E".into(), false));
        assert_eq!(feed(&[""], &["a", "b"]), ("ab".into(), false));
    }

    #[test]
    fn the_first_stop_in_the_text_wins() {
        assert_eq!(feed(&["b", "ab"], &["xab"]), ("x".into(), true));
    }
}
