//! Programs of two revisions, built alike: the base's in a git worktree of its own that goes when it is built.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Where worktree and builds go, below the checkout. What is built there serves the next time; `cargo clean` removes it.
const FOLDER: &str = "target/suite";
/// The feature that slows the matrix product, which exists to see that a suite turns red.
const SLOW_GEMM: &str = "quire-kernels/slow-gemm";

/// The programs.
#[derive(Debug)]
pub(super) struct Programs {
    /// Of the base revision.
    pub(super) base: PathBuf,
    /// Of this checkout as it stands.
    pub(super) new: PathBuf,
    /// The base's commit.
    pub(super) commit: String,
}

/// A worktree; dropping it removes it.
struct Worktree {
    top: PathBuf,
    path: PathBuf,
}

impl Drop for Worktree {
    fn drop(&mut self) {
        // What is left of it, if this fails, is told and removed by the next `git worktree prune`.
        let _ = git(&self.top, &["worktree", "remove", "--force"], Some(&self.path));
    }
}

/// Builds the `quire` command of `revision` and of this checkout, with the same profile and into the same folder, so that
/// their dependencies are compiled once. The compiler's words go to `log`.
///
/// # Errors
/// When this is no checkout, there is no such revision, or one does not build.
pub(super) fn build(revision: &str, slow: bool, log: &Path) -> Result<Programs> {
    let top = PathBuf::from(git(Path::new("."), &["rev-parse", "--show-toplevel"], None)?);
    let commit = format!("{revision}^{{commit}}");
    let commit = git(&top, &["rev-parse", "--verify", "--quiet", "--end-of-options", &commit], None)
        .with_context(|| format!("there is no revision `{revision}` here"))?;
    let folder = top.join(FOLDER);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let log = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;

    let worktree = Worktree { path: folder.join("base"), top: top.clone() };
    if worktree.path.exists() {
        // Of a suite that was killed.
        git(&top, &["worktree", "remove", "--force"], Some(&worktree.path))?;
    }
    git(&top, &["worktree", "add", "--detach", "--force"], Some(&worktree.path))
        .and_then(|_| git(&worktree.path, &["checkout", "--quiet", "--detach", &commit], None))?;
    let base = compile(&worktree.path, &folder, "base-quire", None, &log)
        .with_context(|| format!("the base revision {commit}"))?;
    drop(worktree);
    let new = compile(&top, &folder, "new-quire", slow.then_some(SLOW_GEMM), &log)?;
    Ok(Programs { base, new, commit })
}

/// Builds the command of a checkout and keeps it under another name.
fn compile(checkout: &Path, folder: &Path, name: &str, feature: Option<&str>, log: &File) -> Result<PathBuf> {
    let built = folder.join("build");
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--locked", "-p", "quire-cli", "--bin", "quire"]);
    cargo.args(feature.map(|feature| ["--features", feature]).into_iter().flatten());
    cargo.current_dir(checkout).env("CARGO_TARGET_DIR", &built);
    cargo.stdout(log.try_clone()?).stderr(log.try_clone()?);
    let status = cargo.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("the quire command of {} does not build: see build.log beside the summary", checkout.display());
    }
    let program = folder.join(name);
    let from = built.join("release").join("quire").with_extension(std::env::consts::EXE_EXTENSION);
    std::fs::copy(&from, &program).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(program)
}

/// What git prints, trimmed; `path` is the last argument.
fn git(within: &Path, arguments: &[&str], path: Option<&Path>) -> Result<String> {
    let mut git = Command::new("git");
    git.current_dir(within).args(arguments).args(path);
    let output = git.output().context("cannot start git")?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("git {}: {}", arguments.join(" "), error.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_revision_is_refused_before_anything_is_built() {
        let dir = tempfile::tempdir().unwrap();
        for revision in ["no-such-revision", "--all"] {
            let error = build(revision, false, &dir.path().join("log")).unwrap_err().to_string();
            assert!(error.contains(revision) || error.contains("rev-parse"), "{error}");
        }
        assert!(!dir.path().join("log").exists());
    }
}
