//! Chat templates as Hugging Face writes them: Jinja, with Python's habits.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, context};
use minijinja_contrib::pycompat;
use serde::Serialize;

use crate::EngineError;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl ChatMessage {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

const NAME: &str = "chat";

/// Steps a template may take: many times what any real one takes for a long conversation, and under a second.
const FUEL: u64 = 20_000_000;

/// What is written of a value at once, in bytes, values within values, and how deep these lie. Fuel is paid for what a method or a
/// filter of ours has made, when it is there.
const MOST_BYTES: usize = 64 << 20;
const MOST_VALUES: usize = 1 << 20;
const MOST_DEPTH: usize = 128;

impl ChatTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    /// When it is not valid; the error names the line.
    pub fn new(
        source: &str,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, EngineError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the delimiters are the standard ones"));
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(method);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, source.to_owned()).map_err(failed)?;
        Ok(Self {
            environment,
            bos_token: bos_token.unwrap_or_default(),
            eos_token: eos_token.unwrap_or_default(),
        })
    }

    /// The text of a conversation; `add_generation_prompt` opens the assistant's turn.
    ///
    /// # Errors
    /// When the template fails or refuses (`raise_exception`).
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String, EngineError> {
        let template = self.environment.get_template(NAME).map_err(failed)?;
        let values = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
        };
        template.render(values).map_err(failed)
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("bos_token", &self.bos_token).finish_non_exhaustive()
    }
}

fn failed(error: Error) -> EngineError {
    EngineError::Tokenizer(format!("chat template: {error}"))
}

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

/// Python's methods, but for results that are larger than any prompt.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let mut written = Written::default();
    match (name, value.as_str()) {
        ("replace", Some(text)) => {
            let (old, new, _): (&str, &str, Option<i32>) = from_args(args)?;
            let places = text.matches(old).count();
            written.bytes(text.len().saturating_add(places.saturating_mul(new.len())))?;
        }
        ("join", Some(separator)) => {
            let (values,): (&Value,) = from_args(args)?;
            for value in values.try_iter()? {
                written.bytes(separator.len())?;
                written.value(value)?;
            }
        }
        _ => {}
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

/// Counts what is to be written.
#[derive(Default)]
struct Written {
    bytes: usize,
    values: usize,
}

impl Written {
    fn bytes(&mut self, more: usize) -> Result<(), Error> {
        self.bytes = self.bytes.saturating_add(more);
        match self.bytes > MOST_BYTES {
            true => Err(too_large()),
            false => Ok(()),
        }
    }

    /// A value with all within it, which may be the same one many times. Not by recursion: it may be deep.
    fn value(&mut self, value: Value) -> Result<(), Error> {
        let mut left = vec![(value, 0)];
        while let Some((value, depth)) = left.pop() {
            self.values += 1;
            if let Some(text) = value.as_str() {
                self.bytes(text.len())?;
                continue;
            }
            if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
                continue;
            }
            for inner in value.try_iter()? {
                if depth == MOST_DEPTH || self.values + left.len() > MOST_VALUES {
                    return Err(too_large());
                }
                if value.kind() == ValueKind::Map {
                    left.push((value.get_item(&inner)?, depth + 1));
                }
                left.push((inner, depth + 1));
            }
        }
        Ok(())
    }
}

fn too_large() -> Error {
    Error::new(ErrorKind::InvalidOperation, "it writes more than any prompt has")
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it: templates are trained on that.
fn to_json(value: Value, options: minijinja::value::Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    Written::default().value(value.clone())?;
    // Python's other options change nothing here; a misspelt one is not an error there either.
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut out = Vec::new();
    match indent {
        Some(width) => {
            let indent = vec![b' '; width.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&indent);
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
                .map_err(failed)?;
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)).map_err(failed)?;
        }
    }
    Ok(String::from_utf8(out).expect("JSON is UTF-8"))
}

/// One line with a space after each colon and comma.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// The time now (UTC), as Python's `strftime` writes it.
fn strftime_now(format: &str) -> Result<String, Error> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    strftime(now.as_secs(), format)
}

