//! Matrix products, with the algorithm of each shape chosen by timing, once a card: cuBLASLt's, and for few rows a
//! kernel of ours ([`Skinny`]).
//!
//! `out = x * weight^T`: row-major `[rows, n]` is column-major `[n, rows]`, so cuBLASLt, which is column-major,
//! multiplies the transposed weight (`[k, n]` as it lies) by `x` (`[k, rows]` as it lies).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtMatmulAlgo_t, cublasLtMatmulDescAttributes_t as Desc,
    cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreferenceAttributes_t as Preference, cudaDataType_t,
};

use super::activations::ActivationDtype;
use super::choices::{Choice, Choices};
use super::device::{Device, DeviceVec};
use super::out_of_memory::{OTHERS, if_full};
use super::skinny::Skinny;
use crate::KernelError;

/// Memory that algorithms may use between their parts; what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Algorithms that are timed for a shape, and for one of so many rows that all of the card is busy: there the library's
/// first guesses are as good.
const CANDIDATES: usize = 12;
const CANDIDATES_OF_MANY: usize = 4;
const MANY_ROWS: usize = 2048;
/// Rows up to which the second-level cache is emptied between timed runs: there, weights come from memory.
const COLD_ROWS: usize = 512;
/// More than the second-level cache of any card so far.
const FLUSH: usize = 128 << 20;
/// Milliseconds that our own kernel gains on what is timed here, where it runs by itself: in a step it starts, and
/// fetches its first weights, while the kernels before it end, and what follows it starts likewise.
const OVERLAP_GAIN: f32 = 2e-3;
/// Rows of the shape whose algorithm serves all numbers of rows in the batch-invariant mode.
const INVARIANT_ROWS: usize = 128;

/// `CUBLAS_OP_T` of `cublasOperation_t`, an enum of 32 bits; the other operand's default is `CUBLAS_OP_N`.
const TRANSPOSED: i32 = 1;

/// A product's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// f32 output, for logits; else what activations are.
    pub(super) f32_out: bool,
    pub(super) bias: bool,
}

/// Operands in device memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    pub(super) x: u64,
    pub(super) weight: u64,
    /// 0 for none; what activations are.
    pub(super) bias: u64,
    pub(super) out: u64,
}

/// cuBLASLt with its memory and the choices made so far.
pub(super) struct Gemm {
    device: Arc<Device>,
    handle: sys::cublasLtHandle_t,
    workspace: DeviceVec<u8>,
    skinny: Option<Skinny>,
    flush: RefCell<Option<DeviceVec<u8>>>,
    plans: RefCell<HashMap<Shape, Plan>>,
    /// What was chosen here and in earlier starts.
    choices: RefCell<Choices>,
    invariant: bool,
}

// SAFETY: the handle may be used by any thread, by one at a time, which `&self` of a type that is not `Sync` ensures.
unsafe impl Send for Gemm {}

enum Plan {
    CublasLt { call: Call, algorithm: cublasLtMatmulAlgo_t, has_run: Cell<bool> },
    Skinny,
}

impl Plan {
    fn cublas_lt(call: Call, algorithm: cublasLtMatmulAlgo_t) -> Self {
        Self::CublasLt { call, algorithm, has_run: Cell::new(false) }
    }
}

impl Gemm {
    pub(super) fn new(device: Arc<Device>, invariant: bool) -> Result<Self, KernelError> {
        let workspace = device.alloc(
            WORKSPACE,
            "the workspace of matrix products: end other programs on the GPU or choose a smaller model",
        )?;
        let held_off = device.captures().hold_off();
        let handle = cudarc::cublaslt::result::create_handle().map_err(failed)?;
        drop(held_off);
        Ok(Self {
            // Its result of a row may depend on the number of rows.
            skinny: if invariant { None } else { Skinny::new(&device)? },
            // SAFETY: the library is loaded, since it just gave a handle.
            choices: RefCell::new(Choices::open(&device, unsafe { sys::cublasLtGetVersion() })),
            device,
            handle,
            workspace,
            flush: RefCell::new(None),
            plans: RefCell::default(),
            invariant,
        })
    }

