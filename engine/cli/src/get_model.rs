//! `quire get-model`: a model from the Hugging Face hub.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use hf_hub::HFClientSync;

#[derive(Args)]
#[command(after_help = "Example:
  quire get-model HuggingFaceTB/SmolLM2-360M-Instruct

The environment variable HF_TOKEN holds the token for models that need one.")]
pub(crate) struct GetModelArgs {
    /// ORG/NAME on the hub.
    name: String,
    /// Folder to put it in [default: models/NAME].
    #[arg(long)]
    to: Option<PathBuf>,
    /// Branch, tag or commit.
    #[arg(long)]
    revision: Option<String>,
}

/// What the loader reads.
const FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
];

pub(crate) fn run(args: &GetModelArgs) -> anyhow::Result<()> {
    let Some((owner, name)) = args.name.split_once('/').filter(|(o, n)| !o.is_empty() && !n.is_empty())
    else {
        bail!("'{}' is not ORG/NAME", args.name);
    };
    if name.contains('/') || name.starts_with('.') {
        bail!("'{}' is not ORG/NAME", args.name);
    }
    let folder = args.to.clone().unwrap_or_else(|| PathBuf::from("models").join(name));
    let client = HFClientSync::new().context("cannot set up the hub's client")?;
    client
        .model(owner, name)
        .snapshot_download()
        .allow_patterns(FILES.map(str::to_owned).to_vec())
        .maybe_revision(args.revision.clone())
        .local_dir(folder.clone())
        .send()
        .with_context(|| format!("cannot fetch {} from the hub: is the network reachable?", args.name))?;
    if !folder.join("config.json").exists() {
        bail!("{} holds no config.json: it is no model that this engine loads", args.name);
    }
    Ok(writeln!(std::io::stdout(), "fetched {}", folder.display())?)
}
