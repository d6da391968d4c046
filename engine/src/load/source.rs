//! What a model's name means: a folder, a GGUF file, or a shape to fill with random numbers.

use std::path::{Path, PathBuf};

use crate::dummy::{DummyShape, DummyWeights};
use crate::load::{GgufWeights, HfFolder, tokenizer_from_gguf};
use crate::model::{ModelConfig, WeightDtype, WeightSource};
use crate::{EngineError, Tokenizer};

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A known shape with random weights.
    Dummy {
        /// Which.
        shape: DummyShape,
        /// Seed of the weights.
        seed: u64,
    },
    /// A Hugging Face folder.
    Folder(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
}

impl ModelSource {
    /// Reads `dummy:NAME`, `dummy:NAME:SEED`, the path of a folder or that of a `.gguf` file.
    ///
    /// # Errors
    /// When it is none of these.
    pub fn parse(text: &str) -> Result<Self, EngineError> {
        if let Some(name) = text.strip_prefix("dummy:") {
            let (name, seed) = name.split_once(':').unwrap_or((name, "0"));
            let seed = seed.parse().map_err(|_| {
                EngineError::Config(format!("'{seed}' in '{text}' is no seed: it must be a whole number"))
            })?;
            return Ok(ModelSource::Dummy { shape: name.parse()?, seed });
        }
        let path = Path::new(text);
        let fail = |what: &str| Err(EngineError::Model { path: path.to_owned(), what: what.into() });
        if path.is_dir() {
            Ok(ModelSource::Folder(path.to_owned()))
        } else if !path.exists() {
            fail("there is no such file or folder (scripts/get-model fetches models)")
        } else if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            Ok(ModelSource::Gguf(path.to_owned()))
        } else {
            fail("a model is a folder with config.json, a .gguf file, or dummy:NAME")
        }
    }

    /// Whether the weights are random.
    pub fn is_dummy(&self) -> bool {
        matches!(self, ModelSource::Dummy { .. })
    }

    /// Opens the model; its weights are read when they are asked for. `dtype` and `threads` are for generated weights.
    ///
    /// # Errors
    /// When files are missing or wrong.
    pub fn open(&self, dtype: WeightDtype, threads: usize) -> Result<Checkpoint, EngineError> {
        let (name, config, weights): (_, _, Box<dyn WeightSource>) = match self {
            ModelSource::Dummy { shape, seed } => {
                let weights = DummyWeights::new(*seed, dtype, threads);
                (format!("dummy:{}", shape.name()), shape.config(), Box::new(weights))
            }
            ModelSource::Folder(path) => {
                let folder = HfFolder::open(path)?;
                (file_name(path), folder.config().clone(), Box::new(folder))
            }
            ModelSource::Gguf(path) => {
                let file = GgufWeights::open(path)?;
                (file_name(path), file.config().clone(), Box::new(file))
            }
        };
        Ok(Checkpoint { name, config, weights, dummy: self.is_dummy() })
    }

    /// The model's tokenizer, chat template included.
    ///
    /// # Errors
    /// When there is none (dummy models have none) or it is wrong.
    pub fn tokenizer(&self) -> Result<Tokenizer, EngineError> {
        match self {
            ModelSource::Dummy { .. } => Err(EngineError::Tokenizer(
                "a dummy model has random weights and no tokenizer: give it token ids, or use a real model"
                    .into(),
            )),
            ModelSource::Folder(path) => Tokenizer::from_folder(path),
            ModelSource::Gguf(path) => {
                let file = GgufWeights::open(path)?;
                tokenizer_from_gguf(file.header(), file.bytes())
                    .map_err(|what| EngineError::Model { path: path.clone(), what })
            }
        }
    }
}

/// An opened model.
pub struct Checkpoint {
    /// What to call it.
    pub name: String,
    /// Shape and constants.
    pub config: ModelConfig,
    /// Its weights.
    pub weights: Box<dyn WeightSource>,
    /// Whether the weights are random.
    pub dummy: bool,
}

fn file_name(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    absolute.file_name().unwrap_or(absolute.as_os_str()).to_string_lossy().into_owned()
}
