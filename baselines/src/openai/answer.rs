//! An answer as its chunks come: how many tokens, and how it ended. Pure.

use std::time::Duration;

use quire_workloads::{EventKind, FinishReason, GenerationRequest};

use super::protocol::{Choice, Chunk, Usage};
use super::{Counting, UNKNOWN_TOKEN};

/// What a request's stream has brought so far. The server's numbers are hostile until checked: nothing is allocated by
/// one that is above the tokens asked for.
#[derive(Debug)]
pub(super) struct Answer {
    counting: Counting,
    /// Tokens asked for.
    wanted: u32,
    /// The reason that a whole answer ends for.
    whole: FinishReason,
    /// Whether the workload says where the answer ends.
    traced: bool,
    counted: u32,
    /// Tokens that the server's usage reports, and when it was heard.
    reported: Option<(u64, Duration)>,
    cached: u32,
    /// How the server says that it ended, and when.
    finish: Option<(String, Duration)>,
}

/// How an answer ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ending {
    /// Tokens that only the server's usage told of, and when.
    pub(super) rest: Option<(Vec<u32>, Duration)>,
    /// The end.
    pub(super) kind: EventKind,
    /// When the last of it was heard.
    pub(super) at: Duration,
}

impl Answer {
    pub(super) fn new(request: &GenerationRequest, counting: Counting) -> Self {
        let end = request.true_output_len;
        // A trace's end stands for an end of sequence; an answer that reaches both ends there.
        let whole = match end.is_some_and(|end| end <= request.max_tokens) {
            true => FinishReason::Stop,
            false => FinishReason::Length,
        };
        Self {
            counting,
            wanted: end.unwrap_or(u32::MAX).min(request.max_tokens),
            whole,
            traced: end.is_some(),
            counted: 0,
            reported: None,
            cached: 0,
            finish: None,
        }
    }

    /// Tokens asked for.
    pub(super) fn wanted(&self) -> u32 {
        self.wanted
    }

    /// Takes in a chunk that came at `at`, and gives the tokens in it.
    pub(super) fn take(&mut self, chunk: Chunk, at: Duration) -> Result<Vec<u32>, String> {
        let Chunk { mut choices, usage, .. } = chunk;
        if choices.len() > 1 || choices.iter().any(|choice| choice.index != 0) {
            return Err("it sent several answers to one request".into());
        }
        self.note(usage, at);
        let Some(choice) = choices.pop() else { return Ok(Vec::new()) };
        if choice.text.as_ref().is_some_and(|text| !text.is_empty()) && self.finish.is_some() {
            return Err("it sent text after a finish_reason".into());
        }
        let finish = choice.finish_reason.clone();
        let tokens = self.count(choice, usage)?;
        if let Some(reason) = finish {
            self.finish.get_or_insert((reason, at));
        }
        Ok(tokens)
    }

    fn note(&mut self, usage: Option<Usage>, at: Duration) {
        let Some(usage) = usage else { return };
        if let Some(tokens) = usage.completion_tokens {
            self.reported = Some((tokens, at));
        }
        let cached = usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
        self.cached = cached.map_or(self.cached, |tokens| u32::try_from(tokens).unwrap_or(u32::MAX));
    }

    fn count(&mut self, choice: Choice, usage: Option<Usage>) -> Result<Vec<u32>, String> {
        let has_text = choice.text.is_some_and(|text| !text.is_empty());
        let missing = |what: &str| {
            Err(format!("it sent text without {what}: choose another `counting`, \"chunks\" if none is told"))
        };
        let number = match self.counting {
            Counting::Chunks => u64::from(has_text),
            Counting::Logprobs => match choice.logprobs.and_then(|logprobs| logprobs.tokens) {
                None if has_text => return missing("`logprobs.tokens`"),
                tokens => tokens.map_or(0, |tokens| tokens.len() as u64),
            },
            Counting::Usage => match usage.and_then(|usage| usage.completion_tokens) {
                None if has_text => return missing("`usage`"),
                None => 0,
                Some(now) => {
                    now.checked_sub(u64::from(self.counted)).ok_or("its `usage` counts backwards")?
                }
            },
            Counting::TokenIds => {
                let ids = match choice.token_ids {
                    None if has_text => return missing("`token_ids`"),
                    ids => ids.unwrap_or_default(),
                };
                self.add(ids.len() as u64)?;
                return Ok(ids);
            }
        };
        self.add(number).map(|number| vec![UNKNOWN_TOKEN; number as usize])
    }

