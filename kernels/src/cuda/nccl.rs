//! Sums over the GPUs of one host, by NCCL.
//!
//! Each rank drives its GPU from a thread of its own and queues the same operations in the same order. NCCL's are kernels
//! on the rank's one stream like all others: they wait on the device until every rank has come, and the host waits for
//! none of them. They can be captured in graphs.

use std::ffi::{CStr, c_int};
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::nccl::result::{self, NcclError};
use cudarc::nccl::sys;

use super::activations::ActivationDtype;
use super::device::Device;
use super::libraries;
use crate::KernelError;
use crate::group::Group;

/// Ranks on the GPUs of this host.
pub struct NcclGroup {
    group: Group,
    id: sys::ncclUniqueId,
    /// Each rank's communicator, until the group has ended.
    communicators: Arc<[Mutex<Option<Communicator>>]>,
}

/// NCCL's own handle of a rank.
struct Communicator(sys::ncclComm_t);

// SAFETY: NCCL asks that one thread at a time uses a communicator, which the lock around each sees to.
unsafe impl Send for Communicator {}

impl NcclGroup {
    /// A group of so many ranks, that each is to join.
    ///
    /// # Errors
    /// [`KernelError::Device`] when there is no usable driver, or NCCL is not there, in one sentence.
    pub fn new(ranks: usize) -> Result<Arc<Self>, KernelError> {
        libraries::require()?;
        // SAFETY: tries to open a shared library by its known names.
        if !unsafe { sys::is_culib_present() } {
            return Err(KernelError::Device(
                "NCCL (libnccl.so) is not found, and several GPUs need it: install it, or put a folder with libnccl.so, or a link \
                 of that name to libnccl.so.2, on the library path"
                    .into(),
            ));
        }
        let id = result::get_uniqueid().map_err(|e| nccl_error("NCCL cannot start", &e))?;
        let communicators = (0..ranks).map(|_| Mutex::default()).collect();
        Ok(Arc::new(Self { group: Group::new(ranks), id, communicators }))
    }

    /// Where its ranks meet on the host.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Joins as this rank, with all others: it waits for them.
    ///
    /// # Errors
    /// [`KernelError::Device`] when NCCL cannot connect the GPUs.
    pub(super) fn join(self: &Arc<Self>, rank: usize, device: &Device) -> Result<Member, KernelError> {
        device.bind()?;
        let mut communicator = MaybeUninit::uninit();
        // Other ranks, which it waits for, are on other cards.
        let held_off = device.captures().hold_off();
        // SAFETY: writes one handle, which is read only where it succeeded. The device of this rank is the thread's.
        let joined = unsafe {
            let ranks = self.group.ranks() as c_int;
            result::comm_init_rank(communicator.as_mut_ptr(), ranks, self.id, rank as c_int)
        };
        drop(held_off);
        joined.map_err(|e| nccl_error("NCCL cannot connect the GPUs", &e))?;
        // SAFETY: it succeeded.
        let communicator = Communicator(unsafe { communicator.assume_init() });
        *self.communicator(rank) = Some(communicator);
        let member = Member { group: self.clone(), rank };
        // One that failed before this was stored could not end it; dropping the member does.
        match self.group.failure() {
            Some(why) => Err(KernelError::Device(why)),
            None => Ok(member),
        }
    }

    /// Ends the group, giving this reason to whoever waits on the host, and what waits on the devices ends too.
    ///
    /// A rank that is within NCCL then (connecting in [`Self::join`], or in its first sum) is not reached: NCCL has no handle
    /// that another thread may end meanwhile.
    pub fn fail(&self, why: &str) {
        self.group.fail(why);
        let communicators = self.communicators.clone();
        // On a thread that nobody waits for: NCCL ends the last communicator of a process only once all graphs that hold
        // its kernels are gone, and their owner may be the one that calls this.
        let ending = move || communicators.iter().for_each(end);
        // Where there is no thread to be had, what waits on a device goes on waiting.
        let _ = std::thread::Builder::new().name("quire-nccl-end".into()).spawn(ending);
    }

    fn communicator(&self, rank: usize) -> MutexGuard<'_, Option<Communicator>> {
        locked(&self.communicators[rank])
    }
}

fn locked(place: &Mutex<Option<Communicator>>) -> MutexGuard<'_, Option<Communicator>> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the communicator that is in this place.
fn end(place: &Mutex<Option<Communicator>>) {
    let taken = locked(place).take();
    if let Some(Communicator(handle)) = taken {
        // SAFETY: a communicator that was made, taken out of its place: nobody uses it again. What goes wrong in ending it
        // leaves nothing to do.
        let _ = unsafe { result::comm_abort(handle) };
    }
}

impl std::fmt::Debug for NcclGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NcclGroup").field("group", &self.group).finish_non_exhaustive()
    }
}

/// A rank's place in its group, left when it is dropped.
#[derive(Debug)]
pub(super) struct Member {
    group: Arc<NcclGroup>,
    rank: usize,
}

impl Member {
    /// Queues the sum over all ranks of `len` activations at `at`, in place.
    pub(super) fn all_reduce(&self, device: &Device, at: u64, len: usize) {
        let dtype = match device.activations() {
            ActivationDtype::Bf16 => sys::ncclDataType_t::ncclBfloat16,
            ActivationDtype::F16 => sys::ncclDataType_t::ncclFloat16,
        };
        let sum = sys::ncclRedOp_t::ncclSum;
        let stream = device.stream().cu_stream().cast();
        self.queue(device, "a sum over the GPUs", |handle| {
            // SAFETY: callers give memory of this device that they own, of that many activations, and all that uses it is
            // on this stream.
            unsafe { result::all_reduce(at as *const _, at as *mut _, len, dtype, sum, handle, stream) }
        });
    }

    /// Queues the copy of `len` words at `at` from the first rank to all others.
    pub(super) fn broadcast(&self, device: &Device, at: u64, len: usize) {
        let dtype = sys::ncclDataType_t::ncclUint32;
        let stream = device.stream().cu_stream().cast();
        self.queue(device, "a copy to the GPUs", |handle| {
            // SAFETY: as above, of words.
            unsafe { result::broadcast(at as *const _, at as *mut _, len, dtype, 0, handle, stream) }
        });
    }

    fn queue(
        &self,
        device: &Device,
        what: &str,
        operation: impl FnOnce(sys::ncclComm_t) -> Result<result::NcclStatus, NcclError>,
    ) {
        match &*self.group.communicator(self.rank) {
            Some(Communicator(handle)) => {
                if let Err(error) = operation(*handle) {
                    device.fail(&nccl_error(what, &error).to_string());
                }
            }
            None => device
                .fail(&self.group.group.failure().unwrap_or_else(|| format!("{what}: the group has ended"))),
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        end(&self.group.communicators[self.rank]);
    }
}

fn nccl_error(what: &str, error: &NcclError) -> KernelError {
    // SAFETY: the library is there, or there would be no error of it, and has a text, which is never freed, for every one.
    let text = unsafe { CStr::from_ptr(sys::ncclGetErrorString(error.0)) };
    KernelError::Device(format!("{what}: {} (NCCL_DEBUG=WARN says more)", text.to_string_lossy()))
}
