//! What a run ran on and from which source, for its manifest.

use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::config::Device;

/// A machine, as far as times depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// The processor's own name.
    pub cpu: String,
    /// Threads the operating system offers this process.
    pub cores: usize,
    /// Memory in MiB; 0 when unknown.
    pub memory_mib: u64,
    /// Operating system and architecture.
    pub os: String,
    /// Vector instruction sets that kernels may use.
    pub features: Vec<String>,
    /// The GPU, where systems compute on one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
}

/// A GPU, as its driver's own tool names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Its name; "unknown GPU" where the tool is missing.
    pub name: String,
    /// Memory, as the tool prints it.
    pub memory: String,
    /// Version of the driver.
    pub driver: String,
}

impl Machine {
    /// This one, with the first GPU if systems compute on it.
    pub fn this(device: Device) -> Self {
        Self {
            gpu: (device == Device::Cuda).then(gpu),
            cpu: cpu_name(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get),
            memory_mib: memory_mib(),
            os: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            features: features(),
        }
    }

    /// Whether absolute times of the two may be compared: the same processor, cores, system and kind of GPU. Memory may
    /// differ a little between two starts of one machine.
    pub fn same_as(&self, other: &Self) -> bool {
        let gpu = |machine: &Self| machine.gpu.as_ref().map(|gpu| gpu.name.clone());
        (&self.cpu, self.cores, &self.os, &self.features, gpu(self))
            == (&other.cpu, other.cores, &other.os, &other.features, gpu(other))
    }

    /// All that [`Self::same_as`] looks at, for errors.
    pub fn describe_fully(&self) -> String {
        format!("{}, {}, {}", self.describe(), self.os, self.features.join(" "))
    }

    /// One line for captions of what ran on `device`: the GPU is missing in runs of older programs.
    pub fn describe_on(&self, device: Device) -> String {
        let gpu = if device == Device::Cuda && self.gpu.is_none() { "A GPU, not recorded, " } else { "" };
        format!("{gpu}{}", self.describe())
    }

    /// One line.
    pub fn describe(&self) -> String {
        let gpu = self.gpu.as_ref().map_or(String::new(), |gpu| format!("{}, ", gpu.name));
        format!("{gpu}{} cores of {}, {:.0} GiB", self.cores, self.cpu, self.memory_mib as f64 / 1024.0)
    }
}

fn gpu() -> Gpu {
    let query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader", "--id=0"];
    let line = output("nvidia-smi", &query).unwrap_or_default();
    let mut fields = line.split(',').map(|field| field.trim().to_string()).filter(|field| !field.is_empty());
    let mut next = |missing: &str| fields.next().unwrap_or_else(|| missing.into());
    Gpu { name: next("unknown GPU"), memory: next("unknown"), driver: next("unknown") }
}

fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = field(&text, "model name").or_else(|| field(&text, "Model"));
    named
        .or_else(|| output("sysctl", &["-n", "machdep.cpu.brand_string"]))
        .unwrap_or_else(|| "unknown CPU".into())
}

fn memory_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = field(&text, "MemTotal").and_then(|v| v.trim_end_matches(" kB").parse::<u64>().ok());
    let bytes = || output("sysctl", &["-n", "hw.memsize"]).and_then(|v| v.parse::<u64>().ok());
    kib.map(|k| k >> 10).or_else(|| bytes().map(|b| b >> 20)).unwrap_or(0)
}

/// The value of the first line `name : value`.
fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == name))?;
    line.split_once(':').map(|(_, value)| value.trim().to_string())
}

fn features() -> Vec<String> {
    let mut found: Vec<&str> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let known = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
            ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ];
        found.extend(known.iter().filter(|k| k.1).map(|k| k.0));
    }
    #[cfg(target_arch = "aarch64")]
    found.push("neon");
    found.sort_unstable();
    found.into_iter().map(str::to_string).collect()
}

/// The state of the source that ran.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revision {
    /// Commit; "unknown" outside a git checkout.
    pub commit: String,
    /// Whether tracked files differed from it.
    pub dirty: bool,
}

impl Revision {
    /// Of the current directory's checkout.
    pub fn current() -> Self {
        let commit = output("git", &["rev-parse", "HEAD"]);
        let status = output("git", &["status", "--porcelain", "--untracked-files=no"]);
        Self {
            commit: commit.unwrap_or_else(|| "unknown".into()),
            dirty: status.is_some_and(|s| !s.is_empty()),
        }
    }
}

/// What a command prints, trimmed; none when it cannot run or fails.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "model\t\t: 17\nmodel name\t: AMD EPYC: 9R14\n";
        assert_eq!(field(text, "model name").as_deref(), Some("AMD EPYC: 9R14"));
        assert_eq!(field(text, "mode"), None);
    }

    #[test]
    fn memory_alone_does_not_make_another_machine() {
        let this = Machine::this(Device::Cpu);
        assert_eq!(this.describe_on(Device::Cpu), this.describe());
        assert!(
            this.describe_on(Device::Cuda).starts_with("A GPU, not recorded, "),
            "a GPU ran all the same"
        );
        let mut other = this.clone();
        other.memory_mib += 3;
        assert!(this.same_as(&other));
        other.cores += 1;
        assert!(!this.same_as(&other));
        other.cores -= 1;
        other.gpu = Some(Gpu { name: "a GPU".into(), memory: "1 MiB".into(), driver: "1".into() });
        assert!(!this.same_as(&other));
        assert!(other.describe().starts_with("a GPU, "), "{}", other.describe());
    }
}
