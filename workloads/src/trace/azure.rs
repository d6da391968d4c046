//! Azure LLM inference traces, 2023 (Patel et al., "Splitwise", ISCA 2024) and 2024 (Stojkovic et al., "DynamoLLM",
//! HPCA 2025): CSV with the columns `TIMESTAMP`, `ContextTokens`, `GeneratedTokens`.
//!
//! Times are wall-clock, as `2023-11-16 18:15:46.6805900` or, in 2024, `2024-05-10 00:00:00.009930+00:00` (and
//! without a fraction where it is zero). A time without a zone is taken as UTC.

use std::io::BufRead;

use super::{ReadOptions, Trace, TraceRequest};
use crate::error::WorkloadError;
use crate::lines::{Header, Lines};

pub(super) const COLUMNS: [&str; 3] = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"];

pub(super) fn read(
    reader: impl BufRead,
    options: &ReadOptions,
    trace: &mut Trace,
) -> Result<(), WorkloadError> {
    let file = trace.meta.file.clone();
    let mut lines = Lines::new(reader, &file);
    let Some(header) = lines.next()? else { return Ok(()) };
    let header = Header::parse(&header, COLUMNS)?;
    let mut epoch = None;
    while !trace.is_full(options) {
        let Some(line) = lines.next()? else { break };
        let [time, input, output] = header.fields(&line)?;
        let nanoseconds = wall_clock(time.bytes).map_err(|problem| time.error(problem))?;
        // Relative before it becomes a float: a float of nanoseconds since 1970 would lose the last digits.
        let since = nanoseconds - *epoch.get_or_insert(nanoseconds);
        trace.meta.rows += 1;
        trace.push(TraceRequest {
            arrival_s: since as f64 / 1e9,
            input_len: input.tokens()?,
            output_len: output.tokens()?,
            prefix: None,
            turn: None,
        });
    }
    Ok(())
}

/// Nanoseconds since 1970 of `YYYY-MM-DD HH:MM:SS[.fraction][zone]`; `T` may stand for the space, and the zone is `Z`,
/// `+HH:MM` or `+HHMM`.
fn wall_clock(text: &[u8]) -> Result<i64, &'static str> {
    let mut rest = text;
    let year = number(&mut rest, 4, None)?;
    let month = number(&mut rest, 2, Some(b"-"))?;
    let day = number(&mut rest, 2, Some(b"-"))?;
    let hour = number(&mut rest, 2, Some(b" T"))?;
    let minute = number(&mut rest, 2, Some(b":"))?;
    let second = number(&mut rest, 2, Some(b":"))?;
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let month_len = match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return Err("no such month"),
    };
    if !(1970..2200).contains(&year) {
        return Err("the year is not between 1970 and 2199");
    }
    if !(1..=month_len).contains(&day) {
        return Err("no such day in that month");
    }
    if hour > 23 || minute > 59 || second > 60 {
        return Err("no such time of day");
    }
    let fraction = fraction(&mut rest)?;
    let zone_s = zone(rest)?;
    let seconds = days_since_1970(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - zone_s;
    Ok(seconds * 1_000_000_000 + fraction)
}

/// Takes a number of exactly `digits` digits, after one of the separators if there are any.
fn number(rest: &mut &[u8], digits: usize, separators: Option<&[u8]>) -> Result<i64, &'static str> {
    const SHAPE: &str = "not a time like 2023-11-16 18:15:46.6805900";
    if let Some(separators) = separators {
        let (first, tail) = rest.split_first().ok_or(SHAPE)?;
        if !separators.contains(first) {
            return Err(SHAPE);
        }
        *rest = tail;
    }
    let (head, tail) = rest.split_at_checked(digits).ok_or(SHAPE)?;
    if !head.iter().all(u8::is_ascii_digit) {
        return Err(SHAPE);
    }
    *rest = tail;
    Ok(head.iter().fold(0, |value, digit| value * 10 + i64::from(digit - b'0')))
}

/// Takes an optional fraction of a second of one to nine digits, as nanoseconds.
fn fraction(rest: &mut &[u8]) -> Result<i64, &'static str> {
    let Some(tail) = rest.strip_prefix(b".") else { return Ok(0) };
    let digits = tail.iter().take_while(|b| b.is_ascii_digit()).count();
    if !(1..=9).contains(&digits) {
        return Err("a fraction of a second has 1 to 9 digits");
    }
    let value = tail[..digits].iter().fold(0, |value, digit| value * 10 + i64::from(digit - b'0'));
    *rest = &tail[digits..];
    Ok(value * 10_i64.pow(9 - digits as u32))
}

/// Seconds east of UTC.
fn zone(rest: &[u8]) -> Result<i64, &'static str> {
    const SHAPE: &str = "what follows the time is not a zone like +00:00 or Z";
    let (sign, mut tail) = match rest {
        [] | b"Z" => return Ok(0),
        [b'+', tail @ ..] => (1, tail),
        [b'-', tail @ ..] => (-1, tail),
        _ => return Err(SHAPE),
    };
    let hours = number(&mut tail, 2, None).map_err(|_| SHAPE)?;
    tail = tail.strip_prefix(b":").unwrap_or(tail);
    let minutes = if tail.is_empty() { 0 } else { number(&mut tail, 2, None).map_err(|_| SHAPE)? };
    if !tail.is_empty() || hours > 15 || minutes > 59 {
        return Err(SHAPE);
    }
    Ok(sign * (hours * 3600 + minutes * 60))
}

/// Days of the Gregorian calendar, by counting years from March so that the leap day comes last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let years = if month > 2 { year } else { year - 1 };
    let from_march = (month + 9) % 12;
    let leap_days = years / 4 - years / 100 + years / 400;
    years * 365 + leap_days + (from_march * 153 + 2) / 5 + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_clock_times() {
        assert_eq!(wall_clock(b"1970-01-01 00:00:00"), Ok(0));
        // 2023-11-16 00:00:00 UTC is 1700092800 (date -u -d 2023-11-16 +%s).
        let midnight = 1_700_092_800_i64;
        assert_eq!(
            wall_clock(b"2023-11-16 18:15:46.6805900"),
            Ok((midnight + 18 * 3600 + 15 * 60 + 46) * 1_000_000_000 + 680_590_000)
        );
        assert_eq!(wall_clock(b"2023-11-16T00:00:00Z"), Ok(midnight * 1_000_000_000));
        assert_eq!(wall_clock(b"2023-11-16 02:00:00+02:00"), Ok(midnight * 1_000_000_000));
        assert_eq!(wall_clock(b"2023-11-15 19:30:00.0-0430"), Ok(midnight * 1_000_000_000));
        assert_eq!(wall_clock(b"2024-02-29 00:00:00"), Ok(1_709_164_800 * 1_000_000_000));
        assert_eq!(wall_clock(b"2024-03-01 00:00:00"), Ok(1_709_251_200 * 1_000_000_000));
    }

    #[test]
    fn wrong_times_are_refused() {
        for wrong in [
            "",
            "2023",
            "2023-13-01 00:00:00",
            "2023-02-29 00:00:00",
            "2023-01-01 24:00:00",
            "2023-01-01_00:00:00",
            "2023-01-01 00:00:00.",
            "2023-01-01 00:00:00.0123456789",
            "2023-01-01 00:00:00+",
            "2023-01-01 00:00:00 PM",
            "1969-01-01 00:00:00",
            "2023-01-01 00:00:00+02:00x",
            "+023-01-01 00:00:00",
        ] {
            assert!(wall_clock(wrong.as_bytes()).is_err(), "{wrong:?}");
        }
    }
}