    fn add(&mut self, number: u64) -> Result<u32, String> {
        match u32::try_from(number) {
            Ok(number) if number <= self.wanted - self.counted => {
                self.counted += number;
                Ok(number)
            }
            _ => Err(format!("it sent more than the {} tokens that it was asked for", self.wanted)),
        }
    }

    /// The stream is over; `cut` says why, where it did not end by itself.
    pub(super) fn end(mut self, cut: Option<String>) -> Result<Ending, String> {
        let Some((finish, finished_at)) = self.finish.take() else {
            let why = cut.unwrap_or_else(|| "it ended".into());
            return Err(format!("{why} after {} tokens, without a finish_reason", self.counted));
        };
        if finish != "stop" && finish != "length" {
            return Err(format!("it ended the request with finish_reason {finish:?}"));
        }
        let mut at = finished_at;
        let mut rest = None;
        if let Some((reported, heard)) = self.reported {
            let counted = self.counted;
            match reported.checked_sub(u64::from(counted)) {
                None => {
                    return Err(format!("its usage has {reported} tokens, and its stream had {counted}"));
                }
                Some(0) => {}
                Some(more) => {
                    let more = self.add(more)?;
                    at = at.max(heard);
                    rest = Some((vec![UNKNOWN_TOKEN; more as usize], at));
                }
            }
        }
        if self.counted == 0 {
            // No latency could be told of it.
            return Err(format!(
                "it ended the answer, with finish_reason {finish:?}, before its first token"
            ));
        }
        let reason = match self.counted == self.wanted {
            true => self.whole,
            // What the model itself ends is whole, where the workload does not say otherwise.
            false if finish == "stop" && !self.traced => FinishReason::Stop,
            false => FinishReason::Early,
        };
        Ok(Ending {
            rest,
            kind: EventKind::Finished { reason, preemptions: 0, cached_tokens: self.cached },
            at,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::parse;
    use super::*;

    fn request(max_tokens: u32, end: Option<u32>) -> GenerationRequest {
        GenerationRequest {
            id: 1,
            prompt: vec![1],
            max_tokens,
            true_output_len: end,
            class: 0,
            decoding: quire_workloads::Decoding::Single {},
        }
    }

    /// Tokens of each chunk, and the end, of a request for `wanted` tokens.
    fn run(counting: Counting, wanted: u32, chunks: &[&str]) -> Result<(Vec<usize>, Ending), String> {
        let mut answer = Answer::new(&request(100, Some(wanted)), counting);
        let mut counts = Vec::new();
        for (i, chunk) in chunks.iter().enumerate() {
            counts.push(answer.take(parse(chunk.as_bytes())?, Duration::from_secs(i as u64))?.len());
        }
        Ok((counts, answer.end(None)?))
    }

    fn reason(ending: &Ending) -> FinishReason {
        let EventKind::Finished { reason, .. } = ending.kind else { panic!("{ending:?}") };
        reason
    }

    #[test]
    fn a_chunk_is_a_token_where_nothing_is_told() {
        let end = r#"{"choices":[{"text":"c","finish_reason":"length"}]}"#;
        let chunks = [r#"{"choices":[{"text":"a"}]}"#, r#"{"choices":[{"text":""}]}"#, end];
        let (counts, ending) = run(Counting::Chunks, 2, &chunks).unwrap();
        assert_eq!((counts, reason(&ending)), (vec![1, 0, 1], FinishReason::Stop));
        assert_eq!((ending.at, ending.rest), (Duration::from_secs(2), None));
    }

    #[test]
    fn what_is_told_is_counted() {
        let ids = [
            r#"{"choices":[{"text":"a","token_ids":[7,8]}]}"#,
            r#"{"choices":[{"text":"","token_ids":[9],"finish_reason":"length"}]}"#,
        ];
        assert_eq!(run(Counting::TokenIds, 3, &ids).unwrap().0, [2, 1]);
        let usage = [
            r#"{"choices":[{"text":"a"}],"usage":{"completion_tokens":2}}"#,
            r#"{"choices":[{"text":"b","finish_reason":"length"}],"usage":{"completion_tokens":3}}"#,
        ];
        assert_eq!(run(Counting::Usage, 3, &usage).unwrap().0, [2, 1]);
        let logprobs =
            [r#"{"choices":[{"text":"ab","logprobs":{"tokens":["a","b"]},"finish_reason":"length"}]}"#];
        assert_eq!(run(Counting::Logprobs, 2, &logprobs).unwrap().0, [2]);
        for counting in [Counting::TokenIds, Counting::Usage, Counting::Logprobs] {
            let error = run(counting, 3, &[r#"{"choices":[{"text":"a"}]}"#]).unwrap_err();
            assert!(error.contains("choose another `counting`"), "{error}");
        }
    }

    #[test]
    fn usage_at_the_end_settles_the_number() {
        let text = r#"{"choices":[{"text":"abc","finish_reason":"length"}]}"#;
        let usage = |tokens: u64| {
            format!(
                r#"{{"choices":[],"usage":{{"completion_tokens":{tokens},"prompt_tokens_details":{{"cached_tokens":4}}}}}}"#
            )
        };
        let (counts, ending) = run(Counting::Chunks, 3, &[text, &usage(3)]).unwrap();
        assert_eq!(counts, [1, 0]);
        assert_eq!(ending.rest, Some((vec![UNKNOWN_TOKEN; 2], Duration::from_secs(1))));
        let kind = EventKind::Finished { reason: FinishReason::Stop, preemptions: 0, cached_tokens: 4 };
        assert_eq!(ending.kind, kind);
        assert!(run(Counting::Chunks, 3, &[text, &usage(0)]).unwrap_err().contains("its stream had 1"));
        assert!(run(Counting::Chunks, 3, &[text, &usage(u64::MAX)]).unwrap_err().contains("more than the 3"));
    }

    #[test]
    fn ends_are_told_apart() {
        let of = |max_tokens, end, finish: &str| {
            let mut answer = Answer::new(&request(max_tokens, end), Counting::Chunks);
            for _ in 0..2 {
                answer.take(parse(br#"{"choices":[{"text":"a"}]}"#).unwrap(), Duration::ZERO).unwrap();
            }
            let last = format!(r#"{{"choices":[{{"finish_reason":"{finish}"}}]}}"#);
            answer.take(parse(last.as_bytes()).unwrap(), Duration::ZERO).unwrap();
            answer.end(None).map(|ending| reason(&ending))
        };
        assert_eq!(of(2, Some(5), "length"), Ok(FinishReason::Length));
        assert_eq!(of(9, Some(2), "length"), Ok(FinishReason::Stop));
        assert_eq!(of(9, Some(5), "stop"), Ok(FinishReason::Early));
        assert_eq!(of(9, None, "stop"), Ok(FinishReason::Stop));
        assert_eq!(of(9, None, "length"), Ok(FinishReason::Early), "a limit of the server's own");
        assert!(of(9, None, "abort").unwrap_err().contains("\"abort\""));
        let nothing = run(Counting::Chunks, 3, &[r#"{"choices":[{"finish_reason":"stop"}]}"#]).unwrap_err();
        assert!(nothing.contains("before its first token"), "{nothing}");
        assert_eq!(Answer::new(&request(9, Some(5)), Counting::Chunks).wanted(), 5);
    }

    #[test]
    fn nonsense_is_refused() {
        let refused = |chunk: &str| run(Counting::Chunks, 3, &[chunk]).unwrap_err();
        assert!(refused("{\"choices\":7}").contains("no chunk of a completion"));
        assert!(refused("<html>").contains("<html>"));
        assert!(refused(r#"{"error":{"message":"out of memory"}}"#).contains("out of memory"));
        assert!(refused(r#"{"choices":[{"text":"a"},{"text":"b"}]}"#).contains("several answers"));
        assert!(refused(r#"{"choices":[{"text":"a","index":1}]}"#).contains("several answers"));
        assert!(refused(r#"{"choices":[{"text":"a"}]}"#).contains("without a finish_reason"));
        let many = run(Counting::TokenIds, 2, &[r#"{"choices":[{"text":"a","token_ids":[1,2,3]}]}"#]);
        assert!(many.unwrap_err().contains("more than the 2 tokens"));
        let back = [
            r#"{"choices":[{"text":"a"}],"usage":{"completion_tokens":2}}"#,
            r#"{"choices":[{"text":"a"}],"usage":{"completion_tokens":1}}"#,
        ];
        assert!(run(Counting::Usage, 3, &back).unwrap_err().contains("backwards"));
    }
}
