//! A configuration's text, and errors that show the line they are about.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

/// The text of a configuration and the name to show for it.
#[derive(Debug, Clone)]
pub struct Source {
    name: String,
    text: String,
    /// Further files: where in the text each begins, and its name.
    added: Vec<(usize, String)>,
}

/// Something wrong with a configuration, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: String,
    /// Line, from 1; 0 when it is about the whole file.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// The line itself.
    pub text: String,
    /// What is wrong.
    pub message: String,
    /// What was probably meant.
    pub hint: Option<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            write!(f, "{}: {}", self.file, self.message)?;
        } else {
            let number = self.line.to_string();
            let gutter = " ".repeat(number.len());
            writeln!(f, "{}", self.message)?;
            writeln!(f, "{gutter}--> {}:{}:{}", self.file, self.line, self.column)?;
            writeln!(f, "{gutter} |")?;
            writeln!(f, "{number} | {}", self.text)?;
            write!(f, "{gutter} | {}^", " ".repeat(self.column.saturating_sub(1)))?;
        }
        match &self.hint {
            Some(hint) => write!(f, "\n{hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ConfigError {}

/// One step of the way to a value: a key, or an index into an array.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

impl Source {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let name = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(Self::new(name, text)),
            Err(error) => Err(whole(&name, format!("cannot read the configuration: {error}"))),
        }
    }

    /// Text from elsewhere, to be called `name` in errors.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self { name: name.into(), text: text.into(), added: Vec::new() }
    }

    /// The text with that of `other` after it: more of its `[[system]]`s, `[[panel]]`s or `[[claim]]`s.
    ///
    /// # Errors
    /// When `other` begins with a key: it would be one of whatever table comes last before it.
    pub fn and(mut self, other: Self) -> Result<Self, ConfigError> {
        let mut offset = 0;
        for line in other.text.split_inclusive('\n') {
            match line.trim_start().chars().next() {
                None | Some('#') => offset += line.len(),
                Some('[') => break,
                Some(_) => return Err(other.at(offset, "what is added must begin with a table".into())),
            }
        }
        if !self.text.ends_with('\n') {
            self.text.push('\n');
        }
        let start = self.text.len();
        self.text.push_str(&other.text);
        self.added.push((start, other.name));
        self.added.extend(other.added.into_iter().map(|(at, name)| (start + at, name)));
        Ok(self)
    }

    /// The text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The configuration called `file` in the same folder.
    pub(crate) fn beside(&self, file: &str) -> Result<Self, ConfigError> {
        Self::read(&Path::new(&self.name).with_file_name(file))
    }

    /// Parses the text.
    ///
    /// # Errors
    /// With the place and, for a misspelt key, what was probably meant.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(&self.text).map_err(|error| {
            let message = error.message().trim().to_string();
            let hint = suggestion(&message);
            let Some(span) = error.span() else { return whole(&self.name, message) };
            let span = self.narrow(&message, span);
            ConfigError { hint, ..self.at(span.start, message) }
        })
    }

    /// An error about the value at `path`; about its nearest table when there is no such value.
    pub(crate) fn error(&self, path: &[Step<'_>], message: impl Into<String>) -> ConfigError {
        let message = message.into();
        match self.find(path) {
            Some(offset) => self.at(offset, message),
            None => whole(&self.name, message),
        }
    }

    fn find(&self, path: &[Step<'_>]) -> Option<usize> {
        let document = DeTable::parse(&self.text).ok()?;
        let mut found = None;
        let mut table = Some(document.get_ref());
        let mut array = None;
        for step in path {
            let (start, value) = match step {
                Step::Key(key) => {
                    let Some((name, value)) = table.and_then(|t| t.iter().find(|(k, _)| k.get_ref() == key))
                    else {
                        break;
                    };
                    (name.span().start, value.get_ref())
                }
                Step::Index(index) => {
                    let Some(value) = array.and_then(|a: &toml::de::DeArray<'_>| a.get(*index)) else {
                        break;
                    };
                    (value.span().start, value.get_ref())
                }
            };
            found = Some(start);
            (table, array) = match value {
                DeValue::Table(t) => (Some(t), None),
                DeValue::Array(a) => (None, Some(a)),
                _ => (None, None),
            };
        }
        found
    }

    /// A tagged enum reports its table, by its header where it has one; the name in the message says which line of it
    /// is meant.
    fn narrow(&self, message: &str, span: Range<usize>) -> Range<usize> {
        let Some(name) = quoted(message).next().filter(|_| message.starts_with("unknown")) else {
            return span;
        };
        let is_name = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
        let find = |within: Range<usize>| {
            let text = self.text.get(within.clone())?;
            let whole = |at: usize| {
                let before = text[..at].chars().next_back();
                let after = text[at + name.len()..].chars().next();
                !before.is_some_and(is_name) && !after.is_some_and(is_name)
            };
            let (at, _) = text.match_indices(name).find(|(at, _)| whole(*at))?;
            Some(within.start + at..within.start + at + name.len())
        };
        find(span.clone()).or_else(|| find(span.start..self.text.len())).unwrap_or(span)
    }

    fn at(&self, offset: usize, message: String) -> ConfigError {
        let offset = offset.min(self.text.len());
        let added = self.added.iter().rev().find(|(start, _)| *start <= offset);
        let (begin, name) = added.map_or((0, &self.name), |(start, name)| (*start, name));
        let before = &self.text[begin..offset];
        let start = before.rfind('\n').map_or(0, |i| i + 1);
        let text = self.text[begin + start..].lines().next().unwrap_or("");
        ConfigError {
            file: name.clone(),
            line: before.matches('\n').count() + 1,
            column: before[start..].chars().count() + 1,
            text: text.to_string(),
            message,
            hint: None,
        }
    }
}

fn whole(file: &str, message: String) -> ConfigError {
    ConfigError { file: file.to_string(), line: 0, column: 0, text: String::new(), message, hint: None }
}

/// The names between backticks.
fn quoted(message: &str) -> impl Iterator<Item = &str> {
    message.split('`').skip(1).step_by(2)
}

/// "did you mean", from a message of the form "unknown field `x`, expected one of `y`, `z`".
fn suggestion(message: &str) -> Option<String> {
    if !message.starts_with("unknown") {
        return None;
    }
    let mut names = quoted(message);
    let wrong = names.next()?;
    let (distance, best) = names.map(|name| (edit_distance(wrong, name), name)).min()?;
    (distance <= wrong.len().div_ceil(2).min(4)).then(|| format!("did you mean `{best}`?"))
}

/// Levenshtein's distance.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[allow(dead_code)]
        inner: Vec<Inner>,
    }

    #[derive(Debug, serde::Deserialize)]
    #[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
    enum Inner {
        Engine {
            #[allow(dead_code)]
            threads: u32,
        },
    }

    #[test]
    fn a_misspelt_nested_field_shows_its_line_and_a_suggestion() {
        let text = "[[inner]]\nkind = \"engine\"\nthreads = 1\nthraeds = 2\n";
        let error = Source::new("a.toml", text).parse::<Outer>().unwrap_err();
        assert_eq!((error.line, error.text.as_str()), (4, "thraeds = 2"));
        assert_eq!(error.hint.as_deref(), Some("did you mean `threads`?"));
        assert!(error.to_string().contains("--> a.toml:4:1"), "{error}");
    }

    #[test]
    fn a_misspelt_variant_shows_its_line() {
        let error = Source::new("a.toml", "[[inner]]\nkind = \"enigne\"\n").parse::<Outer>().unwrap_err();
        assert_eq!(error.line, 2, "{error}");
        assert_eq!(error.hint.as_deref(), Some("did you mean `engine`?"));
    }

    #[test]
    fn broken_syntax_shows_its_line() {
        let error = Source::new("a.toml", "inner = [\n]\nx = = 3\n").parse::<Outer>().unwrap_err();
        assert_eq!(error.line, 3, "{error}");
    }

    #[test]
    fn errors_name_the_file_that_they_are_in() {
        // The first lacks its last line's end.
        let source = Source::new("a.toml", "[[inner]]\nkind = \"engine\"\nthreads = 1")
            .and(Source::new("b.toml", "# more\n[[inner]]\nkind = \"engine\"\nthraeds = 2\n"))
            .unwrap();
        let error = source.parse::<Outer>().unwrap_err();
        assert_eq!((&*error.file, error.line, &*error.text), ("b.toml", 4, "thraeds = 2"));
        assert_eq!(
            source.error(&[Step::Key("inner"), Step::Index(0), Step::Key("threads")], "").file,
            "a.toml"
        );
        let fixed = source.text().replace("thraeds", "threads");
        assert_eq!(Source::new("c.toml", fixed).parse::<Outer>().unwrap().inner.len(), 2);
        let error = source.and(Source::new("d.toml", "\n# x\nthreads = 2\n")).unwrap_err();
        assert_eq!((&*error.file, error.line), ("d.toml", 3), "it is not the last table's: {error}");
    }

    #[test]
    fn semantic_errors_find_their_key() {
        let source = Source::new("a.toml", "[[panel]]\nrates = [1]\n[[panel]]\nname = \"x\"\nrates = []\n");
        let path = [Step::Key("panel"), Step::Index(1), Step::Key("rates")];
        let error = source.error(&path, "no rates");
        assert_eq!((error.line, error.column), (5, 1));
        let missing = source.error(&[Step::Key("panel"), Step::Index(0), Step::Key("name")], "no name");
        assert_eq!(missing.line, 1);
    }

    #[test]
    fn every_prefix_of_a_configuration_is_refused_or_read_without_panicking() {
        let text = "[[inner]]\nkind = \"engine\"\nthreads = 1 # é\n";
        for end in (0..text.len()).filter(|&i| text.is_char_boundary(i)) {
            if let Err(error) = Source::new("a.toml", &text[..end]).parse::<Outer>() {
                assert!(!error.to_string().is_empty());
            }
        }
    }
}
