//! The algorithms chosen for products, kept on disk: timing them takes seconds when a model starts.
//!
//! A file a card, library, type of activations and version of what was timed and how, a line a shape. Lines are only ever appended; one that
//! cannot be read is as if it were not there, and a file that cannot be written costs the next start some seconds. With
//! `QUIRE_PRODUCT_CHOICES=off` nothing is read or written: for runs whose times mean nothing.

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::device::Device;
use super::gemm::Shape;
use super::modules::cache_folder;

/// Raised when what a line says is no longer what it said.
const FORMAT: u32 = 1;
/// Bytes of a file at most: a model has some hundred shapes, of 160 bytes. A larger one is started anew.
const MOST_BYTES: u64 = 16 << 20;
/// What is timed and how it is chosen: choices made by other code do not count.
const TIMED: [&str; 7] = [
    include_str!("gemm.rs"),
    include_str!("skinny.rs"),
    include_str!("../../cuda/skinny.cu"),
    include_str!("../../cuda/skinny_results.cuh"),
    include_str!("../../cuda/skinny_transfers.cuh"),
    include_str!("../../cuda/barriers.cuh"),
    include_str!("../../cuda/common.cuh"),
];

/// What was chosen for a shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// The product kernel of ours.
    Skinny,
    /// cuBLASLt's algorithm of this description, which the library alone understands.
    CublasLt([u64; 8]),
}

/// The choices of one card.
#[derive(Debug, Default)]
pub(super) struct Choices {
    file: Option<PathBuf>,
    known: HashMap<Shape, Choice>,
}

impl Choices {
    /// Those that were made on a card of this name, for its activations, with this version of cuBLASLt.
    pub(super) fn open(device: &Device, cublaslt: usize) -> Self {
        if std::env::var_os("QUIRE_PRODUCT_CHOICES").is_some_and(|value| value == "off") {
            return Self::default();
        }
        let mut hash = Sha256::new();
        let (card, activations) = (&device.info().name, device.activations().name());
        hash.update(format!("{FORMAT} {card} {activations} {cublaslt}"));
        TIMED.iter().for_each(|source| hash.update(source));
        let hash: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        let file = cache_folder().map(|folder| folder.join(format!("products.{hash}.txt")));
        let size = file.as_ref().and_then(|file| std::fs::metadata(file).ok()).map(|data| data.len());
        if size.is_some_and(|size| size > MOST_BYTES) {
            let _ = file.as_ref().map(std::fs::remove_file);
        }
        let text = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok());
        let lines = text.as_deref().unwrap_or("").split_inclusive('\n');
        Self { known: lines.filter_map(|line| parse(line.strip_suffix('\n')?)).collect(), file }
    }

    /// What was chosen for a shape.
    pub(super) fn get(&self, shape: &Shape) -> Option<Choice> {
        self.known.get(shape).copied()
    }

    /// Keeps a choice.
    pub(super) fn put(&mut self, shape: Shape, choice: Choice) {
        self.known.insert(shape, choice);
        let Some(file) = &self.file else { return };
        let made = file.parent().is_some_and(|folder| std::fs::create_dir_all(folder).is_ok());
        let opened = std::fs::OpenOptions::new().create(true).append(true).open(file);
        if let (true, Ok(mut file)) = (made, opened) {
            // One write a line: lines of several processes do not mix.
            let _ = file.write_all(line(shape, choice).as_bytes());
        }
    }
}

fn line(shape: Shape, choice: Choice) -> String {
    let Shape { rows, n, k, f32_out, bias } = shape;
    let what = match choice {
        Choice::Skinny => "skinny".to_string(),
        Choice::CublasLt(words) => words.map(|word| format!("{word:016x}")).join(" "),
    };
    format!("{rows} {n} {k} {} {} {what}\n", u8::from(f32_out), u8::from(bias))
}

fn parse(line: &str) -> Option<(Shape, Choice)> {
    let mut fields = line.split(' ');
    let mut number = || fields.next()?.parse::<usize>().ok();
    let (rows, n, k, f32_out, bias) = (number()?, number()?, number()?, number()?, number()?);
    let shape = Shape { rows, n, k, f32_out: f32_out == 1, bias: bias == 1 };
    let rest: Vec<&str> = fields.collect();
    if rest == ["skinny"] {
        return Some((shape, Choice::Skinny));
    }
    // Of a line that was cut off, the last word may be a number still.
    let word = |word: &&str| u64::from_str_radix(word, 16).ok().filter(|_| word.len() == 16);
    let words: Option<Vec<u64>> = rest.iter().map(word).collect();
    Some((shape, Choice::CublasLt(words?.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::super::modules::included;
    use super::*;

    /// A change of a header changes the file's name too.
    #[test]
    fn all_that_is_timed_is_hashed() {
        for source in TIMED {
            for (name, header) in included(source) {
                assert!(header.is_some_and(|text| TIMED.contains(&text)), "{name} is not in TIMED");
            }
        }
    }

    #[test]
    fn a_line_says_what_was_chosen() {
        let shape = Shape { rows: 64, n: 6144, k: 4096, f32_out: false, bias: true };
        for choice in [Choice::Skinny, Choice::CublasLt([1, 2, 3, u64::MAX, 0, 6, 7, 8])] {
            assert_eq!(parse(line(shape, choice).trim_end()), Some((shape, choice)));
        }
    }

    #[test]
    fn what_cannot_be_read_is_not_there() {
        let shape = Shape { rows: 64, n: 6144, k: 4096, f32_out: false, bias: true };
        let whole = line(shape, Choice::CublasLt([1, 2, 3, u64::MAX, 0, 6, 7, 8]));
        for cut in 1..18 {
            assert_eq!(parse(&whole[..whole.len() - 1 - cut]), None, "{cut} characters less");
        }
        for text in
            ["", "64", "a b c d e skinny", "64 1 1 0 0", "64 1 1 0 0 skinny 1", "64 1 1 0 0 1 2 3 4 5 6 7"]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