    /// Rows to compute when `rows` are wanted: few different shapes are met, so that choices are soon all made.
    pub(super) fn padded_rows(rows: usize) -> usize {
        let step = match rows {
            0..=4 => 1,
            5..=8 => 4,
            9..=64 => 8,
            65..=128 => 16,
            129..=256 => 32,
            257..=1024 => 64,
            _ => 128,
        };
        rows.next_multiple_of(step)
    }

    /// Queues a product. `shape.rows` rows are read from `x` and written to `out`.
    pub(super) fn run(&self, shape: Shape, operands: Operands) {
        if let Err(error) = self.try_run(shape, operands) {
            self.device.fail(&error.to_string());
        }
    }

    /// Our own kernel, if it is the choice for this product: it can also do what follows the product. `operands` are
    /// those of the product by itself, whose result may be written here.
    pub(super) fn skinny(&self, shape: Shape, operands: Operands) -> Option<&Skinny> {
        let skinny = self.skinny.as_ref().filter(|skinny| skinny.serves(shape))?;
        match self.with_plan(shape, operands, |plan| matches!(plan, Plan::Skinny)) {
            Ok(chosen) => chosen.then_some(skinny),
            Err(error) => {
                self.device.fail(&error.to_string());
                None
            }
        }
    }

    fn try_run(&self, shape: Shape, operands: Operands) -> Result<(), KernelError> {
        self.with_plan(shape, operands, |plan| match plan {
            Plan::Skinny => {
                let skinny = self.skinny.as_ref().expect("it was planned with");
                skinny.product(&self.device, shape, operands);
                Ok(())
            }
            Plan::CublasLt { call, algorithm, has_run } => {
                // The first run loads the kernel.
                let _held_off = (!has_run.replace(true)).then(|| self.device.captures().hold_off());
                self.queue(call, algorithm, operands)
                    .map_err(|e| KernelError::Device(format!("cuBLASLt failed on {shape:?}: {e}")))
            }
        })?
    }

