//! One GPU: its context, its one stream, its memory and its kernels.
//!
//! Everything runs in order on one stream, so nothing here waits but what says so. A launch that fails is remembered and reported by [`Device::check`], because the operations of a
//! forward pass have no results to return errors with.

mod captures;
mod guise;
mod launch;
mod memory;

use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};

use super::activations::ActivationDtype;
use super::libraries;
use super::modules::{self, Modules};
use super::out_of_memory::{OTHERS, OTHERS_OR_KV, if_full};
use crate::KernelError;

pub(crate) use captures::Captures;
pub(crate) use launch::{Arg, Grid, Kernel};
pub(crate) use memory::{DeviceVec, Pinned};

/// Streaming multiprocessors and shared memory: what launches are planned with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The vendor's name of the card.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that a block may have, in bytes.
    pub shared_bytes_per_block: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Name by which the vendor's tools find it.
    pub uuid: String,
    /// Operations of bfloat16 that its tensor cores can do in a second, single-precision sums, at its highest clock: where
    /// the vendor states how many a multiprocessor does in a clock. (Data sheets count at a lower clock.)
    pub peak_flops: Option<u64>,
    /// Bytes that its memory can move in a second.
    pub peak_bytes: u64,
}

fn describe(context: &CudaContext) -> Result<DeviceInfo, DriverError> {
    let attribute = |which| context.attribute(which).map(|value| u64::try_from(value).unwrap_or(0));
    let capability = context.compute_capability()?;
    let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let khz = attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?;
    let memory_khz = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
    let bus_bits = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
    // Of A100, H100 and B200; consumer cards of one capability differ from each other.
    let flops_a_clock = match capability {
        (8, 0) => Some(2048),
        (9, 0) => Some(4096),
        (10, 0) => Some(8192),
        _ => None,
    };
    let hex = |bytes: &[std::ffi::c_char]| -> String {
        bytes.iter().map(|&b| format!("{:02x}", b as u8)).collect()
    };
    let id = context.uuid()?.bytes;
    let parts = [&id[..4], &id[4..6], &id[6..8], &id[8..10], &id[10..]].map(hex);
    Ok(DeviceInfo {
        name: context.name()?,
        capability,
        multiprocessors: multiprocessors as u32,
        shared_bytes_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            as u32,
        memory: context.total_mem()? as u64,
        uuid: format!("GPU-{}", parts.join("-")),
        peak_flops: flops_a_clock.map(|flops| flops * multiprocessors * khz * 1000),
        // Two transfers a clock.
        peak_bytes: 2 * memory_khz * 1000 * bus_bits / 8,
    })
}

/// A GPU and the stream that all work goes through.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    captures: Captures,
    modules: Arc<Modules>,
    activations: ActivationDtype,
    info: DeviceInfo,
    failure: Mutex<Option<String>>,
    /// Whether kernels that may overlap do.
    overlap: AtomicBool,
    /// Blocks of device and pinned memory taken.
    allocations: AtomicU64,
}

impl Device {
    /// Opens GPU number `ordinal` and loads its kernels for activations of this type.
    ///
    /// # Errors
    /// [`KernelError::Device`], in one sentence that says what is missing.
    pub fn open(ordinal: usize, activations: ActivationDtype) -> Result<Arc<Self>, KernelError> {
        libraries::require()?;
        let found = CudaContext::device_count().map_err(|e| device_error("no NVIDIA GPU can be used", e))?;
        if ordinal >= usize::try_from(found).unwrap_or(0) {
            return Err(KernelError::Device(format!(
                "there is no GPU {ordinal}: this machine shows {found}"
            )));
        }
        let open = |e| device_error(&format!("GPU {ordinal} cannot be opened"), e);
        let captures = Captures::on(ordinal);
        let held_off = captures.hold_off();
        let context = CudaContext::new(ordinal).map_err(open)?;
        // SAFETY: all memory of this context is used on the one stream below, so no events are needed between uses.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(open)?;
        drop(held_off);
        let mut info = describe(&context).map_err(open)?;
        let guise = std::env::var(guise::VARIABLE).ok();
        let ptx = guise.map(|wanted| guise::put_on(&mut info, &wanted)).transpose()?;
        if info.capability < (8, 0) {
            return Err(KernelError::Device(format!(
                "{} has compute capability {}.{}: the kernels need 8.0 (Ampere) or later",
                info.name, info.capability.0, info.capability.1
            )));
        }
        let modules = modules::on(ordinal, captures, info.capability, ptx, activations)?;
        Ok(Arc::new(Self {
            context,
            stream,
            captures,
            modules,
            activations,
            info,
            failure: Mutex::new(None),
            overlap: AtomicBool::new(true),
            allocations: AtomicU64::new(0),
        }))
    }