fn strftime(seconds: u64, format: &str) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let days = seconds / 86_400;
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        match letters.next() {
            Some('Y') => out += &format!("{year:04}"),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('H') => out += &format!("{hour:02}"),
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{second:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('%') => out.push('%'),
            other => {
                let what =
                    format!("strftime_now does not know '%{}'", other.map(String::from).unwrap_or_default());
                return Err(Error::new(ErrorKind::InvalidOperation, what));
            }
        }
    }
    Ok(out)
}

/// Year, month and day of a day since 1970-01-01 (Hinnant's `civil_from_days`, for days not negative).
fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (400 * era + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String, String> {
        let template = ChatTemplate::new(source, Some("<s>".into()), None).map_err(|e| e.to_string())?;
        let messages = [ChatMessage::new("user", " Hi <b> "), ChatMessage::new("assistant", "Yo")];
        template.render(&messages, true).map_err(|e| e.to_string())
    }

    #[test]
    fn conventions_of_published_templates_hold() {
        let source = "{{ bos_token }}\n{%- for message in messages %}\n    {% if message['role'] == 'user' %}\n\
                      [{{ message.content.strip() }}]\n    {% else %}\n{{ message['content'] | trim }}{{ eos_token }}\n\
                      {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}>{% endif %}";
        assert_eq!(render(source).unwrap(), "<s>[Hi <b>]\nYo\n>");
    }

    #[test]
    fn json_is_pythons() {
        assert_eq!(render("{{ {'a': [1, 'é<']} | tojson }}").unwrap(), r#"{"a": [1, "é<"]}"#);
        assert_eq!(render("{{ [1] | tojson(indent=2) }}").unwrap(), "[\n  1\n]");
    }

    #[test]
    fn refusals_and_mistakes_are_told() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert!(error.contains("roles must alternate"), "{error}");
        let error = render("line\n{% for %}").unwrap_err();
        assert!(error.contains("chat:2"), "{error}");
        let error = render("{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}");
        assert!(error.unwrap_err().contains("fuel"));
    }

    #[test]
    fn what_writes_too_much_is_refused_before_it_does() {
        let doubled =
            "{% set ns = namespace(x=1) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
        let deep =
            "{% set ns = namespace(x=1) %}{% for i in range(2000) %}{% set ns.x = {'a': ns.x} %}{% endfor %}";
        for source in [
            "{% set a = 'x' * 1000000 %}{{ a.replace('x', a) }}",
            "{% set a = 'x' * 1000000 %}{{ a.replace('', a) }}",
            "{% set a = 'x' * 1000000 %}{{ a.join(range(1000)) }}",
            &format!("{doubled}{{{{ ns.x | tojson }}}}"),
            &format!("{doubled}{{{{ ''.join([ns.x]) }}}}"),
            &format!("{deep}{{{{ ns.x | tojson }}}}"),
        ] {
            let error = render(source).unwrap_err();
            assert!(error.contains("more than any prompt has"), "{source}: {error}");
        }
        assert!(render(&format!("{doubled}{{{{ raise_exception(ns.x) }}}}")).is_err());
        assert_eq!(
            render("{{ 'a-b-c'.replace('-', '+', 1) }} {{ ', '.join(['a', 1]) }}").unwrap(),
            "a+b-c a, 1"
        );
    }

    #[test]
    fn dates_are_right() {
        assert_eq!(strftime(0, "%Y-%m-%d %H:%M:%S %a").unwrap(), "1970-01-01 00:00:00 Thu");
        // 2024-02-29 12:34:56 UTC.
        assert_eq!(
            strftime(1_709_210_096, "%d %b %Y, %A %B %y %%").unwrap(),
            "29 Feb 2024, Thursday February 24 %"
        );
        assert_eq!(strftime(1_709_210_096, "%H:%M:%S").unwrap(), "12:34:56");
        assert!(strftime(0, "%Q").unwrap_err().to_string().contains("%Q"));
    }
}