    /// Gives `f` the plan of a shape, which is made if there is none yet.
    fn with_plan<T>(
        &self,
        shape: Shape,
        operands: Operands,
        f: impl FnOnce(&Plan) -> T,
    ) -> Result<T, KernelError> {
        let mut plans = self.plans.borrow_mut();
        let plan = match plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(self.plan(shape, operands)?),
        };
        Ok(f(plan))
    }

    fn queue(
        &self,
        call: &Call,
        algorithm: &cublasLtMatmulAlgo_t,
        operands: Operands,
    ) -> Result<(), CublasError> {
        if operands.bias != 0 {
            call.set(Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &operands.bias)?;
        }
        let (one, zero) = (1.0f32, 0.0f32);
        // SAFETY: descriptors live in `call`; the operands have the shape's sizes by the caller's contract.
        unsafe {
            cudarc::cublaslt::result::matmul(
                self.handle,
                call.desc,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                operands.weight as *const c_void,
                call.weight,
                operands.x as *const c_void,
                call.x,
                operands.out as *const c_void,
                call.out,
                operands.out as *mut c_void,
                call.out,
                algorithm,
                self.workspace.ptr() as *mut c_void,
                WORKSPACE,
                self.device.stream().cu_stream().cast(),
            )
        }
    }

    fn plan(&self, shape: Shape, operands: Operands) -> Result<Plan, KernelError> {
        let skinny = self.skinny.as_ref().filter(|skinny| skinny.serves(shape));
        let activations = self.device.activations();
        let call = Call::new(shape, activations).map_err(failed)?;
        match self.choices.borrow().get(&shape).filter(|_| !self.invariant) {
            Some(Choice::Skinny) if skinny.is_some() => return Ok(Plan::Skinny),
            Some(Choice::CublasLt(data)) if self.accepts(&call, &cublasLtMatmulAlgo_t { data }) => {
                return Ok(Plan::cublas_lt(call, cublasLtMatmulAlgo_t { data }));
            }
            _ => {}
        }
        let asked = match self.invariant {
            // One algorithm, without splits of the sum, for every number of rows: a row's result is then its own.
            true => Call::new(Shape { rows: INVARIANT_ROWS, ..shape }, activations).map_err(failed)?,
            false => Call::new(shape, activations).map_err(failed)?,
        };
        let found = self.candidates(&asked).map_err(failed)?;
        let first = found
            .first()
            .copied()
            .ok_or_else(|| KernelError::Device(format!("cuBLASLt has no algorithm for {shape:?}")))?;
        if self.invariant {
            return Ok(Plan::cublas_lt(call, first));
        }
        let mut best = (f32::INFINITY, first);
        // A time with weights in the second-level cache is none to keep for later starts.
        let is_cold = shape.rows > COLD_ROWS || self.flush();
        let most = if shape.rows > MANY_ROWS { CANDIDATES_OF_MANY } else { CANDIDATES };
        for algorithm in found.into_iter().take(most) {
            let time = self.time(shape, || self.queue(&call, &algorithm, operands))?;
            if let Some(time) = time.filter(|time| *time < best.0) {
                best = (time, algorithm);
            }
        }
        if let Some(skinny) = skinny {
            let time = self.time(shape, || {
                skinny.product(&self.device, shape, operands);
                Ok(())
            })?;
            if time.is_some_and(|time| time - OVERLAP_GAIN < best.0) {
                if is_cold {
                    self.choices.borrow_mut().put(shape, Choice::Skinny);
                }
                return Ok(Plan::Skinny);
            }
        }
        // Where none could be timed, the next start may find one.
        if best.0.is_finite() && is_cold {
            self.choices.borrow_mut().put(shape, Choice::CublasLt(best.1.data));
        }
        Ok(Plan::cublas_lt(call, best.1))
    }

    /// Whether cuBLASLt can run an algorithm that it described earlier.
    fn accepts(&self, call: &Call, algorithm: &cublasLtMatmulAlgo_t) -> bool {
        // SAFETY: zero bytes are a valid value of this plain struct.
        let mut result: cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let _held_off = self.device.captures().hold_off();
        // SAFETY: the descriptors are alive; the library checks the description.
        let checked = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                call.desc,
                call.weight,
                call.x,
                call.out,
                call.out,
                std::ptr::from_ref(algorithm),
                &raw mut result,
            )
        };
        checked.result().is_ok() && result.workspaceSize <= WORKSPACE
    }

    fn candidates(&self, call: &Call) -> Result<Vec<cublasLtMatmulAlgo_t>, CublasError> {
        let preference = PreferenceHandle::new(self.invariant)?;
        // SAFETY: zero bytes are a valid value of this plain struct.
        let mut found: [cublasLtMatmulHeuristicResult_t; CANDIDATES] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        let _held_off = self.device.captures().hold_off();
        // SAFETY: the descriptors are alive and the array has the size that is given.
        unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                call.desc,
                call.weight,
                call.x,
                call.out,
                call.out,
                preference.0,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        }
        .result()?;
        let usable =
            |r: &&cublasLtMatmulHeuristicResult_t| r.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS;
        Ok(found[..count as usize].iter().filter(usable).map(|r| r.algo).collect())
    }

    /// Milliseconds of one run, the least of a few; none when the algorithm refuses.
    fn time(
        &self,
        shape: Shape,
        queue: impl Fn() -> Result<(), CublasError>,
    ) -> Result<Option<f32>, KernelError> {
        let (start, end) = (self.device.event()?, self.device.event()?);
        let mut least = f32::INFINITY;
        for run in 0..4 {
            if shape.rows <= COLD_ROWS {
                _ = self.flush();
            }
            self.device.record(&start);
            let held_off = self.device.captures().hold_off();
            if queue().is_err() {
                return Ok(None);
            }
            drop(held_off);
            self.device.record(&end);
            self.device.synchronize()?;
            let took = start.elapsed_ms(&end);
            let took = took.map_err(|e| KernelError::Device(format!("an event: {e}")))?;
            // The first run loads the kernel.
            if run > 0 {
                least = least.min(took);
            }
        }
        Ok(Some(least))
    }

    /// Empties the second-level cache; false where there is no memory for that.
    fn flush(&self) -> bool {
        let mut flush = self.flush.borrow_mut();
        if flush.is_none() {
            *flush = self.device.alloc(FLUSH, "timing matrix products").ok();
        }
        if let Some(memory) = flush.as_ref() {
            self.device.set_zero(memory.ptr(), memory.len());
        }
        flush.is_some()
    }

    /// Gives back the memory that timing took.
    pub(super) fn end_timing(&self) -> Result<(), KernelError> {
        self.device.synchronize()?;
        self.flush.borrow_mut().take();
        Ok(())
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        // The stream's work is done before memory goes.
        let _ = self.device.synchronize();
        let _held_off = self.device.captures().hold_off();
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { cudarc::cublaslt::result::destroy_handle(self.handle) };
    }
}