    /// What the card is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// What its kernels' activations and weights are.
    pub fn activations(&self) -> ActivationDtype {
        self.activations
    }

    /// The kernel of this name.
    pub(crate) fn kernel(&self, name: &str) -> Result<Kernel, KernelError> {
        let module = self.modules.get(modules::source_of(name));
        let module = module.ok_or_else(|| KernelError::Device(format!("there is no kernel {name}")))?;
        let held_off = self.captures.hold_off();
        let loaded = module.load_function(name).and_then(|function| {
            // Now, not with its first launch: it can fail where memory is short, and is no matter for a capture.
            // SAFETY: a function that was just found.
            unsafe { sys::cuFuncLoad(function.cu_function()) }.result().map(|()| function)
        });
        drop(held_off);
        let function = loaded.map_err(|e| {
            let advice = if_full(&e, OTHERS_OR_KV);
            KernelError::Device(format!("the kernel {name} cannot be loaded: {e}{advice}"))
        })?;
        Ok(Kernel { function, overlaps: false, most_shared: self.info.shared_bytes_per_block })
    }

    /// The kernel of this name, one of those that start while the kernel before them ends and wait for it themselves:
    /// its source says `wait_for_earlier` (kernels/cuda/common.cuh, where it is argued that this is safe). Before Hopper
    /// kernels do not overlap.
    pub(crate) fn overlapping_kernel(&self, name: &str) -> Result<Kernel, KernelError> {
        Ok(Kernel { overlaps: self.info.capability >= (9, 0), ..self.kernel(name)? })
    }

    /// Whether, from now on, kernels that may overlap do.
    pub(crate) fn set_overlap(&self, on: bool) {
        self.overlap.store(on, Ordering::Relaxed);
    }

