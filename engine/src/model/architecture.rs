//! Which models there are: an arm for each, with all that files call it and that sets it apart from its relatives.

/// The architectures that the one implementation covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 1 to 3 and what shares its layers (SmolLM2).
    Llama,
    /// Llama's layers, in all of which attention may see a window alone (Jiang et al. 2023).
    Mistral,
    /// Llama's layers with biases on Q, K and V.
    Qwen2,
    /// Llama's layers with an RMSNorm on each head of Q and K.
    Qwen3,
}

/// What loaders and the writer ask of an architecture.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Facts {
    /// The name that people know, and `model_type` of Hugging Face's `config.json`.
    pub(crate) name: &'static str,
    /// Its class in `architectures` of that file.
    pub(crate) class: &'static str,
    /// Its `general.architecture` in GGUF files, if it has one of its own there.
    pub(crate) gguf: Option<&'static str>,
    /// GGUF files interleave the rows of Q's and K's heads: element `2i` of a head is rotated with `2i + 1`, where the kernels
    /// rotate `i` with `i + head_dim / 2`.
    pub(crate) gguf_interleaves: bool,
    /// Q, K and V have biases and the attention's output has none, where others have what `attention_bias` says on all four.
    pub(crate) qkv_bias: bool,
    /// RMSNorm on each head of Q and K.
    pub(crate) qk_norm: bool,
    pub(crate) windows: Windows,
}

/// What `sliding_window` of a `config.json` means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Windows {
    /// The window of all layers.
    AllLayers,
    /// The window of some, which is not supported.
    SomeLayers,
    /// The same where `use_sliding_window` is true; else nothing.
    SomeLayersIfUsed,
}

impl Architecture {
    /// All of them.
    pub(crate) const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    pub(crate) const fn facts(self) -> Facts {
        let llama = Facts {
            name: "llama",
            class: "LlamaForCausalLM",
            gguf: Some("llama"),
            gguf_interleaves: true,
            qkv_bias: false,
            qk_norm: false,
            windows: Windows::SomeLayers,
        };
        match self {
            Self::Llama => llama,
            // Its GGUF files call it Llama.
            Self::Mistral => Facts {
                name: "mistral",
                class: "MistralForCausalLM",
                gguf: None,
                windows: Windows::AllLayers,
                ..llama
            },
            Self::Qwen2 => Facts {
                name: "qwen2",
                class: "Qwen2ForCausalLM",
                gguf: Some("qwen2"),
                gguf_interleaves: false,
                qkv_bias: true,
                windows: Windows::SomeLayersIfUsed,
                ..llama
            },
            Self::Qwen3 => Facts {
                name: "qwen3",
                class: "Qwen3ForCausalLM",
                gguf: Some("qwen3"),
                gguf_interleaves: false,
                qk_norm: true,
                windows: Windows::SomeLayersIfUsed,
                ..llama
            },
        }
    }

    /// The name that people know.
    pub fn name(self) -> &'static str {
        self.facts().name
    }

    /// The one of this class of Hugging Face's.
    ///
    /// # Errors
    /// Which there are, when there is none.
    pub(crate) fn of_class(class: &str) -> Result<Self, String> {
        Self::find(class, |facts| Some(facts.class))
    }

    /// The one that GGUF files call so.
    ///
    /// # Errors
    /// As [`Self::of_class`].
    pub(crate) fn of_gguf(name: &str) -> Result<Self, String> {
        Self::find(name, |facts| facts.gguf)
    }

    fn find(name: &str, called: impl Fn(Facts) -> Option<&'static str>) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|one| called(one.facts()) == Some(name));
        found.ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.into_iter().filter_map(|one| called(one.facts())).collect();
            let (last, others) = names.split_last().expect("there are several");
            format!("architecture '{name}' is not supported; {} and {last} are", others.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Architecture;

    #[test]
    fn each_is_found_by_its_names_and_others_by_none() {
        for architecture in Architecture::ALL {
            let facts = architecture.facts();
            assert_eq!(Architecture::of_class(facts.class), Ok(architecture));
            assert!(facts.gguf.is_none_or(|name| Architecture::of_gguf(name) == Ok(architecture)));
        }
        let error = Architecture::of_gguf("gemma").unwrap_err();
        assert_eq!(error, "architecture 'gemma' is not supported; llama, qwen2 and qwen3 are");
        let error = Architecture::of_class("PhiForCausalLM").unwrap_err();
        assert!(error.ends_with("MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM are"), "{error}");
    }
}