impl std::fmt::Debug for Gemm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gemm").field("plans", &self.plans.borrow().len()).finish_non_exhaustive()
    }
}

fn failed(error: CublasError) -> KernelError {
    KernelError::Device(format!("cuBLASLt: {error}{}", if_full(&error, OTHERS)))
}

/// Descriptors of one shape.
struct Call {
    desc: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
}

impl Call {
    fn new(shape: Shape, activations: ActivationDtype) -> Result<Self, CublasError> {
        use cudarc::cublaslt::result::{create_matmul_desc, create_matrix_layout};
        let Shape { rows, n, k, f32_out, bias } = shape;
        let element = activations.cuda_type();
        let out = if f32_out { cudaDataType_t::CUDA_R_32F } else { element };
        let call = Self {
            desc: create_matmul_desc(cublasComputeType_t::CUBLAS_COMPUTE_32F, cudaDataType_t::CUDA_R_32F)?,
            weight: create_matrix_layout(element, k as u64, n as u64, k as i64)?,
            x: create_matrix_layout(element, k as u64, rows as u64, k as i64)?,
            out: create_matrix_layout(out, n as u64, rows as u64, n as i64)?,
        };
        call.set(Desc::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            call.set(Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
            call.set(Desc::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &element)?;
        }
        Ok(call)
    }

    fn set<T>(&self, attribute: Desc, value: &T) -> Result<(), CublasError> {
        // SAFETY: the attribute's type is `T` at every call in this file; it is copied before the call returns.
        unsafe {
            cudarc::cublaslt::result::set_matmul_desc_attribute(
                self.desc,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<T>(),
            )
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        use cudarc::cublaslt::result::{destroy_matmul_desc, destroy_matrix_layout};
        // SAFETY: made by `new`, destroyed once.
        unsafe {
            let _ = destroy_matmul_desc(self.desc);
            for layout in [self.weight, self.x, self.out] {
                let _ = destroy_matrix_layout(layout);
            }
        }
    }
}

struct PreferenceHandle(sys::cublasLtMatmulPreference_t);

impl PreferenceHandle {
    fn new(invariant: bool) -> Result<Self, CublasError> {
        use cudarc::cublaslt::result::{create_matmul_pref, set_matmul_pref_attribute};
        let preference = Self(create_matmul_pref()?);
        let workspace = WORKSPACE;
        // SAFETY: the attributes' types are size_t and uint32_t; values are copied before the calls return.
        unsafe {
            set_matmul_pref_attribute(
                preference.0,
                Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of::<usize>(),
            )?;
            // A sum that is cut into parts is put together in single precision: as f16, a part can be infinite where the
            // whole is not.
            let scheme = match invariant {
                true => sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE,
                false => sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
            } as u32;
            set_matmul_pref_attribute(
                preference.0,
                Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                (&raw const scheme).cast(),
                size_of::<u32>(),
            )?;
        }
        Ok(preference)
    }
}

impl Drop for PreferenceHandle {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { cudarc::cublaslt::result::destroy_matmul_pref(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::Gemm;

    #[test]
    fn padding_is_small_and_idempotent() {
        for rows in 1..5000 {
            let padded = Gemm::padded_rows(rows);
            assert!(padded >= rows && Gemm::padded_rows(padded) == padded, "{rows} -> {padded}");
            assert!(rows < 9 || padded * 3 <= rows * 4 + 24, "{rows} -> {padded}");
        }
    }
}