    /// Queues a launch. A failure is kept for [`Self::check`].
    pub(crate) fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) {
        if grid.blocks.contains(&0) {
            return;
        }
        let mut pointers = [std::ptr::null_mut::<c_void>(); 32];
        assert!(args.len() <= pointers.len(), "a kernel with {} arguments", args.len());
        for (pointer, arg) in pointers.iter_mut().zip(args) {
            *pointer = arg.address();
        }
        let [x, y, z] = grid.blocks;
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(kernel.overlaps && self.overlap.load(Ordering::Relaxed)),
        };
        // SAFETY: the arguments are those that the kernel's source lists, by the caller's contract; the pointers and the
        // attribute live until the call returns, which copies what they point to.
        let launched = unsafe {
            let function = kernel.function.cu_function();
            sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), std::ptr::null_mut())
        };
        self.note("a launch", launched.result());
    }

    /// Keeps the first failure.
    pub(crate) fn note(&self, what: &str, outcome: Result<(), DriverError>) {
        if let Err(error) = outcome {
            self.fail(&format!("{what}: {error}"));
        }
    }

    /// Keeps a failure, if it is the first.
    pub(crate) fn fail(&self, what: &str) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert_with(|| what.to_string());
    }

    /// The first failure since the device was opened. A device that failed is of no further use.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn check(&self) -> Result<(), KernelError> {
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(what) => Err(KernelError::Device(what.clone())),
            None => Ok(()),
        }
    }

    /// Waits until all that was queued is done.
    ///
    /// # Errors
    /// What failed, now or before.
    pub fn synchronize(&self) -> Result<(), KernelError> {
        let waited = self.stream.synchronize();
        self.note("the device", waited);
        self.check()
    }

    /// Makes the calling thread one that may use this device. Threads take turns.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn bind(&self) -> Result<(), KernelError> {
        self.context.bind_to_thread().map_err(|e| device_error("the device", e))
    }

    /// Bytes of device memory that are free now.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    pub fn free_memory(&self) -> Result<u64, KernelError> {
        let (free, _) = self.context.mem_get_info().map_err(|e| device_error("the device", e))?;
        Ok(free as u64)
    }

    /// How many blocks of device and pinned memory were taken since it was opened, whether or not they were given back:
    /// what serves does not take any.
    pub fn allocations(&self) -> u64 {
        self.allocations.load(Ordering::Relaxed)
    }

    /// Memory for `len` elements, not initialized; `what` says what it is for and, after a colon, what to lower.
    pub(crate) fn alloc<T: Copy>(&self, len: usize, what: &'static str) -> Result<DeviceVec<T>, KernelError> {
        self.bind()?;
        let too_much = KernelError::OutOfMemory { what, bytes: usize::MAX };
        let bytes = len.checked_mul(size_of::<T>()).ok_or(too_much)?;
        let ptr = match bytes {
            0 => 0,
            _ => {
                let _held_off = self.captures.hold_off();
                // SAFETY: plain memory, freed once by `DeviceVec`.
                unsafe { result::malloc_sync(bytes) }.map_err(|error| match error.0 {
                    sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => self.no_room(what, bytes),
                    _ => device_error("an allocation", error),
                })?
            }
        };
        self.allocations.fetch_add(u64::from(bytes > 0), Ordering::Relaxed);
        Ok(DeviceVec::new(self.context.clone(), self.captures, ptr, len))
    }

    fn no_room(&self, what: &str, bytes: usize) -> KernelError {
        match self.context.mem_get_info() {
            Ok((free, total)) => KernelError::Device(format!(
                "cannot allocate {bytes} bytes for {what} ({free} of the GPU's {total} bytes are free)"
            )),
            Err(error) => device_error("the device", error),
        }
    }

    /// As [`Self::alloc`], all bytes zero.
    pub(crate) fn zeroed<T: Copy>(
        &self,
        len: usize,
        what: &'static str,
    ) -> Result<DeviceVec<T>, KernelError> {
        let memory = self.alloc::<T>(len, what)?;
        self.set_zero(memory.ptr(), len * size_of::<T>());
        self.synchronize()?;
        Ok(memory)
    }

    /// Queues zeroing of `bytes` bytes at `ptr`.
    pub(crate) fn set_zero(&self, ptr: u64, bytes: usize) {
        if bytes > 0 {
            // SAFETY: callers give memory that they own.
            let queued = unsafe { result::memset_d8_async(ptr, 0, bytes, self.stream.cu_stream()) };
            self.note("a memset", queued);
        }
    }

    /// Queues a copy of `bytes` bytes from one place in device memory to another.
    pub(crate) fn copy(&self, from: u64, to: u64, bytes: usize) {
        // SAFETY: callers give memory that they own, of at least this size.
        let queued = unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) };
        self.note("a copy on the device", queued);
    }

    /// Copies `values` to `at` and waits until they were taken: for loading, not for steps.
    pub(crate) fn upload<T: Copy>(&self, values: &[T], at: u64) -> Result<(), KernelError> {
        self.bind()?;
        // SAFETY: callers give memory of at least this size.
        let queued = unsafe { result::memcpy_htod_async(at, values, self.stream.cu_stream()) };
        self.note("a copy to the device", queued);
        self.synchronize()
    }

    /// Queues a copy from pinned memory to `at`. The memory must not be written before the copy is done.
    pub(crate) fn upload_pinned<T: Copy>(&self, source: &Pinned<T>, len: usize, at: u64) {
        if len > 0 {
            // SAFETY: pinned memory of this length; callers keep it unchanged until the stream has passed.
            let queued =
                unsafe { result::memcpy_htod_async(at, &source.values()[..len], self.stream.cu_stream()) };
            self.note("a copy to the device", queued);
        }
    }

    /// Copies from the device and waits for it, and so for all that was queued before.
    pub(crate) fn download<T: Copy>(&self, from: u64, into: &mut [T]) -> Result<(), KernelError> {
        if !into.is_empty() {
            // SAFETY: `into` is written before this returns; callers give device memory of at least this size.
            let queued = unsafe { result::memcpy_dtoh_async(into, from, self.stream.cu_stream()) };
            self.note("a copy from the device", queued);
        }
        self.synchronize()
    }

    /// Queues a copy from the device to these elements of pinned memory, which hold it once the stream has passed.
    pub(crate) fn download_pinned<T: Copy>(&self, from: u64, into: &mut Pinned<T>, range: Range<usize>) {
        if !range.is_empty() {
            let into = &mut into.values_mut()[range];
            // SAFETY: pinned memory of this length, which its owner keeps until the stream has passed.
            let queued = unsafe { result::memcpy_dtoh_async(into, from, self.stream.cu_stream()) };
            self.note("a copy from the device", queued);
        }
    }

    /// Pinned host memory for `len` elements, zero.
    pub(crate) fn pinned<T: Copy>(&self, len: usize, what: &'static str) -> Result<Pinned<T>, KernelError> {
        self.bind()?;
        let bytes = len.saturating_mul(size_of::<T>());
        let held_off = self.captures.hold_off();
        // SAFETY: freed once by `Pinned`.
        let memory = unsafe { result::malloc_host(bytes.max(1), 0) };
        drop(held_off);
        let ptr = memory.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => KernelError::OutOfMemory { what, bytes },
            _ => device_error("pinned memory of the host", error),
        })?;
        self.allocations.fetch_add(1, Ordering::Relaxed);
        // SAFETY: just allocated; zero is a value of every plain number type used here.
        unsafe { std::ptr::write_bytes(ptr.cast::<u8>(), 0, bytes) };
        Ok(Pinned::new(self.context.clone(), self.captures, ptr.cast(), len))
    }

    /// Seconds that the device takes for what `operations` queues, by its own clock. What was queued before is waited
    /// for first.
    ///
    /// # Errors
    /// What failed, now or before.
    pub fn time(&self, operations: impl FnOnce()) -> Result<f64, KernelError> {
        let (start, end) = (self.event()?, self.event()?);
        self.synchronize()?;
        self.record(&start);
        operations();
        self.record(&end);
        self.wait(&end)?;
        let milliseconds = start.elapsed_ms(&end).map_err(|e| device_error("an event", e))?;
        Ok(f64::from(milliseconds) / 1e3)
    }

    /// What keeps captures on this card, and calls that end them, apart.
    pub(crate) fn captures(&self) -> Captures {
        self.captures
    }

    /// The stream, for libraries.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// An event to wait for.
    pub(crate) fn signal(&self) -> Result<CudaEvent, KernelError> {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        self.context.new_event(Some(flags)).map_err(|e| device_error("an event", e))
    }

    /// Waits until the stream has passed `event`.
    pub(crate) fn wait(&self, event: &CudaEvent) -> Result<(), KernelError> {
        self.note("the device", event.synchronize());
        self.check()
    }

    /// An event that can be timed with.
    pub(crate) fn event(&self) -> Result<CudaEvent, KernelError> {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        self.context.new_event(Some(flags)).map_err(|e| device_error("an event", e))
    }

    /// Records `event` in the stream.
    pub(crate) fn record(&self, event: &CudaEvent) {
        self.note("an event", event.record(&self.stream));
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("info", &self.info).finish_non_exhaustive()
    }
}

fn device_error(what: &str, error: DriverError) -> KernelError {
    KernelError::Device(format!("{what}: {error}{}", if_full(&error, OTHERS)))
}
