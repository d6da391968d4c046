//! A captured sequence of operations that runs again by one call.

use std::sync::Arc;

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, DriverError};

use super::device::Device;
use super::out_of_memory::if_full;
use crate::KernelError;

/// Operations captured from the device's stream. They run again on the same addresses, which must stay allocated for
/// as long as the graph is used.
pub struct Graph {
    // Its kernels' modules are the device's, which goes after it.
    graph: CudaGraph,
    device: Arc<Device>,
}

// SAFETY: a graph is used by one thread at a time (it is not `Sync`), which is all that the driver asks.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `operations` queues. It must not wait for the device or take memory; other threads' models on the card
    /// wait meanwhile where they do.
    ///
    /// # Errors
    /// [`KernelError::Device`] when something cannot be captured.
    pub fn capture(device: &Arc<Device>, operations: impl FnOnce()) -> Result<Self, KernelError> {
        let failed = |error: DriverError| {
            let advice = if_full(
                &error,
                ": the GPU's memory is full: give the KV cache less, or do without graphs (--no-graphs)",
            );
            KernelError::Device(format!("a graph cannot be captured: {error}{advice}"))
        };
        let capturing = device.captures().begin();
        let stream = device.stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).map_err(failed)?;
        let unwinding = EndCapture(device);
        operations();
        std::mem::forget(unwinding);
        let captured = stream.end_capture(CUgraphInstantiate_flags(0));
        device.check()?;
        let graph = captured.map_err(failed)?;
        let graph = graph.ok_or_else(|| KernelError::Device("an empty graph was captured".into()))?;
        graph.upload().map_err(failed)?;
        drop(capturing);
        Ok(Self { graph, device: device.clone() })
    }

    /// Queues the operations once more.
    ///
    /// # Errors
    /// What failed on the device, now or before.
    pub fn launch(&self) -> Result<(), KernelError> {
        self.device.note("a graph", self.graph.launch());
        self.device.check()
    }
}

/// Ends a capture whose operations panicked: a stream that captures is of no use to anyone.
struct EndCapture<'a>(&'a Device);

impl Drop for EndCapture<'_> {
    fn drop(&mut self) {
        let _ = self.0.stream().end_capture(CUgraphInstantiate_flags(0));
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graph").finish_non_exhaustive()
    }
}
