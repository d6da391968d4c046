//! Server-sent events, taken in as bytes come (the HTML standard, section 9.2): of each event its data.

/// The longest event that is taken, bytes: a token with its log-probabilities has some hundreds.
const MAX_EVENT: usize = 1 << 20;

/// Takes bytes in and gives events.
#[derive(Debug, Default)]
pub(super) struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
    /// Whether the event that is being read has data, be it empty.
    has_data: bool,
    /// The last line ended with a carriage return: a line feed that follows belongs to it.
    after_return: bool,
}

impl Events {
    /// Takes `bytes` in, and appends the data of each event that they complete to `events`.
    ///
    /// # Errors
    /// When an event is too long to be one of a completion.
    pub(super) fn push(&mut self, bytes: &[u8], events: &mut Vec<Vec<u8>>) -> Result<(), String> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if std::mem::take(&mut self.after_return) && rest[0] == b'\n' {
                rest = &rest[1..];
                continue;
            }
            let end = rest.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
            let piece = &rest[..end.unwrap_or(rest.len())];
            if self.line.len() + self.data.len() + piece.len() > MAX_EVENT {
                return Err(format!("it sent an event of more than {MAX_EVENT} bytes"));
            }
            self.line.extend_from_slice(piece);
            let Some(end) = end else { return Ok(()) };
            self.after_return = rest[end] == b'\r';
            rest = &rest[end + 1..];
            events.extend(self.end_line());
        }
        Ok(())
    }

    /// An empty line ends an event; of the fields, only data matters here.
    fn end_line(&mut self) -> Option<Vec<u8>> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            let data = std::mem::take(&mut self.data);
            return std::mem::take(&mut self.has_data).then_some(data);
        }
        let value = match line.strip_prefix(b"data") {
            Some([]) => &[][..],
            Some([b':', b' ', value @ ..] | [b':', value @ ..]) => value,
            _ => return None,
        };
        if std::mem::replace(&mut self.has_data, true) {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(value);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The events of `text`, in pieces of `size` bytes.
    fn events(text: &str, size: usize) -> Vec<String> {
        let (mut parser, mut found) = (Events::default(), Vec::new());
        for piece in text.as_bytes().chunks(size) {
            parser.push(piece, &mut found).unwrap();
        }
        found.into_iter().map(|data| String::from_utf8(data).unwrap()).collect()
    }

    #[test]
    fn events_do_not_depend_on_how_bytes_come() {
        let text = ": a comment\n\ndata: one\r\n\r\nevent: x\nid: 7\ndata:two\ndata: lines\n\ndata\r\rdata: \u{e9}\n\nnext: \n\ndata: cut";
        let expected = ["one", "two\nlines", "", "\u{e9}"];
        for size in 1..=text.len() {
            assert_eq!(events(text, size), expected, "pieces of {size}");
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        let (mut parser, mut found) = (Events::default(), Vec::new());
        let endless = std::iter::repeat_with(|| parser.push(&[b'x'; 4096], &mut found)).take(300);
        assert!(endless.filter_map(Result::err).next().unwrap().contains("more than 1048576 bytes"));
        let mut parser = Events::default();
        let lines = std::iter::repeat_with(|| parser.push(b"data: and no empty line\n", &mut found));
        assert!(lines.take(60_000).any(|pushed| pushed.is_err()));
    }
}
