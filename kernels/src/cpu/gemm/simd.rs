//! What the kernels need of an instruction set: sixteen lanes, one for each output of a panel.

/// Outputs in a panel, and lanes.
pub(super) const LANES: usize = 16;

/// Sixteen lanes of an instruction set.
///
/// Every function is inlined into a function that enables the instruction set, which is what makes it compile to
/// the instructions that it names.
///
/// # Safety
/// Callers of each function make sure that the machine has the instruction set, and that pointers are valid for the
/// elements that the function says it reads or writes; they need no alignment.
pub(super) trait Simd {
    /// 16 f32.
    type F: Copy;
    /// 16 i32.
    type I: Copy;
    /// 64 bytes of weights.
    type B: Copy;
    /// One row's pair of activations for bf16 weights, broadcast.
    type Pair: Copy;

    /// Whether bf16 weights take activations rounded to bf16 (else f32).
    const BF16_PAIRS: bool;

    unsafe fn zero() -> Self::F;
    unsafe fn splat(value: f32) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, in one rounding where the instruction set can.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Reads 16 f32.
    unsafe fn load(from: *const f32) -> Self::F;
    /// Reads 16 f16.
    unsafe fn load_f16(from: *const u8) -> Self::F;
    /// Reads `lanes <= 16` f32; the others are 0.
    unsafe fn load_some(from: *const f32, lanes: usize) -> Self::F;
    /// Writes the first `lanes <= 16`.
    unsafe fn store_some(to: *mut f32, value: Self::F, lanes: usize);

    unsafe fn splat_int(value: i32) -> Self::I;
    unsafe fn to_float(value: Self::I) -> Self::F;
    /// Asks for the cache line at `from`, which need not be memory of ours.
    unsafe fn prefetch(from: *const u8);
    /// Reads 64 bytes.
    unsafe fn load_bytes(from: *const u8) -> Self::B;
    unsafe fn low_nibbles(bytes: Self::B) -> Self::B;
    unsafe fn high_nibbles(bytes: Self::B) -> Self::B;
    /// Adds to each lane the dot product of its four unsigned weights, below 64, with the four signed activations of
    /// every lane of `acts`.
    unsafe fn dot_small(acc: Self::I, weights: Self::B, acts: Self::I) -> Self::I;
    /// The same for weights up to 255.
    unsafe fn dot(acc: Self::I, weights: Self::B, acts: Self::I) -> Self::I;

    /// Reads one row's pair of activations: two bf16, or two f32.
    unsafe fn load_pair(from: *const u8) -> Self::Pair;
    /// Adds to each lane the dot product of its two bf16 weights with the pair.
    unsafe fn dot_pair(acc: Self::F, weights: Self::B, acts: Self::Pair) -> Self::F;
}
