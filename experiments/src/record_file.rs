//! Records that are one JSON file in a folder: of figures for which nothing is served.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::names;
use crate::replace::replace;

/// Writes `record` as `file` into `folder`.
pub(crate) fn write(record: &impl Serialize, folder: &Path, file: &str) -> Result<()> {
    let text = serde_json::to_string(record).context("a record is plain data")?;
    fs::create_dir_all(folder)
        .and_then(|()| {
            let written = |mut out: fs::File| out.write_all((text + "\n").as_bytes());
            replace(&folder.join(file), written, |_, error| error)
        })
        .with_context(|| format!("cannot write {}", folder.display()))
}

/// Reads `file` in `folder`, whose `schema_version` must be this one, and whose `name` one that files can have.
pub(crate) fn read<T: DeserializeOwned>(folder: &Path, file: &str, schema: u32) -> Result<T> {
    #[derive(Deserialize)]
    struct Head {
        schema_version: u32,
        name: String,
    }
    let path = folder.join(file);
    let shown = path.display();
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {shown}"))?;
    let Head { schema_version, name } =
        serde_json::from_str(&text).with_context(|| format!("{shown} is damaged"))?;
    if schema_version != schema {
        bail!(
            "{shown} has schema {schema_version}; this program reads schema {schema}: use the version that made it"
        );
    }
    names::check("the figure's name", &name).map_err(|what| anyhow!("{shown}: {what}"))?;
    serde_json::from_str(&text).with_context(|| format!("{shown} is damaged"))
}

/// Refuses to write over what is there.
pub(crate) fn refuse_existing(dest: &Path) -> Result<()> {
    if dest.exists() {
        bail!("{} exists: committed results are not overwritten", dest.display());
    }
    Ok(())
}
