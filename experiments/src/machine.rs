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
    /// Which card of its kind: cards of one kind differ by some percent, so that two runs on one card say more than on two. None
    /// in older manifests, and where the tool does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
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

    /// Whether absolute times of the two may be compared: the same processor, cores, system and kind of GPU, if not the same
    /// card. Memory may differ a little between two starts of one machine.
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
    let query = ["--query-gpu=name,memory.total,driver_version,uuid", "--format=csv,noheader", "--id=0"];
    gpu_of(&output("nvidia-smi", &query).unwrap_or_default())
}

/// The GPU of a line of the tool; empty where there is no tool.
fn gpu_of(line: &str) -> Gpu {
    let mut fields = line.split(',').map(str::trim);
    // What a card does not tell is an empty field or stands in brackets, as `[N/A]`.
    let mut next = || fields.next().filter(|field| !field.is_empty() && !field.starts_with('['));
    let mut known = |missing: &str| next().unwrap_or(missing).to_string();
    Gpu {
        name: known("unknown GPU"),
        memory: known("unknown"),
        driver: known("unknown"),
        uuid: next().map(str::to_string),
    }
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
        other.gpu = Some(gpu_of("a GPU, 1 MiB, 1, GPU-1"));
        assert!(!this.same_as(&other));
        assert!(other.describe().starts_with("a GPU, "), "{}", other.describe());
        let card = Machine { gpu: Some(gpu_of("a GPU, 1 MiB, 1, GPU-2")), ..other.clone() };
        assert!(card != other && card.same_as(&other), "a run goes on with another card of its kind");
    }

    #[test]
    fn a_gpu_is_known_by_its_card_where_the_tool_says_which() {
        let whole = gpu_of("NVIDIA H100 80GB HBM3, 81559 MiB, 580.159.04, GPU-0b1c\n");
        let shown = [&*whole.name, &*whole.memory, &*whole.driver];
        assert_eq!(shown, ["NVIDIA H100 80GB HBM3", "81559 MiB", "580.159.04"]);
        assert_eq!(whole.uuid.as_deref(), Some("GPU-0b1c"));
        let partly = gpu_of("NVIDIA H100 80GB HBM3, [N/A], 580.159.04, [N/A]");
        assert_eq!((&*partly.memory, &*partly.driver, partly.uuid), ("unknown", "580.159.04", None));
        let none = gpu_of("");
        assert_eq!((&*none.name, &*none.memory, none.uuid), ("unknown GPU", "unknown", None));
        // As older manifests have it, and as it is written where nothing is known.
        let older = r#"{"name":"a GPU","memory":"1 MiB","driver":"1"}"#;
        let read: Gpu = serde_json::from_str(older).unwrap();
        assert_eq!(read, gpu_of("a GPU, 1 MiB, 1"));
        assert_eq!(serde_json::to_string(&read).unwrap(), older);
    }
}
