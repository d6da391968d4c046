//! What the fuzz targets do: each takes hostile bytes and must neither panic nor allocate by a number read from them.

use std::path::Path;

use quire_engine::load::{
    GgufHeader, SafetensorsHeader, config_from_gguf, config_from_json, tokenizer_from_gguf,
};
use quire_experiments::config::{Config, Source};
use quire_workloads::trace::{ReadOptions, Trace, TraceFormat};

/// A GGUF file: header, model configuration and tokenizer.
pub fn gguf(data: &[u8]) {
    let Ok(header) = GgufHeader::parse(data, Path::new("fuzz.gguf")) else { return };
    // What these make of a header that parses is theirs to say; here they must only not panic.
    let _ = config_from_gguf(&header, data);
    let _ = tokenizer_from_gguf(&header, data);
}

/// A safetensors file's header; the same bytes as a `config.json`.
pub fn safetensors(data: &[u8]) {
    let _ = SafetensorsHeader::parse(data, Path::new("fuzz.safetensors"));
    let _ = config_from_json(data);
}

/// An experiment's TOML.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let source = Source::new("fuzz.toml", text);
    if let Err(error) = source.parse::<Config>() {
        // The message points into the text: writing it must work for every text.
        let _ = error.to_string();
    }
}

/// A trace, by its own header and as each format.
pub fn trace(data: &[u8]) {
    let named = [TraceFormat::Azure, TraceFormat::BurstGpt, TraceFormat::Mooncake, TraceFormat::ShareGpt];
    for format in std::iter::once(None).chain(named.map(Some)) {
        let options = ReadOptions { format, ..ReadOptions::default() };
        if let Err(error) = Trace::parse(data, "fuzz", &options) {
            let _ = error.to_string();
        }
    }
}
